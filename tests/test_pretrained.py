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


def test_a_model_loaded_in_bfloat16_computes_about_the_same_and_has_its_own_fingerprint():
    exact = GPT.from_pretrained(FIXTURES / "bare")
    rounded = GPT.from_pretrained(FIXTURES / "bare", dtype=torch.bfloat16)
    tokens = torch.arange(12)[None]
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in rounded.parameters())
    assert 0 < (exact(tokens) - rounded(tokens)).abs().mean() < 0.05
    assert rounded.fingerprint() == GPT.from_pretrained(FIXTURES / "bare", dtype=torch.bfloat16).fingerprint()
    assert rounded.fingerprint() != exact.fingerprint()


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


def test_tensors_are_views_of_the_mapped_file_in_its_order():
    path = FIXTURES / "bare" / "model.safetensors"
    content = path.read_bytes()
    header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
    addresses = {name: tensor.data_ptr() - header[name]["data_offsets"][0] for name, tensor in read_safetensors(path)}
    assert len(addresses) == 40 and len(set(addresses.values())) == 1


def test_numbers_that_begin_at_an_odd_byte_as_those_of_gpt2_do_are_copied_to_an_even_one(tmp_path):
    header, numbers = safetensors_parts(stored())
    text = json.dumps(header)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes((text + " " * (len(text) % 2 == 0)).encode(), numbers))
    for name, tensor in read_safetensors(path):
        assert tensor.data_ptr() % tensor.itemsize == 0
        assert torch.equal(tensor, stored()[name])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_pages_that_were_only_converted_leave_memory_again(tmp_path):
    def mapped_kilobytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(*safetensors_parts({f"{i}": torch.zeros(2 ** 20) for i in range(16)})))
    before = mapped_kilobytes()
    growth = [mapped_kilobytes() - before for _, tensor in read_safetensors(path) if tensor.half().sum() == 0]
    assert len(growth) == 16 and max(growth) < 3 * 4096                # of 16 tensors of 4,096 kB each


def test_a_bin_file_lets_go_of_every_tensor_once_it_is_converted(monkeypatch):
    tensors = stored()
    monkeypatch.setattr(torch, "load", lambda *_, **__: tensors)
    GPT.from_pretrained(FIXTURES / "prefixed")
    assert not tensors


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


def test_the_key_value_cache_does_not_change_the_hidden_states():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(31, 24, 12, 3, 2, initializer_range=0.5)).double().requires_grad_(False)
    embeds, past = torch.randn(2, 24, 12).double(), [[], [], []]
    steps = [gpt.hidden(embeds[:, :10], past=past)] + [gpt.hidden(embeds[:, t:t + 1], past=past) for t in range(10, 24)]
    assert torch.allclose(torch.cat(steps, dim=1), gpt.hidden(embeds), atol=1e-12)
    assert past[0][0].shape == (2, 2, 24, 6)                           # (B, n_head, T, d / n_head)


def test_generation_up_to_the_end_of_the_context_works_and_one_token_more_is_refused_with_the_numbers():
    gpt = GPT(GPTConfig(8, 10, 4, 1, 1))
    embeds = torch.zeros(2, 7, 4)
    assert gpt.generate(embeds, 3).shape == (2, 3)
    assert gpt.generate(embeds, 0).shape == (2, 0)
    assert "7 input + 4 new tokens > context 10" in refusal(gpt.generate, embeds, 4)


def test_generation_from_an_empty_input_is_refused():
    gpt = GPT(GPTConfig(8, 10, 4, 1, 1))
    for max_new_tokens in (0, 3):
        assert "the input is empty" in refusal(gpt.generate, torch.zeros(2, 0, 4), max_new_tokens)


def test_hidden_refuses_what_a_past_cannot_continue():
    gpt, past = GPT(GPTConfig(8, 10, 4, 1, 1)), [[]]
    gpt.hidden(torch.zeros(1, 9, 4), past=past)
    with pytest.raises(ValueError, match="11 tokens > context 10"):
        gpt.hidden(torch.zeros(1, 2, 4), past=past)
    past = [[]]
    gpt.hidden(torch.zeros(1, 3, 4), past=past)
    with pytest.raises(ValueError, match="2 positions after a past of 3"):
        gpt.hidden(torch.zeros(1, 2, 4), past=past)


# --- where the files come from ---------------------------------------------------------------------------------


