/* The embedded reasoner in plain JavaScript: a small Llama with a cache that evicts as Dynamic Memory Sparsification does.
 *
 * Loads as a script (sets window.DMS) and in node (module.exports). Its specification is the Python library: dms_kernels/rows.py for the
 * cache, naive.py for attention, dms_core/pick.py for sampling. tests/book/test_live.py holds both to the same logits,
 * evictions and counters. Weights come from companion/live.py.
 */
(function (root) {
  "use strict";

  const HELD = 1, MARKED = 2, OVERWRITTEN = 3; // what has become of a token in one (layer, KV head)

  function bytes(base64) {
    const text = atob(base64), out = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
    return out;
  }

  /* out[to + r] (+)= sum over c of w[from + r * columns + c] * x[c]; four rows at a time share what they read of x. */
  function multiply(w, from, rows, columns, x, out, to, add) {
    let r = 0;
    for (; r + 3 < rows; r += 4) {
      let a = 0, b = 0, c = 0, d = 0;
      let p = from + r * columns, q = p + columns, s = q + columns, t = s + columns;
      for (let i = 0; i < columns; i++) {
        const at = x[i];
        a += w[p++] * at;
        b += w[q++] * at;
        c += w[s++] * at;
        d += w[t++] * at;
      }
      const k = to + r;
      out[k] = add ? out[k] + a : a;
      out[k + 1] = add ? out[k + 1] + b : b;
      out[k + 2] = add ? out[k + 2] + c : c;
      out[k + 3] = add ? out[k + 3] + d : d;
    }
    for (; r < rows; r++) {
      let sum = 0;
      for (let i = 0, p = from + r * columns; i < columns; i++) sum += w[p + i] * x[i];
      out[to + r] = add ? out[to + r] + sum : sum;
    }
  }

  function rmsNorm(x, w, from, width, eps, out) {
    let squares = 0;
    for (let i = 0; i < width; i++) squares += x[i] * x[i];
    const factor = 1 / Math.sqrt(squares / width + eps);
    for (let i = 0; i < width; i++) out[i] = x[i] * factor * w[from + i];
  }

  /* One model. step() takes one token in and leaves logits (vocabulary) and gates' logits z (layers * KV heads). */
  class Model {
    constructor(packed) {
      Object.assign(this, packed.shape);
      this.dms = packed.dms;
      this.cr = packed.cr;
      this.tokens = packed.tokens;
      this.ids = new Map(packed.tokens.map((token, id) => [token, id]));
      this.rows = this.layers * this.kvHeads;
      this._unpack(new Int8Array(bytes(packed.int8).buffer), new Float32Array(bytes(packed.fp32).buffer));
      this._rope();
      const { width, heads, kvHeads, headDim, inner } = this;
      this.logits = new Float32Array(this.vocabulary);
      this.z = new Float32Array(this.rows);
      this.x = new Float64Array(width);
      this.normed = new Float64Array(width);
      this.qkv = new Float64Array((heads + 2 * kvHeads) * headDim);
      this.mixed = new Float64Array(heads * headDim);
      this.up = new Float64Array(2 * inner);
      this.scores = new Float64Array(this.positions);
    }

    /* Offsets into one array of matrices, w, and one of norms and gates, v: the order of companion/live.py. */
    _unpack(whole, floats) {
      const { layers, width, heads, kvHeads, headDim, inner, vocabulary } = this;
      const shapes = [[vocabulary, width]];
      for (let l = 0; l < layers; l++) {
        shapes.push([(heads + 2 * kvHeads) * headDim, width], [width, heads * headDim], [2 * inner, width], [width, inner]);
      }
      this.w = new Float32Array(whole.length);
      this.at = [];
      let from = 0, row = 0;
      for (const [rows, columns] of shapes) {
        this.at.push(from);
        for (let r = 0; r < rows; r++, row++) {
          for (let c = 0; c < columns; c++, from++) this.w[from] = whole[from] * floats[row];
        }
      }
      this.v = floats.slice(row);
      this.lastNorm = 2 * layers * width;
      this.gates = this.lastNorm + width;
      const gates = this.dms ? layers * (width + kvHeads * width) : 0;
      if (from !== whole.length || this.gates + gates !== this.v.length) throw new Error("weights do not fit their shape");
    }

    _rope() {
      const half = this.headDim / 2;
      this.cos = new Float32Array(this.positions * half);
      this.sin = new Float32Array(this.positions * half);
      for (let i = 0; i < half; i++) {
        const frequency = Math.fround(1 / Math.pow(this.theta, (2 * i) / this.headDim));
        for (let p = 0; p < this.positions; p++) {
          this.cos[p * half + i] = Math.cos(Math.fround(p * frequency));
          this.sin[p * half + i] = Math.sin(Math.fround(p * frequency));
        }
      }
    }

    encode(text) {
      return Array.from(text, (c) => {
        if (!this.ids.has(c)) throw new Error(`“${c}” is not a character that the model knows`);
        return this.ids.get(c);
      });
    }

    /* One token. decode: count the reads (prefill does not count). */
    step(token, cache, decode) {
      const { width, heads, kvHeads, headDim, inner, eps, x, normed, qkv, mixed, up, w, v } = this;
      const keyAt = heads * headDim, valueAt = keyAt + kvHeads * headDim;
      cache.begin(decode);
      for (let i = 0; i < width; i++) x[i] = w[token * width + i];
      for (let l = 0; l < this.layers; l++) {
        const wQkv = this.at[1 + 4 * l], wOut = this.at[2 + 4 * l], wUp = this.at[3 + 4 * l], wDown = this.at[4 + 4 * l];
        if (this.dms) this._gate(l);
        rmsNorm(x, v, 2 * l * width, width, eps, normed);
        multiply(w, wQkv, valueAt + kvHeads * headDim, width, normed, qkv, 0, false);
        this._turn(cache.seen, heads + kvHeads);
        for (let h = 0; h < kvHeads; h++) {
          const row = l * kvHeads + h;
          cache.store(row, qkv, keyAt + h * headDim, valueAt + h * headDim, this.dms !== null && this.z[row] > 0);
          this._attend(row, h, cache);
        }
        multiply(w, wOut, width, heads * headDim, mixed, x, 0, true);
        rmsNorm(x, v, (2 * l + 1) * width, width, eps, normed);
        multiply(w, wUp, 2 * inner, width, normed, up, 0, false);
        for (let i = 0; i < inner; i++) up[i] = (up[i] / (1 + Math.exp(-up[i]))) * up[inner + i];
        multiply(w, wDown, width, inner, up, x, 0, true);
      }
      rmsNorm(x, v, this.lastNorm, width, eps, normed);
      multiply(w, 0, this.vocabulary, width, normed, this.logits, 0, false);
      cache.end();
      return this.logits;
    }

    /* z = scale * Linear(RMSNorm(residual stream)) - offset, one a KV head. */
    _gate(l) {
      const { width, kvHeads } = this, at = this.gates + l * (1 + kvHeads) * width;
      rmsNorm(this.x, this.v, at, width, this.eps, this.normed);
      multiply(this.v, at + width, kvHeads, width, this.normed, this.z, l * kvHeads, false);
      for (let h = 0; h < kvHeads; h++) {
        this.z[l * kvHeads + h] = this.dms.scale * this.z[l * kvHeads + h] - this.dms.offset;
      }
    }

    /* RoPE on queries and keys, which lie first in qkv. */
    _turn(position, heads) {
      const { qkv, headDim } = this, half = headDim / 2, at = position * half;
      for (let h = 0; h < heads; h++) {
        for (let i = 0, p = h * headDim; i < half; i++, p++) {
          const a = qkv[p], b = qkv[p + half], cos = this.cos[at + i], sin = this.sin[at + i];
          qkv[p] = a * cos - b * sin;
          qkv[p + half] = b * cos + a * sin;
        }
      }
    }

    /* The query heads of one KV head over its slots; their order does not matter, keys were turned before. */
    _attend(row, h, cache) {
      const { qkv, mixed, scores, headDim } = this, group = this.heads / this.kvHeads, scale = 1 / Math.sqrt(headDim);
      const live = cache.length[row], keys = cache.keys[row], values = cache.values[row];
      for (let g = h * group; g < (h + 1) * group; g++) {
        const q = g * headDim;
        let top = -Infinity, total = 0;
        for (let s = 0, at = 0; s < live; s++, at += headDim) {
          let a = 0, b = 0;
          for (let i = 0; i < headDim; i += 2) {
            a += qkv[q + i] * keys[at + i];
            b += qkv[q + i + 1] * keys[at + i + 1];
          }
          scores[s] = (a + b) * scale;
          if (scores[s] > top) top = scores[s];
        }
        for (let i = 0; i < headDim; i++) mixed[q + i] = 0;
        for (let s = 0, at = 0; s < live; s++, at += headDim) {
          const weight = Math.exp(scores[s] - top);
          total += weight;
          for (let i = 0; i < headDim; i++) mixed[q + i] += weight * values[at + i];
        }
        for (let i = 0; i < headDim; i++) mixed[q + i] /= total;
      }
    }
  }

  /* Slots of every (layer, KV head). A token that leaves the window marked gives its slot to the new one. */
  class Cache {
    /* window: other than the model was trained with, to see what that does. */
    constructor(model, window) {
      const rows = (this.rows = model.rows), capacity = (this.capacity = model.positions);
      this.headDim = model.headDim;
      this.lag = model.dms ? model.dms.lag : 1;
      this.cells = (model.dms ? (window ?? model.dms.window) : 0) + 1;
      this.keys = Array.from({ length: rows }, () => new Float32Array(capacity * model.headDim));
      this.values = Array.from({ length: rows }, () => new Float32Array(capacity * model.headDim));
      this.length = new Int32Array(rows); // live tokens
      this.reads = new Float64Array(rows); // tokens attended to, summed over decode steps
      this.ringSlot = new Int32Array(rows * this.cells); // slot of token p, in cell p % cells
      this.ringEvict = new Uint8Array(rows * this.cells); // what token p's gate said, about the token lag before it
      this.state = new Uint8Array(rows * capacity); // HELD, MARKED or OVERWRITTEN, by row and position
      this.kept = new Uint8Array(capacity); // in how many rows a token is not overwritten
      this.seen = 0;
    }

    /* Become a copy of another cache of the same model: one prompt, many chains. */
    copy(other) {
      for (let row = 0; row < this.rows; row++) {
        const size = other.length[row] * this.headDim;
        this.keys[row].set(other.keys[row].subarray(0, size));
        this.values[row].set(other.values[row].subarray(0, size));
      }
      for (const name of ["length", "reads", "ringSlot", "ringEvict", "state", "kept"]) this[name].set(other[name]);
      this.seen = other.seen;
      return this;
    }

    begin(decode) {
      if (this.seen === this.capacity) throw new Error("the cache is full");
      this.counts = decode;
    }

    /* A new token of one row: keys and values from qkv; evict: what its gate says. */
    store(row, qkv, keyAt, valueAt, evict) {
      const { cells, lag, seen, capacity, headDim } = this, ring = row * cells, cell = ring + (seen % cells);
      const mark = row * capacity + seen - lag;
      if (evict && seen >= lag && this.state[mark] === HELD) this.state[mark] = MARKED;
      const marked = lag === cells ? evict : this.ringEvict[ring + ((seen + lag) % cells)] === 1;
      const reuse = seen >= cells && marked, slot = reuse ? this.ringSlot[cell] : this.length[row]++;
      if (reuse) {
        this.state[row * capacity + seen - cells] = OVERWRITTEN;
        this.kept[seen - cells]--;
      }
      this.state[row * capacity + seen] = HELD;
      this.ringSlot[cell] = slot;
      this.ringEvict[cell] = evict ? 1 : 0;
      if (this.counts) this.reads[row] += this.length[row];
      const keys = this.keys[row], values = this.values[row];
      for (let i = 0, at = slot * headDim; i < headDim; i++) {
        keys[at + i] = qkv[keyAt + i];
        values[at + i] = qkv[valueAt + i];
      }
    }

    end() {
      this.kept[this.seen++] = this.rows;
    }

    /* Means over layers and KV heads, as the library reports them. Rows never shrink, so the peak is what is live. */
    meanReads() {
      return mean(this.reads);
    }

    meanLive() {
      return mean(this.length);
    }
  }

  function mean(values) {
    let sum = 0;
    for (let i = 0; i < values.length; i++) sum += values[i];
    return sum / values.length;
  }

  /* Random numbers in [0, 1) from a seed and a chain's number: mulberry32. */
  function generator(seed, chain) {
    let state = (Math.imul(seed + 1, 0x9e3779b1) ^ Math.imul(chain + 1, 0x85ebca6b)) >>> 0;
    return function () {
      state = (state + 0x6d2b79f5) >>> 0;
      let t = Math.imul(state ^ (state >>> 15), state | 1);
      t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }

  const probabilities = new Float64Array(4096), likeliest = new Int32Array(4096);

  /* One token by inverse CDF over the nucleus, most likely first, of equals the first; temperature 0 is greedy. */
  function pick(logits, temperature, topP, uniform) {
    const size = logits.length;
    let best = 0, total = 0;
    for (let i = 1; i < size; i++) if (logits[i] > logits[best]) best = i;
    if (temperature <= 0) return best;
    for (let i = 0; i < size; i++) total += probabilities[i] = Math.exp((logits[i] - logits[best]) / temperature);
    let mass = 0, count = 0;
    while (count < size && mass < topP * total) {
      best = 0;
      for (let i = 1; i < size; i++) if (probabilities[i] > probabilities[best]) best = i;
      mass += probabilities[best];
      probabilities[best] = -probabilities[best] - 1e-300; // taken, its value kept for the second pass
      likeliest[count++] = best;
    }
    let sum = 0;
    for (let i = 0; i < count; i++) {
      sum -= probabilities[likeliest[i]];
      if (sum > uniform * mass) return likeliest[i];
    }
    return likeliest[count - 1];
  }

  /* One chain of one model: its cache, its text, and whether it goes on. */
  class Chain {
    constructor(model, prompt, options) {
      this.model = model;
      this.options = options; // temperature, topP, seed, chain, most (tokens), window
      this.promptTokens = prompt.length;
      this.text = "";
      this.made = 0;
      this.done = this.finished = false;
      this.random = generator(options.seed, options.chain || 0);
      this.cache = new Cache(model, options.window);
      if (options.from) {
        this.cache.copy(options.from.cache);
        this.next = options.from.prompted;
      } else {
        for (const token of prompt) model.step(token, this.cache, false);
        this.next = model.logits.slice();
      }
      this.prompted = options.keepPrompt ? this.next.slice() : this.next;
      this.next = this.next.slice();
      this.most = Math.min(options.most || Infinity, model.positions - prompt.length);
    }

    /* Write one token; the reads that this costs come with the step in which it is taken in. */
    advance() {
      if (this.done) return;
      const { model, options } = this;
      const token = pick(this.next, options.temperature, options.topP, this.random());
      this.made++;
      if (token === model.eos) this.finished = this.done = true;
      else {
        this.text += model.tokens[token];
        if (this.made >= this.most) this.done = true;
        else this.next.set(model.step(token, this.cache, true));
      }
    }

    get reads() {
      return this.cache.meanReads();
    }

    get peak() {
      return this.cache.meanLive();
    }
  }

  /* Problems: what a prompt asks, what a text answers, whether that is right. */

  const calculate = (a, sign, b) => (((sign === "+" ? a + b : a - b) % 10) + 10) % 10;
  const LINE = /^([A-Za-z])=(\w)(?:([+-])(\w))?$/;

  /* {task, lines, goal, options, answer} of a prompt; throws an Error that says what is wrong with it. */
  function parse(prompt) {
    const task = { "?": "traces", "<": "choice", ">": "search" }[prompt[0]];
    if (!task) throw new Error("A problem begins with ? (trace), < (choice) or > (search)");
    if (!prompt.endsWith(";!")) throw new Error("A problem ends with ;!");
    const parts = prompt.slice(0, -2).split(";"), head = parts.shift();
    const options = task === "choice" && parts.pop();
    if (options !== false && !/^A\dB\dC\dD\d$/.test(options)) throw new Error("Four options such as A1B3C4D2 come last");
    const lines = parts.map((part) => {
      const found = LINE.exec(part);
      if (!found) throw new Error(`“${part}” is not a line such as j=T+e`);
      return { text: part, name: found[1], a: found[2], sign: found[3], b: found[4] };
    });
    const goal = task === "search" ? head.slice(1).split(">") : head.slice(1);
    const problem = { task, prompt, lines, goal, options };
    if (task === "search") {
      if (!lines.length || lines.some((line) => !line.sign)) throw new Error("Every line of a search has the form n=4-U");
    } else {
      const value = evaluate(goal, new Map(lines.map((line) => [line.name, line])), new Set());
      problem.answer = task === "traces" ? String(value) : "ABCD"[[1, 3, 5, 7].findIndex((i) => +options[i] === value)];
      if (problem.answer === undefined) throw new Error(`No option is ${value}, the value of ${goal}`);
    }
    return problem;
  }

  function evaluate(term, lines, above) {
    if (/^\d$/.test(term)) return +term;
    if (!lines.has(term)) throw new Error(`“${term}” has no line`);
    if (above.has(term)) throw new Error(`“${term}” depends on itself`);
    const line = lines.get(term), below = new Set(above).add(term);
    const a = evaluate(line.a, lines, below);
    return line.sign ? calculate(a, line.sign, evaluate(line.b, lines, below)) : a;
  }

  /* The answer in a chain's text, or null. */
  function extract(task, text) {
    if (task === "search") {
      const end = text.indexOf("#"), found = end >= 0 && /<((?:[a-zA-Z]\d)+);$/.exec(text.slice(0, end));
      return found ? found[1] : null;
    }
    const found = (task === "traces" ? /^[^#]*#(\d)/ : /^[^#]*#([A-D])/).exec(text);
    return found ? found[1] : null;
  }

  function correct(problem, answer) {
    if (answer === null) return false;
    if (problem.task !== "search") return answer === problem.answer;
    const names = [...answer].filter((_, i) => i % 2 === 0), digits = [...answer].filter((_, i) => i % 2 === 1);
    const wanted = problem.lines.map((line) => line.name);
    if (names.slice().sort().join("") !== wanted.slice().sort().join("")) return false;
    const values = new Map(names.map((name, i) => [name, +digits[i]]));
    const value = (term) => (values.has(term) ? values.get(term) : +term);
    return problem.lines.every((line) => value(line.name) === calculate(value(line.a), line.sign, value(line.b)));
  }

  /* The answer of several: for search any that passes the check, else the most frequent one, of equals the first. */
  function vote(problem, answers) {
    const given = answers.filter((answer) => answer !== null);
    if (problem.task === "search") {
      const passed = given.find((answer) => correct(problem, answer));
      return passed === undefined ? (given.length ? given[0] : null) : passed;
    }
    const count = (answer) => given.filter((other) => other === answer).length;
    return given.reduce((best, answer) => (best === null || count(answer) > count(best) ? answer : best), null);
  }

  const api = { HELD, MARKED, OVERWRITTEN, Model, Cache, Chain, generator, pick, parse, extract, correct, vote };
  root.DMS = api;
  if (typeof module !== "undefined" && module.exports) module.exports = api;
})(typeof window === "undefined" ? globalThis : window);
