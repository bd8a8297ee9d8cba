"""Long runs: batches of similar length, checkpoints, runs that were killed or interrupted, several processes."""

import dataclasses
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

import data
import train

REPOSITORY = Path(train.__file__).parent
RUN = ["--task", "sst2", "--max-train", "320", "--epochs", "2", "--save-every", "3"]        # 20 steps


def outcome(folder):
    """All that a run leaves, without the times."""
    result = json.loads((folder / "result.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def without_times(line):
        return {name: value for name, value in line.items() if not name.endswith("seconds")}

    return {"adapter": (folder / "adapter.pt").read_bytes(), "metrics": list(map(without_times, metrics)),
            "result": without_times(result), "files": sorted(path.name for path in folder.iterdir())}


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    """What a run leaves that nothing disturbed."""
    out = tmp_path_factory.mktemp("surviving") / "unbroken"
    train.main([*RUN, "--out", str(out)])
    return outcome(out)


def without_probes(monkeypatch):
    """What is known before the training without training a probe for it: what is counted then is the run's own."""
    monkeypatch.setattr(train, "baselines", lambda config, problem: dict.fromkeys(
        ("majority", "zero_shot", "linear_probe", "hidden_layer_probe"), 0.5))


def interrupt(monkeypatch, wanted, *argv):
    """Run the command line, with Ctrl-C pressed during step `wanted`; the exit code is checked."""
    def press_at_step(step, warmup_steps, total_steps, factor=train.cosine_factor):
        if step == wanted - 1:
            signal.raise_signal(signal.SIGINT)
        return factor(step, warmup_steps, total_steps)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        without_probes(patched)
        patched.setattr(train, "cosine_factor", press_at_step)
        train.main([str(a) for a in argv])
    assert stop.value.code == 130


# --- batches ---------------------------------------------------------------------------------------------------


def split_of(lengths):
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    return data.Encoded(tokens, torch.tensor(lengths), torch.zeros(len(lengths), dtype=torch.long), 0)


def test_batches_of_similar_length_hold_every_row_once_in_an_order_that_changes():
    draw = random.Random(0)
    ragged = split_of([draw.choice([5, 6, 7, 8, 40, 60]) for _ in range(5003)])
    assert ragged.ragged and not split_of([7, 12, 15]).ragged
    generator = torch.Generator().manual_seed(0)
    epochs = [train.shuffled_batches(ragged, 16, generator) for _ in range(2)]
    for batches in epochs:
        assert torch.cat(batches).sort().values.tolist() == list(range(5003)) and len(batches) == 313
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))

    def padded(batches):
        return sum(len(rows) * ragged.lengths[rows].max().item() for rows in batches) / ragged.lengths.sum().item()

    at_random = torch.randperm(5003, generator=generator).split(16)
    assert padded(epochs[0]) < 1.05 and padded(at_random) > 2
    widths = torch.stack([ragged.lengths[rows].max() for rows in epochs[0]]).float()
    assert (widths[:50].diff() < 0).sum() > 10                         # long batches come early and late


def test_texts_of_ragged_length_get_the_same_predictions_in_the_order_of_the_rows(tiny):
    gpt, tokenizer = tiny
    task = data.TASKS["sst2"]
    rows = [({"sentence": " and ".join([fields["sentence"]] * (1 + 5 * (i % 7 == 0)))}, label)
            for i, (fields, label) in enumerate(data.sst2_sample()[0][:600])]
    split = data.encode(task, rows, tokenizer, 110)
    assert split.ragged
    encoder = train.InstanceEncoder(gpt)
    for i, h in enumerate(train.instance_embeddings(encoder, split)[:40]):
        alone = encoder(split.tokens[i:i + 1, :split.lengths[i]], split.lengths[i:i + 1])[0]
        assert torch.allclose(h, alone, atol=1e-5)


