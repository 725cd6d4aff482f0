"""Products of a block with rows: against dense algebra, in both implementations, and their gradients."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from gemini_gnn.models import csr
from gemini_gnn.models.tensors import SparseFeatures, to_tensors
from tests.models.blocks import empty_block, make_block, random_block, sparse_features

# The path for other devices is plain torch, so it can be proved here: run everything on both.
both = pytest.mark.parametrize("compiled", [True, False], ids=["cpu kernels", "torch"])


@pytest.fixture(autouse=True)
def _which(request, monkeypatch):
    if "compiled" in request.fixturenames and not request.getfixturevalue("compiled"):
        monkeypatch.setattr(csr, "_compiled", lambda x: False)


def dense(block, values=None):
    matrix = torch.zeros(block.num_dst, block.num_src, dtype=torch.float64)
    to = csr.destinations(block)
    matrix.index_put_(
        (to, block.indices), torch.ones(block.num_edges).double() if values is None else values, accumulate=True
    )
    return matrix


def leaf(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


@pytest.fixture
def block():
    return to_tensors(random_block(num_src=17, num_dst=9, num_edges=40), "cpu")


def test_tensors_share_memory_with_the_block():
    block = random_block(5, 3, 6)
    tensors = to_tensors(block, "cpu")
    assert tensors.num_edges == 6
    assert np.shares_memory(block.indices, tensors.indices.numpy())
    assert np.shares_memory(block.edge_t, tensors.edge_t.numpy())


def test_mapped_arrays_are_accepted():
    block = random_block(5, 3, 6)
    block.degree.flags.writeable = False
    assert torch.equal(to_tensors(block).degree, torch.tensor(np.array(block.degree)))


@both
def test_mean(block, compiled):
    x = leaf(17, 5)
    matrix = dense(block)
    expected = matrix / matrix.sum(1, keepdim=True).clamp(min=1) @ x
    torch.testing.assert_close(csr.mean(block, x), expected)
    torch.testing.assert_close(csr.mean_beside_root(block, x), torch.cat([expected, x[:9]], dim=1))
    assert torch.autograd.gradcheck(lambda x: csr.mean(block, x), (x,))
    assert torch.autograd.gradcheck(lambda x: csr.mean_beside_root(block, x), (x,))


@both
def test_weighted_and_scaled_sums(block, compiled):
    x = leaf(17, 5)
    values, rows, cols, root = (leaf(n, seed=n).detach() for n in (40, 9, 17, 9))
    torch.testing.assert_close(csr.weighted_sum(block, values, x), dense(block, values) @ x)
    expected = root[:, None] * x[:9] + rows[:, None] * (dense(block, values) @ (cols[:, None] * x))
    torch.testing.assert_close(csr.scaled_sum(block, x, rows, cols, values, root), expected)
    assert torch.autograd.gradcheck(lambda x: csr.weighted_sum(block, values, x), (x,))
    assert torch.autograd.gradcheck(lambda x: csr.scaled_sum(block, x, rows, cols, values, root), (x,))
    assert torch.autograd.gradcheck(lambda x: csr.scaled_sum(block, x, None, None, None, root), (x,))


@both
def test_maximum(block, compiled):
    x = leaf(17, 5)
    present = dense(block) > 0
    expected = torch.stack([x[row].amax(0) if row.any() else torch.zeros(5, dtype=x.dtype) for row in present])
    torch.testing.assert_close(csr.maximum(block, x), expected)
    assert torch.autograd.gradcheck(lambda x: csr.maximum(block, x), (x,))


@both
def test_equal_maxima_share_the_gradient(compiled):
    block = to_tensors(make_block(4, 1, [(1, 0), (2, 0), (3, 0)]))
    x = torch.tensor([[9.0], [2.0], [2.0], [1.0]], requires_grad=True)
    csr.maximum(block, x).sum().backward()
    assert x.grad.flatten().tolist() == [0.0, 0.5, 0.5, 0.0]


@both
def test_attention_sum(block, compiled):
    weight, x = leaf(40, 2, seed=1), leaf(17, 6)
    expected = torch.stack([dense(block, weight[:, h]) @ x.view(17, 2, 3)[:, h] for h in range(2)], dim=1).flatten(1)
    torch.testing.assert_close(csr.attention_sum(block, weight, x), expected)
    assert torch.autograd.gradcheck(lambda w, x: csr.attention_sum(block, w, x), (weight, x))


@both
def test_edge_values(block, compiled):
    source, target, edge = leaf(17, 3), leaf(9, 3), leaf(40, 3)
    to = csr.destinations(block)
    assert torch.equal(csr.source_to_edge(block, source), source[block.indices])
    assert torch.equal(csr.destination_to_edge(block, target), target[to])
    torch.testing.assert_close(csr.edge_sum(block, edge), torch.zeros(9, 3).double().index_add(0, to, edge))
    assert torch.autograd.gradcheck(lambda v: csr.source_to_edge(block, v), (source,))
    assert torch.autograd.gradcheck(lambda v: csr.destination_to_edge(block, v), (target,))
    assert torch.autograd.gradcheck(lambda v: csr.edge_sum(block, v), (edge,))


@both
@pytest.mark.parametrize(("num_src", "num_dst"), [(0, 0), (4, 0), (4, 2)])
def test_nothing_to_sum(num_src, num_dst, compiled):
    block = empty_block(num_src, num_dst)
    x = leaf(num_src, 4)
    weight = leaf(0, 2)
    for result, width in (
        (csr.mean(block, x), 4),
        (csr.mean_beside_root(block, x), 8),
        (csr.maximum(block, x), 4),
        (csr.attention_sum(block, weight, x), 4),
    ):
        assert result.shape == (num_dst, width)
        assert not result[:, :4].any()
        x.grad = None
        result.sum().backward()
        assert x.grad.shape == x.shape


@both
def test_no_gradient_no_backward(block, compiled, monkeypatch):
    weight, x = leaf(5, 5), leaf(17, 5).detach()
    loss = (csr.mean(block, x) @ weight).sum()
    monkeypatch.setattr(csr, "_product", lambda *args: pytest.fail("a product nobody asked for"))
    loss.backward()
    assert weight.grad is not None


@both
def test_bfloat16_sums_in_float32(block, compiled):
    x = leaf(17, 6, dtype=torch.float32).detach().bfloat16().requires_grad_()
    result = csr.mean(block, x)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, csr.mean(block, x.detach().float()).bfloat16())
    result.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert csr.maximum(block, x).dtype == torch.bfloat16


def test_threads_change_no_bit(monkeypatch):
    block = to_tensors(random_block(num_src=300, num_dst=120, num_edges=900))
    monkeypatch.setattr(csr, "_SPLIT_EDGES", 1)
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        x = leaf(300, 32, dtype=torch.float32)
        weight = leaf(900, 4, seed=1, dtype=torch.float32)
        out = csr.mean_beside_root(block, x), csr.maximum(block, x), csr.attention_sum(block, weight, x)
        sum((o * o).sum() for o in out).backward()
        results.append([*(o.detach() for o in out), x.grad, weight.grad])
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


ones = pytest.mark.parametrize("ones", [False, True], ids=["values", "ones"])


@both
@ones
def test_linear_of_sparse_features(compiled, ones):
    x, weight, bias = sparse_features(30, 12, ones=ones).to(torch.float64), leaf(7, 12), leaf(7, seed=1)
    torch.testing.assert_close(csr.linear(x, weight, bias), x.dense() @ weight.T + bias)
    assert torch.autograd.gradcheck(lambda w, b: csr.linear(x, w, b), (weight, bias))
    wide = leaf(7, 24)  # a layer's weight may be a part of a wider one
    assert torch.equal(csr.linear(x, wide[:, 12:]), csr.linear(x, wide[:, 12:].contiguous()))
    csr.linear(x, weight).sum().backward()
    assert not weight.grad[:, 11].any()  # no row has the last column


@both
def test_products_of_sparse_features_are_those_of_dense_ones(block, compiled):
    """Bit for bit: what is left out are sums with 0."""
    x = sparse_features(17, 12)
    values, rows, cols, root = (leaf(n, seed=n).detach().float() for n in (40, 9, 17, 9))
    assert torch.equal(csr.mean_beside_root(block, x), csr.mean_beside_root(block, x.dense()))
    arguments = (rows, cols, values, root)
    assert torch.equal(csr.scaled_sum(block, x, *arguments), csr.scaled_sum(block, x.dense(), *arguments))


@both
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (3, 0), (3, 4)])
def test_nothing_is_stored(rows, width, compiled):
    x, weight = sparse_features(rows, width, filled=0), leaf(5, width, dtype=torch.float32)
    result = csr.linear(x, weight)
    assert torch.equal(result, torch.zeros(rows, 5))
    result.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(5, width))
    assert csr.mean_beside_root(empty_block(rows, rows), x).shape == (rows, 2 * width)


@both
@ones
def test_sparse_features_in_bfloat16_are_summed_in_float32(compiled, ones):
    x, weight = sparse_features(17, 12, ones=ones).to(torch.bfloat16), leaf(5, 12, dtype=torch.bfloat16)
    result = csr.linear(x, weight)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, csr.linear(x.to(torch.float32), weight.float()).bfloat16())
    result.sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    block = to_tensors(random_block(17, 9, 40))
    assert torch.equal(csr.mean_beside_root(block, x), csr.mean_beside_root(block, x.dense()))


@ones
def test_a_row_of_sparse_features_stands_for_itself(ones, monkeypatch):
    """Nor do threads or runs change a bit: forward each output row has one sum, backward each column."""
    monkeypatch.setattr(csr, "_SPLIT_EDGES", 1)
    x, weight = sparse_features(300, 50, ones=ones), leaf(64, 50, dtype=torch.float32)
    results = []
    for threads in (1, 1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        weight.grad = None
        out = csr.linear(x, weight)
        (out * out).sum().backward()
        results.append((out.detach(), weight.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(csr.linear(x[:101], weight), results[0][0][:101])
    assert torch.equal(x[:101].dense(), x.dense()[:101])


def test_the_cheaper_way_is_chosen():
    """Both ways were timed on blocks of these sizes: the least of 5 rounds, project first against aggregate first."""

    def first(num_src, num_dst, num_edges, stored_per_row, width, out_features):
        block = replace(empty_block(0, 0), num_src=num_src, num_dst=num_dst, num_edges=num_edges)
        index = torch.zeros(num_src * stored_per_row, dtype=torch.int32)
        return csr.project_first(block, SparseFeatures(torch.zeros(num_src + 1), index, None, width), out_features)

    assert first(15_000, 4_500, 34_000, 70, 7_000, 256)  # Coauthor, 1 % filled: 103 against 774 ms
    assert first(15_000, 4_500, 34_000, 70, 7_000, 64)  # 29 against 258 ms
    assert not first(11_000, 6_000, 49_000, 268, 767, 256)  # Computers, 35 % filled: 158 against 132 ms
    assert first(11_000, 6_000, 49_000, 268, 767, 64)  # 60 against 63 ms: as good as equal


def test_rows_are_summed_in_simd_lanes(monkeypatch):
    """One float a turn would take eight times as long, about 0.4 of the time of gathering and reducing."""
    block, x = to_tensors(random_block(num_src=1000, num_dst=500, num_edges=20_000)), torch.randn(1000, 256)

    def seconds():
        csr.mean(block, x)
        taken = []
        for _ in range(9):
            began = time.thread_time()
            csr.mean(block, x)
            taken.append(time.thread_time() - began)
        return min(taken)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        kernel = seconds()
        monkeypatch.setattr(csr, "_compiled", lambda x: False)
        gathered = seconds()
    finally:
        torch.set_num_threads(threads)
    assert kernel < 0.2 * gathered  # 0.06 here
