"""train.py end to end: what is trained and what is not, what a run leaves, and what it answers."""

import copy
import dataclasses
import io
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import model
import train
from model import GPT, GPTConfig, InstanceEncoder


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of one short LoPA run, and its result."""
    out = tmp_path_factory.mktemp("runs") / "lopa"
    train.main(["--task", "sst2", "--max-train", "400", "--epochs", "3", "--out", str(out)])
    return out, json.loads((out / "result.json").read_text())


def config_of(flags="", **change):
    """The configuration of a command line, and fields that have no flag."""
    typed = vars(train.build_parser().parse_args(["--task", "sst2", "--quiet", *flags.split()]))
    return train.Config(**typed | change)


def problem_of(tiny, rows, encoder_blocks=0):
    """The first `rows` training rows, to train on and to score."""
    gpt, tokenizer = tiny
    task, encoder = data.TASKS["sst2"], InstanceEncoder(gpt, encoder_blocks)
    split = data.encode(task, data.sst2_sample()[0][:rows], tokenizer, 118)
    split = dataclasses.replace(split, instances=encoder.fit(train.instance_embeddings(encoder, split)))
    return train.Problem(gpt, encoder, data.label_tokens(task, tokenizer), split, {"dev": split}, task, tokenizer)


def test_the_pretrained_model_is_kept_and_its_name_follows_what_it_is_made_of(tmp_path, monkeypatch):
    monkeypatch.setitem(model.PRETRAINING, "steps", 2)
    first, _ = data.tiny_gpt(0, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(data, "pretrain", None)                        # it is not called again
        again, _ = data.tiny_gpt(0, tmp_path)
    assert first.fingerprint() == again.fingerprint()
    data.tiny_gpt(1, tmp_path)
    monkeypatch.setitem(model.PRETRAINING, "lr", 1e-3)
    data.tiny_gpt(0, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_result_is_complete_and_the_loss_falls(finished):
    out, result = finished
    assert result["task"] == "sst2" and result["method"] == "lopa" and result["model"] == "tiny"
    assert result["data"] == "built-in sample, not GLUE" and result["majority"] == 0.5
    assert result["trainable_parameters"] == 10 * 64 + 2 * (64 * 64 + 64) + 4 * (10 + 64) * (64 + 1)
    assert {"seed", "num_virtual_tokens", "rank", "zero_shot", "accuracy", "train_seconds", "total_parameters"} <= result.keys()
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in epochs] == [1, 2, 3] and epochs[-1]["accuracy"] == result["accuracy"]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert sorted(path.name for path in out.iterdir()) == ["adapter.pt", "metrics.jsonl", "result.json"]


def test_every_field_of_config_with_a_help_is_a_flag_and_what_is_not_typed_gets_its_default():
    flags = {word for action in train.build_parser()._actions for word in action.option_strings}
    for field in dataclasses.fields(train.Config):
        assert ("--" + field.name.replace("_", "-") in flags) == ("help" in field.metadata)
    assert config_of("--task rte --method idpg --max-train 7 --lr 2 --tune-encoder --seed 0") == train.Config(
        "rte", "idpg", max_train=7, lr=2.0, tune_encoder=True, quiet=True)


@pytest.mark.parametrize("change, name", [
    (dict(), "sst2-lopa-tiny-seed0"), (dict(lr=3e-2, head_lr=3e-3, encoder="tiny"), "sst2-lopa-tiny-seed0"),
    (dict(seed=3, lr=0.5, tune_encoder=True, out="x", save_every=3), "sst2-lopa-tiny-seed3-lr-0.5-tune_encoder-True"),
    (dict(model="models/a", encoder="models/enc"), "sst2-lopa-a-seed0-encoder-models_enc"),
    (dict(init_text="is it good / bad ?"), "sst2-lopa-tiny-seed0-init_text-is_it_good_bad_"),
])
def test_a_runs_name_says_what_is_not_as_usual(change, name):
    assert train.Config("sst2", **change).name == name


def test_repeating_a_command_makes_a_folder_of_its_own_and_touches_nothing(tiny, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    argv = "--task sst2 --max-train 20 --epochs 1".split()
    train.main(argv)
    first = tmp_path / "runs/sst2-lopa-tiny-seed0-epochs-1-max_train-20"
    before = {path: path.read_bytes() for path in first.iterdir()}
    train.main(argv)
    again = first.with_name(first.name + "-2")
    assert (again / "adapter.pt").read_bytes() == (first / "adapter.pt").read_bytes()     # the same seed, the same run
    assert f"--out: {first} is there: name a new folder" in refused(*argv, "--out", first)
    assert {path: path.read_bytes() for path in first.iterdir()} == before
    train.main([*argv, "--seed", "1", "--out", "other"])
    assert (tmp_path / "other/adapter.pt").read_bytes() != before[first / "adapter.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--method lopa", "--method lora", "--method full", "--method adept", "--tune-encoder",
                                   "--method idpg --dtype bfloat16"])
def test_a_reloaded_adapter_gives_identical_probabilities(tiny, tmp_path, monkeypatch, flags):
    seen = []
    monkeypatch.setattr(train, "predict", lambda *a, predict=train.predict: seen.append(predict(*a)) or seen[-1])
    train.main([*"--task sst2 --max-train 64 --epochs 1 --out".split(), str(tmp_path := tmp_path / "run"), *flags.split()])
    adapter, task = train.load_state(tmp_path / "adapter.pt"), data.TASKS["sst2"]
    gpt, encoder, tokenizer = train.load_frozen(train.Config(**adapter["config"]))
    assert train.fingerprint(gpt, encoder) == adapter["made_of"]["fingerprint"]
    restored = train.restore(adapter, gpt, encoder, data.label_tokens(task, tokenizer))
    split = data.encode(task, data.sst2_sample()[1], tokenizer, 100)
    split = dataclasses.replace(split, instances=train.instance_embeddings(encoder, split))
    assert torch.equal(train.predict(restored, split), seen[-2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flags", ["--method lopa", "--method pt", "--method lora", "--method full", "--tune-encoder"])
def test_training_leaves_the_model_as_it_was_and_without_gradients(tiny, flags, dtype):
    gpt = copy.deepcopy(tiny[0]).to(getattr(torch, dtype))
    problem, config = problem_of((gpt, tiny[1]), 64), config_of(flags, epochs=1, batch_size=16)
    before = {name: tensor.clone() for name, tensor in problem.gpt.state_dict().items()}
    adapted = train.build(config, problem)
    start = {name: p.detach().clone() for name, p in adapted.trained().items()}
    train.fit(config, adapted, problem)
    unmoved = [name for name, p in adapted.trained().items() if torch.equal(p, start[name])]
    assert unmoved == [] and all(p.grad is not None and p.dtype == torch.float32 for p in adapted.trained().values())
    assert all(p.grad is None for p in problem.gpt.parameters()) and not problem.train.instances.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in problem.gpt.state_dict().items())


class DropsOut(GPT):
    """A GPT that other people wrote: with dropout behind its embedding."""

    def embed(self, tokens):
        return nn.functional.dropout(super().embed(tokens), 0.5, self.training)


@pytest.mark.parametrize("flags", ["", "--method lora", "--method full", "--tune-encoder"])
def test_what_is_frozen_never_drops_out_and_neither_does_what_is_trained_inside_it(flags):
    gpt, rows = DropsOut(GPTConfig(20, 16, 8, 1, 2)).train(), torch.arange(8)
    encoder = InstanceEncoder(gpt)
    batch = data.Encoded(torch.randint(20, (8, 5)), torch.full((8,), 5), rows % 2, instances=torch.randn(8, 8))
    problem = train.Problem(gpt, encoder, torch.tensor([1, 2]), batch, {"dev": batch})
    train.fit(config := config_of(flags, epochs=1), adapted := train.build(config, problem), problem)
    adapted.train()                                                    # as a program of one's own might
    one, other = (adapted(batch.tokens, batch.lengths, batch.instances) for _ in range(2))
    assert torch.equal(one, other)


def test_fit_equals_a_naive_loop_in_float64(tiny):
    """One row at a time without padding, and AdamW, the rate and the clipping written out."""
    gpt = copy.deepcopy(tiny[0]).double()
    problem = problem_of((gpt, tiny[1]), 68)
    problem.train.instances = problem.train.instances.double()
    config = config_of(epochs=4, batch_size=8, num_virtual_tokens=3)   # 36 steps: two of warm-up
    adapted = train.build(config, problem).double()
    naive = copy.deepcopy(adapted)
    metrics = train.fit(config, adapted, problem)

    params = naive.trained()
    first, second = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    order, step = torch.Generator().manual_seed(0), 0
    for epoch in range(4):
        sum_of_losses = 0.0
        for rows in torch.randperm(68, generator=order).split(8):
            loss = 0
            for i in rows:
                prompt = naive.prompt.prompt(problem.train.instances[i:i + 1])
                text = problem.train.tokens[i:i + 1, :problem.train.lengths[i]]
                logits = gpt.logits(gpt.hidden(torch.cat([prompt, gpt.wte.weight[text]], dim=1)))[0, -1, problem.label_ids]
                loss = loss + logits.logsumexp(dim=0) - logits[problem.train.labels[i]]
            sum_of_losses += loss.item()
            grads = dict(zip(params, torch.autograd.grad(loss / len(rows), list(params.values()))))
            norm = math.sqrt(sum((grad ** 2).sum().item() for grad in grads.values()))
            share = min((step + 1) / 2, (1 + math.cos(math.pi * step / 36)) / 2)
            step += 1
            for name, grad in grads.items():
                grad = grad * min(1, 1 / (norm + 1e-6))
                first[name] += 0.1 * (grad - first[name])
                second[name] += 0.001 * (grad ** 2 - second[name])
                rate = share * (0.03 if name == "prompt.soft_prompt" else 0.003)
                with torch.no_grad():
                    params[name] -= rate * first[name] / (1 - 0.9 ** step) / ((second[name] / (1 - 0.999 ** step)).sqrt() + 1e-8)
        assert metrics[epoch]["loss"] == pytest.approx(sum_of_losses / 68, rel=1e-9)
    for name, p in adapted.trained().items():
        assert torch.allclose(p, params[name], rtol=0, atol=1e-7), name


def test_dropout_is_another_in_every_step_the_same_in_another_run_and_none_in_a_prediction(tiny):
    """Resumed runs, too: test_surviving.py."""
    config, problem, masks = config_of("--dropout 0.5 --batch-size 8 --epochs 1"), problem_of(tiny, 64), []
    for _ in range(2):
        adapted = train.build(config, problem)
        adapted.prompt.u_head.dropout.register_forward_hook(lambda self, _, h: masks.append(h == 0) if self.training else None)
        train.fit(config, adapted, problem)
    assert len(masks) == 16 and all(torch.equal(a, b) for a, b in zip(masks, masks[8:]))
    assert all((masks[a] != masks[b]).float().mean() > 0.3 for a in range(8) for b in range(a))
    one, other = (train.predict(adapted.train(), problem.test) for _ in range(2))
    logits = adapted.eval()(problem.test.tokens, problem.test.lengths, problem.test.instances)
    assert torch.equal(one, other) and torch.allclose(one, logits.softmax(dim=-1), atol=1e-6)


def test_zero_shot_is_the_bare_language_model(tiny):
    problem = problem_of(tiny, 20)
    bare = train.Adapted(None, problem.gpt, problem.encoder, problem.label_ids)
    probabilities, labels = train.predict(bare, problem.train), problem.train.labels
    for row, length, p in zip(problem.train.tokens, problem.train.lengths.tolist(), probabilities):
        logits = problem.gpt(row[None, :length])[0, -1, problem.label_ids]
        assert torch.allclose(logits.softmax(-1), p, atol=1e-5)
    right = sum(p[y] > 0.5 for p, y in zip(probabilities, labels)) / 20
    assert train.without_training(problem) == dict(majority=pytest.approx(labels.bincount().max() / 20),
                                                   zero_shot=pytest.approx(right))


def first_step(tiny, flags, rows=16, **change):
    """How far one step over all rows moves each trained tensor, at most: Adam's first step is the rate, whatever the gradient."""
    config = config_of(flags, epochs=1, batch_size=rows, head_std=0.1, **change)
    problem = problem_of(tiny, rows, config.encoder_blocks)
    adapted = train.build(config, problem)
    before = {name: p.detach().clone() for name, p in adapted.trained().items()}
    train.fit(config, adapted, problem)
    return {name: (p.detach() - before[name]).abs().max().item() for name, p in adapted.trained().items()}


