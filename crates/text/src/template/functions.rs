//! Filters, functions, tests and methods as jinja2 and transformers have them, where minijinja's differ.

use minijinja::formatting::{FormatStyle, format as format_values};
use minijinja::value::{Kwargs, Rest, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};

use super::clock::Clock;
use super::limits::{LIST_ITEM_BYTES, TemplateLimits};
use super::python::{self, JsonStyle};
use super::rewrite;

/// The message of `raise_exception`; travels as the source of a minijinja error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// Installs everything.
pub(super) fn install(environment: &mut Environment<'static>, limits: TemplateLimits, clock: Clock) {
    environment.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        let message = message.to_string();
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    environment.add_function("strftime_now", move |format: &str| {
        clock.strftime(format).map_err(|reason| Error::new(ErrorKind::InvalidOperation, reason))
    });
    environment
        .add_function(rewrite::TEXT, move |state: &mut State<'_, '_>, value: &Value| limits.text_operand(state, value));
    let counted = move |state: &mut State<'_, '_>, value: &Value| -> Result<Value, Error> {
        limits.charge_value(state, value)?;
        Ok(value.clone())
    };
    environment.add_function(rewrite::OPERAND, counted);
    environment.add_function(rewrite::PRODUCT, counted);
    environment
        .add_function(rewrite::VALUE, move |state: &mut State<'_, '_>, value: &Value| limits.assigned(state, value));
    environment.add_function(rewrite::MODULO, move |state: &mut State<'_, '_>, left: &Value, right: &Value| {
        modulo(&limits, state, left, right)
    });
    environment.add_function(rewrite::PLAIN_TEXT, move |state: &mut State<'_, '_>, size_bytes: u64| {
        limits.charge(state, size_bytes).map(|()| "")
    });
    environment.add_function(rewrite::SUM, move |state: &mut State<'_, '_>, value: &Value| limits.sum(state, value));

    environment.add_filter(
        "tojson",
        move |state: &mut State<'_, '_>,
              value: &Value,
              ensure_ascii: Option<Value>,
              indent: Option<Value>,
              keywords: Kwargs| {
            let style = json_style(ensure_ascii, indent, &keywords)?;
            let text = python::to_json(value, &style, limits.max_output_bytes)?;
            limits.charge(state, text.len() as u64)?;
            Ok::<_, Error>(Value::from(text))
        },
    );
    environment.add_filter("string", move |state: &mut State<'_, '_>, value: &Value| limits.text_operand(state, value));
    environment.add_filter(
        "join",
        move |state: &mut State<'_, '_>,
              value: &Value,
              separator: Option<Value>,
              attribute: Option<Value>,
              keywords: Kwargs| join_filter(&limits, state, value, [separator, attribute], &keywords),
    );
    environment.add_filter("trim", move |value: &Value, characters: Option<&str>| {
        python::to_str(value, limits.max_output_bytes).map(|text| strip(&text, characters, true, true).to_owned())
    });
    environment.add_filter(
        "replace",
        move |state: &mut State<'_, '_>, value: &Value, old: &Value, new: &Value, count: Option<i64>| {
            let text = |value: &Value| python::to_str(value, limits.max_output_bytes);
            replace(&limits, state, &text(value)?, &text(old)?, &text(new)?, count.unwrap_or(-1))
        },
    );
    environment.add_filter(
        "indent",
        move |state: &mut State<'_, '_>, text: &str, width: Option<Value>, first: Option<bool>, keywords: Kwargs| {
            let first = first.or(keywords.get("first")?).unwrap_or(false);
            let blank = keywords.get::<Option<bool>>("blank")?.unwrap_or(false);
            let width = width.or(keywords.get("width")?).unwrap_or_else(|| Value::from(4));
            keywords.assert_all_used()?;
            indent(&limits, state, text, &width, first, blank)
        },
    );
    environment.add_filter("format", move |state: &mut State<'_, '_>, format: &str, arguments: Rest<Value>| {
        check_format(&limits, state, format, &arguments)?;
        format_values(FormatStyle::Printf, format, &arguments)
    });
    let length = |value: &Value| match value.len() {
        Some(length) => Ok(length),
        None if value.is_undefined() => Ok(0),
        None => minijinja::filters::length(value),
    };
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("int", |value: &Value, default: Option<Value>| {
        to_int(value).unwrap_or_else(|| default.unwrap_or_else(|| Value::from(0)))
    });
    environment.add_filter("float", |value: &Value, default: Option<f64>| match value.as_str() {
        Some(text) => text.trim().parse().unwrap_or(default.unwrap_or(0.0)),
        None => f64::try_from(value.clone()).unwrap_or(default.unwrap_or(0.0)),
    });
    environment.add_filter(
        "batch",
        move |state: &mut State<'_, '_>, value: Value, count: usize, fill: Option<Value>| {
            limits.charge(state, (count as u64).saturating_mul(LIST_ITEM_BYTES))?;
            minijinja::filters::batch(state, value, count, fill)
        },
    );
    environment.add_filter(
        "slice",
        move |state: &mut State<'_, '_>, value: Value, count: usize, fill: Option<Value>| {
            limits.charge(state, (count as u64).saturating_mul(LIST_ITEM_BYTES))?;
            minijinja::filters::slice(state, value, count, fill)
        },
    );
    // These print minijinja's own state, in its own way.
    environment.remove_global("debug");
    environment.remove_filter("pprint");
    // In Python a dict and a string have a length and can be indexed.
    environment.add_test("sequence", |value: &Value| match value.kind() {
        ValueKind::Undefined | ValueKind::String | ValueKind::Map | ValueKind::Seq => true,
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    });
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    environment.add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.to_vec()));
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.set_unknown_method_callback(move |state, value, method, arguments| {
        call_method(&limits, state, value, method, arguments)
    });
}

