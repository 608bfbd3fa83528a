"""Frozen models to adapt: a hub id, a folder, random weights of a known shape, or weights that come in a package."""

from __future__ import annotations

import itertools
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnpeft.studies import packaged
from tnpeft.studies.files import StudyError, digest, new_folder

if TYPE_CHECKING:
    from tnpeft.models.cards import Projection

RANDOM = "random:"
BYTES = "bytes"
CACHE = Path("runs/cache")
_WEIGHTS = (".safetensors", ".bin", ".gguf")


def identity(name: str, cache: Path, *, weights: bool = True) -> str:
    """Return the hash of a backbone's weights, configuration and tokenizer; of ``random:...`` the name.

    A model of the hub is downloaded for it.

    Args:
        name: as :func:`load` takes it.
        cache: where backbones that are made here are kept.
        weights: False for a tokenizer: one of the hub is known by its name.

    Raises:
        StudyError: the model cannot be found.
    """
    folder = Path(packaged.folder(name, cache))
    if not folder.is_dir():
        if name.startswith(RANDOM) or not weights:
            return name
        folder = _snapshot(name)
    found = sorted(p for p in folder.iterdir() if p.suffix in (*_WEIGHTS, ".json") and p.name != "pretraining.json")
    return digest([[p.name, packaged.file_hash(p)] for p in found])


def _snapshot(name: str) -> Path:
    """Return the local folder of a model of the hub with its weights; downloads what is missing."""
    from huggingface_hub import snapshot_download

    texts = ["*.json", "*.txt", "*.model"]
    try:
        for ending in (".safetensors", ".bin"):
            folder = Path(snapshot_download(name, allow_patterns=[*texts, f"*{ending}"]))
            if any(folder.glob(f"*{ending}")):
                return folder
    except (OSError, ValueError) as error:
        raise _unreachable("model", name, error) from None
    raise _unreachable("model", name, ValueError("the repository holds neither .safetensors nor .bin files"))


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
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    auto = AutoModelForCausalLM if head == "words" else AutoModelForSequenceClassification
    more: dict[str, Any] = {} if head == "words" else {"num_labels": classes}
    where = packaged.folder(name, cache)
    try:
        if name.startswith(RANDOM):
            config = _configuration(name.removeprefix(RANDOM), **more)
            model = auto.from_config(config, dtype=getattr(torch, dtype))
            where = name.removeprefix(RANDOM)
        else:
            where = _unpacked(where, cache)
            model = auto.from_pretrained(where, dtype=getattr(torch, dtype), **more)
        words = byte_tokenizer() if tokenizer == BYTES else AutoTokenizer.from_pretrained(tokenizer or where)
    except (OSError, ValueError) as error:
        raise _unreachable("model", name, error) from None
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
    from transformers import AutoConfig, AutoTokenizer

    where = packaged.folder(name, cache)
    gguf = Path(where).is_dir() and not (Path(where) / "config.json").exists() and list(Path(where).glob("*.gguf"))
    if not gguf:
        try:
            _ = known(name.removeprefix(RANDOM)) if name.startswith(RANDOM) else AutoConfig.from_pretrained(where)
        except (OSError, ValueError) as error:
            raise _unreachable("model", name, error) from None
    words = tokenizer or ("" if gguf else where.removeprefix(RANDOM))
    try:
        return byte_tokenizer() if words == BYTES else AutoTokenizer.from_pretrained(words) if words else None
    except (OSError, ValueError) as error:
        raise _unreachable("tokenizer", words, error) from None


