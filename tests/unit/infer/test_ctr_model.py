"""The library's face, on runs and exports as they lie on storage."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet as pq
from scipy.special import logit

from dti_ray import CtrModel, Request, Text
from dti_ray.config import RunConfig
from dti_ray.data.interactions import UserSequences, open_dataset, read_all
from dti_ray.errors import ConfigError, DamagedError, InputError
from dti_ray.export import export_run
from dti_ray.infer.evaluate import evaluate_run
from dti_ray.infer.requests import Interaction
from dti_ray.storage import Storage
from dti_ray.train.tokens import tokenizer_and_table
from tests.architectures import LORA, save_architecture
from tests.scoring import write_run

ROOT = Path(__file__).parents[3]
HISTORY: list[Interaction] = [("03", 1), ("05", 0), ("07", 1), ("03", 0), ("21", 1), ("09", 1)]
CANDIDATES = ["01", "02", "05"]

# 2026-11, peft 0.21 with Transformers 5.23: it asks for a name that was changed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture
def model(tmp_path: Path) -> CtrModel:
    write_run(tmp_path)
    return CtrModel.load(str(tmp_path / "runs/run"), device="cpu")


def interactions_of(users: UserSequences, user: int) -> list[Interaction]:
    """Return a user's interactions as a caller has them; ids of `write_dataset` are two digits."""
    part = slice(int(users.offsets[user]), int(users.offsets[user + 1]))
    columns = (values[part].tolist() for values in (users.items, users.labels, users.times))
    return [(f"{item:02d}", label, time) for item, label, time in zip(*columns, strict=True)]


def evaluated(config: RunConfig) -> tuple[UserSequences, list[tuple[int, int, float]]]:
    """Evaluate a run as the command does; return its users, and (user, position, log-odds) of each test target."""
    storage = Storage(config.storage.root)
    dataset = open_dataset(storage, config.data.name)
    evaluate_run(config, storage, tokenizer_and_table(config, storage, dataset)[1], "test", lambda _done, _all: None)
    table = pq.read_table(f"{config.storage.root}/runs/run/metrics/predictions_test.parquet")
    users = read_all(dataset)
    numbers = {user: number for number, user in enumerate(users.user_ids.tolist())}
    found = logit(table["probability"].to_numpy())
    positions = zip(table["user_id"].to_pylist(), table["position"].to_pylist(), found.tolist(), strict=True)
    return users, [(numbers[user], position, value) for user, position, value in positions]


