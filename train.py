"""Train a soft prompt for a frozen GPT, score it, and use it.

    python train.py --task sst2                          LoPA on the built-in sample, half a minute at first
    python train.py --task sst2 --method pt              prompt tuning, to compare
    python train.py --task sst2 --data DIR               real GLUE files: DIR/SST-2/train.tsv and dev.tsv
    python train.py --adapter runs/sst2-lopa-tiny-seed0 --predict "a witty film"   or a file, or - for stdin
    python train.py --resume runs/sst2-lopa-tiny-seed0   go on after a crash, bit for bit
    torchrun --nproc_per_node=2 train.py --task sst2     several processes share every batch

The language model is never changed. What is trained, and all that is saved, is the soft prompt of lopa.py
(but for the two yardsticks: lora adds to the model's weights, full trains all of them). The way of a text
through this file:

    text -> tokens, and h from the frozen encoder      prepare
    h -> prompt -> logits of the label words           Adapted.forward
    logits -> loss -> a step, over and over            fit
    a step -> a checkpoint to go on from               save_checkpoint
    trained -> accuracy, adapter.pt, result.json       run
"""

import argparse
import copy
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn, get_args

import tiktoken
import torch
from torch import Tensor, distributed as dist, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from lopa import FUSIONS, METHODS, add_lora, get_nb_trainable_parameters
from model import GPT, PRETRAINING, InstanceEncoder, cosine_factor, pretrain, tiny_config

# Peak learning rates, chosen on held-out training rows of the sample: experiments/README.md.
LEARNING_RATES = {"lopa": 3e-3, "idpg": 1e-2, "pt": 3e-1, "dpt": 3e-2, "bpt": 1e-2, "residual": 1e-2,
                  "dept": 3e-2, "adept": 1e-2, "lora": 3e-3, "full": 1e-3}

# Deviation of the learned prompt at the start. LoPA's is the released code's; a prompt without a gate does
# better when it starts at the size of the tiny GPT's token embeddings (chosen in the same way).
INIT_STD = {"lopa": 1.0, "pt": 0.1, "residual": 0.1, "dept": 0.1, "adept": 0.1}

# ------------------------------------------------------------------------------------------------------------
# 1. What a run is


@dataclass
class Config:
    """All that a result depends on, then where and how to run. Each field is a flag, hidden_dim --hidden-dim,
    and the comment beside it what --help says of it.

    What is None gets the default of its method or model. For another method or model make a new Config:
    dataclasses.replace would keep the old one's defaults.
    """

    # What to train
    task: str                            # an entry of TASKS in data.py
    method: str = "lopa"                 # one of lopa.py's METHODS; lora and full change the model itself
    model: str = "tiny"                  # frozen: tiny; gpt2, gpt2-medium, ..., downloaded; or its folder
    encoder: str | None = None           # another model for the instance embedding h (default: the same)
    data: str | None = None              # folder of GLUE files instead of the built-in sample
    max_train: int | None = None         # how many random training rows to use (default: all)
    # How to train it
    seed: int = 0                        # of the prompt's initial values and the order of the rows
    epochs: int = 10                     # passes through the training rows; the last one is scored
    batch_size: int = 32                 # rows of one step
    lr: float | None = None              # peak learning rate (default: of the method, in LEARNING_RATES)
    init_std: float | None = None        # of Z_S at the start (default: 1 for lopa as released, else 0.1)
    num_virtual_tokens: int = 10         # m, length of the prompt
    rank: int = 4                        # r, of U and V
    hidden_dim: int | None = None        # H, of the heads (default: 64 for tiny, else 256)
    fusion: str = "gate"                 # how Z_S and Z_I meet in LoPA
    dropout: float | None = None         # on h (default: 0 for tiny, whose h is short, else 0.1 as released)
    tune_encoder: bool = False           # train a copy of the GPT as encoder too, as released for GLUE
    dtype: str = "float32"               # of the frozen GPT-2; what is trained stays float32
    # To check a claim
    holdout: int | None = None           # how many training rows to score instead of dev: for choosing --lr
    shuffle_instances: bool = False      # give every text another text's h: LoPA without its instance
    pretrain_seed: int = 0               # of the tiny GPT
    # Where and how to run: what follows does not decide the result
    out: str | None = None               # run folder (default: a name under runs/ that says what is in it)
    save_every: int | None = None        # steps between checkpoints (default: an epoch's)
    quiet: bool = False                  # print the result alone, as one line of JSON
    device: str = "auto"                 # where to compute
    cache: str = str(Path(__file__).parent / ".cache")     # where models and data are kept

    def __post_init__(self):
        tiny = self.model == "tiny"
        self.encoder = self.encoder or self.model
        self.lr = LEARNING_RATES[self.method] if self.lr is None else self.lr
        self.init_std = INIT_STD.get(self.method, 1.0) if self.init_std is None else self.init_std
        self.hidden_dim = (64 if tiny else 256) if self.hidden_dim is None else self.hidden_dim
        self.dropout = (0.0 if tiny else 0.1) if self.dropout is None else self.dropout
        if not 0 <= self.dropout < 1:
            raise ValueError(f"argument --dropout: {self.dropout} is not between 0 and 1")
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        if self.device == "auto":
            self.device = next(name for name in there if there[name])
        if not there[self.device.partition(":")[0]]:
            raise ValueError(f"argument --device: PyTorch finds no {self.device} here: use --device auto")

    def deciding(self) -> dict:
        """The fields that decide the result, by name."""
        options = asdict(self)
        return {name: options[name] for name in itertools.takewhile(lambda name: name != "out", options)}

    @property
    def folder(self) -> Path:
        """--out, or runs/TASK-METHOD-MODEL-seedN followed by every field that is not as usual."""
        usual = Config(self.task, self.method, self.model, seed=self.seed).deciding()
        name = f"{self.task}-{self.method}-{Path(self.model).resolve().name}-seed{self.seed}"
        for option, value in self.deciding().items():
            if value != usual[option]:
                last_part = Path(str(value)).resolve().name            # for values that are paths
                name += "-" + option.replace("_", "-") + ("" if value is True else f"-{last_part}")
        return Path(self.out or f"runs/{name}")

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)