/// The arguments of transformers' `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
/// The last two are taken by name only: minijinja's functions have five parameters at most.
fn json_style(ensure_ascii: Option<Value>, indent: Option<Value>, keywords: &Kwargs) -> Result<JsonStyle, Error> {
    let argument = |positional: Option<Value>, name: &str| -> Result<Value, Error> {
        Ok(positional.or(keywords.get::<Option<Value>>(name)?).unwrap_or(Value::UNDEFINED))
    };
    let indent = argument(indent, "indent")?;
    let indent = match indent.kind() {
        ValueKind::Undefined | ValueKind::None => None,
        ValueKind::String => Some(indent.as_str().unwrap_or_default().to_owned()),
        _ => {
            let width = indent.as_i64().filter(|width| *width <= 100).ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidOperation,
                    format!("tojson: found indent {indent}, expected a number up to 100 or a string"),
                )
            })?;
            Some(" ".repeat(width.max(0) as usize))
        }
    };
    let separators = argument(None, "separators")?;
    let (item_separator, key_separator) = if separators.is_undefined() || separators.is_none() {
        (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned())
    } else {
        (separators.get_item_by_index(0)?.to_string(), separators.get_item_by_index(1)?.to_string())
    };
    let style = JsonStyle {
        ensure_ascii: argument(ensure_ascii, "ensure_ascii")?.is_true(),
        indent,
        item_separator,
        key_separator,
        sort_keys: argument(None, "sort_keys")?.is_true(),
    };
    keywords.assert_all_used()?;
    Ok(style)
}

/// `join(value, d="", attribute=None)`.
fn join_filter(
    limits: &TemplateLimits,
    state: &mut State<'_, '_>,
    value: &Value,
    [separator, attribute]: [Option<Value>; 2],
    keywords: &Kwargs,
) -> Result<Value, Error> {
    let separator = separator.or(keywords.get("d")?).unwrap_or_else(|| Value::from(""));
    let attribute = attribute.or(keywords.get("attribute")?);
    keywords.assert_all_used()?;
    let separator = python::to_str(&separator, limits.max_output_bytes)?;
    let mut items = Vec::new();
    for item in value.try_iter()? {
        items.push(match attribute.as_ref().map(Value::as_str) {
            None => item,
            Some(None) => item.get_item(attribute.as_ref().unwrap_or(&Value::UNDEFINED))?,
            Some(Some(path)) => path.split('.').try_fold(item, |inner, part| match part.parse::<usize>() {
                Ok(index) => inner.get_item_by_index(index),
                Err(_) => inner.get_attr(part),
            })?,
        });
    }
    join(limits, state, &separator, items.into_iter())
}

fn join(
    limits: &TemplateLimits,
    state: &mut State<'_, '_>,
    separator: &str,
    items: impl Iterator<Item = Value>,
) -> Result<Value, Error> {
    let mut text = String::new();
    for (index, item) in items.enumerate() {
        if index > 0 {
            text.push_str(separator);
        }
        match item.as_str() {
            Some(string) => text.push_str(string),
            None => text.push_str(&python::to_str(&item, limits.max_output_bytes)?),
        }
        if text.len() as u64 > limits.max_output_bytes {
            break; // `charge` says it
        }
    }
    limits.charge(state, text.len() as u64)?;
    Ok(Value::from(text))
}

