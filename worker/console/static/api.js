// Talking to the console's server; addresses are relative, so that a proxy may put it anywhere.

let csrf = "";

export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(method, path, body, headers = {}) {
  const changing = method !== "GET";
  let answer;
  try {
    answer = await fetch(path, { method, body, headers: changing ? { "X-CSRF-Token": csrf, ...headers } : headers });
  } catch {
    throw new Refusal(0, "the console does not answer");
  }
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    if (answer.status === 401 && path !== "api/session") dispatchEvent(new Event("signed-out"));
    throw new Refusal(answer.status, content.error || `the console answers ${answer.status}`);
  }
  return content;
}

export const get = (path, query) => request("GET", query ? `${path}?${new URLSearchParams(query)}` : path);
export const post = (path, content) => request("POST", path, JSON.stringify(content), { "Content-Type": "application/json" });
export const send = (path, blob) => request("POST", path, blob, { "Content-Type": "application/octet-stream" });
export const remove = (path) => request("DELETE", path);

export async function me() {
  const found = await get("api/me");
  csrf = found.csrf;
  return found;
}

// An event stream that comes back by itself, and says when it is gone.
export function listen(path, query, handlers, onState) {
  const source = new EventSource(query ? `${path}?${new URLSearchParams(query)}` : path);
  for (const [name, handler] of Object.entries(handlers)) {
    source.addEventListener(name, (event) => handler(JSON.parse(event.data)));
  }
  let again;
  source.onopen = () => onState(true);
  source.onerror = () => {
    onState(false);
    if (source.readyState === EventSource.CLOSED) {
      get("api/me").then((found) => found.signed_in || dispatchEvent(new Event("signed-out")), () => {});
      again = setTimeout(() => { current = listen(path, query, handlers, onState); }, 2000);
    }
  };
  let current = null;
  return { close: () => { clearTimeout(again); source.close(); current?.close(); } };
}
