"""Train a soft prompt for a frozen GPT, score it, use it, and compare it with its relatives.

    python train.py --task sst2                            LoPA on the built-in sample, half a minute the first time
    python train.py --task sst2 --method pt                prompt tuning, to compare
    python train.py --task sst2 --data DIR                 real GLUE files: DIR/SST-2/train.tsv and dev.tsv
    python train.py --adapter runs/sst2-lopa-tiny-seed0 --predict "a gorgeous , witty film"
    python train.py --task sst2 --compare                  every method, five seeds, one table
    python train.py --task sst2 --ablate                   LoPA with one thing changed at a time, five seeds

The language model is never changed. What is trained, and all that is saved, is the soft prompt of lopa.py (but for the
two yardsticks: lora adds to the model's weights, full trains all of them).
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import data
from lopa import FUSIONS, METHODS, add_lora, get_nb_trainable_parameters
from model import GPT, InstanceEncoder, cosine_schedule, tiny_gpt

ADAPTER_FORMAT = 1

# Learning rates to try, three for each method; the middle one is the default. `--compare` chooses among them on a slice
# of the training split.
LEARNING_RATES = {
    "lopa": (1e-3, 3e-3, 1e-2), "idpg": (3e-3, 1e-2, 3e-2), "residual": (3e-3, 1e-2, 3e-2),
    "pt": (1e-1, 3e-1, 1.0), "dpt": (1e-2, 3e-2, 1e-1), "bpt": (3e-3, 1e-2, 3e-2),
    "dept": (1e-2, 3e-2, 1e-1), "adept": (3e-3, 1e-2, 3e-2), "lora": (1e-3, 3e-3, 1e-2), "full": (3e-4, 1e-3, 3e-3),
}

# Deviation of the learned prompt at the start. LoPA's is the released code's; a prompt without a gate does better when it
# starts at the size of the tiny GPT's token embeddings (tried on held-out training rows: README.md).
INIT_STD = {"lopa": 1.0, "pt": 0.1, "residual": 0.1, "dept": 0.1, "adept": 0.1}

# ---------------------------------------------------------------------------------------------------------------
# 1. The frozen model: GPT-2's published weights, or the tiny GPT, pre-trained at first use and kept under .cache/


def load_model(name: str, args: argparse.Namespace) -> tuple[GPT, data.tiktoken.Encoding, float]:
    """(frozen model, its tokenizer, seconds of pre-training): "tiny", a GPT-2 by name, or a folder with its weights."""
    seconds = 0.0
    if name == "tiny":
        gpt, tokenizer, seconds = tiny_gpt(args.pretrain_seed, args.cache, args.device)
    else:
        gpt, tokenizer = GPT.from_pretrained(name, args.cache, dtype=getattr(torch, args.dtype)), data.gpt2_tokenizer()
    if gpt.config.vocab_size != tokenizer.n_vocab:
        raise ValueError(f"{name} has {gpt.config.vocab_size} tokens, GPT-2's tokenizer {tokenizer.n_vocab}: "
                         "name a model that was trained with it")
    return gpt.to(args.device).requires_grad_(False).eval(), tokenizer, seconds


# ---------------------------------------------------------------------------------------------------------------
# 2. The model with one method on it: from text to the scores of the label words


class Adapted(nn.Module):
    """A frozen GPT with one method on it. What requires a gradient is what is trained, saved and counted.

    method: a key of lopa.METHODS, or "lora", "full" or "none" (zero-shot). `sizes` are the method's keywords. LoRA, full
    fine-tuning and a tuned encoder work on copies, so `gpt` and `encoder` themselves never change.
    """

    def __init__(self, gpt: GPT, encoder: InstanceEncoder, label_ids: Tensor, method: str,
                 tune_encoder: bool = False, **sizes):
        super().__init__()
        self.gpt, self.label_ids, self.prompt, self.encoder = gpt, label_ids, None, None
        if method in METHODS:
            self.prompt = METHODS[method](embed_dim=gpt.config.n_embd, instance_dim=len(encoder.mean),
                                          max_length=gpt.config.n_positions, **sizes)
        elif method == "lora":
            self.gpt = add_lora(copy.deepcopy(gpt), sizes["rank"])
        elif method == "full":
            self.gpt = copy.deepcopy(gpt).requires_grad_(True)
        if tune_encoder:
            self.encoder = copy.deepcopy(encoder).requires_grad_(True)
            self.encoder.gpt.h = self.encoder.gpt.h[:encoder.num_blocks]       # drop what h never sees
            self.encoder.gpt.ln_f = nn.Identity()
        self.to(label_ids.device)

    def forward(self, tokens: Tensor, lengths: Tensor, instance: Tensor) -> Tensor:
        """Tokens (B, T), lengths (B,), h (B, d_h) -> logits of the label words at the last real token, (B, labels).

        Logits are computed where a target stands and nowhere else: at B positions instead of B (m + T).
        """
        if self.encoder is not None:
            instance = self.encoder(tokens, lengths)
        inputs_embeds = self.gpt.embed(tokens)                         # (B, T, d)
        if self.prompt is not None:
            inputs_embeds = self.prompt(inputs_embeds, instance)       # (B, m + T, d)
        m = inputs_embeds.shape[1] - tokens.shape[1]
        last = self.gpt.hidden_at(inputs_embeds, m + lengths - 1)      # (B, d)
        return self.gpt.logits(last)[:, self.label_ids]

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def batches(split: data.Encoded, indices: Tensor, batch_size: int):
    """(indices, tokens, lengths, labels) per batch, padded no further than the longest text in the batch."""
    for batch in indices.split(batch_size):
        lengths = split.lengths[batch]
        yield batch, split.tokens[batch, :lengths.max()], lengths, split.labels[batch]


@torch.no_grad()
def instance_embeddings(encoder: InstanceEncoder, split: data.Encoded) -> Tensor:
    """h for every row, (N, d_h): computed once, since the encoder is frozen and h never changes."""
    everything = torch.arange(len(split), device=split.labels.device)
    return torch.cat([encoder(tokens, lengths) for _, tokens, lengths, _ in batches(split, everything, 256)])


@torch.no_grad()
def predict(model: Adapted, split: data.Encoded, instances: Tensor) -> Tensor:
    """Probabilities of the labels for every row, (N, labels)."""
    model.eval()
    everything = torch.arange(len(split), device=split.labels.device)
    logits = [model(tokens, lengths, instances[batch]) for batch, tokens, lengths, _ in batches(split, everything, 256)]
    return torch.cat(logits).float().softmax(dim=-1)


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of rows (N, labels) whose largest entry is at the label (N,)."""
    return (probabilities.argmax(dim=-1) == labels).float().mean().item()


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor) -> Tensor:
    """Scores (N, labels) of ridge regression on the instance embeddings: what h alone tells, without the GPT."""
    def with_bias(h: Tensor) -> Tensor:
        return torch.cat([h, torch.ones_like(h[:, :1])], dim=1).double()               # (N, d_h + 1)

    X, Y = with_bias(train), F.one_hot(train_labels).double()
    ridge = 1e-3 * len(X) * torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
    return with_bias(test) @ torch.linalg.solve(X.T @ X + ridge, X.T @ Y)


