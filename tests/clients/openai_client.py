"""Drives a running `quell serve` with the official `openai` client.

    openai_client.py BASE_URL [CHECK ...]     BASE_URL such as http://127.0.0.1:8000

Runs all checks, or only those named. Prints one line per check, and exits with code 1 at the
first that fails. Every answer is short, because the model runs on the CPU.
"""

import base64
import json
import struct
import sys
import time
from typing import Literal

import openai
import requests
from pydantic import BaseModel

CHECKS = []


def check(function):
    """Registers a check under the function's name."""
    CHECKS.append(function)
    return function


def equal(found, expected, what):
    if found != expected:
        raise AssertionError(f"{what} is {found!r}, expected {expected!r}")


def holds(condition, what):
    if not condition:
        raise AssertionError(what)


def refused(error_class, status, call):
    """Makes a call that must fail with this class of error, and returns the error."""
    try:
        call()
    except error_class as error:
        equal(error.status_code, status, "the status")
        equal(type(error), error_class, "the client's exception")
        holds(isinstance(error.body, dict) and error.body.get("message"), f"no message: {error.body}")
        return error
    raise AssertionError(f"the call was accepted, expected {error_class.__name__}")


class Server:
    """The server under test, which is passed to each check."""

    def __init__(self, base_url):
        self.url = base_url.rstrip("/")
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=300
        )
        self.model = self.client.models.list().data[0].id

    def chat(self, text, **fields):
        fields.setdefault("max_completion_tokens", 16)
        fields.setdefault("temperature", 0)
        messages = [{"role": "user", "content": text}]
        return self.client.chat.completions.create(model=self.model, messages=messages, **fields)

    def complete(self, prompt, **fields):
        fields.setdefault("max_tokens", 8)
        fields.setdefault("temperature", 0)
        return self.client.completions.create(model=self.model, prompt=prompt, **fields)

    def gauge(self, name, **labels):
        """Returns the value of a gauge in /metrics, summed over the matching label sets."""
        total = None
        for line in requests.get(f"{self.url}/metrics", timeout=60).text.splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] != name:
                continue
            if all(f'{key}="{wanted}"' in series for key, wanted in labels.items()):
                total = (total or 0) + float(value)
        holds(total is not None, f"/metrics has no {name} {labels}")
        return total

    def becomes_idle(self):
        """Polls until no request runs or waits and no block is in use."""
        until = time.monotonic() + 60
        while True:
            running = self.gauge("quell_num_requests_running")
            waiting = self.gauge("quell_num_requests_waiting")
            active = self.gauge("quell_kv_blocks", state="active")
            if running == waiting == active == 0:
                return
            holds(
                time.monotonic() < until,
                f"{running} requests run, {waiting} wait, {active} blocks are in use, expected none",
            )


# Models


@check
def models_are_listed(server):
    models = server.client.models.list().data
    equal(len(models), 1, "the number of models")
    equal(models[0].object, "model", "the object")
    holds(models[0].owned_by, "owned_by is empty")


@check
def a_model_is_retrieved_by_its_name(server):
    equal(server.client.models.retrieve(server.model).id, server.model, "the id")
    error = refused(
        openai.NotFoundError, 404, lambda: server.client.models.retrieve("no-such-model")
    )
    equal(error.code, "model_not_found", "the code")


# Chat


@check
def a_chat_is_answered(server):
    answer = server.chat("Who wrote Hamlet?")
    equal(answer.object, "chat.completion", "the object")
    equal(answer.model, server.model, "the model")
    equal(len(answer.choices), 1, "the number of choices")
    choice = answer.choices[0]
    equal(choice.message.role, "assistant", "the role")
    holds("Shakespeare" in choice.message.content, f"the answer is {choice.message.content!r}")
    holds(choice.finish_reason in ("stop", "length"), f"finish_reason {choice.finish_reason}")
    usage = answer.usage
    equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens, "total_tokens")
    holds(0 < usage.completion_tokens <= 16, f"completion_tokens {usage.completion_tokens}")


