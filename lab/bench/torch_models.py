"""The stages in plain PyTorch: released tensor names in a dictionary, `torch.nn.functional` around them.

Written for speed as PyTorch users would: fused norms, attention by `scaled_dot_product_attention`, a key-value cache that
is allocated once, everything that is constant across steps made beforehand.
"""

import math

import torch
from torch.nn import functional as F

EPS = 1e-6


class Weights:
    """Tensors by name, and the same below a prefix."""

    def __init__(self, tensors, prefix=""):
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name):
        return self.tensors[self.prefix + name]

    def get(self, name):
        return self.tensors.get(self.prefix + name)

    def at(self, name):
        return Weights(self.tensors, f"{self.prefix}{name}.")

    def linear(self, name, x):
        return F.linear(x, self[name + ".weight"], self.get(name + ".bias"))

    def conv(self, name, x, **options):
        return F.conv2d(x, self[name + ".weight"], self[name + ".bias"], **options)

    def rms_norm(self, name, x):
        weight = self[name + ".weight"]
        return F.rms_norm(x, weight.shape, weight, EPS)


def to_heads(x, heads):
    """[tokens, heads * dim] -> [1, heads, tokens, dim]"""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1).unsqueeze(0)


def from_heads(x):
    """[1, heads, tokens, dim] -> [tokens, heads * dim]"""
    return x.squeeze(0).transpose(0, 1).flatten(1)