# ---------------------------------------------------------------------------------------------------------------
# 3. Training


@dataclass
class Problem:
    """All that the methods share, computed once: the frozen model, the encoded splits and their instance embeddings."""

    gpt: GPT
    encoder: InstanceEncoder
    label_ids: Tensor
    train: data.Encoded
    test: data.Encoded
    train_instances: Tensor              # h, (N, d_h)
    test_instances: Tensor
    source: str                          # which data this is
    test_name: str = "dev"
    pretrain_seconds: float = 0.0
    more_tests: dict[str, tuple[data.Encoded, Tensor]] = field(default_factory=dict)      # mnli has two dev sets

    def hold_out(self, count: int) -> "Problem":
        """The last `count` training rows as the rows to score, the others to train on; dev is not in it."""
        if count >= len(self.train):
            raise ValueError(f"--holdout {count} leaves nothing of {len(self.train)} training rows: lower it")
        return replace(self, train=self.train[:-count], train_instances=self.train_instances[:-count],
                       test=self.train[-count:], test_instances=self.train_instances[-count:],
                       test_name="held-out training rows", more_tests={})

    def shuffled(self, seed: int) -> "Problem":
        """The control: every text gets the instance embedding of some other text."""
        order = torch.Generator().manual_seed(seed)
        train, test = (h[torch.randperm(len(h), generator=order).to(h.device)]
                       for h in (self.train_instances, self.test_instances))
        return replace(self, train_instances=train, test_instances=test)

    def baselines(self) -> dict[str, float]:
        zero_shot = Adapted(self.gpt, self.encoder, self.label_ids, "none")
        majority_label = self.train.labels.bincount().argmax()
        probe = linear_probe(self.train_instances, self.train.labels, self.test_instances)
        return dict(majority=(self.test.labels == majority_label).float().mean().item(),
                    zero_shot=accuracy(predict(zero_shot, self.test, self.test_instances), self.test.labels),
                    linear_probe=accuracy(probe, self.test.labels))


