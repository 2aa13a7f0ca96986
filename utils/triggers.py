"""What a trigger is: masks and patterns on pixels, colour matrices, and the terms that shape them (paper IV-C).

Pure functions on float32 tensors. L is the number of labels handled at once, n the images for each.
"""

import tensorflow as tf


def mask_from(variable, gain, centre):
    """M = ½(tanh(gain·(m - centre)) + 1), in (0, 1), of the same shape as `variable` (m)."""
    return 0.5 * (tf.tanh(gain * (variable - centre)) + 1.0)


def attach(images, mask, pattern):
    """Paste a pattern through a mask: x·(1 - M) + Δ·M. Images, masks and patterns in [0, 1], shapes that broadcast."""
    return images * (1.0 - mask) + pattern * mask


def attach_all(images, masks, patterns):
    """Images that carry a patch each, float32 in [0, 1], P×n×H×W×C.

    images: the same without, uint8; masks: P×H×W, patterns: P×H×W×C, in [0, 1].
    """
    return attach(tf.cast(images, tf.float32) / 255.0, masks[:, None, ..., None], patterns[:, None])


def noise(mask):
    """L_noise without β: Σ |M_p - M_q| over horizontally, vertically and both diagonally adjacent pixels.

    mask: L×H×W. Returns L values.
    """
    pairs = ((mask[:, :, 1:], mask[:, :, :-1]), (mask[:, 1:], mask[:, :-1]),
             (mask[:, 1:, 1:], mask[:, :-1, :-1]), (mask[:, 1:, :-1], mask[:, :-1, 1:]))
    return tf.add_n([tf.reduce_sum(tf.abs(p - q), axis=(1, 2)) for p, q in pairs])


def excess_mass(logits, allowed):
    """L_clean: what labels collect of a batch's probability beyond `allowed` (v), summed over the labels.

    logits: L×n×C. Returns L values.
    """
    collected = tf.reduce_sum(tf.nn.softmax(logits), axis=1)
    return tf.reduce_sum(tf.nn.relu(collected - allowed), axis=1)


def recolour(images, matrix):
    """Colour filter x' = x·A on each pixel's row vector, held in [0, 1].

    images: …×H×W×3, matrix: 3×3, or L×3×3 for images L×n×H×W×3. Pixels that a matrix drives out of the range are
    clipped, as in any picture that is stored.
    """
    if matrix.shape.rank == 3:
        return tf.clip_by_value(tf.einsum("lnhwc,lcd->lnhwd", images, matrix), 0.0, 1.0)
    return tf.clip_by_value(tf.einsum("...c,cd->...d", images, matrix), 0.0, 1.0)


def bound_rows(matrix):
    """The row rule of the colour matrix: every row whose sum exceeds 1 is divided by that sum."""
    total = tf.reduce_sum(matrix, axis=-1, keepdims=True)
    return tf.where(total > 1.0, matrix / total, matrix)
