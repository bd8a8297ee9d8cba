"""Long runs: those that are killed or interrupted, a full disk, numbers that are not finite, several processes."""

import json
import os
import random
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import train

REPOSITORY = Path(train.__file__).parent


@pytest.fixture(scope="module")
def command(glue):
    """A run of 20 steps, 10 an epoch."""
    return f"--task sst2 --data {glue} --batch-size 8 --epochs 2 --save-every 3".split()


def outcome(folder):
    """All that a run leaves, without the times."""
    result = json.loads((folder / "result.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def without_times(line):
        return {name: value for name, value in line.items() if not name.endswith("seconds")}

    return {"adapter": (folder / "adapter.pt").read_bytes(), "metrics": list(map(without_times, metrics)),
            "result": without_times(result), "files": sorted(path.name for path in folder.iterdir())}


@pytest.fixture(scope="module")
def unbroken(tiny, command, tmp_path_factory):
    """What a run leaves that nothing disturbed."""
    out = tmp_path_factory.mktemp("surviving") / "unbroken"
    train.main([*command, "--out", str(out)])
    return outcome(out)


def interrupt(monkeypatch, place, wanted, *argv):
    """Run the command line with Ctrl-C pressed in the call number `wanted` of `place`; the exit code is checked."""
    module, name = {"step": (torch.nn.utils, "clip_grad_norm_"), "scoring": (train, "predict"), "saving": (os, "fsync")}[place]
    function, calls = getattr(module, name), []

    def press(*arguments):
        calls.append(1)
        if len(calls) == wanted:
            signal.raise_signal(signal.SIGINT)
        return function(*arguments)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(module, name, press)
        train.main([str(word) for word in argv])
    assert stop.value.code == 130


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(int(os.environ.get("KILLS", 2))))
def test_a_run_killed_at_any_moment_ends_bit_for_bit_as_if_nothing_had_been(unbroken, command, tmp_path, attempt):
    argv = [*command, "--save-every", "1", "--out", str(tmp_path := tmp_path / "run")]
    process = subprocess.Popen([sys.executable, "train.py", *argv], cwd=REPOSITORY, stdout=subprocess.PIPE,
                               env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    while not (tmp_path / "checkpoint.pt").exists():
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.4))                                 # its 20 steps and their checkpoints take about that long
    process.kill()
    process.communicate()
    train.main(["--resume", str(tmp_path)])
    assert outcome(tmp_path) == unbroken


# What is scored: the bare model, the first epoch, the second, the end.
@pytest.mark.parametrize("flags, place, call, saved", [
    ("--dropout 0.3", "step", 14, 12), ("--method lora", "step", 4, 3), ("--tune-encoder --dropout 0.1", "step", 11, 9),
    ("", "scoring", 2, 9), ("", "scoring", 3, 18), ("", "scoring", 4, 18),
    ("", "saving", 4, 9), ("", "saving", 7, 18), ("", "saving", 9, 18)])        # a checkpoint, the adapter, the result
def test_after_ctrl_c_a_run_goes_on_where_it_was(unbroken, command, tmp_path, monkeypatch, capsys, flags, place, call, saved):
    argv = [*command, *flags.split()]
    if flags:
        train.main([*argv, "--out", str(tmp_path / "unbroken")])
    capsys.readouterr()
    interrupt(monkeypatch, place, call, *argv, "--out", tmp_path / "run")
    assert capsys.readouterr().err == f"train.py: interrupted; to go on: python train.py --resume {tmp_path / 'run'}\n"
    assert data.load_file(tmp_path / "run/checkpoint.pt")["step"] == saved
    train.main(["--resume", str(tmp_path / "run")])
    assert outcome(tmp_path / "run") == (outcome(tmp_path / "unbroken") if flags else unbroken)


@pytest.mark.parametrize("place", ["scoring", "step"])
def test_ctrl_c_before_the_first_checkpoint_leaves_no_folder(tiny, command, tmp_path, monkeypatch, capsys, place):
    interrupt(monkeypatch, place, 1, *command, "--out", tmp_path / "run")
    assert capsys.readouterr().err == "train.py: interrupted\n" and not (tmp_path / "run").exists()


def test_a_full_disk_stops_with_one_line_and_loses_nothing(unbroken, command, tmp_path, monkeypatch, refused):
    def save_file(path, content, save=data.save_file):
        if content["step"] > 8:                                        # from now on no file may grow over 200 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        save(path, content)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patched:
        patched.setattr(data, "save_file", save_file)
        try:
            error = refused(*command, "--out", tmp_path := tmp_path / "run")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in error and f"to go on: python train.py --resume {tmp_path}" in error
    train.main(["--resume", str(tmp_path)])
    assert outcome(tmp_path) == unbroken


NAN = float("nan")


@pytest.mark.parametrize("module, name, call, spoil, words, saved", [
    (train.F, "cross_entropy", 8, lambda logits, _: logits.data.fill_(NAN), "the loss of step 8 is", 6),
    (train.nn.utils, "clip_grad_norm_", 20, lambda parameters, _: parameters[0].grad.fill_(NAN), "after step 20 weights are", 18),
    (train, "predict", 3, lambda model, _: model.prompt.soft_prompt.data.fill_(1e38), "what the model computes is", 18)])
