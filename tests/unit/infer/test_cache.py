"""A remembered user answers as prompts that are read whole: streaming ones, or stand-alone ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_ray.config import Window
from dti_ray.errors import ConfigError
from dti_ray.infer.cache import Protocol, User, append, remember, score_stream, score_user
from dti_ray.infer.requests import History
from dti_ray.infer.slate import Reader, Slate, score_slates
from dti_ray.model.attention import past
from tests.architectures import load_architecture, save_architecture
from tests.builders import make_config
from tests.scoring import (
    CPU,
    DEBIAS,
    RESETS,
    WINDOWS,
    alone,
    make_history,
    make_reader,
    make_slate,
    score_last,
    streamed,
)

TOLERANCE = 1e-4
VISIBLY = 0.05
SIZE = 13
N, K = 4, 3  # of `make_reader`

every_window = pytest.mark.parametrize("window", WINDOWS)
every_reset = pytest.mark.parametrize("reset", RESETS)
methods = given(
    context=st.sampled_from(["ordered", "strictly_earlier"]), debias=st.sampled_from(DEBIAS),
    prefix=st.sampled_from([0, 3]), gaps=st.booleans(), layers=st.sampled_from([1, 3]), seed=st.integers(0, 99),
)  # fmt: skip


def read_in_turns(reader: Reader, history: History, protocol: Protocol) -> np.ndarray:
    """Score each interaction before it is appended."""
    user = remember(reader, history[:0], protocol)
    found = []
    for i in range(len(history)):
        found.append(score_user(reader, user, history[i : i + 1])[0])
        user = append(reader, user, history[i : i + 1])
    return np.array(found)


@every_reset
@every_window
@settings(max_examples=2, deadline=None)
@methods
def test_streaming_equals_training_prompts_read_at_once_or_as_it_happens(
    window: str, reset: str, context: str, debias: list[str], prefix: int, gaps: bool, layers: int, seed: int
) -> None:
    method = [*WINDOWS[window], *RESETS[reset], *debias, f"prompt.context={context}", f"model.layers={layers}"]
    reader = make_reader(*method, prefix=prefix, gaps=gaps, seed=seed)
    history = make_history(SIZE, seed)
    is_anchored = window == "off"
    expected = streamed(reader, history, k=K if is_anchored else None, n=N if is_anchored else SIZE)
    np.testing.assert_allclose(score_stream(reader, history), expected, atol=TOLERANCE)
    np.testing.assert_allclose(read_in_turns(reader, history, "streaming"), expected, atol=TOLERANCE)


@every_reset
@every_window
@settings(max_examples=2, deadline=None)
@methods
def test_sliding_equals_stand_alone_prompts_as_it_happens(
    window: str, reset: str, context: str, debias: list[str], prefix: int, gaps: bool, layers: int, seed: int
) -> None:
    method = [*WINDOWS[window], *RESETS[reset], *debias, f"prompt.context={context}", f"model.layers={layers}"]
    reader = make_reader(*method, prefix=prefix, gaps=gaps, seed=seed)
    history = make_history(SIZE, seed)
    expected = [score_last(reader, history[: i + 1], N) for i in range(SIZE)]
    np.testing.assert_allclose(read_in_turns(reader, history, "sliding"), expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    "method",
    [["model.layers=1", *WINDOWS["tokens"]], ["model.layers=3", *RESETS["constant"]], ["model.layers=3", *DEBIAS[2]]],
    ids=["one layer", "full reset", "debias"],
)
def test_prefix_that_is_not_pinned_stays_in_front_of_prompts_that_begin_anew(method: list[str]) -> None:
    reader = make_reader("packing.window=off", *method, "prompt.prefix_position=first")
    history = make_history(SIZE)
    sliding = [score_last(reader, history[: i + 1], N) for i in range(SIZE)]
    np.testing.assert_allclose(read_in_turns(reader, history, "sliding"), sliding, atol=TOLERANCE)
    if reader.rules.window is Window.OFF:
        streaming = streamed(reader, history, k=K, n=N)
        np.testing.assert_allclose(read_in_turns(reader, history, "streaming"), streaming, atol=TOLERANCE)


@pytest.mark.parametrize("window", ["interactions", "tokens"])
def test_stream_without_end_refuses_a_prefix_that_is_not_pinned(window: str) -> None:
    history = make_history(SIZE)
    reader = make_reader(*WINDOWS[window], "prompt.prefix_position=first")
    for ask in (lambda: remember(reader, history, "streaming"), lambda: score_stream(reader, history)):
        with pytest.raises(ConfigError, match=r"^prompt\.prefix_position: got first, which streams leave ever further"):
            ask()
    score_stream(make_reader(*WINDOWS[window], "prompt.prefix_position=first", prefix=0), history)


@every_window
@pytest.mark.parametrize("protocol", ["streaming", "sliding"])
@pytest.mark.parametrize("context", ["ordered", "strictly_earlier"])
def test_remembering_equals_appending_one_by_one(window: str, protocol: Protocol, context: str) -> None:
    reader = make_reader("model.layers=3", *WINDOWS[window], f"prompt.context={context}", gaps=True)
    history = make_history(N * 3 + 8)
    grown = remember(reader, history[:0], protocol)
    for i in range(len(history)):
        if i % 4 == 3:
            candidates = replace(make_slate(0, 3).candidates, times=np.full(3, int(history.times[i])))
            at_once = remember(reader, history[:i], protocol)
            in_two = append(reader, remember(reader, history[: i // 2], protocol), history[i // 2 : i])
            expected = score_user(reader, grown, candidates)
            for user in (at_once, in_two):
                np.testing.assert_allclose(score_user(reader, user, candidates), expected, atol=TOLERANCE)
                assert len(user.history) - user.start == len(grown.history) - grown.start
        grown = append(reader, grown, history[i : i + 1])


def test_anchored_prompts_of_all_targets_are_as_long_as_a_pass_surely_holds() -> None:
    reader = make_reader("packing.window=off", "packing.k=all", "eval.row_tokens=60", "prompt.max_item_tokens=5")
    assert reader.k == 60 // 6 - N
    history = make_history(2 * SIZE)
    expected = streamed(reader, history, k=reader.k, n=N)
    np.testing.assert_allclose(score_stream(reader, history), expected, atol=TOLERANCE)
    np.testing.assert_allclose(read_in_turns(reader, history, "streaming"), expected, atol=TOLERANCE)


one_method = given(
    reset=st.sampled_from(sorted(RESETS)), context=st.sampled_from(["ordered", "strictly_earlier"]),
    debias=st.sampled_from(DEBIAS), prefix=st.sampled_from([0, 3]), gaps=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip


@settings(max_examples=8, deadline=None)
@one_method
def test_sliding_and_streaming_agree_for_one_layer(
    reset: str, context: str, debias: list[str], prefix: int, gaps: bool, seed: int
) -> None:
    method = ["packing.window=interactions", *RESETS[reset], *debias, f"prompt.context={context}"]
    reader = make_reader("model.layers=1", *method, prefix=prefix, gaps=gaps, seed=seed)
    history = make_history(SIZE, seed)
    slates = [Slate(history[:i], history[i : i + 1]) for i in range(SIZE)]
    sliding = np.concatenate(score_slates(reader, slates))
    np.testing.assert_allclose(score_stream(reader, history), sliding, atol=TOLERANCE)


@settings(max_examples=8, deadline=None)
@one_method
def test_sliding_and_streaming_agree_in_anchored_prompts_of_the_same_context(
    reset: str, context: str, debias: list[str], prefix: int, gaps: bool, seed: int
) -> None:
    method = ["packing.window=off", *RESETS[reset], *debias, f"prompt.context={context}"]
    reader = make_reader("model.layers=4", *method, prefix=prefix, gaps=gaps, seed=seed)
    history = make_history(SIZE, seed)
    starts = [max(reader.cut(history, i // K * K) - N, 0) for i in range(SIZE)]
    sliding = [score_last(reader, history[: i + 1], reader.cut(history, i) - start) for i, start in enumerate(starts)]
    np.testing.assert_allclose(score_stream(reader, history), sliding, atol=TOLERANCE)


def test_contrast_deep_layers_leak_under_streaming_and_not_under_sliding() -> None:
    reader = make_reader("model.layers=4", "packing.window=interactions")
    slate = make_slate(SIZE, 5)
    expected = alone(reader, slate)
    streaming, sliding = (
        score_user(reader, remember(reader, slate.history, protocol), slate.candidates)
        for protocol in ("streaming", "sliding")
    )
    np.testing.assert_allclose(sliding, expected, atol=TOLERANCE)
    assert np.abs(streaming - expected).max() > VISIBLY


def tokens_read(reader: Reader, user: User, arrivals: History) -> int:
    """Return the tokens that an append reads."""
    read: list[int] = []
    hook = reader.model.decoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    append(reader, user, arrivals)
    hook.remove()
    return sum(read)


@every_window
def test_appending_reads_only_what_is_new_and_drops_what_nobody_sees(window: str) -> None:
    reader = make_reader("model.layers=3", "packing.k=1000", "packing.n=4", *WINDOWS[window])
    history = make_history(40)
    user = remember(reader, history[:30], "streaming")
    arrival = history[30:31]
    assert tokens_read(reader, user, arrival) == int(arrival.lengths[0]) + 2, "text, feedback and an empty [SUM]"
    sizes = []
    for i in range(30, 40):
        user = append(reader, user, history[i : i + 1])
        sizes.append(user.past.size_bytes)
    if window != "off":
        assert max(sizes) < 2.5 * min(sizes), "what is kept does not grow"


@pytest.mark.parametrize("method", [["model.layers=1"], ["reset.mode=constant", "reset.alpha=1.0"]])
def test_a_sliding_window_moves_without_reading_anew_where_states_know_their_own_interaction_only(
    method: list[str],
) -> None:
    history = make_history(20)
    arrival = history[12:13]
    cheap, dear = (make_reader(*overrides) for overrides in (method, ["model.layers=3"]))
    news = int(arrival.lengths[0]) + 2
    assert tokens_read(cheap, remember(cheap, history[:12], "sliding"), arrival) == news
    assert tokens_read(dear, remember(dear, history[:12], "sliding"), arrival) > news + 4


def test_a_user_stays_as_it_is_when_something_is_appended() -> None:
    reader = make_reader("model.layers=2", "packing.window=interactions")
    slate = make_slate(9, 4)
    user = remember(reader, slate.history[:8], "streaming")
    before = score_user(reader, user, slate.candidates)
    append(reader, user, slate.history[8:])
    np.testing.assert_array_equal(score_user(reader, user, slate.candidates), before)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("debias", DEBIAS[1:])
def test_positions_restart_and_the_stream_stays_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, debias: list[str]
) -> None:
    table = save_architecture(tmp_path, name)
    method = ["packing.window=interactions", "prompt.context=strictly_earlier", "reset.mode=distance", "packing.n=4"]
    config = make_config(f"model.name_or_path={tmp_path}", *method, *debias)
    reader = Reader(load_architecture(config, table), config, table, CPU)
    history = make_history(40, table=table)
    expected = streamed(reader, history, k=None, n=40)
    offsets: list[int] = []
    for restart in (past.RESTART, 20):
        monkeypatch.setattr(past, "RESTART", restart)
        user = remember(reader, history[:0], "streaming")
        for i in range(40):
            offsets.append(user.past.offset)
            (found,) = score_user(reader, user, history[i : i + 1])
            assert found == pytest.approx(expected[i], abs=2 * TOLERANCE)
            user = append(reader, user, history[i : i + 1])
        assert len(user.history) < 12, "n interactions, and what shares a second with the first of them"
    assert max(offsets[:40]) > 100 > 40 > max(offsets[40:])
