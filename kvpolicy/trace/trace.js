"use strict";

const TYPES = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int32: Int32Array, float32: Float32Array };
const KINDS = ["importance", "redundancy", "retention"];
const HELD = ["gone", "h1", "h2", "h3", "h4", "h5", "future"];
const FUTURE = 6;
const SHARES = [0.1, 0.25, 0.5, 0.75]; // of heads, up to which a token has the first four shades
const TO_THE_END = 6;
const BLOCK = 80; // tokens in a block of text at least: blocks out of sight are not laid out
const CELL = 9;

const $ = (id) => document.getElementById(id);
const whole = (n) => Math.round(n).toLocaleString("en-US");
const percent = (x) => `${Math.round(100 * x)}%`;

function el(tag, name, ...children) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...children); // strings become text nodes
  return node;
}

async function unpack(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/** How many of the ascending `numbers` are at most `limit`. */
function atMost(numbers, limit) {
  let low = 0, high = numbers.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] <= limit) low = middle + 1; else high = middle;
  }
  return low;
}

/** How many of the ascending `numbers` are below `limit`. */
function below(numbers, limit) {
  return numbers.filter((number) => number < limit).length;
}

/** One recording: its arrays, its panel, and what the panel shows at present. */
class Trace {
  constructor(data, buffer, number) {
    const array = ([type, place, length]) => new TYPES[type](buffer, place, length);
    this.data = data;
    this.number = number;
    this.seen = data.seen;
    this.at = array(data.compactions);
    this.evicted = array(data.evicted);
    this.heads = []; // of all layers, in the order of the rows of `evicted`
    data.layers.forEach((layer, i) => {
      for (let head = 0; head < data.heads[i]; head++) this.heads.push({ layer, head, column: i });
    });
    this.snapshots = data.snapshots.map((one) => ({
      compaction: one.compaction,
      protected: array(one.protected),
      scores: Object.fromEntries(Object.entries(one.scores).map(([kind, refs]) => [kind, refs.map(array)])),
    }));
    const count = data.texts.length;
    this.special = new Set(data.special);
    this.held = new Uint16Array(count); // selected heads that hold a token now
    this.level = new Uint8Array(count).fill(255);
    this.life = new Uint8Array(count);
    this.now = -1;
    this.width = 0; // of the map, noted when it changes: asking would make the browser lay out the page
    this.picked = -1;
    this.difference = null; // what is shown in place of this recording alone
    this.build();
  }

  build() {
    this.panel = el("section", "panel");
    this.panel.setAttribute("aria-label", `Text under ${this.data.policy}`);
    this.facts = el("p", "facts");
    this.title = el("h2", "", `${this.data.policy}, ${this.data.about}`);
    this.details = el("p", "details", this.data.details);
    this.panel.append(el("header", "", this.title, this.facts, this.details));
    this.map = el("canvas", "map");
    this.map.trace = this;
    this.map.setAttribute("role", "img");
    this.grid = el("canvas", "grid"); // stands in the card
    this.grid.setAttribute("role", "img");
    this.text = el("div", "text");
    this.text.tabIndex = 0;
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-label", "Tokens; the left and right arrow keys go through them");
    this.spans = this.data.texts.map((text, i) => {
      const span = el("span", "k", text.replace(/\n/g, "↵\n"));
      span.dataset.i = i;
      return span;
    });
    this.addPart("prompt", "Prompt", 0, this.data.prompt);
    this.addPart("written", "Continuation", this.data.prompt, this.spans.length);
    this.panel.append(this.map, this.text);
  }

  addPart(name, title, from, to) {
    if (from >= to) return;
    const part = el("div", name, el("p", "part", title));
    for (let start = from, i = from; i < to; i++) {
      const full = i + 1 - start >= BLOCK && this.data.texts[i].endsWith("\n");
      if (full || i + 1 === to) {
        part.append(el("div", "run", ...this.spans.slice(start, i + 1)));
        start = i + 1;
      }
    }
    this.text.append(part);
  }

  select(layer, head) {
    this.rows = this.heads.flatMap((one, r) =>
      (layer === "" || one.layer === +layer) && (head === "" || one.head === +head) ? [r] : []);
  }

  /** For how many tokens head `r` held the entry at `p`. */
  keptFor(r, p) {
    const e = this.evicted[r * this.seen + p];
    return (e === this.data.never ? this.seen : this.at[e - 1]) - p;
  }

  /** For how many tokens the selected heads held `p` on average, and how many of them to the end. */
  meanLife(p) {
    let sum = 0, ended = 0;
    for (const r of this.rows) {
      sum += this.keptFor(r, p);
      ended += this.evicted[r * this.seen + p] === this.data.never;
    }
    return [sum / this.rows.length, ended];
  }

  /** The means of the tokens that a selected head gave up. */
  meanLives() {
    const lives = Array.from({ length: this.seen }, (_, p) => this.meanLife(p));
    return lives.filter(([, ended]) => ended < this.rows.length).map(([mean]) => mean);
  }

  age(bounds) {
    for (let p = 0; p < this.seen; p++) {
      const [mean, ended] = this.meanLife(p);
      this.life[p] = ended === this.rows.length ? TO_THE_END : 1 + atMost(bounds, mean);
    }
  }

