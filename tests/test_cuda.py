"""What only a GPU can show: the CPU's numbers, no waiting, bit-identical runs, CUDA graphs. Skipped without one."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from oracles import assert_close, gradients
from test_golden import GATING, build_gate
from test_golden import golden as golden_case
from torch import nn
from torch.profiler import ProfilerActivity, profile

from st_moe_pytorch import Expert, MoE, SparseMoEBlock, TopNGating
from st_moe_pytorch.distributed import shard_experts
from st_moe_pytorch.grouped import linear as grouped
from st_moe_pytorch.grouped.side_by_side import side_by_side

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream"),
    pytest.mark.filterwarnings("ignore:Warning. Profiler clears events"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def _products_in_full_precision():
    assert not torch.backends.cuda.matmul.allow_tf32
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(dtype: torch.dtype, *, dim=64, experts=8, k=2, called=False, **gating) -> MoE:
    gate = TopNGating(dim, experts, top_n=k, **{"policy_train": "threshold", **gating})
    moe = MoE(dim, experts, gate=gate, experts=[Expert(dim, 2) for _ in range(experts)])
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.2)
    if called:
        moe.experts.experts[1].register_forward_hook(lambda *_: None)
    return moe.to(dtype)


def results(moe: Callable, x: torch.Tensor, cotangent: torch.Tensor, **arguments) -> list[torch.Tensor]:
    """Outputs, loss and the gradients of x and of all parameters, on the CPU."""
    outputs, auxiliary, *_ = moe(x, **arguments)
    inputs = [x, *(p for _, p in sorted(moe.named_parameters()))]
    return [t.detach().cpu() for t in (outputs, auxiliary, *gradients(outputs.to(x.dtype), cotangent, inputs))]


@pytest.mark.parametrize(
    "setting", [{}, {"capacity_factor_train": None}, {"k": 1}, {"k": 4, "priority": "token"}], ids=str
)
@pytest.mark.parametrize("form", ["shared", "called", "compiled"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_numbers_of_the_cpu(dtype, form, setting):
    moe = layer(dtype, called=form == "called", **setting)
    x, cotangent, mask = (
        torch.randn(3, 50, 64, dtype=dtype),
        torch.randn(3, 50, 64, dtype=dtype),
        torch.rand(3, 50) < 0.8,
    )
    wide = layer(torch.promote_types(dtype, torch.float32), **setting)
    wide.load_state_dict(moe.state_dict())
    # the router's numbers are those of this dtype, so that no choice changes
    expected = results(
        wide,
        x.to(wide.gate.to_gates.weight.dtype).requires_grad_(),
        cotangent.to(wide.gate.to_gates.weight.dtype),
        mask=mask,
    )
    on_gpu = moe.cuda()
    run = torch.compile(on_gpu, fullgraph=True) if form == "compiled" else on_gpu
    found = results(run, x.cuda().requires_grad_(), cotangent.cuda(), mask=mask.cuda())
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual.to(wanted.dtype), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype):
    moe = layer(torch.float32)
    x, cotangent = torch.randn(2, 40, 64), torch.randn(2, 40, 64)
    expected = results(moe, x.clone().requires_grad_(), cotangent)
    moe.cuda()
    with torch.autocast("cuda", dtype):
        found = results(moe, x.cuda().requires_grad_(), cotangent.cuda())
    assert all(t.dtype == torch.float32 for t in found)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("name", GATING)
def test_golden_assignments(name):
    case = golden_case(name)
    gate, dtype = build_gate(case).cuda(), getattr(torch, case.config.dtype)
    mask = (case.importance == 1).cuda() if case.config.has_importance else None
    routing = gate.route(
        case.x.to(dtype).cuda(), mask=mask, draws=case.draws[: case.config.top_n].movedim(0, -1).cuda()
    )
    dispatch, combine = routing.dense()
    assert torch.equal(dispatch.cpu(), case.dispatch.to(dispatch.dtype))
    assert_close(combine.cpu(), case.combine, 4e-3 if "bf16" in name else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("forced", [False, True])
def test_every_run_gives_the_same_bits(dtype, forced):
    moe = layer(dtype, dim=256, experts=16, k=4).cuda()
    x, cotangent = (
        torch.randn(2, 512, 256, device="cuda", dtype=dtype, requires_grad=True),
        torch.randn(2, 512, 256, device="cuda", dtype=dtype),
    )
    torch.use_deterministic_algorithms(forced, warn_only=False)
    try:
        first, *others = (results(moe, x, cotangent) for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_functions_change_no_number(dtype, monkeypatch):
    moe = layer(dtype, dim=256, experts=16, k=4, capacity_factor_train=None).cuda()
    x = torch.randn(2, 1024, 256, device="cuda", dtype=dtype, requires_grad=True)
    cotangent = torch.randn_like(x)
    found = results(moe, x, cotangent)
    monkeypatch.setattr("st_moe_pytorch.compat.WORTH_FUSING", 2**60)
    for actual, wanted in zip(found, results(moe, x, cotangent), strict=True):
        assert_close(actual.float(), wanted.float(), 2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_waits_for_nothing(training):
    block = SparseMoEBlock(layer(torch.bfloat16)).cuda().bfloat16().train(training)
    x = torch.randn(2, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=training)
    mask = torch.ones(2, 64, dtype=torch.bool, device="cuda")
    block(x, mask=mask)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs, auxiliary, *_ = block(x, mask=mask)
        if training:
            (outputs.sum() + auxiliary).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert outputs.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9, reason="no kernel")
def test_experts_without_rows_get_zeros_where_memory_holds_other_numbers():
    """On each architecture: some kernels write those zeros themselves."""
    rows, left = (torch.randn(300, width, device="cuda", dtype=torch.bfloat16) for width in (256, 64))
    offsets = torch.tensor([0, 100, 100, 250, 300, 300], dtype=torch.int32, device="cuda")
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        assert torch.empty(2, device="cuda").isnan().all()
        products = grouped._outer(left, rows, offsets)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not products[[0, 2, 5]].any()
    assert_close(products[1].float(), left[:100].float().t() @ rows[:100].float(), 1e-2)


def test_matrices_stand_side_by_side_on_a_gpu_in_bfloat16_alone():
    moe = layer(torch.float32, dim=48).cuda()
    weights = [[expert.net[i].weight for expert in moe.experts.experts] for i in (0, 2)]
    assert not any(side_by_side(each) is not None for each in weights)
    moe.bfloat16()
    assert all(side_by_side(each) is not None for each in weights)


def test_launches_do_not_grow_with_the_number_of_experts():
    counted = []
    for experts in (4, 64):
        moe = layer(torch.bfloat16, experts=experts).cuda()
        x = torch.randn(2, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        moe(x).outputs.sum().backward()
        moe.zero_grad(set_to_none=True)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            moe(x).outputs.sum().backward()
            torch.cuda.synchronize()
        counted.append(sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events()))
    assert 0 < counted[1] <= counted[0] + 10, counted


@pytest.mark.parametrize("training", [True, False])
def test_capture_in_a_graph(training):
    moe = layer(torch.bfloat16).cuda().train(training)
    x = torch.randn(2, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=training)

    def step():
        outputs = moe(x).outputs
        return (
            (outputs, *torch.autograd.grad(outputs.sum(), [x, *moe.experts.parameters()])) if training else (outputs,)
        )

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.set_grad_enabled(training):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.set_grad_enabled(training), torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    with torch.set_grad_enabled(training):
        expected = step()
    assert all(map(torch.equal, captured, expected))


def test_one_rank_over_nccl(tmp_path):
    moe = layer(torch.float32, experts=5).cuda()
    x, cotangent = torch.randn(2, 40, 64, device="cuda", requires_grad=True), torch.randn(2, 40, 64, device="cuda")
    expected = results(moe, x, cotangent)
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = results(shard_experts(moe), x, cotangent)
    finally:
        dist.destroy_process_group()
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, TOLERANCE[torch.float32])
