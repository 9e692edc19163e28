"""Structure scores of MSDS: what is found against labels, spreads against closed forms, sets that must fail."""

import numpy as np
import pytest

from data import msds
from data.msds_structure import calibration, find_ovals, structure_scores, variances

N = 300
COLOUR_WITHIN = (65**2 - 1) / 12  # variance of an integer uniform in -32 … 32
COLOUR_BETWEEN = (192**2 - 1) / 12  # in 32 … 223
ORIENTATION_WITHIN = 1 - (np.sin(np.pi / 4) / (np.pi / 4)) ** 2  # of (cos 2a, sin 2a), a uniform over 45 degrees


@pytest.fixture(scope="module")
def sets():
    """Of each variant, two sets that share no image: real ones to compare with, and (images, ovals) to score."""
    return {v: (msds.generate(v, 1, 0, N, 1)[0], msds.generate(v, 2, 0, N, 1)[:2]) for v in (1, 2)}


def draw(ovals):
    return np.stack([msds.draw_ovals(each) for each in ovals])


@pytest.mark.parametrize("variant", [1, 2])
def test_ovals_are_measured_as_labelled(variant, sets):
    error = calibration(*sets[variant][1])
    assert error["share"] > 0.99 and error["degrees"] < 1.5
    assert error["levels"] < {1: 3, 2: 4}[variant] and abs(error["levels_bias"]) < 2


def test_an_upright_and_a_turned_oval():
    ovals = np.array([[0, 0, 0, 200, 40, 0], [7, 9, 90, 0, 100, 60]])  # the second in cell 5, shifted by (-1, 1)
    colours, angles, found = find_ovals(msds.draw_ovals(ovals)[None])
    assert found[0].tolist() == [True] + [False] * 4 + [True] + [False] * 10
    assert angles[0, [0, 5]].tolist() == [0, 90]
    np.testing.assert_allclose(colours[0, [0, 5]], ovals[:, 3:], atol=1.5)


def test_variances_are_those_drawn(sets):
    images, _ = sets[1][1]
    colours, _, found = find_ovals(images)
    within, between = variances(colours, found)
    assert within == pytest.approx(3 * COLOUR_WITHIN, rel=0.05)
    assert between == pytest.approx(3 * COLOUR_BETWEEN, rel=0.15)  # 300 images: 4 % is one standard error
    rng = np.random.default_rng(0)
    factor, found = rng.normal(size=(4000, 16, 2)) + 3 * rng.normal(size=(4000, 1, 2)), rng.random((4000, 16)) < 0.4
    assert variances(factor, found) == pytest.approx((2, 18), rel=0.05)


@pytest.mark.parametrize("variant", [1, 2])
def test_real_images_score_1_and_shuffled_ones_0(variant, sets):
    real, (images, ovals) = sets[variant]
    scores = structure_scores(images, variant, real)
    assert scores["score"] == pytest.approx(1, abs=0.05) and scores["failure"] is None
    assert scores["between"] == pytest.approx(1, abs=0.15)
    assert scores["share"] == pytest.approx(scores["share_real"], abs=0.01)
    expected = {1: (3 * COLOUR_WITHIN, 3 * (COLOUR_WITHIN + COLOUR_BETWEEN)), 2: (ORIENTATION_WITHIN, 1)}[variant]
    assert (scores["spread"], scores["spread_shuffled"]) == pytest.approx(tuple(np.sqrt(expected)), rel=0.03)
    shuffled = np.stack([np.roll(ovals[:, cell], cell, 0) for cell in range(16)], 1)  # in the same cells
    scores = structure_scores(draw(shuffled), variant, real)
    assert scores["score"] == pytest.approx(0, abs=0.06) and scores["between"] < 0.2
    scores = structure_scores(sets[3 - variant][1][0], variant, real)  # images of the other set
    assert scores["score"] == pytest.approx(0, abs=0.05)


def test_wider_colours_score_as_their_variance_says(sets):
    ovals = sets[1][1][1].copy()
    rng = np.random.default_rng(0)
    ovals[:, :, 3:] = rng.integers(64, 192, (N, 1, 3)) + rng.integers(-64, 65, (N, 16, 3))
    scores = structure_scores(draw(ovals), 1, sets[1][0])
    within, between, real = (129**2 - 1) / 12, (128**2 - 1) / 12, np.sqrt(COLOUR_WITHIN)
    expected = (np.sqrt(within + between) - np.sqrt(within)) / (np.sqrt(within + between) - real)
    assert scores["score"] == pytest.approx(expected, abs=0.04)
    assert scores["between"] == pytest.approx(np.sqrt(between / COLOUR_BETWEEN), abs=0.1)


def test_missing_ovals_lower_the_share_alone(sets):
    real, (_, ovals) = sets[1]
    ovals = np.where(np.random.default_rng(0).random((N, 16, 1)) < 0.3, 0, ovals)  # 0: black, in the corner
    scores = structure_scores(draw(ovals[:, ::-1]), 1, real)
    assert scores["share"] == pytest.approx(0.7, abs=0.02) and scores["score"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("variant", [1, 2])
def test_collapsed_sets_have_no_score(variant, sets):
    real, (images, ovals) = sets[variant]
    same_colour = np.dstack((ovals[:, :, :3], ovals[:, :, 3:] + 128 - ovals[:, :, 3:].mean(1, keepdims=True)))
    for each in [np.tile(same, (20, 1, 1, 1)) for same in images[:3]] + [draw(same_colour)] * (variant == 1):
        scores = structure_scores(each, variant, real)
        assert scores["score"] is None and "varies little" in scores["failure"]
        assert scores["between"] < 0.05 and scores["share"] > 0.9


@pytest.mark.parametrize("variant", [1, 2])
def test_sets_without_ovals_have_no_score(variant, sets):
    noise = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32))
    black, nearly_black, white, speckles = 0 * noise, noise % 12, 0 * noise + 255, 255 * (noise < 5)
    for images in (noise, black, nearly_black, white, speckles):
        scores = structure_scores(images.astype(np.uint8), variant, sets[variant][0])
        assert scores["score"] is None and "ovals in" in scores["failure"] and scores["share"] < 0.05


def test_bad_input_is_refused(sets):
    real = sets[1][0]
    with pytest.raises(ValueError, match="variant 3"):
        structure_scores(real, 3, real)
    for images in (real.astype(float), real[:, :1], real[0]):
        with pytest.raises(ValueError, match="must be uint8"):
            structure_scores(images, 1, real)
