"""Campaigns of kills: whatever is killed, and whenever, the run that ends is the run that was never disturbed, bit for bit.

    bash launch/test.sh --long                     # a new seed, which is printed
    bash launch/test.sh --long --seed 7 --kills 3 -k zero1

A seed decides what is killed, after which step and how much later. The instants repeat as well as the machine lets them.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass

import pytest

from gemini_gnn.compose import compose
from gemini_gnn.config import to_mapping
from gemini_gnn.observe.run_directory import read_losses
from tests.launch.test_resume import same_run
from tests.recovery.jobs import Job, job, wait_for, with_no_error
from tests.trainers import trained

__all__ = ["job"]  # the fixture

WORLD = 2
FIRST = 5  # by then a snapshot is committed, so nothing may begin at step 0 again
PATIENCE_S = 180.0
VICTIMS = ("trainer", "trainers", "warm parent", "agent", "slot", "slots", "launcher", "everything")
SETTINGS = ["dataset.nodes=1500", "dataset.feature_dim=16", "model.hidden=32", "sampling.batch_size=16"]
SETTINGS += ["sampling.fanouts=[5,5]", "optimizer.schedule=cosine", "training.epochs=60", "training.threads=1"]
SETTINGS += ["evaluation.every=6"]


@dataclass(frozen=True)
class Kill:
    """SIGKILL to ``victim`` ``delay_s`` after step ``step`` was done; ``pick`` says which of several."""

    step: int
    victim: str
    pick: int
    delay_s: float


def plan(seed: int, kills: int, steps: int) -> list[Kill]:
    """What is killed when, in a run of ``steps`` steps. A third shares a step with another: those hit a recovery or a start."""
    draw = random.Random(seed)
    instants = draw.choices(range(FIRST, steps * 8 // 10), k=max(1, 2 * kills // 3))
    instants += draw.choices(instants, k=kills - len(instants))
    victims = [draw.choice(VICTIMS) for _ in instants]
    return [Kill(s, v, draw.randrange(8), draw.uniform(0, 0.3)) for s, v in zip(sorted(instants), victims, strict=True)]


def test_a_seed_is_a_plan():
    kills = plan(7, 60, 400)
    assert kills == plan(7, 60, 400) != plan(8, 60, 400)
    assert len(kills) == 60 and {kill.victim for kill in kills} == set(VICTIMS)
    steps = [kill.step for kill in kills]
    assert steps == sorted(steps) and steps[0] >= FIRST and steps[-1] < 320
    assert len(set(steps)) <= 40, "some fall into the recovery from another"
    assert len(plan(7, 1, 400)) == 1


def pids_of(run: Job, kill: Kill) -> list[int]:
    """None, where the victim is just not there."""
    roles = run.processes()
    if kill.victim == "everything":
        return list(roles)
    trainers = sorted(note["pid"] for note in run.notes("training") if note["pid"] in roles)
    launcher = run.launches[-1].pid
    slots = sorted(pid for pid, role in roles.items() if role == "launch" and pid != launcher)
    return {
        "trainer": trainers[kill.pick % len(trainers) :][:1] if trainers else [],
        "trainers": trainers,
        "warm parent": [pid for pid, role in roles.items() if role == "warm" and pid not in trainers],
        "agent": [pid for pid, role in roles.items() if role == "agent"],
        "slot": slots[kill.pick % len(slots) :][:1] if slots else [],
        "slots": slots,
        "launcher": [launcher] if launcher in roles else [],
    }[kill.victim]


class Campaign:
    """One job, its kills, and the same command typed again whenever nothing of it runs any more."""

    def __init__(self, run: Job, config: dict, say):
        self.run, self.config, self.say = run, config, say
        self.kills_of_this_launch = 0
        self.launch("auto")

    def launch(self, resume: str) -> None:
        self.run.launch(
            WORLD,
            "tests.chaos.target:train",
            preload=["gemini_gnn.training.preload", "tests.chaos.target"],
            resume=resume,
            recovery={"same_step_failures": 10_000},
            config=self.config | {"resume": resume},
        )
        self.kills_of_this_launch = 0

    def done(self) -> bool:
        return (self.run.run_dir / "result.json").exists()

    def steps(self) -> int:
        path = self.run.run_dir / "losses.csv"
        return len(read_losses(path)) if path.exists() else 0

    def reached(self, step: int) -> bool:
        """Whether ``step`` is done; starts the job again where it has ended before it was complete."""
        if self.done():
            return True
        if self.run.launches[-1].poll() is not None and not self.run.processes() and not self.done():
            code, out, err = self.run.end(self.run.launches[-1])
            assert self.kills_of_this_launch, f"an undisturbed job ended with {code}\n{out}\n{err}"
            self.say(f"the job has ended with {code} after step {self.steps()}; the same command again")
            self.launch("must" if self.steps() >= FIRST else "auto")
        return self.steps() >= step

    def kill(self, kill: Kill) -> bool:
        """Whether there was anything to kill."""
        wait_for(lambda: self.reached(kill.step), f"step {kill.step}", PATIENCE_S)
        time.sleep(kill.delay_s)  # not waiting for an event: the instant is the test
        before = self.kills_of_this_launch
        while pids := pids_of(self.run, kill):
            self.kills_of_this_launch += 1
            for pid in pids:
                with_no_error(os.kill, pid, signal.SIGKILL)
            if kill.victim != "everything":  # part of it may start something meanwhile
                break
        return self.kills_of_this_launch > before

    def finish(self) -> None:
        wait_for(lambda: self.reached(10**9), "the end of the run", PATIENCE_S)


@pytest.mark.long
@pytest.mark.parametrize("zero", [1, 3], ids=["zero1", "zero3"])
def test_whatever_is_killed_the_run_is_the_undisturbed_one(job, tmp_path, request, seed, zero):
    settings = [*SETTINGS, f"dataset.cache={tmp_path / 'cache'}", f"deepspeed=zero{zero}"]
    losses, _ = trained(WORLD, tmp_path / "undisturbed", *settings)
    run, begin = job(), time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:5.0f} s] zero{zero}, seed {seed}: {text}", flush=True)

    config = to_mapping(compose([*settings, f"run_dir={run.run_dir}", "snapshot=memory", "logger=quiet"]))
    kills = plan(seed, request.config.getoption("kills"), len(losses))
    say(f"{len(kills)} kills in {len(losses)} steps")
    campaign, struck = Campaign(run, config, say), 0
    for number, kill in enumerate(kills, 1):
        there = campaign.kill(kill)
        struck += there
        say(f"kill {number} of {len(kills)}, step {campaign.steps()}: {kill.victim}{'' if there else ', not there'}")
    campaign.finish()
    run.end(run.launches[-1])
    same_run(run.run_dir, tmp_path / "undisturbed")
    run.assert_nothing_left()
    assert struck > len(kills) // 2, "most kills found nothing to kill: the run was over too soon"
    say(f"the same losses, metrics and weights, bit for bit, after {struck} kills, {len(run.launches)} launches")
