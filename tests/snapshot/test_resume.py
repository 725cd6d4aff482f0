"""Bit-identical resume: DeepSpeed ZeRO 0-3, fp32 and bf16, on gloo ranks. A fresh engine from another seed goes on."""

import contextlib
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gemini_gnn.config import Config
from gemini_gnn.snapshot import attach
from gemini_gnn.snapshot.context import Context
from tests.ranks import run_ranks


class Net(torch.nn.Module):
    """Odd sizes (padding in every ZeRO stage), a buffer that forward changes, dropout, a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(7, 13)
        self.register_buffer("mean", torch.zeros(13))
        self.drop = torch.nn.Dropout(0.3)
        self.last = torch.nn.Linear(13, 3)
        self.scale = torch.nn.Parameter(torch.rand(13), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.seen += len(x)
        h = self.first(x)
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(dim=0).to(self.mean.dtype)
        return self.last(self.drop(torch.relu(h - self.mean.to(h.dtype))) * self.scale.to(h.dtype))


class Position:
    """A loop's own state: a counter, what is best so far, some rows."""

    def __init__(self):
        self.step, self.best, self.rows = 0, float("inf"), np.zeros(0)

    def state_dict(self):
        return {"step": self.step, "best": self.best, "rows": self.rows}

    def load_state_dict(self, state):
        self.step, self.best, self.rows = state["step"], state["best"], state["rows"]


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def settings(stage, precision, optimizer, accumulation):
    config = Config()
    config.deepspeed.zero, config.training.precision = stage, precision
    config.training.accumulation, config.training.clip_norm = accumulation, 1.0
    config.optimizer.name, config.optimizer.schedule, config.optimizer.warmup_steps = optimizer, "cosine", 3
    config.optimizer.momentum = 0.9
    return config


def build(config, seed, total):
    from gemini_gnn.training.engine import build_engine

    seed_all(seed)
    return build_engine(Net(), config, total)


def train(engine, position, upto, accumulation, dtype, snapshots=None):
    """Losses per micro-batch; data comes from numpy's and Python's global generators. These steps are too short to hide
    a commit, so waiting for it stands in for the rest of a step: otherwise captures are skipped.
    """
    losses = []
    while position.step < upto:
        for micro in range(accumulation):
            x = torch.from_numpy(np.random.rand(6, 7).astype(np.float32)).to(dtype)
            y = torch.tensor([random.randrange(3) for _ in range(6)])
            loss = torch.nn.functional.cross_entropy(engine(x).float(), y)
            losses.append(loss.item())
            engine.backward(loss)
            if micro == accumulation - 1:
                position.step += 1
                position.best = min(position.best, losses[-1])
                position.rows = np.append(position.rows, losses[-1])
            engine.step()
        if snapshots is not None:
            snapshots.wait()
    return losses


def raw_state(engine):
    """Every tensor of the state as bytes (ZeRO-3's padding, which belongs to no parameter, as zeros), and the values."""
    from gemini_gnn.snapshot.state import generators
    from gemini_gnn.snapshot.state.collect import collect, padding_of
    from gemini_gnn.snapshot.state.tree import pack

    state = collect(engine)
    live = {e.spec.name: None if e.get() is None else e.get().detach().clone() for e in state.entries}
    if state.kind.startswith("zero3"):
        for i, ranges in enumerate(padding_of(engine.optimizer)):
            for name, tensor in live.items():
                if name.endswith(f"master.{i}") and tensor.dim():
                    for where in ranges:
                        tensor[where] = 0
    tensors = {
        n: None if t is None else bytes(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        for n, t in live.items()
    }
    values, arrays = pack({**state.values(), "rng": generators.values(generators.read())})
    return tensors, values, [a.tobytes() for a in arrays]


def resume_case(rank, world, folder, stage, precision, optimizer, accumulation):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = settings(stage, precision, optimizer, accumulation)
    stop, total = 3, 6

    def context(generation):
        return Context("job", Path(folder), rank, world, rank, world, term=1, generation=generation)

    engine, position = build(config, 1, total), Position()
    snapshots = attach(engine, position, context=context(1))
    assert snapshots.restored is None
    seed_all(100 + rank)
    train(engine, position, stop, accumulation, dtype, snapshots)
    assert snapshots.stats.captures == 1 + stop and not snapshots.stats.skipped
    snapshots.close()
    expected = train(engine, position, total, accumulation, dtype)
    want, best = raw_state(engine), (position.best, position.rows.tolist())
    engine.destroy()

    engine, position = build(config, 999, total), Position()
    snapshots = attach(engine, position, context=context(2))
    assert snapshots.restored == (1, 1, stop) and position.step == stop
    got = train(engine, position, total, accumulation, dtype)
    snapshots.close()
    assert got == expected
    have = raw_state(engine)
    assert have[0].keys() == want[0].keys()
    differing = [name for name in want[0] if want[0][name] != have[0][name]]
    assert not differing, differing
    assert have[1:] == want[1:] and best == (position.best, position.rows.tolist())
    engine.destroy()


CASES = [
    *[(stage, precision, "adam", 1) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")],
    (0, "fp32", "sgd", 2),
    (1, "fp32", "adamw", 2),
    (2, "bf16", "sgd", 1),
    (3, "fp32", "adamw", 2),
]


def resume_cases(rank, world, root, cases):
    for i, case in enumerate(cases):
        with contextlib.suppress(FileExistsError):
            Path(root, str(i)).mkdir()
        try:
            resume_case(rank, world, str(Path(root, str(i), "job")), *case)
        except AssertionError as error:
            raise AssertionError(f"case {case}: {error}") from error


@pytest.mark.parametrize("world", [1, 2, 4])
def test_resume_is_bit_identical(world):
    cases = CASES if world == 2 else [(0, "fp32", "adam", 1), (1, "bf16", "adamw", 2), (3, "fp32", "sgd", 1)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        run_ranks(resume_cases, world, root, cases, timeout_s=240)


def not_given_case(rank, world):
    import deepspeed

    from gemini_gnn.snapshot.state.collect import collect
    from gemini_gnn.training.engine import deepspeed_settings

    for stage, precision in [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32")]:
        model = Net()
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.Adam(model.first.parameters()),
            config=deepspeed_settings(settings(stage, precision, "adam", 1)),
            dist_init_required=False,
        )
        frozen = {e.spec.name for e in collect(engine).entries if e.spec.name.startswith("frozen.")}
        assert frozen == {"frozen.last.weight", "frozen.last.bias", "frozen.scale"}, (stage, precision, frozen)
        engine.destroy()


def test_what_the_optimizer_was_not_given_is_copied_too():
    run_ranks(not_given_case, 1, timeout_s=60)
