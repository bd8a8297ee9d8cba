"""experiments/compare.py through its command line; experiments/benchmark.py; experiments/figures.py, where matplotlib is."""

import json
from pathlib import Path

import pytest
import torch

import data
import train
from experiments import benchmark, compare, evidence
from lopa import METHODS, PromptTuning

pytestmark = pytest.mark.slow            # each trains a study, if a small one
ROOT = Path(train.__file__).parent
QUICK = ["--task", "sst2", "--max-train", "200", "--epochs", "1"]


def study(folder, flags):
    """Run the command line -> (the runs' lines, the table that it printed last)."""
    compare.main([*QUICK, *flags.split(), "--out", str(folder)])
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    return lines[2:], (folder / "table.md").read_text()


def refused(capsys, *argv):
    """Run the command line, which has to end with exit code 2 and one line of error; returns that line."""
    with pytest.raises(SystemExit, match="^2$"):
        compare.main([str(a) for a in argv])
    line, = capsys.readouterr().err.splitlines()
    return line


def cells(table, *columns):
    return [[row.split(" | ")[i].strip("| ") for i in columns] for row in table.splitlines()[2:]]


@pytest.fixture
def fitted(monkeypatch):
    """The (config, problem) of every training that really takes place, but of the probe's."""
    seen = []

    def fit(config, model, problem, fit=train.fit):
        if isinstance(model, train.Adapted):
            seen.append((config, problem))
        return fit(config, model, problem)

    monkeypatch.setattr(train, "fit", fit)
    return seen


def test_rates_are_chosen_on_training_rows_every_seed_is_scored_and_a_rerun_continues(tiny, tmp_path, capsys, fitted):
    runs, table = study(tmp_path, flags := "--methods pt,lopa-shuffled --seeds 3,4")   # a control has LoPA's rates
    assert capsys.readouterr().out.endswith(table)
    assert [(run["row"], run["stage"], run["seed"], run["control"]) for run in runs] == [
        *[("pt", "trial", 0, None)] * 3, *(("pt", "seed", seed, None) for seed in (3, 4)),
        *[("lopa", "trial", 0, None)] * 3, *(("lopa-shuffled", "seed", seed, "shuffled") for seed in (3, 4))]
    for method, of_method, row in zip(("pt", "lopa"), (runs[:5], runs[5:]), cells(table, 3, 4)):
        trials, scored, usual = of_method[:3], of_method[3:], train.Config("sst2", method)
        for name in ("lr", "head_lr"):                                 # train.py's, a third and three times
            rate = getattr(usual, name)
            assert [run[name] for run in trials] == pytest.approx([rate, rate / 3, 3 * rate], rel=0.15)
        best = max(trials, key=lambda run: run["accuracy"])["lr"]
        assert {run["lr"] for run in scored} == {best} and row[1].startswith(f"{best:g}")
        assert row[0].startswith(f"{sum(run['accuracy'] for run in scored) / 2:.3f} ± ")
    rows = dict(trial=(160, "held-out training rows"), seed=(200, "dev"))      # the other 40 are scored
    assert all((len(problem.train), problem.test_name) == rows[run["stage"]] for run, (_, problem) in zip(runs, fitted))
    assert not torch.equal(*(problem.train.instances for _, problem in fitted[-2:]))   # shuffled by the seed
    assert compare.table(tmp_path / "runs.jsonl") == table             # the lines are enough to make it
    data.save_file(tmp_path / "runs.jsonl", compare.read_lines(tmp_path / "runs.jsonl")[:-1])      # as if interrupted
    del fitted[:]
    _, again = study(tmp_path, flags + " --quiet")
    assert len(fitted) == 1 and capsys.readouterr().out == again       # --quiet: nothing else
    assert cells(again, 0, 1, 2, 3, 4) == cells(table, 0, 1, 2, 3, 4)


def test_default_rates_and_one_seed_are_the_run_that_train_py_makes(tiny, tmp_path, capsys):
    run, = study(tmp_path / "study", "--methods lopa --seeds 1 --rates default")[0]
    printed = capsys.readouterr().out
    train.main([*QUICK, "--seed", "1", "--out", str(tmp_path / "run"), "--quiet"])
    result = json.loads(capsys.readouterr().out)
    assert all(result[name] == run[name] for name in ("accuracy", "trainable_parameters", "lr", "head_lr"))
    kinds = run["accuracy_by_kind"]                                    # on the built-in sample
    assert list(kinds) == ["plain", "negated", "contrast", "negated contrast"]
    of_rows = [kinds[evidence.kind_of_sentence(fields)] for fields, _ in data.TASKS["sst2"].sample()[1]]
    assert sum(of_rows) / len(of_rows) == pytest.approx(run["accuracy"])
    assert f"negated contrast {kinds['negated contrast']:.3f}" in printed


