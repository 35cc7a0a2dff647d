/* Chapter 6: a line at a budget over the frontiers, what is best at it, and the margin from a start that can be moved. */
(function () {
  "use strict";
  const api = window.DMS_INSTRUMENTS, { el, svg, slider, segments, choice, scale, line, number, signed, sized } = api;
  const AXES = { reads: "KV reads", peak: "peak tokens", seconds: "seconds" }, DENSE = "vanilla", TICKS = 1000;

  /* dms_core/budgets/pareto.py: vertices of the best accuracy at each budget. points: pairs [budget, accuracy]. */
  function frontier(points) {
    const sorted = points.slice().sort((a, b) => a[0] - b[0] || b[1] - a[1]), found = [];
    for (const point of sorted) if (!found.length || point[1] > found.at(-1)[1]) found.push(point);
    return found;
  }

  /* A frontier's height, linear between its vertices in budget or its log2, flat beyond its ends. */
  function height(vertices, budget, log) {
    const of = log ? Math.log2 : (x) => x, next = vertices.findIndex(([x]) => x > budget);
    if (next === 0) return vertices[0][1];
    if (next < 0) return vertices.at(-1)[1];
    const [[x0, y0], [x1, y1]] = [vertices[next - 1], vertices[next]];
    return y0 + ((y1 - y0) * (of(budget) - of(x0))) / (of(x1) - of(x0));
  }

  /* Mean lead of a over b from one budget to another; null where there is none between. */
  function margin(a, b, log, from, to) {
    if (from > to) return null;
    const of = log ? Math.log2 : (x) => x, lead = (x) => height(a, x, log) - height(b, x, log);
    if (from === to) return lead(from);
    const inner = [...a, ...b].map(([x]) => x).filter((x) => x > from && x < to).sort((x, y) => x - y), at = [from, ...inner, to];
    let area = 0;
    for (let i = 1; i < at.length; i++) area += ((lead(at[i - 1]) + lead(at[i])) / 2) * (of(at[i]) - of(at[i - 1]));
    return area / (of(to) - of(from));
  }

  const common = (a, b) => [Math.max(a[0][0], b[0][0]), Math.min(a.at(-1)[0], b.at(-1)[0])];

  /* dms_core/budgets/headline.py: the most accurate measured configuration that costs no more, of equals the cheapest. */
  function best(points, axis, budget) {
    let found = null;
    for (const point of points) {
      if (point[axis] > budget) continue;
      const ahead = found ? point.accuracy - found.accuracy || found[axis] - point[axis] : 1;
      if (ahead > 0) found = point;
    }
    return found;
  }

  const spell = (point) => `${point.W}-${point.L}${point.cr > 1 ? `-${point.cr}` : ""}`;

  function build(root, data) {
    const points = data.points.map((row) => Object.fromEntries(data.columns.map((column, i) => [column, row[i]])));
    const tasks = [...new Set(points.map((point) => point.task))], axes = Object.keys(AXES).filter((axis) => axis in points[0]);
    const curves = [...new Set(points.filter((point) => point.method !== DENSE).map((point) => point.method))].flatMap((method) => {
      const crs = [...new Set(points.filter((point) => point.method === method).map((point) => point.cr))], label = data.labels[method];
      return [[method, crs.length > 1 ? `${label}, all ratios` : label],
        ...(crs.length > 1 ? crs.map((cr) => [`${method} ${cr}`, `${label}, CR ${cr}`]) : [])];
    });
    const now = { task: tasks.includes("search") ? "search" : tasks[0], axis: axes[0], log: true, curve: curves[0][0] };
    const chart = el("div", { class: "drag" }), said = el("p", { class: "said", "aria-live": "polite" }),
      marginSaid = el("p", { class: "said", "aria-live": "polite" });
    const unit = () => AXES[now.axis], cost = (x) => `${number(x)} ${unit()}`;
    const along = (label, name) => slider({ label, min: 0, max: TICKS, value: 0, show: () => number(now[name] ?? 0) }, (value) => {
      now[name] = view().ends.invert(value);
      draw();
    });
    const budget = along("Budget", "budget"), start = along("Margin from", "start");
    const change = (name) => (value) => { now[name] = value; reset(); };
    const ended = el("button", { type: "button", click: () => { now.start = half(); draw(); } }, "From where half of the dense chains end");
    root.append(
      el("div", { class: "controls" },
        tasks.length > 1 ? segments("Task", tasks.map((task) => [task, task]), now.task, change("task")).node : "",
        segments("Budget counts", axes.map((axis) => [axis, AXES[axis]]), now.axis, change("axis")).node,
        segments("Axis", [[true, "log"], [false, "linear"]], now.log, (value) => { now.log = value; draw(); }).node,
        choice("Compared with dense", curves, now.curve, change("curve")).node),
      el("div", {}, el("p", { class: "head" }, el("b", {}, "Accuracy"), " (%), every measured configuration, and the frontiers"), chart),
      el("div", { class: "legend" }, el("span", {}, el("i", { class: "stroke", style: "border-color: var(--dense)" }), "dense"),
        el("span", {}, el("i", { class: "stroke", style: "border-color: var(--dms)" }), "compressed"),
        el("span", {}, el("i", { class: "stroke", style: "border-color: var(--marked)" }), "budget: drag it"),
        el("span", {}, el("i", { class: "stroke", style: "border-color: var(--soft); border-top-style: dashed" }),
          "start of the margin: drag it")),
      el("div", { class: "controls", style: "margin: 12px 0 0" }, budget.node, start.node, ended),
      said, marginSaid);

    function pick() {
      const [method, cr] = now.curve.split(" "), own = points.filter((point) => point.task === now.task);
      const dense = own.filter((point) => point.method === DENSE),
        other = own.filter((point) => point.method === method && (!cr || point.cr === +cr));
      const curve = (rows) => frontier(rows.map((point) => [point[now.axis], point.accuracy]));
      const a = curve(other), b = curve(dense), [low, high] = common(a, b);
      return { dense, other, a, b, low, high };
    }
    const half = () => data.half_ended[`${now.task ?? ""} ${now.axis}`] ?? null;

    function reset() {
      now.of = pick();
      const longest = Math.max(...now.of.dense.map((point) => point.L));
      now.budget = now.of.dense.find((point) => point.L === longest && point.W === 1)?.[now.axis] ?? now.of.high;
      now.start = now.of.low;
      draw();
    }

    /* The chart's scales at its present width. */
    function view() {
      const width = chart.clientWidth || 600, tall = Math.round(Math.min(340, Math.max(230, 0.55 * width))), { dense, other } = now.of;
      const costs = [...dense, ...other].map((point) => point[now.axis]), low = Math.min(...costs), high = Math.max(...costs),
        room = now.log ? (high / low) ** 0.03 : 1;
      const from = now.log ? low / room : 0, to = now.log ? high * room : high * 1.03, x = scale(from, to, 40, width - 8, now.log);
      const ends = scale(from, to, 0, TICKS, now.log); // places of the sliders
      return { width, tall, from, to, least: now.log ? from : low / 2, chart: x, y: scale(0, 100, tall - 36, 8), ends };
    }

    function draw() {
      const { ends, least, to } = view(), { low, high } = now.of, can = half();
      for (const name of ["budget", "start"]) now[name] = Math.min(Math.max(now[name], least), to);
      budget.set(ends(now.budget));
      start.set(ends(now.start));
      ended.disabled = can === null || can > high;
      const text = describe(), area = describeMargin();
      paint(`${text} ${area}`, Math.max(now.start, low), high);
      said.textContent = text;
      marginSaid.textContent = area;
    }

    function paint(text, from, to) {
      const { width, tall, chart: x, y, from: first, to: most } = view(), { dense, other, a, b } = now.of;
      const grid = [0, 25, 50, 75, 100].flatMap((v) => [svg("line", { x1: 40, x2: width - 8, y1: y(v), y2: y(v), stroke: "var(--line)" }),
        svg("text", { x: 34, y: y(v), "text-anchor": "end", "dominant-baseline": "central" }, String(v))]);
      const ticks = axisTicks(first, most, now.log,
        width).map((v) => svg("text", { x: x(v), y: tall - 20, "text-anchor": "middle" }, brief(v)));
      const faint = (rows, colour) => rows.map((point) => svg("circle",
        { cx: x(point[now.axis]), cy: y(point.accuracy), r: 2.5, fill: `var(--${colour})`, opacity: 0.35 }));
      const path = (vertices, colour) => [svg("path",
        { d: line(vertices.map(([u, v]) => [x(u), y(v)])), fill: "none", stroke: `var(--${colour})`, "stroke-width": 2 }),
        ...vertices.map(([u, v]) => colour === "dms" ? svg("rect",
          { x: x(u) - 3, y: y(v) - 3, width: 6, height: 6, fill: "var(--dms)" }) : svg("circle",
          { cx: x(u), cy: y(v), r: 3.2, fill: "var(--dense)" }))];
      const inside = (vertices) => [[from, height(vertices, from, now.log)], ...vertices.filter(([u]) => u > from && u < to),
        [to, height(vertices, to, now.log)]];
      const shade = from <= to ? [svg("path", { d: `${line([...inside(a), ...inside(b).reverse()].map(([u, v]) => [x(u), y(v)]))}Z`,
        fill: "var(--shade)" })] : [];
      const upright = (at, colour, dash) => svg("line",
        { x1: x(at), x2: x(at), y1: 4, y2: tall - 36, stroke: `var(--${colour})`, "stroke-width": 2.5, "stroke-dasharray": dash });
      const chosen = [[best(dense, now.axis, now.budget), "dense", 18],
        [best(other, now.axis, now.budget), "dms", -10]].filter(([point]) => point).flatMap(([point, colour, shift]) => {
        const at = x(point[now.axis]), anchor = at > width / 2 ? "end" : "start";
        return [svg("circle", { cx: at, cy: y(point.accuracy), r: 7, fill: "none", stroke: `var(--${colour})`, "stroke-width": 2.5 }),
          svg("text", { x: at + (anchor === "end" ? -10 : 10), y: y(point.accuracy) + shift, "text-anchor": anchor, class: "value over",
            style: `fill: var(--${colour})` }, spell(point))];
      });
      chart.replaceChildren(svg("svg", { viewBox: `0 0 ${width} ${tall}`, role: "img",
        "aria-label": `Accuracy in percent against ${unit()}. ${text}` },
        ...grid, ...ticks, svg("text", { x: width / 2, y: tall - 4, "text-anchor": "middle" },
          `${unit()} per problem (${now.log ? "log" : "linear"} axis)`),
        ...shade, ...faint(dense, "dense"), ...faint(other, "dms"), ...path(b, "dense"), ...path(a, "dms"),
        upright(now.start, "soft", "6 4"), upright(now.budget, "marked", null), ...chosen));
    }

    /* The nearer of the two lines follows the pointer. */
    chart.addEventListener("pointerdown", (event) => {
      const { chart: x } = view(), left = chart.getBoundingClientRect().left, at = event.clientX - left;
      const name = Math.abs(x(now.budget) - at) <= Math.abs(x(now.start) - at) ? "budget" : "start";
      const move = (next) => {
        now[name] = x.invert(next.clientX - left);
        draw();
      };
      const stop = () => {
        removeEventListener("pointermove", move);
        removeEventListener("pointerup", stop);
        removeEventListener("pointercancel", stop);
      };
      addEventListener("pointermove", move);
      addEventListener("pointerup", stop);
      addEventListener("pointercancel", stop);
      move(event);
    });

    function describe() {
      const found = [now.of.dense, now.of.other].map((rows) => best(rows, now.axis, now.budget)),
        name = data.labels[now.curve.split(" ")[0]];
      const words = found.map((point, i) => `${i ? name : "dense"} ${point ? `${point.accuracy.toFixed(1)} % with ${spell(point)}` : "nothing measured is so cheap"}`);
      return `For ${cost(now.budget)}: ${words.join(", ")}${found.every(Boolean) ? `; difference ${signed(found[1].accuracy - found[0].accuracy)} points` : ""}.`;
    }

    function describeMargin() {
      const { a, b, low, high } = now.of, from = Math.max(now.start, low), value = margin(a, b, now.log, from, high);
      if (value === null) return low > high ? "Margin: none, no budget is on both frontiers." : "Margin: none, the start lies behind the end of a frontier.";
      return `Margin, the mean height of the shaded area from ${number(from)} to ${cost(high)} (${now.log ? "log" : "linear"} axis): ${signed(value)} points.`;
    }

    reset();
    sized(chart, draw);
  }

  const brief = (v) => (v >= 1e6 ? `${+(v / 1e6).toPrecision(3)}M` : v >= 1e3 ? `${+(v / 1e3).toPrecision(3)}K` : String(+v.toPrecision(3)));

  /* Round numbers on an axis, 1, 2 and 5 times a power of ten, as many as there is room for. */
  function axisTicks(from, to, log, width) {
    const most = Math.max(2, Math.floor(width / 70)), all = [];
    if (!log) {
      const raw = (to - from) / most, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find((s) => s * power >= raw) * power;
      for (let v = Math.ceil(from / step) * step; v <= to; v += step) all.push(v);
      return all;
    }
    for (let e = Math.floor(Math.log10(from)); e <= Math.log10(to); e++) for (const s of [1, 2,
      5]) if (s * 10 ** e >= from && s * 10 ** e <= to) all.push(s * 10 ** e);
    return all.filter((_, i) => i % Math.ceil(all.length / most) === 0);
  }

  api.budget = { frontier, height, margin, common, best };
  api.start("budget", build);
})();
