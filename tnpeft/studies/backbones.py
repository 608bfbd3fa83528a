"""Frozen models to adapt: a hub id, a folder, random weights of a known shape, or weights that come in a package."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnpeft.studies import packaged
from tnpeft.studies.files import StudyError, digest, folder_made_once

if TYPE_CHECKING:
    from tnpeft.models.cards import Projection

RANDOM = "random:"
BYTES = "bytes"
CACHE = Path("runs/cache")
_WEIGHTS = (".safetensors", ".bin", ".gguf")


def identity(name: str, cache: Path, tokenizer: str = "") -> str:
    """Return the hash of a backbone's weights, configuration and tokenizer, and of another tokenizer.

    A model of the hub is downloaded for it; ``random:...`` and a tokenizer of the hub are known by their names.
    """
    folder = Path(packaged.folder(name, cache))
    if not folder.is_dir() and not name.startswith(RANDOM):
        folder = _snapshot(name)
    its = _content(folder) if folder.is_dir() else name
    if not tokenizer:
        return its
    folder = Path(packaged.folder(tokenizer, cache))
    return digest([its, _content(folder) if folder.is_dir() else tokenizer])


def _content(folder: Path) -> str:
    found = sorted(p for p in folder.iterdir() if p.suffix in (*_WEIGHTS, ".json") and p.name != "pretraining.json")
    return digest([[p.name, packaged.file_hash(p)] for p in found])


def _snapshot(name: str) -> Path:
    """Return the local folder of a model of the hub with its weights; downloads what is missing."""
    from huggingface_hub import snapshot_download

    with _reaching("model", name):
        for ending in (".safetensors", ".bin"):
            patterns = ["*.json", "*.txt", "*.model", f"*{ending}"]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
            if any(folder.glob(f"*{ending}")):
                return folder
        raise ValueError("the repository holds neither .safetensors nor .bin files")


def load(name: str, *, head: str, classes: int, dtype: str, cache: Path, tokenizer: str = "") -> tuple[Any, Any]:
    """A model and its tokenizer.

    Args:
        name: hub id or folder; ``random:facebook/opt-125m`` for the architecture with random weights; ``digits:0``
            to ``digits:9`` for the small OPTs of this package; ``smollm2``, ``minilm`` or ``mpnet`` from theirs.
        head: ``"words"`` or ``"classifier"``.
        classes: outputs of a classification head.
        dtype: of the weights.
        cache: folder for what is made here.
        tokenizer: hub id or folder of a tokenizer, if not the model's own; ``bytes`` for one that needs no file.

    Raises:
        StudyError: the model cannot be found.
    """
    import torch

    more = {} if head == "words" else {"num_labels": classes}
    where, weights = packaged.folder(name, cache), {"dtype": getattr(torch, dtype)}
    with _reaching("model", name):
        if name.startswith(RANDOM):
            model = _auto(head).from_config(_configuration(name, cache, **more), **weights)
            where = name.removeprefix(RANDOM)
        else:
            where = _unpacked(where, cache)
            model = _auto(head).from_pretrained(where, **weights, **more)
        words = _tokenizer(tokenizer or where)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = words.pad_token_id if words.pad_token_id is not None else words.eos_token_id
    return model, words


def reach(name: str, tokenizer: str = "", cache: Path = CACHE) -> Any:
    """The tokenizer of a model (None if only reading its weights can tell), after a look whether both can be had.

    Raises:
        StudyError: one cannot; the message names it.

    >>> len(reach("random:facebook/opt-125m", "bytes"))
    259
    """
    where = packaged.folder(name, cache)
    with _reaching("model", name):
        packed = _gguf(where) or not _configuration(name, cache)
    words = tokenizer or ("" if packed else where.removeprefix(RANDOM))
    with _reaching("tokenizer", words):
        return _tokenizer(words) if words else None


@lru_cache(maxsize=8)
def module_names(name: str, head: str, cache: Path) -> tuple[str, ...]:
    """Return the names of a model's modules; weights are not read."""
    import torch

    with torch.device("meta"):
        model = _auto(head).from_config(_configuration(name, cache))
    return tuple(name for name, _ in model.named_modules())


