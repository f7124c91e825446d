//! The raw bytes of every token, read from the tokenizer's own description of its decoder.
//!
//! Hugging Face's decoders work on whole token lists and return a string, so they cannot be used on a stream:
//! a token may hold half a character. All decoders that the supported models use can be written as one byte string
//! a token and one rule about the beginning of the text. A decoder that cannot is an error at load.

use serde_json::Value;

/// What happens at the beginning of a text, once, after the bytes of the tokens were joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LeadingRule {
    /// Nothing is removed (byte-level BPE).
    Keep,
    /// Up to this many leading spaces are removed (sentencepiece exported as `Strip`).
    StripSpaces(usize),
    /// Every `▁` of the first token is removed (the `Metaspace` decoder).
    DropMetaspaceInFirstToken,
}

/// One step of a decoder that acts on a single token.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// GPT-2's map from printable characters back to bytes.
    ByteLevel,
    /// `<0xXX>` is one byte.
    ByteFallback,
    /// Every occurrence of one string becomes another.
    Replace { pattern: String, content: String },
}

/// How the string of a token becomes bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenDecoder {
    steps: Vec<Step>,
    pub(crate) leading: LeadingRule,
}

impl TokenDecoder {
    /// Reads the `decoder` object of `tokenizer.json`.
    ///
    /// # Errors
    /// The reason, when the decoder is missing or cannot be written as bytes a token.
    pub(crate) fn from_json(decoder: &Value) -> Result<TokenDecoder, String> {
        let mut parsed = TokenDecoder { steps: Vec::new(), leading: LeadingRule::Keep };
        parsed.add(decoder, &mut false)?;
        if parsed.steps.is_empty() {
            return Err("decoder: found none that maps tokens to bytes, expected ByteLevel, ByteFallback, Replace or \
                        Metaspace"
                .to_owned());
        }
        Ok(parsed)
    }

    fn add(&mut self, decoder: &Value, fused: &mut bool) -> Result<(), String> {
        let kind = decoder["type"].as_str().ok_or("decoder: found none, expected an object with a type")?;
        match kind {
            "Sequence" => {
                for inner in decoder["decoders"].as_array().ok_or("decoder.decoders: expected a list")? {
                    self.add(inner, fused)?;
                }
            }
            "ByteLevel" => self.steps.push(Step::ByteLevel),
            "ByteFallback" => self.steps.push(Step::ByteFallback),
            "Fuse" => *fused = true,
            "Replace" => {
                let pattern = decoder["pattern"]["String"].as_str();
                let pattern = pattern.filter(|text| !text.is_empty()).ok_or_else(|| {
                    format!("decoder Replace: found pattern {}, expected a plain string", decoder["pattern"])
                })?;
                let content = decoder["content"].as_str().unwrap_or_default();
                if *fused {
                    return Err("decoder Replace: found it after Fuse, expected it before".to_owned());
                }
                self.steps.push(Step::Replace { pattern: pattern.to_owned(), content: content.to_owned() });
            }
            "Strip" => {
                let (content, start, stop) = (&decoder["content"], &decoder["start"], &decoder["stop"]);
                if content.as_str() != Some(" ") || stop.as_u64().unwrap_or(0) != 0 || !*fused {
                    return Err(format!(
                        "decoder Strip: found content {content}, stop {stop}, fused {fused}; expected a space, 0 and \
                         a Fuse before it"
                    ));
                }
                self.leading = LeadingRule::StripSpaces(start.as_u64().unwrap_or(0) as usize);
            }
            "Metaspace" => {
                let replacement = decoder["replacement"].as_str().unwrap_or("▁");
                if replacement != "▁" {
                    return Err(format!("decoder Metaspace: found replacement {replacement:?}, expected \"▁\""));
                }
                // Files before tokenizers 0.15 say `add_prefix_space` instead.
                let keeps = match decoder["prepend_scheme"].as_str() {
                    Some(scheme) => scheme == "never",
                    None => decoder["add_prefix_space"].as_bool() == Some(false),
                };
                if !keeps {
                    self.leading = LeadingRule::DropMetaspaceInFirstToken;
                }
                self.steps.push(Step::Replace { pattern: "▁".to_owned(), content: " ".to_owned() });
            }
            other => {
                return Err(format!(
                    "decoder: found type {other:?}, expected ByteLevel, ByteFallback, Fuse, Metaspace, Replace, \
                     Sequence or Strip"
                ));
            }
        }
        Ok(())
    }

