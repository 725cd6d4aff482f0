"""The receiving end of a distribution, on each machine: an order from stdin, then the bytes that it announces.

    {"folder": ..., "files": ..., "pieces": ...}  ->  PREFIX {"number": 1, "answer": {"has": false}}
    the pieces, one behind the other              ->  PREFIX {"number": 2, "answer": {"machine": ...}}

It speaks as the doctor's probe does, and is started in the same way. The folder gets its name when every byte has had the
checksum that the order said and is on the disk. If the connection ends, nothing is left of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import xxhash

from gemini_gnn.cluster.doctor.probe import PREFIX
from gemini_gnn.cluster.installation import sources
from gemini_gnn.errors import PartitionError
from gemini_gnn.files import read_record
from gemini_gnn.graph.array_folder import locked, new_folder, write_json
from gemini_gnn.graph.partition import held
from gemini_gnn.graph.partition.folder import PartitionedGraph

LOCK_S = 30.0  # for another distribution to this machine
STALL_S = 120  # without a byte: its sshd may never say that the sender is gone
DISK_S = 600  # to force a file to the disk
STEP_BYTES = 1 << 20


def main() -> None:
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(STALL_S)
    order = json.loads(sys.stdin.buffer.readline())
    number, folder = 1, Path(order["folder"])
    try:
        if order["sources"] != sources():
            raise PartitionError(
                f"another version of gemini_gnn: expected sources {order['sources']}; got {sources()} in "
                f"{Path(__file__).parents[3]}. Copy the project there"
            )
        with locked(folder, LOCK_S, lambda text: print(text, flush=True)):
            has = stands(order, folder)
            if not has:
                expect_room(order, folder)
            _answer(number, has=has)
            number = 2
            if not has:
                receive(order, folder, sys.stdin.buffer)
                _answer(number, machine=os.uname().nodename)
    except (OSError, PartitionError) as error:
        _answer(number, problem=str(error))


def stands(order: Mapping[str, Any], folder: Path) -> bool:
    """Whether all of the order is in ``folder`` already; see :func:`held.stands`."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    found = read_record(folder / "meta.json")
    if not held.stands(folder, order["meta"], order["parts"], found, held.read(folder), os.uname().nodename):
        return False
    PartitionedGraph.open(folder)  # refuses files of another size
    return True


def expect_room(order: Mapping[str, Any], folder: Path) -> None:
    place = folder
    while not place.is_dir():
        place = place.parent
    expected = sum(end - begin for _, begin, end, _ in order["pieces"])
    if (free := shutil.disk_usage(place).free) < expected:
        raise PartitionError(
            f"no room in {place}: expected {expected:,} bytes; got {free:,} that are free. Free some, or name another "
            "folder with --to"
        )


def receive(
    order: Mapping[str, Any], folder: Path, stream: BinaryIO, deadline: Callable[[int], object] = signal.alarm
) -> None:
    """Write the pieces that ``stream`` brings, verified, under a temporary name; then rename.

    Args:
        deadline: told how many seconds the next byte may take.

    Raises:
        PartitionError: the stream ends early or stalls, a piece is damaged, or the disk is full. ``folder`` is as before.
    """
    meta, parts = order["meta"], tuple(order["parts"])
    pieces: list[held.Piece] = [(name, begin, end, sum_) for name, begin, end, sum_ in order["pieces"]]
    with new_folder(folder, replaces=True) as place:
        for name, size in order["files"].items():
            with open(place / f"{name}.npy", "xb") as file:
                file.truncate(size)
                for piece in pieces:
                    if piece[0] == name:
                        _write(file, piece, stream, deadline)
                file.flush()
                deadline(DISK_S)
                os.fsync(file.fileno())
        if len(parts) < meta["parts"]:
            divided = [piece for piece in pieces if piece[0] in held.DIVIDED]
            record = {"format_version": 1, "machine": os.uname().nodename, "fingerprint": meta["fingerprint"]}
            write_json(place, record | {"parts": parts, "pieces": divided}, held.RECORD)
        write_json(place, meta, "meta.json")


def _write(file: BinaryIO, piece: held.Piece, stream: BinaryIO, deadline: Callable[[int], object]) -> None:
    name, begin, end, expected = piece
    hasher, buffer = xxhash.xxh3_128(), memoryview(bytearray(STEP_BYTES))
    file.seek(begin)
    while begin < end:
        deadline(STALL_S)
        some = buffer[: stream.readinto(buffer[: end - begin])]  # type: ignore[attr-defined]
        if not some:
            raise PartitionError(f"the connection ended at byte {begin} of {name}.npy; distribute again")
        hasher.update(some)
        file.write(some)
        begin += len(some)
    if hasher.hexdigest() != expected:
        raise PartitionError(
            f"{name}.npy was damaged on its way: expected checksum {expected} of bytes {piece[1]}..{end - 1}; got "
            f"{hasher.hexdigest()}. Distribute again"
        )


def _give_up(*_: object) -> NoReturn:
    raise PartitionError(f"nothing came, or the disk did not answer, for {STALL_S} s or longer; distribute again")


def _answer(number: int, **answer: Any) -> None:
    print(PREFIX + json.dumps({"number": number, "answer": answer}), flush=True)


if __name__ == "__main__":
    main()
