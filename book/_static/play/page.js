"use strict";
// The page: loads on request, then makes tour, bench, teachers and texts come alive. It writes nothing down and asks nobody.

const byId = (id) => document.getElementById(id);

/** Settings from the bench's form. */
function readForm(form) {
  const values = Object.fromEntries(new FormData(form));
  for (const key of ["rank", "bits", "baseBits", "scale", "share", "temperature", "seed", "count"]) values[key] = Number(values[key]);
  const ways = values.mode === "one" && values.adapter === PLAY.record.settings.cut_domain;
  if (!ways) values.rows = "svd";
  return values;
}

function writeForm(form, settings) {
  for (const [key, value] of Object.entries(settings)) {
    const field = form.elements[key];
    if (field) field.value = String(value);
  }
}

/** What does not apply to a mode is switched off; numbers stand beside their sliders. */
function showForm(form) {
  const values = readForm(form);
  for (const part of form.querySelectorAll("[data-modes]")) {
    part.hidden = !part.dataset.modes.split(" ").includes(values.mode);
  }
  byId("play-rows").hidden = values.mode !== "one" || values.adapter !== PLAY.record.settings.cut_domain; // others have one form
  byId("play-scale-value").textContent = values.scale.toFixed(1);
  byId("play-rank-value").textContent = values.rank;
  byId("play-share-value").textContent = `${Math.round(100 * values.share)}%`;
  byId("play-settings").textContent = describe(values);
}

function prepareBench(engine, jobs) {
  const form = byId("play-form"), prompt = byId("play-prompt"), cards = byId("play-bench-cards"), looks = new Jobs();
  const look = () => {
    showForm(form);
    const settings = readForm(form), ids = [0, ...engine.tokenizer.encode(prompt.value).slice(-200)];
    looks.start(async (signal) => {
      await new Promise((resolve) => setTimeout(resolve, 60)); // a slider sends many values
      await breathe(signal);
      const { logits } = await engine.read(engine.model(settings), ids, signal);
      nextWords(byId("play-next"), engine.tokenizer, logits, settings.temperature, (text) => {
        prompt.value += text;
        announce(`added ${text.trim()}`);
        look();
        byId("play-next").querySelector("button")?.focus();
      });
    });
  };
  const write = () => {
    const settings = readForm(form), domain = byId("play-domain").value;
    const card = new Card(engine, settings, [domain || (settings.mode === "none" ? "glosses" : settings.adapter)]);
    cards.prepend(card.node);
    while (cards.children.length > 6) cards.lastChild.remove();
    byId("play-speed").textContent = "writing …";
    jobs.start(async (signal) => {
      signal.addEventListener("abort", () => (byId("play-speed").textContent = "stopped"));
      const { speed, text, scores } = await card.run(prompt.value, { ...settings, signal });
      byId("play-speed").textContent = `${Math.round(speed)} tokens a second on this machine`;
      announce(`${card.title} wrote: ${text}. ${Object.values(scores)[0].toFixed(2)} bits a byte.`);
    }, cards);
  };
  form.addEventListener("input", look);
  form.addEventListener("submit", (event) => (event.preventDefault(), write()));
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.preventDefault(), write();
    if (event.key === "Escape") jobs.stop();
  });
  byId("play-stop").addEventListener("click", () => jobs.stop());
  for (const button of form.querySelectorAll("[data-prompt]")) {
    button.addEventListener("click", () => ((prompt.value = button.dataset.prompt), look()));
  }
  look();
  return {
    look,
    settings: () => readForm(form),
    use(settings, text) {
      writeForm(form, settings);
      prompt.value = text;
      look();
      form.scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
      prompt.focus({ preventScroll: true });
    },
  };
}

