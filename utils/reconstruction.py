"""Potential trigger reconstruction, all labels of a chunk at once (paper IV-C; feature space: supplementary).

Each label's mask and pattern, or colour matrix, is optimized against its own images. Gradients of different labels
do not mix and Adam is elementwise, so the result is what one label at a time would give.
"""

import math
import zlib
from dataclasses import replace

import keras
import numpy as np
import tensorflow as tf

from utils import transfer, triggers
from utils.clean_data import Sampler
from utils.config import UserError
from utils.starts import start_anew, uniform


COLLAPSED = 0.5          # from an even share to all of one label, on a clean model: a filter over it has erased the images


class PatchTrigger:
    """A mask variable m (L×H×W×1, in [0, 1]) and a pattern Δ (L×H×W×C, in [0, 1]) for every target of a chunk."""

    def __init__(self, targets, shape, settings, seed):
        height, width, channels = shape
        self.settings = settings
        self.price = settings.pixel_price * 1024 / (height * width)
        self.m = tf.Variable(tf.zeros((len(targets), height, width, 1)), name="m")
        self.pattern = tf.Variable(tf.zeros((len(targets), height, width, channels)), name="pattern")
        self.variables = [self.m, self.pattern]
        self.rate, self.steps = settings.trigger_rate, settings.steps
        self.start(targets, seed)

    def start(self, targets, seed):
        """Back to the first step, for as many targets as before."""
        self.m.assign(tf.fill(self.m.shape, self.settings.mask_start))
        self.pattern.assign(uniform(seed, targets, self.pattern.shape[1:]))

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
        self.matrix = tf.Variable(tf.zeros((len(targets), 3, 3)), name="matrix")
        self.variables = [self.matrix]
        self.rate, self.steps = settings.filter_rate, settings.filter_steps
        self.start(targets, seed)

    def start(self, targets, seed):
        """Back to the first step, for as many targets as before."""
        self.matrix.assign(uniform(seed, targets, (3, 3)))
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


