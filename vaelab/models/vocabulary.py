"""Find words of a prompt that a pipeline's text models cannot represent."""

import re
from collections.abc import Iterable
from typing import Any

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
"""The attributes in which pipelines hold their tokenizers."""
WORD = re.compile(r"\w+|[^\w\s]+")
MOST_REPORTED = 100
"""After this number of unknown words, a process reports no more."""
_reported: set[str] = set()


def unknown_words(tokenizer: Any, texts: Iterable[str]) -> list[str]:
    """Find the words (and runs of other characters) in ``texts`` that a tokenizer cannot represent; they are returned
    in lower case, sorted.

    A word is unknown if one of its characters has no token other than the token for unknown text. Byte-level
    tokenizers, such as CLIP's, represent everything. The tokenizer of the embedded model (the small model shipped with
    the package) has no tokens for bytes: its vocabulary is a closed list of words, one token each. A word that it must
    spell in letters was in no prompt of the text model's training, and is therefore unknown too. The same holds for
    single letters other than the article "a".
    """
    words = sorted({word for text in texts for word in WORD.findall(text.lower())})
    if not words:
        return []
    closed = _is_closed(tokenizer)
    rows = tokenizer(words, add_special_tokens=False).input_ids

    def is_unknown(word: str, row: list[int]) -> bool:
        spelled = word.isalnum() and (len(row) > 1 or (len(word) == 1 and word != "a"))
        return tokenizer.unk_token_id in row or (closed and spelled)

    return [word for word, row in zip(words, rows, strict=True) if is_unknown(word, row)]


def require_known_words(pipeline: Any, prompt: str) -> None:
    """Raise ValueError if a prompt has words that the pipeline's first text model does not know."""
    if unknown := unknown_words(pipeline.tokenizer, [prompt]):
        raise ValueError(f"prompt: the text model does not know {', '.join(map(repr, unknown))}")


def _is_closed(tokenizer: Any) -> bool:
    """Whether a byte-pair vocabulary of CLIP's kind lacks the tokens of single bytes, here of 0xC3."""
    whole_word, byte = tokenizer.convert_tokens_to_ids(["a</w>", "\u00c3"])
    return whole_word not in (None, tokenizer.unk_token_id) and byte in (None, tokenizer.unk_token_id)


def report_unknown_words(pipeline: Any, texts: Iterable[str]) -> None:
    """Print the words that none of a pipeline's text models can represent; each word once per process."""
    texts = list(texts)
    tokenizers = [part for name in TOKENIZERS if (part := getattr(pipeline, name, None)) is not None]
    if not tokenizers or len(_reported) >= MOST_REPORTED:
        return
    unknown = set.intersection(*(set(unknown_words(tokenizer, texts)) for tokenizer in tokenizers))
    if fresh := sorted(unknown - _reported):
        _reported.update(fresh)
        more = f" and {len(fresh) - 8} more" if len(fresh) > 8 else ""
        print(
            f"prompts: the text model does not know {', '.join(map(repr, fresh[:8]))}{more}; "
            "a picture of these words shows nothing that they mean"
        )
