"""How long a step takes, what it could take, and where the time goes: python tests/benchmark.py

Times differ between machines, so every comparison is a ratio of two times measured in turn in one process. The work is
GPT-2 small's shape with random weights, LoPA with m = 10, r = 4, H = 256, batches of 16 texts as long as SST-2's.

    naive   the encoder runs at every step, batches are random and padded to their longest text, logits are computed at
            every position: what the released code does
    ours    train.py's own Trainer
    limit   nothing but the frozen blocks' matrix products, forward and back to the inputs, on real tokens alone
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import train
from lopa import get_nb_trainable_parameters
from model import GPT, GPTConfig, InstanceEncoder

# How many of the 67,349 training sentences of SST-2 have 4, 5, 6, ... tokens of GPT-2, the template's four included.
SST2_LENGTHS = [491, 4487, 6852, 6118, 5122, 4374, 3780, 3354, 3051, 2665, 2362, 2181, 1925, 1843, 1674, 1516, 1364, 1264,
                1187, 1091, 1041, 897, 876, 799, 718, 610, 616, 553, 487, 466, 442, 366, 351, 343, 253, 240, 229, 194, 181,
                134, 134, 99, 80, 85, 82, 60, 45, 47, 32, 30, 36, 32, 16, 14, 9, 13, 9, 9, 11, 4, 2, 1, 0, 2]
BATCH_SIZE, M = 16, 10
SIZES = dict(num_virtual_tokens=M, rank=4, hidden_dim=256, dropout=0.0, init_std=1.0, fusion="gate")


def random_split(num_rows: int, vocab_size: int, device: str) -> data.Encoded:
    """Random tokens in texts of SST-2's lengths, random labels of two."""
    lengths = 4 + torch.multinomial(torch.tensor(SST2_LENGTHS, dtype=torch.float), num_rows, replacement=True)
    tokens = torch.randint(vocab_size, (num_rows, int(lengths.max())))
    return data.Encoded(tokens, lengths, torch.randint(2, (num_rows,)), 0).to(device)


def build(config: GPTConfig, device: str = "cpu", dtype: torch.dtype = torch.float32, method: str = "lopa", **sizes):
    """(frozen random GPT with the method on it, its encoder); the same one each time."""
    torch.manual_seed(0)
    gpt = GPT(config).to(device, dtype).requires_grad_(False)
    encoder = InstanceEncoder(gpt).to(device)
    return train.Adapted(gpt, encoder, torch.tensor([5, 7], device=device), method, **SIZES | sizes), encoder


def naive_step(model, encoder, optimizer, tokens, lengths, labels) -> torch.Tensor:
    with torch.no_grad():
        h = encoder(tokens, lengths)
    logits = model.gpt.logits(model.gpt.hidden(model.prompt(model.gpt.embed(tokens), h)))          # (B, m + T, vocab_size)
    target = logits[torch.arange(len(tokens), device=tokens.device), M + lengths - 1]
    loss = F.cross_entropy(target[:, model.label_ids].to(torch.promote_types(target.dtype, torch.float32)), labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.trained().values(), 1.0)
    optimizer.step()
    return loss.detach()


def matrix_products(gpt: GPT, num_tokens: int) -> float:
    """Compute the blocks' products with `num_tokens` rows, forward and to the inputs; returns how many operations."""
    operations = 0
    for block in gpt.h:
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            weight = linear.weight                                     # (out, in)
            x = weight.new_ones(num_tokens, weight.shape[1])
            (x @ weight.T) @ weight                                    # forward; gradient to the input
            operations += 4 * num_tokens * weight.numel()
    return operations


