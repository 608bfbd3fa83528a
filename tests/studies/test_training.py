"""Scoring and training: label words against brute force, the best checkpoint, stop and resume bit for bit."""

from __future__ import annotations

import contextlib
import math
import shutil
from dataclasses import replace
from itertools import accumulate, combinations, count, islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies
from safetensors.torch import load_file

torch = pytest.importorskip("torch")

from tnpeft.studies import backbones, methods  # noqa: E402
from tnpeft.studies.files import StudyError  # noqa: E402
from tnpeft.studies.protocol import Protocol  # noqa: E402
from tnpeft.studies.running import training  # noqa: E402
from tnpeft.studies.running.execution import train  # noqa: E402
from tnpeft.studies.running.training import batches  # noqa: E402
from tnpeft.studies.tasks.data import Example, Splits, load  # noqa: E402
from tnpeft.studies.tasks.scoring import Scorer, evaluate, judge, micro_batches, only  # noqa: E402
from tnpeft.studies.tasks.task import TASKS, task  # noqa: E402

PROTOCOL = Protocol(targets=("q_proj", "v_proj"), steps=6, batch=8, evaluate_every=2)


LORA = {"family": "lora", "args": {"rank": 1}}


def backbone(tiny: Path, head: str = "words", dtype: str = "float32") -> tuple[Any, Any]:
    return backbones.load(str(tiny), head=head, classes=10, dtype=dtype, cache=tiny.parent)


def adapted(tiny: Path, method: Any = LORA, head: str = "words", dtype: str = "float32") -> tuple[Any, Scorer]:
    model, tokenizer = backbone(tiny, head, dtype)
    model = methods.attach(model, method, PROTOCOL.targets, classifier=head == "classifier", seed=0)
    return model, Scorer(TASKS["digits_upright"], tokenizer, head)


def fitted(model: Any, scorer: Scorer, lr: float, **change: Any) -> training.Course:
    protocol = replace(PROTOCOL, head=scorer.head, **change).on(64)
    (course,), seconds = training.fit(model, scorer, [splits()], protocol, lrs=[lr], seeds=[0])
    assert seconds > 0
    return course


def splits() -> Splits:
    return load(TASKS["digits_upright"]).splits(0, 64, 32, 64)


@pytest.mark.parametrize("words", [{"0": " p1", "1": " p2"}, {"0": " p1 p5", "1": " p2", "2": " p3 p3 p3"}])
def test_word_scores_are_the_mean_log_probabilities(tiny: Path, words: dict[str, str]) -> None:
    """Brute force: each prompt with each word alone, without padding, the whole row's log-probabilities."""
    model, tokenizer = backbone(tiny)
    its = task({"name": "t", "prompt": "{image}", "words": words})
    scorer = Scorer(its, tokenizer)
    examples = [Example(prompt, prompt, 0) for prompt in ("p4 p7 p9", "p1", "p8 p8 p8 p8 p8")]
    scores = scorer.scores(model.eval(), scorer.collate(scorer.encode(examples))).double()
    expected = torch.zeros_like(scores)
    for k, example in enumerate(examples):
        for c, word in enumerate(words.values()):
            prompt, end = (tokenizer(text, add_special_tokens=False).input_ids for text in (example.prompt, word))
            logits = model(input_ids=torch.tensor([prompt + end])).logits[0].double().log_softmax(-1)
            values = [logits[len(prompt) - 1 + j, token] for j, token in enumerate(end)]
            expected[k, c] = sum(values) / len(values)
    # one-token words leave out the normalisation that all classes share
    tolerance = 200 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    assert torch.allclose(scores.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=tolerance)


LENGTHS = [3, 20, 4, 9, 3, 21, 8, 8, 19, 4, 10, 3]
THREE = [[10, 1, 9, 4], [2, 2, 11, 40], [5, 5, 5, 5]]


