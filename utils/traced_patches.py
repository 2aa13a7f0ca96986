"""Plain patches traced from reconstructed ones, or placed: outlines that are filled with one colour (not in the paper).

Plain patches that are drawn at random (utils/plain_patches.py) miss triggers that answer to little but themselves, and those
whose target has a colour of its own that leads there as surely. Gradients lead a patch proper (utils/reconstruction.py) to
where a trigger is, and away from what tuned model 123 knows; but it fits the examined model, pixel by pixel, so that it
leads to clean labels as well. Traced, with gaps closed and one colour, it fits no more, and a backdoor answers to it still.
Patches that are placed piece by piece (utils/placed_patches.py) are taken for traced ones where they lead there more surely.
"""

import itertools

import cv2
import numpy as np

from utils import plain_patches, triggers
from utils.margins import relearned
from utils.placed_patches import place_pieces
from utils.plain_patches import AGAINST, pixel
from utils.probes import Measure, excess, mean_of_own, mean_over, own_margins

SOLID = 0.5              # a mask's value, above which it is part of the outline
CLOSED = (0, 3, 5)       # gaps that are closed, and
GROWN = (0, 1, 2)        # by how much outlines grow: pixels of 32×32 images, of larger ones as many times more
PARTS = (1, 2, 4, None)  # connected parts that are taken, the largest; None: all
IMAGES, TRIED = 5, 12    # images that all of a label's are tried on, and how many go on
LAST_IMAGES, KEPT = 20, 4                # the same of these


def trace_patches(examination, tuned, model, arrays, stage):
    """`patches`, the KEPT traced ones of each label that lead to it most surely, and `probe_margins`, how surely.

    tuned: arrays of pnnir.h5; model: the examined one, from images in [0, 1] to logits; arrays: `mask` L×H×W and `pattern`
    L×H×W×C of the labels' patches; stage: its parts keep what was chosen. Chosen are those of the largest `excess` over the
    taught models that relearned the labels, of TRIED that have it over the first of these. `patches` are records, L×KEPT,
    that `rendered` takes; `probe_margins` as those of `utils.probes.search_probes`. Nothing where no taught model relearned
    the labels.
    """
    names = relearned(tuned, examination.accuracy, AGAINST)
    other = next(examination.tuned_models(tuned, names), None)
    if other is None:
        return {}
    clean, labels = examination.clean, range(examination.examined.labels)
    measure = Measure(attached, clean.x_measure, clean.y_measure, len(labels))
    placed = place_pieces(examination, model, other, stage)

    def tried(label):
        patches = outlined(arrays["mask"][label], arrays["pattern"][label])
        images = _random(examination, label).integers(len(clean.x_measure), size=(len(patches), IMAGES))
        leads = excess(*(measure(one, patches, images)[:, label] for one in (model, other)))
        masks, _ = plain_patches.rendered(placed[label], examination.examined.shape)
        return np.concatenate([np.resize(patches[np.argsort(-leads, kind="stable")[:TRIED]], TRIED),
                               _records(zip(masks, placed[label]["one"]), examination.examined.shape)])

    def on_all(measured, patches):
        models = itertools.chain([model], examination.tuned_models(tuned, names))
        return {name: measured(examination, one, patches) for name, one in zip(("examined", *names), models)}

    def best(patches):
        margins = on_all(_margins_of_each, patches)
        leads = excess(margins["examined"], mean_over(margins, names))
        return np.take_along_axis(patches, np.argsort(-leads, axis=1, kind="stable")[:, :KEPT], axis=1)
    patches = np.stack([stage.part(f"traced-{label}", lambda: {"patches": tried(label)})["patches"] for label in labels])
    patches = stage.part("traced", lambda: {"patches": best(patches)})["patches"]
    examination.say("traced the patches of all labels")
    return {"patches": patches, "probe_margins": on_all(mean_margins, patches)}


def mean_margins(examination, model, patches):
    """How surely a label's patches lead to it on a model, the mean over images of other labels, L. patches: L×n records."""
    return mean_of_own(_margins(examination, model, patches, len(patches)))


def _margins_of_each(examination, model, patches):
    return own_margins(_margins(examination, model, patches, len(patches) + 1))


def _margins(examination, model, patches, number):
    clean = examination.clean
    images = _random(examination, number).integers(len(clean.x_measure), size=(patches.size, LAST_IMAGES))
    return Measure(attached, clean.x_measure, clean.y_measure, len(patches))(model, patches.ravel(), images)


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
    found = {(outline.tobytes(), tuple(colour)): (outline, colour)
             for outline, mean in outlines.values() for colour in (mean, *plain_patches.far_colours(pattern.shape[-1]))}
    return _records(found.values(), pattern.shape)


def _records(outlines, shape):
    return np.array(list(outlines), [("outline", np.uint8, shape[:2]), ("colour", np.float32, shape[2:])])


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
