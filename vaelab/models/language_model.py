"""Causal language models that read vectors of a picture between their own tokens, as LLaVA does.

Liu et al., "Visual Instruction Tuning" (2023), section 4.1: a conversation is written in the model's chat template, and
the picture's tokens take the place of a mark in the user's first message. Any causal language model of transformers
fits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vaelab.core import devices, hub
from vaelab.core.validate import one_of
from vaelab.models.registry import embedded_language_path

FILES = (
    "config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "*.jinja", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors",
)  # fmt: skip
"""The files of a repository that transformers reads; the other files hold the same weights for other frameworks."""
PICTURE = "<image>"
"""The mark in a message that the picture's tokens replace."""
IGNORED = -100
"""Label of a token that the loss leaves out."""
TEMPLATES = {
    "llava": (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}USER: {{ message['content'] }} "
        "{% else %}ASSISTANT: {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
"""Chat templates for models without one: that of LLaVA 1.5 with Vicuna, and that of MPT-7B-Chat."""


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str = ""


class Segment(NamedTuple):
    """A part of a conversation."""

    tokens: tuple[int, ...]
    """Token ids; empty for the picture."""
    kind: str
    """``prompt``, ``answer`` (what the model learns to write) or ``picture``."""


class Batch(NamedTuple):
    """Conversations as the model reads them, padded to one length L."""

    embeddings: Tensor
    """(B, L, d)"""
    mask: Tensor
    """(B, L), 1 for tokens and 0 for padding."""
    labels: Tensor
    """(B, L) token ids of the answers; all others are -100."""


class LanguageModel:
    """A causal language model with its tokenizer and chat template."""

    def __init__(self, model: Any, tokenizer: Any, name: str = "language model", parameter: str = "language_model"):
        """Take a loaded model.

        Args:
            model: a causal language model of transformers.
            tokenizer: its tokenizer, with a chat template.
            name: the name under which results mention the model.
            parameter: the notebook parameter that gave the name; errors begin with it.

        Raises:
            ValueError: the tokenizer has no chat template or no end token, or the template loses the picture's mark.
        """
        self.model, self.tokenizer, self.name, self._parameter = model.eval(), tokenizer, name, parameter
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"{parameter}: {name!r} has no chat template; give chat_template: {' or '.join(TEMPLATES)}"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{parameter}: the tokenizer of {name!r} has no end token")
        self.padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        whole = self._render([Turn("question", "answer")], 1, complete=True)
        if whole.count(PICTURE) != 1:
            raise ValueError(f"{parameter}: the chat template of {name!r} must keep {PICTURE} once, got {whole!r}")
        self._end = whole.rpartition("answer")[2].strip()

    @property
    def width(self) -> int:
        """The number of channels of a token's embedding."""
        return self.model.get_input_embeddings().embedding_dim

    def segments(self, turns: Sequence[Turn], *, complete: bool = True) -> list[Segment]:
        """Write a conversation about a picture as tokens.

        Args:
            turns: the questions with their answers.
            complete: whether the last answer is written; if not, the conversation ends where the model goes on.

        Raises:
            ValueError: the template does not write a conversation's turns one after another.
        """
        found, written = [], ""
        for count in range(1, len(turns) + 1):
            prompt = self._render(turns, count, complete=False)
            found += self._prompt_segments(self._rest(prompt, written))
            if count == len(turns) and not complete:
                break
            written = self._render(turns, count, complete=True)
            answer = self._rest(written, prompt)
            if count == len(turns) and self.tokenizer.eos_token not in answer:
                answer = answer.rstrip("\n") + self.tokenizer.eos_token
            found.append(Segment(self._tokens(answer), "answer"))
        return found

    def assemble(self, conversations: Sequence[Sequence[Segment]], pictures: Tensor, *, left: bool = False) -> Batch:
        """Embed conversations, with the pictures' tokens in their places.

        Args:
            conversations: B lists of segments.
            pictures: (B, T, d) embeddings of the pictures; T may be 0.
            left: whether the padding stands on the left, as generation needs it.
        """
        embed = self.model.get_input_embeddings()
        rows, labels = [], []
        for segments, picture in zip(conversations, pictures, strict=True):
            parts, targets = [], []
            for segment in segments:
                ids = torch.tensor(segment.tokens, dtype=torch.long, device=pictures.device)
                parts.append(picture.to(embed.weight.dtype) if segment.kind == "picture" else embed(ids))
                learned = segment.kind == "answer"
                targets.append(ids if learned else ids.new_full((len(parts[-1]),), IGNORED))
            rows.append(torch.cat(parts))
            labels.append(torch.cat(targets))
        longest = max(map(len, rows))
        ends = [(longest - len(row), 0) if left else (0, longest - len(row)) for row in rows]
        mask = [F.pad(row.new_ones(len(row), dtype=torch.long), end) for row, end in zip(rows, ends, strict=True)]
        return Batch(
            torch.stack([F.pad(row, (0, 0, *end)) for row, end in zip(rows, ends, strict=True)]),
            torch.stack(mask),
            torch.stack([F.pad(row, end, value=IGNORED) for row, end in zip(labels, ends, strict=True)]),
        )

    def loss(self, conversations: Sequence[Sequence[Segment]], pictures: Tensor) -> Tensor:
        """Compute the cross-entropy of the answers' tokens, a scalar; the arguments are those of :meth:`assemble`."""
        batch = self.assemble(conversations, pictures)
        return self.model(inputs_embeds=batch.embeddings, attention_mask=batch.mask, labels=batch.labels).loss

    @torch.no_grad()
    def answer(self, questions: Sequence[str], pictures: Tensor, longest: int = 64) -> list[str]:
        """Answer one question about each picture, by greedy decoding.

        Args:
            questions: B questions.
            pictures: (B, T, d) embeddings of the pictures; T may be 0.
            longest: the number of tokens after which an answer is cut.
        """
        conversations = [self.segments([Turn(question)], complete=False) for question in questions]
        batch = self.assemble(conversations, pictures, left=True)
        tokens = self.model.generate(
            inputs_embeds=batch.embeddings, attention_mask=batch.mask, max_new_tokens=longest, do_sample=False,
            pad_token_id=self.padding, eos_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [(text.split(self._end)[0] if self._end else text).strip() for text in texts]

    def _render(self, turns: Sequence[Turn], count: int, *, complete: bool) -> str:
        messages = []
        for number, turn in enumerate(turns[:count]):
            mark = "" if number else f"{PICTURE}\n"
            messages.append({"role": "user", "content": f"{mark}{turn.question.replace(PICTURE, '').strip()}"})
            messages.append({"role": "assistant", "content": turn.answer})
        messages = messages if complete else messages[:-1]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not complete)
        begin = self.tokenizer.bos_token
        return begin + text if begin and not text.startswith(begin) else text

    def _rest(self, text: str, before: str) -> str:
        if not text.startswith(before):
            raise ValueError(
                f"{self._parameter}: the chat template of {self.name!r} does not write turns one after another"
            )
        return text[len(before) :]

    def _prompt_segments(self, text: str) -> list[Segment]:
        before, mark, after = text.partition(PICTURE)
        parts = [
            Segment(self._tokens(before), "prompt"),
            Segment((), "picture"),
            Segment(self._tokens(after), "prompt"),
        ]
        return parts if mark else parts[:1]

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)


