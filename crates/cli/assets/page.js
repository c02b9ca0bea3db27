// What both pages share: elements, numbers, tokens, tables, the frame of a page.
//
// Text of a model file or of a prompt is a stranger's. It enters the document only as text nodes and as attributes that
// browsers never run (aria-label, title). Nothing here parses HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);

/** A new HTML element: attributes by name, `on…` ones as listeners; children are nodes, text, or null for none. */
function el(tag, attrs, ...children) {
  return fill(document.createElement(tag), attrs, children);
}

function fill(node, attrs, children) {
  for (const [name, value] of Object.entries(attrs ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}

const DASH = "–";
const isNumber = (x) => typeof x === "number" && Number.isFinite(x);

/** A measured number in four significant digits; what is not there is a dash. */
function fmt(x, digits = 4) {
  if (!isNumber(x)) return DASH;
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e6 || size < 1e-3) return x.toExponential(Math.max(0, digits - 2)).replace("e+", "e").replace(/-/g, "−");
  const text = x.toPrecision(digits);
  return (text.includes("e") ? String(Math.round(x)) : text).replace("-", "−");
}

/** A count, with thousands apart. */
const int = (x) => (isNumber(x) ? Math.round(x).toLocaleString("en-US") : DASH);

/** A share from 0 to 1 as per cent. */
function percent(x) {
  if (!isNumber(x)) return DASH;
  const p = 100 * x;
  return `${p === 0 ? "0" : p < 0.1 ? "<0.1" : p.toFixed(p < 10 ? 1 : 0)} %`;
}

function bytes(x) {
  if (!isNumber(x)) return DASH;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  for (; x >= 1000 && i < units.length - 1; i++) x /= 1000;
  return `${i ? x.toPrecision(3) : int(x)} ${units[i]}`;
}

/** Milliseconds in the unit that reads best. */
function ms(x) {
  if (!isNumber(x)) return DASH;
  if (x >= 1000) return `${fmt(x / 1000, 3)} s`;
  return x < 0.1 && x > 0 ? `${fmt(1000 * x, 3)} µs` : `${fmt(x, 3)} ms`;
}

const clip = (text, max) => (text.length > max ? `${Array.from(text).slice(0, max).join("")}…` : text);

/** A token's text with its white space and control characters made visible. */
function visible(text) {
  return String(text ?? "")
    .replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣")
    .replace(/[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
      (c) => `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

/** A token as a chip: marks of invisible characters are pale, so that they are not taken for text. */
function token(t, extra = {}) {
  const parts = visible(t.text).split(/([⏎⇥␣]|⟨[0-9A-F]{4}⟩)/u);
  const chip = el("span", { ...extra, class: `tok ${extra.class ?? ""}` });
  parts.forEach((part, i) => part && chip.append(i % 2 ? el("span", { class: "ghost" }, part) : part));
  if (!t.text) chip.append(el("span", { class: "ghost" }, `#${t.id}`));
  return chip;
}

/** Facts as a description list; rows are [name, value, class?], null values are dashes. */
function facts(rows) {
  return el("dl", { class: "facts" }, rows.map(([name, value, mark]) =>
    el("div", { class: mark }, el("dt", {}, name), el("dd", {}, value ?? DASH))));
}

function tile(name, value, note) {
  return el("div", { class: "tile" }, el("div", { class: "k" }, name), el("div", { class: "v" }, value),
    note ? el("div", { class: "n" }, note) : null);
}

/**
 * A table that scrolls inside its frame. `columns` are {head, class?, part?}; a row is {cells, class?}, its first cell
 * heads the row, a cell is text, a node or {text, class}. `groups` are [text, span] of a heading row above; `whole` shows
 * all rows at once.
 */
function table(caption, columns, rows, { groups, cls, whole } = {}) {
  const heads = columns.map((c) => el("th", { scope: "col", class: c.class }, c.head));
  const top = groups && el("tr", {}, groups.map(([text, span], i) =>
    el("th", { scope: "colgroup", colspan: span, class: i ? "part left" : "left" }, text)));
  const body = el("tbody", {}, rows.map((row) => tableRow(columns, row)));
  const head = el("thead", {}, top ?? null, el("tr", {}, heads));
  const frame = { class: whole ? "scroll whole" : "scroll", tabindex: 0, role: "region", "aria-label": caption };
  return el("div", frame, el("table", { class: cls }, el("caption", {}, caption), head, body));
}

function tableRow(columns, row) {
  return el("tr", { class: row.class }, row.cells.map((cell, i) => {
    const made = cell !== null && typeof cell === "object" && !(cell instanceof Node);
    const cls = [columns[i].class, made ? cell.class : null].filter(Boolean).join(" ");
    const inside = (made ? cell.text : cell) ?? DASH;
    return el(i ? "td" : "th", { class: cls || null, scope: i ? null : "row" }, inside);
  }));
}

/** A labelled drop-down list of [value, text]. */
function choice(label, options, picked, onpick) {
  const list = el("select", { onchange: () => onpick(list.value) },
    options.map(([value, text]) => el("option", { value, selected: value === picked }, text)));
  return el("label", { class: "screen" }, `${label} `, list);
}

/** Buttons of which one is down. */
function oneOf(label, options, picked, onpick) {
  const buttons = options.map(([value, text]) => el("button", {
    type: "button", "aria-pressed": String(value === picked),
    onclick: () => {
      buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(options[i][0] === value)));
      onpick(value);
    },
  }, text));
  return el("span", { class: "group screen", role: "group", "aria-label": label }, buttons);
}

/** Puts `build`'s nodes on the page under a heading and in the contents; what fails is said in its place. */
function section(id, title, lead, build) {
  const card = el("section", { class: "card", id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title` }, title), lead ? el("p", { class: "lead" }, lead) : null);
  document.getElementById("main").append(card);
  try {
    card.append(...build(card).filter((node) => node !== null));
  } catch (error) {
    console.error(error);
    card.append(el("p", { class: "failed" }, `This part could not be drawn: ${error.message}`));
  }
  const nav = document.getElementById("contents");
  if (!nav.firstChild) nav.append(el("ul"));
  nav.firstChild.append(el("li", {}, el("a", { href: `#${id}` }, title)));
}

/** The head of the page: what it is, of what, the exact command, and the switch between light and dark. */
function pageHead(kind, title, command, version) {
  const root = document.documentElement;
  const dark = () => root.dataset.theme === "dark"
    || (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const name = () => (dark() ? "Light colours" : "Dark colours");
  const toggle = el("button", {
    type: "button",
    onclick: () => {
      root.dataset.theme = dark() ? "light" : "dark";
      toggle.textContent = name();
    },
  }, name());
  document.title = `${kind} · ${title}`;
  document.getElementById("top").append(
    el("div", { class: "topline" }, el("span", { class: "kicker" }, `${kind} · version ${version ?? DASH}`), toggle),
    el("h1", {}, title), el("code", { class: "command", "aria-label": "Command" }, command ?? DASH));
  document.getElementById("end").append(el("p", {},
    `Written by ${kind} ${version ?? ""}. Everything on this page is inside this one file; `
    + "charts answer to the mouse, touch and the arrow keys."));
}

/** Everything that is folded is open on paper. */
function openForPrint() {
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((d) => { d.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((d) => { d.open = false; }));
}
openForPrint();
