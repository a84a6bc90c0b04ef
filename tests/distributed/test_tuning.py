"""Tuning a part of a model whose experts are on many ranks, against one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from reference import largest_error, loss_of, stack
from torch import nn

from st_moe_pytorch.distributed import data_parallel, shard_experts
from st_moe_pytorch.tools.count import count_parameters
from st_moe_pytorch.tools.finetune import parameter_subset, set_expert_dropout, switch_init

IS_TUNED = {
    "moe": lambda name: ".moe.gate." in name or ".moe.experts." in name,
    "non_moe": lambda name: ".moe.gate." not in name and ".moe.experts." not in name,
    "feed_forward": lambda name: ".ff_before." in name or ".ff_after." in name,
}


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def train(model, wrapped, losses, freeze):
    """A step of all parameters, and two of some by an optimizer with the state -> models after the first and last."""
    first, optimizer, wrapper = model, optimizer_of(model), wrapped(model)
    losses(wrapper, 0).backward()
    optimizer.step()
    state, model = optimizer.state_dict(), copy.deepcopy(first)  # as from a checkpoint
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(state)
    freeze(model)
    wrapper = wrapped(model)  # DistributedDataParallel does nothing any more where nobody holds it
    for step in (1, 2):
        model.zero_grad()
        losses(wrapper, step).backward()
        optimizer.step()
    return first, model


def check_tuning(rank, subset):
    ranks, model = dist.get_world_size(), stack(3)
    shard = shard_experts(copy.deepcopy(model))

    def freeze(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(IS_TUNED[subset](name))

    def loss_of_all(model, step):
        return sum(loss_of(model, number, step) for number in range(ranks)) / ranks

    def loss_of_mine(model, step):
        return loss_of(model, rank, step)

    _, expected = train(model, lambda model: model, loss_of_all, freeze)
    first, tuned = train(shard, data_parallel, loss_of_mine, lambda model: parameter_subset(model, subset))
    name, error = largest_error(tuned, expected, of=lambda parameter: parameter)
    assert error < 1e-12, (name, error)
    for name, parameter in tuned.named_parameters():
        assert torch.equal(parameter, first.get_parameter(name)) != IS_TUNED[subset](name), name


@pytest.mark.parametrize("subset", IS_TUNED)
@pytest.mark.parametrize("workers", [2], indirect=True)
def test_a_subset_is_tuned_as_in_one_process(workers, subset):
    workers.run(check_tuning, subset)


def check_others(rank):
    model = stack(4)
    parameter_subset(model, "feed_forward")
    model = shard_experts(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == IS_TUNED["feed_forward"](name), name
    set_expert_dropout(model, 0.3)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.3] * 4
    with pytest.raises(ValueError, match="model must get its initial values before shard_experts"):
        model.apply(switch_init)
    with pytest.raises(ValueError, match="model must be counted before shard_experts"):
        count_parameters(model)


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_what_a_sharded_model_can_be_told(workers):
    workers.run(check_others)
