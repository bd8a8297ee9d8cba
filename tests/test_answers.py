"""Answers of several tokens: their loss, generation that ends where it should, files of JSON lines, and scores."""

import dataclasses
import json
import os
import re

import pytest
import torch
from torch.nn import functional as F

import data
import train
from model import InstanceEncoder

REWRITE = data.TASKS["rewrite"]
ANSWERS = [" It was good .", " It was great , great .", " It", " It was terrible ."]      # 5, 7, 2 and 5 tokens with the end mark


@pytest.fixture
def problem(tiny):
    """Four rows of different lengths with answers of different lengths."""
    rows = [(fields, answer) for (fields, _), answer in zip(data.rewrite_sample()[0], ANSWERS)]
    split, encoder = data.encode(REWRITE, rows, tiny[1], 100), InstanceEncoder(tiny[0], 0)
    assert len(set(split.lengths.tolist())) > 2
    split = dataclasses.replace(split, instances=encoder.fit(train.instance_embeddings(encoder, split)))
    ends = data.label_tokens(REWRITE, tiny[1])
    return train.Problem(tiny[0], encoder, ends, split, {"dev": split}, task=REWRITE, tokenizer=tiny[1])


def built(problem, **changes):
    """The model of a task with answers, in evaluation, with a prompt that has left its start."""
    model = train.build(train.Config("rewrite", **changes), problem).eval()
    for p in model.trained().values():
        p.data += 0.02 * torch.randn_like(p)
    return model


def whole_rows(model, split):
    """For each row: (what the model reads, prompt, text and answer, as one sequence; where its answer begins; the answer)."""
    for tokens, length, h, labels in zip(split.tokens, split.lengths.tolist(), split.instances, split.labels):
        answer = labels[labels >= 0]
        prompted = model.prompt(model.gpt.embed(tokens[None, :length]), h[None])
        yield torch.cat([prompted, model.gpt.embed(answer[None])], dim=1), prompted.shape[1], answer


@pytest.mark.parametrize("changes", [dict(method="lopa"), dict(method="pt"), dict(method="dept"), dict(method="adept"),
                                     dict(fusion="concat")])
def test_the_loss_is_every_targets_averaged_in_its_row_and_then_over_the_rows(problem, changes):
    model, losses = built(problem, **changes), []
    for embeds, begin, answer in whole_rows(model, problem.train):
        logits = model.gpt.logits(model.gpt.hidden(embeds))[0]
        row = [F.cross_entropy(logits[begin + i - 1], token).item() for i, token in enumerate(answer)]
        losses.append(sum(row) / len(row))
    assert train.loss_of(model, problem.train).item() == pytest.approx(sum(losses) / 4, abs=1e-5)
    alone = [train.loss_of(model, batch).item() for batch in data.batches(problem.train, torch.arange(4).split(1))]
    assert alone == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("method", ["lopa", "adept", "dept"])
def test_what_is_generated_is_the_likeliest_token_each_time_in_training_s_own_reading(problem, method):
    """Each token is the argmax of the logits that the loss would have at its place: training and scoring read alike."""
    model = built(problem, method=method)
    predicted = train.predict(model, problem.train)
    assert predicted.shape == (4, 8)
    split = problem.train
    with torch.no_grad():
        logits = model(split.tokens, split.lengths, split.instances, predicted).unflatten(0, (4, 8))
    for row, choices in zip(predicted, logits.argmax(dim=-1)):
        ended = torch.isin(row, problem.label_ids).cumsum(0)
        upto = (ended - torch.isin(row, problem.label_ids).long()) == 0        # the end mark itself is chosen too
        assert torch.equal(row[upto], choices[upto])


