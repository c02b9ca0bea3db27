// The panel that looks inside: one token and what could have stood there instead, and the experts of an answer.

import { $, el, int, percent, visible } from "./dom.js";
import { ExpertMap } from "./experts.js";
import { isControl, surprise } from "./track.js";

const MODES = ["live", "total", "token"];

export class Inside {
  #map;
  /** The answer that is looked into: `{message, track, isRunning, isOver}`. */
  #answer = null;
  #index = null;
  #pinned = false;
  #preview = null;
  #cell = null;
  #actions;
  #isDue = false;
  #nExpert = undefined;
  /** The token whose alternatives are shown, and whether they can be taken. */
  #rows = {};

  /** `actions`: `fork(message, index, other)` answers on from another token; `marked()` is told that underlines change. */
  constructor(actions) {
    this.#actions = actions;
    this.#map = new ExpertMap($("map"), (text) => { $("map-read").textContent = text; }, (cell) => {
      this.#cell = cell;
      actions.marked();
    });
    $("token-prev").addEventListener("click", () => this.step(-1));
    $("token-next").addEventListener("click", () => this.step(1));
    $("modes").addEventListener("click", (e) => e.target.dataset.mode && this.#setMode(e.target.dataset.mode));
    $("others").addEventListener("click", (e) => this.#take(e.target.closest("button")));
  }

  /** How many experts a layer of the model has: null for none, undefined where that is not known. */
  set nExpert(n) {
    this.#nExpert = n;
    this.#map.known = n ?? null;
    this.#due();
  }

  /** Looks into an answer, at its latest token. */
  look(answer) {
    const isSame = answer?.track && answer.track === this.#answer?.track;
    this.#answer = answer;
    if (!isSame) this.#let();
    this.#due();
  }

  /** More tokens of an answer have come. */
  more(answer) {
    if (this.#answer?.track === answer.track) {
      this.#answer = answer;
      this.#due();
    }
  }

  isAt(message, index) {
    return this.#answer?.message === message && this.#pinned && this.#index === index;
  }

  /** Whether a token went through the expert at the map's cursor. */
  isMarked(message, token) {
    const ids = this.#cell && this.#answer?.message === message && token.experts?.[this.#cell.layer];
    return Boolean(ids) && ids.includes(this.#cell.expert);
  }

  /** Shows a token while the pointer is over it; null shows what was there before. */
  preview(answer, index) {
    this.#preview = index === null ? null : { answer, index };
    this.#due();
  }

  /** Stays at a token. */
  pin(answer, index) {
    this.#answer = answer;
    this.#index = index;
    this.#pinned = true;
    this.#preview = null;
    this.#setMode("token");
    this.#actions.marked();
  }

  /** Lets go of the token; whether there was one. */
  unpin() {
    if (!this.#pinned) return false;
    this.#let();
    this.#setMode("live");
    this.#actions.marked();
    return true;
  }

  #let() {
    this.#pinned = false;
    this.#index = null;
    this.#preview = null;
  }

  step(by) {
    const n = this.#answer?.track?.tokens.length ?? 0;
    if (!n) return null;
    const at = this.#pinned ? this.#index : by < 0 ? n : -1;
    this.pin(this.#answer, Math.max(0, Math.min(n - 1, at + by)));
    return this.#index;
  }

  #setMode(mode) {
    if (mode === "token" && !this.#pinned && this.#answer?.track) return void this.step(-1);
    for (const name of MODES) $("modes").querySelector(`[data-mode=${name}]`).setAttribute("aria-pressed", String(name === mode));
    this.#map.mode = mode;
    this.#due();
    return undefined;
  }

  #take(button) {
    if (!button || this.#shown() === null) return;
    const { answer, index } = this.#shown();
    const other = answer.track.tokens[index].others[Number(button.dataset.k)];
    if (other) this.#actions.fork(answer.message, index, other);
  }

  /** The token that is shown: under the pointer, pinned, or the latest. */
  #shown() {
    if (this.#preview) return this.#preview;
    const n = this.#answer?.track?.tokens.length ?? 0;
    if (!n) return null;
    return { answer: this.#answer, index: this.#pinned && this.#index < n ? this.#index : n - 1 };
  }

  #due() {
    if (this.#isDue) return;
    this.#isDue = true;
    requestAnimationFrame(() => {
      this.#isDue = false;
      if (!$("inside").hidden) this.#draw();
    });
  }

  #draw() {
    const shown = this.#shown();
    this.#drawToken(shown);
    this.#drawAnswer();
    const isToken = this.#pinned || this.#preview;
    const track = (shown?.answer ?? this.#answer)?.track ?? null;
    this.#map.show(track, isToken && shown ? track.tokens[shown.index] : null);
    const hasMap = this.#map.hasExperts && (track?.tokens.length ?? 0) > 0;
    $("map-box").hidden = !hasMap;
    $("modes").hidden = !hasMap;
    if (hasMap && !this.#cell) $("map-read").textContent = this.#map.summary();
    $("map-none").textContent = hasMap ? "" : this.#whyNoMap(track);
  }

  #whyNoMap(track) {
    if (this.#nExpert === null) return "This model has no experts: every token goes through all of its weights.";
    if (!track?.tokens.length) return "The map is drawn while the model answers.";
    return "This model’s answers come without experts: it has none, or the server does not tell of them.";
  }

  #drawToken(shown) {
    $("token-prev").disabled = !shown || shown.index === 0;
    $("token-next").disabled = !shown || shown.index >= shown.answer.track.tokens.length - 1;
    if (!shown) {
      this.#rows = {};
      $("token-place").textContent = "";
      $("token-head").replaceChildren();
      $("others").replaceChildren();
      $("token-note").textContent = this.#answer?.isOver && !this.#answer.message.error
        ? "This answer was made without looking. Ask again (r) to see its tokens."
        : "Each token of an answer shows here what else the model thought of. Point at one, or click it.";
      return;
    }
    const { answer, index } = shown;
    const { tokens } = answer.track;
    const token = tokens[index];
    $("token-place").textContent = `${int(index + 1)} of ${int(tokens.length)}`;
    // What is being clicked is not made anew.
    if (this.#rows.token === token && this.#rows.canFork === answer.canFork) return;
    this.#rows = { token, canFork: answer.canFork };
    const rank = token.others.findIndex((o) => o.text === token.text);
    $("token-head").replaceChildren(
      el("span", { class: `tok big s${surprise(token.p)}` }, visible(token.text)),
      el("span", { class: "num" }, el("b", {}, percent(token.p)), place(rank, token.chosen)),
    );
    const top = token.others[0]?.p ?? token.p;
    const rows = token.others.map((other, k) => this.#row(answer, token, other, k, top));
    if (rank < 0) rows.push(this.#row(answer, token, { text: token.text, p: token.p }, null, top));
    $("others").replaceChildren(...rows);
    const rest = 1 - token.others.reduce((sum, o) => sum + o.p, rank < 0 ? token.p : 0);
    $("token-note").textContent = `${percent(Math.max(0, rest))} for all the others. A click on one goes on from there.`;
  }

  #row(answer, token, other, k, top) {
    const isChosen = other.text === token.text;
    const canFork = k !== null && !isChosen && !isControl(other.text) && answer.canFork;
    const bar = el("span", { class: "bar" });
    bar.style.setProperty("--p", String(Math.min(1, other.p / top)));
    const parts = [el("span", { class: "tok" }, visible(other.text)), el("span", { class: "track" }, bar),
      el("span", { class: "num" }, percent(other.p))];
    const attrs = { class: isChosen ? "chosen" : null };
    return canFork
      ? el("li", attrs, el("button", { type: "button", "data-k": k, title: "Go on from this token instead" }, parts))
      : el("li", attrs, el("div", { "aria-current": isChosen ? "true" : null }, parts));
  }

  #drawAnswer() {
    const tokens = this.#answer?.track?.tokens ?? [];
    if (!tokens.length) {
      $("answer-note").textContent = "";
      return;
    }
    const mean = tokens.reduce((sum, t) => sum + Math.log(Math.max(t.p, 1e-9)), 0) / tokens.length;
    const first = tokens.filter((t) => t.others[0]?.text === t.text).length;
    $("answer-note").textContent = `${int(tokens.length)} tokens, ${Math.round((100 * first) / tokens.length)} % of them the model’s `
      + `first choice; perplexity ${Math.exp(-mean).toFixed(2)}.`;
  }
}

function place(rank, wasChosen) {
  if (wasChosen) return " chosen by you";
  if (rank < 0) return " not among the best";
  return rank === 0 ? " first choice" : ` choice ${rank + 1}`;
}
