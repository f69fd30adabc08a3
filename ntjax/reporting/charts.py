"""Which curves share a chart, and charts as SVG that needs no script."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from posixpath import commonpath
from typing import Any

from ntjax.reporting.series import Point, Series, thinned

WIDTH, HEIGHT = 360, 180
LEFT, TOP, RIGHT, BOTTOM = 44, 8, WIDTH - 15, HEIGHT - 22  # of what is drawn into
DOTS = 60  # evaluations that are drawn as dots
DENSE = 400  # points from which on a curve is drawn thinner
COLOURS = 8  # that page.css has

# Heading, title, and the metrics that go there; `eval_loss` goes where `loss` goes. The first that fits is taken.
CHARTS = tuple(
    (heading, title, re.compile(metrics))
    for heading, charts in {
        "Loss": {
            "Loss": r"loss",
            "Parts of the loss": r"loss/.*|nll_loss",
            "Perplexity": r"perplexity",
            "Accuracy of tokens": r"mean_token_accuracy",
        },
        "Rewards": {
            "Reward": r"reward",
            "Each reward, mean": r"rewards/.*/mean",
            "Each reward, standard deviation": r"rewards/.*/std",
            "Standard deviation of rewards": r"reward_std",
            "Groups without a difference": r"frac_reward_zero_std",
            "Scores": r"objective/(scores|rlhf_reward|non_score_reward)",
            "Rewards of the answers": r"rewards/(chosen|rejected)|(min|mean|max)_reward",
            "Margin": r"rewards/margins|margin",
            "Accuracy": r"rewards/accuracies|accuracy",
            "Failed calls": r"rewards/failures",
        },
        "Model": {
            "KL from the reference": r"kl|objective/kl",
            "KL from the policy that drew": r"policy/approxkl_avg",
            "KL coefficient": r"kl_coef",
            "Entropy": r"entropy|policy/entropy_avg|objective/entropy",
            "Log-probs of the answers": r"logps/.*",
            "Logits of the answers": r"logits/.*",
            "Log-odds": r"log_odds_.*",
            "Clipped": r"clip_ratio/.*_mean|cispo_clip_ratio|.*/clipfrac_avg",
            "Clipped, extremes of completions": r"clip_ratio/.*",
            "Ratio": r"val/ratio|vespo/.*",
            "Sampler against trainer, log-probs": r"sampler/logprob_diff.*",
        },
        "Completions": {
            "Tokens of a completion": r"completions/(mean|min|max)_length",
            "Tokens of those that ended": r"completions/.*_terminated_length",
            "Cut at the limit": r"completions/clipped_ratio",
            "Ended by themselves": r"val/num_eos_tokens",
        },
        "Optimizer": {"Learning rate": r"learning_rate", "Norm of the gradient": r"grad_norm"},
        "Speed": {
            "Tokens a second": r"(trained_)?tokens_per_second",
            "Tokens a second, in turn": r"(sampler|trainer)/tokens_per_second",
            "Seconds a step": r"step_time",
            "Seconds an evaluation": r"runtime",
            "Memory": r".*(memory|bytes).*",
        },
    }.items()
    for title, metrics in charts.items()
)


@dataclass(frozen=True)
class Line:
    """A curve and the number of its colour; evaluations are drawn as dots."""

    name: str
    label: str
    colour: int
    evaluation: bool
    points: Sequence[Point]
    gaps: int
    last: float | None

    @property
    def kind(self) -> str:
        """Its classes in page.css."""
        marks = (" evaluation" if self.evaluation else "") + (" dense" if len(self.points) > DENSE else "")
        return f"c{self.colour}{marks}"


@dataclass(frozen=True)
class Chart:
    """Curves that share axes; `steps` are the first and the last of the stage, `best` is marked."""

    title: str
    lines: list[Line]
    steps: tuple[int, int]
    best: int | None = None

    @property
    def values(self) -> tuple[float, float]:
        """The range that is drawn, a little wider than that of the values, but for a 0 that none is below."""
        finite = [value for line in self.lines for _, value in line.points if value is not None] or [0.0]
        low, high = min(finite), max(finite)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return max(low - room, 0.0) if low >= 0 else low - room, high + room

    def data(self) -> dict[str, Any]:
        """What the page's script shows of it: axes, and names, steps and values of the lines."""
        lines = [
            {
                "name": line.name,
                "kind": line.kind,
                "steps": [point.step for point in line.points],
                "values": [rounded(point.value) for point in line.points],
            }
            for line in self.lines
        ]
        return {"x": self.steps, "y": self.values, "lines": lines}


