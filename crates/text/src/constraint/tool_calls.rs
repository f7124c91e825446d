//! Tool calls as a grammar: only offered tools, with arguments that their schemas allow, as each family of models writes them.

use super::{ConstraintError, Grammar};
use crate::{Tokenizer, ToolCallFormat, ToolSchema};
use serde_json::{Map, Value, json};
use std::fmt::Write;

impl Grammar {
    /// The grammar of calls to `tools`. Where they are not `required`, text may come before them or instead of them;
    /// `parallel` allows more than one.
    ///
    /// # Errors
    /// [`ConstraintError::Grammar`] for no tools, or a tokenizer in which DeepSeek's DSML tags are special tokens.
    pub fn tool_calls(
        tokenizer: &Tokenizer,
        format: ToolCallFormat,
        tools: &[ToolSchema],
        required: bool,
        parallel: bool,
    ) -> Result<Grammar, ConstraintError> {
        let fail = |reason: &str| Err(ConstraintError::Grammar { kind: "tool calls", reason: reason.to_owned() });
        if tools.is_empty() {
            return fail("found no tools, expected at least one");
        }
        let writer = Writer { tokenizer, lark: String::new() };
        match format {
            ToolCallFormat::Glm | ToolCallFormat::Hermes | ToolCallFormat::QwenCoder => {
                Ok(writer.tagged(format, tools, required, parallel))
            }
            ToolCallFormat::DeepSeek => Ok(writer.deepseek(tools, required, parallel)),
            ToolCallFormat::DeepSeekDsml if writer.is_special("｜DSML｜") => {
                fail("found ｜DSML｜ as a special token, expected it as text")
            }
            ToolCallFormat::DeepSeekDsml => Ok(writer.dsml(tools, required, parallel)),
            ToolCallFormat::Harmony => Ok(writer.harmony(tools, required)),
        }
    }

    /// The grammar of a gpt-oss answer whose final message is what `self` describes; thoughts and preambles stay free.
    ///
    /// # Errors
    /// [`ConstraintError::Grammar`] for a choice of nothing.
    pub fn in_harmony(self, tokenizer: &Tokenizer) -> Result<Grammar, ConstraintError> {
        let fail = |kind, reason: &str| Err(ConstraintError::Grammar { kind, reason: reason.to_owned() });
        let answer = match self {
            Grammar::JsonObject => format!("%json {}", with_whitespace(json!({"type": "object"}))),
            Grammar::JsonSchema(Value::Bool(true)) => format!("%json {}", with_whitespace(json!({}))),
            Grammar::JsonSchema(schema) => format!("%json {}", with_whitespace(schema)),
            Grammar::Regex(regex) => format!("/{}/", with_slashes_escaped(&regex)),
            Grammar::Choice(texts) if texts.is_empty() => return fail("choice", "found an empty list"),
            Grammar::Choice(texts) => texts.iter().map(|text| quoted(text)).collect::<Vec<_>>().join(" | "),
            Grammar::Lark(lark) => format!("%lark {{\n{lark}\n}}"),
        };
        let mut writer = Writer { tokenizer, lark: String::new() };
        let [channel, message] = ["<|channel|>", "<|message|>"].map(|text| writer.marker(text));
        writer.line(&format!("start: before* {channel} \"final\" {message} answer"));
        writer.harmony_before();
        writer.line(&format!("answer: {answer}"));
        Ok(Grammar::Lark(writer.lark))
    }
}

struct Writer<'a> {
    tokenizer: &'a Tokenizer,
    lark: String,
}

