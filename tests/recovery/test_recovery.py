"""Shim, worker agent, warm parent and trainers as real processes, from start to end; trainers without torch."""

from __future__ import annotations

import json
import os
import shutil
import signal

import psutil
import pytest

from gemini_gnn.observe import terms
from gemini_gnn.observe.status import read_status
from gemini_gnn.recovery.stop import stop
from gemini_gnn.snapshot.store.locks import agent_lives
from tests.observe.locks import held_locks
from tests.recovery.jobs import PATIENCE_S, job, wait_for

__all__ = ["job"]  # the fixture


def test_a_job_runs_and_leaves_nothing(job):
    run = job()
    code, out, err = run.end(run.launch(2, "report", marker=[1, 2]))
    assert (code, err) == (0, "")
    assert out == "hello from rank 0\ran error line\n"
    first, second = sorted(run.notes("report"), key=lambda note: note["rank"])
    assert first["payload"] == {"marker": [1, 2]}
    assert (first["listen"], second["listen"]) == (True, False)
    assert first["port"] == second["port"] == int(first["master_port"]) != 29500
    assert (first["term"], first["generation"], first["resume"]) == (1, 1, "auto")
    assert first["marker"] == "from the shim" and first["folder"] == os.getcwd()
    assert first["omp"] == os.environ.get("OMP_NUM_THREADS")
    assert first["session"] == first["pid"]
    log = os.fspath(run.run_dir / "logs" / "rank-0.log")
    assert (first["links"]["0"], first["links"]["1"], first["links"]["2"]) == ("/dev/null", log, log)
    rest = [path for number, path in second["links"].items() if int(number) > 2]
    ours = [os.fspath(run.arena / name) for name in ("bell", "board", "trainers.lock")]
    assert sorted(path.split(":")[0] for path in rest) == [*ours, "socket"]
    assert json.loads((run.run_dir / "status.json").read_text())["state"] == "done"
    run.assert_nothing_left()


def test_a_launcher_without_standard_descriptors(job):
    """The first file it opens would be its standard output: the lock, or the socket to the agent."""
    run = job()
    launch = run.launch(2, "train", closed=True)
    run.training(2)
    assert agent_lives(run.arena)
    run.finish()
    assert run.end(launch) == (0, "", "")
    assert (run.run_dir / "logs" / f"agent-{os.uname().nodename}.log").read_text() == ""
    run.assert_nothing_left()


def test_each_start_claims_a_term(job):
    run = job()
    for _ in range(2):
        assert run.end(run.launch(1, "report"))[0] == 0
    assert [note["term"] for note in run.notes("report")] == [1, 2]
    assert json.loads((run.run_dir / "terms" / "2.json").read_text())["term"] == 2


def test_a_complete_run_stays_done_whoever_starts_it_again(job):
    run = job()
    assert run.end(run.launch(1, "report"))[0] == 0
    done = (run.run_dir / "status.json").read_text()
    (run.run_dir / "result.json").touch()
    assert run.end(run.launch(1, "fail", rank=0, for_users=True))[0] == 2
    assert (run.run_dir / "status.json").read_text() == done


