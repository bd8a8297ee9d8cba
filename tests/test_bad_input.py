"""Whatever a student types or a disk does: exit code 2, one line of error, and nothing written, changed or deleted.

Each table is (what is typed or damaged, words of the line). They run in a folder with `run`, finished; `cut`, the same but stopped
by Ctrl-C after step 5 of 8, with checkpoints after steps 5 and 3; `glue`, the rows of both; one finished run of each control;
and some more.
"""

import copy
import dataclasses
import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch

import data
import train
from test_surviving import flip_a_bit, interrupt, outcome

SMALL = "--epochs 2 --batch-size 8 --rank 2 --hidden-dim 4 --num-virtual-tokens 3".split()
RUN = ["--task", "sst2", "--data", "glue", *SMALL]                     # 8 steps
TEXT = "the plot is not dull"
REAL_TINY_GPT = train.tiny_gpt


pytestmark = pytest.mark.slow            # 20 s of files and flags, which no kernel changes


@pytest.fixture(scope="module", autouse=True)
def quick(tiny):
    """What is the same each time is made once: the tiny GPT's tokenizer, Config's source as Python 3.11 looks for it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train.inspect, "getsource", cache(train.inspect.getsource))
        patched.setattr(train, "tiny_gpt", lambda *_: (*copy.deepcopy(tiny), 0.0))
        yield train.tiny_gpt


@pytest.fixture(scope="module")
def world(quick, tmp_path_factory):
    world = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(world)
        rows = [f"{fields['sentence']}\t{label}\n" for fields, label in data.sst2_sample()[0][:32]]
        (world / "glue/SST-2").mkdir(parents=True)
        for name in ("train.tsv", "dev.tsv"):
            (world / "glue/SST-2" / name).write_text("sentence\tlabel\n" + "".join(sorted(rows)))
        (world / "texts.txt").write_text(f"{TEXT}\nthe cast fails\n")
        (world / "file").write_text("in the way")
        (world / "empty").mkdir()
        train.main([*RUN, "--out", "run"])
        for control in train.CONTROLS:
            train.main([*RUN, "--control", control, "--out", control])
        interrupt(patched, 5, *RUN, "--save-every", "3", "--out", "cut")
    return world


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A copy of the world, which is the current folder."""
    place = shutil.copytree(world, tmp_path / "place")
    monkeypatch.chdir(place)
    yield place
    monkeypatch.chdir(world)
    shutil.rmtree(tmp_path / "place")


def everything(folder):
    return {str(path): path.read_bytes() if path.is_file() else path.stat().st_mode for path in folder.rglob("*")}


def refuse(place, capsys, argv, words):
    """Run a command line in the folder, expect it to be refused, and return the line."""
    before = everything(place)
    capsys.readouterr()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(20)
    try:
        with pytest.raises(SystemExit) as stop:
            train.main([str(word) for word in argv])
    finally:
        signal.alarm(0)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert words in err and err.startswith("train.py: error: ")
    assert err.count("\n") == 1 and err.endswith("\n") and len(err) <= 320
    assert not re.search(r"^(\{|label|wrote|epoch 2|.* is finished)", out, flags=re.MULTILINE)
    assert everything(place) == before
    return err


@pytest.fixture
def refused(place, capsys):
    """A function for the copy of the world, which the test may have changed."""
    return partial(refuse, place, capsys)


@pytest.fixture
def refused_at_once(world, capsys, monkeypatch):
    """The same for the world itself, whose adapters and checkpoints are restored afterwards."""
    monkeypatch.chdir(world)
    whole = {path: path.read_bytes() for path in world.glob("*/*.pt")}
    yield partial(refuse, world, capsys)
    for path, content in whole.items():
        path.write_bytes(content)


# --- flags -----------------------------------------------------------------------------------------------------

WHOLE = "--epochs --batch-size --num-virtual-tokens --rank --hidden-dim --max-train --holdout --save-every".split()
NO_NUMBERS = ["1.5", "1e3", "ten", "", " ", "nan", "True", "0x10", "9" * 5000]
NUMBERS = [
    *((flag, value, f"{flag}: {value} is not between 1 and ") for flag in WHOLE for value in ("0", "-1")),
    *((flag, value, f"{flag}: {value[:10]}") for flag in [*WHOLE, "--seed", "--pretrain-seed"]
      for value in ("123456789012345678901", "9" * 400)),
    *((flag, value, f"argument {flag}: invalid int value") for value, flag in zip(NO_NUMBERS, [*WHOLE, "--seed"])),
    *((flag, "-1", f"{flag}: -1 is not between 0 and 2147483648") for flag in ("--seed", "--pretrain-seed")),
    *(("--encoder-blocks", value, f"--encoder-blocks: {value[:10]}") for value in ("-1", "1001", "9" * 400)),
    *(("--encoder-blocks", value, "argument --encoder-blocks: invalid int value") for value in ("half", "0.5", "")),
    *(("--encoder-blocks", value, f"the encoder has 2 blocks, h cannot be read after {value}: name 0 to 2")
      for value in ("3", "1000")),
    *((flag, value, f"{flag}: {float(value)} is not between 1e-12 and 1")
      for flag in ("--lr", "--head-lr", "--encoder-lr", "--init-std", "--head-std")
      for value in ("0", "-1", "nan", "inf", "1e400", "1e-400", "9" * 400)),
    *(("--dropout", value, f"--dropout: {float(value)} is not between 0 and 0.99") for value in ("-0.1", "1", "nan", "9e99")),
    *((flag, value, f"argument {flag}: invalid float value") for flag in ("--lr", "--dropout") for value in ("high", "", "1,5")),
]


@pytest.mark.parametrize("flag, value, words", NUMBERS)
def test_numbers(refused_at_once, flag, value, words):
    refused_at_once(["--task", "sst2", flag, value], words)


