// A lane for each worker: what it did at each look, what it does now, and whom it waits for.
import { at, fill, make, paint } from "./dom.js";
import { word } from "./words.js";

const STATES = ["computes", "communicates", "waits", "silent", "starts", "gone", "lost"];
const PIXELS = 3; // a look

export function drawLanes(run) {
  const told = run.workers.workers || [];
  const isWatched = told.length > 0;
  at("lanes-note").textContent = isWatched ? word("sampled") : word("no_workers");
  const shown = isWatched ? told : [...run.lost].map(([rank]) => ({ rank, state: "gone" }));
  const ranks = shown.map((one) => one.rank);
  fill(at("lanes"), [run.name, ranks], () => ranks.flatMap((rank) => [
    make("span", { id: `lane-${rank}` }),
    make("canvas", { id: `canvas-${rank}`, "aria-hidden": "true" }),
  ]));
  fill(at("lanes-key"), isWatched, () => STATES.map((state) => make("span", {}, paint(make("i", { className: "dot" }), state), ` ${word(state)}`)));
  for (const one of shown) {
    const lost = run.lossOf(one.rank);
    const label = at(`lane-${one.rank}`);
    label.className = lost ? "lost" : "";
    label.textContent = text(run, one, lost);
  }
  for (const rank of ranks) drawLane(at(`canvas-${rank}`), run.lanes.get(rank) || []); // once all labels have their width
}

function text(run, one, lost) {
  const host = one.host === undefined ? "" : ` (${one.host})`;
  const count = run.losses.get(one.rank) ? ` \u2716${run.losses.get(one.rank)}` : "";
  const begin = `${word((run.state || {}).serving ? "replica" : "worker")} ${one.rank}${host}${count}: `;
  if (lost) return `${begin}${word("lost")}: ${lost}`;
  if (one.state === "waits" && (one.waits_for || []).length) return begin + word("waits_for", { who: one.waits_for.join(", ") });
  const where = one.phase ? ` \u00b7 ${one.step} ${one.phase}` : "";
  return begin + word(one.state) + where;
}

function drawLane(canvas, states) {
  const scale = devicePixelRatio;
  const width = canvas.clientWidth;
  const context = canvas.getContext("2d");
  if (canvas.width !== Math.round(width * scale)) [canvas.width, canvas.height] = [Math.round(width * scale), 18 * scale];
  const style = getComputedStyle(document.documentElement);
  const many = Math.min(states.length, Math.floor(width / PIXELS));
  const recent = states.slice(states.length - many);
  recent.forEach((state, number) => {
    context.fillStyle = style.getPropertyValue(`--${state}`);
    context.fillRect(number * PIXELS * scale, 0, PIXELS * scale, 18 * scale);
  });
}
