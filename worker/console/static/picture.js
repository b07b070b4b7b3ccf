// A picture, blurred until somebody wants to see it, with a heat map of local evidence over it.

import { h, say } from "./dom.js";

const CELLS = 96;

// Dark blue over violet and red to yellow: ordered in lightness, and so readable without colour.
const STOPS = [[0, 30, 24, 84], [0.35, 122, 28, 120], [0.65, 222, 60, 60], [0.85, 248, 150, 40], [1, 252, 240, 130]];

function colour(p) {
  const upper = STOPS.findIndex(([at]) => p <= at);
  if (upper <= 0) return STOPS[Math.max(0, upper)].slice(1);
  const [low, high] = [STOPS[upper - 1], STOPS[upper]];
  const part = (p - low[0]) / (high[0] - low[0]);
  return low.slice(1).map((value, i) => value + part * (high[i + 1] - value));
}

// Each cell gets the mean of the windows over it, weighted towards their middles.
function raster(canvas, evidence) {
  const { width, height } = evidence.image;
  const scale = CELLS / Math.max(width, height);
  const [columns, rows] = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  const sums = new Float32Array(columns * rows), weights = new Float32Array(columns * rows);
  for (const w of evidence.windows) {
    if (w.p === null) continue;
    const [cx, cy] = [w.left + w.width / 2, w.top + w.height / 2];
    for (let y = 0; y < rows; y++) {
      const dy = Math.abs((y + 0.5) / scale - cy) / (w.height / 2);
      if (dy >= 1) continue;
      for (let x = 0; x < columns; x++) {
        const dx = Math.abs((x + 0.5) / scale - cx) / (w.width / 2);
        if (dx >= 1) continue;
        const weight = (1.05 - dx) * (1.05 - dy);
        sums[y * columns + x] += weight * w.p;
        weights[y * columns + x] += weight;
      }
    }
  }
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  sums.forEach((sum, i) => {
    const p = weights[i] ? sum / weights[i] : 0;
    pixels.data.set([...colour(p), weights[i] ? 70 + 185 * p : 0], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
}

function place(w, { width, height }) {
  const vertical = ["top", "middle", "bottom"][Math.min(2, Math.floor((3 * (w.top + w.height / 2)) / height))];
  const horizontal = ["left", "centre", "right"][Math.min(2, Math.floor((3 * (w.left + w.width / 2)) / width))];
  return vertical === "middle" && horizontal === "centre" ? "in the middle" : `at the ${vertical} ${horizontal}`;
}

export function inWords(evidence) {
  const scored = evidence.windows.filter((w) => w.p !== null);
  if (!scored.length) return "No window has a score.";
  if (scored.length === 1) return "The image is a single window: there is nothing to compare.";
  const [most, least] = [scored.reduce((a, b) => (b.p > a.p ? b : a)), scored.reduce((a, b) => (b.p < a.p ? b : a))];
  return `${scored.length} windows: most evidence of generation ${place(most, evidence.image)} (${most.p.toFixed(3)}), least ${place(least, evidence.image)} (${least.p.toFixed(3)}).`;
}

export function picture(source, description) {
  let revealed = false, heat = false, evidence = null;
  const image = h("img", { alt: `${description}, blurred`, class: "blurred" });
  const canvas = h("canvas", { class: "heat", hidden: true, "aria-hidden": "true" });
  const problem = h("p", { class: "quiet", role: "status" }, "loading the picture…");
  const frame = h("div", { class: "frame" }, image, canvas);
  const reveal = h("button", { type: "button", "aria-pressed": "false", "aria-keyshortcuts": "b", onclick: () => toggleBlur() }, "Show picture", h("kbd", {}, "b"));
  const heating = h("button", { type: "button", "aria-pressed": "false", "aria-keyshortcuts": "h", disabled: true, onclick: () => toggleHeat() }, "Heat map", h("kbd", {}, "h"));
  const strength = h("input", { type: "range", min: "10", max: "100", value: "70", "aria-label": "strength of the heat map",
    oninput: () => canvas.style.setProperty("opacity", strength.value / 100) });
  const legend = h("div", { class: "heat-legend", hidden: true }, h("span", {}, "0"), h("span", { class: "ramp", "aria-hidden": "true" }), h("span", {}, "1"), strength);
  const words = h("p", { class: "quiet" });

  const buttons = h("div", { class: "buttons" }, reveal, heating);
  image.addEventListener("load", () => { problem.hidden = true; });
  image.addEventListener("error", () => missing("it cannot be shown"));
  frame.hidden = true;
  source.then((found) => {
    if (!found.link) return missing(found.unavailable);
    frame.hidden = false;
    image.src = found.link;
  }, (refusal) => missing(refusal.message));

  function missing(text) {
    frame.hidden = buttons.hidden = true;
    problem.hidden = false;
    problem.textContent = `No picture: ${text}.`;
  }

  function toggleBlur() {
    if (frame.hidden) return;
    revealed = !revealed;
    image.classList.toggle("blurred", !revealed);
    image.alt = revealed ? description : `${description}, blurred`;
    reveal.setAttribute("aria-pressed", String(revealed));
    reveal.firstChild.textContent = revealed ? "Blur picture" : "Show picture";
    say(revealed ? "Picture shown" : "Picture blurred");
  }

  function toggleHeat() {
    if (!evidence || heating.disabled) return;
    heat = !heat;
    canvas.hidden = legend.hidden = !heat;
    heating.setAttribute("aria-pressed", String(heat));
    if (heat) say(inWords(evidence));
  }

  return {
    element: h("figure", { class: "picture" }, frame, problem, buttons, legend, words),
    keys: { b: toggleBlur, h: toggleHeat },
    image,
    explain(found) {
      evidence = found;
      raster(canvas, found);
      canvas.style.setProperty("opacity", 0.7);
      heating.disabled = found.windows.length < 2;
      words.textContent = inWords(found);
    },
    failed(text) { words.textContent = text; },
  };
}
