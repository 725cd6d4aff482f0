"""Rows of features of which only the stored values exist: compressed sparse rows (CSR), in memory or mapped.

Bag-of-words features have thousands of columns and tens of values per row. Dense, all but 1 % of the bytes and of the
arithmetic are zeros. A :class:`SparseRows` stands where a dense ``[rows, width]`` array could stand: ``len``, ``shape``,
``dtype`` and indexing by a slice or by row numbers mean the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gemini_gnn.errors import DataError

SMALLER = 4.0  # ``auto`` takes sparse rows where they are so many times smaller than dense ones


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
        if ptr.dtype != np.int64 or ptr.ndim != 1 or not len(ptr) or np.any(np.diff(ptr) < 0):
            raise DataError(f"{where}: expected row offsets int64 that never decrease")
        if ptr[0] < 0 or ptr[-1] > len(self.index) or (self.value is not None and len(self.value) != len(self.index)):
            raise DataError(f"{where}: the row offsets do not fit {len(self.index)} stored columns and their values")
        columns = self.columns()
        if columns.dtype != np.int32:
            raise DataError(f"{where}: expected int32 columns; got {columns.dtype}")

        def refuse(bad: np.ndarray, expected: str) -> None:
            if bad.any():
                at = int(np.argmax(bad)) + int(ptr[0])
                row = int(np.searchsorted(ptr, at, side="right")) - 1
                found = f"column {int(self.index[at])}"
                if self.value is not None:
                    found += f" with value {self.value[at]}"
                raise DataError(f"{where}: expected {expected}; row {name_of(row)} has {found}")

        refuse((columns < 0) | (columns >= self.width), f"columns in 0..{self.width - 1}")
        if len(columns):
            follows = np.concatenate([[False], np.diff(columns) <= 0])
            starts = ptr[:-1][np.diff(ptr) > 0] - ptr[0]
            follows[starts] = False
            refuse(follows, "columns that ascend within a row, each once")
        if self.value is not None:
            refuse(~np.isfinite(self.values()), "finite values")


def sparse(dense: np.ndarray) -> SparseRows:
    """The values of ``dense`` ``[rows, width]`` that are not zero; without ``value`` if all of them are 1."""
    rows, columns = np.nonzero(dense)
    ptr = np.zeros(len(dense) + 1, dtype=np.int64)
    np.cumsum(np.bincount(rows, minlength=len(dense)), out=ptr[1:])
    value = np.asarray(dense[rows, columns], dtype=np.float32)
    return SparseRows(ptr, columns.astype(np.int32), None if (value == 1).all() else value, dense.shape[1])
