// The page of `apr trace --html`: one pass of one model, from its anomalies to every stage's numbers.

const layerHead = (i) => `Layer ${i}`;
const bits = (x) => (isNumber(x) ? `${fmt(x, 3)} bits` : DASH);

function tracePage(d) {
  pageHead("apr trace", d.model.name ?? d.model.path ?? "model", d.command, d.version);
  document.getElementById("main").append(tiles(d));
  anomalies(d);
  runFacts(d);
  residual(d);
  stageTable(d);
  if (d.experts) experts(d);
  if (d.margin) margin(d.margin);
  if (d.lens) lens(d.lens);
  logits(d);
  if (d.position_rms) positions(d);
  if (d.time) time(d);
}

function allStats(d) {
  const inLayers = d.layers.flatMap((l) => l.stages.map((s) => s.stats));
  return [d.embedding, ...inLayers, d.final_norm, d.lm_head].filter((s) => s);
}

function tiles(d) {
  const top = d.logits.top[0];
  const broken = allStats(d).reduce((sum, s) => sum + (s.nan_count ?? 0) + (s.inf_count ?? 0), 0);
  const time = d.time?.total_ms;
  return el("div", { class: "tiles" },
    tile("Layers", int(d.layers.length), d.model.n_expert ? `${int(d.model.n_expert)} experts, ${int(d.model.n_expert_used)} used` : "no experts"),
    tile("Tokens", int(d.tokens.length), `${int(d.run.n_prompt)} of the prompt, ${int(d.run.n_decode)} decoded`),
    tile("Next token", top ? token(top) : DASH, top ? `probability ${percent(top.p)}` : null),
    tile("NaN and Inf", int(broken), broken ? "in the stages traced" : "none in any stage"),
    tile("Time", ms(time), isNumber(time) && time > 0 ? `${fmt((1000 * d.run.n_prompt) / time, 3)} tokens/s of the prompt` : null));
}

function anomalies(d) {
  const found = d.anomalies ?? [];
  const card = el("section", { class: `card banner ${found.length ? "bad" : "good"}`, "aria-label": "Anomalies" },
    el("h2", {}, found.length ? `⚠ ${int(found.length)} ${found.length > 1 ? "anomalies" : "anomaly"}` : "✓ No anomalies"),
    found.length ? el("ul", {}, found.map((text) => el("li", {}, text)))
      : el("p", {}, `Looked for NaN and Inf, jumps in size from layer to layer${d.experts ? ", dead and hot experts" : ""}.`));
  document.getElementById("main").append(card);
}

function runFacts(d) {
  const { model: m, run: r } = d;
  section("run", "Model and run", null, () => [
    facts([
      ["File", m.path], ["Architecture", m.architecture], ["Size", bytes(m.file_bytes)], ["Layers", int(m.num_layers)],
      ["Hidden size", int(m.hidden_dim)], ["Vocabulary", int(m.vocab_size)],
      ["Heads", `${int(m.num_heads)} query, ${int(m.num_kv_heads)} key/value`],
      ["Experts", m.n_expert ? `${int(m.n_expert)}, ${int(m.n_expert_used)} per token` : "none (dense)"],
      ["Device", r.device], ["Instructions", r.isa], ["Precision", r.precision], ["KV cache", r.kv],
      ["Kernels", r.fused ? "fused" : "unfused"], ["Positions", r.positions],
      ...(m.sha256 ? [["SHA-256", el("code", {}, m.sha256)]] : []),
    ]),
    tokenList(d),
  ]);
}

function tokenList(d) {
  const chips = (from, to) => el("div", { class: "tokens" }, d.tokens.slice(from, to).map((t, i) =>
    token(t, { class: from + i >= d.run.n_prompt ? "made" : "", title: `position ${from + i}, id ${t.id}` })));
  const shown = d.tokens.length <= 120 ? d.tokens.length : 60;
  const made = d.run.n_decode ? " Underlined: decoded by the model." : "";
  return el("div", {}, el("h3", { style: "margin-top:14px" }, `Tokens (${int(d.tokens.length)})`),
    el("p", { class: "muted" }, `␣ is a space, ⏎ a line break.${made}`), chips(0, shown),
    shown < d.tokens.length
      ? el("details", {}, el("summary", {}, `Show the other ${int(d.tokens.length - shown)}`), chips(shown, d.tokens.length)) : null);
}

// ---- residual stream and stages -----------------------------------------------------------------------------------

