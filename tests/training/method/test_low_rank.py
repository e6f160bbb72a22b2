"""Singular values of low-rank products, against the decomposition of the whole product."""

import pytest
import torch

from training.method.low_rank import rank_of_energy, svd_of_product, truncate

SHAPES = [(40, 8, 24), (8, 8, 40), (6, 16, 40), (40, 16, 6), (5, 1, 7)]
"""out, r, in; in the third and fourth, r is greater than a side."""


@pytest.fixture(params=SHAPES, ids=str)
def factors(request):
    out, rank, inputs = request.param
    generator = torch.Generator().manual_seed(3)
    return torch.randn(out, rank, generator=generator), torch.randn(rank, inputs, generator=generator)


def test_svd_is_that_of_the_product(factors):
    up, down = factors
    product = up.double() @ down.double()
    u, values, vh = svd_of_product(up, down)
    count = min(*up.shape, down.shape[1])
    assert (u.shape, values.shape, vh.shape) == ((len(up), count), (count,), (count, down.shape[1]))
    torch.testing.assert_close(values, torch.linalg.svdvals(product)[:count], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(u * values @ vh, product, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(u.T @ u, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 100])
def test_truncated_product_is_the_nearest_of_its_rank(factors, rank):
    up, down = factors
    product = up.double() @ down.double()
    u, values, vh = torch.linalg.svd(product, full_matrices=False)
    new_up, new_down = truncate(up, down, rank)
    kept = min(rank, *up.shape, down.shape[1])
    assert (new_up.shape, new_down.shape) == ((len(up), kept), (kept, down.shape[1]))
    nearest = u[:, :rank] * values[:rank] @ vh[:rank]
    torch.testing.assert_close(new_up.double() @ new_down.double(), nearest, rtol=1e-5, atol=1e-5)


def test_factors_share_the_singular_values(factors):
    new_up, new_down = truncate(*factors, 4)
    torch.testing.assert_close(new_up.norm(dim=0), new_down.norm(dim=1))


def test_rank_of_energy():
    values = torch.tensor([4.0, 2.0, 1.0, 0.5])  # squares: 16, 4, 1, 0.25 of 21.25
    assert [rank_of_energy(values, share) for share in (0.01, 16 / 21.25, 0.76, 0.95, 0.99, 1.0)] == [1, 1, 2, 3, 4, 4]


def test_zeros_have_rank_one():
    assert rank_of_energy(torch.zeros(4), 0.9) == 1
    new_up, new_down = truncate(torch.zeros(6, 4), torch.ones(4, 5), 2)
    assert not (new_up @ new_down).any()
    assert new_up.isfinite().all()