@check
def a_streamed_chat_gives_the_text_of_the_whole_one(server):
    whole = server.chat("Name three colours.").choices[0]
    text, finishes, roles = "", [], []
    for chunk in server.chat("Name three colours.", stream=True):
        equal(chunk.object, "chat.completion.chunk", "the object")
        equal(chunk.usage, None, "the usage that nobody asked for")
        for choice in chunk.choices:
            roles += [choice.delta.role] if choice.delta.role else []
            text += choice.delta.content or ""
            finishes += [choice.finish_reason] if choice.finish_reason else []
    equal(text, whole.message.content, "the streamed text")
    equal(finishes, [whole.finish_reason], "the finish reasons")
    equal(roles, ["assistant"], "the roles")


@check
def a_streamed_chat_ends_with_its_usage_if_asked(server):
    whole = server.chat("Count to five.").usage
    chunks = list(server.chat("Count to five.", stream=True, stream_options={"include_usage": True}))
    equal(len({chunk.id for chunk in chunks}), 1, "the number of ids")
    last = chunks.pop()
    equal(last.choices, [], "the last chunk's choices")
    equal(last.usage.completion_tokens, whole.completion_tokens, "completion_tokens")
    equal(last.usage.prompt_tokens, whole.prompt_tokens, "prompt_tokens")
    holds(all(chunk.usage is None for chunk in chunks), "an earlier chunk has a usage")


@check
def the_async_client_streams_too(server):
    import asyncio

    async def run():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="unused", max_retries=0
        ) as client:
            one = client.chat.completions.create(
                model=server.model,
                messages=[{"role": "user", "content": "Say hello."}],
                max_completion_tokens=8,
                temperature=0,
                stream=True,
            )
            text = ""
            async for chunk in await one:
                text += chunk.choices[0].delta.content or ""
            return text

    whole = server.chat("Say hello.", max_completion_tokens=8)
    equal(asyncio.run(run()), whole.choices[0].message.content, "the text")


@check
def n_answers_differ_and_come_in_order(server):
    answer = server.chat("Tell me a story.", n=3, temperature=1.2, seed=7, max_completion_tokens=12)
    equal([choice.index for choice in answer.choices], [0, 1, 2], "the indexes")
    texts = {choice.message.content for choice in answer.choices}
    holds(len(texts) > 1, f"all answers are {texts}")
    holds(answer.usage.completion_tokens > 12, "usage does not count all answers")


@check
def n_streamed_answers_carry_their_index(server):
    texts = {}
    for chunk in server.chat("Tell me a story.", n=2, temperature=1.2, seed=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    equal(sorted(texts), [0, 1], "the indexes")
    holds(all(texts.values()), f"an answer is empty: {texts}")


@check
def a_seed_repeats_an_answer(server):
    def ask(seed):
        return server.chat("Tell me a story.", temperature=1.5, seed=seed).choices[0].message.content

    equal(ask(11), ask(11), "the answer with the same seed")
    holds(len({ask(seed) for seed in range(4)}) > 1, "four seeds give one answer")


@check
def a_stop_string_ends_the_answer_and_is_not_part_of_it(server):
    prompt = "Count from one to ten in digits, separated by commas."
    free = server.chat(prompt, max_completion_tokens=24).choices[0].message.content
    holds(len(free) > 8, f"the answer is {free!r}")
    stop = free[5:8]
    cut = server.chat(prompt, max_completion_tokens=24, stop=[stop, "@@never@@"]).choices[0]
    equal(cut.message.content, free[: free.index(stop)], "the text before the stop string")
    equal(cut.finish_reason, "stop", "finish_reason")


@check
def a_token_limit_is_respected_and_reported(server):
    answer = server.chat("Tell me a long story.", max_completion_tokens=3)
    equal(answer.choices[0].finish_reason, "length", "finish_reason")
    equal(answer.usage.completion_tokens, 3, "completion_tokens")
    old = server.chat("Tell me a long story.", max_completion_tokens=openai.omit, max_tokens=3)
    equal(old.usage.completion_tokens, 3, "completion_tokens with max_tokens")


@check
def chat_log_probabilities_are_returned(server):
    answer = server.chat("Say yes.", logprobs=True, top_logprobs=3, max_completion_tokens=4)
    content = answer.choices[0].logprobs.content
    equal(len(content), answer.usage.completion_tokens, "the number of tokens")
    for token in content:
        holds(token.logprob <= 0, f"log-probability {token.logprob}")
        equal(len(token.top_logprobs), 3, "the number of alternatives")
        likeliest = [other.logprob for other in token.top_logprobs]
        equal(likeliest, sorted(likeliest, reverse=True), "the order of the alternatives")
        equal(token.top_logprobs[0].token, token.token, "the greedy token")
        equal(bytes(token.bytes).decode("utf-8", "replace"), token.token, "the token's bytes")


@check
def a_long_conversation_is_accepted(server):
    messages = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "How are you?", "name": "somebody"},
    ]
    answer = server.client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=4, temperature=0
    )
    holds(answer.usage.prompt_tokens > 20, f"prompt_tokens {answer.usage.prompt_tokens}")


