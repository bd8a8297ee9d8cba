r"""LoPA, Low-rank Prompt Adaptation, and its relatives: a frozen language model, adapted from the outside.

Jain, Chaudhuri, Reps, Jermaine: "Prompt Tuning Strikes Back: Customizing Foundation Models with Low-Rank
Prompt Adaptation", NeurIPS 2024, arXiv 2405.15282. "The released code" below is
jabhinav/Prompt-Tuning-Strikes-Back-with-LOPA-NLU. Equation numbers are those of tutorial.md.

This one file is the whole method; it needs torch alone and works with every model that takes embedded text.
Sections 1 and 2 are the heart of it, prompt tuning and LoPA; the rest is what LoPA is compared with. To copy
LoPA alone, copy the imports, SoftPrompt, Head, LoPA and FUSIONS.

    symbol         meaning                                        name in code        shape
    B, T           batch size, text length in tokens              B, T
    m              length of the soft prompt, in virtual tokens   num_virtual_tokens
    d              width of the frozen model's embeddings         embed_dim
    h              instance embedding, from a frozen encoder      instance            (B, d_h)
    d_h            width of the instance embedding                instance_dim
    H              hidden width of the heads                      hidden_dim
    r              rank                                           rank
    Z_S            task-specific component, one for all inputs    soft_prompt         (m, d)
    U, V           instance-specific factors, one pair per input  U, V                (B, m, r), (B, d, r)
    Z_I = U V^T    instance-specific component, rank at most r    Z_I                 (B, m, d)
    Z              the soft prompt the model reads                Z                   (B, m, d)
    X_e            the embedded text                              token_embeds        (B, T, d)
    [Z ; X_e]      what the frozen model reads                    return value        (B, m + T, d)
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


# ----------------------------------------------------------------------------------------------------------
# 1. Prompt tuning: some learned vectors stand before the text, the same ones for every input.


class SoftPrompt(nn.Module):
    """What all methods share: make a soft prompt Z and put it before the embedded text.

    A method is a subclass with one function, `prompt`. The frozen model never becomes part of this module,
    so `parameters()` and `state_dict()` hold what is learned and nothing else. One loop can build all
    methods with the same keywords: each takes those it needs, and the rest ends here. Raises TypeError for
    a keyword that no method has: it must be misspelt.
    """

    KEYWORDS = ("embed_dim", "instance_dim", "num_virtual_tokens", "rank", "hidden_dim", "dropout", "fusion",
                "init_std", "head_std", "max_length")

    def __init__(self, **unused):
        super().__init__()
        for name in unused:
            if name not in self.KEYWORDS:
                raise TypeError(f"unknown keyword {name!r}: the methods have {', '.join(self.KEYWORDS)}")

    def prompt(self, instance: Tensor) -> Tensor:
        """Instance embeddings h (B, d_h) -> soft prompt Z (B, m, d)."""
        raise NotImplementedError

    def forward(self, token_embeds: Tensor, instance: Tensor) -> Tensor:
        """X_e (B, T, d), h (B, d_h) -> [Z ; X_e] (B, m + T, d): the prompt directly before the text."""
        Z = self.prompt(instance).to(token_embeds.dtype)     # (B, m, d); the frozen model may be bfloat16
        return torch.cat([Z, token_embeds], dim=1)           # Eq. (1): (B, m + T, d)


class PromptTuning(SoftPrompt):
    """Z = Z_S for every input: prompt tuning (Lester, Al-Rfou, Constant 2021, arXiv 2104.08691).

    Shapes: Z_S (m, d), Z (B, m, d). Trainable: N = m d.
    """

    def __init__(self, embed_dim: int, num_virtual_tokens: int = 10, init_std: float = 1.0, **unused):
        super().__init__(**unused)
        self.soft_prompt = nn.Parameter(init_std * torch.randn(num_virtual_tokens, embed_dim))  # Z_S: (m, d)

    def prompt(self, instance: Tensor) -> Tensor:
        return self.soft_prompt.expand(len(instance), -1, -1)    # Eq. (2): (m, d) -> (B, m, d), no copy

    @torch.no_grad()
    def start_from(self, embeds: Tensor) -> None:
        """Let Z_S start as these vectors (m, d) instead of noise: the embeddings of words, say."""
        self.soft_prompt.copy_(embeds)


# ----------------------------------------------------------------------------------------------------------
# 2. LoPA: what the input contributes is of low rank, and gates what the task has learned. The input is seen
#    through h; Eq. (5), the encoder that computes it, is in model.py.


class Head(nn.Module):
    r"""W_2 tanh(W_1 Drop(h) + b_1) + b_2: (B, d_h) -> (B, out). Trainable: d_h H + H + (H + 1) out.

    Shapes: h (B, d_h), W_1 (H, d_h), b_1 (H,), W_2 (out, H), b_2 (out,).

    Weights start as N(0, 1/fan_in), or with `init_std` as N(0, init_std^2). The released code has 0.02
    (utils/model.py @0b7e1ae, init_predictor_head) for an encoder 1024 wide, where 1/sqrt(fan_in) is 0.03
    in the first layer and 0.06 in the last; following the width works at 64 too. Biases are as released:
    b_2 = 0, b_1 PyTorch's.
    """

    def __init__(self, instance_dim: int, hidden_dim: int, out_features: int, dropout: float,
                 init_std: float | None = None):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.down_proj = nn.Linear(instance_dim, hidden_dim)     # W_1: (H, d_h)
        self.up_proj = nn.Linear(hidden_dim, out_features)       # W_2: (out, H)
        for linear in (self.down_proj, self.up_proj):
            std = 1 / math.sqrt(linear.in_features) if init_std is None else init_std
            nn.init.normal_(linear.weight, std=std)
        nn.init.zeros_(self.up_proj.bias)

    def forward(self, instance: Tensor) -> Tensor:
        hidden = torch.tanh(self.down_proj(self.dropout(instance)))      # (B, d_h) -> (B, H)
        return self.up_proj(hidden)                                      # (B, H) -> (B, out)


class LoPA(SoftPrompt):
    r"""Z = Z_S o sigmoid(U V^T): one prompt per task, gated elementwise by a rank-r matrix per input.

    Shapes: h (B, d_h), Z_S (m, d), U (B, m, r), V (B, d, r), Z (B, m, d).

    Trainable: N = m d + 2 (d_h H + H) + r (m + d)(H + 1). Each further virtual token costs d + r (H + 1),
    against IDPG's d (H + 1).

    The start: U = 0, as one of LoRA's factors, so that Z_I = 0 and every gate is 1/2. A random U and V give
    every input a random gate, noise that training has to undo. With head_std=0.02 both heads start as
    released, and the gate near 1/2.

    fusion: how Z_S and Z_I = U V^T meet. "gate" is LoPA; the others are the released code's ablations,
    without the sigmoid: "add" Z_S + Z_I, "max" elementwise, "concat" [Z_S ; Z_I], which is 2 m tokens long.
    Raises ValueError for an unknown fusion.
    """

    def __init__(self, embed_dim: int, instance_dim: int, num_virtual_tokens: int = 10, rank: int = 4,
                 hidden_dim: int = 256, dropout: float = 0.1, fusion: str = "gate", init_std: float = 1.0,
                 head_std: float | None = None, **unused):
        super().__init__(**unused)
        if fusion not in FUSIONS:
            raise ValueError(f"unknown fusion {fusion!r}: choose one of {', '.join(FUSIONS)}")
        self.rank, self.fusion = rank, fusion
        self.soft_prompt = nn.Parameter(init_std * torch.randn(num_virtual_tokens, embed_dim))  # Z_S: (m, d)
        self.u_head = Head(instance_dim, hidden_dim, num_virtual_tokens * rank, dropout, head_std)
        self.v_head = Head(instance_dim, hidden_dim, embed_dim * rank, dropout, head_std)
        if head_std is None:
            nn.init.zeros_(self.u_head.up_proj.weight)

    def factors(self, instance: Tensor) -> tuple[Tensor, Tensor]:
        """h (B, d_h) -> U (B, m, r), V (B, d, r)."""
        U = self.u_head(instance).unflatten(-1, (-1, self.rank))     # Eq. (7): (B, m r) -> (B, m, r)
        V = self.v_head(instance).unflatten(-1, (-1, self.rank))     # Eq. (7): (B, d r) -> (B, d, r)
        return U, V

    def prompt(self, instance: Tensor) -> Tensor:
        U, V = self.factors(instance)
        Z_I = torch.einsum("bmr,bdr->bmd", U, V)             # Eq. (8): (B, m, r), (B, d, r) -> (B, m, d)
        if self.fusion == "gate":
            return self.soft_prompt * torch.sigmoid(Z_I)     # Eq. (9): (m, d) * (B, m, d) -> (B, m, d)
        Z_S = self.soft_prompt.expand_as(Z_I)                # (m, d) -> (B, m, d), no copy
        if self.fusion == "concat":
            return torch.cat([Z_S, Z_I], dim=1)              # (B, 2 m, d)
        return Z_S + Z_I if self.fusion == "add" else torch.maximum(Z_S, Z_I)    # (B, m, d)

    @torch.no_grad()
    def start_from(self, embeds: Tensor) -> None:
        """Let Z start as these vectors (m, d): Z_S as twice them, behind gates of 1/2 (if U = 0)."""
        if self.fusion not in ("gate", "add"):
            raise ValueError(f"a prompt of fusion {self.fusion!r} cannot start as given vectors")
        self.soft_prompt.copy_(2 * embeds if self.fusion == "gate" else embeds)


# ----------------------------------------------------------------------------------------------------------
# 3. Relatives: three whose prompt is the same for every input (DPT, BPT, residual), one that computes all of
#    it from the input (IDPG), and two that also move the embedded text, by a low-rank offset (DePT, ADePT).


class DecomposedPromptTuning(SoftPrompt):
    """Z = A B: DPT (Xiao et al. 2023; code XYaoooo/DPT), where r is called b.

    Shapes: A (m, r), B (r, d), Z (B, m, d), the same for every input. Trainable: N = r (m + d).
    """

    def __init__(self, embed_dim: int, num_virtual_tokens: int = 10, rank: int = 4, **unused):
        super().__init__(**unused)
        self.A = nn.Parameter(torch.empty(num_virtual_tokens, rank).uniform_(-0.5, 0.5))     # (m, r)
        self.B = nn.Parameter(torch.empty(rank, embed_dim).uniform_(-0.5, 0.5))              # (r, d)

    def prompt(self, instance: Tensor) -> Tensor:
        return (self.A @ self.B).expand(len(instance), -1, -1)   # Eq. (3): (m, r)(r, d) -> (B, m, d)


class BilinearPromptTuning(DecomposedPromptTuning):
    """DPT's product with another start: BPT (arXiv 2506.22908). A (m, r), B (r, d), Z (B, m, d)."""

    def __init__(self, embed_dim: int, num_virtual_tokens: int = 10, rank: int = 4, **unused):
        super().__init__(embed_dim, num_virtual_tokens, rank, **unused)
        nn.init.normal_(self.A, std=0.02)
        nn.init.xavier_uniform_(self.B)


