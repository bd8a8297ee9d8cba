"""train.py end to end, through the command line it ships with."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import model
import train
from model import InstanceEncoder

REPOSITORY = Path(train.__file__).parent
QUICK = ["--task", "sst2", "--max-train", "400", "--epochs", "3"]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of one short LoPA run, and its result."""
    out = tmp_path_factory.mktemp("runs") / "lopa"
    train.main([*QUICK, "--out", str(out)])
    return out, json.loads((out / "result.json").read_text())


def refused(capsys, *argv):
    """Run the command line, expect exit code 2, and return the one line it printed about it."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(a) for a in argv])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "Traceback" not in message
    return message.splitlines()[-1]


# --- the tiny GPT -----------------------------------------------------------------------------------------------


def test_the_pretrained_model_is_kept_and_its_name_follows_what_it_is_made_of(tmp_path, monkeypatch):
    monkeypatch.setitem(model.PRETRAINING, "steps", 2)
    first, _, seconds = train.tiny_gpt(0, tmp_path, "cpu")
    again, _, no_seconds = train.tiny_gpt(0, tmp_path, "cpu")
    assert seconds > 0 and no_seconds == 0 and first.fingerprint() == again.fingerprint()
    train.tiny_gpt(1, tmp_path, "cpu")
    monkeypatch.setitem(model.PRETRAINING, "lr", 1e-3)
    train.tiny_gpt(0, tmp_path, "cpu")
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("quiet", [True, False])
def test_pretraining_shows_its_progress_in_a_terminal_alone_and_only_if_it_may(tmp_path, monkeypatch, capsys, quiet):
    monkeypatch.setitem(model.PRETRAINING, "steps", 2)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train.tiny_gpt(0, tmp_path, "cpu", quiet=quiet)
    assert ("pre-training the tiny GPT" in capsys.readouterr().err) == (not quiet)


# --- a run -----------------------------------------------------------------------------------------------------


def test_the_result_is_complete_and_the_loss_falls(finished):
    out, result = finished
    assert result["task"] == "sst2" and result["method"] == "lopa" and result["model"] == "tiny"
    assert result["data"] == "built-in sample, not GLUE"
    assert result["trainable_parameters"] == 10 * 64 + 2 * (64 * 64 + 64) + 4 * (10 + 64) * (64 + 1)
    assert result["majority"] == 0.5
    assert {"seed", "num_virtual_tokens", "rank", "zero_shot", "linear_probe", "accuracy", "train_seconds",
            "pretrain_seconds", "total_parameters"} <= result.keys()
    config, *epochs = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert [line["epoch"] for line in epochs] == [1, 2, 3] and epochs[-1]["accuracy"] == result["accuracy"]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert config.items() <= result.items()
    assert sorted(path.name for path in out.iterdir()) == ["adapter.pt", "metrics.jsonl", "result.json"]


def test_every_field_of_config_is_a_flag_with_its_comment_as_help():
    actions = {action.dest: action for action in train.build_parser()._actions}
    for field in dataclasses.fields(train.Config):
        assert actions[field.name].help and actions[field.name].option_strings == ["--" + field.name.replace("_", "-")]
        if field.default is not dataclasses.MISSING:
            assert actions[field.name].default == field.default
    _, config = train.parse_args("--task rte --method idpg --max-train 7 --lr 2 --tune-encoder --seed 0".split())
    assert config == train.Config("rte", "idpg", max_train=7, lr=2.0, tune_encoder=True)


def test_what_decides_a_result_is_all_that_is_asked_for_but_where_and_how_to_run():
    config = train.Config("sst2", "pt", lr=0.1, out="x", save_every=3, quiet=True, device="cpu", cache="y")
    assert set(dataclasses.asdict(config)) - set(config.deciding()) == {"out", "save_every", "quiet", "device", "cache"}
    assert config.deciding()["encoder"] == "tiny" and config.deciding()["dropout"] == 0.0      # as resolved


@pytest.mark.parametrize("change, folder", [
    (dict(), "runs/sst2-lopa-tiny-seed0"), (dict(lr=3e-2, head_lr=3e-3, encoder="tiny"), "runs/sst2-lopa-tiny-seed0"),
    (dict(seed=3, lr=0.5, tune_encoder=True), "runs/sst2-lopa-tiny-seed3-lr-0.5-tune-encoder"),
    (dict(encoder_blocks=1, control="blind"), "runs/sst2-lopa-tiny-seed0-encoder-blocks-1-control-blind"),
    (dict(model="models/a", encoder="models/enc"), "runs/sst2-lopa-a-seed0-encoder-enc"), (dict(out="here/x"), "here/x"),
])
def test_the_run_folder_says_what_is_not_as_usual(change, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "enc"):
        (tmp_path / "models" / name).mkdir(parents=True)
    assert str(train.Config("sst2", device="cpu", **change).folder) == folder


def test_an_unknown_method_is_an_error(tiny):
    with pytest.raises(ValueError, match="--method: 'lorra' is none of lopa, idpg"):
        train.Config("sst2", "lorra")
    config = train.Config("sst2")
    config.method = "lorra"                                            # whatever came after the check
    with pytest.raises(ValueError, match="unknown method 'lorra': choose one of lopa, idpg"):
        train.Adapted(config, tiny[0], InstanceEncoder(tiny[0]), torch.tensor([1, 2]))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, tmp_path):
    out, _ = finished
    for name, seed in (("again", 0), ("other", 1)):
        train.main([*QUICK, "--seed", str(seed), "--out", str(tmp_path / name)])
    first, again, other = (train.load_state(folder / "adapter.pt")["tensors"] for folder in (out, tmp_path / "again", tmp_path / "other"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["prompt.soft_prompt"], other["prompt.soft_prompt"])


@pytest.mark.parametrize("flags", ["--method lopa", "--method lora", "--method full", "--method adept", "--tune-encoder",
                                   "--method idpg", "--fusion concat"])
def test_a_reloaded_adapter_gives_identical_probabilities(tiny, tmp_path, monkeypatch, flags):
    gpt, tokenizer = tiny
    seen = []
    monkeypatch.setattr(train, "predict", lambda *a, predict=train.predict: seen.append(predict(*a)) or seen[-1])
    train.main([*QUICK, "--epochs", "1", *flags.split(), "--out", str(tmp_path)])
    adapter, task = train.load_state(tmp_path / "adapter.pt"), data.TASKS["sst2"]
    encoder = InstanceEncoder(gpt, adapter["config"]["encoder_blocks"])
    model = train.restore(adapter, gpt, encoder, data.label_tokens(task, tokenizer))
    split = data.encode(task, data.sst2_sample()[1], tokenizer, 100)
    split = dataclasses.replace(split, instances=train.instance_embeddings(encoder, split))
    assert torch.equal(train.predict(model, split), seen[-2])
    fingerprint = gpt.fingerprint()
    assert fingerprint == adapter["depends_on"]["fingerprint"]         # the model itself has not changed


def problem_of(tiny, rows, encoder_blocks=None):
    """The first `rows` training rows, to train on and to score."""
    gpt, tokenizer = tiny
    task, encoder = data.TASKS["sst2"], InstanceEncoder(tiny[0], encoder_blocks)
    split = data.encode(task, data.sst2_sample()[0][:rows], tokenizer, 118)
    split = dataclasses.replace(split, instances=encoder.fit(train.instance_embeddings(encoder, split)))
    return train.Problem(gpt, encoder, data.label_tokens(task, tokenizer), split, {"dev": split})


def with_instances(problem, train_h, test_h):
    """The problem with its rows' h and labels replaced: each argument is (h, labels)."""
    splits = [dataclasses.replace(problem.train[:len(h)], instances=h, labels=labels) for h, labels in (train_h, test_h)]
    return dataclasses.replace(problem, train=splits[0], tests={"dev": splits[1]})


