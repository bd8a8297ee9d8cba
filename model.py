"""A GPT-2 that can be opened in the middle, and the instance encoder that LoPA reads its input with.

The architecture and the module names are GPT-2's (Radford et al. 2019): pre-norm blocks, tanh-GELU, learned
positions, output layer tied to the input embeddings. A soft prompt is not made of tokens, so it has to enter
after the embedding and before the blocks; that is why the forward pass comes in three parts:

    embed    tokens (B, T)            -> token_embeds (B, T, d)
    hidden   inputs_embeds (B, T, d)  -> last hidden states (B, T, d)
    logits   hidden states (..., d)   -> logits (..., vocab_size), only where and for what they are needed

B is the number of texts, T their length, d the width; d_h is the width of the instance embedding h (here d).
After the model come the instance encoder, the pre-training of a tiny GPT and the reader of weight files.
This file imports torch and the standard library alone, so it can be copied by itself.
"""

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """Sizes, under GPT-2's own names; the defaults are GPT-2 small's."""

    vocab_size: int = 50257
    n_positions: int = 1024      # longest input: prompt and text together
    n_embd: int = 768            # d
    n_layer: int = 12
    n_head: int = 12
    initializer_range: float = 0.02
    layer_norm_epsilon: float = 1e-5


class Attention(nn.Module):
    """Every position looks at itself and at all before it, in n_head heads of d / n_head features each."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d).

        `past`, when generating, holds the keys and values of the positions before x; those of x join them.
        """
        B, T, d = x.shape
        parts = self.c_attn(x).split(d, dim=2)                         # three of (B, T, d)
        # Each becomes (B, n_head, T, d / n_head).
        q, k, v = (part.view(B, T, self.n_head, d // self.n_head).transpose(1, 2) for part in parts)
        if past:
            k = torch.cat([past[0], k], dim=2)                         # (B, n_head, past + T, d / n_head)
            v = torch.cat([past[1], v], dim=2)
        if past is not None:
            past[:] = k, v
        # Causal, so padding on the right is seen by no real token. A single position, the last, sees all.
        x = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)   # (B, n_head, T, d / n_head)
        return self.c_proj(x.transpose(1, 2).flatten(2))               # heads side by side again: (B, T, d)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d); `past` is the attention's."""
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2's language model, right-padded batches, in the three parts that the top of this file names."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "GPT":
        """GPT-2 from a folder that Hugging Face Transformers wrote; the published ones have the same form.

        It holds config.json and model.safetensors or pytorch_model.bin. ValueError: one of them is missing
        or damaged, they do not fit together, or they are another architecture's.
        """
        config, weights = Path(folder, "config.json"), Path(folder, "model.safetensors")
        if not weights.is_file():
            weights = Path(folder, "pytorch_model.bin")
        if not config.is_file() or not weights.is_file():
            raise ValueError(f"{folder} does not hold config.json and model.safetensors or "
                             "pytorch_model.bin: name a folder with a GPT-2, not in several files (shards)")
        with torch.device("meta"):                                     # shapes alone, no memory yet
            gpt = cls(read_config(config))
        try:
            gpt.load_state_dict(read_weights(weights, dtype), assign=True)
        except RuntimeError as error:                                  # it names all that does not fit
            raise ValueError(f"{weights}, {config}: {short(error, 400)}: is it another model's?") from None
        return gpt

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> token embeddings X_e (B, T, d), without positions: `hidden` adds those."""
        return self.wte(tokens)

    def hidden(self, inputs_embeds: Tensor, num_blocks: int | None = None,
               past: list[list[Tensor]] | None = None) -> Tensor:
        """Embedded input (B, T, d) -> last hidden states (B, T, d). A prompt in front shifts the text.

        With `num_blocks`, the raw states after that many blocks. `past`, at first an empty list per block,
        fills with keys and values; from then on the input is the one next position. ValueError: it does not
        fit the context.
        """
        T = inputs_embeds.shape[1]
        start = past[0][0].shape[2] if past and past[0] else 0
        if start + T > self.config.n_positions:
            raise ValueError(f"input of {start + T} tokens > context {self.config.n_positions}: "
                             "lower num_virtual_tokens or cut the text")
        x = inputs_embeds + self.wpe.weight[start:start + T]           # (B, T, d) + (T, d)
        for block, block_past in zip(self.h[:num_blocks], past or [None] * len(self.h)):
            x = block(x, block_past)
        return self.ln_f(x) if num_blocks is None else x

    def hidden_at(self, inputs_embeds: Tensor, positions: Tensor, rows: Tensor | None = None) -> Tensor:
        """The same as `hidden(...)` at one position per row, (B, T, d), (B,) -> (B, d), for less work.

        Or at n positions of any rows: positions (n,), rows (n,) -> (n, d). Nobody sees the last block's
        states elsewhere, so its MLP, its largest part, runs on these tokens alone.
        """
        last = self.h[-1]
        x = self.hidden(inputs_embeds, num_blocks=len(self.h) - 1)     # (B, T, d)
        x = x + last.attn(last.ln_1(x))                                # (B, T, d)
        rows = torch.arange(len(x), device=x.device) if rows is None else rows
        x = x[rows, positions]                                         # (B, d) or (n, d)
        x = x + last.mlp(last.ln_2(x))
        return self.ln_f(x)

    def logits(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        """Hidden states (..., d) -> next-token logits (..., vocab_size), through the embedding table.

        With token ids `only` (n,), the logits of these tokens alone, (..., n): two label words need two rows
        of the table, not all of GPT-2's 50,257.
        """
        table = self.wte.weight if only is None else self.wte.weight[only]             # (vocab_size or n, d)
        wide = torch.promote_types(hidden.dtype, torch.float32)        # bfloat16 rounds differences away
        return hidden.to(wide) @ table.to(wide).T

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> logits (B, T, vocab_size), as any language model."""
        return self.logits(self.hidden(self.embed(tokens)))

    @torch.no_grad()
    def generate(self, inputs_embeds: Tensor, max_new_tokens: int, lengths: Tensor | None = None,
                 ends: Tensor | None = None) -> Tensor:
        """Embedded input (B, T, d), with a prompt or not -> the likeliest next tokens (B, max_new_tokens).

        Rows of different lengths (B,) are padded on the right; those of one length are generated together.
        A row that has come to one of the tokens `ends` (n,) is over, and ends[0] fills what is left of it.
        """
        B, T, _ = inputs_embeds.shape
        device = inputs_embeds.device
        lengths = torch.full((B,), T, device=device) if lengths is None else lengths
        ends = torch.zeros(0, dtype=torch.long, device=device) if ends is None else ends
        tokens = torch.full((B, max_new_tokens), ends[0] if len(ends) else 0, device=device)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten()             # (b,)
            x, past = inputs_embeds[rows, :length], [[] for _ in self.h]
            over = torch.zeros(len(rows), dtype=torch.bool, device=device)
            for i in range(max_new_tokens):
                new = self.logits(self.hidden(x, past=past)[:, -1]).argmax(dim=-1)     # (b,)
                tokens[rows[~over], i] = new[~over]
                over |= torch.isin(new, ends)
                if over.all():
                    break
                x = self.embed(new[:, None])                           # (b, 1, d): the rest is in `past`
        return tokens

    def fingerprint(self) -> str:
        """Twelve hex digits that tell these weights from any others: an adapter fits one model only."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().float().contiguous().numpy())   # float: NumPy has no bfloat16
        return digest.hexdigest()[:12]


class InstanceEncoder(nn.Module):
    """Text -> instance embedding h (B, d_h), from a frozen GPT: what the input is to the model half-way up.

    The hidden states after `num_blocks` blocks (by default half of them), each layer-normalised, averaged
    over the real tokens; then every feature is standardised with the training split's mean and deviation,
    once `fit` has seen them. With num_blocks=0 it is the token embeddings that are averaged: a bag of words,
    which knows nothing of their order. Raises ValueError for more blocks than the GPT has.
    """

    def __init__(self, gpt: GPT, num_blocks: int | None = None):
        super().__init__()
        self.gpt = gpt.requires_grad_(False).eval()
        n_layer = gpt.config.n_layer
        self.num_blocks = (n_layer + 1) // 2 if num_blocks is None else num_blocks
        if not 0 <= self.num_blocks <= n_layer:
            raise ValueError(f"the encoder has {n_layer} blocks, h cannot be read after {num_blocks}: name "
                             f"0 to {n_layer}")
        device = next(gpt.parameters()).device
        self.register_buffer("mean", torch.zeros(gpt.config.n_embd, device=device))
        self.register_buffer("std", torch.ones(gpt.config.n_embd, device=device))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tokens (B, T), right-padded, and lengths (B,) -> h (B, d_h)."""
        hidden = self.gpt.embed(tokens)                                # (B, T, d), without positions
        if self.num_blocks:
            hidden = self.gpt.hidden(hidden, num_blocks=self.num_blocks)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))   # bfloat16 is too coarse a mean
        hidden = F.layer_norm(hidden, hidden.shape[-1:])               # no token outweighs the others
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # (B, T)
        mean = (hidden * real[..., None]).sum(dim=1) / lengths[:, None]                # (B, d)
        return (mean - self.mean) / self.std                           # Eq. (5)

    @staticmethod
    def scale(instances: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (N, d_h) -> mean and deviation of every feature, (d_h,), (d_h,)."""
        std = instances.std(dim=0, correction=int(len(instances) > 1))
        return instances.mean(dim=0), std.where(std > 1e-6, 1e30)      # what does not vary is 0 for all

    def fit(self, instances: Tensor) -> Tensor:
        """The training split's embeddings (N, d_h), made before -> the same, standardised from now on."""
        self.mean, self.std = self.scale(instances)
        return (instances - self.mean) / self.std


# -----------------------------------------------------------------------------------------------------------
# The tiny GPT's pre-training; its sizes, the text and the tokenizer are the caller's.

# 1.25 nats a token is about what the text's own randomness leaves; a model that ignores irony stays at 1.30,
# and one that ignores polarity above 1.35. `documents` is how many reviews the caller's text should have.
PRETRAINING = dict(steps=1200, batch_size=16, window=48, lr=4e-3, warmup_steps=50, documents=20_000)


def cosine_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate at a step (from 0): a linear warm-up, then half a cosine down to 0."""
    return min((step + 1) / max(warmup_steps, 1), 0.5 * (1 + math.cos(math.pi * step / total_steps)))


def pretrain(config: GPTConfig, token_ids: Tensor, document_starts: Tensor, seed: int, device: str,
             progress: Callable[[range], Iterable[int]] = iter) -> GPT:
    """An ordinary language model of the text token_ids (N,): predict each next token, as PRETRAINING says.

    Every window begins where a document does: at document_starts (n,). `progress` wraps the range of steps,
    as tqdm does. Polarity and irony are each learned all of a sudden, after a plateau.
    """
    recipe = PRETRAINING
    torch.manual_seed(seed)
    gpt = GPT(config).to(device)
    order = torch.Generator().manual_seed(seed)
    window = torch.arange(recipe["window"] + 1)                        # one more than read: the last target
    starts = document_starts[document_starts + len(window) <= len(token_ids)]
    optimizer = torch.optim.AdamW(gpt.parameters(), weight_decay=0.01)
    for step in progress(range(recipe["steps"])):
        lr = recipe["lr"] * cosine_factor(step, recipe["warmup_steps"], recipe["steps"])
        optimizer.param_groups[0]["lr"] = lr
        picked = torch.randint(len(starts), (recipe["batch_size"], 1), generator=order)      # (B, 1)
        batch = token_ids[starts[picked] + window].to(device)          # (B, window + 1)
        logits = gpt(batch[:, :-1])                                    # (B, window, vocab_size)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
    gpt.zero_grad()                                                    # a finished model needs no gradients
    return gpt


# -----------------------------------------------------------------------------------------------------------
# Reading pre-trained weights: whatever the files hold, the result is a model or a ValueError of one line.

# Weights that GPT-2's files store the other way round, (in, out), for its own kind of linear layer.
TRANSPOSED = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "BOOL": torch.bool, "U8": torch.uint8}      # these two for the causal mask in older files


def read_config(path: Path) -> GPTConfig:
    """config.json -> GPTConfig. ValueError: a size is absurd, or the model computes otherwise than GPT-2."""
    found = parse_object(path.read_bytes(), path)
    sizes = {name: found.get(name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    for name, size in sizes.items():
        if type(size) is not int or not 0 < size <= 1_000_000 or name == "n_head" and sizes["n_embd"] % size:
            raise ValueError(f"{path}: {name} is {short(size)}, no size of a GPT-2")
    usual = dict(model_type="gpt2", activation_function="gelu_new", n_inner=4 * sizes["n_embd"],
                 scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    for name, value in usual.items():
        if found.get(name) not in (None, value):
            raise ValueError(f"{path}: {name} is not {value!r}: another model than GPT-2")
    epsilon = found.get("layer_norm_epsilon", 1e-5)
    if type(epsilon) is not float or not 0 < epsilon < 1:
        raise ValueError(f"{path}: layer_norm_epsilon is {short(epsilon)}, no small number")
    return GPTConfig(**sizes, layer_norm_epsilon=epsilon)


def read_weights(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """A file's tensors under our names, in our layout and `dtype`. ValueError: damaged, or code is in it."""
    weights = {}
    try:
        if path.suffix == ".safetensors":
            stored = read_safetensors(path)
        else:                                                          # those from before 2020 are read whole
            stored = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path)).items()
        for name, tensor in stored:
            name = name.removeprefix("transformer.")                   # files come with it and without
            mask = name.endswith((".attn.bias", ".attn.masked_bias"))  # the causal one, in older files
            if tensor.is_floating_point() and not mask:
                if not tensor.isfinite().all():
                    raise ValueError(f"tensor {name!r} has numbers that are not finite")
                # A view turned round: copies in our order cost memory and were no faster.
                weights[name] = (tensor.T if name.endswith(TRANSPOSED) else tensor).to(dtype)
    except Exception as error:                                         # a damaged file can raise anything
        problem = f"cannot be read ({type(error).__name__}: {short(error, 200)})"
        raise ValueError(f"{path} {problem}: delete it and get it again, a clone's with git lfs") from None
    head = weights.get("lm_head.weight")
    if head is not None and torch.equal(head, weights.get("wte.weight", head)):
        del weights["lm_head.weight"]                                  # GPT-2 has one table for both
    return weights


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a safetensors file: views of the mapped file, read from disk when they are used.

    The file is the header's length (8 bytes, little-endian), the header, and the numbers without a gap; the
    header is JSON, {name: {dtype, shape, data_offsets}}. An error of some kind if that does not fit together.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise ValueError(f"a header of {start - 8} bytes in a file of {size}")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    content = torch.from_file(str(path), size=size, dtype=torch.uint8)         # training changes a copy
    position = start                                                   # where the next tensor has to begin
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        if start + begin != position:
            raise ValueError(f"tensor {name!r} begins at {start + begin}, the one before ends at {position}")
        tensor, position = content[start + begin:start + end], start + end
        if (start + begin) % dtype.itemsize:
            tensor = tensor.clone()                                    # gpt2's own begin at an odd byte
        yield name, tensor.view(dtype).view(entry["shape"])            # RuntimeError: not so many numbers
    if position != size:
        raise ValueError(f"{size} bytes, the tensors end at {position}")


def parse_object(text: bytes, where: Path | str) -> dict:
    """A JSON object, or ValueError."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: not readable as a JSON object ({error}): get it again") from None


def short(text: object, length: int = 80) -> str:
    """What an error line quotes of a file: a damaged one may hold a label of a million characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= length else f"{text[:length // 2]}…{text[-(length // 2 - 1):]}"
