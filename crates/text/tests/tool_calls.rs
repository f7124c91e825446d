//! Tool calls of every format: well-formed, malformed, and cut into chunks in every way.

use moellon_text::{ToolCallFormat, ToolCallParser, ToolEvent, ToolSchema};
use proptest::prelude::*;
use serde_json::{Value, json};

const FORMATS: [ToolCallFormat; 6] = [
    ToolCallFormat::Glm,
    ToolCallFormat::Hermes,
    ToolCallFormat::QwenCoder,
    ToolCallFormat::DeepSeek,
    ToolCallFormat::DeepSeekDsml,
    ToolCallFormat::Harmony,
];

fn tools() -> Vec<ToolSchema> {
    let tools = json!([
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {
            "city": {"type": "string"}, "days": {"type": "integer"}, "deep": {"type": "object"}, "note": {"type": ["string", "null"]}, "unit": {"enum": ["c", "f"]}}}}},
        {"name": "list_files", "input_schema": {"type": "object", "properties": {}}},
        {"type": "web_search"},
    ]);
    ToolSchema::from_openai(&tools).unwrap()
}

/// All events, with neighbouring texts joined.
fn parse_chunks<'a>(format: ToolCallFormat, chunks: impl Iterator<Item = &'a str>) -> Vec<ToolEvent> {
    joined(ToolCallParser::new(format, tools()), chunks)
}

/// The same while calls come.
fn stream_chunks<'a>(format: ToolCallFormat, chunks: impl Iterator<Item = &'a str>) -> Vec<ToolEvent> {
    joined(ToolCallParser::streaming(format, tools()), chunks)
}

fn joined<'a>(mut parser: ToolCallParser, chunks: impl Iterator<Item = &'a str>) -> Vec<ToolEvent> {
    let mut joined: Vec<ToolEvent> = Vec::new();
    let mut add = |event: ToolEvent| match (joined.last_mut(), event) {
        (Some(ToolEvent::Text(last)), ToolEvent::Text(text)) => last.push_str(&text),
        (Some(ToolEvent::Thinking(last)), ToolEvent::Thinking(text)) => last.push_str(&text),
        (Some(ToolEvent::CallArguments { text: last, .. }), ToolEvent::CallArguments { text, .. }) => {
            last.push_str(&text)
        }
        (_, event) => joined.push(event),
    };
    for chunk in chunks {
        parser.push(chunk).into_iter().for_each(&mut add);
    }
    parser.finish().into_iter().for_each(&mut add);
    assert_eq!(parser.pending_bytes(), 0);
    joined
}

fn parse(format: ToolCallFormat, output: &str) -> Vec<ToolEvent> {
    let whole = parse_chunks(format, [output].into_iter());
    let characters = parse_chunks(format, output.split_inclusive(|_| true));
    assert_eq!(characters, whole, "{output}");
    check_stream(format, output, &whole);
    whole
}

/// A streaming parser gives the same calls and texts, and the arguments that it gave are those of the calls.
fn check_stream(format: ToolCallFormat, output: &str, plain: &[ToolEvent]) {
    let whole = stream_chunks(format, [output].into_iter());
    assert_eq!(stream_chunks(format, output.split_inclusive(|_| true)), whole, "{output}");
    let mut given: Option<(usize, String, String)> = None;
    for event in &whole {
        match event {
            ToolEvent::CallStart { index, name, .. } => {
                assert!(given.is_none(), "{output}: {whole:?}");
                given = Some((*index, name.clone(), String::new()));
            }
            ToolEvent::CallArguments { index, text } => {
                let (begun, _, arguments) = given.as_mut().expect("a call has begun");
                assert_eq!(begun, index);
                arguments.push_str(text);
            }
            ToolEvent::Call(call) => {
                let (index, name, arguments) = given.take().expect("a call has begun");
                assert_eq!((index, &name), (call.index, &call.name));
                assert_eq!(serde_json::from_str::<Value>(&arguments).unwrap(), Value::Object(call.arguments.clone()));
            }
            ToolEvent::Malformed { begun, .. } => assert_eq!(*begun, given.take().map(|(index, ..)| index)),
            ToolEvent::Text(_) | ToolEvent::Thinking(_) => assert!(given.is_none(), "{output}: {whole:?}"),
        }
    }
    assert!(given.is_none(), "{output}: {whole:?}");
    if !whole.iter().any(|event| matches!(event, ToolEvent::Malformed { .. })) {
        let is_new =
            |event: &&ToolEvent| !matches!(event, ToolEvent::CallStart { .. } | ToolEvent::CallArguments { .. });
        assert_eq!(whole.iter().filter(is_new).collect::<Vec<_>>(), plain.iter().collect::<Vec<_>>(), "{output}");
    }
}

