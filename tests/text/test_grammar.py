"""Grammars: what a sampler that takes any allowed token makes of them, and what is refused."""

from __future__ import annotations

import json
import pickle
import random
import signal
import threading
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from paged_backend import InvalidArgument, SamplingParams, StructuredOutputs
from paged_backend.text import grammar, trial
from paged_backend.text.detokenizer import Detokenizer
from paged_backend.text.grammar import Grammars, GuidedOutput
from paged_backend.text.guidance import LLGuidance
from tests.text import schemas

MOST_TOKENS = 150


class Setup:
    """A tokenizer and what reads its grammars. The model's vocabulary is `more` tokens larger."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, more: int = 37) -> None:
        self.tokenizer, self.vocab_size = tokenizer, len(tokenizer) + more
        self.eos = frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])
        self.grammars = Grammars(LLGuidance, tokenizer, self.vocab_size, self.eos)
        texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
        closing = np.array([any(char in text for char in '"}]') for text in texts])
        self.weights = np.where(closing, 20.0, 1.0) / np.array([1 + len(text) for text in texts]) ** 2

    def make(self, ends: frozenset[int] | None = None, **fields: Any) -> GuidedOutput:
        return self.grammars.make(StructuredOutputs(**fields), self.eos if ends is None else ends)

    def allowed(self, output: GuidedOutput) -> list[int]:
        row = np.zeros(-(-self.vocab_size // 32), dtype=np.int32)
        output.fill(row)
        return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()

    def feed(self, output: GuidedOutput, text: str) -> GuidedOutput:
        for token in self.tokenizer(text, add_special_tokens=False).input_ids:
            assert token in self.allowed(output)
            output.accept(token)
        return output

    def sample(self, output: GuidedOutput, seed: int) -> str | None:
        """The text of random tokens, closing ones preferred; None if it does not end in time."""
        rng = np.random.default_rng(seed)
        prompt = self.tokenizer("Answer:").input_ids
        text, tokens = Detokenizer(self.tokenizer, prompt), []
        while not output.is_over:
            allowed = self.allowed(output)
            ends = [token for token in allowed if token in self.eos]
            if ends and (len(allowed) == len(ends) or rng.random() < 0.5):
                break
            allowed = [token for token in allowed if token not in self.eos]
            weights = self.weights[allowed]
            tokens.append(int(rng.choice(allowed, p=weights / weights.sum())))
            output.accept(tokens[-1])
            if len(tokens) == MOST_TOKENS:
                return None
        return text.add(tokens, last=True)


def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece makes them: spaces are part of words, unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(33, 127)]
    merges = [("▁", "{"), ("▁", '"'), ('"', ":"), ('"', ","), ('"', "}"), ("a", "n"), ("▁", "a")]
    vocab = {piece: token for token, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def small(byte_tokenizer: PreTrainedTokenizerFast) -> Setup:
    return Setup(byte_tokenizer)


@pytest.fixture(scope="module", params=["bytes", "metaspace", "smollm2"])
def any_setup(request: pytest.FixtureRequest, small: Setup) -> Setup:
    if request.param == "bytes":
        return small
    if request.param == "metaspace":
        return Setup(metaspace())
    return Setup(AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2")))


def test_what_ends_is_valid(any_setup: Setup) -> None:
    """For any schema, and whatever of the allowed tokens are taken."""
    ended = 0
    number = 15 if any_setup.vocab_size > 10_000 else 150
    for seed in range(number):
        schema = schemas.schema(random.Random(seed)) if seed else schemas.LIST
        text = any_setup.sample(any_setup.make(json=schema), seed)
        if text is not None:
            ended += 1
            schemas.check(text, schema)
    assert ended > 0.7 * number


def test_expressions_choices_and_grammars(any_setup: Setup) -> None:
    choices = ["yes", "yes!", "no", 'q"uo\\te', "🙂 x", "a\nb", "\x01\x7f\u2028", "a.b*c|d", "/x/", "%json", "<s>"]
    seen = set()
    for seed in range(40):
        assert any_setup.sample(any_setup.make(regex="0"), seed) == "0"
        seen.add(any_setup.sample(any_setup.make(choice=choices), seed))
        number = any_setup.sample(any_setup.make(regex=r"-?[1-9][0-9]{0,4}(\.[0-9]{2})?"), seed)
        assert number is not None
        assert abs(float(number)) < 1e5
    assert seen <= set(choices)
    assert len(seen) > 5
    for text in ('start: "a" b*\nb: "(" b ")" | "-"', 'root ::= "a" b*\nb ::= "(" b ")" | "-"'):
        made = any_setup.make(grammar=text)
        for token in any_setup.tokenizer.convert_tokens_to_ids(list("a(-)")):
            assert token in any_setup.allowed(made)
            made.accept(token)
        assert not made.is_over
        assert any_setup.eos < set(any_setup.allowed(made))
        assert any_setup.sample(any_setup.make(json_object=True), 1) is not None


def test_json_has_room_for_indentation_but_not_for_ever(small: Setup) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "null"}}}, "required": ["a"]}
    pretty = json.dumps({"a": [None, None]}, indent=2)
    assert small.feed(small.make(json=schema), pretty).is_over
    assert small.feed(small.make(json=json.dumps(schema)), '{"a":[]}').is_over
    blank, newline = (small.tokenizer(char).input_ids[0] for char in " \n")
    allowed = small.allowed(small.feed(small.make(json=schema), "{ "))
    assert not {blank, newline} & set(allowed)


def test_only_tokens_of_text_are_allowed(small: Setup) -> None:
    """Neither special tokens nor those which the tokenizer does not have."""
    anything = small.make(regex="(?s:.*)")
    text = set(range(len(small.tokenizer))) - set(small.tokenizer.all_special_ids)
    allowed = set(small.allowed(anything))
    assert set(small.tokenizer("azé").input_ids[:3]) | small.eos < allowed < text | small.eos


def test_a_grammar_may_name_special_tokens(small: Setup) -> None:
    named = small.make(grammar='start: <s> "a"')
    assert small.allowed(named) == [small.tokenizer.bos_token_id]
    named.accept(small.tokenizer.bos_token_id)
    assert small.allowed(named) == small.tokenizer("a").input_ids
    with pytest.raises(InvalidArgument, match="unknown special token"):
        small.make(grammar="start: <nobody>")


def test_a_tokenizer_may_have_more_tokens_than_the_model(small: Setup) -> None:
    fewer = Setup(small.tokenizer, more=-100)
    assert max(fewer.allowed(fewer.make(regex="(?s:.*)"))) < fewer.vocab_size


def test_without_end_of_sequence_no_token_is_lost() -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    vocab = {char: token for token, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    setup = Setup(PreTrainedTokenizerFast(tokenizer_object=inner))
    for char in sorted(pre_tokenizers.ByteLevel.alphabet())[:90]:
        assert setup.allowed(setup.make(choice=[char])) == [vocab[char]]


def test_stop_tokens_where_the_output_matches(small: Setup) -> None:
    digit, letter = (small.tokenizer(char).input_ids[0] for char in "7x")
    (eos,) = small.eos
    ends = frozenset([eos, letter])
    output = small.make(ends, regex="7+")
    assert small.allowed(output) == [digit]
    output.accept(digit)
    assert set(small.allowed(output)) == {digit, *ends}
    output.accept(letter)  # ends the request
    ignoring = small.make(frozenset(), regex="7{2}")
    for over in (False, False, True):
        assert ignoring.is_over == over
        assert small.allowed(ignoring) == [] if over else [digit]
        if not over:
            ignoring.accept(digit)
    # A stop token of text may also come where the output does not match.
    assert letter in small.allowed(small.make(ends, regex="xy"))


def test_an_empty_output_may_be_all_there_is(small: Setup) -> None:
    output = small.make(choice=[""])
    assert small.allowed(output) == list(small.eos)
    assert output.is_over


def test_copies_go_their_own_ways(small: Setup) -> None:
    first = small.feed(small.make(choice=["abc", "abd"]), "ab")
    second = first.copy()
    assert small.feed(first, "c").is_over
    assert not second.is_over
    assert small.feed(second, "d").is_over


def test_a_token_that_may_not_come_is_an_error(small: Setup) -> None:
    with pytest.raises(ValueError, match="doesn't satisfy the grammar"):
        small.make(regex="a").accept(small.tokenizer("b").input_ids[0])


def test_many_threads(small: Setup) -> None:
    """Compile, copy and follow the same few grammars at once."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(30):
                schema = schemas.schema(random.Random(turn % 7))
                text = small.sample(small.make(json=schema), seed * 100 + turn)
                if text is not None:
                    schemas.check(text, schema)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json": {"type": "strin"}}, 'structured_outputs=\'{"type": "strin"}\': Invalid type: strin'),
        ({"json": {"not": {}}}, 'Unimplemented keys: ["not"]'),
        ({"json": {"$ref": "#/nowhere"}}, "Pointer '/nowhere' does not exist"),
        ({"json": {"type": "string", "pattern": "[a"}}, "unclosed character class"),
        ({"json": {"type": "integer", "minimum": 2, "maximum": 1}}, "minimum (2) is greater than maximum (1)"),
        ({"regex": "(?=a)"}, "look-around"),
        ({"choice": ["\ud800"]}, "surrogates not allowed"),
        ({"grammar": "start: b"}, 'unknown name: "b"'),
        ({"grammar": "root ::= b"}, "Rule 'b' not found"),
        ({"grammar": "root ::= " + "(" * 10_000}, "recursion"),
    ],
)
def test_what_does_not_compile_says_why(small: Setup, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        small.make(**fields)
    assert caught.value.field == "structured_outputs"
    assert message in str(caught.value)


DEEP = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1500)}
SLOW = {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(60)]}


