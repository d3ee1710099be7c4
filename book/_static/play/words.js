"use strict";
// Three views of single words: what comes next, what two teachers would say, and what
// each word of a text costs.

/** The likeliest tokens of a distribution: [[id, probability], …]. */
function likeliest(probabilities, count) {
  return [...probabilities.keys()]
    .sort((a, b) => probabilities[b] - probabilities[a])
    .slice(0, count)
    .map((id) => [id, probabilities[id]]);
}

/** A token as one can see it: spaces and line ends are shown. */
function visible(tokenizer, id) {
  if (id === 0) return "⟨end⟩";
  const text = tokenizer.decode([id]);
  return text.replace(/^ /, "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

/**
 * The next word's likeliest tokens as buttons with bars; choose: called with the text
 * of the one that is clicked.
 */
function nextWords(list, tokenizer, logits, temperature, choose) {
  const probabilities = softmax(
    Float64Array.from(logits, (value) => value / (temperature || 1)),
  );
  list.replaceChildren(
    ...likeliest(probabilities, 8).map(([id, p]) => {
      const percent = `${(100 * p).toFixed(1)}%`;
      const text = tokenizer.decode([id]);
      const button = element(
        "button",
        {
          type: "button",
          "aria-label": `add ${visible(tokenizer, id)}, ${percent}`,
          disabled: id === 0,
        },
        element("code", {}, visible(tokenizer, id)),
        element(
          "span",
          { className: "play-share", "aria-hidden": "true" },
          element("span", { style: `inline-size: ${100 * p}%` }),
        ),
        percent,
      );
      button.addEventListener("click", () => choose(text));
      return element("li", {}, button);
    }),
  );
}

/** softmax(z / T). */
function atTemperature(logits, temperature) {
  return softmax(Float64Array.from(logits, (value) => value / temperature));
}

/**
 * What a student of two teachers would be trained on, w being the first one's weight:
 * the mixture  w softmax(z₁ / T) + (1 − w) softmax(z₂ / T),  and  softmax((w z₁ + (1 −
 * w) z₂) / T)  of averaged logits.
 */
function teachersAt(first, second, w, temperature) {
  const p1 = atTemperature(first, temperature);
  const p2 = atTemperature(second, temperature);
  return {
    first: p1,
    second: p2,
    mixture: p1.map((p, i) => w * p + (1 - w) * p2[i]),
    logits: atTemperature(
      first.map((z, i) => w * z + (1 - w) * second[i]),
      temperature,
    ),
  };
}

/** A table of the tokens that matter in any of the four distributions. */
function teacherTable(table, tokenizer, distributions, names) {
  const { first, second, mixture } = distributions;
  const ids = [
    ...new Set(
      [...likeliest(first, 4), ...likeliest(second, 4), ...likeliest(mixture, 5)].map(
        ([id]) => id,
      ),
    ),
  ];
  ids.sort((a, b) => mixture[b] - mixture[a]);
  const bar = (p) =>
    element(
      "td",
      {},
      element(
        "span",
        { className: "play-share", "aria-hidden": "true" },
        element("span", { style: `inline-size: ${100 * p}%` }),
      ),
      `${(100 * p).toFixed(1)}%`,
    );
  table.tHead.replaceChildren(
    element(
      "tr",
      {},
      ...["next word", ...names, "their mixture", "averaged logits"].map((name) =>
        element("th", { scope: "col" }, name),
      ),
    ),
  );
  table.tBodies[0].replaceChildren(
    ...ids.map((id) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, element("code", {}, visible(tokenizer, id))),
        ...Object.values(distributions).map((p) => bar(p[id])),
      ),
    ),
  );
}

/** A text whose words are tinted by their bits: none for 0, full for 12 and more. */
function costlyText(tokenizer, { ids, bits }) {
  const piece = textStream(tokenizer);
  return ids.map((id, i) =>
    element(
      "span",
      {
        className: "play-cost",
        title: `${bits[i].toFixed(1)} bits`,
        style: `--cost: ${Math.round(Math.min(100, (100 * bits[i]) / 12))}%`,
      },
      piece(id),
    ),
  );
}
