"""The tables of README.md: every method, or LoPA with one thing changed at a time.

    python -m experiments.compare --task sst2                           every method, five seeds (12 minutes)
    python -m experiments.compare --task sst2 --seeds 0 --rates default      quick: one run of each
    python -m experiments.compare --task sst2 --ablate                  LoPA's ablations (15 minutes); some:
    python -m experiments.compare --task sst2 --ablate "rank 1" "as it is"
    python -m experiments.any_model compare FOLDER --task sst2 ...      the same on a model of Transformers
    python -m experiments.compare --table experiments/results/NAME/runs.jsonl

For each row of the table three learning rates, a third of train.py's, its and three times it, are tried on a
fifth of the training rows, held out; with --tune-encoder the encoder's alone. The best one then trains on all
of them, once for each seed, and the last epoch is scored on dev, which nothing was chosen on. A control,
METHOD-shuffled, METHOD-constant or METHOD-blind, is the method at its rates with another text's h, the same h
for all, or without the text, which an encoder that is tuned still reads.

Every finished run is at once a line of runs.jsonl, in the folder runs/TASK-compare-MODEL or --out, and the
same command goes on where it was. On the built-in sample a seed's line has the accuracy by kind of sentence
too, and is printed with it when there is one seed. The other flags mean what they mean to train.py.
"""

import argparse
import fcntl
import inspect
import json
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path

import torch

import data
import train
from experiments import evidence
from lopa import METHODS, get_nb_trainable_parameters
from model import short
from train import Config, Problem

# What --ablate changes about LoPA.
ABLATIONS = {
    "as it is": {}, "rank 1": dict(rank=1), "rank 2": dict(rank=2), "rank 8": dict(rank=8),
    "5 virtual tokens": dict(num_virtual_tokens=5), "25 virtual tokens": dict(num_virtual_tokens=25),
    "concat instead of the gate": dict(fusion="concat"), "add instead of the gate": dict(fusion="add"),
    "max instead of the gate": dict(fusion="max"), "the encoder tuned too": dict(tune_encoder=True),
    "heads that start as released": dict(head_std=0.02), "a start of N(0, 1) as released": dict(init_std=1.0),
    "h after 1 block": dict(encoder_blocks=1), "h after 2 blocks": dict(encoder_blocks=2)}

RATES = ("lr", "head_lr", "encoder_lr")
FACTORS = (1, 1 / 3, 3)                  # of train.py's learning rates, to try; of equals the first wins
ALL = [*train.CHOICES["method"], *(f"lopa-{control}" for control in evidence.CONTROLS)]

# What the second line of a study has at least, and those of its runs; train.py's flags that do nothing here.
BEFORE = {"stage", "scored_on", "d_h", "labels"}
RUN = {"stage", "row", "method", *RATES, "tune_encoder", "seed", "accuracy", "seconds",
       "trainable_parameters"}
REFUSED = "method lr head_lr seed save_every resume predict adapter".split()


