"""Render conversations by a checkpoint's chat template, and find the assistant's answers in the text.

`transformers` renders the template, in its sandbox. Its tokenizer classes are not needed, so any checkpoint with a
`tokenizer.json` and a template works.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from litgpt.tokenizer import Tokenizer
from litgpt.utils import fix_and_load_json

from litgpt_whittle.data.sources import reason
from litgpt_whittle.data.token_file import Document
from litgpt_whittle.errors import UserError
from litgpt_whittle.tokenizer_files import TEMPLATES

Messages = list[dict[str, Any]]
"""A conversation: messages with the texts `role` and `content`"""

Span = tuple[int, int]
"""Range of characters, end exclusive"""

TODAY = date(2024, 7, 26)
"""The date for templates that write today's, so that tokens do not depend on the day; the default of Llama 3.1's"""

_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles"""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def conversation(messages: Any, path: str) -> Messages:
    """Return messages as `role` and `content`; those of ShareGPT, with `from` and `value`, are renamed.

    Args:
        messages: The messages of one conversation.
        path: The path they come from, for the error message.

    Raises:
        UserError: If a message lacks its role or its text.
    """
    found = []
    for message in messages if isinstance(messages, list) else [messages]:
        items = message.items() if isinstance(message, dict) else ()
        fields = {name: value for name, value in items if value is not None}
        if "from" in fields and "value" in fields:
            role = fields.pop("from")
            fields |= {"role": _ROLES.get(role, role), "content": fields.pop("value")}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise UserError(
                f"each message in {path!r} must have the texts 'role' and 'content', or 'from' and 'value', got "
                f"{', '.join(map(repr, fields)) or 'neither'}; mend the data, or set data.messages_column"
            )
        found.append(fields)
    return found


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, and the special tokens that it writes."""

    source: str
    """The template in Jinja"""
    tokens: Mapping[str, str]
    """Special tokens by name, such as `bos_token`"""

    @property
    def digest(self) -> str:
        """Fingerprint of all that determines a rendered text."""
        facts = json.dumps([self.source, dict(self.tokens), TODAY.isoformat()], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    @property
    def marks_answers(self) -> bool:
        """True if the template marks the assistant's answers by `{% generation %}`."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    def render(self, messages: Messages, path: str, prompts: bool = False) -> str:
        """Return the text of a conversation.

        Args:
            messages: The messages.
            path: The path they come from, for the error message.
            prompts: If true, the text ends with the prompt for the assistant's next answer.

        Raises:
            UserError: If the template refuses the messages.
        """
        return self._rendered(messages, path, add_generation_prompt=prompts)[0]

    def render_with_answers(self, messages: Messages, path: str) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and where the assistant's answers are in it.

        Answers are what the template marks. Without marks, an answer is what the text has beyond the prompt for it, up
        to the end of the text of the messages so far.

        Raises:
            UserError: If the template refuses the messages, or renders the first messages differently when more follow.
        """
        if self.marks_answers:
            return self._rendered(messages, path, return_assistant_tokens_mask=True)
        text, spans = self.render(messages, path), []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self.render(messages[:i], path, prompts=True)
                end = self.render(messages[: i + 1], path)
                if not (text.startswith(end) and end.startswith(prompt)):
                    raise UserError(
                        f"the chat template must render the first messages of a conversation in {path!r} alike when "
                        "more follow, so that answers can be found, and it does not; set data.chat_template to a "
                        "template with {% generation %} marks, or data.answers_only to false"
                    )
                spans.append((len(prompt), len(end)))
        return text, spans

    def _rendered(self, messages: Messages, path: str, **options: bool) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        settings: dict[str, Any] = {**self.tokens, **options, "strftime_now": TODAY.strftime}
        try:
            found: Any = render_jinja_template([messages], chat_template=self.source, **settings)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            roles = ", ".join(message["role"] for message in messages) or "none"
            raise UserError(
                f"the chat template cannot render a conversation of {path!r} with messages of the roles {roles} "
                f"({reason(error)}); mend the data, or set data.chat_template to another template"
            ) from None
        (text,), spans = found
        return text, [(start, end) for start, end in spans[0]] if spans else []


def find_template(asked: str | None, folder: Path | None, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """Return a chat template, or None if there is none.

    Args:
        asked: A template's file, or the name of one of the checkpoint's templates; None for the default one.
        folder: The checkpoint's directory, if known.
        tokenizer: The tokenizer; its special tokens are used without `folder`.

    Raises:
        UserError: If the template asked for is not found.
    """
    config = _read_config(folder)
    named = _templates(folder, config)
    if asked is not None and Path(asked).expanduser().is_file():
        source: str | None = Path(asked).expanduser().read_text(encoding="utf-8")
    elif asked is not None and asked not in named:
        known = f"the name of one of the checkpoint's ({', '.join(named)})" if named else "there"
        raise UserError(f"data.chat_template must be a file, or {known}, got {asked!r}; check the path")
    else:
        source = named.get(asked or "default")
    return None if source is None else ChatTemplate(source, _special_tokens(config, tokenizer))


def template_facts(folder: Path, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Return all templates of a checkpoint by name, and the special tokens that they may write."""
    config = _read_config(folder)
    return [_templates(folder, config), _special_tokens(config, tokenizer)]


