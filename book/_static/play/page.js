"use strict";
// The page: loads on request, then makes tour, bench, teachers and texts come alive. It
// writes nothing down and asks nobody.

/** What the tasks' adapters are asked, by the names of `lora_course.lab.tasks`. */
const TASKS = {
  pronunciation: {
    label: "English word → sounds",
    example: "squirrel",
    question: (word) => word.toLowerCase(),
  },
  plural: {
    label: "German noun → plural",
    example: "Zwerg",
    gender: true,
    question: (word, gender) => `${word} (${gender})`,
  },
};

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
      const say = (done) => (result.textContent = `scoring, ${Math.round(100 * done)}% …`);
      const half = (from) => (share) => say(from + share / 2);
      const nano = engine.model({ mode: "none" });
      const alone = await engine.score(nano, text, signal, half(0));
      const now = await engine.score(engine.model(settings), text, signal, half(0.5));
      shown.replaceChildren(...costlyText(engine.tokenizer, now));
      pointable(shown, byId("play-cost"));
      result.textContent =
        `${now.perByte.toFixed(3)} bits a byte with “${describe(settings)}”, ` +
        `${alone.perByte.toFixed(3)} with nano alone (bytes: ${now.bytes}, tokens: ${now.ids.length}).` +
        (now.perByte > 8 ? " More than 8: guessing each byte would be better." : "");
    }, shown);
  });
}

/** Asks a task's adapter, and nano without it, for one word. */
function prepareTasks(engine) {
  const form = byId("play-task");
  if (!form) return; // no task's adapter is recorded yet
  const result = byId("play-task-result");
  const jobs = new Jobs();
  const choice = form.elements.task;
  for (const task of PLAY.record.settings.tasks) {
    if (!PLAY.record.runs[`task/${task}/base`]) continue;
    choice.append(new Option(TASKS[task].label, task));
  }
  const show = () => {
    const { exact } = PLAY.record.runs[`task/${choice.value}`];
    byId("play-gender").hidden = !TASKS[choice.value].gender;
    byId("play-task-score").textContent =
      `It got ${Math.round(100 * exact)}% of ${PLAY.record.settings.task_words} unseen words right as a whole.`;
  };
  choice.addEventListener("input", () => {
    form.elements.word.value = TASKS[choice.value].example;
    result.replaceChildren();
    show();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const { task, word, gender } = Object.fromEntries(new FormData(form));
    const asked = word.trim();
    if (!asked) return void (result.textContent = "Type a word first.");
    const question = TASKS[task].question(asked, gender);
    const adapter = engine.model({ adapter: task });
    const alone = engine.model({ mode: "none" });
    result.textContent = "…";
    jobs.start(async (signal) => {
      const answer = await engine.answer(adapter, task, question, signal);
      const without = await engine.answer(alone, task, question, signal);
      result.replaceChildren(
        element(
          "p",
          { className: "play-answer" },
          `${asked} → `,
          element("strong", {}, answer),
        ),
        element(
          "p",
          { className: "play-note" },
          `nano alone: ${without.slice(0, 60) || "nothing"}`,
        ),
      );
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
    status.textContent = `The model did not load. ${error.message}`;
    throw error;
  }
}

byId("play-load-button").textContent =
  `Load the model (${(PLAY.bytes / 1e6).toFixed(1)} MB)`;
byId("play-load-button").addEventListener("click", start);
if (!globalThis.playFault) {
  byId("play-load-button").disabled = false;
  byId("play-status").textContent =
    "Once, for as long as this page is open. Nothing that you type leaves it.";
}
