// Conversations and settings, kept in this browser only. Each conversation is an entry of its own, so that two tabs do not
// write over each other's.

const CHAT = "apr.chat.";
const SETTINGS = "apr.settings";

/** Settings as they are before anybody changes them: what is empty is left to the model's own file. */
const PLAIN = { theme: "auto", inside: false, asTokens: false, shade: true, system: "", extra: "",
  temperature: "", top_p: "", top_k: "", min_p: "", max_tokens: "", seed: "" };

export const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

/** Whether there was room. */
function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export const settings = { ...PLAIN, ...read(SETTINGS) };

export const saveSettings = () => write(SETTINGS, settings);

export function resetSampling() {
  for (const name of [...SAMPLING, "extra"]) settings[name] = PLAIN[name];
  saveSettings();
}

const isChat = (c) => typeof c?.id === "string" && Array.isArray(c.messages);

/** All conversations, the latest first. */
export function chats() {
  const names = Object.keys(localStorage).filter((name) => name.startsWith(CHAT));
  return names.map(read).filter(isChat).sort((a, b) => b.changed - a.changed);
}

export function newChat(system) {
  return { id: crypto.getRandomValues(new Uint32Array(3)).join("-"), title: "", system, messages: [], changed: Date.now() };
}

/** Ids of those that were deleted here: an answer that was being made still ends, and must not bring its conversation back. */
const deleted = new Set();

/** Keeps a conversation; false where the browser has no room left. One without messages is not worth keeping. */
export function saveChat(chat) {
  if (!chat.messages.length || deleted.has(chat.id)) return true;
  return write(CHAT + chat.id, chat);
}

export const loadChat = (id) => {
  const chat = read(CHAT + id);
  return isChat(chat) ? chat : null;
};

export function deleteChat(id) {
  deleted.add(id);
  localStorage.removeItem(CHAT + id);
}

export const isChatEntry = (name) => name?.startsWith(CHAT) ?? false;
