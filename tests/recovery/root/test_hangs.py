"""Hangs: scripted and random jobs on a virtual clock. One look every half second, as an agent with a floor of 2 s has."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini_gnn.recovery.board import FADES, Board, Phase
from gemini_gnn.recovery.root.hangs import MIN_SEEN, NEVER, Limits, look

LIMITS = Limits(factor=10.0, floor_s=2.0)
STEP = [Phase.SAMPLING, Phase.FORWARD, Phase.BACKWARD, Phase.AGREEMENT, Phase.STEP, Phase.WRITING, Phase.CAPTURE]


def board(step: int, place: int, since_s: float, seen: int = 50, longest_s: float = 0.02, phase=None) -> Board:
    phase = STEP[place] if phase is None else phase
    return Board(step * 100 + place, 1, step, place, phase, since_s, seen, longest_s)


def watched(boards, looks, limits=LIMITS, watch=None, stopped=()):
    """The first hang that is seen at any of ``looks``, and when."""
    for now in looks:
        watch, hang = look(watch, boards(now) if callable(boards) else boards, stopped, now, limits)
        if hang is not None:
            return hang, now
    return None, None


def every(tick_s: float, until_s: float, begin_s: float = 0.0):
    return [begin_s + tick_s * i for i in range(int((until_s - begin_s) / tick_s) + 1)]


def test_the_rank_that_is_least_far_hangs_and_the_words_say_where():
    boards = {0: board(12, 3, 0.0), 1: board(12, 0, 0.0, phase=Phase.EXCHANGE), 2: board(12, 3, 0.0)}
    hang, at = watched(boards, every(0.5, 60.0), Limits(10.0, 30.0))
    assert hang.ranks == (1,) and 30.0 < at <= 31.0
    assert hang.words == "rank 1 hangs in exchange of step 12 for 30 s (usually at most 0.02 s)"


@pytest.mark.parametrize(
    ("longest_s", "after_s"), [(0.02, 2.0), (0.1, 2.0), (1.0, 10.0)], ids=["floor", "floor still", "factor"]
)
def test_a_hang_is_a_multiple_of_the_usual_and_never_below_the_floor(longest_s, after_s):
    _, at = watched({0: board(3, 1, 0.0, longest_s=longest_s)}, every(0.5, 60.0))
    assert after_s < at <= after_s + 0.5


def test_zero_turns_it_off():
    assert watched({0: board(3, 1, 0.0)}, every(0.5, 600.0), Limits(0.0, 2.0)) == (None, None)


@pytest.mark.parametrize("phase", sorted(NEVER))
def test_start_up_partitioning_and_writing_are_never_hangs_nor_who_waits_for_them(phase):
    boards = {0: board(3, 0, 0.0, phase=phase), 1: board(3, 3, 0.0)}
    assert watched(boards, every(0.5, 3600.0)) == (None, None)


def test_a_phase_whose_usual_time_is_not_known_is_no_hang():
    """The first steps compile kernels; the first evaluation comes when the rest is long known."""
    boards = {0: board(3, 1, 0.0, seen=MIN_SEEN - 1), 1: board(3, 3, 0.0)}
    assert watched(boards, every(0.5, 3600.0)) == (None, None)


@pytest.mark.parametrize("other", [None, board(0, 0, 0.0, phase=Phase.START_UP)], ids=["not seen", "start-up"])
def test_a_trainer_that_is_stopped_hangs_in_any_phase(other):
    """The others would wait for it until their collectives time out, minutes later."""
    boards = {0: other, 1: board(0, 0, 0.0, phase=Phase.START_UP)}
    hang, at = watched(boards, every(0.5, 60.0), stopped=(1,))
    assert hang.ranks == (1,) and at == 2.5 and hang.words == "rank 1 hangs: standing still for 2.5 s"
    assert watched(boards, every(0.5, 60.0), Limits(0.0, 2.0), stopped=(1,)) == (None, None)


def test_nobody_hangs_while_a_trainer_has_not_said_where_it_is():
    assert watched({0: board(3, 1, 0.0), 1: None}, every(0.5, 600.0)) == (None, None)


def test_an_agent_that_was_stopped_gives_as_much_more_time():
    boards = {0: board(3, 1, 0.0)}
    hang, at = watched(boards, [0.0, 0.5, 1.0, 601.0, 601.5, 602.0, 602.5])
    assert at == 601.5 and "for 2.5 s" in hang.words  # of the ten minutes one second counts


def test_a_mark_made_just_before_the_agent_was_stopped_is_young_afterwards():
    boards = {0.0: {0: board(3, 1, -0.1)}, 600.0: {0: board(4, 1, 1.0)}}
    watch, _ = look(None, boards[0.0], (), 0.0, LIMITS)
    watch, hang = look(watch, boards[600.0], (), 600.0, LIMITS)
    assert hang is None and watch.stood[0][1] <= 1.0


def test_a_trainer_that_goes_on_is_forgiven():
    def boards(now):
        return {0: board(int(now // 1.9), 1, now - now % 1.9)}

    assert watched(boards, every(0.5, 100.0)) == (None, None)


class Job:
    """Ranks that step together: what their boards say at a time, with the table a page would have."""

    def __init__(self, world: int, steps: int, seconds, evaluate_every: int, evaluation_s: float):
        self.timeline = [self._of(rank, world, steps, seconds, evaluate_every, evaluation_s) for rank in range(world)]

    def _of(self, rank, world, steps, seconds, evaluate_every, evaluation_s):
        """(begin, board) of every mark of ``rank``. The agreement ends when the last rank has come to it."""
        marks, now, table = [], 0.0, {}
        for step in range(1, steps + 1):
            phases = [*STEP, Phase.EVALUATION] if step % evaluate_every == 0 else STEP
            come = [sum(seconds(step, one, p) for p in range(3)) for one in range(world)]
            for place, phase in enumerate(phases):
                took = evaluation_s if phase is Phase.EVALUATION else seconds(step, 0, place)
                if place < 3:
                    took = seconds(step, rank, place)
                elif place == 3:
                    took = max(come) - come[rank] + 0.001
                seen, longest = table.get(phase, (0, 0.0))
                marks.append((now, Board(len(marks) + 1, 1, step, place, phase, now, seen, longest)))
                table[phase] = (seen + 1, max(took, longest * (1 - 2**-FADES)))
                now += took
        return marks

    def boards(self, now: float, stopped: dict[int, float] | None = None):
        """At ``now``; the ranks in ``stopped`` make no mark after that time."""
        found = {}
        for rank, marks in enumerate(self.timeline):
            until = min(now, (stopped or {}).get(rank, now))
            found[rank] = [one for begin, one in marks if begin <= until][-1]
        return found

    def end_s(self) -> float:
        return max(marks[-1][0] for marks in self.timeline)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 12), st.floats(0.05, 5.0))
def test_no_false_alarm_when_steps_vary_within_a_factor_of_three(seed, world, evaluate_every, usual_s):
    """Also when evaluations come every few steps, ten times as long as a step; and the agent looks when it can."""
    random, drawn = Random(seed), {}

    def seconds(step, rank, place):
        return drawn.setdefault((step, rank, place), usual_s / 5 * random.uniform(1, 3))

    job = Job(world, 40, seconds, evaluate_every, 10 * usual_s)
    looks, now = [], 0.0
    while now < job.end_s():
        looks.append(now)
        now += random.choice([0.1, 0.5, 0.5, 3.0])
    assert watched(job.boards, looks) == (None, None)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.data())
def test_a_rank_that_stops_in_a_phase_that_is_known_is_found_and_no_other(world, data):
    """The others go on to the agreement of that step, which waits for it."""
    job = Job(world, 40, lambda *key: 0.1, 100, 0.0)
    rank, step, place = data.draw(st.tuples(st.integers(0, world - 1), st.integers(10, 30), st.integers(0, 2)))
    stopped_s = next(begin for begin, one in job.timeline[rank] if (one.step, one.place) == (step, place))
    agreement_s = {
        one: next(begin for begin, mark in job.timeline[one] if (mark.step, mark.place) == (step, 3))
        for one in range(world)
    }
    stopped = {**agreement_s, rank: stopped_s}
    hang, at = watched(lambda now: job.boards(now, stopped), every(0.5, stopped_s + 60.0))
    assert hang.ranks == (rank,) and f"{STEP[place].word} of step {step} " in hang.words
    assert 2.0 < at - stopped_s <= 3.0


def test_all_ranks_in_one_exchange_hang_when_the_last_that_came_has_waited_too_long():
    boards = {0: board(5, 0, 0.0, phase=Phase.EXCHANGE), 1: board(5, 0, 1.5, phase=Phase.EXCHANGE)}
    hang, at = watched(lambda now: boards if now >= 1.5 else {**boards, 1: board(4, 6, 0.0)}, every(0.5, 10.0))
    assert hang.ranks == (0, 1) and hang.words.startswith("ranks 0, 1 hang in exchange of step 5 for 2.5 s")
    assert at == 4.0


def test_a_script_that_only_says_its_steps_hangs_in_a_step():
    assert watched({0: board(7, 4, 0.0)}, every(0.5, 10.0))[0].words.startswith("rank 0 hangs in step 7 for")


def test_who_samples_is_less_far_than_who_waits_for_its_rows():
    boards = {0: board(5, 0, 0.0, phase=Phase.EXCHANGE), 1: replace(board(5, 0, 0.2), phase=Phase.SAMPLING)}
    assert watched(boards, every(0.5, 10.0, 0.5))[0].ranks == (1,)
