"""Features of the input nodes of a batch, wherever they are: rows of this machine from memory, others from their owners.

Ranks of one machine map the same file. What one of them has read is in the page cache for all: no rank keeps a copy, or
asks a neighbor for rows. A job on one machine needs no exchange of features at all.
"""

from __future__ import annotations

import functools
import mmap
from dataclasses import dataclass

import numpy as np
import torch

from gemini_gnn.errors import DataError
from gemini_gnn.features import ragged
from gemini_gnn.graph.sparse import SparseRows
from gemini_gnn.halo import plan
from gemini_gnn.halo.exchange import HaloExchange, Rows
from gemini_gnn.halo.rows import copy_rows, empty_rows
from gemini_gnn.models.tensors import SparseFeatures


@dataclass
class Counts:
    """Rows gathered since :meth:`FeatureStore.take_counts`.

    Attributes:
        own, remote: rows read here and fetched; remote_bytes: features received for the latter (ids and, of sparse rows,
            lengths not included).
    """

    own: int = 0
    remote: int = 0
    remote_bytes: int = 0


@dataclass(frozen=True)
class Prepared:
    """A gather of which only the collective part is missing.

    Attributes:
        split: which rows are where.
        rows: ``[inputs, features]`` in host memory (pinned if they go to a GPU), those from here filled in; of sparse
            features these alone.
    """

    split: plan.Split
    rows: torch.Tensor | SparseFeatures


