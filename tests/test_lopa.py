"""lopa.py against closed forms, loops, finite differences and the published parameter counts."""

import ast
import copy
import inspect
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

import lopa
import model
import train
from data import Encoded
from lopa import METHODS, LoPA, PromptTuning, add_lora, get_nb_trainable_parameters
from model import GPT, GPTConfig, InstanceEncoder

B, T, D, D_H, M, R, H = 3, 5, 7, 6, 4, 2, 8
SIZES = dict(embed_dim=D, instance_dim=D_H, num_virtual_tokens=M, rank=R, hidden_dim=H)


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def inputs():
    return torch.randn(B, T, D), torch.randn(B, D_H)


def lopa_module(**options):
    """Its factors are random: with U = 0, as LoPA starts, most of what follows would check nothing."""
    return LoPA(**SIZES, **{"dropout": 0.0, "head_std": 0.4, **options})


def instance_component(module, instance):
    U, V = module.factors(instance)
    return U @ V.transpose(1, 2)


ALONE = """
import sys
sys.path.insert(0, ".")
import torch
installed = {name.partition(".")[0] for name in sys.modules}
import lopa
import model
assert {name.partition(".")[0] for name in sys.modules} - installed <= sys.stdlib_module_names | {"lopa", "model"}
gru = torch.nn.GRU(8, 5, batch_first=True).requires_grad_(False)
for method in lopa.METHODS.values():
    module = method(embed_dim=8, instance_dim=6, num_virtual_tokens=3, rank=2, hidden_dim=4)
    states, _ = gru(module(torch.randn(2, 7, 8), torch.randn(2, 6)))
    assert states.shape == (2, 10, 5)
    states.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
"""


def test_lopa_and_model_need_torch_alone_and_the_methods_work_beside_any_model_that_takes_embeddings(tmp_path):
    for file in (lopa.__file__, model.__file__):
        shutil.copy(file, tmp_path)
    subprocess.run([sys.executable, "-I", "-c", ALONE], cwd=tmp_path, check=True)


def test_lopa_can_be_copied_with_the_pieces_that_the_docstring_names():
    pieces = "SoftPrompt, Head, LoPA and FUSIONS"
    assert pieces in lopa.__doc__
    wanted = set(re.findall(r"[A-Z]\w+", pieces))
    copied = [node for node in ast.parse(Path(lopa.__file__).read_text()).body
              if isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, "name", None) in wanted
              or isinstance(node, ast.Assign) and node.targets[0].id in wanted]
    namespace = {}
    exec(compile(ast.Module(copied, type_ignores=[]), "copied", "exec"), namespace)
    for fusion in lopa.FUSIONS:
        original, copy, example = lopa_module(fusion=fusion), namespace["LoPA"](**SIZES, dropout=0.0, fusion=fusion), inputs()
        copy.load_state_dict(original.state_dict())
        assert torch.equal(copy(*example), original(*example))


@pytest.mark.parametrize("method", METHODS)
def test_the_prompt_stands_directly_before_the_text_which_starts_unchanged(method):
    module = METHODS[method](**SIZES, max_length=T, dropout=0.0, fusion="gate", init_std=1.0).eval()
    text, instance = inputs()
    out = module(text, instance)
    assert out.shape == (B, M + T, D)
    assert torch.equal(out[:, M:], text)
    assert torch.equal(out[:, :M], module.prompt(instance))


def test_the_keywords_are_those_of_some_method_and_any_other_is_refused_by_name():
    named = {p.name for method in METHODS.values() for p in inspect.signature(method).parameters.values()
             if p.kind is not inspect.Parameter.VAR_KEYWORD}
    assert named == set(lopa.SoftPrompt.KEYWORDS)
    for method in METHODS.values():
        with pytest.raises(TypeError, match="'num_virtual_token': the methods have embed_dim, .*num_virtual_tokens"):
            method(**SIZES, num_virtual_token=3)


