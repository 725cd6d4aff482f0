"""Training on 1, 2 and 4 ranks: the result does not depend on their number."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gemini_gnn.compose import compose
from gemini_gnn.graph.datasets import load_dataset
from gemini_gnn.models.build import build_model
from gemini_gnn.recovery import board
from gemini_gnn.training.job import in_process
from tests.trainers import logs, train_ranks, trained

SMALL = ["dataset.nodes=600", "dataset.feature_dim=16", "model.hidden=16", "dataset.cache={cache}"]
EXACT = ["experiment=exactness", "training.epochs=20", "evaluation.every=0"]
ADAM = ["optimizer.name=adam", "optimizer.lr=0.005", "optimizer.weight_decay=5e-4"]  # over the experiment's SGD


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return [setting.format(cache=cache) for setting in SMALL]


def plain_pyg_losses(overrides, steps):
    """The loop a PyG user writes: the whole graph, one process, torch's SGD."""
    from torch_geometric.nn import SAGEConv

    config = compose(overrides)
    graph = load_dataset(config.dataset)
    ours = build_model(config.model, graph.x.shape[1], graph.num_classes, config.seed)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = SAGEConv(graph.x.shape[1], config.model.hidden)
            self.two = SAGEConv(config.model.hidden, graph.num_classes)

        def forward(self, x, edge_index):
            return self.two(F.relu(self.one(x, edge_index)), edge_index)

    net = Net()
    with torch.no_grad():
        for theirs, layer in zip((net.one, net.two), ours.layers, strict=True):
            copy_sage(layer, theirs)
    target = np.repeat(np.arange(graph.num_nodes), np.diff(graph.colptr))
    edge_index = torch.from_numpy(np.stack([graph.row.astype(np.int64), target]))
    x, y, mask = (torch.from_numpy(a) for a in (graph.x, graph.y, graph.train_mask))
    optimizer = torch.optim.SGD(net.parameters(), lr=config.optimizer.lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x, edge_index)[mask], y[mask])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def copy_sage(layer, conv):
    """Our layer's weights into PyG's SAGEConv."""
    neighbor, root = layer.weight.split(layer.in_features, dim=1)
    conv.lin_l.weight.copy_(neighbor)
    conv.lin_r.weight.copy_(root)
    conv.lin_l.bias.copy_(layer.bias)


def test_full_batch_losses_of_any_number_of_ranks_equal_a_plain_pyg_loop(small, tmp_path):
    expected = plain_pyg_losses([*EXACT, *small], 20)
    assert all(b < a for a, b in itertools.pairwise(expected)), "SGD on the full batch goes down"
    for world, partition in ((1, "metis"), (2, "metis"), (4, "hash")):
        losses, result = trained(world, tmp_path / f"run{world}", *EXACT, *small, f"partition={partition}")
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        assert result["world_size"] == world


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_zero_stage_trains_the_same(small, tmp_path, zero):
    """Adam divides by the root of its second moment, which near zero turns the last bits of a gradient into first bits of
    an update: sums in another order (by stage) agree to float32's 1e-7 per step times that amplification, 1e-4 here."""
    settings = [*EXACT, *small, *ADAM]
    expected, _ = trained(1, tmp_path / "one", *settings)
    losses, _ = trained(2, tmp_path / "two", *settings, f"deepspeed=zero{zero}")
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_every_zero_stage_trains_the_same_in_bf16(small, tmp_path):
    """bf16 keeps 8 bits: one rounding of a gradient moves a loss by 2**-8 of itself at most. Two ranks add two gradients,
    in whichever order the same sum, so the stages should even agree in every bit."""
    settings = [*EXACT, *small, *ADAM, "training.epochs=8", "training.precision=bf16"]
    runs = [trained(2, tmp_path / f"zero{zero}", *settings, f"deepspeed=zero{zero}")[0] for zero in range(4)]
    assert runs[0][-1] < 0.9 * runs[0][0]
    for losses in runs[1:]:
        np.testing.assert_allclose(losses, runs[0], rtol=2**-8)


def test_every_zero_stage_trains_the_same_in_bf16_products(small, tmp_path):
    """Rounding is a function of values that are float32 and the same, so stages and ranks part by no more than in float32
    until a value crosses the border between two bfloat16 numbers; then a product moves by 2**-8 of itself."""
    settings = [*EXACT, *small, *ADAM, "training.epochs=8", "training=bf16_products"]
    expected, _ = trained(1, tmp_path / "one", *settings)
    exact, _ = trained(1, tmp_path / "float32", *settings, "training.precision=fp32")
    assert expected[-1] < 0.9 * expected[0] and expected != exact
    np.testing.assert_allclose(expected, exact, rtol=2**-6)
    for zero in range(4):
        losses, _ = trained(2, tmp_path / f"zero{zero}", *settings, f"deepspeed=zero{zero}")
        np.testing.assert_allclose(losses, expected, rtol=2**-8)