def config_of(flags="", **change):
    _, config = train.parse_args(["--task", "sst2", "--device", "cpu", "--quiet", *flags.split()])
    return dataclasses.replace(config, **change)


@pytest.mark.parametrize("flags", ["--method lopa", "--method pt", "--method lora", "--method full", "--tune-encoder"])
def test_training_leaves_the_model_as_it_was_and_without_gradients(tiny, flags):
    problem, config = problem_of(tiny, 64), config_of(flags, epochs=1, batch_size=16)
    before = {name: tensor.clone() for name, tensor in problem.gpt.state_dict().items()}
    model = train.build(config, problem)
    start = {name: p.detach().clone() for name, p in model.trained().items()}
    train.fit(config, model, problem)
    unmoved = [name for name, p in model.trained().items() if torch.equal(p, start[name])]
    assert unmoved == [] and all(p.grad is not None for p in model.trained().values())
    assert all(p.grad is None for p in problem.gpt.parameters()) and not problem.train.instances.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in problem.gpt.state_dict().items())


def test_the_target_is_read_at_the_last_real_token_whatever_the_padding(tiny):
    gpt, tokenizer = tiny
    task = data.TASKS["sst2"]
    rows = [({"sentence": s}, 0) for s in ("the plot works", "although the music is very warm , the script drags")]
    split, ids = data.encode(task, rows, tokenizer, 118), data.label_tokens(task, tokenizer)
    model = train.build(config_of(), problem_of(tiny, 8)).eval()
    h = torch.randn(2, 64)
    with torch.no_grad():
        batch = model(split.tokens, split.lengths, h)
        for i, length in enumerate(split.lengths.tolist()):
            Z = model.prompt.prompt(h[i:i + 1])
            alone = torch.cat([Z, gpt.embed(split.tokens[i:i + 1, :length])], dim=1)
            assert torch.allclose(batch[i], gpt.logits(gpt.hidden(alone))[0, -1, ids], atol=1e-5)


