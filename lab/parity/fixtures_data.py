"""Fixtures without weights: tokenizers, prompts, picture preprocessing, random numbers, position ids.

In: the bundled tokenizer files.  Out: tokenizer.json, flux_tokenizers.json, smart_resize.json, preprocess.json with
images/*.png, rng.safetensors, positions.json.
"""
import numpy as np
import torch
from PIL import Image
from transformers import CLIPTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import images
import nexus_gen
from sizes import PREPROCESSOR

TEXTS = [
    "", " ", "Hello world", "  two  spaces   three ", "line one\nline two\r\n\r\n  indented\n\n\n", "\t\ttabs\u00a0nbsp",
    "It's 12345 o'clock, WE'LL see; don'T 'S", "1,234.56% of $7/9 = ?!", "snake_case CamelCase http://a.b/c?d=e&f",
    "一只戴草帽的小狗 sitting 在海边。", "中英mixed文本，１２３！", "日本語とけんち한국어 текст ελληνικά עברית عربى",
    "e\u0301 and caf\u00e9, \u212b \ufb01", "emoji 😀👩\u200d🚀 flags 🇨🇳", "zero\u200bwidth\u2028separator", "\u0000\u0007control",
    "<|im_start|>user\nhi<|im_end|>\n", "a<|vision_start|><|image_pad|><|image_pad|><|vision_end|>b", "x <|im_end|> y",
    '<tool_call>{"x": 1}</tool_call><|fim_prefix|>', "<|im_start |><|unknown|><|image_pad", "<image> Make it <image> red",
]

FLUX_TEXTS = [
    "", " ", "blurry, low quality", "A cute cat's 2 toys, isn't it?  Double  space", "一只戴草帽的小狗", "café NAÏVE 😀 ﬁ ①",
    "word " * 100, "one line\nand\tanother <|endoftext|> tail", "a very long prompt about a house by the sea, " * 40,
]

CONVERSATIONS = [
    [("user", "hi")],
    [("system", "Be brief."), ("user", "hi"), ("assistant", "yo"), ("user", "again")],
    [("user", [{"type": "image"}, {"type": "text", "text": "What is this?"}])],
    [("user", [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}, {"type": "image"}]),
     ("assistant", "Here is the image: ")],
]


def tokenizer(fixtures):
    t = fixtures.checkpoint.tokenizer
    encode = lambda text: t.encode(text, add_special_tokens=False).ids
    decode = lambda ids, skip: t.decode(ids, skip_special_tokens=skip)
    texts = [
        {"text": s, "ids": encode(s), "decoded": decode(encode(s), False), "decoded_without_special": decode(encode(s), True)}
        for s in TEXTS
    ]
    chats = [
        {"messages": [{"role": r, "content": c} for r, c in messages], "add_generation_prompt": generation,
         "text": nexus_gen.chat(messages, generation)}
        for messages in CONVERSATIONS for generation in (True, False)
    ]
    named = {
        "generation_en": ("A cute cat", nexus_gen.generation_prompt("A cute cat"), 0),
        "generation_zh": ("一只戴草帽的小狗", nexus_gen.generation_prompt("一只戴草帽的小狗", nexus_gen.GENERATION_ZH), 0),
        "editing": ("Add a hat.", nexus_gen.editing_prompt("Add a hat."), 1),
        "editing_zh": ("加上一顶帽子", nexus_gen.editing_prompt("加上一顶帽子"), 1),
        "editing_inline": ("Make <image> blue", nexus_gen.editing_prompt("Make <image> blue"), 1),
        "editing_two": ("Put <image> into <image>", nexus_gen.editing_prompt("Put <image> into <image>"), 2),
        "understanding": ("What is this?", nexus_gen.understanding_prompt("What is this?"), 1),
        "understanding_two": ("What differs?", nexus_gen.understanding_prompt("What differs?", 2), 2),
    }
    prompts = []
    for kind, (given, text, count) in named.items():
        grids = [(1, 4, 6), (1, 2, 2)][:count]
        prompts.append({
            "kind": kind, "given": given, "text": text, "grids": grids, "ids": encode(nexus_gen.with_image_tokens(text, grids))})
    # Tokens cut in the middle of a character, as a stream of tokens shows them.
    ids = encode("小狗😀")
    pieces = [{"ids": ids[:n], "decoded": decode(ids[:n], False)} for n in range(1, len(ids) + 1)]
    special = {s: t.token_to_id(s) for s in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
                                            "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")}
    answers = [
        ("Here it is:<|vision_start|><|image_pad|><|image_pad|><|vision_end|> Done.<|im_end|>", "Here it is:<image> Done."),
        ("a<|vision_start|>\n<|vision_end|>b<|vision_start|><|image_pad|><|vision_end|><|im_end|>", "a<image>b<image>"),
        ("no image<|im_end|>", "no image"), ("cut <|vision_start|><|image_pad|>", "cut <|vision_start|><|image_pad|>"),
    ]
    fixtures.json(
        "tokenizer", texts=texts, chats=chats, prompts=prompts, pieces=pieces, special_ids=special,
        answers=[{"raw": raw, "shown": shown} for raw, shown in answers])