@pytest.mark.parametrize("line, words", [
    ("", "name a task: --task sst2 or mnli"),
    ("--task", "argument --task: expected one argument"),
    ("--task sst3", "argument --task: invalid choice: 'sst3'"),
    ("--task SST2", "argument --task: invalid choice: 'SST2'"),
    ("--task sst2 --method lora2", "argument --method: invalid choice: 'lora2'"),
    ("--task sst2 --fusion mean", "argument --fusion: invalid choice: 'mean'"),
    ("--task sst2 --dtype float16", "argument --dtype: invalid choice: 'float16'"),
    ("--task sst2 --device tpu", "argument --device: invalid choice: 'tpu'"),
    ("--task sst2 --control nonsense", "argument --control: invalid choice: 'nonsense'"),
    ("--task sst2 --control", "argument --control: expected one argument"),
    ("--task sst2 --shuffle-instances", "unrecognized arguments: --shuffle-instances"),
    ("--task sst2 --ran 3", "unrecognized arguments: --ran 3"),
    ("--task sst2 --phm 4", "unrecognized arguments: --phm 4"),
    ("--task sst2 sst2", "unrecognized arguments: sst2"),
    ("--task sst2 --quiet=yes", "argument --quiet: ignored explicit argument 'yes'"),
    ("--task sst2 --lr -inf", "argument --lr: expected one argument"),
    ("--task sst2 " + "x" * 10 ** 6, "unrecognized arguments: xxx"),
    # moved
    ("--compare --lr 7", "this is now: python -m experiments.compare"),
    ("--task sst2 --compare --quiet", "this is now: python -m experiments.compare --task sst2"),
    ("--task sst2 --ablate", "this is now: python -m experiments.compare --task sst2 --ablate"),
    ("--task sst2 --seeds a", "unrecognized arguments: --seeds a"),
    # no effect on this method, model or command
    ("--task sst2 --method pt --rank 2", "--rank has no effect with --method pt: leave it out"),
    ("--task sst2 --method pt --fusion add", "--fusion has no effect with --method pt"),
    ("--task sst2 --method pt --dropout 0.2", "--dropout has no effect with --method pt"),
    ("--task sst2 --method pt --hidden-dim 9", "--hidden-dim has no effect with --method pt"),
    ("--task sst2 --method pt --tune-encoder", "--tune-encoder has no effect with --method pt"),
    ("--task sst2 --method pt --control shuffled", "--control has no effect with --method pt"),
    ("--task sst2 --method pt --encoder gpt2", "--encoder has no effect with --method pt"),
    ("--task sst2 --method residual --tune-encoder", "--tune-encoder has no effect with --method residual"),
    ("--task sst2 --method bpt --control constant", "--control has no effect with --method bpt"),
    ("--task sst2 --method idpg --fusion add", "--fusion has no effect with --method idpg"),
    ("--task sst2 --method dpt --init-std 2", "--init-std has no effect with --method dpt"),
    ("--task sst2 --method lora --num-virtual-tokens 5", "--num-virtual-tokens has no effect with --method lora"),
    ("--task sst2 --method dpt --init-text good", "--init-text has no effect with --method dpt: leave it out"),
    ("--task sst2 --method pt --init-text good --init-std 1", "--init-std has no effect with --init-text: leave it out"),
    ("--task sst2 --method pt --init-text=", "--init-text: there is no word in it: leave it out"),
    ("--task sst2 --method lora --hidden-dim 5", "--hidden-dim has no effect with --method lora"),
    ("--task sst2 --method full --rank 5", "--rank has no effect with --method full"),
    ("--task sst2 --method full --init-std 5", "--init-std has no effect with --method full"),
    ("--task sst2 --method full --tune-encoder", "--tune-encoder has no effect with --method full"),
    ("--task sst2 --method pt --head-lr 1", "--head-lr has no effect with --method pt: leave it out"),
    ("--task sst2 --method pt --head-std 1", "--head-std has no effect with --method pt: leave it out"),
    ("--task sst2 --method pt --encoder-lr 1", "--encoder-lr has no effect with --method pt: leave it out"),
    ("--task sst2 --method pt --encoder-blocks 1", "--encoder-blocks has no effect with --method pt: leave it out"),
    ("--task sst2 --method pt --control constant", "--control has no effect with --method pt: leave it out"),
    ("--task sst2 --method adept --head-lr 1", "--head-lr has no effect with --method adept"),
    ("--task sst2 --method residual --head-std 1", "--head-std has no effect with --method residual"),
    ("--task sst2 --method lora --encoder-blocks 1", "--encoder-blocks has no effect with --method lora"),
    ("--task sst2 --method full --control shuffled", "--control has no effect with --method full"),
    ("--task sst2 --method full --encoder-lr 1", "--encoder-lr has no effect with --method full"),
    ("--task sst2 --encoder-lr 1", "--encoder-lr has no effect with a frozen encoder: leave it out"),
    ("--task sst2 --method idpg --encoder-lr 1", "--encoder-lr has no effect with a frozen encoder: leave it out"),
    ("--task sst2 --tune-encoder --control constant", "--control has no effect with --tune-encoder"),
    ("--task sst2 --tune-encoder --control blind", "--control has no effect with --tune-encoder"),
    ("--task sst2 --model glue --pretrain-seed 3", "--pretrain-seed has no effect with --model glue"),
    ("--adapter run --predict x --task sst2", "--task has no effect with --predict"),
    ("--adapter run --predict x --seed 3", "--seed has no effect with --predict"),
    ("--adapter run --predict x --quiet", "--quiet has no effect with --predict"),
    ("--adapter run --predict x --control blind", "--control has no effect with --predict"),
    ("--adapter run --predict x --resume run", "--resume has no effect with --predict"),
    # combinations
    ("--task sst2 --predict x", "--predict TEXT and --adapter DIR go together"),
    ("--task sst2 --adapter run", "--predict TEXT and --adapter DIR go together"),
    ("--adapter run", "--predict TEXT and --adapter DIR go together"),
    ("--resume nowhere", "nowhere holds no run: begin one with --task"),
    ("--resume empty", "empty holds no run"),
    ("--resume glue", "glue holds no run"),
    ("--resume run --out other", "--out has no effect with --resume, whose folder it is"),
    ("--resume cut --rank 3", "cut holds another run: rank is 2 there and 3 here"),
    ("--resume cut --epochs 5", "cut holds another run: epochs is 2 there and 5 here"),
    ("--resume cut --method pt", "--method pt"),
    ("--resume run --epochs 5", "run holds another run: epochs is 2 there and 5 here"),
    ("--resume run --rank 3", "run holds another run: rank is 2 there and 3 here"),
    ("--resume run --task rte", "run holds another run: task is sst2 there and rte here"),
    ("--resume cut --model gpt3", "there is no model gpt3"),
    ("--resume cut --tune-encoder", "cut holds another run: tune_encoder is False there and True here"),
    ("--resume cut --control blind", "cut holds another run: control is None there and blind here"),
    ("--resume cut --encoder-blocks 1", "cut holds another run: encoder_blocks is 0 there and 1 here"),
    ("--resume cut --head-lr 1", "cut holds another run: head_lr is 0.003 there and 1.0 here"),
    # models and data that are not there, or too small
    ("--task sst2 --model gpt3", "there is no model gpt3: name tiny, gpt2"),
    ("--task sst2 --model file", "there is no model file"),
    ("--task sst2 --encoder gpt3", "there is no model gpt3"),
    ("--task sst2 --model " + "m" * 10 ** 4, "File name too long: 'mmm"),
    ("--task sst2 --data glue --model empty", "empty does not hold config.json and model.safetensors"),
    ("--task sst2 --data nowhere", "nowhere/SST-2/train.tsv not found: --data names the folder"),
    ("--task sst2 --data file", "file/SST-2/train.tsv not found"),
    ("--task mnli", "task mnli has no built-in sample (only sst2, rte, rewrite)"),
    ("--task mnli --data glue", "glue/MNLI/train.tsv not found"),
    ("--task sst2 --max-train 1", "1 training row, but h is scaled by a deviation, which takes 2"),
    ("--task sst2 --holdout 2000", "--holdout 2000 leaves less than 2 of 2000 training rows"),
    ("--task sst2 --holdout 31 --max-train 32", "--holdout 31 leaves less than 2 of 32 training rows"),
    ("--task sst2 --num-virtual-tokens 128", "128 prompt tokens leave no room for text in a context of 128"),
    ("--task sst2 --num-virtual-tokens 64 --fusion concat", "128 prompt tokens leave no room"),
    ("--task sst2 --num-virtual-tokens 126", "needs more than the 2 tokens the context leaves"),
    ("--task sst2 --rank 10000", "--rank: 10000 is not between 1 and 1000"),
    # folders of other runs, or that cannot be written
    ("--task sst2 --out file", "nothing can be saved in file"),
    ("--task sst2 --out file/run", "nothing can be saved in file/run, because of "),
    ("{run} --seed 5 --lr 0.1 --out cut", "cut holds another run: seed is 0 there and 5 here"),
    ("{run} --lr 0.1 --out cut", "cut holds another run: lr is 0.03 there and 0.1 here"),
    ("{run} --epochs 1 --out cut", "cut holds another run: epochs is 2 there and 1 here"),
    ("{run} --rank 1 --out cut", "cut holds another run: rank is 2 there and 1 here"),
    ("{run} --batch-size 4 --out cut", "cut holds another run: batch_size is 8 there and 4 here"),
    ("{run} --max-train 30 --out run", "run holds another run: max_train is None there and 30 here"),
    ("{run} --dropout 0.5 --out run", "run holds another run: dropout is 0.0 there and 0.5 here"),
    ("{run} --pretrain-seed 1 --out run", "run holds another run: pretrain_seed is 0 there and 1 here"),
    ("{run} --dtype bfloat16 --out run", "run holds another run: dtype is float32 there and bfloat16 here"),
    ("--task sst2 {small} --out run", "run holds another run: data is glue/SST-2 there and built-in sample, not GLUE here"),
    ("{run} --lr 1e30 --out run", "run holds another run: lr"),
    ("{run} --control shuffled --out run", "run holds another run: control is None there and shuffled here"),
    ("{run} --head-std 0.02 --out run", "run holds another run: head_std is None there and 0.02 here"),
    # what --predict is given
    *((f"--adapter {control} --predict x", f"the adapter in {control} is a control ({control}), made to be scored")
      for control in train.CONTROLS),
    ("--adapter nowhere --predict x", "nowhere/adapter.pt"),
    ("--adapter empty --predict x", "empty/adapter.pt"),
    ("--adapter file --predict x", "file/adapter.pt"),
    ("--adapter cut --predict x", "cut/adapter.pt"),
    ("--adapter run --predict nowhere.txt", "--predict: there is no file nowhere.txt; if it is a text, give it to --predict -"),
    ("--adapter run --predict texts/nowhere", "there is no file texts/nowhere"),
    ("--adapter run --predict ./texts", "there is no file ./texts"),
    ("--adapter run --predict C:\\texts.tsv", "there is no file C:\\texts.tsv"),
    ("--adapter run --predict /dev/fd/99", "there is no file /dev/fd/99"),
    ("--adapter run --predict " + "x/" * 10 ** 5, "there is no file x/x/x/"),
    ("--adapter run --predict glue", "Is a directory: 'glue'"),
    ("--adapter run --predict /dev/null", "/dev/null, line 1: 0 texts, the task takes 1 (sentence)"),
])
def test_flags_and_folders(refused_at_once, line, words):
    refused_at_once(line.format(run=" ".join(RUN), small=" ".join(SMALL)).split(), words)


