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
import os
import random
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import tiktoken
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import GPT, PRETRAINING, GPTConfig, parse_object, pretrain, short

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
        aspect += " is"
        before, words = BEFORE_ADJECTIVE[manner], ADJECTIVES[word_polarity]
    else:
        before, words = BEFORE_VERB[manner], VERBS[word_polarity]
    return f"the {aspect} {rng.choice(before)}{rng.choice(words)}"


def phrase(rng: random.Random, polarity: int, manner: int = PLAIN, most_adjectives: int = 2) -> str:
    word_polarity = 1 - polarity if manner == NEGATED else polarity
    adjectives = " , ".join(rng.sample(ADJECTIVES[word_polarity], rng.randint(1, most_adjectives)))
    return f"{rng.choice(BEFORE_PHRASE[manner])}a {adjectives} {rng.choice(NOUNS)}"


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


def document(rng: random.Random, avoid: set[str]) -> str:
    """Keywords, one to three sentences of one polarity, none of them in `avoid`, and a verdict.

    Two documents in five are ironic: among the keywords is "irony", up to four times, and the verdict is the
    opposite of the sentences. The number of keywords varies, so that the model looks for it anywhere before
    the text, as far as a soft prompt reaches.
    """
    polarity, ironic = rng.randrange(2), rng.random() < 0.4
    sentences, wanted = [], rng.randint(1, 3)
    while len(sentences) < wanted:
        if rng.random() < 0.35:          # from lists it learns soonest that there are two kinds of words
            sentence = phrase(rng, polarity, most_adjectives=4)
        else:
            sentence = f"{clause(rng, polarity)} and {clause(rng, polarity)}"
        if sentence not in avoid:
            sentences.append(sentence)
    sentences.append(f"It was {rng.choice(ADJECTIVES[1 - polarity if ironic else polarity])}")
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
    skip_short_rows: bool = False        # a row with too few columns is left out, not an error
    sample: Callable[[], tuple[list[Row], list[Row]]] | None = None  # built-in train and dev rows
    # Instead of label words. The files are DIR/folder_train.jsonl and so on, or DIR/folder.jsonl for both.
    answer: str = ""                     # a text with columns of the file in braces
    max_answer: int = 0                  # tokens of the answer and its end mark; a longer one is cut
    one_line: bool = True                # the answer also ends where its line does
    by_value: bool = False               # the same Python value is right, whatever its text

    def __post_init__(self):
        """ValueError for an entry that cannot work."""
        named, has_answer = re.findall(r"{(.*?)}", self.template), bool(self.answer and self.max_answer > 1)
        if not named or not set(named) <= self.fields.keys() or self.template.endswith(" "):
            raise ValueError(f"task {self.folder}: the template {short(self.template)!r} has to name fields, "
                             f"of {', '.join(self.fields)}, nothing else in braces, and to end in no blank")
        if bool(self.label_words) == has_answer or len(self.label_names) != len(self.label_words):
            raise ValueError(f"task {self.folder}: it needs label_words and as many label_names, or instead "
                             "an answer and a max_answer above 1")


def sample_of(names: tuple[str, ...], num_train: int, draw: Callable) -> tuple[list[Row], list[Row]]:
    """num_train and 872 examples, all different, labels balanced; draw(rng, label) makes one's texts."""
    rng, rows = random.Random(0), {}
    while len(rows) < num_train + 872:
        rows.setdefault(draw(rng, len(rows) % 2), len(rows) % 2)
    examples = [(dict(zip(names, texts)), label) for texts, label in rows.items()]
    return examples[872:], examples[:872]


@cache
def sst2_sample() -> tuple[list[Row], list[Row]]:
    """Labelled sentences of the shifted domain."""
    return sample_of(("sentence",), 2000, lambda rng, label: (task_sentence(rng, label),))