  show(tokens, repaint) {
    const seen = Math.min(tokens, this.seen);
    const done = (this.done = atMost(this.at, tokens));
    this.tokens = seen;
    const { held, evicted } = this;
    held.fill(0);
    for (const r of this.rows) {
      for (let p = 0, i = r * this.seen; p < seen; p++, i++) if (evicted[i] > done) held[p]++;
    }
    if (this.difference) this.difference.count();
    const shades = Uint8Array.from({ length: this.rows.length + 1 }, (_, n) => 1 + below(SHARES, n / this.rows.length));
    let total = 0;
    const before = this.now;
    this.now = seen < this.seen ? seen - 1 : -1;
    for (let p = 0; p < this.spans.length; p++) {
      total += this.held[p];
      const level = p >= seen ? FUTURE : this.held[p] && (this.rows.length === 1 ? 5 : shades[this.held[p]]);
      const changed = level !== this.level[p];
      this.level[p] = level;
      if (changed || repaint || ((p === before) !== (p === this.now))) this.paint(p);
    }
    const each = total / this.rows.length;
    this.facts.textContent = this.difference ? this.difference.facts() : this.at.length
      ? `compaction ${whole(done)} of ${whole(this.at.length)} · ${whole(each)} of ${whole(seen)} entries per head (${percent(each / seen)})`
      : `no compaction · ${whole(seen)} entries per head`;
  }

  paint(p) {
    let name = this.difference ? `k ${this.difference.name(p)}` : `k ${HELD[this.level[p]]} t${this.life[p]}`;
    if (this.special.has(p)) name += " special";
    if (p === this.now) name += " now";
    if (p === this.picked) name += " picked";
    this.spans[p].className = name;
  }

  pick(p) {
    const before = this.picked;
    this.picked = p < this.spans.length ? p : -1;
    if (before >= 0) this.paint(before);
    if (this.picked >= 0) this.paint(this.picked);
  }

  draw(colours) {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.round(this.width * ratio)), height = Math.round(46 * ratio);
    if (this.map.width !== width || this.map.height !== height) Object.assign(this.map, { width, height });
    const pen = this.map.getContext("2d"), count = this.spans.length, bar = height - Math.round(10 * ratio);
    pen.clearRect(0, 0, width, height);
    for (let x = 0; x < width; x++) {
      const from = Math.floor((x * count) / width), to = Math.max(from + 1, Math.floor(((x + 1) * count) / width));
      let held = 0;
      for (let p = from; p < to; p++) held += this.held[p];
      const share = held / (to - from) / this.rows.length;
      if (this.difference) continue;
      pen.fillStyle = colours.held;
      pen.fillRect(x, bar * (1 - share), 1, bar * share);
      pen.fillStyle = colours.life[this.life[from]];
      pen.fillRect(x, bar + 3 * ratio, 1, height - bar - 3 * ratio);
    }
    if (this.difference) this.difference.draw(pen, width, bar, colours);
    pen.fillStyle = colours.edge;
    pen.fillRect(0, bar, width, ratio);
    pen.fillStyle = colours.ink;
    pen.fillRect(Math.round((this.data.prompt * width) / count), 0, ratio, bar);
    if (this.now >= 0) pen.fillRect(Math.round(((this.now + 1) * width) / count) - ratio, 0, 2 * ratio, height);
    this.map.setAttribute("aria-label", this.difference
      ? `Share of heads that hold each position after ${whole(this.tokens)} tokens: under both policies, and under either only`
      : `Share of heads that hold each position after ${whole(this.tokens)} tokens, and below it how long they kept it`);
  }

  /** The last scores of an entry up to now: values and ranks over the selected heads that held it. */
  scoresOf(p) {
    for (let n = this.snapshots.length - 1; n >= 0; n--) {
      const snapshot = this.snapshots[n], { compaction } = snapshot;
      if (compaction > this.done || p >= this.at[compaction - 1]) continue;
      const there = this.rows.filter((r) => this.evicted[r * this.seen + p] >= compaction);
      if (there.length) return this.read(snapshot, p, there);
    }
    return null;
  }

  /** Where the entries of each head begin in a snapshot's arrays, counted once. */
  startsOf(snapshot) {
    if (snapshot.starts) return snapshot.starts;
    const { evicted, seen } = this, { compaction } = snapshot, end = this.at[compaction - 1];
    const starts = new Uint32Array(this.heads.length + 1);
    for (let r = 0; r < this.heads.length; r++) {
      let count = 0;
      for (let i = r * seen, stop = i + end; i < stop; i++) if (evicted[i] >= compaction) count++;
      starts[r + 1] = starts[r] + count;
    }
    return (snapshot.starts = starts);
  }

  read(snapshot, p, rows) {
    const { evicted } = this, { compaction } = snapshot, starts = this.startsOf(snapshot);
    const kinds = KINDS.filter((kind) => snapshot.scores[kind]);
    const sums = Object.fromEntries(kinds.map((kind) => [kind, { value: 0, rank: 0 }]));
    let guarded = 0;
    for (const r of rows) {
      const first = starts[r], last = starts[r + 1];
      let at = first;
      for (let i = r * this.seen, stop = i + p; i < stop; i++) if (evicted[i] >= compaction) at++;
      guarded += (snapshot.protected[at >> 3] >> (at & 7)) & 1;
      for (const kind of kinds) {
        const [codes, scales] = snapshot.scores[kind], code = codes[at];
        const low = scales[3 * r], high = scales[3 * r + 1], bend = scales[3 * r + 2];
        let lower = 0;
        for (let i = first; i < last; i++) if (codes[i] < code) lower++;
        sums[kind].value += low + (high - low) * (code / 255) ** (1 / bend);
        sums[kind].rank += last - first > 1 ? lower / (last - first - 1) : 0;
      }
    }
    for (const kind of kinds) {
      sums[kind].value /= rows.length;
      sums[kind].rank /= rows.length;
    }
    return { compaction, tokens: this.at[compaction - 1], heads: rows.length, guarded, scores: sums };
  }
}
