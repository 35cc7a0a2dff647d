/* Draws a chain: its tokens in lines and, under each, a column with one cell for each (layer, KV head). */
(function (root) {
  "use strict";
  const { MARKED, OVERWRITTEN } = root.DMS;
  const STEP = 8, LETTER = 14, CELL = 3, GAP = 7; // px: a token's width, its letter's height, a cell's, between lines

  class Grid {
    constructor(view, own) {
      this.view = view;
      this.own = own; // name of the colour variable of held cells
      this.canvas = view.appendChild(document.createElement("canvas"));
      this.canvas.setAttribute("aria-hidden", "true");
      this.drawn = new Float64Array(4096);
      this.follow = true;
      this.put = 0;
      view.addEventListener("scroll", () => this.scrolled(), { passive: true });
      this.colours();
    }

    colours() {
      const style = getComputedStyle(document.documentElement), get = (name) => style.getPropertyValue(`--${name}`).trim();
      this.ink = { held: get(this.own), marked: get("marked"), gone: get("gone"), prompt: get("prompt"), text: get("ink"), paper: get("paper") };
      this.font = `13px ${get("mono")}`;
      this.chain = null;
    }

    /* The state of a token's rows as one number: only what has changed is drawn again. */
    code(cache, token) {
      let code = 1;
      for (let row = 0; row < cache.rows; row++) code = code * 4 + cache.state[row * cache.capacity + token];
      return code;
    }

    /* letters: of the problem and of what the chain wrote. */
    draw(chain, letters) {
      const cache = chain.cache, line = LETTER + cache.rows * CELL + GAP;
      const lines = Math.max(3, Math.round((root.innerWidth < 620 ? 225 : 315) / line));
      if (this.view.style.height !== `${lines * line}px`) this.view.style.height = `${lines * line}px`; // whole lines
      const width = this.view.clientWidth, perLine = Math.max(8, Math.floor(width / STEP));
      const shown = letters.length, height = Math.max(1, Math.ceil(shown / perLine)) * line;
      const ratio = root.devicePixelRatio || 1, canvas = this.canvas;
      const fresh = chain !== this.chain || width !== this.width || ratio !== this.ratio;
      if (fresh || height > this.height) {
        Object.assign(this, { chain, width, ratio, perLine, line, height: fresh ? height : height + 4 * line });
        canvas.width = Math.round(width * ratio);
        canvas.height = Math.round(this.height * ratio);
        canvas.style.width = `${width}px`;
        canvas.style.height = `${this.height}px`;
        this.context = canvas.getContext("2d");
        this.context.scale(ratio, ratio);
        this.drawn.fill(0);
      }
      const pen = this.context;
      pen.font = this.font;
      pen.textBaseline = "top";
      pen.textAlign = "center";
      for (let token = 0; token < shown; token++) {
        const code = token < cache.seen ? this.code(cache, token) : 1;
        if (code === this.drawn[token]) continue;
        this.drawn[token] = code;
        this._token(pen, cache, token, letters[token], token < chain.promptTokens);
      }
      const bottom = Math.ceil(shown / perLine) * line - this.view.clientHeight;
      if (this.follow) {
        this.view.scrollTop = Math.max(0, bottom);
        this.put = this.view.scrollTop;
      }
    }

    /* A reader who scrolls up stays there; at the end again, the view follows. */
    scrolled() {
      const by = this.view.scrollTop - this.put;
      if (Math.abs(by) > 2) this.follow = by > 0;
    }

    _token(pen, cache, token, letter, prompt) {
      const x = (token % this.perLine) * STEP, y = Math.floor(token / this.perLine) * this.line, { ink } = this;
      const seen = token < cache.seen;
      pen.clearRect(x, y, STEP, this.line);
      pen.globalAlpha = seen ? 0.22 + 0.78 * (cache.kept[token] / cache.rows) : 1;
      pen.fillStyle = prompt ? ink.prompt : ink.text;
      pen.fillText(letter, x + STEP / 2, y);
      pen.globalAlpha = 1;
      for (let row = 0; seen && row < cache.rows; row++) {
        const state = cache.state[row * cache.capacity + token];
        pen.fillStyle = state === OVERWRITTEN ? ink.gone : state === MARKED ? ink.marked : ink.held;
        pen.fillRect(x, y + LETTER + row * CELL, STEP - 1, CELL - 0.5);
      }
    }

    /* Put the cursor on a token, or one of its cells, and bring it into view. */
    reveal({ token, row }, cursor) {
      const top = Math.floor(token / this.perLine) * this.line, { view } = this;
      const cell = row < 0 ? { y: 0, height: LETTER } : { y: LETTER + row * CELL - 1, height: CELL + 2 };
      Object.assign(cursor.style, { left: `${(token % this.perLine) * STEP - 1}px`, top: `${top + cell.y}px`, width: `${STEP + 1}px`, height: `${cell.height}px` });
      cursor.hidden = false;
      if (top < view.scrollTop || top + this.line > view.scrollTop + view.clientHeight) view.scrollTop = top - view.clientHeight / 2;
    }

    /* {token, row} under a pointer, row -1 on the letter; null where there is none. */
    at(event) {
      const box = this.canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
      const column = Math.floor(x / STEP), token = Math.floor(y / this.line) * this.perLine + column;
      if (!this.chain || column >= this.perLine || token < 0 || token >= this.chain.cache.seen) return null;
      const row = Math.floor(((y % this.line) - LETTER) / CELL);
      return { token, row: row < this.chain.cache.rows ? row : -1 };
    }
  }

  root.DMS.Grid = Grid;
})(window);
