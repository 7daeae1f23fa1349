"""Conversations as Jinja templates: what serving engines make of messages, token by token as in training.

A message's content is a text, with <image> where a picture stands, or a list of {"type": "image"} and
{"type": "text", "text": ...}. The engines tokenise the whole conversation at once: a text that spells a
control token makes one there, though never in training.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Glue:
    """What has to stand before a text that follows a control token, so that its tokens are those of it alone.

    Training encodes stretch by stretch, an engine all at once. Some tokenizers begin every stretch of
    text with a space, as SentencePiece does, and some only the first one.
    """

    jinja: str
    """Of the text `stretch`, which is not empty."""
    join: Callable[[str], str]
    """The same in Python: glue and text."""


GLUES = (
    Glue(jinja="''", join=lambda stretch: stretch),
    Glue(jinja="' '", join=lambda stretch: f" {stretch}"),
    # For those that leave a text alone which begins with a space, or SentencePiece's sign for it.
    Glue(
        jinja="('' if stretch[0] in ' \u2581' else ' ')",
        join=lambda stretch: stretch if stretch[0] in " \u2581" else f" {stretch}",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """One row of `TEMPLATES`."""

    jinja: str
    """CONTENT stands for what puts the message's content into content.text, and write(text) is text by itself."""
    content: str
    control: tuple[str, ...] = ()
    """Tokens that the tokenizer must have."""

    def written(self, glue: Glue) -> str:
        """The template for a tokenizer that needs this glue."""
        lines = (_WRITE.replace("GLUE", glue.jinja) + self.jinja.replace("CONTENT", self.content)).splitlines()
        return "".join(line.strip() for line in lines)


# Pictures stand where they are in the message.
_IN_PLACE = """
{%- if message['content'] is string -%}
    {%- set content.text = message['content'] -%}
{%- else -%}
    {%- set content.text = '' -%}
    {%- for item in message['content'] -%}
        {%- if item['type'] == 'image' -%}
            {%- set content.text = content.text + '<image>' -%}
        {%- elif item['type'] == 'text' -%}
            {%- set content.text = content.text + item['text'] -%}
        {%- endif -%}
    {%- endfor -%}
{%- endif -%}
"""

# Pictures stand before the text, each on a line of its own, as in LLaVA's data.
_PICTURES_FIRST = """
{%- if message['content'] is string -%}
    {%- set content.text = message['content'] -%}
{%- else -%}
    {%- set content.text = '' -%}
    {%- for item in message['content'] -%}
        {%- if item['type'] == 'image' -%}
            {%- set content.text = content.text + '<image>\\n' -%}
        {%- endif -%}
    {%- endfor -%}
    {%- for item in message['content'] -%}
        {%- if item['type'] == 'text' -%}
            {%- set content.text = content.text + item['text'] -%}
        {%- endif -%}
    {%- endfor -%}
{%- endif -%}
"""

# Text between control tokens, each stretch of it between pictures with its glue.
_WRITE = """
{%- macro write(text) -%}
    {%- for stretch in text.split('<image>') -%}
        {%- if not loop.first -%}
            {{- '<image>' -}}
        {%- endif -%}
        {%- if stretch -%}
            {{- GLUE + stretch -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
"""

# Templates as those of mmcore.data.templates, which name their sources. What the user asks is dropped,
# and the last answer counts.
_PLAIN = """
{%- set content = namespace(text='', answer='') -%}
{{- bos_token -}}
{%- for message in messages -%}
    CONTENT
    {%- for picture in content.text.split('<image>')[1:] -%}
        {{- '<image>' -}}
    {%- endfor -%}
    {%- if message['role'] == 'assistant' -%}
        {%- set content.answer = content.text -%}
    {%- endif -%}
{%- endfor -%}
{%- if content.answer -%}
    {{- write(content.answer) + eos_token -}}
{%- endif -%}
"""

