"""Repositories are downloaded as the hub serves them: what is needed, once, and nothing else."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
from huggingface_hub import constants

from mlx_llava.checkpoint import download
from tests.conftest import GOLDENS, ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """A repository, someone/tiny, as the hub's API shows it."""

    folder: ClassVar[Path]
    fetched: ClassVar[list[str]]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/someone/tiny/"):
            entries = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                for file in sorted(self.folder.iterdir())
            ]
            names = [{"rfilename": entry["path"]} for entry in entries]
            info = {"id": "someone/tiny", "sha": COMMIT, "siblings": names}
            self.answer(json.dumps(entries if "/tree/" in path else info).encode())
        elif path.startswith("/someone/tiny/resolve/"):
            name = path.rpartition("/")[2]
            if self.command == "GET":
                self.fetched.append(name)
            self.answer((self.folder / name).read_bytes(), f'"{name}"')
        else:
            self.send_error(404)

    def answer(self, data: bytes, etag: str = '"x"') -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", etag)
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    Hub.folder, Hub.fetched = tmp_path / "served", []
    shutil.copytree(GOLDENS / "llava", Hub.folder)
    (Hub.folder / "training_args.bin").write_bytes(b"not wanted")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask(endpoint: str, home: Path, *more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    arguments = ["--model", "someone/tiny", "--prompt", "hi", "--max-tokens", "4", "--quiet"]
    return subprocess.run(
        [sys.executable, "-m", "mlx_llava.generate", *arguments, *more],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_repository_is_downloaded_once_and_then_works_offline(hub, tmp_path):
    home = tmp_path / "home"
    first = ask(hub, home)
    assert first.returncode == 0, first.stderr
    wanted = {path.name for path in (GOLDENS / "llava").iterdir()}
    assert sorted(Hub.fetched) == sorted(wanted)
    second = ask(hub, home)
    assert sorted(Hub.fetched) == sorted(wanted)
    offline = ask("http://127.0.0.1:9", home, "--offline")
    assert first.stdout == second.stdout == offline.stdout
    assert offline.stderr == ""


def test_torch_files_are_fetched_where_there_are_no_safetensors(hub, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    tensors = load_file(Hub.folder / "model.safetensors")
    torch.save(tensors, Hub.folder / "pytorch_model.bin")
    (Hub.folder / "model.safetensors").unlink()
    done = ask(hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert "pytorch_model.bin" in Hub.fetched
    assert "training_args.bin" not in Hub.fetched


def test_a_download_says_its_size_before_and_only_once(hub, tmp_path):
    arguments = ["--model", "someone/tiny", "--prompt", "hi", "--max-tokens", "1"]
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    said = [
        subprocess.run(
            [sys.executable, "-m", "mlx_llava.generate", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        for _ in range(2)
    ]
    note = rf"note: someone/tiny is downloaded once, 0.3 MB, to {tmp_path}/hub, which has [\d.]+ GB"
    assert re.match(note, said[0])
    assert "downloaded" not in said[1]


@pytest.fixture
def in_process(hub, tmp_path, monkeypatch):
    """The same hub, for this process."""
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    resolve = f"{hub}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("in_process")
def test_what_has_no_room_is_refused_before_the_first_byte(monkeypatch):
    with pytest.raises(ValueError, match=r"someone/tiny has 0.3 MB of weights and .* --model \w"):
        download.download("someone/tiny", None, False, memory=100)
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"takes 0.3 MB of disk and .* has 0.0 MB free, so noth"):
        download.download("someone/tiny", None, False, memory=None)
    assert Hub.fetched == []


@pytest.mark.usefixtures("in_process")
def test_a_download_that_breaks_off_is_not_called_missing(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(FileNotFoundError, match=r"^someone/tiny could not be downloaded: .*No spa"):
        download.download("someone/tiny", None, False, memory=None)


def test_a_hub_out_of_reach_is_one_line(tmp_path):
    done = ask("http://127.0.0.1:9", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: There is no folder someone/tiny, and it is not on the")
    assert done.stderr.count("\n") == 1


def test_a_package_without_its_embedded_model_asks_for_one(tmp_path, monkeypatch):
    from mlx_llava.checkpoint import hub

    package = tmp_path / "mlx_llava"
    package.mkdir()
    monkeypatch.setattr(hub, "__file__", str(package / "checkpoint" / "hub.py"))
    with pytest.raises(FileNotFoundError, match="came without its embedded model; name a model"):
        hub.find_checkpoint(None, None, False)
    for place in (tmp_path, package):  # beside the package in a checkout, inside it in a wheel
        folder = place / "weights" / "tiny-llava"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        assert hub.find_checkpoint(None, None, False) == folder
