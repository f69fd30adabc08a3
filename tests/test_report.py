"""What a report reads of a run, and the page it makes of it."""

from __future__ import annotations

import json
import re
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ntjax import reporting
from ntjax.errors import BadData, InputMissing
from ntjax.reporting.charts import rounded, short, ticks
from ntjax.reporting.run import read_curves, read_run
from ntjax.reporting.samples import read_windows
from ntjax.reporting.series import POINTS, Point, Series, thinned
from tests.cli.process import write_rows
from tests.vlm import photo

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"
CONFIG = """
task_name = "sums"

[model]
model_name_or_path = "models/small"

[[stages]]
stage_type = "sft"
stage_name = "sft_stage"
max_steps = 8
do_eval = true

[[stages]]
stage_type = "grpo"
stage_name = "grpo_stage"
max_steps = -1
"""
LOG = """
sft_stage starts from models/small
sft_stage: 40 examples of 41 rows, 100 of 200 tokens learned (50%)
1 dropped: nothing to learn
sft_stage: 8 steps on 1 device
sft_stage {'step': 2, 'loss': 1.0}
grpo_stage starts from runs/sft_stage
grpo_stage: 10 prompts of 10 rows, 3 to 9 tokens
grpo_stage: 20 steps on 4 devices: fsdp 4
{"prompt": "shown by log_completions"}
grpo_stage {'step': 1}
"""


