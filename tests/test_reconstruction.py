"""Reconstruction: labels together are labels one at a time, and the objective is the paper's."""

import zlib
from dataclasses import replace
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from utils import reconstruction as reconstruction_module
from utils import transfer
from utils.clean_data import Sampler, images_of_all, images_of_others
from utils.config import UserError
from utils.datasets import Settings
from utils.reconstruction import (ColourTrigger, PatchTrigger, Reconstructor, reconstruct_filters, reconstruct_patches,
                                  reconstruction)

LABELS, SHAPE = 4, (8, 8, 3)


def small_network(seed):
    keras.utils.set_random_seed(seed)
    network = keras.Sequential([keras.Input(SHAPE), keras.layers.Conv2D(4, 3, activation="relu"),
                                keras.layers.Flatten(), keras.layers.Dense(LABELS)])
    return tf.function(lambda images: network(images, training=False))


@pytest.fixture(scope="module")
def scene():
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (40, *SHAPE)).astype(np.uint8)
    labels = np.arange(40) % LABELS
    return small_network(1), small_network(2), tf.constant(images), labels


@pytest.mark.parametrize("kind, change", [
    (PatchTrigger, {"steps": 12, "mask_start": 0.4, "pixel_price": 0.04}), (ColourTrigger, {"filter_steps": 12})])
def test_labels_together_give_what_one_at_a_time_gives(scene, kind, change):
    attacked, control, images, labels = scene
    settings = replace(Settings(), **change)
    sampler = Sampler(labels, LABELS)

    def found(targets):
        trigger = kind(targets, SHAPE, settings, 3)
        return reconstruction(trigger, attacked, control, images, sampler, settings, 3)(targets)

    together = found(list(range(LABELS)))
    for target in range(LABELS):
        alone = found([target])
        for name in together:
            # Adam magnifies rounding where gradients are small.
            np.testing.assert_allclose(together[name][target], alone[name][0], atol=2e-3)


@pytest.mark.parametrize("kind", [PatchTrigger, ColourTrigger])
def test_all_chunks_share_one_compilation_and_give_what_one_chunk_gives(scene, kind):
    _, control, images, labels = scene
    network, traced, parts = small_network(1), [], []

    def attacked(x):
        traced.append(x) if not tf.executing_eagerly() else None
        return network(x)

    clean = SimpleNamespace(x_tune=images.numpy(), y_tune=labels, x_measure=images.numpy())
    examination = SimpleNamespace(
        examined=SimpleNamespace(shape=SHAPE, labels=LABELS), clean=clean, x_tune=images, seed=3, say=lambda text: None,
        settings=replace(Settings(), steps=6, filter_steps=6, mask_start=0.4, pixel_price=0.04),
        measured=images_of_others(labels, range(LABELS), 20, 3), evenly=images_of_all(labels, 20, 3))
    stage = SimpleNamespace(part=lambda key, compute: parts.append(key) or compute())
    found, compilations = [], []
    for chunk in (4, 2, 3, 1):
        traced.clear()
        models = {"examined": attacked, "123": control}
        found.append(Reconstructor(kind, examination, models, "examined/123", stage, chunk)([0, 2, 3]))
        compilations.append(len(traced))
    # A run that goes on with a short chunk, and later labels in a larger one than the first.
    done = {key_of("examined-123", [0, 2]): {name: array[:2] for name, array in found[0].items()}}
    stopped = SimpleNamespace(part=lambda key, compute: done[key] if key in done else compute())
    reconstruct = Reconstructor(kind, examination, models, "examined/123", stopped, 2)
    found.append(reconstruct([0, 2, 3]))
    four = Reconstructor(kind, examination, models, "examined/123", stage, 3)
    grown = [four([0, 2, 3, 1])["cost"][:2], four([0, 2, 3])["cost"][:2]]
    np.testing.assert_allclose(grown[0], grown[1], atol=2e-3)
    del parts[-3:]
    assert parts == [key_of("examined-123", labels) for labels in ([0, 2, 3], [0, 2], [3], [0, 2, 3], [0], [2], [3])]
    assert compilations == compilations[:1] * 4
    assert ("collapse" in found[0]) == (kind is ColourTrigger)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, array in found[0].items():
            # Adam magnifies rounding where gradients are small.
            np.testing.assert_allclose(other[name], array, atol=5e-2 if name in ("asr", "collapse") else 5e-3)
    np.testing.assert_array_equal(found[1]["label"], [0, 2, 3])

    traced.clear()
    reconstruct = Reconstructor(kind, examination, models, "examined/123", stage, 4)
    for restart in (0, 2, 0, 2):      # another start is other draws, but not another compilation
        found.append(reconstruct([0, 2, 3], restart))
    whole = key_of("examined-123", [0, 2, 3])
    assert parts[-2:] == [whole, whole + "-again-2"] and len(traced) == compilations[0]
    anew = Reconstructor(kind, examination, models, "examined/123", stage, 4)([0, 2, 3], 2)
    for name, array in anew.items():
        np.testing.assert_array_equal(found[-2][name], found[0][name])
        np.testing.assert_array_equal(found[-1][name], array)
    assert not np.array_equal(anew["cost" if kind is PatchTrigger else "entropy"], found[0]["cost"])


