"""Which seeds make which batch: every seed once per epoch, whatever the ranks and the partition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gemini_gnn.errors import ConfigError
from gemini_gnn.sampling.batches import BatchPlan


def plan_of(num_seeds: int, ranks: int, batch_size: int, order: str, seed: int = 0, partition: int = 0) -> BatchPlan:
    """Seeds are the original ids 0, 3, 6, ...; `partition` says who owns them and how they are renumbered."""
    n = 3 * num_seeds
    original = np.random.default_rng(100 + partition).permutation(n)
    new_id = np.argsort(original)
    seeds = new_id[np.arange(0, n, 3)]
    bounds = np.linspace(0, n, ranks + 1).astype(int)
    bounds[1:-1] += partition % 3  # a little uneven
    per_rank = [np.sort(seeds[(seeds >= a) & (seeds < b)]) for a, b in itertools.pairwise(bounds)]
    return BatchPlan(per_rank, original, batch_size, order, seed)


def originals(plan: BatchPlan, epoch: int, index: int) -> list[list[int]]:
    return [plan.original[plan.seeds(epoch, index, rank)].tolist() for rank in range(plan.ranks)]


@pytest.mark.parametrize("order", ["local", "global"])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [-1, 1, 7, 1000])
def test_every_seed_once_per_epoch(order, ranks, batch_size):
    plan = plan_of(50, ranks, batch_size, order)
    for epoch in (0, 1, 0):
        batches = [originals(plan, epoch, index) for index in range(plan.batches_per_epoch)]
        everything = sorted(v for batch in batches for share in batch for v in share)
        assert everything == list(range(0, 150, 3))
        for index, batch in enumerate(batches):
            assert plan.global_count(epoch, index) == sum(map(len, batch)) > 0
    beyond = plan.batches_per_epoch
    assert plan.global_count(0, beyond) == 0
    for rank in range(ranks):
        empty = plan.seeds(0, beyond, rank)
        assert len(empty) == 0 and empty.dtype == np.int64 == plan.seeds(0, 0, rank).dtype


@pytest.mark.parametrize("batch_size", [24, -1])
def test_global_batches_know_nothing_of_ranks_and_partitions(batch_size):
    def batches(plan, epoch):
        return [sorted(itertools.chain(*originals(plan, epoch, i))) for i in range(plan.batches_per_epoch)]

    one = plan_of(100, 1, batch_size, "global", seed=5)
    for ranks in (2, 3, 4):
        for partition in (0, 1, 2):
            size = -1 if batch_size == -1 else batch_size // ranks
            other = plan_of(100, ranks, size, "global", seed=5, partition=partition)
            for epoch in (0, 3):
                assert batches(other, epoch) == batches(one, epoch)
            # Shares keep the global order: merging them by it gives the batch of one rank.
            whole = originals(one, 3, 0)[0]
            for share in originals(other, 3, 0):
                assert [v for v in whole if v in share] == share


def test_local_batches_are_even_and_last_as_long_as_the_longest_rank():
    plan = BatchPlan([np.arange(10), np.arange(10, 13), np.arange(0)], np.arange(13), 4, "local")
    assert plan.batches_per_epoch == 3
    assert [[len(plan.seeds(0, i, r)) for r in range(3)] for i in range(3)] == [[4, 3, 0], [4, 0, 0], [2, 0, 0]]
    assert [plan.global_count(0, i) for i in range(4)] == [7, 4, 2, 0]


def test_epoch_and_seed_change_the_order_and_nothing_else_does():
    plan = plan_of(60, 2, 10, "global", seed=1)
    first = originals(plan, 0, 0)
    assert originals(plan, 1, 0) != first
    assert originals(plan_of(60, 2, 10, "global", seed=2), 0, 0) != first
    assert originals(plan, 0, 0) == first
    shuffled = BatchPlan([np.flip(s) for s in plan.train_seeds], plan.original, 10, "global", 1)
    assert originals(shuffled, 0, 0) == first


def test_no_seeds_at_all():
    for order in ("local", "global"):
        for size in (-1, 3):
            plan = BatchPlan([np.empty(0, np.int64)] * 2, np.arange(5), size, order)
            assert plan.batches_per_epoch == plan.global_count(0, 0) == len(plan.seeds(0, 0, 1)) == 0


def test_bad_arguments_say_what_is_wrong():
    seeds, original = [np.arange(3)], np.arange(3)
    for kwargs, name in [
        (dict(batch_size=0), "batch_size"),
        (dict(batch_size=-2), "batch_size"),
        (dict(batch_size=1, order="random"), "order"),
    ]:
        with pytest.raises(ConfigError, match=name):
            BatchPlan(seeds, original, **kwargs)
    with pytest.raises(ConfigError, match="train_seeds"):
        BatchPlan([], original, 1)
