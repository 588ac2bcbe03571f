"""Every mixer's step over pools of states against its step on states that are handed over."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.mixers import MIXERS, IdentityMixer, Mixer, MixerState, build_mixer
from hybridize.spec.mixers import AttentionGeometry, IdentitySpec

HIDDEN = 24
_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, _NO_GPU])])
KINDS = {kind.model_fields["type"].default: kind for kind in MIXERS if kind is not IdentitySpec}
every_kind = pytest.mark.parametrize("kind", list(KINDS))
NULL = 2


def make_mixer(kind: str, full: bool) -> Mixer:
    """A mixer away from its initial values; `full`: with every bias, norm and gate that its kind has."""
    geometry = AttentionGeometry(
        hidden_size=HIDDEN, num_heads=4, num_kv_heads=2, head_dim=8,
        **({"qkv_bias": True, "output_bias": True, "qk_norm": "head", "norm_eps": 1e-3} if full else {}),
    )  # fmt: skip
    options: dict[str, Any] = {"mamba1": {"state_size": 8}, "kimi_delta_attention": {"gate_rank": 3}}.get(kind, {})
    if full:
        options = options | {"gate_bias": True} | ({"dt_bias_mode": "double"} if kind == "mamba1" else {})
    elif kind != "mamba1":
        options = options | {"conv_activation": "none"}
    mixer = build_mixer(KINDS[kind](**options).resolve(geometry), HIDDEN, initializer_range=0.5)
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return mixer


def make_pools(mixer: Mixer, num_slots: int, kept: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Windows and states, with gaps between slots."""
    pools = []
    for name, shape in mixer.state_shapes(num_slots).items():
        if name == "conv":
            shape = (*shape[:2], kept)
        numel = torch.Size(shape[1:]).numel()
        pools.append(torch.randn(num_slots, numel + 8, device=device).to(dtype)[:, :numel].view(shape))
    return pools[0], pools[1]


@devices
@every_kind
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("kept", "dtype"), [(3, torch.float32), (4, torch.float32), (3, torch.bfloat16)])
def test_steps_over_pools_equal_steps_on_states(
    kind: str, full: bool, kept: int, dtype: torch.dtype, device: str
) -> None:
    mixer = make_mixer(kind, full).to(device)
    conv, ssm = make_pools(mixer, 9, kept, dtype, device)
    conv[NULL], ssm[NULL] = torch.nan, torch.nan
    slot_B = torch.tensor([7, 0, NULL, 3, NULL], dtype=torch.int32, device=device)
    live = slot_B != NULL
    index = slot_B[live].long()
    # The null rows are computed along from any state, for a product's last bits depend on how many rows it has.
    row_B = slot_B.masked_fill(~live, 0).long()
    untouched = [slot for slot in range(9) if slot not in index.tolist()]
    before = [pool[untouched].clone() for pool in (conv, ssm)]
    for _ in range(3):
        hidden_BE = torch.randn(5, HIDDEN, device=device)
        window = torch.nn.functional.pad(conv[row_B].float(), (4 - kept, 0), value=7.0)
        expected, state = mixer(hidden_BE.unsqueeze(1), state=MixerState(window, ssm[row_B].float()), return_state=True)
        got = mixer.step_in_place(hidden_BE, conv, ssm, slot_B, NULL)
        assert not got.requires_grad
        torch.testing.assert_close(got[live], expected[live].squeeze(1).detach(), rtol=1e-4, atol=1e-5)
        assert got.isfinite().all(), "what is in the null slot spreads"
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
        torch.testing.assert_close(conv[index].float(), state.conv[live][..., 4 - kept :].detach(), **close)
        torch.testing.assert_close(ssm[index].float(), state.ssm[live].detach(), **close)
    for pool, copy in zip((conv, ssm), before, strict=True):
        torch.testing.assert_close(pool[untouched], copy, rtol=0, atol=0, equal_nan=True)


