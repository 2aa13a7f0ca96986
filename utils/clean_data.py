"""The defender's clean labelled images: reading them, splitting them once, and drawing batches from them."""

import hashlib
import pathlib
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from data.store import load_dataset, read_arrays
from utils.config import UserError
from utils.images import stretch

MEASURED_SHARE = 0.2     # of each label's images: accuracy, ASR and transfer are never measured on what was tuned on


@dataclass(frozen=True)
class CleanData:
    """Clean images in two disjoint parts. x: uint8 N×H×W×C sorted by label, y: int32 N."""

    x_tune: np.ndarray
    y_tune: np.ndarray
    x_measure: np.ndarray
    y_measure: np.ndarray
    fingerprint: str


def load_clean_data(path, dataset, shape, labels, per_label, seed):
    """Read the clean data, resize it to the examined model's input and split it, per label, by `seed`.

    path: HDF5 file with `x` uint8 N×H×W×C RGB and `y` integer, a folder of images per label, or "" for the held-out
    part of `dataset`. per_label: images of each label used at most. Raises UserError for what a person would mend.
    """
    if not path:
        held_out = load_dataset(dataset)
        x, y, place = held_out["x_test"], held_out["y_test"], f"the held-out part of {dataset}"
    elif pathlib.Path(path).is_dir():
        from data.from_folder import read_folder
        (x, y, _), place = read_folder(path, shape, limit_per_label=per_label), path
    else:
        arrays, place = read_arrays(path, ("x", "y")), path
        x, y = arrays["x"], arrays["y"]
    y = y.astype(np.int64)
    counts = _check(x, y, shape, labels, place)
    random = np.random.default_rng(seed)
    tune, measure = [], []
    for label in range(labels):
        chosen = random.permutation(np.flatnonzero(y == label))[:per_label]
        held = max(1, round(MEASURED_SHARE * len(chosen)))
        measure.extend(chosen[:held])
        tune.extend(chosen[held:])
    digest = hashlib.sha256(repr((shape, labels, counts.tolist())).encode())
    parts = []
    for part in (tune, measure):
        images = _resize(x[part], shape)
        parts += [images, y[part].astype(np.int32)]
        digest.update(images.tobytes())
    return CleanData(*parts, fingerprint=digest.hexdigest())


def _check(x, y, shape, labels, place):
    if x.ndim != 4 or x.dtype != np.uint8:
        raise UserError(f"images in {place} are {x.dtype} {x.shape}: they must be uint8 N×H×W×C with values 0..255")
    if x.shape[-1] != shape[-1]:
        raise UserError(f"images in {place} have {x.shape[-1]} channels and the model takes {shape[-1]}: "
                        "check DATASET and CLEAN_DATA")
    if y.min() < 0 or y.max() >= labels:
        raise UserError(f"labels in {place} run from {y.min()} to {y.max()} and the model has {labels} labels, counted "
                        "from 0: renumber them or check DATASET")
    counts = np.bincount(y, minlength=labels)
    if counts.min() < 2:
        few = np.flatnonzero(counts < 2)
        shown = ", ".join(map(str, few[:10])) + (" ..." if len(few) > 10 else "")
        raise UserError(f"{place} has fewer than 2 images of label {shown}: every label of the model needs at least "
                        "one to tune on and one to measure with")
    return counts


def _resize(images, shape):
    if images.shape[1:3] == tuple(shape[:2]):
        return np.ascontiguousarray(images)
    return np.stack([stretch(image, *shape[:2]) for image in images]).reshape(len(images), *shape)


class Sampler:
    """Draws the indices of images inside compiled steps, from the labels `y` alone; seed and step decide each draw."""

    def __init__(self, y, labels):
        self.labels = labels
        self.order = tf.constant(np.argsort(y, kind="stable"), tf.int32)
        counts = np.bincount(y, minlength=labels)
        self.counts = tf.constant(counts, tf.float32)
        self.starts = tf.constant(np.cumsum(counts) - counts, tf.int32)

    def _image(self, labels, place):
        """Indices of images of `labels`, at `place` in [0, 1) among those of the label."""
        within = tf.cast(place * tf.gather(self.counts, labels), tf.int32)
        return tf.gather(self.order, tf.gather(self.starts, labels) + within)

    def balanced(self, step, batch, seed):
        """Indices and labels of a batch in which every label is equally likely."""
        key = tf.stack([tf.cast(seed, tf.int32), tf.cast(step, tf.int32)])
        labels = tf.random.stateless_uniform((batch,), key, 0, self.labels, tf.int32)
        return self._image(labels, tf.random.stateless_uniform((batch,), key + 1_000_003)), labels

    def of_others(self, step, targets, count, seed):
        """Indices L×count of images drawn evenly from the labels other than each of `targets` (L).

        Numbers are drawn for all labels and the targets' taken, so a draw does not depend on the chunk it is in.
        """
        key = tf.stack([tf.cast(seed, tf.int32), tf.cast(step, tf.int32)])
        start = tf.gather(tf.random.stateless_uniform((self.labels, 1), key), targets)
        spread = (start + tf.range(count, dtype=tf.float32) / count) % 1.0
        other = tf.minimum(tf.cast(spread * (self.labels - 1), tf.int32), self.labels - 2)
        other += tf.cast(other >= targets[:, None], tf.int32)
        place = tf.gather(tf.random.stateless_uniform((self.labels, count), key + 1_000_003), targets)
        return self._image(other, place)


def both_splits(clean):
    """All clean images N×H×W×C, uint8, and their labels N: those to tune on, then those to measure on."""
    return np.concatenate([clean.x_tune, clean.x_measure]), np.concatenate([clean.y_tune, clean.y_measure])


def images_of_others(y, targets, count, seed):
    """Fixed indices, L×n, of up to `count` images of labels other than each target, to measure ASR on.

    n is the same for all targets: `count`, or what the clean data has for the target with the most. A target with fewer has
    its images several times.
    """
    order = np.random.default_rng(seed).permutation(len(y))
    others = [order[y[order] != target] for target in targets]
    n = min(count, max(map(len, others)))
    return np.stack([np.resize(images, n) for images in others])


def images_of_all(y, count, seed):
    """Fixed indices of up to `count` images, as many of each label as there are of the one with the fewest or as
    fit; one of each of `count` labels where there are more of these."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(y))
    each = max(1, min(count // (y.max() + 1), np.bincount(y).min()))
    labels = np.sort(random.permutation(np.unique(y))[:count])
    return np.concatenate([order[y[order] == label][:each] for label in labels])
