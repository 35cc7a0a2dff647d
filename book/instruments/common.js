/* What the instruments share: elements, controls, scales, and a start wherever one stands in the page. */
(function () {
  "use strict";
  const api = (window.DMS_INSTRUMENTS = window.DMS_INSTRUMENTS || {}), SVG = "http://www.w3.org/2000/svg";

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (typeof value === "function") node.addEventListener(name, value);
      else if (value !== false && value !== null) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children);
    return node;
  }
  const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  /* A labelled slider. options: label, min, max, step, value; show(value) is the text beside the label. */
  function slider({ label, min, max, step, value, show = String }, change) {
    const output = el("b"), input = el("input", { type: "range", min, max, step: step || 1, value });
    const say = () => {
      output.textContent = show(+input.value);
      input.setAttribute("aria-valuetext", output.textContent);
    };
    input.addEventListener("input", () => { change(+input.value); say(); });
    say();
    return {
      node: el("label", { class: "field" }, el("span", {}, `${label}: `, output), input),
      get value() { return +input.value; },
      set(next, bounds) {
        for (const [name, bound] of Object.entries(bounds || {})) input.setAttribute(name, bound);
        input.value = next;
        say();
      },
    };
  }

  /* A choice of few: options are pairs [value, text]. */
  function segments(label, options, chosen, change) {
    api.groups = (api.groups || 0) + 1; // several instruments of a page have this script each
    const name = `instrument-choice-${api.groups}`, inputs = new Map();
    const parts = options.map(([value, text]) => {
      const input = el("input", { type: "radio", name, value, checked: value === chosen, change: () => change(value) });
      inputs.set(value, input);
      return el("label", {}, input, el("span", {}, text));
    });
    const node = el("fieldset", { class: "segments" }, el("legend", {}, label), el("div", {}, ...parts));
    return { node, set(value) { for (const [other, input] of inputs) input.checked = other === value; } };
  }

  function choice(label, options, chosen, change) {
    const items = options.map(([value, text]) => el("option", { value, selected: value === chosen }, text));
    const input = el("select", { change: () => change(input.value) }, ...items);
    return { node: el("label", { class: "field" }, label, input) };
  }

  /* Positions on an axis from low to high, on the screen from start to end. */
  function scale(low, high, start, end, log) {
    const of = log ? Math.log2 : (x) => x, back = log ? (x) => 2 ** x : (x) => x;
    const [a, b] = [of(low), of(high)];
    const at = (x) => start + ((of(x) - a) / (b - a)) * (end - start);
    at.invert = (place) => back(a + ((place - start) / (end - start)) * (b - a));
    return at;
  }

  const line = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  const number = (x, digits = 3) => (Math.abs(x) >= 1000 ? Math.round(x).toLocaleString("en-US") : String(+x.toPrecision(digits)));
    const minus = (x, digits) => x.toFixed(digits).replace(/^-(?=.*[1-9])/, "−").replace("-", ""); // no −0.0
  const signed = (x, digits = 1) => (x < 0 ? minus(x, digits) : `+${minus(x, digits)}`);

  /* Call draw(width) now and whenever the element has another width. */
  function sized(element, draw) {
    let last = 0;
    new ResizeObserver(() => {
      const width = Math.floor(element.clientWidth);
      if (width > 0 && width !== last) draw((last = width));
    }).observe(element);
  }

  /* Build each instrument of this name that is in the page and has not been built: build(root, data). */
  function start(name, build) {
    for (const root of document.querySelectorAll(`.instrument[data-name="${name}"]:not([data-ready])`)) {
      root.dataset.ready = "";
      const data = root.querySelector('script[type="application/json"]');
      build(root, data && JSON.parse(data.textContent));
    }
  }

  Object.assign(api, { el, svg, slider, segments, choice, scale, line, number, signed, minus, sized, start });
})();
