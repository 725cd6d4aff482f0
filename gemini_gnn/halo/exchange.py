"""Rows and answers from the ranks that own them: ids one way, data the other, by ``all_to_all_single``.

Ownership. A :class:`HaloExchange` has a process group of its own: no other code issues collectives on it, and one thread
at a time uses it (checked). Gradients move on another group, from another thread. With gloo that is enough: the exchange
may run in a background thread. With NCCL it is not: two communicators used from two threads deadlock unless every rank
issues all its collectives in one order. So with NCCL the training thread calls the exchange at one fixed point of the step,
and the background thread only samples; ``prefetch(prepare, ..., complete=)`` says which part runs where. NCCL was never
run here with more than one rank: that path is unproven.

Protocol of one call, the same on every rank, also on a rank that asks for nothing:

1. *header*: all_gather of (status, operation, bytes per entry, checksum of the bounds, ids asked of each rank). Now
   every rank knows the whole count matrix, and the number of rounds is a function of it: never a private decision.
2. *ids*: all_to_all_single, no message longer than ``chunk_bytes`` (one entry if that alone is longer).
3. *rows* back in the same way. :meth:`HaloExchange.ask` computes its answers first and says in a second header how long
   they are.

Failures. If a rank fails while it prepares its part (bad ids, an exception in the answer callback), it still takes part in
the next header, with status "failed"; the others raise ExchangeError at once and name it. If a rank fails between header
and data, dies or hangs, the others are inside a collective: gloo reports a closed connection within a second, and a silent
peer after ``timeout_s``. Both become an ExchangeError chained to the library's error, and the exchange is *broken*: the
data on its wires is unknown, so every later call raises at once and the job must form new groups. Nothing here retries. A
message is never lost unless a peer is lost.
"""

from __future__ import annotations

import datetime
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist

from gemini_gnn.errors import ExchangeError, PeerLost
from gemini_gnn.halo import plan
from gemini_gnn.halo.rows import copy_rows, empty_rows

Rows: TypeAlias = "torch.Tensor | Callable[[np.ndarray], torch.Tensor]"
Answer: TypeAlias = "Callable[[np.ndarray], tuple[np.ndarray, list[np.ndarray]]]"

_ROWS, _ASK, _ANSWERS = 1, 2, 3
_NAMES = {_ROWS: "rows", _ASK: "questions", _ANSWERS: "answers"}
_FIELDS = 4  # of a header, before the counts: failed, operation, entry bytes, checksum of the bounds


@dataclass
class Traffic:
    """The data an exchange has moved since :meth:`HaloExchange.take_traffic`.

    Attributes:
        sent_bytes, received_bytes: int64 ``[world]`` per peer, ids and lengths included; 0 at this rank.
        calls: of ``rows``, ``fetch`` and ``ask``.
        seconds: spent in them, of which
        meet_s: waiting for the headers, that is for the slowest rank to come.
    """

    sent_bytes: np.ndarray
    received_bytes: np.ndarray
    calls: int = 0
    seconds: float = 0.0
    meet_s: float = 0.0

    @classmethod
    def none(cls, world: int) -> Traffic:
        return cls(np.zeros(world, np.int64), np.zeros(world, np.int64))


