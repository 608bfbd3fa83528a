"""The protocol of training and evaluation of a run, as data with a hash."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from tnpeft.studies.files import StudyError, digest
from tnpeft.studies.schema import at_least, build, check, kinds

_LATER = ("by_length", "epochs", "head_lr", "relative_step", "precondition")  # off by default


@dataclass(frozen=True)
class Protocol:
    """Everything that two runs must share to be compared.

    Attributes:
        targets: projections that get an adapter; empty takes the architecture's default.
        train, dev, eval: numbers of examples (0: all; dev 0: a tenth of the training part).
        steps, batch, accumulate: optimizer steps, examples per batch, batches per step.
        epochs: passes over the training examples, judged after each, in place of steps and evaluate_every; 0: none.
        learning_rates: the grid that every method without one of its own sweeps.
        head_lr: the learning rate of a new classification head; 0: the adapter's.
        relative_step: size of a first step relative to the base weight, from which the rates of the adapter's
            factors follow (see :func:`tnpeft.parameter_groups`); 0: they learn at the learning rate.
        rate_rule: ``rate``, or the numbers in learning_rates are relative steps, and the rates follow from them by
            gain (``relative_step``), or by the rule ``structure`` or ``measured`` of :func:`tnpeft.parameter_groups`.
        precondition: gauge-invariant steps (see :func:`tnpeft.optim.precondition`).
        tune_seeds: seeds (the first ones) with which the grid is swept; the rest runs at the best rate alone.
        schedule, warmup: shape of the learning rate; warm-up as a fraction of the steps.
        weight_decay, clip: of AdamW; largest norm of the gradient (0: no clipping).
        evaluate_every: steps between evaluations on dev.
        checkpoint: the one that is reported on eval: the last, or the best on dev (chosen among several looks).
        best_by: metric (ties: the smaller loss) or loss.
        patience: evaluations without a better checkpoint after which a run is hopeless and stops; 0 waits for ever
            (but a run with a loss that is not finite always stops).
        head: words (scores of the label words) or classifier (a new classification head, trained too).
        max_length: tokens; longer examples lose their beginning.
        dtype: of the frozen backbone; adapters are kept in float32.
        by_length: batches of examples of about equal length, which wastes less on padding.

    >>> Protocol(steps=100).digest == Protocol(steps=200).digest
    False
    """

    targets: tuple[str, ...] = ()
    train: int = 1000
    dev: int = 500
    eval: int = 1000
    steps: int = 500
    batch: int = 16
    accumulate: int = 1
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    tune_seeds: int = 1
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.0
    clip: float = 1.0
    evaluate_every: int = 50
    best_by: Literal["metric", "loss"] = "metric"
    patience: int = 0
    head: Literal["words", "classifier"] = "words"
    max_length: int = 256
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    by_length: bool = False
    epochs: int = 0
    head_lr: float = 0.0
    checkpoint: Literal["last", "best"] = "last"
    relative_step: float = 0.0
    rate_rule: Literal["rate", "relative_step", "structure", "measured"] = "rate"
    precondition: bool = False

    def __post_init__(self) -> None:
        check(vars(self), kinds(Protocol), "protocol")
        at_least(self, "protocol", batch=1, accumulate=1, evaluate_every=1, max_length=1, tune_seeds=1)
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise StudyError("learning_rates must be positive and not empty", where="protocol")

    @staticmethod
    def of(table: Mapping[str, Any]) -> Protocol:
        """A protocol from a table.

        Raises:
            StudyError: a key is unknown or a value has the wrong kind.

        >>> Protocol.of({"targets": ["q_proj"], "steps": 5}).targets
        ('q_proj',)
        """
        return build(Protocol, table, "protocol")

    @property
    def training(self) -> dict[str, Any]:
        """The settings that determine a single run: all but the grid, which each run picks from.

        A setting that came later is left out where it is off, so that the runs made before it keep their names.
        """
        off = [name for name in _LATER if not getattr(self, name)]
        return {k: v for k, v in asdict(self).items() if k not in ("learning_rates", "tune_seeds", *off)}

    @property
    def reported(self) -> str:
        """The checkpoint that is reported: ``last``, or the best by ``metric`` or ``loss``."""
        return "last" if self.checkpoint == "last" else self.best_by

    def on(self, examples: int) -> Protocol:
        """The protocol of a training on so many examples: its epochs as steps.

        >>> its = Protocol(epochs=3, batch=16, accumulate=2).on(100)
        >>> its.steps, its.evaluate_every, its.epochs
        (12, 4, 0)
        """
        if not self.epochs:
            return self
        each = math.ceil(math.ceil(examples / self.batch) / self.accumulate)
        return replace(self, epochs=0, steps=self.epochs * each, evaluate_every=each)

    @property
    def digest(self) -> str:
        """The hash of all settings."""
        return digest(asdict(self))