def test_zero_shot_is_the_bare_language_model(tiny):
    problem = problem_of(tiny, 20)
    bare = train.Adapted(None, problem.gpt, problem.encoder, problem.label_ids)
    probabilities = train.predict(bare, problem.train)
    for row, length, p in zip(problem.train.tokens, problem.train.lengths.tolist(), probabilities):
        logits = problem.gpt(row[None, :length])[0, -1, problem.label_ids]
        assert torch.allclose(logits.softmax(-1), p, atol=1e-5)


def test_the_linear_probe_separates_what_is_linear_and_not_an_exclusive_or():
    torch.manual_seed(0)
    h = torch.randn(400, 5)
    for labels, low, high in (((h[:, 0] > 0.2).long(), 0.9, 1), (((h[:, 0] > 0) != (h[:, 1] > 0)).long(), 0.3, 0.7)):
        scores = train.linear_probe(h[:200], labels[:200], h[200:])
        assert low <= (scores.argmax(dim=-1) == labels[200:]).float().mean() <= high


def test_the_probe_with_a_hidden_layer_solves_an_exclusive_or_that_the_linear_one_cannot(tiny):
    torch.manual_seed(0)
    h = torch.randn(600, 64) * torch.tensor([1.0, 1.0, *[0.1] * 62])
    labels = ((h[:, 0] > 0) != (h[:, 1] > 0)).long()
    problem = with_instances(problem_of(tiny, 400), (h[:400], labels[:400]), (h[400:], labels[400:]))
    before = train.baselines(config_of("--epochs 60 --head-lr 0.01"), problem)
    assert 0.3 <= before["linear_probe"] <= 0.7 and before["hidden_layer_probe"] > 0.8
    assert before["majority"] == (labels[400:] == labels[:400].bincount().argmax()).float().mean().item()


