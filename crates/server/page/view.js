// One message as it is shown. While an answer grows only its last block is made anew, and morphed into the one that is there.

import { copy, el, icon, iconButton, int, morph, seconds, visible } from "./dom.js";
import { blocks } from "./markdown.js";
import { surprise } from "./track.js";

export class View {
  #message;
  #context;
  /** Blocks as they were drawn, by kind of text. */
  #drawn = new Map();
  #reasoning = null;
  #reasoningBody = null;
  #body = el("div", { class: "body" });
  #calls = el("div", { class: "calls" });
  #end = el("div", { class: "end" });

  /**
   * `context`: `track(message)`, `inside` (the panel), `look` (whether tokens are shown), `isRunning(message)`,
   * `isLast(message)`, and `actions` by name.
   */
  constructor(message, context) {
    this.#message = message;
    this.#context = context;
    const who = { user: "You", assistant: "Answer", tool: "Tool result" }[message.role] ?? message.role;
    this.element = el("article", { class: `message ${message.role}`, "data-id": message.id },
      el("h2", { class: "offstage" }, who), this.#body, this.#calls, this.#end);
  }

  /** Draws what has changed. `whole` draws everything again, as when other things are to be shown of it. */
  update(whole = false) {
    const message = this.#message;
    if (whole) this.#drawn.clear();
    if (message.role !== "assistant") {
      this.#body.replaceChildren(message.content);
      this.#finish();
      return;
    }
    const { look, track, isRunning } = this.#context;
    const isOpen = isRunning(message);
    const tokens = look() ? track(message) : null;
    this.#reason(tokens, isOpen);
    const asTokens = tokens?.tokens.length && look().asTokens;
    this.#body.classList.toggle("raw", Boolean(asTokens));
    if (asTokens) this.#raw(tokens);
    else this.#text(this.#body, "content", message.content, tokens, isOpen);
    this.element.classList.toggle("waiting", isOpen && !message.content && !message.reasoning_content && !message.tool_calls);
    this.#showCalls(isOpen);
    this.#finish();
  }

  #reason(tokens, isOpen) {
    const text = this.#message.reasoning_content;
    if (!text) {
      this.#reasoning?.remove();
      this.#reasoning = null;
      return;
    }
    if (!this.#reasoning) {
      this.#reasoningBody = el("div", { class: "thought" });
      this.#reasoning = el("details", { class: "reasoning" }, el("summary", {}, ""), this.#reasoningBody);
      this.#body.before(this.#reasoning);
    }
    const isThinking = isOpen && !this.#message.content;
    this.#reasoning.firstChild.textContent = isThinking ? "Thinking…" : "Thoughts";
    this.#text(this.#reasoningBody, "reasoning_content", text, tokens, isThinking);
  }