def test_an_answer_is_decoded_up_to_its_end_mark_and_one_that_does_not_fit_is_never_right(tiny):
    tokenizer = tiny[1]
    encoded = data.encode_answer(REWRITE, " It was good .", tokenizer)
    assert encoded.tolist()[4:] == [tokenizer.eot_token, -100, -100, -100]
    assert data.decode_answer(REWRITE, encoded, tokenizer) == " It was good ."
    long = data.encode_answer(REWRITE, " It was good" * 9, tokenizer)
    assert len(long) == 8 and (long >= 0).all()                        # cut, so without an end mark
    assert data.decode_answer(REWRITE, torch.tensor([tokenizer.eot_token] * 8), tokenizer) == ""
    lines, (good,) = dataclasses.replace(REWRITE, one_line=False), tokenizer.encode_ordinary(" good")
    behind = torch.tensor([good, tokenizer.eot_token, good])           # a model may go on behind the end mark
    assert data.decode_answer(lines, behind, tokenizer) == " good"
    task, texts = dataclasses.replace(REWRITE, max_answer=4), [" It was", " It was good ."]
    split = data.encode(task, [({"sentence": "the plot works"}, text) for text in texts], tokenizer, 100)
    assert split.cut.tolist() == [False, True]                         # what did not fit is counted, and is never right
    assert data.right(task, split.labels, split.labels, tokenizer).tolist() == [True, False]


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR does not name GPT-2's two files")
def test_with_gpt2s_tokenizer_a_line_end_ends_what_has_one_line_and_the_end_mark_all():
    tokenizer, lines, one = data.gpt2_tokenizer(), data.TASKS["mbpp"], data.TASKS["cruxeval_o"]
    first, *ends = [tokenizer.decode([token]) for token in data.label_tokens(one, tokenizer).tolist()]
    assert first == "<|endoftext|>" and {"\n", "\n\n"} <= set(ends) and all("\n" in end for end in ends)
    assert data.label_tokens(lines, tokenizer).tolist() == [tokenizer.eot_token]
    text = "\treturn 1\n\n\treturn 2"
    encoded = data.encode_answer(lines, text, tokenizer)
    assert data.decode_answer(lines, encoded, tokenizer) == text
    assert data.decode_answer(one, encoded, tokenizer) == "\treturn 1"


@pytest.mark.parametrize("given, wanted, right", [
    ("[1, 2]", "[1,2]", True), (" 'a'", '"a"', True), ("{1: 2, 'b': 2}", "{'b': 2, 1: 2}", True), ("nan", "nan", True),
    ("{1, 'a', (2,)}", "{(2,), 'a', 1}", True), ("{None: {1}}", "{None: {1}}", True), ("1", "1.0", False), ("1", "True", False),
    ("{'a': (1,)}", "{'a': [1]}", False), ("{1: 0}", "{True: 0}", False), ("'a b'", "'a  b'", False), ("1 1", "1", False),
    ("[" * 900, "[]", False), ("'\\d'", "'\\\\d'", True), ("exit()", "1", False),      # nothing is run
])
def test_an_output_is_right_if_value_and_types_are_and_an_input_if_its_text_is(given, wanted, right, recwarn):
    assert data.same_answer(data.TASKS["cruxeval_o"], given, wanted) == right and not recwarn.list
    assert data.same_answer(data.TASKS["cruxeval_i"], given, wanted) == (given.rstrip() == wanted)


CRUX = {"code": "def f(x):\n\treturn {x}", "input": "1", "output": "{1}", "id": "sample_7"}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_a_row_of_json_is_a_text_and_an_answer_and_braces_in_it_are_text(tmp_path):
    write(tmp_path / "cruxeval.jsonl", CRUX, "", CRUX | {"id": "sample_8"})
    for name, fields, answer, text in (
            ("cruxeval_o", {"code": CRUX["code"], "input": "1"}, " {1}", "def f(x):\n\treturn {x}\nassert f(1) =="),
            ("cruxeval_i", {"code": CRUX["code"], "output": "{1}"}, "(1)", "def f(x):\n\treturn {x}\nassert {1} == f")):
        train_rows, dev, source = data.load_task(name, str(tmp_path))
        assert sorted(row[0].pop("task_id") for row in train_rows + dev["test"]) == ["sample_7", "sample_8"]
        assert train_rows == dev["test"] == [(fields, answer)] and source == str(tmp_path / "cruxeval")
        assert data.TASKS[name].template.format(**fields) == text