def first_step(tiny, flags, rows=16):
    """How far one step over all rows moves each trained tensor, at most: Adam's first step is the rate, whatever the gradient."""
    config = config_of(f"--epochs 1 --batch-size {rows} {flags}")
    problem = problem_of(tiny, rows, config.encoder_blocks)
    model = train.build(config, problem)
    before = {name: p.detach().clone() for name, p in model.trained().items()}
    train.fit(config, model, problem)
    return {name: (p.detach() - before[name]).abs().max().item() for name, p in model.trained().items()}


@pytest.mark.parametrize("flags, rates", [
    ("--method lopa --head-std 0.1 --lr 0.02 --head-lr 0.003", dict(prompt_soft=0.02, prompt_u=0.003, prompt_v=0.003)),
    ("--method lopa --head-std 0.1", dict(prompt_soft=0.03, prompt_u=0.003, prompt_v=0.003)),      # the defaults
    ("--method lopa --head-std 0.1 --lr 0.02 --tune-encoder --encoder-lr 0.0005",
     dict(prompt_soft=0.02, prompt_u=0.003, prompt_v=0.003, encoder=0.0005)),
    ("--method lopa --head-std 0.1 --tune-encoder", dict(prompt_soft=0.03, prompt_u=0.003, prompt_v=0.003, encoder=0.001)),
    # IDPG's last bias is what Z_S is to LoPA
    ("--method idpg --head-std 0.1 --lr 0.02 --head-lr 0.005",
     dict(prompt_head_down=0.005, prompt_head_up_proj_weight=0.005, prompt_head_up_proj_bias=0.02)),
    ("--method pt --lr 0.02", dict(prompt_soft=0.02)),
    ("--method full --lr 0.002", dict(gpt=0.002)),
])
def test_z_s_the_heads_and_a_tuned_encoder_have_rates_of_their_own(tiny, flags, rates):
    moved = first_step(tiny, flags)
    assert {key for name in moved for key in rates if name.replace(".", "_").startswith(key)} == rates.keys()
    for name, distance in moved.items():
        (rate,) = [rate for key, rate in rates.items() if name.replace(".", "_").startswith(key)]
        assert distance == pytest.approx(rate, rel=0.02), name


@pytest.mark.parametrize("method", ["pt", "lopa", "idpg"])
def test_a_prompt_starts_as_the_embeddings_of_words_over_and_over(tiny, method):
    gpt, tokenizer = tiny
    config = train.Config("sst2", method, init_text="a witty film", max_train=20, num_virtual_tokens=5, device="cpu", quiet=True)
    model = train.build(config, train.prepare(config)).eval()
    a, witty, film = tokenizer.encode_ordinary("a witty film")
    words = gpt.embed(torch.tensor([a, witty, film, a, witty]))
    read, _ = model.read(torch.zeros(3, 1, dtype=torch.long), torch.ones(3), torch.randn(3, words.shape[1]))
    assert torch.allclose(read[:, :5], words.expand(3, -1, -1), atol=1e-6)


def test_the_probes_rate_is_the_heads(tiny, monkeypatch):
    def optimizer(groups, adam=torch.optim.AdamW, **how):
        rates.append([group["peak_lr"] for group in groups])
        return adam(groups, **how)

    rates = []
    monkeypatch.setattr(torch.optim, "AdamW", optimizer)
    train.baselines(config_of("--method pt --epochs 1"), problem_of(tiny, 16))
    train.baselines(config_of("--epochs 1 --head-lr 0.5 --lr 7"), problem_of(tiny, 16))
    assert rates == [[0.003], [0.5]]


def test_a_model_with_an_output_layer_of_its_own_is_trained_in_full_at_one_rate(tiny):
    problem, config = problem_of(tiny, 8), config_of("--method full --lr 0.02")
    problem.gpt.lm_head = torch.nn.Linear(64, 5)
    model = train.build(config, problem)
    del problem.gpt.lm_head
    assert "gpt.lm_head.weight" in model.trained()
    assert [group["peak_lr"] for group in train.parameter_groups(config, model)] == [0.02]


