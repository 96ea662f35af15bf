"""Put the trained pair into the package, in bfloat16, with a model card that this script measures.

python experiments/embedded_pair/export.py --target runs/target --draft runs/draft
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import platform
from pathlib import Path

import data
import numpy as np
import torch
import transformers
from train_target import held_out_loss
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import specdec
from specdec.train import provenance, stdlib

PACKAGE = Path(__file__).parents[2] / "specdec"
PAIR = PACKAGE / "pair"
LIMIT = 45_000_000  # bytes of all bundled weights
PROMPT = 64


def export(source: Path, name: str) -> int:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.generation_config.do_sample = False
    model.save_pretrained(PAIR / name)
    AutoTokenizer.from_pretrained(source).save_pretrained(PAIR / name)
    return sum(file.stat().st_size for file in (PAIR / name).glob("*.safetensors"))


# What the parser says where a text merely breaks off. (An error inside an open bracket or string has other words.)
_OPEN_ENDED = ("unterminated triple-quoted", "was never closed", "unexpected EOF")
_UNFINISHED = ("expected an indented block", "expected 'except' or 'finally' block")


def valid_share(prompt: str, continuation: str) -> tuple[int, int]:
    """Whole new lines before the first syntax error, and all of them. That a text breaks off is not an error."""
    head = "class _:\n" if prompt[:1].isspace() else ""  # a prompt from inside a class
    lines = (head + prompt + continuation).splitlines()[:-1]
    known = len((head + prompt).splitlines())
    total, good = max(0, len(lines) - known), len(lines)
    try:
        ast.parse("\n".join(lines) + "\n")
    except SyntaxError as error:
        message, line = str(error.msg), error.lineno or 1
        at_end = line >= len(lines) and any(words in message for words in _UNFINISHED)
        if not at_end and not any(words in message for words in _OPEN_ENDED):
            good = line - 1
    return max(0, good - known), total


@torch.no_grad()
def greedy_agreement(target: LlamaForCausalLM, draft: LlamaForCausalLM, tokens: np.ndarray, count: int = 32) -> float:
    """Share of positions of the target's greedy continuations of held-out prompts where the draft's argmax agrees."""
    starts = np.linspace(0, len(tokens) - PROMPT - 1, count).astype(int)
    prompts = torch.from_numpy(np.stack([tokens[s : s + PROMPT] for s in starts]).astype(np.int64))
    text = target.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=128, min_new_tokens=128, do_sample=False
    )
    agree = draft(text).logits.argmax(-1)[:, PROMPT - 1 : -1] == text[:, PROMPT:]
    return float(agree.float().mean())


def measure(prompts: list[dict[str, str]]) -> dict[str, object]:
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    target = AutoModelForCausalLM.from_pretrained(PAIR / "target", dtype=torch.float32).eval()
    draft = AutoModelForCausalLM.from_pretrained(PAIR / "draft", dtype=torch.float32).eval()
    held = data.rows(tokenizer, 512).held_out
    samples, parsed, total = [], 0, 0
    decoder = specdec.SpeculativeDecoder(target, tokenizer=tokenizer)
    for row in prompts:
        inputs = tokenizer(row["text"], return_tensors="pt")
        out = target.generate(**inputs, max_new_tokens=160, do_sample=False)
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        good, lines = valid_share(row["text"], text)
        parsed, total = parsed + good, total + lines
        drawn = decoder.generate(row["text"], max_new_tokens=160, temperature=0.6, seed=1)
        samples.append({"id": row["id"], "prompt": row["text"], "text": drawn.text})
    return {
        "loss": {"target": held_out_loss(target, held), "draft": held_out_loss(draft, held)},
        "agreement": greedy_agreement(target, draft, held.tokens_RL.reshape(-1)),
        "parsed": parsed / total,
        "samples": samples,
        "parameters": {"target": target.num_parameters(), "draft": draft.num_parameters()},
    }


CARD = """# The embedded pair

A target and a draft for trying specdec on any machine, and for its tests and benchmarks. They write Python, somewhat.

| | target | draft |
|---|---|---|
| architecture | `LlamaForCausalLM`, {t.num_hidden_layers} layers, width {t.hidden_size} | `LlamaForCausalLM`, \
{d.num_hidden_layers} layers, width {d.hidden_size} |
| parameters | {tp:,} | {dp:,} |
| weights (bfloat16) | {tb:.1f} MB | {db:.1f} MB |
| held-out loss, nats per token | {tl:.3f} | {dl:.3f} |
| trained on | {tt:.1f}M tokens | {dt:.1f}M tokens, by distillation |

Greedy agreement on held-out prompts (share of positions of the target's own greedy text where the draft's first choice
is the target's): **{agreement:.3f}**.
Whole lines of greedy continuations of the built-in prompts (160 new tokens) that stand before the first syntax error:
**{parsed:.0%}**. (A text that breaks off is not in error.)

* **Data:** the source of the Python standard library ({python}), {percent} % of the files held out by a hash of their
  path; PSF licence. The tokenizer is a byte-level BPE of {vocab} pieces trained on the same text. Digest of the
  training tokens: `{digest}`.
* **Never trained on:** held-out files, from which built-in prompts are taken, and the hand-written prompts.
* **Context:** {context} tokens. One end-of-text token opens every text and ends it.
* **Made by:** `experiments/embedded_pair`; {date}, torch {torch}, transformers {transformers}, two CPU cores.
* **Use:** demonstrations, tests, benchmarks. The target saw few tokens for its size: do not expect correct programs.

## Three samples

Temperature 0.6, seed 1, 160 new tokens, on hand-written prompts; the prompt ends at `▸`. (Greedy texts fall into
repetition after some tens of tokens.)

{samples}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", type=Path, required=True)
    args = parser.parse_args()
    sources = {"target": args.target / "model", "draft": args.draft}
    sizes = {name: export(path, name) for name, path in sources.items()}
    assert sum(sizes.values()) <= LIMIT, sizes
    lines = (PACKAGE / "bench" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    facts = measure([json.loads(line) for line in lines])
    records = {name: provenance.read(path) for name, path in sources.items()}
    configs = [AutoModelForCausalLM.from_pretrained(PAIR / name).config for name in ("target", "draft")]
    chosen = [s for s in facts["samples"] if s["id"].startswith("written/")][:5:2]
    shown = "\n".join(f"```python\n{s['prompt']}▸{s['text'].rstrip()}\n```\n" for s in chosen)
    card = CARD.format(
        t=configs[0], d=configs[1], tp=facts["parameters"]["target"], dp=facts["parameters"]["draft"],
        tb=sizes["target"] / 1e6, db=sizes["draft"] / 1e6, tl=facts["loss"]["target"], dl=facts["loss"]["draft"],
        tt=records["target"]["tokens"] / 1e6, dt=records["draft"]["tokens_seen"] / 1e6, agreement=facts["agreement"],
        parsed=facts["parsed"], python=platform.python_version(), percent=stdlib.HELD_OUT_PERCENT,
        vocab=data.VOCAB_SIZE, digest=records["target"]["data"][:16], context=configs[0].max_position_embeddings,
        date=datetime.date.today().isoformat(), torch=torch.__version__, transformers=transformers.__version__,
        samples=shown,
    )  # fmt: skip
    (PAIR / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
