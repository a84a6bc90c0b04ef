"""References that share no code with the package: golden numbers, the loop specification, a layer token by token."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"


def golden_names(kind: str, *, experts_choose: bool = False) -> list[str]:
    """Cases of one kind ("gating" or "layer") of Mesh-TensorFlow, where tokens choose or experts do."""
    names = [path.stem for path in sorted((DATA / "golden").glob("*.npz"))]
    configs = {name: golden(name).config for name in names}
    return [
        name for name, c in configs.items() if c.kind == kind and (c.gating == "expert_selection") is experts_choose
    ]


@cache
def golden(name: str) -> SimpleNamespace:
    """A golden case: its arrays as tensors, and ``config``."""
    with np.load(DATA / "golden" / f"{name}.npz") as arrays:
        config = SimpleNamespace(**json.loads(str(arrays["config"])))
        return SimpleNamespace(
            config=config, **{key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "config"}
        )


def assignments(routing, group_shape: tuple[int, int] | None = None) -> list[list[list[tuple[int, int]]]]:
    """(expert, slot) of every kept choice, per group and token in order of rank, as the specification lists them."""
    groups, tokens = group_shape or routing.groups
    indices, slots, kept = (
        t.reshape(groups, tokens, -1).tolist() for t in (routing.indices, routing.slots, routing.kept)
    )
    return [
        [
            [(e, s) for e, s, is_kept in zip(*choices, strict=True) if is_kept]
            for choices in zip(indices[g], slots[g], kept[g], strict=True)
        ]
        for g in range(groups)
    ]


def layer_by_token(x: Tensor, routing, experts: Sequence[Callable[[Tensor], Tensor]], straight_through: bool) -> Tensor:
    """The layer's definition, ``out[n] = sum_k g_k * expert_{i_k}(x[n])`` over kept choices, one token at a time."""
    tokens = []
    for x_n, experts_n, gates_n, kept_n in zip(
        x.flatten(0, 1),
        routing.indices.flatten(0, 1),
        routing.gates.flatten(0, 1),
        routing.kept.flatten(0, 1),
        strict=True,
    ):
        total = torch.zeros_like(x_n)
        for expert, gate, kept in zip(experts_n.tolist(), gates_n, kept_n.tolist(), strict=True):
            if kept:
                scaled = x_n * (1 + gate - gate.detach()) if straight_through else x_n
                total = total + gate * experts[expert](scaled[None, None])[0, 0]
        tokens.append(total)
    return torch.stack(tokens).view_as(x)


def gradients(output: Tensor, cotangent: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of <output, cotangent>, zeros where there is no path."""
    found = torch.autograd.grad((output * cotangent).sum(), inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-12, *, may_vanish: bool = False) -> None:
    """Assert that the largest difference is at most ``rtol`` times the largest expected entry.

    The expected values must not be all tiny, or the test would be empty.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.isfinite().all()
    scale = expected.abs().max().item() if expected.numel() else 0.0
    assert may_vanish or scale > 1e-6, f"the reference is tiny: {scale}"
    error = (actual - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= rtol * max(scale, 1e-6), f"relative error {error / max(scale, 1e-6):.2e} > {rtol:.0e}"


class ReluExpert(nn.Module):
    """Two matrices with a ReLU between them, as in Mesh-TensorFlow's layer."""

    def __init__(self, wi: Tensor, wo: Tensor) -> None:
        super().__init__()
        self.wi, self.wo = nn.Parameter(wi.clone()), nn.Parameter(wo.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.wi).relu() @ self.wo
