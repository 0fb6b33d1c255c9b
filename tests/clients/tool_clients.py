"""Calls a tool through the clients openai, langchain-openai and pydantic-ai.

    tool_clients.py BASE_URL BEFORE CALL     BASE_URL such as http://127.0.0.1:8000

The server's model answers with the text between the last two marks of a conversation. CALL is a
call of the tool `weather` in the format of its chat template, with the arguments of `ARGUMENTS`.
BEFORE comes before each answer, such as the end of the reasoning that the template begins.
Exits with code 1 unless each client gets the call, and the answer after the tool's result.
"""

import json
import sys

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

ARGUMENTS = {"city": "São Paulo <1>", "days": 3}
ANSWER = "It is sunny."
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Returns the weather.", "parameters": SCHEMA},
}


def say(text):
    """Returns what a message must contain to make the model answer `text`."""
    return f"<jupyter_start>{text}<jupyter_code>"


def equal(found, expected, what):
    if found != expected:
        raise AssertionError(f"{what} is {found!r}, expected {expected!r}")


def with_openai(url, model, call, answer):
    """Gets the call from a stream, which the client puts together."""
    client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
    messages = [{"role": "user", "content": call}]
    with client.chat.completions.stream(model=model, messages=messages, tools=[TOOL]) as stream:
        choice = stream.get_final_completion().choices[0]
    equal(choice.finish_reason, "tool_calls", "openai's finish reason")
    function = choice.message.tool_calls[0].function
    found = (function.name, json.loads(function.arguments))
    equal(found, ("weather", ARGUMENTS), "openai's call")


def with_langchain(url, model, call, answer):
    chat = ChatOpenAI(base_url=url, api_key="unused", model=model, max_retries=0)
    chat = chat.bind_tools([TOOL])
    messages = [HumanMessage(call)]
    for streamed in (False, True):
        if streamed:
            first = None
            for chunk in chat.stream(messages):
                first = chunk if first is None else first + chunk
        else:
            first = chat.invoke(messages)
        found = [(one["name"], one["args"]) for one in first.tool_calls]
        equal(found, [("weather", ARGUMENTS)], f"langchain's calls, streamed: {streamed}")
    result = ToolMessage(answer, tool_call_id=first.tool_calls[0]["id"])
    equal(chat.invoke([*messages, first, result]).content, ANSWER, "langchain's answer")


def with_pydantic_ai(url, model, call, answer):
    provider = OpenAIProvider(base_url=url, api_key="unused")
    agent = Agent(OpenAIChatModel(model, provider=provider))
    called = []

    @agent.tool_plain
    def weather(city: str, days: int) -> str:
        """Returns the weather."""
        called.append({"city": city, "days": days})
        return answer

    output = agent.run_sync(call).output
    equal(called, [ARGUMENTS], "pydantic-ai's calls")
    equal(output, ANSWER, "pydantic-ai's answer")


def main():
    base_url, before, call = sys.argv[1:]
    url = f"{base_url.rstrip('/')}/v1"
    model = openai.OpenAI(base_url=url, api_key="unused").models.list().data[0].id
    for client in (with_openai, with_langchain, with_pydantic_ai):
        client(url, model, say(before + call), say(before + ANSWER))
        print(f"{client.__name__}: ok")


if __name__ == "__main__":
    main()
