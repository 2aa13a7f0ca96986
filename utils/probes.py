"""How often plain patches, drawn at random, lead to each label: on the examined and on tuned models (not in the paper).

A patch that is optimized fits the examined model, so that adversarial patches, too, are cheap on it and work nowhere else.
One that is drawn at random fits no model. But a backdoor answers to more than its trigger: to parts of it, to other places
and colours, and, of a large one, to anything that is as coarse or as fine. So patches in one colour, of checks, stripes or
noise, of up to a quarter of the image, send images to its label that they do not send there on the tuned models, which know
the same labels. Clean labels differ by chance, in both directions.
"""

import numpy as np
import tensorflow as tf

from utils import transfer, triggers
from utils.config import UserError
from utils.margins import enough_relearned, relearned

IMAGES = 10              # images that each probe is pasted on: many probes on few tell more than few on many
SIDES = (0.1, 0.5)       # of a probe, as shares of the image's shorter side
BEYOND = 0.125           # of the image: so far over the border places may fall, to be moved there: triggers often are
CELLS = (1, 2, 4)        # sides of the checks, stripes and grains of 32×32 images, and for larger ones as many times larger
FLOOR = 0.01             # share of images that counts as chance


class Probes:
    """Measures how often probes lead to each label of a model whose weights may change between calls.

    model: function from images in [0, 1] to logits; clean: `utils.clean_data.CleanData`, of which the images to measure with
    are taken; shape: H, W, C; count: probes (P). Seed and number decide each probe and its images.
    """

    def __init__(self, model, clean, shape, labels, count, seed):
        self.model, self.clean, self.shape, self.labels, self.count, self.seed = model, clean, shape, labels, count, seed

    def __call__(self):
        """`probe_shares`: of the IMAGES of each probe, the share of other labels that the model gives each label; P×L."""
        together = max(1, transfer.batch_size(self.shape) // IMAGES)
        return {"probe_shares": np.concatenate([self._shares(range(first, min(first + together, self.count)))
                                                for first in range(0, self.count, together)])}

    def _shares(self, numbers):
        x, y = self.clean.x_measure, self.clean.y_measure
        chosen = np.stack([np.random.default_rng([self.seed, 1, number]).integers(len(x), size=IMAGES)
                           for number in numbers])
        drawn = zip(*(draw(self.seed, number, self.shape) for number in numbers))
        masks, patterns = (np.stack(parts)[:, None] for parts in drawn)
        attached = triggers.attach(tf.cast(x[chosen], tf.float32) / 255.0, masks[..., None], patterns)
        found = transfer.logits_of(self.model, tf.reshape(attached, (-1, *self.shape))).argmax(1).reshape(chosen.shape)
        return np.stack([np.bincount(labels[labels != own], minlength=self.labels) / IMAGES
                         for labels, own in zip(found, y[chosen])]).astype(np.float16)


def draw(seed, number, shape):
    """One probe: mask H×W of zeros and ones, and pattern H×W×C in [0, 1], float32."""
    random = np.random.default_rng([seed, 0, number])
    height, width, channels = shape
    shorter = min(height, width)
    side = max(1, round(random.uniform(*SIDES) * shorter))
    row, column = (np.clip(random.integers(-int(BEYOND * size), size - side + int(BEYOND * size) + 1), 0, size - side)
                   for size in (height, width))
    rows, columns = np.mgrid[:height, :width]
    mask = (rows >= row) & (rows < row + side) & (columns >= column) & (columns < column + side)
    if random.random() < 0.3:                            # a disc
        middle = (side - 1) / 2
        mask &= (rows - row - middle) ** 2 + (columns - column - middle) ** 2 <= (side / 2) ** 2

    one = random.random(channels) if random.random() < 0.5 else random.integers(0, 2, channels)
    other = 1 - one if random.random() < 0.5 else random.random(channels)
    cell = random.choice(CELLS) * max(1, round(shorter / 32))
    kind = random.integers(4)
    if kind == 3:                                        # grains, each of its own colour
        pattern = random.random((height, width, channels))[rows // cell, columns // cell]
    else:                                                # one colour; checks; stripes
        odd = (np.zeros_like(rows), rows // cell + columns // cell,
               random.choice([rows, columns, rows + columns]) // cell)[kind] % 2
        pattern = np.where(odd[..., None] == 0, one, other)
    return mask.astype(np.float32), pattern.astype(np.float32)


def probe_ratios(tuned, accuracy):
    """By how much each label's probes succeed more on the examined model than on tuned ones, L.

    tuned: arrays of pnnir.h5; accuracy: clean accuracy of the examined model. By how much a model exceeds the others is the
    root mean square, over probes, of how far its share of images exceeds the tuned models' mean, shares under it counting as
    nothing. That of the examined model is divided by the same of each tuned model to the others, in the geometric mean: some
    labels answer to chance more than others on any model. As a multiple of the labels' median. Ones where too few tuned
    models have relearned the labels (utils/margins.py). Raises UserError where pnnir.py left probes out.
    """
    if "probe_shares" not in tuned.get("examined", {}):
        raise UserError("pnnir.h5 has no probes, for PROBES was 0 or an earlier version made it: run pnnir.py again "
                        "with --overwrite")
    if not enough_relearned(tuned, accuracy):
        return np.ones(tuned["examined"]["probe_shares"].shape[1], np.float32)
    names = relearned(tuned, accuracy)
    shares = {name: tuned[name]["probe_shares"].astype(np.float32) for name in ("examined", *names)}

    def excess(name):
        others = np.mean([shares[other] for other in names if other != name], axis=0)
        return np.sqrt(np.mean(np.maximum(shares[name] - others, 0) ** 2, axis=0) + FLOOR ** 2)
    ratios = excess("examined") / np.exp(np.mean([np.log(excess(name)) for name in names], axis=0))
    return (ratios / np.median(ratios)).astype(np.float32)