def seconds(function, device: str = "cpu") -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def an_epoch(device: str, dtype: torch.dtype, num_rows: int) -> None:
    """Naive, ours and the limit, one batch of each in turn."""
    model, encoder = build(GPTConfig(), device, dtype)
    split = random_split(num_rows, 50257, device)
    keeping = seconds(lambda: train.instance_embeddings(encoder, split), device)
    instances = train.instance_embeddings(encoder, split)
    optimizer = torch.optim.AdamW(model.trained().values(), lr=1e-4, weight_decay=0.0)
    trainer = train.Trainer(model, split, instances, epochs=1, batch_size=BATCH_SIZE, lr=1e-4, seed=0)
    ours = trainer.train_epoch()
    naive_batches = list(train.batches(split, torch.randperm(num_rows).to(device).split(BATCH_SIZE)))
    our_batches = train.shuffled_batches(split, BATCH_SIZE, torch.Generator().manual_seed(0))
    naive_step(model, encoder, optimizer, *naive_batches[0][1:])       # not timed: the first step allocates
    times, operations, padded = {"naive": 0.0, "ours": 0.0, "limit": 0.0}, 0, [0, 0]
    for (rows, *batch), our_rows in zip(naive_batches, our_batches):
        real = int(split.lengths[our_rows].sum()) + M * len(our_rows)
        times["naive"] += seconds(lambda: naive_step(model, encoder, optimizer, *batch), device)
        times["ours"] += seconds(lambda: next(ours), device)
        times["limit"] += seconds(lambda: matrix_products(model.gpt, real), device)
        operations += 4 * real * sum(p.numel() for n, p in model.gpt.h.named_parameters() if p.ndim == 2)
        padded[0] += len(rows) * int(split.lengths[rows].max())
        padded[1] += len(our_rows) * int(split.lengths[our_rows].max())
    tokens = int(split.lengths.sum())
    print(f"\nan epoch of {num_rows} texts, {tokens} tokens, on {device}, {str(dtype)[6:]}; padded to {padded[0]} (naive), "
          f"{padded[1]} (ours)")
    for name, time_taken in times.items():
        print(f"  {name:6} {time_taken:7.2f} s   {time_taken / times['limit']:5.2f} x limit   {tokens / time_taken:7.0f} tokens/s")
    print(f"  naive / ours {times['naive'] / times['ours']:.2f}; ours takes {times['ours'] / times['limit']:.2f} x the limit, "
          f"{operations / times['limit'] / 1e9:.0f} GFLOP/s; instance embeddings once for all epochs: {keeping:.2f} s")


def same_losses() -> None:
    """The same batches in float64: both ways have to give the same numbers."""
    config = GPTConfig(vocab_size=100, n_positions=128, n_embd=64, n_layer=2, n_head=4, initializer_range=0.08)
    split = random_split(320, 100, "cpu")
    model, encoder = build(config)
    trainer = train.Trainer(model.double(), split, encoder.double()(split.tokens, split.lengths), epochs=1,
                            batch_size=BATCH_SIZE, lr=3e-3, seed=0)
    order = train.shuffled_batches(split, BATCH_SIZE, torch.Generator().manual_seed(0))
    for _ in trainer.train_epoch():
        pass
    model, encoder = build(config)
    model, encoder = model.double(), encoder.double()
    optimizer = torch.optim.AdamW(model.trained().values(), lr=3e-3, weight_decay=0.0)
    schedule = train.cosine_schedule(optimizer, 1, 20)
    worst = 0.0
    for (_, *batch), loss in zip(train.batches(split, order), trainer.losses):
        worst = max(worst, abs(naive_step(model, encoder, optimizer, *batch) - loss / BATCH_SIZE).item())
        schedule.step()
    print(f"\nthe same 20 batches in float64: losses of naive and ours differ by {worst:.1e} at most")
    assert worst < 1e-10


def peak_memory() -> None:
    """Each way in a process of its own, because a process's peak never falls; one step on a batch of the longest texts."""
    peaks = {way: int(subprocess.run([sys.executable, __file__, "--peak", way], capture_output=True, check=True).stdout)
             for way in ("naive", "ours")}
    print(f"peak memory of a step, above the model's: naive {peaks['naive']} MB, ours {peaks['ours']} MB")


def one_peak(way: str) -> None:
    model, encoder = build(GPTConfig())
    split = random_split(BATCH_SIZE, 50257, "cpu")
    optimizer = torch.optim.AdamW(model.trained().values(), lr=1e-4)
    trainer = train.Trainer(model, split, torch.randn(BATCH_SIZE, 768), epochs=1, batch_size=BATCH_SIZE, lr=1e-4, seed=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if way == "ours":
        next(trainer.train_epoch())
    else:
        naive_step(model, encoder, optimizer, split.tokens, split.lengths, split.labels)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)


