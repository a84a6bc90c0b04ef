"""Every collective against its adjoint: the sum over ranks of <A x, y> is that of <x, A^T y>."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from st_moe_pytorch.distributed import (
    AllGather,
    all_gather_variable_dim,
    gather_sizes,
    has_only_one_value,
    pad_dim_to,
    split_by_rank,
)
from st_moe_pytorch.distributed.agreement import Results, gather_counts
from st_moe_pytorch.distributed.collectives import Channel, all_gather, all_to_all, join_replicas, scale_gradient

CHANNEL = Channel("test")


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(value):
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def check_all_to_all(rank):
    ranks = dist.get_world_size()
    traffic = [[(3 * s + 2 * r) % 4 for r in range(ranks)] for s in range(ranks)]
    sent, received = traffic[rank], [line[rank] for line in traffic]
    x, y = random(sum(sent), 3, seed=rank).requires_grad_(), random(sum(received), 3, seed=100 + rank)
    output = all_to_all(x, sent, received, CHANNEL)
    blocks = [random(sum(traffic[s]), 3, seed=s).split(traffic[s])[rank] for s in range(ranks)]
    assert torch.equal(output, torch.cat(blocks))
    (gradient,) = torch.autograd.grad(output, x, y, create_graph=True)
    torch.testing.assert_close(total((output * y).sum()), total((x * gradient).sum()), rtol=1e-13, atol=1e-13)


def check_all_gather(rank):
    ranks = dist.get_world_size()
    sizes = [(2 * r + 1) % 4 for r in range(ranks)]
    x = random(sizes[rank], 3, seed=rank).requires_grad_()
    ys = [random(sum(sizes), 3, seed=100 + r) for r in range(ranks)]
    output = all_gather(x, sizes, CHANNEL)
    assert torch.equal(output, torch.cat([random(size, 3, seed=r) for r, size in enumerate(sizes)]))
    (gradient,) = torch.autograd.grad(output, x, ys[rank])
    torch.testing.assert_close(gradient, sum(y.split(sizes)[rank] for y in ys), rtol=1e-13, atol=1e-13)


def check_join_replicas(rank):
    ranks = dist.get_world_size()
    holders = [
        range(0, 2),
        range(ranks),
        range(rank, rank + 1),
    ]  # two share the first, all the second, nobody the third
    held = [i for i, where in enumerate(holders) if rank in where]
    shapes, dtypes = [(3,), (2, 5), (4,)], [torch.bfloat16, torch.float64, torch.float64]

    def gradients(r):
        return [
            random(*shape, seed=10 * r + i).to(dtype)
            for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
        ]

    rows, parameters = (
        random(2, 3, seed=7).requires_grad_(),
        [torch.zeros(shapes[i], dtype=dtypes[i], requires_grad=True) for i in held],
    )
    joined = join_replicas(rows, parameters, [holders[i] for i in held], CHANNEL, None)
    rows_gradient, *got = torch.autograd.grad(joined, [rows, *parameters], [rows, *(gradients(rank)[i] for i in held)])
    assert torch.equal(rows_gradient, rows)
    for i, gradient in zip(held, got, strict=True):
        expected = gradients(holders[i][0])[i]
        for r in holders[i][1:]:
            expected = expected + gradients(r)[i]
        assert torch.equal(gradient, expected)  # to the bit: in rank order


def check_replicas_of_other_formats(rank):
    """Gradients lie in memory as each rank's experts left them, one number for all of them included."""
    ranks = dist.get_world_size()
    formats = [lambda t: t, lambda t: t.t().contiguous().t(), lambda t: t[:1, :1].expand_as(t)]
    gradients = [formats[r % 3](random(4, 4, seed=r)) for r in range(ranks)]
    for holders, replicas in ((range(ranks), None), (range(rank, rank + 1), CHANNEL)):
        parameter = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
        _, joined = join_replicas(random(1, seed=0).requires_grad_(), [parameter], [holders], CHANNEL, replicas)
        (got,) = torch.autograd.grad(joined, parameter, gradients[rank])
        torch.testing.assert_close(got, sum(gradients), rtol=1e-14, atol=1e-14)


