"""What must outlive a loss of power is on storage under its name: the folder is synced too, after the rename."""

import os
from pathlib import Path

import pytest
import torch

from gemini_gnn import files
from gemini_gnn.config import Config
from gemini_gnn.files import local_file_system
from gemini_gnn.observe import terms
from gemini_gnn.observe.run_directory import RunDir
from gemini_gnn.snapshot import deepspeed_checkpoints
from gemini_gnn.training.report import save_weights


@pytest.fixture
def done(monkeypatch):
    """Every fsync and rename from now on, in order: ("sync", path), ("name", path)."""
    seen: list[tuple[str, Path]] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (seen.append(("sync", Path(os.readlink(f"/proc/self/fd/{fd}")))), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (seen.append(("name", Path(new))), replace(old, new)))
    return seen


def test_a_file_is_synced_before_it_gets_its_name_and_its_folder_after(done, tmp_path):
    for content in ("old", b"new"):
        done.clear()
        files.write_atomically(tmp_path / "a", content, mode=0o600)
        temporary = tmp_path / f".a.{os.getpid()}"
        assert done == [("sync", temporary), ("name", tmp_path / "a"), ("sync", tmp_path)]
    assert (tmp_path / "a").read_text() == "new" and (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_synced_is_no_error_but_a_file_is(monkeypatch, tmp_path):
    def refuse(fd):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    files.sync(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="Invalid"):
        files.sync(tmp_path / "a")


def test_terms_checkpoints_weights_and_results_are_there_after_a_loss_of_power(done, tmp_path):
    terms.make_run_dir(tmp_path)
    for make, folder in (
        (lambda: terms.claim_term(tmp_path, {}), tmp_path / "terms"),
        (lambda: terms.run_id(tmp_path), tmp_path / "terms"),
        (lambda: terms.token(tmp_path), tmp_path / "terms"),
        (lambda: save_weights({"a": torch.zeros(2)}, tmp_path / "model.safetensors"), tmp_path),
    ):
        done.clear()
        make()
        assert done[-1] == ("sync", folder) and done[0][1].parent == folder and done[0][1] != folder
    run = RunDir.claim(Config(run_dir=str(tmp_path)), held=True)
    done.clear()
    run.finish({})
    run.release()
    assert done.index(("sync", tmp_path)) == done.index(("name", tmp_path / "result.json")) + 1
    tag = deepspeed_checkpoints.tag_of(5)
    (tmp_path / "checkpoints" / tag).mkdir()
    done.clear()
    deepspeed_checkpoints._end(tmp_path / "checkpoints", tag)
    complete = tmp_path / "checkpoints" / tag / deepspeed_checkpoints.COMPLETE
    assert done[1:] == [("name", complete), *(("sync", folder) for folder in complete.parents[:3])]


MOUNTS = """\
21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 21 0:44 / /home rw shared:5 - nfs4 server:/home rw
31 30 0:45 / /home/my\\040disk rw - xfs /dev/sdb1 rw
32 21 0:46 / /data rw - ext4 /dev/sdc1 rw
33 32 0:47 / /data rw - lustre mgs:/data rw
34 21 0:48 / /far rw - fuse.sshfs host:/far rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/root/run", "ext4"),
        ("/homes/run", "ext4"),
        ("/home/me/run", ""),
        ("/home/my disk/run", "xfs"),
        ("/data/run", ""),
        ("/far/run", ""),
    ],
)
def test_a_file_system_of_one_machine_is_told_from_a_shared_one(path, kind):
    assert local_file_system(Path(path), MOUNTS) == kind
