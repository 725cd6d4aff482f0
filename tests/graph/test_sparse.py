"""Sparse rows stand where a dense array could stand."""

import numpy as np
import pytest

from gemini_gnn.errors import DataError
from gemini_gnn.graph.sparse import SparseRows, sparse


def matrix(ones: bool = False) -> np.ndarray:
    draw = np.random.default_rng(0)
    x = (draw.random((40, 30)) < 0.1).astype(np.float32)
    x[7] = 0
    return x if ones else x * draw.standard_normal(x.shape).astype(np.float32)


@pytest.mark.parametrize("ones", [True, False])
def test_indexing_means_what_it_means_for_a_dense_array(ones):
    x = matrix(ones)
    rows = sparse(x)
    assert (rows.value is None) == ones and rows.shape == x.shape and len(rows) == 40
    mask = np.zeros(40, dtype=bool)
    mask[[3, 7, 39]] = True
    for pick in (
        slice(None),
        slice(5, 20),
        slice(20, 5),
        slice(0, 40, 3),
        np.array([39, 0, 7, 7]),
        np.array([], int),
        mask,
    ):
        found = rows[pick]
        assert np.array_equal(found.dense(), x[pick]) and found.stored == np.count_nonzero(x[pick])
        assert np.array_equal(found[1:].dense(), x[pick][1:])
    rows.validate("x")
    rows[5:20].validate("x")
    assert rows.dense_bytes == x.nbytes and rows.nbytes == 8 * 41 + rows.stored * (4 if ones else 8)


@pytest.mark.parametrize(
    ("index", "value", "said"),
    [
        ([0, 5, 1], [1, 1, 1], r"columns in 0\.\.4; row 0 has column 5 with value 1"),
        ([0, -1, 1], [1, 1, 1], "columns in 0..4; row 0 has column -1"),
        ([0, 0, 1], None, "ascend within a row, each once; row 0 has column 0"),
        ([3, 2, 1], None, "ascend within a row, each once; row 0 has column 2"),
        ([0, 3, 1], [1, 1, np.nan], "finite values; row 2 has column 1 with value nan"),
    ],
)
def test_what_breaks_a_promise_is_named(index, value, said):
    ptr = np.array([0, 2, 2, 3], dtype=np.int64)
    rows = SparseRows(ptr, np.array(index, np.int32), None if value is None else np.array(value, np.float32), 5)
    with pytest.raises(DataError, match=said):
        rows.validate("x")
