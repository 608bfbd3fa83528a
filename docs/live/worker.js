// tnpeft in Pyodide, off the page's thread. A question is answered stage by stage; a newer one ends an older one.
import { loadPyodide } from "./vendor/pyodide.mjs";

const STAGES = ["numbers", "plan", "picture", "ladder", "formula", "intervals"];
let latest = 0;

const fetched = (name) => fetch(new URL(`./vendor/${name}`, import.meta.url)).then((reply) => {
  if (!reply.ok) throw new Error(`${name}: ${reply.status}`);
  return reply.arrayBuffer();
});

async function start() {
  const archives = [fetched("tnpeft.zip"), fetched("sympy.zip")];
  const pyodide = await loadPyodide({ indexURL: new URL("./vendor/", import.meta.url).href });
  for (const [name, archive] of [["tnpeft.zip", archives[0]], ["sympy.zip", archives[1]]])
    pyodide.FS.writeFile(`/${name}`, new Uint8Array(await archive));
  pyodide.runPython("import sys; sys.path += ['/tnpeft.zip', '/sympy.zip']; import page");
  return pyodide.globals.get("page") ?? pyodide.pyimport("page");
}

const ready = start();
ready.then(
  (page) => postMessage({ ready: JSON.parse(page.choices()) }),
  (error) => postMessage({ failed: String(error) }),
);

addEventListener("message", async ({ data: { id, question, stages } }) => {
  latest = Math.max(latest, id);
  const page = await ready;
  const asked = JSON.stringify(question);
  for (const stage of stages ?? STAGES) {
    await new Promise((resume) => setTimeout(resume)); // lets a newer question in
    if (!stages && id < latest) return;
    const answer = JSON.parse(page.answer(asked, stage));
    postMessage({ id, stage, answer });
    if (answer.error && stage === "numbers") break;
  }
  postMessage({ id, done: true });
});
