"""Whether patches drive a label by the features of its own images."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest

from utils.config import UserError
from utils.foreignness import LEAST, MOST, foreignness, likeness
from utils.plain_patches import PLAIN, draw, rendered
from utils.topology import last_features

SIDE = 4                 # of a quadrant


def quadrants(*bright):
    """Grey 8×8 images of which one quadrant each is brighter, uint8."""
    random = np.random.default_rng(0)
    images = random.integers(90, 110, (len(bright), 2 * SIDE, 2 * SIDE, 1)).astype(np.uint8)
    for image, which in zip(images, bright):
        row, column = SIDE * (which // 2), SIDE * (which % 2)
        image[row:row + SIDE, column:column + SIDE] += 60
    return images


def white(quadrant):
    """A white square that covers a quadrant, four times."""
    patch = draw(np.random.default_rng(0), (2 * SIDE, 2 * SIDE, 1))
    patch["side"], patch["pieces"], patch["turned"], patch["disc"], patch["kind"] = SIDE, 1, 0, 0, PLAIN
    patch["row"], patch["column"], patch["one"] = SIDE * (quadrant // 2), SIDE * (quadrant % 2), 1
    return [patch] * 4


HIDDEN = np.array([white(3), white(1), white(2)])        # of a backdoor of label 0


def shown(probes):
    return lambda label: rendered(probes[label], (2 * SIDE, 2 * SIDE, 1))


def network_of(kernel):
    """Its features are the brightness of the quadrants, in order; kernel: 4×labels."""
    images = keras.Input((2 * SIDE, 2 * SIDE, 1))
    features = keras.layers.Flatten()(keras.layers.AveragePooling2D(SIDE)(images))
    network = keras.Model(images, keras.layers.Dense(kernel.shape[1])(features))
    network.layers[-1].set_weights([kernel, np.zeros(kernel.shape[1])])
    return network


@pytest.fixture
def examination():
    y = np.arange(30) % 3
    others = np.stack([np.flatnonzero(y != label) for label in range(3)])
    clean = SimpleNamespace(x_tune=quadrants(*y), y_tune=y, x_measure=quadrants(*y), y_measure=y)
    return SimpleNamespace(clean=clean, measured=others,
                           examined=SimpleNamespace(labels=3, preprocess=lambda images: images))


def test_patches_that_do_not_drive_what_own_images_drive_are_foreign(examination):
    # The last quadrant, bright in no image, leads to label 0 as its first one does: a backdoor.
    network = network_of(np.float32([[2, 0, 0], [0, 2, 0], [0, 0, 2], [2, 0, 0]]))
    hidden = likeness(examination, network, shown(HIDDEN))["likeness"]
    assert hidden.dtype == np.float32 and hidden.shape == (3,)
    assert hidden[0] < 0.1 and (hidden[1:] > 0.95).all()
    clean = likeness(examination, network, shown(np.array([white(0), white(1), white(2)])))["likeness"]
    assert (clean > 0.95).all()
    assert foreignness({"examined": {"likeness": hidden}})[0] == MOST
    # The nearest images count, not all of them: two bright in the last quadrant as well explain the patch.
    examination.clean.x_tune[[0, 3], SIDE:, SIDE:] = 160
    assert likeness(examination, network, shown(HIDDEN))["likeness"][0] > hidden[0] + 0.3


def test_a_network_without_a_dense_end_tells_nothing(examination):
    images = keras.Input((2 * SIDE, 2 * SIDE, 1))
    network = keras.Model(images, keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(3, 1)(images)))
    assert likeness(examination, network, shown(HIDDEN)) == {}


def test_features_that_are_no_numbers_are_refused(examination):
    with pytest.raises(UserError, match="NaN or infinite features"):
        likeness(examination, network_of(np.full((4, 3), np.nan, np.float32)), shown(HIDDEN))


def test_features_are_those_before_the_last_layer_with_weights():
    kernel = np.arange(12, dtype=np.float32).reshape(4, 3)
    network = network_of(kernel)
    logits = keras.layers.Reshape((3,))(keras.layers.Activation("linear")(network.outputs[0]))
    features, found = last_features(keras.Model(network.inputs, logits))
    np.testing.assert_array_equal(found, kernel)
    np.testing.assert_allclose(features(np.ones((1, 2 * SIDE, 2 * SIDE, 1))), np.ones((1, 4)))


def test_foreignness_is_of_the_median_label_and_bounded():
    def of(*like):
        return foreignness({"examined": {"likeness": np.float32(like)}})
    np.testing.assert_allclose(of(0.72, 0.82, 0.96), [1.5, 1, LEAST], rtol=1e-4)
    np.testing.assert_allclose(of(-0.5, 0.82, 0.92), [MOST, 1, LEAST], rtol=1e-4)
    np.testing.assert_allclose(of(0.99, 1.0, 1.0), [1.5, 1, 1], rtol=1e-4)             # all alike: hardly a multiple
