"""Train a soft prompt for a frozen GPT, score it, use it, and compare it with its relatives.

    python train.py --task sst2                            LoPA on the built-in sample, half a minute the first time
    python train.py --task sst2 --method pt                prompt tuning, to compare
    python train.py --task sst2 --data DIR                 real GLUE files: DIR/SST-2/train.tsv and dev.tsv
    python train.py --adapter runs/sst2-lopa-tiny-seed0 --predict "a gorgeous , witty film"     or a file, or - for stdin
    python train.py --resume runs/sst2-lopa-tiny-seed0     go on after a crash, bit for bit
    torchrun --nproc_per_node=2 train.py --task sst2       several processes share every batch
    python train.py --task sst2 --compare                  every method, five seeds, one table
    python train.py --task sst2 --ablate                   LoPA with one thing changed at a time, five seeds

The language model is never changed. What is trained, and all that is saved, is the soft prompt of lopa.py (but for the
two yardsticks: lora adds to the model's weights, full trains all of them).
"""

import argparse
import copy
import ctypes
import gc
import hashlib
import json
import math
import os
import signal
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import partialmethod
from pathlib import Path

import torch
from torch import Tensor, distributed as dist, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from lopa import FUSIONS, METHODS, add_lora, get_nb_trainable_parameters
from model import GPT, InstanceEncoder, cosine_schedule, tiny_gpt

ADAPTER_FORMAT = 2

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
        logits = self.gpt.logits(last)[:, self.label_ids]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))             # bfloat16 is coarse for a softmax

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def batches(split: data.Encoded, order: Sequence[Tensor]):
    """(rows, tokens, lengths, labels) for each tensor of row numbers in `order`, padded to the longest text of these rows."""
    if order:
        widths = torch.stack([split.lengths[rows].max() for rows in order]).tolist()     # asks the GPU once, not per batch
        for rows, width in zip(order, widths):
            yield rows, split.tokens[rows, :width], split.lengths[rows], split.labels[rows]