def growth() -> None:
    """Step time and parameters as the prompt gets longer and the rank higher; batches of 4 texts of 15 tokens."""
    print("\ntrainable parameters, and seconds of a step on 4 texts of 15 tokens\n     m   " + "".join(
        f"{name:>20}" for name in ("prompt tuning", "IDPG", "LoPA r=1", "r=2", "r=4", "r=8")))
    gpt = build(GPTConfig())[0].gpt
    tokens, lengths, labels = torch.randint(50257, (4, 15)), torch.full((4,), 15), torch.randint(2, (4,))
    for m in (5, 10, 25, 50, 100):
        cells = []
        for method, rank in (("pt", 0), ("idpg", 0), *(("lopa", r) for r in (1, 2, 4, 8))):
            model = train.Adapted(gpt, InstanceEncoder(gpt), torch.tensor([5, 7]), method,
                                  **SIZES | dict(num_virtual_tokens=m, rank=rank))
            trainer = train.Trainer(model, data.Encoded(tokens, lengths, labels, 0), torch.randn(4, 768), epochs=3,
                                    batch_size=4, lr=1e-4, seed=0)
            times = []
            for _ in range(3):
                times.append(seconds(lambda: next(trainer.train_epoch())))
                trainer.epoch += 1
            cells.append(f"{get_nb_trainable_parameters(model.prompt)[0]:>13,} {min(times):5.2f}s")
        print(f"  {m:4}   " + "".join(f"{cell:>20}" for cell in cells))


@torch.no_grad()
def latency() -> None:
    """What the prompt adds to the answer for one text."""
    model, encoder = build(GPTConfig())
    bare, _ = build(GPTConfig(), method="none")
    tokens, lengths = torch.randint(50257, (1, 15)), torch.tensor([15])
    h = encoder(tokens, lengths)
    ways = {"without a prompt": lambda: bare(tokens, lengths, h), "LoPA, h computed": lambda: model(tokens, lengths,
            encoder(tokens, lengths)), "LoPA, h kept": lambda: model(tokens, lengths, h)}
    best = {name: min(seconds(way) for _ in range(10)) for name, way in ways.items()}
    print("\none text of 15 tokens: " + ", ".join(f"{name} {1000 * t:.0f} ms ({t / best['without a prompt']:.2f})"
                                                 for name, t in best.items()))


def tiny_path() -> None:
    """python train.py --task sst2, with the tiny GPT in the cache: the parts, and the whole."""
    args = train.parse_args(["--task", "sst2", "--device", "cpu"])
    train.load_model("tiny", args)                                     # pre-trained now, if it was not yet
    parts = {"import torch": seconds(lambda: subprocess.run([sys.executable, "-c", "import torch"]))}
    parts["text, tokenizer, model"] = seconds(lambda: train.load_model("tiny", args))
    began = time.perf_counter()
    problem = train.prepare(args)
    parts["data and instance embeddings"] = time.perf_counter() - began - parts["text, tokenizer, model"]
    options = train.configs(args, problem)[1]
    model = train.build(problem, options)
    trainer = train.Trainer(model, problem.train, problem.train_instances,
                            **{name: options[name] for name in train.TRAINING_OPTIONS})
    list(trainer.train_epoch())                                        # not timed: the first steps allocate
    trainer.end_epoch()
    n = options["epochs"]
    parts[f"{trainer.total_steps} steps of training"] = n * seconds(lambda: list(trainer.train_epoch()))
    parts[f"{n} evaluations on dev"] = n * seconds(lambda: train.predict(model, problem.test, problem.test_instances))
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, train.__file__, "--task", "sst2", "--quiet", "--out", out]
        whole = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    print(f"\npython train.py --task sst2: {whole:.1f} s, of which")
    for name, t in parts.items():
        print(f"  {t:5.2f} s  {name}")
    rows, tokens, lengths, labels = next(train.batches(problem.train, torch.arange(32).split(32)))

    def forward():
        return model(tokens, lengths, problem.train_instances[rows])

    with torch.no_grad():
        ahead = min(seconds(forward) for _ in range(50))
    both = min(seconds(lambda: F.cross_entropy(forward(), labels).backward()) for _ in range(50))
    products = min(seconds(lambda: matrix_products(problem.gpt, int(lengths.sum()) + 32 * M)) for _ in range(50))
    print(f"a step: forward {1000 * ahead:.1f} ms, forward and backward {1000 * both:.1f} ms, its matrix products alone "
          f"{1000 * products:.1f} ms; the rest is GELU, attention and the cost of starting many small operations")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda: of the epoch; the rest is measured on the CPU")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=320, help="texts of the epoch (default: 320, 20 batches)")
    parser.add_argument("--peak", choices=["naive", "ours"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    train.keep_freed_memory()
    if args.peak:
        one_peak(args.peak)
    else:
        print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
        peak_memory()                                                  # first: a child's peak begins at its parent's
        an_epoch(args.device, getattr(torch, args.dtype), args.rows)
        same_losses()
        growth()
        latency()
        tiny_path()
