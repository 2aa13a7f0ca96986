"""TensorFlow 1 checkpoints in the published layout, all five architectures; damaged and hostile ones."""

import json
import re
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorflow.core.protobuf import tensor_bundle_pb2

from models import architectures
from tests.test_examined_model import MNIST, images, randomize
from utils import published_checkpoint
from utils.config import UserError
from utils.datasets import DATASETS
from utils.examined_model import load_examined

DEEPID = {"fc1/kernel": "add/weight", "fc1/bias": "add/bias",
          "conv4/kernel": "add/weight_1", "conv4/bias": "add/bias_1",
          "fc2/kernel": "add/weight_2", "fc2/bias": "add/bias_2"}


def published(network):
    """{name in a checkpoint: array} of one of our networks, written out from the layout's description."""
    names = {}
    for layer in network.layers:
        for weight in layer.weights:
            name = weight.path.replace("kernel", "weight")
            if network.name == "cifar10":
                name = re.sub(r"(block\d|conv1)_?(\w*?)_?(conv|norm)/", lambda found: "/".join(filter(None, (
                    found[1], found[2]))) + "/", name)
            names[DEEPID.get(weight.path, name) if network.name == "youtube_face" else name] = weight.numpy()
    return names


def write(prefix, tensors):
    """Save arrays as the TensorFlow 1 saver does: prefix.index and prefix.data-00000-of-00001."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    tf.raw_ops.SaveV2(prefix=str(prefix), tensor_names=names, shape_and_slices=[""] * len(names),
                      tensors=[tf.constant(tensors[name]) for name in names])
    return prefix


@pytest.mark.parametrize("name", ["mnist", "gtsrb", "cifar10", "youtube_face"])
def test_every_tensor_finds_its_weight(name, tmp_path):
    row = DATASETS[name]
    network = randomize(architectures.build(row))
    tensors = published(network)
    steps = {f"{key}/Adam": value for key, value in tensors.items()} | {"beta1_power": np.float32(0.9),
                                                                       "global_step": np.int64(7)}
    write(tmp_path / name / "patch1" / "model", tensors | steps)
    examined = load_examined(tmp_path / name / "patch1" / "model", row)
    assert examined.name == "patch1" and examined.labels == row.labels
    for weight, loaded in zip(network.weights, examined.network.weights, strict=True):
        assert weight.path == loaded.path and np.array_equal(weight, loaded)
    assert [len(block) for block in examined.blocks] == {"cifar10": [6, 4, 1], "youtube_face": [2, 2, 1]}.get(
        name, [1, 1, 1])


def test_vgg_face_names():
    network = architectures.vgg16((32, 32, 3), 2622, name="vgg_face")
    names = [published_checkpoint.tensor_names(network, layer.name, weight.name) for layer in network.layers
             for weight in layer.weights]
    convolutions = [f"conv{stage}_{number}" for stage, count in enumerate((2, 2, 3, 3, 3), 1)
                    for number in range(1, count + 1)]
    expected = [f"{layer}/{part}" for layer in [*convolutions, "fc6", "fc7", "fc8"] for part in ("weight", "bias")]
    assert names == [[name] for name in expected]


def test_names_known_to_be_published():
    assert {"conv1/weight", "conv4/bias", "full/weight", "class/bias"} < set(published(architectures.build(MNIST)))
    assert set(DEEPID.values()) < set(published(architectures.build(DATASETS["youtube_face"])))
    names = published(architectures.build(DATASETS["cifar10"]))
    assert {"conv1/weight", "conv1/gamma", "block3/1/weight", "block3/shortcut/moving_mean", "fc/bias"} < set(names)


@pytest.fixture(scope="module")
def small():
    network = randomize(architectures.convnet((8, 8, 1), 10, ((2, 2), (2, 2)), 4, name="mnist"))
    row = replace(MNIST, shape=(8, 8, 1), network_options={"widths": ((2, 2), (2, 2)), "hidden": 4})
    return row, network, published(network)


def test_found_by_name_and_by_any_of_its_files(small, tmp_path, monkeypatch):
    row, network, tensors = small
    monkeypatch.chdir(tmp_path)
    prefix = write(tmp_path / "models" / "mnist" / "patch1" / "model", tensors)
    prints = {load_examined(path, row).fingerprint for path in (
        "patch1", prefix, f"{prefix}.index", f"{prefix}.data-00000-of-00001", prefix.parent)}
    assert len(prints) == 1
    x = images(network)
    assert np.allclose(load_examined("patch1", row).network(x), network(x), atol=1e-6)


@pytest.mark.parametrize("change, message", [
    ({"full/weight": None}, "missing full/weight"),
    ({"full/weight": np.zeros((3, 3), "f4")}, r"full/weight \(float32 \(8, 4\); there: float32 \(3, 3\)"),
    ({"full/weight": np.zeros((8, 4), "f8")}, "there: float64"),
    ({"conv5/weight": np.zeros((3, 3, 2, 2), "f4")}, "not used conv5/weight"),
    ({"class/bias": np.full(10, np.nan, "f4")}, "class/bias is missing, NaN")])
def test_tensors_that_do_not_fit(small, tmp_path, change, message):
    row, _, tensors = small
    write(tmp_path / "model", {key: value for key, value in (tensors | change).items() if value is not None})
    with pytest.raises(UserError, match=message) as caught:
        load_examined(tmp_path / "model", row)
    assert "\n" not in str(caught.value)


def test_another_dataset_says_what_is_missing(small, tmp_path):
    write(tmp_path / "model", small[2])
    with pytest.raises(UserError, match="does not fit the architecture 'cifar10': missing conv1/weight .*fc/weight"
                                        "|missing conv1/.*and .* more"):
        load_examined(tmp_path / "model", DATASETS["cifar10"])


def test_data_file_missing_or_cut(small, tmp_path):
    row, _, tensors = small
    prefix = write(tmp_path / "model", tensors)
    data = tmp_path / "model.data-00000-of-00001"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    with pytest.raises(UserError, match="damaged checkpoint"):
        load_examined(prefix, row)
    data.write_bytes(content[:-9] + b"\x01" + content[-8:])
    with pytest.raises(UserError, match="is damaged"):
        load_examined(prefix, row)
    data.unlink()
    with pytest.raises(UserError, match="damaged checkpoint"):
        load_examined(prefix, row)


def checksum(data):
    """Masked CRC-32C, as tables have it behind each block."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")


