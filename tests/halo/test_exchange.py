import datetime
import itertools
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gemini_gnn.errors import ExchangeError
from gemini_gnn.halo import plan
from gemini_gnn.halo.exchange import HaloExchange
from tests.ranks import run_ranks

NODES, WIDTH = 1000, 12


def group(timeout_s=60.0):
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))


def bounds_of(world, kind="even"):
    if kind == "even":
        return np.linspace(0, NODES, world + 1).astype(np.int64)
    # the last rank owns nothing, the first nearly nothing
    return np.array([0, 3, *np.linspace(3, NODES, world - 1).astype(int)[1:], NODES], dtype=np.int64)[: world + 1]


def matrix_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    values = torch.randint(-100, 100, (NODES, WIDTH), generator=generator)
    if dtype == torch.float32:
        return torch.randn(NODES, WIDTH, generator=generator)
    return values.to(dtype)


def exchange(rank, world, bounds=None, chunk_bytes=1 << 20, timeout_s=30.0):
    bounds = bounds_of(world) if bounds is None else bounds
    return HaloExchange(group(timeout_s), bounds, rank, chunk_bytes=chunk_bytes, timeout_s=timeout_s)


def pick(rank, call, many=200):
    rng = np.random.default_rng([rank, call])
    return rng.permutation(NODES)[: rng.integers(0, many)].astype(np.int64)


# -- rows --------------------------------------------------------------------------------------------------------------


DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.int16, torch.bool)


def rows_equal_the_matrix(rank, world):
    for kind, chunk_bytes, dtypes in (("even", 1 << 20, DTYPES), ("uneven", 100, DTYPES[:2]), ("even", 1, DTYPES[:1])):
        halo = exchange(rank, world, bounds_of(world, kind), chunk_bytes)
        for call, dtype in enumerate(dtypes):
            full = matrix_of(dtype)
            local = full[halo.begin : halo.end].clone()
            ids = pick(rank, call, many=400 if chunk_bytes > 1000 else 60)
            for given in (local, lambda numbers, local=local: local[torch.from_numpy(numbers)]):
                got = halo.rows(ids, given)
                assert got.dtype == dtype and got.shape == (len(ids), WIDTH)
                assert torch.equal(got, full[torch.from_numpy(ids)])
    return halo.take_traffic().calls


def empty_and_one_sided(rank, world):
    full = matrix_of()
    halo = exchange(rank, world)
    local = full[halo.begin : halo.end]
    nothing = halo.rows(np.empty(0, np.int64), local)
    assert nothing.shape == (0, WIDTH)
    assert halo.take_traffic().sent_bytes.sum() == (world - 1) * 0
    everything = np.arange(NODES)[::-1].copy() if rank == 0 else np.empty(0, np.int64)
    got = halo.rows(everything, local)
    assert torch.equal(got, full[torch.from_numpy(everything)])
    return halo.take_traffic()


def test_a_rank_with_nothing_to_ask_takes_part_and_bytes_are_counted_per_peer():
    first, second, third = run_ranks(empty_and_one_sided, 3)
    bounds = bounds_of(3)
    owned = np.diff(bounds)
    assert first.sent_bytes.tolist() == [0, *(owned[1:] * 8)]
    assert first.received_bytes.tolist() == [0, *(owned[1:] * WIDTH * 4)]
    assert second.sent_bytes.tolist() == [owned[1] * WIDTH * 4, 0, 0]
    assert third.received_bytes.tolist() == [owned[2] * 8, 0, 0]
    assert first.calls == 1 and 0 < first.meet_s < first.seconds


