"""The tables of README.md: every method, or LoPA with one thing changed at a time.

    python -m experiments.compare --task sst2                           every method, five seeds (12 minutes)
    python -m experiments.compare --task sst2 --ablate                  LoPA's ablations (15 minutes)
    python -m experiments.compare --task sst2 --ablate "rank 1" "as it is"     some of them
    python -m experiments.compare --task rte --methods pt,lopa,lopa-blind --seeds 0,1
    python -m experiments.any_model compare FOLDER --task sst2 ...      the same on a model of Transformers
    python -m experiments.compare --table experiments/results/NAME/runs.jsonl

For each row of the table three learning rates, a third of train.py's, its and three times it, are tried on a
fifth of the training rows, held out. The best one then trains on all of them, once for each seed, and the
last epoch is scored on dev, which nothing was chosen on. A control, lopa-blind say, is LoPA at its rates with
something taken away. Where three more runs are too dear, --rates-from takes the rates that another study of
the same methods chose. Every finished run is at once a line of runs.jsonl, and the same command goes on where
it was. The other flags mean what they mean to train.py.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch

import data
import train
from lopa import get_nb_trainable_parameters

# What each method trains, and with whom it lives when one model serves many users.
TRAINED = {"pt": "Z_S; user", "dpt": "A, B; user", "bpt": "A, B; user", "residual": "P and an MLP; user",
           "dept": "P and offsets by position; user", "adept": "P and offsets by token; user",
           "idpg": "one head on h; user", "lopa": "Z_S and two heads on h; user",
           "lora": "updates of q, k, v; server", "full": "every weight; server",
           "lopa-shuffled": "LoPA with another text's h", "lopa-constant": "LoPA with the same h for all",
           "lopa-blind": "LoPA without the text"}

# What --ablate changes about LoPA.
ABLATIONS = {
    "as it is": {}, "rank 1": dict(rank=1), "rank 2": dict(rank=2), "rank 8": dict(rank=8),
    "5 virtual tokens": dict(num_virtual_tokens=5), "25 virtual tokens": dict(num_virtual_tokens=25),
    "concat instead of the gate": dict(fusion="concat"), "add instead of the gate": dict(fusion="add"),
    "max instead of the gate": dict(fusion="max"), "the encoder tuned too": dict(tune_encoder=True),
    "heads that start as released": dict(head_std=0.02), "a start of N(0, 1) as released": dict(init_std=1.0),
    "h after 1 block": dict(encoder_blocks=1), "h after 2 blocks": dict(encoder_blocks=2)}

# More to change, for models deeper than the tiny GPT: in the table when --ablate names it.
ON_REQUEST = {f"h after {blocks} blocks": dict(encoder_blocks=blocks) for blocks in (0, 10, 20)} | {
    "heads that start at random": dict(head_std=0.05)}

FACTORS = (1, 1 / 3, 3)                  # of train.py's learning rates, to try; of equals the first wins

# What a line of a run has, at least, and the line before all runs.
RUN_KEYS = {"row", "method", "lr", "head_lr", "seed", "accuracy", "seconds", "trainable_parameters"}
BEFORE_KEYS = {"scored_on", "d_h", "labels"}

VARIED = ("method", "control", "lr", "head_lr", "seed")      # from run to run, besides ABLATIONS

# Flags of train.py that would change nothing here, and why.
REFUSED = {
    "method": "name some with --methods", "lr": "three are tried", "head_lr": "three are tried",
    "seed": "name some with --seeds", "holdout": "a fifth is held out to choose a learning rate",
    "tune_encoder": "--ablate has it", "encoder_lr": "--ablate alone tunes encoders",
    "control": "name lopa-blind, say, with --methods",
    "save_every": "every finished run is saved", "resume": "the same command goes on where it was",
    "predict": "train.py does", "adapter": "train.py does", "compare": "leave it out"}


def study(args: argparse.Namespace, kind: str) -> str:
    """Make the runs that are not in runs.jsonl yet; returns the table, which is in table.md too.

    kind: what the study is called in the file's first line and in the folder's name.
    """
    say = (lambda text: None) if args.quiet else partial(print, flush=True)
    given = {f.name: vars(args)[f.name] for f in fields(train.Config) if f.name in args}
    changes = {name: (ABLATIONS | ON_REQUEST)[name] for name in args.ablate or ABLATIONS}
    if args.ablate is None:
        changes = {name: dict(zip(("method", "control"), name.split("-"))) for name in args.methods}
    base = train.Config(**given)
    configs = {name: train.Config(**given | change) for name, change in changes.items()}
    rates = chosen_rates(args.rates_from, configs) if args.rates_from else {}
    path = default_folder(base, kind) / "runs.jsonl"
    train.require_writable(path.parent)                                # before the work, not after it
    longest = max(c.num_virtual_tokens * (2 if c.fusion == "concat" else 1) for c in configs.values())
    problems = {}                        # one for each place where h is read, with one room for all texts
    for blocks in [base.encoder_blocks, *(config.encoder_blocks for config in configs.values())]:
        if blocks not in problems:
            problems[blocks] = train.prepare(replace(base, num_virtual_tokens=longest, encoder_blocks=blocks,
                                                     fusion="gate", quiet=bool(problems) or base.quiet))
    problem = problems[base.encoder_blocks]
    if (num_rows := len(problem.train)) < 5 and not rates:
        raise ValueError(f"{num_rows} training rows are too few to hold out a fifth of them: 5 at least")
    for config in configs.values():
        problem.controlled(config.control)                             # ValueError, if it cannot be
    about = dict(study=kind) | train.all_that_decides(base, problem)
    lines: list[dict] = []

    def finished(row: str, stage: str, problem: train.Problem, config: train.Config, seed: int) -> dict:
        """The line of a run, which is made if it is not there."""
        config = replace(config, seed=seed, quiet=True)
        wanted = dict(stage=stage, **config.deciding()) | dict(data=problem.source)
        if same := [line for line in lines[1:] if all(line.get(name) == wanted[name] for name in wanted)]:
            if stage == "seed" and row not in [line["row"] for line in same]:
                add(same[0] | dict(row=row))                           # one run, two rows of the table
            return same[0]
        model, problem = train.build(config, problem), problem.controlled(config.control, seed)
        one_row = problem.test[torch.tensor([0], device=config.device)]    # only the last epoch is scored
        try:
            *_, last = train.fit(config, model, replace(problem, tests={problem.test_name: one_row}))
            last["accuracy"] = problem.accuracy(train.predict(model, problem.test), problem.test)
        except FloatingPointError as error:
            last = dict(accuracy=0.0, seconds=0.0, diverged=str(error).partition(":")[0])
        trainable, _ = get_nb_trainable_parameters(model)
        add(dict(row=row) | wanted | last | dict(trainable_parameters=trainable))
        say(f"  {stage} {len(lines) - 2}: {row}, lr {config.lr:g}, seed {seed}, "
            f"accuracy {last['accuracy']:.3f}, " + last.get("diverged", f"{last['seconds']:.1f} s"))
        return lines[-1]

    def add(line: dict) -> None:
        lines.append(line)
        data.save_file(path, lines)

    with train.locked(path.parent):      # two of them would write over each other's lines
        lines += earlier_lines(path, {name: value for name, value in about.items() if name not in VARIED})
        if len(lines) == 1:
            add(dict(stage="before", scored_on=problem.test_name, d_h=len(problem.encoder.mean),
                     labels=len(problem.label_ids)) | train.baselines(base, problem))
        for name, config in configs.items():
            tried = replace(config, control=None)                      # a control has LoPA's rates
            row = config.method if config.control else name
            whole, best = problems[config.encoder_blocks], rates.get(name)
            if best is None:
                held_out = whole.hold_out(num_rows // 5)
                best = max((scaled(tried, factor) for factor in FACTORS), key=lambda rate: finished(
                    row, "trial", held_out, replace(tried, **rate), seed=0)["accuracy"])
            for seed in args.seeds:
                finished(name, "seed", whole, replace(config, **best), seed)
        result = table(path)
        with data.whole(path.with_name("table.md"), "the table") as file:
            file.write(result.encode())
    say(f"\n{args.task}, {problem.source}, {len(args.seeds)} seeds; wrote {path} and table.md:\n")
    return result


def scaled(config: train.Config, factor: float) -> dict[str, float]:
    """`factor` times the learning rates of a run, to one digit."""
    return {name: float(f"{factor * getattr(config, name):.1g}") for name in ("lr", "head_lr")}


def chosen_rates(source: str, configs: dict[str, train.Config]) -> dict[str, dict[str, float]]:
    """The learning rates with which another study ended, of each row. ValueError if it has not got there."""
    _, _, *lines = read_lines(Path(source))
    rates = {line["row"]: dict(lr=line["lr"], head_lr=line["head_lr"])
             for line in lines if line["stage"] == "seed"}
    rows = {name: config.method if config.control else name for name, config in configs.items()}
    if missing := [row for row in rows.values() if row not in rates]:
        raise ValueError(f"--rates-from: {source} has no finished run of {', '.join(missing)}, but of "
                         f"{', '.join(rates) or 'nothing'}")
    return {name: rates[row] for name, row in rows.items()}


def table(path: Path) -> str:
    """The table of a study's runs.jsonl, in Markdown."""
    about, before, *lines = read_lines(path)
    ablate = about["study"] == "ablate"
    groups: dict[tuple, list[dict]] = {}                               # the seeds of a row at one rate
    for line in lines:
        if line["stage"] == "seed":
            rates = f"{line['lr']:g}" + f", {line['head_lr']:g}" * (line["method"] in ("lopa", "idpg"))
            groups.setdefault((line["row"], rates), []).append(line)
    rows = [[name, TRAINED.get(name, ""), f"{runs[0]['trainable_parameters']:,}", summary(runs), rates,
             f"{statistics.mean(run['seconds'] for run in runs):.1f}"]
            for (name, rates), runs in groups.items()]
    header = ["LoPA" if ablate else "method", "what is trained; it lives with", "trainable",
              f"{before['scored_on']} accuracy", "learning rate", "seconds"]
    if not ablate:
        d_h, H, labels = before["d_h"], about["hidden_dim"], before["labels"]
        sizes = dict(majority=0, zero_shot=0, linear_probe=(d_h + 1) * labels,
                     hidden_layer_probe=(d_h + 1) * H + (H + 1) * labels)
        rows += [[name.replace("_", " "), "", f"{size:,}", f"{before[name]:.3f}", "", ""]
                 for name, size in sizes.items() if name in before]
    rows = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(row[:1] + row[2:] if ablate else row)} |\n" for row in rows)


