// The page: which conversation is shown, what a person does to it, and the answers that are being made.

import { $, announce, copy, el, icon, iconButton, int } from "./dom.js";
import * as api from "./api.js";
import { Inside } from "./inside.js";
import { Run } from "./run.js";
import { deleteChat, isChatEntry, loadChat, chats, newChat, resetSampling, SAMPLING, saveChat, saveSettings, settings } from "./store.js";
import { View } from "./view.js";

const IDEAS = ["Explain in three sentences what a mixture of experts is.", "Write a haiku about memory bandwidth.",
  "Compare Rust and C++ in a small table.", "Write a Python function that checks if a number is prime."];
const TITLE_MAX = 60;
/** Pixels from the end within which the page follows the text. */
const NEAR_END = 60;

let model = null;
let chat = newChat(settings.system);
/** Messages as they are shown, by id. */
let views = new Map();
/** What was looked at while it was made; it is too much to be kept. */
const tracks = new Map();
/** The answers being made, by the id of their conversation. */
const runs = new Map();

const isRunning = (message) => [...runs.values()].some((run) => run.message === message);
const lastMessage = () => chat.messages.at(-1);
const lastAnswer = () => chat.messages.findLast((m) => m.role === "assistant");

const inside = new Inside({ fork, marked: () => views.forEach((view) => view.mark()) });

const context = {
  inside, isRunning,
  track: (message) => tracks.get(message.id) ?? null,
  look: () => (settings.inside ? settings : null),
  isLast: (message) => message === lastMessage(),
  actions: { again, more: (message) => start(message), edited, results },
};

// ---- showing ------------------------------------------------------------------------------------------------------

function show(next) {
  chat = next;
  views = new Map();
  $("messages").replaceChildren();
  chat.messages.forEach(addView);
  $("log").scrollTop = $("log").scrollHeight;
  $("system").value = chat.system;
  refresh();
  lookAtLast();
}

function addView(message) {
  const view = new View(message, context);
  views.set(message.id, view);
  $("messages").append(view.element);
  view.update();
}

/** What is beside the messages. */
function refresh() {
  const running = runs.has(chat.id);
  $("empty").hidden = chat.messages.length > 0;
  $("send").replaceChildren(icon(running ? "stop" : "send"));
  $("send").classList.toggle("running", running);
  for (const name of ["title", "aria-label"]) $("send").setAttribute(name, running ? "Stop (Esc)" : "Send (Enter)");
  $("messages").setAttribute("aria-busy", String(running));
  showContext();
  showList();
}

function showContext() {
  const last = chat.messages.findLast((m) => m.stats?.prompt !== undefined);
  const live = runs.get(chat.id)?.message.live?.n ?? 0;
  const used = last ? last.stats.prompt + last.stats.completion + (isRunning(last) ? 0 : live) : live;
  $("context").hidden = !model?.nCtx || !used;
  if ($("context").hidden) return;
  $("context-text").textContent = `${int(used)} of ${int(model.nCtx)} tokens`;
  $("context-bar").style.width = `${Math.min(100, (100 * used) / model.nCtx)}%`;
  $("context").classList.toggle("full", used > 0.85 * model.nCtx);
}

function showList() {
  const kept = chats();
  const items = kept.map((c) => {
    const isHere = c.id === chat.id;
    const open = el("button", { type: "button", class: "open", "aria-current": isHere ? "true" : null, onclick: () => {
      if (!isHere) show(runs.get(c.id)?.conversation ?? c);
      narrowSide(false);
    } }, runs.has(c.id) ? el("span", { class: "dot busy" }) : null, c.title || "Untitled");
    return el("li", {}, open, removeButton(c));
  });
  $("chats").replaceChildren(...items);
}

/** Asks once more before it deletes. */
function removeButton(c) {
  const button = iconButton("trash", `Delete “${c.title}”`, () => {
    if (!button.classList.contains("sure")) {
      button.classList.add("sure");
      button.replaceChildren("Delete?");
      setTimeout(() => button.isConnected && showList(), 4000);
      return;
    }
    runs.get(c.id)?.stop();
    deleteChat(c.id);
    if (c.id === chat.id) show(newChat(settings.system));
    else showList();
    announce("Deleted");
  });
  return button;
}

const isAtEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < NEAR_END;

function follow(wasAtEnd) {
  if (wasAtEnd) $("log").scrollTop = $("log").scrollHeight;
  $("down").hidden = isAtEnd();
}

// ---- answers ------------------------------------------------------------------------------------------------------

const newMessage = (role, content, more) => ({ id: crypto.getRandomValues(new Uint32Array(2)).join("-"), role, content, ...more });

