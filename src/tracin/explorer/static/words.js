// Numbers as words.

const MINUS = "−";

/** Three significant digits. */
export function digits(value, places = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e6 || size < 1e-3 ? size.toExponential(1).replace("e", "·10^") : grouped(Number(size.toPrecision(places)), places);
  return (value < 0 ? MINUS : "") + power(text);
}

function grouped(size, places) {
  const after = size >= 100 ? 0 : Math.max(0, places - 1 - Math.floor(Math.log10(size)));
  return size.toLocaleString("en", { minimumFractionDigits: Math.min(after, 6), maximumFractionDigits: Math.min(after, 6) });
}

function power(text) {
  const [front, exponent] = text.split("^");
  if (exponent === undefined) return text;
  const raised = [...exponent.replace("+", "")].map((sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]).join("");
  return front.replace(/^1(\.0)?·/, "") + raised;
}

/** A number in words with a true minus; a name as it is. */
export function minus(text) {
  return /^-\d/.test(text) && Number.isFinite(Number(text)) ? MINUS + text.slice(1) : text;
}

/** The name of a class, which may be empty; a number with a true minus. */
export function named(name) {
  return name === "" ? "(no name)" : minus(name);
}

/** A decision in words. */
export function decided(decision) {
  if (decision.action === "keep") return "kept";
  if (decision.action === "remove") return "removed";
  return `relabelled ${typeof decision.label === "number" ? digits(decision.label, 4) : named(decision.label)}`;
}

/** The words with a capital first. */
export function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** A score with its sign. */
export function signed(value) {
  if (value === null || value === undefined) return "–";
  return value > 0 ? `+${digits(value)}` : digits(value);
}

/** A share as per cent; never 100 % where something is missing. */
export function percent(value) {
  if (value === null || value === undefined) return "–";
  const hundred = value * 100;
  const shown = hundred < 10 || hundred > 99 ? hundred.toFixed(1) : hundred.toFixed(0);
  if (value < 1 && Number(shown) === 100) return "> 99.9 %";
  return `${shown.replace(/\.0$/, "")} %`;
}

/** A count with its thousands apart. */
export function count(value) {
  return value.toLocaleString("en");
}

/** A count of things. */
export function many(value, one, more = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : more}`;
}

/** A size in memory. */
export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const at = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log2(Math.max(value, 1)) / 10)));
  return `${digits(value / 1024 ** at)} ${units[at]}`;
}

/** A time. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${digits(seconds * 1000, 2)} ms`;
  if (seconds < 120) return `${digits(seconds)} s`;
  if (seconds < 7200) return `${digits(seconds / 60)} min`;
  return `${digits(seconds / 3600)} h`;
}

/** A name of a signal as words. */
export function spoken(name) {
  const known = { aum: "AUM (mean margin)", loss: "loss", mean_loss: "mean loss", self_influence: "self-influence" };
  return known[name] ?? name.replaceAll("_", " ");
}
