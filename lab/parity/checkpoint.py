"""A folder in the released layout <-> f32 library modules.

write(): released tensors and configs in, files out (bf16).  Checkpoint(folder): files in, modules out.
"""
import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import networks
from tokenizer_files import read, write_json


def write_shards(folder, tensors, count=2):
    """model-0000i-of-0000n.safetensors and their index."""
    names, weight_map = list(tensors), {}
    for n in range(count):
        file = f"model-{n + 1:05d}-of-{count:05d}.safetensors"
        part = names[n * len(names) // count:(n + 1) * len(names) // count]
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        weight_map |= {name: file for name in part}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index, indent=0)


def write_safetensors(path, tensors, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"} if metadata is None else metadata)
    path.chmod(0o644)


def write_bin(path, tensors):
    torch.save(OrderedDict((name, t.detach().contiguous().clone()) for name, t in tensors.items()), path)


def _json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def _shards(folder):
    files = sorted(set(_json(folder / "model.safetensors.index.json")["weight_map"].values()))
    return {name: t for file in files for name, t in load_file(folder / file).items()}


def _split(tensors, prefix):
    return ({k: v for k, v in tensors.items() if k.startswith(prefix)}, {k: v for k, v in tensors.items() if not k.startswith(prefix)})


class Checkpoint:
    """Everything a fixture needs, read back from the files that the Rust tests read."""

    def __init__(self, folder):
        nexus, flux = Path(folder) / "Nexus-GenV2", Path(folder) / "FLUX" / "FLUX.1-dev"
        self.folder, self.flux = Path(folder), flux
        self.config, self.dit_config = _json(nexus / "config.json"), _json(nexus / "decoder_config.json")
        self.ae_config = _json(flux / "ae_config.json")
        self.clip_config = _json(flux / "text_encoder" / "config.json")
        self.t5_config = _json(flux / "text_encoder_2" / "config.json")
        self.tokenizer = read(nexus)

        ar = networks.Autoregressive(self.config)
        self.ar = networks.load(ar, networks.autoregressive_names(ar), _shards(nexus))
        hidden, context = self.config["hidden_size"], self.dit_config["context_dim"]
        self.adapter, self.generation_dit = self._decoder(
            nexus / "generation_decoder.bin", networks.Adapter(hidden, context), "adapter.")
        self.merger, self.editing_dit = self._decoder(
            nexus / "edit_decoder.bin", networks.EmbeddingMerger(self.config, context), "embedding_merger.")
        self.ae = networks.load(
            networks.autoencoder(self.ae_config), networks.autoencoder_names(self.ae_config), load_file(flux / "ae.safetensors"))
        clip, t5 = networks.clip(self.clip_config), networks.t5(self.t5_config)
        self.clip = networks.load(clip, networks.clip_names(clip), load_file(flux / "text_encoder" / "model.safetensors"))
        self.t5 = networks.load(t5, networks.same(t5), _shards(flux / "text_encoder_2"))

    def _decoder(self, path, connector, prefix):
        mine, rest = _split(torch.load(path, weights_only=True), prefix)
        connector = networks.load(connector, networks.same(connector, lambda name: prefix + name), mine)
        return connector, networks.load(
            networks.transformer(self.dit_config), networks.transformer_names(self.dit_config), rest)

    def ids(self, text):
        return torch.tensor([self.tokenizer.encode(text, add_special_tokens=False).ids])
