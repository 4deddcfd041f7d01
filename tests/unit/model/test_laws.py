"""The laws of the mask, 0 to 5, in fp32 on a randomly initialised Llama, each with a contrast that must fail."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from dti_ray.config import RunConfig
from dti_ray.data.interactions import TEST, TRAIN, UserSequences
from dti_ray.data.packing import PackedRow, end_to_end, pack
from dti_ray.data.prompts import NO, YES
from dti_ray.model.attention import NAME, register
from dti_ray.model.backbone import ClickModel
from dti_ray.model.batch import collate
from tests.builders import (
    VOCABULARY,
    largest_difference,
    make_config,
    make_model,
    make_sequences,
    make_table,
    score,
    score_packed,
    train_spec,
)

TOLERANCE = 1e-4
VISIBLY = 0.1
LENGTHS = [14, 5, 23, 1]
EVERY_CONTEXT = pytest.mark.parametrize("context", ["ordered", "strictly_earlier"])
EVERY_BACKEND = pytest.mark.parametrize("backend", ["dense", "banded"])


def _llama_and_click_model(*overrides: str) -> tuple[LlamaForCausalLM, ClickModel]:
    """Return an unmodified Hugging Face model and ours with the same weights; markers are its last three ids."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY + 3, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15, pad_token_id=None,
    )  # fmt: skip
    whole = LlamaForCausalLM(config).eval()
    assert whole.config._attn_implementation == "sdpa"
    register()
    ours = LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation=NAME).eval()
    ours.load_state_dict(whole.state_dict())
    embeddings, rows = whole.get_input_embeddings().weight, whole.lm_head.weight
    labels = [VOCABULARY + NO, VOCABULARY + YES]
    ours_config = make_config("packing.k=1", *overrides)
    click = ClickModel(ours.model, rows[labels], embeddings[VOCABULARY:], VOCABULARY, ours_config)
    return whole, click.eval()


@EVERY_BACKEND
@pytest.mark.parametrize(("prefix", "position"), [(0, "pinned"), (3, "first")])
def test_law_0_a_stand_alone_prompt_gives_the_logits_of_the_unmodified_model(
    backend: str, prefix: int, position: str
) -> None:
    whole, ours = _llama_and_click_model(f"model.attention={backend}", f"prompt.prefix_position={position}")
    table = make_table(prefix=prefix)
    rows = list(pack(make_sequences(LENGTHS), table, train_spec(make_config(), k=1, n=6, row_tokens=40)))
    for row in rows:
        batch = collate([row], table)
        for prompt, after in zip(row.prompt[row.after], row.after, strict=True):
            content = row.tokens[row.prompt == prompt]
            tokens = torch.tensor([[*table.prefix, *content, VOCABULARY]])
            assert content[-1] == row.tokens[after]
            logits = whole(tokens).logits[0, -1]
            expected = logits[VOCABULARY + YES] - logits[VOCABULARY + NO]
            found = ours(batch)[0][row.prompt[row.after] == prompt]
            assert torch.allclose(found, expected, atol=TOLERANCE)


@EVERY_CONTEXT
@pytest.mark.parametrize("window", ["interactions", "tokens", "off"])
def test_law_1_nothing_after_a_target_and_no_other_sum_can_change_its_logit(context: str, window: str) -> None:
    config = make_config("model.layers=3", f"prompt.context={context}", f"packing.window={window}", "packing.n=4")
    table = make_table()
    model = make_model(config, table)
    (row,) = pack(make_sequences([12]), table, train_spec(config, k=12))
    batch = collate([row], table)
    embeddings: list[torch.Tensor] = []
    model.dropout.register_forward_hook(lambda _module, _args, output: embeddings.append(output))
    log_odds = model(batch)[0]
    prefix, content = batch.prefix_size, len(row.tokens)
    for target, after in enumerate(row.after.tolist()):
        (gradient,) = torch.autograd.grad(log_odds[target], embeddings[0], retain_graph=True)
        reaches = gradient[0].abs().sum(-1) > 0
        assert not reaches[prefix + after + 1 : prefix + content].any(), "its feedback and all that follows"
        others = reaches[prefix + content :].clone()
        assert others[target]
        others[target] = False
        assert not others.any(), "other [SUM]s"


@EVERY_CONTEXT
@EVERY_BACKEND
@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 9), k=st.integers(1, 12) | st.none(), seed=st.integers(0, 99))
def test_law_2_with_one_layer_packed_equals_sliding_window(
    context: str, backend: str, n: int, k: int | None, seed: int
) -> None:
    config = make_config(
        "model.layers=1", "packing.window=interactions", f"prompt.context={context}", f"packing.n={n}",
        f"model.attention={backend}",
    )  # fmt: skip
    table, sequences = make_table(seed), make_sequences(LENGTHS, seed)
    model = make_model(config, table)
    packed = score_packed(model, sequences, table, train_spec(config, k=k), seed)
    alone = score_packed(model, sequences, table, train_spec(config, k=1))
    assert largest_difference(packed, alone) < TOLERANCE


def test_law_2_contrast_with_four_layers_naive_packing_leaks() -> None:
    config = make_config("model.layers=4", "packing.window=interactions", "packing.n=4")
    table, sequences = make_table(), make_sequences(LENGTHS)
    model = make_model(config, table)
    packed = score_packed(model, sequences, table, train_spec(config, k=10))
    alone = score_packed(model, sequences, table, train_spec(config, k=1))
    assert largest_difference(packed, alone) > VISIBLY


