"""From a failure to the first new step, beside a plain DeepSpeed job that is typed again and resumes from its checkpoint.

    python benchmarks/recovery.py [--rounds 3] [--only trainer,checkpoint]

Two ranks on this machine:

    trainer         one trainer killed; the worker agent forks new ones
    trainers        both killed
    hang            one stops in a collective; counted from when it is found (recovery.hang_floor_s=1, hang_factor=3)
    agent           the worker agent killed, which takes its trainers with it
    retyped         everything killed (launcher, agent, trainers), and the command typed again at once
    checkpoint      plain_deepspeed.py: the same, from DeepSpeed's checkpoint every `--every` steps

Four hosts of one rank in the lab (docs/lab.md; root on Linux), links of 1 Gbit/s:

    lab-trainer     the trainer of h1 killed
    lab-agent       the worker agent of h1 killed
    lab-root        the agent of h0 killed, which is the root
    lab-link        h3 cut off for 3 s; counted from when the link is back (recovery.silence_s=2, heartbeat_s=0.25)
    lab-checkpoint  plain_deepspeed.py, checkpoints on the lab's network file system: the trainer of h1 killed, and the
                    command typed again as soon as it has ended

Each is a real `deepspeed` job, in turns. Time runs from the failure to the end of the first step that had not been done before,
by the clock of the events of rank 0. Beside it stand the parts that the root has noted (docs/recovery.md). Their sum leaves
out the time until a death is seen, and the last of the step, from its update to its event. A silent machine counts from its
last word on, which is up to a heartbeat before the cut. The losses of every run must be those of an undisturbed one, bit for
bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import machine, median, write

from gemini_gnn.cluster.hosts import random_port
from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.files import read_record
from gemini_gnn.observe.failures import read_failures
from gemini_gnn.observe.run_directory import read_losses
from gemini_gnn.observe.waterfall import Bar, draw_waterfall
from gemini_gnn.recovery import home

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ["training.epochs=40", "evaluation.every=10", "logger=quiet"]
TIMES_FASTER = 15.0  # than the peer: the goal
CUT_S = 3.0  # of lab-link
LONGEST_S = 2.5  # of a bar in the picture
END_S = 300.0  # until a job has ended
RELAUNCHED = ("old command ends", "launcher, imports, join", "restore", "first step", "steps again")


@dataclass(frozen=True)
class Row:
    """One kind of failure.

    Attributes:
        what: it is, in the picture.
        victims: the pids to kill, of a job (run directory) on a lab (None: on this machine).
        goal_s: of the seconds that count; None: no goal.
        peer: the row that it is compared with.
        typed: the command is typed again: "at once", or "when it has ended" by itself. "": it is not.
        settings: of the job, with the fields {at} (the step that fails), {every} and {folder} (of checkpoints).
        script: of the job.
    """

    what: str
    victims: Callable[[Path, Any], list[int]]
    goal_s: float | None = None
    peer: str = ""
    typed: str = ""
    settings: tuple[str, ...] = ()
    script: str = "launch/train.py"


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


def start(run_dir: Path, lab: Any, script: str, settings: Sequence[str]) -> subprocess.Popen[bytes]:
    """Type the command: here on two ranks, or on h0 of ``lab`` for all of its hosts."""
    where = ["--num_accelerators", "2"]
    if lab is not None:
        where = ["--hostfile", str(lab.hostfile(["h0", "h1", "h2", "h3"]))]
        settings = ["training.threads=1", *settings]
    port = str(random_port())  # that of a job just killed may not be free again
    command = [*DEEPSPEED, *where, "--master_port", port, script, f"run_dir={run_dir}", *SETTINGS, *settings]
    options: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, "DS_ACCELERATOR": "cpu"}}
    with open(f"{run_dir}.log", "ab") as log:
        options |= {"stdout": log, "stderr": log}
        if lab is not None:
            return lab.popen("h0", command, **options)
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


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def events(run_dir: Path, rank: int = 0) -> list[dict]:
    path = run_dir / "events" / f"rank-{rank}.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def trainer(run_dir: Path, rank: int, lab: Any) -> int:
    started = [event for event in events(run_dir, rank) if event["kind"] == "start"][-1]
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


def nobody(_run_dir: Path, _lab: Any) -> list[int]:
    return []


def everything(run_dir: Path, _lab: Any) -> list[int]:
    return list(processes(run_dir))


def trainers(*ranks: int) -> Callable[[Path, Any], list[int]]:
    return lambda run_dir, lab: [trainer(run_dir, rank, lab) for rank in ranks]


def agent_on(host: str) -> Callable[[Path, Any], list[int]]:
    return lambda run_dir, lab: [agent(run_dir, host, lab)]


PLAIN = "benchmarks/plain_deepspeed.py"
NFS = ("snapshot=nfs", "snapshot.nfs_every={every}")
HANGS = (
    "recovery.hang_floor_s=1",
    "recovery.hang_factor=3",
    "faults.allow=true",
    "faults.at=[hang-collective 1 @ step {at}]",
)
SILENT = ("recovery.silence_s=2", "recovery.heartbeat_s=0.25")
ROWS = {
    "trainer": Row("2 ranks: a trainer killed", trainers(1), 0.30, "checkpoint"),
    "trainers": Row("2 ranks: both trainers killed", trainers(0, 1), 0.30, "checkpoint"),
    "hang": Row("2 ranks: a trainer hangs", nobody, 0.30, "checkpoint", settings=HANGS),
    "agent": Row("2 ranks: the agent killed", agent_on(""), 2.30, "checkpoint"),
    "retyped": Row("2 ranks: all killed, typed again", everything, None, "checkpoint", "at once"),
    "checkpoint": Row("2 ranks: plain DeepSpeed, typed again", everything, typed="at once", settings=NFS, script=PLAIN),
    "lab-trainer": Row("4 hosts: a trainer killed", trainers(1), 1.0, "lab-checkpoint"),
    "lab-agent": Row("4 hosts: an agent killed", agent_on("h1"), 3.0, "lab-checkpoint"),
    "lab-root": Row("4 hosts: the root agent killed", agent_on("h0"), 3.0, "lab-checkpoint"),
    "lab-link": Row("4 hosts: a link cut for 3 s", nobody, 1.0, "lab-checkpoint", settings=SILENT),
    "lab-checkpoint": Row(
        "4 hosts: plain DeepSpeed, typed again",
        trainers(1),
        typed="when it has ended",
        settings=(*NFS, "snapshot.folder={folder}"),
        script=PLAIN,
    ),
}


def disturbed(name: str, run_dir: Path, lab: Any, at: int, every: int) -> Measured:
    """Run the job of row ``name``, let it fail after step ``at``, and see it to its end."""
    row = ROWS[name]
    folder = lab.folder / "nfs" / run_dir.name if lab is not None else run_dir
    settings = [setting.format(at=at + 1, every=every, folder=folder) for setting in row.settings]
    job = start(run_dir, lab, row.script, settings)
    try:
        deadline = time.monotonic() + END_S
        while steps(run_dir) < at:
            if time.monotonic() > deadline or job.poll() is not None:
                raise SystemExit(f"{name}: no step {at}\n{said(run_dir)}")
            time.sleep(0.005)
        victims = row.victims(run_dir, lab)
        failed = back = time.time()
        kill(victims)
        known = steps(run_dir)
        if name == "lab-link":
            lab.link("h3", False)
            time.sleep(max(0.0, failed + CUT_S - time.time()))
            lab.link("h3", True)
            back = time.time()
        if row.typed == "at once":
            kill(everything(run_dir, lab))  # what was started in the meantime
        if row.typed:
            job.wait(END_S)
            ended = time.time()
            job = start(run_dir, lab, row.script, settings)
        if job.wait(END_S) != 0:
            raise SystemExit(f"{name}: the job failed after the failure\n{said(run_dir)}")
    finally:
        kill(everything(run_dir, lab))
        job.wait(30)
        shutil.rmtree(home.arena_of(run_dir), ignore_errors=True)  # of a job that failed
    if name == "hang":
        (file,) = (file for file in (run_dir / "faults").iterdir() if file.name != "begun")
        failed = read_record(file)["time"]
    moments, again = resumed(events(run_dir), known)
    if row.typed:
        spans = zip(RELAUNCHED, [failed, ended, *moments], [ended, *moments], strict=False)
        parts = {part: end - begin for part, begin, end in spans}
    else:
        parts = parts_of(read_failures(run_dir))
    seconds = moments[-1] - failed
    uncounted = parts["detect"] + parts["decide"] if name == "hang" else back - failed if name == "lab-link" else 0.0
    return Measured(seconds, seconds - uncounted, again, parts)


def losses_of(run_dir: Path, lab: Any) -> list:
    """Of a run that nothing happens to."""
    job = start(run_dir, lab, "launch/train.py", ["snapshot=none"])
    try:
        if job.wait(END_S) != 0:
            raise SystemExit(said(run_dir))
    finally:
        kill(everything(run_dir, lab))
    return read_losses(run_dir / "losses.csv")


def measure(names: Sequence[str], folder: Path, lab: Any, rounds: int, every: int) -> dict[str, list[Measured]]:
    """Rows ``names``, all of one place, in turns."""
    found: dict[str, list[Measured]] = {name: [] for name in names}
    expected = losses_of(folder / f"calm-{'here' if lab is None else 'lab'}", lab)
    at = len(expected) // 2 // every * every + every // 2  # between two checkpoints: what a failure costs on average
    for i in range(rounds):
        for name in names:
            run_dir = folder / f"{name}-{i:02}"
            one = disturbed(name, run_dir, lab, at, every)
            if read_losses(run_dir / "losses.csv") != expected:
                raise SystemExit(f"{name}: losses differ from those of the undisturbed run")
            found[name].append(one)
            print(
                f"  {name:<14} {one.seconds:6.2f} s; parts {sum(one.parts.values()):.3f} s, "
                f"{one.seconds - sum(one.parts.values()):+.3f} s outside of them; {one.again} steps done again, "
                "losses bit-identical",
                flush=True,
            )
    return found


def draw(found: Mapping[str, Sequence[Measured]], path: Path) -> None:
    """A bar of median parts for each row. Long bars are cut, so that the parts of the short ones can be seen."""
    bars = [Bar(ROWS[name].what, tuple(medians(runs).items())) for name, runs in found.items()]
    draw_waterfall(bars, path, title="what a failure costs: medians of its parts", longest_s=LONGEST_S)


def end(*_: object) -> None:
    """On SIGTERM: the jobs and the lab end with us, and a second SIGTERM does not disturb that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(ROWS), help="rows, with commas between")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "recovery.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "results" / "recovery.png")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - ROWS.keys():
        parser.error(f"--only: expected some of {', '.join(ROWS)}; got {', '.join(sorted(unknown))}")
    sys.path.insert(0, str(ROOT))
    from tests.lab.lab import Lab, missing

    signal.signal(signal.SIGTERM, end)
    print(machine())
    here, there = ([name for name in names if name.startswith("lab-") is on_lab] for on_lab in (False, True))
    found: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if here:
            found |= measure(here, Path(folder), None, options.rounds, options.every)
        if there and (reason := missing()):
            print(f"skipped {', '.join(there)}: {reason}")
        elif there:
            with Lab.up(Path(folder) / "lab", hosts=4, owned=True) as lab:
                lab.nfs_up()
                for host in lab.hosts:
                    lab.bandwidth(host, "1gbit")
                found |= measure(there, Path(folder), lab, options.rounds, options.every)
    counted = {name: median(run.counted_s for run in runs) for name, runs in found.items()}
    for name, runs in found.items():
        parts, row = medians(runs), ROWS[name]
        whole = median(run.seconds for run in runs)
        outside = median(run.seconds - sum(run.parts.values()) for run in runs)
        goals = verdict(row, counted[name], parts, counted.get(row.peer))
        print(f"{name:<14} {whole:6.2f} s, {counted[name]:.2f} s of it counted; {goals}")
        shown = ", ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items())
        print(f"{'':<14} {shown}; outside of them {outside:+.3f}")
    rows = {name: [asdict(run) for run in runs] for name, runs in found.items()}
    write(options.output, {"machine": machine(), "rounds": options.rounds, "rows": rows, "counted_s": counted})
    draw(found, options.picture)
    print(f"drawn in {options.picture}")


if __name__ == "__main__":
    main()
