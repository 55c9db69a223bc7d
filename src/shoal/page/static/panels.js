// What stands around the curves: runs, figures, plan, samples, pictures, checkpoints, events.
import { at, fill, make, paint } from "./dom.js";
import { describe, mesh } from "./mesh.js";
import { LOSSES } from "./run.js";
import { figuresOf } from "./serving.js";
import { word, number, bytes, seconds } from "./words.js";

export function drawNow(run) {
  const state = run.state || {};
  const newest = run.newest || {};
  const of = state.of_steps;
  const scored = run.evaluations.at(-1);
  const left = of && newest.step_seconds ? (of - run.lastStep) * newest.step_seconds : null;
  const figures = state.serving ? figuresOf(run) : [
    ["step", number(run.lastStep, 9) + (of ? ` / ${number(of, 9)}` : "")],
    ["loss", number(newest.loss, 6)],
    scored && ["evaluation", number(scored.evaluation_loss, 6)],
    ["tokens", number(newest.tokens, 4)],
    ["tokens_per_second", number(newest.tokens_per_second, 4)],
    state.active && left > 0 && ["time_left", seconds(left)],
    ["redone", number(run.redone)],
    ["generation", number(run.generation)],
    state.policy && ["policy", state.policy],
    state.task && ["task", state.task],
    typeof state.seed === "number" && ["seed", String(state.seed)],
    run.hosts.length > 0 && ["hosts", run.hosts.join(", ")],
  ];
  fill(at("now"), figures, () => figures.filter(Boolean).map(([key, text]) => make("div", {}, make("dt", {}, word(key)), make("dd", {}, text))));
  const problems = [...(state.problems || [])];
  const broken = run.brokenRows + run.brokenEvents;
  if (state.gone) problems.unshift(word("vanished"));
  if (broken) problems.push(word("broken", { count: broken }));
  fill(at("problems"), problems, () => problems.map((text) => make("li", { className: "bad" }, text)));
  for (const name of ["SAVE", "STOP"]) at(name).disabled = !state.active || !!state.serving;
}

export function drawLayout(run) {
  const layout = ((run.state || {}).plan || {}).layout;
  const links = (run.newest || {}).sent_bytes_by_link;
  at("mesh-text").textContent = layout ? `${describe(layout)}. ${links ? word("counted") : ""}` : word("no_layout");
  const states = (run.workers.workers || []).map((one) => [one.state, run.lossOf(one.rank)]);
  fill(at("mesh"), [run.name, layout, links, states], () => (layout ? [mesh(run, layout)] : []));
}

const mean = (values) => {
  const known = values.slice(-50).filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : 0;
};

export function drawPlan(run) {
  const plan = (run.state || {}).plan || {};
  const predicted = plan.predicted || {};
  const step = mean(run.step_seconds.slice(1));
  const memory = (run.newest || {}).peak_memory_bytes;
  const parts = [["computes", mean(run.compute_seconds)], ["communicates", mean(run.communication_seconds)], ["waits", mean(run.waiting_seconds)]];
  at("reason").textContent = plan.reason || "";
  fill(at("plan"), [predicted, parts, memory], () => {
    const made = [
      ...pair(["predicted_time", "measured_time"], seconds, predicted.step_seconds, step, parts),
      ...pair(["predicted_memory", "measured_memory"], bytes, predicted.peak_memory_bytes, memory, [["computes", memory]]),
    ];
    return predicted.step_seconds || predicted.peak_memory_bytes ? made : [...made, make("p", { className: "quiet" }, word("no_prediction"))];
  });
}

// What was planned beside what was measured, in its parts, and how far apart they are.
function pair([plan, measurement], format, planned, measured, parts) {
  const most = Math.max(planned || 0, measured || 0);
  const made = [];
  if (planned) made.push(bar(word(plan), [["quiet", planned / most]], format(planned)));
  if (measured) made.push(bar(word(measurement), parts.map(([name, value]) => [name, value / most]), format(measured)));
  if (planned && measured) {
    const percent = `${planned >= measured ? "+" : ""}${number(100 * (planned / measured - 1), 3)} %`;
    made.push(make("p", { className: "quiet" }, word("prediction_error", { percent })));
  }
  return made;
}

export function bar(name, parts, text) {
  const pieces = parts.map(([name, share]) => {
    const piece = paint(make("i"), name);
    piece.style.width = `${Math.max(0, 100 * share)}%`;
    return piece;
  });
  return make("div", { className: "bar" }, make("span", {}, name), make("span", {}, ...pieces), make("span", {}, text));
}

export function drawSamples(run) {
  const rows = run.evaluations.filter((row) => (row.completions || []).length);
  at("samples-part").hidden = !rows.length;
  if (!rows.length) return;
  const slider = at("sample");
  const wasLast = slider.value === slider.max || slider.dataset.run !== run.name;
  slider.max = String(rows.length - 1);
  slider.dataset.run = run.name;
  if (wasLast) slider.value = slider.max;
  const row = rows[Math.min(rows.length - 1, Number(slider.value))];
  at("sample-step").textContent = number(row.step, 9);
  fill(at("texts"), row.completions, () => row.completions.map(([prompt, text]) => make("p", {}, make("b", {}, prompt), text)));
}

export function drawPictures(run) {
  const pictures = (run.state || {}).pictures || [];
  at("pictures-part").hidden = !pictures.length;
  fill(at("pictures"), [run.name, pictures], () => pictures.map(([name, modified]) => {
    const source = `/picture?${new URLSearchParams({ run: run.name, name, at: modified })}`;
    return make("figure", {}, make("img", { src: source, alt: name, loading: "lazy" }), make("figcaption", {}, name));
  }));
}

export function drawCheckpoints(run) {
  const state = run.state || {};
  const found = (state.checkpoints || []).map(({ step, bytes: size }) => {
    const best = (state.summary || {}).best_step === step ? ` (${word("best")})` : "";
    return `${word("step")} ${number(step, 9)}: ${bytes(size)}${best}`;
  });
  if (state.model) found.push(word("model_written"));
  const lines = found.length ? found : [word("none_yet")];
  fill(at("checkpoints"), lines, () => lines.map((text) => make("li", {}, text)));
}

export function drawEvents(run) {
  const last = run.events.slice(-200).reverse();
  fill(at("events"), [run.name, run.events.length, (last[0] || {}).happened_at], () => last.map((event) => {
    const when = make("time", {}, String(event.happened_at || "").slice(11, 19));
    const step = event.step === undefined ? "" : ` ${word("step")} ${event.step}`;
    const isBad = [...LOSSES, "diverging", "diverged", "skipped", "save-failed", "checkpoint-damaged"].includes(event.event);
    return make("li", {}, when, " ", make("span", { className: isBad ? "kind bad" : "kind" }, event.event), `${step} ${event.text}`);
  }));
}
