"""The training example: what it writes, what survives a kill, what it says to bad input."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "train_lm.py"
TINY = ["--steps=6", "--eval-every=2", "--batch=2", "--seq-len=16", "--dim=32", "--depth=1", "--experts=4"]

DIE_WITH_A_CHECKPOINT_HALF_SAVED = """
import os, pathlib, runpy, signal, sys

replace, checkpoints = os.replace, []

def replace_once(source, target):
    checkpoints.extend([target] * target.name.startswith("checkpoint"))
    if len(checkpoints) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_once
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
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
    monkeypatch.syspath_prepend(SCRIPT.parent)
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
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=120)


def numbers(out):
    """The history of a run but for its times."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if not name.endswith("seconds")} for record in records]


def test_a_run_writes_metrics_checkpoint_and_picture_and_says_when_it_is_finished(run, tmp_path, text, capsys):
    run("--text", text, "--out", tmp_path)
    assert "bits per byte in validation" in capsys.readouterr().out
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "routing.html").read_text().count('title="expert ') == 16  # a byte each of the end of the sample
    history = numbers(tmp_path)
    assert [record["step"] for record in history] == [2, 4, 6]
    assert all(sum(record["load"][0]) == pytest.approx(1) for record in history)

    run("--text", text, "--out", tmp_path, "--resume")
    assert "finished 6 steps" in capsys.readouterr().out
    assert numbers(tmp_path) == history
    with pytest.raises(SystemExit, match=r"lr was 0\.003, is now 0\.1"):
        run("--text", text, "--out", tmp_path, "--resume", "--lr=0.1")
    with pytest.raises(SystemExit, match="continue it with --resume"):
        run("--text", text, "--out", tmp_path)


def run_killed(*command):
    process = run_alone(*command)
    assert process.returncode, process.stdout
    assert "Signal 9" in process.stderr or process.returncode == -signal.SIGKILL, process.stderr


def test_a_killed_run_resumes_to_the_same_numbers_on_any_number_of_processes(run, tmp_path, text):
    die = tmp_path / "die.py"
    die.write_text(DIE_WITH_A_CHECKPOINT_HALF_SAVED)
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    whole, one_process, two_processes = (["--text", text, "--out", tmp_path / name] for name in ("whole", "one", "two"))
    run(*whole)
    run_killed(die, SCRIPT, *TINY, *one_process)
    run_killed(*two, die, SCRIPT, *TINY, *two_processes, "--expert-parallel")
    assert [record["step"] for record in numbers(tmp_path / "one") + numbers(tmp_path / "two")] == [2, 4, 2, 4]
    for name in ("one", "two"):
        (checkpoint,) = (tmp_path / name).glob("checkpoint-*[0-9]")
        assert checkpoint.name == "checkpoint-2"

    shutil.copytree(tmp_path / "one", tmp_path / "one then two")
    run(*one_process, "--resume")
    assert numbers(tmp_path / "one") == numbers(tmp_path / "whole")

    run(*two_processes, "--resume")
    assert_same_curve(numbers(tmp_path / "two"), numbers(tmp_path / "whole"))
    resumed = run_alone(*two, SCRIPT, *TINY, "--text", text, "--out", tmp_path / "one then two", "--resume", "--expert-parallel")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("2/6 [00:00<?") == 1  # one progress bar
    assert_same_curve(numbers(tmp_path / "one then two"), numbers(tmp_path / "whole"))


def assert_same_curve(history, expected):
    """Equal but for the order of float32 sums."""
    for record, other in zip(history, expected, strict=True):
        for name, value in other.items():
            torch.testing.assert_close(torch.tensor(record[name]), torch.tensor(value), rtol=1e-4, atol=1e-4)


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
        (["--expert-parallel"], "--expert-parallel needs a sparse model, and torchrun to start it"),
    ],
)
def test_bad_input_is_named(run, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run(*arguments, "--out", tmp_path / "out")
    assert message in str(error.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()