  /** Markdown; blocks that are as they were stay as they are. */
  #text(parent, kind, source, tokens, isOpen) {
    const drawn = this.#drawn.get(kind) ?? [];
    const put = this.#putter(kind, source, tokens);
    const now = blocks(source, isOpen).map((block) => ({ ...block, text: source.slice(block.start, block.end) }));
    now.forEach((block, k) => {
      const was = drawn[k];
      const isLast = k === now.length - 1;
      const isSame = was && was.start === block.start && was.text === block.text && was.isOpen === (isOpen && isLast);
      block.isOpen = isOpen && isLast;
      if (isSame) return;
      const node = block.build(put);
      const old = parent.childNodes[k];
      if (!old) parent.append(node);
      else if (old.nodeName === node.nodeName && old.className === node.className) morph(old, node);
      else old.replaceWith(node);
    });
    while (parent.childNodes.length > now.length) parent.lastChild.remove();
    this.#drawn.set(kind, now);
  }

  #putter(kind, source, tokens) {
    if (!tokens) return (parent, from, to) => parent.append(source.slice(from, to));
    return (parent, from, to) => tokens.parts(kind, from, to, (a, b, i) => {
      parent.append(i < 0 ? source.slice(a, b) : this.#token(tokens, i, source.slice(a, b)));
    });
  }

  #token(tokens, i, text) {
    return el("span", { class: this.tokenClass(tokens, i), "data-i": i, tabindex: i === 0 ? "0" : "-1" }, text);
  }

  /** How a token looks: by its surprise, and whether it is pinned or underlined. */
  tokenClass(tokens, i) {
    const { inside, look } = this.#context;
    const token = tokens.tokens[i];
    return ["tok", look().shade ? `s${surprise(token.p)}` : "s0", inside.isAt(this.#message, i) ? "pinned" : "",
      inside.isMarked(this.#message, token) ? "marked" : "", token.chosen ? "taken" : ""].filter(Boolean).join(" ");
  }

  #raw(tokens) {
    this.#drawn.delete("content");
    const spans = tokens.tokens.map((token, i) => this.#token(tokens, i, visible(token.text)));
    const next = el("div", {}, el("p", { class: "rawtokens" }, spans.flatMap((s, i) => (tokens.tokens[i].text.includes("\n") ? [s, el("br")] : [s]))));
    morph(this.#body, next);
  }

  /** Gives tokens their looks again without drawing text. */
  mark() {
    const tokens = this.#context.look() ? this.#context.track(this.#message) : null;
    if (!tokens) return;
    for (const span of this.element.querySelectorAll(".tok[data-i]")) {
      const wanted = tokens.tokens[Number(span.dataset.i)] ? this.tokenClass(tokens, Number(span.dataset.i)) : "tok";
      if (span.className !== wanted) span.className = wanted;
    }
  }

  #showCalls(isOpen) {
    const calls = this.#message.tool_calls ?? [];
    const next = el("div", {}, calls.map((call) => el("div", { class: "call" },
      el("div", { class: "callhead" }, icon("tool"), el("code", {}, call.function.name || "…")),
      el("pre", { tabindex: "0" }, el("code", {}, pretty(call.function.arguments, isOpen))))));
    morph(this.#calls, next);
    if (calls.length && !isOpen && this.#context.isLast(this.#message)) this.#calls.append(this.#resultForm(calls));
  }

  /** Where a person says what the called tools gave. */
  #resultForm(calls) {
    const fields = calls.map((call) => el("textarea", { rows: "2", class: "mono", "aria-label": `Result of ${call.function.name}`, placeholder: `Result of ${call.function.name}` }));
    const send = (event) => {
      event.preventDefault();
      this.#context.actions.results(this.#message, fields.map((f) => f.value));
    };
    return el("form", { class: "results", onsubmit: send }, fields, el("button", {}, calls.length > 1 ? "Send results" : "Send result"));
  }

  #finish() {
    const message = this.#message;
    const { isRunning, isLast, actions } = this.#context;
    if (isRunning(message)) {
      const rate = message.live ? `${int(message.live.n)} tokens · ${message.live.rate.toFixed(1)} tok/s` : "";
      this.#end.replaceChildren(el("span", { class: "stats num" }, rate));
      return;
    }
    const parts = [];
    if (message.error) parts.push(this.#error());
    const buttons = [iconButton("copy", "Copy", (e) => copy(message.content, e.currentTarget))];
    if (message.role !== "tool") buttons.push(iconButton("edit", "Edit", () => this.edit()));
    if (message.role === "assistant" && isLast(message)) {
      buttons.push(iconButton("again", "Answer again (r)", () => actions.again()));
      if (["length", "stopped", "interrupted"].includes(message.finish) && message.content) {
        buttons.push(el("button", { type: "button", class: "soft", onclick: () => actions.more(message) }, icon("more"), "Go on"));
      }
    }
    parts.push(el("div", { class: "actions" }, buttons, el("span", { class: "stats num" }, stats(message))));
    this.#end.replaceChildren(...parts);
  }

  #error() {
    const { error } = this.#message;
    const again = el("button", { type: "button", onclick: () => this.#context.actions.again() }, "Try again");
    return el("div", { class: "error", role: "alert" }, el("span", {}, error.message), this.#context.isLast(this.#message) ? again : null);
  }

  /** Lets the text be changed in place. */
  edit() {
    const message = this.#message;
    const field = el("textarea", { class: "editing", "aria-label": "Edit the message" });
    field.value = message.content;
    const close = () => {
      form.replaceWith(this.#body);
      this.#end.hidden = false;
    };
    const save = (event) => {
      event?.preventDefault();
      close();
      this.#context.actions.edited(message, field.value);
    };
    const keys = (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || message.role !== "user") return;
      save(event);
    };
    const form = el("form", { class: "edit", onsubmit: save, onkeydown: keys }, field, el("div", { class: "row" },
      el("button", { type: "button", onclick: close }, "Cancel"),
      el("button", { class: "main" }, message.role === "user" ? "Send" : "Save")));
    this.#body.replaceWith(form);
    this.#end.hidden = true;
    field.style.height = `${Math.min(field.scrollHeight + 4, innerHeight * 0.6)}px`;
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

/** Arguments of a call, laid out where they are whole. */
function pretty(text, isOpen) {
  if (isOpen) return text;
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

const ENDS = { length: "cut off at the limit", stopped: "stopped", interrupted: "broken off", abort: "stopped by the server" };

function stats({ stats: s, finish, error }) {
  const parts = [];
  if (s?.completion !== undefined) parts.push(`${int(s.completion)} tokens`);
  if (s?.rate) parts.push(`${s.rate.toFixed(1)} tok/s`);
  if (s?.prompt !== undefined) {
    const cached = s.cached ? `, ${int(s.cached)} cached` : "";
    parts.push(`prompt ${int(s.prompt)}${cached}${s.promptMs ? ` in ${seconds(s.promptMs)}` : ""}`);
  }
  if (ENDS[finish] && !error) parts.push(ENDS[finish]);
  return parts.join(" · ");
}
