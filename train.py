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
import gc
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn, get_args

# Ctrl-C while torch is being loaded is the end, without a traceback; where it is ignored, it stays ignored.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    import fcntl
except ImportError:                      # Windows has no such locks
    fcntl = None

import tiktoken
import torch
from torch import Tensor, distributed as dist, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data import short
from lopa import FUSIONS, METHODS, Head, add_lora, get_nb_trainable_parameters
from model import GPT, PRETRAINING, InstanceEncoder, cosine_factor, pretrain, tiny_config

# Peak learning rates of each method on the tiny GPT and on a real model. The former were chosen on held-out
# training rows of the sample; those of lopa, idpg, pt, dpt and lora were tried on a real model too, with
# SmolLM2-135M and SST-2 (experiments/README.md). The other rates of real models are starting points that
# nobody has tried here.
LEARNING_RATES = {"lopa": (3e-2, 3e-2), "idpg": (3e-2, 3e-2), "pt": (3e-2, 3e-2), "dpt": (3e-2, 1e-2),
                  "bpt": (1e-2, 1e-2), "residual": (1e-2, 1e-3), "dept": (3e-2, 1e-2), "adept": (1e-2, 3e-3),
                  "lora": (3e-3, 1e-3), "full": (1e-3, 3e-5)}
HEAD_LEARNING_RATES = (3e-3, 1e-3)       # of LoPA's and IDPG's heads
# Where these are in Adapted and in HiddenLayerProbe. A model trained in full may have an lm_head.
HEADS = ("prompt.u_head.", "prompt.v_head.", "prompt.head.", "head.")

COMMAND = "python train.py"              # as messages give it

# What tells whether a method reads: each takes something away, in training and in scoring alike.
CONTROLS = ("shuffled", "constant", "blind")

# What the fields of Config may be; flags, adapters and checkpoints are held to it alike.
CHOICES = {"task": data.TASKS, "method": LEARNING_RATES, "fusion": FUSIONS, "dtype": ("float32", "bfloat16"),
           "device": ("auto", "cpu", "cuda", "mps"), "control": CONTROLS}
LIMITS = {"seed": (0, 2 ** 31), "pretrain_seed": (0, 2 ** 31), "epochs": (1, 10 ** 6), "rank": (1, 1000),
          "encoder_blocks": (0, 1000), "hidden_dim": (1, 10 ** 4), "num_virtual_tokens": (1, 10 ** 5),
          "lr": (1e-12, 1e30), "head_lr": (1e-12, 1e30), "encoder_lr": (1e-12, 1e30),
          "init_std": (1e-12, 1e3), "head_std": (1e-12, 1e3), "dropout": (0, 0.99)}
# The other numbers: 1 to a billion.

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
    encoder_blocks: int | None = None    # h is read after so many, 0: bag of words (default: half; tiny: 0)
    data: str | None = None              # folder of GLUE files instead of the built-in sample
    max_train: int | None = None         # how many random training rows to use (default: all)
    # How to train it
    seed: int = 0                        # of the prompt's initial values and the order of the rows
    epochs: int = 10                     # passes through the training rows; the last one is scored
    batch_size: int = 32                 # rows of one step
    lr: float | None = None              # peak learning rate (default: of the method, in LEARNING_RATES)
    head_lr: float | None = None         # of the heads on h (default: HEAD_LEARNING_RATES)
    encoder_lr: float | None = None      # of a tuned encoder (default: that of --method full)
    init_std: float | None = None        # of the prompt at the start (default: as the model's embeddings)
    init_text: str | None = None         # the prompt starts as the embeddings of these words (default: noise)
    head_std: float | None = None        # of the heads at the start, 0.02 as released (default: U = 0)
    num_virtual_tokens: int = 10         # m, length of the prompt
    rank: int = 4                        # r, of U and V
    hidden_dim: int | None = None        # H, of the heads (default: 64 for tiny, else 256)
    fusion: str = "gate"                 # how Z_S and Z_I meet in LoPA
    dropout: float | None = None         # on h (default: 0 for tiny, whose h is short, else 0.1 as released)
    tune_encoder: bool = False           # train a copy of the GPT as encoder too, as released for GLUE
    dtype: str = "float32"               # of the frozen model; what is trained stays float32
    # To check a claim
    holdout: int | None = None           # how many training rows to score instead of dev: for choosing --lr
    control: str | None = None           # shuffled: another text's h; constant: the same h; blind: no text
    pretrain_seed: int = 0               # of the tiny GPT
    # Where and how to run: what follows does not decide the result
    out: str | None = None               # run folder (default: a name under runs/ that says what is in it)
    save_every: int | None = None        # steps between checkpoints (default: an epoch's)
    quiet: bool = False                  # print the result alone, as one line of JSON
    device: str = "auto"                 # where to compute
    cache: str = str(Path(__file__).parent / ".cache")     # where models and data are kept

    def __post_init__(self):
        for f in fields(self):
            check_option(f.name, getattr(self, f.name), get_args(f.type) or (f.type,))
        tiny = self.model == "tiny"
        self.encoder = self.encoder or self.model
        if self.encoder_blocks is None and self.encoder == "tiny":
            self.encoder_blocks = 0
        for name in (self.model, self.encoder):
            if name not in ("tiny", *data.GPT2_MODELS) and not Path(name).is_dir():
                raise ValueError(f"there is no model {short(name)}: name tiny, {', '.join(data.GPT2_MODELS)} "
                                 "or a folder")
        if self.init_text is not None and not hasattr(METHODS.get(self.method), "start_from"):
            raise ValueError(f"--init-text has no effect with --method {self.method}: leave it out")
        self.lr = LEARNING_RATES[self.method][not tiny] if self.lr is None else self.lr
        self.head_lr = HEAD_LEARNING_RATES[not tiny] if self.head_lr is None else self.head_lr
        self.encoder_lr = LEARNING_RATES["full"][not tiny] if self.encoder_lr is None else self.encoder_lr
        self.hidden_dim = (64 if tiny else 256) if self.hidden_dim is None else self.hidden_dim
        self.dropout = (0.0 if tiny else 0.1) if self.dropout is None else self.dropout
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        if self.device == "auto":
            self.device = next(name for name in there if there[name])
        if not there[self.device]:
            raise ValueError(f"--device: PyTorch finds no {self.device} here: use --device auto")

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
                last_part = re.sub(r"[^\w.-]+", "_", Path(str(value)).resolve().name)   # of paths, and texts
                name += "-" + option.replace("_", "-") + ("" if value is True else f"-{last_part}")
        return Path(self.out or f"runs/{name}")

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)


