"""How the report looks: colours, style sheet, and the way from a matplotlib figure to inline SVG, or to a PNG.

Stage: report, below its plots. In: a function that draws on a `Figure`. Out: an `<svg>` element as text; a PNG's bytes.
Invariant: the SVG names no colour and no font of its own: colours are variables of the style sheet (so that
light, dark and print each have theirs), text is text in the page's font, and nothing is loaded from outside.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import matplotlib
from matplotlib.figure import Figure

# Okabe-Ito, told apart by colour-blind readers; each name is also a variable of the style sheet.
LIGHT: Final[Mapping[str, str]] = {
    "page": "#f4f5f7",
    "card": "#ffffff",
    "soft": "#f0f2f5",
    "line": "#dde1e7",
    "muted": "#5d6875",
    "ink": "#1a222c",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "grey": "#8b95a1",
}
DARK: Final[Mapping[str, str]] = {
    **LIGHT,
    "page": "#11151a",
    "card": "#1a2027",
    "soft": "#222a33",
    "line": "#323c48",
    "muted": "#9ba7b4",
    "ink": "#e8ecf1",
    "blue": "#4aa8e0",
    "orange": "#f08a3c",
    "green": "#22b98c",
}
# The mask is a raster image, so its colours are the same in light and dark.
MASK: Final[Mapping[str, str]] = {
    "prefix": "#8b95a1",
    "context": "#56b4e9",
    "target": "#e69f00",
    "sum": "#d55e00",
    "feedback": "#009e73",
}
UNITS_PER_INCH = 72  # of matplotlib's SVG
FONT_UNITS = 11.5
PIXELS_PER_UNIT = 2  # of a PNG

_SETTINGS: Final[Mapping[str, object]] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": FONT_UNITS,
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["line"],
    "axes.facecolor": "none",
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": FONT_UNITS,
    "axes.labelpad": 7.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.ymargin": 0.08,
    "axes.xmargin": 0.02,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["line"],
    "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "ytick.major.size": 0,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
}


@dataclass(frozen=True)
class Plot:
    """One picture with its words.

    Attributes:
        legend: pairs of (colour name of the style sheet, meaning).
    """

    title: str
    caption: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()


def draw_svg(name: str, width_units: float, height_units: float, draw: Callable[[Figure], None]) -> str:
    """Let `draw` fill a figure and return it as an `<svg>` that can stand within a page.

    Args:
        name: salt of the identifiers, so that no two pictures of a page share one.
        width_units: width before the page scales it, in which text has `FONT_UNITS`.
        height_units: height in the same unit.
        draw: fills the figure; it finds the theme's settings in force.
    """
    content = io.StringIO()
    settings = {**_SETTINGS, "svg.hashsalt": name}
    with matplotlib.rc_context(settings), warnings.catch_warnings():  # pyright: ignore[reportArgumentType]
        # The browser draws the text, with its own fonts; matplotlib only measures it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        size = (width_units / UNITS_PER_INCH, height_units / UNITS_PER_INCH)
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(content, format="svg", metadata=nothing, transparent=True)
    return _inline(content.getvalue())


def draw_png(width_units: float, height_units: float, draw: Callable[[Figure], None]) -> bytes:
    """Let `draw` fill a figure and return it as a picture for a file that knows no style sheet, in the light colours.

    Args:
        width_units: width in which text has `FONT_UNITS`.
        height_units: height in the same unit.
        draw: fills the figure; it finds the theme's settings in force.
    """
    content = io.BytesIO()
    settings = {**_SETTINGS, "figure.facecolor": LIGHT["card"]}
    with matplotlib.rc_context(settings):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(width_units / UNITS_PER_INCH, height_units / UNITS_PER_INCH), layout="constrained")
        draw(figure)
        figure.savefig(content, format="png", dpi=PIXELS_PER_UNIT * UNITS_PER_INCH, metadata={"Software": None})
    return content.getvalue()


def _inline(svg: str) -> str:
    """Strip what a page supplies itself, and turn colours into variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = svg.replace("<g id=", "<g data-part=").replace("xlink:href=", "href=")
    svg = re.sub(r' data-part="[^"]*"', "", svg)
    svg = re.sub(r'(<image[^>]*?) id="[^"]*"', r"\1", svg, flags=re.DOTALL)
    return re.sub(r'style="[^"]*"', lambda style: _style(style.group()), svg)


def _style(style: str) -> str:
    style = re.sub(r" ?font-family: [^;\"]*;?", "", style)
    style = re.sub(r"image-rendering:[^\"]*", "", style)
    for name, colour in LIGHT.items():
        style = style.replace(colour, f"var(--{name})")
    return style


def style_sheet() -> str:
    """Return the page's style sheet."""
    return (
        f":root{{color-scheme:light dark;{_variables(LIGHT)};{_variables(MASK)}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}\n{_RULES}"
    )


def _variables(colours: Mapping[str, str]) -> str:
    return ";".join(f"--{name}:{colour}" for name, colour in colours.items())


