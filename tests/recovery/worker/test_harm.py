"""Harm to what a machine keeps: a damaged copy, and memory that is full. The rest of it is done in the lab."""

from __future__ import annotations

import os
import selectors

import pytest

from gemini_gnn.errors import ConfigError, SnapshotError
from gemini_gnn.faults.schedule import parse_command
from gemini_gnn.recovery.worker import harm
from gemini_gnn.recovery.worker.children import Children
from gemini_gnn.recovery.worker.journal import Journal
from gemini_gnn.snapshot.store.arena import Room, SlotFile
from tests.recovery.arenas import JOB, arena_folder, capture, step

SHARD = "rank-00003"


@pytest.fixture
def children(tmp_path):
    (tmp_path / "events").mkdir()
    with arena_folder() as arena, selectors.DefaultSelector() as selector:
        yield Children(arena, JOB, Journal(tmp_path, "h0"), selector)


def commit(text, children):
    return harm.commit(parse_command(text.split()), children, master_addr="127.0.0.1", machines=2)


def whole(folder, slot):
    file = SlotFile(folder, SHARD, slot)
    try:
        file.manifest(file.header())
    except SnapshotError as error:
        assert "do not fit their checksum" in str(error)
        return False
    finally:
        file.close()
    return True


def test_a_byte_of_the_newest_copy_flips(children):
    capture(children.arena, SHARD, 0, step(7))
    capture(children.arena, SHARD, 1, step(6))
    capture(children.arena, "rank-00002", 0, step(8))
    said = commit("corrupt-replica 3", children)
    assert said == f"a byte of snapshot {step(7)} flipped in {children.arena}/{SHARD}.0 on {os.uname().nodename}"
    assert (whole(children.arena, 0), whole(children.arena, 1)) == (False, True)


def test_a_copy_that_is_not_there_or_not_whole_cannot_be_damaged(children):
    file = SlotFile(children.arena, SHARD, 0, create=True)
    file.void()
    file.close()
    with pytest.raises(ConfigError, match=f"corrupt-replica 3: .* keeps no copy of {SHARD}"):
        commit("corrupt-replica 3", children)


def test_memory_is_not_filled_where_the_machine_would_run_out_of_it(children, monkeypatch):
    monkeypatch.setattr(
        harm.arena, "room", lambda folder: Room(5 << 20, "the free memory of the machine", "fewer ranks")
    )
    monkeypatch.setattr(harm.os, "posix_spawnp", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(ConfigError, match="fill-shm: .* would run out of memory: .* the machine leaves 5 MiB"):
        commit("fill-shm h1", children)


def test_what_this_machine_may_not_do_is_refused_before_it_is_tried(children):
    for text, said in (
        ("cut-link h1 --for 1s", "cut-link: expected a job on several machines"),
        ("split h0 from h1", "split: expected a job on several machines"),
    ):
        with pytest.raises(ConfigError, match=said):
            harm.commit(parse_command(text.split()), children, master_addr="127.0.0.1", machines=1)
