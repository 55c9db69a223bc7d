// The page: one stream, the runs that are shown, and when to draw.
import { colorOf, drawDifference, drawLoss } from "./curves.js";
import { at, fill, make } from "./dom.js";
import { drawLanes } from "./lanes.js";
import { drawCheckpoints, drawEvents, drawLayout, drawNow, drawPictures, drawPlan, drawSamples } from "./panels.js";
import { Run } from "./run.js";
import { drawServing } from "./serving.js";
import { loadWords, number, otherLanguage, word } from "./words.js";

const MOST = 8;
let listed = [];
let shown = []; // runs, the first of them in focus
let stream = null;
let lastId = "";
let drawing = 0;
let drawnAt = 0;
let looking = 0; // lanes are drawn once a second: who watches must not slow what is watched

const names = () => shown.map((run) => run.name);

function connect() {
  if (stream) stream.close();
  const query = new URLSearchParams(names().map((name) => ["run", name]));
  if (lastId) query.set("from", lastId);
  stream = new EventSource(`/stream?${query}`);
  stream.onopen = () => link("connected");
  stream.onerror = () => {
    link(stream.readyState === EventSource.CLOSED ? "no_key" : "reconnecting", true);
    if (stream.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
  };
  const hear = (kind, take) => stream.addEventListener(kind, (event) => {
    lastId = event.lastEventId || lastId;
    const told = JSON.parse(event.data);
    take(told, shown.find((run) => run.name === told.run));
    if (kind === "workers") looking = looking || setTimeout(drawLooks, 1000);
    else drawing = drawing || setTimeout(requestAnimationFrame, 400 - (performance.now() - drawnAt), redraw);
  });
  hear("runs", (told) => {
    listed = told.runs;
    if (!shown.length && listed.length) show([listed[0].name]);
  });
  hear("rows", (told, run) => run && run.addRows(told));
  hear("served", (told, run) => run && run.addServed(told));
  hear("events", (told, run) => run && run.addEvents(told));
  hear("state", (told, run) => run && (run.state = told.state));
  hear("workers", (told, run) => run && run.addWorkers(told.workers));
}

// Show these runs, and hear of them from their beginning.
function show(wanted) {
  if (wanted.length > MOST) return note("at_most", { count: MOST });
  shown = wanted.map((name) => new Run(name));
  lastId = "";
  history.replaceState(null, "", `#${wanted.map(encodeURIComponent).join("&")}`);
  connect();
  redraw();
}

function link(key, isBad = false) {
  at("link").textContent = word(key);
  at("link").dataset.key = key;
  at("link").className = isBad ? "bad" : "";
}

function note(key, values) {
  at("note").textContent = word(key, values);
  at("note").hidden = false;
  setTimeout(() => (at("note").hidden = true), 8000);
}

function drawRuns() {
  fill(at("runs"), [listed, names()], () => listed.map(({ name, active }) => {
    const place = names().indexOf(name);
    const box = make("input", { type: "checkbox", checked: place >= 0, ariaLabel: name });
    box.onchange = () => {
      const wanted = box.checked ? [...names(), name] : names().filter((each) => each !== name);
      box.checked = place >= 0; // as it is, should it be refused
      if (wanted.length) show(wanted);
    };
    const dot = make("i", { className: "dot" });
    if (place >= 0) dot.style.background = colorOf(place);
    const button = make("button", { type: "button" }, name);
    button.setAttribute("aria-current", String(place === 0));
    button.onclick = () => show([name, ...names().filter((each) => each !== name && place >= 0)]);
    return make("li", {}, box, " ", dot, button, active ? ` (${word("active")})` : "");
  }));
}

function drawLooks() {
  looking = 0;
  if (shown[0] && !document.hidden) for (const panel of [drawLanes, drawLayout]) panel(shown[0]);
}

function redraw() {
  drawing = 0;
  drawnAt = performance.now();
  drawRuns();
  const focus = shown[0];
  if (!focus) return;
  at("focus").textContent = focus.name;
  const axis = document.querySelector("input[name=axis]:checked").value;
  drawNow(focus);
  drawLoss(at("loss"), shown, { axis, smooth: at("smooth").checked, focus });
  at("marks").textContent = focus.of > focus.step.length ? `${word("marks")} ${word("thinned", { kept: number(focus.step.length, 9), of: number(focus.of, 9) })}` : word("marks");
  at("difference-part").hidden = shown.length < 2;
  if (shown.length > 1) {
    const lines = drawDifference(at("difference"), shown, focus);
    fill(at("differences"), lines, () => lines.map((text) => make("li", {}, text)));
  }
  for (const panel of [drawServing, drawLanes, drawLayout, drawPlan, drawSamples, drawPictures, drawCheckpoints, drawEvents]) panel(focus);
  Object.assign(document.body.dataset, { step: focus.lastStep, rows: focus.served ? focus.served.at.length : focus.step.length });
  document.title = `${focus.name} \u00b7 ${number(focus.lastStep, 9)}`;
}

async function order(word_) {
  const run = shown[0];
  if (!run || (word_ === "STOP" && !confirm(word("stop_really", { run: run.name })))) return;
  try {
    const headers = { "content-type": "application/json", "x-shoal": "1" };
    const answer = await fetch("/order", { method: "POST", headers, body: JSON.stringify({ run: run.name, order: word_ }) });
    if (answer.ok) note("left", { order: word_, run: run.name });
    else note("refused", { why: (await answer.text()).trim() });
  } catch (error) {
    note("refused", { why: String(error) });
  }
}

function setTheme(chosen) {
  document.documentElement.dataset.theme = chosen;
}

async function begin() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(localStorage.getItem("theme") || (dark.matches ? "dark" : "light"));
  await loadWords();
  link("connecting");
  at("theme").onclick = () => {
    const other = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", other);
    setTheme(other);
    redraw();
  };
  at("language").onclick = () => {
    otherLanguage();
    link(at("link").dataset.key, at("link").className === "bad");
    redraw();
  };
  for (const name of ["SAVE", "STOP"]) at(name).onclick = () => order(name);
  for (const each of document.querySelectorAll("#axis input, #sample")) each.oninput = redraw;
  const kept = location.hash.slice(1).split("&").filter(Boolean).map(decodeURIComponent);
  if (kept.length) show(kept.slice(0, MOST));
  else connect();
  setInterval(() => shown.some((run) => run.lost.size) && redraw(), 1000);
}

begin();
