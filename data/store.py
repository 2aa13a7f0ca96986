"""One HDF5 format for every dataset: `x_train`, `y_train`, `x_test`, `y_test`, or `x`, `y` for a clean set.

Images (`x...`) are uint8 N×H×W×C, RGB or gray; labels (`y...`) are N integers from 0 up. A file may come from
anyone, so what it declares is checked before a byte of it is read into memory.
"""

import contextlib
import math
import os
import pathlib
import sys

import h5py
import numpy as np

from utils.config import UserError
from utils.datasets import dataset
from utils.files import new_hdf5

FOLDER = pathlib.Path(__file__).parent     # where NAME.h5 is looked for
NAMES = ("x_train", "y_train", "x_test", "y_test")
MAX_COMPRESSED = 8 << 30                   # bytes that compressed data may unpack to
MAX_RATIO = 1032                           # no deflate stream unpacks to more than this many times its size
# HDF5 would look for a plug-in, a shared library, to undo any other filter.
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}
MAX_LABEL = 2**31 - 1


def load_dataset(name):
    """The dataset `name` as a dict of `x_train`, `y_train`, `x_test`, `y_test`; see `read_arrays` for the arrays.

    `signs` is drawn and written at its first use (and again when its drawing changed); the others are made once by
    the command that the UserError for a missing file names.
    """
    row = dataset(name)
    if row.shape is None:
        raise UserError(f"DATASET {name!r} is for models from elsewhere and has no images: give CLEAN_DATA, an HDF5 file "
                        "or a folder of images, or choose another DATASET")
    path = FOLDER / f"{name}.h5"
    if name == "signs":
        from data import signs
        if not path.exists() or read_attributes(path).get("version") != signs.VERSION:
            print(f"drawing the dataset signs, once: {path}", file=sys.stderr)
            save_dataset(path, signs.generate(), signs.attributes())
    if not path.exists():
        command = (f"python -m data.from_folder --dataset {name} --folder FOLDER --output {path}"
                   if name.endswith("_face") else f"python -m data.download {name}")
        raise UserError(f"{path} does not exist: make it with `{command}`")
    arrays = read_arrays(path, NAMES)
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.shape[1:] != row.shape:
            raise UserError(f"{path}: x_{part} holds images of {_size(x.shape[1:])}, but {name} has "
                            f"{_size(row.shape)}: make the file again")
        if y.max() >= row.labels:
            raise UserError(f"{path}: y_{part} holds label {y.max()}, but {name} has the labels 0 to "
                            f"{row.labels - 1}: make the file again")
    return arrays


def save_dataset(path, arrays, attributes=None):
    """Write `arrays` (a dict as `read_arrays` returns it) whole or not at all; `attributes` go to the file's root.

    Raises UserError for arrays that `read_arrays` would refuse.
    """
    for name, array in arrays.items():
        _check_kind(path, name, array.shape, array.dtype)
    _check_lengths(path, {name: len(array) for name, array in arrays.items()})
    for name, array in arrays.items():
        if name.startswith("y"):
            _check_labels(path, name, array)
    with writing(path, attributes) as file:
        for name, array in arrays.items():
            create(file, name, array.shape, array.dtype)[...] = array


