"""The parts of which a page is built: its frame, sections, figures, tiles.

Stage: report, below its pages. In: words and `Plot`s. Out: HTML fragments; a whole page.
Invariant: text that is not named as HTML is escaped, so no caller has to.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dti_ray.report.theme import Plot, style_sheet

DASH = "\N{EN DASH}"


def page(title: str, sections: Sequence[str], footer: str, rules: str = "") -> str:
    """Return a complete page.

    Args:
        title: of the browser's window.
        sections: HTML, in order.
        footer: where the numbers come from.
        rules: what this page needs beside the common style sheet.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style_sheet()}{rules}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + f"\n<footer>{escape(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def header(kicker: str, title: str, facts: str) -> str:
    """Return the head of a page."""
    return (
        f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>'
        f'<p class="facts">{escape(facts)}</p></header>'
    )


def section(name: str, title: str, lead: str, body: str) -> str:
    """Return a section; `body` is HTML."""
    return f'<section id="{name}"><h2>{escape(title)}</h2><p class="lead">{escape(lead)}</p>{body}</section>'


def plots(parts: Sequence[Plot], others: str = "") -> str:
    """Lay plots side by side, with other cards or notices (HTML) in the places after them."""
    return f'<div class="plots">{"".join(map(figure, parts))}{others}</div>'


def figure(plot: Plot) -> str:
    """Return a plot with its words."""
    return (
        f'<figure class="card"><h3>{escape(plot.title)}</h3>{legend(plot)}{plot.svg}'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def legend(plot: Plot) -> str:
    """Return the legend of a plot."""
    entries = (f'<li><i style="background:var(--{colour})"></i>{escape(text)}</li>' for colour, text in plot.legend)
    return f'<ul class="legend">{"".join(entries)}</ul>'


def tile(label: str, value: str | None, *notes: str, wide: bool = False) -> str:
    """Return one headline number, a dash for None, with notes below it."""
    shown = f"<b>{escape(value)}</b>" if value is not None else f'<b class="absent">{DASH}</b>'
    words = "".join(f"<span>{escape(note)}</span>" for note in notes)
    kind = "tile wide" if wide else "tile"
    return f'<div class="{kind}"><span class="label">{escape(label)}</span>{shown}{words}</div>'


def missing(words: str) -> str:
    """Say what is not there yet."""
    return f'<p class="missing">{escape(words)}</p>'
