"""Where a worker looks for a root, and when it becomes one. Pure."""

from __future__ import annotations

import pytest

from gemini_gnn.recovery.messages import Member
from gemini_gnn.recovery.worker.succession import Route, Target, following, holder_of, is_next, route

MEMBERS = [Member(f"h{number}", f"10.0.0.{number}", 7) for number in range(4)]
TARGETS = [Target(one.address, one.port) for one in MEMBERS]


def tried(path: Route, times: int, holder: Target | None = None, now: float = 0.0) -> tuple[Route, list[Target | None]]:
    found = []
    for _ in range(times):
        path, target = following(path, holder, now)
        found.append(target)
    return path, found


def test_the_first_that_is_left_is_next_at_once():
    assert is_next(route(MEMBERS, 1, TARGETS[0], 0.0), 0.0)
    assert is_next(route(MEMBERS, 0, None, 9.0), 0.0), "the lost root was an agent of this machine"


def test_each_machine_before_this_one_is_tried_then_the_lost_root_in_turn():
    path = route(MEMBERS, 3, TARGETS[0], 0.0)
    assert not is_next(path, 0.0)
    path, found = tried(path, 1)
    assert found == [TARGETS[1]] and not is_next(path, 0.0)
    path, found = tried(path, 4)
    assert found == [TARGETS[2], TARGETS[0], TARGETS[1], TARGETS[2]] and is_next(path, 0.0)


def test_without_a_shared_folder_the_machines_after_it_are_looked_at_and_do_not_keep_it_from_becoming_root():
    path = route(MEMBERS, 1, TARGETS[0], 0.0, private=True)
    assert is_next(path, 0.0)
    assert tried(path, 3)[1] == [TARGETS[0], TARGETS[2], TARGETS[3]]


def test_a_lost_root_that_comes_after_this_machine_is_tried_too():
    _, found = tried(route(MEMBERS, 1, TARGETS[3], 0.0), 4)
    assert found == [TARGETS[0], TARGETS[3], TARGETS[0], TARGETS[3]]


def test_a_broken_connection_leaves_time_for_the_heir():
    path, found = tried(route(MEMBERS, 2, TARGETS[0], 3.0), 5, now=2.9)
    assert set(found) == {TARGETS[0]} and path.tried == 0 and not is_next(path, 2.9)
    assert not is_next(path, 3.0), "machine 1 is still to be tried"
    path, found = tried(path, 1, now=3.0)
    assert found == [TARGETS[1]] and is_next(path, 3.0)


def test_a_machine_that_never_joined_is_not_looked_for():
    members = [MEMBERS[0], Member("", "", 0), *MEMBERS[2:]]
    assert route(members, 3, TARGETS[0], 0.0).others == (TARGETS[2],)


@pytest.mark.parametrize("until_s", [0.0, 3.0])
def test_the_holder_of_a_newer_term_is_tried_first_and_then_in_turn(until_s):
    holder = Target("10.0.0.9", 7)
    path, found = tried(route(MEMBERS, 2, TARGETS[0], until_s), 1, holder)
    assert found == [holder] and path.tried == 0
    _, found = tried(path, 6, holder, now=3.0)
    assert found == [TARGETS[1], TARGETS[0], holder] * 2
    _, found = tried(path, 1, Target("10.0.0.8", 7), now=3.0)
    assert found == [Target("10.0.0.8", 7)], "a newer one yet"


def test_who_holds_a_newer_term_of_the_same_start():
    record = {"term": 3, "start": "s", "address": "10.0.0.1", "port": 7}
    found = Target("10.0.0.1", 7)
    assert holder_of(record, 2, "s", TARGETS[2]) == found
    assert holder_of(record, 3, "s", TARGETS[2]) is None
    assert holder_of(record, 2, "another", TARGETS[2]) is None
    assert holder_of(record, 2, "s", found) is None, "this machine, as the root that it was"
    assert holder_of({**record, "port": 0}, 2, "s", TARGETS[2]) is None
    assert holder_of({}, 0, "", TARGETS[2]) is None