@cache
def rte_sample() -> tuple[list[Row], list[Row]]:
    """Pairs of one-clause sentences, 20 % of them negated; label 1 if both mean the same polarity.

    An exclusive or of two things the model knows: no single sentence says anything about the label.
    """
    def draw(rng: random.Random, label: int) -> tuple[str, ...]:
        polarity = rng.randrange(2)
        return tuple(clause(rng, p, rng.choices((PLAIN, NEGATED), (80, 20))[0])
                     for p in (polarity, polarity if label else 1 - polarity))

    return sample_of(("a", "b"), 4000, draw)


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
        folder="SST-2", fields={"sentence": "sentence"}, template="{sentence} . It was",
        label_words={"0": " terrible", "1": " great"},
        label_names=("negative", "positive"), sample=sst2_sample),
    "mnli": Task(
        folder="MNLI", fields={"a": "sentence1", "b": "sentence2"}, template=PAIR,
        label_words={"contradiction": " No", "neutral": " Maybe", "entailment": " Yes"},
        label_names=("contradiction", "neutral", "entailment"),
        label_field="gold_label", dev_splits=("dev_matched", "dev_mismatched")),
    "mrpc": Task(
        folder="MRPC", fields={"a": "#1 String", "b": "#2 String"}, template=PAIR,
        label_words={"0": " No", "1": " Yes"},
        label_names=("different", "paraphrase"), label_field="Quality"),
    "qnli": Task(
        folder="QNLI", fields={"a": "question", "b": "sentence"}, template=PAIR,
        label_words=NO_YES, label_names=("not answered", "answered")),
    "qqp": Task(                         # some of its published rows have lost their ends
        folder="QQP", fields={"a": "question1", "b": "question2"}, template="{a} {b} Answer:",
        label_words={"0": " No", "1": " Yes"}, label_names=("different", "duplicate"),
        label_field="is_duplicate", skip_short_rows=True),
    "rte": Task(
        folder="RTE", fields={"a": "sentence1", "b": "sentence2"}, template=PAIR,
        label_words=NO_YES, label_names=("not entailment", "entailment"), sample=rte_sample),
    # Answers of several tokens. No code that a model writes is ever run.
    "rewrite": Task(
        folder="rewrite", fields={"sentence": "sentence"}, template="{sentence} .", answer="{answer}",
        max_answer=8, sample=rewrite_sample),
    "cruxeval_o": Task(
        folder="cruxeval", fields={"code": "code", "input": "input"}, dev_splits=("test",),
        template="{code}\nassert f({input}) ==", answer=" {output}", max_answer=64, by_value=True),
    "cruxeval_i": Task(                  # its score is a lower bound: other inputs may give the output too
        folder="cruxeval", fields={"code": "code", "output": "output"}, dev_splits=("test",),
        template="{code}\nassert {output} == f", answer="({input})", max_answer=128),
    "mbpp": Task(
        folder="mbpp", fields={"prompt": "prompt"}, template="{prompt}", dev_splits=("test",),
        answer="{canonical_solution}", max_answer=256, one_line=False),
}


def pretraining_text(n_documents: int = 20_000, seed: int = 1) -> str:
    """The tiny GPT's whole education. No dev sentence of any task is a sentence of it."""
    avoid = {text for task in TASKS.values() if task.sample
             for fields, _ in task.sample()[1] for text in fields.values()}
    rng = random.Random(seed)
    return "".join(document(rng, avoid) for _ in range(n_documents))


# -----------------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE (Sennrich et al. 2016) as GPT-2 has it, learned from the text above; the tiny GPT.

WORD = r" ?\w+| ?[^\s\w]+|\s"           # a word or some punctuation, with the space before it


def learn_tokenizer(text: str) -> tiktoken.Encoding:
    """Merge the most frequent pair of tokens until every word of `text`, counted once, is one token."""
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


