// The page: loads images, sends requests, and stays connected to the server.

import { Card, cancelCards, compare, measureAll, removeCards, showCards } from "./cards.js";
import { byId, clearProblem, clearProblems, isInForm, make, showInForm, showList } from "./dom.js";
import * as form from "./form.js";
import * as maps from "./maps.js";
import { Problem, blob, bytes, get, stream, upload } from "./requests.js";

const RETRY_MS = 2000;
const LOADED = "The image is loaded. Choose methods, then Explain.";

let settings;
let image = null; // { file, url, name, width, height }: what is explained; `file` is sent
let original = null; // { file, name, options }: the file that the user has opened
let loading = new AbortController(); // of the image
let predicting = new AbortController(); // of its predictions
let running = null; // the controller of the request of "Explain"

const announce = (text) => (byId("status").textContent = text);

// ---- connection ------------------------------------------------------------------------------------------------------

let connected = false;
let connecting = null;

function showConnection(state, text) {
  byId("server").dataset.state = state;
  byId("server-text").textContent = text;
}

// Read models and methods, repeatedly until the server responds.
async function connect() {
  connected = false;
  connecting ??= (async () => {
    for (;;) {
      try {
        // The process may have been started again, for another server.
        const read = await get("api/settings");
        if (!settings) prepare(read);
        settings = read;
        await form.loadModels();
        connected = true;
        showConnection("ready", `Connected to ${settings.address}`);
        clearProblem("");
        return;
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        showConnection("lost", `Not connected${settings ? ` to ${settings.address}` : ""}; trying again …`);
        showInForm(error.problem);
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
      }
    }
  })().finally(() => (connecting = null));
  await connecting;
}

// Show what does not depend on the camserve server.
function prepare(read) {
  byId("version").textContent = `camserve ${read.version}`;
  byId("research").hidden = !read.dicom;
  if (read.dicom) byId("formats").textContent = "JPEG, PNG, WebP, BMP, GIF, TIFF or DICOM.";
  byId("colours").replaceChildren(...Object.keys(read.colours).map((name) => make("option", { value: name, textContent: name })));
  byId("examples").replaceChildren(
    ...read.examples.map(({ name, title }) => {
      const button = make("button", { type: "button", title }, make("img", { src: `examples/${name}.jpg`, alt: "", width: 72, height: 54 }), make("span", { textContent: name }));
      button.addEventListener("click", () => openExample(name));
      return button;
    }),
  );
  maps.show({ colours: Object.values(read.colours)[0] });
  maps.drawLegend(byId("legend"), Object.values(read.colours)[0]);
}

// Show a problem, and connect again if the server is gone.
function report(error) {
  if (error.name === "AbortError") return;
  form.report(error);
  if (error.problem.unavailable) connect();
  if (error.problem.field === "model") form.loadModels().catch(() => {});
}

// ---- image -----------------------------------------------------------------------------------------------------------

async function openExample(name) {
  try {
    open(new File([await blob(`examples/${name}.jpg`)], `${name}.jpg`));
  } catch (error) {
    report(error);
  }
}

// Open a file. `options` are those of DICOM images.
async function open(file, options = {}) {
  cancel();
  loading.abort();
  predicting.abort();
  loading = new AbortController();
  clearProblem("image");
  clearProblem("frame");
  original = { file, name: file.name || "pasted image", options };
  announce(`Loading ${original.name} …`);
  try {
    const loaded = await upload(options, file, loading.signal);
    cancel(); // the explanation of the previous image that the user has started in the meantime
    showImage(loaded);
    await predict();
  } catch (error) {
    if (error.name === "AbortError") return;
    announce("The image cannot be used.");
    if (!(error instanceof Problem)) throw error;
    if (error.problem.field !== "frame") forgetImage();
    showInForm(error.problem, (chosen) => open(file, { ...options, ...chosen }));
    if (error.problem.unavailable) connect();
  }
}

function forgetImage() {
  if (image) URL.revokeObjectURL(image.url);
  image = null;
  for (const id of ["loaded", "image-notes", "image-warnings", "frame-field"]) byId(id).hidden = true;
  byId("view").hidden = true;
  removeCards();
  form.showPredictions([]);
}

function showImage({ width, height, preview, pixels, dicom, frame, frames, notes, warnings }) {
  forgetImage();
  const url = URL.createObjectURL(new Blob([bytes(preview)], { type: "image/jpeg" }));
  // Of a DICOM file, only the pixels are sent.
  image = { file: dicom ? new Blob([bytes(pixels)]) : original.file, url, name: original.name, width, height };
  byId("loaded-image").src = url;
  byId("loaded-image").alt = `Preview of ${image.name}`;
  byId("loaded-text").textContent = `${image.name}, ${width} × ${height} pixels${dicom ? ", DICOM" : ""}`;
  byId("loaded").hidden = false;
  showList(byId("image-warnings"), warnings);
  showList(byId("image-notes").querySelector("ol"), notes);
  byId("image-notes").hidden = notes.length === 0;
  byId("frame-field").hidden = frames === 1;
  byId("frame").max = frames - 1;
  byId("frame").value = frame;
  byId("frame-range").textContent = `0 to ${frames - 1}`;
  showCards(image, []);
}

