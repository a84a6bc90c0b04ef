"""Expert parallelism against one process that runs each rank's tokens in turn through the unsharded model."""

import copy
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from st_moe_pytorch import Expert, ExpertChoiceGating, MoE, TopNGating
from st_moe_pytorch.distributed import check_expert_parallel, data_parallel, shard_experts
from st_moe_pytorch.experts import run_shared

RANKS = (1, 2, 3, 4, 5, 8)
EXPERTS = (1, 3, 4, 5, 8)
DIM = 6


class Model(nn.Module):
    """A layer before the MoE, so that the gradients that leave it are seen in a parameter."""

    def __init__(self, num_experts, **options):
        super().__init__()
        self.before = nn.Linear(DIM, DIM)
        experts = [Expert(DIM, 1 + number % 2, prenorm=number % 3 == 1) for number in range(num_experts)]
        options = {"gating_top_n": min(2, num_experts), "experts": experts} | options
        self.moe = MoE(DIM, num_experts, balance_loss_coef=0.3, router_z_loss_coef=0.1, **options)

    def forward(self, x, mask=None):
        return self.moe(self.before(x), mask=mask)


def loss_of(model, batch, rank):
    """A rank's loss: a random linear function of its outputs and the auxiliary losses, times its weight."""
    x, mask, cotangent, weight = batch
    torch.manual_seed(rank)  # the same draws for this rank's tokens wherever they are routed
    outputs, auxiliary, *_ = model(x, mask=mask)
    return outputs, ((outputs * cotangent).sum() + auxiliary) * weight


def batch_of(rank, ranks, case):
    """Tokens of a rank, others and of another number on each, and where ranks differ none at all on one of them."""
    generator = torch.Generator().manual_seed(100 + rank)
    b, n = {"equal": (2, 5), "one expert": (2, 7)}.get(case, (rank % 3 + 1, 3 + 2 * rank))
    if case in ("ragged", "weighted", "experts choose") and rank == ranks // 2 and ranks > 1:
        b, n = ((0, 4), (2, 0))[ranks % 2]
    x, cotangent = torch.randn(2, b, n, DIM, generator=generator, dtype=torch.float64)
    mask = torch.rand(b, n, generator=generator) < 0.7 if case in ("ragged", "weighted", "experts choose") else None
    return x.requires_grad_(), mask, cotangent, b * n if case == "weighted" else 1.0


