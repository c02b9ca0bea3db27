// The page of `apr diff --html`: where two passes part, how far they drift, and what it costs in the end.

const MODES = {
  isolated: "isolated: given the other side's input, this stage itself is at fault",
  free: "free-running: the error includes what earlier stages pass on",
  shape: "the shapes are not the same",
  weights: "the weights are not the same",
};

function diffPage(d) {
  pageHead("apr diff", heading(d.a, d.b), d.command, d.version);
  verdict(d);
  document.getElementById("main").append(endTiles(d));
  sides(d);
  drift(d);
  if (d.culprits?.length) culprits(d);
  stages(d);
  if (d.moe) moe(d.moe);
  if (d.metadata?.length) metadata(d.metadata);
  if (d.notes?.length) section("notes", "Notes", null, () => [el("ul", {}, d.notes.map((text) => el("li", {}, text)))]);
}

const SIDE_ROWS = [["kind", "Kind"], ["path", "File"], ["architecture", "Architecture"], ["device", "Device"], ["isa", "Instructions"],
  ["precision", "Precision"], ["kv", "KV cache"], ["fused", "Kernels"]];
const sideText = (side, key) => (key === "fused" && typeof side.fused === "boolean" ? (side.fused ? "fused" : "unfused") : side[key] ?? null);

/** The two sides in few words: by file or, where that is one file, by what they do not share. */
function heading(a, b) {
  const name = (side) => String(side.path ?? side.kind).split("/").pop();
  if (a.path !== b.path) return `${name(a)} against ${name(b)}`;
  const key = ["device", "isa", "fused", "kv", "precision"].find((k) => a[k] !== b[k]);
  return key ? `${name(a)}: ${sideText(a, key)} against ${sideText(b, key)}` : `${name(a)} against itself`;
}

const layerOf = (x) => (isNumber(x.layer) ? `layer ${x.layer}` : null);

/** Where a culprit is, from the coarsest to the finest thing that is known. */
function place(c) {
  const known = (name, value) => (value === null || value === undefined ? null : `${name} ${value}`);
  return [layerOf(c), known("position", c.position), known("expert", c.expert), c.tensor ?? null, known("row", c.row),
    known("super-block", c.super_block)].filter(Boolean).join(", ");
}

function verdict(d) {
  const same = d.verdict === "same";
  const f = d.first;
  const limit = d.rule === "bits" ? "every bit has to be the same" : `a stage differs when its error is more than ${fmt(d.threshold, 2)} times the noise`;
  const card = el("section", { class: `card banner ${same ? "good" : "bad"}`, "aria-label": "Verdict" },
    el("h2", {}, same ? "✓ Same" : "✗ Differs"),
    f ? el("p", { class: "what" }, "First culprit: ", el("strong", { class: "mono" }, f.stage), place(f) ? ` in ${place(f)}.` : ".") : null,
    f?.why ? el("p", {}, f.why) : null,
    f ? el("p", { class: "muted" }, `Found ${MODES[f.mode] ?? f.mode}. ${errorWords(f)}`) : null,
    el("p", { class: "muted" }, `Rule: ${limit}. ${d.mode === "free" ? "Only the free-running passes were compared: no stage was isolated." : "Each stage was also given the other side's input (isolated)."}`));
  document.getElementById("main").append(card);
}

function errorWords(f) {
  const words = [isNumber(f.error) ? `error ${fmt(f.error)}` : null, isNumber(f.noise) && f.noise > 0 ? `noise ${fmt(f.noise)}` : null,
    isNumber(f.ratio) ? `ratio ${fmt(f.ratio)}` : null].filter(Boolean);
  return words.length ? `${words.join(", ")}.`.replace(/^e/, "E").replace(/^n/, "N").replace(/^r/, "R") : "";
}

function endTiles(d) {
  const e = d.end;
  const moe = d.moe;
  return el("div", { class: "tiles" },
    tile("Mean KLD", fmt(e?.mean_kld), "nats, B from A"),
    tile("Max KLD", fmt(e?.max_kld), "nats, worst position"),
    tile("Same top p", isNumber(e?.same_top_p) ? `${fmt(e.same_top_p)} %` : DASH, e ? `of ${int(e.n_positions)} positions` : null),
    tile("RMS Δp", isNumber(e?.rms_delta_p) ? `${fmt(e.rms_delta_p)} %` : DASH, "of the token that follows"),
    tile("Positions", int(d.positions?.length), `${int(d.tokens?.length)} tokens`),
    moe ? tile("Experts flipped", int(moe.n_flipped), `${int(moe.n_equal)} equal, ${int(moe.n_permuted)} permuted`) : null);
}

