"""Laws 0 to 5 for every architecture that we promise, with adapters that have an effect and without any.

`test_laws.py` varies the method on a Llama, with contrasts; here the method is fixed and the decoder varies.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dti_ray.config import RunConfig
from dti_ray.data.interactions import TEST, TRAIN
from dti_ray.data.packing import pack
from dti_ray.data.prompts import TokenTable
from dti_ray.model.backbone import ClickModel
from dti_ray.model.batch import collate
from tests.architectures import ARCHITECTURES, LORA, load_architecture, save_architecture
from tests.builders import largest_difference, make_config, make_sequences, score, score_packed, train_spec

LENGTHS = [9, 14]
TOLERANCE = 2e-4  # Gemma's embeddings are large, so are its logits
VISIBLY = 0.1

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
# Adapters pass through all that the plain weights pass through, so the quick tests have them.
with_and_without_adapters = pytest.mark.parametrize(
    "adapters", [LORA, pytest.param([], marks=pytest.mark.slow)], ids=["lora", "full"]
)
both_backends = pytest.mark.parametrize("backend", ["banded", pytest.param("dense", marks=pytest.mark.slow)])


def _make(
    folder: Path, name: str, adapters: list[str], *method: str, layers: int = 3, **changes: object
) -> tuple[ClickModel, RunConfig, TokenTable]:
    table = save_architecture(folder, name, layers, **changes)
    config = make_config(f"model.name_or_path={folder}", *adapters, *method)
    return load_architecture(config, table), config, table


@torch.no_grad()
def _unmodified(folder: Path, ours: ClickModel, **changes: object) -> PreTrainedModel:
    """Return Hugging Face's own model, what adapters add merged into its weights."""
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **changes).eval()
    for path, module in ours.decoder.named_modules():
        if hasattr(module, "get_delta_weight"):
            whole.get_decoder().get_submodule(path).weight += module.get_delta_weight("default")
    return whole


@torch.no_grad()
def _differences(ours: ClickModel, whole: PreTrainedModel, config: RunConfig, table: TokenTable) -> list[float]:
    """Compare every stand-alone prompt's log-odds with the unmodified model's logits."""
    summary, no, yes = table.marker_ids
    real_ids = {table.vocabulary: summary, table.vocabulary + 1: no, table.vocabulary + 2: yes}
    found: list[float] = []
    for row in pack(make_sequences(LENGTHS), table, train_spec(config, k=1, n=5, row_tokens=200)):
        log_odds = ours(collate([row], table))[0]
        for target, prompt in enumerate(row.prompt[row.after]):
            tokens = [*row.tokens[row.prompt == prompt].tolist(), table.vocabulary]
            logits = whole(torch.tensor([[real_ids.get(token, token) for token in tokens]])).logits[0, -1]
            found.append(abs(float(log_odds[target] - (logits[yes] - logits[no]))))
    return found


@pytest.mark.parametrize("adapters", [LORA, []], ids=["lora", "full"])
@every_architecture
def test_law_0_holds(tmp_path: Path, name: str, adapters: list[str]) -> None:
    ours, config, table = _make(tmp_path, name, adapters)
    assert max(_differences(ours, _unmodified(tmp_path, ours), config, table)) < TOLERANCE


def test_law_0_contrast_adapters_without_their_share_give_other_logits(tmp_path: Path) -> None:
    ours, config, table = _make(tmp_path, "llama", LORA)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert max(_differences(ours, whole, config, table)) > VISIBLY


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_our_rules_take_the_place_of_a_sliding_window_of_the_decoders_own(tmp_path: Path, name: str) -> None:
    ours, config, table = _make(tmp_path, name, [], sliding_window=4)
    narrow, wide = _unmodified(tmp_path, ours), _unmodified(tmp_path, ours, sliding_window=4096)
    assert max(_differences(ours, narrow, config, table)) > VISIBLY
    assert max(_differences(ours, wide, config, table)) < TOLERANCE


