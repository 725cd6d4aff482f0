"""What a user types on a cluster, on the lab's hosts: the real launcher, ssh, pdsh, and machines that fail."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.observe.errors import first_error
from gemini_gnn.observe.run_directory import read_losses
from tests.lab.lab import kill_group
from tests.lab.slurm import absent, slurm_up
from tests.trainers import trained

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """Settings of a small training: Cora where it is, else a synthetic graph."""
    cache = f"dataset.cache={tmp_path_factory.mktemp('cache')}"
    root = os.environ.get("GEMINI_GNN_DATA")
    if root and (Path(root) / "planetoid").is_dir():
        return ["dataset=cora", f"dataset.root={root}", cache]
    return ["dataset.nodes=2000", cache]


def train(lab, host, launcher, *settings, run_dir, environ=None, output=None):
    """Start a training from ``host``; what it prints goes to a file beside ``output``, or the run directory."""
    command = [*launcher, "launch/train.py", f"run_dir={run_dir}", "training.threads=1", *settings]
    output = open(f"{output or run_dir}-terminal.txt", "w")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", **(environ or {})}
    with output:
        return lab.popen(host, command, stdout=output, stderr=output, cwd=ROOT, env=environment)


def terminal(run_dir):
    return Path(f"{run_dir}-terminal.txt").read_text()


def ended(process, run_dir, timeout_s):
    """Exit code of the launcher, which must come within ``timeout_s``."""
    try:
        return process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the launcher hangs:\n{terminal(run_dir)[-6000:]}") from None
    finally:
        kill_group(process)
        process.wait(20)


def losses(run_dir):
    path = run_dir / "losses.csv"
    return [row[2] for row in read_losses(path)] if path.exists() else []


def wait_until(condition, run_dir, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain:\n{terminal(run_dir)[-6000:]}"
        time.sleep(0.05)


def nobody_trains(lab):
    return not any("launch/train.py" in line for name in lab.hosts for line in lab.processes(name))


# --- the same losses --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def losses_here(graph, tmp_path_factory):
    """Losses of four ranks on localhost."""
    return trained(4, tmp_path_factory.mktemp("here") / "run", *graph, "training.epochs=8")[0]


def test_hosts_give_the_losses_of_one_machine_bit_for_bit(lab, graph, losses_here, tmp_path):
    run_dir = tmp_path / "run"
    launcher = [*DEEPSPEED, "--hostfile", str(lab.hostfile(["h0", "h1"], slots=2))]
    if lab.has_ipv6("h0"):
        launcher += ["--master_addr", lab.address6("h0")]
    process = train(lab, "h0", launcher, *graph, "training.epochs=8", run_dir=run_dir)
    assert ended(process, run_dir, 180) == 0, terminal(run_dir)[-6000:]
    assert losses(run_dir) == losses_here
    for rank in range(4):
        assert f"--- rank {rank} on h{rank // 2}," in (run_dir / "logs" / f"rank-{rank}.log").read_text()
    assert terminal(run_dir).count("done: test accuracy") == 1, "rank 0 speaks, and only rank 0"


def test_srun_gives_the_losses_of_one_machine_bit_for_bit(lab, graph, losses_here, tmp_path):
    """No hostfile, no ssh: a real SLURM between two hosts starts the ranks, and its variables say who they are. One is killed."""
    if reason := absent():
        pytest.skip(reason)
    conf = slurm_up(lab, tmp_path, ["h0", "h1"])

    command = ["salloc", "-N", "2", PYTHON, "launch/doctor.py", f"run_dir={tmp_path}"]
    examined = lab.run("h0", command, 120, cwd=ROOT, env={**os.environ, **conf, "DS_ACCELERATOR": "cpu"})
    assert examined.returncode == 0, examined.stdout
    assert "asking 2 machines (srun)" in examined.stdout and "over 2 ranks with gloo" in examined.stdout

    run_dir = tmp_path / "run"
    launcher = ["srun", "-N", "2", "--ntasks-per-node", "2", PYTHON]
    killed = "faults.at=[kill-rank 3 @ step 5]"
    process = train(lab, "h0", launcher, *graph, "training.epochs=8", killed, run_dir=run_dir, environ=conf)
    assert ended(process, run_dir, 180) == 0, terminal(run_dir)[-6000:]
    assert losses(run_dir) == losses_here
    assert "restarting all 4 trainers as generation 2" in terminal(run_dir)
    for rank in range(4):
        assert f"--- rank {rank} on h{rank // 2}," in (run_dir / "logs" / f"rank-{rank}.log").read_text()
    assert nobody_trains(lab)


# --- failures ---------------------------------------------------------------------------------------------------------


def test_the_error_of_one_rank_ends_the_job_everywhere(lab, graph, tmp_path):
    run_dir = tmp_path / "run"
    launcher = [PYTHON, "launch/hosts.py", "run", str(lab.hostfile(["h2", "h3"]))]
    fault = ["faults.allow=true", "faults.at=raise-rank 1 @ step 6"]
    process = train(lab, "h0", launcher, *graph, "training.epochs=100000", *fault, run_dir=run_dir)
    wait_until(lambda: first_error(run_dir) is not None or process.poll() is not None, run_dir)
    assert ended(process, run_dir, 30) == 1, "the job ends everywhere within seconds, with the code of its first error"
    assert (
        first_error(run_dir)
        == "rank 1 on h3: InjectedFault: injected fault: raise-rank 1 @ step 6, in sampling of step 6"
    )
    said = terminal(run_dir)
    assert "InjectedFault: injected fault: raise-rank 1 @ step 6, in sampling of step 6" in said
    assert "failed: rank 1 on h3: Traceback" in said
    assert "Connection closed by peer" not in said, "what the survivors see is in their logs"
    assert nobody_trains(lab)


def test_a_machine_that_loses_power_is_named_and_the_launcher_ends(lab, graph, tmp_path):
    """A bare launcher, whose ssh would wait for ever. And, while the job runs, its run directory is refused to a second."""
    run_dir = tmp_path / "run"
    launcher = [*DEEPSPEED, "--hostfile", str(lab.hostfile(["h0", "h1"], slots=2))]
    settings = [*graph, "training.epochs=100000", "recovery.silence_s=2", "recovery.wait_s=5"]
    process = train(lab, "h0", launcher, *settings, run_dir=run_dir)
    wait_until(lambda: len(losses(run_dir)) > 5 or process.poll() is not None, run_dir)
    assert process.poll() is None, terminal(run_dir)[-6000:]

    again = [PYTHON, "launch/train.py", f"run_dir={run_dir}", "training.threads=1", *settings]
    second = lab.run("h3", again, 60, cwd=ROOT)
    assert second.returncode == 2 and "is in use by" in second.stdout and "on h0" in second.stdout

    lab.power_off("h1")
    # 2 s of silence, 5 s until it is given up, 11 s until the launcher's ssh is ended; the rest is load
    assert ended(process, run_dir, 60) != 0
    said = terminal(run_dir)
    assert "the worker agent on h1 (ranks 2, 3) is silent for 2." in said, said[-6000:]
    assert "h1 (ranks 2, 3) did not come back within 5 s (recovery.wait_s)" in said and "ssh NAME true" in said
    assert "nothing of this job runs on h1: ended the launcher's ssh, which waited for it" in said
    assert nobody_trains(lab)


@pytest.mark.long
def test_everything_is_killed_and_the_command_typed_again(lab, graph, losses_here, tmp_path):
    """With the hosts in another order. Each shard is only on the other machine then, and in no checkpoint: it is fetched."""
    run_dir = tmp_path / "run"
    launcher = [PYTHON, "launch/hosts.py", "run", str(lab.hostfile(["h0", "h1"], slots=2))]
    swapped = [PYTHON, "launch/hosts.py", "run", str(lab.hostfile(["h1", "h0"], slots=2))]
    settings = [*graph, "training.epochs=8", "snapshot.replicas=1", "snapshot.persist_every=never"]
    fault = ["faults.allow=true", "faults.at=hang-collective 1 @ step 6"]
    first = train(lab, "h0", launcher, *settings, *fault, run_dir=run_dir)
    wait_until(lambda: len(losses(run_dir)) == 5 or first.poll() is not None, run_dir)
    for host in ("h0", "h1"):
        lab.run(host, ["pkill", "-9", "-f", str(run_dir)])
    assert ended(first, run_dir, 90) != 0
    assert len(losses(run_dir)) == 5 < len(losses_here)
    again = train(lab, "h0", swapped, *settings, "resume=must", run_dir=run_dir)
    assert ended(again, run_dir, 90) == 0, terminal(run_dir)[-6000:]
    (step,) = re.findall(r"going on after step (\d+)", terminal(run_dir))
    assert int(step) >= 4, "the snapshot of the last step may have been under way"
    assert losses(run_dir) == losses_here
    for host in ("h0", "h1"):
        assert lab.run(host, ["ls", "/dev/shm"]).stdout == "", "also what was kept of the other's ranks"
    third = train(lab, "h0", launcher, *settings, run_dir=run_dir)
    assert ended(third, run_dir, 60) == 2, "both machines refuse at once; neither waits for the other"
    assert terminal(run_dir).count("holds a finished run (result.json)") == 2


@pytest.mark.long
def test_a_machine_that_dies_while_the_job_starts_is_named(lab, graph, tmp_path):
    """Started from a machine that is not of the job: here the launcher's own ssh has to give up."""
    run_dir = tmp_path / "run"
    launcher = [PYTHON, "launch/hosts.py", "run", str(lab.hostfile(["h0", "h3"]))]
    process = train(lab, "h1", launcher, *graph, "distributed.start_timeout_s=3", run_dir=run_dir)

    def starts():
        return any("launch/train.py" in line for line in lab.processes("h3"))

    wait_until(lambda: starts() or process.poll() is not None, run_dir)
    lab.power_off("h3")
    assert ended(process, run_dir, 90) != 0
    said = terminal(run_dir)
    assert "machine 2 in the order of the hostfile (rank 1) did not come within 3 s" in said or (
        "h3 (rank 1) did not come" in said
    ), said[-6000:]
    assert nobody_trains(lab)
    checked = lab.run("h0", [PYTHON, "launch/hosts.py", "check", str(lab.hostfile(["h0", "h3"]))], 60, cwd=ROOT)
    assert checked.returncode == 1 and "bad: h3; type what stands beside it" in checked.stdout
    assert "ssh -v h3 true" in checked.stdout
    begun = lab.run("h0", [*launcher, "launch/train.py", f"run_dir={run_dir}"], 60, cwd=ROOT)
    assert begun.returncode == 2 and "1 of 2 hosts cannot take part: h3; see the table" in begun.stdout