def rotate_halves(x, cos, sin):
    """Rotates pairs that lie half a head apart; cos and sin have one column per pair."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def gated_mlp(w, x):
    return w.linear("down_proj", F.silu(w.linear("gate_proj", x)) * w.linear("up_proj", x))


# Language model


class TextConfig:
    def __init__(self, json):
        self.heads, self.kv_heads = json["num_attention_heads"], json["num_key_value_heads"]
        self.layers, self.hidden = json["num_hidden_layers"], json["hidden_size"]
        self.sections, self.theta = json["rope_scaling"]["mrope_section"], json["rope_theta"]
        self.head_dim = self.hidden // self.heads


def text_rotary(config, positions, dtype):
    """positions: [tokens, 3], temporal, row and column."""
    pairs = config.head_dim // 2
    frequencies = config.theta ** -(torch.arange(pairs, dtype=torch.float32) / pairs)
    axes = torch.repeat_interleave(torch.arange(3), torch.tensor(config.sections))
    angles = positions[:, axes].float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Cache:
    """Keys and values of up to `capacity` tokens of every layer."""

    def __init__(self, config, capacity, dtype):
        shape = (config.layers, 2, 1, config.kv_heads, capacity, config.head_dim)
        self.data, self.used = torch.zeros(shape, dtype=dtype), 0

    def extend(self, layer, k, v):
        end = self.used + k.shape[2]
        keys, values = self.data[layer]
        keys[:, :, self.used : end], values[:, :, self.used : end] = k, v
        return keys[:, :, :end], values[:, :, :end]


def decoder_layer(w, config, x, rotary, layer=0, cache=None):
    """A causal layer; x: [tokens, hidden]"""
    attn, normed = w.at("self_attn"), w.rms_norm("input_layernorm", x)
    q = rotate_halves(to_heads(attn.linear("q_proj", normed), config.heads), *rotary)
    k = rotate_halves(to_heads(attn.linear("k_proj", normed), config.kv_heads), *rotary)
    v = to_heads(attn.linear("v_proj", normed), config.kv_heads)
    if cache is not None:
        k, v = cache.extend(layer, k, v)
    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=queries == keys > 1, enable_gqa=True)
    x = x + attn.linear("o_proj", from_heads(mixed))
    return x + gated_mlp(w.at("mlp"), w.rms_norm("post_attention_layernorm", x))


def text_model(w, config, x, positions, cache):
    rotary = text_rotary(config, positions, x.dtype)
    for layer in range(config.layers):
        x = decoder_layer(w.at(f"model.layers.{layer}"), config, x, rotary, layer, cache)
    if cache is not None:
        cache.used += x.shape[0]
    return w.rms_norm("model.norm", x)


# Vision encoder


def vision_order(cells, window):
    """Raster indices of cells in the order of their windows, and the number of cells in each window."""
    index = torch.arange(cells * cells).view(cells, cells)
    windows = [part.flatten() for band in index.split(window) for part in band.split(window, 1)]
    return torch.cat(windows), [part.numel() for part in windows]


def vision_model(w, config, patches):
    """patches: [patches, 1176] of a square picture, the four patches of a cell side by side."""
    heads, side = config["num_heads"], math.isqrt(patches.shape[0])
    order, counts = vision_order(side // 2, config["window_size"] // 28)
    cells, within = torch.arange(side * side) // 4, torch.arange(side * side) % 4
    places = torch.stack((cells // (side // 2) * 2 + within // 2, cells % (side // 2) * 2 + within % 2), 1)
    pairs = config["hidden_size"] // heads // 2
    frequencies = 10_000.0 ** -(torch.arange(pairs // 2, dtype=torch.float32) * 2 / pairs)
    angles = (places[:, :, None] * frequencies).flatten(1).view(-1, 4, pairs)[order].flatten(0, 1)
    cos, sin = angles.cos(), angles.sin()
    weight = w["patch_embed.proj.weight"].flatten(1)
    x = F.linear(patches, weight).view(-1, 4, weight.shape[0])[order].flatten(0, 1)
    bounds = [4 * count for count in counts]
    for index in range(config["depth"]):
        block = w.at(f"blocks.{index}")
        q, k, v = block.linear("attn.qkv", block.rms_norm("norm1", x)).chunk(3, -1)
        q, k = (rotate_halves(to_heads(part, heads).float(), cos, sin).to(x.dtype) for part in (q, k))
        v = to_heads(v, heads)
        if index in config["fullatt_block_indexes"]:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            windows = zip(q.split(bounds, 2), k.split(bounds, 2), v.split(bounds, 2))
            mixed = torch.cat([F.scaled_dot_product_attention(*window) for window in windows], 2)
        x = x + block.linear("attn.proj", from_heads(mixed))
        x = x + gated_mlp(block.at("mlp"), block.rms_norm("norm2", x))
    merged = w.rms_norm("merger.ln_q", x).view(-1, 4 * x.shape[1])
    merged = w.linear("merger.mlp.2", F.gelu(w.linear("merger.mlp.0", merged)))
    return merged[torch.argsort(order)]


# Diffusion transformer


def dit_rotary(axes, positions):
    """positions: [tokens, 3]"""
    parts = []
    for axis, features in enumerate(axes):
        frequencies = 10_000.0 ** -(torch.arange(0, features, 2, dtype=torch.float64) / features)
        parts.append(positions[:, axis, None].double() * frequencies)
    angles = torch.cat(parts, 1)
    return angles.cos().float(), angles.sin().float()


def rotate_neighbours(x, cos, sin):
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def joint_attention(q, k, v, rotary):
    return from_heads(F.scaled_dot_product_attention(rotate_neighbours(q, *rotary), rotate_neighbours(k, *rotary), v))


def double_block(w, heads, image, text, conditioning, rotary):
    """image, text: [tokens, dim]; conditioning: [1, dim]"""
    vectors, parts = {}, {}
    for stream, x in (("b", text), ("a", image)):
        vectors[stream] = w.linear(f"norm1_{stream}.linear", F.silu(conditioning)).chunk(6, -1)
        shift, scale = vectors[stream][:2]
        q, k, v = w.linear(f"attn.{stream}_to_qkv", modulate(x, shift, scale)).chunk(3, -1)
        q, k, v = (to_heads(part, heads) for part in (q, k, v))
        parts[stream] = w.rms_norm(f"attn.norm_q_{stream}", q), w.rms_norm(f"attn.norm_k_{stream}", k), v
    q, k, v = (torch.cat(pair, 2) for pair in zip(parts["b"], parts["a"]))
    mixed = joint_attention(q, k, v, rotary)
    results = []
    for stream, x, mixed in (("a", image, mixed[text.shape[0] :]), ("b", text, mixed[: text.shape[0]])):
        _, _, gate, shift, scale, mlp_gate = vectors[stream]
        x = x + gate * w.linear(f"attn.{stream}_to_out", mixed)
        hidden = F.gelu(w.linear(f"ff_{stream}.0", modulate(x, shift, scale)), approximate="tanh")
        results.append(x + mlp_gate * w.linear(f"ff_{stream}.2", hidden))
    return results


def single_block(w, heads, x, conditioning, rotary):
    """x: [tokens, dim]"""
    shift, scale, gate = w.linear("norm.linear", F.silu(conditioning)).chunk(3, -1)
    dim = x.shape[1]
    q, k, v, hidden = w.linear("to_qkv_mlp", modulate(x, shift, scale)).split((dim, dim, dim, 4 * dim), -1)
    q, k, v = (to_heads(part, heads) for part in (q, k, v))
    mixed = joint_attention(w.rms_norm("norm_q_a", q), w.rms_norm("norm_k_a", k), v, rotary)
    return x + gate * w.linear("proj_out", torch.cat((mixed, F.gelu(hidden, approximate="tanh")), -1))


def sinusoid(value, dtype):
    angles = value * 10_000.0 ** -(torch.arange(128, dtype=torch.float32) / 128)
    return torch.cat((angles.cos(), angles.sin()))[None].to(dtype)


def perceptron(w, x):
    return w.linear("2", F.silu(w.linear("0", x)))


def dit_velocity(w, config, latents, text, pooled, timestep, guidance, rotary):
    """latents: [16, height, width]; text: [tokens, dim], already in the transformer's width."""
    dtype, heads = latents.dtype, config["num_heads"]
    channels, height, width = latents.shape
    conditioning = (
        perceptron(w.at("time_embedder.timestep_embedder"), sinusoid(timestep, dtype))
        + perceptron(w.at("guidance_embedder.timestep_embedder"), sinusoid(1000 * guidance, dtype))
        + perceptron(w.at("pooled_text_embedder"), pooled)
    )
    squares = latents.view(channels, height // 2, 2, width // 2, 2).permute(1, 3, 0, 2, 4)
    image = w.linear("x_embedder", squares.reshape(-1, 4 * channels))
    for index in range(config["num_double"]):
        image, text = double_block(w.at(f"blocks.{index}"), heads, image, text, conditioning, rotary)
    x = torch.cat((text, image))
    for index in range(config["num_single"]):
        x = single_block(w.at(f"single_blocks.{index}"), heads, x, conditioning, rotary)
    scale, shift = w.linear("final_norm_out.linear", F.silu(conditioning)).chunk(2, -1)
    squares = w.linear("final_proj_out", modulate(x[text.shape[0] :], shift, scale))
    squares = squares.view(height // 2, width // 2, channels, 2, 2).permute(2, 0, 3, 1, 4)
    return squares.reshape(channels, height, width)


def adapter(w, embeds):
    """The generation decoder's: embeds: [tokens, hidden] -> [tokens, context]"""
    norm = lambda name, x: F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])
    return norm("4", w.linear("3", F.relu(norm("1", w.linear("0", embeds)))))


