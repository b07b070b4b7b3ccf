// Small charts as SVG and bars; each says in words what it shows.

import { count, fill, h, milliseconds, svg } from "./dom.js";

export function sparkline(values, label) {
  const width = 240, height = 44, top = Math.max(1, ...values);
  const points = values.map((value, i) => `${((i * width) / Math.max(1, values.length - 1)).toFixed(1)},${(height - 2 - (value / top) * (height - 6)).toFixed(1)}`);
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "spark", role: "img", "aria-label": label, preserveAspectRatio: "none" },
    svg("polygon", { points: `0,${height} ${points.join(" ")} ${width},${height}`, class: "area" }),
    svg("polyline", { points: points.join(" "), class: "line" }));
}

// rows: [{name, value, kind?, shown?}]; the bar's length is value / most.
export function bars(rows, most, empty = "none in the last minute") {
  if (!rows.length) return h("p", { class: "quiet" }, empty);
  const top = most || Math.max(1e-9, ...rows.map((row) => row.value));
  return h("dl", { class: "bars" }, rows.map((row) => [
    h("dt", {}, row.name),
    h("dd", {},
      h("span", { class: "track", "aria-hidden": "true" },
        h("span", { class: `bar ${row.kind || ""}`, style: { width: `${Math.min(100, (100 * row.value) / top).toFixed(1)}%` } })),
      h("span", { class: "figure" }, row.shown ?? count(row.value))),
  ]));
}

export function shares(parts, total) {
  return h("div", {},
    h("div", { class: "stack", "aria-hidden": "true" }, parts.filter((part) => part.value).map((part) =>
      h("span", { class: `bar ${part.kind}`, style: { width: `${(100 * part.value) / Math.max(1, total)}%` } }))),
    h("ul", { class: "legend" }, parts.map((part) => h("li", {},
      h("span", { class: `dot ${part.kind}`, "aria-hidden": "true" }), `${part.name} `,
      h("b", {}, total ? `${((100 * part.value) / total).toFixed(1)}%` : "–"), h("span", { class: "quiet" }, ` ${count(part.value)}`)))));
}

export function latencies(element, latency) {
  const stages = { fetch: "fetch", decode: "decode", queue: "queue", infer: "infer", total: "total" };
  const top = Math.max(1e-9, ...Object.values(latency).map((times) => times?.p95 ?? 0));
  fill(element, h("table", { class: "small" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "stage"), h("th", { scope: "col", class: "number" }, "p50"),
      h("th", { scope: "col", class: "number" }, "p95"), h("td", {}))),
    h("tbody", {}, Object.entries(stages).map(([stage, name]) => {
      const times = latency[stage];
      return h("tr", {}, h("th", { scope: "row" }, name), h("td", { class: "number" }, milliseconds(times?.p50)),
        h("td", { class: "number" }, milliseconds(times?.p95)),
        h("td", { class: "wide", "aria-hidden": "true" }, h("span", { class: "track" },
          h("span", { class: "bar light", style: { width: `${(100 * (times?.p95 ?? 0)) / top}%` } }),
          h("span", { class: "bar over", style: { width: `${(100 * (times?.p50 ?? 0)) / top}%` } }))));
    }))));
}

// A score from 0 to 1 with the rule's thresholds as marks.
export function scale(value, thresholds, kind) {
  const names = { label: "AI-generated from", review: "review from", block: "block from" };
  const marks = Object.entries(thresholds || {}).filter(([, at]) => at !== null && at <= 1);
  return h("div", { class: "scale" },
    h("div", { class: "rail", "aria-hidden": "true" },
      value === null ? null : h("span", { class: `bar ${kind}`, style: { width: `${100 * value}%` } }),
      marks.map(([name, at]) => h("span", { class: `mark ${name}`, style: { left: `${100 * at}%` } }))),
    h("ul", { class: "legend" }, marks.map(([name, at]) => h("li", {},
      h("span", { class: `tick ${name}`, "aria-hidden": "true" }), `${names[name]} `, h("b", {}, at.toFixed(3))))));
}
