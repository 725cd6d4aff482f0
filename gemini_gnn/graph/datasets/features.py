"""Node features: normalising those a graph has, making those it has not."""

from __future__ import annotations

import numpy as np

from gemini_gnn.errors import ConfigError
from gemini_gnn.graph.sparse import SparseRows, dense, row_chunks, without_ones


def normalized(x: np.ndarray | SparseRows, how: str) -> np.ndarray | SparseRows:
    """``x`` float32 ``[nodes, features]``, scaled.

    ``l1`` and ``l2`` divide each row by its norm (rows of zeros stay) and keep sparse rows sparse; ``zscore`` brings each
    column to mean 0 and deviation 1 over all nodes (constant columns become 0) and makes them dense, because a mean that
    is not 0 leaves no zeros. ``none`` returns ``x`` itself.
    """
    if how == "none":
        return x
    if how in ("l1", "l2"):
        # Of dense rows, a chunk at a time, also where x is sparse: the order of a sum decides its last bit, and so the two
        # forms give the same bits.
        norm = np.concatenate([norms(dense(x[rows]), how) for rows in row_chunks(x)])
        scale = np.where(norm == 0, 1, norm).astype(np.float32)
        if isinstance(x, SparseRows):
            x = x.packed()
            value = x.values() / np.repeat(scale, np.diff(x.ptr))
            return without_ones(SparseRows(x.ptr, x.index, value, x.width))
        return (x / scale[:, None]).astype(np.float32, copy=False)
    if how == "zscore":
        x = dense(x)
        mean = x.mean(axis=0, dtype=np.float64)
        deviation = x.std(axis=0, dtype=np.float64)
        constant = deviation <= 1e-7 * np.maximum(np.abs(mean), 1e-30)  # what rounding leaves of a constant column
        scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, deviation))
        return ((x - mean.astype(np.float32)) * scale.astype(np.float32)).astype(np.float32, copy=False)
    raise ConfigError(f"dataset.normalize: expected none, l1, l2 or zscore; got {how!r}")


def norms(x: np.ndarray, how: str) -> np.ndarray:
    """The ``l1`` or ``l2`` norm of each row."""
    return np.abs(x).sum(axis=1) if how == "l1" else np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64))


def degree_features(colptr: np.ndarray, row: np.ndarray) -> np.ndarray:
    """float32 ``[nodes, 3]``: log(1 + in-degree) and log(1 + out-degree), each with mean 0 and deviation 1, and a 1.

    The logarithm because degrees of real graphs span orders of magnitude; the constant so that a mean over neighbors
    tells a node that has some from one that has none.
    """
    n = len(colptr) - 1
    degrees = np.stack([np.diff(colptr), np.bincount(row, minlength=n)], axis=1)
    x = dense(normalized(np.log1p(degrees).astype(np.float32), "zscore"))
    return np.concatenate([x, np.ones((n, 1), dtype=np.float32)], axis=1)


def random_features(setting: str, num_nodes: int, seed: int) -> np.ndarray:
    """float32 ``[num_nodes, width]`` standard normal for ``setting`` = ``random:<width>``.

    Raises:
        ConfigError: ``setting`` is neither that nor ``degree``.
    """
    kind, _, width = setting.partition(":")
    if kind != "random" or not width.isdigit() or int(width) < 1:
        raise ConfigError(f"dataset.featureless: expected degree or random:<width>; got {setting!r}")
    return np.random.default_rng([seed, 0xFEA7]).standard_normal((num_nodes, int(width)), dtype=np.float32)
