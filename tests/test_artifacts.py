"""Artifacts: exact, whole, resumable, and never mixed with other settings."""

import h5py
import numpy as np
import pytest

from utils import artifacts
from utils.config import UserError

SETTINGS = {"steps": 3, "model": "abc", "blocks": [["conv4"], ["full"]]}
ARRAYS = {"mask": np.float32([[0.1, 1 / 3]]), "123": {"conv1": {"kernel": np.arange(6.0).reshape(2, 3)}}}


def finished(folder, settings=SETTINGS):
    with artifacts.Stage(folder, "stage", settings) as stage:
        stage.finish(ARRAYS)
    return folder / "stage.h5"


def test_arrays_and_settings_come_back_exactly(tmp_path):
    arrays, settings = artifacts.read(finished(tmp_path))
    assert settings == SETTINGS
    np.testing.assert_array_equal(arrays["mask"], ARRAYS["mask"])
    assert arrays["mask"].dtype == np.float32
    np.testing.assert_array_equal(arrays["123"]["conv1"]["kernel"], ARRAYS["123"]["conv1"]["kernel"])


def test_a_finished_part_is_not_computed_again(tmp_path):
    with pytest.raises(KeyboardInterrupt), artifacts.Stage(tmp_path, "stage", SETTINGS) as stage:
        stage.part("1", lambda: {"value": np.array(1.0)})
        raise KeyboardInterrupt
    with artifacts.Stage(tmp_path, "stage", SETTINGS) as stage:
        assert not stage.finished
        assert stage.part("1", lambda: pytest.fail("computed again"))["value"] == 1.0
        stage.finish(ARRAYS)
    assert not (tmp_path / "stage.parts").exists()
    with artifacts.Stage(tmp_path, "stage", SETTINGS) as stage:
        assert stage.finished


def test_other_settings_are_refused_until_overwrite(tmp_path):
    finished(tmp_path)
    with pytest.raises(UserError, match="steps was 3, is 4.*--overwrite"):
        with artifacts.Stage(tmp_path, "stage", SETTINGS | {"steps": 4}):
            pass
    with artifacts.Stage(tmp_path, "stage", SETTINGS | {"steps": 4}, overwrite=True) as stage:
        assert not stage.finished


def test_a_run_that_overwrites_and_is_stopped_goes_on(tmp_path):
    path = finished(tmp_path)
    for suffix in (".json", ".png"):
        path.with_suffix(suffix).write_text("an earlier verdict")
    other = SETTINGS | {"steps": 4}
    with pytest.raises(KeyboardInterrupt), artifacts.Stage(tmp_path, "stage", other, overwrite=True) as stage:
        assert [item.name for item in tmp_path.iterdir()] == [".stage.lock"]
        stage.part("1", lambda: {"value": np.array(1.0)})
        raise KeyboardInterrupt
    with artifacts.Stage(tmp_path, "stage", other, overwrite=True) as stage:
        assert stage.part("1", lambda: pytest.fail("computed again"))["value"] == 1.0
    with artifacts.Stage(tmp_path, "stage", SETTINGS, overwrite=True) as stage:
        assert stage.part("1", lambda: {"value": np.array(2.0)})["value"] == 2.0
    (tmp_path / "stage.parts/1.h5").write_bytes(b"damaged")
    with artifacts.Stage(tmp_path, "stage", SETTINGS, overwrite=True) as stage:
        assert stage.part("1", lambda: {"value": np.array(3.0)})["value"] == 3.0


@pytest.mark.parametrize("made, left", [
    ("pnnir", ["potential_triggers.json"]),
    ("potential_triggers_feature_space", ["detection.json", "potential_triggers.json"]),
    ("preserved_triggers", ["detection_feature_space.json", "potential_triggers.json"])])
def test_what_is_made_afresh_leaves_no_verdict_on_what_was_there_before(tmp_path, made, left):
    for name in ("detection", "detection_feature_space", "potential_triggers", made):
        (tmp_path / f"{name}.json").write_text("{}")
    with artifacts.Stage(tmp_path, made, SETTINGS) as stage:
        stage.finish(ARRAYS)
    assert (tmp_path / "detection.json").exists()
    with artifacts.Stage(tmp_path, made, SETTINGS, overwrite=True):
        assert sorted(path.name for path in tmp_path.glob("*.json")) == left


def test_parts_of_other_settings_are_refused_too(tmp_path):
    with artifacts.Stage(tmp_path, "stage", SETTINGS) as stage:
        stage.part("1", lambda: {"value": np.array(1.0)})
    with pytest.raises(UserError, match="other settings"), artifacts.Stage(
            tmp_path, "stage", SETTINGS | {"steps": 4}) as stage:
        stage.part("1", lambda: {"value": np.array(2.0)})


def test_a_second_process_is_kept_off(tmp_path):
    with artifacts.Stage(tmp_path, "stage", SETTINGS):
        with pytest.raises(UserError, match="another process"):
            artifacts.Stage(tmp_path, "stage", SETTINGS).__enter__()
    with artifacts.Stage(tmp_path, "stage", SETTINGS):
        pass


def test_reading_a_stage_names_the_script_that_is_missing_or_stale(tmp_path):
    with pytest.raises(UserError, match="run pnnir.py first"):
        artifacts.read_stage(tmp_path, "stage", "pnnir.py", model="abc")
    finished(tmp_path)
    with pytest.raises(UserError, match="another model.*pnnir.py"):
        artifacts.read_stage(tmp_path, "stage", "pnnir.py", model="abd")
    arrays, settings, fingerprint = artifacts.read_stage(tmp_path, "stage", "pnnir.py", model="abc",
                                                         blocks=[("conv4",), ("full",)])      # no tuples in the file
    assert len(fingerprint) == 64
    with pytest.raises(UserError, match="was made by an earlier version: run pnnir.py again with --overwrite"):
        artifacts.read_stage(tmp_path, "stage", "pnnir.py", model="abc", later=1)
    for other in (SETTINGS | {"later": 1}, SETTINGS | {"method_version": 1}):
        with pytest.raises(UserError, match="another version of this stage: add --overwrite"):
            artifacts.Stage(tmp_path, "stage", other).__enter__()


@pytest.mark.parametrize("damage", ["cut", "changed", "text", "empty"])
def test_a_damaged_artifact_is_named(tmp_path, damage):
    path = finished(tmp_path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:900])
    elif damage == "changed":
        with h5py.File(path, "r+") as file:
            file["mask"][0, 0] = 0.2
    else:
        path.write_bytes(b"not HDF5" if damage == "text" else b"")
    with pytest.raises(UserError, match="stage.h5 is damaged"):
        artifacts.read(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = finished(tmp_path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        artifacts.write(path, {"bad": np.array([object()])}, SETTINGS)
    assert path.read_bytes() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == [".stage.lock", "stage.h5"]
