// Everything the pages know comes through here: from the server, or from the data inside a static report.

import { keptAnswers } from "./kept.js";

const held = document.getElementById("tracin-data");
const kept = held === null ? null : keptAnswers(JSON.parse(held.textContent));

/** The page is a file that was sent, not a server's. */
export const isReport = kept !== null;

/** A failure with the server's own words. */
export class ApiError extends Error {
  constructor(message, status, body) {
    super(message);
    this.status = status;
    this.body = body;
  }
}

/** An answer of `path`, with parameters; those that are null are left out. */
export async function get(path, parameters = {}, signal = undefined) {
  const given = Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined);
  if (kept !== null) return keptAnswer(path, Object.fromEntries(given));
  const query = new URLSearchParams(given).toString();
  return asked(`api/${path}${query && `?${query}`}`, { signal });
}

/** The answer to something posted. A string, a Blob or an object (as JSON). */
export async function post(path, body, type = "application/json") {
  const content = type === "application/json" && typeof body === "object" && !(body instanceof Blob) ? JSON.stringify(body) : body;
  return asked(`api/${path}`, { method: "POST", headers: { "Content-Type": type }, body: content });
}

/** A file of `path`: `{name, content}`. */
export async function download(path, parameters) {
  const answer = await answered(`api/${path}?${new URLSearchParams(parameters)}`);
  if (!answer.ok) throw await failed(answer);
  const [, name] = /filename="([^"]+)"/.exec(answer.headers.get("Content-Disposition") ?? "") ?? [];
  return { name: name ?? path, content: await answer.blob() };
}

/** Where a picture is: the report holds its pictures itself. */
export function picture(src) {
  return kept === null ? src : (kept.pictures[src] ?? "");
}

/** Whether a row's explanation can be asked for. */
export function canExplain(side, row) {
  return kept === null || `${side}/${row}` in kept.explanations;
}

async function keptAnswer(path, parameters) {
  try {
    return kept.answer(path, parameters);
  } catch (error) {
    throw new ApiError(error.message, 404, {});
  }
}

async function asked(address, options) {
  const answer = await answered(address, options);
  if (!answer.ok) throw await failed(answer);
  return answer.json().catch(() => ({}));
}

async function answered(address, options = {}) {
  try {
    return await fetch(address, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is tracin serve still running?", 0, {});
  }
}

async function failed(answer) {
  const body = await answer.json().catch(() => ({}));
  return new ApiError(body.error ?? `The server answered ${answer.status}.`, answer.status, body);
}
