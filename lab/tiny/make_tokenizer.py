"""Trains the tokenizer of the small model `nexus-tiny`, in the layout of Qwen2.5-VL.

In: a UTF-8 text file with one caption, question or answer per line.  Out: tokenizer.json and tokenizer_config.json:
NFC, the Qwen2 split, byte-level BPE, then the special tokens of Qwen2.5-VL in its order, with the ids after the BPE's.

    pip install -r requirements.txt
    python make_tokenizer.py captions.txt ../../models/nexus-tiny --vocab-size 768
"""
import argparse
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "parity"))
from tokenizer_files import QWEN_ADDED, QWEN_SPECIAL, QWEN_SPLIT, write_qwen  # noqa: E402

# What the chat template and the prompts add to every conversation, so that it takes few tokens.
TEMPLATE = [
    "system\nYou are a helpful assistant.", "user\n", "assistant\n",
    "Generate an image according to the following description: ", "根据以下描述生成一张图像：",
]
NUM_BYTES = 256


def read_lines(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise SystemExit(f"{path}: there are no lines to learn from")
    return lines


def train(lines, vocab_size):
    """A tokenizer with `vocab_size` byte-level tokens and the special ones after them."""
    if vocab_size < NUM_BYTES:
        raise SystemExit(f"--vocab-size {vocab_size}: the {NUM_BYTES} bytes need a token each")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=1, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    # As often as there are lines: the template is in every conversation.
    tokenizer.train_from_iterator(lines + TEMPLATE * len(lines), trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise SystemExit(f"the text gives {found} tokens only, not {vocab_size}: give more text or a smaller --vocab-size")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in QWEN_ADDED])
    return tokenizer


def check(tokenizer, lines, vocab_size):
    for place, token in enumerate(QWEN_SPECIAL + QWEN_ADDED):
        assert tokenizer.token_to_id(token) == vocab_size + place, token
    for line in lines:
        composed = tokenizer.normalizer.normalize_str(line)
        decoded = tokenizer.decode(tokenizer.encode(line).ids, skip_special_tokens=False)
        assert decoded == composed, f"{line!r} comes back as {decoded!r}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="one caption, question or answer per line")
    parser.add_argument("out", type=Path, help="folder for tokenizer.json and tokenizer_config.json")
    parser.add_argument("--vocab-size", type=int, default=768, help="tokens without the special ones (default: 768)")
    args = parser.parse_args()
    lines = read_lines(args.text)
    tokenizer = train(lines, args.vocab_size)
    check(tokenizer, lines, args.vocab_size)
    write_qwen(tokenizer, args.out)
    num_tokens = sum(len(tokenizer.encode(line).ids) for line in lines)
    num_bytes = sum(len(line.encode()) for line in lines)
    print(f"{args.out}: {tokenizer.get_vocab_size()} tokens; {num_bytes / num_tokens:.2f} bytes of the text per token")


if __name__ == "__main__":
    main()
