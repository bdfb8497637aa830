const LINE = 4; // px of the line below a token, as in the style sheet
const MARGIN = 14;

/** What is in view as an SVG file on white paper: headings, legend, and the tokens in their colours. */
class Picture {
  constructor(page) {
    this.page = page;
    this.parts = [];
    const root = [...document.styleSheets[0].cssRules].find((rule) => rule.selectorText === ":root").style;
    this.value = (name) => root.getPropertyValue(name).trim(); // of light paper, whatever the screen has
    this.pen = document.createElement("canvas").getContext("2d");
  }

  add(tag, attributes, text) {
    const safe = (value) => String(value).replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`)
      .replace(/[\x00-\x08\x0b\x0c\x0e-\x1f]/g, "�");
    const written = Object.entries(attributes).map(([name, value]) => `${name}="${safe(typeof value === "number" ? +value.toFixed(2) : value)}"`);
    this.parts.push(text === undefined ? `<${tag} ${written.join(" ")}/>` : `<${tag} ${written.join(" ")}>${safe(text)}</${tag}>`);
  }

  words(x, y, text, size, more = {}) {
    this.add("text", { x, y, "font-size": size, fill: this.value("--ink"), ...more }, text);
  }

  /** Background and line of a token, by its classes. */
  colours(names) {
    const found = { ink: this.value("--ink") }, has = (name) => names.includes(name);
    const shade = names.find((name) => /^[hd][1-5]$/.test(name)), line = names.find((name) => /^t[1-6]$/.test(name));
    const side = names.find((name) => /^d-/.test(name));
    if (shade) {
      const [r, g, b] = this.value(side ? `--${side}` : "--held").split(" ");
      Object.assign(found, { fill: `rgb(${r},${g},${b})`, opacity: this.value(`--a${shade[1]}`) });
      if (side) Object.assign(found, { line: found.fill, side: side.slice(2) });
    }
    if (line && !side && !has("future") && !has("elsewhere")) found.line = line === "t6" ? this.value("--accent") : this.value(`--l${line[1]}`);
    if (has("gone") || has("future") || has("elsewhere")) found.ink = this.value("--gone");
    return found;
  }

  /** The line below a token: of the difference it is whole, dotted or double, so that it can be told without colour. */
  line(look, x, y, width) {
    if (!look.line) return;
    if (look.side === "b") {
      this.add("path", { d: `M${x.toFixed(2)},${(y + LINE / 2).toFixed(2)}h${width.toFixed(2)}`, stroke: look.line, "stroke-width": LINE, "stroke-dasharray": "4 4" });
    } else if (look.side === "both") {
      for (const below of [0, LINE - 1.3]) this.add("rect", { x, y: y + below, width, height: 1.3, fill: look.line });
    } else this.add("rect", { x, y, width, height: LINE, fill: look.line });
  }

  /** Where the lines of a token stand, each with its text. */
  lines(span) {
    const node = span.firstChild, rects = [...span.getClientRects()];
    if (rects.length < 2) return rects.map((rect) => ({ rect, text: node.data.replace(/\n/g, "") }));
    const range = document.createRange(), texts = rects.map(() => "");
    for (let i = 0; i < node.length; i++) {
      range.setStart(node, i);
      range.setEnd(node, i + 1);
      const { top, bottom } = range.getBoundingClientRect(), middle = (top + bottom) / 2;
      const at = rects.findIndex((rect) => middle >= rect.top && middle <= rect.bottom);
      if (at >= 0 && node.data[i] !== "\n") texts[at] += node.data[i];
    }
    return rects.map((rect, i) => ({ rect, text: texts[i] }));
  }

  token(span, left, top) {
    const look = this.colours([...span.classList]), style = getComputedStyle(span);
    this.pen.font = style.font;
    const size = parseFloat(style.fontSize), { fontBoundingBoxAscent: ascent } = this.pen.measureText("x");
    const pad = parseFloat(style.paddingLeft), above = parseFloat(style.paddingTop);
    for (const { rect, text } of this.lines(span)) {
      const x = rect.left - left, y = rect.top - top;
      if (look.fill) this.add("rect", { x, y, width: rect.width, height: rect.height - LINE, fill: look.fill, "fill-opacity": look.opacity });
      this.line(look, x, y + rect.height - LINE, rect.width);
      if (!text.trim()) continue;
      this.add("text", {
        x: x + pad, y: y + above + ascent, "font-size": size, "font-family": style.fontFamily, fill: look.ink, textLength: rect.width - 2 * pad,
        lengthAdjust: "spacingAndGlyphs", "xml:space": "preserve",
      }, text);
    }
  }

  legend(x, y) {
    for (const scale of document.querySelectorAll("#legend .scale")) {
      if (!scale.checkVisibility()) continue;
      const words = [...scale.childNodes].filter((node) => !node.classList?.contains("steps")).map((node) => node.textContent);
      const steps = [...scale.querySelectorAll(".k")];
      const title = steps.length > 1 || scale.querySelector(".steps") ? words.join("").replace(/\s+/g, " ").trim() : "";
      let at = x;
      if (title) {
        this.words(at, y, title, 11);
        at += 6.2 * title.length + 10;
      }
      for (const step of steps) {
        const look = this.colours([...step.classList]), text = step.textContent, width = 6.4 * text.length + 8;
        if (look.fill) this.add("rect", { x: at, y: y - 11, width, height: 14, fill: look.fill, "fill-opacity": look.opacity });
        this.line(look, at, y + 3, width);
        this.words(at + width / 2, y, text, 11, { "text-anchor": "middle", fill: look.ink });
        at += width + 2;
      }
      if (!title) this.words(at + 4, y, words.filter((word) => !steps.some((step) => step.textContent === word)).join(" ").trim(), 11);
      y += 20;
    }
    return y;
  }

  make() {
    const panels = this.page.traces.filter((trace) => trace.panel.checkVisibility());
    const boxes = panels.map((trace) => trace.text.getBoundingClientRect());
    const stacked = boxes.length > 1 && boxes[1].left < boxes[0].right;
    const width = 2 * MARGIN + (stacked ? Math.max(...boxes.map((box) => box.width)) : boxes.at(-1).right - boxes[0].left);
    let y = MARGIN + 16;
    this.words(MARGIN, y, $("heading").textContent, 16, { "font-weight": 600 });
    for (const line of [$("about").textContent, $("made").textContent, $("moment").textContent].filter(Boolean)) {
      this.words(MARGIN, (y += 17), line, 11, { fill: this.value("--soft") });
    }
    y = this.legend(MARGIN, y + 22) + 4;
    let bottom = y;
    panels.forEach((trace, i) => {
      const box = boxes[i], x = stacked ? MARGIN : MARGIN + box.left - boxes[0].left;
      if (stacked) y = bottom + 10;
      this.words(x, y + 6, trace.title.textContent, 13, { "font-weight": 600 });
      const lines = [trace.facts.textContent, trace.details.hidden ? "" : trace.details.textContent].filter(Boolean);
      lines.forEach((line, n) => this.words(x, y + 22 + 15 * n, line, 11, { fill: this.value("--soft") }));
      const top = y + 16 + 15 * lines.length, inside = { top: Math.max(box.top, 0), bottom: Math.min(box.bottom, innerHeight) };
      let last = inside.top;
      for (const part of trace.text.querySelectorAll(".part")) {
        const rect = part.getBoundingClientRect();
        if (rect.top < inside.top || rect.bottom > inside.bottom) continue;
        this.words(x + rect.left - box.left, top + rect.bottom - inside.top - 4, part.textContent.toUpperCase(), 10, { fill: this.value("--soft") });
      }
      for (const span of trace.spans) {
        const rect = span.getBoundingClientRect();
        if (rect.bottom <= inside.top + 2 || rect.bottom > inside.bottom || !rect.width) continue;
        this.token(span, box.left - x, inside.top - top);
        last = Math.max(last, rect.bottom);
      }
      bottom = Math.max(bottom, top + last - inside.top);
    });
    const height = bottom + MARGIN;
    return `<?xml version="1.0" encoding="UTF-8"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="${Math.ceil(width)}" height="${Math.ceil(height)}" ` +
      `viewBox="0 0 ${Math.ceil(width)} ${Math.ceil(height)}" font-family="system-ui, 'DejaVu Sans', sans-serif">\n` +
      `<rect width="100%" height="100%" fill="#ffffff"/>\n${this.parts.join("\n")}\n</svg>\n`;
  }
}

function savePicture(page) {
  const address = URL.createObjectURL(new Blob([new Picture(page).make()], { type: "image/svg+xml" }));
  const link = el("a");
  link.href = address;
  link.download = `${page.traces.map((trace) => trace.data.policy).join("-")}.svg`.replace(/[^\w.-]+/g, "-");
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
