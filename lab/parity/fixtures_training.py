"""Fixtures for training: losses and gradients, and the names and shapes of the released files.

In: the checkpoint, ramps.  Out: objective_ar, objective_gen, objective_edit (.safetensors), released_layout.json.
Gradients come from autograd through the library networks; of most of them only the norm is kept.
"""
import hashlib
import math
import re

import torch
import torch.nn.functional as F

import networks
import nexus_gen
import sizes
from fixture_files import Inputs

TOKEN_WEIGHT = IMAGE_WEIGHT = 3.0
TIMESTEP_INDEX = 321


def gradients(names, module, full):
    """{released name: gradient norm} and the whole gradients of `full`."""
    norms, whole = {}, {}
    for released, parts in names:
        parts = [module.get_parameter(p).grad for p in parts]
        if parts[0] is None:
            continue
        gradient = torch.cat(parts)
        norms[released] = float(gradient.norm())
        if released in full:
            whole[f"out.grad.{released}"] = gradient
    return norms, whole


def autoregressive(fixtures):
    """An editing conversation and a shorter generation, padded on the right; the vision encoder is frozen."""
    k = fixtures.checkpoint
    config, model = k.config, k.ar
    image = config["image_token_id"]
    answer = nexus_gen.VISION
    turns = [
        (nexus_gen.editing_prompt("Turn it red."), f"Here is the edited image:{answer} Done.<|im_end|>", [(1, 6, 10), nexus_gen.IMAGE_GRID]),
        (nexus_gen.generation_prompt("a cat"), f"Here:{answer}<|im_end|>", [nexus_gen.IMAGE_GRID]),
    ]
    rows, labels, positions, grids = [], [], [], []
    for prompt, reply, these in turns:
        count = prompt.count("<|image_pad|>")
        asked = k.ids(nexus_gen.with_image_tokens(prompt, these[:count]))[0]
        replied = k.ids(nexus_gen.with_image_tokens(reply, these[count:]))[0]
        rows.append(torch.cat([asked, replied]))
        labels.append(torch.cat([torch.full_like(asked, -100), replied]))
        positions.append(nexus_gen.position_ids(config, rows[-1].tolist(), these)[0].T)
        grids += these
    pad = lambda tensors, value: torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
    ids, labels = pad(rows, config["pad_token_id"]), pad(labels, -100)
    attention_mask, positions = pad([torch.ones_like(r) for r in rows], 0), pad(positions, 1).permute(2, 0, 1)
    inputs = Inputs(pixel_values=(91, sum(h * w for _, h, w in grids), 1176))

    model.zero_grad()
    for parameter in model.visual.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        seen = model.visual(inputs.pixel_values, torch.tensor(grids)).pooler_output
    is_image, is_answer = ids == image, labels == image
    # Order of `seen`: user picture and answer picture of row 0, answer picture of row 1.
    of_answer = is_answer[is_image]
    target = seen[of_answer]
    embeds = model.language_model.embed_tokens(ids)
    embeds = embeds.masked_scatter((is_image & ~is_answer)[..., None].expand_as(embeds), seen[~of_answer])
    prefill = model.image_prefill_embeds.weight.repeat(len(target) // 81, 1)
    embeds = embeds.masked_scatter(is_answer[..., None].expand_as(embeds), prefill)
    hidden = model.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=attention_mask, use_cache=False).last_hidden_state
    text_labels = labels[:, 1:].masked_fill(is_answer[:, 1:], -100)
    cross_entropy = F.cross_entropy(model.lm_head(hidden[:, :-1]).flatten(0, 1), text_labels.flatten(), ignore_index=-100)
    predicted = model.vision_head(hidden[:, :-1])[is_answer[:, 1:]]
    mse = F.mse_loss(predicted, target)
    cosine = (1 - F.cosine_similarity(predicted, target, dim=-1)).mean()
    image_loss = 0.5 * mse + 0.5 * cosine
    loss = TOKEN_WEIGHT * cross_entropy + IMAGE_WEIGHT * image_loss
    loss.backward()
    full = ("model.norm.weight", "vision_head.weight", "image_prefill_embeds.weight", "model.layers.0.self_attn.k_proj.weight",
            "model.layers.3.mlp.down_proj.weight")
    norms, whole = gradients(networks.autoregressive_names(model), model, full)
    scalars = dict(loss=loss, cross_entropy=cross_entropy, mse=mse, cosine=cosine, image_loss=image_loss)
    fixtures.tensors("objective_ar", {
        "in.input_ids": ids, "in.labels": labels, "in.attention_mask": attention_mask, "out.positions": positions,
        "out.predicted_every_9": predicted[::9], "out.target_every_9": target[::9],
    } | {f"out.{name}": value.reshape(1) for name, value in scalars.items()} | whole, inputs, grid_thw=grids,
        token_loss_weight=TOKEN_WEIGHT, image_loss_weight=IMAGE_WEIGHT, vision_encoder="frozen", gradient_norms=norms)


