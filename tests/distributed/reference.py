"""Models and tokens for tests over ranks, and what one process makes of them.

Shares no code with the package's own distribution.
"""

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from st_moe_pytorch import Expert, MoE, SparseMoEBlock

DIM = 6


def different_experts(number):
    """Experts of two hidden widths, some with another norm."""
    return [Expert(DIM, 1 + i % 2, prenorm=i % 3 == 1) for i in range(number)]


class Stack(nn.Module):
    """A dense layer and two sparse blocks, optionally checkpointed. (b n d) -> outputs and auxiliary loss."""

    def __init__(self, num_experts, reentrant=None):
        super().__init__()
        self.before = nn.Linear(DIM, DIM)
        moes = [
            MoE(DIM, num_experts, gating_top_n=2, experts=different_experts(num_experts), balance_loss_coef=0.3)
            for _ in range(2)
        ]
        self.blocks = nn.ModuleList([SparseMoEBlock(moe, add_ff_before=True) for moe in moes])
        self.reentrant = reentrant

    def forward(self, x):
        x, auxiliary = self.before(x), 0.0
        for block in self.blocks:
            if self.reentrant is None:
                x, loss, *_ = block(x)
            else:
                x, loss, *_ = checkpoint(block, x, use_reentrant=self.reentrant)
            auxiliary = auxiliary + loss
        return x, auxiliary


def stack(num_experts, **options):
    torch.manual_seed(5)
    return Stack(num_experts, **options).double()


def tokens(rank, step=0):
    """Tokens and cotangent of a rank in a step: other numbers on every rank, none on rank 1."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    shape = (2, 0, DIM) if rank == 1 else (1 + rank % 2, 4 + rank, DIM)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64)


def loss_of(model, rank, step=0):
    x, cotangent = tokens(rank, step)
    torch.manual_seed(1000 * step + rank)  # the same draws for a rank's tokens wherever they are routed
    outputs, auxiliary = model(x)
    return (outputs * cotangent).sum() + auxiliary


def train_one_process(model, ranks, steps=3, micro=1, optimizer=None):
    """AdamW with clipping on the mean of all ranks' losses, taken in turn by one process -> norms before clipping."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(micro):
            (sum(loss_of(model, rank, step * micro + part) for rank in range(ranks)) / ranks).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
    return model, norms


def relative_error(got, expected):
    """max |got - expected| / max |expected|, infinite for NaN."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if got.numel() == 0:
        return 0.0
    error = (got - expected).abs().max() / (expected.abs().max() if expected.any() else 1)
    return float("inf") if error.isnan() else error.item()


def largest_error(model, expected, of=lambda parameter: parameter.grad):
    """Over the parameters that a rank has, by name."""
    expected = dict(expected.named_parameters())
    errors = {name: relative_error(of(p).detach(), of(expected[name]).detach()) for name, p in model.named_parameters()}
    return max(errors.items(), key=lambda item: item[1])
