// One suspect: what its label is and might be, what to do with it, and the evidence.

import { canExplain, isReport } from "./api.js";
import { addressOf, bar, cardOf, faceOf } from "./cards.js";
import { fill, h } from "./dom.js";
import { count, digits, minus, spoken } from "./words.js";

/** Draw the panel of a suspect. */
export function suspectPanel(panel, { study, item, place, total, decision, act, step, close }) {
  const focused = panel.contains(document.activeElement) ? document.activeElement.dataset.act : undefined;
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
  if (focused !== undefined) panel.querySelector(`[data-act="${focused}"]`)?.focus();
}

function verdict(item) {
  return h("div", { class: "verdict" },
    item.given !== null && h("dl", { class: "from-to" },
      h("div", {}, h("dt", {}, "given"), h("dd", { class: "given" }, minus(item.given))),
      item.suggested !== null && h("div", {}, h("dt", {}, "suggested"), h("dd", { class: "suggested" }, minus(item.suggested)))),
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
    button("keep", "K", "keep", item.given === null ? "Keep" : `Keep ${minus(item.given)}`, decision?.action === "keep"),
    canRelabel && item.suggested !== null && button("relabel", "R", "relabel", `Relabel as ${minus(item.suggested)}`, toSuggestion),
    canRelabel && button("relabel", "L", "label", relabelled && !toSuggestion ? `Label ${decision.label}` : "Label…", relabelled && !toSuggestion),
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
  return [
    row("Opponents", "opponent", "speak against the given label", opponents),
    row("Proponents", "proponent", "speak for it", proponents),
    row("Near-duplicates", "twin", "look the same, with another label", duplicates),
    none && h("p", { class: "quiet-text" }, "Evidence was looked for only among the most suspect rows. Explain this row to see its proponents and opponents."),
  ];
}

function signals(item) {
  const names = Object.keys(item.signals);
  return names.length > 0 && h("section", { class: "signals" },
    h("h2", {}, "Signals"),
    h("dl", {}, names.map((name) => h("div", {}, h("dt", {}, spoken(name)), h("dd", {}, name.includes("rank") ? count(item.signals[name] ?? 0) : digits(item.signals[name]))))));
}

