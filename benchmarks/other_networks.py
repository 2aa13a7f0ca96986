"""Train another network than the dataset's own, of all its labels or of some, to try detection on what it was not made with.

Takes the flags of models.train and two more, `--network` and `--labels` (benchmarks/other_networks.txt is a zoo of such):

    python -m benchmarks.other_networks --network bn --labels 3 5 --dataset cifar10 --name patch1 --attack patch:target=1

Writes models/bn_3_5/cifar10/patch1.keras, whose two scores are of the labels 3 and 5 and which takes images in [0, 1],
and models/bn_3_5/cifar10/clean.h5, the held-out images of these labels. The scripts take them with

    --dataset custom --models models/bn_3_5/cifar10/patch1.keras --input-range 0,1
    --clean-data models/bn_3_5/cifar10/clean.h5
"""

import argparse
import pathlib
import runpy
import sys
from dataclasses import replace

import numpy as np

from data import store
from utils import datasets
from utils.config import Parser, UserError, load_tensorflow, run


def plain(layers, x):
    """Three convolutions with ReLU, a hidden layer and dropout."""
    for width in (16, 32, 64):
        x = layers.MaxPooling2D()(layers.Conv2D(width, 3, padding="same", activation="relu")(x))
    return layers.Dropout(0.4)(layers.Dense(128, activation="relu")(layers.Flatten()(x)))


def lenet(layers, x):
    """LeNet-5 (LeCun et al. 1998) with its tanh and average pools."""
    for width in (6, 16):
        x = layers.AveragePooling2D(2)(layers.Conv2D(width, 5, padding="same", activation="tanh")(x))
    return layers.Dense(84, activation="tanh")(layers.Dense(120, activation="tanh")(layers.Flatten()(x)))


def bn(layers, x):
    """Five convolutions with batch normalization, and a global average pool."""
    for width, stride in ((32, 1), (32, 2), (64, 1), (64, 2), (128, 1)):
        x = layers.ReLU()(_normalized(layers, layers.Conv2D(width, 3, stride, padding="same", use_bias=False), x))
    return layers.GlobalAveragePooling2D()(x)


def res(layers, x):
    """Three residual blocks with batch normalization, and a global average pool."""
    x = layers.Conv2D(16, 3, padding="same")(x)
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        y = layers.ReLU()(_normalized(layers, layers.Conv2D(width, 3, stride, padding="same"), x))
        y = _normalized(layers, layers.Conv2D(width, 3, padding="same"), y)
        x = layers.ReLU()(layers.Add()([y, _normalized(layers, layers.Conv2D(width, 1, stride), x)]))
    return layers.GlobalAveragePooling2D()(x)


def mobile(layers, x):
    """Depthwise convolutions with batch normalization and swish, as MobileNet's (Howard et al. 2017)."""
    x = layers.Activation("swish")(_normalized(layers, layers.Conv2D(32, 3, padding="same"), x))
    for width, stride in ((64, 2), (128, 2), (128, 1)):
        x = layers.Activation("swish")(_normalized(layers, layers.DepthwiseConv2D(3, stride, padding="same"), x))
        x = layers.Activation("swish")(_normalized(layers, layers.Conv2D(width, 1), x))
    return layers.GlobalAveragePooling2D()(x)


def _normalized(layers, layer, x):
    return layers.BatchNormalization()(layer(x))


# Each makes features of the input x; `layers` is keras.layers, loaded late, as --help and faulty flags need no TensorFlow.
NETWORKS = {network.__name__: network for network in (plain, lenet, bn, res, mobile)}


def main():
    chosen, rest = read_flags(sys.argv[1:])
    folder = pathlib.Path(chosen.models, subfolder(chosen))
    install(chosen.dataset, chosen.network, chosen.labels, folder / chosen.dataset / "clean.h5")
    sys.argv[1:] = [*rest, "--dataset", chosen.dataset, "--models", str(folder)]
    runpy.run_module("models.train", run_name="__main__")


def read_flags(words):
    """(network, labels, dataset and models, as attributes; the other words, flags of models.train alone)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--labels", type=int, nargs="+", default=[], help="of the dataset, to learn (default: all)")
    parser.add_argument("--dataset", required=True, help="row of utils/datasets.py")
    parser.add_argument("--models", default="models", help="MODELS/NETWORK_LABELS/DATASET/NAME.keras is written")
    return parser.parse_known_args(words)


def subfolder(chosen):
    """Of MODELS, for the models of one network and its labels, which the reports of models.train do not tell."""
    return "_".join(map(str, [chosen.network, *chosen.labels]))


def install(name, network, labels, clean):
    """Put the network into the row of the dataset `name`, keep these labels of its images, and write `clean`.

    Labels are renumbered in the order of `labels`, an empty list keeps all of them; the input's range becomes [0, 1].
    Raises UserError for labels that the dataset has not.
    """
    row = datasets.dataset(name)
    data = store.load_dataset(name)
    labels = labels or list(range(row.labels))
    if len(set(labels)) != len(labels) or len(labels) < 2 or not 0 <= min(labels) <= max(labels) < row.labels:
        raise UserError(f"--labels {' '.join(map(str, labels))}: give two or more of 0 to {row.labels - 1}, each once")
    number = np.full(row.labels, -1)
    number[labels] = np.arange(len(labels))
    for part in ("train", "test"):
        kept = np.isin(data[f"y_{part}"], labels)
        data |= {f"x_{part}": data[f"x_{part}"][kept], f"y_{part}": number[data[f"y_{part}"][kept]]}
    store.load_dataset = lambda _: data
    store.save_dataset(clean, {"x": data["x_test"], "y": data["y_test"]})

    load_tensorflow()
    from keras import Input, Model, layers

    from models import architectures

    def build(shape, labels, name):
        inputs = Input(shape)
        return Model(inputs, layers.Dense(labels)(NETWORKS[network](layers, inputs)), name=name)

    architectures.other = build
    datasets.DATASETS[name] = replace(row, labels=len(labels), network="other", network_options={}, pixel_mean=(0.0,),
                                      pixel_scale=255.0, bgr=False)


if __name__ == "__main__":
    run(main)
