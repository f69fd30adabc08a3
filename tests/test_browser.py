"""A report in a real browser: it draws, runs its own script and nothing else, and asks for nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ntjax import reporting
from tests.cli.process import write_rows

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
EVIL = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
CONFIG = """
task_name = "a task"

[[stages]]
stage_type = "grpo"
stage_name = "grpo_stage"
"""
# What a pointer over the first chart and the slider of smoothing do, told in the page's title.
PROBE = """
<script>
addEventListener("load", () => {
  const svg = document.querySelector("figure svg"), place = svg.getBoundingClientRect();
  const at = { clientX: place.left + place.width - 5, clientY: place.top + 50, bubbles: true };
  svg.dispatchEvent(new PointerEvent("pointermove", at));
  const tip = document.getElementById("tip");
  const told = [tip.hidden, tip.textContent, svg.querySelectorAll(".at").length];
  svg.dispatchEvent(new PointerEvent("pointerleave"));
  const slider = document.getElementById("smoothing");
  slider.value = 0.9;
  slider.dispatchEvent(new Event("input"));
  told.push(tip.hidden, ...["smooth", "raw"].map((kind) => document.querySelectorAll(`polyline.${kind}`).length));
  document.title = JSON.stringify(told);
});
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    stage = tmp_path / "run" / "grpo_stage"
    stage.mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text(CONFIG)
    records = [
        {"step": step, "loss": 1 / step, "learning_rate": 1e-4, "reward": None if step == 10 else step / 20}
        for step in range(1, 21)
    ]
    records += [{"step": step, "eval_reward": step / 20, "eval_runtime": 1.0} for step in (10, 20)]
    write_rows(stage / "metrics.jsonl", sorted(records, key=lambda record: record["step"] or 0))
    line = {
        "step": 1,
        "prompt": EVIL,
        "completion": EVIL,
        "rewards": {EVIL: 1.0},
        "reward": 1.0,
        "advantage": 0.0,
    }
    write_rows(stage / "completions.jsonl", [line])
    return tmp_path / "run"


def opened(browser: str, page: Path) -> tuple[str, str]:
    """The page as it is once its script has run, and what the browser logs."""
    profile = page.parent / "profile"
    switches = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--v=0",
        "--dump-dom",
    )
    command = [browser, *switches, f"--user-data-dir={profile}", f"file://{page}"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, ran.stderr


def complaints(log: str) -> list[str]:
    """What the page's console says."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


def test_a_page_is_drawn_and_its_script_runs_without_a_complaint(browser: str, run: Path) -> None:
    page, log = opened(browser, reporting.write(run))
    assert not complaints(log)
    assert "<title>a task - ntjax</title>" in page
    assert 'class="script"' in page, "the script has run"
    assert 'id="tip"' in page
    charts = page.count("<figure")
    assert charts == 4, "loss, reward, learning rate, seconds of an evaluation"
    # The reward has a gap: two lines. Evaluations are two.
    assert page.count("<polyline") == 1 + 2 + 1 + 1 + 1
    assert page.count('class="gap"') == 1


def test_values_are_shown_under_the_pointer_and_curves_smoothed(browser: str, run: Path) -> None:
    path = reporting.write(run)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text())
    path.write_text(text.replace("</body>", f"{PROBE}</body>"))
    page, log = opened(browser, path)
    assert not complaints(log)
    (title,) = re.findall("<title>(.*)</title>", page)
    assert json.loads(title) == [False, "step 20loss0.05", 1, True, 4, 4]


def test_what_a_page_is_given_does_not_run(browser: str, run: Path) -> None:
    path = reporting.write(run)
    page, log = opened(browser, path)
    assert "<title>a task" in page
    assert page.count("<script") == 2
    assert "<img" not in page
    # And were something not escaped, the page's policy would still not let it run.
    path.write_text(path.read_text().replace("<main>", f"<main>{EVIL}"))
    page, log = opened(browser, path)
    assert "<title>a task" in page
    assert "Content Security Policy" in log
