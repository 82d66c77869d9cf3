"""What no library has: prompts, position ids, the prefilled generation loop, DiT driver with TeaCache, ids, sigmas, tiling.

In: library modules of networks.py with the checkpoint's weights.  Out: the tensors the fixtures hold.
"""
import torch
from transformers import DynamicCache

SYSTEM = "You are a helpful assistant."
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
GENERATION_EN = "Generate an image according to the following description: {}"
GENERATION_ZH = "根据以下描述生成一张图像：{}"
IMAGE_TOKENS, IMAGE_GRID = 81, (1, 18, 18)


# --------------------------------------------------------------------------------------------------- prompts
def chat(messages, add_generation_prompt=True):
    """[(role, text or list of parts)] -> text; a part is {"type": "image"} or {"type": "text", "text": ...}."""
    blocks = [] if messages[0][0] == "system" else [("system", SYSTEM)]
    for role, content in messages:
        if not isinstance(content, str):
            content = "".join(VISION if part["type"] == "image" else part["text"] for part in content)
        blocks.append((role, content))
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in blocks)
    return text + "<|im_start|>assistant\n" * add_generation_prompt


def generation_prompt(description, template=GENERATION_EN):
    return chat([("user", template.format(description))])


def editing_prompt(instruction):
    if "<image>" not in instruction:
        instruction = "<image> " + instruction
    return chat([("user", instruction.replace("<image>", VISION))])


def understanding_prompt(question, num_images=1):
    return chat([("user", [{"type": "image"}] * num_images + [{"type": "text", "text": question}])])


