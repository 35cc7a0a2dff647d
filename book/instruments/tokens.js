/* Chapter 8: the tokens of a text, the stronger coloured the more rows keep it: all rows, or one (layer, KV head). */
(function () {
  "use strict";
  const api = window.DMS_INSTRUMENTS, { el, svg, slider, segments, sized } = api;

  /* How many rows keep each token. kept: a bit string a row, heads of layer 0 first; row: one of them, or null for all. */
  function counts(kept, row) {
    const rows = row === null ? kept : [kept[row]];
    return Array.from(kept[0], (_, t) => rows.reduce((sum, bits) => sum + (bits[t] === "1"), 0));
  }

  function build(root, data) {
    const { tokens, special, layers, heads, kept, marked } = data, now = { all: true, layer: 0, head: 0 };
    const shares = kept.map((bits) => bits.split("1").length - 1).map((n) => n / tokens.length);
    const percent = (share) => `${(100 * share).toFixed(1)} %`;
    const choose = (changes) => {
      Object.assign(now, changes);
      which.set(now.all ? "all" : "one");
      layer.set(now.layer);
      head.set(now.head);
      draw();
    };
    const which = segments("Kept by", [["all", "all rows"], ["one", "one row"]], "all", (value) => choose({ all: value === "all" }));
    const layer = slider({ label: "Layer", min: 0, max: layers - 1, value: 0 }, (value) => choose({ layer: value, all: false }));
    const head = slider({ label: "KV head", min: 0, max: heads - 1, value: 0 }, (value) => choose({ head: value, all: false }));
    const visible = (text) => text.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t");
    const spans = tokens.map((text, t) => el("span",
      { class: [special[t] === "1" && "special", marked.includes(t) && "marked"].filter(Boolean).join(" ") || null }, visible(text)));
    const map = el("div"), said = el("p", { class: "said", "aria-live": "polite" });
    root.append(
      el("div", { class: "controls" }, which.node, layer.node, head.node),
      el("p", { class: "head" }, "Share that each row keeps; choose a row by a click"), map, said,
      el("div", { class: "text", tabindex: 0, role: "group", "aria-label": "The text" }, ...spans),
      el("div", { class: "legend" }, el("span", {}, el("i", { style: "background: var(--fill)" }), "kept by all"),
        el("span", {}, el("i", { style: "border: 1px dashed var(--soft)" }), "special token"),
        ...(marked.length ? [el("span", {}, el("i", { style: "border: 2px solid var(--marked)" }), "what was to be remembered")] : [])));

    function drawMap(width) {
      const left = 42, cell = (width - left) / layers, height = 20;
      const cells = kept.map((_, row) => {
        const [l, h] = [Math.floor(row / heads), row % heads], chosen = !now.all && l === now.layer && h === now.head;
        return svg("g", { style: "cursor: pointer", click: () => choose({ layer: l, head: h, all: false }) },
          svg("rect", { x: left + l * cell, y: h * height, width: cell, height, fill: "var(--card)" }),
          svg("rect", { x: left + l * cell, y: (h + 1 - shares[row]) * height, width: cell, height: shares[row] * height, fill: "var(--dms)" }),
          svg("rect", { x: left + l * cell, y: h * height, width: cell, height, fill: "none",
            stroke: chosen ? "var(--marked)" : "var(--line)", "stroke-width": chosen ? 3 : 1 }));
      });
      const names = Array.from({ length: heads }, (_, h) => svg("text", { x: 0, y: (h + 0.5) * height, "dominant-baseline": "central" }, `head ${h}`));
      const step = Math.max(1, Math.ceil(layers / Math.floor((width - left) / 40)));
      const ticks = Array.from({ length: layers }, (_, l) => l).filter((l) => l % step === 0)
        .map((l) => svg("text", { x: left + (l + 0.5) * cell, y: heads * height + 14, "text-anchor": "middle" }, String(l)));
      map.replaceChildren(svg("svg", { viewBox: `0 0 ${width} ${heads * height + 18}`, role: "img",
        "aria-label": `Share of the text that each of ${layers} layers and ${heads} KV heads keeps` }, ...cells, ...names, ...ticks));
    }

    function draw() {
      const row = now.all ? null : now.layer * heads + now.head, of = now.all ? kept.length : 1, kept_ = counts(kept, row);
      kept_.forEach((n, t) => {
        spans[t].style.backgroundColor = `color-mix(in srgb, var(--fill) ${Math.round((100 * n) / of)}%, var(--paper))`;
        spans[t].title = now.all ? `kept by ${n} of ${of} rows` : n ? "kept" : "evicted";
      });
      const total = kept_.reduce((a, b) => a + b, 0), whose = now.all ? `All ${of} rows together keep` : `Layer ${now.layer}, KV head ${now.head} keeps`;
      const held = marked.length ? ` Of the ${marked.length} tokens to be remembered: ${marked.reduce((sum, t) => sum + kept_[t], 0)} of ${marked.length * of}.` : "";
      said.textContent = `${whose} ${percent(total / of / tokens.length)} of ${tokens.length} tokens, window aside.${held}`;
      if (map.clientWidth) drawMap(map.clientWidth);
    }

    draw();
    sized(map, draw);
  }

  api.tokens = { counts };
  api.start("tokens", build);
})();
