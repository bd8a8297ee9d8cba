"""experiments/evidence.py: the controls, the probes on h, and the rows held out. What they show: tutorial.md."""

import dataclasses

import pytest
import torch

import data
import model
import train
from experiments import evidence
from model import InstanceEncoder


def prepared(rows):
    return train.prepare(train.Config("sst2", max_train=rows, quiet=True))


def splits(problem):
    return [problem.train, *problem.tests.values()]


def split_of(h, labels=None):
    """A split that is nothing but its h and labels."""
    N = len(h)
    return data.Encoded(torch.zeros(N, 5, dtype=torch.long), torch.full((N,), 5),
                        torch.zeros(N, dtype=torch.long) if labels is None else labels, instances=h)


def test_with_the_constant_control_every_h_is_the_training_splits_mean(tiny):
    own = prepared(60)
    assert torch.allclose(own.train.instances.mean(dim=0), torch.zeros(64), atol=1e-5)
    for split, without in zip(splits(evidence.controlled(own, "constant")), splits(own)):
        assert split.instances.shape == (len(without), 64) and not split.instances.any() and without.instances.any()
        for part in ("tokens", "lengths", "labels"):
            assert torch.equal(getattr(split, part), getattr(without, part))


@pytest.mark.parametrize("N", [2, 3, 32])
def test_with_the_shuffled_control_nobody_keeps_his_own_h(N):
    split = split_of(torch.randn(N, 4))
    own = train.Problem(None, None, None, split, {"a": split, "b": split})
    for seed in range(20):
        for shuffled in splits(evidence.controlled(own, "shuffled", seed)):
            assert not (shuffled.instances == split.instances).all(dim=1).any()
            assert torch.equal(shuffled.instances.sort(dim=0).values, split.instances.sort(dim=0).values)
    with pytest.raises(ValueError, match="control shuffled: a single row has no other text's h"):
        evidence.controlled(dataclasses.replace(own, tests={"a": split[:1]}), "shuffled")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lopa", "pt", "lora"])
def test_a_blind_model_reads_the_prompt_and_the_ending_alone_from_first_to_last(tiny, monkeypatch, method):
    config, own = train.Config("sst2", method, epochs=1, quiet=True), prepared(60)
    blind = evidence.controlled(own, "blind")
    for split, without in zip(splits(blind), splits(own)):
        assert torch.equal(split.instances, without.instances) and torch.equal(split.labels, without.labels)
    read, hidden_at = [], model.GPT.hidden_at
    monkeypatch.setattr(model.GPT, "hidden_at", lambda gpt, x, last: read.append((x, last)) or hidden_at(gpt, x, last))
    adapted = train.build(config, blind)
    train.fit(config, adapted, blind)
    scores = train.predict(adapted, blind.test)
    ending = tiny[1].encode_ordinary(" . It was")
    assert len(read) == 2 + 14 + 14                                    # steps, and 872 rows twice
    for x, last in read:
        assert x.shape[1] in (len(ending), 10 + len(ending)) and set(last.tolist()) == {x.shape[1] - 1}
        assert torch.equal(x[:, -len(ending):], tiny[0].wte.weight[ending].expand(len(x), -1, -1))
    differ = (scores - scores[0]).abs().max().item()
    assert differ > 1e-5 if method == "lopa" else differ < 1e-6        # what is not constant comes from h


def test_the_blind_control_is_refused_where_the_text_comes_last(tiny):
    own = prepared(20)
    ends_with_the_text = dataclasses.replace(own, task=dataclasses.replace(own.task, template="It was {sentence}"))
    with pytest.raises(ValueError, match="control blind: the task has nothing after its text"):
        evidence.controlled(ends_with_the_text, "blind")