def test_a_folder_is_named_by_a_string_too_and_a_missing_one_is_refused(tmp_path):
    assert GPT.from_pretrained(str(FIXTURES / "bare")).config.n_embd == 20
    message = refusal(GPT.from_pretrained, tmp_path / "gpt3")
    assert "gpt3" in message and "config.json" in message and "pytorch_model.bin" in message


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_folder_without_one_of_the_files_is_refused(tmp_path, file):
    write_model(tmp_path, stored())
    (tmp_path / file).unlink()
    assert file in refusal(GPT.from_pretrained, tmp_path)


def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path):
    write_model(tmp_path, stored())
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\n")
    assert "model.safetensors is a git-lfs pointer" in refusal(GPT.from_pretrained, tmp_path)


def test_a_model_in_several_files_is_called_by_its_name(tmp_path):
    write_model(tmp_path, stored())
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    message = refusal(GPT.from_pretrained, tmp_path)
    assert str(tmp_path) in message and "in several files (shards)" in message


@pytest.mark.parametrize("kind, odd", [("meta", torch.empty(20, device="meta")), ("sparse", torch.ones(20).to_sparse())])
def test_tensors_that_hold_no_numbers_in_a_row_are_refused(tmp_path, kind, odd):
    tensors = stored() | {"transformer.ln_f.bias": odd}
    assert "'transformer.ln_f.bias' is [20]" in refusal(GPT.from_pretrained, write_model(tmp_path, tensors, "bin"))


# --- files that do not fit together ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name, tensor, words", [
    ("transformer.h.2.mlp.c_fc.bias", None, "lacks 1 of the 40 tensors that config.json asks for, first 'h.2.mlp.c_fc.bias', [80]"),
    ("transformer.h.3.ln_1.weight", torch.ones(20), "'transformer.h.3.ln_1.weight' is [20]"),
    ("transformer.wpe.weight", torch.ones(41, 20), "is [41, 20] of torch.float32, config.json asks for [40, 20]"),
    ("transformer.h.1.attn.c_attn.weight", torch.ones(60, 20),
     "is [60, 20] of torch.float32, config.json asks for [20, 60]"),
    ("transformer.ln_f.bias", torch.ones(20, dtype=torch.bool), "is [20] of torch.bool, config.json asks for [20]"),
    ("ln_f.bias", torch.ones(20), "'ln_f.bias' is there twice"),
    ("lm_head.weight", torch.ones(97, 20), "lm_head.weight differs from wte.weight"),
    ("lm_head.weight", torch.ones(96, 20), "is [96, 20] of torch.float32, config.json asks for [97, 20]"),
])
def test_a_tensor_that_does_not_belong_is_named_with_both_shapes(tmp_path, kind, name, tensor, words):
    tensors = stored() | {name: tensor}
    if tensor is None:
        del tensors[name]
    message = refusal(GPT.from_pretrained, write_model(tmp_path, tensors, kind))
    assert words in message and str(tmp_path) in message


def test_missing_tensors_are_counted_and_the_first_in_the_models_own_order_is_named(tmp_path):
    tensors = stored(prefix=False, extras=False)
    for name in ("ln_f.bias", "h.2.ln_1.weight", "h.2.attn.c_attn.bias", "h.0.mlp.c_fc.weight", "h.0.ln_2.bias"):
        del tensors[name]
    shuffled = {name: tensors[name] for name in sorted(tensors, reverse=True)}
    message = refusal(GPT.from_pretrained, write_model(tmp_path, shuffled))
    assert "lacks 5 of the 40 tensors that config.json asks for, first 'h.0.ln_2.bias', [20]" in message


@pytest.mark.parametrize("name, value, words", [
    *((name, value, f"{name} is missing or no whole number") for value in (None, 0, -1, True, 4.0, "4", 10**9)
      for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")),
    ("n_head", 3, "n_embd 20 is no multiple of n_head 3"),
    ("layer_norm_epsilon", 0, "layer_norm_epsilon"), ("layer_norm_epsilon", "1e-5", "layer_norm_epsilon"),
    ("layer_norm_epsilon", float("nan"), "layer_norm_epsilon"),
    ("model_type", "gpt_neo", "model_type is not 'gpt2'"), ("activation_function", "relu", "is not 'gelu_new'"),
    ("n_inner", 81, "n_inner is not None or 80"), ("scale_attn_weights", False, "scale_attn_weights is not True"),
    ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is not False"),
])
def test_a_config_of_another_model_or_of_absurd_sizes_is_refused(tmp_path, name, value, words):
    message = refusal(GPT.from_pretrained, write_model(tmp_path, stored(), **{name: value}))
    assert words in message and "config.json" in message


def test_a_config_may_leave_out_what_has_a_default_or_name_the_usual_inner_width(tmp_path):
    write_model(tmp_path, stored())
    sizes = {name: CONFIG[name] for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"n_inner": 80}))
    assert GPT.from_pretrained(tmp_path).config.layer_norm_epsilon == 1e-5


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'{"n_embd": 20, "n_embd": 20}', b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    write_model(tmp_path, stored())
    (tmp_path / "config.json").write_bytes(text)
    assert "config.json" in refusal(GPT.from_pretrained, tmp_path)


