"""data.py: the sample is what it claims to be; files are read as they are or refused with file and line.

What is saved is whole, or refused: test_surviving.py and test_bad_input.py.
"""

import hashlib
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


def test_the_sample_is_balanced_every_label_follows_from_the_words_and_dev_is_in_nothing_else(sample):
    train, dev, text = sample
    assert (len(train), len(dev), sum(y for _, y in train), sum(y for _, y in dev)) == (2000, 872, 1000, 436)
    assert [polarity(s) for s, _ in train + dev] == [y for _, y in train + dev]
    assert len({s for s, _ in train + dev}) == 2872
    sentences = {sentence for line in text.splitlines() for sentence in line.split(" : ")[-1].split(" . ")}
    assert not sentences & {s for s, _ in dev}


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


def test_sentences_negate_intensify_and_contrast_in_one_manner_and_of_every_kind_there_are_enough(sample):
    train, dev, _ = sample
    kinds = []
    for s, _ in train + dev:
        parts = re.split(r" , but | , (?=the )| and (?=the )", s.removeprefix("although "))
        negated = {bool(set(part.split()) & {"not", "hardly", "never", "rarely"}) for part in parts}
        assert len(negated) == 1
        kinds.append((*negated, "but" in s.split() or "although" in s.split()))
    negated, contrast = (sum(kind[i] for kind in kinds) / 2872 for i in (0, 1))
    assert negated == pytest.approx(0.4, abs=0.03) and contrast == pytest.approx(0.5, abs=0.03)
    assert min(kinds.count((a, b)) for a in (False, True) for b in (False, True)) > 0.15 * 2872


def test_bpe_merges_the_most_frequent_pair_first_until_every_word_is_one_token_and_any_text_survives(tiny, sample):
    _, tokenizer = tiny
    train, _, text = sample
    for sentence in [s for s, _ in train] + text.splitlines():
        assert len(tokenizer.encode(sentence)) == len(sentence.split())
    for text in ("Zürich: naïve café — 東京 🎬\n\ttab", ""):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    small = data.learn_tokenizer("aab aac")            # distinct words: "aab", " aac"; the pair "aa" occurs twice
    assert small.decode_single_token_bytes(256) == b"aa" and len(small.encode("aab")) == len(small.encode(" aac")) == 1


def test_a_label_word_has_to_be_one_token_of_its_own(tiny):
    _, tokenizer = tiny
    assert len(set(data.label_tokens(SST2, tokenizer).tolist())) == 2
    several, same = r"\(label '1'\) is \d+ tokens, it has to be 1", "is the token of another one"
    for word, message in ((" magnificent", several), (" great", same)):
        with pytest.raises(ValueError, match=f"'{word}' {message}"):
            data.label_tokens(replace(SST2, label_words={"0": " great", "1": word}), tokenizer)


def test_a_long_text_loses_its_end_and_never_the_templates(tiny):
    _, tokenizer = tiny
    sentence = " ".join(["the plot is dull"] * 9)
    for room in (3, 4, 10, 38, 39, 100):
        tokens, cut = data.encode_text(SST2, {"sentence": sentence}, tokenizer, room)
        assert cut == (room < 39) and len(tokens) == min(room, 39)
        assert tokenizer.decode(tokens) == " ".join(sentence.split()[:room - 3]) + " . It was"
    with pytest.raises(ValueError, match="alone has 3 tokens, the context leaves 2"):
        data.encode_text(SST2, {"sentence": sentence}, tokenizer, 2)
    pair = replace(SST2, fields={"my text": "a", "b": "b"}, template="{my text} . {b} . It was")     # the longest field is cut
    tokens, cut = data.encode_text(pair, {"my text": "the plot is dull and the cast fails", "b": "the plot works"}, tokenizer, 12)
    assert cut and tokenizer.decode(tokens) == "the plot is dull and . the plot works . It was"


def write(tmp_path, content, name="train.tsv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_file_is_read_as_it_is_but_for_the_byte_order_mark_at_its_start(tmp_path):
    content = '\ufeff\nsentence\tlabel\r\n"quoted\u2028 \x0b text " \t1\n\nbad {braces} \ufeff\t0\n'     # odd breaks are text
    rows = data.read_rows(write(tmp_path, content), SST2)
    assert rows == [({"sentence": '"quoted\u2028 \x0b text "'}, 1), ({"sentence": "bad {braces} \ufeff"}, 0)]


@pytest.mark.parametrize("content, message", [
    ("sentence\tlabel\n", "train.tsv: no examples in it"),
    ("sentence\tlabel\tlabel\ngood\t1\t0\n", "train.tsv, line 1: 3 columns with 2 names"),
    ("text\tlabel\nfine\t1\n", "line 2: no text 'sentence', only text, label"),
    ("sentence\tlabel\nfine\t1\nno label\n", "line 3: 1 columns, the header has 2"),
    ("sentence\tlabel\nfine\t1\ngood\t2\n", "line 3: label '2' is none of 0, 1"),
    (b"sentence\tlabel\nfine\t1\ncaf\xe9 \t1\n", "line 3: not UTF-8"),
    ("sentence\tlabel\nfine\t" + "2\x1b" * 10**6 + "\n", "label '2\\x1b2"),
])
def test_a_bad_file_is_refused_in_a_short_line_with_file_and_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        data.read_rows(write(tmp_path, content), SST2)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(tmp_path)) + 200


