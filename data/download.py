"""Download a dataset from its official source and write data/NAME.h5: `python -m data.download mnist`.

mnist: mnist.npz, the file that Keras loads (60,000 and 10,000 images). cifar10: the *binary* version of the
authors' archive (50,000 and 10,000), since the Python version holds pickles, and a pickle runs code when it is
read. gtsrb: the benchmark's final training and test archives (39,209 and 12,630); each whole frame, of which the
sign takes about four fifths, is resized to 32×32 with area interpolation, as is common in work on backdoors; the
annotated boxes are not used.

Archives are kept in data/raw/: an interrupted download goes on where it stopped, and a second run makes the
dataset again without the network. Nothing is extracted to disk.
"""

import argparse
import csv
import hashlib
import http.client
import io
import os
import pathlib
import re
import ssl
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib

from utils.config import UserError, run

FOLDER = pathlib.Path(__file__).parent
ATTEMPTS = 6               # in a row without a single new byte before giving up
PAUSE = 1.0                # seconds before the second attempt, doubled for each one after it
TIMEOUT = 60               # seconds without an answer that end an attempt
MAX_BYTES = 1 << 30        # no archive is larger
MAX_MEMBER = 64 << 20      # bytes of one file in an archive

# Name: base URL, then each file with its checksum. They are those that Keras, TensorFlow Datasets and (for GTSRB,
# whose site publishes none) other loaders of the same archives check.
SOURCES = {
    "mnist": ("https://storage.googleapis.com/tensorflow/tf-keras-datasets/", {
        "mnist.npz": "sha256:731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"}),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", {
        "cifar-10-binary.tar.gz": "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}),
    "gtsrb": ("https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/", {
        "GTSRB_Final_Training_Images.zip": "md5:f33fd80ac59bff73c82d25ab499e03a3",
        "GTSRB_Final_Test_Images.zip": "md5:c7e4e6327067d32654124b0fe9e82185",
        "GTSRB_Final_Test_GT.zip": "md5:fe31e9c9270bbcd7b84b7f21a9d9d9e5"}),
}


def main():
    parser = argparse.ArgumentParser(prog="python -m data.download", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help=", ".join(SOURCES))
    parser.add_argument("--output", help="file to write (default: data/DATASET.h5)")
    arguments = parser.parse_args()
    name = arguments.dataset
    if name not in SOURCES:
        raise UserError(f"{name!r} cannot be downloaded: choose from {', '.join(SOURCES)} (signs is drawn by itself, "
                        f"`python -m data.from_folder` makes a dataset from images)")
    output = pathlib.Path(arguments.output or FOLDER / f"{name}.h5")
    download(name, output)


def download(name, output, sources=SOURCES, raw=FOLDER / "raw"):
    """Fetch the files of `name` into `raw` and write the dataset to `output`. Returns its arrays."""
    from data.store import save_dataset

    base, files = sources[name]
    paths = [fetch(base + file, pathlib.Path(raw) / file, checksum) for file, checksum in files.items()]
    try:
        arrays = READERS[name](*paths)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{raw}: the files of {name} are not laid out as expected ({error}): delete them and run the "
                        f"same command again") from error
    save_dataset(output, arrays, {"source": base})
    print(f"{output}: {len(arrays['x_train'])} training and {len(arrays['x_test'])} test images of "
          f"{arrays['y_train'].max() + 1} labels")
    return arrays


def fetch(url, path, checksum):
    """Download `url` to `path` unless it is there already; `checksum` is "md5:..." or "sha256:...".

    What has arrived waits in `path`.partial, from where the next attempt or the next run goes on. Returns `path`.
    Raises UserError if the server refuses, falls silent, or sends something else.
    """
    if path.exists() and digest(path, checksum) == checksum:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    failures = 0
    while True:
        start = partial.stat().st_size if partial.exists() else 0
        try:
            resumed = _receive(url, partial, start)
        except urllib.error.HTTPError as error:
            if error.code == 416 and start:     # nothing is left to send: all of it is there, or it is another file
                resumed = True
            elif error.code in (408, 425, 429) or error.code >= 500:
                failures = _wait(url, failures, error)
                continue
            else:
                raise UserError(f"{url}: the server answers {error.code} {error.reason}: the file may have moved, "
                                f"put it into {path.parent} yourself and run the same command again") from error
        except (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError,
                http.client.HTTPException) as error:    # of the connection; a full disk is not tried again
            moved = partial.exists() and partial.stat().st_size > start
            failures = _wait(url, 0 if moved else failures, error)
            continue
        found = digest(partial, checksum)
        if found == checksum:
            os.replace(partial, path)
            return path
        partial.unlink()
        if not resumed:     # otherwise the older part may be of another file: once more from the start
            raise UserError(f"{url}: checksum {found} instead of {checksum}: the file was changed at its source or "
                            f"on the way, it has been deleted")


