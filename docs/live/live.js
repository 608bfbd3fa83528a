// The page: what is asked stands in the form and in the address, the answers come from tnpeft in worker.js.
const $ = (id) => document.getElementById(id);
const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
const LORA = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp";
const FIRST = { line: LORA, model: "facebook/opt-1.3b", targets: "q_proj,v_proj", tokens: "2048" };
const number = (value) => (value == null ? "none" : Number.isInteger(value) ? value.toLocaleString("en") : Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 8 }));
let asked = 0, sent = 0, sizes = {}, pending = new Map(), choices = null;

// ---- what is asked

function question() {
  const budget = Number($("budget").value.replaceAll(/[^0-9]/g, "")) || null;
  const shape = Math.max(0, $("shape").selectedIndex);
  return { line: $("line").value, model: $("model").value, targets: $("targets").value || null, tokens: 2 ** $("tokens").value, sizes, budget, shape };
}

function read(hash) {
  const given = new URLSearchParams(hash.slice(1));
  const value = (name) => given.get(name) ?? FIRST[name];
  const model = choices.models[value("model")] ? value("model") : FIRST.model;
  $("line").value = value("line");
  $("model").value = model;
  $("targets").value = given.get("targets") ?? choices.models[model].join(",");
  $("tokens").value = Math.round(Math.log2(Math.min(2 ** 20, Math.max(1, Number(value("tokens")) || 2048))));
  $("budget").value = given.get("budget") ?? "";
  sizes = {};
  for (const [name, text] of given) if (name.startsWith("size.") && Number(text) >= 1) sizes[name.slice(5)] = Number(text);
}

function address() {
  const now = question();
  const given = new URLSearchParams({ line: now.line, model: now.model });
  if (now.targets) given.set("targets", now.targets);
  if (now.tokens !== 2048) given.set("tokens", now.tokens);
  if (now.budget) given.set("budget", now.budget);
  for (const [name, size] of Object.entries(sizes)) given.set(`size.${name}`, size);
  return `#${given}`;
}

function ask() {
  asked = ++sent;
  document.body.dataset.answered = "";
  history.replaceState(null, "", address());
  $("tokens-shown").value = number(question().tokens);
  worker.postMessage({ id: asked, question: { ...question() }, at: performance.now() });
  started = performance.now();
}
let started = 0;

/** One whole answer without the form, for scripts: ask(question) -> {stage: answer}. */
window.ask = (what, stages) => new Promise((resolve) => {
  const id = ++sent;
  pending.set(id, { resolve, found: {} });
  worker.postMessage({ id, question: what, stages });
});

// ---- what is answered

worker.addEventListener("message", ({ data }) => {
  if (data.ready) return begin(data.ready);
  if (data.failed) return ($("state").value = `Python does not start: ${data.failed}`);
  const other = pending.get(data.id);
  if (other) {
    if (data.done) { pending.delete(data.id); other.resolve(other.found); }
    else other.found[data.stage] = data.answer;
    return;
  }
  if (data.id !== asked) return;
  if (data.done) {
    document.body.dataset.answered = data.id;
    document.body.dataset.milliseconds = performance.now() - started;
    return;
  }
  show[data.stage](data.answer);
});

function text(id, content) { $(id).textContent = content; }

function rows(table, head, body) {
  const row = (cells, tag) => { const tr = document.createElement("tr"); for (const c of cells) { const td = document.createElement(tag); td.textContent = typeof c === "string" ? c : number(c); tr.append(td); } return tr; };
  $(table).replaceChildren(...(head ? [row(head, "th")] : []), ...body.map((cells) => row(cells, "td")));
}

