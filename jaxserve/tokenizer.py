"""Text to token ids and back, for a Hugging Face folder or a GGUF file. Knows no requests; streaming is detokenizer.py's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from jaxserve import gguf_tokenizer
from jaxserve.chat_template import ChatTemplate, encode
from jaxserve.errors import ModelLoadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads the tokenizer of a .gguf file, or of a folder with a tokenizer.json.

    Raises:
        ModelLoadError: there is none, it is broken, or it is of a kind that is not supported.
    """
    path = Path(path)
    return _from_gguf(path) if path.suffix == ".gguf" else _from_folder(path)


class Tokenizer:
    """A model's tokenizer. Its methods may be called from any thread.

    Attributes:
        backend: the Rust tokenizer.
        vocab_size: tokens, added ones included; a model's logits may be padded to more.
        special_ids: the control tokens, which skip_special_tokens leaves out of a text.
        eos_token_id, bos_token_id: None where the model has none.
        special_tokens: their names (eos_token, bos_token, ...) -> how they are spelled.
        end_token_ids: the ids that end a completion, as far as the tokenizer's files say; generation_config may add some.
        strips_space: whether a text's first space is dropped, because encoding put one there (Llama 2, Mistral).
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, renderer: PreTrainedTokenizerBase, end_token_ids: Sequence[int] | None = None
    ) -> None:
        """
        Args:
            renderer: brings the chat template and the names of the special tokens.
            end_token_ids: just the end-of-sequence token, if not given.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.eos_token_id = self._id_of(renderer.eos_token)
        self.bos_token_id = self._id_of(renderer.bos_token)
        self.special_tokens = {name: str(token) for name, token in renderer.special_tokens_map.items() if isinstance(token, str)}
        eos = () if self.eos_token_id is None else (self.eos_token_id,)
        self.end_token_ids = eos if end_token_ids is None else tuple(end_token_ids)
        self._chat = ChatTemplate(backend, renderer)
        self._bytes: dict[int, bytes] = {}
        self._spelling = _Spelling(str(backend.decoder))
        self.strips_space, self._is_spelled = self._probe_decoder()

    @cached_property
    def longest_token(self) -> int:
        """Characters of text that one token stands for at most."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)))

    @property
    def chat_template(self) -> str | None:
        """The chat template's Jinja text; None where the model has none."""
        return self._chat.source

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to ids; a special token that the text spells becomes that token.

        Args:
            add_special_tokens: put begin- and end-of-sequence around it, where the model wants them.

        Raises:
            InvalidRequestError: the text is no Unicode text.
        """
        return encode(self.backend, text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids to text; bytes that are no UTF-8 become U+FFFD, and ids outside the vocabulary nothing.

        Equal to the Rust tokenizer's decode, but for runs of SentencePiece byte tokens that are no UTF-8: there only the
        faulty bytes become U+FFFD and not the whole run, since a stream cannot take back what it has shown.
        """
        if not self._is_spelled:
            return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        text = self._join(i for i in ids if not (skip_special_tokens and i in self.special_ids))
        return text.removeprefix(" ") if self.strips_space else text

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        """Chat messages to prompt ids; what a message spells like a control token is encoded as plain text.

        Args:
            messages: OpenAI's: role, content and so on.
            add_generation_prompt: end with the beginning of the assistant's message.
            **kwargs: tools, documents, continue_final_message, and the template's own options (enable_thinking).

        Raises:
            InvalidRequestError: the model has no template, or the template refuses the messages.
        """
        return self._chat.encode(messages, add_generation_prompt, kwargs)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """What `apply_chat_template` encodes, as text. To encode this text takes spelled control tokens for real ones."""
        return self._chat.render(messages, add_generation_prompt, kwargs)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, as UTF-8; perhaps a part of a character. Empty outside the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self.backend.id_to_token(token_id)
            found = self._bytes[token_id] = b"" if token is None else self._spelling.bytes_of(token)
        return found

    def token_text(self, token_id: int) -> str:
        """One token as text, for logprobs; parts of characters become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _join(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def _probe_decoder(self) -> tuple[bool, bool]:
        """Whether the decoder drops a first space, and whether it else joins the tokens' bytes as `_Spelling` has them."""
        ids = self.backend.encode(" x é\n", add_special_tokens=False).ids
        joined, decoded = self._join(ids), self.backend.decode(ids, skip_special_tokens=False)
        strips_space = joined.startswith(" ") and decoded == joined[1:]
        return strips_space, strips_space or decoded == joined


class _Spelling:
    """How a decoder's tokens spell bytes: in GPT-2's byte alphabet, or as text with marked spaces and tokens for bytes."""

    def __init__(self, decoder: str) -> None:
        """
        Args:
            decoder: the Rust decoder's own description.
        """
        self.byte_of = _byte_alphabet() if "ByteLevel" in decoder else None
        self.has_byte_tokens = "ByteFallback" in decoder
        self.has_marked_spaces = "▁" in decoder

    def bytes_of(self, token: str) -> bytes:
        if self.byte_of is not None:
            try:
                return bytes([self.byte_of[char] for char in token])
            except KeyError:  # an added token, which is plain text
                return token.encode()
        if self.has_byte_tokens and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return (token.replace("▁", " ") if self.has_marked_spaces else token).encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, and the rest for U+0100 upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _from_gguf(path: Path) -> Tokenizer:
    from jaxserve.models.loading.gguf_file import open_gguf  # not above: it brings jax, which no tokenizer needs

    parts = gguf_tokenizer.build_tokenizer(open_gguf(path).metadata, name=str(path))
    _quiet_transformers()
    from transformers import PreTrainedTokenizerFast

    # An empty tokenizer as renderer, since transformers would copy the real one, which takes seconds for large vocabularies.
    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    renderer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=empty, chat_template=parts.chat_template, **parts.special_tokens
    )
    return Tokenizer(parts.backend, renderer, parts.end_ids)


def _from_folder(path: Path) -> Tokenizer:
    _quiet_transformers()
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever transformers raises about a folder, it is the folder's fault
        raise ModelLoadError(f"{path} has no tokenizer that can be loaded: {error}") from error
    if not loaded.is_fast:
        raise ModelLoadError(
            f"{path} has no tokenizer.json, and its {type(loaded).__name__} needs Python code. Convert it first."
        )
    return Tokenizer(loaded.backend_tokenizer, loaded)


def _quiet_transformers() -> None:
    """Keeps transformers from saying, when it is imported, that there is no torch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
