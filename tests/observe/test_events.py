"""The events of a rank."""

import json

from gemini_gnn.observe.events import EventLog


def test_events_are_json_lines(tmp_path):
    log = EventLog(tmp_path / "e.jsonl", 3)
    for i in range(100):
        log.emit("step", i=i)
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert [row["i"] for row in rows] == list(range(100)) and rows[0]["rank"] == 3


def test_events_survive_a_missing_folder(tmp_path, capsys):
    log = EventLog(tmp_path / "nowhere" / "e.jsonl", 0)
    log.emit("step")
    log.close()
    assert "cannot write events" in capsys.readouterr().err