def test_rates_can_come_from_another_study_and_a_row_of_two_rates_is_two_rows(tiny, tmp_path, capsys, fitted):
    first, _ = study(tmp_path / "first", "--methods pt,lopa --seeds 0")
    rates = {run["method"]: (run["lr"], run["head_lr"]) for run in first if run["stage"] == "seed"}
    chosen = tmp_path / "first" / "runs.jsonl"
    del fitted[:]
    flags = f"--methods pt,lopa,lopa-blind --seeds 1,2 --max-train 4 --rates {chosen}"    # too few rows to try any
    runs, table = study(tmp_path / "second", flags)
    assert [run["row"] for run in runs] == ["pt", "pt", "lopa", "lopa", "lopa-blind", "lopa-blind"]
    for config, problem in fitted:
        assert (config.lr, config.head_lr) == rates[config.method] and len(problem.train) == 4
    path = tmp_path / "second" / "runs.jsonl"
    path.write_text(path.read_text() + json.dumps(runs[0] | dict(lr=0.5)) + "\n")
    pt, lopa = f"{rates['pt'][0]:g}", "{:g}, {:g}".format(*rates["lopa"])      # a method without heads shows one rate
    assert cells(compare.table(path), 0, 4)[:4] == [["pt", pt], ["lopa", lopa], ["lopa-blind", lopa], ["pt", "0.5"]]
    line = refused(capsys, *QUICK, "--methods", "pt,lora", "--out", tmp_path / "other", "--rates", chosen)
    assert f"--rates: {chosen} has no finished run of lora, but of pt, lopa" in line


def test_a_file_that_is_no_study_is_refused(tmp_path, capsys):
    about, before = '{"study": "compare"}', '{"stage": "before", "scored_on": "dev", "d_h": 1, "labels": 2}'
    for damaged in ("", "{", "5", "[" * 10_000, about, f"{about}\n[]", f"{before}\n{about}", f"{about}\n{before}\n{before}"):
        (tmp_path / "damaged").write_text(damaged)
        assert "damaged is damaged, or no runs.jsonl" in refused(capsys, "--table", tmp_path / "damaged")
    assert "nowhere" in refused(capsys, "--table", "nowhere")


def test_another_configuration_is_refused_by_name_and_so_are_two_at_once(tiny, tmp_path, capsys):
    study(tmp_path, "--methods pt --seeds 0 --rates default")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    flags = [*QUICK, "--methods", "pt", "--seeds", "0", "--rates", "default", "--out", tmp_path]
    assert "holds another study: dropout is 0.0 there and 0.5 here" in refused(capsys, *flags, "--dropout", 0.5)
    assert "study is compare there and ablate here" in refused(capsys, *QUICK, "--ablate", "--out", tmp_path)
    with compare.locked(tmp_path), compare.locked(tmp_path / "new"):
        for folder in (tmp_path, tmp_path / "new"):
            assert "is in use by another run" in refused(capsys, *flags[:-1], folder)
        (tmp_path / "new").rmdir()                                     # it was left there, though nothing is in it yet
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_method_that_is_added_to_METHODS_is_a_row_without_a_change(tiny, tmp_path, monkeypatch):
    class Mine(PromptTuning):
        """Z = 2 Z_S: for this test."""

    monkeypatch.setitem(METHODS, "mine", Mine)
    monkeypatch.setitem(train.CHOICES, "method", [*METHODS, "lora", "full"])
    _, table = study(tmp_path, "--methods mine,mine-blind,lora,pt --seeds 0 --rates default")
    assert cells(table, 0, 1)[:4] == [
        ["mine", "Z = 2 Z_S; user"], ["mine-blind", "mine without the text"],
        ["lora", "updates of q, k, v; server"], ["pt", "Z = Z_S for every input; user"]]


def test_a_rate_that_diverges_scores_0_and_is_not_tried_again(tiny, tmp_path, capsys, monkeypatch):
    def fit(config, model, problem, fit=train.fit):
        if config.lr > 0.05:
            raise FloatingPointError("the loss of step 3 is not finite: start again with a lower --lr")
        return fit(config, model, problem)

    monkeypatch.setattr(train, "fit", fit)
    runs, _ = study(tmp_path, "--methods pt --seeds 0")
    assert "  trial 3: pt, lr 0.09, seed 0, accuracy 0.000, the loss of step 3 is not finite\n" in capsys.readouterr().out
    assert runs[-1]["lr"] < 0.05 and study(tmp_path, "--methods pt --seeds 0")[0] == runs
    two = [dict(accuracy=0.5), dict(accuracy=0.0, diverged="loss is nan")]
    assert compare.summary(two) == "0.250 ± 0.354, 1 of 2 diverged"


