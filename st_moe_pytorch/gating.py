"""Top-n gating: which experts each token goes to, with what weight, and whether it gets there."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from st_moe_pytorch.checks import (
    check_counts,
    check_draws,
    check_one_of,
    check_positive,
    check_thresholds,
    refuse_old_pickle,
    typechecked,
)
from st_moe_pytorch.gate import Gate
from st_moe_pytorch.losses import balance_loss, router_z_loss
from st_moe_pytorch.routing import Choices, Routing, assign_slots
from st_moe_pytorch.topk import TopK, topk

Policy = Literal["all", "none", "threshold", "random"]
Priority = Literal["position", "token", "gate"]
Score = Literal["softmax", "sigmoid"]


class TopNGating(Gate):
    """Top-n gating of ST-MoE (Zoph et al. 2022, section 2) with the routing rules of Google's Mesh-TensorFlow code.

    1. logits = to_gates(x), probabilities = softmax(logits), in float32 whatever the dtype of x (float64 for float64)
    2. each token chooses its ``top_n`` most probable experts, ties to the lowest index; its gates are those
       probabilities over their sum
    3. a policy says which choices after the first are asked for
    4. what is asked for queues for the expert's slots, in order of ``priority``; beyond capacity it is dropped
    5. in training, the balance loss and the router z-loss are computed from all real tokens, routed or not

    Arguments:
        dim, num_gates: width of a token and number of experts.
        eps: added to the sum that gates are divided by; lower bound of a threshold.
        top_n: choices of a token. 1 is Switch routing: the gate is the raw probability.
        threshold_train, threshold_eval: threshold in [0, 1] for choices after the first, one for all or one each.
        capacity_factor_train, capacity_factor_eval: slots of an expert, times tokens / experts. None drops nothing.
        straight_through_dispatch_tensor: dispatched tokens carry a gradient to their gate, as if it scaled them.
        differentiable_topk: gates are the selections of coordinate descent (CoLT5, Ainslie et al. 2023).
        differentiable_topk_fused: recompute its iterates in the backward pass instead of keeping them.
        policy_train, policy_eval: "all" asks for every choice, "none" for the first only, "threshold" for gates above
            the threshold, "random" for a gate g with probability g / threshold.
        min_expert_capacity: least number of slots of an expert in a group.
        group_size: tokens that share a capacity, regrouped over sequences; None: a sequence is a group.
        priority: "position" serves all first choices in token order, then all second ones, and so on, as the paper
            does. "token" serves all choices of a token before those of the next one, so that no output depends on later
            tokens: for autoregressive training. "gate" serves the most certain tokens first (batch-prioritised routing,
            Riquelme et al. 2021), which is not causal.
        second_place_loss: add half the balance loss of the second choices, as Mesh-TensorFlow's top-2 gating can.
        score: "softmax" of the logits or, for each expert by itself, "sigmoid" (DeepSeek-V3, 2024), which the balance
            loss divides by its sum over experts.
        normalize_gates: divide gates by their sum for top_n > 1. Without, they are the scores, as of OLMoE and
            Qwen2-MoE.
        balance_bias: choose experts by score + ``bias``, with gates from the score alone (Wang et al. 2024). bias (e)
            is a buffer of zeros that no forward changes; `LossFreeBalance` does.
        jitter: as in `Gate`.

    Thresholds (as buffers ``[eps, t_1, ...]``), capacity factors and policies are read in every forward and may be
    assigned at any time.
    """

    @typechecked
    def __init__(
        self,
        dim: int,
        num_gates: int,
        eps: float = 1e-9,
        top_n: int = 2,
        threshold_train: float | Sequence[float] = 0.2,
        threshold_eval: float | Sequence[float] = 0.2,
        capacity_factor_train: float | None = 1.25,
        capacity_factor_eval: float | None = 2.0,
        straight_through_dispatch_tensor: bool = True,
        differentiable_topk: bool = False,
        differentiable_topk_fused: bool = True,
        *,
        policy_train: Policy = "random",
        policy_eval: Policy = "threshold",
        min_expert_capacity: int = 4,
        group_size: int | None = None,
        priority: Priority = "position",
        second_place_loss: bool = False,
        score: Score = "softmax",
        normalize_gates: bool = True,
        balance_bias: bool = False,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(dim, num_gates, group_size=group_size, jitter=jitter)
        check_positive(eps=eps)
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
        self.priority = priority
        self.second_place_loss = second_place_loss
        self.score = score
        self.normalize_gates = normalize_gates
        self.bias = nn.Buffer(torch.zeros(num_gates, dtype=torch.float32)) if balance_bias else None
        self._check_settings()

        self._built_with = {
            "threshold_train": self._thresholds("threshold_train", threshold_train),
            "threshold_eval": self._thresholds("threshold_eval", threshold_eval),
        }
        self.threshold_train = nn.Buffer(torch.tensor(self._built_with["threshold_train"]))
        self.threshold_eval = nn.Buffer(torch.tensor(self._built_with["threshold_eval"]))
        self.zero = nn.Buffer(torch.zeros(1), persistent=False)
        self.register_load_state_dict_pre_hook(refuse_other_top_n)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Thresholds as they were constructed, and no bias."""
        nn.init.zeros_(self.zero)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        for name, values in self._built_with.items():
            # through nn.init, which loaders such as transformers' pass over for what a checkpoint has brought
            threshold = nn.init.constant_(getattr(self, name), torch.nan)
            threshold.copy_(torch.where(threshold.isnan(), threshold.new_tensor(values), threshold))

    def decide(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        draws: Tensor | None = None,
        noised: Tensor | None = None,
        choices: Choices | None = None,
    ) -> Routing:
        """Where tokens with these logits (b n e) go. As of `Gate.decide`; the draws of first choices are ignored."""
        self._check_settings()
        b, n, e = logits.shape
        k = self.top_n
        groups = self.groups(b, n)
        if draws is not None:
            check_draws(draws, (b, n, k), (*groups, k))
        real = None if mask is None else mask.reshape(groups)
        clean = logits.reshape(*groups, e)
        scores = self.scores(clean if noised is None else noised.reshape(*groups, e))
        choices = None if choices is None else choices.fitted((b, n, k), e, groups)
        best = self.topk(scores, k=k) if choices is None else self.topk(scores, k=k, indices=choices.indices)
        gates = self._normalised(best)
        asked = self._asked(gates.detach(), real, draws)  # in a replay too, so that later draws are those of a free run
        if choices is None:
            first = best.values[..., 0]
            order = first.argsort(dim=1, descending=True, stable=True) if self.priority == "gate" else None
            slots = assign_slots(best.indices, asked, e, order, by_token=self.priority == "token")
            capacity = self.capacity(groups[1])
            kept = asked & (slots < capacity)
        else:
            asked, slots, capacity = choices.asked, choices.slots, choices.capacity
            asked = asked if real is None else asked & real.unsqueeze(-1)
            kept = asked & (slots >= 0)
        balance, z = self._losses(clean, scores, best.indices, real)
        per_choice = best.indices, slots.masked_fill(~kept, -1), gates, kept, asked
        indices, slots, gates, kept, asked = (t.view(b, n, k) for t in per_choice)
        through = self.straight_through_dispatch_tensor
        return Routing(indices, slots, gates, kept, asked, mask, logits, balance, z, capacity, e, groups, through)

    @property
    def balance_bias(self) -> bool:
        return self.bias is not None

    def topk(self, values: Tensor, k: int, indices: Tensor | None = None) -> TopK:
        """The k best of values (b n e), or those at indices (b n k), differentiable if the gate is."""
        is_fused = self.differentiable_topk_fused
        return topk(values, k, self.bias, indices, differentiable=self.differentiable_topk, fused=is_fused)

    def scores(self, logits: Tensor) -> Tensor:
        """Scores (b n e) by which experts are chosen, but for the bias, of logits (b n e)."""
        return logits.softmax(dim=-1) if self.score == "softmax" else logits.sigmoid()

    def _normalised(self, best: TopK) -> Tensor:
        gates = best.values if best.coor_descent_values is None else best.coor_descent_values
        is_raw = self.top_n == 1 or not self.normalize_gates
        return gates if is_raw else gates / (gates.sum(dim=-1, keepdim=True) + self.eps)

    def _asked(self, gates: Tensor, mask: Tensor | None, draws: Tensor | None) -> Tensor:
        """Which choices (b n k) the policy asks for: the first of every real token, and later ones by their gate."""
        policy = self.policy_train if self.training else self.policy_eval
        threshold = self.threshold_train if self.training else self.threshold_eval
        check_thresholds(threshold, self.top_n, "threshold_train" if self.training else "threshold_eval")
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

    def _losses(self, logits: Tensor, scores: Tensor, indices: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Balance loss and router z-loss, both 0 in evaluation."""
        if not self.training:
            return logits.new_zeros(()), logits.new_zeros(())
        probs = scores if self.score == "softmax" else scores / scores.sum(dim=-1, keepdim=True)
        balance = balance_loss(probs, indices[..., 0], mask)
        if self.second_place_loss:
            rest = probs.scatter(-1, indices[..., :1], 0.0)
            rest = rest / (rest.sum(dim=-1, keepdim=True) + self.eps)
            balance = balance + 0.5 * balance_loss(rest, indices[..., 1], mask)
        return balance, router_z_loss(logits, mask)

    def _check_settings(self) -> None:
        """Raise ValueError for settings that mean nothing, whether constructed or assigned later."""
        check_counts(top_n=self.top_n)
        self.check_capacity()
        check_one_of(get_args(Policy), policy_train=self.policy_train, policy_eval=self.policy_eval)
        check_one_of(get_args(Priority), priority=self.priority)
        check_one_of(get_args(Score), score=self.score)
        if self.bias is not None and self.differentiable_topk:
            raise ValueError("differentiable_topk must be False with balance_bias: coordinate descent knows none")
        if self.top_n > self.num_gates:
            chosen = f"{self.top_n} of {self.num_gates}; in MoE it is called gating_top_n"
            raise ValueError(f"top_n must be at most the number of experts: a token cannot choose {chosen}")
        if self.second_place_loss and self.top_n < 2:
            raise ValueError(f"second_place_loss needs a second choice: set top_n to at least 2, got {self.top_n}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        refuse_old_pickle(self, state, "policy_train")
        super().__setstate__(state)

    def extra_repr(self) -> str:
        settings = {name: getattr(self, name) for name in signature(TopNGating).parameters}
        settings |= {name: [round(t, 4) for t in getattr(self, name).tolist()[1:]] for name in self._built_with}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())

    def _thresholds(self, name: str, given: Any) -> list[float]:
        """Numbers ``[eps, t_1, ...]`` for thresholds given as a number or as one for each choice after the first."""
        try:
            later = [float(threshold) for threshold in given]
        except TypeError:  # 0-d tensors and arrays have an __iter__ too
            later = [float(given)] * (self.top_n - 1)
        if len(later) != self.top_n - 1:
            wanted = f"a number or {self.top_n - 1} numbers, one per choice after the first"
            raise ValueError(f"{name} must be {wanted}, got {given}")
        if not all(0 <= t <= 1 for t in later):
            raise ValueError(f"{name} must lie in [0, 1], got {given}")
        return [float(self.eps), *later]


def refuse_other_top_n(gate: TopNGating, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Hook of load_state_dict that refuses a checkpoint of another top_n before anything of it is copied."""
    for name in ("threshold_train", "threshold_eval"):
        theirs = state_dict.get(prefix + name)
        if theirs is not None and theirs.shape != (gate.top_n,):
            raise RuntimeError(
                f"{prefix}{name} of the state_dict has shape {tuple(theirs.shape)}, so its top_n is {theirs.numel()}, "
                f"but this gate was built with top_n={gate.top_n}: build it with top_n={theirs.numel()}"
            )
