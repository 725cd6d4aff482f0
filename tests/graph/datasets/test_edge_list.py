"""Edge lists and the files beside them: what is read, and what is said when it cannot be."""

import gzip
import os
import time
from pathlib import Path

import numpy as np
import pytest

from gemini_gnn.config import DatasetConfig
from gemini_gnn.errors import ConfigError, DataError
from gemini_gnn.graph.datasets import fingerprint, load_dataset, load_edge_list

DATA = os.environ.get("GEMINI_GNN_DATA", "")

EDGES = "0,1\n1,2\n2,0\n3,0\n"
LABELS = "0,0\n1,1\n2,0\n3,1\n"


@pytest.fixture
def write(tmp_path):
    def write(name: str, content) -> str:
        path = tmp_path / name
        if isinstance(content, np.ndarray):
            np.save(path, content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def config(path: str, **settings) -> DatasetConfig:
    return DatasetConfig(name="edge_list", path=path, **settings)


def edges_of(graph):
    target = np.repeat(np.arange(graph.num_nodes), np.diff(graph.colptr))
    return list(zip(graph.row.tolist(), target.tolist(), strict=True))


@pytest.mark.parametrize(
    "content",
    [
        "0,1\n1,2\n2,0\n3,0\n",
        "0 1\n1  2\n 2 0\n3 0",
        "0\t1\n1\t2\n2\t0\n3\t0\n",
        "0;1\r\n1;2\r\n2;0\r\n3;0\r\n",
        "# a comment of SNAP\n% one of KONECT\n\n0,1\n\n1, 2\n2,0\n3,0\n\n",
        "\ufeff0,1\n1,2\n2,0\n3,0\n",
        gzip.compress(b"0,1\n1,2\n2,0\n3,0\n"),
    ],
    ids=["comma", "blanks", "tab", "semicolon-crlf", "comments-blank-lines", "byte-order-mark", "gzip"],
)
def test_separators_comments_compression(write, content):
    edges = load_edge_list(write("edges.txt", content))
    assert list(zip(edges.source.tolist(), edges.target.tolist(), strict=True)) == [(0, 1), (1, 2), (2, 0), (3, 0)]
    assert edges.weight is None and edges.node_ids is None and edges.num_nodes == 4


def test_header_first_id_and_weights(write):
    path = write("edges.csv", "from,to,weight\n1,2,0.5\n2,3,1e-3\n")
    edges = load_edge_list(path, first_id=1, skip_lines=1)
    assert (edges.source.tolist(), edges.target.tolist()) == ([0, 1], [1, 2])
    assert edges.weight.tolist() == [0.5, 1e-3] and edges.node_ids.tolist() == [1, 2, 3]


def test_text_ids_are_sorted_so_that_the_order_of_lines_does_not_matter(write):
    lines = ["Zoë,Ann", "NA,Zoë", '"Bob, jr",Ann', "10,9"]
    first = load_edge_list(write("a.csv", "\n".join(lines)), ids="str")
    second = load_edge_list(write("b.csv", "\n".join(reversed(lines))), ids="str")
    assert first.node_ids.tolist() == second.node_ids.tolist() == ["10", "9", "Ann", "Bob, jr", "NA", "Zoë"]
    pairs = [(first.node_ids[u], first.node_ids[v]) for u, v in zip(first.source, first.target, strict=True)]
    assert pairs == [("Zoë", "Ann"), ("NA", "Zoë"), ("Bob, jr", "Ann"), ("10", "9")]


def test_messages_flow_from_source_to_target(write):
    graph = load_dataset(
        config(write("e.csv", "0,1\n2,1\n"), labels=write("l.csv", "0,0\n1,1\n2,0\n"), split="random:1,0,0")
    )
    assert edges_of(graph) == [(0, 1), (2, 1)] and np.diff(graph.colptr).tolist() == [0, 2, 0]


def test_duplicates_and_self_loops(write):
    path = write("e.csv", "0,1\n0,1\n1,0\n2,2\n2,2\n1,2\n")
    labels = write("l.csv", "0,0\n1,1\n2,0\n")
    stored = load_dataset(config(path, labels=labels))
    assert edges_of(stored) == [(1, 0), (0, 1), (0, 1), (1, 2), (2, 2), (2, 2)], (
        "as stored: parallel edges and loops stay"
    )
    undirected = load_dataset(config(path, labels=labels, undirected=True))
    assert edges_of(undirected) == [(1, 0), (0, 1), (2, 1), (1, 2), (2, 2)], "undirected: one per direction"


def test_undirected_weights_are_idempotent_and_parallel_ones_ordered(write):
    labels = write("l.csv", "0,0\n1,1\n2,0\n")
    one = write("one.csv", "0,1,2.0\n1,2,3.0\n")
    both = write("both.csv", "1,2,3.0\n2,1,3.0\n1,0,2.0\n0,1,2.0\n")
    a, b = (load_dataset(config(p, labels=labels, undirected=True)) for p in (one, both))
    assert edges_of(a) == edges_of(b) == [(1, 0), (0, 1), (2, 1), (1, 2)]
    assert a.edge_weight.tolist() == b.edge_weight.tolist() == [2, 2, 3, 3]
    c, d = (
        load_dataset(config(write(f"{i}.csv", text), labels=labels))
        for i, text in enumerate(["0,1,5\n0,1,4\n2,1,1\n", "2,1,1\n0,1,4\n0,1,5\n"])
    )
    assert c.edge_weight.tolist() == d.edge_weight.tolist() == [4, 5, 1], "not by the order of the lines"


def test_features_labels_splits_with_text_ids(write):
    graph = load_dataset(
        config(
            write("e.csv", "a,b\nb,c\n"),
            ids="str",
            features=write("x.csv", "id,f0,f1\nc,3,30\nlonely,4,40\na,1,10\nb,2,20\n"),
            labels=write("y.csv", "node_id,label\nb,1\na,0\nlonely,2\n"),
            splits=write("s.csv", "id,split\na,train\nlonely,test\nb, val\n"),
        )
    )
    assert graph.node_ids.tolist() == ["a", "b", "c", "lonely"]
    assert graph.x.tolist() == [[1, 10], [2, 20], [3, 30], [4, 40]] and graph.y.tolist() == [0, 1, -1, 2]
    masks = (graph.train_mask, graph.val_mask, graph.test_mask)
    assert [np.flatnonzero(mask).tolist() for mask in masks] == [[0], [1], [3]]
    assert edges_of(graph) == [(0, 1), (1, 2)] and graph.num_classes == 3


def test_arrays_beside_integer_ids(write):
    x = np.arange(10, dtype=np.float64).reshape(5, 2)
    graph = load_dataset(
        config(write("e.csv", EDGES), features=write("x.npy", x), labels=write("y.npy", np.array([0, 1, 0, 1, 1])))
    )
    assert graph.num_nodes == 5, "node 4 has no edges; features and labels both have it"
    assert graph.x.dtype == np.float32 and np.array_equal(graph.x, x)
    several = write("several.npy", np.eye(4, 3, dtype=np.int64))
    multi = load_dataset(config(write("e.csv", EDGES), labels=several))
    assert multi.multi_label and multi.num_classes == 3 and multi.y.dtype == np.uint8


def test_without_features(write):
    labels = write("y.csv", LABELS)
    by_degree = load_dataset(config(write("e.csv", EDGES), labels=labels))
    assert by_degree.x.shape == (4, 3) and np.allclose(by_degree.x[:, :2].mean(axis=0), 0, atol=1e-6)
    assert by_degree.x[:, 0].argmax() == 0, "node 0 has most in-edges"
    drawn = [
        load_dataset(config(write("e.csv", EDGES), labels=labels, featureless="random:8", seed=s)).x for s in (0, 0, 1)
    ]
    assert drawn[0].shape == (4, 8) and np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    with pytest.raises(ConfigError, match="dataset.featureless: expected degree or random:<width>; got 'pagerank'"):
        load_dataset(config(write("e.csv", EDGES), labels=labels, featureless="pagerank"))


def test_without_labels(write):
    path = write("e.csv", EDGES)
    with pytest.raises(DataError, match=r"e: expected a class label per node.*dataset\.labels"):
        load_dataset(config(path))
    graph = load_dataset(config(path), require_labels=False)
    assert graph.num_classes == 0 and set(graph.y) == {-1} and not graph.train_mask.any()


@pytest.mark.parametrize(
    "content, settings, wanted",
    [
        (
            "0,1\n1,x\n",
            {},
            r"edges.csv, line 2: expected `source,target\[,weight\] with integer ids`; got '1,x' \('x' is no i",
        ),
        ("0,1\n\n# no\n", {}, "line 3: .*got '# no'"),
        ("0,1\n1\n", {}, r"line 2: .*got '1' \(1 fields; the first line has 2\)"),
        ("0,1\n1,2,3\n", {}, r"line 2: .*got '1,2,3' \(3 fields; the first line has 2\)"),
        ("0,1,1\n1,2\n", {}, r"line 2: .*got '1,2' \(2 fields; the first line has 3\)"),
        ("0,1\n1,\n", {}, "line 2: .*got '1,'"),
        ("0,1\n1,2.5\n", {}, "line 2: .*got '1,2.5'"),
        ("0 1\n1 2 3\n", {}, "line 2: .*got '1 2 3'"),
        ("0,1,2,3\n", {}, r"line 1: .*\(4 fields;"),
        ("source,target\n0,1\n", {}, r"line 1: .*got 'source,target'.*dataset\.skip_lines"),
        ("3,2,directed,graph\n0,1\n", {}, r"line 1: .*\(4 fields; .*dataset\.skip_lines=1"),
        ("ann,bob\n", {}, r"line 1: .*text ids need dataset\.ids=str"),
        ("Source,Target\nann,bob\n", {"ids": "str"}, r"line 1: .*got 'Source,Target' \(a header: skip it"),
        ("h\n0,1\n1,2\n2,-1\n", {"skip_lines": 1}, r"line 4: .*got '2,-1' \(ids start at dataset.first_id=0\)"),
        ("1,2\n0,1\n", {"first_id": 1}, r"line 2: .*got '0,1' \(ids start at dataset.first_id=1\)"),
        ("0,99999999999999999999\n", {}, "line 1: .*beyond 64 bits"),
        ("0,1\n5,1000000000000\n", {}, "reach 1000000000000 with only 2 edges; with dataset.ids=str"),
        ("0,1,1.0\n1,2,0\n", {}, r"line 2: .*got '1,2,0' \(weights must be positive and finite\)"),
        ("0,1,1.0\n1,2,nan\n", {}, "line 2: .*weights must be positive and finite"),
        ("0,1,1.0\n1,2,heavy\n", {}, "line 2: .*'heavy' is no number"),
        ("a,b\n,c\n", {"ids": "str"}, "line 2: .*got ',c' .an empty id."),
        ("a,b\nc\n", {"ids": "str"}, "line 2: .*got 'c'"),
        ("", {}, "edges.csv: expected lines .*; the file holds none"),
        ("header\n", {"skip_lines": 1}, "the file holds none after the first 1"),
        (gzip.compress(b"0,1\n" * 5000, mtime=0)[:-20], {}, "edges.csv: expected readable text or gzip"),
        (b"\x1f\x8bnot gzip at all", {}, "edges.csv: expected readable text or gzip"),
        (b"\x00\x01\xff\xfe" * 20, {}, "edges.csv, line 1"),
    ],
)
def test_bad_lines_are_shown(write, content, settings, wanted):
    with pytest.raises(DataError, match=wanted):
        load_dataset(config(write("edges.csv", content), **settings), require_labels=False)


def test_only_a_first_line_is_a_header(write):
    letters = load_edge_list(write("uv.csv", "u,v\nv,w\n"), ids="str")
    assert letters.node_ids.tolist() == ["u", "v", "w"] and len(letters.source) == 2
    words = load_edge_list(write("words.csv", "ann,from\nfrom,to\n"), ids="str")
    assert words.node_ids.tolist() == ["ann", "from", "to"] and len(words.source) == 2
    with pytest.raises(DataError, match=r"line 3: .*got ',x' \(an empty id\)"):
        load_edge_list(write("bad.csv", "ann,from\nfrom,to\n,x\n"), ids="str")
    with pytest.raises(DataError, match=r"line 2: .*got 'src dst' \(a header: skip it with dataset\.skip_lines=2\)"):
        load_edge_list(write("commented.csv", "# a graph\nsrc dst\nann bob\n"), ids="str")


def test_headers_of_node_files(write):
    edges = write("e.csv", "0,1\n1,2\n2,0\n")
    files = dict(
        labels=write("l.csv", "paper,class\n0,0\n1,1\n2,0\n"), features=write("f.csv", "paper,a\n0,1\n1,1\n2,3\n")
    )
    graph = load_dataset(config(edges, **files, splits=write("s.csv", "paper,part\n0,train\n1,val\n2,test\n")))
    assert graph.y.tolist() == [0, 1, 0] and graph.x.tolist() == [[1], [1], [3]] and graph.train_mask.tolist()[0]
    with pytest.raises(DataError, match="line 1: .*got 'x,0'"):  # a number is in it: no header
        load_dataset(config(edges, labels=write("m.csv", "x,0\n1,1\n2,0\n")))


def test_absent_file(tmp_path):
    with pytest.raises(DataError, match=r"dataset\.path: expected a file; there is no nowhere\.csv"):
        load_dataset(config("nowhere.csv", root=str(tmp_path)))
    with pytest.raises(DataError, match=r"is a folder\. One of \.npy is read by dataset=folder"):
        load_dataset(config(str(tmp_path)))
    (tmp_path / "edges.csv").write_text("0,1\n")
    with pytest.raises(DataError, match=r"this is a file; an edge list is read by dataset=edge_list"):
        load_dataset(DatasetConfig(name="folder", path=str(tmp_path / "edges.csv")))
    with pytest.raises(ConfigError, match=r"dataset\.path: expected the edge list"):
        load_dataset(DatasetConfig(name="edge_list"))


X4, Y4 = np.ones((4, 2)), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    "files, wanted",
    [
        (
            {"features": X4[:3]},
            r"features.npy: expected one row for each of the 4 nodes.* got 3 rows, the first.* is 3",
        ),
        ({"features": np.ones((5, 2))}, r"features.npy: expected only nodes of e.csv \(4 nodes, 0\.\.3\); got 5 rows"),
        ({"labels": Y4[:3]}, "labels.npy: expected one row for each of the 4 nodes"),
        ({"features": X4 * np.array([[1], [1], [np.nan], [1]])}, "features of 1 nodes are NaN .* first is node 2"),
        ({"features": X4 * np.inf}, "features of 4 nodes are NaN or infinite"),
        ({"features": np.array([["a"]] * 4)}, "expected numbers as features; got <U1"),
        ({"features": np.ones(4)}, r"expected one feature row per node, \[4, width\]; got \[4\]"),
        ({"labels": np.array([0, 1, 2, 4_000])}, "labels run up to 4000 but only 4 nodes have one"),
        ({"labels": np.array([0, 1, -2, 1])}, "labels must be 0, 1, 2, .* node 2 has -2"),
        ({"labels": np.array([0, 1, 0.5, 1])}, "expected class numbers"),
        ({"labels": np.array([-1, -1, -1, -1])}, "every label is -1"),
        ({"labels": np.full((4, 2), 3)}, "must be 0 or 1"),
        (
            {"features": "0,1\n1,1\n2,1\n"},
            "features.csv: expected one row for each of the 4 nodes.*first node without is 3",
        ),
        ({"features": "0,1\n1,1\n2,nan\n3,1\n"}, r"features.csv, line 3: .*got '2,nan' \(features must be finite"),
        ({"features": "0,1\n1,1\n2,\n3,1\n"}, r"features.csv, line 3: .*got '2,'"),
        ({"features": "0,1\n1,1,1\n2,1\n3,1\n"}, r"features.csv, line 2: .*got '1,1,1'"),
        ({"features": "0,1\n1,1\n1,2\n3,1\n"}, r"features.csv, line 3: .*\(this id a second time\)"),
        (
            {"labels": "id,label\n0,0\n1,dog\n"},
            r"labels.csv, line 3: expected `id,label`; got '1,dog' \(labels are class numbers",
        ),
        ({"labels": "0,0\n1,1\n9,1\n"}, r"labels.csv: expected only nodes of e.csv \(4 nodes, 0\.\.3\); .* such as 9"),
        ({"labels": "0,0\n-1,1\n"}, r"labels.csv, line 2: .*got '-1,1'"),
        ({"labels": "0,0\n1,-7\n"}, r"labels.csv, line 2: .*got '1,-7'"),
        ({"splits": "0,train\n1,training\n"}, r"splits.csv, line 2: expected `id,train\|val\|test`; got '1,training'"),
        ({"splits": "0,train\n77,test\n"}, "splits.csv: expected only nodes of e.csv"),
        ({"splits": "0,val\n1,test\n"}, "the training split is empty"),
        (
            {"labels": "0,0\n1,1\n", "splits": "0,train\n3,test\n"},
            "1 nodes of the test split have no label, the first is node 3",
        ),
    ],
)
def test_files_that_disagree(write, files, wanted):
    paths = {"labels": write("l.csv", LABELS)}
    for setting, content in files.items():
        paths[setting] = write(f"{setting}.{'npy' if isinstance(content, np.ndarray) else 'csv'}", content)
    with pytest.raises(DataError, match=wanted):
        load_dataset(config(write("e.csv", EDGES), **paths))


