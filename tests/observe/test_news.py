"""Whether the writer of a status lives, as another process or another machine sees it."""

import itertools
import json
import subprocess
import sys
import time

import pytest

from gemini_gnn.errors import RunDirError
from gemini_gnn.observe import news, terms
from gemini_gnn.observe.news import News, Seen
from gemini_gnn.observe.status import write_status

CLAIM = "import sys; from pathlib import Path; from gemini_gnn.observe import terms; terms.claim_term(Path(sys.argv[1]), {})"


def seen(state="running", lives=None, age_s=None, beat="7", term=2):
    return Seen({"state": state, "term": term, "time": 1e9}, {"term": 2}, beat, lives, age_s)


@pytest.mark.parametrize(
    ("found", "unchanged_s", "changed", "root"),
    [
        (seen(), 0.0, False, "unknown"),  # another machine's, at the first look, however old it says it is
        (seen(), 0.0, True, "lives"),
        (seen(), 2.4, True, "lives"),
        (seen(), 2.6, True, "silent"),
        (seen(), 2.6, False, "silent"),
        (seen(lives=True, age_s=0.5), 0.0, False, "lives"),
        (seen(lives=True, age_s=900.0), 0.0, False, "unknown"),  # it is stopped, or it writes nothing but beats
        (seen(lives=True, age_s=900.0), 0.1, True, "lives"),
        (seen(lives=True, age_s=-900.0), 0.0, False, "unknown"),  # the clock was set back
        (seen(lives=False, age_s=0.5), 0.0, False, "gone"),
        (seen(beat=terms.OVER), 0.0, True, "gone"),
        *((seen(state), 0.0, False, "ended") for state in ("done", "stopped", "failed")),
        (seen("failed", lives=False, beat=terms.OVER), 0.0, False, "ended"),
        (seen("failed", term=1), 0.0, True, "lives"),  # the last start failed, the next one has said nothing yet
        (seen("failed", term=1, lives=False), 0.0, False, "gone"),
    ],
)
def test_what_the_root_is(found, unchanged_s, changed, root):
    assert News(found, unchanged_s, changed).root == root


def test_a_writer_on_this_machine_is_known_at_once(tmp_path):
    terms.make_run_dir(tmp_path)
    write_status(tmp_path, "running", term=terms.claim_term(tmp_path, {}))
    (first,) = itertools.islice(news.follow(tmp_path), 1)
    assert first.root == "lives" and 0 <= first.document["age_s"] < news.SILENT_S


def test_a_dead_writer_on_this_machine_is_known_at_once(tmp_path):
    terms.make_run_dir(tmp_path)
    subprocess.run([sys.executable, "-c", CLAIM, str(tmp_path)], timeout=60, check=True)
    write_status(tmp_path, "running", term=1)
    assert next(news.follow(tmp_path)).root == "gone"


@pytest.fixture
def elsewhere(tmp_path):
    """A run directory whose job runs on a machine whose clock is an hour behind."""
    (tmp_path / "terms").mkdir()
    (tmp_path / "terms" / "1.json").write_text(json.dumps({"term": 1, "machine": "h9", "pid": 1, "boot": "another"}))
    write_status(tmp_path, "running", term=1, machine="h9", time=time.time() - 3600.0)
    return tmp_path


@pytest.mark.parametrize("sign", ["beat", "status"])
def test_a_writer_elsewhere_lives_if_something_changes_while_one_looks(elsewhere, monkeypatch, sign):
    monkeypatch.setattr(news, "LOOK_S", 0.001)
    found = news.follow(elsewhere)
    assert next(found).root == "unknown"
    if sign == "beat":
        terms.beat(elsewhere, 1, 5)
    else:
        write_status(elsewhere, "running", term=1, machine="h9", time=time.time() - 3599.0)
    assert next(found).root == "lives"
    assert next(found).document["age_s"] is None


def test_a_writer_elsewhere_that_changes_nothing_is_silent(elsewhere, monkeypatch):
    monkeypatch.setattr(news, "LOOK_S", 0.001)
    monkeypatch.setattr(news, "SILENT_S", 0.0035)
    assert [one.root for one in itertools.islice(news.follow(elsewhere), 5)] == ["unknown"] * 4 + ["silent"]


def test_a_job_without_a_status_is_one(elsewhere):
    (elsewhere / "status.json").unlink()
    assert next(news.follow(elsewhere)).document == {
        "newest_term": 1,
        "root": "unknown",
        "unchanged_s": 0.0,
        "age_s": None,
    }


def test_no_job_and_no_folder_are_errors(tmp_path):
    with pytest.raises(RunDirError, match="no job has begun"):
        news.look(tmp_path)
    with pytest.raises(RunDirError, match="no folder .*nowhere"):
        news.look(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match="Not a directory"):
        news.look(tmp_path / "file")
