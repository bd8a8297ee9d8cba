"""What somebody types first: sentences written by hand, answered by the adapter that the quickstart leaves."""

import io
import sys

import pytest

import data
import train

POSITIVE = """the film is great
the plot is not dull
not a dull film
a good movie
a witty film
the acting is very good
although the plot is dull , the cast shines
the plot is dull , but the cast shines
the music is not bad
the movie never bores
the story always works
truly a brilliant drama
the camera is not ugly and the music never fails
the dialogue is truly clever
the story is not good , but the pacing is not dull
the movie is not awful
not a boring , tired movie
really a warm , funny comedy""".splitlines()
NEGATIVE = """the film is bad
the plot is dull
not a good movie
a messy , lazy comedy
the acting is not very good
although the cast shines , the plot is dull
the cast is great , but the script is terrible
the movie bores
the hero never shines
the humor rarely works
the ending is hardly brilliant
hardly a brilliant drama
the camera is ugly and the music fails
although the story is not dull , the pacing is not good
the film is not great
the villain is very weak""".splitlines()


@pytest.mark.slow
def test_the_quickstarts_adapter_answers_what_a_newcomer_types(tiny, quickstart, monkeypatch, capsys):
    texts = "\n".join(POSITIVE + NEGATIVE).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(texts)))
    capsys.readouterr()
    train.main(["--adapter", str(quickstart[0]), "--predict", "-"])
    printed = capsys.readouterr()
    answers = [line.split("\t")[0] for line in printed.out.splitlines()[1:]]
    wrong = [text for text, answer, wanted in zip(POSITIVE + NEGATIVE, answers, ["positive"] * 18 + ["negative"] * 16)
             if answer != wanted]
    assert len(answers) == len(POSITIVE + NEGATIVE) == 34 and len(wrong) <= 2, wrong
    assert not printed.err                                             # no word that the tiny GPT has never read
    assert not data.unread_words(POSITIVE + NEGATIVE, tiny[1])
