"""torch.compile in one graph and torch.export: the numbers of eager mode."""

import io

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


def test_random_policy_follows_the_seed_and_all_new_lengths_share_a_graph():
    moe, graphs = build(policy_train="random", threshold_train=1), []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(moe, fullgraph=True, backend=counting)
    for length, expected_graphs in ((9, 1), (9, 1), (12, 2), (7, 2), (30, 2), (2, 2), (1, 3), (1, 3), (12, 3)):
        x = torch.randn(2, length, 8, dtype=torch.float64)
        torch.manual_seed(length)
        expected = moe(x).outputs
        torch.manual_seed(length)
        assert_close(compiled(x).outputs, expected)
        assert len(graphs) == expected_graphs


def test_overridden_gates_compile():
    class Gate(TopNGating):
        def forward(self, x, noise_gates=False, noise_mult=1.0):
            return super().forward(x, noise_gates, noise_mult)

    moe = MoE(8, 2, gate=Gate(8, 2), experts=[nn.Linear(8, 8) for _ in range(2)]).double().eval()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match="quadratic"):
        expected = moe(x).outputs
    assert_close(torch.compile(moe, fullgraph=True, backend="eager")(x).outputs, expected)


@pytest.mark.parametrize("lengths", ["fixed", "dynamic"])
def test_exported_evaluation_is_saved_and_loaded(lengths):
    block = SparseMoEBlock(build(capacity_factor_eval=2.0 if lengths == "fixed" else None)).double().eval()
    x, mask = torch.randn(2, 9, 8, dtype=torch.float64), torch.rand(2, 9) < 0.8
    shapes = {"x": {1: torch.export.Dim.AUTO}, "mask": {1: torch.export.Dim.AUTO}} if lengths == "dynamic" else None
    file = io.BytesIO()
    torch.export.save(torch.export.export(block, (x,), {"mask": mask}, dynamic_shapes=shapes), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for length in (9,) if lengths == "fixed" else (9, 4, 30):
        x, mask = torch.randn(2, length, 8, dtype=torch.float64), torch.rand(2, length) < 0.8
        actual = loaded(x, mask=mask)
        assert_close(actual.outputs, block(x, mask=mask).outputs)
        assert actual.total_aux_loss.item() == 0.0
