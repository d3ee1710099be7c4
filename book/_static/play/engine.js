"use strict";
// From settings to a model, from a model to text and to bits a byte. All of it in small
// pieces, so that the page stays awake.

const EXPERTS = PLAY.record.settings.domains;
const GROUP = PLAY.record.settings.group_size;
const DEFAULTS = {
  mode: "one", // "none", "one", "two" (merged), "routed"
  adapter: EXPERTS[1],
  rows: "svd", // which rows a cut keeps: "svd" (sorted), "trained" (as they were trained), "nested"
  rank: 16,
  bits: 32,
  per: "group", // what shares a step of the grid: "group" or "tensor"
  scale: 1,
  second: EXPERTS[3], // or "flipped": the first one with −A and −B
  share: 0.5,
  merge: "updates", // or "factors"
  baseBits: 32,
  basePer: "group",
};

/** nano was trained on pieces of 256 tokens: of a longer prompt the end is read. */
const READ = 200;

class Engine {
  constructor({ tokenizer, weights, adapters, routers }) {
    Object.assign(this, { tokenizer, weights, adapters, routers });
    this.bases = new Map();
  }

  /** One adapter, cut and rounded as the settings say. */
  prepared(name, { rows, rank, bits, per }) {
    const file =
      rows === "svd" ? name : rows === "nested" ? "nested" : `${name}-as-trained`;
    const adapter = cut(this.adapters[file], rank);
    return bits < 32
      ? quantizedAdapter(adapter, bits, per === "tensor" ? Infinity : GROUP)
      : adapter;
  }

  /**
   * What is added to nano's layers: cut, then rounded, then merged or routed, then
   * scaled.
   */
  adapterFor(s) {
    if (s.mode === "none") return null;
    if (s.mode === "routed") {
      const experts = EXPERTS.map((name) => this.prepared(name, { ...s, rows: "svd" }));
      return sideBySide(
        experts.map((expert) => scaled(expert, s.scale)),
        this.routers,
      );
    }
    const first = this.prepared(s.adapter, s);
    if (s.mode === "one") return s.scale === 1 ? first : scaled(first, s.scale);
    const second =
      s.second === "flipped"
        ? flipped(first)
        : this.prepared(s.second, { ...s, rows: "svd" });
    const merge = s.merge === "updates" ? averageUpdates : averageFactors;
    return scaled(merge(first, second, s.share), s.scale);
  }

  baseFor({ baseBits, basePer }) {
    if (baseBits >= 32) return this.weights;
    const key = `${baseBits} ${basePer}`;
    if (!this.bases.has(key)) {
      const layers = this.adapters[EXPERTS[0]].layers;
      const outputs = (name) => layers[name].B.length / layers[name].r;
      const group = basePer === "tensor" ? Infinity : GROUP;
      this.bases.clear(); // one rounded base at a time is enough
      this.bases.set(
        key,
        quantizedBase(this.weights, Object.keys(layers), baseBits, group, outputs),
      );
    }
    return this.bases.get(key);
  }

  /** nano with the adapter that the settings describe. */
  model(settings) {
    const s = { ...DEFAULTS, ...settings };
    const nano = new Nano(PLAY.config, this.baseFor(s));
    nano.adapter = this.adapterFor(s);
    return nano;
  }

  /** A text as token ids, after a start token; left: how many at its start are not read. */
  prompt(text) {
    const ids = this.tokenizer.encode(text);
    return { ids: [0, ...ids.slice(-READ)], left: Math.max(0, ids.length - READ) };
  }

  /**
   * Runs a prompt from the start of a document. Returns the last logits, the cache, and
   * the gates of each token.
   */
  async read(nano, ids, signal) {
    const cache = nano.newCache();
    const gates = [];
    let logits = null;
    for (let from = 0; from < ids.length; from += 16) {
      const piece = ids.slice(from, from + 16);
      const out = nano.forward(piece, cache);
      logits = out.logits;
      gates.push(...meanGates(out.gates, piece.length));
      await breathe(signal);
    }
    return { logits, cache, gates };
  }

