"""The examples run to their end, on little."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow
def test_finetuning_gpt2(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven " * 200)
    printed = run("finetune_gpt2.py", "--text", text, "--out", tmp_path, "--steps", 10)
    before, after = re.search(r"validation loss ([\d.]+) before, ([\d.]+) after", printed).groups()
    assert float(after) < 0.9 * float(before)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_upcycling_starts_where_the_dense_model_ended():
    printed = run("upcycle_lm.py", "--steps", 4, "--more-steps", 4, "--dim", 32, "--depth", 1, "--seq-len", 32)
    before, upcycled = re.search(r"seed 0: ([\d.]+) bits per byte after 4 steps of the dense model, ([\d.]+) upcycled", printed).groups()
    assert abs(float(before) - float(upcycled)) <= 0.001
    assert "dense, equal time: " in printed
