/* Draws figures that move from the frames that a chapter's cell computed; lora_course/lab/moving.py describes the data. */
(() => {
  const DASHES = ["", "6 4", "7 3 1 3", "1 3", "8 2 1 2 1 2", "9 3", "1 1"];
  const safe = (text) => String(text).replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);
  const short = (value) => typeof value !== "number" ? String(value)
    : Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  const mix = (colour, share) => `color-mix(in srgb, ${colour} ${Math.round(100 * share)}%, transparent)`;

  /* Numbers at which an axis has a tick. */
  function ticks(low, high, log) {
    if (log) {
      const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
      const tens = Array.from({length: to - from + 1}, (_, i) => 10 ** (from + i));
      const parts = tens.flatMap((ten) => [1, 2, 5].map((n) => Number((n * ten).toPrecision(1))));
      const within = (values) => values.filter((value) => value >= low / 1.01 && value <= high * 1.01);
      const inside = [within(tens), within(parts)].find((values) => values.length > 1);
      return inside ?? [low, Math.sqrt(low * high), high].map((v) => Number(v.toPrecision(2)));
    }
    const rough = (high - low) / 4 || 1, ten = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((n) => n * ten).find((n) => n >= rough);
    const first = Math.ceil(low / step - 1e-9);
    return Array.from({length: Math.floor(high / step + 1e-9) - first + 1}, (_, i) => Number(((first + i) * step).toPrecision(12)));
  }

  /* From a number to its place between two pixels. */
  function scale([low, high], [from, to], log) {
    const at = log ? Math.log : (value) => value;
    const span = at(high) - at(low) || 1;
    return (value) => from + (to - from) * (at(value) - at(low)) / span;
  }

  const line = (x1, y1, x2, y2, share = 1, dash = "") =>
    `<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}" stroke="${mix("currentColor", share)}" stroke-dasharray="${dash}"/>`;
  const text = (x, y, words, anchor = "middle", more = "") =>
    `<text x="${x}" y="${y}" text-anchor="${anchor}" ${more}>${safe(words)}</text>`;
  const svg = (width, height, body) =>
    `<svg aria-hidden="true" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}">${body}</svg>`;

  /* A frame with ticks on y, and on x where x is a number; `draw` gets the two scales. */
  function plot(panel, limits, width, draw, height = 250, foot = 44) {
    const log = panel.log ?? "", box = {left: 58, right: width - 14, top: 24, bottom: height - foot};
    const y = scale(limits.y, [box.bottom, box.top], log.includes("y"));
    const x = limits.x && scale(limits.x, [box.left + 8, box.right - 8], log.includes("x"));
    let body = text(4, 14, panel.y_label, "start") + line(box.left, box.bottom, box.right, box.bottom);
    for (const tick of ticks(...limits.y, log.includes("y")))
      body += line(box.left, y(tick), box.right, y(tick), .15) + text(box.left - 6, y(tick) + 4, short(tick), "end");
    for (const tick of x ? ticks(...limits.x, log.includes("x")) : [])
      body += line(x(tick), box.bottom, x(tick), box.bottom + 4) + text(x(tick), box.bottom + 17, short(tick));
    if (panel.x_label) body += text((box.left + box.right) / 2, height - 8, panel.x_label);
    return svg(width, height, body + draw(x, y, box));
  }

  function legend(names, colours, dashed) {
    if (names.length < 2) return "";
    const sign = (i) => `<svg width="24" height="10" aria-hidden="true">` + (dashed
      ? `<path d="M0 5H24" stroke="${colours[i]}" stroke-width="2.5" stroke-dasharray="${DASHES[i]}"/>`
      : `<rect width="24" height="10" fill="${colours[i]}"/>`) + "</svg>";
    return `<div class="legend">${names.map((name, i) => `<span>${sign(i % colours.length)}${safe(name)}</span>`).join("")}</div>`;
  }

  const datum = (value, name) => `data-value="${value}"><title>${safe(name)}: ${short(value)}</title>`;

  const around = (left, y, wide, half) => ({left, right: left + wide, top: y - half, bottom: y + half});

  /* A point's name beside it, where it covers no other name and no other chosen point; "" where there is no such place. */
  function named(x, y, name, box, taken) {
    const wide = 8 * name.length, late = x > (box.left + box.right) / 2;
    for (const [before, up] of [[late, 10], [!late, 10], [late, -20], [!late, -20]]) {
      const room = around(before ? x - 10 - wide : x + 10, y - up - 5, wide, 7);
      const meets = (other) => room.left < other.right && other.left < room.right && room.top < other.bottom && other.top < room.bottom;
      if (room.left < box.left || room.right > box.right || taken.some(meets)) continue;
      taken.push(room);
      return text(before ? x - 10 : x + 10, y - up, name, before ? "end" : "start", 'font-weight="bold"');
    }
    return "";
  }

  const DRAW = {
    line(panel, limits, width, {colours}) {
      const names = Object.keys(panel.series);
      return plot(panel, limits, width, (x, y, box) => names.map((name, i) => {
        const values = panel.series[name], colour = colours[i % colours.length];
        const path = values.map((value, j) => `${x(panel.x[j]).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
        const dots = values.map((value, j) => `<circle cx="${x(panel.x[j])}" cy="${y(value)}" r="${values.length > 40 ? 1 : 3}" fill="${colour}" ${datum(value, name)}</circle>`);
        return `<polyline points="${path}" fill="none" stroke="${colour}" stroke-width="2.2" stroke-dasharray="${DASHES[i]}"/>${dots.join("")}`;
      }).join("") + (panel.at === null ? "" : line(x(panel.at), box.top, x(panel.at), box.bottom, .7, "3 3"))) + legend(names, colours, true);
    },

    bars(panel, limits, width, {colours}) {
      const groups = Object.keys(panel.groups), names = Object.keys(panel.groups[groups[0]]);
      const long = Math.max(...groups.map((name) => name.length)) * 7 * groups.length > width - 80;
      const [low, high] = limits.y, range = {y: [low, high + (high - low) * .08]};
      return plot(panel, range, width, (_, y, box) => groups.map((group, g) => {
        const room = (box.right - box.left) / groups.length, wide = .8 * room / names.length, left = box.left + room * (g + .1);
        const middle = left + .4 * room, foot = box.bottom + 15;
        return names.map((name, i) => {
          const value = panel.groups[group][name], at = left + wide * i;
          return `<rect x="${at}" y="${Math.min(y(value), y(0))}" width="${wide * .94}" height="${Math.abs(y(value) - y(0))}" fill="${colours[(names.length > 1 ? i : g) % colours.length]}" ${datum(value, `${group} ${name}`.trim())}</rect>`
            + (wide > 30 ? text(at + wide / 2, Math.min(y(value), y(0)) - 4, short(Number(value.toPrecision(3)))) : "");
        }).join("") + (long ? text(middle, foot, group, "end", `transform="rotate(-30 ${middle} ${foot})"`) : text(middle, foot, group));
      }).join(""), long ? 290 : 230, long ? 84 : 26) + legend(names, colours, false);
    },

    points(panel, limits, width, {colours}) {
      const pad = ([low, high], log) => log ? [low / 1.15, high * 1.15] : [low - (high - low) * .08, high + (high - low) * .08];
      const log = panel.log, range = {x: pad(limits.x, log.includes("x")), y: pad(limits.y, log.includes("y"))};
      return plot(panel, range, width, (x, y, box) => {
        const taken = panel.chosen.map((name) => around(x(panel.places[name][0]) - 7, y(panel.places[name][1]), 14, 7));
        return Object.entries(panel.places).map(([name, [a, b]]) => {
          const chosen = panel.chosen.includes(name);
          return `<circle cx="${x(a)}" cy="${y(b)}" r="${chosen ? 7 : 5}" fill="${chosen ? colours[1] : "transparent"}" stroke="${colours[0]}" stroke-width="1.5" ${datum(b, name)}</circle>`
            + (chosen ? named(x(a), y(b), name, box, taken) : "");
        }).join("");
      }, 320);
    },

    heat(panel, limits, width, {colours}) {
      const {matrix, rows, columns} = panel, few = rows.length <= 8 && columns.length <= 8;
      const left = 12 + 6.8 * Math.max(...[panel.y_label, ...rows].map((name) => name.length)), top = 26, most = Math.max(...limits.z.map(Math.abs)) || 1;
      const wide = (width - left - 6) / columns.length, tall = Math.max(few ? 30 : 8, Math.min(36, 240 / rows.length));
      const foot = top + tall * rows.length, every = Math.ceil(24 * columns.length / (width - left) || 1);
      let body = text(left, 14, panel.title, "start", 'font-weight="bold"') + text(left - 6, 14, panel.y_label, "end");
      matrix.forEach((row, i) => {
        if (few || i % Math.ceil(14 / tall) === 0) body += text(left - 6, top + tall * (i + .5) + 4, rows[i], "end");
        row.forEach((value, j) => {
          const place = `x="${left + wide * j}" y="${top + tall * i}" width="${wide - 1}" height="${tall - 1}"`;
          body += value === null ? `<rect ${place} fill="none" stroke="${mix("currentColor", .2)}"/>`
            : `<rect ${place} fill="${mix(colours[value < 0 ? 1 : 0], .04 + .7 * Math.abs(value) / most)}" ${datum(value, rows[i] + ", " + columns[j])}</rect>`
              + (few ? text(left + wide * (j + .5), top + tall * (i + .5) + 4, short(Number(value.toPrecision(3)))) : "");
        });
      });
      columns.forEach((name, j) => { if (j % every === 0) body += text(left + wide * (j + .5), foot + 15, name); });
      return svg(width, foot + 40, body + text((left + width) / 2, foot + 34, panel.x_label));
    },

    tokens(panel, _, __, {colours, place}) {
      const here = panel.picks ? place(panel.picks) : -1;
      const spans = panel.texts.map((word, t) => {
        const row = panel.weights[t], best = row.indexOf(Math.max(...row));
        const told = panel.names.map((name, i) => `${name} ${short(Number(row[i].toPrecision(3)))}`).join(", ");
        return `<span class="${panel.picks ? "pick" : ""} ${t === here ? "here" : ""}" data-token="${t}" data-value="${row}" title="${safe(told)}" style="background:${mix(colours[best % colours.length], .75 * row[best])}">${safe(word)}</span>`;
      });
      return `<p class="tokens">${spans.join("")}</p>` + legend(panel.names, colours, false);
    },

    table(panel) {
      const marked = new Set(panel.marked.map(String));
      const cell = (value, i, j) => `<td ${marked.has(`${i},${j}`) ? 'class="marked"' : ""} data-value="${safe(value)}">${safe(short(value))}</td>`;
      const head = panel.header.map((name) => name ? `<th scope="col">${safe(name)}</th>` : "<td></td>").join("");
      return `<table><thead><tr>${head}</tr></thead><tbody>${panel.rows.map((row, i) => `<tr>${row.map((value, j) => cell(value, i, j)).join("")}</tr>`).join("")}</tbody></table>`;
    },
  };

  function start(figure) {
    const data = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
    const live = figure.querySelector(".live"), at = [...data.start];
    live.innerHTML = `<div class="controls">${data.controls.map((control, i) => `<label><span>${safe(control.name)}</span> ` + (control.slider
      ? `<input type="range" min="0" max="${control.values.length - 1}" value="${at[i]}" data-control="${i}"><output></output>`
      : `<select data-control="${i}">${control.values.map((value, v) => `<option value="${v}" ${v === at[i] ? "selected" : ""}>${safe(value)}</option>`).join("")}</select>`)
      + "</label>").join("")}</div><div class="panels"></div><p class="said" aria-live="polite"></p>`;
    const inputs = [...live.querySelectorAll("[data-control]")], panels = live.querySelector(".panels");
    const named = (name) => data.controls.findIndex((control) => control.name === name);
    const extra = {colours: data.colours, place: (name) => at[named(name)]};
    panels.innerHTML = data.frames[0].map((p) => `<div class="panel ${["tokens", "table"].includes(data.panels[p].kind) ? "full" : ""}"></div>`).join("");

    function draw() {
      const frame = at.reduce((index, place, i) => index * data.controls[i].values.length + place, 0);
      inputs.forEach((input, i) => {
        const value = data.controls[i].values[at[i]];
        input.value = at[i];
        if (input.type === "range") { input.setAttribute("aria-valuetext", value); input.nextElementSibling.textContent = value; }
      });
      data.frames[frame].forEach((p, slot) => {
        const panel = data.panels[p], host = panels.children[slot];
        host.innerHTML = DRAW[panel.kind](panel, data.limits[slot], Math.max(host.clientWidth, 240), extra);
      });
      live.querySelector(".said").textContent = data.said[frame];
    }
    live.addEventListener("input", (event) => { at[event.target.dataset.control] = Number(event.target.value); draw(); });
    panels.addEventListener("click", (event) => {
      const token = event.target.dataset.token, slot = [...panels.children].findIndex((host) => host.contains(event.target));
      const picks = token && data.panels[data.frames[0][slot]].picks;
      if (picks) { at[named(picks)] = Number(token); draw(); }
    });
    figure.dataset.drawn = "";
    let width = -1;
    new ResizeObserver(() => { if (live.clientWidth !== width) { width = live.clientWidth; draw(); } }).observe(live);
  }

  const all = () => document.querySelectorAll("figure.moving:not([data-drawn])").forEach(start);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", all); else all();
})();
