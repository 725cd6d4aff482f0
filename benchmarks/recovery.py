"""What each kind of failure costs, beside a plain DeepSpeed job that is typed again and resumes from its checkpoint.

    python benchmarks/recovery.py [--rounds 5] [--only trainer,checkpoint]
    python benchmarks/recovery.py --all            # also by bytes of state, and what the agents cost; 50 minutes
    python benchmarks/recovery.py --all --quick    # the same, small and once

Two ranks on this machine, a job for each failure:

    trainer         one trainer killed; the worker agent forks new ones
    trainers        both killed
    hang            one stops in a collective; counted from when it is found (recovery.hang_floor_s=1, hang_factor=3)
    agent           the worker agent killed, which takes its trainers with it
    retyped         everything killed (launcher, agent, trainers), and the command typed again at once
    checkpoint      plain_deepspeed.py: the same, from DeepSpeed's checkpoint every `--every` steps

Four hosts of one rank and two standbys in the lab (docs/lab.md; root on Linux), links of 1 Gbit/s. All these failures happen
to one job, one after the other; each when the job has all its copies again and a standby is ready:

    lab-trainer     the trainer of rank 1 killed
    lab-agent       the worker agent of rank 1 killed
    lab-root        the root agent killed
    lab-hang        the trainer of rank 1 stopped (SIGSTOP); counted from when it is found (recovery.hang_floor_s=2)
    lab-link        the host of rank 3 cut off for 3 s: a standby takes its place, and it comes back as a standby
    lab-machine     the host of rank 2 without power
    lab-machine-root    the host of the root, of rank 0 and of the launcher without power

    lab-checkpoint      plain_deepspeed.py, checkpoints on the lab's network file system: the trainer of rank 1 killed, and
                        the command typed again as soon as it has ended
    lab-checkpoint-lost     the same: h2 without power. Nobody waits for a timeout: the rest of the job is killed at once, and
                        the command typed again with another host in its place

`--all` then loses two machines with more state per rank, at 1 and at 10 Gbit/s, beside the same with checkpoints. It compares:

    retrieve        to get the state back: the parts "ready" and "restore"
    recovery        from the loss to the first new step. Of the baseline from the loss too, which it sees at once
    wasted          GEMINI's wasted time: a snapshot on its way, half an interval of steps, and the recovery. An interval of
                    ours is measured; its copy takes an interval at most. That of checkpoints is the best there is for their
                    measured cost (Young, Daly), if the job fails every `--mtbf` seconds
    goodput         the share of time that is progress, with that; also without the pauses for checkpoints, and without
                    the throughput that our snapshots cost beside the steps between two checkpoints

Last come the memory of snapshots on a host, and the CPU time of agents and replicators in a job without traffic.

Each is a real `deepspeed` job, in turns. Time runs from the failure to the end of the first step that had not been done before,
by the clock of the events of rank 0. Beside it stand the parts that the root has noted (docs/recovery.md). Their sum leaves
out the time until a death is seen, and the last of the step, from its update to its event. A silent machine counts from its
last word on, which is up to a heartbeat before the loss. The losses of every run must be those of an undisturbed one, bit for
bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import ROOT, cpu_of, machine, median, pace, write

from gemini_gnn.cluster.hosts import random_port
from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.files import read_record
from gemini_gnn.observe.failures import read_failures
from gemini_gnn.observe.run_directory import read_losses
from gemini_gnn.observe.status import ENDED, read_status
from gemini_gnn.observe.waterfall import Bar, draw_waterfall
from gemini_gnn.recovery import home
from gemini_gnn.snapshot.replicas.simulation import best_interval_s

HERE = ("training.epochs=40", "evaluation.every=10")
LAB = ("dataset.nodes=2000", "training.epochs=240", "evaluation.every=50")
TIMES_FASTER = 15.0  # than the peer: the goal
WASTED_TIMES = 13.0  # less than the peer
LOST = 0.01  # of throughput, at most
IDLE_CPU = 0.02  # of a core, at most
SILENCE_S = 1.5  # recovery.silence_s
CUT_S = 3.0  # of lab-link
CALM_STEPS = 10  # between two failures of a job, at least
STANDBYS = 2
TRAINER = 7  # times the bytes of a rank's state that its trainer takes in all: see replication.py
SLOTS = 5  # and its snapshots in the memory of two hosts
LONGEST_S = 2.5  # of a bar in the picture
END_S = 300.0  # until a job has ended
RELAUNCHED = ("old command ends", "launcher, imports, join", "restore", "first step", "steps again")


def nobody(_run_dir: Path, _lab: Any) -> list[int]:
    return []


@dataclass(frozen=True)
class Row:
    """One kind of failure.

    Attributes:
        what: it is, in the picture.
        victims: the pids to kill, of a job (run directory) on a lab (None: on this machine).
        signal: that they get. host: of a job on a lab, that loses its power. cut: its link is cut instead, for CUT_S.
        goal_s: of the seconds that count; None: no goal.
        peer: the row that it is compared with.
        typed: the command is typed again: "at once", or "when it has ended" by itself. "": it is not.
        settings: of the job, with the fields {at} (the step that fails), {every} and {folder} (of checkpoints).
        script: of the job.
    """

    what: str
    victims: Callable[[Path, Any], list[int]] = nobody
    goal_s: float | None = None
    peer: str = ""
    typed: str = ""
    settings: tuple[str, ...] = ()
    script: str = "launch/train.py"
    signal: int = signal.SIGKILL
    host: Callable[[Path], str] | None = None
    cut: bool = False


# --- what was measured: pure ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One failure.

    Attributes:
        seconds: from the failure to the first new step, from outside.
        counted_s: of these, those that the goal is about.
        again: steps done again.
        parts: of ``seconds``, by name.
    """

    seconds: float
    counted_s: float
    again: int
    parts: dict[str, float]


