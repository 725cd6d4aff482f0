"""Features of which only the values that are not zero are given: the readers, what they refuse, and the form they take."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
import torch
from torch_geometric.data import Data

from gemini_gnn.config import DatasetConfig
from gemini_gnn.errors import ConfigError, DataError
from gemini_gnn.graph import sparse as sparse_module
from gemini_gnn.graph.baselines import features_only_accuracy, moments, standardised
from gemini_gnn.graph.datasets import fingerprint, from_folder, from_pyg, load_dataset
from gemini_gnn.graph.datasets.assemble import RawGraph, assemble
from gemini_gnn.graph.datasets.export import summary
from gemini_gnn.graph.sparse import SparseRows, dense, from_csr, laid_out, sparse

N, WIDTH = 60, 50


def words(ones: bool = True) -> np.ndarray:
    """``[60, 50]``, about one value in twenty is not zero; rows 3 and 59 are empty."""
    draw = np.random.default_rng(0)
    chosen = draw.random((N, WIDTH)) < 0.05
    chosen[[3, 59]] = False
    return np.where(chosen, 1 if ones else draw.standard_normal(chosen.shape), 0).astype(np.float32)


def raw(x, **changes) -> RawGraph:
    node = np.arange(N)
    return RawGraph("words", N, node, (node + 1) % N, x=x, y=node % 2, **changes)


def same_bits(one, other) -> bool:
    return one.shape == other.shape and dense(one).tobytes() == dense(other).tobytes()


@pytest.mark.parametrize("ones", [True, False])
@pytest.mark.parametrize("how", ["none", "l1", "l2", "zscore"])
def test_both_forms_are_the_same_numbers(ones, how, monkeypatch):
    monkeypatch.setattr(sparse_module, "CHUNK_BYTES", 7 * 4 * WIDTH)
    x = words(ones)
    wanted = assemble(raw(x), normalize=how, layout="dense").x
    assert isinstance(wanted, np.ndarray)
    for given in (x, sparse(x), x.astype(np.float64)):
        for layout in ("auto", "dense", "sparse"):
            graph = assemble(raw(given), normalize=how, layout=layout)
            assert same_bits(graph.x, wanted)
            assert isinstance(graph.x, SparseRows) == (layout != "dense" and how != "zscore")
    assert assemble(raw(sparse(x)), normalize="zscore").notes["normalize"] == "zscore, which makes the features dense"
    assert assemble(raw(x), normalize=how).notes["normalize"] == how


def test_auto_takes_what_is_four_times_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_module, "CHUNK_BYTES", 4 * 100)
    x = np.zeros((100, 100), dtype=np.float32)
    x[:, :22] = 1
    x[0, :30] = 1  # 8 * 101 bytes for the offsets and 4 for each value are at most a quarter of 40,000
    at_most = int(np.count_nonzero(x))
    assert sparse(x).nbytes * 4 <= x.nbytes and isinstance(laid_out(x, "auto"), SparseRows)
    x[1, :90] = 1
    while np.count_nonzero(x) * 4 + 808 <= 10_000:
        x[2, np.argmin(x[2])] = 1
    assert (
        np.count_nonzero(x) > at_most
        and laid_out(x, "auto") is x
        and laid_out(sparse(x), "auto").tobytes() == x.tobytes()
    )
    x[:, 12:] = 0
    x[0, 0] = 2  # with values of their own, each takes 8 bytes
    assert laid_out(x, "auto") is x
    # A file stays mapped where dense wins; and is not read to its end, if its beginning says enough.
    np.save(tmp_path / "x.npy", np.ones((N, WIDTH), dtype=np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert isinstance(assemble(raw(mapped)).x, np.memmap)


def test_normalised_ones_need_values_and_may_be_dense_again():
    x = np.zeros((N, WIDTH), dtype=np.float32)
    x[:, :9] = 1  # 44 of 200 bytes as ones, 80 with values
    assert isinstance(assemble(raw(x)).x, SparseRows) and isinstance(assemble(raw(x), normalize="l1").x, np.ndarray)


@pytest.mark.parametrize("ones", [True, False])
def test_the_baseline_never_makes_sparse_features_dense(ones, monkeypatch):
    x = words(ones)
    y = x.sum(axis=1) > 2
    graph = assemble(replace(raw(x), y=y.astype(int)), layout="dense")
    mean, deviation = moments(x)
    assert deviation == pytest.approx(x.astype(np.float64).std()) and np.allclose(
        mean, x.mean(axis=0, dtype=np.float64)
    )
    wanted, found = (standardised(form, *moments(form), np.float64) for form in (x, sparse(x)))
    right, left = np.random.default_rng(0).random((WIDTH, 3)), np.random.default_rng(0).random((N, 3))
    assert np.allclose(found @ right, wanted @ right, atol=1e-12)
    assert np.allclose(found.T @ left, wanted.T @ left, atol=1e-12)
    accuracy = features_only_accuracy(graph)
    monkeypatch.delattr(SparseRows, "dense")
    assert features_only_accuracy(replace(graph, x=sparse(x))) == accuracy > 0.5


def bad(ptr, index, value, width=WIDTH, rows=N):
    ptr = np.concatenate([ptr, np.full(rows + 1 - len(ptr), ptr[-1])]).astype(np.int64)
    return SparseRows(ptr, np.array(index), None if value is None else np.array(value, np.float32), width)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (bad([0, 1], np.array([50], np.int32), None), r"expected columns in 0\.\.49; row n0 has column 50"),
        (bad([0, 1], np.array([2**40]), None), r"expected columns in 0\.\.49; row n0 has column 1099511627776"),
        (bad([0, 1, 3], np.array([1, 4, 4], np.int32), None), "ascend within a row, each once; row n1 has column 4"),
        (bad([0, 1, 3], np.array([1, 4, 2], np.int32), None), "ascend within a row, each once; row n1 has column 2"),
        (bad([0, 1], np.array([1], np.int32), [np.nan]), "finite values; row n0 has column 1 with value nan"),
        (bad([0, 1], np.array([1], np.int32), [np.inf]), "finite values; row n0 has column 1 with value inf"),
        (bad([0], np.array([], np.int32), None, rows=59), r"one feature row per node, \[60, width\]; got \[59, 50\]"),
        (bad([0, 2], np.array([1], np.int32), None), "expected row offsets within 1 stored values; got 2"),
        (bad([0, 1], np.array([1.0]), None), "expected int32 columns and float32 values; got float64"),
        (
            from_csr(np.append(0, np.ones(60, int)), np.array([1]), np.array([1j]), 50),
            "float32 values; got int32 and complex",
        ),
        (bad([0, 1], np.array([1, 2], np.int32), [1.0]), "one value for each stored column"),
    ],
)
@pytest.mark.parametrize("layout", ["auto", "dense"])
def test_rows_that_break_a_promise_are_refused_by_the_users_id(x, said, layout):
    with pytest.raises(DataError, match=f"words: .*{said}"):
        assemble(raw(x, node_ids=np.array([f"n{i}" for i in range(N)])), normalize="l1", layout=layout)


def test_a_dense_file_with_nan_is_refused_as_sparse_too():
    x = words()
    x[4, 9] = np.nan
    with pytest.raises(DataError, match="finite values; row 4 has column 9 with value nan"):
        assemble(raw(x), normalize="l2")
    with pytest.raises(DataError, match="features of 1 nodes are NaN"):
        assemble(raw(x), normalize="l2", layout="dense")


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr", "dia", "lil"])
def test_the_matrices_of_scipy_and_torch(kind):
    for x in (words(), words(ones=False)):
        graph = from_pyg(data(scipy.sparse.csr_array(x).asformat(kind)))
        assert isinstance(graph.x, SparseRows) and same_bits(graph.x, x)
        assert (graph.x.value is None) == bool((x[x != 0] == 1).all())


def test_the_rows_of_a_matrix_count_the_nodes():
    given = Data(edge_index=torch.tensor([[0, 1], [1, 0]]), y=torch.arange(N) % 2)
    given.x = scipy.sparse.csr_array(words())
    assert from_pyg(given).num_nodes == N
    given.num_nodes = 2
    with pytest.raises(DataError, match=r"expected one feature row per node, \[2, width\]; got \[60, 50\]"):
        from_pyg(given)


class Pairs:  # what is used of torch-sparse's SparseTensor
    def __init__(self, x, value):
        self.x, self.value = torch.from_numpy(x).to_sparse_csr(), value

    def csr(self):
        value = self.x.values() if self.value else None
        return self.x.crow_indices(), self.x.col_indices(), value

    def size(self, dim):
        return self.x.shape[dim]


def data(x) -> Data:
    node = torch.arange(N)
    found = Data(edge_index=torch.stack([node, (node + 1) % N]), y=node % 2, num_nodes=N)
    found.x = x
    return found


def test_sparse_tensors_are_taken_as_they_are():
    ones, x = words(), words(ones=False)
    tensor = torch.from_numpy(x)
    for given in (tensor.to_sparse(), tensor.to_sparse_csr(), tensor.double().to_sparse_csr(), Pairs(x, True)):
        found = from_pyg(data(given)).x
        assert isinstance(found, SparseRows) and same_bits(found, x)
    assert same_bits(from_pyg(data(Pairs(ones, False))).x, ones)
    rounded = tensor.bfloat16()
    assert same_bits(from_pyg(data(rounded.to_sparse())).x, rounded.float().numpy())
    twice = torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (N, WIDTH))
    with pytest.raises(DataError, match=r"not coalesced\. Give `data\.x = data\.x\.coalesce\(\)`"):
        from_pyg(data(twice))
    assert from_pyg(data(twice.coalesce())).x.dense()[0, 1] == 3
    with pytest.raises(DataError, match=r"expected x as a dense tensor; got torch\.sparse_csc"):
        from_pyg(data(tensor.to_sparse_csc()))


def test_what_stands_twice_is_not_summed(tmp_path):
    twice = scipy.sparse.coo_array((np.ones(3, np.float32), ([5, 5, 7], [2, 2, 0])), shape=(N, WIDTH))
    with pytest.raises(DataError, match="each once; row 5 has column 2"):
        from_pyg(data(twice))
    outside = scipy.sparse.csc_array(
        (np.ones(1, np.float32), np.array([0]), np.append([0], np.ones(WIDTH, int))), (N, WIDTH)
    )
    outside.indices[0] = N + 1000
    with pytest.raises(DataError, match=r"expected x as a matrix \[nodes, features\]; got"):
        from_pyg(data(outside))


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "mine"
    place.mkdir()
    node = np.arange(N)
    np.save(place / "edge_index.npy", np.stack([node, (node + 1) % N]))
    np.save(place / "y.npy", node % 2)
    scipy.sparse.save_npz(place / "x.npz", scipy.sparse.csr_array(words(ones=False)))
    return place


def test_a_folder_with_sparse_features(folder):
    config = DatasetConfig(name="folder", path=str(folder))
    x, before = words(ones=False), fingerprint(config)
    assert same_bits(from_folder(folder).x, x) and isinstance(load_dataset(config).x, SparseRows)
    assert isinstance(load_dataset(config, layout="dense").x, np.ndarray)
    assert "50 per node" in summary(from_folder(folder))["features"]
    scipy.sparse.save_npz(folder / "x.npz", scipy.sparse.csr_array(words()))
    assert fingerprint(config) != before
    (folder / "x.npz").rename(folder / "z.npz")
    with pytest.raises(DataError, match=r"expected only .* got z\.npz; rename"):
        from_folder(folder)
    (folder / "z.npz").rename(folder / "x.npz")
    np.save(folder / "x.npy", x)
    with pytest.raises(DataError, match=r"expected x\.npy or x\.npz; got both; remove one"):
        from_folder(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        dict(a=np.ones(3)),
        dict(format=np.array("csr"), data=np.ones(1), indices=np.zeros(1, int), shape=np.array([N, WIDTH])),
        dict(
            format=np.array("csr"), data=np.array([{}]), indices=np.zeros(1), indptr=np.zeros(2), shape=np.array([N, 2])
        ),
        dict(format=np.array("coo"), data=np.ones(1), row=np.array([N]), col=np.array([0]), shape=np.array([N, WIDTH])),
        dict(format=np.array("linalg"), shape=np.array([N, WIDTH])),
    ],
)
def test_a_file_that_is_no_sparse_matrix_is_refused(folder, content):
    if isinstance(content, bytes):
        (folder / "x.npz").write_bytes(content)
    else:
        np.savez(folder / "x.npz", **content)
    with pytest.raises(
        DataError, match=r"x\.npz: expected the \.npz of scipy\.sparse\.save_npz\(path, matrix\); got: ."
    ):
        from_folder(folder)


def edge_list(tmp_path, features, name="x.csv", **settings) -> DatasetConfig:
    ids = settings.get("ids", "int")
    shown = (lambda node: f"p {node:02}") if ids == "str" else str
    (tmp_path / "e.csv").write_text("".join(f"{shown(i)},{shown((i + 1) % N)}\n" for i in range(N)))
    (tmp_path / "y.csv").write_text("".join(f"{shown(i)},{i % 2}\n" for i in range(N)))
    if isinstance(features, str):
        (tmp_path / name).write_text(features)
    files = {"path": "e.csv", "labels": "y.csv", "features": name}
    return DatasetConfig(name="edge_list", **{k: str(tmp_path / v) for k, v in files.items()}, **settings)


def lines(x, separator, between):
    """In another order than the nodes', and without a line for a node that has no values."""
    for node in np.random.default_rng(1).permutation(N):
        if columns := np.flatnonzero(x[node]).tolist():
            yield f"{node}{separator}{between.join(f'{column}:{float(x[node, column])}' for column in columns)}\n"


