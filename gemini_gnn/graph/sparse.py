"""Rows of features of which only the stored values exist: compressed sparse rows (CSR), in memory or mapped.

Bag-of-words features have thousands of columns and tens of values per row. Dense, all but 1 % of the bytes and of the
arithmetic are zeros. A :class:`SparseRows` stands where a dense ``[rows, width]`` array could stand: ``len``, ``shape``,
``dtype`` and indexing by a slice or by row numbers mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from gemini_gnn.errors import DataError

SMALLER = 4.0  # ``auto`` takes sparse rows where they are so many times smaller than dense ones
CHUNK_BYTES = 16 << 20  # of dense rows that a pass over all rows holds at a time


@dataclass(frozen=True)
class SparseRows:
    """A matrix ``[rows, width]`` of float32.

    Attributes:
        ptr: int64 ``[rows + 1]``, where each row begins in the arrays below. ``ptr[0]`` need not be 0: rows that were cut
            out of a larger matrix share its arrays.
        index: int32, columns of the stored values, ascending within a row.
        value: float32, aligned with ``index``; None: every stored value is 1.
        width: columns.
    """

    ptr: np.ndarray
    index: np.ndarray
    value: np.ndarray | None
    width: int

    def __len__(self) -> int:
        return len(self.ptr) - 1

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.width

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def stored(self) -> int:
        """Number of stored values."""
        return int(self.ptr[-1] - self.ptr[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in this form."""
        return 8 * len(self.ptr) + self.stored * (4 if self.value is None else 8)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the rows as a dense array."""
        return 4 * len(self) * self.width

    def __getitem__(self, rows: slice | np.ndarray) -> SparseRows:
        """A range of rows as views, or the rows of an integer or bool array as a copy."""
        if isinstance(rows, slice):
            first, last, step = rows.indices(len(self))
            if step == 1:
                return SparseRows(self.ptr[first : max(first, last) + 1], self.index, self.value, self.width)
            rows = np.arange(first, last, step)
        numbers = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        begin, length = self.ptr[numbers], self.ptr[numbers + 1] - self.ptr[numbers]
        ptr = np.zeros(len(numbers) + 1, dtype=np.int64)
        np.cumsum(length, out=ptr[1:])
        at = np.arange(ptr[-1]) + np.repeat(begin - ptr[:-1], length)
        return SparseRows(ptr, self.index[at], None if self.value is None else self.value[at], self.width)

    def packed(self) -> SparseRows:
        """These rows with arrays of their own range: ``ptr`` begins with 0, and ``index`` ends where ``ptr`` does."""
        value = None if self.value is None else self.values()
        return SparseRows(self.ptr - self.ptr[0], self.columns(), value, self.width)

    def columns(self) -> np.ndarray:
        """``index`` of these rows alone."""
        return self.index[self.ptr[0] : self.ptr[-1]]

    def values(self) -> np.ndarray:
        """float32, the stored values of these rows alone, ones too."""
        if self.value is None:
            return np.ones(self.stored, dtype=np.float32)
        return self.value[self.ptr[0] : self.ptr[-1]]

    def dense(self) -> np.ndarray:
        """float32 ``[rows, width]``."""
        rows = np.zeros(self.shape, dtype=np.float32)
        rows[np.repeat(np.arange(len(self)), np.diff(self.ptr)), self.columns()] = self.values()
        return rows

    def validate(self, where: str, name_of: Callable[[int], str] = str) -> None:
        """Check every promise of the class docstring.

        Args:
            where: begins each message. name_of: what the user calls a row, by its number.

        Raises:
            DataError: naming the first row that breaks one.
        """
        ptr = self.ptr
        if ptr.dtype != np.int64 or ptr.ndim != 1 or not len(ptr) or np.any(ptr[1:] < ptr[:-1]):
            raise DataError(f"{where}: expected row offsets int64 that never decrease")
        if self.index.ndim != 1 or (self.value is not None and self.value.shape != self.index.shape):
            raise DataError(f"{where}: expected one value for each stored column")
        if ptr[0] < 0 or ptr[-1] > len(self.index):
            raise DataError(f"{where}: expected row offsets within {len(self.index)} stored values; got {ptr[-1]}")
        columns = self.columns()
        if columns.dtype.kind not in "iu" or (self.value is not None and self.value.dtype != np.float32):
            got = columns.dtype if self.value is None else f"{columns.dtype} and {self.value.dtype}"
            raise DataError(f"{where}: expected int32 columns and float32 values; got {got}")

        def refuse(bad: np.ndarray, expected: str) -> None:
            if bad.any():
                at = int(np.argmax(bad)) + int(ptr[0])
                row = int(np.searchsorted(ptr, at, side="right")) - 1
                found = f"column {int(self.index[at])}"
                if self.value is not None:
                    found += f" with value {self.value[at]}"
                raise DataError(f"{where}: expected {expected}; row {name_of(row)} has {found}")

        refuse((columns < 0) | (columns >= self.width), f"columns in 0..{self.width - 1}")
        if columns.dtype != np.int32:  # beyond 2^31 columns, or somebody else's arrays
            raise DataError(f"{where}: expected int32 columns; got {columns.dtype}")
        follows = np.zeros(len(columns), dtype=bool)
        np.less_equal(columns[1:], columns[:-1], out=follows[1:])
        starts = ptr[:-1][ptr[1:] > ptr[:-1]] - ptr[0]
        follows[starts] = False
        refuse(follows, "columns that ascend within a row, each once")
        if self.value is not None:
            refuse(~np.isfinite(self.values()), "finite values")


def from_csr(ptr: np.ndarray, index: np.ndarray, value: np.ndarray | None, width: int) -> SparseRows:
    """Somebody else's CSR arrays, of any types of numbers; nothing is checked.

    What does not fit int32 columns and float32 values stays as it is, for :meth:`SparseRows.validate` to name it.
    """
    if index.dtype.kind in "iu" and (not len(index) or (index.min() >= 0 and index.max() < 2**31)):
        index = index.astype(np.int32, copy=False)
    if value is not None and value.dtype.kind in "fiub":
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and that is refused
            value = value.astype(np.float32, copy=False)
    return without_ones(SparseRows(ptr.astype(np.int64, copy=False), index, value, width))


def without_ones(rows: SparseRows) -> SparseRows:
    """``rows``, without ``value`` if all of them are 1."""
    return replace(rows, value=None) if rows.value is not None and (rows.values() == 1).all() else rows


def row_chunks(x: np.ndarray | SparseRows) -> Iterator[slice]:
    """Ranges of rows that take :data:`CHUNK_BYTES` when they are dense."""
    step = max(1, CHUNK_BYTES // max(1, 4 * x.shape[1]))
    return (slice(begin, min(begin + step, len(x))) for begin in range(0, len(x), step))


def sparse(dense: np.ndarray) -> SparseRows:
    """The values of ``dense`` ``[rows, width]``, of any type of numbers, that are not zero; -0.0 is."""
    ptr = np.zeros(len(dense) + 1, dtype=np.int64)
    for rows in row_chunks(dense):
        ptr[rows.start + 1 : rows.stop + 1] = np.count_nonzero(dense[rows], axis=1)
    np.cumsum(ptr, out=ptr)
    index, value = np.empty(ptr[-1], dtype=np.int32), np.empty(ptr[-1], dtype=np.float32)
    for rows in row_chunks(dense):
        at, piece = slice(ptr[rows.start], ptr[rows.stop]), dense[rows]
        row, index[at] = np.nonzero(piece)
        with np.errstate(over="ignore"):
            value[at] = piece[row, index[at]]
    return without_ones(SparseRows(ptr, index, value, dense.shape[1]))


def dense(x: np.ndarray | SparseRows) -> np.ndarray:
    """``x`` as an array."""
    return x.dense() if isinstance(x, SparseRows) else x


def laid_out(x: np.ndarray | SparseRows, layout: str) -> np.ndarray | SparseRows:
    """``x`` in the form that ``features.layout`` names; ``x`` itself where it has that form.

    Args:
        layout: "dense", "sparse", or "auto": sparse where it is :data:`SMALLER` times smaller, else dense.
    """
    if layout == "auto":
        layout = "sparse" if _much_smaller(x) else "dense"
    if layout == "dense":
        return dense(x)
    return x if isinstance(x, SparseRows) else sparse(x)


def _much_smaller(x: np.ndarray | SparseRows) -> bool:
    """Whether sparse rows would be :data:`SMALLER` times smaller than dense ones."""
    if isinstance(x, SparseRows):
        return x.nbytes * SMALLER <= x.dense_bytes
    most, stored, ones = 4 * len(x) * x.shape[1] / SMALLER - 8 * (len(x) + 1), 0, True
    for rows in row_chunks(x):
        count = int(np.count_nonzero(x[rows]))
        stored += count
        ones = ones and np.count_nonzero(x[rows] == 1) == count
        if stored * (4 if ones else 8) > most:  # a large dense file is not read to its end for that
            return False
    return True
