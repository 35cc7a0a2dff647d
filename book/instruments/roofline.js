/* Chapter 1: what a decode step costs by the roofline model, dense and with DMS. */
(function () {
  "use strict";
  const api = window.DMS_INSTRUMENTS, { el, svg, slider, choice, scale, line, number, sized } = api;

  /* companion/cost/roofline.py and planner.py, with an architecture's layers as {count, weights, cached, ...}. */
  const sum = (arch, of) => arch.kinds.reduce((total, kind) => total + kind.count * of(kind), 0);
  const items = (kind, context, cr) => (kind.evicts ? context / cr : Math.min(context, kind.limit || context));
  const experts = (kind, batch) => (kind.experts ? kind.experts * (1 - (1 - kind.chosen / kind.experts) ** batch) : 0);
  const kvBytes = (arch, batch, context, cr) => batch * sum(arch, (kind) => 2 * kind.cached * items(kind, context, cr) + kind.state);
  const weightBytes = (arch, batch) => 2 * (sum(arch,
    (kind) => kind.weights + experts(kind, batch) * kind.expert) + arch.hidden * arch.vocabulary);
  const flops = (arch, batch, context, cr) => batch * (2 * arch.hidden * arch.vocabulary
    + sum(arch, (kind) => 2 * (kind.weights + kind.chosen * kind.expert + kind.attended * items(kind, context, cr)) + kind.state));

  function plan(arch, device, batch, context, cr, reserved) {
    const weights = weightBytes(arch, batch), cache = kvBytes(arch, batch, context, cr), work = flops(arch, batch, context, cr);
    const seconds = Math.max(work / device.flops, (weights + cache) / device.bandwidth);
    const room = (1 - reserved) * device.memory - 2 * arch.parameters;
    return {
      parameters: arch.parameters, weight_bytes: weights, kv_bytes: cache, kv_bytes_dense: kvBytes(arch, batch, context, 1), flops: work,
      read_bytes: weights + cache, latency_s: seconds, tokens_per_s: batch / seconds, kv_latency_share: cache / (weights + cache),
      largest_batch: Math.max(Math.floor(room / kvBytes(arch, 1, context, cr)), 0),
    };
  }

  const size = (context) => (context >= 1024 ? `${context / 1024}K` : String(context));
  const gigabytes = (bytes) => `${number(bytes / 1e9)} GB`;
  const times = (x) => (x >= 9.95 ? x.toFixed(0) : x.toFixed(1));

  function build(root, data) {
    const now = { model: data.model, device: data.device, batch: 64, context: 32768, cr: 8 };
    const power = (value) => 2 ** value;
    const choose = (name, of = (x) => x) => (value) => { now[name] = of(value); draw(); };
    const names = (table) => Object.keys(table).map((name) => [name, name]);
    const bars = el("div"), roof = el("div"), table = el("div"), said = el("p", { class: "said", "aria-live": "polite" });
    const patch = (colour, text) => el("span", {}, el("i", { style: `background: var(--${colour})` }), text);
    root.append(
      el("div", { class: "controls" }, choice("Model", names(data.models), now.model, choose("model")).node,
        choice("Device", names(data.devices), now.device, choose("device")).node),
      el("div", { class: "controls" },
        slider({ label: "Batch", min: 0, max: 9, value: 6, show: (x) => String(power(x)) }, choose("batch", power)).node,
        slider({ label: "Context", min: 10, max: 17, value: 15, show: (x) => size(power(x)) }, choose("context", power)).node,
        slider({ label: "Compression ratio", min: 1, max: 16, value: now.cr }, choose("cr")).node),
      el("div", {}, bars),
      el("div", { class: "legend" }, patch("weights", "weights"), patch("dense", "cache, dense"), patch("dms", "cache, DMS"),
        el("span", {}, el("i", { class: "stroke", style: "border-color: var(--bad); border-top-style: dashed" }), "what the card holds")),
      el("div", { style: "margin-top: 12px" }, el("p", { class: "head" }, el("b", {}, "Roofline"),
        ": operations a second within reach, by operations per byte read"), roof),
      table, said,
      el("p", { class: "note" }, `A bound, not a measurement. 2 bytes a value; ${Math.round(100 * data.reserved)} % of the card's memory is left free. One step writes a token for each sequence.`));

    function plans() {
      return [1, now.cr].map((cr) => plan(data.models[now.model], data.devices[now.device], now.batch, now.context, cr, data.reserved));
    }

    function draw() {
      const both = plans(), text = describe(both);
      paintBars(both, text);
      paintRoof(both, text);
      paintTable(both);
      said.textContent = text;
    }

    /* Two pairs of bars: seconds of a step by what is read, and bytes that the card must hold. */
    function paintBars(both, text) {
      const width = bars.clientWidth, device = data.devices[now.device], right = width - 62;
      if (!width) return;
      const seconds = (p) => [p.weight_bytes / device.bandwidth, p.kv_bytes / device.bandwidth],
        bytes = (p) => [2 * p.parameters, p.kv_bytes];
      const parts = [], words = []; // words over all else
      const group = (title, top, of, most, show, limit) => {
        const x = scale(0, most, 48, right);
        parts.push(svg("text", { x: 0, y: top + 10, class: "value" }, title));
        both.forEach((p, i) => {
          const y = top + 18 + 26 * i, [weights, cache] = of(p), colour = i ? "dms" : "dense";
          parts.push(svg("text", { x: 0, y: y + 15 }, i ? "DMS" : "dense"));
          parts.push(svg("rect", { x: x(0), y, width: x(weights) - x(0), height: 20, fill: "var(--weights)" }));
          parts.push(svg("rect", { x: x(weights), y, width: x(weights + cache) - x(weights), height: 20, fill: `var(--${colour})` }));
          words.push(svg("text", { x: x(weights + cache) + 6, y: y + 15, class: "value over" }, show(p)));
        });
        const upright = { x1: x(limit), x2: x(limit), y1: top + 14, y2: top + 70 };
        if (limit) parts.push(svg("line", { ...upright, stroke: "var(--paper)", "stroke-width": 5 }),
          svg("line", { ...upright, stroke: "var(--bad)", "stroke-width": 2, "stroke-dasharray": "5 3" }));
      };
      group("Time of a step", 0, seconds, Math.max(...both.map((p) => p.latency_s)), (p) => `${number(1e3 * p.latency_s)} ms`);
      group("Memory", 84, bytes, Math.max(device.memory, ...both.map((p) => 2 * p.parameters + p.kv_bytes)),
        (p) => gigabytes(2 * p.parameters + p.kv_bytes), device.memory);
      bars.replaceChildren(svg("svg", { viewBox: `0 0 ${width} 158`, role: "img", "aria-label": `Time and memory. ${text}` }, ...parts,
        ...words));
    }

    function paintRoof(both, text) {
      const width = roof.clientWidth, height = 150, device = data.devices[now.device], ridge = device.flops / device.bandwidth;
      if (!width) return;
      const x = scale(0.5, 2048, 62, width - 16, true), y = scale(device.bandwidth / 2, device.flops * 1.6, height - 34, 6, true);
      const attained = (intensity) => Math.min(device.flops, intensity * device.bandwidth);
      const ticks = [1, 4, 16, 64, 256, 1024].map((v) => svg("text", { x: x(v), y: height - 18, "text-anchor": "middle" }, String(v)));
      const rates = [1e12, 1e13, 1e14, 1e15].filter((v) => v >= device.bandwidth / 2 && v <= device.flops * 1.6).flatMap((v) => [
        svg("line", { x1: x(0.5), x2: width - 16, y1: y(v), y2: y(v), stroke: "var(--line)" }),
        svg("text", { x: 56, y: y(v), "text-anchor": "end", "dominant-baseline": "central" }, `${v / 1e12} T/s`)]);
      const dots = both.map((p, i) => {
        const at = { cx: x(p.flops / p.read_bytes), cy: y(attained(p.flops / p.read_bytes)) };
        return svg(i ? "rect" : "circle", { ...at, r: 6, x: at.cx - 5, y: at.cy - 5, width: 10, height: 10,
          fill: `var(--${i ? "dms" : "dense"})`, stroke: "var(--paper)", "stroke-width": 1.5 });
      });
      roof.replaceChildren(svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Roofline. ${text}` }, ...rates,
        ...ticks,
        svg("text", { x: (62 + width - 16) / 2, y: height - 3, "text-anchor": "middle" }, "operations per byte"),
        svg("path", { d: line([0.5, ridge, 2048].map((v) => [x(v), y(attained(v))])), fill: "none", stroke: "var(--soft)",
          "stroke-width": 2 }), ...dots));
    }

    function paintTable(both) {
      const device = data.devices[now.device], [dense, dms] = both;
      const fits = (p) => (2 * p.parameters + p.kv_bytes <= (1 - data.reserved) * device.memory ? "yes" : el("span", { class: "bad" },
        "no"));
      const rows = [
        ["time of a step", ...both.map((p) => `${number(1e3 * p.latency_s)} ms`), `${times(dense.latency_s / dms.latency_s)}×`],
        ["tokens a second", ...both.map((p) => number(p.tokens_per_s)), `${times(dms.tokens_per_s / dense.tokens_per_s)}×`],
        ["reads that are cache", ...both.map((p) => `${(100 * p.kv_latency_share).toFixed(0)} %`), ""],
        ["cache", ...both.map((p) => gigabytes(p.kv_bytes)), `${times(dense.kv_bytes / dms.kv_bytes)}×`],
        ["fits on one card", ...both.map(fits), ""],
        ["sequences that fit", ...both.map((p) => number(p.largest_batch)),
          dense.largest_batch ? `${times(dms.largest_batch / dense.largest_batch)}×` : ""]];
      table.replaceChildren(el("table", {}, el("thead", {},
        el("tr", {}, ...["", "dense", `DMS, CR ${now.cr}`,
        "better by"].map((text) => (text ? el("th", { scope: "col" }, text) : el("td"))))),
        el("tbody", {}, ...rows.map(([head, ...cells]) => el("tr", {}, el("th", { scope: "row" }, head),
          ...cells.map((cell) => el("td", {}, cell)))))));
    }

    function describe([dense, dms]) {
      const device = data.devices[now.device], per = dms.flops / dms.read_bytes, ridge = device.flops / device.bandwidth;
      return `${now.model} on one ${now.device}, ${now.batch} sequences of ${size(now.context)}: a step takes ${number(1e3 * dense.latency_s)} ms dense and ${number(1e3 * dms.latency_s)} ms with DMS at CR ${now.cr}. `
        + `With DMS it does ${number(per)} operations per byte and is bound by ${per < ridge ? "reading" : "arithmetic"}: the card is balanced at ${number(ridge)}.`;
    }

    draw();
    sized(bars, draw);
  }

  api.roofline = { plan };
  api.start("roofline", build);
})();
