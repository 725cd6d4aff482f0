"""Who keeps whose shards, against counting by hand: every number of machines up to 8, every way to share them out to racks."""

from collections import Counter
from itertools import combinations
from math import comb

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.replicas.placement import (
    MOST_NAMED,
    explain,
    kept,
    placement,
    survival,
    survival_closed_form,
    survives,
)

SIZES = [(machines, replicas) for machines in range(1, 9) for replicas in range(1, min(machines, 4) + 1)]


def racks(machines, most=None):
    """Every way to share machines out to racks, as sizes in falling order."""
    if not machines:
        yield ()
    for size in range(min(machines, most or machines), 0, -1):
        for others in racks(machines - size, size):
            yield (size, *others)


def named(sizes):
    return [f"rack-{rack}" for rack, size in enumerate(sizes) for _ in range(size)]


def ring(machines, replicas):
    return tuple(tuple((machine + i) % machines for i in range(replicas)) for machine in range(machines))


def counted(holders, lost):
    """The probability of survival, set of lost machines by set of lost machines."""
    machines = range(len(holders))
    sets = [set(one) for one in combinations(machines, lost)]
    return sum(all(set(holders[m]) - gone for m in machines) for gone in sets) / len(sets)


@pytest.mark.parametrize(("machines", "replicas"), SIZES)
def test_every_machine_holds_its_own_shards_and_those_of_as_many_others_as_any(machines, replicas):
    for sizes in [(), *racks(machines)]:
        holders = placement(machines, replicas, named(sizes))
        assert [one[0] for one in holders] == list(range(machines))
        assert {len(set(one)) for one in holders} == {len(one) for one in holders} == {replicas}
        for machine in range(machines):
            assert len(kept(holders, machine)) == replicas - 1
            assert all(machine in holders[owner] and owner != machine for owner in kept(holders, machine))


@pytest.mark.parametrize(("machines", "replicas"), SIZES)
def test_groups_where_they_fit_and_one_ring_of_the_rest(machines, replicas):
    holders = placement(machines, replicas)
    groups = machines // replicas - (machines % replicas > 0)
    for machine, one in enumerate(holders):
        group = machine // replicas
        if group < groups:
            assert set(one) == set(range(group * replicas, (group + 1) * replicas))
        else:
            ring = range(groups * replicas, machines)
            place = machine - ring.start
            assert one == tuple(ring[(place + i) % len(ring)] for i in range(replicas))


def most_apart(domains, replicas):
    """No placement can do better: each machine's shards go to a domain once, and a domain has so much room."""
    graph, size = networkx.DiGraph(), Counter(domains)
    graph.add_nodes_from(["from", "to"])
    for machine, own in enumerate(domains):
        graph.add_edge("from", machine, capacity=replicas - 1)
        graph.add_edges_from([(machine, other) for other in size if other != own], capacity=1)
    graph.add_edges_from((name, "to", {"capacity": (replicas - 1) * n}) for name, n in size.items())
    return len(domains) + networkx.maximum_flow_value(graph, "from", "to")


@pytest.mark.parametrize(("machines", "replicas"), SIZES)
def test_copies_are_in_as_many_racks_as_can_be(machines, replicas):
    for sizes in racks(machines):
        domains = named(sizes)
        found = [len({domains[holder] for holder in one}) for one in placement(machines, replicas, domains)]
        assert sum(found) == most_apart(domains, replicas), sizes
        assert (min(found) == replicas) == (max(sizes) <= machines // replicas), sizes


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60), st.integers(1, 6))
def test_racks_in_any_order_are_kept_apart_where_no_rack_is_too_large(domains, replicas):
    machines = len(domains)
    if max(Counter(domains).values()) <= machines // replicas:
        holders = placement(machines, replicas, domains)
        assert all(len({domains[holder] for holder in one}) == replicas for one in holders)
        assert {len(kept(holders, machine)) for machine in range(machines)} == {replicas - 1}
        for rack in set(domains):
            assert survives(holders, [m for m in range(machines) if domains[m] == rack]) or replicas == 1


def test_without_need_racks_change_nothing():
    assert placement(6, 2, ["a", "b"] * 3) == placement(6, 2, list("abcdef")) == placement(6, 2, ["a"] * 6)
    assert placement(6, 2) == ((0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4))
    assert placement(4, 2, ["a", "a", "b", "b"]) == ((0, 2), (1, 3), (2, 0), (3, 1))
    assert placement(7, 3) == ((0, 1, 2), (1, 2, 0), (2, 0, 1), (3, 4, 5), (4, 5, 6), (5, 6, 3), (6, 3, 4))


