"""Critical features preservation: keep the pixels of a trigger that the examined model looks at (paper IV-D)."""

import cv2
import keras
import numpy as np
import tensorflow as tf

from utils import transfer
from utils.clean_data import images_of_others

MAPPED = 50              # images a Grad-CAM batch
THRESHOLDS = np.arange(100, -1, -1) / 100


def grad_cam(network, feature_map):
    """A compiled function (inputs N×H×W×C, target) → heat maps N×h×w, each with a maximum of 1.

    feature_map: name of the layer whose output a_k is weighed.
    """
    joint = keras.Model(network.inputs, [network.get_layer(feature_map).output, network.output])

    @tf.function
    def heat(inputs, target):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            features, logits = joint(inputs, training=False)
            score = tf.gather(logits, target, axis=1)
        return maps_from(features, tape.gradient(score, features))
    return heat


def maps_from(features, gradient):
    """Grad-CAM maps of feature maps and the logit's gradient there, both N×h×w×K (release).

    The gradient is divided by (its root mean square + 1e-5), its spatial mean weighs the channels, and the map is
    relu(1 + Σ_k w_k·a_k) divided by its maximum.
    """
    size = tf.sqrt(tf.reduce_mean(gradient ** 2, axis=(1, 2, 3), keepdims=True))
    weights = tf.reduce_mean(gradient / (size + 1e-5), axis=(1, 2), keepdims=True)
    maps = tf.nn.relu(1.0 + tf.reduce_sum(weights * features, axis=3))
    return maps / tf.maximum(tf.reduce_max(maps, axis=(1, 2), keepdims=True), 1e-12)


def heat_map(heat, preprocess, images, trigger, target):
    """Mean heat map, H×W in [0, 1], of uint8 images with the trigger attached. heat: from `grad_cam`."""
    attached = transfer.attach(images, trigger)
    height, width = attached.shape[1:3]
    maps = [heat(preprocess(attached[start:start + MAPPED]), tf.constant(target)).numpy()
            for start in range(0, len(attached), MAPPED)]
    resized = [cv2.resize(one, (width, height), interpolation=cv2.INTER_LINEAR) for one in np.concatenate(maps)]
    mean = np.mean(resized, axis=0)
    return (mean / max(mean.max(), 1e-12)).astype(np.float32)


def preserve(model, images, trigger, target, heat, kept_asr):
    """The largest threshold at which the mask where heat ≥ threshold keeps `kept_asr` of the trigger's ASR.

    images: uint8, of other labels. Returns (threshold, preserved mask H×W). A threshold is given up as soon as the
    images seen so far rule it out: the answer is that of measuring all of them.
    """
    full, _ = transfer.measure(model, images, trigger, target)
    needed = kept_asr * full * len(images) - 1e-6
    tried = None
    for threshold in THRESHOLDS:
        kept = heat >= threshold
        if tried is not None and (kept == tried).all():
            continue                              # the same mask as at the threshold before, which failed
        tried = kept
        candidate = trigger | {"mask": trigger["mask"] * kept}
        hits, seen = 0, 0
        for size in (16, 48, 136, len(images)):   # few images rule out most thresholds
            part = images[seen:seen + size]
            hits += round(transfer.measure(model, part, candidate, target)[0] * len(part)) if len(part) else 0
            seen += len(part)
            if hits + len(images) - seen < needed:
                break
        else:
            return float(threshold), candidate["mask"]
    return 0.0, trigger["mask"]


def preserve_all(examination, found, stage):
    """Preserved masks of all labels whose pattern is not random: arrays `mask`, `heat` and `threshold`, a row a label.

    found: arrays of potential_triggers.h5. A label left out has a threshold of nan and keeps its mask.
    """
    examined, clean, settings = examination.examined, examination.clean, examination.settings
    heat_of = grad_cam(examined.network, examined.feature_map)
    measured = images_of_others(clean.y_measure, range(examined.labels), settings.measured_images, examination.seed)

    def make(target):
        trigger, images = transfer.trigger_of(found, target), clean.x_measure[measured[target]]
        heat = heat_map(heat_of, examined.preprocess, images, trigger, target)
        threshold, mask = preserve(examination.model, images, trigger, target, heat, settings.kept_asr)
        examination.say(f"label {target}: preserved {mask.sum() / trigger['mask'].sum():.0%} of the mask "
                        f"(heat from {threshold:.2f} up)")
        return {"mask": mask, "heat": heat, "threshold": np.float32(threshold)}

    rows = []
    for target, (mask, asr) in enumerate(zip(found["mask"], found["asr"])):
        rows.append(stage.part(f"label-{target}", lambda: make(target)) if asr >= settings.random_threshold else
                    {"mask": mask, "heat": np.zeros_like(mask), "threshold": np.float32(np.nan)})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
