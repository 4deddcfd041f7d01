"""Law 7: C candidates scored in one pass equal C separate passes, whatever the method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dti_ray.data.prompts import TokenTable
from dti_ray.infer.slate import Reader, read_context, score_candidates, score_slates, start_of
from dti_ray.model.attention import slated
from dti_ray.model.batch import collate
from tests.architectures import ARCHITECTURES, LORA, load_architecture, save_architecture
from tests.builders import make_config
from tests.scoring import DEBIAS, RESETS, WINDOWS, alone, make_reader, make_slate

TOLERANCE = 1e-4
VISIBLY = 0.05
FULL = ["packing.window=interactions", "reset.mode=distance", "debias.strength=0.3", "debias.rotary=drop"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("window", WINDOWS)
@settings(max_examples=5, deadline=None)
@given(
    context=st.sampled_from(["ordered", "strictly_earlier"]), debias=st.sampled_from(DEBIAS), n=st.integers(1, 6),
    size=st.integers(0, 9), candidates=st.integers(1, 7), seed=st.integers(0, 99), prefix=st.sampled_from([0, 3]),
    gaps=st.booleans(), same_second=st.booleans(), position=st.sampled_from(["pinned", "first"]),
)  # fmt: skip
def test_law_7_a_slate_equals_separate_passes_read_at_once_or_after_its_context(
    window: str, reset: str, context: str, debias: list[str], n: int, size: int, candidates: int, seed: int,
    prefix: int, gaps: bool, same_second: bool, position: str,
) -> None:  # fmt: skip
    method = [*WINDOWS[window], *RESETS[reset], *debias, f"prompt.context={context}", f"packing.n={n}"]
    method.append(f"prompt.prefix_position={position}")
    reader = make_reader("model.layers=3", *method, prefix=prefix, gaps=gaps, seed=seed)
    slate = make_slate(size, candidates, seed, same_second)
    expected = alone(reader, slate)
    np.testing.assert_allclose(score_slates(reader, [slate])[0], expected, atol=TOLERANCE)
    start = start_of(reader, slate)
    past = read_context(reader, slate.history, start)
    np.testing.assert_allclose(score_candidates(reader, slate, start, past), expected, atol=TOLERANCE)


@pytest.mark.parametrize("backend", ["dense", "banded", pytest.param("flex", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [["packing.window=off"], FULL], ids=["anchored", "full"])
def test_law_7_every_backend_reads_a_slate_by_the_same_rules(backend: str, method: list[str]) -> None:
    reader = make_reader("model.layers=3", *method)
    slate = make_slate(9, 6)
    expected = alone(reader, slate)
    row = reader.lay(slate.history + slate.candidates, start_of(reader, slate), 9, 9)
    reader.model.attention = backend
    with torch.no_grad():
        found = reader.model(collate([row], reader.table))[0].numpy()
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("method", [["packing.window=off"], FULL], ids=["anchored", "full"])
def test_plain_products_answer_as_the_kernel_for_cpus_does(monkeypatch: pytest.MonkeyPatch, method: list[str]) -> None:
    reader, slate = make_reader("model.layers=3", *method), make_slate(9, 6)
    expected = score_slates(reader, [slate])[0]

    def plain(
        query: Tensor, key: Tensor, value: Tensor, *_: object, attn_mask: Tensor | None, scale: float
    ) -> slated.Part:
        return slated.by_products(query, key, value, attn_mask, scale)

    monkeypatch.setattr(slated, "fused", plain)
    np.testing.assert_allclose(score_slates(reader, [slate])[0], expected, atol=TOLERANCE)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenTable]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_architecture(folder, request.param)


@settings(max_examples=4, deadline=None)
@given(
    window=st.sampled_from(sorted(WINDOWS)), reset=st.sampled_from(sorted(RESETS)), debias=st.sampled_from(DEBIAS),
    context=st.sampled_from(["ordered", "strictly_earlier"]), size=st.integers(0, 9), candidates=st.integers(1, 7),
    seed=st.integers(0, 99), same_second=st.booleans(),
)  # fmt: skip
def test_law_7_holds_for_every_architecture_with_adapters(
    architecture: tuple[Path, TokenTable], window: str, reset: str, debias: list[str], context: str, size: int,
    candidates: int, seed: int, same_second: bool,
) -> None:  # fmt: skip
    folder, table = architecture
    method = [*WINDOWS[window], *RESETS[reset], *debias, f"prompt.context={context}", "packing.n=4"]
    config = make_config(f"model.name_or_path={folder}", *LORA, *method)
    reader = Reader(load_architecture(config, table), config, table, CPU)
    slate = make_slate(size, candidates, seed, same_second, table)
    expected = alone(reader, slate)
    np.testing.assert_allclose(score_slates(reader, [slate])[0], expected, atol=TOLERANCE)
    start = start_of(reader, slate)
    past = read_context(reader, slate.history, start)
    np.testing.assert_allclose(score_candidates(reader, slate, start, past), expected, atol=TOLERANCE)


def test_law_7_contrast_candidates_that_saw_each_other_would_get_other_scores() -> None:
    reader = make_reader("model.layers=3")
    slate = make_slate(6, 4)
    as_shown = slate.history + slate.candidates
    row = reader.lay(as_shown, 2, 6, len(as_shown))
    with torch.no_grad():
        found = reader.model(collate([row], reader.table))[0].numpy()
    assert np.abs(found - alone(reader, slate))[1:].max() > VISIBLY


def test_scores_do_not_depend_on_the_order_of_candidates_nor_on_who_else_is_asked() -> None:
    reader = make_reader("model.layers=2", *FULL)
    slate = make_slate(7, 6)
    (found,) = score_slates(reader, [slate])
    for some in (slice(0, 1), slice(2, 6)):
        (fewer,) = score_slates(reader, [replace(slate, candidates=slate.candidates[some])])
        np.testing.assert_allclose(fewer, found[some], atol=TOLERANCE)
    turned = slate.candidates[3:] + slate.candidates[:3]
    np.testing.assert_allclose(
        score_slates(reader, [replace(slate, candidates=turned)])[0], np.roll(found, -3), atol=1e-5
    )


@pytest.mark.parametrize("prefix", [0, 3])
def test_many_slates_of_all_sizes_equal_single_ones(prefix: int) -> None:
    reader = make_reader("model.layers=2", *FULL, "eval.row_tokens=150", prefix=prefix)
    slates = [
        make_slate(size, count, seed) for seed, (size, count) in enumerate([(0, 3), (9, 1), (4, 0), (2, 8), (7, 5)])
    ]
    together = score_slates(reader, slates)
    assert [len(found) for found in together] == [3, 1, 0, 8, 5]
    for found, slate in zip(together, slates, strict=True):
        np.testing.assert_allclose(found, score_slates(reader, [slate])[0], atol=1e-5)


@pytest.mark.parametrize("gaps", [True, False])
def test_a_slate_of_any_size_is_scored_in_passes_of_bounded_size(gaps: bool) -> None:
    overrides = ("model.layers=2", "packing.n=4")
    small, whole = (make_reader(*overrides, f"eval.row_tokens={size}", gaps=gaps) for size in (40, 4096))
    slate = make_slate(8, 90)
    passes: list[int] = []
    small.model.decoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: passes.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    np.testing.assert_allclose(score_slates(small, [slate])[0], score_slates(whole, [slate])[0], atol=1e-5)
    assert len(passes) > 5
    assert max(passes) <= 40 + 4


def test_a_slate_of_no_candidates_has_no_scores() -> None:
    reader = make_reader("model.layers=1")
    slate = make_slate(4, 0)
    assert len(score_slates(reader, [slate])[0]) == 0
    assert len(score_candidates(reader, slate, 0, read_context(reader, slate.history, 0))) == 0
