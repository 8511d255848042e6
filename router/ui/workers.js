// The workers as tiles, and what is lit up everywhere when one of them is pointed at.

import { $, byName, count, html, page, percent } from "./shared.js";

const DENSE_FROM = 13; // workers: small tiles from here on
const KV_STATES = ["held", "leased", "cached"]; // what the bar of a worker stacks; the rest of it is free

export const pool = (role) =>
  page.state.workers.filter((worker) => worker.role === role).sort((a, b) => byName(a.id, b.id));
const isDense = () => page.state.workers.length >= DENSE_FROM;
const tileOf = (id) => $("pools").querySelector(`[data-worker="${CSS.escape(id)}"]`);

export function drawPools() {
  const pools = ["prefill", "decode"].map((role) => [role, pool(role)]).filter(([, workers]) => workers.length);
  const shape = JSON.stringify(pools.map(([role, workers]) => [role, workers.map((worker) => worker.id)]));
  if ($("pools").dataset.shape !== shape && pools.length) {
    $("pools").dataset.shape = shape;
    page.hovered = ""; // the tile that was pointed at is gone
    $("pools").replaceChildren(...pools.map(([role, workers]) => poolOf(role, workers)));
  }
  for (const [role, workers] of pools) {
    const up = workers.filter((worker) => worker.is_up && worker.blocks);
    const total = (read) => up.reduce((sum, worker) => sum + read(worker), 0);
    const used = percent(
      total((worker) => worker.blocks.held + worker.blocks.leased),
      total((worker) => worker.blocks.total),
    );
    const running = count(total((worker) => worker.num_running));
    const waiting = count(total((worker) => worker.num_waiting));
    $(`pool-${role}`).textContent =
      `${up.length} of ${workers.length} up · ${running} running, ${waiting} waiting · ${used} of KV in use`;
    workers.forEach(updateTile);
  }
}

function poolOf(role, workers) {
  const title = html("h3", {}, role === "prefill" ? "Prefill" : "Decode", html("small", { id: `pool-${role}` }));
  const tiles = workers.map((worker) => newTile(worker, workers));
  return html(
    "div",
    { class: `pool ${role}` },
    title,
    html("div", { class: `tiles ${isDense() ? "dense" : ""}` }, ...tiles),
  );
}

function newTile(worker, workers) {
  const name = isDense() ? shortName(worker.id, workers) : worker.id;
  const bar = html("span", { class: "bar" }, ...KV_STATES.map((kind) => html("span", { class: kind })));
  const parts = [
    html("span", { class: "name" }, name),
    html("span", { class: "busy" }),
    bar,
    html("span", { class: "more" }),
  ];
  const tile = html("button", { type: "button", class: "tile", "data-worker": worker.id, title: worker.id }, ...parts);
  tile.addEventListener("click", () => pin(worker.id));
  for (const [on, off] of [
    ["mouseenter", "mouseleave"],
    ["focus", "blur"],
  ]) {
    tile.addEventListener(on, () => hover(worker.id));
    tile.addEventListener(off, () => hover(""));
  }
  return tile;
}

function shortName(id, workers) {
  const prefix = id.replace(/\d+$/, "");
  return prefix !== id && workers.every((worker) => worker.id.startsWith(prefix)) ? id.slice(prefix.length) : id;
}

function updateTile(worker) {
  const tile = tileOf(worker.id);
  const [, busy, bar, more] = tile.children;
  const { isUp, busyWords, moreWords } = wordsOf(worker);
  tile.classList.toggle("down", !isUp);
  tile.classList.toggle("ran", page.ran.includes(worker.id));
  tile.setAttribute("aria-label", describe(worker));
  tile.setAttribute("aria-pressed", page.pinned === worker.id);
  busy.textContent = busyWords;
  more.textContent = moreWords;
  KV_STATES.forEach((kind, index) => {
    bar.children[index].style.width = isUp ? `${(100 * worker.blocks[kind]) / Math.max(1, worker.blocks.total)}%` : "0";
  });
}

function wordsOf(worker) {
  const { blocks } = worker;
  if (!worker.is_up || !blocks) return { isUp: false, busyWords: "down", moreWords: "not serving" };
  const busyWords = isDense() ? worker.num_running + worker.num_waiting || "" : `${worker.num_running} running`;
  const more = [`KV ${percent(blocks.held + blocks.leased, blocks.total)} in use`];
  if (worker.is_draining) more.push("draining");
  if (worker.num_waiting) more.push(`${worker.num_waiting} waiting`);
  if (worker.num_pending_tokens) more.push(`${count(worker.num_pending_tokens)} tokens to prefill`);
  return { isUp: true, busyWords, moreWords: more.join(" · ") };
}

function describe(worker) {
  if (!worker.is_up || !worker.blocks) return `${worker.id}: down`;
  const { blocks } = worker;
  const index = (page.rings.worker_ids ?? []).indexOf(worker.id);
  const shares =
    index < 0
      ? ""
      : `; ${page.rings.rings.map((ring) => percent(ring.shares[index], 1)).join(" and ")} of the two rings`;
  const speed = worker.prefill_s_per_token
    ? `; prefills ${count(Math.round(1 / worker.prefill_s_per_token))} tokens/s`
    : "";
  return (
    `${worker.id}: ${worker.num_running} running, ${worker.num_waiting} waiting, ` +
    `${count(worker.num_pending_tokens)} tokens to prefill; of ${count(blocks.total)} KV blocks ` +
    `${count(blocks.held)} held, ${count(blocks.leased)} leased, ${count(blocks.cached)} cached${speed}${shares}`
  );
}

function hover(id) {
  page.hovered = id;
  highlight();
}
export function pin(id) {
  page.pinned = page.pinned === id ? "" : id;
  drawPools();
  highlight();
}

export function highlight() {
  const id = page.hovered || page.pinned;
  const worker = page.state?.workers.find((each) => each.id === id);
  for (const drawing of [$("flows"), $("rings")])
    drawing.classList.toggle("dim", Boolean(drawing.querySelector(`[data-workers~="${CSS.escape(id)}"]`)));
  for (const part of document.querySelectorAll("[data-workers]"))
    part.classList.toggle("lit", part.dataset.workers.split(" ").includes(id));
  for (const tile of document.querySelectorAll(".tile")) tile.classList.toggle("lit", tile.dataset.worker === id);
  $("detail").textContent = worker
    ? describe(worker)
    : page.state
      ? "Point at a worker, or press it, to see its part of everything."
      : "";
}
