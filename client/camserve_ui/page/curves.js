// A chart of the insertion and the deletion curve.

const SVG = "http://www.w3.org/2000/svg";
const [LEFT, TOP, WIDTH, HEIGHT] = [30, 8, 185, 105];

function element(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

const x = (share) => LEFT + WIDTH * share;
const y = (probability) => TOP + HEIGHT * (1 - Math.min(Math.max(probability, 0), 1));

// Return an SVG element for scores by metric: { insertion: { value, curve }, deletion: … }.
export function chart(scores) {
  const label = Object.entries(scores).map(([name, { value }]) => `${name} ${value.toFixed(3)}`).join(", ");
  const svg = element("svg", { viewBox: `0 0 ${LEFT + WIDTH + 8} ${TOP + HEIGHT + 34}`, role: "img", "aria-label": `Curves: ${label}` });
  for (const level of [0, 0.5, 1]) {
    svg.append(element("line", { x1: x(0), x2: x(1), y1: y(level), y2: y(level), class: "grid" }));
    svg.append(element("text", { x: LEFT - 6, y: y(level) + 4, "text-anchor": "end" }, String(level)));
  }
  for (const share of [0, 0.5, 1]) {
    const anchor = { 0: "start", 0.5: "middle", 1: "end" }[share];
    svg.append(element("text", { x: x(share), y: TOP + HEIGHT + 14, "text-anchor": anchor }, `${100 * share} %`));
  }
  svg.append(element("text", { x: x(0.5), y: TOP + HEIGHT + 29, "text-anchor": "middle" }, "pixels inserted or deleted"));
  for (const [name, { curve }] of Object.entries(scores)) {
    const points = curve.map((value, i) => `${x(i / Math.max(curve.length - 1, 1)).toFixed(1)},${y(value).toFixed(1)}`);
    svg.append(element("polyline", { points: points.join(" "), class: `curve ${name}` }));
  }
  return svg;
}