def summary(runs: list[dict]) -> str:
    """Mean and deviation over the seeds. A run that diverged has accuracy 0, and is counted."""
    scores, diverged = [run["accuracy"] for run in runs], sum("diverged" in run for run in runs)
    spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.3f}{spread}" + f", {diverged} of {len(runs)} diverged" * bool(diverged)


def default_folder(base: train.Config, kind: str) -> Path:
    """--out, or runs/TASK-KIND-MODEL followed by what is not as usual."""
    rest = base.folder.name.removeprefix(f"{base.task}-{base.method}-").replace(f"-seed{base.seed}", "", 1)
    return Path(base.out or f"runs/{base.task}-{kind}-{rest}")


def earlier_lines(path: Path, about: dict) -> list[dict]:
    """The lines that the file holds, first what they are about; ValueError if that is something else."""
    if not path.exists():
        return [about]
    lines = read_lines(path)
    train.require_same_run(path.parent, lines[0], about)
    return lines


def read_lines(path: Path) -> list[dict]:
    """The lines of a study's runs.jsonl: what it is about, what was before, each run. ValueError: it is none."""
    try:
        about, before, *lines = [dict(json.loads(line)) for line in path.read_text().splitlines()]
        if "study" in about and before["stage"] == "before" and BEFORE_KEYS <= before.keys() and all(
                line["stage"] in ("trial", "seed") and RUN_KEYS <= line.keys() for line in lines):
            return [about, before, *lines]
    except (ValueError, TypeError, KeyError, RecursionError):          # too few lines, or no JSON objects
        pass
    raise ValueError(f"{path} is damaged, or no runs.jsonl: delete it, or name another")


