"""Photo filters: what programs for pictures do to colours, drawn at random or varied.

`utils.probes` breeds them. A filter mixes the channels, bends the tones of each, sets the lightness of its black and its
white, and darkens the corners; in a search of their own, all turn bright tones round, as film does that saw light: 21
parameters, too few to fit a network. Sepia, nashville, gotham and the like are such filters, or near one; a colour matrix
(paper, supplementary) lifts no shadows. Every filter keeps dark, middle and bright tones apart: one that erases all leads
to some label on any model. Written apart from the triggers of models/attacks.py on purpose.
"""

import numpy as np
import tensorflow as tf

from utils.tuning import SUBSETS

LUMINANCE = (0.299, 0.587, 0.114)        # of red, green and blue
# Bounds that leave something to be seen.
GAIN = (0.6, 1.5)        # of a channel for white: the sums of the matrix' columns
GAMMA = (0.5, 2.0)
CURVE = (-0.5, 2.0)      # contrast: from no change at 0 to the S-curve 3x² - 2x³ at 1, and as far beyond
BLACK, WHITE = (0.0, 0.35), (0.65, 1.0)
CORNERS = (0.0, 0.8)     # of the light that is missing there
TURN = (0.0, 1.0)        # the tone above which tones go down again: a solarized picture, at 0 a negative; 1 for none
GREYS = np.full((1, 3, 3, 3, 3), np.array([0, 128, 255], np.uint8)[:, None, None, None])
APART = 0.1              # in lightness: black and middle grey, and middle grey and white, whatever else a filter does
NAME = "photo filters"
AGAINST = SUBSETS        # tuned models: a filter counts in the images that these recognise
BRED_AGAINST = ()        # they hardly fit a network
RECOGNISED_BY = SUBSETS[::-1]    # the first that relearned: filters are bred in images that it recognises
FIELDS = [("matrix", np.float32, (3, 3)), ("gamma", np.float32, (3,)), ("curve", np.float32),
          ("black", np.float32, (3,)), ("white", np.float32, (3,)), ("corners", np.float32),
          ("turn", np.float32)]


def draw(random, shape):
    """A filter at random: a record, which `attached` applies."""
    while True:
        photo = _drawn(random)
        if _leaves_picture(photo):
            return photo


def draw_turned(random, shape):
    """A filter at random that turns bright tones round: among others they are lost, since few of these come near one."""
    while True:
        photo = _drawn(random)
        photo["turn"] = random.uniform(*TURN)
        if _leaves_picture(photo):
            return photo


def vary(photo, random, shape):
    """A filter like another one: each of its properties stays or changes a little."""
    new = _varied(photo, random)
    return new if _leaves_picture(new) else photo.copy()


def _drawn(random):
    photo = np.zeros((), FIELDS)
    grey = random.choice([0, 1, random.random()])
    mixed = (1 - grey) * np.eye(3) + grey * np.outer(LUMINANCE, np.ones(3))
    if random.random() < 0.3:
        mixed = mixed[:, random.permutation(3)]
    photo["matrix"] = _bounded(mixed + random.normal(0, 0.1, (3, 3)) * (random.random() < 0.5))
    photo["gamma"] = np.clip(np.exp(random.normal(0, 0.35, random.choice([1, 3]))), *GAMMA)
    photo["curve"] = random.uniform(*CURVE) * (random.random() < 0.5)
    photo["black"] = random.uniform(*BLACK, 3) * (random.random(3) < 0.5)
    photo["white"] = random.uniform(*WHITE, 3)
    photo["corners"] = random.uniform(*CORNERS) * (random.random() < 0.5)
    photo["turn"] = TURN[1]
    return photo


def _varied(photo, random):
    new = photo.copy()
    if random.random() < 0.5:
        new["matrix"] = _bounded(new["matrix"] + random.normal(0, 0.12, (3, 3)))
    if random.random() < 0.15:
        grey = random.random()
        new["matrix"] = (1 - grey) * new["matrix"] + grey * new["matrix"].mean(axis=1, keepdims=True)
    if random.random() < 0.4:
        new["gamma"] = np.clip(new["gamma"] * np.exp(random.normal(0, 0.25, 3)), *GAMMA)
    for name, step, bounds, chance in (("curve", 0.3, CURVE, 0.3), ("black", 0.1, BLACK, 0.4), ("white", 0.1, WHITE, 0.4),
                                       ("corners", 0.2, CORNERS, 0.3),
                                       ("turn", 0.1, TURN, 0.3 * (new["turn"] < TURN[1]))):
        if random.random() < chance:
            new[name] = np.clip(new[name] + random.normal(0, step, new[name].shape), *bounds)
    return new


def attached(images, photos):
    """Images through a filter each, float32 in [0, 1], P×n×H×W×3. images: the same without, uint8; photos: P."""
    rows, columns = (np.linspace(-1, 1, size, dtype=np.float32) ** 2 / 2 for size in images.shape[2:4])
    far = np.add.outer(rows, columns)[..., None]         # the squared distance from the middle, 1 at the corners
    return _attached(tf.constant(images), tf.constant(far), *(tf.constant(photos[name]) for name, *_ in FIELDS))


@tf.function(reduce_retracing=True)
def _attached(images, far, matrix, gamma, curve, black, white, corners, turn):
    def per_photo(values):
        return values[:, None, None, None]
    x = tf.clip_by_value(tf.einsum("pnhwc,pcd->pnhwd", tf.cast(images, tf.float32) / 255.0, matrix), 0.0, 1.0)
    x = x ** per_photo(gamma)
    turn = per_photo(turn[:, None])
    x = tf.where(x > turn, 2 * turn - x, x) - tf.minimum(2 * turn - 1, 0.0)      # the lowest tone is at 0 again
    x = tf.clip_by_value(x + per_photo(curve[:, None]) * (x * x * (3 - 2 * x) - x), 0.0, 1.0)
    x = per_photo(black) + per_photo(white - black) * x
    return x * (1 - per_photo(corners[:, None]) * far)


def _leaves_picture(photo):
    """Whether the tones stay APART: several bounds together would let a filter make all of them one."""
    lightness = attached(GREYS, photo[None]).numpy()[0, :, 1, 1] @ LUMINANCE       # in the middle, where no light is missing
    return (np.abs(np.diff(lightness)) >= APART).all()


def _bounded(matrix):
    """A matrix of positive entries whose columns sum up to GAIN."""
    matrix = np.maximum(matrix, 1e-6)
    total = matrix.sum(axis=0)
    return matrix * np.clip(total, *GAIN) / total


DRAWS = draw, draw_turned    # of each search
