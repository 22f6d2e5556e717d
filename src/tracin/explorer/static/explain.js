// The page that explains a prediction: a list of test rows beside the explanation of one.

import { canExplain, get } from "./api.js";
import { addressOf, bar, faceOf, labels, nameOf, snippet } from "./cards.js";
import { fill, h, placeholder, failure, say, segmented, select } from "./dom.js";
import { explanation } from "./explanation.js";
import { Grid } from "./grid.js";
import { uploadButton, watchDrops } from "./upload.js";
import { capital, count, digits, many, minus, named, percent } from "./words.js";

const NARROW = window.matchMedia("(max-width: 859px)");

/** The page. Answers `{element, show(trail), close()}`; the filters stay while other pages are open. */
export function explainPage(study, kept) {
  const asked = (kept.filters ??= { show: study.classes === null ? "all" : "wrong", label: null, predicted: null, min: null, max: null, search: null, order: study.classes === null ? "loss" : "confidence", down: "1" });
  const detail = h("section", { class: "detail", "aria-label": "Explanation" });
  const told = h("p", { class: "list-count" });
  const state = h("div", { class: "list-state" });
  let trail = [];
  let stopped = new AbortController();

  const grid = new Grid({
    label: "Test rows",
    fetch: (offset, limit) => get("test", { ...asked, offset, limit }),
    draw: (item, tile) => drawLine(item, tile),
    height: () => 64,
    gap: 0,
    onOpen: (item) => { location.hash = addressOf([["test", item.row]]); },
    onLoad: loaded,
    onError: (error) => fill(state, failure(error, reload)),
  });

  function loaded(total) {
    told.textContent = counted(total, asked.show);
    say(told.textContent);
    fill(state, total === 0 && nothing());
    mark();
    if (total > 0 && trail.length === 0 && !NARROW.matches) {
      grid.at(0).then((first) => {
        if (first && trail.length === 0) location.replace(addressOf([["test", first.row]]));
      });
    }
  }

  function nothing() {
    const all = h("button", { type: "button", on: { click: () => { reset(); } } }, "Show all rows");
    if (asked.show === "wrong" && [asked.label, asked.predicted, asked.min, asked.max, asked.search].every((value) => value === null)) {
      return placeholder("No wrong prediction", "Every test row is predicted as it is labelled.", all);
    }
    return placeholder("No row passes the filter", "Choose other classes, another confidence, or fewer words.", all);
  }

  function reset() {
    Object.assign(asked, { show: "all", label: null, predicted: null, min: null, max: null, search: null });
    fill(filters, filterFields(study, asked, reload));
    reload();
  }

  function reload() {
    fill(state);
    return grid.load();
  }

  function mark() {
    const [side, row] = trail[0] ?? [];
    const at = side === "test" ? grid.items.findIndex((item) => item && String(item.row) === String(row)) : -1;
    grid.chosen = at;
    if (at >= 0) { grid.active = at; grid.show(at); }
    grid.render();
  }

  function drawLine(item, tile) {
    const wrong = item.correct === false;
    fill(tile,
      h("div", { class: "line-face" }, item.face.kind === "image" && faceOf(item.face)),
      h("div", { class: "line-words" },
        lineTitle(item, wrong),
        h("span", { class: "line-row" }, `row ${item.row}`, snippet(item.face) && ` · ${snippet(item.face)}`)),
      item.confidence !== null ? h("div", { class: "line-sure" }, percent(item.confidence), bar(item.confidence))
        : item.loss !== null && h("div", { class: "line-sure" }, "loss", h("br"), digits(item.loss)));
    tile.classList.toggle("with-face", item.face.kind === "image");
    tile.setAttribute("aria-label", [`Test row ${item.row}`, item.predicted !== null && `predicted ${named(item.predicted)}`, item.label !== null && `${labels.name} ${named(item.label)}`, wrong && "wrong"].filter(Boolean).join(", "));
  }

  async function show(next) {
    trail = next;
    element.dataset.open = String(trail.length > 0);
    mark();
    stopped.abort();
    if (trail.length === 0) {
      fill(detail, placeholder("Choose a row", "The training rows behind its prediction are shown here."));
      if (grid.total > 0) loaded(grid.total);
      return;
    }
    stopped = new AbortController();
    const mine = stopped;
    const [side, row] = trail[trail.length - 1];
    document.title = `${nameOf(side, row)} · ${study.title}`;
    const head = crumbs(trail);
    const slow = setTimeout(() => { if (stopped === mine && !mine.signal.aborted) fill(detail, head, tracing(study, side, row)); }, 150);
    try {
      if (!canExplain(side, row)) throw new Error("This report does not hold the explanation of this row.");
      await explanation({ study, side, row, trail, head, into: detail, signal: mine.signal, ready: () => clearTimeout(slow) });
      detail.scrollTop = 0;
    } catch (error) {
      if (error.name !== "AbortError" && stopped === mine) fill(detail, head, failure(error, () => show(trail)));
    } finally {
      clearTimeout(slow);
    }
  }

  const filters = h("div", { class: "filters" }, filterFields(study, asked, reload));
  const list = h("section", { class: "list", "aria-label": "Rows" }, filters, told, state, grid.element, upload(study));
  const element = h("div", { class: "explain" }, list, detail);
  const undrop = watchDrops(study, element);
  reload();
  return {
    element,
    show,
    keys: { "/": () => list.querySelector("input[type=search]").focus() },
    close: () => { stopped.abort(); grid.close(); undrop(); },
  };
}