def _auto(head: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if head == "words" else AutoModelForSequenceClassification


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return byte_tokenizer() if name == BYTES else AutoTokenizer.from_pretrained(name)


@contextmanager
def _reaching(what: str, name: str) -> Iterator[None]:
    """Turn what the libraries have to say of a model or tokenizer that cannot be had into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        first, remedy = str(error).strip().partition("\n")[0], "check the name and the connection, or give a folder"
        if what == "tokenizer":
            remedy = "name another, or bytes for one that needs no file"
        elif name.startswith((".", "/")) or name.count("/") > 1:
            remedy = "the folder is not there, or no model is in it"
        raise StudyError(f"cannot load the {what} {name!r}: {first}", remedy=remedy) from None


def _gguf(where: str) -> Path | None:
    """The .gguf file of a folder whose model is in it alone."""
    folder = Path(where)
    return None if (folder / "config.json").exists() else next(iter(sorted(folder.glob("*.gguf"))), None)


def _unpacked(where: str, cache: Path) -> str:
    """A folder as it is, or if it holds a .gguf file alone a folder below ``cache`` with its weights in float32.

    Reading such a file takes a minute, and a sweep would do it for every run.
    """
    file = _gguf(where)
    if not file:
        return where
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def fill(work: Path) -> None:
        AutoTokenizer.from_pretrained(where, gguf_file=file.name).save_pretrained(work)
        model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file.name)
        model.hf_quantizer = None  # the weights were unpacked on reading; only the note of it is left, and goes
        del model.config.quantization_config
        model.save_pretrained(work)

    return folder_made_once(Path(cache) / f"gguf-{identity(where, cache)}", fill)


def known(name: str) -> Any:
    """The card of a model whose sizes tnpeft knows by its name; a NetworkError for a folder or a model made here."""
    from tnpeft.counting import card
    from tnpeft.networks import NetworkError

    if packaged.package(name) or Path(name).is_dir():
        raise NetworkError(f"{name!r} is not a model of the hub", remedy="name one such as facebook/opt-125m")
    return card(name)


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are the bytes of a text: no file, no vocabulary, long rows.

    It stands in for a model's own where weights are random, so that no token means anything yet.

    >>> words = byte_tokenizer()
    >>> len(words), len(words("an egg").input_ids), words.decode(words("fällig").input_ids)
    (259, 6, 'fällig')
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<pad>", "</s>"]
    ids = {word: k for k, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    its = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    its.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    its.decoder = decoders.ByteLevel()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=its, **names)


def _configuration(name: str, cache: Path, **more: Any) -> Any:
    """The configuration of a model; one of random weights from its card, without any download."""
    from transformers import AutoConfig

    if not name.startswith(RANDOM):
        return AutoConfig.from_pretrained(packaged.folder(name, cache), **more)
    its = known(name.removeprefix(RANDOM))
    names = {"hidden_size": "hidden", "num_hidden_layers": "layers", "num_attention_heads": "heads"}
    names |= {"num_key_value_heads": "kv_heads"}
    is_opt = its.architecture == "opt"
    names |= {"ffn_dim": "ffn", "word_embed_proj_dim": "embed"} if is_opt else {"intermediate_size": "ffn"}
    if its.architecture == "roberta":
        more |= {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    return AutoConfig.for_model(its.architecture, **{key: its.sizes[size] for key, size in names.items()}, **more)


def shape(name: str) -> Any:
    """Return what :func:`tnpeft.counting.card` takes for a backbone: no weights are touched.

    >>> shape("random:facebook/opt-125m"), shape("digits")["model_type"]
    ('facebook/opt-125m', 'opt')
    """
    its = packaged.package(name)
    return its.shape if its and its.shape else packaged.folder(name.removeprefix(RANDOM), CACHE)


def weight_rms(name: str, projections: tuple[str, ...], cache: Path) -> dict[str, float]:
    """Return the root mean square of a frozen weight's entries over all layers, by projection of the model's card."""
    if name.startswith(RANDOM):
        raise StudyError(f"{name} has no weights before it is drawn", remedy="give learning_rates")
    from tnpeft.counting import card

    its = card(shape(name))
    where = packaged.folder(name, cache)
    where = _unpacked(where, cache) if Path(where).is_dir() else str(_snapshot(name))
    return dict(_weight_rms(where, its.stem, tuple(p for p in its.projections if p.name in projections)))


@lru_cache(maxsize=64)
def _weight_rms(where: str, stem: str, projections: tuple[Projection, ...]) -> tuple[tuple[str, float], ...]:
    from safetensors import safe_open

    sums = {p.name: [0.0, 0] for p in projections}
    for file in sorted(Path(where).glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for key, p in itertools.product(weights.keys(), projections):
                if re.fullmatch(rf"(.*\.)?{re.escape(stem)}\.\d+\.{re.escape(p.path)}\.weight", key):
                    entries = weights.get_tensor(key).double()
                    entries = entries if entries.shape[-1] == p.inp else entries.mT
                    own = entries[..., p.start : p.start + p.out, :]
                    sums[p.name][0] += float((own * own).sum())
                    sums[p.name][1] += own.numel()
    empty = [name for name, (_, count) in sums.items() if not count]
    if empty:
        raise StudyError(f"no weights of {empty[0]!r}", where=where, remedy="give learning_rates")
    return tuple((name, (total / count) ** 0.5) for name, (total, count) in sums.items())
