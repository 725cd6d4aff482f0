"""Agreements between ranks carry any JSON, and one that is short takes one collective: a recovery has a dozen of them."""

import pytest

from tests.ranks import run_ranks


def exchanged(rank, world, lengths, gathers):
    import torch.distributed as dist

    from gemini_gnn.snapshot.agree import Ranks

    counted, gather = [], dist.all_gather
    dist.all_gather = lambda *args, **kwargs: counted.append(1) or gather(*args, **kwargs)
    values = [{"rank": other, "text": "é" * length} for other, length in enumerate(lengths)]
    assert Ranks(None, rank, world).exchange(values[rank]) == values
    assert len(counted) == gathers


@pytest.mark.parametrize(
    ("lengths", "gathers"), [((0, 0, 0), 1), ((3, 5000, 0), 2), ((0, 0, 169), 2), ((164, 0, 0), 1)]
)
def test_values_of_all_ranks_by_rank(lengths, gathers):
    run_ranks(exchanged, 3, lengths, gathers)