def test_one_file_is_halved_the_same_way_every_time_and_not_in_its_order(tmp_path):
    write(tmp_path / "cruxeval.jsonl", *(CRUX | {"id": i} for i in range(800)))
    halves = [[[fields["task_id"] for fields, _ in rows] for rows in (train_rows, dev["test"])]
              for train_rows, dev, _ in (data.load_task(name, str(tmp_path)) for name in ("cruxeval_o", "cruxeval_i"))]
    assert halves[0] == halves[1] and [len(half) for half in halves[0]] == [400, 400]
    assert sorted(sum(halves[0], [])) == list(range(800)) and max(halves[0][0][:100]) > 150


def test_a_task_with_a_file_for_each_split_is_split_so_and_its_answers_keep_their_lines(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"mbpp_{split}.jsonl", *(dict(task_id=f"{split}/{i}", prompt="\n\ndef f():\n",
                                                       canonical_solution="\r\n  pass") for i in (1, 2)))
    train_rows, dev, _ = data.load_task("mbpp", str(tmp_path))
    assert train_rows[0] == ({"prompt": "\n\ndef f():\n", "task_id": "train/1"}, "\r\n  pass")
    assert [fields["task_id"] for fields, _ in dev["test"]] == ["test/1", "test/2"]


@pytest.mark.parametrize("line, message", [
    ('{"code": "x", "input": "1"}', "line 2: no text 'output', only code, input"),
    ('{"code": "x", "input": "1", "output": 5}', "line 2: no text 'output', only"),
    ("no JSON", "line 2: not readable as a JSON object"),
])
def test_a_bad_line_is_refused_with_file_and_line_and_what_is_missing(tmp_path, line, message):
    write(tmp_path / "cruxeval.jsonl", CRUX, line)
    with pytest.raises(ValueError, match=re.escape(f"cruxeval.jsonl, {message}")) as error:
        data.load_task("cruxeval_o", str(tmp_path))
    assert "\n" not in str(error.value)
    (tmp_path / "cruxeval.jsonl").unlink()
    with pytest.raises(ValueError, match="cruxeval_train.jsonl not found"):
        data.load_task("cruxeval_o", str(tmp_path))


@pytest.mark.parametrize("change", [dict(label_words={"a": " b"}, label_names=("a",)), dict(max_answer=1), dict(answer=""),
                                    dict(template="{sentence} . It was ")])
def test_a_task_has_either_label_words_or_an_answer_with_a_limit_and_no_blank_at_its_templates_end(change):
    with pytest.raises(ValueError, match="task rewrite: "):
        dataclasses.replace(REWRITE, **change)


def test_the_verdict_follows_from_the_words_and_the_frozen_model_has_read_all_of_its_own():
    text = data.pretraining_text(2000)
    for (fields, answer), (again, label) in zip(sum(data.rewrite_sample(), []), sum(data.sst2_sample(), [])):
        word = answer.removeprefix(" It was ").removesuffix(" .")
        assert fields == again and word in data.ADJECTIVES[label] and f"It was {word} ." in text
        negated = bool({"not", "hardly", "never", "rarely"} & set(fields["sentence"].split()))
        assert negated == (word in ("bad", "good"))


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "rewrite"
    train.main(["--task", "rewrite", "--method", "full", "--epochs", "2", "--quiet", "--out", str(out)])
    return out


def test_a_run_leaves_completions_and_their_accuracy(finished):
    result = json.loads((finished / "result.json").read_text())
    lines = [json.loads(line) for line in (finished / "completions.jsonl").read_text().splitlines()]
    dev = data.rewrite_sample()[1]
    assert [line["task_id"] for line in lines] == list(range(872)) and lines[0].keys() == {"task_id", "completion"}
    right = [line["completion"] == answer for line, (_, answer) in zip(lines, dev)]
    assert result["accuracy"] == pytest.approx(sum(right) / 872) and result["accuracy"] > 0.9 > 0.3 > result["majority"]


def test_predict_prints_the_answer(finished, capsys):
    train.main(["--adapter", str(finished), "--predict", "the plot is not dull"])
    assert capsys.readouterr().out == 'answer\tsentence\n" It was good ."\t"the plot is not dull"\n'
    code = "def f(x):\n\treturn x"                                      # a text of several lines is given in JSON
    train.main(["--adapter", str(finished), "--predict", json.dumps(code)])
    assert json.loads(capsys.readouterr().out.splitlines()[1].split("\t")[1]) == code