@pytest.mark.parametrize("text, words", [
    ("", "--predict, line 1: 0 texts, the task takes 1 (sentence)"), ("  \n ", "--predict, line 1: 0 texts"),
    ("good\n\nbad", "--predict, line 2: 0 texts"), ("good\tbad", "--predict, line 1: 2 texts, the task takes 1"),
    ("caf\udce9", "--predict: byte 3 is not UTF-8: save it as UTF-8"), ("\ufeff", "--predict, line 1: 0 texts"),
])
def test_texts_that_are_none(refused_at_once, text, words):
    refused_at_once(["--adapter", "run", "--predict", text], words)


@pytest.mark.parametrize("content, words", [
    (b"", "texts.txt, line 1: 0 texts"), (b"\n\n", "texts.txt, line 1: 0 texts"), (b"\xef\xbb\xbf\n", "texts.txt, line 1: 0 texts"),
    (b"good\n \nbad\n", "texts.txt, line 2: 0 texts"), (b"good\tbad\n", "texts.txt, line 1: 2 texts"),
    (b"good\ncaf\xe9", "texts.txt: byte 8 is not UTF-8"), (b"\xff\xfeg\0o\0", "texts.txt: byte 0 is not UTF-8"),
    (os.urandom(16) * 10 + b"\xff", "texts.txt"),
])
def test_files_and_standard_input_without_texts(refused, place, monkeypatch, content, words):
    (place / "texts.txt").write_bytes(content)
    refused(["--adapter", "run", "--predict", "texts.txt"], words)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    refused(["--adapter", "run", "--predict", "-"], words.replace("texts.txt", "standard input"))


