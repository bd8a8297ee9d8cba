"""README.md and experiments/README.md tell the truth about files, commands and code.

The accuracies in them are of the commands they name.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch

import lopa
import train
from experiments import compare

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
EXPERIMENTS = (ROOT / "experiments" / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)       # ```py is looked at alone


def commands(program: str) -> list[str]:
    """The commands of both pages that run `program`, a pattern, without line breaks."""
    text = re.sub(r"\\\n *", "", README + EXPERIMENTS)
    fenced = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    in_prose = re.findall(rf"`({program}[^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return in_prose + [found for code in fenced for found in re.findall(rf"{program}[^\n&]*", code)]


def words(command: str) -> list[str]:
    """The command's words, with a value for each placeholder."""
    return shlex.split(re.sub(r"\b[A-Z]{2,}\b", lambda word: {"METHOD": "lopa"}.get(word[0], "1"), command), comments=True)


def test_line_counts_of_the_file_map_are_true():
    counted = re.findall(r"^\| \[`([\w./]+)`\]\(\1\) \| (\d+) \|", README, flags=re.MULTILINE)
    assert {name for name, _ in counted} >= {"lopa.py", "model.py", "data.py", "train.py"}
    for name, lines in counted:
        assert len((ROOT / name).read_text().splitlines()) == int(lines), name


def test_one_model_serves_many_users():
    code, = (block for block in BLOCKS if "FOLDER" not in block)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.slow
def test_the_loop_for_a_model_of_transformers_learns_and_leaves_an_adapter(tmp_path, monkeypatch):
    """On a random tiny Llama, whose h has the words in it: the adapter tells the labels of its texts."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: experiments/requirements.txt")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [f"{article} {word} {noun} . It was" for word in "great fine witty poor dull weak".split()
             for article in ("a", "one", "this truly") for noun in "film plot cast scene hero music end joke".split()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([f"{text} good bad" for text in texts], trainers.BpeTrainer(
        special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>").save_pretrained(tmp_path)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
        vocab_size=5300, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=64)).bfloat16().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)                                        # adapter.pt goes there
    labels = (torch.arange(len(texts)) < len(texts) // 2).long()
    code, = (block for block in BLOCKS if "FOLDER" in block)
    page = dict(FOLDER=str(tmp_path), texts=2 * texts, labels=labels.repeat(2))
    exec(compile(code, "README.md", "exec"), page)
    saved = torch.load("adapter.pt", weights_only=True)
    prompt = lopa.LoPA(24, 24)
    prompt.load_state_dict(saved["prompt"])
    X_e, lengths, h = page["read"](texts)
    logits = page["model"](inputs_embeds=prompt.eval()(X_e, (h - saved["mean"]) / saved["std"])).logits
    scores = logits[range(len(h)), 10 + lengths - 1][:, [page["bad"], page["good"]]]
    assert (scores.argmax(dim=1) == labels).float().mean() > 0.9
    assert page["model"].dtype == torch.bfloat16 and page["answer"].shape == (1, 1)


@pytest.mark.parametrize("command", commands(r"(?:python|torchrun [^\n`]*) train\.py"))
def test_every_command_is_one_that_train_py_takes(command):
    flags = words(command)[words(command).index("train.py") + 1:]
    if "--help" not in flags:
        train.build_parser().parse_args(flags)


@pytest.mark.parametrize("command", commands(r"python -m experiments\.compare"))
def test_every_comparison_is_one_that_compare_py_takes(command):
    compare.build_parser().parse_args(words(command)[3:])


def test_every_experiment_that_is_named_is_there():
    named = set(re.findall(r"experiments\.(\w+)", README + EXPERIMENTS))
    assert {(ROOT / "experiments" / f"{name}.py").is_file() for name in named} == {True}
    assert named | {"evidence"} == {path.stem for path in (ROOT / "experiments").glob("*.py")}     # no program


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "results").glob("*/runs.jsonl")), ids=lambda path: path.parent.name)
def test_the_accuracies_of_the_real_model_are_those_of_the_committed_runs(path):
    scores = [row.split(" | ")[3] for row in compare.table(path).splitlines()[2:]]
    assert scores and all(score in EXPERIMENTS for score in scores), scores
