"""Train a soft prompt for a frozen GPT, score it, and use it.

    python train.py --task sst2                          LoPA on the built-in sample, half a minute at first
    python train.py --task sst2 --method pt              prompt tuning, to compare
    python train.py --task sst2 --model DIR --data DIR   GPT-2 and GLUE: python -m experiments.download
    python train.py --adapter runs/sst2-lopa-tiny-seed0 --predict "a witty film"     or - for standard input
    python train.py --resume runs/sst2-lopa-tiny-seed0   go on after a crash or Ctrl-C, bit for bit
    torchrun --nproc_per_node=2 train.py --task sst2     several processes share every batch

The language model is never changed. What is trained, and all that is saved, is the soft prompt of lopa.py
(but for the two yardsticks: lora adds to the model's weights, full trains all of them). The way of a text
through this file:

    text -> tokens, and h from the frozen encoder      prepare
    h -> prompt -> logits of the label words           lopa.Adapted
    logits -> loss -> a step                           train_step
    steps -> epochs, and a checkpoint to go on from    fit
    trained -> accuracy, adapter.pt, result.json       run
"""

import argparse
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import tiktoken
import torch
from torch import Tensor, distributed as dist, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data import Encoded, batches, load_tensors
from lopa import METHODS, Adapted, SoftPrompt, add_lora, get_nb_trainable_parameters
from model import GPT, InstanceEncoder, cosine_factor, short

# Peak learning rates on the tiny GPT and on a real model, of Z_S or what is in its place; lopa's are pt's and
# idpg's, too. Those on the tiny GPT are where experiments/compare.py begins to try; on a real model those of
# lopa, pt and lora were chosen on held-out rows of SST-2 with SmolLM2-135M (experiments/results:
# smollm2-vocabulary, -lora), and the others are guesses.
LEARNING_RATES = {"lopa": (3e-2, 3e-2), "dpt": (3e-2, 1e-2), "bpt": (1e-2, 1e-2), "residual": (1e-2, 1e-3),
                  "dept": (3e-2, 1e-2), "adept": (1e-2, 3e-3), "lora": (3e-3, 3e-3), "full": (1e-3, 3e-5)}
HEAD_LEARNING_RATES = (3e-3, 1e-3)       # of the heads on h

# What there is to compute on; the last one is for models other than the tiny GPT, which is too small for it.
DEVICES = [str(device) for device in ("cpu", torch.accelerator.current_accelerator(True)) if device]
CHOICES = {"task": data.TASKS, "method": [*METHODS, "lora", "full"], "dtype": ["float32", "bfloat16"],
           "device": DEVICES, "init": ["noise", "vocab"]}
HOW_TO_RUN = ("out", "save_every", "quiet", "device", "cache")         # what does not decide the result
COMMAND = "python train.py"              # as messages give it
FORMAT = 5                               # of adapters and checkpoints

# ------------------------------------------------------------------------------------------------------------
# 1. What a run is


def flag(default, help: str):
    """A field of Config that is a flag, too: hidden_dim is --hidden-dim."""
    return field(default=default, metadata=dict(help=help))


