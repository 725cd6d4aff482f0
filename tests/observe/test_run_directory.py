"""The run directory of a training: its owner, its settings, its losses."""

import json
import os
import re
import threading

import pytest
from omegaconf import OmegaConf

from gemini_gnn.cluster.place import Place
from gemini_gnn.config import Config, to_mapping
from gemini_gnn.errors import RunDirError
from gemini_gnn.observe import terms
from gemini_gnn.observe.run_directory import (
    LossLog,
    RunDir,
    check_size,
    differences,
    read_config,
    read_losses,
    resume_of,
    steps_done,
)
from gemini_gnn.training.report import Report
from gemini_gnn.training.state import RunState
from tests.observe.locks import held_locks


def test_losses_each_step_once_after_a_resume(tmp_path):
    path = tmp_path / "losses.csv"
    log = LossLog(path)
    log.resume(0, [])
    for step in range(1, 6):
        log.append(step, 1, 1 / step)
    log.close()
    with open(path, "a") as file:
        file.write("6,1,0.1")  # torn by a kill
    log = LossLog(path)
    log.resume(3, [[2, 1, 0.5], [3, 1, 1 / 3], [4, 1, 9.0]])
    log.append(4, 1, 0.25)
    log.close()
    assert read_losses(path) == [(1, 1, 1.0), (2, 1, 0.5), (3, 1, 1 / 3), (4, 1, 0.25)]


@pytest.mark.parametrize("rows", [3, 5])
def test_a_resume_cuts_rows_off_and_waits_for_no_disk(tmp_path, monkeypatch, rows):
    path = tmp_path / "losses.csv"
    path.write_text("step,epoch,loss\n" + "".join(f"{step},1,0.5\n" for step in range(1, rows + 1)) + "6,1,0.")
    disk, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: fsync(file) if disk.wait(30) else pytest.fail("nobody lets it go"))
    log = LossLog(path)
    log.resume(3, [[2, 1, 0.5], [3, 1, 0.5], [4, 1, 9.0]])
    assert read_losses(path) == [(1, 1, 0.5), (2, 1, 0.5), (3, 1, 0.5)] and path.read_text().endswith("3,1,0.5\n")
    assert log.unsynced == [[2, 1, 0.5], [3, 1, 0.5]]  # of the process before: they may be lost with the machine yet
    disk.set()
    log.close()


def test_a_late_row_of_an_old_rank_0_goes_nowhere(tmp_path):
    """Its machine was cut off, and another one has taken its place from the snapshot of step 2."""
    path = tmp_path / "losses.csv"
    old, new = LossLog(path), LossLog(path)
    old.resume(0, [])
    for step in (1, 2, 3):
        old.append(step, 1, 0.5)
    new.resume(2, [[1, 1, 0.5], [2, 1, 0.5]])
    new.append(3, 1, 0.25)
    old.append(4, 1, 9.0)
    new.append(4, 1, 0.125)
    old.close()
    new.close()
    assert read_losses(path) == [(1, 1, 0.5), (2, 1, 0.5), (3, 1, 0.25), (4, 1, 0.125)]


def test_a_late_evaluation_of_an_old_rank_0_goes_nowhere(tmp_path):
    config = Config(run_dir=str(tmp_path))
    config.logger.tensorboard = False

    def begin(evaluated):
        report = Report(RunDir(tmp_path, None), config, None)
        report.begin(RunState(evaluated=evaluated))
        return report

    old = begin(0)
    old.evaluation(1, {"accuracy": 0.5}, {}, None)
    new = begin(1)
    old.evaluation(2, {"accuracy": 0.0}, {}, None)
    new.evaluation(2, {"accuracy": 0.75}, {}, None)
    old.close()
    new.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"epoch": 1, "val_accuracy": 0.5}, {"epoch": 2, "val_accuracy": 0.75}]


@pytest.mark.parametrize(
    "text", ["1e5", "nan", "0x1F", "1_0", "1:30", "true", "~", "null", "a: b", "é", "", " x", "a\nb", "2001-01-01"]
)
def test_settings_are_read_as_they_were_written(tmp_path, text):
    config = Config(run_dir=str(tmp_path / "run"))
    config.dataset.path, config.optimizer.lr, config.optimizer.weight_decay = text, 1e-05, 0.0
    RunDir.claim(config).release()
    assert read_config(tmp_path / "run") == config
    written = (tmp_path / "run" / "config.yaml").read_text()
    assert OmegaConf.to_container(OmegaConf.create(written)) == to_mapping(config)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", 0),
        ("step,epoch,loss\n", 0),
        ("step,epoch,loss\n1,1,0.5", 0),
        ("step,epoch,loss\n1,1,0.5\n", 1),
        ("step,epoch,loss\n1,1,0.5\n2,1,0.2", 1),
        ("step,epoch,loss\n" + "".join(f"{s},1,0.25\n" for s in range(1, 2001)) + "20", 2000),
    ],
)
def test_the_last_step_that_was_written_whole(tmp_path, text, steps):
    assert steps_done(tmp_path) == 0
    (tmp_path / "losses.csv").write_text(text)
    assert steps_done(tmp_path) == steps == max((row[0] for row in read_losses(tmp_path / "losses.csv")), default=0)


