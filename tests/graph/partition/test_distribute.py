"""Machines with disks of their own: who gets what, the way there and back, holes that nobody reads, damage on the way."""

import io
import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini_gnn.cluster.doctor import reach
from gemini_gnn.config import Config
from gemini_gnn.errors import PartitionError
from gemini_gnn.graph.partition import distribute, held, receive
from gemini_gnn.graph.partition.check import check_partitioned
from gemini_gnn.graph.partition.folder import PartitionedGraph
from gemini_gnn.graph.partition.on_demand import expect_made
from gemini_gnn.graph.sparse import dense
from gemini_gnn.training import job
from tests.graph.partition.test_assign import graph_of, graphs, two_cliques
from tests.graph.partition.test_folder import with_words, written

HERE = Path(__file__).resolve().parents[3]


# --- who gets what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("standbys", [0, 1, 2])
def test_every_row_is_on_so_many_machines_and_on_each_standby(standbys, slots):
    for seats, copies in itertools.product(range(1, 7), range(1, 4)):
        if copies > seats:
            continue
        machines = held.parts_of(seats + standbys, slots, standbys, copies)
        everything = tuple(range(seats * slots))
        assert machines[seats:] == [everything] * standbys
        for seat, parts in enumerate(machines[:seats]):
            own = range(seat * slots, (seat + 1) * slots)
            assert set(own) <= set(parts) and len(parts) == len(set(parts)) == copies * slots, (
                "its ranks' own, and more"
            )
            assert list(parts) == sorted(parts)
        for part in everything:
            assert sum(part in parts for parts in machines[:seats]) == copies


META = {"checksums": {"x": "1"}, "bounds": [0, 2, 4], "graph": "g", "parts": 2}
OWN = held.Held("h0", "f00d", (0,), ())


def test_what_stands_is_kept_completed_or_left_alone():
    def stands(parts, found=META, record=OWN, machine="h0"):
        return held.stands(Path("/d/g"), META, parts, found, record, machine)

    assert stands([0]) and not stands([0, 1]) and not stands([1])
    assert stands([0, 1], record=None, machine="h7"), "a folder without a record holds everything"
    for found in ({}, META | {"checksums": {"x": "2"}}, META | {"bounds": [0, 1, 4]}):
        with pytest.raises(PartitionError, match=r"/d/g holds something else: expected nothing or g in 2 parts.*--to"):
            stands([0], found)
    with pytest.raises(PartitionError, match="/d/g is that of h0: expected one that only h1 sees"):
        stands([0], machine="h1")


def test_parts_are_named():
    assert held.named([2]) == "part 2" and held.named((0, 1)) == "parts 0, 1"
    assert held.named(range(10)) == "parts 0, 1, 2, 3, 4, 5, 6, 7, 2 more"


# --- there and back ---------------------------------------------------------------------------------------------------


def sent(pg, parts, folder, change=lambda data: data):
    """The folder after the bytes for ``parts`` came, as another machine sees it."""
    order = distribute.ordered(pg, distribute.pieces(pg), folder, parts)
    stream = io.BytesIO(change(b"".join(distribute.contents(pg.folder, order["pieces"]))))
    receive.receive(json.loads(json.dumps(order)), folder, stream, lambda _: None)
    assert not stream.read(1)
    return PartitionedGraph.open(folder, verify=True)


