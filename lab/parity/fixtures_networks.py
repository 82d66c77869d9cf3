"""Fixtures of single networks: vision encoder, language model, connectors, transformer, autoencoder, text encoders, scheduler.

In: the checkpoint, and ramps as inputs.  Out: one .safetensors per network or case.
"""
import torch
from transformers import (
    LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.vision_utils import get_vision_attention_seqlens, get_vision_window_index

import fixtures_data
import nexus_gen
from fixture_files import Inputs

GUIDANCE = 3.5


def tapped(named_modules, run):
    """Runs `run` and returns (its result, {name: first output of each module})."""
    taps, handles = {}, []
    for name, module in named_modules.items():
        def keep(_module, _inputs, output, name=name):
            taps[f"tap.{name}"] = (output[0] if isinstance(output, tuple) else output).clone()
        handles.append(module.register_forward_hook(keep))
    try:
        return run(), taps
    finally:
        for handle in handles:
            handle.remove()


def vision(fixtures):
    visual, c = fixtures.checkpoint.ar.visual, fixtures.checkpoint.config["vision_config"]
    cases = {
        "vision_odd": (11, [(1, 6, 10), (1, 10, 6), (1, 14, 22)]), "vision_81": (12, [(1, 18, 18)]),
        "vision_min": (13, [(1, 2, 2), (1, 2, 16)]), "vision_full_windows": (14, [(1, 8, 16), (1, 16, 10)]),
    }
    for name, (seed, grids) in cases.items():
        grid = torch.tensor(grids)
        inputs = Inputs(pixel_values=(seed, int(grid.prod(1).sum()), 1176))
        modules = {"patch_embed": visual.patch_embed} | {f"blocks.{n}": b for n, b in enumerate(visual.blocks)}
        out, taps = tapped(modules if name == "vision_min" else {}, lambda: visual(inputs.pixel_values, grid).pooler_output)
        order, windows = get_vision_window_index(grid, c["spatial_merge_size"], c["window_size"], c["patch_size"])
        frames = get_vision_attention_seqlens(grid, visual.config)[0]
        fixtures.tensors(name, {
            "out.embeds": out, "out.window_index": order.long(), "out.cu_window_seqlens": windows.long().unique_consecutive(),
            "out.cu_seqlens": frames.long()} | taps, inputs, grid_thw=grids)


def language(fixtures):
    k = fixtures.checkpoint
    model, config = k.ar, k.config
    grids = [(1, 6, 10), (1, 18, 18)]
    text = nexus_gen.chat([
        ("user", [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}, {"type": "text", "text": "differ how?"}]),
        ("assistant", "Here is noise.")], False)
    inputs = Inputs(pixel_values=(21, 60 + 324, 1176))
    ids = k.ids(nexus_gen.with_image_tokens(text, grids))
    positions, _ = nexus_gen.position_ids(config, ids[0].tolist(), grids)
    embeds = nexus_gen.prompt_embeds(model, config, ids, inputs.pixel_values, grids)
    hidden = nexus_gen.hidden_states(model, embeds, positions).last_hidden_state
    logits = model.lm_head(hidden)[0]
    columns = list(range(0, config["vocab_size"], 9))
    fixtures.tensors("lm_forward", {
        "in.input_ids": ids, "out.position_ids": positions, "out.logits_columns": logits[:, columns],
        "out.logits_last": logits[-1], "out.vision_head": model.vision_head(hidden)[0],
    }, inputs, grid_thw=grids, columns=columns)

    ids = k.ids("Here is the red fox, 小狗.")
    positions, _ = nexus_gen.position_ids(config, ids[0].tolist(), [])
    modules = {f"layers.{n}": layer for n, layer in enumerate(model.language_model.layers)} | {"norm": model.language_model.norm}
    hidden, taps = tapped(modules, lambda: nexus_gen.hidden_states(
        model, model.language_model.embed_tokens(ids), positions).last_hidden_state)
    fixtures.tensors("lm_text", {
        "in.input_ids": ids, "out.logits": model.lm_head(hidden)[0], "out.vision_head": model.vision_head(hidden)[0]} | taps)


