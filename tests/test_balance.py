"""Balance without a loss: what is counted, and what the rules make of it, against loops and sorting in plain Python."""

import math
from bisect import insort

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.compile_fx import compile_fx
from torch.utils.checkpoint import checkpoint

from st_moe_pytorch import MoE, SparseMoEBlock, TopNGating
from st_moe_pytorch.gate import LISTENERS
from st_moe_pytorch.tools.balance import LossFreeBalance
from st_moe_pytorch.tools.watch import record_routing

MASK = torch.arange(12) < torch.tensor([[12], [7], [0]])


class Model(nn.Module):
    """Two sparse layers, the second of which may run again in the backward."""

    def __init__(self, again=None):
        super().__init__()
        settings = {
            "balance_bias": True,
            "policy_train": "all",
            "capacity_factor_train": None,
        }  # draw nothing, drop nothing
        moes = [MoE(8, e, gate=TopNGating(8, e, **settings), balance_loss_coef=0.0) for e in (4, 5)]
        self.blocks = nn.ModuleList(SparseMoEBlock(moe) for moe in moes)
        self.again = again

    def forward(self, x, mask=None):
        x = self.blocks[0](x, mask=mask).outputs
        if self.again is None:
            return self.blocks[1](x, mask=mask).outputs
        return checkpoint(lambda x: self.blocks[1](x, mask=mask).outputs, x, use_reentrant=self.again == "reentrant")


def biased_gate(logits, top_n, **arguments):
    """A gate whose logits are its tokens."""
    gate = TopNGating(logits.shape[-1], logits.shape[-1], top_n=top_n, balance_bias=True, **arguments)
    nn.init.eye_(gate.to_gates.weight)
    return gate


def chosen(gate, logits):
    """How often each expert is chosen, counted one by one."""
    counts = [0] * gate.num_gates
    for expert in gate.route(logits).indices.flatten().tolist():
        counts[expert] += 1
    return counts


def sign_step(bias, loads, rate):
    mean = sum(loads) / len(loads)
    return [b + rate * ((mean > load) - (mean < load)) for b, load in zip(bias, loads, strict=True)]


def balanced_by_sorting(scores, k):
    """A bias with which tokens (t e) choose each expert equally often.

    One expert at a time, the one that is furthest from its share, moves to the middle of the two tokens at its border.
    """
    scores = scores.double().tolist()
    tokens, experts = len(scores), len(scores[0])
    share = [(tokens * k + expert) // experts for expert in range(experts)]
    bias = [0.0] * experts
    for _ in range(5000):
        loads = [0] * experts
        for row in scores:
            order = sorted(range(experts), key=lambda e: -(row[e] + bias[e]))
            for expert in order[:k]:
                loads[expert] += 1
        wrong = max(range(experts), key=lambda e: abs(loads[e] - share[e]))
        if loads == share:
            return bias
        needed = []
        for row in scores:
            others = sorted((row[e] + bias[e] for e in range(experts) if e != wrong), reverse=True)
            insort(needed, others[k - 1] - row[wrong])  # the bias from which this token chooses it
        bias[wrong] = (needed[share[wrong] - 1] + needed[share[wrong]]) / 2
    raise AssertionError("no balance found")


def value(scores, indices):
    """Sum of the scores (t e) of what was chosen (t k)."""
    return sum(scores[token][expert] for token, experts in enumerate(indices) for expert in experts)


SIZES = [(4, 1, 32), (4, 2, 37), (7, 1, 50), (7, 2, 49), (7, 4, 61), (7, 4, 63), (4, 2, 2)]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("e", "k", "tokens"), SIZES)
def test_after_the_quantile_rule_each_expert_has_its_share(e, k, tokens, score):
    torch.manual_seed(tokens + e)
    for skew in (0.0, 1.0, 3.0):
        logits = torch.randn(1, tokens, e) + skew * torch.randn(e)
        gate = biased_gate(logits, k, score=score)
        balance = LossFreeBalance(gate, rate=1)
        with balance:
            gate.route(logits.flip(-1))
        balance.step()  # of other tokens
        with balance:
            routing = gate.route(logits)
        balance.step()
        share = tokens * k / e
        assert all(load in (math.floor(share), math.ceil(share)) for load in chosen(gate, logits))
        assert skew == 0 or max(routing.indices.flatten().bincount(minlength=e)) > math.ceil(share)

        # of all ways to balance, it is the one with the best scores, as that found by sorting
        scores = (routing.logits.softmax(-1) if score == "softmax" else routing.logits.sigmoid())[0].detach().double()
        expected = (scores + torch.tensor(balanced_by_sorting(scores, k))).topk(k).indices
        scores = scores.tolist()
        best, found = value(scores, expected.tolist()), value(scores, gate.route(logits).indices[0].tolist())
        assert found == pytest.approx(best, rel=1e-12)
        assert float(gate.bias.mean()) == pytest.approx(0, abs=1e-6)


