"""What the outputs of a layer depend on: later tokens, other rows of the batch, padding."""

from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Dependence(NamedTuple):
    """Which outputs (b n) moved when something that they should perhaps not depend on was changed."""

    on_later_tokens: Tensor
    on_other_rows: Tensor
    on_padding: Tensor

    def __str__(self) -> str:
        words = dict(zip(("later tokens", "other rows of the batch", "padding"), self, strict=True))
        lines = []
        for what, moved in words.items():
            places = [tuple(place) for place in moved.nonzero().tolist()]
            named = ", ".join(map(str, places[:5])) + (", ..." if len(places) > 5 else "")
            some = f"{len(places)} outputs depend on them: (row, token) {named}"
            lines.append(f"{what}: {some if places else 'no output depends on them'}")
        return "\n".join(lines)


@torch.no_grad()
def audit_dependence(
    layer: nn.Module, x: Tensor, mask: Tensor | None = None, seed: int = 0, tolerance: float = 1e-9
) -> Dependence:
    """Find a layer's outputs that depend on later tokens, on other rows of the batch or on padding, by changing those.

    layer: a module (b n d) -> outputs (b n d'), alone or first of a tuple, such as `MoE` or a `SparseMoEBlock`, as its
        mode is. A copy of it runs in float64, with the same random numbers each time, about 2 (n + b) times.
    x (b n d), mask (b n) True for real tokens. tolerance: change that counts as none, relative to the largest output.

    Changed tokens become others of the batch, then random ones. What moves, depends; what does not move might still, on
    other inputs.
    """
    layer, x = deepcopy(layer).double(), x.double()
    if x.ndim != 3:
        raise ValueError(f"x must have shape (batch, tokens, width), got {tuple(x.shape)}")
    b, n, _ = x.shape
    real = torch.ones(b, n, dtype=torch.bool, device=x.device) if mask is None else mask
    if not real.any():
        raise ValueError(f"x must have real tokens to tell what their outputs depend on, got none in {tuple(x.shape)}")
    given = {} if mask is None else {"mask": mask}

    def run(inputs: Tensor) -> Tensor:
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            outputs = layer(inputs, **given)
        return outputs[0] if isinstance(outputs, tuple) else outputs

    usual = run(x)
    if not (x[real].isfinite().all() and usual[real].isfinite().all()):
        why = "since what becomes NaN depends on everything"
        raise ValueError(f"x and the outputs of its real tokens must be finite, {why}")
    generator = torch.Generator().manual_seed(seed)
    spread = x[real].std(correction=0).clamp(min=1e-3)
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) * spread
    tokens = x[real]
    others = tokens[torch.randint(len(tokens), (b, n), generator=generator)], noise

    def moved_by(changed: Tensor) -> Tensor:
        """Which outputs (b n) move when the tokens of ``changed`` (b n) become others."""
        moved = torch.zeros_like(real)
        for other in others:
            difference = (run(torch.where(changed.unsqueeze(-1), other, x)) - usual).abs().amax(dim=-1)
            moved |= ~(difference <= tolerance * usual[real].abs().max())
        return moved & ~changed & real

    position, row = (torch.arange(size, device=x.device) for size in (n, b))
    later, rows = torch.zeros_like(real), torch.zeros_like(real)
    for token in range(1, n):
        later |= moved_by((position >= token).expand(b, n))
    for number in range(b):
        rows |= moved_by((row != number).unsqueeze(-1).expand(b, n))
    return Dependence(later, rows, moved_by(~real))
