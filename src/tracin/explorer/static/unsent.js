// What is not saved yet and what was not taken, told on every page.

import { isReport } from "./api.js";
import { fill, h, toast } from "./dom.js";
import { count, decided, many } from "./words.js";

/** Tell on every page how sending goes, in the strip under the head of the page, and what was refused. */
export function tellUnsent(decisions) {
  const strip = document.getElementById("unsent");
  let told = "";
  decisions.addEventListener("state", () => {
    const { kind, text, button, run } = stateOf(decisions);
    if (told === `${kind} ${text}`) return;
    told = `${kind} ${text}`;
    strip.className = `unsent ${kind}`;
    strip.hidden = text === "";
    // Only a failure interrupts a screen reader.
    fill(strip, h("span", { role: kind === "failing" ? "alert" : null }, text), button && h("button", { type: "button", on: { click: run } }, button));
  });
  decisions.addEventListener("conflict", ({ detail: { row, kind, decision } }) => {
    const theirs = decision === null ? "it took its decision back" : decided(decision);
    toast(`Another tab decided on row ${row} meanwhile: ${theirs}. That newer decision is shown; yours was ${kind === "undo" ? "not taken back" : "not taken"}.`, { kind: "error" });
  });
  decisions.addEventListener("refused", ({ detail: { row, kind, message } }) => {
    toast(`Row ${row} was not ${kind === "undo" ? "undone" : "decided"}: ${message}`, { kind: "error" });
  });
}

function stateOf(decisions) {
  const waiting = decisions.queue.length;
  if (decisions.elsewhere) {
    const kept = waiting === 0 ? "" : ` ${waiting === 1 ? "One decision waits" : `${count(waiting)} decisions wait`} in this tab until the earlier study is served here again.`;
    return { kind: "failing", text: `Another study is served here now; reload.${kept}`, button: "Reload", run: () => decisions.reload() };
  }
  if (waiting === 0) return { kind: "", text: "" };
  if (decisions.failures > 0) return { kind: "failing", text: `${many(waiting, "decision")} not saved yet. ${decisions.error.message}`, button: "Try now", run: () => decisions.retry() };
  return { kind: "sending", text: `Saving ${many(waiting, "decision")}…` };
}

/** The state of saving in few words, for the page that decides. Answers `{element, draw}`. */
export function savedMark(decisions) {
  const element = h("div", { class: "saved" });
  const draw = () => {
    const waiting = decisions.queue.length;
    const failing = decisions.elsewhere || (waiting > 0 && decisions.failures > 0);
    element.className = `saved ${failing ? "failing" : waiting > 0 ? "busy-state" : "good"}`;
    fill(element, failing ? (waiting > 0 ? `${count(waiting)} not saved` : "Not saving") : waiting > 0 ? `Saving ${count(waiting)}…` : "All saved");
  };
  if (!isReport) draw();
  return { element, draw };
}
