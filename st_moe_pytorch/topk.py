"""The k best experts of every token: exact, with ties to the lowest index, or differentiable by coordinate descent.

Axes: e experts, k choices.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from st_moe_pytorch.compat import is_transformed


class TopK(NamedTuple):
    """Best entries along the last axis: values, indices (..., k) and soft selections (None unless differentiable)."""

    values: Tensor
    indices: Tensor
    coor_descent_values: Tensor | None


def coor_descent(scores: Tensor, k: float, n_iters: int = 20, eps: float = 0.1) -> Tensor:
    """Soft top-k by coordinate descent (CoLT5, Ainslie et al. 2023, section 3.1; Wright 2015).

    Maximises ``<scores, s> + eps * entropy(s)`` over selections ``0 <= s <= 1`` that sum to k, by ``n_iters``
    alternating exact updates of the dual variables: ``a`` of the sum and ``b`` of the upper bounds.

    scores (..., e) -> selection (..., e), each close to 0 or 1 where the scores are further apart than eps.
    """
    log_k = torch.tensor(k, dtype=scores.dtype, device=scores.device).log()
    a, b = torch.zeros_like(scores[..., :1]), -scores
    for _ in range(n_iters):
        a = eps * (log_k - ((scores + b) / eps).logsumexp(dim=-1, keepdim=True))
        b = -(scores + a).relu()
    return ((scores + a + b) / eps).exp()


def topk(
    values: Tensor, k: int, bias: Tensor | None, indices: Tensor | None, *, differentiable: bool, fused: bool
) -> TopK:
    """The k largest of values (..., e) along the last axis, ties to the lowest index.

    With a bias (e), those of which the sum is largest; with indices (... k), the values of these instead.

    With ``differentiable``, also the coordinate-descent selection of those entries for ``min(k * 9 / 8, e)`` winners,
    and the values carry its gradient straight through. ``fused`` recomputes its iterates in the backward pass instead
    of keeping all of them.
    """
    if indices is None:
        ranked = values.detach() if bias is None else values.detach() + bias.to(values.dtype)
        indices = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :k]  # torch.topk breaks ties anyhow
    if not differentiable:
        return TopK(values.gather(-1, indices), indices, None)
    winners = min(k * 9 / 8, values.shape[-1])
    if fused and not is_transformed():  # torch.func does not work with checkpointing
        selection = checkpoint(coor_descent, values, winners, use_reentrant=False, preserve_rng_state=False)
    else:
        selection = coor_descent(values, winners)
    values = values * (1 + (selection - selection.detach()))
    return TopK(values.gather(-1, indices), indices, selection.gather(-1, indices))
