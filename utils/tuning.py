"""PNNIR: partial neural network initialization and retraining (paper IV-B)."""

import functools
import math

import keras
import numpy as np
import tensorflow as tf

from utils import transfer
from utils.clean_data import Sampler
from utils.config import UserError
from utils.examination import classifier
from utils.starts import start_anew
from utils.topology import split

SUBSETS = ("1", "2", "3", "12", "13", "23", "123")     # of the blocks, numbered from the earliest to the last
HELD_OUT = SUBSETS[:-1]      # 123 is used to reconstruct, so it says nothing about transfer
TAUGHT = ("12-taught", "13-taught", "23-taught")      # models of two blocks that learn the examined model's logits, too
CHECK = 100              # steps between two looks at the loss
ERASED = 0.8             # share of the images that random erasing changes
LOOKED_AT = 200          # clean images whose accuracy ends phase 2 under the release's rule
RISING = 0.1             # share of phase 2's steps in which its learning rate rises to the peak
PATIENCE = 5             # looks without a lower loss after which training counts as stable
TEMPERATURE = 8.0        # of distillation: logits are divided by it. 4 to 16 do, and so does four times the weight
CACHED_BYTES = 2 << 30   # phase 1 keeps the frozen part's outputs if they fit into this


class Tuner:
    """Turns the examined network, in place, into one tuned model after the other.

    examined: `utils.examined_model.ExaminedModel`; clean: `utils.clean_data.CleanData`.
    """

    def __init__(self, examined, clean, settings):
        self.examined, self.settings, self.labels = examined, settings, clean.y_tune
        self.images = tf.constant(clean.x_tune)
        self.kept = {}

    def tune(self, layers, count, seed, progress=lambda *_: None, taught=False):
        """Re-initialize `layers`, those of `count` blocks, train them alone, then train everything.

        taught: phase 2 learns the examined model's logits, too. At each call the network holds the examined model's
        weights: what its frozen part gives, and its logits, are kept between calls.
        progress(phase, step, steps, loss) is called every CHECK steps.
        """
        settings, phase2 = self.settings, self.phase2           # made before the weights go: it is taught what they give
        reinitialise(layers, settings.init_bound, seed)
        reset_random_layers(self.examined.network, seed)
        self.phase1(layers).train(settings.phase1_steps[count - 1], seed, progress=lambda *at: progress(1, *at))
        phase2.train(settings.phase2_steps[count - 1], seed + 1, self._stop(), lambda *at: progress(2, *at),
                     settings.distillation * taught)

    def _stop(self):
        """The rule that ends phase 2: a function from the loss since the last look to whether to stop."""
        if self.settings.phase2_stop == "steps":
            return lambda loss: False
        if self.settings.phase2_stop == "stable":
            return Stable()
        chosen = np.random.default_rng(0).permutation(len(self.labels))[:LOOKED_AT]
        images, labels = tf.gather(self.images, chosen).numpy(), self.labels[chosen]
        enough = float(self.settings.phase2_stop)
        return lambda loss: transfer.accuracy(self._model, images, labels) > enough

    @functools.cached_property
    def _model(self):
        """The network with the weights that it has when called, a function from images in [0, 1] to logits."""
        return classifier(self.examined.network, self.examined.preprocess)

    def phase1(self, layers):
        """A `Trainer` of `layers` alone, on what the frozen part before them gives where that can be kept.

        Kept outputs are without the frozen part's dropout, which the release's phase 1 has: noise for layers that phase 2
        trains with it anyway.
        """
        front, head = split(self.examined.network, layers)
        size = len(self.labels) * sum(4 * int(np.prod(tensor.shape[1:])) for tensor in front.outputs)
        if size > CACHED_BYTES:
            return Trainer(self.examined.network, layers, self._scaled, [self.images], self.labels, self.settings)
        # Without augmentation: what the frozen part sees must be the same at every step to be kept.
        return Trainer(head, layers, lambda batch, *_: batch, self._features(front, size), self.labels, self.settings)

    @functools.cached_property
    def phase2(self):
        """The `Trainer` of the whole network, compiled once for all tuned models."""
        everything = [layer for layer in self.examined.network.layers if layer.weights]
        taught = transfer.logits_of(self._model, self.images) if self.settings.distillation else None
        return Trainer(self.examined.network, everything, self._augmented, [self.images], self.labels, self.settings,
                       self.settings.phase2_peak, taught)

    def _scaled(self, batch, *_):
        return self.examined.preprocess(tf.cast(batch, tf.float32) / 255.0)

    def _augmented(self, batch, step, seed):
        if self.settings.augment:
            batch = shift_and_flip(batch, seed, step)
        return self._scaled(erase(batch, seed, step, self.settings.erase) if self.settings.erase else batch)

    def _features(self, front, size):
        """Outputs of the frozen part for all images, a list of tensors of `size` bytes; one for all with this frontier."""
        frontier = tuple(map(id, front.outputs))
        if frontier not in self.kept:
            if size + sum(other for other, _ in self.kept.values()) > CACHED_BYTES:
                self.kept.clear()

            @tf.function(reduce_retracing=True)
            def outputs(images):
                return tf.nest.flatten(front(self._scaled(images), training=False))
            step = transfer.batch_size(self._model, self.images.shape)
            rows = [outputs(self.images[start:start + step]) for start in range(0, len(self.labels), step)]
            self.kept[frontier] = size, [tf.concat(part, axis=0) for part in zip(*rows)]
        return self.kept[frontier][1]


