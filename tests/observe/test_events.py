"""The events of a rank."""

import json
import threading

from gemini_gnn.observe.events import EventLog
from gemini_gnn.observe.writer import Writer
from tests.recovery.jobs import PATIENCE_S, wait_for


def test_events_are_json_lines(tmp_path):
    writer = Writer("events")
    log = EventLog(writer, tmp_path / "e.jsonl", rank=3)
    for i in range(100):
        log.emit("step", i=i)
    assert writer.close(PATIENCE_S)
    rows = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert [row["i"] for row in rows] == list(range(100)) and rows[0]["rank"] == 3


def test_events_that_found_no_room_are_counted_in_the_next_one(tmp_path):
    writer, busy, go = Writer("events", room=1), threading.Event(), threading.Event()
    log = EventLog(writer, tmp_path / "e.jsonl")
    writer.submit(busy.set)
    assert busy.wait(PATIENCE_S)
    busy.clear()
    writer.submit(lambda: (busy.set(), go.wait(PATIENCE_S)))
    assert busy.wait(PATIENCE_S)
    for i in range(4):
        log.emit("step", i=i)
    go.set()
    wait_for(lambda: writer.flush(PATIENCE_S), "room in the queue")
    log.emit("step", i=4)
    assert writer.close(PATIENCE_S)
    rows = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert [(row["i"], row.get("dropped_before")) for row in rows] == [(0, None), (4, 3)]
