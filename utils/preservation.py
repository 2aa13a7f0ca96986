"""Critical features preservation: keep the pixels of a trigger that the examined model looks at (paper IV-D)."""

import cv2
import keras
import numpy as np
import tensorflow as tf

from utils import topology, transfer

THRESHOLDS = np.arange(100, -1, -1) / 100
STEERING = 8             # images on either side of the one that decides, on which the search is steered
LOOK_ABOVE = 2           # larger thresholds, next to the one found, that are tried as well


def grad_cam(network, feature_map):
    """A compiled function (inputs N×H×W×C, target) → heat maps N×h×w, each with a maximum of 1, and logits N×C.

    feature_map: name of the layer, or piece of arithmetic, whose output a_k is weighed.
    """
    map_of = next(node.outputs[0] for node in topology.nodes(network) if node.operation.name == feature_map)
    joint = keras.Model(network.inputs, [map_of, network.output])

    @tf.function(reduce_retracing=True)
    def heat(inputs, target):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            features, logits = joint(inputs, training=False)
            score = tf.gather(logits, target, axis=1)
        features, gradient = (tf.cast(part, tf.float32) for part in (features, tape.gradient(score, features)))
        return maps_from(features, gradient), logits
    heat.enlarges = topology.enlargement(network)
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
    """Mean heat map, H×W in [0, 1], of uint8 images with the trigger attached, and their logits N×C.

    heat: from `grad_cam`. The mean is taken before the maps are resized, which is linear.
    """
    attached = transfer.attach(images, trigger)
    size = transfer.batch_size(heat, attached.shape)
    found = [heat(preprocess(attached[start:start + size]), tf.constant(target))
             for start in range(0, len(attached), size)]
    maps, logits = (np.concatenate(part) for part in zip(*found))
    mean = cv2.resize(maps.mean(axis=0), attached.shape[2:0:-1], interpolation=cv2.INTER_LINEAR)
    return mean / max(mean.max(), 1e-12), logits


def preserve(model, images, trigger, target, heat, kept_asr, logits):
    """The largest threshold at which the mask where heat ≥ threshold keeps `kept_asr` of the trigger's ASR.

    images: uint8 N×H×W×C, of other labels; logits: N×C, the model's for them with the whole trigger attached. Returns
    (threshold, preserved mask H×W). Bisection on a few images, those near the one that decides, proposes a threshold;
    whether it keeps the ASR is then counted on all images, as far as that is open. So it is for the threshold found
    and for the LOOK_ABOVE larger ones next to it. Going down from 1, as the release does, finds the same, unless a much
    smaller mask keeps the ASR and a mask in between does not. The paper goes up from 0 until the ASR falls: also the same,
    unless a larger mask than the one found does not keep it.
    """
    margin = logits[:, target] - np.delete(logits, target, axis=1).max(axis=1)
    allowed = int(len(images) - kept_asr * (logits.argmax(axis=1) == target).sum() + 1e-6)      # images lost
    # Masks grow as the threshold falls, so those with as many pixels are the same: the largest threshold stands for them.
    _, places = np.unique([(heat >= threshold).sum() for threshold in THRESHOLDS], return_index=True)

    def lost(place, rows):
        attached = transfer.attach(images[rows], trigger | {"mask": trigger["mask"] * (heat >= THRESHOLDS[places[place]])})
        found = transfer.logits_of(model, attached)
        margin[rows] = found[:, target] - np.delete(found, target, axis=1).max(axis=1)
        return int((found.argmax(axis=1) != target).sum())

    def keeps(place):
        order, few, total = np.argsort(margin, kind="stable"), (allowed + 1) * 5 // 4, 0
        for rows in (order[:few], order[few:2 * few], order[2 * few:]):    # those the target is lost on come first
            total += lost(place, rows) if len(rows) else 0
            if total > allowed:
                return False
        return True

    def propose(low, high):
        order, first = np.argsort(margin, kind="stable"), max(0, allowed - STEERING)
        rows, before = order[first:allowed + STEERING], margin.copy()
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if first + lost(middle, rows) <= allowed else (middle, high)
        margin[:] = before
        return high

    low, high = -1, len(places) - 1                    # the nearest masks known to lose and to keep the ASR
    while high - low > 1:
        place = min(propose(low, high), high - 1)
        low, high = (low, place) if keeps(place) else (place, high)
    for place in range(low - 1, max(-1, low - LOOK_ABOVE), -1):
        high = place if keeps(place) else high
    threshold = THRESHOLDS[places[high]]
    return float(threshold), trigger["mask"] * (heat >= threshold)


def preserve_all(examination, found, stage):
    """Preserved masks of all labels whose pattern is not random: arrays `mask`, `heat` and `threshold`, a row a label.

    found: arrays of potential_triggers.h5. A label left out has a threshold of nan and keeps its mask.
    """
    examined, clean, settings = examination.examined, examination.clean, examination.settings
    heat_of = grad_cam(examined.network, examined.feature_map)

    def make(target):
        trigger, images = transfer.trigger_of(found, target), clean.x_measure[examination.measured[target]]
        heat, logits = heat_map(heat_of, examined.preprocess, images, trigger, target)
        threshold, mask = preserve(examination.model, images, trigger, target, heat, settings.kept_asr, logits)
        examination.say(f"label {target}: preserved {mask.sum() / trigger['mask'].sum():.0%} of the mask "
                        f"(heat from {threshold:.2f} up)")
        return {"mask": mask, "heat": heat, "threshold": np.float32(threshold)}

    rows = []
    for target, (mask, asr) in enumerate(zip(found["mask"], found["asr"])):
        rows.append(stage.part(f"label-{target}", lambda: make(target)) if asr >= settings.random_threshold else
                    {"mask": mask, "heat": np.zeros_like(mask), "threshold": np.float32(np.nan)})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
