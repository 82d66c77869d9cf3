"""Results of `compare.py` -> a line per stage, the tables of docs/src/performance.md, and its plot."""

import math
import os
import statistics
from html import escape
from pathlib import Path

NO_SUCH_STAGE = 3
MOST_OTHERS = 0.25
# Ours and theirs, whose ratio is of interest.
PAIRS = (
    ("nexus", "torch f32"),
    ("nexus", "torch bf16"),
    ("nexus bf16", "torch f32"),
    ("nexus bf16", "torch bf16"),
    ("nexus", "candle"),
    ("nexus", "nexus, one thread"),
    ("nexus cuda", "torch bf16"),
    ("nexus vulkan", "torch bf16"),
)
PLOTTED = {
    ("nexus", "torch f32"): "#4878a8",
    ("nexus bf16", "torch bf16"): "#d9822b",
    ("nexus cuda", "torch bf16"): "#4878a8",
    ("nexus vulkan", "torch bf16"): "#d9822b",
}
LABELS = {
    "prefill_300": "prefill, 300 tokens",
    "decode_token": "one token after 300",
    "image_block_81": "81 image embeddings, one pass",
    "vision_252": "vision encoder, 252x252",
    "vision_504": "vision encoder, 504x504",
    "dit_step_generation": "diffusion step 512x512, generation",
    "dit_step_editing": "diffusion step 512x512, editing",
    "ae_decode_256": "autoencoder decode, 256x256",
    "ae_decode_512": "autoencoder decode, 512x512",
    "ar_training_step": "training step, language model, 300 tokens",
    "dit_training_step": "training step, transformer, 512x512",
    "llm_layer_300": "released language-model layer, 300 tokens",
    "dit_double_block": "released double block, 1024 + 81 tokens",
    "dit_single_block": "released single block, 1024 + 81 tokens",
    "released_prefill_300": "released language model, 300 tokens",
    "released_decode_token": "released language model, one token",
    "released_image_block_81": "released language model, 81 image embeddings",
    "released_dit_step_1024": "released transformer, step 1024x1024",
    "released_ae_decode_1024": "autoencoder decode, 1024x1024",
}


def undisturbed(lines):
    return [line for line in lines if (line["others"] or 0) < MOST_OTHERS]


def times(lines):
    """Of the processes that others did not disturb, or of all if others disturbed all."""
    return [time for line in undisturbed(lines) or lines for time in line["times"]]


def median(lines, field):
    return statistics.median(line[field] for line in lines)


def ratio(lines, pair, of=statistics.median):
    ours, theirs = pair
    return of(times(lines[ours])) / of(times(lines[theirs]))


def pairs(lines):
    """The pairs of programs that both measured something."""
    return [pair for pair in PAIRS if all(name in lines for name in pair)]


def words(pair):
    ours, theirs = pair
    return f"to {theirs}" if ours == "nexus" else f"{ours} to {theirs}"


def ours_and_rounded(names):
    """Programs whose results are compared with those of PyTorch in f32."""
    return [name for name in names if name.startswith("nexus") and "thread" not in name or name == "torch bf16"]


def duration(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def programs(results):
    """Names of the programs that measured something, in order."""
    return list(dict.fromkeys(name for lines in results["stages"].values() for name in lines))


def summary(stage, lines):
    parts = [f"{name} {duration(statistics.median(times(of)))}" for name, of in lines.items()]
    ratios = [f"{ratio(lines, pair):.2f} {words(pair)}" for pair in pairs(lines)]
    distances = [f"{name} {distance(lines[name])}" for name in ours_and_rounded(lines)]
    return f"{stage}: {', '.join(parts)}; ratio {', '.join(ratios)}; difference {', '.join(distances)}"


def distance(lines):
    known = lines[0]["distance"]
    return "" if known is None else f"{known:.0e}"


def row(cells):
    return "| " + " | ".join(cells) + " |"


def table(head, rows):
    return "\n".join(map(row, [head, ["---"] + ["---:"] * (len(head) - 1), *rows]))


def ratio_cell(lines, pair):
    """Both ratios; bold if they can be trusted."""
    if any(name not in lines for name in pair):
        return ""
    median, fastest = f"{ratio(lines, pair):.2f}", f"({ratio(lines, pair, min):.2f})"
    trusted = all(undisturbed(lines[name]) for name in pair)
    return f"**{median}** {fastest}" if trusted else f"~{median} {fastest}"


def tables(results):
    names = programs(results)
    compared = pairs(names)
    differing = ours_and_rounded(names)

    def of(lines, name, show):
        return show(lines[name]) if name in lines else ""

    def spread(lines):
        return f"{duration(statistics.median(times(lines)))} ({duration(min(times(lines)))})"

    speed = [
        [LABELS.get(stage, stage)]
        + [of(lines, name, spread) for name in names]
        + [ratio_cell(lines, pair) for pair in compared]
        + [of(lines, name, distance) for name in differing]
        for stage, lines in results["stages"].items()
    ]

    def memory(lines):
        if lines[0].get("device_bytes") is not None:
            return f"{median(lines, 'device_bytes') / 2**20:.0f} MiB"
        if lines[0]["peak_bytes"] is None:
            return ""
        return f"{(median(lines, 'peak_bytes') - median(lines, 'start_bytes')) / 2**20:.0f} MiB"

    def loading(lines, pair):
        if not all(name in lines for name in pair):
            return ""
        ours, theirs = (median(lines[name], "load_seconds") for name in pair)
        return f"{ours / theirs:.2f}"

    space = [
        [LABELS.get(stage, stage)]
        + [of(lines, name, memory) for name in names]
        + [of(lines, name, lambda of: duration(median(of, "load_seconds"))) for name in names]
        + [loading(lines, pair) for pair in compared]
        for stage, lines in results["stages"].items()
    ]
    differences = (f"difference, {name}" for name in differing)
    speed_head = ["stage", *names, *(f"ratio {words(pair)}" for pair in compared), *differences]
    space_head = ["stage", *(f"peak, {name}" for name in names), *(f"loading, {name}" for name in names)]
    space_head += [f"loading, ratio {words(pair)}" for pair in compared]
    return f"{table(speed_head, speed)}\n\n{table(space_head, space)}"


def level(results):
    """The GPU, or what the processor can do; the page has a block of tables for each."""
    return results["machine"].split(", ")[-1]


def machine(lines, avx2):
    """The processor in words, and the GPU where PyTorch ran on one."""
    try:
        flags = set(next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line).split())
    except (OSError, StopIteration):
        flags = set()
    names = [("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 with bf16"), ("avx512f", "AVX-512"), ("avx2", "AVX2")]
    found = [name for flag, name in names if flag in flags][:1]
    if avx2 and found != ["AVX2"]:
        found = [f"{found[0]} that programs may not use", "AVX2 alone"]
    gpus = [line["device"] for lines in lines.values() for line in lines if line.get("device")][:1]
    return ", ".join([f"{len(os.sched_getaffinity(0))} cores", *found, *gpus])


