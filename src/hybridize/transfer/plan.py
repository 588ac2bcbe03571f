"""The plan of one layer's transfer: an expression per student tensor, the fate of every teacher tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridize.mixers import build_mixer
from hybridize.models import Projection
from hybridize.spec import AttentionGeometry, IdentitySpec, MixerSpec, SlidingWindowSpec
from hybridize.spec.base import choose
from hybridize.transfer.attention import AttentionTensors
from hybridize.transfer.expressions import Constant, Expression, Fresh, Take
from hybridize.transfer.rules import INITS, RULES


@dataclass(frozen=True)
class Entry:
    """One tensor of the student: its full name, shape and what it is made of."""

    target: str
    shape: tuple[int, ...]
    expression: Expression

    def __str__(self) -> str:
        """A sentence."""
        return f"{self.target} [{' x '.join(map(str, self.shape))}] = {self.expression}"


@dataclass(frozen=True)
class TransferPlan:
    """How one layer's attention becomes a mixer, or sees a window only.

    Attributes:
        spec: the mixer, resolved.
        hidden_size: E.
        initializer_range: standard deviation of randomly initialised projections.
        init: the name of the initialisation; empty where there is nothing to choose.
        prefix: full name of the mixer, before each of its tensors' names.
        entries: one per tensor of the mixer; of a window, its sink.
        dropped: each tensor of the attention that no entry uses, and why.
        kept: the tensors of the attention that keep name and bits, as a window's do.
        note: a remark on the transfer as a whole.
    """

    spec: MixerSpec
    hidden_size: int
    initializer_range: float
    init: str
    prefix: str
    entries: tuple[Entry, ...]
    dropped: dict[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    note: str = ""

    @property
    def used(self) -> dict[str, list[str]]:
        """The teacher's tensors that are carried over, each with the student's tensors it goes to."""
        fates: dict[str, list[str]] = {}
        for entry in self.entries:
            for leaf in entry.expression.leaves():
                if isinstance(leaf, Take):
                    fates.setdefault(leaf.source, []).append(entry.target)
        return fates

    def apply(self, sources: Mapping[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Make the student's tensors.

        Args:
            sources: the teacher's tensors by full name; more than needed is fine.
            generator: decides what is drawn; the global generator is left alone. Default: seed 0.

        Returns:
            The student's tensors by full name. What is carried over, wholly or in part, has the teacher's
            dtype and device; what is initialised is fp32 on the CPU.

        Raises:
            ValueError: a tensor of the teacher is absent, or one comes out in the wrong shape.
        """
        absent = sorted(set(self.used) - set(sources))
        if absent:
            raise ValueError(f"{self.prefix}: the teacher's tensors lack {', '.join(absent)}; hand over all of them")
        fresh = self._fresh(generator)
        made = {}
        for entry in self.entries:
            tensor = entry.expression.evaluate(sources, fresh)
            if tuple(tensor.shape) != entry.shape:
                raise ValueError(
                    f"{entry.target}: it comes out as {list(tensor.shape)}, but the mixer needs "
                    f"{list(entry.shape)}; the teacher's tensors do not have the sizes that its config says"
                )
            made[entry.target] = tensor
        return made

    def _fresh(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        if not any(isinstance(leaf, Fresh) for entry in self.entries for leaf in entry.expression.leaves()):
            return {}
        generator = generator or torch.Generator().manual_seed(0)
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            mixer = build_mixer(self.spec, self.hidden_size, initializer_range=self.initializer_range)
        return {name: tensor.detach().float() for name, tensor in mixer.state_dict().items()}

    def __str__(self) -> str:
        """A line per tensor of the mixer, then one per tensor of the attention that was kept or dropped."""
        lines = [str(entry) for entry in self.entries]
        lines += [f"{name}: stays the teacher's" for name in self.kept]
        lines += [f"{name}: dropped, {why}" for name, why in self.dropped.items()]
        return "\n".join([*lines, self.note] if self.note else lines)


def plan_transfer(
    geometry: AttentionGeometry,
    spec: MixerSpec,
    init: str = "aligned",
    *,
    source: str = "self_attn",
    target: str = "self_attn.mixer",
    projections: Sequence[str | Projection] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    norms: Sequence[str] = (),
    norm_offset: float = 0.0,
    source_tensors: Sequence[str] | None = None,
    initializer_range: float = 0.02,
    place: str = "mixer",
) -> TransferPlan:
    """Plan how one layer's attention becomes a mixer.

    A sliding window keeps all of the attention and starts from a sink of 0, an identity drops all; what `init` says
    makes no difference to them.

    Args:
        geometry: of the teacher's attention.
        spec: the mixer; open sizes are filled in from `geometry`.
        init: what the mixer starts from.
            `aligned`: attention's weights, each of the mixer's heads paired to one query head, or a slice of it,
            with the key/value head that the teacher pairs it with; what attention lacks, as the constructor makes it.
            `neutral`: `aligned`, with gates, decays and convolutions set so that the mixer is as near to linear
            attention as its form allows.
            `attention_gate`: `neutral`, with the output gate made of output projection and values.
            `published`: as the mixer's public code does.
            `random`: carry nothing over.
        source: full name of the attention module, before its tensors' names.
        target: full name of the mixer.
        projections: the query, key, value and output projections: their names within the attention module, or
            `Projection`s where one module holds several.
        norms: names of the norms of queries and keys within the attention module.
        norm_offset: what the norms add to their weight.
        source_tensors: full names of all tensors of the attention module; default: those that `geometry` implies.
        initializer_range: standard deviation of randomly initialised projections.
        place: what to call the mixer in errors.

    Raises:
        ValueError: the initialisation is unknown or the sizes do not fit; or the attention has a tensor that
            nothing here accounts for.
    """
    choose("init", init, INITS)
    rule = RULES.get(type(spec))
    if rule is None and not isinstance(spec, SlidingWindowSpec | IdentitySpec):
        raise ValueError(f"{place}: a transfer makes a mixer, but the layer is to be {spec.type!r}; leave it out")
    try:
        spec = spec.resolve(geometry)
    except ValueError as error:
        raise ValueError(f"{place}: {str(error).removeprefix('mixer: ')}") from None
    parts = [Projection(part) if isinstance(part, str) else part for part in projections]
    attention = AttentionTensors.of(geometry, source, parts, norms, norm_offset)
    known = (*attention.weights, *attention.biases, *attention.norms)
    present = list(known if source_tensors is None else source_tensors)
    if rule is None:
        return _plan_without_rule(spec, geometry, present, source, target, initializer_range)
    if init == "random":
        expressions = rule.fresh_expressions(spec, initializer_range)
        dropped = dict.fromkeys(present, "since init 'random' carries nothing over")
        note = ""
    else:
        _check_sources(present, known, spec)
        expressions = rule.carry_attention(spec, attention, init, initializer_range, place)
        dropped = _left_over(attention, expressions, spec)
        note = rule.pairing_note(spec, geometry, init)
    shapes = mixer_shapes(spec, geometry.hidden_size)
    if expressions.keys() != shapes.keys():
        unaccounted = sorted(expressions.keys() ^ shapes.keys())
        raise ValueError(f"{place}: no rule accounts for the mixer's tensors {', '.join(unaccounted)}; add one")
    entries = tuple(Entry(f"{target}.{name}", shape, expressions[name]) for name, shape in shapes.items())
    plan = TransferPlan(
        spec, geometry.hidden_size, initializer_range, init, target, entries, dropped=dropped, note=note
    )
    assert set(present) == set(plan.used) | set(plan.dropped)
    return plan


def _plan_without_rule(
    spec: MixerSpec,
    geometry: AttentionGeometry,
    present: Sequence[str],
    source: str,
    target: str,
    initializer_range: float,
) -> TransferPlan:
    """The plan of what carries nothing over: a window, which keeps all, or an identity, which drops all."""
    if isinstance(spec, IdentitySpec):
        dropped = dict.fromkeys(present, "since an identity adds nothing and reads nothing")
        return TransferPlan(spec, geometry.hidden_size, initializer_range, "", target, (), dropped=dropped)
    assert isinstance(spec, SlidingWindowSpec)
    entries: tuple[Entry, ...] = ()
    if spec.sink:
        shape = (geometry.num_heads,)
        entries = (Entry(f"{source}.sink", shape, Constant(0.0, shape, "0, as much as a key that scores 0")),)
    note = f"each token sees the last {spec.window} tokens, itself among them, or fewer where the teacher sees fewer"
    return TransferPlan(
        spec, geometry.hidden_size, initializer_range, "", source, entries, kept=tuple(present), note=note
    )


def mixer_shapes(spec: MixerSpec, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a mixer, by its name within the mixer."""
    with torch.device("meta"):
        mixer = build_mixer(spec, hidden_size)
    return {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()}


def _left_over(attention: AttentionTensors, expressions: Mapping[str, Expression], spec: MixerSpec) -> dict[str, str]:
    """The tensors of the attention that no expression uses, by full name, and why."""
    used = {leaf.source for made in expressions.values() for leaf in made.leaves() if isinstance(leaf, Take)}
    bias = f"since the {spec.type} mixer is to have no such bias"
    norm = f"since the {spec.type} mixer is not to normalise what stands for queries and keys"
    lost = dict.fromkeys(attention.biases, bias) | dict.fromkeys(attention.norms, norm)
    return {name: why for name, why in lost.items() if name not in used}


def _check_sources(present: Sequence[str], known: Sequence[str], spec: MixerSpec) -> None:
    homeless = [name for name in present if name not in known]
    if homeless:
        raise ValueError(
            f"{', '.join(homeless)}: a {spec.type} mixer has no place for these tensors of the teacher's "
            "attention; leave the layer attention, or use init 'random'"
        )
    absent = [name for name in known if name not in present]
    if absent:
        raise ValueError(
            f"{', '.join(absent)}: not among the teacher's tensors; check the names in hybridize/models/families.py"
        )
