// The shell: who is here, which view is open, light or dark.

import { me, post, remove } from "./api.js";
import { fill, h } from "./dom.js";
import * as decided from "./decided.js";
import * as live from "./live.js";
import * as review from "./review.js";
import * as trial from "./trial.js";
import * as why from "./why.js";

const VIEWS = { live, review, decided, try: trial, why };
const NAMES = { live: "Live", review: "Review", decided: "Decided", try: "Try" };
const main = document.getElementById("main");
const connection = document.getElementById("connection");
let person = null;
let close = () => {};

function connected(good, text = "The connection to the console is lost; trying again.") {
  connection.hidden = good;
  connection.textContent = good ? "" : text;
}

function navigation(view) {
  fill(document.getElementById("views"), Object.entries(NAMES).map(([name, text]) =>
    h("a", { href: `#/${name}`, "aria-current": name === view ? "page" : null }, text)));
}

function theme(next) {
  if (next) localStorage.setItem("theme", next);
  const chosen = localStorage.getItem("theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
  const dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  return dark ? "dark" : "light";
}

function people() {
  const dark = theme() === "dark";
  const box = document.getElementById("person");
  fill(box,
    person && h("span", { class: "who", title: `signed in as ${person.name}` }, person.name, " ", h("span", { class: "badge" }, person.role)),
    h("button", { class: "plain", type: "button", title: dark ? "Light colours" : "Dark colours", "aria-label": dark ? "Light colours" : "Dark colours",
      onclick: () => { theme(dark ? "light" : "dark"); people(); } }, dark ? "☀" : "☾"),
    person?.auth === "token" && h("button", { class: "plain", type: "button", onclick: async () => { await remove("api/session"); enter(); } }, "Sign out"));
}

function signIn(auth) {
  close();
  close = () => {};
  person = null;
  people();
  fill(document.getElementById("views"));
  document.title = "Sign in · CoDE console";
  if (auth !== "token") {
    fill(main, h("section", { class: "card narrow" }, h("h1", {}, "Not signed in"),
      h("p", {}, "This console takes your name from the proxy in front of it, and it gave none that may come in.")));
    return;
  }
  const problem = h("p", { class: "problem", role: "alert" });
  const field = h("input", { type: "password", id: "token", autocomplete: "current-password", required: true });
  const submit = async (event) => {
    event.preventDefault();
    problem.textContent = "";
    try {
      await post("api/session", { token: field.value });
      enter();
    } catch (refusal) {
      problem.textContent = `${refusal.message[0].toUpperCase()}${refusal.message.slice(1)}.`;
      field.select();
    }
  };
  fill(main, h("form", { class: "card narrow", onsubmit: submit }, h("h1", {}, "Sign in"),
    h("label", { for: "token" }, "Your token"), field, problem, h("button", { class: "primary" }, "Sign in")));
  field.focus();
}

function show() {
  if (!person) return;
  const [name, ...rest] = location.hash.replace(/^#\//, "").split("/");
  const view = VIEWS[name] ? name : "live";
  if (location.hash === "#main") return;
  close();
  navigation(view);
  connected(true);
  fill(main);
  scrollTo(0, 0);
  document.title = `${NAMES[view] || "Why"} · CoDE console`;
  close = VIEWS[view].open(main, { person, connected }, decodeURIComponent(rest.join("/"))) || (() => {});
  main.focus({ preventScroll: true });
}

async function enter() {
  let found;
  try {
    found = await me();
  } catch {
    connected(false);
    setTimeout(enter, 2000);
    return;
  }
  connected(true);
  if (!found.signed_in) {
    signIn(found.auth);
    return;
  }
  person = found;
  people();
  show();
}

addEventListener("hashchange", show);
addEventListener("signed-out", enter);
theme();
enter();
