"""Why ops have no row: what the error for them says."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten

_MATRIX = [aten.linalg_inv, aten.linalg_inv_ex, aten.inverse, aten.linalg_pinv, aten.pinverse]
_MATRIX += [aten.linalg_det, aten.det, aten.logdet, aten.linalg_slogdet, aten.slogdet]
_MATRIX += [aten.linalg_cholesky, aten.linalg_cholesky_ex, aten.cholesky_inverse]
_MATRIX += [aten.linalg_eig, aten.linalg_eigh, aten.linalg_eigvals, aten.linalg_eigvalsh]
_MATRIX += [aten.linalg_svd, aten.linalg_svdvals, aten.svd, aten.linalg_qr]
_MATRIX += [aten.linalg_lu, aten.linalg_lu_factor, aten.linalg_lu_factor_ex, aten.lu_unpack]
_MATRIX += [aten.matrix_exp, aten.linalg_matrix_exp, aten.linalg_lstsq, aten.nuclear_norm]
_MATRIX += [aten.linalg_solve, aten.linalg_solve_ex, aten.linalg_solve_triangular]
_MATRIX += [aten.cholesky_solve, aten.triangular_solve, aten.linalg_householder_product]
_MATRIX += [getattr(aten, name) for name in ("cholesky", "qr") if hasattr(aten, name)]  # < 2.14
_ANGLES = [aten.atan2, aten.angle]
_MEMORY = [aten.as_strided, aten.as_strided_scatter, aten.set, aten.resize]
_LOSSES = [aten.cross_entropy_loss, aten.nll_loss, aten.nll_loss_nd, aten.nll_loss2d]
_LOSSES += [aten.binary_cross_entropy, aten.binary_cross_entropy_with_logits, aten.kl_div]
_LOSSES += [aten.ctc_loss, aten.soft_margin_loss, aten.multi_margin_loss, aten.poisson_nll_loss]
_LOSSES += [aten.multilabel_margin_loss, aten.hinge_embedding_loss, aten.margin_ranking_loss]
_LOSSES += [aten.cosine_embedding_loss]
_PLACES = [aten.grid_sampler, aten.grid_sampler_2d, aten.grid_sampler_3d]
_PLACES += [aten.affine_grid_generator]
_BAGS = [aten.embedding_bag, aten._embedding_bag]

_CHEBYSHEV = [f"chebyshev_polynomial_{letter}" for letter in "tuvw"]
_POLYNOMIALS = [*_CHEBYSHEV, *(f"shifted_{name}" for name in _CHEBYSHEV)]
_POLYNOMIALS += ["hermite_polynomial_h", "hermite_polynomial_he"]
_POLYNOMIALS += ["laguerre_polynomial_l", "legendre_polynomial_p"]
_BESSEL = ["airy_ai", "bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1", "spherical_bessel_j0"]
_BESSEL += [f"modified_bessel_{name}" for name in ("i0", "i1", "k0", "k1")]
_BESSEL += ["scaled_modified_bessel_k0", "scaled_modified_bessel_k1"]
_UNDERIVED = [getattr(aten, f"special_{name}") for name in _POLYNOMIALS + _BESSEL]
_UNDERIVED += [aten.igamma, aten.igammac, aten.special_zeta, aten.nextafter]

#: By what the op is.
_REASONS = (
    (
        _MATRIX,
        "a function of whole matrices is neither linear nor elementwise; .detach() makes it a "
        "constant",
    ),
    (
        _ANGLES,
        "an angle does not change with the size of what it is the angle of, so there is nothing "
        "to share by",
    ),
    (_MEMORY, "it reads memory as it lies, and not a tensor"),
    (_LOSSES, "a loss is explained by the output that it is computed from"),
    (_PLACES, "the places to read at depend on the input; .detach() makes them constants"),
    (
        _UNDERIVED,
        "PyTorch has no derivative of it, or no second one; where relevance is to pass all the "
        "same, register it as an activation",
    ),
    (_BAGS, "bags of vectors that depend on the input are not taken apart"),
)
_WHY: dict[Any, str] = {
    getattr(packet, name): why
    for packets, why in _REASONS
    for packet in packets
    for name in packet.overloads()
}


def why_not(target: Any) -> str:
    """Why an op has no row that serves, "" if nobody has thought about it."""
    return _WHY.get(getattr(target, "target", target), "")
