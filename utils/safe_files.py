"""Reading files that may be hostile: bounded JSON, checked archives, checked HDF5.

Everything that is opened here is measured before it is read, so that no file can make us read another file, write
one, or use much more memory than its own size. Nothing here builds anything: no pickle, marshal or import by name.
"""

import contextlib
import json
import lzma
import math
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib

import h5py
import numpy as np

from utils.config import UserError

CONFIG_BYTES = 16 << 20      # a network's description: that of ResNet-152 has half a megabyte
JSON_DEPTH = 100
MEMBERS = 1000               # files in an archive; Keras writes three
OBJECTS = 100_000            # groups and datasets in an HDF5 file
EXPANSION = 100              # how much larger than its file a content may declare itself to be
SLACK = 16 << 20             # below this size no expansion is a danger
PROBE_SECONDS = 5            # of processor time to read an HDF5 file once, and how many bytes for a second more
PROBE_SPEED = 20 << 20
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}


def parse_json(text, where):
    """The plain JSON in `text`, str or bytes. Raises UserError: not JSON, too large, too deep, NaN."""
    if len(text) > CONFIG_BYTES:
        raise UserError(f"{where} holds a description of {len(text)} bytes; {CONFIG_BYTES} are the most")
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({str(error)[:100]}): save the model again") from None
    level = [value]
    for _ in range(JSON_DEPTH):
        level = [inner for item in level if isinstance(item, (dict, list))
                 for inner in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return value
    raise UserError(f"{where} nests more than {JSON_DEPTH} levels deep: it was not written by Keras")


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


@contextlib.contextmanager
def open_archive(path):
    """Yield (config, weights path) of a `.keras` archive; the weights are a temporary copy, an HDF5 file. The config says
    the `keras_version` that the archive's metadata do.

    Raises UserError: damaged, encrypted, members twice or outside the archive or links, sizes that expand.
    """
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
            names = _check_members(archive, path)
            if "model.weights.h5" not in names or "config.json" not in names:
                raise UserError(f"{path} is an archive without config.json or model.weights.h5: save with Keras 2.13 "
                                "or newer, model.save('NAME.keras')")
            with archive.open("config.json") as member:
                config = parse_json(member.read(CONFIG_BYTES + 1), f"config.json in {path}")
            if "metadata.json" in names and isinstance(config, dict):
                with archive.open("metadata.json") as member:
                    metadata = parse_json(member.read(CONFIG_BYTES + 1), f"metadata.json in {path}")
                config["keras_version"] = metadata.get("keras_version") if isinstance(metadata, dict) else None
            weights = pathlib.Path(folder, "model.weights.h5")
            with archive.open("model.weights.h5") as member, open(weights, "wb") as copy:
                shutil.copyfileobj(member, copy, 1 << 20)       # zipfile stops at the declared size, checked above
            yield config, weights
    except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError,
            EOFError, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is a damaged archive ({str(error)[:100]}): copy or save it again") from None


def _check_members(archive, path):
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(members) > MEMBERS:
        raise UserError(f"{path} holds {len(members)} members; {MEMBERS} are the most: it was not written by Keras")
    size = os.path.getsize(path)
    for member in members:
        parts = pathlib.PurePosixPath(member.filename.replace("\\", "/"))
        why = ("lies outside the archive" if parts.is_absolute() or ".." in parts.parts or ":" in member.filename else
               "is there twice" if names.count(member.filename) > 1 else
               "is a link" if stat.S_ISLNK(member.external_attr >> 16) else
               "is encrypted" if member.flag_bits & 1 else
               "unpacks to far more than it holds" if member.file_size > SLACK + EXPANSION * min(
                   member.compress_size, size) else "")
        if why:
            raise UserError(f"{path}: member {member.filename[:100]!r} {why}: refused, save with model.save")
    return names


@contextlib.contextmanager
def open_hdf5(path, where):
    """Yield the `h5py.File` at `path`, every object in it checked; `where` names the file in messages.

    Raises UserError: damaged, links other than hard ones, data in other files, virtual data, types that are not
    plain numbers, filters other than HDF5's own, declared sizes out of proportion to the file.
    """
    _read_elsewhere(path, where)
    with _checked_hdf5(path, where) as file:
        yield file


def _read_elsewhere(path, where):
    """Read the whole file in a process of its own first: the HDF5 library may hang or crash on a damaged one."""
    root = pathlib.Path(__file__).resolve().parents[1]
    seconds = PROBE_SECONDS + os.path.getsize(path) // PROBE_SPEED
    try:
        done = subprocess.run(
            [sys.executable, "-m", "utils.safe_files", os.path.abspath(path), where, str(seconds)], cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "OPENBLAS_NUM_THREADS": "1"}, timeout=20 * (seconds + 1),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        code, message = done.returncode, done.stdout.decode(errors="replace").strip()[:1000]
    except subprocess.TimeoutExpired:
        code, message = None, ""
    if code != 0:
        raise UserError(message if code == 2 and message else
                        f"{where} is a damaged HDF5 file that the library cannot read to its end: save it again")


def _probe(path, where, seconds):
    """What the process of its own does: read every attribute and array, within its share of time and memory."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows, where the time limit of the parent remains

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        most = (4 << 30) + (2 + EXPANSION) * os.path.getsize(path)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        with _checked_hdf5(path, where) as file:
            items = [file]
            file.visititems(lambda _, item: items.append(item))
            for item in items:
                for name in item.attrs:
                    _check_attribute(item, name)
                    item.attrs[name]
                if isinstance(item, h5py.Dataset):
                    item[()]
    except UserError as error:
        print(error)
        return 2
    return 0


@contextlib.contextmanager
def _checked_hdf5(path, where):
    try:
        with h5py.File(path, "r") as file:
            _check_objects(file, where, os.path.getsize(path))
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{where} is a damaged HDF5 file ({str(error)[:150]}): copy or save it again") from None


def _check_objects(file, where, size):
    """Visit every object once, by hard links alone: no link is followed before its kind is known."""
    groups, seen, declared, stored = [file], set(), 0, 0
    while groups:
        group = groups.pop()
        for name in group:
            place = f"{group.name.rstrip('/')}/{name}"[:150]
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise UserError(f"{where}: {place} links to another place or file: refused, save the model again")
            item = group[name]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                continue
            seen.add(address)
            if len(seen) > OBJECTS:
                raise UserError(f"{where} holds more than {OBJECTS} objects: it was not written by Keras")
            if isinstance(item, h5py.Group):
                groups.append(item)
                continue
            why = _fault(item)
            if why:
                raise UserError(f"{where}: {place} {why}: refused, save the model again")
            declared += item.size * item.dtype.itemsize
            stored += item.id.get_storage_size()
    if stored > size or declared > SLACK + EXPANSION * stored:
        raise UserError(f"{where} declares {declared} bytes of weights, but has {size} bytes: truncated or hostile, "
                        "get it again")


def _fault(item):
    """What is wrong with an HDF5 object that is no group, or an empty string."""
    if not isinstance(item, h5py.Dataset):
        return "is neither a group nor an array"
    if item.external or item.is_virtual:
        return "keeps its data in another file"
    if item.shape is None or item.dtype.kind not in "fiub" or item.dtype.subdtype:
        return "is not an array of numbers"
    plist = item.id.get_create_plist()
    if not {plist.get_filter(number)[0] for number in range(plist.get_nfilters())} <= FILTERS:
        return "is compressed by something other than HDF5's own filters"
    return ""


def attribute(group, name):
    """An HDF5 attribute as str or list of str, or None where it is missing. Raises ValueError if too large."""
    if name not in group.attrs:
        return None
    _check_attribute(group, name)
    value = group.attrs[name]
    if isinstance(value, np.ndarray):
        return [_text(item) for item in value.ravel().tolist()]
    return _text(value)


def _check_attribute(group, name):
    described = group.attrs.get_id(name)
    if 0 in (described.shape or ()):
        return          # has no size to ask for
    if described.get_storage_size() > CONFIG_BYTES or math.prod(described.shape or ()) > OBJECTS:
        raise ValueError(f"attribute {name} is too large")


def _text(value):
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if not isinstance(value, str):
        raise ValueError("an attribute that should be text is not")
    return value


def attribute_list(group, name):
    """A list of str that Keras keeps in an attribute, or, where that is too long, in NAME0, NAME1 and so on."""
    parts = [attribute(group, name)]
    if parts == [None]:
        parts = []
        while (part := attribute(group, f"{name}{len(parts)}")) is not None:
            parts.append(part)
    return [item for part in parts for item in ([part] if isinstance(part, str) else part)]


if __name__ == "__main__":
    sys.exit(_probe(sys.argv[1], sys.argv[2], int(sys.argv[3])))
