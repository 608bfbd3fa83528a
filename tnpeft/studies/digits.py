"""Handwritten digits as sentences: 8 x 8 images that come with scikit-learn, sixteen 2 x 2 patches to a line."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

LEVELS = 3  # grey levels of a pixel; a patch of four is one of 81 tokens
TRAIN = 1000  # images to train on; the other 797 are reported on and seen in no training, upright or shifted
COPIES = 8  # noisy copies of every upright training image, so that pretraining sees most patches


@lru_cache(maxsize=1)
def _images() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return found.images[order], found.target[order]


def patches(images: Any) -> Any:
    """Patch numbers ``[n, 16]`` of images ``[n, 8, 8]`` with values from 0 to 16.

    >>> int(patches(np.full((1, 8, 8), 16.0))[0, 0])
    80
    """
    levels = np.minimum((images * LEVELS / 17).astype(int), LEVELS - 1)
    cells = levels.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(len(images), 16, 4)
    return (cells * LEVELS ** np.arange(4)).sum(-1)


def _noisy(images: Any) -> Any:
    draw = np.random.default_rng(1)
    several = np.tile(images, (COPIES, 1, 1))
    contrast, light = (draw.uniform(*bounds, (len(several), 1, 1)) for bounds in ((0.4, 1.3), (-2, 2)))
    return np.clip(several * contrast + light + draw.normal(0, 1, several.shape), 0, 16)


def rows(shift: str, part: str) -> list[dict[str, str]]:
    """Rows with an ``image`` (a line of patch words) and a ``label``.

    ``shift``: upright (the training part as noisy copies), inverted (dark for light), transposed, or shifted
    (inverted and transposed). ``part``: train or eval.

    >>> len(rows("shifted", "train")), rows("shifted", "eval")[0]["label"]
    (1000, '1')
    """
    images, labels = _images()
    chosen = slice(None, TRAIN) if part == "train" else slice(TRAIN, None)
    images, labels = images[chosen], labels[chosen]
    if shift == "upright" and part == "train":
        images, labels = _noisy(images), np.tile(labels, COPIES)
    if shift in ("inverted", "shifted"):
        images = 16 - images
    if shift in ("transposed", "shifted"):
        images = images.transpose(0, 2, 1)
    lines = (" ".join(f"p{number}" for number in line) for line in patches(images))
    return [{"image": line, "label": str(label)} for line, label in zip(lines, labels, strict=True)]


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the patches and the ten digits, with OPT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>"]
    words += [f"digit{k}" for k in range(10)] + [f"p{k}" for k in range(LEVELS**4)]
    level = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=level, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
