"""The root agent: one per job, in the loop of a worker agent. ``decisions.py`` decides.

Ownership. The root holds the job's term and its beats, the listening socket at which the other machines' workers join, and one
connection per worker. The worker of its own machine is connected by a socket pair: one machine is a root with one worker, by
the same code. The root owns no process, and of files ``status.json`` and ``failures.jsonl``, which the journal's thread writes.
A thread claims terms (``claiming.py``): a file system that hangs delays the next generation, not the loop. Where each machine
has a run directory of its own, the machines vote first (``ballot.py``), and the root sends them what they are to keep in it.

Succession. A root may be killed at any instruction, or its machine lost. The other workers lose their connection, kill their
trainers, and look for a root; one of them becomes it (``worker/succession.py``). That one knows the machines and their seats
from the last root's Roster, and holds no term yet: it speaks for the job only after its claim. A root whose claim is refused,
or that sees a newer term, resigns: it sends its workers to the new one, and its own worker follows.

A worker may be lost between any two messages; the root then takes its trainers for living until the worker is back, or
another machine has its seat. A message to a lost worker is lost: whoever joins is told again. Within a connection no message is
lost, repeated or reordered.

Who is silent. The root hears a beat from each worker every `heartbeat_s`. A worker that says nothing for `silence_s` counts as
gone, and its connection is closed. It gets four times as long while the kernel of its machine acknowledges what it is sent: that
machine has power and network, only no time for its agent. A root that was itself late (stopped, or starved of the processor)
extends that by as much.

Why no two halves of a job ever train: see ``decisions.py``.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gemini_gnn.config import RecoveryConfig, SnapshotConfig
from gemini_gnn.observe import terms
from gemini_gnn.observe.failures import add_to_result
from gemini_gnn.recovery import messages, wire
from gemini_gnn.recovery.board import Board, dated
from gemini_gnn.recovery.outcome import Outcome
from gemini_gnn.recovery.root import ballot, decisions, hangs, report
from gemini_gnn.recovery.root import state as job
from gemini_gnn.recovery.root.claiming import Claim, Won
from gemini_gnn.recovery.root.copies import Copies
from gemini_gnn.recovery.root.faults import Agent, Faults
from gemini_gnn.recovery.root.ledger import Ledger
from gemini_gnn.recovery.root.probes import POLL_S, Probes
from gemini_gnn.recovery.root.restoring import Storage
from gemini_gnn.recovery.worker.journal import Journal

LEAVE_S = 10.0  # from the outcome to the end of the last other worker
ALONE_SILENCES = (
    2.0  # after so many times `silence_s` without a majority a root that cannot go on looks for another one
)
STRANGERS = 64  # connections at once that have not joined
DONE_S = 1.0  # for the last word in status.json
PERSIST_S = 20.0  # for the last snapshot to get to storage; a launcher gives its slot processes 30 s
CLAIM_POLL_S = 0.005
WAITS_S = 1.0  # then people hear for which machine the job waits: an heir comes sooner
FENCE_SILENCES = (
    1.0 + wire.STALLS
)  # after so many times `silence_s` a worker that has lost its root has killed its trainers
STATUS_S = 1.0  # between two versions of status.json while nothing changes
STATES = {  # the words of observe/status.py for a job that has not ended
    job.Phase.FORMING: "starting",
    job.Phase.PLANNING: "recovering",
    job.Phase.CLAIMING: "recovering",
    job.Phase.RUNNING: "running",
    job.Phase.RECOVERING: "recovering",
    job.Phase.WAITING: "waiting",
    job.Phase.STOPPING: "stopping",
    job.Phase.ENDING: "stopping",
    job.Phase.ENDED: "stopping",
}
SHOWN = 20  # failures in status.json; failures.jsonl has all


@dataclass
class Link:
    """A worker's connection, or a visitor's, who waits for an answer. ``machine`` is None until it has joined."""

    channel: messages.Channel
    heard_s: float
    machine: int | None = None
    pid: int = 0
    visits: bool = False
    beat: messages.Beat | None = None


class Root:
    """
    Attributes:
        state: of the job.
        term: that it holds; the newest that it knows of, if `state.claimed` is False.
        start: names this start of the job, over all its roots.
        beats: of the term; None before it is claimed.
        links: connections to workers, joined or not.
        voters: the disks whose majority grants terms, where machines share no run directory; else empty.
        finished: every other worker has been told the outcome, or cannot be.
        resigned: another root has the job.
    """

    def __init__(
        self,
        *,
        term: int,
        start: str,
        beats: terms.Beats | None,
        state: job.State,
        settings: RecoveryConfig,
        resume: str,
        launched: tuple[int, int],
        record: dict[str, Any],
        address: str,
        token: bytes,
        listener: socket.socket | None,
        ledger: Ledger,
        journal: Journal,
        faults: Faults,
        snapshot: SnapshotConfig,
        storage: Storage,
        selector: selectors.BaseSelector,
        now: float,
        members: Sequence[messages.Member] = (),
        voters: Sequence[str] = (),
    ):
        """
        Args:
            voters: as the attribute.
            members: as the last root knew them.
            launched: world size and local world size of the launch, standbys included.
            record: of this process, kept with the terms that it claims.
            address: of this machine, where the others reach ``listener``.
        """
        self.term, self.start, self.beats, self.state = term, start, beats, state
        self.settings, self.resume, self.launched, self.record = settings, resume, launched, record
        self.address, self.token = address, token
        self.listener, self.ledger, self.journal, self.selector = listener, ledger, journal, selector
        self.faults, self.voters = faults, frozenset(voters)
        self._disks: dict[int, str] = {}  # by machine, of those that have joined
        self._claimer = secrets.token_hex(8)  # names this root where machines vote
        self._ballot: tuple[ballot.Ballot, dict[str, Any]] | None = None  # under way, for the term of this record
        self._number = 0  # the last that was asked for
        self._alone_s = now  # when a majority of the voters was here last, or none was needed
        self.copies = Copies(
            snapshot, len(state.seats), state.local, self._send, self._say, journal, now, term=term, storage=storage
        )
        self.links: list[Link] = []
        self.finished = self.resigned = False
        self.members = {number: member for number, member in enumerate(members) if member.name}
        absent = {i: one for i, one in self.members.items() if i != state.root and not state.machines[i].silent}
        self._probes = Probes(absent if beats is None and not state.claimed else {}, now)
        self._step_s = 0.0  # of a step, as the last root said
        self._unsaid: list[str] = []  # before it speaks for the job
        self._claim: Claim | None = None
        self._claim_again: bool | None = None  # the seats have changed since the claim began; with a witness?
        self._bound: tuple[int, int] | None = None  # of the generation that is planned: number of the ask, and port
        self._said_waits = False
        self._planned: bool | None = None  # the planning is over: has it found a snapshot?
        self.away: list[str] = []  # machines that did not hear of the end
        ended = state.phase is job.Phase.ENDED
        self._ended_s = now if ended else None
        # Are to be told the outcome.
        self._leaving = set(range(len(state.machines))) - {state.root} if ended else set[int]()
        self._asked = 0  # number of the last Bind
        self._until_s = now  # after the end, for the last snapshot to be persisted
        self._ticked_s = self._beaten_s = self._reported_s = self._phase_s = now
        self._since = time.time()
        self._last: dict[str, Any] | None = None  # the status at the end
        self._hang_limits = hangs.Limits(settings.hang_factor, settings.hang_floor_s)
        self._watch: hangs.Watch | None = None
        self._fresh = set[int]()  # machines that have beaten since the last look for hangs
        self._word_s: float | None = None  # when the first sign of a failure of this generation came
        self._heard_last_s = now  # from the worker that was lost last
        self._total_steps = 0
        if listener is not None:
            selector.register(listener, selectors.EVENT_READ)

    def local_end(self, now: float) -> messages.Channel:
        """A connection for the worker of this machine."""
        here, there = messages.pair(messages.TO_ROOT)
        self._adopt(here, now)
        return messages.Channel(there, messages.TO_WORKER)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def patience_s(self, now: float) -> float:
        """How long the loop may wait for the next event."""
        waits = [self._beaten_s + self.settings.heartbeat_s - now]
        if self.state.deadline is not None:
            waits.append(self.state.deadline - now)
        if self._claim is not None:
            waits.append(CLAIM_POLL_S)
        if self._probes.under_way:
            waits.append(POLL_S)
        return max(0.0, min(waits))

    def tick(self, now: float) -> None:
        """Read what has come, decide, act. Never waits."""
        self._extend(now)
        self._accept(now)
        for link in list(self.links):
            for message in link.channel.receive():
                link.heard_s = now
                self._hear(link, message, now)
            if link.channel.closed and link in self.links:
                complaint = link.channel.complaint
                self._lost(link, "agent", "is gone" if complaint is None else f"is gone ({complaint})", now)
        for link in list(self.links):
            quiet_s = now - link.heard_s
            if (
                link in self.links
                and not link.visits
                and wire.is_silent(link.channel, quiet_s, self.settings.silence_s)
            ):
                self._lost(link, "silent", f"is silent for {quiet_s:.1f} s (recovery.silence_s)", now)
        if self._fresh:
            self._read_boards(now)
        for problem in self.faults.look(self._boards().values(), self.state, self._agents()):
            self._act(job.Say(problem), now)
        self._look_at_claim(now)
        self._look_for_majority(now)
        if self.resigned:
            return
        for machine in self._probes.look(now):
            self.journal.log("unreached", machine=machine)
            self._see(job.Unreached(machine), now)
        self._see(job.Tick(), now)
        if self.state.phase is job.Phase.WAITING and not self._said_waits and now - self._phase_s >= WAITS_S:
            self._say_waits(now)
        if self._ballot is not None and not self._said_waits and now - self._phase_s >= WAITS_S:
            self._said_waits = True
            granted, voters = len(self._ballot[0].granted), len(self.voters)
            self._say(
                f"waiting for more machines: {granted} of {voters} have voted for a new term, {voters // 2 + 1} must"
            )
        self.copies.answer_visitors(now)
        if now - self._beaten_s >= self.settings.heartbeat_s:
            self._beat(now)
        if now - self._reported_s >= STATUS_S:
            self._report(now)
        if self.state.phase is job.Phase.ENDED and self._ended_s is None and not self.resigned:
            if self.copies.ending and now > self._until_s:
                self._say(f"the last snapshot was not on storage within {PERSIST_S:.0f} s; it stays in host memory")
            if not self.copies.ending or now > self._until_s:
                assert self.state.outcome is not None
                self._end(self.state.outcome, now)
        if self._ended_s is not None and (not self._leaving or now - self._ended_s > LEAVE_S) and not self.finished:
            self._finish()

    def _extend(self, now: float) -> None:
        """Give the others as much more time as this process was late."""
        late_s = now - self._ticked_s - 2 * self.settings.heartbeat_s
        self._ticked_s = now
        if late_s > 0:
            self.journal.log("root_late", seconds=late_s)
            for link in self.links:
                link.heard_s += late_s

    def _accept(self, now: float) -> None:
        try:
            while self.listener is not None and (channel := wire.accept(self.listener, messages.TO_ROOT, self.token)):
                if sum(link.machine is None for link in self.links) < STRANGERS:
                    self._adopt(channel, now)
                else:
                    channel.close()
        except OSError as error:  # out of descriptors: they wait in the backlog
            self.journal.log("accept_failed", error=error.strerror)
            time.sleep(0.1)  # it stays readable

    def _adopt(self, channel: messages.Channel, now: float) -> None:
        self.selector.register(channel, selectors.EVENT_READ)
        self.links.append(Link(channel, now))

    def _drop(self, link: Link) -> None:
        if link.channel.complaint is not None:
            self.journal.log("message_refused", text=str(link.channel.complaint), machine=link.machine)
        self.selector.unregister(link.channel)
        link.channel.close()
        self.links.remove(link)

    def _lost(self, link: Link, kind: str, how: str, now: float) -> None:
        self._drop(link)
        self._heard_last_s = link.heard_s
        if self._ended_s is not None and link.machine is not None:
            self._leaving.discard(link.machine)
        elif link.machine is not None:
            self.faults.lost(link.machine, self.state.name(link.machine))
            words = f"the worker agent on {self.state.name(link.machine)} ({decisions.held_by(self.state, link.machine)}) {how}"
            self.journal.log("worker_lost", machine=link.machine, text=words)
            self._see(job.Gone(link.machine, kind, words), now)

    # --- what workers say ---------------------------------------------------------------------------------------------

    def _hear(self, link: Link, message: messages.Message, now: float) -> None:
        if isinstance(message, messages.Join):
            self._join(link, message, now)
            return
        link.visits |= link.machine is None and isinstance(message, messages.Stop | messages.Inject | messages.Inspect)
        if isinstance(message, messages.Inspect):
            here = [machine for machine, one in enumerate(self.state.machines) if one.here]
            self.copies.inspect(link.channel, here, now)
            return
        if isinstance(message, messages.Inject):
            self.faults.ask(message.text, link.channel, self.state, self._agents())
            return
        if isinstance(message, messages.Stop):
            self.journal.log("stop_asked", machine=link.machine, reason=message.reason, force=message.force)
            if message.force:  # a second Ctrl-C does not wait for storage either
                self.copies.ending = False
            asked = job.StopAsked(message.reason, message.code, keep=message.keep, force=message.force)
            self._see(asked, now)
            return
        if link.machine is None:
            return
        match message:
            case messages.Able(ready):
                self._see(job.Ready(link.machine, ready), now)
            case messages.Unable(failure):
                self._see(job.Unable(link.machine, replace(failure, time_s=now - failure.time_s)), now)
            case messages.Stuck(text):
                self._see(job.Stuck(link.machine, text), now)
            case messages.RankListens(rank, generation):
                self._see(job.Listens(rank, generation), now)
            case messages.RankFailed(failure, generation):
                failure = replace(failure, time_s=now - failure.time_s)
                self._see(job.Failed(failure, generation), now)
            case messages.RankExited(rank, generation, code, why):
                self._see(job.Exited(rank, generation, code, why), now)
            case messages.Committed():
                self.faults.answered(message)
            case (
                messages.Holds()
                | messages.Stored()
                | messages.Fetched()
                | messages.Copied()
                | messages.Trouble()
                | messages.Persisted()
                | messages.Completed()
            ):
                if self.copies.hear(link.machine, message, now):
                    self._planned = self.copies.identity is not None
                    self._look_at_plan(now)
            case messages.Bound(number, port, problem):
                if problem:
                    self._say(f"the machine of rank 0 cannot bind a port for the next generation: {problem}")
                if number == self._asked and port > 0:
                    self._bound = number, port
                    self._look_at_plan(now)
            case messages.Voted():
                self._voted(link.machine, message, now)
            case messages.Damaged(_, _, text):
                self._see(job.Damaged(link.machine, text), now)
            case messages.Beat():
                boards = {rank: dated(board, now) for rank, board in message.boards.items()}
                link.beat = replace(message, boards=boards)
                self._fresh.add(link.machine)
                if reached := max((board.step for board in boards.values()), default=0):
                    self._see(job.Reached(reached), now)

    def _join(self, link: Link, join: messages.Join, now: float) -> None:
        address = join.address or _comes_from(link.channel) or self.address
        number = join.machine if join.machine >= 0 else self._number_for(join.name, address)
        if (text := self._why_refused(join, number)) != "":
            link.channel.send(messages.Refused(2, text))
            self.journal.log("worker_refused", text=text)
            return
        for old in [one for one in self.links if one.machine == number and one is not link]:
            self._lost(old, "agent", "has come again", now)
        link.machine, link.pid = number, join.pid
        self.copies.peers[number] = messages.Peer(join.name, address, join.port)
        self.copies.joined(number)
        self.members[number] = messages.Member(join.name, address, join.root_port)
        self._disks[number] = join.disk
        if self.voters and self.state.phase is job.Phase.FORMING and join.newest >= self.term:
            self._begin_above(join.newest)
        self.journal.log("worker_joined", machine=number, name=join.name, pid=join.pid)
        welcome = messages.Welcome(self.term, self.settings.heartbeat_s, self.settings.silence_s, number, self.start)
        link.channel.send(welcome)
        if self.state.phase is job.Phase.ENDED:
            assert self.state.outcome is not None
            if number != self.state.root or self.finished:
                link.channel.send(messages.Finish(self.state.outcome, self.away))
            return
        self._see(job.Joined(number, join.name, join.generation, join.reached), now)
        self._tell_roster()
        if join.unable is not None:
            self._see(job.Unable(number, replace(join.unable, time_s=now - join.unable.time_s)), now)
        if join.machine < 0:
            words = f"{join.name} has joined the job: {decisions.held_by(self.state, number)}"
            for one in {number, self.state.root}:
                self._send(one, messages.Say(words))
        if join.ready:
            self._see(job.Ready(number), now)

    def _number_for(self, name: str, address: str) -> int:
        """Of a machine that does not know it: its own if it was of the job, else a new one.

        Never that of a lost machine, which may come back. A new machine is a standby, and so gets the lost one's seat.
        """
        for number, one in enumerate(self.state.machines):
            if one.name == name and (not one.here or self.members[number].address == address):
                return number
        return len(self.state.machines)

    def _why_refused(self, join: messages.Join, number: int) -> str:
        """Why the machine cannot be of this job; else empty."""
        world, local = self.launched
        if join.start not in ("", self.start):
            return f"another start of this job has run_dir; {join.name} belongs to the last one, which is over"
        if bool(join.disk) != bool(self.voters):
            one, other = (join.name, "the root's machine") if join.disk else ("the root's machine", join.name)
            return (
                f"{one} has a run directory of its own, {other} has not: `python launch/hosts.py private HOSTFILE "
                "run_dir=...` makes one on each, or name a folder that all share"
            )
        same_launch = join.world_size == world or join.machine < 0 or number >= world // local
        if join.local_world_size == local and same_launch and number <= len(self.state.machines):
            return ""
        return (
            f"the root's machine has {local} of {world} ranks, {join.name} says {join.local_world_size} of "
            f"{join.world_size} as machine {number + 1}: give every host the same slots=, or end the other job at "
            "this MASTER_PORT"
        )

    def _tell_roster(self) -> None:
        """All that a worker must know to become root, if this one is lost. Seats count once they are claimed."""
        if len(self.state.machines) == 1 or not self.state.claimed:
            return
        nobody = messages.Member("", "", 0)
        state = self.state
        members = [self.members.get(number, nobody) for number in range(len(state.machines))]
        settled = self.voters and self.beats is not None and state.phase is not job.Phase.FORMING
        record = {"term": self.term} | self._record() if settled else {}
        self._tell(messages.Roster(self.term, members, list(state.trained), state.root, state.generation, record))

    # --- what the root does -------------------------------------------------------------------------------------------

    def visit(self, channel: messages.Channel, message: messages.Message, now: float) -> None:
        """A visitor came to the worker of this machine with ``message``. The root takes the connection over."""
        channel.expects = messages.TO_ROOT
        self._adopt(channel, now)
        self._hear(self.links[-1], message, now)

    def _agents(self) -> dict[int, Agent]:
        return {link.machine: Agent(link.channel, link.pid) for link in self.links if link.machine is not None}

    def _see(self, event: job.Event, now: float) -> None:
        before = self.state
        if before.phase is job.Phase.RUNNING and self._word_s is None and _tells_of_failure(event):
            self._word_s = now
        self.state, actions = decisions.decide(before, event, now)
        if self.state.cause is not before.cause:
            self._count(before, now)
        if not self.state.alive:
            self.ledger.reaped(now)
        if self.state.phase is not before.phase:
            self._phase_s = now
            cause = self.state.cause.text if self.state.cause else ""
            self.journal.log("phase", phase=self.state.phase, generation=self.state.generation, cause=cause)
        for action in actions:
            self._act(action, now)
        if self.state.phase is not before.phase:
            self._said_waits = False
            self._report(now)
        if decisions.may_be_ending(self.state) is not decisions.may_be_ending(before):
            self._beat(now)

    def _act(self, action: job.Action, now: float) -> None:
        match action:
            case job.Plan():
                self._plan(now)
            case job.Claim(witness):
                self._claim_again = witness
                self._look_at_claim(now)
            case job.Resign():
                pass  # see _look_at_claim, which knows where the other one answers
            case job.Dismiss(machine):
                for link in [one for one in self.links if one.machine == machine]:
                    self._lost(link, "silent", "cannot reap its trainers", now)
            case job.Begin(generation):
                self._begin(generation, now)
            case job.Close():
                self._tell(messages.Close())
            case job.AskToStop():
                self._tell(messages.AskToStop())
            case job.DumpStacks():
                self._tell(messages.DumpStacks())
            case job.Say(text):
                self._say(text)
            case job.Finish(outcome):
                lost = not all(one.here for one in self.state.seated)
                if outcome.keep and (outcome.kind == "stopped" or lost) and self.state.claimed:
                    self.copies.end(self._here())
                self._until_s = now + PERSIST_S
                if not self.copies.ending:
                    self._end(outcome, now)

    def _end(self, outcome: Outcome, now: float) -> None:
        """The job has ended: tell the other machines."""
        self._ended_s = now
        self._account(outcome, now)
        self.away = [self.state.name(i) for i, one in enumerate(self.state.machines) if not one.here]
        self._last = self.status(now)  # before the other machines leave
        if outcome.kind == "done":  # a root that comes after this one must know before any machine has left
            self.journal.status(**{**self._last, "state": "done", "reason": outcome.reason, "exit_code": 0})
            self.journal.flush(DONE_S)
        own = self.state.root
        self._leaving = {link.machine for link in self.links if link.machine not in (None, own)}
        self._tell(messages.Finish(outcome, self.away), lambda link: link.machine != own)

    def _say(self, text: str) -> None:
        """To people. A root without a term may never be one: what it does then is no news yet."""
        if self.beats is None and self._ended_s is None:
            self._unsaid.append(text)
        else:
            self._send(self.state.root, messages.Say(text))

    def _here(self) -> list[int]:
        return [number for number, one in enumerate(self.state.machines) if one.here]

    def _send(self, machine: int, message: messages.Message) -> None:
        self._tell(message, lambda link: link.machine == machine)

    def _tell(self, message: messages.Message, whom: Callable[[Link], bool] = lambda link: True) -> None:
        for link in self.links:
            if link.machine is not None and whom(link):
                link.channel.send(message)

    def _begin(self, generation: int, now: float) -> None:
        """Have all machines fork a generation. The store listens already: a client that came first would lose half a second."""
        self._watch, self._fresh, self._word_s = None, set(), None
        self.ledger.reaped(now)
        self.ledger.begun(now)
        # `never` removed the snapshots when this start began, so a later generation resumes.
        resume = "auto" if generation > 1 and self.resume == "never" else self.resume
        assert self._bound is not None
        address = self.members[self.state.seats[0]].address if len(self.state.machines) > 1 else "127.0.0.1"
        restored = self.copies.identity
        if self.copies.loads and restored is not None:
            words = f"host memory holds nothing newer: the job goes on from the checkpoint of step {restored.step}"
            if (steps := self.state.reached - 1 - restored.step) > 0:  # the step that was reached was not done
                words += f"; {steps} steps are done again, {steps * (self.ledger.step_s or self._step_s):.1f} s of work"
            self._say(words)
        self.copies.begun(generation)
        self._tell_roster()
        for link in self.links:
            if link.machine in self.state.seats:
                ranks, copies = sorted(self.state.ranks_of(link.machine)), self.copies.order(link.machine)
                order = (self.term, generation, self.state.world, ranks, address, self._bound[1], resume)
                link.channel.send(messages.Begin(*order, **copies))

    def _finish(self) -> None:
        """Now the worker of this machine, too."""
        assert self.state.outcome is not None
        own = self.state.root
        self._tell(messages.Finish(self.state.outcome, self.away), lambda link: link.machine == own)
        self.finished = True

    # --- before a generation ------------------------------------------------------------------------------------------

    def _plan(self, now: float) -> None:
        """What is there, and where the ranks meet. The store listens before anybody forks: a client that came first would lose
        half a second."""
        self._asked += 1
        self._bound, self._planned = None, None
        others = [number for number in self._here() if number not in self.state.seats]
        if self.copies.plan([*self.state.seats, *others]):
            self._planned = True
        self._send(self.state.seats[0], messages.Bind(self._asked))

    def _look_at_plan(self, now: float) -> None:
        if self._planned is not None and self._bound is not None:
            self._see(job.Planned(self._planned), now)

    def _look_at_claim(self, now: float) -> None:
        """One claim at a time; one that is about older seats counts for nothing, but its term is ours."""
        if self._lost_term and not self.lost_to_another_start and self._ended_s is None:
            assert self.beats is not None
            self._resign("another root agent has taken over", self.beats.successor)
        if self._claim is not None and (result := self._claim.result) is not None:
            self._claim = None
            if result.won is not None:
                self._take(result.won, now)
            elif result.holder.get("start", self.start) != self.start:
                self._see(job.StopAsked("another start took run_dir", 2, force=True), now)
            if result.won is None:
                self._outdone(result.holder, now)
            elif self._claim_again is None:
                self._see(job.Claimed(True), now)
        if self._ballot is not None and self.state.phase is not job.Phase.CLAIMING:
            self._ballot = None  # it is about other machines than are here now
        if self._claim is None and self._claim_again is not None and not self.resigned:
            witness, self._claim_again = self._claim_again, None
            if not self.voters:
                self._claim_term(self.term, self._record(), witness)
            elif witness:
                claim = ballot.begin(self._claimer, self.term, self._number + 1, self.voters)
                self._ask_for_votes(claim, self._record())
            else:
                self._ballot = None
                self._say("no machine that trained last is here: waiting for one")

    def _outdone(self, holder: dict[str, Any], now: float) -> None:
        """Another root has the next term."""
        self._see(job.Claimed(False), now)
        if self.state.outcome is None:
            self._resign("another root agent has the next term", holder)

    def _record(self) -> dict[str, Any]:
        """Of this root and these seats, kept with the term that it claims."""
        members = [self.members.get(number) for number in range(len(self.state.machines))]
        record = self.record | {
            "seats": list(self.state.seats),
            "names": [one.name if one else "" for one in members],
            "address": self.address,
            "port": self.listener.getsockname()[1] if self.listener else 0,
            "root": self.state.root,
            "start": self.start,
        }
        if self.voters:
            trains = [self._disks.get(number, "") for number in self.state.seats]
            record |= {"claimer": self._claimer, "voters": sorted(self.voters), "trains": trains}
        return record

    def _claim_term(self, before: int, record: dict[str, Any], witness: bool) -> None:
        """Claim the term after ``before``."""
        fence_s = FENCE_SILENCES * self.settings.silence_s
        self._claim = Claim(self.journal.run_dir, before, record, witness, self.beats, fence_s)

    def _begin_above(self, newest: int) -> None:
        """Before the first generation: a machine knows ``newest`` of an earlier start. This folder is no other process's."""
        before, record = self.beats, self._record()
        terms.succeed(self.journal.run_dir, newest, record, self._claimer)
        self.term = self.copies.term = self.journal.term = self.ledger.term = newest + 1
        self.beats = terms.Beats(self.journal.run_dir, self.term)
        if before is not None:
            before.stop(0.0)

    # --- votes, where machines share no run directory ------------------------------------------------------------------

    def _ask_for_votes(self, claim: ballot.Ballot, record: dict[str, Any]) -> None:
        self._ballot, self._number = (claim, record), claim.number
        self._tell(messages.Vote(claim.number, claim.known, record))

    def _voted(self, machine: int, voted: messages.Voted, now: float) -> None:
        if self._ballot is None or voted.claimer != self._claimer:
            return
        (claim, record), self._ballot = self._ballot, None
        if voted.won.get("term", 0) > self.term:
            self._outdone(voted.won, now)
            return
        seen = ballot.answered(claim, self._disks[machine], voted.number, voted.granted, voted.newest, voted.votes)
        joined = {self._disks[link.machine] for link in self.links if link.machine is not None}
        if seen.number != claim.number:
            self._ask_for_votes(seen, record)
        elif ballot.is_won(seen, joined):
            self.journal.log("votes", number=seen.number, granted=len(seen.granted), voters=len(seen.voters))
            self._claim_term(seen.number - 1, record, True)
        else:
            self._ballot = seen, record

    def _take(self, won: Won, now: float) -> None:
        """The next term is ours."""
        first = self.beats is None
        self.term = self.copies.term = self.journal.term = won.term
        self.beats = won.beats
        self.journal.speaks_for_job = True
        self.journal.log("claimed")
        self.ledger.term = won.term
        if first:
            self.ledger.follow(won.failures, won.status, now, time.time())
            self._step_s = float(won.status.get("step_s") or 0.0)
            cause, here = self.state.cause, self.state.name(self.state.root)
            news = f"{here} has the root agent now, and restarts all {self.state.world} trainers"
            for text in [f"{cause.text}; {news}" if cause else news, *self._unsaid]:
                self._say(text)

    @property
    def may_be_left(self) -> bool:
        """No claim is under way that may be won by now. A ballot without an end is lost with this root."""
        return self.state.phase is not job.Phase.CLAIMING or (bool(self.voters) and self._claim is None)

    def _look_for_majority(self, now: float) -> None:
        """Where machines share no run directory, a root that cannot go on while others may have a majority hears nothing of
        theirs. It resigns: its machines look for a root, and it may become one again."""
        if not self.voters:
            return
        phases = (job.Phase.WAITING, job.Phase.RECOVERING, job.Phase.PLANNING, job.Phase.CLAIMING)
        joined = {self._disks[link.machine] for link in self.links if link.machine is not None}
        others = 2 * len(self.voters - joined) > len(self.voters)
        alone = others and self.state.phase in phases and self.state.outcome is None
        if not alone or self.beats is None or self._claim is not None:
            self._alone_s = now
        elif now - self._alone_s > ALONE_SILENCES * self.settings.silence_s:
            self._resign(f"only {len(joined & self.voters)} of {len(self.voters)} machines are here", {})

    @property
    def _lost_term(self) -> bool:
        """Another process has claimed the next term: not this one, which may be just about it."""
        return self.beats is not None and self.beats.lost and self._claim is None and not self.resigned

    @property
    def lost_to_another_start(self) -> bool:
        return self._lost_term and self.beats is not None and self.beats.successor.get("start") != self.start

    def _resign(self, why: str, holder: dict[str, Any]) -> None:
        """Another root has the job: send the workers there. The worker of this machine looks for it by itself.

        Args:
            holder: record of its term, if it could be read.
        """
        self.journal.speaks_for_job = False
        self.journal.log("resigned", text=why)
        moved = messages.Moved(holder.get("address", ""), holder.get("port", 0))
        self._tell(moved, lambda link: link.machine != self.state.root)
        self.resigned = True

    def _beat(self, now: float) -> None:
        self._beaten_s = now
        self._tell(messages.RootBeat(decisions.may_be_ending(self.state)))

    # --- what failures cost -------------------------------------------------------------------------------------------

    def _count(self, before: job.State, now: float) -> None:
        """The root has given up generation ``before.generation``, for ``self.state.cause``."""
        cause, seen_s = self.state.cause, self._word_s or now
        assert cause is not None
        told_s = [failure.time_s for failure in before.failures]
        failed_s = min([seen_s, *told_s])
        board = self._boards().get(-1 if cause.rank is None else cause.rank)
        if cause.kind == "hang" and board is not None:
            failed_s = board.since_s
        elif cause.kind == "silent":
            failed_s = self._heard_last_s
        machine = "" if cause.machine is None else self.state.name(cause.machine)
        reached = self.state.reached
        kept = self.ledger.failed(cause, machine, before.generation, reached, failed_s, seen_s, now, time.time())
        if kept is not None:
            self._keep(kept)

    def _keep(self, failure: dict[str, Any]) -> None:
        """On every disk, where machines share none."""
        self.journal.failure(failure)
        if self.voters:
            own = self.state.root
            self._tell(messages.News(failure=failure), lambda link: link.machine != own)

    def _account(self, outcome: Outcome, now: float) -> None:
        """The job has ended: what its failures cost goes into its result."""
        if (kept := self.ledger.end(now)) is not None:
            self._keep(kept)
        if outcome.kind == "done":
            failures = list(self.ledger.failures)
            self.journal.writer.submit(add_to_result, self.journal.run_dir, failures, self.ledger.totals(now))

    def _say_waits(self, now: float) -> None:
        self._said_waits = True
        if (words := decisions.waits_for(self.state, now)) != "":
            run_dir = self.journal.run_dir
            self._say(f"{words}; `python launch/train.py --join run_dir={run_dir}`, there or on another host, goes on")

    # --- hangs, and what people see -----------------------------------------------------------------------------------

    def _boards(self) -> dict[int, Board]:
        """The newest of each rank of this generation."""
        boards = {rank: board for link in self.links if link.beat for rank, board in link.beat.boards.items()}
        return {rank: board for rank, board in boards.items() if board.generation == self.state.generation}

    def _read_boards(self, now: float) -> None:
        """Some machine has beaten. A hang is looked for once all have: an old board stands still by itself."""
        boards = self._boards()
        if (kept := self.ledger.look(boards, self.state.world, now)) is not None:
            self._keep(kept)
        total_steps = max((board.total_steps for board in boards.values()), default=0)
        if total_steps != self._total_steps:
            self._total_steps = total_steps
            self._report(now)
        if self.state.phase is job.Phase.RUNNING and self._fresh.issuperset(self.state.seats):
            self._fresh.clear()
            if self.ledger.current is None:  # the trainers go on
                self.copies.look(self.state.reached, self.ledger.step_s, now)
            self._look_for_hang({rank: boards.get(rank) for rank in self.state.alive}, now)

    def _look_for_hang(self, boards: dict[int, Board | None], now: float) -> None:
        stopped = sorted({rank for link in self.links if link.beat for rank in link.beat.stopped} & boards.keys())
        self._watch, hang = hangs.look(self._watch, boards, stopped, now, self._hang_limits)
        if hang is not None and self.state.deadline is None:
            seen = {rank: one and {**vars(one), "phase": one.phase.word} for rank, one in boards.items()}
            words = hang.words
            if stopped:  # of several in one collective these are to blame
                words += f"; stopped by a signal or a debugger: rank {', '.join(map(str, stopped))}"
            self.journal.log("hang", ranks=hang.ranks, stopped=stopped, text=words, boards=seen)
            self._see(job.Hung((stopped or hang.ranks)[0], words), now)

    def _report(self, now: float) -> None:
        """Write status.json."""
        self._reported_s = now
        if self._ended_s is not None:
            return
        status = self.status(now)
        self.journal.status(**status)
        if self.voters and self.beats is not None:
            own, here = self.state.root, {"time": time.time(), "machine": self.journal.machine, "term": self.term}
            self._tell(messages.News(status=here | status), lambda link: link.machine != own)

    def status(self, now: float) -> dict[str, Any]:
        """The job now, in the fields of ``observe.status``. After the end, as it was then."""
        if self._last is not None:
            return self._last
        state, current = self.state, self.ledger.current
        heard_s = {link.machine: link.heard_s for link in self.links if link.machine is not None}
        beats = {link.machine: link.beat for link in self.links if link.machine is not None and link.beat is not None}
        replaces = state.phase is job.Phase.FORMING and current is not None  # a root that died
        return {
            "state": "recovering" if replaces else STATES[state.phase],
            "state_s": round(now - self._phase_s, 3),
            "reason": state.outcome.reason if state.outcome else None,
            "address": None if self.listener is None else f"{self.address}:{self.listener.getsockname()[1]}",
            "since": self._since,
            "heartbeat_s": self.settings.heartbeat_s,
            "generation": state.generation,
            "step": max(state.reached, current.step if current else 0),
            "total_steps": self._total_steps or None,
            "step_s": round(self.ledger.step_s, 6),
            "world_size": state.world,
            "healthy": state.phase is job.Phase.RUNNING
            and current is None
            and self.copies.are_whole(self.term, state.generation),
            "seats": list(state.seats),
            "machines": report.machines(state, heard_s, beats, self.members, now),
            "ranks": report.ranks(state, self._boards(), now),
            **self.copies.status(),
            "recovers_from": current.cause if current else None,
            "failures": self.ledger.failures[-SHOWN:],
            **self.ledger.totals(now),
            "began_s": None if self.ledger.began_s is None else round(now - self.ledger.began_s, 3),
        }

    def close(self) -> list[messages.Channel]:
        """Let go of the workers, which are on their own now. Returns the visitors' connections: the end is still to be said."""
        self._probes.close()
        if self._claim is not None:
            self._claim.give_up()
        for link in list(self.links):
            if not link.visits:
                self._drop(link)
        if self.listener is not None:  # the agent's own
            self.selector.unregister(self.listener)
            self.listener = None
        return [link.channel for link in self.links]


def _comes_from(channel: messages.Channel) -> str:
    """The address at the other end; empty for a socket pair, or once the connection is gone."""
    try:
        peer = channel.sock.getpeername()
    except OSError:
        return ""
    return str(peer[0]) if isinstance(peer, tuple) else ""


def _tells_of_failure(event: job.Event) -> bool:
    if isinstance(event, job.Exited):
        return event.code != 0
    return isinstance(event, job.Failed | job.Gone | job.Hung | job.Damaged)
