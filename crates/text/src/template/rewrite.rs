//! Prepares a template's source for minijinja, without moving a line.
//!
//! - `{% generation %}` blocks, which mark an assistant's own tokens for training, become `{% with %}` blocks: the
//!   same scope, no effect on the output.
//! - Line ends become `\n`, as jinja2 does.
//! - Operands of `~`, `+` and `*` are put through functions of [`limits`](super::limits). minijinja counts
//!   instructions, but an instruction may double a string: thirty of them make a gigabyte. The functions count bytes.
//!   They also let `~` print values as Python does.
//! - Assigned values are put through another such function: a loop may otherwise nest a list so deep that dropping it
//!   exhausts the stack.
//! - Expressions that minijinja's recursive parser would exhaust the stack with are refused.
//!
//! This is a tokenizer and a grouping by precedence, no parser: what it does not understand it leaves as it is.

/// Function around an operand of `~`: its text.
pub(super) const TEXT: &str = "__moellon_text";
/// Function around an operand of `+`: unchanged, but counted.
pub(super) const OPERAND: &str = "__moellon_operand";
/// Function around a whole product.
pub(super) const PRODUCT: &str = "__moellon_product";
/// Function that a single `%` becomes: minijinja does not format strings with it.
pub(super) const MODULO: &str = "__moellon_modulo";
/// Function around a whole sum; a lazy list becomes a list.
pub(super) const SUM: &str = "__moellon_sum";

/// Function around an assigned value.
pub(super) const VALUE: &str = "__moellon_value";

/// Function that counts the plain text it stands in.
pub(super) const PLAIN_TEXT: &str = "__moellon_plain_text";

/// Plain text up to this many bytes is not counted: an instruction writes it, and instructions are.
const SMALL_TEXT_BYTES: usize = 64;

/// The most text in a raw block, where nothing can be inserted to count it.
const MAX_RAW_BYTES: usize = 256;

/// Brackets within brackets. minijinja refuses 150.
const MAX_BRACKET_DEPTH: usize = 100;

/// Operators, filters, attributes and calls of one expression: each may be a level of minijinja's syntax tree, which
/// it walks recursively. Published templates have fewer than fifty.
const MAX_OPERATORS: usize = 500;

/// `elif` branches of a template, which nest in the syntax tree. Published templates have fewer than twenty.
const MAX_BRANCHES: usize = 500;

/// Literals up to this many bytes are not counted: a source has few, and they are everywhere.
const SMALL_LITERAL_BYTES: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Name,
    Number,
    Text,
    Open,
    Close,
    Operator,
}

#[derive(Debug, Clone, Copy)]
struct Token {
    kind: Kind,
    start: usize,
    end: usize,
}

/// Text to insert before a byte position.
type Insertion = (usize, String);

/// Text that replaces a token: start, end, text.
type Word = (usize, usize, &'static str);

/// Why a template is refused before it is parsed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooComplex {
    /// 1-based.
    pub(super) line: usize,
    pub(super) reason: String,
}

/// A template in two forms.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Prepared {
    /// With its own syntax, for minijinja to check: only tags and large numbers are replaced. Not to be run.
    pub(super) plain: String,
    /// With the functions around operands.
    pub(super) guarded: String,
}

