"""What a start puts aside before anything of it begins."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from gemini_gnn.cluster.place import Place
from gemini_gnn.config import FaultsConfig, RecoveryConfig, SnapshotConfig
from gemini_gnn.errors import SnapshotError
from gemini_gnn.observe import terms
from gemini_gnn.recovery import home, messages
from gemini_gnn.recovery.worker import beginning
from gemini_gnn.recovery.worker.journal import Journal
from gemini_gnn.snapshot import persist
from tests.recovery.arenas import arena_folder, step


def checkpoint(folder, job):
    """As far as a start looks at it."""
    path = folder / persist.tag_of(7)
    path.mkdir(parents=True)
    mark = persist.Mark(persist.FORMAT, step(7), job, 0.0, 2, {"rank-00000": 1, "rank-00001": 1})
    (path / persist.COMPLETE).write_text(json.dumps(asdict(mark)))


@pytest.fixture
def clear(tmp_path):
    terms.make_run_dir(tmp_path)
    journal = Journal(tmp_path, "h0")

    def call(resume, rank=0, folder=None):
        place = Place(rank, 2, 0, 1, "h0", "127.0.0.1", 1, "plain")
        request = messages.Register(
            place, "m:f", {}, [], resume, RecoveryConfig(), SnapshotConfig(folder=folder), FaultsConfig(), 60.0,
            0, 0.0, {}, "/", [], [], [0], "launch", 7,
        )  # fmt: skip
        beginning.clear(tmp_path, arena, request, journal)

    with arena_folder() as arena:
        yield call
    assert journal.close(5.0)


@pytest.mark.parametrize(
    ("resume", "rank", "left"),
    [("never", 0, 0), ("never", 1, 1), ("auto", 0, 1), ("must", 0, 1)],
    ids=["never", "another machine", "auto", "must"],
)
def test_resume_never_forgets_checkpoints_before_anything_begins(clear, tmp_path, resume, rank, left):
    """By one machine: a late one would forget those of the new run."""
    checkpoint(tmp_path / "checkpoints", "any: the run directory may have been moved")
    clear(resume, rank)
    assert len(persist.complete_checkpoints(tmp_path / "checkpoints")) == left


def test_another_jobs_checkpoints_are_not_forgotten(clear, tmp_path):
    folder = tmp_path.parent / f"{tmp_path.name}-of-all"
    checkpoint(folder, "other")
    with pytest.raises(SnapshotError, match="Give each job a folder of its own"):
        clear("never", folder=str(folder))
    assert len(persist.complete_checkpoints(folder)) == 1
    (folder / persist.tag_of(7) / persist.COMPLETE).unlink()
    checkpoint(folder / "mine", home.job_id(tmp_path))
    clear("never", folder=str(folder / "mine"))
    assert persist.complete_checkpoints(folder / "mine") == []


# --- what an agent that looks for a root learns from the run directory -----------------------------------------------

OLD = messages.Roster(1, [messages.Member("h0", "10.0.0.1", 1), messages.Member("h1", "10.0.0.2", 2)], [0, 1], 0, 1)


def test_the_seats_are_those_of_the_newest_term():
    """Else a machine that trained in an older one would be a witness that the newest membership trains no more."""
    new = beginning.newest_roster(OLD, {"term": 2, "seats": [0, 2], "names": ["h0", "h1", "h2"], "root": 0})
    assert (new.term, new.seats, new.root) == (2, [0, 2], 0)
    assert new.members == [*OLD.members, messages.Member("h2", "", 0)], (
        "addresses stay; a machine that joined is known by its name"
    )


def test_an_older_record_or_one_without_seats_changes_nothing():
    assert (
        beginning.newest_roster(OLD, {}) == beginning.newest_roster(OLD, {"term": 1, "seats": [1, 0], "root": 1}) == OLD
    )


def test_a_job_that_ended_without_this_machine():
    record, status = {"term": 2, "start": "a"}, {"term": 2, "state": "done", "exit_code": 0, "reason": "done"}
    done = beginning.ended_elsewhere(record, status, "a")
    assert done is not None and (done.kind, done.code, done.keep) == ("done", 0, False)
    failed = beginning.ended_elsewhere(record, {**status, "state": "failed", "exit_code": 1}, "a")
    assert failed is not None and (failed.kind, failed.code, failed.keep) == ("failed", 1, True)
    assert beginning.ended_elsewhere(record, {**status, "state": "running"}, "a") is None
    assert beginning.ended_elsewhere({**record, "term": 3}, status, "a") is None, "another root goes on"
    assert beginning.ended_elsewhere(record, status, "b") is None, "an earlier start"
    assert beginning.ended_elsewhere({"term": 2}, status, "") is None, "this machine knows no start yet"