class ResidualPromptTuning(PromptTuning):
    """Z_i = P_i + LN(W_up ReLU(W_down P_i + b) + b'): one MLP for all i. At first it adds a deviation of 1.

    Razdaibiedina et al. 2023, arXiv 2305.03937.
    Shapes: P (m, d), W_down (H, d), b (H,), W_up (d, H), b' (d,), Z (B, m, d), the same for every input.
    Trainable: N = m d + 2 d H + H + 3 d.
    """

    def __init__(self, embed_dim: int, num_virtual_tokens: int = 10, hidden_dim: int = 256,
                 init_std: float = 1.0, **unused):
        super().__init__(embed_dim, num_virtual_tokens, init_std, **unused)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, hidden_dim), nn.ReLU(),    # W_down, b
                                 nn.Linear(hidden_dim, embed_dim),               # W_up, b'
                                 nn.LayerNorm(embed_dim))

    def prompt(self, instance: Tensor) -> Tensor:
        Z = self.soft_prompt + self.mlp(self.soft_prompt)    # Eq. (4): (m, d)
        return Z.expand(len(instance), -1, -1)               # (B, m, d)

    start_from = None                                        # what the MLP adds is larger than words


class IDPG(SoftPrompt):
    """Z = reshape(Head(h)): one head writes all of it (Wu et al. 2022, arXiv 2204.04497); b_2 is its Z_S.

    Shapes: h (B, d_h), Head(h) (B, m d), Z (B, m, d). Trainable: N = (d_h H + H) + (H + 1) m d.
    tanh as in LoPA's released re-implementation; IDPG's own code has GELU. It starts as LoPA does, with the
    same prompt for every input: W_2 = 0 and b_2 ~ N(0, init_std^2); with head_std=0.02 as released.
    """

    def __init__(self, embed_dim: int, instance_dim: int, num_virtual_tokens: int = 10,
                 hidden_dim: int = 256, dropout: float = 0.1, init_std: float = 1.0,
                 head_std: float | None = None, **unused):
        super().__init__(**unused)
        self.embed_dim = embed_dim
        self.head = Head(instance_dim, hidden_dim, num_virtual_tokens * embed_dim, dropout, head_std)
        if head_std is None:
            nn.init.zeros_(self.head.up_proj.weight)
            nn.init.normal_(self.head.up_proj.bias, std=init_std)

    def prompt(self, instance: Tensor) -> Tensor:
        return self.head(instance).unflatten(-1, (-1, self.embed_dim))   # Eq. (6): (B, m d) -> (B, m, d)

    @torch.no_grad()
    def start_from(self, embeds: Tensor) -> None:
        """Let Z start as these vectors (m, d) for every input."""
        self.head.up_proj.bias.copy_(embeds.flatten())


