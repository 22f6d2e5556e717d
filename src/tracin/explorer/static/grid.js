// A long list or grid that holds only the tiles in sight and fetches its items page by page.

import { h } from "./dom.js";

const PAGE = 60;
const AROUND = 2; // lines kept above and below those in sight

/**
 * Tiles in lines of equal height. One tile is in the tab order; arrows, Home, End and the page keys move on.
 *
 * label: what a screen reader calls the list. fetch(offset, limit) -> {total, items}. draw(item, tile): fills a tile.
 * minimum: the least width of a tile, null for one tile to a line. height(width): of a tile. onSelect(item, index), and
 * onWait(index) before it where the item has to be fetched first. onOpen(item, index): Enter or a click. onLoad(total),
 * onError(error).
 */
export class Grid {
  constructor({ label, fetch, draw, minimum = null, height, gap = 12, onSelect = () => {}, onWait = () => {}, onOpen = () => {}, onLoad = () => {}, onError = () => {} }) {
    Object.assign(this, { fetch, draw, minimum, height, gap, onSelect, onWait, onOpen, onLoad, onError });
    this.canvas = h("div", { class: "canvas", role: "listbox", "aria-label": label, hidden: true });
    this.element = h("div", { class: "scroller" }, this.canvas);
    this.tiles = new Map();
    this.clear();
    this.element.addEventListener("scroll", () => this.later(), { passive: true });
    this.canvas.addEventListener("keydown", (event) => this.pressed(event));
    this.canvas.addEventListener("click", (event) => this.clicked(event));
    this.watch = new ResizeObserver(() => this.measured());
    this.watch.observe(this.element);
  }

  clear() {
    for (const tile of this.tiles.values()) tile.remove();
    this.tiles.clear();
    this.items = [];
    this.pages = new Map();
    this.total = 0;
    this.active = 0;
    this.chosen = -1;
    this.round = (this.round ?? 0) + 1;
  }

  /** Fetch anew from the beginning; answers the total. */
  async load() {
    this.clear();
    this.element.scrollTop = 0;
    this.element.dataset.state = "loading";
    const round = this.round;
    try {
      await this.page(0);
    } catch (error) {
      if (round === this.round && error.name !== "AbortError") {
        this.element.dataset.state = "failed";
        this.onError(error);
      }
      return 0;
    }
    if (round !== this.round) return this.total;
    this.element.dataset.state = this.total ? "ready" : "empty";
    this.canvas.hidden = this.total === 0;
    this.measured();
    this.onLoad(this.total);
    return this.total;
  }

  page(number) {
    if (!this.pages.has(number)) {
      const round = this.round;
      const got = this.fetch(number * PAGE, PAGE).then(({ total, items }) => {
        if (round !== this.round) return;
        this.total = total;
        items.forEach((item, at) => { this.items[number * PAGE + at] = item; });
        if (number > 0) this.render();
      });
      got.catch(() => { this.pages.delete(number); });
      this.pages.set(number, got);
    }
    return this.pages.get(number);
  }

  /** The item at a place, fetched where it isn't here yet. */
  async at(index) {
    if (this.items[index] === undefined) await this.page(Math.floor(index / PAGE));
    return this.items[index];
  }

  measured() {
    const width = this.element.clientWidth - this.padding() * 2;
    if (width <= 0) return;
    this.columns = this.minimum === null ? 1 : Math.max(1, Math.floor((width + this.gap) / (this.minimum + this.gap)));
    this.across = (width - this.gap * (this.columns - 1)) / this.columns;
    this.down = Math.round(this.height(this.across));
    for (const tile of this.tiles.values()) this.place(tile);
    this.render();
  }

  padding() {
    return parseFloat(getComputedStyle(this.element).paddingLeft) || 0;
  }

