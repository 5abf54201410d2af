// The results: one card for each method, and the table that compares them.

import { chart } from "./curves.js";
import { byId, className, isInForm, make, number, percent, rowCount, showList, showProblem } from "./dom.js";
import * as maps from "./maps.js";
import { Problem, decodeMap, stream } from "./requests.js";

const NAMES = { insertion: "Insertion", deletion: "Deletion" };

export class Card {
  // `method` is a description of a method, `image` what is explained: { file, url, name, width, height }.
  constructor(method, image, model, announce) {
    Object.assign(this, { method, image, model, announce, levels: [] });
    this.element = byId("card").content.firstElementChild.cloneNode(true);
    this.find("h3").textContent = method.title;
    this.find(".about p").textContent = `${method.summary} ${method.advice}`;
    this.find("img").src = image.url;
    this.find(".picture").style.aspectRatio = `${image.width} / ${image.height}`;
    this.canvas = this.find("canvas");
    this.canvas.hidden = true;
    const slider = this.find(".level input");
    const id = `level-${method.name}`;
    slider.id = id;
    this.find(".level label").htmlFor = id;
    slider.addEventListener("input", () => this.showLevel(Number(slider.value)));
    this.find(".measure").addEventListener("click", () => this.measure());
    this.find(".replay").addEventListener("click", () => this.replay());
    this.find(".copy").addEventListener("click", () => this.copy());
    this.find(".stop").addEventListener("click", () => this.abort());
    this.find(".save").addEventListener("click", () =>
      maps.save(this.find("img"), this.canvas, `${image.name.replace(/\.\w+$/, "")}.${method.name}.png`),
    );
    for (const [name, label] of [["measure", "Insertion and deletion"], ["replay", "Replay"], ["save", "Save picture"], ["copy", "Copy receipt"], ["stop", "Cancel"]]) {
      this.find(`.${name}`).setAttribute("aria-label", `${label}: ${method.title}`);
    }
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  // Show an event of the stream of explanations.
  handle(event) {
    if (event.event === "progress") this.progress(event);
    else if (event.event === "level") this.addLevel(event);
    else if (event.event === "explanation") this.finish(event);
    else if (event.event === "problem") this.fail(event.problem);
  }

  progress({ done, total, stage }) {
    const bar = this.find("progress");
    bar.setAttribute("aria-label", `Progress of ${this.method.title}`);
    if (total) bar.value = done / total;
    this.find(".stage").textContent = `${number(done)} of ${rowCount(total)}, ${stage}`;
  }

  addLevel({ index, count, layer, map }) {
    this.levels.push({ map: decodeMap(map), text: `${index + 1} of ${count} (${layer})` });
    this.showLevel(this.levels.length - 1);
    this.canvas.setAttribute("aria-label", `Coarse map by ${this.method.title}, level ${index + 1} of ${count}`);
  }

  showLevel(index) {
    const slider = this.find(".level input");
    slider.max = this.levels.length - 1;
    slider.value = index;
    this.find(".level output").textContent = this.levels[index].text;
    slider.setAttribute("aria-valuetext", `level ${this.levels[index].text}`);
    this.find(".level").hidden = false;
    this.draw(this.levels[index].map);
  }

  draw(map) {
    this.canvas.hidden = false;
    maps.draw(this.canvas, map);
  }

  finish(event) {
    this.result = event;
    this.map = decodeMap(event.map);
    if (this.levels.length > 1) {
      // The map of the last level is the result.
      this.levels.at(-1).map = this.map;
      this.showLevel(this.levels.length - 1);
    } else {
      this.find(".level").hidden = true;
      this.draw(this.map);
    }
    this.canvas.setAttribute("aria-label", `Map by ${this.method.title} for ${className(event.target)}`);
    this.find(".progress").hidden = true;
    this.find(".target").textContent = `${className(event.target)}, ${percent(event.target.probability)}`;
    const partial = event.share < 1 ? [`The method stopped early: the map contains ${percent(event.share)} of the full sum.`] : [];
    showList(this.find(".warnings"), [...partial, ...event.warnings]);
    const { rows, batches, queue_ms: queue, compute_ms: compute, cached } = event.cost;
    const facts = { Rows: number(rows), Batches: number(batches), Queue: `${queue.toFixed(1)} ms`, Computation: `${(compute / 1000).toFixed(2)} s` };
    if (cached) facts.Result = "from the cache of the server";
    this.find(".facts").replaceChildren(
      ...Object.entries(facts).map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))),
    );
    this.find(".receipt pre").textContent = JSON.stringify(JSON.parse(event.receipt), null, 2);
    for (const name of ["facts", "buttons", "receipt"]) this.find(`.${name}`).hidden = false;
    this.announce(`${this.method.title} is finished.`);
  }

  fail(problem) {
    this.find(".progress").hidden = true;
    const shown = isInForm(problem) ? { ...problem, detail: "", remedy: "The form says more." } : problem;
    showProblem(this.find(".problem"), shown);
    this.announce(`${this.method.title}: ${problem.title}`);
  }

  // The user has cancelled the request.
  cancelled() {
    if (this.result || !this.find(".problem").hidden) return;
    this.find(".progress").hidden = true;
    this.find(".outcome").textContent = "Cancelled.";
  }

  // Run a further request about this card. `use` receives its last event.
  async follow(path, fields, parts, text, use) {
    this.controller?.abort();
    const controller = new AbortController();
    this.controller = controller;
    const outcome = this.find(".outcome");
    this.find(".problem").hidden = true;
    outcome.textContent = `${text} …`;
    this.find(".stop").hidden = false;
    try {
      for await (const event of stream(path, fields, parts, controller.signal)) {
        if (event.event === "progress") outcome.textContent = `${text}: ${number(event.done)} of ${rowCount(event.total)}`;
        else if (event.event === "problem") throw new Problem(event.problem);
        else if (event.event !== "level") use(event);
      }
    } catch (error) {
      if (controller !== this.controller) return; // another request has replaced this one
      outcome.textContent = error.name === "AbortError" ? "Cancelled." : "";
      if (error instanceof Problem) showProblem(this.find(".problem"), error.problem);
      else if (error.name !== "AbortError") throw error;
    } finally {
      if (controller === this.controller) this.find(".stop").hidden = true;
    }
  }

  abort() {
    this.controller?.abort();
  }

  measure() {
    const { height, width, values } = this.map;
    const fields = { model: this.model, target: this.result.target.index, height, width };
    return this.follow("api/evaluate", fields, [values, this.image.file], "Measuring", ({ scores, cost }) => {
      this.scores = scores;
      const legend = Object.entries(scores).map(([name, { value }]) =>
        make("li", { className: name, textContent: `${NAMES[name]} ${value.toFixed(3)}` }),
      );
      this.find(".curves").replaceChildren(chart(scores), make("ul", { className: "key" }, ...legend));
      this.find(".curves").hidden = false;
      this.find(".outcome").textContent = `Measured with ${rowCount(cost.rows)}.`;
      this.announce(`${this.method.title}: insertion ${scores.insertion.value.toFixed(3)}, deletion ${scores.deletion.value.toFixed(3)}.`);
      compare();
    });
  }

  replay() {
    return this.follow("api/replay", { receipt: this.result.receipt }, [this.image.file], "Replaying", ({ same, differences }) => {
      const outcome = this.find(".outcome");
      outcome.textContent = same ? "Replayed: the maps agree bit for bit." : "Replayed: the maps do not agree.";
      if (differences.length === 0) return;
      const items = differences.map(([name, then, now]) => make("li", { textContent: `${name}: ${then} → ${now}` }));
      outcome.append(make("span", { textContent: " Differences:" }), make("ul", {}, ...items));
    });
  }

  async copy() {
    try {
      await navigator.clipboard.writeText(this.result.receipt);
      this.announce("The receipt is copied.");
      this.find(".copy").textContent = "Copied";
    } catch {
      // Without permission, or on a page without TLS that another machine has opened.
      getSelection().selectAllChildren(this.find(".receipt pre"));
      this.announce("The receipt is selected. Press Ctrl-C to copy it.");
      this.find(".copy").textContent = "Press Ctrl-C to copy";
    }
    setTimeout(() => (this.find(".copy").textContent = "Copy receipt"), 3000);
  }
}

