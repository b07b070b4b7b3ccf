// What was decided, by whom and why; and appeals.

import { get, post } from "./api.js";
import { badge, fill, h, say, score, when } from "./dom.js";
import { REASONS } from "./evidence.js";

export function appealForm(item, done) {
  const problem = h("p", { class: "problem", role: "alert" });
  const note = h("textarea", { id: "appeal-note", rows: "2", maxlength: "2000", required: true });
  const submit = async (event) => {
    event.preventDefault();
    try {
      await post("api/appeal", { entry: item.entry, note: note.value });
      say("Appealed: somebody else will decide");
      done();
    } catch (refusal) {
      problem.textContent = `${refusal.message}.`;
    }
  };
  return h("form", { class: "card", onsubmit: submit }, h("h2", {}, "Appeal"), h("p", { class: "quiet" }, "The image goes back into the queue, for somebody else than ", item.decision.by, " to decide."),
    h("label", { for: "appeal-note" }, "Why is the decision wrong?"), note, problem, h("button", {}, "Appeal"));
}

export function open(main, { connected }) {
  let alive = true, timer;
  const rows = h("tbody", {});
  const nothing = h("p", { class: "quiet" });
  const search = h("input", { type: "search", id: "search", placeholder: "event, SHA-256 or reviewer", oninput: () => { clearTimeout(timer); timer = setTimeout(load, 250); } });

  async function load() {
    let found;
    try {
      found = (await get("api/decided", { search: search.value })).entries;
    } catch {
      connected(false);
      return;
    }
    if (!alive) return;
    connected(true);
    nothing.textContent = found.length ? "" : "Nothing was decided yet, or nothing fits.";
    fill(rows, found.map((row) => h("tr", {},
      h("td", { class: "optional" }, when(row.decision.at)),
      h("td", { class: "event" }, row.event_id ? h("a", { href: `#/why/${encodeURIComponent(row.event_id)}` }, row.event_id) : row.entry),
      h("td", { class: "optional" }, row.label ? badge(row.label) : "", h("span", { class: "quiet" }, ` ${score(row.score)}`)),
      h("td", {}, badge(row.decision.label), h("span", { class: "quiet" }, ` ${row.decision.decision || "assign"}`)),
      h("td", {}, row.decision.by),
      h("td", { class: "optional" }, REASONS[row.decision.why?.reason] || "", row.decision.why?.note ? h("span", { class: "quiet" }, ` ${row.decision.why.note}`) : null),
      h("td", {}, row.appeal ? h("span", { class: "badge review" }, "appealed") : row.decision.reverses ? h("span", { class: "badge" }, "reversed") : "",
        row.decision.events > 1 ? h("span", { class: "quiet" }, ` ${row.decision.events} uploads`) : null))));
  }

  fill(main, h("div", { class: "head" }, h("h1", {}, "Decided"), h("div", { class: "filters" }, h("div", { class: "field" }, h("label", { for: "search" }, "Search"), search))),
    h("div", { class: "card" }, h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Decisions" }, h("table", { class: "rows" },
      h("thead", {}, h("tr", {}, ["time", "event", "model", "decision", "by"].map((name) => h("th", { scope: "col", class: name === "time" || name === "model" ? "optional" : null }, name)),
        h("th", { scope: "col", class: "optional" }, "why"), h("th", { scope: "col" }, "state"))), rows)), nothing));
  load();
  const again = setInterval(load, 5000);
  return () => { alive = false; clearInterval(again); clearTimeout(timer); };
}
