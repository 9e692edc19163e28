"""Atomic writes, errors that name the file, and the lock that keeps two runs apart."""

import errno
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def naming(path, temporary=None):
    """Makes an OSError raised within name `path` if it names no file, as those of failed writes, or `temporary`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(temporary):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def replacing(path):
    """A binary file to write, which replaces `path` when complete on disk; the last writer wins. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path, temporary):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink()


def sync_folder(folder):
    """Make renames in a folder survive a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(path):
    """The open file `path`, locked until it is closed or this process ends; without the lock on Windows, and on file
    systems that have none, as some of a network. Raises BlockingIOError if another process holds it."""
    file = open(path, "a")  # noqa: SIM115 - stays open
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError:
        pass
    return file


def check_writable(path):
    """Raises OSError if `path` cannot be written. Missing folders are fine: they are made later."""
    path = Path(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    with naming(path):
        if path.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.", suffix=".tmp"):
            pass