class DePT(PromptTuning):
    """[P ; X_e + s A B]: a short prompt, and one offset per position (Shi, Lipani 2024, arXiv 2309.05173).

    Shapes: P (m, d), X_e (B, T, d), A (n, r) with n = max_length, of which the first T rows are used,
    B (r, d) = 0 at the start; s = alpha / sqrt(r), alpha = 8. Trainable: N = m d + (n + d) r.
    """

    def __init__(self, embed_dim: int, num_virtual_tokens: int = 10, rank: int = 4, max_length: int = 128,
                 init_std: float = 1.0, **unused):
        super().__init__(embed_dim, num_virtual_tokens, init_std, **unused)
        self.scale = 8 / math.sqrt(rank)
        self.A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(max_length, rank), a=math.sqrt(5)))
        self.B = nn.Parameter(torch.zeros(rank, embed_dim))

    def forward(self, token_embeds: Tensor, instance: Tensor) -> Tensor:
        T = token_embeds.shape[1]
        offset = self.scale * (self.A[:T] @ self.B)          # Eq. (10): (T, r)(r, d) -> (T, d)
        return super().forward(token_embeds + offset.to(token_embeds.dtype), instance)


class ADePT(PromptTuning):
    """[P ; X_e + ReLU(X_e A + a) B + b]: the offset follows the token, not its position (Tang et al. 2025).

    Shapes: P (m, d), X_e (B, T, d), A (d, r), a (r,), B (r, d), b (d,); a, B and b are 0 at the start.
    Trainable: N = m d + 2 d r + r + d.
    """

    def __init__(self, embed_dim: int, num_virtual_tokens: int = 10, rank: int = 4, init_std: float = 1.0,
                 **unused):
        super().__init__(embed_dim, num_virtual_tokens, init_std, **unused)
        self.down_proj = nn.Linear(embed_dim, rank)          # A, a
        self.up_proj = nn.Linear(rank, embed_dim)            # B, b
        for zero in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(zero)

    def forward(self, token_embeds: Tensor, instance: Tensor) -> Tensor:
        X_e = token_embeds.to(self.down_proj.weight.dtype)   # the frozen model may be bfloat16
        offset = self.up_proj(F.relu(self.down_proj(X_e)))   # Eq. (11): (B, T, d)
        return super().forward(token_embeds + offset.to(token_embeds.dtype), instance)