@settings(max_examples=25, deadline=None)
@given(graph=graphs(), data=st.data())
def test_what_is_held_is_equal_bit_for_bit(tmp_path_factory, graph, data):
    """Dense and sparse features, with values and without; weights and node ids or none; parts without a stored value."""
    place = tmp_path_factory.mktemp("d")
    form = data.draw(st.sampled_from(["dense", "ones", "values"]))
    graph = graph if form == "dense" else with_words(graph, ones=form == "ones")
    pg = written(graph, place / "p", parts=data.draw(st.integers(1, min(4, graph.num_nodes))))
    parts = data.draw(st.sets(st.integers(0, pg.parts - 1), min_size=1))
    got = sent(pg, sorted(parts), place / "got")
    assert got.meta == pg.meta and (got.held is None) == (len(parts) == pg.parts)
    check_partitioned(got, graph)
    for p in range(pg.parts):
        if p not in parts:
            with pytest.raises(PartitionError, match=f"no features of part {p}: "):
                got.part(p)
            continue
        ours, theirs = got.part(p), pg.part(p)
        for name in ("original", "colptr", "row", "halo", "y", "train_mask"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
        assert np.array_equal(dense(ours.x), dense(theirs.x))


@pytest.fixture
def large(tmp_path):
    """Three parts, with rows of which a hole shows in the blocks of the file."""
    return written(graph_of([0, 1, 2], [1, 2, 3], 12, features=30_000), tmp_path / "p")


def test_rows_that_are_not_held_are_holes_and_never_zeros(large, tmp_path):
    got = sent(large, [0], tmp_path / "got")
    size, whole = (os.stat(pg.folder / "x.npy") for pg in (got, large))
    assert size.st_size == whole.st_size and size.st_blocks < 0.6 * whole.st_blocks
    for rows in (lambda: got.part(1), got.as_graph):
        with pytest.raises(
            PartitionError, match=r"no features of parts? 1.*it has those of part 0\. Type .*--distribute"
        ):
            rows()
    config = Config()
    config.dataset.name, config.partition.folder = "partitioned", str(got.folder)
    with pytest.raises(PartitionError, match="no features of parts 1, 2"):  # a machine that joins may take any place
        expect_made(config, 3, None)
    config.partition.folder = str(large.folder)
    expect_made(config, 3, None)
    held.expect_here(got.folder, [0], made=True)
    held.expect_here(tmp_path / "new", [0], made=False)
    with pytest.raises(PartitionError, match=r"new on .*: expected a partitioned graph; there is no meta\.json"):
        held.expect_here(tmp_path / "new", [0], made=True)
    with pytest.raises(PartitionError, match="no features of parts 1, 2"):  # what is sent on must be whole
        distribute.distribute(got, [], "here", HERE, tmp_path / "further", [], print)


@pytest.mark.parametrize("name", ["x_index", "x_value", "row"])
def test_damage_to_what_is_held_is_named(tmp_path, name):
    got = sent(written(with_words(two_cliques(6)), tmp_path / "p"), [0, 2], tmp_path / "got")
    path = got.folder / f"{name}.npy"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1  # of part 2
    path.write_bytes(raw)
    with pytest.raises(PartitionError, match=rf"{name}\.npy: expected checksum"):
        PartitionedGraph.open(got.folder).verify_checksums()
    if name == "x_value":
        got.verify_checksums(features=False)
    else:
        with pytest.raises(PartitionError, match=rf"{name}\.npy: expected checksum"):
            got.verify_checksums(features=False)


@pytest.mark.parametrize("verify", [True, False])
def test_each_rank_reads_the_disk_of_its_own_machine_first(large, tmp_path, monkeypatch, verify):
    """Rank 0 has read another machine's."""
    got = sent(large, [1], tmp_path / "got")
    path = got.folder / "row.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    config = Config()
    config.dataset.name, config.partition.folder, config.partition.verify = "partitioned", str(got.folder), verify
    monkeypatch.setattr(job.process_groups, "run_on_first", lambda *_: None)
    groups = SimpleNamespace(rank=1, world_size=3, store=None)
    if verify:
        with pytest.raises(PartitionError, match=r"row\.npy: expected checksum"):
            job.partitioned_graph(config, groups)
    else:
        assert job.partitioned_graph(config, groups).held == got.held


def test_a_record_that_is_damaged_or_of_another_graph_is_refused(large, tmp_path):
    got = sent(large, [0], tmp_path / "got")
    path = got.folder / held.RECORD
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"fingerprint": "beef"}))
    with pytest.raises(PartitionError, match="of another graph"):
        PartitionedGraph.open(got.folder)
    for text in ("{", "[]", json.dumps(record | {"pieces": [1]}), json.dumps(record | {"parts": "?"})):
        path.write_text(text)
        with pytest.raises(PartitionError, match=r"held\.json cannot be read"):
            PartitionedGraph.open(got.folder)


