"""The networks, taken from transformers and diffusers, and how the released files name their tensors.

In: config dictionaries.  Out: library modules (or, for the two connectors, small modules built from library layers)
and for each a list of (released name, [library names]).  Where one released tensor holds several library tensors
(fused projections) they are stacked by rows in the order given.
"""
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers import T5Config, T5EncoderModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLRotaryEmbedding,
)

from sizes import PREFILL_ROWS


def qwen_config(config):
    # The file says bfloat16, which would also round the rotary frequencies; fixtures are computed in f32.
    return Qwen2_5_VLConfig(**config | {"torch_dtype": "float32"}, attn_implementation="eager")


class Autoregressive(nn.Module):
    """Qwen2.5-VL with the two tensors that Nexus-Gen adds."""

    def __init__(self, config):
        super().__init__()
        self.qwen = Qwen2_5_VLForConditionalGeneration(qwen_config(config))
        self.vision_head = nn.Linear(config["hidden_size"], config["hidden_size"], bias=False)
        self.image_prefill_embeds = nn.Embedding(PREFILL_ROWS, config["hidden_size"])

    @property
    def visual(self):
        return self.qwen.model.visual

    @property
    def language_model(self):
        return self.qwen.model.language_model

    @property
    def lm_head(self):
        return self.qwen.lm_head


class Adapter(nn.Sequential):
    """Image embeddings -> conditioning of the generation decoder."""

    def __init__(self, hidden, context_dim):
        super().__init__(
            nn.Linear(hidden, context_dim), nn.LayerNorm(context_dim), nn.ReLU(),
            nn.Linear(context_dim, context_dim), nn.LayerNorm(context_dim),
        )