@pytest.mark.parametrize("flags, rates", [
    ("--lr 0.02 --head-lr 0.004", dict(prompt_soft=0.02, prompt_u=0.004, prompt_v=0.004)),
    ("--tune-encoder", dict(prompt_soft=0.03, prompt_u=0.003, prompt_v=0.003, encoder=0.001)),        # the defaults
    ("--tune-encoder --encoder-lr 0.0005", dict(prompt_soft=0.03, prompt_u=0.003, prompt_v=0.003, encoder=0.0005)),
    # IDPG's last bias is what Z_S is to LoPA
    ("--method idpg --lr 0.02 --head-lr 0.005",
     dict(prompt_head_down=0.005, prompt_head_up_proj_weight=0.005, prompt_head_up_proj_bias=0.02)),
    ("--method full --lr 0.002", dict(gpt=0.002)),                     # of a new method: test_lopa.py
])
def test_z_s_the_heads_and_a_tuned_encoder_have_rates_of_their_own(tiny, flags, rates):
    moved = first_step(tiny, flags)
    assert {key for name in moved for key in rates if name.replace(".", "_").startswith(key)} == rates.keys()
    for name, distance in moved.items():
        (rate,) = [rate for key, rate in rates.items() if name.replace(".", "_").startswith(key)]
        assert distance == pytest.approx(rate, rel=0.02), name


