"""Renders chat templates with jinja2, configured as in transformers.

    chat_templates.py FOLDER
    chat_templates.py --expect EXPRESSIONS.json

Prints a JSON list with an entry for each template of the folder and each of the conversations
below: the inputs of the template, and its output as `expected`, or null if it fails. With
--expect, writes the output of each expression of a fixture into the fixture.
"""

import copy
import datetime
import json
import sys
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(jinja2.ext.Extension):
    """`generation` blocks mark the assistant's text for training; their content is printed."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller):
        return caller()


def environment():
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent,
            separators=separators, sort_keys=sort_keys,
        )

    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = raise_exception
    # The clock of the tests stands still, too.
    made.globals["strftime_now"] = datetime.datetime(1970, 1, 2).strftime
    return made


def function(name, description, properties, required):
    parameters = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


TOOLS = [
    function(
        "get_weather", "The weather (it's <b>free</b> & quick) — für Köln",
        {
            "city": {"type": "string", "description": "The city"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer", "default": 3},
            "tags": {"type": "array", "items": {"type": "string"}},
            "strict": {"type": "boolean", "default": True},
        },
        ["city"],
    ),
    function(
        "add", "Adds two numbers",
        {"a": {"type": "number"}, "b": {"type": "number"}}, ["a", "b"],
    ),
]


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def call(id, name, arguments):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content, id, name):
    return say("tool", content, tool_call_id=id, name=name)


WEATHER = call(
    "call12345", "get_weather",
    {"city": "Köln", "days": 2, "strict": False, "tags": ["a'b", 'c"d'], "wind": 1e-5},
)
CALLS = [
    call("call00001", "get_weather", {"city": "A"}),
    call("call00002", "add", {"a": 1.5, "b": 2}),
]
SUNNY = result('{"t": 21}', "call12345", "get_weather")

# Name, messages, tools, whether to add the generation prompt, variables.
CONVERSATIONS = [
    ("user", [say("user", "Hello, wörld 🙂")], None, True, {}),
    ("system", [say("system", "You are terse."), say("user", "Hi")], None, True, {}),
    (
        "turns",
        [
            say("system", "Be kind."), say("user", "One"), say("assistant", "Two"),
            say("user", "Three"), say("assistant", "Four\n\n"), say("user", "  Five  "),
        ],
        None, True, {},
    ),
    ("unprompted", [say("user", "One"), say("assistant", "Two")], None, False, {}),
    ("tools", [say("system", "Use tools."), say("user", "Weather?")], TOOLS, True, {}),
    (
        "call",
        [
            say("user", "Weather in Köln?"), say("assistant", "", tool_calls=[WEATHER]), SUNNY,
            say("assistant", "It is 21."), say("user", "Thanks"),
        ],
        TOOLS, True, {},
    ),
    (
        "null",
        [say("user", "Weather?"), say("assistant", None, tool_calls=[WEATHER]), SUNNY],
        TOOLS, True, {},
    ),
    (
        "calls",
        [
            say("user", "Both"), say("assistant", "", tool_calls=CALLS),
            result("sunny", "call00001", "get_weather"), result("3.5", "call00002", "add"),
        ],
        TOOLS, True, {},
    ),
    (
        "reasoning",
        [
            say("user", "One"), say("assistant", "Two", reasoning_content="I think"),
            say("user", "Three"), say("assistant", "Four", reasoning_content="Hmm"),
        ],
        None, False, {},
    ),
    (
        "thought",
        [
            say("user", "One"), say("assistant", "<think>\nabc\n</think>\n\nTwo"),
            say("user", "Three"),
        ],
        None, True, {},
    ),
    ("unthinking", [say("user", "Hi")], None, True, {"enable_thinking": False, "thinking": False}),
    ("thinking", [say("user", "Hi")], None, True, {"enable_thinking": True, "thinking": True}),
]


def expect(path):
    made = environment()
    fixture = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for source, _ in fixture["cases"]:
        try:
            expected = made.from_string(source).render(**copy.deepcopy(fixture["variables"]))
        except Exception:
            expected = None
        lines.append(json.dumps([source, expected], ensure_ascii=False))
    variables = json.dumps(fixture["variables"], ensure_ascii=False)
    cases = ",\n    ".join(lines)
    path.write_text(
        f'{{\n  "variables": {variables},\n  "cases": [\n    {cases}\n  ]\n}}\n', encoding="utf-8"
    )


def main():
    if sys.argv[1] == "--expect":
        expect(Path(sys.argv[2]))
        return
    made = environment()
    cases = []
    for path in sorted(Path(sys.argv[1]).glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        for name, messages, tools, begins, variables in CONVERSATIONS:
            case = {
                "template": path.stem, "conversation": name, "messages": messages,
                "tools": tools, "add_generation_prompt": begins, "variables": variables,
            }
            try:
                given = copy.deepcopy((messages, tools, variables))
                case["expected"] = made.from_string(source).render(
                    messages=given[0], tools=given[1], documents=None,
                    add_generation_prompt=begins, bos_token="<s>", eos_token="</s>", **given[2],
                )
            except Exception as error:
                case["expected"] = None
                case["error"] = f"{type(error).__name__}: {error}"
            cases.append(case)
    json.dump(cases, sys.stdout)


if __name__ == "__main__":
    main()
