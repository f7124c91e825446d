//! Charts as inline SVG: axes, lines, dots, bars. Colours are the page's own (CSS variables), so that a chart is light or dark
//! with it; sizes are those of a phone, and larger screens scale them up.

use std::fmt::Write as _;

/// Width of every chart in its own units.
pub const WIDTH: f64 = 400.0;

/// Text as HTML and SVG want it.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// One axis.
#[derive(Debug, Clone)]
pub struct Axis {
    /// What it shows, with its unit.
    pub title: String,
    /// First and last value.
    pub range: [f64; 2],
    /// Whether equal steps are equal factors.
    pub log: bool,
    /// Where marks are, and what stands there.
    pub ticks: Vec<(f64, String)>,
}

impl Axis {
    /// From 0 (or the least value) to the largest of `values`, rounded up, with about four marks.
    pub fn linear(title: &str, low: f64, values: impl Iterator<Item = f64>) -> Self {
        let high = values.fold(low + 1e-9, f64::max);
        let rough = (high - low) / 4.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|s| s * power).find(|s| *s >= rough).unwrap_or(rough);
        let count = ((high - low) / step).ceil().max(1.0);
        let ticks = (0..=count as usize).map(|i| low + i as f64 * step).map(|x| (x, number(x))).collect();
        Axis { title: title.to_owned(), range: [low, low + count * step], log: false, ticks }
    }

    /// Over all of `values` (positive), by factors, with a mark at every power of `base`.
    pub fn log(title: &str, base: f64, values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = values.fold((f64::INFINITY, 0.0f64), |(low, high), x| (low.min(x), high.max(x)));
        let first = (low.ln() / base.ln() + 1e-9).floor();
        let last = (high.ln() / base.ln() - 1e-9).ceil().max(first + 1.0);
        let ticks =
            (0..=(last - first) as usize).map(|i| base.powf(first + i as f64)).map(|x| (x, number(x))).collect();
        Axis { title: title.to_owned(), range: [base.powf(first), base.powf(last)], log: true, ticks }
    }

    fn place(&self, value: f64) -> f64 {
        let scale = |x: f64| if self.log { x.max(1e-300).ln() } else { x };
        let [low, high] = self.range.map(scale);
        ((scale(value) - low) / (high - low)).clamp(-0.02, 1.02)
    }
}

/// A number for an axis: no more digits than it needs.
pub fn number(x: f64) -> String {
    match x.abs() {
        a if a >= 1e6 => format!("{}M", trim(x / 1e6, 1)),
        a if a >= 1e4 => format!("{}k", trim(x / 1e3, 1)),
        a if a >= 100.0 => trim(x, 0),
        a if a >= 1.0 || a == 0.0 => trim(x, 1),
        a if a >= 0.01 => trim(x, 3),
        _ => format!("{x:.0e}"),
    }
}

fn trim(x: f64, digits: usize) -> String {
    let text = format!("{x:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A chart with two axes.
pub struct Chart {
    x: Axis,
    y: Axis,
    height: f64,
    marks: String,
    label: String,
}

const LEFT: f64 = 54.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 40.0;

impl Chart {
    /// An empty one; `label` says for readers who cannot see it what it shows.
    pub fn new(x: Axis, y: Axis, label: &str) -> Self {
        Chart { x, y, height: 270.0, marks: String::new(), label: escape(label) }
    }

    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        let (width, height) = (WIDTH - LEFT - RIGHT, self.height - TOP - BOTTOM);
        (LEFT + width * self.x.place(x), TOP + height * (1.0 - self.y.place(y)))
    }

    /// A line through points, in the colour of `class`.
    pub fn line(&mut self, points: &[(f64, f64)], class: &str) -> &mut Self {
        let path: Vec<String> = points
            .iter()
            .map(|(x, y)| self.at(*x, *y))
            .enumerate()
            .map(|(i, (x, y))| format!("{}{x:.1} {y:.1}", if i == 0 { 'M' } else { 'L' }))
            .collect();
        let _ = write!(self.marks, "<path class=\"line {class}\" d=\"{}\"/>", path.join(" "));
        self
    }

    /// A dot with a title that appears under the pointer.
    pub fn dot(&mut self, x: f64, y: f64, class: &str, title: &str) -> &mut Self {
        let (px, py) = self.at(x, y);
        let title = escape(title);
        let _ = write!(
            self.marks,
            "<circle class=\"dot {class}\" cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"5\"><title>{title}</title></circle>"
        );
        self
    }

    /// Words beside a point.
    pub fn words(&mut self, x: f64, y: f64, offset: (f64, f64), anchor: &str, words: &str) -> &mut Self {
        let (px, py) = self.at(x, y);
        let (px, py) = (px + offset.0, (py + offset.1).max(TOP + 8.0));
        let words = escape(words);
        let _ = write!(
            self.marks,
            "<text class=\"note\" x=\"{px:.1}\" y=\"{py:.1}\" text-anchor=\"{anchor}\">{words}</text>"
        );
        self
    }

    /// The SVG element.
    pub fn svg(&self) -> String {
        let (right, bottom) = (WIDTH - RIGHT, self.height - BOTTOM);
        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{}\"><g class=\"grid\">",
            self.height, self.label
        );
        for (value, _) in &self.x.ticks {
            let (x, _) = self.at(*value, self.y.range[0]);
            let _ = write!(svg, "<path d=\"M{x:.1} {TOP}V{bottom}\"/>");
        }
        for (value, _) in &self.y.ticks {
            let (_, y) = self.at(self.x.range[0], *value);
            let _ = write!(svg, "<path d=\"M{LEFT} {y:.1}H{right}\"/>");
        }
        svg.push_str("</g><g class=\"axis\">");
        for (value, text) in &self.x.ticks {
            let (x, _) = self.at(*value, self.y.range[0]);
            let _ = write!(svg, "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>", bottom + 15.0);
        }
        for (value, text) in &self.y.ticks {
            let (_, y) = self.at(self.x.range[0], *value);
            let _ = write!(svg, "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>", LEFT - 6.0, y + 4.0);
        }
        let middle = 0.5 * (LEFT + right);
        let _ = write!(
            svg,
            "<text class=\"title\" x=\"{middle}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text class=\"title\" transform=\"translate(11 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text></g>{}</svg>",
            self.height - 5.0,
            escape(&self.x.title),
            0.5 * (TOP + bottom),
            escape(&self.y.title),
            self.marks
        );
        svg
    }
}

