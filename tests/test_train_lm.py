"""The training example: what it writes, what survives a kill, what it says to bad input and to damage."""

import errno
import fcntl
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from html import unescape
from pathlib import Path

import pytest
import torch

from st_moe_pytorch.tools.watch import record_routing

SCRIPT = Path(__file__).parents[1] / "examples" / "train_lm.py"
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
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


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(SCRIPT.read_bytes())
    return path


@pytest.fixture(scope="module")
def run():
    """Run the script in this process, which saves importing torch, on as many threads as a process that tests start."""
    with pytest.MonkeyPatch.context() as for_all:
        for_all.syspath_prepend(SCRIPT.parent)
        main = importlib.import_module("train_lm").main
        threads = torch.get_num_threads()
        torch.set_num_threads(1)

        def run(*arguments):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [str(SCRIPT), *TINY, *map(str, arguments)])
                main()

        yield run
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(run, text, tmp_path_factory):
    """The directory of a run that came to its end, which nobody changes."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run("--text", text, "--out", out)
    return out


@pytest.fixture(scope="module")
def half(run, text, tmp_path_factory):
    """The directory of a run that was stopped at step 4, which nobody changes."""
    out = tmp_path_factory.mktemp("half") / "out"
    run_until(4, run, "--text", text, "--out", out)
    return out


@pytest.fixture
def stopped(half, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(half, tmp_path / "stopped")


@pytest.fixture
def ended(finished, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(finished, tmp_path / "ended")


def run_alone(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=120
    )


def numbers(out):
    """The history of a run but for its times."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if not name.endswith("seconds")} for record in records]


def test_a_run_writes_metrics_checkpoint_and_picture_and_says_when_it_is_finished(run, tmp_path, text, capsys):
    run("--text", text, "--out", tmp_path)
    assert "bits per byte in validation" in capsys.readouterr().out
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    history = numbers(tmp_path)
    assert [record["step"] for record in history] == [2, 4, 6]
    assert all(sum(record["load"]["blocks.0.moe"]) == pytest.approx(1) for record in history)

    run("--text", text, "--out", tmp_path, "--resume")
    assert "finished 6 steps" in capsys.readouterr().out
    assert numbers(tmp_path) == history