# ----------------------------------------------------------------------------------------------------------
# 4. The yardstick that lives in the model: LoRA. (Full fine-tuning needs no code: it trains every weight.)


class LoRALinear(nn.Module):
    """W_0 x + (alpha / r) B A x around a frozen linear layer (Hu et al. 2021, arXiv 2106.09685).

    GPT-2's c_attn computes query, key and value at once: its W_0 (3 d, d) is num_parts = 3 matrices (d, d),
    one below the other. Each part has an A (r, in) and a B (out / num_parts, r) of its own, B = 0 at the
    start; for c_attn 2 d r trainable numbers a part. alpha = 2 r. Parts that are not square count as one.
    Shapes: x (..., in) -> (..., out).
    """

    def __init__(self, linear: nn.Linear, rank: int, num_parts: int = 1):
        super().__init__()
        d_in, d_out = linear.in_features, linear.out_features
        p = num_parts if d_out == num_parts * d_in else 1        # StarCoder: one key for all heads
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(p, rank, d_in).uniform_(-1, 1) / math.sqrt(d_in))  # (p, r, in)
        self.B = nn.Parameter(torch.zeros(p, d_out // p, rank))                              # (p, out/p, r)

    def forward(self, x: Tensor) -> Tensor:
        low = torch.einsum("pri,...i->...pr", self.A.to(x.dtype), x)         # (..., in) -> (..., p, r)
        update = 2 * torch.einsum("por,...pr->...po", self.B.to(x.dtype), low)       # Eq. (12)
        return self.linear(x) + update.flatten(-2)                           # (..., out)


# What computes queries, keys and values, and of how many matrices it is: GPT-2's one layer for all three;
# GPT-NeoX's, which mixes them head by head and so counts as one matrix; Llama's, Qwen2's and OPT's.
TARGET_MODULES = {"c_attn": 3, "query_key_value": 1, "q_proj": 1, "k_proj": 1, "v_proj": 1}


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """Freeze `model` and wrap its TARGET_MODULES, in place; returns the model. ValueError: it has none."""
    model.requires_grad_(False)
    found = [(parent, name) for parent in model.modules() for name, _ in parent.named_children()
             if name in TARGET_MODULES]
    if not found:
        raise ValueError(f"the model has no layer named {', '.join(TARGET_MODULES)}: add its attention's "
                         "projections to TARGET_MODULES")
    for parent, name in found:
        setattr(parent, name, LoRALinear(getattr(parent, name), rank, TARGET_MODULES[name]))
    return model


# ----------------------------------------------------------------------------------------------------------
# 5. A frozen model with one of them on it: from text to the scores of the label words


class Adapted(nn.Module):
    """A frozen GPT with one method on it. What requires a gradient is what is trained, saved and counted.

    config has train.py's fields; its `method` is a key of METHODS, or "lora" or "full". Without one the model
    is bare, zero-shot. gpt has config, embed, hidden_at, logits and generate, as model.GPT; encoder makes h.
    LoRA, full fine-tuning and a tuned encoder work on copies, the latter two in float32: `gpt` and `encoder`
    never change. label_ids: (labels,), tokens; of a task with answers those that end one.
    """

    def __init__(self, config, gpt: nn.Module, encoder: nn.Module, label_ids: Tensor):
        super().__init__()
        self.gpt, self.label_ids, self.prompt, self.encoder = gpt, label_ids, None, None
        if config is None:
            return
        if config.method == "lora":
            shared = {id(p): p for p in gpt.parameters()}              # a copy of all but the frozen weights
            self.gpt = add_lora(copy.deepcopy(gpt, shared), config.rank)
        elif config.method == "full":
            self.gpt = copy.deepcopy(gpt).float().requires_grad_(True)
        else:
            every_token = torch.arange(gpt.config.vocab_size, device=label_ids.device)
            init_std = config.init_std or gpt.embed(every_token).float().std().item()
            self.prompt = METHODS[config.method](
                embed_dim=gpt.config.n_embd, instance_dim=len(encoder.mean),
                num_virtual_tokens=config.num_virtual_tokens, rank=config.rank, hidden_dim=config.hidden_dim,
                dropout=config.dropout, fusion=config.fusion, init_std=init_std,
                head_std=config.head_std, max_length=gpt.config.n_positions)
        if config.tune_encoder:
            self.encoder = copy.deepcopy(encoder).float().requires_grad_(True)
            one = torch.ones(1, 1, dtype=torch.long, device=label_ids.device)
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
            return self.gpt.logits(last, self.label_ids)               # (B, labels)
        rows, i = (answers >= 0).nonzero(as_tuple=True)                # (n,): token i of a row's answer
        inputs_embeds = F.pad(inputs_embeds, (0, 0, 0, int(i.max()) + 1))
        inputs_embeds[rows, lengths[rows] + i] = self.gpt.embed(answers[rows, i])
        return self.gpt.logits(self.gpt.hidden_at(inputs_embeds, lengths[rows] + i - 1, rows))

    def read(self, tokens: Tensor, lengths: Tensor, instance: Tensor) -> tuple[Tensor, Tensor]:
        """What the frozen model reads, (B, m + T, d), and how much of it is prompt and text, (B,)."""
        if self.encoder is not None:
            instance = self.encoder(tokens, lengths)
        inputs_embeds = self.gpt.embed(tokens)                         # (B, T, d)
        if self.prompt is not None:
            inputs_embeds = self.prompt(inputs_embeds, instance)       # (B, m + T, d)
        return inputs_embeds, lengths + inputs_embeds.shape[1] - tokens.shape[1]

    def train(self, mode: bool = True) -> "Adapted":
        """The models stay in eval mode: what is trained in one of them trains without its dropout, too."""
        super().train(mode)
        self.gpt.eval()
        if self.encoder is not None:
            self.encoder.eval()
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def parameter_groups(self, lr: float, head_lr: float, encoder_lr: float) -> list[dict]:
        """What is trained, by its peak learning rate: heads and a tuned encoder have one of their own."""
        heads = {id(p) for part in self.modules() if isinstance(part, Head) for p in part.parameters()}
        if isinstance(self.prompt, IDPG):
            heads.remove(id(self.prompt.head.up_proj.bias))            # it is what Z_S is to LoPA
        groups: dict[float, list] = {}
        for name, p in self.trained().items():
            rate = head_lr if id(p) in heads else encoder_lr if name.startswith("encoder.") else lr
            groups.setdefault(rate, []).append(p)
        return [dict(params=params, peak_lr=rate) for rate, params in groups.items()]


# ----------------------------------------------------------------------------------------------------------
# What can be chosen by name, and helpers


METHODS = {"lopa": LoPA, "pt": PromptTuning, "dpt": DecomposedPromptTuning, "bpt": BilinearPromptTuning,
           "residual": ResidualPromptTuning, "idpg": IDPG, "dept": DePT, "adept": ADePT}
FUSIONS = ("gate", "concat", "add", "max")


def get_nb_trainable_parameters(module: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of a module; peft's name and meaning, each parameter counted once."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
