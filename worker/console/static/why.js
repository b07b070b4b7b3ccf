// Why: one verdict and everything it stands on.

import { get } from "./api.js";
import { appealForm } from "./decided.js";
import { fill, h, keys } from "./dom.js";
import { describe, explain, heads, history, neighbours, origin, outcome, provenance, timings } from "./evidence.js";
import { picture } from "./picture.js";

export function open(main, context, eventId) {
  let unbind = () => {}, open = true;

  async function load() {
    let found;
    try {
      found = await get("api/verdict", { event_id: eventId });
    } catch (refusal) {
      fill(main, h("h1", {}, "Why"), h("p", { class: "card" }, `${refusal.message}.`));
      return;
    }
    if (!open) return;
    const { verdict, rule, rule_problem: problem, item } = found;
    const shown = picture(get("api/picture", { event_id: verdict.event_id }), describe(verdict));
    const near = neighbours();
    fill(main,
      h("div", { class: "head" }, h("h1", {}, "Why"), h("p", { class: "event quiet" }, verdict.event_id)),
      h("div", { class: "columns" },
        h("div", { class: "column" }, h("div", { class: "card part-picture" }, shown.element), heads(verdict), near.element),
        h("div", { class: "column" }, outcome(verdict, rule, problem), provenance(verdict), history(item),
          context.person.may_decide && item?.decision && !item.open ? appealForm(item, load) : null, timings(verdict), origin(verdict))));
    unbind();
    unbind = keys(shown.keys);
    explain(verdict.event_id, shown, near);
  }

  load();
  return () => { open = false; unbind(); };
}
