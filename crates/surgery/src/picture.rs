//! A comparison as an SVG picture: the distribution of the divergence, and the error after every layer.

use crate::compare::Comparison;
use std::fmt::Write as _;

const COLORS: [&str; 3] = ["#1b6ca8", "#c8553d", "#3a7d44"];

/// Left, top, width and height of a plot in the picture.
#[derive(Clone, Copy)]
struct Frame {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
}

/// An axis that maps values to `[0, 1]`.
#[derive(Clone, Copy)]
struct Axis {
    low: f64,
    high: f64,
    logarithmic: bool,
}

impl Axis {
    fn linear(low: f64, high: f64) -> Self {
        Axis { low, high: if high > low { high } else { low + 1.0 }, logarithmic: false }
    }

    /// From a power of ten to another.
    fn decades(low: f64, high: f64) -> Self {
        let low = 10f64.powf(low.max(1e-12).log10().floor());
        let high = 10f64.powf(high.max(1e-12).log10().ceil());
        Axis { low, high: if high > low { high } else { low * 10.0 }, logarithmic: true }
    }

    fn place(self, value: f64) -> f64 {
        match self.logarithmic {
            true => (value.max(self.low).log10() - self.low.log10()) / (self.high.log10() - self.low.log10()),
            false => (value - self.low) / (self.high - self.low),
        }
    }

    /// Values that get a line and a label.
    fn ticks(self) -> Vec<f64> {
        if self.logarithmic {
            let (low, high) = (self.low.log10().round() as i32, self.high.log10().round() as i32);
            return (low..=high).map(|power| 10f64.powi(power)).collect();
        }
        let width = self.high - self.low;
        let power = 10f64.powf((width / 5.0).log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|s| s * power).find(|s| width / s <= 8.0).unwrap_or(width);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step + 1e-9).floor() as i64;
        (first..=last).map(|i| i as f64 * step).collect()
    }

    fn label(self, value: f64) -> String {
        match (self.logarithmic, value) {
            (true, v) if !(0.001..=1000.0).contains(&v) => format!("1e{}", v.log10().round() as i32),
            (_, v) => format!("{}", (v * 1e6).round() / 1e6),
        }
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

struct Canvas(String);

impl Canvas {
    fn new(width: f64, height: f64) -> Self {
        Canvas(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
        ))
    }

    fn put(&mut self, line: std::fmt::Arguments<'_>) {
        self.0.write_fmt(line).expect("a String takes all text");
        self.0.push('\n');
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let text = escape(text);
        self.put(format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"#222\">{text}</text>"));
    }

    fn axes(&mut self, frame: Frame, x: Axis, y: Axis, labels: [&str; 2]) {
        let Frame { left, top, width, height } = frame;
        for tick in x.ticks() {
            let at = left + x.place(tick) * width;
            self.put(format_args!(
                "<line x1=\"{at:.1}\" y1=\"{top:.1}\" x2=\"{at:.1}\" y2=\"{:.1}\" stroke=\"#ddd\"/>",
                top + height
            ));
            self.text(at, top + height + 16.0, "middle", &x.label(tick));
        }
        for tick in y.ticks() {
            let at = top + height - y.place(tick) * height;
            self.put(format_args!(
                "<line x1=\"{left:.1}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>",
                left + width
            ));
            self.text(left - 6.0, at + 4.0, "end", &y.label(tick));
        }
        self.put(format_args!(
            "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"none\" stroke=\"#888\"/>"
        ));
        self.text(left + width / 2.0, top + height + 34.0, "middle", labels[0]);
        self.text(left, top - 8.0, "start", labels[1]);
    }

    fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

/// The distribution of the divergence over tokens, and the signal to noise after every layer.
pub fn comparison(title: &str, comparison: &Comparison) -> String {
    const BINS: usize = 48;
    let mut canvas = Canvas::new(900.0, 400.0);
    canvas.text(60.0, 24.0, "start", title);
    let x = Axis::decades(1e-6, comparison.kl_max.max(1e-4));
    let mut bins = [0usize; BINS];
    for kl in &comparison.kl {
        let at = (x.place(f64::from(*kl)) * BINS as f64) as usize;
        bins[at.min(BINS - 1)] += 1;
    }
    let share = |count: usize| count as f64 / comparison.kl.len().max(1) as f64;
    let y = Axis::linear(0.0, bins.iter().map(|count| share(*count)).fold(0.0, f64::max) * 1.05);
    let frame = Frame { left: 60.0, top: 60.0, width: 390.0, height: 280.0 };
    canvas.axes(frame, x, y, ["KL divergence of a token, nats", "share of tokens"]);
    for (at, count) in bins.iter().enumerate() {
        let width = frame.width / BINS as f64;
        let height = y.place(share(*count)) * frame.height;
        canvas.put(format_args!(
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"{}\"/>",
            frame.left + at as f64 * width,
            frame.top + frame.height - height,
            width * 0.9,
            COLORS[0]
        ));
    }
    for (name, value) in [("mean", comparison.kl_mean), ("99.9 %", comparison.kl_p999)] {
        let at = frame.left + x.place(value) * frame.width;
        canvas.put(format_args!(
            "<line x1=\"{at:.1}\" y1=\"{:.1}\" x2=\"{at:.1}\" y2=\"{:.1}\" stroke=\"{}\" stroke-width=\"2\"/>",
            frame.top,
            frame.top + frame.height,
            COLORS[1]
        ));
        canvas.text(at + 3.0, frame.top + 12.0, "start", &format!("{name} {value:.4}"));
    }
    let finite: Vec<f64> = comparison.layer_snr_db.iter().copied().filter(|db| db.is_finite()).collect();
    if !finite.is_empty() {
        let layers = Axis::linear(0.0, comparison.layer_snr_db.len() as f64);
        let db = Axis::linear(0.0, finite.iter().copied().fold(0.0, f64::max) * 1.1);
        let frame = Frame { left: 530.0, top: 60.0, width: 340.0, height: 280.0 };
        canvas.axes(frame, layers, db, ["layer", "signal to noise of the residual stream, dB"]);
        let width = frame.width / comparison.layer_snr_db.len() as f64;
        for (at, value) in comparison.layer_snr_db.iter().enumerate().filter(|(_, value)| value.is_finite()) {
            let height = db.place(value.max(0.0)) * frame.height;
            canvas.put(format_args!(
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"{}\"/>",
                frame.left + (at as f64 + 0.1) * width,
                frame.top + frame.height - height,
                width * 0.8,
                COLORS[2]
            ));
        }
    }
    canvas.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_map_their_ends_and_decades() {
        let axis = Axis::decades(2e-3, 0.5);
        assert_eq!((axis.low, axis.high), (1e-3, 1.0));
        assert!((axis.place(1e-3), axis.place(1.0)) == (0.0, 1.0) && (axis.place(0.1) - 2.0 / 3.0).abs() < 1e-9);
        assert_eq!(axis.ticks().len(), 4);
        let axis = Axis::linear(0.0, 6.0);
        assert_eq!(axis.ticks(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!((axis.place(3.0), axis.label(3.0)), (0.5, "3".to_owned()));
    }
}
