"""Killed at any moment, a stage goes on when it runs again and ends as if nothing had happened; full disks are errors."""

import importlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import h5py
import pytest

from tests.conftest import recorded_writes
from tests.test_foreign_scan import complaint, scan
from tests.test_pipeline import FEATURE, PATCH, QUICK, ROOT
from utils import artifacts
from utils.plain_patches import DRAWS
from utils.probes import ROUNDS
from utils.tuning import TAUGHT

SCRIPTS = PATCH + FEATURE[1:]
# Parts of probes: the rounds of each search, where taught models know too little to be asked, and the models that the last
# probes are measured on.
BRED = len(DRAWS) * (1 + ROUNDS) + 1 + len(TAUGHT)
MADE = dict(zip(SCRIPTS, ("pnnir", "potential_triggers", "preserved_triggers", "detection",
                          "potential_triggers_feature_space", "detection_feature_space")))


def start(script, scene, results, **options):
    """The script as a process of its own, with the constants that `scan` sets. options: of Popen."""
    constants = QUICK | {"DATASET": "custom", "MODELS": [scene / "tiny.keras"], "INPUT_RANGE": [0, 1], "RESULTS": results,
                         "CLEAN_DATA": scene / "clean.h5", "RANDOM_THRESHOLD": 0,
                         "FILTER_RANDOM_THRESHOLD": 0, "LABELS_AT_ONCE": 2}
    words = []
    for name, value in constants.items():
        if hasattr(importlib.import_module(script), name):
            words.append("--" + name.lower().replace("_", "-"))
            words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    return subprocess.Popen([sys.executable, "-u", ROOT / f"{script}.py", *words], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def before(script, complete, results):
    """A results folder with what the stage reads, and the stage's own artifacts missing."""
    folder = results / "custom" / "tiny"
    folder.mkdir(parents=True)
    for earlier in SCRIPTS[:SCRIPTS.index(script)]:
        shutil.copy(complete / "custom" / "tiny" / f"{MADE[earlier]}.h5", folder)
    return folder


def contents(folder, name):
    """All that a stage wrote: arrays bit by bit, settings, pictures, the verdict."""
    found = {path.suffix: path.read_bytes() for path in folder.glob(f"{name}.*") if path.suffix in (".png", ".json")}
    with h5py.File(folder / f"{name}.h5") as file:
        file.visititems(lambda key, item: found.update(
            {key: (item.dtype, item.shape, item[()].tobytes())} if isinstance(item, h5py.Dataset) else {}))
        found |= {key: file.attrs[key] for key in ("settings", "fingerprint")}
    return found


def kill_after(process, lines, seconds):
    """Kill the process `seconds` after it wrote so many lines; returns its exit code."""
    guard = threading.Timer(120, process.kill)      # a test that hangs ends as well
    guard.start()
    for number, _ in enumerate(process.stdout, 1):
        if number == lines:
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
    guard.cancel()
    return process.wait()


# Lines that each script writes before its artifact is whole, at these settings.
LINES = {"pnnir": 35, "potential_triggers_reconstruction": 95, "critical_features_preservation": 4,
         "backdoor_detection": 6, "potential_triggers_reconstruction_feature_space": 21,
         "backdoor_detection_feature_space": 6}


@pytest.mark.parametrize("script, line", [*((script, 0) for script in SCRIPTS), ("pnnir", 33),         # while breeding
                                          ("potential_triggers_reconstruction_feature_space", 19)])
def test_killed_at_a_random_moment_a_stage_ends_as_an_uninterrupted_one(script, line, scene, complete, tmp_path,
                                                                        monkeypatch):
    folder = before(script, complete, tmp_path)
    dice = random.Random(script)
    lines = line or dice.randint(1, LINES[script])
    assert kill_after(start(script, scene, tmp_path), lines, dice.uniform(0, 0.2 if LINES[script] > 6 else 0.02)) == -9
    finished = set(folder.glob("*.parts/[!.]*.h5"))
    written = recorded_writes(monkeypatch)
    scan(script, scene, tmp_path)
    assert not finished & set(written) and len(written) == len(set(written))
    assert finished or script not in SCRIPTS[:2]
    parts = {f"{path.parent.name}/{path.name}" for path in finished | set(written) if path.parent.suffix == ".parts"}
    assert parts == {part for part in (complete / "parts.txt").read_text().split() if part.startswith(f"{MADE[script]}.")}
    assert contents(folder, MADE[script]) == contents(complete / "custom" / "tiny", MADE[script])
    assert not list(folder.glob(".partial*")) and not list(folder.glob("*.parts"))


def test_controls_and_repairs_go_on_where_they_were_stopped(scene, complete, tmp_path, monkeypatch):
    """With so little evidence asked for every label gets all controls, and all but one are measured again."""
    script, write, written = SCRIPTS[1], artifacts.write, []
    whole, stopped = (before(script, complete, tmp_path / name) for name in ("whole", "stopped"))

    def recording(path, *rest):
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *rest)
    monkeypatch.setattr(artifacts, "write", recording)
    stop = None
    scan(script, scene, tmp_path / "whole", EVIDENCE=1e-6, UNPROBED_EVIDENCE=1e-6)
    names, written = written, []
    proper = next(number for number, name in enumerate(names) if name.startswith("123-examined-"))
    repaired = next(number for number, name in enumerate(names) if name.startswith("repaired-"))
    again = next(number for number, name in enumerate(names) if name.startswith("repaired-1-") and "-again-" in name)
    for stop in (proper + 1, repaired + 1, again, len(names) - 1):
        with pytest.raises(KeyboardInterrupt):
            scan(script, scene, tmp_path / "stopped", EVIDENCE=1e-6, UNPROBED_EVIDENCE=1e-6)
    stop = None
    scan(script, scene, tmp_path / "stopped", EVIDENCE=1e-6, UNPROBED_EVIDENCE=1e-6)
    assert written == names
    assert contents(stopped, MADE[script]) == contents(whole, MADE[script])


