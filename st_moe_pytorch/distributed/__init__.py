"""Expert parallelism on torch.distributed: experts on many ranks, with the gradients of one process."""

from st_moe_pytorch.distributed.check import check_expert_parallel
from st_moe_pytorch.distributed.compatibility import (
    AllGather,
    all_gather_variable_dim,
    gather_sizes,
    has_only_one_value,
    pad_dim_to,
    split_by_rank,
)
from st_moe_pytorch.distributed.sharding import (
    clip_grad_norm_,
    data_parallel,
    full_state_dict,
    shard_experts,
    sharded_parameters,
)
from st_moe_pytorch.distributed.strategies import Strategy

__all__ = [
    "AllGather",
    "Strategy",
    "all_gather_variable_dim",
    "check_expert_parallel",
    "clip_grad_norm_",
    "data_parallel",
    "full_state_dict",
    "gather_sizes",
    "has_only_one_value",
    "pad_dim_to",
    "shard_experts",
    "sharded_parameters",
    "split_by_rank",
]
