"""A mixer in the place of an attention module: the same call, the same cache object."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from hybridize.mixers import MixerState, build_mixer
from hybridize.spec import MixerSpec

# Parameters of a mixer or a window that stay fp32 in a half-precision model, as patterns on tensors' names: a decay
# or a step size rounded to 8 bits would be off by up to a percent at every token, and a logit by as much.
FP32_PATTERNS = (
    r"\.mixer\.A_log$",
    r"\.mixer\.D$",
    r"\.mixer\.dt_bias$",
    r"\.mixer\.dt_proj\.bias$",
    r"\.sink$",
)


class MixerLayer(nn.Module):
    """Stands where a decoder layer expects its attention and runs a mixer instead.

    Its tensors are called `<attention path>.mixer.<name>`, e.g.
    `model.layers.3.self_attn.mixer.in_proj.weight`.

    Args:
        spec: the resolved mixer spec.
        hidden_size: E, width of the residual stream.
        layer_idx: the layer's position in the decoder, which is its place in the cache.
        initializer_range: standard deviation of randomly initialised projections.
        cache_argument: by what name the decoder layer hands over the cache.
    """

    def __init__(
        self,
        spec: MixerSpec,
        hidden_size: int,
        layer_idx: int,
        initializer_range: float = 0.02,
        cache_argument: str = "past_key_values",
    ) -> None:
        super().__init__()
        self.spec = spec
        self.layer_idx = layer_idx
        self.cache_argument = cache_argument
        self.mixer = build_mixer(spec, hidden_size, initializer_range=initializer_range)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        mixer_valid: Tensor | None = None,
        mixer_starts: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mix along the sequence.

        Args:
            hidden_states: [batch, length, hidden].
            attention_mask: the mask made for attention; unused, since a mixer is causal by nature.
            position_ids: unused, since a mixer has no positional encoding.
            past_key_values: transformers' cache. Given, the layer goes on from its state and stores the new
                one. It may come by another name, `cache_argument`.
            mixer_valid: [batch, length], False at padding; handed down by the hybrid (see
                `hybridize.models.hybrid`).
            mixer_starts: [batch, length], True at the first token of each packed document; ignored with a
                cache, as transformers' attention masks ignore packing then.
            **kwargs: what else decoder layers hand to attention; unused.

        Returns:
            [batch, length, hidden] and None in the place of attention weights.

        Raises:
            ValueError: the cache holds something else for this layer, or another number of rows.
        """
        past_key_values = kwargs.get(self.cache_argument, past_key_values)
        if past_key_values is None:
            out_BLE, _ = self.mixer(hidden_states, starts_BL=mixer_starts, valid_BL=mixer_valid)
            return out_BLE, None
        state = self._read(past_key_values)
        must_keep = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if state is not None and hidden_states.shape[1] == 1 and mixer_valid is None and not must_keep:
            if state.conv.shape[0] != hidden_states.shape[0]:
                raise ValueError(
                    f"past_key_values: layer {self.layer_idx} holds {state.conv.shape[0]} rows, the input has "
                    f"{hidden_states.shape[0]}; reorder or remake the cache"
                )
            out_BE = self.mixer.step_in_place(hidden_states[:, 0], state.conv, state.ssm)
            self._write(past_key_values, None, hidden_states)
            return out_BE.unsqueeze(1), None
        out_BLE, state = self.mixer(hidden_states, valid_BL=mixer_valid, state=state, return_state=True)
        self._write(past_key_values, state, hidden_states)
        return out_BLE, None

    def _read(self, cache: Any) -> MixerState | None:
        layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            raise ValueError(
                f"past_key_values: layer {self.layer_idx} is a mixer, but the cache holds "
                f"{type(layer).__name__} for it; make the cache with DynamicCache(config=model.config)"
            )
        if not layer.has_previous_state[0]:
            return None  # nothing seen yet, or the cache was reset; or the mixer remembers nothing
        return MixerState(conv=layer.conv_states[0], ssm=layer.recurrent_states[0])

    def _write(self, cache: Any, state: MixerState | None, hidden_states: Tensor) -> None:
        if state is not None:
            # The cache appends what it is given to its window and keeps the last K taps. The mixer gives a whole
            # window of K taps, so the window is replaced.
            cache.update_conv_state(state.conv, self.layer_idx)
            cache.update_recurrent_state(state.ssm, self.layer_idx)
        if isinstance(cache.layers[self.layer_idx], CacheLayerMixin):
            # transformers counts the tokens seen in this layer: let it, in a key of width 1.
            tick = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(tick, tick, self.layer_idx)

    @torch.no_grad()
    def initialize_missing(self) -> None:
        """Initialise the parameters that no checkpoint has filled; leave the others as they are."""
        loaded = {
            name: parameter.detach().clone()
            for name, parameter in self.mixer.named_parameters()
            if getattr(parameter, "_is_hf_initialized", False)
        }
        if len(loaded) < sum(1 for _ in self.mixer.parameters()):
            self.mixer.reset_parameters()
            for name, parameter in self.mixer.named_parameters():
                if name in loaded:
                    parameter.copy_(loaded[name])
        for module in self.modules():
            module._is_hf_initialized = True

    def cast(self, dtype: torch.dtype) -> "MixerLayer":
        """Convert the parameters to `dtype`, but those that must stay fp32."""
        for name, parameter in self.named_parameters():
            exact = any(re.search(pattern, f".{name}") for pattern in FP32_PATTERNS)
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32) if exact else dtype)
        return self
