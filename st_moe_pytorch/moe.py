"""The sparse layer and the block that puts dense feed-forwards around it. Axes: b batch, n tokens, d width, e experts, c slots, t rows."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import einsum
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from st_moe_pytorch.checks import check_positive, check_tokens, typechecked
from st_moe_pytorch.experts import Expert, Experts, RMSNorm, has_hooks
from st_moe_pytorch.gating import TopNGating
from st_moe_pytorch.routing import DenseRouting, Routing
from st_moe_pytorch.upcycle import dense_copies


class MixtureOfExpertsReturn(NamedTuple):
    """Outputs of x's shape and dtype, and three 0-d losses: total is the weighted sum of the other two. All are 0 in evaluation."""

    outputs: Tensor
    total_aux_loss: Tensor
    balance_loss: Tensor
    router_z_loss: Tensor


# so that torch.export.save knows what to call it
_register_namedtuple(MixtureOfExpertsReturn, serialized_type_name="st_moe_pytorch.MixtureOfExpertsReturn")


class MoE(nn.Module):
    """Sparse mixture-of-experts layer of ST-MoE (Zoph et al. 2022), in place of a transformer's feed-forward.

    1. ``gate.route`` chooses experts for every token
    2. the chosen tokens are copied into rows sorted by expert, or into slots of fixed size (`Routing`)
    3. each expert runs on its own
    4. the results are weighted by the gates and summed back into their tokens

    Rows compute nothing but what was routed, but their number depends on the data: they serve eager mode on CPU. Slots have static shapes:
    they serve compilation, export, accelerators and foreign ``experts`` modules that map (b e c d) -> (b e c d').

    Arguments:
        dim, num_experts: width of a token and number of experts.
        expert_hidden_mult: hidden width of the default experts, as in `Expert`.
        threshold_train to gating_top_n, straight_through_dispatch_tensor to differentiable_topk_fused: as in `TopNGating`.
        balance_loss_coef, router_z_loss_coef: weights of the two losses in the total.
        experts: the experts, as modules (1, t, dim) -> (1, t, d') or as built `Experts`, instead of default ones.
        is_distributed, allow_var_seq_len: as in `Experts`.
        gate: a built gate, which then decides all that concerns routing.

    A gate with hooks or with another ``forward`` than `TopNGating`'s is called, and its dense tensors decide, at quadratic cost.
    """

    @typechecked
    def __init__(
        self,
        dim: int,
        num_experts: int = 16,
        expert_hidden_mult: float | int = 4,
        threshold_train: float | int | Sequence[float | int] = 0.2,
        threshold_eval: float | int | Sequence[float | int] = 0.2,
        capacity_factor_train: float | int | None = 1.25,
        capacity_factor_eval: float | int | None = 2.0,
        gating_top_n: int = 2,
        balance_loss_coef: float | int = 1e-2,
        router_z_loss_coef: float | int = 1e-3,
        experts: Experts | nn.ModuleList | Sequence[nn.Module] | None = None,
        straight_through_dispatch_tensor: bool = True,
        differentiable_topk: bool = False,
        differentiable_topk_fused: bool = True,
        is_distributed: bool | None = None,
        allow_var_seq_len: bool = False,
        *,
        gate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, num_experts=num_experts)
        self.dim = dim
        self.num_experts = num_experts
        self.balance_loss_coef = balance_loss_coef
        self.router_z_loss_coef = router_z_loss_coef
        if gate is None:
            gate = TopNGating(
                dim,
                num_experts,
                top_n=gating_top_n,
                threshold_train=threshold_train,
                threshold_eval=threshold_eval,
                capacity_factor_train=capacity_factor_train,
                capacity_factor_eval=capacity_factor_eval,
                straight_through_dispatch_tensor=straight_through_dispatch_tensor,
                differentiable_topk=differentiable_topk,
                differentiable_topk_fused=differentiable_topk_fused,
            )
        for name, needed in (("dim", dim), ("num_gates", num_experts)):
            if (got := getattr(gate, name, needed)) != needed:
                raise ValueError(f"gate.{name} must be {needed} in MoE(dim={dim}, num_experts={num_experts}), got {got}")
        self.gate: Any = gate
        if experts is None:
            experts = [Expert(dim, expert_hidden_mult) for _ in range(num_experts)]
        if not isinstance(experts, Experts):
            experts = Experts(experts, is_distributed, allow_var_seq_len)
        if experts.num_experts != num_experts:
            raise ValueError(f"experts must hold num_experts={num_experts} modules, got {experts.num_experts}")
        self.experts: Any = experts

    @classmethod
    def from_dense(cls, ffn: nn.Module, dim: int, num_experts: int = 16, *, noise: float = 0.0, **arguments: Any) -> "MoE":
        """Sparse upcycling (Komatsuzaki et al. 2022): a layer whose experts start as copies of a trained feed-forward (..., dim).

        By default nothing is dropped and every choice is asked for, so that gates sum to 1 and the layer starts by computing what ffn does.
        Capacities, a gate of another policy or top_n = 1, whose gate is not normalised, change that; so does ``noise`` (`dense_copies`).
        Other arguments as of `MoE`.
        """
        arguments = {"capacity_factor_train": None, "capacity_factor_eval": None} | arguments
        moe = cls(dim, num_experts, experts=dense_copies(ffn, num_experts, noise), **arguments)
        if "gate" not in arguments:
            moe.gate.policy_train = moe.gate.policy_eval = "all"
            moe.gate.eps = 1e-20  # so that gates sum to 1 in float64 too
        return moe

    def forward(
        self, x: Tensor, noise_gates: bool = False, noise_mult: float = 1.0, *, mask: Tensor | None = None, route_by: Tensor | None = None
    ) -> MixtureOfExpertsReturn:
        """Run tokens x through the experts that the gate chooses for them.

        x: (b n d), or (n d), one group, or with more middle axes (b ... d), which together are the tokens of a group.
        noise_gates, noise_mult: add Gumbel noise to the routing.
        mask: bool of x's shape without the last axis, True for real tokens; the output of padding is 0.
        route_by: features of x's shape that the router looks at instead of x.
        """
        check_tokens(x, self.dim, mask, route_by)
        shape = x.shape
        x = _grouped(x, len(shape))
        mask, route_by = (None if t is None else _grouped(t, len(shape)) for t in (mask, route_by))
        if _is_overridden(self.gate, TopNGating) or has_hooks(self.gate):
            given = {name: value for name, value in (("mask", mask), ("route_by", route_by)) if value is not None}
            outputs, *losses = self._dense(x, mask, self.gate(x, noise_gates=noise_gates, noise_mult=noise_mult, **given))
        else:
            routing = self.gate.route(x, noise_gates, noise_mult, mask=mask, route_by=route_by)
            outputs = self._sparse(x, routing)
            losses = routing.balance_loss, routing.router_z_loss
        balance, z = losses
        outputs = outputs.to(x.dtype).reshape(*shape[:-1], outputs.shape[-1])
        return MixtureOfExpertsReturn(outputs, balance * self.balance_loss_coef + z * self.router_z_loss_coef, balance, z)

    def _sparse(self, x: Tensor, routing: Routing) -> Tensor:
        """(b n d) -> (b n d'), at a cost linear in n."""
        has_static_shapes = torch.compiler.is_compiling() or x.device.type != "cpu"
        if _is_overridden(self.experts, Experts) or (has_static_shapes and not self.experts.is_distributed):
            return routing.combine(self.experts(routing.dispatch(x)))
        rows, counts, choices = routing.dispatch_rows(x)
        return routing.combine_rows(self.experts(rows, counts), choices)

    def _dense(self, x: Tensor, mask: Tensor | None, decision: DenseRouting) -> tuple[Tensor, Tensor, Tensor]:
        """(b n d) -> (b n d') by the tensors of a gate that was overridden: the definition of the layer, and quadratic in n."""
        if not torch.compiler.is_compiling():
            warnings.warn(
                "the gate's forward is overridden or hooked, so routing goes through its dense tensors, at a cost quadratic in the number "
                "of tokens; assign or wrap gate.route instead to keep it linear",
                stacklevel=3,
            )
        dispatch, combine, *losses = decision
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        groups = x.reshape(*dispatch.shape[:2], self.dim)
        slots = self.experts(einsum(groups, dispatch.to(x.dtype), "b n d, b n e c -> b e c d"))
        outputs = einsum(slots.to(combine.dtype), combine, "b e c d, b n e c -> b n d")
        balance, z = (loss.squeeze() for loss in losses)
        return outputs.reshape(*x.shape[:2], outputs.shape[-1]), balance, z