/// A short form of events: texts as they are, calls as `name{arguments}`, malformed calls as `!reason`.
fn short(events: &[ToolEvent]) -> Vec<String> {
    let form = |event: &ToolEvent| match event {
        ToolEvent::Text(text) => text.clone(),
        ToolEvent::Thinking(text) => format!("~{text}"),
        ToolEvent::Call(call) => format!("{}:{}{}", call.index, call.name, call.arguments_json()),
        ToolEvent::Malformed { reason, .. } => format!("!{reason}"),
        ToolEvent::CallStart { .. } | ToolEvent::CallArguments { .. } => panic!("{event:?} without streaming"),
    };
    events.iter().map(form).collect()
}

fn check(format: ToolCallFormat, cases: &[(&str, &[&str])]) {
    for (output, expected) in cases {
        assert_eq!(short(&parse(format, output)), *expected, "{output}");
    }
}

/// The output is no call: it comes out as text, and is flagged with a reason that has this part.
fn check_malformed(format: ToolCallFormat, cases: &[(&str, &str)]) {
    for (output, part) in cases {
        match &parse(format, output)[..] {
            [ToolEvent::Text(text), ToolEvent::Malformed { raw, reason, begun: None }] => {
                assert!(text.ends_with(raw.as_str()), "{output}: {text:?} {raw:?}");
                assert_eq!(text, output);
                assert!(reason.contains(part), "{output}: {reason}");
            }
            other => panic!("{output}: {other:?}"),
        }
    }
}

#[test]
fn glm() {
    check(
        ToolCallFormat::Glm,
        &[
            ("plain < text </tool_call>", &["plain < text </tool_call>"]),
            ("<tool_call>list_files</tool_call>", &["0:list_files{}"]),
            ("<tool_call>list_files\n</arg_value></tool_call>", &["0:list_files{}"]),
            (
                "Look:\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>42</arg_value>\n<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>\n<tool_call>list_files</tool_call>\n",
                &["Look:\n", "0:weather{\"city\":\"42\",\"days\":3}", "1:list_files{}"],
            ),
            (
                "<tool_call>weather<arg_key>deep</arg_key><arg_value>{'a': [True, None]}</arg_value><arg_key>note</arg_key><arg_value>null</arg_value><arg_key>unit</arg_key><arg_value>c</arg_value></tool_call> done",
                &["0:weather{\"deep\":{\"a\":[true,null]},\"note\":null,\"unit\":\"c\"}", " done"],
            ),
            // Text that looks like markup, and a closing marker inside of a value.
            (
                "<tool_call>weather<arg_key>city</arg_key><arg_value> <b>\n</tool_call></arg_value></tool_call>",
                &["0:weather{\"city\":\" <b>\\n</tool_call>\"}"],
            ),
            (
                "<tool_call>other<arg_key>x</arg_key><arg_value>not json</arg_value></tool_call>",
                &["0:other{\"x\":\"not json\"}"],
            ),
            (
                "<tool_call>{\"name\": \"weather\", \"arguments\": {\"days\": 1}}</tool_call>",
                &["0:weather{\"days\":1}"],
            ),
            ("<tool_call>weather {\"days\": 1}</tool_call>", &["0:weather{\"days\":1}"]),
            ("<tool_call>weather{\"days\": 1}</tool_call>", &["0:weather{\"days\":1}"]),
        ],
    );
    check_malformed(
        ToolCallFormat::Glm,
        &[
            ("a<tool_call></tool_call>", "function name"),
            ("<tool_call>two words</tool_call>", "single word"),
            ("<tool_call>weather {\"a\": }</tool_call>", "after the name"),
            ("<tool_call>weather<arg_key>city</arg_key></tool_call>", "expected <arg_value>"),
            ("<tool_call>weather<arg_key>city</tool_call>", "<arg_key> without"),
            ("<tool_call>weather<arg_key>city</arg_key><arg_value>x", "end of the output"),
            ("<tool_call>weather<arg_key>city</arg_key><arg_value>x</tool_call>", "does not end"),
            ("<tool_call>weath", "end of the output"),
        ],
    );
    // A good call after a bad one is not lost.
    let events = parse(
        ToolCallFormat::Glm,
        "<tool_call>weather<arg_key>city</arg_key><arg_value>x</tool_call> and <tool_call>list_files</tool_call>",
    );
    assert!(matches!(&events[1], ToolEvent::Malformed { .. }), "{events:?}");
    assert_eq!(short(&events[2..]), [" and ", "0:list_files{}"]);
}