def reinitialise(layers, bound, seed):
    """Draw the layers' weights anew: uniform in [-bound, bound], biases at `bound` (release).

    Normalization layers go back to what they are before any training.
    """
    random = np.random.default_rng(seed)
    for layer in layers:
        for weight in layer.weights:
            if weight.name in ("gamma", "scale", "moving_variance"):
                value = np.ones(weight.shape)
            elif weight.name in ("beta", "moving_mean"):
                value = np.zeros(weight.shape)
            elif weight.name == "bias":
                value = np.full(weight.shape, bound)
            else:
                value = random.uniform(-bound, bound, weight.shape)
            weight.assign(value.astype(np.float32))


def reset_random_layers(network, seed):
    """Start every dropout's random numbers anew, so that a tuned model does not depend on those made before it."""
    for number, layer in enumerate(network._flatten_layers(include_self=False)):       # those inside of attention, too
        generator = getattr(layer, "seed_generator", None)
        if generator is not None:
            generator.state.assign(np.array([seed % 2**31, number], generator.state.dtype))


class Trainer:
    """Trains `layers` of a network with Adam on label-balanced batches; nothing else of it changes.

    prepare(batch, step, seed): a batch of `images` (a list of arrays: features of a frozen part, or the images alone)
    to the network's input. peak: of a learning rate in one cycle over the steps; 0: the settings' throughout. taught: what
    distillation gives the images, the examined model's logits, N×L; none: labels alone are learned.
    """

    def __init__(self, network, layers, prepare, images, labels, settings, peak=0.0, taught=None):
        wanted = {id(layer) for layer in layers}
        self.network, self.layers = network, [(layer, id(layer) in wanted) for layer in network.layers]
        self._freeze()
        variables = [variable for layer in layers for variable in layer.trainable_variables]
        if taught is not None:
            taught = tf.constant(taught)        # in the graph itself no more than 2 GB would do
        sampler = Sampler(labels, int(labels.max()) + 1)
        self.optimizer = keras.optimizers.Adam(settings.learning_rate)
        self.optimizer.build(variables)

        @tf.function
        def run(first, last, steps, seed, distillation):
            total = 0.0
            for step in tf.range(first, last):
                if peak:
                    self.optimizer.learning_rate.assign(one_cycle(tf.cast(step, tf.float32) / steps, peak))
                chosen, target = sampler.balanced(step, settings.batch, seed)
                batch = [tf.gather(part, chosen) for part in images]
                with tf.GradientTape() as tape:
                    logits = network(prepare(batch[0] if len(batch) == 1 else batch, step, seed), training=True)
                    loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(target, logits))
                    if taught is not None:
                        loss += distillation * tf.reduce_mean(divergence(tf.gather(taught, chosen), logits))
                self.optimizer.apply(tape.gradient(loss, variables), variables)
                total += loss
            return total / tf.cast(last - first, tf.float32)
        self.run = run

    def _freeze(self):
        for layer, trained in self.layers:
            layer.trainable = trained       # a frozen batch normalization keeps its statistics, too

    def train(self, steps, seed, stop=lambda loss: False, progress=lambda *_: None, distillation=0.0):
        """Take `steps` steps with a fresh optimizer; stop(loss) and progress(step, steps, loss) every CHECK of them.

        Raises UserError where the loss becomes NaN or infinite.
        distillation: weight of `divergence` from `taught`, beside the labels' cross-entropy.
        """
        self._freeze()
        start_anew(self.optimizer)
        for first in range(0, steps, CHECK):
            last = min(first + CHECK, steps)
            loss = float(self.run(tf.constant(first), tf.constant(last), tf.constant(float(steps)), tf.constant(seed),
                                  tf.constant(float(distillation))))
            if not math.isfinite(loss):
                raise UserError(f"training went astray, its loss is {loss} by step {last} of {steps}: try a lower "
                                "PHASE2_PEAK or LEARNING_RATE of pnnir.py")
            progress(last, steps, loss)
            if stop(loss):
                break


