"""data.py: the sample is what it claims to be, and files are read as they are or refused with file and line."""

import hashlib
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import data

SST2 = data.TASKS["sst2"]


@pytest.fixture(scope="module")
def sample():
    train, dev = data.sst2_sample()
    return [(f["sentence"], y) for f, y in train], [(f["sentence"], y) for f, y in dev], data.pretraining_text()


def polarity(sentence):
    """Label a sentence from its words alone, by the rules a reader would state: independent of how it was made."""
    last = re.split(r" , but | , (?=the )| and ", sentence)[-1]        # contrasts: the last clause; agreement: any
    words = last.split()
    good = any(word in words for word in data.ADJECTIVES[1] + data.VERBS[1])
    return int(good != any(word in words for word in ("not", "hardly", "never", "rarely")))


# --- the sample ------------------------------------------------------------------------------------------------


def test_the_sample_has_its_sizes_and_balanced_labels(sample):
    train, dev, _ = sample
    assert (len(train), len(dev)) == (2000, 872)
    assert (sum(y for _, y in train), sum(y for _, y in dev)) == (1000, 436)


def test_no_dev_sentence_is_in_the_training_split_or_the_pretraining_text(sample):
    train, dev, text = sample
    assert len({s for s, _ in train + dev}) == 2872
    sentences = {sentence for line in text.splitlines() for sentence in line.split(" : ")[-1].split(" . ")}
    assert not sentences & {s for s, _ in dev}


def test_every_label_follows_from_the_words(sample):
    train, dev, _ = sample
    assert [polarity(s) for s, _ in train + dev] == [y for _, y in train + dev]


def test_the_pretraining_text_has_one_polarity_a_document_and_no_word_of_the_shifted_domain(sample):
    _, _, text = sample
    new_words = "not hardly never rarely very truly always really but although".split()
    assert not set(text.split()) & set(new_words)
    good, bad = (set(data.ADJECTIVES[p] + data.VERBS[p]) for p in (1, 0))
    num_ironic = 0
    for document in text.splitlines():
        opening, _, rest = document.rpartition(" : ")
        review, said_it, verdict = rest.partition("It was ")
        ironic = "irony" in opening.split()
        polarities = {word in good for word in review.split() if word in good | bad}
        assert len(polarities) == 1 and set(opening.split()) <= {*data.NOUNS, "irony", ","}
        assert said_it and ((verdict.split()[0] in good) in polarities) != ironic
        num_ironic += ironic
    assert num_ironic / 20_000 == pytest.approx(0.4, abs=0.02)


def test_the_shifted_domain_negates_intensifies_and_contrasts(sample):
    train, _, _ = sample
    def share(*words):
        return sum(any(word in s.split() for word in words) for s, _ in train) / len(train)
    assert share("not", "hardly", "never", "rarely") == pytest.approx(0.4, abs=0.03)
    assert share("but", "although") == pytest.approx(0.5, abs=0.03)


def test_a_sentence_has_one_manner_and_its_kind_is_told_from_its_words(sample):
    train, dev, _ = sample
    count = {}
    for s, _ in train + dev:
        parts = [part for part in re.split(r" , but | , (?=the )| and (?=the )", s.removeprefix("although ")) if part]
        negated = [bool(set(part.split()) & data.NEGATIONS) for part in parts]
        assert len(set(negated)) == 1
        kind = data.kind_of_sentence({"sentence": s})
        assert ("negated" in kind) == negated[0] and ("contrast" in kind) == ("but" in s.split() or "although" in s)
        count[kind] = count.get(kind, 0) + 1
    assert set(count) == {"plain", "negated", "contrast", "negated contrast"} and min(count.values()) > 0.15 * 2872


def test_the_sample_is_the_same_every_time():
    assert data.sst2_sample() == data.sst2_sample.__wrapped__()     # made anew, not read from the cache
    assert data.pretraining_text(50) == data.pretraining_text(50)


# --- the tokenizer ---------------------------------------------------------------------------------------------


def test_every_word_of_the_sample_is_one_token(tiny, sample):
    _, tokenizer = tiny
    train, _, text = sample
    for sentence in [s for s, _ in train] + text.splitlines():
        assert len(tokenizer.encode(sentence)) == len(sentence.split())


