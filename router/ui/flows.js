// What went from prefill to decode workers in the last minute, and a dot for each request that has just ended.

import { $, bytes, count, page, svg } from "./shared.js";
import { pool } from "./workers.js";

const MAX_DOTS = 24; // for each state
const NAMED_FROM = 12; // px of a row: lower ones have no room for names
const stillness = matchMedia("(prefers-reduced-motion: reduce)");
let seen = null; // ids of the requests in the last state

export function drawFlows() {
  const drawing = $("flows");
  const plan = planOf(drawing.clientWidth);
  const moved = page.state.flows.filter(
    (flow) => plan.sides[0].includes(flow.prefill_worker) && plan.sides[1].includes(flow.decode_worker),
  );
  const busiest = Math.max(4, ...moved.map((flow) => flow.num_requests));
  const curves = moved.map((flow) => curveOf(flow, busiest, plan));
  const nodes = plan.sides.flatMap((ids, side) => ids.flatMap((id) => nodesOf(side, id, plan)));
  const dots = [...drawing.querySelectorAll(".dot")];
  drawing.classList.toggle("many", moved.length > 40);
  drawing.setAttribute("height", plan.height);
  drawing.replaceChildren(...curves, ...nodes, ...dots);
  summarizeFlows(page.state.moved);
  sendDots(curves);
}

/** Where each worker stands, in pixels: prefill on the left, decode on the right. */
function planOf(width) {
  const sides = ["prefill", "decode"].map((role) => pool(role).map((worker) => worker.id));
  const most = Math.max(1, sides[0].length, sides[1].length);
  const row = Math.max(5, Math.min(56, 280 / most));
  const inset = row >= NAMED_FROM ? Math.min(110, width * 0.28) : 8;
  const height = row * most;
  const y = (side, id) => ((sides[side].indexOf(id) + 0.5) * height) / sides[side].length;
  return { sides, row, height, left: inset, right: width - inset, y };
}

function curveOf(flow, busiest, { row, left, right, y }) {
  const ids = [flow.prefill_worker, flow.decode_worker];
  const [from, to] = [y(0, ids[0]), y(1, ids[1])];
  const middle = (left + right) / 2;
  const attributes = {
    class: ids.every((id) => page.ran.includes(id)) ? "flow ran" : "flow",
    "data-workers": ids.join(" "),
    "stroke-width": 1 + Math.min(row, 7) * (flow.num_requests / busiest),
    d: `M${left} ${from}C${middle} ${from} ${middle} ${to} ${right} ${to}`,
  };
  const words = `${ids.join(" → ")}: ${flow.num_requests} requests, ${bytes(flow.num_kv_bytes)}`;
  return svg("path", attributes, svg("title", {}, words));
}

function nodesOf(side, id, { row, left, right, y }) {
  const height = Math.max(3, Math.min(row - 2, 18));
  const x = side ? right : left - 5;
  const box = { class: side ? "node decode" : "node", x, y: y(side, id) - height / 2, width: 5, height };
  const nodes = [svg("rect", box, svg("title", {}, id))];
  const name = { x: side ? right + 9 : left - 9, y: y(side, id) + 4, "text-anchor": side ? "start" : "end" };
  if (row >= NAMED_FROM) nodes.push(svg("text", name, id));
  return nodes;
}

function summarizeFlows({ num_handed_over: handed, num_local: local, num_kv_bytes: moved }) {
  $("flow-summary").textContent =
    handed + local
      ? `${count(handed)} handed over with ${bytes(moved)} of KV; ${count(local)} decoded where they were prefilled.`
      : "Nothing has moved yet.";
}

/** One dot for each request that has ended since the last look, along its way. */
function sendDots(curves) {
  const fresh = seen && !stillness.matches ? page.state.requests.filter((request) => !seen.has(request.id)) : [];
  seen = new Set(page.state.requests.map((request) => request.id));
  for (const request of fresh.slice(-MAX_DOTS)) {
    const curve = curves.find((each) => each.dataset.workers === `${request.prefill_worker} ${request.decode_worker}`);
    if (!curve) continue;
    const dot = svg("circle", { class: "dot", r: 3 });
    dot.style.offsetPath = `path("${curve.getAttribute("d")}")`;
    $("flows").append(dot);
    const timing = { duration: 900, delay: Math.random() * 600, easing: "ease-in-out", fill: "both" };
    dot.animate({ offsetDistance: ["0%", "100%"], opacity: [0, 1, 1, 0] }, timing).finished.finally(() => dot.remove());
  }
}
