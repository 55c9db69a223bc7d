import { get, make, speak } from "/shared/page.js";

const word = speak({
  en: {
    title: "Opinion monitoring", alerts: "Alerts", stream: "Messages", report: "Today",
    seen: "messages", copies: "copies", burst: "burst", learning: "learning what is usual",
    share: "negative", expected: "expected", none: "No alert yet.", ended: "ended", goes: "goes on",
    failed: "Not delivered:",
  },
  zh: {
    title: "舆情监控", alerts: "预警", stream: "消息", report: "今日日报",
    seen: "条消息", copies: "条重复", burst: "突发", learning: "正在学习平时水平",
    share: "负面", expected: "预期", none: "尚无预警。", ended: "已结束", goes: "进行中",
    failed: "未能送达：",
  },
});
const SVG = "http://www.w3.org/2000/svg";
const clock = (at) => new Date(at * 1000).toLocaleString();

function line(points, kind) {
  const made = document.createElementNS(SVG, "polyline");
  made.setAttribute("points", points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" "));
  made.setAttribute("class", kind);
  return made;
}

// The share of negative messages by hour, and what was expected (dashed).
function curve(hours) {
  const made = document.createElementNS(SVG, "svg");
  made.setAttribute("viewBox", "0 0 400 80");
  const first = hours.length ? hours[0].at : 0;
  const span = Math.max(1, hours.length ? hours[hours.length - 1].at - first : 1);
  const at = (each, value) => [(400 * (each.at - first)) / span, 78 - 76 * value];
  made.append(line(hours.map((each) => at(each, each.expected)), "expected"));
  made.append(line(hours.map((each) => at(each, each.share)), "share"));
  return made;
}

async function topic(each) {
  const made = make("article", "", each.burst ? "burst" : "");
  made.append(make("h3", each.topic));
  const state = each.learning ? word("learning") : each.burst ? word("burst") : "";
  made.append(make("small", `${each.seen} ${word("seen")}, ${each.copies} ${word("copies")} ${state}`));
  made.append(make("small", `${word("share")} — ${word("expected")} - -`, "legend"), curve(await get(`/topics/${encodeURIComponent(each.topic)}/hours`)));
  const meter = make("meter");
  meter.value = each.suspicion;
  made.append(meter);
  return made;
}

function alert(each) {
  const ended = each.ended ? `${word("ended")} ${clock(each.ended)} ${each.why}` : word("goes");
  const made = make("li", `${each.topic}: ${each.negative}/${each.messages} ${word("share")}, `
    + `${Math.round(each.expected)} ${word("expected")}. ${clock(each.at)}, ${ended}. ${each.themes}`);
  if (!each.ended) made.className = "burst";
  return made;
}

async function look() {
  const [topics, alerts, failed] = await Promise.all([get("/topics"), get("/alerts"), get("/failed")]);
  document.getElementById("topics").replaceChildren(...(await Promise.all(topics.map(topic))));
  const told = alerts.length ? alerts.map(alert) : [make("li", word("none"))];
  told.push(...failed.map((each) => make("li", `${word("failed")} ${each.receiver}: ${each.error}`)));
  document.getElementById("alerts").replaceChildren(...told);
  document.getElementById("report").textContent = await get("/report");
  document.body.dataset.alerts = alerts.length;
}

const stream = document.getElementById("stream");
new EventSource("/events").onmessage = (event) => {
  const row = JSON.parse(event.data);
  stream.prepend(make("li", `${row.label} · ${row.topic} · ${row.text}`, row.negative ? "negative" : ""));
  while (stream.children.length > 50) stream.lastChild.remove();
};
look().catch(() => {});
setInterval(() => look().catch(() => {}), 3000);
