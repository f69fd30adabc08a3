"""A reward model as a reward: transformers' scores of the texts that TRL makes of prompts and completions."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.data_utils import apply_chat_template

from ntjax.errors import BadData, ConfigError, InputMissing
from ntjax.layout import Layout
from ntjax.mesh import make_mesh
from ntjax.scorer import Said, Scorer
from tests.tiny import Template, tiny_model

CLOSE = 1e-5
WORDS = ["sea", "blue", "wide", "Paris", "France", "capital", "one", "two"]
Pairs = tuple[list[Said], list[Said]]


def reward_model(out: Path, template: Template | None, labels: int = 1) -> Path:
    """A tiny scoring model with a head of random weights, as transformers writes it."""
    language = tiny_model(out / "language", template)
    tokenizer = AutoTokenizer.from_pretrained(language)
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(language, num_labels=labels)
    torch.nn.init.normal_(model.score.weight, std=1.0)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out / "judge")
    tokenizer.save_pretrained(out / "judge")
    return out / "judge"


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("talking"), "chatml")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a chat template; its padding token is its end token."""
    return reward_model(tmp_path_factory.mktemp("plain"), None)


def scorer(folder: Path, rows: int = 8, **options: Any) -> Scorer:
    return Scorer(folder, layout=Layout(make_mesh()), dtype="float32", attention="xla", rows=rows, **options)


def said(count: int, talk: bool) -> Pairs:
    """Completions of 1 to 80 words, in no order of length."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(1, 80)))) for _ in range(count)]
    if not talk:
        return [f"What is {i}?" for i in range(count)], [f" {text}" for text in texts]
    prompts: list[Said] = [[{"role": "user", "content": f"What is {i}?"}] for i in range(count)]
    return prompts, [[{"role": "assistant", "content": text}] for text in texts]


def trl_scores(folder: Path, prompts: list[Any], completions: list[Any]) -> np.ndarray:
    """As `GRPOTrainer._calculate_rewards` asks a reward model, its padding token set as in `__init__`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    if not isinstance(prompts[0], str):
        texts = [apply_chat_template({"messages": text}, tokenizer)["text"] for text in texts]
    model.config.pad_token_id = tokenizer.pad_token_id
    inputs = tokenizer(
        text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
    )
    with torch.inference_mode():
        return model(**inputs).logits[:, 0].numpy()


@pytest.mark.parametrize("talk", [True, False], ids=["conversations", "text"])
def test_scores_are_those_of_transformers(talking: Path, plain: Path, talk: bool) -> None:
    # 21 completions in chunks of 8 rows on eight devices: the last chunk isn't full.
    folder, pairs = talking if talk else plain, said(21, talk)
    ours, theirs = scorer(folder)(*pairs), trl_scores(folder, *pairs)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE)
    assert theirs.std() > 0.1


def test_text_that_ends_with_the_padding_token_is_scored_before_it(plain: Path) -> None:
    ends = "<|endoftext|>"
    prompts: list[Said] = ["The sea is", "The sea is", "What"]
    completions: list[Said] = [f" blue{ends}{ends}", " blue", f" is one{ends} two"]
    found = scorer(plain)(prompts, completions)
    np.testing.assert_allclose(found, trl_scores(plain, prompts, completions), rtol=0, atol=CLOSE)
    assert abs(found[0] - found[1]) <= CLOSE


def test_a_score_does_not_depend_on_what_is_scored_beside_it(plain: Path) -> None:
    prompts, completions = said(9, talk=False)
    model = scorer(plain)
    together = model(prompts, completions)
    alone = model(prompts[3:4], completions[3:4])
    np.testing.assert_allclose(together[3:4], alone, rtol=0, atol=CLOSE)


def test_rows_are_as_long_as_a_bucket_and_like_goes_with_like(plain: Path) -> None:
    # "q" is a token each time. By length 1, 33, 64 and 65: the first eight rows and the last eight make a chunk each.
    model = scorer(plain)
    shapes: list[tuple[int, ...]] = []
    compiled: Callable[..., jax.Array] = model._scores

    def watched(params: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        shapes.append(tokens.shape)
        return compiled(params, tokens, lengths)

    model._scores = watched  # type: ignore[assignment]
    texts: list[Said] = ["q" * length for length in (65, 1, 64, 33) * 4]
    model([""] * 16, texts)
    assert shapes == [(8, 64), (8, 128)]


def test_of_long_texts_the_end_is_scored(plain: Path) -> None:
    prompts: list[Said] = ["one two three", "one"]
    completions: list[Said] = [" Paris" * 9, " blue"]
    model = scorer(plain, max_length=7)
    whole = scorer(plain).tokens(prompts, completions)
    assert [len(ids) > 7 for ids in whole] == [True, False]
    assert model.tokens(prompts, completions) == [ids[-7:] for ids in whole]
    assert model(prompts, completions).shape == (2,)


def test_the_chat_template_is_given_what_the_stage_says(talking: Path) -> None:
    loud = Path(shutil.copytree(talking, talking.parent / "loud"))
    (loud / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ (m['content'] | upper) if loud else m['content'] }}{% endfor %}"
    )
    pairs: Pairs = ([[{"role": "user", "content": "sea "}]], [[{"role": "assistant", "content": "blue"}]])
    shown = [scorer(loud, template=given).tokens(*pairs)[0] for given in (None, {"loud": True})]
    decode = AutoTokenizer.from_pretrained(loud).decode
    assert [decode(ids) for ids in shown] == ["sea blue", "SEA BLUE"]


def test_it_is_named_as_in_trl(plain: Path) -> None:
    assert scorer(plain).label == "judge"


def test_it_can_be_imported(plain: Path, tmp_path: Path) -> None:
    importlib.import_module("ntjax.import").main(["--model", str(plain), "--out", str(tmp_path / "judge")])
    pairs = said(3, talk=False)
    np.testing.assert_array_equal(scorer(tmp_path / "judge")(*pairs), scorer(plain)(*pairs))


def test_weights_are_read_when_first_asked_for(talking: Path) -> None:
    moved = Path(shutil.copytree(talking, talking.parent / "moved"))
    model = scorer(moved)
    (moved / "model.safetensors").unlink()
    with pytest.raises(InputMissing, match=r"no model\.safetensors"):
        model(*said(1, talk=True))


def test_a_language_model_is_no_reward_model(talking: Path) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM gives no score") as caught:
        scorer(talking.parent / "language")
    assert caught.value.where == str(talking.parent / "language" / "config.json")
    assert "stage:NAME" in (caught.value.fix or "")


def test_a_model_of_two_labels_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tells 2 labels apart"):
        scorer(reward_model(tmp_path, None, labels=2))


def test_a_config_that_promises_a_score_without_weights_for_it(plain: Path) -> None:
    headless = Path(shutil.copytree(plain.parent / "language", plain.parent / "headless"))
    config = json.loads((headless / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (headless / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadData, match=r"score\.weight is missing"):
        scorer(headless)


def test_conversations_need_a_chat_template(plain: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        scorer(plain).tokens(*said(1, talk=True))
