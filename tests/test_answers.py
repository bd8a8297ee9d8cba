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
from model import GPT, GPTConfig, InstanceEncoder

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


def built(problem, flags=""):
    """The model of a task with answers, in evaluation, with a prompt that has left its start."""
    _, config = train.parse_args(["--task", "rewrite", "--device", "cpu", "--quiet", *flags.split()])
    model = train.build(config, problem).eval()
    for p in model.trained().values():
        p.data += 0.02 * torch.randn_like(p)
    return model


def whole_rows(model, split):
    """For each row: (what the model reads, prompt, text and answer, as one sequence; where its answer begins; the answer)."""
    for tokens, length, h, labels in zip(split.tokens, split.lengths.tolist(), split.instances, split.labels):
        answer = labels[labels >= 0]
        prompted = model.prompt(model.gpt.embed(tokens[None, :length]), h[None])
        yield torch.cat([prompted, model.gpt.embed(answer[None])], dim=1), prompted.shape[1], answer


# --- loss and gradient -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["--method lopa", "--method pt", "--method dept", "--method adept", "--fusion concat"])
def test_the_loss_is_every_targets_averaged_in_its_row_and_then_over_the_rows(problem, flags):
    model, losses = built(problem, flags), []
    for embeds, begin, answer in whole_rows(model, problem.train):
        logits = model.gpt.logits(model.gpt.hidden(embeds))[0]
        row = [F.cross_entropy(logits[begin + i - 1], token).item() for i, token in enumerate(answer)]
        losses.append(sum(row) / len(row))
    assert train.loss_of(model, problem.train).item() == pytest.approx(sum(losses) / 4, abs=1e-5)


def test_the_loss_of_a_batch_is_the_mean_of_its_rows(problem):
    model = built(problem)
    alone = [train.loss_of(model, next(train.batches(problem.train, [torch.tensor([i])]))).item() for i in range(4)]
    assert train.loss_of(model, problem.train).item() == pytest.approx(sum(alone) / 4, abs=1e-5)


def test_logits_are_taken_where_a_target_stands_and_nowhere_else(problem, monkeypatch):
    taken, logits = [], GPT.logits
    monkeypatch.setattr(GPT, "logits", lambda gpt, hidden, only=None: taken.append(hidden.shape) or logits(gpt, hidden, only))
    train.loss_of(built(problem), problem.train)
    assert taken == [(5 + 7 + 2 + 5, 64)]


def test_every_target_pulls_on_the_prompt_and_nothing_else_does(problem):
    model, labels = built(problem), problem.train.labels
    model.gpt.requires_grad_(False)

    def pull(split):
        model.zero_grad()
        train.loss_of(model, split).backward()
        return model.prompt.soft_prompt.grad.clone()

    start = pull(problem.train)
    for row, i in (labels >= 0).nonzero().tolist():                    # another target: another gradient
        changed = labels.clone()
        changed[row, i] = (changed[row, i] + 1) % 300
        assert (pull(dataclasses.replace(problem.train, labels=changed)) - start).abs().max() > 1e-6
    tokens = problem.train.tokens.clone()
    for row, length in zip(tokens, problem.train.lengths):
        row[length:] = 7                                               # padding pulls on nothing
    assert torch.allclose(pull(dataclasses.replace(problem.train, tokens=tokens)), start, atol=1e-7)
    wider = F.pad(labels, (0, 9), value=-100)
    assert torch.allclose(pull(dataclasses.replace(problem.train, labels=wider)), start, atol=1e-7)
    assert all(p.grad is None for p in model.gpt.parameters()) and set(model.trained()) == {
        f"prompt.{name}" for name, _ in model.prompt.named_parameters()}


# --- generation ------------------------------------------------------------------------------------------------


@pytest.fixture
def random_gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(31, 60, 12, 3, 2, initializer_range=0.5)).double().requires_grad_(False)


def test_a_batch_of_unequal_rows_is_generated_as_its_rows_one_by_one(random_gpt):
    embeds, lengths = torch.randn(5, 20, 12).double(), torch.tensor([20, 3, 11, 1, 7])
    together = random_gpt.generate(embeds, 40, lengths)
    assert together.unique().numel() > 3
    for row, length, tokens in zip(embeds, lengths, together):
        assert torch.equal(random_gpt.generate(row[None, :length], 40)[0], tokens)     # without a cache: test_pretrained.py


