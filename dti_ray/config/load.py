"""From files and overrides to one frozen `RunConfig`, or to the list of all faults.

Stage: configuration. In: YAML files in order, then dotted overrides. Out: `RunConfig`.
Invariant: schema defaults < files in the order given < overrides; every fault is reported at once,
one line each, with its dotted path, what was got and what was expected.

    load_config(["configs/demo.yaml"], ["optim.lr=3e-4", "packing.k=50"])
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from dti_ray.config.schema import RunConfig
from dti_ray.errors import ConfigError, Fault

Tree = dict[str, object]
NUMBER = re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf)$|^\.(nan|NaN)$")
OWN_KEYS = ("tune.space.", "study.rows.", "study.tables.")  # below them stand the user's own keys
BRANCHES = (".bool", ".int", ".float", ".str")  # of a `Value`
NUMBER_STARTS = list("-+0123456789.")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `off` and `no` are words, `1e-4` is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, NUMBER_STARTS)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or `_Loader` would not read as text."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, NUMBER_STARTS)

# What may differ between two runs of one name: where it runs and how often it reports, not what it learns.
NOT_IN_HASH = {
    "storage": True,
    "cluster": True,
    "checkpoint": True,
    "serve": True,
    "telemetry": True,
    "tune": True,
    "score": True,
    "study": True,
    "train": {
        "log_targets", "max_failures", "max_skipped", "on_nonfinite", "peak_tflops", "rows_per_pass", "zero_stage",
    },
    "eval": {"bootstrap", "every_targets", "protocol"},
}  # fmt: skip


def load_config(
    files: Sequence[str | Path] = (), overrides: Sequence[str] = (), base: RunConfig | None = None
) -> RunConfig:
    """Merge files and overrides and validate the result.

    Args:
        files: YAML files; later ones win key by key.
        overrides: `dotted.key=value` strings; numbers, true, false, null and quoted text are read as YAML,
            any other text stays as it was typed.
        base: what files and overrides change; None starts from the schema's defaults.

    Raises:
        ConfigError: with one fault per unreadable file, unknown key or value out of range.
    """
    tree: Tree = {} if base is None else base.model_dump(mode="json")
    faults: list[Fault] = []
    for path in files:
        try:
            _merge(tree, _read_yaml(Path(path)))
        except ConfigError as error:
            faults.extend(error.faults)
    for override in overrides:
        try:
            _merge(tree, _parse_override(override))
        except ConfigError as error:
            faults.extend(error.faults)
    return _validated(tree, faults)


def with_values(base: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """Return a configuration with other values at some dotted keys; a value keeps its type.

    Raises:
        ConfigError: with one fault per unknown key or value out of range.
    """
    tree: Tree = base.model_dump(mode="json")
    for key, value in values.items():
        _merge(tree, _nested(key, value))
    return _validated(tree)


def to_yaml(config: RunConfig) -> str:
    """Return the effective configuration as YAML that `load_config` reads back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=100)


def from_yaml(text: str) -> RunConfig:
    """Return the configuration that `to_yaml` wrote.

    Raises:
        ConfigError: the text is damaged, or another version of the schema wrote it.
    """
    try:
        return RunConfig.model_validate(yaml.load(text, _Loader))  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(_not_yaml("stored configuration", error)) from None
    except ValidationError as error:
        raise ConfigError(*_faults_of(error)) from None


def config_hash(config: RunConfig) -> str:
    """Return 16 hex digits that name what a run learns (not where it runs)."""
    tree = config.model_dump(mode="json", exclude=NOT_IN_HASH)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: RunConfig, new: RunConfig) -> list[Fault]:
    """Return one fault per dotted key whose value differs between two configurations."""
    before, after = (dict(_leaves(c.model_dump(mode="json", exclude=NOT_IN_HASH))) for c in (old, new))
    return [
        Fault(where=key, problem=f"got {after.get(key)!r}", expected=f"{before.get(key)!r} as in the stored run")
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def dotted_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the schema, sections first."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from dotted_keys(field.annotation, f"{prefix}{name}.")


def unknown_key(where: str) -> Fault:
    """Return the fault of a dotted key that the schema does not have, with the one that may be meant."""
    return Fault(where, "unknown key", hint=_suggestion(where, list(dotted_keys())))


def _read_yaml(path: Path) -> Tree:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ConfigError(Fault(str(path), f"cannot be read ({error.strerror})", "a YAML file")) from None
    except yaml.YAMLError as error:
        raise ConfigError(_not_yaml(str(path), error)) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(Fault(str(path), f"holds a {type(tree).__name__}", "sections such as `optim:`"))
    return tree


def _parse_override(override: str) -> Tree:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(Fault(override, "is not an override", "`section.key=value`, as in optim.lr=3e-4"))
    return _nested(key.strip(), _parse_value(text))


def _nested(key: str, value: object) -> Tree:
    section, dot, leaf = key.rpartition(".")
    return _nested(section, {leaf: value}) if dot else {leaf: value}


def _parse_value(text: str) -> object:
    """Read a scalar; a template such as `{title}` would be a mapping to YAML, and ` #1` a comment."""
    try:
        value: object = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        return text
    is_quoted = isinstance(value, str) and text.startswith(("'", '"'))
    return value if is_quoted or isinstance(value, (bool, int, float)) or text == "null" else text


def _not_yaml(where: str, error: yaml.YAMLError) -> Fault:
    return Fault(where, f"is not YAML: {' '.join(str(error).split())}")


def _validated(tree: Tree, faults: Sequence[Fault] = ()) -> RunConfig:
    """Return what a tree declares, or raise its faults behind those already found."""
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(*faults, *_faults_of(error)) from None
    if faults:
        raise ConfigError(*faults)
    return config


def _merge(into: Tree, tree: Tree) -> None:
    for key, value in tree.items():
        below = into.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            _merge(below, value)
        else:
            into[key] = value


def _faults_of(error: ValidationError) -> Iterable[Fault]:
    known = list(dotted_keys())
    got_at: dict[str, str] = {}
    expected_at: dict[str, list[str]] = {}  # a union reports each of its branches
    for detail in error.errors(include_url=False):
        where = ".".join(str(part) for part in detail["loc"]) or "configuration"
        if detail["type"] == "extra_forbidden":
            yield unknown_key(where)
        elif detail["type"] == "value_error":
            yield Fault(where, str(detail["ctx"]["error"]) if "ctx" in detail else detail["msg"])
        else:
            where = _field(where, known)
            expected_at.setdefault(where, []).append(detail["msg"].removeprefix("Input should be "))
            got_at[where] = f"got {detail['input']!r}"
    for where, expected in expected_at.items():
        yield Fault(where, got_at[where], " or ".join(expected))


def _field(where: str, known: list[str]) -> str:
    """Strip what pydantic appends to name the branch of a union; keys of a mapping are the user's own."""
    if where.startswith(OWN_KEYS):
        return where.rpartition(".")[0] if where.endswith(BRANCHES) else where
    while where not in known and "." in where:
        where = where.rpartition(".")[0]
    return where


def _suggestion(where: str, known: list[str]) -> str:
    section, _, leaf = where.rpartition(".")
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    near = same_leaf or [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=1)]
    if near:
        return f"did you mean {near[0]}?"
    return f"known here: {', '.join(siblings.values())}" if siblings else "see `dti-ray config show`"


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
