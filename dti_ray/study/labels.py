"""Names beside the dots of a picture, so that no two of them lie on each other.

Stage: study, below its plots. In: dots with names, on axes whose limits are set. Out: text on these axes.
Invariant: every name is drawn, at the least crowded of a few places around its dot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from dti_ray.report.theme import FONT_UNITS, LIGHT

DOT_UNITS = 5.0  # half the width that a dot keeps free
RINGS_UNITS = (7.0, 14.0, 24.0, 36.0)
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
LABEL_UNITS = 0.86 * FONT_UNITS
HALO = withStroke(linewidth=2.5, foreground=LIGHT["card"])  # so that a name can be read above lines
OUTSIDE = 4.0  # an area beyond the axes counts so many times


@dataclass(frozen=True)
class Label:
    """A name for a dot at (x, y) of the data."""

    x: float
    y: float
    text: str
    colour: str


def place_labels(figure: Figure, axes: Axes, labels: Sequence[Label]) -> None:
    """Write names beside dots, one after the other; call it last, when the axes have their limits."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # the layout is decided here
    unit = figure.dpi / 72
    frame = axes.get_window_extent()
    centres = axes.transData.transform([(one.x, one.y) for one in labels]) if labels else []
    taken = [Bbox.from_bounds(x - DOT_UNITS * unit, y - DOT_UNITS * unit, 2 * DOT_UNITS * unit, 2 * DOT_UNITS * unit)
             for x, y in centres]  # fmt: skip
    for one, (x, y) in zip(labels, centres, strict=True):
        size = _size(axes, one.text, canvas)
        best = min(_places(x, y, size.width, size.height, unit), key=lambda box: _crowding(box, taken, frame))
        offset = ((best.x0 - x) / unit, (best.y0 - y) / unit)
        is_near = _distance(best, x, y) < 1.5 * RINGS_UNITS[0] * unit
        line = None if is_near else {"arrowstyle": "-", "color": one.colour, "linewidth": 0.6, "shrinkB": DOT_UNITS}
        axes.annotate(one.text, (one.x, one.y), offset, textcoords="offset points", color=one.colour, va="bottom",
                      fontsize=LABEL_UNITS, path_effects=[HALO], arrowprops=line)  # fmt: skip
        taken.append(best)


def _size(axes: Axes, text: str, canvas: FigureCanvasAgg) -> Bbox:
    """Return the extent of a text, which is written for that alone."""
    drawn = axes.annotate(text, (0, 0), xycoords="axes fraction", fontsize=LABEL_UNITS)
    size = drawn.get_window_extent(canvas.get_renderer())
    drawn.remove()
    return size


def _distance(box: Bbox, x: float, y: float) -> float:
    """Return how far a box lies from a dot."""
    return max(box.x0 - x, x - box.x1, box.y0 - y, y - box.y1)


def _places(x: float, y: float, width: float, height: float, unit: float) -> Iterator[Bbox]:
    """Yield boxes around a dot, the nearest first."""
    for ring in RINGS_UNITS:
        for right, up in SIDES:
            left = x + right * ring * unit - (width if right < 0 else width / 2 if right == 0 else 0)
            below = y + up * ring * unit - (height if up < 0 else height / 2 if up == 0 else 0)
            yield Bbox.from_bounds(left, below, width, height)


def _crowding(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """Return the area on which a box meets others, or leaves the axes."""
    shared = sum(_area(box, other) for other in taken)
    return shared + OUTSIDE * (box.width * box.height - _area(box, frame))


def _area(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return both.width * both.height if both is not None else 0.0