/// Prepares a source.
///
/// # Errors
/// When an expression is nested or chained beyond what any template needs.
pub(super) fn rewrite(source: &str) -> Result<Prepared, TooComplex> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut insertions: Vec<Insertion> = Vec::new();
    let mut numbers: Vec<Insertion> = Vec::new();
    let mut words: Vec<Word> = Vec::new();
    let mut operators: Vec<Word> = Vec::new();
    let mut num_branches = 0;
    let mut position = 0;
    while let Some((start, kind)) = next_tag(&source, position) {
        let refuse = |reason: String| TooComplex { line: source[..start].matches('\n').count() + 1, reason };
        count_plain_text(&source, position, start, &mut insertions);
        let body = start + 2;
        if kind == b'#' {
            let Some(length) = source[body..].find("#}") else { break };
            position = body + length + 2;
            continue;
        }
        let Some((tokens, end)) = tokenize(&source, body, if kind == b'%' { "%}" } else { "}}" }) else { break };
        position = end;
        let mut expression = &tokens[..];
        let mut is_assignment = false;
        if kind == b'%'
            && let Some((word, rest)) = tokens.split_first()
        {
            expression = rest;
            match &source[word.start..word.end] {
                "raw" => {
                    position = end_of_raw(&source, end);
                    if position - end > MAX_RAW_BYTES {
                        let found = position - end;
                        return Err(refuse(format!(
                            "found a raw block of {found} bytes, expected at most {MAX_RAW_BYTES}"
                        )));
                    }
                    continue;
                }
                "generation" if rest.is_empty() => words.push((word.start, word.end, "with")),
                "endgeneration" if rest.is_empty() => words.push((word.start, word.end, "endwith")),
                "set" => is_assignment = true,
                "elif" => num_branches += 1,
                _ => {}
            }
        }
        let mut grouping = Grouping {
            source: &source,
            tokens: expression,
            next: 0,
            insertions: &mut insertions,
            numbers: &mut numbers,
            operators: &mut operators,
            has_lone_operator: false,
        };
        let too_complex = if num_branches > MAX_BRANCHES {
            Some(format!("found more than {MAX_BRANCHES} elif branches, expected fewer"))
        } else {
            grouping.complexity()
        };
        if let Some(reason) = too_complex {
            return Err(refuse(reason));
        }
        if is_assignment {
            grouping.wrap_assigned_value();
        }
        grouping.group();
        if grouping.has_lone_operator {
            return Err(refuse("found an operator without an operand on both sides".to_owned()));
        }
    }
    count_plain_text(&source, position, source.len(), &mut insertions);
    numbers.sort_by_key(|(position, _)| *position);
    let plain = splice(&source, &numbers, &words);
    // Stable, and every number is inside of whatever else begins where it does.
    insertions.extend(numbers);
    insertions.sort_by_key(|(position, _)| *position);
    words.extend(operators);
    words.sort_by_key(|(start, _, _)| *start);
    Ok(Prepared { plain, guarded: splice(&source, &insertions, &words) })
}

/// Where the next `{{`, `{%` or `{#` begins, and its second byte.
fn next_tag(source: &str, from: usize) -> Option<(usize, u8)> {
    let bytes = source.as_bytes();
    (from..bytes.len().saturating_sub(1))
        .find(|start| bytes[*start] == b'{' && matches!(bytes[start + 1], b'{' | b'%' | b'#'))
        .map(|start| (start, bytes[start + 1]))
}

/// Inserts a call into a long plain text. It stands behind the first visible character, where it changes neither the
/// white space that tags remove nor the line.
fn count_plain_text(source: &str, start: usize, end: usize, insertions: &mut Vec<Insertion>) {
    let text = &source[start..end];
    if text.len() > SMALL_TEXT_BYTES
        // Behind a `{` the inserted tag would begin one character early.
        && let Some((index, character)) =
            text.char_indices().find(|(_, character)| !character.is_whitespace() && *character != '{')
    {
        let position = start + index + character.len_utf8();
        insertions.push((position, format!("{{{{ {PLAIN_TEXT}({}) }}}}", text.len())));
    }
}

/// The position after the tag that ends a raw block.
fn end_of_raw(source: &str, from: usize) -> usize {
    let mut position = from;
    while let Some(found) = source[position..].find("{%") {
        let start = position + found + 2;
        let inside = source[start..].trim_start_matches(['-', '+']).trim_start();
        if let Some(rest) = inside.strip_prefix("endraw") {
            let rest_start = source.len() - rest.len();
            return rest.find("%}").map_or(source.len(), |length| rest_start + length + 2);
        }
        position = start;
    }
    source.len()
}

