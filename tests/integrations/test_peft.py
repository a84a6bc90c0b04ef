"""LoRA on experts and router."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from st_moe_pytorch import MoE
from st_moe_pytorch.tools.swap import collect_aux_losses, sparsify
from st_moe_pytorch.tools.watch import record_routing


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(x + self.mlp(x))


def test_lora_on_experts_and_router_learns_with_the_rest_frozen():
    torch.manual_seed(0)
    model = sparsify(Model(), "mlp", lambda ffn: MoE(16, 4, balance_loss_coef=0.3)).eval()
    x = torch.randn(2, 12, 16)
    before = model(x)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=r".*(gate\.to_gates|experts\.\d+\.net\.[02])")
    tuned = get_peft_model(model, config)
    assert torch.equal(tuned.eval()(x), before)
    trained = {
        name: parameter.detach().clone() for name, parameter in tuned.named_parameters() if parameter.requires_grad
    }
    assert len(trained) == 2 * (1 + 4 * 2)
    frozen = {
        name: parameter.detach().clone() for name, parameter in tuned.named_parameters() if not parameter.requires_grad
    }
    optimizer = torch.optim.AdamW((parameter for parameter in tuned.parameters() if parameter.requires_grad), lr=1e-2)
    tuned.train()
    for _ in range(3):
        with collect_aux_losses() as aux, record_routing(tuned) as records:
            loss = tuned(x).square().mean()
        optimizer.zero_grad()
        (loss + aux.total).backward()
        optimizer.step()
    assert len(next(iter(records.values()))) == 1
    parameters = dict(tuned.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert all(not torch.equal(parameters[name], value) for name, value in trained.items())
    merged = tuned.merge_and_unload()
    assert type(merged.mlp.moe.experts.experts[0].net[0]) is nn.Linear
