"""eval: losses are the trainer's, rewards are GRPO's, pass@k is what drawing k would give on average."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntjax.judge import passes
from tests.cli.process import Result, metrics, write_rows
from tests.tiny import tiny_model

PAIRS = [
    {"prompt": "The sea is", "chosen": " wide.", "rejected": " wide and blue and wide and blue."},
    {"prompt": "The sky is", "chosen": " a user assistant system and a tool.", "rejected": " blue."},
]
FUNCTION = '''
def even(prompts, responses):
    """Half of the rewards are 1, whatever was said."""
    return [float(number % 2) for number in range(len(responses))]

def abstains(prompts, completions, answer, log_extra, **kwargs):
    log_extra("right", answer)
    return [None if a == "0" else 0.5 for a in answer]

def fails(prompts, responses):
    raise ValueError("no")
'''


@pytest.fixture(scope="module")
def told(ntjax: Callable[..., Result]) -> Callable[..., dict[str, Any]]:
    """told("--data", ...): what eval --json says of the tiny model."""

    def told(*args: object) -> dict[str, Any]:
        ended = ntjax("eval", "--model", "model", "--json", *args)
        assert ended.code == 0, ended.err
        (line,) = ended.out.splitlines()
        return json.loads(line)

    return told


@pytest.fixture(scope="module")
def asked(place: Path) -> Path:
    """Prompts with answers, rewards.py beside them, and rows that are no good."""
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {n}?"}], "answer": str(n), "number": n}
        for n in range(6)
    ]
    (place / "judging.py").write_text(FUNCTION)
    write_rows(place / "preferred.jsonl", PAIRS)
    write_rows(place / "raw.jsonl", [{"text": "The sea is wide and the sky is blue. " * 8}] * 3)
    (place / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    return write_rows(place / "questions.jsonl", rows)


def test_losses_are_those_of_the_trainer_s_evaluation(
    told: Callable[..., Any], ntjax: Callable[..., Result], place: Path, config: Callable[..., Path]
) -> None:
    options = {"do_eval": True, "max_steps": 1, "learning_rate": 0.0, "save_strategy": "no"}
    data = {"dataset_path": "pairs.jsonl", "eval_dataset_path": "pairs.jsonl"}
    ended = ntjax("train", "--config", config("evaluated", options, dataset=data))
    assert ended.code == 0, ended.err
    expected = metrics(place / "out" / "evaluated" / "latest" / "sft_stage")[-1]
    found = told("--data", "pairs.jsonl", "--max-length", 64)
    assert found["rows"] == 40
    for name in ("loss", "mean_token_accuracy", "perplexity", "entropy"):
        assert found[name] == pytest.approx(expected[f"eval_{name}"], rel=1e-6)
    assert told("--data", "pairs.jsonl", "--limit", 3)["rows"] == 3


def test_devices_share_the_rows(ntjax: Callable[..., Result], told: Callable[..., Any], asked: Path) -> None:
    from tests.cli.process import devices

    alone = told("--data", "pairs.jsonl")
    for mesh in ("mesh.data=-1", "mesh.fsdp=4"):
        command = "eval", "--model", "model", "--json", "--data", "pairs.jsonl", mesh
        ended = ntjax(*command, env=devices(4))
        assert ended.code == 0, ended.err
        assert json.loads(ended.out)["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_text_is_read_whole(told: Callable[..., Any], asked: Path) -> None:
    found = told("--data", "raw.jsonl", "--max-length", 32)
    assert found["stage"] == "pretrain"
    assert found["learned_tokens"] > 3 * 50
    cut = told("--data", "raw.jsonl", "--max-length", 32, "--stage", "sft")
    assert cut["learned_tokens"] == 3 * 31


def test_preferences_are_compared_by_their_log_probs(told: Callable[..., Any], asked: Path) -> None:
    found = told("--data", "preferred.jsonl")
    assert found["accuracy"] == 0.5  # of random weights the shorter answer is the likelier
    assert found["margin"] == pytest.approx(found["logps/chosen"] - found["logps/rejected"])
    swapped = told(
        "--data",
        "preferred.jsonl",
        "datasets.eval.chosen_field=rejected",
        "datasets.eval.rejected_field=chosen",
    )
    assert swapped["margin"] == pytest.approx(-found["margin"])


def test_a_reward_model_s_accuracy(
    told: Callable[..., Any], ntjax: Callable[..., Result], place: Path, asked: Path
) -> None:
    stage = {
        "stage_type": "reward",
        "max_steps": 1,
        "learning_rate": 0.0,
        "save_strategy": "no",
        "do_eval": True,
    }
    data = {"dataset_path": "preferred.jsonl", "eval_dataset_path": "preferred.jsonl"}
    config = {"task_name": "scorer", "base_output_dir": "out", "use_tensorboard": False, "stages": [stage]}
    config |= {"model": {"model_name_or_path": "model"}, "datasets": {"reward": data}}
    (place / "scorer.json").write_text(json.dumps(config))
    ended = ntjax("train", "--config", "scorer.json")
    assert ended.code == 0, ended.err
    folder = place / "out" / "scorer" / "latest" / "reward_stage"
    found = told("--model", folder, "--data", "preferred.jsonl")
    expected = metrics(folder)[-1]
    for name in ("accuracy", "margin", "loss"):
        assert found[name] == pytest.approx(expected[f"eval_{name}"], abs=1e-5)
    ended = ntjax("eval", "--model", folder, "--data", "questions.jsonl", "--reward", "numeric")
    assert ended.code == 78
    assert "is a reward model" in ended.err


def test_rewards_of_what_is_drawn(told: Callable[..., Any], place: Path, asked: Path) -> None:
    rewards = "--reward", "judging.py:even", "--reward", "judging.py:abstains"
    drawing = "--num-completions", 4, "--pass-at", "1,2,4", "--max-new-tokens", 5, "--out", "drawn.jsonl"
    found = told("--data", "questions.jsonl", *rewards, *drawing)
    assert found["completions"] == 24
    assert found["rewards"]["even"] == pytest.approx(
        {"mean": 0.5, "std": 0.5, "accuracy": 0.5, "pass@1": 0.5, "pass@2": 1 - 1 / 6, "pass@4": 1.0}
    )
    abstains = found["rewards"]["abstains"]
    assert (abstains["mean"], abstains["accuracy"], abstains["pass@4"]) == (0.5, 0.0, 0.0)
    assert found["completions/max_length"] <= 5
    lines = [json.loads(line) for line in (place / "drawn.jsonl").read_text().splitlines()]
    assert [line["rewards"]["even"] for line in lines] == [0.0, 1.0] * 12
    assert [line["rewards"]["abstains"] for line in lines] == [None] * 4 + [0.5] * 20
    assert [line["extra"]["right"] for line in lines[::4]] == [str(n) for n in range(6)]
    assert len({line["completion"] for line in lines[:4]}) > 1
    half = told("--data", "questions.jsonl", *rewards, "--threshold", 0.5, "--max-new-tokens", 5)
    assert half["rewards"]["abstains"]["accuracy"] == 1.0
    assert "pass@1" not in half["rewards"]["even"]


def test_greedy_completions_are_those_of_generate(
    told: Callable[..., Any], ntjax: Callable[..., Result], place: Path, asked: Path
) -> None:
    told(
        "--data",
        "questions.jsonl",
        "--reward",
        "length(0, 99)",
        "--max-new-tokens",
        7,
        "--out",
        "greedy.jsonl",
    )
    ended = ntjax(
        "generate", "--model", "model", "--prompts", "questions.jsonl", "--max-new-tokens", 7, "--json"
    )
    lines = (place / "greedy.jsonl").read_text().splitlines()
    expected = [json.loads(line)["completion"] for line in ended.out.splitlines()]
    assert [json.loads(line)["completion"] for line in lines] == expected


def test_images_are_seen(told: Callable[..., Any], place: Path) -> None:
    from tests.vlm import photo, tiny_vlm

    sees = tiny_vlm(place / "eyes", "llava")
    (place / "looked").mkdir()
    photo((33, 71)).save(place / "looked" / "a.png")
    user = {"role": "user", "content": "<image>What is the sea?"}
    row = {"image": "a.png", "prompt": [user], "answer": "blue"}
    both = [row, {"prompt": [{"role": "user", "content": "And the sky?"}], "answer": "blue"}]
    write_rows(place / "looked" / "asked.jsonl", both)
    rows = [{"messages": [*one["prompt"], {"role": "assistant", "content": "It is blue."}]} for one in both]
    write_rows(place / "looked" / "told.jsonl", [{**rows[0], "image": "a.png"}, rows[1]])
    assert told("--model", sees, "--data", "looked/told.jsonl")["rows"] == 2
    drawing = "--reward", "exact_match", "--max-new-tokens", 4, "--out", "looked/drawn.jsonl"
    assert told("--model", sees, "--data", "looked/asked.jsonl", *drawing)["completions"] == 2
    lines = [json.loads(line) for line in (place / "looked" / "drawn.jsonl").read_text().splitlines()]
    assert ["images" in line for line in lines] == [True, False]


def test_a_table_for_people(ntjax: Callable[..., Result], asked: Path) -> None:
    args = "--data", "questions.jsonl", "--reward", "numeric", "--max-new-tokens", 3
    ended = ntjax("eval", "--model", "model", *args)
    assert ended.code == 0, ended.err
    for word in ("numeric", "accuracy", "completions/mean_length"):
        assert word in ended.out
    assert "6 prompts of 6 rows" in ended.err


def test_pass_at_k_is_the_mean_over_all_subsets() -> None:
    drawn = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]])
    for k in (1, 2, 3, 5):
        subsets = [np.mean([max(some) for some in itertools.combinations(row, k)]) for row in drawn]
        found = passes(drawn.sum(axis=1), np.full(len(drawn), 5), k)
        assert found == pytest.approx(np.mean(subsets))
    assert passes(np.array([1, 1]), np.array([2, 1]), 2) == 1.0  # of the second prompt too few were judged
    assert passes(np.array([0]), np.array([1]), 2) is None


WRONG: dict[str, tuple[list[str], int, str]] = {
    "no file": (["--data", "nowhere.jsonl"], 66, "--data: there is no file nowhere.jsonl"),
    "no model": (["--model", "nowhere", "--data", "pairs.jsonl"], 66, "nowhere"),
    "bad row": (["--data", "broken.jsonl"], 65, "broken.jsonl:2"),
    "bad prompt": (["--data", "broken.jsonl", "--reward", "numeric"], 65, "broken.jsonl:2"),
    "no reward": (
        ["--data", "questions.jsonl", "--reward", "numerik"],
        78,
        "--reward: 'numerik' is no reward",
    ),
    "no function": (["--data", "questions.jsonl", "--reward", "judging.py:odd"], 78, "it has even, abstains"),
    "no column": (["--data", "preferred.jsonl", "--reward", "judging.py:abstains"], 78, "it takes answer"),
    "it raises": (["--data", "questions.jsonl", "--reward", "judging.py:fails"], 70, "judging.py:11"),
    "out of place": (["--data", "pairs.jsonl", "--temperature", "1"], 78, "--temperature"),
    "too many": (["--data", "questions.jsonl", "--reward", "numeric", "--pass-at", "2"], 78, "1 completions"),
    "unknown setting": (["--data", "pairs.jsonl", "datasets.eval.prompt=q"], 78, "did you mean prompt_field"),
    "no weights": (["--model", "hollow", "--data", "broken.jsonl"], 66, "hollow"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes_are_told(wrong: str, ntjax: Callable[..., Result], place: Path, asked: Path) -> None:
    args, code, said = WRONG[wrong]
    if wrong == "no weights":
        tiny_model(place / "hollow")
        (place / "hollow" / "model.safetensors").unlink()
    ended = ntjax("eval", "--model", "model", *args)
    assert ended.code == code, ended.err
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert not ended.out