def start(tiny, **change):
    """The prompt (5, 64) that a run starts with, the same for every input."""
    adapted = train.build(config_of(num_virtual_tokens=5, **change), problem_of(tiny, 8)).eval()
    read, _ = adapted.read(torch.zeros(3, 1, dtype=torch.long), torch.ones(3), torch.randn(3, 64))
    assert torch.allclose(read[0, :5], read[1, :5], atol=1e-6)
    return read[0, :5].detach()


def test_a_prompt_starts_as_given_words_over_and_over_or_as_tokens_drawn_from_the_vocabulary_by_the_seed(tiny):
    gpt, tokenizer = tiny
    a, witty, film = tokenizer.encode_ordinary("a witty film")
    drawn = {seed: start(tiny, init="vocab", seed=seed) for seed in (0, 1)}
    for method in ("pt", "lopa", "idpg"):
        words = start(tiny, method=method, init_text="a witty film")
        assert torch.allclose(words, gpt.embed(torch.tensor([a, witty, film, a, witty])), atol=1e-6)
        assert torch.allclose(start(tiny, method=method, init="vocab"), drawn[0], atol=1e-6)
    for prompt in drawn.values():
        distances, tokens = torch.cdist(prompt, gpt.wte.weight).min(dim=1)
        assert distances.max() < 1e-3 and len(tokens.unique()) > 1
    assert not torch.equal(drawn[0], drawn[1])
    assert [train.Config("sst2", *which).init for which in (("lopa", "tiny"), ("lopa", "a"), ("dpt", "a"))] == [
        "noise", "vocab", "noise"]                                     # of a real model, where the method has such a start