def check_gather_counts(rank):
    ranks = dist.get_world_size()
    for experts in (1, 254, 255, 300, 600):
        mine = torch.arange(experts) + rank * 1000
        counts, needs_grad, dtype = gather_counts(mine, rank == 1, {"layer": "test"}, {}, CHANNEL)
        assert dtype is None
        assert counts == [[r * 1000 + e for e in range(experts)] for r in range(ranks)]
        assert needs_grad


def check_promised_results(rank):
    """The dtype of all ranks' results is known if each has promised one, of the same width."""
    mine = torch.zeros(4, dtype=torch.int64)

    def agreed(promised):
        return gather_counts(mine, False, {"layer": "test"}, {}, CHANNEL, promised)[2]

    assert agreed(Results(torch.float32, 8)) == torch.float32
    assert agreed(Results([torch.float16, torch.bfloat16, torch.float16][rank], 8)) == torch.float32
    assert agreed(Results(torch.float32, 8) if rank else None) is None
    assert agreed(Results(torch.float32, 8 + rank)) is None


def check_helpers_of_0_1_8(rank):
    ranks = dist.get_world_size()
    x = random(2, rank + 1, 3, seed=rank).requires_grad_()
    ys = [random(2, ranks * (ranks + 1) // 2, 3, seed=50 + r) for r in range(ranks)]
    expected = torch.cat([random(2, r + 1, 3, seed=r) for r in range(ranks)], dim=1)
    sizes = gather_sizes(x, dim=1)
    assert sizes.tolist() == list(range(1, ranks + 1))
    assert not has_only_one_value(sizes)
    for gathered, found in (AllGather(dim=1)(x), AllGather(dim=1)(x, sizes), all_gather_variable_dim(x, dim=-2)):
        assert torch.equal(gathered, expected)
        assert torch.equal(found, sizes)
        (gradient,) = torch.autograd.grad(gathered, x, ys[rank])
        torch.testing.assert_close(
            gradient, sum(y.split(sizes.tolist(), dim=1)[rank] for y in ys), rtol=1e-13, atol=1e-13
        )
    mine, found = split_by_rank(expected.split(sizes.tolist(), dim=1))
    assert torch.equal(mine, x)
    assert found.tolist() == [2] * ranks
    mine, found = split_by_rank(torch.arange(ranks * 6).view(ranks, 6))
    assert mine.tolist() == list(range(rank * 6, rank * 6 + 6))
    assert found.tolist() == [6] * ranks


def check_gradients_of_half_precision(rank):
    for dtype in (torch.bfloat16, torch.float16):
        x = random(3, 2, seed=rank).to(dtype).requires_grad_()
        gathered = all_gather(x, [3] * dist.get_world_size(), CHANNEL)
        (gradient,) = torch.autograd.grad(gathered, x, torch.ones_like(gathered))
        assert torch.equal(gradient, torch.full_like(x, dist.get_world_size()))


CHECKS = [
    check_all_to_all,
    check_all_gather,
    check_join_replicas,
    check_replicas_of_other_formats,
    check_gather_counts,
    check_promised_results,
    check_helpers_of_0_1_8,
    check_gradients_of_half_precision,
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("workers", [3], indirect=True)
def test_collective(workers, check):
    workers.run(check)


def test_scaled_gradient():
    x = torch.ones(2, requires_grad=True)
    (gradient,) = torch.autograd.grad(scale_gradient(x, 0.25, "test").sum(), x)
    assert gradient.tolist() == [0.25, 0.25]


def test_padding_and_single_values():
    assert pad_dim_to(torch.ones(2, 1), 3, dim=-1).tolist() == [[1, 0, 0], [1, 0, 0]]
    assert pad_dim_to(torch.ones(1, 2), 2).tolist() == [[1, 1], [0, 0]]
    assert has_only_one_value(torch.tensor([3, 3]))


def test_ranks_without_copies_send_on_the_device_of_their_rows():
    """As NCCL asks for; seen on the meta device, with a collective that only looks."""
    seen = []

    def look(self, collective, *tensors, **options):
        seen.extend(t.device.type for t in tensors if isinstance(t, torch.Tensor))

    rows = torch.empty(2, 3, device="meta", requires_grad=True)
    with patch.object(Channel, "call", look), patch.object(Channel, "size", 2):
        join_replicas(rows, [], [], CHANNEL, None)[0].sum().backward()
    assert seen == ["meta", "meta"]
