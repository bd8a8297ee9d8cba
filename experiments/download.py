"""Fetch published models and data sets, so that train.py can read them.

    python -m experiments.download gpt2 sst2 rte                into the folder downloads, or --to DIR
    python train.py --task sst2 --model downloads/gpt2 --data downloads

A file that is there is kept, one that is not whole never gets its name. (MRPC's go into DIR/MRPC by hand.)
"""

import argparse
import socket
import tempfile
import zipfile
import zlib
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import torch

import data
from model import short

# name -> {file in DIR: its address, its sha256 where a public file states one}. GLUE's are those that Hugging
# Face's datasets recorded (datasets/glue/dataset_infos.json @040102f). MBPP's form is that of LoPA's authors.
GLUE, GITHUB = "https://dl.fbaipublicfiles.com/glue/data/", "https://raw.githubusercontent.com/"
LOPA = GITHUB + "jabhinav/Prompt-Tuning-Strikes-Back-with-LOPA/78bb4b85f95be3587c47607133b2463ff3f99d0b/"
SOURCES = {name: {file: (GLUE + file, sha256)} for name, file, sha256 in [
    ("sst2", "SST-2.zip", "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    ("mnli", "MNLI.zip", "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    ("qnli", "QNLIv2.zip", "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    ("qqp", "QQP-clean.zip", "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    ("rte", "RTE.zip", "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee")]}
SOURCES["cruxeval_o"] = SOURCES["cruxeval_i"] = {
    "cruxeval.jsonl": (GITHUB + "facebookresearch/cruxeval/main/data/cruxeval.jsonl",
                       "8368b81047dc5014e4caf5a2f97604eff7644e0ecd7415e3ceeb184bbc2e0c96")}
SOURCES["mbpp"] = {
    "mbpp_train.jsonl": (LOPA + "mxeval/mbpp_train_release_v1.jsonl",
                         "54557a6fc7f99d2b5dc0ded287a2f3f5de56b57de300af2588b08a3e8ccd4b3a"),
    "mbpp_test.jsonl": (LOPA + "mxeval/mbpp_test_release_v1.jsonl",
                        "a894ba16db864ca9a6485cbb300db723608e84d98bec822d2297d6164eb9223f")}
MODELS = {"gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
          "gpt2-medium": None, "gpt2-large": None, "gpt2-xl": None}    # sha256 of model.safetensors
for name, sha256 in MODELS.items():
    url = f"https://huggingface.co/openai-community/{name}/resolve/main/"
    SOURCES[name] = {f"{name}/config.json": (url + "config.json", None),
                     f"{name}/model.safetensors": (url + "model.safetensors", sha256)}


def fetch(name: str, folder: Path) -> None:
    """Leave the files of a model or task in `folder`. ValueError or OSError with one line."""
    for file, (url, sha256) in SOURCES[name].items():
        if not file.endswith(".zip"):
            download(url, folder / file, sha256)
            continue
        task = data.TASKS[name]
        wanted = [folder / task.folder / f"{split}.tsv" for split in ("train", *task.dev_splits)]
        if missing := [path for path in wanted if not path.exists()]:
            download(url, folder / file, sha256)
            extract(folder / file, missing)


def download(url: str, path: Path, sha256: str | None) -> None:
    """Fetch `url` to `path`, unless that exists. ValueError: what happened, and what to do."""
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(part), hash_prefix=sha256)
        if sha256 is None:               # torch.hub does not see that a connection ended too soon
            with urlopen(url) as response:
                if response.length not in (None, part.stat().st_size):
                    raise OSError(f"{part.stat().st_size} of {response.length} bytes came")
        part.replace(path)
    except (OSError, RuntimeError, HTTPException) as error:            # RuntimeError: of the sha256
        advice = f"try again, or save the file as {path} yourself"
        raise ValueError(f"{url}: {short(error, 200)}: {advice}") from None
    finally:
        with suppress(OSError):
            part.unlink()


def extract(archive: Path, paths: list[Path]) -> None:
    """Write the members FOLDER/NAME of a zip to the paths .../FOLDER/NAME, and remove the zip."""
    try:
        with zipfile.ZipFile(archive) as opened, tempfile.TemporaryDirectory(dir=archive.parent) as part:
            for path in paths:
                path.parent.mkdir(exist_ok=True)
                Path(opened.extract(f"{path.parent.name}/{path.name}", part)).replace(path)
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{archive} cannot be read ({short(error)}): delete it and try again") from None
    archive.unlink()


def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for bad input, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser("download", argparse.SUPPRESS, __doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=SOURCES, metavar="NAME", help=", ".join(SOURCES))
    parser.add_argument("--to", type=Path, default="downloads", metavar="DIR", help="default: downloads")
    args = parser.parse_args(argv)
    socket.setdefaulttimeout(30)         # seconds without a byte
    try:
        for name in args.names:
            fetch(name, args.to)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "download: interrupted; the same command goes on with the next file\n")
    task = next((name for name in args.names if name in data.TASKS), "")
    model = next((name for name in args.names if name in MODELS), "")
    print("to use them: python train.py" + f" --task {task} --data {args.to}" * bool(task)
          + f" --model {args.to / model}" * bool(model))


if __name__ == "__main__":
    main()