def with_image_tokens(text, grids):
    """Repeats the n-th <|image_pad|> once per merged token of the n-th grid."""
    head, *rest = text.split("<|image_pad|>")
    assert len(rest) == len(grids)
    return head + "".join("<|image_pad|>" * (t * h * w // 4) + tail for (t, h, w), tail in zip(grids, rest))


# ------------------------------------------------------------------------------------------------- positions
def position_ids(config, ids, grids):
    """Token ids of one sequence -> ((3, length), delta)."""
    columns, next_position, index = [], 0, 0
    grids = iter(grids)
    while index < len(ids):
        columns.append([next_position] * 3)
        next_position += 1
        index += 1
        opens = ids[index - 1] == config["vision_start_token_id"]
        if opens and index < len(ids) and ids[index] == config["image_token_id"]:
            t, h, w = next(grids)
            for _ in range(t):
                columns += [
                    [next_position, next_position + row, next_position + column]
                    for row in range(h // 2) for column in range(w // 2)
                ]
            index += t * h * w // 4
            next_position += max(h, w) // 2
    return torch.tensor(columns).T.contiguous(), next_position - len(ids)


# ------------------------------------------------------------------------------------- autoregressive model
def prompt_embeds(model, config, ids, pixels=None, grids=None):
    """(1, length) ids -> (1, length, hidden), image tokens replaced by the vision encoder's output."""
    embeds = model.language_model.embed_tokens(ids)
    if pixels is not None:
        images = model.visual(pixels, torch.tensor(grids)).pooler_output
        where = (ids == config["image_token_id"])[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(where, images)
    return embeds


def hidden_states(model, embeds, positions, cache=None, **options):
    return model.language_model(
        inputs_embeds=embeds, position_ids=positions[:, None], past_key_values=cache, use_cache=cache is not None, **options
    )


@torch.no_grad()
def generate(model, config, ids, pixels=None, grids=(), max_new_tokens=110, eos=None, penalty=1.0, positions="reference"):
    """Greedy decoding of one sequence, one position per step.

    A chosen <|vision_start|> opens an image: its own state gives image embedding 0, then the 81 prefill rows are fed
    and the states of the first 80 of them give embeddings 1..80.  `positions` says where text goes on afterwards:
    "reference" counts sequence indices, "trained" continues after the image block as in training.
    """
    assert positions in ("reference", "trained")
    start, end, image = (config[k] for k in ("vision_start_token_id", "vision_end_token_id", "image_token_id"))
    eos = [config["eos_token_id"], config["bos_token_id"]] if eos is None else eos
    sequence, limit = ids[0].tolist(), ids.shape[1] + max_new_tokens
    fed, delta = position_ids(config, sequence, grids)
    fed_positions, cache = [fed], DynamicCache(config=model.qwen.config)
    embeds, logits_of_chosen, chosen, image_embeds = prompt_embeds(model, config, ids, pixels, grids), [], [], []
    state = hidden_states(model, embeds, fed, cache).last_hidden_state[:, -1]

    def feed(row, position):
        fed_positions.append(position)
        return hidden_states(model, row.reshape(1, 1, -1), position, cache).last_hidden_state[:, -1]

    def choose():
        logits = model.lm_head(state)[0]
        logits[end] = -torch.inf
        seen = torch.tensor(sorted(set(sequence)))
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        logits_of_chosen.append(logits)
        chosen.append(len(sequence))
        return int(logits.argmax())

    while len(sequence) < limit:
        if sequence[-1] == start:
            assert not image_embeds, "a second image is out of reach of the reference"
            image_embeds.append(model.vision_head(state))
            origin = int(fed_positions[-1][0, -1]) + 1
            for k in range(min(IMAGE_TOKENS, limit - len(sequence))):
                sequence.append(image)
                if len(sequence) == limit:
                    break
                cell = torch.tensor([[origin], [origin + k // 9], [origin + k % 9]])
                state = feed(model.image_prefill_embeds.weight[k], cell)
                if k + 1 < IMAGE_TOKENS:
                    image_embeds.append(model.vision_head(state))
            if len(sequence) == limit:
                break
            sequence.append(end)
            if positions == "trained":
                delta += 9 - IMAGE_TOKENS
        else:
            sequence.append(choose())
            if sequence[-1] in eos:
                break
        if len(sequence) < limit:
            token = model.language_model.embed_tokens.weight[sequence[-1]]
            state = feed(token, torch.full((3, 1), len(sequence) - 1 + delta))
    return {
        "sequences": torch.tensor(sequence),
        "positions": torch.cat(fed_positions, 1),
        "image_embeds": torch.stack(image_embeds, 1) if image_embeds else None,
        "text_logits": torch.stack(logits_of_chosen) if chosen else None,
        "chosen": torch.tensor(chosen),
    }


def smallest_margin(result):
    top = result["text_logits"].topk(2).values
    return float((top[:, 0] - top[:, 1]).min())


# -------------------------------------------------------------------------------------------------- diffusion
def patchify(latents):
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpatchify(tokens, height, width):
    batch, _, size = tokens.shape
    cells = tokens.reshape(batch, height // 2, width // 2, size // 4, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, size // 4, height, width)


def _ids(kind, rows, columns):
    row, column = torch.meshgrid(rows.float(), columns.float(), indexing="ij")
    return torch.stack([torch.full_like(row, kind), row, column], -1).reshape(-1, 3)


def image_ids(height, width):
    return _ids(0, torch.arange(height // 2), torch.arange(width // 2))


def editing_text_ids(height, width, reference_grid=(1, 36, 36)):
    """Latent height and width -> positions of the 81 target tokens and of the reference tokens."""
    parts = []
    for kind, grid in ((0, IMAGE_GRID), (1, reference_grid)):
        if grid is not None:
            _, h, w = grid
            parts.append(_ids(kind, torch.arange(h // 2) * (height / h), torch.arange(w // 2) * (width / w)))
    return torch.cat(parts)


class TeaCache:
    """Skips the blocks while the modulated input of block 0 changes little.  One per guidance branch."""

    COEFFICIENTS = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)

    def __init__(self, num_steps, threshold):
        self.num_steps, self.threshold, self.step, self.sum = num_steps, threshold, 0, 0.0
        self.previous = self.residual = None
        self.skipped, self.sums = [], []

    def skips(self, modulated):
        if self.step in (0, self.num_steps - 1):
            self.sum, skip = 0.0, False
        else:
            change = ((modulated - self.previous).abs().mean() / self.previous.abs().mean()).item()
            for power, coefficient in enumerate(reversed(self.COEFFICIENTS)):
                self.sum += coefficient * change**power
            skip = self.sum < self.threshold
        self.sums.append(self.sum)
        if not skip:
            self.sum = 0.0
        self.previous = modulated
        self.step += 1
        self.skipped.append(skip)
        return skip


def velocity(dit, latents, timestep, context, pooled, guidance, text_ids, cache=None, taps=None):
    """One pass of the transformer.  timestep in [0, 1000]; taps, if given, collects every block's output."""
    taps = {} if taps is None else taps
    height, width = latents.shape[-2:]
    # Called directly, because the model's own forward multiplies by 1000 in f32 and would round timestep / 1000.
    conditioning = dit.time_text_embed(torch.tensor([timestep]), torch.tensor([guidance * 1000]), pooled)
    rotary = dit.pos_embed(torch.cat([text_ids, image_ids(height, width)]))
    image, text = dit.x_embedder(patchify(latents)), dit.context_embedder(context)
    taps |= {"conditioning": conditioning, "x_embedder": image, "context_embedder": text}
    entered = image
    if cache is not None and cache.skips(dit.transformer_blocks[0].norm1(image, emb=conditioning)[0]):
        image = image + cache.residual
    else:
        for kind, blocks in (("blocks", dit.transformer_blocks), ("single_blocks", dit.single_transformer_blocks)):
            for n, block in enumerate(blocks):
                text, image = block(
                    hidden_states=image, encoder_hidden_states=text, temb=conditioning, image_rotary_emb=rotary
                )
                taps |= {f"{kind}.{n}.image": image, f"{kind}.{n}.text": text}
        if cache is not None:
            cache.residual = image - entered
    return unpatchify(dit.proj_out(dit.norm_out(image, conditioning)), height, width)


def sigmas(num_steps, strength=1.0):
    """Fixed shift 3, both ends included."""
    low = 0.003 / 1.002
    s = torch.linspace(low + (1 - low) * strength, low, num_steps)
    return 3 * s / (1 + 2 * s)


def euler(sample, v, all_sigmas, step):
    following = all_sigmas[step + 1] if step + 1 < len(all_sigmas) else 0
    return sample + v * (following - all_sigmas[step])


def training_weights(num_steps=1000):
    timesteps = sigmas(num_steps) * 1000
    y = torch.exp(-2 * ((timesteps - num_steps / 2) / num_steps) ** 2)
    y = y - y.min()
    return y * (num_steps / y.sum())


# ------------------------------------------------------------------------------------------------ autoencoder
def encode(ae, image):
    mean = ae.encode(image).latent_dist.mean
    return (mean - ae.config.shift_factor) * ae.config.scaling_factor


def decode(ae, latents):
    return ae.decode(latents / ae.config.scaling_factor + ae.config.shift_factor).sample


def tiled(function, x, tile, stride):
    """Overlapping tiles, weighted by min(1, distance to the tile's border / (stride / 2)) in output pixels."""
    height, width = x.shape[-2:]
    assert min(height, width) >= tile and (height - tile) % stride == 0 and (width - tile) % stride == 0
    total = weight = None
    for top in range(0, height - tile + 1, stride):
        for left in range(0, width - tile + 1, stride):
            out = function(x[..., top:top + tile, left:left + tile])
            scale = out.shape[-1] / tile
            if total is None:
                total = torch.zeros(*out.shape[:2], round(height * scale), round(width * scale))
                weight = torch.zeros_like(total)
                side = torch.arange(out.shape[-1])
                distance = torch.minimum(side + 1, out.shape[-1] - side)
                distance = torch.minimum(distance[:, None], distance[None])
                ramp = (distance / int(stride // 2 * scale)).clamp(max=1)
            y, x_ = round(top * scale), round(left * scale)
            total[..., y:y + len(side), x_:x_ + len(side)] += out * ramp
            weight[..., y:y + len(side), x_:x_ + len(side)] += ramp
    return total / weight


def to_uint8(image):
    """(1, 3, h, w) -> (h, w, 3), truncated."""
    return ((image[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