const show = {
  numbers(a) {
    $("error").hidden = !a.error;
    $("error").replaceChildren(...(a.error ?? "").split(/(?<=\n)/).map((line) => { // the quoted line and its caret stay together
      const span = document.createElement("span"); span.className = line.startsWith("  ") ? "quoted" : ""; span.textContent = line; return span;
    }));
    document.querySelectorAll("section").forEach((each) => each.classList.toggle("stale", Boolean(a.error)));
    $("state").value = a.error ? "not a network" : `answered in ${Math.round(performance.now() - started)} ms`;
    if (a.error) return;
    $("notes").hidden = !(a.notes || a.problem);
    text("notes", [...(a.notes ?? []), ...(a.problem ? [a.problem] : [])].join("\n"));
    text("parameters", number(a.parameters));
    text("sites", a.sites.join("; "));
    rows("factors", ["factor", "parameters"], Object.entries(a.factors));
    const facts = [
      ...Object.entries(a.steps).map(([rank, step]) => [`one more ${rank}`, `${step < 0 ? "" : "+"}${number(step)}`]),
      ["rank bound", number(a.rank_bound)], ["degrees of freedom", number(a.dof)], ["gain", number(a.gain)],
      ["macs per token and site", number(a.macs)], ["saved bytes per token and site", number(a.saved_bytes)],
      ["stored, fp32", `${number(a.megabytes)} MiB`],
    ];
    $("facts").replaceChildren(...facts.flatMap(([name, value]) => { const dt = document.createElement("dt"), dd = document.createElement("dd"); dt.textContent = name; dd.textContent = value; return [dt, dd]; }));
    text("code", a.code);
    fields(a.fields);
    const shapes = $("shape");
    if (shapes.dataset.of !== a.shapes.join()) {
      shapes.replaceChildren(...a.shapes.map((shape) => new Option(shape)));
      shapes.dataset.of = a.shapes.join();
    }
    $("shape-label").hidden = a.shapes.length < 2;
  },
  plan(a) {
    if (a.error) { text("form-shown", a.error); return rows("plan", null, []); }
    text("form-shown", `${a.form}; ${Object.entries(a.sizes).map(([i, size]) => `${i}=${size}`).join(" ")}`);
    rows("plan", ["step", "macs", "backward", "written", "saved"], a.steps);
  },
  picture(a) { $("picture").innerHTML = a.svg ?? ""; },
  ladder(a) {
    if (a.error) { text("nearest", a.error); return $("ladder").replaceChildren(); }
    const ranks = (rung) => Object.entries(rung.ranks).map(([r, size]) => `${r}=${size}`).join(", ") || "no free rank";
    text("nearest", a.nearest ? `nearest ${number(a.nearest.count)} (${ranks(a.nearest)})${a.below ? `; within ${number(a.below.count)} (${ranks(a.below)})` : ""}` : "");
    $("ladder").replaceChildren(...a.ladder.map((rung) => {
      const button = document.createElement("button");
      button.type = "button"; button.textContent = number(rung.count); button.title = ranks(rung);
      button.classList.toggle("now", a.nearest?.count === rung.count);
      button.onclick = () => { Object.assign(sizes, rung.ranks); ask(); };
      return button;
    }));
  },
  intervals(a) {
    const runs = []; // one for each stretch of intervals of one form
    for (const [start, form] of a.intervals ?? []) {
      if (runs.at(-1)?.form === form) runs.at(-1).others.push(number(start)); else runs.push({ form, start: number(start), others: [] });
    }
    text("intervals", runs.map(({ form, start, others }) => `${form} from ${start} tokens${others.length ? ` (in another order from ${others.join(", ")})` : ""}`).join("; "));
  },
  formula(a) { text("formula", a.error ?? a.formula + (a.gain_formula ? `\ngain  ${a.gain_formula}` : "")); },
};

function fields(listed) {
  const shown = listed.map((field) => {
    const label = document.createElement("label");
    label.append(field.name);
    if (typeof field.size === "string") { const code = document.createElement("code"); code.textContent = field.size; label.append(code); return label; }
    const input = document.createElement("input");
    input.type = "number"; input.min = 1; input.name = field.name; input.value = field.open ? "" : field.size; input.placeholder = field.size;
    input.oninput = () => { if (Number(input.value) >= 1) sizes[field.name] = Math.floor(Number(input.value)); else delete sizes[field.name]; ask(); };
    label.append(input);
    return label;
  });
  const held = document.activeElement?.closest("#sizes") ? document.activeElement.name : null;
  if (held && listed.map((f) => f.name).join() === [...$("sizes").querySelectorAll("label")].map((l) => l.firstChild.data).join()) return;
  $("sizes").replaceChildren(...shown);
}

function begin(found) {
  choices = found;
  for (const name of Object.keys(choices.families)) $("family").append(new Option(name));
  for (const name of Object.keys(choices.models)) $("model").append(new Option(name));
  read(location.hash);
  $("state").value = "";
  ask();
}

const listen = (id, event, act) => $(id).addEventListener(event, act);
listen("line", "input", () => { sizes = {}; $("family").value = ""; ask(); });
listen("family", "change", () => { if ($("family").value) { $("line").value = $("family").value; sizes = {}; ask(); } });
listen("model", "change", () => { $("targets").value = choices.models[$("model").value].join(","); ask(); });
for (const id of ["targets", "tokens", "budget"]) listen(id, "input", ask);
listen("shape", "change", ask);
listen("form", "submit", (event) => event.preventDefault());
listen("share", "click", async () => { await navigator.clipboard.writeText(location.href); $("state").value = "link copied"; });
listen("copy", "click", () => navigator.clipboard.writeText($("code").textContent));
addEventListener("hashchange", () => { if (location.hash !== address()) { read(location.hash); ask(); } });
