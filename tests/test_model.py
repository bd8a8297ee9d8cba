"""model.py against what padding and batching must not change, and the pre-training. Against GPT-2: test_pretrained.py."""

import pytest
import torch

import model
from data import Encoded
from lopa import METHODS, get_nb_trainable_parameters
from model import GPT, GPTConfig, InstanceEncoder, pretrain
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


def test_the_states_at_one_position_are_those_of_the_whole_forward_pass(gpt):
    tokens, lengths = tokens_of(4, 7, 1, 9, pad_to=12)
    inputs_embeds = gpt.embed(tokens).requires_grad_()
    whole = gpt.hidden(inputs_embeds)[torch.arange(4), lengths - 1]
    alone = gpt.hidden_at(inputs_embeds, lengths - 1)
    assert torch.allclose(alone, whole, atol=1e-12)
    direction = torch.randn(4, 12, dtype=torch.float64)
    gradients = [torch.autograd.grad((x * direction).sum(), inputs_embeds)[0] for x in (whole, alone)]
    assert torch.allclose(*gradients, atol=1e-12)


def test_logits_of_a_bfloat16_model_are_those_of_its_numbers_and_not_rounded(gpt):
    gpt, hidden = gpt.bfloat16(), torch.randn(7, 12).bfloat16()
    exact, only = hidden.double() @ gpt.wte.weight.double().T, torch.tensor([3, 9])
    assert gpt.logits(hidden).dtype == torch.float32
    assert torch.allclose(gpt.logits(hidden).double(), exact, atol=1e-6)
    assert torch.allclose(gpt.logits(hidden, only).double(), exact[:, only], atol=1e-6)


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


def test_the_encoder_freezes_its_model_and_standardises_every_feature_over_the_training_split(gpt):
    gpt.train().requires_grad_(True)
    encoder = InstanceEncoder(gpt)
    assert not gpt.training and not any(p.requires_grad for p in gpt.parameters())
    tokens, lengths = tokens_of(*range(1, 13))
    fitted = encoder.fit(encoder(tokens, lengths))
    assert torch.allclose(fitted.mean(dim=0), torch.zeros(12, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(fitted.std(dim=0), torch.ones(12, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(encoder(tokens, lengths), fitted, atol=1e-12)
    instances = torch.randn(10, 12)
    instances[:, 3] = 0.7                                              # a feature that does not vary in training is 0, for all
    encoder.fit(instances)
    assert abs((1.4 - encoder.mean[3]) / encoder.std[3]) < 1e-20


# --- pre-training ------------------------------------------------------------------------------------------

def test_the_first_step_of_pretraining_takes_the_first_rate_of_the_warm_up(monkeypatch):
    """Adam's first step moves a weight by the whole rate, whatever its gradient; the decay comes on top."""
    monkeypatch.setitem(model.PRETRAINING, "steps", 1)
    torch.manual_seed(5)
    before = GPT(config := GPTConfig(31, 64, 12, 2, 2)).wpe.weight
    after = pretrain(config, torch.randint(31, (2000,)), torch.arange(0, 2000, 10), 5, "cpu").wpe.weight
    rate = 4e-3 / 50
    assert (after - before * (1 - 0.01 * rate)).abs().max().item() == pytest.approx(rate, rel=1e-3)


def test_pretraining_reads_windows_from_where_a_document_begins_and_learns_the_next_tokens(monkeypatch):
    for name, value in dict(steps=30, window=4, batch_size=8, warmup_steps=1, lr=1e-2).items():
        monkeypatch.setitem(model.PRETRAINING, name, value)
    read = []
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda gpt, tokens: read.append(tokens) or forward(gpt, tokens))
    config = GPTConfig(vocab_size=10, n_positions=8, n_embd=16, n_layer=1, n_head=2, initializer_range=0.1)
    text = torch.arange(10).repeat(200)                                # every document is 0, 1, ... 9
    gpt = pretrain(config, text, torch.arange(0, 2000, 10), 0, "cpu")
    assert torch.equal(torch.cat(read), torch.arange(4).expand(30 * 8, 4))
    assert gpt(torch.arange(4)[None])[0].argmax(dim=-1).tolist() == [1, 2, 3, 4]
