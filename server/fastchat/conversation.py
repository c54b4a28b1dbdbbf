"""How a chat comes through FastChat, whose fronts write the prompt themselves: with marks, from which the messages are read again.

So the model's own chat template makes the prompt, and no table of templates by model name is needed. A prompt without marks is a
raw one. Whoever writes the marks into a message changes who says what, as in FastChat's own templates.
"""

from __future__ import annotations

from typing import Any

_CHATML = 9  # fastchat.conversation.SeparatorStyle.CHATML: role, newline, text, separator, newline
_MARK = "\ue000jaxserve:"  # from Unicode's private use area
_END = "\ue001"
_ROLES = ("user", "assistant")


def template() -> dict[str, Any]:
    """What the fronts fill in, in the form of fastchat.conversation.Conversation."""
    return {
        "name": "jaxserve",
        "system_template": f"{_MARK}system\n{{system_message}}",
        "system_message": "",
        "roles": [_MARK + role for role in _ROLES],
        "messages": [],
        "offset": 0,
        "sep_style": _CHATML,
        "sep": _END,
        "sep2": None,
        "stop_str": None,
        "stop_token_ids": None,
    }


def read_messages(prompt: str) -> list[dict[str, str]] | None:
    """The messages that a front has written by the template; None for a raw prompt."""
    if not prompt.startswith(_MARK):
        return None
    messages = []
    for part in prompt.split(_MARK)[1:]:
        role, _, text = part.partition("\n")
        text = text.removesuffix("\n").removesuffix(_END)
        if role not in ("system", *_ROLES):
            return None
        if role != "system" or text:
            messages.append({"role": role, "content": text})
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()  # where the answer goes
    return messages or None
