"""A checkpoint as a plain state dict: the same weights as the engine's, bit for bit, whatever ZeRO stage wrote it."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot import attach, export, persist
from gemini_gnn.snapshot.store import format
from gemini_gnn.snapshot.store.identity import COMMON, Identity, shard_of
from tests.ranks import run_ranks
from tests.snapshot.plain_training import arena_folder, context_of, parts, run_some, step
from tests.snapshot.test_resume import Net, Position, build, seed_all, settings, train

ROOT = Path(__file__).parents[2]
CASES = [(stage, precision, 1) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
CASES += [(1, "bf16", 2)]  # BF16_Optimizer: ZeRO-1 with accumulation in fp32


def said_by_nobody(_: int) -> None:
    pass


def persisted(arena_folder: Path, folder: Path, identity: Identity) -> tuple[persist.Mark, Path]:
    """The checkpoint of all shards in an arena."""
    shards = sorted({p.name.rpartition(".")[0] for p in arena_folder.glob("*.[0-9]")})
    persist.write(arena_folder, folder, identity, shards)
    persist.complete(folder, identity, shards, keep=2)
    return persist.complete_checkpoints(folder)[-1]


def exported(mark: persist.Mark, path: Path, out: Path) -> dict[str, torch.Tensor]:
    export.export(mark, path, out, said_by_nobody)
    return load_file(out)


def masters(engine) -> dict[str, torch.Tensor]:
    """The fp32 masters of the trained parameters, as DeepSpeed itself collects them. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer, named = engine.optimizer, dict(engine.module.named_parameters())
    if hasattr(optimizer, "fp32_groups"):  # stage 0, bf16: DeepSpeed has no call for these
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        high = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
        return {n: high[id(p)].detach() for n, p in named.items() if id(p) in high}
    if isinstance(optimizer, torch.optim.Optimizer):
        return {n: p.detach() for n, p in named.items() if p.requires_grad}
    return {n: safe_get_full_fp32_param(p) for n, p in named.items() if p.requires_grad}


def export_cases(rank, world, root):
    from gemini_gnn.training.engine import full_weights

    for i, (stage, precision, accumulation) in enumerate(CASES):
        arena, folder = Path(root, str(i)), Path(root, f"checkpoints-{i}")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        engine, position = build(settings(stage, precision, "adam", accumulation), 1, 6), Position()
        snapshots = attach(engine, position, context=context_of(arena, rank=rank, world=world))
        seed_all(100 + rank)
        train(engine, position, 3, accumulation, dtype, snapshots)
        high, whole = masters(engine), full_weights(engine)
        snapshots.close()
        torch.distributed.barrier()
        if rank == 0:
            names = {COMMON} if stage == 0 else set()
            mark, path = persisted(arena, folder, Identity(1, 1, 3))
            assert set(mark.shards) == names | {shard_of(r) for r in range(world)} and mark.world_size == world
            found = exported(mark, path, Path(root, "exported"))
            model = Net()
            model.load_state_dict(found, strict=True)
            assert found.keys() == whole.keys(), CASES[i]
            assert {n for n, t in high.items() if not torch.equal(found[n], t.view_as(found[n]))} == set(), CASES[i]
            assert set(high) == {"first.weight", "first.bias", "last.weight", "last.bias"}
            for name, tensor in found.items():
                assert name not in high or tensor.dtype == torch.float32
                low = tensor.to(dtype) if name in high else tensor
                assert torch.equal(low.to(whole[name].dtype), whole[name]), (CASES[i], name)
            assert export.check(mark, path, said_by_nobody) == []
        torch.distributed.barrier()
        engine.destroy()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_exported_weights_are_the_engines(world):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        run_ranks(export_cases, world, root, timeout_s=240)


