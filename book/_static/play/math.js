"use strict";
// The arithmetic of a transformer on plain arrays: products, norms, rotations, softmax.
// n tokens go through at once; their activations lie in one array, token after token:
// [n, width]. All numbers are fp32.

/**
 * y = x Wᵀ + b.
 * x: [n, inputs], W: [outputs, inputs], b: [outputs] or null → [n, outputs].
 */
function matmul(x, n, W, outputs, b = null) {
  const inputs = W.length / outputs;
  const y = new Float32Array(n * outputs);
  // Tiles of four tokens and two outputs: each number is fetched once for several uses.
  const tokens = n - (n % 4);
  const pairs = outputs - (outputs % 2);
  for (let t = 0; t < tokens; t += 4) {
    const x0 = t * inputs, x1 = x0 + inputs, x2 = x1 + inputs, x3 = x2 + inputs;
    for (let o = 0; o < pairs; o += 2) {
      const row = o * inputs, next = row + inputs;
      let a0 = 0, a1 = 0, a2 = 0, a3 = 0;
      let b0 = 0, b1 = 0, b2 = 0, b3 = 0;
      for (let i = 0; i < inputs; i++) {
        const w = W[row + i], v = W[next + i];
        const p = x[x0 + i], q = x[x1 + i], r = x[x2 + i], s = x[x3 + i];
        a0 += w * p;
        a1 += w * q;
        a2 += w * r;
        a3 += w * s;
        b0 += v * p;
        b1 += v * q;
        b2 += v * r;
        b3 += v * s;
      }
      const first = t * outputs + o;
      [a0, a1, a2, a3].forEach((sum, i) => (y[first + i * outputs] = sum));
      [b0, b1, b2, b3].forEach((sum, i) => (y[first + i * outputs + 1] = sum));
    }
  }
  // What is left: all of a single token, when one is written after the other.
  for (let t = 0; t < n; t++) {
    for (let o = t < tokens ? pairs : 0; o < outputs; o++) {
      y[t * outputs + o] = dot(x, t * inputs, W, o * inputs, inputs);
    }
  }
  if (b) for (let i = 0; i < y.length; i++) y[i] += b[i % outputs];
  return y;
}

/** Σ x[from + i] · w[row + i], in four sums that the processor can add to at once. */
function dot(x, from, w, row, count) {
  let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  let i = 0;
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
  const width = weight.length;
  const y = new Float32Array(x.length);
  for (let t = 0; t < n; t++) {
    let squares = 0;
    for (let i = 0; i < width; i++) squares += x[t * width + i] ** 2;
    const scale = 1 / Math.sqrt(squares / width + epsilon);
    for (let i = 0; i < width; i++) {
      y[t * width + i] = x[t * width + i] * scale * weight[i];
    }
  }
  return y;
}

/**
 * Rotary positions, in place: each pair (x_i, x_{i + half}) of each head is turned by
 * the angle position · θ^(−2i / size).
 */
function rotate(x, n, heads, size, theta, past) {
  const half = size / 2;
  for (let i = 0; i < half; i++) {
    const frequency = theta ** (-i / half);
    for (let t = 0; t < n; t++) {
      const cos = Math.cos((past + t) * frequency);
      const sin = Math.sin((past + t) * frequency);
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
  for (let i = from; i < from + count; i++) {
    numbers[i] = Math.exp(numbers[i] - largest);
    sum += numbers[i];
  }
  for (let i = from; i < from + count; i++) numbers[i] /= sum;
  return numbers;
}

/** x + y, in place. */
function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
  return x;
}
