"""Where fixtures go and how they are written.

In: named tensors or JSON values.  Out: NAME.safetensors with a JSON string under `meta` in its header, or NAME.json with
a `meta` member.  Every meta holds the versions, the seed of the checkpoint and the command.
"""
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from checkpoint import Checkpoint, write_safetensors


def ramp(seed, *shape):
    """value[i] = (((i * 7919 + seed * 104729) mod 2003) - 1001) / 1001 in f32; trivially the same in any language."""
    index = np.arange(int(np.prod(shape)), dtype=np.int64)
    values = ((index * 7919 + seed * 104729) % 2003 - 1001).astype(np.float32) / np.float32(1001)
    return torch.from_numpy(values.reshape(shape))


class Inputs:
    """Inputs that are not stored: meta says which ramp makes them."""

    def __init__(self, **specs):
        self.specs = {f"in.{name}": {"ramp": seed, "shape": list(shape)} for name, (seed, *shape) in specs.items()}

    def __getattr__(self, name):
        spec = self.specs[f"in.{name}"]
        return ramp(spec["ramp"], *spec["shape"])


class Fixtures:
    def __init__(self, folder, models, command):
        self.folder, self.checkpoint = Path(folder), Checkpoint(models)
        self.folder.mkdir(parents=True, exist_ok=True)
        readme = (Path(models) / "README.md").read_text(encoding="utf-8")
        self.meta = {
            "seed": int(readme.split("--seed ")[1].split("`")[0]),
            "command": command,
            "versions": {name: version(name) for name in ("torch", "transformers", "diffusers", "tokenizers", "pillow", "numpy")},
            "ramp": "(((i * 7919 + seed * 104729) mod 2003) - 1001) / 1001 as f32, row-major",
        }

    def tensors(self, name, tensors, inputs=None, **meta):
        if inputs is not None:
            meta["inputs"] = inputs.specs
        assert all(key.split(".")[0] in ("in", "out", "tap") for key in tensors), list(tensors)
        meta = json.dumps(self.meta | meta, ensure_ascii=False, sort_keys=True)
        write_safetensors(self.folder / f"{name}.safetensors", tensors, {"meta": meta})

    def json(self, name, **members):
        # One line per case keeps the files small and their diffs readable.
        lines = [f'"meta": {json.dumps(self.meta, ensure_ascii=False)}']
        for key, value in members.items():
            if isinstance(value, list):
                rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in value)
                lines.append(f"{json.dumps(key)}: [\n{rows}\n]")
            else:
                lines.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        (self.folder / f"{name}.json").write_text(text, encoding="utf-8")
