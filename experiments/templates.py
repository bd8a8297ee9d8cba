"""Zero-shot accuracy of some templates and label words on training rows, before any dev row is seen.

    python -m experiments.templates FOLDER --data DIR [--rows 500] [--dtype bfloat16]
"""

import argparse
from dataclasses import replace

import torch

import data
import train
from experiments import any_model
from model import short

TEMPLATES = {"sst2": [("{sentence} . It was", " terrible", " great"),
                      ("{sentence} . All in all , the film is", " bad", " good"),
                      ("Review: {sentence}\nSentiment:", " negative", " positive"),
                      # What --init-text of experiments/README.md says, without training.
                      (" Is this review of a film positive or negative ?{sentence} . It was",
                       " terrible", " great")],
             "rte": [("{a} ? {b} . Answer:", " No", " Yes"),
                     ("{a}\nQuestion: {b} True or False?\nAnswer:", " False", " True"),
                     ("Premise: {a}\nHypothesis: {b}\nIs it entailed?", " No", " Yes")]}


def main() -> None:
    parser = argparse.ArgumentParser("templates", argparse.SUPPRESS, __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    try:
        scores(args)
    except (ValueError, OSError) as error:
        parser.error(short(error, 300))


def scores(args: argparse.Namespace) -> None:
    """Print the table, row by row."""
    config = train.Config(task="sst2", model=args.folder, dtype=args.dtype, max_train=args.rows, device="cpu")
    gpt, tokenizer = any_model.load_model(args.folder, config)      # once: it does not depend on the task
    print("| task | template | label words | accuracy on training rows |\n| --- | --- | --- | --- |")
    for name, templates in TEMPLATES.items():
        rows, _, _ = data.load_task(name, args.data, args.rows)
        for template, *words in templates:
            task = replace(data.TASKS[name], template=template,
                           label_words=dict(zip(data.TASKS[name].label_words, words)))
            model = train.Adapted(None, gpt, None, data.label_tokens(task, tokenizer))
            split = data.encode(task, rows, tokenizer, max_length=512)
            split = replace(split, instances=torch.zeros(len(split), 1))
            score = (train.predict(model, split).argmax(dim=-1) == split.labels).float().mean().item()
            print(f"| {name} | `{template!r}` | {', '.join(words)} | {score:.3f} |", flush=True)


if __name__ == "__main__":
    main()