function prepareTeachers(engine) {
  const form = byId("play-teachers"), jobs = new Jobs();
  let logits = null, asked = "";
  const show = () => {
    const { first, second, share, temperature, text } = Object.fromEntries(new FormData(form));
    const T = 2 ** Number(temperature), w = Number(share);
    byId("play-teachers-share").textContent = `${Math.round(100 * w)}% / ${Math.round(100 * (1 - w))}%`;
    byId("play-teachers-temperature").textContent = T.toFixed(2);
    jobs.start(async (signal) => {
      const key = JSON.stringify([first, second, text]);
      if (key !== asked) {
        const ids = [0, ...engine.tokenizer.encode(text).slice(-200)], read = [];
        for (const adapter of [first, second]) read.push((await engine.read(engine.model({ adapter }), ids, signal)).logits);
        [logits, asked] = [read, key];
      }
      teacherTable(byId("play-teachers-table"), engine.tokenizer, teachersAt(...logits, w, T), [LABELS[first], LABELS[second]]);
    });
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}

function prepareScoring(engine, bench) {
  const form = byId("play-scoring"), jobs = new Jobs();
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = byId("play-scored").value, shown = byId("play-costs"), result = byId("play-scoring-result");
    if (!text) return void (result.textContent = "Paste a text first.");
    result.textContent = "scoring …";
    jobs.start(async (signal) => {
      const settings = bench.settings();
      const alone = await engine.score(engine.model({ mode: "none" }), text, signal);
      const now = await engine.score(engine.model(settings), text, signal);
      shown.replaceChildren(...costlyText(engine.tokenizer, now));
      result.textContent = `${now.perByte.toFixed(3)} bits a byte with “${describe(settings)}”, ${alone.perByte.toFixed(3)} with nano alone (${now.bytes} bytes, ${now.ids.length} tokens).`;
      announce(result.textContent);
    }, shown);
  });
}

/** Asks a task's adapter, and nano without it, for one word. */
function prepareTasks(engine) {
  const form = byId("play-task"), jobs = new Jobs(), result = byId("play-task-result");
  const examples = { pronunciation: "squirrel", plural: "Zwerg" };
  const show = () => {
    const task = form.elements.task.value, { exact } = PLAY.record.runs[`task/${task}`];
    byId("play-gender").hidden = task !== "plural";
    byId("play-task-score").textContent = `Of 100 held-out words ${Math.round(100 * exact)} came out right.`;
  };
  form.elements.task.addEventListener("input", () => {
    form.elements.word.value = examples[form.elements.task.value];
    result.replaceChildren();
    show();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const { task, word, gender } = Object.fromEntries(new FormData(form));
    const question = task === "plural" ? `${word.trim()} (${gender})` : word.trim().toLowerCase();
    if (!word.trim()) return void (result.textContent = "Type a word first.");
    result.textContent = "…";
    jobs.start(async (signal) => {
      const answer = await engine.answer(engine.model({ adapter: task }), task, question, signal);
      const alone = await engine.answer(engine.model({ mode: "none" }), task, question, signal);
      result.replaceChildren(element("p", { className: "play-answer" }, `${word.trim()} → `, element("strong", {}, answer)),
        element("p", { className: "play-note" }, `nano alone: ${alone.slice(0, 60) || "nothing"}`));
      announce(`${word}: ${answer}`);
    });
  });
  show();
}

async function start() {
  const button = byId("play-load-button"), status = byId("play-status"), bar = byId("play-progress");
  button.disabled = true;
  bar.hidden = false;
  status.textContent = "loading …";
  try {
    const data = await loadPlay((share) => (bar.value = share));
    for (const fieldset of document.querySelectorAll("fieldset[data-play]")) fieldset.disabled = false; // or forms have no values
    const engine = new Engine(data), jobs = new Jobs();
    const bench = prepareBench(engine, jobs);
    prepareTour(engine, jobs, bench.use);
    prepareTeachers(engine);
    prepareScoring(engine, bench);
    prepareTasks(engine);
    document.documentElement.classList.add("play-ready");
    globalThis.playEngine = engine; // for the console, and for the book's tests
    byId("play-load").hidden = true;
    announce("The model is loaded.");
    document.querySelector("[data-try] button").focus({ preventScroll: true });
    document.querySelector("[data-try] button").click();
  } catch (error) {
    status.textContent = `The model did not load: ${error.message}. Reload the page to try again.`;
    throw error;
  }
}

byId("play-load-button").textContent = `Load the model (${(PLAY.bytes / 1e6).toFixed(1)} MB)`;
byId("play-load-button").disabled = false;
byId("play-load-button").addEventListener("click", start);
