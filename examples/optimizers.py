"""The optimizers of the scripts."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

WEIGHT_DECAY = 0.1


def adamw(model: nn.Module, lr: float, without: Iterable[Tensor] = ()) -> Optimizer:
    """AdamW that decays matrices, but not norms, biases and embeddings."""
    left_out = set(map(id, without))
    matrices = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in left_out
    ]
    ids = left_out.union(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def muon_and_adamw(model: nn.Module, lr: float) -> list[Optimizer]:
    """Muon (Jordan 2024) for the matrices of attention and feed-forwards, AdamW for the rest.

    As usual, the rest includes routers and logits.
    """
    named = [(name, module.weight) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inner = [weight for name, weight in named if not name.endswith("to_gates") and not name.startswith("to_logits")]
    muon = torch.optim.Muon(inner, lr=lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw(model, lr, without=inner)]