@dataclass
class Config:
    """All that a result depends on, and how to run. What is None gets the method's or the model's default."""

    task: str = flag(None, "what to learn, an entry of TASKS in data.py")
    method: str = flag("lopa", "one of lopa.py's METHODS; lora and full change the model itself")
    model: str = flag("tiny", "the frozen model: tiny, or a folder with a GPT-2")
    data: str | None = flag(None, "folder of GLUE files instead of the built-in sample")
    epochs: int = flag(10, "passes through the training rows; the last one is scored")
    lr: float | None = flag(None, "peak learning rate (default: of the method)")
    rank: int = flag(4, "r, of U and V")
    num_virtual_tokens: int = flag(10, "m, length of the prompt")
    seed: int = flag(0, "of the prompt's initial values and the order of the rows")
    batch_size: int = flag(32, "rows of one step")
    max_train: int | None = flag(None, "how many random training rows to use (default: all)")
    head_lr: float | None = flag(None, "peak learning rate of the heads on h")
    hidden_dim: int | None = flag(None, "H, of the heads (default: 64 for tiny, else 256)")
    dropout: float | None = flag(None, "on h (default: 0 for tiny, whose h is short, else 0.1)")
    init: str | None = flag(None, "the prompt starts as noise or vocab, tokens drawn from the vocabulary")
    init_text: str | None = flag(None, "the prompt starts as the embeddings of these words")
    encoder: str | None = flag(None, "another model for the instance embedding h (default: the same)")
    encoder_blocks: int | None = flag(None, "h is read after these, 0: bag of words (default: half; tiny: 0)")
    tune_encoder: bool = flag(False, "train a copy of the encoder too, as released for GLUE")
    encoder_lr: float | None = flag(None, "its peak learning rate")
    dtype: str = flag("float32", "of the frozen model alone; bfloat16 is slow without hardware for it")
    pretrain_seed: int = flag(0, "of the tiny GPT")
    # For ablations, and so no flags:
    init_std: float | None = None        # of the prompt at the start (None: as the model's embeddings)
    head_std: float | None = None        # of the heads at the start, 0.02 as released (None: U = 0)
    fusion: str = "gate"                 # how Z_S and Z_I meet in LoPA
    out: str | None = flag(None, "run folder, a new one (default: under runs/)")
    save_every: int | None = flag(None, "steps between checkpoints (default: an epoch's)")
    quiet: bool = flag(False, "print the result alone, as one line of JSON")
    device: str | None = flag(None, "where to compute (default: cpu for tiny, else a GPU if there is one)")
    cache: str = flag(str(Path(__file__).parent / ".cache"), "where the tiny GPT is kept")

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 0 if name in ("seed", "pretrain_seed", "encoder_blocks", "dropout") else 1e-12
            most = 0.99 if name == "dropout" else 1e9
            if type(value) in (int, float) and not least <= value <= most:
                raise ValueError(f"--{name.replace('_', '-')}: {value} is not between {least} and {most:g}")
        real = self.model != "tiny"
        rates = LEARNING_RATES.get(self.method, LEARNING_RATES["lopa"])
        words = real and self.fusion in ("gate", "add") and getattr(METHODS.get(self.method), "start_from", 0)
        usual = dict(encoder=self.model, lr=rates[real], head_lr=HEAD_LEARNING_RATES[real],
                     encoder_lr=LEARNING_RATES["full"][real], dropout=0.1 if real else 0.0,
                     hidden_dim=256 if real else 64, device=DEVICES[-1] if real else "cpu",
                     init="vocab" if words else "noise",
                     encoder_blocks=0 if (self.encoder or self.model) == "tiny" else None)
        for name, value in usual.items():                              # dataclasses.replace keeps them: for
            if getattr(self, name) is None:                            # another method make a new Config
                setattr(self, name, value)

    def deciding(self) -> dict:
        """The fields that decide the result, by name."""
        return {name: value for name, value in asdict(self).items() if name not in HOW_TO_RUN}

    def changed(self) -> dict:
        """Those that are not as usual for this task, method and model."""
        usual = Config(self.task, self.method, self.model).deciding()
        return {name: value for name, value in self.deciding().items() if value != usual[name]}

    @property
    def name(self) -> str:
        """TASK-METHOD-MODEL-seedN and all that is not as usual."""
        changed = "".join(f"-{name}-{value}" for name, value in self.changed().items() if name != "seed")
        name = f"{self.task}-{self.method}-{Path(self.model).resolve().name}-seed{self.seed}{changed}"
        return re.sub(r"[^\w.-]+", "_", name)[:200]

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)


# ------------------------------------------------------------------------------------------------------------
# 2. Training


def train_step(config: Config, forward: nn.Module, optimizer: torch.optim.Optimizer, batch: Encoded,
               share: float, step: int, total_steps: int) -> Tensor:
    """Step number `step`, from 0, on this process's part of a batch; returns the sum of its rows' losses."""
    process, num_processes = rank_and_world_size()
    # What dropout draws from. torch.manual_seed would seed the generators of all devices: 0.5 ms a step.
    dropout = torch.default_generator if config.device == "cpu" else torch.get_device_module(config.device)
    dropout.manual_seed((config.seed * total_steps + step) * num_processes + process)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * cosine_factor(step, int(0.06 * total_steps), total_steps)
    loss = loss_of(forward, batch)
    optimizer.zero_grad()
    (loss * share).backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.detach() * len(batch)


