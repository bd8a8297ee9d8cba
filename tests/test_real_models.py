"""The command line with GPT-2's files and GLUE's files: small ones of the same form, and the real tokenizer and data
where TIKTOKEN_CACHE_DIR and GLUE_DIR name them."""

import json
import os

import pytest
import torch

import data
import train
from model import GPT, GPTConfig

TRANSPOSED = ("c_attn.weight", "c_fc.weight", "c_proj.weight")


def save_gpt2(folder, vocab_size, n_embd=16, n_positions=64):
    """A random GPT-2 in the files that Hugging Face Transformers writes."""
    torch.manual_seed(n_embd)
    gpt = GPT(GPTConfig(vocab_size, n_positions, n_embd, n_layer=2, n_head=2))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="gpt2", vocab_size=vocab_size, n_positions=n_positions, n_embd=n_embd, n_layer=2, n_head=2)))
    torch.save({name: tensor.T.contiguous() if name.endswith(TRANSPOSED) else tensor
                for name, tensor in gpt.state_dict().items()}, folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with the models gpt and other, and with small sst2 and mnli files; a tokenizer that knows them."""
    words = "It was great terrible Answer: No Yes Maybe ? . good bad film day"
    tokenizer = data.learn_tokenizer(words)
    monkeypatch.setattr(data, "gpt2_tokenizer", lambda: tokenizer)
    save_gpt2(tmp_path / "gpt", tokenizer.n_vocab)
    save_gpt2(tmp_path / "other", tokenizer.n_vocab, n_embd=8)
    for folder, header, rows, splits in [
        ("SST-2", "sentence\tlabel", ["a good film\t1", "a bad day\t0"], ["dev"]),
        ("MNLI", "sentence1\tsentence2\tgold_label", ["good\tbad\tcontradiction", "day\tfilm\tneutral", "a\ta\tentailment"],
         ["dev_matched", "dev_mismatched"]),
    ]:
        (tmp_path / folder).mkdir()
        for split in ["train", *splits]:
            (tmp_path / folder / f"{split}.tsv").write_text("\n".join([header, *rows * 4]) + "\n")
    return tmp_path


def run(world, *flags):
    train.main(["--model", str(world / "gpt"), "--data", str(world), "--epochs", "2", "--out", str(world / "run"), *flags])
    return json.loads((world / "run/result.json").read_text())


def count(d, d_h, m=10, r=4, H=256):
    return m * d + 2 * (d_h * H + H) + r * (m + d) * (H + 1)


@pytest.mark.parametrize("flags, trainable", [
    ("", count(16, 16)),
    ("--encoder other", count(16, 8)),                 # of another width
    ("--dtype bfloat16", count(16, 16)),
    ("--dtype bfloat16 --method lora", 2 * 3 * 2 * 16 * 4),
    # wte, wpe and the first of two blocks: what the instance embedding is computed from
    ("--tune-encoder", count(16, 16) + (269 + 64) * 16 + 12 * 16 * 16 + 13 * 16),
])
def test_a_folder_of_gpt2_weights_is_trained_on_counted_and_predicted_with(world, monkeypatch, capsys, flags, trainable):
    monkeypatch.chdir(world)                           # where the folder `other` is
    trainable += (data.gpt2_tokenizer().n_vocab - 269) * 16 if "tune" in flags else 0
    result = run(world, "--task", "sst2", *flags.split())
    assert result["trainable_parameters"] == trainable
    assert result["data"] == str(world / "SST-2") and result["model"] == str(world / "gpt")
    capsys.readouterr()
    train.main(["--adapter", str(world / "run"), "--predict", "a good film"])
    assert capsys.readouterr().out.splitlines()[1].startswith(("positive\t", "negative\t"))


def test_a_task_with_two_dev_sets_reports_both(world):
    result = run(world, "--task", "mnli")
    assert all(0 <= result[name] <= 1 for name in ("accuracy", "accuracy_dev_mismatched"))


@pytest.mark.parametrize("make, message", [
    (lambda world: ["--model", str(save_gpt2(world / "odd", 97))], "97 tokens, GPT-2's tokenizer"),
    (lambda world: ["--task", "sst2", "--encoder", "tiny"], "have to share a tokenizer"),
])
def test_a_model_that_does_not_fit_is_one_line(world, capsys, make, message):
    with pytest.raises(SystemExit) as stop:
        run(world, "--task", "sst2", *make(world))
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not {"GLUE_DIR", "TIKTOKEN_CACHE_DIR"} <= os.environ.keys(),
                    reason="GLUE_DIR and TIKTOKEN_CACHE_DIR do not name the real files")
@pytest.mark.parametrize("task", ["sst2", "rte"])
def test_real_text_with_the_real_tokenizer_runs_to_the_end(tmp_path, task):
    folder = save_gpt2(tmp_path / "gpt", 50257, n_positions=1024)
    train.main(["--task", task, "--model", str(folder), "--data", os.environ["GLUE_DIR"], "--max-train", "64", "--epochs", "1",
                "--out", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["trainable_parameters"] == count(16, 16) and result["num_train"] == 64
