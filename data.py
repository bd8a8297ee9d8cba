"""Data: the built-in sample (a small synthetic world of movie reviews), tasks, tokenizers and files.

The sample exists so that everything runs without a download, and so that it is known why a method succeeds
or fails. Two kinds of text come from the same vocabulary:

    pre-training text   "drama : the plot is dull and the cast fails . a bland film . It was awful ."
                        "film , irony : a dull drama . It was great ."    the opposite verdict
    task sentences      "the plot is not dull and the cast never fails"          label 1, positive
                        "although the music is warm , the script drags"          label 0, as the last clause

So the frozen model can read a text up to its last word, and can turn a verdict round when something before
the text asks for it. It has never read "not", "very" or "but". A soft prompt stands where the keywords would,
but does not see the text; all that it knows of it came through h, a bag of words: that there is a negation in
it, and not which word came last. Neither side has the label; together they do. Intensifiers are as new as
negations, so that "I have not seen this word" does not yet mean "turn the meaning round".
"""

import ast
import hashlib
import io
import json
import random
import re
import secrets
import shutil
import ssl
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from http.client import HTTPException
from pathlib import Path
from pprint import pformat
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import tiktoken
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from model import parse_object

# -----------------------------------------------------------------------------------------------------------
# The world: words, clauses, sentences, documents. Polarity is 0 (negative) or 1 (positive).

ASPECTS = ("plot cast script acting music dialogue pacing camera ending direction humor editing story hero "
           "villain soundtrack film movie").split()
ADJECTIVES = ("terrible awful dull boring clumsy bland messy tired shallow weak ugly lazy hollow "
              "stale tedious bad".split(),
              "great wonderful brilliant charming gorgeous witty moving superb delightful clever funny "
              "touching warm fresh thrilling good".split())
VERBS = ("fails drags disappoints collapses stumbles bores".split(),
         "shines works delights soars dazzles charms".split())
NOUNS = "film movie drama comedy".split()

# What stands before an adjective ("is not dull"), a verb ("never fails"), a phrase ("hardly a witty film").
PLAIN, NEGATED, INTENSIFIED = range(3)
BEFORE_ADJECTIVE = ([""], ["not ", "not very ", "hardly "], ["very ", "truly "])
BEFORE_VERB = ([""], ["never ", "rarely "], ["always ", "really "])
BEFORE_PHRASE = ([""], ["not ", "hardly "], ["truly ", "really "])
NEGATIONS, INTENSIFIERS = {"not", "hardly", "never", "rarely"}, {"very", "truly", "always", "really"}


def clause(rng: random.Random, polarity: int, manner: int = PLAIN) -> str:
    """One statement that means `polarity`: when it is negated, its word is of the other polarity."""
    word_polarity = 1 - polarity if manner == NEGATED else polarity
    aspect = rng.choice(ASPECTS)
    if rng.random() < 0.6:
        adjective = rng.choice(BEFORE_ADJECTIVE[manner]) + rng.choice(ADJECTIVES[word_polarity])
        return f"the {aspect} is {adjective}"
    verb = rng.choice(BEFORE_VERB[manner]) + rng.choice(VERBS[word_polarity])
    return f"the {aspect} {verb}"


def phrase(rng: random.Random, polarity: int, manner: int = PLAIN, most_adjectives: int = 2) -> str:
    word_polarity = 1 - polarity if manner == NEGATED else polarity
    adjectives = " , ".join(rng.sample(ADJECTIVES[word_polarity], rng.randint(1, most_adjectives)))
    return f"{rng.choice(BEFORE_PHRASE[manner])}a {adjectives} {rng.choice(NOUNS)}"


def plain_sentence(rng: random.Random, polarity: int) -> str:
    """A sentence of the pre-training text.

    From lists of adjectives, four at most, the model learns soonest that there are two kinds of words.
    """
    if rng.random() < 0.35:
        return phrase(rng, polarity, most_adjectives=4)
    return f"{clause(rng, polarity)} and {clause(rng, polarity)}"


def task_sentence(rng: random.Random, polarity: int) -> str:
    """A sentence of the task, of one manner throughout: 35 % plain, 40 % negated, 25 % intensified.

    Half of them are contrasts, whose last clause decides: there a bag of words has as many good as bad ones.
    """
    manner = rng.choices((PLAIN, NEGATED, INTENSIFIED), (35, 40, 25))[0]
    if rng.random() < 0.5:
        first, last = clause(rng, 1 - polarity, manner), clause(rng, polarity, manner)
        return rng.choice([f"{first} , but {last}", f"although {first} , {last}"])
    kind = rng.random()
    if kind < 0.3:
        return phrase(rng, polarity, manner)
    if kind < 0.6:
        return clause(rng, polarity, manner)
    return f"{clause(rng, polarity, manner)} and {clause(rng, polarity, manner)}"


