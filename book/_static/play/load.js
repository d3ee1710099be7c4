"use strict";
// Brings the weights in when the reader asks for them: scripts that hand over text, as
// a page opened from a file may read no other file. What they hold is described in
// tools/playpage/pack.py.

const playData = {};
const playFolder = new URL("data/", document.currentScript.src);

/** Called by each script in data/. */
function receivePlayData(bundle, index, content) {
  (playData[bundle] ??= [])[index] = content;
}

function loadScript(name) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL(name, playFolder);
    script.onload = () => resolve(script.remove());
    script.onerror = () => reject(new Error(`${name} is missing. Reload the page to try again.`));
    document.head.append(script);
  });
}

/**
 * Base 85 (RFC 1924's alphabet, as Python's b85encode): five characters hold four
 * bytes.
 */
function decode85(text) {
  const alphabet =
    "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~";
  const values = new Uint8Array(128);
  [...alphabet].forEach(
    (character, value) => (values[character.charCodeAt(0)] = value),
  );
  const missing = -text.length % 5 ? 5 - (text.length % 5) : 0;
  const padded = text + "~".repeat(missing);
  const bytes = new DataView(new ArrayBuffer((padded.length / 5) * 4));
  for (let i = 0, at = 0; i < padded.length; i += 5, at += 4) {
    let number = 0;
    for (let j = 0; j < 5; j++) number = number * 85 + values[padded.charCodeAt(i + j)];
    bytes.setUint32(at, number);
  }
  return new Uint8Array(bytes.buffer, 0, bytes.byteLength - missing);
}

/** One bundle's tensors by name, fp32. */
async function unpackBundle(name) {
  const pieces = playData[name].map(decode85);
  delete playData[name];
  const inflated = new Blob(pieces)
    .stream()
    .pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(inflated).arrayBuffer());
  const count = planes.length / 2;
  const bits = new Uint32Array(count);
  const numbers = new Float32Array(bits.buffer);
  // bf16 is the upper half of fp32: all first bytes came first, then all second ones.
  for (let i = 0; i < count; i++)
    bits[i] = ((planes[i] << 24) | (planes[count + i] << 16)) >>> 0;
  const tensors = {};
  let at = 0;
  for (const [key, shape] of PLAY.bundles[name].tensors) {
    const size = shape.reduce((a, b) => a * b);
    tensors[key] = numbers.subarray(at, (at += size));
  }
  return tensors;
}

/** All that the page needs. progress: called with the share that has come, 0 … 1. */
async function loadPlay(progress) {
  if (!globalThis.DecompressionStream)
    throw new Error("This browser can't unpack it: one of May 2023 or later can.");
  const names = [
    "tokenizer-0.js",
    ...Object.values(PLAY.bundles).flatMap((bundle) => bundle.pieces),
  ];
  let come = 0;
  await Promise.all(
    names.map((name) => loadScript(name).then(() => progress(++come / names.length))),
  );
  const tokenizer = new NanoTokenizer(playData.tokenizer[0]);
  const [weights, factors] = await Promise.all([
    unpackBundle("nano"),
    unpackBundle("adapters"),
  ]);
  const adapters = {};
  for (const { key, shape } of PLAY.bundles.adapters.tensors.map(([key, shape]) => ({
    key,
    shape,
  }))) {
    const [name, path] = key.split("/");
    const module = path.slice(0, path.lastIndexOf("."));
    const layer = ((adapters[name] ??= { layers: {} }).layers[module] ??= {});
    layer[path.slice(path.lastIndexOf(".") + 1)] = factors[key];
    if (path.endsWith(".A")) layer.r = shape[0];
  }
  const routers = Object.values(adapters.router.layers).map((layer) => layer.router);
  delete adapters.router;
  return { tokenizer, weights, adapters, routers };
}
