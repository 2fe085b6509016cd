"""The corpus of the tiny model (`cmx_jax.analysis.eval.corpus`) and the tokenizer that is trained on it.

Its sha256 is part of the training report.
"""

import json
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cmx_jax.analysis.eval.corpus import documents, fingerprint, split

__all__ = ["END", "documents", "fingerprint", "split", "train_tokenizer"]

END = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: every string round-trips, no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


if __name__ == "__main__":  # python scripts/tiny_corpus.py > corpus.json: to train elsewhere on the same text
    json.dump(documents(), sys.stdout)
