"""What the tests of the live page share: its module, the questions, and lines that are wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import tnpeft
from tnpeft.families.catalogue import factorization

FOLDER = Path(__file__).parents[2] / "docs" / "live"
FAMILIES = tnpeft.families.names()[:40]
MODELS = {
    "facebook/opt-1.3b": "q_proj,v_proj",
    "meta-llama/Llama-3.1-8B": "q_proj,v_proj",
    "Qwen/Qwen3-30B-A3B": "q_proj,o_proj",
}


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("live_page_answers", FOLDER / "page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page = _module()


def question(line: str, model: str = "facebook/opt-1.3b", **more: Any) -> dict[str, Any]:
    """A question as the page asks it."""
    return {
        "line": line,
        "model": model,
        "targets": MODELS[model],
        "tokens": 2048,
        "sizes": {},
        "budget": None,
        **more,
    }


def message(line: str) -> str:
    """Python's own words about a wrong line."""
    try:
        factorization(line)
    except tnpeft.NetworkError as error:
        return str(error)
    raise AssertionError(f"{line!r} is not wrong")


MALFORMED = """
B[out r A[r inp] -> out inp
B[out r] A[r inp -> out inp
B[out r] A[r inp]
B[out r] A[r inp] ->
-> out inp
B[out r] A[r inp] -> out
B[out r] A[r inp] -> inp
B[out r] A[r inp] -> out inp q
B[out r] A[q inp] -> out inp
B[out r r] A[r inp] -> out inp
B[out out] -> out inp
B[out r] A[r inp] -> out out
B[out r] A[r inp] -> (out inp
B[out r] A[r inp] -> out inp)
B[out r] A[r inp] -> (out) (inp) extra
B[out r] A[r inp] -> ((out)) inp
B[out r] A[r inp] -> () inp
B[] A[r inp] -> out inp
B A[r inp] -> out inp
B[out r]] A[r inp] -> out inp
[out r] A[r inp] -> out inp
B[out,r] A[r,inp] -> out inp
B[out r] * A[r inp] -> out inp
0.5 B[out r] A[r inp] -> out inp
relu(B[out r]) A[r inp] -> out inp
B[out r] A[r inp] => out inp
B[out r] A[r inp] - > out inp
B[out r] A[r inp] -> out inp -> out inp
B[out r] A[r inp] + -> out inp
+ + B[out r] A[r inp] -> out inp
B[out r] A[r inp] - - C[out inp] -> out inp
B[out r] A[r inp] + C[out] -> out inp
~~B[out r] A[r inp] -> out inp
^~B[out r] A[r inp] -> out inp
B[out 1] A[1 inp] -> out inp
B[out r2x!] A[r2x! inp] -> out inp
B[out model] A[model inp] -> out inp
B[out tokens] A[tokens inp] -> out inp
B[out frozen] A[frozen inp] -> out inp
B[out targets] A[targets inp] -> out inp
B[out r] B[out r s] A[r s inp] -> out inp
B[out r] ^B[r out] A[r inp] -> out inp
1B[out r] A[r inp] -> out inp
B[out r] A[r inp] \u2192 out inp
B[out r] A[r inp] -> out inp;
B[out r] {A}[r inp] -> out inp
B[layer out r] A[r inp] -> out inp
A[r] -> out inp
B[out-r] A[out-r inp] -> out inp
lorra
cpp
lora:
lora:x
lora:-1
lora 8
""".strip().split("\n")
