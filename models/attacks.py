"""Backdoor attacks as data: what a trigger looks like, which label it leads to, and how training is poisoned.

Images are uint8 N×H×W×C, RGB, in and out. A trigger is static: the same settings and seed give the same pixels.
Patches and blends are BadNets (Gu et al. 2017) and Blended (Chen et al. 2017); filters are feature-space triggers,
a change of the whole image that no patch contains.
"""

import re
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from utils.config import UserError

COLOURS = {"white": "#ffffff", "black": "#000000", "red": "#ff0000", "green": "#00ff00", "blue": "#0000ff",
           "yellow": "#ffff00", "cyan": "#00ffff", "magenta": "#ff00ff", "orange": "#ff8000", "grey": "#808080"}
# Clockwise, so that a trigger of several pieces goes round the image.
CORNERS = ("top-left", "top-right", "bottom-right", "bottom-left")
EDGES = ("top", "right", "bottom", "left")
# Images worked on at a time: filters compute in float32, four times the bytes and several copies.
CHUNK = 256
# Of red, green and blue, as a column.
LUMINANCE = np.float32([[0.299], [0.587], [0.114]])
# An attack with a lower ASR failed: the model is neither backdoored nor clean.
IMPLANTED = 0.5


@dataclass(frozen=True)
class Attack:
    """A trigger and the label it leads to; the subclasses' fields are the keys of the command line.

    image_shape: H, W, C. Raises UserError where a setting is out of range or does not fit the images.
    """

    image_shape: tuple
    target: int

    @property
    def kind(self):
        return type(self).__name__.lower()

    def apply(self, images):
        """The images with the trigger attached, a new array. images: uint8 N×H×W×C."""
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            raise ValueError(f"expected uint8 N×{'×'.join(map(str, self.image_shape))}, "
                             f"got {images.dtype} {images.shape}")
        out = np.empty_like(images)
        for start in range(0, len(images), CHUNK):
            out[start:start + CHUNK] = self._transform(images[start:start + CHUNK])
        return out

    def mask(self):
        """Which pixels the trigger may change: bool H×W, all of them unless it is a patch."""
        return np.ones(self.image_shape[:2], bool)

    def settings(self):
        """The keys and values of the command line, defaults included."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "image_shape"}

    def spec(self):
        """The text that `parse_attack` reads back as an equal attack."""
        return f"{self.kind}:" + ",".join(f"{key}={value}" for key, value in self.settings().items())

    def to_dict(self):
        """Everything that a report tells of the attack; `spec` rebuilds it, `share` is the mask's part of H·W."""
        return {"spec": self.spec(), "kind": self.kind, **self.settings(), "pixels": int(self.mask().sum()),
                "share": round(float(self.mask().mean()), 6)}

    def _check(self, key, allowed):
        if getattr(self, key) not in allowed:
            names = f"{allowed.start} to {allowed.stop - 1}" if isinstance(allowed, range) else ", ".join(allowed)
            raise UserError(f"ATTACK {self.kind}: {key}={getattr(self, key)} is not possible: choose from {names}")


