"use strict";
// A card: what nano writes under some settings, and how many bits a byte it needs for a
// text it has not seen.

const LABELS = {
  glosses: "WordNet",
  bible: "Bible",
  shakespeare: "Shakespeare",
  milton: "Milton",
  python: "Python",
};
const EXPERT_LABELS = EXPERTS.map((name) => LABELS[name]);

/** An element. options: attributes and properties; text and children follow. */
function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(options)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** The settings in words. */
function describe(settings) {
  const s = { ...DEFAULTS, ...settings };
  const parts = [];
  const grid = (bits, per) =>
    `${bits} bits, one step for ${per === "tensor" ? "each matrix" : `${GROUP} numbers`}`;
  if (s.mode === "none") parts.push("nano alone");
  else if (s.mode === "routed") parts.push("all four, routed");
  else if (s.mode === "one") parts.push(LABELS[s.adapter]);
  else {
    const share = Math.round(100 * s.share),
      other =
        s.second === "flipped"
          ? `${LABELS[s.adapter]}, signs flipped`
          : LABELS[s.second];
    parts.push(
      `${share}% ${LABELS[s.adapter]} + ${100 - share}% ${other}`,
      `${s.merge} averaged`,
    );
  }
  if (s.mode !== "none") {
    if (s.scale !== 1) parts.push(`scale ${s.scale}`);
    if (s.rows === "nested") parts.push("trained to be sliced");
    if (s.rows === "trained") parts.push("rows as trained");
    if (s.rank < 16) parts.push(`rank ${s.rank}${s.rows === "svd" ? ", sorted" : ""}`);
    if (s.bits < 32) parts.push(`adapter in ${grid(s.bits, s.per)}`);
  }
  if (s.baseBits < 32) parts.push(`nano in ${grid(s.baseBits, s.basePer)}`);
  return parts.join(" · ");
}

/**
 * Turns token ids into text as they come; a character that is cut between two tokens
 * waits for its second half.
 */
function textStream(tokenizer) {
  const decoder = new TextDecoder();
  return (id) => decoder.decode(tokenizer.toBytes([id]), { stream: true });
}

/** A token over a bar of its gates; the tint is that of the largest. */
function gatedSpan(text, gates) {
  let from = 0;
  const stops = gates.map((gate, e) => {
    const stop = `var(--expert-${e}) ${(100 * from).toFixed(1)}% ${(100 * (from + gate)).toFixed(1)}%`;
    from += gate;
    return stop;
  });
  const top = gates.indexOf(Math.max(...gates));
  const strength = Math.round(
      (100 * (gates[top] - 1 / gates.length)) / (1 - 1 / gates.length),
    );
  const words = EXPERT_LABELS.map(
    (label, e) => `${label} ${Math.round(100 * gates[e])}%`,
  ).join(", ");
  return element(
    "span",
    {
      className: "play-gated",
      title: words,
      style: `--gates: linear-gradient(to right, ${stops.join(", ")}); --top: var(--expert-${top}); --strength: ${strength}%`,
    },
    text,
  );
}

/** What each expert's colour is, with its mean share. */
function legend(means) {
  return element(
    "p",
    { className: "play-legend" },
    ...EXPERT_LABELS.flatMap((label, e) => [
      element("span", {
        className: "play-swatch",
        style: `background: var(--expert-${e})`,
      }),
      `${label} ${Math.round(100 * means[e])}%  `,
    ]),
  );
}

class Card {
  /** domains: on whose held-out text it is scored; title: the settings in words. */
  constructor(engine, settings, domains, title = describe(settings)) {
    Object.assign(this, { engine, settings: { ...DEFAULTS, ...settings }, domains, title });
    this.text = element("p", { className: "play-text", lang: "en" });
    this.score = element("div", { className: "play-score" }, "…");
    this.node = element(
      "article",
      { className: "play-card" },
      element("h4", {}, this.title),
      this.text,
      this.score,
    );
  }

  /**
   * Writes, then scores. Returns { speed, text, scores }: tokens a second, what was
   * written, bits a byte by domain.
   */
  async run(prompt, options) {
    try {
      return await this.writeAndScore(prompt, options);
    } finally {
      if (this.score.textContent === "…") this.score.textContent = "stopped";
    }
  }

  async writeAndScore(prompt, options) {
    const nano = this.engine.model(this.settings);
    const piece = textStream(this.engine.tokenizer);
    const all = [];
    const prompted = element("b");
    if (this.engine.prompt(prompt).left) prompted.append("… ");
    this.text.append(prompted);
    let written = "";
    const token = ({ id, gates, given }) => {
      const text = piece(id);
      if (!given) written += text;
      if (gates) all.push(gates);
      (given ? prompted : this.text).append(gates ? gatedSpan(text, gates) : text);
    };
    const speed = await this.engine.write(nano, prompt, { ...options, token });
    if (all.length) {
      const means = EXPERTS.map((_, e) => all.reduce((sum, g) => sum + g[e], 0) / all.length);
      const note = element("p", { className: "play-note", role: "status" });
      this.score.before(legend(means), note);
      pointable(this.text, note);
    }
    const scores = {};
    for (const domain of this.domains) {
      scores[domain] = (
        await this.engine.score(nano, PLAY.samples[domain], options.signal)
      ).perByte;
      if (this.score.textContent === "…") this.score.textContent = "";
      this.score.append(element("p", {}, ...scoreBar(scores[domain], domain)));
    }
    return { speed, text: written, scores };
  }
}

/**
 * "2.40 bits a byte on unseen Shakespeare", over a bar on which nano alone is marked.
 */
function scoreBar(perByte, domain) {
  const base = PLAY.record.runs["sample/base"][domain];
  const full = 4.5;
  const share = (bits) => `${Math.min(100, (100 * bits) / full)}%`;
  const change = perByte - base;
  const side = Math.abs(change) < 0.005 ? "same" : change < 0 ? "better" : "worse";
  const word =
    side === "same"
      ? "as nano alone"
      : `${Math.abs(change).toFixed(2)} ${side} than nano alone`;
  return [
    element(
      "span",
      { className: "play-bar", "aria-hidden": "true" },
      element("span", {
        style: `inline-size: ${share(perByte)}`,
        className: side,
      }),
      element("span", {
        style: `inset-inline-start: ${share(base)}`,
        className: "play-tick",
      }),
    ),
    element("strong", {}, perByte.toFixed(2)),
    ` bits a byte on unseen ${LABELS[domain]}: ${word}`,
  ];
}

/** One thing at a time: a new job ends the one before it. */
class Jobs {
  stop() {
    this.controller?.abort(new DOMException("stopped", "AbortError"));
  }

  /**
   * Runs work(signal) unless it is stopped; busy: an element that says so to a screen
   * reader.
   */
  async start(work, busy = null) {
    this.stop();
    const controller = (this.controller = new AbortController());
    busy?.setAttribute("aria-busy", "true");
    try {
      await work(controller.signal);
    } catch (error) {
      if (!controller.signal.aborted) throw error;
    } finally {
      busy?.removeAttribute("aria-busy");
    }
  }
}

/** Tells a screen reader, politely, what is new. */
function announce(text) {
  document.getElementById("play-announce").textContent = text;
}
