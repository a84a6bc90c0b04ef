"""The record: small tables, written by hand, of where every token goes."""

import torch
from torch import Tensor

from st_moe_pytorch import Routing
from st_moe_pytorch.routing import assign_slots

YES, NO = True, False


def test_first_choices_are_served_before_second_ones():
    # three tokens; expert 1 is the first choice of the last token and the second one of the others
    indices = torch.tensor([[[0, 1], [0, 1], [1, 0]]])
    asked = torch.ones_like(indices, dtype=torch.bool)
    assert assign_slots(indices, asked, 2).tolist() == [[[0, 1], [1, 2], [0, 2]]]
    # a choice that is not asked for takes no place
    asked[0, 0, 1] = False
    assert assign_slots(indices, asked, 2)[0, 1:].tolist() == [[1, 1], [0, 2]]
    # the second token first
    asked[:] = True
    assert assign_slots(indices, asked, 2, torch.tensor([[1, 0, 2]])).tolist() == [[[1, 2], [0, 1], [0, 2]]]


def example(gates: Tensor | None = None) -> Routing:
    """Two sequences of two tokens, three experts with one slot each.

    Sequence 0: both tokens choose expert 2 first, so the second one is dropped there; only token 0 asks for a second
    expert, 0. Sequence 1: token 0 goes to expert 1 and does not ask for expert 0; token 1 is padding.
    """
    if gates is None:
        gates = torch.tensor([[[0.75, 0.25], [0.5, 0.5]], [[0.875, 0.125], [0.6, 0.4]]])
    return Routing(
        indices=torch.tensor([[[2, 0], [2, 1]], [[1, 0], [0, 1]]]),
        slots=torch.tensor([[[0, 0], [-1, -1]], [[0, -1], [-1, -1]]]),
        gates=gates,
        kept=torch.tensor([[[YES, YES], [NO, NO]], [[YES, NO], [NO, NO]]]),
        asked=torch.tensor([[[YES, YES], [YES, NO]], [[YES, NO], [NO, NO]]]),
        mask=torch.tensor([[YES, YES], [YES, NO]]),
        logits=torch.zeros(2, 2, 3),
        balance_loss=torch.tensor(0.0),
        router_z_loss=torch.tensor(0.0),
        capacity=1,
        num_experts=3,
        groups=(2, 2),
        straight_through=True,
    )


def test_every_choice_says_why():
    routing = example()
    outcome = routing.kept * 1 + routing.dropped * 2 + routing.not_asked * 3 + routing.masked * 4
    assert outcome.tolist() == [[[1, 1], [2, 3]], [[1, 3], [4, 4]]]


def test_rows_are_sorted_by_expert_and_hold_only_kept_choices():
    x = torch.tensor([[[10.0], [11]], [[20], [21]]])
    layout = example().rows()
    # as many rows as slots, of which there are fewer than choices, and nobody's
    assert layout.offsets.tolist() == [1, 2, 3]
    assert layout.offsets.dtype == torch.int32
    # a choice's number is token * k + rank, and 8 is none
    assert layout.choices.tolist() == [1, 4, 0, 8, 8, 8, 8]
    assert layout.places.tolist() == [[2, 0], [6, 6], [1, 6], [6, 6]]
    rows = example().dispatch(x, layout)
    assert rows[:3].flatten().tolist() == [10, 20, 10]
    assert rows[-1] == 0
    nan = torch.nan  # nobody reads what stands behind the last expert's rows
    combined = example().combine(torch.tensor([[100.0], [200], [300], [nan], [nan], [nan], [0]]), layout)
    assert combined.flatten().tolist() == [0.25 * 100 + 0.75 * 300, 0, 0.875 * 200, 0]


def test_rows_of_an_expert_are_in_the_order_of_their_tokens():
    """A sort that is not stable keeps the order of a few."""
    b, n, k, e = 2, 60, 2, 3
    indices = torch.rand(b, n, e).argsort(-1)[..., :k]
    kept = torch.rand(b, n, k) < 0.8
    slots = torch.zeros_like(indices)
    layout = example()._replace(indices=indices, slots=slots, kept=kept, capacity=n, groups=(b, n)).rows()
    expert_of = indices.masked_fill(~kept, e).flatten().tolist()
    expected = [choice for expert in range(e) for choice in range(b * n * k) if expert_of[choice] == expert]
    assert layout.choices[: layout.offsets[-1]].tolist() == expected


def test_slots_hold_kept_choices_and_zeros():
    x = torch.tensor([[[10.0], [11]], [[20], [21]]])
    slots = example().dispatch(x)
    assert slots[..., 0, 0].tolist() == [[10, 0, 10], [0, 20, 0]]
    combined = example().combine(torch.tensor([[100.0, 101, 300], [201, 200, 202]])[..., None, None])
    assert combined.flatten().tolist() == [0.25 * 100 + 0.75 * 300, 0, 0.875 * 200, 0]


def test_dense_tensors_say_the_same():
    dispatch, combine = example().dense()
    assert dispatch.shape == (2, 2, 3, 1)
    assert dispatch[..., 0].tolist() == [[[1, 0, 1], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]]]
    assert torch.equal(combine[0, 0, :, 0], torch.tensor([0.25, 0, 0.75]))


def test_straight_through_scales_by_exactly_one_and_passes_the_gradient():
    gates = example().gates.requires_grad_()
    x = torch.tensor([[[10.0], [11]], [[20], [21]]])
    for rows in (example(gates).dispatch(x, example().rows()), example(gates).dispatch(x)):
        (gradient,) = torch.autograd.grad(rows.sum(), gates)
        assert gradient.tolist() == [[[10, 10], [0, 0]], [[20, 0], [0, 0]]]
    assert not example(gates)._replace(straight_through=False).dispatch(x).requires_grad
