"""What statecache stands on in transformers is there, in whichever version, and what is not ours is refused at once."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import families
import pytest
import tiny_models
import torch
import transformers

import statecache as sc
from declared_bytes import declared_bytes
from statecache import errors
from statecache.models import interface
from statecache.models.table import KINDS, NOT_KEPT, SHAPES, model_spec

TOOL = Path(__file__).parents[2] / "tools" / "check_next.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_next", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_differs_from_the_tables(tool: ModuleType) -> None:
    assert list(tool.differences()) == []


@pytest.mark.parametrize(
    ("table", "change", "said"),
    [
        ("CALLS", lambda of: of.pop("crop"), "new call: .crop is asked of a cache in"),
        ("CALLS", lambda of: of.update(swallow="nobody"), "CALLS names .swallow, which StateCache does not have"),
        ("KINDS", lambda of: of.pop("conv"), 'new layer type: "conv"'),
        ("SHAPES", lambda of: of.pop(("mamba", "linear_attention")), "new family: mamba keeps a state of its own"),
        ("SHAPES", lambda of: of.update({("mamba9", "conv"): None}), "mamba9 is in SHAPES, and no configuration"),
        (
            "FUNCTIONS",
            lambda of: of.update({"masking_utils.swallow": ()}),
            "transformers.masking_utils.swallow is gone",
        ),
        ("FUNCTIONS", lambda of: of.update({"cache_utils.Cache.crop": ("by",)}), "Cache.crop takes no by= any more"),
    ],
)
def test_a_difference_is_found(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, table: str, change: Any, said: str
) -> None:
    other = dict(getattr(tool, table))
    change(other)
    monkeypatch.setattr(tool, table, other)
    monkeypatch.setattr(tool, "TESTED", ("5.17", "5.17"))
    assert any(said in line for line in tool.differences())


# ---- what is not ours


def config(name: str, **options: Any) -> Any:
    return transformers.CONFIG_MAPPING[name](**options)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("rwkv", {}, "no model of that type asks a cache for anything"),
        ("xlstm", {}, "no model of that type asks a cache for anything"),
        ("xlnet", {}, "no model of that type asks a cache for anything"),
        ("distilbert", {}, "no model of that type asks a cache for anything"),
        ("vit", {}, "no model of that type asks a cache for anything"),
        ("bert", {}, "an encoder, which remembers nothing: set is_decoder=True"),
        ("roberta", {}, "an encoder, which remembers nothing"),
        ("t5", {}, "has an encoder, whose keys a decoder attends to as well"),
        ("bart", {}, "has an encoder, whose keys"),
        ("whisper", {}, "has an encoder, whose keys"),
        ("encodec", {}, "asks a cache for anything|counts no layers"),
    ],
)
def test_a_model_that_keeps_nothing_in_a_cache_is_refused(name: str, options: dict[str, Any], why: str) -> None:
    for make in (sc.StateCache, model_spec):
        with pytest.raises(errors.ConfigError, match=why):
            make(config(name, **options))


LATER = families.FAMILIES.keys() & {"recurrent_gemma"}


@pytest.mark.skipif(bool(LATER), reason="of transformers that do not say what its layers are")
def test_a_configuration_that_does_not_name_its_layers_is_refused() -> None:
    with pytest.raises(errors.ConfigError, match="does not name the types of its layers: take a newer one"):
        model_spec(config("recurrent_gemma"))


@pytest.mark.skipif(not LATER, reason="of later transformers")
def test_a_model_that_keeps_its_states_on_its_modules_is_refused_unless_it_is_prepared(nobody_prepared: None) -> None:
    model, other = (families.build("recurrent_gemma", lru_width=44)[0] for _ in range(2))
    ids, refused = tiny_models.draw(2, 5), "recurrent_gemma model as it is: it keeps its .*: call statecache.prepare"
    with pytest.raises(errors.ConfigError, match=refused):
        sc.StateCache(model.config)
    sc.generate(model, ids, max_new_tokens=2, assistant=other)  # prepares it
    with pytest.raises(errors.ConfigError, match=refused):
        sc.StateCache(model.config)
    sc.prepare(model)
    copied = copy.deepcopy(model)
    cache = sc.StateCache(other.config, rows=2, capacity=9, dtype=torch.float32, device="cpu")
    assert cache.nbytes() == declared_bytes(model_spec(other.config), 2, 9)
    with pytest.raises(errors.ConfigError, match=refused):  # of another size
        sc.StateCache(families.build("recurrent_gemma")[1])
    with pytest.raises(errors.ConfigError, match=refused):
        tiny_models.feed(other, cache, ids, 0)
    assert cache.lengths.tolist() == [0, 0]
    sc.unprepare(model)
    assert len(sc.StateCache(copied.config)) == 5
    sc.unprepare(copied)
    with pytest.raises(errors.ConfigError, match=refused):
        sc.StateCache(model.config)


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "bloom", "gpt2", "opt", "qwen2_vl", "llava", "gemma3", "mamba"])
def test_a_model_that_decodes_is_not(name: str) -> None:
    assert len(sc.StateCache(config(name))) > 0


def test_an_encoder_that_is_told_to_decode_is_not() -> None:
    assert len(sc.StateCache(config("bert", is_decoder=True))) == 12


def test_a_configuration_of_ones_own_is_not() -> None:
    class OwnConfig(transformers.PreTrainedConfig):
        model_type = "own"
        num_hidden_layers, num_attention_heads, hidden_size = 2, 2, 8

    assert len(sc.StateCache(OwnConfig())) == 2


@pytest.mark.parametrize("kind", NOT_KEPT)
def test_a_layer_type_that_cannot_be_kept_is_refused_by_name(kind: str) -> None:
    of = tiny_models.build("qwen3").config.to_dict()
    made = transformers.Qwen3Config(**{**of, "layer_types": ["full_attention"] * of["num_hidden_layers"]})
    made.layer_types = ["full_attention", *[kind] * (of["num_hidden_layers"] - 1)]
    with pytest.raises(errors.UnknownLayerError, match=f'layer 1 .* "{kind}", which cannot be kept exactly'):
        sc.StateCache(made)


def test_no_layer_type_is_kept_and_not_kept() -> None:
    assert not KINDS.keys() & NOT_KEPT.keys()
    assert {kind for _, kind in SHAPES} <= KINDS.keys()


# ---- versions


@pytest.mark.parametrize("version", ["5.17.0", "5.23.1", interface.TESTED[1] + ".9", "5.24.0.dev0"])
def test_a_version_that_was_tested_is_not_warned_of(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interface.check_version(version)


@pytest.mark.parametrize("version", ["5.25.0", "5.25.0.dev0", "6.0"])
def test_a_newer_version_is_warned_of_once(version: str) -> None:
    with pytest.warns(UserWarning, match=f"tested with transformers 5.17 to .*, and this is {version}") as said:
        interface.check_version(version)
    assert len(said) == 1


def test_the_versions_that_are_tested_are_those_that_the_files_name() -> None:
    root = Path(__file__).parents[2]
    oldest, newest = interface.TESTED
    assert f'"transformers>={oldest}"' in (root / "pyproject.toml").read_text()
    assert f"transformers=={newest}." in (root / "constraints.txt").read_text()
    assert f"OLDEST := {oldest}." in (root / "Makefile").read_text()
