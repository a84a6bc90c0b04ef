"""Expert-choice gating: which tokens each expert picks, and with what weight."""

from inspect import signature

import torch
from torch import Tensor

from st_moe_pytorch.checks import typechecked
from st_moe_pytorch.gate import Gate
from st_moe_pytorch.losses import router_z_loss, token_balance_loss
from st_moe_pytorch.routing import Choices, Routing


class ExpertChoiceGating(Gate):
    """Experts pick tokens (Zhou et al. 2022, arXiv 2202.09368) by the rules of Google's Mesh-TensorFlow implementation.

    1. logits = to_gates(x), in float32 whatever the dtype of x (float64 for float64)
    2. an expert's probabilities are the softmax of its logits over the real tokens of a group (the paper: over experts)
    3. it picks as many real tokens as it has slots, the most probable ones, best first, ties to the lowest position
    4. a token's gates are the probabilities of the experts that picked it, from none to all of them, over their number
    5. in training, the balance loss (`token_balance_loss`) and the router z-loss are computed from all real tokens

    All experts get the same number of tokens and nothing is dropped; a token that no expert picks gets output 0. Each
    expert is a choice of each token, so that k is e, and choices that are not picked are not asked for. An expert's
    gates sum to at most 1 over a group: where groups are long, outputs are small.

    **Not causal:** whether a token is picked, and its gates, depend on later tokens of its group. Autoregressive models
    would see the future in training.

    Arguments:
        dim, num_gates: width of a token and number of experts.
        capacity_factor_train, capacity_factor_eval: slots of an expert, as a multiple of tokens / experts. It is how
            many experts see a token on average. None: every expert picks every token.
        min_expert_capacity: least number of slots of an expert in a group.
        straight_through_dispatch_tensor: dispatched tokens carry a gradient to their gate, which Mesh-TensorFlow
            does not have.
        group_size, jitter: as in `Gate`.

    Settings are read in every forward and may be assigned at any time.
    """

    @typechecked
    def __init__(
        self,
        dim: int,
        num_gates: int,
        *,
        capacity_factor_train: float | None = 1.25,
        capacity_factor_eval: float | None = 2.0,
        min_expert_capacity: int = 4,
        straight_through_dispatch_tensor: bool = False,
        group_size: int | None = None,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(dim, num_gates, group_size=group_size, jitter=jitter)
        self.capacity_factor_train = capacity_factor_train
        self.capacity_factor_eval = capacity_factor_eval
        self.min_expert_capacity = min_expert_capacity
        self.check_capacity()
        self.straight_through_dispatch_tensor = straight_through_dispatch_tensor

    def decide(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        draws: Tensor | None = None,
        noised: Tensor | None = None,
        choices: Choices | None = None,
    ) -> Routing:
        """Which experts pick the tokens with these logits (b n e). Arguments as of `Gate.decide`.

        Nothing is drawn, so draws are ignored, as by `TopNGating` where its policy draws nothing.
        """
        b, n, e = logits.shape
        groups = self.groups(b, n)
        capacity = self.capacity(groups[1])
        real = torch.ones(groups, dtype=torch.bool, device=logits.device) if mask is None else mask.reshape(groups)
        padding = ~real.unsqueeze(-1)
        clean = logits.reshape(*groups, e)
        wanted = clean if noised is None else noised.reshape(*groups, e)
        wanted = wanted.masked_fill(padding, torch.finfo(wanted.dtype).min)
        probs = wanted.softmax(dim=1)

        if choices is None:
            # by logits, which tell tokens apart, and padding, where probabilities underflow
            ranking = wanted.argsort(dim=1, descending=True, stable=True)
            rank = torch.arange(groups[1], device=ranking.device).view(1, -1, 1).expand_as(ranking)
            slots = torch.empty_like(ranking).scatter(1, ranking, rank)
            picked = (slots < capacity) & ~padding
            # of each token, first the choices that are picked, each part best first
            indices = torch.where(picked, probs, probs - 1).argsort(dim=-1, descending=True, stable=True)
            slots = slots.masked_fill(~picked, -1).gather(-1, indices)
        else:
            choices = choices.fitted((b, n, e), e, groups)
            indices, capacity, slots = choices.indices, choices.capacity, choices.slots.masked_fill(padding, -1)
        kept = slots >= 0
        gates = probs.gather(-1, indices) / kept.sum(dim=-1, keepdim=True).clamp(min=1)
        balance = token_balance_loss(probs, real) if self.training else logits.new_zeros(())
        z = router_z_loss(clean, real) if self.training else logits.new_zeros(())
        indices, slots, gates, kept = (t.view(b, n, e) for t in (indices, slots, gates, kept))
        through = self.straight_through_dispatch_tensor
        return Routing(indices, slots, gates, kept, kept, mask, logits, balance, z, capacity, e, groups, through)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in signature(ExpertChoiceGating).parameters)