def one_cycle(share, peak):
    """Learning rate once `share` of the steps is done: a straight rise from 0 to `peak`, then half a cosine back to 0.

    Smith and Topin 2018. So high a rate moves the weights far enough to forget a trigger, and its fall brings the accuracy
    back (not in the paper, which keeps the rate)."""
    return peak * tf.where(share < RISING, share / RISING, 0.5 + 0.5 * tf.cos(math.pi * (share - RISING) / (1 - RISING)))


def divergence(taught, logits):
    """Distillation's loss for each image (Hinton et al. 2015; not in the paper), N. taught, logits: N×L.

    TEMPERATURE² times the Kullback-Leibler divergence of the softmax of both over TEMPERATURE: 0 where they are the same but
    for a constant. A label alone does not say how sure the examined model is, nor what else an image looks like to it.
    """
    wanted, given = (tf.nn.log_softmax(tf.cast(part, tf.float32) / TEMPERATURE) for part in (taught, logits))
    return TEMPERATURE**2 * tf.reduce_sum(tf.exp(wanted) * (wanted - given), axis=1)


class Stable:
    """True once the loss has not fallen for PATIENCE looks (the paper: "until the performance is stable")."""

    def __init__(self):
        self.best, self.looks = np.inf, 0

    def __call__(self, loss):
        self.best, self.looks = (loss, 0) if loss < self.best else (self.best, self.looks + 1)
        return self.looks >= PATIENCE


def shift_and_flip(images, seed, step):
    """Random crop of the image padded by 4, and random horizontal flip (release, CIFAR-10). uint8 N×H×W×C."""
    count, height, width = images.shape[0], images.shape[1], images.shape[2]
    key = tf.stack([tf.cast(seed, tf.int32), tf.cast(step, tf.int32)])
    padded = tf.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    corner = tf.random.stateless_uniform((2, count, 1), key, 0, 9, tf.int32)
    columns = tf.range(width) + corner[1]
    flip = tf.random.stateless_uniform((count, 1), key + 2_000_003) < 0.5
    columns = tf.where(flip, columns[:, ::-1], columns)
    rows = tf.gather(padded, tf.range(height) + corner[0], batch_dims=1)
    return tf.gather(rows, tf.repeat(columns[:, None], height, axis=1), axis=2, batch_dims=2)


def erase(images, seed, step, largest):
    """Random erasing (Zhong et al. 2017): a rectangle of noise or of one colour on ERASED of the images, anywhere.

    images: uint8 N×H×W×C, also the result. largest: the rectangle's sides are uniform up to this share of the image's.
    """
    count, height, width, channels = images.shape
    key = tf.stack([tf.cast(seed, tf.int32), tf.cast(step, tf.int32)])
    draw = tf.random.stateless_uniform((6, count), key + 3_000_017)
    inside = draw[5, :, None, None] < ERASED

    def span(size, length, place):
        """Which of `size` rows or columns the rectangles cover, N×size."""
        side = length[:, None] * largest * size
        first, pixels = place[:, None] * (size - side), tf.range(size, dtype=tf.float32) + 0.5
        return (first < pixels) & (pixels < first + side)
    inside &= span(height, draw[0], draw[1])[:, :, None] & span(width, draw[2], draw[3])[:, None, :]
    colour = tf.random.stateless_uniform((count, 1, 1, channels), key + 4_000_037, 0, 256, tf.int32)
    noise = tf.random.stateless_uniform((count, height, width, channels), key + 5_000_011, 0, 256, tf.int32)
    fill = tf.cast(tf.where(draw[4, :, None, None, None] < 0.5, noise, colour), tf.uint8)
    return tf.where(inside[..., None], fill, images)
