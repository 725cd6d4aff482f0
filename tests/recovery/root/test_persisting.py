"""When snapshots go to storage, and which of them count: scripted on a virtual clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemini_gnn.config import Interval
from gemini_gnn.recovery.root import persisting
from gemini_gnn.recovery.root.persisting import Ask, Mark, Say, State
from gemini_gnn.snapshot.store.identity import Identity

TEN_MINUTES = Interval(seconds=600.0)
AT_120, AT_121 = Identity(1, 1, 120), Identity(1, 1, 121)


def asked(machines: int = 2) -> State:
    state, actions = persisting.look(State(machines, TEN_MINUTES), 100, 0.05, 601.0)
    assert actions == [Ask(120)], "a second ahead, in steps of 50 ms"
    return state


def test_nothing_is_asked_for_before_it_is_due():
    assert persisting.look(State(2, TEN_MINUTES), 100, 0.05, 599.0)[1] == []
    assert persisting.look(State(2, Interval(steps=100)), 99, 0.05, 1e6)[1] == []
    assert persisting.look(State(2, Interval()), 10**6, 0.05, 1e6)[1] == [], "never"


def test_steps_count_from_the_last_checkpoint():
    state = State(2, Interval(steps=100), last_step=250)
    assert persisting.look(state, 349, 10.0, 1e6)[1] == []
    assert persisting.look(state, 350, 10.0, 1e6)[1] == [Ask(351)], "the next step: a step is longer than a message"


def test_one_counts_once_all_machines_have_written_the_same_snapshot():
    state, actions = persisting.persisted(asked(), 1, AT_120, "")
    assert actions == []
    state, actions = persisting.persisted(state, 0, AT_120, "")
    assert actions == [Mark(AT_120)] and state.newest is None
    state, actions = persisting.completed(state, AT_120, "")
    assert actions == [Ask(0)] and state.newest == AT_120 and state.asked == 0
    assert persisting.look(state, 130, 0.05, 1200.0)[1] == [], "ten minutes after the last one began"
    assert persisting.look(state, 130, 0.05, 1202.0)[1] == [Ask(150)]


def test_a_machine_that_heard_too_late_costs_this_one_and_the_next_is_named_further_ahead():
    state, _ = persisting.persisted(asked(), 0, AT_120, "")
    state, actions = persisting.persisted(state, 1, AT_121, "")
    assert actions == [Ask(0)] and state.newest is None
    assert persisting.look(state, 130, 0.05, 602.0)[1] == [Ask(170)]
    state, actions = persisting.persisted(asked(), 0, None, "")
    assert actions == [Ask(0)], "ranks of one machine: nothing to tell people"
    assert persisting.look(state, 130, 0.05, 602.0)[1] == [Ask(170)]


def test_a_full_disk_is_said_once_and_tried_again_next_time():
    state, actions = persisting.persisted(asked(), 1, AT_120, "no room for step-000000120")
    assert actions[0] == Ask(0) and isinstance(actions[1], Say) and "no room" in actions[1].text
    assert persisting.persisted(state, 0, AT_120, "") == (state, []), "of the one that was given up"
    state, actions = persisting.look(state, 200, 0.05, 1300.0)
    assert actions == [Ask(220)]
    assert persisting.persisted(state, 1, Identity(1, 1, 220), "no room for step-000000220")[1] == [Ask(0)]


def test_that_storage_does_not_answer_is_said_once_and_what_comes_late_still_counts():
    state, actions = persisting.look(asked(), 5000, 0.05, 662.0)
    assert [type(one) for one in actions] == [Say]
    assert persisting.look(state, 5000, 0.05, 700.0)[1] == []
    state, _ = persisting.persisted(state, 0, AT_120, "")
    assert persisting.persisted(state, 1, AT_120, "")[1] == [Mark(AT_120)]


def test_a_generation_that_ends_takes_what_is_under_way_along():
    state, _ = persisting.persisted(asked(), 0, AT_120, "")
    state = persisting.generation(state)
    assert persisting.persisted(state, 1, AT_120, "")[1] == []
    assert persisting.look(state, 130, 0.05, 1202.0)[1] == [Ask(150)]


@given(
    st.integers(1, 3),
    st.lists(
        st.one_of(
            st.tuples(st.just("look"), st.integers(0, 5)),
            st.tuples(st.just("persisted"), st.integers(0, 2), st.integers(1, 4), st.booleans()),
            st.tuples(st.just("completed"), st.integers(1, 4), st.booleans()),
            st.tuples(st.just("generation")),
        ),
        max_size=40,
    ),
)
def test_only_what_every_machine_has_written_is_ever_marked(machines, script):
    state, now, written = State(machines, Interval(seconds=1.0)), 0.0, dict[int, Identity]()
    for kind, *rest in script:
        now += 1.0
        actions = []
        if kind == "look":
            state, actions = persisting.look(state, rest[0], 0.5, now)
        elif kind == "persisted" and rest[0] < machines:
            if state.asked and state.completing is None and not rest[2]:
                written[rest[0]] = Identity(1, 1, rest[1])
            state, actions = persisting.persisted(state, rest[0], Identity(1, 1, rest[1]), "full" * rest[2])
        elif kind == "completed":
            state, actions = persisting.completed(state, Identity(1, 1, rest[0]), "full" * rest[1])
        elif kind == "generation":
            state = persisting.generation(state)
        marks = [one.identity for one in actions if isinstance(one, Mark)]
        assert all(set(written.values()) == {one} and len(written) == machines for one in marks)
        if state.asked == 0 or any(isinstance(one, Ask) for one in actions):
            written = {}
        assert not state.persisted or state.asked


@pytest.mark.parametrize("step_s", [0.0, 1e-4, 0.3, 90.0])
def test_a_step_that_is_named_lies_ahead(step_s):
    (action,) = persisting.look(State(1, TEN_MINUTES), 7, step_s, 600.0)[1]
    assert action.step > 7