def test_a_first_round_keeps_the_cheapest_labels_and_marks_the_others(scene):
    attacked, control, images, labels = scene
    clean = SimpleNamespace(x_tune=images.numpy(), y_tune=labels, x_measure=images.numpy())
    settings = replace(Settings(), steps=9, mask_start=0.4, pixel_price=0.04, controls=("123/examined",))

    def found(**changes):
        examination = SimpleNamespace(
            examined=SimpleNamespace(shape=SHAPE, labels=LABELS), clean=clean, x_tune=images, seed=3, say=lambda text: None,
            settings=replace(settings, **changes), measured=images_of_others(labels, range(LABELS), 20, 3))
        stage = SimpleNamespace(part=lambda key, compute: compute())
        return reconstruct_patches(examination, {"examined": attacked, "123": control}, stage)

    screened, short, whole = found(screen_share=0.4, screen_steps=3), found(steps=3), found()
    kept = np.sort(np.argsort(short["cost"])[:2])
    np.testing.assert_array_equal(np.flatnonzero(~screened.pop("dropped")), kept)
    others = np.setdiff1d(range(LABELS), kept)
    assert screened.keys() == whole.keys() and "dropped" not in whole
    for name, array in screened.items():
        # Adam magnifies rounding where gradients are small.
        np.testing.assert_allclose(array[kept], whole[name][kept], atol=5e-3)
        np.testing.assert_allclose(array[others], short[name][others], atol=5e-3)
    with pytest.raises(UserError, match="SCREEN_SHARE 0.4 .* SETTINGS default"):
        found(screen_share=0.4, controls=())


def test_of_several_filters_the_best_is_kept_that_leaves_something_to_see(monkeypatch):
    starts = [{"cost": [3.0, 1.0, 0.1, 2.0], "collapse": [0.1, 0.1, 0.9, 0.9]},
              {"cost": [2.0, 2.0, 1.0, 1.0], "collapse": [0.1, 0.1, 0.2, 0.8]},
              {"cost": [2.5, 0.5, 2.0, 9.0], "collapse": [0.1, 0.9, 0.1, 0.3]}]
    asked = []

    def reconstructor(kind, examination, models, pair, stage, labels_at_once):
        def reconstruct(labels, restart):
            asked.append((kind, pair, restart))
            arrays = {name: np.array(values) for name, values in starts[restart].items()}
            return arrays | {"matrix": np.full((len(labels), 3, 3), restart)}
        return reconstruct
    monkeypatch.setattr(reconstruction_module, "Reconstructor", reconstructor)
    examination = SimpleNamespace(examined=SimpleNamespace(labels=4), settings=replace(Settings(), filter_restarts=2))
    arrays = reconstruct_filters(examination, {}, None)
    assert asked == [(ColourTrigger, "examined/123", restart) for restart in range(3)]
    np.testing.assert_array_equal(arrays["matrix"][:, 0, 0], [1, 0, 1, 2])
    np.testing.assert_array_equal(arrays["cost"], [2.0, 1.0, 1.0, 9.0])


