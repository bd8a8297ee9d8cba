"""How long a step takes, what it could take, and where the time goes: python -m experiments.benchmark

Times differ between machines, so every comparison is a ratio of two times measured in turn in one process.
The work is GPT-2 small's shape with random weights, LoPA with m = 10, r = 4, H = 256, batches of 16 texts as
long as SST-2's.

    naive   the encoder runs at every step, batches are random and padded to their longest text, logits are
            computed at every position: what the released code does
    ours    the step of train.fit, one batch of train.parts at a time; then train.fit itself, to see that it
            takes as long
    limit   nothing but the frozen blocks' matrix products, forward and back to the inputs, on real tokens
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import data
import train
from model import GPT, GPTConfig, InstanceEncoder, cosine_factor

ROOT = Path(train.__file__).parent

# How many of SST-2's 67,349 training sentences have 4, 5, 6, ... tokens, the template's four included.
SST2_LENGTHS = [
    491, 4487, 6852, 6118, 5122, 4374, 3780, 3354, 3051, 2665, 2362, 2181, 1925, 1843, 1674, 1516, 1364,
    1264, 1187, 1091, 1041, 897, 876, 799, 718, 610, 616, 553, 487, 466, 442, 366, 351, 343, 253, 240, 229,
    194, 181, 134, 134, 99, 80, 85, 82, 60, 45, 47, 32, 30, 36, 32, 16, 14, 9, 13, 9, 9, 11, 4, 2, 1, 0, 2]
BATCH_SIZE, M = 16, 10
CONFIG = dict(task="sst2", epochs=1, batch_size=BATCH_SIZE, lr=1e-4, num_virtual_tokens=M, rank=4,
              hidden_dim=256, dropout=0.0, init_std=1.0, device="cpu", quiet=True)


def random_split(num_rows: int, vocab_size: int, device: str) -> data.Encoded:
    """Random tokens in texts of SST-2's lengths, random labels of two."""
    lengths = 4 + torch.multinomial(torch.tensor(SST2_LENGTHS, dtype=torch.float), num_rows, replacement=True)
    tokens = torch.randint(vocab_size, (num_rows, int(lengths.max())))
    return data.Encoded(tokens.to(device), lengths.to(device), torch.randint(2, (num_rows,)).to(device))


def random_gpt(config: GPTConfig, device: str = "cpu", dtype: torch.dtype = torch.float32) -> GPT:
    """A frozen GPT with random weights, the same ones each time."""
    torch.manual_seed(0)
    return GPT(config).to(device, dtype).requires_grad_(False)


def problem_of(gpt: GPT, split: data.Encoded) -> train.Problem:
    """Train on the split, score its first row; h is computed here."""
    encoder, label_ids = InstanceEncoder(gpt), torch.tensor([5, 7], device=split.labels.device)
    split.instances = train.instance_embeddings(encoder, split)
    return train.Problem(gpt, encoder, label_ids, split, {"first row": split[:1]})


def adamw(model: train.Adapted, config: train.Config) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.trained().values(), lr=config.lr, weight_decay=0.0)


def step(model: train.Adapted, optimizer: torch.optim.Optimizer, logits: Tensor, labels: Tensor) -> Tensor:
    """From logits of the label words (B, labels) to new weights; returns the loss."""
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.trained().values(), 1.0)
    optimizer.step()
    return loss.detach()


def our_step(model: train.Adapted, optimizer: torch.optim.Optimizer, batch: data.Encoded) -> Tensor:
    return step(model, optimizer, model(batch.tokens, batch.lengths, batch.instances), batch.labels)


def naive_step(model: train.Adapted, encoder: InstanceEncoder, optimizer: torch.optim.Optimizer,
               batch: data.Encoded) -> Tensor:
    with torch.no_grad():
        h = encoder(batch.tokens, batch.lengths)
    inputs_embeds = model.prompt(model.gpt.embed(batch.tokens), h)     # (B, m + T, d)
    logits = model.gpt.logits(model.gpt.hidden(inputs_embeds))         # (B, m + T, vocab_size)
    target = logits[torch.arange(len(batch), device=logits.device), M + batch.lengths - 1]
    target = target[:, model.label_ids].to(torch.promote_types(target.dtype, torch.float32))
    return step(model, optimizer, target, batch.labels)


def matrix_products(gpt: GPT, num_tokens: int) -> None:
    """The blocks' products for `num_tokens` rows, forward and to the inputs."""
    for block in gpt.h:
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            weight = linear.weight                                     # (out, in)
            x = weight.new_ones(num_tokens, weight.shape[1])
            (x @ weight.T) @ weight                                    # forward; gradient to the input


