"""Writes the tiny checkpoint: python make_checkpoint.py --models DIR [--seed N]

Every weight is random.  The language model is then fitted for a minute on a handful of sentence patterns, so that greedy
decoding says a few words, opens an image when asked for one, and stops; everything else stays random.
In: a seed.  Out: DIR/Nexus-GenV2 and DIR/FLUX/FLUX.1-dev, all weights bf16.
"""
import argparse
import hashlib
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F

import images
import networks
import nexus_gen
import sizes
import tokenizer_files as files
from checkpoint import write_bin, write_safetensors, write_shards

THINGS = ["a red fox", "a cat", "a wooden boat", "an old house", "a small robot", "two birds", "a mountain", "a cup of tea"]
PLACES = ["under a pine", "at night", "in the snow", "by the sea", "on a table", "in oil paint", "", "with a blue hat"]
THINGS_ZH = ["一只小狗", "一只猫", "一座雪山", "一艘木船", "一栋老房子", "一杯茶"]
PLACES_ZH = ["在海边", "戴着草帽", "在夜里", "", "，油画", "在桌上"]
EDITS = ["Add {}.", "Remove {}", "Replace the dog with {}.", "Turn it into {} {}", "Make {} {} bigger.", "Change the sky to {}", "Draw {} {}"]
EDITS_ZH = ["加上{}", "去掉{}", "把它换成{}", "给它加上{}。"]
QUESTIONS = ["What is this?", "What colour is {}?", "How many boats are there?", "Where is {} {}?", "Describe the image.", "Is there {}?"]
QUESTIONS_ZH = ["图中有什么？", "这是{}吗？", "图中有几只猫？", "描述这张图。"]
GREETINGS = ["hi", "Hello!", "Who are you?", "What can you do?", "Tell me about {}."]
GREETINGS_ZH = ["你好", "你是谁？", "介绍一下{}。"]
REQUESTS = ["Draw {} {}", "Please draw {}.", "Paint {} {}.", "Show me {} {}"]
REQUESTS_ZH = ["画{}{}", "请画{}。"]


def key_seed(seed, name):
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "big")


def random_tensor(name, shape, seed):
    """Keeps activations near one: norm gains about 1, biases small, matrices 1/sqrt(fan in), embeddings 1."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(key_seed(seed, name)))
    if len(shape) == 1:
        return 0.1 * x + (1 if name.endswith("weight") else 0)
    if "position_embedding" in name or "relative_attention_bias" in name:
        return 0.5 * x
    if any(part in name for part in ("embed_tokens", "prefill_embeds", "token_embedding", "shared.weight")):
        return x
    scale = 1 / math.sqrt(math.prod(shape[1:]))
    if name.endswith("SelfAttention.q.weight"):
        scale *= 0.3  # T5 does not divide by sqrt(d_kv)
    if name.startswith("decoder.conv_out"):
        scale *= 0.4  # most of the picture stays inside the range of a byte
    return scale * x


def random_tensors(shapes, seed):
    return {name: random_tensor(name, shape, seed).bfloat16() for name, shape in shapes.items()}


# ------------------------------------------------------------------------------------- fitting the text model
class Patterns:
    """Draws (prompt text, number of the first picture, words before, words after or None when nothing is drawn)."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def fill(self, templates, *words):
        template = self.random.choice(templates)
        return template.format(*[self.random.choice(w) for w in words][:template.count("{}")]).strip()

    def draw(self, num_pictures):
        pick, zh = self.random.choice, self.random.random() < 0.4
        kind = pick(["generate", "generate", "draw", "edit", "ask", "chat"])
        things, places = (THINGS_ZH, PLACES_ZH) if zh else (THINGS, PLACES)
        after = ("完成。" if zh else " Done.") if kind in ("generate", "draw", "edit") else None
        if kind == "generate":
            description = self.fill(["{}{}"] if zh else ["{} {}"], things, places)
            content = (nexus_gen.GENERATION_ZH if zh else nexus_gen.GENERATION_EN).format(description)
            before = "图像如下：" if zh else "Here is the image:"
        elif kind == "draw":
            content = self.fill(REQUESTS_ZH if zh else REQUESTS, things, places)
            before = "图像如下：" if zh else "Here is the image:"
        elif kind == "edit":
            content = f"{nexus_gen.VISION} {self.fill(EDITS_ZH if zh else EDITS, things, places)}"
            before = "编辑如下：" if zh else "Here is the edited image:"
        elif kind == "ask":
            many = pick([1, 1, 2])
            content = nexus_gen.VISION * many + self.fill(QUESTIONS_ZH if zh else QUESTIONS, things, places)
            before = "这是噪声。" if zh else "This is noise."
        else:
            content = self.fill(GREETINGS_ZH if zh else GREETINGS, things, places)
            before = "你好。" if zh else "Hello from noise."
        messages = [("user", content)]
        picture = self.random.randrange(num_pictures)
        if kind in ("generate", "draw", "chat") and self.random.random() < 0.4:
            past = [("user", pick(GREETINGS)), ("assistant", "Hello from noise.")]
            if self.random.random() < 0.5:
                past = [("user", nexus_gen.VISION + pick(QUESTIONS)), ("assistant", "This is noise.")]
            messages = past + messages
        return nexus_gen.chat(messages), picture, before, after


