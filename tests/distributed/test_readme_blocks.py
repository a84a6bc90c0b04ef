"""The README's python blocks for many ranks run, in order, on four of them."""

import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from st_moe_pytorch import MoE, SparseMoEBlock

README = Path(__file__).parents[2] / "README.md"


def run_blocks(rank):
    section = README.read_text().partition("## Experts on many ranks")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 2
    namespace = {"torch": torch, "MoE": MoE, "SparseMoEBlock": SparseMoEBlock}
    with patch.object(dist, "init_process_group"):  # these processes have their group
        for block in blocks:
            exec(compile(block, str(README), "exec"), namespace)
    assert namespace["outputs"].shape == (2, 64, 512)
    assert len(list(namespace["model"].moe.experts.experts.children())) == 8


@pytest.mark.parametrize("workers", [4], indirect=True)
def test_python_blocks_run(workers):
    workers.run(run_blocks)
