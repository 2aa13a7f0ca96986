"""The examined model: somebody else's trained network, loaded so that nothing in its file can run.

Formats, told apart by content: `.keras` archives, whole-model `.h5` of Keras 2 and 3, weights alone (`.h5`,
`.weights.h5`) with an architecture, and TensorFlow 1 checkpoints in the published layout.
"""

import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import keras
import numpy as np

from models import architectures
from utils import checked_config, checked_weights, published_checkpoint, safe_files, topology
from utils.config import UserError
from utils.datasets import DATASETS, Dataset
from utils.images import network_input

SUFFIXES = (".keras", ".h5", ".weights.h5", ".hdf5", "")
KNOWN = ", ".join(row.name for row in DATASETS.values() if row.network)
CHECKPOINT = "model"         # the release keeps a model as NAME/model.index and NAME/model.data-...


@dataclass(frozen=True)
class ExaminedModel:
    """name: safe as a folder's name. network: scaled images → logits, one flat functional model. preprocess: float32
    RGB images in [0, 1], N×H×W×C → the network's input. blocks: three tuples of layer names, earliest first.
    feature_map: the layer that Grad-CAM reads. shape: H, W, C of the input. fingerprint: of graph and weights.
    """

    name: str
    path: pathlib.Path
    network: keras.Model
    preprocess: Callable
    blocks: tuple
    feature_map: str
    labels: int
    shape: tuple
    fingerprint: str


def load_examined(model, row, *, architecture="", input_range=None, input_mean=None, channel_order="rgb",
                  blocks=None, feature_map=""):
    """Load the model called `model` under models/DATASET/, or at the path `model`. Returns an `ExaminedModel`.

    row: the `utils.datasets.Dataset` it was trained for; it gives the pixel scaling unless `input_range` (low, high
    of what the network saw) says otherwise; the row `custom` has none. input_mean: subtracted after that, one number
    or one a channel, in the network's order of channels; channel_order: "rgb" or "bgr". architecture: for files without
    one, a dataset's name, a function of models/architectures.py or the path of a model's JSON. blocks: three layer
    names, each or several joined by `+`, or prefixes that end before an underscore. feature_map: a layer's name.

    Raises UserError in one line for whatever cannot be loaded safely or examined.
    """
    path = find(model, row)
    read = _read(path, row, architecture)
    try:
        network = topology.to_logits(_flat(read))
        if len(network.output_shape) != 2:
            raise UserError(f"it gives {network.output_shape[1:]} for an image, not one score a label: save the part "
                            "that classifies")
        labels, shape = network.output_shape[-1], tuple(network.input_shape[1:])
        if labels is None or labels < 2:
            raise UserError(f"it tells {labels} label apart: a classifier has at least two")
        return ExaminedModel(
            name=safe_name(path), path=path, network=network, labels=labels, shape=shape,
            preprocess=preprocessing(row, shape, input_range, input_mean, channel_order),
            blocks=_blocks(network, row, blocks), feature_map=_feature_map(network, row, feature_map),
            fingerprint=fingerprint(network))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def find(model, row):
    """The file, or prefix of a checkpoint, that `model` means. Raises UserError where there is none."""
    model = str(model)
    if not model.strip() or "\0" in model:
        raise UserError("MODEL is empty: give a name under models/DATASET/ or a path")
    folder = pathlib.Path("models", row.name)
    bases = [pathlib.Path(model)] if "/" in model else [folder / model, pathlib.Path(model)]
    try:
        for base in bases:
            for suffix in SUFFIXES:
                path = pathlib.Path(f"{base}{suffix}")
                if path.is_file():      # of a checkpoint's files, any means all
                    return pathlib.Path(re.sub(r"\.(index|data-\d+-of-\d+)$", "", str(path)))
            for prefix in (base, base / CHECKPOINT):
                if pathlib.Path(f"{prefix}.index").is_file():
                    return prefix
            if base.is_dir():
                raise UserError(f"{base} is a folder: " + (
                    "a SavedModel, whose graph may read and write files when it runs; load it where you trust it and "
                    "save it with model.save('NAME.keras'), or give its weights as .h5 with an ARCHITECTURE"
                    if (base / "saved_model.pb").is_file() or (base / "saved_model.pbtxt").is_file() else
                    "give the model's file, .keras or .h5, or the prefix of a checkpoint in it"))
    except OSError as error:
        raise UserError(f"MODEL {model[:100]!r} cannot be opened ({error.strerror}): give a path or a name under "
                        f"{folder}/") from None
    there = sorted({item.name.removesuffix(suffix) for suffix in SUFFIXES[:-1] for item in folder.glob(f"*{suffix}")})
    raise UserError(f"MODEL {model[:200]!r} is not there: give a path, or a name under {folder}/ "
                    f"(there: {', '.join(there[:10]) or 'nothing'})")


