"""The worker agent: one per machine and job, light, detached; owns the warm parent, the trainers and the arena folder.

Who owns what. The agent holds the flock on ``agent.lock`` from before its exec (the shim that started it passes the
descriptor on), so at most one lives per job and machine, and everything under the arena folder is its own. The agent of
rank 0's machine also holds a lock in the run directory, so that no other machine, user or arena runs the same job. It is
single-threaded: a loop over sockets, with the decisions in ``decisions.py`` and all that concerns warm parent and trainers
in ``children.py``. It is nobody's child (re-parented to init).

What may be interrupted where. The agent may be killed at any instruction: the kernel kills the warm parent and with it the
trainers (PDEATHSIG), closes the shims' sockets, drops the lock; the shims start another agent, which waits until the kernel
has finished with every trainer of the old one (``locks.living_trainer``) before it forks. Shims and trainers may vanish
between any two messages: a closed socket is an event like the others. Which message may be lost: any to or from a process
that died; that a signal came is never lost, because the descriptor it is seen through stands before its handler does.

Requests come from processes of the same user only: the folder is 0700, the socket 0600, and the kernel is asked for the
peer's uid. The shims' messages: register, stop; ours: accepted, refused, ending, say, outcome.
"""

from __future__ import annotations

import argparse
import os
import selectors
import signal
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemini_gnn.errors import GeminiError
from gemini_gnn.recovery import home, messages, processes
from gemini_gnn.recovery.worker import decisions
from gemini_gnn.recovery.worker.children import Children
from gemini_gnn.recovery.worker.decisions import Failure, Limits, Outcome
from gemini_gnn.recovery.worker.journal import Journal
from gemini_gnn.snapshot.store import locks

NOBODY_S = 30.0  # an agent without a job ends after it
REAP_ORPHANS_S = 5.0  # for killed children to be gone


@dataclass
class Shim:
    """A slot process that waits for the outcome; ``request`` is its ``register`` message."""

    channel: messages.Channel
    request: dict[str, Any]


