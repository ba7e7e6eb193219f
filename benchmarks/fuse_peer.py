"""Merge an adapter the way diffusers' documentation shows; prints the seconds of each part as JSON.

Usage: fuse_peer.py FOLDER ADAPTER OUT
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Load, fuse, unload, save."""
    folder, adapter, out = sys.argv[1:]
    marks = [time.perf_counter()]
    import torch
    from diffusers import StableDiffusionXLPipeline

    marks.append(time.perf_counter())
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    marks.append(time.perf_counter())
    pipe.load_lora_weights(adapter)
    marks.append(time.perf_counter())
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    marks.append(time.perf_counter())
    pipe.save_pretrained(out)
    marks.append(time.perf_counter())
    parts = ("import_s", "from_pretrained_s", "load_lora_weights_s", "fuse_and_unload_s", "save_pretrained_s")
    print(json.dumps({name: round(marks[index + 1] - marks[index], 3) for index, name in enumerate(parts)}))


if __name__ == "__main__":
    main()
