"""Sets the stages of nexus beside the same stages in PyTorch, over the same weights, and says how many times as long
ours take.

    python lab/bench/compare.py           # builds, writes weights, measures, prints
    python lab/bench/compare.py --docs    # also rewrites docs/src/performance.md and its plot

Every measurement is a process of its own. The programs take turns, so that all see the same machine, and a process waits
until others leave the processor alone; how much they used is measured too, and a disturbed process is tried again.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy

import report

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "lab/bench"
# What keeps PyTorch's libraries from instructions beyond AVX2.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
LAST_WRITTEN = "released/decoder_config.json"
# Stages that take tens of gigabytes.
RELEASED = "released_"


def machine_clock():
    """Seconds of time used by all of the cores that we may use, and by our finished children; wall time."""
    try:
        cores = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
    except OSError:
        return None
    ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = [list(map(int, core[1:9])) for core in cores if core[0] in ours]
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    # All but idle and waiting.
    used = sum(sum(core[:3]) + sum(core[5:]) for core in ticks) / os.sysconf("SC_CLK_TCK")
    return used, children.ru_utime + children.ru_stime, time.perf_counter()


def cores_of_others(before, after):
    """Cores that other processes used on average, or None where the system does not tell."""
    if before is None or after is None:
        return None
    used, ours, wall = (b - a for a, b in zip(before, after))
    return max(0.0, (used - ours) / wall)


def wait_for_quiet(limit, most):
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        before = machine_clock()
        time.sleep(0.5)
        if (cores_of_others(before, machine_clock()) or 0) < most:
            return


def cargo(*arguments):
    return subprocess.run(["cargo", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def build(devices):
    """Our program, and the folder for what is built."""
    features = [device.split(":")[0] for device in devices if device != "cpu"]
    cargo("build", "--release", "--locked", "--package", "nexus-cli", "--features", ",".join(["bench", "train", *features]))
    target = Path(json.loads(cargo("metadata", "--format-version", "1", "--no-deps"))["target_directory"])
    return target / "release/nexus", target


def programs(arguments, nexus):
    """Name -> command up to the name of the stage, number of threads, and device of ours."""
    threads = arguments.threads
    ours = [str(nexus), "--json", "bench", "run", *(["--avx2"] if arguments.avx2 else [])]
    torch = [sys.executable, str(HERE / "torch_stage.py"), "--threads", str(threads)]
    if arguments.devices == ["cpu"]:
        commands = {
            "nexus": (ours, threads, "cpu"),
            "nexus bf16": ([*ours, "--dtype", "bf16"], threads, "cpu"),
        }
    else:
        torch += ["--device", "cuda"]
        commands = {f"nexus {device}": (ours, threads, device) for device in arguments.devices}
    commands["torch f32"] = ([*torch, "--dtype", "f32"], threads, None)
    commands["torch bf16"] = ([*torch, "--dtype", "bf16"], threads, None)
    if arguments.without_bf16:
        commands = {name: command for name, command in commands.items() if "bf16" not in name}
    if arguments.candle:
        commands["candle"] = ([str(arguments.candle)], threads, None)
    if arguments.one_thread:
        commands["nexus, one thread"] = (ours, 1, "cpu")
    return commands


def measure(arguments, command, threads, device, stage, output):
    """One process: its line, with the cores that others used meanwhile; None if it has no such stage."""
    variables = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    # As .cargo/config.toml has it for what cargo runs.
    environment = os.environ | {name: str(threads) for name in variables} | {"MIMALLOC_PURGE_DELAY": "-1"}
    if arguments.avx2:
        environment |= AVX2
    limits = ["--runs", str(arguments.runs), "--seconds", str(arguments.seconds)]
    command = [*command, stage, "--models", str(arguments.models), "--output", str(output), *limits]
    command += ["--device", device] if device else []
    best = None
    for _ in range(1 + arguments.retries):
        wait_for_quiet(arguments.wait, arguments.most_others)
        before = machine_clock()
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode == report.NO_SUCH_STAGE:
            return None
        if done.returncode != 0:
            sys.exit(f"failed with {done.returncode}: {' '.join(command)}")
        line = json.loads(done.stdout.splitlines()[-1])
        line["others"] = cores_of_others(before, machine_clock())
        line["values"] = numpy.fromfile(output, "<f4")
        if best is None or (line["others"] or 0) < best["others"]:
            best = line
        if (best["others"] or 0) < arguments.most_others:
            break
    return best


def compare(arguments, commands, stage):
    """All rounds of one stage: program -> lines, without the values but with their distance from PyTorch in f32."""
    lines = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            for name, (command, threads, device) in commands.items():
                line = measure(arguments, command, threads, device, stage, Path(folder) / "values")
                if line is not None:
                    lines[name].append(line)
    reference = lines["torch f32"][0]["values"]
    for line in (line for lines in lines.values() for line in lines):
        values = line.pop("values")
        # Models of the released size have random weights of their own.
        same = values.shape == reference.shape and not stage.startswith(RELEASED)
        line["distance"] = float(numpy.abs(values - reference).max() / numpy.abs(reference).max()) if same else None
    return {name: lines for name, lines in lines.items() if lines}


def commit():
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(describe, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help = "names that `nexus bench list` prints; without any all, on a CPU but the models of the released size"
    parser.add_argument("stages", nargs="*", help=help)
    help = "of ours, such as cuda,vulkan; PyTorch is on cuda for all but cpu"
    parser.add_argument("--devices", type=lambda names: names.split(","), default=["cpu"], help=help)
    parser.add_argument("--nexus", type=Path, help="the program nexus, built before; cargo builds it without this")
    parser.add_argument("--commit", help="of that program; git says it without this")
    parser.add_argument("--docs", action="store_true", help="rewrite docs/src/performance.md and its plot")
    parser.add_argument("--models", type=Path, help="folder of the weights; written if it is not there")
    parser.add_argument("--results", type=Path, help="JSON file to add results to, for runs in several goes")
    parser.add_argument("--candle", type=Path, help="program built from lab/bench/candle, to be compared too")
    parser.add_argument("--one-thread", action="store_true", help="compare with ourselves on one thread too")
    parser.add_argument("--without-bf16", action="store_true", help="leave out programs that compute in bf16")
    parser.add_argument("--avx2", action="store_true", help="let no program use instructions beyond AVX2")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3, help="processes per program and stage")
    parser.add_argument("--runs", type=int, default=7, help="most runs in a process, after one to warm up")
    parser.add_argument("--seconds", type=float, default=5, help="no new run in a process after these")
    parser.add_argument("--most-others", type=float, default=report.MOST_OTHERS, help="cores that others may use")
    parser.add_argument("--wait", type=float, default=10, help="seconds to wait for others to stop, at most")
    parser.add_argument("--retries", type=int, default=1, help="how often a disturbed process is tried again")
    parser.add_argument("--report-only", action="store_true", help="measure nothing, report what --results has")
    arguments = parser.parse_args()
    results = {"stages": {}}
    if arguments.results and arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    if not arguments.report_only:
        measured = arguments.commit or commit()
        nexus, target = (arguments.nexus.resolve(), ROOT / "target") if arguments.nexus else build(arguments.devices)
        arguments.models = arguments.models or target / "bench-models"
        if not (arguments.models / LAST_WRITTEN).exists():
            subprocess.run([nexus, "bench", "write", arguments.models], check=True)
        names = subprocess.run([nexus, "bench", "list"], check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        if arguments.devices == ["cpu"]:
            names = [name for name in names if name in arguments.stages or not name.startswith(RELEASED)]
        commands = programs(arguments, nexus)
        for stage in arguments.stages or names:
            lines = compare(arguments, commands, stage)
            for line in (line for of in lines.values() for line in of):
                line["commit"] = measured
            results["stages"][stage] = lines
            print(report.summary(stage, lines), flush=True)
            results |= {"threads": arguments.threads, "machine": report.machine(lines, arguments.avx2)}
            results["stages"] = {name: results["stages"][name] for name in names if name in results["stages"]}
            if arguments.results:
                arguments.results.write_text(json.dumps(results, indent=1))
    print(report.tables(results))
    if arguments.docs:
        report.write_docs(ROOT / "docs/src", results)


if __name__ == "__main__":
    main()