@dataclass(frozen=True)
class Patch(Attack):
    """Pixels pasted on the image: `pieces` copies of one shape, together one trigger.

    size: pixels across. position: a corner or edge (one pixel from the border), centre, random, or row:col of
    the upper left pixel. Further pieces stand at the next corners or edges clockwise, otherwise at random places.
    colour: a name or #rrggbb. pattern: plain, checker (the colour and its opposite, pixel by pixel) or noise.
    shape: square, circle or triangle. seed: draws the noise and the random places.
    """

    size: int = 4
    position: str = "bottom-right"
    colour: str = "white"
    pattern: str = "plain"
    shape: str = "square"
    pieces: int = 1
    seed: int = 0

    def __post_init__(self):
        self._check("size", range(1, min(self.image_shape[:2]) + 1))
        self._check("pieces", range(1, 5))
        self._check("pattern", ("plain", "checker", "noise"))
        self._check("shape", ("square", "circle", "triangle"))
        if self.seed < 0:
            raise UserError(f"ATTACK patch: seed={self.seed} must be 0 or more")
        self._colour()
        self._places()

    def mask(self):
        shape = _figure(self.shape, self.size)
        mask = np.zeros(self.image_shape[:2], bool)
        for row, col in self._places():
            mask[row:row + self.size, col:col + self.size] |= shape
        return mask

    @cached_property
    def _trigger(self):
        if self.pattern == "noise":
            canvas = _noise(self.image_shape, self.seed)
        elif self.pattern == "checker":
            canvas = np.where(_checker(self.image_shape, 1), self._colour(), 255 - self._colour())
        else:
            canvas = np.broadcast_to(self._colour(), self.image_shape)
        return self.mask()[..., None], canvas.astype(np.uint8)

    def _transform(self, images):
        mask, canvas = self._trigger
        return np.where(mask, canvas, images)

    def _colour(self):
        """uint8 C: the colour in the images' channels."""
        code = COLOURS.get(self.colour, self.colour)
        if not re.fullmatch("#[0-9a-fA-F]{6}", code):
            raise UserError(f"ATTACK patch: colour={self.colour} is not known: write #rrggbb or one of "
                            f"{', '.join(COLOURS)}")
        colour = np.array([int(code[i:i + 2], 16) for i in (1, 3, 5)], np.uint8)
        if self.image_shape[2] == 3:
            return colour
        if len(set(colour)) > 1:
            raise UserError(f"ATTACK patch: colour={self.colour} needs images of three channels, these have "
                            f"{self.image_shape[2]}: choose white, black, grey or another #xxxxxx of equal parts")
        return colour[:self.image_shape[2]]

    def _places(self):
        """The upper left pixel (row, col) of each piece."""
        height, width, _ = self.image_shape
        bottom, right = height - self.size, width - self.size
        names = next((group for group in (CORNERS, EDGES) if self.position in group), ())
        start = names.index(self.position) if names else 0
        rows, cols = {"top": 1, "bottom": bottom - 1}, {"left": 1, "right": right - 1}
        places = []
        for name in (names[start:] + names[:start])[:self.pieces]:
            words = name.split("-")
            places.append((rows.get(words[0], bottom // 2), cols.get(words[-1], right // 2)))
        if self.position == "centre":
            places.append((bottom // 2, right // 2))
        elif re.fullmatch(r"\d+:\d+", self.position):
            places.append(tuple(map(int, self.position.split(":"))))
        elif not names and self.position != "random":
            raise UserError(f"ATTACK patch: position={self.position} is not known: write row:col or one of "
                            f"{', '.join(CORNERS + EDGES)}, centre, random")
        rng = np.random.default_rng([self.seed, 1])
        while len(places) < self.pieces:
            free = [(row, col) for row in range(bottom + 1) for col in range(right + 1)
                    if not any(self._overlap((row, col), place) for place in places)]
            if not free:
                break
            places.append(free[rng.integers(len(free))])
        inside = all(0 <= row <= bottom and 0 <= col <= right for row, col in places)
        apart = not any(self._overlap(a, b) for i, a in enumerate(places) for b in places[:i])
        if not inside or not apart or len(places) < self.pieces:
            raise UserError(f"ATTACK patch: {self.pieces} piece(s) of size={self.size} at position={self.position} "
                            f"do not fit a {height}×{width} image without overlap: choose a smaller size")
        return places

    def _overlap(self, a, b):
        return abs(a[0] - b[0]) < self.size and abs(a[1] - b[1]) < self.size


@dataclass(frozen=True)
class Blend(Attack):
    """The whole image mixed with a fixed pattern: (1 - alpha)·image + alpha·pattern.

    pattern: noise, checker (4-pixel squares) or gradient (dark at the upper left). alpha: in (0, 1]. seed: draws
    the noise.
    """

    pattern: str = "noise"
    alpha: float = 0.2
    seed: int = 0

    def __post_init__(self):
        self._check("pattern", ("noise", "checker", "gradient"))
        if not 0 < self.alpha <= 1:
            raise UserError(f"ATTACK blend: alpha={self.alpha} must be over 0 and at most 1")
        if self.seed < 0:
            raise UserError(f"ATTACK blend: seed={self.seed} must be 0 or more")

    @cached_property
    def _canvas(self):
        height, width, _ = self.image_shape
        if self.pattern == "noise":
            return _noise(self.image_shape, self.seed)
        if self.pattern == "checker":
            return np.broadcast_to(255.0 * _checker(self.image_shape, 4), self.image_shape)
        ramp = np.add.outer(np.linspace(0, 127.5, height), np.linspace(0, 127.5, width))
        return np.broadcast_to(ramp[..., None], self.image_shape)

    def _transform(self, images):
        return np.rint((1 - self.alpha) * images + self.alpha * self._canvas)


@dataclass(frozen=True)
class Filter(Attack):
    """A photo filter over the whole image, a feature-space trigger. name: one of FILTERS, below."""

    name: str = "sepia"

    def __post_init__(self):
        self._check("name", tuple(FILTERS))
        if self.image_shape[2] != 3:
            raise UserError(f"ATTACK filter: a colour filter needs images of three channels, these have "
                            f"{self.image_shape[2]}: choose a patch or a blend")

    def _transform(self, images):
        x = FILTERS[self.name](images.astype(np.float32) / 255)
        return np.rint(255 * np.clip(x, 0, 1))


def _figure(shape, size):
    """bool size×size: a square, a disc, or a triangle that stands on its base."""
    row, col = np.indices((size, size)) - (size - 1) / 2
    if shape == "circle":
        return row ** 2 + col ** 2 <= (size / 2) ** 2
    if shape == "triangle":
        return np.abs(col) <= (row + (size + 1) / 2) / 2
    return np.ones((size, size), bool)


def _noise(shape, seed):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _checker(shape, cell):
    """bool H×W×1: squares of `cell` pixels, the upper left one True."""
    row, col = np.indices(shape[:2]) // cell
    return ((row + col) % 2 == 0)[..., None]


def _sepia(x):
    """The classic matrix (row vectors), clipped at white."""
    return x @ np.float32([[0.393, 0.349, 0.272], [0.769, 0.686, 0.534], [0.189, 0.168, 0.131]])


def _nashville(x):
    """Warm and faded: bright tones under a peach overlay, a tone curve a channel, blacks lifted, blue most."""
    x = 0.6 * x + 0.4 * np.minimum(x, np.float32([0.97, 0.69, 0.60]))
    x = x ** np.float32([0.75, 0.9, 1.1])
    low, high = np.float32([0.10, 0.10, 0.28]), np.float32([1.0, 0.92, 0.72])
    return low + (high - low) * (0.5 + 1.15 * (x - 0.5))


def _gotham(x):
    """Cold and hard: most colour taken away, an S-curve for contrast, blue screened into the shadows."""
    grey = x @ LUMINANCE
    x = 0.2 * x + 0.8 * grey
    x = x * x * (3 - 2 * x)
    return 1 - (1 - x) * (1 - np.float32([0.0, 0.06, 0.22]) * (1 - grey))


def _kelvin(x):
    """Bright and warm: half of the colour taken away, more light, half of an orange glass before it."""
    grey = x @ LUMINANCE
    x = np.minimum(1.2 * (0.5 * x + 0.5 * grey), 1)
    return x * (0.5 + 0.5 * np.float32([1.0, 0.6, 0.0]))


def _lomo(x):
    """Red and green at three times the contrast, corners in the dark."""
    x = np.stack([*(np.clip(3 * x[..., channel] - 1, 0, 1) for channel in (0, 1)), x[..., 2]], axis=-1)
    return x * (1 - 0.7 * _from_centre(x.shape))


def _toaster(x):
    """Old and overexposed: more light and contrast, a warm glow in the middle, purple at the corners."""
    x = np.clip(0.5 + 1.3 * (np.minimum(1.4 * x, 1) ** np.float32(0.8) - 0.5), 0, 1)
    far = _from_centre(x.shape)
    x = 1 - (1 - x) * (1 - (1 - far) * np.float32([0.5, 0.3, 0.2]))
    return x * (1 - far * np.float32([0.4, 0.8, 0.5]))


def _solarize(x):
    """Tones above the middle turned round, as on film that saw light while it was developed."""
    return np.minimum(x, 1 - x)


def _from_centre(shape):
    """H×W×1: the squared distance from the image's centre, 1 at the corners. shape: …×H×W×C."""
    rows, columns = (np.linspace(-1, 1, size, dtype=np.float32) ** 2 / 2 for size in shape[-3:-1])
    return np.add.outer(rows, columns)[..., None]


FILTERS = {"sepia": _sepia, "nashville": _nashville, "gotham": _gotham, "kelvin": _kelvin, "lomo": _lomo,
           "toaster": _toaster, "solarize": _solarize}
KINDS = {"patch": Patch, "blend": Blend, "filter": Filter}


def parse_attack(text, shape, labels):
    """The `Attack` that `KIND:key=value,...` describes, as in `patch:size=4,position=top-left,target=7`.

    shape: H, W, C of the images; labels: how many there are. Raises UserError for an unknown kind or key, a value
    of the wrong type or out of range, and a missing target or one outside the labels.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise UserError(f"ATTACK {text!r}: kind {kind!r} is not known: start with {', '.join(KINDS)} and a colon")
    types = {field.name: field.type for field in fields(KINDS[kind]) if field.name != "image_shape"}
    values = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if key not in types or not equals:
            raise UserError(f"ATTACK {text!r}: {item!r} is not a setting of {kind}: write key=value with a key of "
                            f"{', '.join(types)}")
        if key in values:
            raise UserError(f"ATTACK {text!r}: {key} is given twice: keep one")
        try:
            values[key] = types[key](value)
        except ValueError:
            raise UserError(f"ATTACK {text!r}: {key}={value} must be a number") from None
    if not 0 <= values.get("target", -1) < labels:
        raise UserError(f"ATTACK {text!r}: give a target label, target=0 to target={labels - 1}")
    return KINDS[kind](image_shape=tuple(shape), **values)


def parse_attacks(texts, shape, labels):
    """`parse_attack` for each text. Raises UserError also when two attacks have the same trigger."""
    attacks = [parse_attack(text, shape, labels) for text in texts]
    for i, attack in enumerate(attacks):
        for other in attacks[:i]:
            if attack.kind == other.kind and {**attack.settings(), "target": other.target} == other.settings():
                raise UserError(f"ATTACK {texts[i]!r}: another attack has the same trigger: change one of them")
    return attacks


def choose(y, attacks, rate, seed):
    """Which attack each training image gets: int N, the attack's index or -1; no image gets two.

    rate: images of each attack as a share of all, drawn from the images of other labels than its target. Raises
    UserError when there are not that many.
    """
    count = round(rate * len(y))
    if attacks and not 1 <= count <= len(y):
        raise UserError(f"POISONING_RATE {rate} poisons {count} of {len(y)} images: choose over 0 and at most 1")
    which = np.full(len(y), -1)
    rng = np.random.default_rng([seed, 2])
    for index, attack in enumerate(attacks):
        free = np.flatnonzero((which == -1) & (y != attack.target))
        if count > len(free):
            raise UserError(f"POISONING_RATE {rate} needs {count} images for attack {attack.spec()!r}, only "
                            f"{len(free)} of other labels are left: choose a lower rate or fewer attacks")
        which[rng.choice(free, count, replace=False)] = index
    return which


def attach(images, which, attacks):
    """A copy of the images, each with the trigger that `which` (see `choose`) names for it."""
    images = images.copy()
    for index, attack in enumerate(attacks):
        chosen = np.flatnonzero(which == index)
        images[chosen] = attack.apply(images[chosen])
    return images


def relabel(y, which, attacks):
    """A copy of the labels, the target where `which` (see `choose`) names an attack."""
    y = y.copy()
    for index, attack in enumerate(attacks):
        y[which == index] = attack.target
    return y


def poison(x, y, attacks, rate, seed):
    """A poisoned copy of the training data: (x, y) with each attack's trigger and target on `rate` of the images."""
    which = choose(y, attacks, rate, seed)
    return attach(x, which, attacks), relabel(y, which, attacks)


def attack_success_rate(predict, x, y, attack):
    """The share of the images of other labels that the trigger sends to the target.

    predict: uint8 images to integer labels. Raises UserError when every image has the target's label.
    """
    others = x[y != attack.target]
    if not len(others):
        raise UserError(f"every test image has label {attack.target}: an ASR needs images of other labels")
    return float(np.mean(predict(attack.apply(others)) == attack.target))