#[test]
fn offered_tools_are_told_apart() {
    let events = parse(ToolCallFormat::Glm, "<tool_call>weather</tool_call><tool_call>nothing</tool_call>");
    let offered: Vec<bool> =
        events.iter().map(|event| matches!(event, ToolEvent::Call(call) if call.is_offered)).collect();
    assert_eq!(offered, [true, false]);
}

#[test]
fn hermes() {
    check(
        ToolCallFormat::Hermes,
        &[
            (
                "ok <tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"</tool_call> \\\" \", \"b\": 1, \"a\": 2}}\n</tool_call>\n<tool_call>{\"name\":\"list_files\"}</tool_call>",
                &["ok ", "0:weather{\"city\":\"</tool_call> \\\" \",\"b\":1,\"a\":2}", "1:list_files{}"],
            ),
            (
                "<tool_call>{\"name\": \"weather\", \"arguments\": \"{\\\"days\\\": 1}\"}</tool_call>",
                &["0:weather{\"days\":1}"],
            ),
            (
                "<tool_call>{\"function\": {\"name\": \"weather\", \"parameters\": {}}}</tool_call>x",
                &["0:weather{}", "x"],
            ),
        ],
    );
    check_malformed(
        ToolCallFormat::Hermes,
        &[
            ("<tool_call>{\"name\": \"weather\", \"arguments\": {}</tool_call>", "not JSON"),
            ("<tool_call>[1]</tool_call>", "expected a JSON object"),
            ("<tool_call>{\"name\": 3}</tool_call>", "found name 3"),
            ("<tool_call>{\"name\": \"a\", \"arguments\": [1]}</tool_call>", "found arguments [1]"),
            ("<tool_call>{\"name\": \"a\", \"arguments\": {\"x\": \"", "end of the output"),
        ],
    );
}

#[test]
fn qwen_coder() {
    check(
        ToolCallFormat::QwenCoder,
        &[
            (
                "<tool_call>\n<function=weather>\n<parameter=city>\n\n 1</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
                &["0:weather{\"city\":\"\\n 1\",\"days\":3}"],
            ),
            (
                "<tool_call><function=list_files></function><function=list_files></function></tool_call>",
                &["0:list_files{}", "1:list_files{}"],
            ),
            (
                "<tool_call><function=weather><parameter=city>a</function></tool_call></parameter></function></tool_call>",
                &["0:weather{\"city\":\"a</function></tool_call>\"}"],
            ),
        ],
    );
    check_malformed(
        ToolCallFormat::QwenCoder,
        &[
            ("<tool_call></tool_call>", "empty call"),
            ("<tool_call><function=a></tool_call>", "expected <parameter="),
            ("<tool_call><function=></function></tool_call>", "found name \"\""),
        ],
    );
}

