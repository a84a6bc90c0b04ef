"""Two processes of accelerate on CPU take the steps of one process with the mean of both losses."""

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from st_moe_pytorch import MoE
from st_moe_pytorch.grouped.side_by_side import side_by_side
from st_moe_pytorch.tools.swap import collect_aux_losses, sparsify

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from harness import Workers
from test_grouped import kernel_on_cpu


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.mlp = nn.Linear(16, 16)

    def forward(self, x):
        x = self.first(x)
        return x + self.mlp(x)


def build():
    def make(ffn):
        moe = MoE(16, 4, balance_loss_coef=0.3)
        moe.gate.policy_train = "threshold"
        return moe

    torch.manual_seed(0)
    return sparsify(Model(), "mlp", make).double()


def batch(step, rank):
    return torch.randn(2, 10, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model, x):
    with collect_aux_losses() as aux:
        outputs = model(x)
    assert aux.total.item() > 0.1
    return outputs.square().mean() + aux.total


def train(rank):
    """What each process runs: its trained parameters."""
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)  # which takes the process group that is there
    assert accelerator.num_processes == 2
    model = build()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(model, DistributedDataParallel)
    for step in range(3):
        accelerator.backward(loss_of(model, batch(step, accelerator.process_index)))
        optimizer.step()
        optimizer.zero_grad()
    return accelerator.unwrap_model(model).state_dict()


@pytest.mark.distributed
def test_two_processes_equal_one():
    workers = Workers(2)
    states = workers.run(train)
    workers.close()
    model = build()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        (sum(loss_of(model, batch(step, rank)) for rank in range(2)) / 2).backward()
        optimizer.step()
    for state in states:
        assert (state["mlp.moe.gate.to_gates.weight"] - start["mlp.moe.gate.to_gates.weight"]).abs().max() > 1e-4
        torch.testing.assert_close(state, model.state_dict(), rtol=1e-12, atol=1e-14)


def test_matrices_that_stand_side_by_side_are_saved_as_others_are(tmp_path):
    """Savers take parameters of one storage for tied ones, and drop or refuse them."""
    accelerate, safetensors = pytest.importorskip("accelerate"), pytest.importorskip("safetensors.torch")
    moe, fresh = (MoE(8, 4, expert_hidden_mult=3) for _ in range(2))
    with kernel_on_cpu():
        moe.float()
    assert side_by_side([expert.net[0].weight for expert in moe.experts.experts]) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate.Accelerator(cpu=True).save_model(moe, tmp_path)
    accelerate.load_checkpoint_in_model(fresh, tmp_path)
    assert all(map(torch.equal, fresh.state_dict().values(), moe.state_dict().values()))
    safetensors.save_model(moe, str(tmp_path / "moe.safetensors"))
    other = MoE(8, 4, expert_hidden_mult=3)
    safetensors.load_model(other, str(tmp_path / "moe.safetensors"))
    assert all(map(torch.equal, other.parameters(), moe.parameters()))
