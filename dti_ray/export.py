"""A run's best state as others read it: a merged Hugging Face model, and under LoRA an adapter in peft's layout.

Stage: after training. In: a run. Out: a folder `merged/` (model and tokenizer), `adapter/` where a decoder was adapted,
`dti_ray.json`, which says how to ask, and for `CtrModel` the configuration, the catalogue's tokens and `tokenizer/`,
the run's own, to which the five tokens below are words like any other.
Invariant: both are read back and give the run's log-odds to 1e-4 before anything is written; no tensor is empty.

Markers and label rows stand beside the decoder in training. Here they become five tokens behind its vocabulary, so
that no token of the decoder's own changes, tied embeddings or not:

    prompt: item tokens, <|yes|> or <|no|>, next item ..., the item asked for, <|sum|>
    log-odds of a click: logit of <|answer_yes|> - logit of <|answer_no|> at <|sum|>, + `log_odds_bias`
    calibrated, where `calibration` is not null: log-odds / temperature + bias

A plain model knows causal attention alone: what a run's prefix (met without rotation), debias and reset add is no
part of any weight. `dti_ray.json` names them, and the comparison leaves them out on both sides.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from pyarrow import parquet as pq
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dti_ray.config import DebiasConfig, ResetConfig, RunConfig, Window, to_yaml
from dti_ray.data.interactions import Dataset, UserSequences, open_dataset, read_all, read_items
from dti_ray.data.packing import PackedRow
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import Fault, RunError
from dti_ray.infer.calibration import Calibration, fit_calibration
from dti_ray.infer.evaluate import score_rows, sliding_rows
from dti_ray.model.backbone import ClickModel, build_model
from dti_ray.model.batch import collate
from dti_ray.model.decoder import load_decoder_config, load_whole
from dti_ray.storage import Storage
from dti_ray.train.checkpoint import Checkpoint, read_best
from dti_ray.train.engine import as_trained
from dti_ray.train.host import training_device
from dti_ray.train.tokens import tokenizer_and_table

if TYPE_CHECKING:
    from peft import PeftModel

TOKENS = ("<|sum|>", "<|no|>", "<|yes|>", "<|answer_no|>", "<|answer_yes|>")
TOLERANCE = 1e-4  # of logits, relative where they are larger than 1
SAMPLE, ROWS = 2_000, 2  # valid targets to choose from, rows of them that are compared
MERGED, ADAPTER, TOKENIZER = "merged", "adapter", "tokenizer"
HOW_FILE, CONFIG_FILE, ITEM_TOKENS_FILE = "dti_ray.json", "config.yaml", "item_tokens.parquet"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        checkpoint: folder of the state.
        parts: `merged`, and `adapter` where there is one.
        largest_difference: of any log-odds, read back, to the run's.
        size_bytes: of all files.
        calibration: fitted on the validation split, if that was asked for.
    """

    checkpoint: str
    parts: tuple[str, ...]
    largest_difference: float
    size_bytes: int
    calibration: Calibration | None


@dataclass(frozen=True)
class _Rows:
    """The five tokens' rows: three are read, two are answers.

    The answers' rows stand among the embeddings as well, so that one matrix can be both.
    """

    markers: Tensor
    labels: Tensor
    bias: float

    def inputs(self, scale: float) -> Tensor:
        """Return rows for an embedding module that multiplies by `scale`."""
        return torch.cat([self.markers / scale, self.labels])

    @property
    def outputs(self) -> Tensor:
        """Rows for the LM head."""
        return torch.cat([torch.zeros_like(self.markers), self.labels])


def export_run(config: RunConfig, storage: Storage, to: str, calibrate: bool = False) -> Exported:
    """Write a run's best state for others.

    Args:
        config: as stored with the run.
        storage: the root.
        to: folder or URI.
        calibrate: fit temperature and bias on the validation split.

    Raises:
        InputError: the run has no usable state.
        RunError: a tensor is empty, or what was written gives other logits than the run.
        StorageError: the target cannot be written.
    """
    target = Storage(to)
    target.check_writable()
    dataset = open_dataset(storage, config.data.name)
    tokenizer, table = tokenizer_and_table(config, storage, dataset)
    checkpoint, weights = read_best(storage, f"runs/{config.train.run}")
    plain, bare = _plain(config), replace(table, prefix=table.prefix[:0])
    model = build_model(plain, table).eval()
    model.load_trained(weights)
    sequences = read_all(dataset)
    calibration = _calibrate(config, table, sequences, weights) if calibrate else None
    prompts = sliding_rows(sequences, bare, plain, "valid", SAMPLE)[:ROWS]
    with tempfile.TemporaryDirectory(prefix="dti-ray-export-") as local:
        folder = Path(local)
        parts = _write_models(folder, config, model, tokenizer, table)
        how = _how_to_ask(config, model, table, checkpoint)
        how["calibration"] = None if calibration is None else asdict(calibration)
        (folder / HOW_FILE).write_text(json.dumps(how, indent=1))
        (folder / CONFIG_FILE).write_text(to_yaml(config))
        pq.write_table(_item_tokens(dataset, table), folder / ITEM_TOKENS_FILE)
        _refuse_empty(folder)
        difference = max(_largest_difference(folder, part, config, model, prompts, bare) for part in parts)
        files = target.upload(folder, "")
        target.write_manifest("", files, {"run": config.train.run, "checkpoint": checkpoint.path})
    has_rules = config.debias != plain.debias or config.reset != plain.reset or len(table.prefix) > 0
    if has_rules:
        log.warning("export: prefix, debias and reset are rules of our attention; a plain model reads without them")
    return Exported(checkpoint.path, parts, difference, sum(file.size_bytes for file in files), calibration)


