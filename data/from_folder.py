"""Make a dataset from a folder of images: `python -m data.from_folder --folder DIR --shape 32 32 3 --output own.h5`.

The folder has a sub-folder of images for each label. Sub-folders that are all numbers (7 or 07) are label numbers;
otherwise labels follow the alphabet, or the lines of a `names.txt` in the folder. The published clean images
(test_image/7/012.jpg, test_image/07/0012.jpg, test_image/PERSON/012.jpg with names.txt) are read as they are.
Images are stretched to the shape.
"""

from utils.config import UserError, configure, run

FOLDER = ""                        # the folder of images, one sub-folder a label
OUTPUT = ""                        # HDF5 file to write
DATASET = ""                       # take the shape of this dataset of utils/datasets.py
SHAPE: list[int] | None = None     # height, width, channels (1 gray, 3 RGB) of the images; before DATASET
CLEAN = False                      # write `x` and `y`, a defender's clean images, instead of training and test images
TEST_SHARE = 0.2                   # of each label's images that become test images, unless CLEAN
LIMIT: int | None = None           # images of each label at most, spread evenly over its files
SEED = 0                           # of the split and the order
configure(globals(), tensorflow=False)

import pathlib  # noqa: E402
import re  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402

from data.store import create, writing  # noqa: E402
from utils.datasets import dataset  # noqa: E402
from utils.images import stretch  # noqa: E402

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
MAX_LABELS = 100_000
MAX_SIDE = 4096
BATCH = 256          # images held in memory while a file is written


def main():
    if not FOLDER or not OUTPUT:
        raise UserError("give --folder, the images to read, and --output, the HDF5 file to write")
    row = dataset(DATASET) if DATASET else None
    if not SHAPE and not (row and row.shape):
        raise UserError("give the images' size, as --shape 32 32 3 or as --dataset NAME")
    shape = check_shape(SHAPE or row.shape)
    files, y, names = list_folder(FOLDER, LIMIT)
    if row and row.labels and len(names) > row.labels:
        raise UserError(f"{FOLDER} has the labels 0 to {len(names) - 1}, but {DATASET} only {row.labels}: check the "
                        "sub-folders' names")
    parts = {"": np.arange(len(y))} if CLEAN else split(y, TEST_SHARE, SEED)
    with writing(OUTPUT, {"label_names": "\n".join(names)}) as output:
        for part, chosen in parts.items():
            x = create(output, "x" + part, (len(chosen), *shape), np.uint8)
            for start in range(0, len(chosen), BATCH):
                x[start:start + BATCH] = [read_image(files[i], shape) for i in chosen[start:start + BATCH]]
            create(output, "y" + part, (len(chosen),), np.int64)[...] = y[chosen]
    counts = " and ".join(f"{len(chosen)} {word}" for chosen, word in zip(
        parts.values(), ("clean",) if CLEAN else ("training", "test")))
    print(f"{OUTPUT}: {counts} images of {len(set(y.tolist()))} labels, {'×'.join(map(str, shape))}")


def read_folder(folder, shape, limit_per_label=None):
    """The images in a folder of one sub-folder per label, in label order, as (x, y, names).

    x: uint8 N×H×W×C of the `shape` H, W, C; y: int64 N; names: the label names, names[y[i]] being the sub-folder of
    image i. Raises UserError for a folder laid out otherwise and for an image that cannot be read, naming it.
    """
    shape = check_shape(shape)
    files, y, names = list_folder(folder, limit_per_label)
    try:
        x = np.empty((len(files), *shape), np.uint8)
    except MemoryError:
        raise UserError(f"{folder}: {len(files)} images of {'×'.join(map(str, shape))} do not fit into memory: "
                        f"take fewer images of each label") from None
    for image, path in zip(x, files):
        image[...] = read_image(path, shape)
    return x, y, names


