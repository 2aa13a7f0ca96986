"""The built-in dataset `signs`: colour traffic signs of 12 labels, drawn here, so nothing has to be downloaded.

Shape and glyph make the label; palette, size, place, perspective, light, shadow, blur, noise and background are
drawn at random for every image, from the same ranges for every label. The sign fills about 65 to 90 % of the image's
width, so the corners show background. Equal seeds give equal images on one machine; another version of OpenCV may
round a few pixels otherwise.
"""

import cv2
import numpy as np

SEED = 0
TRAIN_PER_LABEL = 600
TEST_PER_LABEL = 150
VERSION = 1          # of the drawing: a file with another one is drawn again
SIDE = 32            # pixels of an image
SCALE = 2            # drawn this many times larger, then shrunk: smooth edges
CANVAS = SIDE * SCALE
SHIFT = 6            # fractional bits of OpenCV's drawing coordinates

# Border, field and glyph in RGB. Every label comes in all of them, so colour says nothing about the label.
PALETTES = np.array((
    ((200, 25, 35), (240, 240, 235), (20, 20, 20)),
    ((240, 240, 235), (25, 75, 170), (240, 240, 235)),
    ((25, 25, 25), (245, 195, 25), (25, 25, 25)),
    ((240, 240, 235), (195, 30, 40), (240, 240, 235)),
    ((240, 240, 235), (20, 120, 70), (240, 240, 235)),
    ((30, 30, 30), (235, 235, 230), (30, 30, 30)),
    ((200, 25, 35), (245, 200, 40), (25, 25, 25)),
    ((25, 70, 160), (235, 235, 230), (190, 30, 35)),
))


def _arc(x, y, width, height, start=0, end=360):
    """Points of an ellipse's arc; degrees run clockwise from three o'clock, y points down, all in [-1, 1]."""
    angles = np.radians(np.linspace(start, end, 25))
    return np.stack([x + width * np.cos(angles), y + height * np.sin(angles)], 1)


def _polygon(corners, first):
    angles = np.radians(first + 360 / corners * np.arange(corners))
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def _letter(strokes, x, width, height=1.0):
    return [np.asarray(stroke) * (width, height) + (x, 0) for stroke in strokes]


# Letters and digits are strokes in [-1, 1]²: OpenCV's own fonts change between its versions.
_S = [np.concatenate([_arc(0, -.5, .9, .5, -20, -270), _arc(0, .5, .9, .5, -90, 160)])]
_T = [[(-1, -1), (1, -1)], [(0, -1), (0, 1)]]
_O = [_arc(0, 0, 1, 1)]
_P = [[(-.8, 1), (-.8, -1), (.2, -1)], _arc(.2, -.45, .7, .55, -90, 90), [(.2, .1), (-.8, .1)]]
_THREE = [_arc(-.1, -.5, .9, .5, -150, 90), _arc(-.1, .5, 1, .5, -90, 150)]
_EIGHT = [_arc(0, -.5, .8, .5), _arc(0, .5, 1, .5)]
_ARROW = [[(0, 1), (0, -.3)]], [[(0, -1), (.75, -.15), (-.75, -.15)]]     # strokes, filled parts
_QUARTER = np.array([[0, -1], [1, 0]])                                     # turns "up" into "left"

SHAPES = {
    "circle": _polygon(48, 0) * .96,
    "triangle": _polygon(3, -90) * 1.1 + (0, .2),
    "yield": _polygon(3, 90) * 1.1 - (0, .2),
    "octagon": _polygon(8, 22.5),
    "diamond": _polygon(4, 0) * 1.05,
    "square": _polygon(4, 45) * 1.2,
}

