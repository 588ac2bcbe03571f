"""What the mixers are told about a step: vLLM's own metadata for mamba layers, and how its prompts are grouped."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder

from hybridize.serving.prefill import PrefillGroup, plan_prefill


@dataclass
class MixerMetadata(BaseMambaAttentionMetadata):
    """A step's metadata; decodes come first, then prompts.

    Attributes:
        groups: the step's prompts as rectangles.
    """

    groups: tuple[PrefillGroup, ...] = ()


@dataclass
class _Step:
    """What has been built for a step.

    Attributes:
        starts: the tensor that all groups of a step are given, and no two steps.
        metadata: of the group that came first.
        builders: of the groups that have theirs.
    """

    starts: Any
    metadata: MixerMetadata
    builders: set[int]


class MixerMetadataBuilder(BaseMambaAttentionMetadataBuilder[MixerMetadata]):
    """Builds it, once a step for all layers of a cache group.

    Groups differ in nothing but where their states lie. So what is built for the first group of a step serves the
    others, with pages of their own. vLLM's older model runner sees to that by itself, the newer one does not.
    """

    metadata_cls = MixerMetadata
    needs_causal_conv1d_metadata = False
    _latest: ClassVar[_Step | None] = None

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any) -> Any:
        """Build a step's metadata; see vLLM's `AttentionMetadataBuilder.build`."""
        starts, latest = common_attn_metadata.query_start_loc_cpu, MixerMetadataBuilder._latest
        if latest is not None and latest.starts is starts and id(self) not in latest.builders:
            latest.builders.add(id(self))
            pages, slots = common_attn_metadata.block_table_tensor, common_attn_metadata.slot_mapping
            return self.update_block_table(latest.metadata, pages, slots)
        metadata = self._build_first(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        MixerMetadataBuilder._latest = _Step(starts, metadata, {id(self)})
        return metadata

    def _build_first(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any
    ) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        if metadata.num_prefills == 0:
            return metadata
        lengths = torch.diff(common_attn_metadata.query_start_loc_cpu)[: metadata.num_reqs]
        prompts = slice(metadata.num_reqs - metadata.num_prefills, None)
        # Of prompts, the host knows the lengths exactly, whatever runs ahead of it.
        seen = common_attn_metadata.seq_lens_cpu_upper_bound[: metadata.num_reqs] - lengths
        groups = plan_prefill(lengths[prompts].tolist(), (seen[prompts] == 0).tolist(), self.device)
        return replace(metadata, groups=tuple(groups))


class MixerBackend(AttentionBackend):
    """Tells vLLM which builder the mixers' layers need."""

    @staticmethod
    def get_name() -> str:
        """The backend's name in logs."""
        return "HYBRIDIZE_MIXER"

    @staticmethod
    def get_impl_cls() -> Any:
        """Mixers are no attention."""
        raise NotImplementedError("mixers have no attention implementation")

    @staticmethod
    def get_builder_cls() -> type[MixerMetadataBuilder]:
        """The builder of a step's metadata."""
        return MixerMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """States are of constant size."""
        return True