@pytest.mark.parametrize("label", [lambda i: i >= 24, lambda i: i % 4 == 0])    # sorted; every fourth
def test_rows_held_out_have_each_labels_share_are_always_the_same_and_are_not_in_the_scale_of_h(label):
    split, row = split_of(torch.randn(32, 4), torch.tensor([int(label(i)) for i in range(32)])), torch.arange(32)
    split = dataclasses.replace(split, tokens=row[:, None], cut=row % 3 == 0)
    whole = train.Problem(None, None, None, split, {"dev": split_of(torch.zeros(5, 4))}, ids={"dev": [7] * 5})
    problem, again = evidence.hold_out(whole, 8), evidence.hold_out(whole, 8)
    assert list(problem.tests) == ["held-out training rows"] and problem.ids == {}     # dev is not in it
    shares = split.labels.bincount() // 4
    assert torch.equal(problem.test.labels.bincount(), shares) and torch.equal(problem.train.labels.bincount(), 3 * shares)
    rows = torch.cat([split.tokens[:, 0] for split in splits(problem)])
    assert torch.equal(rows.sort().values, row) and torch.equal(problem.test.tokens, again.test.tokens)
    assert torch.equal(torch.cat([split.cut for split in splits(problem)]), rows % 3 == 0)
    assert torch.allclose(problem.train.instances.mean(dim=0), torch.zeros(4), atol=1e-6)
    with pytest.raises(ValueError, match="31 of 32 rows cannot be held out"):
        evidence.hold_out(whole, 31)


def test_the_linear_probe_separates_what_is_linear_and_not_an_exclusive_or_which_the_one_with_a_hidden_layer_solves(tiny):
    torch.manual_seed(0)
    h = torch.randn(600, 64) * torch.tensor([1.0, 1.0, *[0.1] * 62])
    linear, exclusive_or = (h[:, 0] > 0.2).long(), ((h[:, 0] > 0) != (h[:, 1] > 0)).long()
    scores = evidence.linear_probe(h[:400], linear[:400], h[400:])
    assert (scores.argmax(dim=-1) == linear[400:]).float().mean() > 0.9
    problem = train.Problem(tiny[0], InstanceEncoder(tiny[0]), torch.tensor([1, 2]), split_of(h[:400], exclusive_or[:400]),
                            {"dev": split_of(h[400:], exclusive_or[400:])})
    config = train.Config("sst2", epochs=60, head_lr=0.01, lr=7.0)     # the probe's rate is the heads'
    before = evidence.baselines(config, problem)
    assert 0.3 <= before["linear_probe"] <= 0.7 and before["hidden_layer_probe"] > 0.8
    assert before["zero_shot"] == train.without_training(problem)["zero_shot"]


def test_a_probe_with_ridge_equals_its_own_normal_equations_minimum():
    """At the minimum of |XW - Y|^2 + N |W without bias|^2 the gradient is zero; the probe's scores are linear in h."""
    torch.manual_seed(0)
    h, labels = torch.randn(50, 3), torch.randint(3, (50,))
    basis = torch.cat([torch.zeros(1, 3), torch.eye(3)])
    b, *rest = evidence.linear_probe(h, labels, basis)                 # scores at 0 are the bias
    W = (torch.stack(rest) - b).requires_grad_()
    b = b.clone().requires_grad_()
    Y = torch.nn.functional.one_hot(labels).double()
    (((h.double() @ W + b - Y) ** 2).sum() + 50 * (W ** 2).sum()).backward()
    assert W.grad.abs().max() < 1e-9 and b.grad.abs().max() < 1e-9


def test_the_kinds_of_sentences_are_told_from_their_words(tiny):
    for text, kind in (("the plot is very dull", "plain"), ("the cast never fails", "negated"),
                       ("although the music is warm , the script drags", "contrast"),
                       ("the plot is not dull , but the cast is not good", "negated contrast")):
        assert evidence.kind_of_sentence({"sentence": text}) == kind
    problem = prepared(20)
    kinds, labels = evidence.kinds(problem), problem.test.labels
    scores = torch.nn.functional.one_hot(torch.where(torch.tensor([kind == "plain" for kind in kinds]), labels, 1 - labels))
    assert evidence.accuracy_by_kind(problem, scores) == {"plain": 1, "negated": 0, "contrast": 0, "negated contrast": 0}
    assert not evidence.kinds(evidence.hold_out(problem, 8))
