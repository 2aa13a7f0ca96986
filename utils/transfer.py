"""How often a trigger sends images of other labels to its label: attack success rate (ASR) and cross-entropy."""

import numpy as np
import tensorflow as tf

from utils import triggers

CHANCE = 3               # times the accuracy of guessing
PIXELS = 256 * 1024      # a forward pass, whatever the images' size: 256 images of 32×32


def logits_of(model, images):
    """Logits N×C of uint8 or float32 [0, 1] images N×H×W×C, in batches. model: function from [0, 1] images."""
    rows, size = [], batch_size(model, images.shape)
    for start in range(0, len(images), size):
        batch = tf.convert_to_tensor(images[start:start + size])
        rows.append(model(tf.cast(batch, tf.float32) / 255.0 if batch.dtype == tf.uint8 else batch).numpy())
    return np.concatenate(rows)


def batch_size(model, shape):
    """How many images of a shape …×H×W×C a forward pass of a model takes; fewer where it `enlarges` them."""
    return max(1, int(PIXELS / (shape[-3] * shape[-2] * getattr(model, "enlarges", 1))))


def accuracy(model, images, labels):
    return float((logits_of(model, images).argmax(axis=1) == labels).mean())


def least_accuracy(labels):
    """The clean accuracy under which a model of so many labels hardly classifies at all."""
    return min(CHANCE / labels, 0.6)


def attach(images, trigger):
    """uint8 images with one label's trigger attached, float32 in [0, 1].

    trigger: dict with `mask` H×W and `pattern` H×W×C, or with `matrix` 3×3.
    """
    images = tf.cast(images, tf.float32) / 255.0
    if "matrix" in trigger:
        return triggers.recolour(images, tf.constant(trigger["matrix"]))
    return triggers.attach(images, tf.constant(trigger["mask"])[..., None], tf.constant(trigger["pattern"]))


def attached_logits(model, images, chosen, arrays):
    """Yield the logits n×C of each label's images with its trigger attached, as many labels a forward pass as fit.

    images: uint8 N×H×W×C; chosen: L×n indices of each label's images; arrays: `mask` L×H×W and `pattern` L×H×W×C, or
    `matrix` L×3×3.
    """
    together = max(1, batch_size(model, images.shape) // chosen.shape[1])
    for start in range(0, len(chosen), together):
        rows = slice(start, start + together)
        some = {name: array[rows] if name == "matrix" else array[rows, None] for name, array in arrays.items()}
        attached = attach(images[chosen[rows]], some)
        logits = logits_of(model, tf.reshape(attached, (-1, *attached.shape[2:])))
        yield from logits.reshape(-1, chosen.shape[1], logits.shape[-1])


def measure(model, images, chosen, arrays, targets):
    """ASR in [0, 1] and mean cross-entropy towards each of `targets`, float32 L each; the rest as `attached_logits`."""
    rows = []
    for logits, target in zip(attached_logits(model, images, chosen, arrays), targets, strict=True):
        entropy = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - logits[:, target]
        rows.append(((logits.argmax(axis=1) == target).mean(), entropy.mean()))
    return np.array(rows, np.float32).reshape(-1, 2).T


def collapse(model, images, chosen, arrays):
    """How much a model gives images that carry each trigger one and the same label, L: 0 for an even share, 1 for all.

    chosen: indices of images, as many of each label; the rest as `attached_logits`.
    """
    logits = attached_logits(model, images, np.tile(chosen, (len(next(iter(arrays.values()))), 1)), arrays)
    shares = [(np.bincount(row.argmax(axis=1)).max() / len(row), 1 / row.shape[1]) for row in logits]
    return np.array([(share - even) / (1 - even) for share, even in shares], np.float32)


def trigger_of(arrays, row):
    """One label's trigger out of a stage's arrays; for `row` a list or slice, those of several."""
    return {name: arrays[name][row] for name in ("mask", "pattern", "matrix") if name in arrays}
