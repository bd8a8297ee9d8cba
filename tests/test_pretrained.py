"""Pre-trained weights: model.py against what transformers computes with them, and against files that are damaged.

tests/fixtures was made with transformers 5.23.0 by tests/fixtures/make.py, which says how to run it again: a GPT-2 of
unusual sizes in two forms (bare/, prefixed/) and its hidden states, logits and greedy tokens (reference.pt).
"""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig, read_safetensors

FIXTURES = Path(__file__).parent / "fixtures"
CONFIG = json.loads((FIXTURES / "prefixed" / "config.json").read_text())
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}


def stored(prefix=True, extras=True) -> dict:
    """The fixture's tensors by name, read by torch, with or without the prefix and what older files hold besides."""
    tensors = torch.load(FIXTURES / "prefixed" / "pytorch_model.bin", weights_only=True)
    return {name if prefix else name.removeprefix("transformer."): tensor for name, tensor in tensors.items()
            if extras or not name.endswith(("lm_head.weight", ".attn.bias", ".attn.masked_bias"))}


def safetensors_bytes(tensors: dict, blanks: int = 0) -> bytes:
    """A file's content: how long the header is, the header, with blanks behind it, and the numbers."""
    header, numbers = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(numbers), len(numbers) + len(raw)]}
        numbers += raw
    text = json.dumps(header).encode() + b" " * blanks
    return len(text).to_bytes(8, "little") + text + numbers


