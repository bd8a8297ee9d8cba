"""train.py on any causal language model of Hugging Face Transformers.

    python -m experiments.any_model FOLDER --task sst2 --data DIR        and any flag of train.py
    python -m experiments.any_model --adapter runs/... --predict "a witty film"
    python -m experiments.any_model compare FOLDER --task sst2 --data DIR    a table of experiments/compare.py

FOLDER holds a model as Transformers saves it, or one .gguf file; so does that of --encoder, of any family.
What train.py asks of these are the methods of AnyModel, AnyEncoder and Tokenizer.
"""

import hashlib
import os
import re
import string
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"       # models come from folders; nothing is looked up
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D

import train
from experiments import compare
from model import GPT, InstanceEncoder, short

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
        tokens = torch.arange(8, device=table.device)[None] % self.config.vocab_size
        language_model.eval().get_output_embeddings().forward = self.logits    # for its own generate, too
        with torch.no_grad():
            if not torch.allclose(self(tokens), language_model(tokens).logits.float(), rtol=1e-2, atol=1e-2):
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
        wide = torch.promote_types(hidden.dtype, torch.float32)        # bfloat16 rounds differences away
        logits = hidden.to(wide) @ layer.weight[rows].to(wide).T
        return logits if getattr(layer, "bias", None) is None else logits + layer.bias[rows].to(wide)

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


class Tokenizer:
    """A tokenizer of Transformers as tiktoken's are: no token is added to a text, and none in it is special.

    Some put a blank before a text. What they read and write stands behind a line end, which is taken off, so
    that a text in parts is the text. Raises ValueError for a tokenizer from which a text does not come back.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.n_vocab, self.eot_token = tokenizer, len(tokenizer), tokenizer.eos_token_id
        self.start = []                                                # that line end's tokens
        if self.encode_ordinary("a") + self.encode_ordinary(" b") != self.encode_ordinary("a b"):
            self.start = self.encode_ordinary("\n")
        if self.eot_token is None:
            self.eot_token = self.encode_ordinary("\n")[-1]
        for text in ("a b", " a", "    return a\n", "Don't , stop .\n\n"):
            if (back := self.decode(self.encode_ordinary(text))) != text:
                raise ValueError(f"its tokenizer makes {back!r} of {text!r}: it takes one that keeps texts")

    def encode_ordinary(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode("\n" * bool(self.start) + text, add_special_tokens=False,
                                       split_special_tokens=True)
        return tokens[len(self.start):]

    def decode(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode([*self.start, *tokens], clean_up_tokenization_spaces=False)
        return text[bool(self.start):]


class AnyEncoder(InstanceEncoder):
    """h from a model with a tokenizer of its own, BERT-like or causal: the mean of its real tokens' states.

    It reads the text that the model's tokens stand for. The states are those after `num_blocks` blocks, by
    default all of them, and not normalised once more: sentence encoders are trained to be averaged.
    """

    def __init__(self, encoder: nn.Module, own_tokenizer, tokenizer: Tokenizer, num_blocks: int | None):
        c, own = encoder.config, own_tokenizer
        longest = getattr(c, "max_position_embeddings", 1_000_000)     # GPT-2's is n_positions, set below
        c.n_layer, c.n_embd, c.n_positions = c.num_hidden_layers, c.hidden_size, 1_000_000
        super().__init__(encoder, c.n_layer if num_blocks is None else num_blocks)
        own.pad_token, own.padding_side = own.pad_token or own.eos_token, "right"
        self.own_tokenizer, self.tokenizer = own, tokenizer
        self.max_length = min(own.model_max_length, longest)     # more is cut off
        give_fingerprint(encoder, len(own), own(string.printable)["input_ids"])

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The model's tokens (B, T), right-padded, and lengths (B,) -> h (B, d_h)."""
        texts = [self.tokenizer.decode(row[:length].tolist()) for row, length in zip(tokens, lengths)]
        own = self.own_tokenizer(texts, padding=True, truncation=True, max_length=self.max_length,
                                 return_tensors="pt").to(tokens.device)
        hidden = self.gpt(**own, output_hidden_states=True).hidden_states[self.num_blocks].float()
        real = own["attention_mask"][..., None]                        # (B, its own T, 1)
        return ((hidden * real).sum(dim=1) / real.sum(dim=1) - self.mean) / self.std