@contextlib.contextmanager
def writing(path, attributes=None):
    """Yield an open HDF5 file that takes `path`'s place when the block ends without an error."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: give the name of a file to write")
    with new_hdf5(path) as file:
        file.attrs.update(attributes or {})
        yield file


def create(file, name, shape, dtype):
    """A dataset to fill in the open `file`; images are compressed unless they are too many for a reader to trust."""
    if len(shape) == 1 or math.prod(shape) > MAX_COMPRESSED // 2:
        return file.create_dataset(name, shape, dtype)
    images = max(1, min(shape[0], (1 << 20) // math.prod(shape[1:])))
    return file.create_dataset(name, shape, dtype, chunks=(images, *shape[1:]), compression="gzip", shuffle=False)


def read_attributes(path):
    """The root attributes of the HDF5 file at `path` as a dict. Raises UserError if it cannot be read."""
    return _reading(path, lambda file: dict(file.attrs))


def read_arrays(path, names):
    """The arrays called `names` from the HDF5 file at `path`, as a dict of numpy arrays.

    Names that start with x are images: uint8 N×H×W×C with C 1 or 3; the others labels: N integers from 0 up,
    returned as int64. `x_train` and `y_train` must be equally long, and so on. Raises UserError, before any memory
    is taken, for whatever is missing, damaged, of another kind, or larger than the file can hold; and for data
    that lies in other files, which are never opened.
    """
    def read(file):
        datasets = {name: _open(path, file, name, names) for name in names}
        _check_lengths(path, {name: item.shape[0] for name, item in datasets.items()})
        size = os.path.getsize(path)
        packed = sum(_check_storage(path, name, item, size) for name, item in datasets.items())
        if packed > MAX_COMPRESSED:
            raise UserError(f"{path} unpacks to {packed / 2**30:.1f} GiB, over the {MAX_COMPRESSED >> 30} GiB that "
                            f"compressed data may: save it without compression")
        return {name: item[...] for name, item in datasets.items()}

    arrays = _reading(path, read)
    for name, array in arrays.items():
        if not name.startswith("x"):
            _check_labels(path, name, array)
            arrays[name] = array.astype(np.int64)
    return arrays


def _reading(path, function):
    """`function` of the open file, with all that the HDF5 library may raise on a damaged one as UserError."""
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: check the path")
    if not os.path.isfile(path):
        raise UserError(f"{path} is {'a folder' if os.path.isdir(path) else 'no regular file'}: "
                        f"give the path of an HDF5 file")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    try:
        if not h5py.is_hdf5(path):
            raise UserError(f"{path} is not an HDF5 file: `python -m data.from_folder` makes one from images")
        with h5py.File(path, "r") as file:
            return function(file)
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path} does not fit into memory: make a smaller one, with fewer images a label") from None
    except Exception as error:  # the library reports damage as nearly any of Python's exceptions
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged or was not written to its end ({reason}): make or copy it "
                        f"again") from None


def _open(path, file, name, names):
    """The HDF5 dataset `name`, of the right kind and stored in this file; nothing of it is read yet."""
    there = sorted(file)
    if name not in there:
        shown = ", ".join(there[:20]) or "nothing"
        raise UserError(f"{path} has no {name!r}: it holds {shown[:300]}, not {', '.join(names)}")
    # A link may lead into any file of this machine, so the kind of link comes before what it leads to.
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise UserError(f"{path}: {name!r} is a link to somewhere else, which is not followed: store the array "
                        f"itself")
    item = file[name]
    if not isinstance(item, h5py.Dataset):
        raise UserError(f"{path}: {name!r} is not an array: store a plain dataset")
    layout = item.id.get_create_plist()
    if layout.get_layout() == h5py.h5d.VIRTUAL or layout.get_external_count():
        raise UserError(f"{path}: {name!r} keeps its data in other files, which are not read: store the array itself")
    if item.shape is None:
        raise UserError(f"{path}: {name!r} is empty: store at least one image and its label")
    _check_kind(path, name, item.shape, item.dtype)
    return item


def _check_kind(path, name, shape, dtype):
    wanted = "uint8 N×H×W×C from 0 to 255, C 1 (gray) or 3 (RGB)" if name.startswith("x") else "N integers from 0 up"
    where = f"{path}: {name!r} is {dtype} {_size(shape)}, not {wanted}"
    if name.startswith("x"):
        if dtype != np.uint8:
            how = " (if its values are 0 to 1, multiply by 255 and round)" if dtype.kind == "f" else ""
            raise UserError(f"{where}: convert it{how}")
        if len(shape) != 4 or shape[3] not in (1, 3):
            raise UserError(f"{where}: reshape it, the channels come last")
    elif dtype.kind not in "iu":
        raise UserError(f"{where}: convert it, a label is the number of its class")
    elif len(shape) != 1:
        raise UserError(f"{where}: store one class number per image, not one-hot rows")
    if 0 in shape:
        raise UserError(f"{where}: it is empty, store at least one image and its label")


def _check_lengths(path, lengths):
    for name, length in lengths.items():
        partner = "y" + name[1:]
        if name.startswith("x") and lengths.get(partner, length) != length:
            raise UserError(f"{path}: {name!r} has {length} images but {partner!r} {lengths[partner]} labels: "
                            f"store one label for each image")


def _check_labels(path, name, array):
    if array.min() < 0 or array.max() > MAX_LABEL:
        raise UserError(f"{path}: {name!r} holds the label {array.min() if array.min() < 0 else array.max()}: "
                        f"labels are class numbers from 0 up")


def _check_storage(path, name, item, file_size):
    """Refuse what declares more than the file can hold. Returns the bytes it unpacks to, 0 if not compressed."""
    declared = math.prod(item.shape) * item.dtype.itemsize
    too_much = UserError(f"{path}: {name!r} declares {declared} bytes, more than the file of {file_size} bytes can "
                         f"hold: it is damaged or was not written to its end, make or copy it again")
    plist = item.id.get_create_plist()
    filters = {plist.get_filter(number)[0] for number in range(plist.get_nfilters())}
    if filters - FILTERS:
        raise UserError(f"{path}: {name!r} is compressed with HDF5 filter {min(filters - FILTERS)}, which is not "
                        f"read: save it with gzip or without compression")
    if not filters and (declared > file_size or item.id.get_storage_size() < declared):
        raise too_much
    if item.chunks:
        chunk = math.prod(item.chunks) * item.dtype.itemsize
        # Chunks that were never written would be read as zeros, and a huge chunk is unpacked as a whole.
        expected = math.prod(-(-length // size) for length, size in zip(item.shape, item.chunks))
        stored = min(item.id.get_storage_size(), file_size)
        largest = min(MAX_RATIO * stored, MAX_COMPRESSED) if filters else stored
        if max(declared, chunk) > largest or expected > file_size:
            raise too_much
        if item.id.get_num_chunks() != expected:
            raise too_much
        sizes = []
        item.id.chunk_iter(lambda info: sizes.append(info.size))
        if max(sizes) > 2 * chunk + 1024:
            raise too_much
    return declared if filters else 0


def _size(shape):
    return "×".join(map(str, shape)) or "scalar"
