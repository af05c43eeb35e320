"""Token ids of texts, and facts about tokenizers that litgpt's class does not give."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator

from litgpt.tokenizer import Tokenizer

from litgpt_whittle.data.token_file import Document


def encode(tokenizer: Tokenizer, texts: Iterable[str], batch: int = 64) -> Iterator[Document]:
    """Yield each document's token ids, without BOS and EOS."""
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, batch)):
        if tokenizer.backend == "huggingface":  # in parallel, with fewer calls
            for done in tokenizer.processor.encode_batch(chunk, add_special_tokens=False):
                yield Document(done.ids)
        else:
            yield from (Document(tokenizer.encode(text, bos=False, eos=False).tolist()) for text in chunk)


def capped(documents: Iterable[Document], max_tokens: int | None, has_eos: bool) -> Iterator[Document]:
    """Yield documents up to `max_tokens` tokens, including EOS after each if `has_eos`; the last document is cut."""
    left = max_tokens
    for document in documents:
        if left is not None:
            if left < 2:
                return
            document = document.cut(left - has_eos)
            left -= len(document.ids) + has_eos
        yield document


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer begins every text with BOS.

    litgpt's `use_bos` is also true for some instruction-tuned models whose prompts begin with BOS, but not their text.
    """
    if tokenizer.bos_id is None:
        return False
    if tokenizer.backend == "huggingface":
        return tokenizer.processor.encode("").ids[:1] == [tokenizer.bos_id]
    return tokenizer.use_bos


def largest_id(tokenizer: Tokenizer) -> int:
    """Return a tokenizer's largest token id, including added tokens."""
    if tokenizer.backend != "huggingface":
        return tokenizer.vocab_size - 1
    return max(tokenizer.processor.get_vocab(with_added_tokens=True).values(), default=0)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return a fingerprint of a tokenizer and its EOS token."""
    if tokenizer.backend == "huggingface":
        content = tokenizer.processor.to_str().encode()
    else:
        content = tokenizer.processor.serialized_model_proto()
    return hashlib.sha256(content + str(tokenizer.eos_id).encode()).hexdigest()[:16]
