"""Draws by token number, against the same hash in plain integers, and against what uniform numbers must look like."""

import math
from itertools import pairwise

import pytest
import torch

from st_moe_pytorch import MoE
from st_moe_pytorch.tools.draws import keyed_draws
from st_moe_pytorch.tools.watch import record_routing


def hashed(h, *words):
    """In integers without bounds."""
    for word in words:
        h = (h + word) % 2**32
        h = (h ^ (h >> 16)) * 0x21F0AAAD % 2**32
        h = (h ^ (h >> 15)) * 0x735A2D97 % 2**32
        h = h ^ (h >> 15)
    return h


def by_integers(seed, step, layer, token, choice):
    """One number."""
    first, second = (hashed(start, seed % 2**32, seed // 2**32, step, layer) for start in (0x9E3779B9, 0x7F4A7C15))
    token %= 2**64
    return (hashed(first, token % 2**32, token // 2**32, second, choice) >> 8) / 2**24


KEYS = [(0, 0, 0), (1, 2, 3), (2**32, 0, 1), (2**63 - 1, 2**32 - 1, 2**32 - 1)]


@pytest.mark.parametrize(("seed", "step", "layer"), KEYS)
def test_numbers_are_those_of_integers_without_bounds(seed, step, layer):
    tokens = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -1])
    draws = keyed_draws(seed, step, layer, tokens, 5)
    assert draws.dtype == torch.float32
    assert draws.tolist() == [
        [by_integers(seed, step, layer, token, choice) for choice in range(5)] for token in tokens.tolist()
    ]


def test_numbers_stay_those_of_the_first_release():
    bits = (keyed_draws(7, 100, 2, torch.arange(2), 2) * 2**24).long().tolist()
    assert bits == [[6481928, 2448973], [12723156, 13412970]]


def test_numbers_do_not_depend_on_how_tokens_are_split():
    tokens = torch.arange(6 * 16).view(6, 16)
    whole = keyed_draws(3, 5, 1, tokens, 3)
    assert whole.shape == (6, 16, 3)
    for parts in (2, 3, 6):
        assert torch.equal(torch.cat([keyed_draws(3, 5, 1, part, 3) for part in tokens.chunk(parts)]), whole)
        assert torch.equal(
            torch.cat([keyed_draws(3, 5, 1, part, 3) for part in tokens.chunk(parts, dim=1)], dim=1), whole
        )
    assert torch.equal(keyed_draws(3, 5, 1, tokens.flatten().flip(0), 3).flip(0).view(6, 16, 3), whole)
    assert torch.equal(keyed_draws(3, 5, 1, tokens, 2), whole[..., :2])
    assert torch.equal(keyed_draws(3, 5, 1, tokens[4, 7], 3), whole[4, 7])
    assert keyed_draws(3, 5, 1, tokens[:0], 3).shape == (0, 16, 3)


def test_several_layers_at_once_are_those_one_by_one():
    tokens, layers = torch.arange(20).view(4, 5), torch.arange(3)
    together = keyed_draws(3, 5, layers.view(3, 1, 1), tokens, 2)
    assert torch.equal(together, torch.stack([keyed_draws(3, 5, layer, tokens, 2) for layer in range(3)]))


@pytest.mark.parametrize(("seed", "step", "layer"), [(0, 0, 0), (1, 1000, 7)])
def test_numbers_are_uniform(seed, step, layer):
    draws = keyed_draws(seed, step, layer, torch.arange(50_000), 4).double()
    count = draws.numel()
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5 * math.sqrt(1 / 12 / count)
    assert abs(draws.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / count)
    for bins in (2, 16, 1000):
        observed = (draws * bins).long().flatten().bincount(minlength=bins).double()
        chi_square = ((observed - count / bins).square() / (count / bins)).sum()
        assert abs(chi_square - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))
    # the last bits of the 24 as well as the first
    bits = ((draws.flatten() * 2**24).long()[:, None] >> torch.arange(24)) & 1
    assert (bits.double().mean(dim=0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(count)


def neighbours():
    """Pairs of streams that differ in one thing."""
    tokens = torch.arange(50_000)
    here = keyed_draws(1, 10, 2, tokens, 4)
    pairs = {f"token + {shift}": (here[:-shift, 0], here[shift:, 0]) for shift in (1, 2, 256, 4096)}
    pairs |= {f"choice {k}": (here[:, 0], here[:, k]) for k in (1, 2, 3)}
    others = {"seed": (2, 10, 2), "high bits of the seed": (1 + 2**32, 10, 2), "step": (1, 11, 2), "layer": (1, 10, 3)}
    others |= {"step and layer the other way round": (1, 2, 10), "seed and step the other way round": (10, 1, 2)}
    pairs |= {name: (here[:, 0], keyed_draws(*key, tokens, 1)[:, 0]) for name, key in others.items()}
    return pairs | {"token + 2^32": (here[:, 0], keyed_draws(1, 10, 2, tokens + 2**32, 1)[:, 0])}


@pytest.mark.parametrize("name", neighbours())
def test_neighbours_have_nothing_to_do_with_each_other(name):
    one, other = (t.double() for t in neighbours()[name])
    count = len(one)
    assert abs(torch.corrcoef(torch.stack((one, other)))[0, 1]) < 5 / math.sqrt(count)
    cells = ((one * 16).long() * 16 + (other * 16).long()).bincount(minlength=256).double()
    chi_square = ((cells - count / 256).square() / (count / 256)).sum()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    assert (one == other).sum() <= 3


def test_layers_whose_first_keys_are_near_do_not_have_the_same_numbers_some_tokens_apart():
    keys = sorted((hashed(0x9E3779B9, 0, 0, 0, layer), layer) for layer in range(20_000))
    distance, one, other = min((later[0] - key[0], key[1], later[1]) for key, later in pairwise(keys))
    assert 0 < distance < 1000
    tokens = torch.arange(5000)
    assert (keyed_draws(0, 0, one, tokens + distance, 1) == keyed_draws(0, 0, other, tokens, 1)).sum() <= 3


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_bits_are_the_same_on_every_device(device):
    draws = keyed_draws(1, 2, torch.arange(3).view(3, 1), torch.arange(1000, device=device), 3)
    assert draws.device.type == device
    assert draws[2, 999, 1].item() == by_integers(1, 2, 2, 999, 1)


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_numbers_are_the_same(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *key: keyed_draws(*key) + 1, backend=backend, fullgraph=True)
    for step, length in ((0, 8), (1, 8), (2, 9), (2**32 - 1, 10)):
        tokens = torch.arange(2 * length).view(2, length)
        assert torch.equal(compiled(3, step, 1, tokens, 2), keyed_draws(3, step, 1, tokens, 2) + 1)


def test_a_batch_in_parts_is_routed_as_the_whole():
    torch.manual_seed(0)
    moe = MoE(6, 4, threshold_train=1.0)
    x, tokens = torch.randn(6, 16, 6), torch.arange(6 * 16).view(6, 16)
    asked = []
    for parts in (1, 2, 6):
        with record_routing(moe) as records:
            for part, numbers in zip(x.chunk(parts), tokens.chunk(parts), strict=True):
                moe(part, draws=keyed_draws(0, 9, 0, numbers, 2))
        asked.append(torch.cat([routing.asked for routing in records[""]]))
    assert torch.equal(asked[0], asked[1])
    assert torch.equal(asked[0], asked[2])
    assert 0.2 < asked[0][..., 1].float().mean() < 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.arange(3, dtype=torch.int32)}, "tokens must be numbers of type torch.int64, got torch.int32"),
        ({"k": 0}, "k must be a positive number, got 0"),
        ({"seed": -1}, r"seed must lie in \[0, 2\^63\), got -1"),
        ({"seed": 2**63}, r"seed must lie in \[0, 2\^63\), got 9223372036854775808"),
        ({"step": 2**32}, r"step must lie in \[0, 2\^32\), got 4294967296"),
        ({"layer": -1}, r"layer must lie in \[0, 2\^32\), got -1"),
    ],
)
def test_what_has_no_numbers_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        keyed_draws(**{"seed": 0, "step": 0, "layer": 0, "tokens": torch.arange(3), "k": 2} | change)
