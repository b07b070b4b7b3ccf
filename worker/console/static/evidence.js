// What a verdict stands on, in parts that Why, Review and Try share.

import { get } from "./api.js";
import { bars, scale } from "./charts.js";
import { HEADS, LABELS, badge, fill, h, milliseconds, score, when } from "./dom.js";

const card = (title, ...children) => h("section", { class: `card part-${title.split(" ")[0].toLowerCase()}` }, h("h2", {}, title), children);
const facts = (pairs) => h("dl", { class: "facts" }, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
  .map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));

export function outcome(verdict, rule, problem) {
  return card("Verdict",
    h("p", { class: "outcome" }, badge(verdict.label), h("b", { class: "big" }, score(verdict.score)), badge(verdict.action),
      verdict.uncertain ? h("span", { class: "quiet" }, "uncertain: in the band in which the model abstains") : null),
    rule && verdict.score !== null ? scale(verdict.score, rule.thresholds, verdict.label) : null,
    rule ? h("p", {}, rule.because) : h("p", { class: "quiet" }, problem ? `The rule cannot be shown: ${problem}.` : ""),
    rule ? h("p", { class: "quiet" }, `Policy ${verdict.policy.name} ${verdict.policy.version}, rule of tenant ${rule.rule_of}`,
      written(rule), rule.same_policy ? "" : `. This console knows version ${rule.policy.version}: the numbers may have been others.`) : null,
    rule && !rule.same_model ? h("p", { class: "quiet" }, "This console has another model than the one that made this verdict: " +
      "heat map and neighbours are its own.") : null,
    rule || !verdict.reason ? null : h("p", {}, "No score: ", h("code", {}, verdict.reason)));
}

function written(rule) {
  const parts = ["review", "block"].filter((name) => rule.written[name].length).map((name) => `${name} = ${rule.written[name].join(" or ")}`);
  return parts.length ? `: ${parts.join(", ")}` : "";
}

export function heads(verdict) {
  const rows = Object.entries(HEADS).filter(([head]) => head in verdict.evidence.heads).map(([head, name]) => ({
    name: head === verdict.model.head ? h("span", {}, name, h("span", { class: "quiet" }, " decides")) : name,
    value: verdict.evidence.heads[head], shown: score(verdict.evidence.heads[head]), kind: head === verdict.model.head ? verdict.label : "light",
  }));
  return card("Heads", bars(rows, 1, "none: there is no score"),
    verdict.evidence.crops.length > 1 ? h("p", { class: "quiet" }, `crops: ${verdict.evidence.crops.map(score).join(", ")}`) : null);
}

export function neighbours(found) {
  const body = h("div", {});
  const show = (evidence) => fill(body, evidence.neighbours.length ? h("table", { class: "small" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "image"), h("th", { scope: "col" }, "label"), h("th", { scope: "col", class: "number" }, "cosine"))),
    h("tbody", {}, evidence.neighbours.map((n) => h("tr", {}, h("td", { class: "neighbour" }, n.id), h("td", {}, badge(n.label)), h("td", { class: "number" }, n.cosine.toFixed(3)))))) :
    h("p", { class: "quiet" }, "none"));
  if (found) show(found);
  else fill(body, h("p", { class: "quiet" }, "looking…"));
  return { element: card("Nearest labelled images", body), show, failed: (text) => fill(body, h("p", { class: "quiet" }, text)) };
}

export function provenance(verdict) {
  const names = { c2pa: "C2PA manifest", digital_source_type: "IPTC source type", generator_metadata: "generator's mark" };
  const found = Object.entries(verdict.evidence.provenance).filter(([, value]) => value !== null);
  return card("Provenance", found.length ? facts(found.map(([name, value]) => [names[name] || name, typeof value === "string" ? value : JSON.stringify(value)])) :
    h("p", { class: "quiet" }, "No mark in the file. That says nothing: marks are easily lost."));
}

export function timings(verdict) {
  const stages = ["fetch", "decode", "queue", "infer", "total"].filter((stage) => typeof verdict.timings_ms[stage] === "number");
  return card("Timings", bars(stages.map((stage) => ({ name: stage, value: verdict.timings_ms[stage], shown: milliseconds(verdict.timings_ms[stage]), kind: stage === "total" ? "over" : "light" })), 0, "none"),
    h("p", { class: "quiet" }, verdict.cache === "hit" ? "scores from the cache" : "scored by the engine"));
}

export function origin(verdict) {
  const image = verdict.image;
  const item = verdict.item || {};
  return card("Item",
    facts([
      ["event", verdict.event_id], ["tenant", verdict.tenant], ["item", [item.type, item.id].filter(Boolean).join(" ")], ["creator", item.creator_id],
      ["image", image.width ? `${image.width} × ${image.height} ${image.format}${image.frames > 1 ? `, ${image.frames} frames` : ""}` : null],
      ["sha256", image.sha256 ? h("code", { class: "hash" }, image.sha256) : null],
      ["model", `${verdict.model.name} ${verdict.model.version}, ${HEADS[verdict.model.head] || verdict.model.head}, ${verdict.model.backend} on ${verdict.model.device}`],
      ["source", `${verdict.source.topic} ${verdict.source.partition}/${verdict.source.offset}`], ["judged", when(verdict.processed_at)],
      ...Object.entries(verdict.attributes || {}).map(([name, value]) => [name, value]),
    ]));
}

export const REASONS = { artefacts: "Visible traces of generation", provenance: "Provenance or metadata", source: "Known source or author", camera: "Traces of camera, lens or scanner", other: "Other (say what)" };

export function history(item) {
  const text = (record) => {
    if (record.type === "decision") {
      return [h("b", {}, record.by), ` decided `, badge(record.label), ` (${record.decision || "assign"}${record.reverses ? ", reversing what was decided before" : ""}): `,
        REASONS[record.why?.reason] || record.why?.reason || "no reason given", record.why?.note ? `. ${record.why.note}` : ""];
    }
    if (record.type === "appeal") return [h("b", {}, record.by), ` appealed: ${record.note || "no reason given"}`];
    return [h("b", {}, record.by), " skipped it"];
  };
  const records = item?.history || [];
  return card("History", records.length ? h("ol", { class: "history" }, records.map((record) => h("li", {}, when(record.at), " ", text(record)))) :
    h("p", { class: "quiet" }, "Nobody has decided about this image."));
}

export async function explain(eventId, shown, near) {
  try {
    const found = await get("api/explanation", { event_id: eventId });
    if (found.unavailable) throw new Error(found.unavailable);
    shown.explain(found);
    near.show(found);
  } catch (refusal) {
    shown.failed(`No heat map: ${refusal.message}.`);
    near.failed("none: the image cannot be scored here");
  }
}

export const describe = (verdict) => `The image of event ${verdict.event_id}, judged ${LABELS[verdict.label]}`;
