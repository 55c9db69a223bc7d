// The words of the pages, and how they ask. Texts of others go in by textContent only.
const WORDS = {
  en: {
    title: "Customer service", send: "Ask", person: "Ask a person", queue: "Hand-offs",
    drafts: "Drafts of articles", unknown: "I do not know. You can ask a person.",
    near: "Perhaps one of these:", source: "From:", asked: "A person has been asked and will answer here.",
    take: "Take", solve: "Solved", reply: "Answer", publish: "Make it an article", drop: "Throw away",
    nobody: "Nobody waits.", words: "Found by words alone: the encoder did not answer in time.",
    name: "Your name", id: "Name of the article",
  },
  zh: {
    title: "客户服务", send: "提问", person: "转人工", queue: "人工队列",
    drafts: "文章草稿", unknown: "我不知道。您可以转人工。",
    near: "也许是这些：", source: "来源：", asked: "已转人工，回复会出现在这里。",
    take: "接手", solve: "已解决", reply: "回复", publish: "存为文章", drop: "丢弃",
    nobody: "没有人在等。", words: "仅按词语查找：编码器没有及时回答。",
    name: "您的名字", id: "文章名称",
  },
};
const language = (navigator.language || "en").startsWith("zh") ? "zh" : "en";
document.documentElement.lang = language;

export const word = (key) => WORDS[language][key];

export function fill() {
  for (const each of document.querySelectorAll("[data-word]")) each.textContent = word(each.dataset.word);
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

export function link(title, address) {
  const safe = /^(https?:\/\/|\/)/.test(address || "");
  const made = make(safe ? "a" : "span", title);
  if (safe) { made.href = address; made.rel = "noreferrer"; }
  return made;
}