class HaloExchange:
    """Collective look-ups in data that is spread over the ranks by ``bounds``. All ranks call the same methods in the
    same order, from one thread each.

    Args:
        group: process group of its own (gloo or NCCL); None where the world has one rank.
        bounds: int64 ``[world + 1]``; rank r owns the nodes ``bounds[r]..bounds[r + 1] - 1`` (new ids).
        rank: of this process within ``group``.
        chunk_bytes: longest message to one peer. A rank holds up to ``world * chunk_bytes`` in flight.
        timeout_s: longest wait for the other ranks in one collective.
        device: where messages live: cpu for gloo, the rank's GPU for NCCL.

    Raises:
        ValueError: group, rank and bounds do not fit together.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        bounds: np.ndarray,
        rank: int,
        *,
        chunk_bytes: int,
        timeout_s: float,
        device: torch.device | str = "cpu",
    ) -> None:
        self.bounds = plan.check_bounds(bounds)
        self.world = len(self.bounds) - 1
        self.rank = rank
        self.device = torch.device(device)
        self.chunk_bytes = chunk_bytes
        self.timeout_s = timeout_s
        if not 0 <= rank < self.world:
            raise ValueError(f"expected a rank in 0..{self.world - 1}; got {rank}")
        if group is None and self.world > 1:
            raise ValueError(f"an exchange of {self.world} ranks needs a process group of its own; got None")
        if group is not None and (group.size() != self.world or group.rank() != rank):
            raise ValueError(
                f"the group has rank {group.rank()} of {group.size()}; the bounds say rank {rank} of {self.world}"
            )
        self._group = group
        self._checksum = zlib.crc32(self.bounds.tobytes())
        self._busy = threading.Lock()
        self._broken: str | None = None
        self._agreed = False  # all ranks know that the call under way has failed and ended here: still in step
        self._traffic = Traffic.none(self.world)
        self._buffers: dict[str, torch.Tensor] = {}

    @property
    def begin(self) -> int:
        return int(self.bounds[self.rank])

    @property
    def end(self) -> int:
        return int(self.bounds[self.rank + 1])

    def take_traffic(self) -> Traffic:
        """The counters, which start again at zero. Call it between epochs, when no exchange is under way."""
        taken, self._traffic = self._traffic, Traffic.none(self.world)
        return taken

    # -- collective calls ----------------------------------------------------------------------------------------------

    def rows(self, ids: np.ndarray, local: Rows) -> torch.Tensor:
        """The rows of ``ids``, in their order. Collective.

        Args:
            ids: integer new ids, any order. Repeated ids are answered and paid for once each: pass unique ones.
            local: ``[owned, width]``, or a function from int64 row numbers ``0..owned-1`` to ``[numbers, width]``.

        Returns:
            ``[ids, width]`` in the dtype of ``local``, on ``device``; bit for bit what the owners hold.

        Raises:
            ExchangeError: another rank failed, died or did not come in time; ValueError: an id outside the graph.
        """
        with self._call():
            with self._or_tell(_ROWS):
                split = plan.split(ids, self.bounds, self.rank)
                if isinstance(local, torch.Tensor):
                    own, numbers = local, split.own_local
                else:
                    own, numbers = local(split.own_local), np.arange(len(split.own))
                out = empty_rows(len(split), own.shape[1], own.dtype, self.device)
                copy_rows(own, numbers, out, split.own)
            self._fetch(split, local, out)
            return out

    def fetch(self, split: plan.Split, local: Rows, out: torch.Tensor) -> None:
        """``out[split.remote]`` = the rows of ``split.remote_ids``; other rows are left alone. Collective.

        Args:
            split: of the ids by these ``bounds`` and this rank.
            local: as in :meth:`rows`: what this rank answers from.
            out: ``[ids, width]`` contiguous, on ``device``, in the dtype of ``local``.

        Raises:
            ExchangeError: another rank failed, died or did not come in time.
        """
        with self._call():
            self._fetch(split, local, out)

    def ask(
        self, ids: np.ndarray, answer: Answer, dtypes: Sequence[np.dtype | type]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Answers of variable length from the owners of ``ids``, for example their sampled neighbors. Collective.

        Args:
            ids: integer new ids, any order, own ones too.
            answer: called once, with the ids that all ranks asked of this one (int64, by asking rank, possibly none);
                returns ``(counts, columns)``: entries per id, and flat columns of ``sum(counts)`` entries each.
            dtypes: of the columns, the same on all ranks.

        Returns:
            ``(counts int64 [ids], columns)``, the columns concatenated in the order of ``ids``.

        Raises:
            ExchangeError: another rank failed, died or did not come in time; what ``answer`` raised, on its own rank.
        """
        kinds = [np.dtype(kind) for kind in dtypes]
        entry_bytes = sum(kind.itemsize for kind in kinds)
        with self._call():
            with self._or_tell(_ASK):
                ids = np.ascontiguousarray(ids, dtype=np.int64)
                order, asked_of = plan.by_owner(ids, self.bounds)
            if self.world == 1:
                counts, columns = answer(ids)
                return _checked(counts, columns, len(ids), kinds)
            questions = self._meet(_ASK, entry_bytes, asked_of)
            asked = self._array("ids", ids[order], questions)
            with self._or_tell(_ANSWERS):
                self._check_owned(asked - self.begin)
                counts, columns = _checked(*answer(asked), len(asked), kinds)
                lengths = plan.group_sums(counts, questions[:, self.rank])
            answers = self._meet(_ANSWERS, entry_bytes, lengths)
            counts = self._array("lengths", counts, questions.T)
            columns = [self._array(f"column {k}", column, answers) for k, column in enumerate(columns)]
        if np.all(order[1:] > order[:-1]):  # asked owner by owner: so the answers stand in the order of the ids
            return counts, columns
        counts, positions = plan.segment_order(order, counts)
        return counts, [column[positions] for column in columns]

    # -- the steps of the protocol -------------------------------------------------------------------------------------

    def _fetch(self, split: plan.Split, local: Rows, out: torch.Tensor) -> None:
        if self.world == 1:
            return
        assert out.is_contiguous() and out.device.type == self.device.type
        width = out.shape[1] * out.element_size()
        matrix = self._meet(_ROWS, width, split.counts)
        asked = self._array("ids", split.remote_ids, matrix) - self.begin
        self._check_owned(asked)

        def pack(part: slice | np.ndarray, buffer: torch.Tensor) -> None:
            numbers = asked[part]
            if isinstance(local, torch.Tensor):
                copy_rows(local, numbers, buffer.view(out.dtype), np.arange(len(numbers)))
            else:
                buffer.view(out.dtype).copy_(local(numbers))

        def place(part: slice | np.ndarray, received: torch.Tensor) -> None:
            copy_rows(received.view(out.dtype), np.arange(len(received)), out, split.remote[part])

        self._move("rows", matrix.T, width, pack, place)

    def _array(self, what: str, array: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """Exchange a flat array: ``matrix[i, j]`` entries from rank i to rank j, grouped by peer on both sides."""
        width = array.dtype.itemsize
        received = np.empty(int(matrix[:, self.rank].sum()), dtype=array.dtype)
        source = torch.from_numpy(array.view(np.uint8).reshape(-1, width))
        target = torch.from_numpy(received.view(np.uint8).reshape(-1, width))

        def pack(part: slice | np.ndarray, buffer: torch.Tensor) -> None:
            buffer.copy_(source[part])

        def place(part: slice | np.ndarray, piece: torch.Tensor) -> None:
            target[part] = piece.to(target.device)

        self._move(what, matrix, width, pack, place)
        return received

    def _move(
        self,
        what: str,
        matrix: np.ndarray,
        width: int,
        pack: Callable[[slice | np.ndarray, torch.Tensor], None],
        place: Callable[[slice | np.ndarray, torch.Tensor], None],
    ) -> None:
        """Entries of ``width`` bytes, ``matrix[i, j]`` of them from rank i to rank j, in as many rounds as chunks need.

        Everything travels as bytes: gloo knows no int16, and one code path serves every dtype.
        """
        limit = plan.limit(width, self.chunk_bytes)
        for turn in plan.rounds(matrix, self.rank, limit):
            sent = self._buffer("sent", sum(turn.send_counts), width)
            received = self._buffer("received", sum(turn.receive_counts), width)
            pack(turn.send, sent)
            with self._collective(f"all_to_all_single of {what}"):
                work = dist.all_to_all_single(
                    received, sent, turn.receive_counts, turn.send_counts, group=self._group, async_op=True
                )
                self._wait(work)
            place(turn.receive, received)
        sent_bytes, received_bytes = matrix[self.rank] * width, matrix[:, self.rank] * width
        sent_bytes[self.rank] = received_bytes[self.rank] = 0
        self._traffic.sent_bytes += sent_bytes
        self._traffic.received_bytes += received_bytes

    def _wait(self, work: Any) -> None:
        """Until ``work`` is done.

        Raises:
            RuntimeError: it failed, or the time is over.
        """
        if self.device.type == "cpu":
            work.wait(datetime.timedelta(seconds=self.timeout_s))
            return
        # Given a time limit, NCCL's own wait looks every 10 ms: a step may be shorter.
        deadline = time.monotonic() + self.timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError("timed out")
            time.sleep(50e-6)
        work.wait()  # raises what went wrong, and has the compute stream wait for what went right

    def _buffer(self, name: str, rows: int, width: int) -> torch.Tensor:
        """uint8 ``[rows, width]``, reused from call to call: the page faults of new memory cost as much as a copy."""
        if name not in self._buffers or self._buffers[name].numel() < rows * width:
            self._buffers[name] = torch.empty(rows * width, dtype=torch.uint8, device=self.device)
        return self._buffers[name][: rows * width].view(rows, width)

    def _meet(self, operation: int, entry_bytes: int, counts: np.ndarray, failed: bool = False) -> np.ndarray:
        """Exchange headers; the count matrix, int64 ``[world, world]``."""
        began = time.perf_counter()
        mine = torch.from_numpy(
            np.concatenate([np.array([failed, operation, entry_bytes, self._checksum]), counts]).astype(np.int64)
        ).to(self.device)
        everyone = torch.empty((self.world, len(mine)), dtype=torch.int64, device=self.device)
        with self._collective(f"all_gather of the header ({_NAMES[operation]})"):
            work = dist.all_gather(list(everyone), mine, group=self._group, async_op=True)
            self._wait(work)
            headers = everyone.cpu().numpy()
        self._traffic.meet_s += time.perf_counter() - began
        failures = np.flatnonzero(headers[:, 0])
        self._agreed = len(failures) > 0
        if len(failures) and not failed:
            raise PeerLost(
                f"rank {self.rank}: {_ranks(failures)} failed while preparing {_NAMES[operation]}; "
                "the first error is in the log of that rank"
            )
        if not failed:
            differing = np.flatnonzero((headers[:, 1:_FIELDS] != headers[self.rank, 1:_FIELDS]).any(axis=1))
            if len(differing):
                raise ExchangeError(
                    f"rank {self.rank}: expected {_describe(headers[self.rank])} on every rank; got "
                    + "; ".join(f"rank {r}: {_describe(headers[r])}" for r in differing)
                    + ". All ranks must make the same calls in the same order on the same partition and dtype"
                )
        return headers[:, _FIELDS:]

    def _check_owned(self, rows: np.ndarray) -> None:
        owned = self.end - self.begin
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= owned):
            raise ExchangeError(
                f"rank {self.rank} owns nodes {self.begin}..{self.end - 1} but was asked for "
                f"{int(rows.min()) + self.begin}..{int(rows.max()) + self.begin}: memory or the network corrupted ids"
            )

    # -- failures ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _call(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("two threads use one HaloExchange: its collectives need one order on all ranks")
        began = time.perf_counter()
        try:
            if self._broken is not None:
                raise PeerLost(f"rank {self.rank}: an earlier exchange failed ({self._broken}); restart the job")
            self._agreed = self.world == 1
            self._traffic.calls += 1
            yield
        except BaseException as error:
            if not self._agreed:
                self._broken = self._broken or f"{type(error).__name__}: {error}"[:200]
            raise
        finally:
            self._traffic.seconds += time.perf_counter() - began
            self._busy.release()

    @contextmanager
    def _or_tell(self, operation: int) -> Iterator[None]:
        """If this rank fails in the block, it still takes part in the header that the others wait in, and says so there."""
        try:
            yield
        except Exception:
            if self.world > 1:
                with suppress(ExchangeError):  # the others are gone too; what this rank failed with is the error to see
                    self._meet(operation, 0, np.zeros(self.world, np.int64), failed=True)
            raise

    @contextmanager
    def _collective(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are all of this kind
            reason = str(error).splitlines()[0][:200]
            peers = [r for r in range(self.world) if r != self.rank]
            raise ExchangeError(
                f"rank {self.rank}: {name} with {_ranks(np.array(peers))} failed after "
                f"{time.perf_counter() - began:.1f} s (limit {self.timeout_s:g} s): {reason}. "
                "A rank died, hangs or made fewer calls than the others: look for the first error in the logs of those "
                "ranks; if a machine is merely slow, raise distributed.timeout_s"
            ) from error


def _checked(
    counts: np.ndarray, columns: list[np.ndarray], asked: int, kinds: list[np.dtype]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """An answer in the promised form.

    Raises:
        ValueError: it is not.
    """
    counts = np.asarray(counts, dtype=np.int64)
    total = int(counts.sum())
    if len(counts) != asked or len(columns) != len(kinds) or any(len(column) != total for column in columns):
        raise ValueError(
            f"expected {asked} counts and {len(kinds)} columns of sum(counts) entries; got {len(counts)} counts "
            f"with sum {total} and columns of {[len(column) for column in columns]}"
        )
    for column, kind in zip(columns, kinds, strict=True):
        if column.dtype != kind:
            raise ValueError(f"expected columns of {[str(k) for k in kinds]}; got {[str(c.dtype) for c in columns]}")
    return counts, [np.ascontiguousarray(column) for column in columns]


def _ranks(numbers: np.ndarray) -> str:
    names = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank {names}" if len(numbers) == 1 else f"ranks {names}"


def _describe(header: np.ndarray) -> str:
    return f"{_NAMES.get(int(header[1]), '?')} of {header[2]} bytes, bounds {int(header[3]):08x}"
