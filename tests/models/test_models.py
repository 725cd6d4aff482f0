"""GraphSAGE, GCN and GAT: the same numbers and gradients as PyG's layers, layer by layer, empty batches, bf16, user classes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gemini_gnn.config import ModelConfig
from gemini_gnn.errors import ConfigError
from gemini_gnn.models import csr
from gemini_gnn.models.build import build_model
from gemini_gnn.models.gat import GATConv
from gemini_gnn.models.gcn import GCNConv
from gemini_gnn.models.sage import SAGEConv
from gemini_gnn.models.tensors import to_tensors
from tests.models.blocks import edge_index, empty_block, make_block, random_block, sparse_features, whole_graph

NAMES = ("sage", "sage-max", "gcn", "gat")


def config(name: str, **settings) -> ModelConfig:
    if name == "sage-max":
        settings["aggregator"] = "max"
    return ModelConfig(name=name.split("-")[0], **{"hidden": 8, "layers": 2, "dropout": 0.0, "heads": 2, **settings})


def two_blocks():
    return [to_tensors(random_block(30, 12, 50, seed=1)), to_tensors(random_block(12, 4, 20, seed=2))]


def features(rows: int, width: int = 6, dtype=torch.float32, seed: int = 0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grads(*outputs_and_leaves):
    """Gradients of a fixed random projection of the output."""
    output, *leaves = outputs_and_leaves
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=output.dtype)
    return torch.autograd.grad((output * probe).sum(), leaves)


def assert_same(ours, theirs):
    # One float64 sum in another order.
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("aggregator", ["mean", "max"])
@pytest.mark.parametrize("width", [3, 40], ids=["project first", "aggregate first"])
@pytest.mark.parametrize("loops", [False, True], ids=["", "loops"])
def test_sage_is_pygs(aggregator, width, loops):
    from torch_geometric.nn import SAGEConv as Reference

    block = whole_graph(20, 60, loops=loops)
    in_features = 48 - width
    ours = SAGEConv(in_features, width, aggregator).double()
    theirs = Reference(in_features, width, aggr=aggregator).double()
    with torch.no_grad():
        theirs.lin_l.weight.copy_(ours.weight[:, :in_features])
        theirs.lin_r.weight.copy_(ours.weight[:, in_features:])
        theirs.lin_l.bias.copy_(ours.bias.normal_())
    x = features(20, in_features, torch.float64).requires_grad_()
    assert csr.project_first(block, x, width) == (width == 3)
    a, b = ours(block, x), theirs(x, edge_index(block))
    assert_same([a], [b])
    dx, dw, db = grads(a, x, ours.weight, ours.bias)
    rx, rl, rr, rb = grads(b, x, theirs.lin_l.weight, theirs.lin_r.weight, theirs.lin_l.bias)
    assert_same([dx, dw, db], [rx, torch.cat([rl, rr], 1), rb])


def test_sage_max_shares_ties_as_pyg():
    from torch_geometric.nn import SAGEConv as Reference

    block = whole_graph(20, 60)
    ours, theirs = SAGEConv(6, 5, "max").double(), Reference(6, 5, aggr="max").double()
    with torch.no_grad():
        theirs.lin_l.weight.copy_(ours.weight[:, :6])
        theirs.lin_r.weight.copy_(ours.weight[:, 6:])
        theirs.lin_l.bias.zero_()
    # Three values, so nearly every maximum is attained more than once. None of them is 0: at a maximum of 0 torch's
    # scatter_reduce(include_self=False) gives a share of the gradient to the zeros it started from.
    x = features(20, dtype=torch.float64).round().clamp(-1, 1).add(2).requires_grad_()
    assert_same(grads(ours(block, x), x), grads(theirs(x, edge_index(block)), x))


@pytest.mark.parametrize("width", [3, 40])
def test_gcn_is_pygs(width):
    from torch_geometric.nn import GCNConv as Reference

    block = whole_graph(20, 60)
    ours, theirs = GCNConv(12, width).double(), Reference(12, width).double()
    with torch.no_grad():
        theirs.lin.weight.copy_(ours.weight)
        theirs.bias.copy_(ours.bias.normal_())
    x = features(20, 12, torch.float64).requires_grad_()
    a, b = ours(block, x), theirs(x, edge_index(block))
    assert_same([a], [b])
    assert_same(grads(a, x, ours.weight, ours.bias), grads(b, x, theirs.lin.weight, theirs.bias))


def test_gcn_edge_weights_multiply_messages():
    from torch_geometric.nn import GCNConv as Reference

    block = whole_graph(20, 60, weighted=True)
    ours, theirs = GCNConv(12, 7).double(), Reference(12, 7, normalize=False).double()
    with torch.no_grad():
        theirs.lin.weight.copy_(ours.weight)
    source, target = edge_index(block)
    own = (block.degree + 1).double()
    weight = torch.cat([block.edge_weight.double() * (own[source] * own[target]).rsqrt(), 1 / own])
    loops = torch.arange(20).expand(2, 20)
    x = features(20, 12, torch.float64)
    assert_same([ours(block, x)], [theirs(x, torch.cat([edge_index(block), loops], 1), weight)])


def test_gcn_on_samples_is_unbiased():
    """All ways to draw 2 of 4 neighbors are equally likely: their mean is the layer with all neighbors."""
    from itertools import combinations

    conv, x = GCNConv(6, 3).double(), features(5, dtype=torch.float64)
    degrees = {"degree": [4], "src_degree": [4, 1, 2, 3, 4]}
    everything = conv(to_tensors(make_block(5, 1, [(s, 0) for s in range(1, 5)], **degrees)), x)
    draws = [
        conv(to_tensors(make_block(5, 1, [(s, 0) for s in two], **degrees)), x) for two in combinations(range(1, 5), 2)
    ]
    assert_same([torch.stack(draws).mean(0)], [everything])


@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("loops", [False, True], ids=["", "loops"])
def test_gat_is_pygs(concat, loops):
    from torch_geometric.nn import GATConv as Reference

    block = whole_graph(20, 60, loops=loops)
    ours = GATConv(7, 12, heads=4, concat=concat).double()
    theirs = Reference(7, 3 if concat else 12, heads=4, concat=concat).double()
    with torch.no_grad():
        theirs.lin.weight.copy_(ours.weight)
        theirs.att_src.copy_(ours.att_src[None])
        theirs.att_dst.copy_(ours.att_dst[None])
        theirs.bias.copy_(ours.bias.normal_())
    x = features(20, 7, torch.float64).requires_grad_()
    a, b = ours(block, x), theirs(x, edge_index(block))
    assert_same([a], [b])
    mine = grads(a, x, ours.weight, ours.att_src, ours.att_dst, ours.bias)
    pygs = list(grads(b, x, theirs.lin.weight, theirs.att_src, theirs.att_dst, theirs.bias))
    pygs[2:4] = [pygs[2][0], pygs[3][0]]
    assert_same(mine, pygs)


@pytest.mark.parametrize("name", NAMES)
def test_whole_models_pass_gradcheck(name):
    blocks = [to_tensors(random_block(7, 4, 9, seed=1)), to_tensors(random_block(4, 2, 5, seed=2))]
    model = build_model(config(name, hidden=2), 2, 2, seed=0).double()
    x = features(7, 2, torch.float64).requires_grad_()
    parameters = dict(model.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (x, blocks))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_forward_is_the_fold_of_layer(name, layer_norm):
    blocks, x = two_blocks(), features(30)
    model = build_model(config(name, layer_norm=layer_norm), 6, 5, seed=0)
    hidden = model.layer(0, blocks[0], x)
    assert hidden.shape == (12, model.out_features(0)) == (12, 8)
    assert torch.equal(model.layer(1, blocks[1], hidden), model(x, blocks))
    assert torch.equal(model.embed(x, blocks), hidden[:4])
    assert model(x, blocks).shape == (4, model.out_features(1)) == (4, 5)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_all_neighbors_is_whole_graph_inference(name):
    """What a batch computes for its seeds, layer-wise inference over the whole graph computes too."""
    graph = whole_graph(15, 45, seed=3)
    order = [7, 2] + [v for v in range(15) if v not in (7, 2)]
    place = {v: i for i, v in enumerate(order)}
    pairs = [(place[int(s)], place[int(t)]) for s, t in edge_index(graph).T]
    degree = graph.degree[torch.tensor(order)].numpy()
    first = make_block(15, 15, pairs, degree, degree)
    last = make_block(15, 2, [pair for pair in pairs if pair[1] < 2], degree[:2], degree)
    model = build_model(config(name), 6, 5, seed=0).double()
    x = features(15, dtype=torch.float64)
    everything = model.layer(1, graph, model.layer(0, graph, x))
    assert_same([model(x[order], [to_tensors(first), to_tensors(last)])], [everything[order[:2]]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seeds", [0, 3])
def test_empty_batches_have_zero_gradients(name, seeds):
    blocks = [empty_block(seeds, seeds), empty_block(seeds, seeds)]
    model = build_model(config(name, layer_norm=True), 6, 5, seed=0)
    logits = model(features(seeds), blocks)
    assert logits.shape == (seeds, 5)
    F.cross_entropy(logits, torch.zeros(seeds, dtype=torch.long), reduction="sum").backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert seeds or not parameter.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name):
    blocks, x = two_blocks(), features(30)
    model = build_model(config(name), 6, 5, seed=0)
    exact = model(x, blocks)
    small = copy.deepcopy(model).bfloat16()
    logits = small(x, blocks)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.05)  # 8 bits of mantissa, two layers
    logits.float().square().mean().backward()
    assert all(p.grad.dtype == torch.bfloat16 and torch.isfinite(p.grad).all() for p in small.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    blocks = two_blocks()
    model = build_model(config(name), 6, 5, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(features(30), blocks).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("compiled", [True, False], ids=["cpu kernels", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_two_runs_agree_bit_for_bit(name, compiled, monkeypatch):
    monkeypatch.setattr(csr, "_compiled", lambda x: compiled)
    blocks, results = two_blocks(), []
    for _ in range(2):
        model = build_model(config(name, dropout=0.5), 6, 5, seed=0)
        torch.manual_seed(3)
        model(features(30), blocks).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(config("sage"), 6, 5, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = build_model(config("sage"), 6, 5, seed=0), build_model(config("sage"), 6, 5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)


def test_init_bounds():
    for init, bound in (("xavier", (6 / (40 + 90)) ** 0.5), ("kaiming", (6 / 40) ** 0.5)):
        weight = build_model(config("gcn", hidden=90, init=init), 40, 5, seed=0).layers[0].weight
        assert 0.95 * bound < weight.abs().max() <= bound


def test_wrong_blocks_are_named():
    model, blocks = build_model(config("sage"), 6, 5, seed=0), two_blocks()
    with pytest.raises(ValueError, match=r"one block per layer \(2\); got 1"):
        model(features(30), blocks[:1])
    with pytest.raises(ValueError, match=r"input node of the batch \(30\); got 29"):
        model(features(29), blocks)


def test_gat_heads_must_fit():
    with pytest.raises(ConfigError, match=r"model\.hidden: expected a multiple of model\.heads=3"):
        build_model(config("gat", heads=3), 6, 5, seed=0)


@pytest.mark.parametrize("way", [True, False], ids=["project first", "aggregate first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_sparse_features_mean_the_same(name, dtype, way, monkeypatch):
    """Within rounding, since a GEMM sums in an order of its own."""
    monkeypatch.setattr(csr, "project_first", lambda *args: way)
    blocks, x = two_blocks(), sparse_features(30, 12)
    model = build_model(config(name, layer_norm=True), 12, 5, seed=0).to(dtype)
    assert model.takes_sparse == (name != "sage-max")
    results = []
    for features in (x, x.dense()):
        logits = model(features, blocks)
        results.append([logits, *grads(logits, *model.parameters())])
    tolerance = {} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    layers = [model.layer(0, blocks[0], x.to(dtype)), model.embed(x, blocks)]
    assert torch.equal(layers[0][:4], layers[1])


@pytest.mark.parametrize("name", NAMES)
def test_sparse_features_in_other_precisions(name):
    blocks, x = two_blocks(), sparse_features(30, 12)
    model = build_model(config(name), 12, 5, seed=0)
    exact = model(x, blocks)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x, blocks).float(), exact, rtol=0.05, atol=0.05)
    logits = model.bfloat16()(x, blocks)
    torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.05)
    logits.float().square().mean().backward()
    assert all(p.grad.dtype == torch.bfloat16 and torch.isfinite(p.grad).all() for p in model.parameters())


def test_sparse_features_run_again_bit_for_bit():
    blocks, results = two_blocks(), []
    for threads in (1, 1, 2):
        model = build_model(config("sage"), 12, 5, seed=0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(csr, "_SPLIT_EDGES", 1)
            patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            model(sparse_features(30, 12), blocks).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


def test_one_layer_embeds_sparse_features_as_dense_ones():
    x, block = sparse_features(30, 12), to_tensors(random_block(30, 12, 50))
    model = build_model(config("sage", layers=1), 12, 5, seed=0)
    assert torch.equal(model.embed(x, [block]), x.dense()[:12])


class Own(nn.Module):
    def __init__(self, in_features, hidden, num_classes, layers, scale=1.0):
        super().__init__()
        self.scale, self.sizes = scale, (in_features, hidden, num_classes, layers)
        self.weight = nn.Parameter(torch.randn(num_classes, in_features))

    def forward(self, x, blocks):
        return self.scale * F.linear(csr.mean(blocks[-1], csr.mean(blocks[0], x)), self.weight)


class NoBlocks(Own):
    def forward(self, x):
        return x


NOT_A_MODULE = 3


def test_users_own_model():
    settings = ModelConfig(_target_="tests.models.test_models.Own", hidden=8, layers=2, kwargs={"scale": 2.0})
    model = build_model(settings, 6, 5, seed=0)
    assert model.sizes == (6, 8, 5, 2)
    assert model.scale == 2.0
    assert model(features(30), two_blocks()).shape == (4, 5)
    assert torch.equal(model.weight, build_model(settings, 6, 5, seed=0).weight)


def test_the_example_of_an_own_model_is_a_gin():
    settings = ModelConfig(_target_="examples.own_model.GIN", hidden=8, layers=2, kwargs={"eps": 0.5})
    model, blocks, x = build_model(settings, 6, 5, seed=0), two_blocks(), features(30)
    h = x
    for conv, block, activate in zip(model.convs, blocks, (torch.relu, nn.Identity()), strict=True):
        dense = torch.zeros(block.num_dst, block.num_src)
        dense.index_put_((csr.destinations(block), block.indices), torch.ones(block.num_edges), accumulate=True)
        h = activate(conv.nn(1.5 * h[: block.num_dst] + dense @ h))
    torch.testing.assert_close(model(x, blocks), h)


@pytest.mark.parametrize(
    ("target", "kwargs", "message"),
    [
        ("Own", {}, "expected package.module.Class"),
        ("no_such_package.Own", {}, "cannot import no_such_package .*PYTHONPATH"),
        ("tests.models.test_models.Missing", {}, "class named Missing in tests.models.test_models; got None"),
        ("tests.models.test_models.NOT_A_MODULE", {}, "expected a torch.nn.Module class .* got 3"),
        ("tests.models.test_models.NoBlocks", {}, r"expected forward\(x, blocks\); got \(self, x\)"),
        ("tests.models.test_models.Own", {"depth": 1}, r"expected __init__\(.*depth\).*unexpected keyword"),
    ],
)
def test_users_own_model_refused(target, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        build_model(ModelConfig(_target_=target, kwargs=kwargs), 6, 5, seed=0)
