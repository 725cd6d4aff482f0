import datetime

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gemini_gnn.errors import DataError, ExchangeError
from gemini_gnn.features.store import FeatureStore
from gemini_gnn.graph.sparse import SparseRows, sparse
from gemini_gnn.halo.exchange import HaloExchange
from gemini_gnn.halo.rows import copy_ranges, copy_rows
from gemini_gnn.training.prefetch import prefetch
from tests.ranks import run_ranks

NODES, WIDTH = 600, 7


def features():
    return np.random.default_rng(3).standard_normal((NODES, WIDTH)).astype(np.float32)


def alone(in_ram=True, dtype=torch.float32, x=None):
    halo = HaloExchange(None, np.array([0, NODES]), 0, chunk_bytes=1 << 20, timeout_s=1)
    return FeatureStore(features() if x is None else x, 0, NODES, halo, in_ram, dtype)


# -- one process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_ram", [True, False])
def test_a_mapping_is_read_or_copied(tmp_path, in_ram, dtype):
    np.save(tmp_path / "x.npy", features())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r", allow_pickle=False)
    store = alone(in_ram, dtype, mapped)
    ids = np.random.default_rng(0).permutation(NODES)[:77]
    got = store.gather(ids)
    assert torch.equal(got, torch.from_numpy(features()[ids]).to(dtype))
    assert np.shares_memory(store._local.view(torch.uint8).numpy(), mapped.view(np.uint8)) == (not in_ram)
    counts = store.take_counts()
    assert (counts.own, counts.remote, counts.remote_bytes) == (77, 0, 0)
    assert store.take_counts().own == 0


def test_an_array_in_memory_is_not_copied():
    x = features()
    assert np.shares_memory(alone(x=x)._local.numpy(), x)


def test_wrong_features_are_refused():
    with pytest.raises(DataError, match=r"expected float32 \[600, width\]; got float64 \[600, 7\]"):
        alone(x=features().astype(np.float64))
    with pytest.raises(DataError, match=r"got float32 \[599, 7\]"):
        alone(x=features()[1:])
    halo = HaloExchange(None, np.array([0, NODES]), 0, chunk_bytes=1 << 20, timeout_s=1)
    with pytest.raises(DataError, match="rank 0 owns 0..599"):
        FeatureStore(features()[:9], 0, 9, halo)


def test_rows_are_copied_whatever_their_width_and_never_outside():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int16, torch.bool):
        for width in (1, 2, 3, 8):
            source = torch.arange(5 * width).view(5, width).remainder(3).to(dtype)
            target = torch.zeros(4, width, dtype=dtype)
            copy_rows(source, np.array([4, 0]), target, np.array([3, 1]))
            assert torch.equal(target[3], source[4]) and torch.equal(target[1], source[0])
            assert not target[0].any() and not target[2].any()
    for bad in ([5], [-1]):
        with pytest.raises(IndexError, match=r"0\.\.4"):
            copy_rows(source, np.array(bad), target, np.array([0]))


def test_strides_that_mean_nothing_do_not_matter():
    """numpy gives a matrix without elements strides (0, 0); the stride of a single column or row is any number."""
    none = torch.from_numpy(np.ones((4, 5), np.float32)[np.arange(0)])
    assert none.stride() == (0, 0)
    nothing = np.arange(0)
    copy_rows(none, nothing, torch.zeros(4, 5), nothing)
    copy_rows(torch.zeros(4, 5), nothing, none, nothing)
    copy_rows(torch.zeros(3, 0), np.arange(3), torch.zeros(3, 0), np.arange(3))
    column, target = torch.arange(21.0).as_strided((3, 1), (1, 7)), torch.zeros(3, 1)
    copy_rows(column, np.array([2, 0]), target, np.array([0, 1]))
    assert target.flatten().tolist() == [2, 0, 0]


def bags(ones=False):
    """Sparse rows as they are cut out of larger ones, the second of them empty."""
    x = features()
    x[np.random.default_rng(4).random(x.shape) < 0.7] = 0
    x[1] = 0
    if ones:
        x = (x != 0).astype(np.float32)
    rows = sparse(np.concatenate([x[:9], x]))[9:]
    assert rows.ptr[0] > 0 and (rows.value is None) == ones
    return rows


