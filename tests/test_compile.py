"""torch.compile in one graph and torch.export: the numbers of eager mode."""

import pytest
import torch
from oracles import assert_close, gradients
from torch import nn

from st_moe_pytorch import Expert, MoE, SparseMoEBlock, TopNGating

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(**kwargs) -> MoE:
    gate = TopNGating(8, 2, **{"policy_train": "threshold", **kwargs})
    return MoE(8, 2, gate=gate, experts=[nn.Linear(8, 8), Expert(8, 1)]).double()


def test_training_with_all_settings():
    settings = {"policy_train": "all", "capacity_factor_train": None, "group_size": 6, "priority": "gate", "second_place_loss": True}
    check_compiled(build(**settings), "aot_eager")


@pytest.mark.slow
def test_evaluation_by_inductor():
    moe = build(top_n=1).eval()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_close(torch.compile(moe, fullgraph=True)(x).outputs, moe(x).outputs)


def test_block_with_coordinate_descent():
    block = SparseMoEBlock(build(differentiable_topk=True, straight_through_dispatch_tensor=False)).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    assert_close(torch.compile(block, fullgraph=True, backend="eager")(x).outputs, block(x).outputs)


def check_compiled(block: MoE | SparseMoEBlock, backend: str) -> None:
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 9) < 0.8
    expected = block(x, mask=mask)
    actual = torch.compile(block, fullgraph=True, backend=backend)(x, mask=mask)
    inputs, cotangent = [x, *block.parameters()], torch.randn_like(x)
    for value, wanted in zip(actual, expected, strict=True):
        assert_close(value, wanted, may_vanish=not block.training)

    def all_gradients(result):
        loss = (result.outputs * cotangent).sum() + result.total_aux_loss
        return gradients(loss, torch.tensor(1.0), inputs)

    for (name, _), gradient, wanted in zip(
        [("x", x), *block.named_parameters()], all_gradients(actual), all_gradients(expected), strict=True
    ):
        assert_close(gradient, wanted, may_vanish="experts" in name or "to_gates" in name)


def test_random_policy_follows_the_seed_in_one_graph_for_all_batches_of_a_shape():
    moe, graphs = build(policy_train="random", threshold_train=1), []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(moe, fullgraph=True, backend=counting)
    for seed in range(3):
        x = torch.randn(2, 9, 8, dtype=torch.float64)
        torch.manual_seed(seed)
        expected = moe(x).outputs
        torch.manual_seed(seed)
        assert_close(compiled(x).outputs, expected)
    assert len(graphs) == 1


def test_overridden_gates_compile():
    class Gate(TopNGating):
        def forward(self, x, noise_gates=False, noise_mult=1.0):
            return super().forward(x, noise_gates, noise_mult)

    moe = MoE(8, 2, gate=Gate(8, 2), experts=[nn.Linear(8, 8) for _ in range(2)]).double().eval()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match="quadratic"):
        expected = moe(x).outputs
    assert_close(torch.compile(moe, fullgraph=True, backend="eager")(x).outputs, expected)


class Outputs(nn.Module):
    """What is exported is a model: its output is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = build()

    def forward(self, x, mask):
        return self.moe(x, mask=mask).outputs


def test_export():
    model = Outputs().eval()
    x, mask = torch.randn(2, 9, 8, dtype=torch.float64), torch.rand(2, 9) < 0.8
    program = torch.export.export(model, (x, mask))
    other = torch.randn(2, 9, 8, dtype=torch.float64)
    assert_close(program.module()(other, ~mask), model(other, ~mask))
