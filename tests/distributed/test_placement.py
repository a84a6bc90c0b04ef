"""Placement as exact tables and as properties, without processes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_moe_pytorch.distributed.placement import Placement

sizes = st.integers(1, 12)


@pytest.mark.parametrize(
    ("experts", "ranks", "expected"),
    [
        (4, 2, [[0, 1], [2, 3]]),
        (3, 2, [[0, 1], [1, 2]]),  # expert 1 is cut in halves
        (4, 3, [[0, 1], [1, 2], [2, 3]]),
        (1, 3, [[0], [0], [0]]),
        (3, 5, [[0], [0, 1], [1], [1, 2], [2]]),
        (5, 3, [[0, 1], [1, 2, 3], [3, 4]]),
    ],
)
def test_experts_of_ranks(experts, ranks, expected):
    placement = Placement(experts, ranks)
    assert [list(placement.experts_of(rank)) for rank in range(ranks)] == expected
    assert [[r for r in range(ranks) if e in expected[r]] for e in range(experts)] == [
        list(placement.holders_of(e)) for e in range(experts)
    ]


def test_a_cut_expert_takes_rows_in_order_of_their_ranks():
    # three ranks with 4, 0 and 5 rows for one expert: three rows for each rank, and what can stay stays
    assert Placement(1, 3).blocks([[4], [0], [5]]) == [[[3, 0, 0]], [[1, 0, 2]], [[0, 0, 3]]]


@given(sizes, sizes, st.data())
def test_every_row_of_every_expert_is_computed_exactly_once(experts, ranks, data):
    placement = Placement(experts, ranks)
    counts = data.draw(
        st.lists(st.lists(st.integers(0, 9), min_size=experts, max_size=experts), min_size=ranks, max_size=ranks)
    )
    blocks = placement.blocks(counts)
    for source in range(ranks):
        for expert in range(experts):
            held = [(rank, list(placement.experts_of(rank)).index(expert)) for rank in placement.holders_of(expert)]
            assert sum(blocks[rank][i][source] for rank, i in held) == counts[source][expert]
    for expert in range(experts):
        rows = sum(count[expert] for count in counts)
        shares = [placement.share(expert, rank, rows) for rank in range(ranks)]
        assert [row for share in shares for row in share] == list(range(rows))
        assert {rank for rank, share in enumerate(shares) if share} <= set(placement.holders_of(expert))


@given(sizes, sizes, st.integers(0, 50))
def test_ranks_work_equally_to_within_one_row(experts, ranks, rows):
    placement = Placement(experts, ranks)
    work = [sum(len(placement.share(expert, rank, rows)) for expert in range(experts)) for rank in range(ranks)]
    assert sum(work) == experts * rows
    assert max(work) - min(work) <= 1


@given(sizes, sizes)
def test_every_rank_holds_neighbouring_experts_and_few_copies(experts, ranks):
    placement = Placement(experts, ranks)
    assert all(placement.experts_of(rank) for rank in range(ranks))
    copies = sum(len(placement.holders_of(expert)) for expert in range(experts))
    assert copies == sum(len(placement.experts_of(rank)) for rank in range(ranks)) <= experts + ranks - 1
