"""The INT8 case of the AWS tutorial: how much smaller, and where, by how much of a margin, a greedy text is left.

    python experiments/studies/int8.py

The tutorial stores a 7B model's attention and MLP in int8, one scale for each output: 13.3 GB become 7.3 (1.81 times
less), a run of 3.19 s takes 2.09 (1.53 times as fast), and at top-k 1 the text departs a little "where logits are
ambiguous". Here: bytes of three shapes by the same arithmetic; the embedded target's greedy texts, at each position the
margin between full precision's two best tokens, and whether int8 chooses another one. Up to the first such position
both models read the same tokens, so that it is where their texts part. Products with int8 weights here round their
inputs to int8 too, row by row. Speeds are measured by
`experiments/quantised/grid.py`. Lossless: no, weights are rounded.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import study
import torch
from torch import Tensor

from specdec.bench.synthetic import PRESETS
from specdec.exact import margins
from specdec.quant.layers import candidates
from specdec.quant.methods import prepare_model
from specdec.quant.methods.walk import unpacked
from specdec.quant.recipe import Recipe
from specdec.sampling import Sampling
from specdec.train import provenance

RECIPES = {"all linear layers": "int8", "attention and MLP": {"default": "int8", "head": None}}
BINS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, float("inf"))


@dataclass(frozen=True)
class Position:
    """Before one new token: full precision's margin, the largest change of a logit, and whether the choice changed."""

    margin: float
    change: float
    differs: bool


def llama_7b() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(tie_word_embeddings=False)  # the defaults are the first 7B's sizes


def sizes(name: str, config: Any, recipe: Any) -> dict[str, Any]:
    """Bytes in bfloat16 and by the recipe, from shapes alone."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = candidates(model)
    formats = Recipe.of(recipe).assign(layers)
    before = 2 * sum({id(p): p.numel() for p in model.parameters()}.values())
    stored = sum(format.num_bytes(*layers.shapes[layer]) for layer, format in formats.items())
    # A head that shares the embedding's weights is stored apart; the embedding stays.
    replaced = sum(
        2 * layers.shapes[layer][0] * layers.shapes[layer][1]
        for layer in formats
        if not (layers.tied and layer == layers.head)
    )
    after = before - replaced + stored
    return {"model": name, "before": before, "after": after, "ratio": before / after}


@torch.inference_mode()
def judge(full: Any, rounded: Any, prompt: Sequence[int], text: Sequence[int]) -> list[Position]:
    row = torch.tensor([[*prompt, *text]])
    behind = slice(len(prompt) - 1, -1)
    p_TV, q_TV = (model(input_ids=row).logits[0, behind].double() for model in (full, rounded))
    margin_T = margins(p_TV, Sampling(), range(len(p_TV)))
    change_T = (p_TV - q_TV).abs().amax(-1)
    differs_T: Tensor = q_TV.argmax(-1) != p_TV.argmax(-1)
    rows = zip(margin_T.tolist(), change_T.tolist(), differs_T.tolist(), strict=True)
    return [Position(*row) for row in rows]


def texts_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each prompt: where its text is left, the margin there, and all its positions."""
    target, _, tokenizer = study.embedded()
    decoder = study.decoder(target, tokenizer, None, None)
    packed = prepare_model(target, "int8")
    chosen = study.prompts(args.limit)
    made = study.texts(decoder.generate_plain, [p.text for p in chosen], max_new_tokens=args.max_new_tokens)
    found = []
    with unpacked(packed, torch.float32):
        for prompt, text in zip(chosen, made, strict=True):
            positions = judge(target, packed, text.prompt, text.tokens)
            first = next((i for i, position in enumerate(positions) if position.differs), None)
            found.append({"id": prompt.id, "tokens": len(text.tokens), "first": first, "positions": positions})
    return found