def test_measuring_labels_together_is_measuring_them_one_by_one(scene, monkeypatch):
    model, _, images, labels = scene
    random, images = np.random.default_rng(0), images.numpy()
    arrays = {"mask": random.uniform(size=(3, 8, 8)).astype(np.float32),
              "pattern": random.uniform(size=(3, *SHAPE)).astype(np.float32)}
    chosen, targets = images_of_others(labels, range(LABELS), 11, 0)[1:], [1, 2, 3]
    expected, one_label, evenly = [], [], images_of_all(labels, 11, 0)
    for row, target in enumerate(targets):
        attached = transfer.attach(images[chosen[row]], transfer.trigger_of(arrays, row))
        logits = model(attached).numpy()
        entropy = keras.losses.sparse_categorical_crossentropy(np.full(11, target), logits, from_logits=True)
        expected.append([np.mean(logits.argmax(1) == target), np.mean(entropy)])
        share = np.bincount(model(transfer.attach(images[evenly], transfer.trigger_of(arrays, row))).numpy().argmax(1)).max()
        one_label.append((share / len(evenly) - 1 / LABELS) / (1 - 1 / LABELS))
    for images_at_once in (4, 25, 100):
        monkeypatch.setattr(transfer, "PIXELS", images_at_once * 64)
        measured = np.transpose(transfer.measure(model, images, chosen, arrays, targets))
        np.testing.assert_allclose(measured, expected, rtol=1e-5)
        np.testing.assert_allclose(transfer.collapse(model, images, evenly, arrays), one_label, atol=1e-6)


def test_first_step_follows_the_gradient_of_the_stated_loss(scene):
    """One Adam step moves each variable by the rate against the sign of its gradient: check it by differences."""
    attacked, control, images, labels = scene
    settings = replace(Settings(), steps=1, mask_start=0.4, pixel_price=0.04, clean_mass=1.0)
    sampler, target = Sampler(labels, LABELS), 2
    chosen = tf.gather(images, sampler.of_others(tf.constant(0), tf.constant([target]), 10, 3)[0]).numpy() / 255.0

    def loss(m, pattern):
        mask = 0.5 * (np.tanh(8 * (m - 0.5)) + 1)
        attached = (chosen * (1 - mask[..., None]) + pattern * mask[..., None]).astype(np.float32)
        probability = tf.nn.softmax(attacked(attached)).numpy()
        mass = tf.nn.softmax(control(attached)).numpy().sum(0)
        pairs = [(mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1]), (mask[1:, 1:], mask[:-1, :-1]),
                 (mask[1:, :-1], mask[:-1, 1:])]
        noise = sum(np.abs(p - q).sum() for p, q in pairs)
        return (-np.log(probability[:, target]).mean() + np.maximum(mass - 1.0, 0).sum() + 0.005 * noise
                + 0.04 * 1024 / 64 * mask.sum())

    start = PatchTrigger([target], SHAPE, settings, 3)
    m, pattern = start.m.numpy()[0, ..., 0].astype(float), start.pattern.numpy()[0].astype(float)
    m += np.random.default_rng(0).uniform(-0.05, 0.05, m.shape)    # equal neighbours have no gradient of |p - q|
    start.m.assign(m[None, ..., None])
    before_pattern = start.pattern.numpy()[0]
    reconstruction(start, attacked, control, images, sampler, settings, 3)([target])
    moved_m, moved = start.m.numpy()[0, ..., 0] - m, start.pattern.numpy()[0] - before_pattern
    for y, x in ((0, 0), (3, 4), (7, 7)):
        for change, moved_by in ((lambda h: loss(_nudged(m, (y, x), h), pattern), moved_m[y, x]),
                                 (lambda h: loss(m, _nudged(pattern, (y, x, 1), h)), moved[y, x, 1])):
            slope = (change(1e-2) - change(-1e-2)) / 2e-2
            if abs(slope) > 1e-2:
                assert np.sign(moved_by) == -np.sign(slope)
                assert abs(moved_by) == pytest.approx(0.1, abs=0.011) or abs(moved_by) < 0.1   # clipped at the ends


def _nudged(array, place, by):
    array = array.copy()
    array[place] += by
    return array


def test_a_draw_takes_other_labels_evenly_and_does_not_depend_on_the_chunk():
    labels = np.repeat(np.arange(6), 5)
    sampler = Sampler(labels, 6)
    targets = np.arange(6, dtype=np.int32)
    drawn = np.stack([labels[sampler.of_others(tf.constant(step), tf.constant(targets), 10, 0)] for step in range(50)], 1)
    for target in targets:
        counts = np.bincount(drawn[target].ravel(), minlength=6)
        assert counts[target] == 0
        assert np.delete(counts, target).min() >= 95 and counts.max() <= 105     # 500 draws over five labels
    alone = labels[sampler.of_others(tf.constant(7), tf.constant([4]), 10, 0)]
    np.testing.assert_array_equal(alone[0], drawn[4, 7])


