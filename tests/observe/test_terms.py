"""The job's part of a run directory: terms, id and lock."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from gemini_gnn.errors import RunDirError
from gemini_gnn.observe import terms


@pytest.fixture(params=["links", "no links"])
def file_system(request, monkeypatch):
    if request.param == "no links":
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))


def test_terms_are_claimed_once(tmp_path):
    terms.make_run_dir(tmp_path)
    (tmp_path / "terms" / "notes.json").write_text("{}")
    assert [terms.claim_term(tmp_path, {}) for _ in range(3)] == [1, 2, 3]
    assert terms.newest_term(tmp_path)["term"] == 3
    (tmp_path / "terms" / "4.json").touch()  # its agent was killed before it could write
    assert terms.newest_term(tmp_path)["term"] == 3 and terms.claim_term(tmp_path, {}) == 5


def test_a_run_directory_has_one_id(tmp_path):
    terms.make_run_dir(tmp_path)
    run = terms.run_id(tmp_path)
    assert terms.run_id(tmp_path) == run
    assert [path.name for path in (tmp_path / "terms").iterdir()] == ["id"]
    (tmp_path / "terms" / "id").write_text("12")
    with pytest.raises(RunDirError, match="incomplete"):
        terms.run_id(tmp_path, patience_s=0.0)


def test_at_the_same_moment_ids_are_one_and_terms_are_several(tmp_path, file_system):
    terms.make_run_dir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: terms.run_id(tmp_path), range(8)))) == 1
        assert sorted(pool.map(lambda _: terms.claim_term(tmp_path, {}), range(8))) == list(range(1, 9))
    assert sorted(path.name for path in tmp_path.glob("terms/*")) == sorted([*(f"{n}.json" for n in range(1, 9)), "id"])


def test_a_run_directory_has_one_agent_and_a_dead_one_does_not_keep_it(tmp_path):
    terms.make_run_dir(tmp_path)
    lock = terms.take_run_dir(tmp_path, "the worker agent on h1, pid 7")
    before = psutil.Process().num_fds()
    with pytest.raises(RunDirError, match="in use by the worker agent on h1, pid 7"):
        terms.take_run_dir(tmp_path, "another", patience_s=0.0)
    assert psutil.Process().num_fds() == before
    os.close(lock)
    os.close(terms.take_run_dir(tmp_path, "the next", patience_s=0.0))