@pytest.mark.parametrize(
    "method",
    [
        ["packing.window=off"],
        [
            "packing.window=interactions",
            "prompt.context=strictly_earlier",
            "eval.n=6",
            "prompt.prefix=word03 of film 3",
        ],
        ["packing.window=interactions", "prompt.context=strictly_earlier", "prompt.time=gap", "reset.mode=distance"],
        ["packing.window=tokens", "packing.window_tokens=12", "debias.strength=0.3", "model.head=linear"],
    ],
    ids=lambda method: " ".join(method),
)
def test_a_slate_of_the_real_next_item_equals_evaluate(tmp_path: Path, method: list[str]) -> None:
    users, targets = evaluated(write_run(tmp_path, *method))
    model = CtrModel.load("run", device="cpu", root=str(tmp_path))
    requests = []
    for user, position, _ in targets:
        shown, number = interactions_of(users, user), users.offsets[user] + position
        candidates = [f"{users.items[number]:02d}", "00"]
        requests.append(Request(shown[:position], candidates, int(users.times[number])))
    found = np.array([logit(scores)[0] for scores in model.score_batch(requests)])
    expected = np.array([value for *_, value in targets])
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_run_in_bf16_is_scored_in_bf16(tmp_path: Path, engine: str) -> None:
    config = write_run(tmp_path, "train.precision=bf16", f"train.engine={engine}")
    users, targets = evaluated(config)
    model = CtrModel.load(str(tmp_path / "runs/run"), device="cpu")
    user, position, expected = targets[0]
    shown = interactions_of(users, user)
    found = model.score(shown[:position], [shown[position][0]])
    assert logit(found)[0] == pytest.approx(expected, abs=0.05)
    remembered = model.remember(shown[:position], "sliding")
    assert logit(model.score(remembered, [shown[position][0]]))[0] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    "method",
    [
        ["model.head=linear", "prompt.prefix=word03 of", "packing.window=interactions", "reset.mode=distance"],
        ["model.head=yes_no", "prompt.time=gap", "debias.strength=0.4", "debias.rotary=drop"],
    ],
    ids=lambda method: method[0],
)
def test_an_export_scores_as_its_run_does(tmp_path: Path, method: list[str]) -> None:
    config = write_run(tmp_path, *method)
    export_run(config, Storage(str(tmp_path)), str(tmp_path / "out"))
    run, exported = (CtrModel.load(str(tmp_path / name), device="cpu") for name in ("runs/run", "out"))
    timed = [(item, label, 10 * i) for i, (item, label, *_) in enumerate(HISTORY)]
    odd = [Text("word07 of a film nobody knows"), Text("<|yes|> film <|answer_no|> <|sum|>"), Text("film <yes>")]
    candidates = [*CANDIDATES, *odd]
    expected = run.score(timed, candidates, time=1000)
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(exported.score(timed, candidates, time=1000), expected, atol=1e-5)
    np.testing.assert_allclose(exported.score_stream(timed), run.score_stream(timed), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_an_export_with_merged_adapters_scores_as_its_run_does(tmp_path: Path, name: str, is_tied: bool) -> None:
    save_architecture(tmp_path / "base", name, tie_word_embeddings=is_tied)
    config = write_run(tmp_path, f"model.name_or_path={tmp_path / 'base'}", *LORA, "train.precision=fp32")
    export_run(config, Storage(str(tmp_path)), str(tmp_path / "out"))
    run, exported = (CtrModel.load(str(tmp_path / name), device="cpu") for name in ("runs/run", "out"))
    expected = logit(run.score(HISTORY, CANDIDATES))
    np.testing.assert_allclose(logit(exported.score(HISTORY, CANDIDATES)), expected, atol=1e-4)


def test_a_batch_equals_single_requests_remembered_users_among_them(model: CtrModel) -> None:
    user = model.remember(HISTORY)
    requests = [
        Request(HISTORY[:2], CANDIDATES), Request([], ["04"]), Request(user, CANDIDATES[:2]), Request(HISTORY, []),
        Request(HISTORY, [Text("word02 of film 2"), "02"]),
    ]  # fmt: skip
    together = model.score_batch(requests)
    assert [len(scores) for scores in together] == [3, 1, 2, 0, 2]
    for scores, request in zip(together, requests, strict=True):
        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, model.score(request.history, request.candidates), atol=1e-5)
    assert together[-1][0] == pytest.approx(together[-1][1], abs=1e-7), "an item's own text is that item"


def test_only_the_last_n_interactions_of_a_history_count(model: CtrModel) -> None:
    np.testing.assert_allclose(model.score(HISTORY, CANDIDATES), model.score(HISTORY[-4:], CANDIDATES), atol=1e-6)
    assert np.abs(model.score(HISTORY, CANDIDATES) - model.score(HISTORY[-3:], CANDIDATES)).max() > 1e-3


def test_a_user_who_is_remembered_and_appended_to_scores_as_the_stream_does(model: CtrModel) -> None:
    user = model.append(model.remember(HISTORY[:3]), HISTORY[3:5])
    item = HISTORY[5][0]
    assert model.score(user, [item])[0] == pytest.approx(model.score_stream(HISTORY)[5], abs=1e-6)
    assert len(model.score_stream([])) == 0


