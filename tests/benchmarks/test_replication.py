"""What benchmarks/replication.py makes of its figures; its hosts copy, and leave nothing."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gemini_gnn.snapshot.store import arena

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import replication
import wide


def step(t, number, captured):
    return {"kind": "step", "t": t, "step": number, "captured": captured}


def test_the_pace_is_that_of_the_steps_after_the_first_ones():
    events = [{"kind": "start", "t": 0.0}, step(5.0, 1, True), step(10.0, 2, True), step(11.0, 3, False)]
    events += [step(12.0, 4, True), step(13.0, 5, False), step(14.0, 6, True)]
    assert replication.pace(events, begin=2) == (1.0, 2.0)
    assert replication.pace(events[:4], begin=2) == (1.0, float("inf"))


@pytest.mark.parametrize(("replicas", "slots"), [(1, 3), (2, 5), (3, 7)])
def test_slots_of_a_machine(replicas, slots):
    assert replication.slots_bytes(10, replicas) == 10 * slots


def test_pieces_that_have_not_changed():
    a = np.arange(10, dtype=np.uint8)
    b = a.copy()
    b[[0, 9]] = 77
    assert replication.unchanged(a, b, 4) == pytest.approx(1 / 3)
    assert replication.unchanged(a, a, 4) == 1.0


def test_planes_are_the_same_bytes_in_another_order():
    raw = np.array([1, 2, 3, 4, 11, 12, 13, 14, 99], np.uint8)
    assert replication.planes(raw).tolist() == [1, 11, 2, 12, 3, 13, 4, 14, 99]


@pytest.mark.parametrize(
    ("ratio", "compress_bytes_s", "times"),
    [(1.0, 1e12, 1.0), (0.5, 1e12, 2.0), (0.5, 50e6, 0.5), (0.8, 110e6, 1.1)],
)
def test_the_slower_of_core_and_link_decides_what_compression_gains(ratio, compress_bytes_s, times):
    assert replication.gain(ratio, compress_bytes_s, 100e6) == pytest.approx(times)


@pytest.mark.parametrize("busy", [False, True])
def test_the_model_has_gradients_for_all_it_weighs(busy):
    class Block:
        num_dst = 3

    model = wide.Wide(4, 0, 2, 1, parameters=1000, compute_s=0.001, busy=busy)
    logits = model(torch.randn(5, 4), [Block])
    logits.sum().backward()
    assert logits.shape == (3, 2) and (model.wide.grad != 0).all()


def test_copies_over_loopback_beside_a_bare_socket(tmp_path):
    before = set(arena.list_folder(arena.home()))
    options = argparse.Namespace(links=[replication.LOOPBACK], push=[300_000], rounds=1)
    (row,) = replication.push_section(options, tmp_path)
    assert row["seconds"].keys() >= {"bare socket", "push", "both at once"}
    assert all(0 < one < 20 for one in row["seconds"].values()) and row["ratios"]["push / bare socket"] > 0
    left = {one for one in arena.list_folder(arena.home()) if one.name.startswith("benchmark-")} - before
    assert left == set()
