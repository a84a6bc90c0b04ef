"""The router: which experts each token goes to, with what weight, and whether it gets there."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from st_moe_pytorch.checks import check_one_of, check_positive, check_tokens, typechecked
from st_moe_pytorch.losses import balance_loss, router_z_loss
from st_moe_pytorch.routing import DenseRouting, Routing, assign_slots, expert_capacity
from st_moe_pytorch.topk import TopK, topk

POLICIES = ("all", "none", "threshold", "random")
PRIORITIES = ("position", "gate")


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which autocast is off on x's device."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class RouterLinear(nn.Linear):
    """Linear without bias from tokens (... d) of any dtype to logits (... e), computed in float32 or, for float64 tokens, in float64."""

    def __init__(self, dim: int, num_gates: int) -> None:
        super().__init__(dim, num_gates, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        return F.linear(input.to(dtype), self.weight.to(dtype))


class TopNGating(nn.Module):
    """Top-n gating of ST-MoE (Zoph et al. 2022, section 2) with the routing rules of Google's Mesh-TensorFlow implementation.

    1. logits = to_gates(x), probabilities = softmax(logits), in float32 whatever the dtype of x (float64 for float64)
    2. each token chooses its ``top_n`` most probable experts, ties to the lowest index; its gates are those probabilities over their sum
    3. a policy says which choices after the first are asked for
    4. what is asked for queues for the expert's slots: first choices first, then in order of ``priority``; beyond capacity it is dropped
    5. in training, the balance loss and the router z-loss are computed from all real tokens, routed or not

    Arguments:
        dim, num_gates: width of a token and number of experts.
        eps: added to the sum that gates are divided by; lower bound of a threshold.
        top_n: choices of a token. 1 is Switch routing: the gate is the raw probability.
        threshold_train, threshold_eval: threshold in [0, 1] for choices after the first, one for all or one each.
        capacity_factor_train, capacity_factor_eval: slots of an expert, as a multiple of tokens / experts. None drops nothing.
        straight_through_dispatch_tensor: dispatched tokens carry a gradient to their gate, as if they were scaled by it.
        differentiable_topk: gates are the selections of coordinate descent (CoLT5, Ainslie et al. 2023).
        differentiable_topk_fused: recompute its iterates in the backward pass instead of keeping them.
        policy_train, policy_eval: "all" asks for every choice, "none" for the first only, "threshold" for gates above the threshold,
            "random" for a gate g with probability g / threshold.
        min_expert_capacity: least number of slots of an expert in a group.
        group_size: tokens that share a capacity, regrouped over sequences; None: a sequence is a group.
        priority: "position" serves tokens in order; "gate" the most certain first (batch-prioritised routing, Riquelme et al. 2021),
            which lets a token's place depend on later tokens, so it is not causal.
        second_place_loss: add half the balance loss of the second choices, as Mesh-TensorFlow's top-2 gating can.

    Thresholds (as buffers ``[eps, t_1, ...]``), capacity factors and policies are read in every forward and may be assigned at any time.
    """

    @typechecked
    def __init__(
        self,
        dim: int,
        num_gates: int,
        eps: float | int = 1e-9,
        top_n: int = 2,
        threshold_train: float | int | Sequence[float | int] = 0.2,
        threshold_eval: float | int | Sequence[float | int] = 0.2,
        capacity_factor_train: float | int | None = 1.25,
        capacity_factor_eval: float | int | None = 2.0,
        straight_through_dispatch_tensor: bool = True,
        differentiable_topk: bool = False,
        differentiable_topk_fused: bool = True,
        *,
        policy_train: str = "random",
        policy_eval: str = "threshold",
        min_expert_capacity: int = 4,
        group_size: int | None = None,
        priority: str = "position",
        second_place_loss: bool = False,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, num_gates=num_gates, eps=eps, top_n=top_n, min_expert_capacity=min_expert_capacity, group_size=group_size)
        check_positive(capacity_factor_train=capacity_factor_train, capacity_factor_eval=capacity_factor_eval)
        check_one_of(POLICIES, policy_train=policy_train, policy_eval=policy_eval)
        check_one_of(PRIORITIES, priority=priority)
        if top_n > num_gates:
            raise ValueError(f"top_n must be at most the number of experts: a token cannot choose {top_n} of {num_gates}")
        if second_place_loss and top_n < 2:
            raise ValueError(f"second_place_loss needs a second choice: set top_n to at least 2, got {top_n}")

        self.dim = dim
        self.num_gates = num_gates
        self.eps = eps
        self.top_n = top_n
        self.capacity_factor_train = capacity_factor_train
        self.capacity_factor_eval = capacity_factor_eval
        self.straight_through_dispatch_tensor = straight_through_dispatch_tensor
        self.differentiable_topk = differentiable_topk
        self.differentiable_topk_fused = differentiable_topk_fused
        self.policy_train = policy_train
        self.policy_eval = policy_eval
        self.min_expert_capacity = min_expert_capacity
        self.group_size = group_size
        self.priority = priority
        self.second_place_loss = second_place_loss

        self.to_gates = RouterLinear(dim, num_gates)
        self.threshold_train = nn.Buffer(self._thresholds("threshold_train", threshold_train))
        self.threshold_eval = nn.Buffer(self._thresholds("threshold_eval", threshold_eval))
        self.zero = nn.Buffer(torch.zeros(1), persistent=False)
        self.register_load_state_dict_pre_hook(refuse_other_top_n)

    def forward(
        self,
        x: Tensor,
        noise_gates: bool = False,
        noise_mult: float = 1.0,
        *,
        mask: Tensor | None = None,
        route_by: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> DenseRouting:
        """The routing of x (b n d) as dense tensors (b n e c). Arguments as in `route`."""
        routing = self.route(x, noise_gates, noise_mult, mask=mask, route_by=route_by, draws=draws)
        return DenseRouting(*routing.dense(), routing.balance_loss, routing.router_z_loss)

    def route(
        self,
        x: Tensor,
        noise_gates: bool = False,
        noise_mult: float = 1.0,
        *,
        mask: Tensor | None = None,
        route_by: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> Routing:
        """Decide where the tokens x (b n d) go.

        noise_gates adds Gumbel noise, times noise_mult, to the logits that are routed by; the z-loss stays that of the clean ones.
        mask (b n) is True for real tokens: padding asks for nothing and counts in no loss.
        route_by (b n d) is what the router looks at instead of x, such as word embeddings.
        draws (b n k), or by group, are uniform numbers in [0, 1) for the "random" policy instead of fresh ones; those of first choices
            are ignored.
        """
        check_tokens(x, self.dim, mask, route_by)
        if x.ndim != 3:
            raise ValueError(f"x must have shape (batch, tokens, {self.dim}) here, got {tuple(x.shape)}: add or flatten axes")
        b, n, _ = x.shape
        groups = self._groups(b, n)
        if draws is not None and draws.shape not in ((b, n, self.top_n), (*groups, self.top_n)):
            raise ValueError(f"draws must have shape {(b, n, self.top_n)}, a number for every choice, got {tuple(draws.shape)}")
        features = x if route_by is None else route_by
        if mask is not None:
            features = features.masked_fill(~mask.unsqueeze(-1), 0.0)
            mask = mask.reshape(groups)

        with without_autocast(x):
            logits = self.to_gates(features).to(torch.promote_types(x.dtype, torch.float32)).reshape(*groups, self.num_gates)
            probs = self._noised(logits, noise_mult if noise_gates else 0.0).softmax(dim=-1)
            best = self.topk(probs, k=self.top_n)
            gates = self._normalised(best)
            asked = self._asked(gates.detach(), mask, draws)
            order = best.values[..., 0].argsort(dim=1, descending=True, stable=True) if self.priority == "gate" else None
            slots = assign_slots(best.indices, asked, self.num_gates, order)
            capacity = self._capacity(groups[1])
            kept = asked & (slots < capacity)
            balance, z = self._losses(logits, probs, best.indices, mask)

        return Routing(
            indices=best.indices.view(b, n, self.top_n),
            slots=slots.masked_fill(~kept, -1).view(b, n, self.top_n),
            gates=gates.view(b, n, self.top_n),
            kept=kept.view(b, n, self.top_n),
            asked=asked.view(b, n, self.top_n),
            mask=None if mask is None else mask.view(b, n),
            logits=logits.view(b, n, self.num_gates),
            balance_loss=balance,
            router_z_loss=z,
            capacity=capacity,
            num_experts=self.num_gates,
            groups=groups,
            straight_through=self.straight_through_dispatch_tensor,
        )

    def topk(self, values: Tensor, k: int) -> TopK:
        """The k best of values (b n e) along the last axis, differentiable if the gate is."""
        return topk(values, k, differentiable=self.differentiable_topk, fused=self.differentiable_topk_fused)

    def _groups(self, b: int, n: int) -> tuple[int, int]:
        """Number and size of the groups that b sequences of n tokens form; ``group_size`` is met as Mesh-TensorFlow does, by a divisor."""
        if self.group_size is None:
            return b, n
        groups = max(1, b * n // self.group_size)
        while b * n % groups:
            groups += 1
        size = b * n // groups
        if groups > 1 and 2 * size < self.group_size:
            warnings.warn(
                f"group_size={self.group_size} does not divide the {b * n} tokens of this batch well: groups have {size} tokens. "
                "Choose batch and sequence lengths whose product has a divisor near group_size",
                stacklevel=3,
            )
        return groups, size

    def _capacity(self, tokens: int) -> int:
        factor = self.capacity_factor_train if self.training else self.capacity_factor_eval
        return expert_capacity(tokens, self.num_gates, factor, self.min_expert_capacity)

    def _noised(self, logits: Tensor, noise_mult: float) -> Tensor:
        """Logits plus Gumbel noise times noise_mult: -log of an exponential draw."""
        return logits - noise_mult * torch.empty_like(logits).exponential_().log() if noise_mult else logits

    def _normalised(self, best: TopK) -> Tensor:
        gates = best.values if best.coor_descent_values is None else best.coor_descent_values
        return gates if self.top_n == 1 else gates / (gates.sum(dim=-1, keepdim=True) + self.eps)

    def _asked(self, gates: Tensor, mask: Tensor | None, draws: Tensor | None) -> Tensor:
        """Which choices (b n k) the policy asks for: the first of every real token, and later ones by their gate."""
        policy = self.policy_train if self.training else self.policy_eval
        threshold = self.threshold_train if self.training else self.threshold_eval
        check_one_of(POLICIES, policy=policy)
        if policy == "threshold":
            asked = gates > threshold
        elif policy == "random" and self.top_n > 1:
            draws = torch.rand_like(gates) if draws is None else draws.reshape(gates.shape)
            asked = draws < gates / threshold.clamp(min=self.eps)
        else:
            asked = torch.full_like(gates, policy == "all", dtype=torch.bool)
        first = torch.arange(self.top_n, device=gates.device) == 0
        asked = asked | first
        return asked if mask is None else asked & mask.unsqueeze(-1)

    def _losses(self, logits: Tensor, probs: Tensor, indices: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Balance loss and router z-loss, both 0 in evaluation."""
        if not self.training:
            return logits.new_zeros(()), logits.new_zeros(())
        balance = balance_loss(probs, indices[..., 0], mask)
        if self.second_place_loss:
            rest = probs.scatter(-1, indices[..., :1], 0.0)
            rest = rest / (rest.sum(dim=-1, keepdim=True) + self.eps)
            balance = balance + 0.5 * balance_loss(rest, indices[..., 1], mask)
        return balance, router_z_loss(logits, mask)

    def _thresholds(self, name: str, given: float | Sequence[float]) -> Tensor:
        """The buffer ``[eps, t_1, ...]`` for thresholds given as a number or as one for each choice after the first."""
        later = tuple(given) if isinstance(given, Sequence) else (given,) * (self.top_n - 1)
        if len(later) != self.top_n - 1:
            raise ValueError(f"{name} must be a number or {self.top_n - 1} numbers, one per choice after the first, got {given}")
        if not all(0 <= t <= 1 for t in later):
            raise ValueError(f"{name} must lie in [0, 1], got {given}")
        return torch.tensor([self.eps, *later])


def refuse_other_top_n(gate: TopNGating, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Hook of load_state_dict that refuses a checkpoint of another top_n before anything of it is copied."""
    for name in ("threshold_train", "threshold_eval"):
        theirs = state_dict.get(prefix + name)
        if theirs is not None and theirs.shape != (gate.top_n,):
            raise RuntimeError(
                f"{prefix}{name} of the state_dict has shape {tuple(theirs.shape)}, so its top_n is {theirs.numel()}, "
                f"but this gate was built with top_n={gate.top_n}: build it with top_n={theirs.numel()}"
            )
