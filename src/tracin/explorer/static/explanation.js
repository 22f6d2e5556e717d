// The explanation of one row: what it is, and for each target its proponents, opponents and the path of its loss.

import { get, isReport } from "./api.js";
import { cardOf, faceOf, facts, isWrong, nameOf } from "./cards.js";
import { lossChart } from "./chart.js";
import { fill, h, say, select, toast } from "./dom.js";
import { signed } from "./words.js";

const FEW = 5;
const MOST = 50;

/** Ask for the explanation of a row and show it in `into`. */
export async function explanation({ study, side, row, trail, head, into, signal, ready }) {
  const ask = (more) => get(`explain/${side}/${encodeURIComponent(row)}`, more, signal);
  const found = await ask({ k: FEW });
  ready();
  const panel = h("div", { class: "target" });
  const state = { found, at: 0, k: FEW, ask, trail, asked: null };
  const tabs = targetTabs(state, panel);
  fill(into, head, header(found.query, side, row), h("div", { class: "asking" }, tabs.element, otherClass(study, state, tabs)), panel);
  tabs.choose(0);
  say(`${nameOf(side, row)} explained.`);
}

function header(query, side, row) {
  const wrong = isWrong(query);
  return h("header", { class: `query ${query.face.kind}` },
    faceOf(query.face, { large: true }),
    h("div", { class: "query-words" },
      h("h1", {}, nameOf(side, row), wrong && h("span", { class: "chip wrong" }, side === "train" ? "predicted otherwise" : "wrong")),
      facts(query, query.loss ?? null)));
}

/** Tabs, one for each target; a single target is a heading. */
function targetTabs(state, panel) {
  const element = h("div", { class: "tabs" });
  function draw() {
    const targets = state.found.targets;
    element.setAttribute("role", targets.length > 1 ? "tablist" : "group");
    element.setAttribute("aria-label", "What is explained");
    panel.id = "target";
    if (targets.length === 1) {
      panel.removeAttribute("role");
      panel.removeAttribute("aria-labelledby");
      return fill(element, h("h2", { class: "lone" }, question(targets[0], state.found.query)));
    }
    panel.setAttribute("role", "tabpanel");
    return fill(element, targets.map((target, at) => h("button", {
      type: "button", role: "tab", id: `tab-${at}`, "aria-controls": "target",
      on: { click: () => choose(at), keydown: (event) => moved(event, at) },
    }, question(target, state.found.query))));
  }
  function moved(event, at) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    const next = (at + by + state.found.targets.length) % state.found.targets.length;
    choose(next);
    element.children[next].focus();
  }
  function choose(at) {
    state.at = at;
    [...element.children].forEach((tab, number) => {
      if (tab.getAttribute("role") !== "tab") return;
      tab.setAttribute("aria-selected", String(number === at));
      tab.tabIndex = number === at ? 0 : -1;
    });
    if (state.found.targets.length > 1) panel.setAttribute("aria-labelledby", `tab-${at}`);
    drawTarget(state, panel);
  }
  draw();
  return { element, choose, draw };
}

function question(target, query) {
  if (target.kind === "predicted") return query.label !== null && query.label !== target.name ? `What taught ${target.name}` : `Why ${target.name}`;
  if (target.kind === "label") return target.name === null ? "What moved its loss" : query.predicted === target.name ? `Why ${target.name}` : `What spoke for ${target.name}`;
  return `What about ${target.name}`;
}

/** Another class to ask about, where the server can compute it. */
function otherClass(study, state, tabs) {
  if (isReport || !study.live || study.classes === null) return null;
  const known = state.found.targets.map((target) => target.name);
  const first = state.found.targets;
  const box = select("Another class", [[null, "choose…"], ...study.classes.filter((name) => name !== "" && !known.includes(name)).map((name) => [name, name])], null, async (name) => {
    box.classList.add("working");
    try {
      const more = name === null ? [] : (await state.ask({ k: MOST, target: name })).targets;
      state.found = { ...state.found, targets: [...first, ...more] };
      tabs.draw();
      tabs.choose(state.found.targets.length - 1);
    } catch (error) {
      if (error.name !== "AbortError") toast(error.message, { kind: "error" });
    }
    box.classList.remove("working");
  });
  return box;
}

function drawTarget(state, panel) {
  const target = state.found.targets[state.at];
  const shown = { ...target, proponents: target.proponents.slice(0, state.k), opponents: target.opponents.slice(0, state.k) };
  const largest = Math.max(...[...shown.proponents, ...shown.opponents].map((card) => Math.abs(card.score)), 0);
  const row = (title, kind, meaning, cards) => h("section", { class: `cards-row ${kind}`, "aria-label": title },
    h("h3", {}, title, h("span", {}, meaning)),
    cards.length ? h("div", { class: `cards ${cards[0].face.kind}` }, cards.map((card) => cardOf(card, { largest, trail: state.trail })))
      : h("p", { class: "quiet-text" }, "No training row has a score of this sign."));
  fill(panel,
    h("div", { class: "sides" },
      h("p", { class: "about" }, `Explained is the loss of ${target.words}.`, target.own !== null && target.own !== undefined && ` Its own share is ${signed(target.own)}.`),
      row("Proponents", "proponent", "training on them lowered this loss", shown.proponents),
      row("Opponents", "opponent", "training on them raised it", shown.opponents),
      more(state, panel, target, shown)),
    h("aside", { class: "path", "aria-label": "The loss along training" }, h("h3", {}, "The loss along training"), lossChart(target.path, target.words)));
}

function more(state, panel, target, shown) {
  const full = Math.max(shown.proponents.length, shown.opponents.length) >= state.k && state.k < MOST;
  if (!full || (isReport && Math.max(target.proponents.length, target.opponents.length) <= state.k && state.whole)) return null;
  const button = h("button", { type: "button", class: "more", on: { click: async () => {
    button.disabled = true;
    const k = Math.min(MOST, state.k * 2);
    try {
      if (Math.max(target.proponents.length, target.opponents.length) < k && target.kind !== "class") {
        const whole = await state.ask({ k });
        state.found = { ...state.found, targets: [...whole.targets, ...state.found.targets.slice(whole.targets.length)] };
      }
      const longest = Math.max(...[target, state.found.targets[state.at]].flatMap((each) => [each.proponents.length, each.opponents.length]));
      state.whole = longest < k;
      state.k = k;
      drawTarget(state, panel);
      panel.querySelector(".more")?.focus();
    } catch (error) {
      button.disabled = false;
      if (error.name !== "AbortError") toast(error.message, { kind: "error" });
    }
  } } }, "Show more rows");
  return button;
}
