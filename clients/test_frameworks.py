"""Frameworks on top of the SDKs: litellm, LangChain, instructor."""

import openai

from servers import KEY

# Closed and short: the bundled model's words are its own, and must end within the tokens that a test asks for.
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": PARAMETERS}}
HELLO = [{"role": "user", "content": "Say hello."}]


def test_litellm(server):
    import litellm

    arguments = {"api_base": f"{server.url}/v1", "api_key": KEY, "messages": HELLO, "max_tokens": 50}
    answer = litellm.completion(model="openai/tiny", **arguments)
    assert answer.choices[0].finish_reason in ("stop", "length")
    chunks = litellm.completion(model="openai/tiny", stream=True, **arguments)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    if server.is_scripted:
        assert text == "Hello from the script."


def test_litellm_speaks_to_anthropics_protocol(server):
    import litellm

    answer = litellm.completion(
        model="anthropic/claude-x", api_base=server.url, api_key=KEY, messages=HELLO, max_tokens=50
    )
    if server.is_scripted:
        assert answer.choices[0].message.content == "Hello from the script."


def test_langchain(server):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{server.url}/v1", api_key=KEY, model="tiny", max_tokens=150, temperature=0)
    text = "".join(str(chunk.content) for chunk in model.stream("Say hello."))
    forced = model.bind_tools([TOOL], tool_choice="get_weather").invoke("weather?")
    assert [call["name"] for call in forced.tool_calls] == ["get_weather"]
    if server.is_scripted:
        assert text == "Hello from the script."
        assert forced.tool_calls[0]["args"] == {"city": "Paris"}


def test_instructor(server):
    import instructor
    import pydantic

    class Weather(pydantic.BaseModel):
        city: str = pydantic.Field(max_length=12)
        days: int = pydantic.Field(ge=0, le=9)

    client = instructor.from_openai(openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY))
    # Instructor forces the call with tool_choice, so that the model has to keep to the schema.
    arguments = {"model": "tiny", "messages": HELLO, "max_tokens": 250, "temperature": 0}
    weather = client.chat.completions.create(response_model=Weather, max_retries=0, **arguments)
    assert isinstance(weather, Weather)
    if server.is_scripted:
        # The client makes a class of its own from ours: compare the fields.
        assert (weather.city, weather.days) == ("Paris", 7)