def list_folder(folder, limit_per_label=None):
    """The image files of a folder, their labels and the label names; nothing is read yet."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is {'no folder' if folder.exists() else 'not there'}: give a folder with one "
                        f"sub-folder of images for each label")
    if limit_per_label is not None and limit_per_label < 1:
        raise UserError(f"LIMIT {limit_per_label} leaves no image: give at least 1")
    folders = sorted(item for item in folder.iterdir() if item.is_dir() and not item.name.startswith("."))
    if not folders:
        raise UserError(f"{folder} has no sub-folders: put the images of each label into one of its own")
    names, label_of = _labels(folder, [item.name for item in folders])
    files, labels = [], []
    for item in sorted(folders, key=lambda item: label_of[item.name]):
        found = sorted((file for file in item.iterdir() if _is_image(file)), key=_natural)
        if not found:
            raise UserError(f"{item} holds no image that OpenCV reads: fill or remove it")
        if limit_per_label and len(found) > limit_per_label:
            found = [found[i * len(found) // limit_per_label] for i in range(limit_per_label)]
        files += found
        labels += [label_of[item.name]] * len(found)
    return files, np.array(labels, np.int64), names


def _labels(folder, found):
    """The label names in order, and the label of each sub-folder's name."""
    listing = folder / "names.txt"
    if listing.is_file():
        try:
            names = [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise UserError(f"{listing} is not UTF-8 text: write one label name a line") from None
        if len(set(names)) < len(names):
            raise UserError(f"{listing} has {max(names, key=names.count)!r} more than once: write each name once")
        missing = sorted(set(found) - set(names))
        if missing:
            raise UserError(f"{listing} does not list the sub-folder {missing[0]!r}: add it at its label's place")
        return names, {name: label for label, name in enumerate(names)}
    if not all(re.fullmatch(r"[0-9]{1,9}", name) for name in found):
        return found, {name: label for label, name in enumerate(found)}
    label_of = {name: int(name) for name in found}
    last = max(label_of.values())
    if len(set(label_of.values())) < len(found) or last >= MAX_LABELS:
        raise UserError(f"{folder}: the sub-folders' names are numbers, but not one label number each (0 to "
                        f"{MAX_LABELS - 1}): rename them or list them in a names.txt")
    names = [str(label) for label in range(last + 1)]
    for name, label in label_of.items():
        names[label] = name
    return names, label_of


def _is_image(path):
    if path.name.startswith(".") or not path.is_file():
        return False
    return path.suffix.lower() in SUFFIXES or cv2.haveImageReader(str(path))


def _natural(path):
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)], path.name


def read_image(path, shape):
    """The image file as uint8 H×W×C of `shape`, RGB or gray, stretched. Raises UserError naming a damaged file."""
    height, width, channels = shape
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    image = None
    if content and not _cut(content):
        try:
            flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
            image = cv2.imdecode(np.frombuffer(content, np.uint8), flag)
        except cv2.error:
            pass
    if image is None:
        raise UserError(f"{path} is damaged, no image that OpenCV reads, or larger than 2^26 pixels: replace or remove it")
    image = stretch(image, height, width)
    return image[..., None] if channels == 1 else image[..., ::-1]


def _cut(content):
    """Whether a JPEG file ends too early: OpenCV 4 fills the missing part with gray and does not complain."""
    return content.startswith(b"\xff\xd8") and content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda")


def split(y, share, seed):
    """Indices of training and test images, {"_train": ..., "_test": ...}, each in random order.

    Every label with two images or more gives at least one to each part.
    """
    if not 0 < share < 1:
        raise UserError(f"TEST_SHARE {share} leaves no training or no test images: give a share between 0 and 1")
    random = np.random.default_rng(seed)
    test = []
    for label in np.unique(y):
        members = random.permutation(np.flatnonzero(y == label))
        if len(members) > 1:
            test.append(members[:min(max(round(share * len(members)), 1), len(members) - 1)])
    if not test:
        raise UserError("no label has two images, one to train and one to test: add images, or use --clean")
    test = random.permutation(np.concatenate(test))
    train = random.permutation(np.setdiff1d(np.arange(len(y)), test))
    return {"_train": train, "_test": test}


def check_shape(shape):
    """`shape` as a tuple of H, W, C, or UserError."""
    shape = tuple(shape)
    if len(shape) != 3 or shape[2] not in (1, 3) or not all(1 <= side <= MAX_SIDE for side in shape[:2]):
        raise UserError(f"SHAPE {' '.join(map(str, shape))} is not height, width (1 to {MAX_SIDE}) and channels "
                        f"(1 gray, 3 RGB): give for example --shape 32 32 3")
    return shape


if __name__ == "__main__":
    run(main)