@pytest.mark.parametrize("method, options", [
    ("lopa", {}), ("lopa", dict(fusion="add")), ("pt", {}), ("idpg", {}), ("dept", {}), ("adept", {})])
def test_a_prompt_that_starts_from_words_is_their_embeddings_for_every_input(method, options):
    module, words = METHODS[method](**SIZES, **options).eval(), torch.randn(M, D)
    module.start_from(words)
    assert torch.allclose(module.prompt(torch.randn(B, D_H)), words.expand(B, M, D), atol=1e-12)
    assert all(p.requires_grad and p.is_leaf for p in module.parameters())


def test_a_method_or_a_fusion_that_cannot_start_from_words_says_so():
    with_a_start = {name for name, method in METHODS.items() if getattr(method, "start_from", None)}
    assert with_a_start == {"lopa", "pt", "idpg", "dept", "adept"}
    for fusion in ("max", "concat"):
        with pytest.raises(ValueError, match=f"'{fusion}' cannot start as given vectors"):
            lopa_module(fusion=fusion).start_from(torch.randn(M, D))


def test_the_prompt_equals_a_naive_loop_over_every_entry():
    module, (_, instance) = lopa_module(), inputs()
    Z = module.prompt(instance)

    def head(weights, h):       # W_2 tanh(W_1 h + b_1) + b_2, entry by entry
        W_1, b_1, W_2, b_2 = (getattr(getattr(weights, layer), kind).tolist()
                              for layer in ("down_proj", "up_proj") for kind in ("weight", "bias"))
        hidden = [math.tanh(sum(w * x for w, x in zip(row, h)) + b) for row, b in zip(W_1, b_1)]
        return [sum(w * x for w, x in zip(row, hidden)) + b for row, b in zip(W_2, b_2)]

    for b in range(B):
        u, v = (head(weights, instance[b].tolist()) for weights in (module.u_head, module.v_head))
        for i in range(M):
            for j in range(D):
                z_i = sum(u[i * R + k] * v[j * R + k] for k in range(R))
                expected = module.soft_prompt[i, j].item() / (1 + math.exp(-z_i))
                assert Z[b, i, j].item() == pytest.approx(expected, abs=1e-12)


def test_each_fusion_is_its_definition_and_another_is_refused():
    _, instance = inputs()
    definitions = {"concat": lambda Z_S, Z_I: torch.cat([Z_S, Z_I], dim=1), "add": lambda Z_S, Z_I: Z_S + Z_I,
                   "max": lambda Z_S, Z_I: torch.where(Z_S > Z_I, Z_S, Z_I)}
    for fusion, definition in definitions.items():
        module = lopa_module(fusion=fusion)
        Z_S, Z_I = module.soft_prompt.expand(B, M, D), instance_component(module, instance)
        assert torch.equal(module.prompt(instance), definition(Z_S, Z_I))
    with pytest.raises(ValueError, match="'sum'.*gate, concat, add, max"):
        lopa_module(fusion="sum")


def test_heads_start_with_a_deviation_that_follows_their_width_or_with_head_std_as_released():
    sizes = dict(embed_dim=50, instance_dim=400, num_virtual_tokens=50, hidden_dim=100)
    for options, deviations in ((dict(), (1 / 20, 1 / 10)), (dict(head_std=0.02), (0.02, 0.02))):
        module, idpg = LoPA(**sizes, rank=4, **options), METHODS["idpg"](**sizes, **options)
        for head in (module.u_head, module.v_head, idpg.head):
            assert head.down_proj.weight.std().item() == pytest.approx(deviations[0], rel=0.05)
            if options or head is module.v_head:       # the other two are 0 without head_std
                assert head.up_proj.weight.std().item() == pytest.approx(deviations[1], rel=0.05)
                assert not head.up_proj.bias.any()