def order_case(rank, world, root):
    """Parameter groups, an order that DeepSpeed changes, padding between parameters, and tied weights."""
    import deepspeed

    from gemini_gnn.training.engine import deepspeed_settings

    for i, stage in enumerate((1, 2, 3)):
        torch.manual_seed(0)
        model = torch.nn.ModuleList([torch.nn.Linear(3 + k, 4 + k) for k in range(4)])
        model.append(model[0])
        groups = [{"params": model[:2].parameters()}, {"params": model[2:4].parameters(), "lr": 0.5}]
        config = deepspeed_settings(settings(stage, "fp32", "adam", 1))
        config["zero_optimization"] |= {"round_robin_gradients": True, "sub_group_size": 20}
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.Adam(groups), config=config, dist_init_required=False
        )
        arena = Path(root, str(i))
        attach(engine, context=context_of(arena, rank=rank, world=world)).close()
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            whole = {n: t.detach().clone() for n, t in model.state_dict().items()}
        torch.distributed.barrier()
        if rank == 0:
            found = exported(
                *persisted(arena, Path(root, f"checkpoints-{i}"), Identity(1, 1, 0)), Path(root, "exported")
            )
            assert found.keys() == whole.keys() and "4.weight" in found
            assert all(torch.equal(found[n], whole[n]) for n in whole), stage
        torch.distributed.barrier()
        engine.destroy()


def test_groups_orders_and_tied_weights():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        run_ranks(order_case, 2, root, timeout_s=120)


def ddp_case(rank, world, root):
    """Names without the wrapper's; buffers of rank 0; what is not in the state dict is not exported."""
    module, _ = parts()
    module.register_buffer("passing", torch.ones(3), persistent=False)
    module = torch.nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)
    optimizer = torch.optim.Adam(module.parameters())
    snapshots = attach((module, optimizer), context=context_of(Path(root, "job"), rank=rank, world=world))
    torch.manual_seed(rank)
    step(module, optimizer)
    snapshots.wait()
    snapshots.close()
    torch.distributed.barrier()
    if rank == 0:
        found = exported(*persisted(Path(root, "job"), Path(root, "checkpoints"), Identity(1, 1, 1)), Path(root, "out"))
        whole = module.module.state_dict()
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[n], whole[n]) for n in whole)


def test_plain_pytorch():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        run_ranks(ddp_case, 2, root, timeout_s=60)


