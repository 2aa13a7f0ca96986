"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib
import re
import tempfile

import h5py

from utils.config import UserError


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

    Raises UserError where the disk is full, OSError where the folder may not be written.
    """
    try:
        with replacing(path) as temporary, h5py.File(temporary, "w") as file:
            yield file
    except (OSError, RuntimeError) as error:        # h5py reports a full disk as either, at length
        reason = re.search(r"error message = '([^']*)'", str(error))
        if reason is None:
            raise
        raise UserError(f"{path} could not be written ({reason[1]}): check the disk's space") from error