def shuffled_batches(split: data.Encoded, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """The row numbers of one epoch's batches, in random order.

    Where lengths vary much, a batch of random texts is mostly padding (on SST-2, 36 positions for 14 tokens). There every
    50 batches' worth of rows is sorted by length and cut into batches, and the batches are shuffled.
    """
    order = torch.randperm(len(split), generator=generator)
    if not split.ragged:
        return list(order.to(split.labels.device).split(batch_size))
    lengths = split.lengths.cpu()
    pools = [pool[lengths[pool].argsort()] for pool in order.split(50 * batch_size)]
    cut = torch.cat(pools).to(split.labels.device).split(batch_size)
    return [cut[i] for i in torch.randperm(len(cut), generator=generator)]


def every_row(split: data.Encoded, width: int, compute: Callable) -> Tensor:
    """compute(rows, tokens, lengths) -> (rows, width), for all rows: (N, width). Processes share the batches."""
    order = split.lengths.argsort() if split.ragged else torch.arange(len(split), device=split.labels.device)
    rank, world_size = rank_and_world_size()
    result = torch.zeros(len(split), width, device=order.device)
    for rows, tokens, lengths, _ in batches(split, order.split(256)[rank::world_size]):
        result[rows] = compute(rows, tokens, lengths).float()
    return summed(result)


@torch.no_grad()
def instance_embeddings(encoder: InstanceEncoder, split: data.Encoded) -> Tensor:
    """h for every row, (N, d_h): computed once, since the encoder is frozen and h never changes."""
    return every_row(split, len(encoder.mean), lambda rows, tokens, lengths: encoder(tokens, lengths))


@torch.no_grad()
def predict(model: Adapted, split: data.Encoded, instances: Tensor) -> Tensor:
    """Probabilities of the labels for every row, (N, labels)."""
    model.eval()
    logits = every_row(split, len(model.label_ids),
                       lambda rows, tokens, lengths: model(tokens, lengths, instances[rows]))
    return logits.softmax(dim=-1)


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
# 3. Several processes, if torchrun started them: each has a part of every batch, and the first one writes the files


def join_processes(args: argparse.Namespace) -> None:
    if "LOCAL_RANK" not in os.environ:                                 # torchrun sets it
        return
    if args.compare or args.ablate:
        raise ValueError("--compare and --ablate train many small models one by one: start them without torchrun")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")


def rank_and_world_size() -> tuple[int, int]:
    """(number of this process, of all processes); (0, 1) for a single one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first_process() -> bool:
    return rank_and_world_size()[0] == 0


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_first_process(value):
    """The value that the first process passes, for all."""
    if dist.is_initialized():
        dist.broadcast_object_list(box := [value])
        return box[0]
    return value


@contextmanager
def one_process_first():
    """On every machine one process goes through the block, then the others."""
    goes_first = os.environ.get("LOCAL_RANK") == "0"
    if dist.is_initialized() and not goes_first:
        dist.barrier()
    yield
    if dist.is_initialized() and goes_first:
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------
# 4. Training


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
    fingerprint: str = ""                # of all frozen weights that an adapter depends on
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
    with one_process_first():                                          # it downloads and pre-trains, the others find it done
        train_rows, dev_rows, source = data.load_task(args.task, args.data, args.max_train, sample=args.model == "tiny",
                                                      cache_dir=args.cache)
        gpt, tokenizer, pretrain_seconds = load_model(args.model, args)
        encoder = load_encoder(args.encoder, gpt, args)
    label_ids = data.label_tokens(task, tokenizer).to(args.device)
    room = text_room(gpt, encoder, args.num_virtual_tokens, args.fusion)
    train, *tests = (data.encode(task, rows, tokenizer, room).to(args.device) for rows in (train_rows, *dev_rows.values()))
    frozen = fingerprint(gpt, encoder)
    if from_first_process(frozen) != frozen:
        raise ValueError(f"this process has another frozen model ({frozen}) than the first: copy its .cache here")
    train_instances = encoder.fit(kept_embeddings(encoder, train, frozen, args.cache))
    tests = [(test, kept_embeddings(encoder, test, frozen, args.cache)) for test in tests]
    (name, (test, test_instances)), *more = zip(dev_rows, tests)
    print(f"task {args.task}: {source}, {len(train)} training rows, {', '.join(f'{len(r)} {n}' for n, r in dev_rows.items())} rows")
    splits = [train, *(test for test, _ in tests)]
    if cut := sum(split.num_cut for split in splits):
        print(f"{cut} of {sum(map(len, splits))} texts were cut to {room} tokens, to fit the context of "
              f"{gpt.config.n_positions} together with the prompt")
    if args.data and args.model == "tiny":
        print("note: the tiny GPT has read a few thousand synthetic sentences and nothing else, so real text is beyond it "
              "whatever the prompt; real text needs a model pre-trained on real text: --model gpt2")
    problem = Problem(gpt, encoder, label_ids, train, test, train_instances, test_instances, source, name,
                      frozen, pretrain_seconds, dict(more))
    return problem.hold_out(args.holdout) if args.holdout else problem


def kept_embeddings(encoder: InstanceEncoder, split: data.Encoded, frozen: str, cache_dir: str) -> Tensor:
    """Instance embeddings, kept on disk under the name of what they were made from where there are over a million numbers."""
    if len(split) * len(encoder.mean) < 2 ** 20:
        return instance_embeddings(encoder, split)
    made_from = hashlib.sha256(frozen.encode())
    for part in (split.tokens, split.lengths, encoder.mean, encoder.std):
        made_from.update(part.cpu().contiguous().numpy())
    path = Path(cache_dir) / f"instances-{made_from.hexdigest()[:12]}.pt"
    kept = from_first_process(data.load_file(path) if is_first_process() and path.exists() else None)
    if kept is None:
        kept = instance_embeddings(encoder, split)
        if is_first_process():
            data.save_file(path, kept.cpu())
    return kept.to(split.labels.device)


def fingerprint(gpt: GPT, encoder: InstanceEncoder) -> str:
    """Of all frozen weights that an adapter depends on."""
    return gpt.fingerprint() + ("" if encoder.gpt is gpt else "+" + encoder.gpt.fingerprint())


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


class Trainer:
    """AdamW with warm-up and cosine decay on what requires a gradient, in place.

    Can stop after any step and go on from its `state_dict`, in another process, bit for bit: the order of the data comes
    from a generator whose state is kept, and every step seeds its own dropout.
    """

    check_every = 10                                                   # steps; reading a loss waits for the GPU

    def __init__(self, model: Adapted, split: data.Encoded, instances: Tensor, *, epochs: int, batch_size: int, lr: float,
                 seed: int):
        self.model, self.split, self.instances, self.batch_size, self.seed = model, split, instances, batch_size, seed
        self.rank, self.world_size = rank_and_world_size()
        if (smallest := (len(split) - 1) % batch_size + 1) < self.world_size:
            raise ValueError(f"the last batch has {smallest} rows for {self.world_size} processes: change --batch-size")
        self.forward = DistributedDataParallel(model, init_sync=False) if self.world_size > 1 else model
        self.parameters = list(model.trained().values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)
        self.steps_per_epoch = math.ceil(len(split) / batch_size)
        self.total_steps = epochs * self.steps_per_epoch
        self.schedule = cosine_schedule(self.optimizer, int(0.06 * self.total_steps), self.total_steps)
        self.generator = torch.Generator().manual_seed(seed)           # of the order of the data alone
        self.order_state = self.generator.get_state()                  # at the start of the epoch
        self.epoch, self.step, self.losses = 1, 0, []                  # this epoch, steps done in all, the epoch's losses
        # torch.manual_seed would note a stack trace for each kind of device at every step: 0.5 ms, and the notes pile up.
        self.seed_dropout = torch.cuda.manual_seed if split.labels.is_cuda else torch.default_generator.manual_seed

    def state_dict(self) -> dict:
        return dict(epoch=self.epoch, step=self.step, losses=summed(torch.stack(self.losses)), order_state=self.order_state,
                    optimizer=self.optimizer.state_dict(), schedule=self.schedule.state_dict(), trained=self.model.trained())

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.step, self.order_state = state["epoch"], state["step"], state["order_state"]
        self.losses = list(state["losses"].to(self.split.labels.device) / self.world_size)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for name, parameter in self.model.trained().items():
            parameter.data.copy_(state["trained"][name])

    def train_epoch(self) -> Iterator[None]:
        """Take the steps that are left of this epoch, and stop after each to let others look."""
        self.generator.set_state(self.order_state)
        order = shuffled_batches(self.split, self.batch_size, self.generator)
        order = order[self.step - (self.epoch - 1) * self.steps_per_epoch:]
        shares = [rows[self.rank::self.world_size] for rows in order]  # this process's part of each batch
        progress = tqdm(total=self.total_steps, initial=self.step, desc="training", disable=None, leave=False)
        self.model.train()
        for whole, (rows, tokens, lengths, labels) in zip(order, batches(self.split, shares)):
            self.seed_dropout((self.seed * self.total_steps + self.step) * self.world_size + self.rank)
            logits = self.forward(tokens, lengths, self.instances[rows])               # (B, labels)
            loss = F.cross_entropy(logits, labels)                     # over the label words alone
            self.optimizer.zero_grad()
            (loss * (len(rows) * self.world_size / len(whole))).backward()             # averaged, it is the whole batch's
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
            self.losses.append(loss.detach() * len(rows))
            if self.step % self.check_every == 0:
                progress.set_postfix(loss=f"{self.check() / len(rows):.3f}", refresh=False)
            progress.update()
            yield
        progress.close()

    def end_epoch(self) -> float:
        """The epoch's mean loss; what comes next is the next epoch."""
        self.check()
        total_loss = summed(torch.stack(self.losses).double().sum())
        self.epoch, self.losses, self.order_state = self.epoch + 1, [], self.generator.get_state()
        return total_loss.item() / len(self.split)

    def check(self) -> float:
        """The last loss. Raises FloatingPointError if one since the last check is not finite."""
        recent = torch.stack(self.losses[-self.check_every:]).tolist()
        for step, loss in enumerate(recent, start=self.step - len(recent) + 1):
            if not math.isfinite(loss):
                lr = self.optimizer.defaults["lr"] * self.schedule.lr_lambdas[0](step - 1)
                raise FloatingPointError(f"loss is {loss} at step {step} of {self.total_steps}, learning rate {lr:.2e}: "
                                         "lower --lr")
        return recent[-1]


# What tells one run from another on the same problem: what is built, and how it is trained.
MODEL_OPTIONS = ("method", "num_virtual_tokens", "rank", "hidden_dim", "dropout", "fusion", "init_std", "tune_encoder")
TRAINING_OPTIONS = ("lr", "epochs", "batch_size", "seed")


def build(problem: Problem, options: dict) -> Adapted:
    """The frozen model with one method on it, its initial values drawn from the seed."""
    torch.manual_seed(options["seed"])
    return Adapted(problem.gpt, problem.encoder, problem.label_ids, **{name: options[name] for name in MODEL_OPTIONS})


def fit(model: Adapted, problem: Problem, options: dict, state: dict | None = None,
        after_step: Callable = lambda trainer: None) -> Iterator[dict]:
    """Train `model` in place; yields dict(epoch, loss, accuracy) after every epoch.

    after_step(trainer) is called after every step. With `state`, a trainer's state_dict, training goes on from there.
    """
    if options["shuffle_instances"]:
        problem = problem.shuffled(options["seed"])
    trainer = Trainer(model, problem.train, problem.train_instances, **{name: options[name] for name in TRAINING_OPTIONS})
    if state:
        trainer.load_state_dict(state)
    while trainer.epoch <= options["epochs"]:
        for _ in trainer.train_epoch():
            after_step(trainer)
        epoch, loss = trainer.epoch, trainer.end_epoch()
        score = accuracy(predict(model, problem.test, problem.test_instances), problem.test.labels)
        yield dict(epoch=epoch, loss=loss, accuracy=score)


# ---------------------------------------------------------------------------------------------------------------
# 5. Files


def load_adapter(folder: str | Path) -> dict:
    """The content of DIR/adapter.pt, as `run` saved it."""
    path = Path(folder) / "adapter.pt"
    adapter = data.load_file(path)
    if not isinstance(adapter, dict) or adapter.get("format") != ADAPTER_FORMAT:
        raise ValueError(f"{path} is no adapter of format {ADAPTER_FORMAT}: train it again with this version")
    return adapter


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
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError:
        raise ValueError(f"{path} is damaged: delete it, or name another folder with --out") from None
    for name in config:
        if lines[0].get(name) != config[name]:
            raise ValueError(f"{path.parent} holds another run: {name} is {lines[0].get(name)} there and {config[name]} "
                             "here: name another folder with --out")
    return lines


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first: their names hold the step."""
    return sorted(folder.glob("checkpoint-*.pt"))


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write DIR/checkpoint-STEP.pt and keep the one before it as well: a crash can damage what was written last."""
    data.save_file(folder / f"checkpoint-{state['step']:09d}.pt", state)
    for old in checkpoints(folder)[:-2]:
        old.unlink()


def load_checkpoint(folder: Path) -> dict | None:
    """The newest checkpoint that can be read; None if there is none."""
    for path in reversed(checkpoints(folder)):
        try:
            state = data.load_file(path)
        except ValueError as error:
            print(f"train.py: {error}; trying the checkpoint before it", file=sys.stderr)
            continue
        print(f"going on after step {state['step']}, from {path}")
        return state


# ---------------------------------------------------------------------------------------------------------------
# 6. What the command line can ask for: a run, a prediction, a study


def configs(args: argparse.Namespace, problem: Problem) -> tuple[dict, dict]:
    """(what the problem is, the options of a run on it): together they say all that a result depends on."""
    about = dict(task=args.task, data=problem.source, model=args.model, encoder=args.encoder or args.model, dtype=args.dtype,
                 fingerprint=problem.fingerprint, pretrain_seed=args.pretrain_seed,
                 num_train=len(problem.train), num_scored=len(problem.test), scored_on=problem.test_name,
                 texts_cut=problem.train.num_cut + problem.test.num_cut)
    return about, {name: getattr(args, name) for name in (*MODEL_OPTIONS, "shuffle_instances", *TRAINING_OPTIONS)}


def run(args: argparse.Namespace) -> dict:
    """Train and score one method; leave result.json, metrics.jsonl and adapter.pt in the run folder."""
    out = Path(args.out or default_folder(args))
    if args.resume and (out / "result.json").exists():
        print(f"{out} is finished")
        return json.loads((out / "result.json").read_text())
    problem = prepare(args)
    about, options = configs(args, problem)
    if is_first_process():
        claim_folder(out / "metrics.jsonl", about | options)
    model = build(problem, options)
    trainable, total = get_nb_trainable_parameters(model)
    before = problem.baselines()
    config = ", ".join(f"{name} {value}" for name, value in (about | options).items())
    print(textwrap.fill(f"config: {config}", 110, subsequent_indent="  "))
    print(f"trainable: {trainable:,} of {total:,} parameters; the instance encoder is {args.encoder or 'the model itself'}, "
          + ("a copy, trained and counted too" if args.tune_encoder else "frozen"))
    print(f"before training, accuracy on {problem.test_name}: majority class {before['majority']:.3f}, zero-shot "
          f"{before['zero_shot']:.3f}, linear probe on the instance embedding {before['linear_probe']:.3f}", flush=True)
    last, seconds = train_and_save(args, out, model, problem, about, options)
    scores = {f"accuracy_{name}": accuracy(predict(model, split, h), split.labels)
              for name, (split, h) in problem.more_tests.items()}
    if "f1" in data.TASKS[args.task].metrics:
        probabilities = predict(model, problem.test, problem.test_instances)
        scores["f1"] = data.f1(probabilities.argmax(dim=-1), problem.test.labels)
    result = about | options | before | scores | dict(
        accuracy=last["accuracy"], trainable_parameters=trainable, total_parameters=total, train_seconds=seconds,
        pretrain_seconds=problem.pretrain_seconds, torch=torch.__version__, device=args.device)
    if is_first_process():
        data.save_file(out / "result.json", result)
        for rest in [*checkpoints(out), *out.glob("*.part")]:          # a killed process leaves half a file behind
            rest.unlink()
    print(f"wrote {out}/adapter.pt, metrics.jsonl and result.json\n"
          f'to use it: python train.py --adapter {out} --predict "..."')
    return result


def train_and_save(args: argparse.Namespace, out: Path, model: Adapted, problem: Problem, about: dict,
                   options: dict) -> tuple[dict, float]:
    """Train `model`, from the last checkpoint if the folder has one; returns (last epoch's line, seconds in all).

    Whenever the process ends, the folder's files are whole, and --resume goes on from them.
    """
    first = is_first_process()                                         # of several processes, this one writes
    adapter = dict(format=ADAPTER_FORMAT, task_name=args.task, task=asdict(data.TASKS[args.task]) | {"sample": None},
                   **{name: about[name] for name in ("model", "encoder", "dtype", "pretrain_seed", "fingerprint")},
                   model_options={name: options[name] for name in MODEL_OPTIONS},
                   instance_mean=problem.encoder.mean.cpu(), instance_std=problem.encoder.std.cpu())
    state = from_first_process(load_checkpoint(out) if first else None) or {}
    metrics, began = state.get("metrics", [about | options]), time.time() - state.get("seconds", 0.0)
    if first:
        if not args.resume:
            data.save_file(out / "command.json", args.command)         # for --resume
        data.save_file(out / "metrics.jsonl", metrics)                 # from here on the folder is this run's
        (out / "result.json").unlink(missing_ok=True)                  # of an earlier, equal one
    interrupted = []

    def after_step(trainer: Trainer) -> None:
        if interrupted or trainer.step % (args.save_every or trainer.steps_per_epoch) == 0:
            trainer.check()
            state = trainer.state_dict() | dict(metrics=metrics, seconds=time.time() - began)
            if first:
                save_checkpoint(out, state)
        if interrupted:
            raise KeyboardInterrupt(f"interrupted at step {trainer.step} of {trainer.total_steps}")

    # Ctrl-C leaves a note that is read after the step: what is saved is never half a step. Several processes would read it
    # at different steps, so there it ends them at once, and the last checkpoint stands.
    default_handler = signal.getsignal(signal.SIGINT)
    if not dist.is_initialized():
        signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    try:
        for line in fit(model, problem, options, state, after_step):
            metrics.append(line)
            print(f"epoch {line['epoch']}/{args.epochs}: loss {line['loss']:.4f}, {problem.test_name} accuracy "
                  f"{line['accuracy']:.3f}, {time.time() - began:.1f} s", flush=True)
            if first:
                tensors = {name: tensor.detach().cpu() for name, tensor in model.trained().items()}
                data.save_file(out / "adapter.pt", adapter | {"tensors": tensors})
                data.save_file(out / "metrics.jsonl", metrics)
    except (KeyboardInterrupt, FloatingPointError, OSError) as error:
        saved = checkpoints(out)
        kept = f"{saved[-1]} is the last checkpoint; to go on: python train.py --resume {out}" if saved else "nothing was saved yet"
        raise type(error)(f"{str(error) or 'interrupted'}; {kept}") from None
    finally:
        signal.signal(signal.SIGINT, default_handler)
    return metrics[-1], time.time() - began


def predict_text(args: argparse.Namespace) -> None:
    """Print a table of tab-separated values, one row a text: label, probabilities, text. Needs a saved adapter alone."""
    adapter = load_adapter(args.adapter)
    task = data.Task(**adapter["task"])
    rows = [(dict(zip(task.fields, texts)), 0) for texts in read_texts(args.predict, list(task.fields))]
    args.pretrain_seed, args.dtype = adapter["pretrain_seed"], adapter["dtype"]
    gpt, tokenizer, _ = load_model(adapter["model"], args)
    encoder = load_encoder(None if adapter["encoder"] == adapter["model"] else adapter["encoder"], gpt, args)
    model = restore(adapter, gpt, encoder, data.label_tokens(task, tokenizer).to(args.device))
    options = adapter["model_options"]
    room = text_room(gpt, encoder, options["num_virtual_tokens"], options["fusion"])
    split = data.encode(task, rows, tokenizer, room).to(args.device)
    probabilities = predict(model, split, instance_embeddings(encoder, split))
    print("\t".join(["label", *task.label_names, *task.fields]))
    for (fields, _), p in zip(rows, probabilities):
        print("\t".join([task.label_names[p.argmax()], *(f"{x:.3f}" for x in p), *fields.values()]))


def read_texts(source: str, fields: list[str]) -> list[list[str]]:
    """The texts of a file, of standard input ("-"), or `source` itself: one example a line, a pair separated by a tab."""
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
            raise ValueError(f"{where}, line {number}: {found} texts, the task takes {len(fields)} ({', '.join(fields)}): "
                             "separate them with a tab")
    return rows


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
        model, began = build(problem, options | change), time.time()
        *_, last = fit(model, problem, options | change)
        lines.append(wanted | last | {"seconds": time.time() - began,
                                      "trainable_parameters": get_nb_trainable_parameters(model)[0]})
        data.save_file(out / "runs.jsonl", lines)
        print(f"  {stage} {len(lines) - 1}: {change}, accuracy {last['accuracy']:.3f}, {lines[-1]['seconds']:.1f} s", flush=True)
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
# 7. The command line


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
    use.add_argument("--predict", metavar="TEXT", help="print labels and probabilities as tab-separated values: of TEXT, of a "
                     "file's lines, or with - of standard input's; the two texts of a pair are separated by a tab")
    use.add_argument("--adapter", metavar="DIR", help="run folder to predict with")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, after its last checkpoint")
    machine.add_argument("--save-every", type=positive(int), metavar="STEPS", help="between checkpoints (default: an epoch's)")
    machine.add_argument("--quiet", action="store_true", help="print the result alone, as one line of JSON")
    machine.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                         help="of the frozen GPT-2; what is trained stays float32 (default: float32)")
    machine.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: auto")
    machine.add_argument("--cache", metavar="DIR", default=str(Path(__file__).parent / ".cache"),
                         help="where models and data are kept (default: .cache beside train.py)")
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    args.command = sys.argv[1:] if argv is None else list(argv)
    if args.resume and args.out != args.resume:                       # the command that began the run, then this one's flags
        try:
            began_with = json.loads(Path(args.resume, "command.json").read_text())
        except (OSError, ValueError):
            parser.error(f"{args.resume} holds no run with a readable command.json: begin one with --task")
        return parse_args([*began_with, *args.command, "--out", args.resume])
    if (args.predict is None) != (args.adapter is None):
        parser.error("--predict TEXT and --adapter DIR go together")
    if args.task is None and args.predict is None:
        parser.error(f"name a task: --task {' or '.join(data.TASKS)}")
    named = {"task", "method", "model", "data", "out", "seed", "predict", "adapter", "device", "cache", "compare", "ablate",
             "methods", "seeds", "command", "resume", "save_every", "quiet"}
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


def keep_freed_memory() -> None:
    """Tell glibc not to hand freed tensors back to the system, which would have to clear their pages again each step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2 ** 31 - 1)                                  # M_TRIM_THRESHOLD, in bytes
        libc.mallopt(-3, 2 ** 25)                                      # M_MMAP_THRESHOLD, the most that is allowed


def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for bad input, 130 for Ctrl-C."""
    gc.freeze()                                                        # torch stays: no need to look for garbage in it
    args = parse_args(argv)
    quiet = args.quiet or os.environ.get("RANK", "0") != "0"           # of several processes, the first one speaks
    if quiet:
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)     # every progress bar, data's and model's too
    keep_freed_memory()
    try:
        join_processes(args)
        if args.predict is not None:
            return predict_text(args)
        with redirect_stdout(open(os.devnull, "w")) if quiet else nullcontext():
            result = study(args) if args.compare or args.ablate else run(args)
        if result and is_first_process():
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


if __name__ == "__main__":
    main()
    gc.freeze()                                                        # or Python looks through all of torch before it ends
