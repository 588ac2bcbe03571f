"""The function of sliding-window attention: the formula, with and without a sink, in memory that a window bounds."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention

from hybridize.models import window

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
NUM_HEADS, NUM_GROUPS, WIDTH = 4, 2, 8


def naive(query, key, value, seen, scaling, softcap=None, sink=None):
    """Token by token and head by head, in double precision; `seen(b, i)` lists the keys of query i."""
    out = torch.zeros_like(query, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        group, keys = h * NUM_GROUPS // NUM_HEADS, seen(b, i)
        scores = scaling * key[b, group, keys].double() @ query[b, h, i].double()
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp()
        total = weights.sum() + (0 if sink is None else sink[h].double().exp())
        out[b, h, i] = (weights / total) @ value[b, group, keys].double()
    return out.transpose(1, 2)


def draw_states(length, batch=1, num_keys=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, keys or length, WIDTH) for heads, keys in ((4, None), (2, num_keys), (2, num_keys))]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def make_module(size, sink=False, seed=3):
    values = torch.randn(NUM_HEADS, generator=torch.Generator().manual_seed(seed)) * 2
    return SimpleNamespace(window=size, sink=values.requires_grad_() if sink else None)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(window, "_BLOCK", 7)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize(("length", "size"), [(1, 1), (1, 4), (7, 7), (15, 1), (23, 5), (23, 40), (63, 14)])
def test_attention_equals_the_formula(length, size, sink, softcap):
    states, module = draw_states(length, batch=2), make_module(size, sink)
    out, weights = window.window_attention(module, *states, None, scaling=0.7, softcap=softcap)
    expected = naive(*states, lambda _, i: list(range(max(i - size + 1, 0), i + 1)), 0.7, softcap, module.sink)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)
    assert weights is None


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
def test_documents_and_padding_hide_keys(sink, softcap):
    states, module = draw_states(30, batch=2), make_module(6, sink)
    starts = torch.zeros(2, 30, dtype=torch.bool)
    starts[0, [0, 3, 12, 13]] = starts[1, [0, 29]] = True
    document = starts.cumsum(1)
    out, _ = window.window_attention(module, *states, None, scaling=0.5, softcap=softcap, mixer_starts=starts)
    near = {(b, i): [j for j in range(max(i - 5, 0), i + 1) if document[b, j] == document[b, i]] for b, i in _tokens()}
    expected = naive(*states, lambda *q: near[q], 0.5, softcap, module.sink)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)

    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[0, :9] = valid[1, :2] = False
    out, _ = window.window_attention(module, *states, None, scaling=0.5, softcap=softcap, mixer_valid_keys=valid)
    near = {(b, i): [j for j in range(max(i - 5, 0), i + 1) if valid[b, j] or i == j] for b, i in _tokens()}
    expected = naive(*states, lambda *q: near[q], 0.5, softcap, module.sink)
    torch.testing.assert_close(out[valid].double(), expected[valid], **TOLERANCE)
    assert out.isfinite().all()


def _tokens():
    return [(b, i) for b in range(2) for i in range(30)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize(("length", "size"), [(1, 6), (3, 6), (16, 6), (16, 10)])
def test_queries_are_the_last_keys_unless_a_cache_says_where(length, size, sink):
    """A cache that grows or slides gives its last keys; one of fixed size gives empty ones behind them too."""
    states, module, first = draw_states(length, num_keys=20), make_module(size, sink), 20 - length
    keys = [list(range(max(i - size + 1, 0), i + 1)) for i in range(first, 20)]
    expected = naive(*states, lambda _, i: keys[i], WIDTH**-0.5, sink=module.sink)
    out, _ = window.window_attention(module, *states, None)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)
    states[1:] = [torch.nn.functional.pad(tensor, (0, 0, 0, 9), value=5.0) for tensor in states[1:]]
    for place in (first, torch.tensor(first)):
        out, _ = window.window_attention(module, *states, None, window_place=(place, 0))
        torch.testing.assert_close(out.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("blocks", [7, 512], ids=["in blocks", "at once"])
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
def test_gradients_equal_those_of_the_formula(monkeypatch, blocks, sink):
    monkeypatch.setattr(window, "_BLOCK", blocks)
    states, module = draw_states(20, dtype=torch.float64), make_module(5, sink)
    tensors = [tensor.requires_grad_() for tensor in states] + ([module.sink] if sink else [])
    wanted = draw_states(20, dtype=torch.float64, seed=1)[0].transpose(1, 2)
    out, _ = window.window_attention(module, *states, None)
    expected = naive(*states, lambda _, i: list(range(max(i - 4, 0), i + 1)), WIDTH**-0.5, sink=module.sink)
    for got, want in zip(
        torch.autograd.grad((out * wanted).sum(), tensors),
        torch.autograd.grad((expected * wanted).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=1e-6)


def test_sink_is_that_of_gpt_oss():
    """transformers' own code for attention with a sink, given the window as a mask."""
    states, module = draw_states(33, batch=2), make_module(9, sink=True)
    places = torch.arange(33)
    back = places[:, None] - places
    mask = torch.zeros(33, 33).masked_fill((back < 0) | (back >= 9), torch.finfo(torch.float32).min)
    theirs = SimpleNamespace(sinks=module.sink, num_key_value_groups=2, training=False)
    expected, _ = gpt_oss_attention(theirs, *states, mask[None, None], scaling=0.4)
    out, _ = window.window_attention(module, *states, None, scaling=0.4)
    torch.testing.assert_close(out, expected, **TOLERANCE)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        made = out if isinstance(out, tuple | list) else (out,)
        self.numel = max([self.numel, *(tensor.numel() for tensor in made if isinstance(tensor, torch.Tensor))])
        return out


@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
def test_memory_grows_with_length_times_window_at_most(sink):
    length, size = 4096, 64
    module, states = make_module(size, sink), [tensor.requires_grad_() for tensor in draw_states(length)]
    starts = torch.zeros(1, length, dtype=torch.bool)
    starts[0, ::1000] = True
    kept = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out, _ = window.window_attention(module, *states, None, mixer_starts=starts)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        out.sum().backward()
    assert largest.numel <= NUM_HEADS * 512 * (512 + size)
    assert sum(storages.values()) <= 4 * sum(tensor.nbytes for tensor in states)


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
def test_dropout_drops_weights(softcap):
    """Each token's output is a sum of values that were kept, twice as large."""
    (query, key, value), module = draw_states(9), make_module(1)
    out, _ = window.window_attention(module, query, key, value, None, dropout=0.5, softcap=softcap)
    twice = 2 * value.repeat_interleave(2, dim=1).transpose(1, 2)
    kept = torch.isclose(out, twice).all(dim=-1)
    assert 0 < kept.sum() < kept.numel()
    assert (out[~kept] == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_equals_the_formula(dtype, sink):
    states = [tensor.cuda().to(dtype).requires_grad_() for tensor in draw_states(33)]
    module = make_module(9, sink)
    if sink:
        module.sink = module.sink.detach().cuda().requires_grad_()
    out, _ = window.window_attention(module, *states, None)
    expected = naive(*states, lambda _, i: list(range(max(i - 8, 0), i + 1)), WIDTH**-0.5, sink=module.sink)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    tensors = states + ([module.sink] if sink else [])
    for got, want in zip(
        torch.autograd.grad(out.double().square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=tolerance["rtol"], atol=4 * tolerance["atol"])
