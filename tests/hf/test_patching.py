"""Patching is reversible, and a patched model is otherwise the model it was."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_integration import paged, patch, stats, unpatch
from paged_backend.errors import InvalidArgument, UnsupportedModel
from tests.tiny import FAMILIES, build, prompts

INPUTS = prompts(5, 9)
CALL = INPUTS | {"max_new_tokens": 8, "eos_token_id": None}


def is_plain(model: PreTrainedModel, like: PreTrainedModel) -> bool:
    implementations = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    same = type(model) is type(like) and "_paged" not in vars(model)
    return same and implementations == {like.config._attn_implementation}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unpatch_restores(attention: str) -> None:
    model = build(attn_implementation=attention)
    plain_class, names = type(model), set(vars(model))
    forward, generated = model(**INPUTS).logits, model.generate(**CALL)
    for _ in range(2):
        assert patch(model, num_blocks=64) is model
        assert isinstance(model, plain_class)
        assert type(model) is not plain_class
        assert (type(model).__name__, type(model).__module__) == (plain_class.__name__, plain_class.__module__)
        assert model.generate(**CALL).tolist() == generated.tolist()
        assert unpatch(model) is model
        assert type(model) is plain_class
        assert set(vars(model)) == names
        assert model.config._attn_implementation == attention
        assert torch.equal(model(**INPUTS).logits, forward)
        assert torch.equal(model.generate(**CALL), generated)
    unpatch(model)
    with pytest.raises(InvalidArgument, match="must be patched"):
        stats(model)


def test_context_manager_unpatches_after_an_error() -> None:
    model = build()
    with pytest.raises(InvalidArgument), paged(model, num_blocks=64) as inside:
        patch(inside, num_blocks=65)
    assert is_plain(model, build())


def test_patch_twice(make_patched: Any) -> None:
    model = make_patched(num_blocks=64)
    model.generate(**CALL)
    assert patch(model, num_blocks=64) is model
    assert stats(model).served == 1, "the engine must be the same one"
    with pytest.raises(InvalidArgument, match="unpatch it first"):
        patch(model, num_blocks=65)
    with pytest.raises(InvalidArgument, match="unpatch it first"):
        patch(model, num_blocks=64, strict=True)


def test_bad_arguments() -> None:
    with pytest.raises(InvalidArgument, match="num_blocks"):
        patch(build(), num_block=64)
    with pytest.raises(InvalidArgument, match="Linear"):
        patch(nn.Linear(2, 2))
    with pytest.raises(InvalidArgument, match=r"model\.eval"):
        patch(build().train())


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_unsupported_model_is_left_as_it_was(family: str) -> None:
    config = AutoConfig.for_model(family, vocab_size=128, hidden_size=64, num_hidden_layers=2, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    plain_class, attention, before = type(model), config._attn_implementation, model(**INPUTS).logits
    with pytest.raises(UnsupportedModel):
        patch(model)
    assert type(model) is plain_class
    assert model.config._attn_implementation == attention
    assert torch.equal(model(**INPUTS).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_forward_is_untouched(family: str, make_patched: Any) -> None:
    plain, model = build(family), make_patched(build(family))
    ids = INPUTS["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        assert torch.equal(model(**INPUTS).logits, plain(**INPUTS).logits)
        cached = [m(ids[:, -1:], past_key_values=m(ids[:, :-1]).past_key_values).logits for m in (model, plain)]
    assert torch.equal(*cached)


def test_attention_weights_are_still_to_be_had(make_patched: Any) -> None:
    plain = build(attn_implementation="eager")
    model = make_patched(build(attn_implementation="eager"))
    for ours, theirs in zip(
        *(each(**INPUTS, output_attentions=True).attentions for each in (model, plain)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_training_step_is_untouched(make_patched: Any) -> None:
    plain, model = build(), make_patched()
    for each in (plain, model):
        each.train()
        each(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_copies_and_pickles_are_plain(make_patched: Any) -> None:
    plain, model = build(), make_patched(strict=True)
    want = plain.generate(**CALL).tolist()
    model.itself = [model]  # as accelerate's hooks do: a model that holds itself
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_plain(copied, plain)
        assert copied.itself[0] is copied
        assert copied.generate(**CALL).tolist() == want
        assert patch(copied, num_blocks=64).generate(**CALL).tolist() == want
        unpatch(copied)
    shallow = copy.copy(model)
    assert type(shallow) is type(plain)
    assert shallow.generate(**CALL).tolist() == want
    assert model.generate(**CALL).tolist() == want
    assert stats(model).served == 1


def test_saved_files_and_state_are_the_same(make_patched: Any, tmp_path: Path) -> None:
    plain, model = build(), make_patched()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    for name, each in (("plain", plain), ("paged", model)):
        each.save_pretrained(tmp_path / name)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "paged")]
    assert configs[0] == configs[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "paged")
    assert is_plain(loaded, plain)
    assert torch.equal(loaded(**INPUTS).logits, plain(**INPUTS).logits)
