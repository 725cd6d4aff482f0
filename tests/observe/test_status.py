"""``status.json``: one writer, one reader."""

import json
import os

from gemini_gnn.observe.status import read_status, write_status
from tests.test_floors import PACKAGE


def test_a_reader_gets_the_last_state_or_nothing(tmp_path):
    assert read_status(tmp_path) == {}
    for state in ("starting", "running"):
        write_status(tmp_path, state, step=3, machine="m")
    status = read_status(tmp_path)
    writer = {"run_dir": str(tmp_path), "machine": "m", "pid": os.getpid(), "time": status["time"]}
    assert status == {"state": "running", "step": 3, **writer}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    for text in ("", "{", "[]", json.dumps("running")):
        (tmp_path / "status.json").write_text(text)
        assert read_status(tmp_path) == {}


def test_one_module_knows_the_file():
    quoted = ('"status.json"', "'status.json'", "/status.json")
    sources = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "launch").glob("*.py")]
    users = [path.name for path in sources if any(name in path.read_text() for name in quoted)]
    assert users == ["status.py"]