@devices
@every_kind
def test_prompt_then_steps_in_place_equal_the_whole_sequence(kind: str, device: str) -> None:
    mixer = make_mixer(kind, full=True).to(device).requires_grad_(False)
    hidden_BLE = torch.randn(3, 12, HIDDEN, device=device)
    whole, end = mixer(hidden_BLE, return_state=True)
    _, state = mixer(hidden_BLE[:, :5], return_state=True)
    conv, ssm = state.conv.contiguous(), state.ssm.contiguous()
    for t in range(5, 12):
        got = mixer.step_in_place(hidden_BLE[:, t], conv, ssm)
        torch.testing.assert_close(got, whole[:, t], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(conv, end.conv, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ssm, end.ssm, rtol=1e-3, atol=1e-4)


@every_kind
@pytest.mark.parametrize("full", [False, True])
def test_packed_projections_give_the_same_and_follow_the_weights(kind: str, full: bool) -> None:
    mixer, other = (make_mixer(kind, full).requires_grad_(False).double() for _ in range(2))
    names = list(mixer.state_dict())
    mixer.pack_projections()
    assert list(mixer.state_dict()) == names
    conv, ssm = make_pools(mixer, 3, 3, torch.float64, "cpu")
    hidden_BE = torch.randn(3, HIDDEN)

    def step(mixer: Mixer) -> Tensor:
        dtype = next(mixer.parameters()).dtype
        return mixer.step_in_place(hidden_BE.to(dtype), conv.clone(), ssm.clone())

    for parameter, source in zip(mixer.parameters(), other.parameters(), strict=True):
        parameter.data.copy_(source)  # as a checkpoint is loaded
    is_packed = hasattr(mixer, "_packed")  # Mamba-2 has one projection
    assert is_packed == (kind != "mamba2")
    assert not is_packed or mixer._packed.hold(mixer._input_projections)
    packed = step(mixer)
    torch.testing.assert_close(packed, step(other), rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.5)
    assert not torch.allclose(step(mixer), packed, rtol=1e-2)
    moved = mixer.float()
    assert not is_packed or not moved._packed.hold(moved._input_projections)
    with torch.no_grad():
        for parameter, source in zip(moved.parameters(), other.parameters(), strict=True):
            parameter.copy_(source)
    torch.testing.assert_close(step(moved).double(), packed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["hook", "pre-hook", "wrapped"])
def test_a_packed_projection_that_was_changed_is_called_itself(change: str) -> None:
    mixer = make_mixer("gated_delta_net", full=True).requires_grad_(False)
    conv, ssm = make_pools(mixer, 3, 3, torch.float32, "cpu")
    hidden_BE = torch.randn(3, HIDDEN)
    mixer.pack_projections()
    before = mixer.step_in_place(hidden_BE, conv.clone(), ssm.clone())
    if change == "hook":
        mixer.v_proj.register_forward_hook(lambda module, args, output: output * 2)
    elif change == "pre-hook":
        mixer.v_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    else:
        doubled = torch.nn.Linear(HIDDEN, mixer.v_proj.out_features)
        doubled.weight, doubled.bias = mixer.v_proj.weight, mixer.v_proj.bias
        doubled.forward = lambda x: 2 * torch.nn.functional.linear(x, doubled.weight, doubled.bias)  # type: ignore
        mixer.v_proj = doubled
    expected, _ = mixer(
        hidden_BE.unsqueeze(1), state=MixerState(torch.nn.functional.pad(conv, (1, 0)), ssm), return_state=True
    )
    got = mixer.step_in_place(hidden_BE, conv.clone(), ssm.clone())
    torch.testing.assert_close(got, expected.squeeze(1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, before, rtol=1e-3)


@pytest.mark.parametrize("kind", ["mamba1", "gated_delta_net", "kimi_delta_attention"])
def test_a_copy_of_a_packed_mixer_has_weights_of_its_own(kind: str) -> None:
    mixer = make_mixer(kind, full=True).requires_grad_(False)
    conv, ssm = make_pools(mixer, 3, 3, torch.float32, "cpu")
    hidden_BE = torch.randn(3, HIDDEN)
    mixer.pack_projections()
    before = mixer.step_in_place(hidden_BE, conv.clone(), ssm.clone())
    other = deepcopy(mixer)
    for parameter in mixer.parameters():
        parameter.zero_()
    assert mixer._packed.hold(mixer._input_projections)
    assert not other._packed.hold(other._input_projections)
    torch.testing.assert_close(other.step_in_place(hidden_BE, conv.clone(), ssm.clone()), before, rtol=1e-4, atol=1e-5)
    other.pack_projections()
    assert other._packed.hold(other._input_projections)


@pytest.mark.parametrize("kind", ["mamba1", "gated_delta_net", "kimi_delta_attention"])
def test_projections_of_different_dtypes_are_not_packed(kind: str) -> None:
    mixer = make_mixer(kind, full=True)
    mixer._input_projections[-1].bfloat16()
    with pytest.raises(ValueError, match=r"^layers: dtypes torch.float32 and torch.bfloat16; cast them to one"):
        mixer.pack_projections()


@every_kind
def test_inputs_that_do_not_fit_are_refused(kind: str) -> None:
    mixer = make_mixer(kind, full=False)
    conv, ssm = make_pools(mixer, 4, 3, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"^hidden_BE: shape \(2, 23\); pass \[batch, 24\]"):
        mixer.step_in_place(torch.zeros(2, HIDDEN - 1), conv, ssm)
    with pytest.raises(ValueError, match=r"^pool_MDW: shape"):
        mixer.step_in_place(torch.zeros(2, HIDDEN), conv[..., :2].contiguous(), ssm)
    with pytest.raises(ValueError, match=r"^ssm_M: .*; pass floats"):
        mixer.step_in_place(torch.zeros(2, HIDDEN), conv, ssm[:, 1:])
    before = conv.clone()
    with pytest.raises(ValueError, match=r"^ssm_M: strides .*contiguous"):
        mixer.step_in_place(torch.randn(2, HIDDEN), conv, torch.stack([ssm, ssm], dim=-1)[..., 0])
    assert torch.equal(conv, before), "the windows were shifted though the states do not fit"


def test_nothing_in_attentions_place_gives_zeros() -> None:
    mixer = IdentityMixer(IdentitySpec(), HIDDEN)
    empty = torch.empty(0)
    assert torch.equal(mixer.step_in_place(torch.randn(2, HIDDEN), empty, empty), torch.zeros(2, HIDDEN))


@pytest.mark.gpu
@_NO_GPU
@every_kind
def test_a_step_can_be_captured_in_a_graph(kind: str) -> None:
    mixer = make_mixer(kind, full=True).cuda().requires_grad_(False)
    conv, ssm = make_pools(mixer, 9, 3, torch.float32, "cuda")
    slot_B = torch.tensor([3, 5, NULL, NULL], dtype=torch.int32, device="cuda")
    hidden_BE = torch.randn(4, HIDDEN, device="cuda")
    mixer.step_in_place(hidden_BE, conv, ssm, slot_B, NULL)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = mixer.step_in_place(hidden_BE, conv, ssm, slot_B, NULL)
    slot_B.copy_(torch.tensor([8, 0, 5, NULL]))
    hidden_BE.normal_()
    others = conv.clone(), ssm.clone()
    graph.replay()
    expected = mixer.step_in_place(hidden_BE, *others, slot_B, NULL)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for pool, other in zip((conv, ssm), others, strict=True):
        torch.testing.assert_close(pool, other, rtol=1e-5, atol=1e-6)
