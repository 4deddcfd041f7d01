"""Each item's text becomes tokens once; afterwards rows are assembled by integer gathers.

Stage: prompts. In: the item catalogue and a tokenizer. Out: a `TokenTable`.
Invariant: item i owns `tokens[offsets[i] : offsets[i + 1]]`, never empty; [SUM], <no> and <yes> are the
three ids after the tokenizer's vocabulary, whatever the tokenizer calls them.

    catalogue: 0 "Alien", 1 "Brazil 1985"    tokens  [7, 9, 4]    offsets [0, 1, 3]
"""

from __future__ import annotations

import string
from dataclasses import dataclass
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
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prefix: np.ndarray
    vocabulary: int
    marker_ids: tuple[int | None, int, int]
    cut_items: int = 0

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per item, int64 [items]."""
        return np.diff(self.offsets)


def item_texts(items: pa.Table, template: str) -> list[str]:
    """Render one text per item.

    Raises:
        ConfigError: the template is malformed, or names a column that the catalogue does not have.
    """
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
    words = (word for text in [config.prefix, *texts] for word, _ in split.pre_tokenize_str(text))
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
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
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
    cut = [ids[: config.max_item_tokens] for ids in encoded]
    lengths = np.array([len(ids) for ids in cut], dtype=np.int64)
    return TokenTable(
        tokens=np.fromiter((token for ids in cut for token in ids), dtype=np.int32, count=int(lengths.sum())),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        prefix=np.array(_encode(tokenizer, config.prefix), dtype=np.int32),
        vocabulary=len(tokenizer),
        marker_ids=(end, no, yes),
        cut_items=sum(len(ids) > config.max_item_tokens for ids in encoded),
    )


def _label_ids(tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> tuple[int, int]:
    faults, ids = [], []
    for field, text in (("no_token", config.no_token), ("yes_token", config.yes_token)):
        encoded = _encode(tokenizer, text)
        if len(encoded) != 1 or encoded[0] == tokenizer.unk_token_id:
            pieces = tokenizer.convert_ids_to_tokens(encoded)
            faults.append(
                Fault(
                    f"prompt.{field}",
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