@pytest.mark.parametrize(("machines", "replicas", "domains"), [(3, 4, ()), (3, 0, ()), (0, 1, ()), (3, 2, ["a", "b"])])
def test_more_replicas_than_machines_and_other_numbers_of_domains_are_refused(machines, replicas, domains):
    with pytest.raises(SnapshotError, match=r"expected .* got \d+\. (Set|List) "):
        placement(machines, replicas, domains)


# How likely it survives


@pytest.mark.parametrize(("machines", "replicas"), SIZES)
def test_the_probability_to_survive_is_that_of_counting_every_set(machines, replicas):
    for sizes in [(), *racks(machines)]:
        holders = placement(machines, replicas, named(sizes))
        for lost in range(machines + 1):
            found = survival(holders, lost)
            assert found == pytest.approx(counted(holders, lost), abs=1e-12)
            if not sizes and machines % replicas == 0 and lost < 2 * replicas:
                assert found == pytest.approx(survival_closed_form(machines, replicas, lost), abs=1e-12)


@pytest.mark.parametrize(("machines", "replicas"), [(9, 2), (9, 3), (10, 4), (11, 5)])
def test_one_ring_of_all_survives_as_often_as_counted(machines, replicas):
    holders = ring(machines, replicas)
    for lost in range(machines + 1):
        assert survival(holders, lost) == pytest.approx(counted(holders, lost), abs=1e-12)


def test_the_published_figures():
    assert [round(survival(placement(16, 2), k), 3) for k in (1, 2, 3)] == [1, 0.933, 0.8]
    assert [round(survival(ring(16, 2), k), 3) for k in (2, 3)] == [0.867, 0.629]


@pytest.mark.parametrize(("machines", "replicas"), [(1000, 2), (10_000, 4)])
def test_of_many_machines_the_probability_is_exact(machines, replicas):
    assert survival(placement(machines, replicas), replicas) == 1 - machines // replicas / comb(machines, replicas)
    assert survival(ring(machines, replicas), replicas) == 1 - machines / comb(machines, replicas)


@pytest.mark.parametrize(("machines", "replicas", "lost"), [(5, 2, 1), (8, 2, 4), (2, 2, 3), (2, 4, 1), (4, 2, -1)])
def test_the_formula_is_refused_where_it_does_not_hold(machines, replicas, lost):
    with pytest.raises(SnapshotError, match="expected replicas that divide"):
        survival_closed_form(machines, replicas, lost)


@pytest.mark.parametrize("lost", [-1, 5])
def test_no_more_machines_are_lost_than_there_are(lost):
    with pytest.raises(SnapshotError, match="expected from 0 to 4 lost machines"):
        survival(placement(4, 2), lost)


# The words


def hosts(machines):
    return [f"h{m + 1}" for m in range(machines)]


def test_a_start_says_who_keeps_whose_shards_and_what_that_survives():
    assert explain(placement(4, 2), hosts(4)) == [
        "replicas=2: these machines keep each other's shards: h1 h2; h3 h4",
        "probability that memory keeps every shard, by machines lost at once: 1: 100 %, 2: 66.7 %, 3: 0 %",
    ]
    assert explain(placement(5, 3), hosts(5))[:-1] == [
        "replicas=3: in the ring h1 > h2 > h3 > h4 > h5 > h1 the next 2 machines keep the shards of each"
    ]
    assert explain(placement(5, 2), hosts(5))[:-1] == [
        "replicas=2: these machines keep each other's shards: h1 h2",
        "replicas=2: in the ring h3 > h4 > h5 > h3 the next machine keeps the shards of each",
    ]


def test_a_start_without_replicas_says_so():
    alone = ["replicas=1: every machine keeps its own shards only; if one is lost, its shards are lost"]
    assert explain(placement(1, 1), hosts(1), ["a"]) == alone
    assert explain(placement(2, 1), hosts(2))[1].endswith("1: 0 %")


def test_many_machines_are_explained_in_few_lines():
    lines = explain(placement(201, 2), hosts(201))
    assert len(lines) == 3 and all(len(line) < 150 for line in lines)
    assert f"h15 h16; and {99 - MOST_NAMED} more groups of 2" in lines[0]
    assert "in the ring h199 > h200 > h201 > h199" in lines[1]
    assert "1: 100 %, 2: 99.5 %," in lines[2]
    assert "2: 99.9 %" in explain(placement(3000, 2), hosts(3000))[1], "what is not certain is not called 100 %"


def test_racks_are_explained():
    apart = ["a", "a", "b", "b"]
    assert explain(placement(4, 2, apart), hosts(4), apart)[2:] == [
        "no two copies of a shard are in one failure domain"
    ]
    large = ["a", "a", "a", "b"]
    assert explain(placement(4, 2, large), hosts(4), large)[2:] == [
        "copies of the shards of h1 and h2 share a failure domain: a has 3 of 4 machines; "
        "with 2 replicas at most 2 can be kept apart"
    ]
