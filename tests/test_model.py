"""model.py against a GPT-2 written out in float64, and against what padding and batching must not change."""

import math

import pytest
import torch

import model
from data import Encoded
from lopa import METHODS, get_nb_trainable_parameters
from model import GPT, GPTConfig, InstanceEncoder, cosine_factor, pretrain
from train import Adapted, Config, loss_of


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


def test_logits_equal_a_gpt2_written_out_from_its_definition(gpt):
    tokens, _ = tokens_of(9, 9)
    for row, logits in zip(tokens, gpt(tokens)):
        assert torch.allclose(logits, naive_gpt2(gpt.state_dict(), gpt.config, row.tolist()), atol=1e-10)


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


def test_the_model_is_causal_so_padding_on_the_right_changes_nothing(gpt):
    tokens, _ = tokens_of(10)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 31
    before, after = gpt(tokens)[0], gpt(changed)[0]
    assert torch.equal(before[:6], after[:6])
    assert not torch.allclose(before[6:], after[6:])
    padded = torch.cat([tokens, torch.randint(31, (1, 5))], dim=1)
    assert torch.allclose(gpt(tokens), gpt(padded)[:, :10], atol=1e-12)


@pytest.mark.parametrize("method, tune_encoder", [
    *((method, False) for method in (*METHODS, "lora", "full")), ("lopa", True), ("idpg", True)])
def test_every_module_runs_whole_on_the_device_that_its_inputs_are_on(method, tune_encoder):
    """On the meta device, without a GPU: a tensor made on another one, or a number asked of the device, is an error there."""
    with torch.device("meta"):
        gpt, label_ids = GPT(GPTConfig()), torch.empty(2, dtype=torch.long)            # GPT-2 small
        tokens, lengths, labels = torch.empty(3, 20).long(), torch.empty(3).long(), torch.empty(3).long()
    encoder = InstanceEncoder(gpt)
    adapted = Adapted(Config("sst2", method, init_std=0.1, tune_encoder=tune_encoder), gpt, encoder, label_ids)
    batch = Encoded(tokens, lengths, labels, instances=encoder(tokens, lengths))
    assert adapted(tokens, lengths, batch.instances).shape == (3, 2)
    loss = loss_of(adapted, batch)
    loss.backward()
    assert loss.is_meta and adapted.trained() and all(p.grad.is_meta for p in adapted.trained().values())
    if not tune_encoder and method not in METHODS:     # the prompts' counts: test_lopa.py
        assert get_nb_trainable_parameters(adapted)[0] == {"lora": 12 * 3 * 2 * 768 * 4, "full": 124_439_808}[method]
    if tune_encoder:                                   # the embeddings and half of the blocks
        assert get_nb_trainable_parameters(adapted.encoder)[0] == (50257 + 1024 + 6 * (12 * 768 + 13)) * 768


# --- the instance encoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks, read", [(None, 2), (0, 0), (1, 1), (3, 3)])
def test_the_instance_embedding_is_the_mean_over_real_tokens_after_half_or_any_number_of_blocks(gpt, num_blocks, read):
    tokens, lengths = tokens_of(4, 7, 1, pad_to=15)
    h = InstanceEncoder(gpt, num_blocks)(tokens, lengths)
    for i, length in enumerate(lengths.tolist()):      # alone and without padding
        x = gpt.wte.weight[tokens[i, :length]] + (gpt.wpe.weight[:length] if read else 0)
        for block in gpt.h[:read]:
            x = block(x[None])[0]
        normed = [(row - row.mean()) / torch.sqrt(row.var(unbiased=False) + 1e-5) for row in x]
        assert torch.allclose(h[i], sum(normed) / length, atol=1e-12)


def test_after_no_block_the_instance_embedding_is_a_bag_of_words_and_after_one_it_is_not(gpt):
    tokens, lengths = tokens_of(7)
    bag, ordered, mixed = InstanceEncoder(gpt, 0), InstanceEncoder(gpt, 1), tokens[:, torch.randperm(7)]
    assert torch.allclose(bag(mixed, lengths), bag(tokens, lengths), atol=1e-12)
    assert not torch.allclose(ordered(mixed, lengths), ordered(tokens, lengths), atol=1e-3)


def test_more_blocks_than_there_are_are_refused_with_both_numbers(gpt):
    with pytest.raises(ValueError, match="the encoder has 3 blocks, h cannot be read after 4: name 0 to 3"):
        InstanceEncoder(gpt, 4)


def test_the_encoder_freezes_its_model_and_standardises_every_feature_over_the_training_split(gpt):
    gpt.train().requires_grad_(True)
    encoder = InstanceEncoder(gpt)
    assert not gpt.training and not any(p.requires_grad for p in gpt.parameters())
    tokens, lengths = tokens_of(*range(1, 13))
    fitted = encoder.fit(encoder(tokens, lengths))
    assert torch.allclose(fitted.mean(dim=0), torch.zeros(12, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(fitted.std(dim=0), torch.ones(12, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(encoder(tokens, lengths), fitted, atol=1e-12)
    with pytest.raises(ValueError, match="1 training row"):            # whose deviation nobody knows
        encoder.fit(encoder(tokens[:1], lengths[:1]))


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
