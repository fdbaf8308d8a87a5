// An exported network in the browser: fetched when it is first asked, and run by onnxruntime-web.

const here = name => new URL(name, import.meta.url).href;
const opened = new Map();  // name of a file -> promise
let runtime;

async function loadRuntime() {
  const ort = await import(here("runtime/ort.js"));
  const wasm = await fetch(here("runtime/ort.wasm"));
  if (!wasm.ok) throw new Error(`runtime/ort.wasm: ${wasm.status} ${wasm.statusText}`);
  ort.env.wasm.wasmBinary = await wasm.arrayBuffer();
  ort.env.wasm.numThreads = 1;  // more would need headers that a plain server doesn't send
  ort.env.logLevel = "error";
  return ort;
}

async function open(file) {
  runtime ??= loadRuntime();
  const ort = await runtime;
  return ort.InferenceSession.create(here(file), { executionProviders: ["wasm"] });
}

function floats(pictures) {  // Uint8Arrays of one length -> Float32Array in [0, 1]
  const length = pictures[0].length, all = new Float32Array(pictures.length * length);
  pictures.forEach((p, i) => all.set(Float32Array.from(p, v => v / 255), i * length));
  return all;
}

export async function ask(network, support, labels, query) {
  // pixels of the examples, their classes from 0, pixels of the query
  // -> {name of an output: {data, dims}}
  if (!opened.has(network.file)) opened.set(network.file, open(network.file));
  let session;
  try { session = await opened.get(network.file); }
  catch (error) {
    opened.delete(network.file);  // the next try begins anew
    runtime = undefined;
    throw error;
  }
  const ort = await runtime, { channels, size } = network;
  const images = list => new ort.Tensor("float32", floats(list), [list.length, channels, size, size]);
  const numbers = BigInt64Array.from(labels, BigInt);
  return session.run({
    support: images(support),
    labels: new ort.Tensor("int64", numbers, [labels.length]),
    query: images([query]),
  });
}