fn replace(
    limits: &TemplateLimits,
    state: &mut State<'_, '_>,
    text: &str,
    old: &str,
    new: &str,
    count: i64,
) -> Result<Value, Error> {
    let count = if count < 0 { usize::MAX } else { count as usize };
    let hits = if old.is_empty() { text.chars().count() + 1 } else { text.matches(old).count() }.min(count);
    limits.charge(state, (text.len() as u64).saturating_add((hits as u64).saturating_mul(new.len() as u64)))?;
    Ok(Value::from(text.replacen(old, new, hits)))
}

/// `indent(s, width=4, first=False, blank=False)`.
fn indent(
    limits: &TemplateLimits,
    state: &mut State<'_, '_>,
    text: &str,
    width: &Value,
    first: bool,
    blank: bool,
) -> Result<Value, Error> {
    let indent = match (width.as_str(), width.as_usize()) {
        (Some(string), _) => string.to_owned(),
        (None, Some(spaces)) if spaces <= 1000 => " ".repeat(spaces),
        _ => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("indent: found width {width}, expected a number up to 1000 or a string"),
            ));
        }
    };
    let lines: Vec<&str> = text.split('\n').collect();
    limits.charge(state, text.len() as u64 + lines.len() as u64 * indent.len() as u64)?;
    let mut result = String::new();
    for (index, line) in lines.iter().enumerate() {
        if index > 0 {
            result.push('\n');
        }
        if (index > 0 || first) && (blank || !line.is_empty() || (index == 0 && first)) {
            result.push_str(&indent);
        }
        result.push_str(line);
    }
    Ok(Value::from(result))
}

/// Python's `strip` family; `None` strips white space.
fn strip<'a>(text: &'a str, characters: Option<&str>, left: bool, right: bool) -> &'a str {
    let is_stripped = |character: char| match characters {
        Some(set) => set.contains(character),
        None => python::is_space(character),
    };
    let text = if left { text.trim_start_matches(is_stripped) } else { text };
    if right { text.trim_end_matches(is_stripped) } else { text }
}

/// Methods of Python's strings, lists and dicts.
fn call_method(
    limits: &TemplateLimits,
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = call_string_method(limits, state, text, method, arguments)?
    {
        return Ok(result);
    }
    match (value.kind(), method) {
        (ValueKind::Map | ValueKind::Seq, "copy") => {
            let () = from_args(arguments)?;
            Ok(value.clone())
        }
        (
            ValueKind::Map | ValueKind::Seq | ValueKind::Iterable,
            "append" | "extend" | "insert" | "pop" | "remove" | "clear" | "update" | "setdefault" | "popitem" | "sort"
            | "reverse",
        ) => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("{method}: changing a list or dict is not allowed in a chat template; use a namespace"),
        )),
        (ValueKind::Seq | ValueKind::Iterable, "index") => {
            let (wanted,): (&Value,) = from_args(arguments)?;
            match value.try_iter()?.position(|item| item == *wanted) {
                Some(index) => Ok(Value::from(index)),
                None => Err(Error::new(ErrorKind::InvalidOperation, "index: the value is not in the list")),
            }
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments),
    }
}

