"""The dataset files, the downloads (from a server of our own on this machine) and the folders of images."""

import errno
import functools
import hashlib
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib

import cv2
import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import download, from_folder, store
from data.store import NAMES, load_dataset, read_arrays, save_dataset
from utils.config import UserError

RANDOM = np.random.default_rng(0)
X = RANDOM.integers(0, 256, (6, 4, 5, 3), np.uint8)
Y = np.arange(6)


def write(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


# data/store.py

def test_saved_arrays_come_back_equal_and_of_the_documented_types(tmp_path):
    path = tmp_path / "set.h5"
    save_dataset(path, {"x": X, "y": Y.astype(np.uint8)}, {"seed": 3, "label_names": "a, b"})
    read = read_arrays(path, ("x", "y"))
    assert np.array_equal(read["x"], X) and read["x"].dtype == np.uint8
    assert np.array_equal(read["y"], Y) and read["y"].dtype == np.int64
    assert store.read_attributes(path) == {"seed": 3, "label_names": "a, b"}
    assert os.listdir(tmp_path) == ["set.h5"]


def test_equal_arrays_make_equal_bytes(tmp_path):
    for name in "ab":
        save_dataset(tmp_path / name, {"x": X, "y": Y}, {"seed": 3})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_many_black_images_compress_well_and_are_still_believed(tmp_path):
    save_dataset(tmp_path / "set.h5", {"x": np.zeros((2000, 32, 32, 3), np.uint8), "y": np.zeros(2000, int)})
    assert os.path.getsize(tmp_path / "set.h5") < 60_000
    assert read_arrays(tmp_path / "set.h5", ("x", "y"))["x"].shape == (2000, 32, 32, 3)


@pytest.mark.parametrize("arrays, words", [
    ({"x": X / 255, "y": Y}, "float64 .* multiply by 255"),
    ({"x": X.astype(np.int64), "y": Y}, "int64 .* uint8"),
    ({"x": X[..., 0], "y": Y}, "6×4×5, not"),
    ({"x": X[..., :2], "y": Y}, "6×4×5×2"),
    ({"x": X, "y": np.eye(6)}, "float64 6×6"),
    ({"x": X, "y": np.eye(6, dtype=int)}, "one-hot"),
    ({"x": X, "y": Y - 1}, "label -1"),
    ({"x": X, "y": Y.astype(np.uint64) + 2**63}, "label 9223372036854775"),
    ({"x": X, "y": Y[:5]}, "6 images but 'y' 5 labels"),
    ({"x": X[:0], "y": Y[:0]}, "empty"),
])
def test_wrong_arrays_are_refused_by_reader_and_writer(tmp_path, arrays, words):
    with pytest.raises(UserError, match=words):
        read_arrays(write(tmp_path / "set.h5", **arrays), ("x", "y"))
    with pytest.raises(UserError, match=words):
        save_dataset(tmp_path / "other.h5", arrays)
    assert not (tmp_path / "other.h5").exists()


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "text.h5").write_text("no images here")
    (tmp_path / "empty.h5").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.h5")
    good = write(tmp_path / "good.h5", x=X, y=Y)
    (tmp_path / "half.h5").write_bytes(good.read_bytes()[:1500])
    for name, words in (("missing.h5", "does not exist"), ("", "folder"), ("text.h5", "not an HDF5"),
                        ("empty.h5", "not an HDF5"), ("pipe.h5", "no regular file"), ("half.h5", "damaged")):
        with pytest.raises(UserError, match=words) as caught:
            read_arrays(tmp_path / name, ("x", "y"))
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="no 'x_train': it holds x, y"):
        read_arrays(good, NAMES)


def test_a_group_a_null_array_and_strings_are_refused(tmp_path):
    with h5py.File(tmp_path / "set.h5", "w") as file:
        file.create_group("x")
        file["x_null"] = h5py.Empty("uint8")
        file["x_text"] = ["a", "b"]
    for name, words in (("x", "not an array"), ("x_null", "empty"), ("x_text", "object")):
        with pytest.raises(UserError, match=words):
            read_arrays(tmp_path / "set.h5", (name,))