@check
def sampling_fields_beyond_openai_are_accepted(server):
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True}
    answer = server.chat("Hello", extra_body=extra, max_completion_tokens=9, temperature=0.8)
    equal(answer.usage.completion_tokens, 9, "completion_tokens past the end of the text")


@check
def unknown_fields_are_ignored(server):
    server.chat("Hello", extra_body={"no_such_field": {"deep": [1, 2]}}, max_completion_tokens=1)


@check
def a_logit_bias_decides_the_token(server):
    tokens = requests.post(f"{server.url}/tokenize", json={"prompt": " Zebra"}, timeout=60).json()["tokens"]
    answer = server.chat("Hello", logit_bias={str(tokens[-1]): 100}, max_completion_tokens=3)
    text = answer.choices[0].message.content
    piece = requests.post(f"{server.url}/detokenize", json={"tokens": [tokens[-1]] * 3}, timeout=60)
    equal(text, piece.json()["prompt"], "the text")


# Completions


@check
def a_completion_is_returned(server):
    answer = server.complete("The capital of France is")
    equal(answer.object, "text_completion", "the object")
    holds("Paris" in answer.choices[0].text, f"the text is {answer.choices[0].text!r}")
    equal(answer.usage.completion_tokens, 8, "completion_tokens")


@check
def a_streamed_completion_gives_the_text_of_the_whole_one(server):
    whole = server.complete("Once upon a time").choices[0].text
    stream = server.complete("Once upon a time", stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    equal(chunks[-1].usage.completion_tokens, 8, "completion_tokens")
    equal("".join(c.text for chunk in chunks for c in chunk.choices), whole, "the streamed text")


@check
def completions_take_batches_of_texts_and_of_token_ids(server):
    texts = ["The sky is", "Two plus two is", "A cat says"]
    singles = [server.complete(text, max_tokens=4).choices[0].text for text in texts]
    batch = server.complete(texts, max_tokens=4)
    equal([choice.index for choice in batch.choices], [0, 1, 2], "the indexes")
    equal([choice.text for choice in batch.choices], singles, "the texts of a batch")
    ids = [
        requests.post(f"{server.url}/tokenize", json={"prompt": text}, timeout=60).json()["tokens"]
        for text in texts
    ]
    equal(server.complete(ids[0], max_tokens=4).choices[0].text, singles[0], "the text of ids")
    by_ids = server.complete(ids, max_tokens=4)
    equal([choice.text for choice in by_ids.choices], singles, "the texts of a batch of ids")
    equal(by_ids.usage.prompt_tokens, sum(map(len, ids)), "prompt_tokens")


@check
def completion_log_probabilities_are_returned(server):
    answer = server.complete("One two three", logprobs=2, max_tokens=4)
    logprobs = answer.choices[0].logprobs
    equal(len(logprobs.tokens), 4, "the number of tokens")
    equal(len(logprobs.token_logprobs), 4, "the number of log-probabilities")
    equal("".join(logprobs.tokens), answer.choices[0].text, "the tokens together")
    equal(logprobs.text_offset[0], 0, "the first offset")
    holds(all(2 <= len(top) <= 3 for top in logprobs.top_logprobs), "alternatives are missing")


@check
def an_echo_begins_with_the_prompt(server):
    plain = server.complete("One two three", max_tokens=4).choices[0].text
    echoed = server.complete("One two three", max_tokens=4, echo=True).choices[0].text
    equal(echoed, "One two three" + plain, "the text with its prompt")


@check
def an_echo_can_score_the_prompt(server):
    answer = server.complete("One two three", max_tokens=1, echo=True, logprobs=1).choices[0]
    logprobs = answer.logprobs
    equal(logprobs.token_logprobs[0], None, "the first token's log-probability")
    holds(all(value <= 0 for value in logprobs.token_logprobs[1:]), "a log-probability is missing")
    equal("".join(logprobs.tokens), answer.text, "the tokens together")


@check
def top_log_probabilities_contain_the_chosen_token(server):
    for count in (0, 1, 5):
        answer = server.complete("One two three", max_tokens=4, echo=True, logprobs=count).choices[0]
        logprobs = answer.logprobs
        for token, value, top in list(
            zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
        )[1:]:
            equal(top.get(token), value, f"the log-probability of {token!r} among the likeliest")


def loglikelihoods(server, pairs):
    """Scores (context, continuation) pairs of token IDs like lm-eval's `local-completions`:
    with the same request and the same reading of its answer as in `openai_completions.py`."""
    payload = {
        "prompt": [context + continuation for context, continuation in pairs],
        "model": server.model,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    reply = requests.post(f"{server.url}/v1/completions", json=payload, timeout=300)
    equal(reply.status_code, 200, "the status")
    results = []
    choices = sorted(reply.json()["choices"], key=lambda choice: choice["index"])
    for choice, (context, _) in zip(choices, pairs, strict=True):
        begin = len(context)
        logprobs = choice["logprobs"]["token_logprobs"][begin:-1]
        tops = choice["logprobs"]["top_logprobs"][begin:-1]
        greedy = all(value == max(top.values()) for value, top in zip(logprobs, tops, strict=True))
        results.append((sum(logprobs), greedy))
    return results


@check
def lm_eval_recognises_greedy_continuations(server):
    def ids(text):
        asked = {"prompt": text, "add_special_tokens": False}
        return requests.post(f"{server.url}/tokenize", json=asked, timeout=60).json()["tokens"]

    contexts = [
        "The capital of France is",
        "One, two, three,",
        "The sky is",
        "A cat and a",
        "Water boils at",
        "My name is",
        "Once upon a",
        "The opposite of hot is",
    ]
    pairs, expected = [], []
    for context in contexts:
        answer = server.complete(context, max_tokens=3, logprobs=0, extra_body={"return_tokens_as_token_ids": True})
        tokens = [int(name.removeprefix("token_id:")) for name in answer.choices[0].logprobs.tokens]
        pairs += [(ids(context), tokens), (ids(context), ids(" zebra zebra"))]
        expected += [True, False]
    results = loglikelihoods(server, pairs)
    equal([greedy for _, greedy in results], expected, "which continuations are greedy")
    holds(all(total < 0 for total, _ in results), f"a log-likelihood is not below 0: {results}")
    for likely, unlikely in zip(results[::2], results[1::2], strict=True):
        holds(likely[0] > unlikely[0], f"a greedy continuation is less likely: {likely}, {unlikely}")


@check
def the_tokenizer_is_described(server):
    info = requests.get(f"{server.url}/tokenizer_info", timeout=60).json()
    holds("messages" in info["chat_template"], "there is no chat template")
    holds(info["eos_token"], "there is no end token")


@check
def fields_of_vllm_are_honoured(server):
    plain = server.complete("One, two, three,").choices[0].text
    word = plain.split()[0].strip(",.")
    kept = server.complete("One, two, three,", extra_body={"bad_words": [word]}).choices[0].text
    holds(word not in kept.split(), f"{word!r} is in {kept!r}")
    cut = server.complete("word " * 50, max_tokens=1, extra_body={"truncate_prompt_tokens": 5})
    equal(cut.usage.prompt_tokens, 5, "prompt_tokens")
    scored = server.complete("The sky is", max_tokens=1, extra_body={"prompt_logprobs": 1}).choices[0]
    equal(len(scored.prompt_logprobs), 3, "the number of tokens of the prompt")
    error = refused(
        openai.BadRequestError, 400, lambda: server.complete("Hi", extra_body={"use_beam_search": True})
    )
    equal(error.param, "use_beam_search", "the field")


@check
def context_overflow_is_reported_in_openais_words(server):
    # litellm looks for this message.
    error = refused(openai.BadRequestError, 400, lambda: server.complete("Hi", max_tokens=10**6))
    equal(error.code, "context_length_exceeded", "the code")
    holds("this model's maximum context length is" in str(error).lower(), f"the message is {error}")


# Tools


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


def weather_arguments(text):
    arguments = json.loads(text)
    equal(sorted(arguments), ["city", "unit"], "the arguments' names")
    holds(arguments["unit"] in ("celsius", "fahrenheit"), f"unit {arguments['unit']!r}")
    return arguments


@check
def a_required_tool_is_called(server):
    answer = server.chat(
        "What is the weather in Paris, in celsius?",
        tools=[WEATHER],
        tool_choice="required",
        max_completion_tokens=80,
    )
    choice = answer.choices[0]
    equal(choice.finish_reason, "tool_calls", "finish_reason")
    holds(len(choice.message.tool_calls) >= 1, "no tool is called")
    for call in choice.message.tool_calls:
        equal((call.type, call.function.name), ("function", "get_weather"), "the call")
        holds(call.id, "the call has no id")
        weather_arguments(call.function.arguments)


@check
def a_named_tool_is_called(server):
    answer = server.chat(
        "Hello!",
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_completion_tokens=80,
    )
    call = answer.choices[0].message.tool_calls[0]
    equal(call.function.name, "get_weather", "the function")
    weather_arguments(call.function.arguments)


@check
def a_streamed_tool_call_comes_in_pieces(server):
    stream = server.chat(
        "What is the weather in Paris, in celsius?",
        tools=[WEATHER],
        tool_choice="required",
        max_completion_tokens=80,
        stream=True,
    )
    names, arguments, finishes = {}, {}, []
    for chunk in stream:
        choice = chunk.choices[0]
        for call in choice.delta.tool_calls or []:
            if call.function.name:
                names[call.index] = names.get(call.index, "") + call.function.name
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
        finishes += [choice.finish_reason] if choice.finish_reason else []
    equal(names.get(0), "get_weather", "the function")
    equal(finishes, ["tool_calls"], "the finish reasons")
    for text in arguments.values():
        weather_arguments(text)


@check
def the_result_of_a_tool_can_be_sent_back(server):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris", "unit": "celsius"}'},
    }
    answer = server.client.chat.completions.create(
        model=server.model,
        messages=[
            {"role": "user", "content": "What is the weather in Paris?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "21 degrees, sunny"},
        ],
        tools=[WEATHER],
        max_tokens=8,
        temperature=0,
    )
    holds(answer.usage.completion_tokens > 0, "nothing was generated")


# Structured output


class Person(BaseModel):
    name: str
    age: int
    mood: Literal["happy", "sad"]


@check
def an_answer_is_parsed_into_a_model(server):
    answer = server.client.chat.completions.parse(
        model=server.model,
        messages=[{"role": "user", "content": "Describe Ada, who is 36 years old, as JSON."}],
        response_format=Person,
        max_completion_tokens=120,
        temperature=0,
    )
    person = answer.choices[0].message.parsed
    holds(isinstance(person, Person), f"parsed is {person!r}")


@check
def a_truncated_structured_answer_is_reported(server):
    try:
        server.client.chat.completions.parse(
            model=server.model,
            messages=[{"role": "user", "content": "Describe Ada as JSON."}],
            response_format=Person,
            max_completion_tokens=2,
        )
    except openai.LengthFinishReasonError:
        return
    raise AssertionError("an answer of two tokens was parsed")


@check
def a_streamed_answer_is_parsed_into_a_model(server):
    with server.client.chat.completions.stream(
        model=server.model,
        messages=[{"role": "user", "content": "Describe Ada, who is 36 years old, as JSON."}],
        response_format=Person,
        max_completion_tokens=120,
        temperature=0,
    ) as stream:
        for _ in stream:
            pass
        person = stream.get_final_completion().choices[0].message.parsed
    holds(isinstance(person, Person), f"parsed is {person!r}")


@check
def a_json_object_is_an_object(server):
    answer = server.chat(
        'Answer with a JSON object such as {"a": 1}.',
        response_format={"type": "json_object"},
        max_completion_tokens=200,
    ).choices[0]
    holds(answer.message.content.lstrip().startswith("{"), f"the answer is {answer.message.content!r}")
    if answer.finish_reason == "stop":
        holds(isinstance(json.loads(answer.message.content), dict), answer.message.content)
    else:
        equal(answer.finish_reason, "length", "finish_reason")


@check
def a_guided_choice_is_one_of_the_choices(server):
    choices = ["red", "green", "blue"]
    answer = server.chat("Which colour?", extra_body={"guided_choice": choices}, temperature=1)
    holds(answer.choices[0].message.content in choices, f"{answer.choices[0].message.content!r}")


# Responses


@check
def a_response_is_created(server):
    response = server.client.responses.create(
        model=server.model, input="Who wrote Hamlet?", max_output_tokens=16, temperature=0
    )
    equal(response.object, "response", "the object")
    holds("Shakespeare" in response.output_text, f"the text is {response.output_text!r}")
    holds(response.status in ("completed", "incomplete"), f"status {response.status}")
    holds(response.usage.output_tokens > 0, "output_tokens is 0")


@check
def a_response_takes_instructions_and_messages(server):
    response = server.client.responses.create(
        model=server.model,
        instructions="You are terse.",
        input=[{"role": "user", "content": "Say hello."}],
        max_output_tokens=4,
    )
    equal(response.status, "incomplete", "the status")
    equal(response.incomplete_details.reason, "max_output_tokens", "the reason")


@check
def a_response_streams_its_events(server):
    whole = server.client.responses.create(
        model=server.model, input="Name three colours.", max_output_tokens=16, temperature=0
    )
    stream = server.client.responses.create(
        model=server.model, input="Name three colours.", max_output_tokens=16, temperature=0, stream=True
    )
    events = list(stream)
    kinds = [event.type for event in events]
    equal(kinds[0], "response.created", "the first event")
    holds(kinds[-1] in ("response.completed", "response.incomplete"), f"the last event is {kinds[-1]}")
    numbers = [event.sequence_number for event in events]
    equal(numbers, list(range(len(numbers))), "the sequence numbers")
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    equal(text, whole.output_text, "the streamed text")
    equal(events[-1].response.output_text, whole.output_text, "the final text")


@check
def the_input_of_a_response_is_listed_and_counted(server):
    question = [{"role": "user", "content": "Say hello."}]
    response = server.client.responses.create(
        model=server.model, input=question, max_output_tokens=4, temperature=0
    )
    count = server.client.responses.input_tokens.count(model=server.model, input=question)
    equal(count.input_tokens, response.usage.input_tokens, "the count")
    items = list(server.client.responses.input_items.list(response.id, limit=1))
    equal([item.role for item in items], ["user"], "the roles")
    equal(items[0].content[0].text, "Say hello.", "the text")
    details = response.usage.input_tokens_details
    holds(details.cached_tokens + details.cache_write_tokens <= response.usage.input_tokens, "tokens of the cache")
    again = server.client.responses.create(
        model=server.model,
        input=[
            {"type": "item_reference", "id": items[0].id},
            {"type": "item_reference", "id": response.output[0].id},
            {"role": "user", "content": "Again."},
        ],
        max_output_tokens=4,
    )
    pages = server.client.responses.input_items.list(again.id, limit=2, order="asc")
    equal([item.id for item in pages][:2], [items[0].id, response.output[0].id], "the ids")
    holds(again.usage.input_tokens > response.usage.input_tokens, "the references add nothing")


@check
def tools_of_openai_are_skipped(server):
    raw = server.client.responses.with_raw_response.create(
        model=server.model, input="Say hello.", tools=[{"type": "web_search"}], max_output_tokens=4
    )
    equal(raw.headers["x-quell-skipped-tools"], "web_search", "the header")
    holds(raw.parse().output, "there is no output")


@check
def a_response_is_parsed_into_a_model(server):
    response = server.client.responses.parse(
        model=server.model,
        input="Describe Ada, who is 36 years old, as JSON.",
        text_format=Person,
        max_output_tokens=120,
        temperature=0,
    )
    holds(isinstance(response.output_parsed, Person), f"parsed is {response.output_parsed!r}")


# Embeddings


@check
def embeddings_are_returned(server):
    texts = ["a cat", "a kitten", "the stock market fell"]
    answer = server.client.embeddings.create(model=server.model, input=texts)
    equal([item.index for item in answer.data], [0, 1, 2], "the indexes")
    vectors = [item.embedding for item in answer.data]
    equal({len(vector) for vector in vectors}, {576}, "the lengths of the vectors")

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b))
        return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5

    cats, markets = cosine(vectors[0], vectors[1]), cosine(vectors[0], vectors[2])
    holds(cats > markets, f"a cat is nearer to the stock market ({markets}) than to a kitten ({cats})")
    holds(answer.usage.prompt_tokens > 0, "prompt_tokens is 0")


