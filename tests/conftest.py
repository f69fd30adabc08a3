"""Eight CPU devices stand for a pod slice; nothing in a test may reach the network."""

import os

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_configure(config: pytest.Config) -> None:
    """The default tests compile hundreds of small programs to run each a few times: LLVM's optimisation of their code,
    a third of all the tests' time, would be spent for nothing. Slow tests run what users run."""
    if config.getoption("markexpr").startswith("not slow"):
        os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