def digest(path, like):
    """The checksum of a file, of the kind of `like`, in the same notation."""
    kind = like.split(":")[0]
    found = hashlib.new(kind)
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return f"{kind}:{found.hexdigest()}"


def _receive(url, partial, start):
    """Append the rest of `url` to `partial`, or write it anew if the server starts over; True if it went on."""
    request = urllib.request.Request(url, headers={"User-Agent": "NeuralSanitizer",
                                                   **({"Range": f"bytes={start}-"} if start else {})})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        resumed = answer.status == 206 and sent is not None and int(sent[1]) == start
        if answer.status == 206 and not resumed:
            raise http.client.HTTPException("the server sent another part than the one asked for")
        have = start if resumed else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length and length.isdecimal() else None
        shown = 0.0
        with open(partial, "ab" if resumed else "wb") as file:
            while block := answer.read(1 << 16):
                have += len(block)
                if have > MAX_BYTES:
                    raise UserError(f"{url}: the server sends more than {MAX_BYTES >> 20} MB: this is not the file")
                file.write(block)
                if time.monotonic() - shown > 0.2:
                    shown = time.monotonic()
                    _progress(partial.stem, have, total)
        _progress(partial.stem, have, total, end="\n")
        if total is not None and have < total:
            raise http.client.IncompleteRead(b"", total - have)
    return resumed


def _progress(name, have, total, end=""):
    if end or sys.stderr.isatty():
        share = f" of {total / 1e6:.1f} ({100 * have // max(total, 1)} %)" if total is not None else ""
        print(f"\r{name}: {have / 1e6:.1f}{share} MB", end=end, file=sys.stderr, flush=True)


def _wait(url, failures, error):
    if failures + 1 >= ATTEMPTS:
        raise UserError(f"{url}: no whole answer after {ATTEMPTS} attempts ({error}): run the same command again "
                        f"later, it goes on from what has arrived")
    print(f"{url}: {error}: trying again in {PAUSE * 2**failures:.0f} s", file=sys.stderr)
    time.sleep(PAUSE * 2**failures)
    return failures + 1


def read_mnist(path):
    """The arrays of mnist.npz in the format of `data.store`."""
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        return {name: file[name][..., None] if name.startswith("x") else file[name]
                for name in ("x_train", "y_train", "x_test", "y_test")}


def read_cifar10(path):
    """The arrays of cifar-10-binary.tar.gz: records of one label byte and 3×32×32 pixels, red plane first."""
    import numpy as np

    batches = {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            _refuse_outside(path, member.name)
            if member.isfile() and (match := re.search(r"^cifar-10-batches-bin/(data|test)_batch(_\d)?\.bin$",
                                                       member.name)):
                if member.size % 3073 or not 0 < member.size <= MAX_MEMBER:
                    raise ValueError(f"{member.name} has {member.size} bytes")
                records = np.frombuffer(archive.extractfile(member).read(), np.uint8).reshape(-1, 3073)
                batches[match[1], match[2] or ""] = records
    arrays = {}
    for part, kind in (("train", "data"), ("test", "test")):
        records = np.concatenate([batches[key] for key in sorted(batches) if key[0] == kind])
        arrays[f"x_{part}"] = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        arrays[f"y_{part}"] = records[:, 0]
    return arrays


def read_gtsrb(training, test, truth):
    """The arrays of GTSRB's archives: training images in folders by label, test images, labels of the test images."""
    with zipfile.ZipFile(truth) as archive:
        table = _member(truth, archive, "GT-final_test.csv").decode("ascii")
        label_of = {row["Filename"]: int(row["ClassId"]) for row in csv.DictReader(io.StringIO(table), delimiter=";")}
    x_train, y_train = _read_signs(training, r"GTSRB/Final_Training/Images/(\d{5})/\d+_\d+\.ppm", int)
    x_test, y_test = _read_signs(test, r"GTSRB/Final_Test/Images/(\d{5}\.ppm)", label_of.__getitem__)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def _read_signs(path, pattern, label):
    import cv2
    import numpy as np

    x, y = [], []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            _refuse_outside(path, name)
            if match := re.fullmatch(pattern, name):
                content = np.frombuffer(_member(path, archive, name), np.uint8)
                image = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
                if image is None:
                    raise ValueError(f"{name} is not an image")
                x.append(cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA)[..., ::-1])
                y.append(label(match[1]))
    if not x:
        raise ValueError(f"{path.name} holds no images")
    return np.stack(x), np.array(y)


def _member(path, archive, name):
    if archive.getinfo(name).file_size > MAX_MEMBER:
        raise UserError(f"{path}: {name} is larger than {MAX_MEMBER >> 20} MB: delete the archive and download it "
                        f"again")
    return archive.read(name)


def _refuse_outside(path, name):
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:", name):
        raise UserError(f"{path}: {name!r} leads out of the archive: delete it and download it again")


READERS = {"mnist": read_mnist, "cifar10": read_cifar10, "gtsrb": read_gtsrb}

if __name__ == "__main__":
    run(main)