@check
def embeddings_as_base64_are_the_same_numbers(server):
    body = {"model": server.model, "input": "a cat"}
    ask = lambda form: requests.post(
        f"{server.url}/v1/embeddings", json={**body, "encoding_format": form}, timeout=60
    ).json()["data"][0]["embedding"]
    packed = base64.b64decode(ask("base64"))
    floats = struct.unpack(f"<{len(packed) // 4}f", packed)
    equal([struct.unpack("<f", struct.pack("<f", x))[0] for x in ask("float")], list(floats), "the numbers")


# Errors


@check
def an_unknown_model_is_not_found(server):
    call = lambda: server.client.chat.completions.create(
        model="no-such-model", messages=[{"role": "user", "content": "Hello"}]
    )
    error = refused(openai.NotFoundError, 404, call)
    equal(error.code, "model_not_found", "the code")
    holds("no-such-model" in str(error), f"the message is {error}")


@check
def a_wrong_value_is_a_bad_request_that_names_the_field(server):
    for field, value in [("temperature", -1), ("top_p", 2), ("n", 0), ("presence_penalty", 9)]:
        error = refused(openai.BadRequestError, 400, lambda: server.chat("Hello", **{field: value}))
        equal(error.param, field, "the field")
        equal(error.type, "invalid_request_error", "the type")