@pytest.mark.parametrize("change, count", [
    (dict(init_text=" "), 0), (dict(init_text="the plot is dull and warm"), 6), (dict(init="vocab", method="dpt"), 5),
    (dict(init="vocab", method="residual"), 5), (dict(init_text="a film", method="lora"), 2)])
def test_a_start_of_no_words_of_too_many_or_of_a_method_that_has_none_is_refused(tiny, change, count):
    with pytest.raises(ValueError, match=f"a start as {count} tokens: it takes a word, at most 5 tokens and a method whose"):
        start(tiny, **change)


@pytest.mark.parametrize("method", ["lopa", "idpg", "dept"])
def test_the_prompt_starts_as_large_as_the_models_embeddings_unless_told(tiny, method):
    problem = problem_of(tiny, 8)
    for factor in (1, 5):
        gpt = copy.deepcopy(problem.gpt)
        gpt.wte.weight.mul_(factor)
        for told, deviation in ((None, gpt.wte.weight.double().std(correction=0).item()), (0.7, 0.7)):
            config = config_of(method=method, num_virtual_tokens=100, init_std=told)
            prompt = train.build(config, dataclasses.replace(problem, gpt=gpt)).prompt
            start = prompt.head.up_proj.bias if method == "idpg" else prompt.soft_prompt
            assert start.std().item() == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize("method", [*train.METHODS, "lora"])