def prepare(args: argparse.Namespace) -> Problem:
    """Read the data, load or pre-train the model, encode the texts, compute the instance embeddings."""
    task = data.TASKS[args.task]
    train_rows, dev_rows, source = data.load_task(args.task, args.data, args.max_train, sample=args.model == "tiny",
                                                  cache_dir=args.cache)
    gpt, tokenizer, pretrain_seconds = load_model(args.model, args)
    label_ids = data.label_tokens(task, tokenizer).to(args.device)
    encoder = load_encoder(args.encoder, gpt, args)
    room = text_room(gpt, encoder, args.num_virtual_tokens, args.fusion)
    train, *tests = (data.encode(task, rows, tokenizer, room).to(args.device) for rows in (train_rows, *dev_rows.values()))
    train_instances = encoder.fit(instance_embeddings(encoder, train))
    (name, (test, test_instances)), *more = zip(dev_rows, [(test, instance_embeddings(encoder, test)) for test in tests])
    print(f"task {args.task}: {source}, {len(train)} training rows, {', '.join(f'{len(r)} {n}' for n, r in dev_rows.items())} rows")
    if cut := sum(split.num_cut for split in (train, *tests)):
        print(f"{cut} of {sum(map(len, (train, *tests)))} texts were cut to {room} tokens, to fit the context of "
              f"{gpt.config.n_positions} together with the prompt")
    if args.data and args.model == "tiny":
        print("note: the tiny GPT has read a few thousand synthetic sentences and nothing else, so real text is beyond it "
              "whatever the prompt; real text needs a model pre-trained on real text: --model gpt2")
    problem = Problem(gpt, encoder, label_ids, train, test, train_instances, test_instances, source, name,
                      pretrain_seconds, dict(more))
    return problem.hold_out(args.holdout) if args.holdout else problem


def load_encoder(name: str | None, gpt: GPT, args: argparse.Namespace) -> InstanceEncoder:
    """The instance encoder: the frozen model itself, or another GPT-2 that reads the same tokens."""
    other = load_model(name, args)[0] if name else gpt
    if other.config.vocab_size != gpt.config.vocab_size:
        raise ValueError(f"encoder {name} has {other.config.vocab_size} tokens and the model {gpt.config.vocab_size}: "
                         "they have to share a tokenizer")
    return InstanceEncoder(other)


def text_room(gpt: GPT, encoder: InstanceEncoder, num_virtual_tokens: int, fusion: str) -> int:
    """How many tokens of text fit into the context behind the prompt. Raises ValueError if none do."""
    context, m = gpt.config.n_positions, num_virtual_tokens * (2 if fusion == "concat" else 1)
    if m >= context:
        raise ValueError(f"{m} prompt tokens leave no room for text in a context of {context}: lower --num-virtual-tokens")
    return min(context - m, encoder.gpt.config.n_positions)