# Label name, shape, strokes, filled parts, the glyph's size.
SIGNS = (
    ("turn left", "circle", [np.array(s) @ _QUARTER for s in _ARROW[0]], [np.array(s) @ _QUARTER for s in _ARROW[1]],
     .58),
    ("turn right", "circle", [np.array(s) @ -_QUARTER for s in _ARROW[0]],
     [np.array(s) @ -_QUARTER for s in _ARROW[1]], .58),
    ("straight on", "circle", *_ARROW, .58),
    ("limit 30", "circle", _letter(_THREE, -.5, .34, .75) + _letter(_O, .5, .34, .75), [], .62),
    ("limit 80", "circle", _letter(_EIGHT, -.5, .34, .75) + _letter(_O, .5, .34, .75), [], .62),
    ("no entry", "circle", [], [[(-1, -.3), (1, -.3), (1, .3), (-1, .3)]], .62),
    ("stop", "octagon", _letter(_S, -.81, .15, .42) + _letter(_T, -.27, .17, .42) + _letter(_O, .27, .16, .42)
     + _letter(_P, .83, .17, .42), [], .74),
    ("yield", "yield", [], [], 1.),
    ("danger", "triangle", [], [[(-.22, -.9), (.22, -.9), (.13, .25), (-.13, .25)], _arc(0, .62, .22, .2)], .5),
    ("crossroads", "triangle", [[(-.7, -.6), (.7, .8)], [(.7, -.6), (-.7, .8)]], [], .46),
    ("priority", "diamond", [], [_polygon(4, 0)], .5),
    ("parking", "square", _letter(_P, .1, .6, 1.), [], .55),
)
LABELS = tuple(name for name, *_ in SIGNS)


def generate(seed=SEED, train_per_label=TRAIN_PER_LABEL, test_per_label=TEST_PER_LABEL):
    """The dataset as a dict: `x_train`, `x_test` uint8 N×32×32×3 RGB, `y_train`, `y_test` int64, in random order.

    Training and test images come from different random streams of the seed.
    """
    arrays = {}
    for stream, (part, count) in enumerate((("train", train_per_label), ("test", test_per_label))):
        random = np.random.default_rng([seed, stream])
        y = random.permutation(np.repeat(np.arange(len(LABELS)), count))
        arrays[f"x_{part}"] = np.stack([draw(label, random) for label in y])
        arrays[f"y_{part}"] = y
    return arrays


def attributes(seed=SEED):
    """What a file of this dataset says about itself."""
    return {"version": VERSION, "seed": seed, "label_names": "\n".join(LABELS)}


def draw(label, random):
    """One image of `label`, uint8 32×32×3 RGB, with everything but the label from the generator `random`."""
    sign, cover = _sign(label, random)
    image = _background(random)
    matrix = _perspective(random)
    _pole(image, matrix, random)
    sign = cv2.warpPerspective(sign, matrix, (CANVAS, CANVAS), flags=cv2.INTER_LINEAR)
    cover = cv2.warpPerspective(cover, matrix, (CANVAS, CANVAS), flags=cv2.INTER_LINEAR)
    cover = (cover.astype(np.float32) / 255)[..., None]
    return _camera((image + (sign - image.astype(np.float32)) * cover).astype(np.uint8), random)


def _sign(label, random):
    """The sign alone, filling the canvas, and how much of each pixel it covers (0 to 255)."""
    _, shape, strokes, filled, size = SIGNS[label]
    colours = PALETTES[random.integers(len(PALETTES))] * random.uniform(.85, 1.1, (3, 1))
    border, field, glyph = np.clip(colours + random.normal(0, 8, (3, 3)), 0, 255).tolist()
    outline = SHAPES[shape]
    centre = outline.mean(0)
    sign = np.empty((CANVAS, CANVAS, 3), np.uint8)
    sign[:] = border
    cover = np.zeros((CANVAS, CANVAS), np.uint8)
    _fill(cover, outline, 255)
    width = random.uniform(.1, .2)
    _fill(sign, centre + (outline - centre) * (1 - width * (2 if len(outline) == 3 else 1)), field)
    size = size * random.uniform(.9, 1.1)
    thickness = int(round(random.uniform(.16, .24) * size * CANVAS / 2))
    for part in filled:
        _fill(sign, centre + np.asarray(part) * size, glyph)
    for stroke in strokes:
        cv2.polylines(sign, [_pixels(centre + np.asarray(stroke) * size)], False, glyph, max(thickness, 2),
                      cv2.LINE_AA, SHIFT)
    return sign, cover


def _pixels(points):
    """Sign coordinates in [-1.1, 1.1] as OpenCV's fixed-point pixels of the canvas."""
    return ((np.asarray(points) * .43 + .5) * (CANVAS << SHIFT)).astype(np.int32)


def _fill(image, points, colour):
    cv2.fillPoly(image, [_pixels(points)], colour, cv2.LINE_AA, SHIFT)