def flux_tokenizers(fixtures):
    folder = fixtures.checkpoint.flux
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    # T5TokenizerFast of transformers 5 rebuilds the pipeline and drops the normalizer of tokenizer.json.
    t5 = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer_2" / "tokenizer.json"), pad_token="<pad>", eos_token="</s>")
    rows = []
    for text in FLUX_TEXTS:
        row = {"text": text}
        for key, tok, length in (("clip_77", clip, 77), ("t5_512", t5, 512)):
            row[key] = tok(text, padding="max_length", max_length=length, truncation=True).input_ids
            assert len(row[key]) == length
        rows.append(row)
    fixtures.json("flux_tokenizers", texts=rows)
    return clip, t5


def smart_resize(fixtures):
    rows = []
    for height in (1, 14, 27, 28, 41, 42, 43, 70, 97, 200, 504, 512, 513, 700, 1024, 2000, 4000):
        for width in (28, 45, 98, 123, 300, 512, 640, 1000, 1920, 5000):
            if max(height, width) <= 200 * min(height, width):
                row = {"height": height, "width": width}
                for name, limits in (("bounded", (3136, 262640)), ("small", (3136, 20000)), ("processor", (3136, 12845056))):
                    size = images.smart_resize(height, width, *limits)
                    row[name] = size if min(size) > 0 else None
                rows.append(row)
    refused = [{"height": h, "width": w} for h, w in ((1, 201), (4021, 20), (10, 5000))]
    limits = {"bounded": [3136, 262640], "small": [3136, 20000], "processor": [3136, 12845056]}
    fixtures.json("smart_resize", limits=limits, sizes=rows, refused=refused)


PICTURES = {
    "photo_123x97": (123, 97, 3, "RGB"), "photo_61x40": (61, 40, 5, "RGB"), "photo_200x150": (200, 150, 8, "RGB"),
    "tiny_20x15": (20, 15, 2, "RGB"), "wide_150x31": (150, 31, 9, "RGB"), "alpha_50x70": (50, 70, 4, "RGBA"), "gray_45x33": (45, 33, 6, "L"),
    "palette_64x48": (64, 48, 7, "P"), "gray_alpha_30x44": (30, 44, 1, "LA"),
}