@pytest.mark.parametrize("method", [["model.layers=1"], ["model.layers=4", "reset.mode=constant", "reset.alpha=1.0"]])
def test_law_2_and_law_4_contrast_a_prefix_that_is_not_pinned_is_left_behind(method: list[str]) -> None:
    config = make_config(*method, "packing.window=interactions", "packing.n=4", "prompt.prefix_position=first")
    table, sequences = make_table(), make_sequences(LENGTHS)
    model = make_model(config, table)
    packed = score_packed(model, sequences, table, train_spec(config, k=10))
    alone = score_packed(model, sequences, table, train_spec(config, k=1))
    assert largest_difference(packed, alone) > VISIBLY


def _alone_with_context(
    model: ClickModel, sequences: UserSequences, config: RunConfig, row: PackedRow, after: int, user: int
) -> float:
    """Score one target of a row in a prompt of its own that starts where the row's prompt does."""
    target, cut = int(row.interaction[after]), int(row.cut[after])
    start = int(row.interaction[row.prompt == row.prompt[after]].min())
    splits = np.full(len(sequences.splits), TEST, dtype=np.int8)
    splits[sequences.offsets[user] + target] = TRAIN
    spec = train_spec(config, k=1, n=cut - start, row_tokens=500)
    (alone,) = pack(replace(sequences, splits=splits), make_table(), spec)
    return score(model, [alone], make_table())[user, target]


@EVERY_CONTEXT
@EVERY_BACKEND
@pytest.mark.parametrize(
    "debias",
    [
        [], ["debias.strength=0.5"], ["debias.strength=0.3", "debias.rotary=drop"],
        ["debias.strength=0.5", "prompt.prefix_position=first"],
    ],
)  # fmt: skip
def test_law_3_anchored_targets_equal_stand_alone_prompts_with_the_same_context(
    context: str, backend: str, debias: list[str]
) -> None:
    config = make_config(
        "model.layers=4", "packing.window=off", f"prompt.context={context}", "packing.n=4", *debias,
        f"model.attention={backend}",
    )  # fmt: skip
    table, sequences = make_table(), make_sequences(LENGTHS)
    model = make_model(config, table)
    spec = train_spec(config, k=6, row_tokens=90)
    for row in pack(sequences, table, spec, rng=np.random.default_rng(1)):
        packed = score(model, [row], table)
        for after, user in zip(row.after.tolist(), row.users.tolist(), strict=True):
            alone = _alone_with_context(model, sequences, config, row, after, user)
            assert abs(packed[user, int(row.interaction[after])] - alone) < TOLERANCE


def test_law_3_contrast_a_shorter_context_gives_another_logit() -> None:
    config = make_config("model.layers=4", "packing.window=off", "packing.n=4")
    table, sequences = make_table(), make_sequences(LENGTHS)
    model = make_model(config, table)
    packed = score_packed(model, sequences, table, train_spec(config, k=10))
    alone = score_packed(model, sequences, table, train_spec(config, k=1))
    assert largest_difference(packed, alone) > VISIBLY


@EVERY_CONTEXT
@EVERY_BACKEND
@pytest.mark.parametrize("debias", [[], ["debias.strength=0.3", "debias.rotary=drop"]])
def test_law_4_full_reset_equals_stand_alone_prompts_at_any_depth(
    context: str, backend: str, debias: list[str]
) -> None:
    config = make_config(
        "model.layers=4", "packing.window=interactions", f"prompt.context={context}", "packing.n=4",
        "reset.mode=constant", "reset.alpha=1.0", f"model.attention={backend}", *debias,
    )  # fmt: skip
    table, sequences = make_table(), make_sequences(LENGTHS)
    model = make_model(config, table)
    alone = score_packed(model, sequences, table, train_spec(config, k=1))
    for k in (3, 10, None):
        assert largest_difference(score_packed(model, sequences, table, train_spec(config, k=k)), alone) < TOLERANCE


def test_law_4_contrast_half_a_reset_still_leaks() -> None:
    config = make_config(
        "model.layers=4", "packing.window=interactions", "packing.n=4", "reset.mode=constant", "reset.alpha=0.5"
    )
    table, sequences = make_table(), make_sequences(LENGTHS)
    model = make_model(config, table)
    packed = score_packed(model, sequences, table, train_spec(config, k=10))
    alone = score_packed(model, sequences, table, train_spec(config, k=1))
    assert largest_difference(packed, alone) > VISIBLY / 10


@EVERY_BACKEND
@pytest.mark.parametrize(
    "method",
    [
        ["packing.window=off"],
        ["packing.window=interactions", "reset.mode=distance", "reset.alpha=0.7"],
        ["packing.window=interactions", "reset.mode=uniform", "reset.alpha=0.2", "debias.strength=0.4"],
        ["packing.window=tokens", "packing.window_tokens=11", "prompt.context=strictly_earlier"],
    ],
    ids=lambda method: " ".join(method),
)
def test_law_5_logits_do_not_depend_on_row_mates_their_order_or_padding(backend: str, method: list[str]) -> None:
    config = make_config("model.layers=3", "packing.n=4", *method, f"model.attention={backend}")
    table, sequences = make_table(), make_sequences(LENGTHS)
    model = make_model(config, table)
    one_row = score_packed(model, sequences, table, train_spec(config, k=5, row_tokens=4000))
    shuffled = score_packed(model, sequences, table, train_spec(config, k=5, row_tokens=4000), seed=3)
    many_rows = score_packed(model, sequences, table, train_spec(config, k=5, row_tokens=80), seed=4)
    rows = list(pack(sequences, table, train_spec(config, k=5, row_tokens=80)))
    unpadded: dict[tuple[int, int], float] = {}
    for row in rows:
        unpadded |= score(model, [row], table)
    joined = score(model, [end_to_end(rows)], table)
    for other in (shuffled, many_rows, unpadded, joined):
        assert largest_difference(one_row, other) < TOLERANCE
