"""Is it the method that does it? Controls, probes on h without the GPT, and accuracy by kind of sentence.

For experiments/compare.py, whose tables have controls ("lopa-blind") and, in the last rows, no method at all.
"""

import statistics
from dataclasses import replace

import tiktoken
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import data
import train
from data import Encoded
from lopa import Adapted, Head
from model import InstanceEncoder
from train import Config, Problem

CONTROLS = {"shuffled": "with another text's h", "constant": "with the same h for all",
            "blind": "without the text"}


def controlled(problem: Problem, control: str | None, seed: int = 0) -> Problem:
    """The problem with something taken away from every text, in training and in scoring.

    "shuffled": its h is that of some other text, so the prompt knows nothing of the text, and is noise.
    "constant": its h is the training split's average, so the prompt knows nothing, without the noise.
    "blind": the text is gone, and the model reads the prompt and the template's end: what it answers, it has
    from h alone. Raises ValueError where the template ends with the text.
    """
    if control is None:
        return problem
    ending = template_ending(problem.task, problem.tokenizer) if control == "blind" else None
    if control == "blind" and not len(ending):
        raise ValueError("control blind: the task has nothing after its text: end its template with a word")
    if control == "shuffled" and min(map(len, (problem.train, *problem.tests.values()))) < 2:
        raise ValueError("control shuffled: a single row has no other text's h: it takes 2")
    generator = torch.Generator().manual_seed(seed)

    def change(split: Encoded) -> Encoded:
        if control == "constant":
            return replace(split, instances=torch.zeros_like(split.instances))     # h is standardised
        if control == "blind":
            return replace(split, tokens=ending.to(split.tokens.device).expand(len(split), -1),
                           lengths=torch.full_like(split.lengths, len(ending)))
        order = torch.randperm(len(split), generator=generator).to(split.labels.device)
        instances = torch.empty_like(split.instances)
        instances[order] = split.instances[order.roll(1)]              # the one before it in a random circle
        return replace(split, instances=instances)

    return replace(problem, train=change(problem.train),
                   tests={name: change(split) for name, split in problem.tests.items()})


def blind_tuned(model: Adapted, problem: Problem) -> None:
    """The control "blind" of a tuned encoder: it reads the text, and the model the template's end."""
    ending = template_ending(problem.task, problem.tokenizer).to(problem.label_ids.device)

    def read(tokens: Tensor, lengths: Tensor, instance: Tensor) -> tuple[Tensor, Tensor]:
        token_embeds = model.gpt.embed(ending.expand(len(tokens), -1))
        inputs_embeds = model.prompt(token_embeds, model.encoder(tokens, lengths))     # (B, m + n, d)
        return inputs_embeds, torch.full_like(lengths, inputs_embeds.shape[1])

    model.read = read


def template_ending(task: data.Task, tokenizer: tiktoken.Encoding) -> Tensor:
    """Token ids of what the template has after its last field, (n,)."""
    return torch.tensor(tokenizer.encode_ordinary(task.template.rpartition("}")[2]), dtype=torch.long)


def hold_out(problem: Problem, count: int) -> Problem:
    """`count` training rows as the rows to score, the others to train on; dev is not in it.

    Drawn with a fixed seed, as many of each label as is its share: a file may be sorted by label.
    """
    N = len(problem.train)
    if not 1 <= count <= N - 2:
        raise ValueError(f"{count} of {N} rows cannot be held out: it takes 1 at least, and has to leave 2")
    drawn = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    labels = problem.train.labels.cpu()[drawn]
    by_label = drawn[labels.argsort(stable=True)] if labels.ndim == 1 else drawn
    held = torch.zeros(N, dtype=torch.bool)
    held[by_label[torch.arange(count) * N // count]] = True            # evenly spaced among the sorted labels
    held = held.to(problem.train.labels.device)
    train, test = problem.train[~held], problem.train[held]
    mean, std = InstanceEncoder.scale(train.instances)                 # of what trains, and no other
    train, test = (replace(split, instances=(split.instances - mean) / std) for split in (train, test))
    return replace(problem, train=train, tests={"held-out training rows": test}, ids={})


def linear_probe(train_h: Tensor, labels: Tensor, test_h: Tensor) -> Tensor:
    """Scores (N, labels) of ridge regression on h: what the instance embedding tells without the GPT."""
    def with_bias(h: Tensor) -> Tensor:                                # on the CPU: Apple GPUs lack float64
        return torch.cat([h, torch.ones_like(h[:, :1])], dim=1).cpu().double()         # (N, d_h + 1)

    X, Y = with_bias(train_h), F.one_hot(labels.cpu()).double()
    # As strong as the data: with many features and few rows a weak one would fit noise.
    ridge = len(X) * torch.eye(X.shape[1], dtype=X.dtype)
    ridge[-1, -1] = 0                                                  # of the bias
    return with_bias(test_h) @ torch.linalg.solve(X.T @ X + ridge, X.T @ Y)


class HiddenLayerProbe(nn.Module):
    """The labels from h alone, without the GPT, by a head as wide as LoPA's: fit trains it like those."""

    def __init__(self, config: Config, problem: Problem):
        super().__init__()
        torch.manual_seed(config.seed)
        self.prompt, self.label_ids, num_labels = None, problem.label_ids, len(problem.label_ids)
        self.head = Head(len(problem.encoder.mean), config.hidden_dim, num_labels, config.dropout)
        self.to(self.label_ids.device)

    def forward(self, tokens: Tensor, lengths: Tensor, instance: Tensor) -> Tensor:
        return self.head(instance)                                     # (B, d_h) -> (B, labels)

    trained, parameter_groups = Adapted.trained, Adapted.parameter_groups


def baselines(config: Config, problem: Problem) -> dict[str, float]:
    """Accuracies without a method: of the commonest label or answer, the bare model, h without the model."""
    before, test = train.without_training(problem), problem.test
    if test.labels.ndim == 2:                                          # answers: no probe has them
        return before
    probe = linear_probe(problem.train.instances, problem.train.labels, test.instances)
    *_, hidden_layer = train.fit(replace(config, quiet=True), HiddenLayerProbe(config, problem), problem)
    return before | dict(linear_probe=problem.accuracy(probe, test),
                         hidden_layer_probe=hidden_layer["accuracy"])


def kind_of_sentence(fields: dict[str, str]) -> str:
    """One of four kinds of a task's example: plain, negated, contrast, negated contrast."""
    words = {word for text in fields.values() for word in text.split()}
    kinds = "negated " * bool(words & data.NEGATIONS) + "contrast" * bool(words & {"but", "although"})
    return kinds.strip() or "plain"


def kinds(problem: Problem) -> list[str]:
    """The kind of every row that is scored; [] where these are not the built-in sample's dev rows."""
    if "built-in sample" not in problem.made_of.get("data", "") or problem.test_name != "dev":
        return []
    return [kind_of_sentence(fields) for fields, _ in problem.task.sample()[1]]


def accuracy_by_kind(problem: Problem, predictions: Tensor) -> dict[str, float]:
    """Accuracy of what was predicted of the sample's dev rows, for each kind of sentence by itself."""
    right = data.right(problem.task, predictions, problem.test.labels, problem.tokenizer).tolist()
    of = kinds(problem)
    return {kind: statistics.fmean(r for r, k in zip(right, of, strict=True) if k == kind)
            for kind in sorted(set(of), key=len)}