def load_language_model(
    name: str, *, device: str = "auto", revision: str | None = None, precision: str = "float32",
    chat_template: str = "", parameter: str = "language_model",
) -> LanguageModel:  # fmt: skip
    """Load a causal language model.

    Args:
        name: ``embedded``, an id on the hub, or a folder saved by transformers.
        device: the device that the model runs on.
        revision: the revision on the hub.
        precision: the precision of the weights.
        chat_template: a key of :data:`TEMPLATES`; empty means the tokenizer's own.
        parameter: the notebook parameter that gave the name; errors begin with it.

    Raises:
        ValueError: there is no such folder or id, it holds no causal language model, a weight is missing, or there is
            no chat template.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if chat_template:
        one_of("chat_template", chat_template, TEMPLATES)
    path = str(embedded_language_path()) if name == "embedded" else name
    folder = hub.find_folder(path, revision=revision, files=FILES, parameter=parameter)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=devices.dtype(precision), use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{parameter}: {name!r} holds no causal language model ({error})") from error
    if report["missing_keys"]:  # transformers only logs this, and fills them with random numbers
        raise ValueError(f"{parameter}: {name!r} lacks {len(report['missing_keys'])} of the model's weights")
    if chat_template:
        tokenizer.chat_template = TEMPLATES[chat_template]
    return LanguageModel(model.to(devices.pick(device)), tokenizer, Path(name).name, parameter)