def test_every_ablation_reads_the_same_texts_and_h_where_it_says(tiny, tmp_path, monkeypatch):
    prepared, fits = [], []
    monkeypatch.setattr(train, "prepare", lambda config, prepare=train.prepare: prepared.append(config) or prepare(config))
    monkeypatch.setattr(train, "fit", lambda config, model, problem: fits.append((config, problem)) or [
        dict(epoch=1, loss=1.0, accuracy=0.5, seconds=1.0)])
    _, table = study(tmp_path, "--ablate --seeds 0 --num-virtual-tokens 15")
    assert [config.encoder_blocks for config in prepared] == [0, 1, 2]
    assert {config.num_virtual_tokens for config in prepared} == {30}  # concat is twice as long
    assert [name for name, in cells(table, 0)] == list(compare.ABLATIONS)
    assert all(problem.encoder.num_blocks == config.encoder_blocks for config, problem in fits)


def test_the_changes_that_are_named_are_the_rows_and_one_that_changes_nothing_is_not_trained_again(tiny, tmp_path, fitted):
    flags, rows = "--seeds 0 --rank 1 --rates default --ablate", ["heads that start as released", "as it is", "rank 1"]
    for already in range(2):                                           # a rerun adds nothing
        compare.main([*QUICK, *flags.split(), *rows, "--out", str(tmp_path)])
        assert [config.head_std for config, _ in fitted] == [0.02, None]
    assert [name for name, in cells((tmp_path / "table.md").read_text(), 0)] == rows


@pytest.mark.parametrize("flags, message", [
    ("", "name a task: --task sst2 or mnli"),
    ("--task sst2 --methods lopa,lopa-deaf", "argument --methods: lopa-deaf is none of lopa, pt"),
    ("--task sst2 --seeds 0,", "argument --seeds: invalid seeds value: '0,'"),
    ("--task sst2 --lr 0.1", "--lr has no effect here"),
    ("--task sst2 --ablate --methods pt", "argument --methods: not allowed with argument --ablate"),
    ("--task sst2 --methods pt,dpt --init-text good", "a start as 4 tokens: it takes a word, at most 10 tokens and"),
    ("--task sst2 --max-train 4", "0 of 4 rows cannot be held out"),
    ("--task sst2 --tune-encoder --methods pt", "--tune-encoder has no effect on pt: name others"),
    ("--task sst2 --tune-encoder --methods lopa-constant", "--tune-encoder has no effect on lopa-constant"),
    ("--task sst2 --methods pt,pt-shuffled", "the control has no effect on pt-shuffled: name others"),
])
def test_bad_flags_get_one_clear_line(tiny, capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *flags.split()).startswith(f"compare: error: {message}")
    assert not list(tmp_path.glob("**/*.*"))                           # nothing was written


def test_torchrun_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "start it without torchrun" in refused(capsys, *QUICK, "--out", tmp_path)


def test_ctrl_c_ends_with_one_line_and_the_folder_says_what_is_in_it(tiny, capsys, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "get_nb_trainable_parameters", interrupt)
    with pytest.raises(SystemExit, match="130"):
        compare.main([*QUICK, "--rank", "2"])
    assert "the same command goes on after the last" in capsys.readouterr().err
    assert (tmp_path / "runs/sst2-compare-tiny-epochs-1-rank-2-max_train-200/runs.jsonl").exists()


def test_the_benchmark_finds_the_losses_and_weights_of_the_naive_way_equal():
    benchmark.same_losses()


def test_every_picture_can_be_drawn_from_runs(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    from experiments import figures

    study(tmp_path / "sst2-compare-tiny", "--methods pt,lora,lopa,lopa-blind --seeds 0,1 --rates default")
    train.main([*QUICK, "--out", str(tmp_path / "sst2-lopa-tiny-seed0")])
    figures.main(tmp_path, tmp_path)
    drawn, kept = ({path.name for path in folder.glob("*.svg")} for folder in (tmp_path, ROOT / "assets"))
    assert drawn == kept


def test_the_blind_control_of_a_tuned_encoder_moves_the_encoder_and_never_shows_the_model_a_text(tiny, monkeypatch):
    config = train.Config("sst2", max_train=40, epochs=1, tune_encoder=True, quiet=True)
    problem = train.prepare(config)
    model, shown = train.build(config, problem), []
    evidence.blind_tuned(model, problem)
    before = [p.clone() for p in model.encoder.parameters() if p.requires_grad]
    monkeypatch.setattr(model.gpt, "embed", lambda tokens: shown.append(tokens) or type(model.gpt).embed(model.gpt, tokens))
    train.fit(config, model, problem)
    ending = evidence.template_ending(problem.task, problem.tokenizer)
    assert shown and all((tokens == ending).all() for tokens in shown)
    assert not any(torch.equal(p, old) for p, old in zip((p for p in model.encoder.parameters() if p.requires_grad), before))
