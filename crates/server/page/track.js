// The tokens of one answer: how likely each was, what else could have stood there, which experts computed it, and where it
// stands in the text that is shown.
//
// The server sends a token's bytes at once, and the text of an answer when it is whole: a character may need several tokens,
// tags of reasoning and of tool calls are left out, what may become a stop string is held back. So both are kept: `raw` is what
// the tokens spell, and each piece of text remembers where in it it was found.

/** Markup that may lie between two pieces of text. */
const GAP_MAX = 400;

export class Track {
  tokens = [];
  raw = "";
  /** Experts in the largest layer, as far as they were seen. */
  nExpert = 0;
  nLayer = 0;
  #decoder = new TextDecoder();
  #cursor = 0;
  /** By kind of text ("content", "reasoning_content"): where its pieces are in `raw`, in order. */
  #pieces = new Map();

  /** Adds a token as chats tell of it, and the experts of its position where they are told. */
  push(told, experts) {
    const text = this.#decoder.decode(new Uint8Array(told.bytes ?? []), { stream: true });
    const token = {
      text: told.token, p: Math.exp(told.logprob), start: this.raw.length,
      others: (told.top_logprobs ?? []).map((o) => ({ text: o.token, p: Math.exp(o.logprob) })),
      experts: this.#read(experts),
    };
    this.raw += text;
    token.end = this.raw.length;
    this.tokens.push(token);
    return token;
  }

  #read(experts) {
    if (!Array.isArray(experts?.layers)) return null;
    const layers = experts.layers.map((ids) => Uint16Array.from(ids));
    this.nLayer = Math.max(this.nLayer, layers.length);
    for (const ids of layers) for (const id of ids) this.nExpert = Math.max(this.nExpert, id + 1);
    return layers;
  }

  /** Finds text that is going to stand at `at` of its kind. */
  text(kind, at, text) {
    const found = this.raw.indexOf(text, this.#cursor);
    if (text === "" || found < 0 || found - this.#cursor > GAP_MAX) return;
    this.#cursor = found + text.length;
    if (!this.#pieces.has(kind)) this.#pieces.set(kind, []);
    this.#pieces.get(kind).push({ at, raw: found, n: text.length });
  }

  /** Calls `each(from, to, token index or -1)` for the parts of a slice of a kind of text, in order. */
  parts(kind, from, to, each) {
    const pieces = this.#pieces.get(kind) ?? [];
    let k = after(pieces.length, (i) => pieces[i].at + pieces[i].n > from);
    while (from < to) {
      const piece = pieces[k];
      if (!piece || piece.at >= to) return each(from, to, -1);
      if (piece.at > from) {
        each(from, piece.at, -1);
        from = piece.at;
      }
      const end = Math.min(to, piece.at + piece.n);
      while (from < end) {
        const raw = piece.raw + from - piece.at;
        const i = after(this.tokens.length, (t) => this.tokens[t].end > raw);
        const stop = Math.min(end, from + this.tokens[i].end - raw);
        each(from, stop, i);
        from = stop;
      }
      k += 1;
    }
    return undefined;
  }

  /** Where in a kind of text a token begins; null where it is no part of it. */
  offset(kind, index) {
    const { start } = this.tokens[index];
    const piece = (this.#pieces.get(kind) ?? []).find((p) => p.raw + p.n > start);
    return piece ? piece.at + Math.max(0, start - piece.raw) : null;
  }

  /** Forgets the tokens from `index` on, and puts another text there that is to stand at `at` of the content. */
  fork(index, other, at) {
    const { start, others } = this.tokens[index];
    this.tokens.length = index;
    this.raw = this.raw.slice(0, start);
    for (const pieces of this.#pieces.values()) {
      while (pieces.length && pieces.at(-1).raw >= start) pieces.pop();
      const last = pieces.at(-1);
      if (last) last.n = Math.min(last.n, start - last.raw);
    }
    this.#decoder = new TextDecoder();
    this.#cursor = start;
    this.raw += other.text;
    this.tokens.push({ text: other.text, p: other.p, start, end: this.raw.length, others, experts: null, chosen: true });
    this.text("content", at, other.text);
  }
}

/** The first of `n` ascending places that passes. */
function after(n, passes) {
  let low = 0;
  let high = n;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (passes(middle)) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** How surprising a probability is, from 0 (expected) to 8: a step is two thirds of a bit. */
export function surprise(p) {
  return Math.max(0, Math.min(8, Math.round(-Math.log2(Math.max(p, 1e-9)) * 1.5)));
}

/** Whether text is a control token, which a continued answer cannot begin with. */
export const isControl = (text) => /^(?:<\|[^|]*\|>|<\/?s>)$/.test(text) || text === "" || text.includes("\ufffd");
