"""Load balance without a loss: after every step, a bias moves the choice of experts towards equal loads."""

import itertools
from typing import Literal, Self
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from st_moe_pytorch.checks import check_one_of, check_positive, typechecked
from st_moe_pytorch.distributed.compat import ProcessGroup
from st_moe_pytorch.gate import LISTENERS
from st_moe_pytorch.gating import TopNGating
from st_moe_pytorch.routing import Routing
from st_moe_pytorch.tools.compat import is_recomputing

RATES = {"quantile": 0.5, "sign": 1e-3}  # half the way averages over steps, whose tokens differ
SWEEPS = 100  # at most; 10 to 60 balance hundreds of tokens per expert, and where scores tie none do
Rule = Literal["quantile", "sign"]


class LossFreeBalance:
    """Balances the experts of every gate of a model that has a bias, `TopNGating(balance_bias=True)`, without a loss.

        balance = LossFreeBalance(model)
        with balance:
            loss(model(x)).backward()   # any number of times
        optimizer.step()
        balance.step()

    In the block, all choices of real tokens count once, whether they reached an expert or not. Padding does not
    count, nor what runs again in the backward, nor what gates decide in evaluation. `step` then changes
    ``gate.bias``, a buffer that no optimizer has. It is in the model's state_dict, and nothing else has to be
    saved between steps. Compiled models are compiled once more, in one graph as before. The balance loss is no
    longer needed: ``balance_loss_coef=0.0``.

    Rules, for a gate with k choices among e experts and the t real tokens of a step:
        "sign": ``bias += rate * sign(mean load - load)`` (Wang et al. 2024, arXiv 2408.15664). Keeps counts
            (e).
        "quantile": ``bias += rate * (balanced - bias)``. With the bias ``balanced``, these tokens choose each
            expert t k / e times, rounded down or up, and have the highest sum of scores with which that can be
            (quantile balancing, Su 2026). Keeps their scores (t e) until the step, in float32. Where scores
            tie, or float32 cannot tell them apart once the bias is added, loads differ by as many tokens; so
            they may, by one or two of thousands, where 100 sweeps over the scores are not enough. Noise on the
            logits is not looked at, and a step with fewer choices than experts changes nothing.

    rate: of the rule. By default 0.5 for "quantile", since the next step has other tokens, and 1e-3 for "sign",
        which suits scores in [0, 1].
    process_group: ranks whose tokens are balanced together, by default all. Each of them has to call `step`.
        They exchange counts only, so that for the same scores the bias has the same bits as in one process that
        has all tokens.
    """

    @typechecked
    def __init__(
        self,
        model: nn.Module,
        rule: Rule = "quantile",
        rate: float | None = None,
        *,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_one_of(tuple(RATES), rule=rule)
        check_positive(rate=rate)
        if rule == "quantile" and rate is not None and rate > 1:
            raise ValueError(f'rate must be at most 1 for rule="quantile", the whole way to balance, got {rate}')
        modules = model.named_modules()
        gates = {name: gate for name, gate in modules if isinstance(gate, TopNGating) and gate.balance_bias}
        if not gates:
            need = "model must have a gate with a bias, TopNGating(..., balance_bias=True)"
            raise ValueError(f"{need}, got a {type(model).__name__} without")
        self.rule = rule
        self.rate = RATES[rule] if rate is None else rate
        self.process_group = process_group
        self._seen = {name: Seen(gate) for name, gate in gates.items()}

    def __enter__(self) -> Self:
        if self._listen in LISTENERS.of_decisions:
            raise RuntimeError("this LossFreeBalance is open already: leave its block before the next one")
        for seen in self._seen.values():
            seen.prepare()
        LISTENERS.of_decisions += (self._listen,)
        return self

    def __exit__(self, *_: object) -> None:
        LISTENERS.of_decisions = tuple(other for other in LISTENERS.of_decisions if other != self._listen)

    @torch.no_grad()
    def step(self) -> dict[str, Tensor]:
        """Change the bias of every gate by what it has decided since the last step, and forget that.

        Returns how often each expert was chosen before the change, (e) int64, on all ranks, under the names of
        the gates. Raises RuntimeError, on all ranks, if no gate on any of them has decided anything.
        """
        all_seen = list(self._seen.values())
        for seen in all_seen:
            seen.prepare()
        if not self._total(all_seen[0].loads.new_tensor(sum(seen.decisions for seen in all_seen))):
            raise RuntimeError("step must follow a forward of the model in training mode, inside `with balance:`")
        all_loads = {}
        for name, seen in self._seen.items():
            loads, bias, k = self._total(seen.loads), seen.gate.bias, seen.gate.top_n
            assert bias is not None
            if self.rule == "sign":
                bias += self.rate * (loads.sum() - len(loads) * loads).sign()
            elif len(loads) <= int(loads.sum()) and k < len(loads):
                scores = torch.cat((bias.new_empty(0, len(bias)), *seen.scores))
                bias.lerp_(self._balanced(scores, bias, loads, k), self.rate)
            all_loads[name] = loads
            seen.forget()
        return all_loads

    def _listen(self, decider: nn.Module, routing: Routing) -> None:
        for seen in self._seen.values():
            if decider is seen.gate and decider.training:
                scores = seen.gate.scores(routing.logits.detach()) if self.rule == "quantile" else None
                see(seen.loads, routing.indices, scores, routing.mask, seen.key)

    def _balanced(self, scores: Tensor, bias: Tensor, loads: Tensor, k: int) -> Tensor:
        """The bias (e) with which the tokens of all ranks, scores (t e) here, choose experts equally often.

        Dual coordinate descent. The margin of a token and an expert is the distance of their score + bias to
        the best that the token does not choose or, if it does not choose this one, to the worst that it
        chooses. If no other bias changed, an expert would get its share of the tokens when its own fell by the
        middle of two margins: the last within the share, and the next one. All change at once. Two experts that
        compete for the same tokens then move apart twice, so every other step is half of that.
        """
        share = (int(loads.sum()) + torch.arange(len(loads), device=loads.device)) // len(loads)
        for sweep in range(SWEEPS):
            values = scores + bias
            worst, best_other = values.topk(k + 1, dim=-1).values[:, k - 1 :].unsqueeze(-1).unbind(1)
            margins = values - torch.where(values >= worst, best_other, worst)
            if torch.equal(self._total((margins > 0).sum(dim=0)), share):
                break
            last, next_one = self._largest(margins, torch.stack((share, share + 1), dim=-1)).unbind(dim=-1)
            bias = bias - (0.5 if sweep % 2 == 0 else 1.0) * (last + next_one) / 2
            bias = bias - bias.mean()  # which changes no choice
        return bias

    def _largest(self, numbers: Tensor, places: Tensor) -> Tensor:
        """Of each column of numbers (t e) on all ranks, those in these places (e 2), counted from the largest, 1.

        Found by counts alone, as integers in the order of the numbers, eight bits at a time from the highest.
        """
        ordered = in_order(numbers).T.contiguous().sort(dim=-1).values
        found = torch.full_like(places, -(2**31)).unsqueeze(-1)
        for bits in (24, 16, 8, 0):
            higher = found + 2**bits * torch.arange(256, device=places.device)
            below = torch.searchsorted(ordered, higher.flatten(1).int()).view_as(higher)
            enough = self._total(ordered.shape[-1] - below) >= places.unsqueeze(-1)
            found = found + 2**bits * (enough.sum(dim=-1, keepdim=True) - 1)
        return in_order(found.squeeze(-1).int().view(torch.float32)).view(torch.float32)

    def _total(self, counts: Tensor) -> Tensor:
        """Integers summed over ranks, as a new tensor."""
        counts = counts.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts, group=self.process_group)
        return counts