@with_and_without_adapters
@every_architecture
def test_law_1_holds(tmp_path: Path, name: str, adapters: list[str]) -> None:
    model, config, table = _make(tmp_path, name, adapters, "packing.window=interactions", "packing.n=4")
    (row,) = pack(make_sequences([8]), table, train_spec(config, k=8))
    batch = collate([row], table)
    embeddings: list[torch.Tensor] = []
    model.dropout.register_forward_hook(lambda _module, _args, output: embeddings.append(output))
    log_odds = model(batch)[0]
    content = len(row.tokens)
    for target, after in enumerate(row.after.tolist()):
        (gradient,) = torch.autograd.grad(log_odds[target], embeddings[0], retain_graph=True)
        reaches = (gradient[0].abs().sum(-1) > 0)[batch.prefix_size :]
        assert not reaches[after + 1 : content].any(), "its feedback and all that follows"
        assert reaches[content:].nonzero().flatten().tolist() == [target], "of all [SUM]s its own"


@both_backends
@with_and_without_adapters
@every_architecture
def test_law_2_holds(tmp_path: Path, name: str, adapters: list[str], backend: str) -> None:
    method = ["packing.window=interactions", "packing.n=4", f"model.attention={backend}"]
    model, config, table = _make(tmp_path, name, adapters, *method, layers=1)
    packed, alone = (score_packed(model, make_sequences(LENGTHS), table, train_spec(config, k=k)) for k in (8, 1))
    assert largest_difference(packed, alone) < TOLERANCE


@both_backends
@with_and_without_adapters
@every_architecture
def test_law_3_holds(tmp_path: Path, name: str, adapters: list[str], backend: str) -> None:
    method = ["packing.window=off", "packing.n=4", "debias.strength=0.3", "debias.rotary=drop"]
    model, config, table = _make(tmp_path, name, adapters, *method, f"model.attention={backend}")
    sequences = make_sequences(LENGTHS)
    for row in pack(sequences, table, train_spec(config, k=6, row_tokens=90)):
        packed = score(model, [row], table)
        after, user = int(row.after[-1]), int(row.users[-1])  # the last target has the longest context
        target, cut = int(row.interaction[after]), int(row.cut[after])
        start = int(row.interaction[row.prompt == row.prompt[after]].min())
        splits = np.full(len(sequences.splits), TEST, dtype=np.int8)
        splits[sequences.offsets[user] + target] = TRAIN
        spec = train_spec(config, k=1, n=cut - start, row_tokens=500)
        alone = score_packed(model, replace(sequences, splits=splits), table, spec)
        assert abs(packed[user, target] - alone[user, target]) < TOLERANCE


@both_backends
@with_and_without_adapters
@every_architecture
def test_law_4_holds(tmp_path: Path, name: str, adapters: list[str], backend: str) -> None:
    method = ["packing.window=interactions", "packing.n=4", "reset.mode=constant", "reset.alpha=1.0"]
    model, config, table = _make(tmp_path, name, adapters, *method, f"model.attention={backend}")
    packed, alone = (score_packed(model, make_sequences(LENGTHS), table, train_spec(config, k=k)) for k in (8, 1))
    assert largest_difference(packed, alone) < TOLERANCE


@both_backends
@with_and_without_adapters
@every_architecture
def test_law_5_holds(tmp_path: Path, name: str, adapters: list[str], backend: str) -> None:
    method = ["packing.window=interactions", "packing.n=4", "reset.mode=distance", "debias.strength=0.4"]
    model, config, table = _make(tmp_path, name, adapters, *method, f"model.attention={backend}")
    sequences = make_sequences(LENGTHS)
    one_row = score_packed(model, sequences, table, train_spec(config, k=5, row_tokens=4000))
    many_rows = score_packed(model, sequences, table, train_spec(config, k=5, row_tokens=80), seed=4)
    assert largest_difference(one_row, many_rows) < TOLERANCE
