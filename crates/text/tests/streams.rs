//! Stop strings and thinking: the result never depends on how the output was cut into chunks.

use moellon_text::{Error, StopStrings, StopTokens, ThinkingFormat, ThinkingPiece, ThinkingSplitter, ThinkingStart};
use proptest::prelude::*;

/// Cuts a text at these character positions (taken modulo its length).
fn cut<'a>(text: &'a str, cuts: &[usize]) -> Vec<&'a str> {
    let boundaries: Vec<usize> = text.char_indices().map(|(index, _)| index).chain([text.len()]).collect();
    let mut places: Vec<usize> = cuts.iter().map(|place| boundaries[place % boundaries.len()]).collect();
    places.extend([0, text.len()]);
    places.sort_unstable();
    places.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect()
}

fn stop(strings: &[&str], chunks: &[&str]) -> (String, Option<usize>) {
    let mut matcher = StopStrings::new(strings).unwrap();
    let mut text = String::new();
    let mut matched = None;
    for chunk in chunks {
        let outcome = matcher.push(chunk);
        text.push_str(&outcome.text);
        matched = outcome.matched;
    }
    text.push_str(&matcher.finish());
    (text, matched)
}

#[test]
fn stop_strings_never_leak() {
    assert_eq!(stop(&["\n\nUser:"], &["Hi.\n", "\nUs", "er: x"]), ("Hi.".to_owned(), Some(0)));
    assert_eq!(stop(&["\n\nUser:"], &["Hi.\n", "\nUs", "age"]), ("Hi.\n\nUsage".to_owned(), None));
    assert_eq!(stop(&["END", "ND!"], &["E", "N", "D", "!"]), (String::new(), Some(0)));
    assert_eq!(stop(&["👍🏽"], &["a👍", "🏽b"]), ("a".to_owned(), Some(0)));
    assert_eq!(stop(&[], &["a", "b"]), ("ab".to_owned(), None));
    let error = StopStrings::new(&["a", ""]).unwrap_err();
    assert_eq!(error.to_string(), "stop: string 1 is empty, expected at least one character");
}

#[test]
fn stop_tokens_are_a_set() {
    let tokens = StopTokens::new([7, 3, 7]);
    assert_eq!(tokens.ids(), [3, 7]);
    assert!(tokens.contains(7) && !tokens.contains(4));
}

/// Thought and answer, each joined.
fn split(format: &ThinkingFormat, start: ThinkingStart, chunks: &[&str]) -> (String, String) {
    let mut splitter = ThinkingSplitter::new(format.clone(), start).unwrap();
    let mut pieces: Vec<ThinkingPiece> = chunks.iter().flat_map(|chunk| splitter.push(chunk)).collect();
    pieces.extend(splitter.finish());
    let mut joined = (String::new(), String::new());
    for piece in pieces {
        match piece {
            ThinkingPiece::Thinking(text) => joined.0.push_str(&text),
            ThinkingPiece::Answer(text) => joined.1.push_str(&text),
        }
    }
    joined
}

#[test]
fn thinking_is_split_from_the_answer() {
    let format = ThinkingFormat::default();
    for (start, output, thought, answer) in [
        (ThinkingStart::Inside, "Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
        (ThinkingStart::Inside, "\nHm.\n\nso\n</think>Yes.\n", "Hm.\n\nso", "Yes.\n"),
        (ThinkingStart::Inside, "</think>Yes.", "", "Yes."),
        (ThinkingStart::Inside, "never closed\n", "never closed", ""),
        (ThinkingStart::Inside, "<think>Hm, <think>?</think>x </think> <think>", "Hm, <think>?", "x </think> <think>"),
        (ThinkingStart::Outside, "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        (ThinkingStart::Outside, " \n<think>Hm.</think>Yes.", "Hm.", "Yes."),
        (ThinkingStart::Outside, "  Yes. <think>no</think>", "", "  Yes. <think>no</think>"),
        (ThinkingStart::Outside, "</think>Yes.", "", "</think>Yes."),
        (ThinkingStart::Outside, "\n ", "", "\n "),
        (ThinkingStart::Inside, "a</thin", "a</thin", ""),
    ] {
        assert_eq!(split(&format, start, &[output]), (thought.to_owned(), answer.to_owned()), "{output:?}");
    }
    let exact = ThinkingFormat { trim_newlines: false, open: "[THINK]".into(), close: "[/THINK]".into() };
    assert_eq!(
        split(&exact, ThinkingStart::Outside, &["[THINK]\na\n[/TH", "INK]\nb"]),
        ("\na\n".to_owned(), "\nb".to_owned())
    );
    let same = ThinkingFormat { close: "<think>".into(), ..format };
    assert!(matches!(ThinkingSplitter::new(same, ThinkingStart::Inside), Err(Error::Setting { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn stop_is_chunk_independent(text in "[ab｜]{0,24}", strings in prop::collection::vec("[ab｜]{1,4}", 0..4), cuts in prop::collection::vec(0..99_usize, 0..8)) {
        let strings: Vec<&str> = strings.iter().map(String::as_str).collect();
        let (whole, matched) = stop(&strings, &[&text]);
        prop_assert_eq!(stop(&strings, &cut(&text, &cuts)), (whole.clone(), matched));
        // The obvious reference: the shortest beginning of the text that ends with a stop string.
        let end = text.char_indices().map(|(index, character)| index + character.len_utf8())
            .find(|end| strings.iter().any(|string| text[..*end].ends_with(string)));
        let expected = match end {
            Some(end) => {
                let longest = strings.iter().filter(|string| text[..end].ends_with(**string)).map(|string| string.len()).max();
                text[..end - longest.unwrap_or(0)].to_owned()
            }
            None => text.clone(),
        };
        prop_assert_eq!(whole, expected);
        prop_assert_eq!(matched.is_some(), end.is_some());
    }

    #[test]
    fn thinking_is_chunk_independent(parts in prop::collection::vec(prop_oneof![Just("<think>"), Just("</think>"), Just("\n"), Just(" "), Just("<"), Just("/think"), Just("é"), Just("</thin")], 0..12), inside: bool, trim_newlines: bool, cuts in prop::collection::vec(0..99_usize, 0..10)) {
        let text = parts.concat();
        let start = if inside { ThinkingStart::Inside } else { ThinkingStart::Outside };
        let format = ThinkingFormat { trim_newlines, ..ThinkingFormat::default() };
        prop_assert_eq!(split(&format, start, &cut(&text, &cuts)), split(&format, start, &[&text]));
    }
}