# --- runs that end early ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(int(os.environ.get("KILLS", 2))))
def test_a_run_killed_at_any_moment_ends_bit_for_bit_as_if_nothing_had_been(unbroken, tmp_path, attempt):
    def start(*argv):
        return subprocess.Popen([sys.executable, "train.py", *argv], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})

    process = start(*RUN, "--save-every", "1", "--out", str(tmp_path))
    while not list(tmp_path.glob("checkpoint*")):
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.6))                                 # its 20 steps and their checkpoints take about that long
    process.kill()
    process.communicate()
    print("was killed" if process.returncode == -signal.SIGKILL else "had ended", sorted(os.listdir(tmp_path)))
    resumed = start("--resume", str(tmp_path))
    resumed.communicate()
    assert resumed.returncode == 0 and outcome(tmp_path) == unbroken


@pytest.mark.parametrize("flags, step", [                              # an epoch has 10 steps: within the second, at its start
    ("--method lopa --dropout 0.3", 14), ("--method lora", 14), ("--tune-encoder --dropout 0.1", 10), ("--control shuffled", 10)])
def test_a_run_interrupted_by_ctrl_c_goes_on_where_it_was(tiny, tmp_path, monkeypatch, capsys, flags, step):
    argv = [*RUN, *flags.split()]
    train.main([*argv, "--out", str(tmp_path / "unbroken")])
    interrupt(monkeypatch, step, *argv, "--out", tmp_path / "run")
    captured = capsys.readouterr()
    assert f"interrupted at step {step} of 20" in captured.err and f"--resume {tmp_path / 'run'}" in captured.err
    (tmp_path / "run" / "checkpoint-new.pt.0a1b2c3d.part").write_bytes(b"half a file, of a process that was killed")
    train.main(["--resume", str(tmp_path / "run")])
    assert f"going on after step {step}" in capsys.readouterr().out
    assert outcome(tmp_path / "run") == outcome(tmp_path / "unbroken")


