// The page that decides on suspects: a grid by suspicion beside the evidence on one.

import { get, isReport } from "./api.js";
import { bar, faceOf, labels } from "./cards.js";
import { fill, h, failure, placeholder, say, segmented, select, toast } from "./dom.js";
import { Grid } from "./grid.js";
import { chooseLabel, exportMenu } from "./menus.js";
import { suspectPanel, waitingPanel } from "./suspect.js";
import { savedMark } from "./unsent.js";
import { count, decided, many, named } from "./words.js";

/** The page. Answers `{element, keys, close()}`. */
export function auditPage(study, kept, decisions) {
  const asked = (kept.audit ??= { show: "flagged", given: null, suggested: null });
  const state = h("div", { class: "list-state" });
  const panel = h("section", { class: "panel", "aria-label": "The suspect", on: { keydown: once } });
  const progress = h("div", { class: "progress" });
  const saved = savedMark(decisions);
  const told = h("p", { class: "list-count" });
  let current = null; // the suspect to decide on; null while it is fetched, so that no key decides on another
  let waiting = true;
  let place = 0;
  let tally = null;
  let asking = 0;
  let stale = false; // the counts wait for what is sent just now
  let notice = null; // the last decision as it is told: {entry, note}

  const grid = new Grid({
    label: "Suspects, the most suspect first",
    fetch: async (offset, limit) => {
      const answer = await get("suspects", { ...asked, offset, limit });
      decisions.learn(answer.items);
      return answer;
    },
    draw: drawTile,
    minimum: 132,
    height: (width) => tileHeight(width),
    gap: 12,
    onSelect: (item, index) => { current = item; place = index; waiting = false; drawPanel(); },
    onWait: (index) => { place = index; wait(); },
    onOpen: () => { element.dataset.open = "true"; },
    onLoad: loaded,
    onError: (error) => { current = null; waiting = false; drawPanel(); fill(state, failure(error, reload)); },
  });

  function wait() {
    current = null;
    waiting = true;
    drawPanel();
  }

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
    if (total === 0) { current = null; waiting = false; drawPanel(); } else grid.select(Math.min(place, total - 1));
  }

  function nothing() {
    const plain = asked.given === null && asked.suggested === null;
    const all = h("button", { type: "button", on: { click: () => { choose.mark("all"); asked.show = "all"; reload(); } } }, "Show all rows");
    if (asked.show === "undecided" && plain && tally?.flagged > 0 && tally.settled === tally.flagged) return placeholder("All decided", "Every flagged row has a decision. Export them, or look through the other rows.", all);
    if (asked.show === "decided" && plain) return placeholder("Nothing decided yet", `${labels.given ? "Keep, relabel" : "Keep"} or remove rows, and they are listed here.`);
    if (asked.show === "flagged" && plain && !(tally?.flagged > 0)) return placeholder("No row is flagged", `The audit found no ${labels.given ? labels.name : "row"} to doubt.`, all);
    return placeholder("No row passes the filter", study.classes === null ? "Show all rows." : "Choose other classes, or show all rows.", asked.show !== "all" && all);
  }

  function reload() {
    fill(state);
    place = 0;
    wait();
    recount();
    return grid.load();
  }

  /** The counts as the server knows them, once it knows every decision of this tab. */
  async function recount() {
    const round = ++asking;
    try {
      const { progress: found, total } = await get("suspects", { show: "undecided", limit: 1 });
      if (round !== asking) return;
      stale = decisions.queue.length > 0;
      if (stale && tally !== null) return;
      // A report holds all decided rows, but not all flagged ones, and says itself how many of both there are.
      tally = { ...found, settled: found.settled ?? found.flagged - total };
      drawProgress();
    } catch { /* the list tells why the server does not answer */ }
  }

  function drawProgress() {
    const { flagged, decided: all, settled, kept: keep, relabelled, removed } = tally;
    const others = all - settled;
    const words = flagged === 0 ? "No row is flagged" : [h("b", {}, count(settled)), ` of ${count(flagged)} flagged decided`];
    const done = h("i");
    done.style.width = `${(settled / Math.max(flagged, 1)) * 100}%`;
    fill(progress,
      h("div", { class: "progress-words" },
        h("span", {}, words, others > 0 && ` · ${many(others, "other row")} decided`),
        h("span", { class: "tally" },
          h("span", { class: "keep" }, `${count(keep)} kept`), h("span", { class: "relabel" }, `${count(relabelled)} relabelled`), h("span", { class: "remove" }, `${count(removed)} removed`))),
      h("div", { class: "progress-bar", role: "progressbar", "aria-label": "Flagged rows that are decided", "aria-valuemin": "0", "aria-valuemax": String(Math.max(flagged, 1)), "aria-valuenow": String(settled) }, done));
  }

  function drawTile(item, tile) {
    const decision = decisions.of(item.row);
    tile.className = `tile suspect ${decision?.action ?? ""}`;
    fill(tile,
      faceOf(item.face),
      h("div", { class: "tile-labels" },
        item.given !== null && h("span", { class: "given" }, named(item.given)),
        item.suggested !== null && h("span", { class: "arrow", "aria-hidden": "true" }, "→"),
        item.suggested !== null && h("b", {}, named(item.suggested))),
      h("div", { class: "tile-foot" }, decision === null
        ? [bar(item.score, item.flagged ? "flagged" : ""), h("span", { class: "score" }, item.score.toFixed(3))]
        : h("span", { class: `badge ${decision.action}` }, decided(decision))));
    tile.setAttribute("aria-label", [
      `Training row ${item.row}`, item.given !== null && `given ${named(item.given)}`, item.suggested !== null && `suggested ${named(item.suggested)}`,
      `score ${item.score.toFixed(3)}`, decision !== null && decided(decision)].filter(Boolean).join(", "));
  }

  function drawPanel() {
    if (current === null && waiting) return waitingPanel(panel, { place, close });
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
    if (item.given === null && (action === "label" || action === "relabel")) return;
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
    shift(item.row, before, entry);
    const note = toast(`Row ${item.row}: ${decided(entry)}`, { action: { name: "Undo", run: () => undo(entry) }, seconds: 5, instead: "decision" });
    notice = { entry, note };
    say(`Row ${item.row} ${decided(entry)}`);
    if (item === current) step(1);
  }

  /** Take back a decision of this tab, the last one unless given; where it made none, that of the row that is shown. */
  function undo(entry = decisions.last()) {
    const row = entry?.row ?? current?.row;
    if (row === undefined) return toast("Nothing to undo.", { seconds: 3, instead: "decision" });
    const before = decisions.of(row);
    const sent = entry === undefined ? decisions.undoRow(row) : decisions.undo(entry);
    if (sent === null) {
      const why = entry === undefined ? `Nothing to undo: this tab decided nothing, and row ${row} has no decision.` : `Row ${row}: your decision does not stand any more, so that there is nothing to undo.`;
      return toast(why, { seconds: 5, instead: "decision" });
    }
    shift(row, before, decisions.of(row));
    const at = grid.items.findIndex((item) => item?.row === row);
    if (at >= 0) grid.select(at, { focus: !panel.contains(document.activeElement) && element.dataset.open !== "true" });
    notice = { entry: sent, note: toast(`Row ${row}: undone`, { seconds: 4, instead: "decision" }) };
    return say(`Row ${row} undone`);
  }

  /** The counts, before the server tells them anew. */
  function shift(row, from, to) {
    stale = true;
    if (tally === null) return;
    const names = { keep: "kept", relabel: "relabelled", remove: "removed" };
    const flagged = grid.items.find((item) => item?.row === row)?.flagged ? 1 : 0;
    if (from) { tally[names[from.action]]--; tally.decided--; tally.settled -= flagged; }
    if (to) { tally[names[to.action]]++; tally.decided++; tally.settled += flagged; }
    drawProgress();
  }

  function changed({ detail }) {
    grid.redraw((item) => detail.rows.includes(item.row));
    if (current !== null && detail.rows.includes(current.row)) drawPanel();
    if (detail.others) recount();
  }

  function drawState() {
    if (isReport) return;
    saved.draw();
    if (stale && decisions.queue.length === 0) { stale = false; recount(); }
  }

  /** A decision was not taken: what told it as taken goes. */
  function refused({ detail }) {
    if (notice !== null && detail.entries.includes(notice.entry)) notice.note.remove();
    stale = true;
  }

  const listeners = { change: changed, state: drawState, conflict: refused, refused };
  for (const [name, run] of Object.entries(listeners)) decisions.addEventListener(name, run);

  const choose = segmented("Which rows", { flagged: "Flagged", undecided: "Undecided", decided: "Decided", all: "All" }, asked.show, (value) => { asked.show = value; reload(); });
  const classes = study.classes === null ? null : [[null, "any"], ...study.classes.map((name) => [name, named(name)])];
  const pick = (name, key) => classes && select(name, classes, asked[key], (value) => { asked[key] = value; reload(); });
  const element = h("div", { class: "audit", data: { open: "false" } },
    h("div", { class: "suspects" },
      h("div", { class: "bar-top" }, progress, !isReport && h("div", { class: "bar-end" }, saved.element, exportMenu(study, decisions))),
      h("div", { class: "filter-line" }, choose, pick("Given", "given"), pick("Suggested", "suggested"), told),
      isReport && study.held_suspects && h("p", { class: "held quiet-text" }, study.held_suspects),
      state, grid.element),
    panel);
  drawState();
  drawPanel();
  reload();
  const run = (action) => () => act(action);
  return {
    element,
    once: new Set(["k", "r", "x", "l", "u", "ctrl+z"]),
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

/** A key that is held on a button decides once. */
function once(event) {
  if (event.repeat && event.key === "Enter" && event.target.closest(".act") !== null) event.preventDefault();
}