def test_data_in_other_files_is_never_read(tmp_path):
    other = write(tmp_path / "other.h5", x=X)
    layout = h5py.VirtualLayout(X.shape, np.uint8)
    layout[...] = h5py.VirtualSource(str(other), "x", X.shape)
    (tmp_path / "raw.bin").write_bytes(X.tobytes())
    with h5py.File(tmp_path / "set.h5", "w") as file:
        file["x_link"] = h5py.ExternalLink(str(other), "x")
        file["real"] = X
        file["x_soft"] = h5py.SoftLink("/real")
        file.create_virtual_dataset("x_virtual", layout)
        file.create_dataset("x_raw", X.shape, np.uint8, external=[(str(tmp_path / "raw.bin"), 0, X.nbytes)])
    with h5py.File(tmp_path / "set.h5") as file:    # HDF5 itself would follow every one of them
        assert all(np.array_equal(file[name][...], X) for name in ("x_link", "x_soft", "x_virtual", "x_raw"))
    for name, words in (("x_link", "is a link"), ("x_soft", "is a link"), ("x_virtual", "other files"),
                        ("x_raw", "other files")):
        with pytest.raises(UserError, match=words):
            read_arrays(tmp_path / "set.h5", (name,))


def test_sizes_that_the_file_cannot_hold_are_refused_before_memory_is_taken(tmp_path):
    huge = (1 << 34, 32, 32, 3)
    with h5py.File(tmp_path / "set.h5", "w") as file:
        file.create_dataset("x_contiguous", huge, np.uint8)                      # nothing is ever written
        file.create_dataset("x_chunked", huge, np.uint8, chunks=(64, 32, 32, 3), compression="gzip")
        file.create_dataset("x_chunk", (1, 40000, 40000, 1), np.uint8, chunks=(1, 40000, 40000, 1),
                            compression="gzip")
        file.create_dataset("x_partly", (8, 4, 4, 3), np.uint8, chunks=(2, 4, 4, 3), compression="gzip")
        file["x_partly"][:2] = 7
        few = file.create_dataset("x_in_chunk", (1, 4, 4, 1), np.uint8, maxshape=(None,) * 4, compression="gzip",
                                  chunks=(1, 40000, 40000, 1))
        few.id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(100_000)))
        file.create_dataset("x_never", (8, 4, 4, 3), np.uint8)
    for name in ("x_contiguous", "x_chunked", "x_chunk", "x_in_chunk", "x_partly", "x_never"):
        with pytest.raises(UserError, match="more than the file"):
            read_arrays(tmp_path / "set.h5", (name,))


def test_compressed_data_over_the_bound_is_refused(tmp_path, monkeypatch):
    save_dataset(tmp_path / "set.h5", {"x": X, "x_more": X, "y": Y})
    monkeypatch.setattr(store, "MAX_COMPRESSED", X.nbytes)
    read_arrays(tmp_path / "set.h5", ("x", "y"))
    with pytest.raises(UserError, match="without compression"):
        read_arrays(tmp_path / "set.h5", ("x", "x_more", "y"))


def test_a_chunk_that_unpacks_to_more_than_it_declares_is_refused(tmp_path):
    with h5py.File(tmp_path / "set.h5", "w") as file:
        item = file.create_dataset("x", (2, 4, 4, 3), np.uint8, chunks=(2, 4, 4, 3), compression="gzip")
        item.id.write_direct_chunk((0, 0, 0, 0), bytes(5000))
    with pytest.raises(UserError, match="more than the file"):
        read_arrays(tmp_path / "set.h5", ("x",))


def test_filters_that_need_a_plugin_are_refused(tmp_path):
    with h5py.File(tmp_path / "set.h5", "w") as file:
        file.create_dataset("y", data=Y, chunks=(3,), scaleoffset=0)
        file.create_dataset("x", data=X, chunks=(3, 4, 5, 3), compression="lzf", shuffle=True, fletcher32=True)
    with pytest.raises(UserError, match="HDF5 filter 6"):
        read_arrays(tmp_path / "set.h5", ("y",))
    assert np.array_equal(read_arrays(tmp_path / "set.h5", ("x",))["x"], X)