def seconds(function: Callable, device: str = "cpu") -> float:
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def an_epoch(device: str, dtype: torch.dtype, num_rows: int) -> None:
    """Naive, ours and the limit, one batch of each in turn; then the same epoch by train.fit."""
    config, gpt = train.Config(**CONFIG | dict(device=device)), random_gpt(GPTConfig(), device, dtype)
    model = train.Adapted(config, gpt, InstanceEncoder(gpt), torch.tensor([5, 7], device=device)).train()
    split = random_split(num_rows, 50257, device)
    naive_order = torch.randperm(num_rows).to(device).split(BATCH_SIZE)
    embedding = seconds(lambda: problem_of(gpt, split), device)
    problem, optimizer = problem_of(gpt, split), adamw(model, config)
    order = data.shuffled_batches(split, BATCH_SIZE, torch.Generator().manual_seed(config.seed))
    ours = [batch for batch, _ in train.parts(split, order)]
    naive = list(data.batches(split, naive_order))
    naive_step(model, problem.encoder, optimizer, naive[0])            # not timed: the first step allocates
    times = {"naive": 0.0, "ours": 0.0, "limit": 0.0}
    for naive_batch, batch in zip(naive, ours):
        real = int(batch.lengths.sum()) + M * len(batch)
        times["naive"] += seconds(lambda: naive_step(model, problem.encoder, optimizer, naive_batch), device)
        times["ours"] += seconds(lambda: our_step(model, optimizer, batch), device)
        times["limit"] += seconds(lambda: matrix_products(gpt, real), device)
    fit = seconds(lambda: train.fit(config, train.build(config, problem), problem), device)
    tokens = int(split.lengths.sum())
    padded = [sum(batch.tokens.numel() for batch in way) for way in (naive, ours)]
    print(f"\nan epoch of {num_rows} texts, {tokens} tokens, on {device}, {str(dtype)[6:]}; padded to "
          f"{padded[0]} (naive), {padded[1]} (ours)")
    for name, time_taken in times.items():
        print(f"  {name:6} {time_taken:7.2f} s   {time_taken / times['limit']:5.2f} x limit   "
              f"{tokens / time_taken:7.0f} tokens/s")
    naive_time, our_time, limit = times.values()
    print(f"  naive / ours {naive_time / our_time:.2f}; ours takes {our_time / limit:.2f} x the limit\n"
          f"  the same epoch by train.fit: {fit:.2f} s; h, once for all epochs: {embedding:.2f} s")


def same_losses() -> None:
    """train.fit and the naive steps on the same batches in float64: the same losses and weights."""
    gpt = random_gpt(GPTConfig(vocab_size=100, n_positions=128, n_embd=64, n_layer=2, n_head=4,
                               initializer_range=0.08), dtype=torch.float64)
    config = train.Config(**CONFIG | dict(lr=3e-3))
    problem = problem_of(gpt, random_split(320, 100, "cpu"))
    split = problem.train
    split.instances = problem.encoder(split.tokens, split.lengths)     # in float64: train.py keeps float32
    problem = replace(problem, tests={"first row": split[:1]})
    model, naive = (train.build(config, problem).double() for _ in range(2))
    our_loss = train.fit(config, model, problem)[0]["loss"]
    optimizer, losses = adamw(naive, config), []
    order = data.shuffled_batches(split, BATCH_SIZE, torch.Generator().manual_seed(config.seed))
    steps = len(order)
    for number, batch in enumerate(data.batches(split, order)):
        optimizer.param_groups[0]["lr"] = config.lr * cosine_factor(number, int(0.06 * steps), steps)
        losses.append(naive_step(naive, problem.encoder, optimizer, batch).item())
    apart = abs(sum(losses) / len(losses) - our_loss)
    weights_apart = max((p - naive.trained()[name]).abs().max().item() for name, p in model.trained().items())
    print(f"\n20 steps in float64, train.fit and naive: mean losses differ by {apart:.1e}, weights by "
          f"{weights_apart:.1e} at most")
    assert apart < 1e-10 and weights_apart < 1e-8


if __name__ == "__main__":
    parser = argparse.ArgumentParser("benchmark", "python -m experiments.benchmark [flags]", __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="of the epoch: cpu or cuda; the rest is on the CPU")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=320, help="texts of the epoch (default: 320, 20 batches)")
    args = parser.parse_args()
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    an_epoch(args.device, getattr(torch, args.dtype), args.rows)
    same_losses()
