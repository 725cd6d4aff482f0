"""A user's own graph: an edge list, with or without files of features, labels and splits.

    edges      source,target[,weight]      comma, tab, semicolon or blanks; gzip too; leading # and % lines are skipped
    features   .npy [nodes, features]      or .csv  id,f0,f1,...
               .npz of scipy.sparse        or .csv  id,feature:value ...   values that are not 0; features 0..the largest
    labels     .npy [nodes(, classes)]     or .csv  id,label
    splits                                    .csv  id,train|val|test

Which nodes there are, is said by the edges (integer ids: first_id..largest; text ids: those that occur, sorted). A node
without edges is accepted when every given file of features and labels has it; one file alone that disagrees with the
edges is taken for the mistake it usually is.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemini_gnn.errors import ConfigError, DataError
from gemini_gnn.graph.datasets.assemble import RawGraph
from gemini_gnn.graph.datasets.files import load_npy, load_npz
from gemini_gnn.graph.datasets.splits import PARTS
from gemini_gnn.graph.datasets.tables import blame, data_lines, first_lines, read_table, separator_of, split_line
from gemini_gnn.graph.sparse import SparseRows, from_csr

log = logging.getLogger(__name__)

WIDEST = 2**31 - 1  # features of which the columns are int32
LARGEST = float(np.finfo(np.float32).max)

# First lines that are no edges. With integer ids any header is found out; text ids need to know some, and only such as
# are hardly the names of two nodes: an edge from u to v is one.
EDGE_HEADERS = {("source", "target"), ("src", "dst"), ("from", "to"), ("node1", "node2"), ("id1", "id2")}
NODE_HEADERS = ("id", "node", "node_id")  # the first field of a header in a file of features, labels or splits


class EdgeList(NamedTuple):
    """``source``, ``target`` int64 ``[edges]`` in 0..num_nodes-1; ``weight`` float64 ``[edges]`` or None; ``node_ids``
    (int64 or unicode ``[nodes]``) the user's ids, or None where they are 0..num_nodes-1."""

    source: np.ndarray
    target: np.ndarray
    weight: np.ndarray | None
    node_ids: np.ndarray | None
    num_nodes: int


class NodeTable(NamedTuple):
    """The nodes in a file: their ids as written (int64 or text ``[rows]``) and ``values [rows, ...]``."""

    path: Path
    ids: np.ndarray
    values: np.ndarray | SparseRows
    all_nodes: bool  # a .npy or .npz: row i is node i, none may be missing


def load_edge_list(path: str | Path, ids: str = "int", first_id: int = 0, skip_lines: int = 0) -> EdgeList:
    """Read only the edges; nodes are those the edges name. Arguments as in :class:`DatasetConfig`.

    Raises:
        DataError: absent or empty file; a line that is not ``source,target[,weight]``: file, line number, content.
    """
    source, target, weight = read_edges(Path(path), ids, first_id, skip_lines)
    if ids == "str":
        import pandas

        found, names = pandas.factorize(np.concatenate([source, target]))
        node_ids, place = np.unique(as_text(names), return_inverse=True)
        numbers = place[found]
        return EdgeList(numbers[: len(source)], numbers[len(source) :], weight, node_ids, len(node_ids))
    n = int(max(source.max(), target.max())) - first_id + 1
    named = np.zeros(n, dtype=bool)
    named[source - first_id] = named[target - first_id] = True
    if 2 * (count := int(named.sum())) < n:
        log.warning(
            "%s: %d nodes, %d..%d, of which only %d have an edge; where ids are names and no numbering, dataset.ids=str takes "
            "only those that occur",
            *(path, n, first_id, first_id + n - 1, count),
        )
    return EdgeList(source - first_id, target - first_id, weight, numbered(first_id, n), n)


def read_edge_list(
    path: Path,
    ids: str = "int",
    first_id: int = 0,
    skip_lines: int = 0,
    features: Path | None = None,
    labels: Path | None = None,
    splits: Path | None = None,
) -> RawGraph:
    """The edges and what the other files say of the nodes.

    Raises:
        DataError: see :func:`load_edge_list`; files that disagree on which nodes there are.
    """
    if path.is_dir():
        raise DataError(
            f"dataset.path: expected an edge list; {path} is a folder. One of .npy is read by dataset=folder"
        )
    edges = load_edge_list(path, ids, first_id, skip_lines)
    x_table = None if features is None else read_features(features, ids, first_id)
    y_table = None if labels is None else read_labels(labels, ids, first_id)
    tables = [table for table in (x_table, y_table) if table is not None]
    for table in tables:
        if ids == "str" and table.all_nodes:
            raise ConfigError(
                f"{table.path}: expected a .csv whose first column is the id, since dataset.ids=str; got a "
                f"{table.path.suffix}, whose rows have no ids"
            )
    edges = with_lone_nodes(edges, ids, first_id, tables)
    x = None if x_table is None else placed(x_table, edges, first_id, path, missing=None)
    y = None if y_table is None else placed(y_table, edges, first_id, path, missing=-1)
    masks = {}
    if splits is not None:
        part_of = placed(read_splits(splits, ids, first_id), edges, first_id, path, missing="")
        masks = {part: part_of == part for part in PARTS}
    return RawGraph(
        name=path.name.split(".")[0],
        num_nodes=edges.num_nodes,
        source=edges.source,
        target=edges.target,
        weight=edges.weight,
        x=x,
        y=y,
        masks=masks,
        node_ids=edges.node_ids,
        notes={"file": str(path)},
    )