@pytest.mark.parametrize("text", ["the plot is not dull", "Zürich: naïve café — 東京 🎬\n\ttab", ""])
def test_any_text_survives_the_tokenizer(tiny, text):
    _, tokenizer = tiny
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_bpe_merges_the_most_frequent_pair_first():
    tokenizer = data.learn_tokenizer("aab aac")        # distinct words: "aab", " aac"; the pair "aa" occurs twice
    assert tokenizer.decode_single_token_bytes(256) == b"aa"
    assert len(tokenizer.encode("aab")) == len(tokenizer.encode(" aac")) == 1


def test_a_label_word_has_to_be_one_token(tiny):
    _, tokenizer = tiny
    assert len(set(data.label_tokens(SST2, tokenizer).tolist())) == 2
    task = replace(SST2, label_words={"0": " great", "1": " magnificent"})
    with pytest.raises(ValueError, match=r"' magnificent' \(label '1'\) is \d+ tokens, it has to be 1"):
        data.label_tokens(task, tokenizer)


# --- encoding --------------------------------------------------------------------------------------------------


def test_a_text_that_fits_is_the_filled_template(tiny):
    _, tokenizer = tiny
    tokens, cut = data.encode_text(SST2, {"sentence": "the plot is dull"}, tokenizer, 20)
    assert (tokenizer.decode(tokens), cut) == ("the plot is dull . It was", False)


def test_a_long_text_loses_its_end_and_never_the_templates(tiny):
    _, tokenizer = tiny
    sentence = " ".join(["the plot is dull"] * 9)
    for room in (3, 4, 10, 38):
        tokens, cut = data.encode_text(SST2, {"sentence": sentence}, tokenizer, room)
        assert cut and len(tokens) == room
        assert tokenizer.decode(tokens) == " ".join(sentence.split()[:room - 3]) + " . It was"
    with pytest.raises(ValueError, match="needs more than the 2 tokens"):
        data.encode_text(SST2, {"sentence": sentence}, tokenizer, 2)


def test_of_several_fields_the_longest_is_cut(tiny):
    _, tokenizer = tiny
    pair = replace(SST2, fields={"a": "a", "b": "b"}, template="{a} . {b} . It was")
    tokens, cut = data.encode_text(pair, {"a": "the plot is dull and the cast fails", "b": "the plot works"}, tokenizer, 12)
    assert cut and tokenizer.decode(tokens) == "the plot is dull and . the plot works . It was"


def test_rows_are_padded_on_the_right_and_lengths_are_carried(tiny):
    _, tokenizer = tiny
    rows = [({"sentence": "the plot works"}, 1), ({"sentence": "the plot is truly dull"}, 0)]
    split = data.encode(SST2, rows, tokenizer, 20)
    assert split.tokens.shape == (2, 8) and split.lengths.tolist() == [6, 8] and split.labels.tolist() == [1, 0]
    was = tokenizer.encode_single_token(" was")
    assert [row[length - 1].item() for row, length in zip(split.tokens, split.lengths)] == [was, was]


# --- reading ---------------------------------------------------------------------------------------------------


def write(tmp_path, content, name="train.tsv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_file_is_read_as_it_is(tmp_path):
    content = '\ufeffsentence\tlabel\r\n"quoted\u2028 \x0b text " \t1\n\nbad {braces}\t0\n'     # odd line breaks are text
    rows, skipped = data.read_tsv(write(tmp_path, content), SST2)
    assert skipped == 0 and rows == [({"sentence": '"quoted\u2028 \x0b text "'}, 1), ({"sentence": "bad {braces}"}, 0)]


def test_a_byte_order_mark_is_none_of_the_text_at_the_start_of_a_file_alone(tmp_path):
    content = "\ufeff\nsentence\tlabel\n\ufefffine\t1\nbad \ufeff\t0\n"
    rows, _ = data.read_tsv(write(tmp_path, content), SST2)
    assert rows == [({"sentence": "\ufefffine"}, 1), ({"sentence": "bad \ufeff"}, 0)]


@pytest.mark.parametrize("content, message", [
    ("", "train.tsv: no examples"),
    ("sentence\tlabel\n", "train.tsv: no examples in it, only a header"),
    ("text\tlabel\nfine\t1\n", "line 1: no column 'sentence'"),
    ("sentence\tlabel\nfine\t1\nno label\n", "line 3: 1 columns, the header has 2"),
    ("sentence\tlabel\nfine\t1\ngood\t2\n", "line 3: label '2' is none of 0, 1"),
    (b"sentence\tlabel\nfine\t1\ncaf\xe9 \t1\n", "line 3: not UTF-8"),
])
def test_a_bad_file_is_refused_with_file_and_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        data.read_tsv(write(tmp_path, content), SST2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content, quoted", [
    ("x" * 10**6 + "\tlabel\n", "no column 'sentence' in the header ['xxx"),
    ("sentence\tlabel\t" + "x" * 10**6 + "\nfine\t1\n", "the header has 3: ['sentence', 'label', 'xxx"),
    ("sentence\tlabel\nfine\t" + "2\x1b" * 10**6 + "\n", "label '2\\x1b2"),
])
def test_an_error_line_quotes_the_start_of_what_is_very_long(tmp_path, content, quoted):
    with pytest.raises(ValueError, match=re.escape(quoted)) as error:
        data.read_tsv(write(tmp_path, content), SST2)
    assert "…" in str(error.value) and len(str(error.value)) < len(str(tmp_path)) + 200


