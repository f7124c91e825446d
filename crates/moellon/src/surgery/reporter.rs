//! Progress of long commands on standard error: a bar on a terminal, a line every ten seconds without one.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use moellon_surgery::Progress;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Shows progress until it is dropped.
pub struct Reporter {
    verb: &'static str,
    bar: ProgressBar,
    is_terminal: bool,
    last_line: Instant,
}

impl Reporter {
    /// `verb` says what is being done.
    pub fn new(verb: &'static str) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let target = if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(1), target);
        let bar = match ProgressStyle::with_template("{bar:30} {percent} %  {msg}") {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        };
        Reporter { verb, bar, is_terminal, last_line: Instant::now() }
    }

    /// Shows the state.
    pub fn report(&mut self, progress: Progress<'_>) {
        let snr =
            progress.snr_db.filter(|db| db.is_finite()).map_or(String::new(), |db| format!(", {db:.1} dB so far"));
        let text = format!("{} {}, {} left{snr}", self.verb, progress.name, span(progress.left));
        if self.is_terminal {
            self.bar.set_length(progress.total.max(1));
            self.bar.set_position(progress.done);
            self.bar.set_message(text);
        } else if self.last_line.elapsed() > Duration::from_secs(10) {
            self.last_line = Instant::now();
            eprintln!("{:.1} % {text}", 100.0 * progress.done as f64 / progress.total.max(1) as f64);
        }
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// `3 h 05 min`, `12 min`, `40 s`.
pub fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..=99 => format!("{seconds} s"),
        100..=5999 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::span;
    use std::time::Duration;

    #[test]
    fn spans_have_the_unit_that_matters() {
        assert_eq!([40, 601, 11_100].map(|s| span(Duration::from_secs(s))), ["40 s", "11 min", "3 h 05 min"]);
    }
}
