"""Which nodes train, validate and test."""

from __future__ import annotations

import numpy as np

from gemini_gnn.errors import ConfigError, DataError

PARTS = ("train", "val", "test")


def choose_split(
    name: str,
    masks: dict[str, np.ndarray],
    split: str,
    default: str,
    labelled: np.ndarray,
    seed: int,
) -> tuple[dict[str, np.ndarray], str]:
    """The three masks ``bool [nodes]`` that ``dataset.split`` names, and its name for the logs.

    Args:
        masks: the official splits, bool ``[nodes]`` or ``[nodes, splits]`` by part; empty without any.
        split: ``default``, ``public`` (the only official split), a number, or ``random:<train>,<val>,<test>``.
        default: what ``default`` stands for when there is no single official split.
        labelled: bool ``[nodes]``; random splits are drawn among these.

    Raises:
        ConfigError: no such split here, or fractions that are none.
        DataError: masks of the wrong shape.
    """
    several = max((m.shape[1] for m in masks.values() if m.ndim == 2), default=0)
    if split == "default":
        split = default if not masks else "0" if several else "public"
    if split.startswith("random:"):
        return random_split(labelled, fractions(split), seed), f"{split} (seed {seed})"
    offered = ([f"0..{several - 1}"] if several else ["public"] if masks else []) + ["random:<train>,<val>,<test>"]
    fits = (several and split.isdigit() and int(split) < several) or (masks and not several and split == "public")
    if not fits:
        raise ConfigError(f"dataset.split: expected default or {' or '.join(offered)} for {name}; got {split!r}")
    chosen = {}
    for part in PARTS:
        mask = np.asarray(masks.get(part, np.zeros(len(labelled), dtype=bool)))
        mask = mask[:, int(split)] if mask.ndim == 2 else mask
        if mask.shape != labelled.shape:
            raise DataError(
                f"{name}: expected {part}_mask with one entry per node ({len(labelled)}); got {list(mask.shape)}"
            )
        if mask.dtype.kind not in "bui" or (mask.dtype != np.bool_ and not np.isin(mask, (0, 1)).all()):
            raise DataError(f"{name}: expected {part}_mask to hold true or false; got {mask.dtype}")
        chosen[part] = mask.astype(bool)
    return chosen, split


def fractions(split: str) -> tuple[float, float, float]:
    """``random:0.6,0.2,0.2`` -> ``(0.6, 0.2, 0.2)``.

    Raises:
        ConfigError: not three fractions, or they sum to more than 1.
    """
    try:
        train, val, test = (float(part) for part in split.removeprefix("random:").split(","))
        good = min(train, val, test) >= 0 and train > 0 and train + val + test <= 1 + 1e-9
    except ValueError:
        good = False
    if not good:
        raise ConfigError(
            "dataset.split: expected random:<train>,<val>,<test> with fractions of the labelled nodes that sum to "
            f"at most 1, such as random:0.6,0.2,0.2; got {split!r}"
        )
    return train, val, test


def random_split(labelled: np.ndarray, shares: tuple[float, float, float], seed: int) -> dict[str, np.ndarray]:
    """A seeded draw among the labelled nodes. Shares that sum to 1 use every one of them."""
    nodes = np.random.default_rng([seed, 0x5B117]).permutation(np.flatnonzero(labelled))
    ends = [round(share * len(nodes)) for share in np.cumsum(shares)]
    masks = {}
    for part, begin, end in zip(PARTS, [0, *ends], ends, strict=False):
        masks[part] = np.zeros(len(labelled), dtype=bool)
        masks[part][nodes[begin:end]] = True
    return masks
