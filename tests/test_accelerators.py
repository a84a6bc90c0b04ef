"""What serves accelerators, checked without one: batched products equal the loop, and nothing looks at data or grows with the experts."""

from collections import Counter
from unittest.mock import patch

import pytest
import torch
from oracles import assert_close, gradients
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from st_moe_pytorch import Expert, Experts, MoE, SparseMoEBlock
from st_moe_pytorch.experts import are_alike, run_stacked


def alike(number=3, **options) -> Experts:
    return Experts([Expert(6, 2, **options) for _ in range(number)])


@pytest.mark.parametrize("options", [{}, {"prenorm": True}, {"mult_bias": False}], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 3, 1, 6), (0, 3, 4, 6)])
def test_batched_products_equal_the_loop(options, shape):
    experts = alike(**options).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    assert are_alike(experts.experts)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected, actual = experts(x), run_stacked(experts.experts, x)
    inputs, cotangent = [x, *experts.parameters()], torch.randn_like(x)
    pairs = zip([actual, *gradients(actual, cotangent, inputs)], [expected, *gradients(expected, cotangent, inputs)], strict=True)
    for got, wanted in pairs:
        assert_close(got, wanted, may_vanish=shape[0] == 0)


def test_batched_dropout_is_drawn_for_every_expert():
    experts = alike(dropout=0.5)
    for expert in experts.experts:
        expert.load_state_dict(experts.experts[0].state_dict())
    outputs = run_stacked(experts.experts, torch.ones(1, 3, 5, 6))
    assert not torch.equal(outputs[:, 0], outputs[:, 1])
    assert torch.equal(*run_stacked(experts.eval().experts, torch.ones(1, 3, 5, 6))[:, :2].unbind(1))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Own(torch.Tensor):
    """As the weights of a DTensor are: parameters, but no plain ones."""


def replaced(expert):
    expert.net[0] = nn.Sequential(expert.net[0], nn.Identity())


SPECIAL = {
    "hook": lambda expert: expert.net[0].register_forward_hook(lambda *_: None),
    "parametrization": lambda expert: parametrize.register_parametrization(expert.net[0], "weight", Doubled()),
    "wrapper": replaced,
    "assigned forward": lambda expert: setattr(expert, "forward", lambda x: x),
    "other dtype": lambda expert: expert.double(),
    "evaluation of one": lambda expert: expert.eval(),
    "tensor subclass": lambda expert: setattr(expert.net[0], "weight", nn.Parameter(expert.net[0].weight.detach().as_subclass(Own))),
}


@pytest.mark.parametrize("change", SPECIAL.values(), ids=SPECIAL)
def test_experts_that_differ_in_anything_are_called_one_by_one(change):
    experts = alike()
    change(experts.experts[1])
    assert not are_alike(experts.experts)


def test_experts_of_other_shapes_and_classes_are_not_alike():
    assert not are_alike(Experts([Expert(6, 2), Expert(6, 3)]).experts)
    assert not are_alike(Experts([Expert(6, 2, dropout=0.1), Expert(6, 2, dropout=0.2)]).experts)
    assert not are_alike(Experts([nn.Linear(6, 6), nn.Linear(6, 6)]).experts)


class Operations(TorchDispatchMode):
    """Counts the operations that reach the device."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(num_experts, training):
    """Of a block on the meta device, where whatever depends on data raises."""
    block = SparseMoEBlock(MoE(8, num_experts), add_ff_before=True).to("meta").train(training)
    x = torch.empty(2, 32, 8, device="meta", requires_grad=training)
    mask = torch.ones(2, 32, dtype=torch.bool, device="meta")
    with Operations() as forward:
        outputs, auxiliary, *_ = block(x, mask=mask)
    assert outputs.shape == x.shape
    if training:
        (outputs.sum() + auxiliary).backward()
        assert all(parameter.grad is not None for parameter in block.parameters())
    return forward.counts


@pytest.mark.parametrize("training", [True, False])
def test_operations_do_not_grow_with_the_number_of_experts(training):
    few, many = operations(4, training), operations(32, training)
    assert few.total() > 50
    assert few == many


def test_backward_grows_by_nothing_but_the_gradients_of_the_stacked_weights():
    grown = Counter()
    for sign, num_experts in ((-1, 4), (1, 32)):
        experts = Experts([Expert(8, 2) for _ in range(num_experts)]).to("meta")
        outputs = experts(torch.empty(2, num_experts, 4, 8, device="meta", requires_grad=True))
        with Operations() as backward:
            outputs.sum().backward()
        for name, count in backward.counts.items():
            grown[name] += sign * count
    assert {name for name, count in grown.items() if count} <= {"detach", "select", "new_empty_strided", "copy_"}, grown


def test_other_devices_than_the_cpu_take_the_batched_path():
    with patch("st_moe_pytorch.experts.run_stacked", wraps=run_stacked) as stacked:
        alike().to("meta")(torch.empty(1, 3, 2, 6, device="meta"))
        alike()(torch.empty(1, 3, 2, 6))
        Experts([Expert(6, 2), Expert(6, 3)]).to("meta")(torch.empty(1, 2, 2, 6, device="meta"))
    assert stacked.call_count == 1


@pytest.mark.compile
def test_the_batched_path_compiles_to_one_graph_of_a_size():
    sizes = []

    def recording(graph, example_inputs):
        sizes.append(sum(node.op != "placeholder" for node in graph.graph.nodes))
        return graph.forward

    for num_experts in (3, 6):
        torch._dynamo.reset()
        block = SparseMoEBlock(MoE(8, num_experts)).to("meta")
        torch.compile(block, fullgraph=True, backend=recording)(torch.empty(2, 16, 8, device="meta"))
    assert len(sizes) == 2
    assert sizes[0] == sizes[1] > 50
