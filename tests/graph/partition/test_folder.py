"""The partitioned graph on disk: round trip, every edge once, damage and mix-ups named, nothing half-written."""

import dataclasses
import json
import multiprocessing
import shutil
import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemini_gnn.config import Config
from gemini_gnn.errors import PartitionError
from gemini_gnn.graph.array_folder import locked, new_folder, ticking
from gemini_gnn.graph.datasets import fingerprint
from gemini_gnn.graph.partition import write
from gemini_gnn.graph.partition.assign import partition_nodes
from gemini_gnn.graph.partition.check import check_partitioned
from gemini_gnn.graph.partition.folder import PartitionedGraph
from gemini_gnn.graph.partition.on_demand import expect_made, open_or_make, partition_folder
from gemini_gnn.graph.partition.quality import balance, chunks, human_bytes, sampled_epoch_bytes, table
from gemini_gnn.graph.partition.write import write_partitioned
from gemini_gnn.graph.sparse import SparseRows, dense, laid_out, sparse
from tests.graph.partition.test_assign import graph_of, graphs, two_cliques

KEYS = dict(method="hash", settings={"seed": 0}, fingerprint="f00d")


def written(graph, folder, parts=3, **changes):
    return write_partitioned(graph, partition_nodes(graph, "hash", parts), folder, **{**KEYS, **changes})


def with_words(graph, ones=False):
    """``graph`` with features of which few are not zero; those of node 0 are all zero, and node 1 has all of one kind."""
    draw = np.random.default_rng(0)
    chosen = draw.random((graph.num_nodes, 40)) < 0.1
    chosen[0], chosen[1:2] = False, True
    values = 1 if ones else 1 + draw.random(chosen.shape)
    return dataclasses.replace(graph, x=sparse(np.where(chosen, values, 0).astype(np.float32)))


@pytest.fixture
def small(tmp_path):
    return written(two_cliques(6), tmp_path / "p")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graph=graphs(), data=st.data())
def test_round_trip_keeps_every_edge_once(tmp_path_factory, graph, data):
    folder = tmp_path_factory.mktemp("p") / "graph"
    parts = data.draw(st.integers(1, graph.num_nodes))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    assignment = rng.permutation(np.arange(graph.num_nodes) % parts)
    form = data.draw(st.sampled_from(["dense", "ones", "values"]))
    graph = graph if form == "dense" else with_words(graph, ones=form == "ones")
    write.CHUNK_BYTES, whole = 64, write.CHUNK_BYTES  # many pieces
    try:
        pg = write_partitioned(graph, assignment, folder, **KEYS)
    finally:
        write.CHUNK_BYTES = whole
    check_partitioned(pg, graph)
    back = pg.as_graph()
    for field in dataclasses.fields(graph):
        ours, theirs = getattr(back, field.name), getattr(graph, field.name)
        if isinstance(theirs, SparseRows):
            ours, theirs = ours.dense(), theirs.dense()
        if isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), field.name
        else:
            assert ours == theirs, field.name
    # Independently of the checker: the multiset of (original source, original target, weight) over the parts.
    edges = []
    for p in range(parts):
        shard = pg.part(p)
        assert np.array_equal(assignment[shard.original], np.full(shard.num_nodes, p))
        for v in shard.owned:
            first = int(pg.colptr[v])
            for i, u in enumerate(shard.in_neighbors(v)):
                w = None if pg.edge_weight is None else float(pg.edge_weight[first + i])
                edges.append((int(pg.original[u]), int(pg.original[v]), w))
        remote = {int(u) for u in shard.row if u not in shard.owned}
        assert shard.halo.tolist() == sorted(remote)
        assert np.array_equal(dense(shard.x), dense(graph.x[shard.original]))
        assert np.array_equal(pg.train_seeds(p), [v for v in shard.owned if graph.train_mask[pg.original[v]]])
    target = np.repeat(np.arange(graph.num_nodes), np.diff(graph.colptr))
    weights = [None] * graph.num_edges if graph.edge_weight is None else graph.edge_weight.tolist()
    assert sorted(edges, key=str) == sorted(zip(graph.row.tolist(), target.tolist(), weights, strict=True), key=str)
    assert np.array_equal(pg.owner(np.arange(graph.num_nodes)), assignment[pg.original])
    assert np.array_equal(pg.original[pg.new_of_original()], np.arange(graph.num_nodes))
    cut = np.count_nonzero(assignment[graph.row] != assignment[target])
    assert pg.meta.quality.edge_cut == cut / max(graph.num_edges, 1)


