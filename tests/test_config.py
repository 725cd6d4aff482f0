import contextlib
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemini_gnn.compose import CONFIGS, compose, groups, spelled, take
from gemini_gnn.config import (
    Config,
    Interval,
    SnapshotConfig,
    from_checked,
    from_mapping,
    interval,
    replicas_of,
    to_mapping,
)
from gemini_gnn.errors import ConfigError


def test_defaults_compose_and_round_trip():
    config = compose([])
    assert config.snapshot.mode == "memory" and config.dataset.name == "blocks"
    assert from_mapping(to_mapping(config)) == config


def test_a_trainer_gets_the_settings_that_were_checked_by_way_of_json():
    config = compose(
        ["sampling.fanouts=[3,-1]", "dataset.path=1e5", "+deepspeed.config.a.b=[1, null]", "optimizer.lr=1"]
    )
    assert from_checked(json.loads(json.dumps(to_mapping(config))), Config) == config


@pytest.mark.parametrize("choice", [f"{group}={option}" for group, options in groups().items() for option in options])
def test_every_option_of_every_group_composes(choice):
    if choice == "model=gat" or not choice.startswith("experiment"):
        compose([choice])
    else:
        assert isinstance(compose([choice]), Config)


def test_coauthorship_is_learnt_without_weight_decay():
    for name in ("coauthor_cs", "coauthor_physics"):
        assert compose([f"dataset={name}"]).optimizer.weight_decay == 0
    assert compose(["dataset=coauthor_cs", "optimizer.weight_decay=0.1"]).optimizer.weight_decay == 0.1


def test_overrides_reach_the_typed_config():
    config = compose(
        ["--local_rank=1", "dataset.nodes=77", "sampling.fanouts=[3,-1]", "deepspeed=zero2", "optimizer.lr=1"]
    )
    assert config.dataset.nodes == 77
    assert config.sampling.fanouts == [3, -1]
    assert config.deepspeed.zero == 2
    assert config.optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["foo=1"], "foo"),
        (["+model.foo=1"], "foo"),
        (["dataset=nope"], "dataset: expected one of barabasi_albert, .*, wikics; got 'nope'"),
        (["dataset=edge-lst"], "did you mean edge_list?"),
        (["dataset.nam=x"], "dataset.nam: there is no such setting (did you mean dataset.name"),
        (["lr=0.1"], "did you mean optimizer.lr?"),
        (["datset=cora"], "did you mean dataset or"),
        (["cora"], "did you mean dataset=cora?"),
        (["optimizer.lr=fast"], "optimizer.lr=fast | Value 'fast' of type 'str' could not be converted to Float"),
        (["training.epochs=abc"], "Integer"),
        (["training.epochs=0"], "training.epochs: expected at least 1"),
        (["training.precision=half"], "training.precision: expected one of fp32, bf16, bf16_products; got 'half'"),
        (["training=bf16_products", "model._target_=own.M"], "training.precision: expected fp32 or bf16 with model._t"),
        (["training=bf16_products", "+deepspeed.config.bf16.enabled=true"], "deepspeed.config: expected no precision"),
        (["resume=maybe"], "resume: expected one of auto, never, must"),
        (["sampling.fanouts=[10]"], "one fanout per layer"),
        (["sampling.fanouts=[10,0]"], "sampling.fanouts"),
        (["recovery.heartbeat_s=0"], "recovery.heartbeat_s: expected more than 0; got 0"),
        (["recovery.silence_s=0.7"], "recovery.silence_s: expected at least 4 heartbeats (recovery.heartbeat_s=0.2)"),
        (["recovery.standby_machines=-1"], "recovery.standby_machines: expected 0 or more"),
        (["recovery.return_s=-1"], "recovery.return_s: expected 0 (replaced at once) or more"),
        (["recovery.silence_s=nan"], "recovery.silence_s: expected at least 4"),
        (["recovery.wait_s=-1"], "recovery.wait_s: expected more than 0"),
        (["recovery.same_step_failures=-1"], "recovery.same_step_failures: expected 0 (never restart) or more"),
        (["snapshot.every=0"], "snapshot.every: expected auto, or at least 1 step; got 0"),
        (["snapshot.every=often"], "snapshot.every: expected auto, or at least 1 step; got 'often'"),
        (["snapshot.mtbf_s=0"], "snapshot.mtbf_s: expected more than 0; got 0.0"),
        (["snapshot.replicas=0"], "snapshot.replicas: expected auto, or at least 1 (the own copy); got 0"),
        (["snapshot.replicas=two"], "snapshot.replicas: expected auto, or at least 1 (the own copy); got 'two'"),
        (["snapshot.replicate_every_s=-1"], "snapshot.replicate_every_s: expected 0 or more; got -1.0"),
        (["snapshot.replica_bytes_per_s=5"], "snapshot.replica_bytes_per_s: expected 0 (no limit), or at least 100000"),
        (["snapshot.persist_every=soon"], 'snapshot.persist_every: expected a time ("10min", "90s", "2h"), steps'),
        (["snapshot.persist_keep=0"], "snapshot.persist_keep: expected at least 1; got 0"),
        (["--multirun"], "--multirun is not supported"),
        (["-x"], "unknown option"),
        (["run_dir"], "KEY=VALUE"),
    ],
)
def test_a_bad_setting_is_one_clear_error(arguments, said):
    with pytest.raises(ConfigError, match=re.sub(r"([\[()?|])", r"\\\1", said)):
        compose(arguments)


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("dataset.split=random:0.6,0.2,0.2", "dataset.split", "random:0.6,0.2,0.2"),
        ('dataset.split="random:0.6,0.2,0.2"', "dataset.split", "random:0.6,0.2,0.2"),
        ("dataset.split=3", "dataset.split", "3"),
        ("dataset.path=/my data/a=b (1).csv", "dataset.path", "/my data/a=b (1).csv"),
        ("dataset.path=null", "dataset.path", None),
        ("partition.folder=Null", "partition.folder", None),
        ("run_dir=runs/lr=0.1", "run_dir", "runs/lr=0.1"),
        ("run_dir=${dataset.name}-1", "run_dir", "blocks-1"),
        ("sampling.fanouts=10,-1", "sampling.fanouts", [10, -1]),
        ("sampling.fanouts=[10,-1]", "sampling.fanouts", [10, -1]),
        ("model.kwargs.k=3", "model.kwargs", {"k": 3}),
        ("model.kwargs={k: 3}", "model.kwargs", {"k": 3}),
        ("+model.kwargs.k=3", "model.kwargs", {"k": 3}),
        ("dataset=ogbn-arxiv", "dataset.name", "ogbn-arxiv"),
        ("dataset=Cora", "dataset.name", "cora"),
    ],
)
def test_values_mean_what_they_say(argument, name, value):
    found = compose([argument])
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10min", Interval(600.0)),
        ("90 s", Interval(90.0)),
        ("1.5h", Interval(5400.0)),
        ("500 steps", Interval(steps=500)),
        ("1 step", Interval(steps=1)),
        ("never", Interval()),
        *((text, None) for text in ("soon", "", "10", "-5s", "1.5 steps", "10 min later", "5 days")),
    ],
)
def test_intervals(text, expected):
    assert interval(text) == expected