function residual(d) {
  const r = d.residual;
  const n = d.layers.length;
  const shared = { n, xLabel: "layer", head: layerHead };
  section("residual", "Residual stream", "How large the stream is after each layer, who writes into it, and how far a layer turns it.", () => [
    lineChart("residual-rms", "RMS after each layer", {
      ...shared, yLabel: spansDecades(r.rms) ? "RMS (log)" : "RMS", log: "auto", zero: true, height: 230, series: [{ label: "RMS of the residual", values: r.rms }],
    }),
    el("div", { class: "cols" },
      lineChart("residual-shares", "What attention and FFN add", {
        ...shared, yLabel: "share of RMS", log: "auto", zero: true, height: 180,
        series: [{ label: "attention", values: r.attn_share }, { label: "FFN", values: r.ffn_share, color: "var(--c2)", dash: "5 3" }],
      }),
      lineChart("residual-cosine", "Drift: cosine between before and after a layer", {
        ...shared, yLabel: "mean cosine", height: 180,
        series: [{ label: "cosine", values: r.cosine, color: "var(--c3)" }],
      })),
    el("details", {}, el("summary", {}, "Numbers"), table("Residual stream, one row per layer", [
      { head: "Layer" }, { head: "RMS" }, { head: "attention's share" }, { head: "FFN's share" }, { head: "cosine" }],
    r.rms.map((v, i) => ({ cells: [String(i), fmt(v), fmt(r.attn_share[i], 3), fmt(r.ffn_share[i], 3), fmt(r.cosine[i])] })))),
  ]);
}

const STAT_COLUMNS = [{ head: "mean" }, { head: "std" }, { head: "min" }, { head: "max" }, { head: "L2" },
  { head: "NaN" }, { head: "Inf" }, { head: "zeros" }, { head: "values" }];

function statCells(s) {
  if (!s) return STAT_COLUMNS.map(() => DASH);
  const bad = (n) => (n > 0 ? { text: int(n), class: "bad" } : int(n));
  const zeros = s.zero_count && s.count ? `${int(s.zero_count)} (${percent(s.zero_count / s.count)})` : int(s.zero_count);
  return [fmt(s.mean), fmt(s.std_dev), fmt(s.min), fmt(s.max), fmt(s.l2), bad(s.nan_count), bad(s.inf_count), zeros, int(s.count)];
}

function stageTable(d) {
  const names = [...new Set(d.layers.flatMap((l) => l.stages.map((s) => s.stage)))];
  const whole = (name, stats) => ({ class: "whole", cells: [name, ...statCells(stats)] });
  const byLayer = (i) => {
    const inside = d.layers[i].stages.map((s) => ({ cells: [s.stage, ...statCells(s.stats)] }));
    const rows = [whole("embedding", d.embedding), ...inside, whole("final_norm", d.final_norm), whole("lm_head", d.lm_head)];
    return table(`Layer ${d.layers[i].layer_idx}: every stage, in order of computation`, [{ head: "Stage" }, ...STAT_COLUMNS], rows);
  };
  const byStage = (name) => table(`${name} in every layer`, [{ head: "Layer" }, ...STAT_COLUMNS], d.layers.map((l) =>
    ({ cells: [String(l.layer_idx), ...statCells(l.stages.find((s) => s.stage === name)?.stats)] })));
  section("stages", "Stages", "Statistics of what each stage writes, over the traced positions.", () => {
    const frame = el("div", {}, byLayer(0));
    const layers = choice("Layer", d.layers.map((l, i) => [String(i), String(l.layer_idx)]), "0", (i) => frame.replaceChildren(byLayer(Number(i))));
    const stages = choice("Stage", names.map((s) => [s, s]), names[0], (s) => frame.replaceChildren(byStage(s)));
    stages.hidden = true;
    const way = oneOf("Rows of the table", [["layer", "One layer"], ["stage", "One stage"]], "layer", (picked) => {
      const one = picked === "layer";
      [layers.hidden, stages.hidden] = [!one, one];
      const list = (one ? layers : stages).querySelector("select");
      frame.replaceChildren(one ? byLayer(Number(list.value)) : byStage(list.value));
    });
    return [el("div", { class: "controls" }, way, layers, stages), frame];
  });
}

// ---- experts ------------------------------------------------------------------------------------------------------

