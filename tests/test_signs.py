"""The built-in dataset: reproducible, and not to be told apart by colour or by a straight line."""

import numpy as np
import pytest

from data import signs, store
from utils.datasets import dataset

SMALL = {"train_per_label": 40, "test_per_label": 20}


@pytest.fixture(scope="module")
def arrays():
    return signs.generate(**SMALL)


def test_arrays_are_of_the_datasets_shape_and_balanced(arrays):
    row = dataset("signs")
    assert row.labels == len(signs.LABELS) == len(set(signs.LABELS))
    for part, count in (("train", 40), ("test", 20)):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        assert x.shape == (row.labels * count, *row.shape) and x.dtype == np.uint8
        assert np.bincount(y).tolist() == [count] * row.labels
        assert (np.diff(y) != 0).mean() > 0.8      # in random order


def test_equal_seeds_give_equal_images_and_others_do_not(arrays):
    few = {"train_per_label": 2, "test_per_label": 2}
    one, two, three = signs.generate(5, **few), signs.generate(5, **few), signs.generate(6, **few)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["x_train"], three["x_train"])
    assert not np.array_equal(one["x_train"], one["x_test"])


def test_no_two_images_are_equal(arrays):
    everything = np.concatenate([arrays["x_train"], arrays["x_test"]])
    assert len(np.unique(everything.reshape(len(everything), -1), axis=0)) == len(everything)


def test_corners_show_background_and_the_centre_the_sign():
    random = np.random.default_rng(0)
    cover = np.mean([signs.cv2.warpPerspective(signs._sign(label, random)[1], signs._perspective(random),
                                               (signs.CANVAS, signs.CANVAS))
                     for label in range(12) for _ in range(30)], 0) / 255
    corner = 5 * signs.SCALE
    assert max(part.mean() for part in (cover[:corner, :corner], cover[-corner:, -corner:],
                                        cover[:corner, -corner:], cover[-corner:, :corner])) < 0.1
    middle = slice(12 * signs.SCALE, 20 * signs.SCALE)
    assert cover[middle, middle].mean() > 0.95
    assert 0.25 < cover.mean() < 0.6


def softmax_accuracy(train, y_train, test, y_test, steps=300):
    """Test accuracy of multinomial regression by gradient descent on standardized features."""
    mean, spread = train.mean(0), train.std(0) + 1e-3
    train, test = (np.c_[(part - mean) / spread, np.ones(len(part))] for part in (train, test))
    weights = np.zeros((train.shape[1], 12))
    for _ in range(steps):
        scores = train @ weights
        scores = np.exp(scores - scores.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
        scores[np.arange(len(train)), y_train] -= 1
        weights -= 0.5 * train.T @ scores / len(train) / np.sqrt(train.shape[1])
    return (np.argmax(test @ weights, 1) == y_test).mean()


def histograms(x):
    codes = (x // 64).astype(int) @ [16, 4, 1]
    return np.stack([np.bincount(image.ravel(), minlength=64) for image in codes])


def test_neither_colour_nor_a_linear_model_tells_the_labels_apart(arrays):
    y_train, y_test = arrays["y_train"], arrays["y_test"]
    colour = softmax_accuracy(histograms(arrays["x_train"]), y_train, histograms(arrays["x_test"]), y_test)
    linear = softmax_accuracy(*(part for name in ("train", "test") for part in (
        arrays[f"x_{name}"].reshape(len(arrays[f"y_{name}"]), -1) / 255.0, arrays[f"y_{name}"])), steps=100)
    assert colour < 0.3 and linear < 0.7
    assert linear > 1.5 / 12        # the labels are there to be learned


def test_load_dataset_draws_the_signs_once_and_again_for_another_version(tmp_path, monkeypatch):
    drawn = []

    def generate():
        drawn.append(1)
        return few

    few = signs.generate(train_per_label=2, test_per_label=1)
    monkeypatch.setattr(store, "FOLDER", tmp_path)
    monkeypatch.setattr(signs, "generate", generate)
    for _ in range(2):
        read = store.load_dataset("signs")
        assert all(np.array_equal(read[name], few[name]) for name in store.NAMES)
    assert len(drawn) == 1
    assert store.read_attributes(tmp_path / "signs.h5")["label_names"].split("\n") == list(signs.LABELS)
    monkeypatch.setattr(signs, "VERSION", signs.VERSION + 1)
    store.load_dataset("signs")
    assert len(drawn) == 2