def test_at_the_start_every_gate_is_exactly_one_half_whatever_the_input():
    module = LoPA(**SIZES, dropout=0.5)
    for instance in (torch.randn(B, D_H), 1000 * torch.randn(B, D_H), torch.zeros(B, D_H)):
        Z = module.prompt(instance)
        assert torch.equal(Z, (0.5 * module.soft_prompt).expand(B, M, D))
    assert not torch.equal(lopa_module(head_std=0.02).prompt(instance + 1), Z)


def test_the_first_step_moves_u_alone_and_the_second_v_as_well():
    module, (_, instance) = LoPA(**SIZES, dropout=0.0), inputs()
    G = torch.randn(B, M, D)
    for step in (1, 2):
        module.zero_grad()
        (module.prompt(instance) * G).sum().backward()
        with torch.no_grad():
            assert module.soft_prompt.grad.any() and module.u_head.up_proj.weight.grad.any()
            of_v = [p.grad.any().item() for p in module.v_head.parameters()]
            assert of_v == [step == 2] * 4             # dL/dV is proportional to U
            for p in module.parameters():
                p -= 0.1 * p.grad
    gates = module.prompt(instance) / module.soft_prompt
    assert all((gates[a] - gates[b]).abs().max() > 1e-3 for a in range(B) for b in range(a))


def test_decomposed_and_bilinear_prompts_are_products_of_two_factors_with_their_own_start():
    for method, spread in (("dpt", (0.5 / 3 ** 0.5, 0.5 / 3 ** 0.5)), ("bpt", (0.02, (2 / (50 + 200)) ** 0.5))):
        module = METHODS[method](embed_dim=200, num_virtual_tokens=100, rank=50)
        assert torch.equal(module.prompt(torch.zeros(1, 1))[0], module.A @ module.B)
        assert torch.linalg.matrix_rank(module.A @ module.B) == 50
        assert (module.A.std().item(), module.B.std().item()) == pytest.approx(spread, rel=0.05)


def test_residual_prompts_add_a_shared_mlp_with_layer_norm_to_each_token():
    module = METHODS["residual"](**SIZES)
    down, _, up, norm = module.mlp
    torch.nn.init.normal_(norm.weight)
    for i, P in enumerate(module.soft_prompt):
        y = up.weight @ (down.weight @ P + down.bias).clamp(min=0) + up.bias
        y = (y - y.mean()) / torch.sqrt(y.var(unbiased=False) + 1e-5) * norm.weight + norm.bias
        assert torch.allclose(module.prompt(torch.zeros(1, 1))[0, i], P + y, atol=1e-12)


def test_idpg_computes_the_whole_prompt_from_the_instance():
    module, (_, instance) = METHODS["idpg"](**SIZES, head_std=0.4).eval(), inputs()
    head = module.head
    flat = torch.tanh(instance @ head.down_proj.weight.T + head.down_proj.bias) @ head.up_proj.weight.T + head.up_proj.bias
    assert torch.allclose(module.prompt(instance), flat.reshape(B, M, D), atol=1e-12)


def test_dept_adds_one_offset_per_position_and_adept_one_per_token():
    text, instance = inputs()
    module = METHODS["dept"](**SIZES, max_length=T + 2)
    torch.nn.init.normal_(module.B)
    offset = 8 / R ** 0.5 * module.A @ module.B        # (n, d)
    assert torch.allclose(module(text, instance)[:, M:], text + offset[:T], atol=1e-12)
    module = METHODS["adept"](**SIZES)
    torch.nn.init.normal_(module.up_proj.weight)
    A, a, B_, b = module.down_proj.weight.T, module.down_proj.bias, module.up_proj.weight.T, module.up_proj.bias
    assert torch.allclose(module(text, instance)[:, M:], text + (text @ A + a).clamp(min=0) @ B_ + b, atol=1e-12)


def small_gpt():
    return GPT(GPTConfig(vocab_size=11, n_positions=8, n_embd=6, n_layer=2, n_head=2, initializer_range=0.3))


