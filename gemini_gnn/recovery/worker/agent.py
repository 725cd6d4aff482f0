"""The worker agent: one per machine and job, light, detached; owns the warm parent, the trainers and the arena folder.

Ownership. The agent holds the flock on ``agent.lock`` from before its exec: the shim that starts it passes the descriptor.
So at most one agent lives per job and machine, and it owns everything in the arena folder. The agent of rank 0's machine
also holds the newest term of the run directory (``terms.py``): no other machine, user or arena can run the same job. The
agent is a loop over sockets, with a thread for the beats of its term. ``decisions.py`` decides; ``children.py`` handles warm
parent and trainers, which are the agent's children. The agent itself is a child of init.

Interruptions. The agent may be killed at any instruction. The kernel then kills the warm parent and the trainers
(PDEATHSIG), closes the shims' sockets and drops the lock. The shims start another agent. Before it forks, that agent waits
until no trainer of the old one lives (``locks.living_trainer``). Shims and trainers may die between any two messages: a
closed socket is an event like the others. Messages to or from a dead process may be lost. A signal is never lost: the
agent sees it through a descriptor that exists before the handler does.

Only processes of the same user may send requests: the folder is 0700, the socket 0600, and the agent asks the kernel for
the peer's uid. The agent logs a bad message and closes its connection; other connections go on.
"""

from __future__ import annotations

import argparse
import mmap
import os
import selectors
import signal
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemini_gnn.cluster.place import Place, check_place, launcher_variables
from gemini_gnn.errors import GeminiError
from gemini_gnn.observe import terms
from gemini_gnn.observe.status import read_status
from gemini_gnn.recovery import board, home, messages, processes
from gemini_gnn.recovery.worker import decisions, hangs, out_of_memory
from gemini_gnn.recovery.worker.children import Children
from gemini_gnn.recovery.worker.decisions import Failure, Limits, Outcome
from gemini_gnn.recovery.worker.journal import Journal
from gemini_gnn.snapshot.store import locks

NOBODY_S = 30.0  # then an agent without a job ends
REAP_ORPHANS_S = 5.0  # until killed children are gone


@dataclass
class Shim:
    """A slot process that waits for the outcome, with its request."""

    channel: messages.Channel
    request: messages.Register


