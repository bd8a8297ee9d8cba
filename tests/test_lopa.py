"""lopa.py against closed forms, loops, float64 autograd and the published parameter counts."""

import ast
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

import lopa
from lopa import METHODS, LoPA, PromptTuning, get_nb_trainable_parameters

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
    return LoPA(**SIZES, **{"dropout": 0.0, **options})


# --- the interface ---------------------------------------------------------------------------------------------


def test_lopa_needs_torch_and_the_standard_library_alone():
    tree = ast.parse(Path(lopa.__file__).read_text())
    imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names | {"torch"}


@pytest.mark.parametrize("method", METHODS)
def test_the_prompt_stands_directly_before_the_unchanged_text(method):
    module = METHODS[method](**SIZES).eval()
    text, instance = inputs()
    out = module(text, instance)
    assert out.shape == (B, M + T, D)
    assert torch.equal(out[:, M:], text)
    assert torch.equal(out[:, :M], module.prompt(instance))


@pytest.mark.parametrize("sizes", [dict(rank=0), dict(num_virtual_tokens=-1), dict(hidden_dim=0), dict(embed_dim=0)])
def test_sizes_below_one_are_refused_by_name(sizes):
    name, = sizes
    with pytest.raises(ValueError, match=f"{name} is {sizes[name]}"):
        LoPA(**SIZES | sizes)


def test_an_unknown_fusion_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'sum'.*gate, concat, add, max"):
        lopa_module(fusion="sum")


# --- the formula -----------------------------------------------------------------------------------------------


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


def test_each_fusion_is_its_definition():
    _, instance = inputs()
    for fusion in ("concat", "add", "max"):
        module = lopa_module(fusion=fusion)
        Z_S, Z_I, Z = module.soft_prompt, module.instance_component(instance), module.prompt(instance)
        if fusion == "concat":
            assert torch.equal(Z[:, :M], Z_S.expand(B, M, D)) and torch.equal(Z[:, M:], Z_I)
        if fusion == "add":
            assert torch.equal(Z, Z_S[None] + Z_I)
        if fusion == "max":
            assert torch.equal(Z, torch.where(Z_S > Z_I, Z_S, Z_I))


def test_the_instance_component_has_rank_at_most_r_and_the_prompt_need_not():
    for rank in (1, 2, 3):
        module = LoPA(embed_dim=16, instance_dim=D_H, num_virtual_tokens=10, rank=rank, hidden_dim=H)
        instance = torch.randn(B, D_H)
        assert torch.linalg.matrix_rank(module.eval().instance_component(instance)).tolist() == [rank] * B
        assert torch.linalg.matrix_rank(module.prompt(instance)).tolist() == [10] * B


def test_different_inputs_get_different_prompts_and_the_same_input_the_same():
    module, (_, instance) = lopa_module(), inputs()
    Z = module.prompt(torch.cat([instance, instance[:1]]))
    assert torch.equal(Z[0], Z[B])
    assert all((Z[a] - Z[b]).abs().max() > 1e-3 for a in range(B) for b in range(a))
    Z = PromptTuning(**SIZES).prompt(instance)
    assert torch.equal(Z[0], Z[1])


def test_dropout_acts_on_the_instance_embedding_in_training_mode_only():
    module, (_, instance) = lopa_module(dropout=0.5), inputs()
    assert not torch.equal(module.prompt(instance), module.prompt(instance))
    module.eval()
    assert torch.equal(module.prompt(instance), module.prompt(instance))


def test_heads_start_with_a_deviation_that_follows_their_width():
    module = LoPA(embed_dim=50, instance_dim=400, num_virtual_tokens=50, rank=4, hidden_dim=100)
    for head in (module.u_head, module.v_head):
        assert head.down_proj.weight.std().item() == pytest.approx(1 / 20, rel=0.05)
        assert head.up_proj.weight.std().item() == pytest.approx(1 / 10, rel=0.05)
        assert not head.up_proj.bias.any()


# --- gradients -------------------------------------------------------------------------------------------------


def test_with_the_gate_at_one_lopa_is_prompt_tuning_forward_and_backward():
    module, plain, (text, instance) = lopa_module(), PromptTuning(**SIZES), inputs()
    plain.soft_prompt.data = module.soft_prompt.data.clone()
    for head in (module.u_head, module.v_head):        # U = V = 30 everywhere, so U V^T = 1800 and sigmoid is exactly 1
        torch.nn.init.zeros_(head.up_proj.weight)
        torch.nn.init.constant_(head.up_proj.bias, 30.0)
    G = torch.randn(B, M + T, D)
    for method in (module, plain):
        (method(text, instance) * G).sum().backward()
    assert torch.equal(module(text, instance), plain(text, instance))
    assert torch.equal(module.soft_prompt.grad, plain.soft_prompt.grad)


def test_the_three_gradients_equal_their_closed_forms():
    module, (_, instance) = lopa_module(), inputs()
    factors = []
    for head in (module.u_head, module.v_head):
        head.register_forward_hook(lambda _, __, factor: factor.retain_grad() or factors.append(factor))
    G = torch.randn(B, M, D)                           # dL/dZ for L = sum(G o Z)
    (module.prompt(instance) * G).sum().backward()
    (U, V), Z_S = factors, module.soft_prompt
    with torch.no_grad():
        S = 1 / (1 + torch.exp(-U @ V.transpose(1, 2)))
        inner = G * Z_S * S * (1 - S)                  # dL/dZ_I
        assert torch.allclose(Z_S.grad, (G * S).sum(dim=0), atol=1e-12)
        assert torch.allclose(U.grad, inner @ V, atol=1e-12)
        assert torch.allclose(V.grad, inner.transpose(1, 2) @ U, atol=1e-12)
        assert all((factor.grad[b] != 0).any() for factor in factors for b in range(B))     # every instance teaches