class FeatureStore:
    """The features of the nodes ``begin..end - 1`` (new ids), and through ``exchange`` those of all others.

    :meth:`gather` is :meth:`prepare` (reads rows from here; no communication) and :meth:`complete` (collective): with gloo all
    of it runs in the prefetcher's thread, with NCCL the training thread calls ``complete``.

    Args:
        local: float32 ``[rows, features]``, dense or sparse on all ranks, maybe memory-mapped. Sparse rows have values on
            all ranks or on none.
        begin, end: the nodes of ``local``: the range of the exchange's bounds that this rank owns, or those of all ranks
            of this machine (``shared``).
        exchange: used from one thread at a time.
        in_ram: copy a mapping into memory once, or of a shared one bring the own rows into the page cache; False reads
            rows through the page cache at every gather.
        dtype: of gathered rows, and of rows on the wire.
        shared: ``local`` is a mapping that all ranks of this machine read, and is never copied. The same on all ranks: if
            ``local`` has all rows, no rank takes part in an exchange.

    Raises:
        DataError: ``local`` is not float32 with one row per node.
    """

    def __init__(
        self,
        local: np.ndarray | SparseRows,
        begin: int,
        end: int,
        exchange: HaloExchange,
        in_ram: bool = True,
        dtype: torch.dtype = torch.float32,
        shared: bool = False,
    ) -> None:
        if local.ndim != 2 or len(local) != end - begin or local.dtype != np.float32:
            raise DataError(
                f"features of nodes {begin}..{end - 1}: expected float32 [{end - begin}, width]; "
                f"got {local.dtype} {list(local.shape)}"
            )
        whole = begin <= exchange.begin and exchange.end <= end
        if not (whole if shared else (begin, end) == (exchange.begin, exchange.end)):
            raise DataError(
                f"features are of nodes {begin}..{end - 1}, the exchange's rank {exchange.rank} owns "
                f"{exchange.begin}..{exchange.end - 1}"
            )
        self.width, self.dtype, self.exchange = local.shape[1], dtype, exchange
        self._here = begin, end
        self._has_all = shared and end - begin == exchange.bounds[-1]
        if shared and in_ram:
            _read_once(local[exchange.begin - begin : exchange.end - begin])
        self._sparse: SparseFeatures | None = None
        if isinstance(local, SparseRows):
            self._sparse = ragged.held(local, in_ram and not shared, dtype)
        else:
            self._local = _held(local, in_ram and not shared, dtype)
            self._own = self._local[exchange.begin - begin : exchange.end - begin]
        self._counts = Counts()

    def gather(self, input_nodes: np.ndarray) -> torch.Tensor | SparseFeatures:
        """Features of ``input_nodes`` (unique new ids, any order): ``[inputs, features]`` on the exchange's device.

        Sparse if ``local`` is. Bit for bit what is on disk (for bfloat16: its rounding). Collective.

        Raises:
            ExchangeError: another rank failed, died or did not come in time; ValueError: an id outside the graph.
        """
        return self.complete(self.prepare(input_nodes))

    def prepare(self, input_nodes: np.ndarray) -> Prepared:
        """Split the nodes and read the rows that are here. Not collective: a failure reaches the others with this rank's end."""
        split = plan.split(input_nodes, self.exchange.bounds, self.exchange.rank, self._here)
        if self._sparse is not None:
            return Prepared(split, ragged.read(self._sparse, split.own_local))
        if self.exchange.device.type == "cuda":
            rows = torch.empty((len(split), self.width), dtype=self.dtype, pin_memory=True)
        else:
            rows = empty_rows(len(split), self.width, self.dtype, torch.device("cpu"))
        if self._local.dtype == self.dtype:
            copy_rows(self._local, split.own_local, rows, split.own)
        else:
            copy_rows(self._converted(self._local, split.own_local), np.arange(len(split.own)), rows, split.own)
        return Prepared(split, rows)

    def complete(self, prepared: Prepared) -> torch.Tensor | SparseFeatures:
        """Fetch the remote rows into their places; ``[inputs, features]`` on the exchange's device. Collective."""
        split, rows = prepared.split, prepared.rows
        if isinstance(rows, SparseFeatures):
            assert self._sparse is not None
            far = ragged.read(self._sparse, split.remote) if self._has_all else self._asked(self._sparse, split)
            rows = ragged.joined(rows, split.own, far, split.remote)
            if self.exchange.device.type == "cuda":
                rows = rows.pin_memory().to(self.exchange.device, non_blocking=True)
        else:
            rows = rows.to(self.exchange.device, non_blocking=True)
            if not self._has_all:
                converted = functools.partial(self._converted, self._own)
                local: Rows = self._own if self._own.dtype == self.dtype else converted
                self.exchange.fetch(split, local, rows)
            self._counts.remote_bytes += len(split.remote) * self.width * self.dtype.itemsize
        self._counts.own += len(split.own)
        self._counts.remote += len(split.remote)
        return rows

    def _asked(self, local: SparseFeatures, split: plan.Split) -> SparseFeatures:
        """The remote rows, in the order of ``split.remote``. Collective."""
        kinds: list[type] = [np.int32]
        if local.value is not None:
            kinds.append(np.int16 if self.dtype == torch.bfloat16 else np.float32)  # numpy has no bfloat16

        def answer(ids: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
            rows = ragged.read(local, ids - self._here[0])
            values = [] if rows.value is None else [rows.value.view(torch.uint8).numpy().view(kinds[1])]
            return np.diff(rows.ptr.numpy()), [rows.index.numpy(), *values]

        lengths, (index, *values) = self.exchange.ask(split.remote_ids, answer, kinds)
        self._counts.remote_bytes += index.nbytes + sum(value.nbytes for value in values)
        value = torch.from_numpy(values[0]).view(self.dtype) if values else None
        ptr = torch.from_numpy(ragged.offsets(lengths))
        return SparseFeatures(ptr, torch.from_numpy(index), value, self.width, self.dtype)

    def take_counts(self) -> Counts:
        """The counters, which start again at zero. Call it where no gather is under way."""
        taken, self._counts = self._counts, Counts()
        return taken

    def _converted(self, local: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
        """Rows of a mapping in another dtype than the wanted one."""
        rows = empty_rows(len(numbers), self.width, local.dtype, torch.device("cpu"))
        copy_rows(local, numbers, rows, np.arange(len(numbers)))
        return rows.to(self.dtype)


def _read_once(rows: np.ndarray | SparseRows) -> None:
    """Have the pages of a mapping in memory, read in the order of the file: batches would read them in any order."""
    arrays = (
        [rows] if isinstance(rows, np.ndarray) else [rows.columns(), *([] if rows.value is None else [rows.values()])]
    )
    for array in arrays:
        array.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE].sum()


def _held(local: np.ndarray, in_ram: bool, dtype: torch.dtype) -> torch.Tensor:
    """``local`` as the tensor to gather from: itself, or its copy in ``dtype``."""
    given = ragged.as_tensor(local)
    if not in_ram:
        return given
    if given.dtype == dtype and not isinstance(local, np.memmap):
        return given  # in memory already
    held = empty_rows(len(given), given.shape[1], dtype, torch.device("cpu"))
    return held.copy_(given)