def test_numbers_that_are_not_finite_stop_the_run_and_are_not_saved(
        tiny, command, tmp_path, monkeypatch, refused, module, name, call, spoil, words, saved):
    def spoilt(*arguments, function=getattr(module, name), calls=[]):
        calls.append(1)
        if len(calls) == call:
            spoil(*arguments)
        return function(*arguments)

    monkeypatch.setattr(module, name, spoilt)
    assert f"{words} not finite: start again with a lower --lr" in refused(*command, "--out", tmp_path := tmp_path / "run")
    assert not (tmp_path / "adapter.pt").exists() and data.load_file(tmp_path / "checkpoint.pt")["step"] == saved


def test_quiet_prints_one_line_of_json_and_changes_nothing_else_and_resuming_what_is_finished_nothing_at_all(
        unbroken, command, tmp_path, capsys):
    capsys.readouterr()
    train.main([*command, "--quiet", "--out", str(tmp_path := tmp_path / "run")])
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "result.json").read_text()) and not printed.err
    assert printed.out.count("\n") == 1 and outcome(tmp_path) == unbroken
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train.main(["--resume", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path} is finished\n"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- several processes -----------------------------------------------------------------------------------------

SCRIPT = """
import os, sys
from dataclasses import replace
import torch
import train

path, *command = sys.argv[1:]
several = "LOCAL_RANK" in os.environ
if several:
    train.join_processes(train.Config("sst2"))
found = {}
for task in ("sst2", "rewrite"):                   # in float64
    config = train.Config(task, max_train=331, epochs=2, quiet=True)
    problem = train.prepare(config)
    problem.gpt.double()
    h = torch.randn(331, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = replace(problem, train=replace(problem.train, instances=h))
    problem = replace(problem, tests={"training rows": problem.train[:20]})
    model = train.build(config, problem).double()
    start = {name: p.detach().clone() for name, p in model.trained().items()}
    losses = [line["loss"] for line in train.fit(config, model, problem)]
    found[task] = dict(start=start, end={name: p.detach() for name, p in model.trained().items()}, losses=losses)
typed = vars(train.build_parser().parse_args(command))
for name, other in dict(seed=1, batch_size=16, save_every=7).items() if several else ():
    try:
        train.prepare(train.Config(**typed | ({} if train.is_first_process() else {name: other})))
    except (ValueError, SystemExit) as error:
        found[name] = str(error)
if several:
    train.run(train.Config(**typed))
torch.save(found, path + str(train.rank_and_world_size()[0]))
"""


@pytest.fixture(scope="module")
def two(tiny, command, tmp_path_factory):
    """A folder that the script has been run in, by two processes together: what each found, and their run."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]    # on any free port
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [*command, "--save-every", "100", "--out", folder / "run"]           # no checkpoint: the folder is empty till the end
    done = subprocess.run([*torchrun, folder / "script.py", folder / "two", *command],
                          text=True, capture_output=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_two_processes_train_what_one_trains(two, command, monkeypatch):
    """In float64, where all that rounding does to 22 steps is far below what any wrong weight of a row does."""
    monkeypatch.setattr(sys, "argv", ["script.py", str(two / "one"), *command])
    runpy.run_path(two / "script.py")
    both, one = torch.load(two / "two0"), torch.load(two / "one0")
    for task in ("sst2", "rewrite"):                                   # 331 rows: of the last batch's 11, one has 6, one 5
        assert both[task]["losses"] == pytest.approx(one[task]["losses"], rel=1e-9)
        for name, start in one[task]["start"].items():
            assert torch.equal(start, both[task]["start"][name])
            end = one[task]["end"][name]
            assert (end - both[task]["end"][name]).abs().max() < 1e-6 * (end - start).abs().max()


@pytest.mark.slow
def test_processes_with_different_flags_are_refused(two):
    first, second = torch.load(two / "two0"), torch.load(two / "two1")
    for name in ("seed", "batch_size", "save_every"):                  # both know it, one says it
        assert f"the processes have different {name}: use the same flags" in first[name] and second[name] == "2"


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on_bit_for_bit_and_only_as_two(two, command, tmp_path, refused):
    def start(*argv):
        """Two processes that know of each other as torchrun's do, which would not die with it."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            shared = dict(WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=free.getsockname()[1], OMP_NUM_THREADS=1)
        return [subprocess.Popen([sys.executable, "train.py", *argv], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, env=os.environ | {
                                     name: str(value) for name, value in (shared | dict(RANK=rank, LOCAL_RANK=rank)).items()})
                for rank in range(2)]

    killed = start(*command, "--out", str(tmp_path / "run"))
    while not (tmp_path / "run/checkpoint.pt").exists():
        time.sleep(0.005)
    for process in killed:
        process.kill()
        process.communicate()
    if (tmp_path / "run/checkpoint.pt").exists():                      # not finished, however slow this test is
        assert "of 2 processes and this run has 1: start as many" in refused("--resume", tmp_path / "run")
    resumed = start("--resume", str(tmp_path / "run"))
    first, second = (process.communicate(timeout=200) for process in resumed)
    assert [process.returncode for process in resumed] == [0, 0], first + second
    assert first[0].count("epoch 2/2") == 1 and second == ("", "")     # the first process alone speaks
    assert outcome(tmp_path / "run") == outcome(two / "run")


def test_a_batch_too_small_for_its_processes_is_refused(tiny, command, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(train, "gathered", lambda value: [value] * 4)
    error = refused(*command, "--max-train", 35, "--out", tmp_path / "run")
    assert "the last batch has 3 rows" in error and "4 processes: change --batch-size" in error