function lineTitle(item, wrong) {
  if (item.label === null && item.predicted === null) return h("span", { class: "line-title" }, h("b", {}, "No label"));
  if (!labels.areClasses) return h("span", { class: "line-title" }, h("b", {}, minus(item.label ?? "")), item.predicted !== null && h("span", { class: "quiet-text" }, `predicted ${minus(item.predicted)}`));
  return h("span", { class: "line-title" }, h("b", {}, named(item.predicted ?? item.label)), wrong && h("span", { class: "not" }, `not ${named(item.label)}`));
}

function counted(total, show) {
  if (show === "wrong") return many(total, "wrong prediction");
  if (show === "right") return many(total, "right prediction");
  return many(total, "test row");
}

function upload(study) {
  if (study.upload === null) return study.why_no_upload ? h("p", { class: "list-foot quiet-text" }, capital(study.why_no_upload)) : null;
  return h("div", { class: "list-foot" }, uploadButton(study));
}

function filterFields(study, asked, reload) {
  let waiting;
  const change = (key) => (value) => { asked[key] = value; reload(); };
  const search = h("input", {
    type: "search", placeholder: "Row number or words", "aria-label": "Search rows", value: asked.search ?? "", autocomplete: "off", spellcheck: "false", "aria-keyshortcuts": "/",
    on: { input: () => { clearTimeout(waiting); waiting = setTimeout(() => change("search")(search.value.trim() || null), 200); } },
  });
  const orders = [["row:", "row number"], ["loss:1", "highest loss"], ["loss:", "lowest loss"]];
  if (study.classes !== null) orders.unshift(["confidence:1", "most sure"], ["confidence:", "least sure"]);
  const order = select("Order", orders, `${asked.order}:${asked.down}`, (value) => { [asked.order, asked.down] = value.split(":"); reload(); });
  if (study.classes === null) return [search, h("div", { class: "pair" }, order)];
  const classes = [[null, "any"], ...study.classes.map((name) => [name, named(name)])];
  return [
    search,
    segmented("Which predictions", { wrong: "Wrong", right: "Right", all: "All" }, asked.show, change("show")),
    h("div", { class: "pair" },
      select("Label", classes, asked.label, change("label")),
      select("Predicted", classes, asked.predicted, change("predicted"))),
    h("div", { class: "pair uneven" }, confidence(asked, reload), order),
  ];
}

/** From and to, in per cent. */
function confidence(asked, reload) {
  const field = (key, name, empty) => {
    const box = h("input", {
      type: "number", min: "0", max: "100", step: "1", placeholder: empty, "aria-label": name, value: asked[key] === null ? "" : asked[key] * 100,
      on: { change: () => {
        const value = Math.max(0, Math.min(100, Number(box.value)));
        asked[key] = box.value === "" ? null : value / 100;
        if (box.value !== "") box.value = String(value);
        reload();
      } },
    });
    return box;
  };
  return h("div", { class: "field", role: "group", "aria-label": "Confidence" },
    h("span", {}, "Confidence, %"),
    h("div", { class: "range" }, field("min", "Least confidence, per cent", "0"), h("span", { "aria-hidden": "true" }, "–"), field("max", "Highest confidence, per cent", "100")));
}

/** The way that led here, each step a link back. */
function crumbs(trail) {
  const back = trail.length > 1 ? addressOf(trail.slice(0, -1)) : "#/explain";
  return h("nav", { class: trail.length > 1 ? "trail" : "trail alone", "aria-label": "Trail" },
    h("a", { class: "back", href: back, "aria-label": trail.length > 1 ? "Back along the trail" : "Back to the list" }, "←"),
    h("ol", {}, trail.map(([side, row], at) => h("li", {},
      at < trail.length - 1 ? h("a", { href: addressOf(trail.slice(0, at + 1)) }, nameOf(side, row)) : h("span", { "aria-current": "page" }, nameOf(side, row))))));
}

function tracing(study, side, row) {
  return h("div", { class: "tracing", role: "status" },
    h("p", {}, `Tracing ${nameOf(side, row).toLowerCase()} through ${many(study.checkpoints.length, "checkpoint")} and ${count(study.train)} training rows…`),
    h("div", { class: "busy" }),
    h("div", { class: "ghosts", "aria-hidden": "true" }, Array.from({ length: 10 }, () => h("div", { class: "ghost" }))));
}