@pytest.mark.parametrize("method", ["lopa", "pt", "residual", "dept", "adept"])
def test_the_prompt_starts_as_large_as_the_models_embeddings_unless_told(tiny, method):
    problem, flags = problem_of(tiny, 8), f"--method {method} --num-virtual-tokens 100"
    for factor in (1, 5):
        gpt = copy.deepcopy(problem.gpt)
        gpt.wte.weight.mul_(factor)
        numbers = gpt.wte.weight.flatten().tolist()
        mean = sum(numbers) / len(numbers)
        deviation = (sum((x - mean) ** 2 for x in numbers) / len(numbers)) ** 0.5
        model = train.build(config_of(flags), dataclasses.replace(problem, gpt=gpt))
        assert model.prompt.soft_prompt.std().item() == pytest.approx(deviation, rel=0.05)
        model = train.build(config_of(f"{flags} --init-std 0.7"), dataclasses.replace(problem, gpt=gpt))
        assert model.prompt.soft_prompt.std().item() == pytest.approx(0.7, rel=0.05)
        if method == "lopa":                                           # IDPG's start is one prompt for all, its last bias
            idpg = train.build(config_of("--method idpg --num-virtual-tokens 100"), dataclasses.replace(problem, gpt=gpt))
            assert idpg.prompt.head.up_proj.bias.std().item() == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize("num_blocks, read", [
    (0, ["wte."]), (1, ["wte.", "wpe.", "h.0."]), (2, ["wte.", "wpe.", "h.0.", "h.1."])])
def test_of_a_tuned_encoder_just_what_h_depends_on_is_trained_and_all_of_that_moves(tiny, num_blocks, read):
    gpt = tiny[0]
    wanted = {f"encoder.gpt.{name}" for name, _ in gpt.named_parameters() if name.startswith(tuple(read))}
    moved = first_step(tiny, f"--tune-encoder --head-std 0.1 --encoder-blocks {num_blocks}", rows=24)
    assert {name for name in moved if not name.startswith("prompt.")} == wanted
    assert all(distance > 0 for distance in moved.values())


# --- controls --------------------------------------------------------------------------------------------------


def controlled(tiny, control, num_train=60):
    """(the problem as `prepare` makes it with the control, and without)."""
    flags = f"--max-train {num_train}"
    return [train.prepare(config_of(f"{flags} --control {control}" if on else flags)) for on in (True, False)]


def test_with_the_constant_control_every_h_is_the_training_splits_mean(tiny):
    constant, own = controlled(tiny, "constant")
    assert torch.allclose(own.train.instances.mean(dim=0), torch.zeros(64), atol=1e-5)
    for name in ("train", "dev"):
        split, without = (p.train if name == "train" else p.tests[name] for p in (constant, own))
        assert split.instances.shape == (len(without), 64) and not split.instances.any() and without.instances.any()
        for part in ("tokens", "lengths", "labels"):
            assert torch.equal(getattr(split, part), getattr(without, part))


def test_with_the_blind_control_h_stays_and_the_text_is_the_templates_ending(tiny):
    blind, own = controlled(tiny, "blind")
    for name in ("train", "dev"):
        split, without = (p.train if name == "train" else p.tests[name] for p in (blind, own))
        assert torch.equal(split.instances, without.instances) and torch.equal(split.labels, without.labels)
        for row, length in zip(split.tokens, split.lengths):
            assert tiny[1].decode(row[:length].tolist()) == " . It was"


