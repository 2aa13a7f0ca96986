"""Foreign models of every accepted format give the scores they were saved with; bad input is one clear line."""

import json
import zipfile

import h5py
import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers, ops
from keras.src.applications import resnet  # the public module has the large ones alone

from models import architectures
from utils import topology
from utils.config import UserError
from utils.datasets import DATASETS
from utils.examined_model import load_examined, preprocessing

ROW = DATASETS["gtsrb"]
MNIST = DATASETS["mnist"]


def randomize(network, seed=0):
    random = np.random.default_rng(seed)
    for weight in network.weights:
        if "float" in weight.dtype:
            weight.assign(0.05 + 0.1 * random.random(weight.shape) * random.choice([1, 1, -0.4], weight.shape)
                          if "variance" not in weight.name else 0.5 + random.random(weight.shape))
    return network


def images(network, count=3):
    return np.random.default_rng(1).random((count, *[side or 32 for side in network.input_shape[1:]])).astype("f4")


def branched(augment=True):
    """Augmentation, rescaling, inner models of both kinds (one called twice), arithmetic, a softmax of its own."""
    tail = keras.Sequential([layers.Input((None, None, 4)), layers.Conv2D(4, 3, padding="same", name="conv"),
                             layers.BatchNormalization(name="norm")], name="tail")
    inner = keras.Input((None, None, 4))
    block = keras.Model(inner, layers.Add()([inner, layers.DepthwiseConv2D(3, padding="same", name="conv")(inner)]),
                        name="block")
    x = first = layers.Input((32, 32, 3))
    if augment:
        x = keras.Sequential([layers.RandomFlip(), layers.RandomRotation(0.1), layers.RandomContrast(0.2)])(x)
    x = layers.Rescaling(1 / 127.5, -1.0)(x)
    x = layers.Conv2D(4, 3, strides=4, name="conv", kernel_regularizer="l2", kernel_initializer="he_normal")(x)
    x = layers.ReLU(6.0)(block(block(x), training=False))
    x = layers.MaxPooling2D(2, name="last_pool")(tail(x) * 2.0 + x)
    x = layers.Concatenate()([layers.Flatten()(x), ops.mean(x, axis=(1, 2))])
    x = layers.Dropout(0.5)(layers.Dense(8, activation="gelu", name="full")(x))
    return keras.Model(first, layers.Softmax()(layers.Dense(5, name="class")(x)))


def transformer():
    x = first = layers.Input((32, 32, 3))
    x = layers.Reshape((16, 8))(layers.Conv2D(8, 8, 8)(x))
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(2, 4)(y, y)])
        x = x + layers.Dense(8, activation="gelu")(x)
    return keras.Model(first, layers.Dense(5)(layers.GlobalAveragePooling1D()(x)))


def stacked():
    """Any size, separable convolution, group normalization, PReLU, half precision at the end."""
    return keras.Sequential([
        layers.Input((None, None, 3)), layers.SeparableConv2D(6, 3), layers.PReLU(shared_axes=[1, 2]),
        layers.GroupNormalization(2), layers.Conv2D(6, 3, activation="relu"), layers.AveragePooling2D(2),
        layers.Conv2D(7, 1), layers.GlobalMaxPooling2D(), layers.Activation("softmax", dtype="float16")])


