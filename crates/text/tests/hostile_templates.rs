//! Broken and hostile templates: one clear error each, no panic, no runaway memory or time.

use moellon_text::{ChatTemplate, Clock, Error, RenderInput, TemplateLimits};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const LIMITS: TemplateLimits = TemplateLimits {
    max_output_bytes: 1 << 20,
    max_work_bytes: 8 << 20,
    max_instructions: 1_000_000,
    max_recursion: 250,
};

fn render_with(source: &str, messages: &Value, kwargs: &Map<String, Value>) -> Result<String, Error> {
    let template = ChatTemplate::with_settings(source, &[("bos_token".into(), "<s>".into())], LIMITS, Clock::Fixed(0))?;
    template.render(&RenderInput { messages, tools: None, add_generation_prompt: true, kwargs })
}

fn render(source: &str) -> Result<String, Error> {
    render_with(source, &json!([{"role": "user", "content": "hi"}]), &Map::new())
}

#[test]
fn bombs_hit_a_limit() {
    for source in [
        // Doubling a string: 2^60 bytes in sixty instructions.
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] | join(ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s.replace('x', 'xxx') %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s | replace('x', 'xxx') %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = '{0}{0}'.format(ns.s) %}{% endfor %}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l }}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l ~ '' }}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | string }}",
        "{{ 'x' * 90000000 }}",
        "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + ['x' * 1000000] %}{% endfor %}",
        "{{ ([0] * 90000000) | list | length }}",
        "{{ 'x'.ljust(99999999999) }}",
        "{{ [1] | batch(999999999, 'x') | list | length }}",
        "{{ [1] | slice(999999999) | list | length }}",
        "{{ 'x'.center(18446744073709551615) }}",
        // Plain text that is collected by a block: no expression says how much.
        "{% set s %}{% for a in range(99999) %}some text that is written without an expression, and is longer than a line of code would be{% endfor %}{% endset %}",
        "{% macro m() %}{% for a in range(99999) %}some text that is written without an expression, and is longer than a line of code would be{% endfor %}{% endmacro %}{% set s = m() %}",
        // Time.
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'some text that is long enough to matter' }}{% endfor %}",
        "{% for a in range(99999) %}some text that is written without an expression{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% for x in [[[]]] recursive %}{{ loop([[x]]) }}{% endfor %}",
    ] {
        match render(source) {
            Err(Error::TemplateLimit { line: 0 | 1, .. }) => {}
            Err(Error::Template { line: 1, message })
                if message.contains("recursion") || message.contains("too large") => {}
            other => panic!("{source}: {:.200}", format!("{other:?}")),
        }
    }
}

#[test]
fn absurd_formats_are_refused() {
    for source in [
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%99999s' | format('x') }}",
        "{{ '{:>99999999999}'.format('x') }}",
        "{{ '{:{}}'.format('x', 99999999999) }}",
        "{{ 1 | tojson(indent=99999999) }}",
        "{{ 'a' | indent(99999999999) }}",
        "{{ range(10000000000) | list }}",
        "{{ 2 ** 100000000 }}",
    ] {
        assert!(matches!(render(source), Err(Error::Template { line: 1, .. })), "{source}: {:?}", render(source));
    }
}

#[test]
fn deep_values_do_not_exhaust_the_stack() {
    let source = "{% set ns = namespace(l=[]) %}{% for a in range(300) %}{% for b in range(300) %}\
                  {% set ns.l = [ns.l] %}{% endfor %}{% endfor %}{{ 'done' }}";
    match render(source) {
        Err(Error::TemplateLimit { .. }) => {}
        other => panic!("{other:?}"),
    }
    for source in [
        "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
        "{% set n = namespace() %}{% set n.n = n %}{{ n | tojson }}",
    ] {
        assert!(render(source).is_err(), "{source}");
    }
}

#[test]
fn deep_syntax_is_an_error() {
    for source in [
        format!("{{{{ {}1{} }}}}", "(".repeat(50_000), ")".repeat(50_000)),
        format!("{{{{ {}1{} }}}}", "[".repeat(50_000), "]".repeat(50_000)),
        format!("{{{{ {}1 }}}}", "-".repeat(50_000)),
        format!("{{{{ {}1 }}}}", "not ".repeat(50_000)),
        "{% if 1 %}".repeat(50_000),
        "{{".repeat(50_000),
    ] {
        let outcome = render(&source);
        assert!(matches!(outcome, Err(Error::Template { .. })), "{:.40}: {:.200}", source, format!("{outcome:?}"));
    }
}

