"""What is added to the environment that XLA reads."""

from __future__ import annotations

import os

import pytest

from ntjax.compiling import DEFAULTS, FRACTION, TPU_ARGS, defaults, set_defaults
from ntjax.doctor import settings

FLAG = DEFAULTS[TPU_ARGS]


@pytest.mark.parametrize(
    ("said", "becomes"),
    [
        ({}, DEFAULTS),
        ({TPU_ARGS: "--other=1"}, {FRACTION: "0.92", TPU_ARGS: f"{FLAG} --other=1"}),
        (
            {FRACTION: "0.5", TPU_ARGS: "--xla_tpu_scoped_vmem_limit_kib=65536"},
            {FRACTION: "0.5", TPU_ARGS: "--xla_tpu_scoped_vmem_limit_kib=65536"},
        ),
    ],
)
def test_what_the_environment_says_goes_first(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], becomes: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in DEFAULTS} | said)
    shown = " ".join(finding.said for finding in settings())
    assert all(f"train adds {name}={value}" in shown for name, value in defaults().items())
    for _ in range(2):  # the second time changes nothing
        set_defaults()
        assert {name: os.environ[name] for name in DEFAULTS} == becomes
    assert defaults() == {}
    assert "train adds" not in " ".join(finding.said for finding in settings())
