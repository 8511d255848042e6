// The prompt box: streams one answer from the HTTP API and draws what became of it.

import { $, bytes, count, definitions, headers, html, page, percentOf, seconds, svg } from "./shared.js";

const LANE = 22; // px: the height of one
const LABEL = 100; // for its name
const NUMBER = 56; // for its number
let abort = null; // of the run that streams now
let shown = null; // the run whose timeline is on the page

/** `redraw`: what shows the workers of a run elsewhere on the page. */
export function setUpPrompt(redraw) {
  $("prompt-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!abort) runPrompt(redraw);
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("prompt-form").requestSubmit();
  });
  $("stop").addEventListener("click", () => abort?.abort());
  addEventListener("resize", () => shown && showTimeline(shown));
}

async function runPrompt(redraw) {
  abort = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  $("answer").hidden = false;
  $("answer").textContent = "";
  $("timeline").hidden = true;
  shown = null;
  page.ran = [];
  tell("sent");
  const run = { sentAt: performance.now(), arrivals: [], usage: null, account: null };
  try {
    await stream(run, abort.signal);
    tell(run.finishReason ? `done: ${run.finishReason}` : "the stream ended without a last word");
  } catch (error) {
    tell(error.name === "AbortError" ? "stopped" : `failed: ${error.message}`);
  }
  abort = null;
  $("send").disabled = false;
  $("stop").disabled = true;
  if (!run.account) return;
  shown = run;
  page.ran = [run.account.prefill_worker, run.account.decode_worker].filter(Boolean);
  showTimeline(run);
  if (page.state) redraw();
}

function tell(message) {
  $("run-status").textContent = message;
}

