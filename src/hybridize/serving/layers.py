"""The layers that stand in the place of vLLM's attention: a mixer with its state in vLLM's cache, and nothing at all.

Legend: T tokens of a step, S sequences, E hidden size, X channels of a convolution, K its taps, P pages of the cache.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context

# Registers the custom op by which torch.compile leaves a layer to its `forward_impl`; vLLM splits its graphs there.
from vllm.model_executor.layers.mamba import mamba_mixer as _mamba_mixer  # noqa: F401
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from hybridize.mixers import MixerState
from hybridize.models.adapter import MixerLayer
from hybridize.serving.loading import Target
from hybridize.serving.metadata import MixerBackend, MixerMetadata
from hybridize.serving.pages import StatePage, with_oldest
from hybridize.serving.projections import take_output_projection
from hybridize.serving.shards import part_of_spec, shard_rules
from hybridize.serving.states import state_dtypes
from hybridize.spec import MixerSpec

# The null page, to which vLLM points rows that stand for no request.
_NO_PAGE = 0


class ServedMixer(nn.Module, MambaBase):
    """A mixer as a layer of vLLM's.

    Args:
        spec: the resolved spec of the whole mixer.
        layer: its position in the decoder.
        vllm_config: vLLM's configuration.
        prefix: the layer's name in vLLM.
        page_bytes: of the cache's pages, which hold the largest state of the model's layers.
    """

    def __init__(self, spec: MixerSpec, layer: int, vllm_config: VllmConfig, prefix: str, page_bytes: int) -> None:
        super().__init__()
        self.spec, self.prefix, self.page_bytes = spec, prefix, page_bytes
        self.num_ranks = get_tensor_model_parallel_world_size()
        part = part_of_spec(spec, self.num_ranks, f"layer {layer}")
        layer_in_training = MixerLayer(part, vllm_config.model_config.hf_config.hidden_size, layer)
        self.mixer = layer_in_training.cast(vllm_config.model_config.dtype).mixer.requires_grad_(False)
        self.mixer.pack_projections()
        self._projection = (take_output_projection(self.mixer),)  # in a tuple: it is the mixer's already
        self.page = StatePage.of(self.mixer.state_shapes(1), *state_dtypes(vllm_config))
        self.kv_cache: Any = (torch.tensor([]),)
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"{prefix}: vLLM has a layer of that name already")
        layers[prefix] = self

    def targets(self, name: str) -> dict[str, Target]:
        """Where the tensors of the checkpoint go that belong to this layer, which it calls `name`."""
        rules = shard_rules(self.spec)
        return {f"{name}.mixer.{key}": Target(p, rules.get(key)) for key, p in self.mixer.named_parameters()}

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Mix a step's tokens, [T, E]; positions and what else decoder layers hand to attention are not needed."""
        output_TE = torch.empty_like(hidden_states)
        torch.ops.vllm.mamba_mixer(hidden_states, output_TE, _encode_layer_name(self.prefix))
        return output_TE

    def forward_impl(self, hidden_states: Tensor, output: Tensor) -> None:
        """Mix a step's tokens: decodes, then prompts, as the step's metadata says; called by vLLM's custom op."""
        metadata = get_forward_context().attn_metadata
        if metadata is not None:
            metadata = metadata.get(self.prefix)
        if metadata is None:  # vLLM measures memory
            out_1TE, _ = self.mixer(hidden_states.unsqueeze(0))
            output.copy_(out_1TE.squeeze(0))
        else:
            self._mix(hidden_states, output, metadata)
        if self.num_ranks > 1:
            output.copy_(tensor_model_parallel_all_reduce(output))

    def _mix(self, hidden_TE: Tensor, output_TE: Tensor, metadata: MixerMetadata) -> None:
        conv_PXk, ssm_P = self.page.views(self.kv_cache[0])
        num_decodes = metadata.num_decode_tokens
        num_tokens = num_decodes + metadata.num_prefill_tokens
        if num_decodes:
            page_S = metadata.state_indices_tensor_d[:num_decodes, 0].contiguous()
            with self._projection[0].writing_to(output_TE[:num_decodes]):
                self.mixer.step_in_place(hidden_TE[:num_decodes], conv_PXk, ssm_P, page_S, null_slot=_NO_PAGE)
        for group in metadata.groups:
            page_S = metadata.state_indices_tensor_p[group.sequences].long()
            out_SLE, state = self.mixer(
                group.gather(hidden_TE[num_decodes:num_tokens]),
                valid_BL=group.valid,
                state=None if group.fresh else _read(conv_PXk, ssm_P, page_S),
                return_state=True,
            )
            _write(conv_PXk, ssm_P, page_S, state)
            group.scatter(out_SLE, output_TE[num_decodes:num_tokens])
        output_TE[num_tokens:] = 0.0

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """The state as vLLM sees it: a page of bytes."""
        return ((self.page_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Bytes."""
        return (torch.uint8,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The nearest of the kinds that vLLM knows; it decides nothing here."""
        return MambaAttentionBackendEnum.MAMBA1

    def get_attn_backend(self) -> type[MixerBackend]:
        """The backend that builds this layer's metadata."""
        return MixerBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MambaSpec:
        """What vLLM's cache must keep for this layer.

        Raises:
            ValueError: the cache's pages are smaller than the state.
        """
        padded = vllm_config.cache_config.mamba_page_size_padded
        if padded is not None and padded < self.page_bytes:
            raise ValueError(
                f"mamba_page_size_padded: a page of the cache has {padded} bytes, but a state of this model takes "
                f"{self.page_bytes}; leave --block-size and --mamba-block-size to vLLM, or raise them, or use "
                "--mamba-ssm-cache-dtype bfloat16"
            )
        return super().get_kv_cache_spec(vllm_config)


class ServedIdentity(nn.Module):
    """Nothing in attention's place; it has no parameters, and no place in the cache."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Zeros, which leave the residual stream as it is."""
        return torch.zeros_like(hidden_states)


def _read(conv_PXk: Tensor, ssm_P: Tensor, page_S: Tensor) -> MixerState:
    return MixerState(conv=with_oldest(conv_PXk[page_S]), ssm=ssm_P[page_S].float())


def _write(conv_PXk: Tensor, ssm_P: Tensor, page_S: Tensor, state: MixerState) -> None:
    conv_PXk[page_S] = state.conv[..., 1:].to(conv_PXk.dtype)
    ssm_P[page_S] = state.ssm.to(ssm_P.dtype)
