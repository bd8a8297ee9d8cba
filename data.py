"""Data: the built-in sample (a small synthetic world of movie reviews), the tokenizer, the tasks, and the GLUE reader.

The sample exists so that everything runs without a download, and so that it is known why a method succeeds or fails.
Two kinds of text come from the same vocabulary:

    pre-training text   "the plot is dull and the cast fails . a bland , messy film . It was awful ."
                        documents of one polarity; no negation, no intensifier, no contrast
    task sentences      "the plot is not dull and the cast always shines"      label 1, positive
                        "although the music is very warm , the script drags"   label 0: the last clause decides

So a model pre-trained on the first kind knows which words are good and bad, and has never read "not", "very" or "but".
Negations and intensifiers are equally new to it: "I have not seen this word" does not yet mean "turn the meaning round".
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------
# The world: words, clauses, sentences, documents. Polarity is 0 (negative) or 1 (positive).

ASPECTS = ("plot cast script acting music dialogue pacing camera ending direction humor editing story hero villain "
           "soundtrack").split()
ADJECTIVES = ("terrible awful dull boring clumsy bland messy tired shallow weak ugly lazy hollow stale tedious".split(),
              "great wonderful brilliant charming gorgeous witty moving superb delightful clever funny touching warm "
              "fresh thrilling".split())
VERBS = ("fails drags disappoints collapses stumbles bores".split(), "shines works delights soars dazzles charms".split())
NOUNS = "film movie drama comedy".split()

# What stands before an adjective ("is not dull"), a verb ("never fails") or a phrase ("hardly a witty film").
PLAIN, NEGATED, INTENSIFIED = range(3)
BEFORE_ADJECTIVE = ([""], ["not ", "hardly "], ["very ", "truly "])
BEFORE_VERB = ([""], ["never ", "rarely "], ["always ", "really "])
BEFORE_PHRASE = ([""], ["not ", "hardly "], ["truly ", "really "])


def clause(rng: random.Random, polarity: int, manner: int = PLAIN) -> str:
    """One statement that means `polarity`: when it is negated, its word is of the other polarity."""
    word_polarity = 1 - polarity if manner == NEGATED else polarity
    aspect = rng.choice(ASPECTS)
    if rng.random() < 0.6:
        return f"the {aspect} is {rng.choice(BEFORE_ADJECTIVE[manner])}{rng.choice(ADJECTIVES[word_polarity])}"
    return f"the {aspect} {rng.choice(BEFORE_VERB[manner])}{rng.choice(VERBS[word_polarity])}"


def phrase(rng: random.Random, polarity: int, manner: int = PLAIN) -> str:
    word_polarity = 1 - polarity if manner == NEGATED else polarity
    first, second = rng.sample(ADJECTIVES[word_polarity], 2)
    return f"{rng.choice(BEFORE_PHRASE[manner])}a {first} , {second} {rng.choice(NOUNS)}"


def plain_sentence(rng: random.Random, polarity: int) -> str:
    """A sentence of the pre-training text."""
    if rng.random() < 0.2:
        return phrase(rng, polarity)
    return f"{clause(rng, polarity)} and {clause(rng, polarity)}"


def task_sentence(rng: random.Random, polarity: int) -> str:
    """A sentence of the shifted domain: about 30 % of its parts are negated, 30 % intensified; 20 % are contrasts."""
    def manner() -> int:
        return rng.choices((PLAIN, NEGATED, INTENSIFIED), (40, 30, 30))[0]

    kind = rng.random()
    if kind < 0.2:                       # a contrast: the last clause decides
        first, last = clause(rng, 1 - polarity, manner()), clause(rng, polarity, manner())
        return rng.choice([f"{first} , but {last}", f"although {first} , {last}"])
    if kind < 0.35:
        return phrase(rng, polarity, manner())
    if kind < 0.5:                       # never plain: that would be a piece of the pre-training text
        return clause(rng, polarity, rng.choice((NEGATED, INTENSIFIED)))
    return f"{clause(rng, polarity, manner())} and {clause(rng, polarity, manner())}"


def document(rng: random.Random, avoid: set[str]) -> str:
    """One to three sentences of one polarity, none of them in `avoid`; 70 % of documents end in a verdict."""
    polarity = rng.randrange(2)
    sentences, wanted = [], rng.randint(1, 3)
    while len(sentences) < wanted:
        sentence = plain_sentence(rng, polarity)
        if sentence not in avoid:
            sentences.append(sentence)
    if rng.random() < 0.7:               # without verdicts the language model has little reason to learn polarity
        sentences.append(f"It was {rng.choice(ADJECTIVES[polarity])}")
    return " . ".join(sentences) + " .\n"


# ---------------------------------------------------------------------------------------------------------------
# Tasks. To add your own, add one entry to TASKS.

Row = tuple[dict[str, str], int]         # the fields of one example by name, and the index of its label


@dataclass(frozen=True)
class Task:
    """A classification task as text: the label is the word that the language model puts after the template."""

    folder: str                          # DIR/folder/train.tsv and dev.tsv hold the files of `--data DIR`
    fields: tuple[str, ...]              # columns of the text, by header name
    template: str                        # ends where the label word comes next
    label_words: dict[str, str]          # label as the file spells it -> its word, one token with its leading space
    label_names: tuple[str, ...]         # for people, in the order of label_words
    sample: Callable[[], tuple[list[Row], list[Row]]] | None = None      # built-in train and dev rows


def sst2_sample(n_train: int = 4000, n_dev: int = 872, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Labelled sentences of the shifted domain, all different, labels balanced; always the same ones."""
    rng = random.Random(seed)
    rows: dict[str, int] = {}
    while len(rows) < n_train + n_dev:
        rows.setdefault(task_sentence(rng, len(rows) % 2), len(rows) % 2)
    examples = [({"sentence": sentence}, label) for sentence, label in rows.items()]
    return examples[n_dev:], examples[:n_dev]


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
    examples = [({"sentence1": first, "sentence2": second}, label) for (first, second), label in rows.items()]
    return examples[n_dev:], examples[:n_dev]


