"""The numbers of Google's own Mesh-TensorFlow code, through the public interface."""

import json

import numpy as np
import pytest
import torch
from oracles import DATA, ReluExpert, assert_close, golden, golden_names, gradients
from specification import route as specified_route

from st_moe_pytorch import MoE, TopNGating
from st_moe_pytorch.topk import topk

# not this library's rules: an importance between 0 and 1 belongs to hierarchical layers
OTHER_RULES = {"top2_train_importance_half", "topn2_train_importance_half"}
# Mesh-TensorFlow's accidents: these cases agree but for the balance loss
OTHER_BALANCE_LOSS = {"switch_train_pad_tail_quirk", "topn3_train_second_place_loss_quirk"}

GATING = [name for name in golden_names("gating") if name not in OTHER_RULES]


def build_gate(case) -> TopNGating:
    c = case.config
    policy = "all" if c.policy == "argmax" else c.policy
    gate = TopNGating(
        c.d,
        c.e,
        top_n=c.top_n,
        threshold_train=c.threshold,
        threshold_eval=c.threshold,
        capacity_factor_train=c.capacity_factor,
        capacity_factor_eval=c.capacity_factor,
        policy_train=policy,
        policy_eval=policy,
        min_expert_capacity=c.min_capacity,
        second_place_loss=c.second_place_loss,
        straight_through_dispatch_tensor=False,
        group_size=c.group_size if c.kind == "layer" else None,
    )
    gate.to_gates.weight.data.copy_(case.w)
    return gate.train(c.train)


def route(case, gate: TopNGating):
    """Routing and the leaf x, of the case's dtype."""
    x = case.x.to(getattr(torch, case.config.dtype), copy=True).requires_grad_()
    mask = case.importance == 1 if case.config.has_importance else None
    draws = case.draws[: case.config.top_n].movedim(0, -1)
    return gate.route(x, mask=mask, draws=draws), x


def has_padding(case) -> bool:
    return case.config.has_importance and not case.importance.all()


@pytest.mark.parametrize("name", GATING)
def test_assignments_and_gates(name):
    case = golden(name)
    routing, _ = route(case, build_gate(case))
    dispatch, combine = routing.dense()
    assert routing.capacity == case.config.capacity
    assert torch.equal(dispatch, case.dispatch.to(dispatch.dtype))
    assert_close(combine, case.combine, 4e-3 if "bf16" in name else 1e-6)


@pytest.mark.parametrize("name", GATING)
def test_losses(name):
    case, c = golden(name), golden(name).config
    routing, _ = route(case, build_gate(case))
    if not c.train:
        # evaluation has no losses here; Mesh-TensorFlow still computes its balance loss
        assert routing.balance_loss.item() == routing.router_z_loss.item() == 0.0
        return
    if c.z_coef is not None:
        assert_close(routing.router_z_loss, case.z_loss * c.num_microbatches, 5e-6)
    if has_padding(case):
        # padding is not counted here: the specification says by which denominator
        logits = case.x.double().numpy() @ case.w.double().numpy().T
        expected = specified_route(
            logits,
            case.draws,
            c.top_n,
            c.threshold,
            "all",
            c.capacity,
            case.importance.numpy(),
            balance_denominator="real",
        ).balance_loss
        assert_close(routing.balance_loss, torch.tensor(expected, dtype=torch.float32), 5e-6)
    elif name not in OTHER_BALANCE_LOSS:
        assert_close(routing.balance_loss, case.balance_loss * c.num_microbatches, 5e-3 if "bf16" in name else 5e-6)


@pytest.mark.parametrize("name", GATING)
def test_gradients(name):
    case, c = golden(name), golden(name).config
    gate = build_gate(case)
    routing, x = route(case, gate)
    leaves = {"x": x, "w": gate.to_gates.weight}
    rtol = 1e-2 if "bf16" in name else 2e-6
    outputs = {"combine": (routing.dense()[1], case.probe_n[:, :, None, None] * case.probe_ec)}
    if c.train and not has_padding(case) and name not in OTHER_BALANCE_LOSS:
        one = torch.tensor(1 / c.num_microbatches)
        outputs["balance_loss"] = routing.balance_loss, one
        outputs["total_loss"] = routing.balance_loss + (c.z_coef or 0.0) * routing.router_z_loss, one
    for output, (value, cotangent) in outputs.items():
        for (leaf, _), actual in zip(leaves.items(), gradients(value, cotangent, list(leaves.values())), strict=True):
            expected = getattr(case, f"{output}_grad_{leaf}")
            assert_close(actual.to(expected.dtype), expected, rtol, may_vanish=expected.abs().max().item() < 1e-6)


@pytest.mark.parametrize("name", golden_names("layer"))
def test_layer(name):
    case, c = golden(name), golden(name).config
    experts = [ReluExpert(wi, wo) for wi, wo in zip(case.wi, case.wo, strict=True)]
    gate = build_gate(case)
    moe = MoE(
        c.d, c.e, gate=gate, experts=experts, balance_loss_coef=c.loss_coef, router_z_loss_coef=c.loss_coef * c.z_coef
    )
    # the layer takes its draws from the gate; the golden numbers come with theirs
    own_route, draws = gate.route, case.draws[: c.top_n].movedim(0, -1)
    gate.route = lambda x, *args, **kwargs: own_route(x, *args, **kwargs, draws=draws)

    x = case.x.clone().requires_grad_()
    outputs, total, _, _ = moe(x, mask=case.importance == 1)
    assert_close(outputs, case.y, 2e-5)
    if not has_padding(case):
        assert_close(total, case.loss, 5e-6)
    wi, wo = [expert.wi for expert in experts], [expert.wo for expert in experts]
    grad_x, grad_w, *grad_experts = gradients(outputs, case.probe, [x, gate.to_gates.weight, *wi, *wo])
    assert_close(grad_x, case.y_grad_x, 2e-6)
    assert_close(grad_w, case.y_grad_w, 2e-6)
    assert_close(torch.stack(grad_experts[: c.e]), case.y_grad_wi, 2e-6)
    assert_close(torch.stack(grad_experts[c.e :]), case.y_grad_wo, 2e-6)
    if not has_padding(case):
        for actual, expected in zip(
            gradients(total, torch.tensor(1.0), [x, gate.to_gates.weight]),
            (case.loss_grad_x, case.loss_grad_w),
            strict=True,
        ):
            assert_close(actual, expected, 2e-6)


with np.load(DATA / "coor_descent.npz") as arrays:
    COOR_DESCENT = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "index"}
    COOR_DESCENT_CASES = json.loads(str(arrays["index"]))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", COOR_DESCENT_CASES, ids=lambda case: f"e{case['num_experts']}-k{case['k']}")
def test_coordinate_descent(case, fused):
    values, indices, selected, probe, grad = (
        COOR_DESCENT[f"{case['case']}.{key}"]
        for key in ("values", "indices", "coor_descent_values", "probe", "grad_probs")
    )
    probs = COOR_DESCENT[f"{case['case']}.probs"].clone().requires_grad_()
    result = topk(probs, case["k"], None, None, differentiable=True, fused=fused)
    assert torch.equal(result.indices, indices)
    assert torch.equal(result.values, values)
    assert_close(result.coor_descent_values, selected)
    assert_close(
        gradients(result.coor_descent_values, probe, [probs])[0], grad, may_vanish=case["k"] == case["num_experts"]
    )
