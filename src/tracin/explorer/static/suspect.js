// One suspect: what its label is and might be, what to do with it, and the evidence.

import { canExplain, isReport } from "./api.js";
import { addressOf, bar, cardOf, faceOf, labels } from "./cards.js";
import { fill, h, placeholder } from "./dom.js";
import { count, digits, named, spoken } from "./words.js";

/** Draw the panel of a suspect. */
export function suspectPanel(panel, { study, item, place, total, decision, act, step, close }) {
  const focused = focusedIn(panel);
  panel.dataset.act = "";
  fill(panel,
    h("div", { class: "panel-top" },
      h("button", { type: "button", class: "quiet only-narrow", data: { act: "close" }, on: { click: close } }, "← Grid"),
      h("h1", {}, `Training row ${item.row}`),
      h("span", { class: "panel-place" }, `${count(place + 1)} of ${count(total)}`),
      h("button", { type: "button", class: "icon", "aria-label": "Previous suspect", data: { act: "previous" }, disabled: place === 0, on: { click: () => step(-1) } }, "↑"),
      h("button", { type: "button", class: "icon", "aria-label": "Next suspect", data: { act: "next" }, disabled: place + 1 >= total, on: { click: () => step(1) } }, "↓")),
    h("div", { class: "panel-body" },
      h("div", { class: `subject ${item.face.kind}` }, faceOf(item.face, { large: true }), verdict(item)),
      !isReport && actions(study, item, decision, act),
      isReport && decision !== null && h("p", { class: "quiet-text" }, `Decision: ${decision.action}${decision.label === null || decision.label === undefined ? "" : ` to ${decision.label}`}`),
      evidence(item),
      signals(item),
      canExplain("train", item.row) && h("p", {}, h("a", { href: addressOf([["train", item.row]]) }, "Explain this row"))));
  if (focused) panel.querySelector(`[data-act="${focused}"]`)?.focus();
}

/** The panel while the suspect at a place is fetched: there is nothing to decide on. */
export function waitingPanel(panel, { place, close }) {
  panel.dataset.act = focusedIn(panel);
  fill(panel,
    h("div", { class: "panel-top only-narrow" }, h("button", { type: "button", class: "quiet", data: { act: "close" }, on: { click: close } }, "← Grid")),
    placeholder("Loading", `Place ${count(place + 1)} in the list is on its way.`));
}

/** Which button has the focus, or had it before the wait. */
function focusedIn(panel) {
  if (panel.contains(document.activeElement)) return document.activeElement.dataset.act ?? "";
  return document.activeElement === document.body ? panel.dataset.act ?? "" : "";
}

function verdict(item) {
  return h("div", { class: "verdict" },
    item.given !== null && h("dl", { class: "from-to" },
      h("div", {}, h("dt", {}, "given"), h("dd", { class: "given" }, named(item.given))),
      item.suggested !== null && h("div", {}, h("dt", {}, "suggested"), h("dd", { class: "suggested" }, named(item.suggested)))),
    h("div", { class: "verdict-score" },
      h("span", {}, "score ", h("b", {}, item.score.toFixed(3))), bar(item.score, item.flagged ? "flagged" : ""),
      h("span", { class: "quiet-text" }, `rank ${count(item.rank)}`, item.flagged && " · flagged")));
}

function actions(study, item, decision, act) {
  const relabelled = decision?.action === "relabel";
  const suggestion = study.classes === null ? item.target : item.suggested;
  const toSuggestion = relabelled && decision.label === suggestion;
  const button = (name, key, action, words, pressed, usable = true) => h("button", {
    type: "button", class: `act ${name}${action === "keep" || action === "relabel" ? " large" : ""}`, "aria-pressed": String(pressed), "aria-keyshortcuts": key, data: { act: action }, disabled: !usable, on: { click: () => act(action) },
  }, h("span", {}, words), h("kbd", { "aria-hidden": "true" }, key));
  const canRelabel = item.given !== null;
  return h("div", { class: "acts", role: "group", "aria-label": "Decide" },
    button("keep", "K", "keep", item.given === null ? "Keep" : `Keep ${named(item.given)}`, decision?.action === "keep"),
    canRelabel && item.suggested !== null && button("relabel", "R", "relabel", `Relabel as ${named(item.suggested)}`, toSuggestion),
    canRelabel && button("relabel", "L", "label", relabelled && !toSuggestion ? `Label ${named(String(decision.label))}` : "Label…", relabelled && !toSuggestion),
    button("remove", "X", "remove", "Remove", decision?.action === "remove"),
    button("undo", "U", "undo", "Undo", false));
}

function evidence(item) {
  const { opponents, proponents, duplicates, looked } = item.evidence;
  const largest = Math.max(...[...opponents, ...proponents].map((card) => Math.abs(card.score)), 0);
  const row = (title, kind, words, cards) => cards.length > 0 && h("section", { class: `cards-row small ${kind}`, "aria-label": title },
    h("h2", {}, title, h("span", {}, words)),
    h("div", { class: `cards ${cards[0].face.kind}` }, cards.map((card) => cardOf(card, { largest }))));
  const none = looked === false && opponents.length + proponents.length === 0;
  const unlabelled = item.given === null;
  return [
    row("Opponents", "opponent", unlabelled ? "training on them raised its loss" : `speak against the given ${labels.name}`, opponents),
    row("Proponents", "proponent", unlabelled ? "training on them lowered it" : "speak for it", proponents),
    row("Near-duplicates", "twin", unlabelled ? "look the same" : `look the same, with another ${labels.name}`, duplicates),
    none && h("p", { class: "quiet-text" }, "Evidence was looked for only among the most suspect rows. Explain this row to see its proponents and opponents."),
  ];
}

function signals(item) {
  const names = Object.keys(item.signals);
  return names.length > 0 && h("section", { class: "signals" },
    h("h2", {}, "Signals"),
    h("dl", {}, names.map((name) => h("div", {}, h("dt", {}, spoken(name)), h("dd", {}, name.includes("rank") ? count(item.signals[name] ?? 0) : digits(item.signals[name]))))));
}

