"""Files that are whole and still there after a loss of power: first the contents, then the name, then the folder with it.

Imports nothing heavy: agents load it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to storage."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems need no sync of a folder
            raise
    finally:
        os.close(descriptor)


def rename(temporary: Path, path: Path) -> None:
    """Replace ``path`` by ``temporary``: whenever the power is lost, the old or the new one is there, whole."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_atomically(path: Path, content: str | bytes, mode: int = 0o666, durable: bool = True) -> None:
    """Replace ``path`` by ``content``: a reader sees the old or the new file, never a part.

    Args:
        mode: cut by the umask.
        durable: wait until the file is on storage. News of a living job does without: a recovery may not wait for a disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    if durable:
        rename(temporary, path)
    else:
        os.replace(temporary, path)


def write_if_new(path: Path, content: str) -> None:
    """:func:`write_atomically`, unless ``path`` says this already: a recovery may not wait for a disk."""
    if not path.exists() or path.read_bytes() != content.encode():
        write_atomically(path, content)


def create(path: Path, text: str, mode: int = 0o666) -> bool:
    """Write a new file; False, and nothing is changed, where ``path`` exists. Of all that try at once, one succeeds.

    Args:
        mode: cut by the umask.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        _write_new(temporary, text, mode)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            _write_new(path, text, mode)  # a file system without links: a reader may see a part
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def _write_new(path: Path, text: str, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# Of the file systems that people name run directories on, those that lie on disks or in the memory of one machine.
LOCAL = ("btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs")


def file_system(path: Path, mounts: str) -> str:
    """The type of the file system that ``path`` is on: ``ext4``, ``tmpfs``, ``nfs4``, ``lustre``, ... Pure.

    Args:
        path: absolute, without symbolic links. mounts: as ``/proc/self/mountinfo`` says.
    """
    best, found = -1, ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4]))
        if path.is_relative_to(point) and len(point.parts) >= best:  # of two at one point the later one is seen
            best, found = len(point.parts), after.split()[0]
    return found


def local_file_system(path: Path, mounts: str) -> str:
    """The :func:`file_system` of ``path`` if no other machine sees it; else empty. Pure."""
    found = file_system(path, mounts)
    return found if found in LOCAL else ""


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty where there is no such file, or no whole one."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        record = json.loads(path.read_text())
        if isinstance(record, dict):
            return record
    return {}