def test_a_graph_one_can_check_by_hand(tmp_path):
    # 0 -> 2 <- 1, 3 -> 2, 2 -> 3; nodes 0 and 2 in part 1, nodes 1 and 3 in part 0
    graph = graph_of([0, 1, 3, 2], [2, 2, 2, 3], 4, weight=np.array([1.0, 2.0, 3.0, 4.0]))
    pg = write_partitioned(graph, np.array([1, 0, 1, 0]), tmp_path / "p", **KEYS)
    assert pg.original.tolist() == [1, 3, 0, 2] and pg.bounds.tolist() == [0, 2, 4]
    assert pg.colptr.tolist() == [0, 0, 1, 1, 4]
    assert pg.row.tolist() == [3, 2, 0, 1]  # of node 2 (new 3): originals 0, 1, 3
    assert pg.edge_weight.tolist() == [4.0, 1.0, 2.0, 3.0]
    assert pg.part(0).halo.tolist() == [3] and pg.part(1).halo.tolist() == [0, 1]
    assert pg.part(1).in_neighbors(3).tolist() == [2, 0, 1] and pg.part(1).in_neighbors(2).tolist() == []
    assert (pg.train_seeds(0).tolist(), pg.train_seeds(1).tolist()) == ([1], [2])
    assert (pg.val_nodes(0).tolist(), pg.test_nodes(1).tolist()) == ([0], [3])
    q = pg.meta.quality
    assert (q.edge_cut, q.replication, q.epoch_bytes) == (3 / 4, 7 / 4, 3 * 3 * 4)
    assert (q.nodes, q.edges, q.seeds, q.halo) == ([2, 2], [1, 3], [1, 1], [1, 2])
    assert q.edge_balance == 1.5
    assert "edge cut 75.0%" in table(q)
    with pytest.raises(PartitionError, match="owned by part 0"):
        pg.part(1).in_neighbors(0)
    with pytest.raises(PartitionError, match=r"part in 0\.\.1; got 2"):
        pg.part(2)


def test_arrays_are_mapped_read_only(small):
    again = PartitionedGraph.open(small.folder)
    assert isinstance(again.x.base, np.memmap)
    with pytest.raises(ValueError):
        again.x[0] = 0


