// The page that decides on suspects: a grid by suspicion beside the evidence on one.

import { get, isReport } from "./api.js";
import { bar, faceOf } from "./cards.js";
import { fill, h, failure, placeholder, say, segmented, select, toast } from "./dom.js";
import { Grid } from "./grid.js";
import { chooseLabel, exportMenu } from "./menus.js";
import { suspectPanel } from "./suspect.js";
import { count, digits, many, minus } from "./words.js";

/** The page. Answers `{element, keys, close()}`. */
export function auditPage(study, kept, decisions) {
  const asked = (kept.audit ??= { show: "flagged", given: "", suggested: "" });
  const state = h("div", { class: "list-state" });
  const panel = h("section", { class: "panel", "aria-label": "The suspect" });
  const progress = h("div", { class: "progress" });
  const saved = h("div", { class: "saved" });
  const told = h("p", { class: "list-count" });
  let current = null;
  let place = 0;
  let tally = null;

  const grid = new Grid({
    label: "Suspects, the most suspect first",
    fetch: async (offset, limit) => {
      const answer = await get("suspects", { ...asked, offset, limit });
      decisions.learn(answer.items);
      count_(answer.progress);
      return answer;
    },
    draw: drawTile,
    minimum: 132,
    height: (width) => tileHeight(width),
    gap: 12,
    onSelect: (item, index) => { current = item; place = index; drawPanel(); },
    onOpen: () => { element.dataset.open = "true"; },
    onLoad: loaded,
    onError: (error) => fill(state, failure(error, reload)),
  });

  function tileHeight(width) {
    const first = grid.items.find((item) => item !== undefined);
    grid.minimum = first === undefined || first.face.kind === "image" ? 132 : 220;
    return (first === undefined || first.face.kind === "image" ? width : 108) + 50;
  }

  function loaded(total) {
    told.textContent = total === 1 ? "1 row" : many(total, "row");
    say(`${told.textContent} in the list`);
    grid.measured();
    fill(state, total === 0 && nothing());
    if (total === 0) { current = null; drawPanel(); } else grid.select(Math.min(place, total - 1));
  }

  function nothing() {
    const plain = !asked.given && !asked.suggested;
    const all = h("button", { type: "button", on: { click: () => { choose.mark("all"); asked.show = "all"; reload(); } } }, "Show all rows");
    if (asked.show === "undecided" && plain && tally?.flagged > 0) return placeholder("All decided", "Every flagged row has a decision. Export them, or look through the other rows.", all);
    if (asked.show === "decided" && plain) return placeholder("Nothing decided yet", "Keep, relabel or remove rows, and they are listed here.");
    if (asked.show === "flagged" && plain) return placeholder("No row is flagged", "The audit found no label to doubt.", all);
    return placeholder("No row passes the filter", "Choose other classes, or show all rows.", asked.show !== "all" && all);
  }

  function reload() {
    fill(state);
    place = 0;
    return grid.load();
  }

  function count_(found) {
    tally = found;
    drawProgress();
  }

  function drawProgress() {
    const { flagged, decided, kept: keep, relabelled, removed } = tally;
    const whole = Math.max(flagged, decided, 1);
    const part = (value, kind) => { const piece = h("i", { class: kind }); piece.style.width = `${(value / whole) * 100}%`; return piece; };
    fill(progress,
      h("div", { class: "progress-words" },
        h("span", {}, h("b", {}, count(decided)), ` decided · ${count(flagged)} flagged`),
        h("span", { class: "tally" },
          h("span", { class: "keep" }, `${count(keep)} kept`), h("span", { class: "relabel" }, `${count(relabelled)} relabelled`), h("span", { class: "remove" }, `${count(removed)} removed`))),
      h("div", { class: "progress-bar", role: "progressbar", "aria-label": "Decided rows", "aria-valuemin": "0", "aria-valuemax": String(whole), "aria-valuenow": String(decided) },
        part(keep, "keep"), part(relabelled, "relabel"), part(removed, "remove")));
  }

  function drawTile(item, tile) {
    const decision = decisions.of(item.row);
    tile.className = `tile suspect ${decision?.action ?? ""}`;
    fill(tile,
      faceOf(item.face),
      h("div", { class: "tile-labels" },
        item.given !== null && h("span", { class: "given" }, minus(item.given)),
        item.suggested !== null && h("span", { class: "arrow", "aria-hidden": "true" }, "→"),
        item.suggested !== null && h("b", {}, minus(item.suggested))),
      h("div", { class: "tile-foot" }, decision === null
        ? [bar(item.score, item.flagged ? "flagged" : ""), h("span", { class: "score" }, item.score.toFixed(3))]
        : h("span", { class: `badge ${decision.action}` }, decided(decision))));
    tile.setAttribute("aria-label", [
      `Training row ${item.row}`, item.given !== null && `given ${item.given}`, item.suggested !== null && `suggested ${item.suggested}`,
      `score ${item.score.toFixed(3)}`, decision !== null && decided(decision)].filter(Boolean).join(", "));
  }

  function drawPanel() {
    if (current === null) return fill(panel, placeholder("No suspect chosen", "Choose a row to see the evidence on it."));
    return suspectPanel(panel, { study, item: current, place, total: grid.total, decision: decisions.of(current.row), act, step, close });
  }

  function close() {
    element.dataset.open = "false";
    grid.select(place, { focus: true });
  }

  function step(by) {
    const inPanel = panel.contains(document.activeElement);
    return grid.select(place + by, { focus: !inPanel && element.dataset.open !== "true" });
  }

  /** keep, relabel, remove, label, undo. */
  async function act(action, label = null) {
    if (isReport) return;
    if (action === "undo") return undo();
    if (current === null) return;
    const item = current;
    if (action === "label") {
      const chosen = await chooseLabel(study, item);
      if (chosen !== null) decide(item, "relabel", chosen);
      return;
    }
    if (action === "relabel" && label === null) {
      if (item.suggested === null) return;
      label = study.classes === null ? item.target : item.suggested;
    }
    decide(item, action, label);
  }

  function decide(item, action, label) {
    const before = decisions.of(item.row);
    const entry = decisions.decide(item.row, action, label);
    shift(before, entry);
    toast(`Row ${item.row}: ${decided(entry)}`, { action: { name: "Undo", run: () => undo() }, seconds: 5, instead: "decision" });
    say(`Row ${item.row} ${decided(entry)}`);
    if (item === current) step(1);
  }

  function undo() {
    const before = new Map(decisions.mine.map((entry) => [entry.row, decisions.of(entry.row)]));
    const fallback = current === null ? null : decisions.of(current.row);
    const row = decisions.undo(current?.row ?? null);
    if (row === null) return toast("Nothing to undo.", { seconds: 3, instead: "decision" });
    shift(before.get(row) ?? fallback, decisions.of(row));
    const at = grid.items.findIndex((item) => item?.row === row);
    if (at >= 0) grid.select(at, { focus: !panel.contains(document.activeElement) && element.dataset.open !== "true" });
    toast(`Row ${row}: undone`, { seconds: 4, instead: "decision" });
    return say(`Row ${row} undone`);
  }

  /** The counts, before the server tells them anew. */
  function shift(from, to) {
    const names = { keep: "kept", relabel: "relabelled", remove: "removed" };
    if (from) { tally[names[from.action]]--; tally.decided--; }
    if (to) { tally[names[to.action]]++; tally.decided++; }
    drawProgress();
  }

  function changed({ detail }) {
    grid.redraw((item) => detail.rows.includes(item.row));
    if (current !== null && detail.rows.includes(current.row)) drawPanel();
    if (detail.others) get("suspects", { show: "flagged", limit: 1 }).then((answer) => { if (decisions.queue.length === 0) count_(answer.progress); }).catch(() => {});
  }

  function drawState() {
    if (isReport) return;
    const waiting = decisions.queue.length;
    saved.className = `saved ${decisions.failures > 0 ? "failing" : waiting > 0 ? "busy-state" : "good"}`;
    if (waiting === 0) fill(saved, "All saved");
    else if (decisions.failures === 0) fill(saved, `Saving ${count(waiting)}…`);
    else {
      fill(saved, h("span", { role: "alert" }, `${many(waiting, "decision")} not saved yet. ${decisions.error.message}`), h("button", { type: "button", on: { click: () => decisions.retry() } }, "Try now"));
    }
  }

  function conflict({ detail: { row, decision } }) {
    toast(`Another tab decided on row ${row} meanwhile: ${decision === null ? "it took its decision back" : decided(decision)}. That newer decision is shown; yours was not taken.`, { kind: "error" });
    get("suspects", { show: "flagged", limit: 1 }).then((answer) => count_(answer.progress)).catch(() => {});
  }

  const refused = ({ detail }) => {
    toast(`Row ${detail.row} was not decided: ${detail.message}`, { kind: "error" });
    get("suspects", { show: "flagged", limit: 1 }).then((answer) => count_(answer.progress)).catch(() => {});
  };
  const listeners = { change: changed, state: drawState, conflict, refused };
  for (const [name, run] of Object.entries(listeners)) decisions.addEventListener(name, run);

  const choose = segmented("Which rows", { flagged: "Flagged", undecided: "Undecided", decided: "Decided", all: "All" }, asked.show, (value) => { asked.show = value; reload(); });
  const classes = study.classes === null ? null : [["", "any"], ...study.classes.map((name) => [name, name])];
  const pick = (name, key) => classes && select(name, classes, asked[key], (value) => { asked[key] = value; reload(); });
  const element = h("div", { class: "audit", data: { open: "false" } },
    h("div", { class: "suspects" },
      h("div", { class: "bar-top" }, progress, !isReport && h("div", { class: "bar-end" }, saved, exportMenu())),
      h("div", { class: "filter-line" }, choose, pick("Given", "given"), pick("Suggested", "suggested"), told),
      state, grid.element),
    panel);
  drawState();
  drawPanel();
  reload();
  decisions.start();
  const run = (action) => () => act(action);
  return {
    element,
    keys: {
      k: run("keep"), r: run("relabel"), x: run("remove"), l: run("label"), u: run("undo"), "ctrl+z": run("undo"),
      n: () => step(1), p: () => step(-1),
      ArrowDown: () => arrow(grid.columns ?? 1), ArrowUp: () => arrow(-(grid.columns ?? 1)), ArrowRight: () => arrow(1), ArrowLeft: () => arrow(-1),
      Escape: () => { if (element.dataset.open === "true") close(); },
    },
    close: () => {
      grid.close();
      for (const [name, listener] of Object.entries(listeners)) decisions.removeEventListener(name, listener);
    },
  };

  function arrow(by) {
    if (place + by >= 0 && place + by < grid.total) step(by);
  }
}

/** A decision in words. */
export function decided(decision) {
  if (decision.action === "keep") return "kept";
  if (decision.action === "remove") return "removed";
  return `relabelled ${typeof decision.label === "number" ? digits(decision.label, 4) : decision.label}`;
}

