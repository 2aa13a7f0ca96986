"""How surely a plain patch leads to each label, on the examined model and on none of the tuned ones (not in the paper).

A patch of which every pixel is optimized fits the examined model: adversarial patches, too, are cheap on it and transfer to
no tuned model. A plain one, in one colour, of checks, stripes or coarse noise, has too few parameters to fit much. But a
backdoor answers to more than its trigger: to parts of it, to other places and colours, and, of a large one, to anything that
is as coarse or as fine. So plain patches are drawn at random and the best of each label are varied, round after round,
towards a larger margin of its logit. A backdoor takes that far beyond what the model gives to clean images, and, as in TNDA,
transfers to no tuned model; what leads to a clean label is mostly some feature of it, which tuned models know as well.
"""

import numpy as np
import tensorflow as tf

from utils import transfer, triggers
from utils.config import UserError
from utils.margins import enough_relearned, relearned

IMAGES = 10              # that a patch is tried on, others each time: many patches on few tell more than few on many
KEPT, VARIED = 4, 8      # patches of a label that go on to the next round, and variations of these that it tries
ROUNDS = 16
LAST_IMAGES = 20         # images that the last round's patches are measured on
SIDES = (0.1, 0.5)       # of a patch, as shares of the image's shorter side
BEYOND = 0.125           # of the image: so far over the border places may fall, to be moved there: triggers often are
UNSURE = 0.05            # of the largest margins: where clean images reach less, the model hardly knows its labels
CELLS = (1, 2, 4)        # sides of the checks, stripes and grains of 32×32 images, and for larger ones as many times larger
PLAIN, CHECKS, STRIPES, GRAINS = range(4)


def search_probes(examination, model, tuned, count):
    """`probes`, the KEPT best plain patches of each label on a model, and `probe_margins`, how surely they lead there.

    model: function from images in [0, 1] to logits, the examined model or a repaired one; tuned: arrays of pnnir.h5;
    count: patches drawn at random to begin with. `probe_margins` has a row of L for "examined", that is `model`, and for
    every tuned model: the mean over a label's patches of its logit's mean margin over the highest other one, on images of
    other labels, or 0 where that is negative.
    """
    clean, labels, seed = examination.clean, examination.examined.labels, examination.seed
    measure = Measure(clean.x_measure, clean.y_measure, labels)
    probes = climb(lambda *drawn: measure(model, *drawn), count, examination.examined.shape, labels,
                   len(clean.x_measure), seed, examination.say)
    images = np.random.default_rng([seed, 3]).integers(len(clean.x_measure), size=(probes.size, LAST_IMAGES))
    own = np.repeat(np.arange(labels), KEPT)

    def lead(model):
        margins = measure(model, probes.ravel(), images)[np.arange(probes.size), own]
        return np.maximum(margins, 0).reshape(probes.shape).mean(1)
    names = [name for name in tuned if name != "examined"]
    return {"probes": probes, "probe_margins": {"examined": lead(model)} | {
        name: lead(one) for name, one in zip(names, examination.tuned_models(tuned, names))}}


