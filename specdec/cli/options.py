"""Options that every command shares, and what they are turned into."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.cli import prompt_options
from specdec.errors import InputError

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder
    from specdec.policy import Policy

# What drafts when a target is named and nothing else: needs no weights.
DRAFTER_WITHOUT_WEIGHTS = "ngram"


def whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 4,2,1") from None


def axis(read: str) -> Callable[[str], list[Any]]:
    """A reader of `specdec.sweep.axes` as an argument's type."""

    def parse(text: str) -> list[Any]:
        from specdec.sweep import axes

        try:
            found: list[Any] = getattr(axes, read)(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return found

    return parse


def key_value(text: str) -> tuple[str, Any]:
    """`key=value`, the value as JSON where it is JSON (numbers, true, lists), else as it stands."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        return key.replace("-", "_"), json.loads(value)
    except json.JSONDecodeError:
        return key.replace("-", "_"), value


def add_quantize_options(group: Any) -> None:
    what = "a format (mxfp6_e2m3, int4-g64, …), a recipe (w4a16, …), or a JSON file"
    group.add_argument("--quantize", metavar="F", help=f"store the target's weights in fewer bits: {what}")
    group.add_argument("--draft-quantize", metavar="F", help="the same for the weights of the model that drafts")


def add_model_options(parser: argparse.ArgumentParser, *, loads: bool = True) -> None:
    """`loads`: the command loads models; else it only looks at them."""
    group = parser.add_argument_group("models")
    group.add_argument("--target", metavar="T", help="hub id or folder (default: the embedded pair's target)")
    group.add_argument(
        "--drafter",
        metavar="X",
        help="what drafts: a plugin's name (model, ngram, suffix, none, …), a hub id, or a folder "
        f"(default: model with the embedded target, else {DRAFTER_WITHOUT_WEIGHTS})",
    )
    group.add_argument(
        "--drafter-option",
        metavar="KEY=VALUE",
        type=key_value,
        action="append",
        default=[],
        help="an option of the drafter; repeatable",
    )
    if loads:
        group.add_argument("--artifact", metavar="DIR", help="a target written by `specdec export`")
        group.add_argument("--drafter-artifact", metavar="DIR", help="the same for a model that drafts")
        group.add_argument(
            "--kv-updater",
            metavar="NAME",
            help="who writes an artefact's keys and values: scatter, smart-mask, shift-pointer (default: scatter)",
        )
        add_quantize_options(group)
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    group.add_argument(
        "--dtype", help="float32, bfloat16, auto: the faster one (default: float32 on CPU, else the checkpoint's)"
    )
    group.add_argument("--backend", help="how a step runs: compiled, eager, … (default: compiled where it runs)")
    group.add_argument(
        "--numerics",
        choices=("invariant", "fast"),
        help="invariant: a row's bits do not depend on the rows beside it (default where the native kernels run)",
    )
    group.add_argument(
        "--kv-cache", metavar="F", help="store keys and values in a byte each: int8, mxfp8 (default: as computed)"
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    group.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: torch's choice; 1 for the embedded pair)"
    )


def add_method_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument("--verifier", metavar="NAME", help="verification rule (default: coupled)")
    group.add_argument("--policy", metavar="NAME", help="how many tokens to draft (default: throughput)")
    group.add_argument("--k", type=int, metavar="N", help="drafted tokens per round; means fixed(N) without --policy")
    group.add_argument("--tree", type=whole_numbers, metavar="4,2,1", help="children per depth, for the fixed policy")
    group.add_argument("--threshold", type=float, metavar="P", help="stop drafting below it; the confidence policy")
    group.add_argument("--tree-plan", metavar="FILE", help="a tree that `specdec tree` fitted")
    group.add_argument(
        "--policy-option", metavar="KEY=VALUE", type=key_value, action="append", default=[],
        help="an option of the policy, such as budget=24; repeatable",
    )  # fmt: skip
    group.add_argument("--exact", action="store_true", help="re-decide doubtful positions at width 1 (half precision)")
    group.add_argument("--allow-lossy", action="store_true", help="admit rules that change the distribution")


def add_text_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    group = parser.add_argument_group("text")
    group.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=f"(default: {max_new_tokens})"
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    group.add_argument("--seed", type=int, default=0, metavar="S")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    prompt_options.add_chat_options(group)


def generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "exact")
    return {**{name: getattr(arguments, name) for name in names}, "stop": tuple(arguments.stop)}


def _unknown(error: TypeError) -> str:
    """What Python says about a keyword that a plugin does not know, for people."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return f"it has no option {found[1]!r}" if found else str(error)


def chosen_policy(arguments: argparse.Namespace) -> str:
    """The name of the policy that is meant, also where only its options were given."""
    if arguments.policy is not None:
        return str(arguments.policy)
    if arguments.tree_plan is not None:
        return "fitted-tree"
    if arguments.threshold is not None:
        return "confidence"
    return "fixed" if arguments.tree is not None or arguments.k is not None else "throughput"


def build_policy(arguments: argparse.Namespace) -> Policy:
    """The policy that `--policy`, `--k`, `--tree` and `--threshold` describe together."""
    from specdec import registry

    options: dict[str, Any] = {}
    if arguments.tree is not None:
        options["branching"] = arguments.tree
        options["k"] = len(arguments.tree)
    if arguments.k is not None:
        options["k"] = arguments.k
    if arguments.threshold is not None:
        options["threshold"] = arguments.threshold
    if arguments.tree_plan is not None:
        options["plan_file"] = arguments.tree_plan
    name = chosen_policy(arguments)
    options.update(arguments.policy_option)
    flags = ("k", "tree", "threshold", "tree_plan")
    given = [flag.replace("_", "-") for flag in flags if getattr(arguments, flag) is not None]
    given += [f"policy-option {key}" for key, _ in arguments.policy_option]
    try:
        policy: Policy = registry.create("policy", name, **options)
    except TypeError as error:
        raise InputError(f"the {name} policy takes not all of --{', --'.join(given)}: {_unknown(error)}") from error
    return policy


def _take_artifacts(arguments: argparse.Namespace) -> None:
    """An artefact stands in for the model of its option from here on."""
    for option, replaced in (("artifact", "target"), ("drafter_artifact", "drafter")):
        folder = getattr(arguments, option, None)
        if folder is None:
            continue
        if getattr(arguments, replaced) not in (None, folder):
            raise InputError(f"--{option.replace('_', '-')} stands for a --{replaced}: give one of them")
        from specdec.export.manifest import Manifest

        Manifest.read(folder, check_files=False)  # a mistyped folder is no hub id
        setattr(arguments, replaced, folder)
    if getattr(arguments, "kv_updater", None) is not None and arguments.artifact is None:
        raise InputError("--kv-updater is for a target that `specdec export` wrote: give --artifact DIR")


def describe_target(arguments: argparse.Namespace) -> str:
    return arguments.target or "embedded"


def chosen_drafter(arguments: argparse.Namespace) -> str:
    return arguments.drafter or ("model" if arguments.target is None else DRAFTER_WITHOUT_WEIGHTS)


def _check_folder(name: str | None, option: str) -> None:
    """A path that is not there is a mistyped folder, not a hub id."""
    if name is not None and name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise InputError(f"{option} {name}: no such folder")


def build_decoder(arguments: argparse.Namespace, **more: Any) -> SpeculativeDecoder:
    """Loads the models; `more` goes to `specdec.load`.

    Raises `InputError` for whatever does not fit, before anything is decoded.
    """
    import torch

    import specdec
    from specdec.loading import EMBEDDED

    _take_artifacts(arguments)
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise InputError(f"--threads is a whole number >= 1, not {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    elif arguments.target is None:
        # Measured on two cores: a second thread slows the pair's small products, plainly and speculatively alike.
        torch.set_num_threads(1)
    policy = build_policy(arguments)
    _check_folder(arguments.target, "--target")
    _check_folder(arguments.drafter, "--drafter")
    if arguments.target is None and not (EMBEDDED / "target").is_dir():
        raise InputError("this installation has no embedded pair; name a model: --target FOLDER_OR_HUB_ID --drafter X")
    drafter_options = dict(arguments.drafter_option)
    if getattr(arguments, "kv_updater", None) is not None:
        more["kv_updater"] = arguments.kv_updater
    try:
        return specdec.load(
            arguments.target,
            chosen_drafter(arguments),
            verifier=arguments.verifier,
            policy=policy,
            device=checked_device(arguments.device),
            dtype=arguments.dtype,
            backend=arguments.backend,
            numerics=arguments.numerics,
            allow_lossy=arguments.allow_lossy,
            kv_cache=arguments.kv_cache,
            quantize=arguments.quantize,
            draft_quantize=arguments.draft_quantize,
            trust_remote_code=arguments.trust_remote_code,
            drafter_options=drafter_options,
            **more,
        )
    except TypeError as error:
        if not drafter_options:
            raise
        raise InputError(f"the drafter {chosen_drafter(arguments)} refuses its options: {_unknown(error)}") from error


def checked_device(name: str | None) -> Any:
    """A `torch.device` that exists here, or None."""
    import torch

    if name is None:
        return None
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"--device {name} cannot be used here: {first}") from error
