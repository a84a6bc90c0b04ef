"""The experts of a layer. Axes: b groups, n tokens or slots, d width, e experts, t rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from st_moe_pytorch.checks import is_blind, refuse_old_pickle, typechecked
from st_moe_pytorch.compat import apply_to_tensors, contents, eager, ends_recomputation, has_hooks, is_batched
from st_moe_pytorch.distributed.agreement import Results
from st_moe_pytorch.distributed.collectives import used_for_nothing
from st_moe_pytorch.distributed.compat import ProcessGroup
from st_moe_pytorch.distributed.exchange import ExpertParallel, check_sizes, run_over_ranks, run_together
from st_moe_pytorch.distributed.shardable import Shardable
from st_moe_pytorch.distributed.strategies import StrategyOrName
from st_moe_pytorch.grouped import grouped_linear, has_kernel
from st_moe_pytorch.grouped.side_by_side import put_side_by_side, together
from st_moe_pytorch.layers import Expert, RMSNorm, are_plain, gated_unit
from st_moe_pytorch.layouts import Layout
from st_moe_pytorch.routing import Routing


class Experts(Shardable):
    """A list of experts, any modules (1, t, d) -> (1, t, d'), each run on the tokens it was sent.

    experts: one module per expert; they may differ, but not in their output width. They are kept as they are.
    is_distributed: exchange tokens between ranks that all hold all experts, so that each computes an equal share of
        their work. None is False until `shard_experts` leaves each rank with its own experts only, and then True.
    allow_var_seq_len: accepted for code written against 0.1.8; ranks may always have tokens of different number.
    strategy: how tokens are exchanged, "all_to_all", "all_gather" or a `Strategy`.
    process_group: ranks that exchange tokens, all by default.

    On CPU, experts are called one by one. On accelerators and in compiled code, plain `Expert`s of one shape share
    their products (`grouped_linear`). Others are called there too; in compiled code they run on slots (b, c, d) of
    fixed number, which is slower.
    """

    @typechecked
    def __init__(
        self,
        experts: nn.ModuleList | nn.Sequential | Sequence[nn.Module],
        is_distributed: bool | None = None,
        allow_var_seq_len: bool = False,
        *,
        strategy: StrategyOrName = "all_to_all",
        process_group: ProcessGroup | None = None,
    ) -> None:
        if len(experts) == 0:
            raise ValueError("experts must hold at least one module, got none")
        super().__init__(experts, is_distributed, strategy, process_group)
        self.allow_var_seq_len = allow_var_seq_len
        self.dummy = nn.Buffer(torch.ones(1), persistent=False)
        self.flatten_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.dummy)

    def forward(self, x: Tensor, offsets: Tensor | None = None, is_distributed: bool | None = None) -> Tensor:
        """Run every expert on its own tokens, in either layout.

        Slots: x (b e n d) -> (b e n d'). Rows: x (t d) sorted by expert and offsets (e) int32, where each expert's rows
        end -> (t d'). Rows behind the last offset are no expert's: the very last of them gives zero, the others
        anything.
        """
        if isinstance(offsets, bool):  # 0.1.8 had is_distributed second
            offsets, is_distributed = None, offsets
        parallel = self._parallel(is_distributed)
        shared = parallel is None and may_share_products(x) and are_alike(self.experts)
        if offsets is not None:
            self._check_rows(x, offsets)
            return run_shared(self.experts, x, offsets) if shared else eager(self._run_rows)(x, offsets, parallel)
        if x.ndim != 4 or x.shape[1] != self.num_experts:
            wanted = f"(batch, {self.num_experts}, slots, width) without offsets"
            raise ValueError(f"x must have shape {wanted}, got {tuple(x.shape)}")
        if parallel is None and not shared:
            parts = x.transpose(0, 1).contiguous().unbind()  # each in one piece, as some experts need it
            return torch.stack(self._same_width([self._call(i, part) for i, part in enumerate(parts)]), dim=1)
        b, e, n, _ = x.shape
        rows = rearrange(x, "b e n d -> (e b n) d")
        ends = torch.arange(1, e + 1, dtype=torch.int32, device=x.device) * (b * n)
        y = run_shared(self.experts, rows, ends) if shared else eager(self._run_rows)(rows, ends, parallel)
        return rearrange(y, "(e b n) d -> b e n d", b=b, e=e, n=n)

    def flatten_parameters(self) -> None:
        """Put the parameters of experts that share one kernel in a row in memory, where it reads them without a copy.

        As torch.nn.RNN, layers do so themselves when they come to a GPU in bfloat16. Parameters stay what and in whose
        modules they are. Call it after what gives them memory of their own, such as deepcopy or
        ``load_state_dict(assign=True)``.
        """
        experts = [expert for expert in self.experts if expert is not None]
        if experts and are_alike(experts) and has_kernel(next(experts[0].parameters()), len(experts)):
            for column in zip(*(expert.state_dict(keep_vars=True).values() for expert in experts), strict=True):
                put_side_by_side(column)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Experts":
        apply_to_tensors(self, fn, recurse)
        self.flatten_parameters()
        return self

    def shard(self, parallel: ExpertParallel) -> None:
        super().shard(parallel)
        self.flatten_parameters()

    def layout(self, routing: Routing) -> Layout:
        """How experts want a routing's tokens: in rows or, where only a look at data tells these apart, in slots."""
        if self.parallel is not None and self.parallel.equal_shapes:
            return self.parallel.slots(routing)
        in_rows = self.parallel is not None or self.is_distributed
        in_rows = in_rows or (not is_batched() and (not is_blind(routing.indices) or are_alike(self.experts)))
        return routing.rows() if in_rows else routing.buffers(filled=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        refuse_old_pickle(self, state, "parallel")
        super().__setstate__(state)

    def _check_rows(self, x: Tensor, offsets: Tensor) -> None:
        if self.parallel is not None and self.parallel.equal_shapes:
            raise ValueError("x must be slots where ranks are promised equal shapes, got rows and offsets")
        if x.ndim != 2:
            raise ValueError(f"x must be rows (t, width) where offsets are given, got {tuple(x.shape)}")
        if offsets.shape != (self.num_experts,) or offsets.dtype != torch.int32:
            wanted = f"({self.num_experts},), torch.int32: where the rows of each expert end, not how many it has"
            raise ValueError(f"offsets must have shape and dtype {wanted}, got {tuple(offsets.shape)}, {offsets.dtype}")

    def _run_rows(self, rows: Tensor, offsets: Tensor, parallel: ExpertParallel | None) -> Tensor:
        """Rows (t d) -> (t d') by experts that are called one by one, here or where they are placed."""
        if parallel is None:
            ends = offsets.tolist()  # the one time that a device is waited for
            sizes = [stop - start for start, stop in pairwise([0, *ends])]
            check_sizes(sizes, len(rows))
            blocks = rows.unsqueeze(0).split([*sizes, len(rows) - ends[-1]], dim=1)
            y = self._run(range(self.num_experts), blocks[:-1], {})
        else:
            run, promised = self._run, None
            placed = [self.experts[number] for number in parallel.experts]
            if may_share_products(rows) and are_alike(shared := SharedProducts(placed)):
                *_, last = shared.parameters()  # of the last matrix, as wide as the results
                run = partial(run_together, shared)
                promised = Results(autocast_dtype(rows.device.type) or rows.dtype, len(last))
            y = [run_over_ranks(self.experts, rows, offsets, parallel, run, promised).unsqueeze(0)]
        rest = y[0].new_zeros(1, len(rows) - sum(part.shape[1] for part in y), y[0].shape[-1])
        return torch.cat([*y, rest], dim=1).squeeze(0)

    def _run(
        self, numbers: Sequence[int], blocks: Sequence[Tensor], parameters: Mapping[int, dict[str, Tensor]]
    ) -> list[Tensor]:
        """Each expert on its rows (1 t d), with other parameters in place of its own if given -> its results (1 t d').

        An expert without rows runs too, so that its parameters get a gradient, of zero, in every step; one that cannot
        is passed over, with the same gradients. Where nothing needs gradients, an expert without rows runs only if none
        has any, but for those with hooks: FSDP's wait for the other ranks.
        """
        results: dict[int, Tensor] = {}
        refusals: list[Exception] = []
        experts, needs_grad = list(self.experts), torch.is_grad_enabled()
        has_work = any(block.shape[1] > 0 for block in blocks)
        for number, block in zip(numbers, blocks, strict=True):
            is_idle = block.shape[1] == 0
            may_wait = is_idle and not needs_grad and (results or has_work)
            if may_wait and not has_hooks(experts[number]):
                continue
            try:
                results[number] = self._call(number, block, parameters.get(number))
            except Exception as error:
                if ends_recomputation(error):
                    raise
                error.add_note(f"This was expert {number}, called with tokens of shape {tuple(block.shape)}.")
                refusals.append(error)
                if not is_idle:
                    raise
        if not results:
            why = "since nothing else tells the width of their results"
            wanted = "experts must be able to run on no tokens where none of them has any"
            raise RuntimeError(f"{wanted}, {why}") from refusals[0]
        some = next(iter(results.values()))
        nothing = some.new_empty(1, 0, some.shape[-1])
        for number in numbers:
            if number not in results:
                results[number] = used_for_nothing(nothing, experts[number]) if needs_grad else nothing
        return self._same_width([results[number] for number in numbers])

    def _call(self, number: int, block: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """One expert on its tokens (b n d)."""
        expert = self.experts[number]
        y = expert(block) if parameters is None else functional_call(expert, parameters, block)
        if not isinstance(y, Tensor) or y.shape[:-1] != block.shape[:-1]:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            wanted = f"tokens {tuple(block.shape)} to one tensor of shape (b, n, width)"
            raise ValueError(f"expert {number} must map {wanted}, got {got}")
        return y

    @staticmethod
    def _same_width(outputs: list[Tensor]) -> list[Tensor]:
        widths = [y.shape[-1] for y in outputs]
        if any(width != widths[0] for width in widths):
            raise ValueError(f"experts must have outputs of equal width, got widths {widths}")
        return outputs


def may_share_products(t: Tensor) -> bool:
    """Whether experts that are alike share products: everywhere but in eager mode on CPU, where a loop is as fast."""
    return t.device.type != "cpu" or is_blind(t)


def are_alike(experts: Iterable[nn.Module]) -> bool:
    """Whether all are `Expert`s of one shape and mode, with nothing put around them, onto them or into them."""
    return are_plain(modules := list(experts)) and type(modules[0]) is Expert


def run_shared(experts: nn.ModuleList, rows: Tensor, offsets: Tensor) -> Tensor:
    """Rows (t d) -> (t d') by experts that are alike.

    gamma and mult_bias scale the columns of the matrix that comes after them.
    """
    nets = (contents(expert)[0]["net"] for expert in experts)
    layers: list[tuple[Any, ...]] = list(zip(*(contents(net)[0].values() for net in nets), strict=True))
    norms = layers.pop(0) if isinstance(layers[0][0], RMSNorm) else ()
    up, gelus, *dropouts, down = layers
    if norms:
        rows = norms[0].normalized(rows)
    if (dtype := autocast_dtype(rows.device.type)) is not None:
        rows = rows.to(dtype)
    elif rows.dtype != up[0].weight.dtype:
        wanted = f"the dtype of the experts, {up[0].weight.dtype}, or run under autocast"
        raise ValueError(f"x must have {wanted}, got {rows.dtype}")
    z = grouped_linear(*together(rows, *_parameters(up), [norm.gamma for norm in norms]), offsets)
    hidden = gated_unit(z, activation=gelus[0].activation)
    for dropout in dropouts:
        hidden = dropout[0](hidden)
    scales = [gelu.mult_bias for gelu in gelus] if isinstance(gelus[0].mult_bias, Tensor) else []
    return grouped_linear(*together(hidden, *_parameters(down), scales), offsets)


class SharedProducts(nn.ModuleList):
    """Experts that are alike: `run_shared` as a module, so that other tensors may stand in for its parameters."""

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return run_shared(self, rows, offsets)


def autocast_dtype(device: str) -> torch.dtype | None:
    """Of products on this kind of device; None without autocast."""
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else None


def _parameters(linears: Sequence[nn.Linear]) -> tuple[list[Tensor], list[Tensor]]:
    own: list[Any] = [contents(linear)[1] for linear in linears]
    return [each["weight"] for each in own], [each["bias"] for each in own if each["bias"] is not None]
