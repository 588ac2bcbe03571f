"""What serving a teacher and its hybrids will cost, from a config and layouts alone; imports no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from hybridize.bench.prediction import COPY_SHARE, GPUS, Gpu, Prediction, ServedShape, group_warning, predict
from hybridize.bench.scenarios import SHAPES, Scenario
from hybridize.pipeline.planning import read_teacher_config
from hybridize.pipeline.sizes import TeacherShape, mixer_parameters, state_numbers
from hybridize.spec.base import choose
from hybridize.spec.layout import LayoutSpec
from hybridize.spec.mixers import AttentionSpec, IdentitySpec, MixerSpec, SlidingWindowSpec

_STATE_DTYPES = {"float32": 4, "bfloat16": 2}


def read_serving_teacher(teacher: str) -> dict[str, Any]:
    """The config of a teacher that is to be served: a shape by name, a folder, or a name on the hub.

    Raises:
        ValueError: there is none; says what can be given.
    """
    if teacher in SHAPES:
        return dict(SHAPES[teacher])
    if "/" not in teacher and not teacher.startswith("."):
        choose("--teacher", teacher, SHAPES)
    return read_teacher_config(teacher)


def served_shape(
    config: Mapping[str, Any], word: str, *, dtype_bytes: int = 2, state_dtype: str = "float32", place: str = "--layout"
) -> ServedShape:
    """The sizes of a hybrid that decide what serving it costs.

    Args:
        config: the teacher's.
        word: the layout, one letter per layer.
        dtype_bytes: of weights, keys and values.
        state_dtype: in which the recurrences' states are kept, `float32` or `bfloat16`.
        place: what to call the layout in errors.

    Raises:
        ValueError: a letter stands for nothing, or a mixer's sizes do not fit the teacher's.
    """
    layout = LayoutSpec.read(word, place=place)
    return layout_shape(config, layout, dtype_bytes=dtype_bytes, state_dtype=state_dtype, place=place)


def layout_shape(
    config: Mapping[str, Any],
    layout: LayoutSpec,
    *,
    dtype_bytes: int = 2,
    state_dtype: str = "float32",
    place: str = "layout",
) -> ServedShape:
    """The same of a layout whose mixers may have sizes of their own.

    Raises:
        ValueError: a mixer's sizes do not fit the teacher's.
    """
    choose("--state-dtype", state_dtype, _STATE_DTYPES)
    sizes = LayerSizes(config, dtype_bytes, state_dtype)
    layers = layout.resolve(sizes.teacher.geometry, place).layers
    return sizes.together([(1, sizes.of(spec)) for spec in layers])


@dataclass(frozen=True)
class LayerSize:
    """What one layer adds to a served model.

    Attributes:
        parameters: beyond those of the teacher's attention.
        windows: its window's tokens, None for the whole context; empty if it does not attend.
        states: bytes of its state as it lies in vLLM's cache, where each of its two parts is rounded up to 64 bytes;
            empty if it has none.
    """

    parameters: int
    windows: tuple[int | None, ...] = ()
    states: tuple[int, ...] = ()


class LayerSizes:
    """The sizes of a teacher's layers, and of models made of such layers.

    Args:
        config: the teacher's.
        dtype_bytes: of weights, keys, values and a convolution's inputs.
        state_dtype: in which the recurrences' states are kept.
    """

    def __init__(self, config: Mapping[str, Any], dtype_bytes: int = 2, state_dtype: str = "float32") -> None:
        self.teacher, self.dtype_bytes = TeacherShape.of(config), dtype_bytes
        self.state_bytes = _STATE_DTYPES[state_dtype]
        self.own_window = config.get("sliding_window") if config.get("use_sliding_window", True) else None

    def of(self, spec: MixerSpec) -> LayerSize:
        """The sizes of a layer with a mixer."""
        beyond = mixer_parameters(spec, self.teacher) - self.teacher.attention_parameters
        match spec:
            case AttentionSpec():
                return LayerSize(beyond, (self.own_window,))
            case SlidingWindowSpec():
                return LayerSize(beyond, (spec.window,))
            case IdentitySpec():
                return LayerSize(beyond)
        recurrence, convolution = state_numbers(spec, self.teacher.geometry)
        parts = recurrence * self.state_bytes, convolution * self.dtype_bytes
        return LayerSize(beyond, (), (sum(-(-part // 64) * 64 for part in parts),))

    def together(self, layers: Iterable[tuple[int, LayerSize]]) -> ServedShape:
        """The sizes of a model that has so many layers of each of some sizes."""
        layers = tuple(layers)
        shape, dtype_bytes = self.teacher, self.dtype_bytes
        geometry = shape.geometry
        beyond = sum(count * layer.parameters for count, layer in layers)
        embedding = 0 if shape.tied else shape.vocab_size * geometry.hidden_size
        return ServedShape(
            weight_bytes=dtype_bytes * (shape.parameters + beyond),
            read_bytes=dtype_bytes * (shape.parameters + beyond - embedding),
            flops_per_token=2.0 * (shape.active_parameters + beyond),
            score_flops=4.0 * geometry.query_width,
            activation_bytes=3 * dtype_bytes * (shape.intermediate_size + geometry.hidden_size),
            kv_bytes=2 * dtype_bytes * geometry.kv_width,
            windows=tuple(window for count, layer in layers for window in layer.windows * count),
            states=tuple(state for count, layer in layers for state in layer.states * count),
        )


@dataclass(frozen=True)
class ServingPlan:
    """What is expected of teacher and hybrids.

    Attributes:
        rows: model's name, scenario and prediction.
        warnings: about layouts that vLLM serves badly.
    """

    rows: tuple[tuple[str, Scenario, Prediction], ...]
    warnings: tuple[str, ...]


def plan_serving(
    config: Mapping[str, Any],
    layouts: Mapping[str, str],
    gpu: Gpu,
    scenarios: Iterable[Scenario],
    *,
    utilization: float = 0.9,
    state_dtype: str = "float32",
) -> ServingPlan:
    """Predict what teacher and hybrids do in each scenario on one GPU.

    Args:
        config: the teacher's.
        layouts: words by name, the teacher's among them.
        gpu: what they run on.
        scenarios: what they are asked.
        utilization: share of the memory that vLLM may take.
        state_dtype: in which the recurrences' states are kept.

    Raises:
        ValueError: a layout does not fit the teacher, or `utilization` is out of range.
    """
    if not 0 < utilization <= 1:
        raise ValueError(f"--gpu-memory-utilization: {utilization} is out of range; use more than 0, up to 1")
    shapes = {
        name: served_shape(config, word, state_dtype=state_dtype, place=f"--layout {name}")
        for name, word in layouts.items()
    }
    rows = tuple(
        (name, scenario, predict(shape, gpu, scenario, utilization=utilization))
        for scenario in scenarios
        for name, shape in shapes.items()
    )
    warnings = []
    for name, shape in shapes.items():
        room = utilization * gpu.memory
        if shape.weight_bytes > room:
            warnings.append(f"{name}: weights {shape.weight_bytes / 1e9:.1f} GB do not fit in {room / 1e9:.1f} GB")
        elif groups := group_warning(name, shape):
            warnings.append(groups)
    return ServingPlan(rows, tuple(warnings))


def read_gpu(name: str | None, memory_gib: float | None, bandwidth_tbs: float | None) -> Gpu:
    """A GPU by name, or by its memory and its data sheet's bandwidth; both override what the name says.

    Raises:
        ValueError: the name is unknown, or a size is missing or not positive.
    """
    if name is None and (memory_gib is None or bandwidth_tbs is None):
        raise ValueError(
            f"--gpu: it is missing; give one of {', '.join(GPUS)}, or --memory-gib together with --bandwidth-tbs"
        )
    for option, value in (("--memory-gib", memory_gib), ("--bandwidth-tbs", bandwidth_tbs)):
        if value is not None and not (isfinite(value) and value > 0):
            raise ValueError(f"{option}: {value:g} is out of range; use more than 0")
    gpu = GPUS[choose("--gpu", name or "h100", GPUS)]
    if memory_gib is not None:
        gpu = replace(gpu, memory=memory_gib * 2**30, step_tokens=16384 if memory_gib >= 70 else 8192)
    if bandwidth_tbs is not None:
        gpu = replace(gpu, copy_bandwidth=COPY_SHARE * 1e12 * bandwidth_tbs)
    return gpu