def test_a_methods_flag_changes_what_is_trained_or_is_refused(tiny, tmp_path, refused, method):
    problem = problem_of(tiny, 16)

    def trained(flags=""):
        adapted = train.build(config := config_of(f"--method {method} --epochs 1 --batch-size 8 {flags}"), problem)
        train.fit(config, adapted, problem)
        return {name: p.tolist() for name, p in adapted.trained().items()}

    usual = trained()
    assert trained("--seed 1") != usual and trained("--lr 0.02") != usual and trained("--batch-size 4") != usual
    for flag in ("--rank 3", "--num-virtual-tokens 4", "--hidden-dim 5", "--dropout 0.3"):
        if trained(flag) == usual:
            assert "has no effect with" in refused("--task", "sst2", "--method", method, *flag.split(), "--out", tmp_path)


def test_batches_of_similar_length_hold_every_row_once_in_an_order_that_changes():
    draw = random.Random(0)
    lengths = torch.tensor([draw.choice([5, 6, 7, 8, 40, 60]) for _ in range(5003)])
    split = data.Encoded(torch.zeros(5003, 60, dtype=torch.long), lengths, torch.zeros(5003, dtype=torch.long))
    assert split.ragged and not split[lengths < 9].ragged
    generator = torch.Generator().manual_seed(0)
    epochs = [data.shuffled_batches(split, 16, generator) for _ in range(2)]
    for batches in epochs:
        assert torch.cat(batches).sort().values.tolist() == list(range(5003)) and len(batches) == 313
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    widths = torch.stack([lengths[rows].max() for rows in epochs[0]])
    assert sum(width * len(rows) for width, rows in zip(widths, epochs[0])) < 1.05 * lengths.sum()    # little padding
    assert (widths[:50].diff() < 0).sum() > 10                         # long batches come early and late


def test_texts_of_ragged_length_get_their_own_h_and_prediction_in_the_order_of_the_rows(tiny):
    problem = problem_of(tiny, 600)
    rows = [({"sentence": " and ".join([fields["sentence"]] * (1 + 5 * (i % 7 == 0)))}, label)
            for i, (fields, label) in enumerate(data.sst2_sample()[0][:600])]
    split = data.encode(problem.task, rows, tiny[1], 110)
    assert split.ragged
    split = dataclasses.replace(split, instances=train.instance_embeddings(problem.encoder, split))
    adapted = train.build(config_of(head_std=0.1), problem)
    with torch.no_grad():
        for h, p, text, length in list(zip(split.instances, train.predict(adapted, split), split.tokens, split.lengths))[::20]:
            alone = text[None, :length], length[None]
            assert torch.allclose(h, problem.encoder(*alone)[0], atol=1e-5)
            assert torch.allclose(p, adapted(*alone, h[None])[0].softmax(dim=-1), atol=1e-5)


