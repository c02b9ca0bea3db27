// Markdown to elements, for text of a model that is still coming.
//
// Every piece of text that is shown is a slice of the source, and `put(parent, start, end)` of the caller shows it: that is how
// the tokens of an answer are found again inside headings, tables and code. No HTML is parsed or made; a tag in the source is
// text. All scans are linear in the source, whatever it holds.
//
// With `open` the source is going to grow: what is begun at its end and surely meant (a code block, bold text, a table) is shown
// as if it were closed, so that nothing jumps when it is.

import { el } from "./dom.js";

const DEPTH_MAX = 12;
const URL_MAX = 2048;
/** Blank lines inside an item of a list. */
const BLANKS_MAX = 8;
/** Longer headings keep the marks at their end. */
const HEADING_MAX = 1000;

/** The blocks of a source as `{start, end, build}`; `build(put)` gives an element. */
export function blocks(source, open) {
  const lines = [];
  for (let at = 0; at <= source.length;) {
    let end = source.indexOf("\n", at);
    if (end < 0) end = source.length;
    lines.push({ at, text: source.slice(at, end) });
    at = end + 1;
  }
  return split(lines, open, 0);
}

/** An address that a link may have, or null. */
export function address(text) {
  if (text.length > URL_MAX) return null;
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

// ---- blocks: a line is its text, and where that begins in the source ----------------------------------------------

const FENCE = /^ {0,3}(`{3,}(?!`)|~{3,}(?!~))([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const DELIMITER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
/** What a line, without the space around it, may still be the beginning of, so that it says nothing yet. */
const UNDECIDED = /^(?:`{1,2}|~{1,2}|#{1,6}|[-+*_]{1,2}|\d{1,9}[.)]?|>|\||\[)?$/;

const isBlank = (line) => line.text.trim() === "";
const cut = (line, n) => ({ at: line.at + n, text: line.text.slice(n) });
const indent = (line) => line.text.length - line.text.trimStart().length;

function split(lines, open, depth) {
  const out = [];
  let i = 0;
  while (i < lines.length) {
    if (isBlank(lines[i])) {
      i += 1;
      continue;
    }
    const [n, build] = block(lines, i, open, depth);
    const last = lines[i + n - 1];
    if (build) out.push({ start: lines[i].at, end: last.at + last.text.length, build });
    i += n;
  }
  return out;
}

/** The block that begins at a line: how many lines it has, and what makes its element; null where it cannot be told yet. */
function block(lines, i, open, depth) {
  const line = lines[i];
  const nested = depth < DEPTH_MAX;
  const fence = FENCE.exec(line.text);
  if (fence) return code(lines, i, fence);
  const heading = HEADING.exec(line.text);
  if (heading) {
    const text = cut(line, heading[0].length);
    if (text.text.length < HEADING_MAX) text.text = text.text.replace(/[ \t]+#+[ \t]*$/, "");
    return [1, (put) => inlineInto(el(`h${heading[1].length}`), [text], put, open && i === lines.length - 1)];
  }
  if (RULE.test(line.text)) return [1, () => el("hr")];
  if (nested && QUOTE.test(line.text)) return quote(lines, i, open, depth);
  if (nested && ITEM.test(line.text)) return list(lines, i, open, depth);
  const table = tableAt(lines, i, open);
  return table ?? paragraph(lines, i, open);
}

function code(lines, i, fence) {
  const [, mark, info] = fence;
  const close = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}\\s*$`);
  let end = i + 1;
  while (end < lines.length && !close.test(lines[end].text)) end += 1;
  let body = lines.slice(i + 1, end);
  const isClosed = end < lines.length;
  // The closing fence may be on its way.
  if (!isClosed && body.length && /^ {0,3}[`~]{1,2}$/.test(body.at(-1).text)) body = body.slice(0, -1);
  const shift = Math.min(indent(lines[i]), 3);
  const build = (put) => {
    const inner = el("code");
    body.forEach((line, k) => {
      const at = line.at + Math.min(shift, indent(line));
      put(inner, at, line.at + line.text.length + (k + 1 < body.length ? 1 : 0));
    });
    return el("div", { class: "code" }, el("div", { class: "codehead" }, el("span", {}, info.trim().split(/\s+/)[0] || "code"),
      el("button", { type: "button", class: "copy", "data-do": "copy-code", "aria-label": "Copy code" }, "Copy")),
    el("pre", { tabindex: "0" }, inner));
  };
  return [end - i + (isClosed ? 1 : 0), build];
}

function quote(lines, i, open, depth) {
  let end = i;
  while (end < lines.length && QUOTE.test(lines[end].text)) end += 1;
  const inner = lines.slice(i, end).map((line) => cut(line, QUOTE.exec(line.text)[0].length));
  const isOpen = open && end === lines.length;
  return [end - i, (put) => all(el("blockquote"), inner, isOpen, depth + 1, put)];
}

/** A list: items of one kind, each with the lines that are indented as far as its text. */
function list(lines, i, open, depth) {
  const kindOf = (mark) => (/\d/.test(mark) ? mark.at(-1) : mark);
  const kind = kindOf(ITEM.exec(lines[i].text)[2]);
  const items = [];
  let end = i;
  while (end < lines.length) {
    const item = RULE.test(lines[end].text) ? null : ITEM.exec(lines[end].text);
    if (!item || kindOf(item[2]) !== kind) break;
    const width = item[1].length + item[2].length + (item[3].length > 4 || item[3] === "" ? 1 : item[3].length);
    const inner = [cut(lines[end], Math.min(width, lines[end].text.length))];
    end += 1;
    for (; end < lines.length; end += 1) {
      const line = lines[end];
      const goesOn = indent(line) >= Math.min(width, 4) || (isBlank(line) && more(lines, end, Math.min(width, 2)))
        || (!isBlank(lines[end - 1]) && !isBlank(line) && !startsBlock(line));
      // Models often indent what is inside an item by two, whatever the mark's width.
      const isShallow = indent(line) >= item[1].length + 2 && !isBlank(line);
      if (!goesOn && !isShallow) break;
      inner.push(cut(line, Math.min(width, indent(line), line.text.length)));
    }
    items.push(inner);
    while (end < lines.length && isBlank(lines[end]) && end + 1 < lines.length && ITEM.test(lines[end + 1].text)) end += 1;
  }
  const first = /\d+/.exec(lines[i].text.trimStart())?.[0];
  const isOrdered = kind === "." || kind === ")";
  const build = (put) => el(isOrdered ? "ol" : "ul", { start: isOrdered && first !== "1" ? Number(first) : null },
    items.map((inner, k) => all(el("li"), inner, open && end === lines.length && k === items.length - 1, depth + 1, put)));
  return [end - i, build];
}

const startsBlock = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((form) => form.test(line.text));

/** Whether an item goes on after blank lines. */
function more(lines, i, width) {
  const limit = Math.min(lines.length, i + BLANKS_MAX);
  while (i < limit && isBlank(lines[i])) i += 1;
  return i < limit && indent(lines[i]) >= width;
}

function tableAt(lines, i, open) {
  const head = lines[i];
  const isLast = i + 1 >= lines.length;
  if (!head.text.includes("|")) return null;
  const under = lines[i + 1];
  const isTable = under && DELIMITER.test(under.text) && under.text.includes("-") && under.text.includes("|");
  const isComing = open && /^\s*\|/.test(head.text) && (isLast || (i + 2 === lines.length && /^[\s|:-]*$/.test(under.text)));
  if (!isTable && !isComing) return null;
  // Of a row that has begun with a bar nothing is to be seen yet.
  if (!isTable && isLast && !/[^\s|]/.test(head.text)) return [1, null];
  const align = isTable ? cells(under).map((cell) => side(cell.text.trim())) : [];
  let end = i + (isTable || !isLast ? 2 : 1);
  while (end < lines.length && !isBlank(lines[end]) && lines[end].text.includes("|")) end += 1;
  const rows = lines.slice(i + 2, end);
  const n = cells(head).length;
  const build = (put) => {
    const row = (line, tag) => {
      const found = cells(line).slice(0, n);
      const cell = (k) => inlineInto(el(tag, { class: align[k] }), found[k] ? [found[k]] : [], put, open && end === lines.length);
      return el("tr", {}, Array.from({ length: n }, (_, k) => cell(k)));
    };
    const body = rows.length ? el("tbody", {}, rows.map((line) => row(line, "td"))) : null;
    return el("div", { class: "wide", tabindex: "0" }, el("table", {}, el("thead", {}, row(head, "th")), body));
  };
  return [end - i, build];
}

const side = (rule) => (rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "right") : null);

/** The cells of a row, without the space around them. Bars after a backslash or inside a code span are text. */
function cells(line) {
  const { text } = line;
  const cuts = [];
  let inCode = false;
  for (let i = 0; i < text.length; i += 1) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === "`") inCode = !inCode && text.indexOf("`", i + 1) > 0;
    else if (text[i] === "|" && !inCode) cuts.push(i);
  }
  const bounds = [-1, ...cuts, text.length];
  const found = bounds.slice(1).map((end, k) => {
    const raw = text.slice(bounds[k] + 1, end);
    return { at: line.at + bounds[k] + 1 + (raw.length - raw.trimStart().length), text: raw.trim() };
  });
  if (found.length > 1 && found[0].text === "") found.shift();
  if (found.length > 1 && found.at(-1).text === "") found.pop();
  return found;
}

function paragraph(lines, i, open) {
  let end = i + 1;
  while (end < lines.length && !isBlank(lines[end]) && !startsBlock(lines[end])) end += 1;
  let own = lines.slice(i, end);
  const isOpen = open && end === lines.length;
  if (isOpen && UNDECIDED.test(own.at(-1).text.trim())) own = own.slice(0, -1);
  if (!own.length) return [end - i, null];
  return [end - i, (put) => inlineInto(el("p"), own.map((line) => cut(line, indent(line))), put, isOpen)];
}

function all(parent, lines, open, depth, put) {
  const inner = split(lines, open, depth);
  // An item of one paragraph is not a paragraph.
  const only = inner.length ? inner[0].build(put) : null;
  if (parent.tagName === "LI" && only?.tagName === "P") parent.append(...only.childNodes);
  else if (only) parent.append(only);
  parent.append(...inner.slice(1).map((b) => b.build(put)));
  return parent;
}

// ---- inline: the lines of a block as one text, and for each of its characters the place in the source -------------

function inlineInto(parent, lines, put, open) {
  const text = lines.map((line) => line.text).join("\n");
  const starts = [];
  let n = 0;
  for (const line of lines) {
    starts.push({ n, at: line.at });
    n += line.text.length + 1;
  }
  const show = (node, a, b) => {
    // A slice of the text may run over several lines; lines are few, and are walked in order.
    for (let k = 0; k < starts.length && starts[k].n < b; k += 1) {
      const lineEnd = starts[k].n + lines[k].text.length;
      const from = Math.max(a, starts[k].n);
      const to = Math.min(b, lineEnd);
      if (from < to) put(node, starts[k].at + from - starts[k].n, starts[k].at + to - starts[k].n);
      if (lineEnd >= a && lineEnd < b) node.append("\n");
    }
  };
  grow(parent, scan(text, 0, text.length, { links: true, open, ...prepared(text) }), show);
  return parent;
}

/** What scans need to look ahead without searching again: which brackets belong together, where runs of backticks are. */
function prepared(text) {
  const partner = new Map();
  const runs = new Map();
  const stack = [];
  for (let i = 0; i < text.length; i += 1) {
    const c = text[i];
    if (c === "\\") i += 1;
    else if (c === "[") stack.push(i);
    else if (c === "]" && stack.length) partner.set(stack.pop(), i);
    else if (c === "`") {
      let end = i;
      while (text[end] === "`") end += 1;
      if (!runs.has(end - i)) runs.set(end - i, []);
      runs.get(end - i).push(i);
      i = end - 1;
    }
  }
  return { partner, runs };
}

const PUNCTUATION = /[\p{P}\p{S}]/u;
const SPACE = /\s/;

/** Text between `a` and `b` as a list of slices, marks, breaks and links, with emphasis matched. */
function scan(text, a, b, has) {
  const out = [];
  let from = a;
  const flush = (to) => {
    if (to > from) out.push({ kind: "text", a: from, b: to });
  };
  const take = (node, at, end) => {
    flush(at);
    if (node) out.push(node);
    from = end;
    return end;
  };
  for (let i = a; i < b;) {
    const c = text[i];
    if (c === "\\" && i + 1 < b && /[!-/:-@[-`{-~]/.test(text[i + 1])) {
      take(null, i, i + 1);
      i += 2;
    } else if (c === "\n") {
      i = take({ kind: "br" }, i, i + 1);
    } else if (c === "`") {
      const [node, end] = codeSpan(text, i, b, has);
      i = node ? take(node, i, end) : end;
    } else if (c === "*" || c === "_" || c === "~") {
      let end = i;
      while (end < b && text[end] === c) end += 1;
      const mark = delimiter(text, i, end, a, b);
      i = mark ? take(mark, i, end) : end;
    } else if (c === "[" || (c === "!" && text[i + 1] === "[")) {
      const [node, end] = has.links ? link(text, i, b, has) : [null, i + 1];
      i = node ? take(node, i, end) : end;
    } else if (has.links && (c === "h" || c === "<") && /^<?https?:\/\//.test(text.slice(i, i + 9)) && !/\w/.test(text[i - 1] ?? "")) {
      const [node, end] = bareLink(text, i, b);
      i = node ? take(node, i, end) : end;
    } else {
      i += 1;
    }
  }
  flush(b);
  return emphasis(out, text, b, has.open);
}

function codeSpan(text, i, b, has) {
  let end = i;
  while (text[end] === "`") end += 1;
  const n = end - i;
  const list = has.runs.get(n);
  // Runs are asked for in ascending order.
  while (list.length && list[0] <= i) list.shift();
  const close = list.length && list[0] < b ? list[0] : -1;
  if (close < 0 && !has.open) return [null, end];
  let [from, to] = [end, close < 0 ? b : close];
  if (to - from > 2 && text[from] === " " && text[to - 1] === " ") [from, to] = [from + 1, to - 1];
  return [{ kind: "code", a: from, b: to }, close < 0 ? b : close + n];
}

/** A run of marks that may begin or end emphasis, by CommonMark's rule of what stands beside it. */
function delimiter(text, i, end, a, b) {
  const c = text[i];
  if (c === "~" && end - i !== 2) return null;
  const before = i > a ? text[i - 1] : " ";
  const after = end < b ? text[end] : " ";
  const left = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
  const right = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
  const inWord = c === "_";
  const opens = left && (!inWord || !right || PUNCTUATION.test(before));
  const closes = right && (!inWord || !left || PUNCTUATION.test(after));
  const atEnd = end === b && (SPACE.test(before) || PUNCTUATION.test(before) || i === a);
  return opens || closes || atEnd
    ? { kind: "mark", c, n: end - i, a: i, b: end, opens, closes, sure: SPACE.test(before) || PUNCTUATION.test(before) } : null;
}

function link(text, i, b, has) {
  const isImage = text[i] === "!";
  const start = i + (isImage ? 1 : 0);
  const close = has.partner.get(start);
  if (close === undefined || close >= b || text[close + 1] !== "(") return [null, start + 1];
  const end = targetEnd(text, close + 1, b);
  if (end < 0) {
    // An address that is still coming is not shown; its text is.
    const isComing = has.open && !/[\s)]/.test(text.slice(close + 2, b));
    return isComing ? [{ kind: "link", url: null, inner: scan(text, start + 1, close, { ...has, links: false, open: false }) }, b]
      : [null, start + 1];
  }
  const target = text.slice(close + 2, end).trim();
  const url = address(target.replace(/\s+["'(].*$/s, "").replace(/^<(.*)>$/s, "$1"));
  if (!url) return [null, start + 1];
  return [{ kind: "link", url, inner: scan(text, start + 1, close, { ...has, links: false, open: false }) }, end + 1];
}

/** Where the parenthesis that opens at `i` closes; -1 if not within the length of an address. */
function targetEnd(text, i, b) {
  let depth = 0;
  for (let k = i; k < Math.min(b, i + URL_MAX); k += 1) {
    if (text[k] === "(") depth += 1;
    else if (text[k] === "\n") return -1;
    else if (text[k] === ")") {
      depth -= 1;
      if (depth === 0) return k;
    }
  }
  return -1;
}

function bareLink(text, i, b) {
  const isBracketed = text[i] === "<";
  const start = i + (isBracketed ? 1 : 0);
  let end = start;
  while (end < b && end - start < URL_MAX && !/[\s<>"`\\]/.test(text[end])) end += 1;
  if (isBracketed && text[end] !== ">") return [null, start];
  if (!isBracketed) {
    while (/[.,:;!?'*_)\]]/.test(text[end - 1]) && !(text[end - 1] === ")" && text.slice(start, end).includes("("))) end -= 1;
  }
  const url = address(text.slice(start, end));
  if (!url) return [null, start + 1];
  return [{ kind: "link", url, inner: [{ kind: "text", a: start, b: end }] }, end + (isBracketed ? 1 : 0)];
}

/** Turns matching marks into nested emphasis; marks that match nothing are text. */
function emphasis(nodes, text, b, open) {
  const root = { inner: [] };
  const stack = [root];
  const begun = { "*": 0, _: 0, "~": 0 };
  const drop = () => {
    const lost = stack.pop();
    begun[lost.mark.c] -= 1;
    stack.at(-1).inner.push({ kind: "text", a: lost.mark.a, b: lost.mark.a + lost.n }, ...lost.inner);
  };
  const close = (frame) => {
    begun[frame.mark.c] -= 1;
    const kind = frame.mark.c === "~" ? "del" : frame.n === 2 ? "strong" : "em";
    stack.at(-1).inner.push({ kind, inner: frame.inner });
  };
  for (const node of nodes) {
    if (node.kind !== "mark") {
      stack.at(-1).inner.push(node);
      continue;
    }
    let left = node.n;
    while (left && node.closes && begun[node.c] > 0) {
      while (stack.at(-1).mark.c !== node.c) drop();
      if (stack.at(-1).n > left) {
        // Half of what closes it, as far as it has come.
        if (open && node.b === b) left = 0;
        else drop();
        continue;
      }
      const frame = stack.pop();
      left -= frame.n;
      close(frame);
    }
    const isTail = open && node.b === b && !node.closes;
    if (left && node.opens && left <= 3) {
      // Three marks are two inside one.
      for (const n of left === 3 ? [1, 2] : [left]) {
        stack.push({ mark: { ...node, a: node.b - left }, n, inner: [] });
        begun[node.c] += 1;
        left -= n;
      }
    } else if (left && !isTail) {
      stack.at(-1).inner.push({ kind: "text", a: node.b - left, b: node.b });
    }
  }
  while (stack.length > 1) {
    if (open && stack.at(-1).mark.sure) close(stack.pop());
    else drop();
  }
  return root.inner;
}

const TAGS = { strong: "strong", em: "em", del: "del" };

function grow(parent, nodes, show) {
  for (const node of nodes) {
    if (node.kind === "text") show(parent, node.a, node.b);
    else if (node.kind === "br") parent.append(el("br"));
    else if (node.kind === "code") {
      const inner = el("code");
      show(inner, node.a, node.b);
      parent.append(inner);
    } else if (node.kind === "link") {
      const safe = { href: node.url, target: "_blank", rel: "noopener noreferrer nofollow", title: node.url };
      parent.append(grow(node.url ? el("a", safe) : el("span", { class: "coming" }), node.inner, show));
    } else {
      parent.append(grow(el(TAGS[node.kind]), node.inner, show));
    }
  }
  return parent;
}