def reconstruction(trigger, attacked, control, images, sampler, settings, seed):
    """A function (targets, progress, seed) that makes `trigger` effective on the attacked model and not on the control.

    The objective is the paper's L_attack + L_clean and the trigger's own terms. attacked, control: functions from images
    N×H×W×C in [0, 1] to logits; a control of None leaves out L_clean. images: uint8 clean images; sampler:
    `utils.clean_data.Sampler` over their labels. It is compiled at the first call; a later one takes as many targets, after
    `trigger.start`. The optimizer is fresh at each call, unless `settings.adam_kept`: with moments left by other labels a
    mask that starts where tanh is flat hardly moves (the release's fault).
    """
    count, steps = settings.images_per_label, trigger.steps
    optimizer = keras.optimizers.Adam(trigger.rate)
    optimizer.build(trigger.variables)

    def logits(model, x):
        return tf.reshape(model(tf.reshape(x, (-1, *images.shape[1:]))), (x.shape[0], count, -1))

    @tf.function
    def run(targets, first, last, seed):
        labels = tf.repeat(targets[:, None], count, axis=1)
        for step in tf.range(first, last):
            chosen = tf.gather(images, sampler.of_others(step, targets, count, seed))
            with tf.GradientTape() as tape:
                attached = trigger.attach(tf.cast(chosen, tf.float32) / 255.0)
                attack = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits(attacked, attached))
                loss = tf.reduce_mean(attack, axis=1)
                if control is not None:
                    loss += triggers.excess_mass(logits(control, attached), settings.clean_mass)
                loss += trigger.shape_terms(tf.cast(step + 1, tf.float32) / steps)
            gradients = tape.gradient(loss, trigger.variables)
            optimizer.apply(gradients, trigger.variables)
            trigger.confine()

    def optimize(targets, progress=lambda step: None, seed=seed):
        if not settings.adam_kept:
            start_anew(optimizer)
        stride = max(1, steps // 10)
        for first in range(0, steps, stride):
            last = min(first + stride, steps)
            run(tf.constant(targets, tf.int32), tf.constant(first), tf.constant(last), tf.constant(seed))
            progress(last)
        return trigger.arrays()
    return optimize


class Reconstructor:
    """Reconstructs triggers effective on the first model of a pair and not on the second, a chunk of labels at a time.

    kind: PatchTrigger or ColourTrigger. models: name → function from images in [0, 1] to logits; pair: two of the names,
    as "examined/123", or one, as "examined", for triggers without L_clean. Finished chunks are kept as parts of `stage`.
    One trigger and one compiled optimization serve all chunks of a call, of `labels_at_once` labels at most, and later calls
    of as large chunks: as many as fit where that is none, and `most` where that is less. steps: in place of the settings'.
    """

    def __init__(self, kind, examination, models, pair, stage, labels_at_once=None, steps=None, most=None):
        self.kind, self.examination, self.stage, self.names = kind, examination, stage, pair.split("/")
        self.attacked, self.control = ([models[name] for name in self.names] + [None])[:2]
        fitting = labels_at_once or max(1, transfer.batch_size(self.attacked, examination.examined.shape) // 4)
        self.chunk = min(fitting, most or fitting)
        self.compiled, self.steps = None, steps

    def __call__(self, labels, restart=0):
        """Arrays with one row for each of `labels`, and what each trigger costs.

        `label`, the trigger's own, `asr` and `entropy` (mean cross-entropy) on the attacked model, `cost` (entropy plus
        the price of the mask), and of colour triggers `collapse` on the control model. restart: another number, another
        start and other draws of images.
        """
        labels = list(map(int, labels))
        if self.examination.settings.adam_kept:      # one by one and one part: what Adam carries is not kept on disk
            self.compiled = None                     # so that each start is as it would be after a stop
            return self.stage.part(self._key(labels, restart),
                                   lambda: _joined([self._make(np.array([label]), 1, restart) for label in labels]))
        chunks = np.array_split(labels, -(-len(labels) // self.chunk)) if labels else []
        parts = [self.stage.part(self._key(targets, restart), lambda: self._make(targets, len(chunks[0]), restart))
                 for targets in chunks]
        return _joined(parts)

    def _key(self, labels, restart):
        some = [str(labels[0]), str(labels[-1]), f"{zlib.crc32(np.array(labels, np.int64).tobytes()):08x}"]
        return "-".join([*self.names, *some] + ["again", str(restart)] * bool(restart)
                        + ["steps", str(self.steps)] * bool(self.steps))

    def _make(self, targets, size, restart):
        examination = self.examination
        clean, settings, seed = examination.clean, examination.settings, examination.seed + 10_000 * restart
        if self.compiled is None or size != self.compiled[2]:
            settings = replace(settings, steps=self.steps or settings.steps)
            # For as many as a chunk has at most: after a stop, the first to do may be a short one.
            trigger = self.kind(range(size), examination.examined.shape, settings, seed)
            sampler = Sampler(clean.y_tune, examination.examined.labels)
            self.compiled = trigger, reconstruction(trigger, self.attacked, self.control, examination.x_tune,
                                                    sampler, settings, seed), size
        trigger, optimize, _ = self.compiled
        padded = np.pad(targets, (0, size - len(targets)), "edge")
        trigger.start(padded, seed)
        shown = ", ".join(map(str, targets[:8])) + " ..." * (len(targets) > 8)
        where = f"{self.names[0]}, not on {self.names[1]}" if self.control else f"{self.names[0]} alone"
        again = f", start {restart + 1}" if restart else ""
        arrays = optimize(padded, lambda step: examination.say(
            f"labels {shown} on {where}{again}: step {step} of {trigger.steps}"), seed)
        arrays = {name: array[:len(targets)] for name, array in arrays.items()}
        chosen = examination.measured[targets]
        asr, entropy = transfer.measure(self.attacked, clean.x_measure, chosen, arrays, targets)
        cost = entropy + trigger.price_paid().numpy()[:len(targets)]
        if not np.isfinite(cost).all():
            raise UserError(f"{where}: triggers lead to NaN or infinite scores, from which nothing can be told: a lower "
                            "PHASE2_PEAK of pnnir.py may help, or a lower TRIGGER_RATE")
        measured = {"label": targets, "asr": asr, "entropy": entropy, "cost": cost}
        if self.kind is ColourTrigger:       # a filter can erase the image; a patch leaves the rest of it as it was
            measured["collapse"] = transfer.collapse(self.control, clean.x_measure, examination.evenly, arrays)
        return arrays | measured


def reconstruct_patches(examination, models, stage, labels_at_once=None):
    """Every label's patch on the examined model, with what `Reconstructor` returns, a row a label.

    With `settings.screen_share` under 1, for models of many labels, a first round of `settings.screen_steps` steps tells
    which labels are worth the full number: that share of them whose patches cost least. The others keep the patch of the
    first round and are marked in `dropped` (booleans, L). Raises UserError where costs do not decide.
    """
    settings, labels = examination.settings, np.arange(examination.examined.labels)
    full = Reconstructor(PatchTrigger, examination, models, "examined/123", stage, labels_at_once)
    if settings.screen_share == 1:
        return full(labels)
    if not settings.controls:
        raise UserError(f"SCREEN_SHARE {settings.screen_share} drops labels by their cost, which does not decide under "
                        "these settings: use SETTINGS default, or a SCREEN_SHARE of 1")
    first = Reconstructor(PatchTrigger, examination, models, "examined/123", stage, labels_at_once,
                          steps=settings.screen_steps)(labels)
    kept = np.sort(np.argsort(first["cost"], kind="stable")[:max(1, math.ceil(settings.screen_share * len(labels)))])
    examination.say(f"{len(kept)} of {len(labels)} labels go on")
    arrays = {name: array.copy() for name, array in first.items()}
    for name, array in full(kept).items():
        arrays[name][kept] = array
    return arrays | {"dropped": ~np.isin(labels, kept)}


def reconstruct_filters(examination, models, stage, labels_at_once=None):
    """Every label's colour matrix on the examined model, with what `Reconstructor` returns, a row a label.

    Of 1 + `settings.filter_restarts` starts the one of the lowest entropy is kept, of those that leave something to see
    if there are any: one start in a few ends in a black image, or far from the filter.
    """
    labels = np.arange(examination.examined.labels)
    reconstruct = Reconstructor(ColourTrigger, examination, models, "examined/123", stage, labels_at_once)
    starts = [reconstruct(labels, number) for number in range(1 + examination.settings.filter_restarts)]
    starts = {name: np.stack([start[name] for start in starts]) for name in starts[0]}
    best = np.lexsort((starts["cost"], starts["collapse"] > COLLAPSED), axis=0)[0]
    return {name: array[best, labels] for name, array in starts.items()}


def _joined(parts):
    """Arrays of several parts as one, a row a label."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