def test_pickled_arrays_are_refused(write, tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"x\.npy: expected a \.npy file of numbers; got: .*Python objects"):
        load_dataset(config(write("e.csv", EDGES), labels=write("l.csv", LABELS), features=str(tmp_path / "x.npy")))
    with pytest.raises(ConfigError, match=r"y\.npy: expected a \.csv whose first column is the id"):
        load_dataset(config(write("e.csv", EDGES), ids="str", labels=write("y.npy", Y4)))


def test_splits(write):
    path, labels = (
        write("e.csv", "".join(f"{i},{(i + 1) % 100}\n" for i in range(100))),
        write("y.npy", np.arange(100) % 2),
    )
    sizes = {}
    for split in ("default", "random:0.5,0.1,0.1", "random:1,0,0"):
        graph = load_dataset(config(path, labels=labels, split=split))
        sizes[split] = [int(mask.sum()) for mask in (graph.train_mask, graph.val_mask, graph.test_mask)]
    assert sizes == {"default": [60, 20, 20], "random:0.5,0.1,0.1": [50, 10, 10], "random:1,0,0": [100, 0, 0]}
    for wrong in (
        "random:0.9,0.2,0.2",
        "random:0.5",
        "random:a,b,c",
        "random:0,0.5,0.5",
        "random:-1,1,1",
        "half",
        "3",
        "public",
    ):
        with pytest.raises(ConfigError, match=r"dataset\.split: expected"):
            load_dataset(config(path, labels=labels, split=wrong))
    with pytest.raises(ConfigError, match=r"dataset\.split: expected default, because dataset\.splits"):
        load_dataset(config(path, labels=labels, split="random:1,0,0", splits=write("s.csv", "0,train\n")))


