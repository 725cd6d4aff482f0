"""The news of a job in words: pure."""

import io

import pytest
from rich.console import Console

from gemini_gnn.observe import table
from gemini_gnn.observe.news import News, Seen

PARTS = {"detect_s": 0.01, "decide_s": 0.0, "reap_s": 0.02, "fork_s": 0.05, "first_step_s": 0.3}
FAILURE = {"kind": "out of memory", "rank": 1, "step": 100, "steps_lost": 1, "recovery_s": 0.38, "interrupted": False}
LIVING = {
    "state": "running",
    "state_s": 200.0,
    "run_dir": "/runs/cora",
    "time": 1.7e9,
    "machine": "h1",
    "pid": 12345,
    "address": "10.0.0.1:29500",
    "term": 2,
    "generation": 3,
    "step": 121,
    "total_steps": 400,
    "step_s": 0.0123,
    "machines": [
        {
            "machine": "h1",
            "ranks": [0, 1],
            "here": True,
            "ready": True,
            "here_s": 9.0,
            "silent_s": 0.4,
            "memory_bytes": 12e6,
        },
        {
            "machine": "h2",
            "ranks": [2],
            "here": True,
            "ready": True,
            "here_s": 9.0,
            "silent_s": 3.25,
            "memory_bytes": None,
        },
        {"machine": "h3", "ranks": [3], "here": False, "ready": False, "here_s": 9.0, "silent_s": None},
        {"machine": None, "ranks": [4], "here": False, "ready": False, "here_s": None, "silent_s": None},
    ],
    "ranks": [
        {"rank": 0, "machine": "h1", "alive": True, "step": 121, "phase": "forward", "phase_s": 0.012},
        {"rank": 1, "machine": "h1", "alive": False, "step": 121, "phase": "exchange", "phase_s": 0.5},
        {"rank": 2, "machine": "h2", "alive": False},
        {"rank": 3, "machine": "h3", "alive": True},
    ],
    "recovers_from": "the trainer of rank 1 was killed by SIGKILL",
    "failures": [FAILURE | {"parts": PARTS}],
    "failure_count": 21,
    "recovery_total_s": 5.2,
    "lost_work_s": 0.1,
    "goodput": 0.987,
    "root": "lives",
    "unchanged_s": 0.0,
    "age_s": 0.3,
    "newest_term": 2,
}
LIVING["ranks"][0] |= {"snapshot": [2, 3, 120], "snapshot_s": 0.02}


def shown(document, width=80):
    out = io.StringIO()
    Console(file=out, width=width).print(table.picture(document))
    return out.getvalue()


def test_a_living_job_fits_80_columns_without_colours():
    text = shown(LIVING)
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 80
    assert "/runs/cora: running for 3 min 20 s" in text and "step 121 of 400, 12 ms each, 3.4 s left" in text
    assert "term 2, generation 3, root: process 12345 on h1, at 10.0.0.1:29500" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["h1", "0,", "1", "ready", "12.0", "MB"] in rows and ["h2", "2", "silent", "for", "3.2", "s"] in rows
    assert "silent" not in shown(LIVING | {"heartbeat_s": 2.0})
    assert ["h3", "3", "away", "for", "9.0", "s"] in rows and ["machine", "4", "4", "not", "here", "yet"] in rows
    assert ["0", "h1", "121", "forward", "for", "12", "ms", "2-3-120", "20", "ms"] in rows
    assert ["1", "h1", "121", "ended", "in", "exchange"] in rows and ["2", "h2", "does", "not", "run"] in rows
    assert ["3", "h3", "not", "heard", "of"] in rows
    words = " ".join(text.split())
    assert "out of memory rank 1 100 1 380 ms detect 10 ms, reap 20 ms, fork" in words and "first step 300 ms" in words
    assert "failures: 21, 5.2 s of recovery and 100 ms of steps done again; goodput 98.7%" in words
    assert "failures.jsonl has the older ones" in text


