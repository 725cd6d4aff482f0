"""The slot process: asks this machine's worker agent to run one rank, and waits for the outcome. No torch.

The shim finds the agent by its socket. If no agent listens, the shim takes the arena's lock and starts one. The agent is
detached: forked twice and in a session of its own. So a launcher that kills its slot processes and their children does not
kill it. The shim passes the lock's descriptor to the agent, so two agents are never started. If the agent dies without an
outcome, its socket closes and every shim looks for an agent again: its warm parent that took its place, or else a new one.
It resumes from the snapshots in host memory.

Signals. SIGINT (Ctrl-C) ends the job in order: the trainers finish their step, the snapshots stay. A second SIGINT does not
wait for the step. SIGTERM means that this machine leaves; on one machine the job ends in order too. SIGHUP (the terminal is
gone) is the same as SIGTERM, unless it was ignored from the start (nohup). SIGKILL of a shim closes its socket: the agent
sees that and ends the job in order. None of them reaches the trainers. If only the launcher dies, the job runs on.

If the agent refuses a launch, the shim of local rank 0 says why; a refused shim of another rank waits for that first.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemini_gnn.cluster.installation import code
from gemini_gnn.cluster.launcher import let_the_first_speak
from gemini_gnn.cluster.place import Place
from gemini_gnn.config import FaultsConfig, RecoveryConfig, SnapshotConfig
from gemini_gnn.errors import RecoveryError, RunDirError
from gemini_gnn.observe import terms
from gemini_gnn.recovery import home, messages
from gemini_gnn.recovery.screen import POLL_S, Screen

AGENT_START_S = 60.0  # until an agent listens, on a busy machine with a slow file system
HEIR_S = 0.3  # for the dead agent's warm parent to take its place
ANSWER_S = 60.0  # until the agent of an earlier start is gone and ours answers
STARTS = 4  # agents that one slot process starts at most, until one listens
AGENT = "gemini_gnn.recovery.worker.agent"
NO_FAULTS, IN_MEMORY = FaultsConfig(), SnapshotConfig()
UNKNOWN_SCRIPT = RecoveryConfig(hang_factor=0.0)  # it may do anything between two steps, for any time


def run(
    place: Place,
    run_dir: Path,
    target: str,
    payload: dict[str, Any],
    *,
    preload: list[str],
    resume: str,
    terminal: bool,
    arena_root: str | os.PathLike[str] = "/dev/shm",
    recovery: RecoveryConfig = UNKNOWN_SCRIPT,
    snapshot: SnapshotConfig = IN_MEMORY,
    faults: FaultsConfig = NO_FAULTS,
    start_timeout_s: float = 300.0,
    joins: bool = False,
) -> int:
    """Run ``target`` as the trainer of ``place`` under this machine's worker agent; returns the exit code of the job.

    Every slot process of a launch calls this. The shim of local rank 0 prints news of the job on stderr. The shim of rank 0
    prints its trainer's output on stdout too.

    Args:
        run_dir: identifies the job; nothing else does.
        target: "package.module:function", called in the trainer as ``function(payload, place, listen_fd) -> int``.
        payload: JSON.
        preload: modules the trainers are forked with, besides the target's; importing them must start no thread and
            touch no GPU.
        resume: "auto" | "never" (removes the job's snapshots in host memory first) | "must".
        arena_root: RAM file system for the snapshots.
        terminal: stdout is a terminal, where a progress bar may stand in the current line.
        recovery: when a machine counts as silent and a trainer as hung, and which failure ends the job.
        snapshot: where copies of the snapshots go, and how often.
        faults: what the agents break on purpose.
        start_timeout_s: from the first machine of the job to the last.
        joins: this process speaks for all slots of a machine that joins the living job; ``place`` is of ``joining.find``.

    Raises:
        RunDirError: ``run_dir`` cannot be written to.
        RecoveryError: the arena cannot be made; no agent can be started, or it dies again and again.
    """
    _occupy_standard_descriptors()
    run_dir = Path(os.path.realpath(run_dir))
    arena = home.arena_of(run_dir, os.path.realpath(arena_root))
    terms.make_run_dir(run_dir)
    request = messages.Register(
        place=place,
        target=target,
        payload=payload,
        preload=[*preload, target.partition(":")[0]],
        resume=resume,
        recovery=recovery,
        snapshot=snapshot,
        faults=faults,
        start_timeout_s=start_timeout_s,
        deaths=0,
        died_s=0.0,
        environment=dict(os.environ),
        folder=os.getcwd(),
        cores=sorted(os.sched_getaffinity(0)),  # srun and numactl bind each rank to its own
        path=[os.path.abspath(entry) for entry in sys.path],
        command=sys.argv,
        launch=launch_token(place, os.environ),
        pid=os.getpid(),
        code=code(),
        joins=joins,
    )
    screen = Screen(speaks=place.local_rank == 0, streams=place.rank == 0, terminal=terminal)
    stop = StopRequest()
    in_a_row = 0  # agents that died before a step was done
    until_s = time.monotonic() + ANSWER_S
    with stop.on_signals():
        while True:
            agent = reach_agent(arena, run_dir, HEIR_S if request.deaths else 0.0)
            answer = _serve(agent, request, screen, stop)
            agent.close()
            match answer:
                case messages.Ended():
                    return screen.ended(answer)
                case messages.Refused():
                    if place.local_rank != 0:
                        let_the_first_speak(stop.has_come)
                    screen.say(answer.text)
                    return answer.code
                case Gone(accepted=True, stepped=stepped):
                    if recovery.same_step_failures == 0:
                        raise RecoveryError(
                            "the worker agent died, and nothing is restarted (recovery.same_step_failures is 0, or "
                            f"snapshot=none); {_see(run_dir)}"
                        )
                    now = time.monotonic()
                    in_a_row = 1 if stepped else in_a_row + 1
                    until_s = now + ANSWER_S
                    if in_a_row >= recovery.same_step_failures:
                        raise RecoveryError(
                            f"the worker agent died {in_a_row} times before a step was done "
                            f"(recovery.same_step_failures={recovery.same_step_failures}); {_see(run_dir)}"
                        )
                    resume = "auto" if request.resume == "never" else request.resume
                    request = replace(request, deaths=request.deaths + 1, died_s=now, resume=resume)
                    screen.say(
                        "the worker agent died; another takes its place, and resumes from the snapshots in host memory"
                    )
                case _:  # the agent ends an earlier start or is dying: it will be gone in a moment
                    if time.monotonic() > until_s:
                        raise RecoveryError(
                            f"the worker agent of an earlier start does not end, or a new one cannot begin; {_see(run_dir)}"
                        )
                    time.sleep(POLL_S)


def _occupy_standard_descriptors() -> None:
    """Open 0, 1 and 2 if a daemon closed them: else the lock or the agent's socket would get such a number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        continue
    os.close(descriptor)


def launch_token(place: Place, environ: Mapping[str, str]) -> str:
    """A name for this launch: the same in all its slot processes on this machine, another one in the next launch.

    It is made of the parent's pid and start time, so ranks that are started by hand must be started from one shell.
    """
    if "SLURM_STEP_ID" in environ:
        step = f"slurm-{environ.get('SLURM_JOB_ID')}.{environ['SLURM_STEP_ID']}"
        return f"{step}.{environ.get('SLURM_RESTART_COUNT', 0)}"
    parent = os.getpid() if place.world_size == 1 else os.getppid()
    try:
        stat = Path(f"/proc/{parent}/stat").read_text()
    except OSError:  # it died
        return f"{parent}"
    return f"{parent}-{stat.rpartition(')')[2].split()[19]}"  # field 22: start time since boot, in ticks


# --- finding or starting the agent ------------------------------------------------------------------------------------


def reach_agent(arena: Path, run_dir: Path, heir_s: float = 0.0) -> messages.Channel:
    """A channel to the job's agent on this machine; starts one if there is none.

    Args:
        heir_s: so long a warm parent may take to become the agent in place of one that has died (``worker/warm.py``).

    Raises:
        RunDirError, RecoveryError: the run directory or the arena refuses; no agent listens within ``AGENT_START_S``.
    """
    begin, started = time.monotonic(), 0
    deadline = begin + AGENT_START_S
    while time.monotonic() < deadline and started < STARTS:
        channel = messages.connect(arena / home.AGENT_SOCKET)
        if channel is not None:
            return channel
        lock = home.take_lock(arena) if time.monotonic() - begin >= heir_s else None
        if lock is not None:
            try:
                (arena / home.AGENT_SOCKET).unlink(missing_ok=True)  # of a dead one
                _start_agent(arena, run_dir, lock)
            finally:
                os.close(lock)
            started += 1
        time.sleep(0.005)
    raise RecoveryError(f"the worker agent does not come up on {os.uname().nodename}; {_see(run_dir)}")


def agent_log(run_dir: Path) -> Path:
    return run_dir / "logs" / f"agent-{os.uname().nodename}.log"


def _see(run_dir: Path) -> str:
    """For an error message: where to look, and the end of the agent's log."""
    log = agent_log(run_dir)
    tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
    return f"see {run_dir}/events, and the end of {log}:\n{tail}"


def _start_agent(arena: Path, run_dir: Path, lock: int) -> None:
    """Start the agent and pass it the lock's descriptor; returns when the agent is a child of init."""
    command = [sys.executable, "-P", "-m", AGENT, "--run-dir", os.fspath(run_dir)]
    command += ["--arena", os.fspath(arena), "--lock", str(lock)]
    package = Path(__file__).resolve().parents[2]
    known = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*known, os.fspath(package)])}
    try:
        output = os.open(agent_log(run_dir), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:  # somebody else's run
        raise RunDirError(f"cannot write {agent_log(run_dir)}: {error.strerror}; give another run_dir=...") from None
    nowhere = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        child = os.fork()
    except OSError as error:
        raise RecoveryError(
            f"cannot start the worker agent: {error.strerror}; is memory or the number of processes (ulimit -u) exhausted?"
        ) from None
    if child == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                os.chdir("/")
                for source, number in ((nowhere, 0), (output, 1), (output, 2)):
                    os.dup2(source, number)
                os.set_inheritable(lock, True)
                # A launcher waits for the end of its pipes: none may stay open here.
                os.closerange(3, lock)
                os.closerange(lock + 1, os.sysconf("SC_OPEN_MAX"))
                os.execve(sys.executable, command, environment)
        finally:
            os._exit(127)
    os.close(output)
    os.close(nowhere)
    os.waitpid(child, 0)


# --- waiting for the outcome ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gone:
    """The agent is gone without an outcome. If it had not ``accepted`` us, it may have been dying when we connected.

    ``stepped``: a trainer of it had done a step.
    """

    accepted: bool
    stepped: bool


Answer = messages.Ended | messages.Refused | messages.Ending | Gone


def _serve(agent: messages.Channel, request: messages.Register, screen: Screen, stop: StopRequest) -> Answer:
    """Register and wait. Returns the agent's last message, or Gone."""
    accepted = stepped = False
    agent.send(request, timeout_s=10.0)
    stop.deliver_to(agent)
    try:
        while True:
            for message in agent.wait(POLL_S):
                match message:
                    case messages.Accepted():
                        accepted = True
                        screen.follow(Path(message.log), message.offset)
                    case messages.Follow(log):
                        screen.streams = True
                        screen.follow(Path(log))
                    case messages.Stepped():
                        stepped = True
                    case messages.Say(text):
                        screen.say(text)
                    case messages.Ended() if not accepted:
                        return messages.Ending()  # of an earlier start: it had not read our request
                    case messages.Ended() | messages.Refused() | messages.Ending():
                        return message
            screen.copy()
            if agent.closed:
                return Gone(accepted, stepped)
    finally:
        stop.deliver_to(None)


class StopRequest:
    """Turns signals to this process into requests to the agent, and keeps them while there is no agent."""

    def __init__(self) -> None:
        self._agent: messages.Channel | None = None
        self._message: messages.Stop | None = None
        self._interrupts = 0

    def deliver_to(self, agent: messages.Channel | None) -> None:
        self._agent = agent
        if agent is not None and self._message is not None:
            agent.send(self._message, timeout_s=1.0)

    def has_come(self) -> bool:
        return self._message is not None

    def _seen(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 2:
                os._exit(128 + number)  # the agent does not answer; it will see that this process is gone
        elif self._message is not None:
            return  # DeepSpeed's launcher sends SIGTERM after the terminal's SIGINT: the first reason stays
        reasons: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGHUP: "the terminal is gone"}
        reason = reasons.get(number, "SIGTERM")
        self._message = messages.Stop(reason, 128 + number, force=self._interrupts > 1)
        self.deliver_to(self._agent)

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle the signals while the job runs; restore the earlier handlers afterwards."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        for number, handler in before.items():
            if number != signal.SIGHUP or handler is not signal.SIG_IGN:
                signal.signal(number, self._seen)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
