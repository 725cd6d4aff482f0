"""Decides for a whole job, on one machine or many. Pure: no sockets, processes or clock; ``now`` is an argument, in seconds.

``service.py`` turns what the workers say into events, :func:`decide` turns (state, event, now) into a new state and
actions (``state.py``), and the service carries those out.

Why a trainer's exception is not believed at once: if a trainer is killed, the others' collectives raise ("Connection closed
by peer"), and the others may exit first. A death by a signal within `settle_s` is the cause, and the job can resume after
it. If an exception only says that a peer is gone, the root waits `cause_s` for the peer's own. The job's first error is the
earliest exception that is no such consequence. It ends the job, and its trainer has up to `leave_s` to exit. A later request
to stop does not change that; nor does a death by a signal more than `settle_s` later.

Seats. Training has a number of seats: seat k has the ranks k * local, ... and is held by one machine. The other machines are
standbys. A standby that is ready takes the seat of a machine that is silent at once. If a connection broke, the machine has
`return_s` to come back first: an agent that died has an heir. Nobody else moves. A machine that comes back then is a standby.

Why no two generations ever train at once. A generation begins only when no trainer of an earlier one is `alive`. A rank
leaves `alive` when its worker says that it reaped the trainer. A worker that loses its root kills its trainers, and joins
only when they are reaped. While it is away, its ranks stay in `alive`, unless a standby takes the seat. Training is
synchronous: trainers on a machine that the root cannot reach take no step without the others, which are reaped.

Why no two roots ever train. Trainers of one membership can step only together. Another membership, because a standby has a
seat or because another root has taken over, begins only after an exclusive claim of the next term. The claim needs a witness:
a machine of the last term's seats that has joined this root. Its trainers are reaped, so those of the last term step no more.
If it leaves for the last root, that one needs the next term too, before it begins again: whatever joins anew may have been a
witness elsewhere. So of several roots one goes on, and the others resign. Without a witness a root claims only when
the trainers of the last term have lost their root for long (``claiming.py``). A root that may not train may not end the
job either: it claims first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gemini_gnn.errors import DamagedSnapshot
from gemini_gnn.observe.errors import first
from gemini_gnn.recovery.outcome import STOPPED, Failure, Outcome, exit_name, failed, told_error
from gemini_gnn.recovery.root.state import (
    Action,
    AskToStop,
    Begin,
    Cause,
    Claim,
    Claimed,
    Close,
    Damaged,
    Dismiss,
    DumpStacks,
    Event,
    Exited,
    Failed,
    Finish,
    Gone,
    Hung,
    Joined,
    Listens,
    Machine,
    Phase,
    Plan,
    Planned,
    Reached,
    Ready,
    Resign,
    Say,
    State,
    Step,
    StopAsked,
    Stuck,
    Tick,
    Unable,
    Unreached,
)


def decide(state: State, event: Event, now: float) -> Step:
    """The state after ``event`` at time ``now``, and what to do."""
    if state.phase is Phase.ENDED:
        return state, []
    match event:
        case Joined():
            return _joined(state, event, now)
        case Ready(machine, ready):
            return _next(_with(state, machine, ready=ready), now)
        case Unable(machine, failure):
            if state.outcome is not None:  # nobody needs another generation
                return state, []
            if machine not in state.seats:
                text = f"{state.name(machine)} cannot be a standby: {failure.summary}"
                return _with(state, machine, ready=False), [Say(text)]
            failure = (told_error(state.failures) if state.phase is Phase.RUNNING else None) or failure
            return _close(state, Outcome("failed", failure.code, failure.summary, failure=failure), now)
        case Gone():
            return _gone(state, event, now)
        case Unreached(machine):
            one = state.machines[machine]
            return (state, []) if one.here or one.silent else _next(_with(state, machine, silent=True), now)
        case Stuck(machine, text):
            if machine not in state.seats or (state.outcome is None and _free(state)):
                return state, [Say(text), Dismiss(machine)]
            state = replace(state, alive=state.alive - state.ranks_of(machine), outcome=None)
            return _close(state, replace(failed(text, now), kind="lost"), now)
        case Planned(found):
            return _planned(state, found, now)
        case Claimed(mine):
            return _claimed(state, mine, now)
        case Listens(rank, generation):
            return (replace(state, listening=state.listening | {rank}) if generation == state.generation else state), []
        case Failed(failure, generation):
            return _failed(state, failure, now) if generation == state.generation else (state, [])
        case Exited():
            return _exited(state, event, now)
        case Reached(step):
            return replace(state, reached=max(state.reached, step)), []
        case Hung():
            return _hung(state, event, now)
        case Damaged(machine, text):
            if state.phase is not Phase.RUNNING:  # the next planning knows it
                return state, []
            return _restart(state, Cause("damaged copy", text, machine=machine), 1, now)
        case StopAsked():
            return _stop(state, event, now)
        case Tick():
            return _tick(state, now) if state.deadline is not None and now >= state.deadline else (state, [])
    raise AssertionError(f"unknown event {event!r}")


def may_restart(state: State) -> str | None:
    """Why no other generation may begin after the failure that was counted last; None when it may."""
    limit = state.limits.same_step_failures
    if limit == 0:
        return "nothing is restarted (recovery.same_step_failures is 0, or snapshot=none)"
    if state.row >= limit:
        return f"{state.row} failures in a row without a new step are enough (recovery.same_step_failures)"
    return None


def may_be_ending(state: State) -> bool:
    """Whether the job ends, or will end unless an error turns out to be a consequence. A new slot process should ask again."""
    return state.outcome is not None or (state.phase is Phase.RUNNING and state.deadline is not None)


def _with(state: State, machine: int, **changes: Any) -> State:
    machines = list(state.machines)
    machines[machine] = replace(machines[machine], **changes)
    return replace(state, machines=tuple(machines))


# --- machines that come and go ------------------------------------------------------------------------------------------


def _joined(state: State, joined: Joined, now: float) -> Step:
    actions: list[Action] = []
    if joined.machine == len(state.machines):
        state = replace(state, machines=(*state.machines, Machine()))
    first = state.machines[joined.machine].name == ""
    if state.machines[joined.machine].here:  # it lost the connection before the root did
        words = f"the worker agent on {state.name(joined.machine)} lost its connection"
        state, actions = _gone(state, Gone(joined.machine, "agent", words), now)
    state = _with(state, joined.machine, name=joined.name, here=True, ready=False, since_s=now, silent=False)
    state = replace(
        state,
        alive=state.alive - state.ranks_of(joined.machine),
        reached=max(state.reached, joined.reached),
    )
    if state.phase not in (Phase.RUNNING, Phase.STOPPING):  # else the news of its trainers would be nobody's
        state = replace(state, generation=max(state.generation, joined.generation))
    if joined.machine in state.trained and not first and state.outcome is None:  # it may have been a witness elsewhere
        state = replace(state, claimed=False)
    if state.phase is Phase.RUNNING and joined.machine not in state.seats and not first:
        actions.append(Say(f"{joined.name} is back: it stands by"))
    state, more = _next(_anew(state), now)  # it may hold what was missed
    return state, actions + more


def _gone(state: State, gone: Gone, now: float) -> Step:
    was_here = state.machines[gone.machine].here
    state = _with(state, gone.machine, here=False, ready=False, since_s=now, silent=gone.kind == "silent")
    if not was_here:
        return state, []
    if gone.machine not in state.seats:  # nobody trains there; but it may have been asked for its copies
        state, actions = _next(_anew(state), now)
        return state, [Say(f"the standby {state.name(gone.machine)} is gone"), *actions]
    if state.phase is Phase.RUNNING:
        return _restart(state, Cause(gone.kind, gone.why, machine=gone.machine), 1, now)
    if state.phase is Phase.STOPPING:
        return _close(state, state.outcome, now)
    return _next(state, now)


def _anew(state: State) -> State:
    """A planning or a claim that is under way is about other machines now."""
    if state.outcome is None and state.phase in (Phase.PLANNING, Phase.CLAIMING):
        return replace(state, phase=Phase.RECOVERING, deadline=None)
    return state


def _next(state: State, now: float) -> Step:
    """Go on as soon as nothing stands in the way: begin the next generation, or end."""
    if state.phase is Phase.ENDING:
        here = frozenset[int]().union(*(state.ranks_of(i) for i, one in enumerate(state.machines) if one.here))
        return (state, []) if state.alive & here else _finish(state)
    if state.outcome is not None or state.phase is Phase.RUNNING:
        return state, []
    actions: list[Action] = []
    if state.phase is not Phase.FORMING:
        state, actions = _seat(state, now)
    if not all(one.here for one in state.seated):
        if state.phase is Phase.FORMING:
            return (state if state.deadline is not None else replace(state, deadline=now + state.limits.join_s)), []
        return replace(state, phase=Phase.WAITING, deadline=_until(state)), actions
    if state.phase is Phase.WAITING:
        state = replace(state, phase=Phase.RECOVERING)
    if state.phase is not Phase.CLAIMING:
        state = replace(state, deadline=None)  # from here on each worker has deadlines of its own
    if state.alive or not all(one.ready for one in state.seated):
        return _anew(state), actions
    if state.phase in (Phase.PLANNING, Phase.CLAIMING):
        return state, actions
    return replace(state, phase=Phase.PLANNING), [*actions, Plan()]


def _seat(state: State, now: float) -> Step:
    """Standbys that are ready take the seats of machines that do not come back."""
    actions: list[Action] = []
    for seat, number in enumerate(state.seats):
        lost, free = state.machines[number], _free(state)
        if lost.here or not free or now < _returns_until(state, lost):
            continue
        ranks = state.ranks_of(number)
        seats = (*state.seats[:seat], free[0], *state.seats[seat + 1 :])
        words = f"{state.name(free[0])} takes the place of {state.name(number)} ({held_by(state, number)})"
        state = _anew(replace(state, seats=seats, alive=state.alive - ranks, claimed=False))
        actions.append(Say(words))
    return state, actions


def _free(state: State) -> list[int]:
    """Standbys that can take a seat."""
    return [i for i, one in enumerate(state.machines) if one.here and one.ready and i not in state.seats]


def _returns_until(state: State, away: Machine) -> float:
    return away.since_s if away.silent else away.since_s + state.limits.return_s


def _until(state: State) -> float:
    """The deadline while the machine of a seat is away: its seat may be taken, or the job ends."""
    away = [one for one in state.seated if not one.here]
    ends = min(one.since_s for one in away) + state.limits.wait_s
    return min([ends, *(_returns_until(state, one) for one in away if _free(state))])


def _planned(state: State, found: bool, now: float) -> Step:
    if state.phase is not Phase.PLANNING:
        return state, []
    away = [one for one in state.machines if not one.here]
    if not found and state.reached > 0 and away:
        ends = max(one.since_s for one in away) + state.limits.wait_s
        if now < ends:
            text = f"no snapshot can be restored without {_names(state)}; waiting for {ends - now:.0f} s"
            return replace(state, phase=Phase.WAITING, deadline=ends), [Say(text)]
    if not state.claimed:
        state = replace(state, phase=Phase.CLAIMING, deadline=now + state.limits.wait_s)
        return state, [_claim(state)]
    return _begun(state)


def _claim(state: State) -> Claim:
    return Claim(any(state.machines[number].here for number in state.trained))


def _claimed(state: State, mine: bool, now: float) -> Step:
    if state.phase is Phase.ENDING:  # it could not be waited for
        return state, []
    if not mine:
        return replace(state, phase=Phase.ENDED, deadline=None), [Resign()]
    if state.phase is not Phase.CLAIMING:  # a machine has gone meanwhile: other seats need another term
        return state, []
    state = replace(state, claimed=True)
    return _begun(state) if state.outcome is None else _close(state, state.outcome, now)


def _begun(state: State) -> Step:
    state = replace(
        state,
        phase=Phase.RUNNING,
        trained=state.seats,
        generation=state.generation + 1,
        alive=frozenset(range(state.world)),
        listening=frozenset(),
        codes=(),
        failures=(),
        hung=None,
        deadline=None,
    )
    return state, [Begin(state.generation)]


# --- trainers that end ---------------------------------------------------------------------------------------------------


def _failed(state: State, failure: Failure, now: float) -> Step:
    """Wait for the exit, but not for ever: the trainer may hang in a thread that it joins."""
    state = replace(state, failures=(*state.failures, failure))
    if state.phase is Phase.RUNNING and state.deadline is None:
        state = replace(state, deadline=now + state.limits.leave_s)
    return state, []


def _hung(state: State, hung: Hung, now: float) -> Step:
    """Gone on from as from a kill, when the stacks are written; an exit that is awaited comes first."""
    if state.phase is not Phase.RUNNING or state.deadline is not None or hung.rank not in state.alive:
        return state, []
    cause = Cause("hang", hung.words, rank=hung.rank)
    return replace(state, hung=cause, deadline=now + state.limits.dump_s), [DumpStacks()]


def _exited(state: State, exited: Exited, now: float) -> Step:
    rank, code = exited.rank, exited.code
    if state.phase not in (Phase.RUNNING, Phase.STOPPING):
        return _next(replace(state, alive=state.alive - {rank}), now)
    if exited.generation != state.generation or rank not in state.alive:
        return state, []
    state = replace(state, alive=state.alive - {rank}, codes=(*state.codes, (rank, code)))
    if state.phase is Phase.STOPPING:
        return (state, []) if state.alive else _ended_by_itself(state, now)
    if code < 0:
        how = f": {exited.why}" if exited.why else f" by {exit_name(code)}"
        kind = "out of memory" if exited.why else "killed"
        return _restart(state, Cause(kind, f"the trainer of rank {rank} was killed{how}", rank=rank), 128 - code, now)
    if code > 0 and code != STOPPED and all(failure.rank != rank for failure in state.failures):
        summary = f"the trainer of rank {rank} ended with exit code {code}"
        state = replace(state, failures=(*state.failures, Failure(rank, code, now, summary, summary)))
    if not state.alive:
        return _ended_by_itself(state, now)
    if code != 0:
        caused = any(not failure.consequence for failure in state.failures)
        deadline = now + (state.limits.settle_s if caused else state.limits.cause_s)
        state = replace(state, deadline=deadline if state.deadline is None else min(deadline, state.deadline))
    return state, []


def _ended_by_itself(state: State, now: float) -> Step:
    """Every trainer is reaped, and the root killed none. In STOPPING, another process may have killed one."""
    if all(code == 0 for _, code in state.codes):
        return _finish(replace(state, outcome=Outcome("done", 0, "done", keep=False)))
    if state.outcome is not None:
        return _finish(state)
    if not state.failures:
        return _finish(replace(state, outcome=Outcome("stopped", STOPPED, "the trainers stopped by themselves")))
    return _erred(state, now)


def _erred(state: State, now: float) -> Step:
    """End with the first error. If it only says that a peer is gone, restart instead: the peer died without an error.

    A damaged snapshot is restarted from too. Ranks that lost a peer over it may have said so earlier.
    """
    failure = first(state.failures)
    assert failure is not None
    if failure.consequence:
        damaged = f"{DamagedSnapshot.__name__}: "
        for saw in state.failures:
            if saw.consequence and saw.summary.startswith(damaged):
                cause = Cause("damaged copy", saw.summary.removeprefix(damaged), rank=saw.rank)
                return _restart(state, cause, saw.code, now, saw)
        cause = Cause("network", f"rank {failure.rank} lost a peer and no trainer says why", rank=failure.rank)
        return _restart(state, cause, failure.code, now, failure)
    return _close(state, Outcome("failed", failure.code, failure.summary, failure=failure), now)


def _restart(state: State, cause: Cause, code: int, now: float, saw: Failure | None = None) -> Step:
    """Count the failure; close this generation, and begin the next if allowed. ``saw``: the error that tells of it."""
    failure = told_error(state.failures)
    if failure is not None and now - failure.time_s > state.limits.settle_s:  # not caused by this death
        return _close(state, Outcome("failed", failure.code, failure.summary, failure=failure), now)
    row = state.row + 1 if state.reached <= state.row_step else 1
    state = replace(state, row=row, row_step=state.reached, cause=cause)
    reason = may_restart(state)
    if reason is not None:
        text = f"{cause.text}; not restarted: {reason}"
        if cause.text.endswith("by SIGKILL"):
            text += "; if nobody killed it, memory was short: dmesg says so"
        outcome = failed(text, now, code)
        return _close(state, outcome if saw is None else replace(outcome, reason=text, failure=saw), now)
    text = f"{cause.text}; restarting all {state.world} trainers as generation {state.generation + 1}"
    state, actions = _close(state, None, now)
    return state, [Say(text), *actions]


# --- the end -------------------------------------------------------------------------------------------------------------


def _close(state: State, outcome: Outcome | None, now: float, *, at_once: bool = False) -> Step:
    """Kill living trainers, then end with ``outcome``, or begin the next generation if it is None.

    Args:
        at_once: do not wait for a term.
    """
    if state.outcome is not None and state.phase is Phase.ENDING:
        return _next(state, now)  # ending already
    if outcome is None:
        state = replace(state, phase=Phase.RECOVERING, deadline=None)
    elif not state.claimed and not at_once:  # another root may go on with the job
        state = replace(state, phase=Phase.CLAIMING, outcome=outcome, deadline=now + state.limits.stop_s)
        return state, [_claim(state)]
    else:
        state = replace(state, phase=Phase.ENDING, outcome=outcome, deadline=now + state.limits.end_s)
    # Where nothing lives a worker still hears that another generation is wanted: it may not be able to fork one.
    actions: list[Action] = [Close()] if state.alive or outcome is None else []
    state, more = _next(state, now)
    return state, actions + more


def _finish(state: State) -> Step:
    assert state.outcome is not None
    return replace(state, phase=Phase.ENDED, deadline=None), [Finish(state.outcome)]


def _stop(state: State, asked: StopAsked, now: float) -> Step:
    outcome = Outcome("stopped", asked.code, asked.reason, keep=asked.keep)
    if state.outcome is not None:  # ending already: the first reason stays, but a later request may drop snapshots
        state = replace(state, outcome=replace(state.outcome, keep=state.outcome.keep and asked.keep))
        waits = state.phase in (Phase.STOPPING, Phase.CLAIMING)
        return _close(state, state.outcome, now, at_once=True) if waits and asked.force else (state, [])
    running = state.phase is Phase.RUNNING
    failure = told_error(state.failures) if running else None  # else of the last generation
    if failure is not None:  # its exit would have ended the job
        return _close(state, Outcome("failed", failure.code, failure.summary, keep=asked.keep, failure=failure), now)
    if running and state.alive <= state.listening and state.deadline is None and not asked.force:
        state = replace(state, phase=Phase.STOPPING, outcome=outcome, deadline=now + state.limits.stop_s)
        return state, [Say(f"{asked.reason}: ending after this step"), AskToStop()]
    # Killing a trainer that reads no requests loses nothing: the snapshot of its last step is committed.
    return _close(state, outcome, now, at_once=asked.force)


def _tick(state: State, now: float) -> Step:
    """The deadline has passed."""
    match state.phase:
        case Phase.FORMING:
            seated, actions = _next(replace(state, phase=Phase.WAITING), now)  # a standby will do
            if seated.phase is not Phase.WAITING:
                return seated, actions
            setting = "recovery.wait_s" if state.generation else "distributed.start_timeout_s"
            text = f"{_away(state)} did not come within {state.limits.join_s:.0f} s ({setting}); {_TRY}"
            return _close(state, failed(text, now), now)
        case Phase.WAITING:
            seated, actions = _next(state, now)
            if seated.phase is not Phase.WAITING or seated.deadline != state.deadline:
                return seated, actions
            text = f"{_away(state)} did not come back within {state.limits.wait_s:.0f} s (recovery.wait_s); {_TRY}"
            if state.cause is not None:
                text = f"{state.cause.text}; {text}"
            return _close(state, failed(text, now), now)
        case Phase.CLAIMING if state.outcome is not None:
            return _close(state, state.outcome, now, at_once=True)
        case Phase.CLAIMING:
            text = (
                f"no term could be claimed within {state.limits.wait_s:.0f} s (recovery.wait_s): does run_dir answer? Where "
                "each machine has its own (launch/hosts.py private), more than half of them must be here"
            )
            return _close(state, failed(text, now), now, at_once=True)
        case Phase.RUNNING if state.hung is not None:
            return _restart(state, state.hung, 1, now)
        case Phase.RUNNING:
            if not state.failures:  # one trainer stopped by itself, the others run: they will notice
                return replace(state, deadline=None), []
            return _erred(state, now)
        case Phase.STOPPING:
            state, actions = _close(replace(state, outcome=None), state.outcome, now)
            return state, [Say(f"killing the trainers: they did not stop within {state.limits.stop_s:.0f} s"), *actions]
        case Phase.ENDING:  # a worker that is here, and neither reaps nor says why
            return _finish(state)
    raise AssertionError(f"a deadline in phase {state.phase}")


_TRY = "see what they printed, `ssh NAME true`, and `python launch/hosts.py check HOSTFILE`"


def _away(state: State) -> str:
    """ "h1 (ranks 2, 3)" for each machine that is not here; its place in the hostfile where its name is not known."""
    words = []
    for number in state.seats:
        machine = state.machines[number]
        if not machine.here:
            name = machine.name or f"machine {number + 1} in the order of the hostfile"
            words.append(f"{name} ({held_by(state, number)})")
    return " and ".join(words)


def waits_for(state: State, now: float) -> str:
    """For people: which machines must come back or be replaced, and until when."""
    left_s = 0.0 if state.deadline is None else max(0.0, state.deadline - now)
    return f"waiting up to {left_s:.0f} s for {_away(state)}" if _away(state) else ""


def held_by(state: State, machine: int) -> str:
    """For people: "rank 1", "ranks 2, 3" or "a standby"."""
    ranks = sorted(state.ranks_of(machine))
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" if ranks else "a standby"


def _names(state: State) -> str:
    """Of the machines that are away."""
    return ", ".join(state.name(number) for number, one in enumerate(state.machines) if not one.here)