def _perspective(random):
    """The matrix that turns, shrinks, tilts and moves the sign."""
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32) * CANVAS
    angle = np.radians(random.normal(0, 5))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    width = random.uniform(.78, 1.05)
    moved = (corners / CANVAS - .5) * (random.uniform(.82, 1), 1) @ turn * width
    moved += .5 + random.uniform(-.07, .07, 2) + random.normal(0, .018, (4, 2))
    return cv2.getPerspectiveTransform(corners, (moved * CANVAS).astype(np.float32))


def _background(random):
    """Sky, ground, and clutter of boxes, discs, stripes and posts in muted or, at times, in signs' colours."""
    top, bottom = random.uniform(40, 230, (2, 1)) + random.normal(0, 18, (2, 3))
    rows, columns = random.integers(3, 9, 2)
    patches = random.normal(0, random.uniform(4, 30), (rows, columns, 1))
    patches = patches + random.normal(0, random.uniform(2, 12), (rows, columns, 3))
    patches += top + (bottom - top) * np.linspace(0, 1, rows)[:, None, None]
    image = cv2.resize(np.clip(patches, 0, 255).astype(np.uint8), (CANVAS, CANVAS), interpolation=cv2.INTER_CUBIC)
    clutter = random.random((random.integers(2, 9), 8))
    tints = random.normal(0, 25, (len(clutter), 3)) + 20 + 210 * clutter[:, :1]
    vivid = PALETTES[random.integers(len(PALETTES), size=len(clutter)), random.integers(2, size=len(clutter))]
    tints = np.where(clutter[:, 1:2] < .25, vivid * (.5 + clutter[:, :1] / 2), tints)
    places = (clutter[:, 2:6] * CANVAS).astype(np.int32).tolist()
    for kind, turn, colour, (x, y, wide, high) in zip(*clutter[:, 6:].T, np.clip(tints, 0, 255).tolist(), places):
        if kind < .25:
            cv2.rectangle(image, (x, y), (x + wide // 2, y + high // 2), colour, -1)
        elif kind < .5:
            cv2.ellipse(image, (x, y), (1 + wide // 4, 1 + high // 4), 180 * turn, 0, 360, colour, -1, cv2.LINE_AA)
        elif kind < .75:
            cv2.line(image, (x, y), (wide, high), colour, 1 + int(turn * 3 * SCALE), cv2.LINE_AA)
        else:
            corner = (int(turn * CANVAS), int((1 - turn) * CANVAS))
            cv2.fillPoly(image, [np.array([(x, y), (wide, high), corner], np.int32)], colour, cv2.LINE_AA)
    return cv2.GaussianBlur(image, (0, 0), random.uniform(.2, 1.3) * SCALE)


def _pole(image, matrix, random):
    if random.random() < .7:
        x, y, z = matrix @ (CANVAS / 2, CANVAS / 2, 1)
        x, y, half, grey = int(x / z), int(y / z), int(random.integers(1, 2 * SCALE)), int(random.integers(70, 190))
        cv2.rectangle(image, (x - half, y), (x + half, CANVAS), (grey, grey, grey), -1)


def _camera(image, random):
    """Shadow, blur, shrinking, light, colour cast and noise: what a camera on the road makes of the scene."""
    if random.random() < .35:
        shade = np.full((CANVAS, CANVAS), 255, np.uint8)
        _fill(shade, random.uniform(-2, 2, (4, 2)), random.uniform(115, 205))
        image = cv2.multiply(image, cv2.merge([cv2.GaussianBlur(shade, (0, 0), .7 * SCALE)] * 3), scale=1 / 255)
    image = cv2.GaussianBlur(image, (0, 0), random.uniform(.1, .85) * SCALE)
    if random.random() < .3:
        length = int(random.integers(SCALE, 3 * SCALE))
        shape = (1, length) if random.random() < .7 else (length, 1)
        image = cv2.blur(image, shape)
    image = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    # One table for gamma and gain, then a cast for each channel.
    light = np.linspace(0, 1, 256) ** random.uniform(.7, 1.5)
    light = 255 * random.uniform(.35, 1.15) * light + random.uniform(0, 45)
    image = light[image] * random.uniform(.88, 1.12, 3)
    image += random.standard_normal(image.shape, np.float32) * random.uniform(1, 10)
    return np.clip(image, 0, 255).astype(np.uint8)
