// Elements without markup in strings: nothing a verdict says can become HTML.

const SVG = "http://www.w3.org/2000/svg";

function make(element, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "hidden") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(4).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const h = (tag, properties, ...children) => make(document.createElement(tag), properties, children);
export const svg = (tag, properties, ...children) => make(document.createElementNS(SVG, tag), properties, children);

export function fill(element, ...children) {
  element.replaceChildren(...children.flat(4).filter((child) => child !== null && child !== undefined && child !== false));
}

export function say(text) {
  const spoken = document.getElementById("spoken");
  spoken.textContent = "";
  setTimeout(() => { spoken.textContent = text; }, 50);
}

export const LABELS = { ai_generated: "AI-generated", authentic: "authentic", undetermined: "undetermined" };
export const ACTIONS = { allow: "allow", review: "review", block: "block" };
export const HEADS = { linear: "linear", knn: "nearest neighbours", ocsvm: "one-class SVM" };

export const badge = (kind, text) => h("span", { class: `badge ${kind}` }, text ?? LABELS[kind] ?? kind);

export const score = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 10_000) return `${(value / 1000).toFixed(1)} s`;
  return value >= 100 ? `${Math.round(value)} ms` : `${Number(value.toPrecision(2))} ms`;
}

export const count = (value) => Number(value).toLocaleString("en");

export function when(text) {
  const moment = typeof text === "number" ? new Date(text * 1000) : new Date(text);
  if (Number.isNaN(moment.getTime())) return h("span", {}, "–");
  const today = moment.toDateString() === new Date().toDateString();
  const shown = today ? moment.toLocaleTimeString("en-GB") : moment.toLocaleString("en-GB", { dateStyle: "short", timeStyle: "short" });
  return h("time", { datetime: moment.toISOString(), title: moment.toISOString() }, shown);
}

export function ago(text) {
  const seconds = Math.max(0, (Date.now() - new Date(text).getTime()) / 1000);
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 129_600 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86_400)} d`;
}

// Keys of a view: single letters, never while somebody types.
export function keys(map) {
  const pressed = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("textarea, select, input:not([type=radio]):not([type=checkbox]):not([type=range])");
    if (typing) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const action = map[event.key];
    if (action) {
      event.preventDefault();
      action();
    }
  };
  document.addEventListener("keydown", pressed);
  return () => document.removeEventListener("keydown", pressed);
}
