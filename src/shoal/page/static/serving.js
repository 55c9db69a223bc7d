// A server: its requests, how long they take, and the cache of each replica.
import { by, Chart, colorOf, line } from "./curves.js";
import { at, fill } from "./dom.js";
import { bar } from "./panels.js";
import { word, number, seconds } from "./words.js";

const charts = {};
const percent = (share) => `${number(100 * share, 3)} %`;
const took = (times) => (times ? `${seconds(times.median)} (95 %: ${seconds(times.p95)})` : "-");

export function figuresOf(run) {
  const newest = run.newest || {};
  const rate = (count) => number(count / newest.seconds, 3);
  return [
    ["model", run.state.serving.model],
    ["requests_per_second", rate(newest.requests)],
    ["tokens_per_second", rate(newest.made_tokens)],
    ["first_token", took(newest.first_token_seconds)],
    ["answer", took(newest.answer_seconds)],
    ["held", newest.asked_tokens ? percent(newest.held_tokens / newest.asked_tokens) : "-"],
    ...["running", "waiting", "replays", "restarts"].map((key) => [key, number(newest[key])]),
  ];
}

export function drawServing(run) {
  document.body.dataset.kind = (run.state || {}).serving ? "serving" : "training";
  if (!run.served) return;
  draw(run.served, "traffic", ["requests_per_second", "running", "waiting"], number);
  draw(run.served, "latency", ["first_token", "answer"], seconds);
  const replicas = (run.newest.replicas || []).filter((one) => one.cache !== null);
  fill(at("cache"), replicas, () => replicas.map(({ rank, cache }) => (
    bar(`${word("cache")}, ${word("replica")} ${rank}`, [["computes", cache]], percent(cache)))));
}

function draw(served, id, names, format) {
  charts[id] = charts[id] || new Chart(at(id), 180);
  const latency = id === "latency" ? " (95 %)" : "";
  const series = [{ label: word("time") }, ...names.map((key, place) => line(word(key) + latency, colorOf(place)))];
  charts[id].show(id, { series, axes: [{}, { values: by(format) }] }, [served.at, ...names.map((key) => served[key])]);
}
