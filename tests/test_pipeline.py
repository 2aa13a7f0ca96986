"""The six scripts in order on a small model: what they write, that they repeat, go on, and refuse bad input."""

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest

from data import signs
from models.architectures import build
from utils import pictures
from utils.config import UserError, read_constants
from utils.datasets import dataset

ROOT = pathlib.Path(__file__).parent.parent
PATCH = ("pnnir", "potential_triggers_reconstruction", "critical_features_preservation", "backdoor_detection")
FEATURE = ("pnnir", "potential_triggers_reconstruction_feature_space", "backdoor_detection_feature_space")
SCRIPTS = PATCH + FEATURE[1:]
QUICK = {"PHASE1_STEPS": [2, 2, 2], "PHASE2_STEPS": [3, 3, 3], "STEPS": 6, "FILTER_STEPS": 4, "FILTER_RESTARTS": 1,
         "RANDOM_THRESHOLD": 0.05, "FILTER_RANDOM_THRESHOLD": 0.05, "BATCH": 8, "MEASURED_IMAGES": 20,
         "ALLOW_LOW_ACCURACY": True}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """An untrained network of `signs` and a few clean images: the machinery needs no more."""
    folder = tmp_path_factory.mktemp("inputs")
    keras.utils.set_random_seed(0)
    build(dataset("signs")).save(folder / "small.keras")
    arrays = signs.generate(seed=3, train_per_label=1, test_per_label=8)
    with h5py.File(folder / "clean.h5", "w") as file:
        file["x"], file["y"] = arrays["x_test"], arrays["y_test"]
    return folder


def call(script, inputs, results, **changes):
    """Run a script's main in this process with its constants changed."""
    module = importlib.import_module(script)
    constants = {"DATASET": "signs", "MODELS": [str(inputs / "small.keras")], "CLEAN_DATA": str(inputs / "clean.h5"),
                 "RESULTS": str(results)} | QUICK | changes
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            if hasattr(module, name):
                patch.setattr(module, name, value)
        module.main()


@pytest.fixture(scope="module")
def scanned(inputs, tmp_path_factory):
    """The results of a whole patch scan: folder RESULTS."""
    results = tmp_path_factory.mktemp("scanned")
    for script in PATCH:
        call(script, inputs, results)
    return results


def tuned_only(scanned, results):
    """A results folder in which only the first stage was run."""
    (results / "signs" / "small").mkdir(parents=True)
    shutil.copy(scanned / "signs" / "small" / "pnnir.h5", results / "signs" / "small")
    return results


def verdict(results, name="detection"):
    return json.loads((results / "signs" / "small" / f"{name}.json").read_text())


def test_patch_pipeline_writes_its_artifacts(scanned):
    found = verdict(scanned)
    assert sorted(found["infected_labels"] + found["clean_labels"]) == list(range(12))
    assert found["backdoored"] == bool(found["infected_labels"])
    assert set(found["fingerprints"]) == {"model", "clean_data", "pnnir", "potential_triggers", "preserved_triggers"}
    for row in found["labels"].values():
        assert 0 <= row["asr"] <= 1 and 0 < row["mask_size"] < 1
        assert set(row["transfer"]) == ({"1", "2", "3", "12", "13", "23"} if row["asr"] >= 0.05 else set())
    assert any(row["transfer"] for row in found["labels"].values())
    made = {path.name for path in (scanned / "signs" / "small").iterdir() if not path.name.startswith(".")}
    assert made == {"pnnir.h5", "potential_triggers.h5", "potential_triggers.png", "preserved_triggers.h5",
                    "preserved_triggers.png", "detection.h5", "detection.json", "detection.png"}


def test_the_same_seed_repeats_the_verdict_in_every_digit(inputs, scanned, tmp_path, capsys):
    for script in PATCH:
        call(script, inputs, tmp_path)
    assert verdict(tmp_path) == verdict(scanned)
    assert "verdict: signs/small" in capsys.readouterr().out.splitlines()[-2]


