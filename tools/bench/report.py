"""Results of `compare.py` -> a line per stage, the tables of docs/performance.md, and its plot."""

import math
import os
import statistics
from html import escape
from pathlib import Path

NO_SUCH_STAGE = 3
MOST_OTHERS = 0.25
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
REFERENCES = ("torch f32", "torch bf16")
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
}


def undisturbed(lines):
    return [line for line in lines if (line["others"] or 0) < MOST_OTHERS]


def times(lines):
    """Of the processes that others did not disturb, or of all if others disturbed all."""
    return [time for line in undisturbed(lines) or lines for time in line["times"]]


def median(lines, field):
    return statistics.median(line[field] for line in lines)


def ratio(lines, reference, of=statistics.median):
    return of(times(lines["nexus"])) / of(times(lines[reference]))


def duration(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def programs(results):
    """Names of the programs that measured something, in order."""
    return list(dict.fromkeys(name for lines in results["stages"].values() for name in lines))


def summary(stage, lines):
    parts = [f"{name} {duration(statistics.median(times(of)))}" for name, of in lines.items()]
    ratios = [f"{ratio(lines, name):.2f} to {name}" for name in lines if name != "nexus"]
    return f"{stage}: {', '.join(parts)}; ratio {', '.join(ratios)}; difference {lines['nexus'][0]['distance']:.1e}"


def row(cells):
    return "| " + " | ".join(cells) + " |"


def table(head, rows):
    return "\n".join(map(row, [head, ["---"] + ["---:"] * (len(head) - 1), *rows]))


def ratio_cell(lines, name):
    """Both ratios; bold if they can be trusted."""
    median, fastest = f"{ratio(lines, name):.2f}", f"({ratio(lines, name, min):.2f})"
    trusted = undisturbed(lines["nexus"]) and undisturbed(lines[name])
    return f"**{median}** {fastest}" if trusted else f"~{median} {fastest}"


def tables(results):
    names = programs(results)
    others = [name for name in names if name != "nexus"]

    def of(lines, name, show):
        return show(lines[name]) if name in lines else ""

    def spread(lines):
        return f"{duration(statistics.median(times(lines)))} ({duration(min(times(lines)))})"

    speed = [
        [LABELS.get(stage, stage)]
        + [of(lines, name, spread) for name in names]
        + [of(lines, name, lambda _: ratio_cell(lines, name)) for name in others]
        + [f"{lines['nexus'][0]['distance']:.0e}", of(lines, "torch bf16", lambda of: f"{of[0]['distance']:.0e}")]
        for stage, lines in results["stages"].items()
    ]

    def memory(lines):
        if lines[0]["peak_bytes"] is None:
            return ""
        return f"{(median(lines, 'peak_bytes') - median(lines, 'start_bytes')) / 2**20:.0f} MiB"

    space = [
        [LABELS.get(stage, stage)]
        + [of(lines, name, memory) for name in names]
        + [of(lines, name, lambda of: duration(median(of, "load_seconds"))) for name in names]
        for stage, lines in results["stages"].items()
    ]
    speed_head = ["stage", *names, *(f"ratio to {name}" for name in others), "difference, ours", "difference, bf16"]
    space_head = ["stage", *(f"peak, {name}" for name in names), *(f"loading, {name}" for name in names)]
    return f"{table(speed_head, speed)}\n\n{table(space_head, space)}"


def machine():
    """The processor in words."""
    try:
        flags = set(next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line).split())
    except (OSError, StopIteration):
        flags = set()
    names = [("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 with bf16"), ("avx512f", "AVX-512"), ("avx2", "AVX2")]
    found = [name for flag, name in names if flag in flags][: 2 if "amx_bf16" in flags else 1]
    return f"{len(os.sched_getaffinity(0))} cores" + "".join(f", {name}" for name in found)


def measured(results):
    lines = [line for lines in results["stages"].values() for lines in lines.values() for line in lines]
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(line["commit"] for line in lines))
    torch = next(line["program"] for line in lines if line["program"].startswith("torch"))
    known = [line["others"] for line in lines if line["others"] is not None]
    others = f" Other processes used {statistics.mean(known):.2f} cores on average." if known else ""
    return (
        f"Commit {commits}, {torch}; a machine with {results['machine']}; {results['threads']} threads."
        f"{others}\n\n![Ratios](performance.svg)\n\n{tables(results)}"
    )


def write_docs(docs, results):
    page = docs / "performance.md"
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{measured(results)}\n{END}{after}")
    (docs / "performance.svg").write_text(plot(results))


def plot(results):
    """Bars of our time divided by PyTorch's, on a logarithmic axis around 1."""
    colours = {"torch f32": "#4878a8", "torch bf16": "#d9822b"}
    bars = [
        (stage, [(name, ratio(lines, name)) for name in REFERENCES if name in lines])
        for stage, lines in results["stages"].items()
    ]
    ratios = [value for _, pairs in bars for _, value in pairs]
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
    for index, name in enumerate(REFERENCES):
        at = left + 200 + 130 * index
        parts.append(f'<rect x="{at}" y="10" width="12" height="12" fill="{colours[name]}"/>')
        parts.append(text(at + 18, 20, "to " + name))
    for power in range(math.ceil(low), math.floor(high) + 1):
        value, stroke = 2.0**power, "#222" if power == 0 else "#ddd"
        parts.append(f'<path d="M{x(value):.1f} {top - 8}V{height - 24}" stroke="{stroke}"/>')
        parts.append(text(x(value), height - 8, f"{value:g}", "middle"))
    for index, (stage, pairs) in enumerate(bars):
        y = top + step * index
        parts.append(text(left - 10, y + 18, LABELS.get(stage, stage), "end"))
        for place, (name, value) in enumerate(pairs):
            start, end = sorted((x(1), x(value)))
            bar = f'x="{start:.1f}" y="{y + 14 * place}" width="{end - start:.1f}" height="12"'
            parts.append(f'<rect {bar} fill="{colours[name]}"/>')
            parts.append(text(end + 4, y + 14 * place + 10, f"{value:.2f}"))
    return "\n".join([*parts, "</svg>"]) + "\n"
