"""Scalars of routing in TensorBoard's own files."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from st_moe_pytorch import MoE
from st_moe_pytorch.tools.watch import record_routing, routing_stats, write_scalars


def test_scalars_can_be_read_back(tmp_path):
    model = torch.nn.ModuleDict({"moe": MoE(8, 4)})
    written = {}
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (0, 10):
            with record_routing(model) as records:
                model["moe"](torch.randn(2, 12, 8))
            stats = routing_stats(records)
            written[step] = stats["moe"].scalars()
            write_scalars(writer, stats, step)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {f"routing/moe/{name}" for name in written[0]}
    for name in written[0]:
        got = {event.step: event.value for event in events.Scalars(f"routing/moe/{name}")}
        assert got == pytest.approx({step: values[name] for step, values in written.items()}, rel=1e-6)