/// The tokens of a tag and the position after its end; `None` when it does not end.
fn tokenize(source: &str, from: usize, closing: &str) -> Option<(Vec<Token>, usize)> {
    let bytes = source.as_bytes();
    let mut tokens = Vec::new();
    let mut depth = 0_usize;
    // `{%-` and `{%+` belong to the tag.
    let mut position = from + usize::from(matches!(bytes.get(from), Some(b'-' | b'+')));
    while position < bytes.len() {
        let start = position;
        if depth == 0 {
            let rest = &source[start..];
            let trimmed = rest.strip_prefix(['-', '+']).unwrap_or(rest);
            if trimmed.starts_with(closing) {
                return Some((tokens, start + (rest.len() - trimmed.len()) + closing.len()));
            }
        }
        let kind = match bytes[start] {
            byte if byte.is_ascii_whitespace() => {
                position += 1;
                continue;
            }
            quote @ (b'"' | b'\'') => {
                position = end_of_string(bytes, start, quote)?;
                Kind::Text
            }
            byte if byte.is_ascii_digit() => {
                position = end_of_number(bytes, start);
                Kind::Number
            }
            byte if byte.is_ascii_alphabetic() || byte == b'_' || !byte.is_ascii() => {
                while bytes
                    .get(position)
                    .is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_' || !byte.is_ascii())
                {
                    position += 1;
                }
                Kind::Name
            }
            b'(' | b'[' | b'{' => {
                depth += 1;
                position += 1;
                Kind::Open
            }
            b')' | b']' | b'}' => {
                depth = depth.saturating_sub(1);
                position += 1;
                Kind::Close
            }
            _ => {
                let two = source.get(start..start + 2).unwrap_or_default();
                position += if matches!(two, "==" | "!=" | "<=" | ">=" | "//" | "**") { 2 } else { 1 };
                Kind::Operator
            }
        };
        tokens.push(Token { kind, start, end: position });
    }
    None
}

/// `12`, `1_000`, `0x1f`, `1.5e-7`; in `1.x` and `1if` the number is `1`.
fn end_of_number(bytes: &[u8], start: usize) -> usize {
    let skip_digits = |mut position: usize| {
        while bytes.get(position).is_some_and(|byte| byte.is_ascii_digit() || *byte == b'_') {
            position += 1;
        }
        position
    };
    let has_digit = |position: usize| bytes.get(position).is_some_and(u8::is_ascii_digit);
    if bytes[start] == b'0' && matches!(bytes.get(start + 1), Some(b'x' | b'X' | b'o' | b'O' | b'b' | b'B')) {
        let digits = bytes[start + 2..].iter().take_while(|byte| byte.is_ascii_hexdigit() || **byte == b'_');
        return start + 2 + digits.count();
    }
    let mut position = skip_digits(start);
    if bytes.get(position) == Some(&b'.') && has_digit(position + 1) {
        position = skip_digits(position + 1);
    }
    if matches!(bytes.get(position), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(bytes.get(position + 1), Some(b'+' | b'-')));
        if has_digit(position + 1 + sign) {
            position = skip_digits(position + 1 + sign);
        }
    }
    position
}

fn end_of_string(bytes: &[u8], start: usize, quote: u8) -> Option<usize> {
    let mut position = start + 1;
    while position < bytes.len() {
        match bytes[position] {
            b'\\' => position += 2,
            byte if byte == quote => return Some(position + 1),
            _ => position += 1,
        }
    }
    None
}

/// A product: operands joined by `*`, `/`, `//`, `%` and `**`; what `~`, `+` and `-` act on.
#[derive(Debug, Default, Clone)]
struct Product {
    /// Index of its tokens.
    tokens: Vec<usize>,
    has_multiplication: bool,
    /// Index of its operators.
    operators: Vec<usize>,
    /// Large numbers, which would otherwise be multiplied while the template is compiled.
    large_numbers: Vec<usize>,
}

struct Grouping<'a> {
    source: &'a str,
    tokens: &'a [Token],
    next: usize,
    insertions: &'a mut Vec<Insertion>,
    /// Insertions around large numbers.
    numbers: &'a mut Vec<Insertion>,
    /// Operators that become commas.
    operators: &'a mut Vec<Word>,
    /// An operator lacks an operand: an error, or a variable that is named like a keyword, whose size would go
    /// uncounted.
    has_lone_operator: bool,
}

