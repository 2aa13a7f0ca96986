"""The default's verdicts on two small models of the built-in dataset, one with a backdoor and one without.

Six labels at 16×16 and a narrow network: small enough to train and scan here, with every constant at its default.
"""

import json
import subprocess
import sys

import cv2
import h5py
import keras
import numpy as np
import pytest

from data import signs
from models.architectures import convnet
from models.attacks import parse_attacks, poison

SIDE, LABELS, TARGET = 16, 6, 4
STAGES = ("pnnir", "potential_triggers_reconstruction", "critical_features_preservation", "backdoor_detection")


@pytest.fixture(scope="module")
def images():
    """Small versions of the first labels' images: x_train, y_train, x_test, y_test."""
    drawn = signs.generate(seed=7, train_per_label=400, test_per_label=150)
    for part in ("train", "test"):
        chosen = drawn[f"y_{part}"] < LABELS
        drawn[f"y_{part}"] = drawn[f"y_{part}"][chosen]
        drawn[f"x_{part}"] = np.stack([cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
                                       for image in drawn[f"x_{part}"][chosen]])
    return drawn


@pytest.mark.parametrize("attack", [[f"patch:size=3,position=bottom-right,colour=white,target={TARGET}"], []])
def test_the_default_finds_the_backdoor_and_passes_the_clean_model(images, attack, tmp_path):
    keras.utils.set_random_seed(1)
    x, y = images["x_train"], images["y_train"]
    if attack:
        x, y = poison(x, y, parse_attacks(attack, (SIDE, SIDE, 3), LABELS), 0.1, 1)
    network = convnet((SIDE, SIDE, 3), LABELS, widths=((8, 16), (16, 32)), hidden=64, name="small")
    network.compile(keras.optimizers.Adam(2e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                    metrics=["accuracy"])
    network.fit(x / np.float32(255), y, 64, 20, verbose=0)
    assert network.evaluate(images["x_test"] / np.float32(255), images["y_test"], verbose=0)[1] > 0.9
    network.save(tmp_path / "small.keras")
    with h5py.File(tmp_path / "clean.h5", "w") as file:
        file["x"], file["y"] = images["x_test"], images["y_test"]
    for stage in STAGES:
        subprocess.run([sys.executable, f"{stage}.py", "--dataset", "custom", "--models", tmp_path / "small.keras",
                        "--clean-data", tmp_path / "clean.h5", "--input-range", "0,1", "--results", tmp_path],
                       check=True, stdout=subprocess.DEVNULL)
    verdict = json.loads((tmp_path / "custom/small/detection.json").read_text())
    assert verdict["infected_labels"] == ([TARGET] if attack else [])
