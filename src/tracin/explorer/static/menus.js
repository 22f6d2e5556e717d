// Dialogs and menus: a label to choose, the export, the list of keys.

import { download } from "./api.js";
import { fill, h, toast } from "./dom.js";
import { many, named } from "./words.js";

/** Ask for a class, or for a number where there are none; answers null when the reader thinks better of it. */
export function chooseLabel(study, item) {
  return new Promise((resolve) => {
    const dialog = h("dialog", { class: "sheet choose", "aria-label": `A label for training row ${item.row}` });
    let answer = null;
    const take = (value) => { answer = value; dialog.close(); };
    dialog.addEventListener("close", () => { dialog.remove(); resolve(answer); });
    put(dialog, study.classes === null ? byNumber(item, take) : byName(study.classes, item, take));
    document.body.append(dialog);
    dialog.showModal();
  });
}

function put(dialog, content) {
  fill(dialog, h("h2", {}, "Choose the label"), content, h("div", { class: "buttons" }, h("button", { type: "button", class: "quiet", on: { click: () => dialog.close() } }, "Cancel")));
}

function byName(names, item, take) {
  const list = h("div", { class: "choices" });
  const search = h("input", { type: "search", "aria-label": "Class", placeholder: "Type to narrow, Enter takes the first", autocomplete: "off", spellcheck: "false" });
  const matching = () => {
    const words = search.value.trim().toLowerCase();
    const exact = names.filter((name) => name.toLowerCase() === words);
    const begins = names.filter((name) => name.toLowerCase().startsWith(words) && !exact.includes(name));
    const holds = names.filter((name) => name.toLowerCase().includes(words) && !begins.includes(name) && !exact.includes(name));
    return [...exact, ...begins, ...holds];
  };
  const draw = () => fill(list, matching().slice(0, 200).map((name) => h("button", {
    type: "button", class: name === item.suggested ? "suggested" : null, on: { click: () => take(name) },
  }, named(name), name === item.given && h("small", {}, "given"), name === item.suggested && h("small", {}, "suggested"))));
  search.addEventListener("input", draw);
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    const [first] = matching();
    if (first !== undefined && search.value.trim() !== "") take(first);
  });
  draw();
  return [search, list];
}

function byNumber(item, take) {
  const box = h("input", { type: "number", step: "any", "aria-label": "New target", value: item.target ?? item.suggested });
  const form = h("div", { class: "pair" }, box, h("button", { type: "button", class: "primary", on: { click: () => done() } }, "Relabel"));
  const done = () => { if (box.value !== "" && Number.isFinite(Number(box.value))) take(Number(box.value)); };
  box.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); done(); } });
  return form;
}

const FORMATS = [
  ["csv", "CSV", "a table, one line per training row"],
  ["parquet", "Parquet", "the same table, typed"],
  ["json", "JSON", "the same, with the decisions"],
  ["cleanlab", "cleanlab", "is_label_issue, label_score, given and predicted label"],
  ["label-studio", "Label Studio", "tasks to import"],
];

/** The menu of downloads that the study can be given as. */
export function exportMenu(study, decisions) {
  const formats = FORMATS.filter(([format]) => study.exports?.includes(format) ?? true);
  if (formats.length === 0) return null;
  const menu = h("details", { class: "menu" },
    h("summary", {}, "Export"),
    h("ul", {}, formats.map(([format, name, words]) => h("li", {},
      h("button", { type: "button", on: { click: () => { menu.open = false; save(format, name, decisions); } } }, h("b", {}, name), h("span", {}, words))))));
  document.addEventListener("click", (event) => { if (!menu.contains(event.target)) menu.open = false; });
  menu.addEventListener("keydown", (event) => { if (event.key === "Escape" && menu.open) { menu.open = false; menu.querySelector("summary").focus(); event.stopPropagation(); } });
  return menu;
}

async function save(format, title, decisions) {
  try {
    const unsaved = decisions.queue.length;
    const { name, content } = await download("export", { format });
    const address = URL.createObjectURL(content);
    h("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
    if (unsaved > 0) toast(`${many(unsaved, "decision")} of this tab, not saved yet, may be missing in ${name}.`, { kind: "error" });
  } catch (error) {
    toast(`No ${title} file: ${error.message}`, { kind: "error" });
  }
}

const KEYS = {
  "On every page": [["1 2 3", "Explain, Audit, Trust"], ["?", "this list"], ["Tab", "on to the next part of the page"]],
  Explain: [["/", "search the rows"], ["↑ ↓ Home End", "along the list"], ["Enter", "explain the row or the card"], ["B", "back along the trail"]],
  Audit: [
    ["← ↑ → ↓", "from suspect to suspect"], ["N P", "next, previous"], ["K", "keep the given label"], ["R", "relabel as suggested"], ["L", "choose another label"],
    ["X", "remove the row"], ["U or Ctrl+Z", "undo the last decision"], ["Enter", "open the suspect on a narrow page"],
  ],
};

/** The list of keys, without those that this study or this report has no use for. */
export function keysDialog({ decides, labelled }) {
  const used = ([key]) => (decides || !["K", "R", "L", "X", "U or Ctrl+Z"].includes(key)) && (labelled || !["R", "L"].includes(key));
  const said = (words) => (labelled ? words : words.replace("keep the given label", "keep the row"));
  const dialog = h("dialog", { class: "sheet keys", "aria-label": "Keys" });
  fill(dialog, h("h2", {}, "Keys"),
    h("div", { class: "key-lists" }, Object.entries(KEYS).map(([title, keys]) => h("section", {},
      h("h3", {}, title),
      h("dl", {}, keys.filter(used).map(([key, words]) => h("div", {}, h("dt", {}, keyCaps(key)), h("dd", {}, said(words)))))))),
    h("div", { class: "buttons" }, h("button", { type: "button", class: "primary", on: { click: () => dialog.close() } }, "Close")));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

function keyCaps(text) {
  return text.split(" ").map((part) => (part === "or" ? " or " : h("kbd", {}, part)));
}