@pytest.mark.parametrize("method", ["lopa", "pt", "lora"])
def test_a_blind_model_reads_the_prompt_and_the_ending_alone_from_first_to_last(tiny, tmp_path, monkeypatch, method):
    read, hidden_at = [], model.GPT.hidden_at
    monkeypatch.setattr(model.GPT, "hidden_at", lambda gpt, x, last: read.append((gpt, x, last)) or hidden_at(gpt, x, last))
    scored, predict = [], train.predict
    monkeypatch.setattr(train, "predict", lambda *a: scored.append(predict(*a)) or scored[-1])
    train.main([*QUICK, "--epochs", "1", "--method", method, "--control", "blind", "--out", str(tmp_path)])
    ending = tiny[1].encode_ordinary(" . It was")
    assert len(read) > 13                                              # zero-shot, 13 steps, scoring
    for gpt, x, last in read:
        assert x.shape[1] in (len(ending), 10 + len(ending)) and set(last.tolist()) == {x.shape[1] - 1}
        assert torch.equal(x[:, -len(ending):], gpt.wte.weight[ending].expand(len(x), -1, -1))
    differ = (scored[-1] - scored[-1][0]).abs().max().item()
    assert differ > 1e-3 if method == "lopa" else differ < 1e-6        # what is not constant comes from h


@pytest.mark.slow
def test_prompt_and_frozen_model_together_do_what_neither_does_alone(tiny, capsys):
    """The claim of the project on its sample, one seed; README.md has five, and the tables of three pre-trainings."""
    flags = "--task sst2 --quiet --out run".split()
    whole = train.prepare(train.parse_args(flags)[1])
    accuracy, kinds = {}, {}
    for name, more in (("lopa", []), ("pt", ["--method", "pt"]), *((c, ["--control", c]) for c in train.CONTROLS)):
        config = train.parse_args([*flags, *more])[1]
        problem = whole.controlled(config.control, config.seed)
        model = train.build(config, problem)
        train.fit(config, model, problem)
        scores = train.predict(model, problem.test)
        accuracy[name] = problem.accuracy(scores, problem.test)
        kinds[name] = train.accuracy_by_kind(problem, scores)
    before = train.baselines(config, whole)
    assert accuracy["lopa"] > 0.92
    alone = [accuracy[name] for name in ("pt", *train.CONTROLS)] + [before["hidden_layer_probe"], before["zero_shot"]]
    assert max(alone) < accuracy["lopa"] - 0.12
    assert min(kinds["lopa"].values()) > 0.75                          # negated contrasts need both sides
    assert kinds["blind"]["negated"] > 0.9 > 0.65 > kinds["blind"]["contrast"]     # h does not know the last word


def test_holding_out_scores_training_rows_and_dev_changes_nothing(tiny, tmp_path, monkeypatch):
    rows, dev = data.sst2_sample()
    results = []
    for name, dev_rows in (("with", dev), ("without", [({"sentence": "the plot is dull"}, 1)])):
        monkeypatch.setattr(data, "load_task", lambda *_, **__: (rows, {"dev": dev_rows}, "sample"))
        train.main(["--task", "sst2", "--epochs", "1", "--holdout", "1800", "--out", str(tmp_path / name)])
        results.append(json.loads((tmp_path / name / "result.json").read_text()))
    first, second = results
    assert (first["num_train"], first["num_scored"], first["scored_on"]) == (200, 1800, "held-out training rows")
    assert first["accuracy"] == second["accuracy"] and first["linear_probe"] == second["linear_probe"]


