"""Trains the three tiny tokenizers and writes the files the released checkpoint has.

In: the sentences below.  Out: Nexus-GenV2/tokenizer.json (byte-level BPE in the Qwen2 form), FLUX tokenizer/ (CLIP BPE:
vocab.json, merges.txt) and FLUX tokenizer_2/tokenizer.json (Unigram in the T5 form).
"""
import json
import math
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "You are a helpful assistant.", "system\n", "user\n", "assistant\n",
    "Generate an image according to the following description: ",
    "根据以下描述生成一张图像：", "一只戴草帽的小狗在海边奔跑", "给这张照片加上一道彩虹", "图中有几艘船？", "画面中有什么？",
    "图像如下：", "完成。", "编辑如下：", "这是噪声。", "你好。",
    "Here is the image:", "Here is the edited image:", "Done.", "This is noise.", "Hello from noise.",
    "A red fox under a snowy pine tree at night, oil painting, highly detailed.",
    "Turn the sky into a sunset.", "Remove the car on the left.", "Replace the dog with a cat.", "Make it look like winter.",
    "How many boats are there in the picture?", "What colour is the roof?", "Describe the difference between the two pictures.",
    "blurry, low quality, watermark, text, deformed hands", "The year 2024 wasn't like 1999; it's 3.14 times better!\n\n",
    "    def draw(self, width, height):\n        return self.canvas\n",
]

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]
QWEN_ADDED = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>",
]


def write_json(path, value, indent=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def qwen(num_ordinary):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=num_ordinary, min_frequency=1, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    assert tokenizer.get_vocab_size() == num_ordinary
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in QWEN_ADDED])
    return tokenizer


def write_qwen(tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(t)): {
            "content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": t in QWEN_SPECIAL,
        }
        for t in QWEN_SPECIAL + QWEN_ADDED
    }
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072, "add_bos_token": False,
        "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "unk_token": None, "errors": "replace", "clean_up_tokenization_spaces": False, "split_special_tokens": False,
        "additional_special_tokens": QWEN_SPECIAL[1:], "added_tokens_decoder": added,
    })


def write_clip(folder, num_merges=70):
    """Byte alphabet, the same with `</w>`, merges, start and end: the released order of ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Counter()
    for sentence in SENTENCES:
        for piece, _ in split.pre_tokenize_str(sentence.lower()):
            piece = piece.strip("ĠĊ")
            if piece:
                words[(*piece[:-1], piece[-1] + "</w>")] += 1
    merges = []
    while len(merges) < num_merges:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        joined = Counter()
        for word, count in words.items():
            out, i = [], 0
            while i < len(word):
                step = 2 if word[i:i + 2] == best else 1
                out.append("".join(word[i:i + step]))
                i += step
            joined[tuple(out)] += count
        words = joined
    tokens = alphabet + [a + "</w>" for a in alphabet] + ["".join(m) for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert len(tokens) == len(set(tokens))
    write_json(folder / "vocab.json", {t: i for i, t in enumerate(tokens)}, indent=None)
    lines = ["#version: 0.2"] + [" ".join(m) for m in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "add_prefix_space": False, "do_lower_case": True,
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    })
    return len(tokens)


def write_t5(folder, num_pieces=330):
    """Every character and the most useful n-grams of the words, scored by their frequency."""
    counts = Counter({chr(c): 0 for c in range(33, 127)})
    for sentence in SENTENCES:
        for word in sentence.split():
            word = "▁" + word
            for n in range(1, 7):
                counts.update(word[i:i + n] for i in range(len(word) - n + 1))
    characters = {piece for piece in counts if len(piece) == 1}
    longer = sorted((p for p in counts if len(p) > 1), key=lambda p: (-counts[p] * (len(p) - 1), p))
    pieces = characters | set(longer[:num_pieces - 3 - len(characters)])
    total = sum(counts[p] + 1 for p in pieces)
    scored = [[p, round(math.log((counts[p] + 1) / total), 5)] for p in pieces]
    vocabulary = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0]] + sorted(scored, key=lambda ps: (-ps[1], ps[0]))
    tokenizer = Tokenizer(models.Unigram([tuple(ps) for ps in vocabulary], unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always"),
    ])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0, "eos_token": "</s>",
        "pad_token": "<pad>", "unk_token": "<unk>",
    })
    return len(vocabulary)


def read(path):
    return Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
