"""Fixtures of the generation loop and of whole requests.

In: the checkpoint, prompts, the pictures of images/.  Out: gen_*.safetensors (token loop only, ramps as pictures) and
e2e_*.safetensors with e2e_*.png (from prompt and picture to answer and picture).
"""
import re

import torch
from PIL import Image

import fixtures_data
import images
import nexus_gen
from fixture_files import Inputs

LEAST_MARGIN = 0.1


def shown(k, result, prompt_length):
    """The answer as a user sees it."""
    text = k.tokenizer.decode(result["sequences"][prompt_length:].tolist(), skip_special_tokens=False)
    return re.sub(r"<\|vision_start\|>.*?<\|vision_end\|>", "<image>", text, flags=re.DOTALL).replace("<|im_end|>", "")


def checked(result, config, draws, stops=True):
    """Refuses a checkpoint whose greedy path is unclear or does not do what the case is there for."""
    sequence = result["sequences"].tolist()
    assert nexus_gen.smallest_margin(result) > LEAST_MARGIN, nexus_gen.smallest_margin(result)
    assert (result["image_embeds"] is not None) == draws
    assert not stops or sequence[-1] == config["eos_token_id"], sequence[-5:]
    return result


def penalised(k):
    """A message and options without ties, and nothing drawn; if possible the penalty changes the answer, not only the logits."""
    unchanged = None
    for length in (20, 16, 12, 9):
        for greeting in ("hi", "Hello!", "Who are you?", "hello there", "good morning", "a word", "red", "thanks", "why?", "what now"):
            ids = k.ids(nexus_gen.chat([("user", greeting)]))
            options = dict(penalty=1.3, max_new_tokens=length, eos=[])
            plain, result = (nexus_gen.generate(k.ar, k.config, ids, **o) for o in (options | {"penalty": 1.0}, options))
            clear = result["image_embeds"] is None and nexus_gen.smallest_margin(result) > LEAST_MARGIN
            if clear and not torch.equal(plain["sequences"], result["sequences"]):
                return greeting, options
            unchanged = unchanged or (clear and (greeting, options))
    if unchanged:
        return unchanged
    raise RuntimeError("no message serves; take another seed")


def generation(fixtures):
    k = fixtures.checkpoint
    config = k.config
    start = config["vision_start_token_id"]
    greeting, penalty = penalised(k)
    t2i = nexus_gen.generation_prompt("A lighthouse in a storm")
    cases = {
        "gen_t2i": (t2i, [], dict(), True, True),
        "gen_t2i_zh": (nexus_gen.generation_prompt("一只戴草帽的小狗", nexus_gen.GENERATION_ZH), [], dict(), True, True),
        "gen_edit": (nexus_gen.editing_prompt("Turn the sky into a sunset."), [(1, 6, 10)], dict(), True, True),
        "gen_und": (nexus_gen.understanding_prompt("How many boats are there?"), [(1, 8, 4)], dict(), False, True),
        "gen_und_two": (nexus_gen.understanding_prompt("What differs?", 2), [(1, 4, 6), (1, 10, 2)], dict(), False, True),
        "gen_penalty": (nexus_gen.chat([("user", greeting)]), [], penalty, False, False),
        "gen_limit": (t2i, [], dict(max_new_tokens=30), True, False),
        "gen_forced_boi": (t2i + "<|vision_start|>", [], dict(), True, True),
    }
    for seed, (name, (text, grids, options, draws, stops)) in enumerate(cases.items(), 81):
        ids = k.ids(nexus_gen.with_image_tokens(text, grids))
        inputs = Inputs(**({"pixel_values": (seed, sum(h * w for _, h, w in grids), 1176)} if grids else {}))
        pixels = inputs.pixel_values if grids else None
        tensors = {"in.input_ids": ids}
        for mode in ("reference", "trained") if draws and stops else ("reference",):
            result = checked(nexus_gen.generate(k.ar, config, ids, pixels, grids, positions=mode, **options), config, draws, stops)
            if mode == "trained":
                tensors |= {f"out.trained.{key}": result[key] for key in ("sequences", "positions", "text_logits")}
            else:
                tensors |= {f"out.{key}": t for key, t in result.items() if t is not None}
        fixtures.tensors(
            name, tensors, inputs, prompt=text, grid_thw=grids, answer=shown(k, result, ids.shape[1]), margin=nexus_gen.smallest_margin(result),
            max_new_tokens=options.get("max_new_tokens", 110), repetition_penalty=options.get("penalty", 1.0),
            eos_token_ids=options.get("eos", [config["eos_token_id"], config["bos_token_id"]]))


def picture_inputs(fixtures, names, max_pixels):
    """AR inputs of pictures: (patches or None, grids)."""
    parts = [images.patches(images.bounded(fixtures_data.open_picture(fixtures, n), max_pixels)) for n in names]
    return (torch.cat([torch.from_numpy(p) for p, _ in parts]) if parts else None), [g for _, g in parts]


