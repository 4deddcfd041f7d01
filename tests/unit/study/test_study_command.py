"""The command `bench quality`: wrong input is one line, a study ends with one line of JSON and a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dti_ray.cli import main
from dti_ray.config import to_yaml
from tests.builders import write_dataset
from tests.studies import LENGTHS, study_config

SMOKE = Path(__file__).parents[3] / "configs" / "study_smoke.yaml"


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    """Return exit code, stdout and stderr of the command."""
    with pytest.raises(SystemExit) as ended:
        main(["bench", "quality", *arguments])
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error study.rows: holds nothing; expected name -> a way of training; name a file with one"),
        (["--seed", "1"], "error --seed: got 1; expected --row as well: which row is to be trained again"),
        (["packing.kk=1"], "error packing.kk: unknown key; did you mean packing.k?"),
        (["-c", str(SMOKE), "study.reference=dty"], "error study: 'dty' is named, but study.rows has only sliding"),
        (["-c", str(SMOKE), "data.name=none"], "datasets/none: is no complete data set; expected a manifest.json"),
        (["-c", str(SMOKE), "optim.targets_per_step=1"], "error configuration: optim.targets_per_step must"),
    ],
    ids=lambda value: " ".join(value[-1:]) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_starts_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = answer([*arguments, "--root", str(tmp_path / "root")], capsys)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "root").exists() or not list((tmp_path / "root").iterdir())


def test_study_ends_with_a_report_and_a_row_of_it_can_be_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path, LENGTHS)
    file = tmp_path / "study.yaml"
    file.write_text(to_yaml(study_config(tmp_path)), encoding="utf-8")
    code, out, err = answer(["-c", str(file), "--to", str(tmp_path / "docs"), "--as", "first", "--json"], capsys)
    assert code == 0, err
    said = json.loads(out)
    assert (said["runs"], said["done"], said["failed"], said["left"]) == (4, 4, {}, [])
    assert {Path(path).name for path in said["report"]} >= {"quality_first.md", "quality_first.json"}
    page = (tmp_path / "docs/quality_first.md").read_text(encoding="utf-8")
    assert f"dti-ray bench quality -c {file}" in page
    code, out, err = answer(["-c", str(file), "--row", "dti", "--json"], capsys)
    assert code == 0, err
    again = json.loads(out)
    assert (again["run"], again["seed"]) == ("tiny-dti-s0-again", 0)
    assert all(one["auc"] == pytest.approx(one["stated"], abs=1e-6) for one in again["answers"])
    assert answer(["-c", str(file), "--row", "dty"], capsys)[0] == 2
