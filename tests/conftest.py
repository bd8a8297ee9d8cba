"""What the tests share: the tiny GPT, pre-trained once (about 20 s) and then read from the cache, and runs of train.py."""

import functools
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import data
import train
from model import InstanceEncoder

CACHE = Path(train.__file__).parent / ".cache"


def pytest_configure(config):
    signal.signal(signal.SIGINT, signal.default_int_handler)           # ignored where a shell runs us in the background
    config.addinivalue_line("markers", "slow: takes seconds; left out by -m 'not slow'")
    for name in ("pretraining_text", "tiny_tokenizer"):                # the same in every run of this process
        setattr(data, name, functools.cache(getattr(data, name)))


def pytest_collection_finish(session):
    """The tutorial takes the longest: it runs in a process of its own, beside the tests that come before its own."""
    if any(item.name.startswith("test_every_block_runs") for item in session.items):
        data.tiny_gpt(0, CACHE, quiet=True)                            # or that process says that it pre-trains it
        session.config.page = subprocess.Popen([sys.executable, "-m", "tests.test_tutorial"], cwd=CACHE.parent, text=True,
                                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def pytest_unconfigure(config):
    if hasattr(config, "page"):
        config.page.kill()


@pytest.fixture(scope="session")
def tiny():
    """(frozen tiny GPT, its tokenizer)"""
    gpt, tokenizer = data.tiny_gpt(0, CACHE)
    return InstanceEncoder(gpt).gpt, tokenizer


@pytest.fixture(scope="session")
def glue(tmp_path_factory):
    """A folder for --data: of the sample's training rows 80 to train on, 40 of them to score."""
    folder = tmp_path_factory.mktemp("glue")
    (folder / "SST-2").mkdir()
    rows = [f"{fields['sentence']}\t{label}\n" for fields, label in data.sst2_sample()[0][:80]]
    for name, some in (("train", rows), ("dev", rows[:40])):
        (folder / "SST-2" / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(some))
    return folder


@pytest.fixture
def refused(capsys):
    """A function: run the command line, which has to end with exit code 2 and one line of error; returns that line."""
    def run(*argv, main=train.main, program="train.py"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        *progress, error = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and error.startswith(f"{program}: error: ") and len(error) < 700
        assert all("%|" in line or not line for line in progress)      # torch's bar, of a download
        return error

    return run
