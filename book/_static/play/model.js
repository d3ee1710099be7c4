"use strict";
// A transformer with LoRA, from token ids to logits, in plain JavaScript.
//
// Qwen2's architecture, as in nano: RMSNorm, rotary positions, grouped-query attention with biases on q, k and v,
// SwiGLU, an embedding that is also the head. All numbers are fp32. n tokens go through at once; their activations lie
// in one array, token after token: [n, width].

/** y = x Wᵀ + b.  x: [n, inputs], W: [outputs, inputs], b: [outputs] or null → [n, outputs]. */
function matmul(x, n, W, outputs, b = null) {
  const inputs = W.length / outputs, y = new Float32Array(n * outputs);
  const tokens = n - (n % 4), pairs = outputs - (outputs % 2);
  // Tiles of four tokens and two outputs: each number that is fetched is used more than once.
  for (let t = 0; t < tokens; t += 4) {
    const x0 = t * inputs, x1 = x0 + inputs, x2 = x1 + inputs, x3 = x2 + inputs;
    for (let o = 0; o < pairs; o += 2) {
      const row = o * inputs, next = row + inputs;
      let a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
      for (let i = 0; i < inputs; i++) {
        const w = W[row + i], v = W[next + i], p = x[x0 + i], q = x[x1 + i], r = x[x2 + i], s = x[x3 + i];
        a0 += w * p, a1 += w * q, a2 += w * r, a3 += w * s;
        b0 += v * p, b1 += v * q, b2 += v * r, b3 += v * s;
      }
      const first = t * outputs + o;
      [a0, a1, a2, a3].forEach((sum, i) => (y[first + i * outputs] = sum));
      [b0, b1, b2, b3].forEach((sum, i) => (y[first + i * outputs + 1] = sum));
    }
  }
  // What is left: all of a single token, when one is written after the other.
  for (let t = 0; t < n; t++) {
    for (let o = t < tokens ? pairs : 0; o < outputs; o++) y[t * outputs + o] = dot(x, t * inputs, W, o * inputs, inputs);
  }
  if (b) for (let i = 0; i < y.length; i++) y[i] += b[i % outputs];
  return y;
}

/** Σ x[from + i] · w[row + i], in four sums that the processor can add to at once. */
function dot(x, from, w, row, count) {
  let s0 = 0, s1 = 0, s2 = 0, s3 = 0, i = 0;
  for (; i + 4 <= count; i += 4) {
    s0 += x[from + i] * w[row + i];
    s1 += x[from + i + 1] * w[row + i + 1];
    s2 += x[from + i + 2] * w[row + i + 2];
    s3 += x[from + i + 3] * w[row + i + 3];
  }
  for (; i < count; i++) s0 += x[from + i] * w[row + i];
  return s0 + s1 + s2 + s3;
}

/** x / √(mean x² + ε) · weight, token by token. */
function rmsNorm(x, n, weight, epsilon) {
  const width = weight.length, y = new Float32Array(x.length);
  for (let t = 0; t < n; t++) {
    let squares = 0;
    for (let i = 0; i < width; i++) squares += x[t * width + i] ** 2;
    const scale = 1 / Math.sqrt(squares / width + epsilon);
    for (let i = 0; i < width; i++) y[t * width + i] = x[t * width + i] * scale * weight[i];
  }
  return y;
}

/** Turns each pair (x_i, x_{i + half}) of each head by the angle position · θ^(−2i / size), in place. */
function rotate(x, n, heads, size, theta, past) {
  const half = size / 2;
  for (let i = 0; i < half; i++) {
    const frequency = theta ** (-i / half);
    for (let t = 0; t < n; t++) {
      const cos = Math.cos((past + t) * frequency), sin = Math.sin((past + t) * frequency);
      for (let h = 0; h < heads; h++) {
        const a = (t * heads + h) * size + i, b = a + half;
        const first = x[a], second = x[b];
        x[a] = first * cos - second * sin;
        x[b] = second * cos + first * sin;
      }
    }
  }
}

/** numbers[from … from + count) → e^number / Σ e^number, in place. */
function softmax(numbers, from = 0, count = numbers.length) {
  let largest = -Infinity, sum = 0;
  for (let i = from; i < from + count; i++) largest = Math.max(largest, numbers[i]);
  for (let i = from; i < from + count; i++) sum += numbers[i] = Math.exp(numbers[i] - largest);
  for (let i = from; i < from + count; i++) numbers[i] /= sum;
  return numbers;
}

class Nano {
  /**
   * config: as in nano's config.json.   weights: name → Float32Array.
   * adapter: null, or what adapters.js makes: the factors of each linear layer, and routers if it holds experts.
   */
  constructor(config, weights) {
    this.config = config;
    this.weights = weights;
    this.adapter = null;
  }

  /** The keys and values of the tokens so far, for each layer. */
  newCache() {
    const c = this.config, width = (c.hidden_size / c.num_attention_heads) * c.num_key_value_heads;
    const room = () => new Float32Array(c.max_position_embeddings * width);
    const layers = Array.from({ length: c.num_hidden_layers }, () => ({ keys: room(), values: room() }));
    return { length: 0, layers };
  }

