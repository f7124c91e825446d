"""openai-python against our servers: chat, streams, tools, responses, scoring, errors. Runs with its versions 2 and 3."""

import json

import openai
import pytest

from servers import KEY

# Closed and short: the bundled model's words are its own, and must end within the tokens that a test asks for.
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": PARAMETERS}}
STRICT_TOOL = {"type": "function", "function": {**TOOL["function"], "strict": True}}
RESPONSES_TOOL = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": False}
HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)


def test_chat(server, client):
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=50)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    if server.is_scripted:
        assert answer.choices[0].message.content == "Hello from the script."
        assert answer.choices[0].message.reasoning_content == "Let me think."
        assert answer.choices[0].finish_reason == "stop"


def test_chat_stream_is_the_whole_answer(client):
    arguments = {"model": "tiny", "messages": HELLO, "max_tokens": 60, "temperature": 0, "seed": 1}
    whole = client.chat.completions.create(**arguments).choices[0]
    chunks = list(client.chat.completions.create(stream=True, **arguments))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == (whole.message.content or "")
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == (getattr(whole.message, "reasoning_content", None) or "")
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == [whole.finish_reason]
    # Web interfaces read them from the last chunk, without having asked for usage.
    assert chunks[-1].model_extra["timings"]["predicted_n"] > 0


def test_stream_helper_with_a_tool(server, client):
    choice = {"type": "function", "function": {"name": "get_weather"}}
    arguments = {"model": "tiny", "messages": HELLO, "tools": [STRICT_TOOL], "tool_choice": choice, "max_tokens": 150, "temperature": 0}
    with client.chat.completions.stream(stream_options={"include_usage": True}, **arguments) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "chunk" in kinds and "tool_calls.function.arguments.done" in kinds
    assert final.usage.completion_tokens > 0
    call = final.choices[0].message.tool_calls[0]
    # A model's call is constrained to the schema; the script's is what it says.
    assert call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city"}
    assert final.choices[0].finish_reason == "tool_calls"
    if server.is_scripted:
        assert json.loads(call.function.arguments) == {"city": "Paris"}


def test_tool_loop(scripted):
    client = openai.OpenAI(base_url=f"{scripted.url}/v1", api_key=KEY)
    first = client.chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL], max_tokens=80)
    call = first.choices[0].message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = [*HELLO, first.choices[0].message.model_dump(exclude_none=True), result]
    second = client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL], max_tokens=50)
    assert second.choices[0].message.content == "The tool said so."


def test_structured_output(client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "maximum": 99}},
        "required": ["name", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": schema}}
    arguments = {"model": "tiny", "messages": HELLO, "response_format": form, "max_tokens": 200, "temperature": 0}
    answer = client.chat.completions.create(extra_body={"chat_template_kwargs": {"enable_thinking": False}}, **arguments)
    if answer.choices[0].finish_reason == "stop" and "script" not in answer.choices[0].message.content:
        assert set(json.loads(answer.choices[0].message.content)) == {"name", "count"}


def test_many_answers_and_log_probabilities(client):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=12, n=3, logprobs=True, top_logprobs=2, seed=5,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in choice.logprobs.content)


def test_the_best_of_several_answers_is_the_likeliest(bundled):
    client = openai.OpenAI(base_url=f"{bundled.url}/v1", api_key=KEY)
    arguments = {"model": "tiny", "prompt": "fn add(", "max_tokens": 12, "temperature": 1, "seed": 5}
    several = client.completions.create(n=4, logprobs=0, **arguments).choices
    mean = lambda choice: sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)
    best = client.completions.create(best_of=4, **arguments)
    assert [choice.text for choice in best.choices] == [max(several, key=mean).text]
    assert best.usage.completion_tokens > 12, "all four are paid for"


def test_completions_and_scoring(server, client):
    answer = client.completions.create(model="tiny", prompt="one two", max_tokens=0, echo=True, logprobs=1)
    scores = answer.choices[0].logprobs
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset) == len(scores.top_logprobs)
    if not server.is_scripted:
        for score, best in zip(scores.token_logprobs[1:], scores.top_logprobs[1:]):
            assert max(best.values()) >= score


def test_responses(server, client):
    whole = client.responses.create(model="tiny", input="Say hello.", max_output_tokens=50)
    assert whole.status in ("completed", "incomplete")
    arguments = {"model": "tiny", "input": "weather?", "tools": [RESPONSES_TOOL], "max_output_tokens": 80}
    with client.responses.stream(**arguments) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    if server.is_scripted:
        assert whole.output_text == "Hello from the script."
        assert final.output[-1].type == "function_call"
        assert json.loads(final.output[-1].arguments) == {"city": "Paris"}


def test_errors(server, client):
    cases = [
        (openai.BadRequestError, {"temperature": -1}),
        (openai.NotFoundError, {"model": "other"}),
        (openai.BadRequestError, {"messages": []}),
    ]
    for kind, change in cases:
        with pytest.raises(kind) as error:
            client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **change})
        assert error.value.param == next(iter(change))
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()
    assert client.models.list().data[0].id


def test_a_prompt_beyond_the_context_is_refused_with_numbers(bundled):
    client = openai.OpenAI(base_url=f"{bundled.url}/v1", api_key=KEY)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 20_000}])
    assert error.value.code == "context_length_exceeded" and "2047" in error.value.message