def test_one_rank_needs_no_group():
    full = matrix_of()
    halo = HaloExchange(None, np.array([0, NODES]), 0, chunk_bytes=100, timeout_s=1)
    ids = np.array([5, 900, 5, 0])
    assert torch.equal(halo.rows(ids, full), full[ids])
    counts, (column,) = halo.ask(ids, lambda asked: (asked % 3, [np.repeat(asked, asked % 3)]), [np.int64])
    assert counts.tolist() == [2, 0, 2, 0] and column.tolist() == [5, 5, 5, 5]
    with pytest.raises(ValueError, match="ids must lie in 0..999"):
        halo.rows(np.array([NODES]), full)
    assert torch.equal(halo.rows(np.array([3]), full), full[[3]])  # nothing broke: nobody else was waiting
    with pytest.raises(RuntimeError, match="two threads"):
        halo.ask(ids, lambda asked: halo.rows(asked, full), [np.int64])
    with pytest.raises(ValueError, match="process group of its own"):
        HaloExchange(None, np.array([0, 5, NODES]), 0, chunk_bytes=100, timeout_s=1)


# -- ask ---------------------------------------------------------------------------------------------------------------


def neighbors(ids):
    """A made-up answer of variable length, a pure function of each id."""
    counts = (ids * 7) % 5
    ids = np.repeat(ids, counts)
    return counts, [ids * 10 + np.arange(len(ids)) * 0, (ids % 97).astype(np.float32), (ids % 5).astype(np.int16)]


def asks_equal_local_answers(rank, world):
    for kind in ("even", "uneven"):
        for chunk_bytes in (1 << 20, 64):
            halo = exchange(rank, world, bounds_of(world, kind), chunk_bytes)

            def answer(ids, halo=halo):
                assert ((ids >= halo.begin) & (ids < halo.end)).all()
                return neighbors(ids)

            for call in range(4):
                ids = pick(rank, call) if (call + rank) % 3 else np.empty(0, np.int64)
                counts, columns = halo.ask(ids, answer, [np.int64, np.float32, np.int16])
                expected_counts, expected = neighbors(ids)
                assert np.array_equal(counts, expected_counts)
                for got, wanted in zip(columns, expected, strict=True):
                    assert got.dtype == wanted.dtype and np.array_equal(got, wanted)


def both(rank, world):
    asks_equal_local_answers(rank, world)
    return rows_equal_the_matrix(rank, world)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_rows_equal_the_matrix_and_asks_the_local_answers(world):
    assert run_ranks(both, world) == [2] * world


def some_have_nothing(rank, world):
    """Every rank in turn owns nothing, and every set of ranks asks nothing, in rows, fetch and ask."""
    full = matrix_of()
    for poor in range(world):
        others = np.linspace(0, NODES, world).astype(np.int64)
        bounds = np.insert(others, poor, others[poor])
        halo = exchange(rank, world, bounds)
        assert (halo.begin == halo.end) == (rank == poor)
        local = full[halo.begin : halo.end]

        def by_numpy(numbers, local=local):
            return torch.from_numpy(local.numpy()[numbers])

        for asking in itertools.product((False, True), repeat=world):
            ids = pick(rank, poor) if asking[rank] else np.arange(NODES)[[]]
            for given in (local, by_numpy):
                assert torch.equal(halo.rows(ids, given), full[torch.from_numpy(ids)])
            split = plan.split(ids, bounds, rank)
            out = torch.zeros(len(ids), WIDTH)
            halo.fetch(split, local, out)
            out[torch.from_numpy(split.own)] = local[torch.from_numpy(split.own_local)]
            assert torch.equal(out, full[torch.from_numpy(ids)])
            counts, columns = halo.ask(ids, neighbors, [np.int64, np.float32, np.int16])
            expected_counts, expected = neighbors(ids)
            assert np.array_equal(counts, expected_counts) and all(map(np.array_equal, columns, expected))


def test_ranks_that_own_nothing_or_ask_nothing():
    run_ranks(some_have_nothing, 3)


# -- failures ----------------------------------------------------------------------------------------------------------


