"""The board: one page per trainer, written without system calls, read by the worker agent."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time

import pytest

from gemini_gnn.recovery import board, home
from gemini_gnn.recovery.board import Milestone, Page, Phase
from gemini_gnn.snapshot.store.identity import Identity


@pytest.fixture
def pages(tmp_path):
    """(what the agent reads from, the writer of page 0, that of page 1) of generation 3."""
    board.make(tmp_path, 2)
    return board.open_board(tmp_path), *(Page(board.open_board(tmp_path), page, 3) for page in range(2))


def test_nothing_stands_on_a_new_page(pages):
    assert board.read(pages[0], 0) is None and board.read(pages[0], 1) is None


def test_a_mark_is_read_as_it_was_made_and_on_no_other_page(pages):
    view, _, page = pages
    begin = time.monotonic()
    page.mark(Phase.FORWARD, 12)
    seen = board.read(view, 1)
    assert board.read(view, 0) is None
    assert (seen.marks, seen.generation, seen.step, seen.place, seen.phase) == (1, 3, 12, 0, Phase.FORWARD)
    assert begin <= seen.since_s <= time.monotonic() and seen.seen == 0


def test_the_place_counts_marks_of_a_step_and_nothing_new_is_no_mark(pages):
    view, page, _ = pages
    for phase, step in [(Phase.SAMPLING, 1), (Phase.SAMPLING, 1), (Phase.FORWARD, None), (Phase.SAMPLING, 2)]:
        page.mark(phase, step)
        last = board.read(view, 0)
    assert (last.marks, last.step, last.place) == (3, 2, 0)


def test_the_longest_time_of_a_phase_fades(pages, monkeypatch):
    view, page, _ = pages
    clock = [0]
    monkeypatch.setattr(time, "monotonic_ns", lambda: clock[0])
    for seconds in (1, 1, 64, 1, 1):
        page.mark(Phase.STEP, page.step + 1)
        clock[0] += seconds * 10**9
    page.mark(Phase.STEP, page.step + 1)
    seen = board.read(view, 0)
    assert seen.seen == 5 and seen.longest_s == pytest.approx(64 * (63 / 64) ** 2)


def test_who_waits_for_a_batch_waits_for_what_the_other_thread_does(pages):
    view, page, _ = pages
    page.mark(Phase.SAMPLING, 1)
    page.doing(Phase.EXCHANGE)
    assert board.read(view, 0).phase is Phase.EXCHANGE
    page.mark(Phase.FORWARD)
    assert board.read(view, 0).phase is Phase.FORWARD


def test_a_trainer_stopped_in_the_middle_of_a_mark_leaves_the_one_before(pages, monkeypatch):
    view, page, _ = pages
    page.mark(Phase.FORWARD, 7)
    words = page._words

    class Stopped(Exception):
        pass

    class Words:
        """All of the record is written; the word that makes it count is not."""

        def __getitem__(self, key):
            return words[key]

        def __setitem__(self, key, value):
            if key == 0:
                raise Stopped
            words[key] = value

    page._words = Words()
    with pytest.raises(Stopped):
        page.mark(Phase.BACKWARD)
    assert (board.read(view, 0).phase, board.read(view, 0).step) == (Phase.FORWARD, 7)


def test_milestones_are_marked_once_and_read_with_the_rest(pages):
    view, page, _ = pages
    page.mark(Phase.START_UP, 0)
    assert board.read(view, 0).milestones == (None,) * len(Milestone)
    begin = time.monotonic()
    page.milestone(Milestone.STARTED)
    page.total_steps(40)
    page.restored(7)
    seen = board.read(view, 0)
    page.milestone(Milestone.STARTED)
    page.milestone(Milestone.STEPPED)
    later = board.read(view, 0)
    assert (seen.total_steps, seen.restored_step) == (40, 7)
    started, joined, built, restored, stepped = later.milestones
    assert begin <= started <= restored <= stepped <= time.monotonic() and joined is None and built is None
    assert seen.milestones == (started, None, None, restored, None)
    assert board.read(view, 1) is None


def test_the_newest_snapshot_is_whole_also_when_its_writer_is_stopped_in_the_middle(pages):
    view, page, _ = pages
    page.mark(Phase.FORWARD, 3)
    assert board.read(view, 0).snapshot is None
    page.committed(1, 3, 2)
    page.committed(2, 4, 12)
    begin = time.monotonic()
    newest = board.read(view, 0).snapshot
    assert newest[:3] == (2, 4, 12) and newest.when_s <= begin
    at = page._offset + 8 * (board._SNAPSHOT_RECORDS + board._RECORD_WORDS)  # of number 3, which is not said yet
    board._RECORD.pack_into(page._board, at, 3, 2, 4, 13, 1, 0)
    assert board.read(view, 0).snapshot == newest


def test_the_agent_writes_back_which_snapshot_is_recoverable_and_what_to_hold(pages):
    """Each page has its own; a record that is not whole yet leaves the one before."""
    view, page, other = pages
    assert page.recoverable() is None and page.persist_at() == 0
    for step in (4, 5):
        board.tell_recoverable(view, 0, Identity(2, 3, step))
        assert page.recoverable() == (2, 3, step)
    at = 8 * (board._RECOVERABLE_RECORDS + board._RECORD_WORDS)  # of number 3, which is not said yet
    board._RECORD.pack_into(view, at, 3, 2, 3, 6, 0, 0)
    assert page.recoverable() == (2, 3, 5)
    board.ask_to_persist(view, 0, 40)
    assert page.persist_at() == 40 and (other.recoverable(), other.persist_at()) == (None, 0)
    page.mark(Phase.FORWARD, 41)
    assert board.read(view, 0).held is None
    page.hold(2, 3, 40)
    board.ask_to_persist(view, 0, 0)
    seen = board.read(view, 0)
    assert seen.held == Identity(2, 3, 40) and page.persist_at() == 0
    assert board.dated(board.aged(seen, 1.0), 1.0).held == seen.held and seen.snapshot is None


def test_a_commit_rings_the_bell_and_a_full_one_stops_nobody(tmp_path, monkeypatch):
    """The bell outlives the boards: its reader keeps it open over generations."""
    board.make(tmp_path, 1)
    reader = board.open_bell(tmp_path)
    board.make(tmp_path, 1)
    monkeypatch.setattr(board, "_page", None)
    board.attach(tmp_path, 0, 1)
    bell, view = board._page._bell, board.open_board(tmp_path)
    try:
        assert stat.filemode(os.fstat(bell).st_mode) == "prw-------"
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        board.committed(1, 1, 1)
        assert os.read(reader, 10) == b"\0"
        with pytest.raises(BlockingIOError):
            while True:
                os.write(bell, bytes(4096))
        board.committed(1, 1, 2)
        assert board.read(view, 0).snapshot.step == 2
    finally:
        os.close(bell)
        os.close(reader)


def test_what_a_script_says_are_its_milestones(pages, monkeypatch):
    view, page, _ = pages
    monkeypatch.setattr(board, "_page", page)
    board.mark(Phase.START_UP, 0)
    board.attaching()
    board.stepped(0)  # its first snapshot is taken
    board.committed(1, 3, 0)
    board.restored(0)
    seen = board.read(view, 0)
    assert [at is not None for at in seen.milestones] == [False, True, True, True, False] and seen.step == 1
    board.stepped(1)
    seen = board.read(view, 0)
    assert seen.milestones[Milestone.STEPPED] is not None and seen.snapshot[:3] == (1, 3, 0) and seen.step == 2


WRITER = """
import sys
from pathlib import Path
from gemini_gnn.recovery import board
page = board.Page(board.open_board(Path(sys.argv[1])), 0, 1)
rounds = [board.Phase.SAMPLING, board.Phase.FORWARD, board.Phase.BACKWARD, board.Phase.STEP]
print("here", flush=True)
for number in range(400_000):
    page.mark(rounds[number % 4], number // 4)
    page.committed(number, number + 1, number + 2)
    page.hold(number, number + 1, number + 2)
"""


def test_a_reader_beside_a_writer_sees_only_marks_that_were_made(tmp_path):
    """Step, place and phase of mark n are functions of n here; a record of two marks would not fit its number."""
    board.make(tmp_path, 1)
    view, rounds, read = board.open_board(tmp_path), [Phase.SAMPLING, Phase.FORWARD, Phase.BACKWARD, Phase.STEP], 0
    command = [sys.executable, "-c", WRITER, os.fspath(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "here\n"
        while writer.poll() is None:
            if (seen := board.read(view, 0)) is not None:
                number = seen.marks - 1
                assert (seen.step, seen.place, seen.phase) == (number // 4, number % 4, rounds[number % 4])
                term, generation, step, _ = seen.snapshot or (0, 1, 2, 0.0)
                assert (generation, step) == (term + 1, term + 2)
                held = seen.held or (0, 1, 2)
                assert held == (held[0], held[0] + 1, held[0] + 2)
                read += 1
    assert writer.returncode == 0 and read > 100
    print(f"{read} reads")


def test_a_record_that_does_not_carry_its_number_is_not_believed(pages):
    """As on a processor that shows the stores of another in another order."""
    view, page, _ = pages
    page.mark(Phase.FORWARD, 7)
    page._words[0] = 2
    assert board.read(view, 0) is None


def test_a_mark_costs_microseconds(pages):
    _, page, _ = pages
    begin = time.perf_counter()
    for number in range(10_000):
        page.mark(Phase.FORWARD, number)
    each_s = (time.perf_counter() - begin) / 10_000
    begin = time.perf_counter()
    for _ in range(10_000):
        page.milestone(Milestone.STEPPED)
    once_more_s = (time.perf_counter() - begin) / 10_000
    print(f"{each_s * 1e6:.2f} microseconds per mark, {once_more_s * 1e6:.2f} per milestone that was reached before")
    assert each_s < 100e-6 and once_more_s < each_s


def test_without_an_agent_marks_are_nothing(tmp_path):
    board.mark(Phase.FORWARD, 1)
    board.doing(Phase.EXCHANGE)
    board.milestone(Milestone.JOINED)
    board.restored(1)
    board.total_steps(1)
    board.committed(1, 1, 1)
    board.hold(1, 1, 1)
    assert board.recoverable() is None and board.persist_at() == 0
    board.attach(tmp_path, 0, 1)
    assert board._page is None and board.open_bell(tmp_path) is None
    board.make(tmp_path, 1)
    (tmp_path / board.BELL).unlink()
    page = Page(board.open_board(tmp_path), 0, 1, board.open_bell(tmp_path))
    page.committed(1, 1, 1)


def test_without_room_there_is_no_board(tmp_path, monkeypatch):
    """Not one whose pages are missing: a mark would be SIGBUS."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        board.make(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [] and board.open_board(tmp_path) is None


def test_a_new_board_is_another_file_and_no_snapshot(tmp_path):
    """What a trainer of the last generation still writes is nobody's."""
    arena = tmp_path / "gemini" / "job"
    home.make_arena(arena)
    board.make(arena, 1)
    late = Page(board.open_board(arena), 0, 1)
    board.make(arena, 1)
    late.mark(Phase.FORWARD, 1)
    assert board.read(board.open_board(arena), 0) is None
    assert home.snapshot_files(arena) == [] and home.holds_nothing(arena)
    assert os.stat(arena / board.FILE).st_mode & 0o777 == 0o600
    home.leave_arena(arena)
    assert not arena.exists()


def test_bursts_of_traffic_are_seen(pages):
    """A script marks nothing but STEP: that is no burst. A trainer that marks its reduction may gather in STEP (ZeRO)."""
    view, page, _ = pages
    assert not board.talks(view, 0) and not board.talks(view, 1)
    page.mark(Phase.STEP, 1)
    assert not board.talks(view, 0)
    talking = {}
    for phase in [
        Phase.SAMPLING,
        Phase.FORWARD,
        Phase.BACKWARD,
        Phase.AGREEMENT,
        Phase.REDUCTION,
        Phase.STEP,
        Phase.WRITING,
    ]:
        page.mark(phase)
        talking[phase] = board.talks(view, 0)
    assert {phase for phase, talks in talking.items() if talks} == {Phase.AGREEMENT, Phase.REDUCTION, Phase.STEP}
    page.doing(Phase.EXCHANGE)
    assert board.talks(view, 0)
    page.doing(Phase.SAMPLING)
    assert not board.talks(view, 0)