/// One horizontal bar: a name, a length, the part of it that is filled, words behind it.
pub struct Bar {
    pub name: String,
    pub length: f64,
    pub filled: f64,
    pub words: String,
}

/// Bars under each other, the longest as wide as the chart.
pub fn bars(bars: &[Bar], label: &str) -> String {
    const ROW: f64 = 26.0;
    const NAMES: f64 = 108.0;
    const WORDS: f64 = 92.0;
    let longest = bars.iter().map(|b| b.length).fold(1e-12, f64::max);
    let room = WIDTH - NAMES - WORDS;
    let height = ROW * bars.len() as f64 + 4.0;
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">", escape(label));
    for (i, bar) in bars.iter().enumerate() {
        let y = ROW * i as f64 + 4.0;
        let (length, filled) = (room * bar.length / longest, room * bar.filled.min(bar.length) / longest);
        let _ = write!(
            svg,
            "<text class=\"name\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect class=\"bar rest\" x=\"{NAMES}\" y=\"{y}\" width=\"{:.1}\" height=\"18\" rx=\"3\"/>\
             <rect class=\"bar main\" x=\"{NAMES}\" y=\"{y}\" width=\"{filled:.1}\" height=\"18\" rx=\"3\"/>\
             <text class=\"note\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            NAMES - 8.0,
            y + 13.0,
            escape(&bar.name),
            length.max(1.5),
            NAMES + length.max(1.5) + 6.0,
            y + 13.0,
            escape(&bar.words)
        );
    }
    svg.push_str("</svg>");
    svg
}

/// An interval of a factor around 1, from a third to three times: the lever's effect at a glance.
pub fn interval(low: f64, middle: f64, high: f64, class: &str) -> String {
    const HALF: f64 = 60.0;
    let place = |x: f64| HALF + HALF * (x.max(1e-9).ln() / 3f64.ln()).clamp(-1.0, 1.0) * 0.94;
    let (low, middle, high) = (place(low), place(middle), place(high));
    format!(
        "<svg class=\"interval\" viewBox=\"0 0 120 16\" aria-hidden=\"true\"><path class=\"one\" d=\"M60 1V15\"/>\
         <path class=\"span {class}\" d=\"M{low:.1} 8H{:.1}\"/><circle class=\"dot {class}\" cx=\"{middle:.1}\" cy=\"8\" r=\"4\"/></svg>",
        high.max(low + 0.5)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_marks() {
        let ticks = |axis: &Axis| axis.ticks.iter().map(|(_, text)| text.clone()).collect::<Vec<_>>();
        assert_eq!(ticks(&Axis::linear("t", 0.0, [37.0].into_iter())), ["0", "10", "20", "30", "40"]);
        assert_eq!(ticks(&Axis::log("t", 2.0, [1.0, 8.0].into_iter())), ["1", "2", "4", "8"]);
        let axis = Axis::log("t", 10.0, [0.02, 3.0].into_iter());
        assert_eq!(ticks(&axis), ["0.01", "0.1", "1", "10"]);
        assert!((axis.place(0.1) - 1.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn text_is_escaped_and_numbers_are_finite() {
        let axis = || Axis::linear("a <b>", 0.0, [1.0].into_iter());
        let mut chart = Chart::new(axis(), axis(), "x \"y\"");
        chart.line(&[(0.0, 0.0), (1.0, 1.0)], "main").dot(0.5, 0.5, "main", "<&>").words(
            0.5,
            0.5,
            (4.0, 0.0),
            "start",
            "a<b",
        );
        let svg = chart.svg();
        assert!(svg.contains("a &lt;b&gt;") && svg.contains("&lt;&amp;&gt;") && svg.contains("x &quot;y&quot;"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        assert!(!interval(0.0, 1.0, f64::INFINITY, "good").contains("NaN"));
        assert!(
            !bars(&[Bar { name: "a".to_owned(), length: 0.0, filled: 0.0, words: String::new() }], "b").contains("NaN")
        );
    }
}