def test_standard_input_that_is_closed(refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)                            # as Python does for <&-
    refused(["--adapter", "run", "--predict", "-"], "standard input, line 1: 0 texts")


def test_tab_separated_files(refused, place):
    for content, words in [
        (b"", "glue/SST-2/train.tsv: no examples in it, only an empty file"),
        (b"sentence\tlabel\n", "glue/SST-2/train.tsv: no examples in it, only a header"),
        (b"text\tlabel\ngood\t1\n", "train.tsv, line 1: no column 'sentence' in the header"),
        (b"sentence\tlabel\ngood\t1\nbad\tmaybe\n", "train.tsv, line 3: label 'maybe' is none of 0, 1"),
        (b"sentence\tlabel\ngood\t1\nbad\t" + b"0" * 10 ** 6, "train.tsv, line 3: label '000"),
        (b"sentence\tlabel\ngood\t1\nbad\n", "train.tsv, line 3: 1 columns, the header has 2"),
        (b"sentence\tlabel\ncaf\xe9\t1\n", "train.tsv, line 2: not UTF-8"),
        (b"sentence\tlabel\ngood\t1\n", "glue/SST-2: 1 training row, but h is scaled by a deviation"),
    ]:
        (place / "glue/SST-2/train.tsv").write_bytes(content)
        refused([*RUN, "--out", "new"], words)
    (place / "glue/SST-2/dev.tsv").unlink()
    (place / "glue/SST-2/train.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t0\n")
    refused([*RUN, "--out", "new"], "dev.tsv not found")


# --- what is on the disk ---------------------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return os.mkdir, ("run-by-pickle",)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


DAMAGED = "is damaged, or no file of this program"
FILES = [  # (done to an adapter or a checkpoint, words)
    (lambda path: path.write_bytes(b""), DAMAGED),
    (lambda path: path.write_bytes(b"{}"), DAMAGED),
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), DAMAGED),
    (lambda path: path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2]), DAMAGED),
    (lambda path: path.write_bytes(flip_a_bit(path.read_bytes())), DAMAGED),
    (lambda path: shutil.make_archive("some", "zip", "glue") and os.replace("some.zip", path), DAMAGED),
    (lambda path: torch.save(Code(), path), DAMAGED),
    (lambda path: torch.save(torch.load(path, weights_only=True) | dict(config=Code()), path), DAMAGED),
    (lambda path: torch.save([], path), DAMAGED),
    (lambda path: torch.save(5, path), DAMAGED),
    (lambda path: torch.save(torch.zeros(3), path), DAMAGED),
    (lambda path: torch.save({}, path), DAMAGED),
    (fifo, DAMAGED),
    (folder, DAMAGED),
]


def put(**values):
    return lambda state: state.update(values)


def entry(key, **values):
    return lambda state: state[key].update(values)


def tensor(change, name="prompt.soft_prompt", key="tensors"):
    return lambda state: state[key].update({name: change(state[key][name])})


def of_nan(tensor):
    return torch.where(torch.arange(tensor.numel()).view(tensor.shape) == 0, float("nan"), tensor)


