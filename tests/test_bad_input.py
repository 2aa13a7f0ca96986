"""What a person gets wrong, for each stage, constant and file: one clear line, exit code 2, nothing written."""

import shutil
import subprocess
import sys

import cv2
import h5py
import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import from_folder
from tests.test_foreign_scan import LABELS, SIDE, clean_images, complaint, scan, tiny
from tests.test_hostile_files import bytecode, described, save
from tests.test_interruption import MADE, SCRIPTS, before
from tests.test_pipeline import FEATURE, PATCH, ROOT
from utils import artifacts
from utils.config import UserError
from utils.datasets import DATASETS
from utils.examined_model import load_examined

PNNIR, RECONSTRUCTION, PRESERVATION, DETECTION = PATCH
FILTERS, FILTER_DETECTION = FEATURE[1:]


def files_in(folder):
    return {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.fixture
def results(complete, tmp_path):
    """A copy of a complete scan's artifacts."""
    shutil.copytree(complete, tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize("script, changes, said", [
    (PNNIR, {"BATCH": 0}, "BATCH 0 must be a number from 1"),
    (PNNIR, {"BATCH": -8}, "BATCH -8"),
    (PNNIR, {"BATCH": "8"}, "BATCH '8'"),
    (PNNIR, {"PHASE1_STEPS": [1, 2]}, "PHASE1_STEPS [1, 2] must be three numbers"),
    (PNNIR, {"PHASE2_STEPS": [1, 2, -3]}, "PHASE2_STEPS -3"),
    (PNNIR, {"PHASE2_STEPS": 100}, "PHASE2_STEPS 100 must be three numbers"),
    (PNNIR, {"LEARNING_RATE": 0.0}, "LEARNING_RATE 0.0"),
    (PNNIR, {"LEARNING_RATE": float("nan")}, "LEARNING_RATE nan"),
    (PNNIR, {"SEED": 2**32}, "SEED 4294967296"),
    (PNNIR, {"CLEAN_PER_LABEL": 1}, "CLEAN_PER_LABEL 1 must be a number from 2"),
    (PNNIR, {"CLEAN_PER_LABEL": 0}, "CLEAN_PER_LABEL 0"),
    (PNNIR, {"DATASET": "customs"}, "DATASET 'customs' is not in utils/datasets.py: choose from signs"),
    (PNNIR, {"PRECISION": "float16"}, "PRECISION 'float16' is not known: choose from float32, mixed_bfloat16"),
    (PNNIR, {"SETTINGS": "best"}, "SETTINGS 'best' is not a named setting: choose from default, paper"),
    (PNNIR, {"MODELS": []}, "MODELS [] is no list of models"),
    (PNNIR, {"MODELS": "tiny.keras"}, "MODELS 'tiny.keras' is no list of models"),
    (PNNIR, {"MODELS": [""]}, "MODEL is empty"),
    (PNNIR, {"MODELS": ["/absent/tiny.keras"]}, "MODEL '/absent/tiny.keras' is not there: give a path"),
    (PNNIR, {"ARCHITECTURE": "resnet"}, "ARCHITECTURE 'resnet' is neither a dataset"),
    (PNNIR, {"INPUT_RANGE": [1.0, 0.0]}, "INPUT_RANGE [1.0, 0.0] is not a lower and an upper end"),
    (PNNIR, {"INPUT_RANGE": [1.0]}, "INPUT_RANGE [1.0]"),
    (PNNIR, {"INPUT_MEAN": [1.0, 2.0]}, "INPUT_MEAN [1.0, 2.0] is not one number or 3"),
    (PNNIR, {"CHANNEL_ORDER": "grb"}, "CHANNEL_ORDER 'grb' is neither rgb nor bgr"),
    (PNNIR, {"BLOCKS": ["conv", "full"]}, "BLOCKS ['conv', 'full'] names 2 blocks"),
    (PNNIR, {"BLOCKS": ["conv", "full", "end"]}, "no layer with weights is called 'end'; there are conv, full, class"),
    (PNNIR, {"FEATURE_MAP": "full"}, "FEATURE_MAP 'full' is no layer with a spatial output; there are"),
    (PNNIR, {"ALLOW_LOW_ACCURACY": False, "INPUT_RANGE": [0.0, 1.0]}, "check INPUT_RANGE, INPUT_MEAN, CHANNEL_ORDER"),
    (RECONSTRUCTION, {"STEPS": 0}, "STEPS 0"),
    (RECONSTRUCTION, {"TRIGGER_RATE": 0.0}, "TRIGGER_RATE 0.0"),
    (RECONSTRUCTION, {"NOISE_WEIGHT": -1.0}, "NOISE_WEIGHT -1.0"),
    (RECONSTRUCTION, {"CLEAN_MASS": -1.0}, "CLEAN_MASS -1.0"),
    (RECONSTRUCTION, {"PIXEL_PRICE": -0.04}, "PIXEL_PRICE -0.04"),
    (RECONSTRUCTION, {"IMAGES_PER_LABEL": 0}, "IMAGES_PER_LABEL 0"),
    (RECONSTRUCTION, {"RANDOM_THRESHOLD": 60.0}, "RANDOM_THRESHOLD 60.0 must be a number from 0 to 1"),
    (RECONSTRUCTION, {"LABELS_AT_ONCE": 0}, "LABELS_AT_ONCE 0"),
    (PRESERVATION, {"KEPT_ASR": 95.0}, "KEPT_ASR 95.0 must be a number from 0 to 1"),
    (PRESERVATION, {"MEASURED_IMAGES": 0}, "MEASURED_IMAGES 0"),
    (DETECTION, {"TRANSFER_THRESHOLD": 20.0}, "TRANSFER_THRESHOLD 20.0"),
    (DETECTION, {"TRANSFERS_NEEDED": 7}, "TRANSFERS_NEEDED 7 must be a number from 1 to 6"),
    (DETECTION, {"EVIDENCE": 0.0}, "EVIDENCE 0.0"),
    (FILTERS, {"FILTER_STEPS": 0}, "FILTER_STEPS 0"),
    (FILTERS, {"FILTER_RATE": -0.1}, "FILTER_RATE -0.1"),
    (FILTERS, {"FILTER_RESTARTS": -1}, "FILTER_RESTARTS -1 must be a number from 0"),
    (FILTER_DETECTION, {"FILTER_RANDOM_THRESHOLD": 2.0}, "FILTER_RANDOM_THRESHOLD 2.0 must be a number from 0 to 1"),
    (PNNIR, {"PHASE2_PEAK": -0.01}, "PHASE2_PEAK -0.01 must be a number from 0"),
    (PNNIR, {"DISTILLATION": -1.0}, "DISTILLATION -1.0 must be a number from 0"),
    (PNNIR, {"PROBES": -1}, "PROBES -1 must be a number from 0"),
    (FILTER_DETECTION, {"FILTER_EVIDENCE": -1.0}, "FILTER_EVIDENCE -1.0"),
    (FILTER_DETECTION, {"FILTER_TRANSFER_THRESHOLD": -0.2}, "FILTER_TRANSFER_THRESHOLD -0.2")])
def test_constants(script, changes, said, scene, tmp_path, capsys):
    assert said in complaint(capsys, script, scene, tmp_path / "results", **changes)
    assert not (tmp_path / "results").exists()


def clean_data(change):
    """A function that writes the clean data with `change(x, y)` in place of x and y."""
    def write(path):
        with h5py.File(path, "w") as file:
            for name, array in change(*clean_images()).items():
                file[name] = array
    return write


def folder_of_texts(path):
    for label in "012":
        (path / label).mkdir(parents=True)
        (path / label / "note.txt").write_text("no image")


CLEAN = {
    "does not exist: check the path": lambda path: None,
    "has no sub-folders": lambda path: path.mkdir(),
    "holds no image that OpenCV reads": folder_of_texts,
    "is not an HDF5 file": lambda path: path.write_text("images"),
    "is not an HDF5 file: ": lambda path: path.write_bytes(b""),
    "has no 'x': it holds nothing": clean_data(lambda x, y: {}),
    "has no 'x': it holds images, labels": clean_data(lambda x, y: {"images": x, "labels": y}),
    "has no 'y': it holds x,": clean_data(lambda x, y: {"x": x}),
    "not uint8 N×H×W×C from 0 to 255, C 1 (gray) or 3 (RGB): convert it (if its values are 0 to 1, multiply":
        clean_data(lambda x, y: {"x": (x / 255).astype("f4"), "y": y}),
    "reshape it, the channels come last": clean_data(lambda x, y: {"x": x.transpose(0, 3, 1, 2), "y": y}),
    "have 1 channels and the model takes 3": clean_data(lambda x, y: {"x": x[..., :1], "y": y}),
    "store one class number per image, not one-hot rows": clean_data(lambda x, y: {"x": x, "y": np.eye(4, dtype=int)[y]}),
    "a label is the number of its class": clean_data(lambda x, y: {"x": x, "y": y.astype("f4")}),
    "labels in {path} run from 1 to 4 and the model has 4 labels, counted from 0: renumber": clean_data(
        lambda x, y: {"x": x, "y": y + 1}),
    "holds the label -1: labels are class numbers from 0 up": clean_data(lambda x, y: {"x": x, "y": y - 1}),
    "fewer than 2 images of label 2: every label": clean_data(lambda x, y: {"x": x[y != 2], "y": y[y != 2]}),
    "fewer than 2 images of label 0, 1, 2, 3": clean_data(lambda x, y: {"x": x[[0]], "y": y[[0]]}),
    "'x' has 40 images but 'y' 39 labels": clean_data(lambda x, y: {"x": x, "y": y[1:]}),
    "it is empty, store at least one image": clean_data(lambda x, y: {"x": x[:0], "y": y[:0]})}


@pytest.mark.parametrize("said", CLEAN)
def test_clean_data(said, scene, tmp_path, capsys):
    CLEAN[said](tmp_path / "data")
    line = complaint(capsys, PNNIR, scene, tmp_path / "results", CLEAN_DATA=str(tmp_path / "data"))
    assert said.format(path=tmp_path / "data") in line and str(tmp_path / "data") in line
    assert not (tmp_path / "results").exists()


def test_fewer_clean_images_than_a_batch_are_enough(scene, tmp_path):
    """Batches are drawn with replacement: two images of each label do, one to tune on and one to measure with."""
    scan(PNNIR, scene, tmp_path, BATCH=50, CLEAN_PER_LABEL=2)
    with h5py.File(tmp_path / "custom" / "tiny" / "pnnir.h5") as file:
        assert all(0 <= file[subset]["accuracy"][()] <= 1 for subset in ("1", "123"))


def test_weights_that_are_no_numbers(scene, tmp_path, capsys):
    network = tiny()
    network.get_layer("full").bias.assign([0, np.nan] * 4)
    network.save(tmp_path / "tiny.keras")
    assert "full/bias is missing, NaN or infinite" in complaint(capsys, PNNIR, scene, tmp_path / "results",
                                                                MODELS=[str(tmp_path / "tiny.keras")])


NEEDED = {RECONSTRUCTION: PNNIR, PRESERVATION: RECONSTRUCTION, DETECTION: PNNIR, FILTERS: PNNIR, FILTER_DETECTION: PNNIR}


@pytest.mark.parametrize("script", NEEDED)
def test_a_stage_before_the_one_it_needs(script, scene, tmp_path, capsys):
    line = complaint(capsys, script, scene, tmp_path)
    assert f"{MADE[NEEDED[script]]}.h5 is missing: run {NEEDED[script]}.py first, with the same DATASET" in line
    assert not files_in(tmp_path)


@pytest.mark.parametrize("script, missing", [(DETECTION, RECONSTRUCTION), (DETECTION, PRESERVATION),
                                             (FILTER_DETECTION, FILTERS)])
def test_a_stage_between_that_was_left_out(script, missing, scene, results, capsys):
    (results / "custom" / "tiny" / f"{MADE[missing]}.h5").unlink()
    assert f"{MADE[missing]}.h5 is missing: run {missing}.py first" in complaint(capsys, script, scene, results)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("what, changes", [
    ("model", {"MODELS": ["{folder}/tiny.keras"]}), ("clean_data", {"CLEAN_PER_LABEL": 5}), ("seed", {"SEED": 1}),
    ("precision", {"PRECISION": "mixed_bfloat16"}), ("named_setting", {"SETTINGS": "paper"}),
    ("input_scaling", {"INPUT_RANGE": [-1.0, 1.0]})])
def test_artifacts_of_another_input(script, what, changes, scene, results, tmp_path, capsys):
    if what == "model":
        other = tiny()
        other.get_layer("class").bias.assign(np.ones(LABELS))
        other.save(tmp_path / "tiny.keras")
        changes = {"MODELS": [str(tmp_path / "tiny.keras")]}
    there = {path: path.read_bytes() for path in files_in(results)}
    line = complaint(capsys, script, scene, results, **changes)
    # A seed also decides which clean images are kept for measuring.
    named = ("clean_data", "seed") if what == "seed" else (what,)
    assert any((f"other settings ({name} was" if script == PNNIR else f"another {name.replace('_', ' ')}: run") in line
               for name in named) and "--overwrite" in line
    assert there == {path: path.read_bytes() for path in files_in(results)}


@pytest.mark.parametrize("script, changes, said", [
    (PNNIR, {"BATCH": 9}, "batch was 8, is 9"),
    (PNNIR, {"BLOCKS": ["conv", "full", "full+class"]}, "blocks was"),
    (RECONSTRUCTION, {"STEPS": 7}, "steps was 6, is 7"),
    (PRESERVATION, {"KEPT_ASR": 0.5}, "kept_asr was 0.95, is 0.5"),
    (PRESERVATION, {"FEATURE_MAP": "conv"}, 'feature_map was "pool", is "conv"'),
    (DETECTION, {"EVIDENCE": 9.0}, "evidence was 6.0, is 9.0"),
    (FILTERS, {"FILTER_STEPS": 5}, "filter_steps was 4, is 5"),
    (FILTER_DETECTION, {"FILTER_TRANSFER_THRESHOLD": 0.4}, "filter_transfer_threshold was 0.2, is 0.4")])
def test_artifacts_of_other_settings(script, changes, said, scene, results, capsys):
    there = {path: path.read_bytes() for path in files_in(results)}
    line = complaint(capsys, script, scene, results, **changes)
    assert f"{MADE[script]}.h5 was made with other settings" in line and said in line and "add --overwrite" in line
    assert there == {path: path.read_bytes() for path in files_in(results)}


def test_an_artifact_made_anew_makes_those_after_it_stale(scene, results, capsys):
    (results / "custom" / "tiny" / "preserved_triggers.h5").unlink()
    scan(PRESERVATION, scene, results, KEPT_ASR=0.5)
    assert "other settings (preserved_triggers was" in complaint(capsys, DETECTION, scene, results)


def test_an_artifact_made_anew_takes_the_verdict_on_the_one_before_away(scene, results, capsys):
    complaint(capsys, PRESERVATION, scene, results, KEPT_ASR=0.5)
    verdict = results / "custom" / "tiny" / "detection.json"
    assert verdict.exists()
    scan(PRESERVATION, scene, results, KEPT_ASR=0.5, OVERWRITE=True)        # the refusal before keeps no lock
    assert not verdict.exists()
    scan(DETECTION, scene, results)                                         # with nothing to overwrite
    assert verdict.exists()


def test_artifacts_of_tuned_models_that_were_made_anew_are_not_mixed(scene, results, capsys):
    scan(PNNIR, scene, results, BATCH=9, OVERWRITE=True)
    for script, made, by in ((DETECTION, "potential_triggers.h5", RECONSTRUCTION),
                             (FILTER_DETECTION, "potential_triggers_feature_space.h5", FILTERS)):
        line = complaint(capsys, script, scene, results)
        assert f"{made} was made from another pnnir: run {by}.py again with --overwrite" in line
    scan(RECONSTRUCTION, scene, results, OVERWRITE=True)
    line = complaint(capsys, DETECTION, scene, results)
    assert f"preserved_triggers.h5 was made from another potential triggers: run {PRESERVATION}.py again" in line


@pytest.mark.parametrize("script", NEEDED)
def test_a_damaged_artifact_before_it(script, scene, complete, tmp_path, capsys):
    path = before(script, complete, tmp_path) / f"{MADE[NEEDED[script]]}.h5"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is damaged or not an artifact of this project: delete it" in complaint(capsys, script, scene, tmp_path)


def test_one_channel_has_no_colours(scene, tmp_path, capsys):
    x, y = clean_images(channels=1)
    with h5py.File(tmp_path / "grey.h5", "w") as file:
        file["x"], file["y"] = x, y
    keras.Sequential([keras.layers.Input((SIDE, SIDE, 1)), keras.layers.Conv2D(2, 3), keras.layers.Flatten(),
                      keras.layers.Dense(2), keras.layers.Dense(LABELS)]).save(tmp_path / "grey.keras")
    options = {"MODELS": [str(tmp_path / "grey.keras")], "CLEAN_DATA": str(tmp_path / "grey.h5")}
    for script in (FILTERS, FILTER_DETECTION):
        assert "takes one-channel images, which have no colours" in complaint(capsys, script, scene, tmp_path, **options)


def mutated(data, content):
    """A file's bytes cut, with bytes changed or inserted, or arbitrary ones."""
    content = bytearray(content)
    kind = data.draw(st.sampled_from(["cut", "change", "insert", "anything"]))
    if kind == "cut":
        return bytes(content[:data.draw(st.integers(0, len(content)))])
    if kind == "anything":
        return data.draw(st.binary(max_size=300))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place:place + (kind == "change")] = data.draw(st.binary(min_size=1, max_size=1 if kind == "change" else 9))
    return bytes(content)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), reader=st.sampled_from(["architecture", "png", "jpg", "names", "artifact"]))
