# Needs matplotlib (python -m pip install matplotlib), which is not in requirements.txt.
"""Draw the pictures of README.md and tutorial.md from saved runs:

    python train.py --task sst2 --compare
    python train.py --task sst2
    python train.py --task sst2 --method pt
    python assets/figures.py
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data
import model as models
import train

RUNS = {method: Path("runs") / f"sst2-{method}-tiny-seed0" for method in ("lopa", "pt")}
SENTENCES = ["the plot is very witty", "the plot is very dull", "the plot is not dull"]
# A white ground and dark ink: legible on GitHub's light and dark pages alike.
plt.rcParams |= {"svg.hashsalt": "lopa", "figure.facecolor": "white", "font.size": 10, "axes.spines.top": False,
                 "axes.spines.right": False}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def save(figure, name):
    figure.savefig(ROOT / "assets" / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def accuracy_against_parameters():
    by_method = {}
    for run in lines_of(Path("runs/sst2-compare/runs.jsonl"))[1:]:
        if run["stage"] == "seed":
            by_method.setdefault(run["method"], []).append(run)
    figure, axes = plt.subplots(figsize=(7, 4))
    for method, runs in by_method.items():
        scores = [run["accuracy"] for run in runs]
        size, mean = runs[0]["trainable_parameters"], statistics.mean(scores)
        server = "server" in train.TRAINED[method]
        axes.errorbar(size, mean, statistics.stdev(scores), fmt="s" if server else "o", capsize=3,
                      color="#b3541e" if method == "lopa" else "#777777" if server else "#1f5fa8")
        axes.annotate(method, (size, mean), xytext={"bpt": (7, -11), "lopa": (-10, -16)}.get(method, (7, 4)),
                      textcoords="offset points")
    zero_shot = json.loads((RUNS["lopa"] / "result.json").read_text())["zero_shot"]
    axes.axhline(zero_shot, color="#777777", linewidth=0.8, linestyle="--")
    axes.text(0.99, zero_shot, "zero-shot", color="#555555", fontsize=9, ha="right", va="bottom",
              transform=axes.get_yaxis_transform())
    axes.set(xscale="log", xlabel="trainable parameters (squares: they live in the server's model)",
             ylabel=f"dev accuracy, {len(scores)} seeds", title="built-in sst2 sample, not GLUE")
    save(figure, "accuracy-against-parameters")


def training_curves():
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    for method, colour in (("lopa", "#b3541e"), ("pt", "#1f5fa8")):
        epochs = lines_of(RUNS[method] / "metrics.jsonl")[1:]
        for panel, quantity in zip(axes, ("loss", "accuracy")):
            panel.plot([line["epoch"] for line in epochs], [line[quantity] for line in epochs], "o-", markersize=3,
                       color=colour, label={"lopa": "LoPA", "pt": "prompt tuning"}[method])
            panel.set(xlabel="epoch", ylabel={"loss": "training loss", "accuracy": "dev accuracy"}[quantity])
    axes[0].legend(frameon=False)
    save(figure, "training-curves")


def adapted(method):
    """(adapted model, h of SENTENCES, probabilities), from the saved run"""
    adapter = train.load_adapter(RUNS[method])
    gpt, tokenizer, _ = models.tiny_gpt(adapter["pretrain_seed"], ROOT / ".cache", "cpu")
    task = data.Task(**adapter["task"])
    encoder = models.InstanceEncoder(gpt)
    model = train.restore(adapter, gpt, encoder, data.label_tokens(task, tokenizer))
    split = data.encode(task, [({"sentence": sentence}, 0) for sentence in SENTENCES], tokenizer, 100)
    instances = train.instance_embeddings(encoder, split)
    return model.eval(), instances, train.predict(model, split, instances)


@torch.no_grad()
def gates():
    model, instances, probabilities = adapted("lopa")
    U, V = model.prompt.factors(instances)
    figure, axes = plt.subplots(len(SENTENCES), 1, figsize=(8, 5.2), layout="constrained")
    for panel, sentence, gate, p in zip(axes, SENTENCES, torch.sigmoid(U @ V.transpose(1, 2)), probabilities[:, 1]):
        image = panel.imshow(gate, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        panel.set(title=f'"{sentence}"  (P(positive) = {p:.2f})', ylabel="virtual token", yticks=[0, 9])
        panel.title.set_fontsize(10)
    axes[-1].set_xlabel("embedding feature")
    figure.colorbar(image, ax=axes, label="gate, sigmoid of U Vᵀ")
    save(figure, "gates")


@torch.no_grad()
def singular_values():
    model, instances, _ = adapted("lopa")
    U, V = model.prompt.factors(instances)
    figure, axes = plt.subplots(figsize=(5.5, 3.4))
    for name, matrix, style in [
        ("Z_I = U Vᵀ of one sentence", U[2] @ V[2].T, "o-"),
        ("Z of the same sentence", model.prompt.prompt(instances)[2], "s-"),
        ("the prompt of prompt tuning", adapted("pt")[0].prompt.soft_prompt, "^-"),
    ]:
        values = torch.linalg.svdvals(matrix)
        axes.plot(range(1, len(values) + 1), values / values[0], style, markersize=4, label=name)
    axes.set(xlabel="index", ylabel="singular value / largest")
    axes.legend(frameon=False, fontsize=9)
    save(figure, "singular-values")


if __name__ == "__main__":
    accuracy_against_parameters()
    training_curves()
    gates()
    singular_values()