def varint(number):
    made = b""
    while number > 127:
        made, number = made + bytes([number & 127 | 128]), number >> 7
    return made + bytes([number])


def table(entries, listed=1):
    """A table with one block of (key, value), every checksum right. listed: how often the block of blocks names it."""
    def block(items):
        body = b"".join(varint(0) + varint(len(key)) + varint(len(value)) + key + value for key, value in items)
        body += bytes(4) + (1).to_bytes(4, "little")
        return body, body + b"\0" + checksum(body + b"\0")
    first, first_stored = block(entries)
    second, second_stored = block([])
    third, third_stored = block([(b"\xff", varint(0) + varint(len(first)))] * listed)
    content = first_stored + second_stored + third_stored
    footer = (varint(len(first_stored)) + varint(len(second)) + varint(len(first_stored) + len(second_stored))
              + varint(len(third))).ljust(40, b"\0")
    return content + footer + published_checkpoint.TABLE_MAGIC


def entry(shape, **fields):
    made = tensor_bundle_pb2.BundleEntryProto(dtype=1, **fields)
    for side in shape:
        made.shape.dim.add(size=side)
    return made.SerializeToString()


HEADER = tensor_bundle_pb2.BundleHeaderProto(num_shards=1).SerializeToString()
HOSTILE = {
    "negative side": [(b"", HEADER), (b"a", entry([-5], size=4))],
    "shape beyond the file": [(b"", HEADER), (b"a", entry([1 << 40], size=1 << 42))],
    "shape beyond its size": [(b"", HEADER), (b"a", entry([1 << 40, 1 << 40], size=4))],
    "offset beyond the file": [(b"", HEADER), (b"a", entry([1], offset=1 << 50, size=4))],
    "negative offset": [(b"", HEADER), (b"a", entry([1], offset=-8, size=4))],
    "other file": [(b"", HEADER), (b"a", entry([1], shard_id=7, size=4))],
    "not an entry": [(b"", HEADER), (b"a", b"\xff\xff\xff")],
    "many files": [(b"", tensor_bundle_pb2.BundleHeaderProto(num_shards=1 << 30).SerializeToString())],
    "no header": [(b"a", entry([1], size=4))],
    "nothing": [],
}


