// Charts as inline SVG that are drawn for the width they have, each with its numbers as a table.

import { fill, h, s } from "./dom.js";
import { digits, percent } from "./words.js";

/** A picture that `draw(width)` draws anew whenever its width changes. */
function responsive(draw) {
  const box = h("div", { class: "chart" });
  let drawn = 0;
  new ResizeObserver(() => {
    const width = Math.round(box.clientWidth);
    if (width > 0 && Math.abs(width - drawn) > 1) { drawn = width; fill(box, draw(width)); }
  }).observe(box);
  return box;
}

/** Round numbers between two values, about `wanted` of them. */
export function ticks(low, high, wanted = 4) {
  const span = high - low || 1;
  const rough = span / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((each) => each * power >= rough) * power;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
  return found;
}

function scale(low, high, from, to) {
  return (value) => from + ((value - low) / (high - low || 1)) * (to - from);
}

function tickText(value) {
  if (Math.abs(value) < 1e-12) return "0";
  const size = Math.abs(value);
  const text = size >= 1e6 || size < 1e-4 ? digits(size, 2) : String(Number(size.toPrecision(4)));
  return (value < 0 ? "−" : "") + text;
}

function lines(values, x0, x1, y) {
  return values.map((value) => [
    s("line", { class: value === 0 ? "axis" : "hair", x1: x0, x2: x1, y1: y(value), y2: y(value) }),
    s("text", { class: "tick", x: x0 - 8, y: y(value), "text-anchor": "end", "dominant-baseline": "middle" }, tickText(value)),
  ]);
}

/** Where the checkpoints stand: at their steps, or evenly where those lie too unevenly. */
function placesOf(steps) {
  const gaps = steps.slice(1).map((step, at) => step - steps[at]);
  const reach = steps[steps.length - 1] - steps[0];
  return gaps.length === 0 || Math.min(...gaps) < reach / 30 ? steps.map((_, at) => at) : steps;
}

/** The loss at each checkpoint, and below it what the training rows contributed there: the idea of TracIn. */
export function lossChart(path, words) {
  const { steps, losses, lowered, raised } = path;
  const label = `The loss of ${words} at ${steps.length} checkpoints, from ${digits(losses[0])} to ${digits(losses[losses.length - 1])}, and what proponents and opponents contributed at each. The numbers are in the table below.`;
  return h("figure", { class: "loss-chart" },
    responsive((width) => drawLoss(path, width, label)),
    tableOf("The numbers", ["step", "loss", "proponents", "opponents", "sum"],
      steps.map((step, at) => [step, digits(losses[at]), digits(lowered[at]), digits(raised[at]), digits(lowered[at] + raised[at])])));
}

function drawLoss({ steps, losses, lowered, raised, checkpoints }, width, label) {
  const left = 52, right = width - 14, top = 30, middle = 172, below = 236, bottom = 356;
  const places = placesOf(steps);
  const gaps = places.slice(1).map((place, at) => place - places[at]);
  const gap = gaps.length ? Math.min(...gaps) : 1;
  const x = scale(places[0] - gap * 0.6, places[places.length - 1] + gap * 0.6, left, right);
  const known = losses.map((loss) => loss ?? 0);
  const high = Math.max(...known, 0) * 1.1 || 1;
  const y = scale(Math.min(...known, 0), high, middle, top);
  const most = Math.max(...lowered, 0), least = Math.min(...raised, 0);
  const room = (most - least || 2) * 0.06;
  const z = scale(least - room, (most || 1) + room, bottom, below);
  const thick = Math.min(46, (x(gap) - x(0)) * 0.6);
  return s("svg", { viewBox: `0 0 ${width} 388`, width, height: 388, role: "img", "aria-label": label },
    s("text", { class: "chart-title", x: 0, y: 12 }, "Loss"),
    lines(ticks(Math.min(...known, 0), high, 3), left, right, y),
    s("polyline", { class: "line", points: places.map((place, at) => `${x(place)},${y(known[at])}`).join(" ") }),
    places.map((place, at) => s("circle", { class: "dot", cx: x(place), cy: y(known[at]), r: 4 },
      s("title", {}, `${checkpoints[at]}: loss ${digits(losses[at])}`))),
    endLabels(places, known, x, y),
    s("text", { class: "chart-title", x: 0, y: 204 }, "Contribution of the training rows"),
    s("text", { x: 0, y: 222, class: "key" },
      s("tspan", { class: "proponent" }, "▲ lowered it"), s("tspan", { class: "opponent", dx: 12 }, "▼ raised it"), s("tspan", { dx: 12 }, "– sum")),
    lines(ticks(least - room, most + room, 4), left, right, z),
    places.map((place, at) => s("g", {},
      s("title", {}, `${checkpoints[at]}: lowered by ${digits(lowered[at])}, raised by ${digits(-raised[at])}`),
      s("rect", { class: "bar-up", x: x(place) - thick / 2, y: z(lowered[at]), width: thick, height: Math.max(0, z(0) - z(lowered[at])) }),
      s("rect", { class: "bar-down", x: x(place) - thick / 2, y: z(0), width: thick, height: Math.max(0, z(raised[at]) - z(0)) }),
      s("line", { class: "sum-edge", x1: x(place) - thick * 0.7, x2: x(place) + thick * 0.7, y1: z(lowered[at] + raised[at]), y2: z(lowered[at] + raised[at]) }),
      s("line", { class: "sum", x1: x(place) - thick * 0.7, x2: x(place) + thick * 0.7, y1: z(lowered[at] + raised[at]), y2: z(lowered[at] + raised[at]) }))),
    s("line", { class: "axis", x1: left, x2: right, y1: z(0), y2: z(0) }),
    stepLabels(steps, places, x, bottom + 16),
    s("text", { class: "tick", x: (left + right) / 2, y: 386, "text-anchor": "middle" }, places === steps ? "step of the checkpoint" : "step of the checkpoint (evenly spaced)"));
}

