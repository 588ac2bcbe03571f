"""The hybrids' models in vLLM: its own class of the family, with mixers in the place of some layers' attention.

As in `hybridize.models`, nothing of a family's modelling code is copied: `__init__` builds vLLM's model as the
teacher's config describes it, and then replaces the attention modules of the layers whose entry in `config.mixers` is a
mixer.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.utils import PPMissingLayer, maybe_prefix

from hybridize.models import FAMILIES, ModelFamily, find_family, hybrid_model_class
from hybridize.serving.layers import ServedIdentity, ServedMixer
from hybridize.serving.loading import HybridWeights, Target, without_lost_biases
from hybridize.serving.natives import native_model
from hybridize.serving.shards import Shard
from hybridize.serving.states import has_state, state_page_bytes
from hybridize.serving.windows import windows_in_place
from hybridize.spec.mixers import AttentionSpec, SlidingWindowSpec


class ServedHybrid:
    """What makes vLLM's model of a family a hybrid."""

    named_parameters: Any
    get_submodule: Any
    set_submodule: Any
    family: ModelFamily

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        with _as_the_teacher(vllm_config), windows_in_place(config, self.family, prefix) as placed:
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._hybrid_config = config
        # What is quantised on disk has other tensors, and experts may be left to other ranks while they are read.
        self._is_packed = (
            getattr(config, "quantization_config", None) is not None
            or vllm_config.parallel_config.enable_expert_parallel
        )
        self._targets: dict[str, Target] = {}
        for path, sink in placed.sinks.items():
            self.get_submodule(path).register_parameter("sink", sink)
            self._targets[f"{path}.sink"] = Target(sink, Shard((config.num_attention_heads,)))
        self._closed: list[str] = []
        self._elsewhere: list[str] = []
        page_bytes = state_page_bytes(vllm_config)
        for layer, spec in enumerate(config.layout.layers):
            path = self.family.attention_path(layer)
            is_elsewhere = isinstance(self.get_submodule(f"{self.family.layers}.{layer}"), PPMissingLayer)
            if isinstance(spec, SlidingWindowSpec):
                assert is_elsewhere or path in placed.paths, f"vLLM's {self.family.model_class} takes no windows"
            if isinstance(spec, AttentionSpec | SlidingWindowSpec):
                continue
            if is_elsewhere:
                self._elsewhere.append(f"{path}.")
                continue
            self._closed.append(f"{path}.")
            _forget(vllm_config, maybe_prefix(prefix, f"{path}."))
            module: nn.Module = ServedIdentity()
            if has_state(spec):
                module = ServedMixer(spec, layer, vllm_config, maybe_prefix(prefix, path), page_bytes)
                self._targets |= module.targets(path)
            self.set_submodule(path, module)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint, each of its tensors accounted for.

        Raises:
            ValueError: a tensor is missing, or one of a mixer is unknown or of another shape.
        """
        own = HybridWeights(
            self._targets,
            self._closed,
            self._elsewhere,
            get_tensor_model_parallel_rank(),
            get_tensor_model_parallel_world_size(),
        )
        rest = own.take(weights)
        if get_pp_group().world_size == 1:  # else a bias may have its place in another stage
            names = {name for name, _ in self.named_parameters()}
            rest = without_lost_biases(rest, names, getattr(self, "packed_modules_mapping", None) or {})
        loaded = super().load_weights(rest)  # type: ignore[misc]
        own.check_complete({} if self._is_packed else _expected_tensors(self._hybrid_config))
        return set(loaded or ()) | own.loaded

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """The shape of what a layer keeps of a sequence: a page of bytes, the same for all mixers."""
        return ((state_page_bytes(vllm_config),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Its dtype: bytes."""
        return (torch.uint8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How a page is copied for prefix caching: as it is."""
        return (get_temporal_copy_spec,)


@contextmanager
def _as_the_teacher(vllm_config: VllmConfig) -> Iterator[None]:
    """Show vLLM's code the teacher's config for a while."""
    model_config = vllm_config.model_config
    shown = model_config.hf_config, model_config.hf_text_config
    model_config.hf_config = model_config.hf_text_config = teacher_config_of(model_config.hf_config)
    try:
        yield
    finally:
        model_config.hf_config, model_config.hf_text_config = shown


def teacher_config_of(config: Any) -> Any:
    """The teacher's config, of the class that transformers and vLLM have for the family, by a hybrid's."""
    teacher_class = find_family(config.model_type).teacher_config()
    fields = config.to_dict()
    for name in ("model_type", "mixers", "attention_types", "layer_types"):
        fields.pop(name, None)
    if "layer_types" in teacher_class.__dataclass_fields__:
        fields["layer_types"] = list(config.attention_types)
    teacher = teacher_class.from_dict(fields)
    rope = getattr(teacher, "rope_parameters", None) or {}
    if rope.get("llama_4_scaling_beta") is not None:  # Ministral 3's scale of queries, which vLLM looks for elsewhere
        teacher.llama_4_scaling = {
            "beta": rope["llama_4_scaling_beta"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
        }
    return teacher


def _expected_tensors(config: Any) -> dict[str, int]:
    """The number of entries of each tensor that a hybrid's checkpoint must have, by transformers' names."""
    with torch.device("meta"):
        model = hybrid_model_class(find_family(config.model_type).model_type)(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tensor.numel() for name, tensor in model.state_dict().items() if name not in tied}


def _forget(vllm_config: VllmConfig, prefix: str) -> None:
    """Remove what a replaced attention module has registered, so that it gets no place in the cache."""
    layers = vllm_config.compilation_config.static_forward_context
    for name in [name for name in layers if name.startswith(prefix)]:
        del layers[name]


@functools.cache
def served_model_class(model_type: str) -> Any:
    """The model class in vLLM of a family's hybrids, by the teacher's model type.

    Raises:
        ValueError: vLLM has no model of the family.
    """
    family = find_family(model_type)
    body = {
        "__module__": __name__,
        "__doc__": f"vLLM's {family.model_class} with mixers in the place of some layers' attention.",
        "family": family,
    }
    return type(family.hybrid_model_class, (ServedHybrid, native_model(family), HasInnerState, IsHybrid), body)


def __getattr__(name: str) -> Any:
    """Make `HybridLlamaForCausalLM` and its like importable by name, as vLLM's registry wants; built at first use."""
    for family in FAMILIES.values():
        if name == family.hybrid_model_class:
            return served_model_class(family.model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
