/** The controls, the card, and what ties the panels together. */
class Page {
  constructor(data, buffer) {
    this.same = data.same;
    this.traces = data.traces.map((one, i) => new Trace(one, buffer, i));
    this.longest = Math.max(...this.traces.map((trace) => trace.seen));
    this.steps = [...new Set([...this.traces.flatMap((trace) => [...trace.at]), this.longest])].sort((a, b) => a - b);
    this.bounds = this.boundsOfLife();
    this.difference = this.traces.length > 1 ? new Difference(...this.traces) : null;
    this.differing = false;
    this.picked = null;
    this.pinned = false;
    this.playing = 0;
    $("heading").textContent = data.traces.map((one) => one.policy).join(" and ") + ` on ${data.model}`;
    const [{ data: first, heads }] = this.traces;
    $("about").textContent =
      `${whole(this.longest)} tokens seen, ${first.prompt} of them the prompt · ` +
      `${first.layers.length} layers, ${heads.length} KV heads` + (this.traces.length > 1 && this.same ? " · same text" : "");
    $("made").textContent = data.made;
    $("viewing").hidden = !this.difference?.possible;
    $("main").classList.toggle("two", this.traces.length > 1);
    $("main").prepend(...this.traces.map((trace) => trace.panel));
    this.fillChoices(first);
    this.listen();
    $("slider").max = this.steps.length - 1;
    $("slider").value = this.steps.length - 1;
    $("play").disabled = $("slider").disabled = this.steps.length < 2;
    this.choose();
    this.fillCard();
  }

  /** Four bounds between five shades, so that each has about as many of the tokens that some head gave up. */
  boundsOfLife() {
    const lives = this.traces.flatMap((trace) => {
      trace.select("", "");
      return trace.meanLives();
    });
    lives.sort((a, b) => a - b);
    const bounds = [0.2, 0.4, 0.6, 0.8].map((share) => Number((lives[Math.floor(share * lives.length)] ?? 1).toPrecision(2)));
    return bounds.map((bound, i) => Math.max(Math.round(bound), 1 + i, ...bounds.slice(0, i).map((b, j) => Math.round(b) + i - j)));
  }

  fillChoices(first) {
    const fill = (id, all, numbers, word) => {
      const options = numbers.map((n) => new Option(`${word} ${n}`, n));
      $(id).replaceChildren(new Option(all, ""), ...options);
    };
    fill("layer", "all layers", first.layers, "layer");
    fill("head", "all heads", [...Array(Math.max(...first.heads)).keys()], "head");
  }

  fillLegend() {
    const step = (name, text) => el("span", `k ${name}`, text), single = this.traces[0].rows.length === 1;
    const shares = (name) => [...SHARES, 1].map((share, i) => step(`${name}${i + 1}`, i < 4 ? `≤${percent(share)}` : "more"));
    $("legend").classList.toggle("differing", this.differing);
    $("legend").classList.toggle("single", single);
    $("legend-what").textContent = single ? "the head" : "share of heads that hold it";
    $("legend-heads").replaceChildren(...(single ? [step("h5", "holds it")] : shares("h")));
    $("legend-gone").textContent = this.differing ? "held under neither" : single ? "evicted" : "evicted by all";
    const names = this.traces.map((trace) => trace.data.policy);
    const sides = [`only ${names[0]}`, `only ${names[1]}`, "both"];
    $("legend-sides").replaceChildren(...sides.map((word, i) => step(`d-${SIDES[i]} d4`, word)));
    $("legend-shares").replaceChildren(...shares("d-both d"));
    const words = [...this.bounds.map((bound) => `<${whole(bound)}`), `${whole(this.bounds[3])}+`, "to the end"];
    $("legend-life").replaceChildren(...words.map((word, i) => step(`t${i + 1}`, word)));
  }

