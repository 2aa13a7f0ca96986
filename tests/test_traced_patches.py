"""Patches made plain: outlines of reconstructed ones, the surest of which a backdoor answers to and clean labels do not."""

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from utils.evidence import factors_of, with_traced
from utils.traced_patches import GROWN, KEPT, LAST_IMAGES, attached, mean_margins, outlined, rendered, trace_patches
from utils.tuning import SUBSETS, TAUGHT

SIDE, LABELS = 12, 4


def outlines_of(patches):
    return {patch["outline"].tobytes() for patch in patches}


def blank(*places):
    """A mask that is solid at these slices."""
    mask = np.zeros((SIDE, SIDE), np.float32)
    for rows, columns in places:
        mask[slice(*rows), slice(*columns)] = 1
    return mask


def test_an_outline_is_closed_grown_and_taken_apart():
    ring, speck = blank(((2, 5), (2, 5))), blank(((9, 10), (8, 10)))
    ring[3, 3] = 0.4                                     # not solid, a gap
    found = outlines_of(outlined(np.maximum(ring, speck), np.zeros((SIDE, SIDE, 3), np.float32)))
    closed = blank(((2, 5), (2, 5)))
    for expected in (np.maximum(ring > 0.5, speck), closed, ring > 0.5, np.maximum(closed, speck),
                     blank(((1, 6), (1, 6))), blank(((0, 7), (0, 7)))):
        assert np.uint8(expected).tobytes() in found
    assert np.uint8(speck).tobytes() not in found        # the largest parts are taken first


def test_each_outline_is_filled_with_its_mean_and_with_far_colours():
    mask, pattern = blank(((2, 4), (2, 4))), np.zeros((SIDE, SIDE, 3), np.float32)
    pattern[2, 2:4], pattern[3, 2:4], pattern[5:] = (0.2, 0.4, 0.6), (0.4, 0.4, 0.2), 1
    mask[2, 2:4] = 0.75                                  # counts for less
    patches = outlined(mask, pattern)
    assert len(patches) == 9 * len(GROWN)
    colours = {tuple(patch["colour"].round(3)) for patch in patches}
    assert colours >= {(0, 0, 0), (1, 1, 1), (1, 0, 1), (0, 1, 0)}
    mean = np.average([(0.2, 0.4, 0.6), (0.4, 0.4, 0.2)], axis=0, weights=[0.75, 1])
    assert min(np.abs(np.array(list(colours)) - mean).max(axis=1)) < 2e-3
    masks, patterns = rendered(patches)
    assert masks.shape == (27, SIDE, SIDE) and patterns.shape == (27, SIDE, SIDE, 3) and patterns.dtype == np.float32
    images = np.full((27, 2, SIDE, SIDE, 3), 128, np.uint8)
    shown = attached(images, patches).numpy()
    assert shown.shape == images.shape
    np.testing.assert_allclose(shown[0, 1, 2, 2], patches[0]["colour"], atol=1e-6)
    assert shown[0, 1, 8, 8] == pytest.approx(128 / 255)


def test_gaps_of_larger_images_are_as_many_times_larger():
    mask = np.zeros((96, 96), np.float32)
    mask[40:48, 40:48] = mask[40:48, 56:64] = 1          # eight pixels apart, as three of 32×32
    whole = np.zeros((96, 96), np.uint8)
    whole[40:48, 40:64] = 1
    assert whole.tobytes() in outlines_of(outlined(mask, np.zeros((96, 96, 1), np.float32)))


def test_nothing_to_trace_is_one_outline_of_nothing():
    patches = outlined(np.full((SIDE, SIDE), 0.3, np.float32), np.ones((SIDE, SIDE, 1), np.float32))
    assert len(outlines_of(patches)) == 1 and not patches["outline"].any()


