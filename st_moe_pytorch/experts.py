"""The experts and the layers they are made of. Axes: b groups, n tokens or slots, d width, e experts, t rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from st_moe_pytorch.checks import check_positive, typechecked
from st_moe_pytorch.distributed.collectives import Channel
from st_moe_pytorch.distributed.placement import Placement
from st_moe_pytorch.distributed.sharding import refuse_data_parallel
from st_moe_pytorch.distributed.strategies import ExpertParallel, check_strategy


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019): ``x / |x| * sqrt(d) * gamma`` on (..., d)."""

    @typechecked
    def __init__(self, dim: int) -> None:
        super().__init__()
        check_positive(dim=dim)
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.scale * self.gamma


class GEGLU(nn.Module):
    """Gated GELU (Shazeer 2020) with a multiplicative bias: halves x and gate of (..., 2d) -> ``gelu(gate) * x * mult_bias`` (..., d)."""

    @typechecked
    def __init__(self, dim: int, mult_bias: bool = True) -> None:
        super().__init__()
        check_positive(dim=dim)
        self.mult_bias = nn.Parameter(torch.ones(dim)) if mult_bias else 1.0

    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return F.gelu(gate) * x * self.mult_bias


class Expert(nn.Module):
    """GEGLU feed-forward (..., dim) -> (..., dim) with ``int(dim * hidden_mult * 2 / 3)`` hidden units.

    Two thirds, because a gated layer has three matrices where a plain one has two. ``prenorm`` puts an RMSNorm first;
    ``dropout`` acts on the hidden units (expert dropout, Fedus et al. 2021, section 2.4).
    """

    @typechecked
    def __init__(
        self, dim: int, hidden_mult: float | int = 4, mult_bias: bool = True, prenorm: bool = False, *, dropout: float | int = 0.0
    ) -> None:
        super().__init__()
        check_positive(dim=dim, hidden_mult=hidden_mult, hidden_units=int(dim * hidden_mult * 2 / 3))
        hidden = int(dim * hidden_mult * 2 / 3)
        layers = [RMSNorm(dim)] if prenorm else []
        layers += [nn.Linear(dim, hidden * 2), GEGLU(hidden, mult_bias), nn.Linear(hidden, dim)]
        self.net = nn.Sequential()
        for number, layer in enumerate(layers):
            # named, not numbered, so that checkpoints do not depend on whether there is dropout
            if dropout and layer is layers[-1]:
                self.net.add_module("dropout", nn.Dropout(dropout))
            self.net.add_module(str(number), layer)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                bound = layer.out_features**-0.5
                nn.init.uniform_(layer.weight, -bound, bound)
                nn.init.uniform_(layer.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Experts(nn.Module):
    """A list of experts, any modules (1, t, d) -> (1, t, d'), each run on the tokens it was sent.

    experts: one module per expert; they may differ, but not in their output width. They are kept as they are and always called as modules.
    is_distributed: exchange tokens between ranks that all hold all experts, so that each computes an equal share of the experts' work.
        None is False until `shard_experts` leaves each rank with its own experts only, and then True.
    allow_var_seq_len: accepted for code written against 0.1.8; ranks may always have tokens of different number.
    strategy: how tokens are exchanged, "all_to_all", "all_gather" or a `Strategy`.
    process_group: ranks that exchange tokens, all by default.
    """

    @typechecked
    def __init__(
        self,
        experts: nn.ModuleList | Sequence[nn.Module],
        is_distributed: bool | None = None,
        allow_var_seq_len: bool = False,
        *,
        strategy: str | Callable[..., Tensor] = "all_to_all",
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if len(experts) == 0:
            raise ValueError("experts must hold at least one module, got none")
        check_strategy(strategy)
        self.experts: nn.ModuleList = experts if isinstance(experts, nn.ModuleList) else nn.ModuleList(experts)
        self.num_experts = len(self.experts)
        self.is_distributed = is_distributed
        self.allow_var_seq_len = allow_var_seq_len
        self.strategy = strategy
        self.channel = Channel("Experts", None if process_group is None else process_group.group_name)
        self.parallel: ExpertParallel | None = None
        self.dummy = nn.Buffer(torch.ones(1), persistent=False)

    def forward(self, x: Tensor, counts: Tensor | None = None, is_distributed: bool | None = None) -> Tensor:
        """Run every expert on its own tokens, in either layout.

        Slots: x (b e n d) -> (b e n d').
        Rows: x (t d) sorted by expert and counts (e), how many rows each expert has -> (t d').
        """
        if isinstance(counts, bool):  # 0.1.8 had is_distributed second
            counts, is_distributed = None, counts
        parallel = self._parallel(is_distributed)
        if parallel is not None and counts is None:
            b, e, n, _ = x.shape
            rows = self._exchange(rearrange(x, "b e n d -> (e b n) d"), [b * n] * e, parallel)
            return rearrange(rows, "(e b n) d -> b e n d", b=b, e=e, n=n)
        if parallel is not None and counts is not None:
            return self._exchange(x, counts.tolist(), parallel)
        if counts is None and x.device.type != "cpu" and are_alike(self.experts):
            return run_stacked(self.experts, x)
        if counts is None:
            return torch.stack(self._run(range(self.num_experts), x.unbind(dim=1)), dim=1)
        blocks = x.unsqueeze(0).split(counts.tolist(), dim=1)
        return torch.cat(self._run(range(self.num_experts), blocks), dim=1).squeeze(0)

    def shard(self, parallel: ExpertParallel) -> None:
        """Keep only the experts that this rank computes, under their numbers; the others become None. Called by `shard_experts`."""
        for number in range(self.num_experts):
            if number not in parallel.experts:
                self.experts.add_module(str(number), None)
        self.parallel = parallel
        self.is_distributed = True

    def _parallel(self, is_distributed: bool | None) -> ExpertParallel | None:
        """How this forward is spread over ranks; None if it is not."""
        is_distributed = self.is_distributed if is_distributed is None else is_distributed
        if self.parallel is not None:
            if not is_distributed:
                raise ValueError("is_distributed must not be False for sharded experts: this rank holds only some of them")
            refuse_data_parallel(self.experts, self.parallel.channel)
            return self.parallel
        if not is_distributed:
            return None
        return ExpertParallel(self.channel, Placement(self.num_experts, self.channel.size), self.strategy, sharded=False)

    def _exchange(self, rows: Tensor, counts: Sequence[int], parallel: ExpertParallel) -> Tensor:
        """Rows (t d) sorted by expert -> (t d'), each computed by the rank that it is placed on."""
        if len(counts) != self.num_experts:
            raise ValueError(f"counts must have an entry for each of the {self.num_experts} experts, got {len(counts)}")

        def compute(blocks: list[Tensor]) -> list[Tensor]:
            first, copies = parallel.join_replicas(blocks[0], self.experts)
            mine = dict(zip(parallel.experts, [first, *blocks[1:]], strict=True))
            held = mine if parallel.sharded else {number: mine.get(number, first[:0]) for number in range(self.num_experts)}
            outputs = self._run(list(held), [block.unsqueeze(0) for block in held.values()], copies)
            results = {number: y.squeeze(0) for number, y in zip(held, outputs, strict=True)}
            idle = [results.pop(number) for number in list(results) if number not in mine]
            # experts that other ranks compute stay in the graph, so that their gradients here are zero and not missing
            return [torch.cat([results.pop(parallel.experts[0]), *idle]), *results.values()]

        needs_grad = torch.is_grad_enabled() and (rows.requires_grad or any(p.requires_grad for p in self.parameters()))
        return parallel.run(rows, counts, needs_grad, compute)

    def _run(
        self, numbers: Sequence[int], blocks: Sequence[Tensor], parameters: Mapping[int, dict[str, Tensor]] | None = None
    ) -> list[Tensor]:
        """Each expert on its block (b n d), with other parameters in place of its own if given.

        An expert without tokens runs too, so that its parameters get a gradient, of zero, in every step. Where nothing needs gradients,
        one expert without tokens at most runs, but for those with hooks: FSDP's wait for the other ranks.
        """
        outputs: list[Tensor] = []
        for number, block in zip(numbers, blocks, strict=True):
            expert = self.experts[number]
            if outputs and block.shape[1] == 0 and not torch.is_grad_enabled() and not has_hooks(expert):
                outputs.append(outputs[0].new_empty(*block.shape[:-1], outputs[0].shape[-1]))
                continue
            y = functional_call(expert, parameters[number], block) if parameters and number in parameters else expert(block)
            if not isinstance(y, Tensor) or y.shape[:-1] != block.shape[:-1]:
                got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(f"expert {number} must map tokens {tuple(block.shape)} to one tensor of shape (b, n, width), got {got}")
            outputs.append(y)
        widths = [y.shape[-1] for y in outputs]
        if len(set(widths)) > 1:
            raise ValueError(f"experts must have outputs of equal width, got widths {widths} of experts {numbers[0]} to {numbers[-1]}")
        return outputs


# modules that compute nothing but what their class and parameters say
PLAIN = {Expert, nn.Sequential, nn.Linear, GEGLU, RMSNorm, nn.Dropout}


def has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(map(len, hooks))


def are_alike(experts: nn.ModuleList) -> bool:
    """Whether all experts are `Expert`s of one shape and mode, and nothing has been put around them, onto them or into them."""

    def looks(expert: nn.Module) -> list[tuple[Any, ...]]:
        modules = [(name, type(module), module.training, module.extra_repr()) for name, module in expert.named_modules()]
        return modules + [(name, type(p), p.dtype, p.device) for name, p in expert.named_parameters()]

    modules = [module for expert in experts for module in expert.modules()]
    is_plain = all(type(module) in PLAIN and "forward" not in vars(module) and not has_hooks(module) for module in modules)
    is_plain = is_plain and all(type(parameter) is nn.Parameter for parameter in experts.parameters())
    return is_plain and all(type(expert) is Expert and looks(expert) == looks(experts[0]) for expert in experts)


def run_stacked(experts: nn.ModuleList, x: Tensor) -> Tensor:
    """(b e n d) -> (b e n d'): a batched product for all experts in place of one for each."""
    parameters = [dict(expert.named_parameters()) for expert in experts]
    stacked = {name: torch.stack([own[name] for own in parameters]) for name in parameters[0]}
    first: Any = experts[0]
    run = torch.vmap(lambda own, rows: functional_call(first, own, rows), in_dims=(0, 1), out_dims=1, randomness="different")
    return run(stacked, x)