def stored_with(path, parameters, nbytes=16):
    layout = format.Layout((format.TensorSpec("master.0", "float32", (nbytes // 4,)),), (format.PAGE,), 8192)
    manifest = format.Manifest(layout, {}, None, [], parameters)
    return persist.Stored(Path(path), 0, None, manifest, b"", [100])


def test_what_is_lacking_is_named():
    half = format.Placed("w", (4,), "master.0", 0, 0, 2)
    other = half._replace(start=2)
    whole = export.assemble([stored_with("a", [half]), stored_with("b", [other, other])])["w"]
    assert [(run.path.name, run.source, run.target, run.nbytes) for run in whole.runs] == [
        ("a", 100, 0, 8),
        ("b", 100, 8, 8),
    ]
    for wrong in ([half], [other], [half, half]):
        with pytest.raises(SnapshotError, match="expected every element of w exactly once"):
            export.assemble([stored_with("a", wrong)])
    with pytest.raises(SnapshotError, match="an older release of gemini_gnn took the snapshot"):
        export.assemble([stored_with("a", [])])


# What a user types


def run_export(*arguments):
    command = [sys.executable, "launch/export.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run_dir(tmp_path):
    """Checkpoints of steps 1 and 2, and one that was never completed."""
    with arena_folder() as arena:
        run_some(arena, 2)
        for number in (1, 2, 2):
            shards = ["common", "rank-00000"]
            identity = Identity(1, 1, number)
            persist.write(arena, tmp_path / "checkpoints", identity, shards)
            if not (tmp_path / "checkpoints" / persist.tag_of(number)).exists():
                persist.complete(tmp_path / "checkpoints", identity, shards, keep=2)
    return tmp_path


def test_the_command(run_dir):
    code, said, _ = run_export("--list", f"run_dir={run_dir}")
    assert code == 0
    rows = [line.split() for line in said.splitlines()]
    assert [(row[0], row[1], row[-1]) for row in rows[1:]] == [
        ("1", "1-1-1", "complete"),
        ("2", "1-1-2", "complete"),
        ("2", "-", "incomplete"),
    ]
    code, said, errors = run_export(f"run_dir={run_dir}")
    assert code == 0 and not errors and "tensors of step 2" in said
    found = load_file(run_dir / "export-2.safetensors")
    parts()[0].load_state_dict(found, strict=True)
    code, said, _ = run_export(f"run_dir={run_dir}", "step=1", f"out={run_dir / 'one'}")
    assert code == 0 and not torch.equal(load_file(run_dir / "one")["0.weight"], found["0.weight"])
    assert run_export("--check", f"run_dir={run_dir}") == (
        0, f"{run_dir / 'checkpoints' / 'step-000000002'}: good\n", ""
    )  # fmt: skip


def test_progress_is_said_of_what_takes_long(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("export_command", ROOT / "launch" / "export.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    progress = command.Progress(4 << 30)
    progress(1 << 30)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(command, "QUIET_S", -1.0)
    progress(1 << 30)
    assert capsys.readouterr().err == "2.1 GB read; the checkpoint has 4.3 GB\n"


def test_bad_input_is_said_in_words(run_dir, tmp_path_factory):
    def refused(*arguments):
        code, said, errors = run_export(*arguments)
        assert code == 2 and not said and "Traceback" not in errors
        return errors

    empty = tmp_path_factory.mktemp("empty")
    assert "expected the folder of a job's checkpoints" in refused(f"run_dir={empty}")
    (empty / "checkpoints").mkdir()
    assert run_export("--list", f"run_dir={empty}") == (0, f"no checkpoints in {empty / 'checkpoints'}\n", "")
    (empty / "checkpoints" / "step-000000004").mkdir()
    assert "there is none; step-000000004 is incomplete" in refused(f"run_dir={empty}")
    (empty / "checkpoints" / "step-000000004" / "COMPLETE").touch()
    assert "step-000000004 is DeepSpeed's, of snapshot=nfs" in refused(f"run_dir={empty}")
    assert "there is no complete checkpoint of this step" in (errors := refused(f"run_dir={run_dir}", "step=7"))
    assert "give one of 1, 2" in errors
    assert "step: expected the number of a step; got 'x'" in refused(f"run_dir={run_dir}", "step=x")
    assert "usage:" in refused() and "usage:" in refused("--check", f"run_dir={run_dir}", "out=x")
    out = run_dir / "export-2.safetensors"
    out.write_text("mine")
    assert "give another out=FILE, or force=true" in refused(f"run_dir={run_dir}") and out.read_text() == "mine"
    assert "cannot write" in refused(f"run_dir={run_dir}", f"out={run_dir / 'no' / 'folder'}")
    assert run_export(f"run_dir={run_dir}", "force=true")[0] == 0 and len(load_file(out)) > 4


def test_damage_is_found_and_the_file_named(run_dir):
    here = run_dir / "checkpoints" / "step-000000002"
    for file in (here / "rank-00000.safetensors", here / "rank-00000.tail"):
        good = file.read_bytes()
        for at in np.linspace(0, len(good) - 1, 9).astype(int):
            file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            mark, path = export.choose(run_dir / "checkpoints", None)
            (problem,) = export.check(mark, path, said_by_nobody)
            assert str(here / "rank-00000") in problem, (file, at)
            with pytest.raises(SnapshotError, match=re.escape(str(here))):
                export.export(mark, path, run_dir / "out", said_by_nobody)
        for cut in (0, 4, 8, len(good) // 2, len(good) - 1):
            file.write_bytes(good[:cut])
            assert export.check(mark, path, said_by_nobody), cut
        file.write_bytes(good)
    code, _, errors = run_export("--check", f"run_dir={run_dir}")
    assert code == 0
    os.unlink(here / "rank-00000.tail")
    code, said, errors = run_export("--check", f"run_dir={run_dir}")
    assert code == 1 and f"damaged: cannot read {here / 'rank-00000.tail'}" in errors and "1 of 2 shards" in said
    assert not list(run_dir.glob(".*")) and not (run_dir / "out").exists()
