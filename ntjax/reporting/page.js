"use strict";
// The charts are there without this; it adds values under the pointer, and smoothing.
(() => {
  const { box: [left, top, right, bottom], charts } = JSON.parse(document.getElementById("data").textContent);
  const figures = [...document.querySelectorAll("figure")];
  const smoothing = document.getElementById("smoothing");
  const tip = document.body.appendChild(document.createElement("div"));
  tip.id = "tip";
  tip.hidden = true;
  document.documentElement.classList.add("script");

  const element = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const across = (chart, step) => left + (step - chart.x[0]) / (chart.x[1] - chart.x[0] || 1) * (right - left);
  const up = (chart, value) => bottom - (value - chart.y[0]) / (chart.y[1] - chart.y[0] || 1) * (bottom - top);

  // The index of the step that is nearest.
  function nearest(steps, step) {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1; else high = middle;
    }
    return low && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
  }

  // The running mean that forgets by `share` a value, without the pull of its start at 0.
  function smooth(values, share) {
    let mean = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = share * mean + (1 - share) * value;
      weight = share * weight + 1 - share;
      return mean / weight;
    });
  }

  function draw(figure, chart, share) {
    const svg = figure.querySelector("svg");
    svg.querySelectorAll(".smooth").forEach((old) => old.remove());
    svg.querySelectorAll("polyline").forEach((line) => line.classList.toggle("raw", share > 0 && !line.classList.contains("evaluation")));
    if (!share) return;
    chart.lines.forEach((line) => {
      if (line.kind.includes("evaluation")) return;
      let run = [];
      const end = () => {
        if (run.length > 1) svg.append(element("polyline", { class: `${line.kind} smooth`, points: run.join(" ") }));
        run = [];
      };
      smooth(line.values, share).forEach((value, i) => {
        if (value === null) end(); else run.push(`${across(chart, line.steps[i]).toFixed(1)},${up(chart, value).toFixed(1)}`);
      });
      end();
    });
  }

  function leave(figure) {
    tip.hidden = true;
    figure.querySelectorAll(".rule, .at").forEach((mark) => mark.remove());
  }

  function show(figure, chart, event) {
    leave(figure);
    const svg = figure.querySelector("svg"), place = svg.getBoundingClientRect();
    const x = (event.clientX - place.left) / place.width * svg.viewBox.baseVal.width;
    const wanted = chart.x[0] + (x - left) / (right - left) * (chart.x[1] - chart.x[0]);
    const near = chart.lines.map((line) => nearest(line.steps, wanted));
    const steps = near.map((at, i) => chart.lines[i].steps[at]);
    const step = steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    svg.append(element("path", { class: "rule", d: `M${across(chart, step)} ${top}V${bottom}` }));
    tip.replaceChildren(`step ${step.toLocaleString("en")}`);
    chart.lines.forEach((line, i) => {
      if (steps[i] !== step) return;
      const value = line.values[near[i]], row = document.createElement("div"), said = document.createElement("b");
      said.textContent = value === null ? "not finite" : String(value);
      row.className = line.kind;
      row.append(document.createElement("i"), line.name, said);
      tip.append(row);
      if (value !== null) svg.append(element("circle", { class: `${line.kind} at`, cx: across(chart, step), cy: up(chart, value), r: 3.5 }));
    });
    tip.hidden = false;
    const at = place.left + across(chart, step) / svg.viewBox.baseVal.width * place.width;
    const beside = at + 14 + tip.offsetWidth < document.documentElement.clientWidth ? at + 14 : Math.max(at - 14 - tip.offsetWidth, 4);
    tip.style.left = `${beside + scrollX}px`;
    tip.style.top = `${place.top + scrollY + 6}px`;
  }

  figures.forEach((figure, i) => {
    const svg = figure.querySelector("svg");
    svg.addEventListener("pointermove", (event) => show(figure, charts[i], event));
    svg.addEventListener("pointerdown", (event) => show(figure, charts[i], event));
    svg.addEventListener("pointerleave", () => leave(figure));
  });
  smoothing?.addEventListener("input", () => figures.forEach((figure, i) => draw(figure, charts[i], Number(smoothing.value))));
})();
