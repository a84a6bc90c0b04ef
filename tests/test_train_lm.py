"""The training example: what it writes, what survives a kill, what it says to bad input."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "train_lm.py"
TINY = ["--steps=6", "--eval-every=2", "--batch=2", "--seq-len=16", "--dim=32", "--depth=1", "--experts=4"]

DIE_WITH_A_CHECKPOINT_HALF_SAVED = """
import os, runpy, signal, sys

replace, checkpoints = os.replace, []

def replace_once(source, target):
    checkpoints.extend([target] * (target.name == "checkpoint.pt"))
    if len(checkpoints) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_once
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(SCRIPT.read_bytes())
    return path


@pytest.fixture
def run(monkeypatch):
    """Run the script in this process, which saves importing torch, on as many threads as the processes that the tests start."""
    spec = importlib.util.spec_from_file_location("train_lm", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, *map(str, arguments)])
        script.main()

    yield run
    torch.set_num_threads(threads)


def run_alone(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300)


def numbers(out):
    """The history of a run but for its times."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if not name.endswith("seconds")} for record in records]


def test_a_run_writes_metrics_checkpoint_and_picture_and_says_when_it_is_finished(run, tmp_path, text, capsys):
    run("--text", text, "--out", tmp_path)
    assert "bits per byte in validation" in capsys.readouterr().out
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    history = numbers(tmp_path)
    assert [record["step"] for record in history] == [2, 4, 6]
    assert all(sum(record["load"][0]) == pytest.approx(1) for record in history)

    run("--text", text, "--out", tmp_path, "--resume")
    assert "finished 6 steps" in capsys.readouterr().out
    assert numbers(tmp_path) == history
    with pytest.raises(SystemExit, match=r"lr was 0\.003, is now 0\.1"):
        run("--text", text, "--out", tmp_path, "--resume", "--lr=0.1")
    with pytest.raises(SystemExit, match="continue that run with --resume"):
        run("--text", text, "--out", tmp_path)


def test_a_killed_run_resumes_to_the_same_numbers(run, tmp_path, text):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("--text", text, "--out", whole)
    process = run_alone("-c", DIE_WITH_A_CHECKPOINT_HALF_SAVED, SCRIPT, *TINY, "--text", text, "--out", killed)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert [record["step"] for record in numbers(killed)] == [2]
    run("--text", text, "--out", killed, "--resume")
    assert numbers(killed) == numbers(whole)


def test_dense_baseline_in_bfloat16(run, tmp_path, text, capsys):
    run("--text", text, "--out", tmp_path, "--dense", "--autocast")
    assert capsys.readouterr().out.startswith("dense:")
    assert numbers(tmp_path)[-1]["load"] == []


def test_a_missing_text_is_an_error_of_the_process(tmp_path):
    process = run_alone(SCRIPT, *TINY, "--text=missing.txt", "--out", tmp_path / "out")
    assert process.returncode != 0
    assert "missing.txt" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", os.devnull], "text is too short: 0 bytes to train on"),
        (["--dim=40"], "--dim must be a multiple of 32"),
        (["--experts=1"], "--experts must be at least 2"),
        (["--steps=0"], "--steps must be above zero, got 0"),
        (["--prompt="], "--prompt must not be empty"),
    ],
)
def test_bad_input_is_named(run, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run(*arguments, "--out", tmp_path / "out")
    assert message in str(error.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()
