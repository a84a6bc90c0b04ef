"""The rows of a layer on their way to the ranks of its experts, and their results on the way back.

Axes: e experts, r ranks, t rows, d width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from st_moe_pytorch.distributed.agreement import agree_on_results, gather_counts
from st_moe_pytorch.distributed.collectives import Channel, join_replicas, scale_gradient
from st_moe_pytorch.distributed.placement import Placement
from st_moe_pytorch.distributed.strategies import STRATEGIES, Strategy, strategy_name


class ExpertParallel(NamedTuple):
    """How the experts of a layer are spread over the ranks of a process group."""

    channel: Channel
    placement: Placement
    strategy: str | Strategy
    sharded: bool
    """Whether a rank holds its own experts only, or all of them and computes with its own only."""
    data_parallel: Channel | None = None
    """The ranks that hold the same experts as this one, in a mesh of two dimensions."""

    @property
    def experts(self) -> range:
        """The experts that this rank computes."""
        return self.placement.experts_of(self.channel.rank)

    @property
    def num_ranks(self) -> int:
        """All ranks that gradients of the experts come from."""
        return self.placement.num_ranks * (1 if self.data_parallel is None else self.data_parallel.size)

    def exchange(self, rows: Tensor, counts: Sequence[int], needs_grad: bool) -> "Exchange":
        """What travels in one forward of a layer, agreed on by all ranks.

        rows (t d) sorted by expert, counts: how many of them each expert gets.
        needs_grad: whether this rank needs gradients. If any does, all take part in the backward.
        """
        gathered, needs_grad = gather_counts(counts, needs_grad, self._agreement(rows), self.channel, rows.device)
        blocks = self.placement.blocks(gathered)
        back = [[sum(source) for source in zip(*held, strict=True)] for held in blocks]
        return Exchange(self, blocks[self.channel.rank], [list(line) for line in zip(*back, strict=True)], back, needs_grad)

    def join_replicas(self, block: Tensor, experts: nn.ModuleList) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
        """A block of rows, and the trainable parameters, by expert and name, of those experts that other ranks hold too.

        With them in place of the experts' own, the gradients of all copies are summed.
        """
        is_cut = self.placement.num_experts % self.placement.num_ranks
        if not self.sharded or (not is_cut and self.data_parallel is None):
            return block, {}
        holders = {number: self.placement.holders_of(number) for number in self.experts}
        copied = [number for number in self.experts if self.data_parallel is not None or len(holders[number]) > 1]
        own = [(number, name, p) for number in copied for name, p in experts[number].named_parameters() if p.requires_grad]
        block, *joined = join_replicas(
            block, [p for *_, p in own], [holders[number] for number, *_ in own], self.channel, self.data_parallel
        )
        parameters: dict[int, dict[str, Tensor]] = {number: {} for number in copied}
        for (number, name, _), parameter in zip(own, joined, strict=True):
            parameters[number][name] = parameter
        return block, parameters

    def _agreement(self, rows: Tensor) -> dict[str, str]:
        """What has to be equal on all ranks in an exchange."""
        return {
            "layer": self.channel.layer,
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

    def to_experts(self, rows: Tensor) -> list[Tensor]:
        """This rank's rows (t d), sorted by expert -> a block of rows of all ranks for each expert that is placed here."""
        if self.needs_grad and not rows.requires_grad:
            rows = rows.detach().requires_grad_()
        arrived = scale_gradient(self._send(rows, self.there), self._scale)
        parts = arrived.split([n for source in zip(*self.sizes, strict=True) for n in source])
        return [torch.cat(parts[i :: len(self.sizes)]) for i in range(len(self.sizes))]

    def to_tokens(self, results: Sequence[Tensor]) -> Tensor:
        """The results of the experts here, in such blocks -> those of this rank's rows (t d'), in the widest dtype of any rank's."""
        dtype = agree_on_results(results, self.parallel.channel)
        parts = [result.to(dtype).split(sources) for result, sources in zip(results, self.sizes, strict=True)]
        returning = torch.cat([part for source in zip(*parts, strict=True) for part in source])
        return self._send(scale_gradient(returning, 1 / self._scale), self.back)

    @property
    def _scale(self) -> int:
        """Nobody averages the gradients of sharded experts over ranks, so the mean is taken here; those of rows get their size back."""
        return self.parallel.num_ranks if self.parallel.sharded else 1

    def _send(self, rows: Tensor, traffic: list[list[int]]) -> Tensor:
        strategy = self.parallel.strategy
        send = STRATEGIES[strategy] if isinstance(strategy, str) else strategy
        return send(rows, traffic, self.parallel.channel)
