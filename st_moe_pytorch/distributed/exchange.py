"""The rows of a layer on their way to the ranks of its experts, and their results on the way back.

Axes: e experts, r ranks, t rows, d width.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from st_moe_pytorch.compat import ends_recomputation
from st_moe_pytorch.distributed import agreement, collectives
from st_moe_pytorch.distributed.agreement import Results
from st_moe_pytorch.distributed.collectives import Channel
from st_moe_pytorch.distributed.compat import without_wrappers
from st_moe_pytorch.distributed.placement import Placement
from st_moe_pytorch.distributed.strategies import STRATEGIES, Strategy, strategy_name
from st_moe_pytorch.layouts import Layout
from st_moe_pytorch.routing import Routing

# (numbers of experts, their rows (1 t d), tensors in place of their parameters by number and name) -> their results (1
# t d')
Run = Callable[[Sequence[int], Sequence[Tensor], Mapping[int, dict[str, Tensor]]], list[Tensor]]


class Copy(NamedTuple):
    """A trainable parameter that other ranks hold too."""

    name: str
    """The same on all ranks that hold it."""
    holders: Sequence[int]
    """Ranks of the channel."""
    parameter: nn.Parameter
    places: list[tuple[int, str]]
    """Experts of this rank that have it, and its name in each."""


class ExpertParallel(NamedTuple):
    """How the experts of a layer are spread over the ranks of a process group."""

    channel: Channel
    placement: Placement
    strategy: str | Strategy
    sharded: bool
    """Whether a rank holds its own experts only, or all of them and computes with its own only."""
    data_parallel: Channel | None = None
    """The ranks that hold the same experts as this one, in a mesh of two dimensions."""
    ties: Mapping[str, tuple[str, Sequence[int]]] = {}
    """For names of parameters that experts of several ranks have in common: the first of these names, and the ranks."""
    model: str = ""
    """Tells models apart whose layers have the same names."""
    equal_shapes: bool = False
    """Whether shapes, dtypes and modes are alike on all ranks, so that nothing has to be agreed on."""

    @property
    def experts(self) -> range:
        """The experts that this rank computes."""
        return self.placement.experts_of(self.channel.rank)

    @property
    def num_ranks(self) -> int:
        """All ranks that gradients of the experts come from."""
        return self.placement.num_ranks * (1 if self.data_parallel is None else self.data_parallel.size)

    def holding(self, number: int, name: str) -> tuple[str, Sequence[int]]:
        """The name that an expert's parameter has on all ranks that hold it, and those ranks of the channel."""
        own = without_wrappers(f"{number}.{name}")
        return self.ties.get(own, (own, self.placement.holders_of(number)))

    @property
    def has_copies(self) -> bool:
        """Whether any rank holds parameters that another one holds too, whose gradients are to be summed."""
        is_cut = self.placement.num_experts % self.placement.num_ranks > 0
        return self.sharded and (is_cut or bool(self.ties) or self.data_parallel is not None)

    def copies(self, experts: nn.ModuleList) -> list[Copy]:
        """Trainable parameters of this rank's experts that other ranks hold too, in the same order on all ranks."""
        found: dict[nn.Parameter, Copy] = {}
        for number in self.experts if self.has_copies else ():
            for name, parameter in experts[number].named_parameters():
                key, holders = self.holding(number, name)
                if parameter.requires_grad and (len(holders) > 1 or self.data_parallel is not None):
                    found.setdefault(parameter, Copy(key, holders, parameter, [])).places.append((number, name))
        return sorted(found.values(), key=lambda copy: copy.name)

    def slots(self, routing: Routing) -> Layout:
        """The layout of rows whose number per expert all ranks know without a look at data."""
        if routing.capacity >= routing.groups[1]:
            wanted = "experts with fewer slots than a group has tokens: set the gate's capacity factors"
            got = f"{routing.capacity} slots for groups of {routing.groups[1]} tokens"
            raise ValueError(f"{self.channel.layer}: equal_shapes needs {wanted}, got {got}")
        return routing.buffers(filled=True)

    def exchange(
        self,
        rows: Tensor,
        offsets: Tensor,
        needs_grad: bool,
        copies: Sequence[Copy] = (),
        promised: Results | None = None,
    ) -> "Exchange":
        """What travels in one forward of a layer, agreed on by all ranks.

        rows (t d) sorted by expert, offsets (e): where those of each expert end.
        needs_grad: whether this rank needs gradients. If any does, all take part in the backward.
        """
        if self.channel.size != self.placement.num_ranks:
            raise RuntimeError(
                f"{self.channel.layer}: its experts were sharded over {self.placement.num_ranks} ranks, but its "
                f"process group has {self.channel.size}: build the model anew and shard it over the group that there "
                "is now"
            )
        if self.equal_shapes:
            # the slots of all experts, as many of each on every rank
            size = [len(rows) // self.placement.num_experts] * self.placement.num_experts
            return self._exchange([size] * self.placement.num_ranks, torch.is_grad_enabled(), None)
        terms, problem = self._agreement(rows), None
        if self.data_parallel is not None and torch.is_grad_enabled():
            names = [copy.name for copy in copies]
            needs_grad, problem = agreement.agree_with_replicas(names, needs_grad, self.data_parallel, rows.device)
            terms["replicas"] = problem or "agree"
        shared = {copy.name: copy.holders for copy in copies if len(copy.holders) > 1}
        ends = offsets.to(rows.device, torch.int64)
        counts = ends.diff(prepend=ends.new_zeros(1))
        gathered, needs_grad, dtype = agreement.gather_counts(counts, needs_grad, terms, shared, self.channel, promised)
        if problem is not None:
            raise RuntimeError(problem)
        check_sizes(gathered[self.channel.rank], len(rows))
        return self._exchange(gathered, needs_grad, dtype)

    def _exchange(self, counts: Sequence[Sequence[int]], needs_grad: bool, dtype: torch.dtype | None) -> "Exchange":
        blocks = self.placement.blocks(counts)
        back = [[sum(source) for source in zip(*held, strict=True)] for held in blocks]
        there = [list(line) for line in zip(*back, strict=True)]
        return Exchange(self, blocks[self.channel.rank], there, back, needs_grad, dtype)

    def join_replicas(self, block: Tensor, copies: Sequence[Copy]) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
        """A block of rows, and tensors in place of the copies, by expert and name, that sum all copies' gradients."""
        if not self.has_copies:
            return block, {}
        tensors, holders = [copy.parameter for copy in copies], [copy.holders for copy in copies]
        block, *joined = collectives.join_replicas(block, tensors, holders, self.channel, self.data_parallel)
        parameters: dict[int, dict[str, Tensor]] = {}
        for copy, parameter in zip(copies, joined, strict=True):
            for number, name in copy.places:
                parameters.setdefault(number, {})[name] = parameter
        return block, parameters

    def _agreement(self, rows: Tensor) -> dict[str, str]:
        """What has to be equal on all ranks in an exchange."""
        return {
            "layer": self.channel.layer,
            "model": self.model,
            "number of experts": str(self.placement.num_experts),
            "experts": "sharded" if self.sharded else "not sharded",
            "strategy": strategy_name(self.strategy),
            "width of tokens": str(rows.shape[1]),
            "dtype of tokens": str(rows.dtype),
            "gradients": "recorded" if torch.is_grad_enabled() else "off",
        }


class Exchange(NamedTuple):
    """The traffic of one forward: `to_experts`, then the experts, then `to_tokens`."""

    parallel: ExpertParallel
    sizes: list[list[int]]
    """Rows that this rank computes: for each of its experts, how many come from each rank."""
    there: list[list[int]]
    """there[s][r]: how many rows go from rank s to rank r."""
    back: list[list[int]]
    """The same for their results."""
    needs_grad: bool
    dtype: torch.dtype | None
    """Of the results, if all ranks promised any; else they agree on it afterwards."""

    def to_experts(self, rows: Tensor) -> list[Tensor]:
        """This rank's rows (t d), sorted by expert -> a block of all ranks' rows for each expert placed here.

        Rows behind the last expert's stay.
        """
        rows = rows[: sum(self.there[self.parallel.channel.rank])]
        if self.needs_grad and not rows.requires_grad:
            rows = rows.detach().requires_grad_()
        arrived = self._scaled(self._send(rows, self.there), self._scale)
        parts = arrived.split([n for source in zip(*self.sizes, strict=True) for n in source])
        return [torch.cat(parts[i :: len(self.sizes)]) for i in range(len(self.sizes))]

    def to_tokens(self, results: Sequence[Tensor]) -> Tensor:
        """The results of the experts here, in such blocks -> those of this rank's rows (t d').

        They are in the widest dtype of any rank's.
        """
        dtype = agreement.widest({result.dtype for result in results}) if self.parallel.equal_shapes else self.dtype
        if dtype is None:
            dtype = agreement.agree_on_results(results, self.parallel.channel)
        parts = [result.to(dtype).split(sources) for result, sources in zip(results, self.sizes, strict=True)]
        returning = torch.cat([part for source in zip(*parts, strict=True) for part in source])
        return self._send(self._scaled(returning, 1 / self._scale), self.back)

    def fail(self, error: Exception, device: torch.device) -> None:
        """In place of `to_tokens` where experts raised an error: tell it to ranks that wait to agree on results."""
        if self.dtype is None and not self.parallel.equal_shapes:
            agreement.tell_of_failure(error, self.parallel.channel, device)

    @property
    def _scale(self) -> int:
        """The number of ranks that the gradients of sharded experts are averaged over; 1 if not sharded.

        Nobody else averages them over ranks, so the mean is taken here; the gradients of rows get their size back.
        """
        return self.parallel.num_ranks if self.parallel.sharded else 1

    def _scaled(self, rows: Tensor, factor: float) -> Tensor:
        ranks, layer = self.parallel.num_ranks, self.parallel.channel.layer
        return rows if ranks == 1 else collectives.scale_gradient(rows, factor, layer)

    def _send(self, rows: Tensor, traffic: list[list[int]]) -> Tensor:
        strategy = self.parallel.strategy
        send = STRATEGIES[strategy] if isinstance(strategy, str) else strategy
        return send(rows, traffic, self.parallel.channel)


def check_sizes(sizes: Sequence[int], length: int) -> None:
    """Raise ValueError unless so many rows can be the experts'."""
    if min(sizes) < 0 or sum(sizes) > length:
        ends = list(accumulate(sizes))
        raise ValueError(f"offsets must not decrease, nor go beyond the {length} rows of x, got {ends}")


def run_over_ranks(
    experts: nn.ModuleList,
    rows: Tensor,
    offsets: Tensor,
    parallel: ExpertParallel,
    run: Run,
    promised: Results | None = None,
) -> Tensor:
    """Rows (t d) sorted by expert, those of expert i up to offsets[i] -> (t' d'), each computed where it is placed.

    promised: what this rank's experts return, if it is known. Where all ranks know it, they need not agree on it, and
    an error of the experts leaves the other ranks to the timeout of their process group.
    """
    if parallel.sharded:
        collectives.refuse_fsdp(experts, parallel.channel)
    needs_grad = torch.is_grad_enabled() and (rows.requires_grad or any(p.requires_grad for p in experts.parameters()))
    copies = parallel.copies(experts) if torch.is_grad_enabled() else []
    exchange = parallel.exchange(rows, offsets, needs_grad, copies, promised)
    blocks = exchange.to_experts(rows)
    blocks[0], joined = parallel.join_replicas(blocks[0], copies)
    try:
        results = [y.squeeze(0) for y in run(parallel.experts, [block.unsqueeze(0) for block in blocks], joined)]
        replaced = [t for own in joined.values() for t in own.values()]
        for number in joined:
            name, result = f"{parallel.channel.layer}: expert {number}", results[parallel.experts.index(number)]
            collectives.refuse_reentrant(name, result, *blocks, *replaced)
    except Exception as error:
        if not ends_recomputation(error):
            exchange.fail(error, rows.device)
        raise
    if not parallel.sharded:
        # the experts that other ranks compute stay in the graph: their gradients here are zero, and not missing
        others = [expert for number, expert in enumerate(experts) if number not in parallel.experts]
        results[0] = collectives.used_for_nothing(results[0], *others)
    return exchange.to_tokens(results)


def run_together(
    module: nn.Module, numbers: Sequence[int], blocks: Sequence[Tensor], parameters: Mapping[int, dict[str, Tensor]]
) -> list[Tensor]:
    """As a `Run`, by a module of all these experts: rows (t d) and int32 offsets, where those of each end -> (t d')."""
    sizes = [block.shape[1] for block in blocks]
    offsets = collectives.integers(accumulate(sizes), blocks[0].device).int()
    places = {number: place for place, number in enumerate(numbers)}
    own = {f"{places[number]}.{name}": t for number, theirs in parameters.items() for name, t in theirs.items()}
    y = functional_call(module, own, (torch.cat(list(blocks), dim=1).squeeze(0), offsets))
    return list(y.unsqueeze(0).split(sizes, dim=1))
