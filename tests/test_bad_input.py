"""Whatever a student types or a disk does: exit code 2, one line of error, and nothing written, changed or deleted.

Each table is (what is typed or damaged, words of the line). They run in a folder with `run`, finished; `cut`, the same but
stopped by Ctrl-C in step 5 of 8, with a checkpoint after step 3; `glue`, the rows of both; and some that are bad or empty.
"""

import copy
import dataclasses
import io
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import data
import train
from test_surviving import interrupt

RUN = "--task sst2 --data glue --epochs 2 --batch-size 20 --rank 2 --hidden-dim 4 --num-virtual-tokens 3".split()     # 8 steps
PREDICT, RESUME = ["--adapter", "run", "--predict", "the plot is not dull"], ["--resume", "cut"]


@pytest.fixture(scope="module")
def world(tiny, glue, tmp_path_factory):
    world = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(world)
        shutil.copytree(glue, world / "glue")
        (world / "file").write_text("in the way")
        (world / "empty").mkdir()
        (world / "bad/SST-2").mkdir(parents=True)
        (world / "bad/SST-2/train.tsv").write_text("sentence\tlabel\ngood\t1\nbad\tmaybe\n")
        shutil.copytree(Path(__file__).parent / "fixtures/bare", world / "gpt")
        (world / "gpt/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
        train.main([*RUN, "--out", "run"])
        interrupt(patched, "step", 5, *RUN, "--save-every", "3", "--out", "cut")
    return world


@pytest.fixture
def place(world, tiny, tmp_path, monkeypatch):
    """A copy of the world, which is the current folder."""
    place = shutil.copytree(world, tmp_path / "place")
    monkeypatch.chdir(place)
    real = data.tiny_gpt
    monkeypatch.setattr(data, "tiny_gpt", lambda seed, cache, *_: real(seed, cache) if "file" in cache else copy.deepcopy(tiny))
    return place


@pytest.fixture
def unchanged(place, refused):
    """`refused`, after which the copy of the world has to be as it was before, but for an empty folder for runs."""
    def everything():
        return {path: path.is_file() and path.read_bytes() for path in place.rglob("*") if path.name != "runs"}

    def run(argv, words):
        before = everything()
        assert words in refused(*argv)
        assert everything() == before

    return run


@pytest.mark.parametrize("line, words", [
    # a value that is none
    ("--task sst3", "argument --task: invalid choice: 'sst3'"), ("--task sst2 --ran 3", "unrecognized arguments: --ran 3"),
    ("--task sst2 --fusion add", "unrecognized arguments: --fusion add"),      # a field without a flag
    ("--task sst2 --epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
    ("--task sst2 --rank 0", " 0 is not between"), ("--task sst2 --lr nan", " nan is not between"),
    ("--task sst2 --dropout 1", " 1.0 is not between 0 and 0.99"),
    # no effect on this method or command, or a combination that cannot be
    ("", "name a task: --task "),
    ("--task sst2 --method pt --rank 2", "--rank has no effect with --method pt"),
    ("--task sst2 --method dpt --init vocab", "a start as 10 tokens: it takes a word, at most 10 tokens and a method whose"),
    ("--task sst2 --encoder-lr 1", "--encoder-lr has no effect with --method lopa and the other flags"),
    ("--task sst2 --model gpt --pretrain-seed 1", "--pretrain-seed has no effect with --method lopa and the other flags"),
    ("--adapter run", "--predict TEXT and --adapter DIR go together"),
    ("--adapter run --predict x --resume cut", "--predict TEXT and --adapter DIR go together, without --resume"),
    ("--adapter run --predict x --seed 3", "--seed is the run's in run: leave it out"),
    ("--resume cut --rank 3", "--rank is the run's in cut: leave it out"),
    ("--resume run --out other", "--out is the run's in run: leave it out"),
    # folders that are not there, or not free
    ("--resume empty", "empty/checkpoint.pt"), ("--adapter cut --predict x", "cut/adapter.pt"),
    ("--task sst2 --out run", "--out: run is there: name a new folder"),
    ("--task sst2 --out file", "file"), ("--task sst2 --cache file/cache", "file/cache"),
    # models and data that are not there, or too small
    ("--task sst2 --encoder gpt3", "there is no folder gpt3: name tiny or a folder with a GPT-2"),
    ("--task sst2 --encoder-blocks 3", "the encoder has 2 blocks, h cannot be read after 3: name 0 to 2"),
    ("--task sst2 --data nowhere", "nowhere/SST-2/train.tsv not found: --data names the folder"),
    ("--task sst2 --data bad", "bad/SST-2/train.tsv, line 3: label 'maybe' is none of 0, 1"),   # all rules: test_data.py
    ("--task sst2 --model gpt", "gpt/model.safetensors cannot be read"),       # test_pretrained.py
    ("--task mnli", "task mnli has no built-in sample"),
    ("--task sst2 --num-virtual-tokens 126", "alone has 3 tokens, the context leaves 2"),
    ("--task rewrite --num-virtual-tokens 120", "alone has 1 tokens, the context leaves 0"),
    ("--task sst2 --data glue --lr 1e9 --method full", "not finite: start again with a lower --lr"),
])
def test_what_is_typed_wrongly(unchanged, line, words):
    unchanged(line.split(), words)


def test_a_folder_for_runs_that_cannot_be_made(place, refused):
    Path("runs").symlink_to("an unmounted disk")
    assert "File exists: 'runs'" in refused(*RUN)


@pytest.mark.parametrize("text, words", [
    (b"", "--predict: there is no text"), (b" \n\t\n", "--predict: there is no text"), (b"\xef\xbb\xbf", "there is no text"),
    (b"good\n\nbad\tbad", "--predict, line 3: 2 texts, the task takes 1 (sentence)"),
    (b"good\ncaf\xe9", "can't decode byte 0xe9 in position 8"),
])
def test_texts_that_are_none(unchanged, monkeypatch, text, words):
    unchanged([*PREDICT[:-1], text.decode(errors="surrogateescape")], words)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    unchanged([*PREDICT[:-1], "-"], words)


class Code:
    def __reduce__(self):
        return os.mkdir, ("run-by-pickle",)


def change(key, **values):
    """A function of an adapter's or a checkpoint's path: entries of its content, or of that's `key`, get these values."""
    def write(path):
        state = torch.load(path, weights_only=True)
        (state[key] if key else state).update(values)
        torch.save(state, path)

    return write


def flip_a_bit(path):
    """Of a trained number: torch.load alone reads it."""
    content, prompt = bytearray(path.read_bytes()), torch.load(path, weights_only=True)["tensors"][PROMPT]
    content[content.index(prompt.numpy().tobytes())] ^= 4
    path.write_bytes(content)


PROMPT = "prompt.soft_prompt"
DAMAGE = [  # (done to an adapter or a checkpoint, words)
    (lambda path: path.write_bytes(b""), "is damaged, or no file of this program"),
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged, or no file of this program"),
    (flip_a_bit, "is damaged, or no file of this program"),
    (lambda path: torch.save(Code(), path), "is damaged, or no file of this program"),
    (lambda path: path.unlink() or path.mkdir(), "Is a directory"),
    (change(None, format=4), "is of format 4 and not 5: train again"),
    (change(None, tensors={}), "is not there and should be ["),
    (change("tensors", extra=torch.zeros(1)), "extra is [1] of torch.float32 and should be not there"),
    (change("tensors", **{PROMPT: torch.zeros(2, 64)}), "is [2, 64] of torch.float32 and should be [3, 64] of torch.float32"),
    (change("tensors", **{PROMPT: torch.zeros(3, 64).double()}), "is [3, 64] of torch.float64 and should be"),
    (change("tensors", **{PROMPT: torch.full((3, 64), float("nan"))}), "should be [3, 64] of torch.float32, all finite"),
    (change("made_of", fingerprint="0123456789ab"), "another model"),
    (change("config", model="nowhere"), "there is no folder nowhere"),
    (change("config", device="abacus"), "there is no abacus here: name --device cpu"),
]


@pytest.mark.parametrize("damage, words", DAMAGE)
def test_files_that_are_no_adapter_or_no_checkpoint(unchanged, damage, words):
    damage(Path("run/adapter.pt"))
    unchanged(PREDICT, words)
    damage(Path("cut/checkpoint.pt"))
    unchanged(RESUME, words)


@pytest.mark.parametrize("damage, words", [
    (change("scale", std=torch.ones(63)), "std is [63] of torch.float32 and should be [64]"),
    (change("task", label_words={"0": " terrible", "1": " magnificent"}), "it has to be 1"),
    (change("task", template="{sentence.__class__}"), "has to name fields"),
])
def test_files_that_are_no_adapter(unchanged, damage, words):
    damage(Path("run/adapter.pt"))
    unchanged(PREDICT, words)


def test_data_or_label_words_that_changed_are_noticed_when_a_run_goes_on(unchanged, place, monkeypatch):
    task = data.TASKS["sst2"]
    with monkeypatch.context() as patched:                             # the same two words, swapped
        words = dict(zip(task.label_words, reversed(task.label_words.values())))
        patched.setitem(data.TASKS, "sst2", dataclasses.replace(task, label_words=words))
        unchanged(RESUME, "cut was begun with other data or another model")
    path = place / "glue/SST-2/train.tsv"
    text, label = path.read_text()[:-2], path.read_text()[-2]
    path.write_text(f"{text}{1 - int(label)}\n")
    unchanged(RESUME, "cut was begun with other data or another model")
    path.unlink()
    unchanged(RESUME, "glue/SST-2/train.tsv not found")