function experts(d) {
  const x = d.experts;
  const max = Math.max(...x.load.flat(), 1);
  const routed = x.load[0].reduce((a, b) => a + b, 0);
  const even = routed / x.n_expert;
  // Few experts take most tokens: the square root keeps the many small loads apart.
  const at = (v) => Math.sqrt(v / max);
  const dead = x.dead.reduce((a, b) => a + b, 0);
  const lead = `How many tokens each expert served. Even load would be ${fmt(even, 3)} per expert and ${fmt(Math.log2(x.n_expert), 3)} bits; `
    + `${dead ? `${int(dead)} of ${int(x.load.length * x.n_expert)} were never used` : "every expert was used"}.`;
  section("experts", "Expert load", lead, () => [
    heatmap("expert-load", "Tokens per expert", {
      values: x.load, rowLabel: "layer", colLabel: "expert", colText: String, empty: "never used",
      scale: (v) => (v > 0 ? at(v) : null),
      ticks: [...new Set([1, Math.ceil(max / 4), max])].map((v) => ({ t: at(v), text: int(v) })),
      beside: [
        { title: "Entropy, bits", short: "entropy", values: x.entropy, text: (i) => fmt(x.entropy[i], 3), color: "var(--c1)", least: Math.log2(x.n_expert) },
        { title: "Max / mean", short: "max/mean", values: x.imbalance, text: (i) => fmt(x.imbalance[i], 3), color: "var(--c2)" },
      ],
      tip: (layer, expert) => {
        const n = x.load[layer][expert];
        return {
          head: `Layer ${layer}, expert ${expert}`,
          rows: [["tokens", int(n)], ["of even load", isNumber(n) && even > 0 ? `× ${fmt(n / even, 3)}` : DASH], ["layer's entropy", bits(x.entropy[layer])],
            ["layer's max / mean", fmt(x.imbalance[layer], 3)], ["never used in layer", int(x.dead[layer])]],
        };
      },
    }),
    el("details", {}, el("summary", {}, "Numbers"), table("Expert load, one row per layer", [
      { head: "Layer" }, { head: "entropy, bits" }, { head: "max / mean" }, { head: "never used" }, { head: "busiest expert" }, { head: "its tokens" }],
    x.load.map((row, i) => {
      const most = row.reduce((a, v) => Math.max(a, v), 0);
      return { cells: [String(i), fmt(x.entropy[i]), fmt(x.imbalance[i]), int(x.dead[i]), String(row.indexOf(most)), int(most)] };
    }))),
  ]);
}

function margin(m) {
  const of = (key) => m.map((l) => l?.[key] ?? null);
  const values = ["min", "p10", "median", "p90"].flatMap(of);
  section("margin", "Router margin", "Probability of the last expert chosen minus that of the first one left out: "
    + "where it is near zero, rounding alone can change who is chosen.", () => [
    lineChart("router-margin", "Router margin per layer", {
      n: m.length, xLabel: "layer", yLabel: spansDecades(values) ? "probability (log)" : "probability", log: "auto", zero: true, height: 240,
      head: layerHead, band: { label: "10th to 90th percentile", lo: of("p10"), hi: of("p90") },
      series: [{ label: "median", values: of("median") }, { label: "least", values: of("min"), color: "var(--c2)", dash: "5 3" }],
    }),
  ]);
}

// ---- predictions --------------------------------------------------------------------------------------------------

function lens(rows) {
  const last = rows[rows.length - 1]?.top[0];
  const leads = (row) => last && row.top[0]?.id === last.id;
  const settled = rows.length - [...rows].reverse().findIndex((row) => !leads(row));
  const since = rows.every(leads) ? rows[0] : rows[settled];
  const cell = (t, k, row) => {
    if (!t) return DASH;
    const inside = el("span", {}, token(t, { title: `id ${t.id}` }), el("span", { class: "num" }, percent(t.p)));
    return { text: inside, class: `shade ${last && t.id === last.id ? "same" : ""}`, p: t.p };
  };
  section("lens", "Logit lens", "What the model would say if it stopped after a layer: final norm and LM head on each layer's residual, at the last position.", () => {
    const width = Math.max(...rows.map((r) => r.top.length), 1);
    const columns = [{ head: "Layer" }, ...Array.from({ length: width }, (_, k) => ({ head: `${k + 1}.`, class: "left" })), { head: "entropy, bits" }];
    const made = rows.map((row) => ({ cells: [String(row.layer), ...Array.from({ length: width }, (_, k) => cell(row.top[k], k, row)), fmt(row.entropy, 3)] }));
    const shown = table("Most probable tokens by layer; the final choice is bold", columns, made, { cls: "lens", whole: true });
    // The shade is a style of the cell: set through the object model, as no text of the data may reach a style sheet.
    shown.querySelectorAll("tbody tr").forEach((tr, r) => rows[r].top.forEach((t, k) => tr.cells[k + 1].style.setProperty("--p", isNumber(t.p) ? Math.min(1, t.p) : 0)));
    const sentence = since && last ? el("p", {}, "The final choice ", token(last), ` leads from layer ${since.layer} on.`) : null;
    return [sentence, shown];
  });
}