@pytest.mark.parametrize(
    ("copies", "line"),
    [
        ({"replicas": 1, "recoverable": None, "checkpoint": None}, None),
        ({"replicas": 1, "recoverable": [2, 3, 119], "checkpoint": None}, None),
        (
            {"replicas": 2, "recoverable": None, "checkpoint": None},
            "2 copies of each shard, no snapshot has all of them",
        ),
        (
            {"replicas": 3, "recoverable": [2, 3, 119], "checkpoint": [2, 1, 90]},
            "3 copies of each shard, the newest with all of them is 2-3-119; newest checkpoint of this start 2-1-90",
        ),
        ({"replicas": 1, "recoverable": None, "checkpoint": [2, 1, 90]}, "newest checkpoint of this start 2-1-90"),
    ],
)
def test_copies_of_snapshots_have_a_line_if_there_are_any(copies, line):
    """A status of an older release says nothing of copies: it has no line either."""
    without = table.head(LIVING)
    assert table.head(LIVING | copies) == ([*without[:3], line, *without[3:]] if line else without)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "by the clock of h1, 300 ms ago; its root writes"),
        ({"age_s": None}, "by the clock of h1; its root writes"),
        ({"root": "silent", "unchanged_s": 7.25}, "its root has not written for the 7.2 s of this look"),
        ({"root": "gone"}, "its root is gone. If no other takes its place, type the command of the job again"),
        ({"root": "ended"}, "; the job has ended"),
        ({"root": "unknown"}, "looking whether its root still writes"),
        ({"newest_term": 3}, "; since then term 3 has begun"),
    ],
)
def test_it_says_from_when_the_news_is(changes, words):
    said = table.news(LIVING | changes)
    assert words in said and said.startswith("as of 2023-11-1")


def test_a_job_that_is_over_has_neither_a_future_nor_an_age():
    first, *lines = table.head(LIVING | {"root": "ended", "state": "failed", "reason": "rank 1: no memory"})
    assert first == "/runs/cora: failed" and "reason: rank 1: no memory" in lines
    assert "step 121 of 400, 12 ms each" in lines


def test_a_job_that_has_said_nothing_yet():
    text = shown(News(Seen({}, {"term": 1}, "", None, None), 0.0, False).document)
    assert "no status has been written yet" in text and "no status yet; looking whether" in text


def test_texts_are_neither_markup_nor_orders_to_the_terminal():
    failure = LIVING["failures"][0] | {"kind": "[red]\x1b[2Jx"}
    text = shown(LIVING | {"reason": "[bold]\x1b]0;title\x07[/bold]\ntwo", "failures": [failure]}, 200)
    assert "reason: [bold] ]0;title [/bold] two" in text and "[red] [2Jx" in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0 ms"),
        (0.0123, "12 ms"),
        (0.9999, "1.0 s"),
        (99.94, "99.9 s"),
        (99.96, "1 min 40 s"),
        (3599.6, "1 h 0 min"),
        (90061.0, "25 h 1 min"),
    ],
)
def test_spans(seconds, words):
    assert table.span(seconds) == words


def test_a_job_is_not_healthy_before_its_copies_are_back():
    document = {**LIVING, "root": "lives", "recovers_from": None, "healthy": False}
    assert "replicating" in table.head(document)[0]
    assert "replicating" not in table.head(document | {"healthy": True})[0]
    assert "replicating" not in table.head(document | {"recovers_from": "h1 is silent"})[0]


def test_standbys_the_root_and_replaced_machines_are_named():
    one = {"ready": True, "here_s": 9.0, "silent_s": 0.1}
    machines = [
        {**one, "machine": "h0", "ranks": [0, 1], "here": True},
        {**one, "machine": "h1", "ranks": [], "here": False},
        {**one, "machine": "h2", "ranks": [2, 3], "here": True, "root": True},
        {**one, "machine": "h3", "ranks": [], "here": True},
    ]
    assert [row[:3] for row in table.machine_rows({"machines": machines})] == [
        ["h0", "0, 1", "ready"],
        ["h1", "none", "away for 9.0 s"],
        ["h2 (root)", "2, 3", "ready"],
        ["h3", "standby", "ready"],
    ]