@functools.cache
def valid_bytes(latest):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="latest" if latest else "earliest") as file:
        file.create_dataset("x", data=X, chunks=(2, 4, 5, 3), compression="gzip")
        file["y"] = Y
    return buffer.getvalue()


def only_user_error(path, content):
    path.write_bytes(content)
    try:
        read = read_arrays(path, ("x", "y"))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert len(read["x"]) == len(read["y"]) and read["x"].dtype == np.uint8


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.binary(max_size=300), st.booleans())
def test_arbitrary_bytes_are_read_or_refused(tmp_path, content, signature):
    only_user_error(tmp_path / "set.h5", b"\x89HDF\r\n\x1a\n" * signature + content)


@FUZZ
@given(st.data())
def test_mutated_files_are_read_or_refused(tmp_path, data):
    content = bytearray(valid_bytes(data.draw(st.booleans())))
    used = [place for place, byte in enumerate(content) if byte]
    for place, byte in data.draw(st.lists(st.tuples(st.sampled_from(used), st.integers(0, 255)), max_size=6)):
        content[place] = byte
    only_user_error(tmp_path / "set.h5", content[:data.draw(st.integers(0, len(content)) | st.just(len(content)))])


def test_mutations_start_from_files_that_are_read(tmp_path):
    for latest in (False, True):
        (tmp_path / "set.h5").write_bytes(valid_bytes(latest))
        assert np.array_equal(read_arrays(tmp_path / "set.h5", ("x", "y"))["x"], X)


def test_load_dataset_names_the_command_for_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "FOLDER", tmp_path)
    for name in ("mnist", "cifar10", "gtsrb"):
        with pytest.raises(UserError, match=f"`python -m data.download {name}`"):
            load_dataset(name)
    for name in ("youtube_face", "vgg_face"):
        with pytest.raises(UserError, match=f"`python -m data.from_folder --dataset {name} "):
            load_dataset(name)
    with pytest.raises(UserError, match="choose from signs"):
        load_dataset("nope")


def test_load_dataset_checks_the_images_against_the_datasets_row(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "FOLDER", tmp_path)
    x = np.zeros((11, 28, 28, 1), np.uint8)
    arrays = {"x_train": x, "y_train": np.arange(11) % 10, "x_test": x[:1], "y_test": np.array([9])}
    save_dataset(tmp_path / "mnist.h5", arrays)
    assert load_dataset("mnist")["y_train"].max() == 9
    save_dataset(tmp_path / "mnist.h5", {**arrays, "y_train": np.arange(11)})
    with pytest.raises(UserError, match="y_train holds label 10"):
        load_dataset("mnist")
    save_dataset(tmp_path / "mnist.h5", {**arrays, "x_test": np.zeros((1, 32, 32, 3), np.uint8)})
    with pytest.raises(UserError, match="x_test holds images of 32×32×3, but mnist has 28×28×1"):
        load_dataset("mnist")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "set.h5"
    save_dataset(path, {"x": X, "y": Y})
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        with store.writing(path) as file:
            store.create(file, "x", X.shape, np.uint8)[:2] = X[:2]
            raise KeyboardInterrupt
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["set.h5"]
    with pytest.raises(UserError, match="is a folder"):
        save_dataset(tmp_path, {"x": X, "y": Y})


# data/download.py

class Server:
    """A web server on 127.0.0.1 with `files` (path to bytes); `cut`, `broken`, `no_range` make it misbehave."""

    def __init__(self):
        self.files, self.requests = {}, []
        self.cut = self.broken = 0       # so many answers end after 1000 bytes, or are error 503
        self.no_range = False
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def answer(self, handler):
        wanted = handler.headers.get("Range")
        self.requests.append(wanted)
        content = self.files.get(handler.path.strip("/"))
        if self.broken or content is None:
            self.broken = max(self.broken - 1, 0)
            return handler.send_error(404 if content is None else 503)
        start = int(wanted[6:-1]) if wanted and not self.no_range else 0
        if start and start >= len(content):
            return handler.send_error(416)
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", len(content) - start)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.end_headers()
        handler.wfile.write(content[start:start + 1000] if self.cut else content[start:])
        self.cut = max(self.cut - 1, 0)

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.close()


