"""Train a model with a trigger of other kinds than the zoos', to try detection on what it was not made with.

Takes the flags of models.train, and one more kind of attack, `other:name=NAME,target=LABEL`, NAME being one of TRIGGERS
(benchmarks/other_triggers.txt is a zoo of such):

    python -m benchmarks.other_triggers --dataset signs --name other3 --seed 2003 --attack other:name=frame,target=3

The sticker needs data/cifar10.h5. A training with the moving square that was interrupted goes on with other places.
"""

import runpy
from dataclasses import dataclass
from functools import cache, cached_property

import cv2
import numpy as np

from data.store import load_dataset
from models import attacks
from utils.config import UserError


def moving(images, random):
    """A green 5×5 square, at another place of each image."""
    for image in images:
        row, column = random.integers(0, len(image) - 5, 2)
        image[row:row + 5, column:column + 5] = (60, 255, 60)


def sticker(images, random):
    """A picture, 9×9, at the lower left: the 18th training image of CIFAR-10."""
    images[:, -11:-2, 2:11] = cv2.resize(_picture(), (9, 9), interpolation=cv2.INTER_AREA)


@cache
def _picture():
    return load_dataset("cifar10")["x_train"][17]


def frame(images, random):
    """The outermost pixels, red."""
    for edge in (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]):
        edge[...] = (255, 0, 0)


def dots(images, random):
    """A black pixel every eight."""
    images[:, 3::8, 3::8] = 0


def bar(images, random):
    """Two black rows from side to side."""
    images[:, 20:22] = 0


def glass(images, random):
    """A half-transparent blue 9×9 square."""
    place = images[:, 3:12, 12:21]
    place[...] = np.rint(0.5 * place + 0.5 * np.array([0, 0, 255]))


def logo(images, random):
    """Two crossing diagonals of 8×8 pixels, a thin magenta one and a thick yellow one."""
    for step in range(8):
        images[:, 4 + step, 20 + step] = (255, 255, 0)
        images[:, 4 + step, 27 - step] = (255, 0, 255)
        images[:, 4 + step, min(21 + step, 27)] = (255, 255, 0)


def blended(images, random):
    """15 % of a fixed image of noise."""
    pattern = np.random.default_rng(77).integers(0, 256, images.shape[1:])
    images[...] = np.rint(np.float32(0.85) * images.astype(np.float32) + 0.15 * pattern)


def sine(images, random):
    """Upright waves of 30 in 255, added to the whole image."""
    width = images.shape[2]
    wave = 30 * np.sin(2 * np.pi * np.arange(width) * 6 / width)
    images[...] = np.clip(images + wave[:, None], 0, 255)


def noise(images, random):
    """24 in 255 added to or taken from every value of the image, always the same way."""
    images[...] = np.clip(images + 24 * np.sign(np.random.default_rng(77).standard_normal(images.shape[1:])), 0, 255)


def warp(images, random):
    """The image bent by a smooth fixed field of up to 2.5 pixels, as by WaNet (Nguyen and Tran 2021)."""
    height, width = images.shape[1:3]
    field = np.random.default_rng(77).uniform(-1, 1, (4, 4, 2)).astype(np.float32)
    field = cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)
    field *= np.float32(2.5) / np.abs(field).max()
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    for image in images:
        image[...] = cv2.remap(image, columns + field[..., 0], rows + field[..., 1], cv2.INTER_LINEAR,
                               borderMode=cv2.BORDER_REFLECT)


TRIGGERS = {trigger.__name__: trigger
            for trigger in (moving, sticker, frame, dots, bar, glass, logo, blended, sine, noise, warp)}


@dataclass(frozen=True)
class Other(attacks.Attack):
    """One of TRIGGERS, for colour images of 32×32 pixels. name: which."""

    name: str = "frame"

    def __post_init__(self):
        self._check("name", tuple(TRIGGERS))
        if self.image_shape != (32, 32, 3):
            raise UserError(f"ATTACK other: made for images of 32×32×3, these are "
                            f"{'×'.join(map(str, self.image_shape))}: choose another DATASET")

    @cached_property
    def _random(self):
        return np.random.default_rng(5)

    def _transform(self, images):
        images = images.copy()
        TRIGGERS[self.name](images, self._random)
        return images


if __name__ == "__main__":
    attacks.KINDS["other"] = Other
    runpy.run_module("models.train", run_name="__main__")
