"""A study of experiments.compare in which h is the hidden state of the last token instead of the mean.

    python -m experiments.last_token FOLDER --task sst2 --methods lopa ...
"""

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

import train
from experiments import any_model, compare
from model import InstanceEncoder


class LastToken(InstanceEncoder):
    """h from the last real token's hidden state alone."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tokens (B, T), right-padded, and lengths (B,) -> h (B, d_h)."""
        hidden = self.gpt.embed(tokens)                                # (B, T, d)
        if self.num_blocks:
            hidden = self.gpt.hidden(hidden, num_blocks=self.num_blocks)
        last = hidden[torch.arange(len(tokens)), lengths - 1].float()  # (B, d)
        return (F.layer_norm(last, last.shape[-1:]) - self.mean) / self.std


def main(argv: list[str]) -> None:
    train.load_model, train.InstanceEncoder = any_model.load_model, LastToken
    compare.main(["--model", *argv], kind="last-token")


if __name__ == "__main__":
    main(sys.argv[1:])
