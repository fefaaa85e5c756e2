"""Pack a model that was de-quantised from 4 bits into about a third of its bytes, and unpack it.

    python results/pack_base.py pack models/base carry/base 2     writes carry/base.0, carry/base.1
    python results/pack_base.py unpack models/base carry/base.0 carry/base.1

The unpacked folder has the same files; every weight is equal bit for bit (a checksum is compared).
SmolLM2-135M-Instruct from 4 bits: 273 MB -> 87.4 MB. The codes alone have 75 MB of entropy.
A matrix that was quantised by rows of 32 weights (GGUF's Q4_1: w = d q + m with q of 4 bits; Q8_0:
w = d q with q of 8) becomes d, m and q again; d and m, two float16, are those that give the same
bfloat16 weights. What fits neither is kept as it is. xz compresses each kind by itself.
"""
import hashlib
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

BLOCK, ROWS = 32, 2 ** 16  # weights with one d and m; blocks that are packed at once
WEIGHTS = "model.safetensors"
# literals without context: quantised weights are independent of their neighbours
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0, "dict_size": 2 ** 26}]


# ---- blocks (n, 32) of float32 numbers that are bfloat16 <-> codes and scales

def rebuild(kind, codes, d, m):
    """Return the weights of codes (n, 32) with float16 d and m (n,), as GGUF's readers do."""
    weights = d.float()[:, None] * codes.float()
    if kind == "q4":
        weights = weights + m.float()[:, None]
    return weights.bfloat16()


def float16_near(x, steps):
    """Return the float16 numbers that are `steps` numbers away from x."""
    return (x.half().view(torch.int16) + steps).view(torch.float16)


def fits(kind, blocks, codes, d, m):
    """Return which blocks (n,) the codes and scales give exactly, signs of zeros included."""
    bits = rebuild(kind, codes, d, m).view(torch.int16)
    return (bits == blocks.bfloat16().view(torch.int16)).all(1)


def pack_q4(blocks):
    """Return (codes, d, m) of blocks, or None if one of them is not d q + m with q from 0 to 15.

    The least weight has q = 0 and the largest 15. m has up to nine candidates, those that round to
    the least weight; for each, the weights' rounding intervals bound d from below and above.
    """
    least, most = blocks.amin(1), blocks.amax(1)
    step = ((most - least) / 15).clamp_min(1e-30)
    codes = ((blocks - least[:, None]) / step[:, None]).round().clamp(0, 15)
    # half of bfloat16's spacing at each weight
    half = torch.ldexp(blocks.sign().abs(), torch.frexp(blocks).exponent - 9)
    d, m = torch.zeros(2, len(blocks), dtype=torch.float16)
    missing = torch.ones(len(blocks), dtype=torch.bool)
    for steps in (0, 4, -4, 2, -2, 1, -1, 3, -3):
        m_try = float16_near(least, steps)
        offset = blocks - m_try.float()[:, None]
        low = torch.where(codes > 0, (offset - half) / codes, -torch.inf).amax(1)
        high = torch.where(codes > 0, (offset + half) / codes, torch.inf).amin(1)
        middle = ((low + high) / 2).nan_to_num(0, 0, 0)
        for near in (0, 1, -1):
            d_try = float16_near(middle, near)
            found = missing & fits("q4", blocks, codes, d_try, m_try)
            d[found], m[found], missing = d_try[found], m_try[found], missing & ~found
    return None if missing.any() else (codes.to(torch.uint8), d, m)


def pack_q8(blocks):
    """Return (codes, d, None) of blocks, or None if one of them is not d q with q up to 127."""
    scale = blocks.abs().amax(1) / 127
    d, codes = torch.zeros(len(blocks), dtype=torch.float16), torch.zeros_like(blocks)
    missing = torch.ones(len(blocks), dtype=torch.bool)
    for steps in sorted(range(-9, 10), key=abs):
        d_try = float16_near(scale, steps)
        codes_try = (blocks / d_try.float()[:, None]).nan_to_num(0, 0, 0).round().clamp(-127, 127)
        found = missing & fits("q8", blocks, codes_try, d_try, None)
        d[found], codes[found], missing = d_try[found], codes_try[found], missing & ~found
    return None if missing.any() else (codes.to(torch.int8), d, None)


