"""model.py against a GPT-2 written out in float64, and against what padding and batching must not change."""

import ast
import math
import sys
from pathlib import Path

import pytest
import torch

import model
from model import GPT, GPTConfig, InstanceEncoder, cosine_factor, pretrain


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=31, n_positions=24, n_embd=12, n_layer=3, n_head=2, initializer_range=0.3)
    return GPT(config).double().requires_grad_(False)


def tokens_of(*lengths, pad_to=None):
    """Random rows of these lengths -> right-padded tokens, lengths. The padding, too, is random tokens."""
    width = pad_to or max(lengths)
    return torch.randint(31, (len(lengths), width)), torch.tensor(lengths)


def naive_gpt2(weights, config, tokens):
    """GPT-2 for one row of tokens, by definition: loops over heads and positions, all of it spelled out."""
    def linear(x, name):
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred ** 2).mean(-1, keepdim=True) + config.layer_norm_epsilon)
        return scaled * weights[name + ".weight"] + weights[name + ".bias"]

    T, d, size = len(tokens), config.n_embd, config.n_embd // config.n_head
    x = torch.stack([weights["wte.weight"][t] + weights["wpe.weight"][i] for i, t in enumerate(tokens)])
    for layer in range(config.n_layer):
        name = f"h.{layer}"
        q, k, v = linear(norm(x, name + ".ln_1"), name + ".attn.c_attn").split(d, dim=-1)
        mixed = torch.zeros_like(x)
        for head in range(config.n_head):
            part = slice(head * size, (head + 1) * size)
            for t in range(T):
                scores = torch.stack([q[t, part] @ k[s, part] / math.sqrt(size) for s in range(t + 1)])
                attention = torch.exp(scores) / torch.exp(scores).sum()
                mixed[t, part] = sum(a * v[s, part] for s, a in enumerate(attention))
        x = x + linear(mixed, name + ".attn.c_proj")
        y = linear(norm(x, name + ".ln_2"), name + ".mlp.c_fc")
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y ** 3)))
        x = x + linear(y, name + ".mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].T


def test_model_needs_torch_and_the_standard_library_alone():
    tree = ast.parse(Path(model.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    names = {alias.name for node in imports for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"torch"}


def test_logits_equal_a_gpt2_written_out_from_its_definition(gpt):
    tokens, _ = tokens_of(9, 9)
    for row, logits in zip(tokens, gpt(tokens)):
        assert torch.allclose(logits, naive_gpt2(gpt.state_dict(), gpt.config, row.tolist()), atol=1e-10)


def test_the_three_parts_make_the_whole_and_logits_can_be_taken_anywhere(gpt):
    tokens, _ = tokens_of(7, 7)
    hidden = gpt.hidden(gpt.embed(tokens))
    assert torch.allclose(gpt(tokens)[:, 4], gpt.logits(hidden[:, 4]), atol=1e-12)


@pytest.mark.parametrize("only", [[7, 2], [30], [4, 4, 0]])
def test_logits_of_a_few_tokens_are_theirs_among_all_and_pass_the_same_gradient(gpt, only):
    hidden, only = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True), torch.tensor(only)
    everything, few = gpt.logits(hidden)[..., only], gpt.logits(hidden, only)
    assert few.shape == (2, 5, len(only)) and torch.allclose(few, everything, atol=1e-12)
    direction = torch.randn_like(few)
    gradients = [torch.autograd.grad((x * direction).sum(), hidden)[0] for x in (everything, few)]
    assert torch.allclose(*gradients, atol=1e-12)


def test_the_states_at_one_position_are_those_of_the_whole_forward_pass(gpt):
    tokens, lengths = tokens_of(4, 7, 1, 9, pad_to=12)
    inputs_embeds = gpt.embed(tokens).requires_grad_()
    whole = gpt.hidden(inputs_embeds)[torch.arange(4), lengths - 1]
    alone = gpt.hidden_at(inputs_embeds, lengths - 1)
    assert torch.allclose(alone, whole, atol=1e-12)
    direction = torch.randn(4, 12, dtype=torch.float64)
    gradients = [torch.autograd.grad((x * direction).sum(), inputs_embeds)[0] for x in (whole, alone)]
    assert torch.allclose(*gradients, atol=1e-12)


def test_for_one_position_per_row_the_last_mlp_works_on_that_alone(gpt):
    shapes = []
    for block in gpt.h:
        block.mlp.register_forward_hook(lambda mlp, inputs, output: shapes.append(inputs[0].shape[:-1]))
    gpt.hidden_at(gpt.embed(tokens_of(4, 9)[0]), torch.tensor([3, 8]))
    assert shapes == [(2, 9), (2, 9), (2,)]


def test_the_model_is_causal(gpt):
    tokens, _ = tokens_of(10)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 31
    before, after = gpt(tokens)[0], gpt(changed)[0]
    assert torch.equal(before[:6], after[:6])
    assert not torch.allclose(before[6:], after[6:])


def test_right_padding_does_not_change_what_stands_before_it(gpt):
    tokens, _ = tokens_of(10)
    padded = torch.cat([tokens, torch.randint(31, (1, 5))], dim=1)
    assert torch.allclose(gpt(tokens), gpt(padded)[:, :10], atol=1e-12)


def test_an_input_longer_than_the_context_is_refused_with_both_numbers(gpt):
    with pytest.raises(ValueError, match="25 tokens > context 24"):
        gpt(tokens_of(25)[0])


def test_module_names_are_gpt2s():
    names = set(GPT(GPTConfig(8, 4, 4, 1, 1)).state_dict())
    block = {f"h.0.{part}.{kind}" for kind in ("weight", "bias")
             for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")}
    assert names == block | {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}


def test_gpt2_small_has_its_published_124_million_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(GPTConfig()).parameters()) == 124_439_808


def test_a_fingerprint_tells_models_apart(gpt):
    before = gpt.fingerprint()
    assert before == gpt.fingerprint()
    gpt.wpe.weight[0, 0] += 1e-3
    assert gpt.fingerprint() != before


# --- the instance encoder ----------------------------------------------------------------------------------


def test_the_instance_embedding_is_the_mean_over_real_tokens_half_way_up(gpt):
    tokens, lengths = tokens_of(4, 7, 1)
    h = InstanceEncoder(gpt)(tokens, lengths)
    for i, length in enumerate(lengths.tolist()):
        x = gpt.wte.weight[tokens[i, :length]] + gpt.wpe.weight[:length]
        for block in (gpt.h[0], gpt.h[1]):             # two of three blocks
            x = block(x[None])[0]
        normed = [(row - row.mean()) / torch.sqrt(row.var(unbiased=False) + 1e-5) for row in x]
        assert torch.allclose(h[i], sum(normed) / length, atol=1e-12)


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_the_instance_embedding_can_be_read_after_any_number_of_blocks(gpt, num_blocks):
    tokens, lengths = tokens_of(4, 7, 1)
    h = InstanceEncoder(gpt, num_blocks)(tokens, lengths)
    for i, length in enumerate(lengths.tolist()):
        states = gpt.hidden(gpt.embed(tokens[i:i + 1, :length]), num_blocks=num_blocks)[0]
        normed = [(row - row.mean()) / torch.sqrt(row.var(unbiased=False) + 1e-5) for row in states]
        assert torch.allclose(h[i], sum(normed) / length, atol=1e-12)


def test_after_no_block_the_instance_embedding_is_a_bag_of_words(gpt):
    tokens, lengths = tokens_of(4, 7, 1)
    encoder = InstanceEncoder(gpt, 0)
    h = encoder(tokens, lengths)
    for i, length in enumerate(lengths.tolist()):
        total = [0.0] * 12
        for token in tokens[i, :length].tolist():
            x = gpt.wte.weight[token].tolist()
            mean = sum(x) / 12
            deviation = math.sqrt(sum((value - mean) ** 2 for value in x) / 12 + 1e-5)
            total = [before + (value - mean) / deviation for before, value in zip(total, x)]
        assert h[i].tolist() == pytest.approx([value / length for value in total], abs=1e-12)
    mixed = tokens[1:2, torch.randperm(7)]
    assert not torch.equal(mixed, tokens[1:2])
    assert torch.allclose(encoder(mixed, lengths[1:2])[0], h[1], atol=1e-12)
    ordered = InstanceEncoder(gpt, 1)                                  # after one block it does depend on the order
    assert not torch.allclose(ordered(mixed, lengths[1:2]), ordered(tokens[1:2], lengths[1:2]), atol=1e-3)


@pytest.mark.parametrize("num_blocks", [4, 1000, -1])
def test_more_blocks_than_there_are_are_refused_with_both_numbers(gpt, num_blocks):
    with pytest.raises(ValueError, match=f"the encoder has 3 blocks, h cannot be read after {num_blocks}: name 0 to 3"):
        InstanceEncoder(gpt, num_blocks)


@pytest.mark.parametrize("num_blocks", [None, 0, 3])
def test_padding_and_batching_do_not_change_the_instance_embedding(gpt, num_blocks):
    encoder = InstanceEncoder(gpt, num_blocks)
    tokens, lengths = tokens_of(4, 7, 1, pad_to=15)
    batch = encoder(tokens, lengths)
    for i, length in enumerate(lengths.tolist()):
        alone = encoder(tokens[i:i + 1, :length], lengths[i:i + 1])
        assert torch.allclose(batch[i:i + 1], alone, atol=1e-12)


def test_fitting_standardises_every_feature_over_the_training_split(gpt):
    encoder = InstanceEncoder(gpt)
    tokens, lengths = tokens_of(*range(1, 13))
    fitted = encoder.fit(encoder(tokens, lengths))
    assert torch.allclose(fitted.mean(dim=0), torch.zeros(12, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(fitted.std(dim=0), torch.ones(12, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(encoder(tokens, lengths), fitted, atol=1e-12)


def test_the_encoder_freezes_its_model():
    gpt = GPT(GPTConfig(8, 4, 4, 1, 1))
    InstanceEncoder(gpt)
    assert not gpt.training and not any(p.requires_grad for p in gpt.parameters())


# --- pre-training ------------------------------------------------------------------------------------------

SMALL = GPTConfig(vocab_size=31, n_positions=64, n_embd=12, n_layer=2, n_head=2)
STARTS = torch.arange(0, 2000, 10)                                     # documents of ten tokens


def test_the_learning_rate_rises_through_the_warm_up_and_falls_along_half_a_cosine():
    half = math.sqrt(0.5)                                              # cos 45°, at a quarter of the way
    wanted = {0: 1 / 4, 1: 2 / 4, 2: 3 / 4, 8: (1 + half) / 2, 16: 1 / 2, 24: (1 - half) / 2, 32: 0}
    for step, factor in wanted.items():
        assert cosine_factor(step, 4, 32) == pytest.approx(factor, abs=1e-12)
    assert cosine_factor(0, 0, 32) == 1                                # no warm-up


@pytest.mark.parametrize("learned_below, wanted", [(100.0, 1), (0.0, 3)])
def test_a_pretraining_that_stalls_gets_another_round_three_at_most(monkeypatch, learned_below, wanted):
    rounds = []
    monkeypatch.setitem(model.PRETRAINING, "steps", 2)
    monkeypatch.setitem(model.PRETRAINING, "learned_below", learned_below)
    text = torch.randint(31, (2000,))
    gpt = pretrain(SMALL, text, STARTS, 0, "cpu", progress=lambda steps: rounds.append(steps) or steps)
    assert rounds == [range(2)] * wanted
    assert all(p.grad is None for p in gpt.parameters())


def test_the_first_step_of_pretraining_takes_the_first_rate_of_the_warm_up(monkeypatch):
    """Adam's first step moves a weight by the whole rate, whatever its gradient; the decay comes on top."""
    monkeypatch.setitem(model.PRETRAINING, "steps", 1)
    monkeypatch.setitem(model.PRETRAINING, "max_rounds", 1)
    torch.manual_seed(5)
    before = GPT(SMALL).wpe.weight
    after = pretrain(SMALL, torch.randint(31, (2000,)), STARTS, 5, "cpu").wpe.weight
    rate = 4e-3 / 50
    moved = (after - before * (1 - 0.01 * rate)).abs().max().item()
    assert moved == pytest.approx(rate, rel=1e-3)                      # in float32, with Adam's 1e-8 added


def test_pretraining_reads_windows_from_where_a_document_begins_and_learns_the_next_tokens(monkeypatch):
    for name, value in dict(steps=30, window=4, batch_size=8, warmup_steps=1, lr=1e-2, max_rounds=1).items():
        monkeypatch.setitem(model.PRETRAINING, name, value)
    read = []
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda gpt, tokens: read.append(tokens) or forward(gpt, tokens))
    config = GPTConfig(vocab_size=10, n_positions=8, n_embd=16, n_layer=1, n_head=2, initializer_range=0.1)
    text = torch.arange(10).repeat(200)                                # every document is 0, 1, ... 9
    gpt = pretrain(config, text, STARTS, 0, "cpu")
    assert torch.equal(torch.cat(read), torch.arange(4).expand(30 * 8, 4))
    assert gpt(torch.arange(4)[None])[0].argmax(dim=-1).tolist() == [1, 2, 3, 4]
