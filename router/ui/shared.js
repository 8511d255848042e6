// What the parts of the page share: the last state, how elements and words are made, how the router is asked.

export const $ = (id) => document.getElementById(id);

export const page = {
  state: null, // the last answer of /ui/state
  rings: { version: "" }, // the last one with points
  hovered: "", // a worker's id
  pinned: "", // likewise
  ran: [], // the workers of the last prompt
};

// --- elements --------------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
export const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

// --- words -----------------------------------------------------------------------------------------------------------

export function seconds(value) {
  if (value < 1) return `${(value * 1e3).toFixed(value < 0.01 ? 1 : 0)} ms`;
  return value < 100 ? `${value.toFixed(2)} s` : `${Math.round(value)} s`;
}
export function ago(value) {
  if (value < 90) return `${Math.max(0, Math.round(value))} s`;
  return value < 5400
    ? `${Math.round(value / 60)} min`
    : value < 172800
      ? `${Math.round(value / 3600)} h`
      : `${Math.round(value / 86400)} d`;
}
export const count = (value) => value.toLocaleString("en");
/** Nothing but all is 100 %, and nothing but nothing 0 %. */
export function percent(part, whole) {
  if (!whole) return "–";
  const value = (100 * part) / whole;
  const isFine = (value > 0 && value < 10) || (value > 99 && value < 100);
  return `${isFine ? Math.min(99.9, Math.max(0.1, value)).toFixed(1) : Math.round(value)} %`;
}
export function bytes(value) {
  const power = Math.min(4, Math.floor(Math.log2(Math.max(1, value)) / 10));
  return `${(value / 1024 ** power).toFixed(power ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}
export const byName = new Intl.Collator("en", { numeric: true }).compare;
export const quantile = (sorted, q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];
export const definitions = (facts) =>
  Object.entries(facts).map(([term, value]) => html("div", {}, html("dt", {}, term), html("dd", {}, value)));
/** How much of an element's width so many pixels are. */
export const percentOf = (px, element) => Math.min(40, (100 * px) / Math.max(1, element.clientWidth));

// --- the router ------------------------------------------------------------------------------------------------------

export const TOKEN_KEY = "twinring-token"; // in sessionStorage only

export function headers(more = {}) {
  const token = sessionStorage.getItem(TOKEN_KEY);
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}
