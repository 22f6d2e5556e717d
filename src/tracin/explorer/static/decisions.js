// Decisions on their way to the server: shown at once, sent one after the other, repeated until they are answered.
//
// A decision carries an id that the page makes, so that sending it twice counts once. What is not answered yet is also
// kept in the tab's session, so that a reload sends it again.

import { get, isReport, post } from "./api.js";

const STORE = "tracin-unsent";
const POLL = 2500;
const WAITS = [1, 2, 4, 8, 15];

/** Events: `change` (rows whose decision changed), `state` (how sending goes), `conflict`, `refused`. */
export class Decisions extends EventTarget {
  constructor() {
    super();
    this.now = new Map(); // row -> decision as the server knows it, null after an undo
    this.stamps = new Map(); // row -> last entry of the log that this tab wrote on it: what is older is not news
    this.queue = recall();
    this.mine = this.queue.filter((entry) => entry.kind === "decide"); // what this tab decided, in order: {row, id, seq}
    this.seq = 0;
    this.failures = 0;
    this.sending = false;
    this.timers = {};
    this.stopped = false;
    window.addEventListener("beforeunload", (event) => { if (this.queue.length > 0) event.preventDefault(); });
    window.addEventListener("online", () => this.retry());
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.poll(); });
  }

  /** Begin to send what an earlier load left, and to listen for other tabs. */
  start() {
    if (isReport || this.started) return;
    this.started = true;
    this.send();
    this.poll();
  }

  /** Take in what an answer shows of rows, unless something newer is known. */
  learn(items) {
    for (const { row, decision } of items) {
      const known = this.now.get(row);
      const newer = decision !== null && decision.seq > Math.max(known?.seq ?? 0, this.stamps.get(row) ?? 0);
      if (known === undefined || newer) this.now.set(row, decision);
    }
  }

  /** The decision of a row as the page shows it: what waits to be sent counts already. */
  of(row) {
    for (let at = this.queue.length - 1; at >= 0; at--) {
      const waiting = this.queue[at];
      if (waiting.row !== row) continue;
      if (waiting.kind === "undo") return waiting.back ?? null;
      return { action: waiting.action, label: waiting.label, seq: null };
    }
    return this.now.get(row) ?? null;
  }

  /** Decide on a row. */
  decide(row, action, label = null) {
    const before = this.of(row);
    const entry = { kind: "decide", id: crypto.randomUUID?.() ?? madeId(), row, action, label, before };
    // What the page showed; behind a decision that is still on its way, that one's answer.
    if (!this.queue.some((waiting) => waiting.row === row)) entry.seen = before?.seq ?? null;
    this.mine.push(entry);
    this.add(entry);
    return entry;
  }

  /** Take back the last decision of this tab, else the given row's; answers the row, null where there is none. */
  undo(row = null) {
    let target = this.mine.pop();
    if (target === undefined && row !== null && this.of(row) !== null) target = { row, seq: this.of(row).seq, before: null };
    if (target === undefined) return null;
    this.add({ kind: "undo", id: crypto.randomUUID?.() ?? madeId(), row: target.row, of: target.id ?? null, seq: target.seq ?? null, back: target.before });
    return target.row;
  }

  add(entry) {
    this.queue.push(entry);
    this.keep();
    this.emit("change", { rows: [entry.row] });
    this.emit("state");
    this.send();
  }

  /** Send again now. */
  retry() {
    clearTimeout(this.timers.send);
    this.send();
  }

  async send() {
    if (this.sending) return;
    this.sending = true;
    clearTimeout(this.timers.send);
    while (this.queue.length > 0 && !this.stopped) {
      const entry = this.queue[0];
      try {
        await this.one(entry);
        this.failures = 0;
      } catch (error) {
        if (this.settled(error, entry)) continue;
        this.failures++;
        this.error = error;
        const wait = WAITS[Math.min(this.failures, WAITS.length) - 1];
        this.timers.send = setTimeout(() => this.send(), wait * 1000);
        break;
      } finally {
        this.emit("state");
      }
    }
    this.sending = false;
    this.emit("state");
  }

  async one(entry) {
    const undo = entry.kind === "undo";
    if (undo && entry.seq === null) return this.done(entry); // the decision it takes back was never taken
    if (!undo && entry.seen === undefined) { entry.seen = this.now.get(entry.row)?.seq ?? null; this.keep(); }
    const answer = undo
      ? await post("decisions/undo", { id: entry.id, seq: entry.seq })
      : await post("decisions", { id: entry.id, row: entry.row, action: entry.action, label: entry.label, seen: entry.seen });
    this.now.set(entry.row, answer.decision);
    this.stamps.set(entry.row, answer.seq);
    if (!undo) {
      entry.seq = answer.seq;
      for (const later of this.queue) if (later.of === entry.id) later.seq = answer.seq;
    }
    return this.done(entry);
  }

  /** An answer that sending again would not change: the newer decision counts, or the server's words are shown. */
  settled(error, entry) {
    if (error.status === 0 || error.status >= 500 || error.status === 401 || error.status === 403 || error.status === 429) return false;
    const later = this.queue.filter((other) => other !== entry && other.row === entry.row);
    for (const gone of [entry, ...later]) this.drop(gone);
    if (error.status === 409) {
      const decision = error.body.decision ?? null;
      this.now.set(entry.row, decision);
      this.emit("conflict", { row: entry.row, decision, message: error.message });
    } else {
      this.emit("refused", { row: entry.row, message: error.message });
    }
    this.keep();
    this.emit("change", { rows: [entry.row] });
    return true;
  }

  drop(entry) {
    this.queue = this.queue.filter((other) => other !== entry);
    this.mine = this.mine.filter((other) => other !== entry);
  }

  done(entry) {
    this.queue = this.queue.filter((other) => other !== entry);
    this.keep();
    this.emit("change", { rows: [entry.row] });
  }

  async poll() {
    clearTimeout(this.timers.poll);
    if (isReport || this.stopped || !this.started) return;
    if (!document.hidden && !this.polling) {
      this.polling = true;
      try {
        const answer = await get("decisions", { since: this.seq });
        const { seq } = answer;
        const changes = answer.changes.filter(({ row }) => (this.stamps.get(row) ?? 0) <= seq);
        const rows = changes.filter(({ row, decision }) => this.differs(row, decision)).map(({ row }) => row);
        for (const { row, decision } of changes) this.now.set(row, decision);
        this.seq = Math.max(this.seq, seq);
        if (rows.length > 0) this.emit("change", { rows, others: true });
        this.away = 0;
      } catch {
        this.away = Math.min((this.away ?? 0) + 1, 8); // sending tells it when the server is away
      }
      this.polling = false;
    }
    this.timers.poll = setTimeout(() => this.poll(), POLL * (1 + (this.away ?? 0)));
  }

  differs(row, decision) {
    const known = this.now.get(row) ?? null;
    return (known?.seq ?? null) !== (decision?.seq ?? null);
  }

  emit(name, detail = {}) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  keep() {
    try {
      if (this.queue.length > 0) sessionStorage.setItem(STORE, JSON.stringify(this.queue));
      else sessionStorage.removeItem(STORE);
    } catch { /* a full or forbidden store: the queue lives on in this page */ }
  }
}

function recall() {
  if (isReport) return [];
  try {
    return JSON.parse(sessionStorage.getItem(STORE) ?? "[]");
  } catch {
    return [];
  }
}

/** An id where the page is not served from a place that browsers call secure. */
function madeId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