TASKS = {
    "sst2": Task(
        folder="SST-2",
        fields=("sentence",),
        template="{sentence} . It was",
        label_words={"0": " terrible", "1": " great"},
        label_names=("negative", "positive"),
        sample=sst2_sample,
    ),
    "rte": Task(
        folder="RTE",
        fields=("sentence1", "sentence2"),
        template="{sentence1} ? {sentence2} . Answer:",
        label_words={"not_entailment": " No", "entailment": " Yes"},
        label_names=("not entailed", "entailed"),
        sample=rte_sample,
    ),
}


def pretraining_text(n_documents: int = 20_000, seed: int = 1) -> str:
    """The tiny GPT's whole education. No dev sentence of any task is a sentence of it."""
    avoid = {text for task in TASKS.values() if task.sample
             for fields, _ in task.sample()[1] for text in fields.values()}
    rng = random.Random(seed)
    return "".join(document(rng, avoid) for _ in range(n_documents))


# ---------------------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE (Sennrich et al. 2016) as GPT-2 has it, learned from the text above.


def learn_tokenizer(text: str) -> tiktoken.Encoding:
    """Merge the most frequent pair of tokens until every distinct word of `text` is one token.

    Each distinct word counts once, so the merges are soon over. Words keep the space before them, as GPT-2's do.
    """
    pattern = r" ?\w+| ?[^\s\w]+|\s"
    words = sorted(set(re.findall(pattern, text)))
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
    return tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def tiny_tokenizer() -> tiktoken.Encoding:
    """The sample's tokenizer: from the pre-training text, the tasks' training sentences, templates and label words."""
    filled = [task.template.format(**fields) + "".join(task.label_words.values())
              for task in TASKS.values() if task.sample for fields, _ in task.sample()[0]]
    return learn_tokenizer(pretraining_text() + "\n".join(filled))


# ---------------------------------------------------------------------------------------------------------------
# From rows to tensors


@dataclass
class Encoded:
    """A split, ready for a model. The real tokens of row i are tokens[i, :lengths[i]]; padding is on the right."""

    tokens: Tensor                       # (N, T) int64
    lengths: Tensor                      # (N,)
    labels: Tensor                       # (N,) indices into task.label_words
    num_cut: int                         # texts that did not fit and were shortened

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "Encoded":
        return replace(self, tokens=self.tokens[rows], lengths=self.lengths[rows], labels=self.labels[rows])

    def to(self, device: str) -> "Encoded":
        return replace(self, tokens=self.tokens.to(device), lengths=self.lengths.to(device), labels=self.labels.to(device))


