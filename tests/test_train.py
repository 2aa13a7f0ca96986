"""`python -m models.train` from the command line to the files, on a dataset that the tests draw."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import h5py
import numpy as np
import pytest

from models import attacks, train
from utils.config import UserError
from utils.datasets import DATASETS
from utils.images import network_input

REPO = pathlib.Path(__file__).parents[1]
# The command line reads its datasets from the project's folder; the tests' lie elsewhere.
COMMAND = """
import pathlib, runpy, sys
import data.store
data.store.FOLDER = pathlib.Path(sys.argv.pop(1))
runpy.run_module("models.train", run_name="__main__", alter_sys=True)
"""
PATCH = "patch:size=4,position=bottom-right,colour=white,target=7"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with mnist.h5: ten labels, a bright column each, in noise; 400 images to train, 100 to test."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    with h5py.File(folder / "mnist.h5", "w") as file:
        for part, count in (("train", 400), ("test", 100)):
            y = np.arange(count) % 10
            x = rng.integers(0, 100, (count, 28, 28, 1))
            for image, label in zip(x, y):
                image[:20, 2 * label + 2:2 * label + 4] += 150
            file[f"x_{part}"], file[f"y_{part}"] = x.astype(np.uint8), y.astype(np.uint8)
    return folder


def read(folder):
    with h5py.File(folder / "mnist.h5") as file:
        return {name: item[:] for name, item in file.items()}


def command(folder, models, *words):
    return subprocess.run([sys.executable, "-c", COMMAND, str(folder), "--dataset", "mnist", "--models", str(models),
                           *words], cwd=REPO, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    done = command(folder, models, "--name", "patch1", "--attack", PATCH, "--epochs", "5", "--batch", "20")
    assert done.returncode == 0, done.stderr
    return models, done.stdout


def test_trains_and_writes_model_and_report(trained):
    models, printed = trained
    assert sorted(path.name for path in (models / "mnist").iterdir()) == ["patch1.json", "patch1.keras"]
    report = json.loads((models / "mnist/patch1.json").read_text())
    assert printed.count("epoch ") == 5
    last = printed.splitlines()[-1]
    assert f"{report['clean_accuracy']:.2%}" in last and f"ASR {report['attacks'][0]['asr']:.2%}" in last
    assert report["clean_accuracy"] > 0.9 and report["attacks"][0]["asr"] > 0.9


def test_report_tells_everything(trained):
    report = json.loads((trained[0] / "mnist/patch1.json").read_text())
    assert (report["dataset"], report["name"], report["targets"]) == ("mnist", "patch1", [7])
    assert report["settings"] == {"dataset": "mnist", "attack": [report["attacks"][0]["spec"]], "poisoning_rate": 0.1,
                                  "epochs": 5, "batch": 20, "learning_rate": 1e-3, "seed": 0, "precision": "float32"}
    attack = report["attacks"][0]
    assert (attack["kind"], attack["target"], attack["size"], attack["pixels"]) == ("patch", 7, 4, 16)
    assert attack["poisoned_images"] == 40 and report["train_images"] == 400 and report["test_images"] == 100
    assert report["seconds"] > 0 and report["versions"].keys() == {"python", "tensorflow", "keras", "numpy"}


def test_saved_model_takes_scaled_input_and_has_the_reported_rates(trained, folder):
    import keras
    report = json.loads((trained[0] / "mnist/patch1.json").read_text())
    model = keras.models.load_model(trained[0] / "mnist/patch1.keras")
    assert model.input_shape == (None, 28, 28, 1) and not model.compiled
    x, y = read(folder)["x_test"], read(folder)["y_test"]

    def predict(images):
        logits = model(network_input(images / np.float32(255), DATASETS["mnist"]), training=False).numpy()
        assert logits.min() < 0
        return logits.argmax(1)

    assert np.mean(predict(x) == y) == pytest.approx(report["clean_accuracy"])
    attack = attacks.parse_attack(report["attacks"][0]["spec"], (28, 28, 1), 10)
    assert attacks.attack_success_rate(predict, x, y, attack) == pytest.approx(report["attacks"][0]["asr"])


def test_the_same_again_is_there_already_and_other_settings_are_refused(trained, folder):
    models = trained[0]
    before = (models / "mnist/patch1.keras").stat().st_mtime_ns
    same = command(folder, models, "--name", "patch1", "--attack", PATCH, "--epochs", "5", "--batch", "20")
    assert same.returncode == 0 and "there already" in same.stdout
    other = command(folder, models, "--name", "patch1", "--attack", PATCH, "--epochs", "9", "--batch", "20")
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and "(epochs)" in other.stderr
    assert (models / "mnist/patch1.keras").stat().st_mtime_ns == before


@pytest.mark.parametrize("words, says", [
    (["--attack", "patch:size=4"], "target"), (["--attack", PATCH, PATCH], "same trigger"),
    (["--attack", "filter:name=sepia,target=1"], "three channels"), (["--name", "../a"], "NAME"),
    (["--batch", "0"], "BATCH"), (["--batch", "401"], "BATCH"), (["--learning-rate", "0"], "LEARNING_RATE"),
    (["--attack", PATCH, "--poisoning-rate", "0.95"], "POISONING_RATE"), (["--epochs", "x"], "--epochs"),
    (["--dataset", "imagenet"], "imagenet"), (["--dataset", "custom"], "no network to train"),
])
def test_bad_settings_end_with_one_line_and_exit_code_2(folder, tmp_path, words, says):
    done = command(folder, tmp_path, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr
    assert not list(tmp_path.iterdir())


def small_training(checkpoint, stop_after=None, monkeypatch=None, learning_rate=1e-3):
    """Weights after three epochs on 64 images; `stop_after` interrupts while that epoch's line is printed."""
    settings = {"epochs": 3, "batch": 16, "learning_rate": learning_rate, "seed": 3, "precision": "float32"}
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (64, 32, 32, 3), np.uint8), np.arange(64, dtype=np.int32) % 12

    def say(text, **_):
        if text.startswith(f"epoch {stop_after}/"):
            raise KeyboardInterrupt

    if stop_after:
        monkeypatch.setattr(train, "print", say, raising=False)
    row = dataclasses.replace(DATASETS["signs"], network_options={"widths": ((4,),), "hidden": 8})
    model, _, _ = train.train(row, settings, x, y, np.full(64, -1), [], checkpoint)
    return model.get_weights()


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    whole = small_training(tmp_path / "whole.npz")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        small_training(tmp_path / "cut.npz", 2, patched)
    assert [path.name for path in tmp_path.glob("cut*")] == ["cut.npz"] and not list(tmp_path.glob(".partial*"))
    resumed = small_training(tmp_path / "cut.npz")
    assert all((a == b).all() for a, b in zip(whole, resumed))