def build(num_experts, case):
    torch.manual_seed(num_experts)
    options = {"capacity_factor_train": None} if case == "ragged" else {"capacity_factor_train": 1.0}
    if case == "experts choose":
        settings = {"capacity_factor_train": 0.8, "min_expert_capacity": 1, "straight_through_dispatch_tensor": True}
        options = {"gate": ExpertChoiceGating(DIM, num_experts, **settings)}
    model = Model(num_experts, **options).double()
    if case == "one expert":
        with torch.no_grad():
            model.before.bias += 3
            model.moe.gate.to_gates.weight[num_experts // 2] = 5
    return model


def one_process(model, ranks, case):
    """Each rank's outputs, gradients of its x, and gradients of the parameters, of the mean of all ranks' losses."""
    batches = [batch_of(rank, ranks, case) for rank in range(ranks)]
    weights = [batch[3] for batch in batches]
    scale = ranks / sum(weights) if case == "weighted" else 1.0
    results = [loss_of(model, batch, rank) for rank, batch in enumerate(batches)]
    sum(loss * scale / ranks for _, loss in results).backward()
    return [(outputs, batch[0].grad * ranks) for (outputs, _), batch in zip(results, batches, strict=True)], dict(
        model.named_parameters()
    )


def relative_error(got, expected):
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if got.numel() == 0:
        return 0.0
    error = ((got - expected).abs().max() / expected.abs().max()).item() if expected.any() else got.abs().max().item()
    return error if error == error else float("inf")


def compare(ddp, rank, ranks, case, expected, gradients):
    """Largest relative error of a rank's outputs and gradients, x's and all parameters'."""
    batch = batch_of(rank, ranks, case)
    outputs, loss = loss_of(ddp, batch, rank)
    scale = ranks / sum(batch_of(r, ranks, case)[3] for r in range(ranks)) if case == "weighted" else 1.0
    (loss * scale).backward()
    errors = {
        "outputs": relative_error(outputs, expected[rank][0]),
        "x": relative_error(batch[0].grad, expected[rank][1]),
    }
    for name, parameter in ddp.module.named_parameters():
        errors[name] = relative_error(parameter.grad, gradients[name].grad)
    return errors


def exactness(rank, num_experts, case):
    """All ways to run a model over ranks against one process."""
    ranks, model = dist.get_world_size(), build(num_experts, case)
    single = copy.deepcopy(model)
    expected, gradients = one_process(single, ranks, case)
    if num_experts > 1:  # a single expert leaves the router nothing to learn
        assert min(p.grad.abs().max() for name, p in gradients.items() if "experts" not in name) > 1e-6
    errors = {}
    for strategy in ("all_to_all", "all_gather"):
        sharded = data_parallel(shard_experts(copy.deepcopy(model), strategy=strategy))
        errors["sharded", strategy] = compare(sharded, rank, ranks, case, expected, gradients)
        whole = copy.deepcopy(model)
        whole.moe.experts.is_distributed, whole.moe.experts.strategy = True, strategy
        errors["whole", strategy] = compare(DistributedDataParallel(whole), rank, ranks, case, expected, gradients)
    return {(*way, name): error for way, named in errors.items() for name, error in named.items()}


# ragged tokens for all numbers of ranks and experts; the other cases take turns, so that each meets all numbers of both
CASES = [(ranks, number, "ragged") for ranks in RANKS for number in EXPERTS]
CASES += [
    (ranks, number, ("equal", "weighted", "one expert")[(i + j) % 3])
    for i, ranks in enumerate(RANKS)
    for j, number in enumerate(EXPERTS)
]
CASES += [(2, 4, "experts choose"), (3, 5, "experts choose")]


@pytest.mark.parametrize(("workers", "num_experts", "case"), CASES, indirect=["workers"])
def test_everything_equals_one_process(workers, num_experts, case):
    errors = {key: error for result in workers.run(exactness, num_experts, case) for key, error in result.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-12, {key: error for key, error in errors.items() if error >= 1e-12}


def shared_products(rank, ranks, num_experts):
    """Experts of one shape, through products that those of a rank have in common, as on accelerators."""
    torch.manual_seed(0)
    experts = [Expert(DIM, 2, prenorm=True) for _ in range(num_experts)]
    moe = MoE(DIM, num_experts, experts=experts, gating_top_n=2, capacity_factor_train=1.0)
    with (
        patch("st_moe_pytorch.experts.may_share_products", lambda t: True),
        patch("st_moe_pytorch.experts.run_shared", wraps=run_shared) as shared,
    ):
        errors = check_expert_parallel(moe, torch.randn(rank + 1, 3 + rank, DIM))
    return max(errors.values()), shared.call_count - ranks  # one process runs every rank's tokens, too


@pytest.mark.parametrize(("workers", "num_experts"), [(1, 3), (2, 4), (2, 5), (3, 4)], indirect=["workers"])
def test_products_that_experts_of_a_rank_share(workers, num_experts):
    for error, calls in workers.run(shared_products, workers.size, num_experts):
        assert error < 1e-12
        assert calls == 1


def variants(rank, num_experts):
    """Everything that routers and experts can be besides the paper's, over ranks."""
    torch.manual_seed(0)
    gate = TopNGating(
        DIM, num_experts, top_n=3, priority="token", score="sigmoid", normalize_gates=False, balance_bias=True
    )
    nn.init.normal_(gate.bias, std=0.3)
    experts = [Expert(DIM, 2, bias=False) for _ in range(num_experts)]
    moe = MoE(DIM, num_experts, gate=gate, experts=experts, shared_expert=Expert(DIM, 2))
    errors = check_expert_parallel(moe, torch.randn(rank + 1, 3 + rank, DIM))
    return {name: error for name, error in errors.items() if not error < 1e-12}, len(errors)


@pytest.mark.parametrize(("workers", "num_experts"), [(2, 4), (2, 5), (3, 4)], indirect=["workers"])
def test_variants_of_routers_and_experts(workers, num_experts):
    for wrong, compared in workers.run(variants, num_experts):
        assert not wrong
        assert compared > 3 * num_experts + 5