def test_ranges_are_copied_whatever_their_length():
    source = torch.arange(20)
    for dtype in (torch.int64, torch.float32, torch.bfloat16, torch.uint8):
        target = torch.zeros(9, dtype=dtype)
        begin, first, length = np.array([17, 4, 0]), np.array([0, 3, 4]), np.array([3, 0, 4])
        copy_ranges(source.to(dtype), begin, target, first, length)
        assert target.tolist() == [17, 18, 19, 0, 0, 1, 2, 3, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_ram", [True, False])
@pytest.mark.parametrize("ones", [True, False])
def test_mapped_sparse_rows_are_read_or_copied(tmp_path, in_ram, dtype, ones):
    rows, mapped = bags(ones), {}
    for name in ("ptr", "index", "value"):
        if getattr(rows, name) is not None:
            np.save(tmp_path / f"{name}.npy", getattr(rows, name))
            mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    store = alone(in_ram, dtype, SparseRows(mapped["ptr"], mapped["index"], mapped.get("value"), WIDTH))
    ids = np.random.default_rng(0).permutation(NODES)[:77]
    for numbers in (ids, ids[:0]):
        got = store.gather(numbers)
        assert (got.dtype, got.value is None) == (dtype, ones) and got.stored == rows[numbers].stored
        assert torch.equal(got.dense(), torch.from_numpy(rows[numbers].dense()).to(dtype))
    assert np.shares_memory(store._sparse.index.numpy(), mapped["index"]) == (not in_ram)
    assert store.take_counts().own == 77


def test_damaged_sparse_rows_are_refused():
    rows = bags()
    with pytest.raises(DataError, match="offsets that ascend within 9 stored values"):
        alone(x=SparseRows(rows.ptr, rows.index[:9], rows.value[:9], WIDTH))
    ptr = rows.ptr.copy()
    ptr[5] = ptr[-1] + 1
    with pytest.raises(DataError, match="partition the graph again"):
        alone(x=SparseRows(ptr, rows.index, rows.value, WIDTH))
    for column in (-1, WIDTH):
        index = rows.index.copy()
        index[rows.ptr[3]] = column
        store = alone(x=SparseRows(rows.ptr, index, rows.value, WIDTH))
        store.gather(np.arange(3))
        with pytest.raises(DataError, match=rf"expected columns in 0\.\.6; got .*{column}"):
            store.gather(np.arange(4))


# -- ranks -------------------------------------------------------------------------------------------------------------


def gathers(rank, world, bounds):
    x = features()
    begin, end = int(bounds[rank]), int(bounds[rank + 1])
    wide = datetime.timedelta(seconds=60)
    halo = HaloExchange(dist.new_group(backend="gloo", timeout=wide), bounds, rank, chunk_bytes=999, timeout_s=30)

    def ids_of(key):
        rng = np.random.default_rng([rank, key])
        return rng.permutation(NODES)[: rng.integers(0, 120)]

    for dtype in (torch.float32, torch.bfloat16):
        for local, in_ram in ((x, True), (x, False), (bags(), True), (bags(), False), (bags(ones=True), True)):
            is_sparse = isinstance(local, SparseRows)
            store = FeatureStore(local[begin:end], begin, end, halo, in_ram, dtype)
            full = torch.from_numpy(local.dense() if is_sparse else local).to(dtype)
            # The exchange in the background thread while this thread reduces on another group, and the exchange in this
            # thread while the background prepares.
            in_background = (lambda key, store=store: store.gather(ids_of(key)), None)
            in_this_thread = (lambda key, store=store: store.prepare(ids_of(key)), store.complete)
            for prepare, complete in (in_background, in_this_thread):
                for depth in (0, 3):
                    with prefetch(prepare, range(8), depth, complete=complete) as batches:
                        for key, rows in enumerate(batches):
                            gradient = torch.full((1000,), float(rank + key))
                            dist.all_reduce(gradient)
                            assert gradient[0] == world * key + world * (world - 1) / 2
                            ids = ids_of(key)
                            assert rows.dtype == dtype
                            assert torch.equal(rows.dense() if is_sparse else rows, full[ids])
                            if is_sparse:  # as one rank would read them: the same columns in the same order
                                alone = local[ids]
                                assert np.array_equal(rows.ptr.numpy(), alone.ptr)
                                assert np.array_equal(rows.index.numpy(), alone.index)
            counts = store.take_counts()
            asked = np.concatenate([ids_of(key) for key in range(8)] * 4)
            far = asked[(asked < begin) | (asked >= end)]
            assert (counts.own, counts.remote) == (len(asked) - len(far), len(far))
            per_value = dtype.itemsize
            if is_sparse:
                per_value = 4 + (0 if local.value is None else dtype.itemsize)
            values = local[far].stored if is_sparse else len(far) * WIDTH
            assert counts.remote_bytes == values * per_value


@pytest.mark.parametrize(
    "bounds", [(0, 200, 400, NODES), (0, 0, 300, NODES), (0, 300, 300, NODES), (0, 9, NODES, NODES)]
)
def test_gathered_rows_are_those_on_disk(bounds):
    """Also where the first, the middle or the last rank owns nothing."""
    run_ranks(gathers, 3, np.array(bounds))


def gathers_on_machines(rank, world, machine, folder):
    """Machines of ``machine`` ranks, each of which maps the same files."""
    bounds = np.array([0, 10, 300, 300, NODES])[: world + 1] if world > 2 else np.array([0, 200, NODES])
    first = rank - rank % machine
    begin, end = int(bounds[first]), int(bounds[first + machine])
    halo = HaloExchange(dist.new_group(backend="gloo"), bounds, rank, chunk_bytes=999, timeout_s=30)
    mapped = {path.stem: np.load(path, mmap_mode="r") for path in folder.iterdir()}
    words = SparseRows(mapped["ptr"], mapped["index"], mapped["value"], WIDTH)
    for local, full in ((mapped["x"], features()), (words, bags().dense())):
        for in_ram in (True, False):
            store = FeatureStore(local[begin:end], begin, end, halo, in_ram, shared=True)
            for key in range(8):
                rng = np.random.default_rng([rank, key])
                ids = rng.permutation(NODES)[: rng.integers(0, 120)]
                rows = store.gather(ids)
                rows = rows if isinstance(rows, torch.Tensor) else rows.dense()
                assert np.array_equal(rows.numpy(), full[ids])
            counts = store.take_counts()
            assert (counts.own > 0) == (begin < end)
            assert (counts.remote > 0) == (counts.remote_bytes > 0) == (machine < world)
    with pytest.raises(DataError, match="the exchange's rank"):
        FeatureStore(mapped["x"][:9], 0, 9, halo, shared=True)
    return halo.take_traffic()


@pytest.mark.parametrize(("world", "machine"), [(2, 2), (4, 2), (4, 1)])
def test_ranks_of_one_machine_read_each_others_rows(world, machine, tmp_path):
    """From the file that all of them map; a job on one machine exchanges nothing."""
    words = bags()
    for name, array in (("x", features()), ("ptr", words.ptr), ("index", words.index), ("value", words.value)):
        np.save(tmp_path / f"{name}.npy", array)
    for traffic in run_ranks(gathers_on_machines, world, machine, tmp_path):
        assert (traffic.calls > 0) == (machine < world)


def broken_out_early(rank, world):
    """Ranks that leave the loop after the same batch can go on with the same exchange, however far ahead each was."""
    x = features()
    bounds = np.linspace(0, NODES, world + 1).astype(np.int64)
    begin, end = int(bounds[rank]), int(bounds[rank + 1])
    halo = HaloExchange(dist.new_group(backend="gloo"), bounds, rank, chunk_bytes=1 << 20, timeout_s=20)
    store = FeatureStore(x[begin:end], begin, end, halo)
    ids = np.arange(rank, NODES, 3)
    for _ in range(3):
        with prefetch(lambda key: store.gather(ids), range(100), 4) as batches:
            for key, rows in enumerate(batches):
                assert np.array_equal(rows.numpy(), x[ids])
                if key == 2:
                    break
    return halo.take_traffic().calls


def test_breaking_out_early_keeps_the_ranks_in_step():
    assert run_ranks(broken_out_early, 3) == [21] * 3


def mixed_forms(rank, world):
    """Dense rows beside sparse ones, and values beside none, are an error on both ranks."""
    bounds = np.linspace(0, NODES, world + 1).astype(np.int64)
    begin, end = int(bounds[rank]), int(bounds[rank + 1])
    for forms in ((features(), bags()), (bags(), bags(ones=True))):
        halo = HaloExchange(dist.new_group(backend="gloo"), bounds, rank, chunk_bytes=999, timeout_s=20)
        with pytest.raises(ExchangeError, match="on every rank"):
            FeatureStore(forms[rank][begin:end], begin, end, halo).gather(np.arange(NODES))


def test_ranks_that_hold_different_forms_are_told():
    run_ranks(mixed_forms, 2)
