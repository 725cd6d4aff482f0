"""Delimited text files (CSV, TSV, blanks; gzip too): read fast, and when that fails, slowly, to name the bad line.

A file is parsed by pandas' C parser and its columns are checked as a whole. Only when either refuses, the lines are read
one by one in Python until the first that does not fit: a good file pays nothing for a good error.
"""

from __future__ import annotations

import csv
import gzip
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gemini_gnn.errors import DataError

if TYPE_CHECKING:
    import pandas


def read_table(
    path: Path,
    *,
    expected: str,
    types: Callable[[int], list[str]],
    check: Callable[[list[str]], None],
    fits: Callable[[pandas.DataFrame], bool],
    skip_lines: int = 0,
    header: Callable[[list[str]], bool] | None = None,
) -> pandas.DataFrame:
    """The columns of a delimited file, numbered 0, 1, ... Blank lines and leading lines with # or % are skipped.

    Args:
        expected: a line of this file, in words, for messages.
        types: number of columns -> type of each, "int", "float" or "str"; ValueError if there cannot be so many.
        check: ValueError with the reason when the fields of a line do not fit; called for no line of a good file.
        fits: whether the columns as a whole do; when not, some line must fail ``check``.
        skip_lines: lines that are not read.
        header: whether the fields of the first line are a header, to be skipped; None where there can be none.

    Raises:
        DataError: absent, unreadable or empty file, or a line that does not fit: file, line number, content, expected.
    """
    import pandas

    start = first_lines(path, skip_lines)
    if header is not None and len(start) > 1 and header(split_line(start[0][1])):
        start = start[1:]
    if not start:
        skipped = f" after the first {skip_lines}" if skip_lines else ""
        raise DataError(f"{path}: expected lines `{expected}`; the file holds none{skipped}")
    number, line = start[0]
    columns = len(split_line(line))
    try:
        kinds = types(columns)
    except ValueError as error:
        blame(path, number, line, expected, str(error))
    numpy_names = {"int": "int64", "float": "float64", "str": "str"}
    try:
        frame = pandas.read_csv(
            path,
            sep=separator_of(line) or r"\s+",
            header=None,
            names=list(range(columns)),
            dtype={i: numpy_names[kind] for i, kind in enumerate(kinds)},
            # Only text may be quoted; an empty text is no missing value, and a node may be called "NA".
            quoting=csv.QUOTE_MINIMAL if "str" in kinds else csv.QUOTE_NONE,
            na_filter="str" not in kinds,
            skipinitialspace=True,
            skiprows=number - 1,
            compression="gzip" if is_gzip(path) else None,
            engine="c",
        )
    except (ValueError, OverflowError, EOFError, OSError) as error:
        blame_first(path, number, columns, check, expected, " ".join(str(error).split()))
    if not fits(frame):
        blame_first(path, number, columns, check, expected, "its columns do not fit")
    return frame


def blame_first(
    path: Path, start: int, columns: int, check: Callable[[list[str]], None], expected: str, otherwise: str
) -> NoReturn:
    """Raise for the first line from ``start`` on that is wrong; with the reason ``otherwise`` when none is."""
    separator = None
    for number, line in lines_of(path):
        if number < start or not line.strip():
            continue
        separator = separator_of(line) if separator is None else separator
        fields = split_line(line, separator)
        try:
            if len(fields) != columns:
                raise ValueError(f"{len(fields)} fields; the first line has {columns}")
            check(fields)
        except ValueError as error:
            blame(path, number, line, expected, str(error))
    raise DataError(f"{path}: expected lines `{expected}`; {otherwise}")


def blame(path: Path, number: int, line: str, expected: str, reason: str) -> NoReturn:
    shown = line if len(line) <= 80 else line[:77] + "..."
    raise DataError(f"{path}, line {number}: expected `{expected}`; got {shown!r} ({reason})")


def is_gzip(path: Path) -> bool:
    """By content, not by name.

    Raises:
        DataError: the file is absent or cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise DataError(f"{path}: expected a readable file; got: {error.strerror}") from None


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end).

    Raises:
        DataError: absent file, damaged gzip.
    """
    opener = gzip.open if is_gzip(path) else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip("\r\n")
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: expected readable text or gzip; after line {number}: {error}") from None


def data_lines(path: Path, skip_lines: int = 0) -> Iterator[tuple[int, str]]:
    """Those of :func:`lines_of` that are not skipped, blank, or leading lines with # or %."""
    data = ((n, line) for n, line in lines_of(path) if n > skip_lines and line.strip())
    return itertools.dropwhile(lambda item: item[1].lstrip()[0] in "#%", data)


def first_lines(path: Path, skip_lines: int) -> list[tuple[int, str]]:
    """The first two data lines."""
    return list(itertools.islice(data_lines(path, skip_lines), 2))


def separator_of(line: str) -> str:
    """The separator a line uses: the first of tab, comma and semicolon that occurs, or "" for runs of blanks."""
    return next((mark for mark in "\t,;" if mark in line), "")


def split_line(line: str, separator: str | None = None) -> list[str]:
    separator = separator_of(line) if separator is None else separator
    if not separator:
        return line.split()
    if '"' in line:
        return [field.strip() for field in next(csv.reader([line], delimiter=separator, skipinitialspace=True))]
    return [field.strip() for field in line.split(separator)]
