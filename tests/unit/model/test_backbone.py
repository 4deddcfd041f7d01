"""A decoder becomes a click model: what is refused, what is trained, what a seed draws."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaModel

from dti_ray.data.prompts import TokenTable
from dti_ray.errors import ConfigError, InputError
from dti_ray.model.backbone import build_model
from dti_ray.model.decoder import absolute_name, check_architecture, load_tokenizer
from tests.builders import make_config


def test_decoder_without_rotary_positions_is_refused_by_name(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    table = TokenTable(*(torch.zeros(2, dtype=torch.int32).numpy() for _ in range(3)), 40, (None, 0, 1))
    with pytest.raises(ConfigError, match=r"GPT2Model.*expected a rotary decoder"):
        build_model(make_config(f"model.name_or_path={tmp_path}"), table)


def test_decoder_that_caps_its_scores_is_refused_by_name(tmp_path: Path) -> None:
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = Gemma2Config(num_attention_heads=4, num_key_value_heads=2, **shape)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    table = TokenTable(*(torch.zeros(2, dtype=torch.int32).numpy() for _ in range(3)), 40, (None, 0, 1))
    with pytest.raises(ConfigError, match=r"Gemma2Model caps its attention scores"):
        build_model(make_config(f"model.name_or_path={tmp_path}"), table)


def test_decoder_with_attention_dropout_is_refused() -> None:
    decoder = LlamaModel(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))
    decoder.config.attention_dropout = 0.1
    with pytest.raises(ConfigError, match=r"attention_dropout is 0\.1"):
        check_architecture(decoder)


def test_decoder_that_no_test_has_seen_is_named_once_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    decoder = LlamaModel(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=1, num_key_value_heads=1))  # fmt: skip
    check_architecture(decoder)
    assert caplog.messages == []
    decoder.config.model_type = "newcomer"
    check_architecture(decoder)
    (message,) = caplog.messages
    assert "newcomer" in message


def test_relative_model_folder_is_made_absolute_and_a_name_stays_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert absolute_name("model") == str(tmp_path / "model")
    assert absolute_name("organisation/model") == "organisation/model"
    assert absolute_name(None) is None


def test_gguf_file_that_is_not_there_is_a_fault_that_lists_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "real.gguf").touch()
    pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
    with pytest.raises(ConfigError, match=r"model.gguf_file: 'other.gguf' is not in .*expected one of \['real.gguf'\]"):
        load_tokenizer(str(tmp_path), "other.gguf")


def test_gguf_without_its_package_is_a_fault_that_says_what_to_install(tmp_path: Path) -> None:
    if importlib.util.find_spec("gguf") is not None:
        pytest.skip("the extra `gguf` is installed")
    with pytest.raises(ConfigError, match=r"needs the package gguf; pip install 'dti-ray\[gguf\]'"):
        load_tokenizer(str(tmp_path), "real.gguf")


def test_linear_head_reads_one_number_and_is_trained() -> None:
    table = TokenTable(*(torch.zeros(2, dtype=torch.int32).numpy() for _ in range(3)), 40, (None, 0, 1))
    model = build_model(make_config("model.head=linear"), table)
    assert model.head.rows.out_features == 1
    assert {"markers.weight", "head.rows.weight", "head.rows.bias"} <= {n for n, _ in model.named_parameters()}


def test_same_seed_builds_the_same_weights_whatever_the_global_state() -> None:
    table = TokenTable(*(torch.zeros(2, dtype=torch.int32).numpy() for _ in range(3)), 40, (None, 0, 1))
    torch.manual_seed(1)
    first = build_model(make_config(), table)
    torch.manual_seed(2)
    second = build_model(make_config(), table)
    other = build_model(make_config("train.seed=1"), table)
    for name, weight in first.named_parameters():
        assert torch.equal(weight, dict(second.named_parameters())[name])
    assert not torch.equal(first.markers.weight, other.markers.weight)


def test_weights_that_do_not_cover_what_is_trained_are_refused() -> None:
    table = TokenTable(*(torch.zeros(2, dtype=torch.int32).numpy() for _ in range(3)), 40, (None, 0, 1))
    model = build_model(make_config(), table)
    weights = {name: parameter.detach() + 1 for name, parameter in model.trained().items()}
    name, weight = next(iter(weights.items()))
    less = {other: values for other, values in weights.items() if other != name}
    for bad in (less, {**weights, "stray": weight}, {**weights, name: torch.empty(0)}):
        with pytest.raises(InputError, match=f"1 weights do not fit the model, ({name}|stray) first"):
            model.load_trained(bad)
    model.load_trained(weights)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.trained().items())