function send(text) {
  if (!text.trim() || runs.has(chat.id)) return;
  chat.title ||= text.trim().split("\n")[0].slice(0, TITLE_MAX);
  chat.messages.push(newMessage("user", text));
  addView(lastMessage());
  answer();
}

/** Begins the answer to what stands there. */
function answer() {
  chat.messages.push(newMessage("assistant", ""));
  addView(lastMessage());
  start(lastMessage());
  $("log").scrollTop = $("log").scrollHeight;
}

/** Makes an answer, or goes on with it. */
async function start(message) {
  if (runs.has(chat.id)) return;
  const mine = chat;
  let isDue = false;
  const draw = () => {
    isDue = false;
    const view = views.get(message.id);
    if (mine !== chat || !view) return;
    const wasAtEnd = isAtEnd();
    view.update();
    inside.more(lookAt(message));
    showContext();
    follow(wasAtEnd);
  };
  const change = () => {
    if (!isDue) requestAnimationFrame(draw);
    isDue = true;
  };
  const run = new Run(mine, message, settings, model, { change, save: () => keep(mine), key: askKey });
  runs.set(mine.id, run);
  mine.changed = Date.now();
  const going = run.go(message.content ? tracks.get(message.id) : null);
  if (run.track) tracks.set(message.id, run.track);
  keep(mine);
  views.get(message.id)?.update();
  inside.look(lookAt(message));
  refresh();
  announce("Answering");
  await going;
  runs.delete(mine.id);
  ended(mine, message);
  if (!model && !message.error) meet();
}

function ended(mine, message) {
  const wasAtEnd = isAtEnd();
  if (mine === chat) views.get(message.id)?.update();
  inside.more(lookAt(message));
  refresh();
  follow(wasAtEnd);
  announce(message.error ? `Error: ${message.error.message}` : `Answer: ${message.content}`);
}

function keep(c) {
  if (!saveChat(c)) $("model").title = "The browser has no room left: this conversation will not be there after a reload.";
}

function dropFrom(index) {
  for (const message of chat.messages.splice(index)) {
    views.get(message.id)?.element.remove();
    views.delete(message.id);
    tracks.delete(message.id);
  }
}

function again() {
  if (runs.has(chat.id) || !lastAnswer()) return;
  dropFrom(chat.messages.lastIndexOf(lastAnswer()));
  answer();
}

/** A message has another text: one of a person is sent anew, one of the model stays as it was made. */
function edited(message, text) {
  const isNew = text !== message.content;
  message.content = text;
  if (message.role === "user" && text.trim() && !runs.has(chat.id)) {
    const at = chat.messages.indexOf(message);
    if (at === 0) chat.title = text.trim().split("\n")[0].slice(0, TITLE_MAX);
    dropFrom(at + 1);
    views.get(message.id).update(true);
    return answer();
  }
  if (isNew) tracks.delete(message.id);
  views.get(message.id).update(true);
  keep(chat);
  return lookAtLast();
}

/** What tools gave that the answer has called. */
function results(message, texts) {
  message.tool_calls.forEach((call, k) => {
    chat.messages.push(newMessage("tool", texts[k], { tool_call_id: call.id }));
    addView(lastMessage());
  });
  views.get(message.id).update();
  answer();
}

/** Goes on from another token than the one that was chosen. */
function fork(message, index, other) {
  const track = tracks.get(message.id);
  const at = track?.offset("content", index) ?? null;
  if (at === null || runs.has(chat.id)) return;
  dropFrom(chat.messages.indexOf(message) + 1);
  message.content = message.content.slice(0, at) + other.text;
  delete message.tool_calls;
  track.fork(index, other, at);
  inside.unpin();
  views.get(message.id).update(true);
  start(message);
}

// ---- looking inside -----------------------------------------------------------------------------------------------

/** An answer, for the panel. */
function lookAt(message) {
  const running = runs.has(chat.id);
  const canFork = !running && !message.reasoning_content && !message.tool_calls?.length;
  return { message, track: tracks.get(message.id) ?? null, isOver: !isRunning(message), canFork };
}

function lookAtLast() {
  inside.look(lastAnswer() ? lookAt(lastAnswer()) : null);
}

function setInside(on) {
  settings.inside = on;
  saveSettings();
  $("inside").hidden = !on;
  $("look").setAttribute("aria-pressed", String(on));
  document.body.classList.toggle("looking", on);
  views.forEach((view) => view.update(true));
  if (on) lookAtLast();
  veil();
}