@pytest.mark.slow
def test_scoring_needs_neither_ray_nor_deepspeed_and_torch_only_when_it_is_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path)
    code = (
        "import sys; sys.modules['ray'] = sys.modules['deepspeed'] = None\n"
        "import dti_ray\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        f"model = dti_ray.CtrModel.load({str(tmp_path / 'runs/run')!r}, device='cpu')\n"
        "print(len(model.score([('03', 1)], ['05', '07'])))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "2", done.stderr


Wrong = Callable[[CtrModel], object]


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda m: m.score([("03", 1), ("x", 0)], ["01"]), r"history: an unknown item: 'x'; expected ids of the .* 30"),
        (lambda m: m.score([], ["y", "01", "z", "y"]), r"^candidates: 2 unknown items: 'y', 'z'; .*, or Text"),
        (lambda m: m.score([("x", 1), 7], ["y"]), r"history\[1\]: got 7; .*\nhistory: .* 'x'; .*\ncandidates: .* 'y';"),
        (lambda m: m.score([], [f"x{i}" for i in range(500)], time="now"), r"500 .* 'x499'; .*\ntime: time 'now'"),
        (lambda m: m.score_batch([Request([("x", 1)], []), Request([], []), Request([], [None])]),
         r"^requests\[0\]\.history: an unknown item: 'x'; .*\nrequests\[2\]\.candidates\[0\]: item None; expected"),
        (lambda m: m.score([], [7]), r"candidates\[0\]: item 7; expected the id of an item as text, or Text"),
        (lambda m: m.score([], [Text("")]), r"candidates: the text '' has no token"),
        (lambda m: m.score([("03", 2), ("05", float("nan"))], []), r"history\[0\]: label 2; .*\n.*\[1\]: label nan"),
        (lambda m: m.score([], "01"), r"^candidates: got '01'; expected a list$"),
        (lambda m: m.score(None, ["01"]), r"^history: got None; expected a list$"),
        (lambda m: m.remember([], "stream"), r"^protocol: got 'stream'; expected streaming or sliding$"),
        (lambda m: m.score(["03"], ["01"]), r"history\[0\]: got '03'; expected \(item, label\) or"),
        (lambda m: m.score([("03", 1, 5), ("05", 1, 4)], []), r"history: time 4 comes after 5; expected oldest first"),
        (lambda m: m.score([("03", 1, 5), ("05", 1)], []), r"history: 1 of 2 have no time; expected .* or for none"),
        (lambda m: m.score([("03", 1, float("inf"))], []), r"history\[0\]: time inf; expected seconds"),
        (lambda m: m.score([("03", 1, 10**400)], []), r"history\[0\]: time 10{400}; expected seconds"),
        (lambda m: m.score([("03", 1, 5)], ["01"], time=4), r"time: time 4 comes after 5"),
        (lambda m: m.score([], ["01"], time=float("nan")), r"time: time nan; expected seconds"),
        (lambda m: m.append(m.remember([("03", 1, 5)]), [("03", 1, 4)]), r"interactions: time 4 comes after 5"),
    ],
)  # fmt: skip
def test_wrong_requests_are_told_what_was_expected(model: CtrModel, ask: Wrong, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ask(model)


def test_a_model_that_reads_time_gaps_asks_for_times(tmp_path: Path) -> None:
    write_run(tmp_path, "prompt.time=gap")
    model = CtrModel.load(str(tmp_path / "runs/run"), device="cpu")
    with pytest.raises(InputError, match=r"history: 2 of 2 have no time; expected a time in seconds for each$"):
        model.score([("03", 1), ("05", 0)], ["01"])
    with pytest.raises(InputError, match="time: is missing; this model reads how long ago things happened"):
        model.score([("03", 1, 0)], ["01"])
    assert len(model.score([], ["01"])) == 1
    soon, late = (model.score([("03", 1, 0)], ["01"], time=time) for time in (2, 10**6))
    assert abs(soon[0] - late[0]) > 1e-3


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    with pytest.raises(InputError, match=r"runs/nope: is no run; expected one of \['run'\]"):
        CtrModel.load("nope", root=str(tmp_path))
    with pytest.raises(InputError, match="is neither a run nor an export; expected <root>/runs/<name>, the name"):
        CtrModel.load(str(tmp_path))
    with pytest.raises(ConfigError, match=r"device: got 'abacus'; expected cpu, or a GPU of this machine"):
        CtrModel.load(str(tmp_path / "runs/run"), device="abacus")
    export_run(config, Storage(str(tmp_path)), str(tmp_path / "out"))
    tokens = tmp_path / "out/item_tokens.parquet"
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedError, match=r"item_tokens\.parquet: has hash"):
        CtrModel.load(str(tmp_path / "out"))
    manifest = tmp_path / "out/manifest.json"
    manifest.write_text(manifest.read_text().replace("item_tokens.parquet", "other.parquet"))
    with pytest.raises(InputError, match=r"has no item_tokens\.parquet; .*; export the run again"):
        CtrModel.load(str(tmp_path / "out"))