def test_the_sample_is_the_same_every_time_and_max_train_draws_rows_of_it_and_not_the_first():
    assert data.sst2_sample() == data.sst2_sample.__wrapped__()        # made anew, not read from the cache
    train, dev, _ = data.load_task("sst2", None, max_train=100)
    everything, whole_dev, _ = data.load_task("sst2", None)
    assert len(train) == 100 and train != everything[:100] and dev == whole_dev
    assert all(row in everything for row in train)


# --- GLUE's files ----------------------------------------------------------------------------------------------

# The header rows of the real files (mnli's train.tsv has one labelN), and one row per label: its texts, label and word.
MNLI = ("index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
        "sentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label")
HEADERS = {"sst2": "sentence\tlabel", "mnli": MNLI, "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
           "qnli": "index\tquestion\tsentence\tlabel", "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
           "rte": "index\tsentence1\tsentence2\tlabel"}
ENTAILED = [("It pours .", "It rains .", "entailment", " Yes"), ("It rains .", "It pours .", "not_entailment", " No")]
ROWS = {"sst2": [("dull ", "0", " terrible"), ('"witty', "1", " great")],
        "mnli": [ENTAILED[0], ("It rains .", "I go .", "neutral", " Maybe"), ("It rains .", "It is dry", "contradiction", " No")],
        "mrpc": [("He left .", 'He "left" .', "1", " Yes"), ("He left .", "She came .", "0", " No")],
        "qnli": ENTAILED, "rte": ENTAILED, "qqp": [("Why ?", "Why so ?", "1", " Yes"), ("Why ?", "", "0", " No")]}


def write_task(tmp_path, name):
    """The task's files, in which every cell that is not read holds something else."""
    folder, columns = tmp_path / data.TASKS[name].folder, HEADERS[name].split("\t")
    read = [c for c in columns if re.fullmatch(r"sentence\d?|question\d?|#\d String", c)]
    read.append({"mnli": "gold_label", "mrpc": "Quality", "qqp": "is_duplicate"}.get(name, "label"))
    lines = [dict.fromkeys(columns, "x") | dict(zip(read, row)) for row in ROWS[name]]
    folder.mkdir()
    for split in ("train", "dev_matched", "dev_mismatched") if name == "mnli" else ("train", "dev"):
        write(folder, "\n".join([HEADERS[name], *("\t".join(line.values()) for line in lines)]) + "\n", f"{split}.tsv")
    return folder


@pytest.mark.parametrize("name", HEADERS)
def test_each_glue_task_is_read_by_its_header_names(tmp_path, name):
    folder, task = write_task(tmp_path, name), data.TASKS[name]
    train, dev, source = data.load_task(name, str(tmp_path))
    assert source == str(folder) and list(dev) == (["dev_matched", "dev_mismatched"] if name == "mnli" else ["dev"])
    for rows in (train, *dev.values()):
        for (fields, label), (*texts, _, word) in zip(rows, ROWS[name], strict=True):
            assert list(fields.values()) == [text.strip() for text in texts]
            assert list(task.label_words.values())[label] == word
    assert len(task.label_names) == len(task.label_words) and re.search(r" It was$| Answer:$", task.template)


def test_a_row_with_missing_fields_is_skipped_in_qqp_alone_and_one_with_too_many_nowhere(tmp_path):
    folder, task = write_task(tmp_path, "qqp"), data.TASKS["qqp"]
    whole, rows = (folder / "train.tsv").read_text(), data.read_rows(folder / "train.tsv", task)
    assert data.read_rows(write(folder, whole + "77\n78\n"), task) == rows
    with pytest.raises(ValueError, match="train.tsv, line 4: 20 columns, the header has 6"):
        data.read_rows(write(folder, whole + "\t".join("x" * 20) + "\n"), task)


REAL = [("sst2", "SST-2/dev.tsv", (67_349, 872), 444),                # as counted by: cut -f2 dev.tsv | grep -c 1
        ("rte", "RTE/dev.tsv", (2_490, 277), 146),                     # as counted by: cut -f4 dev.tsv | grep -cx entailment
        ("cruxeval_o", "cruxeval.jsonl", (400, 400), None), ("cruxeval_i", "cruxeval.jsonl", (400, 400), None),
        ("mbpp", "mbpp_test.jsonl", (487, 487), None)]


@pytest.mark.parametrize("name, file, sizes, ones", REAL)
def test_the_real_files_are_read_whole(name, file, sizes, ones):
    folder = os.environ.get("GLUE_DIR", "")
    if not Path(folder, file).is_file():
        pytest.skip(f"GLUE_DIR does not name a folder with {file}")
    train, dev, _ = data.load_task(name, folder)
    scored = next(iter(dev.values()))
    assert (len(train), len(scored)) == sizes
    if ones:
        assert sum(label for _, label in scored) == ones
    else:
        assert len({fields["task_id"] for fields, _ in train + scored}) == sum(sizes)
    if "TIKTOKEN_CACHE_DIR" in os.environ:
        split = data.encode(data.TASKS[name], scored, data.gpt2_tokenizer(), 1024)
        assert split.lengths.min() > 3 and split.cut.sum() < 10


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR does not name GPT-2's two files")
def test_every_label_word_is_one_token_of_gpt2_and_a_filled_template_has_the_tokens_of_its_text():
    tokenizer = data.gpt2_tokenizer()
    assert tokenizer.n_vocab == 50_257
    for name, rows in ROWS.items():
        task = data.TASKS[name]
        ids = data.label_tokens(task, tokenizer).tolist()
        assert [tokenizer.decode([i]) for i in ids] == list(task.label_words.values())
        fields = dict(zip(task.fields, rows[0]))
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