def pack_tensor(weight):
    """Return (kind, streams) of a weight: {stream: bytes}."""
    blocks = weight.float().reshape(-1, BLOCK) if weight.ndim == 2 else None
    for kind, pack in (("q4", pack_q4), ("q8", pack_q8)) if blocks is not None else ():
        parts = []
        for rows in blocks.split(ROWS):
            parts.append(pack(rows))
            if parts[-1] is None:
                break
        if parts[-1] is None:
            continue
        codes, d, m = ([part[i] for part in parts] for i in range(3))
        codes, d = torch.cat(codes).numpy(), torch.cat(d).numpy()
        if kind == "q4":
            codes = codes.reshape(-1, 2)
            codes = codes[:, 0] | codes[:, 1] << 4
        streams = {f"{kind}.codes": codes.tobytes(), **in_halves(f"{kind}.d", d)}
        return kind, streams | (in_halves("q4.m", torch.cat(m).numpy()) if kind == "q4" else {})
    return "raw", {"raw": weight.contiguous().view(torch.int16).numpy().tobytes()}


def in_halves(name, numbers):
    """Return the low bytes and the high bytes of float16 numbers, which compress better apart."""
    both = numbers.view(np.uint8).reshape(-1, 2)
    return {f"{name}.low": both[:, 0].tobytes(), f"{name}.high": both[:, 1].tobytes()}


# ---- a folder <-> parts

def checksum(weights):
    """Return a checksum of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def pack(folder, target, count):
    """Write the files of a folder as `count` parts of equal size, TARGET.0 and so on."""
    weights = load_file(folder / WEIGHTS)
    if wrong := [name for name, w in weights.items() if w.dtype != torch.bfloat16]:
        raise SystemExit(f"only bfloat16 weights can be packed, {wrong[0]} is another type")
    tensors, streams = [], {}
    for name, weight in weights.items():
        kind, parts = pack_tensor(weight)
        tensors.append([name, list(weight.shape), kind])
        for stream, content in parts.items():
            streams.setdefault(stream, []).append(content)
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != WEIGHTS:
            streams[f"file {file.name}"] = [file.read_bytes()]
    sizes, compressed = [], []
    for name, parts in streams.items():
        filters = None if name.startswith("file") else XZ
        compressed.append(lzma.compress(b"".join(parts), lzma.FORMAT_XZ, filters=filters))
        sizes.append([name, len(compressed[-1])])
        print(f"{name}: {sum(map(len, parts)):,} -> {len(compressed[-1]):,} bytes", flush=True)
    header = {"tensors": tensors, "streams": sizes, "checksum": checksum(weights)}
    whole = json.dumps(header).encode() + b"\n" + b"".join(compressed)
    target.parent.mkdir(parents=True, exist_ok=True)
    size = -(-len(whole) // count)
    for i in range(count):
        Path(f"{target}.{i}").write_bytes(whole[i * size:(i + 1) * size])
    kinds = [kind for *_, kind in tensors]
    print(f"{len(whole):,} bytes in {count} parts of {size:,}; tensors: "
          + ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("q4", "q8", "raw")))


def unpack(folder, parts):
    """Write the folder again from all its parts, in order."""
    line, _, content = b"".join(part.read_bytes() for part in parts).partition(b"\n")
    header, streams, start = json.loads(line), {}, 0
    for name, size in header["streams"]:
        streams[name] = np.frombuffer(lzma.decompress(content[start:start + size]), np.uint8)
        start += size
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in streams.items():
        if name.startswith("file "):
            (folder / name.removeprefix("file ")).write_bytes(value.tobytes())
    used, weights = dict.fromkeys(streams, 0), {}

    def take(stream, count):
        used[stream] += count
        return streams[stream][used[stream] - count:used[stream]]

    def take_scales(name, count):
        both = np.stack((take(f"{name}.low", count), take(f"{name}.high", count)), 1)
        return torch.from_numpy(both.reshape(-1).view(np.float16))

    for name, shape, kind in header["tensors"]:
        count = int(np.prod(shape))
        if kind == "raw":
            weights[name] = torch.from_numpy(take("raw", 2 * count).copy()).view(torch.bfloat16)
        else:
            codes = take(f"{kind}.codes", count // 2 if kind == "q4" else count)
            codes = np.stack((codes & 15, codes >> 4), 1) if kind == "q4" else codes.view(np.int8)
            codes = torch.from_numpy(codes.reshape(-1, BLOCK).copy())
            d = take_scales(f"{kind}.d", len(codes))
            m = take_scales("q4.m", len(codes)) if kind == "q4" else None
            weights[name] = rebuild(kind, codes, d, m)
        weights[name] = weights[name].reshape(shape)
    if checksum(weights) != header["checksum"]:
        raise SystemExit("the weights differ from those that were packed: is a part damaged?")
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    print(f"{folder}: {len(weights)} tensors, checksum as packed")


def main(arguments):
    match arguments:
        case ["pack", folder, target, count]:
            pack(Path(folder), Path(target), int(count))
        case ["unpack", folder, first, *more]:
            unpack(Path(folder), [Path(part) for part in (first, *more)])
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