def test_lora_starts_as_the_model_itself_and_adds_a_product_of_its_own_to_query_key_and_value():
    gpt, tokens = small_gpt(), torch.randint(11, (2, 5))
    plain, updated = gpt(tokens), copy.deepcopy(gpt)
    add_lora(gpt, rank=2)
    assert torch.allclose(gpt(tokens), plain, atol=1e-12)
    wide = lopa.LoRALinear(torch.nn.Linear(100, 300), rank=8, num_parts=3)             # A is uniform, by its width; B is 0
    assert wide.A.abs().max() <= 0.1 and wide.A.std().item() == pytest.approx(0.1 / 3 ** 0.5, rel=0.05)
    assert wide.B.shape == (3, 100, 8) and not wide.B.any()
    assert {name for name, p in gpt.named_parameters() if p.requires_grad} == {
        f"h.{i}.attn.c_attn.{factor}" for i in (0, 1) for factor in "AB"}
    for block, copied in zip(gpt.h, updated.h):
        A, B_ = block.attn.c_attn.A, torch.nn.init.normal_(block.attn.c_attn.B)
        copied.attn.c_attn.weight.data += 2 * torch.cat([B_[i] @ A[i] for i in range(3)])      # (3 d, d): q, k and v stacked
    assert torch.allclose(gpt(tokens), updated(tokens), atol=1e-12)


def test_lora_wraps_separate_projections_one_matrix_each_and_nothing_else():
    sizes, x = dict(q_proj=6, k_proj=2, v_proj=2, o_proj=6), torch.randn(4, 5, 6)      # as in Llama
    block = torch.nn.ModuleDict({name: torch.nn.Linear(6, size) for name, size in sizes.items()})
    plain = {name: layer.weight.clone() for name, layer in block.items()}
    add_lora(block, rank=2)
    trained = 2 * (6 + 6) + 2 * 2 * (6 + 2)                                            # r (in + out) each
    assert get_nb_trainable_parameters(block) == (trained, trained + 7 * sum(sizes.values()))
    assert type(block["o_proj"]) is torch.nn.Linear
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = block[name]
        torch.nn.init.normal_(layer.B)
        weight = plain[name] + 2 * layer.B[0] @ layer.A[0]
        assert torch.allclose(layer(x), x @ weight.T + layer.linear.bias, atol=1e-12)
    with pytest.raises(ValueError, match="the model has no layer named c_attn, .*q_proj"):
        add_lora(torch.nn.Sequential(torch.nn.Linear(3, 3)), 2)


def test_with_the_gate_at_one_lopa_is_prompt_tuning_forward_and_backward():
    module, plain, (text, instance), G = lopa_module(), PromptTuning(**SIZES), inputs(), torch.randn(B, M + T, D)
    plain.soft_prompt.data = module.soft_prompt.data.clone()
    for head in (module.u_head, module.v_head):        # U = V = 30 everywhere, so U V^T = 1800 and sigmoid is exactly 1
        torch.nn.init.zeros_(head.up_proj.weight)
        torch.nn.init.constant_(head.up_proj.bias, 30.0)
    assert torch.equal(module(text, instance), plain(text, instance))
    for method in (module, plain):
        (method(text, instance) * G).sum().backward()
        assert torch.allclose(method.soft_prompt.grad, G[:, :M].sum(dim=0), atol=1e-12)     # every instance pulls equally


@pytest.mark.parametrize("build", [lambda f=f: lopa_module(fusion=f) for f in lopa.FUSIONS] + [
    lambda m=m: METHODS[m](**SIZES, dropout=0.0) for m in METHODS if m != "lopa"])