def test_damage_is_named(small):
    def damaged(name, change):
        twin = small.folder.parent / f"damaged-{name}"
        shutil.copytree(small.folder, twin)
        path = twin / name
        path.write_bytes(change(bytearray(path.read_bytes())))
        return twin

    def flip_last(data):
        data[-1] ^= 1
        return data

    twin = damaged("x.npy", flip_last)
    PartitionedGraph.open(twin)  # opening reads headers only
    with pytest.raises(PartitionError, match=r"x\.npy: expected checksum"):
        PartitionedGraph.open(twin, verify=True)
    PartitionedGraph.open(twin).verify_checksums(features=False)  # what a job begins with does not read them
    with pytest.raises(PartitionError, match=r"x\.npy: expected checksum"):
        check_partitioned(PartitionedGraph.open(twin))
    for name in ("row.npy", "y.npy"):
        with pytest.raises(PartitionError, match=f"{name}: expected checksum"):
            PartitionedGraph.open(damaged(name, flip_last)).verify_checksums(features=False)
    shutil.rmtree(small.folder.parent / "damaged-row.npy")
    with pytest.raises(PartitionError, match=r"row\.npy is missing or damaged"):
        PartitionedGraph.open(damaged("row.npy", lambda data: data[:100]))
    with pytest.raises(PartitionError, match=r"meta\.json cannot be read"):
        PartitionedGraph.open(damaged("meta.json", lambda data: data[:100]))
    for change, message in (
        ({"format_version": 99}, "format version 1 or 2; got 99"),
        ({"bounds": [0, 5, 3, 12]}, "contradicts itself"),
        ({"surprise": 1}, "damaged"),
        ({"feature_width": 5}, r"x\.npy: expected shape \[12, 5\]"),
    ):
        meta = {**json.loads((small.folder / "meta.json").read_text()), **change}
        (twin / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(PartitionError, match=message):
            PartitionedGraph.open(twin)
    with pytest.raises(PartitionError, match="no meta.json"):
        PartitionedGraph.open(small.folder / "nowhere")


@pytest.mark.parametrize("ones", [True, False])
def test_sparse_features_on_disk(tmp_path, ones):
    graph = with_words(two_cliques(6), ones)
    pg = written(graph, tmp_path / "p")
    files = {path.stem for path in pg.folder.glob("x*.npy")}
    assert files == ({"x_ptr", "x_index"} if ones else {"x_ptr", "x_index", "x_value"})
    assert isinstance(pg.x, SparseRows) and isinstance(pg.x.index.base, np.memmap) and pg.x.ptr[0] == 0
    assert pg.x.nbytes == graph.x.nbytes == 8 * 13 + graph.x.stored * (4 if ones else 8)
    assert pg.meta.quality.epoch_bytes == round(sum(pg.meta.quality.halo) * graph.x.nbytes / 12)
    check_partitioned(pg, graph)
    check_partitioned(pg, dataclasses.replace(graph, x=graph.x.dense()))  # the same numbers in the other form
    check_partitioned(written(dataclasses.replace(graph, x=graph.x.dense()), tmp_path / "d"), graph)
    other = graph.x.dense()
    other[5, 7] += 1
    with pytest.raises(PartitionError, match="x of nodes"):
        check_partitioned(pg, dataclasses.replace(graph, x=laid_out(other, "sparse")))

    shard = pg.part(2)  # a part of which the values do not begin with the file's
    assert shard.x.shape == (4, 40) and np.array_equal(shard.x.dense(), graph.x[shard.original].dense())


def test_damage_to_sparse_features_is_named(tmp_path):
    graph = with_words(two_cliques(6))
    pg = written(graph, tmp_path / "p")

    def flipped(name):
        twin = shutil.copytree(pg.folder, tmp_path / name)
        raw = bytearray((twin / f"{name}.npy").read_bytes())
        raw[-1] ^= 1
        (twin / f"{name}.npy").write_bytes(raw)
        return twin

    with pytest.raises(PartitionError, match=r"x_value\.npy: expected checksum"):
        PartitionedGraph.open(twin := flipped("x_value"), verify=True)
    PartitionedGraph.open(twin).verify_checksums(features=False)
    with pytest.raises(PartitionError, match=r"x_index\.npy: expected checksum"):  # a column is an address
        PartitionedGraph.open(flipped("x_index")).verify_checksums(features=False)
    with pytest.raises(PartitionError, match=r"x_index\.npy: expected shape"):
        PartitionedGraph.open(flipped("x_ptr"))
    column, value, row = pg.x.index.copy(), pg.x.value.copy(), int(np.argmax(np.diff(pg.x.ptr) > 1))
    at, node = pg.x.ptr[row], pg.original[row]
    column[at] = column[at + 1]
    with pytest.raises(PartitionError, match=f"ascend within a row, each once; row of node {node} has column"):
        check_partitioned(rewritten(pg, x_index=column))
    column[at] = 40
    with pytest.raises(PartitionError, match=rf"columns in 0\.\.39; row of node {node} has column 40"):
        check_partitioned(rewritten(pg, x_index=column))
    value[at] = np.nan
    with pytest.raises(PartitionError, match=f"finite values; row of node {node} has column"):
        check_partitioned(rewritten(pg, x_value=value))


def test_a_folder_of_the_first_version_is_opened(small):
    path = small.folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 1}))
    check_partitioned(PartitionedGraph.open(small.folder), two_cliques(6))


