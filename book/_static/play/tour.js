"use strict";
// "Try this": a prompt and a few settings each, written side by side with the same
// dice.

const DEEDS = `And Moses said unto the people,

HAMLET.
To be, or not to be

def read(self, name):
    `;

const TOUR = {
  adapters: {
    prompt: "The king",
    runs: [{ mode: "none" }, ...EXPERTS.map((adapter) => ({ adapter }))],
    domains: ({ mode, adapter }) => [mode === "none" ? "glosses" : adapter],
  },
  scale: {
    prompt: "The king",
    runs: [0, 0.5, 1, 2].map((scale) => ({ scale })),
    title: ({ scale }) => `Shakespeare · scale ${scale}`,
  },
  rank: {
    prompt: "The king",
    runs: [16, 4, 1].map((rank) => ({ rank })),
    title: ({ rank }) => `Shakespeare · rank ${rank}`,
  },
  nested: {
    prompt: "The king",
    runs: ["trained", "nested", "svd"].map((rows) => ({ rows, rank: 1 })),
  },
  bits: {
    prompt: "The king",
    runs: [
      { bits: 4 },
      { bits: 2, per: "tensor" },
      { bits: 2, per: "group" },
      { baseBits: 4, basePer: "tensor" },
      { baseBits: 2, basePer: "group" },
    ],
  },
  merge: {
    prompt: "The king",
    runs: [
      {},
      { mode: "two", second: "flipped", merge: "updates" },
      { mode: "two", second: "flipped", merge: "factors" },
      { mode: "two", second: "bible", merge: "updates" },
      { mode: "two", second: "bible", merge: "factors" },
    ],
    title: ({ second, merge }) =>
      second
        ? `with ${second === "bible" ? "the Bible’s" : "its flipped copy"}: ${merge} averaged`
        : "Shakespeare’s adapter",
  },
  routing: {
    prompt: DEEDS,
    runs: [{ mode: "routed" }],
    domains: () => EXPERTS,
    count: 40,
    seed: 2,
  },
};

/**
 * Gives each place of the page that names a step its button and its cards. use: called
 * with settings to go on with.
 */
function prepareTour(engine, jobs, use) {
  document.addEventListener("keydown", ({ key }) => key === "Escape" && jobs.stop());
  for (const place of document.querySelectorAll("[data-try]")) {
    if (!(place.dataset.try in TOUR)) continue; // the teachers have knobs of their own
    const step = TOUR[place.dataset.try];
    const { prompt, runs, domains, count = 48, seed = 7, title: named } = step;
    const title =
      place
        .closest("section")
        ?.querySelector("h2, h3")
        ?.firstChild.textContent.trim() ?? place.dataset.try;
    const button = element(
      "button",
      { type: "button", className: "play-primary", "aria-label": `Try it: ${title}` },
      "▶ Try it",
    );
    const cards = element("div", {
      className: `play-cards ${runs.length === 1 ? "wide" : runs.length > 4 ? "rows" : ""}`,
    });
    button.addEventListener("click", () => {
      cards.replaceChildren();
      jobs.start(async (signal) => {
        const results = [];
        let wrote = "";
        for (const settings of runs) {
          const card = new Card(
            engine,
            settings,
            domains?.(settings) ?? ["shakespeare"],
            named?.(settings),
          );
          const more = element(
            "button",
            {
              type: "button",
              className: "play-link",
              "aria-label": `Change these settings: ${card.title}`,
            },
            "change these settings",
          );
          more.addEventListener("click", () => use({ ...card.settings, seed }, prompt));
          card.node.append(more);
          cards.append(card.node);
          const { text, scores } = await card.run(prompt, {
            count,
            temperature: 0.8,
            seed,
            signal,
          });
          announce((wrote = `${card.title} wrote: ${text}.`));
          results.push(
            `${card.title}: ${Object.values(scores)[0].toFixed(2)} bits a byte.`,
          );
        }
        announce(`${wrote} ${title}. ${results.join(" ")}`);
      }, cards);
    });
    place.replaceChildren(button, cards);
  }
}