def test_every_other_reader_takes_or_refuses_damaged_bytes(scene, complete, tmp_path, data, reader):
    """Models, checkpoints and data files have tests of their own. Repeatable, since damage may crash HDF5 itself."""
    path = tmp_path / f"damaged.{reader}"
    image = clean_images()[0][0]
    whole = {"architecture": lambda: tiny().to_json().encode(), "names": lambda: b"a\nb\n",
             "artifact": lambda: (complete / "custom" / "tiny" / "potential_triggers.h5").read_bytes()}.get(
                 reader, lambda: cv2.imencode(f".{reader}", image)[1].tobytes())()
    path.write_bytes(mutated(data, whole))
    try:
        if reader == "architecture":
            load_examined(scene / "alone.weights.h5", DATASETS["custom"], architecture=str(path), input_range=[0, 1])
        elif reader == "artifact":
            artifacts.read(path)
        elif reader == "names":
            (tmp_path / "folder" / "a").mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / "folder" / "a" / "1.png"), image)
            shutil.copy(path, tmp_path / "folder" / "names.txt")
            from_folder.read_folder(tmp_path / "folder", (SIDE, SIDE, 3))
        else:
            assert from_folder.read_image(path, (SIDE, SIDE, 3)).shape == (SIDE, SIDE, 3)
    except UserError as error:
        assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize("form", ["keras", "h5"])
def test_code_in_a_model_does_not_run_in_the_real_command(form, tmp_path):
    marker = tmp_path / "marker"
    code = bytecode(marker)
    function = {"class_name": "__lambda__", "config": {"code": code, "defaults": None, "closure": None}}
    model = save(tmp_path / f"evil.{form}", described("Lambda", {"arguments": {}, "function": function if form == "keras"
                                                                 else [code, None, None]}, {}, form))
    done = subprocess.run([sys.executable, "pnnir.py", "--dataset", "custom", "--models", model, "--input-range", "0,1",
                           "--clean-data", tmp_path, "--results", tmp_path / "results"], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {model}: layer 'Lambda'") and done.stderr.count("\n") == 1
    assert not marker.exists() and not (tmp_path / "results").exists()