/// Methods of strings that pycompat lacks, has differently, or that can make a large string of a small one.
fn call_string_method(
    limits: &TemplateLimits,
    state: &mut State<'_, '_>,
    text: &str,
    method: &str,
    arguments: &[Value],
) -> Result<Option<Value>, Error> {
    let result = match method {
        "strip" | "lstrip" | "rstrip" => {
            let (characters,): (Option<&str>,) = from_args(arguments)?;
            Value::from(strip(text, characters, method != "rstrip", method != "lstrip"))
        }
        "split" | "rsplit" => {
            let (separator, count, keywords): (Option<&str>, Option<i64>, Kwargs) = from_args(arguments)?;
            let separator = separator.or(keywords.get("sep")?);
            let count = count.or(keywords.get("maxsplit")?).filter(|count| *count >= 0).map(|count| count as usize);
            keywords.assert_all_used()?;
            let parts = split(text, separator, count, method == "rsplit")?;
            limits.charge(state, text.len() as u64 + parts.len() as u64 * 32)?;
            Value::from(parts.into_iter().map(Value::from).collect::<Vec<Value>>())
        }
        "splitlines" => {
            let (keep, keywords): (Option<bool>, Kwargs) = from_args(arguments)?;
            let keep = keep.or(keywords.get("keepends")?).unwrap_or(false);
            keywords.assert_all_used()?;
            limits.charge(state, text.len() as u64)?;
            Value::from(split_lines(text, keep).into_iter().map(Value::from).collect::<Vec<Value>>())
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            let is_right = method == "rpartition";
            let found = if is_right { text.rsplit_once(separator) } else { text.split_once(separator) };
            let parts = match found {
                Some((before, after)) => [before, separator, after],
                None if is_right => ["", "", text],
                None => [text, "", ""],
            };
            Value::from(minijinja::value::Tuple::from(parts.map(Value::from)))
        }
        "removeprefix" | "removesuffix" => {
            let (part,): (&str,) = from_args(arguments)?;
            let stripped = if method == "removeprefix" { text.strip_prefix(part) } else { text.strip_suffix(part) };
            Value::from(stripped.unwrap_or(text))
        }
        "replace" => {
            let (old, new, count): (&str, &str, Option<i64>) = from_args(arguments)?;
            replace(limits, state, text, old, new, count.unwrap_or(-1))?
        }
        "join" => {
            let (items,): (&Value,) = from_args(arguments)?;
            if let Some(item) = items.try_iter()?.find(|item| item.as_str().is_none()) {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("join: found an item of type {}, expected strings", item.kind()),
                ));
            }
            join(limits, state, text, items.try_iter()?)?
        }
        "isspace" => {
            let () = from_args(arguments)?;
            Value::from(!text.is_empty() && text.chars().all(python::is_space))
        }
        "format" => {
            check_format(limits, state, text, arguments)?;
            return Ok(None);
        }
        "index" | "rindex" => {
            let (part,): (&str,) = from_args(arguments)?;
            let found = if method == "index" { text.find(part) } else { text.rfind(part) };
            let start = found.ok_or_else(|| {
                Error::new(ErrorKind::InvalidOperation, format!("{method}: the text has no {part:?}"))
            })?;
            Value::from(text[..start].chars().count())
        }
        "ljust" | "rjust" | "center" | "zfill" => {
            let (width, fill): (u64, Option<&str>) = from_args(arguments)?;
            limits.charge(state, width.saturating_add(text.len() as u64))?;
            Value::from(justify(text, method, width as usize, fill.unwrap_or(" ")))
        }
        _ => return Ok(None),
    };
    Ok(Some(result))
}

/// `left % right`: the remainder with the divisor's sign, or printf-style formatting.
fn modulo(limits: &TemplateLimits, state: &mut State<'_, '_>, left: &Value, right: &Value) -> Result<Value, Error> {
    let fail = |reason: &str| Err(Error::new(ErrorKind::InvalidOperation, format!("{left} % {right}: {reason}")));
    if let Some(format) = left.as_str() {
        let arguments = if right.is_tuple() { right.try_iter()?.collect::<Vec<Value>>() } else { vec![right.clone()] };
        check_format(limits, state, format, &arguments)?;
        return format_values(FormatStyle::Printf, format, &arguments).map(Value::from);
    }
    if let (Ok(left), Ok(right)) = (i128::try_from(left.clone()), i128::try_from(right.clone())) {
        return match left.checked_rem(right) {
            Some(rest) if rest != 0 && (rest < 0) != (right < 0) => Ok(Value::from(rest + right)),
            Some(rest) => Ok(Value::from(rest)),
            None => fail("division by zero"),
        };
    }
    match (f64::try_from(left.clone()), f64::try_from(right.clone())) {
        (Ok(_), Ok(0.0)) => fail("division by zero"),
        (Ok(left), Ok(right)) => {
            let rest = left % right;
            Ok(Value::from(if rest != 0.0 && (rest < 0.0) != (right < 0.0) { rest + right } else { rest }))
        }
        _ => fail("found a value that is neither a number nor a format"),
    }
}

/// jinja2's `int` filter; `None` where it takes the default.
fn to_int(value: &Value) -> Option<Value> {
    match value.as_str() {
        Some(text) => {
            let digits = text.trim().replace('_', "");
            digits.parse::<i128>().ok().map(Value::from).or_else(|| float_to_int(digits.parse().ok()?))
        }
        None if value.kind() == ValueKind::Bool => Some(Value::from(i64::from(value.is_true()))),
        None if value.is_integer() => Some(value.clone()),
        None => float_to_int(f64::try_from(value.clone()).ok()?),
    }
}