STAGE = """
import os, signal, sys, tempfile
import h5py, numpy as np
from utils import artifacts
left = [int(sys.argv[2])]
def dying(function):
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
for module, name in ((os, "replace"), (os, "unlink"), (os, "fsync"), (os, "rmdir"), (os, "chmod"), (tempfile, "mkstemp"),
                     (h5py.Group, "create_dataset"), (h5py.File, "close")):
    setattr(module, name, dying(getattr(module, name)))
with artifacts.Stage(sys.argv[1], "stage", {"steps": 3}) as stage:
    if not stage.finished:
        parts = {key: stage.part(key, lambda: {"a": np.arange(9.0) + ord(key)}) for key in "x"}
        stage.finish(parts)
"""


def test_killed_at_every_step_of_its_writing_a_stage_leaves_whole_files(tmp_path):
    """The process kills itself before its first, second, ... operation on files, until one comes to its end."""
    def run(folder, step):
        return subprocess.run([sys.executable, "-c", STAGE, folder, str(step)], cwd=ROOT, capture_output=True).returncode
    assert run(tmp_path / "whole", 0) == 0
    for step in range(1, 200):
        folder = tmp_path / str(step)
        killed = run(folder, step)
        for path in folder.glob("**/[!.]*.h5"):
            artifacts.read(path)
        assert run(folder, 0) == 0
        assert contents(folder, "stage") == contents(tmp_path / "whole", "stage")
        assert sorted(path.name for path in folder.iterdir()) == [".stage.lock", "stage.h5"]
        if killed == 0:
            break
        assert killed == -signal.SIGKILL
    assert 10 < step < 100


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_disk_that_is_full_at_the_end_of_a_file_leaves_no_file(script, scene, complete, tmp_path, monkeypatch,
                                                                 capsys):
    folder = before(script, complete, tmp_path)
    there = set(folder.rglob("*"))

    def full(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in complaint(capsys, script, scene, tmp_path)
    left = set(folder.rglob("*")) - there
    assert {path.name for path in left} <= {f".{MADE[script]}.lock", f"{MADE[script]}.parts"}


def test_a_file_that_may_not_grow_leaves_the_parts_before_it(scene, complete, tmp_path):
    """A limit of the system in place of a full disk: the parts fit, the artifact of all of them does not."""
    whole = (complete / "custom" / "tiny" / "pnnir.h5").stat().st_size
    folder = tmp_path / "custom" / "tiny"
    process = start("pnnir", scene, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, [whole - 1] * 2))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said == f"error: File too large ({folder}/pnnir.h5): check the disk's space and the folder's permissions\n"
    assert {path.name for path in folder.iterdir()} == {".pnnir.lock", "pnnir.parts"}
    assert len(list(folder.glob("pnnir.parts/*"))) == 11 + BRED     # the examined model, ten tuned ones, probes
    scan("pnnir", scene, tmp_path)
    assert contents(folder, "pnnir") == contents(complete / "custom" / "tiny", "pnnir")


@pytest.mark.parametrize("script", SCRIPTS[1:3])
def test_what_an_earlier_method_made_is_not_gone_on_with(script, scene, complete, tmp_path, monkeypatch, capsys):
    before(script, complete, tmp_path)
    monkeypatch.setattr("utils.artifacts.METHOD_VERSION", 99)
    said = complaint(capsys, script, scene, tmp_path)
    assert "was made from another method version: run" in said and "--overwrite" in said


@pytest.mark.parametrize("results, said", [
    ("{file}", "is no folder: name one"), ("{file}/below", "Not a directory"), ("/proc/results", "No such file"),
    ("", "RESULTS ''")])
def test_results_where_no_folder_can_be_made(results, said, scene, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("kept")
    assert said in complaint(capsys, "pnnir", scene, results.format(file=file))
    assert file.read_text() == "kept" and list(tmp_path.iterdir()) == [file]
