"""The command that serves a model over HTTP.

Stage: top. In: a run or an export, and the `serve` section. Out: an address that answers until SIGINT or SIGTERM.
"""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer
from rich.markup import escape

from dti_ray.cli.options import AsJson, Files, Overrides, Root, end, load
from dti_ray.display import console
from dti_ray.errors import ConfigError, Fault
from dti_ray.storage import absolute

NEEDED = ("fastapi", "uvicorn", "httptools")  # of the extra; Ray itself is always there


def serve(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_EXPORT", help="name of a run, <root>/runs/<name>, or an export's folder")
    ],
    overrides: Overrides,
    files: Files,
    host: Annotated[str | None, typer.Option(help="address to listen on; 0.0.0.0: all")] = None,
    port: Annotated[int | None, typer.Option(help="port to listen on")] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Serve a model over HTTP, on this machine, until it is told to end (Ctrl-C)."""
    _check_installed()
    places = {"host": host, "port": port}
    given = [f"serve.{name}={value}" for name, value in places.items() if value is not None]
    config = load(files, [*overrides, *given], root)
    from dti_ray.serve.app import place_of
    from dti_ray.serve.local import check, serve_until_told
    from dti_ray.serve.scorer import Source
    from dti_ray.serve.token import VARIABLE, is_open

    check(config.serve)
    if is_open(config.serve):
        console.print(f"serve: {config.serve.host} is open to other machines, and asks for no token; set {VARIABLE}")
    uri, below = place_of(model, absolute(config.storage.root))
    source = Source(absolute(uri) if below is None else uri, below)
    console.print(f"serve: {escape(model)}, state {source.newest()}; loading", soft_wrap=True)

    def is_up(url: str) -> None:
        console.print(f"serve: {url} answers; {url}/docs says what may be asked; Ctrl-C ends it", soft_wrap=True)

    seconds = serve_until_told(source.uri, source.root, config, is_up)
    console.print(f"serve: ended after {seconds:.0f} s")
    end(as_json, {"model": model, "seconds": round(seconds, 1)})


def _check_installed() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(Fault("serve", f"{missing[0]} is not installed", hint="pip install 'dti-ray[serve]'"))