def test_a_folder_of_the_first_version_travels(large, tmp_path):
    path = large.folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 1}))
    got = sent(PartitionedGraph.open(large.folder), [1], tmp_path / "got")
    assert got.meta.format_version == 1 and np.array_equal(got.part(1).x, large.part(1).x)


def test_what_is_damaged_or_cut_short_on_its_way_leaves_the_old_folder(large, tmp_path):
    folder = tmp_path / "got"
    sent(large, [0], folder)

    def flipped(data):
        return data[:-1] + bytes([data[-1] ^ 1])

    for change, message in (
        (flipped, "was damaged on its way"),
        (lambda data: data[:-1], "the connection ended at byte"),
    ):
        with pytest.raises(PartitionError, match=message):
            sent(large, [0, 1], folder, change)
        assert PartitionedGraph.open(folder, verify=True).held.parts == (0,)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["got", "p"], "nothing is left beside it"
    assert sent(large, [0, 1], folder).held.parts == (0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got", "p"]


def test_a_damaged_source_is_not_sent(large):
    path = large.folder / "x.npy"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(PartitionError, match=r"x\.npy: expected checksum"):
        distribute.pieces(large)


def test_a_full_disk_is_told_before_a_byte_moves(large, tmp_path, monkeypatch):
    order = distribute.ordered(large, distribute.pieces(large), tmp_path / "no" / "got", [0])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(PartitionError, match=r"no room in .*: expected [\d,]+ bytes; got 1,000 that are free"):
        receive.expect_room(order, tmp_path / "no" / "got")


# --- the conversation -------------------------------------------------------------------------------------------------


def test_a_machine_gets_it_once_and_says_why_it_cannot(large, tmp_path, monkeypatch):
    """The real receiver, as a child of this process."""
    said = []

    def told(folder, parts=(0, 1), project=HERE):
        (done,) = distribute.distribute(large, [("here", 1)], "here", project, folder, [parts], said.append)
        return done

    assert not (done := told(tmp_path / "got")).has and not done.problem
    assert done.moved_bytes == done.total_bytes and "here has got 939.0 KiB" in said[-1], said
    check_partitioned(PartitionedGraph.open(tmp_path / "got"))
    assert told(tmp_path / "got").has and said[-1] == "here has it already: features of parts 0, 1"

    other = written(two_cliques(6), tmp_path / "other").folder
    assert "holds something else: expected nothing or small in 3 parts; got small in 3 parts" in told(other).problem
    assert "works, but not this environment" in told(tmp_path / "g", project=tmp_path / "nowhere").problem
    monkeypatch.setattr(distribute, "sources", lambda: "another")
    assert "another version of gemini_gnn: expected sources another; got" in told(tmp_path / "g").problem
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["got", "other", "p"]


def test_a_machine_that_takes_no_byte_is_given_up(monkeypatch):
    monkeypatch.setattr(reach, "command", lambda *_: ["tail", "-f", "/dev/null"])
    monkeypatch.setattr(reach, "END_S", 0.1)
    with reach.probes([("h1", 1)], "ssh", HERE) as (probe,):
        probe.stream(itertools.repeat(bytes(1 << 20)), 0.1, lambda _: True)
        assert "no answer within" in probe.problem
    with reach.probes([("h1", 1)], "ssh", HERE) as (probe,):
        probe.stream(itertools.repeat(bytes(1 << 20)), 60, lambda moved: moved > 0)  # as after Ctrl-C
        assert not probe.problem
