"""The sparse layer and the block that puts dense feed-forwards around it.

Axes: b batch, n tokens, d width, e experts, c slots, t rows.
"""

import warnings
from collections.abc import Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from einops import einsum
from torch import Tensor, nn

from st_moe_pytorch.checks import check_counts, check_finite, check_noise, check_tokens, is_overridden, typechecked
from st_moe_pytorch.compat import name_exported_tuple
from st_moe_pytorch.experts import Experts
from st_moe_pytorch.gate import Gate, Routed, is_dense, refuse_misfit, replayed, tell
from st_moe_pytorch.gating import TopNGating
from st_moe_pytorch.layers import Expert, RMSNorm, dense_copies
from st_moe_pytorch.routing import Choices, DenseRouting, Routing, without_autocast


class MixtureOfExpertsReturn(NamedTuple):
    """Outputs of x's shape and dtype, and three 0-d losses, all 0 in evaluation.

    total_aux_loss is the weighted sum of the other two.
    """

    outputs: Tensor
    total_aux_loss: Tensor
    balance_loss: Tensor
    router_z_loss: Tensor


name_exported_tuple(MixtureOfExpertsReturn, "st_moe_pytorch.MixtureOfExpertsReturn")


class MoE(Routed[MixtureOfExpertsReturn]):
    """Sparse mixture-of-experts layer of ST-MoE (Zoph et al. 2022), in place of a transformer's feed-forward.

    1. ``gate.route`` chooses experts for every token
    2. the chosen tokens are copied into rows sorted by expert (`Routing.dispatch`)
    3. each expert runs on its own
    4. the results are weighted by the gates and summed back into their tokens (`Routing.combine`)

    Arguments:
        dim, num_experts: width of a token and number of experts.
        expert_hidden_mult: hidden width of the default experts, as in `Expert`.
        threshold_train to gating_top_n, straight_through_dispatch_tensor to differentiable_topk_fused: as in
            `TopNGating`.
        balance_loss_coef, router_z_loss_coef: weights of the two losses in the total.
        experts: the experts, as modules (1, t, dim) -> (1, t, d') or as built `Experts`, instead of default ones.
        is_distributed, allow_var_seq_len: as in `Experts`.
        gate: a built `Gate`, or any module with its ``route``, which then decides all that concerns routing.
        shared_expert: a module (b, n, dim) -> (b, n, d') whose results are added for every real token (DeepSeekMoE, Dai
            et al. 2024).

    ``experts`` may be replaced by any module that maps slots (b e c d) to (b e c d'). A gate with hooks or with another
    ``forward`` than `Gate`'s is called, and its dense tensors decide, at quadratic cost.
    """

    @typechecked
    def __init__(
        self,
        dim: int,
        num_experts: int = 16,
        expert_hidden_mult: float = 4,
        threshold_train: float | Sequence[float] = 0.2,
        threshold_eval: float | Sequence[float] = 0.2,
        capacity_factor_train: float | None = 1.25,
        capacity_factor_eval: float | None = 2.0,
        gating_top_n: int = 2,
        balance_loss_coef: float = 1e-2,
        router_z_loss_coef: float = 1e-3,
        experts: Experts | nn.ModuleList | nn.Sequential | Sequence[nn.Module] | None = None,
        straight_through_dispatch_tensor: bool = True,
        differentiable_topk: bool = False,
        differentiable_topk_fused: bool = True,
        is_distributed: bool | None = None,
        allow_var_seq_len: bool = False,
        *,
        gate: nn.Module | None = None,
        shared_expert: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, num_experts=num_experts)
        self.dim = dim
        self.num_experts = num_experts
        check_finite(balance_loss_coef=balance_loss_coef, router_z_loss_coef=router_z_loss_coef)
        self.balance_loss_coef = balance_loss_coef
        self.router_z_loss_coef = router_z_loss_coef
        gating = {
            "top_n": gating_top_n,
            "threshold_train": threshold_train,
            "threshold_eval": threshold_eval,
            "capacity_factor_train": capacity_factor_train,
            "capacity_factor_eval": capacity_factor_eval,
            "straight_through_dispatch_tensor": straight_through_dispatch_tensor,
            "differentiable_topk": differentiable_topk,
            "differentiable_topk_fused": differentiable_topk_fused,
        }
        if gate is None:
            gate = TopNGating(dim, num_experts, **gating)
        else:
            usual = signature(TopNGating).parameters
            changed = [name for name, value in gating.items() if value != usual[name].default]
            refuse_misfit(gate, dim, num_experts, changed)
        self.gate: Gate = gate  # pyright: ignore[reportAttributeAccessIssue] - or a module with its route
        if experts is None:
            experts = [Expert(dim, expert_hidden_mult) for _ in range(num_experts)]
        if not isinstance(experts, Experts):
            experts = Experts(experts, is_distributed, allow_var_seq_len)
        if experts.num_experts != num_experts:
            raise ValueError(f"experts must hold num_experts={num_experts} modules, got {experts.num_experts}")
        self.experts: Experts = experts
        self.shared_expert = shared_expert

    @classmethod
    def from_dense(
        cls,
        ffn: nn.Module,
        dim: int,
        num_experts: int = 16,
        *,
        noise: float = 0.0,
        gate: nn.Module | None = None,
        **arguments: Any,
    ) -> "MoE":
        """Sparse upcycling (Komatsuzaki et al. 2022): layer whose experts start as copies of a trained ffn (..., dim).

        By default nothing is dropped, every choice is asked for, so that gates sum to 1, and tokens sent to experts
        carry no gradient to their gate: the layer starts by computing what ffn does, with its gradients. Capacities, a
        gate of another policy or top_n = 1, whose gate is not normalised, change that; so does ``noise``, the standard
        deviation of what is added to every parameter of every copy, as a multiple of the parameter's own. Other
        arguments as of `MoE` and of `TopNGating`.
        """
        if gate is None:
            names = signature(TopNGating).parameters
            # eps so small that gates sum to 1 in float64 too
            settings: dict[str, Any] = {"eps": 1e-20, "policy_train": "all", "policy_eval": "all"}
            settings |= {"straight_through_dispatch_tensor": False}
            if {"top_n", "gating_top_n"} <= arguments.keys():
                raise ValueError("top_n and gating_top_n must not both be given: they are the same")
            top_n = arguments.pop("gating_top_n", 2)
            settings |= {"capacity_factor_train": None, "capacity_factor_eval": None, "top_n": top_n}
            settings |= {name: arguments.pop(name) for name in list(arguments) if name in names}
            gate = TopNGating(dim, num_experts, **settings)
        return cls(dim, num_experts, experts=dense_copies(ffn, num_experts, noise), gate=gate, **arguments)

    def forward(
        self,
        x: Tensor,
        noise_gates: bool = False,
        noise_mult: float = 1.0,
        *,
        mask: Tensor | None = None,
        route_by: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> MixtureOfExpertsReturn:
        """Run tokens x through the experts that the gate chooses for them.

        x: (b n d), or (n d), one group, or with more middle axes (b ... d), which together are the tokens of a group.
        noise_gates, noise_mult: add Gumbel noise to the routing.
        mask: bool of x's shape without the last axis, True for real tokens; the output of padding is 0.
        route_by: features of x's shape that the router looks at instead of x.
        draws: uniform numbers in [0, 1), of x's shape with k for the last axis, for a gate that draws.
        """
        check_noise(noise_gates, noise_mult)
        check_finite(balance_loss_coef=self.balance_loss_coef, router_z_loss_coef=self.router_z_loss_coef)
        check_tokens(x, self.dim, mask, route_by, draws)
        shape = x.shape
        x = _grouped(x, len(shape))
        tensors = given_only(mask=mask, route_by=route_by, draws=draws)
        given: dict[str, Any] = {name: _grouped(t, len(shape)) for name, t in tensors.items()}
        if is_dense(self.gate):
            decision = self.gate(x, noise_gates=noise_gates, noise_mult=noise_mult, **given)
            outputs, balance, z = self._by_dense_tensors(x, given.get("mask"), decision)
        else:
            given |= given_only(choices=replayed(self, x, given.get("mask")))
            routing = tell(self, self.gate.route(x, noise_gates, noise_mult, **given))
            outputs, balance, z = self._by_routing(x, routing), routing.balance_loss, routing.router_z_loss
        if self.shared_expert is not None:
            outputs = outputs + self._shared(x, given.get("mask"), outputs.shape)
        outputs = outputs.to(x.dtype).reshape(*shape[:-1], outputs.shape[-1])
        total = balance * self.balance_loss_coef + z * self.router_z_loss_coef
        return MixtureOfExpertsReturn(outputs, total, balance, z)

    def extra_repr(self) -> str:
        losses = f"balance_loss_coef={self.balance_loss_coef}, router_z_loss_coef={self.router_z_loss_coef}"
        return f"{self.dim}, num_experts={self.num_experts}, {losses}"

    def _by_routing(self, x: Tensor, routing: Routing) -> Tensor:
        """(b n d) -> (b n d'), at a cost linear in n."""
        is_foreign = not isinstance(self.experts, Experts) or is_overridden(self.experts, Experts)
        layout = routing.buffers() if is_foreign else self.experts.layout(routing)
        rows = routing.dispatch(x, layout)
        if layout.buffers is None:
            y = self.experts(rows, layout.offsets)
        else:
            y = layout.join(self.experts(layout.split(rows)))
        # a shared expert's results are added before anything is rounded
        return routing.combine(y, layout, x.dtype if self.shared_expert is None else None)

    def _shared(self, x: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
        """(b n d) -> (b n d') by the shared expert, 0 for padding, which it does not see."""
        assert self.shared_expert is not None
        padding = None if mask is None else ~mask.unsqueeze(-1)
        y = self.shared_expert(x if padding is None else x.masked_fill(padding, 0.0))
        if y.shape != shape:
            wanted = f"the shape of the experts' results, {tuple(shape)}"
            raise ValueError(f"shared_expert must return {wanted}, got {tuple(y.shape)}")
        return y if padding is None else y.masked_fill(padding, 0.0)

    def _by_dense_tensors(
        self, x: Tensor, mask: Tensor | None, decision: DenseRouting
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(b n d) -> (b n d') by the tensors of an overridden gate: the definition of the layer, quadratic in n."""
        if not torch.compiler.is_compiling():
            warnings.warn(
                "the gate's forward is overridden or hooked, so routing goes through its dense tensors, at a "
                "cost quadratic in the number of tokens; assign or wrap gate.route instead to keep it linear",
                stacklevel=3,
            )
        dispatch, combine, *losses = decision
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        groups = x.reshape(*dispatch.shape[:2], self.dim)
        with without_autocast(x):
            slots = einsum(groups, dispatch.to(x.dtype), "b n d, b n e c -> b e c d")
        slots = self.experts(slots)
        with without_autocast(x):
            outputs = einsum(slots.to(combine.dtype), combine, "b e c d, b n e c -> b n d")
        balance, z = (loss.squeeze() for loss in losses)
        return outputs.reshape(*x.shape[:2], outputs.shape[-1]), balance, z


class SparseMoEBlock(Routed[MixtureOfExpertsReturn]):
    """A sparse layer with residual, normalised input and dense feed-forwards around it.

    ST-MoE found this to help (appendix C).

    ``x = ff_before(x) + x;  x = moe(norm(x)) + x;  x = ff_after(x) + x``, where the feed-forwards normalise their own
    input.
    """

    @typechecked
    def __init__(self, moe: MoE, *, add_ff_before: bool = False, add_ff_after: bool = True) -> None:
        super().__init__()
        self.moe = moe
        self.moe_prenorm = RMSNorm(moe.dim)
        self.ff_before = Expert(moe.dim, prenorm=True) if add_ff_before else None
        self.ff_after = Expert(moe.dim, prenorm=True) if add_ff_after else None

    def forward(
        self,
        x: Tensor,
        noise_gates: bool = False,
        noise_mult: float = 1.0,
        *,
        mask: Tensor | None = None,
        route_by: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> MixtureOfExpertsReturn:
        """Arguments and results as of `MoE`, whose experts have to keep the width."""
        check_noise(noise_gates, noise_mult)
        check_tokens(x, self.moe.dim, mask, route_by, draws)
        if self.ff_before is not None:
            x = self.ff_before(x) + x
        given = given_only(mask=mask, route_by=route_by, draws=draws)
        routed, *losses = self.moe(self.moe_prenorm(x), noise_gates, noise_mult, **given)
        if routed.shape != x.shape:
            wanted = f"the width of {x.shape[-1]} in a block, which adds their output to x"
            raise ValueError(f"experts must keep {wanted}, got {routed.shape[-1]}")
        x = routed + x
        if self.ff_after is not None:
            x = self.ff_after(x) + x
        return MixtureOfExpertsReturn(x, *losses)


def _grouped(t: Tensor, ndim: int) -> Tensor:
    """Bring (n ...) to (1 n ...) and (b ... ...) to (b n ...); tokens have ``ndim`` axes, the last for features."""
    return t.unsqueeze(0) if ndim == 2 else t.flatten(1, ndim - 2)


def given_only(**arguments: Tensor | Choices | None) -> dict[str, Any]:
    """Those that are not None: what is written against 0.1.8 does not know the others' names."""
    return {name: argument for name, argument in arguments.items() if argument is not None}
