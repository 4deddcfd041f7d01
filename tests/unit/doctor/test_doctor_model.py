"""Tokenizer, model and run's name are looked at without weights in memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dti_ray.config import RunConfig, to_yaml
from dti_ray.doctor.check import Look, Status, answer
from dti_ray.doctor.model import (
    look_at_model,
    look_at_run,
    look_at_tokenizer,
    memory_of_worker,
    missing_weights,
)
from dti_ray.errors import ConfigError
from dti_ray.storage import Storage
from tests.builders import TINY, make_config, write_dataset

WORDS = ["<unk>", "<yes>", "<no>", "text", "film", *map(str, range(30))]


def of(root: Path, *overrides: str) -> RunConfig:
    return make_config(f"storage.root={root}", "data.name=tiny", "packing.n=4", *overrides)


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """The folder of a tiny Llama with its tokenizer."""
    folder = tmp_path / "decoder"
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_decoder_of_a_folder_passes_without_a_data_set(tmp_path: Path, decoder: Path) -> None:
    config = of(tmp_path, f"model.name_or_path={decoder}")
    check, words = look_at_tokenizer(config, None)
    assert (check.status, check.found) == (Status.PASS, "35 tokens; labels are one token each")
    assert words is not None
    check, state_bytes = look_at_model(config, None, words)
    assert check.status is Status.PASS
    assert check.found.startswith("llama: 0.0 M weights")
    assert state_bytes is not None
    assert state_bytes > 0


def test_decoder_passes_with_the_catalogue_too(tmp_path: Path, decoder: Path) -> None:
    config, dataset = of(tmp_path, f"model.name_or_path={decoder}"), write_dataset(tmp_path, [30, 25])
    check, words = look_at_tokenizer(config, dataset)
    assert check.found == "35 tokens; 30 items of up to 2 tokens"
    assert words is not None
    assert look_at_model(config, dataset, words)[0].status is Status.PASS


def test_folder_that_is_missing_is_called_so(tmp_path: Path) -> None:
    config = of(tmp_path, f"model.name_or_path={tmp_path}/nowhere")
    check, words = answer("tokenizer", Look(lambda: look_at_tokenizer(config, None)), 30)
    assert (check.status, words) == (Status.FAIL, None)
    assert check.found == f"model.name_or_path: {tmp_path}/nowhere is no folder of this machine"
    assert "what is mounted" in check.advice


def test_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = of(tmp_path, f"model.name_or_path={tmp_path}/empty")
    with pytest.raises(ConfigError, match=r"model\.name_or_path: got"):
        look_at_tokenizer(config, None)


def test_name_of_the_hub_that_cannot_be_fetched_offline_says_so(tmp_path: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    config = of(tmp_path, "model.name_or_path=nobody/nothing")
    check, _ = answer("tokenizer", Look(lambda: look_at_tokenizer(config, None)), 60)
    assert check.status is Status.FAIL
    assert "HF_HUB_OFFLINE=1 forbids fetching nobody/nothing" in check.advice


def test_label_of_several_tokens_fails(tmp_path: Path, decoder: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt\.yes_token: 'yes please' becomes 2 tokens"):
        look_at_tokenizer(of(tmp_path, f"model.name_or_path={decoder}", "prompt.yes_token=yes please"), None)


def test_weights_that_are_missing_are_named(tmp_path: Path, decoder: Path) -> None:
    assert missing_weights(str(decoder), None) == []
    (decoder / "model.safetensors").unlink()
    assert missing_weights(str(decoder), None) == ["model.safetensors"]
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}}
    (decoder / "model.safetensors.index.json").write_text(json.dumps(index))
    (decoder / "model-1.safetensors").write_bytes(b"")
    assert missing_weights(str(decoder), None) == ["model-2.safetensors"]
    assert missing_weights(str(decoder), "x.gguf") == ["x.gguf"]
    assert missing_weights("nobody/nothing", None) == ["model.safetensors"]
    config = of(tmp_path, f"model.name_or_path={decoder}")
    words = look_at_tokenizer(config, None)[1]
    assert words is not None
    check, _ = look_at_model(config, None, words)
    assert check.status is Status.WARN
    assert "not here: model-2.safetensors" in check.found


def test_tokenizer_of_the_catalogue_waits_for_the_data_set(tmp_path: Path) -> None:
    assert look_at_tokenizer(of(tmp_path), None)[0].status is Status.SKIP
    check, words = look_at_tokenizer(of(tmp_path), write_dataset(tmp_path, [30, 25]))
    assert check.status is Status.PASS
    assert words is not None


def test_row_that_holds_no_prompt_is_found(tmp_path: Path) -> None:
    config, dataset = of(tmp_path, "packing.row_tokens=10"), write_dataset(tmp_path, [30, 25])
    words = look_at_tokenizer(config, dataset)[1]
    assert words is not None
    with pytest.raises(ConfigError, match=r"packing\.row_tokens: got 10"):
        look_at_model(config, dataset, words)


def test_memory_of_a_worker_is_what_estimate_says(tmp_path: Path) -> None:
    config, dataset = of(tmp_path, "cluster.gpus_per_worker=1"), write_dataset(tmp_path, [30, 25])
    words = look_at_tokenizer(config, dataset)[1]
    assert words is not None
    large = of(tmp_path, *TINY, "model.hidden_size=64")
    assert 0 < memory_of_worker(config, dataset, words) < memory_of_worker(large, dataset, words)


def test_name_of_a_run_is_free_or_its_own(tmp_path: Path) -> None:
    config = of(tmp_path)
    assert look_at_run(config).found == f"{tmp_path}/runs/run: new"
    Storage(str(tmp_path)).write("runs/run/config.yaml", to_yaml(config).encode())
    assert look_at_run(config).status is Status.PASS
    taken = look_at_run(of(tmp_path, "packing.k=3"))
    assert taken.status is Status.WARN
    assert "packing.k: got 3; expected 20 as in the stored run" in taken.found
    assert taken.advice == "`dti-ray train` will refuse this: choose another train.run, or use the stored values"
