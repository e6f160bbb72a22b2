"""The benchmark's count of FLOPs and bytes."""

import torch

from benchmarks.traffic import Operation, operations_of

BF16 = 2


def test_products_and_their_backward_are_counted_from_their_shapes():
    a, b = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True), torch.randn(32, 16, dtype=torch.bfloat16)
    upstream = torch.randn(64, 16, dtype=torch.bfloat16)
    found = operations_of(lambda: (a @ b).backward(upstream))
    sizes = BF16 * (64 * 32 + 32 * 16 + 64 * 16)
    assert [each for each in found if each.flops] == [Operation("aten.mm", 2 * 64 * 32 * 16, sizes)] * 2


def test_views_and_empty_tensors_cost_nothing_and_a_copy_is_read_and_written_once():
    a, b = torch.randn(64, 32), torch.randn(32, 64)
    assert operations_of(lambda: (a.T.view(32, 64)[1:], torch.empty_like(a), a.expand(3, 64, 32))) == []
    assert operations_of(lambda: b.copy_(a.T)) == [Operation("aten.copy_", 0, 2 * 4 * 64 * 32)]


def test_an_operation_takes_the_slower_of_arithmetic_and_memory():
    operation = Operation("aten.mm", flops=200, moved=30)
    assert operation.seconds(100, 10) == 3
    assert operation.seconds(10, 100) == 20
