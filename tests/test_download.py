"""data.py: what is downloaded is whole or not there at all, and each failure is one line. A local server, no network."""

import hashlib
import io
import json
import re
import shutil
import ssl
import sys
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import data

CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers /name with the steps of server.plans["/name"], one a request; the last step is repeated."""

    def do_GET(self):
        plan = self.server.plans.get(self.path, [404])
        step = plan.pop(0) if len(plan) > 1 else plan[0]
        self.server.requests.append((self.path, self.headers["Range"]))
        if isinstance(step, int):
            return self.send_error(step)
        step = {"content": step} if isinstance(step, bytes) else step
        content, sent, ranges = step.get("content", CONTENT), step.get("sent"), step.get("ranges", False)
        self.server.released.wait(step.get("pause", 0))
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if ranges and self.headers["Range"] else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:sent])                          # not all of it: the connection breaks off
        self.server.released.wait(step.get("pause_after", 0))

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "PAUSE", 0.01)
    monkeypatch.setattr(data, "TIMEOUT", 5.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.handle_error = True, lambda *_: None          # it breaks off on purpose
        server.plans, server.requests, server.released = {}, [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def refused(folder, message, call, *args, **kwargs):
    """`call` fails with one line that matches, and leaves nothing behind in `folder`."""
    before = sorted(folder.rglob("*"))
    with pytest.raises((ValueError, OSError), match=message) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    assert sorted(folder.rglob("*")) == before
    return str(error.value)


# --- download --------------------------------------------------------------------------------------------------


def test_a_file_comes_whole_and_is_fetched_once(server, tmp_path, capfd):
    server.plans["/file"] = [CONTENT]
    path = tmp_path / "new" / "folder" / "file"
    for _ in range(2):
        assert data.download(f"{server.url}/file", path, SHA256) == path
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]
    assert server.requests == [("/file", None)]
    assert capfd.readouterr() == ("", "")              # no bar where no terminal is


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("quiet", [True, False])
def test_a_terminal_sees_a_bar_unless_it_is_to_be_quiet(server, tmp_path, monkeypatch, quiet):
    server.plans["/file"] = [CONTENT]
    monkeypatch.setattr("sys.stderr", Terminal())
    data.download(f"{server.url}/file", tmp_path / "file", quiet=quiet)
    assert ("250k/250k" in sys.stderr.getvalue()) != quiet


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_resumed_or_begun_again(server, tmp_path, ranges):
    server.plans["/file"] = [{"sent": 100_000, "ranges": ranges}, {"ranges": ranges}]
    path = data.download(f"{server.url}/file", tmp_path / "file", SHA256)
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-"]


@pytest.mark.parametrize("second, got", [(dict(sent=150_000, ranges=True), "150,000"), (dict(sent=1_000), "1,000")])
def test_a_connection_that_breaks_twice_is_given_up(server, tmp_path, second, got):
    server.plans["/file"] = [{"sent": 100_000}, second]
    line = refused(tmp_path, f"broken off after {got} of 256,000 bytes: try again", data.download,
                   f"{server.url}/file", tmp_path / "file")
    assert f"{server.url}/file" in line and len(server.requests) == 2


def test_wrong_content_is_refused_and_not_kept(server, tmp_path):
    server.plans["/file"] = [CONTENT[:-1] + b"?"]
    url, path = f"{server.url}/file", tmp_path / "file"
    assert SHA256 in refused(tmp_path, f"{url}: wrong content", data.download, url, path, SHA256)
    assert len(server.requests) == 1


def test_what_is_not_there_is_asked_for_once(server, tmp_path):
    refused(tmp_path, f"{server.url}/file: HTTP Error 404: Not Found: try again, or save the file as .*file yourself",
            data.download, f"{server.url}/file", tmp_path / "file")
    assert len(server.requests) == 1
    server.plans["/file"] = [{"sent": 1000}, 404]
    refused(tmp_path, "HTTP Error 404", data.download, f"{server.url}/file", tmp_path / "file")


def test_a_server_error_may_pass(server, tmp_path):
    server.plans["/file"] = [503, CONTENT]
    assert data.download(f"{server.url}/file", tmp_path / "file", SHA256).read_bytes() == CONTENT
    server.plans["/file"] = [500]
    refused(tmp_path, "HTTP Error 500", data.download, f"{server.url}/file", tmp_path / "other")
    assert len(server.requests) == 4


def test_a_server_that_says_nothing_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TIMEOUT", 0.1)
    server.plans["/file"] = [{"pause": 0.5}]
    refused(tmp_path, f"{server.url}/file: .*timed out", data.download, f"{server.url}/file", tmp_path / "file")
    assert len(server.requests) == 2


def test_a_server_that_falls_silent_is_asked_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TIMEOUT", 0.1)
    server.plans["/file"] = [{"sent": 100_000, "pause_after": 0.5, "ranges": True}, {"ranges": True}]
    assert data.download(f"{server.url}/file", tmp_path / "file", SHA256).read_bytes() == CONTENT
    assert re.fullmatch(r"bytes=\d+-", server.requests[1][1])


def test_a_secure_connection_that_breaks_is_resumed_too(server, tmp_path, monkeypatch):
    everything = shutil.copyfileobj
    def cut(response, file):                           # as TLS does when the other side is gone
        file.write(response.read(100_000))
        monkeypatch.setattr("shutil.copyfileobj", everything)
        raise ssl.SSLEOFError(8, "EOF occurred in violation of protocol")

    server.plans["/file"] = [{"ranges": True}]
    monkeypatch.setattr("shutil.copyfileobj", cut)
    assert data.download(f"{server.url}/file", tmp_path / "file", SHA256).read_bytes() == CONTENT
    assert server.requests[1] == ("/file", "bytes=100000-")


def test_no_connection_is_one_line(server, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    refused(tmp_path, f"http://127.0.0.1:{port}/file: no connection .*refused.*: try again", data.download,
            f"http://127.0.0.1:{port}/file", tmp_path / "file")


def test_two_at_once_both_get_the_whole_file(server, tmp_path):
    server.plans["/file"] = [{"pause": 0.1}]
    path, results = tmp_path / "file", []
    def fetch():
        results.append(data.download(f"{server.url}/file", path, SHA256).read_bytes())
    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 4 and list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_one_line(server, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    server.plans["/file"] = [CONTENT]
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        line = refused(tmp_path, "cannot be saved as .*--cache DIR", data.download, f"{server.url}/file", path)
        assert f"{server.url}/file" in line
    assert server.requests == []


class FullDisk(io.BytesIO):
    def write(self, chunk):
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_line_and_not_taken_for_the_network(server, tmp_path, monkeypatch):
    server.plans["/file"] = [CONTENT]
    def open_full(path, mode):
        path.touch()                                   # a full disk still has room for a name
        return FullDisk()
    monkeypatch.setattr(data, "open", open_full, raising=False)
    refused(tmp_path, "cannot be saved as .*No space left on device.*make room", data.download,
            f"{server.url}/file", tmp_path / "file")
    assert len(server.requests) == 1


# --- archives --------------------------------------------------------------------------------------------------


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_what_is_asked_for_is_written_and_nothing_else(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    members = {"RTE/train.tsv": "rows", "../outside": "no", "/outside": "no", "RTE/test.tsv": "no"}
    archive = make_zip(inside / "a.zip", members)
    data.extract(archive, "RTE", [inside / "RTE" / "train.tsv"])
    data.extract(archive, "..", [inside / "outside"])                  # the name in the archive is not a path
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"inside/a.zip", "inside/RTE/train.tsv", "inside/outside"}
    assert (inside / "RTE" / "train.tsv").read_text() == "rows"


def test_an_archive_that_is_not_one_or_lacks_the_member_is_one_line(tmp_path):
    def unreadable(name, message):
        refused(tmp_path, f"{name} cannot be read .*{message}.*: delete it", data.extract, tmp_path / name, "RTE",
                [tmp_path / "train.tsv"])

    (tmp_path / "page.zip").write_text("<html>please log in</html>")
    unreadable("page.zip", "not a zip file")
    make_zip(tmp_path / "other.zip", {"SST-2/train.tsv": "rows"})
    unreadable("other.zip", "no item named 'RTE/train.tsv'")
    content = make_zip(tmp_path / "damaged.zip", {"RTE/train.tsv": CONTENT}).read_bytes()
    (tmp_path / "damaged.zip").write_bytes(content[:60] + bytes(60) + content[120:])
    unreadable("damaged.zip", "")


# --- GLUE ------------------------------------------------------------------------------------------------------

TSV = "index\tsentence1\tsentence2\tlabel\n0\tIt pours .\tIt rains .\tentailment\n"


def glue_zip(members):
    buffer = io.BytesIO()
    make_zip(buffer, members)
    return buffer.getvalue()


def test_a_task_is_downloaded_once_and_read(server, tmp_path, monkeypatch):
    content = glue_zip({"RTE/train.tsv": TSV, "RTE/dev.tsv": TSV, "RTE/test.tsv": "hidden"})
    server.plans["/RTE.zip"] = [content]
    source = data.Source(f"{server.url}/RTE.zip", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(data.SOURCES, "rte", source)
    for _ in range(2):
        train, dev, said = data.load_task("rte", None, cache_dir=tmp_path)
        assert train == dev["dev"] == [({"a": "It pours .", "b": "It rains ."}, 1)] and said == source.url
        (tmp_path / "GLUE" / "RTE" / "RTE.zip").unlink(missing_ok=True)          # not needed any more
    assert len(server.requests) == 1
    assert sorted(path.name for path in (tmp_path / "GLUE" / "RTE").iterdir()) == ["dev.tsv", "train.tsv"]


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_reaches_every_download(server, tmp_path, monkeypatch, quiet):
    content = glue_zip({"RTE/train.tsv": TSV, "RTE/dev.tsv": TSV})
    server.plans |= {"/RTE.zip": [content], "/gpt2-xl/resolve/main/config.json": [b"{}"],
                     "/gpt2-xl/resolve/main/model.safetensors": [CONTENT]}
    monkeypatch.setitem(data.SOURCES, "rte", data.Source(f"{server.url}/RTE.zip", hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(data, "HUGGING_FACE", f"{server.url}/")
    monkeypatch.setattr("sys.stderr", Terminal())
    data.load_task("rte", None, cache_dir=tmp_path, quiet=quiet)
    data.gpt2_folder("gpt2-xl", tmp_path, quiet)
    shown = [name in sys.stderr.getvalue() for name in ("RTE.zip", "config.json", "model.safetensors")]
    assert shown == [not quiet] * 3


def test_mrpc_is_downloaded_as_it_is_published(server, tmp_path, monkeypatch):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    rows, ids = f"{header}1\t1\t2\tA .\tB .\n0\t3\t4\tC .\tD .\n".encode(), b"3\t4\n"
    server.plans |= {"/train.txt": [rows], "/ids": [ids]}
    listed = data.Source(f"{server.url}/ids", hashlib.sha256(ids).hexdigest())
    monkeypatch.setitem(data.SOURCES, "mrpc", data.Source(
        f"{server.url}/train.txt", hashlib.sha256(rows).hexdigest(), dev_ids=listed))
    train, dev, _ = data.load_task("mrpc", None, cache_dir=tmp_path)
    assert train == [({"a": "A .", "b": "B ."}, 1)] and dev == {"dev": [({"a": "C .", "b": "D ."}, 0)]}


@pytest.mark.parametrize("name, wrong", [("rte", "/train"), ("mrpc", "/train"), ("mrpc", "/ids")])
def test_a_task_with_another_content_than_published_is_refused(server, tmp_path, monkeypatch, name, wrong):
    server.plans |= {"/train": [CONTENT], "/ids": [CONTENT]}
    first, ids = (data.Source(f"{server.url}{path}", "0" * 64 if path == wrong else SHA256) for path in ("/train", "/ids"))
    monkeypatch.setitem(data.SOURCES, name, replace(first, dev_ids=ids if name == "mrpc" else None))
    with pytest.raises(ValueError, match=f"{server.url}{wrong}: wrong content, its sha256 is {SHA256} instead of 000"):
        data.load_task(name, None, cache_dir=tmp_path)


def test_a_download_that_fails_points_to_files_of_ones_own(server, tmp_path, monkeypatch):
    monkeypatch.setitem(data.SOURCES, "rte", data.Source(f"{server.url}/RTE.zip", SHA256))
    (tmp_path / "GLUE" / "RTE").mkdir(parents=True)
    refused(tmp_path, f"{server.url}/RTE.zip: HTTP Error 404.* --data DIR", data.load_task, "rte", None, cache_dir=tmp_path)
    monkeypatch.setitem(data.TASKS, "mine", replace(data.TASKS["rte"], folder="here"))
    refused(tmp_path, "mine has nowhere to be downloaded from: .*here/ with --data DIR",
            data.load_task, "mine", None, cache_dir=tmp_path)


def test_every_source_is_a_tasks_and_has_an_https_url_and_a_checksum():
    assert data.SOURCES.keys() == {name for name, task in data.TASKS.items() if task.label_words}
    for source in data.ANSWER_FILES.values():
        assert source.url.startswith("https://raw.githubusercontent.com/") and re.fullmatch("[0-9a-f]{64}", source.sha256)
    for source in [*data.SOURCES.values(), data.SOURCES["mrpc"].dev_ids]:
        assert source.url.startswith("https://dl.fbaipublicfiles.com/")
        assert re.fullmatch("[0-9a-f]{64}", source.sha256)


# --- GPT-2 -----------------------------------------------------------------------------------------------------


def test_a_gpt2_is_two_files_in_a_folder_of_its_name(server, tmp_path, monkeypatch):
    place = "/gpt2/resolve/main"
    server.plans |= {f"{place}/config.json": [b"{}"], f"{place}/model.safetensors": [CONTENT]}
    monkeypatch.setattr(data, "HUGGING_FACE", f"{server.url}/")
    monkeypatch.setitem(data.GPT2_MODELS, "gpt2", SHA256)
    for _ in range(2):
        folder = data.gpt2_folder("gpt2", tmp_path)
        assert folder == tmp_path / "gpt2" and {path.name: path.read_bytes() for path in folder.iterdir()} == {
            "config.json": b"{}", "model.safetensors": CONTENT}
    assert len(server.requests) == 2


def test_other_weights_than_the_published_ones_are_refused(server, tmp_path, monkeypatch):
    server.plans |= {"/gpt2/resolve/main/config.json": [b"{}"], "/gpt2/resolve/main/model.safetensors": [CONTENT]}
    monkeypatch.setattr(data, "HUGGING_FACE", f"{server.url}/")
    data.download(f"{server.url}/gpt2/resolve/main/config.json", tmp_path / "gpt2" / "config.json")
    refused(tmp_path, "gpt2/resolve/main/model.safetensors: wrong content", data.gpt2_folder, "gpt2", tmp_path)


def test_the_published_weights_have_an_https_url_and_a_checksum_where_one_is_known():
    assert data.HUGGING_FACE.startswith("https://huggingface.co/")
    assert re.fullmatch("[0-9a-f]{64}", data.GPT2_MODELS["gpt2"])
    assert list(data.GPT2_MODELS) == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]


# --- files of one's own ----------------------------------------------------------------------------------------


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "weights.pt"
    data.save_file(path, {"w": torch.arange(3), "name": "old"})
    refused(tmp_path, "the result cannot be saved as .*weights.pt/y", data.save_file, path / "y", {})
    with pytest.raises(TypeError):
        data.save_file(tmp_path / "result.json", {"w": torch.arange(3)})
    assert data.load_file(path)["w"].tolist() == [0, 1, 2] and list(tmp_path.iterdir()) == [path]


def test_results_are_saved_as_json_and_lines_of_it(tmp_path):
    data.save_file(tmp_path / "a.json", {"accuracy": 0.5})
    data.save_file(tmp_path / "a.jsonl", [{"epoch": 1}, {"epoch": 2}])
    assert json.loads((tmp_path / "a.json").read_text()) == {"accuracy": 0.5}
    assert [json.loads(line)["epoch"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("position", [0.25, 0.5, 0.75])
def test_a_flipped_bit_is_noticed(tmp_path, position):
    path = tmp_path / "weights.pt"
    data.save_file(path, {"w": torch.zeros(10_000)})
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)
    refused(tmp_path, "weights.pt cannot be read as saved weights .*: delete it", data.load_file, path)
