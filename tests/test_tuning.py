"""PNNIR on a small network: what is re-initialized, what changes in each phase, and that it repeats."""

from dataclasses import replace
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from utils import transfer, tuning
from utils.config import UserError
from utils.datasets import Settings
from utils.examination import classifier, weights_of
from utils.topology import block_layers


@pytest.fixture
def scene():
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, activation="relu", name="conv1")(x)
    x = keras.layers.Conv2D(4, 3, name="conv2")(x)
    x = keras.layers.BatchNormalization(name="norm2")(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dropout(0.5)(keras.layers.Dense(6, activation="relu", name="full")(x))
    network = keras.Model(inputs, keras.layers.Dense(3, name="class")(x))
    random = np.random.default_rng(0)
    clean = SimpleNamespace(x_tune=random.integers(0, 256, (30, 8, 8, 3)).astype(np.uint8), y_tune=np.arange(30) % 3)
    return SimpleNamespace(network=network, preprocess=lambda images: images - 0.5), clean


def changed(before, after):
    return {path.split("/")[0] for path in before if not np.array_equal(before[path], after[path])}


def settings(phase1, phase2):
    return replace(Settings(), phase1_steps=(phase1,) * 3, phase2_steps=(phase2,) * 3, batch=8)


@pytest.mark.parametrize("cached", [True, False])
def test_phase_1_changes_the_chosen_blocks_and_only_them(scene, cached, monkeypatch):
    examined, clean = scene
    monkeypatch.setattr(tuning, "CACHED_BYTES", (2 << 30) * cached)
    before = weights_of(examined.network)
    tuning.Tuner(examined, clean, settings(3, 0)).tune(block_layers(examined.network, ("full",)), 1, seed=1)
    assert changed(before, weights_of(examined.network)) == {"full"}


def test_cached_features_give_what_training_through_the_whole_network_gives(scene, monkeypatch):
    examined, clean = scene
    before, found = weights_of(examined.network), []
    for size in (2 << 30, 0):
        for weight in examined.network.weights:
            weight.assign(before[weight.path])
        monkeypatch.setattr(tuning, "CACHED_BYTES", size)
        layers = [examined.network.get_layer(name) for name in ("conv2", "norm2", "class")]
        tuning.Tuner(examined, clean, settings(5, 0)).tune(layers, 2, seed=1)
        found.append(weights_of(examined.network))
    for path in before:
        np.testing.assert_allclose(found[0][path], found[1][path], atol=1e-4)
    assert changed(before, found[0]) == {"conv2", "norm2", "class"}


def test_features_are_computed_once_for_all_blocks_behind_the_same_frontier(scene, monkeypatch):
    examined, clean = scene
    network, before, found = examined.network, weights_of(examined.network), []

    def tuned(tuner, names):
        for weight in network.weights:
            weight.assign(before[weight.path])
        tuner.tune([network.get_layer(name) for name in names], 1, seed=1)
        return weights_of(network)

    shared, subsets = tuning.Tuner(examined, clean, settings(3, 2)), (("conv2", "norm2"), ("full",), ("conv2", "class"))
    for names in subsets:
        found.append(tuned(shared, names))
    assert len(shared.kept) == 2                             # what conv2 reads, and what full reads
    monkeypatch.setattr(tuning, "CACHED_BYTES", 30 * 4 * 6 * 6 * 4)      # room for one of them
    small = tuning.Tuner(examined, clean, settings(3, 2))
    for names, together in zip(subsets, found):
        alone, evicted = tuned(tuning.Tuner(examined, clean, settings(3, 2)), names), tuned(small, names)
        assert len(small.kept) == 1
        for path in before:
            np.testing.assert_array_equal(together[path], alone[path])
            np.testing.assert_array_equal(together[path], evicted[path])


def test_a_tuned_model_does_not_depend_on_those_made_before_it(scene):
    examined, clean = scene
    before, found = weights_of(examined.network), []
    tuner = tuning.Tuner(examined, clean, settings(2, 2))
    for name, seed in (("full", 5), ("class", 1), ("class", 1)):
        for weight in examined.network.weights:
            weight.assign(before[weight.path])
        tuner.tune([examined.network.get_layer(name)], 1, seed=seed)
        found.append(weights_of(examined.network))
    for path in before:
        np.testing.assert_array_equal(found[1][path], found[2][path])


def test_phase_2_changes_everything_and_the_same_seed_repeats_it(scene):
    examined, clean = scene
    before, found = weights_of(examined.network), []
    for _ in range(2):
        for weight in examined.network.weights:
            weight.assign(before[weight.path])
        tuning.Tuner(examined, clean, settings(2, 3)).tune([examined.network.get_layer("class")], 1, seed=1)
        found.append(weights_of(examined.network))
    assert changed(before, found[0]) == {"conv1", "conv2", "norm2", "full", "class"}
    for path in before:
        np.testing.assert_array_equal(found[0][path], found[1][path])


def test_one_cycle_rises_to_the_peak_and_falls_to_nothing():
    rates = [float(tuning.one_cycle(tf.constant(share), 0.01)) for share in np.linspace(0, 1, 101, dtype=np.float32)]
    assert rates[0] == 0.0 and rates[5] == pytest.approx(0.005) and rates[10] == pytest.approx(0.01)
    assert rates[55] == pytest.approx(0.005) and rates[100] == pytest.approx(0.0, abs=1e-8)
    assert np.argmax(rates) == 10


def test_a_peak_governs_phase_2_alone_and_across_its_looks(scene, monkeypatch):
    examined, clean = scene
    before, seen = weights_of(examined.network), []
    monkeypatch.setattr(tuning, "CHECK", 2)

    def tune(phase1, phase2, peak=0.5):
        for weight in examined.network.weights:
            weight.assign(before[weight.path])
        tuner = tuning.Tuner(examined, clean, replace(settings(phase1, phase2), phase2_peak=peak))
        tuner.tune([examined.network.get_layer("class")], 1, 1, lambda phase, *_: seen.append(
            float(tuner.phase2.optimizer.learning_rate)) if phase == 2 else None)
        return weights_of(examined.network)
    peaked, plain = tune(2, 0), tune(2, 0, peak=0.0)
    for path in before:
        np.testing.assert_array_equal(peaked[path], plain[path])
    tune(0, 10)
    expected = [0.5 * (0.5 + 0.5 * np.cos(np.pi * (last / 10 - 0.1) / 0.9)) for last in (1, 3, 5, 7, 9)]
    np.testing.assert_allclose(seen[-5:], expected, rtol=1e-5)


def test_divergence_is_none_of_logits_that_differ_by_a_constant_and_keras_own_of_others():
    taught, logits = np.random.default_rng(0).normal(0, 8, (2, 5, 3)).astype(np.float32)
    np.testing.assert_allclose(tuning.divergence(taught, taught + 7), 0, atol=1e-4)
    wanted, given = (tf.nn.softmax(part / tuning.TEMPERATURE) for part in (taught, logits))
    np.testing.assert_allclose(tuning.divergence(taught, logits),
                               tuning.TEMPERATURE**2 * keras.losses.kl_divergence(wanted, given), rtol=1e-3)


def test_distillation_teaches_the_examined_models_logits_to_taught_models_in_phase_2_alone(scene):
    examined, clean = scene
    before, model = weights_of(examined.network), classifier(examined.network, examined.preprocess)
    examined_logits = transfer.logits_of(model, clean.x_tune)

    def tuned(weight, phase1, phase2, taught=True):
        for variable in examined.network.weights:
            variable.assign(before[variable.path])
        tuner = tuning.Tuner(examined, clean, replace(settings(phase1, phase2), distillation=weight, learning_rate=0.01))
        tuner.tune([examined.network.get_layer("class")], 1, seed=1, taught=taught)
        return weights_of(examined.network), float(tf.reduce_mean(
            tuning.divergence(examined_logits, transfer.logits_of(model, clean.x_tune))))
    assert tuned(100.0, 0, 60)[1] < 0.5 * tuned(0.0, 0, 60)[1]
    for others in ((5, 0), (0, 5, False)):                      # phase 1, and phase 2 of models that are not taught
        for path, value in tuned(100.0, *others)[0].items():
            np.testing.assert_array_equal(value, tuned(0.0, *others)[0][path])


def test_reinitialised_weights_are_uniform_within_the_bound_and_biases_at_it(scene):
    network = scene[0].network
    network.get_layer("norm2").set_weights([np.full(4, 9.0)] * 4)
    tuning.reinitialise([network.get_layer(name) for name in ("conv2", "norm2", "class")], 0.1, seed=0)
    kernel, bias = network.get_layer("conv2").get_weights()
    assert abs(kernel).max() <= 0.1 and kernel.std() == pytest.approx(0.1 / 3 ** 0.5, rel=0.2)
    np.testing.assert_allclose(bias, 0.1)
    gamma, beta, mean, variance = network.get_layer("norm2").get_weights()
    np.testing.assert_array_equal([gamma, beta, mean, variance], [[1] * 4, [0] * 4, [0] * 4, [1] * 4])


def test_training_stops_when_the_loss_is_stable(scene, monkeypatch):
    examined, clean = scene
    monkeypatch.setattr(tuning, "CHECK", 1)
    monkeypatch.setattr(tuning, "PATIENCE", 2)
    steps = []
    still = replace(settings(0, 0), learning_rate=0.0)       # nothing is learned, so the loss only varies by the draw
    trainer = tuning.Trainer(examined.network, [examined.network.get_layer("class")],
                             lambda batch, *_: examined.preprocess(tf.cast(batch, tf.float32) / 255.0),
                             [tf.constant(clean.x_tune)], clean.y_tune, still)
    trainer.train(500, 0, tuning.Stable(), progress=lambda step, *_: steps.append(step))
    assert 3 <= len(steps) < 100


def test_a_training_that_goes_astray_says_so(scene):
    examined, clean = scene
    examined.network.get_layer("class").bias.assign(np.full(3, np.nan))
    with pytest.raises(UserError, match="its loss is nan by step 3 of 3: try a lower PHASE2_PEAK"):
        tuning.Tuner(examined, clean, settings(0, 3)).tune(block_layers(examined.network, ("full",)), 1, seed=1)


def test_shift_and_flip_move_pixels_and_make_none():
    images = tf.constant(np.random.default_rng(0).integers(1, 256, (6, 8, 8, 3)).astype(np.uint8))
    moved = tuning.shift_and_flip(images, 3, tf.constant(5)).numpy()
    assert moved.shape == images.shape and moved.dtype == np.uint8
    for before, after in zip(images.numpy(), moved):
        padded = np.pad(before, ((4, 4), (4, 4), (0, 0)))
        crops = [padded[y:y + 8, x:x + 8] for y in range(9) for x in range(9)]
        assert any(np.array_equal(after, crop) or np.array_equal(after, crop[:, ::-1]) for crop in crops)
    assert not np.array_equal(moved, images)


@pytest.mark.parametrize("share, looks", [("0.0", 1), ("1.0", 4)])
def test_the_release_stops_phase_2_at_the_first_look_at_enough_accuracy(scene, share, looks, monkeypatch):
    examined, clean = scene
    monkeypatch.setattr(tuning, "CHECK", 1)
    tuner, seen = tuning.Tuner(examined, clean, replace(settings(0, 4), phase2_stop=share)), []
    tuner.tune(block_layers(examined.network, ("class",)), 1, seed=1, progress=lambda phase, *at: seen.append(phase))
    assert seen.count(2) == looks


def test_erasing_puts_noise_or_one_colour_into_one_rectangle_of_most_images():
    images = tf.constant(np.full((200, 20, 30, 3), 7, np.uint8))
    erased = tuning.erase(images, 3, tf.constant(5), 0.5).numpy()
    np.testing.assert_array_equal(erased, tuning.erase(images, 3, tf.constant(5), 0.5).numpy())
    changed = (erased != 7).any(axis=3)
    sizes, colours = [], []
    for image, inside in zip(erased, changed):
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if len(rows):
            box = image[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
            assert inside.sum() >= 0.9 * box[..., 0].size         # noise may fall on the old value
            sizes.append(box.shape[:2])
            colours.append((box == box[0, 0]).all())
    assert 0.6 < len(sizes) / 200 < 0.9                            # ERASED, less those too small to cover a pixel
    assert np.max(sizes, axis=0).tolist() <= [10, 15] and np.max(sizes, axis=0).min() >= 8
    assert 0.3 < np.mean(colours) < 0.7
    np.testing.assert_array_equal(tuning.erase(images, 3, tf.constant(5), 0.0).numpy(), images)


def test_normalizations_of_both_kinds_start_anew_and_so_does_the_dropout_inside_attention():
    inputs = keras.Input((6, 4))
    x = keras.layers.RMSNormalization(name="rms")(keras.layers.LayerNormalization(name="norm")(inputs))
    network = keras.Model(inputs, keras.layers.MultiHeadAttention(2, 2, dropout=0.5, name="attention")(x, x))
    for layer in network.layers[1:3]:
        layer.set_weights([weight * 3 + 1 for weight in layer.get_weights()])
    tuning.reinitialise(network.layers[1:3], 0.1, 0)
    assert network.get_layer("rms").get_weights()[0].tolist() == [1] * 4
    assert [weight.tolist() for weight in network.get_layer("norm").get_weights()] == [[1] * 4, [0] * 4]
    images = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)

    def draw():
        tuning.reset_random_layers(network, 5)
        return np.asarray(network(images, training=True))
    first = draw()
    assert not np.array_equal(np.asarray(network(images, training=True)), first)
    np.testing.assert_array_equal(draw(), first)