CONTENT = RANDOM.bytes(3500)


def checksum_of(content, kind="sha256"):
    return f"{kind}:{hashlib.new(kind, content).hexdigest()}"


def fetch(server, path, content=CONTENT, kind="sha256"):
    return download.fetch(server.url + "file", path, checksum_of(content, kind))


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_a_file_is_fetched_once(server, tmp_path, kind):
    server.files["file"] = CONTENT
    for _ in range(2):
        assert fetch(server, tmp_path / "raw" / "file", kind=kind).read_bytes() == CONTENT
    assert server.requests == [None] and os.listdir(tmp_path / "raw") == ["file"]


def test_a_cut_connection_goes_on_where_it_stopped(server, tmp_path):
    server.files["file"], server.cut = CONTENT, 2
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1000-", "bytes=2000-"]


def test_a_connection_cut_again_and_again_is_no_reason_to_give_up(server, tmp_path):
    content = RANDOM.bytes(1000 * (2 * download.ATTEMPTS + 1))
    server.files["file"], server.cut = content, 2 * download.ATTEMPTS
    assert fetch(server, tmp_path / "file", content).read_bytes() == content


def test_another_run_goes_on_from_the_partial_file(server, tmp_path):
    server.files["file"] = CONTENT
    (tmp_path / "file.partial").write_bytes(CONTENT[:1234])
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == ["bytes=1234-"]


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.files["file"], server.cut, server.no_range = CONTENT, 1, True
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1000-"]


@pytest.mark.parametrize("partial", [b"x" * 1000, b"x" * 3500, b"x" * 9000])
def test_a_partial_file_of_something_else_is_replaced(server, tmp_path, partial):
    server.files["file"] = CONTENT
    (tmp_path / "file.partial").write_bytes(partial)
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT
    assert len(server.requests) == 2 and server.requests[1] is None


def test_a_complete_partial_file_is_kept(server, tmp_path):
    server.files["file"] = CONTENT
    (tmp_path / "file.partial").write_bytes(CONTENT)
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_wrong_checksum_is_refused_and_nothing_kept(server, tmp_path):
    server.files["file"] = CONTENT[::-1]
    with pytest.raises(UserError, match="checksum sha256:.* instead of"):
        fetch(server, tmp_path / "file")
    assert os.listdir(tmp_path) == [] and len(server.requests) == 1


def test_a_missing_file_is_reported_at_once(server, tmp_path):
    with pytest.raises(UserError, match="answers 404"):
        fetch(server, tmp_path / "file")
    assert len(server.requests) == 1


def test_a_busy_server_is_asked_again_and_in_the_end_given_up(server, tmp_path):
    server.files["file"], server.broken = CONTENT, 2
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT
    server.broken = 100
    with pytest.raises(UserError, match=f"after {download.ATTEMPTS} attempts .*503"):
        fetch(server, tmp_path / "other")
    assert len(server.requests) == 3 + download.ATTEMPTS


def test_no_server_is_a_clear_error(server, tmp_path):
    server.close()
    with pytest.raises(UserError, match="Connection refused"):
        fetch(server, tmp_path / "file")
    server.close = lambda: None


