"""GRPO and PPO from the command line: what they leave, what rewards see, and runs that are broken off."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ntjax import lookup
from tests.cli.process import Result, Running, checkpoints, metrics, write_rows

REWARDS = '''
import json

def letters(prompts, responses):
    """The share of letters a to m among all characters: something a model of random weights can learn."""
    return [sum("a" <= c <= "m" for c in text) / max(len(text), 1) for text in responses]

def columns(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
    """Written for TRL."""
    log_extra("answer", answer)
    log_metric("asked", float(len(prompts)))
    assert sorted(kwargs) == ["number"], kwargs
    texts = [turns[0]["content"] for turns in completions]
    return [None if n % 5 == 0 else float(a in text) for n, a, text in zip(kwargs["number"], answer, texts)]

def drawn_at(prompts, completions, trainer_state, log_extra, **kwargs):
    log_extra("drawn_at", [trainer_state.global_step] * len(prompts))
    return [float(len(turns[0]["content"])) for turns in completions]

def early(prompts, responses):
    with open("calls", "a") as file:
        file.write(f"{len(prompts)}\\n")
    return letters(prompts, responses)

def raises(prompts, responses):
    if any(responses) and "step" in open("moment").read():
        raise ValueError("no")
    return [0.0] * len(prompts)

def sleeps(prompts, responses):
    import time
    time.sleep(3600)
'''
COMMON = {
    "max_steps": 8,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_steps": 1,
    "per_device_train_batch_size": 4,
    "reward_function": "rewards.py:letters",
}
# Four steps a window, so that checkpoints fall within one.
GRPO = {"stage_type": "grpo", "num_generations": 4, "max_completion_length": 12, "beta": 0.1}
GRPO |= {"num_iterations": 2, "steps_per_generation": 2}
PPO = {
    "stage_type": "ppo",
    "response_length": 12,
    "ppo_epochs": 2,
    "num_mini_batches": 2,
    "adap_kl_ctrl": True,
}
KINDS = {"grpo": GRPO, "ppo": PPO}
# Four windows of two steps, each but the first drawn before the one before it is trained on.
AHEAD = {
    **GRPO,
    "learning_rate": 0.02,
    "steps_per_generation": 1,
    "generate_ahead": True,
    "reward_function": "rewards.py:drawn_at",
}


@pytest.fixture(scope="session")
def asked(place: Path) -> Callable[..., Path]:
    """asked("name", {stage settings}): a config of one stage on prompts that are conversations."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} + 2?"}],
            "answer": str(i + 2),
            "number": i,
        }
        for i in range(10)
    ]
    write_rows(place / "asked.jsonl", rows)
    (place / "rewards.py").write_text(REWARDS)
    (place / "moment").write_text("start")

    def asked(task: str, stage: dict[str, Any], model: dict[str, Any] | None = None) -> Path:
        config = {
            "task_name": task,
            "base_output_dir": "out",
            "use_tensorboard": False,
            "model": {"model_name_or_path": "model", **(model or {})},
            "datasets": {"rl": {"dataset_path": "asked.jsonl", "eval_dataset_path": "asked.jsonl"}},
            "stages": [{**COMMON, **stage}],
        }
        path = place / f"{task}.json"
        path.write_text(json.dumps(config))
        return path

    return asked


@pytest.fixture(scope="session", params=KINDS)
def run(
    request: pytest.FixtureRequest,
    ntjax: Callable[..., Result],
    asked: Callable[..., Path],
    latest: Callable[[str], Path],
) -> Path:
    """The stage folder of a run that nothing disturbed."""
    ended = ntjax("train", "--config", asked(request.param, KINDS[request.param]))
    assert ended.code == 0, ended.err
    return latest(request.param) / f"{request.param}_stage"


def completions(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "completions.jsonl").read_text().splitlines()]


def without_speed(stage: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if "per_second" not in name}
        for record in metrics(stage)
    ]


def test_a_stage_leaves_a_model_checkpoints_and_its_completions(run: Path) -> None:
    assert checkpoints(run) == list(range(1, 9))
    for name in ("config.json", "tokenizer.json", "model.safetensors", "generation_config.json"):
        assert (run / name).exists(), name
    lines = completions(run)
    assert [line["step"] for line in lines] == [1] * 8 + [5] * 8  # two windows of eight
    assert all(0 <= line["rewards"]["letters"] <= 1 for line in lines)
    assert {type(line["prompt"]) for line in lines} == {list}


def test_the_sampler_s_log_probs_are_the_trainer_s(run: Path) -> None:
    told = [record for record in metrics(run) if "sampler/logprob_diff_max" in record]
    assert [record["step"] for record in told] == [1, 5]
    assert max(record["sampler/logprob_diff_max"] for record in told) < 1e-4


