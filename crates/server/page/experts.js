// The map of experts: a row per layer, a column per expert, brighter where more of an answer's tokens went.

/** From cold to hot; the ground is dark in either theme, so that little light is seen. */
const HEAT = [[20, 24, 33], [56, 26, 92], [122, 32, 110], [190, 52, 86], [236, 98, 46], [252, 168, 48], [255, 238, 170]];
const COLORS = Array.from({ length: 256 }, (_, i) => {
  const at = (i / 255) * (HEAT.length - 1);
  const k = Math.min(Math.floor(at), HEAT.length - 2);
  const mix = HEAT[k].map((from, c) => Math.round(from + (HEAT[k + 1][c] - from) * (at - k)));
  return `rgb(${mix.join(" ")})`;
});
/** What is left of a token's light when the next one comes. */
const FADE = 0.84;
const GUTTER = { left: 26, top: 6, right: 6, bottom: 18 };
const CELL_MAX = 22;

export class ExpertMap {
  #canvas;
  #read;
  #picked;
  #track = null;
  #n = 0;
  #mode = "live";
  #token = null;
  #size = [0, 0];
  #total = new Float32Array(0);
  #live = new Float32Array(0);
  #known = null;
  #cursor = null;
  #isDue = false;

  /** `read` shows a line on the cell at the cursor; `picked` is told of a layer and an expert, or null. */
  constructor(canvas, read, picked) {
    this.#canvas = canvas;
    this.#read = read;
    this.#picked = picked;
    canvas.addEventListener("pointermove", (e) => this.#point(this.#cell(e)));
    canvas.addEventListener("pointerdown", (e) => this.#point(this.#cell(e)));
    canvas.addEventListener("pointerleave", () => this.#point(null));
    canvas.addEventListener("blur", () => this.#point(null));
    canvas.addEventListener("keydown", (e) => this.#step(e));
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  /** How many experts the model says it has. */
  set known(n) {
    this.#known = n;
  }

  get hasExperts() {
    return (this.#track?.nLayer ?? 0) > 0;
  }

  set mode(mode) {
    this.#mode = mode;
    this.draw();
  }

  /** Shows an answer, and one of its tokens where that is asked for. */
  show(track, token) {
    if (track !== this.#track || (track?.tokens.length ?? 0) < this.#n) {
      this.#track = track;
      this.#n = 0;
      this.#total.fill(0);
      this.#live.fill(0);
    }
    this.#token = token;
    this.#take();
    this.draw();
  }

  /** Adds the tokens that have come since. */
  #take() {
    if (!this.hasExperts) return;
    const size = [this.#track.nLayer, Math.max(this.#known ?? 0, this.#track.nExpert)];
    if (size[0] !== this.#size[0] || size[1] !== this.#size[1]) {
      this.#size = size;
      this.#total = new Float32Array(size[0] * size[1]);
      this.#live = new Float32Array(size[0] * size[1]);
      this.#n = 0;
    }
    const { tokens } = this.#track;
    for (; this.#n < tokens.length; this.#n += 1) {
      const { experts } = tokens[this.#n];
      if (!experts) continue;
      for (let i = 0; i < this.#live.length; i += 1) this.#live[i] *= FADE;
      experts.forEach((ids, layer) => ids.forEach((id) => {
        this.#total[layer * size[1] + id] += 1;
        this.#live[layer * size[1] + id] += 1;
      }));
    }
  }

  /** What the whole answer did, in a sentence. */
  summary() {
    const [nLayer, nExpert] = this.#size;
    const withExperts = this.#track?.tokens.filter((t) => t.experts).length ?? 0;
    if (!withExperts) return "";
    const used = this.#total.reduce((n, count) => n + (count > 0 ? 1 : 0), 0);
    let best = 0;
    this.#total.forEach((count, i) => { if (count > this.#total[best]) best = i; });
    const share = Math.round((100 * this.#total[best]) / withExperts);
    return `${nLayer} layers × ${nExpert} experts; ${Math.round((100 * used) / this.#total.length)} % have fired, most often `
      + `expert ${best % nExpert} of layer ${Math.floor(best / nExpert)} (${share} % of tokens).`;
  }

  /** Draws with the next frame. */
  draw() {
    if (this.#isDue) return;
    this.#isDue = true;
    requestAnimationFrame(() => {
      this.#isDue = false;
      this.#paint();
    });
  }

  #heat() {
    const { experts } = this.#token ?? {};
    if (this.#mode === "live" || (this.#mode === "token" && !experts)) return Float32Array.from(this.#live, (v) => 1 - Math.exp(-0.5 * v));
    const max = this.#total.reduce((a, b) => Math.max(a, b), 1);
    const total = Float32Array.from(this.#total, (v) => Math.sqrt(v / max));
    if (this.#mode === "total") return total;
    const heat = total.map((v) => 0.22 * v);
    experts.forEach((ids, layer) => ids.forEach((id, rank) => {
      heat[layer * this.#size[1] + id] = 1 - (0.45 * rank) / Math.max(1, ids.length);
    }));
    return heat;
  }

  #box() {
    const width = this.#canvas.parentElement.clientWidth;
    const [nLayer, nExpert] = this.#size;
    const w = Math.min(CELL_MAX, (width - GUTTER.left - GUTTER.right) / nExpert);
    const h = Math.max(4, Math.min(CELL_MAX, 250 / nLayer, 5 * w));
    return { width, height: Math.ceil(h * nLayer) + GUTTER.top + GUTTER.bottom, w, h };
  }

  #paint() {
    const [nLayer, nExpert] = this.#size;
    if (!this.hasExperts || !this.#canvas.parentElement.clientWidth) return;
    const { width, height, w, h } = this.#box();
    const ratio = devicePixelRatio || 1;
    const canvas = this.#canvas;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.height = `${height}px`;
    }
    const g = canvas.getContext("2d");
    g.setTransform(1, 0, 0, 1, 0, 0);
    g.clearRect(0, 0, canvas.width, canvas.height);
    const heat = this.#heat();
    const gap = w >= 5 ? Math.round(ratio) : 0;
    const px = (x) => Math.round((GUTTER.left + x) * ratio);
    const py = (y) => Math.round((GUTTER.top + y) * ratio);
    for (let layer = 0; layer < nLayer; layer += 1) {
      const [y, y2] = [py(layer * h), py((layer + 1) * h) - (h >= 5 ? Math.round(ratio) : 0)];
      for (let e = 0; e < nExpert; e += 1) {
        g.fillStyle = COLORS[Math.round(255 * Math.min(1, heat[layer * nExpert + e]))];
        g.fillRect(px(e * w), y, px((e + 1) * w) - gap - px(e * w), y2 - y);
      }
    }
    g.scale(ratio, ratio);
    this.#axes(g, w, h);
    if (this.#cursor) {
      g.strokeStyle = "#fff";
      g.lineWidth = 1.5;
      g.strokeRect(GUTTER.left + this.#cursor.expert * w - 1, GUTTER.top + this.#cursor.layer * h - 1, w + 1, h + 1);
    }
    canvas.setAttribute("aria-label", `Experts by layer. ${this.summary()} Arrow keys read cells.`);
    canvas.dataset.painted = String(this.#n);
  }

  #axes(g, w, h) {
    const [nLayer, nExpert] = this.#size;
    g.font = "10px system-ui, sans-serif";
    g.fillStyle = "#8d97a8";
    const ticks = (n, size, room) => {
      const step = [1, 2, 4, 8, 16, 32, 64, 128].find((s) => s * size >= room) ?? 256;
      return Array.from({ length: Math.ceil(n / step) }, (_, i) => i * step);
    };
    g.textAlign = "right";
    g.textBaseline = "middle";
    for (const i of ticks(nLayer, h, 24)) g.fillText(String(i), GUTTER.left - 5, GUTTER.top + (i + 0.5) * h);
    g.textAlign = "left";
    g.textBaseline = "top";
    const bottom = GUTTER.top + nLayer * h + 5;
    for (const i of ticks(nExpert, w, 40)) g.fillText(String(i), GUTTER.left + i * w, bottom);
  }

  #cell(event) {
    if (!this.hasExperts) return null;
    const { w, h } = this.#box();
    const at = this.#canvas.getBoundingClientRect();
    const expert = Math.floor((event.clientX - at.left - GUTTER.left) / w);
    const layer = Math.floor((event.clientY - at.top - GUTTER.top) / h);
    const [nLayer, nExpert] = this.#size;
    return expert >= 0 && layer >= 0 && expert < nExpert && layer < nLayer ? { layer, expert } : null;
  }

  #step(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || !this.hasExperts) return;
    event.preventDefault();
    event.stopPropagation();
    const { layer, expert } = this.#cursor ?? { layer: 0, expert: 0 };
    const clamp = (x, n) => Math.max(0, Math.min(n - 1, x));
    this.#point({ layer: clamp(layer + step[0], this.#size[0]), expert: clamp(expert + step[1], this.#size[1]) });
  }

  #point(cell) {
    if (cell?.layer === this.#cursor?.layer && cell?.expert === this.#cursor?.expert) return;
    this.#cursor = cell;
    if (cell) {
      const n = this.#total[cell.layer * this.#size[1] + cell.expert];
      const all = this.#track.tokens.filter((t) => t.experts).length;
      this.#read(`Layer ${cell.layer}, expert ${cell.expert}: ${n} of ${all} tokens. They are underlined in the text.`);
    } else this.#read(this.summary());
    this.#picked(cell);
    this.draw();
  }
}