def test_the_quantile_rule_goes_as_far_as_its_rate_and_not_at_all_without_choices_for_all():
    logits = torch.randn(1, 40, 4) + torch.tensor([2.0, 1.0, 0.0, 0.0])
    whole, half = (biased_gate(logits, 2) for _ in range(2))
    for gate, rate in ((whole, 1.0), (half, None)):
        balance = LossFreeBalance(gate, rate=rate)
        with balance:
            gate.route(logits)
        balance.step()
    assert whole.bias.abs().max() > 0.1
    torch.testing.assert_close(half.bias, whole.bias / 2)
    before = half.bias.clone()
    for few, top_n in ((logits[:, :1], 2), (logits, 4)):
        half.top_n = top_n
        half.threshold_train = torch.zeros(top_n)
        with balance:
            half.route(few)
        balance.step()
        assert torch.equal(half.bias, before)


@pytest.mark.parametrize("broken", [False, True])
def test_tokens_that_are_all_the_same_and_broken_ones_leave_numbers(broken):
    logits = torch.randn(1, 1, 5).repeat(1, 20, 1)
    if broken:
        logits[0, 3:18] = torch.nan
    gate = biased_gate(logits, 2)
    balance = LossFreeBalance(gate)
    with balance:
        gate.route(logits)
    balance.step()
    assert gate.bias.isfinite().all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_sign_rule_is_that_of_a_loop(score):
    torch.manual_seed(0)
    model = biased_gate(torch.randn(1, 1, 6), 2, score=score)
    balance, expected = LossFreeBalance(model, "sign", rate=0.05), [0.0] * 6
    for step in range(30):
        logits = torch.randn(2, 9, 6) + torch.arange(6)
        loads = chosen(model, logits)
        with balance:
            model.route(logits)
        balance.step()
        expected = sign_step(expected, loads, 0.05)
        assert model.bias.tolist() == pytest.approx(expected, abs=1e-6), step
    assert 0 < LossFreeBalance(model, rule="sign").rate < 0.01


def test_equal_loads_stay_under_the_sign_rule():
    gate = biased_gate(torch.randn(1, 1, 3), 1)
    balance = LossFreeBalance(gate, "sign", rate=1)
    with balance:
        gate.route(torch.eye(3).unsqueeze(0))
        gate.route(torch.eye(3)[:1].unsqueeze(0).repeat(2, 1, 1), mask=torch.zeros(2, 1, dtype=torch.bool))
    balance.step()
    assert gate.bias.tolist() == [0, 0, 0]


def tokens(b):
    return torch.randn(b, 12, 8, requires_grad=True)


def run_step(balance, model, run, parts=2, evaluated=False):
    """Loads of a step of 3 sequences with padding, in parts, and those counted one by one in a record."""
    x, expected = (
        torch.randn(3, 12, 8, requires_grad=True),
        {"blocks.0.moe.gate": [0] * 4, "blocks.1.moe.gate": [0] * 5},
    )
    with record_routing(model) as records:
        model(x, MASK)
    for layer, (routing,) in records.items():
        for expert in routing.indices[MASK].flatten().tolist():
            expected[f"{layer}.gate"][expert] += 1
    with balance:
        for part, mask in zip(x.chunk(parts), MASK.chunk(parts), strict=True):
            run(part.detach().requires_grad_(), mask).sum().backward()
            if evaluated:
                model.eval()
                run(tokens(1))
                model.train()
    run(tokens(1), MASK[:1])  # out of the block
    return {name: loads.tolist() for name, loads in balance.step().items()}, expected


@pytest.mark.parametrize("rule", ["quantile", "sign"])
@pytest.mark.parametrize("again", [None, "reentrant", "non-reentrant"])
def test_each_real_token_counts_once(again, rule):
    torch.manual_seed(0)
    model = Model(again)
    balance = LossFreeBalance(model, rule)
    for parts in (1, 3):
        loads, expected = run_step(balance, model, model, parts, evaluated=True)
        assert loads == expected
    with pytest.raises(RuntimeError, match="step must follow a forward of the model in training mode"):
        balance.step()