/** The token at an event, with its answer. */
function tokenAt(event) {
  const span = event.target.closest?.(".tok[data-i]");
  const id = span?.closest("article")?.dataset.id;
  const message = span && chat.messages.find((m) => m.id === id);
  return message && tracks.has(id) ? { span, answer: lookAt(message), index: Number(span.dataset.i) } : null;
}

function watchTokens() {
  const log = $("messages");
  log.addEventListener("pointerover", (e) => {
    const at = tokenAt(e);
    if (e.pointerType !== "touch") inside.preview(at?.answer, at ? at.index : null);
  });
  log.addEventListener("pointerleave", () => inside.preview(null, null));
  log.addEventListener("click", (e) => {
    const at = tokenAt(e);
    if (at && getSelection().isCollapsed && !e.target.closest("a")) inside.pin(at.answer, at.index);
    const button = e.target.closest("[data-do=copy-code]");
    if (button) copy(button.closest(".code").querySelector("pre").textContent, button);
  });
  log.addEventListener("focusin", (e) => {
    const at = tokenAt(e);
    if (at && e.target.matches(":focus-visible")) inside.pin(at.answer, at.index);
  });
}

function step(by) {
  const index = inside.step(by);
  const span = index === null ? null : $("messages").querySelector(".tok.pinned");
  span?.scrollIntoView({ block: "nearest" });
  if (span && document.activeElement?.matches(".tok")) span.focus({ preventScroll: true });
}

// ---- around it ----------------------------------------------------------------------------------------------------

function narrowSide(on) {
  document.body.classList.toggle("side-open", on);
  $("side-open").setAttribute("aria-expanded", String(on));
  veil();
  if (on) $("new").focus();
}

function veil() {
  $("veil").hidden = !document.body.classList.contains("side-open");
}

const THEMES = { auto: "as the system", light: "light", dark: "dark" };

function setTheme(theme) {
  settings.theme = theme;
  saveSettings();
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").replaceChildren(icon(theme));
  for (const name of ["title", "aria-label"]) $("theme").setAttribute(name, `Theme: ${THEMES[theme]} (d)`);
}

function nextTheme() {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(settings.theme) + 1) % names.length]);
  announce(`Theme: ${THEMES[settings.theme]}`);
}

/** Opens a dialog, and gives what closed it. */
function open(dialog) {
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}

let asking = null;

/** Asks for a key, once for all who need it; whether there is one now. */
function askKey(wasWrong) {
  asking ??= ask(wasWrong).finally(() => { asking = null; });
  return asking;
}

async function ask(wasWrong) {
  $("ask-why").textContent = wasWrong ? "The server does not take this key." : "It is kept until this tab is closed.";
  $("api-key").value = api.key.get();
  const dialog = $("ask-key");
  dialog.returnValue = "";
  if (await open(dialog) === "cancel") return false;
  api.key.set($("api-key").value.trim());
  $("api-key").value = "";
  return Boolean(api.key.get());
}

/** Finds out which model answers; waits for one that is being loaded. */
async function meet() {
  for (let wasWrong = false; ;) {
    try {
      model = await api.model();
      break;
    } catch (e) {
      if (e.status === 401) {
        dot("asking", "a key is needed");
        if (!await askKey(wasWrong)) return;
        wasWrong = true;
      } else {
        const status = await api.health();
        dot("waiting", status === "gone" ? "server not reached" : `${status}…`);
        await new Promise((resolve) => setTimeout(resolve, 1500));
      }
    }
  }
  dot("ok", model.id);
  $("empty-model").textContent = model.id;
  document.title = `${model.id} · apr`;
  inside.nExpert = model.nExpert;
  showContext();
}

function dot(kind, text) {
  $("dot").className = `dot ${kind}`;
  $("model").textContent = text;
}

function fillSettings() {
  $("system").value = chat.system;
  for (const name of SAMPLING) $(`set-${name}`).value = settings[name];
  $("extra").value = settings.extra;
  checkExtra();
}

function checkExtra() {
  const text = $("extra").value.trim();
  let error = "";
  try {
    const value = text ? JSON.parse(text) : {};
    if (typeof value !== "object" || value === null || Array.isArray(value)) error = "This is not a JSON object.";
  } catch (e) {
    error = `This is not JSON: ${e.message}`;
  }
  $("extra-error").textContent = error;
  return !error;
}

