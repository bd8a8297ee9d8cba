"""A GPT-2 that can be opened in the middle, and the instance encoder that LoPA reads its input with.

The architecture and the module names are GPT-2's (Radford et al. 2019): pre-norm blocks, tanh-GELU, learned
positions, output layer tied to the input embeddings. A soft prompt is not made of tokens, so it has to enter
after the embedding and before the blocks; that is why the forward pass comes in three parts:

    embed    tokens (B, T)            -> token_embeds (B, T, d)
    hidden   inputs_embeds (B, T, d)  -> last hidden states (B, T, d)
    logits   hidden states (..., d)   -> logits (..., vocab_size), only where they are needed
"""

import hashlib
from dataclasses import dataclass

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
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d); with positions `at` (B,), what attention gives there alone, (B, 1, d)."""
        B, T, d = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)
        # Causal, and padding stands on the right: no real token can see it, so no other mask is needed.
        mask = None
        if at is not None:
            q = q[torch.arange(B), :, at, None]                        # (B, n_head, 1, d / n_head)
            mask = (torch.arange(T, device=x.device) <= at[:, None])[:, None, None]      # (B, 1, 1, T)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=at is None)
        return self.c_proj(x.transpose(1, 2).flatten(2))


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

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d); with positions `at` (B,), the states there alone, (B, 1, d)."""
        attended = self.attn(self.ln_1(x), at)
        if at is not None:
            x = x[torch.arange(len(x)), at, None]                      # (B, 1, d)
        x = x + attended
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
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> token embeddings X_e (B, T, d), without positions: `hidden` adds those."""
        return self.wte(tokens)

    def hidden(self, inputs_embeds: Tensor, num_blocks: int | None = None) -> Tensor:
        """Embedded input (B, T, d) -> last hidden states (B, T, d). A prompt in front shifts the text's positions.

        With `num_blocks`, the raw states after that many blocks. ValueError: longer than the context.
        """
        T = inputs_embeds.shape[1]
        if T > self.config.n_positions:
            raise ValueError(f"input of {T} tokens > context {self.config.n_positions}: "
                             "lower num_virtual_tokens or cut the text")
        x = inputs_embeds + self.wpe.weight[:T]                        # (B, T, d) + (T, d)
        for block in self.h[:num_blocks]:
            x = block(x)
        return self.ln_f(x) if num_blocks is None else x

    def hidden_at(self, inputs_embeds: Tensor, positions: Tensor) -> Tensor:
        """The same as `hidden(...)` at one position per row, (B, T, d), (B,) -> (B, d), for less work.

        The last block's states elsewhere are seen by nobody, so its MLP, its largest part, runs on B tokens, not B T.
        """
        x = self.hidden(inputs_embeds, num_blocks=len(self.h) - 1)     # (B, T, d)
        return self.ln_f(self.h[-1](x, at=positions)[:, 0])

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., d) -> next-token logits (..., vocab_size), through the tied embedding table."""
        return hidden @ self.wte.weight.T

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> logits (B, T, vocab_size), as any language model."""
        return self.logits(self.hidden(self.embed(tokens)))

    def fingerprint(self) -> str:
        """Twelve hex digits that tell this model's weights from any other's; an adapter fits one model only."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()[:12]


class InstanceEncoder(nn.Module):
    """Text -> instance embedding h (B, d_h), from a frozen GPT: what the input looks like to the model half-way up.

    The hidden states after half of the blocks, each layer-normalised, averaged over the real tokens; then every
    feature is standardised with the training split's mean and deviation (`fit`; before it, nothing is changed).
    """

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt.requires_grad_(False).eval()
        self.num_blocks = (gpt.config.n_layer + 1) // 2
        self.register_buffer("mean", torch.zeros(gpt.config.n_embd))
        self.register_buffer("std", torch.ones(gpt.config.n_embd))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tokens (B, T), right-padded, and lengths (B,) -> h (B, d_h)."""
        hidden = self.gpt.hidden(self.gpt.embed(tokens), num_blocks=self.num_blocks)             # (B, T, d)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))   # bfloat16 is too coarse to average in
        hidden = F.layer_norm(hidden, hidden.shape[-1:])               # no token outweighs the others
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]                      # (B, T)
        mean = (hidden * real[..., None]).sum(dim=1) / lengths[:, None]                                    # (B, d)
        return (mean - self.mean) / self.std                           # Eq. (3)

    def fit(self, instances: Tensor) -> Tensor:
        """Training split's embeddings (N, d_h), made before fitting -> the same, standardised from now on."""
        self.mean, self.std = instances.mean(dim=0), instances.std(dim=0).clamp(min=1e-6)
        return (instances - self.mean) / self.std
