"""Weights from a checked HDF5 file into a network, numbers only; every one has to be there and be finite."""

import os
import pathlib
import tempfile

import h5py
import numpy as np

from utils.config import UserError
from utils.safe_files import attribute_list

RENAMED = {"depthwise_kernel": "kernel"}      # a DepthwiseConv2D's, in Keras 2 and 3


def count(file):
    """How many numbers the arrays of a checked HDF5 file hold."""
    sizes = []
    file.visititems(lambda name, item: sizes.append(item.size) if isinstance(item, h5py.Dataset) else None)
    return sum(sizes)


def load(network, file, where):
    """Read every weight of `network`, models inside it included, from a file that `safe_files.open_hdf5` yielded.

    Both of Keras' layouts: a group a layer with the names of its weights (whole-model and weights-only `.h5`), and
    `layers/CLASS/vars/0` (`.keras`, `.weights.h5`). Raises UserError: missing, of another shape, NaN or infinite.
    """
    for variable in network.weights:
        variable.assign(np.full(variable.shape, np.nan if "float" in variable.dtype else 0, variable.dtype))
    group = file["model_weights"] if "model_weights" in file else file
    try:
        if attribute_list(group, "layer_names"):
            _load_by_layer(network, group)
        else:
            # Keras reads arrays by position here and builds nothing; it insists on the suffix.
            with tempfile.TemporaryDirectory() as folder:
                link = pathlib.Path(folder, "model.weights.h5")
                os.symlink(os.path.abspath(file.filename), link)
                network.load_weights(link)
    except UserError:
        raise
    except Exception as error:      # whatever a file makes h5py, Keras or TensorFlow say about shapes and names
        raise UserError(f"{where}: its weights do not fit the network ({' '.join(str(error).split())[:300]}): give "
                        "the ARCHITECTURE they belong to, or save the model again") from None
    check_finite(network, where)


def check_finite(network, where):
    """Raise UserError for the first layer with a weight that is NaN, infinite or was not in the file."""
    for variable in network.weights:
        if not np.isfinite(np.asarray(variable)).all():
            raise UserError(f"{where}: weight {variable.path} is missing, NaN or infinite: the training failed or "
                            "the file is damaged; examine another copy")


def _load_by_layer(network, group):
    layers = [layer for layer in network.layers if layer.weights]
    saved = {name: weights for name in _once(group, "layer_names") if (weights := _weights(group[name]))}
    names = [layer.name for layer in layers]
    if set(names) != set(saved):
        if len(names) != len(saved):
            raise ValueError(f"the network has {len(names)} layers with weights, the file {len(saved)}")
        names = list(saved)                     # named otherwise: by position, as Keras does
    for layer, name in zip(layers, names, strict=True):
        variables = [*layer.trainable_weights, *layer.non_trainable_weights]
        arrays = saved[name]
        if len(variables) != len(arrays):
            raise ValueError(f"layer {layer.name} has {len(variables)} weights, the file {len(arrays)}")
        by_name = dict(arrays)
        wanted = [_label(variable.path) for variable in variables]
        if len(by_name) == len(arrays) and set(wanted) == set(by_name):
            arrays = [(label, by_name[label]) for label in wanted]
        for variable, want, (label, array) in zip(variables, wanted, arrays, strict=True):
            if label[-1] != want[-1] or array.shape != tuple(variable.shape):
                raise ValueError(f"layer {layer.name}: {variable.name} {tuple(variable.shape)} in the network, "
                                 f"{label[-1]} {array.shape} in the file")
            variable.assign(array[()])


def _weights(group):
    """[(label, dataset)] of a layer's group, states of random generators left out. Nothing is read yet."""
    return [(_label(name), group[name]) for name in _once(group, "weight_names")
            if _label(name)[-1] not in ("StateVar", "seed_generator_state")]


def _once(group, attribute):
    names = attribute_list(group, attribute)
    if len(set(names)) < len(names):
        raise ValueError(f"{attribute} has a name twice")
    return names


def _label(path):
    """(layer, weight) of a weight's path: `model/conv1/kernel:0` is ("conv1", "kernel")."""
    *_, layer, name = ("/" + path.split(":")[0]).split("/")
    return layer, RENAMED.get(name, name)
