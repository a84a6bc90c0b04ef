"""Experts that can be spread over ranks: which of them this rank holds, and which ranks work on a forward."""

from collections.abc import Sequence

from torch import nn

from st_moe_pytorch.distributed.collectives import Channel, group_name
from st_moe_pytorch.distributed.compat import ProcessGroup, is_managed_by_ddp
from st_moe_pytorch.distributed.exchange import ExpertParallel
from st_moe_pytorch.distributed.placement import Placement
from st_moe_pytorch.distributed.strategies import Strategy, check_strategy


class Shardable(nn.Module):
    """A list of experts, of which `shard_experts` can leave each rank its own. Arguments as of `Experts`."""

    def __init__(
        self,
        experts: nn.ModuleList | nn.Sequential | Sequence[nn.Module],
        is_distributed: bool | None,
        strategy: str | Strategy,
        process_group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        check_strategy(strategy)
        self.experts: nn.ModuleList = experts if isinstance(experts, nn.ModuleList) else nn.ModuleList(experts)
        self.num_experts = len(self.experts)
        self.is_distributed = is_distributed
        self.strategy: str | Strategy = strategy
        self.channel = Channel("Experts", group_name(process_group))
        self.parallel: ExpertParallel | None = None

    def shard(self, parallel: ExpertParallel) -> None:
        """Keep only the experts that this rank computes, under their numbers; the others become None.

        Called by `shard_experts`.
        """
        for number in range(self.num_experts):
            if number not in parallel.experts:
                self.experts.add_module(str(number), None)
        self.parallel = parallel
        self.is_distributed = True

    def extra_repr(self) -> str:
        if self.parallel is None:
            return ""
        held, ranks = self.parallel.experts, self.parallel.channel.size
        return f"experts {held[0]} to {held[-1]} of {self.num_experts}, on rank {self.parallel.channel.rank} of {ranks}"

    def _parallel(self, is_distributed: bool | None) -> ExpertParallel | None:
        """How this forward is spread over ranks; None if it is not."""
        is_distributed = self.is_distributed if is_distributed is None else is_distributed
        if self.parallel is not None:
            if not is_distributed:
                raise ValueError(
                    "is_distributed must not be False for sharded experts: this rank holds only some of them"
                )
            refuse_data_parallel(self.experts, self.parallel.channel)
            return self.parallel
        if not is_distributed:
            return None
        placement = Placement(self.num_experts, self.channel.size)
        return ExpertParallel(self.channel, placement, self.strategy, sharded=False)


def refuse_data_parallel(experts: nn.ModuleList, channel: Channel) -> None:
    """Raise RuntimeError where DistributedDataParallel manages sharded experts: it overwrites them with rank 0's."""
    if is_managed_by_ddp(next(experts.parameters(), None)):
        raise RuntimeError(
            f"{channel.layer}: its sharded experts are inside DistributedDataParallel, which has overwritten "
            "them with those of rank 0; wrap the model with st_moe_pytorch.distributed.data_parallel instead"
        )
