"""The tiny GPT that the tests share: pre-trained once, about 20 s, then read from the cache as any run reads it."""

import signal
from pathlib import Path

import pytest

import train
from model import InstanceEncoder

def pytest_configure(config):
    signal.signal(signal.SIGINT, signal.default_int_handler)           # ignored where a shell runs us in the background
    config.addinivalue_line("markers", "slow: takes seconds; left out by -m 'not slow'")


CACHE = Path(train.__file__).parent / ".cache"


@pytest.fixture(scope="session")
def tiny():
    """(frozen tiny GPT, its tokenizer)"""
    gpt, tokenizer, _ = train.tiny_gpt(seed=0, cache_dir=CACHE, device="cpu")
    return InstanceEncoder(gpt).gpt, tokenizer