def check_option(name: str, value, kinds: tuple[type, ...]) -> None:
    """ValueError if a field of Config has a value of none of these types, or one that it may not have."""
    flag = "--" + name.replace("_", "-")
    if value is None and type(None) in kinds:
        return
    if type(value) not in kinds and not (type(value) is int and float in kinds):
        raise ValueError(f"{flag}: {value!r} is no {kinds[0].__name__}")
    if name in CHOICES and value not in CHOICES[name]:
        raise ValueError(f"{flag}: {value!r} is none of {', '.join(CHOICES[name])}")
    if kinds[0] in (int, float):
        least, most = LIMITS.get(name, (1, 10 ** 9))
        if not least <= value <= most:
            raise ValueError(f"{flag}: {value} is not between {least} and {most}")


# ------------------------------------------------------------------------------------------------------------
# 2. The model with one method on it: from text to the scores of the label words


class Adapted(nn.Module):
    """A frozen GPT with one method on it. What requires a gradient is what is trained, saved and counted.

    config.method: a key of lopa.METHODS, or "lora" or "full"; without a config the model is bare, zero-shot.
    LoRA, full fine-tuning and a tuned encoder work on copies, the latter two in float32: `gpt` and `encoder`
    themselves never change. label_ids: (labels,), tokens; of a task with answers those that end one.
    """

    def __init__(self, config: Config | None, gpt: GPT, encoder: InstanceEncoder, label_ids: Tensor):
        super().__init__()
        self.gpt, self.label_ids, self.prompt, self.encoder = gpt, label_ids, None, None
        if config is None:
            return
        if config.method in METHODS:
            every_token = torch.arange(gpt.config.vocab_size, device=label_ids.device)
            init_std = config.init_std or gpt.embed(every_token).float().std().item()
            self.prompt = METHODS[config.method](
                embed_dim=gpt.config.n_embd, instance_dim=len(encoder.mean),
                num_virtual_tokens=config.num_virtual_tokens, rank=config.rank, hidden_dim=config.hidden_dim,
                dropout=config.dropout, fusion=config.fusion, init_std=init_std,
                head_std=config.head_std, max_length=gpt.config.n_positions)
        elif config.method == "lora":
            self.gpt = add_lora(copy.deepcopy(gpt), config.rank)
        elif config.method == "full":
            self.gpt = copy.deepcopy(gpt).float().requires_grad_(True)
        else:
            raise ValueError(f"unknown method {config.method!r}: choose one of {', '.join(LEARNING_RATES)}")
        if config.tune_encoder:
            self.encoder = copy.deepcopy(encoder).float().requires_grad_(True)
            one = torch.ones(1, 1, dtype=torch.long, device=encoder.mean.device)
            self.encoder(one, lengths=one[0]).sum().backward()
            for p in self.encoder.parameters():                        # later blocks have no part in h
                p.requires_grad_(p.grad is not None).grad = None
        self.to(label_ids.device)

    def forward(self, tokens: Tensor, lengths: Tensor, instance: Tensor,
                answers: Tensor | None = None) -> Tensor:
        """Tokens (B, T), lengths (B,), h (B, d_h) -> label words' logits at the last real token, (B, labels).

        With answers (B, max_answer), behind which is -100: the logits of each of their n tokens, right before
        it, (n, vocab_size). Logits are computed where a target stands and nowhere else.
        """
        inputs_embeds, lengths = self.read(tokens, lengths, instance)  # (B, m + T, d), (B,)
        if answers is None:
            last = self.gpt.hidden_at(inputs_embeds, lengths - 1)      # (B, d)
            logits = self.gpt.logits(last, self.label_ids)             # (B, labels)
        else:
            rows, i = (answers >= 0).nonzero(as_tuple=True)            # (n,): token i of a row's answer
            inputs_embeds = F.pad(inputs_embeds, (0, 0, 0, int(i.max()) + 1))
            inputs_embeds[rows, lengths[rows] + i] = self.gpt.embed(answers[rows, i])
            logits = self.gpt.logits(self.gpt.hidden_at(inputs_embeds, lengths[rows] + i - 1, rows))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))     # bfloat16 is coarse

    def read(self, tokens: Tensor, lengths: Tensor, instance: Tensor) -> tuple[Tensor, Tensor]:
        """What the frozen model reads, (B, m + T, d), and how much of it is prompt and text, (B,)."""
        if self.encoder is not None:
            instance = self.encoder(tokens, lengths)
        inputs_embeds = self.gpt.embed(tokens)                         # (B, T, d)
        if self.prompt is not None:
            inputs_embeds = self.prompt(inputs_embeds, instance)       # (B, m + T, d)
        return inputs_embeds, lengths + inputs_embeds.shape[1] - tokens.shape[1]

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------------
# 3. Training


