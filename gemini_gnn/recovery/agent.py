"""The worker agent: one per machine and job, light, detached; owns the warm parent, the trainers and the arena folder.

Who owns what. The agent holds the flock on ``agent.lock`` from before its exec (the shim that started it passes the
descriptor on), so at most one lives per job and machine, and everything under the arena folder is its own. It is
single-threaded: a loop over sockets, with the decisions in ``decisions.py``. It is nobody's child (re-parented to init) and
adopts the orphans below it (subreaper), so trainers whose warm parent died are still reaped here and counted.

What may be interrupted where. The agent may be killed at any instruction: the kernel kills the warm parent and with it the
trainers (PDEATHSIG), closes the shims' sockets, drops the lock; the shims start another agent, which waits until the kernel
has finished with every trainer of the old one (``home.living_trainer``) before it forks. Shims and trainers may vanish
between any two messages: a closed socket is an event like the others. Which message may be lost: any to or from a process
that died; the exits of trainers come from the warm parent, or, when that died, from ``waitpid`` here.

Requests come from processes of the same user only: the folder is 0700, the socket 0600, and the kernel is asked for the
peer's uid. The shims' messages: register, stop; ours: accepted, refused, ending, say, outcome.
"""

from __future__ import annotations

import argparse
import os
import selectors
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemini_gnn.errors import GeminiError
from gemini_gnn.recovery import decisions, home, messages, processes
from gemini_gnn.recovery.decisions import Failure, Limits, Outcome
from gemini_gnn.recovery.journal import Journal

NOBODY_S = 30.0  # an agent without a job ends after it
REAP_ORPHANS_S = 5.0  # for killed children to be gone

