"""Writes what jinja2 makes of the templates in tests/templates, used the way transformers uses it.

    pip install jinja2 && python make_template_goldens.py

Output, all committed: goldens/conversations.json (the inputs), goldens/<template>.json (a text or an error for each
input) and goldens/snippets.json (small templates about Python's behaviour). The Rust tests compare bytes.
"""

import datetime
import json
import pathlib

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = pathlib.Path(__file__).parent
NOW = datetime.datetime(2025, 2, 28, 23, 59, 58)
SPECIAL_TOKENS = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}


class Generation(jinja2.ext.Extension):
    """The `generation` block of transformers' AssistantTracker, without the tracking."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda format: NOW.strftime(format)
    return env


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city, like \"Zürich\""},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
                "days": {"type": "integer", "minimum": 1, "maximum": 1.5e16, "default": 1},
            },
            "required": ["city"],
        },
    },
}
NESTED = {
    "type": "function",
    "strict": True,
    "defer_loading": False,
    "function": {
        "name": "search_orders",
        "description": "Searches <orders> & \"returns\".",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "filter": {
                    "type": "object",
                    "description": "What to look for",
                    "properties": {
                        "tags": {"type": "array", "items": {"type": "string"}},
                        "range": {
                            "type": "object",
                            "properties": {"from": {"type": "number"}, "to": {"type": "number", "nullable": True}},
                            "required": ["from"],
                        },
                        "ids": {"type": "array", "items": {"type": "integer"}, "nullable": True},
                    },
                },
                "items": {"type": "array", "items": {"type": "object", "properties": {"sku": {"type": "string"}}}},
                "keys": {"type": ["string", "null"], "description": "a parameter named like a method"},
                "value": {
                    "oneOf": [
                        {"type": "string", "description": "text", "default": "x"},
                        {"type": "number"},
                        {"type": "boolean"},
                    ]
                },
                "anything": {},
                "flag": {"type": "boolean", "default": False},
                "note": {"type": "string", "nullable": True, "default": None},
                "matrix": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
                "list": {"type": "array"},
            },
            "required": ["filter", "items"],
            "additionalProperties": False,
            "$defs": {"unused": [1, 2.0, 1e-7, None, True, {"ключ": "знач\u00ea"}]},
        },
    },
}
NO_ARGUMENTS = {
    "type": "function",
    "function": {"name": "list_files", "description": "Lists the files.", "parameters": {"type": "object", "properties": {}}},
}


def call(name, arguments, id="call_1"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "Hello!"}
TOOL_TURN = [
    SYSTEM,
    {"role": "user", "content": "Weather in Zürich and 東京?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Two cities, so two calls.",
        "tool_calls": [
            call("get_weather", {"city": "Zürich", "days": 3, "exact": 1.0, "huge": 1e22, "none": None, "ok": True}),
            call("get_weather", {"city": "東京 \"Tokyo\"\n\t\\", "nested": {"a": [1, {"b": "ç"}], "empty": {}, "l": []}}, "call_2"),
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "{\"temp\": 21.5}"},
    {"role": "tool", "tool_call_id": "call_2", "content": "cloudy ☁️\n19°"},
]

CONVERSATIONS = [
    ("hello", dict(messages=[HELLO])),
    ("no_generation_prompt", dict(messages=[HELLO], add_generation_prompt=False)),
    ("system", dict(messages=[SYSTEM, HELLO])),
    ("two_systems", dict(messages=[SYSTEM, HELLO, {"role": "assistant", "content": "Hi."}, {"role": "system", "content": "Now long."}, HELLO])),
    ("multi_turn", dict(messages=[SYSTEM, HELLO, {"role": "assistant", "content": "Hi! \n"}, {"role": "user", "content": "  How\tare you?\r\n"}])),
    ("history_with_reasoning", dict(messages=[
        HELLO,
        {"role": "assistant", "content": "4", "reasoning_content": "\n2 + 2\n", "thinking": "2 + 2"},
        {"role": "user", "content": "and 3 + 3?"},
        {"role": "assistant", "content": "<think>\nsix, of course\n</think>\n\n6"},
        {"role": "user", "content": "thanks"},
    ])),
    ("assistant_last", dict(messages=[HELLO, {"role": "assistant", "content": "Hi.", "reasoning_content": "greet", "thinking": "greet"}], add_generation_prompt=False)),
    ("thinking_off", dict(messages=[HELLO], kwargs={"enable_thinking": False, "thinking": False})),
    ("thinking_on", dict(messages=[SYSTEM, HELLO], kwargs={"enable_thinking": True, "thinking": True, "reasoning_effort": "high"})),
    ("keep_thinking", dict(messages=[
        HELLO,
        {"role": "assistant", "content": "Hi.", "reasoning_content": "  first\nthought "},
        {"role": "user", "content": "again"},
    ], kwargs={"clear_thinking": False, "reasoning_effort": "low"})),
    ("tools_offered", dict(messages=[HELLO], tools=[WEATHER, NO_ARGUMENTS])),
    ("nested_tools_and_system", dict(messages=[SYSTEM, HELLO], tools=[NESTED, WEATHER])),
    ("empty_tools", dict(messages=[SYSTEM, HELLO], tools=[])),
    ("parallel_calls_and_results", dict(messages=TOOL_TURN, tools=[WEATHER])),
    ("answer_after_results", dict(messages=TOOL_TURN + [
        {"role": "assistant", "content": "21.5° and 19°.", "reasoning_content": "Both known."},
        {"role": "user", "content": "Thanks 👍🏽"},
    ], tools=[WEATHER])),
    ("call_without_arguments", dict(messages=[
        HELLO,
        {"role": "assistant", "content": "Let me look.", "tool_calls": [call("list_files", {})]},
        {"role": "tool", "content": "a.txt"},
    ], tools=[NO_ARGUMENTS])),
    ("call_with_none_content", dict(messages=[
        HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call("list_files", {"deep": [True, None, "x"]})]},
        {"role": "tool", "content": ""},
    ], tools=[NO_ARGUMENTS])),
    ("arguments_as_text", dict(messages=[
        HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call("get_weather", "{\"city\": \"Oslo\"}")]},
        {"role": "tool", "content": "rain"},
    ], tools=[WEATHER])),
    ("content_parts", dict(messages=[
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "three"}]},
        {"role": "user", "content": "four"},
    ])),
    ("empty_content", dict(messages=[{"role": "system", "content": ""}, {"role": "user", "content": ""}, {"role": "assistant", "content": ""}, {"role": "user", "content": " "}])),
    ("unicode_and_markup", dict(messages=[
        {"role": "user", "content": "<b>&amp; \"q\" 'q' \\n {{ x }} {% y %} \u2028\u00a0 e\u0301 👩‍👩‍👧 \U0001f1e8\U0001f1ed ｜▁ </think> \u0000\u001f\u007f"},
        {"role": "assistant", "content": "ok <think>late</think> done"},
        {"role": "user", "content": "\ud7ff\ufffd"},
    ])),
    ("developer_role", dict(messages=[{"role": "developer", "content": "Act well."}, HELLO])),
    ("unknown_role", dict(messages=[HELLO, {"role": "critic", "content": "Bad."}])),
    ("tool_result_first", dict(messages=[{"role": "tool", "content": "42"}, HELLO])),
    ("tool_result_parts", dict(messages=TOOL_TURN[:3] + [{"role": "tool", "content": [{"type": "text", "text": "sunny"}, {"output": "late"}]}], tools=[WEATHER])),
    ("channel_tags_in_content", dict(messages=[HELLO, {"role": "assistant", "content": "<|channel|>analysis<|message|>x"}, HELLO])),
    ("skip_and_stop", dict(messages=[HELLO, {"role": "skip", "content": "no"}, {"role": "assistant", "content": " yes "}, {"role": "stop", "content": ""}, HELLO])),
    ("prefix", dict(messages=[HELLO, {"role": "assistant", "content": "Sure,", "prefix": True}], kwargs={"thinking": True}, add_generation_prompt=False)),
    ("identity", dict(messages=[HELLO], kwargs={"model_identity": "I am Möllön.", "documents": [{"title": "t"}]})),
]

# Small templates about single features; `v` is the same set of values for all.
VALUES = {
    "s": "Hello, World", "e": "", "u": "ÄÖß İ 東京", "w": "  a  b\tc \u00a0\n\u001f",
    "i": 42, "n": -7, "z": 0, "f": 1.5, "g": 1e22, "h": 1e-7, "j": 100.0, "t": True, "x": False, "o": None,
    "l": [3, 1, 2], "m": [], "d": {"b": 1, "a": [1, "x'y", None, 2.0], "items": "own", "c": {"k": "v"}}, "q": {},
    "p": [{"r": "user", "c": "A", "k": {"n": 1}}, {"r": "tool", "c": "B", "k": {"n": 2}}, {"r": "user", "c": "C"}],
    "big": 12345678901234567890, "quotes": "it's \"q\"\\ \n\t\x7f\u200b\u2028é\U0001f600",
}
SNIPPETS = """
{{ t }} {{ x }} {{ o }} {{ i }} {{ f }} {{ g }} {{ h }} {{ j }} {{ big }} {{ n }}
{{ t ~ x ~ o ~ i ~ f ~ g ~ h ~ missing }}
{{ l }} {{ d }} {{ q }} {{ m }} {{ (1,) }} {{ (1, 2) }} {{ () }}
{{ l ~ d }}
{{ [quotes, s] }}
{{ quotes }}
{{ {'a': 1, 2: 'b', true: none} }}
{{ l | tojson }} {{ d | tojson }} {{ quotes | tojson }} {{ g | tojson }} {{ h | tojson }}
{{ quotes | tojson(ensure_ascii=True) }} {{ u | tojson(true) }}
{{ d | tojson(indent=2) }}
{{ d | tojson(indent=4, sort_keys=True) }}
{{ d | tojson(false, 1) }}
{{ q | tojson(indent=2) }} {{ m | tojson(indent=2) }}
{{ d | tojson(separators=(',', ':')) }}
{{ {7: 2, none: 3, true: 4, 1.5: 5} | tojson }}
{{ missing | tojson }}
{{ '<a href="x">&\\'</a>' | tojson }}
{{ d | tojson(indent='--') }}
{{ p | map(attribute='c') | list | tojson }}
{{ (1, 'a') | tojson }}
{{ s is string }} {{ i is string }} {{ d is string }} {{ missing is string }} {{ o is string }}
{{ d is mapping }} {{ l is mapping }} {{ s is mapping }} {{ missing is mapping }}
{{ s is sequence }} {{ l is sequence }} {{ d is sequence }} {{ i is sequence }} {{ (1,2) is sequence }}
{{ s is iterable }} {{ l is iterable }} {{ d is iterable }} {{ i is iterable }} {{ o is iterable }} {{ missing is iterable }}
{{ l[1:] is sequence }} {{ (l + l) is sequence }} {{ l[::-1] is sequence }} {{ (l + [1])[1:] is iterable }}
{{ i is number }} {{ f is number }} {{ t is number }} {{ s is number }} {{ i is integer }} {{ f is integer }} {{ t is integer }} {{ f is float }} {{ t is boolean }} {{ i is boolean }}
{{ o is none }} {{ missing is none }} {{ missing is defined }} {{ missing is undefined }} {{ o is defined }} {{ d.zz is defined }} {{ d['zz'] is undefined }}
{{ t is true }} {{ i is true }} {{ x is false }} {{ z is false }} {{ t is sameas true }} {{ o is sameas none }}
{{ 1 is odd }} {{ 2 is even }} {{ 9 is divisibleby 3 }} {{ 'a' is in 'abc' }} {{ 3 is eq 3 }} {{ 3 is gt 2 }} {{ 'abc' is lower }} {{ 'ABC' is upper }}
{{ d is callable }} {{ raise_exception is callable }}
{{ s.split(', ') }} {{ s.split() }} {{ w.split() }} {{ w.strip() | tojson }} {{ w.lstrip() | tojson }} {{ w.rstrip() | tojson }} {{ s.strip('Hd') }}
{{ s.split('l', 1) }} {{ s.rsplit('l', 1) }} {{ w.split(none, 1) }} {{ w.rsplit(none, 1) }} {{ e.split() }} {{ e.split(',') }}
{{ 'a\\nb\\r\\nc\\x0bd\\u2028e\\n'.splitlines() }} {{ 'a\\nb\\r\\nc\\n'.splitlines(true) }} {{ ''.splitlines() }}
{{ s.partition(', ') }} {{ s.rpartition('o') }} {{ s.partition('#') }} {{ s.rpartition('#') }}
{{ s.removeprefix('Hello') }} {{ s.removesuffix('World') }} {{ s.removeprefix('x') }}
{{ s.startswith('Hell') }} {{ s.endswith(('x', 'World')) }} {{ s.find('o') }} {{ s.rfind('o') }} {{ s.find('#') }} {{ s.count('l') }} {{ s.index('W') }}
{{ s.upper() }} {{ s.lower() }} {{ u.lower() }} {{ u.upper() }} {{ 'hello world'.title() }} {{ 'hELLO'.capitalize() }}
{{ s.replace('l', 'L') }} {{ s.replace('l', 'L', 1) }} {{ 'abc'.replace('', '-') }} {{ 'abc'.replace('', '-', 2) }} {{ s | replace('l', '1') }} {{ s | replace('l', 7, 1) }}
{{ ', '.join(['a', 'b']) }} {{ '-'.join(p | map(attribute='r')) }}
{{ '{} {}'.format('a', 1) }} {{ '{0}-{x}'.format('a', x=2) }} {{ '%s|%d|%.2f' % ('a', 3, 1.5) }} {{ '%s' | format('z') }}
{{ '12'.isdigit() }} {{ 'a1'.isalnum() }} {{ 'ab'.isalpha() }} {{ '  '.isspace() }} {{ ''.isdigit() }}
{{ '7'.zfill(3) }} {{ 'a'.ljust(3) }}| {{ 'a'.rjust(3) }} {{ 'a'.center(3) }}|
{{ d.items() | list }} {{ d.keys() | list }} {{ d.values() | list }} {{ d.get('b') }} {{ d.get('zz') }} {{ d.get('zz', 'dflt') }}
{% for k, v in d.items() %}{{ loop.index }}:{{ k }}={{ v }};{% endfor %}
{% for k, v in d|items %}{{ k }}={{ v }};{% endfor %}{% for k, v in d|dictsort %}{{ k }};{% endfor %}
{% for k in d %}{{ k }},{% endfor %} {{ 'b' in d }} {{ 'zz' not in d }} {{ 'ell' in s }} {{ 3 in l }} {{ 'a' in missing }}
{{ d['b'] }} {{ d.c.k }} {{ d['c']['k'] }} {{ d.zz }} {{ d['items'] }} {{ l[0] }} {{ l[-1] }} {{ l[9] }} {{ s[0] }} {{ s[-1] }}
{{ d.zz.yy }}
{{ missing.attr }}
{{ missing() }}
{{ l[1:] }} {{ l[:-1] }} {{ l[::-1] }} {{ l[::2] }} {{ s[7:] }} {{ s[:5] }} {{ s[::-1] }} {{ l[5:] }} {{ s[-3:] }}
{{ l + [4] }} {{ [0] * 3 }} {{ '=' * 5 }} {{ 3 * 'ab' }} {{ l + m }} {{ (1,) + (2,) }}
{{ 7 / 2 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % 3 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 4 / 2 }} {{ 1 + 1.0 }} {{ 10 ** 20 }} {{ 0.1 + 0.2 }}
{{ s + i }}
{{ s + o }}
{{ s + missing }}
{{ 'a' 'b' }}
{{ 1 < 2 < 3 }} {{ not x }} {{ t and i }} {{ x or 'alt' }} {{ o or e or 'last' }} {{ i if t else 0 }} {{ i if x }} {{ t == 1 }} {{ 1 == 1.0 }} {{ '1' == 1 }}
{{ l | length }} {{ s | length }} {{ d | length }} {{ l | count }} {{ u | length }}
{{ missing | length }}
{{ l | sort }} {{ l | sort(reverse=true) }} {{ l | first }} {{ l | last }} {{ l | sum }} {{ l | max }} {{ l | min }} {{ l | reverse | list }} {{ m | first }} {{ s | reverse }}
{{ l | join(', ') }} {{ l | join }} {{ p | join('|', attribute='c') }} {{ [1.0, none, true, [1]] | join(' ') }}
{{ s | upper }} {{ s | lower }} {{ s | title }} {{ 'abc DEF' | capitalize }} {{ w | trim | tojson }} {{ 'xxaxx' | trim('x') }} {{ i | string }} {{ d | string }} {{ o | string }}
{{ missing | default('d') }} {{ e | default('d') }} {{ e | default('d', true) }} {{ o | default('d') }} {{ o | d('x', true) }}
{{ '3' | int }} {{ 'x' | int }} {{ '3.7' | int }} {{ 3.9 | int }} {{ 'x' | int(5) }} {{ '3.5' | float }} {{ 'x' | float }} {{ 2.567 | round(2) }} {{ 2.5 | round }} {{ -3 | abs }} {{ t | int }}
{{ p | selectattr('r', 'equalto', 'user') | map(attribute='c') | list }} {{ p | rejectattr('r', '==', 'user') | list | length }} {{ p | selectattr('k') | list | length }}
{{ p | map(attribute='k.n', default='none') | list }} {{ l | select('gt', 1) | list }} {{ l | reject('odd') | list }} {{ l | map('string') | list }} {{ ['a','b'] | map('upper') | join }}
{{ p | selectattr('k', 'defined') | list | length }} {{ p | map(attribute='zz') | list }}
{% for g in p | groupby('r') %}{{ g.grouper }}:{{ g.list | length }} {% endfor %}
{{ [1,2,2,3,1] | unique | list }} {{ [1,2,3,4,5] | batch(2) | list }} {{ 'abc' | list }} {{ d | list }} {{ {'a':1}.items() | list }}
{{ 'a\\nb\\n\\nc' | indent(2) }} {{ 'a\\nb' | indent(2, true) }} {{ 'a\\n\\nb' | indent(width=1, blank=true) }}
{{ '<b>' | escape }} {{ '<b>' | e }} {{ '<b>' | safe }}
{{ range(3) | list }} {{ range(1, 7, 2) | list }} {{ range(3, 0, -1) | list }} {{ range(0) | list }}
{% for i in range(3) %}{{ i }}{% if not loop.last %},{% endif %}{% endfor %}{{ i }}
{% for a in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.length }} {{ loop.previtem }} {{ loop.nextitem }} {{ loop.cycle('x','y') }};{% endfor %}
{% for a in l if a > 1 %}{{ loop.index }}:{{ a }} {% endfor %}{% for a in m %}{% else %}none{% endfor %}
{% for a in l %}{% for b in l %}{{ loop.index }}{% endfor %}{{ loop.index }} {% endfor %}
{% for a, b in [(1, 2), [3, 4]] %}{{ a }}{{ b }}{% endfor %}{% for a in missing %}x{% else %}empty{% endfor %}
{% for a in i %}x{% endfor %}
{% for c in 'añ👍' %}{{ c }}.{% endfor %}
{% for a in p recursive %}{{ a.r }}{% if a.sub %}{{ loop(a.sub) }}{% endif %}{% endfor %}
{% for a in l %}{% if a == 1 %}{% continue %}{% endif %}{{ a }}{% if a == 2 %}{% break %}{% endif %}{% endfor %}
{% for a in l %}{{ loop.changed(a > 2) }}{% endfor %}
{% set ns = namespace(a=1, l=[]) %}{% for q in l %}{% set ns.a = ns.a + q %}{% set ns.l = ns.l + [q] %}{% endfor %}{{ ns.a }} {{ ns.l }}
{% set y = 1 %}{% for q in l %}{% set y = y + 1 %}{{ y }}{% endfor %}{{ y }}
{% set y = 1 %}{% if t %}{% set y = 2 %}{% endif %}{{ y }}{% with y = 3 %}{{ y }}{% endwith %}{{ y }}
{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set c %}block {{ a }}{% endset %}{{ c }}{% set c | upper %}block{% endset %}{{ c }}
{% macro m(a, b='dflt', c=none) %}[{{ a }}|{{ b }}|{{ c }}|{{ varargs if false }}]{% endmacro %}{{ m(1) }}{{ m(1, 2) }}{{ m(a=1, c=3) }}{{ m() }}
{% macro m(x) %}{{ x * 2 }}{% endmacro %}{% set r = m('ab') %}{{ r is string }} {{ r | length }} {{ r + 'c' }} {{ 'abab' == r }}
{% macro fact(n) %}{{ 1 if n <= 1 else n * (fact(n - 1) | int) }}{% endmacro %}{{ fact(5) }}
{% macro outer() %}{{ s }}{{ t }}{% endmacro %}{{ outer() }}
{% macro m() %}{{ caller('x') }}{% endmacro %}{% call(a) m() %}<{{ a }}>{% endcall %}
{% filter upper %}abc{{ s }}{% endfilter %}
{% raw %}{{ not }} {% run %}{% endraw %}
a {#- comment -#} b {# {{ x }} #} c
x {%- if t -%}   y   {%- endif -%} z
{{ dict(a=1, b='x') }} {{ dict(a=1).a }} {{ namespace(x=1).x }}
{{ cycler('a', 'b').next() }}
{{ joiner(', ')() }}x
{{ l | tojson | length }} {{ ('a' ~ 1) * 2 }} {{ 'a' ~ 1 + 2 | string }}
{{ 1 ~ 2 + 3 }}
{{ -f }} {{ - i + 1 }} {{ 2 * -3 }} {{ 'x' ~ -1 }}
{{ i | string + s }} {{ (i | string) + s }} {{ s | length * 2 }} {{ 1 + l | length }}
{{ 'a' if missing is not defined else missing }} {{ 'b' if not missing else 'c' }}
{{ d.c == {'k': 'v'} }} {{ l == [3, 1, 2] }} {{ (1, 2) == [1, 2] }} {{ 'a' < 'b' }} {{ [1, 2] < [1, 3] }}
{{ true }} {{ True }} {{ none }} {{ None }} {{ false }} {{ False }}
{{ 'tab\\tnl\\nquote\\'uni\\u00e9\\x41' }} {{ "dq\\"" }} {{ 1_000 }} {{ 0x1f }} {{ 1e3 }} {{ 1.5e-7 }}
{{ strftime_now('%d %B %Y %H:%M:%S %p %I %j %a %A %b %y %%') }}
{{ raise_exception('stop: ' ~ i) }}
{{ s.nosuch() }}
{{ s | nosuch }}
{{ s is nosuch }}
{{ l.append(1) }}
{{ d.update({'a': 1}) }}
{{ d.pop('a') }}
{{ 1 / 0 }}
{{ s.__class__ }}
{{ o.x }}
{{ 'a'.join(l) }}
{{ l.index(1) }} {{ l.count(2) }}
{% if %}x{% endif %}
{% endfor %}
{{ s
{{ s }} }} {{ '{{' }} {% if '%}' %}ok{% endif %}
{{ 'a' in ['a', 'b'] and 'c' not in ['a'] }} {{ not 'a' in ['a'] }}
{{ (s | upper).lower() }} {{ s.split(',')[0].strip() }} {{ (l | sort)[0] }} {{ {'k': [1, {'z': 2}]}.k[1].z }}
{{ p | last }} {{ (p | last).c }} {{ p[-1]['c'] }} {{ (p[0].k.n ~ '') | int + 1 }}
{{ p | map(attribute='c') | join(', ') | upper }} {{ p | groupby('r') | map('first') | list }}
{{ d | dictsort }}
{{ s | replace('o', '') | trim | length }} {{ u | upper }} {{ 'ﬁ' | upper }}
{{ l | tojson(indent=none) }} {{ none | tojson }} {{ true | tojson }} {{ 1.0 | tojson }} {{ 'é' | tojson }}
{{ l is defined and l is iterable and l is not mapping and l is not string }}
{{ ['a', 'b', 'c'][1:] | join }} {{ 'abc'[1:] }} {{ p[1:] | length }}
{{ [1, [2, [3]]] }} {{ [none, true] | tojson }} {{ ['a'] == ('a',) }}
{{ [x] }} {{ {'a': t, 'b': o} }} {{ ['é', '\\n', "it's"] }}
{{ "%s" % s }} {{ "%d%%" % i }} {{ "%s" % d }} {{ "%s %s" % (t, o) }} {{ "%05.1f|%-4s|%4d" % (f, 'a', 7) }}
{{ f | int }} {{ 1e3 | int }} {{ '1e3' | float }} {{ 10 | float }} {{ 3 | round }} {{ 1234.5678 | round(1, 'floor') }}
{{ (s ~ '!') is string and s ~ '!' == 'Hello, World!' }} {{ s ~ '!' if s ~ 'x' else 'n' }}
{{ [s ~ 1, s + 'b'] | join(s ~ '-') }} {{ {'k' ~ 1: 'v' ~ 2} }} {{ l[i - 41] }} {{ l[z + 1] ~ l[z] }}
{% set z = l + [1] + [2] %}{{ z | length }} {{ z }} {% set z = z[1:] + l %}{{ z | tojson }}
{% for m in l + [9] if m > 1 %}{{ m }}{% endfor %}{% for m in (l + [9]) | sort %}{{ m }}{% endfor %}
{{ {} is mapping }} {{ {}.items() | list }} {{ [] or 'empty' }} {{ {} or 'empty' }} {{ '' or 'empty' }} {{ 0 or 'zero' }}
{{ loop is defined }} {{ caller is defined }}
{{ range is defined }}
""".strip("\n").split("\n")
# Snippets of several lines.
SNIPPETS += [
    "  {% if t %}\n    indented\n  {% endif %}\n  {{ s }}\n",
    "x\n  {%- if t +%}\n  y\n  {%+ endif %}\nz\n\n",
    "{% for a in l %}\n  {{ a }}\n{% endfor %}\n",
    "{% for a in l -%}\n  {{ a }},\n{%- endfor %}\nend\n\n\n",
    "a\r\nb\rc\n{% if t %}\r\nd{% endif %}\r\n",
    "{# c #}\n{{ s }}\n{#- c -#}\n  {{ s }}",
    "{% set x %}\n  body\n{% endset %}\n[{{ x }}]",
    "{% macro m() %}\n  in\n{% endmacro %}\n[{{ m() }}]",
    "\t {%- set a = 1 %} \n {{ a }} {%- raw %} {{ r }} {% endraw -%} \n e",
    "{% generation %}\n  inner {% set y = 1 %}{{ y }}\n{% endgeneration %}\n{{ y }}",
    "{%- for m in p -%}\n{%- if m.r == 'user' %}\n{{- '<' ~ m.r ~ '>' }}\n{{ m.c }}\n{%- endif %}\n{%- endfor %}",
]


def write(path, value):
    text = json.dumps(value, ensure_ascii=False, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def render(source, variables):
    """`{"text": ...}`, or `{"error": class, "message": ...}`."""
    try:
        return {"text": environment().from_string(source).render(**variables)}
    except Exception as error:  # every kind is a valid outcome here
        raised = type(error) is jinja2.exceptions.TemplateError
        return {"raised": error.message} if raised else {"error": f"{type(error).__name__}: {error}"}


def main():
    goldens = HERE / "goldens"
    goldens.mkdir(exist_ok=True)
    defaults = {"tools": None, "add_generation_prompt": True, "kwargs": {}}
    inputs = [{"name": name, **defaults, **given} for name, given in CONVERSATIONS]
    write(goldens / "conversations.json", inputs)
    for template in sorted((HERE / "templates").glob("*.jinja")):
        source = template.read_text(encoding="utf-8")
        outcomes = {}
        for given in inputs:
            variables = {"documents": None, **SPECIAL_TOKENS, **given["kwargs"]}
            variables |= {key: given[key] for key in ("messages", "tools", "add_generation_prompt")}
            outcomes[given["name"]] = render(source, variables)
        write(goldens / f"{template.stem}.json", outcomes)
    snippets = [{"source": source, **render(source, VALUES)} for source in SNIPPETS]
    write(goldens / "snippets.json", {"values": VALUES, "snippets": snippets})


main()
