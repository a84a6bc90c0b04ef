"""Random models, batches and ways to shard, against one process: what nobody thought of has to be right too."""

import copy
import random

import pytest
import torch
import torch.distributed as dist
from reference import DIM, relative_error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from st_moe_pytorch import Expert, Experts, MoE, TopNGating
from st_moe_pytorch.distributed import clip_grad_norm_, data_parallel, shard_experts


class Checkpointed(nn.Module):
    def __init__(self, module, use_reentrant):
        super().__init__()
        self.module, self.use_reentrant = module, use_reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.use_reentrant)


class Rounded(nn.Module):
    """An expert whose results are float32."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x).float()


class Schedule:
    """All that is random about a run, the same on every rank."""

    def __init__(self, seed, ranks):
        self.seed, self.ranks = seed, ranks
        self.draw = random.Random(100 * seed + ranks)
        self.replicas = self.draw.choice([1, 2]) if ranks == 4 else 1
        self.strategy = self.draw.choice(["all_to_all", "all_gather"])
        self.experts = [self.draw.randint(1, 7) for _ in range(self.draw.randint(1, 3))]
        self.rounded = self.draw.random() < 0.2
        self.calls = self.draw.randint(1, 2)
        self.model = self.build()

    def build(self):
        torch.manual_seed(self.seed)
        model = nn.ModuleList()
        for number in self.experts:
            gate = TopNGating(
                DIM,
                number,
                top_n=self.draw.randint(1, min(3, number)),
                capacity_factor_train=self.draw.choice([None, 0.7, 1.25]),
                policy_train=self.draw.choice(["all", "random", "threshold", "none"]),
                priority=self.draw.choice(["position", "gate"]),
                group_size=self.draw.choice([None, None, 4]),
                straight_through_dispatch_tensor=self.draw.random() < 0.7,
            )
            experts = Experts([self.expert(number) for _ in range(number)])
            self.tie(experts.experts)
            model.append(MoE(DIM, number, experts=experts, gate=gate, balance_loss_coef=0.3))
        return model.double()

    def expert(self, number):
        kind = self.draw.choice(["expert", "linear", "checkpointed", "reentrant", "normed"])
        made = (
            nn.Linear(DIM, DIM) if kind == "linear" else Expert(DIM, self.draw.choice([1, 2]), prenorm=kind == "normed")
        )
        if kind == "checkpointed" or (kind == "reentrant" and (number % self.ranks or self.replicas > 1)):
            made = Checkpointed(made, False)
        elif kind == "reentrant":
            made = Checkpointed(made, True)
        for parameter in made.parameters():
            parameter.requires_grad_(self.draw.random() < 0.8)
        return Rounded(made) if self.rounded and self.draw.random() < 0.5 else made

    def tie(self, experts):
        """Give some experts the matrix of another one."""
        plain = [expert for expert in experts if isinstance(expert, nn.Linear)]
        for expert in plain[1:]:
            if self.draw.random() < 0.5:
                expert.weight = plain[0].weight

    def batch(self, rank, call):
        generator = torch.Generator().manual_seed(1000 * self.seed + 10 * rank + call)
        b, n = (self.seed + rank + call) % 3, 2 + (3 * rank + self.seed) % 5
        x, cotangent = torch.randn(2, b, n, DIM, generator=generator, dtype=torch.float64)
        mask = None if (self.seed + rank) % 3 else torch.rand(b, n, generator=generator) < 0.6
        return x.requires_grad_((self.seed + rank) % 4 > 0), cotangent, mask

    def run(self, model, rank, scale=1.0):
        """Outputs and gradients of x of every call of a rank, whose losses are summed."""
        torch.manual_seed(rank)
        losses, found = [], []
        for call in range(self.calls):
            x, cotangent, mask = self.batch(rank, call)
            outputs, auxiliary = model(x, mask)
            losses.append((outputs * cotangent).sum() + auxiliary)
            found.append((outputs, x))
        (sum(losses) * scale).backward()
        return [(outputs.detach(), x.grad) for outputs, x in found]


class Residual(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.before = nn.Linear(
            DIM, DIM
        ).double()  # so that tokens need gradients, without which one kind of checkpointing gives none
        self.layers = layers

    def forward(self, x, mask):
        x, auxiliary = self.before(x), x.new_zeros(())
        for layer in self.layers:
            outputs, loss, *_ = layer(x, mask=mask)
            x, auxiliary = x + outputs, auxiliary + loss
        return x, auxiliary


def check(rank, seed):
    ranks = dist.get_world_size()
    schedule = Schedule(seed, ranks)
    single = Residual(schedule.model)
    sharded = copy.deepcopy(single)
    expected = [schedule.run(single, other, 1 / ranks) for other in range(ranks)][rank]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep")) if schedule.replicas == 2 else None
    ddp = data_parallel(shard_experts(sharded, mesh, schedule.strategy), find_unused_parameters=True)
    found = schedule.run(ddp, rank)
    bound = 1e-5 if schedule.rounded else 1e-11
    for (outputs, grad), (wanted, wanted_grad) in zip(found, expected, strict=True):
        assert relative_error(outputs, wanted) < bound
        assert (grad is None) == (wanted_grad is None)
        if grad is not None:
            assert relative_error(grad, wanted_grad * ranks) < bound
    wanted = dict(single.named_parameters(remove_duplicate=False))
    for name, parameter in sharded.named_parameters(remove_duplicate=False):
        theirs = wanted[name].grad
        assert parameter.grad is None or theirs is not None or not parameter.grad.any(), name
        if theirs is not None:
            assert relative_error(parameter.grad, theirs) < bound or (parameter.grad - theirs).abs().max() < 1e-14, name
    norm = nn.utils.get_total_norm([p.grad for p in single.parameters() if p.grad is not None])
    assert relative_error(clip_grad_norm_(sharded, 1.0), norm.double()) < bound


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("workers", [2, 3, 4], indirect=True)
def test_any_schedule_equals_one_process(workers, seed):
    workers.run(check, seed)
