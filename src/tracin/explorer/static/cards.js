// A row as something to look at: its face, and a card around it.

import { canExplain, picture } from "./api.js";
import { h } from "./dom.js";
import { digits, named, percent, signed } from "./words.js";

/** Whether labels are classes, so that a prediction can be wrong; what they are called; and whether rows have any. */
export const labels = { areClasses: true, name: "label", given: true };

/** Whether a row is predicted otherwise than it is labelled. */
export function isWrong(card) {
  return labels.areClasses && card.label !== null && card.predicted !== null && card.predicted !== card.label;
}

/** What a row looks like: picture, text or table. `large` shows all of it. */
export function faceOf(face, { large = false } = {}) {
  if (face.kind === "image") {
    const image = h("img", { src: picture(face.src), alt: large ? face.alt : "", draggable: "false", decoding: "async", class: face.pixels ? "pixels" : null });
    return h("div", { class: `face image${large ? " large" : ""}` }, image);
  }
  const inside = face.kind === "table"
    ? h("dl", {}, face.rows.map(([key, value]) => h("div", {}, h("dt", {}, key), h("dd", {}, value))))
    : h("p", {}, face.text);
  return h("div", { class: `face words${large ? " large" : ""}`, tabindex: large ? "0" : null, role: large ? "group" : null, "aria-label": large ? "The row" : null }, inside);
}

/** The first words of a row, for a line of a list. */
export function snippet(face, length = 120) {
  if (face.kind === "image") return "";
  const text = face.kind === "text" ? face.text : face.rows.map(([key, value]) => `${key} ${value}`).join(" · ");
  return text.slice(0, length);
}

/** "Test row 17". */
export function nameOf(side, row) {
  return side === "upload" ? "Your example" : `${side === "train" ? "Training" : "Test"} row ${row}`;
}

/** Where a row is explained, along the trail that led there: pairs `[side, row]`. */
export function addressOf(trail) {
  return `#/explain/${trail.slice(-8).map(([side, row]) => `${side}/${encodeURIComponent(row)}`).join("/")}`;
}

/** A bar that fills a share of its width. */
export function bar(share, kind = "") {
  const inside = h("i");
  inside.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return h("span", { class: `bar ${kind}`, "aria-hidden": "true" }, inside);
}

/** The class of a sign's colour. */
export function signOf(score) {
  return score > 0 ? "proponent" : score < 0 ? "opponent" : "neutral";
}

/** A card of a training row that leads to its own explanation; `largest` is the score of a full bar. */
export function cardOf(card, { largest = null, trail = [] } = {}) {
  const open = canExplain(card.side, card.row);
  const differs = isWrong(card);
  const said = [
    nameOf(card.side, card.row),
    card.label === null ? null : `${labels.name} ${card.label}`,
    differs ? `predicted ${card.predicted}` : null,
    card.score === null ? null : `score ${signed(card.score)}`,
  ].filter(Boolean).join(", ");
  return h(open ? "a" : "div", {
    class: `card ${card.face.kind} ${card.score === null ? "" : signOf(card.score)}${String(card.label).length > 4 ? " long" : ""}`,
    href: open ? addressOf([...trail, [card.side, card.row]]) : null,
    "aria-label": open ? `${said}. Explain this row` : null,
    data: { row: card.row },
  },
  faceOf(card.face),
  card.score !== null && bar(largest ? Math.abs(card.score) / largest : 0),
  h("span", { class: "card-line" },
    card.score !== null && h("b", { class: "score" }, signed(card.score)),
    h("span", { class: "row" }, `row ${card.row}`)),
  card.label !== null && h("span", { class: "card-label" }, h("span", { class: "what" }, `${labels.name} `), named(card.label)),
  differs && h("span", { class: "card-label differs" }, h("span", { class: "what" }, "predicted "), named(card.predicted)));
}

/** Label and prediction of an explained row in words, as terms. */
export function facts(card, loss = null) {
  const term = (key, value, kind = null) => h("div", { class: kind }, h("dt", {}, key), h("dd", {}, value));
  return h("dl", { class: "facts" },
    card.predicted !== null && term("predicted", named(card.predicted), isWrong(card) ? "wrong" : null),
    card.label !== null && term(labels.name, named(card.label)),
    card.confidence !== null && term("confidence", percent(card.confidence)),
    loss !== null && term("loss", digits(loss)));
}
