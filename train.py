"""Train a soft prompt for a frozen GPT, score it, and use it.

    python train.py --task sst2                            LoPA on the built-in sample, about a minute the first time
    python train.py --task sst2 --method pt                prompt tuning, to compare
    python train.py --task sst2 --data DIR                 real GLUE files: DIR/SST-2/train.tsv and dev.tsv
    python train.py --adapter runs/sst2-lopa-tiny-seed0 --predict "a gorgeous , witty film"

The language model is never changed. What is trained, and all that is saved, is the soft prompt of lopa.py.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import data
from lopa import FUSIONS, METHODS, SoftPrompt, get_nb_trainable_parameters
from model import GPT, GPTConfig, InstanceEncoder

ADAPTER_FORMAT = 1

# ---------------------------------------------------------------------------------------------------------------
# 1. The tiny GPT: pre-trained on the sample's text at first use, then kept under .cache/


def tiny_config(vocab_size: int) -> GPTConfig:
    # GPT-2's initial std 0.02 is too small at width 64: pre-training stalls before it has learned polarity.
    return GPTConfig(vocab_size, n_positions=128, n_embd=64, n_layer=2, n_head=4, initializer_range=0.08)


PRETRAINING = dict(steps=500, batch_size=48, window=64, lr=4e-3, warmup_steps=50, documents=20_000)


def cosine_schedule(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int):
    """Learning-rate factor: linear from 0 to 1 over the warm-up, then half a cosine down to 0."""
    def factor(step: int) -> float:
        return min((step + 1) / max(warmup_steps, 1), 0.5 * (1 + math.cos(math.pi * step / total_steps)))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def pretrain(config: GPTConfig, token_ids: Tensor, document_starts: Tensor, seed: int, device: str) -> GPT:
    """An ordinary language model: predict each next token, in windows that begin where a document begins."""
    recipe = PRETRAINING
    torch.manual_seed(seed)
    gpt = GPT(config).to(device)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=recipe["lr"], weight_decay=0.01)
    schedule = cosine_schedule(optimizer, recipe["warmup_steps"], recipe["steps"])
    order = torch.Generator().manual_seed(seed)
    window = torch.arange(recipe["window"] + 1)
    starts = document_starts[document_starts + len(window) <= len(token_ids)]
    progress = tqdm(range(recipe["steps"]), desc="pre-training the tiny GPT, once", disable=None)
    for _ in progress:
        picked = starts[torch.randint(len(starts), (recipe["batch_size"], 1), generator=order)]   # (B, 1)
        batch = token_ids[picked + window].to(device)                                  # (B, window + 1)
        logits = gpt(batch[:, :-1])                                                    # (B, window, vocab_size)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.2f}")
    return gpt


def tiny_gpt(seed: int, cache_dir: str | Path, device: str) -> tuple[GPT, "data.tiktoken.Encoding", float]:
    """(tiny GPT, its tokenizer, seconds of pre-training, 0 if it came from the cache).

    The cache file is named after all it was made from: the very tokens, the sizes, the recipe and the seed.
    """
    tokenizer = data.tiny_tokenizer()
    token_ids = torch.tensor(tokenizer.encode_ordinary(data.pretraining_text(PRETRAINING["documents"])))
    config = tiny_config(tokenizer.n_vocab)
    made_from = json.dumps([asdict(config), PRETRAINING, seed]).encode() + token_ids.numpy().tobytes()
    path = Path(cache_dir) / f"tiny-{hashlib.sha256(made_from).hexdigest()[:12]}.pt"
    if path.exists():
        gpt = GPT(config).to(device)
        gpt.load_state_dict(load_file(path))
        return gpt, tokenizer, 0.0
    newline = tokenizer.encode_single_token("\n")
    starts = torch.cat([torch.zeros(1, dtype=torch.long), (token_ids == newline).nonzero().flatten() + 1])
    began = time.time()
    gpt = pretrain(config, token_ids, starts, seed, device)
    save_file(path, gpt.state_dict())
    return gpt, tokenizer, time.time() - began


# ---------------------------------------------------------------------------------------------------------------
# 2. From text to the scores of the label words


def label_logits(gpt: GPT, prompt: SoftPrompt | None, tokens: Tensor, lengths: Tensor, instance: Tensor,
                 label_ids: Tensor) -> Tensor:
    """Tokens (B, T), lengths (B,), h (B, d_h) -> logits of the label words at the last real token, (B, labels).

    Logits are computed where a target stands and nowhere else: at B positions instead of B (m + T).
    `prompt=None` is the model without a prompt, that is zero-shot.
    """
    inputs_embeds = gpt.embed(tokens)                                                  # (B, T, d)
    if prompt is not None:
        inputs_embeds = prompt(inputs_embeds, instance)                                # (B, m + T, d)
    m = inputs_embeds.shape[1] - tokens.shape[1]
    last = gpt.hidden_at(inputs_embeds, m + lengths - 1)                               # (B, d)
    return gpt.logits(last)[:, label_ids]                                              # (B, labels)


def batches(split: data.Encoded, indices: Tensor, batch_size: int):
    """(indices, tokens, lengths, labels) per batch, padded no further than the longest text in the batch."""
    for batch in indices.split(batch_size):
        lengths = split.lengths[batch]
        yield batch, split.tokens[batch, :lengths.max()], lengths, split.labels[batch]


@torch.no_grad()
def predict(gpt: GPT, prompt: SoftPrompt | None, split: data.Encoded, instances: Tensor, label_ids: Tensor) -> Tensor:
    """Probabilities of the labels for every row, (N, labels)."""
    if prompt is not None:
        prompt.eval()
    everything = torch.arange(len(split), device=split.labels.device)
    logits = [label_logits(gpt, prompt, tokens, lengths, instances[batch], label_ids)
              for batch, tokens, lengths, _ in batches(split, everything, 256)]
    return torch.cat(logits).float().softmax(dim=-1)


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    return (probabilities.argmax(dim=-1) == labels).float().mean().item()


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor) -> Tensor:
    """Scores (N, labels) of ridge regression on the instance embeddings: what h alone tells, without the GPT."""
    def with_bias(h: Tensor) -> Tensor:
        return torch.cat([h, torch.ones_like(h[:, :1])], dim=1).double()               # (N, d_h + 1)

    X, Y = with_bias(train), F.one_hot(train_labels).double()
    ridge = 1e-3 * len(X) * torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
    return with_bias(test) @ torch.linalg.solve(X.T @ X + ridge, X.T @ Y)


@torch.no_grad()
def instance_embeddings(encoder: InstanceEncoder, split: data.Encoded) -> Tensor:
    """h for every row, (N, d_h): computed once, since the encoder is frozen and h never changes."""
    everything = torch.arange(len(split), device=split.labels.device)
    return torch.cat([encoder(tokens, lengths) for _, tokens, lengths, _ in batches(split, everything, 256)])


# ---------------------------------------------------------------------------------------------------------------
# 3. Training


def train_epochs(gpt: GPT, prompt: SoftPrompt, split: data.Encoded, instances: Tensor, label_ids: Tensor, *,
                 epochs: int, batch_size: int, lr: float, seed: int):
    """Train `prompt` in place with AdamW, warm-up and cosine decay; yields the mean loss after each epoch.

    Raises FloatingPointError, naming step and learning rate, at the first loss that is not finite.
    """
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=lr, weight_decay=0.0)
    steps_per_epoch = math.ceil(len(split) / batch_size)
    total_steps = epochs * steps_per_epoch
    schedule = cosine_schedule(optimizer, int(0.06 * total_steps), total_steps)
    order = torch.Generator().manual_seed(seed)                                        # of the data alone
    progress = tqdm(total=total_steps, desc="training", disable=None, leave=False)
    for _ in range(epochs):
        prompt.train()
        total_loss = 0.0
        shuffled = torch.randperm(len(split), generator=order).to(split.labels.device)
        for batch, tokens, lengths, labels in batches(split, shuffled, batch_size):
            logits = label_logits(gpt, prompt, tokens, lengths, instances[batch], label_ids)
            loss = F.cross_entropy(logits.float(), labels)                             # over the label words alone
            if not math.isfinite(loss_value := loss.item()):
                raise FloatingPointError(f"loss is {loss_value} at step {progress.n + 1} of {total_steps}, learning rate "
                                         f"{schedule.get_last_lr()[0]:.2e}: lower --lr")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(prompt.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total_loss += loss_value * len(batch)
            progress.update()
            progress.set_postfix(loss=f"{loss_value:.3f}", refresh=False)
        yield total_loss / len(split)
    progress.close()


# ---------------------------------------------------------------------------------------------------------------
# 4. Files


def save_file(path: Path, content) -> None:
    """Write under a temporary name and rename, so that `path` is always whole. `.json` and `.jsonl` are text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".json":
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        elif path.suffix == ".jsonl":
            temporary.write_text("".join(json.dumps(line) + "\n" for line in content))
        else:
            torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_file(path: Path):
    """A file of tensors and plain values. Raises ValueError if it is damaged or holds anything else, such as code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:       # torch.load raises half a dozen types for a damaged file
        raise ValueError(f"{path} cannot be read as saved weights ({type(error).__name__}): delete it and run again") from None


def load_adapter(folder: str | Path) -> dict:
    """The content of DIR/adapter.pt, as `run` saved it."""
    path = Path(folder) / "adapter.pt"
    adapter = load_file(path)
    if not isinstance(adapter, dict) or adapter.get("format") != ADAPTER_FORMAT:
        raise ValueError(f"{path} is no adapter of format {ADAPTER_FORMAT}: train it again with this version")
    return adapter


def restore(adapter: dict, gpt: GPT) -> tuple[SoftPrompt, InstanceEncoder]:
    """Adapter and the GPT it was trained on -> (soft prompt, instance encoder).

    Raises ValueError for another model and for missing, unexpected or misshapen tensors.
    """
    if adapter["fingerprint"] != gpt.fingerprint():
        raise ValueError(f"this adapter was trained on another model ({adapter['fingerprint']}) than the one "
                         f"at hand ({gpt.fingerprint()}): use that model or train again")
    prompt = METHODS[adapter["method"]](**adapter["prompt_config"])
    wanted, found = prompt.state_dict(), adapter["prompt"]
    for name in sorted(wanted.keys() | found.keys()):
        shapes = [list(tensors[name].shape) if name in tensors else None for tensors in (wanted, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"adapter tensor {name!r}: the method needs {shapes[0] or 'none'}, "
                             f"the file has {shapes[1] or 'none'}: the file is damaged, train again")
    prompt.load_state_dict(found)
    encoder = InstanceEncoder(gpt)
    encoder.mean, encoder.std = adapter["instance_mean"], adapter["instance_std"]
    return prompt, encoder


# ---------------------------------------------------------------------------------------------------------------
# 5. One run, from the data to the files

# Per method: learning rate and deviation of Z_S at the start, as chosen on a slice of the training split (README.md).
DEFAULTS = {"lopa": dict(lr=3e-3, init_std=1.0), "pt": dict(lr=1e-1, init_std=1.0)}


def run(args: argparse.Namespace) -> dict:
    """Train and score one soft prompt as the command line says; returns what result.json holds."""
    task, out = data.TASKS[args.task], Path(args.out or default_folder(args))
    train_rows, test_rows, source = data.load_task(args.task, args.data, args.max_train)
    test_name = "dev"
    if args.holdout:
        if args.holdout >= len(train_rows):
            raise ValueError(f"--holdout {args.holdout} leaves nothing of {len(train_rows)} training rows: lower it")
        train_rows, test_rows = train_rows[:-args.holdout], train_rows[-args.holdout:]
        test_name = "held-out training rows"
    print(f"task {args.task}: {source}, {len(train_rows)} training rows, {len(test_rows)} {test_name}")

    gpt, tokenizer, pretrain_seconds = tiny_gpt(args.pretrain_seed, args.cache, args.device)
    encoder = InstanceEncoder(gpt)                                                     # freezes the GPT
    label_ids = data.label_tokens(task, tokenizer).to(args.device)
    torch.manual_seed(args.seed)
    prompt_config = dict(embed_dim=gpt.config.n_embd, instance_dim=gpt.config.n_embd, rank=args.rank,
                         num_virtual_tokens=args.num_virtual_tokens, hidden_dim=args.hidden_dim, init_std=args.init_std)
    if args.method == "lopa":
        prompt_config |= dict(fusion=args.fusion, dropout=args.dropout)
    prompt = METHODS[args.method](**prompt_config)
    prompt_length = prompt.prompt(torch.zeros(1, gpt.config.n_embd)).shape[1]          # 2 m with --fusion concat
    prompt.to(args.device)

    max_length = gpt.config.n_positions - prompt_length
    if max_length < 1:
        raise ValueError(f"{prompt_length} prompt tokens leave no room for text in a context of "
                         f"{gpt.config.n_positions}: lower --num-virtual-tokens")
    train_split, test_split = (data.encode(task, rows, tokenizer, max_length).to(args.device)
                               for rows in (train_rows, test_rows))
    if num_cut := train_split.num_cut + test_split.num_cut:
        print(f"{num_cut} of {len(train_rows) + len(test_rows)} texts were cut to fit {prompt_length} prompt + "
              f"{max_length} text tokens into the context of {gpt.config.n_positions}")
    if args.data:
        print("note: the tiny GPT has read a few thousand synthetic sentences and nothing else, so real text is beyond "
              "it whatever the prompt; real text needs a model pre-trained on real text, such as GPT-2")

    config = dict(task=args.task, data=source, model=args.model, fingerprint=gpt.fingerprint(), method=args.method,
                  seed=args.seed, pretrain_seed=args.pretrain_seed, num_train=len(train_rows), num_scored=len(test_rows),
                  scored_on=test_name, texts_cut=num_cut, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr,
                  shuffled_instances=args.shuffle_instances, **prompt_config)
    refuse_other_run(out, config)
    trainable, _ = get_nb_trainable_parameters(prompt)
    frozen = get_nb_trainable_parameters(gpt)[1]
    print("config " + ", ".join(f"{name} {value}" for name, value in config.items()))
    print(f"trainable {trainable:,} of {trainable + frozen:,} parameters; the GPT, {frozen:,}, is frozen, "
          "and is the instance encoder too")

    raw = instance_embeddings(encoder, train_split)
    train_instances = encoder.fit(raw)
    test_instances = instance_embeddings(encoder, test_split)
    majority_label = train_split.labels.bincount().argmax()
    before = dict(
        majority=(test_split.labels == majority_label).float().mean().item(),
        zero_shot=accuracy(predict(gpt, None, test_split, test_instances, label_ids), test_split.labels),
        linear_probe=accuracy(linear_probe(train_instances, train_split.labels, test_instances), test_split.labels))
    print(f"accuracy on {test_name} before training: majority class {before['majority']:.3f}, zero-shot "
          f"{before['zero_shot']:.3f}, linear probe on the instance embedding {before['linear_probe']:.3f}")
    if args.shuffle_instances:           # the control: every text gets the embedding of some other text
        order = torch.Generator().manual_seed(args.seed)
        train_instances = train_instances[torch.randperm(len(train_instances), generator=order).to(args.device)]
        test_instances = test_instances[torch.randperm(len(test_instances), generator=order).to(args.device)]

    adapter = dict(format=ADAPTER_FORMAT, task=asdict(task) | {"sample": None}, task_name=args.task, model=args.model,
                   pretrain_seed=args.pretrain_seed, fingerprint=gpt.fingerprint(), method=args.method,
                   prompt_config=prompt_config, instance_mean=encoder.mean.cpu(), instance_std=encoder.std.cpu())
    metrics, began = [config], time.time()
    losses = train_epochs(gpt, prompt, train_split, train_instances, label_ids, epochs=args.epochs,
                          batch_size=args.batch_size, lr=args.lr, seed=args.seed)
    try:
        for epoch, loss in enumerate(losses, start=1):
            score = accuracy(predict(gpt, prompt, test_split, test_instances, label_ids), test_split.labels)
            metrics.append(dict(epoch=epoch, loss=loss, accuracy=score, seconds=time.time() - began))
            print(f"epoch {epoch}/{args.epochs}: loss {loss:.4f}, {test_name} accuracy {score:.3f}, "
                  f"{metrics[-1]['seconds']:.1f} s", flush=True)
            (out / "result.json").unlink(missing_ok=True)      # of an earlier, equal run: its adapter is gone now
            save_file(out / "adapter.pt", adapter | {"prompt": {k: v.cpu() for k, v in prompt.state_dict().items()}})
            save_file(out / "metrics.jsonl", metrics)
    except (KeyboardInterrupt, FloatingPointError) as error:
        kept = f"{out} holds the adapter after epoch {len(metrics) - 1}" if len(metrics) > 1 else "nothing was saved yet"
        raise type(error)(f"{str(error) or 'interrupted'}; {kept}") from None
    result = config | before | dict(accuracy=score, trainable_parameters=trainable, total_parameters=trainable + frozen,
                                    train_seconds=time.time() - began, pretrain_seconds=pretrain_seconds,
                                    torch=torch.__version__, device=args.device)
    save_file(out / "result.json", result)
    print(f"wrote {out}/adapter.pt, metrics.jsonl and result.json; to use it: "
          f'python train.py --adapter {out} --predict "..."')
    return result


def default_folder(args: argparse.Namespace) -> str:
    """runs/TASK-METHOD-MODEL-seedN, and what else was asked for, so that different runs get different folders."""
    name = f"{args.task}-{args.method}-{args.model}-seed{args.seed}"
    if args.data:
        name += f"-{Path(args.data).resolve().name}"
    for flag in args.changed:
        value = getattr(args, flag)
        name += f"-{flag.replace('_', '-')}" + ("" if value is True else f"-{value}")
    return f"runs/{name}"


def refuse_other_run(out: Path, config: dict) -> None:
    """Raise ValueError if the folder holds a run of another configuration, which would be overwritten."""
    path = out / "metrics.jsonl"
    if path.exists():
        held = json.loads(path.read_text().splitlines()[0])
        for name in config:
            if held.get(name) != config[name]:
                raise ValueError(f"{out} holds another run: {name} is {held.get(name)} there and {config[name]} here: "
                                 "name another folder with --out")


def predict_text(args: argparse.Namespace) -> None:
    """Print label and probabilities of one text, with a saved adapter and nothing else that was trained."""
    adapter = load_adapter(args.adapter)
    task = data.Task(**adapter["task"])
    texts = args.predict.split("\t")
    if len(texts) != len(task.fields):
        raise ValueError(f"--predict got {len(texts)} texts, task {adapter['task_name']} takes {len(task.fields)} "
                         f"({', '.join(task.fields)}): separate them with a tab")
    gpt, tokenizer, _ = tiny_gpt(adapter["pretrain_seed"], args.cache, args.device)
    prompt, encoder = restore(adapter, gpt)
    prompt.to(args.device), encoder.to(args.device)
    max_length = gpt.config.n_positions - prompt.prompt(encoder.mean[None]).shape[1]
    split = data.encode(task, [(dict(zip(task.fields, texts)), 0)], tokenizer, max_length).to(args.device)
    label_ids = data.label_tokens(task, tokenizer).to(args.device)
    probabilities = predict(gpt, prompt, split, instance_embeddings(encoder, split), label_ids)[0]
    print("\t".join([task.label_names[probabilities.argmax()],
                     *(f"{name} {p:.3f}" for name, p in zip(task.label_names, probabilities))]))


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
    what.add_argument("--method", choices=METHODS, default="lopa", help="a class of lopa.py (default: lopa)")
    what.add_argument("--model", choices=["tiny"], default="tiny",
                      help="the frozen model; tiny is pre-trained at first use (default: tiny)")
    what.add_argument("--data", metavar="DIR", help="folder of GLUE files instead of the built-in sample")
    what.add_argument("--max-train", type=positive(int), metavar="N", help="use N random training rows")
    what.add_argument("--out", metavar="DIR", help="run folder (default: a name under runs/ that says what is in it)")

    how = parser.add_argument_group("how to train it")
    how.add_argument("--seed", type=int, default=0, help="of the prompt's initial values and the data order (default: 0)")
    how.add_argument("--epochs", type=positive(int), default=10, help="default: 10; the last one is scored")
    how.add_argument("--batch-size", type=positive(int), default=32, help="default: 32")
    how.add_argument("--lr", type=positive(float), help="peak learning rate (default: " + per_method("lr") + ")")
    how.add_argument("--init-std", type=positive(float), metavar="STD",
                     help="deviation of Z_S at the start (default: " + per_method("init_std") + ")")
    how.add_argument("--num-virtual-tokens", type=positive(int), default=10, metavar="m", help="default: 10")
    how.add_argument("--rank", type=positive(int), default=4, metavar="r", help="of U and V (default: 4)")
    how.add_argument("--hidden-dim", type=positive(int), default=64, metavar="H", help="of LoPA's heads (default: 64)")
    how.add_argument("--fusion", choices=FUSIONS, default="gate", help="how Z_S and Z_I meet in LoPA (default: gate)")
    how.add_argument("--dropout", type=float, default=0.0, help="on h; the released code has 0.1 (default: 0)")

    check = parser.add_argument_group("to check a claim")
    check.add_argument("--holdout", type=positive(int), metavar="N",
                       help="score on the last N training rows, not trained on, instead of dev: for choosing --lr")
    check.add_argument("--shuffle-instances", action="store_true",
                       help="give every text another text's instance embedding: LoPA without its instance")
    check.add_argument("--pretrain-seed", type=int, default=0, help="of the tiny GPT (default: 0)")

    use = parser.add_argument_group("to use what was trained")
    use.add_argument("--predict", metavar="TEXT", help="print the label of TEXT and the probabilities")
    use.add_argument("--adapter", metavar="DIR", help="run folder to predict with")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: auto")
    machine.add_argument("--cache", metavar="DIR", default=str(Path(__file__).parent / ".cache"),
                         help="where the pre-trained tiny GPT is kept (default: .cache beside train.py)")
    return parser


def per_method(name: str) -> str:
    return ", ".join(f"{method} {values[name]}" for method, values in DEFAULTS.items())


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.predict is None) != (args.adapter is None):
        parser.error("--predict TEXT and --adapter DIR go together")
    if args.task is None and args.predict is None:
        parser.error(f"name a task: --task {' or '.join(data.TASKS)}")
    if not 0 <= args.dropout < 1:
        parser.error(f"argument --dropout: {args.dropout} is not between 0 and 1")
    named = {"task", "method", "model", "data", "out", "seed", "predict", "adapter", "device", "cache"}
    args.changed = [name for name, value in vars(args).items()
                    if name not in named and value != parser.get_default(name)]
    for name, value in DEFAULTS[args.method].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
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
        else:
            print(json.dumps(run(args)))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"train.py: {interrupt or 'interrupted'}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
