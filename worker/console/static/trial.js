// Try: what the worker would say of an image. Nothing is published, nothing is kept.

import { send } from "./api.js";
import { fill, h, keys, say } from "./dom.js";
import { heads, neighbours, outcome, provenance, timings } from "./evidence.js";
import { picture } from "./picture.js";

export function open(main, { person }) {
  let unbind = () => {};
  const result = h("div", { "aria-live": "polite" });
  const tenant = h("input", { id: "trial-tenant", value: "default", maxlength: "200" });
  const file = h("input", { type: "file", id: "trial-file", accept: "image/*,.heic,.heif,.avif", onchange: () => file.files[0] && judge(file.files[0]) });
  const drop = h("label", { class: "drop", for: "trial-file" }, h("b", {}, "Drop an image here"), h("span", {}, "or choose a file"), file);
  const over = (is) => (event) => { event.preventDefault(); drop.classList.toggle("over", is); };
  drop.addEventListener("dragover", over(true));
  drop.addEventListener("dragleave", over(false));
  drop.addEventListener("drop", (event) => { over(false)(event); if (event.dataTransfer.files[0]) judge(event.dataTransfer.files[0]); });

  async function judge(blob) {
    if (blob.size > person.max_image_bytes) {
      fill(result, h("p", { class: "card problem" }, `Larger than ${Math.round(person.max_image_bytes / 2 ** 20)} MiB, which is what the worker takes.`));
      return;
    }
    fill(result, h("p", { class: "card quiet" }, `Scoring ${blob.name}…`));
    let found;
    try {
      found = await send(`api/trial?${new URLSearchParams({ tenant: tenant.value })}`, blob);
    } catch (refusal) {
      fill(result, h("section", { class: "card trial" }, h("p", { class: "stamp" }, "Trial"), h("p", { class: "problem" }, `No verdict for ${blob.name}: ${refusal.message}.`)));
      return;
    }
    if (found.unavailable) {
      fill(result, h("section", { class: "card trial" }, h("p", { class: "stamp" }, "Trial"), h("p", { class: "problem" }, `No verdict for ${blob.name}: ${found.unavailable}.`)));
      return;
    }
    const { verdict, evidence, rule } = found;
    const preview = URL.createObjectURL(new Blob([Uint8Array.from(atob(found.preview), (c) => c.charCodeAt(0))], { type: "image/webp" }));
    const shown = picture(Promise.resolve({ link: preview }), `The image ${blob.name} that is being tried`);
    shown.image.addEventListener("load", () => URL.revokeObjectURL(preview), { once: true });
    shown.explain(evidence);
    fill(result, h("div", { class: "trial" },
      h("p", { class: "stamp" }, "Trial", h("span", {}, ` ${blob.name}: nothing was published, nothing is kept`)),
      h("div", { class: "columns" },
        h("div", { class: "column" }, h("div", { class: "card part-picture" }, shown.element), heads(verdict)),
        h("div", { class: "column" }, outcome(verdict, rule), neighbours(evidence).element, provenance(verdict), timings(verdict)))));
    unbind();
    unbind = keys(shown.keys);
    say(`Trial: ${verdict.label}`);
  }

  fill(main, h("h1", {}, "Try"), h("p", { class: "quiet" }, "See what the worker would say of an image. This is a trial: no event, no verdict and no picture leaves this page's server."),
    h("div", { class: "card" }, drop, h("div", { class: "field" }, h("label", { for: "trial-tenant" }, "Tenant whose rule applies"), tenant)), result);
  return () => unbind();
}