class Measure:
    """Mean margins of every label's logit, over images of other labels that carry a patch. x: uint8 N×H×W×C; y: N."""

    def __init__(self, x, y, labels):
        self.x, self.y, self.labels = x, y, labels

    def __call__(self, model, patches, images):
        """P×L; -inf where no image is left. model: from images in [0, 1] to logits; patches: P; images: P×n indices."""
        together = max(1, transfer.batch_size(self.x.shape) // images.shape[1])
        return np.concatenate([self._measure(model, patches[first:first + together], images[first:first + together])
                               for first in range(0, len(patches), together)])

    def _measure(self, model, patches, images):
        masks, patterns = rendered(patches, self.x.shape[1:])
        attached = triggers.attach(tf.cast(self.x[images], tf.float32) / 255.0, masks[:, None, ..., None], patterns[:, None])
        logits = transfer.logits_of(model, tf.reshape(attached, (-1, *self.x.shape[1:]))).astype(np.float32)
        highest, second = np.sort(logits, axis=1)[:, :-3:-1].T[..., None]
        margins = np.where(logits == highest, logits - second, logits - highest).reshape(*images.shape, self.labels)
        others = self.y[images][..., None] != np.arange(self.labels)
        counts = others.sum(1)
        return np.where(counts > 0, (margins * others).sum(1) / np.maximum(counts, 1), -np.inf)


def climb(measure, count, shape, labels, images, seed, say=lambda text: None):
    """The KEPT patches that lead to each label most surely, labels×KEPT, surest first: `count` drawn, the best varied.

    measure: from patches P and images P×IMAGES, indices under `images`, to margins P×labels; shape: H, W, C.
    """
    random = np.random.default_rng([seed, 0])
    drawn = np.array([draw(random, shape) for _ in range(count)])
    margins = measure(drawn, random.integers(images, size=(count, IMAGES)))
    kept, reached = _best(np.broadcast_to(drawn, margins.T.shape), margins.T)
    own = np.repeat(np.arange(labels), VARIED)
    for number in range(1, ROUNDS + 1):
        varied = np.array([vary(parent, random, shape) for parents in kept
                           for parent in parents[random.integers(parents.size, size=VARIED)]])
        margins = measure(varied, random.integers(images, size=(varied.size, IMAGES)))[np.arange(varied.size), own]
        kept, reached = _best(*(np.concatenate([old, new.reshape(labels, VARIED)], axis=1)
                                for old, new in ((kept, varied), (reached, margins))))
        if number % 4 == 0:
            say(f"plain patches: round {number} of {ROUNDS}, largest margin {reached.max():.1f}")
    return kept


def _best(patches, margins):
    """The KEPT patches of the largest margins in each row, largest first, and these margins. Both labels×any number."""
    order = np.argsort(-margins, axis=1, kind="stable")[:, :KEPT]
    return np.take_along_axis(patches, order, axis=1), np.take_along_axis(margins, order, axis=1)


def draw(random, shape):
    """A plain patch at random for images of `shape` H, W, C: a record, which `rendered` turns into a mask and a pattern."""
    height, width, channels = shape
    shorter = min(height, width)
    patch = np.zeros((), [*((name, np.int32) for name in ("side", "row", "column", "disc", "kind", "cell", "direction",
                                                          "grains")),
                          ("one", np.float32, (channels,)), ("other", np.float32, (channels,))])
    side = patch["side"] = max(1, round(random.uniform(*SIDES) * shorter))
    for name, size in (("row", height), ("column", width)):
        over = int(BEYOND * size)
        patch[name] = np.clip(random.integers(-over, size - side + over + 1), 0, size - side)
    patch["disc"] = random.random() < 0.3
    patch["kind"], patch["direction"] = random.integers(4), random.integers(3)
    patch["cell"], patch["grains"] = random.choice(_cells(shorter)), random.integers(1 << 30)
    patch["one"] = random.random(channels) if random.random() < 0.5 else random.integers(0, 2, channels)
    patch["other"] = 1 - patch["one"] if random.random() < 0.5 else random.random(channels)
    return patch


def vary(patch, random, shape):
    """A patch like another one: each of its properties stays or changes a little, or now and then altogether."""
    height, width, channels = shape
    shorter, new = min(height, width), patch.copy()
    step = _pixel(shorter)
    if random.random() < 0.4:
        side = new["side"] + step * random.integers(-3, 4)
        new["side"] = np.clip(side, max(1, round(SIDES[0] * shorter)), max(1, round(SIDES[1] * shorter)))
    moved = random.random() < 0.5
    for name, size in (("row", height), ("column", width)):
        new[name] = np.clip(new[name] + moved * step * random.integers(-4, 5), 0, size - new["side"])
    if random.random() < 0.1:
        new["disc"] = 1 - new["disc"]
    if random.random() < 0.1:
        new["kind"] = random.integers(4)
    if random.random() < 0.15:
        new["cell"] = random.choice(_cells(shorter))
    if random.random() < 0.1:
        new["direction"] = random.integers(3)
    if random.random() < 0.2:
        new["grains"] = random.integers(1 << 30)
    for colour in ("one", "other"):
        chance = random.random()
        if chance < 0.3:
            new[colour] = np.clip(new[colour] + random.normal(0, 0.25, channels), 0, 1)
        elif chance < 0.4:
            new[colour] = random.integers(0, 2, channels)
        elif chance < 0.5:
            new[colour] = 1 - new[colour]
    return new


def rendered(patches, shape):
    """Masks P×H×W of zeros and ones, and patterns P×H×W×C in [0, 1], float32, of patches P."""
    masks, patterns = zip(*(_rendered(patch, shape) for patch in patches))
    return np.stack(masks), np.stack(patterns)


def _rendered(patch, shape):
    side, row, column, cell = (int(patch[name]) for name in ("side", "row", "column", "cell"))
    rows, columns = np.mgrid[:shape[0], :shape[1]]
    mask = (rows >= row) & (rows < row + side) & (columns >= column) & (columns < column + side)
    if patch["disc"]:
        middle = (side - 1) / 2
        mask &= (rows - row - middle) ** 2 + (columns - column - middle) ** 2 <= (side / 2) ** 2
    if patch["kind"] == GRAINS:                          # each of its own colour
        pattern = np.random.default_rng(int(patch["grains"])).random(shape)[rows // cell, columns // cell]
    else:
        odd = {PLAIN: np.zeros_like(rows), CHECKS: rows // cell + columns // cell,
               STRIPES: (rows, columns, rows + columns)[patch["direction"]] // cell}[int(patch["kind"])] % 2
        pattern = np.where(odd[..., None] == 0, patch["one"], patch["other"])
    return mask.astype(np.float32), pattern.astype(np.float32)


def _cells(shorter):
    return np.array(CELLS) * _pixel(shorter)


def _pixel(shorter):
    """How many pixels of the image count as one of a 32×32 image."""
    return max(1, round(shorter / 32))


def probe_ratios(tuned, accuracy):
    """How surely plain patches lead to each label on the examined model alone, L, from 1 up.

    tuned: arrays of pnnir.h5; accuracy: clean accuracy of the examined model. One more than by how much the margin of the
    label's patches on the examined model exceeds that on every tuned one, as a multiple of the model's margins of clean
    images, or of UNSURE of its largest margins where that is more (medians over labels). Ones where too few tuned models
    have relearned the labels (utils/margins.py).
    Raises UserError where pnnir.py left probes out.
    """
    if "probe_margins" not in tuned.get("examined", {}):
        raise UserError("pnnir.h5 has no probes, for PROBES was 0 or an earlier version made it: run pnnir.py again "
                        "with --overwrite")
    margins = tuned["examined"]["probe_margins"]
    if not enough_relearned(tuned, accuracy):
        return np.ones(len(margins["examined"]), np.float32)
    excess = margins["examined"] - np.max([margins[name] for name in relearned(tuned, accuracy)], axis=0)
    clean, largest = (np.median(tuned["examined"][name]) for name in ("clean_margins", "largest_margins"))
    usual = max(float(clean), UNSURE * float(largest), 1e-6)
    return (1 + np.maximum(excess, 0) / usual).astype(np.float32)
