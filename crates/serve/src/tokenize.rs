//! `POST /tokenize` and `/detokenize`: what vLLM and llama.cpp offer, in both their field names.

use crate::app::{App, Call, off_thread};
use crate::chat_request::ChatRequest;
use crate::error::{ApiError, json_response};
use crate::fields::{Fields, shown};
use crate::settings::token_id;
use crate::{openai_chat, prompt};
use axum::body::Body;
use axum::http::{Response, StatusCode};
use serde_json::{Value, json};
use std::sync::Arc;

/// Token ids of a text (`prompt` or `content`) or of a conversation (`messages`).
pub(crate) async fn tokenize(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let max_model_len = app.workshop.model.context_length;
    let ids = off_thread(move || {
        let fields = Fields::of_body(&call.body);
        if fields.get("messages").is_some() {
            let request: ChatRequest = openai_chat::parse(&call.body, &app)?;
            return prompt::plan_chat(&request, &app.workshop.model, &app.options).map(|plan| plan.prompt);
        }
        app.check_model(fields)?;
        let text = match fields.text("prompt")? {
            Some(text) => text,
            None => fields
                .text("content")?
                .ok_or_else(|| ApiError::field("prompt", "nothing", "a string, or messages beside it"))?,
        };
        let add_special = fields.flag("add_special_tokens")?.or(fields.flag("add_special")?).unwrap_or(false);
        let ids = app.workshop.model.tokenizer.encode(text, add_special);
        ids.map_err(|error| ApiError::field("prompt", error, "text that the tokenizer takes"))
    })
    .await?;
    let body = json!({"tokens": ids, "count": ids.len(), "max_model_len": max_model_len});
    Ok(json_response(StatusCode::OK, &body))
}

/// The text of token ids.
pub(crate) async fn detokenize(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let fields = Fields::of_body(&call.body);
    let model = &app.workshop.model;
    app.check_model(fields)?;
    let list = fields.list("tokens")?.ok_or_else(|| ApiError::field("tokens", "nothing", "a list of token ids"))?;
    let expected = format!("token ids below {}", model.vocab_size);
    let id = |value: &Value| token_id(value, model).ok_or_else(|| ApiError::field("tokens", shown(value), &expected));
    let ids: Vec<u32> = list.iter().map(id).collect::<Result<_, _>>()?;
    let text = model.tokenizer.decode(&ids, false);
    Ok(json_response(StatusCode::OK, &json!({"prompt": text, "content": text})))
}
