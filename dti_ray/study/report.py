"""The report of a study: `quality_<stem>.md` for people, `quality_<stem>.json` for programs, and pictures beside them.

Stage: study, last step. In: `StudyResults`, whole or in part. Out: files in one folder.
Invariant: every number and every verdict is computed from the results; what has not ended is named; the same results
give the same files.
"""

from __future__ import annotations

import json
from pathlib import Path

from dti_ray.errors import Fault, InputError
from dti_ray.study import tables
from dti_ray.study.compare import SPLITS
from dti_ray.study.document import to_json
from dti_ray.study.findings import Findings, find
from dti_ray.study.plots import Picture, pictures
from dti_ray.study.promises import planned_seeds
from dti_ray.study.results import StudyResults
from dti_ray.study.words import DASH, TIMES, plural, table

SPLIT_WORDS = {"valid": "Validation split", "test": "Test split"}


def write_quality(results: StudyResults, folder: Path, stem: str) -> list[Path]:
    """Write the report of a study.

    Args:
        results: a study, whole or in part.
        folder: it is made if it is not there.
        stem: what was measured where and when, as in `movielens_xeon-2core_202611`.

    Returns:
        The files: the page, the JSON, the pictures.

    Raises:
        InputError: two answers of a split are not of the same targets in the same order; the folder cannot be written.
    """
    found = find(results)
    drawn = pictures(results.study, found.compared, found.costs)
    name = f"quality_{stem}"
    content = {f"{name}_{one.name}.png": one.png for one in drawn}
    document = to_json(found)
    content[f"{name}.json"] = (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    content[f"{name}.md"] = to_markdown(found, drawn, name).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file_name, data in content.items():
            (folder / file_name).write_bytes(data)
    except OSError as fault:
        hint = "name another folder and run the same command again: runs that have ended are not repeated"
        raise InputError(Fault(f"{folder}", fault.strerror or str(fault), "a folder to write to", hint)) from fault
    return [folder / file_name for file_name in reversed(content)]


def to_markdown(found: Findings, drawn: list[Picture], name: str) -> str:
    """Return the page; `name` is that of its pictures, without their part."""
    parts = [
        f"# Quality and cost: {found.results.study.name}",
        _asked(found),
        _facts(found),
        _verdicts(found),
        _headline(found, drawn, name),
        _best(found),
        _classics(found),
        _ablations(found, drawn, name),
        _protocols(found),
        _seeds(found),
        _price(found),
        _reruns(found),
        _absent(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _asked(found: Findings) -> str:
    study = found.results.study
    planned = sum(len(planned_seeds(study, row)) for row in study.rows)
    lacking = sum(map(len, found.missing.values()))
    rival, question = f"row `{found.compared.reference}`", ""
    if found.compared.is_against_window:
        rival = f"the packed sliding window ({rival})"
        question = "What do k targets a prompt cost in quality, and what do they save, against one target a prompt? "
    lines = [
        f"{question}{plural(len(study.rows), 'way')} of training ({plural(planned, 'run')}) on the same targets, "
        f"compared with {rival} asked under sliding inference."
    ]
    if lacking:
        lines.append(
            f"**In part: {planned - lacking} of {plural(planned, 'run')} have ended.** Everything below rests on "
            "these; see [what is not there yet](#what-is-not-there-yet)."
        )
    questions = [f"- {one.title}: {one.question}" for one in study.tables if one.question]
    lines.append("\n".join(["Beside the headline it asks:", "", *questions]) if questions else "")
    return "\n\n".join(line for line in lines if line)


def _verdicts(found: Findings) -> str:
    lines = []
    for one in found.promises:
        lines.append(f"- **{one.verdict.capitalize()}**: {one.what}.")
        lines.extend(f"  - {line}" for line in one.numbers)
    return "\n".join(["## What was promised, and whether it is so", "", *lines])


def _headline(found: Findings, drawn: list[Picture], name: str) -> str:
    study = found.results.study
    rows = [row for row in study.headline if row in found.costs]
    if not rows:
        return "## Headline\n\nNo row of the headline has ended yet."
    split = tables.split_of(found.results.study, found.compared, rows)
    words = (
        f"{SPLIT_WORDS[split]}; AUC is a mean over seeds, a gap is AUC less that of the reference under sliding "
        f"inference. {_speed_words(found)}"
    )
    body = tables.headline_table(found.compared, found.costs, rows, split)
    return "\n\n".join(["## Headline", words, body, _picture(drawn, name, "seconds"), _INTERVALS])


def _speed_words(found: Findings) -> str:
    if not found.compared.is_against_window:
        return f"{TIMES} reference: how many times the seconds of the row's training the reference takes."
    words = (
        f"{TIMES} packed, {TIMES} padded: how many times the seconds of the row's training a packed, and a padded, "
        "sliding window takes."
    )
    return words if found.results.padded_over_packed else f"{words} The padded one was not measured."


_INTERVALS = (
    "Intervals (95 %) are a paired bootstrap over users: both models meet the same drawn users, with all their "
    "targets. They do not hold what another seed changes; [the seeds](#seeds) stand by themselves."
)


def _best(found: Findings) -> str:
    if not found.choices:
        return "## The best configuration under each protocol\n\nNothing was validated yet."
    rivals = {protocol: choice.rivals for protocol, choice in found.choices.items()}
    counted = ", ".join(f"{amount} under {protocol}" for protocol, amount in rivals.items())
    words = (
        "By validation AUC alone, among the configurations (row and context at inference) with the most seeds: "
        f"{counted} inference. The choice flatters that AUC; only the test split says how good it is. s / M: seconds "
        "per million targets."
    )
    return "\n\n".join(
        ["## The best configuration under each protocol", words, tables.choices_table(found.choices, found.costs)]
    )


def _classics(found: Findings) -> str:
    if not found.results.classics:
        return ""
    default = found.results.study.default
    words = "Baselines without a language model, on the same targets, fitted and chosen without the test split. "
    words += (
        f"The last columns are AUC of the default row (`{default}`) less AUC of the baseline, paired, with the context "
        "that validates best."
        if default
        else "No row is named as the default (`study.default`), so none is held against them."
    )
    parts = ["## An honest place: classical baselines", words]
    for split in reversed(SPLITS):
        if any(one.split == split for one in found.compared.classics):
            parts += [f"### {SPLIT_WORDS[split]}", tables.classics_table(found.results, found.compared, split)]
    chosen = [f"- {one.name}: {one.chosen}" for one in found.results.classics if one.chosen]
    return "\n\n".join([*parts, *(["Chosen on validation:\n\n" + "\n".join(chosen)] if chosen else [])])


def _ablations(found: Findings, drawn: list[Picture], name: str) -> str:
    parts = []
    for one in found.results.study.tables:
        rows = [row for row in one.rows if row in found.costs]
        parts.append(f"## {one.title}")
        if not rows:
            parts.append("No row of this table has ended yet.")
            continue
        split = tables.split_of(found.results.study, found.compared, one.rows)
        parts.append(f"{one.question} {SPLIT_WORDS[split]}.".strip())
        parts.append(tables.ablation_table(found.compared, found.costs, rows, split))
        notes = [f"- `{row}`: {note}" for row in rows if (note := found.results.study.rows[row].note)]
        parts += ["\n".join(notes)] if notes else []
    shown = [_picture(drawn, name, part) for part in ("gaps", "contexts")]
    if any(shown):
        parts += ["## In pictures", *(one for one in shown if one)]
    return "\n\n".join(parts)


def _protocols(found: Findings) -> str:
    rows = list(dict.fromkeys(asked.row for asked in found.compared.streaming))
    if not rows:
        return ""
    split = tables.split_of(found.results.study, found.compared, rows)
    words = (
        "The same models asked in stand-alone prompts (sliding) and in training's own prompts (streaming). "
        f"{SPLIT_WORDS[split]}; s / M: seconds of inference per million targets."
    )
    return "\n\n".join(["## The two protocols", words, tables.protocols_table(found.compared, rows, split)])


def _seeds(found: Findings) -> str:
    if not found.costs:
        return ""
    parts = ["## Seeds", f"Each row with its main context; sd: standard deviation over seeds, {DASH} with one seed."]
    for split in reversed(SPLITS):
        rows = [row for row in found.costs if found.compared.main(row, split)]
        if rows:
            parts += [f"### {SPLIT_WORDS[split]}, seed by seed", tables.seeds_table(found.compared, rows, split)]
    return "\n\n".join(parts)


def _price(found: Findings) -> str:
    if not found.costs:
        return ""
    words = (
        "Means over seeds; seconds are those of training steps at the pace of a run's median line of metrics (a "
        "sliding tail at its own), packing included, validations and states left out. Clock: the same with whatever "
        "else held the machine up. "
        "Best at: share of the training after which the state that answers was reached. "
        "s / M: seconds per million targets."
    )
    return "\n\n".join(["## What training costs", words, tables.costs_table(found.compared, found.costs)])


def _reruns(found: Findings) -> str:
    if not found.costs:
        return ""
    words = (
        "trains one row again, with the arguments of a line below. Its AUC should lie within the interval, with that "
        "seed or another: mean "
        "± t · sd · √(1 + 1 / seeds), where sd is the standard deviation over seeds pooled over all rows of the split, "
        "and t Student's with its degrees of freedom. The same seed on the same machine should come much nearer."
    )
    command = f"```bash\n{found.results.command} --row ROW --seed SEED\n```"
    return "\n\n".join(["## Run a row again", command, words, tables.reruns_table(found.results, found.compared)])


def _absent(found: Findings) -> str:
    study = found.results.study
    lines = [
        f"- `{row}`: seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"
        for row, seeds in found.missing.items()
    ]
    if study.classical and not found.results.classics:
        lines.append("- the classical baselines")
    if not lines:
        return ""
    rerun = f"`{found.results.command}` goes on with these:"
    return "\n\n".join(["## What is not there yet", rerun, "\n".join(lines)])


def _facts(found: Findings) -> str:
    facts = {**found.results.facts, "command": f"`{found.results.command}`"}
    return "\n\n".join(["## Facts", table(["", ""], [[name, value] for name, value in facts.items()], texts=2)])


def _picture(drawn: list[Picture], name: str, part: str) -> str:
    found = next((one for one in drawn if one.name == part), None)
    return "" if found is None else f"![{found.title}]({name}_{found.name}.png)\n\n**{found.title}** {found.words}"