class Agent:
    """The loop and its handles. What is decided from is ``state``; it is None until the first shim has spoken."""

    def __init__(self, run_dir: Path, arena: Path):
        self.run_dir, self.arena, self.job = run_dir, arena, home.job_id(run_dir)
        self.machine = os.uname().nodename
        self.since_s = time.time()
        self.term = 0
        self.state: decisions.State | None = None
        self.outcome: Outcome | None = None
        self.nobody = Outcome("stopped", 1, "nobody came")  # unless there is a job
        self.nobody_s = time.monotonic() + NOBODY_S
        self.run_dir_lock: int | None = None
        self.arena_gone = False
        self.request: dict[str, Any] = {}  # of the first shim: what all of them share
        self.shims: dict[int, Shim] = {}
        self.visitors: list[messages.Channel] = []  # connected, no registered shim (yet)
        self.journal = Journal(run_dir, self.machine)
        self.listener = messages.listen(arena / home.AGENT_SOCKET)
        self.wakeup, signalled = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # seen through the descriptor
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(self.wakeup, selectors.EVENT_READ)
        self.limits = Limits()
        self.children = Children(arena, self.job, self.journal, self.selector, self.limits.reap_s)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the job has ended on this machine, or nobody came."""
        while self.outcome is None:
            self.selector.select(self._patience_s())
            for number in self._signals():
                if number == signal.SIGTERM:
                    self._see(decisions.StopAsked("SIGTERM: this machine leaves", 128 + signal.SIGTERM))
            for event in self.children.read(time.monotonic()):  # before requests: who listens is asked, not killed
                self._see(event)
            self._accept()
            self._read_visitors()
            self._read_shims()
            self._see(decisions.Tick())
            self._look_at_arena()
            if self.state is None and not self.visitors and time.monotonic() > self.nobody_s:
                break  # the shim that started us died before it could speak, or was refused
        self._end()

    def _look_at_arena(self) -> None:
        """Somebody may have removed it under us: the job works on, but could not go on from it."""
        if self.arena_gone or (self.arena / home.AGENT_SOCKET).exists():
            return
        self.arena_gone = True
        self._say(
            f"{self.arena} has been removed while the job runs: its snapshots are lost, and nobody can reach this worker agent "
            f"(process {os.getpid()}, to be ended by SIGTERM). systemd-logind does so at your last logout, unless RemoveIPC=no "
            "or `loginctl enable-linger`"
        )

    def _patience_s(self) -> float:
        deadline = self.state.deadline if self.state else None
        return 1.0 if deadline is None else min(1.0, max(0.0, deadline - time.monotonic()))

    def _signals(self) -> bytes:
        try:
            return os.read(self.wakeup, 4096)
        except BlockingIOError:
            return b""

    def _see(self, event: decisions.Event) -> None:
        """Decide on ``event`` and act."""
        if self.state is None:
            if isinstance(event, decisions.StopAsked):
                self.outcome = Outcome("stopped", event.code, event.reason, keep=event.keep)
            return
        before = self.state
        self.state, actions = decisions.decide(before, event, time.monotonic())
        if self.state.phase is not before.phase:
            self.journal.log("phase", phase=self.state.phase, generation=self.state.generation, cause=self.state.cause)
        for action in actions:
            self._act(action)

    def _act(self, action: decisions.Action) -> None:
        match action:
            case decisions.StartWarm():
                self.children.start_warm(self.request["preload"], self.request["path"])
            case decisions.Fork(generation, ranks):
                self.journal.status("running", generation=generation)
                self.journal.write_errors(None)
                self._fork(generation, sorted(ranks))
            case decisions.AskToStop(ranks):
                self.children.ask_to_stop(ranks)
            case decisions.Kill(ranks):
                self.children.kill(ranks)
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
                time.sleep(0.1)  # it stays readable
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
                if message.get("protocol") != messages.PROTOCOL:
                    text = (
                        f"the worker agent of this job (pid {os.getpid()} on {self.machine}) speaks protocol "
                        f"{messages.PROTOCOL}, this program {message.get('protocol')}: use the installation of gemini_gnn that "
                        "started the job, or end the job by SIGTERM to its worker agent"
                    )
                    channel.send({"kind": "refused", "code": 2, "text": text})
                elif message.get("kind") == "register":
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
                self.nobody, self.nobody_s = Outcome("failed", 2, str(error)), time.monotonic()
                return
        assert self.state is not None
        if request["launch"] != self.request["launch"] or rank in self.state.registered:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_s))
            text = (
                f"this job is already running on {self.machine}: worker agent pid {os.getpid()}, since {since}; "
                f"stop it with `python launch/stop.py run_dir={self.run_dir}`, or give another run_dir=..."
            )
            channel.send({"kind": "refused", "code": 2, "text": text})
            self.journal.log("refused", rank=rank, pid=request["pid"])
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
        place = request["place"]
        if place["rank"] == place["local_rank"] and self.run_dir_lock is None:
            who = f"the worker agent on {self.machine}, pid {os.getpid()}, with its snapshots in {self.arena.parent}"
            self.run_dir_lock = home.take_run_dir(self.run_dir, who)
        run = home.run_id(self.run_dir)
        # The agent before us may have died while it cleaned up after the work was done: a script must not begin again.
        before, status = home.newest_term(self.run_dir), home.read_status(self.run_dir)
        was_done = request["deaths"] > 0 and status.get("state") == "done" and status.get("term") == before.get("term")
        limits = replace(self.limits, max_restarts=request["max_restarts"])
        self.journal.speaks_for_job = place["rank"] == place["local_rank"]
        if was_done:  # and must stay so for the next slot, which may come to an agent of its own: no term is claimed
            self.term = self.journal.term = before.get("term", 0)
            self._earlier_trainer(limits.reap_s)
            self.request = request
            self.state = decisions.State(place["local_world_size"], place["world_size"], limits)
            self.outcome = Outcome("done", 0, "done", keep=False)
            return
        claim = {"machine": self.machine, "pid": os.getpid(), "time": time.time(), "launch": request["launch"]}
        claim |= {key: place[key] for key in ("world_size", "local_world_size")}
        self.term = home.claim_term(self.run_dir, {**claim, "arena_root": os.fspath(self.arena.parent.parent)})
        self.journal.term = self.term
        self.journal.log(
            "started", term=self.term, pid=os.getpid(), arena=os.fspath(self.arena), command=request["command"]
        )
        stuck = self._earlier_trainer(limits.reap_s)
        if stuck is None:
            several = place["local_world_size"] < place["world_size"]
            reason = home.why_forget(self.arena, run, request["resume"], several)
            if reason and home.snapshot_files(self.arena):
                _, size_bytes = home.remove_snapshots(self.arena)
                self.journal.log("snapshots_removed", bytes=size_bytes, reason=reason)
            home.assign(self.arena, run)
        # From here on there is a job: nothing above may fail any more.
        self.request = request
        # Trainers of a launch whose agent died are no first generation: they may find its work complete.
        self.state = decisions.State(
            place["local_world_size"], place["world_size"], limits, generation=request["deaths"]
        )
        self.journal.status("starting")
        if stuck is not None:
            text = (
                f"process {stuck}, a trainer of this job's last term, is still there after SIGKILL: it is stuck in the "
                "kernel (a dead file system or device?); wait for it or restart this machine"
            )
            self._see(decisions.WarmRefused(Failure(-1, 1, time.monotonic(), text, text)))
            return
        self.children.start_warm(request["preload"], request["path"])

    def _earlier_trainer(self, patience_s: float) -> int | None:
        """Invariant 5 across the death of an agent: end what is left of the last term; the trainer that stays."""
        deadline = time.monotonic() + patience_s
        killed, gone = processes.kill_marked(self.arena, patience_s)
        if killed:
            self.journal.log("leftovers_killed", processes=killed, gone=gone)
        while (pid := locks.living_trainer(self.arena)) is not None and time.monotonic() < deadline:
            time.sleep(0.005)
        return pid

    def _fork(self, generation: int, ranks: list[int]) -> None:
        assert self.state is not None
        # With all ranks here the store's port is ours to choose: bound and listening before any client comes.
        store = None
        if self.state.local == self.state.world:
            store = socket.create_server(("127.0.0.1", 0), backlog=1024)
        tasks = {}
        for rank in ranks:
            request = self.shims[rank].request if rank in self.shims else self.request
            address = {} if store is None else {"master_addr": "127.0.0.1", "master_port": store.getsockname()[1]}
            tasks[rank] = self._task(generation, {**request["place"], **address}, request)
        self.children.fork(tasks, store)
        if store is not None:
            store.close()

    def _task(self, generation: int, place: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        """What the trainer of ``place`` is to become."""
        return {
            "kind": "fork",
            "place": place,
            "environment": {
                **request["environment"],
                **_launcher_variables(place),
                **dict([processes.mark(self.arena)]),
            },
            "log": os.fspath(self.journal.log_of(place["rank"])),
            "job": self.job,
            "arena": os.fspath(self.arena),
            "term": self.term,
            "generation": generation,
            # What `never` had to forget was removed when this term began; a restart must go on. One answer for all ranks: after
            # the death of an agent only some of their shims may know of it.
            "resume": "auto" if generation > 1 and self.request["resume"] == "never" else self.request["resume"],
            "sharing": sum(shim.request["cores"] == request["cores"] for shim in self.shims.values()),
            **{key: request[key] for key in ("target", "payload", "folder", "path", "command", "cores")},
        }

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Clean up first, then tell: when a command returns, nothing of the job is left but what it says."""
        outcome = self.outcome or self.nobody
        if not self.children.end(REAP_ORPHANS_S):
            self.journal.log("children_left", reason="not reaped in time")
        self.listener.close()
        state = "failed" if outcome.kind == "lost" else outcome.kind
        self.journal.status(state, reason=outcome.reason, exit_code=outcome.code)  # before what it says is removed
        dropped = (0, 0)
        if not outcome.keep:
            dropped = home.remove_snapshots(self.arena)
        elif home.holds_nothing(self.arena):  # of a start that failed before its first snapshot
            home.remove_snapshots(self.arena)
        kept = len(home.snapshot_files(self.arena))
        failure = outcome.failure
        self.journal.log(
            "ended", outcome=outcome.kind, code=outcome.code, reason=outcome.reason, dropped_bytes=dropped[1]
        )
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
    processes.adopt_orphans()
    Agent(options.run_dir, options.arena).run()


if __name__ == "__main__":
    main()
