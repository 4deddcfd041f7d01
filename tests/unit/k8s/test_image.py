"""What `k8s/Dockerfile` says, as far as it can be held without building it."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import PurePosixPath

from tests.manifests import K8S, ROOT

EXACT_TAG = re.compile(r"^[a-z0-9./-]+:\d+\.\d+\.\d+-[a-z0-9-]+$")


def instructions() -> list[tuple[str, str]]:
    """Return (INSTRUCTION, rest) of each one, continued lines joined."""
    text = (K8S / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    whole = (line.strip() for line in re.sub(r"\\\n\s*", "", lines).splitlines())
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in whole if line]


def stages() -> list[list[tuple[str, str]]]:
    """Return the instructions of each stage, its FROM first."""
    found: list[list[tuple[str, str]]] = []
    for instruction in instructions():
        if instruction[0] == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


def is_sent(path: str) -> bool:
    """Say whether `.dockerignore` lets a path of the project reach the build; its last rule that matches decides."""
    is_kept = True
    for rule in (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n"):
        pattern = rule.removeprefix("!").removeprefix("**/")
        parts = PurePosixPath(path).parts
        above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
        names = parts if rule.startswith("**/") else above
        if rule and not rule.startswith("#") and any(fnmatch(name, pattern) for name in names):
            is_kept = rule.startswith("!")
    return is_kept


def sources() -> list[str]:
    """Return what is copied from the project."""
    copies = [rest.split() for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    return [source for *copied, _ in copies for source in copied]


def test_every_base_has_an_exact_tag() -> None:
    named: set[str] = set()
    for stage in stages():
        image, _, name = stage[0][1].partition(" AS ")
        known = {one.rpartition("-")[0] for one in named} if "${" in image else named
        assert image.partition("-${")[0] in known or EXACT_TAG.match(image), image
        named.add(name)


def test_there_is_a_stage_for_each_image_that_pods_name() -> None:
    names = {stage[0][1].partition(" AS ")[2] for stage in stages()}
    assert {"build-cpu", "build-cuda"} <= names
    assert ("ARG", "VARIANT=cpu") in instructions()


def test_it_runs_as_the_user_of_the_manifests() -> None:
    assert [rest for name, rest in stages()[-1] if name == "USER"] == ["1000:1000"]


def test_it_is_built_in_stages_and_has_a_health_check() -> None:
    last = [name for name, _ in stages()[-1]]
    assert any(rest.startswith("--from=build ") for _, rest in stages()[-1])
    assert "HEALTHCHECK" in last
    assert not any("apt-get" in rest or "pip install" in rest for name, rest in stages()[-1] if name == "RUN")


def test_what_is_copied_is_there_and_is_sent() -> None:
    assert sources()
    for source in sources():
        assert (ROOT / source).exists(), source
        assert is_sent(source), source


def test_nothing_else_is_sent() -> None:
    for path in (".git/config", "tests/manifests.py", "outputs/runs", ".venv/bin/python", "k8s/base/cluster.yaml"):
        assert not is_sent(path), path
    assert not is_sent("dti_ray/__pycache__/cli.pyc")
    assert is_sent("dti_ray/cli/__init__.py")


def test_packages_are_the_pinned_ones() -> None:
    installs = [rest for _, rest in instructions() if "pip install" in rest]
    assert all("--constraint constraints.txt" in rest or "--no-deps" in rest for rest in installs)


def test_jobs_and_configurations_are_in_it() -> None:
    last = dict(rest.split() for name, rest in stages()[-1] if name == "COPY" and not rest.startswith("--from"))
    assert last == {"jobs": "jobs", "configs": "configs"}
    assert "PYTHONPATH=/opt/dti-ray" in " ".join(rest for name, rest in stages()[-1] if name == "ENV")
