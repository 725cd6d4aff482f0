"""The thread that writes files: order, a full queue, files that cannot be written, and file systems that hang."""

import os
import subprocess
import sys
import threading
import time

import pytest

from gemini_gnn.observe import writer as module
from gemini_gnn.observe.writer import Writer
from tests.recovery.jobs import PATIENCE_S, wait_for


@pytest.fixture
def hanging(tmp_path):
    """A path that hangs its writer, as a dead file system does, until the test is over; and a writer with room for three."""
    path, writer = tmp_path / "hanging", Writer("test", room=3)
    os.mkfifo(path)
    yield path, writer
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # the thread's open returns
    assert wait_for(lambda: writer.close(PATIENCE_S), "the end of the thread")
    os.close(reader)


def test_work_is_done_in_the_order_of_the_calls(tmp_path):
    writer, path, done = Writer("test"), tmp_path / "a", []
    for number in range(100):
        writer.append(path, f"{number}\n")
        writer.submit(done.append, number)
    assert writer.close(PATIENCE_S) and done == list(range(100))
    assert path.read_text().split() == [str(number) for number in done]
    assert writer.problem == "" and writer.dropped == 0


def test_a_full_queue_drops_and_counts_and_never_blocks(hanging):
    path, writer = hanging
    writer.append(path, "a")
    wait_for(lambda: writer._queue.empty(), "the thread to begin")
    begin = time.monotonic()
    assert [writer.append(path, "b") for _ in range(5)] == [True] * 3 + [False] * 2
    assert time.monotonic() - begin < 1.0 and writer.dropped == 2


def test_a_file_system_that_hangs_is_a_problem_and_does_not_hold_up_the_end(hanging, monkeypatch):
    monkeypatch.setattr(module, "SLOW_S", 0.05)
    path, writer = hanging
    writer.append(path, "a")
    assert "hanging: its file system does not answer" in wait_for(lambda: writer.problem, "the problem")
    begin = time.monotonic()
    assert not writer.flush(0.1) and not writer.close(0.1)
    assert 0.2 <= time.monotonic() - begin < 2.0


def test_a_failure_is_said_once_and_its_lines_come_later(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    writer, path = Writer("test"), tmp_path / "later" / "a"
    for _ in range(3):
        writer.append(path, "line\n")
    assert writer.flush(PATIENCE_S)
    assert writer.problem == f"cannot write {path}: No such file or directory"
    path.parent.mkdir()
    wait_for(lambda: not writer.problem, "the lines to be written without another call")
    writer.append(path, "last\n")
    assert writer.close(PATIENCE_S) and path.read_text() == "line\n" * 3 + "last\n"
    assert capsys.readouterr().err.splitlines() == [
        f"warning: cannot write {path}: No such file or directory",
        f"{path} can be written again",
    ]


def test_what_cannot_be_written_at_the_end_is_not_hidden(tmp_path):
    writer = Writer("test")
    writer.append(tmp_path / "nowhere" / "a", "line\n")
    assert not writer.close(PATIENCE_S)


def test_of_a_failing_file_only_so_much_is_kept_and_only_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "KEPT_BYTES", 12)
    writer, path = Writer("test"), tmp_path / "later" / "a"
    for number in range(4):
        writer.append(path, f"line{number}\n")
    assert writer.flush(PATIENCE_S) and writer.dropped == 2
    path.parent.mkdir()
    assert writer.close(PATIENCE_S) and path.read_text() == "line0\nline1\n"


FULL = """
import resource, sys
from pathlib import Path
from gemini_gnn.observe.writer import Writer
writer, path = Writer("test"), Path(sys.argv[1])
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (8, most))
for number in range(3):
    writer.append(path, f"line{number}\\n")
assert writer.flush(60) and path.read_text() == "line0\\nli", path.read_text()
assert writer.problem.endswith("File too large"), writer.problem
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
assert writer.close(60)
"""


def test_a_disk_that_was_full_in_the_middle_of_a_line_tears_none(tmp_path):
    subprocess.run([sys.executable, "-c", FULL, tmp_path / "a"], timeout=PATIENCE_S, check=True)
    assert (tmp_path / "a").read_text() == "line0\nline1\nline2\n"


def test_an_error_of_the_code_is_said_with_its_traceback_and_the_thread_goes_on(capsys):
    def broken():
        raise ValueError("bad")

    writer, went_on = Writer("test"), threading.Event()
    for _ in range(2):
        writer.submit(broken)
    writer.submit(went_on.set)
    assert writer.flush(PATIENCE_S) and went_on.is_set()
    assert writer.problem == "cannot write broken: ValueError: bad"
    assert capsys.readouterr().err.count("Traceback") == 1
    assert not writer.close(PATIENCE_S)
