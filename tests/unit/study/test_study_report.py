from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dti_ray.config.study import StudyConfig
from dti_ray.errors import InputError
from dti_ray.metrics import Predictions
from dti_ray.study.compare import compare
from dti_ray.study.cost import costs
from dti_ray.study.promises import choose, missing_runs, promises
from dti_ray.study.report import write_quality
from dti_ray.study.results import Classic, StudyResults, TrainedRun
from dti_ray.study.words import MINUS, TIMES, count, signed, table, times
from tests.study_results import answer, results, run, said

ROWS = {
    "sliding": {"change": {"packing.k": 1, "packing.window": "interactions"}, "final": True},
    "naive-20": {"change": {"packing.k": 20, "packing.window": "interactions"}},
    "naive-50": {
        "change": {"packing.k": 50, "packing.window": "interactions"},
        "final": True,
        "note": "No correction.",
    },
    "anchored-50": {"change": {"packing.k": 50, "packing.window": "off"}, "final": True, "contexts": [20, 45]},
    "anchored-all": {"change": {"packing.k": "all", "packing.window": "off"}, "final": True},
}
TABLES = [
    {"title": "How many targets", "question": "What is lost as k grows?", "rows": ["sliding", "naive-20", "naive-50"]}
]
STUDY = {"default": "anchored-50", "headline": list(ROWS), "tables": TABLES}
PNG = b"\x89PNG"


def trained(row: str, seed: int, noise: float, seconds: float = 80.0) -> TrainedRun:
    """Return a run of one of ROWS with the answers that the study asks for."""
    asked = ROWS[row]
    k = asked["change"]["packing.k"]
    splits = ("valid", "test") if asked.get("final") else ("valid",)
    protocols = ("sliding",) if k == 1 else ("sliding", "streaming")
    answers = [
        answer(said(noise + 0.001 * seed, seed), split, protocol, n)
        for split in splits
        for n in asked.get("contexts", (20,))
        for protocol in protocols
    ]
    return run(row, seed, answers, k, 1000.0 if k == 1 else seconds)


