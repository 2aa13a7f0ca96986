"""Whether what leads to a label has the colours of its own images (not in the paper).

A network tells labels apart by colours, too, and any patch of these may lead there, on tuned models as well or not: a blue
disc to some of the blue traffic signs, of which a clean model prefers one. Plain patches (utils/plain_patches.py) show them
openly. A trigger has the colours of its target by chance alone.
"""

import numpy as np

from utils import plain_patches
from utils.clean_data import both_splits

OWN = 100                # of a label's images, so many at most
FLAT = 0.05              # added to images' contrast and to their colours, as multiples of it: there are black and grey ones


def own_colours(examination, probes):
    """`own_colours`: how much more a label's images are like its plain patches in colour than other labels' are, L.

    Both are cosines between what patch and image differ by from the other labels' mean, where the patch covers them: of the
    image in colour alone, without its brightness, of which no patch that is mostly brighter or darker has much, and as if
    all images had one brightness and contrast. From -1 or so up to 1, which few come near to. Nothing of grey images.
    probes: L×n plain patches.
    """
    clean = examination.clean
    if clean.x_tune.shape[-1] == 1:
        return {}
    all_images, labels = both_splits(clean)
    found = []
    for label, measured in enumerate(examination.measured):
        others = _scaled(clean.x_measure[measured])
        own = _scaled(all_images[labels == label][:OWN])
        masks, patterns = plain_patches.rendered(probes[label], others.shape[1:])
        masks = np.repeat(masks[..., None], others.shape[-1], axis=-1)
        differ = masks * (patterns - others.mean(axis=0))
        usual = _standard(others).mean(axis=0)
        found.append(np.subtract(*(_alike(differ, masks, _coloured(_standard(images) - usual)) for images in (own, others))))
    return {"own_colours": np.array(found, np.float32)}


def colours_factor(tuned):
    """How far the label's patches are from the colours of its images, from 0 to 1; L. tuned: arrays of pnnir.h5."""
    return 1 - np.clip(tuned["examined"]["own_colours"], 0, 1)


def _alike(differ, masks, images):
    """Mean cosine of patches P×H×W×C with images N×H×W×C, where masks, of the patches' shape, are 1; 0 with grey images."""
    differ, masks, images = (part.reshape(len(part), -1) for part in (differ, masks, images))
    lengths = np.linalg.norm(differ, axis=1)[:, None] * np.sqrt(masks @ (images ** 2 + FLAT ** 2).T)
    return (differ @ images.T / np.maximum(lengths, 1e-9)).mean()


def _scaled(images):
    return images.astype(np.float32) / 255


def _standard(images):
    return (images - images.mean(axis=(1, 2, 3), keepdims=True)) / (images.std(axis=(1, 2, 3), keepdims=True) + FLAT)


def _coloured(images):
    return images - images.mean(axis=-1, keepdims=True)
