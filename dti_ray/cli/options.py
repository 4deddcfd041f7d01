"""What all commands share: their options, how a configuration is read, how a command ends.

Stage: top. In: arguments. Out: a `RunConfig`; one machine-readable line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from dti_ray.config import RunConfig, load_config

Files = Annotated[
    list[Path],
    typer.Option(
        "--config", "-c", help="YAML file; may be given several times", default_factory=list, show_default=False
    ),
]
Root = Annotated[str | None, typer.Option("--root", help="storage root: folder, file://, s3:// or gs:// URI")]
AsJson = Annotated[bool, typer.Option("--json", help="end with one machine-readable line on stdout")]
Overrides = Annotated[
    list[str],
    typer.Argument(help="overrides such as optim.lr=3e-4 packing.k=50", default_factory=list, show_default=False),
]


def load(files: list[Path], overrides: list[str], root: str | None) -> RunConfig:
    """Read the configuration: files, then overrides, then the root."""
    given = [] if root is None else [f"storage.root={json.dumps(root, ensure_ascii=False)}"]
    return load_config(files, [*overrides, *given])


def end(as_json: bool, result: Mapping[str, object]) -> None:
    """End a command: with `--json`, one line on stdout."""
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
