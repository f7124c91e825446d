//! Server-sent events: a job and a protocol's encoder become the body of an answer.

use crate::error::ApiError;
use crate::job::{Ending, Job, Step, Timings, Usage};
use crate::options::ServeOptions;
use crate::pipeline::Delta;
use axum::body::Body;
use axum::http::{HeaderValue, Response, header};
use hyper::body::{Bytes, Frame};
use moellon_engine::Finished;
use serde_json::Value;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::mpsc;

/// Pieces of a stream that wait for a slow reader: about a second of one answer. Then the reader has
/// `write_timeout` to take one.
const MAX_WAITING_PIECES: usize = 64;

/// Writes one protocol's frames.
pub(crate) trait StreamEncoder: Send {
    /// The request was admitted: what comes before the first token.
    fn started(&mut self, usage: &Usage, out: &mut String);
    /// A new piece of an answer.
    fn delta(&mut self, choice: usize, delta: &Delta, out: &mut String);
    /// An answer ended.
    fn ended(&mut self, choice: usize, ending: &Ending, finished: Option<&Finished>, usage: &Usage, out: &mut String);
    /// All answers ended.
    fn done(&mut self, usage: &Usage, timings: &Timings, out: &mut String);
    /// The request failed in the middle.
    fn failed(&mut self, error: &ApiError, out: &mut String);
    /// A sign of life. A comment, unless the protocol has something better.
    fn heartbeat(&mut self, progress: Option<(usize, usize)>, out: &mut String) {
        match progress {
            Some((done, all)) if done < all => out.push_str(&format!(": prefill {done}/{all}\n\n")),
            Some(_) | None => out.push_str(": keepalive\n\n"),
        }
    }
}

/// A frame with data only.
pub(crate) fn data_frame(out: &mut String, data: &Value) {
    out.push_str("data: ");
    out.push_str(&data.to_string());
    out.push_str("\n\n");
}

/// A frame with the data's `type` as its event.
pub(crate) fn event_frame(out: &mut String, data: &Value) {
    out.push_str("event: ");
    out.push_str(data["type"].as_str().unwrap_or("message"));
    out.push('\n');
    data_frame(out, data);
}

/// Says whether the engine is stuck: then heartbeats would lie.
pub(crate) type IsStuck = Arc<dyn Fn() -> bool + Send + Sync>;

/// The streaming answer of a job.
pub(crate) fn respond(
    job: Job,
    encoder: Box<dyn StreamEncoder>,
    options: &ServeOptions,
    is_stuck: IsStuck,
) -> Response<Body> {
    let (sender, receiver) = mpsc::channel(MAX_WAITING_PIECES);
    let pump = Pump { job, encoder, sender, write_timeout: options.http.write_timeout, is_stuck };
    tokio::spawn(pump.run(options.heartbeat));
    let mut response = Response::new(Body::new(Pieces(receiver)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would hold the stream back otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Moves a job's steps to the client until one of them ends.
struct Pump {
    job: Job,
    encoder: Box<dyn StreamEncoder>,
    sender: mpsc::Sender<Bytes>,
    write_timeout: Duration,
    is_stuck: IsStuck,
}

impl Pump {
    async fn run(mut self, heartbeat: Duration) {
        let mut out = String::new();
        let mut progress = None;
        loop {
            let closed = self.sender.clone();
            let step = tokio::select! {
                biased;
                // The client left: dropping the job cancels it.
                () = closed.closed() => return,
                step = self.job.next() => step,
                () = tokio::time::sleep(heartbeat) => {
                    if !(self.is_stuck)() {
                        self.encoder.heartbeat(progress, &mut out);
                        if !self.send(&mut out).await {
                            return;
                        }
                    }
                    continue;
                }
            };
            let is_last = matches!(step, Step::Done | Step::Failed(_));
            if let Step::Prefill { done_tokens, prompt_tokens } = step {
                progress = Some((done_tokens, prompt_tokens));
                continue;
            }
            self.encode(&step, &mut out);
            if !self.send(&mut out).await || is_last {
                return;
            }
        }
    }

    fn encode(&mut self, step: &Step, out: &mut String) {
        match step {
            Step::Started => self.encoder.started(&self.job.usage, out),
            Step::Prefill { .. } => {}
            Step::Deltas { choice, deltas } => {
                for delta in deltas {
                    self.encoder.delta(*choice, delta, out);
                }
            }
            Step::Ended { choice, ending, finished } => {
                self.encoder.ended(*choice, ending, finished.as_ref(), &self.job.usage, out);
            }
            Step::Done => self.encoder.done(&self.job.usage, &self.job.timings, out),
            Step::Failed(error) => self.encoder.failed(error, out),
        }
    }

    /// Gives a piece to the connection; `false` when the client left or does not read.
    async fn send(&mut self, out: &mut String) -> bool {
        if out.is_empty() {
            return true;
        }
        let piece = Bytes::from(std::mem::take(out));
        match tokio::time::timeout(self.write_timeout, self.sender.send(piece)).await {
            Ok(sent) => sent.is_ok(),
            Err(_) => {
                let seconds = self.write_timeout.as_secs_f64();
                tracing::warn!(request = %self.job.id, seconds, "client does not read, request cancelled");
                false
            }
        }
    }
}

/// The pieces as a body.
struct Pieces(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    }
}

/// An answer as a whole, for clients that do not stream.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) thinking: String,
    pub(crate) text: String,
    pub(crate) calls: Vec<moellon_text::ToolCall>,
    pub(crate) logprobs: Vec<moellon_engine::SampledToken>,
    pub(crate) ending: Option<Ending>,
    pub(crate) finished: Option<Finished>,
}

/// Waits for all answers of a job and gives the `n` likeliest, in the order of their likelihood if there are more.
///
/// # Errors
/// The first failure; the other answers are dropped.
pub(crate) async fn collect(job: &mut Job, n: usize) -> Result<Vec<Answer>, ApiError> {
    let mut answers: Vec<Answer> = (0..job.num_choices()).map(|_| Answer::default()).collect();
    loop {
        match job.next().await {
            Step::Started | Step::Prefill { .. } => {}
            Step::Deltas { choice, deltas } => {
                let answer = &mut answers[choice];
                for delta in deltas {
                    match delta {
                        Delta::Thinking(text) => answer.thinking.push_str(&text),
                        Delta::Text { text, mut logprobs } => {
                            answer.text.push_str(&text);
                            answer.logprobs.append(&mut logprobs);
                        }
                        // The whole call follows.
                        Delta::CallStart { .. } | Delta::CallArguments { .. } => {}
                        Delta::Call(call) => answer.calls.push(call),
                    }
                }
            }
            Step::Ended { choice, ending, finished } => {
                answers[choice].ending = Some(ending);
                answers[choice].finished = finished;
            }
            Step::Done => return Ok(likeliest(job, answers, n)),
            Step::Failed(error) => return Err(error),
        }
    }
}

/// The `n` answers whose tokens are likeliest in the mean, best first (OpenAI's measure of `best_of`: a sum would choose the
/// shortest); all of them as they are if there are no more.
fn likeliest(job: &Job, answers: Vec<Answer>, n: usize) -> Vec<Answer> {
    if answers.len() <= n {
        return answers;
    }
    let mut ranked: Vec<(f64, Answer)> =
        answers.into_iter().enumerate().map(|(choice, answer)| (job.mean_logprob(choice), answer)).collect();
    ranked.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    ranked.into_iter().take(n).map(|(_, answer)| answer).collect()
}
