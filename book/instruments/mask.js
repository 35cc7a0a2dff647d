/* Chapter 3: tokens that the reader marks, the mask of training, and the slots of one row of the cache. */
(function () {
  "use strict";
  const api = window.DMS_INSTRUMENTS, { el, svg, slider, segments, sized } = api;
  const TEXT = Array.from("b=4;a=b+1=4+1=5;"), FIRST = [1, 3, 5, 6, 7, 8, 9, 11, 12, 13], WIDEST = 8;

  /* dms_core/visibility.py: does query i see key j? marks: of the token that they are about; token j + lag decides. */
  function visible(marks, window, lag) {
    const evicted = marks.map((marked, j) => marked && j + lag < marks.length);
    return marks.map((_, i) => marks.map((_, j) => j <= i && (i - j <= window || !evicted[j])));
  }

  /* Who holds which slot after each token: one that leaves the window marked gives its slot to the new one. */
  function slots(marks, window) {
    const held = [];
    return marks.map((_, t) => {
      const leaves = t - window - 1, slot = leaves >= 0 && marks[leaves] ? held.indexOf(leaves) : held.length;
      held[slot] = t;
      return held.slice();
    });
  }

  /* What token j is to the row once token t is there. */
  function state(marks, window, lag, j, t) {
    if (j > t) return "none";
    if (t - j > window) return marks[j] ? "gone" : "kept";
    return marks[j] && t >= j + lag ? "warned" : "window";
  }

  function build(root) {
    const now = { marks: TEXT.map((_, j) => FIRST.includes(j)), window: 4, lag: 1, t: TEXT.length - 1 };
    const last = TEXT.length - 1;
    const name = (j) => `${j} “${TEXT[j]}”`;

    const buttons = TEXT.map((text, j) => el("button", {
      type: "button", tabindex: j ? -1 : 0,
      click: () => { now.marks[j] = !now.marks[j]; focus(j); draw(); },
    }, `${text} `, el("small", {}, String(j))));
    function focus(j) {
      buttons.forEach((button, i) => button.setAttribute("tabindex", i === j ? 0 : -1));
      buttons[j].focus();
    }
    const strip = el("div", {
      class: "tokens", role: "toolbar", "aria-label": "Tokens to mark for eviction",
      keydown(event) {
        const at = buttons.indexOf(event.target);
        const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last }[event.key];
        if (to === undefined || at < 0) return;
        event.preventDefault();
        focus(Math.min(Math.max(to, 0), last));
      },
    }, ...buttons);

    const kind = segments("Eviction", [["delayed", "delayed"], ["immediate", "immediate"]], "delayed",
      (value) => setLag(value === "delayed" ? 1 : now.window));
    const window_ = slider({ label: "Window w", min: 0, max: WIDEST, value: now.window }, (value) => {
      const immediate = now.lag === now.window && now.lag !== 1;
      now.window = value;
      setLag(immediate ? value : Math.min(now.lag, value + 1));
    });
    const lag = slider({ label: "Lag ℓ", min: 0, max: now.window + 1, value: now.lag }, (value) => setLag(value));
    const time = slider({ label: "Newest token", min: 0, max: last, value: now.t, show: name }, (value) => { now.t = value; draw(); });
    const step = (by) => () => { now.t = Math.min(Math.max(now.t + by, 0), last); draw(); };
    function setLag(value) {
      now.lag = value;
      draw();
    }

    const mask = el("div"), cache = el("div");
    const said = el("p", { class: "said", "aria-live": "polite" });
    const patch = (colour, text) => el("span", {}, el("i", { style: `background: var(--${colour})` }), text);
    root.append(
      el("div", { class: "controls" }, kind.node, window_.node, lag.node),
      el("fieldset", { class: "controls" }, el("legend", {}, "Mark tokens for eviction"), strip),
      el("div", { class: "controls" }, time.node,
        el("button", { type: "button", click: step(-1) }, "Step back"), el("button", { type: "button", click: step(1) }, "Step")),
      el("div", { class: "panels" },
        el("div", {}, el("p", { class: "head" }, el("b", {}, "Mask"), ": which keys a query (row) sees"), mask),
        el("div", {}, el("p", { class: "head" }, el("b", {}, "Cache"), ": who holds which slot (row)"), cache)),
      el("div", { class: "legend" }, patch("window", "in the window"), patch("warned", "in the window, marked"),
        patch("kept", "kept"), patch("gone", "evicted"),
          el("span", {}, el("i", { class: "dot", style: "background: var(--dot)" }), "the token that decides")),
      said);

    function draw() {
      const { marks, window, t } = now;
      buttons.forEach((button, j) => button.setAttribute("aria-pressed", marks[j]));
      kind.set(now.lag === 1 ? "delayed" : now.lag === window ? "immediate" : null);
      lag.set(now.lag, { max: window + 1 });
      time.set(t);
      paint();
      said.textContent = describe();
    }

    function paint() {
      const { marks, window, lag, t } = now, history = slots(marks, window), width = mask.clientWidth;
      if (!width) return;
      const size = Math.floor(width / (TEXT.length + 1.2)), left = Math.round(size * 1.1), side = left + size * TEXT.length;
      const cell = (kind, x, y, rest) => svg("rect",
        { x: left + x * size + 0.5, y: left + y * size + 0.5, width: size - 1, height: size - 1, rx: 1.5,
        fill: kind === "none" ? "none" : `var(--${kind})`, ...rest });
      const text = (letters, x, y, rest) => svg("text",
        { x: left + (x + 0.5) * size, y: left + (y + 0.5) * size, "text-anchor": "middle", "dominant-baseline": "central", ...rest },
        letters);
      const frame = (x, y, w, h) => svg("rect", { x: left + x * size, y: left + y * size, width: w * size, height: h * size, fill: "none",
        stroke: "var(--ink)", "stroke-width": 2, rx: 2 });
      const picture = (label, parts) => svg("svg",
        { viewBox: `0 0 ${side + 1} ${side + 1}`, role: "img", "aria-label": label, style: "cursor: pointer" }, ...parts);
      const heads = () => TEXT.map((letter, j) => text(letter, j, -0.9));

      const rows = marks.flatMap((_, i) => marks.flatMap((_, j) => {
        const kind = state(marks, window, lag, j, i), faded = i > t ? { opacity: 0.35 } : {};
        return j > i ? [] : [cell(kind, j, i, faded)];
      }));
      const dots = marks.flatMap((marked, j) => marked && j + lag <= last
        ? [svg("circle", { cx: left + (j + 0.5) * size, cy: left + (j + lag + 0.5) * size, r: size / 5, fill: "var(--dot)",
          stroke: "var(--paper)", opacity: j + lag > t ? 0.35 : 1 })] : []);
      const queries = TEXT.map((letter, i) => text(letter, -0.9, i));
      mask.replaceChildren(picture(`Mask for ${TEXT.length} tokens. ${describe()}`,
        [...heads(), ...queries, ...rows, ...dots, frame(0, t, t + 1, 1)]));

      const held = history.flatMap((row, at) => row.flatMap((j, slot) => {
        const kind = state(marks, window, lag, j, at),
          ink = `fill: var(--${kind === "kept" ? "kept" : kind === "warned" ? "warned" : "window"}-ink)`;
        return at > t ? [] : [cell(kind, at, slot), text(TEXT[j], at, slot, { style: ink, "font-size": Math.min(12, size * 0.7) })];
      }));
      const dense = svg("path", { d: `M${left} ${left}` + TEXT.map((_, i) => `V${left + (i + 1) * size}H${left + (i + 1) * size}`).join(""),
        fill: "none", stroke: "var(--soft)", "stroke-dasharray": "3 3" });
      const numbers = TEXT.map((_, slot) => text(String(slot), -0.95, slot, { "font-size": 10 }));
      cache.replaceChildren(picture(`Slots of one row. ${describe()}`,
        [...heads(), ...numbers, dense, ...held, frame(t, 0, 1, history[t].length)]));
      const choose = (part) => (event) => {
        const box = event.currentTarget.firstElementChild.getBoundingClientRect(),
          place = part === "y" ? event.clientY - box.top : event.clientX - box.left;
        now.t = Math.min(Math.max(Math.floor((place - left) / size), 0), last);
        draw();
      };
      mask.onclick = choose("y");
      cache.onclick = choose("x");
    }

    function describe() {
      const { marks, window, lag, t } = now, history = slots(marks, window), held = history[t].length, leaves = t - window - 1;
      const reads = history.slice(0, t + 1).reduce((sum, row) => sum + row.length, 0), dense = ((t + 1) * (t + 2)) / 2;
      const moved = leaves < 0 ? "takes a new slot: the window is not full yet"
        : marks[leaves] ? `takes slot ${history[t].indexOf(t)} over from token ${name(leaves)}, which leaves the window marked`
          : `takes a new slot: token ${name(leaves)} leaves the window, is not marked, and stays`;
      const rest = Math.max(window - lag, 0);
      return `Token ${name(t)} sees ${held} of ${t + 1} and ${moved}. Read so far: ${reads} of ${dense} without eviction. `
        + `Token j + ${lag} decides about token j; ${rest ? `${rest} more ${rest > 1 ? "tokens read" : "token reads"} it after that` : "no later token reads it"}.`;
    }

    draw();
    sized(mask, paint);
  }

  api.mask = { visible, slots, state };
  api.start("mask", build);
})();
