//! Tests of grammars with the bundled model's tokenizer.

use super::*;
use std::path::Path;
use std::time::Instant;

/// A linear congruential generator: a walk needs no better.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/moellon-tiny")).unwrap()
}

fn compiler(tokenizer: &Tokenizer) -> GrammarCompiler {
    GrammarCompiler::new(tokenizer, tokenizer.vocab_size() + 5).unwrap()
}

/// Consumes a text; where it was refused, if it was.
fn consume(constraint: &mut dyn Constraint, tokenizer: &Tokenizer, text: &str) -> Result<(), usize> {
    for (index, id) in tokenizer.encode_ordinary(text).unwrap().into_iter().enumerate() {
        let mut mask = TokenMask::all(tokenizer.vocab_size() + 5);
        constraint.allow(&mut mask).unwrap();
        let consumed = constraint.consume(id);
        assert_eq!(mask.contains(id), consumed.is_ok(), "mask and consume agree on {id} at {index} of {text:?}");
        consumed.map_err(|_| index)?;
    }
    Ok(())
}

#[test]
fn each_kind_accepts_what_it_describes_and_nothing_else() {
    let tokenizer = tokenizer();
    let compiler = compiler(&tokenizer);
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"], "additionalProperties": false});
    let cases = [
        (Grammar::JsonObject, "{\"k\": [1, null]}", "[1]"),
        (Grammar::JsonSchema(schema), "{\"a\": 12, \"b\": \"y\"}", "{\"a\": \"12\"}"),
        (Grammar::JsonSchema(json!(true)), "[1, 2]", "nope"),
        (Grammar::Regex("[0-9]{3}-[a-z]+".to_owned()), "123-abc", "12-abc"),
        (Grammar::Choice(vec!["yes \"so\"".to_owned(), "no".to_owned()]), "yes \"so\"", "maybe"),
        (Grammar::Lark("start: \"(\" start \")\" | \"x\"".to_owned()), "((x))", "((y))"),
    ];
    for (grammar, good, bad) in cases {
        let mut constraint = compiler.compile(grammar.clone()).unwrap();
        assert!(!constraint.may_end(), "{grammar:?}");
        assert_eq!(consume(constraint.as_mut(), &tokenizer, good), Ok(()), "{grammar:?}");
        assert!(constraint.may_end(), "{grammar:?} after {good}");
        let mut constraint = compiler.compile(grammar.clone()).unwrap();
        assert!(consume(constraint.as_mut(), &tokenizer, bad).is_err(), "{grammar:?} with {bad}");
    }
}

#[test]
fn special_tokens_are_allowed_only_where_a_grammar_names_them() {
    let tokenizer = tokenizer();
    let compiler = compiler(&tokenizer);
    let is_named = |id: &u32| Some(*id) != tokenizer.eos_id() && tokenizer.token(*id).unwrap().starts_with("<|");
    let special = tokenizer.special_ids().iter().copied().find(is_named).unwrap();
    let name = tokenizer.token(special).unwrap();
    let mut text = compiler.compile(Grammar::Regex(r"(.|\n)*".to_owned())).unwrap();
    let mut mask = TokenMask::all(tokenizer.vocab_size() + 5);
    text.allow(&mut mask).unwrap();
    assert!(tokenizer.special_ids().iter().all(|id| !mask.contains(*id)));
    assert!(mask.count() > tokenizer.vocab_size() / 2 && mask.count() <= tokenizer.vocab_size());
    assert!(text.may_end());
    let mut named = compiler.compile(Grammar::Lark(format!("start: \"a\" {name}"))).unwrap();
    assert_eq!(consume(named.as_mut(), &tokenizer, "a"), Ok(()));
    mask.set_all();
    named.allow(&mut mask).unwrap();
    assert_eq!((mask.count(), mask.contains(special)), (1, true));
    named.consume(special).unwrap();
    assert!(named.is_complete());
    named.rollback(1).unwrap();
    assert!(!named.is_complete());
    named.consume(special).unwrap();
    assert_eq!(named.rollback(3), Err(ConstraintError::Rollback { found: 3, consumed: 2 }));
}

#[test]
fn random_walks_inside_the_mask_end_in_json_and_rollback_changes_nothing() {
    let tokenizer = tokenizer();
    let compiler = compiler(&tokenizer);
    let schema = json!({"type": "object", "properties": {
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "size": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"type": "null"}]}},
        "required": ["name", "tags", "size"], "additionalProperties": false});
    for seed in 0..12 {
        let mut random = Random(seed);
        let mut constraint = compiler.compile(Grammar::JsonSchema(schema.clone())).unwrap();
        let mut mask = TokenMask::all(tokenizer.vocab_size() + 5);
        let mut ids = Vec::new();
        while !constraint.is_complete() && ids.len() < 400 {
            mask.set_all();
            constraint.allow(&mut mask).unwrap();
            if mask.is_empty() {
                break;
            }
            let allowed: Vec<u32> = (0..mask.vocab_size() as u32).filter(|id| mask.contains(*id)).collect();
            // A rejected draft.
            let draft = allowed[random.below(allowed.len())];
            constraint.consume(draft).unwrap();
            constraint.rollback(1).unwrap();
            let mut again = TokenMask::all(mask.vocab_size());
            constraint.allow(&mut again).unwrap();
            assert_eq!(again, mask);
            let id = allowed[random.below(allowed.len())];
            constraint.consume(id).unwrap();
            ids.push(id);
        }
        let text = tokenizer.decode(&ids, false);
        assert!(constraint.may_end(), "{text}");
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert!(value["name"].is_string() && value["tags"].is_array(), "{text}");
    }
}

