// What the check of the book runs in a page; browser.py calls each by its name with one argument.
({
  // What loads late is there: images, formulas, fonts.
  settled: async () => {
    for (const picture of document.images) picture.loading = "eager";
    if (window.MathJax && document.querySelector("script[src*=tex-svg]")) {
      while (!MathJax.startup?.promise) await new Promise((done) => setTimeout(done, 20));
      await MathJax.startup.promise;
    }
    await document.fonts.ready;
    await Promise.all([...document.images].map((picture) => picture.decode().catch(() => {})));
  },

  // Faults that can be seen as the page is.
  look: () => {
    const faults = [], wide = innerWidth + 1, clipped = (part) => {
      for (let above = part.parentElement; above; above = above.parentElement)
        if (getComputedStyle(above).overflowX !== "visible") return true;
      return false;
    };
    if (document.documentElement.scrollWidth > innerWidth) {
      const parts = [...document.body.querySelectorAll("*")].filter((part) =>
        part.getBoundingClientRect().right > wide && !clipped(part));
      const name = (part) => `${part.tagName.toLowerCase()}.${part.getAttribute("class") || ""}`;
      faults.push(`${document.documentElement.scrollWidth} px wide: ${parts.slice(0, 3).map(name).join(", ")}`);
    }
    for (const formula of document.querySelectorAll(".math"))
      if (!formula.querySelector("mjx-container"))
        faults.push(`formula not rendered: ${formula.textContent.slice(0, 60)}`);
    for (const error of document.querySelectorAll("mjx-merror, [data-mml-node=merror], [data-mjx-error]"))
      faults.push(`formula with an error: ${error.closest("mjx-container").textContent.slice(0, 60)}`);
    for (const formula of document.querySelectorAll("mjx-container[tabindex='0']"))
      if (formula.scrollWidth <= formula.clientWidth) faults.push("a formula that does not scroll is a tab stop");
    for (const formula of document.querySelectorAll(".math:has(svg)"))
      if (formula.querySelector("svg").getBoundingClientRect().width > formula.clientWidth + 2
          && ![formula, ...formula.children].some((part) => getComputedStyle(part).overflowX === "auto"))
        faults.push(`formula cut off: ${formula.textContent.slice(0, 60)}`);
    const read = document.createTreeWalker(document.querySelector("article") || document.body, NodeFilter.SHOW_TEXT);
    while (read.nextNode())
      if (/\\[(\[]|\$\$|\{(cite|ref|numref|term|doc)(:\w)?\}/.test(read.currentNode.data)
          && !read.currentNode.parentElement.closest("pre, code, script, style, mjx-container"))
        faults.push(`markup left as text: ${read.currentNode.data.trim().slice(0, 60)}`);
    for (const picture of document.images) {
      const alt = picture.getAttribute("alt");
      if (!picture.naturalWidth) faults.push(`image not loaded: ${picture.src.slice(-60)}`);
      const decorates = alt === "" && !picture.closest("article");  // the logo beside the book's name
      if (!decorates && (!alt || /_images\/|\.(png|svg|jpe?g|gif|webp)$/i.test(alt)))
        faults.push(`image without alt text: ${alt}`);
    }
    return faults;
  },

  // Parts that take the focus and do not show it.
  rings: () => {
    const bare = [];
    for (const part of document.querySelectorAll("a[href], button, input, select, summary, [tabindex='0']")) {
      if (!part.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;
      const around = [part, part.nextElementSibling, ...part.children].filter(Boolean);
      const rings = () => around.map((one) => {
        const { boxShadow, outlineStyle, outlineWidth } = getComputedStyle(one);
        return boxShadow + (parseFloat(outlineWidth) >= 1 ? outlineStyle : "none");
      }).join();
      document.activeElement.blur();
      const before = rings();
      part.focus();
      if (document.activeElement === part && rings() === before)
        bare.push(`no focus ring: ${part.outerHTML.slice(0, 80)}`);
    }
    document.activeElement.blur();
    return bare;
  },

  // One part of a kind stays: code has thousands, and axe would look at each.
  thin: () => {
    const seen = new Set();
    for (const part of document.querySelectorAll(".highlight span, .sig span, mjx-container"))
      if (seen.has(part.tagName + part.className)) part.replaceWith(part.textContent);
      else seen.add(part.tagName + part.className);
  },

  // What axe finds. https://github.com/dequelabs/axe-core
  axe: async (options) => (await axe.run(document, options)).violations.map((fault) =>
    `axe ${fault.impact} ${fault.id}: ${fault.nodes.length} times, first ${fault.nodes[0].html.slice(0, 90)}`),
});
