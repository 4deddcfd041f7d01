"""Commands for a cluster: send a job there, see what runs, read along, stop it.

Stage: top. In: the arguments of another command, and a cluster's address. Out: that command's log and exit code.
Invariant: what is sent was parsed and checked here by the very command that will run there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from dti_ray.cli.options import AsJson, end, load
from dti_ray.config import RunConfig, to_yaml
from dti_ray.display import console
from dti_ray.errors import EXIT_RUN_FAILED, ConfigError, Fault

if TYPE_CHECKING:  # a wrong option must not wait for Ray
    from ray.job_submission import JobSubmissionClient

    from dti_ray.submit import Ended, Job

FILE = "config.yaml"
MAX_RESULT = 100_000  # characters of the line for a machine, at most
KINDS = ("prepare", "train", "evaluate", "tune", "score")
LOCAL_ONLY = ("config", "files", "root", "as_json")  # parameters that are sent as `FILE`, or not at all

jobs_app = typer.Typer(help="Look after jobs on a cluster.", no_args_is_help=True)

Kind = Annotated[str, typer.Argument(help=", ".join(KINDS), show_default=False)]
Address = Annotated[
    str | None, typer.Option(help="the cluster's dashboard URL or Ray address; default: RAY_ADDRESS, or this machine's")
]
JobName = Annotated[str, typer.Argument(help="id of a job, or its name without an attempt, such as train.demo")]


def submit(
    context: typer.Context,
    kind: Kind,
    address: Address = None,
    detach: Annotated[bool, typer.Option("--detach", help="do not follow the log")] = False,
    code: Annotated[str, typer.Option(help="here: send this dti_ray; image: the cluster's image has it")] = "here",
    as_json: AsJson = False,
) -> None:
    """Send `dti-ray KIND ...` to a cluster and follow it; the same again attaches to it while it lives.

    All other arguments are those of the command: `dti-ray submit train -c FILE train.run=first`.
    """
    faults = [
        Fault(where, f"got {got!r}", f"one of {', '.join(known)}")
        for where, got, known in (("KIND", kind, KINDS), ("--code", code, ("here", "image")))
        if got not in known
    ]
    if faults:
        raise ConfigError(*faults)
    job = plan_job(context, kind, list(context.args), code == "here")
    from dti_ray.submit import connect
    from dti_ray.submit import submit as send

    client = connect(address)
    sent = send(client, job)
    console.print(f"job {sent.id}: {'lives already, attached' if sent.is_attached else 'sent'}")
    if detach:
        console.print(f"follow it with `dti-ray jobs logs {sent.id} --follow`")
        end(as_json, {"id": sent.id, "attached": sent.is_attached})
        return
    _finish(_followed(client, sent.id), as_json, {"id": sent.id, "attached": sent.is_attached})


@jobs_app.command("list")
def jobs_list(address: Address = None, as_json: AsJson = False) -> None:
    """List the jobs that were sent by `dti-ray submit`, oldest first."""
    from dti_ray.submit import connect, ours

    jobs = [
        {
            "id": one.submission_id, "status": str(one.status),
            "started": _moment(one.start_time), "ended": _moment(one.end_time), "exit_code": one.driver_exit_code,
        }
        for one in ours(connect(address))
    ]  # fmt: skip
    table = Table("job", "status", "started", "ended", "exit code")
    for job in jobs:
        table.add_row(*("" if value is None else str(value) for value in job.values()))
    console.print(table if jobs else "no jobs")
    end(as_json, {"jobs": jobs})


@jobs_app.command("logs")
def jobs_logs(
    name: JobName,
    address: Address = None,
    do_follow: Annotated[bool, typer.Option("--follow", help="until the job ends; ends with its exit code")] = False,
) -> None:
    """Print a job's log."""
    from dti_ray.submit import connect, find

    client = connect(address)
    job_id = str(find(client, name).submission_id)
    if do_follow:
        _finish(_followed(client, job_id), False, {})
    else:
        sys.stderr.write(client.get_job_logs(job_id))


@jobs_app.command("stop")
def jobs_stop(name: JobName, address: Address = None, as_json: AsJson = False) -> None:
    """Ask a job to save its state and end; submit it again to go on."""
    from dti_ray.submit import connect, find, result_of, stop

    client = connect(address)
    job = find(client, name)
    ended = result_of(job)
    if ended is None:
        with console.status("waiting for its state to be saved"):
            ended = stop(client, job)
        console.print(f"job {job.submission_id}: stopped; submit it again to go on")
    else:
        console.print(f"job {job.submission_id}: had ended before ({ended.status})")
    end(as_json, {"id": job.submission_id, "status": ended.status})


