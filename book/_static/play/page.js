"use strict";
// The page: loads on request, then makes tour, bench, teachers and texts come alive. It
// writes nothing down and asks nobody.

function prepareTeachers(engine) {
  const form = byId("play-teachers");
  const jobs = new Jobs();
  let logits = null;
  let asked = "";
  const show = () => {
    const { first, second, share, temperature, text } = Object.fromEntries(
      new FormData(form),
    );
    const T = 2 ** Number(temperature);
    const w = Number(share);
    byId("play-teachers-share").textContent =
      `${Math.round(100 * w)}% / ${Math.round(100 * (1 - w))}%`;
    byId("play-teachers-temperature").textContent = T.toFixed(2);
    jobs.start(async (signal) => {
      const key = JSON.stringify([first, second, text]);
      if (key !== asked) {
        const ids = [0, ...engine.tokenizer.encode(text).slice(-200)];
        const read = [];
        for (const adapter of [first, second])
          read.push((await engine.read(engine.model({ adapter }), ids, signal)).logits);
        [logits, asked] = [read, key];
      }
      teacherTable(
        byId("play-teachers-table"),
        engine.tokenizer,
        teachersAt(...logits, w, T),
        [LABELS[first], LABELS[second]],
      );
    });
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}

function prepareScoring(engine, bench) {
  const form = byId("play-scoring");
  const jobs = new Jobs();
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = byId("play-scored").value;
    const shown = byId("play-costs");
    const result = byId("play-scoring-result");
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
  const form = byId("play-task");
  const jobs = new Jobs();
  const result = byId("play-task-result");
  const examples = { pronunciation: "squirrel", plural: "Zwerg" };
  const show = () => {
    const task = form.elements.task.value;
    const { exact } = PLAY.record.runs[`task/${task}`];
    byId("play-gender").hidden = task !== "plural";
    byId("play-task-score").textContent =
      `Of 100 held-out words ${Math.round(100 * exact)} came out right.`;
  };
  form.elements.task.addEventListener("input", () => {
    form.elements.word.value = examples[form.elements.task.value];
    result.replaceChildren();
    show();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const { task, word, gender } = Object.fromEntries(new FormData(form));
    const question =
      task === "plural" ? `${word.trim()} (${gender})` : word.trim().toLowerCase();
    if (!word.trim()) return void (result.textContent = "Type a word first.");
    result.textContent = "…";
    jobs.start(async (signal) => {
      const answer = await engine.answer(
        engine.model({ adapter: task }),
        task,
        question,
        signal,
      );
      const alone = await engine.answer(
        engine.model({ mode: "none" }),
        task,
        question,
        signal,
      );
      result.replaceChildren(
        element(
          "p",
          { className: "play-answer" },
          `${word.trim()} → `,
          element("strong", {}, answer),
        ),
        element(
          "p",
          { className: "play-note" },
          `nano alone: ${alone.slice(0, 60) || "nothing"}`,
        ),
      );
      announce(`${word}: ${answer}`);
    });
  });
  show();
}

async function start() {
  const button = byId("play-load-button");
  const status = byId("play-status");
  const bar = byId("play-progress");
  button.disabled = true;
  bar.hidden = false;
  status.textContent = "loading …";
  try {
    const data = await loadPlay((share) => (bar.value = share));
    for (const fieldset of document.querySelectorAll("fieldset[data-play]"))
      fieldset.disabled = false; // or forms have no values
    const engine = new Engine(data);
    const jobs = new Jobs();
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

byId("play-load-button").textContent =
  `Load the model (${(PLAY.bytes / 1e6).toFixed(1)} MB)`;
byId("play-load-button").disabled = false;
byId("play-load-button").addEventListener("click", start);
