// The routes: #/explain/side/row/side/row…, #/audit, #/trust.

import { get, isReport } from "./api.js";
import { auditPage } from "./audit.js";
import { labels } from "./cards.js";
import { Decisions } from "./decisions.js";
import { failure, fill, typing } from "./dom.js";
import { explainPage } from "./explain.js";
import { keysDialog } from "./menus.js";
import { trustPage } from "./trust.js";
import { tellUnsent } from "./unsent.js";
import { count } from "./words.js";

const main = document.getElementById("main");
const kept = {};
let study = null;
let decisions = null;
let open = { name: null, page: null };

/** The pairs `[side, row]` of an address. */
function trailOf(parts) {
  const trail = [];
  for (let at = 0; at + 1 < parts.length; at += 2) trail.push([parts[at], decodeURIComponent(parts[at + 1])]);
  return trail;
}

function route() {
  const [name, ...rest] = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean);
  const wanted = ["explain", "audit", "trust"].includes(name) ? name : "explain";
  if (open.name !== wanted) {
    open.page?.close();
    for (const note of document.querySelectorAll(".toast:not(.error)")) note.remove();
    const make = { explain: () => explainPage(study, kept), audit: () => auditPage(study, kept, decisions), trust: () => trustPage(study) }[wanted];
    open = { name: wanted, page: make() };
    fill(main, open.page.element);
    document.body.dataset.page = wanted;
    document.title = `${{ explain: "Explain", audit: "Audit", trust: "Trust" }[wanted]} · ${study.title}`;
    for (const link of document.querySelectorAll("nav[aria-label=Pages] a")) {
      if (link.getAttribute("href") === `#/${wanted}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }
  open.page.show?.(trailOf(rest));
}

function pressed(event) {
  if (event.defaultPrevented || event.altKey || event.isComposing || typing(event)) return;
  const key = event.ctrlKey || event.metaKey ? `ctrl+${event.key.toLowerCase()}` : event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const pages = { 1: "#/explain", 2: "#/audit", 3: "#/trust" };
  // Arrows belong to what has the focus: a tab list, a list of its own, a scrolled table.
  const free = !key.startsWith("Arrow") || event.target === document.body || event.target.closest(".panel, #main") === main;
  // A key that is held moves on, but decides once.
  if (event.repeat && open.page?.once?.has(key)) { event.preventDefault(); return; }
  const run = open.page?.keys?.[key] ?? { "?": keysOf, b: () => document.querySelector("a.back")?.click() }[key];
  if (key in pages) location.hash = pages[key];
  else if (run !== undefined && free) { event.preventDefault(); run(); }
}

function keysOf() {
  keysDialog({ decides: !isReport, labelled: labels.given });
}

async function begin() {
  try {
    study = await get("study");
  } catch (error) {
    fill(main, failure(error, begin));
    return;
  }
  Object.assign(labels, { areClasses: study.classes !== null, name: study.classes === null ? "target" : "label" });
  document.getElementById("title").textContent = study.title;
  decisions = new Decisions(study);
  tellUnsent(decisions);
  window.addEventListener("hashchange", route);
  document.addEventListener("keydown", pressed);
  document.getElementById("keys").addEventListener("click", keysOf);
  document.getElementById("skip").addEventListener("click", () => main.focus());
  route();
  decisions.start();
  get("suspects", { show: "all", limit: 1 }).then(({ progress, items: [first] }) => {
    labels.given = first === undefined || first.given !== null;
    const badge = document.getElementById("flagged");
    badge.textContent = count(progress.flagged);
    badge.hidden = progress.flagged === 0;
  }).catch(() => {});
}

begin();
