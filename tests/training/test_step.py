"""The parts of one optimizer step: what its ranks agree on, when, and how its seconds are counted."""

import numpy as np
import pytest
import torch

from gemini_gnn.config import Config
from gemini_gnn.training import loop
from gemini_gnn.training.data import MicroBatch
from gemini_gnn.training.loop import Agreed, Phases, agree
from tests.ranks import run_ranks


def agreed_with(rank, world, unready, asked_to_stop):
    group = torch.distributed.new_group(backend="gloo")
    answer = agree(group, 1.5 * rank, rank not in unready, rank in asked_to_stop)
    return answer.loss_sum, answer.capture, answer.stop, answer.wait_s > 0


@pytest.mark.parametrize(
    ("unready", "asked_to_stop", "capture", "stop"),
    [((), (), True, False), ((2,), (), False, False), ((0, 1, 2), (1,), False, True), ((), (0, 2), True, True)],
)
def test_one_rank_without_a_slot_or_asked_to_stop_speaks_for_all(unready, asked_to_stop, capture, stop):
    assert run_ranks(agreed_with, 3, unready, asked_to_stop) == [(4.5, capture, stop, True)] * 3


def test_a_single_rank_agrees_with_itself():
    assert agree(None, 2.5, ready=True, stop=False) == Agreed(2.5, capture=True, stop=False, wait_s=0.0)
    assert agree(None, 2.5, ready=False, stop=True) == Agreed(2.5, capture=False, stop=True, wait_s=0.0)


def gradients_before_and_after(rank, world, zero):
    from gemini_gnn.training import engine as deepspeed_engine

    config = Config()
    config.deepspeed.zero = zero
    config.training.accumulation = 2
    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    engine = deepspeed_engine.build_engine(model, config, 10)
    found = []
    for _ in range(2):
        for micro in range(2):
            loss = engine(torch.full((1, 2), float(rank + 1))).sum()
            if micro == 0:
                engine.backward(loss)
            else:
                found.append(deepspeed_engine.backward(engine, loss, lambda: model.weight.grad[0, 0].item()))
            engine.step()
    with pytest.raises(ZeroDivisionError):
        deepspeed_engine.backward(engine, engine(torch.ones(1, 2)).sum(), lambda: 1 / 0)
    return found, "allreduce_gradients" in vars(engine)


def test_ranks_meet_when_their_gradients_are_computed_and_not_yet_reduced():
    """Each rank still has its own gradient: the mean of its two micro-batches, not the mean over ranks."""
    for rank, (found, left) in enumerate(run_ranks(gradients_before_and_after, 2, 0)):
        assert found == [rank + 1.0, rank + 1.0]
        assert not left, "DeepSpeed's own reduction is back, also after an error"


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def test_a_span_adds_its_seconds_to_its_phase(clock):
    phases = Phases()
    for seconds in (2.0, 3.0):
        with phases.span("forward"):
            clock(seconds)
        clock(10.0)
    with phases.span("report"):
        clock(1.0)
    assert (phases.forward, phases.report, phases.total()) == (5.0, 1.0, 6.0)


def test_waiting_for_a_batch_is_shared_out_as_the_time_to_make_it_was(clock):
    def batches():
        for sample_s, fetch_s, transfer_s, meet_s in [(6.0, 2.0, 2.0, 1.0), (0.0, 0.0, 0.0, 0.0)]:
            clock(4.0)
            yield MicroBatch(None, np.zeros(1), None, [], 1, sample_s, fetch_s, transfer_s, meet_s)

    phases, made = Phases(), batches()
    phases.next_of(made)
    assert (phases.input, phases.exposed, phases.input_others) == (4.0, 1.0, 0.5)
    phases.next_of(made)  # made in no time, as far as the clock can tell
    assert (phases.input, phases.exposed, phases.input_others) == (8.0, 1.0, 0.5)
