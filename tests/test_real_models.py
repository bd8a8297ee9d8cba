"""The command line with GPT-2's files and GLUE's files: small ones of the same form."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import data
import train
from model import TRANSPOSED, GPT, GPTConfig
from test_pretrained import write_model


def save_gpt2(folder, vocab_size, n_embd=16, n_positions=64):
    """A random GPT-2 in the files that Hugging Face Transformers writes."""
    torch.manual_seed(n_embd)
    sizes = dict(vocab_size=vocab_size, n_positions=n_positions, n_embd=n_embd, n_layer=2, n_head=2)
    tensors = {name: tensor.T if name.endswith(TRANSPOSED) else tensor
               for name, tensor in GPT(GPTConfig(**sizes)).state_dict().items()}
    return write_model(folder, tensors, **sizes)


@pytest.fixture
def world(tiny, tmp_path, monkeypatch):
    """A folder with the models gpt and other, which have the tiny GPT's tokenizer; it is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "gpt2_tokenizer", lambda: tiny[1])
    save_gpt2(tmp_path / "gpt", tiny[1].n_vocab)
    save_gpt2(tmp_path / "other", tiny[1].n_vocab, n_embd=8)
    return tmp_path


def run(glue, *flags):
    train.main(["--task", "sst2", "--model", "gpt", "--data", str(glue), "--epochs", "2", "--out", "run", *flags])
    return json.loads(Path("run/result.json").read_text())


def count(d, d_h, m=10, r=4, H=256):
    return m * d + 2 * (d_h * H + H) + r * (m + d) * (H + 1)


@pytest.mark.parametrize("flags, trainable", [
    ("", count(16, 16)),
    ("--encoder other", count(16, 8)),                 # of another width
    ("--dtype bfloat16", count(16, 16)),
    ("--dtype bfloat16 --method lora", 2 * 3 * 2 * 16 * 4),
    # wpe and the first of two blocks, and wte: what the instance embedding is computed from
    ("--tune-encoder", count(16, 16) + 64 * 16 + 12 * 16 * 16 + 13 * 16),
])
def test_a_folder_of_gpt2_weights_is_trained_on_counted_and_predicted_with(world, tiny, glue, capsys, flags, trainable):
    result = run(glue, *flags.split())
    assert result["trainable_parameters"] == trainable + tiny[1].n_vocab * 16 * ("tune" in flags)
    assert result["data"] == str(glue / "SST-2") and result["model"] == "gpt"
    capsys.readouterr()
    train.main(["--adapter", "run", "--predict", "a good film"])
    assert capsys.readouterr().out.splitlines()[1].startswith(("positive\t", "negative\t"))


def test_a_task_with_two_dev_sets_reports_both(world, glue, monkeypatch):
    shutil.copytree(glue, world / "glue")
    shutil.copy(world / "glue/SST-2/dev.tsv", world / "glue/SST-2/again.tsv")
    two = dataclasses.replace(data.TASKS["sst2"], dev_splits=("dev", "again"))
    monkeypatch.setitem(data.TASKS, "sst2", two)
    result = run(world / "glue")
    assert result["accuracy"] == result["accuracy_again"] > 0


def test_a_model_or_an_encoder_whose_tokens_are_others_is_refused(world, glue, monkeypatch, refused):
    save_gpt2(world / "odd", 97)
    flags = ["--task", "sst2", "--data", glue]
    assert f"odd has 97 tokens, its tokenizer {data.gpt2_tokenizer().n_vocab}" in refused(*flags, "--model", "odd")
    other = data.learn_tokenizer("It was great terrible")
    save_gpt2(world / "another", other.n_vocab)
    monkeypatch.setattr(data, "gpt2_tokenizer", lambda: other)
    assert "have to share a tokenizer" in refused(*flags, "--model", "another", "--encoder", "tiny")
