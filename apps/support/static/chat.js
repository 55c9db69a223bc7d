import { ask, link, make } from "/shared/page.js";
import { word } from "/static/words.js";

const fresh = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (n) => n.toString(16).padStart(2, "0")).join("");
const own = sessionStorage.getItem("conversation") || fresh();
sessionStorage.setItem("conversation", own);
const lines = document.getElementById("lines");

function answered(told) {
  const item = make("li", "", "service");
  if (told.refused) item.append(make("p", told.refused));
  else if (!told.known) item.append(make("p", word("unknown")));
  if (told.said) item.append(make("p", told.said));
  if (told.known) {
    item.append(make("blockquote", told.passage));
    const from = make("small", `${word("source")} `);
    from.append(link(told.title, told.link));
    item.append(from);
  } else if ((told.others || []).length) {
    item.append(make("small", word("near")));
    for (const each of told.others) {
      const line = make("div");
      line.append(link(each.title, each.link));
      item.append(line);
    }
  }
  if (told.by_words_alone) item.append(make("p", word("words")));
  return item;
}

const stream = new EventSource(`/conversations/${own}/events`);
stream.onmessage = (event) => {
  const line = JSON.parse(event.data);
  lines.append(line.who === "service" ? answered(JSON.parse(line.text)) : make("li", line.text, line.who));
  lines.lastChild.scrollIntoView();
  document.body.dataset.line = line.number;
};
document.getElementById("ask").onsubmit = (event) => {
  event.preventDefault();
  const box = document.getElementById("text");
  ask(`/conversations/${own}/messages`, { text: box.value }).then(() => { box.value = ""; }, () => {});
};
document.getElementById("person").onclick = () =>
  ask(`/conversations/${own}/handoff`).then(() => lines.append(make("li", word("asked"), "person")), () => {});