OTHER = {int: "5", dict: [], torch.Tensor: [1.0], list: {}, float: 5}  # what is of another type
CONTENT = [  # (done to the content of an adapter or a checkpoint, words)
    (put(format=3), "format 3 instead of 4"), (put(format=5), "format 5 instead of 4"),
    (put(format=torch.tensor([3, 3])), "other content"), (put(extra=1), "other content"),
    *((lambda state, key=key: state.pop(key), "other content") for key in train.ADAPTER_KEYS),
    *((put(**{key: OTHER[kind]}), "other content") for key, kind in train.ADAPTER_KEYS.items()),
    (entry("config", colour="red"), "colour"), (lambda state: state["config"].pop("task"), "task"),
    (entry("config", task="sst3"), "--task: 'sst3' is none of"), (entry("config", task=["sst2"]), "is no str"),
    (entry("config", method="lora2"), "--method: 'lora2' is none of"), (entry("config", rank=0), "--rank: 0 is not between"),
    (entry("config", rank=10 ** 10), "--rank: 10000000000 is not between"), (entry("config", rank="4"), "--rank: '4' is no int"),
    (entry("config", rank=True), "--rank: True is no int"), (entry("config", lr=float("nan")), "--lr: nan is not between"),
    (entry("config", dropout=7), "--dropout: 7 is not between"), 
    (entry("config", seed=-1), "--seed: -1 is not between"), (entry("config", tune_encoder=1), "--tune-encoder: 1 is no bool"),
    (entry("config", epochs=torch.tensor(2)), "--epochs: tensor(2) is no int"),
    (entry("config", rank=3), "differ"), (entry("config", control="blind"), "differ"),
    (entry("config", control="nonsense"), "--control: 'nonsense' is none of"),
    (entry("config", control=True), "--control: True is no str"), (entry("config", shuffle_instances=False), "shuffle_instances"),
    (entry("config", encoder_blocks=1), "differ"), (entry("config", encoder_blocks=0.0), "is no int"),
    (entry("config", encoder_blocks=-1), "--encoder-blocks: -1 is not between"),
    (entry("config", head_lr=0), "--head-lr: 0 is not between"), (entry("config", encoder_lr="1"), "'1' is no float"),
    (entry("task", template="no field"), "has to name fields"), (entry("task", template=5), "have to be texts"),
    (entry("task", template="{sentence.__class__}"), "has to name fields"), (entry("task", label_words=[]), "have to be dictionaries"),
    (entry("task", label_names=("one",)), "1 label_names for 2 label_words"), (entry("task", label_names=5), "damaged"),
    (entry("task", label_names=(1, 2)), "have to be texts"), (entry("task", colour="red"), "colour"),
    (entry("task", fields={}), "have to be dictionaries"), (lambda state: state["task"].pop("folder"), "folder"),
    *((tensor(change), words) for change, words in [
        (of_nan, "not finite"), (lambda x: x / 0, "not finite"), (lambda x: x.double(), "float64"), (lambda x: x.long(), "int64"),
        (lambda x: x.half(), "float16"), (lambda x: x[:2], "[2, 64]"), (lambda x: x.to("meta"), "no tensor"),
        (lambda x: x.to_sparse(), "no tensor"), (lambda x: 5, "no tensor"), (lambda x: x[None], "[1, 3, 64]"),
    ]),
    (lambda state: state["tensors"].pop("prompt.soft_prompt"), "prompt.soft_prompt"),
    (lambda state: state["tensors"].clear(), "prompt"),
    (entry("tensors", extra=torch.zeros(1)), "extra"), (entry("tensors", extra=5), "'extra"),
    (lambda state: state["tensors"].update({5: torch.zeros(1)}), "5"),
]
ADAPTER = [
    *((put(instance_std=std), words) for std, words in [
        (torch.zeros(64), "not above 0"), (-torch.ones(64), "not above 0"), (torch.full((64,), float("nan")), "not finite"),
        (torch.full((64,), float("inf")), "not finite"), (torch.ones(63), "[63]"), (torch.ones(64).double(), "float64"),
        (torch.ones(64, dtype=torch.int64), "int64"), (torch.ones(64, device="meta"), "no tensor"),
        (torch.eye(64)[0].to_sparse(), "no tensor")]),
    (lambda state: of_nan_in(state, "instance_mean"), "not finite"), (put(instance_mean=torch.zeros(2, 32)), "[2, 32]"),
    (entry("depends_on", fingerprint="0123456789ab"), "another model (0123456789ab)"),
    (entry("depends_on", fingerprint="x" * 10 ** 6), "another model (xxx"), (entry("depends_on", fingerprint=5), "5"),
    (lambda state: state["depends_on"].clear(), "damaged"), (entry("config", rank=10 ** 4, hidden_dim=10 ** 5), "--rank"),
    (lambda state: [state[key].update(encoder_blocks=3) for key in ("config", "depends_on")], "the encoder has 2 blocks"),
    (lambda state: [state[key].update(control="constant") for key in ("config", "depends_on")], "is a control (constant)"),
    (entry("config", num_virtual_tokens=128), "differ"), (entry("config", model="nowhere"), "there is no model nowhere"),
    (entry("task", label_words={"0": " terrible", "1": " magnificent"}), "it has to be 1"),
    (entry("config", model=5), "--model: 5 is no str"), (entry("config", encoder="file"), "there is no model file"),
]
CHECKPOINT = [
    *((lambda state, key=key: state.pop(key), "other content") for key in ("step", "losses", "metrics", "moments")),
    *((put(**{key: OTHER[kind]}), "other content") for key, kind in list(train.CHECKPOINT_KEYS.items())[-5:]),
    (put(step=0), "step"), (put(step=-1), "step"), (put(step=10 ** 9), "step"), (put(step=True), "other content"),
    (put(losses=torch.zeros(3).double()), "out of range"), (lambda state: of_nan_in(state, "losses"), "losses"),
    (put(losses=torch.zeros(1, 1, device="meta")), "losses"), (put(losses=torch.zeros(1, 3)), "float32"),
    (put(metrics=[5]), "no attribute"), (put(metrics=[{}]), "metrics"), (put(metrics=[dict(epoch=1)]), "metrics"),
    (put(metrics=[dict(epoch="1", loss=1.0, accuracy=1.0, seconds=1.0)]), "metrics"),
    (put(metrics=[dict(epoch=1, loss=1.0, accuracy=1.0, seconds=1.0)] * 3), "not all of it is of step"),
    (put(seconds=float("nan")), "not JSON compliant"),
    (lambda state: state["moments"].clear(), "soft_prompt.step"), (entry("moments", extra=torch.zeros(1)), "extra"),
    *((tensor(change, "prompt.soft_prompt.exp_avg", "moments"), "exp_avg")
      for change in (of_nan, lambda x: x.double(), lambda x: x[:2], lambda x: x.to("meta"), lambda x: x.to_sparse(), lambda x: 5)),
    (entry("depends_on", rank=3), "differ"), (entry("depends_on", lr=torch.zeros(2)), "damaged"),
    (lambda state: state["depends_on"].clear(), "damaged"),
]


def of_nan_in(state, key):
    state[key] = of_nan(state[key])


