import { ask, get, make, speak } from "/shared/page.js";

const word = speak({
  en: {
    title: "Recommendation", diversity: "diversity", taken: "Taken last", take: "Take",
    near: "others took it close to", genre: "has this in common with", many: "people took it",
    unknown: "This user is not known yet: here is what most people took.",
  },
  zh: {
    title: "个性化推荐", diversity: "多样性", taken: "最近看过", take: "选择",
    near: "其他人常与它一起选：", genre: "相同类型：", many: "人选过",
    unknown: "还不认识这位用户：以下是大多数人选过的。",
  },
});
const user = document.getElementById("user");
const diversity = document.getElementById("diversity");

function because(reason) {
  if (reason.kind === "near") return `${word("near")} ${reason.title}`;
  if (reason.kind === "genre") return `${reason.genre}: ${word("genre")} ${reason.title}`;
  return `${reason.count} ${word("many")}`;
}

function item(each) {
  const made = make("li");
  const take = make("button", word("take"));
  take.onclick = () => ask("/events", { user: user.value, item: each.id }).then(show, () => {});
  made.append(make("strong", each.title), make("small", ` ${each.genres.join(", ")} `));
  made.append(make("div", because(each.reason)), take);
  return made;
}

async function show() {
  if (!user.value.trim()) return;
  const asked = new URLSearchParams({ user: user.value, diversity: diversity.value });
  const found = await get(`/recommend?${asked}`);
  document.getElementById("items").replaceChildren(...found.items.map(item));
  document.getElementById("about").textContent = found.known ? "" : word("unknown");
  const taken = found.known ? (await get(`/users/${encodeURIComponent(user.value)}`)).taken : [];
  document.getElementById("taken").replaceChildren(...taken.map((each) => make("li", each.title)));
  document.body.dataset.shown = found.items.length;
}

user.onchange = () => show().catch(() => {});
diversity.onchange = () => show().catch(() => {});
document.getElementById("who").onsubmit = (event) => { event.preventDefault(); show().catch(() => {}); };
get("/users").then((users) => {
  document.getElementById("users").replaceChildren(...users.map((each) => {
    const made = make("option");
    made.value = each.user;
    return made;
  }));
  user.value = users.length ? users[0].user : "me";
  return show();
}).catch(() => {});
