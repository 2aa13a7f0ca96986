"""Where an optimization of images or triggers starts, and how its optimizer starts anew."""

import numpy as np
import tensorflow as tf


def uniform(seed, targets, shape):
    """A start in [0, 1) for each target, which depends on the target alone."""
    return np.stack([np.random.default_rng([seed, target]).uniform(size=shape) for target in targets]).astype(np.float32)


def start_anew(optimizer):
    """Back to before its first step, at the learning rate that it has."""
    rate = optimizer.learning_rate
    for variable in optimizer.variables:
        if variable is not rate:
            variable.assign(tf.zeros_like(variable))
