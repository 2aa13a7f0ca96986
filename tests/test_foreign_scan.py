"""Scans of models from elsewhere, from a file and clean images to a verdict, on a network that takes seconds."""

import json
from dataclasses import replace

import cv2
import h5py
import keras
import numpy as np
import pytest
from keras import layers

from models import architectures
from tests.test_examined_model import keras2_file, keras2_layer, randomize
from tests.test_pipeline import PATCH, call
from tests.test_published_checkpoint import published, write
from utils.config import UserError, run
from utils.datasets import DATASETS
from utils.examined_model import load_examined

LABELS, SIDE = 4, 12


def tiny():
    keras.utils.set_random_seed(0)
    return keras.Sequential([
        layers.Input((SIDE, SIDE, 3)), layers.Conv2D(4, 3, activation="relu", name="conv"),
        layers.MaxPooling2D(2, name="pool"), layers.Flatten(name="flat"), layers.Dense(8, activation="relu", name="full"),
        layers.Dropout(0.5, name="dropout"), layers.Dense(LABELS, activation="softmax", name="class")], name="tiny")


def clean_images(side=SIDE, channels=3, per_label=10):
    """Labels that differ in brightness, in no order."""
    random = np.random.default_rng(0)
    y = random.permutation(np.repeat(np.arange(LABELS), per_label))
    return (random.integers(0, 60, (len(y), side, side, channels)) + 60 * y[:, None, None, None]).astype(np.uint8), y


def write_clean(path, **options):
    x, y = clean_images(**options)
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = x, y
    return path


def scan(script, scene, results, **changes):
    """A stage on the tiny network in this process; every label counts as found, so that every stage has work."""
    call(script, scene, results, **{"DATASET": "custom", "MODELS": [str(scene / "tiny.keras")], "INPUT_RANGE": [0.0, 1.0],
                                    "RANDOM_THRESHOLD": 0.0, "FILTER_RANDOM_THRESHOLD": 0.0, "LABELS_AT_ONCE": 2} | changes)


