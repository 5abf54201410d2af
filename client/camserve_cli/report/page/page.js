"use strict";
// Sort the images by a score of a method, and open all folded sections for printing. The page is complete without scripts.
(() => {
  const list = document.querySelector(".items");
  const original = [...list.children];
  const method = document.getElementById("sort-method");
  const metric = document.getElementById("sort-metric");
  const buttons = [...document.querySelectorAll("[data-order]")];
  const status = document.getElementById("sorted");
  const score = (item) => JSON.parse(item.dataset.scores)[method.value]?.[metric.value] ?? null;
  const named = (select) => select.selectedOptions[0].textContent;

  const sort = (order) => {
    const higher = metric.selectedOptions[0].dataset.higher === "1";
    const sign = (order === "best") === higher ? -1 : 1;
    const sorted = original.map((item) => [score(item), item]);
    if (order !== "original") {
      // Images without a score come last.
      sorted.sort(([a], [b]) => (a === null) - (b === null) || sign * (a - b));
    }
    list.append(...sorted.map(([, item]) => item));
    for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.order === order);
    status.textContent =
      order === "original"
        ? "Original order."
        : `${order === "best" ? "Best" : "Worst"} first, by ${named(metric)} of ${named(method)}: ${sorted[0][1].dataset.name}.`;
  };
  const pressed = () => buttons.find((button) => button.getAttribute("aria-pressed") === "true").dataset.order;

  if (original.length > 1) document.querySelector(".sorting").hidden = false;
  for (const button of buttons) button.addEventListener("click", () => sort(button.dataset.order));
  for (const select of [method, metric]) {
    select.addEventListener("change", () => sort(pressed() === "original" ? "worst" : pressed()));
  }

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const each of opened) each.open = true;
  });
  addEventListener("afterprint", () => {
    for (const each of opened) each.open = false;
  });
})();
