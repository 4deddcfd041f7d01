"""How many targets each prompt has where a run mixes prompts of different length.

Stage: before packing. In: the bounds k_min and k, a random generator. Out: numbers of targets.
Invariant: each factor between the bounds is as likely: from 1 to 100 there are as many prompts of 1 target as of 50
or more. So short prompts stay frequent, and yet most targets stand in long ones, where a target is cheap.

    P(s) = log((s + 1) / s) / log((k + 1) / k_min), s = k_min ... k        k_min 1, k 3: 0.5, 0.29, 0.21
"""

from __future__ import annotations

import numpy as np


def draw_targets(k_min: int, k: int, prompts: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the number of targets of some prompts log-uniformly.

    Args:
        k_min: fewest targets of a prompt, >= 1.
        k: most targets of a prompt, >= k_min.
        prompts: how many numbers to draw.
        rng: where they come from; it moves on.

    Returns:
        int64 [prompts].
    """
    drawn = np.exp(rng.uniform(np.log(k_min), np.log(k + 1), prompts)).astype(np.int64)
    return np.clip(drawn, k_min, k)  # the exponential of a bound's logarithm may miss the bound


def mean_targets(k_min: int, k: int) -> float:
    """Return the mean of what `draw_targets` draws; prompts per target are its inverse."""
    sizes = np.arange(k_min, k + 1)
    return float((sizes * np.log1p(1 / sizes)).sum() / np.log((k + 1) / k_min))