def complaint(capsys, script, scene, results, **changes):
    """The one line with which a stage ends, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(lambda: scan(script, scene, results, **changes))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


def verdict(folder, name="detection"):
    return json.loads((folder / f"{name}.json").read_text())


def test_a_custom_model_gives_shape_labels_blocks_and_feature_map(scene, complete):
    examined = load_examined(scene / "tiny.keras", DATASETS["custom"], input_range=[0, 1])
    assert examined.shape == (SIDE, SIDE, 3) and examined.labels == LABELS
    assert examined.blocks == (("conv",), ("full",), ("class",)) and examined.feature_map == "pool"
    for name in ("detection", "detection_feature_space"):
        found = verdict(complete / "custom" / "tiny", name)
        assert sorted(found["infected_labels"] + found["clean_labels"]) == list(range(LABELS))
        assert found["dataset"] == "custom" and found["model"] == "tiny"
        assert all(set(row["transfer"]) == {"1", "2", "3", "12", "13", "23"} for row in found["labels"].values())


def test_legacy_h5_from_file_to_verdict(scene, complete, tmp_path):
    """The same network in Keras 2's layout: the same verdict in every digit but for the names."""
    network = keras.models.load_model(scene / "tiny.keras")
    sizes = {"conv": {"filters": 4, "kernel_size": [3, 3], "strides": [1, 1], "padding": "valid", "activation": "relu"},
             "pool": {"pool_size": [2, 2], "strides": [2, 2], "padding": "valid", "data_format": "channels_last"},
             "flat": {}, "full": {"units": 8, "activation": "relu"}, "dropout": {"rate": 0.5, "noise_shape": None},
             "class": {"units": LABELS, "activation": "softmax"}}
    sizes["conv"]["batch_input_shape"] = [None, SIDE, SIDE, 3]
    config = {"class_name": "Sequential", "config": {"name": "tiny", "layers": [
        keras2_layer(type(layer).__name__, layer.name, None, **sizes[layer.name]) for layer in network.layers]}}
    keras2_file(tmp_path / "tiny.h5", config, {
        layer.name: [(f"{layer.name}/{weight.name}:0", weight.numpy()) for weight in layer.weights]
        for layer in network.layers})
    for script in PATCH:
        scan(script, scene, tmp_path / "results", MODELS=[str(tmp_path / "tiny.h5")])
    legacy, expected = (verdict(results / "custom" / "tiny") for results in (tmp_path / "results", complete))
    assert legacy["labels"] == expected["labels"] and legacy["infected_labels"] == expected["infected_labels"]


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_arithmetic_from_file_to_verdict(scene, tmp_path, precision):
    """A sum written `x + y` is the last feature map, and arithmetic gives the logits."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((SIDE, SIDE, 3))
    x = layers.Conv2D(4, 3, 2, name="conv1")(inputs * 2.0 - 1.0)
    y = keras.ops.relu(layers.Conv2D(4, 3, padding="same", name="conv2")(x))
    x = layers.GlobalAveragePooling2D()(x + y)
    logits = layers.Dense(LABELS, name="class")(keras.ops.relu(layers.Dense(8, name="full")(x))) * 1.5
    keras.Model(inputs, logits, name="My sum").save(tmp_path / "sum.keras")
    for script in PATCH:
        scan(script, scene, tmp_path / "results", MODELS=[str(tmp_path / "sum.keras")], PRECISION=precision,
             ALLOW_LOW_ACCURACY=True)
    found = verdict(tmp_path / "results" / "custom" / "sum")
    assert sorted(found["infected_labels"] + found["clean_labels"]) == list(range(LABELS))


@pytest.mark.parametrize("name", ["conv (1)", "é", "..", "a b"])
def test_a_layer_of_a_name_that_tensorflow_does_not_compile_is_refused(scene, tmp_path, capsys, name):
    inputs = keras.Input((SIDE, SIDE, 3))
    features = layers.Flatten()(layers.Conv2D(4, 3, name="conv")(inputs))
    model = keras.Model(inputs, layers.Dense(LABELS)(layers.Dense(8)(features)))
    config = json.loads(model.to_json())
    model.save_weights(tmp_path / "named.weights.h5")
    text = json.dumps(config).replace('"conv"', json.dumps(name))
    (tmp_path / "named.json").write_text(text)
    said = complaint(capsys, "pnnir", scene, tmp_path / "results", MODELS=[str(tmp_path / "named.weights.h5")],
                     ARCHITECTURE=str(tmp_path / "named.json"))
    assert f"a layer named {name!r}" in said and "rename it" in said


def test_tensorflow_1_checkpoint_and_published_images_from_file_to_verdict(tmp_path, monkeypatch):
    row = replace(DATASETS["mnist"], shape=(SIDE, SIDE, 1), labels=LABELS,
                  network_options={"widths": ((4, 4), (4, 4)), "hidden": 8})
    monkeypatch.setitem(DATASETS, "mnist", row)
    prefix = write(tmp_path / "model" / "patch1" / "model", published(randomize(architectures.build(row))))
    x, y = clean_images(channels=1)
    for number, (image, label) in enumerate(zip(x, y)):
        path = tmp_path / "test_image" / str(label) / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image)
    for script in PATCH:
        call(script, tmp_path, tmp_path / "results", DATASET="mnist", MODELS=[str(prefix)], RANDOM_THRESHOLD=0.0,
             CLEAN_DATA=str(tmp_path / "test_image"))
    found = verdict(tmp_path / "results" / "mnist" / "patch1")
    assert sorted(found["infected_labels"] + found["clean_labels"]) == list(range(LABELS))
    assert (tmp_path / "results" / "mnist" / "patch1" / "detection.png").exists()


@pytest.mark.parametrize("changes, message", [
    ({"INPUT_RANGE": None}, "does not tell how pixels are scaled: give INPUT_RANGE"),
    ({"CLEAN_DATA": ""}, "has no images: give CLEAN_DATA"),
    ({"ARCHITECTURE": "custom"}, "ARCHITECTURE 'custom' is neither a dataset"),
    ({"MODELS": ["{scene}/open.keras"]}, "takes images of any size: choose the DATASET"),
    ({"MODELS": ["{scene}/alone.weights.h5"]}, "name the ARCHITECTURE"),
    ({"MODELS": ["{scene}/checkpoint"]}, "name the ARCHITECTURE")])
def test_a_custom_model_says_what_it_needs(scene, tmp_path, changes, message):
    if not (scene / "open.keras").exists():
        keras.Sequential([layers.Input((None, None, 3)), layers.Conv2D(2, 3), layers.GlobalMaxPooling2D(), layers.Dense(2),
                          layers.Dense(2)]).save(scene / "open.keras")
        write(scene / "checkpoint", {"class/bias": np.zeros(4, "f4")})
    if "MODELS" in changes:
        changes = {"MODELS": [changes["MODELS"][0].format(scene=scene)]}
    with pytest.raises(UserError, match=message) as caught:
        scan("pnnir", scene, tmp_path / "results", **changes)
    assert "\n" not in str(caught.value) and not (tmp_path / "results").exists()


@pytest.mark.parametrize("side", [7, 20])
def test_clean_images_are_resized_to_the_models_input(scene, tmp_path, side, capsys):
    """Brightness tells the labels apart, whatever the size: files and folders give the same share of right answers."""
    network = keras.Sequential([layers.Input((SIDE, SIDE, 3)), layers.Conv2D(1, 1, name="a"),
                                layers.GlobalAveragePooling2D(), layers.Dense(1, name="b"),
                                layers.Dense(LABELS, name="c")])
    x, y = clean_images(side)
    # The score of label k for brightness b is 2·k·b - k², largest for the k nearest to b.
    network.get_layer("a").set_weights([np.full((1, 1, 3, 1), 1 / 3), np.zeros(1)])
    network.get_layer("b").set_weights([np.full((1, 1), 255 / 60), np.full(1, -0.5)])
    network.get_layer("c").set_weights([2 * np.arange(LABELS)[None], -np.arange(LABELS) ** 2])
    network.save(tmp_path / "bright.keras")
    write_clean(tmp_path / "clean.h5", side=side)
    for number, (image, label) in enumerate(zip(x, y)):
        path = tmp_path / "folder" / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image)
    for data in ("clean.h5", "folder"):
        with pytest.raises(UserError, match="run pnnir.py first"):
            scan(PATCH[1], scene, tmp_path, MODELS=[str(tmp_path / "bright.keras")], CLEAN_DATA=str(tmp_path / data),
                 ALLOW_LOW_ACCURACY=False)
        assert "clean accuracy 100.0% on 8 images; 32 images to tune on" in capsys.readouterr().out