  listen() {
    const slider = $("slider");
    slider.addEventListener("input", () => {
      this.stop();
      this.update();
    });
    $("layer").addEventListener("change", () => this.choose());
    $("head").addEventListener("change", () => this.choose());
    $("view").addEventListener("change", () => this.view($("view").value === "difference"));
    $("picture").addEventListener("click", () => savePicture(this));
    $("example").addEventListener("toggle", () => this.fillExample());
    $("play").addEventListener("click", () => (this.playing ? this.stop() : this.play()));
    $("back").addEventListener("click", () => this.move(-1));
    $("on").addEventListener("click", () => this.move(1));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.pinned = false;
    });
    for (const trace of this.traces) {
      const tokenAt = (event) => event.target.closest("[data-i]");
      trace.text.addEventListener("pointerover", (event) => {
        const span = tokenAt(event);
        if (span && !this.pinned && event.pointerType !== "touch") this.pick(trace, +span.dataset.i);
      });
      trace.text.addEventListener("click", (event) => {
        const span = tokenAt(event);
        if (!span) return;
        const again = this.pinned && trace.picked === +span.dataset.i;
        this.pinned = !again;
        this.pick(trace, +span.dataset.i);
      });
      trace.text.addEventListener("keydown", (event) => {
        const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!way) return;
        event.preventDefault();
        this.pinned = true;
        this.goTo(trace, trace.picked < 0 ? 0 : trace.picked + way);
      });
      trace.grid.addEventListener("click", (event) => this.chooseHead(trace, event));
      trace.text.addEventListener("scroll", () => this.follow(trace), { passive: true });
      trace.map.addEventListener("click", (event) => {
        this.pinned = true;
        this.goTo(trace, Math.floor((event.offsetX / trace.width) * trace.spans.length));
      });
    }
    const sizes = new ResizeObserver((entries) => {
      for (const { target, contentRect } of entries) target.trace.width = contentRect.width;
      this.redraw();
    });
    for (const trace of this.traces) sizes.observe(trace.map);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.colours = null;
      this.redraw();
      this.fillCard();
    });
  }

  /** Scroll the other panel along where both show the same text. */
  follow(trace) {
    if (!this.same || this.leading === trace) {
      this.leading = null;
      return;
    }
    for (const other of this.traces) {
      if (other === trace || Math.abs(other.text.scrollTop - trace.text.scrollTop) < 2) continue;
      this.leading = other;
      other.text.scrollTop = trace.text.scrollTop;
    }
  }

  move(by) {
    this.stop();
    $("slider").valueAsNumber += by;
    this.update();
  }

  play() {
    const last = this.steps.length - 1;
    if ($("slider").valueAsNumber >= last) $("slider").value = 0;
    const rate = Math.max(4, last / 15); // steps per second; a long text takes 15 seconds
    let place = $("slider").valueAsNumber, before = performance.now();
    this.label("Pause", "❚❚");
    $("card").setAttribute("aria-live", "off");
    const frame = (now) => {
      place += (rate * (now - before)) / 1000;
      before = now;
      $("slider").value = Math.min(last, Math.floor(place));
      this.render();
      if (place >= last) this.stop();
      else this.playing = requestAnimationFrame(frame);
    };
    this.playing = requestAnimationFrame(frame);
  }

  stop() {
    cancelAnimationFrame(this.playing);
    this.playing = 0;
    this.label("Play", "▶");
    $("card").setAttribute("aria-live", "polite");
  }

  label(word, sign) {
    $("play").setAttribute("aria-label", word);
    $("play").firstElementChild.textContent = sign;
  }

  chooseHead(trace, event) {
    const scale = CELL * (trace.grid.clientWidth / parseFloat(trace.grid.style.width));
    const { layers } = trace.data, column = Math.min(layers.length - 1, Math.floor(event.offsetX / scale));
    $("layer").value = layers[column];
    $("head").value = Math.min(trace.data.heads[column] - 1, Math.floor(event.offsetY / scale));
    this.choose();
  }

  choose() {
    for (const trace of this.traces) {
      trace.select($("layer").value, $("head").value);
      trace.age(this.bounds);
    }
    this.fillLegend();
    this.render(true);
  }

  /** Show the difference of the two policies in the first panel, or what each of them holds in its own. */
  view(differing) {
    const [first, second] = this.traces;
    this.differing = differing;
    first.difference = differing ? this.difference : null;
    first.title.textContent = differing ? `${first.data.policy} against ${second.data.policy}` : `${first.data.policy}, ${first.data.about}`;
    first.details.hidden = differing;
    for (const name of ["two", "differing"]) $("main").classList.toggle(name, differing === (name === "differing"));
    $("main").classList.add("two");
    this.choose();
  }

  fillExample() {
    if (!$("example").open) return;
    const found = example(this), [trace] = this.traces;
    if (!found) {
      $("example-text").textContent = "Move the slider: nothing has been seen yet.";
      return;
    }
    const token = el("span", trace.spans[found.p].className.replace(/ (picked|now)\b/g, ""), JSON.stringify(trace.data.texts[found.p]).slice(1, -1));
    $("example-text").replaceChildren(token, ` at position ${whole(found.p)}, after ${whole(trace.tokens)} tokens: ${found.text}`);
  }

  update() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = null;
      this.render();
    });
  }

  render(repaint = false) {
    const step = $("slider").valueAsNumber, tokens = this.steps[step];
    const [first, ...others] = this.traces;
    for (const trace of others) trace.show(tokens, repaint);
    first.show(tokens, repaint || this.differing); // last: its difference needs the others
    const words = step === this.steps.length - 1 ? `the end, ${whole(tokens)} tokens` : `after ${whole(tokens)} tokens seen`;
    $("moment").textContent = words;
    $("slider").setAttribute("aria-valuetext", words);
    this.redraw();
    this.fillExample();
    this.fillCard();
  }

  redraw() {
    if (!this.colours) {
      const style = getComputedStyle(document.documentElement), value = (name) => style.getPropertyValue(name).trim();
      this.colours = {
        held: `rgb(${value("--held")} / .75)`, edge: value("--edge"), ink: value("--ink"), raised: value("--raised"),
        sides: ["--d-a", "--d-b", "--d-both"].map((name) => `rgb(${value(name)} / .8)`),
        life: [value("--edge"), ...[1, 2, 3, 4, 5].map((n) => value(`--l${n}`)), value("--accent")],
      };
    }
    for (const trace of this.traces) trace.draw(this.colours);
  }

  goTo(trace, p) {
    const place = Math.max(0, Math.min(trace.spans.length - 1, p));
    this.pick(trace, place);
    trace.spans[place].scrollIntoView({ block: "nearest" });
  }

  pick(trace, p) {
    this.picked = { trace, p };
    for (const each of this.traces) each.pick(each === trace || this.same ? p : -1);
    this.asked ??= requestAnimationFrame(() => {
      this.asked = null;
      this.fillCard();
    });
  }

  // -- the card -----------------------------------------------------------------------------------------------------

  fillCard() {
    $("card").classList.toggle("idle", !this.picked);
    if (!this.picked) {
      $("card").replaceChildren(el("p", "hint",
        "Point at a token to see who holds it and what it scored; click or tap to pin it."));
      return;
    }
    const { trace, p } = this.picked;
    const kind = (trace.special.has(p) ? "special token, " : "") + (p < trace.data.prompt ? "prompt" : "continuation");
    const what = el("div", "what",
      el("code", "", JSON.stringify(trace.data.texts[p]).slice(1, -1)),
      el("span", "", `position ${whole(p)}`), el("span", "hint", this.pinned ? `${kind} · pinned` : kind));
    const both = this.same || (this.differing && p < this.difference.same), shown = both ? this.traces : [trace];
    $("card").replaceChildren(what, el("div", "all", ...shown.map((each) => this.fates(each, p))));
  }

  fates(trace, p) {
    const box = el("section", "each");
    if (this.traces.length > 1) box.append(el("h3", "", trace.data.policy));
    if (p >= trace.seen) {
      box.append(el("p", "fate", "The last token has not gone into the cache."));
      return box;
    }
    box.append(...this.fate(trace, p).map((line) => el("p", "fate", line)));
    const found = trace.scoresOf(p);
    const scores = found ? this.table(found) : el("p", "hint", "No scores yet: it came after the last compaction.");
    box.append(el("div", "wide", scores, this.grid(trace, p)));
    return box;
  }

  /** Who holds the entry now, and what became of it. */
  fate(trace, p) {
    const many = trace.rows.length, ends = trace.rows.map((r) => trace.evicted[r * trace.seen + p]);
    const gone = ends.filter((e) => e !== trace.data.never);
    const said = (e) => `compaction ${whole(e)} (${whole(trace.at[e - 1])} tokens)`;
    let first = `Held by ${trace.held[p]} of ${many} heads.`;
    if (p >= trace.tokens) first = "Not seen yet.";
    else if (many === 1) first = trace.held[p] ? "Held." : "Evicted.";
    const mean = trace.rows.reduce((sum, r) => sum + trace.keptFor(r, p), 0) / many;
    const least = Math.min(...gone), most = Math.max(...gone);
    let then = "Kept to the end.";
    if (gone.length) {
      then = least === most ? `Evicted at ${said(least)}` : `Evicted from ${said(least)} to ${said(most)}`;
      if (many > 1) then += gone.length === many ? " by all" : ` by ${gone.length}, kept to the end by ${many - gone.length}`;
      then += many > 1 ? `; held for ${whole(mean)} tokens on average.` : `; held for ${whole(mean)} tokens.`;
    }
    return [first, then];
  }

  table(found) {
    const number = (x) => (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5) ? x.toExponential(2) : x.toPrecision(3));
    const line = (cell, ...words) => el("tr", "", ...words.map((word, i) => el(i ? cell : "th", "", word)));
    const rows = Object.entries(found.scores).map(([kind, { value, rank }]) => {
      const row = line("td", kind, number(value), percent(rank));
      row.dataset.kind = kind;
      row.dataset.value = value;
      return row;
    });
    const where = `At compaction ${whole(found.compaction)} (${whole(found.tokens)} tokens)`;
    const over = found.heads > 1 ? `, mean of ${found.heads} heads` : "";
    const guarded = found.heads > 1 ? `Protected in ${found.guarded} of them.` : "Protected: kept whatever the score.";
    const caption = el("caption", "", where + over);
    const table = el("table", "", caption, el("thead", "", line("th", "", "score", "ranks above")), el("tbody", "", ...rows));
    return el("div", "", table, ...(found.guarded ? [el("p", "hint", guarded)] : []));
  }

  /** A picture of all heads: blue holds the entry now, orange gave it up, darker after a longer time. */
  grid(trace, p) {
    const columns = trace.data.layers.length, lines = Math.max(...trace.data.heads), ratio = window.devicePixelRatio || 1;
    const canvas = trace.grid, pen = canvas.getContext("2d");
    Object.assign(canvas, { width: columns * CELL * ratio, height: lines * CELL * ratio }); // clears it
    Object.assign(canvas.style, { width: `${columns * CELL}px`, height: `${lines * CELL}px` });
    pen.scale(ratio, ratio);
    const chosen = new Set(trace.rows);
    let held = 0;
    trace.heads.forEach(({ head, column }, r) => {
      const there = p < trace.tokens, holds = there && trace.evicted[r * trace.seen + p] > trace.done;
      held += holds;
      const gone = this.colours.life[1 + atMost(this.bounds, trace.keptFor(r, p))];
      pen.globalAlpha = chosen.has(r) ? 1 : 0.3;
      pen.fillStyle = holds ? this.colours.held : there ? gone : this.colours.edge;
      pen.fillRect(column * CELL, head * CELL, CELL - 1, CELL - 1);
    });
    canvas.setAttribute("aria-label", `${held} of ${trace.heads.length} heads of all layers hold it now`);
    return el("div", "", el("h3", "", "Layers across, heads down"), canvas);
  }
}

(async () => {
  try {
    const data = JSON.parse($("data").textContent);
    window.kvpolicyTrace = new Page(data, await unpack(data.blob));
    $("main").setAttribute("aria-busy", "false");
  } catch (error) {
    $("failure").textContent = `The trace cannot be shown: ${error.message}. Use a newer browser, or write the page again.`;
    $("failure").hidden = false;
    throw error;
  }
})();
