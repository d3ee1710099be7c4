"use strict";
// The bench: a prompt, all knobs, what comes next, and the cards that were written.

const byId = (id) => document.getElementById(id);

/** Settings from the bench's form. */
function readForm(form) {
  const values = Object.fromEntries(new FormData(form));
  for (const key of [
    "rank",
    "bits",
    "baseBits",
    "scale",
    "share",
    "temperature",
    "seed",
    "count",
  ])
    values[key] = Number(values[key]);
  const ways =
    values.mode === "one" && values.adapter === PLAY.record.settings.cut_domain;
  if (!ways) values.rows = "svd";
  return values;
}

function writeForm(form, settings) {
  for (const [key, value] of Object.entries(settings)) {
    const field = form.elements[key];
    if (field) field.value = String(value);
  }
}

/**
 * What does not apply to a mode is switched off; numbers stand beside their sliders.
 */
function showForm(form) {
  const values = readForm(form);
  for (const part of form.querySelectorAll("[data-modes]")) {
    part.hidden = !part.dataset.modes.split(" ").includes(values.mode);
  }
  byId("play-rows").hidden =
    values.mode !== "one" || values.adapter !== PLAY.record.settings.cut_domain; // others have one form
  byId("play-scale-value").textContent = values.scale.toFixed(1);
  byId("play-rank-value").textContent = values.rank;
  byId("play-share-value").textContent = `${Math.round(100 * values.share)}%`;
  byId("play-settings").textContent = describe(values);
}

function prepareBench(engine, jobs) {
  const form = byId("play-form");
  const prompt = byId("play-prompt");
  const cards = byId("play-bench-cards");
  const looks = new Jobs();
  const look = () => {
    showForm(form);
    const settings = readForm(form);
    const { ids, left } = engine.prompt(prompt.value);
    byId("play-left").textContent = left
      ? `Long: the model reads the last ${READ} of its ${READ + left} tokens.`
      : "";
    looks.start(async (signal) => {
      await new Promise((resolve) => setTimeout(resolve, 60)); // a slider sends many values
      await breathe(signal);
      const { logits } = await engine.read(engine.model(settings), ids, signal);
      nextWords(
        byId("play-next"),
        engine.tokenizer,
        logits,
        settings.temperature,
        (text) => {
          prompt.value += text;
          announce(`added ${text.trim()}`);
          look();
          byId("play-next").querySelector("button")?.focus();
        },
      );
    });
  };
  const write = () => {
    const settings = readForm(form);
    const domain = byId("play-domain").value;
    const card = new Card(engine, settings, [
      domain || (settings.mode === "none" ? "glosses" : settings.adapter),
    ]);
    cards.prepend(card.node);
    while (cards.children.length > 6) cards.lastChild.remove();
    byId("play-speed").textContent = "writing …";
    jobs.start(async (signal) => {
      signal.addEventListener(
        "abort",
        () => (byId("play-speed").textContent = "stopped"),
      );
      const { speed, text, scores } = await card.run(prompt.value, {
        ...settings,
        signal,
      });
      byId("play-speed").textContent =
        `${Math.round(speed)} tokens a second on this machine`;
      announce(
        `${card.title} wrote: ${text}. ${Object.values(scores)[0].toFixed(2)} bits a byte.`,
      );
    }, cards);
  };
  form.addEventListener("input", look);
  form.addEventListener("submit", (event) => (event.preventDefault(), write()));
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey))
      (event.preventDefault(), write());
  });
  byId("play-stop").addEventListener("click", () => jobs.stop());
  for (const button of form.querySelectorAll("[data-prompt]")) {
    button.addEventListener(
      "click",
      () => ((prompt.value = button.dataset.prompt), look()),
    );
  }
  look();
  return {
    look,
    settings: () => readForm(form),
    use(settings, text) {
      writeForm(form, settings);
      prompt.value = text;
      look();
      form.scrollIntoView({
        behavior: matchMedia("(prefers-reduced-motion: reduce)").matches
          ? "auto"
          : "smooth",
      });
      prompt.focus({ preventScroll: true });
    },
  };
}