def _calibrate(
    config: RunConfig, table: TokenTable, sequences: UserSequences, weights: Mapping[str, Tensor]
) -> Calibration:
    """Score the validation split as an evaluation does, and fit."""
    device = training_device()
    model = build_model(config, table).eval().to(device)
    model.load_trained(weights)
    model.attention = "auto"  # of this device, whatever trained
    rows = sliding_rows(sequences, table, config, "valid", config.eval.max_valid_targets)
    log.info("export: scoring %d validation targets", sum(row.targets for row in rows))
    scores = score_rows(as_trained(model, config), rows, table, device, config.train.rows_per_pass)
    return fit_calibration(scores.log_odds, scores.label)


def _plain(config: RunConfig) -> RunConfig:
    """Return the configuration with the rules that an unmodified decoder knows: causal, nothing else."""
    packing = config.packing.model_copy(update={"window": Window.OFF})
    train = config.train.model_copy(update={"precision": "fp32"})
    changes = {"debias": DebiasConfig(), "reset": ResetConfig(), "packing": packing, "train": train}
    return config.model_copy(update=changes)


def _write_models(
    folder: Path, config: RunConfig, model: ClickModel, tokenizer: PreTrainedTokenizerBase, table: TokenTable
) -> tuple[str, ...]:
    rows = _rows(model)
    parts = [MERGED]
    if config.lora.rank is not None and config.model.name_or_path is not None:
        base = _extended(_base(config, table), table)
        _adapted(base, config, model, table, rows).save_pretrained(str(folder / ADAPTER), save_embedding_layers=False)
        (folder / ADAPTER / "README.md").unlink(missing_ok=True)
        parts.append(ADAPTER)
    whole = _base(config, table)
    whole.get_decoder().load_state_dict(dict(_merged(model.decoder)))
    whole = _extended(whole, table)
    embedding, output = _ends(whole)
    place = slice(table.vocabulary, table.vocabulary + len(TOKENS))
    with torch.no_grad():
        output.weight[place] = rows.outputs
        embedding.weight[place] = rows.inputs(_scale(whole))  # last: tied, one matrix is both
    whole.save_pretrained(folder / MERGED)
    tokenizer.save_pretrained(folder / TOKENIZER)
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    tokenizer.save_pretrained(folder / MERGED)
    return tuple(parts)


def _rows(model: ClickModel) -> _Rows:
    head = model.head.rows
    width = head.weight.shape[1]
    weight = head.weight.detach()
    labels = weight if model.head.kind == "yes_no" else torch.cat([torch.zeros(1, width), weight])
    bias = 0.0 if head.bias is None else float(head.bias.detach())
    return _Rows(model.markers.weight.detach(), labels, bias)


def _base(config: RunConfig, table: TokenTable) -> PreTrainedModel:
    """Return the decoder with its LM head, as it was before training."""
    if config.model.name_or_path is not None:
        return load_whole(config.model.name_or_path, config.model.gguf_file, "sdpa")
    return LlamaForCausalLM._from_config(load_decoder_config(config.model, table))


def _ends(whole: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear]:
    embedding, output = whole.get_input_embeddings(), whole.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(output, nn.Linear)
    return embedding, output


def _extended(whole: PreTrainedModel, table: TokenTable) -> PreTrainedModel:
    """Make room for five tokens behind the tokenizer's vocabulary; some decoders have spare rows there."""
    wanted = max(table.vocabulary + len(TOKENS), _ends(whole)[0].num_embeddings)
    whole.resize_token_embeddings(wanted, mean_resizing=False)
    return whole


