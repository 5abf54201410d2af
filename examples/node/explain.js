// Explain a photograph, score the map, and print the details of an error. The example uses only the files in proto/.
//
//   npm ci
//   node explain.js dog.jpg 127.0.0.1:50051 [METHOD]
//
// CAMSERVE_TOKEN is sent as a bearer token. CAMSERVE_CA names a PEM file and enables TLS.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const at = (path) => fileURLToPath(new URL(path, import.meta.url));
const types = protoLoader.loadSync(["camserve/v1/explain.proto", at("../google_rpc.proto")], {
  includeDirs: [at("../../proto")],
  keepCase: true, // keep the field names of the .proto files
  longs: Number,
  defaults: true,
});
const { ExplainService } = grpc.loadPackageDefinition(types).camserve.v1;

const MESSAGE_BYTES = 64 * 1024 * 1024; // the limit of the server; gRPC's default is too small for photographs
const SERVICE_CONFIG = {
  methodConfig: [
    {
      name: [{ service: "camserve.v1.ExplainService" }],
      retryPolicy: {
        maxAttempts: 4,
        initialBackoff: "0.1s",
        maxBackoff: "2s",
        backoffMultiplier: 4,
        retryableStatusCodes: ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
      },
    },
  ],
};

function connect(address) {
  const ca = process.env.CAMSERVE_CA;
  const credentials = ca ? grpc.credentials.createSsl(readFileSync(ca)) : grpc.credentials.createInsecure();
  return new ExplainService(address, credentials, {
    "grpc.max_send_message_length": MESSAGE_BYTES,
    "grpc.max_receive_message_length": MESSAGE_BYTES,
    "grpc.service_config": JSON.stringify(SERVICE_CONFIG),
  });
}

function call(client, method, request, timeoutSeconds = 300) {
  const metadata = new grpc.Metadata();
  if (process.env.CAMSERVE_TOKEN) metadata.set("authorization", `Bearer ${process.env.CAMSERVE_TOKEN}`);
  const deadline = Date.now() + 1000 * timeoutSeconds;
  return new Promise((resolve, reject) =>
    client[method](request, metadata, { deadline }, (error, answer) => (error ? reject(error) : resolve(answer))),
  );
}

// Return the details of the google.rpc.Status in the trailing metadata, by name: ErrorInfo, BadRequest and so on.
function details(error) {
  const [packed] = error.metadata?.get("grpc-status-details-bin") ?? [];
  if (!packed) return {};
  const entries = types["google.rpc.Status"].deserialize(packed).details.map(({ type_url, value }) => {
    const name = type_url.split("/").pop();
    return [name.replace("google.rpc.", ""), types[name]?.deserialize(value)];
  });
  return Object.fromEntries(entries);
}

// Return the numbers of a Tensor in row-major order.
function floats({ shape, data }) {
  const bytes = new Uint8Array(data); // a copy, which is aligned
  return { shape, values: new Float32Array(bytes.buffer) };
}

const print = (what, value) => console.log(`${what}: ${JSON.stringify(value)}`);
const describe = ({ target }) => ({ index: target.index, label: target.label, probability: target.probability });
const scores = (map) => Object.fromEntries(map.scores.map(({ metric, value }) => [metric, value]));

const [path, address = "127.0.0.1:50051", method = "grad-cam"] = process.argv.slice(2);
if (!path) {
  console.error("usage: node explain.js IMAGE [HOST:PORT] [METHOD]");
  process.exit(2);
}
const client = connect(address);
try {
  const image = { encoded: readFileSync(path) };
  const explained = await call(client, "Explain", {
    image,
    method: { name: method },
    metrics: [{ name: "average-drop" }],
  });
  const [map] = explained.maps;
  const { shape, values } = floats(map.saliency);
  print("target", describe(map));
  print("map", { shape, largest: values.reduce((a, b) => Math.max(a, b)) });
  print("scores", scores(map));
  print("cost", { rows: explained.cost.rows });

  // Score the map again, this time as a map from the caller.
  const evaluated = await call(client, "Evaluate", {
    image,
    saliency: map.saliency,
    target: { index: map.target.index },
    metrics: [{ name: "average-drop" }, { name: "insertion", parameters: { fields: { steps: { numberValue: 4 } } } }],
  });
  print("evaluated", scores(evaluated.map));

  const invalid = { name: "opti-cam", parameters: { fields: { steps: { numberValue: 0 } } } };
  try {
    await call(client, "Explain", { image, method: invalid });
  } catch (error) {
    const { ErrorInfo, BadRequest, RequestInfo } = details(error);
    print("error", {
      code: grpc.status[error.code],
      message: error.details,
      reason: ErrorInfo.reason,
      field: BadRequest.field_violations[0].field,
      request_id: RequestInfo.request_id,
    });
  }
} catch (error) {
  print("failed", { code: grpc.status[error.code], message: error.details ?? error.message, ...details(error) });
  process.exitCode = 1;
} finally {
  client.close();
}
