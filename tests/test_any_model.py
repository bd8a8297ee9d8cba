"""experiments/any_model.py: models of Transformers behind the interface of model.GPT, and train.py on one of them."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed: experiments/requirements.txt")
import safetensors.torch

import data
import train
from experiments import any_model, compare
from lopa import add_lora
from model import InstanceEncoder

SIZES = dict(vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
             max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "opt": lambda: transformers.OPTConfig(**SIZES | dict(tie_word_embeddings=True), ffn_dim=40, word_embed_proj_dim=16,
                                          init_std=0.3),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, num_key_value_heads=2),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=50, n_embd=24, n_layer=3, n_head=4, n_positions=64, initializer_range=0.3),
}


@pytest.fixture(params=CONFIGS)
def pair(request):
    """(the adapter, another instance of the same model, in Transformers' hands alone)."""
    torch.manual_seed(0)
    config = (CONFIGS | WINDOWED)[request.param]
    theirs = transformers.AutoModelForCausalLM.from_config(config()).eval()
    with torch.no_grad():                                              # norms and biases start at 1 and 0
        for p in theirs.parameters():
            p += 0.05 * torch.randn_like(p)
    twin = transformers.AutoModelForCausalLM.from_config(config()).eval()
    twin.load_state_dict(theirs.state_dict())
    return any_model.AnyModel(twin).requires_grad_(False), theirs


def test_logits_are_transformers_own(pair):
    ours, theirs = pair
    tokens = torch.randint(50, (3, 20))
    expected = theirs(tokens).logits
    assert torch.allclose(ours(tokens), expected, atol=1e-5)
    only = torch.tensor([7, 3])
    assert torch.allclose(ours.logits(ours.hidden(ours.embed(tokens)), only), expected[..., only], atol=1e-5)
    assert (ours.config.vocab_size, ours.config.n_positions, ours.config.n_layer) == (50, 64, 3)
    assert ours.config.n_embd == ours.embed(tokens).shape[-1]


def test_padding_on_the_right_changes_nothing(pair):
    ours, theirs = pair
    tokens, lengths = torch.randint(50, (4, 9)), torch.tensor([9, 4, 1, 6])
    for row, length, state in zip(tokens, lengths, ours.hidden_at(ours.embed(tokens), lengths - 1)):
        assert torch.allclose(ours.logits(state), theirs(row[None, :length]).logits[0, -1], atol=1e-5)


def test_a_prompt_in_front_shifts_the_text(pair):
    """Prompt vectors that are embeddings of tokens do what these tokens do in front of the text."""
    ours, theirs = pair
    tokens = torch.randint(50, (2, 8))
    prompt = ours.embed(tokens[:, :3])
    hidden = ours.hidden(torch.cat([prompt, ours.embed(tokens[:, 3:])], dim=1))
    assert torch.allclose(ours.logits(hidden), theirs(tokens).logits, atol=1e-5)


def test_hidden_after_some_blocks_is_transformers_own(pair):
    ours, theirs = pair
    tokens = torch.randint(50, (2, 8))
    states = theirs(tokens, output_hidden_states=True).hidden_states
    if states[1].shape[-1] != ours.config.n_embd:                      # OPT, whose embeddings are narrower
        with pytest.raises(ValueError, match="16 features and the states between the blocks 24: --encoder-blocks 0"):
            ours.hidden(ours.embed(tokens), num_blocks=1)
        return
    for num_blocks in (1, 2):
        found = ours.hidden(ours.embed(tokens), num_blocks=num_blocks)
        assert torch.allclose(found, states[num_blocks], atol=1e-5)
    assert InstanceEncoder(ours).num_blocks == 2


def test_lora_finds_the_attention_projections_and_starts_as_the_model(pair):
    ours, theirs = pair
    tokens = torch.randint(50, (2, 8))
    expected = theirs(tokens).logits
    add_lora(ours, rank=2)
    assert torch.allclose(ours(tokens), expected, atol=1e-5)
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert {re.search(r"\.(\d)\.", name)[1] for name in trained} == set("012")     # something in every block
    for p in trained.values():
        p.data.normal_(std=0.2)
    assert not torch.allclose(ours(tokens), expected, atol=1e-2)


WINDOWED = {                                                          # what padding amid a text would disturb
    "mistral": lambda: transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4),
    "lfm2": lambda: transformers.Lfm2Config(**SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"]),
}


@pytest.mark.parametrize("pair", [*CONFIGS, *WINDOWED], indirect=True)
def test_unequal_rows_are_generated_as_each_is_without_a_cache(pair):
    ours, theirs = pair
    tokens, lengths = torch.randint(50, (4, 9)), torch.tensor([9, 4, 1, 6])
    free = ours.generate(ours.embed(tokens), 12, lengths, ends=torch.tensor([49]))
    assert free.unique().numel() > 3
    ends = torch.stack([free[0, 3], torch.tensor(49)])                 # now the first row ends sooner, or others do
    for generated, ends in ((free, ends[1:]), (ours.generate(ours.embed(tokens), 12, lengths, ends), ends)):
        assert generated.shape == (4, 12)
        for row, length, found in zip(tokens, lengths, generated):
            over = torch.isin(found, ends).nonzero()[:1, 0]
            if len(over):                                              # behind it stands nothing but ends[0]
                assert (found[over + 1:] == ends[0]).all()
                found = found[:over + 1]
            whole = torch.cat([row[:length], found])[None]
            with torch.no_grad():
                assert torch.equal(theirs(whole).logits[0, length - 1:-1].argmax(dim=-1), found)


def test_a_model_that_does_more_to_its_logits_is_refused():
    config = transformers.CohereConfig(**SIZES, logit_scale=0.1)
    with pytest.raises(ValueError, match="CohereForCausalLM does more to its logits"):
        any_model.AnyModel(transformers.AutoModelForCausalLM.from_config(config))


REVIEWS = ["a great film", "a terrible film", "great acting", "terrible acting", "a great plot and a great cast",
           "a terrible plot", "the cast is great", "the cast is terrible"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a folder with a random Llama and a tokenizer in it, a folder with GLUE's files)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    folder, glue = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("glue")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([f"{text} . It was great terrible" for text in REVIEWS] * 5,
                            trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | dict(vocab_size=bpe.get_vocab_size()), num_key_value_heads=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (glue / "SST-2").mkdir()
    rows = "".join(f"{text}\t{int('great' in text)}\n" for text in REVIEWS)
    for name in ("train", "dev"):
        (glue / "SST-2" / f"{name}.tsv").write_text("sentence\tlabel\n" + rows)
    return folder, glue


@pytest.fixture
def untouched(monkeypatch):
    """What the programs put in train's place is taken out again."""
    for name in ("load_model", "COMMAND"):
        monkeypatch.setattr(train, name, getattr(train, name))


@pytest.fixture
def command(folders, tmp_path, monkeypatch, untouched):
    monkeypatch.chdir(tmp_path)
    task = [folders[0], "--task", "sst2", "--data", folders[1], "--epochs", 2, "--batch-size", 4]

    return lambda *flags: any_model.main([str(flag) for flag in (
        flags if "--adapter" in flags or "--resume" in flags else [*task, *flags])])


@pytest.mark.parametrize("flags", ["--method lopa", "--method lora", "--method idpg --encoder-blocks 0", "--method full",
                                   "--tune-encoder", "--dtype bfloat16", "--method adept"])
def test_train_py_runs_on_it_and_predicts_from_the_adapter_alone(command, capsys, flags):
    command(*flags.split(), "--out", "run", "--quiet")
    assert json.loads(capsys.readouterr().out)["accuracy"] in [i / 8 for i in range(9)]
    command("--adapter", "run", "--predict", "a great film")
    header, line = capsys.readouterr().out.splitlines()
    assert header == "label\tnegative\tpositive\tsentence" and line.endswith("\ta great film")


@pytest.mark.parametrize("flags", ["--method lopa", "--method lora", "--dtype bfloat16"])
def test_a_task_with_answers_runs_on_it_and_predicts(command, folders, tmp_path, capsys, monkeypatch, flags):
    task = dataclasses.replace(data.TASKS["cruxeval_o"], max_answer=12)           # its context is 64
    monkeypatch.setitem(data.TASKS, "cruxeval_o", task)
    rows = [dict(code=f"f = {i}", input=str(i), output=f"[{i}]", id=i) for i in range(8)]
    (tmp_path / "cruxeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command("--task", "cruxeval_o", "--data", tmp_path, *flags.split(), "--out", "run", "--quiet")
    assert json.loads(capsys.readouterr().out)["accuracy"] in [i / 4 for i in range(5)]
    assert len((tmp_path / "run" / "completions.jsonl").read_text().splitlines()) == 4
    command("--adapter", "run", "--predict", "f = 1\t1")
    header, line = capsys.readouterr().out.splitlines()
    assert header == "answer\tcode\tinput" and line.endswith('\t"f = 1"\t"1"')


def test_it_goes_on_where_it_was_interrupted(command, capsys, monkeypatch):
    command("--out", "whole", "--quiet")
    save = train.save

    def save_once(path, content):
        save(path, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "save", save_once)
        command("--out", "cut", "--quiet")
    assert "to go on: python -m experiments.any_model --resume cut" in capsys.readouterr().err
    command("--resume", "cut", "--quiet")
    tensors = [torch.load(f"{name}/adapter.pt", weights_only=True)["tensors"] for name in ("whole", "cut")]
    assert all(torch.equal(tensors[1][name], tensor) for name, tensor in tensors[0].items())


def test_a_study_of_compare_runs_on_it(folders, tmp_path, monkeypatch, untouched):
    folder, glue = map(str, folders)
    flags = ["--methods", "lopa,lopa-blind", "--seeds", "0", "--rates", "default", "--epochs", "1", "--out", str(tmp_path)]
    any_model.main(["compare", folder, "--task", "sst2", "--data", glue, *flags])
    about, _, *lines = compare.read_lines(tmp_path / "runs.jsonl")
    assert about["model"] == folder and [line["row"] for line in lines] == ["lopa", "lopa-blind"]


@pytest.mark.parametrize("method", ["pt", "lopa", "idpg", "dept", "adept"])
def test_a_prompt_starts_from_the_words_that_are_given(folders, untouched, method):
    folder, glue = map(str, folders)
    train.load_model = any_model.load_model
    config = train.Config("sst2", method, folder, data=glue, init_text="a great film", num_virtual_tokens=5, quiet=True)
    model = train.build(config, train.prepare(config))
    ids = transformers.AutoTokenizer.from_pretrained(folder)("a great film")["input_ids"]
    words = model.gpt.embed(torch.tensor((ids * 5)[:5]))               # over and over
    read, _ = model.read(torch.zeros(3, 1, dtype=torch.long), torch.ones(3), torch.randn(3, words.shape[1]))
    assert torch.allclose(read[:, :5], words.expand(3, -1, -1), atol=1e-6)


@pytest.mark.parametrize("command, message", [
    ("any_model --task sst2", "tiny is no folder: name, first of all, one that holds a model of Transformers"),
    ("any_model empty --task sst2 --data GLUE", "empty: Transformers cannot read a model and its tokenizer there: "),
    ("any_model cut --task sst2 --data GLUE", "cut: Transformers cannot read a model and its tokenizer there: "),
    ("any_model without --task sst2 --data GLUE", "without lacks 2 of the model's tensors, model.layers.1."),
    ("any_model compare nowhere --task sst2 --data GLUE", "nowhere is no folder"),
    ("templates nowhere --data GLUE", "nowhere is no folder"),
    ("templates MODEL --data nowhere", "nowhere/SST-2/train.tsv not found"),
    ("templates MODEL --data GLUE --rows 0", "--max-train: 0 is not between"),
    ("costs MODEL --data nowhere", "nowhere/SST-2/train.tsv not found"),
])
def test_bad_input_gets_one_line(folders, tmp_path, monkeypatch, capsys, untouched, command, message):
    monkeypatch.chdir(tmp_path)
    folder, glue = folders
    (tmp_path / "empty").mkdir()
    for name in ("cut", "without"):
        shutil.copytree(folder, tmp_path / name)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    kept = safetensors.torch.load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in kept.items() if "layers.1.mlp.gate" not in name and "layers.1.mlp.up" not in name}
    safetensors.torch.save_file(kept, tmp_path / "without" / "model.safetensors", {"format": "pt"})
    program, *flags = command.replace("MODEL", str(folder)).replace("GLUE", str(glue)).split()
    monkeypatch.setattr(sys, "argv", [program, *flags])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"experiments.{program}").main(*[flags] if program == "any_model" else [])
    line, = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and f"error: {message}" in line


def test_templates_are_scored_as_the_bare_model_answers(folders, capsys, monkeypatch):
    from experiments import templates

    folder, glue = folders
    words = [("{sentence} . It was", " terrible", " great"), ("It was great : {sentence} =", " great", " terrible")]
    monkeypatch.setattr(templates, "TEMPLATES", {"sst2": words})
    monkeypatch.setattr(sys, "argv", ["templates", str(folder), "--data", str(glue), "--dtype", "float32"])
    templates.main()
    printed = [float(row.split(" | ")[-1].strip("| ")) for row in capsys.readouterr().out.splitlines()[2:]]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for (template, *labels), score in zip(words, printed, strict=True):
        ids = [tokenizer(word)["input_ids"][0] for word in labels]
        answers = [model(torch.tensor([tokenizer(template.format(sentence=text))["input_ids"]])).logits[0, -1, ids].argmax()
                   for text in REVIEWS]
        right = [int(answer) == ("great" in text) for answer, text in zip(answers, REVIEWS)]
        assert abs(score - sum(right) / len(right)) < 1e-3


def test_one_text_is_timed_without_padding(folders, capsys, monkeypatch):
    """costs.py: every method sees every text alone, as long as it is."""
    from experiments import costs

    folder, glue = folders
    for name, number in dict(BATCH_SIZE=2, NUM_BATCHES=2, NUM_TEXTS=3).items():
        monkeypatch.setattr(costs, name, number)
    widths, forward = [], train.Adapted.forward
    monkeypatch.setattr(train.Adapted, "forward", lambda model, tokens, lengths, *rest: widths.append(
        (*tokens.shape, lengths.max().item())) or forward(model, tokens, lengths, *rest))
    monkeypatch.setattr(train, "load_model", any_model.load_model)
    monkeypatch.setattr(costs.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="0"))
    table = costs.costs(SimpleNamespace(folder=str(folder), data=str(glue), dtype="float32"))
    assert [row.split(" | ")[0].strip("| ") for row in table.splitlines()[2:]] == ["no prompt", *costs.METHODS]
    alone = [(width, longest) for rows, width, longest in widths if rows == 1]
    assert len(alone) == 3 * 6 * 2 and all(width == longest for width, longest in alone)