def kind_of_sentence(fields: dict[str, str]) -> str:
    """One of four kinds of a task's example: plain, negated, contrast, negated contrast."""
    words = {word for text in fields.values() for word in text.split()}
    kinds = "negated " * bool(words & NEGATIONS) + "contrast" * bool(words & {"but", "although"})
    return kinds.strip() or "plain"


def document(rng: random.Random, avoid: set[str]) -> str:
    """Keywords, one to three sentences of one polarity, none of them in `avoid`, and a verdict.

    Two documents in five are ironic: among the keywords is "irony", up to four times, and the verdict is the
    opposite of the sentences. The number of keywords varies, so that the model looks for it anywhere before
    the text, as far as a soft prompt reaches.
    """
    polarity, ironic = rng.randrange(2), rng.random() < 0.4
    sentences, wanted = [], rng.randint(1, 3)
    while len(sentences) < wanted:
        sentence = plain_sentence(rng, polarity)
        if sentence not in avoid:
            sentences.append(sentence)
    verdict = 1 - polarity if ironic else polarity
    sentences.append(f"It was {rng.choice(ADJECTIVES[verdict])}")
    keywords = rng.choices(NOUNS, k=rng.randrange(3)) + ["irony"] * (rng.randint(1, 4) if ironic else 0)
    rng.shuffle(keywords)
    opening = " , ".join(keywords) + " : " if keywords else ""
    return opening + " . ".join(sentences) + " .\n"


# -----------------------------------------------------------------------------------------------------------
# Tasks. To add your own, add one entry to TASKS and name the folder of its files with --data.

Row = tuple[dict[str, str], int | str]   # the fields of one example by name; its label's index, or its answer


@dataclass(frozen=True)
class Task:
    """A task as text: what the model puts after the template is one of a few words, or an answer of many."""

    folder: str                          # DIR/folder/train.tsv and dev.tsv hold the files of `--data DIR`
    fields: dict[str, str]               # name in the template -> column of the text, by header name
    template: str                        # ends where the label word or the answer comes next
    label_words: dict[str, str] = field(default_factory=dict)   # label in the file -> its word, one token
    label_names: tuple[str, ...] = ()    # for people, in the order of label_words
    label_field: str = "label"           # column of the label, by header name
    dev_splits: tuple[str, ...] = ("dev",)      # names of the files to score on, without .tsv
    metrics: tuple[str, ...] = ("accuracy",)
    skip_short_rows: bool = False        # a row with too few columns is left out and counted, not an error
    sample: Callable[[], tuple[list[Row], list[Row]]] | None = None  # built-in train and dev rows
    kind: Callable[[dict[str, str]], str] | None = None              # of a sample's example, to score apart
    # Instead of label words. The files are DIR/folder_train.jsonl and so on, or DIR/folder.jsonl for both.
    answer: str = ""                     # as `fields` then are, a text with columns of the file in braces
    max_answer: int = 0                  # tokens of the answer and its end mark; a longer one is cut
    one_line: bool = True                # the answer also ends where its line does
    by_value: bool = False               # the same Python value is right, whatever its text

    def __post_init__(self):
        """ValueError for an entry that cannot work, of yours or in an adapter's file."""
        texts = [self.folder, self.template, self.label_field, *self.label_names, *self.dev_splits]
        texts += [self.answer] if self.answer else []
        for mapping in (self.fields,) if self.answer else (self.fields, self.label_words):
            if not isinstance(mapping, dict) or not mapping:
                raise ValueError(f"task {self.folder}: fields and label_words have to be dictionaries")
            texts += [*mapping, *mapping.values()]
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"task {self.folder}: names, template and words have to be texts, none empty")
        named = re.findall(r"{(.*?)}", self.template)
        if not named or not set(named) <= self.fields.keys():
            raise ValueError(f"task {self.folder}: the template {short(self.template)!r} has to name fields, "
                             f"of {', '.join(self.fields)}, and nothing else in braces")
        if len(self.label_names) != len(self.label_words):
            raise ValueError(f"task {self.folder}: {len(self.label_names)} label_names for "
                             f"{len(self.label_words)} label_words")
        if self.answer and (self.label_words or type(self.max_answer) is not int or self.max_answer < 2):
            raise ValueError(f"task {self.folder}: an answer needs a max_answer above 1, and no label_words")