def test_in_prompt_tuning_every_instance_pulls_with_the_same_weight():
    plain, (text, instance) = PromptTuning(**SIZES), inputs()
    G = torch.randn(B, M + T, D)
    (plain(text, instance) * G).sum().backward()
    assert torch.allclose(plain.soft_prompt.grad, G[:, :M].sum(dim=0), atol=1e-12)


@pytest.mark.parametrize("fusion", lopa.FUSIONS)
def test_gradcheck_by_finite_differences(fusion):
    module, (text, instance) = lopa_module(fusion=fusion), inputs()
    names, parameters = zip(*module.named_parameters())
    assert torch.autograd.gradcheck(
        lambda *values: functional_call(module, dict(zip(names, values)), (text, instance)), parameters)


def test_at_zero_factors_neither_factor_can_move():
    module, (_, instance) = lopa_module(), inputs()
    for head in (module.u_head, module.v_head):
        torch.nn.init.zeros_(head.up_proj.weight)
    (module.prompt(instance) * torch.randn(B, M, D)).sum().backward()
    for head in (module.u_head, module.v_head):        # the saddle: dL/dU is proportional to V, and dL/dV to U
        assert not head.up_proj.weight.grad.any() and not head.up_proj.bias.grad.any()
    assert module.soft_prompt.grad.any()


# --- parameter counts ------------------------------------------------------------------------------------------


def test_the_closed_form_count_is_what_the_module_holds_for_random_sizes():
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        d, d_h, m, r, h = (int(torch.randint(1, 40, (), generator=draw)) for _ in range(5))
        module = LoPA(embed_dim=d, instance_dim=d_h, num_virtual_tokens=m, rank=r, hidden_dim=h)
        count = m * d + 2 * (d_h * h + h) + r * (m + d) * (h + 1)
        assert get_nb_trainable_parameters(module) == (count, count)


def test_one_more_virtual_token_costs_what_the_tutorial_says():
    def count(method, m):
        return get_nb_trainable_parameters(method(**SIZES | dict(num_virtual_tokens=m)))[0]
    assert count(LoPA, M + 1) - count(LoPA, M) == D + R * (H + 1)
    assert count(PromptTuning, M + 1) - count(PromptTuning, M) == D


def test_frozen_parameters_count_among_all_and_not_among_trainable():
    module = lopa_module()
    module.u_head.requires_grad_(False)
    total = sum(p.numel() for p in module.parameters())
    assert get_nb_trainable_parameters(module) == (total - (D_H * H + H) - (H * M * R + M * R), total)


LENGTHS = (5, 10, 25, 50, 100)
# Published counts in millions: (d, d_h, H, rank, {m: count}).
# LoPA, plot data in the authors' repositories: GLUE with RoBERTa-large; CruxEval with DeepSeek-Coder-1.3B or Phi-2 and
# CodeSage; CruxEval with DeepSeek-Coder-1.3B and CodeBERT.
LOPA_COUNTS = [
    (1024, 1024, 256, 4, dict(zip(LENGTHS, (1.59, 1.60, 1.63, 1.68, 1.78)))),
    (1024, 1024, 256, 1, {10: 0.80}), (1024, 1024, 256, 2, {10: 1.07}), (1024, 1024, 256, 4, {10: 1.60}),
    (2048, 1024, 1024, 1, {10: 4.23}), (2048, 1024, 1024, 2, {10: 6.34}), (2048, 1024, 1024, 4, {10: 10.56}),
    (2560, 1024, 1024, 1, {10: 4.76}), (2560, 1024, 1024, 2, {10: 7.39}), (2560, 1024, 1024, 4, {10: 12.66}),
    (2048, 768, 768, 1, dict(zip(LENGTHS, (2.77, 2.78, 2.83, 2.90, 3.04)))),
    (2048, 768, 768, 2, dict(zip(LENGTHS, (4.35, 4.37, 4.42, 4.51, 4.69)))),
    (2048, 768, 768, 4, dict(zip(LENGTHS, (7.51, 7.53, 7.61, 7.74, 7.99)))),
]
# Prompt tuning: the same plots; Lester et al. 2021, Fig. 2, T5-XXL (20,480 exactly).
PT_COUNTS = [
    (1024, 1, 1, 1, dict(zip(LENGTHS, (0.01, 0.01, 0.03, 0.05, 0.10)))),
    (2048, 1, 1, 1, dict(zip(LENGTHS, (0.01, 0.02, 0.05, 0.10, 0.20)))),
    (4096, 1, 1, 1, {5: 0.020480}),
]
PUBLISHED = [(method, d, d_h, h, rank, m, millions) for method, rows in (("lopa", LOPA_COUNTS), ("pt", PT_COUNTS))
             for d, d_h, h, rank, counts in rows for m, millions in counts.items()]


@pytest.mark.parametrize("method, d, d_h, h, rank, m, millions", PUBLISHED)
def test_published_counts_are_reproduced(method, d, d_h, h, rank, m, millions):
    with torch.device("meta"):                         # shapes without memory
        module = METHODS[method](embed_dim=d, instance_dim=d_h, num_virtual_tokens=m, rank=rank, hidden_dim=h)
    count = get_nb_trainable_parameters(module)[0]
    digits = 6 if millions == 0.020480 else 2          # exact where an exact number was published
    assert round(count / 1e6, digits) == millions
