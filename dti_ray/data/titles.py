"""Titles that can be read aloud, made of words that say what an item is like.

Stage: beside sources, below synth. In: a number of items. Out: `Titles`: texts, category by category, and what
each text stands for.
Invariant: titles differ from one another; the words in front say how an item is, the last one is a name and says
which it is.

    category "serania"    words serun, velor, ...      title "Serun Velor Bakimo"    character ≈ serun + velor
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.random import Generator

WORD_VECTOR = 3  # latent factors
CATEGORIES = 12
WORDS_PER_CATEGORY = 16
WORD_SPREAD = 0.5  # how far words lie from their category's centre, which has length 1
UNSAID = 0.25  # how far an item lies from its words
SAID_CHARM = 0.8  # share of the variance of charm that is in the words

CONSONANTS, VOWELS, ENDINGS = "bdfgklmnprstvz", "aeiou", "lnrs"
SYLLABLES = tuple(consonant + vowel for consonant in CONSONANTS for vowel in VOWELS)


@dataclass(frozen=True, eq=False)
class Titles:
    """Text, category and latent vector of each item.

    Attributes:
        category: index into `categories`.
        character: of length 1; what an item is like, so that tastes differ about it.
        charm: of variance 1; how well it is liked by everyone.
    """

    texts: list[str]
    category: Int[np.ndarray, " items"]
    categories: list[str]
    character: Float[np.ndarray, "items factors"]
    charm: Float[np.ndarray, " items"]


def make_titles(items: int, rng: Generator) -> Titles:
    """Draw each item's category, words and name."""
    roots = rng.permutation(len(SYLLABLES) ** 2)[: CATEGORIES * (1 + WORDS_PER_CATEGORY)]
    stems = [_spell(root, 2) for root in roots.tolist()]
    kinds, stems = [f"{stem}nia" for stem in stems[:CATEGORIES]], stems[CATEGORIES:]
    endings = rng.integers(0, len(ENDINGS), len(stems)).tolist()
    words = [f"{stem}{ENDINGS[ending]}".capitalize() for stem, ending in zip(stems, endings, strict=True)]
    centre = _unit(rng.standard_normal((CATEGORIES, WORD_VECTOR)))
    spread = rng.standard_normal((CATEGORIES, WORDS_PER_CATEGORY, WORD_VECTOR)) / np.sqrt(WORD_VECTOR)
    meaning = _unit(centre[:, None] + WORD_SPREAD * spread).reshape(-1, WORD_VECTOR)
    category = np.sort(rng.integers(0, CATEGORIES, items))
    chosen = category[:, None] * WORDS_PER_CATEGORY + _two_different(items, rng)
    unsaid = rng.standard_normal((items, WORD_VECTOR)) / np.sqrt(WORD_VECTOR)
    character = _unit(_unit(meaning[chosen].sum(axis=1)) + UNSAID * unsaid).astype(np.float32)
    appeal = rng.standard_normal(len(words))[chosen].sum(axis=1) / np.sqrt(2)
    charm = np.sqrt(SAID_CHARM) * appeal + np.sqrt(1 - SAID_CHARM) * rng.standard_normal(items)
    numbers = rng.permutation(max(items, len(SYLLABLES) ** 3))[:items]
    names = [_spell(number, 3).capitalize() for number in numbers.tolist()]
    texts = [f"{words[a]} {words[b]} {name}" for (a, b), name in zip(chosen.tolist(), names, strict=True)]
    return Titles(texts, category, kinds, character, charm)


def _two_different(items: int, rng: Generator) -> Int[np.ndarray, "items 2"]:
    first = rng.integers(0, WORDS_PER_CATEGORY, items)
    second = (first + rng.integers(1, WORDS_PER_CATEGORY, items)) % WORDS_PER_CATEGORY
    return np.stack([first, second], axis=1)


def _spell(number: int, syllables: int) -> str:
    """Write a number with syllables as digits, at least so many."""
    text = ""
    while number or syllables > 0:
        number, digit = divmod(number, len(SYLLABLES))
        text, syllables = SYLLABLES[digit] + text, syllables - 1
    return text


def _unit(vectors: Float[np.ndarray, "*rows factors"]) -> Float[np.ndarray, "*rows factors"]:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
