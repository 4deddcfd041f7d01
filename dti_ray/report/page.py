"""The report's page: sections in order, each with its words, its pictures, or what is missing.

Stage: report, last step. In: a storage root, a run's name, a mask. Out: `runs/<run>/report/index.html`.
Invariant: the file is complete in itself (no script, no font, no picture from outside) and every text that
comes from an artefact is escaped.
"""

from __future__ import annotations

import shlex
from html import escape

from dti_ray.report.artefacts import Artefacts, Meta, read_artefacts
from dti_ray.report.layout import header, legend, page, plots, section
from dti_ray.report.log import LogView, log_facts, plot_click_rate, plot_lengths, read_log
from dti_ray.report.mask import MaskPicture, draw_mask
from dti_ray.report.plots import (
    plot_calibration,
    plot_loss,
    plot_scores,
    plot_speed,
    plot_validation,
    plot_waste,
)
from dti_ray.report.tables import metrics_table, pairs, protocols_table, tiles
from dti_ray.storage import Storage


def write_report(storage: Storage, run: str, mask: MaskPicture | None) -> str:
    """Write the page of a run.

    Args:
        storage: where the run lies.
        run: its name below `runs/`.
        mask: the attention mask of one of its rows; None leaves the picture out and says so.

    Returns:
        The page's path, as a user would type it.

    Raises:
        InputError: there is no such run, or an artefact cannot be understood.
    """
    artefacts = read_artefacts(storage, run)
    content = build_page(artefacts, read_log(storage, artefacts.config), mask, storage.root)
    path = f"runs/{run}/report/index.html"
    storage.write(path, content.encode())
    return storage.display(path)


def build_page(artefacts: Artefacts, log: LogView, mask: MaskPicture | None, root: str) -> str:
    """Return the page as text; `root` is only named, in the commands that make what is missing."""
    sections = (
        _header(artefacts),
        _headline(artefacts, root),
        _baselines(artefacts, root),
        _learning(artefacts, root),
        _probabilities(artefacts, root),
        _speed(artefacts, root),
        _log(log, root),
        _mask(mask),
        _configuration(artefacts),
        _versions(artefacts.meta),
    )
    footer = "Every number on this page is read from the artefacts of the run, or computed from them."
    return page(f"{artefacts.run} · dti_ray report", sections, footer)


def _header(artefacts: Artefacts) -> str:
    meta = artefacts.meta
    facts = "no meta.json: when and where it ran is not known"
    if meta is not None:
        commit = f"commit {meta.git_commit[:10]}" if meta.git_commit else "no commit recorded"
        machine = ", ".join(meta.gpus) or f"{meta.cpus} CPUs, {meta.cpu}"
        started = meta.started_at[:16].replace("T", " ")
        facts = " · ".join((f"started {started}", machine, commit, f"configuration {meta.config_hash[:10]}"))
    return header("Report of one run", artefacts.run, facts)


def _headline(artefacts: Artefacts, root: str) -> str:
    evaluation = artefacts.evaluations[0] if artefacts.evaluations else None
    notice = "" if evaluation else _missing("No evaluation yet.", "evaluate", "scores the run", artefacts.run, root)
    return f'<section id="headline">{tiles(evaluation, artefacts.train)}{notice}</section>'


def _baselines(artefacts: Artefacts, root: str) -> str:
    lead = "What the model adds to predictors that need no model; mind how far the intervals overlap."
    if not artefacts.evaluations:
        what = "writes metrics/evaluation_test.json, from which this table is made"
        body = _missing("No metrics yet.", "evaluate", what, artefacts.run, root)
    else:
        body = "".join(
            (f"<h3>{escape(part.split.capitalize())} split</h3>" if len(artefacts.evaluations) > 1 else "")
            + metrics_table(part)
            + protocols_table(part)
            for part in artefacts.evaluations
        )
    return section("metrics", "Model and baselines", lead, body)


def _learning(artefacts: Artefacts, root: str) -> str:
    train, valid = artefacts.train, artefacts.valid
    shown, notices = [], ""
    if train is not None:
        shown.append(plot_loss(train, valid))
    else:
        what = "writes metrics/train.jsonl"
        notices += _missing("No training log yet.", "train", what, artefacts.run, root)
    if valid is not None:
        shown.append(plot_validation(valid))
    else:
        what = "validates every eval.every_targets targets and writes metrics/valid.jsonl"
        notices += _missing("Not validated yet.", "train", what, artefacts.run, root)
    lead = "How the model came to its result, counted in targets, so that runs with different k can be compared."
    return section("learning", "Learning", lead, plots(shown, notices))