#[test]
fn hostile_grammars_fail_within_two_seconds_and_say_why() {
    let tokenizer = tokenizer();
    let compiler = compiler(&tokenizer);
    let nested = |depth: usize| format!("{}a{}", "(".repeat(depth), ")".repeat(depth));
    let many: Vec<Value> = (0..100_000).map(|i| json!(format!("value number {i}"))).collect();
    let hostile = [
        Grammar::Regex(nested(60_000)),
        Grammar::Lark(format!("start: {}", nested(60_000))),
        Grammar::Regex("(?<=a)b".to_owned()),
        Grammar::Regex("[a".to_owned()),
        Grammar::JsonSchema(json!({"enum": many})),
        Grammar::JsonSchema(json!({"type": "string", "pattern": nested(60_000)})),
        Grammar::JsonSchema(json!({"type": 123})),
        Grammar::JsonSchema(json!({"type": "hiccup"})),
        Grammar::JsonSchema(json!({"properties": {"foo": "bar"}})),
        Grammar::JsonSchema(json!({"$ref": "http://example.com/schema.json"})),
        Grammar::JsonSchema(json!({"allOf": [{"type": "string"}, {"type": "integer"}]})),
        Grammar::JsonSchema(json!("text")),
        Grammar::JsonSchema(json!(false)),
        Grammar::Lark("start: missing".to_owned()),
        Grammar::Lark(String::new()),
        Grammar::Choice(Vec::new()),
    ];
    for grammar in hostile {
        let name: String = format!("{grammar:?}").chars().take(80).collect();
        let started = Instant::now();
        let error = compiler.compile(grammar).err().unwrap_or_else(|| panic!("{name} compiles")).to_string();
        assert!(started.elapsed() < Duration::from_secs(2), "{name} took {:?}", started.elapsed());
        assert!(!error.contains('\n') && error.len() < 500, "{name}: {error}");
    }
    // Dropping such a value recurses, so it is given a stack; our check does not need it.
    let checked = std::thread::Builder::new().stack_size(256 << 20).spawn(|| {
        let mut deep = Value::Null;
        for _ in 0..20_000 {
            deep = Value::Array(vec![deep]);
        }
        let outcome = Grammar::JsonSchema(deep).check();
        assert!(matches!(outcome, Err(ConstraintError::TooComplex { what: "nesting", .. })));
    });
    checked.unwrap().join().unwrap();
}

#[test]
fn costly_but_legal_grammars_compile_or_fail_within_two_seconds() {
    let tokenizer = tokenizer();
    let compiler = compiler(&tokenizer);
    let all_of: Vec<Value> = (0..1000).map(|i| json!({"type": "integer", "minimum": i})).collect();
    let costly = [
        Grammar::Regex("a{1,1000000}".to_owned()),
        Grammar::Regex("(a*)*b".to_owned()),
        Grammar::Regex("(x+x+)+y".to_owned()),
        Grammar::JsonSchema(json!({"allOf": all_of})),
        Grammar::JsonSchema(json!({"$ref": "#"})),
        Grammar::JsonSchema(json!({"type": "object", "properties": {"next": {"$ref": "#"}}})),
    ];
    for grammar in costly {
        let name: String = format!("{grammar:?}").chars().take(80).collect();
        let started = Instant::now();
        // Either is fine: what must not happen is to hang, to crash, or to allow everything.
        if let Ok(mut constraint) = compiler.compile(grammar) {
            let mut mask = TokenMask::all(tokenizer.vocab_size());
            if constraint.allow(&mut mask).is_ok() {
                assert!(mask.count() < tokenizer.vocab_size(), "{name}");
            }
        }
        assert!(started.elapsed() < Duration::from_secs(2), "{name} took {:?}", started.elapsed());
    }
}

