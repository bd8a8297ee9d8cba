"""A training step of ours beside Hugging Face peft's, on GPT-2's shape: python -m experiments.peers

The same random texts of SST-2's lengths and the same random weights, taking turns: CPU seconds of a step, the
peak of one above what the process held, in a process of its own, and the seconds from that one's start to the
step's end. "naive" is LoPA as benchmark.py has it. peft's loss is that of its examples: the label word stands
behind the text, with logits of the whole vocabulary at every position; with "label words alone" they are
computed as ours are. The peaks are read as Linux has them.
"""

import argparse
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

import train
from data import Encoded
from experiments.benchmark import CONFIG, M, ROOT, adamw, naive_step, our_step, random_gpt, random_split
from model import TRANSPOSED, GPTConfig, InstanceEncoder

WAYS = ("naive", "pt", "lopa", "lora", "peft pt", "peft lora", "peft pt, label words alone")
LABELS, BATCH_SIZE = torch.tensor([5, 7]), 32


def make(way: str) -> Callable[[Encoded], torch.Tensor]:
    """One of WAYS -> a function that takes a batch, makes a step and returns the loss."""
    if way.startswith("peft"):
        return peft(way)
    gpt = random_gpt(GPTConfig())
    config = train.Config(**CONFIG | dict(method="lopa" if way == "naive" else way))
    model = train.Adapted(config, gpt, encoder := InstanceEncoder(gpt), LABELS).train()
    optimizer = adamw(model, config)
    if way == "naive":
        return lambda batch: naive_step(model, encoder, optimizer, batch)
    return lambda batch: our_step(model, optimizer, batch)


def peft(way: str) -> Callable[[Encoded], torch.Tensor]:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    weights = {f"transformer.{name}": tensor.T if name.endswith(TRANSPOSED) else tensor
               for name, tensor in random_gpt(GPTConfig()).state_dict().items()}
    base.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    of_lora = dict(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **of_lora) if "lora" in way else
                           PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=M)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step(batch: Encoded) -> torch.Tensor:
        tokens, lengths, rows = batch.tokens, batch.lengths, torch.arange(len(batch))
        T = tokens.shape[1]
        if "alone" in way:
            inputs_embeds = torch.cat([model.get_prompt(len(batch)), base.transformer.wte(tokens)], dim=1)
            mask = (torch.arange(M + T) < M + lengths[:, None]).long()
            hidden = base.transformer(inputs_embeds=inputs_embeds, attention_mask=mask).last_hidden_state
            logits = hidden[rows, M + lengths - 1] @ base.lm_head.weight[LABELS].T
            loss = F.cross_entropy(logits, batch.labels)
        else:
            ids = F.pad(tokens, (0, 1))                                # (B, T + 1): room for the label word
            labels = torch.full_like(ids, -100)
            ids[rows, lengths] = labels[rows, lengths] = LABELS[batch.labels]
            mask = (torch.arange(T + 1) <= lengths[:, None]).long()
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.detach()

    return step


def random_batch(seed: int = 0) -> Encoded:
    torch.manual_seed(seed)
    batch = random_split(BATCH_SIZE, 50257, "cpu")
    batch.instances = torch.randn(BATCH_SIZE, 768)                     # h is there already
    return batch


def one(way: str) -> None:
    """In a process of its own: print the MB that a step adds, and the seconds from the start to its end."""
    step, batch = make(way), random_batch()
    ctypes.CDLL(None).malloc_trim(0)                                   # building left free memory behind
    Path("/proc/self/clear_refs").write_text("5")                      # the peak starts from here
    def kilobytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    held = kilobytes("VmRSS")
    step(batch)
    print(json.dumps([(kilobytes("VmHWM") - held) // 1024, time.time() - float(os.environ["BEGAN"])]))


def main() -> None:
    parser = argparse.ArgumentParser("peers", argparse.SUPPRESS, __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(args.one)
    alone = {}
    for way in WAYS:
        command = [sys.executable, "-m", "experiments.peers", "--one", way]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"BEGAN": str(time.time())}, check=True,
                              stdout=subprocess.PIPE)
        alone[way] = json.loads(done.stdout.splitlines()[-1])
    steps, seconds = {way: make(way) for way in WAYS}, {way: [] for way in WAYS}
    for number in range(args.rounds + 1):
        batch = random_batch(number)
        for way, step in steps.items():
            began = time.process_time()
            step(batch)
            seconds[way] += [time.process_time() - began] * (number > 0)       # the first one allocates
    print("| way | CPU seconds of a step | peak, MB | start to first step, s |\n|" + " --- |" * 4)
    for way, times in seconds.items():
        print(f"| {way} | {statistics.median(times):.2f} | {alone[way][0]} | {alone[way][1]:.1f} |")


if __name__ == "__main__":
    main()
