"""Plain patches traced from reconstructed ones: the outline of a label's patch, filled with one colour (not in the paper).

Plain patches that are drawn at random (utils/plain_patches.py) miss triggers that answer to little but themselves, and those
whose target has a colour of its own that leads there as surely. Gradients lead a patch proper (utils/reconstruction.py) to
where a trigger is, and away from what tuned model 123 knows; but it fits the examined model, pixel by pixel, so that it
leads to clean labels as well. Traced, with gaps closed and one colour, it fits no more, and a backdoor answers to it still.
"""

import itertools

import cv2
import numpy as np

from utils import triggers
from utils.margins import relearned
from utils.plain_patches import AGAINST, pixel
from utils.probes import Measure, excess, mean_of_own

SOLID = 0.5              # a mask's value, above which it is part of the outline
CLOSED = (0, 3, 5)       # gaps that are closed, and
GROWN = (0, 1, 2)        # by how much outlines grow: pixels of 32×32 images, of larger ones as many times more
PARTS = (1, 2, 4, None)  # connected parts that are taken, the largest; None: all
IMAGES, TRIED = 5, 12    # images that all of a label's are tried on, and how many go on
LAST_IMAGES, KEPT = 20, 4                # the same of these


def trace_patches(examination, tuned, model, arrays, stage):
    """`patches`, the KEPT traced ones of each label that lead to it most surely, and `probe_margins`, how surely.

    tuned: arrays of pnnir.h5; model: the examined one, from images in [0, 1] to logits; arrays: `mask` L×H×W and `pattern`
    L×H×W×C of the labels' patches; stage: its parts keep each label's. Chosen are those of the largest `excess` over the
    first taught model that relearned the labels. `patches` are records, L×KEPT, that `rendered` takes; `probe_margins` as
    those of `utils.probes.search_probes`. Nothing where no taught model relearned the labels.
    """
    names = relearned(tuned, examination.accuracy, AGAINST)
    taught = examination.tuned_models(tuned, names)
    other = next(taught, None)
    if other is None:
        return {}
    clean, labels = examination.clean, range(examination.examined.labels)
    measure = Measure(attached, clean.x_measure, clean.y_measure, len(labels))

    def best(label):
        patches, random = outlined(arrays["mask"][label], arrays["pattern"][label]), _random(examination, label)
        for images, kept in ((IMAGES, TRIED), (LAST_IMAGES, KEPT)):
            images = random.integers(len(clean.x_measure), size=(len(patches), images))
            leads = excess(*(measure(one, patches, images)[:, label] for one in (model, other)))
            patches = patches[np.argsort(-leads, kind="stable")[:kept]]
        return np.resize(patches, KEPT)
    patches = np.stack([stage.part(f"traced-{label}", lambda: {"patches": best(label)})["patches"] for label in labels])
    examination.say("traced the patches of all labels")
    rows = {"examined": mean_margins(examination, model, patches)}
    rows |= {name: mean_margins(examination, one, patches)
             for name, one in zip(names, itertools.chain([other], taught))}
    return {"patches": patches, "probe_margins": rows}


def mean_margins(examination, model, patches):
    """How surely a label's patches lead to it on a model, the mean over images of other labels, L. patches: L×n records."""
    clean, labels = examination.clean, len(patches)
    images = _random(examination, labels).integers(len(clean.x_measure), size=(patches.size, LAST_IMAGES))
    return mean_of_own(Measure(attached, clean.x_measure, clean.y_measure, labels)(model, patches.ravel(), images))


def outlined(mask, pattern):
    """The traced patches of a mask H×W and a pattern H×W×C, both in [0, 1]: records, at least one.

    Of every outline one in the mean colour of what it covers, and one in each colour of channels that are 0 or 1.
    """
    scale, solid = pixel(min(mask.shape)), np.uint8(mask > SOLID)
    outlines = {}
    for closed, taken, grown in itertools.product(CLOSED, PARTS, GROWN):
        filled = _closed(solid, closed * scale)
        _, parts, sizes, _ = cv2.connectedComponentsWithStats(filled, connectivity=8)
        largest = 1 + np.argsort(-sizes[1:, cv2.CC_STAT_AREA], kind="stable")
        outline = np.isin(parts, largest[:taken]).astype(np.uint8)
        weights = mask * outline
        colour = np.tensordot(weights, pattern, 2) / max(weights.sum(), 1e-6)
        outline = cv2.dilate(outline, _square(2 * grown * scale + 1))
        outlines.setdefault((outline.tobytes(), colour.round(2).tobytes()), (outline, colour))
    corners = list(itertools.product((0, 1), repeat=pattern.shape[-1]))
    found = {(outline.tobytes(), tuple(colour)): (outline, colour)
             for outline, mean in outlines.values() for colour in (mean, *corners)}
    return np.array(list(found.values()), [("outline", np.uint8, mask.shape), ("colour", np.float32, pattern.shape[-1:])])


def attached(images, patches):
    """Images that carry a patch each, float32 in [0, 1], P×n×H×W×C. images: the same without, uint8; patches: P."""
    return triggers.attach_all(images, *rendered(patches))


def rendered(patches):
    """Masks P×H×W of zeros and ones, and patterns P×H×W×C in [0, 1], float32, of patches P."""
    masks = patches["outline"].astype(np.float32)
    return masks, np.broadcast_to(patches["colour"][:, None, None], (*masks.shape, patches["colour"].shape[-1]))


def _closed(solid, gap):
    """`solid` without gaps of so many pixels; those between it and the image's border stay."""
    padded = cv2.morphologyEx(np.pad(solid, gap), cv2.MORPH_CLOSE, _square(gap)) if gap else solid
    return padded[gap:len(padded) - gap, gap:padded.shape[1] - gap]


def _square(side):
    return np.ones((side, side), np.uint8)


def _random(examination, number):
    return np.random.default_rng([examination.seed, 4, number])