@lru_cache(maxsize=8)
def module_names(name: str, head: str, cache: Path) -> tuple[str, ...]:
    """Return the names of a model's modules; weights are not read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    known = name.startswith(RANDOM)
    config = (
        _configuration(name.removeprefix(RANDOM))
        if known
        else AutoConfig.from_pretrained(packaged.folder(name, cache))
    )
    with torch.device("meta"):
        model = (AutoModelForCausalLM if head == "words" else AutoModelForSequenceClassification).from_config(config)
    return tuple(name for name, _ in model.named_modules())


def _unreachable(what: str, name: str, error: Exception) -> StudyError:
    first = str(error).strip().partition("\n")[0]
    if what == "tokenizer":
        remedy = "name another, or bytes for one that needs no file"
    elif name.startswith((".", "/")) or name.count("/") > 1:
        remedy = "the folder is not there, or no model is in it"
    else:
        remedy = "check the name and the connection, or give a folder"
    return StudyError(f"cannot load the {what} {name!r}: {first}", remedy=remedy)


def _unpacked(where: Any, cache: Path) -> Any:
    """A folder as it is, or if it holds a .gguf file alone a folder below ``cache`` with its weights in float32.

    Reading such a file takes a minute, and a sweep would do it for every run.
    """
    folder = Path(where)
    found = sorted(folder.glob("*.gguf")) if folder.is_dir() and not (folder / "config.json").exists() else []
    if not found:
        return where
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = Path(cache) / f"gguf-{identity(str(folder), cache)}"
    if not (out / "config.json").exists():
        with new_folder(out) as work:
            AutoTokenizer.from_pretrained(folder, gguf_file=found[0].name).save_pretrained(work)
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=found[0].name)
            model.hf_quantizer = None  # the weights were unpacked on reading; only the note of it is left, and goes
            del model.config.quantization_config
            model.save_pretrained(work)
    return out


def known(name: str) -> Any:
    """The card of a model whose sizes tnpeft knows by its name.

    Raises:
        NetworkError: it is a folder, made here, or unknown.

    >>> known("facebook/opt-1.3b").sizes["layers"]
    24
    """
    from tnpeft.counting import card
    from tnpeft.networks import NetworkError

    if name in packaged.PACKAGED or packaged.is_digits(name) or Path(name).is_dir():
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


def _configuration(name: str, **more: Any) -> Any:
    """The configuration of a model whose sizes tnpeft knows, without any download."""
    from transformers import AutoConfig

    from tnpeft.counting import card

    its = card(name)
    kind = its.architecture
    sizes = {
        "hidden_size": its.sizes["hidden"],
        "num_hidden_layers": its.sizes["layers"],
        "num_attention_heads": its.sizes["heads"],
        "num_key_value_heads": its.sizes["kv_heads"],
        "ffn_dim" if kind == "opt" else "intermediate_size": its.sizes["ffn"],
    }
    if kind == "opt":
        sizes["word_embed_proj_dim"] = its.sizes["embed"]
    if kind == "roberta":
        sizes |= {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    return AutoConfig.for_model(kind, **sizes, **more)


def shape(name: str) -> Any:
    """Return what :func:`tnpeft.counting.card` takes for a backbone: no weights are touched.

    >>> shape("random:facebook/opt-125m"), shape("digits")["model_type"]
    ('facebook/opt-125m', 'opt')
    """
    if name == "smollm2":
        return "HuggingFaceTB/SmolLM2-135M"
    if name == "mpnet":
        return {"model_type": "mpnet", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    if packaged.is_digits(name):
        return {"model_type": "opt", **packaged.DIGITS_SHAPE}
    return packaged.folder(name.removeprefix(RANDOM), CACHE)


def weight_rms(name: str, projections: tuple[str, ...], cache: Path) -> dict[str, float]:
    """Return the root mean square of a frozen weight's entries over all layers, by projection of the model's card.

    Raises:
        StudyError: the model has random weights, or a projection has none.
    """
    if name.startswith(RANDOM):
        raise StudyError(f"{name} has no weights before it is drawn", remedy="give learning_rates")
    from tnpeft.counting import card

    its = card(shape(name))
    where = Path(packaged.folder(name, cache))
    where = Path(_unpacked(where, cache)) if where.is_dir() else _snapshot(name)
    chosen = tuple(p for p in its.projections if p.name in projections)
    return dict(_weight_rms(str(where), its.stem, chosen))


@lru_cache(maxsize=64)
def _weight_rms(where: str, stem: str, projections: tuple[Projection, ...]) -> tuple[tuple[str, float], ...]:
    from safetensors import safe_open

    sums = {p.name: [0.0, 0] for p in projections}
    for file in sorted(Path(where).glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for key, p in itertools.product(weights.keys(), projections):
                if re.fullmatch(rf"(.*\.)?{re.escape(stem)}\.\d+\.{re.escape(p.path)}(\.weight)?", key):
                    entries = weights.get_tensor(key).double()
                    entries = entries if entries.shape[-1] == p.inp else entries.mT
                    own = entries[..., p.start : p.start + p.out, :]
                    sums[p.name][0] += float((own * own).sum())
                    sums[p.name][1] += own.numel()
    empty = [name for name, (_, count) in sums.items() if not count]
    if empty:
        raise StudyError(f"no weights of {empty[0]!r}", where=where, remedy="give learning_rates")
    return tuple((name, (total / count) ** 0.5) for name, (total, count) in sums.items())
