"""The structure of the published code, as the reference that the benchmarks time and the tests compare with.

The mathematics is that of utils/; only the order of work differs: one label at a time with a fresh call a step, a heat
map an image, a full measurement of the ASR for every hundredth of a threshold, each tuned model set up for each label.
The networks are compiled once, as the published graph is built once.
"""

import cv2
import keras
import numpy as np
import tensorflow as tf

from utils import transfer, triggers
from utils.examination import classifier, set_weights
from utils.reconstruction import PatchTrigger
from utils.starts import start_anew
from utils.tuning import HELD_OUT


class Reconstruction:
    """One label at a time: each step draws its images outside of the compiled function and calls it anew."""

    def __init__(self, attacked, control, shape, settings, seed):
        self.trigger = trigger = PatchTrigger([0], shape, settings, seed)
        self.seed = seed
        self.optimizer = keras.optimizers.Adam(trigger.rate)
        self.optimizer.build(trigger.variables)

        @tf.function
        def step(images, target, share):
            with tf.GradientTape() as tape:
                attached = trigger.attach(tf.cast(images, tf.float32)[None] / 255.0)[0]
                labels = tf.fill((settings.images_per_label,), target)
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, attacked(attached)))
                loss += triggers.excess_mass(control(attached)[None], settings.clean_mass)[0]
                loss += trigger.shape_terms(share)[0]
            self.optimizer.apply(tape.gradient(loss, trigger.variables), trigger.variables)
            trigger.confine()
        self.step = step

    def reconstruct(self, target, draw):
        """The label's arrays as of `utils.reconstruction`, a row of one. draw(step): its uint8 images, n×H×W×C."""
        self.trigger.start([target], self.seed)
        start_anew(self.optimizer)
        for step in range(self.trigger.steps):
            share = tf.constant((step + 1) / self.trigger.steps)
            self.step(tf.constant(draw(step)), tf.constant(target), share)
        return self.trigger.arrays()


def asr(model, images, trigger, target):
    """Of one label's trigger on uint8 images of other labels."""
    logits = transfer.logits_of(model, transfer.attach(images, trigger))
    return float((logits.argmax(axis=1) == target).mean())


def preserve(model, heat, preprocess, images, trigger, target, kept_asr):
    """(threshold, preserved mask, heat map) of one label. heat: from `utils.preservation.grad_cam`."""
    height, width = images.shape[1:3]
    total = np.zeros((height, width), np.float32)
    for image in images:
        maps, _ = heat(preprocess(transfer.attach(image[None], trigger)), tf.constant(target))
        total += cv2.resize(maps.numpy()[0], (width, height), interpolation=cv2.INTER_LINEAR)
    mean = total / max(total.max(), 1e-12)
    full = asr(model, images, trigger, target)
    for threshold in np.arange(100, -1, -1) / 100:
        mask = trigger["mask"] * (mean >= threshold)
        if asr(model, images, trigger | {"mask": mask}, target) >= kept_asr * full - 1e-6:
            return float(threshold), mask, mean
    return 0.0, trigger["mask"], mean


class Transfers:
    """ASR of a label's trigger on each tuned model but 123, whose weights are set anew for each label."""

    def __init__(self, examination, tuned):
        self.examination, self.tuned = examination, tuned
        self.network = keras.models.clone_model(examination.examined.network)
        self.model = classifier(self.network, examination.examined.preprocess)

    def measure(self, trigger, label):
        images, found = self.examination.clean.x_measure[self.examination.measured[label]], []
        for name in HELD_OUT:
            set_weights(self.network, self.tuned[name]["weights"])
            found.append(asr(self.model, images, trigger, label))
        return found