#[test]
fn deepseek() {
    check(
        ToolCallFormat::DeepSeek,
        &[
            (
                "Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Zürich <｜tool▁call▁end｜>\"}<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>list_files<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                &["Let me see.", "0:weather{\"city\":\"Zürich <｜tool▁call▁end｜>\"}", "1:list_files{}"],
            ),
            (
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"days\": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                &["0:weather{\"days\":2}"],
            ),
        ],
    );
    check_malformed(
        ToolCallFormat::DeepSeek,
        &[
            ("<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>", "found no call"),
            (
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                "without <｜tool▁sep｜>",
            ),
            (
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{]<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                "not JSON",
            ),
            ("<｜tool▁calls▁begin｜>junk<｜tool▁calls▁end｜>", "found \"junk\""),
        ],
    );
    check(
        ToolCallFormat::DeepSeekDsml,
        &[(
            "x<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"weather\">\n<｜DSML｜parameter name=\"city\" string=\"true\">1 </｜DSML｜parameter>\n<｜DSML｜parameter name=\"days\" string=\"false\">[1]</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke name=\"list_files\">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
            &["x", "0:weather{\"city\":\"1 \",\"days\":[1]}", "1:list_files{}"],
        )],
    );
    check_malformed(
        ToolCallFormat::DeepSeekDsml,
        &[
            ("<｜DSML｜function_calls></｜DSML｜function_calls>", "found no call"),
            (
                "<｜DSML｜function_calls><｜DSML｜invoke name=\"a\"></｜DSML｜function_calls>",
                "expected </｜DSML｜invoke>",
            ),
            (
                "<｜DSML｜function_calls><｜DSML｜invoke name=\"a\"><｜DSML｜parameter name=\"b\" string=\"no\">1</｜DSML｜parameter></｜DSML｜invoke></｜DSML｜function_calls>",
                "expected true or false",
            ),
        ],
    );
}

#[test]
fn harmony() {
    check(
        ToolCallFormat::Harmony,
        &[
            (
                "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>final<|message|>Answer.<|return|>",
                &["~Think.", "Answer."],
            ),
            (
                "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"days\": 1}<|call|>",
                &["I will look.", "0:weather{\"days\":1}"],
            ),
            (" to=functions.list_files<|channel|>commentary json<|message|>{}", &["0:list_files{}"]),
            ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", &["~a", "b"]),
            ("no frame at all", &["no frame at all"]),
            ("", &[]),
        ],
    );
    let events = parse(ToolCallFormat::Harmony, "<|channel|>commentary to=functions.weather<|message|>{\"da");
    assert!(
        matches!(&events[..], [ToolEvent::Text(text), ToolEvent::Malformed { raw, .. }] if text == raw),
        "{events:?}"
    );
    let events = parse(ToolCallFormat::Harmony, "<|channel|>final");
    assert!(matches!(&events[..], [ToolEvent::Text(_), ToolEvent::Malformed { .. }]), "{events:?}");
}

/// Sizes of the pieces in which the arguments of a call come, token by token.
fn argument_pieces(format: ToolCallFormat, output: &str) -> Vec<usize> {
    let mut parser = ToolCallParser::streaming(format, tools());
    let chunks: Vec<String> = output.chars().collect::<Vec<_>>().chunks(4).map(|c| c.iter().collect()).collect();
    let events = chunks.iter().flat_map(|chunk| parser.push(chunk)).collect::<Vec<_>>();
    let size =
        |event: &ToolEvent| if let ToolEvent::CallArguments { text, .. } = event { Some(text.len()) } else { None };
    events.iter().filter_map(size).collect()
}

