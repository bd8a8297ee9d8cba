"""Two things that train.py has no flag for, tried on a real model with the flags of experiments.compare:

    python -m experiments.tried words FOLDER --task sst2 ...         prompt tuning that starts from a question
    python -m experiments.tried last-token FOLDER --task sst2 ...    LoPA, h read at the last token alone

It is a comparison of one method; --methods takes others that have a start, or heads, of their own.
"""

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

import train
from experiments import any_model, compare
from model import InstanceEncoder

QUESTION = " Is this review of a film positive or negative ?"     # ten tokens of SmolLM2's


class LastToken(InstanceEncoder):
    """h from the last real token's hidden state instead of the mean over all of them."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tokens (B, T), right-padded, and lengths (B,) -> h (B, d_h)."""
        hidden = self.gpt.embed(tokens)                                # (B, T, d)
        if self.num_blocks:
            hidden = self.gpt.hidden(hidden, num_blocks=self.num_blocks)
        last = hidden[torch.arange(len(tokens)), lengths - 1].float()  # (B, d)
        return (F.layer_norm(last, last.shape[-1:]) - self.mean) / self.std


@torch.no_grad()
def from_words(config: train.Config, problem: train.Problem) -> train.Adapted:
    """train.build, but the prompt starts as the question's embeddings, over and over, instead of as noise."""
    model = build(config, problem)
    if not hasattr(model.prompt, "soft_prompt"):
        raise ValueError(f"{config.method} has no soft prompt that could start from words: try pt or lopa")
    tokens = problem.tokenizer.encode_ordinary(QUESTION)
    rows = torch.tensor([tokens[i % len(tokens)] for i in range(config.num_virtual_tokens)])     # (m,)
    gate = 0.5 if config.method == "lopa" else 1.0                     # as it starts
    model.prompt.soft_prompt.copy_(model.gpt.embed(rows.to(config.device)).float() / gate)
    return model


build = train.build                      # main puts from_words in its place


def main(argv: list[str]) -> None:
    what, *flags = argv or [""]
    if what == "words":
        train.build, method = from_words, "pt"
    elif what == "last-token":
        train.InstanceEncoder, method = LastToken, "lopa"
    else:
        print("tried: error: name what to try, words or last-token, then the model's folder", file=sys.stderr)
        sys.exit(2)
    train.load_model = any_model.load_model
    compare.main(["--methods", method, "--model", *flags], kind=what)


if __name__ == "__main__":
    main(sys.argv[1:])