# ------------------------------------------------------------------------------------------------------------
# 2. The model with one method on it: from text to the scores of the label words


class Adapted(nn.Module):
    """A frozen GPT with one method on it. What requires a gradient is what is trained, saved and counted.

    config.method: a key of lopa.METHODS, or "lora", "full" or "none" (zero-shot). LoRA, full fine-tuning and
    a tuned encoder work on copies: `gpt` and `encoder` themselves never change. label_ids: (labels,), tokens.
    """

    def __init__(self, config: Config, gpt: GPT, encoder: InstanceEncoder, label_ids: Tensor):
        super().__init__()
        self.gpt, self.label_ids, self.prompt, self.encoder = gpt, label_ids, None, None
        if config.method in METHODS:
            self.prompt = METHODS[config.method](
                embed_dim=gpt.config.n_embd, instance_dim=len(encoder.mean),
                num_virtual_tokens=config.num_virtual_tokens, rank=config.rank, hidden_dim=config.hidden_dim,
                dropout=config.dropout, fusion=config.fusion, init_std=config.init_std,
                max_length=gpt.config.n_positions)
        elif config.method == "lora":
            self.gpt = add_lora(copy.deepcopy(gpt), config.rank)
        elif config.method == "full":
            self.gpt = copy.deepcopy(gpt).requires_grad_(True)
        elif config.method != "none":
            raise ValueError(f"unknown method {config.method!r}: choose one of {', '.join(LEARNING_RATES)}")
        if config.tune_encoder:
            self.encoder = copy.deepcopy(encoder).requires_grad_(True)
            self.encoder.gpt.h = self.encoder.gpt.h[:encoder.num_blocks]       # drop what h never sees
            self.encoder.gpt.ln_f = nn.Identity()
        self.to(label_ids.device)

    def forward(self, tokens: Tensor, lengths: Tensor, instance: Tensor) -> Tensor:
        """Tokens (B, T), lengths (B,), h (B, d_h) -> label words' logits at the last real token, (B, labels).

        Logits are computed where a target stands and nowhere else: at B positions instead of B (m + T).
        """
        if self.encoder is not None:
            instance = self.encoder(tokens, lengths)
        inputs_embeds = self.gpt.embed(tokens)                         # (B, T, d)
        if self.prompt is not None:
            inputs_embeds = self.prompt(inputs_embeds, instance)       # (B, m + T, d)
        m = inputs_embeds.shape[1] - tokens.shape[1]
        last = self.gpt.hidden_at(inputs_embeds, m + lengths - 1)      # (B, d)
        logits = self.gpt.logits(last, self.label_ids)                 # (B, labels)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))     # bfloat16 is coarse

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------------
# 3. Training