  /**
   * Writes after a prompt, and calls token({ id, gates }) for each token, the prompt's
   * included.
   * Returns how many tokens a second it wrote.
   */
  async write(nano, prompt, { count, temperature, seed, signal, token }) {
    const { ids } = this.prompt(prompt);
    const random = randomFrom(seed);
    let { logits, cache, gates } = await this.read(nano, ids, signal);
    ids.slice(1).forEach((id, i) => token({ id, gates: gates[i + 1], given: true }));
    const began = performance.now();
    let written = 0;
    while (written < count) {
      const id = sample(logits, temperature, 0.95, random());
      if (id === 0) break; // the end of the document
      const out = nano.forward([id], cache);
      logits = out.logits;
      token({ id, gates: meanGates(out.gates, 1)[0], given: false });
      written++;
      await breathe(signal);
    }
    return (1000 * written) / (performance.now() - began);
  }

  /**
   * The likeliest answer to a task's question, asked as in training: `plural: Haus (n)
   * ->`, or with its letters apart, `pronunciation: c a t ->`.
   */
  async answer(nano, task, question, signal) {
    const ids = [];
    const token = ({ id, given }) => given || ids.push(id);
    const apart = PLAY.record.settings.apart.includes(task);
    const asked = apart ? [...question].join(" ") : question;
    await this.write(nano, `${task}: ${asked} ->`, {
      count: 40,
      temperature: 0,
      seed: 0,
      signal,
      token,
    });
    return this.tokenizer.decode(ids).trim();
  }

  /**
   * Bits of each token of a text, as `lab.bits_per_byte` counts: after a start token,
   * in windows of 256 that don't overlap. progress: called with the share that is done.
   * Returns { ids, bits, bytes, perByte }.
   */
  async score(nano, text, signal, progress = () => {}) {
    const ids = [0, ...this.tokenizer.encode(text)];
    const bits = [];
    const size = PLAY.config.vocab_size;
    for (let window = 0; window + 1 < ids.length; window += 256) {
      const cache = nano.newCache();
      const end = Math.min(window + 256, ids.length - 1);
      for (let from = window; from < end; from += 16) {
        const piece = ids.slice(from, Math.min(from + 16, end));
        const { logits } = nano.forward(piece, cache, true);
        piece.forEach((_, i) =>
          bits.push(
            bitsOf(logits.subarray(i * size, (i + 1) * size), ids[from + i + 1]),
          ),
        );
        progress(end / (ids.length - 1));
        await breathe(signal);
      }
    }
    const bytes = new TextEncoder().encode(text).length;
    return {
      ids: ids.slice(1),
      bits,
      bytes,
      perByte: bits.reduce((a, b) => a + b, 0) / bytes,
    };
  }
}

/** −log₂ softmax(logits)[id]. */
function bitsOf(logits, id) {
  let largest = -Infinity;
  let sum = 0;
  for (const value of logits) if (value > largest) largest = value;
  for (const value of logits) sum += Math.exp(value - largest);
  return (Math.log(sum) + largest - logits[id]) / Math.LN2;
}

/**
 * A token drawn from the nucleus: the likeliest tokens that together hold topP. draw:
 * in [0, 1). At temperature 0 the first.
 */
function sample(logits, temperature, topP, draw) {
  if (temperature === 0) return logits.indexOf(Math.max(...logits));
  const probabilities = softmax(
    Float64Array.from(logits, (value) => value / temperature),
  );
  const order = [...probabilities.keys()].sort(
    (a, b) => probabilities[b] - probabilities[a],
  );
  let kept = 0;
  let sum = 0;
  while (sum < topP) sum += probabilities[order[kept++]];
  let left = draw * sum;
  for (let i = 0; i < kept; i++)
    if ((left -= probabilities[order[i]]) < 0) return order[i];
  return order[kept - 1];
}

/** Gates of each token, mean over the blocks: [tokens][experts]. */
function meanGates(blocks, tokens) {
  if (!blocks.length) return Array(tokens).fill(null);
  const experts = blocks[0].length / tokens;
  return Array.from({ length: tokens }, (_, t) =>
    Array.from(
      { length: experts },
      (_, e) => blocks.reduce((sum, g) => sum + g[t * experts + e], 0) / blocks.length,
    ),
  );
}

/**
 * Numbers in [0, 1) from a seed (mulberry32): the same for every setting, so that only
 * the setting makes a difference.
 */
function randomFrom(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Lets the browser draw and answer keys; stops what was cancelled. */
function breathe(signal) {
  return new Promise((resolve, reject) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => {
      channel.port1.close();
      if (signal?.aborted) reject(signal.reason);
      else resolve();
    };
    channel.port2.postMessage(0);
  });
}
