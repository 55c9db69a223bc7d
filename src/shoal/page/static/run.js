// One run as the page knows it: what the stream has told so far.

const COLUMNS = ["step", "loss", "tokens", "step_seconds", "compute_seconds", "communication_seconds", "waiting_seconds"];
export const LOSSES = ["lost", "stuck"];
const CURES = ["recovered", "started", "resumed", "finished", "paused"];
const HELD = 3000; // a lane stays red so long after its worker is back, or nobody would see it

export class Run {
  constructor(name) {
    this.name = name;
    this.state = null;
    this.workers = {};
    this.lanes = new Map(); // rank -> states, four a second
    this.forgetRows();
    this.forgetEvents();
  }

  forgetRows() {
    for (const name of [...COLUMNS, "elapsed"]) this[name] = [];
    this.served = null;
    this.evaluations = [];
    this.newest = null;
    this.brokenRows = this.of = 0;
  }

  forgetEvents() {
    this.events = [];
    this.lost = new Map(); // rank -> what is said of its loss, and until when it is shown
    this.losses = new Map(); // rank -> how often
    this.brokenEvents = this.redone = 0;
    this.generation = 1;
    this.hosts = [];
  }

  addRows(told) {
    if (told.anew) this.forgetRows();
    let clock = this.elapsed.at(-1) || 0;
    for (const name of COLUMNS) for (const value of told.steps[name]) this[name].push(value);
    for (const value of told.steps.elapsed) this.elapsed.push((clock += value));
    this.evaluations.push(...told.evaluations);
    this.count(told);
  }

  // Rows of a server: columns by name.
  addServed(told) {
    if (told.anew) this.forgetRows();
    this.served = this.served || {};
    for (const [name, values] of Object.entries(told.served)) this.served[name] = (this.served[name] || []).concat(values);
    this.count(told);
  }

  count(told) {
    this.newest = told.newest || this.newest;
    this.brokenRows += told.broken;
    this.of += told.of;
  }

  addEvents(told) {
    if (told.anew) this.forgetEvents();
    this.brokenEvents += told.broken;
    for (const event of told.events) {
      this.events.push(event);
      const isNow = Date.now() - Date.parse(event.happened_at) < 10000;
      if (LOSSES.includes(event.event) && event.rank !== undefined) {
        this.lost.set(event.rank, { text: event.text, until: Infinity });
        this.losses.set(event.rank, (this.losses.get(event.rank) || 0) + 1);
      }
      if (CURES.includes(event.event)) {
        for (const one of this.lost.values()) one.until = Math.min(one.until, isNow ? Date.now() + HELD : 0);
      }
      if (event.event === "redone") this.redone += event.rows || 0;
      if (event.generation) this.generation = event.generation;
      for (const host of [event.host, ...(event.hosts || [])]) {
        if (host !== undefined && !this.hosts.includes(host)) this.hosts.push(host);
      }
    }
  }

  lossOf(rank) {
    const found = this.lost.get(rank);
    return found && found.until > Date.now() ? found.text : null;
  }

  addWorkers(told) {
    this.workers = told;
    for (const one of told.workers || []) {
      if (!this.lanes.has(one.rank)) this.lanes.set(one.rank, []);
      const lane = this.lanes.get(one.rank);
      lane.push(this.lossOf(one.rank) ? "lost" : one.state);
      if (lane.length > 2400) lane.splice(0, 1200);
    }
  }

  get lastStep() {
    return Math.max(this.step.at(-1) || 0, (this.evaluations.at(-1) || {}).step || 0);
  }

  // Where a step lies on an axis: its own row's, or that of the row before it.
  place(step, axis) {
    if (axis === "step") return step;
    let low = 0;
    let high = this.step.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.step[middle] <= step) low = middle + 1;
      else high = middle;
    }
    return low ? this[axis][low - 1] : 0;
  }
}

// As loss.png smooths: the mean of each value and its neighbours, about 3 % of the curve.
export function smoothed(values) {
  const half = Math.round(0.015 * values.length);
  const sums = [0];
  const counts = [0];
  for (const value of values) {
    sums.push(sums.at(-1) + (value ?? 0));
    counts.push(counts.at(-1) + (value === null ? 0 : 1));
  }
  return values.map((_, at) => {
    const near = Math.min(half, at, values.length - 1 - at);
    const count = counts[at + near + 1] - counts[at - near];
    return count ? (sums[at + near + 1] - sums[at - near]) / count : null;
  });
}

// Significant decimal digits in which two numbers agree; 17 where they are the same bits.
export function digits(a, b) {
  if (a === b) return 17;
  return Math.min(16.9, Math.max(0, -Math.log10(Math.abs(a - b) / Math.max(Math.abs(a), Math.abs(b)))));
}

// The common steps of two runs: steps, and digits that agree in each.
export function agreement(one, other) {
  const losses = new Map(other.step.map((step, at) => [step, other.loss[at]]));
  const found = { step: [], digits: [] };
  one.step.forEach((step, at) => {
    const theirs = losses.get(step);
    if (theirs === undefined || theirs === null || one.loss[at] === null) return;
    found.step.push(step);
    found.digits.push(digits(one.loss[at], theirs));
  });
  return found;
}