def test_lost_rows_come_back_from_the_snapshot(tmp_path):
    log = LossLog(tmp_path / "losses.csv")
    log.resume(2, [[1, 1, 0.5], [2, 1, 0.25]])
    log.close()
    assert [row[0] for row in read_losses(tmp_path / "losses.csv")] == [1, 2]


def test_a_run_dir_belongs_to_one_run(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"))
    run = RunDir.claim(config)
    with pytest.raises(RunDirError, match="in use by pid"):
        RunDir.claim(config)
    run.release()
    RunDir.claim(config).release()
    other = Config(run_dir=config.run_dir, seed=5)
    (tmp_path / "run" / "losses.csv").write_text("step,epoch,loss\n1,1,0.5\n")
    with pytest.raises(RunDirError, match="seed: 0 -> 5"):
        RunDir.claim(other)
    again = RunDir.claim(config)
    again.finish({"test_accuracy": 1.0})
    again.release()
    with pytest.raises(RunDirError, match="finished run"):
        RunDir.claim(config)


def test_locks_that_a_file_server_keeps_do_not_stop_a_run(tmp_path):
    config = Config(run_dir=str(tmp_path))
    RunDir.claim(config).release()
    with held_locks(tmp_path):
        RunDir.claim(config).release()


def test_a_worker_agent_and_a_run_of_this_process_refuse_each_other(tmp_path):
    config = Config(run_dir=str(tmp_path))
    run = RunDir.claim(config)
    with pytest.raises(RunDirError, match=f"in use by pid {os.getpid()} on"):
        terms.claim_term(tmp_path, {"owner": "the worker agent"}, beat_s=0.1)
    run.release()
    term = terms.claim_term(tmp_path, {"owner": "the worker agent"})
    with pytest.raises(RunDirError, match="in use by the worker agent"):
        RunDir.claim(config)
    RunDir.claim(config, held=True).release()  # the agent's own trainer
    assert terms.newest_term(tmp_path)["term"] == term
    terms.leave_term(tmp_path, term)
    RunDir.claim(config).release()


def test_a_run_that_lost_its_folder_writes_nothing_any_more(tmp_path):
    run = RunDir.claim(Config(run_dir=str(tmp_path)))
    run.status("running")
    run._beats.lost = True
    for write in (lambda: run.status("failed"), lambda: run.finish({}), run.expect_ours):
        with pytest.raises(RunDirError, match="was taken by another start"):
            write()
    assert not (tmp_path / "result.json").exists()
    run.release()


def test_settings_may_be_mended_until_the_first_step(tmp_path):
    config, other = (Config(run_dir=str(tmp_path / "run"), seed=seed) for seed in (0, 5))
    assert resume_of(config, 2) == "auto"  # a new folder
    RunDir.claim(config).release()
    (tmp_path / "run" / "losses.csv").write_text("step,epoch,loss\n")
    assert resume_of(config, 2) == "auto" and resume_of(other, 2) == "never"
    with pytest.raises(RunDirError, match="seed: 0 -> 5"):
        RunDir.claim(Config(run_dir=config.run_dir, seed=5, resume="must"))
    RunDir.claim(other).release()
    assert resume_of(other, 2) == "auto" and read_config(tmp_path / "run").seed == 5


@pytest.mark.parametrize(
    ("world", "slots", "standbys", "launcher", "said"),
    [
        (
            6,
            2,
            0,
            "slurm",
            "got 6, 2 on each of 3 machines that train. Start on 2 machines with 2 each (--nodes=2 --nt",
        ),
        (
            6,
            3,
            0,
            "slurm",
            "got 6, 3 on each of 2 machines that train. Start on 2 machines with 2 each (--nodes=2 --nt",
        ),
        (
            4,
            2,
            1,
            "slurm",
            "1 machine that trains. Start on 3 machines (1 of them standing by) with 2 each (--nodes=3 --",
        ),
        (
            2,
            1,
            0,
            "deepspeed",
            "Start on 4 machines with 1 each (4 hosts with slots=1 in the hostfile), give another run_",
        ),
        (8, 8, 0, "deepspeed", "Start on 1 machine with 4 each (deepspeed --num_accelerators 4), give another run_dir"),
        (2, 1, 0, "torchrun", "Start on 4 machines with 1 each (--nnodes=4 --nproc-per-node=1), give another run_dir"),
        (4, 1, 0, "deepspeed", None),
        (6, 2, 1, "slurm", None),
    ],
)
def test_a_run_goes_on_with_as_many_ranks_as_it_had(tmp_path, world, slots, standbys, launcher, said):
    config = Config(run_dir=str(tmp_path))
    config.recovery.standby_machines = standbys
    place = Place(0, world, 0, slots, "h0", "h0", 1, launcher)
    check_size(config, place)  # a new folder
    (tmp_path / "model.json").write_text('{"ranks": 4}')
    check_size(config, place)  # no step is lost
    assert (resume_of(config, world - slots * standbys) == "never") == (said is not None)
    (tmp_path / "losses.csv").write_text("step,epoch,loss\n1,1,0.5\n")
    if said is None:
        return check_size(config, place)
    with pytest.raises(RunDirError, match=f"expected 4 ranks, as the run in it has.*{re.escape(said)}"):
        check_size(config, place)
    terms.make_run_dir(tmp_path)
    term = terms.claim_term(tmp_path, {})
    check_size(config, place)  # this process has the run directory: a start is told so
    terms.leave_term(tmp_path, term)
    with pytest.raises(RunDirError, match="expected 4 ranks"):
        check_size(config, place)
    config.resume = "never"
    check_size(config, place)


def test_what_is_started_over_is_kept_beside(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"))
    path = tmp_path / "run"

    def begin(seed, row):
        run = RunDir.claim(Config(run_dir=config.run_dir, seed=seed, resume="never"), anew=True)
        run.release()
        log = LossLog(path / "losses.csv")
        log.resume(0, [])
        if row:
            log.append(1, 1, row)
            (path / "model.safetensors").write_text(str(row))
        log.close()

    begin(0, None)
    begin(0, 0.5)  # nothing was done before
    begin(1, 0.25)
    begin(2, 0.125)
    kept = {name: read_losses(path / name)[0][2] for name in ("losses.1.csv", "losses.2.csv", "losses.csv")}
    assert kept == {"losses.1.csv": 0.5, "losses.2.csv": 0.25, "losses.csv": 0.125}
    assert [(path / f"model.{n}.safetensors").read_text() for n in (1, 2)] == ["0.5", "0.25"]
    assert ["\nseed: 0\n" in (path / f"config.{n}.yaml").read_text() for n in (1, 2)] == [True, False]
    assert read_config(path).seed == 2 and not list(path.glob("*.3.*"))


def test_another_snapshot_mode_does_not_begin_a_run_again(tmp_path):
    config, other = (Config(run_dir=str(tmp_path / "run")) for _ in range(2))
    other.snapshot.mode = "nfs"
    RunDir.claim(config).release()
    RunDir.check_earlier_run(tmp_path / "run", other)
    (tmp_path / "run" / "losses.csv").write_text("step,epoch,loss\n1,1,0.5\n")
    with pytest.raises(RunDirError, match=r"snapshot\.mode: memory -> nfs.* resume=never"):
        RunDir.claim(other)
    other.resume = "never"
    RunDir.claim(other, anew=True).release()


def test_free_settings_do_not_make_another_run():
    assert differences({"resume": "auto", "seed": 1}, {"resume": "must", "seed": 1}) == []
    assert differences({"a": {"b": 1}}, {"a": {"b": 2}}) == ["a.b: 1 -> 2"]
    old, new = to_mapping(Config()), to_mapping(Config())
    for group, changed in (
        ("evaluation", {"every": 3, "fanouts": [4, 4], "batch_size": 1000}),
        ("logger", {"progress": False, "tensorboard": False, "wandb": True, "wandb_project": "mine"}),
        ("sampling", {"topology": "partitioned", "prefetch": 0, "chunk_bytes": 4096}),
        ("features", {"in_ram": False, "shared": False}),
        ("partition", {"timeout_s": 1.0, "plot": True, "verify": False}),
    ):
        assert old[group].keys() >= changed.keys()
        new[group] |= changed
    assert differences(old, new) == []
    for group, changed in (
        ("sampling", "batch_size"),
        ("training", "threads"),
        ("training", "epochs"),
        ("model", "init"),
    ):
        assert differences(old, old | {group: old[group] | {changed: "other"}}), "this one changes losses"


def test_an_unwritable_run_dir_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="not writable"):
        RunDir.claim(Config(run_dir=str(tmp_path / "file" / "run")))
