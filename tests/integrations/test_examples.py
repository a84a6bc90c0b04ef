"""The examples run to their end, on little."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def start(script, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)


def run(script, *arguments):
    process = start(script, *arguments)
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
    before, upcycled = re.search(
        r"seed 0: ([\d.]+) bits per byte after 4 steps of the dense model, ([\d.]+) upcycled", printed
    ).groups()
    assert abs(float(before) - float(upcycled)) <= 0.001
    assert "dense, equal time: " in printed


@pytest.mark.slow
def test_ablations_go_on_where_they_were_interrupted(tmp_path):
    tiny = [
        "--seq-len",
        32,
        "--dim",
        32,
        "--depth",
        1,
        "--seeds",
        0,
        1,
        "--jobs",
        2,
        "--out",
        tmp_path,
        "--only",
        "top 1",
    ]
    table = run("ablate_lm.py", "--steps", 3, *tiny)
    for change in ("usual", "top 1"):
        assert 4 < float(re.search(rf"^\| {change} \| ([\d.]+) \(", table, flags=re.MULTILINE)[1]) < 10
    runs = sorted(tmp_path.glob("*.json"))
    assert [run.stem for run in runs] == ["top-1-0", "top-1-1", "usual-0", "usual-1"]
    bits = [json.loads(path.read_text())["bits"]["none dropped"] for path in runs]
    assert len(set(bits)) == 4

    runs[0].unlink()
    times = [path.stat().st_mtime_ns for path in runs[1:]]
    assert rows_without_seconds(run("ablate_lm.py", "--steps", 3, *tiny)) == rows_without_seconds(table) != []
    assert [path.stat().st_mtime_ns for path in runs[1:]] == times
    assert "was run with other settings" in start("ablate_lm.py", "--steps", 4, *tiny).stderr
    assert (tmp_path / "ablations.png").read_bytes().startswith(b"\x89PNG")


def rows_without_seconds(printed):
    return re.findall(r"^(\|.*?)(?:\d+ \|)?$", printed, flags=re.MULTILINE)


@pytest.mark.slow
def test_ways_to_balance_are_compared(tmp_path):
    tiny = ["--seq-len", "32", "--dim", "32", "--depth", "1", "--experts", "4", "--steps", "4", "--seeds", "0"]
    table = run("balance_lm.py", *tiny, "--out", tmp_path, "--only", "quantiles", "nothing")
    for way in ("quantiles", "nothing"):
        load, worst, dropped, bits = re.search(rf"^\| {way} \|(.*)\|$", table, flags=re.MULTILINE)[1].split("|")
        assert 1 <= float(load.split()[0]) <= float(worst.split()[0]) <= 4
        assert 0 <= float(dropped.split("%")[0]) < 100
        assert 4 < float(bits.split()[0]) < 10
    assert "was run with other settings" in start("balance_lm.py", *tiny, "--batch", 2, "--out", tmp_path).stderr


@pytest.mark.slow
def test_one_grid_tunes_both_models(tmp_path):
    tiny = ["--seq-len", 32, "--dim", 32, "--depth", 1, "--experts", 4, "--steps", 3, "--rates", 0.01, "--seeds", 0]
    table = run("tune_lm.py", *tiny, "--out", tmp_path)
    rows = re.findall(r"^\| (?:AdamW|Muon) \|.*\| 0\.01 \| (.*) \| (.*) \|$", table, flags=re.MULTILINE)
    assert len(rows) == 4
    for column in zip(*rows, strict=True):
        bits = [float(cell.strip("*")) for cell in column]
        assert len(set(bits)) == 4
        assert [cell for cell in column if "**" in cell] == [f"**{min(bits):.3f}**"]
    sparse, dense, above = re.search(r"^\| 0 \| (.*) \| (.*) \| (.*) \|$", table, flags=re.MULTILINE).groups()
    assert sparse not in rows[0]
    assert abs(float(dense) - float(sparse) - float(above)) < 0.0011
    assert "was run with other settings" in start("tune_lm.py", *tiny, "--batch", 2, "--out", tmp_path).stderr


@pytest.mark.slow
def test_the_order_of_service_decides_whether_outputs_depend_on_the_future():
    table = run("causality_lm.py", "--steps", 2, "--seeds", 0)
    shares = dict(re.findall(r"^\| (position|token) \| 0 \| [\d.]+ \| (\d+)% \|$", table, flags=re.MULTILINE))
    assert int(shares["position"]) > 10
    assert int(shares["token"]) == 0


@pytest.mark.slow
def test_every_way_to_fine_tune_is_run(tmp_path):
    tiny = ["--seq-len", "16", "--dim", "32", "--depth", "1", "--experts", "4", "--steps", "2", "--seeds", "0"]
    arguments = [*tiny, "--sequences", 16, "--out", tmp_path, "--only", "expert dropout", "parameters"]
    printed = run("finetune_lm.py", *arguments)
    bits = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+) \(", printed, flags=re.MULTILINE))
    assert list(bits) == [
        *("usual", "dropout 0.1", "dropout 0.2", "dropout 0.4"),
        *("subset non_moe", "subset moe", "subset attention", "subset feed_forward"),
    ]
    assert len(set(bits.values())) > 4
    assert (tmp_path / "finetuning.png").read_bytes().startswith(b"\x89PNG")
    assert run("finetune_lm.py", *arguments) == printed


@pytest.mark.slow
def test_experts_of_a_trained_model_are_traced(tmp_path):
    out = tmp_path / "run"
    tiny = ["--seq-len", "16", "--dim", "32", "--depth", "1", "--experts", "4", "--steps", "2"]
    run("train_lm.py", *tiny, "--text", EXAMPLES / "train_lm.py", "--out", out)
    printed = run("trace_lm.py", out, "--text", EXAMPLES / "train_lm.py", "--most", 2)
    header, _, row, *_ = printed.splitlines()
    assert header.startswith("| layer | keyword | other letter |")
    layer, *entropies = row.strip("| ").split(" | ")
    assert layer == "blocks.0.moe"
    assert all(0 <= float(value) <= 1.39 for value in entropies if value != "nan")
    assert entropies[-1] == "1.39"
    assert len(re.findall(r"^\| blocks.0.moe \| \d \| [\d.]+% \| `", printed, flags=re.MULTILINE)) == 4
    assert "<table>" in (out / "experts.html").read_text()
