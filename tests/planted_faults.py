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
        "return max(min(tokens, int(tokens * factor / num_experts)), min_capacity)",
        "return max(min(tokens, int(tokens * factor / num_experts) + 1), min_capacity)",
        "test_golden.py::test_assignments_and_gates",
    ),
    Fault(
        "slots restart at every rank",
        "routing.py",
        'queues = rearrange(indices.masked_fill(~asked, num_experts), "b n k -> b (k n)")',
        'queues = rearrange(indices.masked_fill(~asked, num_experts) + 99 * torch.arange(indices.shape[-1]), "b n k -> b (k n)")',
        "test_golden.py::test_assignments_and_gates",
    ),
    Fault(
        "second choices are served before the first ones of later tokens",
        "routing.py",
        '"b n k -> b (k n)")\n    queues, request',
        '"b n k -> b (n k)")\n    queues, request',
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
        "balance, z = self._losses(logits, probs, best.indices, mask)",
        "balance, z = self._losses(logits, probs, best.indices, kept[..., 0])",
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
        "gating.py",
        "features = features.masked_fill(~mask.unsqueeze(-1), 0.0)",
        "features = features + 0.0",
        "test_gating.py::test_padding_may_hold_anything",
    ),
    Fault(
        "gates are not normalised",
        "gating.py",
        "return gates if self.top_n == 1 else gates / (gates.sum(dim=-1, keepdim=True) + self.eps)",
        "return gates",
        "test_golden.py::test_assignments_and_gates",
    ),
    Fault(
        "Switch gates are normalised to one",
        "gating.py",
        "return gates if self.top_n == 1 else gates",
        "return gates",
        "test_golden.py::test_assignments_and_gates",
    ),
    Fault(
        "gates are renormalised after a drop",
        "gating.py",
        "gates=gates.view(b, n, self.top_n),",
        "gates=(gates * kept / ((gates * kept).sum(-1, keepdim=True) + 1e-9)).view(b, n, self.top_n),",
        "test_golden.py::test_assignments_and_gates",
    ),
    Fault(
        "the z-loss sees the noise",
        "gating.py",
        "probs = self._noised(logits, noise_mult if noise_gates else 0.0).softmax(dim=-1)",
        "logits = self._noised(logits, noise_mult if noise_gates else 0.0); probs = logits.softmax(dim=-1)",
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
        "gating.py",
        "dtype = torch.promote_types(input.dtype, torch.float32)",
        "dtype = input.dtype",
        "test_gating.py::test_half_precision_is_routed_in_float32",
    ),
    Fault(
        "autocast reaches the router",
        "gating.py",
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
        "routing.py",
        "(1 + (gates - gates.detach()))",
        "(1 + (gates - gates).detach())",
        "test_moe.py::test_all_layouts_equal_the_definition",
    ),
    Fault(
        "rows are combined by the gate of the best choice",
        "routing.py",
        "weighted = y * self.gates.flatten()[choices].unsqueeze(-1)",
        "weighted = y * self.gates.flatten()[choices // k * k].unsqueeze(-1)",
        "test_moe.py::test_all_layouts_equal_the_definition",
    ),
    Fault(
        "a slot without a token is combined",
        "routing.py",
        "gates = self.gates.masked_fill(~self.kept, 0.0)",
        "gates = self.gates; chosen = torch.cat((y[:-1], y[:1]))[self._positions()]",
        "test_moe.py::test_all_layouts_equal_the_definition",
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
        "else expert(block)",
        "else expert(block) if block.numel() else block",
        "test_experts.py::test_every_parameter_gets_a_gradient_even_without_tokens",
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
        "distributed/collectives.py",
        "if len({checksum for checksum, *_ in gathered}) > 1:",
        "if False:",
        "distributed/test_faults.py::test_all_ranks_raise_the_same_error_with_the_values_of_each[3-layer]",
    ),
    Fault(
        "gradients of experts are those of the sum over ranks",
        "distributed/strategies.py",
        "scale = self.num_ranks if self.sharded else 1",
        "scale = 1",
        "distributed/test_exactness.py::test_everything_equals_one_process[3-4-ragged]",
    ),
    Fault(
        "gradients of tokens are averaged too",
        "distributed/strategies.py",
        "arrived = scale_gradient(send(rows, there, self.channel), scale)",
        "arrived = send(rows, there, self.channel)",
        "distributed/test_exactness.py::test_everything_equals_one_process[3-4-ragged]",
    ),
    Fault(
        "results return in the order of experts",
        "distributed/strategies.py",
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
        "clipping counts a cut expert on all its ranks",
        "distributed/sharding.py",
        "if holders_of(number)[0] == channel.rank]",
        "if holders_of(number)]",
        "distributed/test_sharding.py::test_three_steps_of_clipped_adamw_equal_one_process[2-3-2-None]",
    ),
    Fault(
        "experts start as each rank built them",
        "distributed/sharding.py",
        "        _copy_from_first_rank(layer.experts, *filter(None, (parallel.data_parallel, parallel.channel)))\n",
        "",
        "distributed/test_sharding.py::test_sharded_layer[2-check_state_dicts]",
    ),
    Fault(
        "sharded experts are left to DistributedDataParallel",
        "distributed/sharding.py",
        "if active is not None and any(parameter is mine for parameter in active._module_parameters):",
        "if False:",
        "distributed/test_faults.py::test_sharded_experts_inside_ddp_are_refused",
    ),
    Fault(
        "layers that run again in the backward count again",
        "swap.py",
        "and self.training and not is_recomputing()",
        "and self.training",
        "test_swap.py::test_backward_inside_the_block_counts_recomputed_layers_once",
    ),
    Fault(
        "layers that run again in the backward are recorded again",
        "watch.py",
        "if not is_recomputing():",
        "if True:",
        "test_watch.py::test_layers_that_run_again_in_the_backward_are_recorded_once",
    ),
    Fault(
        "a shared feed-forward becomes several layers",
        "swap.py",
        "model.set_submodule(name, layers[id(module)])",
        "model.set_submodule(name, _in_place_of(module, make(module)))",
        "test_swap.py::test_a_shared_layer_counts_once_for_each_call",
    ),
    Fault(
        "copies of a feed-forward are the same module",
        "upcycle.py",
        "[deepcopy(ffn) for _ in range(num_experts)]",
        "[ffn for _ in range(num_experts)]",
        "test_upcycle.py::test_gradients_of_the_copies_add_up_to_the_dense_ones",
    ),
    Fault(
        "gates of an upcycled layer do not sum to one",
        "moe.py",
        "moe.gate.eps = 1e-20",
        "moe.gate.eps = 1e-9",
        "test_upcycle.py::test_layer_starts_as_the_dense_one",
    ),
    Fault(
        "statistics count padding",
        "watch.py",
        "real = torch.ones_like(r.kept[..., 0]) if r.mask is None else r.mask",
        "real = torch.ones_like(r.kept[..., 0])",
        "test_watch.py::test_figures_are_those_counted_by_hand",
    ),
    Fault(
        "statistics of ranks are cut to the shortest sequence",
        "watch.py",
        "dist.all_reduce(length, dist.ReduceOp.MAX, group)",
        "pass",
        "distributed/test_stats.py",
    ),
    Fault(
        "plans forget the mask",
        "plan.py",
        "mask=routing.mask, draws=draws",
        "draws=draws",
        "test_plan.py::test_rerouted_logits_are_what_a_gate_with_the_settings_decides",
    ),
    Fault(
        "plans forget the settings of the layer's gate",
        "plan.py",
        'settings_of(gate, changes.get("top_n", gate.top_n)) | changes',
        "changes",
        "test_plan.py::test_what_is_not_changed_stays_as_the_gate_has_it",
    ),
    Fault(
        "the audit changes only other rows",
        "plan.py",
        "later |= moved_by((position >= token).expand(b, n))",
        "later |= moved_by((position > n).expand(b, n))",
        "test_plan.py::test_audit_finds_what_outputs_depend_on",
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