def change_content(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize("damage, words", FILES)
def test_files_that_are_no_adapter(refused, damage, words):
    damage(Path("run/adapter.pt"))
    for argv in (["--adapter", "run", "--predict", TEXT], [*RUN, "--out", "run"], ["--resume", "run"]):
        assert "run/adapter.pt" in refused(argv, words)


@pytest.mark.parametrize("change, words", CONTENT + ADAPTER)
def test_adapters_with_other_content(refused_at_once, change, words):
    change_content(Path("run/adapter.pt"), change)
    refused_at_once(["--adapter", "run", "--predict", TEXT], words)


@pytest.mark.parametrize("damage, words", FILES)
def test_files_that_are_no_checkpoints(refused, damage, words):
    for name in train.CHECKPOINTS:
        damage(Path("cut", name))
    for argv in (["--resume", "cut"], [*RUN, "--out", "cut"]):
        assert "cut/checkpoint.pt" in refused(argv, words)


@pytest.mark.parametrize("change, words", CONTENT + CHECKPOINT)
def test_checkpoints_with_other_content(refused_at_once, change, words):
    for name in train.CHECKPOINTS:
        change_content(Path("cut", name), change)
    refused_at_once(["--resume", "cut"], words)


def test_of_two_checkpoints_the_one_before_is_used_if_the_newest_has_other_content(place, capsys):
    path = place / "cut/checkpoint.pt"
    whole = path.read_bytes()
    for number, (change, _) in enumerate(CONTENT + CHECKPOINT):
        path.write_bytes(whole)
        assert train.earlier_run(place / "cut")["step"] == 5
        change_content(path, change)
        assert train.earlier_run(place / "cut")["step"] == 3, number
        assert "checkpoint.pt is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [damage for damage, _ in FILES[:-1]] + [
    lambda path, change=change: change_content(path, change) for change, _ in CHECKPOINT[::6]])
def test_of_two_checkpoints_the_one_before_is_used_if_the_newest_is_damaged(place, world, capsys, damage):
    damage(Path("cut/checkpoint.pt"))
    capsys.readouterr()
    train.main(["--resume", "cut", "--quiet"])
    assert "cut/checkpoint.pt is damaged" in (err := capsys.readouterr().err) and "; using checkpoint-before.pt" in err
    assert outcome(place / "cut") == outcome(world / "run")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"5", b"null", b"[" * 10 ** 5, b"{", b'{"accuracy": "high"}', b"\xff"])
def test_a_damaged_result_of_a_finished_run(refused, content):
    Path("run/result.json").write_bytes(content)
    line = refused(["--resume", "run"], "run/result.json is damaged")
    assert "run again without --resume" in line


def test_a_result_that_is_gone(refused):
    Path("run/result.json").unlink()
    refused(["--resume", "run"], "run/result.json is damaged")


@pytest.mark.parametrize("name", ["adapter.pt", "metrics.jsonl", "result.json", *train.CHECKPOINTS])
def test_files_of_others_that_have_the_names_of_ours(refused, place, name):
    for content in (b"", b"{}\n", b"my thesis", torch_bytes({"state_dict": {}}), torch_bytes([1.0])):
        (place / "empty" / name).write_bytes(content)
        refused([*RUN, "--out", "empty"], f"empty/{name} is damaged, or no file of this program")
        refused(["--resume", "empty"], f"empty/{name} is damaged, or no file of this program")


def torch_bytes(content):
    torch.save(content, memory := io.BytesIO())
    return memory.getvalue()


def test_changed_labels_are_noticed_in_a_rerun_and_in_resume(refused, place):
    path = place / "glue/SST-2/train.tsv"
    content = path.read_text()
    path.write_text(content[:-2] + ("0\n" if content.endswith("1\n") else "1\n"))
    for folder in ("run", "cut"):
        for argv in ([*RUN, "--out", folder], ["--resume", folder]):
            refused(argv, f"{folder} holds another run: data_sha256 is ")
    path.unlink()
    refused(["--resume", "cut"], "glue/SST-2/train.tsv not found")


def test_other_label_words_are_noticed_in_a_rerun_and_in_resume(refused, monkeypatch):
    task = data.TASKS["sst2"]
    words = dict(zip(task.label_words, reversed(task.label_words.values())))       # the same two, swapped
    monkeypatch.setitem(data.TASKS, "sst2", dataclasses.replace(task, label_words=words))
    for folder in ("run", "cut"):
        for argv in ([*RUN, "--out", folder], ["--resume", folder]):
            refused(argv, f"{folder} holds another run: data_sha256 is ")


def test_the_blind_control_of_a_template_that_ends_in_its_text(refused, monkeypatch):
    task = dataclasses.replace(data.TASKS["sst2"], template="It was {sentence}")
    monkeypatch.setitem(data.TASKS, "sst2", task)
    refused([*RUN, "--control", "blind", "--out", "new"], "control blind: the task has nothing after its text")


def test_a_folder_in_use(refused, place):
    for folder in ("run", "cut", "empty"):
        descriptor = os.open(place / folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)                         # another process would have to do it alike
        refused([*RUN, "--out", folder], f"{folder} is in use by another run: name another folder with --out")
        os.close(descriptor)
    train.main(["--resume", "cut"])                                    # it is free again


