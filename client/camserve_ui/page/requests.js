// Requests to the page's own web server.

// An error with the description that the server gave (see problems.py).
export class Problem extends Error {
  constructor(problem) {
    super(problem.title);
    this.problem = problem;
  }
}

// The process `camserve ui` itself does not respond.
const STOPPED = {
  title: "camserve ui has stopped.",
  detail: "The web server of this page does not respond.",
  remedy: "Start it again; the page connects by itself.",
  field: "",
  choices: [],
  unavailable: true,
};

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(STOPPED);
  }
  if (!response.ok) {
    const answer = await response.json().catch(() => ({}));
    throw new Problem(answer.problem ?? { ...STOPPED, title: `The page's web server responds with status ${response.status}.` });
  }
  return response;
}

export const get = async (path) => (await send(path, {})).json();

export const blob = async (path) => (await send(path, {})).blob();

const post = (path, fields, parts, signal) =>
  send(path, {
    method: "POST",
    headers: { "content-type": "application/octet-stream" },
    body: new Blob([JSON.stringify(fields), "\n", ...parts]),
    signal,
  });

// Send a file and return its description.
export const upload = async (fields, file, signal) => (await post("api/image", fields, [file], signal)).json();

// Send a request and yield the events of the response.
export async function* stream(path, fields, parts, signal) {
  const response = await post(path, fields, parts, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      const lines = text.split("\n");
      text = lines.pop();
      for (const line of lines) yield JSON.parse(line);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(STOPPED);
  } finally {
    reader.cancel().catch(() => {});
  }
}

export function bytes(base64) {
  return Uint8Array.from(atob(base64), (each) => each.charCodeAt(0));
}

// A map as { height, width, values: Float32Array }.
export function decodeMap({ height, width, values }) {
  return { height, width, values: new Float32Array(bytes(values).buffer) };
}