def test_gradcheck_by_finite_differences(build):
    module, (text, instance) = build().eval(), inputs()
    with torch.no_grad():
        for p in module.parameters():                  # away from zeros, where ReLU has a kink and LoRA-like B hides A
            p.add_(0.1 * torch.randn_like(p))
    names, parameters = zip(*module.named_parameters())
    assert torch.autograd.gradcheck(
        lambda *values: functional_call(module, dict(zip(names, values)), (text, instance)), parameters)


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_count_is_what_its_docstring_says_for_random_sizes(method):
    formulas = [re.search(r"Trainable: N = (.+?)\.\s", cls.__doc__) for cls in METHODS[method].__mro__ if cls.__doc__]
    times = re.sub(r"(?<=[\w)]) *(?=\()|(?<=[\w)]) +(?=\w)", "*", [found[1] for found in formulas if found][0])
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        m, d, d_h, H, r, n = (int(torch.randint(1, 40, (), generator=draw)) for _ in range(6))
        module = METHODS[method](embed_dim=d, instance_dim=d_h, num_virtual_tokens=m, rank=r, hidden_dim=H, max_length=n)
        count = eval(times, dict(m=m, d=d, d_h=d_h, H=H, r=r, n=n))
        assert get_nb_trainable_parameters(module) == (count, count)


LENGTHS = (5, 10, 25, 50, 100)
ROBERTA = dict(embed_dim=1024, instance_dim=1024, hidden_dim=256)
CODEBERT = dict(embed_dim=2048, instance_dim=768, hidden_dim=768)
DEEPSEEK, PHI2 = (dict(embed_dim=d, instance_dim=1024, hidden_dim=1024) for d in (2048, 2560))


# In millions, to the digits that were published. From the plot data in the LoPA authors' repositories: GLUE with
# RoBERTa-large; CruxEval with DeepSeek-Coder-1.3B (and Phi-2) and the encoders CodeSage and CodeBERT.
PUBLISHED = []
for method, sizes, counts in [
    ("lopa", ROBERTA | dict(rank=4), (1.59, 1.60, 1.63, 1.68, 1.78)),
    ("lopa", CODEBERT | dict(rank=1), (2.77, 2.78, 2.83, 2.90, 3.04)),
    ("lopa", CODEBERT | dict(rank=2), (4.35, 4.37, 4.42, 4.51, 4.69)),
    ("lopa", CODEBERT | dict(rank=4), (7.51, 7.53, 7.61, 7.74, 7.99)),
    ("idpg", ROBERTA, (1.58, 2.89, 6.84, 13.42, 26.58)),
    ("idpg", CODEBERT, (8.47, 16.34, 39.96, 79.34, 158.08)),
    ("pt", ROBERTA, (0.01, 0.01, 0.03, 0.05, 0.10)),
    ("pt", CODEBERT, (0.01, 0.02, 0.05, 0.10, 0.20)),
]:
    PUBLISHED += [(method, sizes | dict(num_virtual_tokens=m), published, 2) for m, published in zip(LENGTHS, counts)]
for sizes, counts in ((ROBERTA, (0.80, 1.07, 1.60)), (DEEPSEEK, (4.23, 6.34, 10.56)), (PHI2, (4.76, 7.39, 12.66))):
    PUBLISHED += [("lopa", sizes | dict(rank=rank), published, 2) for rank, published in zip((1, 2, 4), counts)]
