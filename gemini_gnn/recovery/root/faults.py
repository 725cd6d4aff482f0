"""Faults on purpose, at the root: it finds the machine that commits one, and passes on what came of it.

Two sources. A visitor (``inject.py``) wants one now and waits for the answer. The schedule of the settings (``faults.at``,
``faults.mtbf_s``) has those of agents, machines and links; trainers look at their own ranks' themselves.

Some faults are committed by several machines, and the visitor hears of all. A copy of a shard is damaged on one: the
machines are asked one after the other until one has it. So nobody needs to know here which machine keeps what.

Once per job. A fault of the schedule is claimed in the run directory before a worker is told (``faults/injection.py``). If
the root or the worker dies in between, the fault is lost, never doubled. The folder is the job's only once a trainer is
past its start: ``resume=never`` puts an older one aside. So the schedule is not looked at before.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from gemini_gnn.config import FaultsConfig
from gemini_gnn.errors import ConfigError
from gemini_gnn.faults import injection, schedule
from gemini_gnn.faults.schedule import OF_RANK, Fault
from gemini_gnn.recovery import messages
from gemini_gnn.recovery.board import Board, Phase
from gemini_gnn.recovery.root.state import Phase as JobPhase
from gemini_gnn.recovery.root.state import State
from gemini_gnn.recovery.worker.journal import Journal


@dataclass(frozen=True)
class Agent:
    """A worker agent that is connected."""

    channel: messages.Channel
    pid: int


@dataclass
class _Asked:
    """A fault that is ordered from machines.

    Attributes:
        visitor: who waits.
        left: machines that are asked if the one before could not; None if every machine is to do its part.
        answers: so far.
    """

    visitor: messages.Channel | None
    fault: Fault
    left: list[tuple[int, Agent]] | None = None
    answers: list[messages.Committed] = field(default_factory=list)


class Faults:
    """Raises ConfigError if the settings are wrong for ``world`` ranks."""

    def __init__(self, settings: FaultsConfig, world: int, run_dir: Path, journal: Journal):
        self.allow, self.run_dir, self.journal = settings.allow, run_dir, journal
        planned = schedule.planned(settings, world)
        self._left = {name: fault for name, fault in planned.items() if fault.kind not in OF_RANK}
        self._begun_s: float | None = None
        self._numbers = itertools.count(1)
        self._asked: dict[int, tuple[int, _Asked]] = {}  # by number of the order: its machine, and what it is part of

    def ask(self, text: str, visitor: messages.Channel, state: State, agents: Mapping[int, Agent]) -> None:
        """A visitor wants the fault of ``text`` now."""
        try:
            fault = schedule.parse_command(text.split())
            schedule.check_allowed(fault.kind, self.allow)
            orders = orders_of(fault, state)
            for machine, _ in orders:
                check_able(fault, machine, state)
        except ConfigError as error:
            visitor.send(messages.Committed(0, False, str(error)))
            return
        self._order(orders, state, agents, visitor)

    def look(
        self,
        boards: Iterable[Board],
        state: State,
        agents: Mapping[int, Agent],
        elapsed_s: float | None = None,
    ) -> list[str]:
        """Have the faults committed that are due. Returns what is wrong with those that never can be."""
        try:
            return self._look(
                [board for board in boards if board.generation == state.generation], state, agents, elapsed_s
            )
        except OSError as error:
            self._left.clear()
            return [f"no more faults on purpose: {self.run_dir / injection.FOLDER}: {error.strerror}"]

    def _look(
        self, boards: list[Board], state: State, agents: Mapping[int, Agent], elapsed_s: float | None
    ) -> list[str]:
        if self._left and self._begun_s is None and any(board.phase is not Phase.START_UP for board in boards):
            self._begun_s = injection.begun(self.run_dir)
            for name in injection.committed(self.run_dir) & self._left.keys():
                del self._left[name]
        if not self._left or self._begun_s is None:
            return []
        problems = []
        elapsed_s = time.time() - self._begun_s if elapsed_s is None else elapsed_s
        for name, fault in list(self._left.items()):
            if not any(schedule.due(fault, board.step, elapsed_s, board.phase.word) for board in boards):
                continue
            try:
                orders = orders_of(fault, state)
            except ConfigError as error:
                del self._left[name]
                problems.append(str(error))
                continue
            if all(machine in agents for machine, _ in orders):
                del self._left[name]
                if injection.claim(self.run_dir / injection.FOLDER / name, step=state.reached):
                    self._order(orders, state, agents, None)
        return problems

    def answered(self, answer: messages.Committed) -> None:
        self.journal.log("fault_committed" if answer.done else "fault_refused", text=answer.text)
        _, asked = self._asked.pop(answer.ask, (0, None))
        if asked is None:
            return
        asked.answers.append(answer)
        if asked.left and not answer.done:
            self._send(asked, asked.fault, *asked.left.pop(0))
        if asked.visitor is None or any(other is asked for _, other in self._asked.values()):
            return
        done = (all if asked.left is None else any)(one.done for one in asked.answers)
        texts = [one.text for one in asked.answers if one.done or not done]
        asked.visitor.send(messages.Committed(0, done, "; ".join(texts)))

    def lost(self, machine: int, name: str) -> None:
        """The worker agent of ``machine`` is gone: it answers no more."""
        for _, asked in self._asked.values():
            asked.left = asked.left and [one for one in asked.left if one[0] != machine]
        for number, (asked_of, _) in list(self._asked.items()):
            if asked_of == machine:
                self.answered(
                    messages.Committed(number, False, f"the worker agent on {name} was gone before it answered")
                )

    def _order(
        self,
        orders: list[tuple[int, Fault]],
        state: State,
        agents: Mapping[int, Agent],
        visitor: messages.Channel | None,
    ) -> None:
        machine, fault = orders[0]
        asked = _Asked(visitor, fault)
        if fault.kind == "corrupt-replica":
            asked.left = [(other, agents[other]) for other, _ in orders[1:]]
            orders = orders[:1]
        if fault.kind == "split":
            orders = [(to, replace(one, others=_with_addresses(one.others, state, agents))) for to, one in orders]
        numbers = [self._send(asked, fault, machine, agents[machine]) for machine, fault in orders]
        if fault.kind in ("kill-agent", "kill-root"):  # the dead do not answer
            whose = "the root agent" if machine == state.root else "the worker agent"
            text = f"SIGKILL to {whose}, pid {agents[machine].pid} on {state.name(machine)}"
            self.answered(messages.Committed(numbers[0], True, text))

    def _send(self, asked: _Asked, fault: Fault, machine: int, agent: Agent) -> int:
        number = next(self._numbers)
        self.journal.log("fault_ordered", fault=str(fault), machine=machine)
        self._asked[number] = machine, asked
        agent.channel.send(messages.Commit(fault, number))
        return number


def _with_addresses(names: str, state: State, agents: Mapping[int, Agent]) -> str:
    """The machines ``names``, and by which addresses the root reaches them: their names may have others."""
    found, own = dict[int, str](), ""
    for machine, agent in agents.items():
        sock = agent.channel.sock
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):  # it has just been lost
                found[machine] = sock.getpeername()[0].removeprefix("::ffff:")
                own = sock.getsockname()[0].removeprefix("::ffff:")
    side = [machine for machine in agents if state.name(machine) in names.split(",")]
    known = [address for machine in side if (address := found.get(machine, own))]
    return ",".join(dict.fromkeys([*names.split(","), *known]))


def orders_of(fault: Fault, state: State) -> list[tuple[int, Fault]]:
    """The machines that commit ``fault``, each with what it is told to do.

    Raises:
        ConfigError: the job has no such rank or machine.
    """
    here = [machine for machine, one in enumerate(state.machines) if one.here]
    if fault.kind == "hang-filesystem" and not fault.target:
        return [(machine, fault) for machine in here]
    if fault.kind == "corrupt-replica":
        owner = machine_of(fault, state)
        after = [machine for machine in here if machine != owner]
        if not after:
            raise ConfigError(f"{fault}: expected another machine that is here; {state.name(owner)} is alone")
        return [(machine, fault) for machine in after]
    if fault.kind != "split":
        return [(machine_of(fault, state), fault)]
    first, seed = fault.target.split(","), fault.target.removeprefix("half:")
    one = [_named(name, fault, state) for name in first] if seed == fault.target else _half(here, int(seed))
    if fault.others == "others":
        other = [machine for machine in here if machine not in one]
    else:
        other = [_named(name, fault, state) for name in fault.others.split(",")]
    if not one or not other or set(one) & set(other):
        raise ConfigError(f"{fault}: expected a machine or more on each side, and none on both")
    words = [",".join(state.name(machine) for machine in dict.fromkeys(side)) for side in (one, other)]
    return [
        *((machine, replace(fault, target=words[0], others=words[1])) for machine in dict.fromkeys(one)),
        *((machine, replace(fault, target=words[1], others=words[0])) for machine in dict.fromkeys(other)),
    ]


def _half(machines: list[int], seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(machines, len(machines) // 2))


def machine_of(fault: Fault, state: State) -> int:
    """The number of the machine that commits ``fault``: that of the rank, the one with the name, or the root's.

    Raises:
        ConfigError: the job has no such rank or machine.
    """
    if fault.kind == "kill-root":
        return state.root
    of_rank = fault.kind in OF_RANK or fault.kind == "corrupt-replica"
    return _named(f"rank:{fault.target}" if of_rank else fault.target, fault, state)


def _named(target: str, fault: Fault, state: State) -> int:
    """The number of the machine ``target``: a name, or ``rank:3``."""
    rank = target.removeprefix("rank:")
    if rank != target:
        if int(rank) >= state.world:
            raise ConfigError(f"{fault}: expected a rank from 0 to {state.world - 1}")
        return state.machine_of(int(rank))
    names = [one.name for one in state.machines]
    found = [i for i, name in enumerate(names) if target in (name, name.partition(".")[0])]
    if len(found) != 1:
        raise ConfigError(f"{fault}: expected one of the job's machines, {', '.join(filter(None, names))}")
    return found[0]


def check_able(fault: Fault, machine: int, state: State) -> None:
    """
    Raises:
        ConfigError: ``fault`` cannot be committed now.
    """
    if state.phase is JobPhase.ENDED or not state.machines[machine].here:
        gone = "the job has ended" if state.phase is JobPhase.ENDED else f"{state.name(machine)} is away"
        raise ConfigError(f"{fault}: {gone}; see `python launch/status.py`")
    if fault.kind in OF_RANK and int(fault.target) not in state.alive:
        raise ConfigError(f"{fault}: rank {fault.target} has no trainer now (the job is {state.phase}); try again")
    if reads_orders(fault) and int(fault.target) not in state.listening:
        raise ConfigError(f"{fault}: rank {fault.target} reads no orders before its first step; try again")


def reads_orders(fault: Fault) -> bool:
    """Whether the trainer commits ``fault`` itself: no signal does it, or only the trainer knows when."""
    return fault.kind in OF_RANK and (fault.phase is not None or fault.kind not in ("kill-rank", "stop-rank"))
