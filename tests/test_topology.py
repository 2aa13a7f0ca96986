"""Cuts give the whole network's output, groups count as one block, a softmax is taken away exactly."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from models import architectures
from tests.test_examined_model import branched, classifier, images, randomize
from utils import topology, transfer
from utils.config import UserError
from utils.datasets import DATASETS
from utils.examination import classifier as compiled


def residual(depth=3, labels=4):
    """A small residual network with projections, batch normalization and pre-activation."""
    x = first = layers.Input((16, 16, 3))
    x = layers.ReLU(name="stem")(layers.BatchNormalization(name="stem_norm")(
        layers.Conv2D(4, 3, padding="same", name="stem_conv")(x)))
    for block in range(1, depth + 1):
        stride = 2 if block == 2 else 1
        y = layers.Conv2D(4, 3, stride, padding="same", name=f"unit{block}_a")(x)
        y = layers.BatchNormalization(name=f"unit{block}_norm")(y)
        y = layers.Conv2D(4, 3, padding="same", name=f"unit{block}_b")(layers.ReLU()(y))
        shortcut = layers.Conv2D(4, 1, stride, name=f"unit{block}_shortcut")(x) if stride == 2 else x
        x = layers.ReLU(name=f"unit{block}")(layers.Add()([y, shortcut]))
    return keras.Model(first, layers.Dense(labels, name="fc")(layers.GlobalAveragePooling2D()(x)))


def bypassed():
    """A tensor from early on is added behind everything, so no cut in between is a single tensor."""
    x = first = layers.Input((16, 16, 3))
    early = layers.Dense(4, name="early")(layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, name="a")(x)))
    x = layers.Conv2D(4, 3, name="b")(x)
    x = layers.MaxPooling2D(2, name="map")(layers.Conv2D(4, 3, name="c")(x))
    x = layers.Dense(4, name="late")(layers.Flatten()(x))
    return keras.Model(first, layers.Dense(4, name="end")(early + x * 2.0))


def shared():
    """One layer called twice."""
    x = first = layers.Input((16, 16, 3))
    again = layers.Conv2D(3, 3, padding="same", name="again")
    x = layers.Flatten()(again(layers.ReLU()(again(x))))
    return keras.Model(first, layers.Dense(3, name="end")(layers.Dense(4, name="middle")(x)))


NETWORKS = {"residual": residual, "bypassed": bypassed, "shared": shared,
            "branched": lambda: topology.to_logits(topology.flatten(randomize(branched(augment=False)))),
            "signs": lambda: architectures.build(DATASETS["signs"])}


def test_networks_that_stretch_images_take_fewer_at_a_time():
    assert all(topology.enlargement(make()) == 1 for make in NETWORKS.values())
    x = first = layers.Input((32, 32, 3))
    x = layers.Conv2D(128, 3, strides=2)(layers.UpSampling2D(8)(x))
    large = keras.Model(first, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))
    factor = topology.enlargement(large)
    assert factor == 127 * 127 * 128 / (64 * 32 * 32)
    model = compiled(large, lambda images: images)
    assert transfer.batch_size(model, (7, 32, 32, 3)) == int(256 / factor) == 8
    assert transfer.batch_size(lambda images: images, (7, 32, 32, 3)) == 256
    assert transfer.logits_of(model, np.zeros((20, 32, 32, 3), np.uint8)).shape == (20, 4)


@pytest.mark.parametrize("name", NETWORKS)
def test_split_at_any_layers(name):
    network = randomize(NETWORKS[name]())
    x = images(network)
    expected = network(x).numpy()
    weighted = [layer for layer in network.layers if layer.weights]
    random = np.random.default_rng(0)
    chosen = [[layer] for layer in weighted] + [weighted] + [
        list(random.choice(weighted, 2, replace=False)) for _ in range(2)]
    for some in chosen:
        front, head = topology.split(network, some)
        assert np.array_equal(head(front(x)).numpy(), expected)
        assert not {id(layer) for layer in front.layers} & {id(layer) for layer in some}
        assert {id(layer) for layer in some} <= {id(layer) for layer in head.layers}


def test_split_shares_the_layers_and_leaves_the_network_alone():
    network = randomize(residual())
    x = images(network)
    before, config = network(x).numpy(), network.get_config()
    front, head = topology.split(network, [network.get_layer("fc")])
    assert network.get_config() == config
    network.get_layer("fc").bias.assign_add([1, 0, 0, 0])
    assert np.allclose(head(front(x)) - before, [[1, 0, 0, 0]] * 3, atol=1e-5)
    assert [x.shape for x in front.outputs] == [(None, 4)]
    clone = keras.models.clone_model(network)
    assert [weight.path for weight in clone.weights] == [weight.path for weight in network.weights]


def test_split_by_what_comes_after_the_output():
    network = residual()
    with pytest.raises(ValueError, match="nothing behind it"):
        topology.split(network, [])


def test_last_three_stages():
    assert [set(block) for block in topology.default_blocks(residual())] == [
        {"unit2_a", "unit2_norm", "unit2_b", "unit2_shortcut"}, {"unit3_a", "unit3_norm", "unit3_b"}, {"fc"}]
    assert topology.default_blocks(residual(depth=1))[0] == ("stem_conv", "stem_norm")
    assert topology.default_blocks(architectures.build(DATASETS["signs"])) == (("conv6",), ("full",), ("class",))
    assert topology.default_blocks(topology.flatten(classifier())) == (("a",), ("b",), ("c",))
    assert topology.default_blocks(shared()) == (("again",), ("middle",), ("end",))
    with pytest.raises(UserError, match="2 stages"):
        topology.default_blocks(topology.flatten(keras.Sequential([
            layers.Input((4, 4, 1)), layers.Conv2D(1, 2), layers.Flatten(), layers.Dense(2)])))


def test_parallel_branches_are_one_stage():
    x = first = layers.Input((8, 8, 3))
    x = layers.Conv2D(4, 1, name="a")(x)
    x = layers.Concatenate()([layers.Conv2D(2, 1, name="left")(x), layers.Conv2D(2, 1, name="right")(x)])
    network = keras.Model(first, layers.Dense(3, name="end")(layers.Flatten()(x)))
    assert topology.default_blocks(network) == (("a",), ("left", "right"), ("end",))


def test_default_feature_map():
    assert topology.default_feature_map(residual()) == "unit3"
    assert topology.default_feature_map(architectures.build(DATASETS["mnist"])) == "pool2"
    padded = keras.Sequential([layers.Input((8, 8, 1)), layers.Conv2D(2, 3, name="real"), layers.ZeroPadding2D(1),
                               layers.GlobalAveragePooling2D(), layers.Dense(2)])
    assert topology.default_feature_map(topology.flatten(padded)) == "real"
    flat = topology.flatten(keras.Sequential([layers.Input((8, 8, 1)), layers.Flatten(), layers.Dense(2)]))
    with pytest.raises(UserError, match="no layer with a spatial output"):
        topology.default_feature_map(flat)


def test_block_layers_by_name_and_prefix():
    network = residual()
    names = [layer.name for layer in topology.block_layers(network, ("unit2",))]
    assert set(names) == {"unit2_a", "unit2_norm", "unit2_b", "unit2_shortcut"}     # the ReLU `unit2` has no weights
    assert [layer.name for layer in topology.block_layers(network, ("fc", "stem_conv"))] == ["stem_conv", "fc"]
    for unknown in ("unit", "Unit2", "fc_1", ""):
        with pytest.raises(KeyError):
            topology.block_layers(network, (unknown,))


@pytest.mark.parametrize("end", [
    lambda x: layers.Dense(4, activation="softmax")(x), lambda x: layers.Softmax()(layers.Dense(4)(x)),
    lambda x: layers.Activation("softmax")(layers.Dense(4)(x)), lambda x: ops.softmax(layers.Dense(4)(x)),
    lambda x: layers.Flatten()(layers.Reshape((1, 4))(layers.Dense(4, activation="softmax")(x))),
    lambda x: layers.Dense(4, activation=layers.Softmax())(x),
    lambda x: layers.Dense(4, activation="log_softmax")(x)])
def test_softmax_is_taken_away_exactly(end):
    x = first = layers.Input((6, 6, 3))
    network = randomize(keras.Model(first, end(layers.Flatten()(layers.Conv2D(2, 3)(x)))))
    x = 5 * images(network)
    scores = network(x).numpy()
    scores = np.exp(scores) if scores.max() < 0 else scores
    logits = topology.to_logits(network)(x).numpy()
    assert np.allclose(ops.softmax(logits), scores, atol=1e-6)
    assert not np.allclose(ops.logsumexp(logits, axis=1), 0, atol=1e-3)


@pytest.mark.parametrize("end, message", [
    (lambda x: layers.Dense(4, activation="sigmoid")(x), "ends in sigmoid"),
    (lambda x: layers.Dense(4, activation="relu")(x), "ends in relu"),
    (lambda x: layers.Activation("tanh")(layers.Dense(4)(x)), "ends in tanh"),
    (lambda x: ops.sigmoid(layers.Dense(4)(x)), "ends in sigmoid"),
    (lambda x: layers.LeakyReLU()(layers.Dense(4)(x)), "ends in LeakyReLU"),
    (lambda x: layers.Average()([layers.Dense(4, activation="softmax")(x), layers.Dense(4, activation="softmax")(x)]),
     "as in an ensemble"),
    (lambda x: layers.Dense(4, activation="softmax")(x) * 2.0, "as in an ensemble"),
    (lambda x: layers.Flatten()(layers.Softmax(axis=1)(layers.Reshape((2, 2))(layers.Dense(4)(x)))), "over axis 1")])
def test_ends_that_give_no_logits(end, message):
    first = layers.Input((6, 6, 3))
    network = keras.Model(first, end(layers.Flatten()(first)))
    with pytest.raises(UserError, match=message):
        topology.to_logits(network)


def test_flatten_renames_layers_of_the_same_name():
    network = randomize(branched(augment=False))
    flat = topology.flatten(network)
    x = images(network)
    assert np.allclose(flat(x), network(x), atol=1e-6)
    names = [layer.name for layer in flat.layers]
    assert {"conv", "block_conv", "tail_conv", "images"} <= set(names) and len(set(names)) == len(names)
