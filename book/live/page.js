/* The race: dense against DMS at an equal budget of KV reads. State lives in one object; draw() shows it. */
(function () {
  "use strict";
  const DMS = window.DMS, PROBLEMS = window.DMS_PROBLEMS;
  const $ = (id) => document.getElementById(id), TOP_P = 0.95;
  const TASKS = { search: "Search", traces: "Traces", choice: "Choice" };
  const BUDGETS = { search: 300, traces: 200, choice: 240 }; // dense tokens
  const SPEEDS = { Slow: 1200, Normal: 9000, Fast: 40000 }; // KV reads a second, on each side
  const FIRST = { search: 1, traces: 3, choice: 4 }; // the problem shown first
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const number = (x) => Math.round(x).toLocaleString("en-US");
  const spell = (answer) => (answer.length > 1 ? answer.match(/../g).join(" ") : answer); // of a search: n4 U0
  const escape = (text) => text.replace(/[<>&]/g, (c) => ({ "<": "&lt;", ">": "&gt;", "&": "&amp;" })[c]);

  const models = {}; // by name, loaded when first needed
  const waiting = {};
  function model(name) {
    return (waiting[name] = waiting[name] || new Promise((resolve, reject) => {
      const make = () => resolve((models[name] = new DMS.Model(window.DMS_WEIGHTS[name])));
      if (window.DMS_WEIGHTS && window.DMS_WEIGHTS[name]) return make();
      const script = document.createElement("script");
      script.src = `weights-${name}.js`;
      script.onload = make;
      script.onerror = () => reject(new Error(`weights-${name}.js is missing: the book's build writes it (make book)`));
      document.head.append(script);
    }));
  }

  /* One side of the race: chains of one problem that share a budget. */
  class Side {
    constructor(model, problem, chains, options, budget) {
      Object.assign(this, { problem, budget, turn: 0, cut: false, found: -1 });
      const prompt = model.encode(problem.prompt), first = new DMS.Chain(model, prompt, { ...options, chain: 0, keepPrompt: true });
      this.chains = [first];
      for (let chain = 1; chain < chains; chain++) this.chains.push(new DMS.Chain(model, prompt, { ...options, chain, from: first }));
      this.prompt = problem.prompt;
      this.reads = 0;
    }

    get over() {
      return this.cut || this.found >= 0 || this.chains.every((chain) => chain.done);
    }

    get peak() {
      return this.chains.reduce((sum, chain) => sum + chain.peak, 0);
    }

    get made() {
      return this.chains.reduce((sum, chain) => sum + chain.made, 0);
    }

    answer(chain) {
      return DMS.extract(this.problem.task, chain.text);
    }

    /* What this side says in the end: its answer and whether it is right. */
    get outcome() {
      const answer = DMS.vote(this.problem, this.chains.map((chain) => this.answer(chain)));
      return { answer, right: DMS.correct(this.problem, answer) };
    }

    /* One token of the chain whose turn it is. A token that the budget does not hold is not written. */
    step() {
      let chain;
      do chain = this.chains[this.turn++ % this.chains.length];
      while (chain.done);
      if (this.reads + chain.peak + 1 > this.budget) {
        this.cut = true;
        return;
      }
      const before = chain.reads;
      chain.advance();
      this.reads += chain.reads - before;
      const passes = this.problem.task === "search" && chain.done && DMS.correct(this.problem, this.answer(chain));
      if (passes) this.found = this.chains.indexOf(chain);
    }
  }

  const race = { sides: [], clock: 0, running: false, loading: 0, score: { races: 0, dense: 0, dms: 0 } };
  let settings = { task: "search", speed: "Normal", cr: 8, width: 2, window: 16 };

  /* Choices */

  function segments(id, values, name) {
    const box = document.createElement("div");
    for (const [value, word] of values) {
      const label = box.appendChild(document.createElement("label"));
      label.innerHTML = `<input type="radio" name="${name}" value="${value}"><span>${word}</span>`;
      const input = label.firstChild;
      input.checked = String(settings[name]) === String(value);
      input.addEventListener("change", () => {
        settings[name] = typeof settings[name] === "number" ? +value : value;
        if (name === "task") chooseTask();
        else if (name !== "speed") prepare();
      });
    }
    $(id).append(box);
  }

  function chooseTask() {
    $("sample").innerHTML = PROBLEMS[settings.task].map((_, i) => `<option value="${i}">No. ${i + 1}</option>`).join("");
    $("budget").value = BUDGETS[settings.task];
    return chooseSample(FIRST[settings.task]);
  }

  function chooseSample(index) {
    $("sample").value = index;
    $("prompt").value = PROBLEMS[settings.task][index];
    return prepare();
  }

  /* What a dense chain of so many tokens reads: the sum of prompt + 1 .. prompt + tokens - 1. */
  const budgetOf = (prompt, tokens) => ((tokens - 1) * (2 * prompt + tokens)) / 2;

  function showChoices() {
    const tokens = +$("budget").value;
    $("budget-said").textContent = `${number(budgetOf($("prompt").value.length, tokens))} KV reads, a dense chain of ${tokens} tokens`;
    $("temperature-said").textContent = (+$("temperature").value).toFixed(1);
  }

  /* After a pause in typing or sliding, since the models read the problem anew. */
  function soon() {
    showChoices();
    clearTimeout(race.timer);
    race.timer = setTimeout(prepare, 200);
  }

  /* Read all controls; a problem that the page cannot parse leaves the race as it was. */
  async function prepare() {
    const ticket = ++race.loading;
    clearTimeout(race.timer);
    race.timer = 0;
    showChoices();
    pause();
    $("said").textContent = "";
    try {
      const problem = DMS.parse($("prompt").value.trim());
      const [dense, sparse] = await Promise.all([model("dense"), model(`cr${settings.cr}`)]);
      if (ticket !== race.loading) return;
      race.make = () => build(problem, dense, sparse);
      showProblem(problem);
      restart();
    } catch (error) {
      if (ticket === race.loading) $("said").textContent = error.message;
    }
  }

  function build(problem, dense, sparse) {
    const budget = budgetOf(problem.prompt.length, +$("budget").value);
    const options = { temperature: +$("temperature").value, topP: TOP_P, seed: Math.max(0, Math.floor(+$("seed").value || 0)) };
    $("heads").textContent = dense.rows;
    $("window").textContent = settings.window;
    return [new Side(dense, problem, 1, options, budget), new Side(sparse, problem, settings.width, { ...options, window: settings.window }, budget)];
  }

  function restart() {
    pause();
    race.sides = race.make();
    race.clock = 0;
    race.counted = false;
    for (const view of views) view.show(0);
    $("verdict").innerHTML = `Press <b>Race</b>: both sides may read ${number(race.sides[0].budget)} times from their cache.`;
    draw();
  }

  function showProblem(problem) {
    const asks = { traces: `What is ${problem.goal}, modulo 10?`, choice: `Which option is ${problem.goal}, modulo 10?`,
      search: "Digits that fulfil all lines, modulo 10:" }[problem.task];
    const options = problem.options ? problem.options.match(/../g).map((o) => `${o[0]}: ${o[1]}`) : [];
    const lines = problem.lines.map((line) => line.text.replace(/[=+-]/g, (c) => ` ${c} `).replace("-", "−"));
    $("problem").innerHTML = `<span class="asks">${escape(asks)}</span>${lines.map((line) => `<span>${escape(line)}</span>`).join("")}${
      options.map((option) => `<span class="option">${escape(option)}</span>`).join("")}`;
  }

  /* Running: both sides read at the same pace. */

  function advance(until, milliseconds) {
    const stop = performance.now() + milliseconds;
    for (let count = 0; ; count++) {
      const open = race.sides.filter((side) => !side.over && side.reads < until);
      if (!open.length) return true;
      (open.length > 1 && open[1].reads < open[0].reads ? open[1] : open[0]).step();
      if (count % 4 === 3 && performance.now() > stop) return false;
    }
  }

  const over = () => race.sides.length > 0 && race.sides.every((side) => side.over);

  function frame(now) {
    if (!race.running) return;
    const quiet = still.matches;
    race.clock += quiet ? Infinity : Math.min(100, now - race.last) * 0.001 * SPEEDS[settings.speed];
    race.last = now;
    if (!advance(race.clock, quiet ? 40 : 12)) race.clock = Math.max(...race.sides.filter((side) => !side.over).map((side) => side.reads), 0);
    if (over()) finish();
    else {
      if (!quiet) draw();
      requestAnimationFrame(frame);
    }
  }

  async function run() {
    if (race.running) return pause();
    if (race.timer) await prepare();
    if (!race.sides.length || $("said").textContent) return;
    if (over()) restart();
    race.running = true;
    race.last = performance.now();
    race.clock = Math.max(...race.sides.map((side) => side.reads));
    word();
    $("verdict").textContent = still.matches ? "Racing …" : "Both bars fill at the same pace.";
    draw();
    requestAnimationFrame(frame);
  }

  function pause() {
    race.running = false;
    word();
  }

  function word() {
    $("run-word").textContent = race.running ? "Pause" : over() ? "Race again" : race.clock > 0 ? "Go on" : "Race";
    $("run").firstElementChild.textContent = race.running ? "❚❚" : "▶";
  }

  /* One token of dense, and what DMS can read meanwhile. */
  function single() {
    if (!race.sides.length || over()) return;
    pause();
    const [dense, sparse] = race.sides, side = dense.over ? sparse : dense, before = side.made;
    while (!side.over && side.made === before) side.step();
    race.clock = side.reads;
    advance(race.clock, 1000);
    if (over()) finish();
    else draw();
    word();
  }

  /* While both bars fill: how much cheaper tokens are on the right; what was said last stays while one side goes on. */
  function showPace() {
    if (race.clock === 0 || over()) $("pace").textContent = "";
    else if (race.sides.every((side) => side.made > 20 && !side.over)) {
      const [dense, sparse] = race.sides.map((side) => side.made / side.reads);
      $("pace").innerHTML = `For the same reads, DMS writes <b>${(sparse / dense).toFixed(1)}×</b> as many tokens.`;
      $("verdict").textContent = "";
    }
  }

  function finish() {
    race.running = false;
    const [dense, sparse] = race.sides.map((side) => side.outcome);
    if (!race.counted) {
      race.counted = true;
      race.score.races++;
      race.score.dense += dense.right;
      race.score.dms += sparse.right;
    }
    if (race.sides[1].found >= 0) views[1].show(race.sides[1].found);
    draw();
    word();
    $("verdict").innerHTML = `${tell(race.sides[0], "Dense")} ${tell(race.sides[1], `DMS at CR ${settings.cr}`)}`;
    showScore();
  }

  function tell(side, name) {
    const { answer, right } = side.outcome, many = side.chains.length > 1;
    const ended = side.chains.filter((chain) => chain.finished).length;
    const wrote = `<b>${name}</b> wrote ${number(side.made)} tokens${many ? ` in ${side.chains.length} chains` : ""}`;
    const left = Math.round(100 * (1 - side.reads / side.budget));
    const how = side.cut ? `and was cut when its budget was used up${many ? `, ${ended ? `after ${ended} of them` : "before one"} ended` : ""}` : `with ${left} % of the budget left`;
    const said = answer === null ? `<b class="bad">no answer</b>` : `${escape(spell(answer))}, <b class="${right ? "good" : "bad"}">${right ? "right\u00a0✓" : "wrong\u00a0✗"}</b>`;
    return `${wrote} ${how}: ${said}.`;
  }

  function showScore() {
    const { races, dense, dms } = race.score;
    $("score").innerHTML = races ? `Races so far: dense right in <b>${dense}</b> of ${races}, DMS right in <b>${dms}</b> of ${races}.` : "";
  }

  /* All sample problems of the task with the present settings, without drawing each token. */
  async function all() {
    if (race.all) return void (race.all = false);
    race.all = true;
    race.score = { races: 0, dense: 0, dms: 0 };
    $("all").textContent = "Stop";
    for (let i = 0; race.all && i < PROBLEMS[settings.task].length; i++) {
      $("sample").value = i;
      $("prompt").value = PROBLEMS[settings.task][i];
      await prepare();
      while (race.all && !over()) {
        advance(Infinity, 25);
        if (!still.matches) draw();
        await new Promise((next) => setTimeout(next));
      }
      if (over()) finish();
    }
    race.all = false;
    $("all").textContent = "Race all of these problems";
  }

  /* Showing */

  class View {
    constructor(kind, title) {
      this.kind = kind;
      this.chosen = 0;
      this.box = $("sides").appendChild(document.createElement("section"));
      this.box.className = `side ${kind}`;
      this.box.setAttribute("aria-labelledby", `${kind}-title`);
      this.box.innerHTML = `<div class="top"><h2 id="${kind}-title">${title}</h2><div class="state"></div></div>
        <div class="bar" role="progressbar" aria-label="${title}: KV reads of the budget" aria-valuemin="0" aria-valuemax="100"><i></i></div>
        <p class="counters"><span>KV reads <b></b></span><span>peak tokens <b></b></span><span>written <b></b></span></p>
        <div class="chains" role="group" aria-label="${title}: chain shown"></div>
        <div class="view" tabindex="0" role="region" aria-label="${title}: trace and cache" aria-description="Arrow keys go from token to token and from head to head."><p class="unseen"></p><i class="cursor" hidden></i></div>
        <p class="look" aria-live="polite"></p>`;
      for (const name of ["top h2", "state", "bar", "chains", "view", "look"]) this[name.split(" ").pop()] = this.box.querySelector(`.${name}`);
      [this.readsBox, this.peakBox, this.madeBox] = this.box.querySelectorAll(".counters b");
      this.grid = new DMS.Grid(this.view, kind);
      this.cursor = this.box.querySelector(".cursor");
      this.view.addEventListener("pointermove", (event) => this.explain(this.grid.at(event)));
      this.view.addEventListener("pointerleave", () => this.explain(null));
      this.view.addEventListener("keydown", (event) => this.walk(event));
      this.view.addEventListener("blur", () => this.explain(null));
    }

    show(chain) {
      this.chosen = chain;
      this.grid.follow = true;
      this.grid.chain = null;
    }

    draw(side) {
      const chain = side.chains[Math.min(this.chosen, side.chains.length - 1)], share = Math.min(1, side.reads / side.budget);
      this.h2.textContent = this.kind === "dense" ? "Dense" : `DMS, CR ${settings.cr}`;
      this.bar.firstElementChild.style.transform = `scaleX(${share})`;
      this.bar.setAttribute("aria-valuenow", Math.round(100 * share));
      this.box.classList.toggle("cut", side.cut);
      this.readsBox.textContent = number(side.reads);
      this.peakBox.textContent = number(side.peak);
      this.madeBox.textContent = number(side.made);
      this.state.innerHTML = this.status(side);
      this.buttons(side);
      this.grid.draw(chain, side.prompt + chain.text);
      if (!race.running) this.view.querySelector(".unseen").textContent = `Problem ${side.prompt} Trace ${chain.text}`;
    }

    status(side) {
      if (!side.over) return race.running ? "thinking …" : side.made ? "paused" : "ready";
      const { answer, right } = side.outcome;
      if (answer === null) return `<b class="bad">cut: no answer</b>`;
      return `${side.cut ? "cut, " : ""}answers <b>${escape(spell(answer))}</b> <b class="${right ? "good" : "bad"}">${right ? "✓ right" : "✗ wrong"}</b>`;
    }

    buttons(side) {
      while (this.chains.children.length > side.chains.length) this.chains.lastChild.remove();
      side.chains.forEach((chain, i) => {
        let button = this.chains.children[i];
        if (!button) {
          button = this.chains.appendChild(document.createElement("button"));
          button.type = "button";
          button.addEventListener("click", () => { this.show(i); draw(); });
        }
        const answer = side.answer(chain);
        const end = chain.done ? (answer === null ? "no answer" : `${spell(answer)} ${DMS.correct(side.problem, answer) ? "✓" : "✗"}`) : `${chain.made} tokens`;
        const count = side.chains.length, text = count > 2 ? `${i + 1}: ${end}` : count > 1 ? `Chain ${i + 1}: ${end}` : `One chain: ${end}`;
        if (button.textContent !== text) {
          button.textContent = text;
          button.setAttribute("aria-label", count > 2 ? `Chain ${text}` : text);
        }
        button.setAttribute("aria-pressed", String(i === Math.min(this.chosen, side.chains.length - 1)));
      });
    }

    /* Arrow keys: along the tokens, and up and down the heads of one. */
    walk(event) {
      const { chain } = this.grid, last = chain ? chain.cache.seen - 1 : -1, now = this.at || { token: Math.max(0, last), row: -1 };
      const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-last, 0], End: [last, 0] }[event.key];
      if (!by || last < 0) return;
      event.preventDefault();
      const within = (x, least, most) => Math.min(Math.max(x, least), most);
      this.explain({ token: within(now.token + by[0], 0, last), row: within(now.row + by[1], -1, chain.cache.rows - 1) });
      this.grid.reveal(this.at, this.cursor);
    }

    explain(at) {
      this.at = at;
      this.cursor.hidden = true;
      if (!at) return void (this.look.textContent = "");
      const { cache, text, promptTokens, model } = this.grid.chain, letter = (race.sides[0].prompt + text)[at.token];
      const where = `Token ${at.token + 1} “${letter}”${at.token < promptTokens ? " of the problem" : ""}: `;
      const word = ["", "held", "marked, still in the window", "overwritten"];
      this.look.textContent = where + (at.row < 0 ? `held by ${cache.kept[at.token]} of ${cache.rows} heads`
        : `layer ${Math.floor(at.row / model.kvHeads) + 1}, KV head ${(at.row % model.kvHeads) + 1}: ${word[cache.state[at.row * cache.capacity + at.token]]}`);
    }
  }

  function draw() {
    if (!race.sides.length) return;
    views.forEach((view, i) => view.draw(race.sides[i]));
    showPace();
  }

  /* In the book's page: its theme comes in, the height goes out. */
  function embed() {
    if (window.parent === window) return;
    document.documentElement.classList.add("embedded");
    window.addEventListener("message", ({ data }) => {
      if (data && data.type === "dms-live-theme") {
        document.documentElement.dataset.theme = data.theme;
        recolour();
      }
    });
    const send = () => window.parent.postMessage({ type: "dms-live-height", height: $("live").offsetHeight }, "*");
    new ResizeObserver(send).observe($("live"));
    send();
  }

  function recolour() {
    for (const view of views) view.grid.colours();
    draw();
  }

  segments("task", Object.entries(TASKS), "task");
  segments("speed", Object.keys(SPEEDS).map((name) => [name, name]), "speed");
  segments("cr", [[4, "CR 4"], [8, "CR 8"]], "cr");
  segments("width", [1, 2, 4, 8].map((n) => [n, String(n)]), "width");
  segments("delay", [0, 4, 16, 64].map((n) => [n, String(n)]), "window");
  const views = [new View("dense", "Dense"), new View("dms", "DMS")];
  $("controls").addEventListener("submit", (event) => { event.preventDefault(); run(); });
  $("step").addEventListener("click", single);
  $("reset").addEventListener("click", () => race.make && restart());
  $("sample").addEventListener("change", () => chooseSample(+$("sample").value));
  for (const id of ["prompt", "seed", "budget", "temperature"]) $(id).addEventListener("input", soon);
  $("all").addEventListener("click", all);
  /* The first race starts by itself when it comes into view, unless the reader was faster or wants no motion. */
  function startWhenSeen() {
    if (still.matches || location.hash === "#still") return;
    const seen = new IntersectionObserver((entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      seen.disconnect();
      if (race.make && race.clock === 0 && !race.running) run();
    }, { threshold: 0.4 });
    prepared.then(() => seen.observe($("sides")));
    addEventListener("pointerdown", () => seen.disconnect(), { once: true });
    addEventListener("keydown", () => seen.disconnect(), { once: true });
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  new ResizeObserver(draw).observe($("sides"));
  embed();
  showScore();
  window.DMS_PAGE = { race, settings, prepare, advance, over, tell, draw };
  if (!PROBLEMS) $("said").textContent = "problems.js is missing: the book's build writes it (make book)";
  const prepared = PROBLEMS ? chooseTask() : Promise.resolve();
  startWhenSeen();
})();
