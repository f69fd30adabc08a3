"""A report's page. Whatever comes from a run is escaped, and the page's own policy lets nothing run but its script."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Mapping
from html import escape
from importlib import resources
from typing import Any

from ntjax import __version__
from ntjax.data.pictures import counted
from ntjax.progress import duration
from ntjax.reporting.charts import BOTTOM, LEFT, RIGHT, TOP, Chart, charts, short, svg
from ntjax.reporting.run import Run, Stage
from ntjax.reporting.samples import COMPLETIONS, LINES, Group, Window, number, read_windows, thumbnail
from ntjax.reporting.series import POINTS

BUDGET = 60_000  # points of all curves together
TEXT = 2000  # characters of a prompt or a completion
IMAGES, OF_ONE = 48, 4  # thumbnails in all, of one prompt


class Thumbnails:
    """Images as `<img>`, of which a page has room for `left`."""

    def __init__(self, left: int = IMAGES):
        self.left = left

    def __call__(self, names: list[str]) -> str:
        """Those of a prompt; what can't be shown is named."""
        if not names:
            return ""
        shown = [self._one(name) for name in names[:OF_ONE]]
        more = f"<span>and {len(names) - OF_ONE} more</span>" if len(names) > OF_ONE else ""
        return f'<div class="images">{"".join(shown)}{more}</div>'

    def _one(self, name: str) -> str:
        said = escape(name)
        if not self.left:
            return f"<span>{said}</span>"
        uri = thumbnail(name)
        if uri is None:
            return f"<span>{said}<br>isn't there as a file that can be shown</span>"
        self.left -= 1
        return f'<img src="{uri}" alt="{said}" title="{said}">'


def page(run: Run) -> str:
    """The HTML."""
    many = sum(len(stage.curves.series) for stage in run.stages)
    limit = max(min(POINTS, BUDGET // max(many, 1)), 200)
    drawn: list[Chart] = []
    images = Thumbnails()
    sections = "".join(_section(stage, limit, drawn, images) for stage in run.stages if stage.begun)
    style, script = (_file(f"page.{kind}") for kind in ("css", "js"))
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{_digest(script)}'"
    data = json.dumps({"box": [LEFT, TOP, RIGHT, BOTTOM], "charts": [chart.data() for chart in drawn]})
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.task)} - ntjax</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{_header(run)}
{_navigation(run)}
<main>
{_overview(run)}
{sections}
{_setup(run)}
</main>
<footer>Written by ntjax {escape(__version__)} on {time.strftime("%Y-%m-%d at %H:%M:%S")}.</footer>
<script type="application/json" id="data">{data.replace("<", chr(92) + "u003c")}</script>
<script>{script}</script>
</body>
</html>
"""


def _file(name: str) -> str:
    return resources.files("ntjax.reporting").joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _header(run: Run) -> str:
    has = run.environment
    facts = [run.model, f"started {run.began}" if run.began else "", has.get("layout", "")]
    facts += [f"{name} {has[name]}" for name in ("ntjax", "jax") if name in has]
    told = "".join(f"<span>{escape(str(fact))}</span>" for fact in facts if fact)
    return f'<header><h1>{escape(run.task)}</h1><div class="facts">{told}</div></header>'


def _navigation(run: Run) -> str:
    names = [stage.name for stage in run.stages if stage.begun]
    links = "".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in names)
    more = '<a href="#config">config</a>' if run.config else ""
    control = 'smoothing <input id="smoothing" type="range" min="0" max="0.98" step="0.02" value="0">'
    return f"<nav><div>{links}{more}<label>{control}</label></div></nav>"


def _overview(run: Run) -> str:
    rows = "".join(_row(stage) for stage in run.stages)
    titles = ("stage", "state", "tokens read", "time in steps", "loss", "best checkpoint")
    head = "".join(f"<th>{title}</th>" for title in titles)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="card wide">{table}</div>'


def _row(stage: Stage) -> str:
    """A stage in the overview."""
    curves, best = stage.curves, stage.best
    share = 1.0 if stage.done else stage.step / stage.steps if stage.steps else 0.0
    bar = f'<span class="bar"><i style="width:{min(share, 1.0):.0%}"></i></span>'
    name = escape(stage.name)
    cells = [
        f'<a href="#{name}">{name}</a>' if stage.begun else name,
        bar + stage.state,
        f"{curves.tokens:,}" if curves.tokens else "",
        duration(curves.seconds) if curves.seconds else "",
        _change(stage),
        f"checkpoint-{best.step}, {escape(best.metric)} {short(best.value)}" if best else "",
    ]
    kind = ' class="done"' if stage.done else ""
    return f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _change(stage: Stage) -> str:
    """The stage's first and last loss."""
    loss = stage.curves.series.get("loss")
    if loss is None or loss.last is None:
        return ""
    first = next(value for _, value in loss.points if value is not None)
    return f"{short(first)} → {short(loss.last)}" if loss.count > 1 else short(first)


