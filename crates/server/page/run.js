// One answer on its way: the request, its chunks, and what becomes of the message.

import { ApiError, chat as ask } from "./api.js";
import { SAMPLING } from "./store.js";
import { Track } from "./track.js";

/** How often a growing answer is kept. */
const SAVE_MS = 2000;

export class Run {
  #controller = new AbortController();

  /** `on`: `change()` with every chunk, `save()`, `key(wasWrong)` gives whether there is a key now. */
  constructor(conversation, message, settings, model, on) {
    Object.assign(this, { conversation, message, settings, model, on });
    this.track = null;
  }

  stop() {
    this.#controller.abort();
  }

  /** Asks, and goes on until the answer has ended in whatever way; the message says in which. */
  async go(track) {
    const { message } = this;
    this.track = this.settings.inside ? track ?? new Track() : null;
    delete message.error;
    delete message.finish;
    delete message.stats;
    try {
      await this.#ask();
      message.finish ??= "stop";
    } catch (e) {
      if (e.name === "AbortError") message.finish = "stopped";
      else this.#failed(e);
    }
    // What was stopped or broke off is not counted by the server any more.
    const { n, rate } = message.live ?? {};
    if (n && message.stats?.completion === undefined) message.stats = { completion: n, rate: rate || null };
    delete message.live;
    this.on.save();
  }

  #failed(e) {
    this.message.finish = "interrupted";
    this.message.error = { status: e.status ?? 0, message: e instanceof ApiError ? e.message : `The page made a mistake: ${e.message}` };
    if (!(e instanceof ApiError)) console.error(e);
  }

  async #ask() {
    for (let wasWrong = false; ; wasWrong = true) {
      try {
        return await this.#read();
      } catch (e) {
        if (e.status !== 401 || !await this.on.key(wasWrong)) throw e;
      }
    }
  }

  async #read() {
    let saved = performance.now();
    let [n, since] = [0, 0];
    for await (const chunk of ask(this.#body(), this.#controller.signal)) {
      const choice = chunk.choices?.[0];
      if (choice) {
        this.#take(choice);
        n += 1;
        since ||= performance.now();
        const time = performance.now() - since;
        this.message.live = { n, rate: time > 200 ? (1000 * (n - 1)) / time : 0 };
      }
      this.#count(chunk);
      this.on.change();
      if (performance.now() - saved > SAVE_MS) {
        saved = performance.now();
        this.on.save();
      }
    }
  }

  #body() {
    const { settings, conversation, message } = this;
    const extra = settings.extra.trim() ? JSON.parse(settings.extra) : {};
    const body = { model: this.model?.id, messages: wire(conversation, message), stream: true, stream_options: { include_usage: true } };
    for (const name of SAMPLING) if (settings[name] !== "") body[name] = Number(settings[name]);
    if (this.track) Object.assign(body, { logprobs: true, top_logprobs: 10, apr_experts: true });
    return { ...body, ...extra };
  }

  #take({ delta = {}, logprobs, apr_experts: experts, finish_reason: finish }) {
    const { message, track } = this;
    (logprobs?.content ?? []).forEach((told, k) => track?.push(told, k === 0 ? experts : null));
    for (const kind of ["reasoning_content", "content"]) {
      if (!delta[kind]) continue;
      message[kind] ??= "";
      track?.text(kind, message[kind].length, delta[kind]);
      message[kind] += delta[kind];
    }
    for (const call of delta.tool_calls ?? []) {
      message.tool_calls ??= [];
      const whole = message.tool_calls[call.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } };
      whole.id ||= call.id ?? "";
      whole.function.name += call.function?.name ?? "";
      whole.function.arguments += call.function?.arguments ?? "";
    }
    if (finish) message.finish = finish;
  }

  #count({ usage, timings }) {
    const stats = this.message.stats ??= {};
    if (usage) {
      Object.assign(stats, { prompt: usage.prompt_tokens, completion: usage.completion_tokens,
        cached: usage.prompt_tokens_details?.cached_tokens ?? 0 });
    }
    if (timings) Object.assign(stats, { rate: timings.predicted_per_second, promptMs: timings.prompt_ms });
  }
}

/** The conversation up to a message in OpenAI's form; a message that has begun is the last, and is continued. */
function wire(conversation, last) {
  const out = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  for (const message of conversation.messages) {
    const { role, content, tool_calls: calls, tool_call_id: id } = message;
    if (message === last) {
      if (content) out.push({ role, content });
      break;
    }
    if (role === "tool") out.push({ role, content, tool_call_id: id });
    else if (calls?.length) out.push({ role, content: content || null, tool_calls: calls });
    else if (role !== "assistant" || content) out.push({ role, content });
  }
  return out;
}
