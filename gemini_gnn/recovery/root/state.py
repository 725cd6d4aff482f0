"""What the root knows of a whole job, what it is told, and what it may do. ``decisions.py`` decides.

All times are in seconds on the root's monotonic clock. The phases:

    FORMING     the machines join; each says when its slot processes and its warm parent are there
    PLANNING    all seats are held and no trainer lives: what each machine holds is asked, what one lacks is fetched
    CLAIMING    the same, and this membership still needs a term of its own
    RUNNING     the trainers of `generation` run on all machines
    STOPPING    the trainers were asked to stop; they are killed at the deadline
    RECOVERING  the trainers are killed; the planning begins when all are reaped and every seat's machine is ready
    WAITING     the same, and a seat's machine is away: silent, or its worker agent died; or nothing can be restored without it
    ENDING      the trainers are killed; the job ends when those of all machines that are here are reaped
    ENDED       the outcome is final
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from gemini_gnn.recovery.outcome import Failure, Outcome


class Phase(StrEnum):
    FORMING = "forming"
    PLANNING = "planning"
    CLAIMING = "claiming"
    RUNNING = "running"
    STOPPING = "stopping"
    RECOVERING = "recovering"
    WAITING = "waiting"
    ENDING = "ending"
    ENDED = "ended"


@dataclass(frozen=True)
class Limits:
    """Deadlines and limits, in seconds.

    Attributes:
        join_s: from the first machine to the last.
        wait_s: how long the machine of a seat may be away where no standby takes it.
        return_s: how long it may take to come back, if a connection only broke, before a standby takes its seat.
        stop_s: from the request to stop to the exit; below the 30 s that DeepSpeed's launcher gives its slot processes.
        end_s: from the kill to the last word of all machines; a worker gives up reaping before.
        leave_s: from a trainer's error to its exit: it joins its threads and runs its exit handlers.
        settle_s, cause_s: see ``decisions.py``.
        dump_s: from a hang to the kill, so that the trainers write their stacks.
        same_step_failures: so many failures in a row without a new step end the job; 0: the first one does.
    """

    join_s: float = 300.0
    wait_s: float = 60.0
    return_s: float = 3.0
    stop_s: float = 15.0
    end_s: float = 40.0
    leave_s: float = 30.0
    settle_s: float = 0.5
    cause_s: float = 3.0
    dump_s: float = 1.0
    same_step_failures: int = 5


@dataclass(frozen=True)
class Machine:
    """
    Attributes:
        name: its hostname; empty before it joins.
        here: its worker is connected.
        ready: it can fork a generation.
        since_s: when `here` last changed.
        silent: it is away, and did not even close its connection.
    """

    name: str = ""
    here: bool = False
    ready: bool = False
    since_s: float = 0.0
    silent: bool = False


@dataclass(frozen=True)
class Cause:
    """Why a generation ended.

    Attributes:
        kind: "killed" | "out of memory" | "hang" | "damaged copy" | "network" | "agent" | "silent".
    """

    kind: str
    text: str
    rank: int | None = None
    machine: int | None = None


@dataclass(frozen=True)
class State:
    """
    Attributes:
        machines: in the launcher's order; those that joined later follow.
        seats: by seat the number of its machine. Seat k has the ranks k * local, ...
        local: ranks per seat.
        root: number of the machine of this root agent.
        claimed: these seats may train under the root's term. Else another term is to be claimed first.
        trained: the seats of the last term, as far as this root knows: what may have trained.
        generation: of the newest trainers; 0 before the first of a term's launch. Each death of a root agent counts as one.
        alive: ranks whose trainer may live.
        listening: ranks with a trainer that reads requests to stop.
        codes: exit code by rank of the reaped ones; negative for a signal.
        reached: the newest step that a trainer was in.
        row, row_step: failures in a row without a new step, and the newest step at the last of them.
        hung: which trainer hangs, while the stacks are written.
        cause: why the last generation ended.
        outcome: set once the job is to end.
    """

    machines: tuple[Machine, ...]
    seats: tuple[int, ...]
    local: int
    limits: Limits = Limits()
    root: int = 0
    claimed: bool = True
    trained: tuple[int, ...] = ()
    phase: Phase = Phase.FORMING
    generation: int = 0
    alive: frozenset[int] = frozenset()
    listening: frozenset[int] = frozenset()
    codes: tuple[tuple[int, int], ...] = ()
    failures: tuple[Failure, ...] = ()
    reached: int = 0
    row: int = 0
    row_step: int = -1
    hung: Cause | None = None
    cause: Cause | None = None
    outcome: Outcome | None = None
    deadline: float | None = None

    @property
    def world(self) -> int:
        return len(self.seats) * self.local

    def ranks_of(self, machine: int) -> frozenset[int]:
        """None for a standby."""
        if machine not in self.seats:
            return frozenset()
        seat = self.seats.index(machine)
        return frozenset(range(seat * self.local, (seat + 1) * self.local))

    def machine_of(self, rank: int) -> int:
        return self.seats[rank // self.local]

    @property
    def seated(self) -> tuple[Machine, ...]:
        """By seat, its machine."""
        return tuple(self.machines[number] for number in self.seats)

    def name(self, machine: int) -> str:
        return self.machines[machine].name or f"machine {machine + 1}"


def forming(machines: int, local: int, limits: Limits = Limits(), generation: int = 0, standbys: int = 0) -> State:
    """The first state of a launch. The last ``standbys`` machines hold no seat. ``generation``: of the newest trainers."""
    seats = tuple(range(machines - standbys))
    return State((Machine(),) * machines, seats, local, limits, trained=seats, generation=generation)


def succeeding(
    names: Sequence[str],
    seats: Sequence[int],
    local: int,
    limits: Limits,
    *,
    root: int,
    lost: int | None,
    generation: int,
    reached: int,
    cause: Cause | None,
    now: float,
) -> State:
    """The first state of a root that takes over.

    Args:
        names: of all machines. seats: of the last term.
        root: number of its own machine. lost: number of a machine that is silent.
        generation, reached: of the newest trainers, as far as this machine knows.
        cause: why the last root is no more.
    """
    machines = tuple(Machine(name, since_s=now, silent=number == lost) for number, name in enumerate(names))
    return State(
        machines,
        tuple(seats),
        local,
        limits,
        root=root,
        claimed=False,
        trained=tuple(seats),
        phase=Phase.WAITING,
        generation=generation,
        reached=reached,
        cause=cause,
        deadline=now + limits.wait_s,
    )


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """A machine's worker is connected, and no trainer lives there.

    ``machine``: one above the last number is a new one. ``generation``, ``reached``: of its newest trainers.
    """

    machine: int
    name: str
    generation: int = 0
    reached: int = 0


@dataclass(frozen=True)
class Ready:
    """Whether the machine can fork a generation changed."""

    machine: int
    ready: bool = True


@dataclass(frozen=True)
class Unable:
    """The machine can never fork a generation."""

    machine: int
    failure: Failure


@dataclass(frozen=True)
class Gone:
    """The connection to a worker ended (``kind`` "agent"), or no word came for too long ("silent")."""

    machine: int
    kind: str
    why: str


@dataclass(frozen=True)
class Unreached:
    """Not even the kernel of the machine answers a root that takes over (``probes.py``)."""

    machine: int


@dataclass(frozen=True)
class Stuck:
    """Trainers of the machine cannot be reaped."""

    machine: int
    text: str


@dataclass(frozen=True)
class Planned:
    """Every machine holds what its ranks need, as far as it is to be had (``restoring.py``). ``found``: a snapshot to restore."""

    found: bool = True


@dataclass(frozen=True)
class Claimed:
    """The claim of the next term has come to its end: ``mine``, or another root has it."""

    mine: bool


@dataclass(frozen=True)
class Listens:
    rank: int
    generation: int


@dataclass(frozen=True)
class Failed:
    """A trainer has reported its error; its exit follows."""

    failure: Failure
    generation: int


@dataclass(frozen=True)
class Exited:
    """A trainer was reaped, and its process group killed. ``code`` is negative for a signal, ``why``: its sender, if known."""

    rank: int
    generation: int
    code: int
    why: str = ""


@dataclass(frozen=True)
class Reached:
    """A trainer is in this step."""

    step: int


@dataclass(frozen=True)
class Hung:
    """The trainers make no progress, and ``rank`` is the one that the others wait for; ``words`` say more."""

    rank: int
    words: str


@dataclass(frozen=True)
class Damaged:
    """A shard in the memory of the machine turned out damaged while it was copied, and is void now."""

    machine: int
    text: str


@dataclass(frozen=True)
class StopAsked:
    """``force``: do not wait for the trainers to finish their step."""

    reason: str
    code: int
    keep: bool = True
    force: bool = False


@dataclass(frozen=True)
class Tick:
    pass


# --- actions: each is for all machines that are here --------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Find out what the next generation resumes from, and bring it where it is needed; then comes Planned."""


@dataclass(frozen=True)
class Claim:
    """Claim the next term for these seats; then comes Claimed. ``witness``: a machine of the last term's seats is with us."""

    witness: bool


@dataclass(frozen=True)
class Resign:
    """Another root has the job: follow it."""


@dataclass(frozen=True)
class Dismiss:
    """Let go of the worker of a machine, as if it were silent."""

    machine: int


@dataclass(frozen=True)
class Begin:
    generation: int


@dataclass(frozen=True)
class Close:
    """Kill and reap every trainer."""


@dataclass(frozen=True)
class AskToStop:
    pass


@dataclass(frozen=True)
class DumpStacks:
    """Have them written into the logs."""


@dataclass(frozen=True)
class Say:
    text: str


@dataclass(frozen=True)
class Finish:
    outcome: Outcome


Event = Any  # one of the events above
Action = Plan | Claim | Resign | Dismiss | Begin | Close | AskToStop | DumpStacks | Say | Finish
Step = tuple[State, list[Action]]