function sides(d) {
  const column = (name, side) => el("div", {}, el("h3", {}, name), facts(SIDE_ROWS.map(([key, text]) =>
    [text, sideText(side, key), sideText(d.a, key) === sideText(d.b, key) ? null : "unlike"])));
  section("sides", "The two sides", "≠ marks what is not the same on both.", () => [
    el("div", { class: "sides" }, column("A", d.a), column("B", d.b)), tokensOf(d)]);
}

function tokensOf(d) {
  const list = (d.tokens ?? []).map((t) => (typeof t === "object" && t !== null ? t : { id: t, text: "" }));
  if (!list.length) return null;
  return el("details", { open: list.length <= 60 }, el("summary", {}, `${int(list.length)} tokens on both sides`),
    el("div", { class: "tokens" }, list.map((t, i) => token(t, { title: `position ${i}, id ${t.id}` }))));
}

// ---- error over the stages ----------------------------------------------------------------------------------------

const stageName = (s) => (isNumber(s.layer) ? `${s.stage}, layer ${s.layer}` : s.stage);

/** Indices of the stages that culprits name, each with the culprit's number. */
function flagged(d) {
  const all = [d.first, ...(d.culprits ?? [])].filter((c) => c);
  const out = new Map();
  all.forEach((c, k) => {
    const i = d.stages.findIndex((s) => s.stage === c.stage && (s.layer ?? null) === (c.layer ?? null));
    if (i >= 0 && !out.has(i)) out.set(i, k + 1);
  });
  return out;
}

const MEASURES = {
  ratio: { text: "error / noise", y: "error / noise (log)", of: (m) => m?.ratio },
  error: { text: "relative error", y: "relative RMS error (log)", of: (m) => m?.error },
  n_differ: { text: "values that differ", y: "values that differ (log)", of: (m) => m?.n_differ },
};

function drift(d) {
  const has = (key) => d.stages.some((s) => isNumber(MEASURES[key].of(s.free)) || isNumber(MEASURES[key].of(s.isolated)));
  const usable = Object.keys(MEASURES).filter(has);
  let measure = d.rule === "ratio" && has("ratio") ? "ratio" : usable.includes("error") ? "error" : usable[0];
  if (!measure) return;
  const lead = "Stages in order of computation. Free-running error grows as it is passed on; the isolated error is each stage's own.";
  section("drift", "Error over the stages", lead, () => {
    const figure = lineChart("drift", modesOf(d).length > 1 ? "Free-running and isolated, in one plot" : "Free-running", () => driftChart(d, measure));
    const pick = (picked) => {
      measure = picked;
      redraw(figure);
    };
    return [el("div", { class: "controls" }, oneOf("What the chart shows", usable.map((k) => [k, MEASURES[k].text]), measure, pick)), figure];
  });
}

function driftChart(d, key) {
  const of = (side) => d.stages.map((s) => MEASURES[key].of(s[side]) ?? null);
  const series = [{ label: "free-running", values: of("free"), color: "var(--c1)", thin: d.stages.length > 300, mark: d.stages.length < 60 ? undefined : false }];
  if (modesOf(d).includes("isolated")) series.push({ label: "isolated", values: of("isolated"), color: "var(--c2)", thin: true, mark: series[0].mark });
  const noise = d.stages.map((s) => s.isolated?.noise ?? s.free?.noise ?? null);
  if (key === "error" && noise.some((v) => v > 0)) {
    series.push({ label: "noise", values: noise.map((v) => (v > 0 ? v : null)), color: "var(--muted)", dash: "2 3", mark: false, thin: true });
    series.push({ label: `${fmt(d.threshold, 2)} × noise`, values: noise.map((v) => (v > 0 ? d.threshold * v : null)), color: "var(--c4)", dash: "6 4", mark: false, thin: true });
  }
  const numbers = flagged(d);
  const flags = [...numbers].map(([i, k]) => ({
    i, text: numbers.size > 1 ? String(k) : "", rows: [["culprit", `no. ${k}`]],
    y: MEASURES[key].of(d.stages[i].isolated) ?? MEASURES[key].of(d.stages[i].free) ?? null,
  }));
  return {
    edge: { label: "NaN, Inf or another shape", at: d.stages.flatMap((s, i) => (s.shape || broken(s.isolated) || broken(s.free) ? [i] : [])) },
    n: d.stages.length, xLabel: "stage, by layer", yLabel: MEASURES[key].y, log: true, height: 320, series, flags, flagLabel: "culprit",
    lines: key === "ratio" ? [{ y: d.threshold, label: `threshold ${fmt(d.threshold, 2)}` }] : [],
    xTicks: d.stages.flatMap((s, i) => (isNumber(s.layer) && s.layer !== d.stages[i - 1]?.layer ? [{ i, text: String(s.layer) }] : [])),
    head: (i) => stageName(d.stages[i]),
  };
}