def _read_config(folder: Path | None) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json, empty without one."""
    path = None if folder is None else folder / "tokenizer_config.json"
    return fix_and_load_json(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}


def _templates(folder: Path | None, config: Mapping[str, Any]) -> dict[str, str]:
    """Return a checkpoint's templates by name; files take precedence over tokenizer_config.json."""
    stored = config.get("chat_template") or {}
    if isinstance(stored, list):
        stored = {entry["name"]: entry["template"] for entry in stored}
    found = {"default": stored} if isinstance(stored, str) else dict(stored)
    if folder is not None:
        files = {path.stem: path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
        if (path := folder / "chat_template.jinja").is_file():
            files["default"] = path
        found |= {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    return found


def _special_tokens(config: Mapping[str, Any], tokenizer: Tokenizer | None) -> dict[str, str]:
    found = {name: token for name in _SPECIAL if (token := config.get(name)) is not None}
    if not found and tokenizer is not None and tokenizer.backend == "huggingface":
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        found = {name: tokenizer.processor.id_to_token(i) for name, i in ids.items() if i is not None}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in found.items()}


def encode_chats(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    conversations: Iterable[Messages],
    path: str,
    answers_only: bool,
    batch: int = 64,
) -> Iterator[Document]:
    """Yield each conversation's tokens; with `answers_only`, only those of the assistant's answers count.

    Raises:
        UserError: As in `ChatTemplate.render_with_answers`, or if the checkpoint has no tokenizer.json.
    """
    if tokenizer.backend != "huggingface":
        raise UserError(
            f"conversations need tokenizer.json, and {tokenizer.model_name!r} has only tokenizer.model; convert it by "
            "transformers"
        )
    conversations = iter(conversations)
    while chunk := list(islice(conversations, batch)):
        if answers_only:
            rendered = [template.render_with_answers(messages, path) for messages in chunk]
        else:
            rendered = [(template.render(messages, path), []) for messages in chunk]
        encodings = tokenizer.processor.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        for (_, spans), encoding in zip(rendered, encodings):
            yield Document(encoding.ids, _is_within(encoding.offsets, spans) if answers_only else None)


def _is_within(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Return for each token whether it overlaps one of the spans.

    Args:
        offsets: Ranges of characters of the tokens. A range is empty if the tokenizer trims white space from it.
        spans: Ranges of characters.
    """
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    is_empty, found = starts == ends, np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        found |= (ends > start) & np.where(is_empty, ends <= end, starts < end)
    return found.tolist()
