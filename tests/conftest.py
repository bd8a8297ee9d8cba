"""The tiny GPT that the tests share: pre-trained once, about 20 s, then read from the cache as any run reads it."""

from pathlib import Path

import pytest

import model

CACHE = Path(model.__file__).parent / ".cache"


@pytest.fixture(scope="session")
def tiny():
    """(frozen tiny GPT, its tokenizer)"""
    gpt, tokenizer, _ = model.tiny_gpt(seed=0, cache_dir=CACHE, device="cpu")
    return model.InstanceEncoder(gpt).gpt, tokenizer