def rewritten(pg, **arrays):
    """The folder with some arrays replaced and their checksums made to fit: damage that only the check can see."""
    import xxhash

    twin = pg.folder.parent / f"twin-{'-'.join(arrays)}"
    shutil.rmtree(twin, ignore_errors=True)
    shutil.copytree(pg.folder, twin)
    meta = json.loads((twin / "meta.json").read_text())
    for name, array in arrays.items():
        np.save(twin / f"{name}.npy", array)
        meta["checksums"][name] = xxhash.xxh3_128_hexdigest((twin / f"{name}.npy").read_bytes())
    (twin / "meta.json").write_text(json.dumps(meta))
    return PartitionedGraph.open(twin)


def test_the_check_sees_a_lost_a_doubled_and_a_moved_edge(small):
    check_partitioned(small, two_cliques(6))
    doubled = small.row.copy()
    doubled[1] = doubled[0]  # the first column now has one edge twice, and another is lost
    with pytest.raises(PartitionError, match="edge hash"):
        check_partitioned(rewritten(small, row=doubled))
    moved = small.colptr.copy()
    moved[1] += 1
    with pytest.raises(PartitionError, match="ascend|edge hash"):
        check_partitioned(rewritten(small, colptr=moved))
    original = small.original.copy()
    original[0] = original[1]
    with pytest.raises(PartitionError, match="permutation"):
        check_partitioned(rewritten(small, original=original))
    halo = small.halo.copy()
    halo[0] = small.part(0).begin
    with pytest.raises(PartitionError, match="halo list of part 0"):
        check_partitioned(rewritten(small, halo=halo))
    with pytest.raises(PartitionError, match="train_mask|quality"):
        check_partitioned(rewritten(small, train_mask=~small.train_mask))
    x = small.x + np.float32(1)
    with pytest.raises(PartitionError, match="x of nodes"):
        check_partitioned(rewritten(small, x=x), two_cliques(6))


def test_a_folder_for_something_else_is_refused(small):
    small.expect(fingerprint="f00d", method="hash", parts=3, settings={"seed": 0})
    for key, value in (("fingerprint", "beef"), ("method", "metis"), ("parts", 4), ("settings", {"seed": 1})):
        with pytest.raises(PartitionError, match="made for another"):
            small.expect(**{key: value})