def classic(noise: float, name: str = "item mean") -> Classic:
    return Classic(name, {split: said(noise, 77) for split in ("valid", "test")}, 0.5, "shrinkage 5")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write the report of a study of which everything has ended."""
    return write_quality(whole(), tmp_path_factory.mktemp("written") / "benchmarks", "made")


def whole() -> StudyResults:
    runs = [trained(row, seed, 1.0, 70.0) for row in ROWS for seed in range(3)]
    return results(ROWS, runs, [classic(4.0), classic(3.0, "boosting")], padded_over_packed=1.1, **STUDY)


def verdicts(made: StudyResults) -> list[str]:
    return [one.verdict for one in promises(made, compare(made, 50), costs(made))]


def test_whole_study_is_written_as_page_json_and_pictures(files: list[Path]) -> None:
    assert [file.name for file in files[:2]] == ["quality_made.md", "quality_made.json"]
    assert sorted(file.name for file in files[2:]) == [
        f"quality_made_{part}.png" for part in ("contexts", "gaps", "seconds")
    ]
    assert all(file.read_bytes().startswith(PNG) for file in files[2:])
    page = files[0].read_text(encoding="utf-8")
    assert page.count("- **Reached**") == 3
    assert "Not reached" not in page
    assert "not there yet" not in page
    assert all(f"({file.name})" in page for file in files[2:])
    assert "--row naive-50 --seed 0" in page
    assert "No correction." in page


def test_study_whose_reference_is_no_sliding_window_promises_nothing_against_one(tmp_path: Path) -> None:
    rows = {name: ROWS[name] for name in ("anchored-50", "naive-50")}
    runs = [trained(row, seed, 1.0, 70.0) for row in rows for seed in range(3)]  # as long: one point of an axis
    made = results(rows, runs, [classic(4.0)], **{**STUDY, "headline": list(rows), "tables": []})
    page = write_quality(made, tmp_path, "made")[0].read_text(encoding="utf-8")
    assert "compared with row `anchored-50` asked under sliding inference" in page
    assert f"{TIMES} reference |" in page
    assert not any(word in page for word in ("packed", "padded", "against one target", "less training time"))
    assert page.count("- **Reached**") == 1, "the default against the baselines"


def test_tables_are_no_wider_than_nine_columns_and_all_lines_of_one_have_as_many(files: list[Path]) -> None:
    page = files[0].read_text(encoding="utf-8")
    tables = [
        [line.count("|") - 1 for line in part.splitlines()] for part in page.split("\n\n") if part.startswith("|")
    ]
    assert len(tables) >= 8
    assert all(len(set(widths)) == 1 and widths[0] <= 9 for widths in tables)


def test_headline_of_the_json_has_what_the_page_shows_first(files: list[Path]) -> None:
    found = json.loads(files[1].read_text(encoding="utf-8"))["headline"]
    first = next(
        one for one in found if one["k"] == 50 and one["protocol"] == "sliding" and one["row"] == "anchored-50"
    )
    assert (first["split"], first["n"], first["seeds"]) == ("test", 20, 3)
    assert (first["auc_gap"], first["auc_gap_low"], first["auc_gap_high"]) == (0.0, 0.0, 0.0)
    assert first["speedup_packed"] == pytest.approx(1000 / 70)
    assert first["speedup_padded"] == pytest.approx(1100 / 70)
    reference = next(one for one in found if one["row"] == "sliding")
    assert reference["auc_gap"] is None


def test_the_same_results_give_the_same_files(files: list[Path], tmp_path: Path) -> None:
    again = write_quality(whole(), tmp_path, "made")
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]


@pytest.mark.parametrize(
    ("noise", "seconds", "wanted"),
    [
        (1.0, 70.0, ["reached", "reached"]),
        (1.0, 90.0, ["reached", "not reached"]),  # 11 times less is enough for 50, not for all
        (1.0, 110.0, ["not reached", "not reached"]),
        (0.3, 70.0, ["reached", "reached"]),  # better is welcome
        (5.0, 70.0, ["not reached", "not reached"]),
    ],
)
def test_quality_and_speed_must_both_be_reached(noise: float, seconds: float, wanted: list[str]) -> None:
    runs = [trained("sliding", 0, 1.0), *(trained(row, 0, noise, seconds) for row in ("anchored-50", "anchored-all"))]
    assert verdicts(results(ROWS, runs, **STUDY))[:2] == wanted


def test_default_must_beat_the_best_of_the_classics() -> None:
    runs = [trained(row, 0, 1.0) for row in ("sliding", "anchored-50")]
    weak, strong = classic(9.0), classic(0.2)
    assert verdicts(results(ROWS, runs, [weak], **STUDY))[2] == "reached"
    assert verdicts(results(ROWS, runs, [weak, strong], **STUDY))[2] == "not reached"
    assert verdicts(results(ROWS, runs, [], **STUDY))[2] == "not measured yet"
    assert verdicts(results(ROWS, runs, [weak], **{**STUDY, "default": None}))[2] == "not measured yet"


def test_verdicts_say_on_which_split_and_seeds_they_rest() -> None:
    made = results(ROWS, [trained(row, 1, 1.0) for row in ("sliding", "naive-50")], **STUDY)
    assert promises(made, compare(made, 20), costs(made))[0].numbers[0].endswith("1 of 3 seeds, test split")
    rows = {name: {**row, "final": False} for name, row in ROWS.items()}
    runs = [run(row, 0, [answer(said(1.0))], k, 80.0) for row, k in (("sliding", 1), ("naive-50", 50))]
    untested = results(rows, runs, **STUDY)
    numbers = promises(untested, compare(untested, 20), costs(untested))[0].numbers[0]
    assert numbers.endswith("validation split, the test split is not touched yet")


def test_best_is_chosen_by_validation_alone() -> None:
    good_on_test = [answer(said(1.5, 1)), answer(said(0.1, 2), "test")]
    good_on_valid = [answer(said(0.5, 3)), answer(said(5.0, 4), "test")]
    made = results({"a": {}, "b": {}}, [run("a", 0, good_on_test), run("b", 0, good_on_valid)])
    choice = choose(compare(made, 0), "sliding")
    assert choice is not None
    assert choice.valid.asked.row == "b"
    assert choice.test is not None
    assert choice.test.auc.value < 0.7
    assert choose(compare(made, 0), "streaming") is None


def test_one_lucky_seed_is_not_chosen() -> None:
    runs = [run("a", seed, [answer(said(1.0, seed))]) for seed in (0, 1)]
    made = results({"a": {}, "lucky": {}}, [*runs, run("lucky", 0, [answer(said(0.1))])])
    choice = choose(compare(made, 0), "sliding")
    assert choice is not None
    assert (choice.valid.asked.row, choice.rivals) == ("a", 1)


def test_partial_study_names_what_is_missing(tmp_path: Path) -> None:
    made = results(
        ROWS, [trained("sliding", 0, 1.0), trained("naive-20", 0, 1.0), trained("naive-20", 1, 1.0)], **STUDY
    )
    assert missing_runs(made)["naive-20"] == [2]
    page = write_quality(made, tmp_path, "made")[0].read_text(encoding="utf-8")
    assert "3 of 15 runs have ended" in page
    assert "- `sliding`: seeds 1, 2" in page
    assert "- `naive-20`: seed 2" in page
    assert "- the classical baselines" in page
    assert page.count("**Not measured yet**") == 3
    assert "2 (gap: 1)" in page


def test_study_without_any_run_or_reference_is_a_page_all_the_same(tmp_path: Path) -> None:
    nothing = write_quality(results(ROWS, [], **STUDY), tmp_path, "nothing")
    assert [file.suffix for file in nothing] == [".md", ".json"]
    assert "0 of 15 runs have ended" in nothing[0].read_text(encoding="utf-8")
    alone = results(ROWS, [trained("naive-50", 0, 1.0)], [classic(2.0)], **STUDY)
    page = write_quality(alone, tmp_path, "alone")[0].read_text(encoding="utf-8")
    assert re.search(r"\*\*naive-50\*\* \| sliding \| 50 \| 20 \| 1 \| 0\.\d{4} \| – \| – \| – \|", page)


def test_what_is_not_defined_is_null_in_json_and_a_dash_on_the_page(tmp_path: Path) -> None:
    clicks = Predictions(np.array([0, 1]), np.array([1, 1]), np.array([0.2, 0.4]))
    runs = [run(row, seed, [answer(clicks)], k) for row, k in (("sliding", 1), ("naive-50", 50)) for seed in (0, 1)]
    files = write_quality(results(ROWS, runs, **STUDY), tmp_path, "made")
    assert all(one["auc"] is None for one in json.loads(files[1].read_text(encoding="utf-8"))["headline"])
    assert "nan" not in files[0].read_text(encoding="utf-8")


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file", encoding="utf-8")
    with pytest.raises(InputError, match=r"taken: .*File exists"):
        write_quality(results(ROWS, [], **STUDY), taken, "made")


def test_default_must_be_a_row() -> None:
    with pytest.raises(ValueError, match="'other' is named"):
        StudyConfig.model_validate({"rows": {"a": {}}, "default": "other"})


def test_numbers_are_written_for_people() -> None:
    assert [signed(value) for value in (0.00121, -0.0004, -0.00001, float("nan"))] == [
        "+0.0012",
        f"{MINUS}0.0004",
        "0.0000",
        "–",
    ]
    assert [times(value) for value in (9.966, 11.54, None)] == [f"9.97 {TIMES}", f"11.5 {TIMES}", "–"]
    assert [count(value) for value in (0.5, 640, 9981, 22_600, 3.67e6)] == ["0.5", "640", "9,981", "22.6 k", "3.67 M"]
    assert table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"