# Autoencoder


def group_norm(w, name, x):
    return F.group_norm(x, 32, w[name + ".weight"], w[name + ".bias"], EPS)


def resnet_block(w, x):
    y = w.conv("conv1", F.silu(group_norm(w, "norm1", x)), padding=1)
    y = w.conv("conv2", F.silu(group_norm(w, "norm2", y)), padding=1)
    return y + (x if w.get("nin_shortcut.weight") is None else w.conv("nin_shortcut", x))


def attention_block(w, x):
    normed, (height, width) = group_norm(w, "norm", x), x.shape[2:]
    q, k, v = (w.conv(name, normed).flatten(2).transpose(1, 2)[:, None] for name in "qkv")
    mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
    return x + w.conv("proj_out", mixed.unflatten(2, (height, width)))


def autoencoder_decode(w, z):
    """z: [1, 16, height, width] -> [1, 3, 8 * height, 8 * width]"""
    x = w.conv("conv_in", z / 0.3611 + 0.1159, padding=1)
    x = resnet_block(w.at("mid.block_1"), x)
    x = resnet_block(w.at("mid.block_2"), attention_block(w.at("mid.attn_1"), x))
    for level in (3, 2, 1, 0):
        for index in range(3):
            x = resnet_block(w.at(f"up.{level}.block.{index}"), x)
        if level > 0:
            x = w.conv(f"up.{level}.upsample.conv", F.interpolate(x, scale_factor=2, mode="nearest"), padding=1)
    return w.conv("conv_out", F.silu(group_norm(w, "norm_out", x)), padding=1)