impl Writer<'_> {
    /// `<tool_call>..</tool_call>`, one after the other.
    fn tagged(mut self, format: ToolCallFormat, tools: &[ToolSchema], required: bool, parallel: bool) -> Grammar {
        let (open, close) = (self.marker("<tool_call>"), self.marker("</tool_call>"));
        let more = if parallel { format!("(nl {open} call)*") } else { String::new() };
        self.start(&open, &format!("call {more}"), required);
        self.line("nl: \"\\n\"?");
        let bodies: Vec<String> = (0..tools.len()).map(|index| format!("tool_{index}")).collect();
        self.line(&format!("call: nl ({}) nl {close}", bodies.join(" | ")));
        for (index, tool) in tools.iter().enumerate() {
            match format {
                ToolCallFormat::Glm => self.glm(index, tool),
                ToolCallFormat::QwenCoder => self.qwen_coder(index, tool),
                _ => {
                    let head = quoted(&format!("{{\"name\": {}, \"arguments\": ", quoted(tool.name())));
                    self.line(&format!("tool_{index}: {head} args_{index} \"}}\""));
                    self.json(&format!("args_{index}"), &arguments_of(tool));
                }
            }
        }
        Grammar::Lark(self.lark)
    }

    fn glm(&mut self, index: usize, tool: &ToolSchema) {
        let head = quoted(tool.name());
        let begin = |key: &str, _| [format!("<arg_key>{key}</arg_key>"), "<arg_value>".to_owned()];
        self.arguments(index, tool, &head, begin, "</arg_value>");
        self.line(&format!("tool_{index}: head_{index}"));
    }

    fn qwen_coder(&mut self, index: usize, tool: &ToolSchema) {
        let head = quoted(&format!("<function={}>", tool.name()));
        self.arguments(index, tool, &head, |key, _| [format!("<parameter={key}>"), String::new()], "</parameter>");
        self.line(&format!("tool_{index}: head_{index} \"</function>\""));
    }

    /// The rule `head_{index}`: the tool's name and its arguments. One rule a property, in the schema's order, optional unless
    /// required. `begin` gives what comes before a value, of a name and whether it is text: two texts that may have a line
    /// break between them.
    fn arguments(
        &mut self,
        index: usize,
        tool: &ToolSchema,
        head: &str,
        begin: impl Fn(&str, bool) -> [String; 2],
        end: &str,
    ) {
        let schema = arguments_of(tool);
        let none = Map::new();
        let properties = schema["properties"].as_object().unwrap_or(&none);
        let required: Vec<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let mut rule = format!("head_{index}: {head} nl");
        for (number, (key, property)) in properties.iter().enumerate() {
            let name = format!("arg_{index}_{number}");
            let optional = if required.contains(&key.as_str()) { "" } else { "?" };
            // `write!` to a string cannot fail.
            let _ = write!(rule, " ({name} nl){optional}");
            let [first, second] = begin(key, is_text(property));
            let second = if second.is_empty() { String::new() } else { quoted(&second) };
            self.line(&format!("{name}: {} nl {second} {name}_value", quoted(&first)));
            self.value(&format!("{name}_value"), property, &schema, end);
        }
        self.line(&rule);
    }

    /// A value and the tag that ends it: text as it is, everything else as JSON.
    fn value(&mut self, name: &str, property: &Value, root: &Value, end: &str) {
        let options = property["enum"].as_array().filter(|options| options.iter().all(Value::is_string));
        if let Some(options) = options {
            let options: Vec<String> = options.iter().filter_map(Value::as_str).map(quoted).collect();
            self.line(&format!("{name}: ({}) {}", options.join(" | "), quoted(end)));
        } else if property["type"] == "string" {
            // Ends at the first tag, as the parser does.
            self.line(&format!("{name}[lazy]: /(.|\\n)*/ {}", quoted(end)));
        } else {
            let mut schema = property.clone();
            for definitions in ["$defs", "definitions"] {
                if let (Some(fields), Some(shared)) = (schema.as_object_mut(), root.get(definitions)) {
                    fields.insert(definitions.to_owned(), shared.clone());
                }
            }
            self.line(&format!("{name}: {name}_json nl {}", quoted(end)));
            self.json(&format!("{name}_json"), &schema);
        }
    }

    fn deepseek(mut self, tools: &[ToolSchema], required: bool, parallel: bool) -> Grammar {
        let [open, close, begin, separator, end] = [
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
        ]
        .map(|text| self.marker(text));
        let repeat = if parallel { "+" } else { "" };
        self.start(&open, &format!("(call){repeat} {close}"), required);
        let bodies: Vec<String> = (0..tools.len()).map(|index| format!("tool_{index}")).collect();
        self.line(&format!("call: {begin} ({}) {end}", bodies.join(" | ")));
        for (index, tool) in tools.iter().enumerate() {
            self.line(&format!("tool_{index}: {} {separator} args_{index}", quoted(tool.name())));
            self.json(&format!("args_{index}"), &arguments_of(tool));
        }
        Grammar::Lark(self.lark)
    }

    /// One `<｜DSML｜invoke>` a call in one block, as DeepSeek V3.2 writes them.
    fn dsml(mut self, tools: &[ToolSchema], required: bool, parallel: bool) -> Grammar {
        let [open, close] = ["<｜DSML｜function_calls>", "</｜DSML｜function_calls>"].map(quoted);
        let repeat = if parallel { "+" } else { "" };
        self.start(&open, &format!("nl (call nl){repeat} {close}"), required);
        self.line("nl: \"\\n\"?");
        let bodies: Vec<String> = (0..tools.len()).map(|index| format!("tool_{index}")).collect();
        self.line(&format!("call: {}", bodies.join(" | ")));
        for (index, tool) in tools.iter().enumerate() {
            let head = quoted(&format!("<｜DSML｜invoke name=\"{}\">", tool.name()));
            let begin = |key: &str, is_text| {
                [format!("<｜DSML｜parameter name=\"{key}\" string=\"{is_text}\">"), String::new()]
            };
            self.arguments(index, tool, &head, begin, "</｜DSML｜parameter>");
            self.line(&format!("tool_{index}: head_{index} \"</｜DSML｜invoke>\""));
        }
        Grammar::Lark(self.lark)
    }

    /// gpt-oss: a message to a tool is the last one, so there is one call; its end is a stop token, the engine's to allow.
    fn harmony(mut self, tools: &[ToolSchema], required: bool) -> Grammar {
        let [channel, constrain, message] =
            ["<|channel|>", "<|constrain|>", "<|message|>"].map(|text| self.marker(text));
        let answer = if required { String::new() } else { format!(" | {channel} \"final\" {message} TEXT") };
        self.line(&format!("start: before* ({channel} call{answer})"));
        self.harmony_before();
        self.line("TEXT: /(.|\\n)*/");
        let bodies: Vec<String> = (0..tools.len()).map(|index| format!("tool_{index}")).collect();
        self.line(&format!("call: {}", bodies.join(" | ")));
        for (index, tool) in tools.iter().enumerate() {
            let head = quoted(&format!("commentary to=functions.{}", tool.name()));
            self.line(&format!("tool_{index}: {head} (\" \" {constrain} \"json\")? {message} args_{index}"));
            self.json(&format!("args_{index}"), &arguments_of(tool));
        }
        Grammar::Lark(self.lark)
    }

    /// The rule `before`: a thought or a preamble, and the head of the message after it.
    fn harmony_before(&mut self) {
        let [channel, message, start] = ["<|channel|>", "<|message|>", "<|start|>"].map(|text| self.marker(text));
        let end = self.marker("<|end|>");
        self.line(&format!(
            "before: {channel} (\"analysis\" | \"commentary\") {message} thought {start} \"assistant\""
        ));
        if end.starts_with('"') {
            self.line(&format!("thought[lazy]: /(.|\\n)*/ {end}"));
        } else {
            self.line(&format!("thought: /(.|\\n)*/ {end}"));
        }
    }

    fn start(&mut self, open: &str, calls: &str, required: bool) {
        if required {
            self.line(&format!("start: {open} {calls}"));
        } else if open.starts_with('"') {
            // Free text ends where the first call opens; text without a call is all there is.
            self.line(&format!("start: TEXT | before {calls}"));
            self.line(&format!("before[lazy]: /(.|\\n)*/ {open}"));
            let opening = open.trim_matches('"').replace('/', "\\/");
            self.line(&format!("TEXT: /(.|\\n)*/ & ~/(.|\\n)*{opening}(.|\\n)*/"));
        } else {
            self.line(&format!("start: TEXT ({open} {calls})?"));
            self.line("TEXT: /(.|\\n)*/");
        }
    }

    fn json(&mut self, name: &str, schema: &Value) {
        self.line(&format!("{name}: %json {schema}"));
    }

    fn line(&mut self, line: &str) {
        self.lark.push_str(line);
        self.lark.push('\n');
    }

    fn is_special(&self, text: &str) -> bool {
        self.tokenizer.id_of(text).is_some_and(|id| self.tokenizer.is_special(id))
    }

    /// A marker as the grammar names it: by its id where it is a special token, by its text elsewhere.
    fn marker(&self, text: &str) -> String {
        match self.tokenizer.id_of(text).filter(|id| self.tokenizer.is_special(*id)) {
            Some(id) => format!("<[{id}]>"),
            None => quoted(text),
        }
    }
}

