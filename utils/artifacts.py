"""One HDF5 file per stage and examined model: exact float32 arrays, the settings that made them, a fingerprint.

While a stage runs, each finished part (a tuned model, a chunk of labels) is a file of its own, so that a run that
was stopped goes on from there. A file made with other settings, or from other inputs, is never reused in silence.
"""

import fcntl
import hashlib
import json
import pathlib
import shutil

import h5py
import numpy as np

from utils.config import UserError
from utils.files import new_hdf5

METHOD_VERSION = 31      # raise it with any change that makes earlier artifacts lead to other verdicts than new ones


# What tells a verdict on what a stage made: it goes where that is made afresh, since it is of another model, or of others.
VERDICTS = {"pnnir": ("detection", "detection_feature_space"), "potential_triggers": ("detection",),
            "preserved_triggers": ("detection",), "potential_triggers_feature_space": ("detection_feature_space",)}


class Stage:
    """The artifact of one stage for one examined model, made part by part.

    folder: RESULTS/DATASET/MODEL. name: the file's stem. settings: everything that the result depends on, as plain
    JSON values, the fingerprints of the inputs among them. Used as a context: a lock keeps a second process off.
    Raises UserError where an artifact of other settings is in the way and `overwrite` is not set. With it, a finished
    artifact is made afresh; an unfinished one of the same settings goes on.
    """

    def __init__(self, folder, name, settings, overwrite=False):
        self.folder, self.name = pathlib.Path(folder), name
        self.path = self.folder / f"{name}.h5"
        self.parts = self.folder / f"{name}.parts"
        self.settings = json.loads(json.dumps(settings))
        self.overwrite = overwrite

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / f".{self.name}.lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._look()
        except BlockingIOError:
            self.lock.close()
            raise UserError(f"another process is working on {self.path}: wait for it, or use another RESULTS") from None
        except BaseException:
            self.lock.close()
            raise
        return self

    def _look(self):
        """What earlier runs left: an artifact, parts, files that were never finished."""
        for leftover in self.folder.glob(f".partial-*-{self.name}.*"):
            leftover.unlink()
        if self.overwrite and (self.path.exists() or not self._own_parts()):
            for name in (self.name, *VERDICTS.get(self.name, ())):
                for suffix in (".h5", ".json", ".png"):         # no earlier verdict stays beside what is to come
                    (self.folder / (name + suffix)).unlink(missing_ok=True)
            shutil.rmtree(self.parts, ignore_errors=True)
        self.finished = self.path.exists()
        if self.finished:
            self.arrays, settings = read(self.path)
            _compare(self.path, settings, self.settings)
            shutil.rmtree(self.parts, ignore_errors=True)       # where a run was killed between the two

    def _own_parts(self):
        """Whether all parts are of these settings: a run that overwrites and is stopped goes on from its own."""
        try:
            return all(read(path)[1] == self.settings for path in self.parts.glob("[!.]*.h5"))
        except UserError:
            return False

    def __exit__(self, *_):
        self.lock.close()

    def part(self, key, compute):
        """The arrays of one part: read if an earlier run finished it, else computed and kept."""
        path = self.parts / f"{key}.h5"
        if path.exists():
            arrays, settings = read(path)
            _compare(path, settings, self.settings)
            return arrays
        for leftover in self.parts.glob(f".partial-*-{key}.h5"):
            leftover.unlink()
        arrays = compute()
        write(path, arrays, self.settings)
        return arrays

    def finish(self, arrays):
        """Write the artifact and drop the parts."""
        write(self.path, arrays, self.settings)
        shutil.rmtree(self.parts, ignore_errors=True)


def write(path, arrays, settings):
    """Write arrays (nested dicts of numpy arrays) and settings to an HDF5 file, whole or not at all."""
    arrays = plain(arrays)
    with new_hdf5(path) as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
        file.attrs["settings"] = json.dumps(settings, sort_keys=True)
        file.attrs["fingerprint"] = _fingerprint(arrays, settings)


def read(path):
    """(arrays, settings) of an artifact; nested names come back as nested dicts. Raises UserError if it is damaged."""
    arrays = {}
    try:
        with h5py.File(path, "r") as file:
            def take(name, item):
                if isinstance(item, h5py.Dataset):
                    arrays[name] = item[()]
            file.visititems(take)
            settings = json.loads(file.attrs["settings"])
            intact = file.attrs["fingerprint"] == _fingerprint(arrays, settings)
    except FileNotFoundError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError, TypeError):
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged or not an artifact of this project: delete it and run its stage again")
    return _nested(arrays), settings


def read_stage(folder, name, script, **inputs):
    """An earlier stage's arrays, its settings, and its fingerprint.

    script: what makes the artifact; inputs: fingerprints it must have been made from (model=…, clean_data=…).
    """
    path = pathlib.Path(folder) / f"{name}.h5"
    if not path.exists():
        raise UserError(f"{path} is missing: run {script} first, with the same DATASET, MODELS and RESULTS")
    arrays, settings = read(path)
    for key, value in json.loads(json.dumps(inputs)).items():       # as the file has them: no tuples
        if key not in settings:
            raise UserError(f"{path} was made by an earlier version: run {script} again with --overwrite, or name another "
                            "RESULTS")
        if settings[key] != value:
            raise UserError(f"{path} was made from another {key.replace('_', ' ')}: run {script} again with --overwrite "
                            "and these settings, or name another RESULTS")
    return arrays, settings, _fingerprint(plain(arrays), settings)


def _compare(path, old, new):
    if old.keys() != new.keys() or old.get("method_version") != new.get("method_version"):
        raise UserError(f"{path} was made by another version of this stage: add --overwrite, or name another RESULTS")
    for key in sorted(new, key=lambda key: (key != "named_setting", key)):      # what else differs comes of this one
        if old.get(key) != new.get(key):
            raise UserError(f"{path} was made with other settings ({key} was {_short(old.get(key))}, is "
                            f"{_short(new.get(key))}): go back to those, add --overwrite, or name another RESULTS")


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _fingerprint(arrays, settings):
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def plain(arrays, prefix=""):
    """Nested dicts of arrays as one dict, names joined by slashes."""
    flat = {}
    for name, value in arrays.items():
        if isinstance(value, dict):
            flat |= plain(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = np.asarray(value)
    return flat


def _nested(flat):
    arrays = {}
    for name, value in flat.items():
        *groups, leaf = name.split("/")
        place = arrays
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value
    return arrays
