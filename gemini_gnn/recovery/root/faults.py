"""Faults on purpose, at the root: it finds the machine that commits one, and passes on what came of it.

Two sources. A visitor (``inject.py``) wants one now and waits for the answer. The schedule of the settings (``faults.at``,
``faults.mtbf_s``) has those of agents, machines and links; trainers look at their own ranks' themselves.

Once per job. A fault of the schedule is claimed in the run directory before a worker is told (``faults/injection.py``). If
the root or the worker dies in between, the fault is lost, never doubled. The folder is the job's only once a trainer is
past its start: ``resume=never`` puts an older one aside. So the schedule is not looked at before.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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


class Faults:
    """Raises ConfigError if the settings are wrong for ``world`` ranks."""

    def __init__(self, settings: FaultsConfig, world: int, run_dir: Path, journal: Journal):
        self.allow, self.run_dir, self.journal = settings.allow, run_dir, journal
        planned = schedule.planned(settings, world)
        self._left = {name: fault for name, fault in planned.items() if fault.kind not in OF_RANK}
        self._begun_s: float | None = None
        self._numbers = itertools.count(1)
        self._asked: dict[int, tuple[int, messages.Channel]] = {}  # by number of the order: its machine, and who waits

    def ask(self, text: str, visitor: messages.Channel, state: State, agents: Mapping[int, Agent]) -> None:
        """A visitor wants the fault of ``text`` now."""
        try:
            fault = schedule.parse_command(text.split())
            schedule.check_allowed(fault.kind, self.allow)
            machine = machine_of(fault, state)
            check_able(fault, machine, state)
        except ConfigError as error:
            visitor.send(messages.Committed(0, False, str(error)))
            return
        self._order(fault, machine, state, agents, visitor)

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
                machine = machine_of(fault, state)
            except ConfigError as error:
                del self._left[name]
                problems.append(str(error))
                continue
            if machine in agents:
                del self._left[name]
                if injection.claim(self.run_dir / injection.FOLDER / name, step=state.reached):
                    self._order(fault, machine, state, agents, None)
        return problems

    def answered(self, answer: messages.Committed) -> None:
        self.journal.log("fault_committed" if answer.done else "fault_refused", text=answer.text)
        _, visitor = self._asked.pop(answer.ask, (0, None))
        if visitor is not None:
            visitor.send(messages.Committed(0, answer.done, answer.text))

    def lost(self, machine: int, name: str) -> None:
        """The worker agent of ``machine`` is gone: it answers no more."""
        for number, (asked, _) in list(self._asked.items()):
            if asked == machine:
                self.answered(
                    messages.Committed(number, False, f"the worker agent on {name} was gone before it answered")
                )

    def _order(
        self,
        fault: Fault,
        machine: int,
        state: State,
        agents: Mapping[int, Agent],
        visitor: messages.Channel | None,
    ) -> None:
        agent, number = agents[machine], next(self._numbers)
        self.journal.log("fault_ordered", fault=str(fault), machine=machine)
        if visitor is not None:
            self._asked[number] = machine, visitor
        if fault.kind in ("kill-agent", "kill-root"):  # the dead do not answer
            whose = "the root agent" if machine == state.root else "the worker agent"
            self.answered(
                messages.Committed(number, True, f"SIGKILL to {whose}, pid {agent.pid} on {state.name(machine)}")
            )
        agent.channel.send(messages.Commit(fault, number))


def machine_of(fault: Fault, state: State) -> int:
    """The number of the machine that commits ``fault``: that of the rank, the one with the name, or the root's.

    Raises:
        ConfigError: the job has no such rank or machine.
    """
    if fault.kind == "kill-root":
        return state.root
    rank = fault.target.removeprefix("rank:")
    if fault.kind in OF_RANK or rank != fault.target:
        if int(rank) >= state.world:
            raise ConfigError(f"{fault}: expected a rank from 0 to {state.world - 1}")
        return state.machine_of(int(rank))
    names = [one.name for one in state.machines]
    found = [i for i, name in enumerate(names) if fault.target in (name, name.partition(".")[0])]
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