def encode_text(task: Task, fields: dict[str, str], tokenizer: tiktoken.Encoding, max_length: int) -> tuple[list[int], bool]:
    """Fill the template -> (token ids, whether the text was cut).

    The label word has to follow the template's end, so it is never the template that is cut: the longest field loses
    its last tokens. Raises ValueError when not even the bare template fits.
    """
    parts = re.split(r"( ?\{\w+\})", task.template)                    # literal, field with its space, literal, ...
    pieces = [tokenizer.encode_ordinary(part.format(**fields)) for part in parts]
    excess = sum(map(len, pieces)) - max_length
    for _ in range(excess):
        max(pieces[1::2], key=len)[-1:] = []
    tokens = [token for piece in pieces for token in piece]
    if len(tokens) > max_length or not tokens:
        raise ValueError(f"template {task.template!r} needs more than the {max_length} tokens the context leaves: "
                         "lower --num-virtual-tokens")
    return tokens, excess > 0


def encode(task: Task, rows: list[Row], tokenizer: tiktoken.Encoding, max_length: int) -> Encoded:
    encoded = [encode_text(task, fields, tokenizer, max_length) for fields, _ in rows]
    lengths = torch.tensor([len(tokens) for tokens, _ in encoded])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, (tokens, _) in enumerate(encoded):
        padded[i, :len(tokens)] = torch.tensor(tokens)
    labels = torch.tensor([label for _, label in rows])
    return Encoded(padded, lengths, labels, sum(cut for _, cut in encoded))


def label_tokens(task: Task, tokenizer: tiktoken.Encoding) -> Tensor:
    """Token ids of the label words, (number of labels,). Raises ValueError for a word that is not one token."""
    ids = []
    for label, word in task.label_words.items():
        tokens = tokenizer.encode_ordinary(word)
        if len(tokens) != 1:
            raise ValueError(f"label word {word!r} (label {label!r}) is {len(tokens)} tokens, it has to be 1: "
                             "choose another word, with its leading space")
        ids += tokens
    return torch.tensor(ids)


# ---------------------------------------------------------------------------------------------------------------
# Reading


def load_task(name: str, data_dir: str | None, max_train: int | None = None) -> tuple[list[Row], list[Row], str]:
    """(train rows, dev rows, a line that says which data it is): the built-in sample, or DIR/folder/{train,dev}.tsv.

    Raises ValueError for a file that is missing or cannot be read as this task.
    """
    task = TASKS[name]
    if data_dir is None:
        if task.sample is None:
            raise ValueError(f"task {name} has no built-in sample: name a folder with --data")
        train, dev = task.sample()
        source = "built-in sample, not GLUE"
    else:
        folder = Path(data_dir) / task.folder
        train, dev = (list(read_tsv(folder / f"{split}.tsv", task)) for split in ("train", "dev"))
        source = str(folder)
    if max_train is not None and max_train < len(train):
        train = random.Random(0).sample(train, max_train)              # files may be sorted, so not simply the first
    return train, dev, source


def read_tsv(path: Path, task: Task) -> Iterator[Row]:
    """Rows of a tab-separated UTF-8 file with a header line, unquoted as GLUE's are.

    Raises ValueError, naming file and line, for a missing file and for what cannot be read as this task.
    """
    if not path.is_file():
        raise ValueError(f"{path} not found: --data names the folder that holds {task.folder}/train.tsv and dev.tsv")
    header, count = None, 0
    with open(path, "rb") as file:                                     # bytes: only \n ends a line
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                cells = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}): convert the file") from None
            if header is None:
                header = cells
                for column in (*task.fields, "label"):
                    if column not in header:
                        raise ValueError(f"{where}: no column {column!r} in the header {header}")
            elif len(cells) != len(header):
                raise ValueError(f"{where}: {len(cells)} columns, the header has {len(header)}: {', '.join(header)}")
            else:
                row = dict(zip(header, cells))
                if row["label"] not in task.label_words:
                    raise ValueError(f"{where}: label {row['label']!r} is none of {', '.join(task.label_words)}")
                yield {field: row[field].strip() for field in task.fields}, list(task.label_words).index(row["label"])
                count += 1
    if not count:
        raise ValueError(f"{path}: no examples in it, only {'a header' if header else 'an empty file'}")
