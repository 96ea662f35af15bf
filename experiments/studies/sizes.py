"""One target and drafts of several sizes, for `sizes.toml`: is a better draft worth what it costs?

    python experiments/studies/sizes.py --out runs/sizes
    specdec sweep --config experiments/studies/sizes.toml --store runs/sizes.db

The target is the synthetic 134M one (`specdec.bench.synthetic`), whose layers after the second one write less than
those before; a draft is its first layers with its head. So a larger draft agrees more often and costs more, as in a
family of real models. Prints what each draft reads per token and how often its first choice is the target's: neither
is timed.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from study import table

from specdec.bench.synthetic import make_pair, make_prompts, measure_agreement, piece
from specdec.quant.layers import candidates

LAYERS = (1, 2, 3, 4, 6, 8)
NUM_PROMPTS, PROMPT_TOKENS = 6, 48


def cut(target: Any, num_layers: int) -> Any:
    """The target's first layers, with its embedding, last norm and head; tensors are shared."""
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    with torch.device("meta"):
        draft = type(target)(config)
    weights = target.state_dict()
    draft.load_state_dict({name: weights[name] for name in draft.state_dict()}, assign=True)
    draft.model.rotary_emb = type(draft.model.rotary_emb)(config=config)
    return draft.eval().requires_grad_(False)


def read_per_token(model: Any) -> int:
    """Weights of the linear layers, the head among them: the embedding is looked up, not read."""
    return sum(N * K for N, K in candidates(model).shapes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the models and prompts; 0.9 GB")
    parser.add_argument("--preset", default="134m", help="size of the target (default: 134m)")
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, help="of the drafts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pair = make_pair(args.preset, dtype=torch.bfloat16)
    judged = make_prompts(pair.shape, 8, 32, seed=1)
    full = read_per_token(pair.target)
    lines = []
    for num_layers in (pair.shape.num_layers, *args.layers):
        whole = num_layers == pair.shape.num_layers
        model = pair.target if whole else cut(pair.target, num_layers)
        folder = args.out / ("target" if whole else f"draft-{num_layers}")
        model.save_pretrained(folder)
        pair.tokenizer.save_pretrained(folder)
        agreement, _ = measure_agreement(pair.target, model, judged)
        size = read_per_token(model)
        lines.append([folder.name, num_layers, f"{size / 1e6:.1f}M", f"{size / full:.2f}", f"{agreement:.3f}"])
    texts = make_prompts(pair.shape, NUM_PROMPTS, PROMPT_TOKENS, seed=2)
    (args.out / "prompts.txt").write_text("\n".join("".join(map(piece, text)) for text in texts) + "\n", "utf-8")
    print(table(["model", "layers", "weights read per token", "of the target's", "greedy agreement"], lines))


if __name__ == "__main__":
    main()
