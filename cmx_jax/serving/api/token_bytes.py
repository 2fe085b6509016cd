"""The bytes of single tokens, which may be parts of a character."""

import json
import re

from tokenizers import Tokenizer

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte in a vocabulary with byte fallback


class TokenBytes:
    """Converts tokens to bytes, so that the bytes of successive tokens are those of their text.

    Byte-level vocabularies write each byte as a printable character; vocabularies with byte fallback have
    tokens such as `<0xE2>`; SentencePiece's write a space as U+2581, also before the first word, where the
    decoder drops it. For all others the decoder's text is encoded.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._added = set(tokenizer.get_added_tokens_decoder())
        kinds = _decoder_kinds(json.loads(tokenizer.to_str()).get("decoder"))
        self._byte_level, self._fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._pieces = "Metaspace" in kinds or {"Replace", "Fuse"} <= kinds

    def __call__(self, token: int) -> bytes:
        """Returns the bytes of a token; none for an id without a token."""
        written = self._tokenizer.id_to_token(token) or ""
        if token in self._added:
            return written.encode()
        if self._byte_level and all(character in _BYTE_OF for character in written):
            return bytes(_BYTE_OF[character] for character in written)
        if self._fallback and (byte := BYTE.fullmatch(written)):
            return bytes([int(byte[1], 16)])
        if self._pieces:
            return written.replace("\u2581", " ").encode()
        return self._tokenizer.decode([token], skip_special_tokens=False).encode()


def _decoder_kinds(decoder: object) -> set[str]:
    """Returns the types of a decoder and of the decoders that it is made of."""
    if not isinstance(decoder, dict):
        return set()
    return {str(decoder.get("type"))}.union(*map(_decoder_kinds, decoder.get("decoders", ())))


def _byte_of_characters() -> dict[str, int]:
    """Returns the byte of each character in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of_characters()