#[test]
fn errors_name_the_line() {
    for (source, expected_line, part) in [
        ("a\nb\n{{ 1 / 0 }}", 3, "1 / 0"),
        ("a\r\n{% if %}x{% endif %}", 2, ""),
        ("{{ 'unclosed }}", 1, ""),
        ("\n\n{% macro m() %}\n{{ missing.x }}\n{% endmacro %}\n{{ m() }}", 4, "undefined"),
        ("\n{{ s | nosuch }}", 2, "nosuch"),
        ("\n{{ 'b' ~\n (2 + 'a') }}", 0, "unsupported types"),
    ] {
        match render(source) {
            Err(Error::Template { line, message }) => {
                assert!(expected_line == 0 || line == expected_line, "{source}: line {line}, {message}");
                assert!(message.contains(part), "{source}: {message}");
                assert!(!message.contains("moellon"), "{source}: {message}");
            }
            other => panic!("{source}: {other:?}"),
        }
    }
    match render("x\n{{ raise_exception('no ' ~ 1) }}") {
        Err(error @ Error::TemplateRaised { line: 2, .. }) => {
            assert_eq!(error.to_string(), "chat template refused the conversation (line 2): no 1");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn reserved_variables_cannot_be_overridden() {
    for name in ["messages", "tools", "add_generation_prompt", "bos_token", "__moellon_text"] {
        let kwargs = Map::from_iter([(name.to_owned(), json!("evil"))]);
        match render_with("{{ messages }}", &json!([]), &kwargs) {
            Err(Error::TemplateInput { name: found, .. }) => assert_eq!(found, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    let kwargs = Map::from_iter([("documents".to_owned(), json!(["d"])), ("enable_thinking".to_owned(), json!(false))]);
    assert_eq!(render_with("{{ documents }}{{ enable_thinking }}", &json!([]), &kwargs).unwrap(), "['d']False");
    assert!(matches!(render_with("x", &json!({}), &Map::new()), Err(Error::TemplateInput { .. })));
}

#[test]
fn files_and_environment_are_out_of_reach() {
    for source in ["{% include 'x' %}", "{% extends 'chat_template' %}", "{% import 'x' as y %}", "{{ debug() }}"] {
        let outcome = render(source);
        assert!(outcome.is_err(), "{source}: {outcome:?}");
    }
}

const SOURCES: [&str; 6] = [
    include_str!("templates/glm.jinja"),
    include_str!("templates/qwen3.jinja"),
    include_str!("templates/qwen3_coder.jinja"),
    include_str!("templates/deepseek.jinja"),
    include_str!("templates/gpt_oss.jinja"),
    include_str!("templates/generation.jinja"),
];

const SCRAPS: [&str; 24] = [
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "-",
    "~",
    "+ x",
    "* 3",
    "(",
    ")",
    "[",
    "]",
    "'",
    "\"",
    "| trim",
    " is not none",
    "not ",
    "= ",
    ".a",
    "if ",
    "é",
    "\n",
];

/// Whether minijinja itself takes the source, with the same syntax.
fn is_valid(source: &str) -> bool {
    let mut environment = minijinja::Environment::new();
    let syntax = minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().unwrap();
    environment.set_syntax(syntax);
    environment.add_template_owned("x", source.to_owned()).is_ok()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Damaged templates give an error or a text, never a panic; and what minijinja takes, its prepared form is too.
    #[test]
    fn damaged_templates_do_not_panic(index in 0..SOURCES.len(), at in 0..9000_usize, length in 0..12_usize, scrap in prop::sample::select(&SCRAPS[..])) {
        let characters: Vec<char> = SOURCES[index].chars().collect();
        let at = at % characters.len();
        let end = (at + length).min(characters.len());
        let source: String = characters[..at].iter().copied().chain(scrap.chars()).chain(characters[end..].iter().copied()).collect();
        let compiled = ChatTemplate::with_settings(&source, &[], LIMITS, Clock::Fixed(0));
        if index == 5 {
            // minijinja does not know these blocks
        } else if compiled.is_ok() {
            prop_assert!(is_valid(&source));
        } else if is_valid(&source) {
            // minijinja takes `if` and `else` for variables where it expects an operand; we refuse that.
            let message = compiled.err().map(|error| error.to_string()).unwrap_or_default();
            prop_assert!(message.contains("without an operand") || scrap == "if ", "{}", message);
        }
        let _ = render(&source);
    }
}
