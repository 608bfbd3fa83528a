"""Tiny mixtures of experts with random weights, and what the tests on them share."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

import tnpeft

EXPERTS, WIDTH, HIDDEN = 4, 16, 32
_SIZES = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_experts_per_tok": 2}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
_SIZES |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_MIXTURE = {**_SIZES, "num_experts": EXPERTS, "moe_intermediate_size": WIDTH}
_LATENT = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 7}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**_SIZES, "num_local_experts": EXPERTS},
    "qwen2_moe": {**_MIXTURE, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {**_MIXTURE, "head_dim": 16},
    "olmoe": {**_SIZES, "num_experts": EXPERTS, "num_experts_per_tok": 3},
    "gpt_oss": {**_SIZES, "head_dim": 16, "num_local_experts": EXPERTS},
    "deepseek_v3": {
        **{**_MIXTURE, "num_experts": None, "num_key_value_heads": 4, "n_routed_experts": EXPERTS},
        **{"n_shared_experts": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, **_LATENT},
    },
}


def mixture(kind: str = "mixtral", implementation: str = "eager", **changes: Any) -> nn.Module:
    """A tiny model; every weight is drawn, for those of experts may be left empty and routers zero."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**CONFIGS[kind], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    return model


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(1))


def attached(base: nn.Module, network: Any, targets: Any = ("experts",), **options: Any) -> peft.PeftModel:
    targets = [*targets] if isinstance(targets, tuple) else targets
    config = tnpeft.TensorNetworkConfig(network=network, target_modules=targets, **options)
    return peft.get_peft_model(copy.deepcopy(base), config).eval()


def logits(model: nn.Module, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(), **more).logits


class KeepDouble(TorchFunctionMode):
    """Let nothing in a model of double precision round to fp32 on the way, as norms and routers do."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.dtype == torch.float64:
            if function in (Tensor.float, Tensor.type):
                return first
            if function is Tensor.to and torch.float32 in (*args[1:], *kwargs.values()):
                return first
            if kwargs.get("dtype") in (torch.float32, torch.float):
                kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)
