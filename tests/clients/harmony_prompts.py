"""Writes tests/fixtures/text/harmony.json: 200 conversations, and the prompts that OpenAI's library
openai-harmony makes of them.

Usage: TIKTOKEN_ENCODINGS_BASE=FOLDER python harmony_prompts.py > harmony.json

Needs openai-harmony 0.0.8 from PyPI, and a folder with its vocabulary o200k_base.tiktoken, which
the package tiktoken-rs 0.12 on crates.io contains. The tests read the committed file.

The library keeps the reasoning of some earlier answers. It is left out here before the library sees
it, up to the last answer to the user, as the format's description says.
"""

import json
import random
import sys

from openai_harmony import (
    Author,
    Conversation,
    DeveloperContent,
    HarmonyEncodingName,
    Message,
    ReasoningEffort,
    RenderConversationConfig,
    Role,
    SystemContent,
    ToolDescription,
    load_harmony_encoding,
)

DATE = "2026-01-02"
ENCODING = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
RANDOM = random.Random(7)
EFFORTS = {
    "low": ReasoningEffort.LOW,
    "medium": ReasoningEffort.MEDIUM,
    "high": ReasoningEffort.HIGH,
}
PARAMETERS = [
    None,
    {"type": "object", "properties": {}},
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
        },
        "required": ["city"],
    },
    {
        "type": "object",
        "properties": {
            "places": {
                "type": "array",
                "items": {"type": "string"},
                "description": "List of places",
            },
            "count": {"type": "integer"},
            "detailed": {"type": "boolean", "default": False},
        },
        "required": ["places", "count"],
    },
    {
        "type": "object",
        "properties": {
            "where": {
                "type": "object",
                "properties": {
                    "latitude": {"type": "number", "description": "Degrees."},
                    "longitude": {"type": "number"},
                },
                "required": ["latitude", "longitude"],
            },
            "note": {"type": "string", "nullable": True},
        },
        "required": [],
    },
    {
        "type": "object",
        "properties": {
            "id": {"type": ["string", "integer"]},
            "limit": {"type": "integer", "description": "Maximum", "default": 10},
        },
        "required": ["id"],
    },
    {
        "type": "object",
        "description": "All arguments.",
        "properties": {
            "mode": {
                "title": "Mode",
                "type": "string",
                "enum": ["fast", "slow"],
                "description": "How to search.",
            },
            "from": {
                "oneOf": [
                    {"type": "string", "description": "A name."},
                    {"type": "integer", "default": 3},
                    {"type": "object", "properties": {"x": {"type": "number"}}},
                ],
                "description": "Where to begin.",
            },
            "to": {
                "oneOf": [{"type": "string", "nullable": True}, {"type": "number"}],
                "default": "home",
            },
            "tags": {
                "type": "array",
                "items": {"type": "string", "enum": ["a", "b"]},
                "examples": ["a", "b"],
            },
            "any": {"description": "Anything."},
            "title": {"type": "string", "default": "x", "description": "Its title."},
        },
        "required": ["from", "mode"],
    },
    {
        "type": "object",
        "properties": {
            "list": {"type": "array"},
            "items": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string"},
                        "size": {"type": ["integer", "null"], "default": None},
                    },
                    "required": ["name"],
                },
            },
        },
    },
]
NAMES = ["get_weather", "now", "search_places", "lookup", "send-mail"]
WORDS = [
    "Hello,",
    "answer",
    "42!",
    "São",
    "北京",
    '"quoted"',
    "\\n",
    "tab\t",
    "new\nline",
    "{",
    "<b>",
    "…",
]


def text():
    return " ".join(RANDOM.choice(WORDS) for _ in range(RANDOM.randint(1, 4)))


def argument(schema):
    """Returns a random value of a schema."""
    name = schema.get("type")
    if isinstance(name, list):
        name = name[0]
    if "enum" in schema:
        return RANDOM.choice(schema["enum"])
    return {
        "string": text,
        "integer": lambda: RANDOM.randint(-5, 99),
        "number": lambda: RANDOM.choice([1.5, -2, 0.25]),
        "boolean": lambda: RANDOM.random() < 0.5,
        "array": lambda: [argument(schema.get("items", {})) for _ in range(RANDOM.randint(0, 3))],
        "object": lambda: {key: argument(value) for key, value in schema["properties"].items()},
    }.get(name, lambda: None)()


