"""Grad-CAM against a network whose map is known in closed form, and the threshold search against all thresholds."""

import keras
import numpy as np
import tensorflow as tf

from utils import preservation, transfer


def test_grad_cam_of_a_linear_network_has_a_closed_form():
    """With logits Σ_k v_kt·mean(a_k) over an h×w map, every gradient is v_kt / (h·w)."""
    weights = np.array([[0.5, -1.0], [2.0, 0.3], [-0.7, 1.1]], np.float32)
    inputs = keras.Input((4, 5, 3))
    features = keras.layers.Activation("linear", name="features")(inputs)
    outputs = keras.layers.Dense(2, use_bias=False, name="class")(keras.layers.GlobalAveragePooling2D()(features))
    network = keras.Model(inputs, outputs)
    network.get_layer("class").set_weights([weights])
    images = np.random.default_rng(0).uniform(size=(2, 4, 5, 3)).astype(np.float32)
    heat = preservation.grad_cam(network, "features")
    for target in (0, 1):
        gradient = weights[:, target] / 20
        w = gradient / (np.sqrt((gradient ** 2).mean()) + 1e-5)
        expected = np.maximum(1 + (images * w).sum(-1), 0)
        expected /= expected.max(axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(heat(tf.constant(images), tf.constant(target)), expected, atol=1e-4)


def test_search_gives_the_largest_threshold_that_keeps_the_asr():
    """The model calls an image infected when enough of the pattern's brightness arrives, varied by the image."""
    random = np.random.default_rng(3)
    images = random.integers(0, 120, (60, 6, 6, 1)).astype(np.uint8)
    heat = random.uniform(size=(6, 6)).astype(np.float32)
    mask = random.uniform(size=(6, 6)) * (0.001 + (heat > 0.3))          # cold pixels carry next to nothing
    trigger = {"mask": mask.astype(np.float32), "pattern": np.ones((6, 6, 1), np.float32)}

    attached = transfer.attach(images, trigger).numpy().mean(axis=(1, 2, 3))
    enough = np.quantile(attached, 0.2)                      # so that the whole trigger reaches an ASR of 80 %

    def model(x):
        bright = tf.reduce_mean(x, axis=(1, 2, 3))
        return tf.stack([enough * tf.ones_like(bright), bright], axis=1)

    def asr(mask):
        return transfer.measure(model, images, trigger | {"mask": mask}, 1)[0]

    full = asr(trigger["mask"])
    assert 0.7 < full < 0.9
    expected = next(t for t in np.arange(100, -1, -1) / 100 if asr(trigger["mask"] * (heat >= t)) >= 0.95 * full - 1e-6)
    threshold, mask = preservation.preserve(model, images, trigger, 1, heat, 0.95)
    assert threshold == expected
    np.testing.assert_array_equal(mask, trigger["mask"] * (heat >= threshold))
    assert 0 < (mask > 0).sum() < 36
