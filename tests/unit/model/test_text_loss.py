"""The second loss: which tokens it predicts, that each target counts once, and what it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from dti_ray.data.packing import PackedRow, pack
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import ConfigError
from dti_ray.model.backbone import build_model
from dti_ray.model.batch import collate
from dti_ray.model.loss import predicted_text, word_loss_sum
from dti_ray.model.shape import build_shape
from dti_ray.model.speed import speed_up
from tests.builders import make_config, make_model, make_sequences, make_table, train_spec

LENGTHS = [14, 5, 23, 1]


def _predicted(row: PackedRow) -> list[bool]:
    """Say it of each token of a row, one after the other."""
    ends = {(int(row.prompt[after]), int(row.interaction[after])): int(after) for after in row.after}
    places = list(zip(row.prompt.tolist(), row.interaction.tolist(), strict=True))
    return [
        i <= ends.get(place, -1) and i > 0 and places[i - 1][0] == place[0]
        for i, place in enumerate(places)
    ]  # fmt: skip


@pytest.mark.parametrize("k", [1, 4, None])
@pytest.mark.parametrize("prefix", [0, 3])
def test_the_texts_of_targets_are_predicted_and_nothing_else(k: int | None, prefix: int) -> None:
    table = make_table(prefix=prefix)
    rows = list(pack(make_sequences(LENGTHS), table, train_spec(make_config(), k=k, n=6, row_tokens=200)))
    batch = collate(rows, table)
    assert predicted_text(batch).any()
    for row, found in zip(rows, predicted_text(batch).tolist(), strict=True):
        padding = len(found) - len(row.tokens)
        assert found == _predicted(row) + [False] * padding


@pytest.mark.parametrize("backend", ["dense", "banded"])
def test_a_target_counts_once_and_the_same_alone_and_among_others(backend: str) -> None:
    """Where every prompt begins with its user, anchored prompts are nested, and so are their texts."""
    config = make_config("packing.window=off", "optim.text_weight=0.5", f"model.attention={backend}")
    table = make_table()
    model = make_model(config, table)

    def loss(k: int | None) -> float:
        rows = list(pack(make_sequences(LENGTHS), table, train_spec(config, k=k, n=50, row_tokens=400)))
        with torch.no_grad():
            return float(model(collate(rows, table), is_text_asked=True)[1])

    assert loss(1) > 1.0
    assert loss(4) == pytest.approx(loss(1), rel=1e-5)
    assert loss(None) == pytest.approx(loss(1), rel=1e-5)


def test_the_second_loss_is_proportional_to_its_weight_and_leaves_answers_as_they_are() -> None:
    table = make_table()
    rows = list(pack(make_sequences(LENGTHS), table, train_spec(make_config(), k=4)))
    models = [make_model(make_config(f"optim.text_weight={weight}"), table) for weight in (0.0, 0.5, 1.0)]
    with torch.no_grad():
        found = [model(collate(rows, table), is_text_asked=True) for model in models]
    assert float(found[0][1]) == 0.0
    assert float(found[2][1]) == pytest.approx(2 * float(found[1][1]))
    assert all(torch.equal(log_odds, found[0][0]) for log_odds, _ in found)


def at_once(states: Tensor, words: Tensor, wanted: Tensor) -> Tensor:
    return cross_entropy((states @ words.T).float(), wanted, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("tokens", [0, 5, 19])
def test_loss_and_gradients_are_those_of_all_logits_at_once(
    monkeypatch: pytest.MonkeyPatch, tokens: int, is_trained: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("dti_ray.model.loss.TOKENS_AT_ONCE", 8)
    torch.manual_seed(0)
    wanted = torch.randint(0, 30, (tokens,))
    found = []
    for way in (word_loss_sum, at_once):
        torch.manual_seed(1)
        states = torch.randn(tokens, 16, dtype=dtype, requires_grad=True)
        words = torch.randn(30, 16, dtype=dtype, requires_grad=is_trained)
        total = way(states, words, wanted)
        (0.1 * total).backward()
        assert total.dtype == torch.float32
        found.append((total.detach(), states.grad, words.grad))
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    for ours, expected in zip(*found, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None and expected is not None:
            assert torch.allclose(ours.float(), expected.float(), **near)


def test_learning_to_predict_texts_lowers_their_loss_and_trains_the_embedding() -> None:
    table = make_table()
    rows = list(pack(make_sequences(LENGTHS), table, train_spec(make_config(), k=4)))
    model, batch = build_model(make_config("optim.text_weight=1.0", "model.layers=2"), table), collate(rows, table)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        _, text_loss = model(batch, is_text_asked=True)
        optimizer.zero_grad()
        text_loss.backward()
        optimizer.step()
        losses.append(float(text_loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_a_decoder_with_an_lm_head_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=False, **shape)).save_pretrained(tmp_path)
    table = TokenTable(*(torch.zeros(2, dtype=torch.int32).numpy() for _ in range(3)), 40, (None, 0, 1))
    named = f"model.name_or_path={tmp_path}"
    build_model(make_config(named), table)
    for build in (build_model, build_shape):  # the second one before any worker starts
        with pytest.raises(ConfigError, match=r"optim.text_weight: got 0.1, but .* has an LM head of its own"):
            build(make_config(named, "optim.text_weight=0.1"), table)


def test_gradients_are_the_same_where_layers_are_computed_again() -> None:
    table = make_table()
    rows = list(pack(make_sequences(LENGTHS), table, train_spec(make_config(), k=4)))
    found = []
    for again in (False, True):
        config = make_config("optim.text_weight=1.0", "model.layers=3", f"model.gradient_checkpointing={again}")
        model = make_model(config, table).train()
        speed_up(model.decoder, config.model, torch.device("cpu"))
        log_odds, text_loss = model(collate(rows, table), is_text_asked=True)
        (log_odds.sum() + text_loss).backward()
        found.append([weight.grad for weight in model.trained().values()])
    for plain, repeated in zip(*found, strict=True):
        assert plain is not None
        assert repeated is not None
        assert torch.allclose(plain, repeated, atol=1e-5)
