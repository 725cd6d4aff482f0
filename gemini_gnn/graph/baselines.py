"""The accuracy of features alone and of structure alone: the two numbers a graph neural network has to beat.

Both choose their one setting on the validation split and report accuracy on the test split, as training does. No torch,
no randomness.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gemini_gnn.errors import DataError
from gemini_gnn.graph.graph import Graph
from gemini_gnn.graph.sparse import SparseRows


def features_only_accuracy(graph: Graph, penalties: tuple[float, ...] = (1e-2, 1e-1, 1.0)) -> float:
    """Test accuracy of multinomial logistic regression on the node features, blind to the edges.

    Args:
        penalties: candidates for the L2 penalty ``penalty / 2 * |weights|^2``, chosen by validation accuracy.

    Raises:
        DataError: multi-label graph, or an empty test split.
    """
    require_single_label(graph)
    train = graph.x[graph.train_mask]
    mean, deviation = moments(train)
    x = standardised(train, mean, deviation, np.float64)

    def accuracies(weights: np.ndarray) -> tuple[float, float]:
        predicted = {}
        for part, mask in (("val", graph.val_mask), ("test", graph.test_mask)):
            scaled = standardised(graph.x[mask], mean, deviation, np.float32)
            predicted[part] = (scaled @ weights[:-1].astype(np.float32) + weights[-1].astype(np.float32)).argmax(axis=1)
        return accuracy(graph, predicted["val"], graph.val_mask), accuracy(graph, predicted["test"], graph.test_mask)

    results = []
    weights = np.zeros((x.shape[1] + 1, graph.num_classes))
    for penalty in sorted(penalties, reverse=True):  # from the strongest on, each starts where the last one ended
        weights = logistic_regression(x, graph.y[graph.train_mask], weights, penalty)
        results.append(accuracies(weights))
    return max(results)[1] if graph.val_mask.any() else results[-1][1]


def moments(x: np.ndarray | SparseRows) -> tuple[np.ndarray, float]:
    """Mean of each column, and the deviation of all values: rescaling columns each by its own would change the features."""
    if not isinstance(x, SparseRows):
        x = np.asarray(x, dtype=np.float64)
        return x.mean(axis=0), float(x.std())
    values, count = x.values().astype(np.float64), len(x) * x.width
    mean = np.bincount(x.columns(), weights=values, minlength=x.width) / len(x)
    return mean, float(np.sqrt(max(values @ values / count - (values.sum() / count) ** 2, 0.0)))


def standardised(x: np.ndarray | SparseRows, mean: np.ndarray, deviation: float, kind: type[np.floating]) -> Any:
    """``(x - mean) / deviation``, to multiply with: an array, or an operator, because without its mean x has no zeros."""
    deviation = deviation or 1.0
    if not isinstance(x, SparseRows):
        return (np.asarray(x, dtype=kind) - mean.astype(kind)) / kind(deviation)
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import LinearOperator

    x = x.packed()
    rows = csr_array((x.values(), x.index, x.ptr), shape=x.shape)

    def times(w: np.ndarray) -> np.ndarray:
        return (rows @ w - mean @ w) / deviation

    def transposed_times(e: np.ndarray) -> np.ndarray:
        return (rows.T @ e - np.outer(mean, e.sum(axis=0))) / deviation

    return LinearOperator(x.shape, matvec=times, matmat=times, rmatmat=transposed_times, dtype=np.float64)


def logistic_regression(x: Any, y: np.ndarray, start: np.ndarray, penalty: float) -> np.ndarray:
    """Weights ``[features + 1, classes]`` (the last row is the bias) that minimise mean cross-entropy + L2 penalty.

    Args:
        x: ``[rows, features]``, an array or what :func:`standardised` makes of sparse rows.
    """
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    shape = start.shape
    rows = np.arange(len(y))

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logits = x @ weights[:-1] + weights[-1]
        logits -= logits.max(axis=1, keepdims=True)
        exponentials = np.exp(logits)
        sums = exponentials.sum(axis=1)
        value = float(np.mean(np.log(sums) - logits[rows, y]) + penalty / 2 * np.sum(weights[:-1] ** 2))
        error = exponentials / sums[:, None]
        error[rows, y] -= 1
        error /= len(y)
        gradient = np.concatenate([x.T @ error + penalty * weights[:-1], error.sum(axis=0, keepdims=True)])
        return value, gradient.ravel()

    # One BLAS thread: the products are small, and where cores are busy the threads of a product wait for one another
    # longer than it takes (4.2 s instead of 0.1 s on the default data set, measured on two busy cores).
    with threadpool_limits(1, user_api="blas"):
        found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 100})
    return found.x.reshape(shape)


def structure_only_accuracy(graph: Graph, rates: tuple[float, ...] = (0.5, 0.8, 0.9), rounds: int = 30) -> float:
    """Test accuracy of label propagation from the training nodes along the edges, blind to the features.

    ``F <- rate * mean of F over the in-neighbors + (1 - rate) * training labels`` (Zhou et al. 2004, with the mean as
    in random walks); a node nothing reaches gets the most frequent training class.

    Args:
        rates: candidates for ``rate``, chosen by validation accuracy.

    Raises:
        DataError: multi-label graph, or an empty test split.
    """
    from scipy.sparse import csr_matrix

    require_single_label(graph)
    degree = np.diff(graph.colptr)
    weight = np.repeat((1 / np.maximum(degree, 1)).astype(np.float32), degree)
    mean = csr_matrix((weight, graph.row, graph.colptr), shape=(graph.num_nodes, graph.num_nodes))
    train = np.zeros((graph.num_nodes, graph.num_classes), dtype=np.float32)
    train[graph.train_mask, graph.y[graph.train_mask]] = 1
    most_frequent = int(train.sum(axis=0).argmax())

    results = []
    for rate in rates:
        f = train
        for _ in range(rounds):
            f = np.float32(rate) * (mean @ f) + np.float32(1 - rate) * train
        predicted = np.where(f.any(axis=1), f.argmax(axis=1), most_frequent)
        results.append(
            (
                accuracy(graph, predicted[graph.val_mask], graph.val_mask),
                accuracy(graph, predicted[graph.test_mask], graph.test_mask),
            )
        )
    return max(results)[1] if graph.val_mask.any() else results[-1][1]


def accuracy(graph: Graph, predicted: np.ndarray, mask: np.ndarray) -> float:
    return float(np.mean(predicted == graph.y[mask])) if mask.any() else 0.0


def require_single_label(graph: Graph) -> None:
    if graph.multi_label:
        raise DataError(f"{graph.name}: the baselines are for graphs with one label per node; got a multi-label graph")
    if not graph.test_mask.any():
        raise DataError(f"{graph.name}: the test split is empty, so there is no test accuracy")