def test_feature_space_pipeline_writes_its_artifacts(inputs, scanned, tmp_path):
    tuned_only(scanned, tmp_path)
    for script in FEATURE[1:]:
        call(script, inputs, tmp_path)
    found = verdict(tmp_path, "detection_feature_space")
    assert len(found["labels"]) == 12 and "mask_size" not in found["labels"]["0"]
    with h5py.File(tmp_path / "signs" / "small" / "potential_triggers_feature_space.h5") as file:
        assert file["matrix"].shape == (12, 3, 3) and file["matrix"].dtype == np.float32
        assert file["matrix"][()].sum(axis=2).max() <= 1 + 1e-5


def test_chunks_of_labels_do_not_change_the_result(inputs, scanned, tmp_path):
    tuned_only(scanned, tmp_path)
    call(PATCH[1], inputs, tmp_path, LABELS_AT_ONCE=5)
    found = []
    for results in (tmp_path, scanned):
        with h5py.File(results / "signs" / "small" / "potential_triggers.h5") as file:
            found.append(file["mask"][()])
    # Adam takes whole steps along gradients that are all rounding, at a few pixels.
    assert np.mean(abs(found[0] - found[1]) > 2e-3) < 1e-3
    assert np.max(abs(found[0] - found[1])) < 0.05


def test_pictures_of_images_that_are_hardly_higher_than_nothing():
    strip = np.zeros((2, 1, 900), np.float32)
    found = {"mask": strip, "pattern": np.zeros((2, 1, 900, 3), np.float32)}
    for sheet in (pictures.trigger_sheet(found | {"asr": np.ones(2)}), pictures.heat_sheet(found | {
            "heat": strip, "threshold": np.ones(2)})):
        assert sheet.ndim == 3 and sheet.shape[0] > 20


def test_a_stage_before_the_one_it_needs_says_which_to_run(inputs, tmp_path):
    with pytest.raises(UserError, match="pnnir.h5 is missing: run pnnir.py first"):
        call("potential_triggers_reconstruction", inputs, tmp_path)


def test_a_model_that_hardly_classifies_the_clean_data_stops_before_the_work(inputs, tmp_path):
    with pytest.raises(UserError, match="check INPUT_RANGE, INPUT_MEAN, CHANNEL_ORDER"):
        call("pnnir", inputs, tmp_path, ALLOW_LOW_ACCURACY=False)


def test_feature_space_of_one_channel_images_is_refused(tmp_path):
    build(dataset("mnist")).save(tmp_path / "small.keras")
    with h5py.File(tmp_path / "clean.h5", "w") as file:
        file["x"], file["y"] = np.zeros((30, 28, 28, 1), np.uint8), np.arange(30) % 10
    with pytest.raises(UserError, match="one-channel images"):
        call("potential_triggers_reconstruction_feature_space", tmp_path, tmp_path, DATASET="mnist")


@pytest.mark.parametrize("arguments, said", [
    (["--models", "absent"], "absent"), (["--dataset", "nowhere"], "nowhere"), (["--seed", "x"], "--seed"),
    (["--settings", "best"], "best"), (["--nonsense", "1"], "--nonsense")])
def test_bad_input_ends_in_one_line_and_exit_code_2(arguments, said, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "pnnir.py", "--results", tmp_path, *arguments], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and said in done.stderr
    assert not list(tmp_path.iterdir())


def test_shared_constants_mean_the_same_in_every_script():
    constants = {script: read_constants((ROOT / f"{script}.py").read_text()) for script in SCRIPTS}
    shared = list(constants["pnnir"])[:15]
    assert {"DATASET", "MODELS", "CLEAN_DATA", "RESULTS", "SEED", "SETTINGS", "PRECISION"} <= set(shared)
    defaults = {script: {name: getattr(importlib.import_module(script), name) for name in shared} for script in SCRIPTS}
    for script in SCRIPTS:
        assert [constants[script][name] for name in shared] == [constants["pnnir"][name] for name in shared]
        assert defaults[script] == defaults["pnnir"]
        assert all(comment for _, _, comment in constants[script].values())


def test_help_lists_every_constant_and_answers_without_tensorflow():
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    for script in SCRIPTS:
        done = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True,
                              env=environment, timeout=60)
        assert done.returncode == 0 and "tensorflow" not in done.stderr
        for name in read_constants((ROOT / f"{script}.py").read_text()):
            assert "--" + name.lower().replace("_", "-") in done.stdout
