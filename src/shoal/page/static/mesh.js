// The layout as a mesh: replicas as boxes, workers in them, counted bytes on the edges.
import { draw, paint } from "./dom.js";
import { word, bytes } from "./words.js";

const AXES = ["replicate", "pipeline", "shard", "context", "tensor"];
const CELL = 34;
const MOST = 12; // replicas drawn

export function describe(layout) {
  return [...AXES, "expert"].filter((axis) => layout[axis] > 1).map((axis) => `${axis} ${layout[axis]}`).join(" \u00b7 ") || `1 ${word("worker")}`;
}

export function mesh(run, layout) {
  const [replicas, stages] = [layout.replicate || 1, layout.pipeline || 1];
  const across = (layout.shard || 1) * (layout.context || 1) * (layout.tensor || 1);
  const size = stages * across;
  const links = (run.newest && run.newest.sent_bytes_by_link) || {};
  const states = new Map((run.workers.workers || []).map((one) => [one.rank, one]));
  const named = Object.keys(links).filter((name) => name !== "inside");
  const servers = named.filter((name) => !name.startsWith("replica "));
  const shown = Math.min(replicas, MOST);
  const writer = [...Array(replicas).keys()].find((number) => !named.includes(`replica ${number}`)) || 0;
  const wide = Math.max(across * CELL, 64) + 16;
  const gap = 46;
  const top = 58 + 14 * Math.min(3, shown);
  const high = stages * CELL + 40;
  const width = shown * (wide + gap) + servers.length * 90 + 10;
  const middle = (number) => number * (wide + gap) + wide / 2 + 4;
  const parts = [];
  const text = (x, y, words, name) => parts.push(draw("text", { x, y, class: name || "" }, words));
  const path = (name, d) => parts.push(draw("path", { class: name, d }));
  for (let number = 0; number < shown; number++) {
    const left = number * (wide + gap) + 4;
    parts.push(draw("rect", { class: "box", x: left, y: top, width: wide, height: high, rx: 6 }));
    text(left + 8, top + high - 8, `${word("replica")} ${number}`);
    for (let place = 0; place < size; place++) {
      const rank = number * size + place;
      const [x, y] = [left + 8 + (place % across) * CELL, top + 8 + Math.floor(place / across) * CELL];
      const state = run.lossOf(rank) ? "lost" : (states.get(rank) || { state: "gone" }).state;
      const cell = paint(draw("rect", { class: `worker ${state}`, x, y, width: CELL - 4, height: CELL - 6, rx: 4 }), state);
      cell.append(draw("title", {}, `${word("worker")} ${rank} ${state}`));
      parts.push(cell);
      text(x + CELL / 2 - 2, y + CELL / 2 + 1, String(rank), "on");
    }
    if (number === writer && links.inside) text(left, top + high + 14, `${word("inside")}: ${bytes(links.inside)}`);
    if (number === writer) continue;
    const sent = links[`replica ${number}`];
    const up = 16 + 14 * Math.min(3, Math.abs(number - writer));
    const [from, to] = [middle(writer), middle(number)];
    path(sent ? "edge counted" : "edge", `M${from} ${top} C${from} ${top - up} ${to} ${top - up} ${to} ${top}`);
    if (sent) text((from + 2 * to) / 3, top - up * 0.75 - 4, bytes(sent), "mid");
  }
  if (shown < replicas) text(6, 12, `... ${replicas}`);
  servers.forEach((name, number) => {
    const x = shown * (wide + gap) + number * 90 + 40;
    path("edge counted", `M${middle(writer)} ${top} C${middle(writer)} 10 ${x} 10 ${x} ${top}`);
    parts.push(draw("rect", { class: "box", x: x - 36, y: top, width: 76, height: 30, rx: 15 }));
    text(x, top + 18, name.replace("server", word("server")), "mid");
    text(x, top - 8, bytes(links[name]), "mid");
  });
  return draw("svg", { width, height: top + high + 20, role: "img", "aria-label": describe(layout) }, ...parts);
}