def read_edges(path: Path, ids: str, first_id: int, skip_lines: int):
    """Source, target (int64 or text, as written) and weight (float64 or None)."""

    def types(columns: int) -> list[str]:
        if columns not in (2, 3):
            raise ValueError(f"{columns} fields; if this is a header, skip it with dataset.skip_lines=1")
        return [ids, ids, "float"][:columns]

    def check(fields: list[str]) -> None:
        for field in fields[:2]:
            check_id(field, ids, first_id)
        if len(fields) == 3 and not 0 < as_number(fields[2]) < np.inf:
            raise ValueError("weights must be positive and finite")

    def fits(frame) -> bool:
        weights_fit = frame.shape[1] == 2 or (frame[2].gt(0) & frame[2].lt(np.inf)).all()
        if ids == "str":
            return weights_fit and not (frame[0].eq("") | frame[1].eq("")).any()
        return weights_fit and min(frame[0].min(), frame[1].min()) >= first_id

    expected = f"source,target[,weight] with {'text' if ids == 'str' else 'integer'} ids"
    for number, line in first_lines(path, skip_lines)[:1]:
        if is_edge_header(split_line(line)):
            blame(path, number, line, expected, f"a header: skip it with dataset.skip_lines={number}")
    frame = read_table(path, expected=expected, types=types, check=check, fits=fits, skip_lines=skip_lines)
    kind = object if ids == "str" else np.int64
    source, target = frame[0].to_numpy(kind), frame[1].to_numpy(kind)
    if ids == "int":
        nodes = int(max(source.max(), target.max())) - first_id + 1
        if nodes > 1_000_000 + 100 * len(source):
            raise DataError(
                f"{path}: integer ids number the nodes from dataset.first_id={first_id} on, and here they reach "
                f"{nodes + first_id - 1} with only {len(source)} edges; with dataset.ids=str any ids will do"
            )
    return source, target, frame[2].to_numpy() if frame.shape[1] == 3 else None


def read_features(path: Path, ids: str, first_id: int) -> NodeTable:
    if path.suffix == ".npz":
        rows = load_npz(path)
        return NodeTable(path, np.arange(first_id, first_id + len(rows)), rows, True)
    if path.suffix != ".npy" and (separator := separator_of_sparse(path, ids)) is not None:
        return read_sparse_features(path, ids, first_id, separator)

    def types(columns: int) -> list[str]:
        if columns < 2:
            raise ValueError(f"{columns} field")
        return [ids] + ["float"] * (columns - 1)

    def check(fields: list[str]) -> None:
        if not all(np.isfinite(np.float32(as_number(field))) for field in fields):
            raise ValueError("features must be finite float32 numbers")

    def fits(frame) -> bool:
        return bool(np.isfinite(frame.iloc[:, 1:].to_numpy(np.float32)).all())

    return read_nodes(path, ids, first_id, "id,f0,f1,...", types, check, fits, np.float32)


def separator_of_sparse(path: Path, ids: str) -> str | None:
    """The separator behind the ids of a file of ``id,feature:value ...``; None of another file."""
    for at, (_, line) in enumerate(data_lines(path)):
        fields = split_line(line)
        if any(fields[1:]) and not (at == 0 and is_sparse_header(fields, ids)):  # an id alone tells nothing
            return separator_of(line) if any(":" in field for field in fields[1:]) else None
    return None


