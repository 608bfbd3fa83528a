"""The configuration: which network, on which modules. Plain data throughout, so that every file of it is readable."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Annotated, Any, Literal

from peft.config import PeftConfig

from tnpeft.adapters import config_validation as valid
from tnpeft.adapters.constants import TENSOR_NETWORK
from tnpeft.adapters.storage.files import AGAIN, LOADING, Stored, describe, fetch, stored, written
from tnpeft.adapters.storage.serialization import factorization, lower, with_rank_pattern
from tnpeft.networks import AdapterFileError, ConfigError, Factorization, replicated

_CHANGES = ("ranks", "splits", "init", "scale", "unit_norm", "lr_multiplier", "square")  # in the order of the fields


@dataclass
class TensorNetworkConfig(PeftConfig):
    """Configuration of an adapter whose update is a tensor network.

    Args:
        network: a :class:`tnpeft.Factorization`, a family's name, or a line of named einsum; kept as plain data,
            read back by :attr:`factorization`.
        target_modules: names of modules (their order orders the projections), a regular expression,
            ``"all-linear"``, names or roles of the model's card such as ``"c_attn/out:0"``, or None for its default.
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: numbers of the layers to adapt; None for all.
        layers_pattern: name of the list of layers, where it is not obvious.
        modules_to_save: modules that are trained and saved in full, such as a classifier.
        trainable_token_indices: tokens whose embeddings are trained besides: their numbers, or numbers by the name of
            the embedding module.
        bias: which biases are trained: none, all, or tensor_network_only (those of adapted linears).
        dropout: probability with which entries of an adapter's input are dropped in training.
        stack: sizes of further stack indices of the line, ``{"scene": 24}``: :func:`tnpeft.select` chooses the value
            that a call, or each row of it, uses.
        axes: what the axes of Parameters mean that modules read themselves, by their names: ``{"kernel": "inp out"}``
            for a matrix that is not ``out inp``; several matrices in one are ``"expert out inp"`` or
            ``"expert inp out"``.
        seed: of the start values and of the frozen random factors.
        replicas: adapters that train side by side in one pass, see :mod:`tnpeft.adapters.replicas.api`.
        replica_seeds: the seed of each; None for seed, seed + 1, and so on.
        replica_ranks: the ranks in which each differs from ``network``, ``[{"r": 2}, {"r": 4}]``; None for none.
        replica_scales: the effective scale of each; None for that of ``network``.
        save_frozen: write frozen factors to the file too, instead of regenerating them from the seed.
        dora: learn a magnitude per output feature and normalise the updated weight's rows (arXiv 2402.09353).
        relative_step: size of a step relative to the base weight's, for :func:`tnpeft.parameter_groups` where it gets
            neither a rate nor a step; None for none.
        tokens: rows of activations per step (of each replica) that the contraction is planned for.
        layers: saved order of layers, path to position; filled in when the adapter is placed.
        projections: saved order of projections, name to position; filled in likewise.
        frozen: hash of every frozen factor; filled in likewise, and compared when the adapter is loaded.
        embeddings: names of the model's embedding weights that the folder holds, resized ones; written by
            ``save_pretrained``. No other weight of the base model is replaced when an adapter is loaded.
        ranks: size of every bond (not kept: part of ``network``, as are the following).
        splits: sizes of the indices in the row and column groups.
        init: start values by factor.
        scale: effective number that multiplies the update.
        unit_norm: factors whose columns are normalised in the forward pass.
        lr_multiplier: learning rate of a factor relative to the others.
        square: cut every site into square slices along its longer side.
        rank_pattern: other ranks for some projections, ``{"v_proj": {"r": 4}}``.

    Raises:
        ConfigError: the network or one of its values does not fit, or the file's schema is unknown.

    >>> config = TensorNetworkConfig(network="B[layer proj out r] A[r inp] -> layer proj out inp", ranks={"r": 8})
    >>> print(config.factorization.network)
    B[layer proj out r] A[r inp] -> layer proj out inp
    """

    network: Any = None
    target_modules: Collection[valid.Name] | valid.Pattern | None = None
    exclude_modules: Collection[valid.Name] | valid.Pattern | None = None
    layers_to_transform: valid.Whole | Collection[valid.Whole] | None = None
    layers_pattern: Literal[""] | valid.Path | Collection[valid.Path] | None = None
    modules_to_save: Collection[valid.Path] | None = None
    trainable_token_indices: Collection[valid.Whole] | Mapping[valid.Path, Collection[valid.Whole]] | None = None
    bias: valid.Bias = "none"
    dropout: valid.Share = 0.0
    stack: Mapping[valid.Index, valid.Count] | None = None
    axes: Mapping[object, str] | None = None
    seed: valid.Whole = 0
    replicas: valid.Replicas = 1
    replica_seeds: Sequence[valid.Whole] | None = None
    replica_ranks: Sequence[Mapping[valid.Name, valid.Count]] | None = None
    replica_scales: Sequence[float] | None = None
    save_frozen: bool = False
    dora: bool = False
    tokens: valid.Count = 2048
    relative_step: valid.Positive | None = None
    layers: Annotated[Mapping[str, valid.Whole], valid.counted] | None = field(default=None, repr=False)
    projections: Annotated[Mapping[valid.Name, valid.Whole], valid.counted] | None = None
    frozen: Mapping[valid.Name, valid.Name] | None = field(default=None, repr=False)
    embeddings: list[str] | None = field(default=None, repr=False)
    ranks: InitVar[Mapping[str, int | str] | None] = None
    splits: InitVar[Mapping[str, Any] | None] = None
    init: InitVar[Mapping[str, Any] | None] = None
    scale: InitVar[float | None] = None
    unit_norm: InitVar[Any] = None
    lr_multiplier: InitVar[Mapping[str, float] | None] = None
    square: InitVar[bool | None] = None
    rank_pattern: InitVar[Mapping[str, Mapping[str, int]] | None] = None

    def __post_init__(self, *changes: Any) -> None:
        valid.check_fields(self)
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.peft_type = TENSOR_NETWORK
        *fields, rank_pattern = changes or (None,) * (len(_CHANGES) + 1)
        given = dict(zip(_CHANGES, fields, strict=True))
        f = factorization("lora" if self.network is None else self.network, **given)
        self._factorization = with_rank_pattern(f, rank_pattern) if rank_pattern else f
        self.patterns = tuple(rank_pattern or ())
        self.network = lower(self._factorization)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name), set | tuple | list):
                setattr(self, name, [*dict.fromkeys(sorted(names) if isinstance(names, set) else names)])
        for name in ("replica_seeds", "replica_ranks", "replica_scales"):
            setattr(self, name, None if getattr(self, name) is None else [*getattr(self, name)])
        self._check()
        # What a file of factors fixes, the model has to meet; what a model fixed, the next model may fix anew.
        self.loaded = False
        self.named: list[str] = []
        self.stored: Stored | None = None
        self.keep_model()

    def _check(self) -> None:
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform", remedy="pass both, or neither")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError(
                "layers_to_transform does not go with a regular expression in target_modules",
                remedy="write the layers into the expression, or pass a list of names",
            )
        for line in self._factorization.lines:
            if "task" in line.network.indices and "task" not in (self.stack or {}):
                raise ConfigError(
                    "no row of a batch says which task it belongs to",
                    line=str(line.network),
                    position=str(line.network).index("task"),
                    remedy='declare it, stack={"task": 4}, and choose with tnpeft.select; or attach one adapter for '
                    "each task and name them row by row (adapter_names), or train them side by side (replicas)",
                )
        valid.check_replicas(self)
        valid.check_stack(self.stack, self)
        if self.replicas > 1:
            _ = self.side_by_side  # that it can be

    @property
    def factorization(self) -> Factorization:
        """The factorization that ``network`` holds as plain data."""
        return self._factorization

    def of_replica(self, k: int) -> Factorization:
        """The factorization of replica k, at its own ranks and scale."""
        f = self._factorization
        ranks = {} if self.replica_ranks is None else self.replica_ranks[k]
        scale = f.scale if self.replica_scales is None else self.replica_scales[k]
        return replace(f.with_ranks(**ranks), scale=scale)

    @property
    def side_by_side(self) -> Factorization:
        """The factorization of all replicas in one."""
        differing = self.replica_ranks or self.replica_scales or [None]
        return replicated(*(self.of_replica(k) for k in range(len(differing))))

    def extract_replica(self, k: int) -> TensorNetworkConfig:
        """The configuration of replica k as that of an adapter of its own, as if read from a file."""
        config = copy.deepcopy(self)
        config._factorization = self.of_replica(k)
        config.network = lower(config._factorization)
        named = {name.rpartition("/"): its for name, its in (self.frozen or {}).items()}
        config.frozen = {name: its for (name, _, number), its in named.items() if number == str(k)}
        config.seed, config.replicas = self.seeds[k], 1
        config.replica_seeds = config.replica_ranks = config.replica_scales = None
        config.loaded, config.stored = True, None
        return config

    def copied(self, heads: Sequence[str] = ()) -> TensorNetworkConfig:
        """A copy whose ``modules_to_save`` is its own, with heads of classifiers in it, each once."""
        config = copy.copy(self)
        names = [*dict.fromkeys((*(self.modules_to_save or ()), *heads))]
        config.modules_to_save = names or self.modules_to_save
        return config

    def keep_model(self) -> None:
        """Let the name and the revision of the base model be those that :meth:`forget_model` returns to."""
        self._model = self.base_model_name_or_path, self.revision

    def forget_model(self) -> None:
        """Be the value that it was before PEFT wrote the name and the revision of a base model into it."""
        self.base_model_name_or_path, self.revision = self._model

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of every replica."""
        return tuple(self.replica_seeds or range(self.seed, self.seed + self.replicas))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data, sets sorted, so that saving it twice gives the same bytes."""
        data = super().to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in data.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and into the model card what this adapter is and how to load it."""
        with written(save_directory) as folder:
            super().save_pretrained(str(folder), **kwargs)
            describe(str(folder), {"": self.factorization})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> TensorNetworkConfig:
        """Return the configuration in a folder or hub repository, the factors in it checked before any is loaded.

        Without a file of factors it is what any configuration is: a recipe for adapters to be trained.

        Raises:
            ConfigError: a value is not one that this version reads.
            AdapterFileError: the configuration or the file of factors is damaged.
        """
        config: TensorNetworkConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if not isinstance(config, TensorNetworkConfig):
            return config  # as PEFT's own classes do with a file of another kind
        try:
            file = fetch(pretrained_model_name_or_path, subfolder, **cls._split_kwargs(kwargs)[0])
        except AdapterFileError:
            if LOADING.get():
                raise
            return config
        config.stored, config.loaded = stored(file), True
        if config.layers is None or config.projections is None or config.frozen is None:
            raise AdapterFileError(
                "the configuration lacks layers, projections or frozen, which every saved adapter has", remedy=AGAIN
            )
        return config