class Code:
    def __reduce__(self):
        return print, ("a pickle that runs code",)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"wte.weight": 1}, Code()], ids=["a list", "a number", "code"])
def test_a_bin_file_of_anything_but_tensors_is_refused_and_not_run(tmp_path, capsys, content):
    message = refusal(GPT.from_pretrained, write_model(tmp_path, content, "bin"))
    assert "pytorch_model.bin" in message and not capsys.readouterr().out


def test_a_bin_file_that_is_cut_off_is_refused(tmp_path):
    path = write_model(tmp_path, stored(), "bin") / "pytorch_model.bin"
    for length in (0, 100, 50_000):
        path.write_bytes(path.read_bytes()[:length] if length else b"")
        assert "pytorch_model.bin" in refusal(GPT.from_pretrained, tmp_path)
        write_model(tmp_path, stored(), "bin")


# --- the safetensors reader ------------------------------------------------------------------------------------

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}         # the two tensors of a sound file of 40 bytes
B = {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]}


@pytest.mark.parametrize("content, words", [
    (b"", "0 bytes"), (b"\x02\0\0\0\0\0\0", "7 bytes"),
    (b"\xff" * 8 + b"{}", "its header 18446744073709551615"), (b"\x03\0\0\0\0\0\0\0{}", "its header 3"),
    ((2**20).to_bytes(8, "little") + b"{}" + b" " * 2**20, "its header 1048576"),
    *((safetensors_bytes(text), "JSON") for text in (b"", b'{"a": ', "{}".encode("utf-16"), b"[1, 2]", b"[" * 100_000)),
    (safetensors_bytes(b'{"a": 1, "a": 2}'), "'a' occurs twice"),
    (safetensors_bytes(b'{"a": 1' + b"0" * 5000 + b"}"), "JSON"),      # more digits than Python reads
    *((safetensors_bytes({"a": entry, "b": B}, bytes(40)), "'a' needs dtype") for entry in (
        None, [], "F32", {}, {"dtype": "F32", "shape": [2, 3]}, A | {"dtype": None}, A | {"dtype": ["F32"]},
        A | {"shape": 6}, A | {"shape": [2, "3"]}, A | {"shape": [2.0, 3]}, A | {"shape": [True, 6]},
        A | {"shape": [-2, -3]}, A | {"shape": [0, 3]}, A | {"shape": [10**400, 3]}, A | {"shape": [6] + [1] * 70},
        A | {"data_offsets": {}}, A | {"data_offsets": [0]}, A | {"data_offsets": [0, 24, 24]},
        A | {"data_offsets": [False, 24]}, A | {"data_offsets": [-24, 0]}, A | {"data_offsets": [0.0, 24.0]},
        A | {"data_offsets": [0, 2**63]})),
    *((safetensors_bytes({"a": A | {"dtype": dtype}, "b": B}, bytes(40)), "'a' needs dtype F32, F16, BF16")
      for dtype in ("F64", "I64", "F8_E4M3", "f32", "")),
    *((safetensors_bytes({"a": A | entry, "b": B}, bytes(40)), "'a' at bytes") for entry in (
        {"shape": [2, 2]}, {"shape": [2, 4]}, {"shape": []}, {"dtype": "F16"}, {"dtype": "BOOL"},
        {"data_offsets": [24, 0]}, {"data_offsets": [4, 28]}, {"data_offsets": [0, 20]})),
    (safetensors_bytes({"a": A, "b": B | {"data_offsets": [20, 36]}}, bytes(40)), "'b' at bytes 20 to 36"),   # overlap
    (safetensors_bytes({"a": A, "b": B | {"data_offsets": [28, 44]}}, bytes(44)), "'b' at bytes 28 to 44"),   # gap
    (safetensors_bytes({"a": A, "b": A}, bytes(40)), "'b' at bytes 0 to 24"),
    (safetensors_bytes({"a": A, "b": B}, bytes(39)), "describes"),
    (safetensors_bytes({"a": A, "b": B}, bytes(41)), "describes"),
    (safetensors_bytes({"line\nbreak\u2028": A | {"dtype": "I8"}}, bytes(24)), "'line\\nbreak\\u2028'"),
])
def test_a_damaged_safetensors_file_is_one_line_that_names_file_and_tensor(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    message = refusal(lambda: list(read_safetensors(path)))
    assert words in message and str(path) in message


def test_the_sound_file_that_the_damaged_ones_derive_from_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    numbers = torch.arange(10.0)
    path.write_bytes(safetensors_bytes({"__metadata__": {"format": "pt"}, "b": B, "a": A}, numbers.numpy().tobytes()))
    tensors = dict(read_safetensors(path))
    assert torch.equal(tensors["a"], numbers[:6].view(2, 3)) and torch.equal(tensors["b"], numbers[6:])


def mutated(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with one random thing wrong, or, rarely, with a change that does not matter."""
    length = int.from_bytes(content[:8], "little")
    text, numbers = content[8:8 + length], content[8 + length:]
    header = json.loads(text)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    numeral = rng.choice([0, -1, 1, 4, 7, len(numbers), len(content), 2**31, 2**63, 10**30, 1.5, True, None, "4", []])

    def truncate():
        return content[:rng.randrange(len(content))]

    def replace_length():
        number = rng.choice([0, 1, length - 1, length + 1, len(content), 2**20, 2**31, 2**64 - 1, rng.getrandbits(64)])
        return number.to_bytes(8, "little") + text + numbers

    def flip_header_bytes():
        flipped = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            flipped[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
        return bytes(flipped)

    def replace_header():
        junk = [b"", b"{", b"null", b"[]", b'"x"', b"NaN", b"\xff\xfe", b"[" * rng.randint(1, 200_000), text[:-5],
                text * 2, b'{"a":' * rng.randint(1, 20_000), text.replace(b"}", b",}"), rng.randbytes(200)]
        return safetensors_bytes(rng.choice(junk), numbers)

    def replace_number():
        entry[field][rng.randrange(len(entry[field]))] = numeral
        return safetensors_bytes(header, numbers)

    def replace_value():
        entry[field] = rng.choice([numeral, [], {}, [numeral] * 2, [0, numeral], [numeral] * 100, entry[field][::-1],
                                   entry[field] + [2], "F32"])
        return safetensors_bytes(header, numbers)

    def replace_dtype():
        entry["dtype"] = rng.choice(["F16", "BF16", "F64", "I64", "BOOL", "U8", "F8_E5M2", "\n", numeral, ["F32"], {}])
        return safetensors_bytes(header, numbers)

    def drop_key():
        del entry[rng.choice(["dtype", "shape", "data_offsets"])]
        return safetensors_bytes(header, numbers)

    def overlap():
        entry["data_offsets"] = [offset + rng.choice([-4, -1, 1, 4, 80]) for offset in entry["data_offsets"]]
        return safetensors_bytes(header, numbers)

    def append():
        return content + bytes(rng.randint(1, 100))

    field = rng.choice(["shape", "data_offsets"])
    return rng.choice([truncate, replace_length, flip_header_bytes, replace_header, replace_number, replace_value,
                       replace_dtype, drop_key, overlap, append])()


def load_mutated(rng: random.Random, folder: Path) -> str | None:
    """The refusal of a mutated file; None for one that loads, whose weights then have to be the fixture's."""
    (folder / "model.safetensors").write_bytes(mutated(rng, (FIXTURES / "bare" / "model.safetensors").read_bytes()))
    try:
        gpt = GPT.from_pretrained(folder)
    except ValueError as error:
        assert type(error) is ValueError and len(str(error).splitlines()) == 1
        return str(error)
    assert gpt.fingerprint() == GPT.from_pretrained(FIXTURES / "bare").fingerprint()


def test_300_mutated_files_are_refused_in_one_line_or_give_the_very_same_weights(tmp_path):
    shutil.copy(FIXTURES / "bare" / "config.json", tmp_path)
    rng = random.Random(0)
    refusals = [load_mutated(rng, tmp_path) for _ in range(300)]
    assert sum(message is not None for message in refusals) > 280