def measured(results):
    lines = [line for lines in results["stages"].values() for lines in lines.values() for line in lines]
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(line["commit"] for line in lines))
    torch = next(line["program"] for line in lines if line["program"].startswith("torch"))
    known = [line["others"] for line in lines if line["others"] is not None]
    others = f" Other processes used {statistics.mean(known):.2f} cores on average." if known else ""
    return (
        f"Commit {commits}, {torch}; a machine with {results['machine']}; {results['threads']} threads."
        f"{others}\n\n![Ratios]({picture(results)})\n\n{tables(results)}"
    )


def picture(results):
    return "performance-" + level(results).lower().replace(" ", "-") + ".svg"


def write_docs(docs, results):
    page, what = docs / "performance.md", f"measured: {level(results)}"
    begin, end = f"<!-- {what} -->", f"<!-- /{what} -->"
    text = page.read_text()
    if begin not in text:
        # After the last block of another kind of processor.
        at = text.index("-->", text.rindex("<!-- /measured: ")) + len("-->")
        text = f"{text[:at]}\n\n{begin}\n{end}{text[at:]}"
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n{measured(results)}\n{end}{after}")
    (docs / picture(results)).write_text(plot(results))


def plot(results):
    """Bars of our time divided by PyTorch's, on a logarithmic axis around 1."""
    bars = [
        (stage, [(pair, ratio(lines, pair)) for pair in pairs(lines) if pair in PLOTTED])
        for stage, lines in results["stages"].items()
    ]
    shown = list(dict.fromkeys(pair for _, values in bars for pair, _ in values))
    ratios = [value for _, values in bars for _, value in values]
    low, high = math.log2(min(ratios + [0.5])) - 0.2, math.log2(max(ratios + [2.0])) + 0.5
    left, width, step, top = 280, 480, 36, 50
    height = top + step * len(bars) + 30

    def x(value):
        return left + width * (math.log2(value) - low) / (high - low)

    def text(at_x, at_y, words, anchor="start"):
        return f'<text x="{at_x:.0f}" y="{at_y:.0f}" text-anchor="{anchor}">{escape(words)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} {height}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        text(10, 20, "Time of nexus divided by that of PyTorch; left of 1 is faster"),
    ]
    for index, pair in enumerate(shown):
        at = left + 170 + 130 * index
        parts.append(f'<rect x="{at}" y="10" width="12" height="12" fill="{PLOTTED[pair]}"/>')
        parts.append(text(at + 18, 20, words(pair)))
    for power in range(math.ceil(low), math.floor(high) + 1):
        value, stroke = 2.0**power, "#222" if power == 0 else "#ddd"
        parts.append(f'<path d="M{x(value):.1f} {top - 8}V{height - 24}" stroke="{stroke}"/>')
        parts.append(text(x(value), height - 8, f"{value:g}", "middle"))
    for index, (stage, values) in enumerate(bars):
        y = top + step * index
        parts.append(text(left - 10, y + 18, LABELS.get(stage, stage), "end"))
        for place, (pair, value) in enumerate(values):
            start, end = sorted((x(1), x(value)))
            bar = f'x="{start:.1f}" y="{y + 14 * place}" width="{end - start:.1f}" height="12"'
            parts.append(f'<rect {bar} fill="{PLOTTED[pair]}"/>')
            parts.append(text(end + 4, y + 14 * place + 10, f"{value:.2f}"))
    return "\n".join([*parts, "</svg>"]) + "\n"
