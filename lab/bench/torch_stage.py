"""Times one stage in PyTorch and prints one line of JSON, like `nexus bench run`.

    python lab/bench/torch_stage.py prefill_300 --models DIR --dtype bf16 --threads 2
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import torch_models as models
from torch_models import Weights

PROMPT, DECODED, IMAGE = 300, 16, 81
LATENTS = 64


def ramp(shape, seed):
    """The inputs of all programs: a formula, in -1..1."""
    index = torch.arange(torch.Size(shape).numel())
    return ((((index * 7919 + seed * 104_729) % 2003).float() - 1001.0) / 1001.0).view(shape)


class Stage:
    """Files, and what they are used for: `run` is measured, `prepare` comes before each run and is not."""

    parts = 1

    def __init__(self, folder, dtype):
        self.folder, self.dtype = folder, dtype

    def load(self, name, prefix=""):
        """Tensors of a file in memory of their own, as modules hold them after `load_state_dict`."""
        tensors = load_file(self.folder / name, device=str(torch.get_default_device()))
        return Weights({k: v.to(self.dtype, copy=True) for k, v in tensors.items() if k.startswith(prefix)}, prefix)

    def random(self, name, prefix=""):
        """Weights made on the device, of the names and shapes that a file lists."""
        tensors = {}
        for tensor, shape in self.json(name).items():
            limit = math.sqrt(3 / math.prod(shape[1:]))
            ones = torch.ones if tensor.endswith(".weight") else torch.zeros
            made = torch.empty(shape, dtype=self.dtype).uniform_(-limit, limit) if len(shape) > 1 else ones(shape)
            tensors[tensor] = made.to(self.dtype)
        return Weights(tensors, prefix)

    def json(self, name):
        return json.loads((self.folder / name).read_text())

    def input(self, shape, seed):
        return ramp(shape, seed).to(self.dtype)

    def prepare(self):
        pass


class Text(Stage):
    def __init__(self, folder, dtype, released=False):
        super().__init__(folder, dtype)
        if released:
            self.weights, config = self.random("released/ar.json"), "released/config.json"
        else:
            self.weights, config = self.load("Nexus-GenV2/model-00002-of-00002.safetensors"), "Nexus-GenV2/config.json"
        self.config = models.TextConfig(self.json(config))

    def forward(self, embeds, positions):
        return models.text_model(self.weights, self.config, embeds, positions, self.cache)

    def feed(self, ids, start):
        positions = torch.arange(start, start + len(ids))[:, None].expand(-1, 3)
        hidden = self.forward(F.embedding(ids, self.weights["model.embed_tokens.weight"]), positions)
        return self.weights.linear("lm_head", hidden[-1])

    def prefill(self):
        self.cache = models.Cache(self.config, PROMPT + IMAGE, self.dtype)
        return self.feed(torch.arange(PROMPT) * 97 % 30_000, 0)


class Prefill(Text):
    def run(self):
        return self.prefill()


class Decode(Text):
    parts = DECODED

    def prepare(self):
        self.prefill()

    def run(self):
        for i in range(DECODED):
            scores = self.feed(torch.tensor([1000 + i]), PROMPT + i)
            scores.argmax().item()
        return scores


class ImageBlock(Text):
    def prepare(self):
        self.prefill()

    def run(self):
        place = torch.arange(IMAGE)
        positions = torch.stack((torch.zeros_like(place), place // 9, place % 9), 1) + PROMPT
        return self.weights.linear("vision_head", self.forward(self.weights["image_prefill_embeds.weight"], positions))


class Vision(Stage):
    def __init__(self, folder, dtype, side):
        super().__init__(folder, dtype)
        self.weights = self.load("Nexus-GenV2/model-00001-of-00002.safetensors", "visual.")
        self.config = self.json("Nexus-GenV2/config.json")["vision_config"]
        self.patches = self.input((side * side, 1176), 1)

    def run(self):
        return models.vision_model(self.weights, self.config, self.patches)


def image_positions(side=LATENTS):
    place = torch.arange(side * side // 4)
    return torch.stack((torch.zeros_like(place), place // (side // 2), place % (side // 2)), 1)


class Step(Stage):
    def __init__(self, folder, dtype, text_positions, released=False):
        super().__init__(folder, dtype)
        if released:
            self.weights, config, side = self.random("released/dit.json", "pipe.dit."), "released/decoder_config.json", 2 * LATENTS
        else:
            self.weights = self.load("Nexus-GenV2/generation_decoder.safetensors", "pipe.dit.")
            config, side = "Nexus-GenV2/decoder_config.json", LATENTS
        self.config = self.json(config)
        embeds = self.input((len(text_positions), self.config["context_dim"]), 1)
        self.text = self.weights.linear("context_embedder", embeds)
        positions = torch.cat((text_positions, image_positions(side))).to(dtype)
        self.rotary = models.dit_rotary(self.config["axes_dim"], positions)
        self.pooled, self.latents = self.input((1, 768), 2), self.input((16, side, side), 3)

    def run(self):
        inputs = self.latents, self.text, self.pooled, 1000.0, 2.0, self.rotary
        return self.latents - models.dit_velocity(self.weights, self.config, *inputs)


def editing_positions():
    """Of the tokens of the picture to draw (9x9) and of the reference (18x18), in the scale of the latents."""
    parts = []
    for picture, side in ((0, 9), (1, 18)):
        place, step = torch.arange(side * side), LATENTS / (2 * side)
        parts.append(torch.stack((torch.full_like(place, picture), place // side * step, place % side * step), 1))
    return torch.cat(parts)


class Draw(Stage):
    def __init__(self, folder, dtype, side):
        super().__init__(folder, dtype)
        self.weights = self.load("FLUX/FLUX.1-dev/ae.safetensors", "decoder.")
        self.latents = self.input((1, 16, side, side), 1)

    def run(self):
        return models.autoencoder_decode(self.weights, self.latents)


class Training(Stage):
    """Loss, gradients of all weights, and a step of AdamW; the values are the gradient of one parameter."""

    def train(self, weights, shown):
        self.weights, self.shown = weights, weights[shown]
        parameters = [tensor.requires_grad_() for tensor in weights.tensors.values()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def run(self):
        self.loss().backward()
        gradient = self.shown.grad
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return gradient


class TextTraining(Training):
    def __init__(self, folder, dtype):
        super().__init__(folder, dtype)
        weights = self.load("Nexus-GenV2/model-00002-of-00002.safetensors")
        self.train(weights, "model.layers.0.input_layernorm.weight")
        json = self.json("Nexus-GenV2/config.json")
        self.config, start, end = models.TextConfig(json), json["vision_start_token_id"], json["vision_end_token_id"]
        ids = torch.arange(PROMPT) * 97 % 30_000
        ids[200], ids[282] = start, end
        self.ids = ids
        self.learned = torch.cat((torch.arange(180, 201), torch.arange(282, PROMPT)))
        place = torch.arange(IMAGE)
        image = torch.stack((torch.zeros_like(place), place // 9, place % 9), 1) + 201
        before, after = (torch.arange(*ends)[:, None].expand(-1, 3) for ends in ((0, 201), (210, 228)))
        self.positions = torch.cat((before, image, after))
        self.target = ramp((IMAGE, self.config.hidden), 1)

    def loss(self):
        embeds = F.embedding(self.ids, self.weights["model.embed_tokens.weight"])
        embeds = torch.cat((embeds[:201], self.weights["image_prefill_embeds.weight"], embeds[282:]))
        hidden = models.text_model(self.weights, self.config, embeds, self.positions, None)
        scores = self.weights.linear("lm_head", hidden[self.learned - 1])
        predicted = self.weights.linear("vision_head", hidden[200:281]).float()
        distance = 1 - F.cosine_similarity(predicted, self.target)
        image = (F.mse_loss(predicted, self.target) + distance.mean()) / 2
        return 3 * F.cross_entropy(scores.float(), self.ids[self.learned]) + 3 * image


class DitTraining(Training):
    def __init__(self, folder, dtype):
        super().__init__(folder, dtype)
        self.train(self.load("Nexus-GenV2/generation_decoder.safetensors"), "pipe.dit.x_embedder.bias")
        self.config = self.json("Nexus-GenV2/decoder_config.json")
        positions = torch.cat((torch.zeros(IMAGE, 3), image_positions()))
        self.rotary = models.dit_rotary(self.config["axes_dim"], positions)
        # The width of the language model is that of the condition tokens.
        self.embeds, self.pooled = self.input((IMAGE, self.config["context_dim"]), 1), self.input((1, 768), 2)
        self.latents, self.noise = (self.input((16, LATENTS, LATENTS), seed) for seed in (3, 4))
        self.sigma = 1.0

    def loss(self):
        dit = self.weights.at("pipe.dit")
        text = dit.linear("context_embedder", models.adapter(self.weights.at("adapter"), self.embeds))
        noisy = (1 - self.sigma) * self.latents + self.sigma * self.noise
        inputs = noisy, text, self.pooled, 1000 * self.sigma, 2.0, self.rotary
        velocity = models.dit_velocity(dit, self.config, *inputs)
        return F.mse_loss(velocity.float(), self.noise.float() - self.latents.float())


class LlmLayer(Stage):
    def __init__(self, folder, dtype):
        super().__init__(folder, dtype)
        self.weights = self.load("layers/decoder_layer.safetensors")
        self.config = models.TextConfig(
            {
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "num_hidden_layers": 1,
                "hidden_size": 3584,
                "rope_scaling": {"mrope_section": [16, 24, 24]},
                "rope_theta": 1e6,
            }
        )
        self.rotary = models.text_rotary(self.config, torch.arange(PROMPT)[:, None].expand(-1, 3), dtype)
        self.x = self.input((PROMPT, 3584), 1)

    def run(self):
        return models.decoder_layer(self.weights, self.config, self.x, self.rotary)


class Block(Stage):
    def __init__(self, folder, dtype, file):
        super().__init__(folder, dtype)
        self.weights = self.load(f"layers/{file}.safetensors")
        positions = torch.cat((torch.zeros(IMAGE, 3), image_positions()))
        self.rotary = models.dit_rotary((16, 56, 56), positions)
        self.image, self.text = self.input((LATENTS * LATENTS // 4, 3072), 1), self.input((IMAGE, 3072), 2)
        self.conditioning = self.input((1, 3072), 3)


class DoubleBlock(Block):
    def run(self):
        return models.double_block(self.weights, 24, self.image, self.text, self.conditioning, self.rotary)[0]


class SingleBlock(Block):
    def run(self):
        return models.single_block(self.weights, 24, torch.cat((self.text, self.image)), self.conditioning, self.rotary)


STAGES = {
    "prefill_300": Prefill,
    "decode_token": Decode,
    "image_block_81": ImageBlock,
    "vision_252": lambda *place: Vision(*place, 18),
    "vision_504": lambda *place: Vision(*place, 36),
    "dit_step_generation": lambda *place: Step(*place, torch.zeros(IMAGE, 3)),
    "dit_step_editing": lambda *place: Step(*place, editing_positions()),
    "ae_decode_256": lambda *place: Draw(*place, 32),
    "ae_decode_512": lambda *place: Draw(*place, 64),
    "ar_training_step": TextTraining,
    "dit_training_step": DitTraining,
    "llm_layer_300": LlmLayer,
    "dit_double_block": lambda *place: DoubleBlock(*place, "double_block"),
    "dit_single_block": lambda *place: SingleBlock(*place, "single_block"),
    "released_prefill_300": lambda *place: Prefill(*place, released=True),
    "released_decode_token": lambda *place: Decode(*place, released=True),
    "released_image_block_81": lambda *place: ImageBlock(*place, released=True),
    "released_dit_step_1024": lambda *place: Step(*place, torch.zeros(IMAGE, 3), released=True),
    "released_ae_decode_1024": lambda *place: Draw(*place, 128),
}


def peak_bytes():
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--models", type=Path, required=True, help="folder that `nexus bench write` made")
    parser.add_argument("--dtype", choices=("f32", "bf16"), required=True, help="of weights and activations")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--runs", type=int, default=5, help="most runs")
    parser.add_argument("--seconds", type=float, default=10, help="no new run after this many seconds")
    parser.add_argument("--output", type=Path, help="where to write what the stage computed: little-endian f32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_default_device(arguments.device)
    # What is called f32 is f32.
    torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode(not arguments.stage.endswith("training_step")):
        measure(arguments)


def measure(arguments):
    start_bytes, start = peak_bytes(), time.perf_counter()
    stage = STAGES[arguments.stage](arguments.models, {"f32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype])
    load_seconds = time.perf_counter() - start
    stage.prepare()
    values = stage.run().float().cpu()
    times, begin = [], time.perf_counter()
    while not times or (len(times) < arguments.runs and time.perf_counter() - begin < arguments.seconds):
        stage.prepare()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        # Ours reads what it computed, too.
        stage.run().float().cpu()
        times.append((time.perf_counter() - start) / stage.parts)
    peak = peak_bytes()
    if arguments.output:
        arguments.output.write_bytes(values.detach().contiguous().numpy().astype("<f4").tobytes())
    line = {
        "stage": arguments.stage,
        "program": "torch " + torch.__version__,
        "dtype": arguments.dtype,
        "times": times,
        "median": statistics.median(times),
        "min": min(times),
        "max": max(times),
        "threads": torch.get_num_threads(),
        "load_seconds": load_seconds,
        "start_bytes": start_bytes,
        "peak_bytes": peak,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else None,
        "device_bytes": torch.cuda.max_memory_reserved() if arguments.device == "cuda" else None,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