def fit(config: Config, model: Adapted, problem: "Problem", folder: Path | None = None,
        state: dict | None = None) -> list[dict]:
    """Train `model` in place; returns dict(epoch, loss, accuracy, seconds) for every epoch.

    With a folder it leaves checkpoints there, and `state`, what one of them holds, is where to go on from.
    The order of the rows, the rate and (in each process) the dropout of a step are functions of (seed, step)
    alone, so a checkpoint is tensors, a step and metrics. Of several processes each takes its part of every
    batch. Raises FloatingPointError for a loss or weight that is not finite, KeyboardInterrupt for Ctrl-C,
    ValueError for a batch too small for the processes and a checkpoint that does not fit.
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
    has_heads = config.method in ("lopa", "idpg")
    rates = "--lr" + " or --head-lr" * has_heads + " or --encoder-lr" * config.tune_encoder
    optimizer = torch.optim.AdamW(parameter_groups(config, model), weight_decay=0.0)
    forward = DistributedDataParallel(model, init_sync=False) if num_processes > 1 else model
    shuffle = torch.Generator().manual_seed(config.seed)               # of the order of the rows alone
    # What dropout draws from. torch.manual_seed would seed the generators of all devices: 0.5 ms a step.
    dropout = torch.default_generator if config.device == "cpu" else torch.get_device_module(config.device)
    done, losses, metrics = 0, [], []
    if state:
        done, losses, metrics = restore_checkpoint(state, model, optimizer, steps_per_epoch, total_steps)
        began -= state["seconds"]
    progress = tqdm(total=total_steps, initial=done, desc="training", leave=False,
                    disable=config.quiet or None)                      # None: shown on a terminal alone
    with progress, ctrl_c_noted(on=folder is not None) as pressed:
        for epoch in range(1, config.epochs + 1):
            first_step, last_step = (epoch - 1) * steps_per_epoch + 1, epoch * steps_per_epoch
            order = shuffled_batches(split, config.batch_size, shuffle)        # of finished epochs too: it
            if last_step <= done:                                              # moves the generator on
                continue
            model.train()
            for step, (batch, share) in enumerate(parts(split, order), start=first_step):
                if step <= done:
                    continue
                factor = cosine_factor(step - 1, warmup_steps, total_steps)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor
                advice = (f"of {total_steps}, learning rate {config.lr * factor:.2e}: "
                          f"start again with a lower {rates}")
                dropout.manual_seed((config.seed * total_steps + step - 1) * num_processes + process)
                loss = loss_of(forward, batch)
                optimizer.zero_grad()
                (loss * share).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                losses.append(loss.detach() * len(batch))
                progress.update()

                if step % 10 == 0 or step == last_step:                # not always: it waits for the GPU
                    require_finite(losses[-10:], parameters, step, advice)
                    progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                if step == last_step:
                    mean_loss = per_process(losses).sum().item() / len(split)
                    score = problem.accuracy(predict(model, problem.test), problem.test)
                    seconds, losses = time.time() - began, []
                    metrics.append(dict(epoch=epoch, loss=mean_loss, accuracy=score, seconds=seconds))
                    config.say(f"epoch {epoch}/{config.epochs}: loss {mean_loss:.4f}, {problem.test_name} "
                               f"accuracy {score:.3f}, {seconds:.1f} s")
                if folder and (pressed or step % save_every == 0):
                    require_finite(losses[-10:], parameters, step, advice)
                    save_checkpoint(folder, saved(config, model, problem) | dict(
                        config=asdict(config), step=step, losses=per_process(losses), metrics=metrics,
                        seconds=time.time() - began, moments=moments(model, optimizer)))
                if pressed:
                    raise KeyboardInterrupt(f"interrupted at step {step} of {total_steps}")
    return metrics


def loss_of(forward: Callable[..., Tensor], batch: data.Encoded) -> Tensor:
    """Cross entropy over the label words alone; or of every token of an answer, its mean first by example."""
    inputs = (batch.tokens, batch.lengths, batch.instances)
    if batch.labels.ndim == 1:
        return F.cross_entropy(forward(*inputs), batch.labels)         # (B, labels), (B,)
    real = batch.labels >= 0                                           # (B, max_answer)
    losses = F.cross_entropy(forward(*inputs, batch.labels), batch.labels[real], reduction="none")     # (n,)
    return (losses * (real / real.sum(dim=1, keepdim=True))[real]).sum() / len(batch)


def parameter_groups(config: Config, model: Adapted) -> list[dict]:
    """What is trained, by its peak learning rate.

    The heads on h have one of their own, and so has a tuned encoder. IDPG's last bias is what Z_S is to LoPA.
    """
    groups: dict[float, list] = {}
    for name, p in model.trained().items():
        lr = config.lr
        if name.startswith("encoder."):
            lr = config.encoder_lr
        elif name.startswith(HEADS) and name != "prompt.head.up_proj.bias":
            lr = config.head_lr
        groups.setdefault(lr, []).append(p)
    return [dict(params=params, peak_lr=lr) for lr, params in groups.items()]


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


def require_finite(losses: list[Tensor], parameters: list[Tensor], step: int, advice: str) -> None:
    """FloatingPointError if one of these losses, which end at `step`, or a weight after it is not finite."""
    for number, loss in enumerate(losses, start=step - len(losses) + 1):
        if not loss.isfinite():
            raise FloatingPointError(f"loss is {loss} at step {number} {advice}")
    if not all(p.isfinite().all() for p in parameters):
        raise FloatingPointError(f"weights are not finite after step {step} {advice}")


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

    def note(*_) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, before)                           # a second one ends the run at once

    if on and before is not signal.SIG_IGN and not dist.is_initialized():
        signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------------------------
# 4. Evaluation


def predict(model: Adapted, split: data.Encoded) -> Tensor:
    """Of every row the labels' probabilities, (N, labels), or the tokens of an answer, (N, max_answer)."""
    model.eval()
    if split.labels.ndim == 2:
        def generate(batch: data.Encoded) -> Tensor:
            inputs_embeds, lengths = model.read(batch.tokens, batch.lengths, batch.instances)
            return model.gpt.generate(inputs_embeds, split.labels.shape[1], lengths, ends=model.label_ids)
        return every_row(split, split.labels.shape[1], generate).long()
    return every_row(split, len(model.label_ids),
                     lambda batch: model(batch.tokens, batch.lengths, batch.instances)).softmax(dim=-1)


def instance_embeddings(encoder: InstanceEncoder, split: data.Encoded) -> Tensor:
    """h for every row, (N, d_h): computed once, since the encoder is frozen and h never changes."""
    return every_row(split, len(encoder.mean), lambda batch: encoder(batch.tokens, batch.lengths))


@torch.no_grad()
def every_row(split: data.Encoded, width: int, compute: Callable[[data.Encoded], Tensor]) -> Tensor:
    """compute(batch) -> (rows, width), for all rows: (N, width). Processes share the batches."""
    order = split.lengths.argsort() if split.ragged else torch.arange(len(split), device=split.labels.device)
    process, num_processes = rank_and_world_size()
    mine = order.split(256 if split.labels.ndim == 1 else 64)[process::num_processes]  # answers take memory
    result = torch.zeros(len(split), width, device=order.device)
    for rows, batch in zip(mine, batches(split, mine)):
        result[rows] = compute(batch).float()
    if dist.is_initialized():
        dist.all_reduce(result)                                        # 0 where another process has the row
    return result


def accuracy_by_kind(problem: "Problem", predictions: Tensor) -> dict[str, float]:
    """Accuracy of what was predicted of the sample's dev rows, for each kind of sentence by itself."""
    right = problem.right(predictions, problem.test).tolist()
    return {kind: statistics.fmean(r for r, k in zip(right, problem.kinds) if k == kind)
            for kind in sorted(set(problem.kinds), key=len)}


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor) -> Tensor:
    """Scores (N, labels) of ridge regression on h: what the instance embedding tells without the GPT."""
    def with_bias(h: Tensor) -> Tensor:                                # on the CPU: Apple GPUs lack float64
        return torch.cat([h, torch.ones_like(h[:, :1])], dim=1).cpu().double()         # (N, d_h + 1)

    X, Y = with_bias(train), F.one_hot(train_labels.cpu()).double()
    # As strong as the data: with many features and few rows a weak one would fit noise.
    ridge = len(X) * torch.eye(X.shape[1], dtype=X.dtype)
    ridge[-1, -1] = 0                                                  # of the bias
    return with_bias(test) @ torch.linalg.solve(X.T @ X + ridge, X.T @ Y)


