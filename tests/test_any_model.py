"""experiments/any_model.py: models of Transformers behind the interface of model.GPT, and train.py on one of them."""

import dataclasses
import json
import re
import shutil

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
    "bigcode": lambda: transformers.GPTBigCodeConfig(vocab_size=50, n_embd=24, n_layer=3, n_head=3, n_positions=64,
                                                    initializer_range=0.3),
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


def test_the_check_of_the_logits_computes_where_the_model_is(monkeypatch):
    config, read, embed = transformers.LlamaConfig(**SIZES), [], any_model.AnyModel.embed
    monkeypatch.setattr(any_model.AnyModel, "embed", lambda self, tokens: read.append(tokens.device.type) or embed(self, tokens))
    with pytest.raises(RuntimeError, match="meta tensors"):            # they have no values to compare
        any_model.AnyModel(transformers.AutoModelForCausalLM.from_config(config).to("meta"))
    assert read == ["meta"]


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
    for name in ("load_frozen", "COMMAND"):
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


@pytest.fixture
def bert(tmp_path):
    """A folder with a random encoder of another family, whose tokenizer cuts texts into other pieces."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" . it was ".join(REVIEWS).split()))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    config = transformers.BertConfig(**SIZES | dict(vocab_size=len(words)))
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")        # as published: no pooler, and an output layer
    return tmp_path / "bert"


def test_an_encoder_reads_as_much_of_a_text_as_fits_its_context(folders, tmp_path):
    transformers.AutoTokenizer.from_pretrained(folders[0], eos_token="a").save_pretrained(tmp_path / "gpt2")   # states no limit
    config = transformers.GPT2Config(vocab_size=400, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    encoder = any_model.load_frozen(train.Config("sst2", model=str(folders[0]), encoder=str(tmp_path / "gpt2")))[1]
    assert torch.equal(*(encoder(torch.full((1, length), 7), torch.tensor([length])) for length in (16, 40)))


def test_h_of_another_familys_encoder_is_its_own_mean_of_its_own_tokens(folders, bert):
    gpt, encoder, tokenizer = any_model.load_frozen(train.Config("sst2", model=str(folders[0]), encoder=str(bert)))
    texts = ["a great film . It was", "the cast is terrible . It was"]
    tokens = [torch.tensor(tokenizer.encode_ordinary(text)) for text in texts]
    h = encoder(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), torch.tensor([len(row) for row in tokens]))
    theirs = transformers.AutoModel.from_pretrained(bert).eval()
    for text, found in zip(texts, h):
        own = transformers.AutoTokenizer.from_pretrained(bert)(text, return_tensors="pt")
        assert torch.allclose(found, theirs(**own).last_hidden_state[0].mean(dim=0), atol=1e-5)


@pytest.mark.parametrize("flags", ["", "--tune-encoder", "--encoder-blocks 1"])
def test_train_py_runs_with_it_goes_on_and_predicts_and_another_one_is_refused(command, bert, capsys, flags):
    command("--encoder", bert, *flags.split(), "--out", "run", "--quiet")
    assert json.loads(capsys.readouterr().out)["encoder"] == str(bert)
    command("--adapter", "run", "--predict", "a great film")
    assert capsys.readouterr().out.endswith("\ta great film\n")
    command("--resume", "run")
    assert "is finished" in capsys.readouterr().out
    weights = safetensors.torch.load_file(bert / "model.safetensors")
    weights["bert.embeddings.LayerNorm.bias"] += 1
    safetensors.torch.save_file(weights, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit):
        command("--adapter", "run", "--predict", "a great film")
    assert "this adapter was trained on another model" in capsys.readouterr().err


def metaspace():
    """A tokenizer as Llama's: a blank is part of a word's piece, and one is put before every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    bpe.decoder = decoders.Sequence(list(steps))
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    bpe.train_from_iterator(" ".join(REVIEWS).split(), trainers.BpeTrainer(special_tokens=every_byte))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe)


def test_a_tokenizer_that_puts_a_blank_before_a_text_does_not_between_its_parts():
    ours = any_model.Tokenizer(metaspace())
    for text in ("a b", " great", "    return x\n", "great film", "é\n\n  x"):
        assert ours.decode(ours.encode_ordinary(text)) == text
    assert ours.encode_ordinary("a great") + ours.encode_ordinary(" film .") == ours.encode_ordinary("a great film .")
    assert len(ours.encode_ordinary(" great")) == 1


def test_what_looks_like_a_special_token_in_a_text_is_text(folders):
    theirs = transformers.AutoTokenizer.from_pretrained(folders[0])
    theirs.add_special_tokens({"eos_token": "<end>"})
    ours = any_model.Tokenizer(theirs)
    assert ours.eot_token == theirs.convert_tokens_to_ids("<end>")
    tokens = ours.encode_ordinary("a<end>b")
    assert ours.eot_token not in tokens and ours.decode(tokens) == "a<end>b"


def test_an_adapter_knows_its_tokenizer(command, folders, tmp_path, capsys):
    shutil.copytree(folders[0], tmp_path / "model")
    flags = ["--task", "sst2", "--data", folders[1], "--epochs", 1, "--out", "run", "--quiet"]
    any_model.main([str(flag) for flag in (tmp_path / "model", *flags)])
    path = tmp_path / "model" / "tokenizer.json"
    changed = json.loads(path.read_text())
    vocab = changed["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(changed))
    with pytest.raises(SystemExit):
        command("--adapter", "run", "--predict", "a great film")
    assert "this adapter was trained on another model" in capsys.readouterr().err


@pytest.mark.parametrize("command, message", [
    ("--task sst2", "tiny is no folder: name, first of all, one that holds a model of Transformers"),
    ("empty --task sst2 --data GLUE", "empty: Transformers cannot read a model and its tokenizer there: "),
    ("cut --task sst2 --data GLUE", "cut: Transformers cannot read a model and its tokenizer there: "),
    ("without --task sst2 --data GLUE", "without lacks 2 of the model's tensors, model.layers.1."),
    ("two --task sst2 --data GLUE", "two holds several models, a.gguf: put one in a folder of its own"),
    ("MODEL --model=cut --task sst2", "model0 is the model: leave out --model"),
    ("compare nowhere --task sst2 --data GLUE", "nowhere is no folder"),
])
def test_bad_input_gets_one_line(folders, tmp_path, monkeypatch, capsys, untouched, command, message):
    monkeypatch.chdir(tmp_path)
    folder, glue = folders
    (tmp_path / "empty").mkdir()
    for name in ("cut", "without", "two"):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "two" / "a.gguf").touch()
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    kept = safetensors.torch.load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in kept.items() if "layers.1.mlp.gate" not in name and "layers.1.mlp.up" not in name}
    safetensors.torch.save_file(kept, tmp_path / "without" / "model.safetensors", {"format": "pt"})
    flags = command.replace("MODEL", str(folder)).replace("GLUE", str(glue)).split()
    with pytest.raises(SystemExit) as stop:
        any_model.main(flags)
    line, = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and ": error: " in line and message in line