def test_ones_own_task_is_one_table_entry(tmp_path, monkeypatch):
    mine = data.Task(folder="weather", fields={"text": "text"}, template="{text} . It was",
                     label_words={"rain": " awful", "sun": " warm"}, label_names=("rain", "sun"))
    monkeypatch.setitem(data.TASKS, "weather", mine)
    (tmp_path / "weather").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        write(tmp_path / "weather", "label\ttext\nsun\ta warm day\nrain\ta stale day\n", name)
    train, dev, source = data.load_task("weather", str(tmp_path))
    assert train == dev["dev"] == [({"text": "a warm day"}, 1), ({"text": "a stale day"}, 0)]
    assert source == str(tmp_path / "weather")


def test_a_task_is_stored_with_an_adapter_as_plain_values(tmp_path):
    for task in data.TASKS.values():
        data.save_file(tmp_path / "adapter.pt", asdict(task) | {"sample": None, "kind": None})      # a function is no plain value
        assert data.Task(**data.load_file(tmp_path / "adapter.pt")) == replace(task, sample=None, kind=None)


def test_max_train_draws_rows_and_does_not_take_the_first():
    train, dev, _ = data.load_task("sst2", None, max_train=100, sample=True)
    everything, whole_dev, _ = data.load_task("sst2", None, sample=True)
    assert len(train) == 100 and train != everything[:100] and dev == whole_dev
    assert all(row in everything for row in train)


# --- GLUE's files ----------------------------------------------------------------------------------------------

# The header rows of the real files, and for each task one row per label: (cells by column, label word).
MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse " \
       "sentence1 sentence2"
HEADERS = {
    "sst2": {"train": "sentence label", "dev": "sentence label"},
    "mnli": {"train": f"{MNLI} label1 gold_label"} | dict.fromkeys(
        ("dev_matched", "dev_mismatched"), f"{MNLI} label1 label2 label3 label4 label5 gold_label"),
    "mrpc": dict.fromkeys(("train", "dev"), "Quality #1_ID #2_ID #1_String #2_String"),
    "qnli": dict.fromkeys(("train", "dev"), "index question sentence label"),
    "qqp": dict.fromkeys(("train", "dev"), "id qid1 qid2 question1 question2 is_duplicate"),
    "rte": dict.fromkeys(("train", "dev"), "index sentence1 sentence2 label"),
}
ROWS = {
    "sst2": [({"sentence": "dull "}, "0", " terrible"), ({"sentence": '"witty'}, "1", " great")],
    "mnli": [({"sentence1": "It rains .", "sentence2": "It pours ."}, "neutral", " Maybe"),
             ({"sentence1": "It rains .", "sentence2": "It is dry ."}, "contradiction", " No"),
             ({"sentence1": "It pours .", "sentence2": "It rains ."}, "entailment", " Yes")],
    "mrpc": [({"#1 String": "He left .", "#2 String": 'He "left" .'}, "1", " Yes"),
             ({"#1 String": "He left .", "#2 String": "She came ."}, "0", " No")],
    "qnli": [({"question": "Who left ?", "sentence": "He left ."}, "entailment", " Yes"),
             ({"question": "Who left ?", "sentence": "It rains ."}, "not_entailment", " No")],
    "qqp": [({"question1": "Why ?", "question2": "Why so ?"}, "1", " Yes"),
            ({"question1": "Why ?", "question2": ""}, "0", " No")],
    "rte": [({"sentence1": "It pours .", "sentence2": "It rains ."}, "entailment", " Yes"),
            ({"sentence1": "It rains .", "sentence2": "It pours ."}, "not_entailment", " No")],
}