def complaint(capsys, run, *arguments):
    """The one line with which a run ends that cannot go on."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 1
    lines = [
        line
        for line in re.split(r"[\r\n]+", capsys.readouterr().err)
        if line.strip() and not re.search("step/s|s/step", line)
    ]
    assert len(lines) == 1, lines
    assert lines[0].startswith("train_lm.py: ")
    return lines[0]


def contents(directory):
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "lock"]
    return {path.relative_to(directory): path.read_bytes() for path in files}


def run_killed(*command):
    process = run_alone(*command)
    assert process.returncode, process.stdout
    assert "Signal 9" in process.stderr or process.returncode == -signal.SIGKILL, process.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_run_resumes_to_the_same_numbers_on_any_number_of_processes(run, tmp_path, finished, text):
    die = tmp_path / "die.py"
    die.write_text(DIE_WITH_A_CHECKPOINT_HALF_SAVED)
    one_process, two_processes = (["--text", text, "--out", tmp_path / name] for name in ("one", "two"))
    run_killed(die, SCRIPT, *TINY, *one_process)
    run_killed(*TWO_PROCESSES, die, SCRIPT, *TINY, *two_processes, "--expert-parallel")
    assert [record["step"] for record in numbers(tmp_path / "one") + numbers(tmp_path / "two")] == [2, 4, 2, 4]
    for name in ("one", "two"):
        (checkpoint,) = (tmp_path / name).glob("checkpoint-*[0-9]")
        assert checkpoint.name == "checkpoint-2"

    shutil.copytree(tmp_path / "one", tmp_path / "one then two")
    run(*one_process, "--resume")
    assert numbers(tmp_path / "one") == numbers(finished)

    run(*two_processes, "--resume")
    assert_same_curve(numbers(tmp_path / "two"), numbers(finished))
    one_then_two = ["--text", text, "--out", tmp_path / "one then two"]
    resumed = run_alone(*TWO_PROCESSES, SCRIPT, *TINY, *one_then_two, "--resume", "--expert-parallel")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("2/6 [00:00<?") == 1  # one progress bar
    assert_same_curve(numbers(tmp_path / "one then two"), numbers(finished))


def assert_same_curve(history, expected):
    """Equal but for the order of float32 sums."""
    for record, other in zip(history, expected, strict=True):
        for name, value in other.items():
            mine, theirs = ([*v.values()] if isinstance(v, dict) else v for v in (record[name], value))
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-4, atol=1e-4)


def test_dense_baseline_in_bfloat16(run, tmp_path, text, capsys):
    run("--text", text, "--out", tmp_path, "--dense", "--autocast")
    assert capsys.readouterr().out.startswith("dense:")
    assert numbers(tmp_path)[-1]["load"] == {}
    assert not (tmp_path / "routing.html").exists()


def test_a_missing_text_is_one_line(run, tmp_path, capsys):
    assert "missing.txt" in complaint(capsys, run, "--text=missing.txt", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_all_processes_end_when_the_first_finds_that_it_cannot_go_on(ended, text):
    process = run_alone(*TWO_PROCESSES, SCRIPT, *TINY, "--text", text, "--out", ended, "--expert-parallel")
    assert process.returncode == 1
    own, _, of_torchrun = process.stderr.partition("torch/distributed/elastic")
    assert (
        own.splitlines()[0] == f"train_lm.py: {ended} holds a run: continue it with --resume, or choose another --out"
    )
    assert len(own.splitlines()) == 2, own  # the second one is where torchrun begins to tell that its processes ended
    assert "[rank1]" not in of_torchrun


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


def test_a_directory_that_holds_a_run_is_not_run_in_again_by_accident(run, ended, text, capsys):
    before = contents(ended)
    assert "continue it with --resume" in complaint(capsys, run, "--text", text, "--out", ended)
    for name in ("settings.json", "metrics.jsonl"):  # what is left of a run is a run
        (ended / name).rename(ended / "elsewhere")
        assert "continue it with --resume" in complaint(capsys, run, "--text", text, "--out", ended)
        (ended / "elsewhere").rename(ended / name)
    for resume in ([], ["--resume"]):  # which would not help, and is not offered
        line = complaint(capsys, run, "--text", text, "--out", ended, "--lr=0.1", *resume)
        assert "lr was 0.01, is now 0.1: choose another --out" in line
    assert contents(ended) == before


@pytest.mark.parametrize("content", ["", "{", "[1]", None])
def test_settings_that_cannot_be_read_are_named(run, ended, text, capsys, content):
    (ended / "settings.json").unlink()
    if content is not None:
        (ended / "settings.json").write_text(content)
    before = contents(ended)
    line = complaint(capsys, run, "--text", text, "--out", ended, "--resume")
    assert f"{ended / 'settings.json'} is missing or broken" in line
    assert "restore it, or start anew with another --out" in line
    assert contents(ended) == before
    if content is not None:
        assert f"{ended / 'settings.json'} is missing or broken" in complaint_of_plot_runs(ended)


def complaint_of_plot_runs(*directories):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["plot_runs.py", *map(str, directories)])
        with pytest.raises(SystemExit) as end:
            importlib.import_module("plot_runs").main()
    return end.value.code


def test_resuming_says_from_where(run, tmp_path, ended, text, capsys):
    run("--text", text, "--out", ended, "--resume")
    assert "resuming from step 6\n" in capsys.readouterr().out
    run_until(6, run, "--text", text, "--out", tmp_path / "new", "--resume")
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'new'} has no checkpoint to resume from: starting anew\n" in printed
    assert "resuming from" not in printed
    assert numbers(tmp_path / "new") == numbers(ended)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_metrics_are_written_anew_from_the_checkpoint(run, ended, text, damage):
    path = ended / "metrics.jsonl"
    whole = path.read_text()
    path.unlink()
    if damage == "truncated":
        path.write_text(whole[:-20])
        told = complaint_of_plot_runs(ended)
        assert f"line 3 of {path} is broken" in told
        assert "--resume writes it anew from the checkpoint" in told
    run("--text", text, "--out", ended, "--resume")
    assert path.read_text() == whole


def test_a_run_goes_on_from_its_checkpoint_when_its_metrics_were_deleted(run, stopped, finished, text, capsys):
    (stopped / "metrics.jsonl").unlink()
    run_until(6, run, "--text", text, "--out", stopped, "--resume")
    assert "resuming from step 4" in capsys.readouterr().out
    assert numbers(stopped) == numbers(finished)


def run_until(step, run, *arguments):
    """Interrupt a run, as Ctrl-C does, when it has saved the checkpoint of a step."""
    runs = importlib.import_module("runs")
    save = runs.save

    def save_and_stop(out, history, *others):
        save(out, history, *others)
        if history[-1]["step"] == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "save", save_and_stop)
        with pytest.raises(SystemExit):
            run(*arguments)


def test_a_stopped_run_says_how_to_go_on(run, tmp_path, text, capsys):
    run_until(2, run, "--text", text, "--out", tmp_path / "out")
    assert "stopped; --resume continues from the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "metrics.jsonl", "digests.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_checkpoint_is_named(run, ended, text, capsys, file, damage):
    path = ended / "checkpoint-6" / file
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    before = contents(ended)
    line = complaint(capsys, run, "--text", text, "--out", ended, "--resume")
    assert f"{path.parent} is damaged" in line
    assert "restore it from a copy, or start anew with another --out" in line
    assert contents(ended) == before


def test_a_directory_belongs_to_one_process_at_a_time(run, tmp_path, ended, text, capsys):
    before = contents(ended)
    with open(ended / "lock", "r+") as lock:
        assert lock.read() == str(os.getpid())  # of a run that ended
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.seek(0)
        lock.write("4711")
        lock.flush()
        line = complaint(capsys, run, "--text", text, "--out", ended, "--resume")
        assert f"{ended} is in use by process 4711: wait until it ends, or choose another --out" in line
        assert contents(ended) == before
    run("--text", text, "--out", ended, "--resume")  # the lock ended with the file that held it, as with a process


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("at", "then"),
    [
        ("settings.json", "starting anew"),
        ("checkpoint", "resuming from step 4"),
        ("metrics.jsonl", "resuming from step 4"),
        ("digests.json", "resuming from step 4"),
        ("routing.html", "resuming from step 6"),
    ],
)
def test_a_full_disk_is_one_line_and_loses_nothing(run, stopped, finished, text, capsys, monkeypatch, at, then):
    runs, out = importlib.import_module("runs"), stopped / "new" if at == "settings.json" else stopped
    write_whole = runs.write_whole
    with monkeypatch.context() as patch:
        patch.setattr(
            runs, "write_whole", lambda path, *text: (full_disk if path.name == at else write_whole)(path, *text)
        )
        if at == "checkpoint":
            patch.setattr("torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data", full_disk)
        assert "No space left on device" in complaint(capsys, run, "--text", text, "--out", out, "--resume")
    finish = run if at == "routing.html" else partial(run_until, 6, run)
    finish("--text", text, "--out", out, "--resume")
    assert then in capsys.readouterr().out
    assert numbers(out) == numbers(finished)


def test_the_page_shows_the_beginning_of_the_validation_text(ended, text):
    page = (ended / "routing.html").read_text()
    content = text.read_bytes()
    expected = content[len(content) * 9 // 10 :][:16].decode()
    tokens = re.findall(r'<span [^>]*title="expert [^>]*>([^<]*)</span>', page)
    assert unescape("".join(tokens)) == expected
    assert "<h1>Where the bytes of a validation text go after 6 steps</h1>" in page
    assert "<h2>blocks.0.moe</h2>" in page


def test_a_sample_cannot_act_on_the_terminal(run):
    printable = importlib.import_module("runs").printable
    assert printable("a\tb\n\x1b[31m\r\x00\x7f\x9b\u202eü\U0001f600".encode() + b"\xff") == (
        "a\tb\n\\x1b[31m\\r\\x00\\x7f\\x9b\\u202eü\U0001f600\\xff"
    )


def test_a_half_written_file_does_not_replace_the_one_that_is_there(run, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        importlib.import_module("runs").write_whole(path, "no text can have this: \ud800")
    assert path.read_text() == "before"


def test_random_routing_follows_the_draws_of_its_layer(run):
    train_lm = importlib.import_module("train_lm")
    model = train_lm.build_model(train_lm.Settings(dim=32, experts=4))
    for block in model.blocks:
        block.moe.gate.to_gates.weight.data.mul_(30)  # many second choices below the threshold
    x = torch.randint(256, (2, 64))
    draws = torch.stack((torch.zeros(2, 64, 2), torch.full((2, 64, 2), 0.999)))
    for order in ([0, 1], [1, 0]):
        with record_routing(model) as routings:
            model(x, draws[order])
        asked = [float(routing.asked.float().mean()) for (routing,) in routings.values()]
        assert asked[order.index(0)] == 1
        assert asked[order.index(1)] < 0.9


def test_local_context_adds_the_bytes_before_each_byte(run):
    local = importlib.import_module("language_model").LocalContext(5, 3)
    x = torch.randn(2, 7, 5)
    expected = x.clone()
    for n in range(7):
        for back in range(1, min(n, 3) + 1):
            expected[:, n] += local.weight[back - 1] * x[:, n - back]
    torch.testing.assert_close(local(x), expected)


@pytest.mark.parametrize("dense", [False, True])
def test_every_parameter_has_one_optimizer_and_only_matrices_are_decayed(run, dense):
    train_lm = importlib.import_module("train_lm")
    model = train_lm.build_model(train_lm.Settings(dim=32, experts=4, local=2, dense=dense))
    muon, adamw = train_lm.muon_and_adamw(model, lr=0.1)
    groups = muon.param_groups + adamw.param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sorted(names[p] for group in groups for p in group["params"]) == sorted(names.values())
    undecayed = [group for group in groups if not group["weight_decay"]]
    assert {names[p].rpartition(".")[2] for group in undecayed for p in group["params"]} == {
        "weight",
        "bias",
        "gamma",
        "mult_bias",
    }
    assert {names[p] for group in undecayed for p in group["params"] if p.ndim == 2} == {
        "embedding.weight",
        "locals.0.weight",
        "locals.1.weight",
    }
    assert not any("to_gates" in names[p] or "to_logits" in names[p] for p in muon.param_groups[0]["params"])


def test_matrices_start_with_the_variance_of_their_fan_in(run):
    train_lm = importlib.import_module("train_lm")
    model = train_lm.build_model(train_lm.Settings(experts=4))
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(linear.in_features**-0.5, rel=0.2)
        assert linear.bias is None or not linear.bias.any()


def test_batches_and_draws_are_the_same_over_any_number_of_ranks(run, monkeypatch):
    train_lm = importlib.import_module("train_lm")
    text, settings = torch.randint(256, (1000,), dtype=torch.uint8), train_lm.Settings(batch=4, seq_len=8)

    def parts(ranks):
        monkeypatch.setattr(train_lm.dist, "get_world_size", lambda: ranks)
        for rank in range(ranks):
            monkeypatch.setattr(train_lm.dist, "get_rank", lambda rank=rank: rank)
            yield *train_lm.training_batch(text, 7, settings), train_lm.routing_draws(7, settings)

    ((*batch, draws),) = parts(1)
    assert draws.shape == (2, 4, 8, 2)
    assert len(draws.unique()) == draws.numel()
    assert not torch.equal(train_lm.routing_draws(8, settings), draws)
    for ranks in (2, 4):
        *batches, several = zip(*parts(ranks), strict=True)
        assert all(map(torch.equal, map(torch.cat, batches), batch))
        assert torch.equal(torch.cat(several, dim=1), draws)