def read(kind: type, name: str, config: train.Config) -> tuple[nn.Module, Callable]:
    """(model, its tokenizer) of a folder, by Transformers' class `kind`. ValueError: they are not whole."""
    if not Path(name).is_dir():
        raise ValueError(f"{name} is no folder: name, first of all, one that holds a model of Transformers")
    files = [path.name for path in Path(name).glob("*.gguf")]
    if len(files) > 1 or files and list(Path(name).glob("*.safetensors")):
        raise ValueError(f"{name} holds several models, {', '.join(files)}: put one in a folder of its own")
    here = {"local_files_only": True} | ({"gguf_file": files[0]} if files else {})
    # Eager attention: the fused kernel's backward pass takes twice its time in bfloat16 on a CPU without AMX.
    try:
        model, found = kind.from_pretrained(name, dtype=getattr(torch, config.dtype), **here,
                                            attn_implementation="eager", output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name, **here)
    except Exception as error:                                         # each kind of file has its own ones
        raise ValueError(f"{name}: Transformers cannot read a model and its tokenizer there: "
                         f"{short(error, 160)}") from None
    model.pooler = None                  # an encoder's: no part of h, and random where the files have none
    if missing := [key for key in found["missing_keys"] if "pooler." not in key]:      # they are random now
        raise ValueError(f"{name} lacks {len(missing)} of the model's tensors, {short(min(missing))} for "
                         "one: get the files again")
    in_block = r"\.\d+\." if kind is AutoModel else ""                 # it has no output layer
    if more := [key for key in found.get("unexpected_keys", ()) if re.search(in_block, key)]:
        raise ValueError(f"{name} has {len(more)} tensors that config.json does not ask for, "
                         f"{short(min(more))} for one: is it another model's?")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(f"{name}: the model's weights are not finite: get the files again")
    return model.to(config.device), tokenizer


def give_fingerprint(model: nn.Module, n_vocab: int, tokens: list[int]) -> None:
    """Of its weights and its tokenizer: that one's size, and what it makes of every printable sign."""
    digest = hashlib.sha256(str([n_vocab, *tokens]).encode()).hexdigest()[:6]
    model.fingerprint = lambda: f"{GPT.fingerprint(model)}-{digest}"


def load_model(name: str, config: train.Config) -> tuple[AnyModel, Tokenizer]:
    """In place of train.load_model: (frozen model, its tokenizer)."""
    language_model, tokenizer = read(AutoModelForCausalLM, name, config)
    model, tokenizer = AnyModel(language_model), Tokenizer(tokenizer)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(f"{name}: its tokenizer has {tokenizer.n_vocab} tokens, the model "
                         f"{model.config.vocab_size}")
    give_fingerprint(model, tokenizer.n_vocab, tokenizer.encode_ordinary(string.printable))
    return model.requires_grad_(False).eval(), tokenizer


def load_frozen(config: train.Config) -> tuple[AnyModel, InstanceEncoder, Tokenizer]:
    """In place of train.load_frozen: (model, instance encoder, the model's tokenizer)."""
    gpt, tokenizer = load_model(config.model, config)
    if config.encoder == config.model:
        return gpt, InstanceEncoder(gpt, config.encoder_blocks), tokenizer
    encoder = AnyEncoder(*read(AutoModel, config.encoder, config), tokenizer, config.encoder_blocks)
    return gpt, encoder, tokenizer


def main(argv: list[str]) -> None:
    train.load_frozen, train.COMMAND = load_frozen, "python -m experiments.any_model"
    program = compare if argv[:1] == ["compare"] else train
    flags = argv[1:] if program is compare else argv
    if flags and not flags[0].startswith("-") and any(f.split("=")[0] == "--model" for f in flags):
        print(f"any_model: error: {flags[0]} is the model: leave out --model", file=sys.stderr)
        sys.exit(2)
    program.main(["--model", *flags] if flags and not flags[0].startswith("-") else flags)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")                  # a sign that the console lacks
    main(sys.argv[1:])