@pytest.mark.parametrize(
    ("setting", "machines", "expected"),
    [
        ("snapshot.replicas=auto", 1, 1),
        ("snapshot.replicas=auto", 2, 2),
        ("snapshot.replicas=auto", 5, 2),
        ("snapshot.replicas=1", 3, 1),
        ("snapshot.replicas=3", 3, 3),
        ("snapshot=nfs", 3, 1),
        ("snapshot.failure_domains=[a,a,b]", 3, 2),
    ],
)
def test_copies_of_each_shard(setting, machines, expected):
    """The command line gives a number as text."""
    assert replicas_of(compose([setting]).snapshot, machines) == expected


@pytest.mark.parametrize(
    ("settings", "machines", "said"),
    [
        (
            SnapshotConfig(failure_domains=["a", "b"]),
            3,
            r"failure_domains: expected one name for each of the 3 .*got 2",
        ),
        (
            SnapshotConfig(replicas=3),
            2,
            "replicas: expected at most one copy for each of the 2 machines that train; got 3",
        ),
        (
            SnapshotConfig(replicas=2),
            1,
            "replicas: expected at most one copy for each of the 1 machine that trains; got 2",
        ),
        (SnapshotConfig(replicas=1, failure_domains=["a"]), 2, "failure_domains: expected one name for each of the 2"),
    ],
)
def test_copies_that_the_machines_cannot_keep(settings, machines, said):
    with pytest.raises(ConfigError, match=said):
        replicas_of(settings, machines)


def test_an_option_spelled_as_its_file_is_taken_as_it_is():
    offered = {"experiment": ["papers-100M", "quick_look"]}
    assert spelled("experiment=papers-100M", {}, offered) == "experiment=papers-100M"
    assert spelled("experiment=Quick-Look", {}, offered) == "experiment=quick_look"


def test_a_recovery_may_be_asked_to_be_quick_or_not_to_be():
    quick = compose(["recovery.heartbeat_s=0.05", "recovery.silence_s=0.2", "recovery.same_step_failures=0"]).recovery
    assert (quick.heartbeat_s, quick.silence_s, quick.same_step_failures) == (0.05, 0.2, 0)


def test_take_splits_what_is_not_a_setting():
    assert take(["a=1", "+export=x.csv", "b=2"], "export") == (["a=1", "b=2"], {"export": "x.csv"})


def test_there_is_no_hydra_folder_and_no_clock_in_the_configs():
    text = "".join(path.read_text() for path in CONFIGS.rglob("*.yaml"))
    assert "now:" not in text and "hydra:" not in text


@given(
    st.dictionaries(st.sampled_from(["seed", "run_dir", "resume", "dataset"]), st.integers() | st.text(), max_size=3)
)
def test_any_mapping_gives_a_config_or_a_config_error(mapping):
    with contextlib.suppress(ConfigError):
        assert isinstance(from_mapping(mapping), Config)
