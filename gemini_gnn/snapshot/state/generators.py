"""The random generators of a process: Python's, numpy's, torch's, and CUDA's where it is in use.

``read`` runs at the end of a step, before anything can draw, while training waits. So it only asks each generator for its
state, which is the caller's own from then on. Another thread can turn it into arrays (``values``) later.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch


class Generators(NamedTuple):
    """The states as the libraries return them."""

    python: tuple[Any, ...]
    numpy: Any
    torch: torch.Tensor
    cuda: torch.Tensor | None


def read() -> Generators:
    return Generators(
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    )


def values(states: Generators) -> dict[str, Any]:
    """As a tree for ``tree.pack``."""
    version, words, gauss = states.python
    tree: dict[str, Any] = {
        "python": [version, np.asarray(words, dtype=np.uint32), gauss],
        "numpy": states.numpy,
        "torch": states.torch,
    }
    if states.cuda is not None:
        tree["cuda"] = states.cuda
    return tree


def load(tree: dict[str, Any]) -> None:
    """The inverse of ``read`` and ``values``. Call it last: any other loading may draw."""
    version, words, gauss = tree["python"]
    random.setstate((version, tuple(int(w) for w in words), gauss))
    np.random.set_state(tree["numpy"])
    torch.set_rng_state(tree["torch"])
    if "cuda" in tree and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(tree["cuda"])
