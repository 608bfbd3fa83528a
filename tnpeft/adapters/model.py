"""The tuner: it places an adapter's network on a model's linears and keeps PEFT's conventions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from tnpeft.adapters.attach import attach
from tnpeft.adapters.config import TensorNetworkConfig
from tnpeft.adapters.config_validation import check_replicas
from tnpeft.adapters.constants import PREFIX
from tnpeft.adapters.experts.module import TensorNetworkExperts, names_in
from tnpeft.adapters.experts.weight import ExpertWeight
from tnpeft.adapters.layer import columns
from tnpeft.adapters.layer.bank import BANK, FactorBank, TensorNetworkLayer, find_bank
from tnpeft.adapters.layer.checkpointing import watch
from tnpeft.adapters.layer.merging import DenseLinear
from tnpeft.adapters.layer.mixed_batch import BatchAdapterNames, check_names, rows_for_each
from tnpeft.adapters.replicas.batch import check_blocks
from tnpeft.adapters.rollback import layers, or_as_before, outside, parked, walk
from tnpeft.adapters.sites.parameter import check_one_for_all, remove_hooks
from tnpeft.adapters.state import bank_of
from tnpeft.adapters.storage.contents import AGAIN, check_modules
from tnpeft.adapters.storage.expressions import check_expression
from tnpeft.adapters.storage.files import check_state, translated
from tnpeft.adapters.targets import card_of, resolve
from tnpeft.adapters.weighted_sum import combine
from tnpeft.networks import AdapterFileError, ConfigError, NetworkError

_UNFIT = (ValueError, TypeError, KeyError, AttributeError)  # of PEFT, whose cause is the folder that is loaded
_EXACT = {"combination_type": "cat", "svd_full_matrices": True, "majority_sign_method": "total"}  # else None


class TensorNetworkModel(BaseTuner):
    """A model with tensor-network adapters, as ``peft.get_peft_model`` makes it from a configuration.

    All linears of an adapter, and the bank, are made when PEFT hands over the first one: earlier, PEFT would take
    the call for a second adapter and leave the base model trainable.

    >>> TensorNetworkModel.prefix
    'tnpeft_'
    """

    prefix: str = PREFIX
    tuner_layer_cls = TensorNetworkLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(
        self, peft_config: TensorNetworkConfig, model_config: dict[str, Any]
    ) -> TensorNetworkConfig:
        if peft_config.target_modules is None and (card := card_of(self.model)) is not None:
            peft_config.target_modules = list(card.default)
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        check_replicas(peft_config)  # again: for a classifier PEFT has added its head to modules_to_save
        targets = peft_config.target_modules
        if isinstance(targets, list | set) and not peft_config.loaded:
            ordered = sorted(targets) if isinstance(targets, set) else targets
            peft_config.target_modules, peft_config.named = resolve(self.model, ordered)
        return peft_config

    def _check_tied_modules(self, model: nn.Module, peft_config: TensorNetworkConfig) -> None:
        if peft_config.modules_to_save:  # tied targets are one site, and merging keeps the tie
            super()._check_tied_modules(model, peft_config)

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Place an adapter, or leave the model as it was, whatever fails.

        The configuration is copied, so that one object serves for several models. It names its modules, so a state
        dict is not asked for them.
        """
        kwargs["state_dict"] = None
        bank = getattr(model, BANK, None)
        known = bank.configs.get(adapter_name) if isinstance(bank, FactorBank) else None
        given = self.peft_config[adapter_name]
        if known is not None:
            self.peft_config[adapter_name] = known
            raise ConfigError(
                f"the model has an adapter {adapter_name!r} already", remedy="delete it first, or choose another name"
            )
        try:
            with or_as_before(self), parked(model):
                config = self.peft_config[adapter_name] = copy.deepcopy(translated(model, given).copied())
                config.keep_model()
                self._inside = {name: names_in(module) for name, module in model.named_modules()}
                for field in ("target_modules", "exclude_modules"):
                    if isinstance(pattern := getattr(config, field), str):
                        check_expression(field, pattern, self._inside)
                check_modules(model, config, adapter_name)
                inner = (f"{name}.{its}" for name, names in self._inside.items() for its in names)
                probe = copy.copy(config)
                probe.target_modules = config.target_modules or []  # the model's own are not known yet
                with warnings.catch_warnings():
                    if any(isinstance(check_target_module_exists(probe, path), _ExcludedModule) for path in inner):
                        warnings.filterwarnings("ignore", "You have passed exclude_modules")  # PEFT sees modules only
                    super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException as error:
            self.peft_config.pop(adapter_name, None)  # the table may be the model's own, which transformers leaves
            if given.loaded and isinstance(error, _UNFIT) and not isinstance(error, NetworkError):
                raise AdapterFileError(f"the adapter does not fit the model: {error}", remedy=AGAIN) from error
            raise
        config.loaded, config.stored = False, None  # what a model fixed, the next model may fix anew

    def _check_target_module_exists(self, peft_config: TensorNetworkConfig, key: str) -> Any:  # type: ignore[override]
        """The same as for any tuner, but the bank is not a target, and a fused weight of experts may be one."""
        if key.split(".")[0] == BANK:
            return False
        found = check_target_module_exists(peft_config, key)
        if found or isinstance(found, _ExcludedModule):
            return found
        return any(check_target_module_exists(peft_config, f"{key}.{its}") for its in self._inside.get(key, ()))

    def _create_and_replace(
        self,
        peft_config: TensorNetworkConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional: Any,
    ) -> None:
        bank = getattr(self.model, BANK, None)
        if not isinstance(bank, FactorBank) or adapter_name not in bank.layouts:
            modules = {
                name: module
                for name, module in outside(self.model)
                if name and self._check_target_module_exists(peft_config, name)
            }
            meant = partial(check_target_module_exists, peft_config)
            attach(self.model, modules, peft_config, adapter_name, meant, self._bank)

    def _bank(self, first: nn.Module) -> FactorBank:
        """The model's bank, made if there is none, on the device of the first module of an adapter."""
        bank: FactorBank | None = getattr(self.model, BANK, None)
        if bank is not None and not isinstance(bank, FactorBank):
            raise NetworkError(
                f"the model has something of its own called {BANK!r}, where shared factors would be kept",
                remedy="rename it, or adapt a module that holds the model",
            )
        if bank is None:
            bank = FactorBank(resolve_quantization_backend(first, **get_quantization_kwargs(self.model)))
            setattr(self.model, BANK, bank.train(self.model.training))
            self.model.register_forward_pre_hook(watch)
        bank.device = next(first.parameters()).device
        return bank

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep all that an adapter trains in fp32, or cast it to the base weight's dtype if autocasting is off."""
        found = [*layers(self.model)]
        dtype = next(layer for layer in found if isinstance(layer, DenseLinear)).base_dtype()
        if not autocast_adapter_dtype and (dtype is None or not dtype.is_floating_point):
            return
        for layer in found:
            layer.cast(adapter_name, None if autocast_adapter_dtype else dtype)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights; if one linear refuses or fails, all are as before.

        Raises:
            NetworkError: an adapter is unknown, the adapters are switched off, a weight takes no merge, or
                ``safe_merge`` found a number that is not finite.
        """
        if getattr(self.model, BANK).disable_adapters:
            raise NetworkError(
                "the adapters are switched off, and a merged weight would have them on",
                remedy="call enable_adapter_layers() first, or leave the disable_adapter() context",
            )
        self._refuse_merge(adapter_names)
        with or_as_before(self):
            super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore the base weights; if one linear fails, all are merged as before."""
        with or_as_before(self):
            super().unmerge_adapter()

    def _refuse_merge(self, adapter_names: Sequence[str] | None) -> None:
        """Raise before the first linear is merged if any takes no merge, or an adapter is missing."""
        for name in () if isinstance(adapter_names, str) else adapter_names or ():
            bank_of(self.model, name)
        for name, module in walk(self.model):
            if isinstance(module, DenseLinear):
                try:
                    module.refuse_merge(module.active_adapters if adapter_names is None else adapter_names)
                except NetworkError as error:
                    raise NetworkError(f"{name} cannot be merged: {error.problem}", remedy=error.remedy) from None

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = True,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._refuse_merge(adapter_names)
        with or_as_before(self):
            if not merge and getattr(self.model, BANK).merged:
                self.unmerge_adapter()
            model: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
            delattr(model, BANK)
            remove_hooks(model, (watch, check_blocks, *columns.HOOKS))
        return model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: nn.Module) -> None:
        """Put one module, or none, in the place of another and leave both as they are, wherever they hold weights."""
        if new_module is None:
            delattr(parent, child_name)
        else:
            setattr(parent, child_name, new_module)

    # ---- several adapters

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was the only active one, the first by name becomes active, in all linears alike.

        Each linear would choose for itself otherwise, among those that it has. If one fails, all are as before.
        """
        bank: FactorBank = getattr(self.model, BANK)
        others = [name for name in bank.active_adapters if name != adapter_name]
        others = others or sorted({*bank.layouts} - {adapter_name})[:1]
        with or_as_before(self, (adapter_name, *others)):
            if adapter_name in bank.active_adapters and adapter_name not in bank.merged_adapters:
                for layer in layers(self.model):
                    layer.set_adapter(others)
            super().delete_adapter(adapter_name)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        **options: Any,
    ) -> None:
        """Add the weighted sum of adapters as one adapter, exactly: the direct sum of their networks.

        PEFT calls that ``cat`` for LoRA, where it puts matrices side by side; it is the only ``combination_type``,
        and so nothing for PEFT's further options to choose.

        Raises:
            NetworkError: the sum is not one network (see :func:`tnpeft.adapters.weighted_sum.combine`), or another
                combination or an option of one is asked for.
        """
        asked = {"combination_type": combination_type, **options}
        for name, value in asked.items():
            if value != _EXACT.get(name):
                raise NetworkError(
                    f"{name} is {value!r}", remedy="leave it out: the sum is exact, as with combination_type='cat'"
                )
        combine(self, adapters, weights, adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names`` (one per row of the batch) to every adapted linear for one call."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.model.training:
            raise NetworkError("adapter_names is for inference", remedy="call model.eval() first")
        check_names(names, self.peft_config)
        check_one_for_all(self.model, names)
        named = BatchAdapterNames(names, rows_for_each(kwargs, self.model))
        find = getattr(self.model, "get_encoder", None)
        entered = {self.model, find() if callable(find) else None} - {None}
        handles = [module.register_forward_pre_hook(named.enter, with_kwargs=True) for module in entered]
        for module in self.modules():
            called = DenseLinear | TensorNetworkExperts | AuxiliaryTrainingWrapper
            if isinstance(module, called) and not isinstance(module, ExpertWeight):  # which experts call by rows
                handles.append(module.register_forward_pre_hook(named.hand, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- files

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: TensorNetworkConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        bank = find_bank(model)
        if bank is not None and adapter_name in bank.layouts:
            check_state(model, config, adapter_name, bank.layouts[adapter_name], state_dict)
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return remapped
