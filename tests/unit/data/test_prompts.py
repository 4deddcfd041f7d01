"""Prompts: item texts, the tokenizer built from them, and the table that packing gathers from."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dti_ray.config import PromptConfig
from dti_ray.data.prompts import (
    GAPS,
    PAD,
    UNKNOWN,
    TokenTable,
    catalogue_tokenizer,
    item_texts,
    phrase_of,
    stored_tokenizer,
    token_table,
)
from dti_ray.errors import ConfigError, InputError

ITEMS = pa.table(
    {"item_id": ["1", "2", "3"], "title": ["Alien", "Brazil", "Alien 3"], "year": ["1979", "1985", "1992"]}
)
DEFAULT = PromptConfig()
odd_texts = st.text(st.sampled_from("abc |<>é界"), min_size=1).filter(lambda text: text.strip() != "")
words = st.lists(st.sampled_from(["a", "bb", "c.", "Ünï"]), min_size=1, max_size=7)


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that splits `<yes>` into three pieces, as a language model's may."""
    words = [UNKNOWN, "<", ">", "yes", "no", "Alien"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=UNKNOWN, eos_token=">")


def build(texts: list[str], **settings: object) -> TokenTable:
    config = PromptConfig.model_validate(settings)
    return token_table(texts, catalogue_tokenizer(texts, config), config)


def words_of(table: TokenTable, tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    parts = np.split(table.tokens, table.offsets[1:-1])
    return [tokenizer.convert_ids_to_tokens(part.tolist()) for part in parts]


def assert_same(a: TokenTable, b: TokenTable) -> None:
    for name in ("tokens", "offsets", "prefix", "gap_tokens", "gap_offsets"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype
        assert left.tolist() == right.tolist()
    assert (a.vocabulary, a.marker_ids, a.cut_items) == (b.vocabulary, b.marker_ids, b.cut_items)


def test_template_takes_any_columns_in_any_order() -> None:
    texts = item_texts(ITEMS, "{year}: {title}, {year}")
    assert texts == ["1979: Alien, 1979", "1985: Brazil, 1985", "1992: Alien 3, 1992"]


def test_template_without_columns_is_the_same_text_for_every_item() -> None:
    assert item_texts(ITEMS, "a {{film}}") == ["a {film}"] * 3


def test_without_a_template_all_columns_but_the_id_are_joined_and_empty_values_left_out() -> None:
    items = pa.table(
        {"title": ["Alien", "", " ", "Brazil"], "item_id": ["1", "2", "3", "4"], "genres": ["Horror", "Drama", "", ""]}
    )
    assert item_texts(items, None) == ["Alien, Horror", "Drama", "3", "Brazil"]
    assert item_texts(ITEMS, None) == ["Alien, 1979", "Brazil, 1985", "Alien 3, 1992"]


def test_without_a_template_items_of_an_id_alone_go_by_it() -> None:
    assert item_texts(ITEMS.select(["item_id"]), None) == ["1", "2", "3"]
    assert item_texts(ITEMS.slice(0, 0), None) == item_texts(ITEMS.select(["item_id"]).slice(0, 0), None) == []


def test_template_with_an_unknown_column_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"prompt\.item_template: names column \{genre\}.*'item_id', 'title', 'year'"):
        item_texts(ITEMS, "{title} {genre}")


@pytest.mark.parametrize(
    "template", ["{title", "title}", "{title:d}", "{title!z}", "{title:{width}}", "{}", "{title.real}"]
)
def test_malformed_template_is_a_fault_of_its_setting(template: str) -> None:
    with pytest.raises(ConfigError, match=r"^prompt\.item_template: [^\n]*$"):
        item_texts(ITEMS, template)


def test_catalogue_tokenizer_knows_prefix_and_words_in_order_of_appearance() -> None:
    tokenizer = catalogue_tokenizer(["b a", "a  c"], PromptConfig(prefix="watched b"))
    in_order = [PAD, UNKNOWN, "<no>", "<yes>", "watched", "b", "a", "c"]
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == in_order


def test_word_break_splits_between_words_alone() -> None:
    texts = ["Heat|1995|Action Crime", "Alien|1979|Horror"]
    config = PromptConfig(word_break="[|]")
    tokenizer = catalogue_tokenizer(texts, config)
    assert words_of(token_table(texts, tokenizer, config), tokenizer) == [text.split("|") for text in texts]


def test_word_break_that_is_no_expression_is_a_fault_of_its_setting() -> None:
    with pytest.raises(ConfigError, match=r"prompt\.word_break: got '\['"):
        catalogue_tokenizer(["a"], PromptConfig(word_break="["))


def test_unknown_words_become_the_unknown_token() -> None:
    tokenizer = catalogue_tokenizer(["Alien 3"], DEFAULT)
    table = token_table(["Alien 4", "Heat"], tokenizer, DEFAULT)
    assert words_of(table, tokenizer) == [["Alien", UNKNOWN], [UNKNOWN]]


def test_label_that_is_not_one_token_names_the_pieces() -> None:
    with pytest.raises(ConfigError) as caught:
        token_table(["Alien"], pieces_tokenizer(), DEFAULT)
    no, yes = map(str, caught.value.faults)
    assert no.startswith("prompt.no_token: '<no>' becomes 3 tokens ['<', 'no', '>']; expected one known token")
    assert yes.startswith("prompt.yes_token: '<yes>' becomes 3 tokens ['<', 'yes', '>']; expected one known token")


def test_label_that_is_no_known_word_is_a_fault() -> None:
    with pytest.raises(ConfigError, match=r"prompt\.yes_token: 'click' becomes 1 tokens"):
        token_table(["Alien"], pieces_tokenizer(), PromptConfig(yes_token="click", no_token="no"))


def test_words_of_the_tokenizer_can_be_labels() -> None:
    table = token_table(["Alien"], pieces_tokenizer(), PromptConfig(yes_token="yes", no_token="no"))
    assert table.marker_ids == (2, 4, 3)


def test_same_label_twice_is_a_fault() -> None:
    with pytest.raises(ConfigError, match=r"prompt\.yes_token: is the same token as prompt\.no_token"):
        build(["Alien"], yes_token="<no>")


def test_item_without_tokens_is_named_and_counted() -> None:
    with pytest.raises(InputError, match=r"item number 1: its text ' ' has no token \(2 such items\)"):
        build(["Alien", " ", ""])


def test_long_texts_are_cut_and_counted() -> None:
    table = build(["a b c", "a b", "c", "c b a c"], max_item_tokens=2)
    assert table.lengths.tolist() == [2, 2, 1, 2]
    assert table.cut_items == 2
    assert build(["a b c"], max_item_tokens=3).cut_items == 0


def test_table_lays_items_one_after_the_other() -> None:
    table = build(["b a", "c", "a a a"], prefix="b z")
    no, yes, first = 2, 3, 4  # behind padding and unknown; then the prefix's words
    b, z, a, c = range(first, first + 4)
    assert table.tokens.tolist() == [b, a, c, a, a, a]
    assert table.offsets.tolist() == [0, 2, 3, 6]
    assert table.prefix.tolist() == [b, z]
    assert (table.vocabulary, table.marker_ids) == (c + 1, (None, no, yes))
    assert (table.tokens.dtype, table.offsets.dtype, table.prefix.dtype) == (np.int32, np.int64, np.int32)


def test_no_prefix_and_no_items_give_empty_arrays() -> None:
    table = build([])
    assert (table.tokens.size, table.offsets.tolist(), table.prefix.size) == (0, [0], 0)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(odd_texts, min_size=1, max_size=6))