_RULES: Final = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",
 Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1100px;margin:0 auto;padding:44px 24px 64px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.015em;margin:2px 0 8px;overflow-wrap:anywhere}
h2{font-size:20px;line-height:1.3;letter-spacing:-.01em;margin:48px 0 4px}
h3{font-size:16px;line-height:1.35;margin:0 0 2px}.card+h3{margin-top:18px}
p{margin:0 0 12px;max-width:74ch}
.kicker{font-size:13px;font-weight:600;color:var(--blue);margin:0}
.facts,.lead,figcaption,.note,footer{color:var(--muted)}
.facts{font-size:14px;max-width:none}
.lead{margin-bottom:16px;max-width:none;text-wrap:pretty}
.tile.wide span:last-child{color:var(--ink)}
code,pre{font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
code{background:var(--soft);border-radius:5px;padding:2px 6px;overflow-wrap:anywhere;color:var(--ink)}
.card,.tile,details{background:var(--card);border:1px solid var(--line);border-radius:12px}
.card{padding:20px 22px;margin:0}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:14px;margin:26px 0 0}
.tile{padding:15px 18px 14px}
.tile.wide{grid-column:span 2}
.tile b{display:block;font-size:26px;line-height:1.25;font-weight:620;letter-spacing:-.02em}
.tile.wide b{font-size:40px;line-height:1.15;color:var(--blue)}
.tile span{display:block;font-size:13px;line-height:1.4;color:var(--muted)}
.tile .label{font-weight:600;color:var(--ink)}
.tile b.absent{color:var(--muted);font-weight:400}
.missing{border:1px dashed var(--grey);border-radius:12px;padding:16px 20px;margin:14px 0 0;max-width:none;
 font-size:15px}
.plots{display:grid;grid-template-columns:1fr 1fr;gap:18px}
.plots+.card{margin-top:18px}
.plots .missing{margin:0;align-self:start}
figure{margin:0;display:flex;flex-direction:column;break-inside:avoid}
figcaption{font-size:13.5px;line-height:1.5;padding-top:10px;text-wrap:pretty}
figure svg{display:block;width:100%;height:auto;margin-top:8px;overflow:visible}
svg *{stroke-linejoin:round}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:4px 0 0;padding:0;font-size:13px;
 color:var(--muted)}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:7px;vertical-align:-1px;
 box-shadow:inset 0 0 0 1px var(--line)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:right;padding:10px 0 10px 18px;border-bottom:1px solid var(--line);vertical-align:top;
 white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
th:first-child{position:sticky;left:0;background:var(--card)}
tbody tr:last-child>*{border-bottom:0}
thead th{font-size:13px;font-weight:600;color:var(--muted);padding-top:0;vertical-align:bottom}
tbody th{font-weight:400;white-space:normal;min-width:9em}
tr.model th{font-weight:650;color:var(--blue)}
td small{display:block;font-size:12px;color:var(--muted);font-weight:400}
td.best{font-weight:700}
td svg{display:block;width:150px;height:21px}
.note{font-size:13.5px;margin:14px 0 0;max-width:none}
.mask{display:grid;grid-template-columns:minmax(0,1fr) 250px;gap:8px 30px;align-items:start}
.mask svg{min-width:600px;margin:0}
.mask .legend{flex-direction:column;font-size:13.5px}
.mask figcaption{margin:0;padding:0}
.mask p{margin:0 0 10px}
details{padding:0 20px}
summary{cursor:pointer;padding:14px 0;font-weight:600}
pre{margin:0 0 18px;overflow-x:auto;white-space:pre}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:0 36px;margin:0}
.pairs div{display:flex;justify-content:space-between;gap:16px;padding:7px 0;font-size:14px;
 border-bottom:1px solid var(--line)}
.pairs dt{color:var(--muted)}
.pairs dd{margin:0;text-align:right;overflow-wrap:anywhere}
.pairs+.pairs{margin-top:22px}
footer{font-size:13px;margin-top:44px}
@media screen and (max-width:820px){
 .plots,.mask{grid-template-columns:minmax(0,1fr)}
 .tiles{grid-template-columns:1fr 1fr}
}
@media screen and (max-width:520px){
 main{padding:26px 14px 40px}
 h1{font-size:25px}
 h2{margin-top:38px}
 .card{padding:16px 15px}
 .tile{padding:12px 14px}
 .tile b{font-size:22px}
 .tile.wide b{font-size:34px}
 .tiles,.plots{gap:10px}
 tbody th{min-width:7.5em}
}
@page{margin:13mm}
@media print{
 body{background:none}
 main{max-width:none;padding:0;zoom:.68}
 h2{margin-top:34px}
 .card,.tile,.missing{break-inside:avoid}
 details::details-content{content-visibility:visible;height:auto}
 pre{white-space:pre-wrap}
 h2,h3,.lead{break-after:avoid}
}
"""
