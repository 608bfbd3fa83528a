// node compile.mjs PYODIDE SOURCES TARGET: an archive of Python sources as one of byte code, for Pyodide's own Python.
import { readFileSync, writeFileSync } from "node:fs";
import { dirname } from "node:path";
import { pathToFileURL } from "node:url";

const [runtime, source, target] = process.argv.slice(2);
const { loadPyodide } = await import(pathToFileURL(runtime));
const pyodide = await loadPyodide({ indexURL: dirname(runtime) });
pyodide.FS.writeFile("/sources.zip", readFileSync(source));
pyodide.runPython(`
import importlib.util, marshal, zipfile

FIXED = (1980, 1, 1, 0, 0, 0)  # the same sources give the same archive
with zipfile.ZipFile("/sources.zip") as sources, zipfile.ZipFile("/target.zip", "w", zipfile.ZIP_DEFLATED) as target:
    for name in sources.namelist():
        content = sources.read(name)
        if name.endswith(".py"):
            code = compile(content, name, "exec", dont_inherit=True)
            content = importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)
            name += "c"
        target.writestr(zipfile.ZipInfo(name, FIXED), content, zipfile.ZIP_DEFLATED)
`);
writeFileSync(target, pyodide.FS.readFile("/target.zip"));