def charts(
    series: Mapping[str, Series], steps: tuple[int, int], best: int | None, limit: int
) -> dict[str, list[Chart]]:
    """The charts under their headings, of curves of at most `limit` points."""
    found: dict[tuple[str, str], list[str]] = {(heading, title): [] for heading, title, _ in CHARTS}
    for name in sorted(series, key=lambda name: name.startswith("eval_")):
        found.setdefault(_place(name), []).append(name)
    grouped: dict[str, list[Chart]] = {}
    for (heading, title), names in found.items():
        if names:
            lines = _lines({name: series[name] for name in names}, limit)
            grouped.setdefault(heading, []).append(Chart(title, lines, steps, best))
    return grouped


def _place(name: str) -> tuple[str, str]:
    """(heading, title) of a metric; one that no chart knows has its own."""
    plain = name.removeprefix("eval_")
    fits = ((head, title) for head, title, metrics in CHARTS if metrics.fullmatch(plain))
    return next(fits, ("Other", plain))


def _lines(series: Mapping[str, Series], limit: int) -> list[Line]:
    """The lines of a chart. Where there are several metrics, an evaluation has its metric's colour and stands beside
    it, and labels are without what all names begin with."""
    plain = list(dict.fromkeys(name.removeprefix("eval_") for name in series))
    shared = commonpath(plain) if len(plain) > 1 else ""
    lines = []
    for name, one in series.items():
        metric, evaluation = name.removeprefix("eval_"), name.startswith("eval_")
        colour, label = plain.index(metric), metric.removeprefix(shared).lstrip("/")
        if evaluation:
            alone = len(plain) == 1
            colour, label = (len(series) - 1, name) if alone else (colour, "evaluated")
        points = thinned(one.points, limit)
        lines.append(Line(name, label, colour % COLOURS, evaluation, points, one.gaps, one.last))
    return sorted(lines, key=lambda line: plain.index(line.name.removeprefix("eval_")))


def svg(chart: Chart) -> str:
    """The chart as it is without a script."""
    (first, last), (low, high) = chart.steps, chart.values
    across, up = _scale(first, last, LEFT, RIGHT), _scale(low, high, BOTTOM, TOP)
    parts = []
    for value, said in _told(ticks(low, high)):
        y = up(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/>')
        parts.append(f'<text class="left" x="{LEFT - 6}" y="{y}">{said}</text>')
    for value in ticks(first, last, whole=True):
        parts.append(f'<text class="below" x="{across(value)}" y="{BOTTOM + 15}">{short(value)}</text>')
    if chart.best is not None:
        parts.append(f'<path class="best" d="M{across(chart.best)} {TOP}V{BOTTOM}"/>')
    for line in chart.lines:
        parts += _drawn(line, across, up)
    said = "; ".join(f"{line.name} {short(line.last)} at the end" for line in chart.lines)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{chart.title}: {said}")}">'
        f"{''.join(parts)}</svg>"
    )


def _drawn(line: Line, across: Any, up: Any) -> list[str]:
    """A polyline for each stretch between gaps, a dot for what stands alone and for evaluations, a cross for a gap."""
    few = line.evaluation and len(line.points) <= DOTS
    found = []
    for stretch in _stretches(line.points):
        places = [(across(step), up(value)) for step, value in stretch]
        if len(places) > 1:
            found.append(
                f'<polyline class="{line.kind}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>'
            )
        if few or len(places) == 1:
            found += [f'<circle class="{line.kind}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in places]
    gaps = [across(point.step) for point in line.points if point.value is None]
    return found + [f'<path class="gap" d="M{x - 2.5} {BOTTOM - 5}l5 5m-5 0l5 -5"/>' for x in gaps]


def _stretches(points: Sequence[Point]) -> list[list[tuple[int, float]]]:
    found: list[list[tuple[int, float]]] = [[]]
    for step, value in points:
        if value is not None:
            found[-1].append((step, value))
        elif found[-1]:
            found.append([])
    return [stretch for stretch in found if stretch]


def _scale(low: float, high: float, start: float, end: float) -> Any:
    """value -> its place, to a tenth of a unit."""
    width = high - low or 1.0
    return lambda value: round(start + (value - low) / width * (end - start), 1)


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, about four."""
    step = max((high - low) / 4, 1.0 if whole else 0.0) or 1.0
    power = 10.0 ** math.floor(math.log10(step))
    sizes = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(size * power for size in sizes if size * power >= step * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _told(values: Sequence[float]) -> list[tuple[float, str]]:
    """The numbers with their texts, of more digits where few don't tell them apart."""
    said = [short(value) for value in values]
    return list(
        zip(values, said if len(set(said)) == len(said) else [f"{x:.7g}" for x in values], strict=True)
    )


def short(value: float | None) -> str:
    """A number in few characters: 0.0123, 1.5k, 2e-5."""
    if value is None or not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return f"{round(value, 10):.4g}"


def rounded(value: float | None) -> float | int | None:
    """To five digits."""
    if value is None:
        return None
    found = float(f"{value:.5g}")
    return int(found) if found.is_integer() and abs(found) < 1e9 else found