class Refuse(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        raise argparse.ArgumentError(self, f"has no effect here: {REFUSED[self.dest]}")


def listed(kind: type) -> Callable[[str], list]:
    """Reads "A,B" as methods (str) or seeds (int), none of them twice."""
    def parse(text: str) -> list:
        names = text.split(",")
        try:
            values = [kind(name) for name in names]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is not a list of whole numbers") from None
        if unknown := [name for name in names if kind is str and name not in TRAINED]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(TRAINED)}")
        if twice := [value for value in values if values.count(value) > 1]:
            raise argparse.ArgumentTypeError(f"{twice[0]} is named twice")
        return values
    return parse


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "compare", "python -m experiments.compare --task TASK [--ablate] [flags]", __doc__, allow_abbrev=False,
        parents=[train.build_parser()], conflict_handler="resolve",    # its flags, but for these:
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = train.complain                                      # one line, as train.py's
    for name in REFUSED:
        parser.add_argument("--" + name.replace("_", "-"), action=Refuse, nargs="?",
                            default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--ablate", nargs="*", metavar="CHANGE", choices=[*ABLATIONS, *ON_REQUEST],
                        help="change one thing about LoPA at a time (default: " + "; ".join(ABLATIONS) +
                        ". On request: " + "; ".join(ON_REQUEST) + ")")
    parser.add_argument("--methods", type=listed(str), metavar="A,B", help="these alone (default: all)")
    parser.add_argument("--seeds", type=listed(int), default=[0, 1, 2, 3, 4], metavar="A,B",
                        help="default: 0,1,2,3,4")
    parser.add_argument("--rates-from", metavar="FILE", help="try no learning rates, take those that another "
                        "study's runs.jsonl ended with")
    parser.add_argument("--table", metavar="FILE", help="print the table of a runs.jsonl, and train nothing")
    parser.add_argument("--quiet", action="store_true", help="print the table alone")
    args = parser.parse_args(argv)
    if args.table:
        return args
    if args.task is None:
        parser.error(f"name a task: --task {' or '.join(data.TASKS)}")
    if args.ablate is not None and args.methods:
        parser.error("argument --methods: --ablate changes lopa alone")
    if args.ablate is not None and args.fusion != "gate":
        parser.error(f"argument --fusion: --ablate tries {args.fusion} too, and LoPA has the gate")
    args.methods = args.methods or list(TRAINED)
    for seed in args.seeds:
        train.check_option("seed", seed, (int,))
    return args


def main(argv: list[str] | None = None, kind: str | None = None) -> None:
    """The command line. Exits with 2 and one line for bad input, 130 for Ctrl-C."""
    try:
        args = parse_args(argv)
        if "LOCAL_RANK" in os.environ:
            raise ValueError("it trains many small models one by one: start it without torchrun")
        kind = kind or ("compare" if args.ablate is None else "ablate")
        print(table(Path(args.table)) if args.table else study(args, kind), end="")
    except (ValueError, OSError) as error:
        print(f"compare: error: {data.short(error, 300)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("compare: interrupted; the same command goes on after the last finished run", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
