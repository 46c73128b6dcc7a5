"""The experts that a trained model chooses, for benchmarks/ffn.py --routing.

    python benchmarks/routing.py MODEL TOKENS FILE [--top-k 6] [--tokens 32768] [--length 512]

MODEL is a folder that `ssd-lit export` or `ssd-lit moefy` wrote, TOKENS the validation.bin or train.bin of its data
(uint16). FILE gets the choices [L, T, K] of all layers for the first tokens, and says how uneven they are.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from ffn import loads
from torch import Tensor

import ssd_lit
from ssd_lit.models.hooks import capture_inputs
from ssd_lit.moe.ffn import ExpertFFN


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens_file", metavar="TOKENS", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    arguments = parser.parse_args()
    model = ssd_lit.load(arguments.model, mode="sparse", top_k=arguments.top_k)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    stream = np.fromfile(arguments.tokens_file, dtype=np.uint16, count=arguments.tokens).astype(np.int64)
    experts, chosen = choices(model, torch.from_numpy(stream).unflatten(0, (-1, arguments.length)))
    torch.save({"experts": experts, "choices": chosen}, arguments.file)
    for layer, load in enumerate(loads(chosen, experts)):
        print(f"layer {layer}: the fullest expert has {load.max():.2f} of an even load, the emptiest {load.min():.2f}")
    return 0


@torch.no_grad()
def choices(model: torch.nn.Module, sequences: Tensor) -> tuple[int, Tensor]:
    """The number of experts, and the chosen ones [L, T, K] of every FFN for sequences [B, S]."""
    ffns = [module for module in model.modules() if isinstance(module, ExpertFFN)]
    device = next(model.parameters()).device
    pieces = []
    with capture_inputs(ffns) as captured:
        for batch in sequences.split(8):
            model(batch.to(device))
            pieces.append(torch.stack([ffn.route(captured[ffn]).experts for ffn in ffns]).to("cpu", torch.int16))
    return ffns[0].experts, torch.cat(pieces, dim=1)


if __name__ == "__main__":
    sys.exit(main())
