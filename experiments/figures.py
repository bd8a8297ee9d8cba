"""Draw the pictures of the pages, each for a light and for a dark ground, from saved runs:

    python train.py --task sst2
    python -m experiments.compare --task sst2
    python -m experiments.figures
"""

from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

import data
import train
from experiments import compare, evidence

ROOT = Path(train.__file__).parent
GREY, MADE = "#6e7781", "#d9a521"        # what is frozen or beside the point; what is computed for each text
FAMILIES = {"one prompt for all texts": ("#3b82d6", "pt dpt bpt residual"), "LoPA": ("#d9622b", "lopa"),
            "IDPG": ("#2e9e6b", "idpg"), "moves the text's embeddings": (GREY, "dept adept"),
            "changes the model": ("#a06cd5", "lora full")}
COLOURS = {method: colour for colour, methods in FAMILIES.values() for method in methods.split()}
NAMES = {"pt": "prompt tuning", "dpt": "DPT", "bpt": "BPT", "residual": "residual", "lopa": "LoPA",
         "idpg": "IDPG", "dept": "DePT", "adept": "ADePT", "lora": "LoRA", "full": "full fine-tuning"}
plt.switch_backend("svg")
# Text stays text, and is no smaller than 12 px (9.5 pt); a figure is 900 px wide.
plt.rcParams |= {"svg.hashsalt": "lopa", "svg.fonttype": "none", "savefig.transparent": True,
                 "font.size": 10.5, "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
                 "mathtext.fontset": "dejavusans", "legend.frameon": False, "axes.titlesize": 12,
                 "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False,
                 "axes.spines.right": False, "figure.constrained_layout.h_pad": 0.1}


def axes_of(height: int) -> tuple[plt.Figure, plt.Axes]:
    return plt.subplots(figsize=(900 / 96, height / 96), layout="constrained")