def test_one_pass_through_one_frozen_model_serves_rows_of_different_tasks_and_methods(tiny):
    gpt, tokenizer = copy.deepcopy(tiny[0]).double(), tiny[1]
    before = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    torch.manual_seed(0)
    users = [("sst2", train.METHODS["lopa"](64, 64, 10, rank=4)), ("rte", train.METHODS["lopa"](64, 64, 7, rank=2)),
             ("rte", train.METHODS["pt"](64)), ("sst2", train.METHODS["idpg"](64, 64, 3))]
    rows, alone = [], []
    for i, (task, prompt) in enumerate(users):
        fields, _ = data.TASKS[task].sample()[1][i]
        tokens, _ = data.encode_text(data.TASKS[task], fields, tokenizer, 100)
        h = torch.randn(1, 64, dtype=torch.float64)
        embeds = prompt.double().eval()(gpt.embed(torch.tensor([tokens])), h)          # (1, m_i + T_i, 64)
        rows.append(embeds[0])
        alone.append(gpt.logits(gpt.hidden(embeds))[:, -1])
    assert len({len(row) for row in rows}) > 1
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    together = gpt.logits(gpt.hidden_at(batch, torch.tensor([len(row) - 1 for row in rows])))
    assert torch.allclose(together, torch.cat(alone), atol=1e-10)
    assert all(torch.equal(before[name], tensor) for name, tensor in gpt.state_dict().items())


# --- the command line -------------------------------------------------------------------------------------------


def test_an_error_line_names_the_program_that_was_started(capsys, monkeypatch):
    assert refused(capsys, "--task", "sst3").startswith("train.py: error: ")
    monkeypatch.setattr(train, "COMMAND", "python -m experiments.any_model")
    assert refused(capsys, "--task", "sst3").startswith("experiments.any_model: error: ")


# --- prediction ------------------------------------------------------------------------------------------------


def test_predict_prints_label_and_probabilities(finished, capsys):
    out, _ = finished
    for text, label in (("a gorgeous , witty film", "positive"), ("a dull , lazy film", "negative")):
        train.main(["--adapter", str(out), "--predict", text])
        header, row = (line.split("\t") for line in capsys.readouterr().out.splitlines())
        assert header == ["label", "negative", "positive", "sentence"] and [row[0], row[3]] == [label, text]
        p = [float(cell) for cell in row[1:3]]
        assert sum(p) == pytest.approx(1, abs=0.002) and (p[1] > p[0]) == (label == "positive")


def test_an_adapter_of_another_model_is_refused(finished, capsys, tmp_path):
    out, _ = finished
    adapter = torch.load(out / "adapter.pt", weights_only=True)
    adapter["depends_on"]["fingerprint"] = "0123456789ab"
    torch.save(adapter, tmp_path / "adapter.pt")
    assert "another model (0123456789ab)" in refused(capsys, "--adapter", tmp_path, "--predict", "x")


@pytest.mark.parametrize("change, message", [
    (lambda tensors: tensors.pop("prompt.soft_prompt"), "'prompt.soft_prompt' is no tensor and should be [10, 64] of float32"),
    (lambda tensors: tensors.update(extra=torch.zeros(1)), "'extra' is [1] of float32 and should be no tensor"),
    (lambda tensors: tensors.update({"prompt.soft_prompt": torch.zeros(9, 64)}), "is [9, 64] of float32 and should be [10, 64]"),
])
def test_missing_extra_and_misshapen_tensors_are_refused_by_name(finished, capsys, tmp_path, change, message):
    out, _ = finished
    adapter = torch.load(out / "adapter.pt", weights_only=True)
    change(adapter["tensors"])
    torch.save(adapter, tmp_path / "adapter.pt")
    assert message in refused(capsys, "--adapter", tmp_path, "--predict", "x")