def test_a_row_ends_with_the_first_token_that_ends_it_and_the_others_go_on(random_gpt):
    embeds, lengths = torch.randn(5, 20, 12).double(), torch.tensor([20, 3, 11, 1, 7])
    free = random_gpt.generate(embeds, 30, lengths)
    ends = torch.tensor([free[0, 4], free[1, 9]])
    for row, tokens in zip(free, random_gpt.generate(embeds, 30, lengths, ends)):
        stops = torch.isin(row, ends).nonzero().flatten().tolist()
        length = stops[0] + 1 if stops else 30
        assert torch.equal(tokens[:length], row[:length]) and set(tokens[length:].tolist()) <= {ends[0].item()}


def test_generation_stops_computing_when_every_row_has_ended(random_gpt, monkeypatch):
    embeds, steps, hidden = torch.randn(2, 6, 12).double(), [], GPT.hidden
    first = random_gpt.generate(embeds, 3)
    monkeypatch.setattr(GPT, "hidden", lambda gpt, x, **more: steps.append(x.shape[1]) or hidden(gpt, x, **more))
    random_gpt.generate(embeds, 30, ends=first[:, 2])
    assert steps == [6, 1, 1][:len(steps)] and len(steps) <= 3


@pytest.mark.parametrize("flags", ["--method lopa", "--method adept", "--method dept"])
def test_what_is_generated_is_the_likeliest_token_each_time_in_training_s_own_reading(problem, flags):
    """Each token is the argmax of the logits that the loss would have at its place: training and scoring read alike."""
    model = built(problem, flags)
    predicted = train.predict(model, problem.train)
    assert predicted.shape == (4, 8)
    split = problem.train
    with torch.no_grad():
        logits = model(split.tokens, split.lengths, split.instances, predicted).unflatten(0, (4, 8))
    for row, choices in zip(predicted, logits.argmax(dim=-1)):
        ended = torch.isin(row, problem.label_ids).cumsum(0)
        upto = (ended - torch.isin(row, problem.label_ids).long()) == 0        # the end mark itself is chosen too
        assert torch.equal(row[upto], choices[upto])


def test_an_answer_is_decoded_up_to_its_end_mark_or_line_end(tiny):
    tokenizer = tiny[1]
    encoded = data.encode_answer(REWRITE, " It was good .", tokenizer)
    assert encoded.tolist()[4:] == [tokenizer.eot_token, -100, -100, -100]
    assert data.decode_answer(REWRITE, encoded, tokenizer) == " It was good ."
    long = data.encode_answer(REWRITE, " It was good" * 9, tokenizer)
    assert len(long) == 8 and (long >= 0).all()                        # cut, so without an end mark
    assert data.decode_answer(REWRITE, torch.tensor([tokenizer.eot_token] * 8), tokenizer) == ""


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


# --- scores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, wanted, right", [
    ("[1, 2]", "[1,2]", True), (" 'a'", '"a"', True), ("{'a': 1, 'b': 2}", "{'b': 2, 'a': 1}", True), ("{1, 2}", "{2, 1}", True),
    ("1", "1.0", False), ("True", "1", False), ("[1]", "[True]", False), ("{'a': (1,)}", "{'a': [1]}", False), ("{1: 0}", "{True: 0}", False),
    ("(1, 2)", "[1, 2]", False), ("'1'", "1", False), ("b'a'", "'a'", False), ("'a b'", "'a  b'", False), ("-1", "1", False),
    ("print(1)", "None", False), ("1 1", "1", False), ("", "''", False), ("[" * 900, "[]", False), ("{[]: 1}", "1", False),
    ("'\\d'", "'\\\\d'", True), ("a\0", "1", False), ("1" * 5000, "1", False),
])
def test_an_output_is_right_if_value_and_types_are(given, wanted, right, recwarn):
    assert data.same_answer(data.TASKS["cruxeval_o"], given, wanted) == right and not recwarn.list


