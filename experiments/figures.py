"""Draw the pictures of README.md and tutorial.md from saved runs:

    python -m pip install -r requirements.txt -r experiments/requirements.txt
    python -m experiments.compare --task sst2
    python train.py --task sst2
    python train.py --task sst2 --method pt
    python -m experiments.figures
"""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

import data
import train

ROOT = Path(train.__file__).parent
RUN = "sst2-{}-tiny-seed0"               # folder of a run
SENTENCES = ["the plot is very witty", "the plot is very dull", "the plot is not dull"]
COLOURS = {"lopa": "#b3541e", "pt": "#1f5fa8", "idpg": "#2e7d5b", "lora": "#777777"}
ROW_STYLES = {"pt": "o-", "idpg": "^-", "lopa": "D-", "lora": "s-"}
# A white ground and dark ink: legible on GitHub's light and dark pages alike.
plt.rcParams |= {"svg.hashsalt": "lopa", "figure.facecolor": "white", "font.size": 10,
                 "axes.spines.top": False, "axes.spines.right": False}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def accuracy_against_parameters(folder: Path) -> Figure:
    by_method = {}
    for run in lines_of(folder / "sst2-compare-tiny" / "runs.jsonl")[1:]:
        if run["stage"] == "seed" and not run["control"]:
            by_method.setdefault(run["method"], []).append(run)
    figure, axes = plt.subplots(figsize=(7, 4))
    for method, runs in by_method.items():
        scores = [run["accuracy"] for run in runs]
        size, mean = runs[0]["trainable_parameters"], statistics.mean(scores)
        server = method in ("lora", "full")
        spread = statistics.stdev(scores) if len(scores) > 1 else 0
        axes.errorbar(size, mean, spread, fmt="s" if server else "o", capsize=3,
                      color=COLOURS["lopa"] if method == "lopa" else "#777777" if server else COLOURS["pt"])
        axes.annotate(method, (size, mean), xytext={"bpt": (7, -11), "lopa": (-10, -16)}.get(method, (7, 4)),
                      textcoords="offset points")
    zero_shot = json.loads((folder / RUN.format("lopa") / "result.json").read_text())["zero_shot"]
    axes.axhline(zero_shot, color="#777777", linewidth=0.8, linestyle="--")
    axes.text(0.99, zero_shot, "zero-shot", color="#555555", fontsize=9, ha="right", va="bottom",
              transform=axes.get_yaxis_transform())
    axes.set(xscale="log", xlabel="trainable parameters (squares: they live in the server's model)",
             ylabel=f"dev accuracy, {len(scores)} seeds", title="built-in sst2 sample, not GLUE")
    return figure


def training_curves(folder: Path) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    for method, name in (("lopa", "LoPA"), ("pt", "prompt tuning")):
        epochs = lines_of(folder / RUN.format(method) / "metrics.jsonl")
        for panel, quantity in zip(axes, ("loss", "accuracy")):
            panel.plot([line["epoch"] for line in epochs], [line[quantity] for line in epochs], "o-",
                       markersize=3, color=COLOURS[method], label=name)
            panel.set(xlabel="epoch",
                      ylabel={"loss": "training loss", "accuracy": "dev accuracy"}[quantity])
    axes[0].legend(frameon=False)
    return figure


def adapted(folder: Path) -> tuple[train.Adapted, torch.Tensor, torch.Tensor]:
    """(adapted model, h of SENTENCES, probabilities), from a run's folder"""
    adapter = train.load_state(folder / "adapter.pt")
    config = train.Config(**adapter["config"] | dict(device="cpu", cache=str(ROOT / ".cache"), quiet=True))
    gpt, encoder, tokenizer = train.load_frozen(config)
    task = data.Task(**adapter["task"])
    model = train.restore(adapter, gpt, encoder, data.label_tokens(task, tokenizer))
    split = data.encode(task, [({"sentence": sentence}, 0) for sentence in SENTENCES], tokenizer, 100)
    split = replace(split, instances=train.instance_embeddings(encoder, split))
    return model.eval(), split.instances, train.predict(model, split)