/// Whether a property's value is written as it is, without quotes.
fn is_text(property: &Value) -> bool {
    let is_all_text = |options: &Vec<Value>| options.iter().all(Value::is_string);
    property["enum"].as_array().is_some_and(is_all_text) || property["type"] == "string"
}

/// A regular expression as it may stand between slashes.
fn with_slashes_escaped(regex: &str) -> String {
    let (mut escaped, mut is_behind_backslash) = (String::with_capacity(regex.len()), false);
    for letter in regex.chars() {
        if letter == '/' && !is_behind_backslash {
            escaped.push('\\');
        }
        is_behind_backslash = letter == '\\' && !is_behind_backslash;
        escaped.push(letter);
    }
    escaped
}

/// A schema with our own options: a request's would include leniency.
fn with_whitespace(mut schema: Value) -> Value {
    if let Some(fields) = schema.as_object_mut() {
        fields.insert("x-guidance".to_owned(), json!({"whitespace_pattern": super::grammar::JSON_WHITESPACE}));
    }
    schema
}

/// The schema of a tool's arguments: an object, whatever the tool says or leaves out.
fn arguments_of(tool: &ToolSchema) -> Value {
    let mut schema = match tool.parameters() {
        Value::Object(fields) => Value::Object(fields.clone()),
        _ => json!({}),
    };
    schema["type"] = json!("object");
    with_whitespace(schema)
}

