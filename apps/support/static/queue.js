import { ask, make } from "/shared/page.js";
import { word } from "/static/words.js";

let person = sessionStorage.getItem("person") || "";

function button(text, act) {
  const made = make("button", text);
  made.onclick = () => act().then(show, () => {});
  return made;
}

async function handoff(each) {
  const item = make("li");
  item.append(make("p", `${each.question}`), make("small", `${each.state} ${each.person}`));
  for (const line of await ask(`/conversations/${each.conversation}/lines`, undefined, "GET")) {
    if (line.who !== "service") item.append(make("blockquote", line.text));
  }
  if (each.state === "open") {
    const name = make("input");
    name.placeholder = word("name");
    name.value = person;
    item.append(name, button(word("take"), () => {
      person = name.value;
      sessionStorage.setItem("person", person);
      return ask(`/handoffs/${each.number}/take`, { person });
    }));
  } else {
    const text = make("input");
    item.append(
      text,
      button(word("reply"), () => ask(`/handoffs/${each.number}/reply`, { text: text.value })),
      button(word("solve"), () => ask(`/handoffs/${each.number}/solve`)),
    );
  }
  return item;
}

function draft(each) {
  const item = make("li");
  const id = make("input"), title = make("input"), text = make("textarea");
  id.placeholder = word("id");
  id.value = `solved-${each.number}`;
  title.value = each.title;
  text.value = each.text;
  const body = () => ({ id: id.value, title: title.value, text: text.value });
  item.append(id, title, text,
    button(word("publish"), () => ask(`/drafts/${each.number}/publish`, body())),
    button(word("drop"), () => ask(`/drafts/${each.number}`, undefined, "DELETE")));
  return item;
}

let shown = "";
async function show() {
  const [queue, drafts] = [await ask("/handoffs", undefined, "GET"), await ask("/drafts", undefined, "GET")];
  const all = await Promise.all(queue.map(handoff));
  document.getElementById("handoffs").replaceChildren(...(all.length ? all : [make("li", word("nobody"))]));
  document.getElementById("drafts").replaceChildren(...drafts.map(draft));
  shown = JSON.stringify([queue, drafts]);
}
async function look() {
  const now = JSON.stringify([await ask("/handoffs", undefined, "GET"), await ask("/drafts", undefined, "GET")]);
  if (now !== shown) await show();
}
show();
setInterval(() => look().catch(() => {}), 2000);