def resumed(events: Sequence[Mapping[str, Any]], known: int) -> tuple[list[float], int]:
    """When rank 0's last trainer met the others, had restored, had done its first and its first new step; steps done again.

    Args:
        events: of rank 0.
        known: steps that were done before, beside those in ``events``: the last event of a killed trainer may be lost.
    """
    last = max(i for i, event in enumerate(events) if event["kind"] == "start")
    before = max([known, *(event["step"] for event in events[:last] if event["kind"] == "step")])
    steps = [event for event in events[last:] if event["kind"] == "step"]
    restored = next(event["t"] for event in events[last:] if event["kind"] in ("restored", "first_snapshot"))
    first_new = next(event["t"] for event in steps if event["step"] > before)
    return [events[last]["t"], restored, steps[0]["t"], first_new], before - steps[0]["step"] + 1


def parts_of(failures: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The root's parts of what happened, summed: a failure during a recovery has a record of its own."""
    names = dict.fromkeys(name for failure in failures for name in failure["parts"])
    return {
        name.removesuffix("_s").replace("_", " "): sum(failure["parts"][name] for failure in failures) for name in names
    }


@dataclass(frozen=True)
class Sized:
    """What losing a machine costs with so much state: medians of nothing, one run.

    Attributes:
        nbytes: of state per rank. rate: of the links.
        step_s: a step, with snapshots or between checkpoints.
        pause_s: that training waits for each. interval_s: of work between two.
        ready_s: from one's beginning until it can be restored.
        retrieve_s: part of ``recovery_s``, from the loss to the first new step.
        again: steps that were done again.
    """

    nbytes: int
    rate: str
    step_s: float
    pause_s: float
    interval_s: float
    ready_s: float
    retrieve_s: float
    recovery_s: float
    again: int
    parts: dict[str, float]

    @property
    def wasted_s(self) -> float:
        return self.ready_s + self.interval_s / 2 + self.recovery_s

    def goodput(self, mtbf_s: float, lost: float = 0.0) -> float:
        """The share of time that is progress; ``lost``: of throughput, to what goes on beside the steps."""
        return self.interval_s / (self.interval_s + self.pause_s) * (1 - lost) * max(0.0, 1 - self.wasted_s / mtbf_s)


def pauses(times: Sequence[float], every: int) -> tuple[float, float]:
    """The time of a step, and of the checkpoint that follows every ``every``-th one.

    Args:
        times: at which successive steps ended; whole rounds of ``every`` steps, wherever these begin.
    """
    gaps = [b - a for a, b in pairwise(times)]
    step_s = median(gaps)
    return step_s, max(0.0, (sum(gaps) - step_s * len(gaps)) / (len(gaps) / every))


def fits(nbytes: int, room: int) -> str:
    """Why so many bytes of state per rank do not fit into ``room``; "": they do."""
    needed = 4 * (TRAINER + SLOTS) * nbytes
    if needed <= room:
        return ""
    return (
        f"{nbytes / 1e6:.0f} MB per rank on 4 hosts need {needed / 1e9:.0f} GB of memory, {room / 1e9:.0f} GB are free"
    )


def verdict(row: Row, counted_s: float, parts: Mapping[str, float], peer_s: float | None) -> str:
    """The goals of ``row`` in words, and the part that takes most where one is missed."""
    said, missed = [], False
    if row.goal_s is not None:
        missed |= counted_s > row.goal_s
        said.append(f"goal <= {row.goal_s:.2f} s{' MISSED' if counted_s > row.goal_s else ''}")
    if row.goal_s is not None and peer_s is not None:
        missed |= peer_s < TIMES_FASTER * counted_s
        said.append(
            f"{peer_s / counted_s:.1f}x (goal {TIMES_FASTER:.0f}x{' MISSED' if peer_s < TIMES_FASTER * counted_s else ''})"
        )
    if missed and parts:
        worst = max(parts, key=lambda name: parts[name])
        said.append(f"most of it: {worst} {parts[worst]:.2f} s")
    return ", ".join(said)


def medians(runs: Sequence[Measured]) -> dict[str, float]:
    names = dict.fromkeys(name for run in runs for name in run.parts)
    return {name: median(run.parts.get(name, 0.0) for run in runs) for name in names}


# --- a job and its processes ------------------------------------------------------------------------------------------


def start(
    run_dir: Path, lab: Any, script: str, settings: Sequence[str], hosts: Sequence[str] = ("h0", "h1", "h2", "h3")
) -> subprocess.Popen[bytes]:
    """Type the command: here on two ranks, or on the first of ``hosts`` of ``lab`` for all of them."""
    where = ["--num_accelerators", "2"]
    if lab is not None:
        where = ["--hostfile", str(lab.hostfile(hosts))]
        settings = ["training.threads=1", *settings]
    port = str(random_port())  # that of a job just killed may not be free again
    command = [*DEEPSPEED, *where, "--master_port", port, script, f"run_dir={run_dir}", "logger=quiet", *settings]
    options: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, "DS_ACCELERATOR": "cpu"}}
    with open(f"{run_dir}.log", "ab") as log:
        options |= {"stdout": log, "stderr": log}
        if lab is not None:
            return lab.popen(hosts[0], command, **options)
        return subprocess.Popen(command, start_new_session=True, **options)