@pytest.mark.parametrize(("lengths", "rows"), [([LENGTHS], 1), (THREE, 1), (THREE, 3), ([[500] * 9], 1), ([[7]], 2)])
def test_micro_batches_hold_every_example_once_and_cost_least(lengths: list[list[int]], rows: int) -> None:
    """Of all ways to cut the examples in order of their lengths into passes of at most 1,024 tokens."""
    found, count = micro_batches(lengths, rows), len(lengths[0])
    for k in range(len(lengths)):
        assert sorted(place for lot in found for place in lot[k]) == [*range(count)]
    tops = [max(its) for its in zip(*map(sorted, lengths), strict=True)]

    def cost(bounds: list[int]) -> float:
        passes = [len(lengths) * rows * (b - a) * tops[b - 1] for a, b in pairwise(bounds)]
        fit = all(n <= 1024 or b - a == 1 for n, (a, b) in zip(passes, pairwise(bounds), strict=True))
        return sum(50 + n for n in passes) if fit else math.inf

    ways = ([0, *its, count] for r in range(count) for its in combinations(range(1, count), r))
    assert cost([0, *accumulate(len(lot[0]) for lot in found)]) == min(map(cost, ways)) < math.inf


@pytest.mark.parametrize("words", [{"0": " p1", "1": " p2"}, {"0": " p1 p5", "1": " p2"}, {}])
@pytest.mark.parametrize("runs", [1, 3])
def test_a_batch_in_lots_has_the_losses_and_gradients_of_the_whole(
    tiny: Path, words: dict[str, str], runs: int
) -> None:
    head = "words" if words else "classifier"
    model, tokenizer = backbone(tiny, head)
    model = methods.attach(model.double(), {"family": "lora", "args": {"rank": 1}}, (), classifier=not words, seed=0)
    scorer = Scorer(task({"name": "t", "prompt": "{image}", "words": words or {"0": "a", "1": "b"}}), tokenizer, head)
    texts = [" ".join([f"p{1 + k % 9}"] * length) for k, length in enumerate(LENGTHS)]
    rows = scorer.encode([Example(text, text, k % 2) for k, text in enumerate(texts)])
    batch, each_run = scorer.collate(rows), len(rows) // runs
    blocks = [rows[start : start + each_run] for start in range(0, len(rows), each_run)]
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(loss: Any) -> list[Any]:
        return [g.clone() for g in torch.autograd.grad(loss, trained)]

    whole = scorer.losses(model, batch).view(runs, -1)
    parts, seen = torch.zeros_like(whole).detach(), 0
    sums = [torch.zeros_like(p) for p in trained]
    for lot, part in scorer.cut(blocks, torch.device("cpu")):
        each = scorer.losses(model, part).view(runs, -1)
        parts.scatter_(1, torch.tensor(lot), each.detach())
        sums = [a + b for a, b in zip(sums, gradients(each.sum()), strict=True)]
        seen += part["input_ids"].numel()
    assert torch.allclose(parts, whole.detach(), rtol=1e-6)
    for a, b in zip(sums, gradients(whole.sum()), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)
    assert seen < batch["input_ids"].numel()


def test_a_head_that_is_looked_at_gives_all_its_logits(tiny: Path) -> None:
    model, tokenizer = backbone(tiny)
    scorer = Scorer(task({"name": "t", "prompt": "{image}", "words": {"0": " p1", "1": " p2"}}), tokenizer)
    batch = scorer.collate(scorer.encode([Example(prompt, prompt, 0) for prompt in ("p4 p7 p9", "p1")]))
    with only(model, [1, 3]) as alone:
        logits = model(input_ids=batch["input_ids"]).logits
    assert (alone, logits.shape) == (True, (2, 1, 2))
    assert torch.allclose(logits[:, 0], model(input_ids=batch["input_ids"]).logits[:, -1, [1, 3]])
    few, seen = scorer.scores(model, batch), list[Any]()
    handle = model.lm_head.register_forward_hook(lambda *its: seen.append(its[-1].shape))
    assert torch.allclose(scorer.scores(model, batch), few, rtol=1e-5)
    handle.remove()
    assert seen == [(2, 1, 95)]
    assert "forward" not in vars(model.lm_head)