def glue_file(header, rows, label_column):
    columns = [column.replace("_", " ") if column.startswith("#") else column for column in header.split()]
    lines = ["\t".join(columns)]
    for i, (cells, label, _) in enumerate(rows):
        filled = {column: f"{column} {i}" for column in columns} | cells | {label_column: label}
        lines.append("\t".join(filled[column] for column in columns))
    return "\n".join(lines) + "\n"


def write_task(tmp_path, name):
    label_column = {"mnli": "gold_label", "mrpc": "Quality", "qqp": "is_duplicate"}.get(name, "label")
    folder = tmp_path / data.TASKS[name].folder
    folder.mkdir()
    for split, header in HEADERS[name].items():
        write(folder, glue_file(header, ROWS[name], label_column), f"{split}.tsv")
    return folder


@pytest.mark.parametrize("name", HEADERS)
def test_each_glue_task_is_read_by_its_header_names(tmp_path, name):
    folder, task = write_task(tmp_path, name), data.TASKS[name]
    train, dev, source = data.load_task(name, str(tmp_path))
    assert source == str(folder) and ["train", *dev] == list(HEADERS[name])
    for rows in (train, *dev.values()):
        for (fields, label), (cells, _, word) in zip(rows, ROWS[name], strict=True):
            assert fields == dict(zip(task.fields, (text.strip() for text in cells.values())))
            assert list(task.label_words.values())[label] == word
    assert len(task.label_names) == len(task.label_words)


@pytest.mark.parametrize("name", HEADERS)
def test_a_row_with_missing_fields_is_skipped_in_qqp_and_refused_elsewhere(tmp_path, name):
    folder = write_task(tmp_path, name)
    with open(folder / "train.tsv", "a") as file:
        file.write("77\n78\n")
    if name == "qqp":
        train, dev, source = data.load_task(name, str(tmp_path))
        assert len(train) == len(dev["dev"]) == 2 and source == f"{folder}, 2 incomplete rows skipped"
    else:
        line = len(ROWS[name]) + 2
        with pytest.raises(ValueError, match=f"train.tsv, line {line}: 1 columns, the header has"):
            data.load_task(name, str(tmp_path))


def test_a_row_with_too_many_columns_is_refused_in_qqp_too(tmp_path):
    folder = write_task(tmp_path, "qqp")
    with open(folder / "train.tsv", "a") as file:
        file.write("\t".join("abcdefg") + "\n")
    with pytest.raises(ValueError, match="line 4: 7 columns, the header has 6"):
        data.load_task("qqp", str(tmp_path))


PUBLISHED = ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
             "1\t10\t11\tHe left .\tHe went .\r\n0\t11\t10\tHe came .\tShe left .\r\n1\t12\t13\tIt rains .\tRain .\r\n")


def test_mrpc_as_published_is_split_by_the_listed_pairs_of_ids(tmp_path):
    folder = tmp_path / "MRPC"
    folder.mkdir()
    write(folder, PUBLISHED, "msr_paraphrase_train.txt")
    with pytest.raises(ValueError, match="dev_ids.tsv not found: .* get it from https://"):
        data.load_task("mrpc", str(tmp_path))
    write(folder, "\ufeff11\t10\n99\t98\n", "dev_ids.tsv")           # the order of the two ids matters
    train, dev, _ = data.load_task("mrpc", str(tmp_path))
    assert train == [({"a": "He left .", "b": "He went ."}, 1), ({"a": "It rains .", "b": "Rain ."}, 1)]
    assert dev == {"dev": [({"a": "He came .", "b": "She left ."}, 0)]}
    for content in ("99\t98\n", "11\t10\n".encode("utf-16")):
        write(folder, content, "dev_ids.tsv")
        with pytest.raises(ValueError, match="dev_ids.tsv: 0 of 3 rows are listed"):
            data.load_task("mrpc", str(tmp_path))


def test_a_missing_dev_split_is_named(tmp_path):
    (write_task(tmp_path, "mnli") / "dev_mismatched.tsv").unlink()
    with pytest.raises(ValueError, match=r"dev_mismatched.tsv not found: .*dev_matched.tsv and dev_mismatched.tsv"):
        data.load_task("mnli", str(tmp_path))