class HiddenLayerProbe(nn.Module):
    """The labels from h alone, without the GPT, by a head as wide as LoPA's: `fit` trains it like those."""

    def __init__(self, config: Config, problem: "Problem"):
        super().__init__()
        torch.manual_seed(config.seed)
        self.label_ids, num_labels = problem.label_ids, len(problem.label_ids)
        self.head = Head(len(problem.encoder.mean), config.hidden_dim, num_labels, config.dropout)
        self.to(self.label_ids.device)

    def forward(self, tokens: Tensor, lengths: Tensor, instance: Tensor) -> Tensor:
        return self.head(instance)                                     # (B, d_h) -> (B, labels)

    trained = Adapted.trained


def baselines(config: Config, problem: "Problem") -> dict[str, float]:
    """Accuracies without a method: of the commonest label or answer, the bare model, h without the model."""
    test, bare = problem.test, Adapted(None, problem.gpt, problem.encoder, problem.label_ids)
    zero_shot = problem.accuracy(predict(bare, test), test)
    if test.labels.ndim == 2:
        answers, counts = problem.train.labels.unique(dim=0, return_counts=True)
        commonest = answers[counts.argmax()].expand_as(test.labels)
        return dict(majority=problem.accuracy(commonest, test), zero_shot=zero_shot)
    probe = linear_probe(problem.train.instances, problem.train.labels, test.instances)
    majority = (test.labels == problem.train.labels.bincount().argmax()).float().mean().item()
    *_, hidden_layer = fit(replace(config, quiet=True), HiddenLayerProbe(config, problem), problem)
    return dict(majority=majority, zero_shot=zero_shot, linear_probe=problem.accuracy(probe, test),
                hidden_layer_probe=hidden_layer["accuracy"])


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
    ending: Tensor | None = None         # (n,), tokens that the template has after the text
    source: str = ""                     # which data this is
    fingerprint: str = ""                # of all frozen weights that an adapter depends on
    data_sha256: str = ""                # of the encoded texts and labels, and of the label words
    pretrain_seconds: float = 0.0
    kinds: Sequence[str] = ()            # of the sample's dev sentences
    task: data.Task | None = None        # needed for answers alone
    tokenizer: tiktoken.Encoding | None = None
    names: dict[str, list] = field(default_factory=dict)     # task_id of every row, by name of the split

    @property
    def test_name(self) -> str:
        return next(iter(self.tests))

    @property
    def test(self) -> data.Encoded:
        return self.tests[self.test_name]

    def right(self, predictions: Tensor, split: data.Encoded) -> Tensor:
        """Which rows of a split are predicted rightly, (N,), from (N, labels) or (N, max_answer)."""
        if split.labels.ndim == 1:
            return predictions.argmax(dim=-1).to(split.labels.device) == split.labels
        return torch.tensor([data.same_answer(self.task, given, wanted) for given, wanted
                             in zip(self.texts(predictions), self.texts(split.labels))])

    def accuracy(self, predictions: Tensor, split: data.Encoded) -> float:
        """The share of rows that are predicted rightly: `right`'s mean."""
        return self.right(predictions, split).float().mean().item()

    def texts(self, answers: Tensor) -> list[str]:
        """Answers as tokens, (N, max_answer), in words."""
        return [data.decode_answer(self.task, tokens, self.tokenizer) for tokens in answers]

    def hold_out(self, count: int) -> "Problem":
        """`count` training rows as the rows to score, the others to train on; dev is not in it.

        Drawn with a fixed seed, as many of each label as is its share: a file may be sorted by label.
        """
        N = len(self.train)
        if count > N - 2:
            raise ValueError(f"--holdout {count} leaves less than 2 of {N} training rows: lower it")
        drawn = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        labels = self.train.labels.cpu()[drawn]
        by_label = drawn[labels.argsort(stable=True)] if labels.ndim == 1 else drawn
        held = torch.zeros(N, dtype=torch.bool)
        held[by_label[torch.arange(count) * N // count]] = True        # evenly spaced among the sorted labels
        held = held.to(self.train.labels.device)
        return replace(self, train=self.train[~held], tests={"held-out training rows": self.train[held]},
                       kinds=())

    def controlled(self, control: str | None, seed: int = 0) -> "Problem":
        """The problem with something taken away from every text, in training and in scoring.

        "shuffled": its h is that of some other text, so the prompt knows nothing of the text, and is noise.
        "constant": its h is the training split's average, so the prompt knows nothing, without the noise.
        "blind": the text is gone, and the model reads the prompt and the template's end: what it answers, it
        has from h alone. Raises ValueError where the template ends with the text.
        """
        if control == "blind" and not len(self.ending):
            raise ValueError("control blind: the task has nothing after its text: end its template with a "
                             "word")
        generator = torch.Generator().manual_seed(seed)

        def change(split: data.Encoded) -> data.Encoded:
            if control == "constant":
                return replace(split, instances=torch.zeros_like(split.instances))     # h is standardised
            if control == "blind":
                return replace(split, tokens=self.ending.expand(len(split), -1),
                               lengths=torch.full_like(split.lengths, len(self.ending)))
            order = torch.randperm(len(split), generator=generator).to(split.labels.device)
            instances = torch.empty_like(split.instances)
            instances[order] = split.instances[order.roll(1)]          # the one before it in a random circle
            return replace(split, instances=instances)

        if control is None:
            return self
        return replace(self, train=change(self.train),
                       tests={name: change(split) for name, split in self.tests.items()})


def prepare(config: Config) -> Problem:
    """Read the data, load or pre-train the model, encode the texts, compute the instance embeddings."""
    task = data.TASKS[config.task]
    with one_process_first():                                          # it downloads and pre-trains for all
        train_rows, dev_rows, source = data.load_task(
            config.task, config.data, config.max_train, sample=config.model == "tiny", cache_dir=config.cache,
            quiet=config.quiet)
        if len(train_rows) < 2:
            raise ValueError(f"{source}: 1 training row, but h is scaled by a deviation, which takes 2")
        gpt, encoder, tokenizer, pretrain_seconds = load_frozen(config)
    frozen = fingerprint(gpt, encoder)
    if len(models := set(gathered(frozen))) > 1:
        raise ValueError(f"the processes have different frozen models ({', '.join(models)}): "
                         "copy the .cache of one to all")
    label_ids, ending = data.label_tokens(task, tokenizer), data.template_ending(task, tokenizer)
    room, sha256 = text_room(config, gpt, encoder, task.max_answer), hashlib.sha256(label_ids.numpy())

    def encode(rows: list[data.Row]) -> data.Encoded:
        split = data.encode(task, rows, tokenizer, room)
        for tensor in (split.tokens, split.lengths, split.labels):
            sha256.update(tensor.numpy())
        if len(set(gathered(sha256.hexdigest()))) > 1:
            raise ValueError(f"the processes read different data from {source}: copy it to all machines")
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
    sample = config.data is None and config.model == "tiny" and task.kind
    label_ids, ending = label_ids.to(config.device), ending.to(config.device)
    problem = Problem(gpt, encoder, label_ids, train, tests, ending, source, frozen, sha256.hexdigest()[:12],
                      pretrain_seconds, [task.kind(texts) for texts, _ in dev_rows["dev"]] if sample else (),
                      task, tokenizer, {name: [texts.get("task_id", i) for i, (texts, _) in enumerate(rows)]
                                        for name, rows in dev_rows.items()})
    if config.holdout:
        problem = problem.hold_out(config.holdout)
    return problem.controlled(config.control, config.seed)


def build(config: Config, problem: Problem) -> Adapted:
    """The frozen model with one method on it, its initial values drawn from the seed, or words'.

    Raises ValueError for an init_text without a token.
    """
    torch.manual_seed(config.seed)
    model = Adapted(config, problem.gpt, problem.encoder, problem.label_ids)
    if config.init_text is not None:
        if not (tokens := problem.tokenizer.encode_ordinary(config.init_text)):
            raise ValueError("--init-text: there is no word in it: leave it out")
        over_and_over = [tokens[i % len(tokens)] for i in range(config.num_virtual_tokens)]      # m tokens
        model.prompt.start_from(problem.gpt.embed(torch.tensor(over_and_over, device=config.device)))
    return model


def load_frozen(config: Config) -> tuple[GPT, InstanceEncoder, tiktoken.Encoding, float]:
    """(model, instance encoder, the tokenizer they share, seconds of pre-training)."""
    gpt, tokenizer, seconds = load_model(config.model, config)
    other = gpt if config.encoder == config.model else load_model(config.encoder, config)[0]
    if other.config.vocab_size != gpt.config.vocab_size:
        raise ValueError(f"encoder {config.encoder} has {other.config.vocab_size} tokens and the model "
                         f"{gpt.config.vocab_size}: they have to share a tokenizer")
    return gpt, InstanceEncoder(other, config.encoder_blocks), tokenizer, seconds


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
    gpt = gpt.to(config.device, getattr(torch, config.dtype))
    return gpt.requires_grad_(False).eval(), tokenizer, seconds


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
        load_tensors(gpt.state_dict(), data.load_file(path), path)
        return gpt, tokenizer, 0.0
    newline = tokenizer.encode_single_token("\n")
    starts = torch.cat([torch.zeros(1, dtype=torch.long), (token_ids == newline).nonzero().flatten() + 1])
    require_writable(path.parent)                                      # before the work, not after it
    began = time.time()
    gpt = pretrain(config, token_ids, starts, seed, device,
                   partial(tqdm, desc="pre-training the tiny GPT, once", disable=quiet or None))
    data.save_file(path, gpt.state_dict())
    return gpt, tokenizer, time.time() - began


def fingerprint(gpt: GPT, encoder: InstanceEncoder) -> str:
    """Of all frozen weights that an adapter depends on."""
    return gpt.fingerprint() + ("" if encoder.gpt is gpt else "+" + encoder.gpt.fingerprint())


def text_room(config: Config, gpt: GPT, encoder: InstanceEncoder, max_answer: int = 0) -> int:
    """How many tokens of text fit between the prompt and the answer. Raises ValueError if none do.

    The same for methods without a prompt, so that all see the same texts.
    """
    context, m = gpt.config.n_positions, config.num_virtual_tokens * (2 if config.fusion == "concat" else 1)
    m += max_answer
    if m >= context:
        raise ValueError(f"{m} prompt{' and answer' * bool(max_answer)} tokens leave no room for text in a "
                         f"context of {context}: lower --num-virtual-tokens")
    return min(context - m, encoder.gpt.config.n_positions)


# ------------------------------------------------------------------------------------------------------------
# 6. Files. A run in progress is its checkpoint; a finished one adapter.pt, metrics.jsonl and result.json.

FORMAT = 4                               # of adapters and checkpoints
CHECKPOINTS = ("checkpoint.pt", "checkpoint-before.pt")
NEW_CHECKPOINT = "checkpoint-new.pt"     # for a moment, while the others change places
ADAPTER_KEYS = dict(format=int, config=dict, depends_on=dict, task=dict, instance_mean=Tensor,
                    instance_std=Tensor, tensors=dict)
CHECKPOINT_KEYS = ADAPTER_KEYS | dict(step=int, losses=Tensor, metrics=list, seconds=float, moments=dict)
METRICS_KEYS = dict(epoch=int, loss=float, accuracy=float, seconds=float)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")              # what AdamW remembers of every tensor


def all_that_decides(config: Config, problem: Problem) -> dict:
    """What a result depends on: two runs are the same if this is."""
    return config.deciding() | dict(data=problem.source, fingerprint=problem.fingerprint,
                                    data_sha256=problem.data_sha256)


def saved(config: Config, model: Adapted, problem: Problem) -> dict:
    """What an adapter and a checkpoint both hold: the trained tensors, and all that they depend on."""
    return dict(format=FORMAT, config=config.deciding(), depends_on=all_that_decides(config, problem),
                task=asdict(data.TASKS[config.task]) | {"sample": None, "kind": None},
                instance_mean=problem.encoder.mean.cpu(), instance_std=problem.encoder.std.cpu(),
                tensors={name: tensor.detach().cpu() for name, tensor in model.trained().items()})


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write DIR/checkpoint.pt and keep the one before it: a crash can damage what was written last."""
    if is_first_process():
        newest, before = (folder / name for name in CHECKPOINTS)
        data.save_file(folder / NEW_CHECKPOINT, state)                 # whole, before an older one goes
        if newest.exists():
            os.replace(newest, before)
        os.replace(folder / NEW_CHECKPOINT, newest)


def load_state(path: Path) -> dict:
    """The content of an adapter or a checkpoint. ValueError: it is neither, or not as this program saves it.

    Its tensors are checked when the model is there that they belong to: load_tensors.
    """
    try:
        state = data.load_file(path)
        kinds = {name: type(value) for name, value in state.items()}
        if kinds.get("format") is int and state["format"] != FORMAT:
            raise ValueError(f"format {state['format']} instead of {FORMAT}")
        if kinds not in (ADAPTER_KEYS, CHECKPOINT_KEYS):
            raise ValueError("other content")
        data.Task(**state["task"])
        here, there = dict(device="auto", model="tiny", encoder="tiny"), state["depends_on"]
        json.dumps(there)                                              # TypeError: not all are plain values
        elsewhere = ("data", "fingerprint", "data_sha256", "model", "encoder")      # may be gone by now
        config = Config(**state["config"] | here).deciding()
        config["encoder_blocks"] = state["config"]["encoder_blocks"]   # None is 0 for tiny alone
        if there != config | {name: there[name] for name in elsewhere}:
            raise ValueError("config and depends_on differ")
        if "step" in state:
            require_whole(state)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, or no file of this program ({short(error, 160)}): delete it, "
                         "or name another folder") from None
    return state


def require_whole(state: dict) -> None:
    """ValueError if a checkpoint's parts do not fit each other: earlier_run then tries the one before it."""
    step, losses, metrics, moments = (state[name] for name in ("step", "losses", "metrics", "moments"))
    json.dumps([metrics, state["seconds"]], allow_nan=False)           # ValueError, too
    if any({name: type(value) for name, value in line.items()} != METRICS_KEYS for line in metrics):
        raise ValueError("other metrics")
    like = state["tensors"] | dict(losses=torch.zeros(losses.shape, dtype=torch.float64)) | {
        f"{name}.{key}": torch.tensor(0.0) if key == "step" else tensor
        for name, tensor in state["tensors"].items() for key in MOMENTS}
    require_form(like, state["tensors"] | moments | dict(losses=losses), "tensors")
    in_epochs = step - losses.shape[1]                                 # steps of whole epochs
    if ({moments[name].item() for name in like if name.endswith(".step")} != {step}
            or bool(in_epochs) != bool(metrics) or in_epochs % max(len(metrics), 1)):
        raise ValueError(f"not all of it is of step {step}")


def earlier_run(folder: Path, quiet: bool = False) -> dict | None:
    """The newest checkpoint of the folder that can be read, or its adapter; None where no run has been.

    ValueError where nothing can be read though a name that we would write is taken: that file is not ours.
    """
    problem = None
    for name in (*CHECKPOINTS, NEW_CHECKPOINT, "adapter.pt", "metrics.jsonl", "result.json"):
        if (folder / name).exists():
            try:
                state = load_state(folder / name)
            except ValueError as error:
                problem = problem or error
                continue
            if problem and not quiet:
                tell(f"{problem}; using {name}")
            return state
    if problem:
        raise problem


def require_same_run(folder: Path, there: dict, here: dict) -> None:
    """ValueError if the run in the folder depends on something else, and so is another one."""
    for name, value in here.items():
        if there.get(name) != value:
            raise ValueError(f"{folder} holds another run: {name} is {short(there.get(name))} there and "
                             f"{short(value)} here: name another folder with --out")


def moments(model: Adapted, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What AdamW remembers of every trained tensor, by name: its steps, its averages of the gradient."""
    return {f"{name}.{key}": optimizer.state[p][key] for name, p in model.trained().items()
            for key in MOMENTS}


def restore_checkpoint(state: dict, model: Adapted, optimizer: torch.optim.Optimizer, steps_per_epoch: int,
                       total_steps: int) -> tuple[int, list[Tensor], list[dict]]:
    """Put a checkpoint's tensors where they were -> (steps done, this epoch's losses, metrics so far)."""
    process, num_processes = rank_and_world_size()
    step, losses, metrics = state["step"], state["losses"], state["metrics"]
    if losses.ndim == 2 and len(losses) != num_processes:
        raise ValueError(f"the checkpoint is of {len(losses)} processes and this run has {num_processes}: "
                         "start as many as before")
    if (not 0 < step <= total_steps or losses.shape != (num_processes, step % steps_per_epoch)
            or [line.get("epoch") for line in metrics] != list(range(1, step // steps_per_epoch + 1))):
        raise ValueError(f"the checkpoint after step {step} does not fit a run of {total_steps}: start again")
    for p in model.trained().values():
        optimizer.state[p] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p),
                                  exp_avg_sq=torch.zeros_like(p))
    load_tensors(model.trained() | moments(model, optimizer), state["tensors"] | state["moments"],
                 "the checkpoint")
    return step, list(losses[process].float().to(model.label_ids.device)), metrics


def restore(adapter: dict, gpt: GPT, encoder: InstanceEncoder, label_ids: Tensor) -> Adapted:
    """An adapter, and the model and encoder it was trained on -> the adapted model; fits the encoder too.

    Raises ValueError for another model and for tensors that are not this method's.
    """
    trained_on, at_hand = adapter["depends_on"].get("fingerprint"), fingerprint(gpt, encoder)
    if trained_on != at_hand:
        raise ValueError(f"this adapter was trained on another model ({short(trained_on)}) than the one at "
                         f"hand ({at_hand}): use that model or train again")
    scale = dict(instance_mean=encoder.mean, instance_std=encoder.std)
    load_tensors(scale, {name: adapter[name] for name in scale}, "the adapter")
    if not (encoder.std > 0).all():
        raise ValueError("the adapter: a deviation in instance_std is not above 0: train again")
    model = Adapted(Config(**adapter["config"] | dict(device="cpu")), gpt, encoder, label_ids)
    load_tensors(model.trained(), adapter["tensors"], "the adapter")
    return model


def require_form(wanted: dict[str, Tensor], found: dict[str, Tensor], where: str | Path) -> None:
    """ValueError if one of the tensors `found` is missing, unknown, of another form or not finite."""
    def form(tensor) -> str:
        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided:
            return "no tensor"
        return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"

    if not isinstance(found, dict):
        raise ValueError(f"{where}: no tensors by name: delete it")
    for name in wanted | found:
        needed, there = form(wanted.get(name)), form(found.get(name))
        if needed != there or needed == "no tensor":
            raise ValueError(f"{where}: {short(repr(name))} is {there} and should be {needed}: it is "
                             "damaged, or another model's")
        if not found[name].isfinite().all():
            raise ValueError(f"{where}: {name!r} has numbers that are not finite: train again")


def load_tensors(wanted: dict[str, Tensor], found: dict[str, Tensor], where: str | Path) -> None:
    """Copy `found` into `wanted`. ValueError, with nothing changed, if they do not have the same form."""
    require_form(wanted, found, where)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else runs in the folder meanwhile: ValueError if somebody does. It ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another run: name another folder with --out") from None
    try:
        yield
    finally:
        if fcntl:
            os.close(descriptor)


def require_writable(folder: Path) -> None:
    """OSError if nothing can be saved in the folder, which need not be there yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise OSError(f"nothing can be saved in {folder}, because of {there}: name another folder with --out "
                      "or --cache")


# ------------------------------------------------------------------------------------------------------------
# 7. What the command line can ask for: a run, or a prediction


def run(config: Config, resume: bool = False) -> dict:
    """Train and score one method; leave adapter.pt, metrics.jsonl and result.json in the run folder.

    What an earlier run has left in the folder stays until the new result takes its place.
    """
    folder = config.folder
    require_writable(folder)
    if state := earlier_run(folder) if resume else None:
        require_same_run(folder, state["config"], config.deciding())   # before anything is downloaded
    problem = prepare(config)
    model = build(config, problem)
    depends_on = all_that_decides(config, problem)
    with locked(folder) if is_first_process() else nullcontext():
        if earlier := state or earlier_run(folder):
            require_same_run(folder, earlier["depends_on"], depends_on)
            if resume and "step" not in earlier:
                return finished(config)
            if "step" in earlier:
                config.say(f"going on after step {earlier['step']}" if resume else
                           f"starting anew: --resume {folder} would go on after step {earlier['step']}")
        result = describe(config, problem, model, depends_on)
        try:
            metrics = fit(config, model, problem, folder, state)
        except (KeyboardInterrupt, OSError) as error:
            kept = any((folder / name).exists() for name in CHECKPOINTS)
            advice = f"to go on from the last checkpoint: {COMMAND} --resume {folder}"
            message = f"{str(error) or 'interrupted'}; {advice if kept else 'nothing was saved yet'}"
            raise type(error)(message) from None
        for name, test in problem.tests.items():
            suffix, scores = "" if name == problem.test_name else f"_{name}", predict(model, test)
            result["accuracy" + suffix] = problem.accuracy(scores, test)
            if test.labels.ndim == 2:
                result["loss" + suffix] = every_row(
                    test, 1, lambda batch: loss_of(model, batch).expand(len(batch), 1)).mean().item()
                answers = zip(problem.names.get(name, range(len(test))), problem.texts(scores))
                if is_first_process():
                    data.save_file(folder / f"completions{suffix}.jsonl",
                                   [dict(task_id=task_id, completion=text) for task_id, text in answers])
            if "f1" in data.TASKS[config.task].metrics:
                result["f1" + suffix] = data.f1(scores.argmax(dim=-1), test.labels)
            if problem.kinds:                                          # the sample has one dev split
                result["accuracy_by_kind"] = by_kind = accuracy_by_kind(problem, scores)
                config.say(f"accuracy on {name} by kind of sentence: "
                           + ", ".join(f"{kind} {score:.3f}" for kind, score in by_kind.items()))
        result["train_seconds"] = metrics[-1]["seconds"]
        if is_first_process():
            data.save_file(folder / "adapter.pt", saved(config, model, problem))
            data.save_file(folder / "metrics.jsonl", [depends_on, *metrics])
            data.save_file(folder / "result.json", result)
            killed = folder.glob(f"{NEW_CHECKPOINT}.*.part")           # half files, of processes that were
            for path in [*(folder / name for name in (*CHECKPOINTS, NEW_CHECKPOINT)), *killed]:
                path.unlink(missing_ok=True)
    config.say(f"wrote {folder}/adapter.pt, metrics.jsonl and result.json\n"
               f'to use it: {COMMAND} --adapter {folder} --predict "..."')
    return result


def describe(config: Config, problem: Problem, model: Adapted, depends_on: dict) -> dict:
    """Print what is about to be trained -> all of the result that is known before."""
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
    probes = (f"; on h alone a linear probe {before['linear_probe']:.3f}, one with a hidden layer "
              f"{before['hidden_layer_probe']:.3f}" if "linear_probe" in before else "")
    config.say(f"before training, accuracy on {problem.test_name}: majority class {before['majority']:.3f}, "
               f"zero-shot {before['zero_shot']:.3f}{probes}")
    return about | before | dict(trainable_parameters=trainable, total_parameters=total, device=config.device,
                                 torch=torch.__version__, pretrain_seconds=problem.pretrain_seconds)


def finished(config: Config) -> dict:
    """The result that the run folder holds. ValueError if it is damaged."""
    path = config.folder / "result.json"
    try:
        result = dict(json.loads(path.read_bytes()))
        config.say(f"{config.folder} is finished, with accuracy {result['accuracy']:.3f}")
        return result
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({short(error)}): run again without --resume") from None


def predict_text(text: str, folder: str, device: str, cache: str) -> None:
    """Print tab-separated values, one row a text: label, probabilities, text. Needs a saved adapter alone."""
    adapter = load_state(Path(folder) / "adapter.pt")
    config = Config(**adapter["config"] | dict(device=device, cache=cache, quiet=True))
    if config.control:
        complain(f"the adapter in {folder} is a control ({config.control}), made to be scored: predict with "
                 "one that was trained without --control")
    task = data.Task(**adapter["task"])
    rows = [(dict(zip(task.fields, texts)), "" if task.answer else 0)
            for texts in read_texts(text, list(task.fields), quoted=bool(task.answer))]
    gpt, encoder, tokenizer, _ = load_frozen(config)
    model = restore(adapter, gpt, encoder, data.label_tokens(task, tokenizer).to(config.device))
    room = text_room(config, gpt, encoder, task.max_answer)
    split = data.encode(task, rows, tokenizer, room).to(config.device)
    predictions = predict(model, replace(split, instances=instance_embeddings(encoder, split)))
    print("\t".join(["answer" if task.answer else "label", *task.label_names, *task.fields]))
    for (texts, _), p in zip(rows, predictions):
        if task.answer:                                                # code has line ends and tabs in it
            print("\t".join(map(json.dumps, [data.decode_answer(task, p, tokenizer), *texts.values()])))
        else:
            print("\t".join([task.label_names[p.argmax()], *(f"{x:.3f}" for x in p), *texts.values()]))
    if split.num_cut:
        print(f"note: {split.num_cut} of {len(split)} texts were cut to {room} tokens", file=sys.stderr)
    texts = [text for texts, _ in rows for text in texts.values()]
    if config.model == "tiny" and (unread := data.unread_words(texts, tokenizer)):
        print(f"note: never read: {short(', '.join(unread))}: the tiny GPT knows its sample's words alone",
              file=sys.stderr)


def read_texts(source: str, fields: list[str], quoted: bool = False) -> list[list[str]]:
    """The texts of a file, of standard input ("-") or `source` itself: one a line, a pair with a tab between.

    `quoted`: a text in double quotes is a JSON string, so that it can have several lines, as code has.
    Blanks around a text are taken off, as in training. ValueError: a path where nothing is, text that is not
    UTF-8, a line that does not have one text for each field; OSError: a folder.
    """
    where = source
    if source == "-":
        content, where = b"" if sys.stdin is None else sys.stdin.buffer.read(), "standard input"
    elif os.path.exists(source):
        content = Path(source).read_bytes()                            # a folder is an OSError that names it
    elif re.fullmatch(r"\S*[/\\]\S*|\S+\.\w{1,5}", source):
        raise ValueError(f"--predict: there is no file {source}; if it is a text, give it to --predict -")
    else:
        content, where = source.encode(errors="surrogateescape"), "--predict"
    try:
        lines = content.decode("utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start} is not UTF-8: save it as UTF-8") from None
    rows = [[text.strip() for text in line.split("\t")] for line in lines]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(fields) or not all(row):
            raise ValueError(f"{where}, line {number}: {sum(map(bool, row))} texts, the task takes "
                             f"{len(fields)} ({', '.join(fields)}): one example a line, a tab within a pair")
        try:
            row[:] = [json.loads(text) if quoted and text[0] == text[-1] == '"' else text for text in row]
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}, line {number}: no JSON string ({error}): mend it, or leave out the "
                             "quotes around it") from None
    return rows