SAMPLED = ["sampling.order=global", "model.dropout=0", "training.epochs=2", "optimizer=sgd", "sampling.fanouts=[4,3]"]


def test_sampled_losses_agree_on_any_ranks_partition_and_topology(small, tmp_path):
    settings = [*SAMPLED, *small]
    expected, one = trained(1, tmp_path / "one", *settings, "sampling.batch_size=40")
    assert len(expected) > 2
    for name, world, more in (
        ("two", 2, ["partition=hash"]),
        ("four", 4, ["partition=metis", "features.shared=false"]),
        ("remote", 2, ["partition=hash", "sampling.topology=partitioned", "features.shared=false"]),
    ):
        settings_of = [*settings, f"sampling.batch_size={40 // world}", *more]
        losses, result = trained(world, tmp_path / name, *settings_of)
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        assert (result["remote_bytes"] > 0) == ("features.shared=false" in more)
        assert result["test_accuracy"] == pytest.approx(one["test_accuracy"], abs=0.02)


def test_same_seed_same_bits_with_and_without_prefetching(small, tmp_path):
    settings = [*small, "training.epochs=2", "sampling.batch_size=16", "sampling.fanouts=[5,5]"]
    first, _ = trained(2, tmp_path / "a", *settings)
    again, _ = trained(2, tmp_path / "b", *settings)
    alone, _ = trained(2, tmp_path / "c", *settings, "sampling.prefetch=0")
    other, _ = trained(2, tmp_path / "d", *settings, "seed=1")
    assert first == again == alone != other


def test_accumulated_uneven_micro_batches_are_one_batch(small, tmp_path):
    """Three micro-batches over uneven shares of the seeds, on two ranks, make the step of all seeds at once."""
    settings = [*EXACT, *small, "training.epochs=5"]
    whole, _ = trained(1, tmp_path / "whole", *settings)
    seeds = int(load_dataset(compose(settings).dataset).train_mask.sum())
    batch_size = -(-seeds // 6)
    split, result = trained(
        2,
        tmp_path / "split",
        *settings,
        "training.accumulation=3",
        f"sampling.batch_size={batch_size}",
        "partition=hash",
    )
    assert result["steps"] == 5
    np.testing.assert_allclose(split, whole, rtol=1e-5)


def test_early_stop_and_best_model(small, tmp_path):
    settings = [*small, "training.epochs=40", "training.patience=2", "optimizer.lr=0.05", "sampling.batch_size=16"]
    settings += ["evaluation.every=1"]
    _, result = trained(2, tmp_path / "run", *settings)
    assert result["early_stopped"] and result["epochs"] < 40
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: (row["val_accuracy"], -row["epoch"]))
    assert result["best_epoch"] == best["epoch"] and result["test_accuracy"] == best["test_accuracy"]
    assert len(rows) == best["epoch"] + 2


@pytest.mark.parametrize("training", ["bf16", "bf16_products"])
@pytest.mark.parametrize("model", ["sage", "gcn", "gat"])
def test_bf16_and_every_model_train(small, tmp_path, model, training):
    settings = [*small, f"model={model}", f"training={training}", "training.epochs=6", "sampling.batch_size=64"]
    losses, result = trained(2, tmp_path / "run", *settings)
    assert losses[-1] < losses[0]
    assert 0 < result["communication_fraction"] < 1


def test_multi_label_graphs_train_and_predict(tmp_path):
    """Two labels that the features give away, on two ranks, from Python data."""
    import gemini_gnn
    from gemini_gnn.graph.graph import Graph, from_edges

    rng = np.random.default_rng(0)
    n = 400
    x = rng.normal(size=(n, 8)).astype(np.float32)
    colptr, row, _ = from_edges(rng.integers(0, n, 1200), rng.integers(0, n, 1200), n)
    y = (x[:, :3] > 0).astype(np.uint8)
    masks = [np.arange(n) % 4 == i for i in (0, 2, 3)]
    graph = Graph("labels", colptr, row, x, y, 3, *masks)
    gemini_gnn.partition(graph, tmp_path / "parts", parts=2)
    settings = ["dataset=partitioned", f"partition.folder={tmp_path / 'parts'}", "training.epochs=40"]
    settings += ["training.metric=macro_f1", "model.hidden=32", "model.dropout=0.1", "optimizer.weight_decay=0"]
    _, result = trained(2, tmp_path / "run", *settings)
    assert result["macro_f1"] > 0.85
    found = gemini_gnn.predict(tmp_path / "run", graph)
    assert found["predictions"].shape == y.shape and set(np.unique(found["predictions"])) <= {0, 1}


def test_sampled_evaluation(small, tmp_path):
    _, result = trained(2, tmp_path / "run", *small, "training.epochs=2", "evaluation.fanouts=[5,5]")
    assert 0 < result["test_accuracy"] <= 1