def test_stored_tokenizer_gives_the_same_table(texts: list[str]) -> None:
    config = PromptConfig(prefix="user: a", max_item_tokens=4, time="gap")
    built = catalogue_tokenizer(texts, config)
    stored = stored_tokenizer(built.backend_tokenizer.to_str(), config)
    for again in (texts, ["a new word"]):
        assert_same(token_table(again, built, config), token_table(again, stored, config))


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(words, min_size=1, max_size=6))
def test_items_read_back_as_their_words(texts: list[list[str]]) -> None:
    config = PromptConfig(max_item_tokens=5)
    joined = [" ".join(text) for text in texts]
    tokenizer = catalogue_tokenizer(joined, config)
    table = token_table(joined, tokenizer, config)
    assert words_of(table, tokenizer) == [text[:5] for text in texts]
    assert table.cut_items == sum(len(text) > 5 for text in texts)
    assert not (table.tokens == tokenizer.unk_token_id).any()


def gap_words(table: TokenTable, tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    parts = np.split(table.gap_tokens, table.gap_offsets[1:-1])
    return [tokenizer.convert_ids_to_tokens(part.tolist()) for part in parts]


def test_phrases_of_time_gaps_are_known_words_and_their_own_table() -> None:
    config = PromptConfig(time="gap", prefix="user:", max_item_tokens=1)
    texts = ["Alien", "2 days"]
    tokenizer = catalogue_tokenizer(texts, config)
    table = token_table(texts, tokenizer, config)
    assert gap_words(table, tokenizer) == [[], *(phrase.split() for _, phrase in GAPS)]
    assert table.tells_time
    assert table.gap_lengths.tolist() == [0, *(len(phrase.split()) for _, phrase in GAPS)]
    assert words_of(table, tokenizer) == [["Alien"], ["2"]], "phrases are not cut with the items"
    assert table.cut_items == 1


def test_a_phrase_may_be_one_word() -> None:
    config = PromptConfig(time="gap", word_break="[|]")
    tokenizer = catalogue_tokenizer(["Heat|Action"], config)
    table = token_table(["Heat|Action"], tokenizer, config)
    assert gap_words(table, tokenizer) == [[], *([phrase] for _, phrase in GAPS)]


def test_texts_that_do_not_tell_the_time_know_no_phrase() -> None:
    table = build(["a b"])
    assert not table.tells_time
    assert (table.gap_tokens.tolist(), table.gap_offsets.tolist(), table.gap_lengths.tolist()) == ([], [0, 0], [0])
    assert not {"later:", "day"} & catalogue_tokenizer(["a b"], DEFAULT).get_vocab().keys()


def test_phrase_is_the_longest_time_that_the_gap_reaches() -> None:
    minute, hour, day = 60, 3600, 86_400
    seconds = [0, 1, 59, minute, 5 * hour, day - 1, day, 2 * day, 3 * day, 729 * day, 10_000 * day]
    said = ["", *(phrase for _, phrase in GAPS)]
    assert [said[number] for number in phrase_of(np.array(seconds)).tolist()] == [
        "", "moments later:", "moments later:", "1 minute later:", "3 hours later:", "12 hours later:", "1 day later:",
        "2 days later:", "2 days later:", "1 year later:", "years later:",
    ]  # fmt: skip
    assert [number for number, _ in GAPS] == sorted({number for number, _ in GAPS})
    assert len({phrase for _, phrase in GAPS}) == len(GAPS)
