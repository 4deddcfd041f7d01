"""Configuration: one precedence, every fault at once, no trap of YAML's, and a hash of what is learnt."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from dti_ray.config import (
    RunConfig,
    config_hash,
    differences,
    dotted_keys,
    from_yaml,
    load_config,
    to_yaml,
    with_values,
)
from dti_ray.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
OTHER_VALUES = (
    True, False, 1, 2, 3, 7, 8, 512, 100_000, 0.05, 0.3, "other", "all", "tokens", "global_time", "strictly_earlier",
    "linear", "dense", "log1p", "drop", "distance", "torch", "fp32", "movielens", "ms", "UTC", "quarantine", "gap",
    ["title"], "first", "skip", "sliding", "tpe", "log_loss", "median", "json", "null", [1], [{"packing.k": 5}],
    {"other": {}, "title": {"final": True}}, [{"title": "one", "rows": ["other"]}],
    {"packing.k": {"choice": [1, 2]}, "optim.lr": {"uniform": [0.1, 0.2]}},
)  # fmt: skip


def faults_of(*overrides: str, files: list[Path] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(files or [], overrides)
    return [str(fault) for fault in caught.value.faults]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def leaves(model: type[BaseModel] = RunConfig) -> Iterator[str]:
    """Yield the dotted keys that hold a value."""
    keys = list(dotted_keys(model))
    return (key for key in keys if not any(other.startswith(f"{key}.") for other in keys))


def value_of(config: RunConfig, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def changed(config: RunConfig, key: str) -> RunConfig:
    """Return the configuration with another valid value at one key."""
    *sections, name = key.split(".")
    for value in OTHER_VALUES:
        if value == value_of(config, key):
            continue
        tree = config.model_dump(mode="json")
        reduce(getitem, sections, tree)[name] = value
        try:
            return RunConfig.model_validate(tree)
        except ValidationError:
            continue
    raise AssertionError(f"{key} needs another value in OTHER_VALUES")


def test_defaults_lose_to_files_in_order_and_files_to_overrides(tmp_path: Path) -> None:
    first = write(tmp_path, "1.yaml", "optim: {lr: 0.1, epochs: 7}\npacking: {k: 5}\n")
    second = write(tmp_path, "2.yaml", "optim: {lr: 0.2}\npacking: {n: 6}\n")
    config = load_config([first, second], ["packing.n=8", "packing.n=9"])
    assert (config.optim.lr, config.optim.epochs, config.packing.k, config.packing.n) == (0.2, 7, 5, 9)
    assert load_config([second, first]).optim.lr == 0.1
    assert config.optim.beta1 == RunConfig().optim.beta1


def test_base_takes_the_place_of_the_defaults() -> None:
    base = load_config([], ["packing.k=50", "optim.lr=0.1"])
    config = load_config([], ["optim.lr=0.2"], base=base)
    assert (config.packing.k, config.optim.lr) == (50, 0.2)


def test_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config([write(tmp_path, "empty.yaml", "# nothing\n")]) == RunConfig()


def test_all_faults_are_reported_at_once_one_line_each(tmp_path: Path) -> None:
    file = write(tmp_path, "bad.yaml", "optim:\n  lr: -1\n  epoch: 3\nmodel:\n  heads: two\n")
    faults = faults_of("packing.k=some", "nonsense", "eval.n=0", files=[file, tmp_path / "none.yaml"])
    assert len(faults) == 7
    assert not any("\n" in fault for fault in faults)
    wheres = ("optim.lr", "optim.epoch", "model.heads", "packing.k", "nonsense", "eval.n", f"{tmp_path}/none.yaml")
    for where in wheres:
        assert sum(fault.startswith(f"{where}: ") for fault in faults) == 1, where


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("optim.learning_rat", "known here: optim.lr, optim.weight_decay"),
        ("optim.warmpu", "did you mean optim.warmup?"),
        ("packing.row_token", "did you mean packing.row_tokens?"),
        ("packin.k", "did you mean packing?"),
    ],
)
def test_misspelt_key_gets_a_suggestion(misspelt: str, meant: str) -> None:
    (fault,) = faults_of(f"{misspelt}=1")
    assert fault.startswith(f"{misspelt.split('.')[0]}")
    assert "unknown key" in fault
    assert meant in fault


@pytest.mark.parametrize(
    ("wrong", "right"), [("optim.k", "packing.k"), ("lr", "optim.lr"), ("train.dropout", "model.dropout")]
)
def test_key_of_another_section_names_the_right_one(wrong: str, right: str) -> None:
    assert faults_of(f"{wrong}=1") == [f"{wrong}: unknown key; did you mean {right}?"]


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("optim.lr=0", "optim.lr: got 0; expected greater than 0"),
        ("data.train_fraction=1.5", "data.train_fraction: got 1.5; expected less than 1"),
        ("packing.n=2.5", "packing.n: got 2.5; expected a valid integer, got a number with a fractional part"),
        ("packing.window=far", "packing.window: got 'far'; expected 'interactions', 'tokens' or 'off'"),
        ("train.zero_stage=4", "train.zero_stage: got 4; expected 0, 1, 2 or 3"),
        ("packing.k=0", "packing.k: got 0; expected greater than 0 or 'all'"),
        ("data.name=a/b", "data.name: got 'a/b'; expected"),
        ("prompt.item_template=", "prompt.item_template: got ''; expected"),
    ],
)
def test_value_out_of_range_names_its_path_what_was_got_and_what_was_expected(override: str, fault: str) -> None:
    (found,) = faults_of(override)
    assert found.startswith(fault) or (found.split(";")[0] == fault.split(";")[0] and "expected" in found)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data.train_fraction=0.9", "data.valid_fraction=0.1"], "train_fraction + valid_fraction"),
        (["model.hidden_size=100", "model.heads=8"], "hidden_size must be a multiple"),
        (["model.gguf_file=a.gguf"], "gguf_file needs name_or_path"),
        (["model.compile=true", "model.liger=true"], "choose one"),
        (["model.heads=4", "model.kv_heads=3"], "heads must be a multiple of kv_heads"),
        (["packing.streams=4", "cluster.workers=3"], "packing.streams must be a multiple of cluster.workers"),
        (["train.engine=torch", "cluster.workers=2"], "set cluster.workers=1"),
        (["packing.k=all", "packing.k_min=5"], "packing: k_min=5 draws from k_min to k, which is all"),
        (["packing.k_min=51"], "packing: k_min=51 is above k=50: lower packing.k_min or raise packing.k"),
        (["optim.targets_per_step=3", "packing.streams=4"], "optim.targets_per_step must be at least"),
    ],
)
def test_sections_that_disagree_are_a_fault(overrides: list[str], named: str) -> None:
    (fault,) = faults_of(*overrides)
    assert named in fault


@pytest.mark.parametrize("override", ["optim", "=3", " =3"])
def test_override_without_key_or_value_shows_how_one_looks(override: str) -> None:
    (fault,) = faults_of(override)
    assert "optim.lr=3e-4" in fault


@pytest.mark.parametrize("text", ["optim: [1, 2", "- optim\n", "optim", "\t- a"])
def test_file_that_is_no_mapping_is_one_fault_with_its_name(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, "odd.yaml", text)
    (fault,) = faults_of(files=[file])
    assert fault.startswith(f"{file}: ")
    assert "\n" not in fault


def test_off_and_no_stay_words_and_exponents_are_numbers(tmp_path: Path) -> None:
    text = "packing: {window: off}\nreset: {mode: off}\nprompt: {no_token: no, yes_token: yes}\noptim: {lr: 1e-4}\n"
    for config in (
        load_config([write(tmp_path, "words.yaml", text)]),
        load_config(
            [],
            ["packing.window=off", "reset.mode=off", "prompt.no_token=no", "prompt.yes_token=yes", "optim.lr=1e-4"],
        ),
    ):
        assert (config.packing.window, config.reset.mode, config.optim.lr) == ("off", "off", 1e-4)
        assert (config.prompt.no_token, config.prompt.yes_token) == ("no", "yes")


@pytest.mark.parametrize(
    "text",
    [
        "{title}", "{title} ({year})", "{title}|{genres}", "Film: {title}", "[{title}]", "- {title}", "{title} #1",
        "2026-11-20", " {title}",
    ],
)  # fmt: skip
def test_text_of_an_override_stays_as_typed(text: str) -> None:
    assert load_config([], [f"prompt.item_template={text}"]).prompt.item_template == text


def test_quotes_make_a_text_of_an_override() -> None:
    config = load_config([], ["prompt.yes_token=' yes'", 'train.run="5"', "prompt.no_token='\"'"])
    assert (config.prompt.yes_token, config.train.run, config.prompt.no_token) == (" yes", "5", '"')


def test_targets_of_adapters_are_a_list_in_yaml_and_separated_by_commas_in_an_override(tmp_path: Path) -> None:
    file = write(tmp_path, "lora.yaml", "lora: {targets: [q_proj, v_proj]}\n")
    for config in (load_config([file]), load_config([], ["lora.targets=q_proj, v_proj"])):
        assert config.lora.targets == ("q_proj", "v_proj")
        assert from_yaml(to_yaml(config)) == config
    assert load_config([], ["lora.targets=all-linear"]).lora.targets == "all-linear"
    (fault,) = faults_of("lora.targets=")
    assert fault.startswith("lora.targets: got ''")


def test_label_is_checked_with_the_configuration() -> None:
    assert load_config([], ["data.label=play_ms / video_ms >= 0.5"]).data.label == "play_ms / video_ms >= 0.5"
    assert load_config([], ["data.label=event in ('click', 'buy')"]).data.label == "event in ('click', 'buy')"
    (fault,) = faults_of("data.label=rating >")
    assert fault.startswith("data.label: ")
    assert "'rating >' is no expression such as `rating > 3`" in fault
    (fault,) = faults_of("data.label=len(rating) > 3")
    assert "holds 'len(rating)'; a label has columns, numbers" in fault


def test_time_zone_is_one_of_the_iana_list() -> None:
    assert load_config([], ["data.time_zone=Europe/Berlin"]).data.time_zone == "Europe/Berlin"
    (fault,) = faults_of("data.time_zone=CEST")
    assert fault.startswith("data.time_zone: ")
    assert "'CEST' is no time zone of the IANA list, such as UTC or Europe/Berlin" in fault


def test_mapping_of_columns_belongs_to_a_tabular_source_with_a_path(tmp_path: Path) -> None:
    file = write(
        tmp_path, "log.yaml", "data: {source: tabular, path: logs, columns: {user: uid, text: [title, brand]}}"
    )
    columns = load_config([file]).data.columns
    assert (columns.user, columns.item, columns.text) == ("uid", "item_id", ("title", "brand"))
    (fault,) = faults_of("data.source=tabular")
    assert "source tabular needs path" in fault
    (fault,) = faults_of("data.columns.user=uid")
    assert "catalogue and columns are for source tabular; movielens knows its own files" in fault


def test_a_value_set_at_a_dotted_key_keeps_its_type() -> None:
    base = load_config([], ["packing.n=5"])
    config = with_values(base, {"packing.k": "all", "lora.rank": 8, "eval.n": None, "prompt.prefix": "1e5"})
    assert (config.packing.k, config.lora.rank, config.eval.n, config.prompt.prefix) == ("all", 8, None, "1e5")
    assert config.packing.n == 5
    assert with_values(base, {}) == base
    assert base.packing.k == 50


def test_values_set_at_dotted_keys_are_checked_like_overrides() -> None:
    with pytest.raises(ConfigError) as caught:
        with_values(RunConfig(), {"optim.lr": -1.0, "packing.kk": 2, "reset.mode": "some"})
    assert sorted(str(fault) for fault in caught.value.faults) == sorted(
        faults_of("optim.lr=-1.0", "packing.kk=2", "reset.mode=some")
    )


def test_null_of_an_override_is_none() -> None:
    assert load_config([], ["data.time_zone=UTC"]).data.time_zone == "UTC"
    assert load_config([], ["data.time_zone=UTC", "data.time_zone=null"]).data.time_zone is None


odd_texts = st.sampled_from(["off", "no", "1e-4", "7e10", "1_0", "0x1", "null", "~", "=", ".5", "-", "\x85"])
odd_names = st.sampled_from(["1e5", "12345e67", "1.5e3", "off", "2026-11-20"])
texts = st.text(max_size=12) | odd_texts


@settings(max_examples=60, deadline=None)
@given(
    prefix=texts,
    template=texts.filter(bool),
    run=st.from_regex(r"[A-Za-z0-9._-]+", fullmatch=True) | odd_names,
    lr=st.floats(1e-12, 1e12),
    label=st.builds("`{}` > {}".format, st.text(min_size=1).filter(lambda name: "`" not in name), st.floats(-9, 9)),
    unit=st.sampled_from([None, "s", "ms", "us", "ns"]),
    k=st.integers(1, 10**9) | st.just("all"),
    window=st.sampled_from(["interactions", "tokens", "off"]),
    n=st.none() | st.integers(1, 99),
)
def test_yaml_round_trip_gives_the_same_configuration(
    prefix: str,
    template: str,
    run: str,
    lr: float,
    label: str,
    unit: str | None,
    k: int | str,
    window: str,
    n: int | None,
) -> None:
    config = RunConfig.model_validate(
        {
            "prompt": {"prefix": prefix, "item_template": template},
            "train": {"run": run},
            "optim": {"lr": lr},
            "data": {"label": label, "time_unit": unit},
            "packing": {"k": k, "window": window},
            "eval": {"n": n},
        }
    )
    assert from_yaml(to_yaml(config)) == config


def test_effective_yaml_means_the_same_to_any_yaml_reader() -> None:
    config = load_config([], ["packing.window=off", "optim.lr=1e-8", "train.run='1e5'"])
    tree = yaml.safe_load(to_yaml(config))
    assert (tree["packing"]["window"], tree["optim"]["lr"], tree["train"]["run"]) == ("off", 1e-8, "1e5")


@pytest.mark.parametrize("text", ["optim: {speed: 3}", "optim: {lr: -1}", "optim: [", "- optim"])
def test_stored_yaml_that_does_not_fit_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        from_yaml(text)


ANY = with_values(
    load_config([], ["cluster.workers=1", "model.name_or_path=folder", "data.source=tabular", "data.path=logs"]),
    {"study.rows": {"other": {}, "title": {}}},
)


FREE = {
    "train.log_targets", "train.max_failures", "train.max_skipped", "train.on_nonfinite", "train.peak_tflops",
    "train.rows_per_pass", "train.zero_stage", "eval.bootstrap", "eval.every_targets", "eval.protocol",
}  # fmt: skip


@pytest.mark.parametrize("key", list(leaves()))
def test_hash_names_what_is_learnt_and_not_where(key: str) -> None:
    other = changed(ANY, key)
    is_where = (
        key.startswith(("storage.", "cluster.", "checkpoint.", "telemetry.", "tune.", "score.", "serve.", "study."))
        or key in FREE
    )
    assert (config_hash(other) == config_hash(ANY)) == is_where
    assert [fault.where for fault in differences(ANY, other)] == ([] if is_where else [key])


def test_hash_is_16_hex_digits_and_the_same_in_every_process() -> None:
    code = "from dti_ray.config import *; print(config_hash(RunConfig()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == config_hash(RunConfig())
    assert len(found) == 16
    assert int(found, 16) >= 0


def test_differences_name_key_new_and_stored_value() -> None:
    found = differences(RunConfig(), load_config([], ["packing.k=20", "optim.lr=0.1", "storage.root=elsewhere"]))
    assert [str(fault) for fault in found] == [
        "optim.lr: got 0.1; expected 0.0015 as in the stored run",
        "packing.k: got 20; expected 50 as in the stored run",
    ]
    assert differences(RunConfig(), RunConfig()) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_file_in_configs_loads(path: Path) -> None:
    config = load_config([path])
    assert from_yaml(to_yaml(config)) == config


def test_there_are_configs_to_load() -> None:
    assert CONFIGS


def test_every_setting_has_a_description() -> None:
    def missing(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                assert field.annotation.__doc__, prefix + name
                yield from missing(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                yield prefix + name

    assert list(missing(RunConfig)) == []


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError):
        RunConfig().optim.lr = 1.0


def test_importing_the_configuration_imports_neither_torch_nor_ray() -> None:
    heavy = ("torch", "ray", "transformers", "numpy")
    code = f"import sys, dti_ray.config; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == "[]"