def test_long_prompts_lose_their_beginning(tiny: Path) -> None:
    _, tokenizer = backbone(tiny)
    scorer = Scorer(TASKS["digits_upright"], tokenizer, max_length=6)
    row = scorer.encode([Example("p1 p2 p3 p4 p5 p6 p7 p8", "", 0)])[0]
    assert tokenizer.convert_ids_to_tokens(row["ids"]) == ["p4", "p5", "p6", "p7", "p8"]


def test_equal_words_are_refused(tiny: Path) -> None:
    _, tokenizer = backbone(tiny)
    with pytest.raises(StudyError, match="same to the tokenizer"):
        Scorer(task({"name": "t", "prompt": "{x}", "words": {"0": "foo", "1": "bar"}}), tokenizer)


@pytest.mark.parametrize("method", [{"family": "lora", "args": {"rank": 2}}, {"peft": "lora", "args": {"r": 2}}])
@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_only_the_adapter_moves_and_the_reported_checkpoint_stays(
    tiny: Path, method: dict[str, Any], checkpoint: str
) -> None:
    before = {name: p.clone() for name, p in backbone(tiny)[0].named_parameters()}
    model, scorer = adapted(tiny, method)
    best = fitted(model, scorer, 0.1, checkpoint=checkpoint)
    assert [row[0] for row in best.curve] == [2, 4, 6]
    step, _, dev, loss = best.reported
    assert (step, dev) == (6, best.curve[-1][2]) or checkpoint == "best"
    assert dev == max(row[2] for row in best.curve) or checkpoint == "last"
    assert evaluate(scorer, model, scorer.encode(splits().dev)) == pytest.approx((dev, loss), rel=1e-6)
    after = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert methods.trainable(model) == (2 * 4 * 2 * 16, 0)


@pytest.mark.parametrize("method", [{"family": "lora"}, {"none": True}, {"peft": "lora"}])
def test_a_new_head_trains_in_float32_over_a_16_bit_backbone(tiny: Path, method: dict[str, Any]) -> None:
    model, scorer = adapted(tiny, method, "classifier", "bfloat16")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any(methods.of_head(name) for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in model.parameters()}
    assert fitted(model, scorer, 1e-3).curve[-1][0] == 6


def test_a_hopeless_run_stops_by_its_rule(tiny: Path) -> None:
    best = fitted(*adapted(tiny), 1e-9, steps=40, patience=2)
    assert best.curve[-1][0] < 40
    merits = [(row[2], -row[3]) for row in best.curve]
    assert len(merits) - 1 - merits.index(max(merits)) == 2


def test_losses_that_are_no_numbers_end_a_run_and_win_nothing(tiny: Path, tmp_path: Path) -> None:
    best = fitted(*adapted(tiny), 1e30, steps=40, clip=0.0)
    assert best.curve[-1][0] < 40
    assert not all(map(math.isfinite, best.curve[-1][1:]))
    sizes = {"train": 64, "dev": 32, "eval": 64, "steps": 8, "evaluate_every": 4, "clip": 0.0, "targets": ["q_proj"]}
    result = train(tmp_path / "out", model=str(tiny), task="digits_upright", method=LORA, lr=1e30, **sizes)
    assert None in result["curve"][-1]
    assert "NaN" not in (tmp_path / "out" / "result.json").read_text()


