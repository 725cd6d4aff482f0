"""Which SIGKILLs were the kernel's, for want of memory."""

from __future__ import annotations

import pytest

from gemini_gnn.recovery.worker.out_of_memory import Counter, kills

V2 = "low 0\nhigh 0\nmax 3\noom 2\noom_kill {}\noom_group_kill 0\n"
V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"


@pytest.mark.parametrize(("name", "text"), [("memory.events", V2), ("memory.oom_control", V1)])
def test_a_kill_for_want_of_memory_is_told_from_others(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text.format(7))  # of earlier processes
    counter = Counter(tmp_path)
    assert counter.why() == ""  # somebody typed kill -9
    file.write_text(text.format(8))
    assert counter.why() == f"out of memory (memory cgroup {tmp_path})"
    assert counter.why() == ""  # each is counted once


def test_without_a_cgroup_nothing_is_claimed(tmp_path):
    assert Counter(None).why() == "" and Counter(tmp_path / "gone").why() == ""
    (tmp_path / "memory.events").write_text(V2.format(1))
    gone = Counter(tmp_path)
    (tmp_path / "memory.events").unlink()
    assert gone.why() == ""


@pytest.mark.parametrize(
    "text", ["", "oom_kill_disable 1\nunder_oom 0\n", "oom_kill\n", "oom_kill many\n", "oom_group_kill 4\n"]
)
def test_a_file_that_does_not_count_kills(text):
    assert kills(text) is None
