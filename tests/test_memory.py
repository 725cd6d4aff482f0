import threading

import pytest
import torch

from gemini_gnn import memory

MB = 1 << 20


@pytest.fixture(autouse=True)
def _own_blocks(monkeypatch):
    monkeypatch.setattr(memory, "_blocks", [])


def test_memory_comes_back_when_nothing_refers_to_it():
    tensor = memory.empty((3 * MB, 2), torch.float32)
    assert tensor.shape == (3 * MB, 2) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    address = tensor.data_ptr()
    assert address % 64 == 0
    del tensor
    assert memory.empty((3 * MB,), torch.float64).data_ptr() == address
    assert len(memory._blocks) == 1


def test_whatever_still_refers_to_it_keeps_it():
    address = (tensor := memory.empty((MB,), torch.float32)).data_ptr()
    for keep in (
        lambda t: t[5:9],
        lambda t: t.numpy()[::2],
        lambda t: t.view(4, -1).t(),
        lambda t: t.untyped_storage(),
    ):
        kept = keep(tensor)
        tensor = memory.empty((MB,), torch.float32)
        assert tensor.data_ptr() != address
        del kept
        del tensor
        address = (tensor := memory.empty((MB,), torch.float32)).data_ptr()
    weight = torch.ones(1, requires_grad=True)
    result = tensor.fill_(2) * weight  # autograd saves `tensor`
    del tensor
    memory.empty((MB,), torch.float32).zero_()
    result.sum().backward()
    assert weight.grad.item() == 2 * MB


def test_growing_batches_replace_what_they_outgrew():
    for size in range(1, 20):
        memory.empty((size * MB,), torch.uint8)
    assert len(memory._blocks) == 1
    big = memory.empty((10 * MB,), torch.uint8)
    small = memory.empty((2 * MB,), torch.uint8)
    assert small.data_ptr() != big.data_ptr()
    del big, small
    memory.empty((2 * MB,), torch.uint8)
    assert [len(block) >= size * MB for block, size in zip(memory._blocks, (10, 2), strict=True)] == [True, True]


def test_small_tensors_are_left_to_the_allocator():
    assert memory.empty((0, 4), torch.float32).shape == (0, 4)
    assert memory.empty((10, 4), torch.bfloat16).dtype == torch.bfloat16
    assert not memory._blocks


def test_two_threads_never_share():
    errors = []

    def work(mark: int) -> None:
        for _ in range(200):
            tensor = memory.empty((MB,), torch.uint8)
            tensor.fill_(mark)
            if not (tensor == mark).all():
                errors.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(memory._blocks) <= 6
