"""The matrix products of experts, as each device computes them in least time.

What a layer computes is said without this folder; `grouped_linear` here and `nn.Linear` are the same to it.
"""

from st_moe_pytorch.grouped.linear import grouped_linear, has_kernel

__all__ = ["grouped_linear", "has_kernel"]
