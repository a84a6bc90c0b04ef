"""Plant one fault at a time in a copy of the package and see a test turn red: ``python tests/planted_faults.py [name ...]``.

A fault that no test notices ends the script with exit code 1.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Fault(NamedTuple):
    name: str
    file: str
    right: str
    wrong: str
    test: str


FAULTS = [
    Fault(
        "capacity is off by one",
        "routing.py",
        "share = torch.sym_int(tokens * factor / num_experts)",
        "share = torch.sym_int(tokens * factor / num_experts) + 1",
        "test_golden.py::test_assignments_and_gates",
    ),
    Fault(
        "slots restart at every rank",
        "routing.py",
        "queues = rearrange(indices.masked_fill(~asked, num_experts), ",
        "queues = rearrange(indices.masked_fill(~asked, num_experts) + 99 * torch.arange(indices.shape[-1]), ",
        "test_golden.py::test_assignments_and_gates",
    ),
    Fault(
        "second choices are served before the first ones of later tokens",
        "routing.py",
        'line = "(n k)" if by_token else "(k n)"',
        'line = "(n k)"',
        "test_routing.py::test_first_choices_are_served_before_second_ones",
    ),
    Fault(
        "later tokens are served first",
        "routing.py",
        "queues, request = queues.sort(dim=-1, stable=True)",
        "request = queues.shape[-1] - 1 - queues.flip(-1).argsort(dim=-1, stable=True); queues = queues.gather(-1, request)",
        "test_golden.py::test_assignments_and_gates",
    ),
    Fault(
        "balance loss counts tokens after drops",
        "gating.py",
        "balance, z = self._losses(clean, scores, best.indices, real)",
        "balance, z = self._losses(clean, scores, best.indices, kept[..., 0])",
        "test_golden.py::test_losses",
    ),
    Fault(
        "balance loss divides by padding too",
        "losses.py",
        "tokens = real.sum(dim=1)",
        "tokens = torch.ones_like(real).sum(dim=1)",
        "test_gating.py::test_every_assignment_and_loss_is_the_specifications",
    ),
    Fault(
        "the mask is inverted",
        "gating.py",
        "return asked if mask is None else asked & mask.unsqueeze(-1)",
        "return asked if mask is None else asked & ~mask.unsqueeze(-1)",
        "test_gating.py::test_every_assignment_and_loss_is_the_specifications",
    ),
    Fault(
        "padding reaches the router",
        "gate.py",
        "features = features.masked_fill(~mask.unsqueeze(-1), 0.0)",
        "features = features + 0.0",
        "test_gating.py::test_padding_may_hold_anything",
    ),
    Fault(
        "gates are not normalised",
        "gating.py",
        "return gates if is_raw else gates / (gates.sum(dim=-1, keepdim=True) + self.eps)",
        "return gates",
        "test_golden.py::test_assignments_and_gates",
    ),
    Fault(
        "Switch gates are normalised to one",
        "gating.py",
        "is_raw = self.top_n == 1 or not self.normalize_gates",
        "is_raw = not self.normalize_gates",
        "test_golden.py::test_assignments_and_gates",
    ),
    Fault(
        "gates are renormalised after a drop",
        "gating.py",
        "gates=gates.view(b, n, k),",
        "gates=(gates * kept / ((gates * kept).sum(-1, keepdim=True) + 1e-9)).view(b, n, k),",
        "test_golden.py::test_assignments_and_gates",
    ),
    Fault(
        "the z-loss sees the noise",
        "gating.py",
        "clean = logits.reshape(*groups, e)",
        "clean = (logits if noised is None else noised).reshape(*groups, e)",
        "test_gating.py::test_noise_changes_the_routing_by_the_gumbel_distribution_and_not_the_z_loss",
    ),
    Fault(
        "evaluation draws at random",
        "gating.py",
        "policy = self.policy_train if self.training else self.policy_eval",
        "policy = self.policy_train",
        "test_gating.py::test_evaluation_is_deterministic_and_has_no_losses",
    ),
    Fault(
        "the router runs in the dtype of x",
        "gate.py",
        "dtype = torch.promote_types(input.dtype, torch.float32)",
        "dtype = input.dtype",
        "test_gating.py::test_half_precision_is_routed_in_float32",
    ),
    Fault(
        "autocast reaches the router",
        "routing.py",
        "torch.autocast(device, enabled=False)",
        "torch.autocast(device, enabled=torch.is_autocast_enabled(device))",
        "test_gating.py::test_autocast_does_not_reach_the_router",
    ),
    Fault(
        "ties go to the highest expert",
        "topk.py",
        "indices.append(left.argmax(dim=-1, keepdim=True))",
        "indices.append(left.shape[-1] - 1 - left.flip(-1).argmax(dim=-1, keepdim=True))",
        "test_golden.py::test_assignments_and_gates",
    ),
    Fault(
        "coordinate descent stops early",
        "topk.py",
        "for _ in range(n_iters):",
        "for _ in range(n_iters - 1):",
        "test_golden.py::test_coordinate_descent",
    ),
    Fault(
        "straight-through passes no gradient",
        "layouts.py",
        "return _straight_through(grad, gates, choices, places), dgates, None, None",
        "return _straight_through(grad, gates, choices, places), 0 * dgates, None, None",
        "test_moe.py::test_all_layouts_equal_the_definition",
    ),
    Fault(
        "a second derivative forgets that rows were scaled by their gates",
        "layouts.py",
        "return _straight_through(grad, gates, choices, places), dgates, None, None",
        "return grad, dgates, None, None",
        "test_layouts.py::test_straight_through_is_the_derivative_of_scaling_by_one",
    ),
    Fault(
        "forward mode ignores the gates of rows",
        "layouts.py",
        "return tangent if dgates is None else tangent + rows * _at_choices(dgates, choices).to(rows.dtype)",
        "return tangent",
        "test_layouts.py::test_forward_and_reverse_mode_agree_with_straight_through",
    ),
    Fault(
        "rows are combined by the gate of the best choice",
        "routing.py",
        "gates = self.gates.flatten(0, 1).masked_fill(layout.places == y.shape[0] - 1, 0.0)",
        "gates = self.gates.flatten(0, 1)[:, :1].expand_as(layout.places).masked_fill(layout.places == y.shape[0] - 1, 0.0)",
        "test_moe.py::test_all_layouts_equal_the_definition",
    ),
    Fault(
        "choices that are not sent read a row that somebody has",
        "layouts.py",
        "return Layout(order, _inverse(order, choices, length - 1).view(-1, k), ends, _tokens(order, experts))",
        "return Layout(order, _inverse(order, choices, 0).view(-1, k), ends, _tokens(order, experts))",
        "test_moe.py::test_all_layouts_equal_the_definition",
    ),
    Fault(
        "rows lie in no order of experts",
        "layouts.py",
        "queue, order = experts.flatten().sort(stable=True)",
        "queue, order = experts.flatten().sort(stable=True); order = order.flip(0)",
        "test_routing.py::test_rows_are_sorted_by_expert_and_hold_only_kept_choices",
    ),
    Fault(
        "dropped choices are sent",
        "routing.py",
        "experts = self.indices.masked_fill(~self._is_sent(), self.num_experts)",
        "experts = self.indices.masked_fill(~self.asked, self.num_experts)",
        "test_moe.py::test_all_layouts_equal_the_definition",
    ),
    Fault(
        "a choice made kept takes another one's slot",
        "routing.py",
        "return self.kept & (self.slots >= 0)",
        "return self.kept",
        "test_layouts.py::test_a_choice_that_was_made_kept_without_a_slot_is_sent_in_no_layout",
    ),
    Fault(
        "empty slots are filled with padding",
        "layouts.py",
        "torch.where(empty, tokens.amin(), tokens)",
        "torch.where(empty, 0, tokens)",
        "test_compile.py::test_empty_slots_of_compiled_experts_hold_tokens",
    ),
    Fault(
        "empty slots of compiled experts hold zeros",
        "experts.py",
        "routing.buffers(filled=True)",
        "routing.buffers()",
        "test_compile.py::test_empty_slots_of_compiled_experts_hold_tokens",
    ),
    Fault(
        "the kernel leaves nobody's row as it is",
        "grouped.py",
        "rows[-1:].masked_fill_(offsets[-1] < len(rows), 0.0)",
        "pass",
        "test_grouped.py::test_product_is_its_definition",
    ),
    Fault(
        "the kernel's gradients of experts without rows are not written",
        "grouped.py",
        "products = F.grouped_mm(wide.t(), _aligned(rows), offs=offsets).masked_fill_(empty, 0.0)",
        "products = F.grouped_mm(wide.t(), _aligned(rows), offs=offsets)",
        "test_grouped.py::test_product_is_its_definition",
    ),
    Fault(
        "the loop leaves rows behind the last expert's unwritten",
        "grouped.py",
        "    drows[_end(offsets) :] = 0\n",
        "",
        "test_grouped.py::test_product_is_its_definition",
    ),
    Fault(
        "gradients of scales are those of scaled rows",
        "grouped.py",
        "torch.sum(drows[block] * rows[block], 0, out=dscales[j])",
        "torch.sum(drows[block] * _scaled(rows[block], scales, j), 0, out=dscales[j])",
        "test_grouped.py::test_product_is_its_definition",
    ),
    Fault(
        "a second derivative of the product forgets the scales",
        "grouped.py",
        "        drows, dweights = drows + more, dweights + more_weights\n",
        "",
        "test_grouped.py::test_derivatives_of_first_and_second_order",
    ),
    Fault(
        "shared products forget the multiplicative bias",
        "experts.py",
        "return grouped_linear(hidden, *_parameters(down), biases, offsets)",
        "return grouped_linear(hidden, *_parameters(down), [], offsets)",
        "test_grouped.py::test_layer_with_shared_products_is_the_layer_of_modules",
    ),
    Fault(
        "hooks on experts are passed over by shared products",
        "experts.py",
        'and "forward" not in vars(module) and not has_hooks(module) for module in modules)',
        'and "forward" not in vars(module) for module in modules)',
        "test_grouped.py::test_experts_that_differ_in_anything_are_called_one_by_one",
    ),
    Fault(
        "GEGLU's gradient forgets the multiplicative bias",
        "layers.py",
        "dx, inner = F.gelu(gate) * grad, grad * factor[0] if factor else grad",
        "dx, inner = F.gelu(gate) * grad, grad * 1.0",
        "test_experts.py::test_geglu_keeps_its_input_only_and_has_all_derivatives",
    ),
    Fault(
        "the gradient of the multiplicative bias is doubled",
        "layers.py",
        "dbias = (dx * x).sum_to_size",
        "dbias = (2 * dx * x).sum_to_size",
        "test_experts.py::test_geglu_keeps_its_input_only_and_has_all_derivatives",
    ),
    Fault(
        "draws of a block do not reach its layer",
        "moe.py",
        "        given = given_only(mask=mask, route_by=route_by, draws=draws)\n        routed",
        "        given = given_only(mask=mask, route_by=route_by)\n        routed",
        "test_gate.py::test_draws_of_a_forward_reach_the_gate",
    ),
    Fault(
        "experts that cannot run on no tokens get no gradient",
        "experts.py",
        "return _UsedForNothing.apply(y, *(p for module in modules for p in module.parameters() if p.requires_grad))",
        "return y",
        "test_experts.py::test_experts_that_cannot_run_on_no_tokens_are_passed_over_with_gradients_of_zero",
    ),
    Fault(
        "the block normalises what it adds",
        "moe.py",
        "        x = routed + x\n",
        "        x = routed + self.moe_prenorm(x)\n",
        "test_moe.py::test_block_is_three_residual_steps",
    ),
    Fault(
        "experts without tokens are skipped",
        "experts.py",
        "y = expert(block) if parameters is None",
        "y = (expert(block) if block.numel() else block) if parameters is None",
        "test_experts.py::test_every_parameter_gets_a_gradient_even_without_tokens",
    ),
    Fault(
        "the threshold policy takes gates equal to the threshold",
        "gating.py",
        "asked = gates > threshold",
        "asked = gates >= threshold",
        "test_gating.py::test_a_gate_equal_to_the_threshold_and_a_draw_equal_to_its_share_ask_for_nothing",
    ),
    Fault(
        "the random policy takes draws equal to the share of the threshold",
        "gating.py",
        "asked = draws < gates / threshold",
        "asked = draws <= gates / threshold",
        "test_gating.py::test_a_gate_equal_to_the_threshold_and_a_draw_equal_to_its_share_ask_for_nothing",
    ),
    Fault(
        "route_by gets no gradient",
        "gate.py",
        "features = x if route_by is None else route_by",
        "features = x if route_by is None else route_by.detach()",
        "test_gating.py::test_route_by_gets_its_gradient_and_its_padding_may_hold_anything",
    ),
    Fault(
        "padding of route_by reaches the router",
        "gate.py",
        "        if mask is not None:\n            features =",
        "        if mask is not None and route_by is None:\n            features =",
        "test_gating.py::test_route_by_gets_its_gradient_and_its_padding_may_hold_anything",
    ),
    Fault(
        "equal certainty of many tokens is served in another order",
        "gating.py",
        "order = best.values[..., 0].argsort(dim=1",
        "order = (best.values[..., 0] - 1e-9 * (torch.arange(n) % 7)).argsort(dim=1",
        "test_gating.py::test_equal_certainty_of_many_tokens_is_served_in_order_of_position",
    ),
    Fault(
        "the balance loss sees probabilities without noise",
        "gating.py",
        "self._losses(clean, scores, best.indices, real)",
        "self._losses(clean, clean.softmax(dim=-1), best.indices, real)",
        "test_gating.py::test_noised_logits_decide_and_are_balanced",
    ),
    Fault(
        "the balance loss counts choices without noise",
        "gating.py",
        "balance = balance_loss(probs, indices[..., 0], mask)",
        "balance = balance_loss(probs, logits.argmax(-1), mask)",
        "test_gating.py::test_noised_logits_decide_and_are_balanced",
    ),
    Fault(
        "the capacity of the first call is kept",
        "gating.py",
        "capacity = self._capacity(groups[1])",
        'capacity = vars(self).setdefault("kept_capacity", self._capacity(groups[1]))',
        "test_gating.py::test_capacity_is_that_of_the_mode_and_of_the_length_at_hand",
    ),
    Fault(
        "evaluation has the capacity of training",
        "gating.py",
        "factor = self.capacity_factor_train if self.training else self.capacity_factor_eval",
        "factor = self.capacity_factor_train",
        "test_gating.py::test_capacity_is_that_of_the_mode_and_of_the_length_at_hand",
    ),
    Fault(
        "capacity is rounded from tokens by expert",
        "routing.py",
        "torch.sym_int(tokens * factor / num_experts)",
        "torch.sym_int(tokens / num_experts * factor)",
        "test_gating.py::test_capacity",
    ),
    Fault(
        "logits of a router of half precision stay in it",
        "gate.py",
        "logits = self.to_gates(features).to(torch.promote_types(x.dtype, torch.float32))",
        "logits = self.to_gates(features)",
        "test_gating.py::test_a_router_of_another_make_may_work_in_half_precision",
    ),
    Fault(
        "chosen experts count as impossible ones",
        "topk.py",
        "left = left.scatter(-1, indices[-1], -torch.inf)",
        "left = left.scatter(-1, indices[-1], 0.0)",
        "test_gating.py::test_a_token_that_is_certain_chooses_other_experts_after_its_first",
    ),
    Fault(
        "winners of coordinate descent are more than there are experts",
        "topk.py",
        "winners = min(k * ratio, values.shape[-1])",
        "winners = k * ratio",
        "test_gating.py::test_coordinate_descent_of_scores_of_any_sign_and_for_all_experts",
    ),
    Fault(
        "values of a differentiable top-k carry no gradient of the selection",
        "topk.py",
        "    values = values * (1 + (selection - selection.detach()))\n",
        "",
        "test_gating.py::test_coordinate_descent_of_scores_of_any_sign_and_for_all_experts",
    ),
    Fault(
        "the only gate of a differentiable top-k is the probability",
        "gating.py",
        "gates = best.values if best.coor_descent_values is None else",
        "gates = best.values if best.coor_descent_values is None or self.top_n == 1 else",
        "test_gating.py::test_the_only_gate_of_a_differentiable_topk_is_the_selection",
    ),
    Fault(
        "groups of half the size asked for warn",
        "gate.py",
        "2 * size < self.group_size",
        "2 * size <= self.group_size",
        "test_gating.py::test_a_group_size_that_divides_badly_warns",
    ),
    Fault(
        "dense tensors forget the draws",
        "gate.py",
        "routing = self.route(x, noise_gates, noise_mult, mask=mask, route_by=route_by, draws=draws)",
        "routing = self.route(x, noise_gates, noise_mult, mask=mask, route_by=route_by)",
        "test_gate.py::test_the_dense_tensors_are_those_of_a_route_with_the_same_arguments",
    ),
    Fault(
        "dense tensors forget route_by",
        "gate.py",
        "routing = self.route(x, noise_gates, noise_mult, mask=mask, route_by=route_by, draws=draws)",
        "routing = self.route(x, noise_gates, noise_mult, mask=mask, draws=draws)",
        "test_gate.py::test_the_dense_tensors_are_those_of_a_route_with_the_same_arguments",
    ),
    Fault(
        "a threshold for evaluation of another top_n is not refused in time",
        "gating.py",
        '    for name in ("threshold_train", "threshold_eval"):\n        theirs',
        '    for name in ("threshold_train",):\n        theirs',
        "test_errors.py::test_a_state_dict_for_another_top_n_is_refused_before_anything_is_loaded",
    ),
    Fault(
        "widths of experts in the middle are not compared",
        "experts.py",
        "if any(width != widths[0] for width in widths):",
        "if widths[-1] != widths[0]:",
        "test_errors.py::test_all_widths_of_experts_are_compared",
    ),
    Fault(
        "padding reaches the dense tensors",
        "moe.py",
        "        if mask is not None:\n            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)\n",
        "",
        "test_moe.py::test_padding_of_a_hooked_gate_may_hold_anything",
    ),
    Fault(
        "the dense sum is weighted in the dtype of the results",
        "moe.py",
        "einsum(slots.to(combine.dtype), combine,",
        "einsum(slots, combine.to(slots.dtype),",
        "test_moe.py::test_results_of_half_precision_are_weighted_by_gates_of_float32",
    ),
    Fault(
        "results are weighted in their own dtype",
        "routing.py",
        "dtype = torch.promote_types(y.dtype, self.gates.dtype)",
        "dtype = y.dtype",
        "test_moe.py::test_results_of_half_precision_are_weighted_by_gates_of_float32",
    ),
    Fault(
        "results are weighted in the dtype of the gates",
        "routing.py",
        "dtype = torch.promote_types(y.dtype, self.gates.dtype)",
        "dtype = self.gates.dtype",
        "test_layouts.py::test_results_are_weighted_in_the_wider_dtype_of_theirs_and_the_gates",
    ),
    Fault(
        "rows of an expert are in another order than their tokens",
        "layouts.py",
        "queue, order = experts.flatten().sort(stable=True)",
        "order = (experts.flatten() * 7 + torch.arange(choices) % 7).argsort(); queue = experts.flatten()[order]",
        "test_routing.py::test_rows_of_an_expert_are_in_the_order_of_their_tokens",
    ),
    Fault(
        "empty slots are filled with what the first slot holds",
        "layouts.py",
        "torch.where(empty, tokens.amin(), tokens)",
        "torch.where(empty, tokens[0], tokens)",
        "test_layouts.py::test_empty_slots_hold_no_padding_whatever_slot_and_token_they_are",
    ),
    Fault(
        "the empty slots around one token are not filled",
        "layouts.py",
        "buffers, empty & empty.all())",
        "buffers, empty & (empty.sum() >= len(empty) - 1))",
        "test_layouts.py::test_empty_slots_hold_no_padding_whatever_slot_and_token_they_are",
    ),
    Fault(
        "a derivative of a forward-mode derivative forgets that rows were scaled by their gates",
        "layouts.py",
        "tangent = _straight_through(torch.zeros_like(rows) if drows is None else drows, gates, choices, places)",
        "tangent = torch.zeros_like(rows) if drows is None else drows",
        "test_layouts.py::test_straight_through_is_the_derivative_of_scaling_by_one",
    ),
    Fault(
        "forward mode widens rows of half precision",
        "layouts.py",
        "rows * _at_choices(dgates, choices).to(rows.dtype)",
        "rows * _at_choices(dgates, choices)",
        "test_layouts.py::test_forward_mode_keeps_the_dtype_of_rows",
    ),
    Fault(
        "gradients are multiplied in place where they will be derived",
        "layouts.py",
        "times = torch.mul if may_be_derived(grad, y, gates) else Tensor.mul_",
        "times = torch.mul if may_be_derived(grad) else Tensor.mul_",
        "test_layouts.py::test_second_derivatives_of_a_sum_whose_cotangent_needs_none",
    ),
    Fault(
        "many sums at a time are taken from the first axis",
        "layouts.py",
        "else t.unbind(dim) for",
        "else t.unbind(0) for",
        "test_layouts.py::test_many_sums_at_a_time_are_the_sums_one_by_one",
    ),
    Fault(
        "experts with hooks are skipped where nothing needs gradients",
        "experts.py",
        " and not has_hooks(self.experts[number]):",
        ":",
        "test_experts.py::test_without_gradients_one_idle_expert_runs_and_those_with_hooks",
    ),
    Fault(
        "all experts are skipped where nobody has tokens and nothing needs gradients",
        "experts.py",
        "if is_idle and results and not torch.is_grad_enabled()",
        "if is_idle and not torch.is_grad_enabled()",
        "test_experts.py::test_without_gradients_one_idle_expert_runs_and_those_with_hooks",
    ),
    Fault(
        "two neighbours compute a row of a cut expert twice",
        "distributed/placement.py",
        "return range(*(rows * edge // self.num_ranks for edge in edges))",
        "start, stop = (rows * edge // self.num_ranks for edge in edges); return range(start, min(stop + 1, rows))",
        "distributed/test_placement.py",
    ),
    Fault(
        "the adjoint of the all-to-all keeps its splits",
        "distributed/collectives.py",
        "return all_to_all(grads[0], ctx.received, ctx.sent, ctx.channel), None, None, None",
        "return all_to_all(grads[0], ctx.sent, ctx.received, ctx.channel), None, None, None",
        "distributed/test_collectives.py::test_collective[3-check_all_to_all]",
    ),
    Fault(
        "the adjoint of the all-gather is a slice",
        "distributed/collectives.py",
        "return parts.view(ranks, rows, *parts.shape[1:]).sum(dim=0), None, None",
        "return parts.view(ranks, rows, *parts.shape[1:])[ctx.channel.rank], None, None",
        "distributed/test_exactness.py::test_everything_equals_one_process[3-4-ragged]",
    ),
    Fault(
        "copies of a cut expert keep their own gradients",
        "distributed/collectives.py",
        "return None, None, None, rows, *_sum_over_holders(parameters, ctx.holders, ctx.channel)",
        "return None, None, None, rows, *parameters",
        "distributed/test_exactness.py::test_everything_equals_one_process[3-4-ragged]",
    ),
    Fault(
        "gradients are not summed over a mesh's replicas",
        "distributed/collectives.py",
        "if ctx.data_parallel is not None:",
        "if False:",
        "distributed/test_sharding.py::test_mesh_of_replicas_and_expert_ranks[4-4]",
    ),
    Fault(
        "ranks that disagree go on",
        "distributed/agreement.py",
        "if len(set(checksums)) > 1:",
        "if False:",
        "distributed/test_faults.py::test_all_ranks_raise_the_same_error_with_the_values_of_each[3-layer]",
    ),
    Fault(
        "gradients of experts are those of the sum over ranks",
        "distributed/exchange.py",
        "return self.parallel.num_ranks if self.parallel.sharded else 1",
        "return 1",
        "distributed/test_exactness.py::test_everything_equals_one_process[3-4-ragged]",
    ),
    Fault(
        "gradients of tokens are averaged too",
        "distributed/exchange.py",
        "arrived = self._scaled(self._send(rows, self.there), self._scale)",
        "arrived = self._send(rows, self.there)",
        "distributed/test_exactness.py::test_everything_equals_one_process[3-4-ragged]",
    ),
    Fault(
        "results return in the order of experts",
        "distributed/exchange.py",
        "returning = torch.cat([part for source in zip(*parts, strict=True) for part in source])",
        "returning = torch.cat([part for source in parts for part in source])",
        "distributed/test_exactness.py::test_everything_equals_one_process[3-8-ragged]",
    ),
    Fault(
        "every row goes everywhere",
        "distributed/strategies.py",
        'STRATEGIES: dict[str, Strategy] = {"all_to_all": all_to_all,',
        'STRATEGIES: dict[str, Strategy] = {"all_to_all": all_gather,',
        "distributed/test_traffic.py::test_only_rows_that_change_rank_travel",
    ),
    Fault(
        "results travel in the dtype of each rank's own experts",
        "distributed/exchange.py",
        "parts = [result.to(dtype).split(sources)",
        "parts = [result.split(sources)",
        "distributed/test_faults.py::test_results_of_experts_that_differ_in_dtype_travel_in_the_widest",
    ),
    Fault(
        "clipping counts a cut expert on all its ranks",
        "distributed/sharding.py",
        "if parallel.holders_of(number, name)[0] == channel.rank:",
        "if True:",
        "distributed/test_sharding.py::test_three_steps_of_clipped_adamw_equal_one_process[2-3-2-None]",
    ),
    Fault(
        "experts start as each rank built them",
        "distributed/sharding.py",
        "        copy_from_first_rank(layer.experts, *filter(None, (parallel.data_parallel, parallel.channel)))\n",
        "",
        "distributed/test_sharding.py::test_sharded_layer[2-check_state_dicts]",
    ),
    Fault(
        "sharded experts are left to DistributedDataParallel",
        "distributed/sharding.py",
        "if is_managed_by_ddp(next(experts.parameters(), None)):",
        "if False:",
        "distributed/test_faults.py::test_sharded_experts_inside_ddp_are_refused",
    ),
    Fault(
        "layers that run again in the backward count again",
        "tools/swap.py",
        "        if is_recomputing():\n            return\n",
        "",
        "test_swap.py::test_backward_inside_the_block_counts_recomputed_layers_once",
    ),
    Fault(
        "layers that run again in the backward are recorded again",
        "tools/watch.py",
        "if module is decider and not is_recomputing():",
        "if module is decider:",
        "test_watch.py::test_layers_that_run_again_in_the_backward_are_recorded_once",
    ),
    Fault(
        "a shared feed-forward becomes several layers",
        "tools/swap.py",
        "        if first not in layers:\n",
        "        if True:\n",
        "test_swap.py::test_a_shared_layer_counts_once_for_each_call",
    ),
    Fault(
        "copies of a feed-forward are the same module",
        "layers.py",
        "[deepcopy(ffn) for _ in range(num_experts)]",
        "[ffn for _ in range(num_experts)]",
        "test_upcycle.py::test_gradients_of_the_copies_add_up_to_the_dense_ones",
    ),
    Fault(
        "gates of an upcycled layer do not sum to one",
        "moe.py",
        "gate = TopNGating(dim, num_experts, 1e-20,",
        "gate = TopNGating(dim, num_experts, 1e-9,",
        "test_upcycle.py::test_layer_starts_as_the_dense_one",
    ),
    Fault(
        "statistics count padding",
        "tools/watch.py",
        "real = torch.ones_like(r.kept[..., 0]) if r.mask is None else r.mask",
        "real = torch.ones_like(r.kept[..., 0])",
        "test_watch.py::test_figures_are_those_counted_by_hand",
    ),
    Fault(
        "statistics of ranks are cut to the shortest sequence",
        "tools/watch.py",
        "dist.all_reduce(length, dist.ReduceOp.MAX, group)",
        "pass",
        "distributed/test_stats.py",
    ),
    Fault(
        "plans forget the mask",
        "tools/plan.py",
        ".decide(routing.logits, mask=routing.mask, draws=draws)",
        ".decide(routing.logits, draws=draws)",
        "test_plan.py::test_rerouted_logits_are_what_a_gate_with_the_settings_decides",
    ),
    Fault(
        "plans forget the settings of the layer's gate",
        "tools/plan.py",
        'settings_of(gate, changes.get("top_n", getattr(gate, "top_n", 1))) | changes',
        "changes",
        "test_plan.py::test_what_is_not_changed_stays_as_the_gate_has_it",
    ),
    Fault(
        "the audit changes only other rows",
        "tools/audit.py",
        "later |= moved_by((position >= token).expand(b, n))",
        "later |= moved_by((position > n).expand(b, n))",
        "test_plan.py::test_audit_finds_what_outputs_depend_on",
    ),
    Fault(
        "collecting inside of collecting ends both",
        "tools/swap.py",
        "        _COLLECTING.losses = before",
        "        _COLLECTING.losses = None",
        "test_swap.py::test_blocks_can_be_nested_and_end_with_errors",
    ),
    Fault(
        "layers that run again warn of losses that nobody collects",
        "tools/swap.py",
        "not torch.compiler.is_compiling() and not is_recomputing():",
        "not torch.compiler.is_compiling():",
        "test_swap.py::test_layers_that_run_again_after_the_block_warn_of_nothing",
    ),
    Fault(
        "sparse layers take the dtype of quantised weights",
        "tools/swap.py",
        "(parameter for parameter in module.parameters() if parameter.is_floating_point())",
        "module.parameters()",
        "test_swap.py::test_the_dtype_is_that_of_floating_point_parameters",
    ),
    Fault(
        "a shared layer is told of under all its names",
        "tools/swap.py",
        "for name, module in model.named_modules() if isinstance(module, SparseFeedForward)}",
        "for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, SparseFeedForward)}",
        "test_swap.py::test_a_shared_layer_counts_once_for_each_call",
    ),
    Fault(
        "transformers does not initialise norms",
        "tools/swap.py",
        "Experts, Expert, GEGLU, RMSNorm))",
        "Experts, Expert, GEGLU))",
        "integrations/test_families.py::test_routers_and_scales_that_a_checkpoint_lacks_start_as_they_do_elsewhere",
    ),
    Fault(
        "transformers does not initialise multiplicative biases",
        "tools/swap.py",
        "Experts, Expert, GEGLU, RMSNorm))",
        "Experts, Expert, RMSNorm))",
        "integrations/test_families.py::test_routers_and_scales_that_a_checkpoint_lacks_start_as_they_do_elsewhere",
    ),
    Fault(
        "transformers initialises routers as its own layers",
        "tools/swap.py",
        "(RouterLinear, TopNGating, Experts",
        "(TopNGating, Experts",
        "integrations/test_families.py::test_routers_and_scales_that_a_checkpoint_lacks_start_as_they_do_elsewhere",
    ),
    Fault(
        "transformers initialises routers a second time",
        "compat.py",
        "    if isinstance(module, kinds):\n        module.reset_parameters()  # pyright: ignore[reportCallIssue]\n    else:",
        "    if isinstance(module, kinds):\n        module.reset_parameters()\n    if True:",
        "integrations/test_families.py::test_routers_and_scales_that_a_checkpoint_lacks_start_as_they_do_elsewhere",
    ),
    Fault(
        "a tenth layer counts as part of the first one",
        "tools/find.py",
        'tuple(f"{outer}." for outer in found)',
        "tuple(found)",
        "test_find.py::test_names_that_begin_alike_are_not_inside_each_other",
    ),
    Fault(
        "a type means only itself",
        "tools/find.py",
        "isinstance(kind, type) and isinstance(module, kind)",
        "isinstance(kind, type) and type(module) is kind",
        "test_find.py::test_a_type_means_what_is_derived_from_it_too",
    ),
    Fault(
        "experts of a model's own are seen only right under a feed-forward",
        "tools/find.py",
        'name.split(".")[-1] == "experts"',
        'name == "experts"',
        "test_find.py::test_what_a_sparse_layer_cannot_replace_is_refused_by_name",
    ),
    Fault(
        "a model's own mixture is seen only as a whole feed-forward",
        "tools/find.py",
        're.search("(?i)moe|experts", type(module).__name__)',
        're.search("(?i)moe|experts", type(feed_forward.module).__name__)',
        "test_find.py::test_what_a_sparse_layer_cannot_replace_is_refused_by_name",
    ),
    Fault(
        "arguments with defaults count as inputs",
        "tools/find.py",
        "parameter.default is Parameter.empty and parameter.kind",
        "parameter.kind",
        "test_find.py::test_what_has_a_default_is_no_second_input",
    ),
    Fault(
        "hooks inside a feed-forward get tensors without data",
        "tools/find.py",
        "if any(has_hooks(part) for part in module.modules()):",
        "if has_hooks(module):",
        "test_find.py::test_hooks_see_no_tensors_without_data",
    ),
    Fault(
        "half a feed-forward with buffers is taken for a whole one",
        "tools/find.py",
        "(*module.named_parameters(), *module.named_buffers())",
        "module.named_parameters()",
        "test_find.py::test_what_a_sparse_layer_cannot_replace_is_refused_by_name",
    ),
    Fault(
        "half a feed-forward in bfloat16 is taken for a whole one",
        "tools/find.py",
        "dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.get_default_dtype())",
        "dtype = torch.get_default_dtype()",
        "test_find.py::test_what_a_sparse_layer_cannot_replace_is_refused_by_name",
    ),
    Fault(
        "a module that pools tokens is taken for a feed-forward",
        "tools/find.py",
        "if y.shape != (1, 2, dim):",
        "if y.shape[-1] != dim:",
        "test_find.py::test_what_a_sparse_layer_cannot_replace_is_refused_by_name",
    ),
]


def run(test: str, tree: Path) -> subprocess.CompletedProcess[str]:
    """Run a test on the package in tree."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{test}"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def copy_tree(to: Path) -> None:
    for folder in ("st_moe_pytorch", "tests"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", to)


def is_noticed(fault: Fault) -> bool:
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        copy_tree(tree)
        file = tree / "st_moe_pytorch" / fault.file
        source = file.read_text()
        if source.count(fault.right) != 1:
            raise SystemExit(f"{fault.name}: the line to change stands {source.count(fault.right)} times in {fault.file}")
        file.write_text(source.replace(fault.right, fault.wrong))
        # 1 is pytest's code for failed tests; an error in collecting would be another
        return run(fault.test, tree).returncode == 1


def main() -> None:
    chosen = [fault for fault in FAULTS if not sys.argv[1:] or fault.name in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as name:
        copy_tree(Path(name))
        for test in sorted({fault.test for fault in chosen}):
            if (result := run(test, Path(name))).returncode:
                raise SystemExit(f"{test} fails without any fault:\n{result.stdout}")
    missed = 0
    for fault in chosen:
        noticed = is_noticed(fault)
        missed += not noticed
        print(f"{'noticed' if noticed else 'MISSED '}  {fault.name}  ({fault.test})", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults noticed")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