def test_a_damaged_adapter_and_one_with_code_in_it_are_refused(capsys, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run-by-pickle"),)

    for content in (b"", b"not a zip file"):
        (tmp_path / "adapter.pt").write_bytes(content)
        assert "adapter.pt is damaged, or no file of this program" in refused(capsys, "--adapter", tmp_path, "--predict", "x")
    torch.save({"format": 1, "tensors": Code()}, tmp_path / "adapter.pt")
    assert "adapter.pt is damaged, or no file of this program" in refused(capsys, "--adapter", tmp_path, "--predict", "x")
    assert not (tmp_path / "run-by-pickle").exists()


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    ("--task sst3", "argument --task: invalid choice: 'sst3'"),
    ("--task sst2 --method lora2", "argument --method: invalid choice: 'lora2'"),
    ("", "name a task: --task sst2 or mnli"),
    ("--task mnli", "mnli"),
    ("--task sst2 --rank 0", "--rank: 0 is not between 1 and 1000"),
    ("--task sst2 --num-virtual-tokens -3", "--num-virtual-tokens: -3 is not between 1 and 100000"),
    ("--task sst2 --lr nan", "--lr: nan is not between 1e-12 and 1e+30"),
    ("--task sst2 --dropout 1", "--dropout: 1.0 is not between 0 and 0.99"),
    ("--task sst2 --num-virtual-tokens 128", "128 prompt tokens leave no room for text in a context of 128"),
    ("--task sst2 --num-virtual-tokens 64 --fusion concat", "128 prompt tokens leave no room"),
    ("--task sst2 --num-virtual-tokens 126", "needs more than the 2 tokens the context leaves"),
    ("--task sst2 --holdout 2000", "--holdout 2000 leaves less than 2 of 2000 training rows"),
    ("--task sst2 --data nowhere", "nowhere/SST-2/train.tsv not found"),
    ("--adapter nowhere --predict x", "nowhere/adapter.pt"),
    ("--task sst2 --predict x", "--predict TEXT and --adapter DIR go together"),
])
def test_bad_flags_get_one_clear_line(tiny, capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *flags.split())
    assert not list(tmp_path.iterdir())                # nothing was written


def test_a_bad_row_is_named_by_file_and_line(capsys, tmp_path):
    folder = tmp_path / "SST-2"
    folder.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("sentence\tlabel\nfine\t1\nwhat\tmaybe\n")
    message = refused(capsys, "--task", "sst2", "--data", tmp_path, "--out", tmp_path / "out")
    assert f"{folder}/train.tsv, line 3: label 'maybe' is none of 0, 1" in message


def test_a_folder_that_holds_another_run_is_left_alone(finished, capsys):
    out, _ = finished
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    message = refused(capsys, *QUICK, "--rank", 2, "--out", out)
    assert "holds another run: rank is 4 there and 2 here" in message
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_loss_that_is_not_finite_stops_and_names_step_and_learning_rate(tiny, capsys, tmp_path):
    message = refused(capsys, *QUICK, "--lr", "1e20", "--out", tmp_path / "run")
    assert "loss is nan at step" in message and "learning rate" in message and "lower --lr" in message
    assert "start again" in message and not (tmp_path / "run" / "adapter.pt").exists()


def test_texts_that_do_not_fit_are_cut_and_counted(tiny, capsys, tmp_path):
    train.main([*QUICK, "--epochs", "1", "--num-virtual-tokens", "115", "--out", str(tmp_path)])
    assert "texts were cut to 13 tokens, to fit the context of 128" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["texts_cut"] > 0


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tiny, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "train.py", "--task", "sst2", "--max-train", "200", "--epochs", "1000", "--out", str(tmp_path / "run")],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 3/"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "interrupted at step" in errors and f"python train.py --resume {tmp_path / 'run'}" in errors
    checkpoint = train.earlier_run(tmp_path / "run")
    assert checkpoint["config"]["method"] == "lopa" and len(checkpoint["metrics"]) >= 3
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-before.pt", "checkpoint.pt"]


@pytest.mark.skipif("GLUE_DIR" not in os.environ, reason="GLUE_DIR does not name a folder with the real SST-2/train.tsv")
def test_real_sst2_text_goes_through_and_is_told_apart_from_the_sample(tiny, capsys, tmp_path):
    train.main([*QUICK, "--epochs", "1", "--data", os.environ["GLUE_DIR"], "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "real text is beyond it" in printed and "not GLUE" not in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["data"].endswith("SST-2") and result["num_scored"] == 872
