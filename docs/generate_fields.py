"""Writes docs/api-fields.md from the request structs of the server: every field of every API and what becomes of it.

Owns the words about fields; names and types come from the structs. Invariant: a field without words, and words without a
field, are an error, so the page has neither a gap nor a ghost. ``--check`` only compares and exits with 1 when it is out of date.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
from generated import write_or_compare
from msgspec import inspect

from octavo.server.chat import ChatRequest
from octavo.server.completions import CompletionRequest
from octavo.server.generate import GenerateRequest
from octavo.server.messages_input import MessagesRequest, OutputConfig, OutputFormat, Said, Thinking
from octavo.server.responses_input import (
    ReasoningOptions,
    ResponsesRequest,
    ResponsesStreamOptions,
    TextFormat,
    TextOptions,
)
from octavo.server.sampling_fields import (
    NO_EFFECT,
    JsonSchemaFormat,
    ResponseFormat,
    StreamOptions,
    StructuredOutputs,
)
from octavo.server.tokenize import DetokenizeRequest, TokenizeRequest

PAGE = Path(__file__).with_name("api-fields.md")
Struct = type[msgspec.Struct]
Words = Mapping[str, str]

HEAD = """\
# Fields of the APIs

Every field that a request may have, and what becomes of it:

- **yes**: it has an effect.
- **no effect**: it is accepted, and nothing depends on it. These are the fields with which clients tell OpenAI who they are and
  how to store or bill an answer.
- **refused**: a 400 with the field as `param`, unless it has the one value that says what happens anyway.
- **-**: the API has no such field.

A field that is not on this page is a 400 with `param` its name and `code` `unsupported_field`, unless its value is `null`:
null counts as absent everywhere. Objects within a request are as strict, with three exceptions that clients rely on: messages
may carry other keys (they go to the chat template), and so may the definitions of tools and JSON schemas.

