"""A proof that anyone can run: the gradients of a sharded layer are those of one process."""

import copy
import math

import torch
from torch import Tensor, nn

from st_moe_pytorch.distributed.agreement import gather_objects
from st_moe_pytorch.distributed.collectives import Channel
from st_moe_pytorch.distributed.compat import ProcessGroup
from st_moe_pytorch.distributed.sharding import copy_from_first_rank, data_parallel, group_names, shard_experts
from st_moe_pytorch.distributed.strategies import Strategy


def check_expert_parallel(
    moe: nn.Module, x: Tensor, process_group: ProcessGroup | None = None, strategy: str | Strategy = "all_to_all"
) -> dict[str, float]:
    """Prove on your own experts and ranks that sharding changes nothing but rounding; nothing is kept of it.

    moe: an unsharded MoE layer with deterministic experts; that of rank 0 counts. x (b n d): this rank's tokens, of any
        b and n.
    In float64, outputs and gradients of a random function of the layer, sharded over the ranks, are compared with those
    of one process.

    Prints on rank 0 and returns on all ranks the largest relative error ``max |a - b| / max |b|`` of each tensor; about
    1e-15 is exact. NaN, printed as "no gradient", stands for a trainable parameter that got none: nothing is proved of
    it.
    """
    group = group_names(process_group)[0]
    channel = Channel("check_expert_parallel", group)
    single = copy.deepcopy(moe).double()
    copy_from_first_rank(single, channel)
    sharded = shard_experts(copy.deepcopy(single), process_group, strategy)
    xs = [theirs.to(x.device).requires_grad_() for theirs in gather_objects(x.detach().double().cpu(), channel)]

    results = [_random_function(single, theirs, rank) for rank, theirs in enumerate(xs)]
    torch.stack([loss for _, loss in results]).mean().backward()
    tokens = xs[channel.rank].detach().requires_grad_()
    ddp = data_parallel(sharded, channel.group)  # has to live until the backward, in which it averages
    outputs, loss = _random_function(ddp, tokens, channel.rank)
    loss.backward()

    pairs = {
        "outputs": (outputs, results[channel.rank][0]),
        "gradient of x": (tokens.grad, xs[channel.rank].grad * channel.size),
    }
    expected = dict(single.named_parameters(remove_duplicate=False))
    trained = {name: p for name, p in sharded.named_parameters(remove_duplicate=False) if p.requires_grad}
    pairs |= {f"gradient of {name}": (p.grad, expected[name].grad) for name, p in trained.items()}
    worst: dict[str, float] = {}
    for theirs in gather_objects({name: _relative_error(*pair) for name, pair in pairs.items()}, channel):
        for name, error in theirs.items():
            worst[name] = error if math.isnan(error) else max(worst.get(name, 0.0), error)
    if channel.rank == 0:
        print(
            *(f"{'no gradient' if math.isnan(error) else f'{error:.1e}':>11}  {name}" for name, error in worst.items()),
            sep="\n",
        )
    return worst


def _random_function(moe: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Outputs, and a random linear function of them plus the auxiliary loss; all draws depend on the seed only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        outputs, auxiliary, *_ = moe(x)
        return outputs, (outputs * torch.randn_like(outputs)).sum() + auxiliary


def _relative_error(got: Tensor | None, expected: Tensor | None) -> float:
    if got is None or expected is None:
        return math.nan if got is expected else math.inf
    if got.numel() == 0:
        return 0.0
    error, size = (got - expected).abs().max().item(), expected.abs().max().item()
    return error / size if size else error
