"""Apriel-H1's format for the tests: tiny checkpoints written in it, and the published formula evaluated by itself.

The formula is read from the checkpoint's own files and evaluated in loops and in fp64, without any code of the package.

Legend: L length, E hidden size, D d_inner, X d_xb, N state size, H heads.
"""

import json

import torch
from safetensors.torch import load_file, save_file
from torch import nn

E, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 24, 4, 2, 8, 40, 61
D, X, N, RANK, TAPS = 32, 16, 4, 3, 4
SSM = {
    "d_state": N,
    "d_inner": D,
    "d_xb": X,
    "dt_rank": RANK,
    "d_conv": TAPS,
    "dt_min": 0.002,
    "dt_max": 0.2,
    "dt_init_floor": 1e-4,
    "dt_init": "random",
    "dt_scale": 1.0,
    "expand": 1,
    "activation": "silu",
    "bias": False,
    "conv_bias": True,
    "dt_proj_bias": True,
    "repeat_kv_before_conv": True,
    "chunk_size": 128,
    "n_v_heads": 4,
    "n_qk_heads": 4,
}
CONFIG = {
    "model_type": "apriel_hybrid_ssm",
    "architectures": ["AprielHybridSSMForCausalLM"],
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": E,
    "initializer_range": 0.02,
    "intermediate_size": FFN,
    "max_position_embeddings": 256,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 500.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
MIXED = ["t", "m2", "i", "m2", "t"]


def write_checkpoint(folder, blocks=MIXED, *, fused=False, num_files=1, dtype=torch.float32, changes=None, ssm=None):
    """Write a checkpoint with random weights, none of them at a value that a mistake could hide behind."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape, scale=0.25, mean=0.0):
        return (mean + scale * torch.randn(*shape, generator=generator)).to(dtype)

    tensors = {"model.embed_tokens.weight": draw(VOCABULARY, E, scale=1.0)}
    for layer, block in enumerate(blocks):
        if block == "i":
            continue
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.input_layernorm.weight": draw(E, scale=0.2, mean=1.0),
            f"{at}.post_attention_layernorm.weight": draw(E, scale=0.2, mean=1.0),
            f"{at}.mlp.gate_proj.weight": draw(FFN, E),
            f"{at}.mlp.up_proj.weight": draw(FFN, E),
            f"{at}.mlp.down_proj.weight": draw(E, FFN),
        }
        if block == "t":
            for name, rows in (("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
                tensors[f"{at}.self_attn.{name}_proj.weight"] = draw(rows, E)
            tensors[f"{at}.self_attn.o_proj.weight"] = draw(E, HEADS * HEAD_DIM)
            continue
        in_proj, dt_in_proj = draw(2 * D + 2 * X, E), draw(RANK, E)
        tensors |= {
            f"{at}.mixer.in_proj.weight": torch.cat([in_proj, dt_in_proj]) if fused else in_proj,
            f"{at}.mixer.dt_proj.weight": draw(D, RANK),
            f"{at}.mixer.dt_proj.bias": draw(D, scale=0.3, mean=-0.8),
            f"{at}.mixer.conv1d.weight": draw(D, 1, TAPS),
            f"{at}.mixer.conv1d.bias": draw(D),
            f"{at}.mixer.A_log": draw(D, N),
            f"{at}.mixer.D": draw(D),
            f"{at}.mixer.out_proj.weight": draw(E, D),
        }
        if not fused:
            tensors[f"{at}.mixer.dt_in_proj.weight"] = dt_in_proj
    tensors |= {"model.norm.weight": draw(E, mean=1.0), "lm_head.weight": draw(VOCABULARY, E)}
    folder.mkdir()
    config = CONFIG | {
        "num_hidden_layers": len(blocks),
        "hybrid_block_layout": list(blocks),
        "ssm_cfg": SSM | (ssm or {}),
    }
    config = {key: value for key, value in (config | (changes or {})).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"model-{i % num_files + 1:05}-of-{num_files:05}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(read_config(folder) | changes))


def edit_tensors(folder, **changes):
    """Change tensors of a single file, by name with the dots as `__`; None takes one out."""
    tensors = read_tensors(folder) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


# --- the published formula ---


def rms_norm(hidden_LE, weight_E, eps):
    return weight_E * hidden_LE / (hidden_LE.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def rotate(vectors_LHN, theta):
    half = vectors_LHN.shape[-1] // 2
    out = torch.empty_like(vectors_LHN)
    for position in range(vectors_LHN.shape[0]):
        angles = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
        first, second = vectors_LHN[position, :, :half], vectors_LHN[position, :, half:]
        out[position, :, :half] = first * angles.cos() - second * angles.sin()
        out[position, :, half:] = second * angles.cos() + first * angles.sin()
    return out


def attention(hidden_LE, weights, config):
    length, width = hidden_LE.shape[0], config["head_dim"]
    q, k, v = (
        (hidden_LE @ weights[f"self_attn.{name}_proj.weight"].T).view(length, -1, width) for name in ("q", "k", "v")
    )
    q, k = rotate(q, config["rope_theta"]), rotate(k, config["rope_theta"])
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        for t in range(length):
            scores = k[: t + 1, head // group] @ q[t, head] / width**0.5
            out[t, head] = scores.softmax(dim=0) @ v[: t + 1, head // group]
    return out.flatten(1) @ weights["self_attn.o_proj.weight"].T


def mamba(hidden_LE, weights, ssm):
    """z | x | B | C; x repeated, convolved, SiLU; the step size's bias twice; one state per channel."""
    d_inner, d_xb, num_states = ssm["d_inner"], ssm["d_xb"], ssm["d_state"]
    rows = hidden_LE @ weights["mixer.in_proj.weight"].T
    z, x, B, C = (
        part.contiguous() for part in rows[:, : 2 * d_inner + 2 * d_xb].split([d_inner, d_xb, d_xb, d_inner], 1)
    )
    if "mixer.dt_in_proj.weight" in weights:
        low = hidden_LE @ weights["mixer.dt_in_proj.weight"].T
    else:
        low = rows[:, 2 * d_inner + 2 * d_xb :]
    bias = weights["mixer.dt_proj.bias"]
    step = nn.functional.softplus(low @ weights["mixer.dt_proj.weight"].T + bias + bias)
    num_heads, num_groups = d_inner // num_states, d_xb // num_states
    taps, A = weights["mixer.conv1d.weight"][:, 0], -weights["mixer.A_log"].exp()
    y = torch.zeros_like(z)
    for channel in range(d_inner):
        head = channel // num_states
        group = head // (num_heads // num_groups)
        raw = x[:, group * num_states + channel % num_states]
        state = torch.zeros(num_states, dtype=torch.float64)
        for t in range(hidden_LE.shape[0]):
            mixed = weights["mixer.conv1d.bias"][channel].clone()
            for tap in range(taps.shape[1]):
                if (at := t - taps.shape[1] + 1 + tap) >= 0:
                    mixed += taps[channel, tap] * raw[at]
            mixed = nn.functional.silu(mixed)
            key = B[t, group * num_states : (group + 1) * num_states]
            state = (step[t, channel] * A[channel]).exp() * state + step[t, channel] * key * mixed
            query = C[t, head * num_states : (head + 1) * num_states]
            y[t, channel] = query @ state + weights["mixer.D"][channel] * mixed
    return (y * nn.functional.silu(z)) @ weights["mixer.out_proj.weight"].T


def published_logits(folder, tokens_L):
    """The logits [L, vocabulary] of a checkpoint in Apriel-H1's format, in fp64."""
    config = read_config(folder)
    tensors = {name: tensor.double() for name, tensor in read_tensors(folder).items()}
    embedding = tensors.pop("model.embed_tokens.weight")
    head, norm = tensors.pop("lm_head.weight", embedding), tensors.pop("model.norm.weight")
    hidden = embedding[tokens_L]
    for layer, block in enumerate(config["hybrid_block_layout"]):
        prefix = f"model.layers.{layer}."
        weights = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        if block == "i":
            assert not weights
            continue
        eps = config["rms_norm_eps"]
        inner = rms_norm(hidden, weights["input_layernorm.weight"], eps)
        mix = mamba(inner, weights, config["ssm_cfg"]) if block == "m2" else attention(inner, weights, config)
        hidden = hidden + mix
        inner = rms_norm(hidden, weights["post_attention_layernorm.weight"], eps)
        gate = nn.functional.silu(inner @ weights["mlp.gate_proj.weight"].T)
        hidden = hidden + (gate * (inner @ weights["mlp.up_proj.weight"].T)) @ weights["mlp.down_proj.weight"].T
    assert not tensors
    return rms_norm(hidden, norm, config["rms_norm_eps"]) @ head.T


def draw_tokens(length=9):
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))
