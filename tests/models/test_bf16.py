"""Products in bfloat16 of float32 tensors: within the bound of bfloat16, deterministic, float32 outside."""

import pytest
import torch

from gemini_gnn import memory
from gemini_gnn.models import bf16, csr
from gemini_gnn.models.build import build_model
from gemini_gnn.models.network import relu_
from tests.models.blocks import sparse_features
from tests.models.test_models import NAMES, config, features, grads, two_blocks

UNIT = 2**-8  # bfloat16 keeps 8 bits: rounding moves a number by this share of it at most


def within(ours, exact, size, terms):
    """Two operands and the sum are rounded to bfloat16, each of the ``terms`` additions to float32 (2**-24)."""
    bound = ((1 + UNIT) ** 3 * (1 + terms * 2**-24) - 1) * size
    return bool(((ours.double() - exact).abs() <= bound).all())


def operands(rows, wide=24, narrow=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*shape, generator=g) for shape in ((rows, wide), (narrow, wide), (narrow,)))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 2048, 2049, 5000])
def test_products_and_gradients_are_within_the_rounding_of_bf16(rows):
    x, weight, bias = operands(rows)
    out = bf16.linear(x, weight, bias)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    found = torch.autograd.grad(out, (x, weight, bias), grad)
    assert all(t.dtype == torch.float32 for t in (out, *found))
    x64, w64, b64, g64 = (t.detach().double() for t in (x, weight, bias, grad))
    assert within(out, x64 @ w64.T + b64, x64.abs() @ w64.abs().T + b64.abs(), 25)
    assert within(found[0], g64 @ w64, g64.abs() @ w64.abs(), 10)
    assert within(found[1], g64.T @ x64, g64.T.abs() @ x64.abs(), rows)
    torch.testing.assert_close(found[2].double(), g64.sum(0), rtol=0, atol=1e-6 * max(rows, 1))
    if rows:
        assert not torch.equal(out, torch.nn.functional.linear(x, weight, bias)), "nothing was rounded"


def test_without_bias_and_of_a_part_of_a_weight():
    """As SAGE calls it: half of a weight, whose rows do not lie one after the other."""
    x, weight, _ = operands(300)
    out = bf16.linear(x[:, :12], weight[:, :12])
    assert torch.equal(out, bf16.linear(x[:, :12].contiguous(), weight[:, :12].contiguous()))
    assert torch.autograd.grad(out.sum(), weight)[0][:, 12:].eq(0).all()


def test_padding_and_used_memory_have_no_say():
    """Held memory is as its last user left it: here with NaN."""
    x, weight, bias = operands(5000, 256, 256)

    def run():
        out = bf16.linear(x, weight, bias)
        return [out.clone(), *torch.autograd.grad(out.square().sum(), (x, weight, bias))]

    expected = [t.clone() for t in run()]
    for dtype in (torch.bfloat16, torch.float32):
        taken = [memory.empty((5120, 256), dtype) for _ in range(4)]
        for t in taken:
            t.fill_(float("nan"))
        del taken, t
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_model_of_ours_takes_them(name):
    blocks, x = two_blocks(), features(30)
    results = []
    for chosen in (False, True, True):
        model = build_model(config(name), 6, 5, seed=0)
        if chosen:
            model.multiply_in_bf16()
        logits = model(x, blocks)
        results.append([logits, *grads(logits, *model.parameters())])
    exact, first, again = results
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(t.dtype == torch.float32 for t in first) and not torch.equal(first[0], exact[0])
    torch.testing.assert_close(first[0], exact[0], rtol=0.02, atol=0.02)


def test_stored_values_of_sparse_rows_stay_float32():
    x, weight = sparse_features(30, 12), torch.randn(5, 12)
    assert torch.equal(csr.linear(x, weight, in_bf16=True), csr.linear(x, weight))


def test_a_cpu_without_instructions_for_it_is_known(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert bf16.slow_here(torch.device("cpu")) and not bf16.slow_here(torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert not bf16.slow_here(torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_relu_is_torchs(dtype):
    h = features(600, 600, dtype)
    h[0, 0], h[0, 1] = 0, float("nan")
    results = []
    for relu in (relu_, torch.relu_):
        leaf = h.clone().requires_grad_()
        out = relu(leaf * 1)
        results.append((out, *grads(out, leaf)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
