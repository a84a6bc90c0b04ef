"""Traces of tokens against counting one by one."""

import math
from collections import Counter

import pytest
import torch
from oracles import assert_close

from st_moe_pytorch import ExpertChoiceGating, MoE, TopNGating
from st_moe_pytorch.tools.pictures import expert_page
from st_moe_pytorch.tools.trace import Trace, entropy_table, expert_table, trace
from st_moe_pytorch.tools.watch import record_routing

B, N, DIM, EXPERTS, KINDS = 3, 20, 8, 4, 6


def recorded(calls=2, gate=None, mask=None):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"a": MoE(DIM, EXPERTS, gate=gate or TopNGating(DIM, EXPERTS, capacity_factor_train=0.5))}
    )
    kinds = [torch.randint(-1, KINDS - 1, (B, N)) for _ in range(calls)]  # some are passed over, none is the last one
    with record_routing(model) as records:
        for _ in range(calls):
            model["a"](torch.randn(B, N, DIM), mask=mask)
    return kinds, records


def counted(kinds, routings):
    found = Counter()
    for kind, routing in zip(kinds, routings, strict=True):
        for b in range(B):
            for n in range(N):
                for rank, expert in enumerate(routing.indices[b, n].tolist()):
                    if routing.kept[b, n, rank] and kind[b, n] >= 0:
                        found[int(kind[b, n]), expert] += 1
    return found


@pytest.mark.parametrize("experts_choose", [False, True])
def test_counts_are_those_of_choices_that_reached_an_expert(experts_choose):
    gate = ExpertChoiceGating(DIM, EXPERTS) if experts_choose else None
    mask = torch.arange(N) < torch.tensor([[N], [N - 7], [3]])
    kinds, records = recorded(gate=gate, mask=mask)
    expected = counted(kinds, records["a"])
    counts = trace(kinds, records, KINDS)["a"].counts
    assert counts.shape == (KINDS, EXPERTS)
    assert {(v, e): int(counts[v, e]) for v in range(KINDS) for e in range(EXPERTS) if counts[v, e]} == expected
    parts = [Trace.of([kind], [routing], KINDS) for kind, routing in zip(kinds, records["a"], strict=True)]
    assert torch.equal((parts[0] + parts[1]).counts, counts)


def test_entropy_is_that_of_shares_in_nats():
    counts = torch.tensor([[5, 5, 5, 5], [7, 0, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0]])
    entropy = Trace(counts).entropy()
    assert_close(entropy[:3], torch.tensor([math.log(4), 0.0, math.log(4) - 0.75 * math.log(3)], dtype=torch.float64))
    assert entropy[3].isnan()
    table = entropy_table({"a": Trace(counts), "": Trace(counts)}, ["even", "one", "two", "none"])
    assert table.splitlines() == [
        "| layer | even | one | two | none | uniform |",
        "|---|---|---|---|---|---|",
        "| a | 1.39 | 0.00 | 0.56 | nan | 1.39 |",
        "| layer | 1.39 | 0.00 | 0.56 | nan | 1.39 |",
    ]


def test_experts_are_told_by_what_they_get_above_their_share():
    # the first kind is the most frequent of both experts, and goes to the first less often than others do
    traced = Trace(torch.tensor([[50, 50], [20, 0], [9, 1], [0, 20]]))
    first, second = traced.top(most=3)
    assert [(share.kind, share.tokens) for share in first] == [(1, 20), (2, 9)]
    assert [(share.kind, share.tokens) for share in second] == [(3, 20), (0, 50)]
    assert [share.of_kind for share in first] == [1.0, 0.9]
    assert [share.kind for share in traced.top(most=1)[1]] == [3]
    assert_close(traced.load(), torch.tensor([79 / 150, 71 / 150], dtype=torch.float64))
    table = expert_table({"a": traced}, ["|", " ", "\n", "`"], most=2)
    assert table.splitlines()[2:] == [
        "| a | 0 | 52.7% | `␣` (100%), `\\n` (90%) |",
        "| a | 1 | 47.3% | `` ` `` (100%), `\\|` (50%) |",
    ]
    page = expert_page({"a": traced}, ["|", " ", "\n", "<b>"], most=1, title="A & B")
    assert "A &amp; B" in page
    assert page.count("<tr>") == 3
    assert "20 tokens, 100% of all choices" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_what_does_not_fit_is_refused():
    kinds, records = recorded()
    with pytest.raises(ValueError, match=r"kinds of call 1 must be an int64 tensor of shape \(3, 20\).*\(3, 19\)"):
        trace([kinds[0], kinds[1][:, 1:]], records, KINDS)
    with pytest.raises(ValueError, match="kinds of call 0 must be an int64 tensor"):
        trace([kinds[0].int(), kinds[1]], records, KINDS)
    with pytest.raises(ValueError, match="kinds must be below num_kinds=4, got 4 in call 0"):
        trace(kinds, records, KINDS - 2)
    with pytest.raises(ValueError, match="kinds must hold a tensor for each of 2 calls, got 1"):
        trace(kinds[0], records, KINDS)
    with pytest.raises(ValueError, match="routings must hold at least one"):
        Trace.of([], [], KINDS)
    with pytest.raises(ValueError, match="traces must not be empty"):
        expert_page({}, [])
    assert trace([], {"a": []}, KINDS) == {}
    with pytest.raises(ValueError, match="names must be those of 2 kinds, got 1"):
        entropy_table({"a": Trace(torch.ones(2, 2, dtype=torch.int64))}, ["one"])


def test_names_of_any_kind_leave_tables_whole():
    even = Trace(torch.ones(3, 49, dtype=torch.int64))
    assert even.top() == [[]] * 49  # nothing is above its share
    table = entropy_table({"a|b": even}, ["x|y", "z\nz", "<script>"])
    assert table.splitlines()[0] == "| layer | x\\|y | z z | &lt;script&gt; | uniform |"
    assert table.splitlines()[2].startswith("| a\\|b | 3.89 |")
    told = expert_table({"": Trace(torch.tensor([[9, 0], [9, 0], [0, 9]]))}, ["``<b>``", "", "x"])
    assert "``` ``<b>`` ``` (100%), `  ` (100%)" in told
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    with record_routing(MoE(DIM, EXPERTS)) as records:
        pass
    assert records == {"": []}
    layer = MoE(DIM, EXPERTS)
    with record_routing(layer) as records:
        layer(torch.randn(2, 0, DIM))
    assert trace(nothing, records, KINDS)[""].counts.sum() == 0
