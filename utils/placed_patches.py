"""Plain patches placed piece by piece, each where it leads to the label most surely (not in the paper).

A backdoor of several pieces answers to little but most of them in their places, which patches drawn at random hardly ever
have (utils/plain_patches.py), and where an adversarial patch is cheaper than they are there is no trace of them in the
reconstructed ones (utils/traced_patches.py). But each piece moves the target's logit a little, on the examined model alone:
the one that moves it most is placed first, the next one where it adds most to that.
"""

import numpy as np

from utils import plain_patches
from utils.probes import Measure, own_margins

# Of the pieces, squares in one colour, and from place to place: pixels of 32×32 images, of larger ones as many times more.
# Larger pieces together are shaped like signs: four of 6×6 lead to a clean label of GTSRB most surely (results/tried.md).
SIDE, STRIDE = 4, 3
GREY = 0.5               # in all channels: beside the far colours the one that is far from all of them
BRANCHES = 2             # patches of a label that another piece is added to
IMAGES = 10              # that all are tried on, the same ones: little differences are to be told


def place_pieces(examination, model, other, stage):
    """Of each label BRANCHES patches of one piece, of two, and so on: records of `utils.plain_patches`, L×n.

    Chosen are those by which the label's margin on `model`, the examined one, exceeds that on `other`, a taught one, by
    most; both are functions from images in [0, 1] to logits. stage: its parts keep those of each number of pieces.
    """
    shape, labels, clean = examination.examined.shape, examination.examined.labels, examination.clean
    measure = Measure(plain_patches.attached, clean.x_measure, clean.y_measure, labels)
    images = np.random.default_rng([examination.seed, 5]).integers(len(clean.x_measure), size=IMAGES)
    places, singles = _places(shape), _singles(shape)

    def exceeds(patches):
        """P×L; labels that no image is left for have nothing."""
        examined, taught = (measure(one, patches, np.broadcast_to(images, (len(patches), IMAGES))) for one in (model, other))
        return np.where(np.isfinite(examined), examined, 0) - np.where(np.isfinite(taught), taught, 0)

    def with_another(patches):
        more = np.repeat(patches, len(places), axis=1)
        for name, tried in zip(("row", "column"), places.T):
            more[name][..., more["pieces"][0, 0]] = np.tile(tried, BRANCHES)
        more["pieces"] += 1
        return _best(more, own_margins(exceeds(more.ravel())))
    found = [stage.part("placed-1", lambda: {"patches": _best(np.broadcast_to(singles, (labels, len(singles))),
                                                              exceeds(singles).T)})["patches"]]
    for pieces in range(2, plain_patches.PIECES + 1):
        found.append(stage.part(f"placed-{pieces}", lambda: {"patches": with_another(found[-1])})["patches"])
        examination.say(f"placed {pieces} of {plain_patches.PIECES} pieces")
    return np.concatenate(found, axis=1)


def _places(shape):
    """Upper left corners that pieces are tried at, n×2."""
    side, stride = (number * plain_patches.pixel(min(shape[:2])) for number in (SIDE, STRIDE))
    return np.stack(np.meshgrid(*(np.arange(0, size - side + 1, stride) for size in shape[:2])), axis=-1).reshape(-1, 2)


def _singles(shape):
    """All patches of one piece: records."""
    patch, places = plain_patches.blank(shape[2]), _places(shape)
    patch["side"] = SIDE * plain_patches.pixel(min(shape[:2]))
    patch["pieces"] = patch["cell"] = 1
    colours = np.array([*plain_patches.far_colours(shape[2]), (GREY,) * shape[2]])
    patches = np.tile(patch, (len(colours), len(places)))
    patches["one"], (patches["row"][..., 0], patches["column"][..., 0]) = colours[:, None], places.T
    return patches.ravel()


def _best(patches, leads):
    """The BRANCHES patches of the largest leads in each row, no two with the same places. Both labels×any number."""
    found = []
    for row, leads_there in zip(patches, leads):
        different = {}
        for patch in row[np.argsort(-leads_there, kind="stable")]:
            at = frozenset(zip(*(patch[name][:patch["pieces"]].tolist() for name in ("row", "column"))))
            different.setdefault(at, patch)
            if len(different) == BRANCHES:
                break
        found.append(np.resize(list(different.values()), BRANCHES))
    return np.stack(found)
