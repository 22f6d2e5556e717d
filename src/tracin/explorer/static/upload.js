// A new example of the reader's own: a file, dropped or chosen, or a text.

import { post } from "./api.js";
import { addressOf } from "./cards.js";
import { h, toast } from "./dom.js";

const LARGEST = 4 * 2 ** 20;
const TYPES = {
  image: { accept: "image/png,image/jpeg", name: "picture", types: ["image/png", "image/jpeg"] },
  text: { accept: ".txt,text/plain", name: "text", types: ["text/plain"] },
  table: { accept: ".json,application/json", name: "row as JSON", types: ["application/json"] },
};

/** A button that opens the dialog. */
export function uploadButton(study) {
  const dialog = uploadDialog(study);
  return h("span", {}, h("button", { type: "button", class: "upload", on: { click: () => dialog.showModal() } }, `Explain your own ${TYPES[study.upload].name}…`), dialog);
}

function uploadDialog(study) {
  const kind = TYPES[study.upload];
  const file = h("input", { type: "file", accept: kind.accept, "aria-label": `A ${kind.name} to explain`, on: { change: () => { if (file.files.length) { close(); send(study, file.files[0]); file.value = ""; } } } });
  const words = study.upload === "image" ? null : h("textarea", { rows: "6", "aria-label": study.upload === "text" ? "Text to explain" : "Row as a JSON object", spellcheck: "false" });
  const close = () => dialog.close();
  const dialog = h("dialog", { class: "sheet", "aria-label": "Explain a new example" },
    h("h2", {}, "Explain a new example"),
    h("p", {}, `It is traced for the class that the model predicts, since it has no label. It stays on this computer. You can also drop a ${kind.name} on the page.`),
    words,
    words && h("div", { class: "buttons" }, h("button", { type: "button", class: "primary", on: { click: () => {
      if (words.value.trim() === "") return words.focus();
      close();
      return send(study, new Blob([words.value], { type: kind.types[0] }));
    } } }, "Explain it")),
    h("label", { class: "drop" }, h("span", {}, study.upload === "image" ? "Choose a PNG or JPEG file, 4 MiB at the most" : "or choose a file"), file),
    h("div", { class: "buttons" }, h("button", { type: "button", class: "quiet", on: { click: close } }, "Cancel")));
  return dialog;
}

async function send(study, file) {
  const kind = TYPES[study.upload];
  const type = file.type === "" && study.upload !== "image" ? kind.types[0] : file.type.split(";")[0];
  if (!kind.types.includes(type)) return toast(`This is no ${kind.name} that can be read: give ${kind.accept.replaceAll(",", " or ")}.`, { kind: "error" });
  if (file.size > LARGEST) return toast("The file has more than 4 MiB. Give a smaller one.", { kind: "error" });
  try {
    const { row } = await post("upload", file, type);
    location.hash = addressOf([["upload", row]]);
  } catch (error) {
    toast(error.message, { kind: "error" });
  }
  return null;
}

/** Take files that are dropped on the page; answers how to stop. */
export function watchDrops(study, element) {
  if (study.upload === null) return () => {};
  const over = (event) => { if ([...event.dataTransfer.types].includes("Files")) { event.preventDefault(); element.classList.add("dropping"); } };
  const out = (event) => { if (event.relatedTarget === null) element.classList.remove("dropping"); };
  const drop = (event) => {
    event.preventDefault();
    element.classList.remove("dropping");
    if (event.dataTransfer.files.length) send(study, event.dataTransfer.files[0]);
  };
  const listeners = [["dragover", over], ["dragleave", out], ["drop", drop]];
  for (const [name, run] of listeners) window.addEventListener(name, run);
  return () => { for (const [name, run] of listeners) window.removeEventListener(name, run); };
}