impl Grouping<'_> {
    fn text(&self, index: usize) -> &str {
        self.tokens.get(index).map_or("", |token| &self.source[token.start..token.end])
    }

    /// Why the expression is beyond what minijinja can be given, if it is.
    fn complexity(&self) -> Option<String> {
        let mut depth = 0_usize;
        // Operators since the last comma, by depth.
        let mut counts = vec![0_usize];
        for (index, token) in self.tokens.iter().enumerate() {
            let text = self.text(index);
            match token.kind {
                Kind::Open => {
                    depth += 1;
                    counts[depth - 1] += 1;
                    counts.truncate(depth);
                    counts.push(0);
                }
                Kind::Close => depth = depth.saturating_sub(1),
                Kind::Operator if text == "," => counts[depth] = 0,
                Kind::Operator => counts[depth] += 1,
                Kind::Name if matches!(text, "and" | "or" | "not" | "is" | "in" | "if") => counts[depth] += 1,
                Kind::Name | Kind::Number | Kind::Text => {}
            }
            if depth > MAX_BRACKET_DEPTH {
                return Some(format!("found brackets deeper than {MAX_BRACKET_DEPTH} levels, expected fewer"));
            }
            if counts[depth] > MAX_OPERATORS {
                return Some(format!("found more than {MAX_OPERATORS} operators in one expression, expected fewer"));
            }
        }
        None
    }

    /// Wraps what stands behind the `=` of a `set` tag. The second bracket keeps `a, b = 1, 2` a tuple.
    fn wrap_assigned_value(&mut self) {
        let mut depth = 0_usize;
        for (index, token) in self.tokens.iter().enumerate() {
            match token.kind {
                Kind::Open => depth += 1,
                Kind::Close => depth = depth.saturating_sub(1),
                Kind::Operator if depth == 0 && self.text(index) == "=" => {
                    let Some(first) = self.tokens.get(index + 1) else { return };
                    let is_literal = index + 2 == self.tokens.len() && first.kind != Kind::Name;
                    if !is_literal {
                        self.insertions.push((first.start, format!("{VALUE}((")));
                        self.insertions.push((self.tokens[self.tokens.len() - 1].end, "))".to_owned()));
                    }
                    return;
                }
                Kind::Operator | Kind::Name | Kind::Number | Kind::Text => {}
            }
        }
    }

    /// Handles the tokens up to the bracket that closes the current group, and the bracket itself.
    ///
    /// The recursion is as deep as the brackets, which `MAX_BRACKET_DEPTH` bounds.
    fn group(&mut self) {
        // Operands and the operators between them; the last operand is being collected.
        let mut products = vec![Product::default()];
        let mut operators: Vec<char> = Vec::new();
        while let Some(token) = self.tokens.get(self.next).copied() {
            let index = self.next;
            self.next += 1;
            let last = products.len() - 1;
            match token.kind {
                Kind::Close => break,
                Kind::Open => {
                    products[last].tokens.push(index);
                    self.group();
                    // The closing bracket, so that the operand ends behind it.
                    products[last].tokens.push(self.next - 1);
                }
                Kind::Name if self.is_boundary_word(index) => self.end_chain(&mut products, &mut operators),
                Kind::Name | Kind::Text => products[last].tokens.push(index),
                Kind::Number => {
                    if token.end - token.start > 3 {
                        products[last].large_numbers.push(index);
                    }
                    products[last].tokens.push(index);
                }
                Kind::Operator => match self.text(index) {
                    operator @ ("~" | "+" | "-") if !self.expects_operand(&products[last]) => {
                        operators.push(operator.chars().next().unwrap_or(' '));
                        products.push(Product::default());
                    }
                    "*" | "**" if products[last].tokens.is_empty() => {
                        // At the beginning of an argument, a list is unpacked.
                        let before = if index == 0 { "" } else { self.text(index - 1) };
                        self.has_lone_operator |= !matches!(before, "(" | ",");
                    }
                    "~" | "+" => self.has_lone_operator = true,
                    operator @ ("*" | "/" | "//" | "%" | "**") => {
                        products[last].has_multiplication |= operator == "*";
                        products[last].operators.push(index);
                        products[last].tokens.push(index);
                    }
                    "." | "|" | "-" => products[last].tokens.push(index),
                    _ => self.end_chain(&mut products, &mut operators),
                },
            }
        }
        self.end_chain(&mut products, &mut operators);
    }

    /// Whether a sign at this point belongs to an operand.
    fn expects_operand(&self, product: &Product) -> bool {
        product.tokens.last().is_none_or(|last| self.tokens[*last].kind == Kind::Operator)
    }

    /// Whether a name separates operands, as `and` does.
    fn is_boundary_word(&self, index: usize) -> bool {
        let before = if index == 0 { "" } else { self.text(index - 1) };
        match self.text(index) {
            "and" | "or" | "if" | "else" => !matches!(before, "." | "|"),
            "not" => before != "is" && before != ".",
            "in" => {
                let is_test = before == "is" || (before == "not" && index > 1 && self.text(index - 2) == "is");
                !is_test && !matches!(before, "." | "|")
            }
            "recursive" => index + 1 == self.tokens.len(),
            _ => false,
        }
    }

    /// Wraps the operands collected so far and starts anew.
    fn end_chain(&mut self, products: &mut Vec<Product>, operators: &mut Vec<char>) {
        let products = std::mem::replace(products, vec![Product::default()]);
        let operators = std::mem::take(operators);
        if products.len() == 1 && products[0].tokens.is_empty() {
            return;
        }
        if products.iter().any(|product| self.expects_operand(product)) {
            self.has_lone_operator = true;
            return;
        }
        let start_of = |product: &Product| self.tokens[product.tokens[0]].start;
        let end_of = |product: &Product| self.tokens[*product.tokens.last().unwrap_or(&0)].end;
        let mut wraps: Vec<Word> = Vec::new();
        if operators.contains(&'+') {
            wraps.push((start_of(&products[0]), end_of(&products[products.len() - 1]), SUM));
        }
        for (index, product) in products.iter().enumerate() {
            let (start, end) = (start_of(product), end_of(product));
            let sides = [index.checked_sub(1).and_then(|left| operators.get(left)), operators.get(index)];
            let small = product.tokens.len() == 1
                && self.tokens[product.tokens[0]].kind == Kind::Text
                && end - start <= SMALL_LITERAL_BYTES;
            if sides.contains(&Some(&'~')) && !small {
                wraps.push((start, end, TEXT));
            } else if sides.contains(&Some(&'+')) && !small {
                wraps.push((start, end, OPERAND));
            }
            if let [operator] = product.operators[..]
                && self.text(operator) == "%"
                && product.tokens.last() != Some(&operator)
            {
                wraps.push((start, end, MODULO));
                self.operators.push((self.tokens[operator].start, self.tokens[operator].end, ","));
            }
            if product.has_multiplication {
                wraps.push((start, end, PRODUCT));
                for number in &product.large_numbers {
                    self.numbers.push((self.tokens[*number].start, format!("{OPERAND}(")));
                    self.numbers.push((self.tokens[*number].end, ")".to_owned()));
                }
            }
        }
        for (start, end, function) in wraps {
            self.insertions.push((start, format!("{function}(")));
            self.insertions.push((end, ")".to_owned()));
        }
    }
}

