"""A checkpoint's chat template: renders a conversation as a prompt, as Hugging Face's tokenizers do."""

import json
import time
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cmx_jax.errors import CmxError


class ChatTemplate:
    """`chat_template.jinja`, or `chat_template` of `tokenizer_config.json`, in a sandbox.

    Raises:
      CmxError: The source is not a template.
    """

    def __init__(self, source: str, tokens: dict[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(tokens, raise_exception=_raise, strftime_now=time.strftime)
        try:
            self._template: Template = environment.from_string(source)
        except TemplateError as error:
            raise CmxError(f"the checkpoint's chat template is refused ({error})") from None

    @classmethod
    def read(cls, directory: Path) -> "ChatTemplate | None":
        """Reads the template of a checkpoint. Returns None if it has none.

        Raises:
          CmxError: A file of the checkpoint cannot be read.
        """
        try:
            path = directory / "tokenizer_config.json"
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            path = directory / "chat_template.jinja"
            source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
        except (OSError, ValueError) as error:
            raise CmxError(f"{path}: cannot be read ({error})") from None
        if isinstance(source, list):  # several templates with names
            source = next((named["template"] for named in source if named["name"] == "default"), None)
        names = [name for name in config if name.endswith("_token") and config[name]]
        values = {name: config[name] for name in names}
        tokens = {name: v["content"] if isinstance(v, dict) else str(v) for name, v in values.items()}
        return None if source is None else cls(source, tokens)

    def render(self, messages: list[dict[str, str]]) -> str:
        """Returns the prompt for the assistant's next turn.

        Raises:
          CmxError: The template refuses the messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True)
        except Exception as error:  # a template is a program from the checkpoint: it may raise anything
            raise CmxError(f"the model's chat template refuses the messages: {error}") from None


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise TemplateError(message)