def safe_name(path):
    """A model's name for folders and reports: the file's stem, or the folder's where the release says `model`."""
    name = path.name
    for suffix in (".weights.h5", ".keras", ".h5", ".hdf5"):
        name = name.removesuffix(suffix)
    if name == CHECKPOINT and pathlib.Path(f"{path}.index").is_file():
        name = path.absolute().parent.name
    return re.sub(r"[^\w.-]", "_", name).lstrip(".")[:100] or "model"


def _read(path, row, architecture):
    """The network with its weights, as the file has it: models inside models, softmax and all."""
    described = _architecture(architecture, row) if architecture else None
    where = str(path)
    if pathlib.Path(f"{path}.index").is_file() and not path.is_file():
        if not described and not row.network:
            raise _weights_alone(where)
        network = published_checkpoint.load(lambda available: _network(
            described or row, row, where, available if isinstance(described, dict) else math.inf), path)
        checked_weights.check_finite(network, where)
        return network
    with open(path, "rb") as file:
        start = file.read(8)
    if start.startswith(b"PK"):
        with safe_files.open_archive(path) as (config, weights):
            return _read_hdf5(weights, described or config, row, where)
    if start == b"\x89HDF\r\n\x1a\n":
        return _read_hdf5(path, described, row, where)
    kind = ("is empty" if not start else "is a description without weights: give it as ARCHITECTURE and the weights "
            "as MODEL" if path.suffix == ".json" else "is no Keras model, neither a .keras archive nor HDF5")
    raise UserError(f"{path} {kind}: save the model with model.save('NAME.keras')")


def _read_hdf5(path, described, row, where):
    with safe_files.open_hdf5(path, where) as file:
        if described is None:
            text = safe_files.attribute(file, "model_config")
            if not isinstance(text, str):
                raise _weights_alone(where)
            described = safe_files.parse_json(text, f"model_config in {where}")
        available = checked_weights.count(file)
        network = _network(described, row, where, available, safe_files.attribute(file, "keras_version"))
        checked_weights.load(network, file, where)
    return network


def _weights_alone(where):
    return UserError(f"{where} holds weights alone: name the ARCHITECTURE they belong to, a dataset ({KNOWN}) or the path "
                     "of a model's JSON")


def _architecture(architecture, row):
    """What `architecture` names: a `Dataset` row whose network to build, or a description."""
    if architecture in DATASETS and DATASETS[architecture].network:
        return DATASETS[architecture]
    for known in (row, *DATASETS.values()):
        if known.network == architecture:
            if known is not row and known.network_options:
                raise UserError(f"ARCHITECTURE {architecture!r} has several sizes: name a dataset, {KNOWN}")
            return replace(row if row.shape else known, network=known.network, network_options=known.network_options)
    path = pathlib.Path(architecture)
    if not path.is_file():
        raise UserError(f"ARCHITECTURE {architecture[:200]!r} is neither a dataset ({KNOWN}), nor a "
                        "network of models/architectures.py, nor a file with a model's JSON")
    with open(path, "rb") as file:
        described = safe_files.parse_json(file.read(safe_files.CONFIG_BYTES + 1), str(path))
    if not isinstance(described, dict):
        raise UserError(f"ARCHITECTURE {path} is not a model's JSON: write it with model.to_json()")
    return described


def _network(described, row, where, available, version=None):
    """The network of a `Dataset` row or of a description, its weights still zero."""
    if not isinstance(described, Dataset):
        return checked_config.build(described, row.shape or (None,) * 3, available, where, version)
    with checked_config.deferred_weights(where, available):
        return architectures.build(described)


