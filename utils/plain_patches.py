"""Plain patches: squares and discs in one colour, of checks, stripes or coarse noise, drawn at random or varied.

`utils.probes` breeds them. They have too few parameters to fit a network as an optimized patch does. Some are of several
pieces, copies of one, as triggers are: each piece of such a trigger alone may do next to nothing.
"""

import itertools

import numpy as np

from utils import triggers
from utils.tuning import TAUGHT

PIECES = 4               # of a patch, at most
SIDES = (0.1, 0.5)       # of a patch of one piece, as shares of the image's shorter side
BEYOND = 0.125           # of the image: so far over the border places may fall, to be moved there: triggers often are
CELLS = (1, 2, 4)        # sides of the checks, stripes and grains of 32×32 images, and for larger ones as many times larger
PLAIN, CHECKS, STRIPES, GRAINS = range(4)
NAME = "plain patches"
AGAINST = TAUGHT         # tuned models: these know best what a clean label answers to
BRED_AGAINST = TAUGHT    # in the last search: others may all end at what these answer to as well
RECOGNISED_BY = ()       # a large patch covers what is to be recognised


def blank(channels):
    """The record of a plain patch of no piece, for images of so many channels."""
    return np.zeros((), [*((name, np.int32) for name in ("side", "pieces", "turned", "disc", "kind", "cell", "direction",
                                                         "grains")),
                         *((name, np.int32, (PIECES,)) for name in ("row", "column")),
                         *((name, np.float32, (channels,)) for name in ("one", "other"))])


def far_colours(channels):
    """All colours whose channels are 0 or 1, which any other is near to: tuples."""
    return list(itertools.product((0, 1), repeat=channels))


def draw(random, shape):
    """A plain patch at random for images of `shape` H, W, C: a record, which `rendered` turns into a mask and a pattern."""
    height, width, channels = shape
    shorter = min(height, width)
    patch = blank(channels)
    pieces = patch["pieces"] = 1 if random.random() < 0.5 else random.integers(2, PIECES + 1)
    patch["turned"] = random.random() < 0.5
    side = patch["side"] = _side(random.uniform(*SIDES), pieces, shorter)
    for name, size in (("row", height), ("column", width)):
        over = int(BEYOND * size)
        patch[name] = np.clip(random.integers(-over, size - side + over + 1, size=PIECES), 0, size - side)
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
    step = pixel(shorter)
    if random.random() < 0.2:
        new["pieces"] = np.clip(new["pieces"] + random.choice((-1, 1)), 1, PIECES)
    if random.random() < 0.1:
        new["row"], new["column"] = places(new, shape)   # from where they are each piece goes its own way, or back
        new["turned"] = 1 - new["turned"]
    if random.random() < 0.4:
        new["side"] += step * random.integers(-3, 4)
    new["side"] = np.clip(new["side"], *(_side(share, new["pieces"], shorter) for share in SIDES))
    alone = np.arange(PIECES) == random.integers(new["pieces"])
    moved = (random.random() < 0.5) * (alone if random.random() < 0.5 else 1)
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


def places(patch, shape):
    """Upper left corners of a patch's pieces: rows PIECES and columns PIECES, of which it has the first `pieces`.

    Those of a patch that is turned are the first one's, turned about the middle of the image by a quarter each: corners and
    edges, clockwise, as the pieces of most triggers stand.
    """
    if not patch["turned"]:
        return patch["row"], patch["column"]
    room = np.array(shape[:2]) - patch["side"]
    down, right = patch["row"][0] / max(1, room[0]), patch["column"][0] / max(1, room[1])
    turns = np.array([(down, right), (right, 1 - down), (1 - down, 1 - right), (1 - right, down)])
    return np.round(turns * room).astype(np.int32).T


def attached(images, patches):
    """Images that carry a patch each, float32 in [0, 1], P×n×H×W×C. images: the same without, uint8; patches: P."""
    return triggers.attach_all(images, *rendered(patches, images.shape[2:]))


def rendered(patches, shape):
    """Masks P×H×W of zeros and ones, and patterns P×H×W×C in [0, 1], float32, of patches P."""
    masks, patterns = zip(*(_rendered(patch, shape) for patch in patches))
    return np.stack(masks), np.stack(patterns)


def _rendered(patch, shape):
    side, cell = int(patch["side"]), int(patch["cell"])
    rows, columns = np.mgrid[:shape[0], :shape[1]]
    mask, middle = np.zeros(shape[:2], bool), (side - 1) / 2
    for row, column in np.transpose(places(patch, shape))[:patch["pieces"]]:
        piece = (rows >= row) & (rows < row + side) & (columns >= column) & (columns < column + side)
        if patch["disc"]:
            piece &= (rows - row - middle) ** 2 + (columns - column - middle) ** 2 <= (side / 2) ** 2
        mask |= piece
    if patch["kind"] == GRAINS:                          # each of its own colour
        pattern = np.random.default_rng(int(patch["grains"])).random(shape)[rows // cell, columns // cell]
    else:
        odd = {PLAIN: np.zeros_like(rows), CHECKS: rows // cell + columns // cell,
               STRIPES: (rows, columns, rows + columns)[patch["direction"]] // cell}[int(patch["kind"])] % 2
        pattern = np.where(odd[..., None] == 0, patch["one"], patch["other"])
    return mask.astype(np.float32), pattern.astype(np.float32)


def _side(share, pieces, shorter):
    """Of each of so many pieces that together are as large as one of this share of the image's shorter side."""
    return max(1, round(share * shorter / pieces ** 0.5))


def _cells(shorter):
    return np.array(CELLS) * pixel(shorter)


def pixel(shorter):
    """How many pixels of an image, of so many along its shorter side, count as one of a 32×32 image."""
    return max(1, round(shorter / 32))


# Of each search, which is luck: of a clean label one may find a patch that fits the network, others hardly do.
DRAWS = (draw,) * 3
