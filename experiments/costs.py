"""What a method costs on a model of Transformers: seconds and memory of a step, seconds to answer one text.

    python -m experiments.costs FOLDER --data DIR [--dtype bfloat16]

The methods take turns, batch by batch, so that a busy machine slows all of them alike. Memory is the peak of
one step above what the process held before it, each method in a process of its own.
"""

import argparse
import ctypes
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import data
import train
from experiments import any_model
from experiments.benchmark import ROOT, adamw, our_step, seconds
from lopa import get_nb_trainable_parameters
from model import short

METHODS = ("pt", "dpt", "idpg", "lopa", "lora")
BATCH_SIZE, NUM_BATCHES, NUM_TEXTS = 16, 4, 10


def settings(args: argparse.Namespace, method: str) -> train.Config:
    return train.Config("sst2", method=method, model=args.folder, data=args.data, dtype=args.dtype,
                        max_train=BATCH_SIZE * NUM_BATCHES, batch_size=BATCH_SIZE, device="cpu", quiet=True)


def peak_of_a_step(args: argparse.Namespace) -> int:
    """MB that a step on the longest batch adds to what the process held; h is there already. Linux only."""
    config = settings(args, args.peak)
    problem = train.prepare(config)
    model = train.build(config, problem).train()
    longest = problem.train[problem.train.lengths.argsort()[-BATCH_SIZE:]]
    optimizer = adamw(model, config)
    ctypes.CDLL(None).malloc_trim(0)                                   # loading left free memory behind
    Path("/proc/self/clear_refs").write_text("5")                      # the peak starts from here
    def kilobytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    before = kilobytes("VmRSS")
    our_step(model, optimizer, longest)
    return (kilobytes("VmHWM") - before) // 1024


def costs(args: argparse.Namespace) -> str:
    """The table, in Markdown."""
    problem = train.prepare(settings(args, "lopa"))
    encoder, split = problem.encoder, problem.train
    models = {None: train.Adapted(None, problem.gpt, encoder, problem.label_ids)}
    models |= {method: train.build(settings(args, method), problem) for method in METHODS}
    optimizers = {method: adamw(models[method], settings(args, method)) for method in METHODS}
    steps, answers = {method: [] for method in METHODS}, {method: [] for method in models}
    order = data.shuffled_batches(split, BATCH_SIZE, torch.Generator().manual_seed(0))
    for batch in data.batches(split, order):
        for method in METHODS:
            for times in ([], steps[method]):                          # a new shape is slow at first
                times.append(seconds(lambda: our_step(models[method].train(), optimizers[method], batch)))
    for text in data.batches(split, list(torch.arange(NUM_TEXTS)[:, None])):           # not padded
        for method, model in models.items():
            def answer():                                              # h is a part of it where it is used
                h = encoder(text.tokens, text.lengths) if method in ("idpg", "lopa") else text.instances
                model.eval()(text.tokens, text.lengths, h)
            with torch.no_grad():
                for times in ([], answers[method]):
                    times.append(seconds(answer))
    lines = ["| method | trainable | a step, s | compared with pt | peak of a step, MB | one text, ms |",
             "|" + " --- |" * 6]
    for method, times in answers.items():
        cells = ["no prompt", "0", "", "", ""]
        if method:
            command = [sys.executable, "-m", "experiments.costs", *sys.argv[1:], "--peak", method]
            peak = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
            cells = [method, f"{get_nb_trainable_parameters(models[method])[0]:,}",
                     f"{statistics.mean(steps[method]):.2f}",
                     f"{sum(steps[method]) / sum(steps['pt']):.2f}", peak.strip()]
        lines.append(f"| {' | '.join(cells)} | {1000 * statistics.median(times):.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser("costs", argparse.SUPPRESS, __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--data", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peak", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    train.load_model = any_model.load_model
    try:
        print(peak_of_a_step(args) if args.peak else costs(args))
    except (ValueError, OSError) as error:
        parser.error(short(error, 300))


if __name__ == "__main__":
    main()
