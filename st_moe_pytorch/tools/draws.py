"""Random numbers that belong to tokens, the same however these are spread over processes, micro-batches or devices."""

import torch
from torch import Tensor

from st_moe_pytorch.checks import check_counts

WORD = 2**32 - 1  # the bits of a word


def keyed_draws(seed: int, step: int, layer: int | Tensor, tokens: Tensor, k: int) -> Tensor:
    """Uniform numbers in [0, 1) for the ``draws`` of a forward, by seed, step, layer, token and choice alone.

    tokens: int64, of any shape: number tokens by their place in the whole batch of a step, over ranks and
        micro-batches.
    layer: a number or, for several layers at once, an int64 tensor that broadcasts against tokens.
    Returns (... k) float32, multiples of 2^-24, for k choices of each token: the same bits on every device, without
    state. Raises ValueError for a seed beyond 63 bits, a step or layer beyond 32, and tokens that are not int64.
    """
    check_counts(k=k)
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be numbers of type torch.int64, got {tokens.dtype}")
    for name, number, bits in (("seed", seed, 63), ("step", step, 32), ("layer", layer, 32)):
        if not isinstance(number, Tensor) and not 0 <= number < 2**bits:
            raise ValueError(f"{name} must lie in [0, 2^{bits}), got {number}")
    layers = layer.to(tokens) if isinstance(layer, Tensor) else tokens.new_full((), layer)
    return _drawn(seed, step, layers, tokens, k)


# an operator, since inductor takes minutes for what reads its own results this often
@torch.library.custom_op("st_moe_pytorch::keyed_draws", mutates_args=())
def _drawn(seed: int, step: int, layers: Tensor, tokens: Tensor, k: int) -> Tensor:
    # two words: by the first alone, layers could have the same numbers, some tokens apart
    keys = torch.tensor([0x9E3779B9, 0x7F4A7C15], device=tokens.device)
    before, after = hashed(keys, seed & WORD, seed >> 32, step, layers.unsqueeze(-1)).unbind(dim=-1)
    words = hashed(before, tokens & WORD, (tokens >> 32) & WORD, after).unsqueeze(-1)
    return (hashed(words, torch.arange(k, device=tokens.device)) >> 8).float() * 2**-24


@_drawn.register_fake
def _empty_draws(seed: int, step: int, layers: Tensor, tokens: Tensor, k: int) -> Tensor:
    return tokens.new_empty(*torch.broadcast_shapes(layers.shape, tokens.shape), k, dtype=torch.float32)


def hashed(words: Tensor, *others: Tensor | int) -> Tensor:
    """Words (int64 below 2^32) that depend on all bits of words and of others, one after the other, which broadcast.

    The mixing is that of issue 19 of github.com/skeeto/hash-prospector. Its multipliers are below 2^31, so that no
    product overflows an int64, and shifts to the right need no care for a sign.
    """
    for other in others:
        words = (words + other) & WORD
        words = ((words ^ words >> 16) * 0x21F0AAAD) & WORD
        words = ((words ^ words >> 15) * 0x735A2D97) & WORD
        words = words ^ words >> 15
    return words
