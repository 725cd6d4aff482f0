"""Which fault is due when: texts, seeds, and what is refused. Pure."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemini_gnn.compose import compose
from gemini_gnn.config import FaultsConfig
from gemini_gnn.errors import ConfigError
from gemini_gnn.faults import schedule
from gemini_gnn.faults.schedule import KINDS, OF_MACHINE, OF_RANK, PHASES, Fault, due, parse, parse_command, planned
from gemini_gnn.recovery.board import Phase


def test_phases_are_the_words_of_the_board():
    assert tuple(phase.word for phase in Phase) == PHASES


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill-rank 2 @ step 5", Fault("kill-rank", "2", at_step=5)),
        ("kill-rank 1 @ step 7 in backward", Fault("kill-rank", "1", at_step=7, phase="backward")),
        ("kill-rank 0 @ step 0 in start-up", Fault("kill-rank", "0", at_step=0, phase="start-up")),
        ("hang-collective 1 @ step 9", Fault("hang-collective", "1", at_step=9, phase="agreement")),
        ("hang-collective 1 @ step 9 in sampling", Fault("hang-collective", "1", at_step=9, phase="sampling")),
        ("raise-rank 3 @ step 4", Fault("raise-rank", "3", at_step=4)),
        ("oom-rank 0 @ step 6", Fault("oom-rank", "0", at_step=6)),
        ("stop-rank 1 @ 8.5s", Fault("stop-rank", "1", at_s=8.5)),
        ("  kill-agent   h1 @ 12 s ", Fault("kill-agent", "h1", at_s=12.0)),
        ("kill-agent rank:3 @ 12 s", Fault("kill-agent", "rank:3", at_s=12.0)),
        ("kill-root @ step 20", Fault("kill-root", at_step=20)),
        ("kill-root @ step 20 in exchange", Fault("kill-root", at_step=20, phase="exchange")),
        ("kill-warm node-1.example.org @ step 3", Fault("kill-warm", "node-1.example.org", at_step=3)),
        ("cut-link h3 for 20 s @ step 9", Fault("cut-link", "h3", at_step=9, for_s=20.0)),
    ],
)
def test_a_text_is_a_fault(text, fault):
    assert parse(text) == fault
    assert parse(str(fault)) == fault


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected one of kill-rank, .*, kill-root first; got ''"),
        ("explode 1 @ step 1", "expected one of kill-rank, .*, kill-root first; got 'explode 1 @ step 1'"),
        ("kill-rank 1", r"expected when it is due; got 'kill-rank 1': write 'kill-rank 1 @ step 5'"),
        ("kill-rank @ step 1", r"expected 'kill-rank RANK @ step N \(or S s\) \[in PHASE\]'; got"),
        ("kill-rank -1 @ step 1", "kill-rank RANK"),
        ("kill-rank 01 @ step 1", "kill-rank RANK"),
        ("kill-rank h1 @ step 1", "kill-rank RANK"),
        ("kill-rank 1 @ 5", "kill-rank RANK"),
        ("kill-rank 1 @ step 1.5", "kill-rank RANK"),
        ("kill-rank 1 @ step 1 @ step 2", "kill-rank RANK"),
        ("kill-rank 1 @ step 1 in sleep", "PHASE is one of start-up, partitioning"),
        ("kill-rank 1 for 3 s @ step 1", "kill-rank RANK"),
        ("kill-rank 1 @ step ٣", "kill-rank RANK"),
        ("kill-root h1 @ step 1", r"expected 'kill-root @ step N"),
        ("kill-agent @ step 1", "kill-agent MACHINE"),
        ("kill-agent in backward @ step 1", "kill-agent MACHINE"),
        ("kill-agent ../h1 @ step 1", "kill-agent MACHINE"),
        (f"kill-agent {'h' * 101} @ step 1", "kill-agent MACHINE"),  # its name would be too long for a file's
        ("cut-link h3 @ step 9", r"expected 'cut-link MACHINE for S s @ step N"),
    ],
)
def test_a_text_that_is_none_says_how_it_is_written(text, said):
    with pytest.raises(ConfigError, match=f"^faults.at: .*{said}"):
        parse(text)


PARTS = st.sampled_from([*KINDS, *PHASES, "h1", "rank:2", "3", "@", "step", "in", "for", "s", "1.5", "\n", "", "é"])


@given(st.lists(PARTS | st.text(max_size=3), max_size=8).map(" ".join))
def test_any_text_is_a_fault_or_a_config_error(text):
    try:
        fault = parse(text)
    except ConfigError:
        return
    assert parse(str(fault)) == fault


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["kill-rank", "2"], Fault("kill-rank", "2")),
        (["kill-root"], Fault("kill-root")),
        (["cut-link", "h3", "--for", "20s"], Fault("cut-link", "h3", for_s=20.0)),
        (["cut-link h3 for 20 s"], Fault("cut-link", "h3", for_s=20.0)),
        (["stop-rank", "1", "in", "evaluation"], Fault("stop-rank", "1", phase="evaluation")),
    ],
)
def test_a_command_is_a_fault_that_is_due_at_once(words, fault):
    assert parse_command(words) == fault
    assert due(fault, 0, 0.0, fault.phase or "start-up")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "inject: expected one of kill-rank"),
        (["kill-rank"], r"inject: expected 'kill-rank RANK \[in PHASE\]'; got 'kill-rank'"),
        (["cut-link", "h3"], r"inject: expected 'cut-link MACHINE for S s \[in PHASE\]'"),
        (
            ["kill-rank", "2", "@", "step", "5", "in", "backward"],
            r"due at once; got .*: type 'kill-rank 2 in backward', or start the job with 'faults.at=\[kill-rank 2 @ step 5",
        ),
    ],
)
def test_a_command_that_is_none_says_how_it_is_written(words, said):
    with pytest.raises(ConfigError, match=said):
        parse_command(words)


def first_due(fault: Fault, *seen: tuple[int, float, str]) -> int | None:
    return next((number for number, at in enumerate(seen) if due(fault, *at)), None)


def test_a_step_is_due_from_its_beginning_on_and_a_start_is_none():
    fault = parse("kill-rank 2 @ step 5")
    assert first_due(fault, (4, 9.0, "writing"), (5, 9.0, "start-up"), (5, 9.0, "sampling")) == 2
    assert first_due(fault, (6, 9.0, "forward")) == 0, "a job that was away when step 5 came"


def test_a_phase_is_due_the_first_time_from_its_step_on():
    fault = parse("kill-rank 2 @ step 5 in evaluation")
    assert first_due(fault, (4, 0, "evaluation"), (5, 0, "step"), (10, 0, "evaluation")) == 2
    assert first_due(parse("kill-rank 0 @ step 9 in start-up"), (0, 0, "start-up"), (9, 0, "start-up")) == 1


def test_a_time_is_due_in_whatever_phase_comes_next():
    fault = parse("kill-agent h1 @ 12 s")
    assert first_due(fault, (3, 11.9, "step"), (0, 12.0, "start-up")) == 1
    assert first_due(parse("kill-rank 1 @ 12 s in step"), (3, 13.0, "forward"), (3, 13.1, "step")) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_kill_needs_leave(kind):
    target = "1" if kind in OF_RANK else "h1" if kind in OF_MACHINE else ""
    text = f"{kind} {target}{' for 3 s' if kind == 'cut-link' else ''} @ step 1"
    for settings in (FaultsConfig(at=[text]), FaultsConfig(mtbf_s=1, kinds=[kind])):
        schedule.check(replace(settings, allow=True))
        if kind.startswith("kill-"):
            schedule.check(settings)
        else:
            with pytest.raises(ConfigError, match=f"{kind}: expected faults.allow=true for what is no kill"):
                schedule.check(settings)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["faults.at=kill-rank 1"], "faults.at: expected when it is due"),
        (["faults.at=raise-rank 1 @ step 5"], "raise-rank: expected faults.allow=true"),
        (["faults.mtbf_s=-1"], "faults.mtbf_s: expected 0 .none. or more seconds; got -1"),
        (["faults.mtbf_s=nan"], "faults.mtbf_s: expected 0"),
        (["faults.count=0"], "faults.count: expected at least 1; got 0"),
        (["faults.kinds=kill"], "faults.kinds: expected some of kill-rank, .*; got .'kill'"),
        (["faults=random", "faults.kinds=[]"], "faults.kinds: expected some of"),
        (["faults.phases=sleep"], "faults.phases: expected none .* some of start-up, .*; got .'sleep'"),
    ],
)
def test_settings_that_are_wrong_are_refused_before_anything_starts(arguments, said):
    with pytest.raises(ConfigError, match=said):
        compose(arguments)


def test_the_command_line_takes_faults_as_they_are_written():
    texts = ["kill-rank 2 @ step 5", "kill-agent rank:3 @ 12.5 s in step", "cut-link h3 for 20 s @ step 9"]
    found = compose([f"faults.at={','.join(texts)}", "faults.allow=true"]).faults
    assert found.at == texts
    assert [str(fault) for fault in planned(found, 4).values()] == texts
    assert compose([f"faults.at=[{texts[0]}]"]).faults.at == texts[:1]


def test_the_same_text_twice_is_two_faults():
    found = planned(FaultsConfig(at=["kill-rank 0 @ step 5", "kill-root @ step 5", "kill-rank 0 @ step 5"]), 1)
    assert list(found) == ["kill-rank-0-step-5.1", "kill-root-step-5.1", "kill-rank-0-step-5.2"]


@pytest.mark.parametrize("text", ["kill-rank 2 @ step 5", "kill-agent rank:2 @ step 5"])
def test_a_rank_that_the_job_does_not_have_is_refused(text):
    assert len(planned(FaultsConfig(at=[text]), 3)) == 1
    with pytest.raises(ConfigError, match=f"expected a rank from 0 to 1; got '{text}'"):
        planned(FaultsConfig(at=[text]), 2)
    planned(FaultsConfig(at=["kill-agent 7 @ step 5"]), 2)  # a machine of that name


def test_a_seed_is_a_schedule_at_random():
    settings = FaultsConfig(
        allow=True, seed=7, mtbf_s=30.0, count=400, kinds=[*KINDS], phases=["sampling", "exchange", "backward"]
    )
    found = planned(settings, 4)
    faults = list(found.values())
    assert found == planned(settings, 4) and faults != list(planned(replace(settings, seed=8), 4).values())
    assert [parse(str(fault)) for fault in faults] == faults and len(found) == len(faults) == 400
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {f.target for f in faults if f.kind in OF_RANK} == {"0", "1", "2", "3"}
    assert {f.target for f in faults if f.kind in OF_MACHINE} == {"rank:0", "rank:1", "rank:2", "rank:3"}
    assert {f.phase for f in faults if f.kind == "kill-rank"} == {"sampling", "exchange", "backward"}
    times = [fault.at_s for fault in faults]
    gaps = [after - before for before, after in itertools.pairwise([0.0, *times])]
    assert min(gaps) >= 0
    assert 24 < sum(gaps) / len(gaps) < 36, "four standard errors around the mean"
    assert 0.30 < sum(gap > 30 for gap in gaps) / len(gaps) < 0.44, (
        "exponential: a share of 1/e is longer than the mean"
    )


def test_no_mean_time_is_no_fault_at_random():
    assert planned(FaultsConfig(count=5), 4) == {}
    assert len(planned(compose(["faults=random", "faults.count=3"]).faults, 2)) == 3