@pytest.mark.parametrize("by", ["metric", "loss"])
def test_a_checkpoint_whose_loss_is_no_number_is_never_the_best(by: str) -> None:
    best, nan = training.Course(), float("nan")
    best.curve = [(1, 0.9, 0.5, 1.0), (2, 0.9, 0.9, nan), (3, 0.9, 0.6, 0.9), (4, 0.9, 0.1, 9.0)]
    assert [best.best(each) for each in (by, "last")] == [2, 3]
    best.curve = best.curve[:2]
    assert [best.best(each) for each in (by, "last")] == [0, 1]
    best.curve = [(3, 0.9, 0.6, 0.8)]
    assert not best.should_stop(0)
    best.curve.append((4, float("nan"), 0.6, 0.9))
    assert best.should_stop(0)
    best.curve[-1] = (4, 0.9, 0.6, 0.9)
    assert [best.should_stop(patience, by) for patience in (0, 1, 2)] == [False, True, False]


def test_epochs_are_steps_and_the_head_has_its_own_rate(tiny: Path) -> None:
    model, scorer = adapted(tiny, {**LORA, "change": {"lr_multiplier": {"B": 4.0}}}, "classifier")
    assert methods.trainable(model) == (4 * 2 * 16, 160)
    best = fitted(model, scorer, 1e-2, epochs=2, batch=12, head_lr=0.5)
    assert [row[0] for row in best.curve] == [6, 12]
    protocol = replace(PROTOCOL, head="classifier", head_lr=0.5)
    groups = training.optimizer(model, protocol, 1e-2).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert set(rates) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        assert rate == (0.5 if methods.of_head(name) else 0.04 if ".B" in name else 1e-2), name
    plain = training.optimizer(model, replace(protocol, head_lr=0.0), 1e-2).param_groups
    assert sorted({group["lr"] for group in plain}) == [1e-2, 0.04]


class Stop(Exception):
    pass


def test_a_folder_in_which_nothing_was_begun_is_free(tiny: Path, tmp_path: Path) -> None:
    its: dict[str, Any] = {"model": str(tiny), "task": "digits_upright", "method": {"family": "lora"}}
    with pytest.raises(StudyError, match="lr = -1"):
        train(tmp_path / "run", lr=-1, **its)
    with pytest.raises(StudyError, match="--settings 'dev=N'"):
        train(tmp_path / "run", dev=10**6, **its)
    short = {"train": 16, "dev": 8, "eval": 8, "steps": 1, "batch": 4}
    assert train(tmp_path / "run", **short, **its)["steps"] == 1
    with pytest.raises(StudyError, match="holds another run"):
        train(tmp_path / "run", **{**short, "steps": 2}, **its)
    with pytest.raises(StudyError, match="holds another run"):
        train(tmp_path / "run", tokenizer=str(tiny), **short, **its)


RESUMED: list[dict[str, Any]] = [
    {"by_length": True},
    {"checkpoint": "best", "accumulate": 2},
    {"checkpoint": "best", "best_by": "loss", "patience": 1, "schedule": "constant"},
]


