"""A run directory on each machine: what every one gets, and what is refused."""

import json
import stat

import pytest

from gemini_gnn.errors import RunDirError
from gemini_gnn.observe import spread, terms, votes


def test_machines_get_one_id_one_token_and_a_name_each(tmp_path):
    folders = [tmp_path / name for name in ("h0", "h1")]
    found = [spread.look(folder) for folder in folders]
    assert found[0]["disk"] != found[1]["disk"] and found[0]["files"] == {}
    disks = [one["disk"] for one in found]
    for folder, order in zip(folders, spread.plan(tmp_path, ["h0", "h1"], found), strict=True):
        spread.take(folder, order["files"], disks)
    assert terms.run_id(folders[0]) == terms.run_id(folders[1]) and terms.token(folders[0]) == terms.token(folders[1])
    assert stat.S_IMODE((folders[1] / "terms" / "token").stat().st_mode) == 0o600
    for folder, disk in zip(folders, disks, strict=True):
        assert votes.private(folder) == votes.Private(disk, tuple(disks))

    again = [spread.look(folder) for folder in folders]
    assert [one["disk"] for one in again] == disks
    assert [order["files"] for order in spread.plan(tmp_path, ["h0", "h1"], again)] == [{}, {}]


def test_a_new_machine_gets_what_it_joins_by(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    spread.look(old)
    spread.take(old, {"terms/id": "1" * 32, "terms/token": "2" * 64, "config.yaml": "a: 1"}, [])
    (old / "terms" / "7.json").write_text(json.dumps({"term": 7}))
    found = [spread.look(old), spread.look(new)]
    kept, sent = (order["files"] for order in spread.plan(tmp_path, ["h0", "h1"], found))
    assert kept == {}
    assert set(sent) == {"terms/id", "terms/token", "terms/7.json", "config.yaml"}
    spread.take(new, sent, ["x"])
    assert terms.newest_term(new) == {"term": 7} and terms.token(new) == terms.token(old)


def test_a_shared_folder_and_two_runs_are_refused(tmp_path):
    one = {"disk": "a", "files": {"terms/id": "1"}, "newest": 0}
    with pytest.raises(RunDirError, match="h0 and h2 see the same folder"):
        spread.plan(tmp_path, ["h0", "h1", "h2"], [one, one | {"disk": "b"}, one])
    with pytest.raises(RunDirError, match="different runs on h0 and h1"):
        spread.plan(tmp_path, ["h0", "h1"], [one, {"disk": "b", "files": {"terms/id": "2"}, "newest": 0}])


def test_a_folder_that_all_share_has_no_name(tmp_path):
    terms.make_run_dir(tmp_path)
    assert votes.private(tmp_path) is None
    (tmp_path / "terms" / "private").write_text("torn")
    assert votes.private(tmp_path) is None