def test_the_job_outlives_the_machine_that_launched_it(lab, graph, tmp_path):
    run_dir = tmp_path / "run"
    launcher = [*DEEPSPEED, "--hostfile", str(lab.hostfile(["h1", "h2"]))]
    process = train(lab, "h0", launcher, *graph, "training.epochs=150", "evaluation.every=25", run_dir=run_dir)
    wait_until(lambda: len(losses(run_dir)) > 5 or process.poll() is not None, run_dir)
    assert process.poll() is None, terminal(run_dir)[-6000:]
    lab.power_off("h0")
    assert not (run_dir / "result.json").exists()
    wait_until(lambda: (run_dir / "result.json").exists(), run_dir)
    wait_until(lambda: nobody_trains(lab), run_dir)
    ended(process, run_dir, 20)


def test_a_name_that_means_loopback_on_its_own_machine(lab, graph, tmp_path):
    """As Debian writes it into /etc/hosts: found out before anything waits."""
    run_dir = tmp_path / "run"
    environ = {
        **{"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CROSS_SIZE": "2"},
        **{"MASTER_ADDR": "localhost.localdomain", "MASTER_PORT": "29511"},
    }
    lab.run("h1", ["sh", "-c", "cp /etc/hosts /run/hosts; echo 127.0.1.1 localhost.localdomain >> /run/hosts; "
                   "mount --bind /run/hosts /etc/hosts"])  # fmt: skip
    process = train(lab, "h1", [PYTHON], *graph, run_dir=run_dir, environ=environ)
    assert ended(process, run_dir, 60) == 2
    assert "MASTER_ADDR=localhost.localdomain, which is loopback (127.0.1.1) on h1" in terminal(run_dir)
    lab.power_off("h1")  # the changed file goes with it