def test_exit_code_and_first_error_are_the_jobs(job):
    run = job()
    code, _, err = run.end(run.launch(3, "fail", rank=1))
    assert code == 1
    assert "ValueError: the first error" in err and "Traceback" in err and "rank 1" in err
    assert "Connection closed" not in err
    status = json.loads((run.run_dir / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "ValueError: the first error")
    assert "ValueError: the first error" in (run.run_dir / "logs" / "rank-1.log").read_text()
    assert run.events("phase", generation=2) == []  # an exception is no reason to restart
    run.assert_nothing_left()


def test_an_error_for_users_has_no_traceback(job):
    run = job()
    code, _, err = run.end(run.launch(2, "fail", rank=1, for_users=True))
    assert code == 2
    assert "expected a graph, got nothing" in err and "Traceback" not in err


def test_a_start_that_fails_before_its_first_snapshot_leaves_nothing_and_promises_nothing(job):
    run = job()
    code, _, err = run.end(run.launch(1, "fail_before_the_first_snapshot"))
    assert code == 2 and "resumes" not in err
    run.assert_nothing_left()


def test_any_exit_code_comes_through(job):
    run = job()
    code, out, _ = run.end(run.launch(1, "report", code=17))
    assert code == 17 and "rank 0 ended with exit code 17" in out


def test_a_module_that_cannot_be_imported_is_named(job):
    run = job()
    code, _, err = run.end(run.launch(2, "report", preload=["json", "no_such_module"]))
    assert code == 1 and "cannot import no_such_module" in err
    run.assert_nothing_left()


def test_a_module_that_starts_threads_is_refused_and_named(job, tmp_path, monkeypatch):
    (tmp_path / "busy_module.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    run = job()
    code, _, err = run.end(run.launch(1, "report", preload=["busy_module"]))
    assert code == 1 and "after the import of busy_module" in err and "2 threads" in err


def test_a_helper_that_an_import_starts_may_end(job, tmp_path, monkeypatch):
    """It is the warm parent's child and no trainer."""
    (tmp_path / "starts_helper.py").write_text(
        "import subprocess\nhelper = subprocess.Popen(['true'])\nhelper.wait()\n"
    )
    (tmp_path / "leaves_helper.py").write_text("import subprocess\nhelper = subprocess.Popen(['sleep', '0.1'])\n")
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    run = job()
    launch = run.launch(1, "train", preload=["starts_helper", "leaves_helper"])
    run.training(1)
    (warm,) = [event["pid"] for event in run.events("warm_started")]
    wait_for(lambda: len(psutil.Process(warm).children()) == 1, "the helper's reaping")
    run.finish()
    assert run.end(launch)[0] == 0 and run.events("warm_died") == []
    run.assert_nothing_left()


def test_a_trainer_that_cannot_begin_says_why(job, tmp_path, monkeypatch):
    """The folder the command was typed in is gone when the trainers are forked."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "removes_folder.py").write_text(f"import shutil\nshutil.rmtree({os.fspath(folder)!r})\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.getcwd()}")
    run = job()
    code, out, err = run.end(run.launch(2, "report", preload=["removes_folder"], folder=os.fspath(folder)))
    assert code == 1 and "FileNotFoundError" in out + err and os.fspath(folder) in out + err
    run.assert_nothing_left()


def test_a_start_that_is_refused_says_so_and_leaves_nothing(job):
    run = job()
    terms.make_run_dir(run.run_dir)
    (run.run_dir / "terms" / "1.beat").mkdir()
    code, _, err = run.end(run.launch(2, "report"))
    assert code == 2 and "cannot claim a term" in err and "Traceback" not in err
    run.assert_nothing_left()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_trainers_run_on_the_cores_of_their_slots(job):
    """srun and numactl bind each slot process to cores of its own; the agent has those of one of them."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    run = job()
    assert run.end(run.launch(2, "report", bind=[[first], [second]]))[0] == 0
    assert {note["rank"]: note["cores"] for note in run.notes("report")} == {0: [first], 1: [second]}


def test_two_jobs_at_once(job):
    runs = [job("a"), job("b")]
    launches = [run.launch(2, "train") for run in runs]
    for run in runs:
        run.training(2)
    runs[0].finish()
    assert runs[0].end(launches[0])[0] == 0
    runs[0].assert_nothing_left()
    assert len(runs[1].processes()) == 3 + 2 + 2  # launcher and slots, agent and warm parent, trainers
    runs[1].finish()
    assert runs[1].end(launches[1])[0] == 0


def test_two_starts_at_the_same_moment_are_one_job(job):
    run = job()
    launches = [run.launch(2, "train") for _ in range(2)]
    run.training(2)
    refused = wait_for(lambda: next((one for one in launches if one.poll() is not None), None), "the refusal of one")
    code, _, err = run.end(refused)
    assert code == 2 and "already running" in err
    run.finish()
    (other,) = [one for one in launches if one is not refused]
    assert run.end(other)[0] == 0
    assert len(run.notes("training")) == 2 and len(list((run.run_dir / "terms").glob("*.json"))) == 1
    run.assert_nothing_left()


def test_locks_that_a_file_server_keeps_do_not_stop_the_same_command(job):
    """Everything is killed at once, as by a loss of power; then each file that a start could have locked stays locked."""
    run = job()
    launch = run.launch(1, "train")
    run.training(1)
    agent = run.pid_of("agent")
    os.kill(agent, signal.SIGSTOP)  # so that it does not see its shims die, and end in order
    os.killpg(launch.pid, signal.SIGKILL)
    os.kill(agent, signal.SIGKILL)
    wait_for(lambda: not run.processes(), "the end of all processes")
    with held_locks(run.run_dir):
        again = run.launch(1, "train")
        run.training(1, term=2)
        assert not run.events("say"), "nothing is waited for: the process of the last term is gone"
        run.finish()
        code, _, err = run.end(again)
    assert code == 0, err
    run.assert_nothing_left()


def test_a_start_that_has_to_watch_the_last_holder_says_so(job):
    run = job()
    terms.make_run_dir(run.run_dir)
    (run.run_dir / "terms" / "1.json").write_text('{"term": 1, "machine": "h1", "pid": 7}')
    code, _, err = run.end(run.launch(1, "report", impatient=True))
    assert code == 0 and "checking for 0.3 s whether process 7 on h1 still lives" in err
    assert [note["term"] for note in run.notes("report")] == [2]


def test_an_agent_that_lost_its_term_ends_its_job_and_leaves_the_status_alone(job):
    run = job()
    launch = run.launch(1, "train")
    run.training(1)
    wait_for(lambda: read_status(run.run_dir).get("state") == "running", "the status")
    (run.run_dir / "terms" / "2.json").write_text('{"term": 2}')  # of a start on another machine
    code, _, err = run.end(launch)
    assert code == 2 and "another start took run_dir" in err
    assert read_status(run.run_dir)["state"] == "running"


def test_a_removed_arena_is_said(job):
    """As systemd-logind does at the last logout of a user."""
    run = job()
    launch = run.launch(1, "train")
    run.training(1)
    shutil.rmtree(run.arena)
    wait_for(lambda: run.events("say"), "a word of the agent")
    code, _, err = run.end(run.launch(1, "train"))  # it finds no agent, but must not become a second one
    assert code == 2 and "in use by the worker agent" in err
    run.finish()
    code, _, err = run.end(launch)
    assert code == 0 and "RemoveIPC" in err
    run.assert_nothing_left()


@pytest.mark.parametrize("full", [False, True], ids=["hangs", "full"])
def test_a_run_directory_that_cannot_be_written_holds_up_no_recovery(job, full):
    run = job()
    events = run.run_dir / "events" / f"agent-{os.uname().nodename}.jsonl"
    events.parent.mkdir(parents=True)
    events.symlink_to("/dev/full") if full else os.mkfifo(events)  # nobody reads it: its writer hangs
    launch = run.launch(2, "train")
    os.kill(run.training(2, generation=1)[0]["pid"], signal.SIGKILL)
    run.training(2, generation=2)
    run.finish()
    code, _, err = run.end(launch)
    assert code == 0 and "restarting all 2 trainers as generation 2" in err
    assert not full or f"run_dir is not writable: cannot write {events}: No space left on device" in err
    run.assert_nothing_left()


@pytest.mark.parametrize("another_machine_is_first", [False, True])
def test_a_removed_run_directory_is_a_new_run(job, another_machine_is_first):
    run = job()
    launch = run.launch(1, "train")
    run.training(1)
    stop(run.run_dir)
    run.end(launch)
    (run.arena / "old").touch()
    shutil.rmtree(run.run_dir)
    if another_machine_is_first:
        terms.make_run_dir(run.run_dir)
        terms.run_id(run.run_dir)
        terms.leave_term(run.run_dir, terms.claim_term(run.run_dir, {}))
    launch = run.launch(1, "train")
    assert "old" not in run.training(1, term=1 + another_machine_is_first)[0]["found"]
    run.finish()
    assert run.end(launch)[0] == 0


def test_resume_never_drops_the_snapshots_before_the_start_but_a_restart_goes_on(job):
    run = job()
    launch = run.launch(1, "train")
    run.training(1)
    stop(run.run_dir)
    run.end(launch)
    (run.arena / "old").touch()
    (run.run_dir / "die-0-1").touch()
    launch = run.launch(1, "train", resume="never")
    (second,) = run.training(1, term=2, generation=2)
    (first,) = run.notes("training", term=2, generation=1)
    assert (first["resume"], second["resume"]) == ("never", "auto")
    assert "old" not in first["found"]
    run.finish()
    assert run.end(launch)[0] == 0


def test_the_terminal_may_go_away(job):
    run = job()
    launch = run.launch(1, "train")
    run.training(1)
    launch.stdout.close()
    launch.stderr.close()
    with open(run.run_dir / "logs" / "rank-0.log", "a") as log:
        log.write("nobody reads this\n")
    run.finish()
    assert launch.wait(PATIENCE_S) == 0
    launch.stdout = launch.stderr = None