def normalized():
    """Statistics learnt from images at the front, one channel."""
    front = layers.Normalization()
    front.adapt(np.random.default_rng(2).random((9, 28, 28, 1)))
    network = keras.Sequential([layers.Input((28, 28, 1)), front, layers.Conv2D(4, 3), layers.UpSampling2D(2),
                                layers.Conv2D(4, 3, strides=3), layers.Flatten(), layers.Dense(5)])
    for layer in network.layers[1:]:
        randomize(layer)
    return network


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """{name: (network, folder with NAME.keras, NAME.h5, NAME.weights.h5, NAME.json)}."""
    folder = tmp_path_factory.mktemp("foreign")
    made = {}
    for build in (branched, transformer, stacked, normalized):
        network = build() if build is normalized else randomize(build())
        name = build.__name__
        network.save(folder / f"{name}.keras")
        network.save(folder / f"{name}.h5")
        network.save_weights(folder / f"{name}.weights.h5")
        (folder / f"{name}.json").write_text(network.to_json())
        made[name] = network, folder
    return made


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".weights.h5"])
@pytest.mark.parametrize("name", ["branched", "transformer", "stacked", "normalized"])
def test_foreign_model_keeps_its_scores(foreign, name, suffix):
    network, folder = foreign[name]
    row = MNIST if name == "normalized" else ROW
    examined = load_examined(folder / f"{name}{suffix}", row, input_range=[0, 1],
                             architecture=str(folder / f"{name}.json") if suffix == ".weights.h5" else "")
    x = images(network)
    logits, scores = examined.network(x, training=False).numpy(), np.asarray(network(x, training=False), "f4")
    if name in ("branched", "stacked"):
        assert scores.sum(1) == pytest.approx(1, abs=2e-3) and not np.allclose(logits.sum(1), 1)
        logits = ops.softmax(logits).numpy()
    assert np.allclose(logits, scores, atol=2e-3 if name == "stacked" else 1e-5)
    assert not any(isinstance(layer, keras.Model) for layer in examined.network.layers)
    assert examined.labels == scores.shape[1] and examined.shape == x.shape[1:] and examined.name == name
    assert all(layer.trainable for layer in examined.network.layers)


def mobile_net(channels):
    return keras.applications.MobileNetV2((32, 32, channels), alpha=0.35, weights=None, classes=5)