@check
def a_wrong_type_is_a_bad_request_that_names_the_field(server):
    error = refused(openai.BadRequestError, 400, lambda: server.chat("Hello", temperature="hot"))
    equal(error.param, "temperature", "the field")
    call = lambda: server.client.chat.completions.create(model=server.model, messages=[{"role": 5}])
    error = refused(openai.BadRequestError, 400, call)
    holds(error.param.startswith("messages"), f"the field is {error.param}")


@check
def a_prompt_that_is_too_long_is_refused_with_both_lengths(server):
    error = refused(openai.BadRequestError, 400, lambda: server.complete([1] * 20_000))
    equal(error.code, "context_length_exceeded", "the code")
    holds("20000" in str(error), f"the message is {error}")


@check
def an_unknown_route_is_not_found(server):
    refused(openai.NotFoundError, 404, lambda: server.client.files.list())


# Cancelled streams


@check
def a_closed_stream_frees_its_blocks(server):
    def ends():
        return server.gauge("quell_request_outcomes_total", reason="disconnect")

    server.becomes_idle()
    try:
        before = ends()
    except AssertionError:
        before = 0
    for _ in range(3):
        stream = server.chat(
            "Count up forever.",
            stream=True,
            max_completion_tokens=8000,
            extra_body={"ignore_eos": True},
        )
        for index, _ in enumerate(stream):
            if index == 4:
                break
        holds(server.gauge("quell_num_requests_running") > 0, "nothing ran while it was streamed")
        stream.close()
    server.becomes_idle()
    equal(ends() - before, 3, "the number of requests cancelled for a disconnect")


@check
def an_abandoned_request_frees_its_blocks(server):
    server.becomes_idle()
    impatient = server.client.with_options(timeout=0.5)
    try:
        impatient.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": "Count up forever."}],
            max_completion_tokens=8000,
            extra_body={"ignore_eos": True},
        )
    except openai.APITimeoutError:
        server.becomes_idle()
        return
    raise AssertionError("8000 tokens were computed within half a second")


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    names = [function.__name__ for function in CHECKS]
    wanted = sys.argv[2:] or names
    if unknown := set(wanted) - set(names):
        sys.exit(f"openai_client: no check is called {sorted(unknown)}")
    server = Server(sys.argv[1])
    for function in CHECKS:
        if function.__name__ not in wanted:
            continue
        started = time.monotonic()
        try:
            function(server)
        except Exception as error:
            print(f"FAILED  {function.__name__}: {type(error).__name__}: {error}", flush=True)
            sys.exit(1)
        print(f"ok  {function.__name__}  ({time.monotonic() - started:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
