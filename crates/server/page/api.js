// Requests to the server that the page came from: the key it may ask for, errors as values, and answers as they stream.

const KEY = "apr.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What went wrong, in words for a person. `status` is 0 where no answer came. */
export class ApiError extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

function headers() {
  return key.get() ? { authorization: `Bearer ${key.get()}` } : {};
}

async function request(path, init) {
  let response;
  try {
    response = await fetch(path, { ...init, headers: { ...init?.headers, ...headers() }, credentials: "omit", cache: "no-store" });
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const error = body?.error;
  const message = (typeof error === "string" ? error : error?.message) ?? `The server answered ${response.status} ${response.statusText}.`;
  throw new ApiError(response.status, message, Number(response.headers.get("retry-after")) || null);
}

/** The model that answers: name, context, experts (null for none, undefined where the server does not say). */
export async function model() {
  const [card] = (await (await request("/v1/models")).json()).data;
  const meta = card.meta ?? {};
  return { id: card.id, nCtx: card.max_model_len ?? meta.n_ctx ?? null, nExpert: meta.n_expert };
}

/** `ok`, `loading`, `draining`, or `gone`. */
export async function health() {
  try {
    return (await (await fetch("/health", { cache: "no-store" })).json()).status;
  } catch {
    return "gone";
  }
}

/**
 * Asks for an answer and gives its chunks. To leave the loop, or to abort the signal, closes the connection, and the server
 * stops computing.
 */
export async function* chat(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal,
  });
  let isDone = false;
  for await (const data of events(response.body)) {
    isDone = data === "[DONE]";
    if (isDone) break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(500, chunk.error.message ?? String(chunk.error));
    yield chunk;
  }
  if (!isDone) throw new ApiError(0, "The connection ended before the answer did.");
}

/** The data of server-sent events. */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      // A line end of two characters may come in two parts.
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      }
      if (done) return;
    }
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new ApiError(0, "The connection broke off in the middle of the answer.");
  } finally {
    reader.cancel().catch(() => undefined);
  }
}
