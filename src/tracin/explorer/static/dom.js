// Elements from data. Text enters the page through text nodes alone, so that a row's markup stays text.

import { capital } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";

/** An element. Keys of `options`: `on` (listeners), `data` (data-*), `set` (properties); all others are attributes. */
export function h(name, options = {}, ...children) {
  return filled(document.createElement(name), options, children);
}

/** An SVG element; see `h`. */
export function s(name, options = {}, ...children) {
  return filled(document.createElementNS(SVG, name), options, children);
}

function filled(element, options, children) {
  for (const [key, value] of Object.entries(options)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [event, run] of Object.entries(value)) element.addEventListener(event, run);
    else if (key === "data") Object.assign(element.dataset, value);
    else if (key === "set") Object.assign(element, value);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  put(element, children);
  return element;
}

/** Append children: elements, texts and numbers, lists of them; null and false are nothing. */
export function put(element, children) {
  for (const child of [children].flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

/** Replace what an element holds. */
export function fill(element, ...children) {
  element.replaceChildren();
  return put(element, children);
}

/** Say something to a screen reader. */
export function say(text) {
  document.getElementById("polite").textContent = text;
}

/** A choice of a few words as buttons of which one is pressed. */
export function segmented(label, choices, chosen, onChoose) {
  const group = h("div", { class: "segmented", role: "group", "aria-label": label });
  const buttons = Object.entries(choices).map(([value, text]) =>
    h("button", {
      type: "button",
      data: { value },
      "aria-pressed": value === chosen ? "true" : "false",
      on: { click: () => { mark(value); onChoose(value); } },
    }, text),
  );
  function mark(value) {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.value === value));
  }
  group.mark = mark;
  return put(group, buttons);
}

/** A labelled list to choose from; `choices` are `[value, text]`. Options go by their place, as values can be empty. */
export function select(label, choices, chosen, onChoose) {
  const box = h("select", { "aria-label": label, on: { change: () => onChoose(choices[box.selectedIndex][0]) } },
    choices.map(([value, text], at) => h("option", { value: `choice-${at}`, selected: value === chosen }, text)));
  return h("label", { class: "field" }, h("span", {}, label), box);
}

/** A message over the page, with a way to act on it; it goes away by itself unless it is an error. It takes the place of
 * an older one about the same (`instead`). */
export function toast(text, { action = null, kind = "plain", seconds = 6, instead = null } = {}) {
  const box = document.getElementById("toasts");
  const close = () => note.remove();
  const note = h("div", { class: `toast ${kind}`, role: kind === "error" ? "alert" : null },
    h("span", {}, text),
    action && h("button", { type: "button", on: { click: () => { close(); action.run(); } } }, action.name),
    h("button", { type: "button", class: "close", "aria-label": "Close", on: { click: close } }, "×"));
  if (instead !== null) note.dataset.about = instead;
  for (const old of [...box.children]) if (instead !== null && old.dataset.about === instead) old.remove();
  for (const old of [...box.children].slice(0, -2)) old.remove();
  box.append(note);
  if (kind !== "error") setTimeout(close, seconds * 1000);
  return note;
}

/** What stands where nothing can: a heading, a sentence, and perhaps a way on. */
export function placeholder(title, text, ...actions) {
  return h("div", { class: "placeholder" }, h("p", { class: "placeholder-title" }, title), text && h("p", {}, text), actions);
}

/** A failure in words, with a way to try again. */
export function failure(error, again) {
  const title = error.status === 0 ? "No connection" : error.status < 500 ? "Not available" : "That did not work";
  const lasting = error.status >= 400 && error.status < 500; // asking again would be answered the same
  return h("div", { class: `placeholder${lasting ? "" : " failure"}`, role: "alert" },
    h("p", { class: "placeholder-title" }, title),
    h("p", {}, capital(error.message)),
    again && !lasting && h("button", { type: "button", on: { click: again } }, "Try again"));
}

/** Whether keys belong to a field or a dialog just now. */
export function typing(event) {
  const at = event.target;
  return document.querySelector("dialog[open]") !== null ||
    (at instanceof HTMLElement && (at.isContentEditable || /^(INPUT|SELECT|TEXTAREA)$/.test(at.tagName)));
}
