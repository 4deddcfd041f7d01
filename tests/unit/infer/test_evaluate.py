"""Both protocols over a run as it lies on storage: what they equal, what they write, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet as pq
from scipy.special import expit

from dti_ray.config import RunConfig
from dti_ray.data.interactions import open_dataset, read_all
from dti_ray.data.packing import PackedRow
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import ConfigError, DamagedError, IncompleteError, InputError
from dti_ray.infer import evaluate, units
from dti_ray.infer.evaluate import Plan, Scorer, attention_on, evaluate_run, plan_evaluation, protocol_specs
from dti_ray.infer.units import TargetScores, collect
from dti_ray.report import write_report
from dti_ray.report.artefacts import read_artefacts
from dti_ray.storage import Storage
from dti_ray.train.tokens import tokenizer_and_table
from tests.builders import make_config, score_packed
from tests.scoring import CPU, write_run

K = "packing.k=5"


def planned(config: RunConfig, split: str) -> tuple[Plan, TokenTable]:
    storage = Storage(config.storage.root)
    table = tokenizer_and_table(config, storage, open_dataset(storage, config.data.name))[1]
    return plan_evaluation(config, storage, table, split), table


def scored(config: RunConfig, split: str = "train") -> TargetScores:
    """Score a split in this process; train, the largest one, has no baselines and so no evaluation."""
    plan, table = planned(config, split)
    scorer = Scorer.load(plan, table, CPU)
    found = ((unit.number, scorer.score(unit)) for unit in plan.units)
    return collect(plan.units, found, config.packing.min_context, lambda _done, _total: None)


def evaluated(config: RunConfig, split: str = "test") -> evaluate.Evaluation:
    storage = Storage(config.storage.root)
    table = tokenizer_and_table(config, storage, open_dataset(storage, config.data.name))[1]
    return evaluate_run(config, storage, table, split, lambda _done, _total: None)


@pytest.mark.parametrize(
    "method",
    [
        ["model.layers=1", "packing.window=interactions"],
        ["model.layers=1", "packing.window=interactions", "prompt.context=strictly_earlier", "prompt.prefix=of film"],
        ["model.layers=1", "packing.window=interactions", "debias.strength=0.4", "prompt.time=gap"],
        ["model.layers=3", "packing.window=off", "eval.n=30"],
        ["model.layers=3", "packing.window=off", "eval.n=30", "prompt.context=strictly_earlier"],
        ["model.layers=3", "packing.window=interactions", "reset.mode=constant", "reset.alpha=1.0"],
    ],
    ids=lambda method: " ".join(method),
)
def test_laws_2_3_and_4_sliding_and_streaming_agree_where_the_context_is_the_same(
    tmp_path: Path, method: list[str]
) -> None:
    sliding, streaming = scored(write_run(tmp_path, K, *method)).log_odds
    assert np.ptp(sliding) > 0.1
    np.testing.assert_allclose(streaming, sliding, atol=1e-5)


def test_deep_windows_leak_so_that_the_protocols_differ(tmp_path: Path) -> None:
    sliding, streaming = scored(write_run(tmp_path, K, "packing.window=interactions", "model.layers=3")).log_odds
    assert np.abs(streaming - sliding).max() > 1e-3


@pytest.mark.parametrize("k", ["3", "all"])
def test_streaming_asks_with_the_prompts_of_training(tmp_path: Path, k: str) -> None:
    config = write_run(tmp_path, f"packing.k={k}", "packing.window=interactions", "eval.protocol=streaming")
    plan, table = planned(config, "train")
    model = Scorer.load(plan, table, CPU).forward
    spec = evaluate.pack_spec(config.packing, config.prompt.context, 0, row_tokens=4096)
    assert isinstance(model, torch.nn.Module)
    expected = score_packed(model, read_all(plan.dataset), table, spec)  # type: ignore[arg-type]
    found = scored(config)
    keys = zip(found.user.tolist(), found.position.tolist(), strict=True)
    np.testing.assert_allclose(found.log_odds[0], [expected[key] for key in keys], atol=1e-5)


def test_units_change_nothing_but_the_rows_that_share_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_run(tmp_path, K, "packing.min_context=2")
    assert len(planned(config, "train")[0].units) == 1
    whole = scored(config)
    monkeypatch.setattr(units, "UNIT_TOKENS", 1)
    assert len(planned(config, "train")[0].units) == 2
    parts = scored(config)
    for name in ("user", "position", "label"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    assert parts.user_id.to_pylist() == whole.user_id.to_pylist()
    np.testing.assert_allclose(expit(parts.log_odds), expit(whole.log_odds), atol=1e-6)
    assert whole.position.min() == 2


def test_both_protocols_are_written_side_by_side_with_their_paired_difference(tmp_path: Path) -> None:
    config = write_run(tmp_path, K, "eval.bootstrap=100")
    evaluation = evaluated(config)
    sliding, streaming = evaluation.results
    assert (sliding.protocol, streaming.protocol) == ("sliding", "streaming")
    assert evaluation.metrics == sliding.metrics
    assert 0 < streaming.tokens < sliding.tokens
    for name in ("auc", "log_loss"):
        one, other = (getattr(result.metrics, name).value for result in (streaming, sliding))
        assert evaluation.difference[name].value == pytest.approx(one - other, abs=1e-12)
    metrics = tmp_path / "runs/run/metrics"
    tree = json.loads((metrics / "evaluation_test.json").read_text())
    assert (tree["protocol"], tree["other"]["protocol"]) == ("sliding", "streaming")
    assert tree["other"]["difference"].keys() == {"auc", "log_loss"}
    table = pq.read_table(metrics / "predictions_test.parquet")
    assert table.column_names == ["user_id", "position", "label", "probability", "probability_streaming"]
    assert len(table) == evaluation.metrics.targets == open_dataset(Storage(str(tmp_path)), "tiny").targets[2]


def test_report_shows_both_protocols_and_what_they_cost(tmp_path: Path) -> None:
    evaluated(write_run(tmp_path, K, "eval.bootstrap=100"))
    storage = Storage(str(tmp_path))
    (evaluation,) = read_artefacts(storage, "run").evaluations
    assert evaluation.other is not None
    assert evaluation.cost is not None
    page = Path(write_report(storage, "run", None)).read_text()
    assert "this run, streaming" in page
    assert "streaming \N{MINUS SIGN} sliding" in page
    assert "Tokens per second" in page


@pytest.mark.parametrize(
    ("overrides", "protocols"),
    [
        (["eval.protocol=streaming"], ["streaming"]),
        (["eval.protocol=sliding"], ["sliding"]),
        (["packing.k=1"], ["sliding"]),
        (["packing.k=1", "eval.protocol=streaming"], ["streaming"]),
    ],
)
def test_one_protocol_stands_alone(tmp_path: Path, overrides: list[str], protocols: list[str]) -> None:
    evaluation = evaluated(write_run(tmp_path, "eval.bootstrap=100", *overrides), "valid")
    assert [result.protocol for result in evaluation.results] == protocols
    assert evaluation.difference == {}
    (read,) = read_artefacts(Storage(str(tmp_path)), "run").evaluations
    assert (read.protocol, read.other) == (protocols[0], None)


def test_model_of_a_mixture_is_asked_with_k() -> None:
    plain, mixed = make_config("packing.k=20"), make_config("packing.k=20", "packing.k_min=2")
    assert protocol_specs(mixed, "test") == protocol_specs(plain, "test")


def test_a_target_that_packing_loses_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_run(tmp_path, K, "eval.row_tokens=300")
    plan, table = planned(config, "train")
    scorer = Scorer.load(plan, table, CPU)
    whole = evaluate.pack

    def lossy(*arguments: object) -> list[PackedRow]:
        return list(whole(*arguments))[1:]  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate, "pack", lossy)
    with pytest.raises(IncompleteError, match=r"unit 0, sliding: \d+ targets scored; expected each of \d+, in order"):
        scorer.score(plan.units[0])


def test_rows_of_training_hold_streaming_prompts_whatever_a_row_of_inference_holds(tmp_path: Path) -> None:
    config = write_run(tmp_path, "packing.k=20", "packing.row_tokens=500", "eval.row_tokens=100")
    specs = protocol_specs(config, "test")
    assert [spec.row_tokens for spec in specs.values()] == [100, 500]
    planned(config, "test")
    tight = write_run(tmp_path, "packing.k=20", "packing.row_tokens=500", "eval.row_tokens=100", "eval.n=60")
    with pytest.raises(ConfigError, match=r"eval.row_tokens: got 100; expected at least \d+: n \+ k = 61 interactions"):
        planned(tight, "test")


def test_damaged_states_are_passed_over_when_it_is_planned_and_refused_later(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    plan, table = planned(config, "test")
    (weights,) = (tmp_path / plan.checkpoint.path).glob("weights-*")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DamagedError, match="has hash"):
        Scorer.load(plan, table, CPU)
    with pytest.raises(InputError, match="holds no usable state; train it first"):
        planned(config, "test")


def test_attention_is_the_runs_own_where_the_device_has_it() -> None:
    wanted = ("auto", "dense", "banded", "flex")
    assert [attention_on(one, CPU) for one in wanted] == ["auto", "dense", "banded", "auto"]
    assert [attention_on(one, torch.device("cuda")) for one in wanted] == ["auto", "dense", "auto", "flex"]
