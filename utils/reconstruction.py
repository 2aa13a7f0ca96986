"""Potential trigger reconstruction, all labels of a chunk at once (paper IV-C; feature space: supplementary).

Each label's mask and pattern, or colour matrix, is optimized against its own images. Gradients of different labels
do not mix and Adam is elementwise, so the result is what one label at a time would give.
"""

import keras
import numpy as np
import tensorflow as tf

from utils import transfer, triggers
from utils.clean_data import Sampler, images_of_others


class PatchTrigger:
    """A mask variable m (L×H×W×1, in [0, 1]) and a pattern Δ (L×H×W×C, in [0, 1]) for every target of a chunk."""

    def __init__(self, targets, shape, settings, seed):
        height, width, channels = shape
        self.settings = settings
        self.price = settings.pixel_price * 1024 / (height * width)
        start = np.stack([np.random.default_rng([seed, target]).uniform(size=(height, width, channels))
                          for target in targets])
        self.m = tf.Variable(tf.fill((len(targets), height, width, 1), settings.mask_start), name="m")
        self.pattern = tf.Variable(start.astype(np.float32), name="pattern")
        self.variables = [self.m, self.pattern]
        self.rate, self.steps = settings.trigger_rate, settings.steps

    def mask(self):
        return triggers.mask_from(self.m, self.settings.mask_gain, self.settings.mask_centre)

    def attach(self, images):
        """images: L×n×H×W×C in [0, 1]."""
        return triggers.attach(images, self.mask()[:, None], self.pattern[:, None])

    def shape_terms(self, share):
        """L_noise and the price per pixel, once `share` of the steps is done; L values."""
        asked = tf.minimum(1.0, share / max(self.settings.price_ramp, 1e-6))
        return self.settings.noise_weight * triggers.noise(self.mask()[..., 0]) + asked * self.price_paid()

    def price_paid(self):
        return self.price * tf.reduce_sum(self.mask(), axis=(1, 2, 3))

    def confine(self):
        """Back into the valid range, after each step."""
        for variable in self.variables:
            variable.assign(tf.clip_by_value(variable, 0.0, 1.0))

    def arrays(self):
        return {"mask": self.mask().numpy()[..., 0], "pattern": self.pattern.numpy()}


class ColourTrigger:
    """A 3×3 colour matrix for every target of a chunk, not negative, its rows held to a sum of at most 1."""

    def __init__(self, targets, shape, settings, seed):
        start = np.stack([np.random.default_rng([seed, target]).uniform(size=(3, 3)) for target in targets])
        self.matrix = tf.Variable(start.astype(np.float32), name="matrix")
        self.variables = [self.matrix]
        self.rate, self.steps = settings.filter_rate, settings.filter_steps
        self.confine()

    def attach(self, images):
        """images: L×n×H×W×3 in [0, 1]."""
        return triggers.recolour(images, self.matrix)

    def shape_terms(self, share):
        return self.price_paid()

    def price_paid(self):
        return tf.zeros(self.matrix.shape[0])

    def confine(self):
        # Not negative, which the paper leaves open: such matrices end in black images, where clipping leaves no gradient.
        self.matrix.assign(triggers.bound_rows(tf.maximum(self.matrix, 0.0)))

    def arrays(self):
        return {"matrix": self.matrix.numpy()}


def reconstruct(trigger, targets, attacked, control, images, sampler, settings, seed,
                progress=lambda step: None):
    """Make `trigger` effective on the attacked model and not on the control (paper, eq. of L_attack + L_clean).

    attacked, control: functions from images N×H×W×C in [0, 1] to logits. images: uint8 clean images;
    sampler: `utils.clean_data.Sampler` over their labels. The optimizer is fresh for every chunk of targets: with
    moments left by other labels a mask that starts where tanh is flat hardly moves (the release's fault).
    """
    targets = tf.constant(targets, tf.int32)
    count, steps = settings.images_per_label, trigger.steps
    optimizer = keras.optimizers.Adam(trigger.rate)
    optimizer.build(trigger.variables)
    labels = tf.repeat(targets[:, None], count, axis=1)

    def both(x):
        flat = tf.reshape(x, (-1, *images.shape[1:]))
        return [tf.reshape(model(flat), (targets.shape[0], count, -1)) for model in (attacked, control)]

    @tf.function
    def run(first, last):
        for step in tf.range(first, last):
            chosen = tf.gather(images, sampler.of_others(step, targets, count, seed))
            with tf.GradientTape() as tape:
                on_attacked, on_control = both(trigger.attach(tf.cast(chosen, tf.float32) / 255.0))
                attack = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, on_attacked)
                loss = tf.reduce_mean(attack, axis=1) + triggers.excess_mass(on_control, settings.clean_mass)
                loss += trigger.shape_terms(tf.cast(step + 1, tf.float32) / steps)
            gradients = tape.gradient(loss, trigger.variables)
            optimizer.apply(gradients, trigger.variables)
            trigger.confine()

    stride = max(1, steps // 10)
    for first in range(0, steps, stride):
        last = min(first + stride, steps)
        run(tf.constant(first), tf.constant(last))
        progress(last)
    return trigger.arrays()


def reconstruct_all(kind, examination, attacked, control, stage, labels, labels_at_once=None, role="examined"):
    """Reconstruct a trigger for each of `labels`, in chunks kept as parts of `stage`, and measure what it costs.

    kind: PatchTrigger or ColourTrigger. Returns arrays with one row for each of `labels`: `label`, the trigger's own,
    `asr` and `entropy` (mean cross-entropy) on the attacked model, `collapse` on the control model, and `cost` (entropy
    plus the price of the mask).
    """
    examined, clean, settings, seed = examination.examined, examination.clean, examination.settings, examination.seed
    chunk = labels_at_once or max(1, 64 * 1024 // int(np.prod(examined.shape[:2])))
    sampler = Sampler(clean.y_tune, examined.labels)
    images = tf.constant(clean.x_tune)
    measured = images_of_others(clean.y_measure, range(examined.labels), settings.measured_images, seed)

    def make(targets):
        trigger = kind(targets, examined.shape, settings, seed)
        arrays = reconstruct(trigger, targets, attacked, control, images, sampler, settings, seed,
                             lambda step: examination.say(f"{len(targets)} labels from {targets[0]}, effective on the "
                                                          f"{role} model: step {step} of {trigger.steps}"))
        rows = [transfer.measure(attacked, clean.x_measure[measured[target]], transfer.trigger_of(arrays, row), target)
                for row, target in enumerate(targets)]
        arrays["asr"], arrays["entropy"] = np.array(rows, np.float32).T
        arrays["collapse"] = np.array([transfer.collapse(control, clean.x_measure[measured[target]],
                                                         transfer.trigger_of(arrays, row))
                                       for row, target in enumerate(targets)], np.float32)
        return arrays | {"label": np.array(targets), "cost": arrays["entropy"] + trigger.price_paid().numpy()}

    parts = [stage.part(f"{role}-{targets[0]}", lambda: make(targets))
             for targets in (list(map(int, labels[first:first + chunk])) for first in range(0, len(labels), chunk))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
