"use strict";
// A transformer with LoRA, from token ids to logits.
//
// Qwen2's architecture, as in nano: RMSNorm, rotary positions, grouped-query attention
// with biases on q, k and v, SwiGLU, and an embedding that is also the head.

class Nano {
  /**
   * config: as in nano's config.json.   weights: name → Float32Array.
   * adapter: null, or what adapters.js makes: the factors of each linear layer, and
   * routers if it holds experts.
   */
  constructor(config, weights) {
    this.config = config;
    this.weights = weights;
    this.adapter = null;
  }

  /** The keys and values of the tokens so far, for each layer. */
  newCache() {
    const c = this.config;
    const width = (c.hidden_size / c.num_attention_heads) * c.num_key_value_heads;
    const room = () => new Float32Array(c.max_position_embeddings * width);
    const layer = () => ({ keys: room(), values: room() });
    return { length: 0, layers: Array.from({ length: c.num_hidden_layers }, layer) };
  }

  /**
   * Runs tokens that follow those in the cache, and adds them to it.
   * Returns logits [n, vocabulary], or [1, vocabulary] of the last token alone, and the
   * gates of each layer.
   */
  forward(ids, cache, every = false) {
    const c = this.config;
    const n = ids.length;
    const norm = (x, rows, name) =>
      rmsNorm(x, rows, this.weights[name + ".weight"], c.rms_norm_eps);
    const x = this.embed(ids);
    const gates = [];
    for (let l = 0; l < c.num_hidden_layers; l++) {
      const block = `model.layers.${l}.`;
      if (this.adapter?.routers) gates.push(route(x, n, this.adapter.routers[l]));
      const h = norm(x, n, block + "input_layernorm");
      const seen = { ...cache.layers[l], past: cache.length };
      add(x, this.attention(block + "self_attn.", h, n, seen, gates[l]));
      const m = norm(x, n, block + "post_attention_layernorm");
      add(x, this.mlp(block + "mlp.", m, n, gates[l]));
    }
    cache.length += n;
    const rows = every ? n : 1;
    const last = norm(x.subarray((n - rows) * c.hidden_size), rows, "model.norm");
    const head = this.weights["model.embed_tokens.weight"]; // the embedding, once more
    return { logits: matmul(last, rows, head, c.vocab_size), gates };
  }

  /** A row of the embedding for each token: [n, width]. */
  embed(ids) {
    const width = this.config.hidden_size;
    const table = this.weights["model.embed_tokens.weight"];
    const x = new Float32Array(ids.length * width);
    ids.forEach((id, t) => {
      x.set(table.subarray(id * width, (id + 1) * width), t * width);
    });
    return x;
  }

  /**
   * A frozen linear layer and its LoRA: y = W x + b + B (g ∘ A x). Scale and weights
   * are inside B already.
   */
  linear(name, x, n, gates) {
    const W = this.weights[name + ".weight"];
    const b = this.weights[name + ".bias"] ?? null;
    const factors = this.adapter?.layers[name];
    const outputs = W.length / (x.length / n);
    const y = matmul(x, n, W, outputs, b);
    if (!factors) return y;
    const h = matmul(x, n, factors.A, factors.r); // [n, r]: down to the rank,
    if (gates) weigh(h, n, factors.r, gates);
    return add(y, matmul(h, n, factors.B, outputs)); // and up again: no B A is formed
  }

  /** Grouped-query attention; keys and values of n more tokens go into the cache. */
  attention(block, x, n, { keys, values, past }, gates) {
    const c = this.config;
    const heads = c.num_attention_heads, groups = c.num_key_value_heads;
    const size = c.hidden_size / heads, shared = heads / groups;
    const theta = c.rope_parameters.rope_theta;
    const q = this.linear(block + "q_proj", x, n, gates);
    const k = this.linear(block + "k_proj", x, n, gates);
    rotate(q, n, heads, size, theta, past);
    rotate(k, n, groups, size, theta, past);
    keys.set(k, past * groups * size);
    values.set(this.linear(block + "v_proj", x, n, gates), past * groups * size);
    const mixed = new Float32Array(n * heads * size);
    const scores = new Float32Array(past + n);
    for (let t = 0; t < n; t++) {
      const seen = past + t + 1; // a token sees itself and what was before it
      for (let h = 0; h < heads; h++) {
        const query = (t * heads + h) * size;
        const group = Math.floor(h / shared); // two heads share keys and values
        for (let s = 0; s < seen; s++) {
          const key = (s * groups + group) * size;
          scores[s] = dot(q, query, keys, key, size) / Math.sqrt(size);
        }
        softmax(scores, 0, seen);
        for (let s = 0; s < seen; s++) {
          const value = (s * groups + group) * size;
          for (let i = 0; i < size; i++) {
            mixed[query + i] += scores[s] * values[value + i];
          }
        }
      }
    }
    return this.linear(block + "o_proj", mixed, n, gates);
  }

  /** SwiGLU: down(silu(gate x) ∘ up x). */
  mlp(block, x, n, gates) {
    const gate = this.linear(block + "gate_proj", x, n, gates);
    const up = this.linear(block + "up_proj", x, n, gates);
    for (let i = 0; i < gate.length; i++) {
      gate[i] = (gate[i] / (1 + Math.exp(-gate[i]))) * up[i];
    }
    return this.linear(block + "down_proj", gate, n, gates);
  }
}

/**
 * The gates of a block's experts, from what enters the block: softmax(R x / ‖x‖).
 * x: [n, width], R: [experts, width] → [n, experts].
 */
function route(x, n, R) {
  const width = x.length / n, experts = R.length / width;
  const gates = matmul(x, n, R, experts);
  for (let t = 0; t < n; t++) {
    const length = Math.hypot(...x.subarray(t * width, (t + 1) * width));
    for (let e = 0; e < experts; e++) gates[t * experts + e] /= length;
    softmax(gates, t * experts, experts);
  }
  return gates;
}

/** Each expert's part of A x times its gate, in place; experts lie side by side. */
function weigh(h, n, r, gates) {
  const experts = gates.length / n, each = r / experts;
  for (let t = 0; t < n; t++) {
    for (let i = 0; i < r; i++) {
      h[t * r + i] *= gates[t * experts + Math.floor(i / each)];
    }
  }
}
