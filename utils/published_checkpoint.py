"""Checkpoints in the layout of the authors' release (TensorFlow 1): prefix.index beside prefix.data-00000-of-00001.

Tensor names: `conv1/weight`, `conv1/bias`, ..., `full/...`, `class/...`, `fc6/...`; in DeepID `add/weight` (fc1),
`add/weight_1` (conv4), `add/weight_2` (fc2) and biases alike. Kernels lie as Keras has them, and flattening runs over
height, width, channels in both. For the ResNet the release's names are not documented: expected are the layer's name
with slashes, `block3_1_conv` as `block3/1/weight` and `block3_1_norm` as `block3/1/gamma`, `/beta`, `/moving_mean`,
`/moving_variance`, or with one of `bn`, `norm`, `batch_norm`, `batch_normalization` before the last part.
"""

import math
import os
import pathlib

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import tensor_bundle_pb2

from utils.config import UserError

PARTS = {"kernel": "weight", "bias": "bias", "gamma": "gamma", "beta": "beta", "moving_mean": "moving_mean",
         "moving_variance": "moving_variance"}
DEEPID = {"fc1": "", "conv4": "_1", "fc2": "_2"}
SCOPES = ("", "bn/", "norm/", "batch_norm/", "batch_normalization/")
INDEX_BYTES, TENSORS = 16 << 20, 100_000
TABLE_MAGIC = 0xdb4775248b80fb57.to_bytes(8, "little")


def load(build, prefix):
    """A network of models.architectures with every weight read from the checkpoint `prefix`.

    build: from how many numbers the checkpoint's files may hold to the network. Raises UserError: damaged files, tensors
    that are missing, of another shape or type, or left over.
    """
    try:
        available = check_index(prefix) // 4
        reader = tf.train.load_checkpoint(str(prefix))
        shapes, types = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    except (tf.errors.OpError, RuntimeError, ValueError, IndexError, DecodeError, OSError) as error:
        raise UserError(f"{prefix} is a damaged checkpoint ({_line(error)}): copy its files again") from None
    network = build(available)
    pairs, missing = [], []
    for layer in network.layers:
        for variable in layer.weights:
            names = tensor_names(network, layer.name, variable.name)
            name = next((name for name in names if name in shapes), None)
            if name is None:
                missing.append(names[0])
            elif tuple(shapes[name]) != tuple(variable.shape) or types[name] != tf.float32:
                missing.append(f"{name} (float32 {tuple(variable.shape)}; there: {types[name].name} "
                               f"{tuple(shapes[name])})")
            else:
                pairs.append((variable, name))
    used = {name for _, name in pairs}
    left = [name for name in shapes if name not in used and "weight" in name.split("/")[-1]]
    if missing or left:
        unused = left or [name for name in shapes if name not in used]
        raise UserError(f"{prefix} does not fit the architecture {network.name!r}: missing {_some(missing)}; not "
                        f"used {_some(unused)}: choose the DATASET or ARCHITECTURE it was trained for")
    for variable, name in pairs:
        try:
            variable.assign(np.asarray(reader.get_tensor(name)))
        except (tf.errors.OpError, RuntimeError, ValueError) as error:
            raise UserError(f"{prefix}: tensor {name} is damaged ({_line(error)}): copy its files again") from None
    return network


def check_index(prefix):
    """Read a checkpoint's index without TensorFlow, which ends the whole process over some of what may stand there.

    Returns how many bytes the data files have. Raises ValueError, IndexError or DecodeError unless every tensor has a plain
    shape and lies within these.
    """
    index = pathlib.Path(f"{prefix}.index")
    if index.stat().st_size > INDEX_BYTES:
        raise ValueError(f"its index has more than {INDEX_BYTES} bytes")
    table = index.read_bytes()
    if table[-8:] != TABLE_MAGIC:
        raise ValueError("its index is cut off or no table")
    _, place = _varints(table[-48:], 0, 2)                          # the footer: a block that is not needed, then
    (offset, size), _ = _varints(table[-48:], place, 2)             # the block that lists the others
    entries, behind = [], 0
    for _, handle in _block(table, offset, size):
        (offset, size), _ = _varints(handle, 0, 2)
        if offset < behind:                                         # a block listed again and again would fill the memory
            raise ValueError("its index has blocks that overlap")
        behind = offset + size
        entries += _block(table, offset, size)
        if len(entries) > TENSORS:
            raise ValueError(f"its index names more than {TENSORS} tensors")
    if not entries or entries[0][0] or len({key for key, _ in entries}) < len(entries):
        raise ValueError("its index has no header or names a tensor twice")
    shards = tensor_bundle_pb2.BundleHeaderProto.FromString(entries[0][1]).num_shards
    if not 1 <= shards <= 1000:
        raise ValueError(f"it is in {shards} files")
    sizes = [os.path.getsize(f"{prefix}.data-{shard:05d}-of-{shards:05d}") for shard in range(shards)]
    for key, value in entries[1:]:
        entry = tensor_bundle_pb2.BundleEntryProto.FromString(value)
        shape = [side.size for side in entry.shape.dim]
        if (min(shape, default=0) < 0 or len(shape) > 8 or entry.shape.unknown_rank or entry.slices
                or entry.offset < 0 or entry.size < 0 or not 0 <= entry.shard_id < shards
                or entry.offset + entry.size > sizes[entry.shard_id] or math.prod(shape) > entry.size):
            raise ValueError(f"tensor {key[:80]!r} is not within its data file")
    return sum(sizes)


def _block(table, offset, size):
    """[(key, value)] of a block of a table: keys share their beginnings with the one before."""
    if offset + size + 5 > len(table) or table[offset + size]:      # then a byte for its compression, never used
        raise ValueError("its index is cut off or compressed")
    block, key, found, place = table[offset:offset + size], b"", [], 0
    end = size - 4 - 4 * int.from_bytes(block[-4:], "little")
    if end < 0:
        raise ValueError("its index is damaged")
    while place < end:
        (shared, added, length), place = _varints(block, place, 3)
        if shared > len(key) or place + added + length > end or added + shared > 1000:
            raise ValueError("its index is damaged")
        key = key[:shared] + block[place:place + added]
        found.append((key, block[place + added:place + added + length]))
        place += added + length
    return found


def _varints(data, place, count):
    """`count` numbers of seven bits a byte, and the place behind them."""
    numbers = []
    for _ in range(count):
        number = shift = 0
        while True:
            byte = data[place]
            place += 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
            if shift > 63:
                raise ValueError("its index is damaged")
        numbers.append(number)
    return numbers, place


def tensor_names(network, layer, variable):
    """The names under which a checkpoint may hold a variable, the documented one first."""
    part = PARTS.get(variable, variable)        # a layer that the release has not: asked for by Keras' name
    if "fc1" in [item.name for item in network.layers] and layer in DEEPID:
        return [f"add/{part}{DEEPID[layer]}"]
    unit = layer.removesuffix("_conv").removesuffix("_norm")
    if unit == layer:
        return [f"{layer}/{part}"]
    unit = unit.replace("_", "/")
    return [f"{unit}/{scope}{part}" for scope in (SCOPES if layer.endswith("_norm") else SCOPES[:1])]


def _some(names):
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def _line(error):
    return " ".join(str(error).split())[:150]