def _merged(decoder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the decoder's weights with what adapters add, under the names of the unadapted one."""
    added: dict[str, Any] = {
        path: module for path, module in decoder.named_modules() if hasattr(module, "get_delta_weight")
    }
    for name, weight in decoder.state_dict().items():
        path, _, leaf = name.rpartition(".")
        owner = path.removesuffix(".base_layer")
        if "lora_" in name:
            continue
        if owner != path and leaf == "weight":
            weight = weight + added[owner].get_delta_weight("default").detach()
        yield f"{owner}.{leaf}" if path else leaf, weight


def _adapted(base: PreTrainedModel, config: RunConfig, model: ClickModel, table: TokenTable, rows: _Rows) -> PeftModel:
    """Return the base with the run's adapters and the five tokens' rows, as peft holds them."""
    import peft

    names = {id(module): name for name, module in base.named_modules()}
    embedding, output = _ends(base)
    ends = [names[id(end)].rpartition(".")[2] for end in (embedding, output)]
    indices = {end: list(range(table.vocabulary, table.vocabulary + len(TOKENS))) for end in ends}
    is_tied = output.weight is embedding.weight
    if is_tied:
        del indices[ends[1]]  # peft ties what it adds to the embedding
    adapted_layers = {path for path, module in model.decoder.named_modules() if hasattr(module, "get_delta_weight")}
    wanted = peft.LoraConfig(
        r=config.lora.rank or 0, lora_alpha=config.lora.alpha, lora_dropout=config.lora.dropout,
        task_type="CAUSAL_LM", target_modules=sorted({path.rpartition(".")[2] for path in adapted_layers}),
        trainable_token_indices=indices,
    )  # fmt: skip
    scale, decoder = _scale(base), names[id(base.get_decoder())]
    adapted = peft.get_peft_model(base, wanted)
    state = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for name, weight in model.decoder.state_dict().items():
        if "lora_" in name:
            state[f"base_model.model.{decoder}.{name.replace('.default', '')}"] = weight
    for key in [key for key in state if "trainable_tokens_delta" in key]:
        state[key] = rows.outputs if f".{ends[1]}." in key else rows.inputs(scale)
    peft.set_peft_model_state_dict(adapted, state)
    return adapted


def _scale(whole: PreTrainedModel) -> float:
    """Return what the embedding module multiplies rows by: Gemma's does."""
    return float(getattr(_ends(whole)[0], "scalar_embed_scale", 1.0))


def _how_to_ask(config: RunConfig, model: ClickModel, table: TokenTable, checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "run": config.train.run,
        "checkpoint": checkpoint.path,
        "base": config.model.name_or_path,
        "tokens": {name: table.vocabulary + i for i, name in enumerate(TOKENS)},
        "log_odds_bias": _rows(model).bias,
        "prompt": config.prompt.model_dump(mode="json"),
        "context_interactions": config.eval_n,
        "rules": {
            "window": config.packing.window.value,
            "debias": config.debias.model_dump(mode="json"),
            "reset": config.reset.model_dump(mode="json"),
        },
    }


def _item_tokens(dataset: Dataset, table: TokenTable) -> pa.Table:
    """Return item ids and each one's text as tokens."""
    tokens = pa.LargeListArray.from_arrays(pa.array(table.offsets), pa.array(table.tokens))
    return pa.table({"item_id": read_items(dataset)["item_id"], "tokens": tokens})


def _refuse_empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            empty = [key for key in file.keys() if 0 in file.get_slice(key).get_shape()]  # noqa: SIM118 - no mapping
        if empty:
            raise RunError(
                Fault(f"export: {path.relative_to(folder)}", f"{len(empty)} tensors are empty, {empty[0]} first")
            )


@torch.no_grad()
def _largest_difference(
    folder: Path, part: str, config: RunConfig, model: ClickModel, prompts: list[PackedRow], table: TokenTable
) -> float:
    """Read one part back and compare it with the run on some prompts.

    Raises:
        RunError: a log-odds differs.
    """
    whole, bias = _read_back(folder, part, config, table).eval(), _rows(model).bias
    no, yes = table.vocabulary + 3, table.vocabulary + 4
    largest = 0.0
    for row in prompts:
        expected = model(collate([row], table))[0]
        for target, prompt in enumerate(row.prompt[row.after]):
            tokens = [*row.tokens[row.prompt == prompt].tolist(), table.vocabulary]
            logits = whole(torch.tensor([tokens])).logits[0, -1]
            found = float(logits[yes] - logits[no]) + bias
            difference = abs(found - float(expected[target])) / max(1.0, float(logits[[no, yes]].abs().max()))
            largest = max(largest, difference)
    if not largest <= TOLERANCE:
        problem = f"gives log-odds that differ from the run's by {largest:.2g}"
        raise RunError(Fault(f"export: {part}", problem, f"at most {TOLERANCE:g}", "nothing was written"))
    return largest


def _read_back(folder: Path, part: str, config: RunConfig, table: TokenTable) -> nn.Module:
    if part == MERGED:
        return AutoModelForCausalLM.from_pretrained(folder / MERGED, attn_implementation="sdpa")
    import peft

    return peft.PeftModel.from_pretrained(_extended(_base(config, table), table), folder / ADAPTER)