class EmbeddingMerger(nn.Module):
    """Image embeddings and reference embeddings -> conditioning of the editing decoder."""

    BASE = 72

    def __init__(self, config, context_dim):
        super().__init__()
        text = qwen_config(config).text_config
        text._attn_implementation = "eager"  # without a mask this path is bidirectional
        hidden, wide = config["hidden_size"], 4 * context_dim
        self.layers = nn.ModuleList([Qwen2_5_VLDecoderLayer(text, 0)])
        self.rotary = Qwen2_5_VLRotaryEmbedding(text)
        self.projector = nn.Sequential(
            Qwen2_5_VLRMSNorm(hidden), nn.Linear(hidden, wide), Qwen2_5_VLRMSNorm(wide), nn.SiLU(),
            nn.Linear(wide, context_dim), Qwen2_5_VLRMSNorm(context_dim),
        )

    @classmethod
    def positions(cls, grid):
        """Patch grid (t, h, w) -> (3, merged tokens): every grid is stretched onto 72 x 72."""
        _, h, w = grid
        rows, columns = torch.arange(h // 2) * (cls.BASE / h), torch.arange(w // 2) * (cls.BASE / w)
        row, column = torch.meshgrid(rows, columns, indexing="ij")
        return torch.stack([torch.zeros_like(row), row, column]).flatten(1)

    def forward(self, embeds, grid, reference=None, reference_grid=None):
        positions = [self.positions(grid)]
        if reference is not None:
            embeds = torch.cat([embeds, reference], 1)
            positions.append(self.positions(reference_grid))
        rotary = self.rotary(embeds, torch.cat(positions, 1)[:, None])
        for layer in self.layers:
            embeds = layer(embeds, attention_mask=None, position_embeddings=rotary)
        return self.projector(embeds)


def transformer(c):
    return FluxTransformer2DModel(
        in_channels=c["in_channels"], num_layers=c["num_double"], num_single_layers=c["num_single"],
        attention_head_dim=c["dim"] // c["num_heads"], num_attention_heads=c["num_heads"],
        joint_attention_dim=c["context_dim"], pooled_projection_dim=c["pooled_dim"],
        guidance_embeds=c["guidance_embed"], axes_dims_rope=tuple(c["axes_dim"]),
    )


def autoencoder(c):
    levels = len(c["ch_mult"])
    return AutoencoderKL(
        in_channels=c["in_channels"], out_channels=c["in_channels"],
        block_out_channels=tuple(c["ch"] * m for m in c["ch_mult"]),
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=c["num_res_blocks"], latent_channels=c["z_channels"], norm_num_groups=c["groups"],
        use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=c["scale_factor"], shift_factor=c["shift_factor"],
    )


def clip(c):
    return CLIPTextModel(CLIPTextConfig(**c, attn_implementation="eager"))


def t5(c):
    return T5EncoderModel(T5Config(**c))


# ---------------------------------------------------------------------------------------------- released names
def same(module, rename=lambda name: name):
    """[(released, [library])] for tensors that differ in name only; tied copies are listed once."""
    return [(rename(name), [name]) for name, _ in module.named_parameters()]


def autoregressive_names(module):
    def rename(name):
        for library, released in (("qwen.model.visual.", "visual."), ("qwen.model.language_model.", "model."), ("qwen.", "")):
            if name.startswith(library):
                return released + name[len(library):]
        return name
    return same(module, rename)


def clip_names(module):
    return same(module, lambda name: "text_model." + name)


def _both(pairs):
    """Weight and bias of every linear or convolution in `pairs`."""
    return [(f"{a}.{kind}", [f"{b}.{kind}" for b in parts]) for a, parts in pairs for kind in ("weight", "bias")]


def transformer_names(c, prefix="pipe.dit."):
    linears, norms = [], []
    for released, library in (("time_embedder", "timestep_embedder"), ("guidance_embedder", "guidance_embedder")):
        if released == "time_embedder" or c["guidance_embed"]:
            for i, n in ((0, 1), (2, 2)):
                linears.append((f"{released}.timestep_embedder.{i}", [f"time_text_embed.{library}.linear_{n}"]))
    for i, n in ((0, 1), (2, 2)):
        linears.append((f"pooled_text_embedder.{i}", [f"time_text_embed.text_embedder.linear_{n}"]))
    linears += [(name, [name]) for name in ("context_embedder", "x_embedder")]
    for i in range(c["num_double"]):
        for stream, norm1, qkv, out, feed, qk in (
            ("a", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm_"),
            ("b", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm_added_"),
        ):
            a, b = f"blocks.{i}.", f"transformer_blocks.{i}."
            linears += [
                (f"{a}norm1_{stream}.linear", [f"{b}{norm1}.linear"]),
                (f"{a}attn.{stream}_to_qkv", [f"{b}attn.{x}" for x in qkv]),
                (f"{a}attn.{stream}_to_out", [f"{b}attn.{out}"]),
                (f"{a}ff_{stream}.0", [f"{b}{feed}.net.0.proj"]),
                (f"{a}ff_{stream}.2", [f"{b}{feed}.net.2"]),
            ]
            norms += [(f"{a}attn.norm_{x}_{stream}.weight", [f"{b}attn.{qk}{x}.weight"]) for x in "qk"]
    for i in range(c["num_single"]):
        a, b = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        linears += [
            (f"{a}norm.linear", [f"{b}norm.linear"]),
            (f"{a}to_qkv_mlp", [f"{b}attn.to_q", f"{b}attn.to_k", f"{b}attn.to_v", f"{b}proj_mlp"]),
            (f"{a}proj_out", [f"{b}proj_out"]),
        ]
        norms += [(f"{a}norm_{x}_a.weight", [f"{b}attn.norm_{x}.weight"]) for x in "qk"]
    # Both sides keep [scale | shift] here; flux1-dev.safetensors has the halves the other way round.
    linears += [("final_norm_out.linear", ["norm_out.linear"]), ("final_proj_out", ["proj_out"])]
    return [(prefix + a, b) for a, b in _both(linears) + norms]


def autoencoder_names(c):
    levels = len(c["ch_mult"])
    pairs = []

    def res(a, b, changes):
        for n in ("norm1", "conv1", "norm2", "conv2"):
            pairs.append((f"{a}.{n}", [f"{b}.{n}"]))
        if changes:
            pairs.append((f"{a}.nin_shortcut", [f"{b}.conv_shortcut"]))

    def middle(side):
        a, b = f"{side}.mid.", f"{side}.mid_block."
        res(a + "block_1", b + "resnets.0", False)
        for x, y in (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            pairs.append((f"{a}attn_1.{x}", [f"{b}attentions.0.{y}"]))
        res(a + "block_2", b + "resnets.1", False)

    def ends(side):
        pairs.extend([(f"{side}.norm_out", [f"{side}.conv_norm_out"]), (f"{side}.conv_out", [f"{side}.conv_out"])])

    pairs.append(("encoder.conv_in", ["encoder.conv_in"]))
    for level in range(levels):
        before = c["ch_mult"][max(level - 1, 0)]
        for n in range(c["num_res_blocks"]):
            changes = n == 0 and before != c["ch_mult"][level]
            res(f"encoder.down.{level}.block.{n}", f"encoder.down_blocks.{level}.resnets.{n}", changes)
        if level + 1 < levels:
            pairs.append((f"encoder.down.{level}.downsample.conv", [f"encoder.down_blocks.{level}.downsamplers.0.conv"]))
    middle("encoder")
    ends("encoder")
    pairs.append(("decoder.conv_in", ["decoder.conv_in"]))
    middle("decoder")
    for order, level in enumerate(reversed(range(levels))):
        before = c["ch_mult"][min(level + 1, levels - 1)]
        for n in range(c["num_res_blocks"] + 1):
            changes = n == 0 and before != c["ch_mult"][level]
            res(f"decoder.up.{level}.block.{n}", f"decoder.up_blocks.{order}.resnets.{n}", changes)
        if level:
            pairs.append((f"decoder.up.{level}.upsample.conv", [f"decoder.up_blocks.{order}.upsamplers.0.conv"]))
    ends("decoder")
    return _both(pairs)


def _is_pointwise_attention(name):
    return "attn_1." in name and ".norm." not in name and name.endswith(".weight")


def released_shapes(module, names):
    """{released name: shape}."""
    parameters = dict(module.named_parameters())
    shapes = {}
    for released, parts in names:
        shape = list(parameters[parts[0]].shape)
        shape[0] = sum(parameters[p].shape[0] for p in parts)
        shapes[released] = tuple(shape) + ((1, 1) if _is_pointwise_attention(released) else ())
    return shapes


def load(module, names, tensors):
    """Fills `module` (f32) from released tensors; every name must be there and nothing may be left over."""
    parameters = dict(module.named_parameters())
    left = set(tensors)
    with torch.no_grad():
        for released, parts in names:
            left.remove(released)
            rows = tensors[released].float().split([parameters[p].shape[0] for p in parts])
            for part, value in zip(parts, rows):
                parameters.pop(part).copy_(value.reshape(module.get_parameter(part).shape))
    assert not left and not parameters, (sorted(left), sorted(parameters))
    return module.eval()
