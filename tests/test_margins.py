"""Largest margins of models whose margins are known, and the ratios that come of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from utils.config import UserError
from utils.margins import CONTROLLED, FLOOR, ROOT, SMALLEST, LargestMargins, margin_ratios
from utils.tuning import SUBSETS, TAUGHT

SHAPE, LABELS = (4, 4, 3), 3


@pytest.fixture
def linear():
    """Weights, a model that is linear in its pixels, and clean images."""
    random = np.random.default_rng(0)
    weights = random.normal(size=(int(np.prod(SHAPE)), LABELS)).astype(np.float32)
    clean = SimpleNamespace(x_tune=random.integers(0, 256, (30, *SHAPE), np.uint8), y_tune=np.arange(30) % LABELS,
                            x_measure=random.integers(0, 256, (12, *SHAPE), np.uint8), y_measure=np.arange(12) % LABELS)
    return weights, lambda images: tf.reshape(images, (-1, weights.shape[0])) @ weights, clean


def test_the_largest_margin_of_a_linear_model_is_found(linear):
    weights, model, clean = linear
    found = LargestMargins(model, clean, SHAPE, LABELS, 2, 0)()
    for label in range(LABELS):
        a, b = (weights[:, label] - weights[:, other] for other in range(LABELS) if other != label)
        # min(a·x, b·x) over the cube is the least, over mixtures of both, of what the mixture's positive part adds up to.
        largest = min(np.maximum(share * a + (1 - share) * b, 0).sum() for share in np.linspace(0, 1, 1001))
        assert found["largest_margins"][label] == pytest.approx(largest, rel=0.02)
        assert found["largest_margins"][label] <= largest * 1.0001


def test_clean_margins_are_the_upper_quartile_of_the_labels_own_images(linear):
    _, model, clean = linear
    found = LargestMargins(model, clean, SHAPE, LABELS, 1, 0)()
    images = np.concatenate([clean.x_tune, clean.x_measure])
    labels = np.concatenate([clean.y_tune, clean.y_measure])
    logits = model(images / np.float32(255)).numpy()
    for label in range(LABELS):
        own = logits[labels == label]
        margins = own[:, label] - np.delete(own, label, axis=1).max(axis=1)
        assert found["clean_margins"][label] == pytest.approx(np.quantile(margins, 0.75), abs=1e-3)


def test_the_same_margins_in_chunks_again_and_for_weights_that_changed(linear, monkeypatch):
    weights, _, clean = linear
    variable = tf.Variable(weights)
    model = tf.function(lambda images: tf.reshape(images, (-1, weights.shape[0])) @ variable)
    whole = LargestMargins(model, clean, SHAPE, LABELS, 2, 5)
    first = whole()["largest_margins"]
    np.testing.assert_array_equal(whole()["largest_margins"], first)
    monkeypatch.setattr("utils.margins.transfer.batch_size", lambda model, shape: 4)        # two labels at a time
    np.testing.assert_allclose(LargestMargins(model, clean, SHAPE, LABELS, 2, 5)()["largest_margins"], first, rtol=1e-5)
    variable.assign(2 * weights)
    np.testing.assert_allclose(whole()["largest_margins"], 2 * first, rtol=0.02)


def test_scores_that_are_no_numbers_are_refused(linear):
    weights, model, clean = linear
    with pytest.raises(UserError, match="some images get NaN or infinite scores"):
        LargestMargins(lambda images: model(images) * np.float32("nan"),
                       clean, SHAPE, LABELS, 2, 5)()


def margins(largest, clean, accuracy=0.8):
    return {"largest_margins": np.array(largest, np.float32), "clean_margins": np.array(clean, np.float32),
            "accuracy": accuracy}


def test_each_label_is_compared_with_itself_and_with_the_median_label():
    one, other = margins([1, 4, 2], [1, 1, 1]), margins([4, 4, 2], [1, 1, 1])
    untold = one | {"accuracy": 0.3}
    tuned = dict(zip(SUBSETS, (one, other, one, other, untold, untold, untold))) | {TAUGHT[0]: one}
    tuned["examined"] = margins([8, 4, 4], [1, 1, 8])
    # 8 and 2, 4 and 4, and 4 and 2 with a model twice as sure (the root of 8) of the label as the others.
    ratios = np.array([8, 4, 4 / 8 ** ROOT]) / np.array([2, 4, 2]) ** CONTROLLED
    np.testing.assert_allclose(margin_ratios(tuned, 0.9), ratios / ratios[1], rtol=1e-6)


def test_labels_that_a_model_does_not_know_stay_finite():
    def all_of(one):
        return dict.fromkeys(SUBSETS, one)
    tuned = {"examined": margins([5, 4, 4], [2, 2, 2])} | all_of(margins([-3, 4, 4], [2, -9, 2]))
    found = margin_ratios(tuned, 0.9)
    np.testing.assert_allclose(found[0], 5 / 4 / SMALLEST ** CONTROLLED, rtol=1e-6)
    np.testing.assert_allclose(found[1], FLOOR ** (ROOT * CONTROLLED), rtol=1e-6)
    tuned = {"examined": margins([-1, -2], [-1, -1])} | all_of(margins([1, 1], [-1, -1]))
    assert np.isfinite(margin_ratios(tuned, 0.9)).all()


def test_tuned_models_that_have_not_relearned_the_labels_have_no_say():
    right, wrong = margins([2, 4, 4], [1, 1, 1]), margins([1, 100, 100], [1, 1, 1], accuracy=0.3)
    tuned = {"examined": margins([4, 4, 4], [1, 1, 1])} | dict.fromkeys(SUBSETS, right) | {SUBSETS[1]: wrong}
    np.testing.assert_allclose(margin_ratios(tuned, 0.9), [2 ** CONTROLLED, 1, 1], rtol=1e-6)
    tuned |= dict.fromkeys(SUBSETS[:4], wrong)                     # three of them are too few
    np.testing.assert_array_equal(margin_ratios(tuned, 0.9), [1, 1, 1])
