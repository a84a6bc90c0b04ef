"""What the backward keeps: linear in the length of a sequence, and little more than what the experts alone keep."""

import torch
from torch.autograd.graph import saved_tensors_hooks

from st_moe_pytorch import MoE


def bytes_kept(forward, parameters):
    """Size of the memory, but for parameters, that a forward saves for its backward."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t  # alive, so that no other tensor gets its place
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        forward()
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in known)


def layer_and_experts(n, capacity_factor=1.25):
    """Bytes that a layer keeps, and that its experts keep on the same rows."""
    torch.manual_seed(0)
    moe = MoE(64, 16, capacity_factor_train=capacity_factor)
    x = torch.randn(1, n, 64, requires_grad=True)
    torch.manual_seed(1)
    routing = moe.gate.route(x)
    layout = routing.rows()
    rows = routing.dispatch(x, layout).detach().requires_grad_()
    torch.manual_seed(1)
    return bytes_kept(lambda: moe(x), moe.parameters()), bytes_kept(
        lambda: moe.experts(rows, layout.offsets), moe.parameters()
    )


def test_the_layer_keeps_little_more_than_its_experts():
    for n in (512, 2048):
        layer, experts = layer_and_experts(n)
        assert experts > n * 64 * 4
        assert layer < 1.4 * experts


def test_memory_is_linear_in_the_length_and_dropless_costs_no_slots():
    short, _ = layer_and_experts(1024)
    long, _ = layer_and_experts(16384)
    assert long < 1.1 * 16 * short
    dropless, experts = layer_and_experts(4096, None)
    assert dropless < 1.4 * experts


def test_a_row_keeps_at_most_three_fifths_of_what_plain_operations_would():
    """At the README's size, plain operations keep 4 d + 5 h numbers a row, or 34.8 KiB, and the tokens themselves."""
    torch.manual_seed(0)
    moe = MoE(512, 16)
    x = torch.randn(4, 1024, 512, requires_grad=True)
    torch.manual_seed(1)
    kept = int(moe.gate.route(x).kept.sum())
    torch.manual_seed(1)
    per_row = (bytes_kept(lambda: moe(x), moe.parameters()) - x.untyped_storage().nbytes()) / kept
    assert 2 * 512 * 4 + 3 * 1365 * 4 < per_row < 0.6 * 34.8 * 1024
