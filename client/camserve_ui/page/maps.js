// Colouring of maps on canvases. The formulas are those of camserve.heatmaps.

const view = { colours: [], opacity: 0.7, overlay: true };
const drawn = new Map(); // the map of each canvas

// Change the colours, the opacity or the layers of all maps.
export function show(change) {
  Object.assign(view, change);
  for (const canvas of drawn.keys()) paint(canvas);
}

export function draw(canvas, map) {
  drawn.set(canvas, map);
  paint(canvas);
}

export function forgetAll() {
  drawn.clear();
}

function paint(canvas) {
  const { height, width, values } = drawn.get(canvas);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const { data } = image;
  for (let i = 0, at = 0; i < values.length; i++) {
    const colour = view.colours[Math.round(255 * values[i])];
    // Regions of low saliency stay visible, and the image does not change where the map is 0.
    const opacity = view.overlay ? view.opacity * Math.sqrt(values[i]) : 1;
    data[at++] = colour[0];
    data[at++] = colour[1];
    data[at++] = colour[2];
    data[at++] = Math.round(255 * opacity);
  }
  context.putImageData(image, 0, 0);
}

export function drawLegend(canvas, colours) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(256, 1);
  colours.forEach((colour, i) => image.data.set([...colour, 255], 4 * i));
  context.putImageData(image, 0, 0);
}

// Save a picture of an image with the map that is shown on top, as a PNG file.
export async function save(image, canvas, name) {
  const { naturalWidth: width, naturalHeight: height } = image;
  const whole = Object.assign(document.createElement("canvas"), { width, height });
  const context = whole.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0);
  context.drawImage(canvas, 0, 0, width, height);
  const blob = await new Promise((resolve) => whole.toBlob(resolve, "image/png"));
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}
