"use strict";
// In a chapter: a step of the page that plays, where the chapter links to it. Nothing
// is loaded before the reader asks.

{
  const folder = new URL(".", document.currentScript.src);
  const FILES = [
    "data/index.js",
    ...["tokenizer", "math", "model", "adapters", "load", "engine", "cards", "words", "tour", "teachers"].map(
      (name) => `${name}.js`,
    ),
  ];
  let loading = null;

  const bring = (name) =>
    new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = new URL(name, folder);
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${name} is missing. Reload the page to try again.`));
      document.head.append(script);
    });

  /** Scripts, style and weights, once for all places of the page. */
  async function load(progress) {
    const style = document.createElement("link");
    Object.assign(style, { rel: "stylesheet", href: new URL("play.css", folder) });
    const news = document.createElement("div");
    Object.assign(news, { id: "play-announce", className: "play-only-screen" });
    news.setAttribute("aria-live", "polite");
    document.head.append(style);
    document.body.append(news);
    for (const name of FILES) await bring(name);
    const engine = new Engine(await loadPlay(progress));
    document.documentElement.classList.add("play-ready");
    prepareTour(engine, new Jobs(), () => {
      location.href = new URL("../../book/play.html#your-own-try", folder);
    });
    prepareTeachers(engine);
  }

  for (const place of document.querySelectorAll(".play-here")) {
    const button = place.querySelector("button");
    const status = place.querySelector("[role=status]");
    button.hidden = false;
    button.addEventListener("click", async () => {
      button.disabled = true;
      const say = (share) => (status.textContent = `loading, ${Math.round(100 * share)}% …`);
      try {
        await (loading ??= load(say));
        for (const other of document.querySelectorAll(".play-here > button, .play-here > [role=status]"))
          other.remove();
        place.querySelector("[data-try] button")?.click();
        place.querySelector("[data-try] :is(button, input)").focus({ preventScroll: true });
      } catch (error) {
        status.textContent = `It did not load. ${error.message}`;
        throw error;
      }
    });
  }
}