function logits(d) {
  const { top, position, entropy, l2_norm } = d.logits;
  if (top.length === 0) {
    section("logits", "Logits", `Position ${int(position)}: no logit is finite.`, () => []);
    return;
  }
  section("logits", "Logits", `Position ${int(position)}: entropy ${bits(entropy)}, L2 norm ${fmt(l2_norm)}.`, () => [
    barChart("top-logits", `The ${top.length} highest logits`, {
      labels: top.map((t) => visible(t.text) || `#${t.id}`),
      panels: [
        { title: "logit", values: top.map((t) => t.logit), text: (i) => fmt(top[i].logit) },
        { title: "probability", values: top.map((t) => t.p), text: (i) => percent(top[i].p), color: "var(--c3)" },
      ],
    }),
    el("details", {}, el("summary", {}, "Numbers"), table("Highest logits", [{ head: "Token" }, { head: "id" }, { head: "logit" }, { head: "probability" }],
      top.map((t) => ({ cells: [token(t), String(t.id), fmt(t.logit, 6), fmt(t.p)] })))),
  ]);
}

function positions(d) {
  const { positions: at, rms } = d.position_rms;
  const seen = finite(rms.flat()).filter((v) => v > 0);
  const [lo, hi] = seen.length ? [Math.min(...seen), Math.max(...seen)] : [1, 1];
  const log = spansDecades(seen);
  const scale = (v) => (lo === hi ? 0.5 : log ? Math.log(v / lo) / Math.log(hi / lo) : (v - lo) / (hi - lo));
  const middle = log ? Math.sqrt(lo * hi) : (lo + hi) / 2;
  const text = (v) => tickText(Number(v.toPrecision(2)));
  const few = at.length < d.tokens.length ? ` ${int(at.length)} of ${int(d.tokens.length)} positions, evenly sampled.` : "";
  section("positions", "Positions", `RMS of the residual after each layer at each position${log ? ", colours in decades" : ""}.${few}`, () => [
    heatmap("position-rms", "RMS by layer and position", {
      values: rms, rowLabel: "layer", colLabel: "position", colText: (k) => String(at[k]), empty: rms.flat().some((v) => !isNumber(v)) ? "not finite" : null,
      scale: (v) => (isNumber(v) ? Math.max(0, scale(Math.max(v, lo))) : null),
      ticks: (lo === hi ? [lo] : [lo, middle, hi]).map((v) => ({ t: scale(v), text: text(v) })),
      tip: (layer, k) => ({
        head: `Layer ${layer}, position ${at[k]}`,
        rows: [["RMS", fmt(rms[layer][k])], ["token", d.tokens[at[k]] ? clip(visible(d.tokens[at[k]].text), 24) : DASH]],
      }),
    }),
  ]);
}

// ---- time ---------------------------------------------------------------------------------------------------------

function time(d) {
  const t = d.time;
  const stages = [...t.stages].sort((a, b) => (b.ms ?? 0) - (a.ms ?? 0));
  const sum = stages.reduce((s, x) => s + (x.ms ?? 0), 0);
  const share = (s) => (sum > 0 && isNumber(s.ms) ? s.ms / sum : null);
  const machine = isNumber(t.machine_gb_per_s) ? t.machine_gb_per_s : null;
  const ofMachine = (s) => (machine && isNumber(s.gb_per_s) ? percent(s.gb_per_s / machine) : null);
  const lead = `${ms(t.total_ms)} for the prompt, looking on not counted.${machine ? ` The dashed line is what this machine can read: ${fmt(machine, 3)} GB/s.` : ""}`;
  section("time", "Time", lead, () => [
    barChart("stage-time", "Time and bandwidth per stage, all layers", {
      labels: stages.map((s) => s.stage),
      panels: [
        { title: "time", values: stages.map((s) => s.ms), text: (i) => `${ms(stages[i].ms)} · ${percent(share(stages[i]))}` },
        {
          title: "bandwidth, GB/s", values: stages.map((s) => s.gb_per_s), color: "var(--c3)", line: machine ? { value: machine, label: `machine ${fmt(machine, 3)}` } : null,
          text: (i) => [fmt(stages[i].gb_per_s, 3), ofMachine(stages[i])].filter(Boolean).join(" · "),
        },
      ],
    }),
    t.layers_ms?.length > 1 ? lineChart("layer-time", "Time per layer", {
      n: t.layers_ms.length, xLabel: "layer", yLabel: "ms", zero: true, height: 130, head: layerHead, series: [{ label: "ms", values: t.layers_ms }],
    }) : null,
    el("details", {}, el("summary", {}, "Numbers"), table("Time per stage, in order of computation", [
      { head: "Stage" }, { head: "ms" }, { head: "share" }, { head: "bytes" }, { head: "GB/s" }, { head: "of the machine" }],
    t.stages.map((s) => ({ cells: [s.stage, fmt(s.ms), percent(share(s)), bytes(s.bytes), fmt(s.gb_per_s, 3), ofMachine(s)] })))),
  ]);
}

tracePage(data);
