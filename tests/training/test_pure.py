"""Metrics, schedules and run state: no processes."""

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from gemini_gnn.config import OptimizerConfig
from gemini_gnn.training import metrics
from gemini_gnn.training.schedule import lr_factor
from gemini_gnn.training.state import RunState, evaluation_due, record_evaluation


def test_single_label_metrics_equal_sklearn_and_add_up_over_ranks():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(500, 7)), rng.integers(-1, 6, 500)
    whole = metrics.counts(logits, y)
    halves = metrics.counts(logits[:123], y[:123]) + metrics.counts(logits[123:], y[123:])
    assert (whole == halves).all()
    known, predicted = y[y >= 0], logits.argmax(1)[y >= 0]
    got = metrics.from_counts(whole)
    assert got["accuracy"] == pytest.approx(accuracy_score(known, predicted))
    assert got["micro_f1"] == pytest.approx(f1_score(known, predicted, average="micro"))
    assert got["macro_f1"] == pytest.approx(f1_score(known, predicted, average="macro"))


def test_multi_label_metrics_equal_sklearn():
    rng = np.random.default_rng(1)
    logits, y = rng.normal(size=(300, 5)), rng.integers(0, 2, (300, 5)).astype(np.uint8)
    got = metrics.from_counts(metrics.counts(logits, y))
    assert got["accuracy"] == pytest.approx(accuracy_score(y, logits > 0))
    assert got["micro_f1"] == pytest.approx(f1_score(y, logits > 0, average="micro"))
    assert got["macro_f1"] == pytest.approx(f1_score(y, logits > 0, average="macro"))


def test_metrics_of_nothing_are_not_a_number():
    assert np.isnan(metrics.from_counts(metrics.counts(np.zeros((0, 3)), np.zeros(0, np.int64)))["accuracy"])


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [("constant", 99, 1.0), ("linear", 60, 0.5), ("cosine", 60, 0.5), ("cosine", 110, 0.0), ("step", 110, 0.25)],
)
def test_schedules(schedule, step, factor):
    config = OptimizerConfig(schedule=schedule, warmup_steps=10, step_every=50)
    assert lr_factor(step, config, 110) == pytest.approx(factor)
    assert lr_factor(4, config, 110) == pytest.approx(0.5), "half-way through the warm-up"


def test_evaluations_are_due_at_epoch_ends_once():
    state = RunState(step=30)
    assert evaluation_due(state, 10, 1, 5) == 3
    state.evaluated = 3
    assert evaluation_due(state, 10, 1, 5) == 0
    assert evaluation_due(RunState(step=31), 10, 1, 5) == 0
    assert evaluation_due(RunState(step=30), 10, 2, 5) == 0
    assert evaluation_due(RunState(step=50), 10, 0, 5) == 5, "always at the end"
    assert evaluation_due(RunState(), 10, 1, 5) == 0


def test_the_best_evaluation_is_the_earliest_of_equals():
    state = RunState()
    assert record_evaluation(state, 1, {"accuracy": 0.5}, {"accuracy": 0.4}, "accuracy")
    assert not record_evaluation(state, 2, {"accuracy": 0.5}, {"accuracy": 0.9}, "accuracy")
    assert state.best == {"epoch": 1, "val_accuracy": 0.5, "test_accuracy": 0.4} and state.worse == 1


def test_run_state_round_trips_through_json():
    state = RunState(step=7, best={"epoch": 1.0}, losses=[[7, 1, 0.25]])
    other = RunState()
    other.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert other == state