/** The first and the last loss beside their dots, on the free side of the line. */
function endLabels(places, losses, x, y) {
  const last = losses.length - 1;
  return [...new Set([0, last])].map((at) => {
    const beside = at === 0 ? Math.min(1, last) : last - 1;
    const under = last > 0 && losses[beside] > losses[at];
    const low = under && y(losses[at]) + 14 < 172;
    return s("text", { class: "value", x: x(places[at]), y: y(losses[at]) + (low ? 18 : -10), "text-anchor": "middle" }, digits(losses[at]));
  });
}

/** Steps under their checkpoints, as many as stand side by side. */
function stepLabels(steps, places, x, y) {
  const shown = [];
  for (const at of [steps.length - 1, ...steps.keys()]) {
    const half = String(steps[at]).length * 3.6 + 5;
    if (shown.every((other) => Math.abs(x(places[at]) - x(places[other.at])) >= half + other.half)) shown.push({ at, half });
  }
  return shown.map(({ at }) => s("text", { class: "tick", x: x(places[at]), y, "text-anchor": "middle" }, steps[at].toLocaleString("en")));
}

/** Precision and share found by score: how far a flag can be believed. */
export function calibrationChart({ score, precision, found, cutoff }) {
  const label = `Precision and share found of planted wrong labels by score. The cut-off is ${digits(cutoff)}.`;
  const rows = score.map((value, at) => [digits(value), percent(precision[at]), percent(found[at])]);
  return h("figure", {},
    responsive((width) => drawCalibration({ score, precision, found, cutoff }, width, label)),
    tableOf("The numbers", ["score", "precision", "found"], rows));
}

function drawCalibration({ score, precision, found, cutoff }, width, label) {
  const narrow = width < 400, left = 46, right = width - 12, top = narrow ? 58 : 40, bottom = narrow ? 278 : 260;
  const x = scale(0, 1, left, right), y = scale(0, 1, bottom, top);
  const curve = (values, kind) => s("polyline", { class: `line ${kind}`, points: score.map((at, number) => (values[number] === null ? null : `${x(at)},${y(values[number])}`)).filter(Boolean).join(" ") });
  const rightHalf = cutoff !== null && cutoff > 0.7;
  return s("svg", { viewBox: `0 0 ${width} ${bottom + 44}`, width, height: bottom + 44, role: "img", "aria-label": label },
    s("text", { class: "key", x: 0, y: 14 },
      s("tspan", { class: "proponent" }, "● precision of the flag"), s("tspan", narrow ? { class: "series-1", x: 0, dy: 18 } : { class: "series-1", dx: 14 }, "● share of wrong labels found")),
    [0, 0.25, 0.5, 0.75, 1].map((value) => [
      s("line", { class: value === 0 ? "axis" : "hair", x1: left, x2: right, y1: y(value), y2: y(value) }),
      s("text", { class: "tick", x: left - 8, y: y(value), "text-anchor": "end", "dominant-baseline": "middle" }, percent(value)),
    ]),
    cutoff !== null && [
      s("line", { class: "cut", x1: x(cutoff), x2: x(cutoff), y1: top - 10, y2: bottom }),
      s("text", { class: "value", x: x(cutoff) + (rightHalf ? -6 : 6), y: top - 4, "text-anchor": rightHalf ? "end" : "start" }, `flagged from ${digits(cutoff)}`),
    ],
    curve(found, "series-1"), curve(precision, "proponent"),
    [0, 0.25, 0.5, 0.75, 1].map((value) => s("text", { class: "tick", x: x(value), y: bottom + 18, "text-anchor": "middle" }, tickText(value))),
    s("text", { class: "tick", x: (left + right) / 2, y: bottom + 38, "text-anchor": "middle" }, "score of the audit"));
}

/** The numbers of a chart, folded away. */
export function tableOf(name, head, rows) {
  return h("details", { class: "numbers" }, h("summary", {}, name),
    h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": name },
      h("table", {},
        h("thead", {}, h("tr", {}, head.map((each) => h("th", { scope: "col" }, each)))),
        h("tbody", {}, rows.map((row) => h("tr", {}, row.map((each) => h("td", {}, each))))))));
}