@torch.no_grad()
def gates(folder: Path) -> Figure:
    model, instances, probabilities = adapted(folder / RUN.format("lopa"))
    U, V = model.prompt.factors(instances)
    figure, axes = plt.subplots(len(SENTENCES), 1, figsize=(8, 5.2), layout="constrained")
    images = torch.sigmoid(U @ V.transpose(1, 2))                      # (3, m, d)
    for panel, sentence, gate, p in zip(axes, SENTENCES, images, probabilities[:, 1]):
        image = panel.imshow(gate, aspect="auto", cmap="viridis", vmin=0, vmax=1,
                             interpolation="none")                     # the values, not an enlarged picture
        panel.set(title=f'"{sentence}"  (P(positive) = {p:.2f})', ylabel="virtual token", yticks=[0, 9])
        panel.title.set_fontsize(10)
    axes[-1].set_xlabel("embedding feature")
    figure.colorbar(image, ax=axes, label="gate, sigmoid of U Vᵀ")
    return figure


@torch.no_grad()
def singular_values(folder: Path) -> Figure:
    model, instances, _ = adapted(folder / RUN.format("lopa"))
    U, V = model.prompt.factors(instances)
    figure, axes = plt.subplots(figsize=(5.5, 3.4))
    for name, matrix, style in [
        ("Z_I = U Vᵀ of one sentence", U[2] @ V[2].T, "o-"),
        ("Z of the same sentence", model.prompt.prompt(instances)[2], "s-"),
        ("the prompt of prompt tuning", adapted(folder / RUN.format("pt"))[0].prompt.soft_prompt, "^-"),
    ]:
        values = torch.linalg.svdvals(matrix)
        axes.plot(range(1, len(values) + 1), values / values[0], style, markersize=4, label=name)
    axes.set(xlabel="index", ylabel="singular value / largest")
    axes.legend(frameon=False, fontsize=9)
    return figure


def accuracy_against_rows(_: Path) -> Figure:
    """On SmolLM2-135M and real SST-2, from compare's committed runs: at the rate that was chosen first."""
    scores, steps, rate = {}, {}, {}                       # of (method, rows to train on); of rows; as scores
    for name in ("smollm2-sst2-250", "smollm2-sst2", "smollm2-sst2-4000"):
        for run in lines_of(ROOT / "experiments" / "results" / name / "runs.jsonl")[1:]:
            if run["stage"] == "seed" and not run["control"] and run["method"] in ROW_STYLES:
                rows = run["max_train"]
                if rate.setdefault((run["method"], rows), run["lr"]) != run["lr"]:
                    continue
                scores.setdefault((run["method"], rows), []).append(run["accuracy"])
                steps[rows] = run["epochs"] * math.ceil(rows / run["batch_size"])
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for i, (method, style) in enumerate(ROW_STYLES.items()):
        sizes = sorted(rows for name, rows in scores if name == method)
        places = [rows * 1.04 ** (i - 1.5) for rows in sizes]          # beside each other, not on top
        means = [statistics.mean(scores[method, rows]) for rows in sizes]
        axes.plot(places, means, style, markersize=5, label=method, color=COLOURS[method])
        for place, rows in zip(places, sizes):                         # each seed
            axes.plot([place] * len(scores[method, rows]), scores[method, rows], "_", color=COLOURS[method])
    axes.set(xscale="log", xlabel="labelled rows", ylabel="dev accuracy, 3 seeds",
             title="SmolLM2-135M, real SST-2")
    axes.set_xticks(sizes, [f"{rows:,}\n{steps[rows]} steps" for rows in sizes])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9)
    return figure


FIGURES = [accuracy_against_parameters, training_curves, gates, singular_values, accuracy_against_rows]


def main(folder: Path = Path("runs"), out: Path = ROOT / "assets") -> None:
    for draw in FIGURES:
        name = draw.__name__.replace("_", "-")
        figure = draw(folder)
        figure.savefig(out / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
