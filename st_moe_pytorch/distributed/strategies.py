"""Ways for rows to reach the ranks that compute them, and to come back. Axes: e experts, r ranks, t rows, d width.

A strategy is a function, any that follows `Strategy`. It is called twice in a layer: for the rows on their way to the
experts, and with the traffic reversed for the results on their way back.
"""

from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from st_moe_pytorch.checks import check_one_of
from st_moe_pytorch.distributed import collectives
from st_moe_pytorch.distributed.collectives import Channel


class Strategy(Protocol):
    def __call__(self, rows: Tensor, traffic: list[list[int]], channel: Channel) -> Tensor:
        """Bring rows to their destinations, differentiably.

        rows (t d): this rank's, sorted by destination. traffic[s][r]: how many go from rank s to rank r, known to all
        ranks. Result: the rows for this rank, sorted by source.
        """
        ...


if TYPE_CHECKING:
    StrategyOrName = str | Strategy
else:
    StrategyOrName = Any  # checked by check_strategy, whose error lists the names


def all_to_all(rows: Tensor, traffic: list[list[int]], channel: Channel) -> Tensor:
    """Send each row where it is computed and nowhere else: the fewest bytes."""
    rank = channel.rank
    return collectives.all_to_all(rows, traffic[rank], [sent[rank] for sent in traffic], channel)


def all_gather(rows: Tensor, traffic: list[list[int]], channel: Channel) -> Tensor:
    """Send every row to every rank, which picks its own.

    This sends each row as often as there are ranks: for networks that are best at gathering.
    """
    everything = collectives.all_gather(rows, [sum(sent) for sent in traffic], channel)
    blocks = everything.split(list(chain(*traffic)))
    return torch.cat(blocks[channel.rank :: channel.size])


STRATEGIES: dict[str, Strategy] = {"all_to_all": all_to_all, "all_gather": all_gather}


def check_strategy(strategy: str | Strategy) -> None:
    """Raise ValueError for what is neither the name of a strategy nor one."""
    if not callable(strategy):
        check_one_of(tuple(STRATEGIES), strategy=strategy)


def strategy_name(strategy: str | Strategy) -> str:
    return strategy if isinstance(strategy, str) else getattr(strategy, "__name__", type(strategy).__name__)