# ------------------------------------------------------------------------------------------------------------
# 8. The command line: one flag for each field of Config, and what to do


def build_parser() -> argparse.ArgumentParser:
    """A flag for every field of Config; the comments in its source are the help, and name the groups."""
    parser = argparse.ArgumentParser(description=__doc__, usage="python train.py --task TASK [flags]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = complain                                            # one line, as for all other bad input
    kinds, group = {f.name: get_args(f.type) or (f.type,) for f in fields(Config)}, parser
    for line in inspect.getsource(Config).splitlines():
        if heading := re.fullmatch(r"    # (.*)", line):
            group = parser.add_argument_group(heading[1])
        elif found := re.fullmatch(r"    (\w+): .*?# (.*)", line):
            name, help = found.groups()
            default, flag = getattr(Config, name, None), "--" + name.replace("_", "-")
            if kinds[name][0] is bool:
                group.add_argument(flag, action="store_true", help=help)
            else:
                help += " (default: %(default)s)" if default is not None else ""
                group.add_argument(flag, type=kinds[name][0], default=default, choices=CHOICES.get(name),
                                   help=help)
    group.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, after its last checkpoint")
    use = parser.add_argument_group("To use what was trained")
    use.add_argument("--predict", metavar="TEXT", help="print labels and probabilities, tab-separated: of "
                     "TEXT, of a file's lines, or with - of standard input's; a tab parts a pair's texts")
    use.add_argument("--adapter", metavar="DIR", help="run folder to predict with")
    for moved in ("--compare", "--ablate"):
        parser.add_argument(moved, action="store_true", help=argparse.SUPPRESS)
    return parser


def tell(message: str) -> None:
    """One line on standard error, which names the program that was started."""
    print(f"{COMMAND.split()[-1]}: {message}", file=sys.stderr)


def complain(message: str) -> NoReturn:
    raise ValueError(message)


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, Config | None]:
    """(the flags, their Config; None if they ask for a prediction). ValueError for what makes no sense."""
    parser = build_parser()
    args, usual = parser.parse_args(argv), vars(parser.parse_args([]))
    if args.compare or args.ablate:
        complain("this is now: python -m experiments.compare"
                 + f" --task {args.task}" * bool(args.task) + " --ablate" * args.ablate)
    if (args.predict is None) != (args.adapter is None):
        complain("--predict TEXT and --adapter DIR go together")
    if args.predict is not None:
        require_effect(args, usual, usual.keys() - {"predict", "adapter", "device", "cache"}, "--predict")
        return args, None
    if args.resume is not None:                                        # the run's flags, then this command's
        require_effect(args, usual, {"out"}, "--resume, whose folder it is")
        state = earlier_run(Path(args.resume), quiet=True)             # `run` looks again, and says more
        if state is None:
            complain(f"{args.resume} holds no run: begin one with --task")
        parser.set_defaults(**state["config"] | dict(out=args.resume))
        args = parser.parse_args(argv)
    if args.task is None:
        complain(f"name a task: --task {' or '.join(data.TASKS)}")
    config = Config(**{f.name: getattr(args, f.name) for f in fields(Config)})
    usual, method = vars(Config(config.task, config.method, config.model)), METHODS.get(config.method)
    used = set(inspect.signature(method).parameters if method else ["rank"] * (config.method == "lora"))
    idle = {"num_virtual_tokens", "rank", "hidden_dim", "fusion", "dropout", "init_std", "head_std"} - used
    idle |= {"head_lr"} if "head_std" not in used else set()
    if "instance_dim" not in used:                                     # the method does not look at h
        idle |= {"encoder", "encoder_blocks", "encoder_lr", "tune_encoder"}
        idle |= {"control"} if config.control != "blind" else set()
    require_effect(config, usual, idle, f"--method {config.method}")
    if config.init_text is not None:
        require_effect(config, usual, {"init_std"}, "--init-text")
    if config.tune_encoder:
        require_effect(config, usual, {"control"}, "--tune-encoder, which computes h itself")
    else:
        require_effect(config, usual, {"encoder_lr"}, "a frozen encoder")
    if "tiny" not in (config.model, config.encoder):
        require_effect(config, usual, {"pretrain_seed"}, f"--model {config.model}")
    return args, config