# Pools are sized when a library is imported; a trainer sets its own number after the fork.
PINNED = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
# torch.cuda.is_available() then asks NVML and does not initialise CUDA, which a fork would not survive.
PINNED["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


@dataclass
class Shim:
    """A slot process that waits for the outcome; ``request`` is its ``register`` message."""

    channel: messages.Channel
    request: dict[str, Any]


@dataclass
class Trainer:
    """``pid`` is None until the warm parent has reported the fork."""

    channel: messages.Channel
    forked_s: float
    pid: int | None = None


@dataclass
class Warm:
    """``pid`` is its own until it is reaped, which only ``_reap`` does."""

    pid: int
    channel: messages.Channel


class Agent:
    """The loop and its handles. What is decided from is ``state``; it is None until the first shim has spoken."""

    def __init__(self, run_dir: Path, arena: Path):
        self.run_dir, self.arena, self.job = run_dir, arena, home.job_id(run_dir)
        self.machine = os.uname().nodename
        self.since_s = time.time()
        self.term = 0
        self.state: decisions.State | None = None
        self.outcome: Outcome | None = None
        self.request: dict[str, Any] = {}  # of the first shim: what all of them share
        self.shims: dict[int, Shim] = {}
        self.visitors: list[messages.Channel] = []  # connected, no registered shim (yet)
        self.trainers: dict[int, Trainer] = {}
        self.warm: Warm | None = None
        self.events: list[decisions.Event] = []  # seen, not yet decided
        self.journal = Journal(run_dir, self.machine)
        self.listener = messages.listen(arena / home.AGENT_SOCKET)
        self.wakeup, signalled = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(self.wakeup, selectors.EVENT_READ)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the job has ended on this machine, or nobody came."""
        nobody_s = time.monotonic() + NOBODY_S
        while self.outcome is None:
            self.selector.select(self._patience_s())
            for number in self._signals():
                if number == signal.SIGTERM:
                    self._see(decisions.StopAsked("SIGTERM: this machine leaves", 128 + signal.SIGTERM))
            self._read_trainers()  # before requests: who said in time that it listens is asked, not killed
            self._read_warm()
            self._reap()
            self._accept()
            self._read_visitors()
            self._read_shims()
            self._see(decisions.Tick())
            if self.state is None and not self.visitors and time.monotonic() > nobody_s:
                break  # the shim that started us died before it could speak
        self._end()

    def _patience_s(self) -> float:
        deadline = self.state.deadline if self.state else None
        return 1.0 if deadline is None else min(1.0, max(0.0, deadline - time.monotonic()))

    def _signals(self) -> bytes:
        try:
            return os.read(self.wakeup, 4096)
        except BlockingIOError:
            return b""

    def _see(self, event: decisions.Event) -> None:
        """Decide on ``event`` and act. What actions bring about at once is decided after all of them."""
        self.events.append(event)
        if len(self.events) > 1:
            return  # called from an action below
        while self.events:
            if self.state is None:
                if isinstance(self.events[0], decisions.StopAsked):
                    asked = self.events[0]
                    self.outcome = Outcome("stopped", asked.code, asked.reason, keep=asked.keep)
            else:
                before = self.state
                self.state, actions = decisions.decide(before, self.events[0], time.monotonic())
                if self.state.phase is not before.phase:
                    self.journal.log(
                        "phase", phase=self.state.phase, generation=self.state.generation, cause=self.state.cause
                    )
                for action in actions:
                    self._act(action)
            self.events.pop(0)

    def _act(self, action: decisions.Action) -> None:
        match action:
            case decisions.StartWarm():
                self._start_warm()
            case decisions.Fork(generation, ranks):
                self.journal.status("running", generation=generation)
                self.journal.write_errors(None)
                self._fork(generation, sorted(ranks))
            case decisions.AskToStop(ranks):
                for rank in ranks:
                    self.trainers[rank].channel.send({"kind": "stop"})
            case decisions.Kill(ranks):
                if self.warm is not None:  # else they are dead or dying with it
                    self.warm.channel.send({"kind": "kill", "ranks": sorted(ranks)}, timeout_s=1.0)
            case decisions.Say(text):
                self._say(text)
            case decisions.Finish(outcome):
                self.journal.write_errors(outcome.failure)
                self.outcome = outcome

    # --- shims and other visitors -------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # out of descriptors: the visitor waits in the backlog
                self.journal.log("accept_failed", error=error.strerror)
                return
            if messages.peer(sock)[1] != os.getuid():
                sock.close()
                continue
            channel = messages.Channel(sock)
            self.selector.register(channel, selectors.EVENT_READ)
            self.visitors.append(channel)

    def _forget(self, channel: messages.Channel) -> None:
        self.selector.unregister(channel)
        channel.close()

    def _read_visitors(self) -> None:
        for channel in list(self.visitors):
            for message in channel.receive():
                if message.get("kind") == "register":
                    self._register(channel, message)
                elif message.get("kind") == "stop":
                    self._stop_asked(channel, message)
            if channel.closed and channel in self.visitors:
                self.visitors.remove(channel)
                self._forget(channel)

    def _read_shims(self) -> None:
        for rank, shim in list(self.shims.items()):
            for message in shim.channel.receive():
                if message.get("kind") == "stop":
                    self._stop_asked(shim.channel, message)
            if shim.channel.closed:
                del self.shims[rank]
                self._forget(shim.channel)
                self.journal.log("shim_lost", rank=rank)
                self._see(decisions.StopAsked(f"the slot process of rank {rank} is gone", 128 + signal.SIGKILL))

    def _stop_asked(self, channel: messages.Channel, message: dict[str, Any]) -> None:
        asked = decisions.StopAsked(message["reason"], message["code"], keep=message["keep"], force=message["force"])
        self.journal.log("stop_asked", pid=messages.peer(channel.sock)[0], reason=asked.reason, force=asked.force)
        self._see(asked)

    def _register(self, channel: messages.Channel, request: dict[str, Any]) -> None:
        place = request["place"]
        rank = place["rank"]
        if self.outcome is not None or (self.state is not None and decisions.may_be_ending(self.state)):
            channel.send({"kind": "ending"})
            return
        if self.state is None:
            try:
                self._begin(request)
            except GeminiError as error:
                channel.send({"kind": "refused", "code": 2, "text": str(error)})
                return
        assert self.state is not None
        if request["launch"] != self.request["launch"] or rank in self.state.registered:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_s))
            text = (
                f"this job is already running on {self.machine}: worker agent pid {os.getpid()}, since {since}; "
                f"stop it with `python launch/stop.py run_dir={self.run_dir}`, or give another run_dir=..."
            )
            channel.send({"kind": "refused", "code": 2, "text": text})
            return
        self.visitors.remove(channel)
        self.shims[rank] = Shim(channel, request)
        log = self.journal.log_of(rank)
        channel.send({"kind": "accepted", "term": self.term, "log": os.fspath(log), "offset": _size_bytes(log)})
        self.journal.log("registered", rank=rank, pid=request["pid"])
        self._see(decisions.Registered(rank))

    def _begin(self, request: dict[str, Any]) -> None:
        """The first shim says what this job is; its term begins.

        Raises:
            RunDirError, RecoveryError: the run directory or the arena refuses.
        """
        claim = {"machine": self.machine, "pid": os.getpid(), "time": time.time(), "launch": request["launch"]}
        claim["arena_root"] = os.fspath(self.arena.parent.parent)
        claim |= {
            "world_size": request["place"]["world_size"],
            "local_world_size": request["place"]["local_world_size"],
        }
        run = home.run_id(self.run_dir)
        self.term = home.claim_term(self.run_dir, claim)
        self.request = request
        place = request["place"]
        self.journal.term, self.journal.speaks_for_job = self.term, place["rank"] == place["local_rank"]
        limits = Limits(max_restarts=request["max_restarts"])
        # Trainers of a launch whose agent died are no first generation: they may find its work complete.
        self.state = decisions.State(
            place["local_world_size"], place["world_size"], limits, generation=request["deaths"]
        )
        self.journal.log(
            "started", term=self.term, pid=os.getpid(), arena=os.fspath(self.arena), command=request["command"]
        )
        if (pid := self._earlier_trainer(limits.reap_s)) is not None:
            text = (
                f"process {pid}, a trainer of this job's last term, is still there after SIGKILL: it is stuck in the "
                "kernel (a dead file system or device?); wait for it or restart this machine"
            )
            self._see(decisions.WarmRefused(Failure(-1, 1, time.monotonic(), text, text)))
            return
        reason = "resume=never" if request["resume"] == "never" else ""
        if request["resume"] == "auto" and not home.belongs_to(self.arena, run):
            reason = "they are of a run directory that was removed"  # its first start must not go on in the middle
        if reason and home.snapshot_files(self.arena):
            _, size_bytes = home.remove_snapshots(self.arena)
            self.journal.log("snapshots_removed", bytes=size_bytes, reason=reason)
        home.assign(self.arena, run)
        self.journal.status("starting")
        self._start_warm()

    def _earlier_trainer(self, patience_s: float) -> int | None:
        """Invariant 5 across the death of an agent: end what is left of the last term; the trainer that stays."""
        deadline = time.monotonic() + patience_s
        killed, gone = processes.kill_marked(self.arena, patience_s)
        if killed:
            self.journal.log("leftovers_killed", processes=killed, gone=gone)
        while (pid := home.living_trainer(self.arena)) is not None and time.monotonic() < deadline:
            time.sleep(0.005)
        return pid

    # --- warm parent and trainers -------------------------------------------------------------------------------------

    def _start_warm(self) -> None:
        assert self.warm is None, "one warm parent at a time"
        ours, theirs = socket.socketpair()
        theirs.set_inheritable(True)
        command = [sys.executable, "-P", "-m", "gemini_gnn.recovery.warm", "--job", self.job]
        command += ["--arena", os.fspath(self.arena), "--agent", str(os.getpid()), "--channel", str(theirs.fileno())]
        ignored = [signal.SIGINT, signal.SIGHUP]
        environment = {**os.environ, **PINNED, **dict([processes.mark(self.arena)])}
        pid = os.posix_spawn(sys.executable, command, environment, setsigdef=ignored)
        theirs.close()
        channel = messages.Channel(ours)
        self.warm = Warm(pid, channel)
        self.selector.register(channel, selectors.EVENT_READ)
        self.journal.log("warm_started", pid=pid)
        channel.send(
            {"kind": "preload", "modules": self.request["preload"], "path": self.request["path"]}, timeout_s=5.0
        )

    def _fork(self, generation: int, ranks: list[int]) -> None:
        """Ask the warm parent for the trainers of ``generation``. A warm parent that is gone by now is seen later."""
        assert self.state is not None and self.warm is not None
        # With all ranks here the store's port is ours to choose: bound and listening before any client comes.
        mark, marked = processes.mark(self.arena)
        store = None
        if self.state.local == self.state.world:
            store = socket.create_server(("127.0.0.1", 0), backlog=1024)
        for rank in ranks:
            request = self.shims[rank].request if rank in self.shims else self.request
            place = dict(request["place"])
            if store is not None:
                place.update(master_addr="127.0.0.1", master_port=store.getsockname()[1])
            ours, theirs = socket.socketpair()
            channel = messages.Channel(ours)
            self.selector.register(channel, selectors.EVENT_READ)
            self.trainers[rank] = Trainer(channel, time.monotonic())
            task = {
                "kind": "fork",
                "place": place,
                "environment": {**request["environment"], **_launcher_variables(place), mark: marked},
                "log": os.fspath(self.journal.log_of(rank)),
                "job": self.job,
                "arena": os.fspath(self.arena),
                "term": self.term,
                "generation": generation,
                # What `never` had to forget was removed when this term began; a restart must go on.
                "resume": "auto" if generation > 1 and request["resume"] == "never" else request["resume"],
                **{key: request[key] for key in ("target", "payload", "folder", "path", "command")},
            }
            descriptors = [theirs.fileno()]
            if store is not None and rank == 0:
                descriptors.append(store.fileno())
            self.warm.channel.send(task, descriptors, timeout_s=5.0)
            theirs.close()
        if store is not None:
            store.close()

    def _read_trainers(self) -> None:
        for rank in list(self.trainers):
            self._read_trainer(rank)

    def _read_trainer(self, rank: int) -> None:
        trainer = self.trainers[rank]
        for message in trainer.channel.receive():
            if message["kind"] == "started":
                self.journal.log("trainer_started", rank=rank, fork_to_start_s=message["time_s"] - trainer.forked_s)
            elif message["kind"] == "listens":
                self._see(decisions.Listens(rank))
            elif message["kind"] == "failed":
                failure = Failure(rank, message["code"], message["time_s"], message["summary"], message["text"])
                failure = replace(failure, consequence=message["consequence"])
                self.journal.log("trainer_failed", rank=rank, code=failure.code, text=failure.text)
                self.journal.errors.append(failure)
                self._see(decisions.Failed(failure))
        if trainer.channel.closed and trainer.channel.sock.fileno() >= 0:
            self._forget(trainer.channel)

    def _exited(self, rank: int, code: int) -> None:
        self._read_trainer(rank)  # its last words were sent before it died
        trainer = self.trainers.pop(rank)
        if trainer.channel.sock.fileno() >= 0:
            self._forget(trainer.channel)
        self.journal.log("trainer_exited", rank=rank, pid=trainer.pid, code=code)
        self._see(decisions.Exited(rank, code))

    def _read_warm(self) -> None:
        if self.warm is not None:
            self._hear(self.warm)
            if self.warm.channel.closed:
                os.kill(self.warm.pid, signal.SIGKILL)

    def _hear(self, warm: Warm) -> None:
        for message in warm.channel.receive():
            if message["kind"] == "ready":
                self.journal.log("warm_ready", seconds=message["seconds"])
                self._see(decisions.WarmReady())
            elif message["kind"] == "refused":
                self.journal.log("warm_refused", text=message["text"])
                text = message["text"]
                summary = text.strip().splitlines()[-1]
                self._see(decisions.WarmRefused(Failure(-1, 1, time.monotonic(), summary, text)))
                if "rank" in message:
                    self._exited(message["rank"], 1)
            elif message["kind"] == "forked":
                self.trainers[message["rank"]].pid = message["pid"]
                self.journal.log("trainer_forked", rank=message["rank"], pid=message["pid"])
            elif message["kind"] == "exited":
                self._exited(message["rank"], message["code"])

    def _reap(self) -> None:
        """The warm parent's end, and whatever was orphaned below us."""
        while (ended := processes.wait_for_child()) is not None:
            pid, code = ended
            if self.warm is None or pid != self.warm.pid:
                continue  # a grandchild that outlived its trainer
            warm, self.warm = self.warm, None
            self._hear(warm)  # what it could still report
            self._forget(warm.channel)
            reason = decisions.signal_name(-code) if code < 0 else f"exit code {code}"
            self.journal.log("warm_died", pid=pid, reason=reason)
            orphans = processes.kill_and_reap_children(REAP_ORPHANS_S)
            self._see(decisions.WarmDied(reason))
            if orphans is not None:  # every descendant is reaped, so these trainers are
                for rank, trainer in list(self.trainers.items()):
                    self._exited(rank, orphans.get(trainer.pid or -1, -signal.SIGKILL))

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Clean up first, then tell: when a command returns, nothing of the job is left but what it says."""
        outcome = self.outcome or Outcome("stopped", 1, "nobody came")
        if self.warm is not None:
            os.kill(self.warm.pid, signal.SIGKILL)
        if processes.kill_and_reap_children(REAP_ORPHANS_S) is None:
            self.journal.log("children_left", reason="not reaped in time")
        self.listener.close()
        dropped = (0, 0)
        if not outcome.keep:
            dropped = home.remove_snapshots(self.arena)
        kept = len(home.snapshot_files(self.arena))
        failure = outcome.failure
        state = "failed" if outcome.kind == "lost" else outcome.kind
        self.journal.log(
            "ended", outcome=outcome.kind, code=outcome.code, reason=outcome.reason, dropped_bytes=dropped[1]
        )
        self.journal.status(state, reason=outcome.reason, exit_code=outcome.code)
        home.leave_arena(self.arena)  # from here on the arena is somebody else's
        message = {
            "kind": "outcome",
            "outcome": outcome.kind,
            "code": outcome.code,
            "reason": outcome.reason,
            "rank": failure.rank if failure else None,
            "text": failure.text if failure else "",
            "kept_files": kept,
            "dropped_bytes": dropped[1],
        }
        for channel in [shim.channel for shim in self.shims.values()] + self.visitors:
            channel.send(message)

    # --- saying what happens ------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self.journal.log("say", text=text)
        for shim in self.shims.values():
            if shim.request["place"]["local_rank"] == 0:
                shim.channel.send({"kind": "say", "text": text})


def _launcher_variables(place: dict[str, Any]) -> dict[str, str]:
    """What libraries expect in the environment of a rank."""
    return {
        "RANK": str(place["rank"]),
        "WORLD_SIZE": str(place["world_size"]),
        "LOCAL_RANK": str(place["local_rank"]),
        "LOCAL_SIZE": str(place["local_world_size"]),
        "LOCAL_WORLD_SIZE": str(place["local_world_size"]),
        "MASTER_ADDR": place["master_addr"],
        "MASTER_PORT": str(place["master_port"]),
    }


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The worker agent of a job on this machine; started by its slot processes."
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--arena", type=Path, required=True)
    parser.add_argument("--lock", type=int, required=True, help="descriptor that holds the lock on agent.lock")
    options = parser.parse_args()
    os.set_inheritable(options.lock, False)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)  # seen through the wakeup descriptor
    processes.adopt_orphans()
    Agent(options.run_dir, options.arena).run()


if __name__ == "__main__":
    main()