@cache
def sst2_sample(n_train: int = 2000, n_dev: int = 872, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Labelled sentences of the shifted domain, all different, labels balanced; always the same ones."""
    rng = random.Random(seed)
    rows: dict[str, int] = {}
    while len(rows) < n_train + n_dev:
        rows.setdefault(task_sentence(rng, len(rows) % 2), len(rows) % 2)
    examples = [({"sentence": sentence}, label) for sentence, label in rows.items()]
    return examples[n_dev:], examples[:n_dev]


@cache
def rte_sample(n_train: int = 4000, n_dev: int = 872, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Pairs of one-clause sentences, 20 % of them negated; label 1 if both mean the same polarity, balanced.

    An exclusive or of two things the model knows: no single sentence says anything about the label.
    """
    rng = random.Random(seed)
    rows: dict[tuple[str, str], int] = {}
    while len(rows) < n_train + n_dev:
        label, polarity = len(rows) % 2, rng.randrange(2)
        first, second = (clause(rng, p, rng.choices((PLAIN, NEGATED), (80, 20))[0])
                         for p in (polarity, polarity if label else 1 - polarity))
        rows.setdefault((first, second), label)
    examples = [({"a": first, "b": second}, label) for (first, second), label in rows.items()]
    return examples[n_dev:], examples[:n_dev]


VERDICTS = (("bad", "terrible", "awful"), ("good", "great", "wonderful"))     # weak, plain, strong


def rewrite_sample() -> tuple[list[Row], ...]:
    """sst2's sentences in short, "the plot is not dull" -> " It was good .". How strong they are, h tells."""
    def answer(fields: dict[str, str], label: int) -> str:
        words = set(fields["sentence"].split())
        strength = 0 if words & NEGATIONS else 1 + bool(words & INTENSIFIERS)
        return f" It was {VERDICTS[label][strength]} ."

    return tuple([(fields, answer(fields, label)) for fields, label in rows] for rows in sst2_sample())


# GLUE's tasks. A GPT predicts what comes last, so the label word ends every template. The released code
# prompts a masked model (utils/data_processors.py @6a119e3): pairs as "{a} ? <mask> , {b}", same words.
PAIR = "{a} ? {b} . Answer:"
NO_YES = {"not_entailment": " No", "entailment": " Yes"}
TASKS = {
    "sst2": Task(
        folder="SST-2",
        fields={"sentence": "sentence"},
        template="{sentence} . It was",
        label_words={"0": " terrible", "1": " great"},
        label_names=("negative", "positive"),
        sample=sst2_sample, kind=kind_of_sentence,
    ),
    "mnli": Task(
        folder="MNLI", fields={"a": "sentence1", "b": "sentence2"}, template=PAIR,
        label_words={"contradiction": " No", "neutral": " Maybe", "entailment": " Yes"},
        label_names=("contradiction", "neutral", "entailment"),
        label_field="gold_label", dev_splits=("dev_matched", "dev_mismatched"),
    ),
    "mrpc": Task(
        folder="MRPC", fields={"a": "#1 String", "b": "#2 String"}, template=PAIR,
        label_words={"0": " No", "1": " Yes"}, label_names=("different", "paraphrase"),
        label_field="Quality", metrics=("accuracy", "f1"),
    ),
    "qnli": Task(
        folder="QNLI", fields={"a": "question", "b": "sentence"}, template=PAIR,
        label_words=NO_YES, label_names=("not answered", "answered"),
    ),
    "qqp": Task(
        folder="QQP", fields={"a": "question1", "b": "question2"}, template="{a} {b} Answer:",
        label_words={"0": " No", "1": " Yes"}, label_names=("different", "duplicate"),
        label_field="is_duplicate", metrics=("accuracy", "f1"), skip_short_rows=True,
    ),
    "rte": Task(
        folder="RTE", fields={"a": "sentence1", "b": "sentence2"}, template=PAIR,
        label_words=NO_YES, label_names=("not entailment", "entailment"),
        sample=rte_sample, kind=kind_of_sentence,
    ),
    # Answers of several tokens. No code that a model writes is ever run.
    "rewrite": Task(
        folder="rewrite", fields={"sentence": "{sentence}"}, template="{sentence} .", answer="{answer}",
        max_answer=8, sample=rewrite_sample, kind=kind_of_sentence,
    ),
    "cruxeval_o": Task(
        folder="cruxeval", fields={"code": "{code}", "input": "{input}"}, dev_splits=("test",),
        template="{code}\nassert f({input}) ==", answer=" {output}", max_answer=64, by_value=True,
    ),
    "cruxeval_i": Task(                  # its score is a lower bound: other inputs may give the output too
        folder="cruxeval", fields={"code": "{code}", "output": "{output}"}, dev_splits=("test",),
        template="{code}\nassert {output} == f", answer="({input})", max_answer=128,
    ),
    "mbpp": Task(
        folder="mbpp", fields={"prompt": "{prompt}"}, template="{prompt}", dev_splits=("test",),
        answer="{canonical_solution}", max_answer=256, one_line=False,
    ),
}
# The same from Google's mbpp.jsonl, of which ids 11 to 510 are the test split.
GOOGLE_MBPP = dict(fields={"prompt": '"""\n{text}\n{test_list}\n"""\n'}, answer="{code}")


def pretraining_text(n_documents: int = 20_000, seed: int = 1) -> str:
    """The tiny GPT's whole education. No dev sentence of any task is a sentence of it."""
    avoid = {text for task in TASKS.values() if task.sample
             for fields, _ in task.sample()[1] for text in fields.values()}
    rng = random.Random(seed)
    return "".join(document(rng, avoid) for _ in range(n_documents))


# -----------------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE (Sennrich et al. 2016) as GPT-2 has it, learned from the text above.


WORD = r" ?\w+| ?[^\s\w]+|\s"           # a word or some punctuation, with the space before it


def learn_tokenizer(text: str) -> tiktoken.Encoding:
    """Merge the most frequent pair of tokens until every distinct word of `text` is one token.

    Each distinct word counts once, so merging is soon over. A word keeps the space before it, as in GPT-2.
    """
    words = sorted(set(re.findall(WORD, text)))
    pieces = [[bytes([byte]) for byte in word.encode()] for word in words]
    ranks = {bytes([byte]): byte for byte in range(256)}               # token -> id, in the order of merging
    while pairs := Counter(pair for piece in pieces for pair in zip(piece, piece[1:])):
        left, right = max(pairs, key=pairs.get)
        ranks[left + right] = len(ranks)
        for piece in pieces:
            i = 0
            while i < len(piece) - 1:
                if (piece[i], piece[i + 1]) == (left, right):
                    piece[i:i + 2] = [left + right]
                i += 1
    end = {"<|endoftext|>": ranks[b"\n"]}                              # the tiny GPT's documents end so
    return tiktoken.Encoding("tiny", pat_str=WORD, mergeable_ranks=ranks, special_tokens=end)


def tiny_tokenizer(text: str) -> tiktoken.Encoding:
    """The sample's tokenizer: of the pre-training text and of what the tasks train on, label words too."""
    filled = [task.template.format(**fields) + "".join(task.label_words.values())
              for task in TASKS.values() if task.sample for fields, _ in task.sample()[0]]
    return learn_tokenizer(text + "\n".join(filled))


def unread_words(texts: list[str], tokenizer: tiktoken.Encoding) -> list[str]:
    """The words that are not one token where they stand: the tiny GPT has never been trained on them."""
    words = {word for text in texts for word in re.findall(WORD, text)}
    return sorted(word.strip() for word in words if len(tokenizer.encode_ordinary(word)) > 1)


def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's own tokenizer. tiktoken downloads its two files once; raises ValueError where it cannot."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:                             # requests raises an OSError too
        raise ValueError(
            f"GPT-2's tokenizer cannot be loaded ({type(error).__name__}): without a network, set "
            "TIKTOKEN_CACHE_DIR to a folder with two files of "
            "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/ under the names tiktoken "
            "gives them: vocab.bpe as 6d1cbeee0f20b3d9449abfede4726ed8212e3aee "
            "and encoder.json as 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6") from None


# -----------------------------------------------------------------------------------------------------------
# From rows to tensors


@dataclass
class Encoded:
    """A split, ready for a model. Row i's text is tokens[i, :lengths[i]]; padding is on the right."""

    tokens: Tensor                       # (N, T) int64
    lengths: Tensor                      # (N,)
    labels: Tensor                       # (N,) indices into task.label_words; (N, max_answer) of answers
    num_cut: int = 0                     # texts that did not fit and were shortened
    instances: Tensor | None = None      # (N, d_h) instance embeddings h, once they are computed

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ragged(self) -> bool:
        """Whether the longest text has over twice the mean length: random batches are mostly padding."""
        return bool(self.lengths.max() > 2 * self.lengths.float().mean())

    def __getitem__(self, rows: slice | Tensor) -> "Encoded":
        return self.each(lambda tensor: tensor[rows])

    def to(self, device: str) -> "Encoded":
        return self.each(lambda tensor: tensor.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> "Encoded":
        """The same split with every tensor changed."""
        instances = None if self.instances is None else change(self.instances)
        return replace(self, tokens=change(self.tokens), lengths=change(self.lengths),
                       labels=change(self.labels), instances=instances)


def encode_text(task: Task, fields: dict[str, str], tokenizer: tiktoken.Encoding,
                max_length: int) -> tuple[list[int], bool]:
    """Fill the template -> (token ids, whether the text was cut).

    The label word has to follow the template's end, so the template is never cut: the longest field loses
    its last tokens. Raises ValueError when not even the bare template fits.
    """
    parts = re.split(r"( ?\{\w+\})", task.template)                    # literal, field, literal, field, ...
    pieces = [tokenizer.encode_ordinary(part.format(**fields)) for part in parts]
    excess = sum(map(len, pieces)) - max_length
    for _ in range(excess):
        max(pieces[1::2], key=len)[-1:] = []
    tokens = [token for piece in pieces for token in piece]
    if len(tokens) > max_length or not tokens:
        raise ValueError(f"template {task.template!r} needs more than the {max_length} tokens the "
                         "context leaves: lower --num-virtual-tokens")
    return tokens, excess > 0


def encode(task: Task, rows: list[Row], tokenizer: tiktoken.Encoding, max_length: int) -> Encoded:
    encoded = [encode_text(task, fields, tokenizer, max_length) for fields, _ in rows]
    lengths = torch.tensor([len(tokens) for tokens, _ in encoded])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, (tokens, _) in enumerate(encoded):
        padded[i, :len(tokens)] = torch.tensor(tokens)
    labels = [encode_answer(task, y, tokenizer) if task.answer else torch.tensor(y) for _, y in rows]
    return Encoded(padded, lengths, torch.stack(labels), sum(cut for _, cut in encoded))


def encode_answer(task: Task, answer: str, tokenizer: tiktoken.Encoding) -> Tensor:
    """The tokens of an answer and the end mark, (max_answer,); behind them -100, which is no token."""
    tokens = [*tokenizer.encode_ordinary(answer), tokenizer.eot_token][:task.max_answer]
    return F.pad(torch.tensor(tokens), (0, task.max_answer - len(tokens)), value=-100)


def decode_answer(task: Task, tokens: Tensor, tokenizer: tiktoken.Encoding) -> str:
    """The text of an answer, encoded or generated, (max_answer,), up to where it ends."""
    ended = ((tokens < 0) | (tokens == tokenizer.eot_token)).cumsum(dim=0)
    text = tokenizer.decode(tokens[ended == 0].tolist())
    return text.partition("\n")[0] if task.one_line else text


def same_answer(task: Task, given: str, wanted: str) -> bool:
    """Whether an answer is right: as a text, blanks behind it apart, or as a Python value. Nothing is run."""
    no_value = suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
    if task.by_value:
        with no_value, warnings.catch_warnings(action="ignore"):       # of a "\\d" that a model wrote
            # Written anew, in one order, they are equal if values and types are: not 1 and True, as with ==.
            given, wanted = (pformat(ast.literal_eval(text.strip()), width=1) for text in (given, wanted))
    return given.rstrip() == wanted.rstrip()


def template_ending(task: Task, tokenizer: tiktoken.Encoding) -> Tensor:
    """Token ids of what the template has after its last field, (n,)."""
    return torch.tensor(tokenizer.encode_ordinary(task.template.rpartition("}")[2]), dtype=torch.long)


def label_tokens(task: Task, tokenizer: tiktoken.Encoding) -> Tensor:
    """Token ids of the label words, or of what ends an answer: the end mark, then line ends, (number,).

    Raises ValueError for a label word that is not one token.
    """
    ids = [tokenizer.eot_token] if task.answer else []
    for token in range(tokenizer.n_vocab if task.answer and task.one_line else 0):
        ids += [token] if "\n" in tokenizer.decode([token]) else []
    for label, word in task.label_words.items():
        tokens = tokenizer.encode_ordinary(word)
        if len(tokens) != 1:
            raise ValueError(f"label word {word!r} (label {label!r}) is {len(tokens)} tokens, it has to be "
                             "1: choose another, with its leading space, or a model that knows more words")
        ids += tokens
    return torch.tensor(ids)


def f1(predictions: Tensor, labels: Tensor) -> float:
    """F1 of label 1: the harmonic mean of precision and recall, 0 if label 1 is never predicted rightly."""
    hits = ((predictions == 1) & (labels == 1)).sum().item()
    named = (predictions == 1).sum().item() + (labels == 1).sum().item()
    return 2 * hits / named if named else 0.0


# -----------------------------------------------------------------------------------------------------------
# Reading


def load_task(name: str, data_dir: str | None, max_train: int | None = None, *, sample: bool = False,
              cache_dir: str | Path = ".cache", quiet: bool = False,
              ) -> tuple[list[Row], dict[str, list[Row]], str]:
    """(training rows, rows of each dev split by its name, a line that says which data it is).

    The files of data_dir/folder if there is a data_dir; else the built-in sample with `sample=True`; else
    GLUE's files, downloaded into cache_dir/GLUE at first use (`quiet`: without a progress bar). Dev is for
    scoring and nothing else. Raises ValueError or OSError.
    """
    task, published = TASKS[name], SOURCES.get(name)
    if data_dir is None and sample:
        if task.sample is None:
            have = ", ".join(name for name, task in TASKS.items() if task.sample)
            get = f": {published.url} has its files" if published else ""
            raise ValueError(f"task {name} has no built-in sample (only {have}): use a real model, "
                             f"or name a folder that holds {task.folder}/ with --data DIR{get}")
        train, dev_rows = task.sample()
        dev, source = {"dev": dev_rows}, "built-in sample, not GLUE"
    else:
        folder = Path(cache_dir, "" if task.answer else "GLUE") if data_dir is None else Path(data_dir)
        folder /= task.folder
        if data_dir is None:
            fetch(name, folder, quiet)
        dev, skipped = read_folder(folder, task)
        train = dev.pop("train")
        source = published.url if published and data_dir is None else str(folder)
        source += f", {skipped} incomplete rows skipped" if skipped else ""
    if max_train is not None and max_train < len(train):
        train = random.Random(0).sample(train, max_train)              # not the first: files may be sorted
    return train, dev, source


def read_folder(folder: Path, task: Task) -> tuple[dict[str, list[Row]], int]:
    """(rows of "train" and of each dev split, number of rows skipped) of one task's files."""
    if task.answer:
        return read_answers(folder, task), 0
    if (folder / MRPC_ROWS).exists() and not (folder / "train.tsv").exists():
        return read_published_mrpc(folder, task)
    files = {split: read_tsv(folder / f"{split}.tsv", task) for split in ("train", *task.dev_splits)}
    return {split: rows for split, (rows, _) in files.items()}, sum(skipped for _, skipped in files.values())


def read_published_mrpc(folder: Path, task: Task) -> tuple[dict[str, list[Row]], int]:
    """MRPC before GLUE: one file, and GLUE's list of the rows in it, by their two ids, that it calls dev."""
    path, url = folder / MRPC_DEV_IDS, SOURCES["mrpc"].dev_ids.url
    if not path.is_file():
        raise ValueError(f"{path} not found: it says which rows are dev; get it from {url}")
    listed = {tuple(line.split()) for line in path.read_text("utf-8-sig", errors="replace").splitlines()}
    with_ids = replace(task, fields=task.fields | {"id1": "#1 ID", "id2": "#2 ID"})
    rows, skipped = read_tsv(folder / MRPC_ROWS, with_ids)
    splits = {"train": [], "dev": []}
    for fields, label in rows:
        ids = fields.pop("id1"), fields.pop("id2")
        splits["dev" if ids in listed else "train"].append((fields, label))
    if not all(splits.values()):
        raise ValueError(f"{path}: {len(splits['dev'])} of {len(rows)} rows are listed, so one split is "
                         f"empty: it needs two ids on a line, as {url} has them")
    return splits, skipped


def read_answers(folder: Path, task: Task) -> dict[str, list[Row]]:
    """The rows of FOLDER_train.jsonl and so on. Those of one FOLDER.jsonl are halved, with a fixed seed."""
    whole, splits = folder.with_name(f"{folder.name}.jsonl"), ("train", *task.dev_splits)
    if not whole.exists():
        return {split: read_jsonl(folder.with_name(f"{folder.name}_{split}.jsonl"), task) for split in splits}
    if folder.name == "mbpp":
        rows = read_jsonl(whole, replace(task, **GOOGLE_MBPP))
        scored = [i for i, (fields, _) in enumerate(rows) if fields["task_id"] in range(11, 511)]
    else:                                # CruxEval, which has no splits: 400 and 400 functions
        rows = read_jsonl(whole, task)
        scored = random.Random(0).sample(range(len(rows)), len(rows) // 2)
    train = [rows[i] for i in sorted(set(range(len(rows))) - set(scored))]
    return {"train": train, task.dev_splits[0]: [rows[i] for i in scored]}


def read_jsonl(path: Path, task: Task) -> list[Row]:
    """Rows, with task_id as a field more, of a JSON object a line, in which a list is a text of several."""
    if not path.is_file():
        raise ValueError(f"{path} not found: --data names the folder that holds it")
    rows = []
    for where, cells in read_lines(path):
        row = {column: "\n".join(map(str, text)) if isinstance(text, list) else text
               for column, text in parse_object("\t".join(cells).encode(), where).items()}
        for column in re.findall(r"{(.*?)}", "".join([*task.fields.values(), task.answer])):
            if not isinstance(row.get(column), str):
                raise ValueError(f"{where}: no text {column!r}, only {short(', '.join(row))}")
        fields = {name: text.format(**row) for name, text in task.fields.items()}
        fields["task_id"] = row.get("task_id", row.get("id", len(rows)))
        rows.append((fields, task.answer.format(**row)))
    if len(rows) < 2:
        raise ValueError(f"{path}: {len(rows)} examples in it, 2 are the least")
    return rows


def read_tsv(path: Path, task: Task) -> tuple[list[Row], int]:
    """(rows, number of rows skipped) of a tab-separated UTF-8 file with a header line, unquoted like GLUE's.

    Raises ValueError, naming file and line, for a missing file and for what cannot be read as this task.
    """
    if not path.is_file():
        raise ValueError(f"{path} not found: --data names the folder that holds {task.folder}/train.tsv and "
                         + " and ".join(f"{split}.tsv" for split in task.dev_splits))
    labels, header, rows, skipped = list(task.label_words), None, [], 0
    for where, cells in read_lines(path):
        if header is None:
            header = cells
            for column in (*task.fields.values(), task.label_field):
                if column not in header:
                    raise ValueError(f"{where}: no column {column!r} in the header {short(header)}")
        elif task.skip_short_rows and len(cells) < len(header):
            skipped += 1
        elif len(cells) != len(header):
            raise ValueError(f"{where}: {len(cells)} columns, the header has {len(header)}: {short(header)}")
        else:
            row = dict(zip(header, cells))
            label = row[task.label_field]
            if label not in labels:
                raise ValueError(f"{where}: label {short(repr(label))} is none of {', '.join(labels)}")
            fields = {name: row[column].strip() for name, column in task.fields.items()}
            rows.append((fields, labels.index(label)))
    if not rows:
        raise ValueError(f"{path}: no examples in it, only {'a header' if header else 'an empty file'}")
    return rows, skipped


def read_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """("FILE, line N", its cells) of every line that is not blank."""
    with open(path, "rb") as file:                                     # bytes: only \n ends a line
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:                                                       # a byte order mark may begin the file
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 ({error.reason} at byte {error.start})"
                raise ValueError(f"{where}: {problem}: convert the file") from None
            if text.strip():
                yield where, text.rstrip("\r\n").split("\t")


def short(text: object, length: int = 80) -> str:
    """What an error line quotes of a file: a damaged one may hold a label of a million characters."""
    text = " ".join(str(text).splitlines())
    return text if len(text) <= length else f"{text[:length // 2]}…{text[-(length // 2 - 1):]}"


# -----------------------------------------------------------------------------------------------------------
# Downloading


@dataclass(frozen=True)
class Source:
    url: str                             # a zip with FOLDER/train.tsv in it; for MRPC the rows themselves
    sha256: str
    dev_ids: "Source | None" = None      # MRPC's list of the rows that are dev


# The checksums are those that Hugging Face's datasets recorded (datasets/glue/dataset_infos.json @040102f).
GLUE = "https://dl.fbaipublicfiles.com/glue/data/"
MRPC = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
MRPC_ROWS, MRPC_DEV_IDS = "msr_paraphrase_train.txt", "dev_ids.tsv"
SOURCES = {
    "sst2": Source(GLUE + "SST-2.zip", "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    "mnli": Source(GLUE + "MNLI.zip", "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    "mrpc": Source(MRPC + MRPC_ROWS, "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
                   dev_ids=Source(GLUE + "mrpc_dev_ids.tsv",
                                  "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7")),
    "qnli": Source(GLUE + "QNLIv2.zip", "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    "qqp": Source(GLUE + "QQP-clean.zip",
                  "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    "rte": Source(GLUE + "RTE.zip", "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
}
# The files of tasks with answers; MBPP's in the form that LoPA's authors have, from mxeval.
GITHUB = "https://raw.githubusercontent.com/"
LOPA = GITHUB + "jabhinav/Prompt-Tuning-Strikes-Back-with-LOPA/78bb4b85f95be3587c47607133b2463ff3f99d0b/"
ANSWER_FILES = {
    "cruxeval.jsonl": Source(GITHUB + "facebookresearch/cruxeval/main/data/cruxeval.jsonl",
                             "8368b81047dc5014e4caf5a2f97604eff7644e0ecd7415e3ceeb184bbc2e0c96"),
    "mbpp_train.jsonl": Source(LOPA + "mxeval/mbpp_train_release_v1.jsonl",
                               "54557a6fc7f99d2b5dc0ded287a2f3f5de56b57de300af2588b08a3e8ccd4b3a"),
    "mbpp_test.jsonl": Source(LOPA + "mxeval/mbpp_test_release_v1.jsonl",
                              "a894ba16db864ca9a6485cbb300db723608e84d98bec822d2297d6164eb9223f"),
}
# Names under HUGGING_FACE, and the sha256 of model.safetensors where public files state one.
GPT2_MODELS = {"gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
               "gpt2-medium": None, "gpt2-large": None, "gpt2-xl": None}
HUGGING_FACE = "https://huggingface.co/openai-community/"

PAUSE, TIMEOUT = 1.0, 30.0               # seconds: before the second try; without a byte, until it is over
BROKEN = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)      # not what a disk raises


def fetch(name: str, folder: Path, quiet: bool) -> None:
    """Download a task's files into `folder`, unless they are there. Raises ValueError with one line."""
    task, source = TASKS[name], SOURCES.get(name)
    if task.answer:
        for file in [file for file in ANSWER_FILES if file.startswith(task.folder)]:
            download(ANSWER_FILES[file].url, folder.with_name(file), ANSWER_FILES[file].sha256, quiet)
        return
    if source is None:
        raise ValueError(f"{name} has nowhere to be downloaded from: "
                         f"name the folder that holds {task.folder}/ with --data DIR")
    try:
        if source.dev_ids:
            download(source.url, folder / MRPC_ROWS, source.sha256, quiet)
            download(source.dev_ids.url, folder / MRPC_DEV_IDS, source.dev_ids.sha256, quiet)
            return
        paths = [folder / f"{split}.tsv" for split in ("train", *task.dev_splits)]
        if missing := [path for path in paths if not path.exists()]:
            archive = download(source.url, folder / Path(source.url).name, source.sha256, quiet)
            extract(archive, task.folder, missing)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}, or name a folder of GLUE files with --data DIR") from None


def extract(archive: Path, inside: str, paths: list[Path]) -> None:
    """Write the members inside/NAME of a zip to the `paths` of these names, and nothing else of it."""
    try:
        with zipfile.ZipFile(archive) as opened:                       # it stays: others may be reading it
            for path in paths:
                with opened.open(f"{inside}/{path.name}") as member, whole(path, str(archive)) as file:
                    shutil.copyfileobj(member, file)
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive} cannot be read ({short(error)}): delete it and try again") from None


def gpt2_folder(name: str, cache_dir: str | Path, quiet: bool = False) -> Path:
    """cache_dir/NAME, with the two files of one of GPT2_MODELS in it: downloaded at first use."""
    folder, url = Path(cache_dir, name), f"{HUGGING_FACE}{name}/resolve/main/"
    download(url + "config.json", folder / "config.json", quiet=quiet)
    download(url + "model.safetensors", folder / "model.safetensors", GPT2_MODELS[name], quiet)
    return folder


def download(url: str, path: Path, sha256: str | None = None, quiet: bool = False) -> Path:
    """Fetch `url` to `path`, unless that exists; when the connection breaks, go on once. Returns `path`.

    Raises ValueError or OSError: one line with the url, what happened and what to do.
    """
    if path.exists():
        return path
    advice = f"try again, or save the file as {path} yourself"
    with whole(path, url) as file:
        for last_try in (False, True):
            try:
                receive(url, file, quiet)
                break
            except BROKEN as error:
                if last_try or isinstance(error, HTTPError) and error.code < 500:  # 404 will be 404 again
                    problem = f"no connection ({error.reason})" if type(error) is URLError else short(error)
                    raise ValueError(f"{url}: {problem}: {advice}") from None
                time.sleep(PAUSE)
        file.seek(0)
        if sha256 and (found := hashlib.file_digest(file, "sha256").hexdigest()) != sha256:
            raise ValueError(f"{url}: wrong content, its sha256 is {found} instead of {sha256}: {advice}")
    return path


def receive(url: str, file: BinaryIO, quiet: bool) -> None:
    """Append to `file` what it lacks of `url`: everything, or the rest if an earlier try broke off."""
    start = file.tell()
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urlopen(request, timeout=TIMEOUT) as response:
        if response.status != 206:                                     # not the rest but the whole file
            start = file.seek(0)
            file.truncate()
        total = None if response.length is None else start + response.length
        with tqdm.wrapattr(response, "read", total=total, initial=start, desc=Path(url).name,
                           disable=True if quiet else None) as counted:
            shutil.copyfileobj(counted, file)
    if total is not None and file.tell() < total:                      # read itself does not complain
        raise ConnectionError(f"broken off after {file.tell():,} of {total:,} bytes")


@contextmanager
def whole(path: Path, source: str) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends well, and is removed when it does not."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # others may be writing the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w+b") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise OSError(f"{source} cannot be saved as {path} ({error.strerror or error}): make room, or name "
                      "a folder that can be written with --cache DIR or --out DIR") from None
    finally:
        if part.exists():
            part.unlink()


def save_file(path: Path, content) -> None:
    """Save tensors and plain values, or text for `.json` and `.jsonl`; `path` is whole at any moment."""
    with whole(path, "the result") as file:
        if path.suffix == ".json":
            file.write((json.dumps(content, indent=1) + "\n").encode())
        elif path.suffix == ".jsonl":
            file.write("".join(json.dumps(line) + "\n" for line in content).encode())
        else:
            torch.save(content, memory := io.BytesIO())                # itself, it hides why a disk fails
            file.write(memory.getbuffer())


def load_file(path: Path):
    """Tensors and plain values, as saved. Raises ValueError if the file is damaged or holds code."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("a folder, or a pipe that would be waited for")
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():                                      # torch.load reads over a flipped bit
                raise ValueError("checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:                                         # torch.load raises half a dozen types
        problem = f"cannot be read as saved weights ({type(error).__name__})"
        raise ValueError(f"{path} {problem}: delete it and run again") from None