# From the methods' own papers; exact where the paper's rounding has been resolved to an exact number.
PUBLISHED += [
    ("pt", dict(embed_dim=4096, num_virtual_tokens=5), 0.020480, 6),                      # Lester et al. 2021, Fig. 2, T5-XXL
    ("dpt", dict(embed_dim=1024, num_virtual_tokens=100, rank=10), 0.011240, 6),          # DPT, Fig. 1, 11.2K, T5-large
    ("dpt", dict(embed_dim=768, num_virtual_tokens=100, rank=64), 0.055552, 6),           # ULPT's table, 55.6K, T5-base
    ("residual", dict(embed_dim=1024, num_virtual_tokens=100, hidden_dim=400), 0.925072, 6),   # DPT, Fig. 1, 925K; H inferred
    *(("dept", dict(embed_dim=768, num_virtual_tokens=m, rank=r, max_length=256), 0.0768, 6)   # DePT, 76.8K, T5-base
      for m, r in ((20, 60), (40, 45), (60, 30), (80, 15))),
    ("adept", dict(embed_dim=768, num_virtual_tokens=60, rank=19), 0.076051, 6),          # from ADePT's code; no figure was read
    ("bpt", dict(embed_dim=768, num_virtual_tokens=100, rank=75), 0.0651, 6),             # BPT, 6.51e-2 M, ViT-B
]
# LoRA (Hu et al. 2021), of query and value alone: Table 2, RoBERTa-base 0.3M and -large 0.8M; Table 4, GPT-3 4.7M.
LORA_COUNTS = [(768, 12, 8, 294_912, 0.3), (1024, 24, 8, 786_432, 0.8), (12288, 96, 1, 4_718_592, 4.7)]


@pytest.mark.parametrize("method, sizes, published, digits", PUBLISHED)
def test_published_counts_are_reproduced(method, sizes, published, digits):
    with torch.device("meta"):                         # shapes without memory
        module = METHODS[method](**sizes)
    assert round(get_nb_trainable_parameters(module)[0] / 1e6, digits) == published


@pytest.mark.parametrize("d, n_layer, rank, exact, published", LORA_COUNTS)
def test_published_lora_counts_are_reproduced(d, n_layer, rank, exact, published):
    with torch.device("meta"):
        layers = torch.nn.ModuleList(lopa.LoRALinear(torch.nn.Linear(d, 3 * d), rank, 3) for _ in range(n_layer))
    query_and_value = sum(factor[[0, 2]].numel() for layer in layers for factor in (layer.A, layer.B))
    assert query_and_value == exact and round(exact / 1e6, 1) == published
    assert get_nb_trainable_parameters(layers)[0] == 3 * exact // 2        # ours adapts the key as well
    assert len(PUBLISHED) + len(LORA_COUNTS) == 61 + 1     # every published count that was found, and ADePT's code's


class TokenGate(PromptTuning):
    """Z_i = s_i P_i with one number s_i = sigmoid(Head(h)_i) for each virtual token."""

    def __init__(self, embed_dim, instance_dim, num_virtual_tokens=10, hidden_dim=256, dropout=0.1, init_std=1.0, **unused):
        super().__init__(embed_dim, num_virtual_tokens, init_std, **unused)
        self.gate = lopa.Head(instance_dim, hidden_dim, num_virtual_tokens, dropout)

    def prompt(self, instance):
        return torch.sigmoid(self.gate(instance))[..., None] * self.soft_prompt        # (B, m, 1), (m, d) -> (B, m, d)


def test_a_method_is_a_class_and_a_line_in_methods_and_is_counted_and_trained_at_two_rates(monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setitem(METHODS, "token_gate", TokenGate)
    encoder = InstanceEncoder(small_gpt())
    rows = Encoded(torch.randint(11, (40, 4)), torch.full((40,), 4), torch.arange(40) % 2)
    rows.instances = encoder.fit(encoder(rows.tokens, rows.lengths))
    problem = train.Problem(encoder.gpt, encoder, torch.tensor([3, 5]), rows, {"dev": rows})
    config = train.Config("sst2", "token_gate", num_virtual_tokens=M, hidden_dim=H, epochs=1, batch_size=40, quiet=True)
    adapted = train.build(config, problem)
    assert get_nb_trainable_parameters(adapted)[0] == M * 6 + (6 * H + H) + (H + 1) * M
    before = {name: p.detach().clone() for name, p in adapted.trained().items()}
    train.fit(config, adapted, problem)
    for name, p in adapted.trained().items():          # Adam's first step is the rate, whatever the gradient
        rate = config.lr if name == "prompt.soft_prompt" else config.head_lr
        assert (p - before[name]).abs().max().item() == pytest.approx(rate, rel=0.02), name
