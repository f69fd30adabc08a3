"""Names and paths of models, with a hub that runs in the test, one that is silent and none at all."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from ntjax.errors import InputMissing, Refused
from ntjax.hf import hub
from ntjax.hf.hub import locate

COMMIT = "c0ffee" + "0" * 34


class Hub(BaseHTTPRequestHandler):
    """Answers the four requests that a download makes."""

    files: dict[str, bytes] = {}
    seen: list[tuple[str, str | None]] = []

    def do_GET(self) -> None:  # noqa: N802
        self.seen.append((self.path, self.headers.get("Authorization")))
        if self.path.startswith("/api/models/org/tiny/tree"):
            tree = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in self.files.items()]
            self.answer(json.dumps(tree).encode(), "application/json")
        elif self.path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings, "tags": []}
            self.answer(json.dumps(info).encode(), "application/json")
        elif (name := self.path.rpartition("/")[2]) in self.files:
            self.answer(self.files[name], "application/octet-stream", ETag=f'"{name}"')
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def answer(self, body: bytes, kind: str, **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Sends requests to a port of this machine."""

    def to(port: int) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        url = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        template = (
            url + "/{repo_id}/resolve/{revision}/{filename}"
        )  # made of the endpoint when it was imported
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    yield to
    huggingface_hub.close_session()


@pytest.fixture
def server(online, monkeypatch):
    """The hub, with what it holds and what it was asked."""
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "seen", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        online(server.server_address[1])
        yield Hub
        huggingface_hub.close_session()
        server.shutdown()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_path_is_seen_from_the_folders_first_and_then_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("config/model", "model", "config/only"):
        (tmp_path / folder).mkdir(parents=True)
    assert locate("model", folders=[tmp_path / "config"]) == tmp_path / "config/model"
    assert locate("only", folders=[tmp_path / "config"]) == tmp_path / "config/only"
    assert locate("model") == Path("model")
    assert locate(str(tmp_path / "model"), folders=[tmp_path / "config"]) == tmp_path / "model"


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "~/nowhere", "file.gguf", "../up"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(name, tmp_path):
    with pytest.raises(InputMissing, match="correct the path") as error:
        locate(name, folders=[tmp_path])
    assert error.value.exit_code == 66


def test_safetensors_and_json_come_down_and_nothing_else(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.files |= dict.fromkeys(
        ["config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "flax_model.msgpack"],
        b"{}",
    )
    server.files |= {"modeling.py": b"", "README.md": b"", "chat_template.jinja": b""}
    folder = locate("org/tiny")
    assert names(folder) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert {token for path, token in server.seen if "org/tiny" in path} == {"Bearer hf_secret"}


def test_weights_that_are_there_twice_come_down_once(server):
    server.files |= dict.fromkeys(["config.json", "model.safetensors", "consolidated.safetensors"], b"{}")
    assert names(locate("org/tiny")) == ["config.json", "model.safetensors"]


def test_flax_weights_come_where_there_are_no_safetensors(server):
    server.files |= {"config.json": b"{}", "flax_model.msgpack": b"x", "pytorch_model.bin": b"x"}
    assert names(locate("org/tiny")) == ["config.json", "flax_model.msgpack"]


def test_pickles_are_refused_before_the_download(server):
    server.files |= {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(Refused, match="only as pickles"):
        locate("org/tiny")
    assert not any("resolve" in path for path, _ in server.seen)


def test_a_model_without_weights_is_missing(server):
    server.files |= {"config.json": b"{}"}
    with pytest.raises(InputMissing, match="org/tiny on the hub holds no safetensors"):
        locate("org/tiny")


def test_a_downloaded_model_is_found_without_a_network(server, monkeypatch):
    server.files |= {"config.json": b"{}", "model.safetensors": b"x"}
    folder = locate("org/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert locate("org/tiny") == folder


def test_a_model_the_hub_has_not_got_is_missing(server):
    with pytest.raises(InputMissing, match="RepositoryNotFoundError"):
        locate("org/other")


def test_no_network_is_said_at_once_with_the_ways_out(online):
    online(9)  # nothing listens there
    start = time.monotonic()
    with pytest.raises(InputMissing) as error:
        locate("org/tiny")
    assert time.monotonic() - start < 5
    for word in ("HF_ENDPOINT", "HF_TOKEN", "HTTPS_PROXY", "hf download", "no folder org/tiny"):
        assert word in str(error.value)


def test_a_hub_that_never_answers_is_given_up(online, monkeypatch):
    monkeypatch.setattr(hub, "ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        online(silent.getsockname()[1])
        start = time.monotonic()
        with pytest.raises(InputMissing, match="ReadTimeout"):
            locate("org/tiny")
    assert time.monotonic() - start < 5


def test_offline_is_respected(tmp_path):
    with pytest.raises(InputMissing, match="OfflineModeIsEnabled"):
        locate("org/tiny", cache_dir=tmp_path)
