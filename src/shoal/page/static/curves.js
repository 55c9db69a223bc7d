// Curves by uPlot: loss over steps, tokens or time, with what happened on the axis; digits that agree.
/* global uPlot */
import { LOSSES, smoothed, agreement } from "./run.js";
import { word, number, seconds } from "./words.js";

const COLORS = ["#1f83a5", "#d07a12", "#3f9c4f", "#b2539f", "#7a6fd0", "#c34f3f", "#8a8a1f", "#4a7fd0"];
const MARKS = { saved: "▲", lost: "✖", stuck: "✖", recovered: "●", restarted: "●", resumed: "●", repaired: "●" };

export const colorOf = (at) => COLORS[at % COLORS.length];

const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export class Chart {
  constructor(element, height) {
    this.element = element;
    this.height = height;
    new ResizeObserver(() => this.plot && this.plot.setSize(this.size())).observe(element);
  }

  size() {
    return { width: Math.max(200, this.element.clientWidth), height: this.height };
  }

  // `shape`: whatever the options depend on; the chart is made anew when it changes.
  show(shape, options, data) {
    const key = JSON.stringify([shape, document.documentElement.lang, document.documentElement.dataset.theme]);
    if (key === this.key) return this.plot.setData(data);
    this.key = key;
    if (this.plot) this.plot.destroy();
    const axis = { stroke: ink("--quiet"), grid: { stroke: ink("--line"), width: 1 }, ticks: { stroke: ink("--line") } };
    const [x, y] = options.axes;
    const made = { ...this.size(), ...options, axes: [{ ...axis, ...x }, { ...axis, size: 56, ...y }] };
    this.plot = new uPlot(made, data, this.element);
  }
}

let loss = null;
let difference = null;

export const by = (format) => (_, values) => values.map((value) => format(value));

export const line = (label, stroke, more) => ({ label, stroke, width: 1.3, spanGaps: true, points: { show: false }, value: (_, v) => number(v, 8), ...more });

export function drawLoss(element, runs, { axis, smooth, focus }) {
  loss = loss || new Chart(element, 300);
  const tables = [];
  const series = [{ label: word(axis === "elapsed" ? "time" : axis) }];
  // the one in focus last, so that it lies above
  [...runs].reverse().forEach((run) => {
    const stroke = colorOf(runs.indexOf(run));
    const named = (what) => (runs.length > 1 ? `${run.name} ${word(what)}` : word(what));
    const isSmoothed = smooth && run.loss.length > 60;
    const values = isSmoothed ? [run.loss, smoothed(run.loss)] : [run.loss];
    tables.push([run[axis], ...values]);
    series.push(line(named("training"), stroke + (isSmoothed ? "55" : ""), { points: { show: run.loss.length === 1 } }));
    if (isSmoothed) series.push(line(`${named("training")}, ${word("smooth")}`, stroke, { width: 2 }));
    const scored = run.evaluations.filter((row) => typeof row.evaluation_loss === "number");
    if (scored.length) {
      tables.push([scored.map((row) => run.place(row.step, axis)), scored.map((row) => row.evaluation_loss)]);
      series.push(line(named("evaluation"), stroke, { dash: [4, 4], points: { show: true, size: 7, fill: stroke } }));
    }
  });
  loss.about = { focus, axis };
  const format = by(axis === "elapsed" ? seconds : (value) => number(value, 6));
  const options = { scales: { x: { time: false } }, series, axes: [{ values: format, space: 70 }, { values: by(number) }], hooks: { draw: [(plot) => drawMarks(plot, loss.about)] } };
  loss.show([axis, series.map((each) => each.label)], options, joined(tables));
}

// Two evaluations at one place would not be in order; the later one counts.
function joined(tables) {
  const clean = tables.map(([xs, ...rest]) => {
    const kept = xs.map((x, at) => at).filter((at) => xs[at] !== null && (at + 1 === xs.length || xs[at] < xs[at + 1]));
    return kept.length === xs.length ? [xs, ...rest] : [xs, ...rest].map((column) => kept.map((at) => column[at]));
  });
  return clean.length ? uPlot.join(clean) : [[]];
}

function drawMarks(plot, { focus, axis }) {
  if (!focus) return;
  const context = plot.ctx;
  const scale = devicePixelRatio;
  context.save();
  context.font = `${13 * scale}px sans-serif`;
  context.textAlign = "center";
  for (const event of focus.events) {
    if (!MARKS[event.event] || event.step === undefined) continue;
    const x = plot.valToPos(focus.place(event.step, axis), "x", true);
    if (x < plot.bbox.left || x > plot.bbox.left + plot.bbox.width) continue;
    const isLoss = LOSSES.includes(event.event);
    context.fillStyle = ink(isLoss ? "--lost" : event.event === "saved" ? "--quiet" : "--computes");
    if (event.event !== "saved") context.fillRect(x - scale / 2, plot.bbox.top, scale, plot.bbox.height);
    context.fillText(MARKS[event.event], x, plot.bbox.top + (isLoss ? 13 * scale : plot.bbox.height - 3 * scale));
  }
  context.restore();
}

// What two runs have in common, in words and as a curve of digits.
export function drawDifference(element, runs, focus) {
  const others = runs.filter((run) => run !== focus);
  const found = others.map((run) => [run, agreement(focus, run)]);
  const common = found.filter(([, each]) => each.step.length);
  if (common.length) {
    difference = difference || new Chart(element, 160);
    const series = [{ label: word("step") }, ...common.map(([run]) => line(run.name, colorOf(runs.indexOf(run))))];
    const options = { scales: { x: { time: false }, y: { range: [0, 17.5] } }, series, axes: [{}, { label: word("digits"), labelSize: 20, size: 40 }] };
    difference.show(series.map((each) => each.label), options, uPlot.join(common.map(([, each]) => [each.step, each.digits])));
  }
  return found.map(([run, { step, digits }]) => {
    if (!step.length) return word("nothing_common", { run: run.name });
    const same = digits.filter((each) => each === 17).length;
    if (same === step.length) return word("same_bits", { run: run.name, count: step.length });
    const worst = digits.reduce((least, each, at) => (each < digits[least] ? at : least), 0);
    return word("differs", { run: run.name, same, count: step.length, step: step[worst], digits: number(digits[worst], 3) });
  });
}