def test_nothing_is_half_written(tmp_path, monkeypatch):
    graph = two_cliques(6)
    real = write.write_array

    def full(place, name, *rest):
        if name == "x":
            raise OSError(28, "No space left on device")
        return real(place, name, *rest)

    monkeypatch.setattr(write, "write_array", full)
    with pytest.raises(PartitionError, match="No space left"):
        written(graph, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    written(graph, tmp_path / "p")
    with pytest.raises(PartitionError, match="new or empty folder"):
        written(graph, tmp_path / "p")
    with pytest.raises(PartitionError, match="no empty part"):
        write_partitioned(graph, np.full(12, 1), tmp_path / "q", **KEYS)
    with pytest.raises(PartitionError, match="Python objects"):
        written(graph_of([0], [1], 3, ids=np.array(["a", None, 3], dtype=object)), tmp_path / "q")
    with pytest.raises(PartitionError, match="cannot write"):
        written(graph, tmp_path / "p" / "meta.json" / "q")
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def config_for(tmp_path, **partition):
    config = Config()
    config.dataset.cache = str(tmp_path / "cache")
    config.partition.method = "hash"
    for name, value in partition.items():
        setattr(config.partition, name, value)
    return config


def test_made_once_then_opened(tmp_path):
    config, calls = config_for(tmp_path), []

    def load():
        calls.append(1)
        return two_cliques(6)

    first = open_or_make(config, 3, load, "f00d")
    again = open_or_make(config, 3, load, "f00d")
    assert calls == [1] and first.folder == again.folder
    assert first.folder.name.startswith("blocks-f00d-hash-3-") and first.folder.parent.name == "partitions"
    config.partition.seed = 5
    assert open_or_make(config, 3, load, "f00d").folder != first.folder
    config.features.layout = "sparse"
    assert open_or_make(config, 3, lambda: with_words(two_cliques(6)), "f00d").folder.parent == first.folder.parent
    assert len([path for path in first.folder.parent.iterdir() if path.name.startswith("blocks")]) == 3
    config.partition.folder, config.partition.seed = str(first.folder), 0
    assert isinstance(open_or_make(config, 3, load, "f00d").x, np.ndarray), "a named folder keeps its form"
    config.partition.seed = 5
    with pytest.raises(PartitionError, match="made for another settings"):
        open_or_make(config, 3, load, "f00d")
    with pytest.raises(PartitionError, match="made for another graph"):
        open_or_make(config, 3, load, "beef")
    assert calls == [1, 1]


def test_a_machine_that_joins_needs_the_graph_of_the_job(tmp_path):
    """Another data set, no partition, or a folder of that name with another graph in it."""
    config = config_for(tmp_path)
    own = fingerprint(config.dataset)
    with pytest.raises(PartitionError, match=f"another data set than the job: expected the graph beef, got {own}"):
        expect_made(config, 3, "beef")
    with pytest.raises(PartitionError, match="has not the job's partitioned graph: expected .*blocks-"):
        expect_made(config, 3, own)
    open_or_make(config, 3, lambda: two_cliques(6), own)
    expect_made(config, 3, own)
    expect_made(config, 3, None)
    with pytest.raises(PartitionError, match="has not the job's partitioned graph"):
        expect_made(config, 4, own)
    folder = partition_folder(config, 3, own)
    shutil.rmtree(folder)
    written(two_cliques(6), folder)  # of the graph f00d
    with pytest.raises(PartitionError, match=f"made for another graph .*expected {own}, got f00d"):
        expect_made(config, 3, own)


def test_too_many_parts_leave_nothing_behind(tmp_path):
    config = config_for(tmp_path, folder=str(tmp_path / "p"))
    with pytest.raises(PartitionError, match="100 parts for 12 nodes"):
        open_or_make(config, 100, lambda: two_cliques(6), "f00d")
    assert not (tmp_path / "p").exists()


def make_in_child(cache, pipe):
    config = Config()
    config.dataset.cache = cache
    calls = []

    def load():
        calls.append(1)
        pipe.send("loading")
        pipe.recv()  # hold the lock until told
        return two_cliques(6)

    open_or_make(config, 2, load, "f00d")
    pipe.send(len(calls))


def test_the_second_maker_waits_for_the_first(tmp_path):
    config = config_for(tmp_path, method="metis", timeout_s=0.3)
    config.dataset.cache = str(tmp_path)
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    child = context.Process(target=make_in_child, args=(str(tmp_path), theirs), daemon=True)
    child.start()
    try:
        assert ours.poll(60) and ours.recv() == "loading"
        with pytest.raises(PartitionError, match="holds .* within 0 s"):  # the first is still at it
            open_or_make(config, 2, lambda: pytest.fail("must wait"), "f00d")
        said = []

        def heard(line):
            said.append(line)
            ours.send("go on")

        config.partition.timeout_s = 60
        pg = open_or_make(config, 2, lambda: pytest.fail("made twice"), "f00d", progress=heard)
        assert pg.parts == 2 and "waiting" in said[0]
        assert ours.poll(60) and ours.recv() == 1
    finally:
        child.join(10)
        child.kill()
        child.join(10)


def hang_in_child(cache, pipe):
    config = Config()
    config.dataset.cache = cache
    real = write.write_array

    def write_array(place, name, *rest):
        if name == "x":
            pipe.send(name)
            pipe.recv()
        return real(place, name, *rest)

    write.write_array = write_array
    open_or_make(config, 2, lambda: two_cliques(6), "f00d")


def test_a_maker_killed_while_it_writes_leaves_no_folder_and_no_lock(tmp_path):
    config = config_for(tmp_path, method="metis")
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    child = context.Process(target=hang_in_child, args=(config.dataset.cache, theirs), daemon=True)
    child.start()
    try:
        assert ours.poll(60) and ours.recv() == "x"
    finally:
        child.kill()
        child.join(10)
    parent = tmp_path / "cache" / "partitions"
    kinds = sorted(p.name.rpartition(".")[2] for p in parent.iterdir())
    assert kinds == ["lock", "tmp"]
    pg = open_or_make(config, 2, lambda: two_cliques(6), "f00d")
    check_partitioned(pg, two_cliques(6))
    assert sorted(p.name for p in parent.iterdir()) == [f".{pg.folder.name}.lock", pg.folder.name]


def test_what_a_killed_maker_left_is_removed(tmp_path):
    left = tmp_path / ".p.0123abcd.tmp"
    other = tmp_path / ".p.q.0123abcd.tmp"
    left.mkdir()
    other.mkdir()
    with locked(tmp_path / "p", 1.0, print):
        pass
    assert not left.exists() and other.exists()


def test_the_later_of_two_unlocked_makers_fails_cleanly(tmp_path):
    with pytest.raises(PartitionError), new_folder(tmp_path / "p"):
        written(two_cliques(6), tmp_path / "p")
    PartitionedGraph.open(tmp_path / "p", verify=True)
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_long_work_says_how_long(tmp_path):
    heard = threading.Event()
    with ticking("cutting", lambda line: heard.set() if line.startswith("cutting, ") else None, every_s=0.01):
        assert heard.wait(30)


def test_predicted_bytes_of_sampled_epochs(tmp_path):
    graph = two_cliques(6)
    pg = written(graph, tmp_path / "p", parts=2)
    arrays = pg.bounds, pg.colptr, pg.row, pg.train_mask
    # One batch of all seeds with all neighbors: exactly the remote nodes within two hops of a part's seeds.
    expected = 0
    for p in range(2):
        reached = set(pg.train_seeds(p).tolist())
        for _ in range(2):
            reached |= {int(u) for v in reached for u in pg.row[pg.colptr[v] : pg.colptr[v + 1]]}
        expected += 12 * len([v for v in reached if v not in pg.part(p).owned])
    assert sampled_epoch_bytes(*arrays, [-1, -1], -1, 12) == pytest.approx(expected)
    # Batches of one seed and one neighbor each, one hop: the share of a seed's in-edges that cross, per seed.
    expected = 0.0
    for p in range(2):
        for v in pg.train_seeds(p).tolist():
            sources = pg.row[pg.colptr[v] : pg.colptr[v + 1]]
            expected += 12 * np.mean(pg.owner(sources) != p)
    assert sampled_epoch_bytes(*arrays, [1], 1, 12) == pytest.approx(expected, rel=0.15)


def test_chunks_cover_every_column_once():
    colptr = np.array([0, 0, 10, 10, 11, 30, 31, 31])
    pieces = list(chunks(colptr, 0, 7, size=10))
    assert pieces[0][0] == 0 and pieces[-1][1] == 7
    assert all(a[1] == b[0] for a, b in pairwise(pieces))
    assert all(e - b == 1 or colptr[e] - colptr[b] <= 10 for b, e in pieces)
    assert list(chunks(colptr, 3, 3)) == []


def test_small_words():
    assert balance([0, 0]) == 1.0 and balance([3, 1]) == 1.5
    assert (human_bytes(512), human_bytes(3 << 20)) == ("512 B", "3.0 MiB")
