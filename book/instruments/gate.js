/* Chapter 2: a logit, its noise and a temperature, and what the count and the attention of training make of them. */
(function () {
  "use strict";
  const api = window.DMS_INSTRUMENTS, { el, svg, slider, scale, line, minus, sized } = api;
  const RANGE = 6, DRAWS = 60, STEPS = 600;

  const sigmoid = (x) => (x < 0 ? Math.exp(x) / (1 + Math.exp(x)) : 1 / (1 + Math.exp(-x)));

  /* dms_core/noise.py: the logistic distribution's quantile at u. */
  function noise(u) {
    const within = Math.min(Math.max(u, 1e-6), 1 - 1e-6);
    return Math.log(within) - Math.log1p(-within);
  }

  /* dms_core/gate.py, soft_decisions, with its gradients in z. share: the key's part of the attention without a bias. */
  function gate(z, g, tau, share) {
    const shifted = (z + g) / tau, alpha = sigmoid(shifted), left = sigmoid(-shifted);
    const beta = -Math.max(shifted, 0) - Math.log1p(Math.exp(-Math.abs(shifted)));
    const p = (share * left) / (1 - share + share * left); // of the attention, under the bias
    return {
      alpha, beta, hard: shifted > 0 ? 1 : 0, probability: sigmoid(z), share: p,
      countSlope: (alpha * left) / tau, // of the straight-through estimator
      biasSlope: -alpha / tau,
      shareSlope: (-p * (1 - p) * alpha) / tau,
    };
  }

  function build(root) {
    const now = { z: -0.1, g: 0, tau: 0.1, share: 0.5 };
    const set = (name) => (value) => { now[name] = name === "tau" ? 10 ** value : name === "share" ? value / 100 : value; draw(); };
    const nats = (x) => minus(x, 1);
    const z = slider({ label: "Logit z", min: -RANGE, max: RANGE, step: 0.1, value: now.z, show: nats }, set("z"));
    const g = slider({ label: "Noise g", min: -RANGE, max: RANGE, step: 0.1, value: now.g, show: nats }, set("g"));
    const tau = slider({ label: "Temperature τ", min: -1.3, max: 0.3, step: 0.05, value: -1, show: (x) => (10 ** x).toPrecision(2) },
      set("tau"));
    const share = slider({ label: "Attention to the key, unbiased", min: 1, max: 99, value: 50, show: (x) => `${x} %` }, set("share"));
    const jump = (draw_) => () => {
      g.set(Math.min(Math.max(draw_(), -RANGE), RANGE));
      set("g")(g.value);
    };
    const value = el("div"), slope = el("div"), said = el("p", { class: "said", "aria-live": "polite" });
    const stroke = (colour, dash, text) => el("span", {},
      el("i", { class: "stroke", style: `border-color: var(--${colour}); border-top-style: ${dash}` }), text);
    root.append(
      el("div", { class: "controls" }, z.node, tau.node),
      el("div", { class: "controls" }, g.node, share.node),
      el("div", { class: "controls" }, el("button", { type: "button", click: jump(() => noise(Math.random())) }, "Draw noise"),
        el("button", { type: "button", click: jump(() => 0) }, "No noise")),
      el("div", { class: "panels" },
        el("div", {}, el("p", { class: "head" }, el("b", {}, "Decision"), " against z; at the right, 60 draws"), value,
          el("div", { class: "legend" }, stroke("dms", "solid", "soft α"), stroke("dense", "dashed", "hard"),
            stroke("soft", "dotted", "chance to evict"))),
        el("div", {}, el("p", { class: "head" }, el("b", {}, "Gradient"), " in z"), slope,
          el("div", { class: "legend" }, stroke("dense", "dashed", "count (straight-through)"), stroke("dms", "solid", "bias β"),
            stroke("marked", "solid", "the key’s attention")))),
      said);

    function plot(box, levels, curves, dots, label, rest) {
      const width = box.clientWidth, height = Math.round(Math.min(220, 0.62 * width));
      if (!width) return;
      const [low, high] = [levels[0], levels.at(-1)], x = scale(-RANGE, RANGE, 34, width - 14), y = scale(low, high, height - 34, 8),
        zs = Array.from({ length: STEPS + 1 }, (_, i) => -RANGE + (2 * RANGE * i) / STEPS);
      const tick = (at, text, where) => svg("text", { ...at, ...where }, text);
      const grid = levels.flatMap((v) => [
        svg("line", { x1: x(-RANGE), x2: x(RANGE), y1: y(v), y2: y(v), stroke: "var(--line)" }),
        tick({ x: 29, y: y(v) }, minus(v, Math.abs(high - low) < 4 ? 2 : 1).replace(/\.?0+$/, ""),
          { "text-anchor": "end", "dominant-baseline": "central" })]);
      const ticks = [-6, -3, 0, 3, 6].map((v) => tick({ x: x(v), y: height - 18 }, minus(v, 0), { "text-anchor": "middle" }));
      const at = svg("line", { x1: x(now.z), x2: x(now.z), y1: y(low), y2: y(high), stroke: "var(--soft)" });
      const paths = curves.map(([of, colour, dash]) => svg("path",
        { d: line(zs.map((v) => [x(v), y(of(v))])), fill: "none", stroke: `var(--${colour})`, "stroke-width": 2,
        "stroke-dasharray": dash }));
      const marks = dots.map(([v, colour]) => svg("circle",
        { cx: x(now.z), cy: y(v), r: 4.5, fill: `var(--${colour})`, stroke: "var(--paper)", "stroke-width": 1.5 }));
      box.replaceChildren(svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
        ...grid, ...ticks, tick({ x: (x(-RANGE) + x(RANGE)) / 2, y: height - 3 }, "z (nats)", { "text-anchor": "middle" }), at, ...paths,
          ...(rest ? rest(x, y) : []), ...marks));
    }

    function draw() {
      const { g, tau, share } = now, here = gate(now.z, g, tau, share), of = (name) => (v) => gate(v, g, tau, share)[name];
      const rug = (x, y) => Array.from({ length: DRAWS }, (_, i) => gate(now.z, noise((i + 0.5) / DRAWS), tau, share).alpha)
        .map((alpha) => svg("line", { x1: x(RANGE) + 2, x2: x(RANGE) + 12, y1: y(alpha), y2: y(alpha), stroke: "var(--dms)",
          opacity: 0.4 }));
      const text = describe(here);
      plot(value, [0, 0.5, 1], [[of("probability"), "soft", "2 4"], [of("alpha"), "dms", null], [of("hard"), "dense", "6 4"]],
        [[here.hard, "dense"], [here.alpha, "dms"]], `Decision. ${text}`, rug);
      plot(slope, [-1, -0.5, 0, 0.5].map((part) => part / tau),
        [[of("countSlope"), "dense", "6 4"], [of("biasSlope"), "dms", null], [of("shareSlope"), "marked", null]],
        [[here.countSlope, "dense"], [here.biasSlope, "dms"], [here.shareSlope, "marked"]], `Gradient. ${text}`);
      said.textContent = text;
    }

    function describe(here) {
      const short = (x) => minus(x, 3);
      return `α = ${short(here.alpha)}, so the count says ${here.hard ? "evict" : "keep"}; β = ${minus(here.beta, here.beta < -99 ? 0 : 2)}, and the key has ${(100 * here.share).toFixed(1)} % of the attention. `
        + `Gradients in z: count ${short(here.countSlope)}, bias ${short(here.biasSlope)}, attention to the key ${short(here.shareSlope)}. `
        + `Over all noise, ${(100 * here.probability).toFixed(1)} % of draws evict at this z, at any τ.`;
    }

    draw();
    sized(value, draw);
  }

  api.gate = { gate, noise };
  api.start("gate", build);
})();