  later() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.render(); });
  }

  render() {
    if (!this.total || !this.columns) return;
    const line = this.down + this.gap;
    const lines = Math.ceil(this.total / this.columns);
    this.canvas.style.height = `${lines * line - this.gap}px`;
    const top = Math.max(0, Math.floor(this.element.scrollTop / line) - AROUND);
    const bottom = Math.ceil((this.element.scrollTop + this.element.clientHeight) / line) + AROUND;
    const first = top * this.columns;
    const last = Math.min(this.total, bottom * this.columns);
    for (const [index, tile] of this.tiles) {
      if ((index < first || index >= last) && index !== this.active) { tile.remove(); this.tiles.delete(index); }
    }
    for (let index = first; index < last; index++) this.tile(index);
    if (this.active < this.total) this.tile(this.active);
  }

  tile(index) {
    let tile = this.tiles.get(index);
    if (tile === undefined) {
      tile = h("div", { class: "tile", role: "option", "aria-posinset": index + 1 });
      tile.index = index;
      this.tiles.set(index, tile);
      this.place(tile);
      // In the order of their places, so that a screen reader reads them so.
      const after = [...this.canvas.children].find((other) => other.index > index);
      this.canvas.insertBefore(tile, after ?? null);
    }
    tile.setAttribute("aria-setsize", String(this.total));
    tile.tabIndex = index === this.active ? 0 : -1;
    tile.setAttribute("aria-selected", String(index === this.chosen));
    const item = this.items[index];
    if (tile.drawn !== item || item === undefined) {
      tile.drawn = item;
      tile.classList.toggle("waiting", item === undefined);
      if (item === undefined) this.fetchSoon();
      else this.draw(item, tile);
    }
    return tile;
  }

  /** Fetch what is in sight and missing; what a fast scroll only passes is never asked for. */
  fetchSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      const missing = new Set([...this.tiles.keys()].filter((index) => this.items[index] === undefined).map((index) => Math.floor(index / PAGE)));
      for (const number of missing) this.page(number).catch(this.onError);
    }, 60);
  }

  place(tile) {
    const line = Math.floor(tile.index / this.columns);
    const column = tile.index % this.columns;
    tile.style.width = `${this.across}px`;
    tile.style.height = `${this.down}px`;
    tile.style.transform = `translate(${column * (this.across + this.gap)}px, ${line * (this.down + this.gap)}px)`;
  }

  /** Draw the tiles of a changed item again. */
  redraw(test) {
    for (const [index, tile] of this.tiles) {
      if (this.items[index] !== undefined && test(this.items[index])) { tile.drawn = undefined; this.tile(index); }
    }
  }

  /** Move to a place: in sight, chosen, focused if asked. */
  async select(index, { focus = false, open = false } = {}) {
    if (!this.total) return;
    index = Math.max(0, Math.min(this.total - 1, index));
    this.active = this.chosen = index;
    this.show(index);
    this.render();
    for (const [at, tile] of this.tiles) { tile.tabIndex = at === index ? 0 : -1; tile.setAttribute("aria-selected", String(at === index)); }
    if (focus) this.tiles.get(index)?.focus({ preventScroll: true });
    if (this.items[index] === undefined) this.onWait(index);
    const round = this.round;
    let item;
    try {
      item = await this.at(index);
    } catch (error) {
      if (round === this.round && this.chosen === index && error.name !== "AbortError") this.onError(error);
      return;
    }
    if (round !== this.round || this.chosen !== index || item === undefined) return;
    this.onSelect(item, index);
    if (open) this.onOpen(item, index);
  }

  show(index) {
    if (!this.columns) return;
    const top = Math.floor(index / this.columns) * (this.down + this.gap);
    const room = this.element.clientHeight - this.padding() * 2;
    if (top < this.element.scrollTop) this.element.scrollTop = top;
    else if (top + this.down > this.element.scrollTop + room) this.element.scrollTop = top + this.down - room;
  }

  pressed(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const lines = Math.max(1, Math.floor(this.element.clientHeight / (this.down + this.gap)));
    const by = {
      ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.columns, ArrowUp: -this.columns,
      PageDown: lines * this.columns, PageUp: -lines * this.columns, Home: -this.total, End: this.total,
    }[event.key];
    if (by !== undefined) {
      event.preventDefault();
      const next = this.active + by;
      const inside = next >= 0 && next < this.total;
      this.select(inside || Math.abs(by) > this.columns ? next : this.active, { focus: true });
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.select(this.active, { focus: true, open: true });
    }
  }

  clicked(event) {
    const tile = event.target.closest(".tile");
    if (tile !== null) this.select(tile.index, { focus: true, open: true });
  }

  /** No more fetching, no more watching. */
  close() {
    this.round++;
    clearTimeout(this.timer);
    this.watch.disconnect();
  }
}
