"""A small transformer on bytes, with blocks of any kind. Axes: b batch, n bytes, d width, h heads, k choices."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from st_moe_pytorch import Expert, MoE, RMSNorm

HEAD_DIM = 32  # width of an attention head


def rotary(x: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of queries or keys (b h n d)."""
    n, d = x.shape[-2:]
    angles = torch.outer(torch.arange(n, device=x.device), 10_000 ** -torch.linspace(0, 1, d // 2, device=x.device))
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal self-attention with normalised input, (b n d) -> (b n d)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "b n (qkv h d) -> qkv b h n d", qkv=3, d=HEAD_DIM)
        attended = F.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
        return self.to_out(rearrange(attended, "b h n d -> b n (h d)"))


class LocalContext(nn.Module):
    """Canon layer (Allen-Zhu 2025), (b n d) -> (b n d): adds to a byte the ``width`` before it, weighted by channel."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dim).uniform_(-0.5, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        earlier = (F.pad(x, (0, 0, back, -back)) for back in range(1, len(self.weight) + 1))
        return x + sum(weight * shifted for weight, shifted in zip(self.weight, earlier, strict=True))


class DenseBlock(nn.Module):
    """A `SparseMoEBlock` without routing: one feed-forward, as wide as the experts of a token together."""

    def __init__(self, dim: int, experts_of_a_token: int) -> None:
        super().__init__()
        self.wide = Expert(dim, hidden_mult=4 * experts_of_a_token, prenorm=True)
        self.ff_after = Expert(dim, prenorm=True)

    def forward(self, x: Tensor, *, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Arguments as of `SparseMoEBlock`; there is nothing to draw."""
        x = self.wide(x) + x
        return self.ff_after(x) + x, x.new_zeros(())


class LanguageModel(nn.Module):
    """Bytes (b n) -> logits of the next byte (b n 256) and the routers' auxiliary loss, 0-d.

    block: makes a module (b n d) -> (b n d), auxiliary loss, for each of the ``depth`` layers.
    local: how many earlier bytes each layer adds to a byte, before attention; None leaves this out.
    draws: for each layer the uniform numbers (b n k) of random routing, in place of fresh ones.
    """

    def __init__(self, dim: int, depth: int, block: Callable[[], nn.Module], local: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        self.locals = nn.ModuleList(LocalContext(dim, local) if local else nn.Identity() for _ in range(depth))
        self.attentions = nn.ModuleList(Attention(dim) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.to_logits = nn.Sequential(RMSNorm(dim), nn.Linear(dim, 256))

    def forward(self, x: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.embedding(x)
        total_aux_loss = x.new_zeros(())
        for layer, (local, attention, block) in enumerate(zip(self.locals, self.attentions, self.blocks, strict=True)):
            x = local(x)
            x, aux_loss, *_ = block(attention(x) + x, draws=None if draws is None else draws[layer])
            total_aux_loss = total_aux_loss + aux_loss
        return self.to_logits(x), total_aux_loss

    def reset_by_fan_in(self) -> "LanguageModel":
        """Draw the weights of all matrices anew, with variance 1 / fan-in, and set their biases to 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return self

    @torch.no_grad()
    def generate(self, prompt: bytes, seed: int, seq_len: int, length: int = 400, temperature: float = 0.7) -> bytes:
        """The prompt and ``length`` more bytes, each by the ``seq_len`` before it."""
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        text = torch.tensor([list(prompt)], device=self.embedding.weight.device)
        for _ in range(length):
            logits, _ = self(text[:, -seq_len:])
            probs = (logits[:, -1] / temperature).softmax(dim=-1)
            text = torch.cat((text, torch.multinomial(probs.cpu(), 1, generator=generator).to(text.device)), dim=1)
        return bytes(text[0].tolist())

    def describe(self, seq_len: int) -> str:
        """Its parameters and its cost per token, as if every choice reached its expert."""
        layers = [module for module in self.modules() if isinstance(module, MoE)]
        share = layers[0].gate.top_n / layers[0].num_experts if layers else 1
        used, wide = 0.0, 0.0
        for name, parameter in self.named_parameters():
            is_expert = ".experts." in name
            active = parameter.numel() * (share if is_expert else 1)
            used += 0 if name == "embedding.weight" else active
            wide += active if parameter.ndim > 1 and (is_expert or ".wide." in name) else 0
        total = sum(parameter.numel() for parameter in self.parameters())
        flops = 2 * used + 2 * len(self.blocks) * self.embedding.embedding_dim * seq_len
        kind, where = "dense", "wide layers"
        if layers:
            kind, where = "sparse", f"{layers[0].gate.top_n} of {layers[0].num_experts} experts"
        cost = f"{used:,.0f} used by a token; {flops / 1e6:.2f} MFLOPs forward, {2 * wide / 1e6:.2f} of them in {where}"
        return f"{kind}: {total:,} parameters, {cost}"
