// Decisions on their way to the server: shown at once, sent one after the other, repeated until they are answered.
//
// A decision carries an id that the page makes, so that sending it twice counts once, and the name of the log that it
// belongs to, so that no other study takes it. What is not answered yet is also kept in the tab's session, by that name,
// so that a reload sends it again.

import { get, isReport, post } from "./api.js";

const POLL = 2500;
const WAITS = [1, 2, 4, 8, 15];

/** Events: `change` (rows whose decision changed), `state` (how sending goes), `conflict`, `refused`. */
export class Decisions extends EventTarget {
  constructor(study) {
    super();
    this.log = study.log ?? null;
    this.now = new Map(); // row -> decision as the server knows it, null after an undo
    this.stamps = new Map(); // row -> last entry of the log that this tab wrote on it: what is older is not news
    this.queue = isReport ? [] : recall(storeOf(this.log));
    const undone = new Set(this.queue.map((entry) => entry.of).filter(Boolean));
    this.mine = this.queue.filter((entry) => entry.kind === "decide" && !undone.has(entry.id)); // what this tab decided, in order
    this.seq = 0;
    this.failures = 0;
    this.sending = false;
    this.timers = {};
    this.elsewhere = false; // another study's log answers at this address
    this.leaving = false;
    window.addEventListener("beforeunload", (event) => { if (this.queue.length > 0 && !this.leaving) event.preventDefault(); });
    window.addEventListener("online", () => this.retry());
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.poll(); });
  }

  /** Begin to send what an earlier load left, and to listen for other tabs. */
  start() {
    if (isReport || this.started) return;
    this.started = true;
    this.emit("state");
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
    return this.add(entry);
  }

  /** The last decision of this tab. One that was not taken stays in its place, so that undo never means an earlier one. */
  last() {
    return this.mine.at(-1);
  }

  /** Take back a decision of this tab; answers what is sent for it, null where it does not stand any more. */
  undo(entry) {
    const latest = this.mine.findLast((other) => other.row === entry.row);
    if (latest !== entry) return null;
    this.mine = this.mine.filter((other) => other !== entry);
    return entry.refused ? null : this.takeBack({ row: entry.row, of: entry.id, seq: entry.seq ?? null, back: entry.before });
  }

  /** Take back the decision that a row shows, whoever made it; answers what is sent for it, null where it has none. */
  undoRow(row) {
    const shown = this.of(row);
    return shown === null ? null : this.takeBack({ row, of: null, seq: shown.seq, back: null });
  }

  takeBack(undo) {
    return this.add({ kind: "undo", id: crypto.randomUUID?.() ?? madeId(), ...undo });
  }

  add(entry) {
    this.queue.push(entry);
    this.keep();
    this.emit("change", { rows: [entry.row] });
    this.emit("state");
    this.send();
    return entry;
  }

  /** Send again now. */
  retry() {
    clearTimeout(this.timers.send);
    this.send();
  }

  async send() {
    if (this.sending || !this.started) return;
    this.sending = true;
    clearTimeout(this.timers.send);
    while (this.queue.length > 0 && !this.elsewhere) {
      const entry = this.queue[0];
      try {
        await this.one(entry);
        this.failures = 0;
      } catch (error) {
        if (this.isElsewhere(error.body) || this.settled(error, entry)) continue;
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
    const log = this.log ?? undefined;
    const answer = undo
      ? await post("decisions/undo", { id: entry.id, seq: entry.seq, log })
      : await post("decisions", { id: entry.id, row: entry.row, action: entry.action, label: entry.label, seen: entry.seen, log });
    this.now.set(entry.row, answer.decision);
    this.stamps.set(entry.row, answer.seq);
    if (!undo) {
      entry.seq = answer.seq;
      for (const later of this.queue) if (later.of === entry.id) later.seq = answer.seq;
    }
    return this.done(entry);
  }

  /** Whether an answer comes from another study's log. Nothing is sent to it; what waits stays in the tab's session. */
  isElsewhere(answer) {
    if (this.elsewhere || !("log" in (answer ?? {})) || answer.log === this.log) return this.elsewhere;
    this.elsewhere = true;
    this.emit("state");
    return true;
  }

  /** Load the page of the study that is served here now. */
  reload() {
    this.leaving = true;
    location.reload();
  }

  /** An answer that sending again would not change: the newer decision counts, or the server's words are shown. */
  settled(error, entry) {
    if (error.status === undefined || error.status === 0 || error.status >= 500 || [401, 403, 429].includes(error.status)) return false;
    const entries = this.queue.filter((other) => other.row === entry.row);
    for (const gone of entries) gone.refused = true;
    this.queue = this.queue.filter((other) => other.row !== entry.row);
    const detail = { row: entry.row, kind: entry.kind, entries, message: error.message };
    if (error.status === 409) {
      const decision = error.body.decision ?? null;
      this.now.set(entry.row, decision);
      this.emit("conflict", { ...detail, decision });
    } else {
      this.emit("refused", detail);
    }
    this.keep();
    this.emit("change", { rows: [entry.row] });
    return true;
  }

  done(entry) {
    this.queue = this.queue.filter((other) => other !== entry);
    this.keep();
    this.emit("change", { rows: [entry.row] });
  }

  async poll() {
    clearTimeout(this.timers.poll);
    if (isReport || this.elsewhere || !this.started) return;
    if (!document.hidden && !this.polling) {
      this.polling = true;
      try {
        await this.news();
        this.away = 0;
      } catch {
        this.away = Math.min((this.away ?? 0) + 1, 8); // sending tells it when the server is away
      }
      this.polling = false;
    }
    this.timers.poll = setTimeout(() => this.poll(), POLL * (1 + (this.away ?? 0)));
  }

  async news() {
    const answer = await get("decisions", { since: this.seq });
    // A server that was away, or whose log is shorter, may be another study's.
    if (this.away > 0 || answer.seq < this.seq) this.isElsewhere({ log: (await get("study")).log ?? null });
    if (this.isElsewhere(answer)) return;
    const { seq } = answer;
    const changes = answer.changes.filter(({ row }) => (this.stamps.get(row) ?? 0) <= seq);
    const rows = changes.filter(({ row, decision }) => this.differs(row, decision)).map(({ row }) => row);
    for (const { row, decision } of changes) this.now.set(row, decision);
    this.seq = Math.max(this.seq, seq);
    if (rows.length > 0) this.emit("change", { rows, others: true });
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
      if (this.queue.length > 0) sessionStorage.setItem(storeOf(this.log), JSON.stringify(this.queue));
      else sessionStorage.removeItem(storeOf(this.log));
    } catch { /* a full or forbidden store: the queue lives on in this page */ }
  }
}

/** Where the tab's session keeps what a log has not been sent yet. */
function storeOf(log) {
  return log === null ? "tracin-unsent" : `tracin-unsent ${log}`;
}

function recall(store) {
  try {
    return JSON.parse(sessionStorage.getItem(store) ?? "[]");
  } catch {
    return [];
  }
}

/** An id where the page is not served from a place that browsers call secure. */
function madeId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