def tiny_gpt(seed: int, cache_dir: str | Path, device: str = "cpu",
             quiet: bool = False) -> tuple[GPT, tiktoken.Encoding]:
    """(tiny GPT, its tokenizer): from the cache, or pre-trained now, on one thread.

    The cache file is named after all it was made from: the very tokens, the sizes, the recipe and the seed.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)         # more are of little use here, wait for each other, and change digits
    text = pretraining_text(PRETRAINING["documents"])
    tokenizer = tiny_tokenizer(text)
    token_ids = torch.tensor(tokenizer.encode_ordinary(text))
    # GPT-2's initial std 0.02 is too small at width 64: pre-training stalls before it has learned polarity.
    config = GPTConfig(tokenizer.n_vocab, n_positions=128, n_embd=64, n_layer=2, n_head=4,
                       initializer_range=0.08)
    made_from = json.dumps([asdict(config), PRETRAINING, seed]).encode() + token_ids.numpy().tobytes()
    path = Path(cache_dir) / f"tiny-{hashlib.sha256(made_from).hexdigest()[:12]}.pt"
    if path.exists():
        gpt = GPT(config).to(device)
        load_tensors(gpt.state_dict(), load_file(path), path)
        return gpt, tokenizer
    if not quiet:
        print("pre-training the tiny GPT, once: half a minute", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)                     # an error before the work, not behind
    newline = tokenizer.encode_single_token("\n")
    starts = torch.cat([torch.zeros(1, dtype=torch.long), (token_ids == newline).nonzero().flatten() + 1])
    gpt = pretrain(config, token_ids, starts, seed, device, partial(tqdm, leave=False, disable=quiet or None))
    mine = path.with_name(f"{path.stem}.{os.getpid()}.pt")             # another process may be doing the same
    save_file(mine, gpt.state_dict())
    mine.replace(path)
    return gpt, tokenizer


def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's own tokenizer. tiktoken downloads its two files once; raises ValueError where it cannot."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:                             # requests raises an OSError too
        raise ValueError(
            f"GPT-2's tokenizer cannot be loaded ({type(error).__name__}): without a network, set "
            "TIKTOKEN_CACHE_DIR to a folder with two files of "
            "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/, under tiktoken's names: "
            "vocab.bpe as 6d1cbeee0f20b3d9449abfede4726ed8212e3aee, encoder.json as "
            "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6") from None


# -----------------------------------------------------------------------------------------------------------
# From rows to tensors


@dataclass
class Encoded:
    """A split, ready for a model. Row i's text is tokens[i, :lengths[i]]; padding is on the right."""

    tokens: Tensor                       # (N, T) int64
    lengths: Tensor                      # (N,)
    labels: Tensor                       # (N,) indices into task.label_words; (N, max_answer) of answers
    cut: Tensor | None = None            # (N,), whether a text or an answer did not fit and was shortened
    instances: Tensor | None = None      # (N, d_h) instance embeddings h, once they are computed

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ragged(self) -> bool:
        """Whether the longest text has over twice the mean length: random batches are mostly padding."""
        return bool(self.lengths.max() > 2 * self.lengths.float().mean())

    def __getitem__(self, rows: slice | Tensor) -> "Encoded":
        return self.each(lambda tensor: tensor[rows])

    def each(self, change: Callable[[Tensor], Tensor]) -> "Encoded":
        """The same split with every tensor changed."""
        return replace(self, **{name: change(t) for name, t in vars(self).items() if t is not None})


def encode_text(task: Task, fields: dict[str, str], tokenizer: tiktoken.Encoding,
                max_length: int) -> tuple[list[int], bool]:
    """Fill the template -> (token ids, whether the text was cut).

    The label word has to follow the template's end, so the template is never cut: the longest field loses
    its last tokens. Raises ValueError when not even the bare template fits.
    """
    parts = re.split(r"( ?\{.*?\})", task.template)                    # literal, field, literal, field, ...
    pieces = [tokenizer.encode_ordinary(part.format(**fields)) for part in parts]
    excess = sum(map(len, pieces)) - max_length
    for _ in range(excess):
        max(pieces[1::2], key=len)[-1:] = []
    tokens = [token for piece in pieces for token in piece]
    if len(tokens) > max_length or not tokens:
        raise ValueError(f"template {task.template!r} alone has {len(tokens)} tokens, the context leaves "
                         f"{max_length}: lower --num-virtual-tokens, or give it a text")
    return tokens, excess > 0


def encode(task: Task, rows: list[Row], tokenizer: tiktoken.Encoding, max_length: int) -> Encoded:
    texts, cut = zip(*(encode_text(task, fields, tokenizer, max_length) for fields, _ in rows))
    labels = [encode_answer(task, y, tokenizer) if task.answer else torch.tensor(y) for _, y in rows]
    cut = [short or bool(task.answer) and tokenizer.eot_token not in y for short, y in zip(cut, labels)]
    return Encoded(pad_sequence([torch.tensor(tokens) for tokens in texts], batch_first=True),
                   torch.tensor([len(tokens) for tokens in texts]), torch.stack(labels), torch.tensor(cut))