/// Every feature of JSON schema that llguidance documents as supported: a value that fits and one that does not. What it
/// does not support must be refused, never ignored.
#[test]
fn features_of_json_schema_constrain_or_are_refused() {
    let tokenizer = tokenizer();
    let compiler = compiler(&tokenizer);
    let object = |extra: Value| {
        let mut schema = json!({"type": "object", "additionalProperties": false});
        schema.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        schema
    };
    let supported = [
        (json!({"type": "null"}), "null", "nil"),
        (json!({"type": "boolean"}), "true", "1"),
        (json!({"type": ["integer", "null"]}), "null", "\"a\""),
        (json!({"type": "integer", "minimum": 3, "maximum": 11}), "11", "12"),
        (json!({"type": "integer", "exclusiveMinimum": 3}), "4", "3 "),
        (json!({"type": "integer", "multipleOf": 5}), "15", "16 "),
        (json!({"type": "number", "minimum": 0.5, "maximum": 1.5}), "0.75", "2"),
        (json!({"type": "string", "minLength": 2, "maxLength": 3}), "\"abc\"", "\"abcd\""),
        (json!({"type": "string", "pattern": "^[a-f]+[0-9]$"}), "\"abc7\"", "\"xyz\""),
        (json!({"type": "string", "format": "date"}), "\"2026-11-21\"", "\"21.11.2026\""),
        (json!({"type": "string", "format": "uuid"}), "\"123e4567-e89b-12d3-a456-426614174000\"", "\"nope\""),
        (json!({"const": {"a": [1]}}), "{\"a\": [1]}", "{\"a\": [2]}"),
        (json!({"enum": ["x", 7, null]}), "7", "8"),
        (json!({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}), "[true, false]", "[]"),
        (
            json!({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": false}),
            "[1, \"a\"]",
            "[1, 2]",
        ),
        (object(json!({"properties": {"a": {"type": "integer"}}, "required": ["a"]})), "{\"a\": 1}", "{}"),
        (object(json!({"properties": {"a": {"type": "integer"}}})), "{}", "{\"b\": 1}"),
        (json!({"type": "object", "additionalProperties": {"type": "integer"}}), "{\"z\": 1}", "{\"z\": \"a\"}"),
        (object(json!({"patternProperties": {"^x": {"type": "integer"}}})), "{\"xy\": 1}", "{\"y\": 1}"),
        (json!({"anyOf": [{"type": "integer"}, {"type": "boolean"}]}), "false", "\"a\""),
        (json!({"oneOf": [{"const": "a"}, {"const": "b"}]}), "\"b\"", "\"c\""),
        (json!({"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 4}]}), "3", "5"),
        (
            json!({"$ref": "#/$defs/tree", "$defs": {"tree": object(json!({
                "properties": {"left": {"$ref": "#/$defs/tree"}, "leaf": {"type": "integer"}}}))}}),
            "{\"left\": {\"left\": {\"leaf\": 1}}}",
            "{\"left\": {\"left\": 1}}",
        ),
        (json!({"definitions": {"n": {"type": "integer"}}, "$ref": "#/definitions/n"}), "5", "\"5\""),
    ];
    for (schema, good, bad) in supported {
        let compile =
            || compiler.compile(Grammar::JsonSchema(schema.clone())).unwrap_or_else(|e| panic!("{schema}: {e}"));
        let mut constraint = compile();
        assert_eq!(consume(constraint.as_mut(), &tokenizer, good), Ok(()), "{schema} with {good}");
        assert!(constraint.may_end(), "{schema} after {good}");
        let mut constraint = compile();
        let refused = consume(constraint.as_mut(), &tokenizer, bad).is_err();
        assert!(refused || !constraint.may_end(), "{schema} with {bad}");
    }
    let unsupported = [
        json!({"not": {"type": "integer"}}),
        json!({"if": {"type": "integer"}, "then": {"minimum": 3}}),
        json!({"type": "array", "uniqueItems": true}),
        json!({"type": "array", "contains": {"type": "integer"}}),
        json!({"type": "object", "propertyNames": {"pattern": "^a"}}),
        json!({"type": "object", "dependentRequired": {"a": ["b"]}}),
        json!({"type": "object", "unevaluatedProperties": false}),
        json!({"type": "string", "format": "made-up"}),
    ];
    for schema in unsupported {
        assert!(compiler.compile(Grammar::JsonSchema(schema.clone())).is_err(), "{schema} must not be ignored");
    }
}

#[test]
fn legal_grammars_wait_for_a_slot_and_what_gets_none_is_told_to_come_back() {
    let tokenizer = tokenizer();
    let compiler = compiler(&tokenizer);
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
    // More at once than there are slots: all of them compile.
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..4 * MAX_COMPILATIONS)
            .map(|_| scope.spawn(|| compiler.compile(Grammar::JsonSchema(schema.clone())).map(drop)))
            .collect();
        for outcome in asking {
            assert_eq!(outcome.join().unwrap(), Ok(()));
        }
    });
    let later = || Instant::now() + Duration::from_secs(60);
    let taken: Vec<_> = (0..MAX_COMPILATIONS).map(|_| compiler.slots.take(later()).expect("all are free")).collect();
    let outcome = compiler.compile_by(Grammar::JsonSchema(schema.clone()), Instant::now());
    assert_eq!(outcome.err(), Some(ConstraintError::Busy { kind: "json_schema" }));
    // What is wrong by itself is refused without waiting.
    let outcome = compiler.compile_by(Grammar::Choice(Vec::new()), Instant::now());
    assert!(matches!(outcome.err(), Some(ConstraintError::Grammar { .. })));
    drop(taken);
    assert!(compiler.compile_by(Grammar::JsonSchema(schema), later()).is_ok());
}
