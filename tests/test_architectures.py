"""Every row of the dataset table builds its network: shapes, and sizes counted here layer by layer."""

import numpy as np
import pytest

from models.architectures import build
from utils.datasets import DATASETS

keras = pytest.importorskip("keras")


def conv(kernel, inputs, outputs):
    return kernel * kernel * inputs * outputs + outputs


def dense(inputs, outputs):
    return inputs * outputs + outputs


def basic_block(inputs, outputs):
    """Two 3×3 convolutions without bias, each with four numbers a channel of normalization, and the shortcut."""
    size = 9 * inputs * outputs + 9 * outputs * outputs + 8 * outputs
    return size + (inputs * outputs + 4 * outputs if inputs != outputs else 0)


PARAMETERS = {
    "signs": conv(3, 3, 8) + conv(3, 8, 16) + conv(3, 16, 16) + conv(3, 16, 32) + conv(3, 32, 32)
    + conv(3, 32, 64) + dense(4 * 4 * 64, 256) + dense(256, 12),
    "mnist": conv(3, 1, 32) + conv(3, 32, 32) + conv(3, 32, 64) + conv(3, 64, 64) + dense(7 * 7 * 64, 512)
    + dense(512, 10),
    "gtsrb": conv(3, 3, 32) + conv(3, 32, 32) + conv(3, 32, 64) + conv(3, 64, 64) + conv(3, 64, 128)
    + conv(3, 128, 128) + dense(4 * 4 * 128, 512) + dense(512, 43),
    "cifar10": 27 * 64 + 4 * 64 + 2 * basic_block(64, 64) + basic_block(64, 128) + basic_block(128, 128)
    + basic_block(128, 256) + basic_block(256, 256) + basic_block(256, 512) + basic_block(512, 512) + dense(512, 10),
    # 224, halved by each strided convolution and each pool: 112 56 28 14 7 4.
    "youtube_face": conv(4, 3, 20) + conv(3, 20, 40) + conv(3, 40, 60) + conv(2, 60, 80) + dense(4 * 4 * 60, 160)
    + dense(4 * 4 * 80, 160) + dense(160, 1595),
    "vgg_face": 145_002_878,     # as published for VGG-Face: 14,714,688 of convolutions and three dense layers
}
VGG = 14_714_688 + dense(7 * 7 * 512, 4096) + dense(4096, 4096) + dense(4096, 2622)


@pytest.mark.parametrize("name", [name for name in DATASETS if name not in ("vgg_face", "custom")])
def test_network_of_a_row(name):
    row = DATASETS[name]
    network = build(row)
    assert network.name == name
    assert network.input_shape == (None, *row.shape) and network.output_shape == (None, row.labels)
    assert network.count_params() == PARAMETERS[name]
    names = [layer.name for layer in network.layers]
    assert row.feature_map in names
    for block in row.blocks:
        for layer in block:
            assert any(own == layer or own.startswith(layer + "_") for own in names), layer


@pytest.mark.parametrize("name", ["mnist", "signs", "cifar10"])
def test_output_is_logits(name):
    """Not probabilities: some are negative, and they do not sum to one."""
    row = DATASETS[name]
    keras.utils.set_random_seed(0)
    logits = build(row)(np.random.default_rng(0).normal(size=(8, *row.shape)).astype(np.float32)).numpy()
    assert logits.min() < 0 and np.abs(logits.sum(1) - 1).min() > 1e-3


@pytest.mark.parametrize("name", ["youtube_face", "vgg_face"])
def test_a_face_network_takes_a_training_step(name):
    """One step of plain gradient descent, batch 1: every layer moves, the loss is finite and falls."""
    import tensorflow as tf
    row = DATASETS[name]
    keras.utils.set_random_seed(0)
    network = build(row)
    assert network.input_shape == (None, *row.shape) and network.output_shape == (None, row.labels)
    assert network.count_params() == {"vgg_face": VGG}.get(name, PARAMETERS[name])
    image = np.random.default_rng(0).normal(size=(1, *row.shape)).astype(np.float32)
    label = np.array([3])
    with tf.GradientTape() as tape:
        before = keras.losses.sparse_categorical_crossentropy(label, network(image), from_logits=True)
    gradients = tape.gradient(before, network.trainable_variables)
    assert all(gradient is not None for gradient in gradients)
    kernels = {variable.path: float(tf.norm(gradient)) for variable, gradient
               in zip(network.trainable_variables, gradients) if variable.name == "kernel"}
    assert all(np.isfinite(norm) and norm > 0 for norm in kernels.values()), kernels
    for variable, gradient in zip(network.trainable_variables, gradients):
        variable.assign_sub(0.01 * gradient)
    after = keras.losses.sparse_categorical_crossentropy(label, network(image), from_logits=True)
    assert np.isfinite(after[0]) and after[0] < before[0]