def _section(stage: Stage, limit: int, drawn: list[Chart], images: Thumbnails) -> str:
    """A stage's curves, completions and log; its charts are added to `drawn` in the order of the page."""
    curves = stage.curves
    best = stage.best.step if stage.best else None
    if best is not None and not curves.first <= best <= curves.step:
        best = None
    parts = []
    for heading, some in charts(curves.series, (curves.first, curves.step), best, limit).items():
        drawn += some
        figures = "".join(map(_figure, some))
        of = f'style="--n:{len(some)}"'
        parts.append(f'<div class="heading" {of}><h3>{heading}</h3><div class="charts">{figures}</div></div>')
    parts = [f'<div class="headings">{"".join(parts)}</div>'] if parts else []
    if not parts:
        parts.append("<p>Nothing is logged yet.</p>")
    windows = read_windows(stage.folder / COMPLETIONS)
    if windows:
        parts.append("<h3>Completions</h3>")
        parts += [_window(window, images, shown=window is windows[-1]) for window in windows]
    if stage.said:
        parts.append(
            _folded("Start, data and devices, as logged", f"<pre>{escape(stage.said.strip())}</pre>")
        )
    facts = [stage.state, counted(len(stage.checkpoints), "checkpoint") if stage.checkpoints else ""]
    facts += [f"the best, checkpoint-{best}, is the dashed line" if best is not None else ""]
    gaps = sum(series.gaps for series in curves.series.values())
    facts += [f"{gaps} values were not finite" if gaps else ""]
    told = "".join(f"<span>{fact}</span>" for fact in facts if fact)
    name = escape(stage.name)
    return f'<section id="{name}"><h2>{name}</h2><div class="facts">{told}</div>{"".join(parts)}</section>'


def _figure(chart: Chart) -> str:
    names = []
    for line in chart.lines:
        gaps = f" <em>{line.gaps} not finite</em>" if line.gaps else ""
        names.append(f'<span class="{line.kind}">{escape(line.label)} {short(line.last)}{gaps}</span>')
    caption = f'<b>{escape(chart.title)}</b><div class="names">{"".join(names)}</div>'
    return f'<figure class="card"><figcaption>{caption}</figcaption>{svg(chart)}</figure>'


def _folded(title: str, inside: str, *, shown: bool = False) -> str:
    return f'<details class="card"{" open" if shown else ""}><summary>{title}</summary>{inside}</details>'


def _window(window: Window, images: Thumbnails, *, shown: bool) -> str:
    mean = "" if window.reward is None else f", mean reward <b>{short(window.reward)}</b>"
    inside = "".join(_group(group, images) for group in window.groups)
    told = sum(len(group.completions) for group in window.groups)
    many = f"{window.count:,}{' or more' if window.count == LINES else ''}"
    few = f'<span class="soft">· {told} of {many} completions</span>'
    title = f"Step {window.step:,}{mean} {few}"
    return _folded(title, f'<div class="inside">{inside}</div>', shown=shown)


def _group(group: Group, images: Thumbnails) -> str:
    """A prompt and its completions."""
    few = len(group.completions) < group.count
    note = f"{len(group.completions)} of {group.count}, from the best to the worst" if few else ""
    told = "".join(map(_completion, group.completions))
    said = f'<p class="soft">{note}</p>' if note else ""
    return f'<div class="group">{_prompt(group.prompt)}{images(group.images)}{said}{told}</div>'


def _prompt(prompt: Any) -> str:
    """Text, or the turns of a conversation."""
    if not isinstance(prompt, list):
        return f'<div class="turn">{_text(prompt)}</div>'
    turns = [turn if isinstance(turn, Mapping) else {"content": turn} for turn in prompt]
    told = [(str(turn.get("role", "")), _content(turn.get("content"))) for turn in turns]
    return "".join(f'<div class="turn"><b>{escape(role)}</b>{_text(text)}</div>' for role, text in told)


def _content(content: Any) -> Any:
    """A turn's parts as text."""
    if not isinstance(content, list):
        return content
    parts = [part if isinstance(part, Mapping) else {"text": part} for part in content]
    return "".join(str(part.get("text", f"[{part.get('type', 'part')}]")) for part in parts)


def _completion(line: Mapping[str, Any]) -> str:
    """What was drawn, and what it was worth."""
    advantage = line.get("advantage")
    worth = number(advantage) or 0.0
    kind = "up" if worth > 0 else "down" if worth < 0 else ""
    scores = [_score("reward", line.get("reward"))]
    rewards = line.get("rewards")
    if isinstance(rewards, Mapping) and len(rewards) > 1:
        scores += [_score(str(name), value) for name, value in rewards.items()]
    scores += [_score("advantage", advantage), _score("tokens", line.get("tokens"))]
    scores += [_score("ended by", line.get("finished"))]
    extra = line.get("extra")
    if isinstance(extra, Mapping):
        scores += [_score(str(name), value) for name, value in extra.items()]
    told = "".join(scores)
    text = f'<div class="text">{_text(line.get("completion"))}</div>'
    return f'<div class="completion {kind}">{text}<div class="scores">{told}</div></div>'


def _score(name: str, value: Any) -> str:
    value = value if number(value) is None else short(value)
    kind = ' class="advantage"' if name == "advantage" else ""
    return f"<span>{escape(name)} <b{kind}>{_text(value, 120)}</b></span>"


def _text(value: Any, most: int = TEXT) -> str:
    """The beginning of a text."""
    said = "" if value is None else str(value)
    more = f'<span class="soft"> … {len(said) - most:,} characters more</span>' if len(said) > most else ""
    return escape(said[:most]) + more


def _setup(run: Run) -> str:
    """Where and how it ran."""
    parts = []
    if run.environment:
        pairs = (
            f"<dt>{escape(str(key))}</dt><dd>{_text(value)}</dd>" for key, value in run.environment.items()
        )
        parts.append(f'<h2 id="environment">Environment</h2><dl class="card">{"".join(pairs)}</dl>')
    if run.config:
        config = _folded("config.toml, every setting written out", f"<pre>{escape(run.config)}</pre>")
        parts.append(f'<h2 id="config">Config</h2>{config}')
    return "".join(parts)
