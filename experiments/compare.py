"""The tables of README.md: every method, or LoPA with one thing changed at a time.

    python -m experiments.compare --task sst2                           every method, five seeds (12 minutes)
    python -m experiments.compare --task sst2 --ablate                  LoPA's ablations (15 minutes)
    python -m experiments.compare --task rte --methods pt,lopa --seeds 0,1

For each row of the table three learning rates are tried on a fifth of the training rows, held out. The best
one then trains on all of them, once for each seed, and the last epoch is scored on dev, which nothing was
chosen on. Every finished run is at once a line of runs.jsonl, and the same command goes on where it was. The
other flags mean what they mean to train.py.
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

import data
import train
from lopa import get_nb_trainable_parameters

# Learning rates to try; the middle one is train.py's default.
LEARNING_RATES = {
    "lopa": (1e-3, 3e-3, 1e-2), "idpg": (3e-3, 1e-2, 3e-2), "residual": (3e-3, 1e-2, 3e-2),
    "pt": (1e-1, 3e-1, 1.0), "dpt": (1e-2, 3e-2, 1e-1), "bpt": (3e-3, 1e-2, 3e-2), "dept": (1e-2, 3e-2, 1e-1),
    "adept": (3e-3, 1e-2, 3e-2), "lora": (1e-3, 3e-3, 1e-2), "full": (3e-4, 1e-3, 3e-3)}

# What each method trains, and with whom it lives when one model serves many users.
TRAINED = {"pt": "Z_S; user", "dpt": "A, B; user", "bpt": "A, B; user", "residual": "P and an MLP; user",
           "dept": "P and offsets by position; user", "adept": "P and offsets by token; user",
           "idpg": "one head on h; user", "lopa": "Z_S and two heads on h; user",
           "lora": "updates of q, k, v; server", "full": "every weight; server"}

# What --ablate changes about LoPA.
ABLATIONS = {
    "as it is": {}, "rank 1": dict(rank=1), "rank 2": dict(rank=2), "rank 8": dict(rank=8),
    "5 virtual tokens": dict(num_virtual_tokens=5), "25 virtual tokens": dict(num_virtual_tokens=25),
    "concat instead of the gate": dict(fusion="concat"), "add instead of the gate": dict(fusion="add"),
    "max instead of the gate": dict(fusion="max"), "the encoder tuned too": dict(tune_encoder=True),
    "instance embeddings shuffled": dict(shuffle_instances=True)}

VARIED = ("method", "init_std", "lr", "seed")    # from run to run, besides ABLATIONS

# Flags of train.py that would change nothing here, and why.
REFUSED = {
    "method": "name some with --methods", "lr": "three are tried", "init_std": "it follows the method",
    "seed": "name some with --seeds", "holdout": "a fifth is held out to choose a learning rate",
    "tune_encoder": "--ablate has it", "shuffle_instances": "--ablate has it",
    "save_every": "every finished run is saved", "resume": "the same command goes on where it was",
    "predict": "train.py does", "adapter": "train.py does", "compare": "leave it out"}


def study(args: argparse.Namespace) -> str:
    """Make the runs that are not in runs.jsonl yet; returns the table, which is in table.md too."""
    say = (lambda text: None) if args.quiet else partial(print, flush=True)
    given = {f.name: vars(args)[f.name] for f in fields(train.Config) if f.name in args}
    changes = ABLATIONS if args.ablate else {method: dict(method=method) for method in args.methods}
    base = train.Config(**given)
    configs = {name: train.Config(**given | change) for name, change in changes.items()}
    longest = max(c.num_virtual_tokens * (2 if c.fusion == "concat" else 1) for c in configs.values())
    problem = train.prepare(replace(base, num_virtual_tokens=longest, fusion="gate"))  # one room for all
    if (num_rows := len(problem.train)) < 5:
        raise ValueError(f"{num_rows} training rows are too few to hold out a fifth of them: 5 at least")
    held_out = problem.hold_out(num_rows // 5)
    about = dict(study="ablate" if args.ablate else "compare", **base.deciding()) | dict(
        data=problem.source, fingerprint=problem.fingerprint, data_sha256=problem.data_sha256)
    path = default_folder(base, about["study"]) / "runs.jsonl"
    lines = earlier_lines(path, {name: value for name, value in about.items() if name not in VARIED})

    def finished(stage: str, problem: train.Problem, name: str, lr: float, seed: int) -> dict:
        """The line of a run, which is made if it is not there."""
        config = replace(configs[name], lr=lr, seed=seed, quiet=True)
        wanted = dict(stage=stage, **config.deciding()) | dict(data=problem.source)
        for line in lines[1:]:
            if wanted.items() <= line.items():
                return line
        model = train.build(config, problem)
        try:
            shuffles = config.shuffle_instances
            *_, last = train.fit(config, model, problem.shuffled(seed) if shuffles else problem)
        except FloatingPointError as error:
            last = dict(accuracy=0.0, seconds=0.0, diverged=str(error).partition(":")[0])
        lines.append(wanted | last | dict(trainable_parameters=get_nb_trainable_parameters(model)[0]))
        data.save_file(path, lines)
        say(f"  {stage} {len(lines) - 1}: {name}, lr {lr:g}, seed {seed}, accuracy {last['accuracy']:.3f}, "
            + last.get("diverged", f"{last['seconds']:.1f} s"))
        return lines[-1]

    rows = []
    for name, config in configs.items():
        trials = [finished("trial", held_out, name, lr, seed=0) for lr in LEARNING_RATES[config.method]]
        best = max(trials, key=lambda trial: trial["accuracy"])["lr"]
        runs = [finished("seed", problem, name, best, seed) for seed in args.seeds]
        rows.append([name, TRAINED[config.method], f"{runs[0]['trainable_parameters']:,}", summary(runs),
                     f"{best:g}", f"{statistics.mean(run['seconds'] for run in runs):.1f}"])
        say(f"{name}: {summary(runs)}")
    header = ["LoPA" if args.ablate else "method", "what is trained; it lives with", "trainable",
              f"{problem.test_name} accuracy", "learning rate", "seconds"]
    if not args.ablate:
        sizes = {"linear_probe": (len(problem.encoder.mean) + 1) * len(problem.label_ids)}
        rows += [[name.replace("_", " "), "", str(sizes.get(name, 0)), f"{score:.3f}", "", ""]
                 for name, score in train.baselines(problem).items()]
    rows = [header, ["---"] * len(header), *rows]
    table = "".join(f"| {' | '.join(row[:1] + row[2:] if args.ablate else row)} |\n" for row in rows)
    with data.whole(path.with_name("table.md"), "the table") as file:
        file.write(table.encode())
    say(f"\n{args.task}, {problem.source}, {len(args.seeds)} seeds; wrote {path} and table.md:\n")
    return table


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
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        train.require_same_run(path.parent, lines[0], about)
        return lines
    except (json.JSONDecodeError, UnicodeDecodeError, IndexError, AttributeError):
        raise ValueError(f"{path} is damaged: delete it, or name another folder with --out") from None


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
    parser.add_argument("--ablate", action="store_true", help="change one thing about LoPA at a time")
    parser.add_argument("--methods", type=listed(str), metavar="A,B", help="these alone (default: all)")
    parser.add_argument("--seeds", type=listed(int), default=[0, 1, 2, 3, 4], metavar="A,B",
                        help="default: 0,1,2,3,4")
    parser.add_argument("--quiet", action="store_true", help="print the table alone")
    args = parser.parse_args(argv)
    if args.task is None:
        parser.error(f"name a task: --task {' or '.join(data.TASKS)}")
    if args.ablate and args.methods:
        parser.error("argument --methods: --ablate changes lopa alone")
    if args.ablate and args.fusion != "gate":
        parser.error(f"argument --fusion: --ablate tries {args.fusion} too, and LoPA has the gate")
    args.methods = args.methods or list(TRAINED)
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for bad input, 130 for Ctrl-C."""
    try:
        args = parse_args(argv)
        if "LOCAL_RANK" in os.environ:
            raise ValueError("it trains many small models one by one: start it without torchrun")
        print(study(args), end="")
    except (ValueError, OSError) as error:
        print(f"compare: error: {data.short(error, 300)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("compare: interrupted; the same command goes on after the last finished run", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
