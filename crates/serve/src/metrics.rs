//! Counters and histograms in Prometheus' text form, under vLLM's names and our own.

use crate::error::ApiError;
use crate::generator::GeneratorStats;
use crate::job::{Timings, Usage};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of time histograms in seconds: vLLM's, thinned.
const TIME_BOUNDS: [f64; 16] =
    [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1200.0];
/// Upper bounds of token histograms.
const TOKEN_BOUNDS: [f64; 16] = [
    1.0, 4.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0, 131072.0,
    1048576.0,
];

struct Histogram {
    bounds: [f64; 16],
    /// One a bound and one for what is above them.
    counts: [AtomicU64; 17],
    /// Sum in millionths.
    sum_micro: AtomicU64,
}

impl Histogram {
    fn new(bounds: [f64; 16]) -> Histogram {
        Histogram { bounds, counts: [const { AtomicU64::new(0) }; 17], sum_micro: AtomicU64::new(0) }
    }

    fn add(&self, value: f64) {
        let place = self.bounds.iter().position(|bound| value <= *bound).unwrap_or(self.bounds.len());
        self.counts[place].fetch_add(1, Ordering::Relaxed);
        self.sum_micro.fetch_add((value * 1e6) as u64, Ordering::Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, labels: &str) {
        let mut total = 0;
        let _ = writeln!(out, "# TYPE {name} histogram");
        for (bound, count) in self.bounds.iter().zip(&self.counts) {
            total += count.load(Ordering::Relaxed);
            let _ = writeln!(out, "{name}_bucket{{{labels},le=\"{bound}\"}} {total}");
        }
        total += self.counts[16].load(Ordering::Relaxed);
        let _ = writeln!(out, "{name}_bucket{{{labels},le=\"+Inf\"}} {total}");
        let _ = writeln!(out, "{name}_sum{{{labels}}} {}", self.sum_micro.load(Ordering::Relaxed) as f64 / 1e6);
        let _ = writeln!(out, "{name}_count{{{labels}}} {total}");
    }
}

/// What the server itself counts; the engine's numbers come from its stats.
pub(crate) struct Metrics {
    prompt_tokens: AtomicU64,
    generation_tokens: AtomicU64,
    stop: AtomicU64,
    length: AtomicU64,
    tool_calls: AtomicU64,
    abort: AtomicU64,
    refused: AtomicU64,
    time_to_first_token: Histogram,
    inter_token: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
}

impl Metrics {
    pub(crate) fn new() -> Metrics {
        Metrics {
            prompt_tokens: AtomicU64::new(0),
            generation_tokens: AtomicU64::new(0),
            stop: AtomicU64::new(0),
            length: AtomicU64::new(0),
            tool_calls: AtomicU64::new(0),
            abort: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            time_to_first_token: Histogram::new(TIME_BOUNDS),
            inter_token: Histogram::new(TIME_BOUNDS),
            end_to_end: Histogram::new(TIME_BOUNDS),
            queue: Histogram::new(TIME_BOUNDS),
            prefill: Histogram::new(TIME_BOUNDS),
            decode: Histogram::new(TIME_BOUNDS),
            request_prompt_tokens: Histogram::new(TOKEN_BOUNDS),
            request_generation_tokens: Histogram::new(TOKEN_BOUNDS),
        }
    }

    pub(crate) fn first_token(&self, time: Duration) {
        self.time_to_first_token.add(time.as_secs_f64());
    }

    pub(crate) fn inter_token(&self, time: Duration) {
        self.inter_token.add(time.as_secs_f64());
    }

    pub(crate) fn refused(&self, error: ApiError) -> ApiError {
        self.refused.fetch_add(1, Ordering::Relaxed);
        error
    }

