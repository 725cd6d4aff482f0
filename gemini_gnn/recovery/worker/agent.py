"""The worker agent: one per machine and job, light, detached; owns the warm parent, the trainers and the arena folder.

Ownership. The agent holds the flock on ``agent.lock`` from before its exec: the shim that starts it passes the descriptor.
So at most one agent lives per job and machine, and it owns everything in the arena folder. One agent also runs the root
(``root/service.py``), in the same loop, and holds the newest term of the run directory (``terms.py``): no other machine,
user or arena can run the same job. At first that is the agent of rank 0's machine. One thread runs a loop over sockets;
another only writes files (``journal.py``), and one beats for the term. ``decisions.py`` decides what it does by itself, and
the root what it does for the job; ``children.py`` handles warm parent and trainers, which are the agent's children. The
agent is a child of init.

Interruptions. The agent may be killed at any instruction. The kernel then kills the trainers
(PDEATHSIG), closes its sockets and drops the lock. Its warm parent becomes the next agent (``warm.py``), or else the shims
start one. Before that joins the root, it waits until no trainer of the old one lives (``locks.living_trainer``). Shims and
trainers may die between any two messages: a
closed socket is an event like the others. Messages to or from a dead process may be lost. A signal is never lost: the
agent sees it through a descriptor that exists before the handler does.

Without a root. See ``allegiance.py``. A request to stop that comes meanwhile ends the job on this machine at once.

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

from gemini_gnn.cluster.place import Place, check_master, check_place, launcher_variables
from gemini_gnn.errors import ConfigError, GeminiError
from gemini_gnn.observe import terms, votes
from gemini_gnn.recovery import board, home, messages, processes
from gemini_gnn.recovery.outcome import Failure, Outcome, failed
from gemini_gnn.recovery.worker import beginning, decisions, harm, out_of_memory
from gemini_gnn.recovery.worker.allegiance import Allegiance
from gemini_gnn.recovery.worker.children import Children, Warm
from gemini_gnn.recovery.worker.copies import Copies
from gemini_gnn.recovery.worker.decisions import Limits
from gemini_gnn.recovery.worker.journal import Journal

NOBODY_S, HEIR_NOBODY_S = 30.0, 5.0  # then an agent without a job ends; of an heir the slot processes live, or are gone
REAP_ORPHANS_S = 5.0  # until killed children are gone
JOURNAL_S = 5.0  # until the last records are written


@dataclass
class Shim:
    """A slot process that waits for the outcome, with its request."""

    channel: messages.Channel
    request: messages.Register


class Agent:
    """The loop and its handles. Decisions are made from ``state``, which is None until the first shim registers."""

    def __init__(self, run_dir: Path, arena: Path, warm: Warm | None = None):
        self.run_dir, self.arena, self.job = run_dir, arena, home.job_id(run_dir)
        self.machine = os.uname().nodename
        self.since_s = time.time()
        self.state: decisions.State | None = None
        self.outcome: Outcome | None = None
        self.nobody = Outcome("stopped", 1, "no slot process came")  # the outcome if there is never a job
        self.nobody_s = time.monotonic() + (NOBODY_S if warm is None else HEIR_NOBODY_S)
        self.arena_gone = False
        self.request: messages.Register | None = None  # of the first shim; all share most of it
        self.shims: dict[int, Shim] = {}  # by slot
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
        if warm is not None:
            self.children.adopt(warm)
        self.killed = out_of_memory.Counter(out_of_memory.own_cgroup())
        self.board: mmap.mmap | None = None  # of this generation's trainers
        self.ranks: list[int] = []  # of this generation's trainers, by slot
        self.allegiance = Allegiance(run_dir, arena, self.journal, self.selector)
        self.store: socket.socket | None = None  # of the next generation, on the machine of rank 0
        self.copies: Copies | None = None  # once there is a job
        self.stepped = False  # a trainer here has done a step
        self.ending = False  # a shim that comes now should ask again
        self.told = False  # the root said how the job ended
        self.away = ["the others"]  # machines that do not know of it
        self.beaten_s = 0.0

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the job has ended on this machine, or no shim has come."""
        while self.outcome is None:
            self.selector.select(self._patience_s())
            for number in self._signals():
                if number == signal.SIGTERM:
                    self._leave_or_stop(messages.Stop("SIGTERM: this machine leaves", 128 + signal.SIGTERM))
            # Before requests to stop: a trainer that listens is asked.
            for event in self.children.read(time.monotonic()):
                self._see(self._explained(event))
            self._accept()
            self._read_visitors()
            self._read_shims()
            self._see(decisions.Tick())
            self._look_at_root(time.monotonic())
            if self.copies is not None:
                self.copies.look(time.monotonic())
            self._look_at_arena()
            self._look_at_journal()
            self._look_at_term()
            if self.state is None and not self.visitors and time.monotonic() > self.nobody_s:
                break  # the shim that started us died before it registered, or was refused
        self._end()

    def _patience_s(self) -> float:
        now = time.monotonic()
        waits = [1.0]
        if self.children.has_news:
            waits.append(0.0)
        if self.state is not None and self.state.deadline is not None:
            waits.append(self.state.deadline - now)
        waits.append(self.allegiance.patience_s(now))
        if (welcome := self.allegiance.welcome) is not None:
            waits.append(self.beaten_s + welcome.heartbeat_s - now)
        if self.copies is not None:
            waits.append(self.copies.patience_s(now))
        return max(0.0, min(waits))

    def _signals(self) -> bytes:
        try:
            return os.read(self.wakeup, 4096)
        except BlockingIOError:
            return b""

    def _explained(self, event: decisions.Event) -> decisions.Event:
        """An exit by SIGKILL, with whether memory was short."""
        if isinstance(event, decisions.Exited) and event.code == -signal.SIGKILL:
            return replace(event, why=self.killed.why())
        return event

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

    def _look_at_journal(self) -> None:
        if 0 in self.shims and (news := self.journal.news()):  # else nobody would hear it
            self._say(news)

    def _look_at_term(self) -> None:
        """End the job if another start took the run directory while this agent looked dead."""
        root = self.allegiance.root
        if root is not None and root.lost_to_another_start and self.journal.speaks_for_job:
            self.journal.speaks_for_job = False
            text = "another start took run_dir while this worker agent did not run or could not write there"
            self._stop(messages.Stop(text, 2, force=True))

    def _see(self, event: decisions.Event) -> None:
        """Decide on ``event`` and act."""
        if self.state is None:
            return
        now = time.monotonic()
        self.state, actions = decisions.decide(self.state, event, now)
        for action in actions:
            self._act(action, now)

    def _act(self, action: decisions.Action, now: float) -> None:
        match action:
            case decisions.StartWarm():
                assert self.request is not None
                self._start_warm(self.request)
            case decisions.Fork():
                pass  # Begin says how; see _begin_generation
            case decisions.Kill(ranks):
                self.children.kill(ranks)
            case decisions.TellReady(ready):
                self._tell(messages.Able(ready))
            case decisions.TellUnable(failure):
                self._tell(messages.Unable(_aged(failure, now)))
            case decisions.TellStuck(text):
                self._tell(messages.Stuck(text))
            case decisions.Tell(decisions.Listens(rank), generation):
                self._tell(messages.RankListens(rank, generation))
            case decisions.Tell(decisions.Failed(failure), generation):
                self._beat(now)
                self._tell(messages.RankFailed(_aged(failure, now), generation))
            case decisions.Tell(decisions.Exited(rank, code, why), generation):
                self._beat(now)  # the root counts failures by how far the trainers were
                self._tell(messages.RankExited(rank, generation, code, why))
            case decisions.Say(text):
                self._say(text)

    # --- the root -----------------------------------------------------------------------------------------------------

    def _tell(self, message: messages.Message) -> None:
        self.allegiance.tell(message)

    def _look_at_root(self, now: float) -> None:
        if self.outcome is not None:
            return
        for message in self.allegiance.look(lambda: self._join(now), self._fence, now):
            self._obey(message, now)
        if (news := self.allegiance.news(now)) != "":
            self._say(news)
        self.outcome = self.outcome or self.allegiance.outcome or self.allegiance.given_up(now)
        welcome = self.allegiance.welcome
        if welcome is not None and now - self.beaten_s >= welcome.heartbeat_s:
            self._beat(now)

    def _fence(self) -> None:
        """The root is lost: its trainers here may do nothing more."""
        assert self.copies is not None
        self.store = None
        self._see(decisions.Close())
        self.copies.fence()

    def _join(self, now: float) -> messages.Join | None:
        """This machine. Not while a trainer lives here: it is of a root that is lost."""
        assert self.request is not None and self.state is not None and self.copies is not None
        if self.state.alive:
            return None
        place, unable = self.request.place, self.state.unable
        return messages.Join(
            machine=self.allegiance.number,
            name=self.machine,
            pid=os.getpid(),
            world_size=place.world_size,
            local_world_size=place.local_world_size,
            ready=self.state.ready,
            unable=None if unable is None else _aged(unable, now),
            address=self.allegiance.address if place.machines > 1 else "",
            port=self.copies.port,
            root_port=self.allegiance.root_port,
            start=self.allegiance.start,
            generation=self.state.generation,
            reached=self.allegiance.reached,
            disk=self.allegiance.private.disk if self.allegiance.private else "",
            newest=self.allegiance.newest,
        )

    def _vote(self, asked: messages.Vote) -> None:
        """In the loop: a machine whose own disk hangs is to fall silent."""
        try:
            self._tell(self.allegiance.vote(asked))
        except OSError as error:
            self._say(f"{self.machine} cannot vote: {self.run_dir}: {error.strerror}")

    def _bind(self, number: int) -> None:
        """The store listens before any trainer is forked: a client that came first would lose half a second."""
        if self.store is not None:
            self.store.close()
        address = self.allegiance.address
        self.store = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        try:
            self.store.bind((address, 0))
            self.store.listen(1024)
            self._tell(messages.Bound(number, self.store.getsockname()[1]))
        except OSError as error:
            self._tell(messages.Bound(number, 0, f"{address}: {error.strerror}"))

    def _obey(self, message: messages.Message, now: float) -> None:
        match message:
            case messages.Refused(_, text):
                self.outcome = failed(text, now, 2)
            case messages.RootBeat(ending):
                self.ending = ending
            case messages.Bind(number):
                self._bind(number)
            case messages.Begin():
                self._begin_generation(message)
            case messages.Close():
                self._see(decisions.Close())
            case messages.AskToStop():
                self.children.ask_to_stop(list(self.children.trainers))
            case messages.DumpStacks():
                self.children.dump_stacks(list(self.children.trainers))
            case messages.Say(text):
                self._say(text)
            case messages.Commit():
                self._commit(message)
            case (
                messages.Survey()
                | messages.Look()
                | messages.AskCheckpoints()
                | messages.Fetch()
                | messages.Load()
                | messages.Advance()
                | messages.PersistAt()
                | messages.Persist()
                | messages.Complete()
            ):
                assert self.copies is not None
                self.copies.obey(message, self.board, now)
            case messages.Vote():
                self._vote(message)
            case messages.Finish(outcome, away):
                self.outcome, self.away, self.told = outcome, away, True

    def _commit(self, order: messages.Commit) -> None:
        assert self.request is not None
        place, done = self.request.place, True
        try:
            said = harm.commit(order.fault, self.children, master_addr=place.master_addr, machines=place.machines)
        except (ConfigError, OSError) as error:  # a program of another user by now, or no more processes
            said, done = str(error), False
        self._tell(messages.Committed(order.ask, done, said))

    def _beat(self, now: float) -> None:
        """Say that this machine lives, and what its trainers do."""
        self.beaten_s = now
        boards: dict[int, board.Board] = {}
        if self.board is not None:
            for slot, rank in enumerate(self.ranks):
                if (seen := board.read(self.board, slot)) is not None:
                    boards[rank] = board.aged(seen, now)
                    self.allegiance.reached = max(self.allegiance.reached, seen.step)
        if self.copies is not None:
            self.copies.look_at_held(list(boards.values()))
        if not self.stepped and any(one.milestones[board.Milestone.STEPPED] is not None for one in boards.values()):
            self.stepped = True
            for shim in self.shims.values():
                shim.channel.send(messages.Stepped())
        stopped = [rank for rank in self.ranks if self.children.is_stopped(rank)]
        self._tell(messages.Beat(boards, stopped, home.snapshot_bytes(self.arena)))

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
                    self._log_stop(channel, message)
                    self._stop(message)
                elif isinstance(message, messages.Inject | messages.Inspect):
                    self._visit_root(channel, message)
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

    def _visit_root(self, channel: messages.Channel, message: messages.Message) -> None:
        root = self.allegiance.root
        if root is None:
            self._refuse(channel, "no job has begun here yet, or its root agent is on another machine; try again")
            return
        self.visitors.remove(channel)
        self.selector.unregister(channel)
        root.visit(channel, message, time.monotonic())

    def _read_shims(self) -> None:
        for slot, shim in list(self.shims.items()):
            for message in shim.channel.receive():
                if isinstance(message, messages.Stop):
                    self._log_stop(shim.channel, message)
                    self._leave_or_stop(message)
            if shim.channel.closed:
                del self.shims[slot]
                self._forget(shim.channel)
                rank = shim.request.place.rank
                self.journal.log("shim_lost", rank=rank)
                self._leave_or_stop(messages.Stop(f"the slot process of rank {rank} is gone", 128 + signal.SIGKILL))

    def _log_stop(self, channel: messages.Channel, message: messages.Stop) -> None:
        self.journal.log("stop_asked", pid=messages.peer(channel.sock)[0], reason=message.reason, force=message.force)

    def _leave_or_stop(self, message: messages.Stop) -> None:
        """This machine is asked to end: one that has joined by itself leaves by itself, and the job goes on."""
        if self.request is None or not self.request.joins:
            self._stop(message)
        elif self.outcome is None:
            self.allegiance.leave()
            words = f"{message.reason}: {self.machine} leaves the job, which goes on without it"
            self.outcome = Outcome("stopped", message.code, words)

    def _stop(self, message: messages.Stop) -> None:
        """Ask the root to end the job. Without a root it ends here."""
        if self.allegiance.reaches_root:
            self.allegiance.ask_to_stop(message)
        elif self.outcome is None:
            self.outcome = Outcome("stopped", message.code, message.reason, keep=message.keep)

    def _refuse(self, channel: messages.Channel, text: str) -> None:
        channel.send(messages.Refused(2, text))
        self.journal.log("refused", pid=messages.peer(channel.sock)[0], text=text)

    def _register(self, channel: messages.Channel, request: messages.Register) -> None:
        if self.outcome is not None or self.ending:
            channel.send(messages.Ending())
            return
        try:
            check_place(request.place)
            if self.state is None:
                self._begin(request)
        except GeminiError as error:
            self._refuse(channel, str(error))
            if self.state is None:
                self.allegiance.refused()
                self.nobody, self.nobody_s = Outcome("failed", 2, str(error)), time.monotonic()
            return
        if (problem := self._not_of_this_launch(request)) is not None:
            self._refuse(channel, problem)
            return
        place = request.place
        self.visitors.remove(channel)
        self.shims[place.local_rank] = Shim(channel, request)
        log = self.journal.log_of(place.rank)
        channel.send(messages.Accepted(os.fspath(log), _size_bytes(log)))
        self.journal.log("registered", rank=place.rank, pid=request.pid)
        self._see(decisions.Registered(place.local_rank))

    def _not_of_this_launch(self, request: messages.Register) -> str | None:
        """Why this slot process cannot be one of the launch that runs; None if it is."""
        assert self.state is not None and self.request is not None
        place, first = request.place, self.request.place
        if request.launch != self.request.launch or place.local_rank in self.state.registered:
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
            ClusterError, RunDirError, RecoveryError: the network, the run directory or the arena refuses; nothing has begun.
        """
        place = request.place
        check_master(place)
        if votes.private(self.run_dir) is not None and not request.snapshot.folder:  # each disk would have a part of it
            request = replace(request, snapshot=replace(request.snapshot, persist_every="never"))
        done = self.allegiance.begin(request, self._say)
        spare = {self.children.warm.pid} if self.children.warm is not None else set[int]()
        stuck = beginning.kill_leftovers(self.arena, self.journal, self.limits.reap_s, spare)
        if stuck is None and not done:
            beginning.clear(self.run_dir, self.arena, request, self.journal)
        address, token = self.allegiance.address, self.allegiance.token
        copies = Copies(self.arena, self.job, request, address, token, self.journal, self.selector, self._tell)
        # From here on there is a job. All that can refuse it is above.
        now = time.monotonic()
        self.request = request
        self.state = decisions.State(1 if request.joins else place.local_world_size, self.limits)
        self.copies = copies
        self.allegiance.serve(request, now)
        self._look_at_root(now)
        if stuck is not None:
            text = (
                f"process {stuck}, a trainer of this job's last term, is still there after SIGKILL: it is stuck in the "
                "kernel (a dead file system or device?); wait for it or restart this machine"
            )
            self._see(decisions.WarmRefused(Failure(-1, 1, now, text, text)))
        elif not done:
            self._warm_up(request)

    def _warm_up(self, request: messages.Register) -> None:
        """Have a warm parent for this job: the one that this agent began with, if it has imported the same."""
        warm = self.children.warm
        if warm is None:
            self._start_warm(request)
        elif (warm.modules, warm.path) == (request.preload, request.path):
            self._see(decisions.WarmReady())
        else:
            os.kill(warm.pid, signal.SIGKILL)  # its end is an event: another one is started then

    def _start_warm(self, request: messages.Register) -> None:
        self.children.start_warm(request.preload, request.path, heir=request.recovery.same_step_failures > 0)

    def _begin_generation(self, begin: messages.Begin) -> None:
        assert self.state is not None and self.request is not None
        self.journal.write_errors(None)
        self.ranks = begin.ranks
        self._see(decisions.Begin(begin.generation, frozenset(begin.ranks)))
        self._make_board()
        assert self.copies is not None
        self.copies.begin(begin, self.journal.term, self.board)
        tasks = {}
        for slot, rank in enumerate(begin.ranks):
            request = self.shims[slot].request if slot in self.shims else self.request
            place = replace(
                request.place,
                rank=rank,
                world_size=begin.world_size,
                local_rank=slot,
                master_addr=begin.master_addr,
                master_port=begin.master_port,
            )
            tasks[rank] = self._task(begin, place, request)
        if 0 in tasks:
            assert self.store is not None
            tasks[0] = replace(tasks[0], descriptors=[self.store.detach()])
            self._show_rank_0()
        self.children.fork(tasks)
        self.store = None

    def _show_rank_0(self) -> None:
        """It may have run elsewhere until now: its output goes to the screen of this machine's first slot process."""
        if 0 in self.shims and self.shims[0].request.place.rank != 0:
            self.shims[0].channel.send(messages.Follow(os.fspath(self.journal.log_of(0))))

    def _make_board(self) -> None:
        """For the trainers of the generation that is to be forked. Without room for it they run all the same, unseen."""
        self.killed.why()  # who was killed before this generation is none of it
        try:
            board.make(self.arena, len(self.ranks))
        except OSError as error:
            self.journal.log("board_failed", error=error.strerror)
        self.board = board.open_board(self.arena)

    def _task(self, begin: messages.Begin, place: Place, request: messages.Register) -> messages.Task:
        """The trainer of ``place``."""
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
            term=self.journal.term,
            generation=begin.generation,
            resume=begin.resume,
            sharing=len(self.ranks)
            if request.joins
            else sum(shim.request.cores == request.cores for shim in self.shims.values()),
            replicas=begin.replicas,
            kept=begin.kept,
        )

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Clean up, then report: when a command returns, nothing of the job is left but what the report names."""
        outcome = self.outcome or self.nobody
        if self.copies is not None:
            self.copies.close()
        if not self.children.end(REAP_ORPHANS_S):
            self.journal.log("children_left", reason="not reaped in time")
        self.journal.write_errors(outcome.failure, set(self.ranks))
        status: dict[str, Any] = {}
        root = self.allegiance.root
        if root is not None:
            status = root.status(time.monotonic())
        elif self.allegiance.private is not None and self.told:  # nobody else writes into this run directory
            status, self.journal.speaks_for_job = dict(self.journal.mirrored), True
        visitors, beats = self.allegiance.close()
        self.visitors += visitors
        self.listener.close()
        status |= {"state": "failed" if outcome.kind == "lost" else outcome.kind}
        self.journal.status(**status | {"reason": outcome.reason, "exit_code": outcome.code})
        self.journal.flush(JOURNAL_S)  # before the snapshots are removed: the next agent must see that the work is done
        self._look_at_journal()
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
        if self.allegiance.private is not None and root is None and self.journal.mirrored:
            self.journal.writer.submit(terms.leave_term, self.run_dir, self.journal.mirrored["term"])
        self.journal.close(JOURNAL_S)
        if beats is not None:
            beats.stop()  # from here on another agent may write into the run directory
        home.leave_arena(self.arena)  # from here on another agent may own the arena
        message = messages.Ended(
            outcome=outcome.kind,
            code=outcome.code,
            reason=outcome.reason,
            rank=failure.rank if failure else None,
            text=failure.text if failure else "",
            machine=self._machine_of(failure.rank) if failure else "",
            kept_files=kept,
            dropped_bytes=dropped[1],
            told=self.told and root is None,
            away=self.away if self.request is not None and self.request.place.machines > 1 else [],
        )
        for channel in [shim.channel for shim in self.shims.values()] + self.visitors:
            channel.send(message)

    def _machine_of(self, rank: int) -> str:
        """Where this machine knows it, and the job has several."""
        root = self.allegiance.root
        if root is None or len(root.state.machines) == 1 or rank < 0:
            return ""
        return root.state.name(root.state.machine_of(rank))

    # --- saying what happens ------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self.journal.log("say", text=text)
        speaking = [shim.channel for shim in self.shims.values() if shim.request.place.local_rank == 0]
        for channel in speaking or self.visitors:  # a start that has to wait has no registered shim yet
            channel.send(messages.Say(text))


def _aged(failure: Failure, now: float) -> Failure:
    """With its age in place of its time: the root has another clock."""
    return replace(failure, time_s=now - failure.time_s)


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def run(run_dir: Path, arena: Path, warm: Warm | None = None) -> None:
    """Be the worker agent, until the job has ended here. The caller holds the arena's lock.

    Args:
        warm: a child of this process that is a warm parent already.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    processes.adopt_orphans()
    processes.name_this(processes.AGENT_NAME)
    Agent(run_dir, arena, warm).run()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The worker agent of a job on this machine; started by its slot processes."
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--arena", type=Path, required=True)
    parser.add_argument("--lock", type=int, required=True, help="descriptor that holds the lock on agent.lock")
    options = parser.parse_args()
    os.set_inheritable(options.lock, False)
    run(options.run_dir, options.arena)


if __name__ == "__main__":
    main()