@pytest.mark.parametrize(
    "separator, between", [(",", " "), (",", ","), (" ", " "), ("\t", " "), ("\t", "\t"), (";", ";")]
)
@pytest.mark.parametrize("header", ["", "id,features\n", "# from elsewhere\n3\n"])
def test_lines_of_features_and_values(tmp_path, separator, between, header):
    x = words(ones=False)
    x[:, WIDTH - 1] = 0
    x[7, WIDTH - 1] = 0.5  # the width is that of the largest feature
    graph = load_dataset(edge_list(tmp_path, header + "".join(lines(x, separator, between))))
    assert isinstance(graph.x, SparseRows) and same_bits(graph.x, x), "a node without a line has no values"


def test_text_ids_with_blanks_and_a_matrix_beside_an_edge_list(tmp_path):
    x = words()
    text = "".join(f"p {node:02},{' '.join(f'{c}:1' for c in np.flatnonzero(x[node]))}\n" for node in range(N)[::-1])
    wide = int(np.flatnonzero(x.any(axis=0))[-1]) + 1
    graph = load_dataset(edge_list(tmp_path, text, ids="str"))
    assert graph.x.value is None and same_bits(graph.x, np.ascontiguousarray(x[:, :wide]))
    scipy.sparse.save_npz(tmp_path / "x.npz", scipy.sparse.csr_matrix(x))
    assert same_bits(load_dataset(edge_list(tmp_path, None, "x.npz")).x, x)
    with pytest.raises(ConfigError, match=r"x\.npz: expected a \.csv whose first column is the id.* got a \.npz"):
        load_dataset(edge_list(tmp_path, None, "x.npz", ids="str"))
    scipy.sparse.save_npz(tmp_path / "x.npz", scipy.sparse.csr_matrix(x[:50]))
    with pytest.raises(
        DataError, match=r"x\.npz: expected one row for each of the 60 nodes.* first node without is 50"
    ):
        load_dataset(edge_list(tmp_path, None, "x.npz"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1,3:1 3:2", "feature 3 after 3"),
        ("1,3:1 2:2", "feature 2 after 3"),
        ("1,-1:1", r"feature -1 is not in 0\.\.2147483646"),
        ("1,2147483647:1", "feature 2147483647 is not in"),
        ("1,3:nan", "features must be finite float32 numbers"),
        ("1,3:1e39", "features must be finite float32 numbers"),
        ("1,3:1:2", "'1:2' is no number"),
        ("1,3", "'3' has no colon"),
        ("1,a:1", "'a' is no integer"),
        ("00,3:1", "this id a second time"),
        ("-4,3:1", r"ids start at dataset\.first_id=0"),
        ("x,3:1", "'x' is no integer"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, line, said):
    with pytest.raises(
        DataError, match=rf"x\.csv, line 2: expected `id,feature:value \.\.\. .*`; got '{line}' \(.*{said}"
    ):
        load_dataset(edge_list(tmp_path, f"0,3:1\n{line}\n"))


def test_a_first_line_with_values_is_no_header(tmp_path):
    with pytest.raises(DataError, match=r"x\.csv, line 1: .*got 'x0,3:1' \('x0' is no integer"):
        load_dataset(edge_list(tmp_path, "x0,3:1\n1,3:1\n"))


def test_a_line_about_another_node_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"x\.csv: expected only nodes of e\.csv .* such as 60"):
        load_dataset(edge_list(tmp_path, "0,3:1\n60,3:1\n"))
