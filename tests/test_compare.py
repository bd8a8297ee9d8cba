"""experiments/compare.py through its command line; experiments/figures.py, where matplotlib is installed."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from experiments import compare
from model import InstanceEncoder

pytestmark = pytest.mark.slow            # each trains a study, if a small one
ROOT = Path(train.__file__).parent
QUICK = ["--task", "sst2", "--max-train", "200", "--epochs", "1"]


def refused(capsys, *argv):
    """Run the command line, expect exit code 2, and return the one line it printed about it."""
    with pytest.raises(SystemExit) as stop:
        compare.main([str(a) for a in argv])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "Traceback" not in message
    return message.splitlines()[-1]


def runs_in(folder):
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    return [line for line in lines[1:] if line["stage"] != "before"]


def cells_without_seconds(table):
    return [row.split("|")[:-2] for row in table.splitlines()]


@pytest.fixture
def fitted(monkeypatch):
    """The (config, problem) of every training that really takes place."""
    seen = []

    def fit(config, model, problem, fit=train.fit):
        if isinstance(model, train.Adapted):                           # not the probe, which is trained too
            seen.append((config, problem))
        return fit(config, model, problem)

    monkeypatch.setattr(train, "fit", fit)
    return seen


def test_train_pys_learning_rates_are_among_those_tried_and_every_method_can_be():
    assert min(compare.FACTORS) < 1 < max(compare.FACTORS) and 1 in compare.FACTORS
    controls = {f"lopa-{control}" for control in train.CONTROLS}
    assert compare.TRAINED.keys() == train.LEARNING_RATES.keys() | controls


def test_rates_are_chosen_on_training_rows_every_seed_is_scored_and_a_rerun_continues(tiny, tmp_path, capsys,
                                                                                      fitted):
    flags = [*QUICK, "--methods", "pt,lopa", "--seeds", "3,4", "--out", str(tmp_path)]
    compare.main(flags)
    table = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    runs = runs_in(tmp_path)
    expected = [("trial", 0)] * 3 + [("seed", 3), ("seed", 4)]
    assert [(run["method"], run["stage"], run["seed"]) for run in runs] == [
        (method, stage, seed) for method in ("pt", "lopa") for stage, seed in expected]
    for method, row in zip(("pt", "lopa"), table.splitlines()[2:]):
        trials = [run for run in runs if run["method"] == method and run["stage"] == "trial"]
        scored = [run for run in runs if run["method"] == method and run["stage"] == "seed"]
        best = max(trials, key=lambda run: run["accuracy"])["lr"]
        usual = train.Config("sst2", method)
        assert [run["lr"] for run in trials] == pytest.approx([usual.lr, usual.lr / 3, 3 * usual.lr], rel=0.15)
        if method == "lopa":
            heads = [usual.head_lr, usual.head_lr / 3, 3 * usual.head_lr]
            assert [run["head_lr"] for run in trials] == pytest.approx(heads, rel=0.15)
        assert {run["lr"] for run in scored} == {best}
        assert f"{sum(run['accuracy'] for run in scored) / 2:.3f} ± " in row and f"| {best:g}" in row
    for run, (config, problem) in zip(runs, fitted):                   # trials see 160 rows, score 40 others
        names = {"trial": (160, "held-out training rows"), "seed": (200, "dev")}
        assert (len(problem.train), problem.test_name) == names[run["stage"]]

    assert compare.table(tmp_path / "runs.jsonl") == table             # the lines are enough to make it
    lines = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(lines[:-1]))          # as if interrupted in the last run
    del fitted[:]
    compare.main([*flags, "--quiet"])
    assert len(fitted) == 1
    again = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out == again                            # --quiet: nothing else
    assert cells_without_seconds(again) == cells_without_seconds(table)


def test_rates_can_come_from_another_study_and_then_none_is_tried(tiny, tmp_path, capsys, fitted):
    chosen = str(tmp_path / "first" / "runs.jsonl")
    compare.main([*QUICK, "--methods", "pt,lopa", "--seeds", "0", "--out", str(tmp_path / "first")])
    rates = {run["method"]: (run["lr"], run["head_lr"])
             for run in runs_in(tmp_path / "first") if run["stage"] == "seed"}
    del fitted[:]
    flags = ["--methods", "pt,lopa", "--seeds", "1,2", "--rates-from", chosen, "--max-train", "4"]     # too few
    compare.main([*QUICK, *flags, "--out", str(tmp_path / "second")])                                  # to try any
    assert [(config.method, config.seed) for config, _ in fitted] == [("pt", 1), ("pt", 2), ("lopa", 1), ("lopa", 2)]
    for config, problem in fitted:
        assert (config.lr, config.head_lr) == rates[config.method]
        assert len(problem.train) == 4                                 # nothing is held out
    table = (tmp_path / "second" / "table.md").read_text()             # a row of two rates is two rows
    path = tmp_path / "second" / "runs.jsonl"
    last = path.read_text().splitlines()[-1]
    path.write_text(path.read_text() + json.dumps(json.loads(last) | dict(lr=0.5)) + "\n")
    (pt, _), (lr, head_lr) = rates["pt"], rates["lopa"]
    assert [row.split(" | ")[:1] + row.split(" | ")[4:5] for row in compare.table(path).splitlines()[2:5]] == [
        ["| pt", f"{pt:g}"], ["| lopa", f"{lr:g}, {head_lr:g}"], ["| lopa", f"0.5, {head_lr:g}"]]
    assert compare.table(path).splitlines()[3] == table.splitlines()[3]
    del fitted[:]
    compare.main([*QUICK, *flags[2:], "--methods", "lopa-blind", "--out", str(tmp_path / "blind")])    # has LoPA's
    assert {(config.lr, config.head_lr) for config, _ in fitted} == {rates["lopa"]} and len(fitted) == 2
    capsys.readouterr()
    one = [*QUICK, "--methods", "pt,lora", "--out", str(tmp_path / "other"), "--rates-from"]
    assert f"--rates-from: {chosen} has no finished run of lora, but of pt, lopa" in refused(capsys, *one, chosen)
    assert "nowhere" in refused(capsys, *one, "nowhere")
    about, before, *runs = Path(chosen).read_text().splitlines()
    for damaged in ("{", "[]", '{"study": 1}\n{}', "", '"study"', "5", '{"study": 1}\n["stage"]', about, "[" * 10_000,
                    f"{about}\n{before}\n{runs[0].replace('row', 'raw')}", f"{about}\n{runs[0]}\n{before}"):
        (tmp_path / "damaged").write_text(damaged)
        assert "damaged is damaged" in refused(capsys, "--table", tmp_path / "damaged")
        assert "damaged is damaged, or no runs.jsonl" in refused(capsys, *one, str(tmp_path / "damaged"))
    assert not (tmp_path / "other").exists()


def test_a_seed_of_the_table_is_the_run_that_train_py_makes(tiny, tmp_path):
    compare.main([*QUICK, "--methods", "pt", "--seeds", "1", "--out", str(tmp_path / "study")])
    *_, run = runs_in(tmp_path / "study")
    flags = ["--method", "pt", "--seed", "1", "--lr", str(run["lr"]), "--out", str(tmp_path / "run")]
    train.main([*QUICK, *flags])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["accuracy"] == run["accuracy"]
    assert result["trainable_parameters"] == run["trainable_parameters"]


def test_another_configuration_is_refused_by_name_and_nothing_is_overwritten(tiny, tmp_path, capsys):
    flags = [*QUICK, "--methods", "pt", "--seeds", "0", "--out", tmp_path]
    compare.main([str(flag) for flag in flags])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for change, message in (("--max-train 100", "max_train is 200 there and 100 here"),
                            ("--rank 2", "rank is 4 there and 2 here"),
                            ("--dropout 0.5", "dropout is 0.0 there and 0.5 here")):
        assert f"holds another run: {message}" in refused(capsys, *flags, *change.split())
    assert "study is compare there and ablate here" in refused(capsys, *QUICK, "--ablate", "--out", tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "runs.jsonl").write_text("{")
    assert "runs.jsonl is damaged" in refused(capsys, *flags)


def test_two_at_once_in_a_folder_are_refused_and_so_are_texts_without_an_ending(tiny, tmp_path, capsys, monkeypatch):
    flags = [*QUICK, "--methods", "pt,lopa-blind", "--seeds", "0", "--out", tmp_path / "new"]
    with train.locked(tmp_path / "new"):
        assert "new is in use by another run" in refused(capsys, *flags)
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setattr(train, "baselines", None)                      # it is not even begun
    assert "nothing can be saved in" in refused(capsys, *flags[:-1], tmp_path / "file" / "new")
    monkeypatch.setattr(train, "prepare", lambda config, prepare=train.prepare: dataclasses.replace(
        prepare(config), ending=torch.zeros(0, dtype=torch.long)))
    assert "control blind: the task has nothing after its text" in refused(capsys, *flags)


def test_a_change_that_changes_nothing_has_its_row_and_is_not_trained_again(tiny, tmp_path, fitted):
    flags = [*QUICK, "--seeds", "0", "--rank", "1", "--out", str(tmp_path), "--ablate", "as it is", "rank 1"]
    for already in range(2):                                           # a rerun adds nothing
        compare.main(flags)
        assert [run["row"] for run in runs_in(tmp_path)] == ["as it is"] * 4 + ["rank 1"] and len(fitted) == 4
    assert [row.split("|")[1].strip() for row in (tmp_path / "table.md").read_text().splitlines()[2:]] == [
        "as it is", "rank 1"]


def test_a_learning_rate_that_diverges_scores_0_is_said_and_is_not_tried_again(tiny, tmp_path, capsys,
                                                                              monkeypatch, fitted):
    monkeypatch.setattr(compare, "FACTORS", (1e25, 1, 1e24))
    flags = [*QUICK, "--methods", "pt", "--seeds", "0", "--out", str(tmp_path)]
    compare.main(flags)
    assert [line for line in capsys.readouterr().out.splitlines() if "trial 1" in line] == [
        "  trial 1: pt, lr 3e+23, seed 0, accuracy 0.000, " + runs_in(tmp_path)[0]["diverged"]]
    assert "not finite" in runs_in(tmp_path)[0]["diverged"] or "loss is" in runs_in(tmp_path)[0]["diverged"]
    assert runs_in(tmp_path)[-1]["lr"] == 0.03
    del fitted[:]
    compare.main(flags)
    assert not fitted
    two = [dict(accuracy=0.5), dict(accuracy=0.0, diverged="loss is nan")]
    assert compare.summary(two) == "0.250 ± 0.354, 1 of 2 diverged"


def test_every_ablation_reads_the_same_texts_with_room_for_the_longest_prompt(tiny, tmp_path, monkeypatch):
    prepared, fits = [], []
    monkeypatch.setattr(train, "prepare", lambda config, prepare=train.prepare: prepared.append(config)
                        or prepare(config))
    monkeypatch.setattr(train, "fit", lambda config, model, problem: fits.append((config, model, problem))
                        or [dict(epoch=1, loss=1.0, accuracy=0.5, seconds=1.0)])
    compare.main([*QUICK, "--ablate", "--seeds", "0,1", "--out", str(tmp_path / "ten")])
    assert [config.encoder_blocks for config in prepared] == [0, 1, 2]
    assert {train.text_room(config, tiny[0], InstanceEncoder(tiny[0])) for config in prepared} == {128 - 25}
    table = (tmp_path / "ten" / "table.md").read_text().splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in table[2:]] == list(compare.ABLATIONS)
    fits = [fit for fit in fits if isinstance(fit[1], train.Adapted)]  # without the probe
    assert len(fits) == len(compare.ABLATIONS) * 5
    for config, _, problem in fits:                                    # h is read where the row says
        assert problem.encoder.num_blocks == config.encoder_blocks


def test_changes_that_are_named_are_the_only_rows_in_their_order(tiny, tmp_path, monkeypatch):
    fits = []
    monkeypatch.setattr(train, "fit", lambda config, model, problem: fits.append((config, model, problem))
                        or [dict(epoch=1, loss=1.0, accuracy=0.5, seconds=1.0)])
    rows = ["h after 1 block", "heads that start at random", "as it is"]
    compare.main([*QUICK, "--encoder-blocks", "2", "--ablate", *rows, "--seeds", "0", "--out", str(tmp_path)])
    table = (tmp_path / "table.md").read_text().splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in table[2:]] == rows
    fits = [config for config, model, _ in fits if isinstance(model, train.Adapted)]
    assert [config.encoder_blocks for config in fits] == [1] * 4 + [2] * 8
    assert [config.head_std for config in fits] == [None] * 4 + [0.05] * 4 + [None] * 4


def test_a_control_is_lopas_run_with_something_taken_away_seed_by_seed(tiny, tmp_path, fitted):
    compare.main([*QUICK, "--methods", "lopa,lopa-shuffled,lopa-blind", "--seeds", "0,1", "--out", str(tmp_path)])
    own, (_, one), (_, other), (_, blind), _ = fitted[3], *fitted[5:]
    assert [config.control for config, _ in fitted] == [None] * 5 + ["shuffled"] * 2 + ["blind"] * 2
    assert not torch.equal(one.train.instances, other.train.instances)                 # by the seed
    sorted_h = [problem.train.instances.sort(dim=0).values for problem in (one, own[1])]
    assert torch.equal(*sorted_h) and blind.train.tokens.shape[1] < own[1].train.tokens.shape[1]
    assert len({run["lr"] for run in runs_in(tmp_path) if run["stage"] == "seed"}) == 1


def test_h_elsewhere_and_longer_prompts_are_prepared_for(tiny, tmp_path, monkeypatch):
    prepared = []
    monkeypatch.setattr(train, "prepare", lambda config, prepare=train.prepare: prepared.append(config)
                        or prepare(config))
    monkeypatch.setattr(train, "fit", lambda *_: [dict(epoch=1, loss=1.0, accuracy=0.5, seconds=1.0)])
    longer = ["--num-virtual-tokens", "15", "--seeds", "0", "--out", str(tmp_path / "fifteen")]
    compare.main([*QUICK, "--ablate", *longer])
    assert prepared[-1].num_virtual_tokens == 30                       # concat is twice as long


@pytest.mark.parametrize("flags, message", [
    ("", "name a task: --task sst2 or mnli"),
    ("--task sst2 --methods lopa,lora2", "argument --methods: lora2 is none of pt, dpt"),
    ("--task sst2 --methods pt,lopa,pt", "argument --methods: pt is named twice"),
    ("--task sst2 --seeds a", "argument --seeds: a is not a list of whole numbers"),
    ("--task sst2 --seeds 0,", "argument --seeds: 0, is not a list of whole numbers"),
    ("--task sst2 --seeds 0,-1", "--seed: -1 is not between 0 and 2147483648"),
    ("--task sst2 --seeds 0,0", "argument --seeds: 0 is named twice"),
    ("--task sst2 --lr 0.1", "argument --lr: has no effect here"),
    ("--task sst2 --seed 0", "argument --seed: has no effect here"),
    ("--task sst2 --method pt", "argument --method: has no effect here"),
    ("--task sst2 --head-lr 1", "argument --head-lr: has no effect here"),
    ("--task sst2 --encoder-lr 1", "argument --encoder-lr: has no effect here"),
    ("--task sst2 --resume runs/x", "argument --resume: has no effect here"),
    ("--task sst2 --predict x --adapter y", "argument --predict: has no effect here"),
    ("--task sst2 --holdout 5", "argument --holdout: has no effect here"),
    ("--task sst2 --save-every 5", "argument --save-every: has no effect here"),
    ("--task sst2 --tune-encoder", "argument --tune-encoder: has no effect here"),
    ("--task sst2 --control blind", "argument --control: has no effect here"),
    ("--task sst2 --compare", "argument --compare: has no effect here"),
    ("--task sst2 --ablate --methods pt", "argument --methods: --ablate changes lopa alone"),
    ("--task sst2 --ablate --fusion concat", "argument --fusion: --ablate tries concat too"),
    ("--task sst2 --methods pt,dpt --init-text good", "--init-text has no effect with --method dpt: leave it out"),
    ("--task sst2 --ablate rank", "argument --ablate: invalid choice: 'rank'"),
    ("--task sst2 --epochs 0", "--epochs: 0 is not between 1 and 1000000"),
    ("--task sst2 --dropout 2", "--dropout: 2.0 is not between 0 and 0.99"),
    ("--task sst2 --max-train 4", "4 training rows are too few to hold out a fifth of them: 5 at least"),
    ("--task sst2 --num-virtual-tokens 64 --ablate", "128 prompt tokens leave no room for text"),
    ("--task sst2 --data nowhere", "nowhere/SST-2/train.tsv not found"),
])
def test_bad_flags_get_one_clear_line(tiny, capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert f"compare: error: {message}" in refused(capsys, *flags.split())
    assert not list(tmp_path.iterdir())                                # nothing was written


def test_torchrun_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "start it without torchrun" in refused(capsys, *QUICK)


def test_ctrl_c_ends_with_one_line(tiny, capsys, tmp_path, monkeypatch):
    def fit(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(SystemExit) as stop:
        compare.main([*QUICK, "--out", str(tmp_path)])
    assert stop.value.code == 130
    assert "the same command goes on after the last finished run" in capsys.readouterr().err


def test_a_study_has_a_folder_of_its_own_that_says_what_is_in_it():
    def folder(**changes):
        return str(compare.default_folder(train.Config("sst2", **changes), "compare"))

    assert folder() == "runs/sst2-compare-tiny"
    assert folder(rank=2, data="glue/data") == "runs/sst2-compare-tiny-data-data-rank-2"
    assert folder(out="here") == "here"


def test_the_help_names_the_flags_that_count_and_no_others():
    command = [sys.executable, "-m", "experiments.compare", "--help"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    flags = set(re.findall(r"^ +(--[\w-]+)", printed, flags=re.MULTILINE))
    assert {"--task", "--ablate", "--methods", "--seeds", "--rank", "--model", "--cache"} <= flags
    assert not flags & {"--" + name.replace("_", "-") for name in compare.REFUSED}


def test_the_benchmark_finds_the_losses_and_weights_of_the_naive_way_equal(capsys):
    from experiments import benchmark

    benchmark.same_losses()
    assert "mean losses differ by" in capsys.readouterr().out


def test_every_picture_can_be_drawn_from_runs(tiny, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from experiments import figures

    runs = tmp_path / "runs"
    study = ["--methods", "pt,lora,lopa", "--seeds", "0,1", "--out", str(runs / "sst2-compare-tiny")]
    compare.main([*QUICK, *study])
    for method in ("pt", "lopa"):
        train.main([*QUICK, "--method", method, "--out", str(runs / f"sst2-{method}-tiny-seed0")])
    figures.main(runs, tmp_path)
    drawn, kept = ({path.name for path in folder.glob("*.svg")} for folder in (tmp_path, ROOT / "assets"))
    assert drawn == kept
