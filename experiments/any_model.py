"""train.py on any causal language model of Hugging Face Transformers.

    python -m experiments.any_model FOLDER --task sst2 --data DIR        and any flag of train.py
    python -m experiments.any_model --adapter runs/... --predict "a witty film"
    python -m experiments.any_model compare FOLDER --task sst2 --data DIR    a table of experiments/compare.py

FOLDER holds a model as Transformers saves it, or one .gguf file. What train.py asks of a frozen model are the
methods of AnyModel, what data.py asks of a tokenizer those of Tokenizer: nothing else knows of Transformers.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"       # models come from folders; nothing is looked up
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D

import train
from experiments import compare
from model import GPT, short

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class AnyModel(nn.Module):
    """A causal language model of Transformers behind the interface of model.GPT, for right-padded batches.

    Positions and the causal mask are the model's own: it makes them when only embeddings are passed. Raises
    ValueError for a model whose logits are not its output layer on its last hidden states.
    """

    def __init__(self, language_model: nn.Module):
        super().__init__()
        self.language_model = language_model
        c, table = language_model.config, language_model.get_input_embeddings().weight
        if not hasattr(c, "max_position_embeddings"):
            raise ValueError(f"{type(language_model).__name__} does not say how long its context is: "
                             "give AnyModel.config the rest")
        self.config = SimpleNamespace(vocab_size=len(table), n_embd=table.shape[1],
                                      n_positions=c.max_position_embeddings, n_layer=c.num_hidden_layers)
        language_model.generation_config = GenerationConfig()          # no penalties, nothing sampled
        for parent in list(language_model.modules()):                  # add_lora wraps nn.Linear, and GPT-2's
            for name, child in list(parent.named_children()):          # layers are transposed ones
                if isinstance(child, Conv1D):
                    linear = nn.Linear(*child.weight.shape, device="meta")
                    linear.weight, linear.bias = nn.Parameter(child.weight.T.contiguous()), child.bias
                    setattr(parent, name, linear)
        tokens = torch.arange(8)[None] % self.config.vocab_size
        with torch.no_grad():
            if not torch.allclose(self(tokens), language_model.eval()(tokens).logits, rtol=1e-2, atol=1e-2):
                raise ValueError(f"{type(language_model).__name__} does more to its logits than its output "
                                 "layer: give AnyModel.logits the rest")

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> token embeddings (B, T, d)."""
        return self.language_model.get_input_embeddings()(tokens)

    def hidden(self, inputs_embeds: Tensor, num_blocks: int | None = None) -> Tensor:
        """Embedded input (B, T, d) -> last hidden states (B, T, d), or those after `num_blocks` blocks.

        Transformers gives those after the last block with the final norm, and model.GPT without it. Raises
        ValueError for `num_blocks` of a model that is wider between its blocks than its embeddings.
        """
        output = self.language_model.base_model(inputs_embeds=inputs_embeds, use_cache=False,
                                                output_hidden_states=num_blocks is not None)
        if num_blocks is None:
            return output.last_hidden_state
        if (width := output.hidden_states[num_blocks].shape[-1]) != self.config.n_embd:      # OPT-350M
            raise ValueError(f"the embeddings have {self.config.n_embd} features and the states between the "
                             f"blocks {width}: --encoder-blocks 0 makes h of the embeddings")
        return output.hidden_states[num_blocks]

    def hidden_at(self, inputs_embeds: Tensor, positions: Tensor, rows: Tensor | None = None) -> Tensor:
        """(B, T, d), one position per row (B,), or of rows (n,) -> last hidden states there, (B or n, d)."""
        rows = torch.arange(len(positions)) if rows is None else rows
        return self.hidden(inputs_embeds)[rows, positions]

    def logits(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        """Hidden states (..., d) -> logits (..., vocab_size), or (..., n) of the tokens `only` (n,)."""
        layer = self.language_model.get_output_embeddings()
        rows = slice(None) if only is None else only
        bias = getattr(layer, "bias", None)
        return F.linear(hidden, layer.weight[rows], None if bias is None else bias[rows])

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> logits (B, T, vocab_size)."""
        return self.logits(self.hidden(self.embed(tokens)))

    def generate(self, inputs_embeds: Tensor, max_new_tokens: int, lengths: Tensor, ends: Tensor) -> Tensor:
        """Embedded input (B, T, d), lengths (B,) -> the likeliest next tokens (B, max_new_tokens).

        Like model.GPT's, by Transformers' own, which wants the padding on the left: sliding windows and
        convolutions would count what stands between a text and its answer.
        """
        T = inputs_embeds.shape[1]
        places = torch.arange(T, device=lengths.device) - (T - lengths)[:, None]       # (B, T); 0: the first
        shifted = inputs_embeds.take_along_dim(places.clamp(min=0)[..., None], dim=1)
        tokens = self.language_model.generate(
            inputs_embeds=shifted, attention_mask=(places >= 0).long(), eos_token_id=ends.tolist(),
            pad_token_id=ends[0].item(), max_new_tokens=max_new_tokens, do_sample=False)
        return F.pad(tokens, (0, max_new_tokens - tokens.shape[1]), value=ends[0].item())

    fingerprint = GPT.fingerprint


class Tokenizer:
    """A tokenizer of Transformers with the interface of tiktoken's: no token is added to the text."""

    def __init__(self, tokenizer):
        self.tokenizer, self.n_vocab, self.eot_token = tokenizer, len(tokenizer), tokenizer.eos_token_id
        if self.eot_token is None:
            self.eot_token = self.encode_ordinary("\n")[-1]

    def encode_ordinary(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def load_model(name: str, config: train.Config) -> tuple[AnyModel, Tokenizer]:
    """In place of train.load_model: (frozen model, its tokenizer)."""
    if not Path(name).is_dir():
        raise ValueError(f"{name} is no folder: name, first of all, one that holds a model of Transformers")
    files = [path.name for path in Path(name).glob("*.gguf")][:1]
    here = {"local_files_only": True} | ({"gguf_file": files[0]} if files else {})
    # Eager attention: the fused kernel's backward pass takes twice its time in bfloat16 on a CPU without AMX.
    try:
        language_model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, config.dtype), attn_implementation="eager", output_loading_info=True,
            **here)
        tokenizer = Tokenizer(AutoTokenizer.from_pretrained(name, **here))
    except Exception as error:                                         # each kind of file has its own ones
        raise ValueError(f"{name}: Transformers cannot read a model and its tokenizer there: "
                         f"{short(error, 160)}") from None
    if missing := found["missing_keys"]:                               # which it filled with random numbers
        raise ValueError(f"{name} lacks {len(missing)} of the model's tensors, {short(min(missing))} for "
                         "one: get the files again")
    model = AnyModel(language_model).to(config.device)
    return model.requires_grad_(False).eval(), tokenizer


def main(argv: list[str]) -> None:
    train.load_model, train.COMMAND = load_model, "python -m experiments.any_model"
    program = compare if argv[:1] == ["compare"] else train
    flags = argv[1:] if program is compare else argv
    program.main(["--model", *flags] if flags and not flags[0].startswith("-") else flags)


if __name__ == "__main__":
    main(sys.argv[1:])