@pytest.mark.compile
@pytest.mark.parametrize("compiler", [aot_eager, pytest.param(compile_fx, marks=pytest.mark.slow)])
def test_compiled_models_count_once_and_compile_once_more(compiler):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return compiler(graph, inputs)

    model, reference = Model(), Model()
    reference.load_state_dict(model.state_dict())
    runs = {model: torch.compile(model, backend=backend, fullgraph=True), reference: reference}
    balances = {each: LossFreeBalance(each) for each in runs}
    for step in range(3):
        for each, run in runs.items():
            torch.manual_seed(step)
            loads, expected = run_step(balances[each], each, run, parts=3)
            assert loads == expected
        assert len(graphs) == 2  # inside the block, and outside
        for one, other in zip(model.blocks, reference.blocks, strict=True):
            torch.testing.assert_close(one.moe.gate.bias, other.moe.gate.bias)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.compile
@pytest.mark.parametrize("how", ["a compiled layer runs again", "layers run again inside of the graph"])
def test_compiled_layers_that_run_again_count_once(how):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model("non-reentrant")
    run = model
    if how == "a compiled layer runs again":
        model.blocks[1].compile(backend="aot_eager", fullgraph=True)
    else:
        run = torch.compile(model, backend="aot_eager")
    loads, expected = run_step(LossFreeBalance(model), model, run)
    assert loads == expected


def test_a_gate_of_several_layers_counts_for_all_of_them_and_gates_without_bias_stay():
    gate, plain = TopNGating(8, 4, balance_bias=True), MoE(8, 4)
    model = nn.Sequential(*(MoE(8, 4, gate=gate) for _ in range(2)), plain)
    balance = LossFreeBalance(model)
    with balance:
        for moe in model:
            moe(torch.randn(1, 10, 8))
    assert {name: int(loads.sum()) for name, loads in balance.step().items()} == {"0.gate": 40}
    assert plain.gate.bias is None


def test_only_a_step_changes_the_bias_which_the_state_holds():
    model = Model()
    balance = LossFreeBalance(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    with balance:
        model(torch.randn(3, 12, 8)).sum().backward()
    optimizer.step()
    assert not any(block.moe.gate.bias.any() for block in model.blocks)
    assert balance.step() is not None
    biases = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("gate.bias")}
    assert len(biases) == 2
    assert all(value.abs().max() > 0 for value in biases.values())
    optimizer.step()
    other = Model()
    other.load_state_dict(model.state_dict())
    for name, value in biases.items():
        assert torch.equal(other.get_buffer(name), value)
        assert torch.equal(model.get_buffer(name), value)


def test_what_cannot_be_balanced_is_refused():
    with pytest.raises(ValueError, match=r"model must have a gate with a bias, .*, got a MoE without"):
        LossFreeBalance(MoE(8, 4))
    with pytest.raises(ValueError, match="rule must be one of 'quantile', 'sign', got 'median'"):
        LossFreeBalance(Model(), "median")
    for rate in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=f"rate must be a positive number, got {rate}"):
            LossFreeBalance(Model(), rate=rate)
    with pytest.raises(ValueError, match=r'rate must be at most 1 for rule="quantile", .*, got 2'):
        LossFreeBalance(Model(), rate=2)
    model = Model()
    balance = LossFreeBalance(model, "sign", rate=2)
    with balance, pytest.raises(RuntimeError, match="open already: leave its block before the next one"), balance:
        pass
    with pytest.raises(KeyError), balance:
        raise KeyError
    assert LISTENERS.of_decisions == ()
    gate = next(module for module in model.modules() if isinstance(module, TopNGating))
    balance, gate.bias = LossFreeBalance(model), None
    with pytest.raises(RuntimeError, match=r"gate\.bias must be a tensor, got None"):
        balance.__enter__()
    assert LISTENERS.of_decisions == ()


def test_a_bias_is_float32_again_after_a_cast():
    model, x = Model().bfloat16(), torch.randn(2, 16, 8, dtype=torch.bfloat16)
    balance, gates = LossFreeBalance(model), [module for module in model.modules() if isinstance(module, TopNGating)]
    assert {gate.bias.dtype for gate in gates} == {torch.float32}
    for rule in ("quantile", "sign"):
        balance.rule = rule
        with balance:
            model(x)
        model.bfloat16()
        balance.step()
        assert {gate.bias.dtype for gate in gates} == {torch.float32}
    other = Model().bfloat16()
    LossFreeBalance(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.blocks[0].moe.gate.bias, gates[0].bias)
    assert not any(torch.equal(gate.bias, gate.bias.bfloat16().float()) for gate in gates)
    with torch.inference_mode():
        model.bfloat16()
        balance.__enter__()
        balance.__exit__(None, None, None)
    assert not any(gate.bias.is_inference() for gate in gates)
    assert all(gate.bias.any() and "bias" in dict(gate.named_buffers()) for gate in gates)