def write_pictures(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, (width, height, seed, mode) in PICTURES.items():
        images.synthetic(width, height, seed, mode).save(folder / f"{name}.png", optimize=True)


def open_picture(fixtures, name, on_white=False):
    return images.to_rgb(Image.open(fixtures.folder / "images" / f"{name}.png"), on_white)


def _rgb(image):
    a = np.asarray(image)
    rows = sorted({0, a.shape[0] // 2, a.shape[0] - 1})
    return {
        "width": image.width, "height": image.height, "sha256": images.sha256(a),
        "rows": [{"row": r, "first_bytes": a[r].reshape(-1)[:48].tolist()} for r in rows],
    }


def _floats(a, length=12):
    flat = a.reshape(-1, a.shape[-1])
    rows = sorted({0, 1, len(flat) // 2, len(flat) - 1})
    return {
        "shape": list(a.shape), "sha256": images.sha256(a), "sum": float(a.astype(np.float64).sum()),
        "rows": [{"row": r, "first": flat[r, :length].tolist(), "last": flat[r, -4:].tolist()} for r in rows],
    }


def preprocess(fixtures):
    library = Qwen2VLImageProcessorPil(
        size={"shortest_edge": PREPROCESSOR["min_pixels"], "longest_edge": PREPROCESSOR["max_pixels"]})
    cases = []
    for name in PICTURES:
        for on_white in (False, True) if name.startswith("alpha") else (False,):
            rgb = open_picture(fixtures, name, on_white)
            case = {"file": f"images/{name}.png", "on_white": on_white, "rgb": _rgb(rgb)}
            for key, picture in (
                ("bounded", images.bounded(rgb)), ("bounded_20000", images.bounded(rgb, 20000)),
                ("reference_504", images.reference(rgb)), ("target_252", images.training_target(rgb)),
            ):
                pixels, grid = images.patches(picture)
                theirs = library(picture, return_tensors="np")
                assert (theirs["image_grid_thw"] == [grid]).all() and np.array_equal(theirs["pixel_values"], pixels), (name, key)
                case[key] = _rgb(picture) | {"grid_thw": grid, "patches": _floats(pixels)}
            for width, height in ((64, 48), (48, 80)):
                crop = images.covered(rgb, width, height)
                case[f"covered_{width}x{height}"] = _rgb(crop) | {"tensor": _floats(images.to_autoencoder(crop))}
            cases.append(case)
    fixtures.json("preprocess", cases=cases)


def rng(fixtures):
    randn = lambda shape, seed, dtype=torch.float32: torch.randn(
        shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype)
    tensors, shas = {}, {}
    for seed in (0, 42, 52, 123456789, 2**32 - 1, 2**32 + 5, 2**63 - 1):
        for length in (1, 5, 15, 16, 17, 37):
            tensors[f"out.seed_{seed}.length_{length}"] = randn((length,), seed)
    for seed in (42, 2**32 + 5):
        tensors[f"out.seed_{seed}.length_1024"] = randn((1024,), seed)
        latents = randn((1, 16, 64, 64), seed)
        flat = latents.flatten()
        tensors |= {f"out.seed_{seed}.latents_{n}": x for n, x in (("first", flat[:32]), ("last", flat[-32:]), ("every_4099", flat[::4099]))}
        shas[f"seed_{seed}.latents"] = images.sha256(latents.numpy())
        for length in (5, 1024):
            tensors[f"out.seed_{seed}.bf16_length_{length}"] = randn((length,), seed, torch.bfloat16)
    fixtures.tensors("rng", tensors, sha256=shas, latents_shape=[1, 16, 64, 64], cpu=torch.backends.cpu.get_cpu_capability())


def positions(fixtures):
    config, model = fixtures.checkpoint.config, fixtures.checkpoint.ar.qwen.model
    start, end, image = (config[k] for k in ("vision_start_token_id", "vision_end_token_id", "image_token_id"))

    def picture(h, w):
        return [start] + [image] * (h * w // 4) + [end]

    cases = {
        "one_token": ([5], []),
        "text": ([5, 6, 7, 8, 9], []),
        "image_first": (picture(4, 6) + [5, 6], [(1, 4, 6)]),
        "image_last": ([5, 6] + picture(6, 4), [(1, 6, 4)]),
        "image_without_end": ([5, 6] + picture(6, 4)[:-1], [(1, 6, 4)]),
        "square": ([5] + picture(18, 18) + [6, 7, 8], [(1, 18, 18)]),
        "one_cell": ([5] + picture(2, 2) + [6], [(1, 2, 2)]),
        "tall": ([5] + picture(16, 2) + [6], [(1, 16, 2)]),
        "wide": ([5] + picture(2, 16) + [6], [(1, 2, 16)]),
        "two_images": ([5] + picture(4, 6) + [6, 7] + picture(8, 2) + [8], [(1, 4, 6), (1, 8, 2)]),
        "two_adjacent": ([5] + picture(4, 4) + picture(2, 6) + [8], [(1, 4, 4), (1, 2, 6)]),
        "three_images": (picture(2, 4) + picture(6, 2) + [9] + picture(10, 10) + [1, 2, 3], [(1, 2, 4), (1, 6, 2), (1, 10, 10)]),
        "ends_with_start": ([5, 6, 7, start], []),
        "start_before_text": ([5, start, 6, 7], []),
        "image_then_start": ([5] + picture(4, 4) + [6, start], [(1, 4, 4)]),
        "start_text_then_image": ([5, start, 6] + picture(2, 4) + [7], [(1, 2, 4)]),
    }
    rows = []
    for name, (ids, grids) in cases.items():
        columns, delta = nexus_gen.position_ids(config, ids, grids)
        token_types = torch.tensor([[int(i == image) for i in ids]], dtype=torch.int32)
        theirs, their_delta = model.get_rope_index(
            torch.tensor([ids]), mm_token_type_ids=token_types, image_grid_thw=torch.tensor(grids) if grids else None)
        assert torch.equal(theirs[:, 0].long(), columns) and int(their_delta) == delta, name
        rows.append({"name": name, "input_ids": ids, "grids": grids, "position_ids": columns.tolist(), "delta": delta})
    padded = []
    for name, side in (("image_first", "right"), ("two_images", "left"), ("text", "right"), ("text", "left")):
        ids, grids = cases[name]
        columns = nexus_gen.position_ids(config, ids, grids)[0].tolist()
        pad = lambda row, value: row + [value] * 3 if side == "right" else [value] * 3 + row
        padded.append({
            "name": f"{name}_{side}", "input_ids": pad(ids, config["pad_token_id"]), "attention_mask": pad([1] * len(ids), 0),
            "grids": grids, "position_ids": [pad(axis, 1) for axis in columns]})
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "pad_token_id")
    fixtures.json("positions", special_ids={n: config[n] for n in names}, cases=rows, padded=padded)


def write(fixtures):
    write_pictures(fixtures.folder / "images")
    for function in (tokenizer, flux_tokenizers, smart_resize, preprocess, rng, positions):
        function(fixtures)
        print(" ", function.__name__, flush=True)
