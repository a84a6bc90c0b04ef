"""Mixture-of-experts layers of ST-MoE (Zoph et al. 2022) for PyTorch."""

from st_moe_pytorch import st_moe_pytorch
from st_moe_pytorch.expert_choice import ExpertChoiceGating
from st_moe_pytorch.experts import Experts
from st_moe_pytorch.gate import Gate
from st_moe_pytorch.gating import TopNGating
from st_moe_pytorch.layers import GEGLU, Expert, RMSNorm
from st_moe_pytorch.layouts import Layout
from st_moe_pytorch.moe import MixtureOfExpertsReturn, MoE, SparseMoEBlock
from st_moe_pytorch.routing import DenseRouting, Routing

__version__ = "0.2.0"

__all__ = [
    "GEGLU",
    "DenseRouting",
    "Expert",
    "ExpertChoiceGating",
    "Experts",
    "Gate",
    "Layout",
    "MixtureOfExpertsReturn",
    "MoE",
    "RMSNorm",
    "Routing",
    "SparseMoEBlock",
    "TopNGating",
    "st_moe_pytorch",
]
