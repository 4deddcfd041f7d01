"""Slates: one context and C candidates that never see each other, scored in one pass.

Stage: scoring. In: `History`s of contexts and of candidates. Out: log-odds of a click, one per candidate.
Invariant (law 7): each candidate's log-odds are those of a stand-alone prompt with the same context. All candidates of
a slate stand at the next interaction's place: they share its cut and its position, like interactions of one second.

    context a b, candidates x y      row   a + b - x y | S S        (no candidate has feedback)
    interaction   0 0 1 1 2 3
    cut           0 0 1 1 2 2        y may not see x, since x is not before its cut
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dti_ray.config import RunConfig
from dti_ray.data.interactions import TEST
from dti_ray.data.packing import PackedRow, lay_prompt, pack_spec
from dti_ray.data.prompts import TokenTable
from dti_ray.infer.requests import History
from dti_ray.model.attention import Past, Read, Visit
from dti_ray.model.backbone import ClickModel
from dti_ray.model.batch import collate
from dti_ray.model.masks import Rules


@dataclass(frozen=True, eq=False)
class Slate:
    """What is asked at one moment.

    Attributes:
        history: of the user, up to the moment.
        candidates: all with the moment's time.
    """

    history: History
    candidates: History


class Reader:
    """A model on its device that reads rows, and the prefix that it has read once.

    Args:
        model: in the precision that it computes in.
        config: of the run.
        table: gives prefix, markers and phrases.
        device: of the model.
    """

    def __init__(self, model: ClickModel, config: RunConfig, table: TokenTable, device: torch.device) -> None:
        self.model, self.config, self.table, self.device = model.to(device).eval(), config, table, device
        self.spec = pack_spec(config.packing, config.prompt.context, TEST, n=config.eval_n)
        nothing = np.zeros(0, dtype=np.int32)
        row = PackedRow(*[nothing] * 8, prefix_tokens=len(table.prefix))
        with torch.inference_mode(), self._autocast():
            self.nothing = model.read_prefix(collate([row], table).to(device))

    @property
    def n(self) -> int:
        """Context interactions of a prompt."""
        return self.spec.n

    @property
    def k(self) -> int:
        """Targets of a prompt; `all` are as many as a pass holds however long their texts are."""
        longest = self.config.prompt.max_item_tokens + int(self.table.gap_lengths.max()) + 1
        return self.spec.k or max(self.pass_tokens // longest - self.n, 1)

    @property
    def rules(self) -> Rules:
        """Who may see whom."""
        return self.model.rules

    @property
    def layers(self) -> int:
        """Layers of the decoder."""
        return self.model.decoder.config.num_hidden_layers

    @property
    def forgets(self) -> bool:
        """Whether states see nothing but their own interaction, so that the others may be dropped one by one."""
        reset = self.config.reset
        return self.layers == 1 or (reset.mode == "constant" and reset.alpha == 1.0)

    @property
    def pass_tokens(self) -> int:
        """Tokens of one pass at most, where a text is no longer than that."""
        return self.config.eval.row_tokens

    def cut(self, history: History, index: int, time: int | None = None) -> int:
        """Return the first interaction that one may not see.

        Args:
            history: of the user.
            index: of the one that asks; the history's length stands for the next one.
            time: of the next one (s); None: later than the history.
        """
        if not self.spec.strictly_earlier:
            return index
        moment = history.times[index] if index < len(history) else time
        return index if moment is None else int(np.searchsorted(history.times, moment))

    def tokens_of(self, candidates: History) -> np.ndarray:
        """Return how many tokens each candidate adds to a row at most: time gap, text and [SUM]."""
        return candidates.lengths + int(self.table.gap_lengths.max()) + 1

    def lay(self, history: History, start: int, first: int, shown: int) -> PackedRow:
        """Lay interactions as a row; see `lay_prompt`."""
        offsets = np.concatenate([[0], np.cumsum(history.lengths)])
        table = replace(self.table, tokens=history.tokens, offsets=offsets)
        return lay_prompt(history.sequences(), table, self.spec, start, first, shown)

    def score(self, rows: Sequence[PackedRow], shared: Sequence[int], past: Past) -> list[np.ndarray]:
        """Score the rows of one pass.

        Args:
            rows: whole ones; a past with content allows a single one.
            shared: content tokens of each row that are context.
            past: of their first tokens.

        Returns:
            Log-odds, float64, of each row's targets.
        """
        return self._visit(rows, Visit(past, shared))[0]

    def read(self, row: PackedRow, past: Past) -> tuple[np.ndarray, Past]:
        """Read a row without candidates.

        Args:
            row: a whole one.
            past: of its first tokens.

        Returns:
            (log-odds, float64, of its targets; the past of all its tokens).
        """
        size = len(row.tokens)
        (log_odds,), read = self._visit([row], Visit(past, [size], is_kept=True))
        return log_odds, past.after(read, size)

    def _visit(self, rows: Sequence[PackedRow], visit: Visit) -> tuple[list[np.ndarray], Read]:
        batch = collate(rows, self.table).to(self.device)
        with torch.inference_mode(), self._autocast():
            log_odds, read = self.model.visit(batch, visit)
        found = log_odds.double().cpu().numpy()
        return [found[i, : row.targets] for i, row in enumerate(rows)], read

    def _autocast(self) -> torch.autocast:
        """Compute as training does: plain PyTorch trains in bf16 under autocast, over fp32 weights."""
        is_bf16 = self.config.train.precision == "bf16" and self.config.train.engine == "torch"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16)


def score_slates(reader: Reader, slates: Sequence[Slate]) -> list[np.ndarray]:
    """Score slates, as many in a pass as fit; a larger one has its context read once and takes several passes."""
    rows: dict[int, tuple[PackedRow, int]] = {}
    found: list[np.ndarray] = [np.zeros(0)] * len(slates)
    for number, slate in enumerate(slates):
        size, start = len(slate.history), start_of(reader, slate)
        if reader.tokens_of(slate.candidates).sum() > reader.pass_tokens:
            past = read_context(reader, slate.history, start)
            found[number] = score_candidates(reader, slate, start, past)
        elif len(slate.candidates):
            row = reader.lay(slate.history + slate.candidates, start, size, size)
            rows[number] = row, int((row.interaction < size).sum())
    for numbers in _passes({number: row.size_tokens for number, (row, _) in rows.items()}, reader.pass_tokens):
        chosen, shared = zip(*(rows[number] for number in numbers), strict=True)
        for number, log_odds in zip(numbers, reader.score(chosen, shared, reader.nothing), strict=True):
            found[number] = log_odds
    return found


def start_of(reader: Reader, slate: Slate) -> int:
    """Return the first interaction of a stand-alone prompt: n before the cut."""
    return max(reader.cut(slate.history, len(slate.history), slate.candidates.latest) - reader.n, 0)


def read_context(reader: Reader, history: History, start: int) -> Past:
    """Read the interactions of a history from `start` on."""
    if start == len(history):
        return reader.nothing
    row = reader.lay(history, start, len(history), len(history))
    return reader.read(row, reader.nothing)[1]


def score_candidates(reader: Reader, slate: Slate, start: int, past: Past) -> np.ndarray:
    """Score candidates after a context that was read before, in passes of bounded size.

    Args:
        reader: of the model.
        slate: the history and its candidates.
        start: first interaction that was read.
        past: of all interactions from there on.
    """
    size, texts = len(slate.history), slate.candidates
    part = np.cumsum(reader.tokens_of(texts)) // reader.pass_tokens
    found = [np.zeros(0)]
    for begin, end in _runs(part):
        row = reader.lay(slate.history + texts[begin:end], start, size, size)
        found += reader.score([row], [past.content_size], past)
    return np.concatenate(found)


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield where each run of equal values begins and ends."""
    edges = np.flatnonzero(np.diff(values, prepend=-1, append=-1))
    yield from zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)


def _passes(sizes: dict[int, int], capacity: int) -> Iterator[list[int]]:
    """Group rows of similar size, so that little is padded; a pass has at most `capacity` tokens, or one row."""
    chosen: list[int] = []
    for number in sorted(sizes, key=lambda number: sizes[number]):
        if chosen and (len(chosen) + 1) * sizes[number] > capacity:
            yield chosen
            chosen = []
        chosen.append(number)
    if chosen:
        yield chosen