def train_epochs(model: Adapted, split: data.Encoded, instances: Tensor, *, epochs: int, batch_size: int, lr: float,
                 seed: int) -> Iterator[float]:
    """Train what requires a gradient, in place, with AdamW, warm-up and cosine decay; yields each epoch's mean loss.

    Raises FloatingPointError, naming step and learning rate, at the first loss that is not finite.
    """
    parameters = list(model.trained().values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    total_steps = epochs * math.ceil(len(split) / batch_size)
    schedule = cosine_schedule(optimizer, int(0.06 * total_steps), total_steps)
    order = torch.Generator().manual_seed(seed)                        # of the data alone
    progress = tqdm(total=total_steps, desc="training", disable=None, leave=False)
    for _ in range(epochs):
        model.train()
        total_loss = 0.0
        shuffled = torch.randperm(len(split), generator=order).to(split.labels.device)
        for batch, tokens, lengths, labels in batches(split, shuffled, batch_size):
            logits = model(tokens, lengths, instances[batch])          # (B, labels)
            loss = F.cross_entropy(logits.float(), labels)             # over the label words alone
            if not math.isfinite(loss_value := loss.item()):
                raise FloatingPointError(f"loss is {loss_value} at step {progress.n + 1} of {total_steps}, learning rate "
                                         f"{schedule.get_last_lr()[0]:.2e}: lower --lr")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            total_loss += loss_value * len(batch)
            progress.update()
            progress.set_postfix(loss=f"{loss_value:.3f}", refresh=False)
        yield total_loss / len(split)
    progress.close()


# What tells one run from another on the same problem: what is built, and how it is trained.
MODEL_OPTIONS = ("method", "num_virtual_tokens", "rank", "hidden_dim", "dropout", "fusion", "init_std", "phm", "tune_encoder")
TRAINING_OPTIONS = ("lr", "epochs", "batch_size", "seed")


def build(problem: Problem, options: dict) -> Adapted:
    """The frozen model with one method on it, its initial values drawn from the seed."""
    torch.manual_seed(options["seed"])
    return Adapted(problem.gpt, problem.encoder, problem.label_ids, **{name: options[name] for name in MODEL_OPTIONS})


def fit(model: Adapted, problem: Problem, options: dict) -> Iterator[dict]:
    """Train `model` in place; yields dict(epoch, loss, accuracy, seconds) after every epoch."""
    if options["shuffle_instances"]:
        problem = problem.shuffled(options["seed"])
    began = time.time()
    losses = train_epochs(model, problem.train, problem.train_instances, **{name: options[name] for name in TRAINING_OPTIONS})
    for epoch, loss in enumerate(losses, start=1):
        score = accuracy(predict(model, problem.test, problem.test_instances), problem.test.labels)
        yield dict(epoch=epoch, loss=loss, accuracy=score, seconds=time.time() - began)


# ---------------------------------------------------------------------------------------------------------------
# 4. Files


def load_adapter(folder: str | Path) -> dict:
    """The content of DIR/adapter.pt, as `run` saved it."""
    path = Path(folder) / "adapter.pt"
    adapter = data.load_file(path)
    if not isinstance(adapter, dict) or adapter.get("format") != ADAPTER_FORMAT:
        raise ValueError(f"{path} is no adapter of format {ADAPTER_FORMAT}: train it again with this version")
    return adapter


def fingerprint(gpt: GPT, encoder: InstanceEncoder) -> str:
    """Of all frozen weights that an adapter depends on."""
    return gpt.fingerprint() + ("" if encoder.gpt is gpt else "+" + encoder.gpt.fingerprint())


def restore(adapter: dict, gpt: GPT, encoder: InstanceEncoder, label_ids: Tensor) -> Adapted:
    """An adapter, and the frozen model and encoder that it was trained on -> the adapted model; fits the encoder too.

    Raises ValueError for another model and for missing, unexpected or misshapen tensors.
    """
    if adapter["fingerprint"] != (at_hand := fingerprint(gpt, encoder)):
        raise ValueError(f"this adapter was trained on another model ({adapter['fingerprint']}) than the one "
                         f"at hand ({at_hand}): use that model or train again")
    encoder.mean, encoder.std = (adapter[name].to(label_ids.device) for name in ("instance_mean", "instance_std"))
    model = Adapted(gpt, encoder, label_ids, **adapter["model_options"])
    wanted, found = model.trained(), adapter["tensors"]
    for name in sorted(wanted.keys() | found.keys()):
        shapes = [list(tensors[name].shape) if name in tensors else None for tensors in (wanted, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"adapter tensor {name!r}: the method needs {shapes[0] or 'none'}, "
                             f"the file has {shapes[1] or 'none'}: the file is damaged, train again")
        wanted[name].data.copy_(found[name])
    return model


def claim_folder(path: Path, config: dict) -> list[dict]:
    """The lines that the file of a run holds already, its config first; [config] for a new run.

    Raises ValueError if the folder holds a run of another configuration, which would be overwritten.
    """
    if not path.exists():
        return [config]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for name in config:
        if lines[0].get(name) != config[name]:
            raise ValueError(f"{path.parent} holds another run: {name} is {lines[0].get(name)} there and {config[name]} "
                             "here: name another folder with --out")
    return lines


# ---------------------------------------------------------------------------------------------------------------
# 5. What the command line can ask for: a run, a prediction, a study


def configs(args: argparse.Namespace, problem: Problem) -> tuple[dict, dict]:
    """(what the problem is, the options of a run on it): together they say all that a result depends on."""
    about = dict(task=args.task, data=problem.source, model=args.model, encoder=args.encoder or args.model, dtype=args.dtype,
                 fingerprint=fingerprint(problem.gpt, problem.encoder), pretrain_seed=args.pretrain_seed,
                 num_train=len(problem.train), num_scored=len(problem.test), scored_on=problem.test_name,
                 texts_cut=problem.train.num_cut + problem.test.num_cut)
    return about, {name: getattr(args, name) for name in (*MODEL_OPTIONS, "shuffle_instances", *TRAINING_OPTIONS)}


def run(args: argparse.Namespace) -> None:
    """Train and score one method; leave result.json, metrics.jsonl and adapter.pt in the run folder."""
    out, problem = Path(args.out or default_folder(args)), prepare(args)
    about, options = configs(args, problem)
    claim_folder(out / "metrics.jsonl", about | options)
    model = build(problem, options)
    trainable, total = get_nb_trainable_parameters(model)
    before = problem.baselines()
    print("config: " + ", ".join(f"{name} {value}" for name, value in (about | options).items()))
    print(f"trainable: {trainable:,} of {total:,} parameters; the instance encoder is {args.encoder or 'the model itself'}, "
          + ("a copy, trained and counted too" if args.tune_encoder else "frozen"))
    print(f"before training, accuracy on {problem.test_name}: majority class {before['majority']:.3f}, zero-shot "
          f"{before['zero_shot']:.3f}, linear probe on the instance embedding {before['linear_probe']:.3f}")
    adapter = dict(format=ADAPTER_FORMAT, task_name=args.task, task=asdict(data.TASKS[args.task]) | {"sample": None},
                   **{name: about[name] for name in ("model", "encoder", "dtype", "pretrain_seed", "fingerprint")},
                   model_options={name: options[name] for name in MODEL_OPTIONS},
                   instance_mean=problem.encoder.mean.cpu(), instance_std=problem.encoder.std.cpu())
    metrics = [about | options]
    try:
        for line in fit(model, problem, options):
            metrics.append(line)
            print(f"epoch {line['epoch']}/{args.epochs}: loss {line['loss']:.4f}, {problem.test_name} accuracy "
                  f"{line['accuracy']:.3f}, {line['seconds']:.1f} s", flush=True)
            (out / "result.json").unlink(missing_ok=True)      # of an earlier, equal run: its adapter is gone now
            tensors = {name: tensor.detach().cpu() for name, tensor in model.trained().items()}
            data.save_file(out / "adapter.pt", adapter | {"tensors": tensors})
            data.save_file(out / "metrics.jsonl", metrics)
    except (KeyboardInterrupt, FloatingPointError) as error:
        kept = f"{out} holds the adapter after epoch {len(metrics) - 1}" if len(metrics) > 1 else "nothing was saved yet"
        raise type(error)(f"{str(error) or 'interrupted'}; {kept}") from None
    scores = {f"accuracy_{name}": accuracy(predict(model, split, h), split.labels)
              for name, (split, h) in problem.more_tests.items()}
    if "f1" in data.TASKS[args.task].metrics:
        probabilities = predict(model, problem.test, problem.test_instances)
        scores["f1"] = data.f1(probabilities.argmax(dim=-1), problem.test.labels)
    result = about | options | before | scores | dict(
        accuracy=line["accuracy"], trainable_parameters=trainable, total_parameters=total, train_seconds=line["seconds"],
        pretrain_seconds=problem.pretrain_seconds, torch=torch.__version__, device=args.device)
    data.save_file(out / "result.json", result)
    print(f"wrote {out}/adapter.pt, metrics.jsonl and result.json; to use it: "
          f'python train.py --adapter {out} --predict "..."')
    print(json.dumps(result))


def predict_text(args: argparse.Namespace) -> None:
    """Print label and probabilities of one text, with a saved adapter and nothing else that was trained."""
    adapter = load_adapter(args.adapter)
    task = data.Task(**adapter["task"])
    texts = args.predict.split("\t")
    if len(texts) != len(task.fields):
        raise ValueError(f"--predict got {len(texts)} texts, task {adapter['task_name']} takes {len(task.fields)} "
                         f"({', '.join(task.fields)}): separate them with a tab")
    args.pretrain_seed, args.dtype = adapter["pretrain_seed"], adapter["dtype"]
    gpt, tokenizer, _ = load_model(adapter["model"], args)
    encoder = load_encoder(None if adapter["encoder"] == adapter["model"] else adapter["encoder"], gpt, args)
    model = restore(adapter, gpt, encoder, data.label_tokens(task, tokenizer).to(args.device))
    options = adapter["model_options"]
    room = text_room(gpt, encoder, options["num_virtual_tokens"], options["fusion"])
    split = data.encode(task, [(dict(zip(task.fields, texts)), 0)], tokenizer, room).to(args.device)
    probabilities = predict(model, split, instance_embeddings(encoder, split))[0]
    print("\t".join([task.label_names[probabilities.argmax()],
                     *(f"{name} {p:.3f}" for name, p in zip(task.label_names, probabilities))]))


# For `--compare`: what is trained, and with whom it lives when one model serves many users.
TRAINED = {"pt": "Z_S; user", "dpt": "A, B; user", "bpt": "A, B; user", "residual": "P and an MLP; user",
           "dept": "P and offsets by position; user", "adept": "P and offsets by token; user",
           "idpg": "one head on h; user", "lopa": "Z_S and two heads on h; user",
           "lora": "updates of q, k, v; server", "full": "every weight; server"}

# For `--ablate`: a name, and what is changed.
ABLATIONS = [("as it is", {}), ("rank 1", dict(rank=1)), ("rank 2", dict(rank=2)), ("rank 8", dict(rank=8)),
             ("5 virtual tokens", dict(num_virtual_tokens=5)), ("25 virtual tokens", dict(num_virtual_tokens=25)),
             ("concat instead of the gate", dict(fusion="concat")), ("add instead of the gate", dict(fusion="add")),
             ("max instead of the gate", dict(fusion="max")), ("the encoder tuned too", dict(tune_encoder=True)),
             ("instance embeddings shuffled", dict(shuffle_instances=True))]


def study(args: argparse.Namespace) -> None:
    """`--compare` or `--ablate`: each entry with the learning rate that is best on held-out training rows, then several
    seeds, the last epoch scored on dev. Every finished run is a line of a file, and is not run again."""
    out, problem = Path(args.out or default_folder(args)), prepare(args)
    about, options = configs(args, problem)
    about |= {"options": {name: value for name, value in options.items() if name not in ("method", "lr", "seed", "init_std")}}
    lines = claim_folder(out / "runs.jsonl", about)

    def finished(stage: str, problem: Problem, **change) -> dict:
        wanted = dict(stage=stage, **options | change)
        for line in lines[1:]:
            if wanted.items() <= line.items():
                return line
        model = build(problem, options | change)
        *_, last = fit(model, problem, options | change)
        lines.append(wanted | last | {"trainable_parameters": get_nb_trainable_parameters(model)[0]})
        data.save_file(out / "runs.jsonl", lines)
        print(f"  {stage} {len(lines) - 1}: {change}, accuracy {last['accuracy']:.3f}, {last['seconds']:.1f} s", flush=True)
        return lines[-1]

    held_out = problem.hold_out(len(problem.train) // 5)               # a fifth of the training split; dev stays unseen
    entries = ([(method, TRAINED[method], dict(method=method, init_std=INIT_STD.get(method, 1.0))) for method in args.methods]
               if args.compare else [(name, "", dict(method="lopa", init_std=1.0) | change) for name, change in ABLATIONS])
    rows = []
    for name, trained, change in entries:
        trials = [finished("trial", held_out, **change, lr=lr, seed=0) for lr in LEARNING_RATES[change["method"]]]
        lr = max(trials, key=lambda trial: trial["accuracy"])["lr"]
        runs = [finished("seed", problem, **change, lr=lr, seed=seed) for seed in args.seeds]
        scores = [run["accuracy"] for run in runs]
        spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
        rows.append([name, trained, f"{runs[0]['trainable_parameters']:,}", f"{statistics.mean(scores):.3f}{spread}",
                     f"{lr:g}", f"{statistics.mean(run['seconds'] for run in runs):.1f}"])
        print(f"{name}: {rows[-1][3]}", flush=True)
    if args.compare:
        probe_size = (len(problem.encoder.mean) + 1) * len(problem.label_ids)
        rows += [[name.replace("_", " "), "", f"{probe_size if name == 'linear_probe' else 0}", f"{score:.3f}", "", ""]
                 for name, score in problem.baselines().items()]
    header = ["method" if args.compare else "LoPA", "what is trained; it lives with", "trainable",
              f"{problem.test_name} accuracy", "learning rate", "seconds"]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in [header, ["---"] * len(header), *rows])
    (out / "table.md").write_text(table)
    print(f"\n{args.task}, {problem.source}, {len(args.seeds)} seeds:\n\n{table}\nwrote {out}/table.md and runs.jsonl")


def default_folder(args: argparse.Namespace) -> str:
    """runs/TASK-METHOD-MODEL-seedN, and what else was asked for, so that different runs get different folders."""
    kind = "compare" if args.compare else "ablate" if args.ablate else f"{args.method}-{Path(args.model).name}-seed{args.seed}"
    name = f"{args.task}-{kind}"
    if kind in ("compare", "ablate") and args.model != "tiny":
        name += f"-{Path(args.model).name}"
    if args.data:
        name += f"-{Path(args.data).resolve().name}"
    for flag in args.changed:
        value = getattr(args, flag)
        name += f"-{flag.replace('_', '-')}" + ("" if value is True else f"-{value}")
    return f"runs/{name}"


# ---------------------------------------------------------------------------------------------------------------
# 6. The command line


def positive(number_type):
    def parse(text: str):
        try:
            value = number_type(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value
    return parse


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to train")
    what.add_argument("--task", choices=data.TASKS, help="an entry of TASKS in data.py")
    what.add_argument("--method", choices=LEARNING_RATES, default="lopa", metavar="METHOD",
                      help=f"one of {', '.join(LEARNING_RATES)} (default: lopa)")
    what.add_argument("--model", default="tiny", metavar="MODEL", help="the frozen model: tiny, pre-trained at first use; gpt2, "
                      "gpt2-medium, gpt2-large, gpt2-xl, downloaded; or a folder with GPT-2 weights (default: tiny)")
    what.add_argument("--encoder", metavar="MODEL", help="another model for the instance embedding (default: the same)")
    what.add_argument("--data", metavar="DIR", help="folder of GLUE files instead of the built-in sample")
    what.add_argument("--max-train", type=positive(int), metavar="N", help="use N random training rows")
    what.add_argument("--out", metavar="DIR", help="run folder (default: a name under runs/ that says what is in it)")

    how = parser.add_argument_group("how to train it")
    how.add_argument("--seed", type=int, default=0, help="of the prompt's initial values and the data order (default: 0)")
    how.add_argument("--epochs", type=positive(int), default=10, help="default: 10; the last one is scored")
    how.add_argument("--batch-size", type=positive(int), default=32, help="default: 32")
    how.add_argument("--lr", type=positive(float), help="peak learning rate (default: the middle one that --compare tries, "
                     + ", ".join(f"{method} {rates[1]:g}" for method, rates in LEARNING_RATES.items()) + ")")
    how.add_argument("--init-std", type=positive(float), metavar="STD", help="deviation of the learned prompt at the start "
                     "(default: 1 for lopa, as in the released code, else 0.1)")
    how.add_argument("--num-virtual-tokens", type=positive(int), default=10, metavar="m", help="default: 10")
    how.add_argument("--rank", type=positive(int), default=4, metavar="r", help="of U and V (default: 4)")
    how.add_argument("--hidden-dim", type=positive(int), metavar="H",
                     help="of the heads (default: 64 for tiny, else 256)")
    how.add_argument("--fusion", choices=FUSIONS, default="gate", help="how Z_S and Z_I meet in LoPA (default: gate)")
    how.add_argument("--dropout", type=float, help="on h (default: 0 for tiny, whose h is 64 numbers; else 0.1 as released)")

    how.add_argument("--phm", type=positive(int), default=0, metavar="n", help="IDPG with sums of n Kronecker products")
    how.add_argument("--tune-encoder", action="store_true",
                     help="train a copy of the GPT as instance encoder too, as the released GLUE code does by default")

    check = parser.add_argument_group("to check a claim")
    check.add_argument("--compare", action="store_true", help="every method, learning rates chosen, one table")
    check.add_argument("--ablate", action="store_true", help="LoPA with one thing changed at a time, one table")
    check.add_argument("--methods", type=lambda text: text.split(","), default=list(TRAINED), metavar="A,B",
                       help="with --compare: these alone")
    check.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2, 3, 4],
                       metavar="0,1", help="with --compare and --ablate (default: 0,1,2,3,4)")
    check.add_argument("--holdout", type=positive(int), metavar="N",
                       help="score on the last N training rows, not trained on, instead of dev: for choosing --lr")
    check.add_argument("--shuffle-instances", action="store_true",
                       help="give every text another text's instance embedding: LoPA without its instance")
    check.add_argument("--pretrain-seed", type=int, default=0, help="of the tiny GPT (default: 0)")

    use = parser.add_argument_group("to use what was trained")
    use.add_argument("--predict", metavar="TEXT", help="print the label of TEXT and the probabilities")
    use.add_argument("--adapter", metavar="DIR", help="run folder to predict with")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                         help="of the frozen GPT-2; what is trained stays float32 (default: float32)")
    machine.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: auto")
    machine.add_argument("--cache", metavar="DIR", default=str(Path(__file__).parent / ".cache"),
                         help="where models and data are kept (default: .cache beside train.py)")
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.predict is None) != (args.adapter is None):
        parser.error("--predict TEXT and --adapter DIR go together")
    if args.task is None and args.predict is None:
        parser.error(f"name a task: --task {' or '.join(data.TASKS)}")
    named = {"task", "method", "model", "data", "out", "seed", "predict", "adapter", "device", "cache", "compare", "ablate",
             "methods", "seeds"}
    args.changed = [name for name, value in vars(args).items()
                    if name not in named and value != parser.get_default(name)]
    tiny = args.model == "tiny"
    args.hidden_dim = args.hidden_dim or (64 if tiny else 256)
    args.dropout = args.dropout if args.dropout is not None else 0.0 if tiny else 0.1
    if not 0 <= args.dropout < 1:
        parser.error(f"argument --dropout: {args.dropout} is not between 0 and 1")
    args.lr = args.lr or LEARNING_RATES[args.method][1]
    args.init_std = args.init_std or INIT_STD.get(args.method, 1.0)
    if unknown := set(args.methods) - set(TRAINED):
        parser.error(f"argument --methods: {', '.join(sorted(unknown))} is none of {', '.join(TRAINED)}")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if args.device == "auto":
        args.device = next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[args.device]:
        parser.error(f"argument --device: PyTorch finds no {args.device} here: use --device auto")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for bad input, 130 for Ctrl-C."""
    args = parse_args(argv)
    try:
        if args.predict is not None:
            predict_text(args)
        elif args.compare or args.ablate:
            study(args)
        else:
            run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"train.py: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