def failures_that_all_learn_of(rank, world):
    halo = exchange(rank, world, timeout_s=20)
    full = matrix_of()
    local = full[halo.begin : halo.end]
    began = time.monotonic()
    messages = []

    with pytest.raises(ValueError if rank == 0 else ExchangeError) as caught:
        halo.rows(np.array([NODES + 5 if rank == 0 else 1]), local)
    messages.append(str(caught.value))

    def answer(ids):
        if rank == 1:
            raise KeyError("no such node in the cache")
        return neighbors(ids)

    with pytest.raises(KeyError if rank == 1 else ExchangeError) as caught:
        halo.ask(pick(rank, 0), answer, [np.int64, np.float32, np.int16])
    messages.append(str(caught.value))
    # still in step: everybody learnt of the failures in the same header
    assert torch.equal(halo.rows(np.arange(9), local), full[:9])

    with pytest.raises(ExchangeError, match=r"rows of \d+ bytes.*on every rank") as caught:
        halo.rows(np.arange(20), local.to(torch.bfloat16) if rank else local)
    messages.append(str(caught.value))
    with pytest.raises(ExchangeError, match="an earlier exchange failed"):
        halo.rows(np.arange(20), local)
    return messages, time.monotonic() - began


def test_a_rank_that_fails_in_time_says_so_and_one_that_makes_another_call_is_found_out():
    results = run_ranks(failures_that_all_learn_of, 3)
    messages = [result[0] for result in results]
    assert all(seconds < 15 for _, seconds in results)
    assert "0..999; got 1005..1005" in messages[0][0]
    assert all("rank 0 failed while preparing rows" in messages[rank][0] for rank in (1, 2))
    assert "no such node in the cache" in messages[1][1]
    assert all("rank 1 failed while preparing answers" in messages[rank][1] for rank in (0, 2))
    assert "expected rows of 48 bytes" in messages[0][2] and "rank 2: rows of 24 bytes" in messages[0][2]


def failing_source(rank, world):
    """A rank that fails after the header cannot tell: the others must not wait longer than their limit."""
    halo = exchange(rank, world, timeout_s=2)
    full = matrix_of()

    def local(numbers):
        if rank == 1 and len(numbers):
            raise OSError("disk is gone")
        return full[halo.begin : halo.end][torch.from_numpy(numbers)]

    ids = np.arange(halo.begin) if rank else np.arange(halo.end, NODES)  # only remote ones
    began = time.monotonic()
    with pytest.raises(OSError if rank == 1 else ExchangeError) as caught:
        halo.rows(ids, local)
    if rank == 0:
        assert caught.value.__cause__ is not None
    seconds = time.monotonic() - began
    with pytest.raises(ExchangeError, match="an earlier exchange failed"):
        halo.rows(ids, full)
    return str(caught.value), seconds


def test_a_source_that_fails_after_the_header():
    (message, seconds), (own, _) = run_ranks(failing_source, 2)
    assert "disk is gone" in own
    assert "all_to_all_single of rows with rank 1" in message and "first error in the logs" in message
    assert seconds < 10


def killed_peer(rank, world, folder, pipe):
    """The last rank is killed when the others wait for its rows; they report and end without saying goodbye to it."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    halo = exchange(rank, world, chunk_bytes=64, timeout_s=20)
    full = matrix_of()

    def local(numbers):
        if rank == world - 1 and len(numbers):
            os.kill(os.getpid(), signal.SIGKILL)
        return full[halo.begin : halo.end][torch.from_numpy(numbers)]

    began = time.monotonic()
    try:
        halo.rows(np.setdiff1d(np.arange(NODES), np.arange(halo.begin, halo.end)), local)  # remote ones only
    except ExchangeError as error:
        pipe.send((str(error), type(error.__cause__).__name__, time.monotonic() - began))
    os._exit(0)


def test_a_killed_rank_is_an_error_on_the_others(tmp_path):
    world = 3
    context = multiprocessing.get_context("forkserver")
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    processes = [
        context.Process(target=killed_peer, args=(rank, world, str(tmp_path), pipes[rank][1])) for rank in range(world)
    ]
    try:
        for process in processes:
            process.start()
        for rank in range(world - 1):
            assert pipes[rank][0].poll(40), f"rank {rank} said nothing"
            message, cause, seconds = pipes[rank][0].recv()
            assert f"rank {rank}: all_to_all_single" in message and "look for the first error" in message
            assert cause == "RuntimeError" and seconds < 10
    finally:
        for process in processes:
            process.kill()
            process.join(10)
    assert processes[-1].exitcode == -signal.SIGKILL