def plan_job(context: typer.Context, kind: str, arguments: Sequence[str], carries_code: bool) -> Job:
    """Check a command here as it would be checked there, and return it as a job.

    Args:
        context: of the command line, which knows the command.
        kind: name of the command.
        arguments: of it.
        carries_code: whether this process's code goes along.

    Raises:
        ConfigError: the configuration is not usable, or means a place that only this machine has.
    """
    from dti_ray.submit import STOP_MARGIN_S, Job

    assert context.parent is not None
    assert isinstance(context.parent.command, TyperGroup)
    command = context.parent.command.commands[kind]
    assert isinstance(command, TyperCommand)
    parsed = command.make_context(kind, list(arguments), parent=context.parent)
    words = [word for parameter in command.params if isinstance(parameter, TyperArgument)
             for word in parsed.params[parameter.name or ""]]  # fmt: skip
    files, root = parsed.params["files"], parsed.params["root"]
    overrides = [word for word in words if "=" in word]
    names = [f"train.run={json.dumps(word)}" for word in words if "=" not in word]
    config = load(files, [*overrides, *names], root)
    _check_reachable(config)
    # The overrides go as they are: an evaluation takes no other changes, and a run's log shows them.
    text = to_yaml(load(files, [], root))
    return Job(
        kind=kind, name=f"{kind}.{_name(config, kind)}",
        arguments=["-c", FILE, *_options(command, parsed.params), "--json", *words, "cluster.address=null"],
        files={FILE: text}, stop_s=config.checkpoint.patience_s + STOP_MARGIN_S, carries_code=carries_code,
    )  # fmt: skip


def _options(command: TyperCommand, given: dict[str, Any]) -> list[str]:
    """Return the options of a command that differ from their defaults, as arguments."""
    options = [one for one in command.params if isinstance(one, TyperOption) and one.name not in LOCAL_ONLY]
    return [word for one in options if given[one.name or ""] != one.default
            for word in ([one.opts[0]] if one.is_flag else [one.opts[0], str(given[one.name or ""])])]  # fmt: skip


def _name(config: RunConfig, kind: str) -> str:
    """Return the name of what a command writes, which no two may write at once."""
    return {"prepare": config.data.name, "tune": config.tune.sweep, "score": config.score.name}.get(
        kind, config.train.run
    )


def _check_reachable(config: RunConfig) -> None:
    """Refuse places that mean something else on another machine."""
    expected = "a URI, or the full path of a folder that every machine of the cluster shares"
    places = {
        "storage.root": config.storage.root,
        "data.path": config.data.path,
        "data.catalogue": config.data.catalogue,
        "score.input": config.score.input,
        "score.model": config.score.model,
    }
    faults = [
        Fault(key, f"got {place!r}, which is relative to this folder", expected)
        for key, place in places.items()
        if place is not None and "://" not in place and not Path(place).is_absolute()
    ]
    if faults:
        raise ConfigError(*faults)


def _followed(client: JobSubmissionClient, job_id: str) -> tuple[Ended, str]:
    """Print a job's log as it comes; return what came of it, and the end of the log."""
    from dti_ray.submit import follow

    end_of_log = ""

    def write(text: str) -> None:
        nonlocal end_of_log
        end_of_log = (end_of_log + text)[-MAX_RESULT:]
        sys.stderr.write(text)
        sys.stderr.flush()

    try:
        return follow(client, job_id, write), end_of_log
    except KeyboardInterrupt:
        console.print(f"\njob {job_id} goes on; `dti-ray jobs logs {job_id} --follow` looks again, `jobs stop` ends it")
        raise typer.Exit(EXIT_RUN_FAILED) from None


def _finish(followed: tuple[Ended, str], as_json: bool, result: dict[str, object]) -> None:
    """End as the job has ended."""
    ended, end_of_log = followed
    told = f"job ended: {ended.status}, exit code {ended.exit_code}"
    console.print(escape(f"{told}; {ended.message}" if ended.message else told), soft_wrap=True)
    end(as_json, {**result, "status": ended.status, "exit_code": ended.exit_code, "result": _last_result(end_of_log)})
    raise typer.Exit(ended.exit_code)


def _last_result(log: str) -> object:
    """Return what a command said last for a machine, if it did."""
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return None


def _moment(milliseconds: int | None) -> str | None:
    """Return a time of the cluster as text, UTC."""
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