    /// The bytes of one token that is not the first of its text.
    pub(crate) fn bytes_of(&self, token: &str) -> Vec<u8> {
        let mut text = token.to_owned();
        for step in &self.steps {
            match step {
                Step::ByteLevel => return byte_level_bytes(&text),
                Step::ByteFallback => {
                    if let Some(byte) = fallback_byte(&text) {
                        return vec![byte];
                    }
                }
                Step::Replace { pattern, content } => text = text.replace(pattern, content),
            }
        }
        text.into_bytes()
    }

    /// The bytes of one token at the very beginning of a text.
    pub(crate) fn bytes_of_first(&self, token: &str) -> Vec<u8> {
        match self.leading {
            LeadingRule::DropMetaspaceInFirstToken => self.bytes_of(&token.replace('▁', "")),
            LeadingRule::Keep | LeadingRule::StripSpaces(_) => self.bytes_of(token),
        }
    }
}

/// `<0xXX>` as its byte (sentencepiece's byte fallback).
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// The bytes of a byte-level BPE token; a token with any character outside the alphabet is an added token and stands
/// for itself.
fn byte_level_bytes(token: &str) -> Vec<u8> {
    token.chars().map(byte_of_char).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The inverse of GPT-2's `bytes_to_unicode`: printable Latin-1 characters stand for themselves, the 68 other bytes
/// were moved, in order, to U+0100 and up.
fn byte_of_char(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8), // 0x00..=0x20
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8), // 0x7F..=0xA0
        0x143 => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn byte_level_alphabet_covers_every_byte_once() {
        let mut seen = [0_u32; 256];
        for code in 0..0x200_u32 {
            if let Some(byte) = char::from_u32(code).and_then(byte_of_char) {
                seen[usize::from(byte)] += 1;
            }
        }
        assert_eq!(seen, [1; 256]);
        assert_eq!(byte_of_char('Ġ'), Some(b' '));
        assert_eq!(byte_of_char('Ċ'), Some(b'\n'));
    }

    #[test]
    fn added_tokens_outside_the_alphabet_stand_for_themselves() {
        let decoder = TokenDecoder::from_json(&json!({"type": "ByteLevel"})).unwrap();
        assert_eq!(decoder.bytes_of("<｜tool▁call▁begin｜>"), "<｜tool▁call▁begin｜>".as_bytes());
        assert_eq!(decoder.bytes_of("Ġhi"), b" hi");
    }

    #[test]
    fn byte_fallback_needs_two_hex_digits() {
        assert_eq!(fallback_byte("<0xE2>"), Some(0xE2));
        assert_eq!(fallback_byte("<0x+1>"), None);
        assert_eq!(fallback_byte("<0xE2"), None);
    }

    #[test]
    fn unsupported_decoders_are_named() {
        for (decoder, expected) in [
            (json!(null), "found none"),
            (json!({"type": "WordPiece"}), "WordPiece"),
            (json!({"type": "Sequence", "decoders": [{"type": "Fuse"}]}), "found none that maps"),
            (json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}), "fused false"),
            (json!({"type": "Replace", "pattern": {"Regex": "a"}, "content": ""}), "plain string"),
        ] {
            let reason = TokenDecoder::from_json(&decoder).unwrap_err();
            assert!(reason.contains(expected), "{reason}");
        }
    }
}