@pytest.mark.parametrize("given, right", [("(1, 2)", True), ("(1, 2)  ", True), ("(1,2)", False), ("(2, 1)", False), ("", False)])
def test_an_input_is_right_if_its_text_is(given, right):
    assert data.same_answer(data.TASKS["cruxeval_i"], given, "(1, 2)") == right


def test_no_code_in_an_answer_is_run(tmp_path):
    code = f"__import__('pathlib').Path({str(tmp_path / 'made')!r}).touch()"
    for task in ("cruxeval_o", "cruxeval_i", "mbpp"):
        data.same_answer(data.TASKS[task], code, "1")
    assert not list(tmp_path.iterdir())


# --- files -----------------------------------------------------------------------------------------------------

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
    assert set(halves[0][0]) | set(halves[0][1]) == set(range(800)) and max(halves[0][0][:100]) > 150


def test_mbpp_is_read_in_both_forms_and_split_as_each_is_published(tmp_path):
    write(tmp_path / "mbpp.jsonl", *(dict(text=f"Do {i}.", code="def f():\r\n  pass", task_id=i, test_setup_code="",
                                          test_list=["assert f() == 1", "assert f() == 2"]) for i in (1, 10, 11, 510, 511, 974)))
    train_rows, dev, _ = data.load_task("mbpp", str(tmp_path))
    assert [fields["task_id"] for fields, _ in train_rows] == [1, 10, 511, 974]
    assert [fields["task_id"] for fields, _ in dev["test"]] == [11, 510]
    assert train_rows[0] == ({"prompt": '"""\nDo 1.\nassert f() == 1\nassert f() == 2\n"""\n', "task_id": 1}, "def f():\r\n  pass")
    (tmp_path / "mbpp.jsonl").unlink()
    for split in ("train", "test"):
        write(tmp_path / f"mbpp_{split}.jsonl", *(dict(task_id=f"{split}/{i}", prompt="\n\ndef f():\n", canonical_solution="  pass") for i in (1, 2)))
    train_rows, dev, _ = data.load_task("mbpp", str(tmp_path))
    assert train_rows[0] == ({"prompt": "\n\ndef f():\n", "task_id": "train/1"}, "  pass") and dev["test"][1][0]["task_id"] == "test/2"