def test_fingerprint_is_of_contents_not_of_places(write, tmp_path):
    first = config(write("e.csv", EDGES), labels=write("l.csv", LABELS))
    same = fingerprint(first)
    os.utime(first.path, (1, 1))
    (tmp_path / "elsewhere").mkdir()
    moved = config(write("elsewhere/e.csv", EDGES), labels=first.labels, cache="/nowhere", root="/nowhere")
    assert fingerprint(first) == fingerprint(moved) == same and len(same) == 16
    other = [
        config(first.path, labels=first.labels, undirected=True),
        config(first.path, labels=first.labels, seed=1),
        config(first.path),
        config(write("f.csv", EDGES.replace("3,0", "3,1")), labels=first.labels),
        config(first.path, labels=write("l.csv", LABELS.replace("3,1", "3,0"))),
    ]
    assert len({same, *map(fingerprint, other)}) == 6


@pytest.mark.data
@pytest.mark.parametrize(
    "file, nodes, edges", [("ego-twitter.txt.gz", 81306, 1342310), ("email-enron.txt.gz", 36692, 183831)]
)
def test_real_edge_lists(file, nodes, edges):
    path = Path(DATA, "edge_lists", file)
    if not DATA or not path.exists():
        pytest.skip(f"GEMINI_GNN_DATA has no edge_lists/{file}")
    began = time.monotonic()
    read = load_edge_list(path, first_id=1, skip_lines=1)
    assert (read.num_nodes, len(read.source)) == (nodes, edges)
    assert time.monotonic() - began < 60, "parsed line by line?"  # 0.5 s when the machine is free


def test_integer_ids_with_large_gaps_are_said_to_make_nodes(write, caplog):
    assert load_edge_list(write("dense.csv", EDGES)).num_nodes == 4 and not caplog.text
    assert load_edge_list(write("sparse.csv", "5,900\n900,17\n")).num_nodes == 901
    assert "901 nodes, 0..900, of which only 3 have an edge" in caplog.text and "dataset.ids=str" in caplog.text
