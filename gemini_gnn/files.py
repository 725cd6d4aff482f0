"""Files that are whole and still there after a loss of power: first the contents, then the name, then the folder with it."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to storage."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if (
            error.errno != errno.EINVAL or not path.is_dir()
        ):  # some network file systems do so by themselves, and refuse
            raise
    finally:
        os.close(descriptor)


def rename(temporary: Path, path: Path) -> None:
    """Replace ``path`` by ``temporary``: whenever the power is lost, the old or the new one is there, whole."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_atomically(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Replace ``path`` by ``content``: a reader sees the old or the new file, never a part. ``mode`` is cut by the umask."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    rename(temporary, path)