@pytest.mark.parametrize("line, message", [
    ('{"code": "x", "input": "1"}', "line 2: no text 'output', only code, input"),
    ('{"code": "x", "input": "1", "output": 5}', "line 2: no text 'output', only"),
    ('{"code": null, "input": "1", "output": "5"}', "line 2: no text 'code', only"),
    ("[1]", "line 2: not readable as a JSON object (another kind of value)"),
    ('{"code": "x"', "line 2: not readable as a JSON object"),
    ('{"code": "x", "code": "y"}', "line 2: not readable as a JSON object ('code' occurs twice)"),
    ("[" * 10**5, "line 2: not readable as a JSON object"),
    ("no JSON", "line 2: not readable as a JSON object"),
])
def test_a_bad_line_is_refused_with_file_and_line_and_what_is_missing(tiny, tmp_path, capsys, line, message):
    write(tmp_path / "cruxeval.jsonl", CRUX, line)
    with pytest.raises(SystemExit) as stop:
        train.main(["--task", "cruxeval_o", "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1 and f"cruxeval.jsonl, {message}" in error


@pytest.mark.parametrize("content, message", [
    ("", "cruxeval.jsonl: 0 examples in it"), (json.dumps(CRUX), "cruxeval.jsonl: 1 examples in it"), (None, "cruxeval_train.jsonl not found"),
    (b"\xff\n", "cruxeval.jsonl, line 1: not UTF-8"),
])
def test_a_file_without_rows_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "cruxeval.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        data.load_task("cruxeval_o", str(tmp_path))


@pytest.mark.parametrize("change", [dict(label_words={"a": " b"}, label_names=("a",)), dict(max_answer=1), dict(max_answer="8"), dict(answer=""),
                                    dict(answer=5)])
def test_a_task_has_either_label_words_or_an_answer_with_a_limit(change):
    with pytest.raises(ValueError, match="task rewrite: "):
        dataclasses.replace(REWRITE, **change)


REAL = os.environ.get("GLUE_DIR", "")
real_files = pytest.mark.skipif(not os.path.exists(f"{REAL}/cruxeval.jsonl"), reason="GLUE_DIR does not name a folder with cruxeval.jsonl")


@real_files
@pytest.mark.parametrize("name, sizes", [("cruxeval_o", (400, 400)), ("cruxeval_i", (400, 400)), ("mbpp", (487, 487))])
def test_the_real_files_are_read_whole(name, sizes):
    train_rows, dev, _ = data.load_task(name, REAL)
    assert (len(train_rows), len(dev["test"])) == sizes
    ids = {fields["task_id"] for fields, _ in train_rows + dev["test"]}
    assert len(ids) == sum(sizes)
    for _, answer in train_rows + dev["test"]:
        assert data.same_answer(data.TASKS[name], answer, answer)


# --- the sample and the command line ---------------------------------------------------------------------------


def test_the_verdict_follows_from_the_words_and_the_frozen_model_has_read_all_of_its_own():
    text = data.pretraining_text(2000)
    for (fields, answer), (again, label) in zip(sum(data.rewrite_sample(), []), sum(data.sst2_sample(), [])):
        word = answer.removeprefix(" It was ").removesuffix(" .")
        assert fields == again and word in data.ADJECTIVES[label] and f"It was {word} ." in text
        kind = data.kind_of_sentence(fields)
        assert ("negated" in kind) == (word in ("bad", "good"))


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "rewrite"
    train.main(["--task", "rewrite", "--method", "full", "--epochs", "2", "--quiet", "--out", str(out)])
    return out


def test_a_run_leaves_completions_accuracy_and_loss(finished):
    result = json.loads((finished / "result.json").read_text())
    lines = [json.loads(line) for line in (finished / "completions.jsonl").read_text().splitlines()]
    dev = data.rewrite_sample()[1]
    assert [line["task_id"] for line in lines] == list(range(872)) and lines[0].keys() == {"task_id", "completion"}
    right = [line["completion"] == answer for line, (_, answer) in zip(lines, dev)]
    assert result["accuracy"] == pytest.approx(sum(right) / 872) and result["accuracy"] > 0.9 > 0.3 > result["majority"]
    assert 0 < result["loss"] < 0.2 and "linear_probe" not in result and len(result["accuracy_by_kind"]) == 4


def test_predict_prints_the_answer(finished, capsys):
    train.main(["--adapter", str(finished), "--predict", "the plot is not dull"])
    assert capsys.readouterr().out == 'answer\tsentence\n" It was good ."\t"the plot is not dull"\n'
    code = "def f(x):\n\treturn x"                                      # a text of several lines is given in JSON
    train.main(["--adapter", str(finished), "--predict", json.dumps(code)])
    assert json.loads(capsys.readouterr().out.splitlines()[1].split("\t")[1]) == code


def test_predict_names_the_line_of_a_badly_escaped_text(finished, tmp_path, capsys):
    (tmp_path / "texts").write_text('"the plot"\n"a \\q"\n')
    with pytest.raises(SystemExit) as stopped:
        train.main(["--adapter", str(finished), "--predict", str(tmp_path / "texts")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"{tmp_path}/texts, line 2: no JSON string" in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", ["--control blind", "--control shuffled", "--holdout 100", "--method dept", "--tune-encoder"])
def test_what_train_py_does_with_label_words_it_does_with_answers(tiny, tmp_path, flags):
    train.main(["--task", "rewrite", "--max-train", "300", "--epochs", "1", "--quiet", "--out", str(tmp_path), *flags.split()])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["num_scored"] == (100 if "holdout" in flags else 872) == len((tmp_path / "completions.jsonl").read_text().splitlines())


@real_files
def test_answers_that_do_not_fit_are_said_to_be_the_reason(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--task", "mbpp", "--data", REAL, "--out", str(tmp_path / "run")])
    assert "266 prompt and answer tokens leave no room for text in a context of 128" in capsys.readouterr().err
