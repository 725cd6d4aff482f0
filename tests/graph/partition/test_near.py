"""The graph in the page cache of a standby."""

import os

from gemini_gnn.graph.partition import near


def bytes_read() -> int:
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def test_the_small_arrays_come_first_and_no_more_is_read_than_allowed(tmp_path, monkeypatch):
    opened = []
    real = open
    monkeypatch.setattr(
        near, "open", lambda path, *a, **k: (opened.append(path.name), real(path, *a, **k))[1], raising=False
    )
    monkeypatch.setattr(near, "PIECE_BYTES", 1 << 10)
    monkeypatch.setattr(near, "PAUSE_S", 0.01)
    for name, size in (("x.npy", 1 << 20), ("row.npy", 8 << 10), ("meta.json", 10)):
        (tmp_path / name).write_bytes(bytes(size))
    answers = [None, tmp_path]  # not known at the first look
    before = bytes_read()
    thread = near.bring_near(lambda: answers.pop(0), (8 << 10) + (100 << 10))
    thread.join(20)
    assert not thread.is_alive() and not answers
    assert opened == ["row.npy", "x.npy"]
    assert 108 << 10 <= bytes_read() - before < 400 << 10


def test_a_folder_that_vanishes_ends_it(tmp_path):
    thread = near.bring_near(lambda: tmp_path / "gone", 1)
    thread.join(20)
    assert not thread.is_alive()
    assert os.getpriority(os.PRIO_PROCESS, 0) == 0, "the other threads keep their priority"
