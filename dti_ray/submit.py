"""Jobs on a cluster: send one, find the one that is there already, follow it, stop it.

Stage: beside launch; the only module that speaks to Ray's Jobs API. In: a `Job`: a command line and its files. Out: the
id that the cluster knows it by, its log, its exit code.
Invariant: of one `Job.name` at most one lives on a cluster. The id is a function of the name and of the attempts that
have ended, and the cluster takes no id twice: whoever comes second, even in the same moment, is attached to the first.

    submit train.demo          -> train.demo        (starts)
    submit train.demo          -> train.demo        (attached, while it lives)
    submit train.demo          -> train.demo~2      (once it has ended: goes on from its state)
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from dti_ray.errors import EXIT_BAD_INPUT, EXIT_RUN_FAILED, Fault, InputError, RunError

NAME, CONTENT, STOP = "dti_ray", "dti_ray_content", "dti_ray_stop_s"  # keys of a job's metadata
ATTEMPT = "~"  # between a name and the number of its attempt; no name holds it
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
LOOK_S = 1.0
PATIENCE_S = 120.0  # with a cluster that does not answer, or that does not take jobs yet
# What Ray answers where somebody was faster, and the next look finds the job; and while its nodes are starting.
MOMENTARY = ("already exists", "No available agent")
STOP_MARGIN_S = 60  # to save the state and to end, beside the patience with storage


@dataclass(frozen=True)
class Job:
    """What a cluster is asked to run.

    Attributes:
        kind: module of `jobs`: prepare, train, …
        name: kind, a dot, and the name of what it writes: `train.demo`.
        arguments: of the module.
        files: name to text; the working directory.
        stop_s: seconds between the polite signal and the other one when it is stopped.
        carries_code: send this process's own `dti_ray` and `jobs`; else the cluster's image has them.
    """

    kind: str
    name: str
    arguments: Sequence[str]
    files: Mapping[str, str]
    stop_s: float
    carries_code: bool

    @property
    def command(self) -> str:
        """One line of shell; replaces its shell, so that signals and the exit code pass."""
        return "exec " + shlex.join(["python", "-m", f"jobs.{self.kind}", *self.arguments])

    @property
    def content(self) -> str:
        """Hash of all that decides what it does."""
        return hashlib.sha256(json.dumps([self.command, dict(self.files)]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Submitted:
    """Where a job is: `is_attached` says that it was there before."""

    id: str
    is_attached: bool


@dataclass(frozen=True)
class Ended:
    """What came of a job; `exit_code` is its own, 3 where it was stopped or never ran."""

    status: str
    exit_code: int
    message: str


def connect(address: str | None) -> JobSubmissionClient:
    """Reach a cluster's Jobs API.

    Args:
        address: the dashboard's URL, or a Ray address; None takes RAY_ADDRESS, or the cluster of this machine.

    Raises:
        InputError: nobody answers there, or not to us.
    """
    where = "--address"
    if address is not None:
        os.environ[ADDRESS_VARIABLE] = address  # Ray puts its own variables above what it is given
    logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        hint = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's token"
        raise InputError(Fault(where, f"the cluster refused us: {_first_line(error.message)}", hint=hint)) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        expected = "the URL of a running cluster's dashboard, http://HOST:8265"
        raise InputError(Fault(where, f"got {address or 'none'}: {_first_line(str(error))}", expected)) from None


def submit(client: JobSubmissionClient, job: Job) -> Submitted:
    """Start a job, unless it lives already.

    Raises:
        InputError: it lives, with other arguments; or this installation has no code to send.
        RunError: the cluster did not take it.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        attempts = attempts_of(client, job.name)
        live = [attempt for attempt in attempts if not attempt.status.is_terminal()]
        if live:
            return Submitted(_same(live[-1], job), is_attached=True)
        wanted = next_id(job.name, [_id(attempt) for attempt in attempts])
        try:
            _start(client, job, wanted)
        except RuntimeError as error:
            if not any(words in str(error) for words in MOMENTARY) or time.monotonic() > deadline:
                raise RunError(Fault(job.name, f"the cluster did not take it: {_first_line(str(error))}")) from error
            time.sleep(LOOK_S)
        else:
            return Submitted(wanted, is_attached=False)


def next_id(name: str, taken: Sequence[str]) -> str:
    """Return the id of the next attempt: the name itself, then `name~2` and so on."""
    numbers = [int(one.partition(ATTEMPT)[2] or 1) for one in taken]
    return f"{name}{ATTEMPT}{max(numbers) + 1}" if numbers else name


def ours(client: JobSubmissionClient) -> list[JobDetails]:
    """Return the jobs that were sent by this module, oldest first."""
    known = [one for one in client.list_jobs() if one.submission_id and NAME in (one.metadata or {})]
    return sorted(known, key=lambda one: one.start_time or 0)


def attempts_of(client: JobSubmissionClient, name: str) -> list[JobDetails]:
    """Return all attempts at one name, oldest first."""
    return [one for one in ours(client) if (one.metadata or {})[NAME] == name]