def example(model, config, tokenizer, pictures, drawn, trained_positions):
    """-> (input embeddings (n, hidden), positions (3, n), targets (n), -100 where nothing is asked for)."""
    text, picture, before, after = drawn
    chosen = [pictures[(picture + n) % len(pictures)] for n in range(text.count("<|image_pad|>"))]
    text = nexus_gen.with_image_tokens(text, [grid for grid, _ in chosen])
    encode = lambda s: tokenizer.encode(s, add_special_tokens=False).ids
    prompt, words = encode(text), encode(before)
    embed = model.language_model.embed_tokens.weight
    rows = embed[torch.tensor(prompt)]
    if chosen:
        where = (torch.tensor(prompt) == config["image_token_id"])[:, None].expand_as(rows)
        rows = rows.masked_scatter(where, torch.cat([embeds for _, embeds in chosen]))
    if after is None:
        answer = words + [config["eos_token_id"]]
        positions, _ = nexus_gen.position_ids(config, prompt + answer, [grid for grid, _ in chosen])
        rows = torch.cat([rows, embed[torch.tensor(answer)]])
        targets = [-100] * len(prompt) + answer
    else:
        start, end = config["vision_start_token_id"], config["vision_end_token_id"]
        tail = encode(after) + [config["eos_token_id"]]
        ids = prompt + words + [start] + [config["image_token_id"]] * 81 + [end] + tail
        grids = [grid for grid, _ in chosen] + [nexus_gen.IMAGE_GRID]
        positions, _ = nexus_gen.position_ids(config, ids, grids)
        if not trained_positions:
            positions[:, -len(tail) - 1:] += 72
        rows = torch.cat([
            rows, embed[torch.tensor(words + [start])], model.image_prefill_embeds.weight, embed[torch.tensor([end] + tail)]])
        targets = [-100] * len(prompt) + words + [start] + [-100] * 82 + tail
    return rows, positions, torch.tensor(targets)


def fit(model, config, tokenizer, seed, steps=500, batch=8):
    """Adam on the language model and lm_head; returns the mean loss of the last steps."""
    pictures = []
    for n, (width, height) in enumerate([(112, 84), (84, 112), (140, 56), (56, 56), (168, 112), (112, 168)]):
        pixels, grid = images.patches(images.synthetic(width, height, seed + n))
        with torch.no_grad():
            pictures.append((grid, model.visual(torch.from_numpy(pixels), torch.tensor([grid])).pooler_output))
    patterns = Patterns(seed)
    weights = [*model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30) * (0.02 + 0.98 * math.cos(step / steps * math.pi / 2))
        drawn = [
            example(model, config, tokenizer, pictures, patterns.draw(len(pictures)), patterns.random.random() < 0.5)
            for _ in range(batch)
        ]
        pad = lambda tensors, value: torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
        embeds, targets = pad([d[0] for d in drawn], 0.0), pad([d[2] for d in drawn], -100)
        positions = pad([d[1].T for d in drawn], 0).permute(2, 0, 1)
        # Padding is on the right and attention is causal, so no mask is needed.
        hidden = model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
        where = targets[:, 1:] != -100
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][where]), targets[:, 1:][where])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"  step {step + 1}: loss {sum(losses[-50:]) / 50:.4f}", flush=True)
    return sum(losses[-50:]) / 50


