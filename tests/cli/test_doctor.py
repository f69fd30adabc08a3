"""doctor: what it says of this machine, of a worse one, and what it never says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from ntjax import doctor
from ntjax.doctor import NOTE, OK, PROBLEM, Finding
from tests.cli.process import Result, devices

Ntjax = Callable[..., Result]


def test_what_is_well_is_said_and_nothing_is_broken(ntjax: Ntjax, place: Path) -> None:
    env = {**devices(8), "HF_TOKEN": "hf_secret", "HTTPS_PROXY": "http://me:hidden@proxy.example:3128"}
    ended = ntjax("doctor", "--json", env=env)
    assert ended.code == 0, ended.out + ended.err
    found = [json.loads(line) for line in ended.out.splitlines()]
    assert all(list(one) == ["check", "status", "said", "fix"] for one in found)
    assert all(one["fix"] for one in found if one["status"] != OK)
    said = {one["check"]: one["said"] for one in reversed(found)}
    assert {"python", "ntjax", "jax", "flax", "orbax-checkpoint", "grain", "host", "disk", "extra"} <= set(
        said
    )
    assert said["devices"] == "8 x cpu (cpu)"
    assert said["attention"] == "auto is 'blocked' here"
    assert said["compile cache"].startswith(str(place / "compiled"))
    assert "a token is set" in said["hub"]
    assert "proxy.example:3128" in said["hub"]
    for secret in ("hf_secret", "hidden", "me:"):
        assert secret not in ended.out
    plain = ntjax("doctor")
    assert plain.code == 0, plain.err
    assert "\x1b" not in plain.out
    assert "ok       jax " in plain.out


def test_what_is_broken_ends_with_78(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ntjax.errors import ConfigError

    def broken() -> Iterator[Finding]:
        yield Finding("jax", PROBLEM, "missing", "pip install jax")

    def failing() -> Iterator[Finding]:
        raise OSError("no such disk\nand more")

    for name in ("settings", "devices", "host", "cache", "hub", "extras"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))
    monkeypatch.setattr(doctor, "versions", broken)
    monkeypatch.setattr(doctor, "host", failing)
    with pytest.raises(ConfigError, match="broken: jax, failing"):
        doctor.main([])
    shown = capsys.readouterr().out
    assert "missing\n" in shown
    assert "fix: pip install jax" in shown
    assert "OSError: no such disk\n" in shown


def test_a_package_that_is_missing_or_too_old_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    changed = {"optax": None, "flax": "0.1.0"}
    monkeypatch.setattr(doctor, "_version", lambda name: changed[name] if name in changed else real(name))
    found = {one.check: one for one in doctor.versions()}
    assert (found["optax"].status, found["optax"].fix) == (PROBLEM, 'pip install "optax>=0.2.8"')
    assert found["flax"].status == PROBLEM
    assert "0.1.0, but flax>=" in found["flax"].said
    assert found["jax"].status == OK


def test_an_accelerator_that_jax_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NVIDIA", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.setattr(doctor, "TPU", ())
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.delenv("JAX_PLATFORMS")
    assert list(doctor.unseen("cpu")) == []
    (tmp_path / "nvidia0").touch()
    (one,) = doctor.unseen("cpu")
    assert (one.status, one.fix) == (PROBLEM, 'pip install "ntjax[cuda]"')
    assert list(doctor.unseen("gpu")) == []
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (one,) = doctor.unseen("cpu")
    assert (one.status, one.fix) == (NOTE, "unset JAX_PLATFORMS")


@pytest.mark.parametrize("offered", ["always madvise [never]\n", "[always] madvise never\n", None])
def test_large_pages_are_pointed_to_where_they_are_for_the_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offered: str | None
) -> None:
    offers = tmp_path / "enabled"
    monkeypatch.setattr(doctor, "LARGE_PAGES", offers)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    if offered:
        offers.write_text(offered)
    assert list(doctor.pages("cpu")) == []
    offers.write_text("always [madvise] never\n")
    (one,) = doctor.pages("cpu")
    assert (one.status, one.fix) == (NOTE, "export GLIBC_TUNABLES=glibc.malloc.hugetlb=1")
    assert list(doctor.pages("gpu")) == []
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert list(doctor.pages("cpu")) == []


def test_a_hub_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens and never answers; a hub that answers, with an error too, is there."""

    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:  # noqa: N802
            self.send_response(401)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        assert doctor._unreachable(url) is not None  # nobody serves yet
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(doctor, "PATIENCE", 10.0)
        assert doctor._unreachable(url) is None
        server.shutdown()
        thread.join()


def test_extras_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "gguf" else "1")
    found = [one for one in doctor.extras() if one.said.startswith("gguf")]
    assert found == [Finding("extra", NOTE, "gguf isn't installed: gguf", 'pip install "ntjax[gguf]"')]
