"""Replayed routing over ranks: each replays its own tokens, with choices from a file of one process or many."""

import pytest
import torch
import torch.distributed as dist
from reference import largest_error, loss_of, relative_error, stack

from st_moe_pytorch.distributed import shard_experts
from st_moe_pytorch.tools.replay import choices_of, replay_routing
from st_moe_pytorch.tools.watch import record_routing


def forget(model):
    """Other routers, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "to_gates" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def check(rank, folder, strategy, reentrant):
    """Records of one process are replayed by sharded layers -> outputs, and gradients of the mean loss of all ranks."""
    ranks = dist.get_world_size()
    unsharded = stack(5, reentrant=reentrant)
    with record_routing(unsharded) as records:
        loss_of(unsharded, rank)
    torch.save(choices_of(records), f"{folder}/{rank}.pt")
    dist.barrier()

    expected, losses, differing = forget(stack(5)), [], []
    for other in range(ranks):
        with replay_routing(expected, torch.load(f"{folder}/{other}.pt", weights_only=True)) as replay:
            losses.append(loss_of(expected, other))
        differing.append(replay.differing)
    (sum(losses) / ranks).backward()

    sharded = shard_experts(forget(stack(5, reentrant=reentrant)), strategy=strategy)
    choices = torch.load(f"{folder}/{rank}.pt", weights_only=True)
    with replay_routing(sharded, choices) as replay, record_routing(sharded) as again:
        loss = loss_of(sharded, rank)
        loss.backward()
    for name, (routing,) in again.items():
        assert torch.equal(routing.indices, records[name][0].indices)
        assert torch.equal(routing.kept, records[name][0].kept)
    for name, parameter in sharded.named_parameters():
        if ".experts.experts." not in name:
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks
    assert relative_error(loss.detach(), losses[rank].detach()) < 1e-12
    name, error = largest_error(sharded, expected)
    assert error < 1e-12, name
    assert replay.differing == differing[rank]
    assert max(differing) > 0.1
    with record_routing(expected) as free:
        loss_of(expected, 0)
    assert (
        any(not torch.equal(routing.indices, again[name][0].indices) for name, (routing,) in free.items()) or rank > 0
    )


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("strategy", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("workers", [2, 3], indirect=True)
def test_sharded_layers_replay_what_one_process_recorded(workers, strategy, reentrant, tmp_path):
    workers.run(check, str(tmp_path), strategy, reentrant)