# --------------------------------------------------------------------------------------------------- the folder
README = """# Random weights

A checkpoint in the layout of Nexus-Gen V2 and FLUX.1-dev, with every network and file but tiny sizes. The weights are
RANDOM: it draws noise. Only the language model was fitted, for a minute on a few sentences, so that it answers in a few
words, opens an image when asked for one, and stops. It is there for tests and for trying the API.

Made by `python lab/parity/make_checkpoint.py --models assets/nexus-random --seed {seed}`.
Licence: the same as the project's.
"""


def make(folder, seed):
    folder = Path(folder)
    nexus, flux = folder / "Nexus-GenV2", folder / "FLUX" / "FLUX.1-dev"
    tokenizer = files.qwen(sizes.NUM_ORDINARY_TOKENS)
    config = sizes.autoregressive(tokenizer.token_to_id("<|endoftext|>"))
    files.write_qwen(tokenizer, nexus)
    clip_config = sizes.clip(files.write_clip(flux / "tokenizer"))
    t5_config = sizes.t5(files.write_t5(flux / "tokenizer_2") + 6)

    model = networks.Autoregressive(config)
    names = networks.autoregressive_names(model)
    networks.load(model, names, random_tensors(networks.released_shapes(model, names), f"{seed}:ar"))
    fit(model, config, tokenizer, seed)
    parameters = dict(model.named_parameters())
    write_shards(nexus, {name: parameters[part].bfloat16() for name, (part,) in names})
    files.write_json(nexus / "config.json", config)
    files.write_json(nexus / "generation_config.json", sizes.generation(config))
    files.write_json(nexus / "preprocessor_config.json", sizes.PREPROCESSOR)

    dit = sizes.TRANSFORMER
    dit_shapes = networks.released_shapes(networks.transformer(dit), networks.transformer_names(dit))
    for file, prefix, connector in (
        ("generation_decoder", "adapter.", networks.Adapter(config["hidden_size"], dit["context_dim"])),
        ("edit_decoder", "embedding_merger.", networks.EmbeddingMerger(config, dit["context_dim"])),
    ):
        shapes = networks.released_shapes(connector, networks.same(connector, lambda name: prefix + name)) | dit_shapes
        write_bin(nexus / f"{file}.bin", random_tensors(shapes, f"{seed}:{file}"))
    files.write_json(nexus / "decoder_config.json", dit)

    ae = sizes.AUTOENCODER
    shapes = networks.released_shapes(networks.autoencoder(ae), networks.autoencoder_names(ae))
    write_safetensors(flux / "ae.safetensors", random_tensors(shapes, f"{seed}:ae"))
    files.write_json(flux / "ae_config.json", ae)
    clip = networks.clip(clip_config)
    shapes = networks.released_shapes(clip, networks.clip_names(clip))
    write_safetensors(flux / "text_encoder" / "model.safetensors", random_tensors(shapes, f"{seed}:clip"))
    files.write_json(flux / "text_encoder" / "config.json", clip_config)
    t5 = networks.t5(t5_config)
    shapes = networks.released_shapes(t5, networks.same(t5))
    write_shards(flux / "text_encoder_2", random_tensors(shapes, f"{seed}:t5"))
    files.write_json(flux / "text_encoder_2" / "config.json", t5_config)
    (folder / "README.md").write_text(README.format(seed=seed), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make(arguments.models, arguments.seed)