def read_sparse_features(path: Path, ids: str, first_id: int, separator: str) -> NodeTable:
    """Lines ``id,feature:value ...``, as in LIBSVM files; between features, blanks and ``separator`` are alike.

    Raises:
        DataError: a line that is none, a feature that does not follow the one before, or a value that is not finite.
    """
    expected = "id,feature:value ... with features 0, 1, 2, ... that ascend"
    nodes: dict[str | int, None] = {}
    ends, columns, values = array("q", [0]), array("i"), array("f")
    for at, (number, line) in enumerate(data_lines(path)):
        name, *rest = split_line(line, separator)
        if at == 0 and is_sparse_header([name, *rest], ids):
            continue
        try:
            check_id(name, ids, first_id)
            node = name if ids == "str" else int(name)
            if node in nodes:
                raise ValueError("this id a second time")
            nodes[node] = None
            last = -1
            for field in " ".join(rest).split():
                feature, colon, value = field.partition(":")
                if not colon:
                    raise ValueError(f"{field!r} has no colon")
                column, amount = as_integer(feature), as_number(value)
                if not 0 <= column < WIDEST:
                    raise ValueError(f"feature {column} is not in 0..{WIDEST - 1}")
                if column <= last:
                    raise ValueError(f"feature {column} after {last}")
                if not abs(amount) <= LARGEST:
                    raise ValueError("features must be finite float32 numbers")
                columns.append(column)
                values.append(amount)
                last = column
        except ValueError as error:
            blame(path, number, line, expected, str(error))
        ends.append(len(columns))
    index = np.asarray(columns, dtype=np.int32)
    rows = from_csr(np.asarray(ends), index, np.asarray(values), int(index.max(initial=-1)) + 1)
    return NodeTable(path, np.array(list(nodes), dtype=object if ids == "str" else np.int64), rows, False)


def read_labels(path: Path, ids: str, first_id: int) -> NodeTable:
    def check(fields: list[str]) -> None:
        if not is_number(fields[0]) or as_integer(fields[0]) < -1:
            raise ValueError("labels are class numbers 0, 1, 2, ..., or -1 for none")

    return read_nodes(path, ids, first_id, "id,label", pair(ids, "int"), check, lambda f: bool(f[1].ge(-1).all()), int)


def read_splits(path: Path, ids: str, first_id: int) -> NodeTable:
    def check(fields: list[str]) -> None:
        if fields[0] not in PARTS:
            raise ValueError("no such split")

    def fits(frame) -> bool:
        return bool(frame[1].isin(PARTS).all())

    return read_nodes(path, ids, first_id, "id,train|val|test", pair(ids, "str"), check, fits, object)


def pair(*kinds: str) -> Callable[[int], list[str]]:
    """The types of a file that has exactly these columns."""

    def types(columns: int) -> list[str]:
        if columns != len(kinds):
            raise ValueError(f"{columns} fields")
        return list(kinds)

    return types


def read_nodes(path: Path, ids: str, first_id: int, expected: str, types, check, fits, dtype) -> NodeTable:
    """A file of one line per node. ``check`` and ``fits`` are about the columns behind the id."""
    if path.suffix == ".npy":
        values = load_npy(path)
        return NodeTable(path, np.arange(first_id, first_id + len(values)), values, True)
    seen = set()
    header = partial(is_header, ids=ids)

    def check_line(fields: list[str]) -> None:
        check_id(fields[0], ids, first_id)
        if fields[0] in seen:
            raise ValueError("this id a second time")
        seen.add(fields[0])
        check(fields[1:])

    def table_fits(frame) -> bool:
        good = frame[0].ne("").all() if ids == "str" else frame[0].ge(first_id).all()
        return bool(good) and not frame[0].duplicated().any() and fits(frame)

    frame = read_table(path, expected=expected, types=types, check=check_line, fits=table_fits, header=header)
    values = frame.iloc[:, 1:].to_numpy(dtype)
    numbers = frame[0].to_numpy(object if ids == "str" else np.int64)
    return NodeTable(path, numbers, values if expected.endswith("...") else values[:, 0], False)


def is_header(fields: list[str], ids: str) -> bool:
    """Whether the first line of a file of one line per node names its columns."""
    # With integer ids, a line without any number is one; text ids look like one themselves.
    return fields[0].lower() in NODE_HEADERS or (ids == "int" and not any(is_number(field) for field in fields))


def is_sparse_header(fields: list[str], ids: str) -> bool:
    """:func:`is_header`, where a feature and its value count as two fields."""
    return is_header([fields[0], *" ".join(fields[1:]).replace(":", " ").split()], ids)


