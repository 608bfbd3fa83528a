"""The live page in a browser: Chromium runs it from the folder, as any static server would serve it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote

import pytest
from live_page import FAMILIES, FOLDER, MALFORMED, MODELS, message, page, question

pytestmark = pytest.mark.browser

LORA = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
WAIT = 240_000  # milliseconds


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site(need: Callable[[Path | None, str, str], Path]) -> Iterator[str]:
    need(FOLDER / "vendor" / "versions.txt", "Pyodide for the live page", "make docs fetches it")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=FOLDER))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(need: Callable[[Path | None, str, str], Path]) -> Iterator[Any]:
    found = shutil.which("chromium")
    path = need(Path(found) if found else None, "Chromium", "install Debian's package chromium")
    spec = find_spec("playwright")
    need(Path(spec.origin) if spec and spec.origin else None, "playwright", "pip install 'tnpeft[docs]'")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=[*QUIET])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def tab(browser: Any, site: str) -> Iterator[Any]:
    opened = opened_page(browser, site)
    yield opened
    opened.close()


def opened_page(browser: Any, address: str) -> Any:
    """A tab at an address, with its first question answered; any error in it is raised."""
    tab = browser.new_page()
    tab.on("pageerror", lambda error: pytest.fail(f"the page raised {error}"))
    tab.set_default_timeout(WAIT)
    tab.goto(address)
    settled(tab)
    return tab


def settled(tab: Any) -> None:
    tab.wait_for_function("document.body.dataset.answered", timeout=WAIT)


def typed(tab: Any, line: str) -> None:
    tab.fill("#line", line)
    settled(tab)


def test_typed_lines_a_rank_and_a_wrong_line(tab: Any) -> None:
    typed(tab, LORA)
    assert tab.inner_text("#parameters") == "1,572,864"
    assert tab.inner_text("#formula").startswith("inp*layer*proj*r + layer*out*proj*r")
    assert tab.inner_text("#picture").split() == ["layer", "=", "24", "proj", "=", "2", *["r", "=", "8"]] or (
        tab.locator("#picture svg .node").count() == 2
    )
    tab.fill("#sizes input[name=r]", "1")
    settled(tab)
    assert tab.inner_text("#parameters") == "196,608"
    assert "size.r=1" in tab.url
    typed(tab, "B[out r A[r inp] -> out inp")
    assert tab.text_content("#error") == message("B[out r A[r inp] -> out inp")
    assert tab.locator("section.stale").count() == 6
    typed(tab, "A[out r] B[r inp] -> out inp")
    assert tab.is_hidden("#error")


def test_a_family_a_model_tokens_and_a_budget(tab: Any) -> None:
    tab.select_option("#family", "cp")
    settled(tab)
    assert tab.inner_text("#parameters") == "194,544"
    tab.select_option("#model", "meta-llama/Llama-3.1-8B")
    settled(tab)
    expected = json.loads(page.answer(json.dumps(question("cp", model="meta-llama/Llama-3.1-8B")), "numbers"))
    assert tab.inner_text("#parameters") == f"{expected['parameters']:,}"
    assert tab.locator("#shape option").count() == 2
    tab.select_option("#model", "facebook/opt-1.3b")
    tab.fill("#tokens", "0")
    settled(tab)
    asked = question("cp", tokens=1)
    total = json.loads(page.answer(json.dumps(asked), "plan"))["steps"][-1]
    assert tab.inner_text("#plan tr:last-child").split() == ["total", *(f"{cost:,}" for cost in total[1:])]
    tab.fill("#budget", "100000")
    settled(tab)
    assert tab.inner_text("#nearest").startswith("nearest 101,904 (r=11); within 92,640 (r=10)")
    tab.click("#ladder button:first-child")
    settled(tab)
    assert tab.inner_text("#parameters") == "9,264"


def test_a_link_opens_what_it_names(browser: Any, site: str) -> None:
    line = "U[out a] G[layer proj a b] V[inp b] -> layer proj out inp"
    tab = opened_page(browser, f"{site}#line={quote(line)}&size.a=4&size.b=2&model=facebook/opt-125m&tokens=64")
    assert tab.input_value("#line") == line
    asked = question(line, sizes={"a": 4, "b": 2}) | {"model": "facebook/opt-125m"}
    assert tab.inner_text("#parameters") == f"{json.loads(page.answer(json.dumps(asked), 'numbers'))['parameters']:,}"
    assert tab.inner_text("#tokens-shown") == "64"
    tab.close()


def test_the_numbers_are_pythons_for_forty_families_and_three_models(tab: Any) -> None:
    for model in MODELS:
        stages = ["numbers", "plan"] + ["picture", "formula"] * (model == "facebook/opt-1.3b")
        for name in FAMILIES:
            asked = question(name, model=model)
            found = tab.evaluate("([asked, stages]) => ask(asked, stages)", [asked, stages])
            here = {stage: json.loads(page.answer(json.dumps(asked), stage)) for stage in found}
            gains = [answers["numbers"].pop("gain", None) for answers in (found, here)]
            assert gains[0] == pytest.approx(
                gains[1], rel=1e-14
            )  # Python 3.12 and later round sums of floats otherwise
            assert found == here, (name, model)
            assert "error" in found["numbers"] or set(found) == set(stages)


def test_fifty_malformed_lines_give_pythons_messages(tab: Any) -> None:
    for line in MALFORMED:
        found = tab.evaluate("(asked) => ask(asked, ['numbers'])", question(line))
        assert found["numbers"] == {"error": message(line)}


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen_or_covers_another_part(tab: Any, width: int, scheme: str) -> None:
    tab.set_viewport_size({"width": width, "height": 900})
    tab.emulate_media(color_scheme=scheme)
    typed(tab, "tensor_train")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    boxes = tab.evaluate(BOXES)
    assert len(boxes) > 20
    for k, (one, a) in enumerate(boxes):
        assert a["x"] >= 0, one
        for other, b in boxes[k + 1 :]:
            wide = min(a["right"], b["right"]) - max(a["x"], b["x"])
            high = min(a["bottom"], b["bottom"]) - max(a["y"], b["y"])
            assert min(wide, high) < 1, (one, other)


BOXES = """() => {
  const parts = "h1, h2, header p, textarea, label, button, #parameters, #sites, dt, dd, #formula, #picture svg";
  const seen = [...document.querySelectorAll(parts)].filter((e) => e.offsetParent !== null && !e.closest("#ladder"));
  return seen.map((e) => {
    const { x, y, right, bottom } = e.getBoundingClientRect();
    return [e.id || e.textContent.slice(0, 20), { x, y, right, bottom }];
  });
}"""