async function stream(run, signal) {
  const isChat = $("kind").value === "chat";
  const prompt = $("prompt").value;
  const body = {
    model: await modelName(signal),
    ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    max_tokens: Number($("max-tokens").value),
    temperature: Number($("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
    include_account: true,
  };
  run.sentAt = performance.now();
  const response = await fetch(isChat ? "/v1/chat/completions" : "/v1/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Error(await problem(response));
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) take(run, line.slice(5).trim());
  }
}

async function modelName(signal) {
  if (page.state) return page.state.cluster.model;
  const response = await fetch("/v1/models", { headers: headers(), signal });
  if (!response.ok) throw new Error(await problem(response));
  return (await response.json()).data[0].id;
}

async function problem(response) {
  const text = await response.text();
  try {
    return `${response.status}: ${JSON.parse(text).error.message}`;
  } catch {
    return `${response.status}: ${text.slice(0, 200)}`;
  }
}

/** One event of the stream. */
function take(run, data) {
  if (data === "[DONE]") return;
  const event = JSON.parse(data);
  if (event.error) throw new Error(event.error.message);
  run.usage = event.usage ?? run.usage;
  run.account = event.account ?? run.account;
  const choice = event.choices?.[0];
  run.finishReason = choice?.finish_reason ?? run.finishReason;
  const text = choice?.text ?? choice?.delta?.content ?? "";
  if (!text) return;
  run.arrivals.push((performance.now() - run.sentAt) / 1000);
  $("answer").append(text);
  $("answer").scrollTop = $("answer").scrollHeight;
  if (run.arrivals.length === 1) tell("streaming");
}

// --- what became of it -----------------------------------------------------------------------------------------------

function showTimeline(run) {
  const lanes = lanesOf(run);
  const drawing = svg("svg", {
    role: "img",
    "aria-label": `Timeline: ${lanes.map(laneInWords).join("; ")}`,
    height: LANE * lanes.length + 18,
  });
  const end = Math.max(1e-3, ...lanes.flatMap((lane) => lane.spans.map((span) => span.to)));
  $("timeline").replaceChildren(drawing, html("dl", { class: "costs" }, ...costs(run)));
  $("timeline").hidden = false;
  const left = percentOf(LABEL, drawing);
  const right = 100 - percentOf(NUMBER, drawing);
  const place = (at) => left + ((right - left) * at) / end; // percent of the drawing
  lanes.forEach((lane, index) => drawLane(drawing, lane, LANE * index, place));
  drawTicks(drawing, run.arrivals, LANE * lanes.length, place);
}

/** Spans in seconds since the request was sent. The router's own times are laid so that its first token meets ours. */
function lanesOf({ account, arrivals }) {
  const first = arrivals[0] ?? account.ttft_s;
  const last = arrivals.at(-1) ?? first;
  const prefillStart = first - account.prefill_s;
  const queueStart = prefillStart - account.queued_s;
  const arrived = Math.max(0, Math.min(queueStart, first - account.ttft_s));
  const transferEnd = first + account.transfer_exposed_s;
  const router = [
    ["front", 0, arrived],
    ["route", arrived, queueStart],
  ];
  const prefill = [
    ["queue", queueStart, prefillStart],
    ["prefill", prefillStart, first],
  ];
  const decode = [["decode", Math.max(first, account.transfer_s ? transferEnd : first), last]];
  const lanes = [
    ["Router", router],
    [account.prefill_worker || "nobody", prefill],
  ];
  if (account.transfer_s > 0)
    lanes.push(["KV transfer", [["transfer", transferEnd - account.transfer_s, transferEnd]]]);
  lanes.push([account.decode_worker || "nobody", decode]);
  return lanes.map(([name, spans]) => ({
    name,
    spans: spans.map(([kind, from, to]) => ({ kind, from: Math.max(0, from), to: Math.max(0, from, to) })),
  }));
}

const laneInWords = ({ name, spans }) =>
  `${name}: ${spans.map((span) => `${span.kind} ${seconds(span.to - span.from)}`).join(", ")}`;

function drawLane(drawing, { name, spans }, top, place) {
  drawing.append(svg("line", { class: "axis", x1: 0, x2: "100%", y1: top + LANE, y2: top + LANE }));
  drawing.append(svg("text", { x: 0, y: top + 15 }, name));
  for (const { kind, from, to } of spans) {
    const width = `${Math.max(0.3, place(to) - place(from)).toFixed(3)}%`;
    const box = { class: `span ${kind}`, x: `${place(from).toFixed(3)}%`, y: top + 5, width, height: 12, rx: 2 };
    if (to > from) drawing.append(svg("rect", box, svg("title", {}, `${kind}: ${seconds(to - from)}`)));
  }
  const total = spans.reduce((sum, span) => sum + span.to - span.from, 0);
  drawing.append(svg("text", { class: "value", x: "100%", y: top + 15, "text-anchor": "end" }, seconds(total)));
}

function drawTicks(drawing, arrivals, top, place) {
  drawing.append(svg("text", { x: 0, y: top + 13 }, "Text came"));
  for (const arrival of arrivals) {
    const x = `${place(arrival).toFixed(3)}%`;
    drawing.append(svg("line", { class: "tick", x1: x, x2: x, y1: top + 3, y2: top + 14 }));
  }
}

function costs({ account, arrivals, usage }) {
  const facts = {
    "First text here": arrivals.length ? seconds(arrivals[0]) : "–",
    "TTFT at the router": seconds(account.ttft_s),
    TPOT: account.tpot_s ? seconds(account.tpot_s) : "–",
    "End to end": seconds(account.e2e_s),
    Queue: seconds(account.queued_s),
    Prefill: seconds(account.prefill_s),
    "KV moved": bytes(account.num_kv_bytes),
    Transfer: seconds(account.transfer_s),
    "Not hidden": seconds(account.transfer_exposed_s),
    "Prompt tokens": usage ? count(usage.prompt_tokens) : "–",
    "Cached of them": count(account.num_cached_tokens),
    "Output tokens": usage ? count(usage.completion_tokens) : "–",
    Attempts: count(account.num_attempts),
    Mode: account.mode ?? "–",
  };
  const why = [account.prefill_reason, account.decode_reason, account.mode_reason].filter(Boolean).join("; ");
  const whole = html("div", { class: "whole" }, html("dt", {}, "Why there"), html("dd", {}, why || "–"));
  return [...definitions(facts), whole];
}
