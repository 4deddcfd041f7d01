from __future__ import annotations

import numpy as np
import pytest

from dti_ray.report import MaskPicture
from dti_ray.report.artefacts import Predictions
from dti_ray.report.mask import draw_mask, interaction_starts, prompt_starts
from dti_ray.report.plots import calibration_bins, short_count, smooth
from tests.builders import streaming_mask


def test_calibration_bins_hold_every_prediction_once() -> None:
    probability = np.array([0.0, 0.02, 0.5, 0.97, 1.0])
    bins = calibration_bins(Predictions("test", np.array([0, 1, 1, 1, 1]), probability))
    assert bins.targets.tolist() == [2, 1, 2]
    assert bins.clicked.tolist() == [0.5, 1.0, 1.0]
    assert bins.predicted.tolist() == pytest.approx([0.01, 0.5, 0.985])
    assert (bins.low >= 0).all()
    assert (bins.low < bins.clicked).all()
    assert (bins.high <= 1 + 1e-12).all()


def test_rare_clicks_get_bins_that_fit_them() -> None:
    bins = calibration_bins(Predictions("test", np.array([0, 1]), np.array([0.001, 0.031])))
    assert bins.width == pytest.approx(0.05 / 15)


def test_smoothing_keeps_a_constant_and_the_length() -> None:
    assert smooth(np.full(9, 2.5), 5).tolist() == [2.5] * 9
    assert smooth(np.array([1.0, 2.0, 6.0]), 3).tolist() == [1.5, 3.0, 4.0]


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (950, "950"), (12_500, "12.5k"), (3e6, "3M")])
def test_counts_are_short(value: float, text: str) -> None:
    assert short_count(value) == text


def test_interactions_begin_after_feedback_prefix_and_sum() -> None:
    kind = [
        "prefix",
        "prefix",
        "context",
        "feedback",
        "target",
        "sum",
        "feedback",
        "target",
        "sum",
        "target",
        "sum",
    ]
    picture = MaskPicture(np.tri(len(kind), dtype=bool), kind, [""] * len(kind), "slate")
    assert interaction_starts(picture) == [2, 4, 7, 9]
    assert prompt_starts(picture) == []


def test_prompts_begin_where_nothing_earlier_is_seen() -> None:
    picture = streaming_mask(2, 2, prompts=2)
    assert prompt_starts(picture) == [len(picture.kind) // 2]


def test_long_row_is_cut_and_says_so() -> None:
    plot = draw_mask(streaming_mask(40, 60, words=4, prompts=2))
    assert "The first 512 of the row's" in plot.caption
    assert "<text" in plot.svg
    assert len(plot.svg) < 600_000


@pytest.mark.parametrize(
    "picture",
    [
        lambda: MaskPicture(np.ones((2, 3), bool), ["prefix"] * 2, ["a"] * 2, "t"),
        lambda: MaskPicture(np.ones((2, 2), bool), ["prefix"] * 2, ["a"], "t"),
        lambda: MaskPicture(np.ones((1, 1), bool), ["padding"], ["a"], "t"),
    ],
)
def test_mask_picture_whose_parts_disagree_is_refused(picture) -> None:
    with pytest.raises(ValueError, match="mask picture"):
        picture()