class Agent:
    """The loop and its handles. Decisions are made from ``state``, which is None until the first shim registers."""

    def __init__(self, run_dir: Path, arena: Path):
        self.run_dir, self.arena, self.job = run_dir, arena, home.job_id(run_dir)
        self.machine = os.uname().nodename
        self.since_s = time.time()
        self.term = 0
        self.state: decisions.State | None = None
        self.outcome: Outcome | None = None
        self.nobody = Outcome("stopped", 1, "no slot process came")  # the outcome if there is never a job
        self.nobody_s = time.monotonic() + NOBODY_S
        self.beats: terms.Beats | None = None  # of the agent that holds the term
        self.arena_gone = False
        self.request: messages.Register | None = None  # of the first shim; all share most of it
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
        self.children = Children(arena, self.job, self.journal, self.selector)
        self.killed = out_of_memory.Counter(out_of_memory.own_cgroup())
        self.hang_limits = hangs.Limits()
        self.board: mmap.mmap | None = None  # of this generation's trainers
        self.watch: hangs.Watch | None = None

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the job has ended on this machine, or no shim has come."""
        while self.outcome is None:
            self.selector.select(self._patience_s())
            for number in self._signals():
                if number == signal.SIGTERM:
                    self._see(decisions.StopAsked("SIGTERM: this machine leaves", 128 + signal.SIGTERM))
            # Before requests to stop: a trainer that listens is asked.
            for event in self.children.read(time.monotonic()):
                self._see(self._explained(event))
            self._look_at_board()
            self._accept()
            self._read_visitors()
            self._read_shims()
            self._see(decisions.Tick())
            self._look_at_arena()
            self._look_at_term()
            if self.state is None and not self.visitors and time.monotonic() > self.nobody_s:
                break  # the shim that started us died before it registered, or was refused
        self._end()

    def _explained(self, event: decisions.Event) -> decisions.Event:
        """An exit by SIGKILL, with whether memory was short."""
        if isinstance(event, decisions.Exited) and event.code == -signal.SIGKILL:
            return replace(event, why=self.killed.why())
        return event

    def _look_at_board(self) -> None:
        if self.board is None or self.state is None or self.state.phase is not decisions.Phase.RUNNING:
            return
        boards = {rank: board.read(self.board, self._page(rank)) for rank in self.state.alive}
        self.watch, hang = hangs.look(self.watch, boards, time.monotonic(), self.hang_limits)
        if hang is not None and self.state.deadline is None:
            seen = {rank: one and {**vars(one), "phase": one.phase.word} for rank, one in boards.items()}
            stopped = [rank for rank in sorted(boards) if self.children.is_stopped(rank)]
            words = hang.words
            if stopped:  # of several in one collective these are to blame
                words += f"; stopped by a signal or a debugger: rank {', '.join(map(str, stopped))}"
            self.journal.log("hang", ranks=hang.ranks, stopped=stopped, text=words, boards=seen)
            self._see(decisions.Hung((stopped or hang.ranks)[0], words))

    def _page(self, rank: int) -> int:
        """The local rank."""
        shim = self.shims.get(rank)
        assert self.state is not None
        return shim.request.place.local_rank if shim else sorted(self.state.registered).index(rank)

    def _look_at_arena(self) -> None:
        """Say so once if the arena was removed: the job runs on, but its snapshots are lost."""
        if self.arena_gone or (self.arena / home.AGENT_SOCKET).exists():
            return
        self.arena_gone = True
        self._say(
            f"{self.arena} has been removed while the job runs: its snapshots are lost. No request can reach this worker "
            f"agent; to end it, send SIGTERM to process {os.getpid()}. systemd-logind removes it at your last logout, unless "
            "RemoveIPC=no or `loginctl enable-linger`"
        )

    def _look_at_term(self) -> None:
        """End the job if another start took the run directory while this agent looked dead."""
        if self.beats is not None and self.beats.lost and self.journal.speaks_for_job:
            self.journal.speaks_for_job = False
            text = "another start took run_dir while this worker agent did not run or could not write there"
            self._see(decisions.StopAsked(text, 2, force=True))

    def _patience_s(self) -> float:
        if self.children.has_news:
            return 0.0
        deadline = self.state.deadline if self.state else None
        patience_s = self.hang_limits.tick_s if self.board is not None else 1.0
        return patience_s if deadline is None else min(patience_s, max(0.0, deadline - time.monotonic()))

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
                assert self.request is not None
                self.children.start_warm(self.request.preload, self.request.path)
            case decisions.Fork(generation, ranks):
                self.journal.status("running", generation=generation)
                self.journal.write_errors(None)
                self._fork(generation, sorted(ranks))
            case decisions.AskToStop(ranks):
                self.children.ask_to_stop(ranks)
            case decisions.DumpStacks(ranks):
                self.children.dump_stacks(ranks)
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
            channel = messages.Channel(sock, messages.TO_AGENT)
            self.selector.register(channel, selectors.EVENT_READ)
            self.visitors.append(channel)

    def _forget(self, channel: messages.Channel) -> None:
        if channel.complaint is not None:
            self.journal.log("message_refused", pid=messages.peer(channel.sock)[0], text=str(channel.complaint))
        self.selector.unregister(channel)
        channel.close()

    def _read_visitors(self) -> None:
        for channel in list(self.visitors):
            for message in channel.receive():
                if isinstance(message, messages.Register):
                    self._register(channel, message)
                elif isinstance(message, messages.Stop):
                    self._stop_asked(channel, message)
            if isinstance(channel.complaint, messages.OtherProtocol):
                text = (
                    f"the worker agent of this job (pid {os.getpid()} on {self.machine}) speaks protocol "
                    f"{messages.PROTOCOL}, this program {channel.complaint}: use the installation of gemini_gnn that "
                    "started the job, or end the job by SIGTERM to its worker agent"
                )
                self._refuse(channel, text)
                channel.closed = True
            if channel.closed and channel in self.visitors:
                self.visitors.remove(channel)
                self._forget(channel)

    def _read_shims(self) -> None:
        for rank, shim in list(self.shims.items()):
            for message in shim.channel.receive():
                if isinstance(message, messages.Stop):
                    self._stop_asked(shim.channel, message)
            if shim.channel.closed:
                del self.shims[rank]
                self._forget(shim.channel)
                self.journal.log("shim_lost", rank=rank)
                self._see(decisions.StopAsked(f"the slot process of rank {rank} is gone", 128 + signal.SIGKILL))

    def _stop_asked(self, channel: messages.Channel, message: messages.Stop) -> None:
        asked = decisions.StopAsked(message.reason, message.code, keep=message.keep, force=message.force)
        self.journal.log("stop_asked", pid=messages.peer(channel.sock)[0], reason=asked.reason, force=asked.force)
        self._see(asked)

    def _refuse(self, channel: messages.Channel, text: str) -> None:
        channel.send(messages.Refused(2, text))
        self.journal.log("refused", pid=messages.peer(channel.sock)[0], text=text)

    def _register(self, channel: messages.Channel, request: messages.Register) -> None:
        if self.outcome is not None or (self.state is not None and decisions.may_be_ending(self.state)):
            channel.send(messages.Ending())
            return
        try:
            check_place(request.place)
            if self.state is None:
                self._begin(request)
        except GeminiError as error:
            self._refuse(channel, str(error))
            if self.state is None:
                self.nobody, self.nobody_s = Outcome("failed", 2, str(error)), time.monotonic()
            return
        if (problem := self._not_of_this_launch(request)) is not None:
            self._refuse(channel, problem)
            return
        rank = request.place.rank
        self.visitors.remove(channel)
        self.shims[rank] = Shim(channel, request)
        log = self.journal.log_of(rank)
        channel.send(messages.Accepted(self.term, os.fspath(log), _size_bytes(log)))
        self.journal.log("registered", rank=rank, pid=request.pid)
        self._see(decisions.Registered(rank))

    def _not_of_this_launch(self, request: messages.Register) -> str | None:
        """Why this slot process cannot be one of the launch that runs; None if it is."""
        assert self.state is not None and self.request is not None
        place, first = request.place, self.request.place
        if request.launch != self.request.launch or place.rank in self.state.registered:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_s))
            return (
                f"this job is already running on {self.machine}: worker agent pid {os.getpid()}, since {since}; "
                f"stop it with `python launch/stop.py run_dir={self.run_dir}`, or give another run_dir=..."
            )
        if (place.world_size, place.local_world_size) != (first.world_size, first.local_world_size):
            return (
                f"expected {first.local_world_size} of {first.world_size} ranks on {self.machine}, as rank {first.rank} "
                f"says; rank {place.rank} says {place.local_world_size} of {place.world_size}"
            )
        return None

    # --- the beginning ------------------------------------------------------------------------------------------------

    def _begin(self, request: messages.Register) -> None:
        """Begin the job that the first shim describes.

        Raises:
            RunDirError, RecoveryError: the run directory or the arena refuses; nothing has begun.
        """
        place, limits = request.place, replace(self.limits, max_restarts=request.max_restarts)
        # If the agent before us died while it cleaned up, the work is done: a script must not begin again.
        before, status = terms.newest_term(self.run_dir), read_status(self.run_dir)
        if request.deaths > 0 and status.get("state") == "done" and status.get("term") == before.get("term"):
            # Claim no term: the next slot may come to another agent, which must also see that the work is done.
            self.term = self.journal.term = before.get("term", 0)
            self._earlier_trainer(limits.reap_s)
            self.request = request
            self.state = decisions.State(place.local_world_size, place.world_size, limits)
            self.outcome = Outcome("done", 0, "done", keep=False)
            return
        self._claim_term(request)
        stuck = self._earlier_trainer(limits.reap_s)
        if stuck is None:
            self._clear_arena(request)
        # From here on there is a job. All that can refuse it is above.
        self.request = request
        # The rank that all others wait for may be on another machine, whose boards are not seen here.
        sees_all = place.local_world_size == place.world_size
        self.hang_limits = hangs.Limits(request.hang_factor if sees_all else 0.0, request.hang_floor_s)
        # If an agent of this launch died, these trainers are not the first generation: the work may be complete.
        self.state = decisions.State(place.local_world_size, place.world_size, limits, generation=request.deaths)
        self.journal.status("starting")
        if stuck is not None:
            text = (
                f"process {stuck}, a trainer of this job's last term, is still there after SIGKILL: it is stuck in the "
                "kernel (a dead file system or device?); wait for it or restart this machine"
            )
            self._see(decisions.WarmRefused(Failure(-1, 1, time.monotonic(), text, text)))
            return
        self.children.start_warm(request.preload, request.path)

    def _claim_term(self, request: messages.Register) -> None:
        """If rank 0 is on this machine, take the run directory: no other machine, user or arena may run the job."""
        place = request.place
        if place.rank != place.local_rank:
            # The ranks agree on the newest term of any machine (snapshot/session.py): on that of rank 0's.
            self.term = terms.newest_term(self.run_dir).get("term", 0)
        elif self.beats is None:
            owner = f"the worker agent on {self.machine}, pid {os.getpid()}, with its snapshots in {self.arena.parent}"
            claim: dict[str, Any] = {"owner": owner, "launch": request.launch, "world_size": place.world_size}
            claim |= {"local_world_size": place.local_world_size, "arena_root": os.fspath(self.arena.parent.parent)}
            self.term = terms.claim_term(self.run_dir, claim, say=self._say)
            self.beats = terms.Beats(self.run_dir, self.term)
            self.journal.speaks_for_job = True
        self.journal.term = self.term
        self.journal.log(
            "started", term=self.term, pid=os.getpid(), arena=os.fspath(self.arena), command=request.command
        )

    def _clear_arena(self, request: messages.Register) -> None:
        """Remove snapshots that this job must not resume from. No trainer of an earlier term lives."""
        run = terms.run_id(self.run_dir)
        several = request.place.local_world_size < request.place.world_size
        reason = home.why_forget(self.arena, run, request.resume, several)
        if reason and home.snapshot_files(self.arena):
            _, size_bytes = home.remove_snapshots(self.arena)
            self.journal.log("snapshots_removed", bytes=size_bytes, reason=reason)
        home.assign(self.arena, run)

    def _earlier_trainer(self, patience_s: float) -> int | None:
        """Kill the processes of the last term, which may not write any more. Returns the pid of a trainer that stays."""
        deadline = time.monotonic() + patience_s
        killed, gone = processes.kill_marked(self.arena, patience_s)
        if killed:
            self.journal.log("leftovers_killed", processes=killed, gone=gone)
        while (pid := locks.living_trainer(self.arena)) is not None and time.monotonic() < deadline:
            time.sleep(0.005)
        return pid

    def _fork(self, generation: int, ranks: list[int]) -> None:
        assert self.state is not None and self.request is not None
        requests = {rank: self.shims[rank].request if rank in self.shims else self.request for rank in ranks}
        places = {rank: request.place for rank, request in requests.items()}
        listening = []
        if self.state.local == self.state.world:
            # All ranks are here, so the agent chooses the store's port: it listens before any client connects.
            store = socket.create_server(("127.0.0.1", 0), backlog=1024)
            port = store.getsockname()[1]
            places = {rank: replace(place, master_addr="127.0.0.1", master_port=port) for rank, place in places.items()}
            listening = [store.detach()]
        tasks = {rank: self._task(generation, places[rank], requests[rank]) for rank in ranks}
        if listening:
            tasks[0] = replace(tasks[0], descriptors=listening)
        self._make_board()
        self.children.fork(tasks)

    def _make_board(self) -> None:
        """For the trainers of the generation that is to be forked. Without room for it they run all the same, unseen."""
        assert self.state is not None
        self.killed.why()  # who was killed before this generation is none of it
        self.watch = None
        try:
            board.make(self.arena, self.state.local)
        except OSError as error:
            self.journal.log("board_failed", error=error.strerror)
        self.board = board.open_board(self.arena)

    def _task(self, generation: int, place: Place, request: messages.Register) -> messages.Task:
        """The trainer of ``place``."""
        assert self.request is not None
        # `never` removed the snapshots when this term began, so a restart resumes. The first shim's request counts for all
        # ranks: after the death of an agent, only some shims may have changed theirs.
        resume = "auto" if generation > 1 and self.request.resume == "never" else self.request.resume
        return messages.Task(
            place=place,
            target=request.target,
            payload=request.payload,
            environment=request.environment | launcher_variables(place) | dict([processes.mark(self.arena)]),
            folder=request.folder,
            path=request.path,
            command=request.command,
            cores=request.cores,
            log=os.fspath(self.journal.log_of(place.rank)),
            job=self.job,
            arena=os.fspath(self.arena),
            term=self.term,
            generation=generation,
            resume=resume,
            sharing=sum(shim.request.cores == request.cores for shim in self.shims.values()),
        )

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Clean up, then report: when a command returns, nothing of the job is left but what the report names."""
        outcome = self.outcome or self.nobody
        if not self.children.end(REAP_ORPHANS_S):
            self.journal.log("children_left", reason="not reaped in time")
        self.listener.close()
        state = "failed" if outcome.kind == "lost" else outcome.kind
        self.journal.status(state, reason=outcome.reason, exit_code=outcome.code)  # before the snapshots are removed
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
        if self.beats is not None:
            self.beats.stop()  # from here on another agent may write into the run directory
        home.leave_arena(self.arena)  # from here on another agent may own the arena
        message = messages.Ended(
            outcome=outcome.kind,
            code=outcome.code,
            reason=outcome.reason,
            rank=failure.rank if failure else None,
            text=failure.text if failure else "",
            kept_files=kept,
            dropped_bytes=dropped[1],
        )
        for channel in [shim.channel for shim in self.shims.values()] + self.visitors:
            channel.send(message)

    # --- saying what happens ------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self.journal.log("say", text=text)
        speaking = [shim.channel for shim in self.shims.values() if shim.request.place.local_rank == 0]
        for channel in speaking or self.visitors:  # a start that has to wait has no registered shim yet
            channel.send(messages.Say(text))


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