fn quoted(text: &str) -> String {
    Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::constraint::{Constraint, GrammarCompiler, TokenMask};
    use crate::{ToolCallParser, ToolEvent};
    use std::path::Path;

    fn tokenizer() -> Tokenizer {
        Tokenizer::from_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/moellon-tiny")).unwrap()
    }

    fn tools() -> Vec<ToolSchema> {
        let read = json!({"type": "object", "properties": {
            "path": {"type": "string"}, "lines": {"type": "integer"}, "mode": {"enum": ["text", "raw"]}},
            "required": ["path"]});
        vec![ToolSchema::new("read_file", read), ToolSchema::new("now", Value::Null)]
    }

    /// Whether the grammar takes all of a text and may end after it.
    fn accepts(tokenizer: &Tokenizer, constraint: &mut dyn Constraint, text: &str) -> bool {
        for id in tokenizer.encode(text, false).unwrap() {
            let mut mask = TokenMask::all(tokenizer.vocab_size());
            constraint.allow(&mut mask).unwrap();
            if !mask.contains(id) {
                return false;
            }
            constraint.consume(id).unwrap();
        }
        constraint.may_end()
    }

    const CALLS: [(ToolCallFormat, &str); 6] = [
        (
            ToolCallFormat::Glm,
            "<tool_call>read_file\n<arg_key>path</arg_key>\n<arg_value>a <b>\n\"c\"</arg_value>\n\
             <arg_key>lines</arg_key>\n<arg_value>12</arg_value>\n</tool_call>",
        ),
        (
            ToolCallFormat::Hermes,
            "<tool_call>\n{\"name\": \"read_file\", \"arguments\": {\"path\": \"a <b>\\n\\\"c\\\"\", \"lines\": 12}}\n</tool_call>",
        ),
        (
            ToolCallFormat::QwenCoder,
            "<tool_call>\n<function=read_file>\n<parameter=path>\na <b>\n\"c\"\n</parameter>\n<parameter=lines>\n12\n\
             </parameter>\n</function>\n</tool_call>",
        ),
        (
            ToolCallFormat::DeepSeek,
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>read_file<｜tool▁sep｜>{\"path\": \"a <b>\\n\\\"c\\\"\", \"lines\": 12}\
             <｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        (
            ToolCallFormat::DeepSeekDsml,
            "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"read_file\">\n\
             <｜DSML｜parameter name=\"path\" string=\"true\">a <b>\n\"c\"</｜DSML｜parameter>\n\
             <｜DSML｜parameter name=\"lines\" string=\"false\">12</｜DSML｜parameter>\n\
             </｜DSML｜invoke>\n</｜DSML｜function_calls>",
        ),
        (
            ToolCallFormat::Harmony,
            "<|channel|>commentary to=functions.read_file <|constrain|>json<|message|>\
             {\"path\": \"a <b>\\n\\\"c\\\"\", \"lines\": 12}",
        ),
    ];

    /// What a model of this format may write instead of a call.
    fn text_of(format: ToolCallFormat, text: &str) -> String {
        if format == ToolCallFormat::Harmony { format!("<|channel|>final<|message|>{text}") } else { text.to_owned() }
    }

    /// What it may write before a call, where none is required.
    fn before_of(format: ToolCallFormat, text: &str) -> String {
        match format {
            ToolCallFormat::Harmony => format!("<|channel|>commentary<|message|>{text}<|end|><|start|>assistant"),
            _ => text.to_owned(),
        }
    }

    #[test]
    fn what_the_grammar_allows_the_parser_reads() {
        let tokenizer = tokenizer();
        let compiler = GrammarCompiler::new(&tokenizer, tokenizer.vocab_size()).unwrap();
        for (format, call) in CALLS {
            for (required, parallel) in [(true, false), (true, true), (false, true)] {
                let grammar = Grammar::tool_calls(&tokenizer, format, &tools(), required, parallel).unwrap();
                let compiled =
                    || compiler.compile(grammar.clone()).unwrap_or_else(|e| panic!("{format:?} {e} {grammar:?}"));
                assert!(accepts(&tokenizer, compiled().as_mut(), call), "{format:?} {call} {grammar:?}");
                let other = call.replace("read_file", "write_file");
                assert!(!accepts(&tokenizer, compiled().as_mut(), &other), "{format:?} required {required}");
                let wrong = call.replace("12", "true");
                assert!(!accepts(&tokenizer, compiled().as_mut(), &wrong), "{format:?} required {required}");
                let text = "Let me look: 1 < 2.";
                let [answer, before] = [text_of(format, text), before_of(format, text)];
                assert_eq!(accepts(&tokenizer, compiled().as_mut(), &answer), !required, "{format:?}");
                let is_free = !required || format == ToolCallFormat::Harmony;
                assert_eq!(accepts(&tokenizer, compiled().as_mut(), &format!("{before}{call}")), is_free, "{format:?}");
                let is_tagged =
                    matches!(format, ToolCallFormat::Glm | ToolCallFormat::Hermes | ToolCallFormat::QwenCoder);
                if is_tagged {
                    let twice = format!("{call}\n{call}");
                    assert_eq!(accepts(&tokenizer, compiled().as_mut(), &twice), parallel, "{format:?}");
                }
            }
            let mut parser = ToolCallParser::new(format, tools());
            let mut events = parser.push(call);
            events.extend(parser.finish());
            let calls: Vec<_> = events.iter().filter(|event| matches!(event, ToolEvent::Call(_))).collect();
            assert_eq!(calls.len(), 1, "{format:?} {events:?}");
        }
    }

    #[test]
    fn two_dsml_calls_share_a_block_and_harmony_thinks_before_it_calls() {
        let tokenizer = tokenizer();
        let compiler = GrammarCompiler::new(&tokenizer, tokenizer.vocab_size()).unwrap();
        let compile = |format, parallel| {
            compiler.compile(Grammar::tool_calls(&tokenizer, format, &tools(), true, parallel).unwrap()).unwrap()
        };
        let now = "<｜DSML｜invoke name=\"now\"></｜DSML｜invoke>";
        let both = format!("<｜DSML｜function_calls>{now}{now}</｜DSML｜function_calls>");
        for parallel in [true, false] {
            let mut constraint = compile(ToolCallFormat::DeepSeekDsml, parallel);
            assert_eq!(accepts(&tokenizer, constraint.as_mut(), &both), parallel);
        }
        let call = "<|channel|>commentary to=functions.now<|message|>{}";
        let thought = "<|channel|>analysis<|message|>Now <then> what\n<|end|><|start|>assistant";
        assert!(accepts(&tokenizer, compile(ToolCallFormat::Harmony, true).as_mut(), &format!("{thought}{call}")));
        assert!(!accepts(&tokenizer, compile(ToolCallFormat::Harmony, true).as_mut(), thought));
        assert!(!accepts(&tokenizer, compile(ToolCallFormat::Harmony, true).as_mut(), &format!("{call} and more")));
    }

    #[test]
    fn a_final_message_of_harmony_is_held_to_its_grammar() {
        let tokenizer = tokenizer();
        let compiler = GrammarCompiler::new(&tokenizer, tokenizer.vocab_size()).unwrap();
        let thought = "<|channel|>analysis<|message|>{\"no\n<|end|><|start|>assistant";
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
        for (grammar, good, bad) in [
            (Grammar::JsonSchema(schema), "{\"a\": 1}", "{\"a\": \"1\"}"),
            (Grammar::JsonObject, "{\"b\": []}", "[]"),
            (Grammar::Regex("[a-z]+/[0-9]".to_owned()), "ab/7", "ab-7"),
            (Grammar::Regex(r"a\/\\/".to_owned()), "a/\\/", "a//"),
            (Grammar::Choice(vec!["yes".to_owned(), "no".to_owned()]), "no", "maybe"),
            (Grammar::Lark("start: \"x\" y\ny: \"y\"".to_owned()), "xy", "xx"),
        ] {
            let grammar = grammar.in_harmony(&tokenizer).unwrap();
            let compile = || compiler.compile(grammar.clone()).unwrap_or_else(|error| panic!("{error} {grammar:?}"));
            for before in ["", thought] {
                let written = |text: &str| format!("{before}<|channel|>final<|message|>{text}");
                assert!(accepts(&tokenizer, compile().as_mut(), &written(good)), "{grammar:?}");
                assert!(!accepts(&tokenizer, compile().as_mut(), &written(bad)), "{grammar:?}");
            }
            assert!(!accepts(&tokenizer, compile().as_mut(), good), "{grammar:?}");
        }
    }

    #[test]
    fn no_tools_are_an_error() {
        let tokenizer = tokenizer();
        assert!(Grammar::tool_calls(&tokenizer, ToolCallFormat::Glm, &[], true, true).is_err());
    }
}