def fit(config: Config, model: Adapted, problem: "Problem", folder: Path | None = None,
        state: dict | None = None) -> list[dict]:
    """Train `model` in place; returns dict(epoch, loss, accuracy, seconds) for every epoch.

    With a folder it leaves checkpoints there, and `state`, what one of them holds, is where to go on from.
    The order of the rows, the rate and the dropout of a step are functions of (seed, step) alone, so a
    checkpoint is tensors, a step and metrics. Of several processes each takes its part of every batch.
    Raises FloatingPointError for a loss or weight that is not finite, KeyboardInterrupt for Ctrl-C.
    """
    began, split = time.time(), problem.train
    process, num_processes = rank_and_world_size()
    if (smallest := (len(split) - 1) % config.batch_size + 1) < num_processes:
        raise ValueError(f"the last batch has {smallest} rows for {num_processes} processes: "
                         "change --batch-size")
    steps_per_epoch = math.ceil(len(split) / config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    warmup_steps, save_every = int(0.06 * total_steps), config.save_every or steps_per_epoch
    parameters = list(model.trained().values())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
    forward = DistributedDataParallel(model, init_sync=False) if num_processes > 1 else model
    shuffle = torch.Generator().manual_seed(config.seed)               # of the order of the rows alone
    done, losses, metrics = 0, [], []
    if state:
        done, losses, metrics = restore_checkpoint(state, model, optimizer)
        began -= state["seconds"]
    progress = tqdm(total=total_steps, initial=done, desc="training", leave=False,
                    disable=config.quiet or None)                      # None: shown on a terminal alone
    with progress, ctrl_c_noted(on=folder is not None) as pressed:
        for epoch in range(1, config.epochs + 1):
            first_step, last_step = (epoch - 1) * steps_per_epoch + 1, epoch * steps_per_epoch
            order = shuffled_batches(split, config.batch_size, shuffle)        # of finished epochs too: it
            model.train()                                                      # moves the generator on
            for step, (batch, share) in enumerate(parts(split, order), start=first_step):
                if step <= done:
                    continue
                lr = config.lr * cosine_factor(step - 1, warmup_steps, total_steps)
                optimizer.param_groups[0]["lr"] = lr
                seed_dropout((config.seed * total_steps + step - 1) * num_processes + process, config.device)
                logits = forward(batch.tokens, batch.lengths, batch.instances)         # (B, labels)
                loss = F.cross_entropy(logits, batch.labels)           # over the label words alone
                optimizer.zero_grad()
                (loss * share).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                losses.append(loss.detach() * len(batch))
                progress.update()

                saves = bool(folder and (step % save_every == 0 or pressed))
                if step % 10 == 0 or step == last_step or saves:       # not always: it waits for the GPU
                    require_finite(losses[-10:], parameters, step, total_steps, lr)
                    progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                if step == last_step:
                    mean_loss = per_process(losses).sum().item() / len(split)
                    score = accuracy(predict(model, problem.test), problem.test.labels)
                    seconds, losses = time.time() - began, []
                    metrics.append(dict(epoch=epoch, loss=mean_loss, accuracy=score, seconds=seconds))
                    config.say(f"epoch {epoch}/{config.epochs}: loss {mean_loss:.4f}, {problem.test_name} "
                               f"accuracy {score:.3f}, {seconds:.1f} s")
                if saves:
                    save_checkpoint(folder, saved(config, model, problem) | dict(
                        config=asdict(config), step=step, losses=per_process(losses), metrics=metrics,
                        seconds=time.time() - began, optimizer=optimizer.state_dict()))
                if pressed:
                    raise KeyboardInterrupt(f"interrupted at step {step} of {total_steps}")
    return metrics


def shuffled_batches(split: data.Encoded, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """The row numbers of one epoch's batches, in random order.

    Where lengths vary much, a batch of random texts is mostly padding (on SST-2, 36 positions for 14 tokens).
    There every 50 batches' worth of rows is sorted by length, cut into batches, and these are shuffled.
    """
    order = torch.randperm(len(split), generator=generator)
    if not split.ragged:
        return list(order.to(split.labels.device).split(batch_size))
    lengths = split.lengths.cpu()
    pools = [pool[lengths[pool].argsort()] for pool in order.split(50 * batch_size)]
    cut = torch.cat(pools).to(split.labels.device).split(batch_size)
    return [cut[i] for i in torch.randperm(len(cut), generator=generator)]


def parts(split: data.Encoded, order: Sequence[Tensor]) -> Iterator[tuple[data.Encoded, float]]:
    """This process's part of each batch, and the weight of its mean loss.

    The gradients are averaged over the processes; so weighted, the average is the whole batch's gradient.
    """
    process, num_processes = rank_and_world_size()
    shares = [rows[process::num_processes] for rows in order]
    for rows, whole, batch in zip(shares, order, batches(split, shares)):
        yield batch, len(rows) * num_processes / len(whole)


def batches(split: data.Encoded, order: Sequence[Tensor]) -> Iterator[data.Encoded]:
    """The rows that each tensor of `order` names, padded to the longest text among them."""
    if order:
        widths = torch.stack([split.lengths[rows].max() for rows in order]).tolist()   # asks a GPU just once
        for rows, width in zip(order, widths):
            batch = split[rows]
            yield replace(batch, tokens=batch.tokens[:, :width])


def seed_dropout(seed: int, device: str) -> None:
    """Seed the one generator that dropout draws from: torch.manual_seed seeds all, in 0.5 ms of each step."""
    if device.startswith("cuda"):
        torch.cuda.manual_seed(seed)
    elif device == "mps":
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def require_finite(losses: list[Tensor], parameters: list[Tensor], step: int, total_steps: int,
                   lr: float) -> None:
    """FloatingPointError if one of these losses, which end at `step`, or a weight after it is not finite."""
    for number, loss in enumerate(torch.stack(losses).tolist(), start=step - len(losses) + 1):
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {number} of {total_steps}, learning rate "
                                     f"{lr:.2e}: start again with a lower --lr")
    if not all(p.isfinite().all() for p in parameters):
        raise FloatingPointError(f"weights are not finite after step {step} of {total_steps}, learning rate "
                                 f"{lr:.2e}: start again with a lower --lr")


def per_process(losses: list[Tensor]) -> Tensor:
    """Every process's losses, (processes, steps), in float64: their sum does not depend on who adds them."""
    return torch.tensor(gathered([loss.item() for loss in losses]), dtype=torch.float64)


@contextmanager
def ctrl_c_noted(on: bool) -> Iterator[list]:
    """Ctrl-C leaves a note in the list, to be read after the step: what is saved is never half a step.

    Several processes would read it at different steps: there it ends them at once, and the last checkpoint
    stands.
    """
    pressed, before = [], signal.getsignal(signal.SIGINT)
    if on and not dist.is_initialized():
        signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------------------------
# 4. Evaluation


@torch.no_grad()
def predict(model: Adapted, split: data.Encoded) -> Tensor:
    """Probabilities of the labels for every row, (N, labels)."""
    model.eval()
    return every_row(split, len(model.label_ids),
                     lambda batch: model(batch.tokens, batch.lengths, batch.instances)).softmax(dim=-1)


@torch.no_grad()
def instance_embeddings(encoder: InstanceEncoder, split: data.Encoded) -> Tensor:
    """h for every row, (N, d_h): computed once, since the encoder is frozen and h never changes."""
    return every_row(split, len(encoder.mean), lambda batch: encoder(batch.tokens, batch.lengths))


def every_row(split: data.Encoded, width: int, compute: Callable[[data.Encoded], Tensor]) -> Tensor:
    """compute(batch) -> (rows, width), for all rows: (N, width). Processes share the batches."""
    order = split.lengths.argsort() if split.ragged else torch.arange(len(split), device=split.labels.device)
    process, num_processes = rank_and_world_size()
    mine = order.split(256)[process::num_processes]
    result = torch.zeros(len(split), width, device=order.device)
    for rows, batch in zip(mine, batches(split, mine)):
        result[rows] = compute(batch).float()
    if dist.is_initialized():
        dist.all_reduce(result)                                        # 0 where another process has the row
    return result


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of rows (N, labels) whose largest entry is at the label (N,)."""
    return (probabilities.argmax(dim=-1).cpu() == labels.cpu()).float().mean().item()


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor) -> Tensor:
    """Scores (N, labels) of ridge regression on h: what the instance embedding tells without the GPT."""
    def with_bias(h: Tensor) -> Tensor:                                # Apple GPUs have no float64
        return torch.cat([h, torch.ones_like(h[:, :1])], dim=1).cpu().double()         # (N, d_h + 1)

    X, Y = with_bias(train), F.one_hot(train_labels.cpu()).double()
    ridge = 1e-3 * len(X) * torch.eye(X.shape[1], dtype=X.dtype)
    return with_bias(test) @ torch.linalg.solve(X.T @ X + ridge, X.T @ Y)


def baselines(config: Config, problem: "Problem") -> dict[str, float]:
    """Accuracies without a trained method: of the commonest label, the bare model, h without the model."""
    test, zero_shot = problem.test, replace(config, method="none", tune_encoder=False)
    bare = Adapted(zero_shot, problem.gpt, problem.encoder, problem.label_ids)
    probe = linear_probe(problem.train.instances, problem.train.labels, test.instances)
    majority = (test.labels == problem.train.labels.bincount().argmax()).float().mean().item()
    return dict(majority=majority, zero_shot=accuracy(predict(bare, test), test.labels),
                linear_probe=accuracy(probe, test.labels))


# ------------------------------------------------------------------------------------------------------------
# 5. The problem: frozen model, encoded texts, instance embeddings


@dataclass
class Problem:
    """All that the methods share, computed once. A split has tokens, lengths, labels and `instances`, h."""

    gpt: GPT
    encoder: InstanceEncoder
    label_ids: Tensor                    # (labels,)
    train: data.Encoded
    tests: dict[str, data.Encoded]       # by name; the first is scored after every epoch; mnli has two
    source: str = ""                     # which data this is
    fingerprint: str = ""                # of all frozen weights that an adapter depends on
    data_sha256: str = ""                # of the encoded texts and labels
    pretrain_seconds: float = 0.0

    @property
    def test_name(self) -> str:
        return next(iter(self.tests))

    @property
    def test(self) -> data.Encoded:
        return self.tests[self.test_name]

    def hold_out(self, count: int) -> "Problem":
        """The last `count` training rows as the rows to score, the others to train on; dev is not in it."""
        if count >= len(self.train):
            raise ValueError(f"--holdout {count} leaves nothing of {len(self.train)} training rows: lower it")
        return replace(self, train=self.train[:-count], tests={"held-out training rows": self.train[-count:]})

    def shuffled(self, seed: int) -> "Problem":
        """The control: every text gets the instance embedding of some other text."""
        generator = torch.Generator().manual_seed(seed)

        def shuffle(split: data.Encoded) -> data.Encoded:
            order = torch.randperm(len(split), generator=generator).to(split.labels.device)
            return replace(split, instances=split.instances[order])

        return replace(self, train=shuffle(self.train),
                       tests={name: shuffle(split) for name, split in self.tests.items()})


def prepare(config: Config) -> Problem:
    """Read the data, load or pre-train the model, encode the texts, compute the instance embeddings."""
    task = data.TASKS[config.task]
    with one_process_first():                                          # it downloads and pre-trains for all
        train_rows, dev_rows, source = data.load_task(
            config.task, config.data, config.max_train, sample=config.model == "tiny", cache_dir=config.cache,
            quiet=config.quiet)
        gpt, tokenizer, pretrain_seconds = load_model(config.model, config)
        encoder = load_encoder(config, gpt)
    frozen = fingerprint(gpt, encoder)
    if len(models := set(gathered(frozen))) > 1:
        raise ValueError(f"the processes have different frozen models ({', '.join(models)}): "
                         "copy the .cache of one to all")
    room, sha256 = text_room(config, gpt, encoder), hashlib.sha256()

    def encode(rows: list[data.Row]) -> data.Encoded:
        split = data.encode(task, rows, tokenizer, room)
        for tensor in (split.tokens, split.lengths, split.labels):
            sha256.update(tensor.numpy())
        split = split.to(config.device)
        return replace(split, instances=instance_embeddings(encoder, split))

    train = encode(train_rows)
    train = replace(train, instances=encoder.fit(train.instances))     # from here on h is standardised
    tests = {name: encode(rows) for name, rows in dev_rows.items()}
    num_texts = {"training": len(train)} | {name: len(test) for name, test in tests.items()}
    config.say(f"task {config.task}: {source}, "
               + ", ".join(f"{number} {name} rows" for name, number in num_texts.items()))
    if cut := sum(split.num_cut for split in (train, *tests.values())):
        config.say(f"{cut} of {sum(num_texts.values())} texts were cut to {room} tokens, to fit the context "
                   f"of {gpt.config.n_positions} together with the prompt")
    if config.data and config.model == "tiny":
        config.say("note: the tiny GPT has read a few thousand synthetic sentences and nothing else, so real "
                   "text is beyond it whatever the prompt; it needs a model that has read some: --model gpt2")
    label_ids = data.label_tokens(task, tokenizer).to(config.device)
    problem = Problem(gpt, encoder, label_ids, train, tests, source, frozen, sha256.hexdigest()[:12],
                      pretrain_seconds)
    if config.holdout:
        problem = problem.hold_out(config.holdout)
    return problem.shuffled(config.seed) if config.shuffle_instances else problem


def build(config: Config, problem: Problem) -> Adapted:
    """The frozen model with one method on it, its initial values drawn from the seed."""
    torch.manual_seed(config.seed)
    return Adapted(config, problem.gpt, problem.encoder, problem.label_ids)


def load_model(name: str, config: Config) -> tuple[GPT, tiktoken.Encoding, float]:
    """(frozen model, its tokenizer, seconds of pre-training) of "tiny", a GPT-2's name, or a folder."""
    seconds = 0.0
    if name == "tiny":
        gpt, tokenizer, seconds = tiny_gpt(config.pretrain_seed, config.cache, config.device, config.quiet)
    else:
        folder = data.gpt2_folder(name, config.cache, config.quiet) if name in data.GPT2_MODELS else name
        gpt, tokenizer = GPT.from_pretrained(folder, getattr(torch, config.dtype)), data.gpt2_tokenizer()
    if gpt.config.vocab_size != tokenizer.n_vocab:
        raise ValueError(f"{name} has {gpt.config.vocab_size} tokens, GPT-2's tokenizer {tokenizer.n_vocab}: "
                         "name a model that was trained with it")
    return gpt.to(config.device).requires_grad_(False).eval(), tokenizer, seconds


def tiny_gpt(seed: int, cache_dir: str | Path, device: str,
             quiet: bool = False) -> tuple[GPT, tiktoken.Encoding, float]:
    """(tiny GPT, its tokenizer, seconds of pre-training, 0 if it came from the cache).

    The cache file is named after all it was made from: the very tokens, the sizes, the recipe and the seed.
    """
    text = data.pretraining_text(PRETRAINING["documents"])
    tokenizer = data.tiny_tokenizer(text)
    token_ids = torch.tensor(tokenizer.encode_ordinary(text))
    config = tiny_config(tokenizer.n_vocab)
    made_from = json.dumps([asdict(config), PRETRAINING, seed]).encode() + token_ids.numpy().tobytes()
    path = Path(cache_dir) / f"tiny-{hashlib.sha256(made_from).hexdigest()[:12]}.pt"
    if path.exists():
        gpt = GPT(config).to(device)
        gpt.load_state_dict(data.load_file(path))
        return gpt, tokenizer, 0.0
    newline = tokenizer.encode_single_token("\n")
    starts = torch.cat([torch.zeros(1, dtype=torch.long), (token_ids == newline).nonzero().flatten() + 1])
    began = time.time()
    gpt = pretrain(config, token_ids, starts, seed, device,
                   partial(tqdm, desc="pre-training the tiny GPT, once", disable=quiet or None))
    data.save_file(path, gpt.state_dict())
    return gpt, tokenizer, time.time() - began


def load_encoder(config: Config, gpt: GPT) -> InstanceEncoder:
    """The instance encoder: the frozen model itself, or another GPT-2 that reads the same tokens."""
    other = gpt if config.encoder == config.model else load_model(config.encoder, config)[0]
    if other.config.vocab_size != gpt.config.vocab_size:
        raise ValueError(f"encoder {config.encoder} has {other.config.vocab_size} tokens and the model "
                         f"{gpt.config.vocab_size}: they have to share a tokenizer")
    return InstanceEncoder(other)


def fingerprint(gpt: GPT, encoder: InstanceEncoder) -> str:
    """Of all frozen weights that an adapter depends on."""
    return gpt.fingerprint() + ("" if encoder.gpt is gpt else "+" + encoder.gpt.fingerprint())


def text_room(config: Config, gpt: GPT, encoder: InstanceEncoder) -> int:
    """How many tokens of text fit into the context behind the prompt. Raises ValueError if none do."""
    context, m = gpt.config.n_positions, config.num_virtual_tokens * (2 if config.fusion == "concat" else 1)
    if m >= context:
        raise ValueError(f"{m} prompt tokens leave no room for text in a context of {context}: "
                         "lower --num-virtual-tokens")
    return min(context - m, encoder.gpt.config.n_positions)


# ------------------------------------------------------------------------------------------------------------
# 6. Files. A run in progress is its checkpoint; a finished one adapter.pt, metrics.jsonl and result.json.

FORMAT = 2                               # of adapters and checkpoints
CHECKPOINTS = ("checkpoint.pt", "checkpoint-before.pt")


def saved(config: Config, model: Adapted, problem: Problem) -> dict:
    """What an adapter and a checkpoint both hold: the trained tensors, and all that they depend on."""
    depends_on = config.deciding() | dict(data=problem.source, fingerprint=problem.fingerprint,
                                          data_sha256=problem.data_sha256)
    return dict(format=FORMAT, config=config.deciding(), depends_on=depends_on,
                task=asdict(data.TASKS[config.task]) | {"sample": None},
                instance_mean=problem.encoder.mean.cpu(), instance_std=problem.encoder.std.cpu(),
                tensors={name: tensor.detach().cpu() for name, tensor in model.trained().items()})


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write DIR/checkpoint.pt and keep the one before it: a crash can damage what was written last."""
    if is_first_process():
        newest, before = (folder / name for name in CHECKPOINTS)
        if newest.exists():
            os.replace(newest, before)
        data.save_file(newest, state)


def earlier_run(folder: Path) -> dict | None:
    """The newest checkpoint of the folder that can be read, or its adapter, or None if there is neither."""
    for path in (folder / name for name in CHECKPOINTS):
        if path.exists():
            try:
                return data.load_file(path)
            except ValueError as error:
                print(f"train.py: {error}; trying the one before it", file=sys.stderr)
    return load_adapter(folder) if (folder / "adapter.pt").exists() else None


def require_same_run(folder: Path, there: dict, here: dict) -> None:
    """ValueError if the run in the folder depends on something else, and so is another one."""
    for name, value in here.items():
        if there.get(name) != value:
            raise ValueError(f"{folder} holds another run: {name} is {there.get(name)} there and {value} "
                             "here: name another folder with --out")


def restore_checkpoint(state: dict, model: Adapted,
                       optimizer: torch.optim.Optimizer) -> tuple[int, list[Tensor], list[dict]]:
    """Put a checkpoint's tensors where they were -> (steps done, this epoch's losses, metrics so far)."""
    process, num_processes = rank_and_world_size()
    if (there := len(state["losses"])) != num_processes:
        raise ValueError(f"the checkpoint is of {there} processes and this run has {num_processes}: "
                         "start as many as before")
    load_tensors(model, state["tensors"])
    optimizer.load_state_dict(state["optimizer"])
    losses = state["losses"][process].float().to(model.label_ids.device)
    return state["step"], list(losses), state["metrics"]


def load_adapter(folder: str | Path) -> dict:
    """The content of DIR/adapter.pt, as `run` saved it."""
    path = Path(folder) / "adapter.pt"
    adapter = data.load_file(path)
    if not isinstance(adapter, dict) or adapter.get("format") != FORMAT:
        raise ValueError(f"{path} is no adapter of format {FORMAT}: train it again with this version")
    return adapter


def restore(adapter: dict, gpt: GPT, encoder: InstanceEncoder, label_ids: Tensor) -> Adapted:
    """An adapter, and the model and encoder it was trained on -> the adapted model; fits the encoder too.

    Raises ValueError for another model and for missing, unexpected or misshapen tensors.
    """
    trained_on, at_hand = adapter["depends_on"]["fingerprint"], fingerprint(gpt, encoder)
    if trained_on != at_hand:
        raise ValueError(f"this adapter was trained on another model ({trained_on}) than the one at hand "
                         f"({at_hand}): use that model or train again")
    encoder.mean = adapter["instance_mean"].to(label_ids.device)
    encoder.std = adapter["instance_std"].to(label_ids.device)
    model = Adapted(Config(**adapter["config"] | dict(device="cpu")), gpt, encoder, label_ids)
    load_tensors(model, adapter["tensors"])
    return model


def load_tensors(model: Adapted, found: dict[str, Tensor]) -> None:
    """Copy saved tensors into what is trained. ValueError for missing, unexpected and misshapen ones."""
    wanted = model.trained()
    for name in wanted | found:
        shapes = [list(tensors[name].shape) if name in tensors else "none" for tensors in (wanted, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"tensor {name!r}: the method needs {shapes[0]}, the file has {shapes[1]}: "
                             "the file is damaged, train again")
        wanted[name].data.copy_(found[name])


# ------------------------------------------------------------------------------------------------------------
# 7. What the command line can ask for: a run, or a prediction


def run(config: Config, state: dict | None = None) -> dict:
    """Train and score one method; leave adapter.pt, metrics.jsonl and result.json in the run folder.

    `state`, from --resume, is the checkpoint to go on from, or the adapter of a run that is finished. What an
    earlier run has left in the folder stays until the new result takes its place.
    """
    folder = config.folder
    if state and "step" not in state:
        require_same_run(folder, state["config"], config.deciding())
        config.say(f"{folder} is finished")
        return json.loads((folder / "result.json").read_text())
    problem = prepare(config)
    model = build(config, problem)
    depends_on = saved(config, model, problem)["depends_on"]
    if earlier := state or earlier_run(folder):
        require_same_run(folder, earlier["depends_on"], depends_on)
        if state:
            config.say(f"going on after step {state['step']}")
        elif "step" in earlier:
            config.say(f"starting anew; after step {earlier['step']} goes on: --resume {folder}")
    trainable, total = get_nb_trainable_parameters(model)
    about = depends_on | dict(num_train=len(problem.train), num_scored=len(problem.test),
                              scored_on=problem.test_name,
                              texts_cut=problem.train.num_cut + problem.test.num_cut)
    before = baselines(config, problem)
    shown = "config: " + ", ".join(f"{name} {value}" for name, value in about.items())
    config.say(textwrap.fill(shown, 110, subsequent_indent="  "))
    config.say(f"trainable: {trainable:,} of {total:,} parameters; the instance encoder is "
               + ("the model itself" if config.encoder == config.model else config.encoder)
               + (", a copy, trained and counted too" if config.tune_encoder else ", frozen"))
    config.say(f"before training, accuracy on {problem.test_name}: majority class {before['majority']:.3f}, "
               f"zero-shot {before['zero_shot']:.3f}, linear probe on the instance embedding "
               f"{before['linear_probe']:.3f}")
    try:
        metrics = fit(config, model, problem, folder, state)
    except (KeyboardInterrupt, OSError) as error:
        advice = "nothing was saved yet"
        if any((folder / name).exists() for name in CHECKPOINTS):
            advice = f"to go on from the last checkpoint: python train.py --resume {folder}"
        raise type(error)(f"{str(error) or 'interrupted'}; {advice}") from None
    scores = {f"accuracy_{name}": accuracy(predict(model, split), split.labels)
              for name, split in problem.tests.items() if name != problem.test_name}
    if "f1" in data.TASKS[config.task].metrics:
        scores["f1"] = data.f1(predict(model, problem.test).argmax(dim=-1), problem.test.labels)
    result = about | before | scores | dict(
        accuracy=metrics[-1]["accuracy"], trainable_parameters=trainable, total_parameters=total,
        train_seconds=metrics[-1]["seconds"], pretrain_seconds=problem.pretrain_seconds,
        torch=torch.__version__, device=config.device)
    if is_first_process():
        data.save_file(folder / "adapter.pt", saved(config, model, problem))
        data.save_file(folder / "metrics.jsonl", [depends_on, *metrics])
        data.save_file(folder / "result.json", result)
        for name in CHECKPOINTS:
            (folder / name).unlink(missing_ok=True)
            for half in folder.glob(f"{name}.*.part"):                 # of a process that was killed
                half.unlink()
    config.say(f"wrote {folder}/adapter.pt, metrics.jsonl and result.json\n"
               f'to use it: python train.py --adapter {folder} --predict "..."')
    return result


def predict_text(text: str, adapter_folder: str, device: str, cache: str) -> None:
    """Print tab-separated values, one row a text: label, probabilities, text. Needs a saved adapter alone."""
    adapter = load_adapter(adapter_folder)
    config = Config(**adapter["config"] | dict(device=device, cache=cache, quiet=True))
    task = data.Task(**adapter["task"])
    rows = [(dict(zip(task.fields, texts)), 0) for texts in read_texts(text, list(task.fields))]
    gpt, tokenizer, _ = load_model(config.model, config)
    encoder = load_encoder(config, gpt)
    model = restore(adapter, gpt, encoder, data.label_tokens(task, tokenizer).to(config.device))
    split = data.encode(task, rows, tokenizer, text_room(config, gpt, encoder)).to(config.device)
    probabilities = predict(model, replace(split, instances=instance_embeddings(encoder, split)))
    print("\t".join(["label", *task.label_names, *task.fields]))
    for (texts, _), p in zip(rows, probabilities):
        print("\t".join([task.label_names[p.argmax()], *(f"{x:.3f}" for x in p), *texts.values()]))


def read_texts(source: str, fields: list[str]) -> list[list[str]]:
    """The texts of a file, of standard input ("-"), or `source` itself: one example a line."""
    content, where = source.encode(), "--predict"
    if source == "-":
        content, where = sys.stdin.buffer.read(), "standard input"
    elif os.path.isfile(source):
        content, where = Path(source).read_bytes(), source
    try:
        lines = content.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start} is not UTF-8: save it as UTF-8") from None
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows, start=1):
        found = sum(1 for text in row if text.strip())
        if not found == len(row) == len(fields):
            raise ValueError(f"{where}, line {number}: {found} texts, the task takes {len(fields)} "
                             f"({', '.join(fields)}): separate them with a tab")
    return rows


# ------------------------------------------------------------------------------------------------------------
# 8. The command line: one flag for each field of Config, and what to do

CHOICES = {"task": data.TASKS, "method": LEARNING_RATES, "fusion": FUSIONS, "dtype": ["float32", "bfloat16"],
           "device": ["auto", "cpu", "cuda", "mps"]}


def number(kind: type, name: str) -> Callable[[str], int | float]:
    """Reads a flag's text as a finite int or float: above 0, but that seeds and dropout may be 0."""
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not 0 <= value < math.inf or value == 0 and "seed" not in name and name != "dropout":
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value
    return parse


