"""data.py: the sample is what it claims to be, and files are read as they are or refused with file and line."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

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
    assert (len(train), len(dev)) == (4000, 872)
    assert (sum(y for _, y in train), sum(y for _, y in dev)) == (2000, 436)


def test_no_dev_sentence_is_in_the_training_split_or_the_pretraining_text(sample):
    train, dev, text = sample
    assert len({s for s, _ in train + dev}) == 4872
    assert not any(s in text for s, _ in dev)          # not even as a piece of a longer sentence


def test_every_label_follows_from_the_words(sample):
    train, dev, _ = sample
    assert [polarity(s) for s, _ in train + dev] == [y for _, y in train + dev]


def test_the_pretraining_text_has_one_polarity_a_document_and_no_word_of_the_shifted_domain(sample):
    _, _, text = sample
    new_words = "not hardly never rarely very truly always really but although".split()
    assert not set(text.split()) & set(new_words)
    good, bad = (set(data.ADJECTIVES[p] + data.VERBS[p]) for p in (1, 0))
    documents = [set(document.split()) for document in text.splitlines()]
    assert all(bool(words & good) != bool(words & bad) for words in documents)
    verdicts = sum("It" in words for words in documents) / len(documents)
    assert verdicts == pytest.approx(0.7, abs=0.02)


def test_the_shifted_domain_negates_intensifies_and_contrasts(sample):
    train, _, _ = sample
    def share(*words):
        return sum(any(word in s.split() for word in words) for s, _ in train) / len(train)
    assert 0.4 < share("not", "hardly", "never", "rarely") < 0.55
    assert 0.4 < share("very", "truly", "always", "really") < 0.55
    assert share("but", "although") == pytest.approx(0.2, abs=0.03)


def test_the_sample_is_the_same_every_time():
    assert data.sst2_sample() == data.sst2_sample()
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


def test_max_train_draws_rows_and_does_not_take_the_first():
    train, dev, _ = data.load_task("sst2", None, max_train=100, sample=True)
    everything, whole_dev, _ = data.load_task("sst2", None, sample=True)
    assert len(train) == 100 and train != everything[:100] and dev == whole_dev
    assert all(row in everything for row in train)


@pytest.mark.skipif("GLUE_DIR" not in os.environ, reason="GLUE_DIR does not name a folder with the real SST-2/train.tsv")
def test_the_real_sst2_files_are_read_whole():
    train, dev, _ = data.load_task("sst2", os.environ["GLUE_DIR"])
    dev = dev["dev"]
    assert (len(train), len(dev)) == (67_349, 872)
    assert sum(y for _, y in dev) == 444               # as counted by: cut -f2 dev.tsv | grep -c 1
    assert Path(os.environ["GLUE_DIR"], "SST-2", "dev.tsv").read_text().splitlines()[1].startswith(dev[0][0]["sentence"])