def lopa(_: Path) -> plt.Figure:
    """The method. x and y are pixels, y downwards."""
    figure = plt.figure(figsize=(900 / 96, 430 / 96))
    figure.add_axes((0, 0, 1, 1), xlim=(0, 900), ylim=(430, 0)).axis("off")
    axes, trained, opacity = figure.gca(), COLOURS["lopa"], torch.Generator().manual_seed(4)
    boxes = [(30 + 52 * i, 134, 44, 32, MADE, f"$z_{i + 1}$") for i in range(4)]
    boxes += [(262 + 78 * i, 134, 70, 32, GREY, word)
              for i, word in enumerate("the plot is not dull . It was".split())]
    arrows = [(x + width / 2, 134, x + width / 2, 106) for x, _, width, *_ in boxes]
    arrows += [(843, 52, 843, 32), (118, 252, 118, 200), (588, 290, 544, 290), (714, 290, 676, 290),
               (772, 290, 736, 290), (824, 200, 824, 258)]
    boxes += [(20, 52, 860, 50, GREY, ""), (588, 262, 84, 56, trained, "two small\nheads"),
              (772, 262, 104, 56, GREY, "frozen\nencoder")]
    words = [(x + width / 2, y + height / 2, text, 10.5) for x, y, width, height, _, text in boxes]
    words += [(450, 77, "frozen language model", 14), (843, 20, "great", 14), (119, 340, "$Z_{S}$", 14),
              (302, 340, "$U$", 14), (429, 340, r"$V^{\,\mathrm{T}}$", 14), (725, 340, "$h$", 14),
              (229, 289, "⊙", 19), (264, 289, "σ (", 19), (329, 289, "·", 19), (531, 289, ")", 19),
              (134, 186, "virtual tokens: the rows of Z", 9.5), (767, 228, "the same text", 9.5),
              (452, 186, "the text, embedded, with the end of its template", 9.5),
              (119, 363, "m × d", 9.5), (302, 363, "m × r", 9.5), (429, 363, "r × d", 9.5),
              (119, 382, "one per task", 9.5), (374, 382, "two thin factors for each text: its gate", 9.5)]
    for x, y, width, height, colour, _ in boxes:
        axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=6", edgecolor=colour,
                                      facecolor=colour + "26", linewidth=1.4))
    for x, y, *end in arrows:
        axes.annotate("", end, (x, y), arrowprops=dict(arrowstyle="-|>", color=GREY, shrinkA=0, shrinkB=0))
    for x, y, text, size in words:
        axes.text(x, y, text, size=size, ha="center", va="center", alpha=0.7 if size < 10 else 1,
                  weight="bold" if size == 14 else "normal")
    for x, y, rows, columns, colour in ((30, 260, 4, 12, trained), (288, 260, 4, 2, MADE),
                                        (340, 275, 2, 12, MADE), (718, 268, 3, 1, MADE)):
        for i, alpha in enumerate(0.3 + 0.7 * torch.rand(rows * columns, generator=opacity)):
            axes.add_patch(Rectangle((x + 15 * (i % columns), y + 15 * (i // columns)), 13.5, 13.5,
                                     color=colour, alpha=alpha.item(), linewidth=0))
    legend = {"trained (the user's)": trained, "computed for each text": MADE, "frozen (shared)": GREY}
    figure.legend([Patch(color=colour) for colour in legend.values()], legend, loc="lower center", ncols=3)
    return figure


def seeds(path: Path) -> dict[str, list[dict]]:
    """The finished runs of each row of a comparison."""
    runs = [run for run in compare.read_lines(path)[2:] if run["stage"] == "seed"]
    return {run["row"]: [other for other in runs if other["row"] == run["row"]] for run in runs}


def two_by_two(folder: Path) -> plt.Figure:
    runs, (figure, axes) = seeds(folder / "sst2-compare-tiny" / "runs.jsonl"), axes_of(350)
    kinds = {"all": "all 872", "plain": 'plain\n"it is dull"', "negated": 'negated\n"it is not dull"',
             "contrast": 'contrast\n"warm , but dull"', "negated contrast": 'negated contrast\n"but not bad"'}
    for i, (row, colour, label) in enumerate((
            ("lopa", COLOURS["lopa"], "LoPA: both"), ("pt", COLOURS["pt"], "prompt tuning: the model reads"),
            ("lopa-blind", "#e8b088", "LoPA without the text: the prompt knows"))):
        scores = [[(run["accuracy_by_kind"] | {"all": run["accuracy"]})[kind] for run in runs[row]]
                  for kind in kinds]
        bars = axes.bar([x + 0.2 * (x > 0) + 0.27 * (i - 1) for x in range(5)], list(map(mean, scores)), 0.25,
                        color=colour, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=-14, size=9.5, color="#1f2328")
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle="--", label="neither", zorder=0)
    axes.set_xticks([x + 0.2 * (x > 0) for x in range(5)], kinds.values())
    axes.set(ylim=(0, 1.03), ylabel=f"dev accuracy, mean of {len(scores[0])} seeds",
             title="The model alone fails at negations, the prompt alone at contrasts; LoPA at neither")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@torch.no_grad()
def swap(folder: Path) -> plt.Figure:
    """The trained LoPA reads texts behind the prompts of others; is its answer what their last word says?"""
    adapter = train.load_state(folder / "sst2-lopa-tiny-seed0" / "adapter.pt")
    problem = train.prepare(train.Config(**adapter["config"] | dict(cache=str(ROOT / ".cache"), quiet=True)))
    model = train.restore(adapter, problem.gpt, problem.encoder, problem.label_ids)
    texts = ["the plot is witty", "the plot is dull", "the plot is not dull"]
    split = data.encode(problem.task, [({"sentence": text}, 0) for text in texts], problem.tokenizer, 100)
    h, test = train.instance_embeddings(problem.encoder, split), problem.test
    other = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    negated = torch.tensor(["negated" in kind for kind in evidence.kinds(problem)])
    answers = train.predict(model, replace(test, instances=test.instances[other])).argmax(dim=1)
    as_word = (answers == test.labels ^ negated).float()               # the label is the one xor the other
    figure, axes = axes_of(310)
    for i, (label, colour, of, here) in enumerate((
            ("behind its own prompt (dev: another's, without negation)", MADE, h, ~negated[other]),
            (f'behind that of "{texts[2]}" (dev: another negated one\'s)', COLOURS["lopa"], h[[2, 2, 2]],
             negated[other]))):
        p = train.predict(model, replace(split, instances=of))         # (3, 2)
        bars = axes.barh([place + 0.4 * i for place in range(3)], [p[0, 1], p[1, 0], as_word[here].mean()],
                         0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=4, weight="bold")
    axes.set_yticks([0.2, 1.2, 2.2], [f'"{texts[0]}":\nP(positive)', f'"{texts[1]}":\nP(negative)',
                                      f"all {len(other)} dev sentences:\nas the last word says"])
    axes.set(xlim=(0, 1.05), title="The prompt of a negated sentence turns another text's answer round")
    axes.invert_yaxis()
    figure.legend(loc="outside lower center")
    return figure


def accuracy_against_parameters(folder: Path) -> plt.Figure:
    path, (figure, axes) = folder / "sst2-compare-tiny" / "runs.jsonl", axes_of(430)
    runs, zero_shot, below = seeds(path), compare.read_lines(path)[1]["zero_shot"], (0, -20, "center")
    sides = {"dpt": (0, 14, "center"), "adept": (-10, -4, "right"),
             "bpt": below, "lopa": below, "full": below, "lora": below}
    for row in filter(NAMES.get, runs):
        scores, size = [run["accuracy"] for run in runs[row]], runs[row][0]["trainable_parameters"]
        height, spread, (x, y, ha) = mean(scores), stdev(scores), sides.get(row, (10, -4, "left"))
        axes.errorbar(size, height, [[spread], [min(spread, 1 - height)]], color=COLOURS[row], capsize=3,
                      fmt="s" if row in ("lora", "full") else "o", markersize=10 if row == "lopa" else 7)
        axes.annotate(NAMES[row], (size, height), (x, y), textcoords="offset points", ha=ha,
                      weight="bold" if row == "lopa" else "normal")
    for label, (colour, _) in FAMILIES.items():
        axes.plot([], [], "s" if label == "changes the model" else "o", color=colour, label=label)
    axes.axhline(zero_shot, color=GREY, linewidth=1, linestyle="--", zorder=0)
    axes.text(350_000, zero_shot + 0.006, f"no prompt: {zero_shot:.3f}", alpha=0.7, ha="right")
    axes.set(xscale="log", xlim=(200, 350_000), ylim=(0.54, 1.03), xlabel="trained parameters",
             ylabel=f"dev accuracy, {len(scores)} seeds",
             title="One prompt for all texts is not enough; one for each is")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside lower center", ncols=5)
    return figure


def real_model(_: Path) -> plt.Figure:
    """SmolLM2-135M and real SST-2, from compare's committed runs: every seed, by where the prompt starts."""
    results, (figure, axes) = ROOT / "experiments" / "results", axes_of(380)
    starts = {"smollm2-noise": "the prompt starts as noise",
              "smollm2-vocabulary": "the prompt starts as\ntokens of the vocabulary"}
    shown = {"pt": ("prompt tuning", COLOURS["pt"]), "lopa-constant": ("LoPA, the same h for all", "#b98a6a"),
             "lopa": ("LoPA", COLOURS["lopa"])}
    for place, name in enumerate(starts):
        study = seeds(results / name / "runs.jsonl")
        for i, (row, (_, colour)) in enumerate(shown.items()):
            runs = study.get(row, [])                                  # at the rate that was chosen
            if scores := [run["accuracy"] for run in runs if run["lr"] == runs[0]["lr"]]:
                x = place + 0.22 * (i - 1)
                axes.plot([x - 0.07, x + 0.07], [mean(scores)] * 2, color=colour, linewidth=3)
                axes.plot([x] * len(scores), scores, "o", color=colour, alpha=0.6)
    lora = mean(run["accuracy"] for run in seeds(results / "smollm2-lora" / "runs.jsonl")["lora"])
    axes.axhline(lora, color=COLOURS["lora"], linewidth=1.5, linestyle="--", zorder=0)
    axes.set(xlim=(-0.5, 1.5), ylabel="dev accuracy of each seed, and the mean",
             title="On a real model it matters where the prompt starts")
    axes.set_xticks([0, 1], starts.values())
    labels, colours = zip(*shown.values(), ("LoRA, mean", COLOURS["lora"]))
    figure.legend([Patch(color=colour) for colour in colours], labels, loc="outside lower center", ncols=4)
    return figure


def main(folder: Path = Path("runs"), out: Path = ROOT / "assets") -> None:
    for suffix, ink in (("", "#1f2328"), ("-dark", "#e6edf3")):
        for part in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
            plt.rcParams[part] = ink
        for draw in (lopa, two_by_two, swap, accuracy_against_parameters, real_model):
            name = draw.__name__.replace("_", "-") + suffix
            draw(folder).savefig(out / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