def loss_of(forward: Callable[..., Tensor], batch: Encoded) -> Tensor:
    """Cross entropy over the label words alone; or of every token of an answer, its mean first by example."""
    inputs = (batch.tokens, batch.lengths, batch.instances)
    if batch.labels.ndim == 1:
        return F.cross_entropy(forward(*inputs), batch.labels)         # (B, labels), (B,)
    real = batch.labels >= 0                                           # (B, max_answer)
    losses = F.cross_entropy(forward(*inputs, batch.labels), batch.labels[real], reduction="none")     # (n,)
    return (losses * (real / real.sum(dim=1, keepdim=True))[real]).sum() / len(batch)


def fit(config: Config, model: Adapted, problem: "Problem", folder: Path | None = None,
        state: dict | None = None) -> list[dict]:
    """Train `model` in place; returns dict(epoch, loss, accuracy, seconds) for every epoch.

    With a folder it leaves a checkpoint there; `state`, what that holds, is where to go on from. The order of
    the rows, the rate and the dropout of a step follow from seed and step, so no generator's state is saved.
    """
    began, split = time.time(), problem.train
    steps_per_epoch = math.ceil(len(split) / config.batch_size)
    total_steps, save_every = config.epochs * steps_per_epoch, config.save_every or steps_per_epoch
    groups = model.parameter_groups(config.lr, config.head_lr, config.encoder_lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    forward = DistributedDataParallel(model, init_sync=False) if dist.is_initialized() else model
    shuffle = torch.Generator().manual_seed(config.seed)               # of the order of the rows alone
    step, losses, metrics = 0, [], []                                  # losses: of this epoch's steps
    if state:
        load_tensors(model.trained(), state["tensors"], "the checkpoint")
        optimizer.load_state_dict(state["optimizer"])
        losses = [torch.tensor(loss) for loss in state["losses"][rank_and_world_size()[0]]]
        step, metrics, began = state["step"], state["metrics"], began - state["seconds"]
    for epoch in range(1, config.epochs + 1):
        order = data.shuffled_batches(split, config.batch_size, shuffle)       # of finished epochs too: it
        left = order[max(step - (epoch - 1) * steps_per_epoch, 0):]            # moves the generator on
        model.train()
        for batch, share in tqdm(parts(split, left), f"epoch {epoch}", len(left), leave=False,
                                 disable=config.quiet or None):        # None: shown on a terminal alone
            losses.append(train_step(config, forward, optimizer, batch, share, step, total_steps))
            step += 1
            due = step % save_every == 0
            if due or step % 10 == 0 or step == total_steps:           # not always: it waits for the GPU
                require_finite(losses[-10:], model, step)
            if due and folder:
                save(folder / "checkpoint.pt", saved(config, model, problem) | dict(
                    config=asdict(config), step=step, losses=gathered([x.item() for x in losses]),
                    metrics=metrics, seconds=time.time() - began, optimizer=optimizer.state_dict()))
        if len(metrics) < epoch:
            loss, losses = sum(map(sum, gathered([x.item() for x in losses]))) / len(split), []
            score = problem.accuracy(predict(model, problem.test), problem.test)
            metrics.append(dict(epoch=epoch, loss=loss, accuracy=score, seconds=time.time() - began))
            config.say(f"epoch {epoch}/{config.epochs}: loss {loss:.4f}, {problem.test_name} accuracy "
                       f"{score:.3f}, {time.time() - began:.1f} s")
    return metrics


def parts(split: Encoded, order: Sequence[Tensor]) -> Iterator[tuple[Encoded, float]]:
    """This process's part of each batch, and a weight by which the average over processes is the batch's."""
    process, num_processes = rank_and_world_size()
    for whole, batch in zip(order, batches(split, [rows[process::num_processes] for rows in order])):
        yield batch, len(batch) * num_processes / len(whole)


def require_finite(losses: list[Tensor], model: nn.Module, step: int) -> None:
    """FloatingPointError if one of these losses, which end at `step`, or a weight after it is not finite."""
    bad = [number for number, loss in enumerate(losses, step - len(losses) + 1) if not loss.isfinite()]
    if bad or not all(p.isfinite().all() for p in model.trained().values()):
        what = f"the loss of step {bad[0]} is" if bad else f"after step {step} weights are"
        raise FloatingPointError(f"{what} not finite: start again with a lower --lr")


# ------------------------------------------------------------------------------------------------------------
# 3. Scoring


def predict(model: Adapted, split: Encoded) -> Tensor:
    """Of every row the labels' probabilities, (N, labels), or the tokens of an answer, (N, max_answer)."""
    def generate(batch: Encoded) -> Tensor:
        inputs_embeds, lengths = model.read(batch.tokens, batch.lengths, batch.instances)
        return model.gpt.generate(inputs_embeds, split.labels.shape[1], lengths, ends=model.label_ids)

    model.eval()
    if split.labels.ndim == 2:
        return every_row(split, split.labels.shape[1], generate).long()
    return every_row(split, len(model.label_ids),
                     lambda batch: model(batch.tokens, batch.lengths, batch.instances)).softmax(dim=-1)


def instance_embeddings(encoder: InstanceEncoder, split: Encoded) -> Tensor:
    """h for every row, (N, d_h): computed once, since the encoder is frozen and h never changes."""
    return every_row(split, len(encoder.mean), lambda batch: encoder(batch.tokens, batch.lengths))


@torch.no_grad()
def every_row(split: Encoded, width: int, compute: Callable[[Encoded], Tensor]) -> Tensor:
    """compute(batch) -> (rows, width), for all rows: (N, width). Processes share the batches."""
    order = split.lengths.argsort() if split.ragged else torch.arange(len(split), device=split.labels.device)
    process, num_processes = rank_and_world_size()
    mine = order.split(64)[process::num_processes]                     # larger ones outgrow a CPU's caches
    result = torch.zeros(len(split), width, device=order.device)
    for rows, batch in zip(mine, batches(split, mine)):
        result[rows] = compute(batch).float()
    if dist.is_initialized():
        dist.all_reduce(result)                                        # 0 where another process has the row
    if not result.isfinite().all():
        raise FloatingPointError("what the model computes is not finite: start again with a lower --lr")
    return result


def without_training(problem: "Problem") -> dict[str, float]:
    """Accuracy of the commonest label or answer, and of the bare model, zero-shot."""
    test, bare = problem.test, Adapted(None, problem.gpt, problem.encoder, problem.label_ids)
    labels, counts = problem.train.labels.unique(dim=0, return_counts=True)
    commonest = labels[counts.argmax()]
    if commonest.ndim == 0:                                            # a label's index, no answer's tokens
        commonest = F.one_hot(commonest, len(problem.label_ids))
    return dict(majority=problem.accuracy(commonest.expand(len(test), -1), test),
                zero_shot=problem.accuracy(predict(bare, test), test))


def final_scores(model: Adapted, problem: "Problem", folder: Path) -> dict[str, float]:
    """The accuracy on every dev split; answers go into a file, too."""
    result = {}
    for name, test in problem.tests.items():
        suffix, predictions = "" if name == problem.test_name else f"_{name}", predict(model, test)
        result["accuracy" + suffix] = problem.accuracy(predictions, test)
        if test.labels.ndim == 2:
            texts = [data.decode_answer(problem.task, tokens, problem.tokenizer) for tokens in predictions]
            save(folder / f"completions{suffix}.jsonl", [
                dict(task_id=task_id, completion=text) for task_id, text in zip(problem.ids[name], texts)])
    return result


# ------------------------------------------------------------------------------------------------------------
# 4. The problem: frozen model, encoded texts, instance embeddings


@dataclass
class Problem:
    """All that the methods share, computed once. A split has tokens, lengths, labels and `instances`, h."""

    gpt: GPT
    encoder: InstanceEncoder
    label_ids: Tensor                    # (labels,); of a task with answers the tokens that end one
    train: Encoded
    tests: dict[str, Encoded]            # by name; the first is scored after every epoch; mnli has two
    task: data.Task | None = None
    tokenizer: tiktoken.Encoding | None = None
    made_of: dict[str, str] = field(default_factory=dict)    # which data and frozen weights these are
    ids: dict[str, list] = field(default_factory=dict)       # task_id of every row of `tests`

    def __post_init__(self):
        self.test_name, self.test = next(iter(self.tests.items()), (None, None))

    def accuracy(self, predictions: Tensor, split: Encoded) -> float:
        return data.right(self.task, predictions, split.labels, self.tokenizer).float().mean().item()


def prepare(config: Config) -> Problem:
    """Read the data, load or pre-train the model, encode the texts, compute the instance embeddings."""
    task = data.TASKS[config.task]
    train_rows, dev_rows, source = data.load_task(config.task, config.data, config.max_train)
    gpt, encoder, tokenizer = load_frozen(config)
    room = text_room(config, gpt, encoder, task.max_answer)
    label_ids = data.label_tokens(task, tokenizer)
    sha256 = hashlib.sha256(label_ids.numpy())
    splits = {name: data.encode(task, rows, tokenizer, room)
              for name, rows in {"training": train_rows, **dev_rows}.items()}
    for tensor in [t for split in splits.values() for t in (split.tokens, split.lengths, split.labels)]:
        sha256.update(tensor.numpy())
    made_of = dict(data=source, fingerprint=fingerprint(gpt, encoder), data_sha256=sha256.hexdigest()[:12])
    every = gathered(config.deciding() | made_of | dict(save_every=config.save_every))
    problem, smallest = "", (len(train_rows) - 1) % config.batch_size + 1
    if different := [name for name in every[0] if len({str(process[name]) for process in every}) > 1]:
        problem = f"the processes have different {', '.join(different)}: use the same flags, data and .cache"
    elif smallest < len(every):
        problem = f"the last batch has {smallest} rows for {len(every)} processes: change --batch-size"
    if problem:
        raise ValueError(problem) if is_first_process() else SystemExit(2)     # all know it, one says it
    config.say(f"task {config.task}: {source}, " + ", ".join(
        f"{len(split)} {name} rows" + f" ({split.cut.sum()} cut to fit)" * bool(split.cut.any())
        for name, split in splits.items()))
    for name, split in splits.items():
        split = split.each(lambda tensor: tensor.to(config.device))
        instances = instance_embeddings(encoder, split)
        if name == "training":
            instances = encoder.fit(instances)                         # from here on h is standardised
        splits[name] = replace(split, instances=instances)
    return Problem(gpt, encoder, label_ids.to(config.device), splits.pop("training"), splits, task, tokenizer,
                   made_of, {name: [texts.get("task_id", i) for i, (texts, _) in enumerate(rows)]
                             for name, rows in dev_rows.items()})


def build(config: Config, problem: Problem) -> Adapted:
    """The frozen model with one method on it, its initial values drawn from the seed, or words'."""
    torch.manual_seed(config.seed)
    model = Adapted(config, problem.gpt, problem.encoder, problem.label_ids)
    m, text, n_vocab = config.num_virtual_tokens, config.init_text, problem.gpt.config.vocab_size
    if text is not None:
        tokens = problem.tokenizer.encode_ordinary(text) if text.strip() else []
    elif config.init == "vocab":         # peft's SAMPLE_VOCAB, of what a BPE learns first: common words
        tokens = torch.randint(min(300, n_vocab // 2), min(5300, n_vocab), (m,),
                               generator=torch.Generator().manual_seed(config.seed)).tolist()
    else:
        return model
    if not 0 < len(tokens) <= m or not getattr(model.prompt, "start_from", None):
        raise ValueError(f"a start as {len(tokens)} tokens: it takes a word, at most {m} tokens and "
                         f"a method whose prompt can start as words, not {config.method}")
    over_and_over = torch.tensor((tokens * m)[:m], device=config.device)
    model.prompt.start_from(problem.gpt.embed(over_and_over))          # (m, d)
    return model


def text_room(config: Config, gpt: GPT, encoder: InstanceEncoder, max_answer: int = 0) -> int:
    """How many tokens of text fit between prompt and answer, the same for all methods; less than 1: none."""
    taken = config.num_virtual_tokens * (2 if config.fusion == "concat" else 1) + max_answer
    return min(gpt.config.n_positions - taken, encoder.gpt.config.n_positions)


def load_frozen(config: Config) -> tuple[GPT, InstanceEncoder, tiktoken.Encoding]:
    """(model, instance encoder, the tokenizer they share)."""
    gpt, tokenizer = load_model(config.model, config)
    other, its = (gpt, tokenizer) if config.encoder == config.model else load_model(config.encoder, config)
    if its.encode_ordinary(__doc__) != tokenizer.encode_ordinary(__doc__):     # any English text would do
        raise ValueError(f"encoder {config.encoder} and model {config.model} have to share a tokenizer")
    return gpt, InstanceEncoder(other, config.encoder_blocks), tokenizer


def load_model(name: str, config: Config) -> tuple[GPT, tiktoken.Encoding]:
    """(frozen model, its tokenizer) of "tiny" or of a folder."""
    if name == "tiny":
        gpt, tokenizer = data.tiny_gpt(config.pretrain_seed, config.cache, config.device, config.quiet)
    elif Path(name).is_dir():
        gpt, tokenizer = GPT.from_pretrained(name, getattr(torch, config.dtype)), data.gpt2_tokenizer()
    else:
        raise ValueError(f"there is no folder {short(name)}: name tiny or a folder with a GPT-2; "
                         "python -m experiments.download gpt2 gets one")
    if gpt.config.vocab_size != tokenizer.n_vocab:
        raise ValueError(f"{name} has {gpt.config.vocab_size} tokens, its tokenizer {tokenizer.n_vocab}")
    gpt = gpt.to(config.device, getattr(torch, config.dtype))
    return gpt.requires_grad_(False).eval(), tokenizer


def fingerprint(gpt: GPT, encoder: InstanceEncoder) -> str:
    """Of all frozen weights that an adapter depends on."""
    return gpt.fingerprint() + ("" if encoder.gpt is gpt else "+" + encoder.gpt.fingerprint())


# ------------------------------------------------------------------------------------------------------------
# 5. Files. A run in progress is its checkpoint; a finished one adapter.pt, metrics.jsonl and result.json.


def new_folder(out: str | None, name: str) -> Path:
    """Make `out`, which is new; or runs/NAME, or where that is taken runs/NAME-2, NAME-3, ..."""
    for number in itertools.count(1):
        folder = Path(out or "runs/" + name + f"-{number}" * (number > 1))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir()                                             # of two at the same time one gets it
            return folder
        if out:
            raise ValueError(f"--out: {folder} is there: name a new folder, or leave --out out")


def save(path: Path, content) -> None:
    """Of several processes the first one saves."""
    if is_first_process():
        data.save_file(path, content)


def saved(config: Config, model: Adapted, problem: Problem) -> dict:
    """What an adapter and a checkpoint both hold: the trained tensors, and all that they depend on."""
    return dict(format=FORMAT, config=config.deciding(), made_of=problem.made_of,
                task=asdict(problem.task) | {"sample": None},
                scale=dict(mean=problem.encoder.mean.cpu(), std=problem.encoder.std.cpu()),
                tensors={name: tensor.detach().cpu() for name, tensor in model.trained().items()})


def load_state(path: Path) -> dict:
    """What an adapter or a checkpoint holds; its tensors are checked where they go, by load_tensors."""
    state = data.load_file(path)
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} is of format {short(state.get('format'))} and not {FORMAT}: train again")
    return state


def restore(adapter: dict, gpt: GPT, encoder: InstanceEncoder, label_ids: Tensor) -> Adapted:
    """An adapter, and the model and encoder it was trained on -> the adapted model; fits the encoder too."""
    trained_on, at_hand = adapter["made_of"]["fingerprint"], fingerprint(gpt, encoder)
    if trained_on != at_hand:
        raise ValueError(f"this adapter was trained on another model ({short(trained_on)}) than the one at "
                         f"hand ({at_hand}): use that model or train again")
    load_tensors(dict(mean=encoder.mean, std=encoder.std), adapter["scale"], "the adapter")
    model = Adapted(Config(**adapter["config"]), gpt, encoder, label_ids)
    load_tensors(model.trained(), adapter["tensors"], "the adapter")
    return model


# ------------------------------------------------------------------------------------------------------------
# 6. The command line: a run, or a prediction


def run(config: Config, state: dict | None = None) -> dict:
    """Train and score one method; leave adapter.pt, metrics.jsonl and result.json in a folder of its own.

    `state`: what the checkpoint in config.out holds, to go on from there.
    """
    old = state or not is_first_process()
    folder = Path(gathered(config.out if old else new_folder(config.out, config.name))[0])
    try:
        problem = prepare(config)
        if state and state["made_of"] != problem.made_of:
            raise ValueError(f"{folder} was begun with other data or another model: {state['made_of']} then, "
                             f"{problem.made_of} now")
        if state and len(state["losses"]) != (here := rank_and_world_size()[1]):
            raise ValueError(f"the checkpoint is of {len(state['losses'])} processes and this run has "
                             f"{here}: start as many as before")
        model = build(config, problem)
        result = config.deciding() | problem.made_of | describe(config, model, problem)
        metrics = fit(config, model, problem, folder, state)
        result |= final_scores(model, problem, folder) | dict(train_seconds=metrics[-1]["seconds"])
        save(folder / "adapter.pt", saved(config, model, problem))
        save(folder / "metrics.jsonl", metrics)
        save(folder / "result.json", result)
        gathered(None)                                                 # all is saved, for every process
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    except (KeyboardInterrupt, OSError) as error:
        if (folder / "checkpoint.pt").exists():
            advice = f"to go on: {COMMAND} --resume {shlex.quote(str(folder))}"
            raise type(error)(f"{str(error) or 'interrupted'}; {advice}") from None
        raise
    finally:
        with suppress(OSError):
            folder.rmdir()                                             # where nothing has been saved
    config.say(f"wrote {folder}/adapter.pt, metrics.jsonl and result.json\n"
               f'to use it: {COMMAND} --adapter {shlex.quote(str(folder))} --predict "..."')
    return result


def describe(config: Config, model: Adapted, problem: Problem) -> dict:
    """Print what is about to be trained -> all of the result that is known before."""
    trainable, total = get_nb_trainable_parameters(model)
    before = without_training(problem)
    changed = "".join(f", {name} {value}" for name, value in config.changed().items())
    config.say(f"{config.method} on {config.model}{changed}: {trainable:,} of {total:,} parameters trained\n"
               f"before training, accuracy on {problem.test_name}: majority class {before['majority']:.3f}, "
               f"zero-shot {before['zero_shot']:.3f}")
    cut = sum(split.cut.sum().item() for split in (problem.train, *problem.tests.values()))
    return before | dict(num_train=len(problem.train), texts_cut=cut, trainable_parameters=trainable,
                         total_parameters=total, torch=torch.__version__)


def predict_texts(text: str, config: Config, adapter: dict) -> None:
    """Print tab-separated values, one row a text: label, probabilities, text. `text` is read_texts'."""
    task = data.Task(**adapter["task"])
    rows = [(dict(zip(task.fields, texts)), "" if task.answer else 0)
            for texts in read_texts(text, list(task.fields), quoted=bool(task.answer))]
    gpt, encoder, tokenizer = load_frozen(config)
    model = restore(adapter, gpt, encoder, data.label_tokens(task, tokenizer).to(config.device))
    room = text_room(config, gpt, encoder, task.max_answer)
    split = data.encode(task, rows, tokenizer, room).each(lambda tensor: tensor.to(config.device))
    predictions = predict(model, replace(split, instances=instance_embeddings(encoder, split)))
    print("\t".join(["answer" if task.answer else "label", *task.label_names, *task.fields]))
    for (texts, _), p in zip(rows, predictions):
        if task.answer:                                                # code has line ends and tabs in it
            print("\t".join(map(json.dumps, [data.decode_answer(task, p, tokenizer), *texts.values()])))
        else:
            print("\t".join([task.label_names[p.argmax()], *(f"{x:.3f}" for x in p), *texts.values()]))
    if split.cut.any():
        print(f"note: {split.cut.sum()} texts were cut to fit the context", file=sys.stderr)
    unread = data.unread_words([text for texts, _ in rows for text in texts.values()], tokenizer)
    if unread and config.model == "tiny":
        print(f"note: never read like this: {short(', '.join(unread))}: the tiny GPT knows its sample's "
              "words alone, in lower case, and few of them at a text's start", file=sys.stderr)


def read_texts(text: str, fields: list[str], quoted: bool = False) -> list[list[str]]:
    """The texts of `text`, or of standard input ("-"): one a line, those of a pair with a tab between.

    `quoted`: a text in double quotes is a JSON string, so that it can have several lines, as code has.
    """
    content = sys.stdin.buffer.read() if text == "-" else text.encode(errors="surrogateescape")
    rows = []
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), start=1):
        row = [part.strip() for part in line.split("\t")]
        if any(row):
            if len(row) != len(fields) or not all(row):
                raise ValueError(f"--predict, line {number}: {sum(map(bool, row))} texts, the task takes "
                                 f"{len(fields)} ({', '.join(fields)}): one example a line, a tab in a pair")
            rows.append([json.loads(part) if quoted and part[0] == part[-1] == '"' else part for part in row])
    if not rows:
        raise ValueError("--predict: there is no text")
    return rows


