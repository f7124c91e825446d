"""anthropic-python against our servers: messages, streams, token counts, errors."""

import anthropic
import pytest

from servers import KEY

# Closed and short: the bundled model's words are its own, and must end within the tokens that a test asks for.
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"name": "get_weather", "description": "Weather", "input_schema": PARAMETERS}
HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture
def client(server):
    return anthropic.Anthropic(base_url=server.url, api_key=KEY)


def test_message_and_count(server, client):
    message = client.messages.create(model="claude-x", max_tokens=50, messages=HELLO)
    assert message.role == "assistant"
    if server.is_scripted:
        assert [block.type for block in message.content] == ["thinking", "text"]
        assert message.stop_reason == "end_turn"
    count = client.messages.count_tokens(model="claude-x", messages=HELLO)
    assert count.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens


def test_stream_with_a_forced_tool(server, client):
    choice = {"type": "tool", "name": "get_weather"}
    arguments = {"model": "claude-x", "max_tokens": 150, "messages": HELLO, "tools": [TOOL], "tool_choice": choice}
    # This SDK has no parameter for it any more; the protocol has.
    with client.messages.stream(**arguments, extra_body={"temperature": 0}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert final.usage.output_tokens > 0
    assert final.content[-1].type == "tool_use" and set(final.content[-1].input) == {"city"}
    assert final.stop_reason == "tool_use"
    if server.is_scripted:
        assert final.content[-1].input == {"city": "Paris"}


def test_tool_loop(scripted):
    client = anthropic.Anthropic(base_url=scripted.url, api_key=KEY)
    first = client.messages.create(model="claude-x", max_tokens=80, messages=HELLO, tools=[TOOL])
    call = first.content[-1]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    history = [block.model_dump() for block in first.content]
    messages = [*HELLO, {"role": "assistant", "content": history}, {"role": "user", "content": [result]}]
    second = client.messages.create(model="claude-x", max_tokens=80, messages=messages, tools=[TOOL])
    assert second.content[-1].text == "The tool said so."


def test_errors(client):
    with pytest.raises(anthropic.NotFoundError) as error:
        client.messages.create(model="other", max_tokens=5, messages=HELLO)
    assert error.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="claude-x", max_tokens=5, messages=[])