def small_resnet(channels):
    """Keras' own builder of its ResNets, with two stages of two narrow blocks."""
    def stages(x):
        x = resnet.stack_residual_blocks_v1(x, 4, 2, stride1=1, name="conv2")
        return resnet.stack_residual_blocks_v1(x, 8, 2, name="conv3")
    return resnet.ResNet(stages, False, True, weights=None, input_shape=(32, 32, channels), classes=5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("build, suffix, blocks, feature_map", [
    (mobile_net, ".h5", [{"block_16_project", "block_16_project_BN"}, {"Conv_1", "Conv_1_bn"}, {"predictions"}],
     "block_13_expand_relu"),       # the later ones see 1×1 of an image this small
    (small_resnet, ".keras",
     [{f"conv3_block1_{number}_{kind}" for number in range(4) for kind in ("conv", "bn")},
      {f"conv3_block2_{number}_{kind}" for number in range(1, 4) for kind in ("conv", "bn")}, {"predictions"}],
     "conv3_block2_out")])
def test_networks_of_keras_applications(build, suffix, blocks, feature_map, channels, tmp_path):
    keras.utils.set_random_seed(0)
    network = build(channels)
    for layer in network.layers:            # one step gives the normalizations statistics, and the scores some life
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    network(images(network, 16), training=True)
    network.save(tmp_path / f"app{suffix}")
    examined = load_examined(tmp_path / f"app{suffix}", DATASETS["custom"], input_range=[-1, 1])
    x = images(network, 5)
    scores = network(x).numpy()
    assert np.ptp(scores, axis=0).max() > 0.01
    assert np.allclose(ops.softmax(examined.network(x)), scores, atol=1e-6)
    assert [set(block) for block in examined.blocks] == blocks and examined.feature_map == feature_map
    assert examined.shape == (32, 32, channels) and examined.labels == 5


def test_four_channels_are_refused(tmp_path):
    small_resnet(4).save(tmp_path / "four.keras")
    with pytest.raises(UserError, match="takes 4 channels: only networks for 1 .grey. or 3 .RGB. channels"):
        load_examined(tmp_path / "four.keras", DATASETS["custom"], input_range=[-1, 1])


def test_fingerprint_is_of_graph_and_weights_alone(foreign, tmp_path):
    network, folder = foreign["branched"]
    prints = {load_examined(folder / f"branched{suffix}", ROW).fingerprint for suffix in (".keras", ".h5")}
    assert len(prints) == 1
    weight = network.get_layer("full").bias
    weight.assign_add(np.eye(8, dtype="f4")[0] * 1e-6)
    network.save(tmp_path / "other.keras")
    weight.assign_sub(np.eye(8, dtype="f4")[0] * 1e-6)
    assert load_examined(tmp_path / "other.keras", ROW).fingerprint not in prints


@pytest.mark.parametrize("name", ["mnist", "signs"])
def test_own_networks_use_their_rows_blocks(name, tmp_path):
    row = DATASETS[name]
    network = architectures.build(row)
    network.save(tmp_path / "mine.keras")
    examined = load_examined(tmp_path / "mine.keras", row)
    assert examined.blocks == tuple(tuple(layer.name for layer in topology.block_layers(network, block))
                                    for block in row.blocks)
    assert examined.feature_map == row.feature_map and examined.labels == row.labels
    x = images(network)
    assert np.allclose(examined.network(x), network(x), atol=1e-6)


def test_name_under_models_folder(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "mnist"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    architectures.build(MNIST).save(folder / "patch1.keras")
    assert load_examined("patch1", MNIST).name == "patch1"
    with pytest.raises(UserError, match=r"'patch2' is not there.*there: patch1"):
        load_examined("patch2", MNIST)


def keras2_file(path, config, weights, *, keep_config=True):
    """Write `.h5` as Keras 2.2 to 2.15 did. weights: {layer: [(name of the weight, array)]}, all layers in order."""
    with h5py.File(path, "w") as file:
        group = file
        if keep_config:
            file.attrs["keras_version"], file.attrs["backend"] = "2.4.0", "tensorflow"
            file.attrs["model_config"] = json.dumps(config).encode()
            group = file.create_group("model_weights")
        group.attrs["layer_names"] = [name.encode() for name in weights]
        group.attrs["backend"], group.attrs["keras_version"] = b"tensorflow", b"2.4.0"
        for layer, arrays in weights.items():
            inner = group.create_group(layer)
            inner.attrs["weight_names"] = [name.encode() for name, _ in arrays]
            for name, array in arrays:
                inner.create_dataset(name, data=array)


def keras2_layer(kind, name, inputs=(), **options):
    made = {"class_name": kind, "config": {"name": name, "trainable": True, "dtype": "float32", **options}}
    return made if inputs is None else made | {"name": name, "inbound_nodes": [[[x, 0, 0, {}] for x in inputs]]
                                               if inputs else []}


def keras2_functional():
    """A Keras 2 network with a frozen inner model, TensorFlow arithmetic and Keras 2 options, and its weights."""
    random = np.random.default_rng(3)
    kernel = {"class_name": "VarianceScaling", "config": {"scale": 1.0, "mode": "fan_avg", "distribution": "uniform",
                                                          "seed": None}}
    conv = {"filters": 4, "kernel_size": [3, 3], "strides": [1, 1], "padding": "same", "data_format": "channels_last",
            "dilation_rate": [1, 1], "activation": "linear", "use_bias": True, "kernel_initializer": kernel,
            "kernel_regularizer": {"class_name": "L1L2", "config": {"l1": 0.0, "l2": 0.01}},
            "kernel_constraint": None}
    norm = {"axis": [3], "momentum": 0.99, "epsilon": 0.001, "center": True, "scale": True, "fused": True,
            "renorm": False, "virtual_batch_size": None}
    inner = {"class_name": "Functional", "name": "inner", "inbound_nodes": [[["conv", 0, 0, {"training": False}]]],
             "config": {"name": "inner", "layers": [
                 keras2_layer("InputLayer", "input_2", batch_input_shape=[None, None, None, 4], sparse=False),
                 keras2_layer("DepthwiseConv2D", "deep", ["input_2"], kernel_size=[3, 3], padding="same", groups=1,
                              depth_multiplier=1, use_bias=False),
                 keras2_layer("BatchNormalization", "norm", ["deep"], **norm)],
                 "input_layers": [["input_2", 0, 0]], "output_layers": [["norm", 0, 0]]}}
    for layer in inner["config"]["layers"]:
        layer["config"]["trainable"] = False
    plus = {"class_name": "TFOpLambda", "name": "tf.__operators__.add", "config": {
        "name": "tf.__operators__.add", "trainable": True, "dtype": "float32", "function": "__operators__.add"},
        "inbound_nodes": [["inner", 1, 0, {"y": ["conv", 0, 0], "name": None}]]}
    config = {"class_name": "Model", "config": {"name": "model", "layers": [
        keras2_layer("InputLayer", "input_1", batch_input_shape=[None, 32, 32, 3], sparse=False, ragged=False),
        keras2_layer("RandomFlip", "random_flip", ["input_1"], mode="horizontal", seed=None),
        keras2_layer("Conv2D", "conv", ["random_flip"], **conv), inner, plus,
        keras2_layer("LeakyReLU", "leaky", ["tf.__operators__.add"], alpha=0.25),
        keras2_layer("GlobalAveragePooling2D", "gap", ["leaky"], data_format="channels_last"),
        keras2_layer("Dense", "full", ["gap"], units=6, activation="relu", use_bias=True),
        keras2_layer("Dense", "class", ["full"], units=5, activation="softmax", use_bias=True)],
        "input_layers": [["input_1", 0, 0]], "output_layers": [["class", 0, 0]]}}

    def array(*shape):
        return random.normal(0, 0.3, shape).astype("f4")
    weights = {
        "input_1": [], "random_flip": [("random_flip/StateVar:0", np.zeros(3, "i8"))],
        "conv": [("conv/kernel:0", array(3, 3, 3, 4)), ("conv/bias:0", array(4))],
        "inner": [("deep/depthwise_kernel:0", array(3, 3, 4, 1)),
                  ("norm/gamma:0", array(4)), ("norm/beta:0", array(4)),
                  ("norm/moving_mean:0", array(4)), ("norm/moving_variance:0", abs(array(4)) + 0.5)],
        "tf.__operators__.add": [], "leaky": [], "gap": [],
        "full": [("full/kernel:0", array(4, 6)), ("full/bias:0", array(6))],
        "class": [("class/kernel:0", array(6, 5)), ("class/bias:0", array(5))]}
    return config, weights


def keras2_reference(weights):
    """The same network written in Keras 3 with the arrays set by hand."""
    x = first = layers.Input((32, 32, 3))
    x = layers.Conv2D(4, 3, padding="same", name="conv")(x)
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="deep")(x)
    y = layers.BatchNormalization(name="norm")(y) + x
    y = layers.GlobalAveragePooling2D()(layers.LeakyReLU(negative_slope=0.25)(y))
    y = layers.Dense(5, name="class")(layers.Dense(6, activation="relu", name="full")(y))
    network = keras.Model(first, y)
    for name in ("conv", "full", "class"):
        network.get_layer(name).set_weights([array for _, array in weights[name]])
    network.get_layer("deep").set_weights([weights["inner"][0][1]])
    network.get_layer("norm").set_weights([array for _, array in weights["inner"][1:]])
    return network


@pytest.mark.parametrize("alone", [False, True])
def test_keras_2_file(tmp_path, alone):
    config, weights = keras2_functional()
    keras2_file(tmp_path / "old.h5", config, weights, keep_config=not alone)
    (tmp_path / "old.json").write_text(json.dumps(config | {"keras_version": "2.4.0", "backend": "tensorflow"}))
    examined = load_examined(tmp_path / "old.h5", ROW, architecture=str(tmp_path / "old.json") if alone else "")
    reference = keras2_reference(weights)
    x = images(reference)
    assert np.allclose(examined.network(x), reference(x), atol=1e-5)
    assert examined.blocks == (("deep", "norm"), ("full",), ("class",))


@pytest.mark.parametrize("form", ["h5", "alone", "archive"])
@pytest.mark.parametrize("version", ["2.15.0", "3.1.0"])
def test_hard_sigmoid_of_keras_2_is_another_function(tmp_path, form, version):
    config, weights = keras2_functional()
    config["config"]["layers"][-2]["config"]["activation"] = "hard_sigmoid"
    path, described = tmp_path / "model.h5", tmp_path / "model.json"
    keras2_file(path, config, weights, keep_config=form != "alone")
    with h5py.File(path, "r+") as file:
        file.attrs["keras_version"] = version
        if form != "h5":
            del file.attrs["keras_version"]
    described.write_text(json.dumps(config | {"keras_version": version}))
    if form == "archive":
        with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
            archive.writestr("metadata.json", json.dumps({"keras_version": version}))
            archive.writestr("config.json", json.dumps(config))
            archive.write(path, "model.weights.h5")
        path = tmp_path / "model.keras"
    given = {"architecture": str(described)} if form == "alone" else {}
    if version == "3.1.0":
        assert load_examined(path, ROW, **given).labels == 5
        return
    with pytest.raises(UserError, match="hard_sigmoid of Keras 2"):
        load_examined(path, ROW, **given)


def test_an_option_that_keras_does_not_know_is_not_left_out(tmp_path):
    config, weights = keras2_functional()
    config["config"]["layers"][-2]["config"]["rms_scaling"] = True
    keras2_file(tmp_path / "old.h5", config, weights)
    with pytest.raises(UserError, match="option 'rms_scaling' of layer Dense"):
        load_examined(tmp_path / "old.h5", ROW)


def test_keras_2_2_sequential(tmp_path):
    """Before 2.2.3 a Sequential was a list, and the first layer had the shape."""
    config = {"class_name": "Sequential", "config": [
        keras2_layer("Conv2D", "a", None, batch_input_shape=[None, 9, 9, 1], filters=2, kernel_size=[3, 3]),
        keras2_layer("Conv2D", "b", None, filters=2, kernel_size=[3, 3], activation="relu"),
        keras2_layer("Flatten", "flat", None), keras2_layer("Dense", "c", None, units=3),
        keras2_layer("Activation", "end", None, activation="softmax")]}
    random = np.random.default_rng(4)
    weights = {"a": [("a/kernel:0", random.random((3, 3, 1, 2), "f4")), ("a/bias:0", np.ones(2, "f4"))],
               "b": [("b/kernel:0", random.random((3, 3, 2, 2), "f4")), ("b/bias:0", np.ones(2, "f4"))],
               "c": [("c/kernel:0", random.random((50, 3), "f4")), ("c/bias:0", np.ones(3, "f4"))],
               "flat": [], "end": []}
    keras2_file(tmp_path / "old.h5", config, weights)
    examined = load_examined(tmp_path / "old.h5", MNIST)
    assert examined.shape == (9, 9, 1) and examined.blocks == (("a",), ("b",), ("c",))
    assert np.array_equal(examined.network.get_layer("c").kernel, weights["c"][0][1])


@pytest.mark.parametrize("name", ["mnist", "convnet"])
def test_weights_alone_with_one_of_our_architectures(tmp_path, name):
    network = architectures.build(MNIST)
    network.save_weights(tmp_path / "mine.weights.h5")
    examined = load_examined(tmp_path / "mine.weights.h5", MNIST, architecture=name)
    x = images(network)
    assert np.allclose(examined.network(x), network(x), atol=1e-6) and examined.name == "mine"
    with pytest.raises(UserError, match="name the ARCHITECTURE"):
        load_examined(tmp_path / "mine.weights.h5", MNIST)
    with pytest.raises(UserError, match="describes a network|do not fit|describes|truncated"):
        load_examined(tmp_path / "mine.weights.h5", MNIST, architecture="cifar10")
    with pytest.raises(UserError, match="ARCHITECTURE 'resnet' is neither"):
        load_examined(tmp_path / "mine.weights.h5", MNIST, architecture="resnet")


def classifier(*middle, shape=(16, 16, 3), end=None):
    return keras.Sequential([layers.Input(shape), *middle, layers.Conv2D(2, 3, name="a"), layers.Flatten(),
                             layers.Dense(4, name="b"), end or layers.Dense(3, name="c")])


def several():
    x = layers.Input((8, 8, 3)), layers.Input((8, 8, 3))
    return keras.Model(list(x), layers.Dense(3)(layers.Flatten()(layers.Add()(x))))


def two_outputs():
    x = layers.Input((8, 8, 3))
    return keras.Model(x, [layers.Dense(3)(layers.Flatten()(x)), layers.Dense(3)(layers.Flatten()(x))])


REFUSED = {
    "takes 4 channels": lambda: classifier(shape=(16, 16, 4)),
    "several inputs or outputs|takes inputs": several,
    "several outputs|several inputs or outputs": two_outputs,
    "tells 1 label apart": lambda: classifier(end=layers.Dense(1)),
    "ends in sigmoid": lambda: classifier(end=layers.Dense(3, activation="sigmoid")),
    "ends in ReLU": lambda: keras.Sequential([classifier(), layers.ReLU()]),
    "not one score a label": lambda: keras.Sequential([layers.Input((9, 9, 3)), layers.Conv2D(4, 3)]),
    "stages with weights": lambda: keras.Sequential([layers.Input((9, 9, 3)), layers.Flatten(), layers.Dense(2)]),
    "channels first": lambda: classifier(layers.AveragePooling2D(2, data_format="channels_first")),
    "takes inputs of shape": lambda: keras.Sequential([layers.Input((9, 3)), layers.Dense(4), layers.Dense(2)]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_network_that_cannot_be_examined(message, tmp_path):
    REFUSED[message]().save(tmp_path / "bad.keras")
    with pytest.raises(UserError, match=message) as caught:
        load_examined(tmp_path / "bad.keras", ROW)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("suffix", [".keras", ".h5", ".weights.h5"])
def test_weights_that_are_no_numbers(bad, suffix, tmp_path):
    network = classifier()
    network.get_layer("b").bias.assign([0, bad, 0, 0])
    (network.save_weights if "weights" in suffix else network.save)(tmp_path / f"nan{suffix}")
    (tmp_path / "a.json").write_text(network.to_json())
    architecture = str(tmp_path / "a.json") if "weights" in suffix else ""
    with pytest.raises(UserError, match="b/bias.*NaN or infinite"):
        load_examined(tmp_path / f"nan{suffix}", ROW, architecture=architecture)


def test_blocks_and_feature_map_by_name(foreign):
    _, folder = foreign["branched"]
    path = folder / "branched.keras"
    examined = load_examined(path, ROW, blocks=["conv+tail_conv", "full", "class"], feature_map="last_pool")
    assert examined.blocks == (("conv", "tail_conv"), ("full",), ("class",)) and examined.feature_map == "last_pool"
    for options, message in (({"blocks": ["a", "b"]}, "names 2 blocks"),
                             ({"blocks": ["no", "full", "class"]}, "called 'no'; there are conv"),
                             ({"feature_map": "full"}, "no layer with a spatial output"),
                             ({"feature_map": "no"}, "FEATURE_MAP 'no'")):
        with pytest.raises(UserError, match=message):
            load_examined(path, ROW, **options)


def test_preprocessing():
    x = np.random.default_rng(0).random((2, 4, 4, 3)).astype("f4")
    same = preprocessing(ROW, (4, 4, 3))(x)
    assert np.allclose(same, (255 * x - 127.5) / 255, atol=1e-6)
    face = preprocessing(DATASETS["vgg_face"], (4, 4, 3))(x)
    assert np.allclose(face[..., 0], 255 * x[..., 2] - 93.5940, atol=1e-3)
    assert np.allclose(preprocessing(ROW, (4, 4, 3), [-1, 1])(x), 2 * x - 1, atol=1e-6)
    turned = preprocessing(ROW, (4, 4, 3), [0, 255], [103.9, 116.8, 123.7], "bgr")(x)
    assert np.allclose(turned[..., 2], 255 * x[..., 0] - 123.7, atol=1e-3)
    for options in (([0, 1, 2],), ([1, 0],), ([0, np.nan],), ([0, 1], [1, 2]), ([0, 1], None, "gbr"), (None, [1]),
                    (None, None, "bgr")):
        with pytest.raises(UserError):
            preprocessing(ROW, (4, 4, 3), *options)


def test_files_that_are_no_models(tmp_path):
    (tmp_path / "empty.keras").write_bytes(b"")
    (tmp_path / "text.keras").write_text("not a model")
    (tmp_path / "alone.json").write_text("{}")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"\x08\x01")
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    for name, message in (("empty.keras", "is empty"), ("text.keras", "no Keras model"), ("saved", "SavedModel"),
                          ("folder", "is a folder"), ("missing.keras", "not there"),
                          ("other.zip", "without config.json"),
                          ("alone.json", "description without weights")):
        with pytest.raises(UserError, match=message) as caught:
            load_examined(tmp_path / name, ROW)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def real_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    network = randomize(classifier())
    network.save(folder / "real.keras")
    network.save(folder / "real.h5")
    return {suffix: (folder / f"real{suffix}").read_bytes() for suffix in (".keras", ".h5")}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from([".keras", ".h5"]))
def test_damaged_bytes_end_in_user_error_or_a_model(real_files, tmp_path, data, suffix):
    content = bytearray(real_files[suffix])
    kind = data.draw(st.sampled_from(["cut", "change", "insert", "anything"]))
    if kind == "cut":
        content = content[:data.draw(st.integers(0, len(content)))]
    elif kind == "change":
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    elif kind == "insert":
        place = data.draw(st.integers(0, len(content)))
        content[place:place] = data.draw(st.binary(min_size=1, max_size=32))
    else:
        content = data.draw(st.sampled_from([b"", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n"])) + data.draw(
            st.binary(max_size=200))
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content)
    try:
        examined = load_examined(path, ROW)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert np.isfinite(examined.network(images(examined.network))).all()
