// The fields of the form: models, methods and classes that the server offers.

import { byId, className, clearProblem, make, number, percent, rowCount, showInForm, showList } from "./dom.js";
import { Problem, get } from "./requests.js";

// The methods that are shown first, and those that are selected at the start.
const FIRST = ["poly-cam", "opti-cam", "grad-cam", "layer-cam"];
const SELECTED = ["poly-cam", "opti-cam", "grad-cam"];

let models = [];
let methods = [];

export const modelName = () => byId("model").value;
// The server loads some models at the first request, and describes them only afterwards.
export const modelIsLoaded = () => models.find(({ name }) => name === modelName())?.state === "ready";
export const method = (name) => methods.find((each) => each.name === name) ?? { name, title: name, summary: "", advice: "" };

// The cheapest method, whose explanation contains the predictions.
export function cheapestMethod() {
  const available = methods.filter((each) => !each.unavailable && each.rows);
  return available.sort((a, b) => a.rows - b.rows || a.name.localeCompare(b.name))[0]?.name;
}

// Read the models of the server, and keep the selection if possible.
export async function loadModels() {
  models = await get("api/models");
  const select = byId("model");
  const previous = select.value;
  select.replaceChildren(...models.map(({ name }) => make("option", { value: name, textContent: name })));
  if (models.some(({ name }) => name === previous)) select.value = previous;
  clearProblem("model");
  await loadMethods();
}

// Show what the selected model offers.
export async function loadMethods() {
  const model = models.find(({ name }) => name === modelName());
  if (!model) return;
  byId("model-facts").textContent = {
    ready: `${number(model.classes)} classes, ${model.precision}, ${model.device.toUpperCase()}`,
    waiting: "The server loads this model at the first request.",
    unloaded: "An operator of the server has unloaded this model.",
  }[model.state];
  showList(byId("model-warnings"), model.warnings);
  byId("labels").replaceChildren(...model.labels.map((label) => make("option", { value: label })));
  const list = byId("methods");
  list.ariaBusy = "true";
  const loaded = await get(`api/methods?${new URLSearchParams({ model: model.name })}`);
  if (model.name !== modelName()) return; // the user has selected another model in the meantime
  list.ariaBusy = "false";
  const before = new Set(methods.length ? selectedMethods() : SELECTED);
  const rank = ({ name }) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
  methods = loaded.sort((a, b) => rank(a) - rank(b));
  list.replaceChildren(...methods.filter((each) => !each.unavailable).map((each) => checkbox(each, before)));
  const missing = methods.filter((each) => each.unavailable);
  const details = byId("unavailable");
  details.hidden = missing.length === 0;
  details.querySelector("summary").textContent = `${missing.length} methods that this model does not offer`;
  details.querySelector("dl").replaceChildren(
    ...missing.map(({ title, unavailable }) => make("div", {}, make("dt", { textContent: title }), make("dd", { textContent: `Not offered: ${unavailable}.` }))),
  );
}

function checkbox({ name, title, summary, rows }, selected) {
  const input = make("input", { type: "checkbox", name: "method", value: name, id: `method-${name}`, checked: selected.has(name) });
  const description = make("small", { id: `summary-${name}`, textContent: summary });
  input.setAttribute("aria-describedby", description.id);
  const cost = make("span", { className: "rows", textContent: rows ? rowCount(rows) : "" });
  return make("div", { className: "method" }, input, make("label", { htmlFor: input.id }, title), cost, description);
}

export const selectedMethods = () => [...byId("methods").querySelectorAll("input:checked")].map(({ value }) => value);

// Offer the most probable classes as targets. The selection stays if possible.
export function showPredictions(predictions) {
  const select = byId("target");
  const previous = select.value;
  select.querySelector("optgroup")?.remove();
  if (predictions.length) {
    const options = predictions.map((each) =>
      make("option", { value: String(each.index), textContent: `${className(each)}, ${percent(each.probability)}` }),
    );
    select.options[0].after(make("optgroup", { label: "Most probable classes" }, ...options));
  }
  select.value = [...select.options].some(({ value }) => value === previous) ? previous : "";
  const bars = predictions.map((each) =>
    make("li", {}, make("span", { textContent: className(each) }), make("meter", { min: 0, max: 1, value: each.probability, ariaHidden: "true" }), make("span", { className: "rows", textContent: percent(each.probability) })),
  );
  byId("predictions").querySelector("ol").replaceChildren(...bars);
  byId("predictions").hidden = bars.length === 0;
}

export function showClassField() {
  byId("class-field").hidden = byId("target").value !== "other";
}

// A problem that the page itself finds in the form.
function wrong(field, title, remedy) {
  return new Problem({ title, detail: "", remedy, field, choices: [] });
}

function wholeNumber(id, minimum, title) {
  const { value, validity } = byId(id);
  if (validity.badInput || (value !== "" && !(/^\d+$/.test(value) && Number(value) >= minimum && Number.isSafeInteger(Number(value))))) {
    throw wrong(id, title, `Enter a whole number from ${minimum} up.`);
  }
  return value === "" ? null : Number(value);
}

// Return the values for the server.
export function values() {
  const target = byId("target").value === "other" ? byId("class").value.trim() : byId("target").value;
  if (byId("target").value === "other" && !target) throw wrong("target", "No class is given.", "Enter a label or an index.");
  const chosen = selectedMethods();
  if (chosen.length === 0) throw wrong("methods", "No method is selected.", "Select at least one method.");
  const budget = wholeNumber("budget", 1, "The limit of rows is not a whole number.");
  return { model: modelName(), methods: chosen, target, budget, seed: wholeNumber("seed", 0, "The seed is not a whole number.") ?? 0 };
}

export function report(error) {
  if (!(error instanceof Problem)) throw error;
  showInForm(error.problem);
}