function culprits(d) {
  const rows = [d.first, ...d.culprits].filter((c) => c).map((c, k) => ({
    cells: [`${k + 1}. ${c.stage}`, c.layer, c.position, c.expert, { text: c.tensor, class: "mono" }, c.row, c.super_block, c.mode, fmt(c.error), fmt(c.noise), fmt(c.ratio), c.why],
  }));
  rows.forEach((row) => { row.cells = row.cells.map((cell) => (isNumber(cell) ? String(cell) : cell)); });
  section("culprits", "Culprits", "In order of computation: the first is the one to look at, later ones may follow from it.", () => [
    table("Culprits", [{ head: "Stage" }, { head: "layer" }, { head: "position" }, { head: "expert" }, { head: "tensor", class: "left" }, { head: "row" },
      { head: "super-block" }, { head: "found", class: "left" }, { head: "error" }, { head: "noise" }, { head: "ratio" }, { head: "why", class: "left wrap" }], rows, { cls: "wide" }),
  ]);
}

// ---- every stage --------------------------------------------------------------------------------------------------

/** Whether a measurement met values that are not finite on either side. */
const broken = (m) => Boolean(m) && (!isNumber(m.error) || m.nan_a + m.nan_b > 0);

/** Whether one measurement is over what the rule allows. */
function over(d, m) {
  if (!m) return false;
  if (m.nan_a !== m.nan_b || (!isNumber(m.error) && broken(m))) return true;
  return d.rule === "bits" ? m.n_differ > 0 : isNumber(m.ratio) && m.ratio > d.threshold;
}

const MEASURE_COLUMNS = [{ head: "error", class: "part" }, { head: "noise" }, { head: "ratio" }, { head: "max |Δ|" }, { head: "worst at" }, { head: "differ" }, { head: "NaN A/B" }];

/** The cells of one measurement. What is over the limit is a fault in the mode that is judged, and drift in the other. */
function measureCells(d, m, judged) {
  if (!m) return MEASURE_COLUMNS.map(() => DASH);
  const bad = over(d, m) ? (judged ? "bad" : "drift") : null;
  const mark = (text) => (bad ? { text, class: bad } : text);
  const nan = m.nan_a || m.nan_b ? { text: `${int(m.nan_a)} / ${int(m.nan_b)}`, class: "bad" } : "0";
  return [d.rule === "bits" ? fmt(m.error) : mark(fmt(m.error)), fmt(m.noise), mark(fmt(m.ratio)), fmt(m.max_abs),
    isNumber(m.worst_position) ? String(m.worst_position) : DASH, d.rule === "bits" ? mark(int(m.n_differ)) : int(m.n_differ), nan];
}

/** What was measured, first the mode by which stages are judged: isolated where both sides could run, or else free-running. */
const modesOf = (d) => (d.stages.some((s) => s.isolated) ? ["isolated", "free"] : ["free"]);
const MODE_HEADS = { isolated: "Isolated: given the other side's input", free: "Free-running" };

function stageRow(d, s, culprit) {
  const cells = modesOf(d).flatMap((mode, k) => measureCells(d, s[mode], k === 0));
  if (s.shape) cells[0] = { text: `A ${JSON.stringify(s.shape.a)} B ${JSON.stringify(s.shape.b)}`, class: "bad" };
  return { class: culprit ? "culprit" : null, cells: [s.stage, isNumber(s.layer) ? String(s.layer) : DASH, ...cells] };
}

