// Verdicts as they come: numbers of the last minute, and rows no faster than eyes.

import { listen } from "./api.js";
import { bars, latencies, shares, sparkline } from "./charts.js";
import { ACTIONS, LABELS, badge, count, fill, h, keys, milliseconds, say, score, when } from "./dom.js";

const KEPT_ROWS = 60;

export function open(main, { connected }) {
  let filter = {}, stream = null, paused = false, waiting = [];
  const tile = (name) => ({ value: h("b", {}, "–"), note: h("span", { class: "quiet" }, ""), name });
  const tiles = { rate: tile("verdicts a second"), generated: tile("AI-generated"), failed: tile("failures"), hits: tile("cache hits"), lag: tile("lag") };
  const spark = h("div", { class: "sparkbox" });
  const panel = (title) => ({ title, body: h("div", {}) });
  const panels = {
    outcomes: panel("By label and action"), latency: panel("Latency by stage"),
    batches: panel("Batch sizes"), failures: panel("Failures by code"),
  };
  const rows = h("tbody", {});
  const sample = h("p", { class: "quiet", id: "sample" }, "waiting for verdicts…");
  const tenant = h("select", { id: "f-tenant" }, h("option", { value: "" }, "all"));
  const label = h("select", { id: "f-label" }, h("option", { value: "" }, "all"), Object.entries(LABELS).map(([v, t]) => h("option", { value: v }, t)));
  const action = h("select", { id: "f-action" }, h("option", { value: "" }, "all"), Object.keys(ACTIONS).map((v) => h("option", { value: v }, v)));
  const limit = (id, value) => h("input", { id, type: "number", min: "0", max: "1", step: "0.05", placeholder: value, inputmode: "decimal" });
  const low = limit("f-low", "0"), high = limit("f-high", "1");
  const pause = h("button", { type: "button", "aria-pressed": "false", onclick: () => toggle() }, "Pause");
  const field = (name, input) => h("div", { class: "field" }, h("label", { for: input.id }, name), input);

  const row = (r) => h("tr", {},
    h("td", { class: "optional" }, when(r.at)),
    h("td", { class: "event" }, h("a", { href: `#/why/${encodeURIComponent(r.event_id)}` }, r.event_id)),
    h("td", { class: "optional" }, r.tenant),
    h("td", {}, badge(r.label), r.uncertain ? h("span", { class: "quiet optional", title: "in the band in which the model abstains" }, " uncertain") : null),
    h("td", { class: "number" }, score(r.score)),
    h("td", {}, badge(r.action)),
    h("td", { class: "optional" }, r.reason ? h("code", {}, r.reason) : r.cache === "hit" ? "cache" : ""),
    h("td", { class: "number optional" }, milliseconds(r.total_ms)));

  function add(fresh) {
    rows.prepend(...fresh.map(row).reverse());
    while (rows.children.length > KEPT_ROWS) rows.lastChild.remove();
  }

  function toggle() {
    paused = !paused;
    pause.textContent = paused ? "Resume" : "Pause";
    pause.setAttribute("aria-pressed", String(paused));
    say(paused ? "Rows paused" : "Rows resumed");
    if (!paused) add(waiting.splice(0));
  }

  let seenRecently = [];
  function onRows({ rows: fresh, of }) {
    seenRecently.push([fresh.length, of]);
    seenRecently = seenRecently.slice(-12);
    if (paused) waiting = [...waiting, ...fresh].slice(-KEPT_ROWS);
    else add(fresh);
    const [shown, all] = seenRecently.reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);
    sample.textContent = all > shown ? `showing 1 in ${Math.max(2, Math.round(all / shown))} of the rows, at random; every verdict is counted above` : "showing every verdict";
  }

  function onSummary(s) {
    const failed = s.labels.undetermined || 0;
    const share = (part) => (s.verdicts ? `${((100 * part) / s.verdicts).toFixed(1)}%` : "–");
    tiles.rate.value.textContent = count(s.per_s);
    tiles.rate.note.textContent = `${count(s.verdicts)} in a minute`;
    tiles.generated.value.textContent = share(s.labels.ai_generated || 0);
    tiles.generated.note.textContent = `${count(s.uncertain)} uncertain`;
    tiles.failed.value.textContent = share(failed);
    tiles.failed.note.textContent = count(failed);
    tiles.hits.value.textContent = share(s.cache_hits);
    tiles.hits.note.textContent = count(s.cache_hits);
    tiles.lag.value.textContent = s.fleet && s.fleet.answering ? count(s.fleet.lag) : "–";
    tiles.lag.note.textContent = s.fleet ? `${s.fleet.answering} of ${s.fleet.workers} workers answer` : "no worker named";
    fill(spark, sparkline(s.rates, `verdicts a second over the last minute, ${s.per_s} now`));
    fill(panels.outcomes.body, shares(Object.entries(LABELS).map(([kind, name]) => ({ kind, name, value: s.labels[kind] || 0 })), s.verdicts), h("hr", {}), shares(Object.keys(ACTIONS).map((kind) => ({ kind, name: kind, value: s.actions[kind] || 0 })), s.verdicts));
    latencies(panels.latency.body, s.latency_ms);
    fill(panels.failures.body, bars(Object.entries(s.reasons).map(([name, value]) => ({ name: h("code", {}, name), value, kind: "block" }))));
    const sizes = s.fleet?.batch_sizes.filter((size) => size.batches) || [];
    fill(panels.batches.body,
      s.fleet ? bars(sizes.map((size) => ({ name: size.most === null ? "more" : `up to ${size.most}`, value: size.batches }))) :
        h("p", { class: "quiet" }, "Name the workers' /metrics pages in ", h("code", {}, "WORKER_CONSOLE__METRICS_URLS"), " to see this."),
      s.fleet ? h("p", { class: "quiet" }, `${count(s.fleet.in_flight)} in flight · ${count(s.fleet.paused_partitions)} partitions paused`) : null);
    for (const name of s.tenants) {
      if (![...tenant.options].some((option) => option.value === name)) tenant.append(h("option", { value: name }, name));
    }
    connected(s.feed.connected && s.feed.caught_up, s.feed.connected ? "Reading what is in the topics already…" : "The broker does not answer; the console keeps trying.");
  }

  function restart() {
    stream?.close();
    rows.replaceChildren();
    waiting = [];
    seenRecently = [];
    sample.textContent = "waiting for verdicts…";
    filter = Object.fromEntries(Object.entries({ tenant: tenant.value, label: label.value, action: action.value, low: low.value, high: high.value }).filter(([, v]) => v !== ""));
    stream = listen("api/live", filter, { rows: onRows, summary: onSummary }, (good) => { if (!good) connected(false); });
  }

  const filters = h("form", { class: "filters", "aria-label": "Filter verdicts", onsubmit: (event) => event.preventDefault(), onchange: restart },
    field("Tenant", tenant), field("Label", label), field("Action", action),
    h("fieldset", { class: "field range" }, h("legend", {}, "Score"), h("label", { for: "f-low", class: "unseen" }, "least score"), low, " to ",
      h("label", { for: "f-high", class: "unseen" }, "largest score"), high),
    h("button", { type: "reset", class: "plain", onclick: () => setTimeout(restart) }, "Clear"));

  fill(main,
    h("div", { class: "head" }, h("h1", {}, "Live"), filters),
    h("section", { class: "tiles", "aria-label": "The last minute" }, Object.values(tiles).map((t, i) =>
      h("div", { class: "card tile" }, h("span", { class: "name" }, t.name), t.value, t.note, i === 0 ? spark : null))),
    h("section", { class: "panels", "aria-label": "Details of the last minute" }, Object.values(panels).map((p) =>
      h("div", { class: "card" }, h("h2", {}, p.title), p.body))),
    h("section", { class: "card" },
      h("div", { class: "head" }, h("h2", { id: "rows-title" }, "Verdicts"), sample, pause),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-labelledby": "rows-title" },
        h("table", { class: "rows", "aria-describedby": "sample" },
          h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "optional" }, "time"), h("th", { scope: "col" }, "event"), h("th", { scope: "col", class: "optional" }, "tenant"),
            h("th", { scope: "col" }, "label"), h("th", { scope: "col", class: "number" }, "score"), h("th", { scope: "col" }, "action"),
            h("th", { scope: "col", class: "optional" }, "note"), h("th", { scope: "col", class: "number optional" }, "total"))),
          rows))));
  restart();
  const unbind = keys({ p: toggle });
  return () => { unbind(); stream?.close(); };
}