def conversation():
    """Returns a random conversation, in the form of OpenAI clients."""
    messages = []
    tools = []
    if RANDOM.random() < 0.6:
        for name in RANDOM.sample(NAMES, RANDOM.randint(1, 3)):
            parameters = RANDOM.choice(PARAMETERS)
            function = {
                "name": name,
                "description": RANDOM.choice(
                    [
                        "Returns it.",
                        "Gets the current weather in the provided location.",
                        "First line.\nSecond line.",
                    ]
                ),
            }
            if parameters is not None:
                function["parameters"] = parameters
            tools.append({"type": "function", "function": function})
    if RANDOM.random() < 0.5:
        messages.append({"role": RANDOM.choice(["system", "developer"]), "content": text()})
    for turn in range(RANDOM.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        final = RANDOM.random() < 0.7
        if tools and RANDOM.random() < 0.7:
            for step in range(RANDOM.randint(1, 2)):
                calls = []
                for place in range(RANDOM.choice([1, 1, 1, 2])):
                    tool = RANDOM.choice(tools)["function"]
                    arguments = {
                        key: argument(value)
                        for key, value in (tool.get("parameters") or {})
                        .get("properties", {})
                        .items()
                    }
                    spaced = None if RANDOM.random() < 0.5 else (",", ":")
                    calls.append(
                        {
                            "id": f"call_{turn}{step}{place}",
                            "type": "function",
                            "function": {
                                "name": tool["name"],
                                "arguments": json.dumps(
                                    arguments, ensure_ascii=False, separators=spaced
                                ),
                            },
                        }
                    )
                message = {
                    "role": "assistant",
                    "content": text() if RANDOM.random() < 0.2 else "",
                    "tool_calls": calls,
                }
                if RANDOM.random() < 0.6:
                    message["reasoning_content"] = text()
                messages.append(message)
                for call in calls:
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": text()})
        if final:
            message = {"role": "assistant", "content": text()}
            if RANDOM.random() < 0.5:
                message["reasoning_content"] = text()
            messages.append(message)
    while messages[-1]["role"] == "assistant":
        messages.pop()
    effort = RANDOM.choice([None, "low", "medium", "high"])
    return {"messages": messages, "tools": tools or None, "reasoning_effort": effort}


def harmony(case):
    """Returns the prompt that the library writes."""
    out = []
    system = SystemContent.new().with_conversation_start_date(DATE)
    if case["reasoning_effort"]:
        system = system.with_reasoning_effort(EFFORTS[case["reasoning_effort"]])
    out.append(Message.from_role_and_content(Role.SYSTEM, system))
    messages = case["messages"]
    developer = DeveloperContent.new()
    has_developer = False
    if messages[0]["role"] in ("system", "developer"):
        developer = developer.with_instructions(messages[0]["content"])
        messages = messages[1:]
        has_developer = True
    if case["tools"]:
        developer = developer.with_function_tools(
            [
                ToolDescription.new(
                    tool["function"]["name"],
                    tool["function"]["description"],
                    parameters=tool["function"].get("parameters"),
                )
                for tool in case["tools"]
            ]
        )
        has_developer = True
    if has_developer:
        out.append(Message.from_role_and_content(Role.DEVELOPER, developer))
    names = {}
    last = max(
        [
            i
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and not message.get("tool_calls")
        ],
        default=-1,
    )
    for place, message in enumerate(messages):
        if message["role"] == "user":
            out.append(Message.from_role_and_content(Role.USER, message["content"]))
        elif message["role"] == "tool":
            out.append(
                Message.from_author_and_content(
                    Author.new(Role.TOOL, "functions." + names[message["tool_call_id"]]),
                    message["content"],
                )
                .with_recipient("assistant")
                .with_channel("commentary")
            )
        else:
            if message.get("reasoning_content") and place > last:
                out.append(
                    Message.from_role_and_content(
                        Role.ASSISTANT, message["reasoning_content"]
                    ).with_channel("analysis")
                )
            calls = message.get("tool_calls", [])
            if message["content"] and calls:
                out.append(
                    Message.from_role_and_content(Role.ASSISTANT, message["content"]).with_channel(
                        "commentary"
                    )
                )
            for call in calls:
                names[call["id"]] = call["function"]["name"]
                out.append(
                    Message.from_role_and_content(Role.ASSISTANT, call["function"]["arguments"])
                    .with_channel("commentary")
                    .with_recipient("functions." + call["function"]["name"])
                    .with_content_type("<|constrain|>json")
                )
            if not calls:
                out.append(
                    Message.from_role_and_content(Role.ASSISTANT, message["content"]).with_channel(
                        "final"
                    )
                )
    toks = ENCODING.render_conversation_for_completion(
        Conversation.from_messages(out),
        Role.ASSISTANT,
        RenderConversationConfig(auto_drop_analysis=False),
    )
    return ENCODING.decode_utf8(toks)


def main():
    prompts = []
    for _ in range(200):
        case = conversation()
        case["text"] = harmony(case)
        prompts.append({key: value for key, value in case.items() if value is not None})
    json.dump(prompts, sys.stdout, ensure_ascii=False, separators=(",", ":"))


if __name__ == "__main__":
    main()
