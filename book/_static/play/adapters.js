"use strict";
// What one does with adapters. An adapter here: { layers: { "<module>": { A: [r, in],
// B: [out, r], r } } }, its update is B A, and its scale lies in B. Factors of the
// course's plain adapters are sorted: the first component weighs most.

function mapLayers(adapter, change) {
  const layers = {};
  for (const name in adapter.layers) layers[name] = change(adapter.layers[name], name);
  return { layers };
}

/**
 * The first r rows of A and columns of B: of sorted factors the best cut to that rank
 * (the truncated SVD of B A).
 */
function cut(adapter, r) {
  return mapLayers(adapter, ({ A, B, r: whole }) => {
    if (r >= whole) return { A, B, r: whole };
    const outputs = B.length / whole;
    const columns = new Float32Array(outputs * r);
    for (let o = 0; o < outputs; o++)
      columns.set(B.subarray(o * whole, o * whole + r), o * r);
    return { A: A.subarray(0, (A.length / whole) * r), B: columns, r };
  });
}

/** s · B A. */
function scaled(adapter, s) {
  return mapLayers(adapter, ({ A, B, r }) => ({ A, B: B.map((b) => s * b), r }));
}

/** The same update, other factors: (−B)(−A) = B A. */
function flipped(adapter) {
  return mapLayers(adapter, ({ A, B, r }) => ({
    A: A.map((a) => -a),
    B: B.map((b) => -b),
    r,
  }));
}

/**
 * The right merge: w ΔW₁ + (1 − w) ΔW₂. Rows of A one below the other, columns of B
 * side by side: the ranks add up.
 */
function averageUpdates(first, second, w) {
  return sideBySide([scaled(first, w), scaled(second, 1 - w)]);
}

/**
 * The wrong merge: both factors averaged. (w B₁ + (1 − w) B₂)(w A₁ + (1 − w) A₂) holds
 * B₁A₂ and B₂A₁, which nobody trained.
 */
function averageFactors(first, second, w) {
  const mean = (x, y) => x.map((value, i) => w * value + (1 - w) * y[i]);
  return mapLayers(first, ({ A, B, r }, name) => {
    const other = second.layers[name];
    if (other.r !== r)
      throw new Error(`factors of rank ${r} and ${other.r} can't be averaged`);
    return { A: mean(A, other.A), B: mean(B, other.B), r };
  });
}

/**
 * One adapter whose update is the sum; with routers a gate weighs each one's part (see
 * `weigh`).
 */
function sideBySide(adapters, routers = null) {
  const joined = mapLayers(adapters[0], (_, name) => {
    const parts = adapters.map((adapter) => adapter.layers[name]);
    const r = parts.reduce((sum, part) => sum + part.r, 0);
    const outputs = parts[0].B.length / parts[0].r;
    const inputs = parts[0].A.length / parts[0].r;
    const A = new Float32Array(r * inputs);
    const B = new Float32Array(outputs * r);
    let row = 0;
    for (const part of parts) {
      A.set(part.A, row * inputs);
      for (let o = 0; o < outputs; o++)
        B.set(part.B.subarray(o * part.r, (o + 1) * part.r), o * r + row);
      row += part.r;
    }
    return { A, B, r };
  });
  return routers ? { ...joined, routers } : joined;
}

/**
 * Q(x) = Δ · round(x / Δ), Δ = max |x| / (2^(bits − 1) − 1), rounded to even as torch
 * does; Δ keeps 16 significant bits, rounded up. `group`: how many numbers of a row
 * share a Δ; Infinity gives one Δ to the whole matrix (per tensor).
 */
function quantized(x, rows, bits, group) {
  if (bits >= 32) return x;
  const length = x.length / rows;
  const top = 2 ** (bits - 1) - 1;
  const y = new Float32Array(x.length);
  const size = group === Infinity ? x.length : Math.min(group, length);
  // a group does not go on into the next row
  const stretch = group === Infinity ? x.length : length;
  const view = new DataView(new ArrayBuffer(4));
  for (let row = 0; row < x.length; row += stretch) {
    for (let from = row; from < row + stretch; from += size) {
      const to = Math.min(from + size, row + stretch);
      let largest = 0;
      for (let i = from; i < to; i++) largest = Math.max(largest, Math.abs(x[i]));
      view.setFloat32(0, Math.max(largest / top, 2 ** -126));
      view.setInt32(0, (view.getInt32(0) + 0xff) & ~0xff);
      const step = view.getFloat32(0);
      for (let i = from; i < to; i++)
        y[i] = roundToEven(Math.fround(x[i] / step)) * step;
    }
  }
  return y;
}

/**
 * Adding 1.5 · 2⁵² leaves no room for a fraction: the sum is rounded to the nearest
 * whole number, halves to even.
 */
function roundToEven(x) {
  const large = 1.5 * 2 ** 52;
  return x + large - large;
}

/**
 * Both factors rounded; scales are shared within a row of A and a column of B, which
 * belong to one component.
 */
function quantizedAdapter(adapter, bits, group) {
  return mapLayers(adapter, ({ A, B, r }) => ({
    A: quantized(A, r, bits, group),
    B: transposed(quantized(transposed(B, B.length / r), r, bits, group), r),
    r,
  }));
}

/** [rows, columns] → [columns, rows]. */
function transposed(x, rows) {
  const columns = x.length / rows;
  const y = new Float32Array(x.length);
  for (let i = 0; i < rows; i++)
    for (let j = 0; j < columns; j++) y[j * rows + i] = x[i * columns + j];
  return y;
}

/**
 * nano's weights with those of the adapted linear layers rounded; embedding, norms and
 * biases stay.
 */
function quantizedBase(weights, names, bits, group, outputsOf) {
  if (bits >= 32) return weights;
  const rounded = { ...weights };
  for (const name of names) {
    const key = name + ".weight";
    rounded[key] = quantized(weights[key], outputsOf(name), bits, group);
  }
  return rounded;
}
