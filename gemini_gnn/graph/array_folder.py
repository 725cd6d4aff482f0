"""A folder of .npy files and a JSON: written durably under another name and renamed, so that it is whole or not there.

No pickle: object arrays are refused, ``np.load(allow_pickle=False)``. Every array has the xxh3_128 of its file in the JSON.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gemini_gnn.errors import PartitionError
from gemini_gnn.files import sync
from gemini_gnn.graph.sparse import SparseRows

Progress = Callable[[str], None]  # told one line of text now and then
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def new_folder(folder: Path, replaces: bool = False) -> Iterator[Path]:
    """A folder to write into that takes the name ``folder``, durably, when the block ends well, else vanishes.

    Args:
        replaces: a folder of this name may be there, and stays until then.
    """
    if folder.exists() and not replaces and (not folder.is_dir() or any(folder.iterdir())):
        raise PartitionError(f"expected a new or empty folder; {folder} exists; delete it or choose another")
    place, old = (folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp" for _ in range(2))
    try:
        place.mkdir(parents=True)
        try:
            yield place
            sync(place)
            if replaces and folder.exists():
                os.rename(folder, old)
            os.rename(place, folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(place, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(folder: Path, error: OSError) -> PartitionError:
    return PartitionError(
        f"cannot write {folder}: {error.strerror or error}; free some room or choose another place with "
        "partition.folder, dataset.cache or --to"
    )


def write_array(folder: Path, name: str, dtype: Any, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> str:
    """Write ``name``.npy from pieces along the first axis; the xxh3_128 of the file.

    Through ``write``, not a mapping: a full disk is then an error instead of a SIGBUS.
    """
    import xxhash

    dtype = np.dtype(dtype)
    if dtype.hasobject:
        raise PartitionError(f"{name}: expected numbers or text; got Python objects; convert it with .astype(str)")
    hasher, rows = xxhash.xxh3_128(), 0
    with open(folder / f"{name}.npy", "wb") as file:
        np.lib.format.write_array_header_2_0(
            file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
        )
        file.flush()
        with open(folder / f"{name}.npy", "rb") as header:
            hasher.update(header.read())
        for piece in pieces:
            data = np.ascontiguousarray(piece, dtype=dtype)
            assert data.shape[1:] == tuple(shape[1:]), name
            rows += len(data)
            if data.nbytes:
                flat = data.view(np.uint8).reshape(-1).data
                file.write(flat)
                hasher.update(flat)
        assert rows == shape[0], f"{name}: {rows} rows of {shape[0]}"
        file.flush()
        os.fsync(file.fileno())
    return hasher.hexdigest()


def write_json(folder: Path, value: Mapping[str, Any], name: str) -> None:
    with open(folder / name, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_json(folder: Path, name: str, what: str, versions: Sequence[int]) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PartitionError(
            f"expected {what} in {folder}; there is no {name}; correct the path, or name a new folder for "
            "launch/partition.py to make"
        ) from None
    except (OSError, ValueError) as error:
        raise PartitionError(f"{folder / name} cannot be read ({error}); delete the folder and make it again") from None
    found = value.get("format_version") if isinstance(value, dict) else None
    if found not in versions:
        expected = " or ".join(map(str, versions))
        raise PartitionError(
            f"{folder}: expected format version {expected}; got {found}; delete the folder and make it again"
        )
    return value


def map_array(folder: Path, name: str) -> np.ndarray:
    path = folder / f"{name}.npy"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PartitionError(f"{path} is missing or damaged ({error}); delete the folder and make it again") from None
    return array.view(np.ndarray)  # np.memmap's own slicing costs microseconds


def map_shaped(folder: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    array = map_array(folder, name)
    if array.shape != shape:
        raise PartitionError(
            f"{folder / name}.npy: expected shape {list(shape)} as the other files say; got {list(array.shape)}; "
            "delete the folder and make it again"
        )
    return array


def map_features(folder: Path, names: Container[str], rows: int, width: int) -> np.ndarray | SparseRows:
    """The features of a folder with the arrays ``names``: ``x``; or ``x_ptr``, ``x_index``, and ``x_value`` unless all are 1."""
    if "x_ptr" not in names:
        return map_shaped(folder, "x", (rows, width))
    ptr = map_shaped(folder, "x_ptr", (rows + 1,))
    stored = (int(ptr[-1]),)
    index = map_shaped(folder, "x_index", stored)
    return SparseRows(ptr, index, map_shaped(folder, "x_value", stored) if "x_value" in names else None, width)


def verify_arrays(folder: Path, checksums: Mapping[str, str], pieces: Iterable[tuple[str, int, int, str]] = ()) -> None:
    """Compare the checksums of files, and of pieces of files: (array, first byte, one behind the last, checksum)."""
    import xxhash

    whole = [(name, 0, sys.maxsize, expected) for name, expected in checksums.items()]
    for name, begin, end, expected in [*whole, *pieces]:
        hasher = xxhash.xxh3_128()
        try:
            with open(folder / f"{name}.npy", "rb") as file:
                file.seek(begin)
                while piece := file.read(min(8 << 20, end - file.tell())):
                    hasher.update(piece)
        except OSError as error:
            raise PartitionError(f"{folder / name}.npy cannot be read: {error.strerror or error}") from None
        if hasher.hexdigest() != expected:
            raise PartitionError(
                f"{folder / name}.npy: expected checksum {expected}; got {hasher.hexdigest()}: the file was damaged "
                "or changed; delete the folder and make it again"
            )


@contextmanager
def locked(folder: Path, timeout_s: float, say: Progress, setting: str = "") -> Iterator[None]:
    """Be the only one that makes ``folder``; where the file system knows no locks, go on without.

    Args:
        setting: that ``timeout_s`` comes from.

    Raises:
        PartitionError: no lock within ``timeout_s``, or the place cannot be written.
    """
    deadline = time.monotonic() + timeout_s
    path = folder.parent / f".{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise unwritable(folder, error) from error
    with file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    say(f"waiting for another process that makes {folder}")
                    told = True
                if time.monotonic() > deadline:
                    raise PartitionError(
                        f"expected {folder} from the process that holds {path} within {timeout_s:.0f} s; look for that "
                        f"process{f', or raise {setting}' if setting else ''}"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                break
            else:
                for left in folder.parent.glob(f".{glob.escape(folder.name)}.????????.tmp"):
                    shutil.rmtree(left, ignore_errors=True)  # of a maker that was killed
                break
        yield


@contextmanager
def ticking(what: str, say: Progress, every_s: float = 2.0) -> Iterator[None]:
    """Say ``what`` and the seconds so far, every now and then, while the block runs."""
    began = time.monotonic()
    over = threading.Event()

    def tick() -> None:
        while not over.wait(every_s):
            say(f"{what}, {time.monotonic() - began:.0f} s")

    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