/// The source with insertions (sorted, stable) and replaced words.
fn splice(source: &str, insertions: &[Insertion], words: &[Word]) -> String {
    let mut result = String::with_capacity(source.len() + insertions.len() * 16);
    let mut words = words.iter().peekable();
    let mut copied = 0;
    let mut copy_to = |result: &mut String, position: usize| {
        while let Some((start, end, word)) = words.next_if(|(start, _, _)| *start < position) {
            result.push_str(&source[copied..*start]);
            result.push_str(word);
            copied = *end;
        }
        result.push_str(&source[copied..position]);
        copied = position;
    };
    for (position, text) in insertions {
        copy_to(&mut result, *position);
        result.push_str(text);
    }
    copy_to(&mut result, source.len());
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shortens the function names, to keep the cases readable.
    fn short(source: &str) -> String {
        rewrite(source)
            .unwrap()
            .guarded
            .replace(VALUE, "V")
            .replace(TEXT, "T")
            .replace(OPERAND, "O")
            .replace(PRODUCT, "P")
            .replace(SUM, "S")
            .replace(MODULO, "M")
    }

    #[test]
    fn operands_are_wrapped_by_precedence() {
        for (source, expected) in [
            ("{{ a ~ b }}", "{{ T(a) ~ T(b) }}"),
            ("{{- a.b['c'] ~ '\\n' ~ f(x ~ y)|trim -}}", "{{- T(a.b['c']) ~ '\\n' ~ T(f(T(x) ~ T(y))|trim) -}}"),
            ("{{ a + b }}", "{{ S(O(a) + O(b)) }}"),
            ("{{ a + b ~ c }}", "{{ S(O(a) + T(b) ~ T(c)) }}"),
            ("{{ 2 * -a + -b }}", "{{ S(O(P(2 * -a)) + O(-b)) }}"),
            ("{{ '%s' % a ~ b % c % d }}", "{{ T(M('%s' , a)) ~ T(b % c % d) }}"),
            ("{{ '=' * 40 }}", "{{ P('=' * 40) }}"),
            ("{{ 'x' * 100000 ~ y }}", "{{ T(P('x' * O(100000))) ~ T(y) }}"),
            ("{% if a ~ b == c and not d ~ 'e' %}", "{% if T(a) ~ T(b) == c and not T(d) ~ 'e' %}"),
            ("{% set ns.x = a ~ (b if c else d) %}", "{% set ns.x = V((T(a) ~ T((b if c else d)))) %}"),
            ("{% set a, b = 1, f(c=2) %}", "{% set a, b = V((1, f(c=2))) %}"),
            ("{% set a = 'x' %}{% set a %}b{% endset %}", "{% set a = 'x' %}{% set a %}b{% endset %}"),
            ("{% for m in a + b if c recursive %}", "{% for m in S(O(a) + O(b)) if c recursive %}"),
            ("{{ a is not none ~ b }}", "{{ T(a is not none) ~ T(b) }}"),
            ("{{ loop.index0 - 1 }}{{ -a }}", "{{ loop.index0 - 1 }}{{ -a }}"),
            ("{{ f(*args, **kwargs) }}", "{{ f(*args, **kwargs) }}"),
            ("{{ {'a': b ~ c, 'd': {}} }}", "{{ {'a': T(b) ~ T(c), 'd': {}} }}"),
            ("{% raw %}{{ a ~ b }}{% endraw %}{# {{ a ~ b }} #}", "{% raw %}{{ a ~ b }}{% endraw %}{# {{ a ~ b }} #}"),
            ("{{ a ~ ", "{{ a ~ "),
            ("{% if a and not b ~ c or d %}", "{% if a and not T(b) ~ T(c) or d %}"),
        ] {
            assert_eq!(short(source), expected);
        }
    }

    #[test]
    fn generation_blocks_keep_their_whitespace_control() {
        assert_eq!(
            rewrite("a\r\n{%- generation -%}\rb{% endgeneration %}").unwrap().plain,
            "a\n{%- with -%}\nb{% endwith %}"
        );
    }

    #[test]
    fn keywords_cannot_hide_an_operand() {
        for source in [
            "{{ a ~ }}",
            "{{ ~ a }}",
            "{{ and ~ a }}",
            "{{ a ~ and }}",
            "{{ and + a }}",
            "{{ and * 9 }}",
            "{{ a ~ -else }}",
        ] {
            assert!(rewrite(source).is_err(), "{source}");
        }
    }

    #[test]
    fn long_plain_text_is_counted() {
        let text = "x".repeat(70);
        let guarded = rewrite(&format!("{{% if a %}}\n  {text}\n{{% endif %}}é")).unwrap().guarded;
        assert_eq!(guarded, format!("{{% if a %}}\n  x{{{{ {PLAIN_TEXT}(74) }}}}{}\n{{% endif %}}é", &text[1..]));
        assert!(rewrite(&format!("{{% raw %}}{}{{% endraw %}}", "x".repeat(300))).is_err());
    }
}
