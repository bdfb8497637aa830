const SIDES = ["a", "b", "both"]; // held under the first policy only, the second only, both

/** Two recordings of texts that begin alike, head by head: under which policy an entry is held. */
class Difference {
  constructor(first, second) {
    this.traces = [first, second];
    const [a, b] = [first.data.texts, second.data.texts], most = Math.min(first.seen, second.seen);
    this.same = 0; // tokens that both texts begin with
    while (this.same < most && a[this.same] === b[this.same]) this.same++;
    this.possible = this.same > 0 && first.heads.length === second.heads.length;
    this.counts = SIDES.map(() => new Uint16Array(this.same));
    this.end = 0;
  }

  /** Count for each position the chosen heads on each side, and all of them. */
  count() {
    const [first, second] = this.traces, [a, b, both] = this.counts;
    for (const each of this.counts) each.fill(0);
    this.end = Math.min(this.same, first.tokens, second.tokens);
    for (const r of first.rows) {
      for (let p = 0, i = r * first.seen, j = r * second.seen; p < this.end; p++, i++, j++) {
        const one = first.evicted[i] > first.done, other = second.evicted[j] > second.done;
        if (one && other) both[p]++;
        else if (one) a[p]++;
        else if (other) b[p]++;
      }
    }
    this.totals = this.counts.map((each) => each.reduce((sum, n) => sum + n, 0));
  }

  /** The side that most heads are on, and how many shades it has; null where no head holds it. */
  sideOf(p) {
    const numbers = this.counts.map((each) => each[p]), most = Math.max(...numbers);
    if (!most) return null;
    const share = most / this.traces[0].rows.length;
    return { side: SIDES[numbers.indexOf(most)], shade: share === 1 ? 5 : 1 + below(SHARES, share) };
  }

  /** The class of a token. */
  name(p) {
    if (p >= this.same) return "elsewhere";
    if (p >= this.end) return "future";
    const found = this.sideOf(p);
    return found ? `d-${found.side} d${found.shade}` : "gone";
  }

  facts() {
    const heads = this.traces[0].rows.length, [a, b, both] = this.totals.map((n) => n / heads);
    const names = this.traces.map((trace) => trace.data.policy), all = a + b + both;
    const part = this.same < Math.max(...this.traces.map((trace) => trace.seen))
      ? ` · of the first ${whole(this.same)} tokens, which both texts have` : "";
    return `entries per head: ${whole(a)} only ${names[0]} · ${whole(b)} only ${names[1]} · ${whole(both)} both · ` +
      `overlap ${percent(all ? both / all : 1)}${part}`;
  }

  draw(pen, width, bar, colours) {
    const [first] = this.traces, count = first.spans.length, heads = first.rows.length;
    for (let x = 0; x < width; x++) {
      const from = Math.floor((x * count) / width), to = Math.max(from + 1, Math.floor(((x + 1) * count) / width));
      let low = bar;
      for (const side of [2, 0, 1]) { // both at the bottom
        let sum = 0;
        for (let p = from; p < Math.min(to, this.end); p++) sum += this.counts[side][p];
        const height = (bar * sum) / (to - from) / heads;
        pen.fillStyle = colours.sides[side];
        pen.fillRect(x, low - height, 1, height);
        low -= height;
      }
    }
  }
}

/** One token of the page in words: what its background and its line say. */
function example(page) {
  const [trace] = page.traces, many = trace.rows.length, { difference } = page;
  if (page.differing) {
    const mixed = (p) => SIDES.filter((_, side) => difference.counts[side][p]).length;
    const places = Array.from({ length: difference.end }, (_, p) => p).filter((p) => difference.sideOf(p));
    const p = places.sort((a, b) => mixed(b) - mixed(a) || b - a)[0];
    if (p === undefined) return null;
    const [a, b, both] = difference.counts.map((each) => each[p]), names = page.traces.map((each) => each.data.policy);
    const winner = { a: `only ${names[0]}`, b: `only ${names[1]}`, both: "both" }[difference.sideOf(p).side];
    return { p, text: `of ${many} heads, ${a} hold it under ${names[0]} only, ${b} under ${names[1]} only, ${both} under both. ` +
      `Most are “${winner}”, which gives the colour; how many of all heads that is gives the shade.` };
  }
  const inner = Array.from({ length: trace.tokens }, (_, p) => p).filter((p) => trace.life[p] < TO_THE_END);
  const partly = inner.filter((p) => trace.held[p] && trace.held[p] < many);
  const places = partly.length ? partly : inner.length ? inner : [0], p = places[Math.floor(places.length / 2)];
  if (!trace.tokens) return null;
  const share = trace.held[p] / many, [mean, ended] = trace.meanLife(p);
  const bounds = [...SHARES, 1], shade = trace.level[p];
  const now = many === 1
    ? (trace.held[p] ? "this head holds it now, so it has a background" : "this head has evicted it, so it is grey, without a background")
    : trace.held[p]
      ? `${trace.held[p]} of ${many} heads hold it now, ${percent(share)}: more than ${percent(shade > 1 ? SHARES[shade - 2] : 0)}, ` +
        `at most ${percent(bounds[shade - 1])}, which is shade ${shade} of the background`
      : "no head holds it any more, so it is grey, without a background";
  const line = ended === many
    ? "it was kept to the end, which is a blue line"
    : `it was kept for ${whole(mean)} tokens${many > 1 ? " on average" : ""}, which is shade ${trace.life[p]} of the line`;
  return { p, text: `${now}. From when it came, ${line}.` };
}
