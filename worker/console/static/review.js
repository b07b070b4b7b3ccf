// Review: the queue, one image at a time, by keyboard. Who takes an image keeps it for some minutes.

import { get, listen, post } from "./api.js";
import { ago, badge, count, fill, h, keys, LABELS, say, score } from "./dom.js";
import { REASONS, describe, explain, heads, history, neighbours, origin, outcome, provenance } from "./evidence.js";
import { picture } from "./picture.js";

const RENEW_AT = 0.5;
const OPPOSITE = { ai_generated: "authentic", authentic: "ai_generated" };

export function open(main, { person, connected }, wanted) {
  let listing = { entries: [], waiting: 0, left_out: 0 }, current = null, panel = null, unbind = () => {}, renew = null, alive = true, busy = false;
  const list = h("ol", { class: "queue", "aria-label": "Images that wait for a decision" });
  const waiting = h("span", { class: "quiet" });
  const stage = h("div", { class: "stage" });

  function drawList() {
    waiting.textContent = `${count(listing.waiting)} waiting${listing.left_out ? `, ${count(listing.left_out)} more left out` : ""}`;
    fill(list, listing.entries.map((row) => h("li", {},
      h("button", { type: "button", class: "entry", "aria-current": row.entry === current?.entry ? "true" : null, "data-entry": row.entry, onclick: () => take(row.entry) },
        h("span", { class: "entry-top" }, badge(row.label), h("b", {}, score(row.score)), row.count > 1 ? h("span", { class: "badge" }, `${count(row.count)}×`) : null),
        h("span", { class: "entry-id" }, row.event_id || row.entry),
        h("span", { class: "quiet" }, `${row.tenant || ""} · ${row.first_seen ? ago(row.first_seen) : ""}`,
          row.appeal ? h("span", { class: "badge review" }, "appealed") : null, row.skipped ? " · skipped" : ""),
        row.holder ? h("span", { class: `holder ${row.holder === person.name ? "mine" : ""}` }, row.holder === person.name ? "yours" : `taken by ${row.holder}`) : null))),
    listing.entries.length ? null : h("li", { class: "quiet" }, "Nothing waits for review."));
  }

  function onQueue(found) {
    listing = found;
    connected(found.caught_up, "Reading what is in the topics already…");
    drawList();
    const row = current && listing.entries.find((each) => each.entry === current.entry);
    panel?.holder(row ? row.holder : null, current && !row);
  }

  async function take(entry) {
    if (busy) return;
    busy = true;
    try {
      await giveBack();
      if (person.may_decide) {
        const answer = await post("api/claim", { entry }).catch((refusal) => ({ claimed: false, message: refusal.message }));
        if (!answer.claimed) {
          say(answer.message);
          await show(entry, answer.message);
          return;
        }
      }
      await show(entry);
    } finally {
      busy = false;
    }
  }

  async function giveBack(skip = false) {
    clearInterval(renew);
    const held = current && panel?.mine;
    if (held && person.may_decide) await post("api/release", { entry: current.entry, skip }).catch(() => {});
  }

  function next() {
    const free = listing.entries.find((row) => row.entry !== current?.entry && (!row.holder || row.holder === person.name) && !row.skipped)
      || listing.entries.find((row) => row.entry !== current?.entry && !row.holder);
    if (free) take(free.entry);
    else {
      giveBack();
      current = panel = null;
      idle("Nothing else waits for you.");
    }
  }

  function idle(text) {
    unbind();
    unbind = keys({ n: next });
    fill(stage, h("div", { class: "card idle" }, h("p", {}, text), person.may_decide ?
      h("button", { class: "primary", type: "button", "aria-keyshortcuts": "n", onclick: next }, "Take the next one", h("kbd", {}, "n")) :
      h("p", { class: "quiet" }, "You may look at every image; deciding takes the role reviewer.")));
  }

  async function show(entry, problem = "") {
    let item, found;
    try {
      item = await get("api/entry", { entry });
      found = await get("api/verdict", { event_id: item.verdict.event_id });
    } catch (refusal) {
      fill(stage, h("p", { class: "card problem", role: "alert" }, `${refusal.message}.`));
      return;
    }
    if (!alive) return;
    current = item;
    const { verdict } = found;
    const shown = picture(get("api/picture", { event_id: verdict.event_id }), describe(verdict));
    const near = neighbours();
    panel = decisionPanel(item, verdict, problem);
    fill(stage, h("div", { class: "columns" },
      h("div", { class: "column" }, h("div", { class: "card part-picture" }, shown.element), outcome(verdict, found.rule, found.rule_problem), heads(verdict), near.element),
      h("div", { class: "column" }, panel.element, history(item), provenance(verdict), origin(verdict))));
    unbind();
    unbind = keys({ n: next, ...shown.keys, ...panel.keys });
    drawList();
    stage.querySelector("h2")?.focus();
    say(`${describe(verdict)}, score ${score(verdict.score)}`);
    explain(verdict.event_id, shown, near);
    if (person.may_decide && !problem) {
      renew = setInterval(() => post("api/claim", { entry }).then((answer) => answer.claimed || panel?.refuse(answer.message), (refusal) => panel?.refuse(refusal.message)), 1000 * person.claim_s * RENEW_AT);
    }
  }

  function decisionPanel(item, verdict, refused) {
    const problem = h("p", { class: "problem", role: "alert" }, refused ? `${refused}.` : "");
    const note = h("textarea", { id: "note", rows: "2", maxlength: "2000", placeholder: "what you saw (optional, except for “other”)" });
    const reasons = Object.entries(REASONS).map(([value, text], i) => h("label", { class: "reason" },
      h("input", { type: "radio", name: "reason", value, "aria-keyshortcuts": String(i + 1) }), h("span", {}, text), h("kbd", {}, String(i + 1))));
    const choice = (decision, label, text, key, kind) => ({ key, run: () => decide(decision, label),
      button: h("button", { type: "button", class: kind, "aria-keyshortcuts": key, onclick: () => decide(decision, label) }, text, h("kbd", {}, key)) });
    const choices = verdict.label === "undetermined" ?
      [choice("assign", "ai_generated", "It is AI-generated", "g", "primary"), choice("assign", "authentic", "It is authentic", "a", "primary")] :
      [choice("confirm", verdict.label, `Confirm: ${LABELS[verdict.label]}`, "c", "primary"), choice("overturn", OPPOSITE[verdict.label], `Overturn: ${LABELS[OPPOSITE[verdict.label]]}`, "o", "warn")];
    const skip = h("button", { type: "button", "aria-keyshortcuts": "s", onclick: () => skipIt() }, "Skip", h("kbd", {}, "s"));
    const state = { mine: !refused && person.may_decide };
    const form = h("fieldset", { class: "decision" }, h("legend", { class: "unseen" }, "Your decision"), h("div", { class: "reasons", role: "radiogroup", "aria-label": "Reason" }, reasons),
      h("label", { for: "note" }, "Note"), note, h("div", { class: "buttons" }, choices.map((each) => each.button), skip));
    const holder = h("p", { class: "holder-note" });

    async function decide(decision, label) {
      const reason = form.querySelector("input[name=reason]:checked")?.value;
      problem.textContent = "";
      if (!state.mine) return;
      if (!reason) {
        problem.textContent = "Choose a reason first: keys 1 to 5.";
        form.querySelector("input[name=reason]").focus();
        return;
      }
      if (busy) return;
      busy = true;
      form.disabled = true;
      try {
        await post("api/decide", { entry: item.entry, decision, label, reason, note: note.value, previous: item.decision?.record_id ?? null });
      } catch (refusal) {
        form.disabled = false;
        refuse(refusal.message);
        return;
      } finally {
        busy = false;
      }
      say(`Decided: ${LABELS[label]}`);
      clearInterval(renew);
      state.mine = false;
      next();
    }

    async function skipIt() {
      if (busy || !state.mine) return;
      await giveBack(true);
      state.mine = false;
      next();
    }

    function refuse(text) { problem.textContent = `${text}.`; }

    function setHolder(name, gone) {
      state.mine = person.may_decide && name === person.name;
      form.disabled = !state.mine;
      holder.textContent = gone ? "This one is not in the queue any more." : state.mine ? "" : name ? `${name} has this one.` : person.may_decide ? "Nobody has this one: choose it again to take it." : "";
    }

    if (!state.mine) form.disabled = true;
    const pick = (i) => { if (!form.disabled) { const radio = reasons[i].querySelector("input"); radio.checked = true; say(Object.values(REASONS)[i]); if (radio.value === "other") note.focus(); } };
    return {
      element: h("section", { class: "card decide" }, h("h2", { tabindex: "-1" }, item.appeal ? "Decide the appeal" : "Decide"),
        item.appeal ? h("p", {}, h("b", {}, item.appeal.by), ` appealed: ${item.appeal.note || "no reason given"}`) : null,
        item.count > 1 ? h("p", { class: "quiet" }, `${count(item.count)} uploads of this very image: the decision is for all of them.`) : null,
        person.may_decide ? form : h("p", { class: "quiet" }, "You may look; deciding takes the role reviewer."), holder, problem),
      keys: { ...Object.fromEntries(choices.map((each) => [each.key, each.run])), s: skipIt, ...Object.fromEntries(reasons.map((_, i) => [String(i + 1), () => pick(i)])) },
      holder: setHolder, refuse,
      get mine() { return state.mine; },
    };
  }

  fill(main, h("div", { class: "head" }, h("h1", {}, "Review"), waiting,
    h("p", { class: "quiet shortcuts" }, person.may_decide ? ["n next", "b show", "h heat", "1–5 reason", "c confirm", "o overturn", "s skip"].map((text) => {
      const [key, ...rest] = text.split(" ");
      return h("span", {}, h("kbd", {}, key), ` ${rest.join(" ")}`);
    }) : null)), h("div", { class: "desk" }, h("div", { class: "card side" }, list), stage));
  idle("Images are ordered by how uncertain the model is, and by how long they wait.");
  const stream = listen("api/queue", null, { queue: onQueue }, (good) => { if (!good) connected(false); });
  if (wanted) take(wanted);
  return () => { alive = false; unbind(); giveBack(); stream.close(); };
}
