// The page that says why to believe the numbers.

import { get } from "./api.js";
import { calibrationChart } from "./chart.js";
import { failure, fill, h } from "./dom.js";
import { bytes, count, digits, duration, many, percent, spoken } from "./words.js";

/** The page. */
export function trustPage(study) {
  const element = h("div", { class: "trust" }, h("p", { class: "first-load" }, "Loading…"));
  const load = async () => {
    try {
      fill(element, h("div", { class: "trust-inside" }, sections(study, await get("trust"))));
    } catch (error) {
      fill(element, failure(error, load));
    }
  };
  load();
  return { element, keys: {}, close: () => {} };
}

function sections(study, trust) {
  return [
    h("h1", {}, "Can these numbers be believed?"),
    h("div", { class: "tiles" }, tiles(trust)),
    h("div", { class: "halves" }, calibration(trust), cost(trust)),
    checkpoints(study),
    coverage(trust),
    trust.notes.length > 0 && h("section", {}, h("h2", {}, "Notes"), h("ul", { class: "notes" }, trust.notes.map((note) => h("li", {}, note)))),
  ];
}

function tile(name, value, words, kind = "") {
  return h("div", { class: `fact ${kind}` }, h("span", { class: "fact-name" }, name), h("b", {}, value), h("span", { class: "fact-words" }, words));
}

function tiles({ coverage: covered, verification: check, cutoff, cost: spent }) {
  const precision = cutoff?.expected_precision ?? null;
  return [
    covered && tile("Coverage", percent(covered.fraction), "of the model's parameters are traced", covered.fraction === 1 ? "good" : ""),
    check && tile("Against autograd", digits(check.max_relative_error, 2),
      `largest relative error; ${digits(check.tolerance, 2)} is allowed. Checked on ${many(check.rows, "row")} at ${many(check.checkpoints, "checkpoint")}`, check.exact ? "good" : "bad"),
    tile("Precision of the flag", precision === null ? "not measured" : percent(precision),
      precision === null ? ["flips planted on purpose and a retraining would measure it: ", h("span", { class: "nowrap" }, "--calibrate")] : "expected, by flips planted on purpose", precision === null ? "open" : ""),
    spent && tile("Time", duration(spent.seconds), `from the checkpoints to this page${spent.peak_bytes ? `, with ${bytes(spent.peak_bytes)} of memory at the most` : ""}`),
  ];
}

function calibration({ calibration: curve, cutoff }) {
  return h("section", { class: "half" },
    h("h2", {}, "What the flag is worth"),
    h("p", {}, curve?.why ?? cutoff?.why ?? ""),
    curve === null
      ? h("div", { class: "empty-chart" }, h("p", {}, "No calibration"), h("p", { class: "quiet-text" }, "With a fit function in the study, ", h("code", {}, "tracin serve FILE.py --calibrate"), " plants wrong labels, trains anew, and draws precision by score here."))
      : calibrationChart(curve));
}

function cost({ cost: spent }) {
  if (!spent) return null;
  const stages = spent.stages ?? [];
  const longest = Math.max(...stages.map((stage) => stage.seconds), 0) || 1;
  return h("section", { class: "half" },
    h("h2", {}, "What it cost"),
    h("dl", { class: "stages" }, stages.map(({ name, seconds }) => {
      const inside = h("i");
      inside.style.width = `${(seconds / longest) * 100}%`;
      return h("div", {}, h("dt", {}, spoken(name)), h("dd", {}, h("span", { class: "bar", "aria-hidden": "true" }, inside), h("span", {}, duration(seconds))));
    })),
    h("dl", { class: "pairs" },
      spent.peak_bytes !== null && h("div", {}, h("dt", {}, "memory at the most"), h("dd", {}, bytes(spent.peak_bytes))),
      spent.explain && h("div", {}, h("dt", {}, "to explain one row"), h("dd", {}, `about ${duration(spent.explain.seconds)}, ${bytes(spent.explain.peak_bytes)}`))));
}

function checkpoints(study) {
  return h("section", {}, h("h2", {}, "Checkpoints"),
    table("Checkpoints", ["name", "step", "learning rate"], study.checkpoints.map((each) => [each.name, each.step === null ? "–" : count(each.step), each.learning_rate === null ? "–" : digits(each.learning_rate)])));
}

function coverage({ coverage: covered }) {
  if (!covered) return null;
  const rows = covered.table.map((row) => [row.parameter, row.shape.join(" × ") || "1", count(row.entries), row.traced ? "traced" : "not traced", row.route, row.reason]);
  return h("section", {}, h("h2", {}, "Parameters"), table("Parameters", ["parameter", "shape", "entries", "", "route", "reason"], rows));
}

function table(label, head, rows) {
  const full = head.map((_, at) => rows.some((row) => row[at] !== "" && row[at] !== null && row[at] !== undefined));
  const cells = (row, name) => row.filter((_, at) => full[at]).map((cell) => h(name, name === "th" ? { scope: "col" } : {}, cell || (name === "th" ? "state" : "")));
  return h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": label },
    h("table", {}, h("thead", {}, h("tr", {}, cells(head, "th"))), h("tbody", {}, rows.map((row) => h("tr", {}, cells(row, "td"))))));
}
