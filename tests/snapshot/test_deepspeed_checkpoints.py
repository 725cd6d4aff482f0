"""The baseline: DeepSpeed's checkpoints in a folder, with the same resume; only what is COMPLETE counts; no pickle runs."""

import io
import pickle
from pathlib import Path

import pytest
import torch

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot import deepspeed_checkpoints
from tests.ranks import run_ranks
from tests.snapshot.plain_training import parts
from tests.snapshot.test_resume import Position, build, raw_state, seed_all, settings

CASES = [
    (0, "fp32", "adam", 1),
    (0, "bf16", "adam", 1),
    (1, "bf16", "adamw", 2),
    (2, "fp32", "sgd", 1),
    (3, "fp32", "adam", 1),
]


def train(engine, position, checkpoints, upto, accumulation, dtype):
    from tests.snapshot.test_resume import train

    losses = []
    while position.step < upto:
        losses += train(engine, position, position.step + 1, accumulation, dtype)
        if checkpoints is not None:
            checkpoints.after_step(position.step, capture=True)
    return losses


def nfs_cases(rank, world, root):
    for i, (stage, precision, optimizer, accumulation) in enumerate(CASES):
        folder = Path(root) / str(i)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        config = settings(stage, precision, optimizer, accumulation)
        engine, position = build(config, 1, 6), Position()
        checkpoints = deepspeed_checkpoints.attach(engine, position, folder, every=2)
        assert checkpoints.restored is None
        seed_all(100 + rank)
        train(engine, position, checkpoints, 4, accumulation, dtype)
        assert deepspeed_checkpoints.complete_steps(folder) == [2, 4] and checkpoints.stats.captures == 2
        want = train(engine, position, None, 6, accumulation, dtype)
        final = raw_state(engine)
        engine.destroy()
        torch.distributed.barrier()
        if rank == 0 and i == 0:  # newer, but never finished
            (folder / deepspeed_checkpoints.tag_of(5)).mkdir()
        torch.distributed.barrier()

        engine, position = build(config, 99, 6), Position()
        checkpoints = deepspeed_checkpoints.attach(engine, position, folder, every=2, resume="must")
        assert checkpoints.restored == (0, 0, 4) and position.step == 4
        assert train(engine, position, checkpoints, 6, accumulation, dtype) == want, CASES[i]
        have = raw_state(engine)
        differing = [n for n in final[0] if final[0][n] != have[0][n]]
        assert not differing and have[1:] == final[1:], (CASES[i], differing)
        assert deepspeed_checkpoints.complete_steps(folder) == [4, 6]  # the newest two are kept
        if i == 0:  # an orderly stop: saved already, then not yet
            checkpoints.final(6)
            assert checkpoints.stats.captures == 1
            train(engine, position, checkpoints, 7, accumulation, dtype)
            checkpoints.final(7)
            assert deepspeed_checkpoints.complete_steps(folder) == [6, 7]
        engine.destroy()
    return True


def test_resume_from_checkpoints_is_bit_identical_too(tmp_path):
    run_ranks(nfs_cases, 2, str(tmp_path), timeout_s=200)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def bad_cases(rank, world, root):
    folder = Path(root) / "bad"
    config = settings(1, "fp32", "adam", 1)
    engine, position = build(config, 1, 6), Position()
    with pytest.raises(SnapshotError, match="no complete checkpoint"):
        deepspeed_checkpoints.attach(engine, position, folder, resume="must")
    checkpoints = deepspeed_checkpoints.attach(engine, position, folder, every=1)
    train(engine, position, checkpoints, 1, 1, torch.float32)
    with pytest.raises(SnapshotError, match="fresh engine"):
        deepspeed_checkpoints.attach(engine, position, folder)
    engine.destroy()

    engine = build(settings(1, "fp32", "sgd", 1), 1, 6)
    with pytest.raises(SnapshotError, match="optimizer: the snapshot has Adam, this run SGD"):
        deepspeed_checkpoints.attach(engine, position, folder)
    engine.destroy()

    evil, mark = (
        folder / deepspeed_checkpoints.tag_of(1) / "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        Path(root) / "ran",
    )
    torch.save({"x": Touch(mark)}, evil)
    engine = build(config, 1, 6)
    with pytest.raises(pickle.UnpicklingError):
        deepspeed_checkpoints.attach(engine, Position(), folder)
    assert not mark.exists()
    engine.destroy()

    state = folder / deepspeed_checkpoints.tag_of(1) / "rank-00000.state"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    engine = build(config, 1, 6)
    with pytest.raises(SnapshotError, match="checksum"):
        deepspeed_checkpoints.attach(engine, Position(), folder)
    assert deepspeed_checkpoints.attach(engine, Position(), folder, resume="never").restored is None
    assert deepspeed_checkpoints.complete_steps(folder) == []
    engine.destroy()


def test_what_must_not_be_loaded_is_not(tmp_path):
    run_ranks(bad_cases, 1, str(tmp_path), timeout_s=120)


def test_plain_pytorch_is_refused(tmp_path):
    with pytest.raises(SnapshotError, match="expected a DeepSpeed engine"):
        deepspeed_checkpoints.attach(parts(), None, tmp_path)


def test_enumerations_can_be_read_safely_whatever_python_wrote_them(monkeypatch):
    from deepspeed.runtime.zero.config import ZeroStageEnum

    def as_python_3_11_2_does(member, protocol):
        return getattr, (type(member), member.name)

    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", as_python_3_11_2_does)
    file = io.BytesIO()
    with deepspeed_checkpoints.writing_plainly():
        torch.save({"zero_stage": ZeroStageEnum.weights}, file)
    file.seek(0)
    with torch.serialization.safe_globals([ZeroStageEnum]):
        assert torch.load(file, weights_only=True) == {"zero_stage": ZeroStageEnum.weights}
    file = io.BytesIO()
    torch.save({"zero_stage": ZeroStageEnum.weights}, file)
    assert b"getattr" in file.getvalue(), "outside, nothing is changed"
