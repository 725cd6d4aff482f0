"""The records of an agent, over file systems that hang, are full, or are written by others at the same time."""

import json
import os
import shutil
import threading
import time

import pytest

from gemini_gnn.observe import terms
from gemini_gnn.observe import writer as writer_module
from gemini_gnn.observe.status import read_status, write_status
from gemini_gnn.recovery.worker.decisions import Failure
from gemini_gnn.recovery.worker.journal import Journal
from tests.recovery.jobs import PATIENCE_S, wait_for


@pytest.fixture
def held(tmp_path):
    """A journal whose thread waits until the test says go."""
    terms.make_run_dir(tmp_path)
    journal, go = Journal(tmp_path, "m"), threading.Event()
    journal.speaks_for_job = True
    journal.writer.submit(go.wait, PATIENCE_S)
    yield journal, go
    go.set()
    journal.close(PATIENCE_S)


def test_a_file_system_that_hangs_holds_up_no_record_and_no_end(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "SLOW_S", 0.05)
    terms.make_run_dir(tmp_path)
    os.mkfifo(tmp_path / "events" / "agent-m.jsonl")
    journal = Journal(tmp_path, "m")
    journal.speaks_for_job = True
    begin = time.monotonic()
    for _ in range(100):
        journal.log("one", rank=1)
        journal.status("running")
    journal.write_errors(Failure(0, 1, 1.0, "bad", "it is bad"))
    assert time.monotonic() - begin < 1.0
    assert "agent-m.jsonl: its file system does not answer. Training goes on" in wait_for(journal.news, "the news")
    assert journal.news() == "", "said once"
    begin = time.monotonic()
    assert not journal.close(0.2) and 0.2 <= time.monotonic() - begin < 2.0
    reader = os.open(tmp_path / "events" / "agent-m.jsonl", os.O_RDONLY | os.O_NONBLOCK)  # it answers again
    assert journal.close(PATIENCE_S) and read_status(tmp_path)["state"] == "running"
    os.close(reader)


def test_records_are_written_in_order_with_their_term(tmp_path):
    terms.make_run_dir(tmp_path)
    journal = Journal(tmp_path, "m")
    for journal.term in range(3):
        journal.log("one", rank=1)
    assert journal.close(PATIENCE_S)
    rows = [json.loads(line) for line in (tmp_path / "events" / "agent-m.jsonl").read_text().splitlines()]
    assert [(row["term"], row["kind"], row["rank"]) for row in rows] == [(term, "one", 1) for term in range(3)]
    assert rows[0]["monotonic_s"] <= rows[1]["monotonic_s"] <= time.monotonic()


def test_that_a_run_directory_is_gone_and_that_it_is_back_is_each_said_once(tmp_path):
    run_dir = tmp_path / "run"
    terms.make_run_dir(run_dir)
    journal = Journal(run_dir, "m")
    shutil.rmtree(run_dir)
    journal.log("one")
    news = wait_for(journal.news, "the news")
    assert news.startswith(f"run_dir is not writable: cannot write {run_dir}") and "No such file" in news
    assert journal.news() == ""
    terms.make_run_dir(run_dir)
    assert wait_for(journal.news, "the good news") == "run_dir is writable again"
    assert journal.close(PATIENCE_S) and "one" in (run_dir / "events" / "agent-m.jsonl").read_text()


def test_of_several_waiting_statuses_the_newest_is_written(held):
    journal, go = held
    asked = time.time()
    journal.status("starting")
    journal.status("running", generation=2)
    go.set()
    assert journal.flush(PATIENCE_S)
    status = read_status(journal.run_dir)
    assert (status["state"], status["generation"], status["machine"]) == ("running", 2, "m") and status["time"] >= asked


def test_the_status_of_a_complete_run_stays(held):
    """The file is read when it is written, not when the agent asked."""
    journal, go = held
    journal.status("running")
    write_status(journal.run_dir, "done", step=7)
    (journal.run_dir / "result.json").write_text("{}")
    go.set()
    assert journal.flush(PATIENCE_S) and read_status(journal.run_dir)["step"] == 7