def test_metrics_have_the_names_of_trl(run: Path) -> None:
    first = metrics(run)[0]
    wanted = {"rewards/letters/mean", "rewards/letters/std", "completions/mean_length"}
    wanted |= {"completions/clipped_ratio", "completions/max_terminated_length"}
    if run.name == "grpo_stage":
        wanted |= {"reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "clip_ratio/region_mean"}
    else:
        wanted |= {"objective/kl", "objective/scores", "objective/rlhf_reward", "loss/value_avg"}
        wanted |= {"policy/approxkl_avg", "policy/clipfrac_avg", "val/clipfrac_avg", "val/ratio"}
    assert wanted <= first.keys()
    assert "rewards/letters/mean" not in metrics(run)[1]  # of steps that drew alone, as in TRL


@pytest.mark.parametrize("kind", KINDS)
def test_killed_within_a_window_it_goes_on_to_the_very_same_end(
    kind: str,
    begin: Callable[..., Running],
    ntjax: Callable[..., Result],
    asked: Callable[..., Path],
    latest: Callable[[str], Path],
    run: Path,
) -> None:
    if run.name != f"{kind}_stage":
        pytest.skip("the other kind's run")
    task = f"killed_{kind}"
    command = "train", "--config", asked(task, KINDS[kind])
    first = begin(*command)
    first.until(lambda: (latest(task) / run.name / "checkpoint-6").exists())
    assert first.send(signal.SIGKILL).code == -9
    stage = latest(task) / run.name
    saved = max(checkpoints(stage))
    assert saved in (6, 7), "the kill came too late to fall within the second window"
    ended = ntjax(*command, "--resume", "auto")
    assert ended.code == 0, ended.err
    assert f"resuming at step {saved} of 8" in ended.out
    for name in ("model.safetensors", "completions.jsonl"):
        assert (stage / name).read_bytes() == (run / name).read_bytes()
    assert without_speed(stage) == without_speed(run)


def test_ahead_of_training_windows_are_drawn_by_the_policy_of_the_window_before(
    begin: Callable[..., Running],
    ntjax: Callable[..., Result],
    asked: Callable[..., Path],
    latest: Callable[[str], Path],
) -> None:
    assert ntjax("train", "--config", asked("ahead", AHEAD)).code == 0
    run = latest("ahead") / "grpo_stage"
    told = {line["step"]: line["extra"]["drawn_at"] for line in completions(run)}
    assert told == {1: 0, 3: 0, 5: 2, 7: 4}
    ratios = [record["clip_ratio/region_mean"] for record in metrics(run)]
    assert max(ratios[2:]) > 0, "old log-probs are those of the policy that drew"

    command = "train", "--config", asked("ahead_killed", AHEAD)
    first = begin(*command)
    first.until(lambda: (latest("ahead_killed") / "grpo_stage" / "checkpoint-3").exists())
    assert first.send(signal.SIGKILL).code == -9
    assert ntjax(*command, "--resume", "auto").code == 0
    resumed = latest("ahead_killed") / "grpo_stage"
    for name in ("model.safetensors", "completions.jsonl"):
        assert (resumed / name).read_bytes() == (run / name).read_bytes()
    assert without_speed(resumed) == without_speed(run)


def test_ahead_of_a_policy_that_stands_still_nothing_is_different(
    ntjax: Callable[..., Result], asked: Callable[..., Path], latest: Callable[[str], Path]
) -> None:
    still = {**GRPO, "learning_rate": 0.0, "steps_per_generation": 1, "max_steps": 6}
    for task, ahead in (("still", False), ("still_ahead", True)):
        assert ntjax("train", "--config", asked(task, {**still, "generate_ahead": ahead})).code == 0
    one, other = latest("still") / "grpo_stage", latest("still_ahead") / "grpo_stage"
    assert completions(one) == completions(other)
    assert without_speed(one) == without_speed(other)


@pytest.mark.slow
def test_rewards_asked_about_parts_of_a_window_make_no_difference(
    ntjax: Callable[..., Result],
    asked: Callable[..., Path],
    latest: Callable[[str], Path],
    place: Path,
) -> None:
    whole = {
        **AHEAD,
        "reward_function": "rewards.py:early",
        "max_steps": 6,
        "num_iterations": 1,
        "steps_per_generation": 3,
    }
    parts = {**whole, "reward_batch_size": 8}
    for task, stage, calls in (("at_once", whole, ["12"] * 2), ("in_parts", parts, ["8", "4"] * 2)):
        (place / "calls").write_text("")
        assert ntjax("train", "--config", asked(task, stage)).code == 0
        assert (place / "calls").read_text().split()[1:] == calls  # the first is on two rows, to try it out
    one, other = latest("at_once") / "grpo_stage", latest("in_parts") / "grpo_stage"
    assert completions(one) == completions(other)
    assert without_speed(one) == without_speed(other)


def test_a_reward_written_for_trl_sees_columns_and_may_abstain(
    ntjax: Callable[..., Result], asked: Callable[..., Path], latest: Callable[[str], Path]
) -> None:
    stage = {**GRPO, "reward_function": "rewards.py:columns", "max_steps": 4}
    ended = ntjax("train", "--config", asked("columns", stage))
    assert ended.code == 0, ended.err
    folder = latest("columns") / "grpo_stage"
    for line in completions(folder):
        number = int(line["prompt"][0]["content"].split()[2])
        assert (line["rewards"]["columns"] is None) == (number % 5 == 0)
        assert line["extra"]["answer"] == str(number + 2)
    assert metrics(folder)[0]["asked"] == 8


def test_a_batch_that_isn_t_whole_groups_is_rounded_up_and_says_so(
    ntjax: Callable[..., Result], asked: Callable[..., Path], latest: Callable[[str], Path]
) -> None:
    stage = {"stage_type": "grpo", "max_completion_length": 4, "max_steps": 1, "do_eval": True}
    stage |= {"eval_threshold": 0.3, "metric_for_best_model": "rewards/letters/pass@8"}
    ended = ntjax("train", "--config", asked("rounded", stage))
    assert ended.code == 0, ended.err
    assert "8 completions a microbatch instead of 4" in ended.out
    folder = latest("rounded") / "grpo_stage"
    assert len(completions(folder)) == 8
    told = metrics(folder)[-1]
    assert 0 <= told["eval_reward"] <= 1
    assert 0 < told["eval_rewards/letters/accuracy"] < 1
    assert told["eval_rewards/letters/pass@1"] == pytest.approx(told["eval_rewards/letters/accuracy"])
    assert told["eval_rewards/letters/pass@1"] < told["eval_rewards/letters/pass@8"] <= 1


def test_a_further_token_may_end_ppo_s_completions() -> None:
    options = lookup.stage_options("ppo")
    stage = options(stage_type="ppo", reward_function=("rewards.py:letters",), stop_token_id=7)
    assert stage.sampling((2,)).stop_ids == (2, 7)


def test_groups_without_variance_are_replaced(
    ntjax: Callable[..., Result], asked: Callable[..., Path], latest: Callable[[str], Path]
) -> None:
    (latest("x").parents[2] / "sparse.py").write_text(
        "def even(prompts, completions, number, **kwargs):\n"
        "    return [float(len(c[0]['content'])) if n % 2 else 0.0 for n, c in zip(number, completions)]\n"
    )
    stage = {**GRPO, "reward_function": "sparse.py:even", "dynamic_sample": True, "max_steps": 4}
    ended = ntjax("train", "--config", asked("dynamic", stage))
    assert ended.code == 0, ended.err
    folder = latest("dynamic") / "grpo_stage"
    assert metrics(folder)[0]["frac_reward_zero_std"] == 0
    assert all(int(line["prompt"][0]["content"].split()[2]) % 2 for line in completions(folder))


@pytest.mark.parametrize(
    ("stage", "code", "said"),
    [
        (
            {"reward_function": "rewards.py:sleeps", "reward_timeout": 0.5, "reward_error_budget": 0},
            70,
            "0.5",
        ),
        ({"reward_function": "rewards.py:absent"}, 78, "no function absent"),
        ({"reward_function": None}, 78, "needs reward_function"),
        ({"reward_function": None, "reward_model_path": "stage:reward"}, 78, "no such stage before"),
        ({"generation_kwargs": {"beams": 2}}, 78, "no beams can be set"),
        ({"num_generations": 1}, 78, "num_generations"),
    ],
)
def test_mistakes_are_told_in_seconds(
    stage: dict[str, Any],
    code: int,
    said: str,
    ntjax: Callable[..., Result],
    asked: Callable[..., Path],
) -> None:
    given = {name: value for name, value in {**GRPO, **stage}.items()}
    path = asked("mistake", given)
    config = json.loads(path.read_text())
    config["stages"][0] = {k: v for k, v in config["stages"][0].items() if v is not None}
    path.write_text(json.dumps(config))
    ended = ntjax("train", "--config", path)
    assert ended.code == code, ended.err
    assert said in ended.err
    assert "Traceback" not in ended.err