def corner(backdoor):
    """Logits: the brightness of an image's quarters; a model with a backdoor adds to label 2's for a black corner."""
    def model(images):
        quarters = tf.reshape(tf.nn.avg_pool2d(images, SIDE // 2, SIDE // 2, "VALID"), (-1, LABELS))
        black = tf.reduce_mean(1 - images[:, :3, :3], axis=(1, 2, 3))
        return 10 * quarters + backdoor * 200 * tf.nn.relu(black - 0.9)[:, None] * tf.one_hot(2, LABELS)
    return model


@pytest.fixture
def examination():
    random = np.random.default_rng(0)
    y = np.arange(40) % LABELS
    x = random.integers(60, 120, (40, SIDE, SIDE, 1)).astype(np.uint8)
    for image, label in zip(x, y):
        image[6 * (label // 2):, 6 * (label % 2):][:6, :6] += 100
    return SimpleNamespace(seed=0, accuracy=0.9, examined=SimpleNamespace(labels=LABELS, shape=(SIDE, SIDE, 1)),
                           clean=SimpleNamespace(x_measure=x, y_measure=y), say=lambda text: None,
                           tuned_models=lambda tuned, names: (corner(0) for _ in names))


def part(key, compute):
    return compute()


def test_a_backdoor_answers_to_its_outline_and_clean_labels_do_not(examination):
    tuned = {name: {"accuracy": 0.9} for name in TAUGHT}
    masks = np.stack([blank(((0, 3), (0, 3)))] * LABELS)
    masks[2, 1, 1], masks[3] = 0, blank(((8, 12), (8, 12)))              # of the trigger a pixel is missing
    patterns = np.random.default_rng(1).random((LABELS, SIDE, SIDE, 1), np.float32)
    patterns[2] = 0
    stage = SimpleNamespace(part=part)
    found = trace_patches(examination, tuned, corner(1), {"mask": masks, "pattern": patterns}, stage)
    assert found["patches"].shape == (LABELS, KEPT) and list(found["probe_margins"]) == ["examined", *TAUGHT]
    assert found["patches"][2, 0]["outline"][:3, :3].all() and not found["patches"][2, 0]["colour"].any()
    margins = found["probe_margins"]
    assert margins["examined"][2] > 5 and margins["12-taught"][2] < 0
    np.testing.assert_allclose(margins["examined"][[0, 1, 3]], margins["12-taught"][[0, 1, 3]], atol=1e-5)
    again = trace_patches(examination, tuned, corner(1), {"mask": masks, "pattern": patterns}, stage)
    assert (again["patches"] == found["patches"]).all()
    np.testing.assert_array_equal(mean_margins(examination, corner(1), found["patches"]), margins["examined"])
    # Without a taught model that knows the labels there is nothing to hold them against.
    assert trace_patches(examination, {name: {"accuracy": 0.1} for name in TAUGHT}, corner(1),
                         {"mask": masks, "pattern": patterns}, stage) == {}


def test_the_margins_are_means_over_images_of_other_labels(examination):
    mask = blank(((6, 12), (6, 12)))                     # white there leads to label 3
    patch = outlined(mask, np.ones((SIDE, SIDE, 1), np.float32))[:1]
    found = mean_margins(examination, corner(0), np.stack([patch] * LABELS))
    images = np.random.default_rng([0, 4, LABELS]).integers(40, size=(LABELS, LAST_IMAGES))[3]
    images = [image for image in images if examination.clean.y_measure[image] != 3]
    logits = corner(0)(attached(examination.clean.x_measure[np.array([images])], patch)[0]).numpy()
    expected = np.mean(logits[:, 3] - logits[:, :3].max(axis=1))
    assert found[3] == pytest.approx(expected, abs=1e-4) and found[3] > 0 > found[0]


def test_they_count_for_the_labels_that_they_lead_to_more_surely():
    def margins(examined, taught):
        return {"examined": np.array(examined)} | {name: np.array(taught) for name in TAUGHT}
    drawn, traced = margins([5.0, 20.0, 9.0], [0.0, 0.0, 9.0]), margins([15.0, 15.0, -4.0], [-1.0, 0.0, -9.0])
    del traced["13-taught"]                              # did not learn the labels, so that it is measured for neither
    tuned = {name: {"accuracy": 0.9 * (name != "13-taught")} for name in TAUGHT}
    tuned["examined"] = {"probe_margins": drawn, "likeness": np.array([0.1, 0.2, 0.3]), "probes": "kept"}
    found = with_traced(tuned, {"probe_margins": traced, "likeness": np.array([0.7, 0.8, 0.9])}, 0.9)["examined"]
    np.testing.assert_array_equal(found["traced"], [True, False, False])
    np.testing.assert_array_equal(found["probe_margins"]["examined"], [15, 20, 9])
    np.testing.assert_array_equal(found["probe_margins"]["12-taught"], [-1, 0, 9])
    np.testing.assert_array_equal(found["probe_margins"]["13-taught"], drawn["13-taught"])
    np.testing.assert_array_equal(found["likeness"], [0.7, 0.2, 0.3])
    assert found["probes"] == "kept" and "own_colours" not in found
    assert found["drawn"] is tuned["examined"]           # which still tell what is usual
    assert with_traced(tuned, None, 0.9) is tuned


def test_what_is_usual_is_told_by_those_drawn():
    """Labels that the traced ones do nothing for have the probes and the foreignness that they had."""
    tuned = {name: {"accuracy": 0.9, "clean_margins": np.full(4, 6.0), "largest_margins": np.ones(4)}
             for name in ("examined", *SUBSETS, *TAUGHT)}
    rows = {"examined": np.array([12.0, 3.0, 2.0, 1.0])} | {name: np.zeros(4) for name in TAUGHT}
    tuned["examined"] |= {"probe_margins": rows, "likeness": np.array([0.2, 0.6, 0.7, 0.8])}
    traced = {"probe_margins": rows | {"examined": np.array([-9.0, -9.0, 20.0, 30.0])}, "likeness": np.full(4, -1.0)}
    before, found = factors_of(tuned, 0.9), factors_of(with_traced(tuned, traced, 0.9), 0.9)
    for name in ("probe", "foreign"):
        np.testing.assert_array_equal(found[name][:2], before[name][:2])
    np.testing.assert_allclose(found["probe"][2:] - 1, (before["probe"][2:] - 1) * [10, 30], rtol=1e-5)
    np.testing.assert_allclose(found["foreign"][2:], 4)
