// Functions for the elements of the page.

export const byId = (id) => document.getElementById(id);

// Create an element with properties and children.
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Show texts as the items of a list, or hide the list if there are none.
export function showList(list, texts) {
  list.replaceChildren(...texts.map((text) => make("li", { textContent: text })));
  list.hidden = texts.length === 0;
}

export const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
export const rowCount = (rows) => `${number(rows)} row${rows === 1 ? "" : "s"}`;
export const number = (value) => value.toLocaleString("en");
export const className = ({ index, label }) => (label ? `${label} (${index})` : `class ${index}`);

// Show a problem in an element. `choose` receives the options of a button that the user presses.
export function showProblem(element, problem, choose = () => {}) {
  const buttons = problem.choices.map(({ label, options }) => {
    const button = make("button", { type: "button", textContent: label });
    button.addEventListener("click", () => choose(options));
    return button;
  });
  // The operator of the server needs the id, but not for a field that the user can correct.
  const request = problem.request && !problem.field ? `Request id: ${problem.request}` : "";
  element.replaceChildren(
    make("strong", { textContent: problem.title }),
    ...[problem.detail, problem.remedy, request].filter(Boolean).map((text) => make("p", { textContent: text })),
    ...buttons,
  );
  element.hidden = false;
}

// The elements of the fields by the names that problems.py uses.
const FIELDS = ["image", "frame", "model", "target", "methods", "budget", "seed"];
const control = (field) =>
  field === "target" && byId("target").value === "other" ? byId("class") : field === "methods" ? byId("methods").querySelector("input") : byId(field);

export const isInForm = ({ field }) => FIELDS.includes(field) && field !== "methods";

// Show a problem next to the field that it belongs to, otherwise below the form.
export function showInForm(problem, choose) {
  const field = FIELDS.includes(problem.field) ? problem.field : "";
  showProblem(byId(field ? `${field}-problem` : "problem"), problem, choose);
  if (!field) return;
  byId(`${field}-problem`).closest("details")?.setAttribute("open", "");
  control(field)?.setAttribute("aria-invalid", "true");
}

export function clearProblem(field) {
  byId(field ? `${field}-problem` : "problem").hidden = true;
  if (field) for (const each of [control(field), byId("class")]) each?.removeAttribute("aria-invalid");
}

export function clearProblems() {
  for (const field of ["", ...FIELDS]) clearProblem(field);
}
