"""The python blocks for many ranks, of all pages, run in order on four of them."""

import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from st_moe_pytorch import MoE, SparseMoEBlock

ROOT = Path(__file__).parents[2]


def run_blocks(rank, folder):
    namespace = {"torch": torch, "MoE": MoE, "SparseMoEBlock": SparseMoEBlock, "folder": folder}
    front = (ROOT / "README.md").read_text().partition("## Many ranks")[2].partition("\n## ")[0]
    for text, count in ((front, 1), ((ROOT / "st_moe_pytorch" / "distributed" / "README.md").read_text(), 2)):
        blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        assert len(blocks) == count
        with patch.object(dist, "init_process_group"):  # these processes have their group
            for block in blocks:
                exec(compile(block, "page", "exec"), namespace)
                if "dcp.load" in block:
                    saved = namespace["optimizer"].state_dict()["state"]
                    assert all(float(moments["exp_avg_sq"].sum()) > 0 for moments in saved.values())
    assert namespace["outputs"].shape == (2, 64, 512)
    assert len(list(namespace["model"].moe.experts.experts.children())) == 8


@pytest.mark.parametrize("workers", [4], indirect=True)
def test_python_blocks_run(workers, tmp_path):
    workers.run(run_blocks, str(tmp_path / "checkpoint"))