  /**
   * Runs tokens that follow those in the cache, and adds them to it.
   * Returns logits [n, vocabulary], or [1, vocabulary] of the last token alone, and the gates of each layer.
   */
  forward(ids, cache, every = false) {
    const c = this.config, w = this.weights, n = ids.length, width = c.hidden_size;
    let x = new Float32Array(n * width);
    const embedding = w["model.embed_tokens.weight"];
    ids.forEach((id, t) => x.set(embedding.subarray(id * width, (id + 1) * width), t * width));
    const gates = [];
    for (let l = 0; l < c.num_hidden_layers; l++) {
      const block = `model.layers.${l}.`;
      if (this.adapter?.routers) gates.push(route(x, n, this.adapter.routers[l], width));
      const g = gates[l];
      const h = rmsNorm(x, n, w[block + "input_layernorm.weight"], c.rms_norm_eps);
      add(x, this.attention(block + "self_attn.", h, n, cache.layers[l], cache.length, g));
      const m = rmsNorm(x, n, w[block + "post_attention_layernorm.weight"], c.rms_norm_eps);
      add(x, this.mlp(block + "mlp.", m, n, g));
    }
    cache.length += n;
    if (!every) x = x.subarray((n - 1) * width);
    const rows = every ? n : 1;
    const last = rmsNorm(x, rows, w["model.norm.weight"], c.rms_norm_eps);
    return { logits: matmul(last, rows, embedding, c.vocab_size), gates };
  }

  /** A frozen linear layer and its LoRA: y = W x + b + B (g ∘ A x). Scale and weights are inside B already. */
  linear(name, x, n, gates) {
    const W = this.weights[name + ".weight"], b = this.weights[name + ".bias"] ?? null;
    const factors = this.adapter?.layers[name];
    const outputs = W.length / (x.length / n);
    const y = matmul(x, n, W, outputs, b);
    if (!factors) return y;
    const h = matmul(x, n, factors.A, factors.r); // [n, r]: down to the rank …
    if (gates) weigh(h, n, factors.r, gates);
    return add(y, matmul(h, n, factors.B, outputs)); // … and up again; B A is never formed
  }

  attention(block, x, n, { keys, values }, past, gates) {
    const c = this.config, heads = c.num_attention_heads, groups = c.num_key_value_heads;
    const size = c.hidden_size / heads, shared = heads / groups, theta = c.rope_parameters.rope_theta;
    const q = this.linear(block + "q_proj", x, n, gates), k = this.linear(block + "k_proj", x, n, gates);
    rotate(q, n, heads, size, theta, past);
    rotate(k, n, groups, size, theta, past);
    keys.set(k, past * groups * size);
    values.set(this.linear(block + "v_proj", x, n, gates), past * groups * size);
    const mixed = new Float32Array(n * heads * size), scores = new Float32Array(past + n);
    for (let t = 0; t < n; t++) {
      const seen = past + t + 1; // a token sees itself and what was before it
      for (let h = 0; h < heads; h++) {
        const query = (t * heads + h) * size, group = Math.floor(h / shared) * size;
        for (let s = 0; s < seen; s++) {
          scores[s] = dot(q, query, keys, s * groups * size + group, size) / Math.sqrt(size);
        }
        softmax(scores, 0, seen);
        for (let s = 0; s < seen; s++) {
          for (let i = 0; i < size; i++) mixed[query + i] += scores[s] * values[s * groups * size + group + i];
        }
      }
    }
    return this.linear(block + "o_proj", mixed, n, gates);
  }

  /** SwiGLU: down(silu(gate x) ∘ up x). */
  mlp(block, x, n, gates) {
    const gate = this.linear(block + "gate_proj", x, n, gates), up = this.linear(block + "up_proj", x, n, gates);
    for (let i = 0; i < gate.length; i++) gate[i] = (gate[i] / (1 + Math.exp(-gate[i]))) * up[i];
    return this.linear(block + "down_proj", gate, n, gates);
  }
}

/** The gates of a block's experts, from what enters the block: softmax(R x / ‖x‖).  R: [experts, width] → [n, experts]. */
function route(x, n, R, width) {
  const experts = R.length / width, gates = matmul(x, n, R, experts);
  for (let t = 0; t < n; t++) {
    const length = Math.hypot(...x.subarray(t * width, (t + 1) * width));
    for (let e = 0; e < experts; e++) gates[t * experts + e] /= length;
    softmax(gates, t * experts, experts);
  }
  return gates;
}

/** Each expert's part of A x times its gate, in place; experts of one rank lie side by side. */
function weigh(h, n, r, gates) {
  const experts = gates.length / n, each = r / experts;
  for (let t = 0; t < n; t++) for (let i = 0; i < r; i++) h[t * r + i] *= gates[t * experts + Math.floor(i / each)];
}

/** x + y, in place. */
function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
  return x;
}
