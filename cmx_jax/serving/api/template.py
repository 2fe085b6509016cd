"""A checkpoint's chat template: renders a conversation as a prompt, as Hugging Face's tokenizers do."""

import json
import time
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cmx_jax.errors import CmxError


class ChatTemplate:
    """`chat_template.jinja`, or `chat_template` of `tokenizer_config.json`, in a sandbox.

    Raises:
      CmxError: The source is not a template.
    """

    def __init__(self, source: str, tokens: dict[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
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
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program from the checkpoint: it may raise anything
            raise CmxError(f"the model's chat template refuses the messages: {error}") from None


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, by which training finds the assistant's tokens: its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` with the options and defaults that it has in transformers."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise TemplateError(message)