def complain(message: str) -> NoReturn:
    raise ValueError(message)


def build_parser() -> argparse.ArgumentParser:
    """A flag for every field of Config; the comments in its source are the help, and name the groups."""
    parser = argparse.ArgumentParser(description=__doc__, usage="python train.py --task TASK [flags]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = complain                                            # one line, as for all other bad input
    options, group = {f.name: f for f in fields(Config)}, parser
    for line in inspect.getsource(Config).splitlines():
        if heading := re.fullmatch(r"    # (.*)", line):
            group = parser.add_argument_group(heading[1])
        elif found := re.fullmatch(r"    (\w+): .*?# (.*)", line):
            name, help = found.groups()
            kind = (get_args(options[name].type) or [options[name].type])[0]           # int of int | None
            flag, default = "--" + name.replace("_", "-"), getattr(Config, name, None)
            if kind is bool:
                group.add_argument(flag, action="store_true", help=help)
            else:
                group.add_argument(flag, default=default, choices=CHOICES.get(name),
                                   type=str if kind is str else number(kind, name),
                                   help=help + (" (default: %(default)s)" if default is not None else ""))
    group.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, after its last checkpoint")
    use = parser.add_argument_group("To use what was trained")
    use.add_argument("--predict", metavar="TEXT", help="print labels and probabilities, tab-separated: of "
                     "TEXT, of a file's lines, or with - of standard input's; a tab parts the texts of a pair")
    use.add_argument("--adapter", metavar="DIR", help="run folder to predict with")
    for moved in ("--compare", "--ablate"):
        parser.add_argument(moved, action="store_true", help=argparse.SUPPRESS)
    return parser


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, Config | None, dict | None]:
    """(the flags, their Config unless they ask for a prediction, what --resume found)."""
    parser, state = build_parser(), None
    args = parser.parse_args(argv)
    if args.compare or args.ablate:
        parser.error("this is now: python -m experiments.compare"
                     + f" --task {args.task}" * bool(args.task) + " --ablate" * args.ablate)
    if args.resume:                                                    # the run's flags, then this command's
        state = earlier_run(Path(args.resume))
        if state is None:
            parser.error(f"{args.resume} holds no run: begin one with --task")
        parser.set_defaults(**state["config"] | dict(out=args.resume))
        args = parser.parse_args(argv)
    if (args.predict is None) != (args.adapter is None):
        parser.error("--predict TEXT and --adapter DIR go together")
    if args.predict is not None:
        return args, None, None
    if args.task is None:
        parser.error(f"name a task: --task {' or '.join(data.TASKS)}")
    return args, Config(**{f.name: getattr(args, f.name) for f in fields(Config)}), state


