//! `/v1/completions`, `/tokenize` and `/detokenize`.

use crate::client::{TestServer, options};
use moellon_serve::scripted::ScriptedAnswer;
use serde_json::json;

const PATH: &str = "/v1/completions";

#[tokio::test]
async fn prompts_come_in_four_forms() {
    let server = TestServer::saying("and so on").await;
    let cases = [(json!("once"), 1), (json!(["once", "twice"]), 2), (json!([5, 6, 7]), 1), (json!([[5, 6], [7]]), 2)];
    for (prompt, count) in cases {
        let body = server.post(PATH, &json!({"prompt": prompt, "max_tokens": 100})).await.json();
        assert_eq!(body["object"], "text_completion");
        assert_eq!(body["choices"].as_array().unwrap().len(), count, "{body}");
        assert_eq!(body["choices"][count - 1]["text"], "and so on");
        assert_eq!(body["choices"][count - 1]["index"], count - 1);
    }
}

#[tokio::test]
async fn echo_scores_the_prompt() {
    let server = TestServer::saying("x").await;
    let text = "one two three";
    for max_tokens in [0, 1] {
        let body = json!({"prompt": text, "echo": true, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0});
        let reply = server.post(PATH, &body).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        let choice = reply.json()["choices"][0].clone();
        let scores = &choice["logprobs"];
        let count = server.post("/tokenize", &json!({"prompt": text})).await.json()["count"].as_u64().unwrap();
        assert_eq!(scores["tokens"].as_array().unwrap().len() as u64, count + max_tokens);
        assert_eq!(scores["token_logprobs"].as_array().unwrap().len() as u64, count + max_tokens);
        assert!(scores["token_logprobs"][0].is_null());
        assert_eq!(scores["token_logprobs"][1], -0.5);
        // The script's alternative is token 0, and the token itself is listed as well.
        assert!(scores["top_logprobs"][0].is_null());
        assert_eq!(scores["top_logprobs"][1].as_object().unwrap().len(), 2, "{scores}");
        assert_eq!(scores["text_offset"][0], 0);
        let joined: String = scores["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
        assert_eq!(joined, choice["text"].as_str().unwrap());
    }
}

#[tokio::test]
async fn a_stream_ends_with_done() {
    let server = TestServer::saying("and so on").await;
    let reply = server.post(PATH, &json!({"prompt": "once", "stream": true, "max_tokens": 50})).await;
    let chunks = reply.data();
    let text: String = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, "and so on");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");
    assert_eq!(*reply.frames().last().unwrap(), "data: [DONE]");
}

#[tokio::test]
async fn bad_prompts_get_400() {
    let server = TestServer::saying("x").await;
    let cases = [
        (json!({}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [[-1]]}), "prompt"),
        (json!({"prompt": [99_999_999]}), "prompt"),
        (json!({"prompt": 3}), "prompt"),
        (json!({"prompt": [true]}), "prompt"),
        (json!({"prompt": vec!["a"; 65]}), "prompt"),
        (json!({"prompt": "word ".repeat(20_000)}), "prompt"),
        (json!({"prompt": "a", "logprobs": 1_000_000}), "logprobs"),
        (json!({"prompt": "a", "best_of": 4, "stream": true}), "best_of"),
        (json!({"prompt": "a", "best_of": 2, "n": 3}), "best_of"),
        (json!({"prompt": "a", "suffix": "b"}), "suffix"),
        (json!({"prompt": "a", "max_tokens": 0}), "max_tokens"),
    ];
    for (body, param) in cases {
        let reply = server.post(PATH, &body).await;
        let shown: String = body.to_string().chars().take(80).collect();
        assert_eq!(reply.status, 400, "{shown}: {reply:?}");
        assert_eq!(reply.json()["error"]["param"], param, "{shown}");
    }
}

/// Three answers of which the second is likeliest: given first, alone, or with the runner-up.
#[tokio::test]
async fn the_best_of_several_answers_are_those_whose_tokens_are_likeliest() {
    // The engine counts seeds up: one answer each.
    let server = TestServer::start(options(), |_, request| {
        let (text, logprob) =
            [("far", -3.0), ("near and longer", -0.5), ("between", -1.0)][request.sampling.seed as usize];
        ScriptedAnswer { logprob: Some(logprob), ..ScriptedAnswer::text(text) }
    })
    .await;
    let ask = async |n: usize| server.post(PATH, &json!({"prompt": "a", "seed": 0, "n": n, "best_of": 3})).await.json();
    let texts = |body: &serde_json::Value| -> Vec<String> {
        body["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    let one = ask(1).await;
    assert_eq!(texts(&one), ["near and longer"]);
    let two = ask(2).await;
    assert_eq!(texts(&two), ["near and longer", "between"]);
    assert_eq!((&two["choices"][1]["index"], &two["choices"][1]["logprobs"]), (&json!(1), &json!(null)));
    // All of them were computed, and all are paid for.
    assert_eq!(one["usage"]["completion_tokens"], two["usage"]["completion_tokens"]);
    // As many as are given: in the order of their seeds.
    assert_eq!(ask(3).await["choices"][0]["text"], "far");
    let chat = json!({"messages": [{"role": "user", "content": "hi"}], "seed": 0, "best_of": 3});
    let body = server.post("/v1/chat/completions", &chat).await.json();
    assert_eq!(body["choices"].as_array().unwrap().len(), 1);
    assert_eq!(body["choices"][0]["message"]["reasoning_content"], "near and longer");
}

#[tokio::test]
async fn tokens_and_text_are_inverse() {
    let server = TestServer::saying("x").await;
    let text = "Hello, wörld! \u{1F600}";
    let tokens = server.post("/tokenize", &json!({"prompt": text})).await.json()["tokens"].clone();
    assert_eq!(server.post("/detokenize", &json!({"tokens": tokens})).await.json()["prompt"], text);
    assert_eq!(server.post("/detokenize", &json!({"tokens": [-1]})).await.status, 400);
    assert_eq!(server.post("/tokenize", &json!({})).await.status, 400);
}