Ranges and meanings of sampling parameters are those of [SamplingParams](python-api.md#sampling-parameters); where one is
absent, the model's `generation_config.json` decides, unless the server was started with `--generation-config octavo`. The
bounds of lists and texts are among the [limits](serving.md#limits). This page is written by `make config-docs` from the code.
"""

MATRIX: tuple[tuple[str, Struct], ...] = (
    ("completions", CompletionRequest), ("chat", ChatRequest), ("generate", GenerateRequest))

GENERATION: Words = {
    "prompt": "a text, token ids, or a list of texts or of lists of ids (`/generate`: one text); special-token strings in it are "
    "special tokens",
    "messages": "the conversation; roles system, developer, user, assistant and tool; contents are texts or parts of type text",
    "model": "a served name; may be left out",
    "stream": "the answer comes piece by piece",
    "stream_options": "see [below](#stream_options); needs `stream`",
    "n": "continuations per prompt",
    "best_of": "continuations to compute, of which the n best are returned",
    "max_tokens": "most tokens per continuation. Completions and generate: 16 where absent, and with `echo` 0 only scores the "
    "prompt. Chat: older name of `max_completion_tokens`",
    "max_completion_tokens": "most tokens of the answer; where absent, all that fit",
    "min_tokens": "no end before so many tokens",
    "temperature": "0 is greedy",
    "top_p": "nucleus mass",
    "top_k": "most likely tokens to choose from; -1: all",
    "min_p": "least probability relative to the best token",
    "repetition_penalty": "above 1: tokens of prompt and output become less likely",
    "presence_penalty": "once per token that the output holds",
    "frequency_penalty": "for every occurrence in the output",
    "logit_bias": "token id, as a string -> -100 to 100",
    "seed": "the same seed gives the same tokens in any batch",
    "stop": "one string or several that end a continuation",
    "stop_token_ids": "token ids that end it",
    "include_stop_str_in_output": "the stop string stays in the text",
    "ignore_eos": "go on after the model's end token",
    "skip_special_tokens": "special tokens are left out of the text",
    "spaces_between_special_tokens": "where they are not left out",
    "allowed_token_ids": "only these may be sampled",
    "bad_words": "texts that may not be generated",
    "use_beam_search": "beam search of width `best_of` (or `n`); sampling defaults of the model do not count then",
    "length_penalty": "exponent of the length in a beam's score",
    "early_stopping": "end of a beam search: true, false or \"never\"",
    "logprobs": "completions: alternatives per token, 0 for the token alone. Chat: whether tokens come with their logprobs",
    "top_logprobs": "alternatives per token; needs `logprobs`",
    "prompt_logprobs": "alternatives per token of the prompt, in vLLM's shape; not with `stream`",
    "echo": "completions: the answer begins with the prompt. Chat: with `continue_final_message`, with that message",
    "response_format": "text, json_object or json_schema, see [below](#response_format)",
    "structured_outputs": "see [below](#structured_outputs)",
    "guided_json": "older name of `structured_outputs.json`",
    "guided_regex": "older name of `structured_outputs.regex`",
    "guided_choice": "older name of `structured_outputs.choice`",
    "guided_grammar": "older name of `structured_outputs.grammar`",
    "tools": "functions that the model may call, see [tools](serving.md#tools)",
    "tool_choice": "none, auto, required, or a named function",
    "parallel_tool_calls": "false: at most one call",
    "reasoning_effort": "for chat templates that know it, or a switch for thinking; for other models 400",
    "include_reasoning": "false leaves the reasoning out of the answer",
    "modalities": "refused unless `[\"text\"]`",
    "documents": "for chat templates that know them; for others 400",
    "chat_template": "a template for this request; only where the server was started with `--trust-request-chat-template`",
    "chat_template_kwargs": "variables of the chat template, such as `{\"enable_thinking\": false}`",
    "add_generation_prompt": "default true, and false with `continue_final_message`",
    "continue_final_message": "the answer continues the last message; excludes `add_generation_prompt`",
    "add_special_tokens": "put the tokenizer's special tokens around the prompt; default true for completions, false for chat",
    "truncate_prompt_tokens": "keep the last so many tokens of the prompt; -1: as many as leave room for the answer",
    "return_token_ids": "ids of prompt and answer beside the texts",
    "return_tokens_as_token_ids": "logprobs name tokens `token_id:5`",
    "priority": "lower is sooner; a value other than 0 needs `--scheduling-policy priority`",
    "cache_salt": "requests with other salts share no prefix cache with this one",
    "request_id": "takes part in the answer's id; 1 to 256 printable ASCII characters",
    "timeout": "seconds that the request may take in all, see [deadlines](serving.md#deadlines)",
    "user": "nothing is known of users here",
    "metadata": "nothing is kept here",
    "safety_identifier": "nothing is known of users here",
    "prompt_cache_key": "prefixes are found by their tokens",
    "store": "nothing is kept here",
    "service_tier": "auto or default, others are refused",
}

RESPONSES: Words = {
    "input": "a text, or items: messages, function_call, function_call_output, reasoning",
    "model": "a served name; may be left out",
    "instructions": "a system message before the input",
    "max_output_tokens": "most tokens of the answer, reasoning included; where absent, all that fit",
    "tools": "functions that the model may call, flat as this API has them; other types of tools are 400",
    "tool_choice": "none, auto, required, or `{\"type\": \"function\", \"name\": ...}`",
    "text": "see [below](#text)",
    "reasoning": "see [below](#reasoning)",
    "top_logprobs": "alternatives per token",
    "include": "`message.output_text.logprobs` gives logprobs, `reasoning.encrypted_content` is accepted without effect, "
    "others are 400",
    "stream_options": "`include_obfuscation`, without effect",
}
RESPONSES_NO_EFFECT: Words = {
    "user": "comes back in the answer",
    "metadata": "comes back in the answer",
    "safety_identifier": "comes back in the answer",
    "prompt_cache_key": "comes back in the answer",
    "store": "nothing is kept; the answer says `false`",
    "service_tier": "auto or default, others are refused; the answer says `default`",
}
RESPONSES_REFUSED: Words = {
    "truncation": "`disabled`",
    "previous_response_id": "`null`: nothing is kept, send everything as `input`",
    "conversation": "`null`: nothing is kept",
    "background": "`false`: nothing is kept",
}

MESSAGES: Words = {
    "messages": "roles user, assistant and system; blocks text, thinking, tool_use and tool_result; a last message of the "
    "assistant is continued",
    "model": "a served name; may be left out",
    "max_tokens": "required, as in Anthropic's API",
    "system": "a text, or blocks of type text",
    "tools": "with `input_schema`; types other than custom are 400",
    "tool_choice": "auto, any, tool or none; `disable_parallel_tool_use` within it",
    "thinking": "see [below](#thinking)",
    "output_config": "see [below](#output_config)",
    "stop_sequences": "strings that end the answer",
}
MESSAGES_NO_EFFECT: Words = {
    "metadata": "nothing is known of users here",
    "cache_control": "every prompt's prefix is cached; so too within blocks",
    "service_tier": "auto or standard_only, others are refused",
}

TOKENIZE: Words = {
    "model": "a served name; may be left out",
    "prompt": "a text; this or `messages`",
    "messages": "a conversation, as for chat",
    "add_special_tokens": "default true for a prompt, false for messages",
    "return_token_strs": "the tokens' spelling too",
    "tokens": "ids that become a text",
}

NESTED: tuple[tuple[str, str, Struct, Words, Words, Words], ...] = (
    # heading, introduction, struct, honoured, no effect, refused
    ("stream_options", "Of completions and chat.", StreamOptions,
     {"include_usage": "one more chunk at the end, with usage",
      "continuous_usage_stats": "usage in every chunk; needs `include_usage`"},
     {"include_obfuscation": "no answer is padded"}, {}),
    ("response_format", "Of completions and chat.", ResponseFormat,
     {"type": "text, json_object or json_schema", "json_schema": "the schema, with the type json_schema"}, {}, {}),
    ("response_format.json_schema", "Within it.", JsonSchemaFormat,
     {"name": "required", "schema": "a JSON schema; where absent, any object"},
     {"strict": "the schema is always kept to", "description": "nothing reads it"}, {}),
    ("structured_outputs", "Of completions, chat, responses and generate: exactly one of the first five. See "
     "[structured outputs](serving.md#structured-outputs).", StructuredOutputs,
     {"json": "a JSON schema, as an object or as text", "regex": "the whole output matches it",
      "choice": "the output is one of these texts", "grammar": "in Lark's notation, as llguidance reads it, or GBNF",
      "json_object": "true: any JSON object", "disable_any_whitespace": "JSON without spaces and line breaks",
      "disable_additional_properties": "objects hold no properties but those that the schema names",
      "whitespace_pattern": "a regex for the space between the parts of JSON"}, {}, {}),
    ("text", "Of responses.", TextOptions, {"format": "see the next table"}, {}, {"verbosity": "`medium`"}),
    ("text.format", "Within it.", TextFormat,
     {"type": "text, json_object or json_schema", "name": "required with json_schema", "schema": "required with json_schema"},
     {"strict": "the schema is always kept to", "description": "nothing reads it"}, {}),
    ("reasoning", "Of responses.", ReasoningOptions, {"effort": "as `reasoning_effort` of chat"}, {},
     {"summary": "`auto`", "generate_summary": "`auto`", "context": "`auto`", "mode": "`standard`"}),
    ("stream_options of responses", "", ResponsesStreamOptions, {}, {"include_obfuscation": "no answer is padded"}, {}),
    ("thinking", "Of messages.", Thinking,
     {"type": "enabled, adaptive or disabled; 400 where the model cannot do as it is told",
      "display": "omitted leaves the reasoning out of the answer; summarized is as complete as no display"}, {},
     {"budget_tokens": "`max_tokens` - 1 or more: only the model ends its reasoning"}),
    ("output_config", "Of messages.", OutputConfig,
     {"effort": "as `reasoning_effort` of chat", "format": "see the next table"}, {}, {}),
    ("output_config.format", "Within it.", OutputFormat,
     {"type": "json_schema", "schema": "a JSON schema that the answer follows"}, {}, {}),
)

# What clients know from elsewhere and is unknown here: 400 with code unsupported_field.
UNKNOWN: tuple[tuple[str, Struct, str], ...] = (
    ("/v1/completions", CompletionRequest, "suffix prompt_embeds logits_processors kv_transfer_params vllm_xargs detokenize "
     "guided_decoding_backend guided_whitespace_pattern repetition_detection logprob_token_ids"),
    ("/v1/chat/completions", ChatRequest, "functions function_call audio prediction web_search_options verbosity "
     "prompt_cache_retention mm_processor_kwargs kv_transfer_params vllm_xargs thinking_token_budget repetition_detection "
     "logprob_token_ids logits_processors"),
    ("/v1/responses", ResponsesRequest, "prompt max_tool_calls n logprobs max_tokens"),
    ("/v1/messages", MessagesRequest, "container mcp_servers context_management inference_geo betas"),
)


def page() -> str:
    """The whole page."""
    parts = [HEAD, "\n## Completions, chat and generate\n\n", _matrix(), "\n## Responses\n\n"]
    shared = {name: GENERATION[name] for name in _names(ResponsesRequest)
              if name in GENERATION and name not in RESPONSES and name not in RESPONSES_NO_EFFECT}
    parts += [_table(ResponsesRequest, {**shared, **RESPONSES}, RESPONSES_NO_EFFECT, RESPONSES_REFUSED), "\n## Messages\n\n"]
    shared = {name: GENERATION[name] for name in ("stream", "temperature", "top_p", "top_k", "timeout")}
    parts += [_table(MessagesRequest, {**shared, **MESSAGES}, MESSAGES_NO_EFFECT, {}),
              "\n`/v1/messages/count_tokens` takes ", _listed(_names(Said)), ".\n", "\n## Tokenize and detokenize\n\n"]
    shared = {name: GENERATION[name] for name in _names(TokenizeRequest) if name not in TOKENIZE}
    known = {**shared, **TOKENIZE}
    parts += [_table(TokenizeRequest, _only(known, TokenizeRequest), {}, {}), "\n`/detokenize`:\n\n",
              _table(DetokenizeRequest, _only(known, DetokenizeRequest), {}, {}), "\n## Objects within requests\n"]
    for heading, introduction, kind, honoured, ignored, refused in NESTED:
        text = f"{introduction}\n\n" if introduction else ""
        parts += [f"\n### {heading}\n\n", text, _table(kind, honoured, ignored, refused)]
    parts += ["\n## Fields of others\n\nKnown from OpenAI, Anthropic or vLLM, and unknown here:\n\n",
              "| API | fields that are 400 |\n|---|---|\n"]
    for path, kind, names in UNKNOWN:
        ghosts = set(names.split()) & set(_names(kind))
        assert not ghosts, f"{path} knows {ghosts}"
        parts.append(f"| `{path}` | {_listed(names.split())} |\n")
    return "".join(parts)


def _matrix() -> str:
    kinds = [kind for _, kind in MATRIX]
    types: dict[str, dict[str, None]] = {}
    for kind in kinds:
        for field in _fields(kind):
            types.setdefault(field.name, {})[_type(field.type)] = None
    types["prompt"] = dict.fromkeys(["string or list"])
    _complete(types, GENERATION, "completions, chat and generate")
    assert set(NO_EFFECT) == set(RESPONSES_NO_EFFECT)
    head = "".join(f" {name} |" for name, _ in MATRIX)
    rows = [f"| field |{head} meaning |\n|---|{'---|' * len(MATRIX)}---|\n"]
    for name, words in GENERATION.items():
        mark = "no effect" if name in NO_EFFECT else "refused" if words.startswith("refused ") else "yes"
        marks = "".join(f" {mark if name in _names(kind) else '-'} |" for kind in kinds)
        rows.append(f"| `{name}` {' or '.join(types[name])} |{marks} {words} |\n")
    return "".join(rows)


def _table(kind: Struct, honoured: Words, ignored: Words, refused: Words) -> str:
    fields = _fields(kind)
    words = {**{name: ("yes", text) for name, text in honoured.items()},
             **{name: ("no effect", text) for name, text in ignored.items()},
             **{name: ("refused", f"unless {text}") for name, text in refused.items()}}
    assert len(words) == len(honoured) + len(ignored) + len(refused), f"{kind.__name__}: words twice"
    _complete([field.name for field in fields], words, kind.__name__)
    rows = ["| field | | meaning |\n|---|---|---|\n"]
    rows += [f"| `{field.name}` {_type(field.type)} | {words[field.name][0]} | {words[field.name][1]} |\n" for field in fields]
    return "".join(rows)


def _complete(names: Iterable[str], words: Iterable[str], what: str) -> None:
    lacking, extra = set(names) - set(words), set(words) - set(names)
    assert not lacking and not extra, f"{what}: fields without words {lacking}, words without fields {extra}"


def _fields(kind: Struct) -> tuple[inspect.Field, ...]:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return info.fields


def _names(kind: Struct) -> list[str]:
    return [field.name for field in _fields(kind)]


def _only(words: Words, kind: Struct) -> Words:
    return {name: words[name] for name in _names(kind)}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _type(kind: inspect.Type) -> str:
    """A type in JSON's words, null left out: every optional field may be null."""
    match kind:
        case inspect.UnionType():
            return " or ".join(_type(part) for part in kind.types if not isinstance(part, inspect.NoneType))
        case inspect.ListType():
            inner = _type(kind.item_type)
            return "list" if " or " in inner or inner.startswith("list") else f"list of {inner}s"
        case inspect.DictType() | inspect.StructType():
            return "object"
    names: dict[type, str] = {inspect.StrType: "string", inspect.IntType: "integer", inspect.FloatType: "number",
                              inspect.BoolType: "boolean"}
    return names[type(kind)]


if __name__ == "__main__":
    sys.exit(write_or_compare(PAGE, page))