class SparseMoEBlock(nn.Module):
    """A sparse layer with residual, normalised input and dense feed-forwards around it, which ST-MoE found to help (appendix C).

    ``x = ff_before(x) + x;  x = moe(norm(x)) + x;  x = ff_after(x) + x``, where the feed-forwards normalise their own input.
    """

    @typechecked
    def __init__(self, moe: MoE, *, add_ff_before: bool = False, add_ff_after: bool = True) -> None:
        super().__init__()
        self.moe = moe
        self.moe_prenorm = RMSNorm(moe.dim)
        self.ff_before = Expert(moe.dim, prenorm=True) if add_ff_before else None
        self.ff_after = Expert(moe.dim, prenorm=True) if add_ff_after else None

    def forward(
        self, x: Tensor, noise_gates: bool = False, noise_mult: float = 1.0, *, mask: Tensor | None = None, route_by: Tensor | None = None
    ) -> MixtureOfExpertsReturn:
        """Arguments and results as of `MoE`, whose experts have to keep the width."""
        check_tokens(x, self.moe.dim, mask, route_by)
        if self.ff_before is not None:
            x = self.ff_before(x) + x
        routed, *losses = self.moe(self.moe_prenorm(x), noise_gates, noise_mult, mask=mask, route_by=route_by)
        if routed.shape != x.shape:
            raise ValueError(
                f"experts must keep the width of {x.shape[-1]} in a block, which adds their output to x, got {routed.shape[-1]}"
            )
        x = routed + x
        if self.ff_after is not None:
            x = self.ff_after(x) + x
        return MixtureOfExpertsReturn(x, *losses)


def _grouped(t: Tensor, ndim: int) -> Tensor:
    """Bring (n ...) to (1 n ...) and (b ... ...) to (b n ...), where the tokens have ``ndim`` axes, the last of them features."""
    return t.unsqueeze(0) if ndim == 2 else t.flatten(1, ndim - 2)


def _is_overridden(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether the module computes something else than cls does: another class or an assigned ``forward``."""
    return "forward" in vars(module) or type(module).forward is not cls.forward
