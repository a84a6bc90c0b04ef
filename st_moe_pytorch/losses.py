"""The auxiliary losses of routers, an equation each. Axes: b groups, n tokens of a group, e experts."""

import torch
from torch import Tensor


def balance_loss(probs: Tensor, choice: Tensor, mask: Tensor | None = None) -> Tensor:
    """Load-balancing loss: mean over groups of ``e * sum_i f_i P_i`` (Switch Transformers, Fedus et al. 2021, eqs 4-6).

    ``f_i`` is the share of the group's real tokens that choose expert i, ``P_i`` the mean probability they give it: 1
    at uniform routing, e when every token insists on one expert. The gradient flows through P.

    probs (b n e), choice (b n) expert ids, mask (b n) True for real tokens -> 0-d. Groups without a real token are left
    out.
    """
    real = torch.ones_like(probs[..., 0]) if mask is None else mask.to(probs.dtype)
    tokens = real.sum(dim=1)
    share = probs.new_zeros(probs.shape[0], probs.shape[-1]).scatter_add(1, choice, real)
    product = (share * (probs * real.unsqueeze(-1)).sum(dim=1)).sum(dim=-1)
    loss = probs.shape[-1] * product / tokens.clamp(min=1).square()
    return loss.sum() / (tokens > 0).sum().clamp(min=1)


def token_balance_loss(probs: Tensor, mask: Tensor) -> Tensor:
    """Balance loss of experts that pick tokens, as of Mesh-TensorFlow: mean over groups of ``n * sum_t P_t^2``.

    n is the number of real tokens of the group and ``P_t`` the mean over experts of the probability of token t: 1 where
    all tokens are wanted alike, n where every expert insists on the same one.

    probs (b n e), 0 for padding, sum to 1 over n, mask (b n) True for real tokens -> 0-d. Groups without a real token
    are left out.
    """
    tokens = mask.sum(dim=1)
    loss = tokens * probs.mean(dim=-1).square().sum(dim=1)
    return loss.sum() / (tokens > 0).sum().clamp(min=1)


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Router z-loss: mean over real tokens of ``logsumexp(logits)^2`` (ST-MoE, Zoph et al. 2022, equation 5).

    logits (b n e) -> 0-d.
    """
    z = logits.logsumexp(dim=-1).square()
    real = torch.ones_like(z) if mask is None else mask.to(z.dtype)
    return (z * real).sum() / real.sum().clamp(min=1)
