"""Whether what leads to a label has the colours of its own images (not in the paper).

A network tells labels apart by colours, too, and any patch of these may lead there, on tuned models as well or not: a blue
disc to some of the blue traffic signs, of which a clean model prefers one. Plain patches (utils/plain_patches.py) show them
openly. A trigger has the colours of its target by chance alone, or by an attacker's choice, who makes it weaker so.
"""

import numpy as np

from utils.clean_data import both_splits

OWN = 100                # of a label's images, so many at most
FLAT = 0.05              # added to images' contrast and to their colours, as multiples of it: there are black and grey ones


def own_colours(examination, patches):
    """`own_colours`: how much more a label's images are like its plain patches in colour than other labels' are, L.

    Both are cosines between what patch and image differ by from other labels' mean image, where the patch covers them. Of
    the image colour alone counts, not its brightness, as if all had one brightness and contrast; of the patch both, so that
    white and black ones come near to 0. A difference of cosines, but no more than that of the patch's own colour with the
    image's: a grey image is not blue for being less red than others. Nothing of images of one channel.
    patches: function from a label to its plain patches, masks n×H×W and patterns n×H×W×C.
    """
    clean = examination.clean
    if clean.x_tune.shape[-1] == 1:
        return {}
    all_images, labels = both_splits(clean)
    found = []
    for label, measured in enumerate(examination.measured):
        scaled = clean.x_measure[measured].astype(np.float32) / 255
        others, own = _standard(scaled), _standard(all_images[labels == label][:OWN].astype(np.float32) / 255)
        masks, patterns = patches(label)
        masks = np.repeat(masks[..., None], scaled.shape[-1], axis=-1)
        differ, usual = patterns - scaled.mean(axis=0), others.mean(axis=0)
        more = np.subtract(*(_alike(differ, masks, _coloured(images - usual)) for images in (own, others)))
        found.append(min(more, _alike(_coloured(patterns), masks, _coloured(own))))
    return {"own_colours": np.array(found, np.float32)}


def colours_factor(tuned):
    """How far the label's patches are from the colours of its images, from 0 to 1; L. tuned: arrays of pnnir.h5."""
    return 1 - np.clip(tuned["examined"]["own_colours"], 0, 1)


def _alike(patterns, masks, images):
    """Mean cosine of patches P×H×W×C with images N×H×W×C, where masks, of the patches' shape, are 1; 0 with grey images."""
    patterns, masks, images = (part.reshape(len(part), -1) for part in (patterns * masks, masks, images))
    lengths = np.linalg.norm(patterns, axis=1)[:, None] * np.sqrt(masks @ (images ** 2 + FLAT ** 2).T)
    return (patterns @ images.T / np.maximum(lengths, 1e-9)).mean()


def _standard(images):
    return (images - images.mean(axis=(1, 2, 3), keepdims=True)) / (images.std(axis=(1, 2, 3), keepdims=True) + FLAT)


def _coloured(images):
    return images - images.mean(axis=-1, keepdims=True)
