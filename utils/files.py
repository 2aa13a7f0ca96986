"""Files that are written whole or not at all."""

import contextlib
import io
import os
import pathlib
import tempfile

import h5py


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; on success it takes `path`'s place at once, otherwise it is removed.

    A reader, or a process killed at any moment, sees the old file or the new one, never half of one. The
    temporary name keeps `path`'s suffix, since libraries choose their format by it. Raises OSError where the disk
    is full or the folder may not be written.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-", suffix="-" + path.name)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def new_hdf5(path):
    """Yield an open HDF5 file that takes `path`'s place when the block ends without an error.

    Raises OSError where the disk is full or the folder may not be written.
    """
    with replacing(path) as temporary, _Disk(temporary, "r+") as disk:
        try:
            with h5py.File(disk, "w") as file:
                yield file
        finally:
            if disk.failed:
                raise OSError(disk.failed.errno, disk.failed.strerror, str(path))


class _Disk(io.FileIO):
    """Keeps its first failed write to itself, in `failed`: the HDF5 library crashes where a file cannot grow."""

    failed = None

    def write(self, data):
        data, done = memoryview(data).cast("B"), 0
        try:
            while done < len(data) and not self.failed:
                done += super().write(data[done:])
        except OSError as error:
            self.failed = error
        return len(data)