def find(client: JobSubmissionClient, wanted: str) -> JobDetails:
    """Return the job of an id, or the newest attempt at a name.

    Raises:
        InputError: there is none; names those there are.
    """
    known = ours(client)
    for one in reversed(known):
        if wanted in (one.submission_id, (one.metadata or {})[NAME]):
            return one
    names = ", ".join(_id(one) for one in known) or "the cluster has none"
    raise InputError(Fault(wanted, "no such job", f"one of: {names}"))


def follow(client: JobSubmissionClient, job_id: str, write: Callable[[str], object]) -> Ended:
    """Hand a job's log over as it is written, until the job has ended.

    Args:
        client: the cluster.
        job_id: of a job that is known there.
        write: called with pieces of text, in order, each once, whatever becomes of the connection.

    Raises:
        RunError: the cluster did not answer for `PATIENCE_S`; the job may live.
    """
    log, answered_at = _Log(client, job_id, write), time.monotonic()
    while True:
        before = log.written
        try:
            asyncio.run(log.tail())
            if (ended := result_of(client.get_job_info(job_id))) is not None:
                log.take(client.get_job_logs(job_id))
                return ended
            answered_at = time.monotonic()
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            now = time.monotonic()
            answered_at = now if log.written > before else answered_at
            if now - answered_at > PATIENCE_S:
                problem = f"the cluster does not answer: {_first_line(str(error))}"
                hint = f"the job may go on there; `dti-ray jobs logs {job_id} --follow` looks again"
                raise RunError(Fault(job_id, problem, hint=hint)) from error
        time.sleep(LOOK_S)


def stop(client: JobSubmissionClient, job: JobDetails) -> Ended:
    """Ask a job to save its state and end, and wait until it has.

    Raises:
        RunError: it had not ended long after the cluster was to have killed it.
    """
    patience_s = float((job.metadata or {})[STOP]) + STOP_MARGIN_S
    client.stop_job(_id(job))
    deadline = time.monotonic() + patience_s
    while (ended := result_of(client.get_job_info(_id(job)))) is None:
        if time.monotonic() > deadline:
            raise RunError(Fault(_id(job), f"had not ended {patience_s:.0f} s after it was asked to"))
        time.sleep(LOOK_S)
    return ended


def result_of(job: JobDetails) -> Ended | None:
    """Return what came of a job, or None while it lives."""
    if not job.status.is_terminal():
        return None
    if job.status == JobStatus.SUCCEEDED:
        return Ended(str(job.status), 0, "")
    if job.status == JobStatus.STOPPED:
        return Ended(str(job.status), EXIT_RUN_FAILED, "it was stopped; submit it again to go on")
    if job.driver_exit_code is None:  # it never ran
        return Ended(str(job.status), EXIT_RUN_FAILED, (job.message or "").strip())
    is_known = job.driver_exit_code == EXIT_BAD_INPUT
    return Ended(str(job.status), EXIT_BAD_INPUT if is_known else EXIT_RUN_FAILED, "its log says why")


def _same(live: JobDetails, job: Job) -> str:
    """Return the id of a job that lives, if it does what is asked for."""
    if (live.metadata or {}).get(CONTENT) != job.content:
        hint = f"`dti-ray jobs stop {_id(live)}` ends it first; or choose another name"
        raise InputError(Fault(_id(live), "runs there with another configuration", "the same one", hint))
    return _id(live)


def _start(client: JobSubmissionClient, job: Job, job_id: str) -> None:
    stop_s = str(int(job.stop_s))
    with tempfile.TemporaryDirectory(prefix="dti-ray-job-") as folder:
        for name, text in job.files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        if job.carries_code:
            _copy_code(Path(folder))
        client.submit_job(
            entrypoint=job.command,
            submission_id=job_id,
            metadata={NAME: job.name, CONTENT: job.content, STOP: stop_s},
            runtime_env={
                "working_dir": folder,
                "env_vars": {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": stop_s},
            },
        )


def _copy_code(folder: Path) -> None:
    package = Path(__file__).parent
    for source in (package, package.parent / "jobs"):
        if not source.is_dir():
            hint = "submit from the project's folder, or use --code image"
            raise InputError(Fault("--code", f"{source.name}/ is not beside the installed package", hint=hint))
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))


class _Log:
    """A job's log, of which every piece is handed over once: the cluster tells it from its beginning each time."""

    def __init__(self, client: JobSubmissionClient, job_id: str, write: Callable[[str], object]) -> None:
        self.client, self.job_id, self.write = client, job_id, write
        self.written = 0

    def take(self, text: str, start: int = 0) -> None:
        """Hand over what is new of a text that begins `start` characters into the log."""
        if (end := start + len(text)) > self.written:
            self.write(text[self.written - start :])
            self.written = end

    async def tail(self) -> None:
        """Hand over what comes, until the job or the connection ends."""
        seen = 0
        async for text in self.client.tail_job_logs(self.job_id):
            self.take(text, seen)
            seen += len(text)


def _id(job: JobDetails) -> str:
    assert job.submission_id is not None  # `ours` leaves the others out
    return job.submission_id


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")