def build_parser() -> argparse.ArgumentParser:
    """A flag for every field of Config that has a help. What is not typed is not in the result."""
    # Without a usage an error is one line, as for all other bad input.
    parser = argparse.ArgumentParser(COMMAND.split()[-1], argparse.SUPPRESS, __doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    first, more = map(parser.add_argument_group, ("what to turn first", "more"))
    for number, f in enumerate(f for f in fields(Config) if f.metadata):
        kind, default = f.type if isinstance(f.type, type) else f.type.__args__[0], f.default
        help = f.metadata["help"] + f" (default: {default})" * (default is not None and kind is not bool)
        how = dict(action="store_true") if kind is bool else dict(type=kind, choices=CHOICES.get(f.name))
        (first if number < 8 else more).add_argument("--" + f.name.replace("_", "-"), help=help, **how)
    more.add_argument("--resume", metavar="DIR", help="go on with the run in DIR after its checkpoint")
    more.add_argument("--predict", metavar="TEXT", help="print label and probabilities of TEXT, or of the "
                      "lines of standard input (-), tab-separated; a tab parts a pair's texts")
    more.add_argument("--adapter", metavar="DIR", help="the run's folder to predict with")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for bad input, 130 for Ctrl-C."""
    typed = vars((parser := build_parser()).parse_args(argv))
    try:
        resume, predict, adapter = (typed.pop(name, None) for name in ("resume", "predict", "adapter"))
        if (predict is None) != (adapter is None) or resume and adapter:
            raise ValueError("--predict TEXT and --adapter DIR go together, without --resume")
        state, folder = None, resume or adapter
        if folder is not None:
            if other := typed.keys() - set(HOW_TO_RUN[1:]):
                raise ValueError(f"--{min(other).replace('_', '-')} is the run's in {folder}: leave it out")
            path = Path(folder, "checkpoint.pt" if resume else "adapter.pt")
            if resume and not path.exists() and Path(folder, "adapter.pt").exists():
                return print(f"{folder} is finished")
            state = load_state(path)
            typed = state["config"] | typed | dict(out=folder)
        elif "task" not in typed:
            raise ValueError(f"name a task: --task {' or '.join(data.TASKS)}")
        config = Config(**typed)
        if config.device not in DEVICES:                               # a checkpoint's, of another machine
            raise ValueError(f"there is no {config.device} here: name --device {' or '.join(DEVICES)}")
        used = inspect.signature({**METHODS, "lora": add_lora, "full": lambda: 0}[config.method]).parameters
        for name in typed if state is None else ():
            needed = "instance_dim" if name.startswith(("encoder", "head_", "tune_")) else name
            idle = dict(encoder_lr=not config.tune_encoder, init=config.init_text is not None,
                        pretrain_seed="tiny" not in (config.model, config.encoder)).get(name)
            if idle or needed in SoftPrompt.KEYWORDS and needed not in used:
                raise ValueError(f"--{name.replace('_', '-')} has no effect with --method {config.method}"
                                 + " and the other flags" * bool(idle))
        if predict is not None:
            return predict_texts(predict, config, state)
        if "LOCAL_RANK" in os.environ:                                 # torchrun sets it
            join_processes(config)
        result = run(config, state)
        if is_first_process():
            print(json.dumps(result))
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt as interrupt:
        parser.exit(130, f"{parser.prog}: {str(interrupt) or 'interrupted'}\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------
# 7. Several processes, if torchrun started them: each has a part of every batch, the first writes the files


def join_processes(config: Config) -> None:
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))           # from here on "cuda" is this one
    dist.init_process_group("nccl" if config.device == "cuda" else "gloo")
    config.quiet = config.quiet or not is_first_process()              # the first one speaks


def rank_and_world_size() -> tuple[int, int]:
    """(number of this process, of all processes); (0, 1) for a single one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first_process() -> bool:
    return rank_and_world_size()[0] == 0


def gathered(value) -> list:
    """What every process passes here, in the order of their numbers."""
    every = [value] * rank_and_world_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(every, value)
    return every


if __name__ == "__main__":
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="backslashreplace")                  # a sign that the console lacks
    main()