# A system text opens the last question.
_MISTRAL_INSTRUCT = """
{%- set content = namespace(text='', system='', last=-1) -%}
{%- for message in messages -%}
    CONTENT
    {%- if message['role'] == 'system' and content.text -%}
        {%- set content.system = content.system + content.text + '\\n\\n' -%}
    {%- elif message['role'] == 'user' -%}
        {%- set content.last = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
    CONTENT
    {%- if message['role'] == 'user' -%}
        {%- set content.text = content.text.replace('<image>\\n', '<image>').replace('\\n<image>', '<image>') -%}
        {%- if loop.index0 == content.last -%}
            {%- set content.text = content.system + content.text -%}
        {%- endif -%}
        {{- '[INST]' + write(content.text) + '[/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- write(content.text.rstrip(' ')) + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

# A system text opens the first question; the brackets are text.
_MISTRAL_INSTRUCT_V1 = """
{%- set content = namespace(text='', system='') -%}
{{- bos_token -}}
{%- for message in messages -%}
    CONTENT
    {%- if message['role'] == 'system' -%}
        {%- set content.system = content.text + '\\n\\n' if content.text else '' -%}
    {%- elif message['role'] == 'user' -%}
        {%- set content.text = content.text.replace('<image>\\n', '<image>').replace('\\n<image>', '<image>') -%}
        {{- write('[INST] ' + content.system + content.text + ' [/INST]') -}}
        {%- set content.system = '' -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + content.text + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

_VICUNA_V1 = """
{%- set content = namespace(text='', before='') -%}
{{- bos_token -}}
{%- if messages[0]['role'] != 'system' -%}
    {%- set content.before = 'A chat between a curious user and an artificial intelligence assistant. ' -%}
    {%- set content.before = content.before + 'The assistant gives helpful, detailed, and polite answers ' -%}
    {%- set content.before = content.before + 'to the user\\'s questions. ' -%}
{%- endif -%}
{%- for message in messages -%}
    CONTENT
    {%- if message['role'] == 'system' -%}
        {%- set content.before = content.text + ' ' -%}
    {%- elif message['role'] == 'user' -%}
        {%- set content.before = content.before + 'USER: ' + content.text + ' ' -%}
        {%- if add_generation_prompt or not loop.last -%}
            {%- set content.before = content.before + 'ASSISTANT:' -%}
        {%- endif -%}
        {{- write(content.before) -}}
        {%- set content.before = '' -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + content.text + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

_LLAMA2_CHAT = """
{%- set content = namespace(text='', system='') -%}
{%- for message in messages -%}
    CONTENT
    {%- if message['role'] == 'system' -%}
        {%- set content.system = '<<SYS>>\\n' + content.text + '\\n<</SYS>>\\n\\n' -%}
    {%- elif message['role'] == 'user' -%}
        {{- bos_token + write('[INST] ' + (content.system + content.text).strip() + ' [/INST]') -}}
        {%- set content.system = '' -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + content.text.strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

_TAGGED = "CONTENT {%- set content.text = content.text.replace('<image>', '<<IMG>><image><</IMG>>') -%}"

_LLAMA3 = """
{%- set content = namespace(text='') -%}
{{- bos_token -}}
{%- for message in messages -%}
    CONTENT
    {{- '<|start_header_id|>' + write(message['role']) + '<|end_header_id|>' -}}
    {{- write('\\n\\n' + content.text.strip()) + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>' + write('assistant') + '<|end_header_id|>' + write('\\n\\n') -}}
{%- endif -%}
"""

_IM_TURNS = """
{%- set content = namespace(text='') -%}
{%- for message in messages -%}
    CONTENT
    {{- '<|im_start|>' + write(message['role'] + '\\n' + content.text) + '<|im_end|>' + write('\\n') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>' + write('assistant\\n') -}}
{%- endif -%}
"""

_QWEN_SYSTEM = """
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>' -}}
    {{- write('system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.') -}}
    {{- '<|im_end|>' + write('\\n') -}}
{%- endif -%}
"""

_IM_TOKENS = ("<|im_start|>", "<|im_end|>")

# By the names of Architecture.conversation.
TEMPLATES = {
    "plain": ChatTemplate(jinja=_PLAIN, content=_IN_PLACE),
    "mistral_instruct": ChatTemplate(jinja=_MISTRAL_INSTRUCT, content=_IN_PLACE, control=("[INST]", "[/INST]")),
    "mistral_instruct_v1": ChatTemplate(jinja=_MISTRAL_INSTRUCT_V1, content=_IN_PLACE),
    "vicuna_v1": ChatTemplate(jinja=_VICUNA_V1, content=_PICTURES_FIRST),
    "llama2_chat": ChatTemplate(jinja=_LLAMA2_CHAT, content=_PICTURES_FIRST),
    "llama2_chat_tagged": ChatTemplate(
        jinja=_LLAMA2_CHAT.replace("CONTENT", _TAGGED),
        content=_PICTURES_FIRST,
    ),
    "llama3": ChatTemplate(
        jinja=_LLAMA3,
        content=_PICTURES_FIRST,
        control=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "chatml": ChatTemplate(jinja=_QWEN_SYSTEM + _IM_TURNS, content=_PICTURES_FIRST, control=_IM_TOKENS),
    "internlm2": ChatTemplate(jinja="{{- bos_token -}}" + _IM_TURNS, content=_PICTURES_FIRST, control=_IM_TOKENS),
}