def _probabilities(artefacts: Artefacts, root: str) -> str:
    predictions = artefacts.predictions
    if predictions is None:
        what = "writes metrics/predictions_test.parquet, from which both pictures are made"
        body = _missing("No predictions yet.", "evaluate", what, artefacts.run, root)
        lead = "Whether a predicted probability can be taken at its word, and how clicks stand out."
    else:
        body = plots([plot_calibration(predictions), plot_scores(predictions)])
        lead = (
            "Whether a predicted probability can be taken at its word, and how clicks stand out: "
            f"{len(predictions.label):,} predictions of the {predictions.split} split."
        )
    return section("probabilities", "Probabilities", lead, body)


def _speed(artefacts: Artefacts, root: str) -> str:
    lead = "What a training second brings, and what is lost on the way."
    if artefacts.train is None:
        what = "writes metrics/train.jsonl"
        body = _missing("No training log yet.", "train", what, artefacts.run, root)
    else:
        body = plots([plot_speed(artefacts.train), plot_waste(artefacts.train)])
    return section("speed", "Speed", lead, body)


def _log(log: LogView, root: str) -> str:
    lead = "What there was to learn from: prepared interactions, and whether a split could have leaked."
    if log.stats is None:
        name = [] if log.name is None else [f"data.name={log.name}"]
        words = shlex.join(["dti-ray", "data", "stats", *name, f"storage.root={root}"])
        body = f'<p class="missing">{escape(log.reason)} <code>{escape(words)}</code> tells of it.</p>'
    else:
        facts = f'<div class="card">{pairs(log_facts(log.stats))}</div>'
        body = plots([plot_click_rate(log.stats), plot_lengths(log.stats)]) + facts
    return section("log", "The log", lead, body)


def _mask(mask: MaskPicture | None) -> str:
    lead = "The attention mask is the method: many targets share one prompt, and none sees what lies after it."
    if mask is None:
        body = '<p class="missing">No row was at hand when this page was made, so no mask is drawn. ' \
            "<code>dti-ray report</code> draws one where it finds the prepared data set.</p>"  # fmt: skip
        return section("mask", "Who may see whom", lead, body)
    plot = draw_mask(mask)
    body = (
        f'<figure class="card"><h3>{escape(plot.title)}</h3>'
        f'<div class="mask"><div class="scroll">{plot.svg}</div>'
        f"<figcaption><p>{escape(plot.caption)}</p>{legend(plot)}</figcaption></div></figure>"
    )
    return section("mask", "Who may see whom", lead, body)


def _configuration(artefacts: Artefacts) -> str:
    if artefacts.config is None:
        body = '<p class="missing">This run has no config.yaml; <code>dti-ray train</code> writes it.</p>'
    else:
        body = f"<details><summary>config.yaml</summary><pre>{escape(artefacts.config)}</pre></details>"
    lead = "The effective configuration: defaults, files and overrides taken together."
    return section("configuration", "Configuration", lead, body)


def _versions(meta: Meta | None) -> str:
    lead = "Where the numbers were made."
    if meta is None:
        body = '<p class="missing">This run has no meta.json; <code>dti-ray train</code> writes it.</p>'
        return section("versions", "Machine and versions", lead, body)
    machine = {
        "started": meta.started_at,
        "processor": meta.cpu,
        "CPUs": str(meta.cpus),
        "GPUs": ", ".join(meta.gpus) or "none",
        "git commit": meta.git_commit or "none recorded",
        "configuration hash": meta.config_hash,
    }
    body = f'<div class="card">{pairs(machine)}{pairs(meta.versions)}</div>'
    return section("versions", "Machine and versions", lead, body)


def _missing(what: str, command: str, does: str, run: str, root: str) -> str:
    words = shlex.join(["dti-ray", command, f"train.run={run}", f"storage.root={root}"])
    return f'<p class="missing">{escape(what)} <code>{escape(words)}</code> {escape(does)}.</p>'
