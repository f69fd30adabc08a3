"""The harness is told the same by ntjax's model as by its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from ntjax.errors import ConfigError
from ntjax.lm_eval import NtjaxLM
from tests.tiny import tiny_model

LENGTH = 48  # short, so that contexts are cut and texts take several windows
PAIRS = [
    ("What is the capital of France?", " The capital of France is Paris."),
    ("", "The sea is wide and the sky is blue."),
    ("One two three ", "four"),
    ("A long context. " * 12, "And its end."),
    ("x", "y"),
]
TEXTS = ["The sea is wide.", "The sky is blue. " * 20]
GREEDY = {"do_sample": False, "max_gen_toks": 12, "until": []}


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("harness") / "model")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2, max_length=LENGTH)


@pytest.fixture(scope="module", params=[None, {"data": 2}])
def ours(folder: Path, request: pytest.FixtureRequest) -> NtjaxLM:
    return NtjaxLM(str(folder), max_length=LENGTH, batch_size=3, mesh=request.param)


def test_log_likelihoods_of_continuations(ours: NtjaxLM, theirs: Any) -> None:
    asked = instances("loglikelihood", PAIRS)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_continuation_is_greedy_where_the_model_would_write_it(ours: NtjaxLM, theirs: Any) -> None:
    (written,) = ours.generate_until(instances("generate_until", [("The sea", GREEDY)]))
    asked = instances("loglikelihood", [("The sea", written), ("The sea", "?!")])
    assert [greedy for _, greedy in ours.loglikelihood(asked, disable_tqdm=True)] == [
        greedy for _, greedy in theirs.loglikelihood(asked, disable_tqdm=True)
    ]


def test_log_likelihoods_of_whole_texts(ours: NtjaxLM, theirs: Any) -> None:
    asked = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, abs=1e-4)


def test_greedy_answers(ours: NtjaxLM, theirs: Any) -> None:
    contexts = ["The sea is", "What is the capital of France?", "A long context. " * 12]
    free = theirs.generate_until(instances("generate_until", [(text, GREEDY) for text in contexts]))
    stop = next(char for char in free[0][2:] if char.strip())
    asked = [*((text, GREEDY) for text in contexts), (contexts[0], {**GREEDY, "until": [stop]})]
    expected = theirs.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert ours.generate_until(instances("generate_until", asked)) == expected
    assert stop not in expected[-1]


def test_the_harness_knows_it_by_name_and_template(ours: NtjaxLM, theirs: Any) -> None:
    assert get_model("ntjax") is NtjaxLM
    turns = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(turns) == theirs.apply_chat_template(turns)
    assert ours.chat_template(True) == theirs.tokenizer.chat_template


def test_what_can_t_be_drawn_is_said(ours: NtjaxLM) -> None:
    with pytest.raises(ConfigError, match="num_beams"):
        ours.generate_until(instances("generate_until", [("a", {**GREEDY, "num_beams": 4})]))