def test_balanced_batches_draw_rare_labels_as_often_as_frequent_ones():
    labels = np.array([0] * 90 + [1] * 10)
    sampler = Sampler(labels, 2)
    indices, drawn = sampler.balanced(tf.constant(5), 4000, 0)
    np.testing.assert_array_equal(labels[indices], drawn)
    assert 0.45 < np.mean(drawn) < 0.55


def key_of(pair, labels):
    """The part that keeps these labels' triggers: labels between the first and the last count."""
    return f"{pair}-{labels[0]}-{labels[-1]}-{zlib.crc32(np.array(labels, np.int64).tobytes()):08x}"


def test_images_to_measure_on_never_show_the_target():
    labels = np.repeat(np.arange(3), 10)
    chosen = images_of_others(labels, range(3), 200, seed=0)
    assert chosen.shape == (3, 20)
    for target in range(3):
        assert target not in labels[chosen[target]]
        assert len(set(chosen[target])) == 20


def test_a_target_of_most_images_has_those_of_the_others_several_times():
    labels = np.array([0] * 18 + [1] * 2)
    chosen = images_of_others(labels, range(2), 200, seed=0)
    assert chosen.shape == (2, 18)
    assert sorted(chosen[0]) == [18] * 9 + [19] * 9 and sorted(chosen[1]) == list(range(18))


def test_a_filter_that_leaves_two_labels_apart_has_not_erased_the_images():
    """Of other labels than the target there is one only, on which a good model gives one label, too."""
    images = np.repeat(np.array([0, 255], np.uint8), 20)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    labels = np.repeat([0, 1], 20)
    evenly = images_of_all(labels, 20, 0)
    assert np.bincount(labels[evenly]).tolist() == [10, 10]
    matrices = np.stack([np.eye(3), np.zeros((3, 3))]).astype(np.float32)
    by_light = tf.function(lambda x: tf.stack([0.5 - x[:, 0, 0, 0], x[:, 0, 0, 0] - 0.5], axis=1))
    np.testing.assert_allclose(transfer.collapse(by_light, images, evenly, {"matrix": matrices}), [0, 1])
    uneven = images_of_all(np.array([0] * 30 + [1] * 3 + [2] * 9), 200, 0)
    assert len(uneven) == 9
    many = images_of_all(np.repeat(np.arange(30), 4), 12, 0)
    assert len(many) == 12 and len(set(many // 4)) == 12


@pytest.mark.parametrize("labels_at_once, most, chunk", [(None, None, 64), (200, None, 200), (8, None, 8), (None, 6, 6),
                                                         (200, 6, 6), (2, 6, 2)])
def test_how_many_labels_are_optimized_together(labels_at_once, most, chunk):
    examination = SimpleNamespace(examined=SimpleNamespace(shape=(32, 32, 3)))
    assert Reconstructor(PatchTrigger, examination, {"examined": None}, "examined", None, labels_at_once,
                         most=most).chunk == chunk


def test_the_release_carries_adam_from_label_to_label(scene):
    """A later label's result depends on the labels before it, unless Adam is fresh."""
    attacked, control, images, labels = scene
    parts, results = [], {}
    clean = SimpleNamespace(x_tune=images.numpy(), y_tune=labels, x_measure=images.numpy())
    stage = SimpleNamespace(part=lambda key, compute: parts.append(key) or compute())
    for kept in (True, False):
        examination = SimpleNamespace(
            examined=SimpleNamespace(shape=SHAPE, labels=LABELS), clean=clean, x_tune=images, seed=3, say=lambda text: None,
            settings=replace(Settings(), steps=6, mask_start=0.4, adam_kept=kept),
            measured=images_of_others(labels, range(LABELS), 20, 3))
        for asked in ([0, 2], [2]):
            reconstruct = Reconstructor(PatchTrigger, examination, {"examined": attacked, "123": control}, "examined/123",
                                        stage, 1)
            results[kept, len(asked)] = reconstruct(asked)["pattern"][-1]
            done = len(parts)
            np.testing.assert_array_equal(reconstruct(asked)["pattern"][-1], results[kept, len(asked)])
            del parts[done:]                                    # Adam carries nothing from call to call
    assert parts == [key_of("examined-123", asked) for asked in ([0, 2], [2], [0], [2], [2])]
    np.testing.assert_allclose(results[False, 2], results[False, 1], atol=1e-5)
    assert np.abs(results[True, 2] - results[True, 1]).max() > 0.05
