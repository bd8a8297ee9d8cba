"""experiments/download.py: a file is whole or not there, and each failure is one line. A local server, no network."""

import hashlib
import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import data
from experiments import download

DOWNLOAD = dict(main=download.main, program="download")
TABLE = "sentence\tlabel\na fine film\t1\na dull film\t0\n"


@pytest.fixture
def server(monkeypatch):
    """Answers /NAME with server.files["/NAME"], (bytes, how many of them come); None is all."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            content, sent = self.server.files.get(self.path, (None, None))
            if content is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:sent])                           # not all of it: the connection breaks off

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked, server.url = {}, [], f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def offer(server, monkeypatch, name, files, sha256=True):
    """The files of `name`, {file: content}, are on the server, and these are their addresses."""
    server.files |= {f"/{file}": (content, None) for file, content in files.items()}
    monkeypatch.setitem(download.SOURCES, name, {file: (
        f"{server.url}/{file}", hashlib.sha256(content).hexdigest() if sha256 else None)
        for file, content in files.items()})


def zipped(**members):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name, text in members.items():
            archive.writestr(f"SST-2/{name}.tsv", text)
    return memory.getvalue()


def test_a_zip_becomes_what_train_py_reads_and_what_is_there_is_kept(server, tmp_path, monkeypatch, capsys):
    offer(server, monkeypatch, "sst2", {"SST-2.zip": zipped(train=TABLE, dev=TABLE, test="unused")})
    for already in range(2):
        download.main(["sst2", "--to", str(tmp_path)])
        assert f"python train.py --task sst2 --data {tmp_path}\n" in capsys.readouterr().out
        assert server.asked == ["/SST-2.zip"]
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["dev.tsv", "train.tsv"]
    rows, _, _ = data.load_task("sst2", str(tmp_path))
    assert rows == [({"sentence": "a fine film"}, 1), ({"sentence": "a dull film"}, 0)]
    (tmp_path / "SST-2" / "dev.tsv").unlink()
    (tmp_path / "SST-2" / "train.tsv").write_text("mine")              # only what is missing is written
    download.main(["sst2", "--to", str(tmp_path)])
    assert [(tmp_path / "SST-2" / name).read_text() for name in ("train.tsv", "dev.tsv")] == ["mine", TABLE]


def test_answers_and_weights_get_their_names_and_the_command_names_all_of_it(server, tmp_path, monkeypatch, capsys):
    lines = b"".join(json.dumps(dict(code=str(i), input="1", output="2")).encode() + b"\n" for i in range(4))
    offer(server, monkeypatch, "cruxeval_o", {"cruxeval.jsonl": lines})
    offer(server, monkeypatch, "gpt2", {"gpt2/config.json": b"{}", "gpt2/model.safetensors": b"weights"}, sha256=False)
    download.main(["gpt2", "cruxeval_o", "--to", str(tmp_path)])
    assert f"train.py --task cruxeval_o --data {tmp_path} --model {tmp_path / 'gpt2'}" in capsys.readouterr().out
    assert (tmp_path / "gpt2" / "model.safetensors").read_bytes() == b"weights"
    assert len(data.load_task("cruxeval_o", str(tmp_path))[0]) == 2


@pytest.mark.parametrize("content, sha256, message", [
    ((None, None), False, "HTTP Error 404: Not Found"),
    ((b"abcdef", 4), False, "4 of 6 bytes came"),                      # where no sha256 is known
    ((b"other", None), True, 'invalid hash value (expected "'),
])
def test_what_does_not_come_whole_is_refused_in_one_line_and_leaves_nothing(
        server, tmp_path, monkeypatch, refused, content, sha256, message):
    offer(server, monkeypatch, "gpt2", {"gpt2/config.json": b"abcdef"}, sha256)
    server.files["/gpt2/config.json"] = content
    line = refused("gpt2", "--to", tmp_path, **DOWNLOAD)
    assert line.startswith(f"download: error: {server.url}/gpt2/config.json: {message}")
    assert line.endswith(f"try again, or save the file as {tmp_path / 'gpt2' / 'config.json'} yourself")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_damaged_zip_nobody_there_and_an_unknown_name_are_one_line(server, tmp_path, monkeypatch, refused):
    offer(server, monkeypatch, "sst2", {"SST-2.zip": zipped(train=TABLE)})
    assert "SST-2.zip cannot be read" in refused("sst2", "--to", tmp_path, **DOWNLOAD)     # without dev.tsv
    monkeypatch.setitem(download.SOURCES, "gpt2", {"config.json": ("http://127.0.0.1:9/config.json", None)})
    assert "http://127.0.0.1:9/config.json: " in refused("gpt2", "--to", tmp_path, **DOWNLOAD)
    (tmp_path / "file").touch()
    assert "config.json: [Errno 17] File exists" in refused("gpt2", "--to", tmp_path / "file", **DOWNLOAD)
    assert "invalid choice: 'mrpc'" in refused("mrpc", **DOWNLOAD)