@pytest.mark.parametrize(
    ("schema", "limits", "message"),
    [
        ({"$defs": DEEP | {"d1500": {"type": "null"}}, "$ref": "#/$defs/d0"}, {}, "is nested too deeply"),
        (SLOW, {"_SECONDS": 0.3}, "takes more than 0.3 seconds to compile"),
        (SLOW, {"_SECONDS": 60, "_MEMORY": 2**27}, "takes more than 128 MiB of memory to compile"),
    ],
)
def test_what_crashes_the_compiler_is_refused(
    small: Setup, monkeypatch: pytest.MonkeyPatch, schema: Any, limits: dict[str, float], message: str
) -> None:
    for name, limit in limits.items():
        monkeypatch.setattr(trial, name, limit)
    setup = Setup(small.tokenizer)
    with pytest.raises(InvalidArgument, match=message):
        setup.make(json=schema)
    assert setup.sample(setup.make(json={"type": "null"}), 0) == "null"


def test_the_trial_process_is_started_again_when_it_was_killed() -> None:
    judge = trial.Trial()
    assert judge("regex", "a")
    assert judge._process is not None
    judge._process.send_signal(signal.SIGKILL)
    judge._process.wait()
    assert judge("regex", "a")


def test_compiled_grammars_are_remembered_and_forgotten(small: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    class Counting(LLGuidance):
        def compile(self, kind: Any, text: str) -> Any:
            compiled.append(text)
            return super().compile(kind, text)

    monkeypatch.setattr(grammar, "_MOST_COMPILED", 2)
    grammars = Grammars(Counting, small.tokenizer, small.vocab_size, small.eos)
    for text in "abacab":
        grammars.make(StructuredOutputs(regex=text), small.eos)
    assert compiled == ["a", "b", "c", "b"]


def test_a_grammar_whose_limit_is_used_up_is_compiled_again(small: Setup) -> None:
    """Outputs of one grammar share the states of its lexer, of which there are not endlessly many."""
    output = small.make(regex="(a|b)*a(a|b){20}x")
    rng = random.Random(0)
    tokens = small.tokenizer("ab").input_ids
    for _ in range(100_000):
        if not small.allowed(output):
            break
        output.accept(rng.choice(tokens))
    assert "too many states" in str(output.error)
    assert small.allowed(small.make(regex="(a|b)*a(a|b){20}x")) == sorted(tokens)


def test_fields() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    for given in (
        StructuredOutputs(json=schema),
        {"json": schema},
        {"json": json.dumps(schema)},
        json.dumps({"json": schema}),
        json.dumps({"json": json.dumps(schema)}),
    ):
        params = SamplingParams(structured_outputs=given)
        assert params.structured_outputs == StructuredOutputs(json=schema)
        assert pickle.loads(pickle.dumps(params)) == params
    assert StructuredOutputs(json=schema).source == ("json", json.dumps(schema))
    assert SamplingParams().structured_outputs is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "structured_outputs='{': must be JSON: "),
        ({}, "structured_outputs=[]: must have exactly one of json, json_object, regex, choice, grammar"),
        ({"regex": "a", "choice": ["b"]}, "structured_outputs=['regex', 'choice']: must have exactly one of "),
        ({"jsn": {}}, "structured_outputs.jsn={}: unknown field of StructuredOutputs; did you mean 'json'?"),
        ({"json": "{"}, "structured_outputs.json='{': must be a JSON schema: "),
        ({"json": False}, "structured_outputs.json=False: must be a JSON schema: an object"),
        ({"json": [1]}, "structured_outputs.json=[1]: must be a JSON schema: an object"),
        ({"json": {"a": {1}}}, "must be a JSON schema: Object of type set is not JSON serializable"),
        ({"regex": 5}, "structured_outputs.regex=5: Input should be a valid string"),
        ({"choice": []}, "structured_outputs.choice=[]: "),
        ({"choice": "yes"}, "structured_outputs.choice='yes': "),
        ({"choice": ["a" * 70_000] * 2}, "structured_outputs.choice='140001 characters': must have at most 131072"),
        ({"regex": "a" * 140_000}, "should have at most 131072 characters"),
        (7, "structured_outputs=7: "),
    ],
)
def test_bad_fields(given: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(structured_outputs=given)
    assert message in str(caught.value)


def test_beams_take_none() -> None:
    with pytest.raises(InvalidArgument, match=r"structured_outputs=.* must be None with beam_width > 1"):
        SamplingParams(structured_outputs={"regex": "a"}, beam_width=2)


def test_a_missing_library_and_unreadable_tokenizers(small: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = StructuredOutputs(json_object=True)
    with pytest.raises(InvalidArgument, match="need a tokenizer, and this engine has none"):
        Grammars(LLGuidance, None, 10, frozenset()).make(wanted, frozenset())
    with pytest.raises(InvalidArgument, match="needs a tokenizer of the tokenizers library; this model's is a object"):
        Grammars(LLGuidance, object(), 10, frozenset()).make(wanted, frozenset())  # type: ignore[arg-type]
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(InvalidArgument, match=r"needs llguidance: pip install 'paged-backend\[guided\]'"):
        Grammars(LLGuidance, small.tokenizer, small.vocab_size, small.eos).make(wanted, small.eos)