def whole_requests(fixtures):
    k, config = fixtures.checkpoint, fixtures.checkpoint.config
    clip_tokenizer, t5_tokenizer = fixtures_data.flux_tokenizers(fixtures)

    def pooled_of(text):
        ids = clip_tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
        return k.clip(torch.tensor([ids])).pooler_output

    def context_of(text):
        ids = t5_tokenizer(text, padding="max_length", max_length=512, truncation=True).input_ids
        return k.t5(torch.tensor([ids])).last_hidden_state

    base = {"steps": 4, "embedded_guidance": 3.5, "negative_prompt": "", "max_pixels": 20000, "max_new_tokens": 110,
            "positions_after_image": "reference", "images": [], "guidance_in_bf16": False}
    fox, sunset = "A red fox under a pine", "Turn the sky into a sunset."
    cases = {
        "e2e_generate": dict(verb="generate", prompt=fox, language="en", height=64, width=64, cfg_scale=3.0, seed=52),
        "e2e_generate_zh": dict(verb="generate", prompt="一只戴草帽的小狗", language="zh", height=48, width=80, cfg_scale=1.0, seed=7),
        "e2e_edit": dict(verb="edit", decoder="editing", prompt=sunset, images=["photo_123x97"], height=64, width=64, cfg_scale=1.0, seed=42),
        "e2e_edit_cfg": dict(verb="edit", decoder="editing", prompt=sunset, images=["photo_61x40"], height=64, width=64, cfg_scale=2.0, seed=43,
                             negative_prompt="blurry, low quality"),
        "e2e_edit_by_generation": dict(verb="edit", decoder="generation", prompt=sunset, images=["photo_123x97"], height=64, width=64,
                                       cfg_scale=3.0, seed=44),
        "e2e_edit_wide": dict(verb="edit", decoder="editing", prompt="给它加上一顶帽子", images=["photo_200x150"], height=48, width=64, cfg_scale=1.0, seed=45),
        "e2e_understand": dict(verb="understand", prompt="What differs?", images=["photo_123x97", "photo_61x40"]),
    }
    for name, options in cases.items():
        o = base | {"decoder": "generation"} | options
        template = nexus_gen.GENERATION_ZH if o.get("language") == "zh" else nexus_gen.GENERATION_EN
        text = {
            "generate": lambda: nexus_gen.generation_prompt(o["prompt"], template),
            "edit": lambda: nexus_gen.editing_prompt(o["prompt"]),
            "understand": lambda: nexus_gen.understanding_prompt(o["prompt"], len(o["images"])),
        }[o["verb"]]()
        pixels, grids = picture_inputs(fixtures, o["images"], o["max_pixels"])
        ids = k.ids(nexus_gen.with_image_tokens(text, grids))
        result = checked(nexus_gen.generate(k.ar, config, ids, pixels, grids, o["max_new_tokens"]), config, o["verb"] != "understand")
        tensors = {"in.input_ids": ids, "out.sequences": result["sequences"]}
        if o["verb"] != "understand":
            latent = (o["height"] // 8, o["width"] // 8)
            noise = torch.randn((1, 16, *latent), generator=torch.Generator("cpu").manual_seed(o["seed"]))
            if o["decoder"] == "generation":
                dit, context, text_ids = k.generation_dit, k.adapter(result["image_embeds"]), torch.zeros(81, 3)
            else:
                patches, grid = images.patches(images.reference(fixtures_data.open_picture(fixtures, o["images"][0])))
                seen = k.ar.visual(torch.from_numpy(patches), torch.tensor([grid])).pooler_output[None]
                context = k.merger(result["image_embeds"], nexus_gen.IMAGE_GRID, seen, grid)
                dit, text_ids = k.editing_dit, nexus_gen.editing_text_ids(*latent, grid)
                tensors |= {"tap.reference_embeds_every_9": seen[:, ::9]}
            branches = [(context, pooled_of(""), text_ids)]
            if o["cfg_scale"] != 1:
                negative = context_of(o["negative_prompt"])
                branches.append((negative, pooled_of(o["negative_prompt"]), torch.zeros(negative.shape[1], 3)))
            x, sigmas = noise, nexus_gen.sigmas(o["steps"])
            for step, sigma in enumerate(sigmas):
                vs = [nexus_gen.velocity(dit, x, float(sigma * 1000), c, p, o["embedded_guidance"], i) for c, p, i in branches]
                v = vs[0] if len(vs) == 1 else vs[1] + o["cfg_scale"] * (vs[0] - vs[1])
                x = nexus_gen.euler(x, v, sigmas, step)
                tensors[f"tap.latents_after_step_{step}"] = x
            picture = nexus_gen.decode(k.ae, x)
            tensors |= {"in.noise": noise, "out.image_embeds": result["image_embeds"], "out.context": context, "out.latents": x}
            o["png"] = f"{name}.png"
            Image.fromarray(nexus_gen.to_uint8(picture).numpy()).save(fixtures.folder / o["png"])
        o["images"] = [f"images/{n}.png" for n in o["images"]]
        fixtures.tensors(name, tensors, None, options=o, text=text, grid_thw=grids, answer=shown(k, result, ids.shape[1]),
                         margin=nexus_gen.smallest_margin(result))


def write(fixtures):
    with torch.no_grad():
        for function in (generation, whole_requests):
            function(fixtures)
            print(" ", function.__name__, flush=True)