def sampling(fixtures):
    """Repetition penalty, temperature, top-k and top-p, as transformers orders them."""
    inputs = Inputs(logits=(23, 1, fixtures.checkpoint.config["vocab_size"]))
    logits, seen = inputs.logits * 8, torch.tensor([[3, 17, 17, 250, 559]])
    tensors, settings = {"in.seen_ids": seen}, []
    for penalty, temperature, top_k, top_p in (
        (1.05, 1.0, 0, 1.0), (1.0, 0.7, 0, 1.0), (1.0, 1.0, 5, 1.0), (1.0, 1.0, 0, 0.8), (1.3, 0.5, 50, 0.9), (1.05, 1e-6, 50, 1.0),
        (1.0, 2.0, 1, 0.001)):
        chain = LogitsProcessorList()
        chain += [RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else []
        chain += [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
        chain += [TopKLogitsWarper(top_k)] if top_k else []
        chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        tensors[f"out.probabilities_{len(settings)}"] = chain(seen, logits.clone()).softmax(-1)[0]
        settings.append({"repetition_penalty": penalty, "temperature": temperature, "top_k": top_k, "top_p": top_p})
    fixtures.tensors("sampling", tensors, inputs, settings=settings, logits="8 * in.logits")


def connectors(fixtures):
    k = fixtures.checkpoint
    hidden = k.config["hidden_size"]
    inputs = Inputs(embeds=(31, 1, 81, hidden))
    fixtures.tensors("adapter", {"out.context": k.adapter(inputs.embeds)}, inputs)

    inputs = Inputs(embeds=(31, 1, 81, hidden), reference=(32, 1, 324, hidden), reference_24x34=(33, 1, 204, hidden))
    grid, square, odd = nexus_gen.IMAGE_GRID, (1, 36, 36), (1, 24, 34)
    context, taps = tapped({"layer": k.merger.layers[0]}, lambda: k.merger(inputs.embeds, grid, inputs.reference, square))
    fixtures.tensors("merger", {
        "out.context": context, "out.context_24x34": k.merger(inputs.embeds, grid, inputs.reference_24x34, odd),
        "out.context_without_reference": k.merger(inputs.embeds, grid),
        "out.positions": torch.cat([k.merger.positions(grid), k.merger.positions(square)], 1),
        "out.positions_24x34": torch.cat([k.merger.positions(grid), k.merger.positions(odd)], 1),
    } | {name: t[:, ::5] for name, t in taps.items()}, inputs, grid_thw=grid, reference_grids=[square, odd], tap_layer="every fifth token")


def transformer(fixtures):
    k = fixtures.checkpoint
    context, pooled = k.dit_config["context_dim"], k.dit_config["pooled_dim"]
    cases = {
        "dit_gen": ("generation", 41, (8, 12), torch.zeros(81, 3)),
        "dit_edit": ("editing", 45, (16, 16), nexus_gen.editing_text_ids(16, 16)),
        "dit_edit_noref": ("editing", 49, (12, 8), nexus_gen.editing_text_ids(12, 8, None)),
    }
    for name, (decoder, seed, (height, width), text_ids) in cases.items():
        dit = k.generation_dit if decoder == "generation" else k.editing_dit
        inputs = Inputs(latents=(seed, 1, 16, height, width), context=(seed + 1, 1, len(text_ids), context), pooled=(seed + 2, 1, pooled))
        taps = {}
        out = nexus_gen.velocity(dit, inputs.latents, 737.25, inputs.context, inputs.pooled, GUIDANCE, text_ids, taps=taps)
        kept = taps if name == "dit_gen" else {"conditioning": taps["conditioning"]}
        fixtures.tensors(name, {
            "in.text_ids": text_ids, "in.image_ids": nexus_gen.image_ids(height, width), "out.velocity": out,
        } | {f"tap.{key}": t for key, t in kept.items()}, inputs, decoder=decoder, timestep=737.25, guidance=GUIDANCE)


def teacache(fixtures):
    k, steps, threshold, cfg = fixtures.checkpoint, 12, 0.6, 2.0
    context, pooled = k.dit_config["context_dim"], k.dit_config["pooled_dim"]
    inputs = Inputs(latents=(53, 1, 16, 8, 8), context=(54, 1, 81, context), pooled=(55, 1, pooled),
                    negative_context=(56, 1, 20, context), negative_pooled=(57, 1, pooled))
    x, sigmas, trajectory = inputs.latents, nexus_gen.sigmas(steps), []
    caches = [nexus_gen.TeaCache(steps, threshold) for _ in range(2)]
    for step, sigma in enumerate(sigmas):
        v, negative = (
            nexus_gen.velocity(k.generation_dit, x, float(sigma * 1000), ctx, vector, GUIDANCE, torch.zeros(ctx.shape[1], 3), cache)
            for ctx, vector, cache in (
                (inputs.context, inputs.pooled, caches[0]), (inputs.negative_context, inputs.negative_pooled, caches[1])))
        x = nexus_gen.euler(x, negative + cfg * (v - negative), sigmas, step)
        trajectory.append(x)
    for cache in caches:
        assert 0 < sum(cache.skipped) < steps - 2 and min(abs(s - threshold) for s in cache.sums) > 0.005, cache.sums
    tensors = {"out.trajectory": torch.stack(trajectory)}
    for name, cache in zip(("positive", "negative"), caches):
        tensors |= {f"out.skipped_{name}": torch.tensor(cache.skipped).to(torch.uint8), f"out.sums_{name}": torch.tensor(cache.sums)}
    fixtures.tensors("teacache", tensors, inputs, decoder="generation", steps=steps, threshold=threshold, cfg_scale=cfg, guidance=GUIDANCE,
                     text_ids="zeros for both branches")


def scheduler(fixtures):
    tensors = {}
    for steps, strength in ((1, 1.0), (2, 1.0), (4, 1.0), (30, 1.0), (50, 1.0), (50, 0.7)):
        s = nexus_gen.sigmas(steps, strength)
        tensors |= {f"out.sigmas_{steps}_{strength}": s, f"out.timesteps_{steps}_{strength}": s * 1000}
    indexes = torch.tensor([0, 1, 2, 100, 321, 499, 500, 750, 997, 998, 999])
    s = nexus_gen.sigmas(1000)
    tensors |= {"in.training_indexes": indexes, "out.training_sigmas": s[indexes], "out.training_timesteps": (s * 1000)[indexes],
                "out.training_weights": nexus_gen.training_weights()[indexes]}
    inputs = Inputs(sample=(61, 1, 16, 4, 4), velocity=(62, 1, 16, 4, 4))
    for step in range(4):
        tensors[f"out.euler_4_step_{step}"] = nexus_gen.euler(inputs.sample, inputs.velocity, nexus_gen.sigmas(4), step)
    noisy = (1 - s[321]) * inputs.sample + s[321] * inputs.velocity
    fixtures.tensors("scheduler", tensors | {"out.noisy_321": noisy}, inputs, noisy_321="sample is the picture, velocity the noise")


def autoencoder(fixtures):
    ae = fixtures.checkpoint.ae
    inputs = Inputs(image=(71, 1, 3, 48, 64), latents=(72, 1, 16, 6, 8))
    modules = {"encoder.conv_in": ae.encoder.conv_in, "encoder.mid": ae.encoder.mid_block}
    modules |= {f"encoder.down.{n}": b for n, b in enumerate(ae.encoder.down_blocks) if n > 1}
    latents, taps = tapped(modules, lambda: nexus_gen.encode(ae, inputs.image))
    modules = {"decoder.conv_in": ae.decoder.conv_in, "decoder.mid": ae.decoder.mid_block, "decoder.up.3": ae.decoder.up_blocks[0]}
    image, more = tapped(modules, lambda: nexus_gen.decode(ae, inputs.latents))
    fixtures.tensors("ae", {
        "out.latents": latents, "out.image": image, "out.uint8": nexus_gen.to_uint8(image),
        "out.tiled_image": nexus_gen.tiled(lambda z: nexus_gen.decode(ae, z), inputs.latents, 4, 2),
        "out.tiled_latents": nexus_gen.tiled(lambda x: nexus_gen.encode(ae, x), inputs.image, 32, 16),
    } | {name: t for name, t in (taps | more).items() if t.numel() <= 8192}, inputs, decode_tile=[4, 2], encode_tile=[32, 16])


def text_encoders(fixtures):
    k = fixtures.checkpoint
    clip_tokenizer, t5_tokenizer = fixtures_data.flux_tokenizers(fixtures)
    tokenize = lambda tok, texts, n: torch.tensor(tok(texts, padding="max_length", max_length=n, truncation=True).input_ids)
    texts = ["", "blurry, low quality", "word " * 100]
    ids = tokenize(clip_tokenizer, texts, 77)
    out, taps = tapped({f"layers.{n}": x for n, x in enumerate(k.clip.encoder.layers)}, lambda: k.clip(ids))
    fixtures.tensors("clip", {"in.input_ids": ids, "out.pooled": out.pooler_output, "out.hidden": out.last_hidden_state[1]}
                     | {name: t[1] for name, t in taps.items()}, texts=texts, out_hidden="of text 1", tap_layers="of text 1")

    ids = tokenize(t5_tokenizer, ["A red fox, low quality"], 64)
    out, taps = tapped({f"block.{n}": x for n, x in enumerate(k.t5.encoder.block)}, lambda: k.t5(ids).last_hidden_state)
    fixtures.tensors("t5", {"in.input_ids": ids, "out.hidden": out} | taps)

    rows = torch.tensor([0, 1, 2, 63, 64, 255, 256, 510, 511])
    distance = torch.arange(512)[None] - torch.arange(512)[:, None]
    buckets = T5Attention._relative_position_bucket(
        distance, True, k.t5_config["relative_attention_num_buckets"], k.t5_config["relative_attention_max_distance"])
    tensors = {"in.rows": rows, "out.bucket_rows": buckets[rows]}
    for name, text in (("empty", ""), ("negative", "blurry, low quality")):
        ids = tokenize(t5_tokenizer, [text], 512)
        tensors |= {f"in.{name}_input_ids": ids, f"out.{name}_hidden_rows": k.t5(ids).last_hidden_state[0, rows]}
    fixtures.tensors("t5_512", tensors, texts={"empty": "", "negative": "blurry, low quality"})


def write(fixtures):
    with torch.no_grad():
        for function in (vision, language, sampling, connectors, transformer, teacache, scheduler, autoencoder, text_encoders):
            function(fixtures)
            print(" ", function.__name__, flush=True)
