"""Each item's text becomes tokens once; afterwards rows are assembled by integer gathers.

Stage: prompts. In: the item catalogue and a tokenizer. Out: a `TokenTable`.
Invariant: item i owns `tokens[offsets[i] : offsets[i + 1]]`, never empty; [SUM], <no> and <yes> are the
three ids after the tokenizer's vocabulary, whatever the tokenizer calls them. Time gaps are a second table of the
same kind: phrase j owns `gap_tokens[gap_offsets[j] : gap_offsets[j + 1]]`, and phrase 0, no gap, is empty.

    catalogue: 0 "Alien", 1 "Brazil 1985"    tokens  [7, 9, 4]    offsets [0, 1, 3]
    2 days after Alien, Brazil reads         "2 days later: Brazil 1985"
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from dti_ray.config import PromptConfig
from dti_ray.errors import ConfigError, Fault, InputError

if TYPE_CHECKING:  # packing tasks import this module; they must not wait for Transformers
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

UNKNOWN, PAD = "<unk>", "<pad>"
SUM, NO, YES = 0, 1, 2  # offsets behind the vocabulary

MINUTE, HOUR, DAY = 60, 3600, 86_400
GAPS = (  # from so many seconds on, an interaction's text starts so
    (1, "moments later:"),
    (MINUTE, "1 minute later:"),
    (5 * MINUTE, "5 minutes later:"),
    (15 * MINUTE, "15 minutes later:"),
    (30 * MINUTE, "30 minutes later:"),
    (HOUR, "1 hour later:"),
    (3 * HOUR, "3 hours later:"),
    (6 * HOUR, "6 hours later:"),
    (12 * HOUR, "12 hours later:"),
    (DAY, "1 day later:"),
    (2 * DAY, "2 days later:"),
    (4 * DAY, "4 days later:"),
    (7 * DAY, "1 week later:"),
    (14 * DAY, "2 weeks later:"),
    (30 * DAY, "1 month later:"),
    (60 * DAY, "2 months later:"),
    (120 * DAY, "4 months later:"),
    (240 * DAY, "8 months later:"),
    (365 * DAY, "1 year later:"),
    (730 * DAY, "years later:"),
)
GAP_SECONDS = np.array([seconds for seconds, _ in GAPS])


@dataclass(frozen=True)
class TokenTable:
    """All item texts of a catalogue as integers.

    Attributes:
        tokens: int32 [sum of lengths], item after item.
        offsets: int64 [items + 1].
        prefix: int32 [P], tokens in front of every prompt; may be empty.
        vocabulary: size of the tokenizer's vocabulary; ids from here on are markers.
        marker_ids: tokenizer ids that [SUM], <no> and <yes> start from, or None where one must be learnt
            from nothing.
        cut_items: number of items whose text was cut at `prompt.max_item_tokens`.
        gap_tokens: int32, the phrases of `GAPS` one after another; none where texts say nothing of time.
        gap_offsets: int64 [phrases + 2]; entry 0 is the empty phrase of an interaction without a gap.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prefix: np.ndarray
    vocabulary: int
    marker_ids: tuple[int | None, int, int]
    cut_items: int = 0
    gap_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    gap_offsets: np.ndarray = field(default_factory=lambda: np.zeros(2, dtype=np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per item, int64 [items]."""
        return np.diff(self.offsets)

    @property
    def gap_lengths(self) -> np.ndarray:
        """Tokens per phrase, int64 [phrases + 1], the empty one first."""
        return np.diff(self.gap_offsets)

    @property
    def tells_time(self) -> bool:
        """Whether an interaction's text starts with the time since the one before."""
        return len(self.gap_offsets) > 2


def phrase_of(seconds: np.ndarray) -> np.ndarray:
    """Return the number of the phrase for each gap in seconds: 0, which is empty, below one second."""
    return np.searchsorted(GAP_SECONDS, seconds, side="right")


def item_texts(items: pa.Table, template: str | None) -> list[str]:
    """Render one text per item.

    Args:
        items: the catalogue; no value is null.
        template: text with {column}; None joins all columns but item_id by ", " and leaves empty values out; an
            item of which nothing is left goes by its id.

    Raises:
        ConfigError: the template is malformed, or names a column that the catalogue does not have.
    """
    if template is None:
        return _joined_columns(items)
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        for name in names:
            if name not in items.column_names:
                expected = f"one of {items.column_names}"
                raise ConfigError(Fault("prompt.item_template", f"names column {{{name}}}", expected))
        columns = {name: items.column(name).to_pylist() for name in set(names)}
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [template.format(**row) for row in rows] if columns else [template.format()] * items.num_rows
    except (ValueError, KeyError) as error:
        expected = "text with {column}; {{ and }} are braces"
        raise ConfigError(Fault("prompt.item_template", f"{template!r} is malformed: {error}", expected)) from None


def _joined_columns(items: pa.Table) -> list[str]:
    names = [name for name in items.column_names if name != "item_id"]
    rows = zip(items["item_id"].to_pylist(), *(items[name].to_pylist() for name in names), strict=True)
    return [", ".join(value for value in values if value.strip()) or item_id for item_id, *values in rows]


def catalogue_tokenizer(texts: list[str], config: PromptConfig) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer whose vocabulary is the catalogue's words, in order of appearance.

    Raises:
        ConfigError: `prompt.word_break` is no regular expression.
    """
    try:
        split = pre_tokenizers.Split(Regex(config.word_break), behavior="removed")
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower
        where, expected = "prompt.word_break", "a regular expression of Oniguruma"
        raise ConfigError(Fault(where, f"got {config.word_break!r}: {error}", expected)) from None
    spoken = [config.prefix, *_gap_texts(config), *texts]
    words = (word for text in spoken for word, _ in split.pre_tokenize_str(text))
    special = [PAD, UNKNOWN, config.no_token, config.yes_token]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*special, *words]))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = split
    return _fast(core, config)


def stored_tokenizer(text: str, config: PromptConfig) -> PreTrainedTokenizerFast:
    """Return the tokenizer of which a run stored `tokenizer.json`."""
    return _fast(Tokenizer.from_str(text), config)


def _fast(core: Tokenizer, config: PromptConfig) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=UNKNOWN,
        pad_token=PAD,
        additional_special_tokens=[config.no_token, config.yes_token],
    )


def token_table(texts: list[str], tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> TokenTable:
    """Tokenise every item text once.

    Args:
        texts: one text per item, in the order of the item index.
        tokenizer: of the decoder that will be trained.
        config: labels, prefix and the cut of long texts.

    Raises:
        ConfigError: a label is not one token of this tokenizer.
        InputError: an item has no token at all.
    """
    no, yes = _label_ids(tokenizer, config)
    encoded = _encode_all(tokenizer, texts)
    empty = [i for i, ids in enumerate(encoded) if not ids]
    if empty:
        raise InputError(
            Fault(
                f"item number {empty[0]}",
                f"its text {texts[empty[0]]!r} has no token ({len(empty)} such items)",
                "at least one token an item",
                "mend the catalogue or prompt.item_template",
            )
        )
    end = tokenizer.eos_token_id
    assert end is None or isinstance(end, int)
    tokens, offsets = _one_after_another([ids[: config.max_item_tokens] for ids in encoded])
    gap_tokens, gap_offsets = _one_after_another([[], *_encode_all(tokenizer, _gap_texts(config))])
    return TokenTable(
        tokens=tokens,
        offsets=offsets,
        prefix=np.array(_encode(tokenizer, config.prefix), dtype=np.int32),
        vocabulary=len(tokenizer),
        marker_ids=(end, no, yes),
        cut_items=sum(len(ids) > config.max_item_tokens for ids in encoded),
        gap_tokens=gap_tokens,
        gap_offsets=gap_offsets,
    )


def _gap_texts(config: PromptConfig) -> list[str]:
    return [phrase for _, phrase in GAPS] if config.time == "gap" else []


def _one_after_another(parts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return (all ids as int32, where each part starts and the last one ends)."""
    lengths = np.array([len(ids) for ids in parts], dtype=np.int64)
    tokens = np.fromiter((token for ids in parts for token in ids), dtype=np.int32, count=int(lengths.sum()))
    return tokens, np.concatenate([[0], np.cumsum(lengths)])


def _label_ids(tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> tuple[int, int]:
    faults, ids = [], []
    for name, text in (("no_token", config.no_token), ("yes_token", config.yes_token)):
        encoded = _encode(tokenizer, text)
        if len(encoded) != 1 or encoded[0] == tokenizer.unk_token_id:
            pieces = tokenizer.convert_ids_to_tokens(encoded)
            faults.append(
                Fault(
                    f"prompt.{name}",
                    f"{text!r} becomes {len(encoded)} tokens {pieces}",
                    "one known token",
                    "for example ' yes' and ' no' for most language models",
                )
            )
        ids.append(encoded[0] if encoded else 0)
    if not faults and ids[0] == ids[1]:
        faults.append(Fault("prompt.yes_token", "is the same token as prompt.no_token", "two different labels"))
    if faults:
        raise ConfigError(*faults)
    return ids[0], ids[1]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _encode_all(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
