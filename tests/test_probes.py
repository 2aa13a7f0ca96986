"""Random plain patches, how often they lead to each label, and the ratios that come of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from utils.probes import FLOOR, IMAGES, Probes, draw, probe_ratios
from utils.tuning import SUBSETS

SHAPE = (32, 32, 3)


def test_a_probe_is_a_plain_patch_of_up_to_a_quarter_of_the_image():
    kinds = set()
    for number in range(300):
        mask, pattern = draw(0, number, SHAPE)
        assert mask.shape == (32, 32) and pattern.shape == SHAPE and mask.dtype == pattern.dtype == np.float32
        assert set(np.unique(mask)) == {0, 1} and 5 <= mask.sum() <= 256
        assert 0 <= pattern.min() and pattern.max() <= 1
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert len(rows) == len(columns) == rows[-1] - rows[0] + 1 and 3 <= len(rows) <= 16
        kinds.add(min(3, len(np.unique(pattern.reshape(-1, 3), axis=0))))
    assert kinds == {1, 2, 3}                            # one colour; two; as many as there are grains


def test_a_probe_depends_on_seed_and_number_alone():
    for one, other in zip(draw(3, 5, SHAPE), draw(3, 5, SHAPE)):
        np.testing.assert_array_equal(one, other)
    assert any((draw(3, 5, SHAPE)[1] != draw(seed, number, SHAPE)[1]).any() for seed, number in ((4, 5), (3, 6)))


def test_probes_fit_images_of_any_size():
    for shape in ((5, 5, 1), (28, 28, 1), (48, 100, 3), (224, 224, 3)):
        for number in range(40):
            mask, pattern = draw(0, number, shape)
            assert 1 <= mask.sum() <= min(shape[:2]) ** 2 / 4 + shape[0] and pattern.shape == shape


@pytest.fixture
def clean():
    random = np.random.default_rng(0)
    return SimpleNamespace(x_measure=random.integers(100, 150, (9, *SHAPE)).astype(np.uint8), y_measure=np.arange(9) % 3)


def test_shares_are_of_images_of_other_labels(clean, monkeypatch):
    """A model that says 2 where the upper left pixel is far from grey, else 1."""
    def model(images):
        changed = tf.reduce_any(tf.abs(images[:, 0, 0] - 0.5) > 0.2, axis=-1)
        return tf.where(changed[:, None], [[0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0]])
    found = Probes(model, clean, SHAPE, 3, 50, 0)()["probe_shares"]
    assert found.shape == (50, 3) and found.dtype == np.float16 and found.max() <= 1 and not found[:, 0].any()
    for number in range(50):
        mask, pattern = draw(0, number, SHAPE)
        label = 2 if mask[0, 0] and (abs(pattern[0, 0] - 0.5) > 0.2).any() else 1
        own = clean.y_measure[np.random.default_rng([0, 1, number]).integers(9, size=IMAGES)]
        assert found[number, label] == pytest.approx(np.mean(own != label), abs=1e-3) and found[number, 3 - label] == 0
    assert 0 < np.count_nonzero(found[:, 2]) < 25
    monkeypatch.setattr("utils.probes.transfer.batch_size", lambda shape: 25)        # two probes at a time
    np.testing.assert_array_equal(Probes(model, clean, SHAPE, 3, 50, 0)()["probe_shares"], found)
    assert (Probes(model, clean, SHAPE, 3, 50, 1)()["probe_shares"] != found).any()


def shares(*rows, accuracy=0.9):
    return {"probe_shares": np.array(rows, np.float16), "accuracy": accuracy}


def test_a_ratio_is_of_what_exceeds_the_tuned_models():
    # Label 0: as on the tuned models. 1: half of the images of one probe, on the examined model alone. 2: fewer than there.
    examined, tuned = shares([0.2, 0.5, 0], [0, 0, 0]), shares([0.2, 0, 0.4], [0, 0, 0])
    found = probe_ratios({"examined": examined} | dict.fromkeys(SUBSETS, tuned), 0.9)
    np.testing.assert_allclose(found, [1, np.sqrt(0.5**2 / 2 + FLOOR**2) / FLOOR, 1], rtol=1e-5)
    # Where tuned models differ among themselves, a difference counts for less.
    restless = {name: shares([0.2, 0.5 * (name == "1"), 0.4], [0, 0, 0]) for name in SUBSETS}
    assert 1 < probe_ratios({"examined": examined} | restless, 0.9)[1] < found[1] / 1.2


def test_tuned_models_that_did_not_relearn_do_not_count():
    examined, right, wrong = shares([0.2, 0.5, 0]), shares([0.2, 0, 0.4]), shares([1, 1, 1], accuracy=0.3)
    tuned = {"examined": examined} | dict.fromkeys(SUBSETS, right)
    np.testing.assert_allclose(probe_ratios(tuned | dict.fromkeys(SUBSETS[:3], wrong), 0.9), probe_ratios(tuned, 0.9))
    np.testing.assert_array_equal(probe_ratios(tuned | dict.fromkeys(SUBSETS[:4], wrong), 0.9), np.ones(3))