def test_a_rank_that_raises_is_the_error_the_user_reads(small, tmp_path):
    run_dir = tmp_path / "run"
    codes = train_ranks(
        2, run_dir, *small, "training.epochs=50", "faults.allow=true", "faults.at=raise-rank 1 @ step 4"
    )
    assert codes == [1, 1], logs(run_dir, 2)  # a launcher takes the code of whichever rank it sees end first
    assert "InjectedFault" in (run_dir / "errors" / "rank-1.json").read_text()
    from gemini_gnn.observe.errors import first_error

    assert "InjectedFault" in str(first_error(run_dir))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("partition.parts=3", "3 parts, the job has 2 ranks"),
        ("model._target_=nowhere.Model", "nowhere"),
        ("dataset.split='random:0.5,0.6,0.1'", "split"),
    ],
)
def test_bad_input_is_one_clear_error_on_every_rank(small, tmp_path, setting, said):
    codes = train_ranks(2, tmp_path / "run", *small, setting)
    assert codes == [2, 2]
    text = logs(tmp_path / "run", 2)
    assert said in text and "Traceback" not in text


def test_a_loss_that_is_not_finite_stops_the_run(small, tmp_path):
    codes = train_ranks(1, tmp_path / "run", *small, "optimizer=sgd", "optimizer.lr=1e30", "training.epochs=20")
    assert codes == [1]
    assert "lower optimizer.lr" in logs(tmp_path / "run", 1)


@pytest.mark.data
@pytest.mark.parametrize(("world", "partition"), [(1, "metis"), (2, "metis"), (4, "hash")])
def test_cora(data_root, tmp_path, world, partition):
    settings = [
        "dataset=cora",
        f"dataset.root={data_root}",
        f"dataset.cache={tmp_path / 'cache'}",
        "training.epochs=50",
    ]
    settings += ["sampling.order=global", f"sampling.batch_size={140 // world}", f"partition={partition}"]
    accuracies = [
        trained(world, tmp_path / f"run{seed}", *settings, f"seed={seed}")[1]["test_accuracy"] for seed in range(2)
    ]
    assert np.mean(accuracies) >= 0.79, accuracies


def fresh_bf16_state(rank, world, optimizer):
    """(largest difference between masters and weights, number of moments) of an engine that was just built."""
    from gemini_gnn.training import engine

    settings = [f"optimizer.name={optimizer}", "optimizer.momentum=0.9", "optimizer.weight_decay=0.1"]
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    begun = [p.detach().bfloat16().float() for p in model.parameters()]
    built = engine.build_engine(model, compose(["training=bf16", *settings]), 10)
    masters = [high.detach() for group in built.optimizer.fp32_groups for high in group]
    moved = max((a - b).abs().max().item() for a, b in zip(begun, masters, strict=True))
    return moved, len(built.optimizer.optimizer.state)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_bf16_engine_that_was_just_built_has_not_taken_a_step(optimizer):
    from tests.ranks import run_ranks

    assert run_ranks(fresh_bf16_state, 1, optimizer) == [(0.0, 0)]


def test_a_cpu_that_does_not_multiply_bf16_is_named_at_the_start(small, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    settings = [*small, "training.epochs=1", "snapshot=none", "logger=quiet", f"run_dir={tmp_path / 'run'}"]
    assert in_process(compose([*settings, "training.precision=bf16_products"])) == 0
    out = "".join(capfd.readouterr())
    assert "this CPU does not multiply bfloat16" in out and "leave it out" in out


def group_timeouts_s(rank, world):
    import torch.distributed as dist

    from gemini_gnn.config import Config
    from gemini_gnn.training import engine

    made, new_group = [], dist.new_group
    dist.new_group = lambda *args, **kwargs: made.append(kwargs["timeout"]) or new_group(*args, **kwargs)
    config = Config()
    config.distributed.timeout_s = 7
    engine.build_engine(torch.nn.Linear(2, 2), config, 10)
    return [timeout.total_seconds() for timeout in made]


def test_no_group_of_deepspeed_waits_longer_than_the_settings_say():
    """torch's default is half an hour: a machine that loses power in the middle of a reduction would hang the others."""
    from tests.ranks import run_ranks

    assert run_ranks(group_timeouts_s, 2) == [[7.0], [7.0]]


def test_the_board_shows_the_milestones_of_a_job(small, tmp_path, monkeypatch):
    board.make(tmp_path, 1)
    view = board.open_board(tmp_path)
    monkeypatch.setattr(board, "_page", None)
    board.attach(tmp_path, 0, 1)
    config = compose([*small, "training.epochs=2", "snapshot=none", "logger=quiet", f"run_dir={tmp_path / 'run'}"])
    assert in_process(config) == 0
    seen = board.read(view, 0)
    assert all(seen.milestones) and list(seen.milestones) == sorted(seen.milestones)
    assert seen.total_steps == 2 * (seen.total_steps // 2) > 0 == seen.restored_step
