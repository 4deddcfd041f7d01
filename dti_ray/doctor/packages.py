"""Versions of Python and packages against what this package asks for, and of nodes against this machine's.

Stage: a check. In: requirement strings, and a way to look up what is installed. Out: `Check`s.
Invariant: a requirement's own extras count: ray[default] without what `default` brings is a missing package.
"""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from dti_ray.config import RunConfig
from dti_ray.doctor.check import Check, failed, passed, skipped, warned

DISTRIBUTION = "dti-ray"
SHOWN = ("ray", "torch", "transformers", "deepspeed", "pyarrow")
# A worker unpickles what the driver pickled: these must be the same everywhere, the others had better be.
MUST_AGREE = ("python", "ray", DISTRIBUTION)
COMPARED = (*MUST_AGREE, "torch", "transformers", "deepspeed", "peft", "pyarrow", "numpy", "pydantic")


@dataclass(frozen=True)
class Installed:
    """What a package says of itself: its version, its requirements with those of its extras, its range of Python."""

    version: str
    requires: Sequence[str] = ()
    python: str = ""


@dataclass(frozen=True)
class Unmet:
    """A requirement that does not hold; `version` is None where the package is missing."""

    requirement: str
    version: str | None

    def __str__(self) -> str:
        return f"{self.requirement} is missing" if self.version is None else f"{self.version} for {self.requirement}"


Lookup = Callable[[str], Installed | None]


def installed_here(name: str) -> Installed | None:
    """Look a package up in this process's environment."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Installed(found.version, found.requires or (), (found.metadata.get_all("Requires-Python") or [""])[0])


def check_python(version: str, lookup: Lookup = installed_here) -> Check:
    """Hold Python's version against the range of this package; its sources alone state none."""
    own = lookup(DISTRIBUTION)
    requires = own.python if own is not None else ""
    if not requires:
        return passed("python", version)
    if SpecifierSet(requires).contains(version, prereleases=True):
        return passed("python", f"{version}, as asked: {requires}")
    return failed("python", f"{version}, asked for is {requires}", "make a new environment with another Python")


def check_packages(requirements: Sequence[str], extras: Collection[str], lookup: Lookup = installed_here) -> Check:
    """Hold installed packages against requirement strings.

    Args:
        requirements: as in a package's metadata, those of its extras with their markers.
        extras: of this package, that the configuration uses.
        lookup: what is installed.
    """
    wanted = list(dict.fromkeys(_wanted(requirements, extras, lookup)))
    bad = [unmet for requirement in wanted if (unmet := _unmet(requirement, lookup)) is not None]
    if bad:
        told = "; ".join(map(str, bad))
        return failed("packages", told, f"pip install {shlex.join(unmet.requirement for unmet in bad)}")
    known = ((name, lookup(name)) for name in SHOWN)
    shown = ", ".join(f"{name} {one.version}" for name, one in known if one is not None)
    return passed("packages", f"{len(wanted)} as asked: {shown}")


def check_installation(config: RunConfig, lookup: Lookup = installed_here) -> Check:
    """Hold installed packages against this package's own metadata.

    Args:
        config: decides which extras are needed.
        lookup: what is installed.
    """
    own = lookup(DISTRIBUTION)
    if own is None:
        hint = "install it (`pip install .`), here and in the image, so that its versions are checked"
        return warned("packages", f"{DISTRIBUTION} runs from its sources, which name no versions", hint)
    return check_packages(own.requires, extras_of(config), lookup)


def extras_of(config: RunConfig) -> frozenset[str]:
    """Return the extras that a configuration needs."""
    used = {
        "gguf": config.model.gguf_file is not None,
        "liger": config.model.liger,
        "mlflow": config.telemetry.mlflow is not None,
        "wandb": config.telemetry.wandb is not None,
        "search": config.tune.search == "tpe" and bool(config.tune.space),
    }
    return frozenset(name for name, is_used in used.items() if is_used)


def versions(python: str, lookup: Lookup = installed_here) -> dict[str, str]:
    """Return the versions that are compared between machines; a package that is missing is left out."""
    found = {name: lookup(name) for name in COMPARED if name != "python"}
    return {"python": python, **{name: one.version for name, one in found.items() if one is not None}}


def check_same_versions(here: Mapping[str, str], nodes: Mapping[str, Mapping[str, str]]) -> Check:
    """Hold the nodes' versions against this machine's; builds of one version (+cpu, +cu130) count as the same.

    Args:
        here: package to version.
        nodes: the same for each node.
    """
    name_of_check = "node versions"
    differing: dict[str, list[str]] = {}
    for node, there in nodes.items():
        for name in COMPARED:
            ours, theirs = here.get(name), there.get(name)
            if _public(ours) != _public(theirs):
                differing.setdefault(name, []).append(f"{theirs or 'none'} on {node}")
    if not nodes:
        return skipped(name_of_check, "no node answered")
    if not differing:
        return passed(name_of_check, f"on {', '.join(nodes)} the same as here")
    told = "; ".join(f"{name} {here.get(name, 'none')} here, {', '.join(on)}" for name, on in differing.items())
    advice = "use one image, or one lock file, for driver and nodes"
    is_grave = any(name in MUST_AGREE for name in differing)
    return (failed if is_grave else warned)(name_of_check, told, advice)


def _wanted(requirements: Sequence[str], extras: Collection[str], lookup: Lookup) -> Iterator[str]:
    """Yield each requirement that applies here, and those of its own extras."""
    for text in requirements:
        requirement = Requirement(text)
        if not _applies(requirement, extras):
            continue
        yield f"{requirement.name}{requirement.specifier}"
        found = lookup(requirement.name)
        if found is not None and requirement.extras:
            of_extras = [one for one in found.requires if not _applies(Requirement(one), ())]
            yield from _wanted(of_extras, requirement.extras, lookup)


def _applies(requirement: Requirement, extras: Collection[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def _unmet(text: str, lookup: Lookup) -> Unmet | None:
    requirement = Requirement(text)
    found = lookup(requirement.name)
    if found is None:
        return Unmet(text, None)
    fits = requirement.specifier.contains(Version(found.version), prereleases=True)
    return None if fits else Unmet(text, found.version)


def _public(version: str | None) -> str | None:
    return None if version is None else version.partition("+")[0]