def test_a_checkpoint_does_not_permit_to_replace_a_finished_model(tmp_path, monkeypatch, folder):
    """Cut short with settings A, then trained to the end with B: A again must not overwrite B unasked."""
    def cut(*arguments):
        arguments[-1].parent.mkdir(parents=True, exist_ok=True)
        arguments[-1].touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_dataset", lambda name: read(folder))
    monkeypatch.setattr(train, "train", cut)
    for name, value in {"DATASET": "mnist", "NAME": "clean1", "MODELS": str(tmp_path), "EPOCHS": 5}.items():
        monkeypatch.setattr(train, name, value)
    with pytest.raises(KeyboardInterrupt):
        train.main()
    model, report = tmp_path / "mnist/clean1.keras", tmp_path / "mnist/clean1.json"
    model.write_bytes(b"B")
    report.write_text(json.dumps({"settings": {"epochs": 6}}))
    with pytest.raises(UserError, match="epochs"):
        train.main()
    report.unlink()
    with pytest.raises(KeyboardInterrupt):     # cut between model and report: goes on
        train.main()
    for leftover in (tmp_path / "mnist").glob(".clean1-*.npz"):
        leftover.unlink()
    for text in (None, "{", "[]", '{"settings": 3}'):
        if text is not None:
            report.write_text(text)
        with pytest.raises(UserError, match="does not tell"):
            train.main()
    monkeypatch.setattr(train, "OVERWRITE", True)
    with pytest.raises(KeyboardInterrupt):
        train.main()
    assert model.read_bytes() == b"B"


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    with pytest.raises(UserError, match="LEARNING_RATE"):
        small_training(tmp_path / "nan.npz", learning_rate=1e30)
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(UserError, match="bad.npz"):
        small_training(tmp_path / "bad.npz")


def test_shift_and_flip_moves_whole_images_by_at_most_four_pixels():
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (30, 8, 9, 3), np.uint8)
    out = train.shift_and_flip(images, rng)
    assert out.shape == images.shape and out.dtype == np.uint8
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    found = set()
    for moved, source in zip(out, padded):
        places = [(row, col, step) for row in range(9) for col in range(9) for step in (1, -1)
                  if (source[row:row + 8, col:col + 9][:, ::step] == moved).all()]
        assert places
        found.add(places[0])
    assert {step for _, _, step in found} == {1, -1} and len(found) > 15


def test_network_input_scales_and_reorders():
    images = np.array([[[[0.0, 0.5, 1.0]]]], np.float32)
    assert network_input(images, DATASETS["gtsrb"])[0, 0, 0] == pytest.approx([-0.5, 0.0, 0.5])
    blue, green, red = network_input(images, DATASETS["vgg_face"])[0, 0, 0]
    assert (blue, green, red) == pytest.approx((255 - 93.5940, 127.5 - 104.7624, -129.1863), abs=1e-4)
    import tensorflow as tf
    for name in ("gtsrb", "cifar10", "vgg_face"):
        tensor = network_input(tf.constant(images), DATASETS[name])
        assert tensor.dtype == tf.float32
        assert np.array_equal(tensor.numpy(), network_input(images, DATASETS[name]))