#[test]
fn long_arguments_come_while_they_are_written() {
    let text = "fn main() { println!(\\\"a < b\\\"); } ".repeat(20);
    let bare = text.replace("\\\"", "\"");
    let outputs = [
        (
            ToolCallFormat::Glm,
            format!("<tool_call>weather<arg_key>city</arg_key><arg_value>{bare}</arg_value></tool_call>"),
        ),
        (
            ToolCallFormat::Hermes,
            format!("<tool_call>{{\"name\": \"weather\", \"arguments\": {{\"city\": \"{text}\"}}}}</tool_call>"),
        ),
        (
            ToolCallFormat::QwenCoder,
            format!(
                "<tool_call>\n<function=weather>\n<parameter=city>\n{bare}\n</parameter>\n</function>\n</tool_call>"
            ),
        ),
        (
            ToolCallFormat::DeepSeek,
            format!(
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{{\"city\": \"{text}\"}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
            ),
        ),
        (
            ToolCallFormat::DeepSeekDsml,
            format!(
                "<｜DSML｜function_calls><｜DSML｜invoke name=\"weather\"><｜DSML｜parameter name=\"city\" string=\"true\">{bare}</｜DSML｜parameter></｜DSML｜invoke></｜DSML｜function_calls>"
            ),
        ),
        (
            ToolCallFormat::Harmony,
            format!("<|channel|>commentary to=functions.weather<|message|>{{\"city\": \"{text}\"}}<|call|>"),
        ),
    ];
    for (format, output) in outputs {
        let events = parse(format, &output);
        assert!(
            matches!(&events[..], [ToolEvent::Call(call)] if call.arguments["city"] == bare.as_str()),
            "{events:?}"
        );
        let pieces = argument_pieces(format, &output);
        assert!(pieces.len() > 100 && pieces.iter().all(|size| *size < 40), "{format:?}: {pieces:?}");
    }
}

#[test]
fn a_call_that_breaks_after_it_began_says_so_and_is_not_complete() {
    let cases = [
        (ToolCallFormat::Glm, "<tool_call>weather<arg_key>city</arg_key><arg_value>Paris</arg_value>junk</tool_call>"),
        (ToolCallFormat::Glm, "<tool_call>weather<arg_key>city</arg_key><arg_value>Par"),
        (ToolCallFormat::Hermes, "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": Paris}}</tool_call>"),
        (ToolCallFormat::QwenCoder, "<tool_call><function=weather><parameter=city>Paris</parameter></tool_call>"),
        (ToolCallFormat::Harmony, "<|channel|>commentary to=functions.weather<|message|>{\"city\": \"Par<|call|>"),
    ];
    for (format, output) in cases {
        let events = stream_chunks(format, output.split_inclusive(|_| true));
        let Some(ToolEvent::Malformed { raw, begun: Some(0), .. }) = events.last() else {
            panic!("{output}: {events:?}")
        };
        assert!(output.starts_with(raw.as_str()) || raw.contains("Par"), "{raw}");
        assert!(!events.iter().any(|event| matches!(event, ToolEvent::Call(_))));
    }
}

#[test]
fn schemas_are_read() {
    assert_eq!(tools().iter().map(ToolSchema::name).collect::<Vec<_>>(), ["weather", "list_files"]);
    for (tools, part) in
        [(json!({}), "expected a list"), (json!([{"type": "function", "function": {}}]), "tool 0 has no name")]
    {
        assert!(ToolSchema::from_openai(&tools).unwrap_err().to_string().contains(part));
    }
    assert_eq!(ToolSchema::new("f", Value::Null).parameters(), &Value::Null);
}

/// Pieces that outputs are made of, in all formats.
fn pieces() -> impl Strategy<Value = String> {
    const ALL: &[&str] = &[
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "weather",
        "city",
        "{\"name\": \"a\"}",
        "{\"x\": \"",
        "\"}",
        "<function=a>",
        "</function>",
        "<parameter=b>",
        "</parameter>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "{}",
        "<｜tool▁call▁end｜>",
        "<｜DSML｜function_calls>",
        "</｜DSML｜function_calls>",
        "<｜DSML｜invoke name=\"a\">",
        "</｜DSML｜invoke>",
        "<|start|>",
        "<|channel|>",
        "<|message|>",
        "<|end|>",
        "<|call|>",
        "assistant",
        "analysis",
        "final",
        " to=functions.a",
        "\n",
        " ",
        "é👍",
        "<",
        "\\\"",
    ];
    prop::collection::vec(prop::sample::select(ALL), 0..16).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn chunks_do_not_matter(output in pieces(), cuts in prop::collection::vec(0..400_usize, 0..6)) {
        let boundaries: Vec<usize> = output.char_indices().map(|(index, _)| index).chain([output.len()]).collect();
        let mut places: Vec<usize> = cuts.iter().map(|place| boundaries[place % boundaries.len()]).collect();
        places.extend([0, output.len()]);
        places.sort_unstable();
        for format in FORMATS {
            let whole = parse(format, &output);
            let cut = parse_chunks(format, places.windows(2).map(|pair| &output[pair[0]..pair[1]]));
            prop_assert_eq!(&cut, &whole);
            // Nothing is lost: what is no call comes out, in order, as it was.
            if format != ToolCallFormat::Harmony && !whole.iter().any(|event| matches!(event, ToolEvent::Call(_))) {
                let text: String = whole.iter().map(|event| match event { ToolEvent::Text(text) => text.as_str(), _ => "" }).collect();
                prop_assert_eq!(text, output.clone());
            }
        }
    }
}
