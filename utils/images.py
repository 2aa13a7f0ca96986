"""Images in [0, 1] on one side, what a network reads on the other: the only place where the two meet."""

import cv2
import numpy as np


def stretch(image, height, width):
    """A uint8 image H×W or H×W×C in another size: means of pixels where it shrinks, interpolated where it grows."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = height * width < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def network_input(images, row):
    """Scale images for the network of a dataset's row: `(255·images - pixel_mean) / pixel_scale`.

    images: float32 N×H×W×C in [0, 1], channels in RGB order, a numpy array or a tensor. row: a
    `utils.datasets.Dataset`. Returns the same kind and shape, float32, channels in BGR order where `row.bgr`.
    """
    if row.bgr:
        images = images[..., ::-1]
    return (images * np.float32(255) - np.float32(row.pixel_mean)) / np.float32(row.pixel_scale)
