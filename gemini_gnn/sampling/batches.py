"""Which seeds make which batch: a pure function of (seed, epoch, index), known to every rank without communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gemini_gnn import hashing
from gemini_gnn.errors import ConfigError


@dataclass
class BatchPlan:
    """The batches of every epoch.

    The epoch's order is an argsort of ``hash(seed, epoch, original id)``, so it does not know how nodes are numbered:

    - ``order="global"``: all seeds in that order are cut into global batches of ``batch_size * ranks``; each seed goes to
      the rank that owns it. A global batch is the same set for any number of ranks (with the same product) and any
      partition; the ranks' shares of it are uneven.
    - ``order="local"``: every rank cuts its own seeds into batches of ``batch_size``; shares are even up to the last batch.

    Used from one thread at a time (the permutation of the latest epoch is kept).

    Attributes:
        train_seeds: per rank int64 new ids of its seeds, disjoint.
        original: integer array, new id -> original id; indexed with seeds only.
        batch_size: seeds per rank; -1 = all seeds in one batch.
        order: "local" | "global".
        seed: of the shuffle.

    Raises:
        ConfigError: order or batch_size outside what is described here.
    """

    train_seeds: Sequence[np.ndarray]
    original: np.ndarray
    batch_size: int
    order: str = "local"
    seed: int = 0
    _epoch: int | None = field(default=None, init=False, repr=False)
    _shuffled: list[np.ndarray] = field(default_factory=list, init=False, repr=False)
    _cuts: list[np.ndarray] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.order not in ("local", "global"):
            raise ConfigError(f"sampling.order: expected local or global; got {self.order!r}")
        if self.batch_size != -1 and self.batch_size < 1:
            raise ConfigError(f"sampling.batch_size: expected a positive number or -1 (all); got {self.batch_size}")
        if not self.train_seeds:
            raise ConfigError("train_seeds: expected one array per rank; got none")
        # Ascending original ids first: what is decided next cannot depend on the order the seeds were given in.
        self.train_seeds = [
            np.asarray(s, dtype=np.int64)[np.argsort(self.original[np.asarray(s, dtype=np.int64)], kind="stable")]
            for s in self.train_seeds
        ]

    @property
    def ranks(self) -> int:
        return len(self.train_seeds)

    @property
    def total(self) -> int:
        """Seeds of an epoch over all ranks."""
        return sum(len(s) for s in self.train_seeds)

    @property
    def batches_per_epoch(self) -> int:
        """The same on all ranks, so that every rank takes part in every batch."""
        if self.batch_size == -1:
            return min(self.total, 1)
        if self.order == "global":
            return -(-self.total // (self.batch_size * self.ranks))
        return -(-max(len(s) for s in self.train_seeds) // self.batch_size)

    def global_count(self, epoch: int, index: int) -> int:
        """Seeds of batch ``index`` over all ranks; 0 beyond the last batch."""
        if self.batch_size == -1:
            return self.total if index == 0 else 0
        if self.order == "global":
            return _overlap(self.total, self.batch_size * self.ranks, index)
        return sum(_overlap(len(s), self.batch_size, index) for s in self.train_seeds)

    def seeds(self, epoch: int, index: int, rank: int) -> np.ndarray:
        """int64 new ids of the seeds of ``rank`` in batch ``index``, in shuffled order; may be empty.

        An index beyond the last batch gives an empty batch (the last step of an epoch may accumulate over fewer).
        """
        if index >= self.batches_per_epoch:
            return np.empty(0, dtype=np.int64)
        if self._epoch != epoch:
            self._shuffle(epoch)
        cuts = self._cuts[rank]
        return self._shuffled[rank][cuts[index] : cuts[index + 1]]

    def _shuffle(self, epoch: int) -> None:
        base = hashing.stream(hashing.SHUFFLE, self.seed, epoch)
        hashes = [hashing.keys(base, self.original[s]) for s in self.train_seeds]
        orders = [np.argsort(h, kind="stable") for h in hashes]
        self._shuffled = [s[o] for s, o in zip(self.train_seeds, orders, strict=True)]
        batches = np.arange(self.batches_per_epoch + 1)
        if self.batch_size == -1:
            self._cuts = [batches * len(s) for s in self.train_seeds]
        elif self.order == "local":
            self._cuts = [np.minimum(batches * self.batch_size, len(s)) for s in self.train_seeds]
        else:
            # A rank's share of a global batch is what lies between two hashes of the global order.
            every = np.sort(np.concatenate(hashes))
            limits = every[batches[:-1] * self.batch_size * self.ranks]
            self._cuts = [np.append(np.searchsorted(h[o], limits), len(h)) for h, o in zip(hashes, orders, strict=True)]
        self._epoch = epoch


def _overlap(total: int, size: int, index: int) -> int:
    """How many of ``total`` items lie in the ``index``-th piece of ``size``."""
    return max(0, min(total - index * size, size))