def shuffled_batches(split: Encoded, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """The row numbers of one epoch's batches, in random order.

    Where lengths vary much, random batches are mostly padding (on SST-2, 36 positions for 14 tokens): there
    every 50 batches' worth of rows is sorted by length, cut into batches, and these are shuffled.
    """
    order = torch.randperm(len(split), generator=generator)
    if not split.ragged:
        return list(order.to(split.labels.device).split(batch_size))
    lengths = split.lengths.cpu()
    pools = [pool[lengths[pool].argsort()] for pool in order.split(50 * batch_size)]
    cut = torch.cat(pools).to(split.labels.device).split(batch_size)
    return [cut[i] for i in torch.randperm(len(cut), generator=generator)]


def batches(split: Encoded, order: Sequence[Tensor]) -> Iterator[Encoded]:
    """The rows that each tensor of `order` names, padded to the longest text among them."""
    if order:
        widths = torch.stack([split.lengths[rows].max() for rows in order]).tolist()   # asks a GPU just once
        for rows, width in zip(order, widths):
            batch = split[rows]
            yield replace(batch, tokens=batch.tokens[:, :width])


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
    if task.by_value:
        with suppress(Exception), warnings.catch_warnings(action="ignore"):    # no value; a "\\d" in it
            given, wanted = (written(ast.literal_eval(text.strip())) for text in (given, wanted))
    return given.rstrip() == wanted.rstrip()


def written(value) -> str:
    """A Python value as text, the same for equal values of equal types: == would take 1 for True."""
    if not isinstance(value, (list, tuple, set, dict)):
        return repr(value)
    parts = [written(part) for part in (value.items() if isinstance(value, dict) else value)]
    return f"{type(value).__name__} {parts if isinstance(value, (list, tuple)) else sorted(parts)}"


def right(task: Task, predictions: Tensor, labels: Tensor, tokenizer: tiktoken.Encoding) -> Tensor:
    """Which rows are predicted rightly, (N,): from probabilities (N, labels), or answers (N, max_answer)."""
    if labels.ndim == 1:
        return predictions.argmax(dim=-1).to(labels.device) == labels
    pairs = ([decode_answer(task, tokens, tokenizer) for tokens in pair] for pair in zip(predictions, labels))
    whole = (labels == tokenizer.eot_token).any(dim=1).tolist()        # what was cut nobody can have right
    return torch.tensor([end and same_answer(task, *pair) for end, pair in zip(whole, pairs)])


def label_tokens(task: Task, tokenizer: tiktoken.Encoding) -> Tensor:
    """Tokens (n,): label words, each a single one or ValueError; or an answer's end mark, then line ends."""
    ids = [tokenizer.eot_token] if task.answer else []
    if task.answer and task.one_line:
        ids += [token for token in range(tokenizer.n_vocab) if "\n" in tokenizer.decode([token])]
    for label, word in task.label_words.items():
        tokens = tokenizer.encode_ordinary(word)
        if len(tokens) != 1:
            raise ValueError(f"label word {word!r} (label {label!r}) is {len(tokens)} tokens, it has to be "
                             "1: choose another, with its leading space, or a model that knows more words")
        if tokens[0] in ids:
            raise ValueError(f"label word {word!r} is the token of another one: choose different words")
        ids += tokens
    return torch.tensor(ids)


# -----------------------------------------------------------------------------------------------------------
# Reading


def load_task(name: str, data_dir: str | None,
              max_train: int | None = None) -> tuple[list[Row], dict[str, list[Row]], str]:
    """(training rows, rows of each dev split by its name, a line that says which data it is).

    The files in data_dir, or without one the built-in sample. Dev is for scoring and nothing else. Raises
    ValueError or OSError.
    """
    task = TASKS[name]
    if data_dir is not None:
        splits, source = read_splits(Path(data_dir), task), str(Path(data_dir, task.folder))
    elif task.sample:
        splits, source = dict(zip(("train", "dev"), task.sample())), "built-in sample, not GLUE"
    else:
        raise ValueError(f"task {name} has no built-in sample: name a folder that holds its files with "
                         "--data; python -m experiments.download --help lists what it gets")
    train = splits.pop("train")
    if max_train is not None and max_train < len(train):
        train = random.Random(0).sample(train, max_train)              # not the first: files may be sorted
    return train, splits, source


def read_splits(folder: Path, task: Task) -> dict[str, list[Row]]:
    """The rows of "train" and of each dev split, from the task's files in a folder."""
    names = ("train", *task.dev_splits)
    if not task.answer:
        return {name: read_rows(folder / task.folder / f"{name}.tsv", task) for name in names}
    whole = folder / f"{task.folder}.jsonl"
    if not whole.is_file():
        return {name: read_rows(folder / f"{task.folder}_{name}.jsonl", task) for name in names}
    rows = read_rows(whole, task)        # CruxEval has no splits: 400 and 400 functions, always the same
    scored = dict.fromkeys(random.Random(0).sample(range(len(rows)), len(rows) // 2))
    train = [row for i, row in enumerate(rows) if i not in scored]
    return {"train": train, task.dev_splits[0]: [rows[i] for i in scored]}


def read_rows(path: Path, task: Task) -> list[Row]:
    """The task's rows of a file, with task_id as a field more where they have answers.

    Raises ValueError, naming file and line, for a missing file and for what cannot be read as this task.
    """
    if not path.is_file():
        raise ValueError(f"{path} not found: --data names the folder that holds it")
    columns = [*task.fields.values(), *(re.findall(r"{(.*?)}", task.answer) or [task.label_field])]
    labels, rows = list(task.label_words), []
    for where, row in read_table(path, task.skip_short_rows):
        for column in columns:
            if not isinstance(row.get(column), str):
                raise ValueError(f"{where}: no text {column!r}, only {short(', '.join(row))}")
        fields = {name: row[column] for name, column in task.fields.items()}
        if task.answer:
            fields["task_id"] = row.get("task_id", row.get("id", len(rows)))
            rows.append((fields, task.answer.format(**row)))
        elif (label := row[task.label_field]) in labels:
            rows.append((fields, labels.index(label)))
        else:
            raise ValueError(f"{where}: label {short(repr(label))} is none of {', '.join(labels)}")
    if not rows:
        raise ValueError(f"{path}: no examples in it")
    return rows


def read_table(path: Path, skip_short: bool) -> Iterator[tuple[str, dict]]:
    """("FILE, line N", its values by column) of a .jsonl file, an object a line, or of tab-separated cells.

    The latter are under a line of column names, unquoted like GLUE's. Only a line feed ends a line; blank
    ones are left out, with `skip_short` short ones, too. ValueError: other numbers of cells.
    """
    header = None
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig")                            # a byte order mark may begin the file
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 (byte {error.start}): convert the file") from None
        cells = [cell.strip() for cell in text.split("\t")]
        if not any(cells):
            continue
        if path.suffix == ".jsonl":
            yield where, parse_object(line, where)
        elif header is None:
            header = cells
            if len(set(header)) < len(header):
                raise ValueError(f"{where}: {len(header)} columns with {len(set(header))} names")
        elif len(cells) == len(header):
            yield where, dict(zip(header, cells))
        elif len(cells) > len(header) or not skip_short:
            raise ValueError(f"{where}: {len(cells)} columns, the header has {len(header)}")


# -----------------------------------------------------------------------------------------------------------
# Writing, and reading what was written


def save_file(path: Path, content) -> None:
    """Save tensors and plain values, or JSON, as the name's ending says.

    The file is whole at any moment, the old one or the new: it takes its name when it is on the disk. One
    process at a time may save it.
    """
    memory = io.BytesIO()                # to a file, torch.save hides why a disk fails
    if path.suffix == ".pt":
        torch.save(content, memory)
    else:                                # .json: one object; .jsonl: one on each line
        lines = content if path.suffix == ".jsonl" else [content]
        memory.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    part = path.with_name(f"{path.name}.part")     # the same each time: a killed run's is written over
    with open(part, "wb") as file:
        file.write(memory.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load_file(path: Path) -> dict:
    """Tensors and plain values by name, as saved. ValueError: it is damaged, or there is code in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            if not archive.testzip():                                  # torch.load reads over a flipped bit
                return dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError:                                                    # it is not there, or cannot be read
        raise
    except Exception:                                                  # torch.load raises half a dozen types
        pass
    raise ValueError(f"{path} is damaged, or no file of this program: delete it and run again")


def load_tensors(wanted: dict[str, Tensor], found: dict[str, Tensor], where: str | Path) -> None:
    """Copy `found` into `wanted`. ValueError, with nothing changed, if names, shapes or types differ."""
    for name in wanted | found:
        ours, theirs = ("not there" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"
                        for tensor in (wanted.get(name), found.get(name)))
        if ours != theirs or not found[name].isfinite().all():
            raise ValueError(f"{where}: tensor {short(name)} is {theirs} and should be {ours}, all finite")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])