    pub(crate) fn succeeded(&self, outcome: &str, usage: &Usage, timings: &Timings, total: Duration) {
        let counter = match outcome {
            "length" => &self.length,
            "tool_calls" => &self.tool_calls,
            _ => &self.stop,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        self.count_tokens(usage);
        self.end_to_end.add(total.as_secs_f64());
        self.queue.add(timings.queued.as_secs_f64());
        self.prefill.add(timings.prefill.as_secs_f64());
        self.decode.add(timings.decode.as_secs_f64());
        self.request_prompt_tokens.add(usage.prompt as f64);
        self.request_generation_tokens.add(usage.completion as f64);
    }

    pub(crate) fn cancelled(&self, usage: &Usage) {
        self.abort.fetch_add(1, Ordering::Relaxed);
        self.count_tokens(usage);
    }

    fn count_tokens(&self, usage: &Usage) {
        self.prompt_tokens.fetch_add(usage.prompt as u64, Ordering::Relaxed);
        self.generation_tokens.fetch_add(usage.completion as u64, Ordering::Relaxed);
    }

    /// Tokens generated so far: the page makes a speed of it.
    pub(crate) fn generated_tokens(&self) -> u64 {
        self.generation_tokens.load(Ordering::Relaxed)
    }

    /// Everything, for `/metrics`.
    pub(crate) fn render(&self, model: &str, stats: &GeneratorStats) -> String {
        let mut out = String::with_capacity(16 << 10);
        let labels = format!("model_name=\"{}\"", model.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', " "));
        let fraction = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        let cache_used = fraction(stats.cache_used_bytes, stats.cache_total_bytes);
        let mut gauge = |name: &str, value: f64| {
            let _ = writeln!(out, "# TYPE {name} gauge\n{name}{{{labels}}} {value}");
        };
        gauge("vllm:num_requests_running", stats.running as f64);
        gauge("vllm:num_requests_waiting", stats.waiting as f64);
        gauge("vllm:kv_cache_usage_perc", cache_used);
        gauge("vllm:gpu_cache_usage_perc", cache_used);
        gauge("moellon:cache_used_bytes", stats.cache_used_bytes as f64);
        gauge("moellon:cache_reusable_bytes", stats.cache_reusable_bytes as f64);
        gauge("moellon:cache_total_bytes", stats.cache_total_bytes as f64);
        gauge("moellon:weights_bytes", stats.weights_bytes as f64);
        gauge("moellon:model_loaded", if stats.unloaded { 0.0 } else { 1.0 });
        gauge("moellon:seconds_since_last_step", stats.since_last_step.as_secs_f64());
        gauge("moellon:spec_draft_seconds", stats.draft_time);
        gauge("moellon:engine_failed", f64::from(u8::from(stats.failed)));
        let optional = [
            ("moellon:bytes_read_per_token", stats.bytes_read_per_token),
            ("moellon:spec_saved_seconds", stats.speculation_saved),
            ("moellon:spec_head_acceptance", stats.head_acceptance),
            ("moellon:bandwidth_fraction", stats.bandwidth_fraction),
            ("moellon:experts_unique_per_step", stats.experts_unique_per_step),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                gauge(name, value);
            }
        }
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = [
            ("vllm:prompt_tokens_total", count(&self.prompt_tokens)),
            ("vllm:generation_tokens_total", count(&self.generation_tokens)),
            ("vllm:prefix_cache_queries_total", stats.prefix_queried_tokens),
            ("vllm:prefix_cache_hits_total", stats.prefix_hit_tokens),
            ("vllm:num_preemptions_total", stats.preemptions),
            ("vllm:spec_decode_num_drafts_total", stats.drafts),
            ("vllm:spec_decode_num_draft_tokens_total", stats.draft_tokens),
            ("vllm:spec_decode_num_accepted_tokens_total", stats.accepted_draft_tokens),
            ("moellon:prefix_cache_disk_hits_total", stats.disk_hit_tokens),
            ("moellon:steps_total", stats.steps),
            ("moellon:masks_total", stats.masks),
            ("moellon:engine_restarts_total", stats.restarts),
            ("moellon:memory_admission_rejects_total", stats.admission_rejects),
            ("moellon:requests_refused_total", count(&self.refused)),
        ];
        for (name, value) in counters {
            let _ = writeln!(out, "# TYPE {name} counter\n{name}{{{labels}}} {value}");
        }
        let seconds = stats.mask_time.as_secs_f64();
        let _ = writeln!(
            out,
            "# TYPE moellon:mask_seconds_total counter\nmoellon:mask_seconds_total{{{labels}}} {seconds}"
        );
        let _ = writeln!(out, "# TYPE vllm:request_success_total counter");
        let reasons =
            [("stop", &self.stop), ("length", &self.length), ("tool_calls", &self.tool_calls), ("abort", &self.abort)];
        for (reason, counter) in reasons {
            let value = count(counter);
            let _ = writeln!(out, "vllm:request_success_total{{{labels},finished_reason=\"{reason}\"}} {value}");
        }
        let histograms = [
            ("vllm:time_to_first_token_seconds", &self.time_to_first_token),
            ("vllm:inter_token_latency_seconds", &self.inter_token),
            ("vllm:e2e_request_latency_seconds", &self.end_to_end),
            ("vllm:request_queue_time_seconds", &self.queue),
            ("vllm:request_prefill_time_seconds", &self.prefill),
            ("vllm:request_decode_time_seconds", &self.decode),
            ("vllm:request_prompt_tokens", &self.request_prompt_tokens),
            ("vllm:request_generation_tokens", &self.request_generation_tokens),
        ];
        for (name, histogram) in histograms {
            histogram.write(&mut out, name, &labels);
        }
        out
    }
}