def _flat(network):
    """The network without models inside it; refuses tensors inside it that are too large for any image."""
    if not isinstance(network.input_shape, tuple) or not isinstance(network.output_shape, tuple):
        raise UserError("it has several inputs or outputs: save the part that classifies one image")
    flat = topology.flatten(network)
    for node in topology.nodes(flat):
        for x in node.outputs:
            if None in x.shape[1:] or math.prod(x.shape[1:]) > checked_config.TENSOR:
                raise UserError(f"layer {node.operation.name!r} makes {x.shape[1:]} of one image: too large to scan")
    return flat


def _blocks(network, row, blocks):
    if blocks is None or not len(blocks):
        if not row.blocks:
            return topology.default_blocks(network)
        try:
            chosen = [topology.block_layers(network, block) for block in row.blocks]
        except KeyError:
            return topology.default_blocks(network)
    else:
        if isinstance(blocks, str) or len(blocks) != 3:
            raise UserError(f"BLOCKS {blocks!r} names {len(blocks)} blocks: three are needed, earliest first")
        try:
            chosen = [topology.block_layers(network, block.split("+")) for block in blocks]
        except KeyError as error:
            names = ", ".join(layer.name for layer in network.layers if layer.weights)
            raise UserError(f"BLOCKS: no layer with weights is called {error.args[0]!r}; there are {names}") from None
    return tuple(tuple(layer.name for layer in block) for block in chosen)


def _feature_map(network, row, feature_map):
    outputs = {node.operation.name: node.outputs[0] for node in topology.nodes(network)}
    if feature_map:
        if feature_map not in outputs or not topology.is_feature_map(outputs[feature_map]):
            names = ", ".join(name for name, x in outputs.items() if topology.is_feature_map(x))
            raise UserError(f"FEATURE_MAP {feature_map!r} is no layer with a spatial output; there are {names}")
        return feature_map
    if row.feature_map in outputs and topology.is_feature_map(outputs[row.feature_map]):
        return row.feature_map
    return topology.default_feature_map(network)


def preprocessing(row, shape, input_range=None, input_mean=None, channel_order="rgb"):
    """The function from float32 RGB images in [0, 1] to the input of a network of `shape`. Raises UserError."""
    if channel_order not in ("rgb", "bgr"):
        raise UserError(f"CHANNEL_ORDER {channel_order!r} is neither rgb nor bgr")
    ranged, mean = np.float32(input_range or ()).ravel(), np.float32(() if input_mean is None else input_mean).ravel()
    if not len(ranged):
        if len(mean) or channel_order != "rgb":
            raise UserError("INPUT_MEAN and CHANNEL_ORDER need INPUT_RANGE, the range of pixels that the network saw")
        if row.shape is None:
            raise UserError(f"DATASET {row.name} does not tell how pixels are scaled: give INPUT_RANGE, what the network "
                            "takes for black and white, such as 0 1, -1 1, or 0 255 where it scales them itself")
        if len(row.pixel_mean) not in (1, shape[2]) or row.bgr and shape[2] != 3:
            raise UserError(f"the network takes {shape[2]} channels, the scaling of {row.name} is for "
                            f"{row.shape[2]}: give INPUT_RANGE, such as 0 1")
        return lambda images: network_input(images, row)
    if len(ranged) != 2 or not np.isfinite(ranged).all() or ranged[0] >= ranged[1]:
        raise UserError(f"INPUT_RANGE {input_range} is not a lower and an upper end, such as 0 1 or -1 1 or 0 255")
    if len(mean) not in (0, 1, shape[2]) or not np.isfinite(mean).all():
        raise UserError(f"INPUT_MEAN {input_mean} is not one number or {shape[2]}, one a channel")
    low, size = ranged[0], ranged[1] - ranged[0]
    backwards = channel_order == "bgr" and shape[2] == 3

    def preprocess(images):
        images = images[..., ::-1] if backwards else images
        return images * size + low - (mean if len(mean) else np.float32(0))
    return preprocess


def fingerprint(network):
    """Hex SHA-256 over the graph (without the network's own name) and all weights' names, shapes and bytes."""
    graph = {key: value for key, value in network.get_config().items() if key != "name"}
    digest = hashlib.sha256(json.dumps(graph, sort_keys=True, default=str).encode())
    for layer in network.layers:
        for weight in layer.weights:
            digest.update(f"{layer.name}/{weight.name}{tuple(weight.shape)}".encode())
            digest.update(np.ascontiguousarray(weight).tobytes())
    return digest.hexdigest()