def processes(run_dir: Path) -> dict[int, list[str]]:
    """Command lines of the living processes that name this job, on all hosts of the lab too."""
    found, marks = {}, (str(run_dir), home.job_id(run_dir))
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if any(mark in word for word in words for mark in marks):
                    found[int(entry.name)] = words
        except OSError:
            continue
    return found


def on(machine: str, pids: Mapping[int, Any], lab: Any) -> dict[int, int]:
    """Of ``pids``, those on ``machine``: by the number that a process has there."""
    first = "self" if lab is None else lab.hosts[machine].pid
    namespace, found = os.readlink(f"/proc/{first}/ns/pid"), {}
    for pid in pids:
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                status = Path(f"/proc/{pid}/status").read_text()
                line = next(line for line in status.splitlines() if line.startswith("NSpid:"))
                found[int(line.split()[-1])] = pid
        except OSError:
            continue
    return found


def kill(pids: Sequence[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def events(run_dir: Path, rank: int = 0) -> list[dict]:
    path = run_dir / "events" / f"rank-{rank}.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def started_last(run_dir: Path, rank: int) -> dict[str, Any]:
    return [event for event in events(run_dir, rank) if event["kind"] == "start"][-1]


def trainer(run_dir: Path, rank: int, lab: Any) -> int:
    started = started_last(run_dir, rank)
    return on(started["machine"], processes(run_dir), lab)[started["pid"]]


def agent(run_dir: Path, host: str, lab: Any) -> int:
    agents = {pid: words for pid, words in processes(run_dir).items() if "gemini_gnn.recovery.worker.agent" in words}
    (pid,) = on(host, agents, lab).values()
    return pid


def steps(run_dir: Path) -> int:
    path = run_dir / "losses.csv"
    return len(read_losses(path)) if path.exists() else 0


def said(run_dir: Path) -> str:
    """The end of a job's output: its folder is removed with us."""
    return Path(f"{run_dir}.log").read_text()[-3000:]


# --- failures ---------------------------------------------------------------------------------------------------------


def everything(run_dir: Path, _lab: Any) -> list[int]:
    return list(processes(run_dir))


def trainers(*ranks: int) -> Callable[[Path, Any], list[int]]:
    return lambda run_dir, lab: [trainer(run_dir, rank, lab) for rank in ranks]


def host_of(rank: int) -> Callable[[Path], str]:
    return lambda run_dir: started_last(run_dir, rank)["machine"]


def host_of_root(run_dir: Path) -> str:
    return read_status(run_dir)["machine"]


def agent_on(host: Callable[[Path], str]) -> Callable[[Path, Any], list[int]]:
    return lambda run_dir, lab: [agent(run_dir, host(run_dir), lab)]


PLAIN = "benchmarks/plain_deepspeed.py"
NFS = ("snapshot=nfs", "snapshot.nfs_every={every}")
HANGS = (
    "recovery.hang_floor_s=1",
    "recovery.hang_factor=3",
    "faults.allow=true",
    "faults.at=[hang-collective 1 @ step {at}]",
)
ROWS = {
    "trainer": Row("2 ranks: a trainer killed", trainers(1), 0.30, "checkpoint"),
    "trainers": Row("2 ranks: both trainers killed", trainers(0, 1), 0.30, "checkpoint"),
    "hang": Row("2 ranks: a trainer hangs", nobody, 0.30, "checkpoint", settings=HANGS),
    "agent": Row("2 ranks: the agent killed", agent_on(host_of(0)), 2.30, "checkpoint"),
    "retyped": Row("2 ranks: all killed, typed again", everything, None, "checkpoint", "at once"),
    "checkpoint": Row("2 ranks: plain DeepSpeed, typed again", everything, typed="at once", settings=NFS, script=PLAIN),
    "lab-trainer": Row("4 hosts: a trainer killed", trainers(1), 1.0, "lab-checkpoint"),
    "lab-agent": Row("4 hosts: an agent killed", agent_on(host_of(1)), 3.0, "lab-checkpoint"),
    "lab-root": Row("4 hosts: the root agent killed", agent_on(host_of_root), 3.0, "lab-checkpoint"),
    "lab-hang": Row("4 hosts: a trainer stopped", trainers(1), 1.0, "lab-checkpoint", signal=signal.SIGSTOP),
    "lab-link": Row(
        "4 hosts: a link cut for 3 s, a standby",
        nobody,
        SILENCE_S + 1.0,
        "lab-checkpoint-lost",
        host=host_of(3),
        cut=True,
    ),
    "lab-machine": Row(
        "4 hosts: a machine lost, a standby", nobody, SILENCE_S + 1.0, "lab-checkpoint-lost", host=host_of(2)
    ),
    "lab-machine-root": Row(
        "4 hosts: the root's machine lost, a standby", nobody, SILENCE_S + 2.0, "lab-checkpoint-lost", host=host_of_root
    ),
    "lab-checkpoint": Row(
        "4 hosts: plain DeepSpeed, typed again",
        trainers(1),
        typed="when it has ended",
        settings=(*NFS, "snapshot.folder={folder}"),
        script=PLAIN,
    ),
    "lab-checkpoint-lost": Row(
        "4 hosts: plain DeepSpeed, a machine lost",
        typed="at once",
        settings=(*NFS, "snapshot.folder={folder}"),
        script=PLAIN,
        host=host_of(2),
    ),
}


@contextlib.contextmanager
def job_of(
    run_dir: Path, lab: Any, script: str, settings: Sequence[str], hosts: Sequence[str] = ("h0", "h1", "h2", "h3")
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A job; the last of the processes is the launcher. All of the job is gone at the end, and all hosts are there again."""
    jobs = [start(run_dir, lab, script, settings, hosts)]
    try:
        yield jobs
    finally:
        kill(everything(run_dir, lab))
        for job in jobs:
            job.wait(30)
        if lab is None:
            shutil.rmtree(home.arena_of(run_dir), ignore_errors=True)  # of a job that failed
        else:
            restored(lab, run_dir)


def restored(lab: Any, run_dir: Path) -> None:
    """All hosts on and connected, without what the job has left in their memory."""
    for name, host in list(lab.hosts.items()):
        if not host.link:
            lab.link(name, True)
        lab.power_on(name)
        if name != "nas":
            lab.run(name, ["rm", "-rf", str(home.arena_of(run_dir))])


def until(ready: Callable[[], Any], run_dir: Path, what: str, job: Any = None, limit_s: float = END_S) -> Any:
    """What ``ready`` says when it is true.

    Args:
        job: that may not end meanwhile.
    """
    deadline = time.monotonic() + limit_s
    while not (found := ready()):
        if time.monotonic() > deadline or (job is not None and job.poll() is not None):
            raise SystemExit(f"{run_dir.name}: no {what}\n{said(run_dir)}")
        time.sleep(0.01)
    return found


def came_back(run_dir: Path, known: int, starts: int) -> tuple[list[float], int] | None:
    """See :func:`resumed`; None: no step that is not ``known`` was done by a trainer that started after ``starts`` others."""
    found = events(run_dir)
    if sum(event["kind"] == "start" for event in found) <= starts:
        return None
    with contextlib.suppress(StopIteration):  # it is on the way
        return resumed(found, known)
    return None


def count_starts(run_dir: Path) -> int:
    return sum(event["kind"] == "start" for event in events(run_dir))


def is_healthy(run_dir: Path, standbys: int) -> bool:
    """All copies are there again, trainers of the newest generation step, and so many standbys are ready."""
    status = read_status(run_dir)
    recoverable = status.get("recoverable") or [0, 0, 0]
    spare = [one for one in status.get("machines", []) if not one.get("ranks") and one.get("here") and one.get("ready")]
    return (
        status.get("state") == "running"
        and not status.get("recovers_from")
        and recoverable[:2] == [status["term"], status["generation"]]
        and len(spare) >= standbys
    )


def harm(row: Row, run_dir: Path, lab: Any) -> None:
    if row.host is None:
        kill(row.victims(run_dir, lab), row.signal)
    elif row.cut:
        lab.link(row.host(run_dir), False)
    else:
        lab.power_off(row.host(run_dir))


def one_failure(row: Row, run_dir: Path, lab: Any) -> Measured:
    """Of a living job with standbys, which goes on by itself."""
    noted, starts, host = len(read_failures(run_dir)), count_starts(run_dir), row.host(run_dir) if row.host else ""
    failed = time.time()
    harm(row, run_dir, lab)
    known = steps(run_dir)
    moments, again = until(lambda: came_back(run_dir, known, starts), run_dir, f"new step after: {row.what}")
    until(lambda: len(read_failures(run_dir)) > noted, run_dir, f"record of: {row.what}")
    if row.cut:
        time.sleep(max(0.0, failed + CUT_S - time.time()))
        lab.link(host, True)
    parts = parts_of(read_failures(run_dir)[noted:])
    seconds = moments[-1] - failed
    found_s = sum(parts.values()) - parts["detect"] - parts["decide"]  # since it was found
    return Measured(seconds, found_s if row.signal == signal.SIGSTOP else seconds, again, parts)


def all_failures(names: Sequence[str], run_dir: Path, lab: Any) -> dict[str, Measured]:
    """One job, to which they all happen in turn, and that ends."""
    hosts = [f"h{i}" for i in range(4 + STANDBYS)]
    settings = [*LAB, f"recovery.standby_machines={STANDBYS}", "recovery.hang_floor_s=2"]
    found = {}
    with job_of(run_dir, lab, "launch/train.py", settings, hosts):
        for name in names:
            calm, spare = steps(run_dir) + CALM_STEPS, int(ROWS[name].host is not None)
            until(lambda at=calm: steps(run_dir) >= at, run_dir, f"step before {name}")
            until(lambda need=spare: is_healthy(run_dir, need), run_dir, f"health before {name}")
            found[name] = one_failure(ROWS[name], run_dir, lab)
        # Not the launcher: it waits for a lost host, or is lost itself.
        until(lambda: read_status(run_dir).get("state") in ENDED, run_dir, "end")
        if (state := read_status(run_dir)["state"]) != "done":
            raise SystemExit(f"{run_dir.name}: {state}\n{said(run_dir)}")
    return found


def typed_again(row: Row, run_dir: Path, lab: Any, jobs: list, settings: Sequence[str], hosts: list[str]) -> Measured:
    """Of a living job that is killed, or ends by itself, and whose command is typed again on the hosts that are left."""
    starts, lost = count_starts(run_dir), row.host(run_dir) if row.host else ""
    failed = time.time()
    harm(row, run_dir, lab)
    known = steps(run_dir)
    if row.typed == "at once":
        kill(everything(run_dir, lab))  # what was started in the meantime
    jobs[-1].wait(END_S)
    ended = time.time()
    if lost:  # another host takes its place
        hosts[:] = [hosts[-1] if host == lost else host for host in hosts[:-1]]
    jobs.append(start(run_dir, lab, row.script, settings, hosts[:4]))
    moments, again = until(lambda: came_back(run_dir, known, starts), run_dir, f"new step after: {row.what}", jobs[-1])
    spans = zip(RELAUNCHED, [failed, ended, *moments], [ended, *moments], strict=False)
    seconds = moments[-1] - failed
    return Measured(seconds, seconds, again, {part: end - begin for part, begin, end in spans})


def disturbed(name: str, run_dir: Path, lab: Any, at: int, every: int) -> Measured:
    """Run the job of row ``name``, let it fail after step ``at``, and see it to its end."""
    row = ROWS[name]
    folder = lab.folder / "nfs" / run_dir.name if lab is not None else run_dir
    settings = [setting.format(at=at + 1, every=every, folder=folder) for setting in row.settings]
    settings = [*(HERE if lab is None else LAB), *settings]
    hosts = [f"h{i}" for i in range(5)]
    with job_of(run_dir, lab, row.script, settings) as jobs:
        until(lambda: steps(run_dir) >= at, run_dir, f"step {at}", jobs[-1])
        if row.typed:
            one = typed_again(row, run_dir, lab, jobs, settings, hosts)
        else:
            failed = time.time()
            harm(row, run_dir, lab)
            known = steps(run_dir)
        if jobs[-1].wait(END_S) != 0:
            raise SystemExit(f"{name}: the job failed after the failure\n{said(run_dir)}")
    if row.typed:
        return one
    if name == "hang":
        (file,) = (file for file in (run_dir / "faults").iterdir() if file.name != "begun")
        failed = read_record(file)["time"]
    moments, again = resumed(events(run_dir), known)
    parts, seconds = parts_of(read_failures(run_dir)), moments[-1] - failed
    return Measured(seconds, seconds - (parts["detect"] + parts["decide"] if name == "hang" else 0.0), again, parts)


def losses_of(run_dir: Path, lab: Any) -> list:
    """Of a run that nothing happens to."""
    with job_of(run_dir, lab, "launch/train.py", [*(HERE if lab is None else LAB), "snapshot=none"]) as (job,):
        if job.wait(END_S) != 0:
            raise SystemExit(said(run_dir))
    return read_losses(run_dir / "losses.csv")


def measure(names: Sequence[str], folder: Path, lab: Any, rounds: int, every: int) -> dict[str, list[Measured]]:
    """Rows ``names``, all of one place, in turns."""
    found: dict[str, list[Measured]] = {name: [] for name in names}
    expected = losses_of(folder / f"calm-{'here' if lab is None else 'lab'}", lab)
    at = len(expected) // 2 // every * every + every // 2  # between two checkpoints: what a failure costs on average
    together = [name for name in names if lab is not None and not ROWS[name].typed]

    def keep(name: str, one: Measured, run_dir: Path) -> None:
        if read_losses(run_dir / "losses.csv") != expected:
            raise SystemExit(f"{name}: losses differ from those of the undisturbed run")
        found[name].append(one)
        print(
            f"  {name:<19} {one.seconds:6.2f} s; parts {sum(one.parts.values()):.3f} s, "
            f"{one.seconds - sum(one.parts.values()):+.3f} s outside of them; {one.again} steps done again, "
            "losses bit-identical",
            flush=True,
        )

    for i in range(rounds):
        print(f"round {i + 1} of {rounds}", flush=True)
        if together:
            run_dir = folder / f"together-{i:02}"
            for name, one in all_failures(together, run_dir, lab).items():
                keep(name, one, run_dir)
        for name in (name for name in names if name not in together):
            run_dir = folder / f"{name}-{i:02}"
            keep(name, disturbed(name, run_dir, lab, at, every), run_dir)
    return found


# --- by bytes of state ------------------------------------------------------------------------------------------------


def wide(nbytes: int, compute_s: float) -> list[str]:
    """Settings of a job with so much state per rank: masters and two moments, cut in 4."""
    os.environ["PYTHONPATH"] = str(ROOT / "benchmarks")
    model = ["model._target_=wide.Wide", f"model.kwargs.parameters={nbytes // 12 * 4}", "model.kwargs.busy=false"]
    forever = ["training.epochs=100000", "evaluation.every=100000", "snapshot.persist_every=never"]
    return ["dataset.nodes=2000", "deepspeed=zero1", *model, f"model.kwargs.compute_s={compute_s}", *forever]


def limit(lab: Any, rate: str) -> None:
    for host in lab.hosts:
        if lab.is_on(host):
            lab.bandwidth(host, rate)


def calm_steps(run_dir: Path, many: int) -> list[dict]:
    """The events of the next ``many`` steps and the one before them."""
    begin = steps(run_dir) + 1
    until(lambda: steps(run_dir) > begin + many, run_dir, f"step {begin + many}")
    return [one for one in events(run_dir) if one["kind"] == "step" and begin <= one["step"] <= begin + many]


def sized_ours(lab: Any, nbytes: int, options: argparse.Namespace, run_dir: Path) -> tuple[list[Sized], int]:
    """A machine lost at each rate, of one job; and the bytes of snapshots on a host."""
    settings = [*wide(nbytes, options.compute), f"recovery.standby_machines={len(options.rates)}"]
    found = []
    with job_of(run_dir, lab, "launch/train.py", settings, [f"h{i}" for i in range(4 + len(options.rates))]):
        for rate, rank in zip(options.rates, (2, 1), strict=False):  # of two replica groups
            limit(lab, rate)
            until(lambda: steps(run_dir) > 0 and is_healthy(run_dir, 1), run_dir, "health")
            seen = calm_steps(run_dir, options.steps)
            step_s, every = pace(seen, seen[0]["step"])
            held = max(one.get("memory_bytes") or 0 for one in read_status(run_dir)["machines"])
            one = one_failure(Row(f"machine of rank {rank} lost", host=host_of(rank)), run_dir, lab)
            retrieve_s, interval_s = one.parts["ready"] + one.parts["restore"], step_s * every
            found.append(
                Sized(nbytes, rate, step_s, 0.0, interval_s, interval_s, retrieve_s, one.seconds, one.again, one.parts)
            )
    return found, held


def sized_checkpoints(lab: Any, nbytes: int, options: argparse.Namespace, run_dir: Path) -> list[Sized]:
    """The same of a job with checkpoints on the network file system."""
    folder, every = lab.folder / "nfs" / run_dir.name, max(2, options.steps // 2)
    settings = [*wide(nbytes, options.compute), *(one.format(every=every) for one in NFS), f"snapshot.folder={folder}"]
    hosts, found = [f"h{i}" for i in range(4 + len(options.rates))], []
    with job_of(run_dir, lab, PLAIN, settings) as jobs:
        for rate, rank in zip(options.rates, (2, 1), strict=False):
            limit(lab, rate)
            until(lambda: steps(run_dir) > every, run_dir, "checkpoint", jobs[-1])
            seen = calm_steps(run_dir, 2 * every)
            step_s, pause_s = pauses([one["t"] for one in seen], every)
            row = Row(f"machine of rank {rank} lost", typed="at once", script=PLAIN, host=host_of(rank))
            one = typed_again(row, run_dir, lab, jobs, settings, hosts)
            interval_s = best_interval_s(pause_s, options.mtbf)
            seconds = one.seconds - one.parts["steps again"]  # they are in half of the interval
            restore_s = one.parts["restore"]
            found.append(
                Sized(nbytes, rate, step_s, pause_s, interval_s, pause_s, restore_s, seconds, one.again, one.parts)
            )
    shutil.rmtree(lab.folder / "nas-disk" / run_dir.name, ignore_errors=True)
    return found


def compared(ours: Sized, theirs: Sized, held: int, mtbf_s: float) -> dict[str, Any]:
    """Both, and their ratios. Pure."""
    lost = ours.step_s / theirs.step_s - 1
    return {
        "bytes": ours.nbytes,
        "rate": ours.rate,
        "mtbf_s": mtbf_s,
        "ours": {**asdict(ours), "wasted_s": ours.wasted_s, "goodput": ours.goodput(mtbf_s, lost), "held_bytes": held},
        "checkpoints": {**asdict(theirs), "wasted_s": theirs.wasted_s, "goodput": theirs.goodput(mtbf_s)},
        "lost": lost,
        "times": {
            "retrieve": theirs.retrieve_s / max(ours.retrieve_s, 1e-9),
            "recovery": theirs.recovery_s / ours.recovery_s,
            "wasted": theirs.wasted_s / ours.wasted_s,
        },
    }


def available() -> int:
    """Bytes of memory that are free for more."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def by_bytes(lab: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    skipped = []
    sizes = list(options.states)
    for nbytes in sizes:
        if reason := fits(nbytes, int(0.8 * available())):
            skipped.append(reason)
            print(f"skipped: {reason}", flush=True)
            if nbytes > options.instead not in sizes:
                sizes.append(options.instead)
            continue
        print(f"{nbytes / 1e6:.0f} MB per rank", flush=True)
        ours, held = sized_ours(lab, nbytes, options, folder / f"sized-{nbytes}")
        theirs = sized_checkpoints(lab, nbytes, options, folder / f"sized-{nbytes}-checkpoint")
        for one, other in zip(ours, theirs, strict=True):
            rows.append(compared(one, other, held, options.mtbf))
            say(rows[-1])
    limit(lab, "1gbit")
    return {"rows": rows, "skipped": skipped}


def say(row: Mapping[str, Any]) -> None:
    ours, theirs, times = row["ours"], row["checkpoints"], row["times"]
    print(
        f"  {row['bytes'] / 1e6:.0f} MB per rank, {row['rate']}: ours beside checkpoints every {theirs['interval_s']:.0f} s"
    )
    goals = {"retrieve": None, "recovery": TIMES_FASTER, "wasted": WASTED_TIMES}
    for name, goal in goals.items():
        missed = goal is not None and times[name] < goal
        aim = f" (goal {goal:.0f}x{' MISSED' if missed else ''})" if goal else ""
        eats = f"; most of it: {worst(ours['parts'])}" if missed else ""
        print(f"    {name:<10}{ours[f'{name}_s']:8.2f} s {theirs[f'{name}_s']:8.2f} s {times[name]:7.1f}x{aim}{eats}")
    late = " MISSED" if row["lost"] > LOST else ""
    print(
        f"    goodput {100 * ours['goodput']:.3f} %, {100 * theirs['goodput']:.3f} %; throughput lost "
        f"{100 * row['lost']:+.1f} % (goal <= 1 %{late}), a snapshot every {ours['interval_s']:.2f} s; snapshots hold "
        f"{ours['held_bytes'] / 1e6:.0f} MB of a host, {100 * ours['held_bytes'] / machine()['memory_bytes']:.1f} % "
        "of the machine",
        flush=True,
    )


def worst(parts: Mapping[str, float]) -> str:
    name = max(parts, key=lambda one: parts[one])
    return f"{name} {parts[name]:.2f} s"


def idle_cpu(lab: Any, run_dir: Path, seconds: float) -> dict[str, float]:
    """Shares of a core that the busiest agent, replicator and persister take in a job that copies nothing."""
    settings = [*wide(1_000_000, 1.0), "snapshot.every=100000", "recovery.standby_machines=1"]
    modules = ("agent", "replicator", "persister")
    with job_of(run_dir, lab, "launch/train.py", settings, [f"h{i}" for i in range(5)]):
        until(lambda: steps(run_dir) > 2, run_dir, "step 3")
        pids = [
            (name, pid)
            for pid, words in processes(run_dir).items()
            for name in modules
            if f"gemini_gnn.recovery.worker.{name}" in words
        ]
        before, began = {pid: cpu_of([pid]) for _, pid in pids}, time.monotonic()
        time.sleep(seconds)
        took = time.monotonic() - began
        shares = [(name, (cpu_of([pid]) - before[pid]) / took) for name, pid in pids]
    found = {name: max(share for one, share in shares if one == name) for name, _ in shares}
    for name, share in found.items():
        late = " MISSED" if share > IDLE_CPU else ""
        print(f"  without traffic, the busiest {name}: {100 * share:.2f} % of a core (goal < 2 %{late})", flush=True)
    return found


def draw(found: Mapping[str, Sequence[Measured]], path: Path) -> None:
    """A bar of median parts for each row. Long bars are cut, so that the parts of the short ones can be seen."""
    bars = [Bar(ROWS[name].what, tuple(medians(runs).items())) for name, runs in found.items()]
    draw_waterfall(bars, path, title="what a failure costs: medians of its parts", longest_s=LONGEST_S)
    print(f"drawn in {path}")


def draw_each(found: Mapping[str, Sequence[Measured]], folder: Path) -> None:
    """A picture per kind of failure, with a bar for each time that it was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, runs in found.items():
        bars = [Bar(f"round {i + 1}", tuple(run.parts.items())) for i, run in enumerate(runs)]
        draw_waterfall(bars, folder / f"{name}.png", title=ROWS[name].what)


def end(*_: object) -> None:
    """On SIGTERM: the jobs and the lab end with us, and a second SIGTERM does not disturb that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also by bytes of state, and the CPU time of agents")
    parser.add_argument("--quick", action="store_true", help="each once, with little state")
    parser.add_argument("--rounds", type=int, default=5, help="of the lab; those on this machine are 3 at most")
    parser.add_argument("--only", default=",".join(ROWS), help="rows, with commas between")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--states", nargs="+", type=float, default=[10e6, 100e6, 1e9], help="bytes per rank")
    parser.add_argument("--instead", type=float, default=300e6, help="of a state that does not fit")
    parser.add_argument("--rates", nargs="+", default=["1gbit", "10gbit"], help="of links; two at most")
    parser.add_argument("--compute", type=float, default=0.5, help="seconds of a forward pass with so much state")
    parser.add_argument("--steps", type=int, default=8, help="that are looked at before a machine is lost")
    parser.add_argument("--mtbf", type=float, default=86_400.0, help="assumed seconds between failures of the job")
    parser.add_argument("--idle", type=float, default=25.0, help="seconds in which the CPU time of agents is measured")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "recovery.json")
    parser.add_argument("--picture", type=Path, help="default: beside the output")
    options = parser.parse_args()
    options.output = options.output.resolve()
    options.picture = (options.picture or options.output.with_suffix(".png")).resolve()
    for file in (options.output, options.picture):  # now, not after half an hour
        file.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    if options.quick:
        options.rounds, options.states, options.steps, options.idle = 1, [1e6], 6, 5.0
        options.compute, options.rates = 0.1, options.rates[:1]
    options.states, options.instead = [int(nbytes) for nbytes in options.states], int(options.instead)
    names = options.only.split(",") if options.only else []
    if unknown := set(names) - ROWS.keys():
        parser.error(f"--only: expected some of {', '.join(ROWS)}; got {', '.join(sorted(unknown))}")
    sys.path.insert(0, str(ROOT))
    from tests.lab.lab import Lab, missing

    signal.signal(signal.SIGTERM, end)
    document: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "rows": {}, "counted_s": {}}
    print(document["machine"])
    here, there = ([name for name in names if name.startswith("lab-") is on_lab] for on_lab in (False, True))
    found: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if here:
            found |= measure(here, Path(folder), None, min(options.rounds, 3), options.every)
        if (there or options.all) and (reason := missing()):
            print(f"skipped {', '.join(there)}{' and --all' if options.all else ''}: {reason}")
        elif there or options.all:
            with Lab.up(Path(folder) / "lab", hosts=4 + STANDBYS, owned=True) as lab:
                lab.nfs_up()
                limit(lab, "1gbit")
                if there:
                    found |= measure(there, Path(folder), lab, options.rounds, options.every)
                if options.all:
                    document["idle_cpu"] = idle_cpu(lab, Path(folder) / "idle", options.idle)
                    document["by_bytes"] = by_bytes(lab, options, Path(folder))
    counted = {name: median(run.counted_s for run in runs) for name, runs in found.items()}
    for name, runs in found.items():
        parts, row = medians(runs), ROWS[name]
        whole = median(run.seconds for run in runs)
        outside = median(run.seconds - sum(run.parts.values()) for run in runs)
        goals = verdict(row, counted[name], parts, counted.get(row.peer))
        print(f"{name:<19} {whole:6.2f} s, {counted[name]:.2f} s of it counted; {goals}")
        shown = ", ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items())
        print(f"{'':<19} {shown}; outside of them {outside:+.3f}")
    document |= {"rows": {name: [asdict(run) for run in runs] for name, runs in found.items()}, "counted_s": counted}
    document["load_1min_at_end"] = os.getloadavg()[0]
    write(options.output, document)
    if found:
        draw(found, options.picture)
        draw_each(found, options.picture.with_suffix(""))


if __name__ == "__main__":
    main()