def by_margin(positions: Sequence[Position]) -> list[dict[str, Any]]:
    """How many positions have such a margin, and at how many of them int8 chooses another token."""
    found = []
    for low, high in itertools.pairwise(BINS):
        inside = [p for p in positions if low <= p.margin < high]
        found.append(
            {
                "from": low,
                "to": high if high < BINS[-1] else None,
                "positions": len(inside),
                "differ": sum(p.differs for p in inside),
            }
        )
    return found


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    positions = [position for text in found for position in text["positions"]]
    firsts = [text["positions"][text["first"]] for text in found if text["first"] is not None]
    ordered = sorted(p.margin for p in positions)
    return {
        "texts": len(found),
        "identical": sum(text["first"] is None for text in found),
        "positions": len(positions),
        "differ": sum(p.differs for p in positions),
        "margin_quantiles": {f"{q:g}": ordered[int(q * (len(ordered) - 1))] for q in (0.01, 0.05, 0.1, 0.25, 0.5, 0.9)},
        "largest_change_median": statistics.median(p.change for p in positions),
        "largest_change_max": max(p.change for p in positions),
        "first_margins": [p.margin for p in firsts],
        "by_margin": by_margin(positions),
    }


def page(shapes: list[dict[str, Any]], found: list[dict[str, Any]], told: dict[str, Any]) -> str:
    size_rows = [
        [s["model"], s["recipe"], f"{s['before'] / 1e6:,.1f}", f"{s['after'] / 1e6:,.1f}", f"{s['ratio']:.2f}×"]
        for s in shapes
    ]
    ordered = sorted(position.margin for text in found for position in text["positions"])
    text_rows = []
    for text in found:
        at = text["positions"][text["first"]] if text["first"] is not None else None
        rank = sum(value <= at.margin for value in ordered) / len(ordered) if at else 0.0
        told_at = [text["first"], f"{at.margin:.3f}", f"{rank:.1%}", f"{at.change:.3f}"] if at else ["–"] * 4
        text_rows.append([text["id"], text["tokens"], *told_at])
    bins = []
    for row in told["by_margin"]:
        span = f"{row['from']:g} to {row['to']:g}" if row["to"] else f"above {row['from']:g}"
        share = f"{row['differ'] / row['positions']:.1%}" if row["positions"] else "–"
        bins.append([span, row["positions"], row["differ"], share])
    quantiles = ", ".join(f"{float(q):.0%}: {value:.3f}" for q, value in told["margin_quantiles"].items())
    size_table = study.table(["model", "stored in int8", "bfloat16, MB", "int8, MB", "smaller by"], size_rows)
    header = ["prompt", "tokens", "first divergence", "margin there", "positions as close", "largest change of a logit"]
    return (
        f"## Bytes\n\n{size_table}\n## First divergence\n\n{study.table(header, text_rows)}\n"
        f"{told['identical']} of {told['texts']} texts are the same; {told['differ']} of {told['positions']} positions "
        f"differ. The largest change of a logit is {told['largest_change_median']:.3f} in the median, "
        f"{told['largest_change_max']:.3f} at most.\n\n"
        f"## Margins\n\nQuantiles over all positions: {quantiles}.\n\n"
        f"{study.table(['margin in logits', 'positions', 'int8 differs', 'share'], bins)}"
    )


def main() -> None:
    args = study.arguments(__doc__, tokens=128)
    target, *_ = study.embedded()
    configs = {
        "embedded target": target.config,
        "synthetic 134M": PRESETS["134m"].config(PRESETS["134m"].num_layers),
        "Llama 7B": llama_7b(),
    }
    shapes = [
        {"recipe": what, **sizes(name, config, recipe)}
        for name, config in configs.items()
        for what, recipe in RECIPES.items()
    ]
    found = texts_of(args)
    told = summary(found)
    kept = [{key: value for key, value in text.items() if key != "positions"} for text in found]
    content = {"versions": provenance.versions(), "shapes": shapes, "texts": kept, "summary": told}
    study.publish(args, "int8", "Weights in int8", page(shapes, found, told))
    provenance.write_json(args.out / "int8.json", content)


if __name__ == "__main__":
    main()