class Seen:
    """What a gate has decided since the last step: how often each expert was chosen and, if needed, the scores."""

    def __init__(self, gate: TopNGating) -> None:
        self.gate = gate
        self.scores: list[Tensor] = []
        self.decisions = 0
        self.loads = torch.zeros(gate.num_gates, dtype=torch.int64)
        self.key = next(KEYS)
        SEEN[self.key] = self
        self.prepare()

    @torch.inference_mode(False)
    def prepare(self) -> None:
        """Count on the gate's device. Compiled code goes on with the same tensor.

        The bias becomes float32 again where a model was cast, since it changes by little.
        """
        if self.gate.bias is None:
            raise RuntimeError("gate.bias must be a tensor, got None")
        if self.gate.bias.dtype != torch.float32:
            self.gate.bias = nn.Buffer(self.gate.bias.float())
        self.loads = self.loads.to(self.gate.bias.device)

    def forget(self) -> None:
        self.loads.zero_()
        self.scores.clear()
        self.decisions = 0


KEYS = itertools.count()
SEEN: WeakValueDictionary[int, Seen] = WeakValueDictionary()


@torch.library.custom_op("st_moe_pytorch::see", mutates_args=("loads",), tags=(torch.Tag.cudagraph_unsafe,))
def see(loads: Tensor, indices: Tensor, scores: Tensor | None, mask: Tensor | None, key: int) -> None:
    """Add the choices of real tokens to loads (e), and keep their scores, if given.

    An operator, since compiled code neither knows whether it runs again in a backward nor can keep tensors.
    """
    if is_recomputing():
        return
    seen = SEEN[key]
    seen.decisions += 1
    real = torch.ones_like(indices[..., 0], dtype=torch.bool) if mask is None else mask
    loads += indices[real].flatten().bincount(minlength=len(loads))
    if scores is not None:
        seen.scores.append(scores[real].float().nan_to_num())  # else one NaN is in the bias for good


@see.register_fake
def _(loads: Tensor, indices: Tensor, scores: Tensor | None, mask: Tensor | None, key: int) -> None:
    return None


def in_order(numbers: Tensor) -> Tensor:
    """The bits of float32 numbers as int32, flipped into the numbers' order; flipped again, as before."""
    bits = numbers.view(torch.int32)
    return bits ^ ((bits >> 31) & (2**31 - 1))