def cut(content):
    return content[:len(content) // 2]


def flip_a_bit(content):
    """In the middle of the zip's largest member: in the padding between two of them it would change nothing."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = max(archive.infolist(), key=lambda member: member.file_size)
    header = content[member.header_offset:][:30]                       # then its name and the padding, of lengths found here
    name, padding = (int.from_bytes(header[i:i + 2], "little") for i in (26, 28))
    middle = member.header_offset + 30 + name + padding + member.file_size // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1:]


@pytest.mark.parametrize("damage", [cut, flip_a_bit, lambda content: b"", lambda content: os.urandom(len(content))])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(unbroken, tmp_path, monkeypatch, capsys, damage):
    interrupt(monkeypatch, 8, *RUN, "--out", tmp_path)
    newest = tmp_path / "checkpoint.pt"
    assert [data.load_file(tmp_path / name)["step"] for name in train.CHECKPOINTS] == [8, 6]
    newest.write_bytes(damage(newest.read_bytes()))
    train.main(["--resume", str(tmp_path)])
    captured = capsys.readouterr()
    assert f"{newest} is damaged" in captured.err and "going on after step 6" in captured.out
    assert outcome(tmp_path) == unbroken


def test_a_full_disk_stops_with_one_line_and_loses_nothing(unbroken, tmp_path, monkeypatch, capsys):
    def save_checkpoint(folder, state, save=train.save_checkpoint):
        if state["step"] > 8:                                          # from now on no file may grow over 200 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        save(folder, state)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(train, "save_checkpoint", save_checkpoint)
        try:
            train.main([*RUN, "--out", str(tmp_path)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "cannot be saved" in message and "File too large" in message
    assert f"--resume {tmp_path}" in message
    train.main(["--resume", str(tmp_path)])
    assert outcome(tmp_path) == unbroken


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tiny, tmp_path, monkeypatch, capsys):
    def cross_entropy(logits, labels, steps=[], original=torch.nn.functional.cross_entropy):
        steps.append(1)
        return original(logits, labels) * (float("inf") if len(steps) == 8 else 1)

    without_probes(monkeypatch)
    monkeypatch.setattr(train.F, "cross_entropy", cross_entropy)
    with pytest.raises(SystemExit) as stop:
        train.main([*RUN, "--out", str(tmp_path)])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "loss is inf at step 8 of 20" in message and "lower --lr" in message
    assert [data.load_file(tmp_path / name)["step"] for name in train.CHECKPOINTS] == [6, 3]


def test_weights_that_the_last_step_ruins_are_not_saved(tiny, tmp_path, monkeypatch, capsys):
    def clip(parameters, norm, original=torch.nn.utils.clip_grad_norm_, steps=[]):
        steps.append(1)
        if len(steps) == 20:
            parameters[0].grad[0, 0] = float("nan")

    without_probes(monkeypatch)
    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", clip)
    with pytest.raises(SystemExit) as stop:
        train.main([*RUN, "--out", str(tmp_path)])
    assert stop.value.code == 2 and "weights are not finite after step 20 of 20" in capsys.readouterr().err
    assert not (tmp_path / "adapter.pt").exists()


@pytest.mark.parametrize("argv, message", [
    (["--resume", "{empty}"], "holds no run"),
    (["--resume", "{run}", "--rank", "2"], "holds another run: rank is 4 there and 2 here"),
    ([*RUN, "--out", "{file}/run"], "nothing can be saved in"),
    ([*RUN, "--seed", "1", "--out", "{run}"], "holds another run: seed is 0 there and 1 here"),
])
def test_a_folder_that_cannot_be_gone_on_with_gets_one_line(tiny, tmp_path, monkeypatch, capsys, argv, message):
    places = {name: tmp_path / name for name in ("empty", "run", "file")}
    places["empty"].mkdir()
    places["file"].write_text("in the way")
    interrupt(monkeypatch, 4, *RUN, "--out", places["run"])
    before = {path.name: path.read_bytes() for path in places["run"].iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([word.format(**places) for word in argv])
    assert stop.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]
    assert {path.name: path.read_bytes() for path in places["run"].iterdir()} == before


def test_resuming_a_finished_run_changes_nothing(unbroken, tmp_path, capsys):
    train.main([*RUN, "--out", str(tmp_path)])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    train.main(["--resume", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    assert "is finished" in printed[-2] and json.loads(printed[-1]) == json.loads(before["result.json"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- several processes -----------------------------------------------------------------------------------------


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]    # on any free port

IN_FLOAT64 = """
import sys
from dataclasses import replace
import torch
import train

config = train.Config(sys.argv[2], max_train=331, epochs=2, device="cpu", quiet=True)
train.join_processes(config)
problem = train.prepare(config)
problem.gpt.double()
h = torch.randn(331, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
problem = replace(problem, train=replace(problem.train, instances=h))
problem = replace(problem, tests={"training rows": problem.train})
model = train.build(config, problem).double()
start = {name: p.detach().clone() for name, p in model.trained().items()}
metrics = train.fit(config, model, problem)
if train.is_first_process():
    torch.save(dict(start=start, end=model.trained(), losses=[line["loss"] for line in metrics]), sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sst2", "rewrite"])
def test_two_processes_train_what_one_trains(tiny, tmp_path, task):
    """In float64, where all that rounding does to 22 steps is far below what any wrong weight of a row does."""
    (tmp_path / "script.py").write_text(IN_FLOAT64)            # 331 rows: of the last batch's 11, one has 6, one 5
    found = []
    for name, launcher in (("two", TORCHRUN), ("one", [sys.executable])):
        done = subprocess.run([*launcher, tmp_path / "script.py", tmp_path / name, task], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, timeout=200)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp_path / name))
    two, one = found
    for name, start in one["start"].items():
        assert torch.equal(start, two["start"][name])
        moved = (one["end"][name] - start).abs().max().item()
        assert (one["end"][name] - two["end"][name]).abs().max().item() < 1e-6 * moved
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pkill") is None, reason="there is no pkill to kill torchrun's workers with")
def test_two_processes_that_were_killed_go_on_bit_for_bit_and_only_as_two(tiny, tmp_path, capsys):
    def start(*argv):
        return subprocess.Popen([*TORCHRUN, "train.py", *argv], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
                                stderr=subprocess.PIPE)

    unbroken = start(*RUN, "--out", str(tmp_path / "unbroken"))
    printed, errors = unbroken.communicate(timeout=200)
    assert unbroken.returncode == 0, errors
    assert printed.count("epoch 2/2") == 1                             # the first process alone speaks
    killed = start(*RUN, "--out", str(tmp_path / "run"))
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        time.sleep(0.005)
    subprocess.run(["pkill", "-KILL", "-f", str(tmp_path / "run")])    # workers too: they have sessions of their own
    killed.communicate()                                               # ends when the last of them has let go
    if not (tmp_path / "run" / "result.json").exists():                # not finished, however slow this test is
        with pytest.raises(SystemExit) as stop:
            train.main(["--resume", str(tmp_path / "run")])
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and "of 2 processes and this run has 1: start as many" in message
    resumed = start("--resume", str(tmp_path / "run"))
    _, errors = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, errors
    assert outcome(tmp_path / "run") == outcome(tmp_path / "unbroken")


def test_a_batch_too_small_for_its_processes_is_refused(tiny, monkeypatch):
    gpt, tokenizer = tiny
    config = train.Config("sst2", device="cpu", quiet=True)
    problem = train.Problem(gpt, train.InstanceEncoder(gpt), torch.tensor([1, 2]), split_of([5]), {})
    model = train.build(config, problem)
    monkeypatch.setattr(train, "rank_and_world_size", lambda: (0, 4))
    for rows, batch_size, smallest in ((35, 32, 3), (64, 2, 2)):
        with pytest.raises(ValueError, match=f"the last batch has {smallest} rows for 4 processes: change --batch-size"):
            train.fit(dataclasses.replace(config, batch_size=batch_size), model,
                      dataclasses.replace(problem, train=split_of([5] * rows)))


# --- at the terminal -------------------------------------------------------------------------------------------


def test_quiet_prints_one_line_of_json(tiny, tmp_path):
    done = subprocess.run([sys.executable, "train.py", *RUN, "--quiet", "--out", str(tmp_path)], cwd=REPOSITORY,
                          capture_output=True, text=True)
    assert json.loads(done.stdout) == json.loads((tmp_path / "result.json").read_text()) and done.stderr == ""


def test_predict_reads_a_text_a_file_or_standard_input(tiny, tmp_path, monkeypatch, capsys):
    train.main([*RUN, "--out", str(tmp_path / "run")])
    texts = ["a witty , moving film", "the plot is not dull", "the cast fails"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    capsys.readouterr()
    tables = []
    for source in (str(tmp_path / "texts.txt"), "-", *texts):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(("\n".join(texts)).encode())))
        train.main(["--adapter", str(tmp_path / "run"), "--predict", source])
        tables.append([line.split("\t") for line in capsys.readouterr().out.splitlines()])
    from_file, from_stdin, *single = tables
    assert from_file[0] == ["label", "negative", "positive", "sentence"] and [row[3] for row in from_file[1:]] == texts
    assert from_stdin == from_file and [table[1] for table in single] == from_file[1:]
    for label, negative, positive, _ in from_file[1:]:
        assert float(negative) + float(positive) == pytest.approx(1, abs=2e-3)
        assert (label == "positive") == (float(positive) > float(negative))


@pytest.mark.parametrize("content, message", [
    (b"", "line 1: 0 texts"), (b"good\n\nbad", "line 2: 0 texts, the task takes 1 (sentence)"),
    (b"good\tbad", "line 1: 2 texts, the task takes 1"), (b"good\xff", "byte 4 is not UTF-8")])
def test_a_bad_file_of_texts_gets_one_line(tmp_path, content, message):
    (tmp_path / "texts.txt").write_bytes(content)
    with pytest.raises(ValueError, match="texts.txt") as error:
        train.read_texts(str(tmp_path / "texts.txt"), ["sentence"])
    assert message in str(error.value)
