"use strict";
// Two views of single words: what comes next, and what each word of a text costs.

/** The likeliest tokens of a distribution: [[id, probability], …]. */
function likeliest(probabilities, count) {
  return [...probabilities.keys()]
    .sort((a, b) => probabilities[b] - probabilities[a])
    .slice(0, count)
    .map((id) => [id, probabilities[id]]);
}

/**
 * A token as one can see it: spaces and line ends are shown, and the bytes of a part of
 * a character.
 */
function visible(tokenizer, id) {
  if (id === 0) return "⟨end⟩";
  const text = tokenizer.decode([id]);
  if (text.includes("\ufffd"))
    return `⟨${Array.from(tokenizer.toBytes([id]), (b) => b.toString(16)).join(" ")}⟩`;
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
          disabled: id === 0 || text.includes("\ufffd"), // a text can't end in a part of a character
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

/**
 * Tells the numbers of a word, its title, to one who taps it or walks the text with the
 * arrow keys: a title alone is for a mouse.
 */
function pointable(text, note) {
  const words = [...text.querySelectorAll("[title]")];
  let at = -1;
  const point = (to) => {
    if (!(to in words)) return;
    words[at]?.classList.remove("play-pointed");
    at = to;
    words[at].classList.add("play-pointed");
    note.textContent = `“${words[at].textContent.trim() || "⏎"}”: ${words[at].title}`;
  };
  text.tabIndex = 0;
  text.onclick = ({ target }) => point(words.indexOf(target));
  text.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) (event.preventDefault(), point(at + step));
  };
  note.textContent = "Tap a word, or walk with the arrow keys, for its numbers.";
}

/**
 * A text whose words are tinted by their bits: none for 0, full for 12 and more. The
 * tokens of one character count together.
 */
function costlyText(tokenizer, { ids, bits }) {
  const piece = textStream(tokenizer);
  const spans = [];
  let cost = 0;
  ids.forEach((id, i) => {
    const text = piece(id);
    cost += bits[i];
    if (!text) return;
    const options = {
      className: "play-cost",
      title: `${cost.toFixed(1)} bits`,
      style: `--cost: ${Math.round(Math.min(100, (100 * cost) / 12))}%`,
    };
    spans.push(element("span", options, text));
    cost = 0;
  });
  return spans;
}
