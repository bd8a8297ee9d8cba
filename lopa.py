r"""LoPA, Low-rank Prompt Adaptation: a frozen language model, adapted from the outside.

Jain, Chaudhuri, Reps, Jermaine: "Prompt Tuning Strikes Back: Customizing Foundation Models with Low-Rank
Prompt Adaptation", NeurIPS 2024, arXiv 2405.15282. This one file is the whole method; it needs torch alone and
works with every model that accepts embedded text. "The released code" below is the authors' repository
jabhinav/Prompt-Tuning-Strikes-Back-with-LOPA-NLU. Equation numbers are those of tutorial.md.

    symbol          meaning                                         name in code         shape
    B, T            batch size, text length in tokens               B, T
    m               length of the soft prompt, in virtual tokens    num_virtual_tokens
    d               width of the frozen model's embeddings          embed_dim
    h               instance embedding, from a frozen encoder       instance             (B, d_h), d_h = instance_dim
    H               hidden width of the two heads                   hidden_dim
    r               rank                                            rank
    Z_S             task-specific component, one for all inputs     soft_prompt          (m, d)
    U, V            instance-specific factors, one pair per input   U, V                 (B, m, r), (B, d, r)
    Z_I = U V^T     instance-specific component, rank at most r     Z_I                  (B, m, d)
    Z               the soft prompt the model reads                 Z                    (B, m, d)
    X_e             the embedded text                               token_embeds         (B, T, d)
    [Z ; X_e]       what the frozen model reads                     return value         (B, m + T, d)
"""

import math

import torch
from torch import Tensor, nn

__all__ = ["SoftPrompt", "PromptTuning", "LoPA", "METHODS", "get_nb_trainable_parameters"]


# ---------------------------------------------------------------------------------------------------------------
# 1. Prompt tuning: some learned vectors stand before the text, the same ones for every input.


class SoftPrompt(nn.Module):
    """What all methods share: make a soft prompt Z and put it before the embedded text.

    A method is one subclass with one function, `prompt`. The frozen model never becomes part of this module, so
    `parameters()` and `state_dict()` hold what is learned and nothing else.
    """

    def prompt(self, instance: Tensor) -> Tensor:
        """Instance embeddings h (B, d_h) -> soft prompt Z (B, m, d)."""
        raise NotImplementedError

    def forward(self, token_embeds: Tensor, instance: Tensor) -> Tensor:
        """X_e (B, T, d), h (B, d_h) -> [Z ; X_e] (B, m + T, d): the prompt directly before the text."""
        Z = self.prompt(instance).to(token_embeds.dtype)               # (B, m, d); the frozen model may be bfloat16
        return torch.cat([Z, token_embeds], dim=1)                     # Eq. (1): (B, m + T, d)


class PromptTuning(SoftPrompt):
    r"""Z = Z_S for every input: prompt tuning (Lester, Al-Rfou, Constant 2021, arXiv 2104.08691).

    Trainable: N = m d. `instance_dim` and what follows it are accepted and ignored, so that one loop can build
    every method with the same keywords.
    """

    def __init__(self, embed_dim: int, instance_dim: int = 0, num_virtual_tokens: int = 10, rank: int = 4,
                 hidden_dim: int = 256, init_std: float = 1.0):
        super().__init__()
        require_positive(embed_dim=embed_dim, num_virtual_tokens=num_virtual_tokens)
        self.soft_prompt = nn.Parameter(init_std * torch.randn(num_virtual_tokens, embed_dim))   # Z_S: (m, d)

    def prompt(self, instance: Tensor) -> Tensor:
        return self.soft_prompt.expand(len(instance), -1, -1)          # Eq. (2): (m, d) -> (B, m, d), no copy


# ---------------------------------------------------------------------------------------------------------------
# 2. LoPA: the prompt depends on the input, through two thin factors, behind a gate.


