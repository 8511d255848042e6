// The two rings: who owns which part of the keys. Drawn once for each membership.

import { $, page, percent, svg } from "./shared.js";
import { pin } from "./workers.js";

const HUES = [215, 28, 150, 320, 90, 265, 50, 185]; // of few owners; more go around the colour circle

export function drawRings(given) {
  page.rings = given;
  const drawn = page.rings.rings.flatMap((ring, index) => arcsOf(ring, index ? 62 : 90));
  const words = [
    ["big", -4, String(page.rings.worker_ids.length)],
    ["", 11, page.rings.worker_ids.length === 1 ? "worker" : "workers"],
  ];
  $("rings").replaceChildren(...drawn, ...words.map(([kind, y, text]) => svg("text", { class: kind, y }, text)));
  $("ring-summary").textContent = summary(page.rings.rings.flatMap((ring) => ring.shares));
}

function summary(shares) {
  if (!shares.length) return "No prefill worker is up.";
  if (page.rings.worker_ids.length === 1) return "One worker is home to every prompt.";
  return (
    `Two hashes of a prompt's first ${page.rings.key_depth_tokens} tokens, one for each ring, name its two home ` +
    `workers. Each worker owns ${percent(Math.min(...shares), 1)} to ${percent(Math.max(...shares), 1)} of a ring.`
  );
}

function arcsOf(ring, radius) {
  const points = ring.points.flatMap((own, owner) => own.map((point) => [point, owner])).sort((a, b) => a[0] - b[0]);
  const at = (point) => {
    const angle = (2 * Math.PI * point) / page.rings.circle;
    return `${(radius * Math.sin(angle)).toFixed(2)} ${(-radius * Math.cos(angle)).toFixed(2)}`;
  };
  const paths = ring.points.map(() => "");
  points.forEach(([point, owner], index) => {
    const before = index ? points[index - 1][0] : points.at(-1)[0] - page.rings.circle;
    const isLong = point - before > page.rings.circle / 2 ? 1 : 0;
    if (point !== before) paths[owner] += `M${at(before)}A${radius} ${radius} 0 ${isLong} 1 ${at(point)}`;
  });
  return paths.map((d, owner) => {
    const id = page.rings.worker_ids[owner];
    const arc = svg(
      "path",
      { class: "arc", d, "data-workers": id },
      svg("title", {}, `${id}: ${percent(ring.shares[owner], 1)}`),
    );
    arc.style.setProperty("--hue", paths.length <= HUES.length ? HUES[owner] : (owner * 137.5) % 360);
    arc.addEventListener("click", () => pin(id));
    return arc;
  });
}
