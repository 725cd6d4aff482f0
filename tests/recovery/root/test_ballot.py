"""Terms by majority: every order of joining, leaving, voting and dying in small cases. Never do two memberships train."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest

from gemini_gnn.observe import terms, votes
from gemini_gnn.recovery.root import ballot


def test_a_majority_of_the_voters_grants_a_term():
    claim = ballot.begin("me", 3, 1, ["a", "b", "c"])
    assert claim.number == 4
    claim = ballot.answered(claim, "a", 4, True, 4, [])
    assert not ballot.is_won(claim, ["a", "b"])
    claim = ballot.answered(claim, "x", 4, True, 4, [])
    assert not ballot.is_won(claim, ["a", "x"]), "a machine that joined later has no vote"
    claim = ballot.answered(claim, "b", 4, True, 4, [])
    assert ballot.is_won(claim, ["a", "b"])
    assert ballot.answered(claim, "c", 3, True, 3, []) == claim, "an answer to an earlier question"


def test_a_refusal_asks_for_a_higher_number():
    claim = ballot.answered(ballot.begin("me", 0, 1, ["a", "b", "c"]), "a", 1, True, 1, [])
    claim = ballot.answered(claim, "b", 1, False, 6, [])
    assert (claim.number, claim.granted) == (7, frozenset())


def test_what_may_have_won_needs_a_witness():
    claim = ballot.begin("me", 1, 3, ["a", "b", "c"])
    other = {"term": 2, "claimer": "other", "trains": ["c", "d"]}
    mine = {"term": 2, "claimer": "me", "trains": ["e"]}
    claim = ballot.answered(claim, "a", 3, True, 3, [other])
    claim = ballot.answered(claim, "b", 3, True, 3, [mine])
    assert ballot.has_majority(claim) and ballot.lacks(claim, ["a", "b"]) == [2]
    assert ballot.is_won(claim, ["a", "b", "d"])


def test_a_vote_is_on_the_disk_and_is_given_once(tmp_path):
    folder = tmp_path / "terms"
    folder.mkdir()
    record = {"start": "s", "claimer": "me", "trains": []}
    assert votes.grant(tmp_path, 5, 1, record) == (True, [])
    assert votes.grant(tmp_path, 5, 1, record | {"claimer": "other"}) == (False, [])
    assert votes.grant(tmp_path, 4, 1, record) == (False, [])
    granted, earlier = votes.grant(tmp_path, 7, 1, record | {"claimer": "other"})
    assert granted and [one["term"] for one in earlier] == [5] and earlier[0]["claimer"] == "me"
    assert votes.grant(tmp_path, 9, 1, record | {"start": "another start"}) == (True, [])
    votes.learn(tmp_path, record | {"term": 8})
    assert votes.newest(tmp_path) == 9 and terms.newest_term(tmp_path)["term"] == 8
    assert sorted(path.name for path in folder.iterdir()) == ["8.json", "9.vote"]
    assert votes.won(tmp_path, 7, "s")["term"] == 8
    assert votes.won(tmp_path, 8, "s") == votes.won(tmp_path, 7, "another start") == {}


# --- every order ------------------------------------------------------------------------------------------------------

# Two roots, and some machines, each of which follows one of them. The machines of a membership step together: only while all of
# them follow its root, and none has left since it began. A machine that leaves has lost its trainer. An answer may be lost.


@dataclass(frozen=True)
class Root:
    """``term``: the newest that it knows, in which the machines ``knew`` trained. ``trains``: its own membership.

    ``claim``: under way, for these ``seats``. ``life``: counts the processes that were this root.
    """

    term: int
    knew: tuple[int, ...]
    trains: tuple[int, ...] = ()
    claim: ballot.Ballot | None = None
    seats: tuple[int, ...] = ()
    number: int = 0
    life: int = 0


@dataclass(frozen=True)
class World:
    """``follows``: by machine, its root. ``disks``: by machine its votes: number, claimer, who is to train."""

    follows: tuple[int, ...]
    roots: tuple[Root, ...]
    disks: tuple[tuple[tuple[int, str, tuple[int, ...]], ...], ...]


@dataclass(frozen=True)
class Rules:
    """One of them is broken to see that the others do not do."""

    witness: bool = True
    majority: bool = True
    disk: bool = True


def here(world, root):
    return tuple(machine for machine, one in enumerate(world.follows) if one == root)


def can_step(world, root):
    trains = world.roots[root].trains
    return bool(trains) and set(trains) <= set(here(world, root))


def put(values, place, value):
    return (*values[:place], value, *values[place + 1 :])


def with_root(world, place, **changes):
    return replace(world, roots=put(world.roots, place, replace(world.roots[place], **changes)))


def moved(world, machine, rules):
    """It leaves its root, whose membership it may have been of, and follows the other one. Both plan anew."""
    now = world.follows[machine]
    world = replace(world, follows=put(world.follows, machine, 1 - now))
    if not rules.disk:
        world = replace(world, disks=put(world.disks, machine, ()))
    if machine in world.roots[now].trains:
        world = with_root(world, now, trains=())
    for root in (0, 1):
        world = with_root(world, root, claim=None, seats=())
    return world


def died(world, number):
    """Another process is root in its place; it knows only of the beginning. Trainers are reaped before they join it."""
    root = Root(1, tuple(range(len(world.roots[number].knew))), life=world.roots[number].life + 1)
    return replace(world, roots=put(world.roots, number, root))


def answered(world, number, machine, rules, heard):
    """The machine votes on the claim of the root that it follows; the answer is ``heard``, or lost."""
    root, disk = world.roots[number], world.disks[machine]
    wanted = root.claim.number
    newest = max([one[0] for one in disk], default=1)
    earlier = [{"term": n, "claimer": by, "trains": trains} for n, by, trains in disk if root.term < n < wanted]
    if granted := wanted > newest:
        world = replace(world, disks=put(world.disks, machine, (*disk, (wanted, root.claim.claimer, root.seats))))
    if not heard:
        return world
    seen = ballot.answered(root.claim, machine, wanted, granted, max(newest, wanted), earlier)
    enough = ballot.has_majority(seen) if rules.majority else seen.granted
    if enough and not (rules.witness and ballot.lacks(seen, here(world, number))):
        return with_root(world, number, term=seen.number, knew=root.seats, trains=root.seats, claim=None, seats=())
    return with_root(world, number, claim=seen, number=seen.number)


def after(world, rules, lives):
    """All that can happen next, and how often that is in a random order."""
    for machine in range(len(world.follows)):
        yield 1, moved(world, machine, rules)
    for number, root in enumerate(world.roots):
        follow, places = here(world, number), len(root.knew)
        if root.life < lives:
            yield 1, died(world, number)
        if root.claim is not None:
            for machine in set(follow) - root.claim.granted:
                yield 20, answered(world, number, machine, rules, heard=True)
                yield 1, answered(world, number, machine, rules, heard=False)
        elif not root.trains and len(follow) >= places and set(root.knew) & set(follow):
            claim = ballot.begin(f"{number}.{root.life}", root.term, root.number + 1, range(len(world.follows)))
            for seats in {follow[:places], follow[-places:]}:
                yield 10, with_root(world, number, seats=seats, claim=claim, number=claim.number)


def start_of(machines, seats):
    trains = tuple(range(seats))
    return World((0,) * machines, (Root(1, trains, trains), Root(1, trains)), ((),) * machines)


def explored(machines, seats, numbers, lives):
    """How many worlds can be reached with terms up to ``numbers``, and the first in which two memberships can step."""
    start = start_of(machines, seats)
    seen, left = {start}, [start]
    while left:
        world = left.pop()
        if can_step(world, 0) and can_step(world, 1):
            return len(seen), world
        for _, one in after(world, Rules(), lives):
            if one not in seen and all(root.number <= numbers for root in one.roots):
                seen.add(one)
                left.append(one)
    return len(seen), None


def walked(machines, seats, walks, rules=Rules()):
    """The first world of so many random walks in which two memberships can step; and how many terms were won."""
    draw, won = random.Random(7), 0
    for _ in range(walks):
        world = start_of(machines, seats)
        for _ in range(80):
            weights, worlds = zip(*after(world, rules, lives=2), strict=True)
            (world,) = draw.choices(worlds, weights)
            if can_step(world, 0) and can_step(world, 1):
                return world, won
        won += sum(root.term > 1 for root in world.roots)
    return None, won


@pytest.mark.parametrize("case", [(3, 1, 2, 0), (3, 1, 2, 1), (4, 2, 2, 0)])
def test_never_do_two_memberships_train(case):
    worlds, bad = explored(*case)
    assert bad is None, bad
    assert worlds > 1000


@pytest.mark.parametrize(("machines", "seats"), [(3, 1), (4, 2), (5, 2)])
def test_never_do_two_memberships_train_in_random_orders(machines, seats):
    bad, won = walked(machines, seats, 400)
    assert bad is None, bad
    assert won > 400


@pytest.mark.parametrize("rules", [Rules(witness=False), Rules(majority=False), Rules(disk=False)])
def test_each_rule_is_needed(rules):
    assert walked(5, 2, 1000, rules)[0] is not None