function stages(d) {
  const numbers = flagged(d);
  const differ = d.stages.map((s, i) => Boolean(s.shape) || over(d, s[modesOf(d)[0]]) || numbers.has(i));
  const sets = { differ, either: d.stages.map((s, i) => differ[i] || over(d, s.free)), all: d.stages.map(() => true) };
  const size = (name) => sets[name].filter(Boolean).length;
  const names = [["differ", "only those that differ"], ["either", "those over the limit in either mode"], ["all", "all"]]
    .filter(([name]) => name !== "either" || modesOf(d).length > 1);
  const layers = [...new Set(d.stages.map((s) => s.layer).filter(isNumber))];
  const want = { set: size("differ") ? "differ" : "all", layer: "", text: "" };
  const limit = d.rule === "bits" ? "values that are not bit for bit the same" : `a ratio over ${fmt(d.threshold, 2)}`;
  const passed = modesOf(d).length > 1 ? " Over the limit only when free-running is drift: it may be passed on from earlier stages." : "";
  section("stages", "Every stage", `Bold: ${limit}, a NaN on one side, or another shape. ▶ marks the culprits.${passed}`, () => {
    const frame = el("div", {});
    const count = el("span", { class: "count", role: "status" });
    const fillTable = () => {
      const kept = d.stages.map((s, i) => i).filter((i) => sets[want.set][i]
        && (want.layer === "" || String(d.stages[i].layer ?? "") === want.layer) && d.stages[i].stage.includes(want.text));
      count.textContent = `${int(kept.length)} of ${int(d.stages.length)} stages`;
      const columns = [{ head: "Stage" }, { head: "layer" }, ...modesOf(d).flatMap(() => MEASURE_COLUMNS)];
      const groups = [["", 2], ...modesOf(d).map((mode) => [MODE_HEADS[mode], MEASURE_COLUMNS.length])];
      frame.replaceChildren(table("Stages in order of computation", columns, kept.map((i) => stageRow(d, d.stages[i], numbers.has(i))), { groups, cls: "wide" }));
    };
    const text = el("input", { type: "search", placeholder: "stage name", size: 14, oninput: () => { want.text = text.value.trim(); fillTable(); } });
    fillTable();
    return [el("div", { class: "controls" },
      choice("Show", names.map(([name, words]) => [name, `${words} (${int(size(name))})`]), want.set, (name) => { want.set = name; fillTable(); }),
      layers.length > 1 ? choice("Layer", [["", "all"], ...layers.map((l) => [String(l), String(l)])], "", (l) => { want.layer = l; fillTable(); }) : null,
      el("label", { class: "screen" }, "Stage ", text), count), frame];
  });
}

// ---- experts and the rest -----------------------------------------------------------------------------------------

function moe(m) {
  const of = (key) => m.layers.map((l) => l[key]);
  const all = m.n_equal + m.n_permuted + m.n_flipped;
  const near = m.flips.filter((f) => f.near_tie).length;
  const lead = `Of ${int(all)} choices of experts (a layer at a position), ${int(m.n_equal)} are equal, ${int(m.n_permuted)} the same set in another order, `
    + `${int(m.n_flipped)} another set.${m.flips.length ? ` ${int(near)} of the ${int(m.flips.length)} listed are near-ties: the margin is within the noise.` : ""}`;
  section("moe", "Experts chosen", lead, () => [
    stackChart("expert-choices", "Permuted and flipped choices per layer", {
      xLabel: "layer", yLabel: "positions", names: m.layers.map((l) => String(l.layer)),
      series: [{ label: "flipped (another set)", values: of("n_flipped"), color: "var(--c2)" },
        { label: "permuted (other order)", values: of("n_permuted"), color: "var(--c5)" },
        { label: "equal", values: of("n_equal"), color: "var(--soft)", stroke: "var(--rule)" }],
    }),
    m.flips.length ? flipTable(m) : null,
  ]);
}

function flipTable(m) {
  const badge = (near) => el("span", { class: `badge ${near ? "ok" : "no"}` }, near ? "near-tie" : "not a tie");
  const caption = `Flips${m.flips.length < m.n_flipped ? `, the first ${int(m.flips.length)} of ${int(m.n_flipped)}` : ""}: which experts only one side chose`;
  return table(caption, [{ head: "Layer" }, { head: "position" }, { head: "only A" }, { head: "only B" }, { head: "margin" }, { head: "noise" }, { head: "margin / noise" },
    { head: "judged", class: "left" }, { head: "cost, KLD" }],
  m.flips.map((f) => ({
    cells: [String(f.layer), String(f.position), f.only_a.join(", "), f.only_b.join(", "), fmt(f.margin), fmt(f.noise),
      isNumber(f.margin) && f.noise > 0 ? fmt(f.margin / f.noise, 3) : DASH, isNumber(f.noise) ? badge(f.near_tie) : DASH, fmt(f.cost_kld)],
  })));
}

function metadata(rows) {
  const text = (v) => (v === null || v === undefined ? DASH : clip(typeof v === "string" ? v : JSON.stringify(v), 400));
  section("metadata", "Metadata that differs", "Keys of the two files whose values are not the same; a dash where a file has no such key.", () => [
    table("Metadata", [{ head: "Key" }, { head: "A", class: "left wrap" }, { head: "B", class: "left wrap" }], rows.map((r) => ({ cells: [r.key, text(r.a), text(r.b)] }))),
  ]);
}

diffPage(data);