def with_lone_nodes(edges: EdgeList, ids: str, first_id: int, tables: list[NodeTable]) -> EdgeList:
    """``edges`` with the nodes without edges that every one of ``tables`` vouches for.

    With integer ids these continue the numbering without a gap; with text ids they are sorted in among the others. A
    lone .csv vouches for nothing: an id that only it knows is more likely a typing error.
    """
    if not tables or (len(tables) == 1 and not tables[0].all_nodes):
        return edges
    if ids == "int":
        first_new = first_id + edges.num_nodes
        known = [np.unique(table.ids[table.ids >= first_new]) for table in tables]
        extra = np.intersect1d(known[0], known[-1])
        extra = extra[extra == first_new + np.arange(len(extra))]
        n = edges.num_nodes + len(extra)
        return edges._replace(num_nodes=n, node_ids=numbered(first_id, n))
    assert edges.node_ids is not None
    extra = np.setdiff1d(np.intersect1d(as_text(tables[0].ids), as_text(tables[-1].ids)), edges.node_ids)
    node_ids = np.union1d(edges.node_ids, extra)
    moved = np.searchsorted(node_ids, edges.node_ids)
    return EdgeList(moved[edges.source], moved[edges.target], edges.weight, node_ids, len(node_ids))


def positions(table: NodeTable, edges: EdgeList, first_id: int, edges_path: Path) -> np.ndarray:
    """int64 ``[rows]``: the node that each row of ``table`` is about.

    Raises:
        DataError: an id that is no node of the graph.
    """
    if edges.node_ids is None or edges.node_ids.dtype.kind == "i":
        rows = table.ids - first_id
        known = rows < edges.num_nodes
        nodes = f"{first_id}..{first_id + edges.num_nodes - 1}"
    else:
        wanted = as_text(table.ids)
        rows = np.minimum(np.searchsorted(edges.node_ids, wanted), edges.num_nodes - 1)
        known = edges.node_ids[rows] == wanted
        nodes = f"{edges.node_ids[0]}..{edges.node_ids[-1]}"
    if not known.all():
        raise DataError(
            f"{table.path}: expected only nodes of {edges_path.name} ({edges.num_nodes} nodes, {nodes}); got {len(rows)} "
            f"rows, {int((~known).sum())} of them about other nodes, such as {table.ids[int(np.argmin(known))]}. Nodes "
            "without edges must be both in dataset.features and in dataset.labels"
        )
    return rows


def placed(table: NodeTable, edges: EdgeList, first_id: int, edges_path: Path, missing) -> Any:
    """The values of ``table`` in node order.

    Args:
        missing: the value of nodes that the table does not list; None if it must list all, but for a .csv of sparse
            features, where a node without a line has none.

    Raises:
        DataError: nodes that are not listed but must be, or that the graph has not.
    """
    rows = positions(table, edges, first_id, edges_path)
    sparse = isinstance(table.values, SparseRows)
    if ((missing is None and not sparse) or table.all_nodes) and len(rows) != edges.num_nodes:
        listed = np.zeros(edges.num_nodes, dtype=bool)
        listed[rows] = True
        node = int(np.argmin(listed))
        raise DataError(
            f"{table.path}: expected one row for each of the {edges.num_nodes} nodes of {edges_path.name}; got "
            f"{len(rows)} rows, the first node without is {node if edges.node_ids is None else edges.node_ids[node]}"
        )
    if table.all_nodes:
        return table.values
    if isinstance(table.values, SparseRows):
        ptr = table.values.ptr
        order = np.full(edges.num_nodes, len(rows))
        order[rows] = np.arange(len(rows))
        return replace(table.values, ptr=np.append(ptr, ptr[-1]))[order]  # behind the rows of the file, an empty one
    values = np.empty((edges.num_nodes, *table.values.shape[1:]), dtype=table.values.dtype)
    values[...] = missing
    values[rows] = table.values
    return values


def numbered(first_id: int, n: int) -> np.ndarray | None:
    """The ids of ``n`` nodes counted from ``first_id``; None when they are the node numbers themselves."""
    return np.arange(first_id, first_id + n) if first_id else None


def as_text(names: np.ndarray) -> np.ndarray:
    """Unicode ``[n]`` from an array of str objects."""
    return names.astype(np.str_)


def as_integer(field: str) -> int:
    try:
        value = int(field)
    except ValueError:
        raise ValueError(f"{field!r} is no integer") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError("an integer beyond 64 bits")
    return value


def is_edge_header(fields: list[str]) -> bool:
    return tuple(field.lower() for field in fields[:2]) in EDGE_HEADERS


def is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def as_number(field: str) -> float:
    try:
        return float(field)
    except ValueError:
        raise ValueError(f"{field!r} is no number") from None


def check_id(field: str, ids: str, first_id: int) -> None:
    if ids == "str":
        if not field:
            raise ValueError("an empty id")
        return
    if field and not is_number(field):
        raise ValueError(
            f"{field!r} is no integer; text ids need dataset.ids=str, a header of edges dataset.skip_lines=1"
        )
    if as_integer(field) < first_id:
        raise ValueError(f"ids start at dataset.first_id={first_id}")
