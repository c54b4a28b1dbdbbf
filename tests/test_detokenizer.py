"""Streamed text against the decode of all ids at once, and stop strings against a character-by-character search."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.detokenizer import Detokenizer
from jaxserve.sampling_params import SamplingParams
from jaxserve.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer_files import read_json, write_sentencepiece


@pytest.fixture(scope="module", params=[0, 1], ids=["space_prefix", "no_prefix"])
def sentencepiece(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_sentencepiece(tmp_path_factory.mktemp("gguf") / "t.gguf", request.param))


def stream(tokenizer: Tokenizer, ids: list[int], params: SamplingParams, chunk: int = 1) -> Detokenizer:
    """The detokenizer after all ids; its deltas have been checked to be its text."""
    detokenizer = Detokenizer(tokenizer, params)
    deltas = []
    for start in range(0, len(ids), chunk):
        stop = detokenizer.append(ids[start : start + chunk])
        deltas.append(detokenizer.take_delta())
        assert "".join(deltas) == detokenizer.text
        if stop is not None:
            break
    detokenizer.finish()
    deltas.append(detokenizer.take_delta())
    assert "".join(deltas) == detokenizer.text
    return detokenizer


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the text would have ended had it come one character at a time, and by which stop string."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return end, stop
    return None


CHUNKS = st.integers(1, 5)
STOPS = st.lists(st.text("aeint .\n", min_size=1, max_size=4), max_size=3).map(tuple)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=30), skip=st.booleans(), chunk=CHUNKS)
def test_smollm2_streams_what_decode_gives(smollm2: Tokenizer, ids: list[int], skip: bool, chunk: int) -> None:
    """Random ids: most break characters off, and some are control tokens."""
    detokenizer = stream(smollm2, ids, SamplingParams(skip_special_tokens=skip), chunk)
    assert detokenizer.text == smollm2.backend.decode(ids, skip_special_tokens=skip)
    assert detokenizer.num_tokens == len(ids)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 479), st.integers(3, 258)), max_size=30), skip=st.booleans(), chunk=CHUNKS)
def test_sentencepiece_streams_what_decode_gives(sentencepiece: Tokenizer, ids: list[int], skip: bool, chunk: int) -> None:
    """Half of the ids are byte tokens."""
    detokenizer = stream(sentencepiece, ids, SamplingParams(skip_special_tokens=skip), chunk)
    assert detokenizer.text == sentencepiece.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in detokenizer.text:
        assert detokenizer.text == sentencepiece.backend.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_sentencepiece_streams_any_text(sentencepiece: Tokenizer, text: str) -> None:
    ids = sentencepiece.encode(text)
    assert stream(sentencepiece, ids, SamplingParams()).text == sentencepiece.backend.decode(ids)


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["a", "e", " the", "in", "tin", " ", "\n", ".", "é", "日", "ate", "nn"]), max_size=20),
    stops=STOPS,
    keep=st.booleans(),
    chunk=CHUNKS,
)
def test_stop_strings(smollm2: Tokenizer, pieces: list[str], stops: tuple[str, ...], keep: bool, chunk: int) -> None:
    """Pieces are encoded apart, so that stop strings span tokens in every way."""
    ids = [i for piece in pieces for i in smollm2.encode(piece)]
    text = "".join(pieces)
    detokenizer = stream(smollm2, ids, SamplingParams(stop=stops, include_stop_str_in_output=keep), chunk)
    expected = first_stop(text, stops)
    if expected is None:
        assert (detokenizer.text, detokenizer.stop, detokenizer.num_tokens) == (text, None, len(ids))
        return
    end, stop = expected
    assert detokenizer.stop == stop
    assert detokenizer.text == text[: end if keep else end - len(stop)]
    taken = ids[: detokenizer.num_tokens]
    assert len(smollm2.decode(taken[:-1])) < end <= len(smollm2.decode(taken))


def test_holds_back_what_may_begin_a_stop_string(smollm2: Tokenizer) -> None:
    detokenizer = Detokenizer(smollm2, SamplingParams(stop=("\n\nUser:", "STOP")))
    seen = []
    for piece in ("Hi", "\n", "\n", "Use", "less", " S", "T", "OP", " never"):
        detokenizer.append(smollm2.encode(piece))
        seen.append(detokenizer.take_delta())
    assert seen == ["Hi", "", "", "", "\n\nUseless", " ", "", "", ""]
    assert detokenizer.stop == "STOP"
    detokenizer.finish()
    assert detokenizer.text == "Hi\n\nUseless "
    assert detokenizer.append(smollm2.encode("more")) == "STOP"


def test_finish_releases_what_was_held_back(smollm2: Tokenizer) -> None:
    detokenizer = Detokenizer(smollm2, SamplingParams(stop=("ab",)))
    [first, *_] = smollm2.encode("語")
    detokenizer.append([*smollm2.encode("xa"), first])
    assert detokenizer.text == "x"
    detokenizer.finish()
    assert (detokenizer.take_delta(), detokenizer.stop) == ("xa\ufffd", None)


def test_min_tokens_comes_before_stop_strings(smollm2: Tokenizer) -> None:
    ids = [i for piece in ("no", "no", "x", "n", "o", "no") for i in smollm2.encode(piece)]
    assert len(ids) == 6
    for min_tokens, text, num_tokens in ((0, "", 1), (1, "", 1), (2, "no", 2), (3, "nonox", 5), (6, "nonoxno", 6)):
        detokenizer = stream(smollm2, ids, SamplingParams(stop=("no",), min_tokens=min_tokens))
        assert (detokenizer.text, detokenizer.num_tokens) == (text, num_tokens), min_tokens


def test_the_first_space_of_llama_tokenizers(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("the end", add_special_tokens=False)
    alone, after = (Detokenizer(sentencepiece, SamplingParams(), continues_text=after) for after in (False, True))
    alone.append(ids)
    after.append(ids)
    assert alone.text == "the end"
    assert after.text == (" the end" if sentencepiece.strips_space else "the end")


def test_reference_texts(smollm2: Tokenizer) -> None:
    for case in read_json("smollm2_reference.json")["cases"]:
        assert stream(smollm2, case["ids"], SamplingParams()).text == case["text"]
