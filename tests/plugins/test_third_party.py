"""A package of somebody else's, installed into a temporary folder, is found and used by name."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

import specdec
from specdec import registry
from specdec.errors import InputError, UnknownPluginError
from specdec.policy import Fixed

NAME = "specdec_repeat_plugin"
PYPROJECT = f"""
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "{NAME}"
version = "1.0"

[project.entry-points."specdec.drafters"]
repeat-last = "{NAME}:RepeatLast"

[project.entry-points."specdec.verifiers"]
picky = "{NAME}:Picky"

[project.entry-points."specdec.policies"]
odd-even = "{NAME}:OddEven"

[tool.setuptools]
py-modules = ["{NAME}"]
"""
MODULE = '''
from dataclasses import dataclass

from specdec.drafter import Drafter
from specdec.policy import Plan, Policy, PolicyRun
from specdec.proposal import Draw, Proposal
from specdec.tree import TokenTree
from specdec.verifier import Verifier, walk


class RepeatLast(Drafter):
    """Proposes the last token again."""

    def __init__(self, most: int = 99):
        self.most = most

    @property
    def name(self):
        return "repeat-last"

    def start(self, request):
        return request.prompt[-1]

    def propose(self, state, plan, chance):
        return Proposal.point(TokenTree.chain([state] * min(plan.depth, self.most)))

    def observe(self, state, outcome):
        return outcome.tokens[-1] if outcome.tokens else state


class Picky(Verifier):
    """Sample and match under the shared noise."""

    draws = (Draw.POINT,)
    keeps_seed = True

    @property
    def name(self):
        return "picky"

    def verify(self, p, proposal, position, chance):
        return walk(proposal.tree, chance.race(p, [position + i for i in range(len(p))])[:, 0])


@dataclass
class Run(PolicyRun):
    round: int = 0

    def plan(self):
        return Plan(1 + self.round % 2)

    def observe(self, facts):
        self.round += 1


class OddEven(Policy):
    @property
    def name(self):
        return "odd-even"

    def start(self):
        return Run()
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory):
    """A folder that the package was installed to by pip, on the path."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / f"{NAME}.py").write_text(MODULE)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    sys.path.insert(0, str(target))
    importlib.invalidate_caches()
    yield target
    sys.path.remove(str(target))
    sys.modules.pop(NAME, None)
    importlib.invalidate_caches()


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    tiny_models.tiny("gpt-neox").save_pretrained(folder)
    return folder


def test_it_is_unknown_before_it_is_installed() -> None:
    if NAME in sys.modules:
        pytest.skip("already installed by another test of this module")
    with pytest.raises(UnknownPluginError, match="repeat-last"):
        registry.find("drafter", "repeat-last")


def test_its_parts_are_used_by_name(site: Path, target_folder: Path) -> None:
    assert {"repeat-last", "ngram"} <= set(registry.available("drafter"))
    decoder = specdec.load(target_folder, drafter="repeat-last", verifier="picky", policy="odd-even", dtype="float64")
    parts = (decoder.drafter, decoder.verifier, decoder.policy)
    assert [part.name for part in parts] == ["repeat-last", "picky", "odd-even"]
    assert {type(part).__module__ for part in parts} == {NAME}
    for temperature in (0.0, 0.2):
        options = {"temperature": temperature, "seed": 3}
        out = decoder.generate([3, 5, 7], max_new_tokens=60, strict=True, **options)
        assert out.tokens == tiny_models.reference(decoder.target, [3, 5, 7], 60, **options)
        assert out.stats.num_accepted_draft_tokens > 0
        assert [r.depth_proposed for r in out.trace.rounds[:4]] == [1, 2, 1, 2]
        assert "repeat-last" in out.origins


def test_options_reach_its_build(site: Path, target_folder: Path) -> None:
    decoder = specdec.load(target_folder, drafter="repeat-last", drafter_options={"most": 1})
    assert decoder.drafter.most == 1


def test_it_takes_part_in_messages(site: Path) -> None:
    model = tiny_models.tiny()
    with pytest.raises(UnknownPluginError, match="did you mean 'repeat-last'"):
        specdec.SpeculativeDecoder(model, drafter="repeat-lst")
    with pytest.raises(InputError, match=r"picky verifier cannot take trees.*these can: coupled"):
        specdec.SpeculativeDecoder(model, drafter=model, verifier="picky", policy=Fixed(2, (2,)))


def test_two_packages_of_one_name_are_an_error(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "rival-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[specdec.drafters]\nngram = rival:Ngram\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=r"two packages register the drafter 'ngram': .*rival:Ngram"):
        specdec.SpeculativeDecoder(tiny_models.tiny(), drafter="ngram")


def test_the_built_in_parts_are_entry_points_too() -> None:
    for kind, names in (
        ("drafter", {"model", "ngram", "none", "suffix"}),
        ("verifier", {"block", "coupled", "greedy", "match", "ratio", "recursive", "traversal", "typical"}),
        ("policy", {"confidence", "fixed", "heuristic", "throughput"}),
        ("backend", {"eager"}),
    ):
        assert names <= set(registry.available(kind))
        assert all(point.load() is registry.find(kind, name) for name, point in registry.available(kind).items())


def test_a_folder_says_which_drafter_it_is(site: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"specdec_drafter": "repeat-last"}')
    model = tiny_models.tiny("gpt-neox")
    decoder = specdec.SpeculativeDecoder(model, drafter=str(tmp_path))
    assert type(decoder.drafter).__module__ == NAME


def test_every_drafter_can_be_imported_by_its_class() -> None:
    """They are read one by one: a name that is listed and a name that is found must be the same set."""
    import specdec.drafters as drafters

    found = {point.value.partition(":")[2] for point in registry.available("drafter").values()}
    built_in = {name for name in found if hasattr(drafters, name)}
    assert set(drafters.__all__) == set(drafters._FILES) == built_in
    for name in drafters.__all__:
        assert getattr(drafters, name).__name__ == name
    with pytest.raises(AttributeError, match="has no 'Nobody'"):
        drafters.Nobody  # noqa: B018
