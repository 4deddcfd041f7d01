"""The first prompts of a run as a picture of who sees whom.

Stage: report. In: a run's configuration, its users and its catalogue. Out: a `MaskPicture` of real tokens.
Invariant: the picture is drawn from the same rows and the same rules that training uses; only the order
differs: each [SUM] is shown behind its target, where a reader of the prompt expects it. A mixture is shown by its k.
"""

from __future__ import annotations

import numpy as np

from dti_ray.config import RunConfig
from dti_ray.data.interactions import TRAIN, UserSequences
from dti_ray.data.packing import PackedRow, pack, pack_spec
from dti_ray.data.prompts import NO, TokenTable
from dti_ray.model.batch import collate
from dti_ray.model.masks import Rules, dense_mask
from dti_ray.report.mask import MaskPicture

TOKENS_AT_MOST = 240
FEEDBACK = {0: "no", 1: "yes"}


def example_mask(config: RunConfig, sequences: UserSequences, table: TokenTable, words: list[str]) -> MaskPicture:
    """Draw the first prompts of the first row, as many as are legible.

    Args:
        config: of the run.
        sequences: users; the first of them are drawn.
        table: item texts as tokens.
        words: text of each token id of the vocabulary.
    """
    spec = pack_spec(config.packing, config.prompt.context, TRAIN)
    row = next(iter(pack(sequences, table, spec)))
    row = _first_prompts(row)
    batch = collate([row], table)
    visible = dense_mask(batch, Rules.of(config.packing))[0].numpy()
    order = _reading_order(row)
    kinds, labels = _tokens(row, table, words)
    prompts = int(row.prompt[-1])
    return MaskPicture(
        visible=visible[np.ix_(order, order)],
        kind=[kinds[i] for i in order],
        label=[labels[i] for i in order],
        title=f"{prompts} prompt{'s' if prompts > 1 else ''} with {row.targets} targets of this run",
    )


def _first_prompts(row: PackedRow) -> PackedRow:
    """Keep whole prompts up to TOKENS_AT_MOST tokens, and the first one in any case."""
    ends = np.flatnonzero(np.diff(row.prompt, append=row.prompt[-1] + 1)) + 1
    sizes = row.prefix_tokens + ends + np.searchsorted(row.after, ends)
    kept = max(1, int((sizes <= TOKENS_AT_MOST).sum()))
    size, sums = int(ends[kept - 1]), int(np.searchsorted(row.after, ends[kept - 1]))
    return PackedRow(
        row.tokens[:size], row.positions[:size], row.prompt[:size], row.interaction[:size], row.cut[:size],
        row.after[:sums], row.labels[:sums], row.users[:sums], row.prefix_tokens,
    )  # fmt: skip


def _reading_order(row: PackedRow) -> np.ndarray:
    """Return the indices of [prefix | content | SUM] in the order in which the prompt is read."""
    places = np.concatenate([np.arange(len(row.tokens)), row.after + 0.5])
    return np.concatenate([np.arange(row.prefix_tokens), row.prefix_tokens + np.argsort(places, kind="stable")])


def _tokens(row: PackedRow, table: TokenTable, words: list[str]) -> tuple[list[str], list[str]]:
    """Return kind and text of each token of [prefix | content | SUM]."""
    targets = {(int(row.prompt[i]), int(row.interaction[i])) for i in row.after}
    kinds, labels = ["prefix"] * row.prefix_tokens, [words[i] for i in table.prefix]
    for token, prompt, interaction in zip(row.tokens, row.prompt, row.interaction, strict=True):
        if token >= table.vocabulary:
            kinds.append("feedback")
            labels.append(FEEDBACK[int(token) - table.vocabulary - NO])
        else:
            kinds.append("target" if (int(prompt), int(interaction)) in targets else "context")
            labels.append(words[token])
    return kinds + ["sum"] * row.targets, labels + ["[SUM]"] * row.targets
