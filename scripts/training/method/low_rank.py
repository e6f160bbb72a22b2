"""Low-rank products `up @ down`: their singular values, and norms of what they change, without computing the product."""

import torch


def svd_of_product(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular value decomposition of `up @ down`, for `up` [out, r] and `down` [r, in]: U [out, k], S [k] in descending order
    and V^T [k, in] in float64, with k = min(out, r, in).

    `up` = Q_u R_u and `down`^T = Q_d R_d, so that `up @ down` = Q_u (R_u R_d^T) Q_d^T, and the singular values are those of the
    small matrix in the middle (Golub and Van Loan, Matrix Computations, section 5.2).
    """
    left, of_left = torch.linalg.qr(up.double())
    right, of_right = torch.linalg.qr(down.double().T)
    u, values, vh = torch.linalg.svd(of_left @ of_right.T, full_matrices=False)
    return left @ u, values, vh @ right.T


def rank_of_energy(values: torch.Tensor, energy: float) -> int:
    """The smallest rank, at least 1, whose first singular `values` [k] hold the share `energy` of the sum of all their squares."""
    squares = values.double() ** 2
    kept = squares.cumsum(0)
    return 1 + int((kept[:-1] < energy * squares.sum()).sum())


def truncate(up: torch.Tensor, down: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors [out, k] and [k, in] of the nearest matrix to `up @ down` that has the rank k = min(`rank`, out, r, in), in the
    Frobenius norm (Eckart and Young 1936), fp32."""
    return balanced_factors(*svd_of_product(up, down), rank)


def balanced_factors(u: torch.Tensor, values: torch.Tensor, vh: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The product of the first `rank` singular values and vectors as two factors, fp32. Both have the roots of the values, in which
    fp16 represents them best."""
    roots = values[:rank].sqrt()
    return (u[:, :rank] * roots).float().contiguous(), (roots[:, None] * vh[:rank]).float().contiguous()


def changed_row_squares(squares: torch.Tensor, across: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[..., out] fp32: the squared norms of the rows of W + `up` @ `down`.

    `squares` [..., out] are those of W [..., out, in] alone, and `across` [..., out, r] is W `down`^T; `down` is [..., r, in] and
    `up` [..., out, r]. For each row, |w + u down|^2 = |w|^2 + u . (2 w down^T + u down down^T).
    """
    down, up = down.float(), up.float()
    changed = squares + (up * (2 * across.float() + up @ (down @ down.mT))).sum(-1)
    # Where hardly anything of a row remains, the sum of fp32 numbers has no digits left, and may be negative.
    return torch.maximum(changed, 1e-6 * squares)