let cards = [];

// Remove all cards, and cancel their requests.
export function removeCards() {
  for (const card of cards) card.abort();
  maps.forgetAll();
  cards = [];
  byId("cards").replaceChildren();
  compare();
}

// Replace all cards. The first one shows the image itself.
export function showCards(image, made) {
  removeCards();
  cards = made;
  const picture = make("div", { className: "picture" }, make("img", { src: image.url, alt: "The image" }));
  picture.style.aspectRatio = `${image.width} / ${image.height}`;
  const original = make("article", { className: "card" }, make("h3", { textContent: "Original" }), picture, make("p", { className: "hint", textContent: `${image.name}, ${image.width} × ${image.height} pixels` }));
  byId("cards").replaceChildren(original, ...cards.map((card) => card.element));
}

export function cancelCards() {
  for (const card of cards) {
    card.cancelled();
    card.abort();
  }
}

export async function measureAll() {
  await Promise.all(cards.filter((card) => card.result).map((card) => card.measure()));
}

// Update the table that compares the finished maps.
export function compare() {
  const finished = cards.filter((card) => card.result);
  byId("comparison").hidden = finished.length === 0;
  const cell = (text) => make("td", { textContent: text });
  const rows = finished.map(({ method, result, scores }) =>
    make(
      "tr",
      {},
      make("th", { scope: "row", textContent: method.title }),
      cell(scores ? scores.insertion.value.toFixed(3) : "–"),
      cell(scores ? scores.deletion.value.toFixed(3) : "–"),
      cell(number(result.cost.rows)),
      cell(`${(result.cost.compute_ms / 1000).toFixed(2)} s`),
    ),
  );
  byId("comparison").querySelector("tbody").replaceChildren(...rows);
}
