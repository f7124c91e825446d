"""Real clients against a server on loopback.

    python -m venv venv && venv/bin/pip install -r clients/requirements.txt
    cargo build -p moellon-serve --example scripted_server
    venv/bin/python -m pytest -q clients      # or: venv/bin/python clients/test_clients.py

The server replays answers (`crates/serve/examples/scripted_server.rs`): the protocols are what is tested. With
MOELLON_BASE_URL (and MOELLON_API_KEY) the tests run against a server that is there already; what only the script
promises is not checked then.
"""

import json
import os
import pathlib
import socket
import subprocess
import time
import urllib.request

import anthropic
import openai

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEY = os.environ.get("MOELLON_API_KEY", "test-key")
IS_SCRIPTED = "MOELLON_BASE_URL" not in os.environ
TOOL_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": TOOL_PARAMETERS}}
HELLO = [{"role": "user", "content": "Say hello."}]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start():
    if not IS_SCRIPTED:
        return None, os.environ["MOELLON_BASE_URL"]
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    binary = target / os.environ.get("MOELLON_PROFILE", "debug") / "examples" / "scripted_server"
    address = f"127.0.0.1:{free_port()}"
    server = subprocess.Popen([binary, address, ROOT / "models" / "moellon-tiny"])
    for _ in range(200):
        try:
            urllib.request.urlopen(f"http://{address}/health", timeout=1)
            return server, f"http://{address}"
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("the server did not come up within 10 s")


SERVER, URL = start()
openai_client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)
anthropic_client = anthropic.Anthropic(base_url=URL, api_key=KEY)


def test_openai_chat():
    answer = openai_client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=50)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    if IS_SCRIPTED:
        assert answer.choices[0].message.content == "Hello from the script."
        assert answer.choices[0].message.reasoning_content == "Let me think."
        assert answer.choices[0].finish_reason == "stop"


def test_openai_chat_stream_helper():
    with openai_client.chat.completions.stream(
        model="tiny", messages=HELLO, tools=[TOOL], stream_options={"include_usage": True}, max_tokens=80
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "chunk" in kinds
    assert final.usage.completion_tokens > 0
    if IS_SCRIPTED:
        call = final.choices[0].message.tool_calls[0]
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Paris"}
        assert final.choices[0].finish_reason == "tool_calls"


def test_openai_tool_loop():
    first = openai_client.chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL], max_tokens=80)
    if not IS_SCRIPTED:
        return
    call = first.choices[0].message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = HELLO + [first.choices[0].message.model_dump(exclude_none=True), result]
    second = openai_client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL], max_tokens=50)
    assert second.choices[0].message.content == "The tool said so."


def test_openai_completions_and_scoring():
    answer = openai_client.completions.create(
        model="tiny", prompt="one two", max_tokens=0, echo=True, logprobs=1
    )
    scores = answer.choices[0].logprobs
    assert scores.token_logprobs[0] is None
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset)


def test_openai_responses():
    tool = {"type": "function", "name": "get_weather", "parameters": TOOL_PARAMETERS, "strict": False}
    whole = openai_client.responses.create(model="tiny", input="Say hello.", max_output_tokens=50)
    assert whole.status in ("completed", "incomplete")
    with openai_client.responses.stream(model="tiny", input="weather?", tools=[tool]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    if IS_SCRIPTED:
        assert whole.output_text == "Hello from the script."
        assert final.output[-1].type == "function_call"
        assert json.loads(final.output[-1].arguments) == {"city": "Paris"}


def test_openai_errors():
    cases = [
        (openai.BadRequestError, {"temperature": -1}),
        (openai.NotFoundError, {"model": "other"}),
        (openai.BadRequestError, {"messages": []}),
    ]
    for kind, change in cases:
        arguments = {"model": "tiny", "messages": HELLO, **change}
        try:
            openai_client.chat.completions.create(**arguments)
        except kind as error:
            assert error.param == next(iter(change)), error
        else:
            raise AssertionError(f"{change} was accepted")
    try:
        openai.OpenAI(base_url=f"{URL}/v1", api_key="wrong").models.list()
    except openai.AuthenticationError:
        pass
    else:
        raise AssertionError("a wrong key was accepted")
    assert openai_client.models.list().data[0].id


def test_anthropic_message():
    message = anthropic_client.messages.create(model="claude-x", max_tokens=50, messages=HELLO)
    assert message.role == "assistant"
    if IS_SCRIPTED:
        assert [block.type for block in message.content] == ["thinking", "text"]
        assert message.stop_reason == "end_turn"
    count = anthropic_client.messages.count_tokens(model="claude-x", messages=HELLO)
    assert count.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens


def test_anthropic_stream():
    tool = {"name": "get_weather", "input_schema": TOOL_PARAMETERS}
    with anthropic_client.messages.stream(model="claude-x", max_tokens=80, messages=HELLO, tools=[tool]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_message()
    assert final.usage.output_tokens > 0
    if IS_SCRIPTED:
        assert final.stop_reason == "tool_use"
        assert final.content[-1].input == {"city": "Paris"}


def test_anthropic_errors():
    try:
        anthropic_client.messages.create(model="other", max_tokens=5, messages=HELLO)
    except anthropic.NotFoundError as error:
        assert error.body["error"]["type"] == "not_found_error"
    else:
        raise AssertionError("another model was accepted")


def test_litellm():
    import litellm

    arguments = {"api_base": f"{URL}/v1", "api_key": KEY, "messages": HELLO, "max_tokens": 50}
    answer = litellm.completion(model="openai/tiny", **arguments)
    assert answer.choices[0].finish_reason in ("stop", "length")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(model="openai/tiny", stream=True, **arguments))
    if IS_SCRIPTED:
        assert text == "Hello from the script."


def test_langchain():
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{URL}/v1", api_key=KEY, model="tiny", max_tokens=80)
    text = "".join(str(chunk.content) for chunk in model.stream("Say hello."))
    answer = model.bind_tools([TOOL]).invoke("weather?")
    if IS_SCRIPTED:
        assert text == "Hello from the script."
        assert answer.tool_calls[0]["args"] == {"city": "Paris"}


def test_instructor():
    import instructor
    import pydantic

    class Weather(pydantic.BaseModel):
        city: str
        days: int

    client = instructor.from_openai(openai_client)
    # Instructor forces the call with tool_choice.
    weather = client.chat.completions.create(model="tiny", response_model=Weather, messages=HELLO, max_retries=0)
    assert isinstance(weather, Weather)
    if IS_SCRIPTED:
        # The client makes a class of its own from ours: compare the fields.
        assert (weather.city, weather.days) == ("Paris", 7)


def main():
    failed = 0
    try:
        for name, test in list(globals().items()):
            if name.startswith("test_"):
                try:
                    test()
                    print("ok    ", name)
                except Exception as error:  # every test is to run
                    failed += 1
                    print("FAILED", name, type(error).__name__, str(error)[:500])
    finally:
        if SERVER is not None:
            SERVER.terminate()
            assert SERVER.wait(timeout=40) == 0, "the server did not stop cleanly"
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