def require_effect(options, usual: dict, names: set[str], where: str) -> None:
    """ValueError for a flag among these names that was given though it changes nothing there."""
    for name in sorted(names):
        if getattr(options, name) != usual[name]:
            complain(f"--{name.replace('_', '-')} has no effect with {where}: leave it out")


def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for bad input, 130 for Ctrl-C."""
    try:
        args, config = parse_args(argv)
        if config is None:
            return predict_text(args.predict, args.adapter, args.device, args.cache)
        join_processes(config)
        result = run(config, resume=args.resume is not None)
        if is_first_process():
            print(json.dumps(result))
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("alloc|out of memory", str(error)):
            raise                                                      # a mistake of ours: show where it is
        tell(f"error: {short(error, 300)}")
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        tell(str(interrupt) or "interrupted")
        sys.exit(130)
    finally:
        if dist.is_initialized():
            gc.collect()                                               # what uses the group goes before it
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------
# 9. Several processes, if torchrun started them: each has a part of every batch, the first writes the files


def join_processes(config: Config) -> None:
    if "LOCAL_RANK" not in os.environ:                                 # torchrun sets it
        return
    number = int(os.environ["LOCAL_RANK"])
    if config.device == "mps" or config.device == "cuda" and number >= torch.cuda.device_count():
        raise ValueError(f"--device {config.device}: there is not one for each process: use --device cpu")
    if config.device == "cuda":
        torch.cuda.set_device(number)                                  # from here on "cuda" is this one
    # A large model may be downloaded while the others wait; torchrun ends all of them as soon as one fails.
    dist.init_process_group("nccl" if config.device == "cuda" else "gloo", timeout=timedelta(days=1))
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
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()                          # no search for garbage in torch itself: a tenth of the sample's run
    main()