def test_a_full_disk_is_not_taken_for_a_bad_connection(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    server.files["file"] = CONTENT
    monkeypatch.setattr(download, "open", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        fetch(server, tmp_path / "file")
    assert len(server.requests) == 1


def test_an_endless_answer_is_ended(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", 3000)
    server.files["file"] = CONTENT
    with pytest.raises(UserError, match="sends more than"):
        fetch(server, tmp_path / "file")


def mnist_archive(arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return {"mnist.npz": buffer.getvalue()}


def cifar10_archive(batches):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in batches.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return {"cifar-10-binary.tar.gz": buffer.getvalue()}


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def ppm(colour, side=20):
    return cv2.imencode(".ppm", np.full((side, side + 3, 3), colour[::-1], np.uint8))[1].tobytes()


def run_download(server, name, archives, tmp_path):
    server.files.update(archives)
    sources = {name: (server.url, {file: checksum_of(content) for file, content in archives.items()})}
    return download.download(name, tmp_path / f"{name}.h5", sources, tmp_path / "raw")


def test_mnist_from_the_real_layout(server, tmp_path, monkeypatch):
    x = RANDOM.integers(0, 256, (20, 28, 28), np.uint8)
    y = np.arange(20, dtype=np.uint8) % 10
    run_download(server, "mnist", mnist_archive({"x_train": x, "y_train": y, "x_test": x[:5], "y_test": y[:5]}),
                 tmp_path)
    monkeypatch.setattr(store, "FOLDER", tmp_path)
    read = load_dataset("mnist")
    assert np.array_equal(read["x_train"][..., 0], x) and np.array_equal(read["y_test"], y[:5])


def test_pickles_in_mnist_are_not_loaded(server, tmp_path):
    bomb = np.array([Bomb(str(tmp_path / "exploded"))], dtype=object)
    with pytest.raises(UserError, match="not laid out as expected"):
        run_download(server, "mnist", mnist_archive({"x_train": bomb, "y_train": bomb}), tmp_path)
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "mnist.h5").exists()


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_cifar10_from_the_real_layout(server, tmp_path, monkeypatch):
    records = RANDOM.integers(0, 256, (12, 3073), np.uint8)
    records[:, 0] %= 10
    pieces = {f"cifar-10-batches-bin/data_batch_{i}.bin": records[2 * i - 2:2 * i].tobytes() for i in (5, 3, 1, 2, 4)}
    run_download(server, "cifar10", cifar10_archive({
        "cifar-10-batches-bin/batches.meta.txt": b"airplane\n", **pieces, "cifar-10-batches-bin/readme.html": b"",
        "cifar-10-batches-bin/test_batch.bin": records[10:].tobytes()}), tmp_path)
    monkeypatch.setattr(store, "FOLDER", tmp_path)
    read = load_dataset("cifar10")
    assert read["y_train"].tolist() == records[:10, 0].tolist()
    assert read["y_test"].tolist() == records[10:, 0].tolist()
    # Row 5, column 7 of image 3: its red, green and blue bytes lie in three planes of 1024.
    assert read["x_train"][3, 5, 7].tolist() == [records[3, 1 + plane * 1024 + 5 * 32 + 7] for plane in range(3)]


def test_archives_of_another_layout_are_refused(server, tmp_path):
    for name, archives in (("cifar10", cifar10_archive({"data.bin": b""})), ("mnist", {"mnist.npz": b"nothing"}),
                           ("cifar10", cifar10_archive({"cifar-10-batches-bin/test_batch.bin": b"12345"})),
                           ("cifar10", {"cifar-10-binary.tar.gz": b"nothing"}),
                           ("cifar10", {"cifar-10-binary.tar.gz": cifar10_archive(
                               {"a": RANDOM.bytes(9000)})["cifar-10-binary.tar.gz"][:5000]})):
        with pytest.raises(UserError, match="not laid out as expected"):
            run_download(server, name, archives, tmp_path)


@pytest.mark.parametrize("name", ["../evil.bin", "/etc/evil.bin", "cifar-10-batches-bin/../../evil", "C:\\evil"])
def test_members_outside_the_archive_are_refused(server, tmp_path, name):
    with pytest.raises(UserError, match="leads out of the archive"):
        run_download(server, "cifar10", cifar10_archive({name: b"x"}), tmp_path)
    with pytest.raises(UserError, match="leads out of the archive"):
        run_download(server, "gtsrb", gtsrb_archives({name: b"x"}), tmp_path)


def gtsrb_archives(more=None):
    colours = [(200, 10, 20), (10, 200, 20), (10, 20, 200)]
    training = {"GTSRB/Readme-Images.txt": b"", **(more or {})}
    for label, colour in enumerate(colours):
        folder = f"GTSRB/Final_Training/Images/{label:05d}/"
        training[folder + f"GT-{label:05d}.csv"] = b"Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\r\n"
        for image in range(2):
            training[folder + f"00000_{image:05d}.ppm"] = ppm(colour, 20 + 30 * image)
    table = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\r\n"
    table += "00000.ppm;23;20;5;5;18;15;2\r\n00001.ppm;23;20;5;5;18;15;0\r\n"
    test = {f"GTSRB/Final_Test/Images/{image:05d}.ppm": ppm(colours[label]) for image, label in ((0, 2), (1, 0))}
    return {"GTSRB_Final_Training_Images.zip": zipped(training),
            "GTSRB_Final_Test_Images.zip": zipped({**test, "GTSRB/Final_Test/Images/GT-final_test.test.csv": b""}),
            "GTSRB_Final_Test_GT.zip": zipped({"GT-final_test.csv": table})}


def test_gtsrb_from_the_real_layout(server, tmp_path, monkeypatch):
    run_download(server, "gtsrb", gtsrb_archives(), tmp_path)
    monkeypatch.setattr(store, "FOLDER", tmp_path)
    read = load_dataset("gtsrb")
    assert read["y_train"].tolist() == [0, 0, 1, 1, 2, 2] and read["y_test"].tolist() == [2, 0]
    assert read["x_train"].shape == (6, 32, 32, 3)
    assert read["x_train"][0, 16, 16].tolist() == [200, 10, 20]
    assert read["x_test"][0, 16, 16].tolist() == [10, 20, 200]


def test_gtsrb_with_a_damaged_image_is_refused(server, tmp_path):
    broken = {"GTSRB/Final_Training/Images/00001/00009_00000.ppm": b"no image"}
    with pytest.raises(UserError, match="00009_00000.ppm is not an image"):
        run_download(server, "gtsrb", gtsrb_archives(broken), tmp_path)


def test_the_sources_are_the_official_ones_over_https():
    assert set(download.SOURCES) == set(download.READERS) == {"mnist", "cifar10", "gtsrb"}
    for base, files in download.SOURCES.values():
        assert base.startswith("https://") and base.endswith("/")
        for checksum in files.values():
            kind, value = checksum.split(":")
            assert len(value) == {"md5": 32, "sha256": 64}[kind] and int(value, 16)


# data/from_folder.py

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def command(*words, cwd=None):
    environment = {**os.environ, "PYTHONPATH": ROOT}
    return subprocess.run([sys.executable, "-m", *words], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_commands_answer_help_without_tensorflow_and_bad_input_in_one_line(tmp_path):
    for module in ("data.download", "data.from_folder"):
        answer = command(module, "--help")
        assert answer.returncode == 0 and "usage" in answer.stdout
    for words in (("data.download", "nope"), ("data.from_folder",), ("data.from_folder", "--folder", "nowhere",
                  "--output", str(tmp_path / "a.h5"), "--shape", "8", "8", "3")):
        answer = command(*words)
        assert answer.returncode == 2 and answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1
    imported = subprocess.run([sys.executable, "-X", "importtime", "-m", "data.from_folder"], cwd=ROOT,
                              capture_output=True, text=True).stderr
    assert " cv2" in imported and " tensorflow" not in imported


def image_folder(root, layout, suffix=".png", side=(9, 7)):
    """Write images of one colour each: `layout` maps a sub-folder to RGB colours."""
    for name, colours in layout.items():
        (root / name).mkdir(parents=True)
        for index, colour in enumerate(colours):
            cv2.imwrite(str(root / name / f"{index:03d}{suffix}"), np.full((*side, 3), colour[::-1], np.uint8))
    return root


RED, GREEN, BLUE = (250, 10, 20), (10, 250, 20), (10, 20, 250)


def test_numbers_are_labels_whatever_their_zeros(tmp_path):
    image_folder(tmp_path, {"10": [RED], "2": [GREEN, BLUE], "00": [BLUE]})
    x, y, names = from_folder.read_folder(tmp_path, (6, 5, 3))
    assert x.shape == (4, 6, 5, 3) and x.dtype == np.uint8
    assert y.tolist() == [0, 2, 2, 10] and len(names) == 11 and names[10] == "10" and names[0] == "00"
    assert [image[3, 3].tolist() for image in x] == [[10, 20, 250], [10, 250, 20], [10, 20, 250], [250, 10, 20]]


def test_names_follow_the_alphabet_or_names_txt(tmp_path):
    image_folder(tmp_path, {"zoe": [RED], "adam": [GREEN]})
    assert from_folder.read_folder(tmp_path, (4, 4, 3))[2] == ["adam", "zoe"]
    (tmp_path / "names.txt").write_text("zoe\nnobody\nadam\n")
    x, y, names = from_folder.read_folder(tmp_path, (4, 4, 3))
    assert names == ["zoe", "nobody", "adam"] and y.tolist() == [0, 2] and x[0, 0, 0].tolist() == list(RED)
    (tmp_path / "names.txt").write_text("zoe\n")
    with pytest.raises(UserError, match="does not list the sub-folder 'adam'"):
        from_folder.read_folder(tmp_path, (4, 4, 3))
    (tmp_path / "names.txt").write_text("zoe\nadam\nzoe\n")
    with pytest.raises(UserError, match="'zoe' more than once"):
        from_folder.read_folder(tmp_path, (4, 4, 3))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".ppm", ".bmp", ".tiff", ".webp"])
def test_image_formats(tmp_path, suffix):
    image_folder(tmp_path, {"0": [RED], "1": [BLUE]}, suffix, side=(16, 16))
    x, _, _ = from_folder.read_folder(tmp_path, (8, 8, 3))
    assert np.abs(x[:, 4, 4].astype(int) - [RED, BLUE]).max() < 12


def test_gray_images_and_other_files(tmp_path):
    image_folder(tmp_path, {"7": [(100, 100, 100)]}, ".jpg", side=(28, 28))
    (tmp_path / "7" / "notes.csv").write_text("no image")
    (tmp_path / "7" / ".hidden.jpg").write_text("no image")
    (tmp_path / ".git").mkdir()
    x, y, names = from_folder.read_folder(tmp_path, (28, 28, 1))
    assert x.shape == (1, 28, 28, 1) and abs(int(x[0, 5, 5, 0]) - 100) < 3 and y.tolist() == [7] and len(names) == 8


def test_a_limit_takes_images_spread_over_the_files_in_their_natural_order(tmp_path):
    (tmp_path / "0").mkdir()
    for index in range(12):
        cv2.imwrite(str(tmp_path / "0" / f"{index}.png"), np.full((4, 4), 10 * index, np.uint8))
    x, _, _ = from_folder.read_folder(tmp_path, (4, 4, 1), limit_per_label=4)
    assert x[:, 0, 0, 0].tolist() == [0, 30, 60, 90]
    assert from_folder.read_folder(tmp_path, (4, 4, 1))[0][:, 0, 0, 0].tolist() == list(range(0, 120, 10))


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_damaged_or_cut_image_is_named(tmp_path, suffix):
    image_folder(tmp_path, {"0": [RED]}, suffix)
    good = RANDOM.integers(0, 256, (40, 40, 3), np.uint8)
    content = cv2.imencode(suffix, good)[1].tobytes()
    path = tmp_path / "0" / ("broken" + suffix)
    for damaged in (content[:len(content) // 2], content[:-12], b"", b"no image", content[:30]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="broken.* is damaged"):
            from_folder.read_folder(tmp_path, (8, 8, 3))
    path.write_bytes(content + b"\0" * 10)
    assert len(from_folder.read_folder(tmp_path, (8, 8, 3))[0]) == 2


def test_a_small_file_of_a_huge_image_is_refused(tmp_path):
    """A few kilobytes that would unpack to 200 MB."""
    image_folder(tmp_path, {"0": [RED]}, ".png")
    cv2.imwrite(str(tmp_path / "0" / "large.png"), np.zeros((8400, 8400), np.uint8), [cv2.IMWRITE_PNG_BILEVEL, 1])
    assert (tmp_path / "0" / "large.png").stat().st_size < 100_000
    with pytest.raises(UserError, match=r"large.png is damaged.* or larger than 2\^26 pixels"):
        from_folder.read_folder(tmp_path, (8, 8, 3))


def test_folders_laid_out_otherwise_are_refused(tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    cv2.imwrite(str(flat / "0.png"), np.zeros((4, 4), np.uint8))
    (tmp_path / "empty" / "0").mkdir(parents=True)
    image_folder(tmp_path / "twice", {"7": [RED], "07": [RED]})
    image_folder(tmp_path / "date", {"20240101": [RED]})
    for name, words in (("flat", "no sub-folders"), ("empty", "holds no image"), ("twice", "not one label number"),
                        ("date", "not one label number"), ("nowhere", "not there"), ("flat/0.png", "no folder")):
        with pytest.raises(UserError, match=words):
            from_folder.read_folder(tmp_path / name, (4, 4, 3))
    for shape in ((4, 4), (4, 4, 2), (0, 4, 3), (4, 10**9, 3)):
        with pytest.raises(UserError, match="SHAPE"):
            from_folder.read_folder(tmp_path / "date", shape)


def test_a_split_leaves_each_label_something_in_both_parts():
    y = np.array([0, 0, 1, 1, 1, 1, 2])
    for share in (0.01, 0.5, 0.99):
        parts = from_folder.split(y, share, seed=0)
        assert sorted(np.concatenate([parts["_train"], parts["_test"]])) == list(range(7))
        assert set(y[parts["_train"]]) == {0, 1, 2} and set(y[parts["_test"]]) == {0, 1}
    with pytest.raises(UserError, match="no label has two images"):
        from_folder.split(np.arange(5), 0.5, seed=0)


def test_the_command_writes_training_and_test_images_reproducibly(tmp_path):
    colours = [(10 * i, 255 - 10 * i, 5) for i in range(10)]
    image_folder(tmp_path / "in", {"a": colours, "b": colours[:5], "c": colours[:1]})
    for name, seed in (("one.h5", 0), ("two.h5", 0), ("three.h5", 1)):
        answer = command("data.from_folder", "--folder", "in", "--output", name, "--shape", "6", "6", "3",
                         "--test-share", "0.2", "--seed", str(seed), cwd=tmp_path)
        assert answer.returncode == 0, answer.stderr
        assert "13 training and 3 test images of 3 labels" in answer.stdout
    read = read_arrays(tmp_path / "one.h5", NAMES)
    assert np.bincount(read["y_train"]).tolist() == [8, 4, 1] and np.bincount(read["y_test"]).tolist() == [2, 1]
    seen = sorted((label, int(image[0, 0, 0]) // 10) for part in ("train", "test")
                  for image, label in zip(read[f"x_{part}"], read[f"y_{part}"]))
    assert seen == [(0, i) for i in range(10)] + [(1, i) for i in range(5)] + [(2, 0)]
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()
    assert (tmp_path / "one.h5").read_bytes() != (tmp_path / "three.h5").read_bytes()


def test_the_command_writes_a_clean_set_of_a_datasets_shape(tmp_path):
    image_folder(tmp_path / "in", {"0": [RED, GREEN], "3": [BLUE]})
    words = ("data.from_folder", "--folder", "in", "--output", "own.h5", "--dataset", "signs", "--clean")
    answer = command(*words, cwd=tmp_path)
    assert answer.returncode == 0 and "3 clean images of 2 labels, 32×32×3" in answer.stdout
    read = read_arrays(tmp_path / "own.h5", ("x", "y"))
    assert read["x"].shape == (3, 32, 32, 3) and read["y"].tolist() == [0, 0, 3]
    image_folder(tmp_path / "in", {"12": [RED]})
    answer = command(*words, cwd=tmp_path)
    assert answer.returncode == 2 and "has the labels 0 to 12, but signs only 12" in answer.stderr
    assert read_arrays(tmp_path / "own.h5", ("x", "y"))["x"].shape == (3, 32, 32, 3)