@pytest.mark.parametrize("flags, words", [
    ("--lr 1e30", "start again with a lower --lr or --head-lr\n"), ("--lr 1e20 --method pt", "start again with a lower --lr\n"),
    ("--lr 1e38", "--lr: 1e+38 is not between"), ("--lr 1e25 --method full", "start again with a lower --lr\n"),
    ("--fusion add --head-lr 1e30", "start again with a lower --lr or --head-lr\n"),
    ("--tune-encoder --encoder-lr 1e30", "start again with a lower --lr or --head-lr or --encoder-lr\n"),
])
def test_training_that_diverges_leaves_nothing_that_looks_like_a_result(place, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        train.main(["--task", "sst2", "--data", "glue", "--epochs", "1", "--batch-size", "8", *flags.split(), "--out", "new"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1 and "wrote" not in out
    assert words in err
    assert not list(place.glob("new/*"))


# --- models ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_pretraining(place, tiny, monkeypatch):
    """The real tiny_gpt, quick because its text and steps are few; its cache file is damaged by the test."""
    from model import PRETRAINING
    monkeypatch.undo()
    monkeypatch.chdir(place)
    for name, value in dict(documents=60, steps=2, max_rounds=1).items():
        monkeypatch.setitem(PRETRAINING, name, value)
    monkeypatch.setattr(data, "tiny_tokenizer", lambda text: tiny[1])
    monkeypatch.setattr(train, "tiny_gpt", REAL_TINY_GPT)


@pytest.mark.parametrize("damage, words", [
    *((damage, "weights") for damage, _ in FILES[:8]), (fifo, "weights"), (folder, "weights"),
    (lambda path: torch.save([], path), "no tensors by name"), (lambda path: torch.save(5, path), "no tensors by name"),
    *((lambda path, change=change: change_content(path, change), words) for change, words in [
        (lambda state: state.clear(), "'wte.weight' is no tensor"), (put(extra=torch.zeros(1)), "'extra' is [1]"),
        (lambda state: state.pop("ln_f.bias"), "'ln_f.bias' is no tensor"), (put(**{"ln_f.bias": torch.zeros(9)}), "is [9] of float32"),
        (put(**{"ln_f.bias": torch.zeros(64).long()}), "is [64] of int64"), (put(**{"ln_f.bias": torch.zeros(64) / 0}), "not finite"),
        (put(**{"ln_f.bias": torch.zeros(64, device="meta")}), "no tensor"), (put(**{"ln_f.bias": 5}), "no tensor"),
        (put(extra=5), "'extra' is no tensor")]),
])
def test_cached_models_that_are_damaged(small_pretraining, refused, place, damage, words):
    train.tiny_gpt(0, "cache", "cpu", True)
    (path,) = (place / "cache").iterdir()
    damage(path)
    assert f"cache/{path.name}" in refused([*RUN, "--cache", "cache", "--out", "new"], words)


def test_a_cache_that_cannot_be_written_is_noticed_before_the_work(small_pretraining, refused, monkeypatch):
    monkeypatch.setattr(train, "pretrain", lambda *_: pytest.fail("it begins"))
    for cache in ("file", "file/cache"):
        refused([*RUN, "--cache", cache, "--out", "new"], f"nothing can be saved in {cache}, because of ")


def weights(change):
    """A folder with a small GPT-2 whose tensors are changed."""
    def write(folder):
        shutil.copytree(Path(train.__file__).parent / "tests/fixtures/prefixed", folder)
        change_content(folder / "pytorch_model.bin", change)
    return write


def pointer(folder):
    shutil.copytree(Path(train.__file__).parent / "tests/fixtures/bare", folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n")


def sharded(folder):
    pointer(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')


WEIGHT = "transformer.h.0.attn.c_attn.weight"


@pytest.mark.parametrize("make, words", [
    (pointer, "model.safetensors is a git-lfs pointer"), (sharded, "holds a model in several files (shards)"),
    (weights(lambda state: state.update({WEIGHT: state[WEIGHT].to_sparse()})), f"tensor {WEIGHT!r} is "),
    (weights(lambda state: state.update({WEIGHT: state[WEIGHT].to("meta")})), f"tensor {WEIGHT!r} is "),
    (weights(lambda state: state.update({WEIGHT: state[WEIGHT].long()})), f"tensor {WEIGHT!r} is "),
    (weights(lambda state: state.update({WEIGHT: 5})), "something else than tensors by name"),
    (weights(lambda state: state.pop(WEIGHT)), "lacks 1 of the "),
])
def test_models_that_are_none(refused, place, make, words):
    make(place / "gpt")
    assert "gpt" in refused([*RUN, "--model", "gpt", "--out", "new"], words)


# --- what works ------------------------------------------------------------------------------------------------


def rows_of(capsys, *argv):
    capsys.readouterr()
    train.main(["--adapter", "run", "--predict", *argv])
    out, err = capsys.readouterr()
    return out.splitlines(), err


def test_files_of_others_survive_a_whole_run(place):
    others = {name: name.encode() for name in ("checkpoint-best.pt", "movie.part", "checkpoint.pt.part", "notes.json")}
    for name, content in others.items():
        (place / "cut" / name).write_bytes(content)
    (place / "cut/checkpoint-new.pt.0a1b2c3d.part").write_bytes(b"of a killed process")
    train.main([*RUN, "--save-every", "1", "--out", "cut"])
    left = {path.name: path.read_bytes() for path in (place / "cut").iterdir()}
    assert others.items() <= left.items()
    assert left.keys() - others.keys() == {"adapter.pt", "metrics.jsonl", "result.json"}


def test_another_encoder_by_the_name_of_the_same_is_the_same(place, capsys):
    train.main([*RUN, "--encoder", "tiny", "--out", "run"])            # no other run
    assert rows_of(capsys, TEXT)[0][1].endswith(TEXT)


def test_the_same_command_after_ctrl_c_starts_anew_and_says_so(place, world, capsys):
    train.main([*RUN, "--out", "cut"])
    out = capsys.readouterr().out
    assert "starting anew: --resume cut would go on after step 5" in out and "epoch 1/2" in out
    assert outcome(place / "cut") == outcome(world / "run")


def test_a_text_is_read_as_training_reads_it(place, capsys):
    (expected, plain), errors = rows_of(capsys, TEXT), ""
    for text in (f" {TEXT}  ", f"{TEXT}\n", f"\ufeff{TEXT}\n", f"{TEXT}\r\n\n \n"):
        (place / "t").write_bytes(text.encode())
        assert rows_of(capsys, "t") == rows_of(capsys, text) == (expected, errors)


def test_a_text_that_is_cut_or_has_words_never_read_is_noted(place, capsys):
    out, err = rows_of(capsys, "I loved this movie")
    assert len(out) == 2 and err.startswith("note: never read: ") and "loved" in err and err.count("\n") == 1
    out, err = rows_of(capsys, " and ".join(["the plot is dull"] * 2000))
    assert len(out) == 2 and err == "note: 1 of 1 texts were cut to 125 tokens\n"
    assert rows_of(capsys, "the plot is truly dull")[1] == ""


def test_nobody_keeps_his_own_h(tiny):
    for N in (2, 3, 32):
        h = torch.randn(N, 4)
        split = data.Encoded(torch.zeros(N, 5).long(), torch.full((N,), 5), torch.zeros(N).long(), 0, h)
        for seed in range(20):
            shuffled = train.Problem(None, None, None, split, {"a": split, "b": split}).controlled("shuffled", seed)
            for part in (shuffled.train, *shuffled.tests.values()):
                assert not (part.instances == h).all(dim=1).any()
                assert torch.equal(part.instances.sort(dim=0).values, h.sort(dim=0).values)


@pytest.mark.parametrize("label", [lambda i: int(i >= 24), lambda i: int(i % 4 == 0)])    # sorted; every fourth
def test_rows_held_out_have_each_labels_share_whatever_the_order_and_are_always_the_same(place, label):
    path = place / "glue/SST-2/train.tsv"
    header, *rows = path.read_text().splitlines()
    rows = [f"{text} {number}" for number, text in enumerate(row[:-2] for row in rows)]
    path.write_text("\n".join([header, *(f"{text}\t{label(i)}" for i, text in enumerate(rows))]) + "\n")
    held = []
    for flags in ("", "--seed 5 --rank 3", "--control shuffled"):
        _, config = train.parse_args([*RUN, "--holdout", "8", "--quiet", *flags.split()])
        problem = train.prepare(config)
        assert problem.test.labels.bincount().tolist() == [6, 2] and problem.train.labels.bincount().tolist() == [18, 6]
        held.append(problem.test.tokens)
    assert all(torch.equal(held[0], other) for other in held)


def test_bfloat16_is_applied_to_the_tiny_gpt_and_what_is_trained_is_float32(place, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "fit", lambda config, model, *a, fit=train.fit: seen.append(model) or fit(config, model, *a))
    for number, flags in enumerate(("--method lopa", "--method lora", "--method full", "--tune-encoder")):
        out = f"new{number}"
        train.main(["--task", "sst2", "--data", "glue", "--epochs", "1", "--dtype", "bfloat16", *flags.split(), "--out", out])
        assert json.loads(Path(out, "result.json").read_text())["dtype"] == "bfloat16"
        model = seen.pop()
        assert {p.dtype for p in model.trained().values()} == {torch.float32}
        frozen = {p.dtype for p in model.gpt.parameters() if not p.requires_grad}
        assert frozen == (set() if "full" in flags else {torch.bfloat16})
        train.main(["--adapter", out, "--predict", TEXT])


# Evaluations: of the probe after its epochs 1 and 2, zero-shot, epoch 1, epoch 2, the end; the first checkpoint is epoch 1's.
@pytest.mark.parametrize("during", [1, 2, 3, 4, 5, 6])
def test_ctrl_c_during_an_evaluation_is_not_swallowed(place, world, monkeypatch, capsys, during):
    calls = []

    def predict(*arguments, predict=train.predict):
        calls.append(1)
        if len(calls) == during:
            signal.raise_signal(signal.SIGINT)
        return predict(*arguments)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(train, "predict", predict)
        train.main([*RUN, "--out", "new"])
    assert stop.value.code == 130 and capsys.readouterr().err.count("\n") == 1
    assert not Path("new/adapter.pt").exists()
    train.main(["--resume", "new"] if during > 3 else [*RUN, "--out", "new"])
    assert outcome(place / "new") == outcome(world / "run")


def test_ctrl_c_in_the_first_second_is_no_traceback(place):
    (place / "tiktoken.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n")
    done = subprocess.run([sys.executable, train.__file__, *RUN, "--out", "new"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(place)})
    assert done.returncode != 0 and done.stdout == done.stderr == "" and not Path("new").exists()


def test_progress_bars_come_back_after_a_quiet_run(place, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for flags, shown in ((["--quiet"], False), ([], True)):
        train.main([*RUN, *flags, "--out", "new"])
        assert ("training" in capsys.readouterr().err) == shown


KILLED = """
import os, signal, sys, train
def fit(config, model, problem, folder=None, state=None, fit=train.fit):
    if folder:
        train.cosine_factor = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return fit(config, model, problem, folder, state)
train.fit = fit
train.main(sys.argv[1:])
"""


def test_repeating_a_finished_command_and_killing_it_leaves_the_old_result(place, capsys):
    before = {path.name: path.read_bytes() for path in (place / "run").iterdir()}
    cache = Path(train.__file__).parent / ".cache"
    done = subprocess.run([sys.executable, "-c", KILLED, *RUN, "--out", "run", "--cache", str(cache)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)})
    assert done.returncode == -signal.SIGKILL and "config: " in done.stdout
    assert {path.name: path.read_bytes() for path in (place / "run").iterdir()} == before
    assert len(rows_of(capsys, TEXT)[0]) == 2


FLAGS = dict(max_train=14, seed=1, epochs=2, batch_size=4, lr=0.02, init_std=0.5, num_virtual_tokens=4,
             rank=3, hidden_dim=5, fusion="add", dropout=0.3, tune_encoder=True, dtype="bfloat16", holdout=4, control="blind",
             encoder_blocks=1, head_lr=0.002, encoder_lr=0.02, head_std=0.02, init_text="a film")


@pytest.mark.parametrize("method", train.LEARNING_RATES)
def test_a_flag_changes_what_is_trained_or_is_refused(place, tiny, method):
    def trained(*flags):
        _, config = train.parse_args(["--task", "sst2", "--data", "glue", "--method", method, "--max-train", "16", "--epochs", "1",
                                      "--batch-size", "8", "--quiet", *flags])
        model = train.build(config, problem := train.prepare(config))
        train.fit(config, model, problem)
        return model.trained()

    usual = trained()
    for name, value in FLAGS.items():
        flag = ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
        try:
            changed = trained(*flag)
        except ValueError as error:
            where = "a frozen encoder" if name == "encoder_lr" and method in ("lopa", "idpg") else f"--method {method}"
            assert f"{flag[0]} has no effect with {where}" in str(error)
            continue
        assert usual.keys() != changed.keys() or not all(torch.equal(usual[key], changed[key]) for key in usual), flag