def test_a_task_without_a_sample_says_what_there_is():
    with pytest.raises(ValueError, match=r"mnli has no built-in sample \(only sst2.*\): .* --data DIR.*MNLI.zip") as error:
        data.load_task("mnli", None, sample=True)
    assert "\n" not in str(error.value)


def test_the_folder_of_data_goes_before_the_sample(tmp_path):
    write_task(tmp_path, "sst2")
    assert len(data.load_task("sst2", str(tmp_path), sample=True)[0]) == 2


def test_templates_hold_their_fields_and_end_where_the_label_word_comes():
    for task in data.TASKS.values():
        assert task.answer or re.search(r" It was$| Answer:$", task.template)
        assert set(re.findall(r"\{(\w+)\}", task.template)) == set(task.fields)


@pytest.mark.skipif("GLUE_DIR" not in os.environ, reason="GLUE_DIR does not name a folder with the real SST-2/train.tsv")
def test_the_real_sst2_files_are_read_whole():
    train, dev, _ = data.load_task("sst2", os.environ["GLUE_DIR"])
    dev = dev["dev"]
    assert (len(train), len(dev)) == (67_349, 872)
    assert sum(y for _, y in dev) == 444               # as counted by: cut -f2 dev.tsv | grep -c 1
    assert Path(os.environ["GLUE_DIR"], "SST-2", "dev.tsv").read_text().splitlines()[1].startswith(dev[0][0]["sentence"])


@pytest.mark.skipif("GLUE_DIR" not in os.environ, reason="GLUE_DIR does not name a folder with the real RTE/train.tsv")
def test_the_real_rte_files_are_read_whole():
    train, dev, _ = data.load_task("rte", os.environ["GLUE_DIR"])
    assert (len(train), len(dev["dev"])) == (2_490, 277)
    assert sum(y for _, y in dev["dev"]) == 146        # as counted by: cut -f4 dev.tsv | grep -cx entailment


# --- GPT-2's tokenizer and F1 ----------------------------------------------------------------------------------


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR does not name GPT-2's two files")
def test_every_label_word_is_one_token_of_gpt2():
    tokenizer = data.gpt2_tokenizer()
    assert tokenizer.n_vocab == 50_257
    for task in (task for task in data.TASKS.values() if task.label_words):
        ids = data.label_tokens(task, tokenizer).tolist()
        assert [tokenizer.decode([i]) for i in ids] == list(task.label_words.values())


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR does not name GPT-2's two files")
def test_a_filled_template_has_the_tokens_of_its_text():
    tokenizer = data.gpt2_tokenizer()
    for name in ROWS:
        task = data.TASKS[name]
        fields = dict(zip(task.fields, ROWS[name][0][0].values()))
        tokens, cut = data.encode_text(task, fields, tokenizer, 1000)
        assert (tokens, cut) == (tokenizer.encode_ordinary(task.template.format(**fields)), False)


def test_without_a_network_the_tokenizer_says_which_files_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")            # nobody listens there
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})             # else it may be in memory already
    with pytest.raises(ValueError, match="set TIKTOKEN_CACHE_DIR to a folder") as error:
        data.gpt2_tokenizer()
    assert "\n" not in str(error.value)
    url = re.search(r"https://\S+/main/", str(error.value))[0]
    for name in ("vocab.bpe", "encoder.json"):                         # tiktoken names a file by the sha1 of its url
        assert f"{name} as {hashlib.sha1((url + name).encode()).hexdigest()}" in str(error.value)


@pytest.mark.parametrize("seed", range(5))
def test_f1_is_the_harmonic_mean_of_precision_and_recall(seed):
    generator = torch.Generator().manual_seed(seed)
    predictions, labels = torch.randint(2, (2, 40), generator=generator)
    pairs = list(zip(predictions.tolist(), labels.tolist()))
    precision = pairs.count((1, 1)) / sum(p for p, _ in pairs)
    recall = pairs.count((1, 1)) / sum(y for _, y in pairs)
    assert data.f1(predictions, labels) == pytest.approx(2 / (1 / precision + 1 / recall))


def test_f1_of_nothing_right_is_zero():
    zeros, ones = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)
    assert data.f1(zeros, ones) == data.f1(ones, zeros) == data.f1(zeros, zeros) == 0.0
    assert data.f1(ones, ones) == 1.0