def transformer(fixtures):
    k = fixtures.checkpoint
    hidden, pooled = k.config["hidden_size"], k.dit_config["pooled_dim"]
    sigmas, weights = nexus_gen.sigmas(1000), nexus_gen.training_weights()
    sigma, weight = sigmas[TIMESTEP_INDEX], weights[TIMESTEP_INDEX]
    for name, prefix, connector, dit in (
        ("objective_gen", "adapter.", k.adapter, k.generation_dit), ("objective_edit", "embedding_merger.", k.merger, k.editing_dit)):
        inputs = Inputs(latents=(95, 1, 16, 8, 8), noise=(96, 1, 16, 8, 8), embeds=(97, 1, 81, hidden),
                        reference=(98, 1, 324, hidden), pooled=(99, 1, pooled))
        noisy = (1 - sigma) * inputs.latents + sigma * inputs.noise
        if name == "objective_gen":
            context, text_ids = connector(inputs.embeds), torch.zeros(81, 3)
        else:
            context = connector(inputs.embeds, nexus_gen.IMAGE_GRID, inputs.reference, (1, 36, 36))
            text_ids = nexus_gen.editing_text_ids(8, 8)
        v = nexus_gen.velocity(dit, noisy, float(sigma * 1000), context, inputs.pooled, 3.5, text_ids)
        loss = F.mse_loss(v, inputs.noise - inputs.latents) * weight
        loss.backward()
        mine = networks.same(connector, lambda n: prefix + n)
        full = {n for n, _ in mine if "q_proj" in n} | {
            "adapter.0.weight", "adapter.4.bias", "embedding_merger.projector.0.weight", "embedding_merger.projector.5.weight",
            "pipe.dit.x_embedder.bias", "pipe.dit.blocks.0.attn.norm_q_a.weight", "pipe.dit.single_blocks.2.to_qkv_mlp.bias",
            "pipe.dit.final_norm_out.linear.bias"}
        norms, whole = gradients(mine, connector, full)
        more_norms, more = gradients(networks.transformer_names(k.dit_config), dit, full)
        # One AdamW step, as a check of the optimizer's defaults.
        stepped = {n: p for n, p in connector.named_parameters() if f"out.grad.{prefix}{n}" in whole}
        torch.optim.AdamW(stepped.values(), lr=1e-3).step()
        after = {f"out.adamw.{prefix}{n}": p.detach() for n, p in stepped.items()}
        scalars = {"out.loss": loss, "out.sigma": sigma, "out.timestep": sigma * 1000, "out.weight": weight}
        fixtures.tensors(name, {"in.text_ids": text_ids, "out.noisy": noisy, "out.velocity": v} | whole | more | after
                         | {key: value.reshape(1) for key, value in scalars.items()}, inputs, timestep_index=TIMESTEP_INDEX, guidance=3.5,
                         gradient_norms=norms | more_norms,
                         adamw={"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 1e-2, "steps": 1})


def layouts():
    """{released file: {name: shape}} at the published sizes; no memory is allocated."""
    r = sizes.released()
    hidden, context = r["ar"]["hidden_size"], r["dit"]["context_dim"]
    with torch.device("meta"):
        ar, dit, ae, clip, t5 = (
            networks.Autoregressive(r["ar"]), networks.transformer(r["dit"]), networks.autoencoder(r["ae"]), networks.clip(r["clip"]),
            networks.t5(r["t5"]))
        adapter, merger = networks.Adapter(hidden, context), networks.EmbeddingMerger(r["ar"], context)
    shapes = networks.released_shapes
    dit = shapes(dit, networks.transformer_names(r["dit"]))
    return {
        "Nexus-GenV2/model.safetensors": shapes(ar, networks.autoregressive_names(ar)),
        "Nexus-GenV2/generation_decoder.bin": shapes(adapter, networks.same(adapter, lambda n: "adapter." + n)) | dit,
        "Nexus-GenV2/edit_decoder.bin": shapes(merger, networks.same(merger, lambda n: "embedding_merger." + n)) | dit,
        "FLUX/FLUX.1-dev/ae.safetensors": shapes(ae, networks.autoencoder_names(r["ae"])),
        "FLUX/FLUX.1-dev/text_encoder/model.safetensors": shapes(clip, networks.clip_names(clip)),
        "FLUX/FLUX.1-dev/text_encoder_2/model.safetensors": shapes(t5, networks.same(t5)),
    }


def released_layout(fixtures):
    files = []
    for file, shapes in layouts().items():
        parts = sorted(part for name, shape in shapes.items() for part in (name, name + ":" + "_".join(map(str, shape))))
        groups = {}
        for name, shape in shapes.items():
            number = re.search(r"(?<=\.)\d+(?=\.)", name)
            pattern = name[:number.start()] + "{n}" + name[number.end():] if number else name
            groups.setdefault((pattern, shape), []).append(int(number.group()) if number else None)
        tensors = [
            {"name": pattern, "shape": list(shape)} | ({"n": n} if n != [None] else {}) for (pattern, shape), n in groups.items()]
        files.append({
            "file": file, "count": len(shapes), "parameters": sum(math.prod(s) for s in shapes.values()),
            "md5": hashlib.md5(",".join(parts).encode()).hexdigest(), "tensors": tensors})
    fixtures.json("released_layout", md5_of="sorted list of every `name` and `name:d0_d1...`, joined by commas", files=files)


def write(fixtures):
    for function in (autoregressive, transformer, released_layout):
        function(fixtures)
        print(" ", function.__name__, flush=True)
