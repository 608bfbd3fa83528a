"""Pretrain a small OPT on the text in a folder: tokenizer, model and record of its validation loss.

The vocabulary (byte-level BPE) is learned from the training text. Every file that a folder of data sets calls
``train`` is read, plain text and all text fields of JSON lines, labels never; files called validation or held-out
are what the loss is measured on; dev and test files are not read. The run stops at a budget of CPU time or of
steps, goes on where it was when it is started again, and writes every file atomically.

    python scripts/pretrain_small_opt.py --data ../shared/data --out runs/small_opt --cpu-minutes 50
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # OPT's ids: bos = eos = 2, pad = 1


def text_files(data: Path) -> tuple[list[Path], list[Path]]:
    """Files to train on and files to measure the loss on."""
    found = sorted(p for p in data.rglob("*") if p.name.endswith((".jsonl.gz", ".txt.gz", ".jsonl", ".txt")))
    train = [p for p in found if p.name.startswith(("train", "input"))]
    held_out = [p for p in found if p.name.startswith(("validation", "heldout"))]
    if not train or not held_out:
        raise SystemExit(f"{data} holds no train* or no validation*/heldout* text; see the docstring for the names")
    return train, held_out


def documents(path: Path) -> Iterator[str]:
    """The texts of one file; rows of one JSON-lines article are joined, plain text is cut into parts."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf8") as lines:
        if ".txt" in path.name:
            yield from lines.read().split("\n\n")
            return
        for line in lines:
            row = json.loads(line)
            text = "\n".join(value.strip() for value in row.values() if isinstance(value, str))
            if text:
                yield text


def train_tokenizer(files: list[Path], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with OPT's special tokens and its leading end mark."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for path in files for text in documents(path)), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>"
    )


def encode(files: list[Path], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All documents in one row of token ids, each opened by the end mark, in a fixed shuffled order."""
    texts = [text for path in files for text in documents(path)]
    random.Random(0).shuffle(texts)
    rows = tokenizer.backend_tokenizer.encode_batch(texts)
    return np.concatenate([np.asarray(row.ids, dtype=np.int32) for row in rows])


def build(args: argparse.Namespace, vocabulary: int) -> OPTForCausalLM:
    """The model with fresh weights."""
    torch.manual_seed(args.seed)
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=args.width,
        word_embed_proj_dim=args.width,
        ffn_dim=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.context,
        dropout=0.0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    model = OPTForCausalLM(config)
    size = sum(p.numel() for p in model.parameters())
    if size > 10_000_000:
        raise SystemExit(f"{size:,} parameters; choose --width, --layers, --vocabulary for at most 10 million")
    return model


def make_optimizers(model: OPTForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, at AdamW's scale of learning rates, and AdamW for all the rest."""
    named = dict(model.named_parameters())
    inner = {name for name, p in named.items() if p.ndim == 2 and ".layers." in name} if args.muon else set()
    rest = [p for name, p in named.items() if name not in inner]
    adamw = torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    if not inner:
        return [adamw]
    matrices = [named[name] for name in sorted(inner)]
    return [adamw, torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]


def batch_at(ids: np.ndarray, step: int, args: argparse.Namespace, device: torch.device) -> torch.Tensor:
    """The batch of a step: windows at places that depend on the seed and the step alone."""
    places = np.random.default_rng((args.seed, step)).integers(0, len(ids) - args.context, args.batch)
    rows = np.stack([ids[place : place + args.context] for place in places]).astype(np.int64)
    return torch.from_numpy(rows).to(device)


@torch.no_grad()
def validation_loss(model: OPTForCausalLM, ids: np.ndarray, args: argparse.Namespace, windows: int) -> float:
    """Mean loss per token over evenly spaced windows of the held-out text."""
    model.eval()
    device = next(model.parameters()).device
    places = np.linspace(0, len(ids) - args.context, windows).astype(int)
    total = 0.0
    for part in np.array_split(places, max(1, windows // args.batch)):
        rows = torch.from_numpy(np.stack([ids[p : p + args.context] for p in part]).astype(np.int64)).to(device)
        total += model(input_ids=rows, labels=rows).loss.item() * len(part)
    model.train()
    return total / windows


def write_atomic(path: Path, write) -> None:
    """Write to a file beside ``path`` and rename it, so that no reader ever sees half of it."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 4 %, then a cosine down to a twentieth of the peak."""
    if progress < 0.04:
        return peak * (progress + 0.001) / 0.04
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(args: argparse.Namespace) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    train_files, held_out_files = text_files(Path(args.data))
    if not (out / "tokenizer.json").exists():
        train_tokenizer(train_files, args.vocabulary).save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    ids, held_out = encode(train_files, tokenizer), encode(held_out_files, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(args, len(tokenizer)).to(device)
    optimizers = make_optimizers(model, args)
    state = {"step": 0, "cpu_seconds": 0.0, "losses": []}
    if (out / "state.pt").exists():
        saved = torch.load(out / "state.pt", map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        state = saved["state"]
    print(
        f"{len(ids):,} training tokens, {model.num_parameters():,} parameters, from step {state['step']}", flush=True
    )

    def spent() -> float:
        return state["cpu_seconds"] + time.process_time() - start

    def save() -> None:
        saved = {**state, "cpu_seconds": spent()}
        states = [optimizer.state_dict() for optimizer in optimizers]
        checkpoint = {"model": model.state_dict(), "optimizers": states, "state": saved}
        write_atomic(out / "state.pt", lambda part: torch.save(checkpoint, part))

    start, running = time.process_time(), math.nan
    while True:
        progress = state["step"] / args.steps if args.steps else spent() / (60 * args.cpu_minutes)
        if progress >= 1:
            break
        rows = batch_at(ids, state["step"], args, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=not args.float32):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, args.lr)
            optimizer.step()
            optimizer.zero_grad()
        state["step"] += 1
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        if state["step"] % 100 == 0:
            held = validation_loss(model, held_out, args, 64)
            state["losses"].append([state["step"], running, held])
            print(f"step {state['step']:6d}  {progress:5.1%}  train {running:.3f}  held out {held:.3f}", flush=True)
            save()
    save()
    finish(args, out, model, state, spent(), ids, held_out, train_files, held_out_files)


def finish(args, out, model, state, seconds, ids, held_out, train_files, held_out_files) -> None:
    """Save the model in Hugging Face's format and the record of the run."""
    model.save_pretrained(out)
    record = {
        "validation_loss": validation_loss(model, held_out, args, 512),
        "parameters": model.num_parameters(),
        "steps": state["step"],
        "tokens_seen": state["step"] * args.batch * args.context,
        "training_tokens": len(ids),
        "validation_tokens": len(held_out),
        "cpu_seconds": round(seconds, 1),
        "curve": state["losses"],
        "settings": {k: v for k, v in vars(args).items() if k not in ("data", "out")},
        "train_files": hashes(Path(args.data), train_files),
        "validation_files": hashes(Path(args.data), held_out_files),
        "torch": torch.__version__,
    }
    write_atomic(out / "pretraining.json", lambda part: part.write_text(json.dumps(record, indent=1) + "\n"))
    print(f"validation loss {record['validation_loss']:.4f} after {record['tokens_seen']:,} tokens", flush=True)


def hashes(root: Path, files: list[Path]) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with text files")
    parser.add_argument("--out", default="runs/small_opt", help="folder for the model (default: %(default)s)")
    parser.add_argument("--cpu-minutes", type=float, default=50.0, help="budget of CPU time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="a fixed number of steps instead of a budget of time")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True, help="Muon inside the layers")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