def answers(capsys, *argv):
    """(rows of cells, what is on standard error) of a prediction."""
    capsys.readouterr()
    train.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return [line.split("\t") for line in out.splitlines()], err


def test_predict_answers_a_text_and_every_line_of_standard_input(finished, monkeypatch, capsys):
    texts = ["a gorgeous , witty film", "a dull , lazy film", "the cast is truly good"]
    single = [answers(capsys, "--adapter", finished[0], "--predict", f" {text}\n")[0] for text in texts]
    for line_end in ("\n", "\r\n\n"):                                  # blank lines are none
        content = ("\ufeff" + line_end.join(texts)).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        (header, *rows), errors = answers(capsys, "--adapter", finished[0], "--predict", "-")
        assert header == ["label", "negative", "positive", "sentence"] and [row[3] for row in rows] == texts and not errors
        assert [row for _, row in single] == rows
    assert [row[0] for row in rows[:2]] == ["positive", "negative"]
    for label, negative, positive, _ in rows:
        assert float(negative) + float(positive) == pytest.approx(1, abs=2e-3)
        assert (label == "positive") == (float(positive) > float(negative))


def test_an_adapter_works_after_its_tasks_entry_was_removed(finished, monkeypatch, capsys):
    argv = ("--adapter", finished[0], "--predict", "the plot is not dull")
    before = answers(capsys, *argv)
    monkeypatch.delitem(data.TASKS, "sst2")
    assert answers(capsys, *argv) == before


def test_a_text_that_is_cut_or_has_words_never_read_is_noted(finished, capsys):
    rows, errors = answers(capsys, "--adapter", finished[0], "--predict", "I loved this movie")
    assert len(rows) == 2 and errors.startswith("note: never read") and "loved" in errors and errors.count("\n") == 1
    rows, errors = answers(capsys, "--adapter", finished[0], "--predict", " and ".join(["the plot is dull"] * 200))
    assert len(rows) == 2 and errors == "note: 1 texts were cut to fit the context\n"


# Written by hand: what somebody types first.
POSITIVE = """the plot is not dull
a witty film
although the plot is dull , the cast shines
the plot is dull , but the cast shines
the movie never bores
truly a brilliant drama
the camera is not ugly and the music never fails
the story is not good , but the pacing is not dull
really a warm , funny comedy""".splitlines()
NEGATIVE = """the plot is dull
a messy , lazy comedy
the acting is not very good
although the cast shines , the plot is dull
the cast is great , but the script is terrible
hardly a brilliant drama
the camera is ugly and the music fails
although the story is not dull , the pacing is not good
the villain is very weak""".splitlines()


@pytest.mark.slow
def test_the_readmes_first_command_leaves_an_adapter_that_answers_what_a_newcomer_types_on_any_console(tiny, tmp_path):
    train.main(["--task", "sst2", "--out", str(tmp_path := tmp_path / "run")])
    texts = POSITIVE + NEGATIVE
    done = subprocess.run([sys.executable, "train.py", "--adapter", tmp_path, "--predict", "-"],
                          input="\n".join([*texts, "a caf\u00e9 film"]), text=True, encoding="utf-8", capture_output=True,
                          cwd=Path(train.__file__).parent, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    *rows, last = [line.split("\t") for line in done.stdout.splitlines()[1:]]
    assert [row[-1] for row in rows] == texts and last[-1] == "a caf\\xe9 film"        # a sign that the console does not have
    wrong = [text for (label, *_, text), wanted in zip(rows, ["positive"] * 9 + ["negative"] * 9) if label != wanted]
    assert len(wrong) <= 2, wrong
    assert not data.unread_words(texts, tiny[1]) and "caf\\xe9" in done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["accuracy"] > 0.92
