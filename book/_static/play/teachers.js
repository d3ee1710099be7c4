"use strict";
// Two teachers and one next word: a step whose knobs are the reader's, in the page and in
// the chapter on distillation.

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

/** A knob under its label; shown: an element for the value that the knob has. */
function labelled(text, field, shown = null) {
  const label = element("span", { className: "play-label" }, text, shown && " ", shown);
  return element("label", {}, label, field);
}

function chosenTeacher(name, chosen) {
  const options = EXPERTS.map((key) => new Option(LABELS[key], key, false, key === chosen));
  return element("select", { name }, ...options);
}

function slider(name, min, max, step, value) {
  const field = element("input", { type: "range", name });
  Object.assign(field, { min, max, step });
  field.value = value; // last: a slider keeps its value within its bounds
  return field;
}

/** Fills each place of the page that names this step. */
function prepareTeachers(engine) {
  for (const place of document.querySelectorAll("[data-try=teachers]")) {
    const T = element("output");
    const share = element("output");
    const text = element("input", {
      type: "text",
      name: "text",
      value: "And the king said",
      autocomplete: "off",
    });
    const table = element("table", {}, element("thead"), element("tbody"));
    const form = element(
      "form",
      { className: "play-panel" },
      element(
        "div",
        { className: "play-knobs" },
        labelled("What they read", text),
        labelled("First teacher", chosenTeacher("first", "bible")),
        labelled("Second teacher", chosenTeacher("second", "python")),
        labelled("Temperature", slider("temperature", -2, 3, 0.1, 0), T),
        labelled("Weights", slider("share", 0, 1, 0.05, 0.5), share),
      ),
      element(
        "div",
        {
          className: "play-table",
          tabIndex: 0,
          role: "region",
          "aria-label": "Next words of two teachers",
        },
        table,
      ),
    );
    place.replaceChildren(form);
    const show = teachersShown(engine, form, table, { T, share });
    form.addEventListener("input", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    show();
  }
}

/** What turns the form's values into the table; logits are kept while only a slider moves. */
function teachersShown(engine, form, table, outputs) {
  const jobs = new Jobs();
  let logits = null;
  let asked = "";
  return () => {
    const values = Object.fromEntries(new FormData(form));
    const { first, second, text } = values;
    const T = 2 ** Number(values.temperature);
    const w = Number(values.share);
    outputs.T.textContent = T.toFixed(2);
    outputs.share.textContent = `${Math.round(100 * w)}% / ${Math.round(100 * (1 - w))}%`;
    jobs.start(async (signal) => {
      const key = JSON.stringify([first, second, text]);
      if (key !== asked) {
        const ids = engine.prompt(text).ids;
        const read = [];
        for (const adapter of [first, second])
          read.push((await engine.read(engine.model({ adapter }), ids, signal)).logits);
        [logits, asked] = [read, key];
      }
      const distributions = teachersAt(...logits, w, T);
      teacherTable(table, engine.tokenizer, distributions, [LABELS[first], LABELS[second]]);
    });
  };
}
