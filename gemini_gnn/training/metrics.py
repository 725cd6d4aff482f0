"""Classification metrics from counts: counts add up over ranks, metrics do not."""

from __future__ import annotations

import numpy as np


def counts(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """True positives, false positives and false negatives of each class.

    Args:
        logits: ``[nodes, classes]``.
        y: int64 ``[nodes]`` (the highest logit is the prediction; -1 is not counted), or 0/1 ``[nodes, classes]``
            (a logit above 0 predicts the label).

    Returns:
        int64 ``[4, classes]``: tp, fp, fn, and in row 3 column 0 the number of rows predicted exactly right, column 1
        the number of rows. Sums over ranks are the counts of the whole.
    """
    classes = logits.shape[1]
    out = np.zeros((4, max(classes, 2)), dtype=np.int64)
    if y.ndim == 1:
        keep = y >= 0
        logits, y = logits[keep], y[keep]
        predicted = logits.argmax(axis=1) if len(logits) else np.zeros(0, dtype=np.int64)
        hit = predicted == y
        out[0, :classes] = np.bincount(y[hit], minlength=classes)
        out[1, :classes] = np.bincount(predicted[~hit], minlength=classes)
        out[2, :classes] = np.bincount(y[~hit], minlength=classes)
        out[3, 0], out[3, 1] = hit.sum(), len(y)
    else:
        predicted_labels, true = logits > 0, y.astype(bool)
        out[0, :classes] = (predicted_labels & true).sum(axis=0)
        out[1, :classes] = (predicted_labels & ~true).sum(axis=0)
        out[2, :classes] = (~predicted_labels & true).sum(axis=0)
        out[3, 0], out[3, 1] = (predicted_labels == true).all(axis=1).sum(), len(y)
    return out


def from_counts(c: np.ndarray) -> dict[str, float]:
    """accuracy (exact match for multi-label), micro F1 and macro F1 = mean over classes of 2 tp / (2 tp + fp + fn).

    A class that neither occurs nor is predicted has no F1 and is left out of the mean, as in scikit-learn.
    """
    tp, fp, fn = c[0].astype(float), c[1].astype(float), c[2].astype(float)
    seen = (tp + fp + fn) > 0
    f1 = 2 * tp[seen] / (2 * tp[seen] + fp[seen] + fn[seen])
    total = 2 * tp.sum() + fp.sum() + fn.sum()
    return {
        "accuracy": float(c[3, 0] / c[3, 1]) if c[3, 1] else float("nan"),
        "micro_f1": float(2 * tp.sum() / total) if total else float("nan"),
        "macro_f1": float(f1.mean()) if seen.any() else float("nan"),
    }
