"""Ways for rows to reach the ranks that compute them, and to come back. Axes: e experts, r ranks, t rows, d width.

A strategy is a function, any that follows `Strategy`. It is called twice in a layer: for the rows on their way to the experts, and with
the traffic reversed for the results on their way back.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from st_moe_pytorch.checks import check_one_of
from st_moe_pytorch.distributed import collectives
from st_moe_pytorch.distributed.collectives import Channel, gather_counts, join_replicas, scale_gradient
from st_moe_pytorch.distributed.placement import Placement


class Strategy(Protocol):
    def __call__(self, rows: Tensor, traffic: list[list[int]], channel: Channel) -> Tensor:
        """Bring rows to their destinations, differentiably.

        rows (t d): this rank's, sorted by destination. traffic[s][r]: how many go from rank s to rank r, known to all ranks.
        Result: the rows for this rank, sorted by source.
        """
        ...


def all_to_all(rows: Tensor, traffic: list[list[int]], channel: Channel) -> Tensor:
    """Send each row where it is computed and nowhere else: the fewest bytes."""
    rank = channel.rank
    return collectives.all_to_all(rows, traffic[rank], [sent[rank] for sent in traffic], channel)


def all_gather(rows: Tensor, traffic: list[list[int]], channel: Channel) -> Tensor:
    """Send every row to every rank, which picks its own: as many bytes as ranks, for networks that are best at gathering."""
    everything = collectives.all_gather(rows, [sum(sent) for sent in traffic], channel)
    blocks = everything.split(list(chain(*traffic)))
    return torch.cat(blocks[channel.rank :: channel.size])


STRATEGIES: dict[str, Strategy] = {"all_to_all": all_to_all, "all_gather": all_gather}


def check_strategy(strategy: str | Strategy) -> None:
    """Raise ValueError for a name that is none of a strategy."""
    if isinstance(strategy, str):
        check_one_of(tuple(STRATEGIES), strategy=strategy)


def strategy_name(strategy: str | Strategy) -> str:
    return strategy if isinstance(strategy, str) else getattr(strategy, "__name__", type(strategy).__name__)


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

    def run(self, rows: Tensor, counts: Sequence[int], needs_grad: bool, compute: Callable[[list[Tensor]], list[Tensor]]) -> Tensor:
        """Rows (t d) sorted by expert and counts (e) -> results (t d'), computed by the ranks that hold their experts.

        compute: this rank's experts, from a list of a block (t d) of rows for each to a list of a block (t d') of results for each.
        needs_grad: whether this rank needs gradients. If any does, all take part in the backward.
        """
        agreement = self._agreement(rows)
        gathered, needs_grad = gather_counts(counts, needs_grad, agreement, self.channel, rows.device)
        blocks = self.placement.blocks(gathered)
        back = [[sum(source) for source in zip(*held, strict=True)] for held in blocks]
        there = [list(line) for line in zip(*back, strict=True)]
        if needs_grad and not rows.requires_grad:
            rows = rows.detach().requires_grad_()

        send = STRATEGIES[self.strategy] if isinstance(self.strategy, str) else self.strategy
        # nobody averages the gradients of sharded experts over ranks, so the mean is taken here; those of rows get their size back
        scale = self.num_ranks if self.sharded else 1
        mine = blocks[self.channel.rank]
        arrived = scale_gradient(send(rows, there, self.channel), scale)
        arrived = arrived.split([n for source in zip(*mine, strict=True) for n in source])
        results = compute([torch.cat(arrived[i :: len(mine)]) for i in range(len(mine))])
        parts = [result.split(sources) for result, sources in zip(results, mine, strict=True)]
        returning = torch.cat([part for source in zip(*parts, strict=True) for part in source])
        return send(scale_gradient(returning, 1 / scale), back, self.channel)

    def join_replicas(self, block: Tensor, experts: nn.ModuleList) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
        """A block of rows, and the trainable parameters, by expert and name, of those experts that other ranks hold too.

        With them in place of the experts' own, the gradients of all copies are summed.
        """
        if not self.sharded or (self.placement.num_experts % self.placement.num_ranks == 0 and self.data_parallel is None):
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