class LowRankHead(nn.Module):
    r"""h -> one factor, U or V: reshape(W_2 tanh(W_1 Drop(h) + b_1) + b_2), a small MLP with one hidden layer.

    Shapes: (B, d_h) -> (B, rows, r), with rows = m for U and rows = d for V. Trainable: H (d_h + 1) + rows r (H + 1).

    Weights start as N(0, 1/fan_in). The released code uses N(0, 0.02^2) (utils/model.py @0b7e1ae,
    init_predictor_head) for an encoder 1024 wide, where 1/sqrt(fan_in) is 0.03. On narrow encoders 0.02 would leave U
    and V near 0, where each factor's gradient is proportional to the other one and learning starts late or
    never; following the width is the same rule at 1024 and works at 64. Biases are as released: b_2 = 0, b_1 PyTorch's.
    """

    def __init__(self, instance_dim: int, hidden_dim: int, rows: int, rank: int, dropout: float):
        super().__init__()
        self.rank = rank
        self.dropout = nn.Dropout(dropout)
        self.down_proj = nn.Linear(instance_dim, hidden_dim)           # W_1: (H, d_h)
        self.up_proj = nn.Linear(hidden_dim, rows * rank)              # W_2: (rows r, H)
        nn.init.normal_(self.down_proj.weight, std=1 / math.sqrt(instance_dim))
        nn.init.normal_(self.up_proj.weight, std=1 / math.sqrt(hidden_dim))
        nn.init.zeros_(self.up_proj.bias)

    def forward(self, instance: Tensor) -> Tensor:
        hidden = torch.tanh(self.down_proj(self.dropout(instance)))    # (B, H)
        return self.up_proj(hidden).unflatten(-1, (-1, self.rank))     # Eq. (4): (B, rows r) -> (B, rows, r)


class LoPA(SoftPrompt):
    r"""Z = Z_S o sigmoid(U V^T): one prompt per task, gated elementwise by a rank-r matrix per input.

    Trainable: N = m d + 2 (d_h H + H) + r (m + d)(H + 1). Each further virtual token costs d + r (H + 1).

    fusion: how Z_S and Z_I = U V^T meet. "gate" is LoPA; the others are the released code's ablations, without the
    sigmoid: "add" Z_S + Z_I, "max" elementwise, "concat" [Z_S ; Z_I], which is 2 m tokens long.
    Raises ValueError for sizes below 1 and for an unknown fusion.
    """

    def __init__(self, embed_dim: int, instance_dim: int, num_virtual_tokens: int = 10, rank: int = 4,
                 hidden_dim: int = 256, dropout: float = 0.1, fusion: str = "gate", init_std: float = 1.0):
        super().__init__()
        require_positive(embed_dim=embed_dim, instance_dim=instance_dim, num_virtual_tokens=num_virtual_tokens,
                         rank=rank, hidden_dim=hidden_dim)
        if fusion not in FUSIONS:
            raise ValueError(f"unknown fusion {fusion!r}: choose one of {', '.join(FUSIONS)}")
        self.fusion = fusion
        self.soft_prompt = nn.Parameter(init_std * torch.randn(num_virtual_tokens, embed_dim))   # Z_S: (m, d)
        self.u_head = LowRankHead(instance_dim, hidden_dim, num_virtual_tokens, rank, dropout)
        self.v_head = LowRankHead(instance_dim, hidden_dim, embed_dim, rank, dropout)

    def instance_component(self, instance: Tensor) -> Tensor:
        """h (B, d_h) -> Z_I (B, m, d), of rank at most r for each input."""
        U = self.u_head(instance)                                      # (B, m, r)
        V = self.v_head(instance)                                      # (B, d, r)
        return torch.einsum("bmr,bdr->bmd", U, V)                      # Eq. (5)

    def prompt(self, instance: Tensor) -> Tensor:
        return FUSIONS[self.fusion](self.soft_prompt, self.instance_component(instance))


def gate(Z_S: Tensor, Z_I: Tensor) -> Tensor:
    return Z_S * torch.sigmoid(Z_I)                                    # Eq. (6): (m, d) * (B, m, d) -> (B, m, d)


FUSIONS = {
    "gate": gate,
    "concat": lambda Z_S, Z_I: torch.cat([Z_S.expand_as(Z_I), Z_I], dim=1),    # (B, 2 m, d)
    "add": torch.add,                                                  # (B, m, d)
    "max": torch.maximum,                                              # (B, m, d)
}

METHODS = {"lopa": LoPA, "pt": PromptTuning}


# ---------------------------------------------------------------------------------------------------------------
# Helpers


def get_nb_trainable_parameters(module: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of a module; peft's name and meaning, each parameter counted once."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1")