def write_model(folder: Path, tensors: dict, kind: str = "safetensors", **config) -> Path:
    """A folder as transformers leaves it, with some of config.json's values replaced."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if kind == "safetensors":
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    else:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind != "bin of 2019")
    return folder


def refusal(function, *arguments) -> str:
    """The one line of the ValueError that the call has to end in."""
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    assert caught.type is ValueError and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("form", ["bare", "prefixed"])
def test_states_logits_and_greedy_tokens_equal_those_of_transformers(form):
    gpt = GPT.from_pretrained(FIXTURES / form).requires_grad_(False)
    reference = torch.load(FIXTURES / "reference.pt", weights_only=True)
    for case in reference["cases"] + [reference["prompted"]]:
        embeds = gpt.embed(case["tokens"])
        if "prompt" in case:
            embeds = torch.cat([case["prompt"], embeds], dim=1)
        states = torch.stack([gpt.hidden(embeds, num_blocks) for num_blocks in (0, 1, 2, None)])
        assert torch.allclose(states, case["hidden_states"], rtol=0, atol=1e-5)
        assert torch.allclose(gpt.logits(states[-1]), case["logits"], rtol=0, atol=1e-5)
        assert torch.equal(gpt.generate(embeds, 20), case["new_tokens"])


@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin of 2019"])
def test_every_form_of_the_file_gives_the_same_weights(tmp_path, kind, prefix, extras):
    folder = write_model(tmp_path, stored(prefix, extras), kind)
    assert GPT.from_pretrained(folder).fingerprint() == GPT.from_pretrained(FIXTURES / "bare").fingerprint()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_as_the_numbers_they_hold(tmp_path, dtype):
    halves = {name: tensor.to(dtype) for name, tensor in stored(prefix=False, extras=False).items()}
    read = GPT.from_pretrained(write_model(tmp_path, halves)).state_dict()
    for name, tensor in halves.items():
        turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert read[name].dtype == torch.float32
        assert torch.equal(read[name], (tensor.T if turned else tensor).float())


def test_loaded_weights_can_be_trained_and_the_file_keeps_its_own(tmp_path):
    folder = shutil.copytree(FIXTURES / "bare", tmp_path / "bare")     # its numbers are aligned, so they are mapped
    before = (folder / "model.safetensors").read_bytes()
    gpt = GPT.from_pretrained(folder)
    fingerprint, tokens = gpt.fingerprint(), torch.arange(12)[None]
    optimizer = torch.optim.SGD(gpt.parameters(), lr=0.1)
    gpt(tokens).logsumexp(dim=-1).mean().backward()
    assert all(p.grad.abs().max() > 0 for name, p in gpt.named_parameters() if "c_attn.bias" not in name)
    optimizer.step()
    assert gpt.fingerprint() != fingerprint
    assert (folder / "model.safetensors").read_bytes() == before
    assert GPT.from_pretrained(folder).fingerprint() == fingerprint


def test_numbers_that_begin_at_an_odd_byte_as_those_of_gpt2_do_are_copied_to_an_even_one(tmp_path):
    for blanks in range(4):                                            # so at an even one, too
        (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(stored(), blanks))
        for name, tensor in read_safetensors(tmp_path / "model.safetensors"):
            assert tensor.data_ptr() % tensor.itemsize == 0
            assert torch.equal(tensor, stored()[name])


def test_every_row_is_generated_as_alone_with_a_whole_pass_for_each_token_and_up_to_the_first_that_ends_it():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(31, 60, 12, 3, 2, initializer_range=0.5)).double().requires_grad_(False)
    embeds, lengths, alone = torch.randn(6, 20, 12).double(), torch.tensor([20, 7, 7, 1, 7, 11]), []
    for row, length in zip(embeds, lengths):
        read, tokens = row[None, :length], []
        for _ in range(30):
            tokens.append(gpt.logits(gpt.hidden(read)[:, -1]).argmax(dim=-1))
            read = torch.cat([read, gpt.embed(tokens[-1][None])], dim=1)
        alone.append(torch.cat(tokens))
    assert torch.stack(alone).unique().numel() > 3                     # or a constant would pass
    assert torch.equal(gpt.generate(embeds, 30, lengths), torch.stack(alone))
    ends = torch.stack([alone[1][4], alone[2][9]])
    stops = [[*torch.isin(row, ends).nonzero().flatten().tolist(), 29][0] for row in alone]
    assert len({stops[i] for i in (1, 2, 4)}) > 1                      # of one length: one is over while another goes on
    for row, stop, tokens in zip(alone, stops, gpt.generate(embeds, 30, lengths, ends)):
        assert torch.equal(tokens[:stop + 1], row[:stop + 1]) and (tokens[stop + 1:] == ends[0]).all()


def test_generation_up_to_the_end_of_the_context_works_and_one_token_more_is_refused_with_the_numbers():
    gpt, embeds, past = GPT(GPTConfig(8, 10, 4, 1, 1)), torch.zeros(2, 7, 4), [[]]
    assert gpt.generate(embeds, 4).shape == (2, 4)                     # nobody reads the last one
    assert gpt.generate(embeds, 0).shape == (2, 0)
    assert "11 tokens > context 10" in refusal(gpt.generate, embeds, 5)
    gpt.hidden(embeds, past=past)
    assert "11 tokens > context 10" in refusal(gpt.hidden, torch.zeros(2, 4, 4), None, past)


def test_a_folder_is_named_by_a_string_too_and_one_without_a_file_is_refused(tmp_path):
    assert GPT.from_pretrained(str(FIXTURES / "bare")).config.n_embd == 20
    for file in ("config.json", "model.safetensors"):
        write_model(tmp_path, stored())
        (tmp_path / file).rename(tmp_path / f"another-{file}")         # so are several files, model-00001-of-00002
        message = refusal(GPT.from_pretrained, tmp_path)
        assert all(word in message for word in (str(tmp_path), "config.json", "pytorch_model.bin", "several files (shards)"))


@pytest.mark.parametrize("name, tensor, words", [
    ("transformer.h.2.mlp.c_fc.bias", None, 'Missing key(s) in state_dict: "h.2.mlp.c_fc.bias"'),
    ("transformer.h.3.ln_1.weight", torch.ones(20), 'Unexpected key(s) in state_dict: "h.3.ln_1.weight"'),
    ("transformer.wpe.weight", torch.ones(41, 20), "wpe.weight: copying a param with shape torch.Size([41, 20])"),
    ("transformer.ln_f.weight", torch.full((20,), float("nan")), "'ln_f.weight' has numbers that are not finite"),
    ("transformer.ln_f.bias", torch.ones(20, dtype=torch.bool), 'Missing key(s) in state_dict: "ln_f.bias"'),
    ("lm_head.weight", torch.ones(97, 20), 'Unexpected key(s) in state_dict: "lm_head.weight"'),
])
def test_a_tensor_that_does_not_belong_or_is_not_finite_is_named(tmp_path, name, tensor, words):
    tensors = stored() | {name: tensor}
    if tensor is None:
        del tensors[name]
    message = refusal(GPT.from_pretrained, write_model(tmp_path, tensors))
    assert words in message and str(tmp_path) in message


@pytest.mark.parametrize("name, value, words", [
    *(("n_embd", value, "no size of a GPT-2") for value in (None, 0, True, 4.0, "4", 10**9)),
    ("layer_norm_epsilon", None, "layer_norm_epsilon is None, no small number"),
    ("n_head", 3, "n_head is 3, no size of a GPT-2"), ("model_type", "gpt_neo", "model_type is not 'gpt2'"),
    ("n_inner", 81, "n_inner is not 80"), ("scale_attn_weights", False, "scale_attn_weights is not True"),
])
def test_a_config_of_another_model_or_of_absurd_sizes_is_refused(tmp_path, name, value, words):
    message = refusal(GPT.from_pretrained, write_model(tmp_path, stored(), **{name: value}))
    assert words in message and "config.json" in message


def test_a_config_may_leave_out_what_has_a_default_and_has_to_be_a_json_object(tmp_path):
    path = write_model(tmp_path, stored()) / "config.json"
    sizes = {name: CONFIG[name] for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    path.write_text(json.dumps(sizes | {"n_inner": 80}))               # the usual inner width
    assert GPT.from_pretrained(tmp_path).config.layer_norm_epsilon == 1e-5
    for text in (b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(text)
        assert "config.json" in refusal(GPT.from_pretrained, tmp_path)


class Code:
    def __reduce__(self):
        return print, ("a pickle that runs code",)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"wte.weight": 1}, Code(), b"", b"PK\3\4"])
def test_a_bin_file_of_anything_but_tensors_is_refused_and_not_run(tmp_path, capsys, content):
    path = write_model(tmp_path, content, "bin") / "pytorch_model.bin"
    if isinstance(content, bytes):                                     # cut off
        path.write_bytes(content)
    assert "pytorch_model.bin" in refusal(GPT.from_pretrained, tmp_path) and not capsys.readouterr().out


def mutated(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file that is cut off, or has a few bits of its header turned round, which does not always matter."""
    if rng.random() < 0.2:
        return content[:rng.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(8 + int.from_bytes(content[:8], "little"))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_300_mutated_files_are_refused_in_one_line_or_give_the_very_same_weights(tmp_path):
    shutil.copy(FIXTURES / "bare" / "config.json", tmp_path)
    sound, wanted = (FIXTURES / "bare" / "model.safetensors").read_bytes(), GPT.from_pretrained(FIXTURES / "bare").fingerprint()
    rng, num_refused = random.Random(0), 0
    for _ in range(300):
        (tmp_path / "model.safetensors").write_bytes(mutated(rng, sound))
        try:
            assert GPT.from_pretrained(tmp_path).fingerprint() == wanted
        except ValueError as error:
            assert type(error) is ValueError and len(str(error).splitlines()) == 1
            num_refused += 1
    assert num_refused > 270