@pytest.mark.parametrize("change", RESUMED, ids=str)
def test_train_stopped_at_any_moment_goes_on_to_the_same_bits(
    tiny: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Stopped at every evaluation in turn, the one on held-out examples included, and with damaged checkpoints."""
    said: list[str] = []

    def go(out: Path, stop: int = -1) -> dict[str, Any]:
        left = iter(range(stop)) if stop >= 0 else count()

        def say(line: str) -> None:
            said.append(line)
            if line.startswith("evaluating") and next(left, None) is None:
                raise Stop

        settings = {"train": 60, "dev": 32, "eval": 64, "steps": 8, "batch": 16, "evaluate_every": 2, **change}
        method = {"family": "cp", "args": {"rank": 3}}
        targets = {"targets": ["q_proj", "v_proj"]}
        return train(
            out, model=str(tiny), task="digits_upright", method=method, lr=0.05, say=say, **targets, **settings
        )

    whole = go(tmp_path / "whole")
    looks = len(whole["curve"])
    for stop in range(looks + 1):
        said.clear()
        out = tmp_path / str(stop)
        with pytest.raises(Stop):
            go(out, stop)
        checkpoints = sorted((out / "checkpoints").glob("*"))
        assert len(checkpoints) == min(stop, 2)
        if stop == 2:
            checkpoints[-1].write_bytes(checkpoints[-1].read_bytes()[:-100])
        if stop == 3:
            checkpoints[-1].write_bytes(b"")
        resumed = go(out)
        if stop == looks:
            assert f"going on from step {whole['curve'][-1][0]}" in said
        assert {k: v for k, v in resumed.items() if k not in ("timing", "finished")} == {
            k: v for k, v in whole.items() if k not in ("timing", "finished")
        }
        one, two = (load_file(part / "adapter" / "adapter_model.safetensors") for part in (tmp_path / "whole", out))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert go(out) == resumed
    with pytest.raises(StudyError, match="holds another run"):
        train(tmp_path / "whole", model=str(tiny), task="digits_upright", method={"family": "lora"})


def test_dropout_goes_on_in_its_stream(tiny: Path, tmp_path: Path) -> None:
    models, method = list[Any](), {"peft": "lora", "args": {"r": 2, "lora_dropout": 0.5}}

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise Stop

    for progress in (None, stop, None):
        torch.manual_seed(0)
        model, scorer = adapted(tiny, method)
        folder = tmp_path / ("whole" if not models else "pieces")
        models.append(model)
        with contextlib.suppress(Stop):
            training.fit(model, scorer, [splits()], PROTOCOL, lrs=[0.1], seeds=[3], folder=folder, progress=progress)
    one, _, two = ([p for p in model.parameters() if p.requires_grad] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@given(
    size=strategies.integers(1, 40),
    batch=strategies.integers(1, 9),
    accumulate=strategies.integers(1, 3),
    by_length=strategies.booleans(),
    start=strategies.integers(0, 20),
)
def test_each_epoch_has_every_example_once_and_an_order_can_be_entered_anywhere(
    size: int, batch: int, accumulate: int, by_length: bool, start: int
) -> None:
    protocol = Protocol(batch=batch, accumulate=accumulate, by_length=by_length)
    lengths = [1 + k % 5 for k in range(size)]
    epoch = protocol.__class__(epochs=1, batch=batch, accumulate=accumulate).on(size).steps
    steps = [*islice(batches(lengths, protocol, 5), 2 * epoch)]
    for part in (steps[:epoch], steps[epoch:]):
        assert sorted(place for step in part for batch_ in step for place in batch_) == [*range(size)]
        assert all(len(batch_) == batch for step in part for batch_ in step[:-1])
    entered, whole = (batches(lengths, protocol, 5, at) for at in (start, 0))
    assert [*islice(entered, 3)] == [*islice(whole, start, start + 3)]


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_schedules_are_those_of_transformers(name: str, warmup: float) -> None:
    from transformers import get_scheduler

    protocol = Protocol(steps=10, schedule=name, warmup=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, round(warmup * 10), 10)
    for step in range(10):
        assert training.schedule(protocol, step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("head", ["words", "classifier"])
def test_examples_that_do_not_fit_the_model_are_one_line(tiny: Path, tmp_path: Path, head: str) -> None:
    its: dict[str, Any] = {"method": {"family": "lora"}, "targets": ["q_proj"], "steps": 1, "dev": 8, "head": head}
    digits = {"task": "digits_upright", "model": str(tiny)}
    long = {"name": "digits_upright", "prompt": "{image} {image} {image}", "text": "{image} {image} {image}"}
    for change, message in (
        ({**digits, "tokenizer": backbones.BYTES}, "tokenizer gives the token .* --tokenizer"),
        ({**digits, "task": long}, "an example has 4[89] tokens, the model 32 positions; set max_length = 32"),
        ({**digits, "max_length": 1}, "max_length = 1 leaves no room" if head == "words" else ""),
    ):
        if message:
            with pytest.raises(StudyError, match=message) as caught:
                train(tmp_path / "out", **its, **change)
            assert "\n" not in str(caught.value)
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    for file in bare.glob("*token*"):
        file.unlink()
    with pytest.raises(StudyError, match=r"token.*--tokenizer|tokenizer.* name another"):
        train(tmp_path / "out", model=str(bare), task="digits_upright", **its)


def test_the_command_takes_a_rank_behind_a_colon_and_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from tnpeft.cli import app
    from tnpeft.studies.running import execution

    def recorded(*_: Any, method: Any, **__: Any) -> None:
        asked.append(method)
        raise KeyboardInterrupt

    asked: list[Any] = []
    monkeypatch.setattr(execution, "train", recorded)
    for words in (["lora:8"], ["tenslora:8", "--args", "alpha=4"], ["A[out r] B[r inp] -> out inp"]):
        done = CliRunner().invoke(app, ["train", *words, "--model", "digits", "--task", "sst2", "--out", "x"])
        assert done.exit_code == 130
        assert "start the same command to go on" in done.output
    expected = [{"family": "lora", "args": {"rank": 8}}, {"family": "tenslora", "args": {"ranks": 8, "alpha": 4}}]
    assert asked == [*expected, {"line": "A[out r] B[r inp] -> out inp"}]


def test_rates_by_rule_reach_the_optimizer(tiny: Path) -> None:
    """The relative step is the protocol's, or the number that is swept; PEFT's methods have none."""
    import tnpeft

    def loss(model: torch.nn.Module) -> torch.Tensor:
        return model(torch.tensor([[2, 3, 4]])).logits[..., 5].mean()

    for method in ({"family": "cp", "args": {"rank": 2}}, {"peft": "lora", "args": {"r": 1}}):
        model, _ = adapted(tiny, method)
        changes = ({"relative_step": 2e-3}, {"rate_rule": "relative_step"}, {"rate_rule": "structure"})
        for change in (*changes, {"rate_rule": "measured"}):
            protocol = Protocol.of({"targets": ["q_proj", "v_proj"], **change})
            if "peft" in method:
                with pytest.raises(StudyError, match="are for networks"):
                    training.optimizer(model, protocol, 1e-3)
                continue
            groups = training.optimizer(model, protocol, 1e-3, loss).param_groups
            rule = {"structure": "structure", "measured": "measured"}.get(change.get("rate_rule"), "gain")
            step = change.get("relative_step", 1e-3)
            wanted = tnpeft.parameter_groups(model, relative_step=step, rule=rule, batch=loss)
            assert [group["lr"] for group in groups] == [group["lr"] for group in wanted]
            assert len({group["lr"] for group in groups}) > 1


def test_records_tell_each_example_of_one_evaluation_set(tiny: Path, tmp_path: Path) -> None:
    """Seeds share the evaluation set; guesses stand in its order and give the scores."""
    short = {"train": 16, "dev": 8, "eval": 60, "steps": 1, "batch": 4, "targets": ["q_proj"]}
    its: dict[str, Any] = {"model": str(tiny), "task": "digits_upright", "method": {"family": "lora"}}
    one, two = (train(tmp_path / str(seed), seed=seed, **short, **its) for seed in (0, 1))
    assert one["labels"] == two["labels"] == [e.label for e in splits_of(60)]
    hits = sum(a == b for a, b in zip(one["predictions"], one["labels"], strict=True))
    assert one["eval"] == hits / 60
    model, tokenizer = backbone(tiny)
    scorer = Scorer(TASKS["digits_upright"], tokenizer)
    rows = scorer.encode(splits_of(60))
    (together,) = judge(scorer, model, [rows])
    assert together.guesses == [judge(scorer, model, [[row]])[0].guesses[0] for row in rows]
    assert one["run"]["backbone"] == backbones.identity(str(tiny), tmp_path)
    assert one["model"] == tiny.name


def splits_of(count: int) -> tuple[Example, ...]:
    return load(TASKS["digits_upright"]).splits(5, 64, 32, count).eval
