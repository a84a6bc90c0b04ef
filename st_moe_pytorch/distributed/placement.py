"""Which rank computes which rows of which expert: integers only. Axes: e experts, r ranks, t rows.

With E experts and R ranks, expert e covers [e * R, (e + 1) * R) of a line and rank r computes [r * E, (r + 1) * E) of
it. Where R divides E these are whole experts; else an expert on a boundary is cut between neighbours, each of which
holds a copy of it and computes its share of its rows. So no rank idles, for any E and R.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple


class Placement(NamedTuple):
    """Where the experts are, for a number of experts and of ranks."""

    num_experts: int
    num_ranks: int

    def experts_of(self, rank: int) -> range:
        """The experts that a rank holds, at least one."""
        return range(rank * self.num_experts // self.num_ranks, -(-(rank + 1) * self.num_experts // self.num_ranks))

    def holders_of(self, expert: int) -> range:
        """The ranks that hold an expert, at least one and more if it is cut."""
        return range(expert * self.num_ranks // self.num_experts, -(-(expert + 1) * self.num_ranks // self.num_experts))

    def share(self, expert: int, rank: int, rows: int) -> range:
        """Which of an expert's rows a rank computes.

        The rows of an expert are those of rank 0, then those of rank 1, and so on.
        """
        edges = (
            min(max(edge * self.num_experts - expert * self.num_ranks, 0), self.num_ranks) for edge in (rank, rank + 1)
        )
        return range(*(rows * edge // self.num_ranks for edge in edges))

    def blocks(self, counts: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """How many rows each rank gets, from whom, for which expert.

        counts (r e): how many rows a rank has for an expert -> blocks[rank][i][source], i being the place in
        ``experts_of(rank)``. Rows sorted by expert are sorted by their destination too, since both the experts' line
        and their rows are cut in order.
        """
        offsets = [list(accumulate(column, initial=0)) for column in zip(*counts, strict=True)]

        def sources(rank: int, expert: int) -> list[int]:
            share = self.share(expert, rank, offsets[expert][-1])
            return [
                max(0, min(share.stop, stop) - max(share.start, start)) for start, stop in pairwise(offsets[expert])
            ]

        return [[sources(rank, expert) for expert in self.experts_of(rank)] for rank in range(self.num_ranks)]
