"""Target and draft with weights in fewer bits, or pruned, one at a time and both: who loses acceptance?

    python experiments/studies/weights.py quantised     five formats, rounded to the nearest
    python experiments/studies/weights.py pruned        half, and four fifths of the weights dropped; two ways to choose

For each way, each of target, draft and both is changed. Four drafted tokens a round, greedy and at temperature 1 under
the shared noise, where a changed draft leaves the text as it was and a changed target writes its own. Another text may
be easier to draft, so `overlap` judges all pairs along the same texts, those of the full target: at temperature 1 the
mean of sum min(p, q) over positions (the chance that the ratio rule accepts), greedily how often the first choices
agree. Stored weights are unpacked to float32 first: the same numbers, faster here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import study
import torch
from torch import nn

from specdec.generation import Generation
from specdec.policy import Fixed
from specdec.quant.linear import PackedLinear
from specdec.quant.methods import calibration, prepare_model
from specdec.quant.pruning import magnitude, wanda
from specdec.runtime.copies import with_layers

K, TEMPERATURES = 4, (0.0, 1.0)
FULL, ROLES = "full", ("target", "draft", "both")
CALIBRATION_ROWS, LENGTH = 32, 256
FORMATS = ("int8", "mxfp8_e4m3", "mxfp6_e2m3", "int4", "mxfp4")
PRUNED = (("magnitude", 0.5), ("wanda", 0.5), ("magnitude", 0.8), ("wanda", 0.8))
TITLES = {"quantised": "Quantised target, draft, or both", "pruned": "Pruned target, draft, or both"}


@dataclass(frozen=True)
class Way:
    """How weights are changed: `format` rounds them; else `share` of them are dropped, as `method` chooses."""

    format: str | None = None
    method: str = ""
    share: float = 0.0

    @property
    def name(self) -> str:
        return self.format or f"{self.share:.0%} {self.method}"

    def of(self, model: Any, tokens_BT: torch.Tensor) -> Any:
        if self.format is not None:
            return dense(prepare_model(model, self.format))  # by rounding to the nearest
        if self.method == "wanda":
            return wanda(model, tokens_BT, self.share)
        return magnitude(model, self.share)


def ways(kind: str) -> list[Way]:
    if kind == "quantised":
        return [Way(format) for format in FORMATS]
    return [Way(method=method, share=share) for method, share in PRUNED]


def dense(model: Any) -> Any:
    """The same weights in ordinary float32 layers; layers that round their inputs too (int8) stay as they are."""

    def make(name: str, layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, PackedLinear) or layer.format.rounds_rows:
            return None
        made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        made.weight = nn.Parameter(layer.weight_in(torch.float32), requires_grad=False)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.float(), requires_grad=False)
        return made

    twin = with_layers(model, make)
    # Compiled steps go by the configuration, which still says that the head is the embedding.
    twin.config.tie_word_embeddings = False
    return twin


@torch.inference_mode()
def overlap(target: Any, draft: Any, texts: Sequence[Generation], greedy: bool) -> list[tuple[float, int]]:
    """Along each text, before each new token: sum min(p, q) at temperature 1, or whether the first choices agree.

    The sum over the text, and the number of its tokens.
    """
    pairs = []
    for text in texts:
        row = torch.tensor([text.prompt + text.tokens])
        behind = slice(len(text.prompt) - 1, -1)
        p_TV, q_TV = (model(input_ids=row).logits[0, behind].float() for model in (target, draft))
        same_T = (
            (p_TV.argmax(-1) == q_TV.argmax(-1)).double()
            if greedy
            else torch.minimum(p_TV.softmax(-1), q_TV.softmax(-1)).double().sum(-1)
        )
        pairs.append((float(same_T.sum()), len(same_T)))
    return pairs


def measure(
    pair: tuple[Any, Any, Any], reference: Mapping[float, list[Generation]], args: argparse.Namespace
) -> dict[str, Any]:
    """Acceptance at each temperature, how far the text follows the full target's, and the overlap along that."""
    target, draft, tokenizer = pair
    decoder = study.decoder(target, tokenizer, draft, Fixed(K))
    inputs = [prompt.text for prompt in study.prompts(args.limit)]
    found = {}
    for temperature in TEMPERATURES:
        options = {"max_new_tokens": args.max_new_tokens, "temperature": temperature}
        made = study.texts(decoder.generate, inputs, **options)
        found[f"{temperature:g}"] = {
            **study.acceptance(made),
            **study.agreement(made, reference[temperature]),
            "overlap": overlap(target, draft, reference[temperature], temperature == 0),
        }
    return found


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    kept = study.Rows(args, args.kind)
    names = [FULL, *(f"{way.name}: {role}" for way in ways(args.kind) for role in ROLES)]
    if all(name in kept.found for name in names):
        return [kept.found[name] for name in names]
    target, draft, tokenizer = study.embedded()
    plain = study.decoder(target, tokenizer, draft, Fixed(K))
    inputs = [prompt.text for prompt in study.prompts(args.limit)]
    reference = {
        temperature: study.texts(
            plain.generate_plain, inputs, max_new_tokens=args.max_new_tokens, temperature=temperature
        )
        for temperature in TEMPERATURES
    }
    tokens_BT = calibration.tokens(calibration.STDLIB, target, tokenizer, rows=CALIBRATION_ROWS, length=LENGTH)
    full = {"target": target, "draft": draft}

    def row(name: str, role: str, changed: Mapping[str, Any]) -> dict[str, Any]:
        pair = [changed[part] if role in (part, "both") else full[part] for part in full]
        return {"weights": name, "changed": role, **measure((*pair, tokenizer), reference, args)}

    found = [kept.get(FULL, row, FULL, "–", full)]
    for way in ways(args.kind):
        mine = {role: f"{way.name}: {role}" for role in ROLES}
        missing = any(name not in kept.found for name in mine.values())
        changed = {part: way.of(model, tokens_BT) for part, model in full.items()} if missing else {}
        for role, name in mine.items():
            found.append(kept.get(name, row, way.name, role, changed))
    return found


def page(found: list[dict[str, Any]]) -> str:
    header = [
        "weights",
        "changed",
        "tokens per round",
        "the full target's text",
        "overlap along that text",
        "its change",
    ]
    parts = []
    for temperature in TEMPERATURES:
        lines = []
        for row in found:
            cell, full = row[f"{temperature:g}"], found[0][f"{temperature:g}"]
            lines.append(
                [
                    row["weights"],
                    row["changed"],
                    study.pair_text(cell["tokens_per_round"]),
                    f"{cell['identical']}/{cell['texts']}",
                    f"{study.interval(cell['overlap'])['mean']:.3f}",
                    study.pair_text(study.change(cell["overlap"], full["overlap"]), 3) if row is not found[0] else "",
                ]
            )
        parts.append(f"## Temperature {temperature:g}\n\n{study.table(header, lines)}")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=TITLES)
    args = study.arguments(__doc__, parser, tokens=64)
    found = rows(args)
    study.publish(args, args.kind, TITLES[args.kind], page(found))


if __name__ == "__main__":
    main()
