"""Grad-CAM against a network whose map is known in closed form, and the threshold search against all thresholds."""

import cv2
import keras
import numpy as np
import pytest
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
        maps, logits = heat(tf.constant(images), tf.constant(target))
        np.testing.assert_allclose(maps, expected, atol=1e-4)
        np.testing.assert_allclose(logits, images.mean(axis=(1, 2)) @ weights, atol=1e-5)


def test_heat_map_is_the_mean_of_the_maps_of_images_taken_one_by_one(monkeypatch):
    inputs = keras.Input((8, 10, 3))
    features = keras.layers.Conv2D(4, 3, strides=2, activation="relu", name="features")(inputs)
    network = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(features)))
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (7, 8, 10, 3)).astype(np.uint8)
    trigger = {"mask": random.uniform(size=(8, 10)).astype(np.float32),
               "pattern": random.uniform(size=(8, 10, 3)).astype(np.float32)}
    heat = preservation.grad_cam(network, "features")
    monkeypatch.setattr(transfer, "PIXELS", 3 * 80)          # batches of three
    found, logits = preservation.heat_map(heat, lambda x: x - 0.5, images, trigger, 2)
    total = 0
    for image, row in zip(images, logits):
        attached = transfer.attach(image[None], trigger) - 0.5
        maps, _ = heat(attached, tf.constant(2))
        total += cv2.resize(maps.numpy()[0], (10, 8), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_allclose(row, network(attached)[0], atol=1e-5)
    np.testing.assert_allclose(found, total / total.max(), atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_search_gives_the_largest_threshold_that_keeps_the_asr(seed):
    """The model calls an image infected when enough of the pattern's brightness arrives, varied by the image."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 120, (60, 6, 6, 1)).astype(np.uint8)
    heat = random.uniform(size=(6, 6)).astype(np.float32)
    mask = random.uniform(size=(6, 6)) * (0.001 + (heat > 0.3))          # cold pixels carry next to nothing
    trigger = {"mask": mask.astype(np.float32), "pattern": np.ones((6, 6, 1), np.float32)}

    attached = transfer.attach(images, trigger)
    enough = np.quantile(attached.numpy().mean(axis=(1, 2, 3)), 0.2)     # so that the whole trigger reaches an ASR of 80 %
    seen = []

    def model(x):
        seen.append(len(x))
        bright = tf.reduce_mean(x, axis=(1, 2, 3))
        return tf.stack([enough * tf.ones_like(bright), bright], axis=1)

    def asr(mask):
        return (transfer.logits_of(model, transfer.attach(images, trigger | {"mask": mask})).argmax(axis=1) == 1).mean()

    full = asr(trigger["mask"])
    assert 0.7 < full < 0.9
    thresholds = np.arange(100, -1, -1) / 100
    asrs = [asr(trigger["mask"] * (heat >= t)) for t in thresholds]
    expected = next(t for t, reached in zip(thresholds, asrs) if reached >= 0.95 * full - 1e-6)
    logits = model(attached).numpy()
    seen.clear()
    threshold, mask = preservation.preserve(model, images, trigger, 1, heat, 0.95, logits)
    assert threshold == expected
    np.testing.assert_array_equal(mask, trigger["mask"] * (heat >= threshold))
    assert 0 < (mask > 0).sum() < 36
    assert sum(seen) < 5 * len(images)                       # of the 100 times as many that all thresholds take


def test_a_trigger_that_needs_every_pixel_keeps_its_mask():
    random = np.random.default_rng(0)
    heat = random.uniform(size=(6, 6)).astype(np.float32)
    heat[0, 0] = 0.0                                         # the coldest pixel carries the whole trigger
    images = np.zeros((20, 6, 6, 1), np.uint8)
    trigger = {"mask": np.ones((6, 6), np.float32), "pattern": np.ones((6, 6, 1), np.float32)}

    def model(x):
        return tf.stack([0.5 * tf.ones(len(x)), tf.convert_to_tensor(x)[:, 0, 0, 0]], axis=1)

    logits = model(transfer.attach(images, trigger)).numpy()
    threshold, mask = preservation.preserve(model, images, trigger, 1, heat, 0.95, logits)
    assert threshold == 0.0
    np.testing.assert_array_equal(mask, trigger["mask"])
