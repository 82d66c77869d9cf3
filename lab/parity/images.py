"""Pictures in, network inputs out, with PIL and numpy only; and the synthetic pictures the fixtures use."""
import hashlib
import math

import numpy as np
from PIL import Image

from sizes import PREPROCESSOR

PATCH, MERGE, FRAMES = 14, 2, 2
CELL = PATCH * MERGE
MEAN = np.array(PREPROCESSOR["image_mean"], np.float32)
STD = np.array(PREPROCESSOR["image_std"], np.float32)


def smart_resize(height, width, min_pixels, max_pixels):
    """(height, width) rounded half-to-even to multiples of 28, then brought into the pixel budget."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError("aspect ratio above 200")
    h, w = (max(CELL, round(side / CELL) * CELL) for side in (height, width))
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h, w = (math.floor(side / beta / CELL) * CELL for side in (height, width))
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * beta / CELL) * CELL for side in (height, width))
    return h, w


def to_rgb(image, on_white=False):
    if on_white and image.mode == "RGBA":
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")


def bounded(image, max_pixels=262640):
    """What the autoregressive model sees."""
    h, w = smart_resize(image.height, image.width, 3136, max_pixels)
    return image.resize((w, h), Image.Resampling.BICUBIC)


def patches(image):
    """RGB picture with sides that are multiples of 28 -> ((gh*gw, 1176) f32, (1, gh, gw)).

    Rows walk the 2x2 cells in raster order and the patches of a cell in raster order; columns are (channel, frame, y, x).
    """
    pixels = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
    pixels = ((pixels - MEAN) / STD).transpose(2, 0, 1)
    gh, gw = pixels.shape[1] // PATCH, pixels.shape[2] // PATCH
    cells = pixels.reshape(3, gh // MERGE, MERGE, PATCH, gw // MERGE, MERGE, PATCH).transpose(1, 4, 2, 5, 0, 3, 6)
    frames = np.repeat(cells[:, :, :, :, :, None], FRAMES, axis=5)
    return np.ascontiguousarray(frames.reshape(gh * gw, -1)), (1, gh, gw)


def reference(image):
    """What the editing decoder sees: 504 x 504, aspect ratio ignored, bilinear."""
    return image.resize((504, 504), Image.Resampling.BILINEAR)


def training_target(image):
    """The answer image of autoregressive training: 252 x 252, bicubic."""
    return image.resize((252, 252), Image.Resampling.BICUBIC)


def covered(image, width, height):
    """The image of decoder training: scaled to cover, bilinear, centre crop."""
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def to_autoencoder(image):
    """RGB picture -> (1, 3, h, w) f32 in [-1, 1]."""
    pixels = np.asarray(image).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(((pixels - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1)[None])


def sha256(array):
    """Of the raw bytes, row by row, little-endian."""
    array = np.ascontiguousarray(array)
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def synthetic(width, height, seed, mode="RGB"):
    """A gradient, a disc, stripes and a little integer noise; no random generator is involved."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    noise = ((x * 73 + y * 151 + x * y * 29 + seed * 211) % 17) - 8
    disc = (x * 2 - width) ** 2 + (y * 2 - height) ** 2 < (min(width, height) * (40 + seed % 30) // 60) ** 2
    stripes = ((x + y * (1 + seed % 3)) // 9) % 2
    bands = [
        40 + x * 170 // width + noise + 30 * stripes,
        220 - y * 160 // height - noise - 60 * disc,
        90 + (x * (seed % 5) + y * 3) % 80 + 70 * disc,
        255 - 200 * stripes * (x * 3 // width) // 2,
    ]
    rgba = np.stack([np.clip(b, 0, 255) for b in bands], -1).astype(np.uint8)
    if mode == "RGBA":
        return Image.fromarray(rgba)
    rgb = Image.fromarray(np.ascontiguousarray(rgba[..., :3]))
    if mode == "P":
        return rgb.quantize(32, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    return rgb.convert(mode)