def completion(step: int, prompt: Any = "What?", **more: Any) -> dict[str, Any]:
    line = {"step": step, "prompt": prompt, "completion": "It is.", "rewards": {"right": 1.0}, "reward": 1.0}
    return {**line, "advantage": 0.5, "tokens": 3, "finished": "stop", **more}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose first stage is done and whose second one was killed at step 3 of 20."""
    folder = tmp_path / "20260102_030405"
    sft, grpo = folder / "sft_stage", folder / "grpo_stage"
    sft.mkdir(parents=True)
    grpo.mkdir()
    (folder / "config.toml").write_text(CONFIG)
    (folder / "train.log").write_text(LOG)
    records = [
        {"step": step, "loss": 2 / step, "num_tokens": 10 * step, "step_time": 0.5} for step in (2, 4, 6, 8)
    ]
    write_rows(sft / "metrics.jsonl", [*records, {"step": 8, "eval_loss": 0.3, "eval_runtime": 1.0}])
    (sft / "stage.json").write_text('{"steps": 8}')
    write_rows(grpo / "metrics.jsonl", [{"step": step, "reward": step / 4} for step in (1, 2, 3)])
    with (grpo / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # kill -9
    write_rows(grpo / "completions.jsonl", [completion(step) for step in (1, 1, 2, 2, 3, 3)])
    return folder


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text without styles and scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said, self._inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("style", "script"):
            self.said += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page(folder: Path) -> Page:
    return Page(reporting.write(folder).read_text())


# --- curves ---------------------------------------------------------------------------------


def test_a_long_curve_keeps_its_ends_its_extremes_and_its_gaps() -> None:
    points = [Point(step, float(step % 7)) for step in range(100_000)]
    points[31_234], points[70_001], points[50_000] = (
        Point(31_234, 99.0),
        Point(70_001, -99.0),
        Point(50_000, None),
    )
    kept = thinned(points, 2000)
    assert len(kept) <= 2000
    assert [point.step for point in kept] == sorted({point.step for point in kept})
    assert {points[0], points[31_234], points[50_000], points[70_001], points[-1]} <= set(kept)


def test_a_short_curve_is_left_as_it_is() -> None:
    points = [Point(step, 1.0) for step in range(9)]
    assert thinned(points, 9) == points


def test_a_long_log_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 20_001):
            loss = "null" if step == 500 else 99 if step == 17_777 else step % 10
            file.write(f'{{"step": {step}, "loss": {loss}, "grad_norm": 1.0}}\n')
    tracemalloc.start()
    curves = read_curves(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    loss = curves.series["loss"]
    assert peak < 5e6
    assert (loss.count, loss.gaps, curves.step) == (20_000, 1, 20_000)
    assert len(loss.points) <= 4 * POINTS
    assert {Point(500, None), Point(17_777, 99.0)} <= set(thinned(loss.points, POINTS))


def test_values_that_are_not_finite_are_gaps() -> None:
    series = Series()
    for step, value in enumerate((1.0, None, float("nan"), float("inf"), 2.0, None)):
        series.add(step, value)
    assert (series.count, series.gaps, series.last) == (6, 4, 2.0)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '"text"',
        "{}",
        '{"step": null}',
        '{"step": 3, "loss": [1]}',
        '{"step": 3, "loss": "x"}',
        "",
    ],
)
def test_a_line_that_is_no_record_is_named(line: str, run: Path) -> None:
    path = run / "grpo_stage" / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "reward": 1.0}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(BadData, match="not a record of metrics") as raised:
        reporting.write(run)
    assert str(raised.value.where) == f"{path}:2"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (2e-05, "2e-5"),
        (-1.23456, "-1.235"),
        (12_345, "12.35k"),
        (5e6, "5M"),
        (None, "not finite"),
        (float("inf"), "not finite"),
    ],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert short(value) == text


def test_ticks_are_round_numbers_and_whole_where_they_count_steps() -> None:
    assert ticks(0.13, 0.98) == pytest.approx([0.25, 0.5, 0.75])
    assert ticks(1, 4, whole=True) == [1, 2, 3, 4]
    assert ticks(3, 3, whole=True) == [3]
    assert (rounded(1.0), rounded(1.234567), rounded(None)) == (1, 1.2346, None)


# --- completions ----------------------------------------------------------------------------


def test_windows_are_spread_over_a_file_with_the_first_and_the_last(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    lines = [
        completion(step, f"Sum {group}?", reward=float(i))
        for step in range(1, 101)
        for group in range(4)
        for i in range(8)
    ]
    write_rows(path, lines)
    with path.open("a") as file:
        file.write('{"step": 101, "prompt": "cut')
    windows = read_windows(path)
    steps = [window.step for window in windows]
    assert len(steps) == 6
    assert (steps[0], steps[-1]) == (1, 100)
    assert all(15 <= after - before <= 25 for before, after in zip(steps, steps[1:], strict=False))
    for window in windows:
        assert (window.count, window.reward) == (32, 3.5), "all of the window"
        assert [group.prompt for group in window.groups] == ["Sum 0?", "Sum 1?"]
        assert [[line["reward"] for line in group.completions] for group in window.groups] == [
            [7, 5, 3, 0]
        ] * 2
        assert [group.count for group in window.groups] == [8, 8]


def test_little_of_a_large_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    with path.open("w") as file:
        for step in range(2000):
            file.write(json.dumps(completion(step, completion="word " * 2000)) + "\n")
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    windows = read_windows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [windows[0].step, windows[-1].step] == [0, 1999]
    assert peak < 2e6


@pytest.mark.parametrize("text", ["", '{"step": 1, "prompt": "cut'])
def test_there_may_be_no_whole_completion(text: str, tmp_path: Path) -> None:
    (tmp_path / "completions.jsonl").write_text(text)
    assert read_windows(tmp_path / "completions.jsonl") == []
    assert read_windows(tmp_path / "none.jsonl") == []


def test_a_line_that_is_no_completion_is_named(run: Path) -> None:
    path = run / "grpo_stage" / "completions.jsonl"
    path.write_text("{}\n")
    with pytest.raises(BadData, match="not a completion") as raised:
        reporting.write(run)
    assert raised.value.where == f"{path}, byte 0"


def test_images_are_small_and_those_that_are_gone_are_said(run: Path, tmp_path: Path) -> None:
    photo((640, 480)).save(tmp_path / "here.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [str(tmp_path / name) for name in ("here.png", "gone.png", "broken.png")]
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    shown = completion(4, talk, images=[*images, "rows.parquet:7", "a", "b"])
    with (run / "grpo_stage" / "completions.jsonl").open("a") as file:
        file.write(json.dumps(shown) + "\n")
    found = page(run)
    (image,) = (attributes for tag, attributes in found.tags if tag == "img")
    assert str(image["src"]).startswith("data:image/jpeg;base64,")
    assert len(str(image["src"])) < 10_000
    assert "[image]What is this?" in found.said
    for name in (*images[1:], "rows.parquet:7"):
        assert f"{name}isn't there as a file that can be shown" in found.said
    assert "and 2 more" in found.said


# --- the page -------------------------------------------------------------------------------


def test_a_run_that_was_killed_is_shown_as_far_as_it_came(run: Path) -> None:
    read = read_run(run)
    assert [stage.state for stage in read.stages] == ["done, 8 steps", "at step 3 of 20"]
    assert (read.task, read.model, read.began) == ("sums", "models/small", "2026-01-02 03:04:05")
    assert read.stages[0].curves.seconds == 8 * 0.5 + 1.0
    found = page(run)
    for said in (
        "at step 3 of 20",
        "40 examples of 41 rows",
        "1 dropped: nothing to learn",
        "fsdp 4",
        "1 → 0.25",
    ):
        assert said in found.said
    assert "shown by log_completions" not in found.said
    assert found.count("polyline") == 3, "loss, seconds a step, reward; one evaluation is a dot"
    assert not list(run.glob(".*")), "nothing is left behind"


def test_a_stage_that_has_not_begun_is_said(run: Path) -> None:
    for name in ("metrics.jsonl", "completions.jsonl"):
        (run / "grpo_stage" / name).unlink()
    (run / "train.log").unlink()
    assert [stage.state for stage in read_run(run).stages] == ["done, 8 steps", "not started"]
    assert "not started" in page(run).said


def test_gaps_part_a_curve_and_are_counted(run: Path) -> None:
    values = [1.0, 2.0, None, 3.0, None, 4.0, 5.0, 6.0]
    write_rows(run / "sft_stage" / "metrics.jsonl", [{"step": i, "loss": v} for i, v in enumerate(values, 1)])
    found = page(run)
    sft = [
        attributes
        for tag, attributes in found.tags
        if tag in ("polyline", "circle") and attributes["class"] == "c0"
    ]
    assert len(sft) == 4, "two lines, a dot between, and the reward"
    assert "2 not finite" in found.said
    assert sum(attributes.get("class") == "gap" for _, attributes in found.tags) == 2


def test_the_best_checkpoint_is_marked(run: Path) -> None:
    from ntjax.record import new_record

    for step, metric in ((4, 0.2), (8, 0.3)):
        record = run / "sft_stage" / f"checkpoint-{step}" / "record"
        record.mkdir(parents=True)
        (record / "metadata").write_text(json.dumps(new_record({}, metric, {})))
    found = page(run)
    assert "checkpoint-4, eval_loss 0.2" in found.said
    assert sum(attributes.get("class") == "best" for _, attributes in found.tags) > 0


def test_one_stage_has_a_report_of_its_own(run: Path) -> None:
    stage = run / "grpo_stage"
    found = page(stage)
    assert (stage / "report.html").exists()
    assert "grpo_stage" in found.said
    assert "done, 8 steps" not in found.said
    assert "at step 3 of 20" in found.said


def test_a_stage_folder_elsewhere_is_shown_without_its_config(run: Path, tmp_path: Path) -> None:
    elsewhere = (run / "grpo_stage").rename(tmp_path / "elsewhere")
    assert [(stage.name, stage.step) for stage in read_run(elsewhere).stages] == [("elsewhere", 3)]


def test_nothing_of_a_run_is_markup(run: Path) -> None:
    stage = run / "grpo_stage"
    line = completion(4, [{"role": EVIL, "content": EVIL}], completion=EVIL, finished=EVIL, images=[EVIL])
    line |= {"rewards": {EVIL: 1.0, "b": None}, "extra": {EVIL: EVIL}, "advantage": EVIL}
    with (stage / "completions.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n" + json.dumps(line | {"prompt": "\ud800"}) + "\n")
    write_rows(stage / "metrics.jsonl", [{"step": step, EVIL: 1.0} for step in (1, 2)])
    (run / "train.log").write_text(f"grpo_stage starts from {EVIL}\n")
    (run / "config.toml").write_text(CONFIG.replace('"sums"', json.dumps(EVIL)))
    (run / "environment.json").write_text(json.dumps({"layout": EVIL, EVIL: EVIL}))
    text = reporting.write(run).read_text()
    found = Page(text)
    assert found.count("script") == 2
    assert found.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert found.said.count("alert(1)") > 10
    assert text.count("</script>") == 2


def test_a_page_asks_for_nothing(run: Path) -> None:
    text = reporting.write(run).read_text()
    found = Page(text)
    for tag, attributes in found.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert re.match(r"data:|#|$", attributes.get(name) or ""), (tag, attributes)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = (attributes["content"] for tag, attributes in found.tags if "http-equiv" in attributes)
    assert str(policy).startswith("default-src 'none'; img-src data:")


def test_a_long_run_makes_a_page_that_can_be_sent(run: Path) -> None:
    names = [f"rewards/r{i}/mean" for i in range(40)]
    lines = ({"step": s, **{name: (s * 7919 % 1000) / 997 for name in names}} for s in range(1, 5001))
    (run / "sft_stage" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (run / "grpo_stage" / "completions.jsonl").open("a") as file:
        file.write((json.dumps(completion(4, "x" * 100_000, completion="y" * 100_000)) + "\n") * 50)
    path = reporting.write(run)
    assert path.stat().st_size < 2_500_000
    assert "98,000 characters more" in path.read_text()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="there is no folder"):
        reporting.write(tmp_path / "none")


def test_a_folder_that_is_no_run(run: Path) -> None:
    task = run.parent
    with pytest.raises(InputMissing, match=r"neither config.toml in it nor metrics.jsonl") as raised:
        reporting.write(task)
    assert "the folder with config.toml" in str(raised.value.fix)
    (task / "latest").symlink_to(run.name)
    with pytest.raises(InputMissing) as raised:
        reporting.write(task)
    assert raised.value.fix == f"name {task / 'latest'}"
    assert reporting.write(task / "latest") == run / "report.html"


def test_a_config_or_an_environment_that_cannot_be_read_is_named(run: Path) -> None:
    (run / "environment.json").write_text("[")
    with pytest.raises(BadData, match="not a JSON object") as raised:
        reporting.write(run)
    assert raised.value.where == str(run / "environment.json")
    (run / "config.toml").write_text("a = ")
    with pytest.raises(BadData, match="not TOML"):
        reporting.write(run)
