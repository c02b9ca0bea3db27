// Charts as inline SVG: lines, heatmaps, bars, stacked columns. Each is drawn to the width it has, answers to the
// pointer and the arrow keys, and can be saved as an SVG file that carries its own title, legend and colours.

const SVG_NS = "http://www.w3.org/2000/svg";
const PRINT_WIDTH = 690;
const CHAR = 6.7; // width of a character at 12 px, on the safe side
const SERIES = ["var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)"];
const VIRIDIS = [[68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140], [40, 174, 128],
  [94, 201, 98], [173, 220, 48], [253, 231, 37]];

function svg(tag, attrs, ...children) {
  return fill(document.createElementNS(SVG_NS, tag), attrs, children);
}

const label = (x, y, text, attrs) => svg("text", { x, y, fill: "var(--muted)", ...attrs }, text);
const line = (x1, y1, x2, y2, attrs) => svg("line", { x1, y1, x2, y2, stroke: "var(--grid)", ...attrs });
const round = (x) => Math.round(x * 10) / 10;
const finite = (values) => values.filter(isNumber);

// ---- frame: title, saving, drawing anew when the width changes, tooltip -------------------------------------------

const drawn = new Map();
const resized = new ResizeObserver((entries) => entries.forEach((e) => drawn.get(e.target)?.(e.contentRect.width)));

/**
 * A chart in a figure. `draw(width)` returns {height, nodes, summary, at(x, y), move(dx, dy), show(hit)}: `at` finds
 * what is under the pointer, `move` steps with the arrow keys, `show` gives {x, y, mark, head, rows} of a hit.
 */
function chart(name, title, draw) {
  const plot = el("div", { class: "plot" });
  const link = el("a", {
    class: "save", href: "#", download: `${name}.svg`, title: "Save this chart as an SVG file",
    onclick: () => { link.href = URL.createObjectURL(saved(plot.firstChild, title)); },
  }, "SVG ↓");
  link.setAttribute("aria-label", `Save “${title}” as SVG`);
  drawn.set(plot, (width) => {
    if (width < 10 || plot.dataset.width === String(width)) return;
    plot.dataset.width = width;
    plot.replaceChildren(chartSvg(title, width, draw(width)));
  });
  resized.observe(plot);
  return el("figure", { id: `chart-${name}` }, el("figcaption", {}, el("h3", {}, title), link), plot);
}

/** Draws a chart of the page again, after what it shows has changed. */
function redraw(figure) {
  const plot = figure.querySelector(".plot");
  delete plot.dataset.width;
  drawn.get(plot)(plot.clientWidth);
}

addEventListener("beforeprint", () => drawn.forEach((draw) => draw(PRINT_WIDTH)));
addEventListener("afterprint", () => drawn.forEach((draw, plot) => draw(plot.clientWidth)));

function chartSvg(title, width, made) {
  const mark = svg("g", { "pointer-events": "none" });
  const root = svg("svg", {
    width, height: made.height, viewBox: `0 0 ${width} ${made.height}`, role: "img", tabindex: made.at ? 0 : null,
    "aria-label": `${title}. ${made.summary ?? ""}`, "font-size": 12,
    "font-family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif",
  }, made.nodes, mark);
  if (made.at) listen(root, mark, made);
  return root;
}

function listen(root, mark, made) {
  let hit = null;
  const show = (next) => {
    hit = next;
    mark.replaceChildren();
    if (hit === null) return hideTip();
    const shown = made.show(hit);
    mark.append(...shown.mark);
    const box = root.getBoundingClientRect();
    const scale = box.width / root.viewBox.baseVal.width;
    return showTip(box.left + shown.x * scale, box.top + shown.y * scale, shown.head, shown.rows);
  };
  const point = (event) => {
    const box = root.getBoundingClientRect();
    const scale = root.viewBox.baseVal.width / box.width;
    show(made.at((event.clientX - box.left) * scale, (event.clientY - box.top) * scale));
  };
  root.addEventListener("pointermove", point);
  root.addEventListener("pointerdown", point);
  root.addEventListener("pointerleave", () => show(null));
  root.addEventListener("blur", () => show(null));
  root.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Escape") show(null);
    if (!step) return;
    event.preventDefault();
    show(made.move(hit, ...step));
  });
}