// Ask for the most probable classes with the cheapest method.
async function predict() {
  predicting.abort();
  predicting = new AbortController();
  const { signal } = predicting;
  const method = form.cheapestMethod();
  if (!connected || !method) return announce(LOADED);
  announce("Predicting …");
  const fields = { model: form.modelName(), methods: [method], target: "", budget: null, seed: 0 };
  for await (const event of stream("api/explain", fields, [image.file], signal)) {
    if (event.event === "explanation") form.showPredictions(event.predictions);
    if (event.event === "problem") throw new Problem(event.problem);
  }
  announce(LOADED);
}

// Predict again, for another model.
async function predictAgain() {
  if (!image || running) return;
  form.showPredictions([]);
  try {
    await predict();
  } catch (error) {
    report(error);
  }
}

// ---- explanation -----------------------------------------------------------------------------------------------------

async function explain() {
  clearProblems();
  if (!image) {
    showInForm({ title: "There is no image.", detail: "", remedy: "Choose a file or an example.", field: "image", choices: [] });
    byId("image").focus();
    return;
  }
  let values;
  try {
    values = form.values();
  } catch (error) {
    report(error);
    return;
  }
  predicting.abort();
  const controller = new AbortController();
  setRunning(controller);
  const cards = new Map(values.methods.map((name) => [name, new Card(form.method(name), image, values.model, announce)]));
  showCards(image, [...cards.values()]);
  byId("view").hidden = false;
  if (byId("results").offsetTop > byId("form").offsetTop + byId("form").offsetHeight / 2) byId("results").scrollIntoView();
  announce(`Explaining with ${values.methods.length} method${values.methods.length > 1 ? "s" : ""} …`);
  let failures = 0;
  try {
    for await (const event of stream("api/explain", values, [image.file], controller.signal)) {
      cards.get(event.method).handle(event);
      if (event.event === "explanation") {
        if (values.model === form.modelName()) form.showPredictions(event.predictions);
        compare();
      }
      if (event.event === "problem") {
        failures += 1;
        if (isInForm(event.problem)) showInForm(event.problem);
        if (event.problem.unavailable) connect();
        else if (event.problem.field === "model") form.loadModels().catch(() => {});
      }
    }
    if (!form.modelIsLoaded() && !failures) await form.loadModels();
    announce(failures ? `Finished; ${failures} of ${values.methods.length} methods failed.` : "Finished.");
  } catch (error) {
    if (controller.signal.aborted) return;
    for (const card of cards.values()) card.cancelled();
    announce("The explanation failed.");
    report(error);
  } finally {
    if (running === controller) setRunning(null);
  }
}

function setRunning(controller) {
  running = controller;
  byId("explain").disabled = controller !== null;
  byId("cancel").hidden = controller === null;
}

function cancel() {
  if (!running) return;
  running.abort();
  setRunning(null);
  cancelCards();
  announce("Cancelled.");
}

// ---- events ----------------------------------------------------------------------------------------------------------

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) explain();
});
byId("cancel").addEventListener("click", () => {
  cancel();
  byId("explain").focus();
});
byId("image").addEventListener("change", ({ target }) => target.files.length && open(target.files[0]));
byId("frame").addEventListener("change", ({ target }) => original && open(original.file, { ...original.options, frame: Number(target.value) }));
byId("model").addEventListener("change", async () => {
  clearProblem("model");
  clearProblem("target");
  try {
    await form.loadMethods();
    await predictAgain();
  } catch (error) {
    report(error);
  }
});
byId("target").addEventListener("change", () => {
  clearProblem("target");
  form.showClassField();
});
for (const id of ["budget", "seed"]) byId(id).addEventListener("input", () => clearProblem(id));
byId("methods").addEventListener("change", () => clearProblem("methods"));
byId("class").addEventListener("input", () => clearProblem("target"));

byId("opacity").addEventListener("input", ({ target }) => {
  byId("opacity-value").textContent = `${target.value} %`;
  maps.show({ opacity: target.value / 100 });
});
byId("colours").addEventListener("change", ({ target }) => {
  maps.show({ colours: settings.colours[target.value] });
  maps.drawLegend(byId("legend"), settings.colours[target.value]);
});
byId("layers").addEventListener("change", ({ target }) => maps.show({ overlay: target.value === "overlay" }));
byId("measure-all").addEventListener("click", measureAll);

// A file that is dropped anywhere on the page is opened, and not shown instead of the page.
for (const name of ["dragover", "dragenter"]) {
  addEventListener(name, (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    byId("drop").classList.add("over");
  });
}
addEventListener("dragleave", (event) => event.relatedTarget || byId("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  byId("drop").classList.remove("over");
  open(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => {
  const pasted = [...event.clipboardData.files][0];
  if (!pasted) return;
  event.preventDefault();
  open(pasted);
});

// The server may have stopped while the page was in the background.
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && connected && !running) form.loadModels().catch(report);
});

connect();
