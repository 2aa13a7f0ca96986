"""How often a trigger sends images of other labels to its label: attack success rate (ASR) and cross-entropy."""

import numpy as np
import tensorflow as tf

from utils import triggers

BATCH = 256              # images a forward pass


def logits_of(model, images):
    """Logits N×C of uint8 or float32 [0, 1] images N×H×W×C, in batches. model: function from [0, 1] images."""
    rows = []
    for start in range(0, len(images), BATCH):
        batch = tf.convert_to_tensor(images[start:start + BATCH])
        rows.append(model(tf.cast(batch, tf.float32) / 255.0 if batch.dtype == tf.uint8 else batch).numpy())
    return np.concatenate(rows)


def accuracy(model, images, labels):
    return float((logits_of(model, images).argmax(axis=1) == labels).mean())


def attach(images, trigger):
    """uint8 images with one label's trigger attached, float32 in [0, 1].

    trigger: dict with `mask` H×W and `pattern` H×W×C, or with `matrix` 3×3.
    """
    images = tf.cast(images, tf.float32) / 255.0
    if "matrix" in trigger:
        return triggers.recolour(images, tf.constant(trigger["matrix"]))
    return triggers.attach(images, tf.constant(trigger["mask"])[..., None], tf.constant(trigger["pattern"]))


def measure(model, images, trigger, target):
    """ASR in [0, 1] and mean cross-entropy of `trigger` towards `target` on uint8 images of other labels."""
    logits = logits_of(model, attach(images, trigger).numpy())
    entropy = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - logits[:, target]
    return float((logits.argmax(axis=1) == target).mean()), float(entropy.mean())


def collapse(model, images, trigger):
    """Share of uint8 images that the model gives one and the same label once the trigger is attached."""
    found = logits_of(model, attach(images, trigger).numpy()).argmax(axis=1)
    return float(np.bincount(found).max() / len(found))


def trigger_of(arrays, row):
    """One label's trigger out of a stage's arrays."""
    return {name: arrays[name][row] for name in ("mask", "pattern", "matrix") if name in arrays}