function showTip(x, y, head, rows) {
  const tip = document.getElementById("tip");
  tip.replaceChildren(el("div", { class: "h" }, head), ...rows.map(([name, value, color]) => el("div", { class: "r" },
    el("span", {}, color ? swatch(color) : null, name), el("span", {}, value))));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 14 + box.width > innerWidth ? x - 14 - box.width : x + 14;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 12, innerHeight - box.height - 4))}px`;
}

const hideTip = () => { document.getElementById("tip").hidden = true; };

function swatch(color) {
  const box = el("span", { class: "sw" });
  box.style.background = color;
  return box;
}

/** The chart as a file of its own: palette variables become the colours of the moment, the title goes on top. */
function saved(root, title) {
  const copy = root.cloneNode(true);
  const { width, height } = root.viewBox.baseVal;
  copy.setAttribute("viewBox", `-8 -28 ${width + 16} ${height + 36}`);
  copy.setAttribute("width", width + 16);
  copy.setAttribute("height", height + 36);
  copy.removeAttribute("tabindex");
  copy.prepend(svg("rect", { x: -8, y: -28, width: width + 16, height: height + 36, fill: "var(--card)" }),
    svg("text", { x: 0, y: -10, "font-size": 14, "font-weight": 600, fill: "var(--fg)" }, title));
  const probe = document.body.appendChild(el("span", {}));
  const text = new XMLSerializer().serializeToString(copy).replace(/var\((--[a-z0-9-]+)\)/g, (_, name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  });
  probe.remove();
  return new Blob([text], { type: "image/svg+xml" });
}

// ---- scales -----------------------------------------------------------------------------------------------------

const SUPER = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

function tickText(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 0.001 && size < 1e5) return String(Number(x.toPrecision(6))).replace("-", "−");
  const e = Math.floor(Math.log10(size) + 1e-9);
  const lead = Number((x / 10 ** e).toPrecision(3));
  const power = `10${String(e).replace(/./g, (c) => SUPER[c])}`;
  return (lead === 1 ? power : `${lead}·${power}`).replace(/^-/, "−");
}

/** 10^e, written out where it is short. */
const decadeText = (e) => (Math.abs(e) <= 3 ? tickText(Number(`1e${e}`)) : `10${String(e).replace(/./g, (c) => SUPER[c])}`);

function niceStep(span, n) {
  const raw = span / Math.max(1, n);
  const ten = 10 ** Math.floor(Math.log10(raw));
  return ten * [1, 2, 5, 10].find((m) => ten * m >= raw * 0.999);
}

/** From [lo, hi] to pixels [a, b]; `ticks` carry what is written beside them. */
function linearScale(lo, hi, a, b, wanted = 5) {
  if (lo === hi) [lo, hi] = lo === 0 ? [0, 1] : [lo - Math.abs(lo) * 0.1, hi + Math.abs(hi) * 0.1];
  const step = niceStep(hi - lo, wanted);
  const from = Math.floor(lo / step + 1e-6), to = Math.ceil(hi / step - 1e-6);
  const ticks = Array.from({ length: to - from + 1 }, (_, i) => (from + i) * step);
  const at = (x) => a + ((x - from * step) / ((to - from) * step)) * (b - a);
  return { at, ticks: ticks.map((t) => ({ at: at(t), text: tickText(Number(t.toPrecision(12))) })) };
}

/** Decades; when `zero`, a lane of its own below the lowest decade holds the values that are exactly zero. */
function logScale(lo, hi, a, b, zero) {
  let from = Math.floor(Math.log10(lo) + 1e-9), to = Math.ceil(Math.log10(hi) - 1e-9);
  if (from === to) to = from + 1;
  const lane = zero ? Math.sign(b - a) * 22 : 0;
  const base = a + lane;
  const at = (x) => (x > 0 ? base + ((Math.log10(x) - from) / (to - from)) * (b - base) : a + lane * 0.25);
  const every = Math.max(1, Math.ceil((to - from) / (Math.abs(b - base) / 26)));
  const ticks = [];
  for (let e = from; e <= to; e += every) ticks.push({ at: at(10 ** e), text: decadeText(e) });
  if (to - from <= 2) {
    for (let e = from; e < to; e++) for (const m of [2, 5]) ticks.push({ at: at(m * 10 ** e), text: tickText(Number(`${m}e${e}`)) });
  }
  if (zero) ticks.push({ at: at(0), text: "0" });
  return { at, ticks, laneEdge: zero ? base + Math.sign(a - b) * 4 : null };
}

/** Whether values ask for decades: all of one sign and more than two decades apart. */
function spansDecades(values) {
  const seen = finite(values).filter((v) => v !== 0);
  return seen.length > 1 && Math.min(...seen) > 0 && Math.max(...seen) / Math.min(...seen) > 100;
}

// ---- lines ------------------------------------------------------------------------------------------------------

const MARKS = [
  (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`,
  (x, y, r) => `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (x, y, r) => `M${x} ${y - r * 1.3}l${r * 1.2} ${r * 2.2}h${-2.4 * r}z`,
  (x, y, r) => `M${x} ${y - r * 1.4}l${r * 1.4} ${r * 1.4}l${-r * 1.4} ${r * 1.4}l${-r * 1.4} ${-r * 1.4}z`,
];

/**
 * Lines over a row of points. `c`: n, xLabel, yLabel, xTicks [{i, text}] or none for 0..n, series [{label, values,
 * color, dash, mark}], band {label, lo, hi}, lines [{y, label}], flags [{i, y?, text, head, rows}] (marked points; without
 * y they stand at the top edge), edge {label, at: [i]} (points without a value that matter: dashes along the top), log true/false/"auto", zero (axis starts at 0), height, head(i).
 */
function lineChart(name, title, c) {
  return chart(name, title, (width) => {
    const now = typeof c === "function" ? c() : c;
    const all = [...now.series.map((s) => s.values), now.band?.lo ?? [], now.band?.hi ?? []].flat();
    const legend = legendRow(legendOf(now), width);
    const frame = { left: 58, right: width - 14, top: legend.height + 12 + (now.flags?.length ? 14 : 0) + (now.edge?.at.length ? 10 : 0) };
    frame.bottom = frame.top + (now.height ?? 220);
    const x = (i) => (now.n < 2 ? (frame.left + frame.right) / 2
      : frame.left + 6 + (i / (now.n - 1)) * (frame.right - frame.left - 12));
    const y = lineScale(now, finite([...all, ...(now.lines ?? []).map((l) => l.y)]), frame);
    const nodes = [legend.node, axes(frame, now, x, y)];
    if (now.band) nodes.push(bandPath(now.band, x, y));
    for (const l of now.lines ?? []) nodes.push(...thresholdLine(frame, y.at(l.y), l.label));
    now.series.forEach((s, k) => nodes.push(...linePaths(s, k, now.n, x, y, frame)));
    if (now.edge?.at.length) nodes.push(edgeDashes(now.edge, now.n, x, frame));
    (now.flags ?? []).forEach((f) => nodes.push(flagMark(f, x, y, frame)));
    return { height: frame.bottom + 40, nodes, summary: lineSummary(now), ...lineHits(now, x, y, frame) };
  });
}

function lineScale(c, seen, frame) {
  const positive = seen.filter((v) => v > 0);
  const log = c.log === "auto" ? spansDecades(seen) : c.log;
  if (log && positive.length) {
    return logScale(Math.min(...positive), Math.max(...positive), frame.bottom, frame.top, seen.some((v) => v === 0));
  }
  if (!seen.length) return { at: () => frame.bottom, ticks: [] };
  return linearScale(Math.min(...seen, c.zero ? 0 : Infinity), Math.max(...seen), frame.bottom, frame.top);
}

function legendOf(c) {
  const items = c.series.length > 1 || c.band || c.lines?.length || c.flags?.length || c.edge?.at.length
    ? c.series.map((s, k) => ({ text: s.label, color: colorOf(s, k), dash: s.dash, mark: s.mark === false ? null : k, line: true })) : [];
  if (c.band) items.push({ text: c.band.label, color: "var(--c1)", band: true });
  if (c.edge?.at.length) items.push({ text: c.edge.label, color: "var(--c5)", dash: "none", mark: null, line: true });
  if (c.flags?.length) items.push({ text: c.flagLabel, color: "var(--bad)", flag: true });
  return items;
}

const colorOf = (s, k) => s.color ?? SERIES[k % SERIES.length];

/** Legend entries in as many rows as the width needs. */
function legendRow(items, width) {
  const node = svg("g", {});
  let x = 0, y = 10;
  for (const item of items) {
    const w = 30 + item.text.length * CHAR + 12;
    if (x && x + w > width) [x, y] = [0, y + 18];
    if (item.band) node.append(svg("rect", { x, y: y - 5, width: 22, height: 10, fill: item.color, opacity: 0.22 }));
    else if (item.flag) node.append(svg("path", { d: `M${x + 5} ${y - 5}h12l-6 10z`, fill: item.color }));
    else if (item.line) {
      node.append(line(x, y, x + 22, y, { stroke: item.color, "stroke-width": 2, "stroke-dasharray": item.dash }));
      if (item.mark !== null) node.append(svg("path", { d: MARKS[item.mark % 4](x + 11, y, 3.2), fill: item.color }));
    } else node.append(svg("rect", { x: x + 4, y: y - 6, width: 12, height: 12, fill: item.color, stroke: item.stroke }));
    node.append(label(x + 28, y + 4, item.text, { fill: "var(--fg)" }));
    x += w;
  }
  return { node, height: items.length ? y + 12 : 0 };
}

function axes(frame, c, x, y) {
  const g = svg("g", {});
  for (const t of y.ticks) {
    g.append(line(frame.left, round(t.at), frame.right, round(t.at)),
      label(frame.left - 7, round(t.at) + 4, t.text, { "text-anchor": "end" }));
  }
  if (y.laneEdge) g.append(line(frame.left, y.laneEdge, frame.right, y.laneEdge, { stroke: "var(--muted)", "stroke-dasharray": "1 3" }));
  g.append(line(frame.left, frame.bottom, frame.right, frame.bottom, { stroke: "var(--muted)" }));
  const step = Math.max(1, niceStep(c.n - 1 || 1, (frame.right - frame.left) / 44));
  const ticks = c.xTicks ?? Array.from({ length: Math.floor((c.n - 1) / step) + 1 }, (_, k) => ({ i: k * step, text: String(k * step) }));
  let free = -Infinity;
  for (const t of ticks) {
    const at = round(x(t.i));
    const half = (t.text.length * CHAR) / 2;
    if (at - half < free || at + half > frame.right + 14) continue;
    free = at + half + 8;
    g.append(line(at, frame.bottom, at, frame.bottom + 4, { stroke: "var(--muted)" }),
      label(at, frame.bottom + 17, t.text, { "text-anchor": "middle" }));
  }
  const middle = (frame.top + frame.bottom) / 2;
  g.append(label((frame.left + frame.right) / 2, frame.bottom + 34, c.xLabel, { "text-anchor": "middle" }),
    label(0, 0, c.yLabel, { "text-anchor": "middle", transform: `translate(11 ${middle}) rotate(-90)` }));
  return g;
}

/** Runs of points between gaps, as [[i, i + 1, …], …]. */
function runs(n, has) {
  const out = [];
  for (let i = 0; i < n; i++) if (has(i)) (i && has(i - 1) ? out[out.length - 1] : out[out.push([]) - 1]).push(i);
  return out;
}

function linePaths(s, k, n, x, y, frame) {
  const color = colorOf(s, k);
  const has = (i) => isNumber(s.values[i]);
  const at = (i) => `${round(x(i))} ${round(y.at(s.values[i]))}`;
  const parts = runs(n, has);
  const marked = s.mark !== false && (frame.right - frame.left) / n > 9;
  const dots = marked ? parts.flat() : parts.filter((r) => r.length === 1).flat();
  return [
    svg("path", {
      d: parts.map((r) => `M${r.map(at).join("L")}`).join(""), fill: "none", stroke: color, "stroke-width": s.thin ? 1.3 : 1.9,
      "stroke-dasharray": s.dash, "stroke-linejoin": "round",
    }),
    svg("path", { d: dots.map((i) => MARKS[k % 4](round(x(i)), round(y.at(s.values[i])), 2.6)).join(""), fill: color }),
  ];
}

function bandPath(band, x, y) {
  const has = (i) => isNumber(band.lo[i]) && isNumber(band.hi[i]);
  const point = (i, v) => `${round(x(i))} ${round(y.at(v))}`;
  const area = (r) => (r.length > 1
    ? `M${r.map((i) => point(i, band.hi[i])).join("L")}L${[...r].reverse().map((i) => point(i, band.lo[i])).join("L")}z`
    : `M${round(x(r[0])) - 8} ${round(y.at(band.hi[r[0]]))}h16V${round(y.at(band.lo[r[0]]))}h-16z`);
  return svg("path", { d: runs(band.lo.length, has).map(area).join(""), fill: "var(--c1)", opacity: 0.2 });
}

function thresholdLine(frame, at, text) {
  return [
    line(frame.left, at, frame.right, at, { stroke: "var(--c4)", "stroke-width": 1.6, "stroke-dasharray": "6 4" }),
    label(frame.right - 2, at - 5, text, { "text-anchor": "end", fill: "var(--c4)", stroke: "var(--card)", "stroke-width": 3, "paint-order": "stroke" }),
  ];
}

/** Neighbours join to one dash, as a NaN that has spread fills the rest of the pass. */
function edgeDashes(edge, n, x, frame) {
  const at = new Set(edge.at);
  const half = Math.max(1.5, (frame.right - frame.left) / n / 2);
  const dash = (r) => `M${round(x(r[0]) - half)} ${frame.top - 8}h${round(x(r[r.length - 1]) - x(r[0]) + 2 * half)}v6H${round(x(r[0]) - half)}z`;
  return svg("path", { d: runs(n, (i) => at.has(i)).map(dash).join(""), fill: "var(--c5)" });
}

function flagMark(f, x, y, frame) {
  const at = round(x(f.i));
  const top = isNumber(f.y) ? Math.max(frame.top - 2, round(y.at(f.y)) - 6) : frame.top - 2;
  return svg("g", {},
    line(at, top, at, frame.bottom, { stroke: "var(--bad)", opacity: 0.35, "stroke-dasharray": "2 3" }),
    svg("path", { d: `M${at - 6} ${top - 10}h12l-6 10z`, fill: "var(--bad)" }),
    f.text ? label(at, top - 13, f.text, { "text-anchor": "middle", fill: "var(--bad)", "font-weight": 700 }) : null);
}

function lineSummary(c) {
  const ranges = c.series.map((s) => {
    const seen = finite(s.values);
    return seen.length ? `${s.label} from ${fmt(Math.min(...seen))} to ${fmt(Math.max(...seen))}` : `${s.label}: no values`;
  });
  return `${c.yLabel} over ${c.n} points of ${c.xLabel}. ${ranges.join("; ")}.`;
}

function lineHits(c, x, y, frame) {
  const clamp = (i) => Math.max(0, Math.min(c.n - 1, i));
  const span = (frame.right - frame.left - 12) / Math.max(1, c.n - 1);
  return {
    at: (px) => clamp(Math.round((px - frame.left - 6) / span)),
    move: (i, dx, dy) => clamp(i === null ? 0 : i + dx + dy),
    show: (i) => {
      const rows = c.series.map((s, k) => [s.label, s.text ? s.text(i) : fmt(s.values[i]), colorOf(s, k)]);
      if (c.band) rows.push([c.band.label, `${fmt(c.band.lo[i])} … ${fmt(c.band.hi[i])}`, null]);
      rows.push(...(c.flags ?? []).filter((f) => f.i === i).flatMap((f) => f.rows ?? []));
      const dots = c.series.filter((s) => isNumber(s.values[i]));
      const mark = [line(x(i), frame.top, x(i), frame.bottom, { stroke: "var(--muted)" }), ...dots.map((s) =>
        svg("circle", { cx: x(i), cy: y.at(s.values[i]), r: 4, fill: colorOf(s, c.series.indexOf(s)), stroke: "var(--card)", "stroke-width": 1.5 }))];
      return { x: x(i), y: frame.top + 20, mark, head: c.head(i), rows };
    },
  };
}

// ---- heatmap ----------------------------------------------------------------------------------------------------

const SHADES = 48;

function shade(t) {
  const at = Math.max(0, Math.min(1, t)) * (VIRIDIS.length - 1);
  const i = Math.min(VIRIDIS.length - 2, Math.floor(at));
  return `rgb(${VIRIDIS[i].map((v, k) => Math.round(v + (VIRIDIS[i + 1][k] - v) * (at - i))).join(",")})`;
}

/**
 * Rows × columns as colour. `c`: values [row][col], rowLabel, colLabel, colText(i), scale (value to 0..1; null for a cell
 * that stands out as empty), ticks [{t, text}] of the legend, empty (its name), beside [{title, values, text(i)}] drawn
 * as bars right of the rows, tip(row, col) as {head, rows}.
 */
function heatmap(name, title, c) {
  return chart(name, title, (width) => {
    const n = c.values.length;
    const m = Math.max(...c.values.map((row) => row.length), 1);
    const beside = c.beside ?? [];
    const narrow = width < 560;
    const side = beside.length ? (narrow ? 46 : 92) : 0;
    const rowHeight = Math.max(7, Math.min(26, 620 / n));
    const top = 40 + (beside.length ? 18 : 0);
    const frame = { left: 46, right: width - 8 - beside.length * (side + 10), top, bottom: top + n * rowHeight };
    const cell = { w: (frame.right - frame.left) / m, h: rowHeight };
    const nodes = [rampLegend(c, frame.left), cellPaths(c, frame, cell), heatAxes(c, frame, cell, m)];
    beside.forEach((b, k) => nodes.push(besideBars(b, frame, cell, frame.right + 12 + k * (side + 10), side, narrow)));
    const summary = `${n} rows (${c.rowLabel}) by ${m} columns (${c.colLabel}). The arrow keys move from cell to cell.`;
    return { height: frame.bottom + 38, nodes, summary, ...heatHits(c, frame, cell, m) };
  });
}

function rampLegend(c, left) {
  const g = svg("g", {});
  const w = 132;
  for (let i = 0; i < 44; i++) g.append(svg("rect", { x: left + i * 3, y: 0, width: 3.2, height: 9, fill: shade(i / 43) }));
  let free = -Infinity;
  for (const t of c.ticks) {
    const half = (t.text.length * CHAR) / 2;
    const at = Math.max(left + t.t * w, half);
    if (at - half < free) continue;
    free = at + half + 4;
    g.append(label(at, 22, t.text, { "text-anchor": "middle", "font-size": 11 }));
  }
  const right = Math.max(left + w, free) + 14;
  if (c.empty) {
    g.append(svg("rect", { x: right, y: 0, width: 10, height: 9, fill: "var(--card)", stroke: "var(--muted)" }),
      label(right + 15, 9, c.empty, { "font-size": 11 }));
  }
  return g;
}

/**
 * One path per colour: a map of ten thousand cells stays a few dozen elements. The ground has the middling colour, so that
 * no seams show between cells where a printer smooths edges.
 */
function cellPaths(c, frame, cell) {
  const paths = new Map();
  c.values.forEach((row, r) => row.forEach((value, k) => {
    const t = c.scale(value);
    const color = t === null ? "var(--card)" : shade(Math.round(t * SHADES) / SHADES);
    const x = round(frame.left + k * cell.w), y = round(frame.top + r * cell.h);
    const w = round(round(frame.left + (k + 1) * cell.w) - x), h = round(round(frame.top + (r + 1) * cell.h) - y);
    paths.set(color, `${paths.get(color) ?? ""}M${x} ${y}h${w}v${h}h${-w}z`);
  }));
  const shades = c.values.flat().map(c.scale).filter((t) => t !== null).sort((a, b) => a - b);
  const box = { x: frame.left, y: frame.top, width: frame.right - frame.left, height: frame.bottom - frame.top };
  return svg("g", { "shape-rendering": "crispEdges" },
    svg("rect", { ...box, fill: shades.length ? shade(shades[shades.length >> 1]) : "none" }),
    [...paths].map(([color, d]) => svg("path", { d, fill: color })),
    svg("rect", { ...box, fill: "none", stroke: "var(--rule)" }));
}

function heatAxes(c, frame, cell, m) {
  const g = svg("g", {});
  const n = c.values.length;
  const rowStep = Math.ceil(14 / cell.h);
  for (let r = 0; r < n; r += rowStep > 1 ? niceStep(rowStep, 1) : 1) {
    g.append(label(frame.left - 6, round(frame.top + (r + 0.5) * cell.h) + 4, String(r), { "text-anchor": "end", "font-size": 11 }));
  }
  const step = Math.max(1, niceStep(m, (frame.right - frame.left) / 52));
  let free = -Infinity;
  for (let k = 0; k < m; k += step) {
    const at = round(frame.left + (k + 0.5) * cell.w), text = c.colText(k), half = (text.length * CHAR) / 2;
    if (at - half < free || at + half > frame.right + 8) continue;
    free = at + half + 6;
    g.append(line(at, frame.bottom, at, frame.bottom + 4, { stroke: "var(--muted)" }),
      label(at, frame.bottom + 16, text, { "text-anchor": "middle", "font-size": 11 }));
  }
  g.append(label((frame.left + frame.right) / 2, frame.bottom + 33, c.colLabel, { "text-anchor": "middle" }),
    label(0, 0, c.rowLabel, { "text-anchor": "middle", transform: `translate(11 ${(frame.top + frame.bottom) / 2}) rotate(-90)` }));
  return g;
}

function besideBars(b, frame, cell, left, width, narrow) {
  const g = svg("g", {});
  const max = Math.max(...finite(b.values), b.least ?? 0) || 1;
  const written = !narrow && cell.h >= 11;
  const room = written ? width - 38 : width;
  g.append(label(left, frame.top - 8, narrow ? b.short : b.title, { "font-size": narrow ? 10 : 11 }));
  b.values.forEach((v, i) => {
    const y = frame.top + i * cell.h;
    const w = isNumber(v) ? Math.max(0, (v / max) * room) : 0;
    g.append(svg("rect", { x: left, y: round(y + cell.h * 0.14), width: round(w), height: round(cell.h * 0.72), fill: b.color }));
    if (written) g.append(label(round(left + w + 4), round(y + cell.h / 2 + 3.5), b.text(i), { "font-size": 10, fill: "var(--fg)" }));
  });
  g.append(line(left, frame.top, left, frame.bottom, { stroke: "var(--muted)" }));
  return g;
}

function heatHits(c, frame, cell, m) {
  const n = c.values.length;
  const clamp = (x, max) => Math.max(0, Math.min(max - 1, x));
  return {
    at: (px, py) => {
      const col = Math.floor((px - frame.left) / cell.w), row = Math.floor((py - frame.top) / cell.h);
      return row < 0 || row >= n || col < 0 ? null : { row, col: clamp(col, m) };
    },
    move: (hit, dx, dy) => (hit ? { row: clamp(hit.row + dy, n), col: clamp(hit.col + dx, m) } : { row: 0, col: 0 }),
    show: ({ row, col }) => {
      const x = frame.left + col * cell.w, y = frame.top + row * cell.h;
      const ring = (grow, stroke) => svg("rect", {
        x: x - grow, y: y - grow, width: cell.w + 2 * grow, height: cell.h + 2 * grow, fill: "none", stroke, "stroke-width": 1.6,
      });
      return { x: x + cell.w, y: y + cell.h, mark: [ring(0.8, "#fff"), ring(2.2, "#000")], ...c.tip(row, col) };
    },
  };
}

// ---- bars and columns -------------------------------------------------------------------------------------------

/**
 * Rows of horizontal bars, one panel beside the other (below it where the page is narrow). `c`: labels, panels [{title,
 * values, text(i), color, line {value, label}}].
 */
function barChart(name, title, c) {
  return chart(name, title, (width) => {
    const stacked = width < 620 && c.panels.length > 1;
    const longest = Math.max(...c.labels.map((l) => l.length), 4);
    const names = Math.min(longest * 7.4 + 12, width * 0.36, 230);
    const rowHeight = 22;
    const body = c.labels.length * rowHeight;
    const nodes = [];
    let height = 0;
    c.panels.forEach((panel, k) => {
      const share = stacked ? width : (width - names) / c.panels.length;
      const left = stacked ? names : names + k * share;
      const top = 24 + (stacked ? k * (body + 44) : 0);
      if (stacked || !k) nodes.push(barNames(c.labels, names, top, rowHeight));
      nodes.push(barPanel(panel, k, c.labels.length, left, (stacked ? width - names : share) - 10, top, rowHeight));
      height = top + body + 8;
    });
    const summary = c.labels.map((l, i) => `${l}: ${c.panels.map((p) => p.text(i)).join(", ")}`).slice(0, 12).join("; ");
    return { height, nodes, summary };
  });
}

function barNames(labels, width, top, rowHeight) {
  const fits = Math.floor((width - 12) / 7.3);
  return svg("g", { "font-family": "ui-monospace, 'SF Mono', 'Liberation Mono', 'DejaVu Sans Mono', Menlo, Consolas, monospace" },
    labels.map((text, i) => label(width - 8, top + i * rowHeight + 15, clip(text, fits), { "text-anchor": "end", fill: "var(--fg)" })));
}

function barPanel(panel, k, n, left, width, top, rowHeight) {
  const g = svg("g", {});
  const texts = panel.values.map((_, i) => panel.text(i));
  const room = Math.max(30, width - Math.max(...texts.map((t) => t.length)) * CHAR - 8);
  const lo = Math.min(0, ...finite(panel.values));
  const hi = Math.max(0, ...finite(panel.values), panel.line?.value ?? 0) || 1;
  const x = (v) => left + ((v - lo) / (hi - lo)) * room;
  g.append(label(left, top - 10, panel.title, { "font-weight": 600 }));
  if (panel.line) {
    g.append(line(x(panel.line.value), top - 4, x(panel.line.value), top + n * rowHeight, { stroke: "var(--c4)", "stroke-dasharray": "5 4", "stroke-width": 1.6 }),
      barLineLabel(panel, left, width, x(panel.line.value), top));
  }
  panel.values.forEach((v, i) => {
    const y = top + i * rowHeight;
    const end = isNumber(v) ? x(v) : x(0);
    g.append(svg("rect", { x: round(Math.min(x(0), end)), y: y + 4, width: round(Math.abs(end - x(0))), height: rowHeight - 8, rx: 1.5, fill: panel.color ?? SERIES[k] }),
      label(round(Math.max(end, x(0)) + 6), y + 15.5, texts[i], { fill: "var(--fg)", stroke: "var(--card)", "stroke-width": 3, "paint-order": "stroke" }));
  });
  g.append(line(x(0), top, x(0), top + n * rowHeight, { stroke: "var(--muted)" }));
  return g;
}

/** The name of a panel's line above it, pushed inside the panel; left out where it would run into the title. */
function barLineLabel(panel, left, width, at, top) {
  const half = (panel.line.label.length * CHAR) / 2;
  const middle = Math.min(at, left + width - half);
  const clear = middle - half > left + panel.title.length * CHAR + 14;
  return clear ? label(middle, top - 10, panel.line.label, { "text-anchor": "middle", fill: "var(--c4)" }) : svg("g", {});
}

/** Stacked columns over layers or the like. `c`: xLabel, yLabel, names (of the columns), series [{label, values, color}]. */
function stackChart(name, title, c) {
  return chart(name, title, (width) => {
    const n = c.names.length;
    const legend = legendRow(c.series.map((s) => ({ text: s.label, color: s.color, stroke: s.stroke })), width);
    const frame = { left: 58, right: width - 14, top: legend.height + 12 };
    frame.bottom = frame.top + 180;
    const totals = c.names.map((_, i) => c.series.reduce((sum, s) => sum + (s.values[i] ?? 0), 0));
    const y = linearScale(0, Math.max(...totals, 1), frame.bottom, frame.top);
    const wide = (frame.right - frame.left) / n;
    const x = (i) => frame.left + (i + 0.5) * wide;
    const box = Math.min(wide * 0.78, 60);
    const nodes = [legend.node, axes(frame, { ...c, n, xTicks: c.names.map((text, i) => ({ i, text })) }, x, y)];
    const base = c.names.map(() => 0);
    for (const s of c.series) {
      s.values.forEach((v, i) => {
        if (!v) return;
        const [low, high] = [y.at(base[i]), y.at(base[i] + v)];
        base[i] += v;
        nodes.push(svg("rect", { x: round(x(i) - box / 2), y: round(high), width: round(box), height: round(Math.max(1, low - high)), fill: s.color, stroke: s.stroke }));
      });
    }
    const clamp = (i) => Math.max(0, Math.min(n - 1, i));
    return {
      height: frame.bottom + 40, nodes, summary: `${n} columns.`,
      at: (px) => clamp(Math.floor((px - frame.left) / wide)),
      move: (i, dx, dy) => clamp(i === null ? 0 : i + dx + dy),
      show: (i) => ({
        x: x(i), y: frame.top + 20, head: `${c.xLabel} ${c.names[i]}`, rows: c.series.map((s) => [s.label, int(s.values[i]), s.color]),
        mark: [svg("rect", { x: x(i) - wide / 2, y: frame.top, width: wide, height: frame.bottom - frame.top, fill: "var(--fg)", opacity: 0.08 })],
      }),
    };
  });
}