function watchSettings() {
  $("open-settings").addEventListener("click", () => {
    fillSettings();
    open($("settings"));
  });
  $("settings").addEventListener("input", () => {
    chat.system = settings.system = $("system").value;
    for (const name of SAMPLING) if ($(`set-${name}`).validity.valid) settings[name] = $(`set-${name}`).value;
    if (checkExtra()) settings.extra = $("extra").value;
    saveSettings();
    keep(chat);
  });
  $("reset").addEventListener("click", () => {
    resetSampling();
    fillSettings();
  });
  $("open-keys").addEventListener("click", () => open($("keys")));
  $("ask-cancel").addEventListener("click", () => $("ask-key").close("cancel"));
  $("ask-key").addEventListener("cancel", () => { $("ask-key").returnValue = "cancel"; });
  for (const dialog of document.querySelectorAll("dialog:not(#ask-key)")) {
    dialog.addEventListener("click", (e) => e.target === dialog && dialog.close());
  }
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, 220)}px`;
}

function watchComposer() {
  $("input").addEventListener("input", grow);
  $("input").addEventListener("keydown", (e) => {
    if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
      e.preventDefault();
      $("composer").requestSubmit();
    } else if (e.key === "ArrowUp" && !$("input").value) {
      const last = chat.messages.findLast((m) => m.role === "user");
      if (last && !runs.has(chat.id)) {
        e.preventDefault();
        views.get(last.id).edit();
      }
    }
  });
  $("composer").addEventListener("submit", (e) => {
    e.preventDefault();
    const running = runs.get(chat.id);
    if (running) {
      // Enter in the box waits; the button stops.
      if (e.submitter) running.stop();
      return;
    }
    const text = $("input").value;
    $("input").value = "";
    grow();
    send(text);
  });
}

const isWriting = (node) => node?.matches?.("input, textarea, select, [contenteditable]");

function escape() {
  if (document.body.classList.contains("side-open")) return narrowSide(false);
  const running = runs.get(chat.id);
  if (running) return running.stop();
  return inside.unpin();
}

const KEYS = {
  "/": () => $("input").focus(),
  "?": () => open($("keys")),
  ",": () => $("open-settings").click(),
  n: () => $("new").click(),
  r: again,
  i: () => setInside(!settings.inside),
  d: nextTheme,
  ArrowLeft: () => settings.inside && step(-1),
  ArrowRight: () => settings.inside && step(1),
};

function watchKeys() {
  addEventListener("keydown", (e) => {
    if (document.querySelector("dialog[open]") || e.ctrlKey || e.metaKey || e.altKey || e.isComposing) return;
    if (e.key === "Escape") return void escape();
    if (isWriting(e.target) || !KEYS[e.key]) return;
    e.preventDefault();
    KEYS[e.key]();
  });
}

function watchRest() {
  $("new").addEventListener("click", () => {
    show(newChat(settings.system));
    narrowSide(false);
    $("input").focus();
  });
  $("look").addEventListener("click", () => setInside(!settings.inside));
  $("inside-close").addEventListener("click", () => {
    setInside(false);
    $("look").focus();
  });
  $("theme").addEventListener("click", nextTheme);
  $("side-open").addEventListener("click", () => narrowSide(true));
  $("side-close").addEventListener("click", () => narrowSide(false));
  $("veil").addEventListener("click", () => narrowSide(false));
  $("log").addEventListener("scroll", () => { $("down").hidden = isAtEnd(); });
  $("down").addEventListener("click", () => { $("log").scrollTop = $("log").scrollHeight; });
  for (const [id, name] of [["shade", "shade"], ["as-tokens", "asTokens"]]) {
    $(id).checked = settings[name];
    $(id).addEventListener("change", () => {
      settings[name] = $(id).checked;
      saveSettings();
      views.forEach((view) => view.update(true));
    });
  }
  // Another tab has changed its conversations.
  addEventListener("storage", (e) => isChatEntry(e.key) && showList());
  addEventListener("pagehide", () => runs.forEach((run) => keep(run.conversation)));
}

function draw() {
  const icons = { "side-open": "menu", "side-close": "close", "open-settings": "settings", "open-keys": "keys", "inside-close": "close",
    down: "down", "token-prev": "left", "token-next": "right" };
  for (const [id, name] of Object.entries(icons)) $(id).append(icon(name));
  document.querySelectorAll("[data-close]").forEach((button) => button.append(icon("close")));
  $("new").append(icon("plus"), "New conversation");
  $("look").append(icon("eye"), el("span", { class: "not-narrow" }, "Look inside"), el("span", { class: "offstage only-narrow" }, "Look inside"));
  $("ideas").append(...IDEAS.map((idea) => el("button", { type: "button", onclick: () => send(idea) }, idea)));
}

draw();
setTheme(settings.theme);
watchSettings();
watchComposer();
watchTokens();
watchKeys();
watchRest();
show(chats()[0] && location.hash === "#last" ? loadChat(chats()[0].id) : chat);
setInside(settings.inside);
$("input").focus();
meet();
