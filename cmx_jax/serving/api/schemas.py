"""Request bodies of the API: OpenAI's fields, and vLLM's additional ones.

A field that is not implemented and would change the answer is refused, unless it has the value that changes
nothing. An unknown field is refused, too: a misspelt one would be ignored otherwise. Null is the same as
absent, as clients send the null fields of earlier answers back.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

# fields that change nothing in the answer
IGNORED = frozenset(
    ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user", "verbosity")
)
# fields that are not implemented, and the values, besides null, with which they change nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
}
MAX_STOPS = 4  # OpenAI's limit

Document = dict[str, Any]
"""JSON object of a response, as OpenAI's API or this server's status defines it."""


def _listed(value: Any) -> Any:
    """Converts a single value to a list."""
    return [] if value is None else [value] if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
    """Converts the four forms of a prompt to a list of texts or of lists of ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(x) is int for x in value):
            return [value]
        if all(isinstance(x, str) for x in value) or all(
            isinstance(x, list) and all(type(t) is int for t in x) for x in value
        ):
            return value
    raise ValueError("expected text, token ids, or a list of texts or of lists of token ids, not empty")


_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_PROMPT = {"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]}
_STOP = {"anyOf": [{"type": "string"}, {**_TEXTS, "maxItems": MAX_STOPS}, {"type": "null"}]}
Text = Annotated[str, Field(min_length=1)]
Prompts = Annotated[list[str | list[int]], BeforeValidator(_prompts), WithJsonSchema(_PROMPT)]
Stops = Annotated[list[Text], Field(max_length=MAX_STOPS), BeforeValidator(_listed), WithJsonSchema(_STOP)]


class StreamOptions(BaseModel):
    """Options of a stream.

    Attributes:
      include_usage: True for a last event with the usage.
      continuous_usage_stats: True for the usage so far in each event (vLLM's option).
      include_obfuscation: OpenAI's option for padding, which is not used here.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Generate(BaseModel):
    """Common fields of completions and chat completions. Sampling parameters are checked by `SamplingParams`.

    Raises:
      ValueError: A field is unknown or not implemented.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1)
    stop: Stops = []
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    cache_salt: Text | None = None

    @model_validator(mode="after")
    def _known(self) -> "Generate":
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED or value is None:
                continue
            if name not in NEUTRAL:
                raise ValueError(f"field {name!r} is unknown: leave it out")
            if value not in NEUTRAL[name]:
                raise ValueError(f"field {name!r} is not supported: leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("field 'stream_options' is for streams only: set stream, or leave it out")
        if self.min_tokens and (self.stop or self.stop_token_ids or not self.ignore_eos):
            raise ValueError(
                "field 'min_tokens' is supported only with ignore_eos and without stops: set ignore_eos, or "
                "leave it out"
            )
        return self


class CompletionRequest(Generate):
    """`POST /v1/completions`."""

    prompt: Prompts
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: int | None = None


class ContentPart(BaseModel):
    """A part of a message's content; only text is supported."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


def _parts(value: Any) -> Any:
    """Converts a text to a list of one part."""
    if not isinstance(value, str | list):
        raise ValueError("expected a text, or a list of parts of type text")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _absent(value: Any) -> None:
    """Refuses the value of a field that is not supported, unless it is null or an empty list."""
    if value not in (None, []):
        raise ValueError("the field is not supported: leave it out")


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}
Content = Annotated[list[ContentPart], BeforeValidator(_parts), WithJsonSchema(_CONTENT)]


_EMPTY = {"anyOf": [{"type": "null"}, {"type": "array", "maxItems": 0}]}
Absent = Annotated[None, BeforeValidator(_absent), WithJsonSchema(_EMPTY)]


class Message(BaseModel):
    """One turn of a conversation. An assistant's may have the empty fields of an answer, and null as content.

    Raises:
      ValueError: A field is not supported, or there is no content.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, Absent] = Field(init=False)
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Content | None, WithJsonSchema(_CONTENT)]
    name: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError("content is null, expected a text, or a list of parts of type text")
        return self

    def as_dict(self) -> dict[str, str]:
        """Converts the message for a chat template, with its content as one text."""
        message = {"role": self.role, "content": "".join(part.text for part in self.content or ())}
        return message if self.name is None else message | {"name": self.name}


class ChatRequest(Generate):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