def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for bad input, 130 for Ctrl-C."""
    try:
        args, config, state = parse_args(argv)
        if config is None:
            return predict_text(args.predict, args.adapter, args.device, args.cache)
        join_processes(config)
        result = run(config, state)
        if is_first_process():
            print(json.dumps(result))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"train.py: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------
# 9. Several processes, if torchrun started them: each has a part of every batch, the first writes the files


def join_processes(config: Config) -> None:
    if "LOCAL_RANK" not in os.environ:                                 # torchrun sets it
        return
    if config.device == "cuda":
        config.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(config.device)
    # A large model may be downloaded while the others wait; torchrun ends all of them as soon as one fails.
    dist.init_process_group("nccl" if config.device.startswith("cuda") else "gloo", timeout=timedelta(days=1))
    config.quiet = config.quiet or not is_first_process()              # the first one speaks


def rank_and_world_size() -> tuple[int, int]:
    """(number of this process, of all processes); (0, 1) for a single one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first_process() -> bool:
    return rank_and_world_size()[0] == 0


def gathered(value) -> list:
    """What every process passes here, in the order of their numbers."""
    every = [value]
    if dist.is_initialized():
        every *= dist.get_world_size()
        dist.all_gather_object(every, value)
    return every


@contextmanager
def one_process_first() -> Iterator[None]:
    """On every machine one process goes through the block, then the others."""
    goes_first = os.environ.get("LOCAL_RANK") == "0"
    if dist.is_initialized() and not goes_first:
        dist.barrier()
    yield
    if dist.is_initialized() and goes_first:
        dist.barrier()


if __name__ == "__main__":
    main()