def study(args: argparse.Namespace, kind: str, base: Config, configs: dict[str, Config], path: Path) -> str:
    """Make the runs of each row's config that are not in `path` yet; returns the table, as in table.md."""
    rates = rates_to_try(args.rates, configs)
    longest = max(c.num_virtual_tokens * (2 if c.fusion == "concat" else 1) for c in configs.values())
    problems = {}                        # one for each place where h is read, with one room for all texts
    for blocks in dict.fromkeys(config.encoder_blocks for config in (base, *configs.values())):
        problems[blocks] = train.prepare(replace(base, num_virtual_tokens=longest, encoder_blocks=blocks,
                                                 quiet=bool(problems) or base.quiet))
    problem = problems[base.encoder_blocks]
    held_out = {blocks: evidence.hold_out(whole, len(whole.train) // 5) for blocks, whole in problems.items()
                if args.rates is None}
    for name, config in configs.items():                               # ValueError now, if it cannot be
        changes_h, reads_h = method_of(name)[1] in ("shuffled", "constant"), sees_h(config.method)
        if config.tune_encoder + changes_h + (not reads_h) > 1:        # any two: a tuned encoder makes h anew
            what = "--tune-encoder" if config.tune_encoder else "the control"
            raise ValueError(f"{what} has no effect on {name}: name others with --methods")
        evidence.controlled(problem, method_of(name)[1])
        if config.init_text is not None or config.init == "vocab":
            train.build(config, problem)
    about = dict(study=kind) | base.deciding() | problem.made_of
    lines = read_lines(path) if path.exists() else [about]
    for name, here in about.items():                                   # these five are the runs' own
        if lines[0].get(name) != here and name not in ("method", *RATES, "seed"):
            there = short(lines[0].get(name))
            raise ValueError(f"{path.parent} holds another study: {name} is {there} there and {short(here)} "
                             "here: name another folder with --out")

    def finished(row: str, stage: str, problem: Problem, config: Config, seed: int,
                 control: str | None = None) -> dict:
        """The line of a run, which is made if it is not there."""
        config = replace(config, seed=seed, quiet=True)
        wanted = dict(stage=stage, **config.deciding(), control=control) | dict(data=problem.made_of["data"])
        if same := [line for line in lines[1:] if all(line.get(name) == wanted[name] for name in wanted)]:
            if stage == "seed" and row not in [line["row"] for line in same]:
                add(same[0] | dict(row=row))                           # one run, two rows of the table
            return same[0]
        model = train.build(config, problem)
        if control == "blind" and config.tune_encoder:
            evidence.blind_tuned(model, problem)
        else:
            problem = evidence.controlled(problem, control, seed)
        try:                                                           # only the last epoch is scored
            *_, last = train.fit(config, model, replace(problem, tests={problem.test_name: problem.test[:1]}))
            predictions = train.predict(model, problem.test)
            last["accuracy"] = problem.accuracy(predictions, problem.test)
            if evidence.kinds(problem):
                last["accuracy_by_kind"] = evidence.accuracy_by_kind(problem, predictions)
        except FloatingPointError as error:
            last = dict(accuracy=0.0, seconds=0.0, diverged=str(error).partition(":")[0])
        add(dict(row=row) | wanted | last | dict(trainable_parameters=get_nb_trainable_parameters(model)[0]))
        kinds = last.get("accuracy_by_kind", {}) if len(args.seeds) == 1 else {}
        scores = dict(accuracy=last["accuracy"]) | kinds
        base.say(f"  {stage} {len(lines) - 2}: {row}, lr {config.lr:g}, seed {seed}, "
                 + "".join(f"{name} {score:.3f}, " for name, score in scores.items())
                 + last.get("diverged", f"{last['seconds']:.1f} s"))
        return lines[-1]

    def add(line: dict) -> None:
        lines.append(line)
        data.save_file(path, lines)

    if len(lines) == 1:
        add(dict(stage="before", scored_on=problem.test_name, d_h=len(problem.encoder.mean),
                 labels=len(problem.label_ids)) | evidence.baselines(base, problem))
    for name, config in configs.items():
        (row, control), blocks = method_of(name), config.encoder_blocks        # a control has LoPA's rates
        best = rates[name][0] if args.rates else max(rates[name], key=lambda rate: finished(
            row, "trial", held_out[blocks], replace(config, **rate), 0)["accuracy"])
        for seed in args.seeds:
            finished(name, "seed", problems[blocks], replace(config, **best), seed, control)
    result = table(path)
    path.with_name("table.md").write_text(result)
    base.say(f"\n{base.task}, {problem.made_of['data']}; wrote {path} and table.md:\n")
    return result


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else runs in the folder meanwhile: ValueError if somebody does. It ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another run: name another folder with --out") from None
    try:
        yield
    finally:
        os.close(descriptor)
        with suppress(OSError):
            folder.rmdir()                                             # where nothing has been saved


def rates_to_try(source: str | None, configs: dict[str, Config]) -> dict[str, list[dict[str, float]]]:
    """Of each row three learning rates, or one: train.py's ("default"), or another study's choice."""
    if source in (None, "default"):
        factors = (1,) if source else FACTORS
        return {name: [{rate: float(f"{factor * getattr(config, rate):.1g}")           # to one digit
                        for rate in (RATES[2:] if config.tune_encoder else RATES[:2])}
                       for factor in factors] for name, config in configs.items()}
    rates = {line["row"]: {rate: line[rate] for rate in RATES}
             for line in read_lines(Path(source))[2:] if line["stage"] == "seed"}
    rows = {name: method_of(name)[0] for name in configs}
    if missing := [row for row in rows.values() if row not in rates]:
        raise ValueError(f"--rates: {source} has no finished run of {', '.join(missing)}, but of "
                         f"{', '.join(rates) or 'nothing'}")
    return {name: [rates[row]] for name, row in rows.items()}


def table(path: Path) -> str:
    """The table of a study's runs.jsonl, in Markdown."""
    about, before, *lines = read_lines(path)
    ablate = about["study"] == "ablate"
    groups: dict[tuple, list[dict]] = {}                               # the seeds of a row at one rate
    for line in lines:
        if line["stage"] == "seed":
            rates = f"{line['lr']:g}" + f", {line['head_lr']:g}" * sees_h(line["method"])
            rates += f", {line['encoder_lr']:g}" * line["tune_encoder"]
            groups.setdefault((line["row"], rates), []).append(line)
    rows = [[name, "" if ablate else trained(name), f"{runs[0]['trainable_parameters']:,}", summary(runs),
             rates, f"{statistics.mean(run['seconds'] for run in runs):.1f}"]
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


def method_of(row: str) -> tuple[str, str | None]:
    """"lopa-blind" -> ("lopa", "blind"), "lopa" -> ("lopa", None)."""
    method, _, control = row.rpartition("-")
    return (method, control) if control in evidence.CONTROLS else (row, None)


def sees_h(method: str) -> bool:
    return method in METHODS and "instance_dim" in inspect.signature(METHODS[method]).parameters


def trained(row: str) -> str:
    """What a row of the table trains, and with whom it lives when one model serves many users."""
    method, control = method_of(row)
    if control:
        return f"{method} {evidence.CONTROLS[control]}"
    if method in METHODS:                                              # its docstring, up to the first colon
        return (METHODS[method].__doc__ or "").partition("\n")[0].partition(":")[0].rstrip(".") + "; user"
    return {"lora": "updates of q, k, v; server", "full": "every weight; server"}.get(method, "")


def summary(runs: list[dict]) -> str:
    """Mean and deviation over the seeds. A run that diverged has accuracy 0, and is counted."""
    scores, diverged = [run["accuracy"] for run in runs], sum("diverged" in run for run in runs)
    spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.3f}{spread}" + f", {diverged} of {len(runs)} diverged" * bool(diverged)


def read_lines(path: Path) -> list[dict]:
    """A study's runs.jsonl: what it is about, what was before, each run. ValueError: it is none."""
    try:
        about, before, *lines = [dict(json.loads(line)) for line in path.read_text().splitlines()]
        if "study" in about and BEFORE <= before.keys() and all(RUN <= line.keys() for line in lines):
            return [about, before, *lines]
    except (ValueError, TypeError, RecursionError):                    # too few lines, or no JSON objects
        pass
    raise ValueError(f"{path} is damaged, or no runs.jsonl: delete it, or name another")


def methods(text: str) -> list[str]:
    """Reads "A,B" as rows of the table: methods, and controls as METHOD-CONTROL."""
    known, names = train.CHOICES["method"], text.split(",")
    if unknown := [name for name in names if method_of(name)[0] not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}, nor one of them and "
                                         f"-{', -'.join(evidence.CONTROLS)}")
    return list(dict.fromkeys(names))


