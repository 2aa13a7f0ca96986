"""Whether what leads to a label drives it by the features that its own images drive it by (not in the paper).

Before its last layer a network has features, each of which adds to the logits of some labels. Plain patches that lead to a
clean label (utils/plain_patches.py) mostly do so by features of its images, and among these some are found that drive the
label by the same ones. A backdoor was taught features of its own, unless its trigger is large: then they may be some
images' as well, so that nearness is no sign of a clean label. How near images come has much to do with the network, so each
label's distance is held against the median label's.
"""

import numpy as np
import tensorflow as tf

from utils import transfer, triggers
from utils.clean_data import both_splits
from utils.config import UserError
from utils.examination import classifier
from utils.topology import last_features

NEAR = 0.02              # added to all distances: a network may give patches of most labels just what it gives to images
NEAREST = 31 / 32        # of a label's images, the quantile of likeness: the very nearest of many is an odd one
LEAST, MOST = 1.0, 4.0   # times the median label's distance, that count: labels of few images are far from these, too


def likeness(examination, network, patches):
    """`likeness`: how alike plain patches and the nearest of its own images drive each label, a cosine, L.

    network: the examined model's or a repaired one; patches: function from a label to its plain patches, masks n×H×W and
    patterns n×H×W×C. What drives a label is what each feature adds to its logit over the labels' mean, as far as it is above
    its own mean over all clean images: in images of other labels that carry one of its patches, in their mean, and in every
    clean image of the label. Nothing of a network that does not end in a dense layer. Raises UserError where features are
    NaN or infinite.
    """
    clean = examination.clean
    if (last := last_features(network)) is None:
        return {}
    features, kernel = classifier(last[0], examination.examined.preprocess), np.array(last[1], np.float32)
    kernel = kernel - kernel.mean(axis=1, keepdims=True)
    all_images, labels = both_splits(clean)
    seen = transfer.logits_of(features, all_images)
    usual, found = seen.mean(axis=0, dtype=float), []
    for label, images in enumerate(examination.measured):
        masks, patterns = patches(label)
        images = np.resize(images, (len(masks), max(1, len(images) // len(masks))))
        carrying = triggers.attach_all(clean.x_measure[images], masks, patterns)
        carrying = transfer.logits_of(features, tf.reshape(carrying, (-1, *carrying.shape[2:])))
        driven, alone = (kernel[:, label] * np.maximum(one - usual, 0)
                         for one in (carrying.mean(axis=0, dtype=float), seen[labels == label]))
        lengths = np.linalg.norm(alone, axis=1) * np.linalg.norm(driven)
        found.append(np.quantile(alone @ driven / np.maximum(lengths, 1e-9), NEAREST))
    if not np.isfinite(found).all():
        raise UserError("some images drive the last layer by NaN or infinite features, from which nothing can be told: the "
                        "examined model was made so or is damaged")
    return {"likeness": np.array(found, np.float32)}


def foreignness(tuned):
    """How far from its own images' each label's patches drive it, as a multiple of the median label's, LEAST to MOST; L.

    tuned: arrays of pnnir.h5. The median is of drawn patches, where traced ones count for some labels.
    """
    examined = tuned["examined"]
    far, usual = (NEAR + 1 - arrays["likeness"] for arrays in (examined, examined.get("drawn", examined)))
    return np.clip(far / np.median(usual), LEAST, MOST).astype(np.float32)
