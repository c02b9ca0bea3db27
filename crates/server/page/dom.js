// Elements, numbers and small things that every other script of the page uses.
//
// Text of a model or of a person enters the document as text nodes only, and attributes get no text of strangers but
// addresses that `markdown.js` has checked. Nothing here parses HTML.

export const $ = (id) => document.getElementById(id);

/** A new element: attributes by name, `on…` ones as listeners; children are nodes or text, null for none. */
export function el(tag, attrs, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attrs ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** A drawing of the sheet in index.html. */
export function icon(name) {
  const node = $("icons").content.getElementById(`i-${name}`).cloneNode(true);
  node.removeAttribute("id");
  return node;
}

/** A button with a drawing; its name is read aloud and shown as a tip. */
export function iconButton(name, label, onclick, attrs) {
  return el("button", { type: "button", class: "icon", title: label, "aria-label": label, onclick, ...attrs }, icon(name));
}

export const int = (x) => Math.round(x).toLocaleString("en-US");

/** A probability in per cent. */
export function percent(p) {
  const x = 100 * p;
  if (x >= 99.95) return "100 %";
  return x < 0.1 ? "<0.1 %" : `${x.toFixed(x < 10 ? 1 : 0)} %`;
}

export function seconds(ms) {
  return ms < 1000 ? `${Math.max(1, Math.round(ms))} ms` : `${(ms / 1000).toFixed(ms < 1e4 ? 1 : 0)} s`;
}

/** A token as it can be seen: spaces and line ends are drawn. */
export function visible(text) {
  if (text === "") return "∅";
  return text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
}

/** Makes `old` equal to `next` and keeps every node that can be kept, so that nothing flickers, scrolls or loses focus. */
export function morph(old, next) {
  const before = [...old.childNodes];
  const after = [...next.childNodes];
  after.forEach((node, i) => {
    const was = before[i];
    if (!was) old.append(node);
    else if (!alike(was, node)) was.replaceWith(node);
    else if (node.nodeType === Node.TEXT_NODE) {
      if (was.data !== node.data) was.data = node.data;
    } else if (!was.isEqualNode(node)) {
      for (const { name } of [...was.attributes]) if (!node.hasAttribute(name)) was.removeAttribute(name);
      for (const { name, value } of node.attributes) if (was.getAttribute(name) !== value) was.setAttribute(name, value);
      morph(was, node);
    }
  });
  before.slice(after.length).forEach((node) => node.remove());
}

const alike = (a, b) => a.nodeType === b.nodeType && a.nodeName === b.nodeName;

/** Copies text, and says on the button that it did. */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages that came over plain HTTP from another machine have no clipboard of their own.
    const area = el("textarea", { class: "offstage", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1200);
  announce("Copied");
}

/** Tells those who listen instead of looking. */
export function announce(text) {
  $("said").textContent = text;
}
