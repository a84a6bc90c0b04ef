"""torch.distributed.checkpoint: what one number of ranks saves, any other loads, to the bit."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import Workers
from reference import largest_error, loss_of, stack, train_one_process
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from st_moe_pytorch.distributed import clip_grad_norm_, data_parallel, full_state_dict, shard_experts

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
BATCHES = 4  # the batch is that of four ranks, on whatever number of them


def step_of(ddp, optimizer, step):
    """A step on the global batch, whose parts the ranks take in turns.

    Every rank runs as many forwards, some without weight.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    optimizer.zero_grad()
    for first in range(0, BATCHES, ranks):
        part = first + rank
        loss = loss_of(ddp, part % BATCHES, step) * (ranks / BATCHES if part < BATCHES else 0.0)
        loss.backward()
    clip_grad_norm_(ddp, 1.0)
    optimizer.step()


def build(num_experts):
    ddp = data_parallel(shard_experts(stack(num_experts)))
    return ddp, torch.optim.AdamW(ddp.parameters(), lr=1e-2)


def states(ddp, optimizer):
    model, optimizer = get_state_dict(ddp, optimizer, options=OPTIONS)
    return {"model": model, "optimizer": optimizer}


def save(rank, num_experts, path):
    ddp, optimizer = build(num_experts)
    for step in range(2):
        step_of(ddp, optimizer, step)
    dcp.save(states(ddp, optimizer), checkpoint_id=path)
    full = full_state_dict(ddp.module)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(
        everyone, {k: v for k, v in states(ddp, optimizer)["optimizer"].items() if isinstance(v, torch.Tensor)}
    )
    if rank == 0:
        torch.save(
            {"model": full, "optimizer": {name: t for theirs in everyone for name, t in theirs.items()}},
            f"{path}/whole.pt",
        )


def load(rank, num_experts, path):
    ddp, optimizer = build(num_experts)
    loaded = states(ddp, optimizer)
    dcp.load(loaded, checkpoint_id=path)
    set_state_dict(
        ddp, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=OPTIONS
    )
    whole, now = torch.load(f"{path}/whole.pt"), states(ddp, optimizer)
    assert all(torch.equal(t, whole["model"][name]) for name, t in now["model"].items())
    tensors = {name: t for name, t in now["optimizer"].items() if isinstance(t, torch.Tensor)}
    assert len(tensors) >= 3 * len(list(ddp.parameters()))
    assert all(torch.equal(t, whole["optimizer"][name]) for name, t in tensors.items())
    assert any(t.any() for name, t in tensors.items() if "experts" in name)

    step_of(ddp, optimizer, 2)
    expected, _ = train_one_process(stack(num_experts), BATCHES, steps=3)
    name, error = largest_error(ddp.module, expected, of=lambda p: p)
    assert error < 1e-11, (name, error)
    return error


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of 3, 5 and 8 experts, written by four ranks after two steps."""
    four, paths = Workers(4), {}
    for num_experts in (3, 5, 8):
        paths[num_experts] = str(tmp_path_factory.mktemp("checkpoint"))
        four.run(save, num_experts, paths[num_experts])
    four.close()
    return paths


@pytest.mark.parametrize("num_experts", [3, 5, 8])
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8], indirect=True)
def test_four_ranks_save_and_any_number_loads_and_trains_on(workers, num_experts, saved):
    workers.run(load, num_experts, saved[num_experts])


def load_full(rank):
    """A whole model's state_dict, such as 0.1.8's, loads strict into a shard before or after it is in data_parallel."""
    single = stack(3)
    state = {name: t + 1 for name, t in single.state_dict().items()}
    ddp = data_parallel(shard_experts(copy.deepcopy(single)))
    ddp.module.load_state_dict(state, strict=True)
    assert all(torch.equal(t, state[name]) for name, t in full_state_dict(ddp.module).items())
    assert set(full_state_dict(ddp.module)) == set(state)


@pytest.mark.parametrize("workers", [3], indirect=True)
def test_full_state_dict_loads_strict_into_shards(workers):
    workers.run(load_full)