def test_hostile_blocks_and_descriptions(small, tmp_path, monkeypatch):
    """One block listed again and again would fill the memory, and so would a description of more weights than there are."""
    entries = [(b"", HEADER), (b"a", entry([1], size=4)), (b"b", entry([1], size=4))]
    (tmp_path / "twice.data-00000-of-00001").write_bytes(bytes(64))
    (tmp_path / "twice.index").write_bytes(table(entries, listed=2))
    with pytest.raises(UserError, match="damaged checkpoint .*blocks that overlap"):
        load_examined(tmp_path / "twice", small[0])
    (tmp_path / "twice.index").write_bytes(table(entries))
    published_checkpoint.check_index(tmp_path / "twice")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="more than 2 tensors"):
        patch.setattr(published_checkpoint, "TENSORS", 2)
        load_examined(tmp_path / "twice", small[0])
    prefix = write(tmp_path / "model", small[2])
    first = keras.Input((8, 8, 1))
    large = keras.Model(first, keras.layers.Dense(10, name="class")(keras.layers.Flatten()(first))).get_config()
    large["layers"][-1]["config"]["units"] = 1 << 28
    (tmp_path / "large.json").write_text(json.dumps({"class_name": "Functional", "config": large}))
    with pytest.raises(UserError, match="weights, but the file holds"):
        load_examined(prefix, small[0], architecture=str(tmp_path / "large.json"))
    other = keras.Model(first, keras.layers.SeparableConv2D(2, 8, name="class")(first))
    (tmp_path / "other.json").write_text(other.to_json())
    with pytest.raises(UserError, match="missing class/depthwise_kernel"):
        load_examined(prefix, small[0], architecture=str(tmp_path / "other.json"))


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_index(what, small, tmp_path):
    (tmp_path / "model.index").write_bytes(table(HOSTILE[what]))
    (tmp_path / "model.data-00000-of-00001").write_bytes(bytes(64))
    with pytest.raises(UserError, match="damaged checkpoint"):
        load_examined(tmp_path / "model", small[0])


def test_written_table_is_one_that_tensorflow_reads(tmp_path):
    """Control for the hostile tables: with a right entry TensorFlow and the check accept the same bytes."""
    (tmp_path / "model.index").write_bytes(table([(b"", HEADER), (b"a", entry([2], size=8))]))
    (tmp_path / "model.data-00000-of-00001").write_bytes(bytes(64))
    published_checkpoint.check_index(tmp_path / "model")
    assert tf.train.load_checkpoint(str(tmp_path / "model")).get_variable_to_shape_map() == {"a": [2]}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_index_never_ends_the_process(small, tmp_path, data):
    row, _, tensors = small
    prefix = write(tmp_path / "model", tensors)
    content = bytearray((tmp_path / "model.index").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "model.index").write_bytes(content[:data.draw(st.integers(0, len(content)))]
                                           if data.draw(st.booleans()) else content)
    try:
        load_examined(prefix, row)
    except UserError as error:
        assert "\n" not in str(error)
