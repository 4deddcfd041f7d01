"""The attention mask of one row as a picture: who may see whom.

Stage: report. In: `MaskPicture`, made by whoever can pack a row. Out: a `Plot`.
Invariant: a cell is coloured if and only if the mask says that its row sees its column.

With kinds  context feedback target sum feedback  (one context interaction, one target), the fine lines stand
before token 2, where the target's interaction begins, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dti_ray.report.theme import LIGHT, MASK, Plot, draw_svg

KINDS: Final = {
    "prefix": "prefix",
    "context": "text of a context interaction",
    "target": "text of a target",
    "sum": "[SUM], where a target is read out",
    "feedback": "feedback: the answer, click or not",
}
LABELLED_TOKENS = 48  # up to here each token's text stands on the axes
SHOWN_TOKENS = 512  # a longer row is cut here: finer cells than this no screen shows
LINED_INTERACTIONS = 64  # with more of them, lines would hide the cells
WIDTH_UNITS = 640
IMAGE_PIXELS = 1536
LABEL_CHARACTERS = 12


@dataclass(frozen=True, eq=False)
class MaskPicture:
    """What is drawn of one row.

    Attributes:
        visible: whether a query (row) sees a key (column).
        kind: per token one of `KINDS`; the feedback of context interactions is "feedback", too.
        label: per token a short text, as the axes show it.
        title: what row this is, in words.

    Raises:
        ValueError: the parts differ in length, or a kind is unknown.
    """

    visible: Bool[np.ndarray, "tokens tokens"]
    kind: Sequence[str]
    label: Sequence[str]
    title: str

    def __post_init__(self) -> None:
        tokens = len(self.kind)
        if not tokens or self.visible.shape != (tokens, tokens) or len(self.label) != tokens:
            sizes = f"{self.visible.shape}, with {tokens} kinds and {len(self.label)} labels"
            raise ValueError(f"mask picture: visible is {sizes}, expected T x T, T and T")
        if unknown := set(self.kind) - set(KINDS):
            raise ValueError(f"mask picture: unknown kinds {sorted(unknown)}, expected {sorted(KINDS)}")


def draw_mask(picture: MaskPicture) -> Plot:
    """Draw the mask: cells coloured by the kind of token that is seen, blank where nothing is."""
    total = len(picture.kind)
    tokens = min(total, SHOWN_TOKENS)
    shown = MaskPicture(picture.visible[:tokens, :tokens], picture.kind[:tokens], picture.label[:tokens], picture.title)
    cut = f" The first {tokens:,} of the row's {total:,} tokens are shown." if tokens < total else ""
    caption = (
        "Rows ask, columns answer: a coloured cell means that the row's token sees the column's token. "
        "A [SUM] row sees its context and its own text; apart from itself on the diagonal, "
        "nobody sees a [SUM] column." + _line_words(shown) + cut
    )
    legend = tuple((kind, meaning) for kind, meaning in KINDS.items() if kind in shown.kind)
    svg = draw_svg("mask", WIDTH_UNITS, WIDTH_UNITS, lambda figure: _draw(figure, shown))
    return Plot(picture.title, caption, svg, (*legend, ("soft", "blank: not seen")))


def interaction_starts(picture: MaskPicture) -> list[int]:
    """Return the tokens (from 1) at which another interaction, or another prompt, begins."""
    prompts = set(prompt_starts(picture))
    return [
        token
        for token in range(1, len(picture.kind))
        if token in prompts or _begins(picture.kind[token - 1], picture.kind[token])
    ]


def prompt_starts(picture: MaskPicture) -> list[int]:
    """Return the tokens (from 1) from which on nothing before them is seen any more."""
    diagonal = np.arange(len(picture.kind))
    earliest = np.where(picture.visible.any(axis=1), picture.visible.argmax(axis=1), diagonal)
    reach: Int[np.ndarray, " tokens"] = np.minimum.accumulate(earliest[::-1])[::-1]
    return [int(token) for token in np.flatnonzero(reach >= diagonal) if token > 0]


def _begins(before: str, now: str) -> bool:
    """Say whether an interaction begins between two neighbours; its feedback, if any, ends it."""
    if before == "sum":
        return now != "feedback"
    prefix_ends = before == "prefix" and now != "prefix"
    return before == "feedback" or prefix_ends or (before, now) == ("context", "target")


def _draw(figure: Figure, picture: MaskPicture) -> None:
    tokens = len(picture.kind)
    axes = figure.subplots()
    axes.grid(visible=False)
    ground = Rectangle((-0.5, -0.5), tokens, tokens, facecolor=LIGHT["soft"], edgecolor="none", zorder=-1)
    axes.add_patch(ground)
    colours = np.array([[255 * part for part in to_rgb(MASK[kind])] for kind in picture.kind])
    cells = np.zeros((tokens, tokens, 4), np.uint8)
    cells[..., :3] = colours[None, :, :]
    cells[..., 3] = 255 * picture.visible
    box = (-0.5, tokens - 0.5, tokens - 0.5, -0.5)
    axes.imshow(_enlarge(cells), extent=box, interpolation="none")
    _draw_lines(axes, picture)
    _draw_strips(axes, colours.astype(np.uint8))
    _draw_ticks(axes, picture)


def _is_crowded(picture: MaskPicture) -> bool:
    """Say whether lines between interactions would hide the cells."""
    return len(interaction_starts(picture)) > LINED_INTERACTIONS


def _line_words(picture: MaskPicture) -> str:
    fine = "" if _is_crowded(picture) else " Fine lines part interactions."
    return fine + (" Firm lines part prompts." if prompt_starts(picture) else "")


def _enlarge(cells: UInt8[np.ndarray, "rows columns 4"]) -> UInt8[np.ndarray, "height width 4"]:
    """Give each cell many pixels, so that a browser may scale smoothly, and few cells a gap between them."""
    side = max(1, IMAGE_PIXELS // max(cells.shape[:2]))
    image = cells.repeat(side, axis=0).repeat(side, axis=1)
    gap = side // 14 if max(cells.shape[:2]) <= 2 * LABELLED_TOKENS else 0
    for pixel in range(gap):
        image[pixel::side, :, 3] = 0
        image[:, pixel::side, 3] = 0
    return image


def _draw_lines(axes: Axes, picture: MaskPicture) -> None:
    """Draw fine lines between interactions and firm ones between prompts."""
    prompts = prompt_starts(picture)
    for start in prompts if _is_crowded(picture) else interaction_starts(picture):
        width, alpha = (1.6, 1.0) if start in prompts else (0.9, 0.45)
        for line in (axes.axvline, axes.axhline):
            line(start - 0.5, color=LIGHT["ink"], linewidth=width, alpha=alpha, zorder=3)


def _draw_strips(axes: Axes, colours: UInt8[np.ndarray, "tokens 3"]) -> None:
    """Draw, beside the matrix, the kind of each row, and above it that of each column."""
    tokens = len(colours)
    strip = np.full((1, tokens, 4), 255, np.uint8)
    strip[..., :3] = colours
    near, far = -0.5 - tokens / 90, -0.5 - tokens / 36
    pixels = _enlarge(strip)
    axes.imshow(pixels, extent=(-0.5, tokens - 0.5, near, far), interpolation="none")
    axes.imshow(pixels.transpose(1, 0, 2), extent=(far, near, tokens - 0.5, -0.5), interpolation="none")
    axes.set_xlim(far, tokens - 0.5)
    axes.set_ylim(tokens - 0.5, far)


def _draw_ticks(axes: Axes, picture: MaskPicture) -> None:
    tokens = len(picture.kind)
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0, pad=4)
    if tokens <= LABELLED_TOKENS:
        texts = [_short(text) for text in picture.label]
        size = min(11.0, 0.62 * WIDTH_UNITS / (tokens + 8))
        axes.set_xticks(range(tokens), texts, rotation=90, fontsize=size)
        axes.set_yticks(range(tokens), texts, fontsize=size)
        axes.set(xlabel="token that answers (key)", ylabel="token that asks (query)")
        return
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}" if 0 <= value < tokens else ""))
    axes.set(xlabel="position of the token that answers (key)", ylabel="position of the token that asks (query)")


def _short(text: str) -> str:
    printable = "".join(letter if letter.isprintable() else "·" for letter in text)
    return printable if len(printable) <= LABEL_CHARACTERS else printable[: LABEL_CHARACTERS - 1] + "…"
