// The page at /ui: asks for /ui/state each second and draws it. Text reaches the page by textContent and attributes
// only.

import { drawFlows } from "./flows.js";
import { setUpPrompt } from "./prompt.js";
import { drawRings } from "./rings.js";
import {
  $,
  TOKEN_KEY,
  ago,
  count,
  definitions,
  headers,
  html,
  page,
  percent,
  percentOf,
  quantile,
  seconds,
  svg,
} from "./shared.js";
import { drawPools, highlight } from "./workers.js";

const POLL_MS = 1000;
const STATE_TIMEOUT_MS = 5000;
const MAX_SHOWN_REQUESTS = 20;

async function poll() {
  try {
    if (!document.hidden) await refresh();
  } finally {
    setTimeout(poll, POLL_MS);
  }
}

async function refresh() {
  try {
    const url = `/ui/state?rings=${encodeURIComponent(page.rings.version)}`;
    const response = await fetch(url, {
      headers: headers(),
      cache: "no-store",
      signal: AbortSignal.timeout(STATE_TIMEOUT_MS),
    });
    $("token-form").hidden = ![401, 403].includes(response.status);
    if (!$("token-form").hidden)
      return say(sessionStorage.getItem(TOKEN_KEY) ? "this token is not an operator's" : "a token is needed", "bad");
    if (!response.ok) return say(`the router answers ${response.status}`, "bad");
    page.state = await response.json();
  } catch (error) {
    if (!(error instanceof TypeError || error instanceof DOMException)) throw error;
    return say("no answer from the router", "bad");
  }
  if (page.state.rings.rings) drawRings(page.state.rings);
  draw();
}

function say(message, kind) {
  if ($("status").textContent !== message) $("status").textContent = message;
  $("status").className = `status ${kind}`;
}

function draw() {
  const { cluster } = page.state;
  say(cluster.is_ready ? "ready" : cluster.message, cluster.is_ready ? "good" : "");
  const facts = {
    Model: cluster.model,
    Mode: cluster.mode,
    "In flight": count(cluster.num_in_flight),
    Finished: count(cluster.num_finished),
    Failed: count(cluster.num_failed),
    Failovers: count(cluster.num_failovers),
    Up: ago(cluster.uptime_s),
  };
  $("facts").replaceChildren(...definitions(facts));
  drawPools();
  drawFlows();
  const latencies = page.state.latencies;
  $("latency-count").textContent = latencies.length ? `last ${latencies.length} requests` : "";
  drawPlot(
    "ttft",
    latencies.map((each) => each[0]),
    cluster.ttft_slo_s,
  );
  drawPlot(
    "tpot",
    latencies.map((each) => each[1]).filter((value) => value > 0),
    cluster.tpot_slo_s,
  );
  drawRequests();
  drawEvents();
  highlight();
}

// --- latency, requests, events ---------------------------------------------------------------------------------------

function drawPlot(id, values, slo) {
  if (!values.length) return;
  const sorted = [...values].sort((a, b) => a - b);
  const numMet = values.filter((value) => value <= slo).length;
  $(`${id}-summary`).textContent =
    `p50 ${seconds(quantile(sorted, 0.5))} · p95 ${seconds(quantile(sorted, 0.95))} · ` +
    `${percent(numMet, values.length)} within ${seconds(slo)}`;
  const low = Math.floor(Math.log10(Math.max(1e-5, sorted[0])));
  const high = Math.ceil(Math.log10(Math.max(slo * 1.2, sorted.at(-1))));
  const y = (value) => 114 - (104 * (Math.log10(Math.max(value, 10 ** low)) - low)) / (high - low);
  const left = percentOf(50, $(id));
  const parts = [];
  for (let power = low; power <= high; power++) {
    parts.push(svg("line", { class: "axis", x1: 0, x2: "100%", y1: y(10 ** power), y2: y(10 ** power) }));
    if (power < high) parts.push(svg("text", { x: 2, y: y(10 ** power) - 3 }, seconds(10 ** power)));
  }
  values.forEach((value, index) => {
    const x = `${(left + ((99 - left) * (index + 0.5)) / values.length).toFixed(2)}%`;
    parts.push(svg("circle", { class: value > slo ? "late" : "", cx: x, cy: y(value).toFixed(1), r: 2.5 }));
  });
  parts.push(svg("line", { class: "slo", x1: 0, x2: "100%", y1: y(slo), y2: y(slo) }));
  parts.push(
    svg("text", { class: "slo-label", x: "100%", y: y(slo) - 3, "text-anchor": "end" }, `SLO ${seconds(slo)}`),
  );
  $(id).replaceChildren(...parts);
}

/** Outcomes are finish reasons, or names of gRPC status codes. */
const isFailure = (outcome) => outcome === "error" || (/^[A-Z]/.test(outcome) && outcome !== "CANCELLED");

function drawRequests() {
  const requests = page.state.requests.toReversed().slice(0, MAX_SHOWN_REQUESTS);
  $("no-requests").hidden = requests.length > 0;
  const rows = requests.map((request) =>
    html("tr", {}, ...cellsOf(request).map(([kind, text]) => html("td", { class: kind }, text))),
  );
  $("requests").replaceChildren(...rows);
}

function cellsOf(request) {
  const { cluster, at_unix_s: now } = page.state;
  const hasRun = Boolean(request.prefill_worker);
  const hasToken = hasRun && request.num_output_tokens > 0;
  const workers = [...new Set([request.prefill_worker, request.decode_worker])].join(" → ");
  const attempts = request.num_attempts > 1 ? `, ${request.num_attempts} attempts` : "";
  const late = (isLate) => (isLate ? "number late" : "number");
  return [
    ["", ago(now - request.ended_at_unix_s)],
    ["wide mono", request.id.slice(0, 8)],
    ["workers", hasRun ? workers : "–"],
    ["wide", (request.mode || "–") + attempts],
    ["number wide", count(request.num_prompt_tokens)],
    ["number wide", hasRun ? percent(request.num_cached_tokens, request.num_prompt_tokens) : "–"],
    ["number", count(request.num_output_tokens)],
    [late(hasToken && request.ttft_s > cluster.ttft_slo_s), hasToken ? seconds(request.ttft_s) : "–"],
    ["wide " + late(request.tpot_s > cluster.tpot_slo_s), request.tpot_s ? seconds(request.tpot_s) : "–"],
    [isFailure(request.outcome) ? "failed" : "", request.outcome.toLowerCase().replaceAll("_", " ")],
  ];
}

function drawEvents() {
  $("events").replaceChildren(
    ...page.state.events.toReversed().map((event) => {
      const at = new Date(event.at_unix_s * 1000);
      return html(
        "li",
        {},
        html("time", { datetime: at.toISOString() }, at.toLocaleTimeString("en-GB")),
        event.message,
      );
    }),
  );
}

// --- start -----------------------------------------------------------------------------------------------------------

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN_KEY, $("token").value.trim());
  $("token").value = "";
  refresh();
});
document.addEventListener("visibilitychange", () => document.hidden || refresh());
setUpPrompt(draw);
poll();
