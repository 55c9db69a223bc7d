// What the pages of all applications share. Texts of others go in by textContent only.
export const language = (navigator.language || "en").startsWith("zh") ? "zh" : "en";
document.documentElement.lang = language;

export function speak(words) {
  const word = (key) => words[language][key];
  for (const each of document.querySelectorAll("[data-word]")) each.textContent = word(each.dataset.word);
  document.title = document.querySelector("h1").textContent;
  return word;
}

export function make(tag, text = "", kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

export async function ask(path, body, method = "POST") {
  const asked = { method, headers: { "x-shoal": "1", "content-type": "application/json" } };
  if (body !== undefined) asked.body = JSON.stringify(body);
  const answer = await fetch(path, method === "GET" ? {} : asked);
  const text = await answer.text();
  let said = text;
  try { said = JSON.parse(text); } catch { /* a refusal at the door is plain text */ }
  document.getElementById("wrong").textContent = answer.ok ? "" : said.error || text;
  if (!answer.ok) throw new Error(said.error || text);
  return said;
}

export const get = (path) => ask(path, undefined, "GET");

export function link(title, address) {
  const safe = /^(https?:\/\/|\/)/.test(address || "");
  const made = make(safe ? "a" : "span", title);
  if (safe) { made.href = address; made.rel = "noreferrer"; }
  return made;
}
