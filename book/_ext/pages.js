// What the theme leaves to do in a page. Loaded deferred: the page is there, its own scripts have not begun.

// Search: excerpts around what was searched. They are fetched, which a browser forbids for a file.
if (typeof Search !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = location.protocol !== "file:";
  const query = (new URLSearchParams(location.search).get("q") || "").trim().split(/\s+/);
  const words = query.map((word) => word.replace(/[^\p{L}\p{N}]/gu, "\\$&"));
  Search.makeSearchSummary = (page, stems, anchor) => {
    const root = new DOMParser().parseFromString(page, "text/html");
    root.querySelectorAll(".headerlink, .cell_input, .instrument, script, style").forEach((part) => part.remove());
    root.querySelectorAll(".math").forEach((part) => {
      const formula = part.textContent.replace(/\\[()[\]]/g, "");
      part.textContent = formula.includes("\\") ? "…" : formula;
    });
    root.querySelectorAll("dt, dd, p, li, td, th, h1, h2, h3").forEach((part) => part.append(" "));
    const named = anchor && root.querySelector(`article [id="${anchor.slice(1)}"]`);
    const parts = named ? [named, named.matches("dt") && named.nextElementSibling] : [root.querySelector("article")];
    const text = parts.map((part) => (part ? part.textContent : "")).join("").replace(/\s+/g, " ");
    const phrase = text.search(new RegExp(words.join("\\s+"), "i"));
    const at = phrase >= 0 ? phrase : Math.max(text.search(new RegExp(words.join("|"), "i")), 0);
    const from = at > 100 ? text.indexOf(" ", at - 100) : 0;
    const shown = document.createElement("p");
    shown.className = "context";
    shown.textContent = `${from ? "… " : ""}${text.slice(from, from + 240).trim()}${from + 240 < text.length ? " …" : ""}`;
    return shown;
  };
}

// Buttons are called what they show: axe compares their names with the text in them.
for (const button of document.querySelectorAll(".search-button-field, .theme-switch-button")) {
  button.querySelectorAll("[title]").forEach((icon) => icon.removeAttribute("title"));
  if (button.matches(".search-button-field")) button.setAttribute("aria-label", button.textContent.replace(/\s+/g, " ").trim());
}

const sidebar = document.getElementById("pst-primary-sidebar");
if (sidebar) {
  sidebar.setAttribute("role", "complementary");  // a landmark: the book's name and the search are in none otherwise
  sidebar.setAttribute("aria-label", "Book");
}

// What scrolls sideways says so (pages.css fades the edge behind which there is more) and can be scrolled with keys.
const SCROLLS = "div.math mjx-container, span.math, .cell_output > .output, .pst-scrollable-table-container, .bd-article pre";
function mark() {
  for (const part of document.querySelectorAll(SCROLLS)) {
    const formula = part.matches(".math, .math *") && part.querySelector("svg");  // beside it lies what only is read
    const more = (formula ? formula.getBoundingClientRect().width : part.scrollWidth) - part.clientWidth;
    part.classList.toggle("scrolls", more > 1);
    part.classList.toggle("more", more > 1 && part.scrollLeft < more - 1);
    more > 1 ? part.setAttribute("tabindex", 0) : part.removeAttribute("tabindex");
  }
}
addEventListener("load", () => {
  mark();
  (window.MathJax?.startup?.promise || Promise.resolve()).then(mark);
  new ResizeObserver(mark).observe(document.querySelector("article") || document.body);
  document.addEventListener("scroll", mark, { capture: true, passive: true });
});
