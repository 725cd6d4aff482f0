"""Which fault is due when: texts, seeds, and what is refused. Pure."""

from __future__ import annotations

import itertools
import shlex
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
        ("power-off h2 @ step 9", Fault("power-off", "h2", at_step=9)),
        ("split h0,rank:1 from h2 for 20s @ 3 s", Fault("split", "h0,rank:1", at_s=3.0, for_s=20.0, others="h2")),
        ("split half:7 from others @ step 9", Fault("split", "half:7", at_step=9, for_s=10.0, others="others")),
        ("corrupt-replica 3 @ step 9", Fault("corrupt-replica", "3", at_step=9)),
        ("fill-shm rank:3 for 2.5 s @ step 9", Fault("fill-shm", "rank:3", at_step=9, for_s=2.5)),
        ("fill-shm h1 @ step 9", Fault("fill-shm", "h1", at_step=9, for_s=10.0)),
        ("hang-filesystem h1 for 20 s @ step 9", Fault("hang-filesystem", "h1", at_step=9, for_s=20.0)),
        ("hang-filesystem for 20 s @ step 9", Fault("hang-filesystem", at_step=9, for_s=20.0)),
    ],
)
def test_a_text_is_a_fault(text, fault):
    assert parse(text) == fault
    assert parse(str(fault)) == fault


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected one of kill-rank, .*, corrupt-replica first; got ''"),
        ("explode 1 @ step 1", "expected one of kill-rank, .*, corrupt-replica first; got 'explode 1 @ step 1'"),
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
        ("power-off h3 for 3 s @ step 9", r"expected 'power-off MACHINE @ step N"),
        ("split h0 @ step 9", r"expected 'split MACHINE,... from MACHINE,... \[for S s\] @ step N"),
        ("split h0, h1 from h2 @ step 9", "split MACHINE,"),
        ("split h0 from half:7 @ step 9", "split MACHINE,"),
        ("corrupt-replica h1 @ step 9", "corrupt-replica RANK"),
        ("fill-shm for 3 s @ step 9", r"fill-shm MACHINE \[for S s\]"),
        ("hang-filesystem h1 @ step 9", r"hang-filesystem \[MACHINE\] for S s"),
    ],
)
def test_a_text_that_is_none_says_how_it_is_written(text, said):
    with pytest.raises(ConfigError, match=f"^faults.at: .*{said}"):
        parse(text)


WORDS = (
    "h1",
    "rank:2",
    "h1,rank:2",
    "half:7",
    "from",
    "others",
    "3",
    "@",
    "step",
    "in",
    "for",
    "s",
    "1.5",
    "\n",
    "",
    "é",
)
PARTS = st.sampled_from([*KINDS, *PHASES, *WORDS])
MACHINE = st.from_regex(r"rank:(0|[1-9][0-9]{0,6})|[a-z][a-z0-9.-]{0,9}", fullmatch=True)
SIDE = st.lists(MACHINE, min_size=1, max_size=3).map(",".join)
RANK = st.integers(0, 10**7 - 1).map(str)
SECONDS = st.integers(1, 10**6).map(lambda thousandths: thousandths / 1000)


@given(st.lists(PARTS | st.text(max_size=3), max_size=8).map(" ".join))
def test_any_text_is_a_fault_or_a_config_error(text):
    try:
        fault = parse(text)
    except ConfigError:
        return
    assert parse(str(fault)) == fault


@st.composite
def faults(draw):
    """Of every kind, as :func:`parse` could have made it."""
    kind = draw(st.sampled_from(KINDS))
    targets = {"split": SIDE | st.just("half:7"), "kill-root": st.just(""), "hang-filesystem": MACHINE | st.just("")}
    by_step = draw(st.booleans())
    return Fault(
        kind,
        draw(targets.get(kind, MACHINE if kind in OF_MACHINE else RANK)),
        at_step=draw(st.integers(0, 10**9)) if by_step else None,
        at_s=None if by_step else draw(SECONDS),
        phase=draw(st.sampled_from(PHASES if kind == "hang-collective" else (None, *PHASES))),
        for_s=draw(SECONDS) if kind in schedule.LASTING else None,
        others=draw(SIDE) if kind == "split" else "",
    )


@given(faults())
def test_a_fault_is_parsed_from_its_own_words(fault):
    assert parse(str(fault)) == fault
    now = replace(fault, at_step=None, at_s=None)
    assert parse_command(str(now).replace(" for ", " --for ").split()) == now


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["kill-rank", "2"], Fault("kill-rank", "2")),
        (["kill-root"], Fault("kill-root")),
        (["cut-link", "h3", "--for", "20s"], Fault("cut-link", "h3", for_s=20.0)),
        (["cut-link h3 for 20 s"], Fault("cut-link", "h3", for_s=20.0)),
        (["stop-rank", "1", "in", "evaluation"], Fault("stop-rank", "1", phase="evaluation")),
        (["power-off", "h2"], Fault("power-off", "h2")),
        (["split", "h0,h1", "from", "h2,h3"], Fault("split", "h0,h1", for_s=10.0, others="h2,h3")),
        (["hang-filesystem", "--for", "20s"], Fault("hang-filesystem", for_s=20.0)),
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
        (["split", "h0,h1", "from", "h2", "@", "5s"], r'with "faults.at=\[\'split h0,h1 from h2 for 10 s @ 5 s\'\]"'),
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
    target = {"kill-root": "", "split": " h0 from h1"}.get(kind, " h1" if kind in OF_MACHINE else " 1")
    text = f"{kind}{target}{' for 3 s' if kind in schedule.LASTING else ''} @ step 1"
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
    split = parse("split h0,h1 from h2,h3 for 20 s @ step 9")
    typed = shlex.split(f"{schedule.shell_word(split)} faults.allow=true")
    assert compose(typed).faults.at == [str(split)], "with commas"


def test_the_same_text_twice_is_two_faults():
    found = planned(FaultsConfig(at=["kill-rank 0 @ step 5", "kill-root @ step 5", "kill-rank 0 @ step 5"]), 1)
    assert list(found) == ["kill-rank-0-step-5.1", "kill-root-step-5.1", "kill-rank-0-step-5.2"]


def test_the_name_of_a_fault_of_many_machines_fits_a_file():
    side = ",".join(f"{'node' * 20}-{number}" for number in range(9))
    one, two = planned(FaultsConfig(allow=True, at=[f"split {side} from x{n} @ step 5" for n in (1, 2)]), 1)
    assert one != two and len(one) < 255 > len(two)


@pytest.mark.parametrize(
    "text",
    [
        "kill-rank 2 @ step 5",
        "kill-agent rank:2 @ step 5",
        "corrupt-replica 2 @ step 5",
        "split h0,rank:1 from rank:0,rank:2 for 10 s @ step 5",
    ],
)
def test_a_rank_that_the_job_does_not_have_is_refused(text):
    assert len(planned(FaultsConfig(allow=True, at=[text]), 3)) == 1
    with pytest.raises(ConfigError, match=f"expected a rank from 0 to 1; got '{text}'"):
        planned(FaultsConfig(allow=True, at=[text]), 2)
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
    assert {f.target for f in faults if f.kind == "corrupt-replica"} == {"0", "1", "2", "3"}
    halves = [f.target for f in faults if f.kind == "split"]
    assert len(set(halves)) == len(halves) > 10 and all(f.others == "others" for f in faults if f.kind == "split")
    assert all((f.for_s == 10.0) == (f.kind in schedule.LASTING) for f in faults)
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
