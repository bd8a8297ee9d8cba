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


def safetensors_parts(tensors: dict) -> tuple[dict, bytes]:
    """(header, the numbers behind it)"""
    header, numbers = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(numbers), len(numbers) + len(raw)]}
        numbers += raw
    return header, numbers


def safetensors_bytes(header, numbers: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def write_model(folder: Path, tensors: dict, kind: str = "safetensors", **config) -> Path:
    """A folder as transformers leaves it, with some of config.json's values replaced."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if kind == "safetensors":
        (folder / "model.safetensors").write_bytes(safetensors_bytes(*safetensors_parts(tensors)))
    else:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind != "bin of 2019")
    return folder


def refusal(function, *arguments) -> str:
    """The one line of the ValueError that the call has to end in."""
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    assert caught.type is ValueError and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- what the model computes -----------------------------------------------------------------------------------


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
    header, numbers = safetensors_parts(stored())
    text = json.dumps(header)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes((text + " " * (len(text) % 2 == 0)).encode(), numbers))
    for name, tensor in read_safetensors(path):
        assert tensor.data_ptr() % tensor.itemsize == 0
        assert torch.equal(tensor, stored()[name])


# --- generation ------------------------------------------------------------------------------------------------


def test_generation_after_a_soft_prompt_equals_a_full_forward_pass_for_every_token():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(31, 24, 12, 3, 2, initializer_range=0.5)).double().requires_grad_(False)
    embeds = torch.cat([torch.randn(3, 4, 12).double(), gpt.embed(torch.randint(31, (3, 5)))], dim=1)
    new_tokens = gpt.generate(embeds, 15)
    assert new_tokens.unique().numel() > 3                             # or a constant would pass
    for t in range(15):
        full = torch.cat([embeds, gpt.embed(new_tokens[:, :t])], dim=1)
        assert torch.equal(gpt.logits(gpt.hidden(full)[:, -1]).argmax(dim=-1), new_tokens[:, t])


def test_generation_up_to_the_end_of_the_context_works_and_one_token_more_is_refused_with_the_numbers():
    gpt, embeds, past = GPT(GPTConfig(8, 10, 4, 1, 1)), torch.zeros(2, 7, 4), [[]]
    assert gpt.generate(embeds, 4).shape == (2, 4)                     # nobody reads the last one
    assert gpt.generate(embeds, 0).shape == (2, 0)
    assert "11 tokens > context 10" in refusal(gpt.generate, embeds, 5)
    gpt.hidden(embeds, past=past)
    assert "11 tokens > context 10" in refusal(gpt.hidden, torch.zeros(2, 4, 4), None, past)


# --- files that are missing, damaged or of another model --------------------------------------------------------


def test_a_folder_is_named_by_a_string_too_and_one_without_a_file_is_refused(tmp_path):
    assert GPT.from_pretrained(str(FIXTURES / "bare")).config.n_embd == 20
    for file in ("config.json", "model.safetensors"):
        write_model(tmp_path, stored())
        (tmp_path / file).rename(tmp_path / f"another-{file}")         # so are several files, model-00001-of-00002
        message = refusal(GPT.from_pretrained, tmp_path)
        assert all(word in message for word in (str(tmp_path), "config.json", "pytorch_model.bin", "several files (shards)"))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name, tensor, words", [
    ("transformer.h.2.mlp.c_fc.bias", None, 'Missing key(s) in state_dict: "h.2.mlp.c_fc.bias"'),
    ("transformer.h.3.ln_1.weight", torch.ones(20), 'Unexpected key(s) in state_dict: "h.3.ln_1.weight"'),
    ("transformer.wpe.weight", torch.ones(41, 20), "wpe.weight: copying a param with shape torch.Size([41, 20])"),
    ("transformer.h.1.attn.c_attn.weight", torch.ones(60, 20), "the shape in current model is torch.Size([60, 20])"),
    ("transformer.ln_f.bias", torch.ones(20, dtype=torch.bool), 'Missing key(s) in state_dict: "ln_f.bias"'),
    ("lm_head.weight", torch.ones(97, 20), 'Unexpected key(s) in state_dict: "lm_head.weight"'),
])
def test_a_tensor_that_does_not_belong_is_named(tmp_path, kind, name, tensor, words):
    tensors = stored() | {name: tensor}
    if tensor is None:
        del tensors[name]
    message = refusal(GPT.from_pretrained, write_model(tmp_path, tensors, kind))
    assert words in message and str(tmp_path) in message


@pytest.mark.parametrize("name, value, words", [
    *(("n_embd", value, "no size of a GPT-2") for value in (None, 0, -1, True, 4.0, "4", 10**9)),
    ("n_head", 3, "n_head is 3, no size of a GPT-2"),
    *((name, None, f"{name} is None, no size of a GPT-2") for name in ("vocab_size", "n_positions", "n_layer", "n_head")),
    ("model_type", "gpt_neo", "model_type is not 'gpt2'"), ("activation_function", "relu", "is not 'gelu_new'"),
    ("n_inner", 81, "n_inner is not 80"), ("scale_attn_weights", False, "scale_attn_weights is not True"),
    ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is not False"),
])
def test_a_config_of_another_model_or_of_absurd_sizes_is_refused(tmp_path, name, value, words):
    message = refusal(GPT.from_pretrained, write_model(tmp_path, stored(), **{name: value}))
    assert words in message and "config.json" in message


def test_a_config_may_leave_out_what_has_a_default_and_has_to_be_a_json_object(tmp_path):
    path = write_model(tmp_path, stored()) / "config.json"
    sizes = {name: CONFIG[name] for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    path.write_text(json.dumps(sizes | {"n_inner": 80}))               # the usual inner width
    assert GPT.from_pretrained(tmp_path).config.layer_norm_epsilon == 1e-5
    for text in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
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


def test_a_git_lfs_pointer_and_a_name_of_two_lines_are_one_line_that_says_what_to_do(tmp_path):
    odd = {"line\nbreak\u2028": {"dtype": "I8", "shape": [24], "data_offsets": [0, 24]}}
    for content in (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", safetensors_bytes(odd, bytes(24))):
        (write_model(tmp_path, {}) / "model.safetensors").write_bytes(content)
        message = refusal(GPT.from_pretrained, tmp_path)
        assert f"{tmp_path}/model.safetensors cannot be read (" in message and "git lfs" in message


def mutated(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with one random thing wrong, or, rarely, with a change that does not matter."""
    length = int.from_bytes(content[:8], "little")
    text, numbers = content[8:8 + length], content[8 + length:]
    header = json.loads(text)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    numeral = rng.choice([0, -1, 1, 4, 7, len(numbers), len(content), 2**31, 2**63, 10**30, 1.5, True, None, "4", []])
    field = rng.choice(["shape", "data_offsets"])
    kind = rng.randrange(10)
    if kind == 0:
        return content[:rng.randrange(len(content))]
    if kind == 1:
        wrong = rng.choice([0, 1, length - 1, length + 1, len(content), 2**20, 2**31, 2**64 - 1, rng.getrandbits(64)])
        return wrong.to_bytes(8, "little") + text + numbers
    if kind == 2:
        flipped = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            flipped[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 3:
        junk = [b"null", b"NaN", b"\xff\xfe", b"[" * rng.randint(1, 200_000), text[:-5], text * 2,
                b'{"a":' * rng.randint(1, 20_000), text.replace(b"}", b",}"), rng.randbytes(200)]
        return safetensors_bytes(rng.choice(junk), numbers)
    if kind == 4:
        entry[field][rng.randrange(len(entry[field]))] = numeral
    elif kind == 5:
        entry[field] = rng.choice([numeral, [], {}, [numeral] * 2, [0, numeral], [numeral] * 100, entry[field][::-1],
                                   entry[field] + [2], "F32"])
    elif kind == 6:
        entry["dtype"] = rng.choice(["F16", "BF16", "F64", "I64", "BOOL", "U8", "F8_E5M2", "\n", numeral, ["F32"], {}])
    elif kind == 7:
        del entry[rng.choice(["dtype", "shape", "data_offsets"])]
    elif kind == 8:                                                    # a byte too many, or too few
        numbers = rng.choice([numbers + b"\0", numbers[:-1]])
    else:                                                              # a gap, or an overlap
        entry["data_offsets"] = [offset + rng.choice([-4, -1, 1, 4, 80]) for offset in entry["data_offsets"]]
    return safetensors_bytes(header, numbers)


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