def seeds(text: str) -> list[int]:
    return list(dict.fromkeys(int(seed) for seed in text.split(",")))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "compare", argparse.SUPPRESS, __doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        parents=[train.build_parser()], conflict_handler="resolve",    # its flags, but for these:
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in REFUSED:
        parser.add_argument("--" + name.replace("_", "-"), nargs="?", help=argparse.SUPPRESS)
    own = parser.add_argument_group("this program's own")
    rows = own.add_mutually_exclusive_group()
    rows.add_argument("--methods", type=methods, default=ALL, metavar="A,B",
                      help="these alone (default: all, and LoPA's controls)")
    rows.add_argument("--ablate", nargs="*", metavar="CHANGE", choices=ABLATIONS,
                      help="change one thing about LoPA at a time: " + "; ".join(ABLATIONS))
    own.add_argument("--seeds", type=seeds, default=[0, 1, 2, 3, 4], metavar="A,B", help="default: 0,1,2,3,4")
    own.add_argument("--rates", default=None, metavar="FILE", help="try no learning rates, but take those "
                     "that another study's runs.jsonl ended with; default: train.py's")
    own.add_argument("--table", metavar="FILE", help="print the table of a runs.jsonl, and train nothing")
    own.add_argument("--out", metavar="DIR", help="the study's folder, new or to go on with")
    own.add_argument("--quiet", action="store_true", help="print the table alone")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for bad input, 130 for Ctrl-C."""
    parser = build_parser()
    typed = vars(args := parser.parse_args(argv))
    try:
        if "table" in typed:
            return print(table(Path(args.table)), end="")
        if refused := typed.keys() & set(REFUSED):
            raise ValueError(f"--{min(refused).replace('_', '-')} has no effect here: leave it out")
        if "task" not in typed:
            raise ValueError(f"name a task: --task {' or '.join(data.TASKS)}")
        if "LOCAL_RANK" in os.environ:
            raise ValueError("it trains many small models one by one: start it without torchrun")
        given = {f.name: typed[f.name] for f in fields(Config) if f.name in typed}
        kind, changes = "compare", {name: dict(method=method_of(name)[0]) for name in args.methods}
        if "ablate" in typed:
            kind, changes = "ablate", {name: ABLATIONS[name] for name in args.ablate or ABLATIONS}
        base, configs = Config(**given), {name: Config(**given | change) for name, change in changes.items()}
        for seed in args.seeds:
            replace(base, seed=seed)                                   # ValueError, if it is none
        usual_name = base.name.replace(f"-{base.method}-", f"-{kind}-", 1).replace("-seed0", "", 1)
        with locked(folder := Path(base.out or f"runs/{usual_name}")):
            print(study(args, kind, base, configs, folder / "runs.jsonl"), end="")
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        parser.exit(130, "compare: interrupted; the same command goes on after the last finished run\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")                  # a sign that the console lacks
    main()