fn float_to_int(float: f64) -> Option<Value> {
    (float.abs() < 1e38).then(|| Value::from(float.trunc() as i128))
}

/// Counts what a format may produce, and refuses widths of more than four digits or taken from an argument.
fn check_format(
    limits: &TemplateLimits,
    state: &mut State<'_, '_>,
    format: &str,
    arguments: &[Value],
) -> Result<(), Error> {
    let mut largest = 0;
    for argument in arguments {
        let length = match argument.as_str() {
            Some(text) => text.len(),
            None => python::to_str(argument, limits.max_output_bytes)?.len(),
        };
        largest = largest.max(length as u64);
    }
    let num_places = format.bytes().filter(|byte| matches!(byte, b'%' | b'{')).count() as u64;
    limits.charge(state, num_places.saturating_mul(largest).saturating_add(format.len() as u64))?;
    let mut digits = 0;
    let mut depth = 0;
    for character in format.chars() {
        digits = if character.is_ascii_digit() { digits + 1 } else { 0 };
        depth = match character {
            '{' => depth + 1,
            '}' => 0,
            _ => depth,
        };
        if digits > 4 || character == '*' && format.contains("%*") || depth > 2 {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("format: found {format:?}, expected widths of at most four digits"),
            ));
        }
    }
    Ok(())
}

/// Python's `ljust`, `rjust`, `center` and `zfill`.
fn justify(text: &str, method: &str, width: usize, fill: &str) -> String {
    let missing = width.saturating_sub(text.chars().count());
    match method {
        "ljust" => format!("{text}{}", fill.repeat(missing)),
        "rjust" => format!("{}{text}", fill.repeat(missing)),
        // CPython puts the odd character to the left when the width is odd.
        "center" => {
            let left = missing / 2 + (missing & width & 1);
            format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left))
        }
        _ => {
            let digits = text.trim_start_matches(['-', '+']);
            let sign = if text.len() - digits.len() == 1 { &text[..1] } else { "" };
            format!("{sign}{}{}", "0".repeat(missing), &text[sign.len()..])
        }
    }
}

fn split<'a>(
    text: &'a str,
    separator: Option<&str>,
    count: Option<usize>,
    from_right: bool,
) -> Result<Vec<&'a str>, Error> {
    let limit = count.map_or(usize::MAX, |count| count.saturating_add(1));
    if let Some(separator) = separator {
        if separator.is_empty() {
            return Err(Error::new(ErrorKind::InvalidOperation, "split: found an empty separator"));
        }
        if !from_right {
            return Ok(text.splitn(limit, separator).collect());
        }
        let mut parts: Vec<&str> = text.rsplitn(limit, separator).collect();
        parts.reverse();
        return Ok(parts);
    }
    let mut parts = Vec::new();
    if from_right {
        let mut rest = text.trim_end_matches(python::is_space);
        while !rest.is_empty() {
            if parts.len() + 1 == limit {
                parts.push(rest);
                break;
            }
            let start = rest.char_indices().rev().find(|(_, character)| python::is_space(*character));
            let start = start.map_or(0, |(index, character)| index + character.len_utf8());
            parts.push(&rest[start..]);
            rest = rest[..start].trim_end_matches(python::is_space);
        }
        parts.reverse();
    } else {
        let mut rest = text.trim_start_matches(python::is_space);
        while !rest.is_empty() {
            if parts.len() + 1 == limit {
                parts.push(rest);
                break;
            }
            let end = rest.find(python::is_space).unwrap_or(rest.len());
            parts.push(&rest[..end]);
            rest = rest[end..].trim_start_matches(python::is_space);
        }
    }
    Ok(parts)
}

/// Python's `str.splitlines`, which knows more line ends than `\n`.
fn split_lines(text: &str, keep: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut start = 0;
    let mut characters = text.char_indices().peekable();
    while let Some((index, character)) = characters.next() {
        if !matches!(
            character,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        ) {
            continue;
        }
        let mut end = index + character.len_utf8();
        if character == '\r' && characters.next_if(|(_, next)| *next == '\n').is_some() {
            end += 1;
        }
        lines.push(&text[start..if keep { end } else { index }]);
        start = end;
    }
    if start < text.len() {
        lines.push(&text[start..]);
    }
    lines
}
