//! The report as one HTML page: no script, no request, light or dark as the reader's system is, one column on a phone.

use super::chart::{Axis, Bar, Chart, bars, escape, interval, number};
use super::{Curve, Report};
use crate::roofline::worst_bound_error;
use crate::table;
use moellon_lab::lever::Verdict;
use moellon_lab::roofline::{BatchPoint, CostModel};
use std::fmt::Write as _;

const PAGE: &str = include_str!("page.html");

/// Names of the line colours.
const COLOURS: [&str; 4] = ["main", "second", "third", "fourth"];

/// The page.
pub fn html(report: &Report) -> String {
    let title = format!("{} on {}", report.model.name, report.machine.cpu);
    let body = [
        header(report),
        facts(report),
        "<div class=\"cards\">".to_owned(),
        words(report),
        roofline(report),
        stages(report),
        components(report),
        batches("Sequences at once", "", &report.roofline.cost, &report.roofline.batches),
        speculation(report),
        quality(report),
        report.other_curves.iter().map(other_curve).collect(),
        levers(report),
        receipts(report),
        "</div>".to_owned(),
        footer(report),
    ]
    .concat();
    PAGE.replace("{{title}}", &escape(&title)).replace("{{body}}", &body)
}

fn card(class: &str, title: &str, lead: &str, content: &str) -> String {
    format!("<section class=\"card {class}\"><h2>{}</h2><p>{}</p>{content}</section>", escape(title), escape(lead))
}

fn header(report: &Report) -> String {
    let machine = &report.machine;
    let gpus = if machine.gpus.is_empty() { "no GPU".to_owned() } else { machine.gpus.join(", ") };
    format!(
        "<header><h1>{}</h1><p>{}, {} cores, {} of memory, {gpus} &middot; {} &middot; {}</p></header>",
        escape(&report.model.name),
        escape(&machine.cpu),
        machine.cores,
        table::bytes(machine.memory_bytes as f64),
        escape(&report.model.format),
        report.date
    )
}

fn facts(report: &Report) -> String {
    let r = &report.roofline;
    let facts = [
        (format!("{} tok/s", number(r.achieved_tok_s)), "reached, one sequence".to_owned()),
        (format!("{} tok/s", number(r.ceiling_tok_s)), "what bytes allow".to_owned()),
        (format!("{:.0} %", 100.0 * r.cost.efficiency), "of the measured bandwidth".to_owned()),
        (format!("{:.1} GB/s", r.read_gb_s), "read bandwidth, measured beside".to_owned()),
        (table::bytes(r.cost.bytes(1.0)), "read for each token".to_owned()),
    ];
    let fact =
        |(value, name): &(String, String)| format!("<div class=\"fact\"><b>{value}</b><span>{name}</span></div>");
    format!("<div class=\"facts\">{}</div>", facts.iter().map(fact).collect::<String>())
}

fn list(lines: &[String]) -> String {
    format!("<ul>{}</ul>", lines.iter().map(|line| format!("<li>{}</li>", escape(line))).collect::<String>())
}

fn words(report: &Report) -> String {
    let limits = card("", "What limits", "In words.", &list(&report.limits));
    let advice = card("", "What would pay", "Measured first, then what bytes promise.", &list(&report.advice));
    limits + &advice
}

fn legend(entries: &[(&str, String)]) -> String {
    let entry = |(colour, words): &(&str, String)| {
        format!("<span><i style=\"background:var(--{colour})\"></i>{}</span>", escape(words))
    };
    format!("<div class=\"legend\">{}</div>", entries.iter().map(entry).collect::<String>())
}

/// Numbers that one token multiplies with.
fn active_parameters(cost: &CostModel) -> f64 {
    cost.parts.iter().filter(|p| p.bits_per_weight > 0.0).map(|p| 8.0 * p.bytes_per_token / p.bits_per_weight).sum()
}

fn roofline(report: &Report) -> String {
    let r = &report.roofline;
    let operations = 2.0 * active_parameters(&r.cost);
    let dots: Vec<(usize, f64, f64, f64)> = r
        .batches
        .iter()
        .map(|b| {
            let bytes = b.bandwidth_share * r.read_gb_s * b.measured_ms * 1e6;
            let done = operations * b.batch as f64;
            (b.batch, done / bytes, done / b.measured_ms / 1e6, b.bandwidth_share)
        })
        .collect();
    let compute = r.bench.prefill.iter().map(|p| operations * p.tok_s / 1e9).fold(0.0, f64::max);
    let intensities = dots.iter().map(|d| d.1);
    let (first, last) = intensities.fold((f64::INFINITY, 0.0f64), |(low, high), x| (low.min(x), high.max(x)));
    let (first, last) = (first / 2.0, last * 3.0);
    let roof = |x: f64| r.read_gb_s * x;
    let highest = compute.max(dots.iter().map(|d| d.2).fold(0.0, f64::max)) * 1.3;
    let x = Axis::log("operations for each byte that is read", 2.0, [first, last].into_iter());
    let lowest = dots.iter().map(|d| d.2).fold(f64::INFINITY, f64::min) / 2.0;
    let y = Axis::log("10⁹ operations a second", 2.0, [lowest, highest].into_iter());
    let (left, top) = (x.range[0].max(y.range[0] / r.read_gb_s), y.range[1]);
    let knee = (top / r.read_gb_s).min(x.range[1]);
    let right = x.range[1];
    let mut chart = Chart::new(x, y, "Roofline: steps by batch size under the slope of the memory's bandwidth");
    chart.line(&[(left, roof(left)), (knee, roof(knee))], "main");
    if compute > 0.0 {
        chart.line(&[(left, compute), (right, compute)], "soft");
        chart.words(left, compute, (4.0, -5.0), "start", "what prompts reach");
    }
    for (batch, x, y, share) in &dots {
        let title = format!("batch {batch}: {:.0} % of the bandwidth, {y:.1} G operations a second", 100.0 * share);
        chart.dot(*x, *y, "second", &title).words(*x, *y, (8.0, 12.0), "start", &format!("{batch}"));
    }
    let lead =
        "Dots are decode steps by batch size. On the slope, memory decides; how far below it is what the engine loses.";
    card(
        "",
        "Roofline",
        lead,
        &(chart.svg()
            + &legend(&[
                ("main", format!("{:.1} GB/s read", r.read_gb_s)),
                (
                    "second",
                    format!(
                        "steps of {} sequences",
                        dots.iter().map(|d| d.0.to_string()).collect::<Vec<_>>().join(", ")
                    ),
                ),
            ])),
    )
}

fn stages(report: &Report) -> String {
    let r = &report.roofline;
    let Some(one) = r.bench.results.iter().find(|result| result.batch == 1) else { return String::new() };
    let total: f64 = one.stages.iter().map(|s| s.microseconds).sum();
    let bar = |s: &moellon_lab::bench::StageResult| Bar {
        name: s.stage.clone(),
        length: s.microseconds,
        filled: s.bytes as f64 / r.read_gb_s / 1e3,
        words: format!("{} µs, {:.0} %", number(s.microseconds), 100.0 * s.microseconds / total),
    };
    let chart = bars(&one.stages.iter().map(bar).collect::<Vec<_>>(), "Time of each stage of a step");
    let lead = "One sequence. The filled part is the time that the stage's bytes need at full bandwidth. Each operation was waited for, so the sum is more than a step.";
    let names = [("main", "its bytes".to_owned()), ("rest", "everything else".to_owned())];
    card("", "Where a step's time goes", lead, &(chart + &legend(&names)))
}

fn components(report: &Report) -> String {
    let cost = &report.roofline.cost;
    let total = cost.bytes(1.0);
    let mut parts: Vec<Bar> = cost
        .parts
        .iter()
        .map(|p| Bar {
            name: p.component.replace('_', " "),
            length: p.bytes_per_token,
            filled: p.bytes_per_token,
            words: format!("{}, {:.0} %", table::bytes(p.bytes_per_token), 100.0 * p.bytes_per_token / total),
        })
        .collect();
    parts.push(Bar {
        name: format!("cache at {}", report.roofline.context),
        length: cost.cache_bytes,
        filled: cost.cache_bytes,
        words: format!("{}, {:.0} %", table::bytes(cost.cache_bytes), 100.0 * cost.cache_bytes / total),
    });
    let lead = format!("{} in all; formats: {}.", table::bytes(total), report.model.format);
    card("", "What a token reads", &lead, &bars(&parts, "Bytes of a token by component"))
}

fn other_curve(curve: &Curve) -> String {
    let [receipt, hash] = &curve.receipt;
    let lead = format!("{}; receipt {receipt} ({hash}). ", curve.model.format);
    batches(&format!("Sequences at once: {}", curve.model.name), &lead, &curve.cost, &curve.batches)
}

fn batches(title: &str, lead: &str, cost: &CostModel, points: &[BatchPoint]) -> String {
    let measured: Vec<(f64, f64)> =
        points.iter().map(|b| (b.batch as f64, 1e3 * b.batch as f64 / b.measured_ms)).collect();
    let most = measured.iter().map(|m| m.0).fold(1.0, f64::max);
    let steps = (0..=40).map(|i| most.powf(f64::from(i) / 40.0));
    // Each point was measured under its own bandwidth; the curve is drawn for that of batch 1.
    let predicted: Vec<(f64, f64)> = steps.map(|b| (b, b / cost.seconds(b))).collect();
    let x = Axis::log("sequences", 2.0, [1.0, most.max(2.0)].into_iter());
    let y = Axis::linear("tokens a second, all together", 0.0, measured.iter().chain(&predicted).map(|m| m.1));
    let mut chart = Chart::new(x, y, "Tokens a second by batch size, measured and predicted");
    chart.line(&predicted, "main");
    for (point, (x, y)) in points.iter().zip(&measured) {
        let bound = if point.bandwidth_bound { "bandwidth decides" } else { "bandwidth does not decide" };
        let title = format!("{}: {:.0} tok/s, predicted {:+.0} %, {bound}", point.batch, y, 100.0 * point.error);
        chart.dot(*x, *y, if point.bandwidth_bound { "second" } else { "third" }, &title);
    }
    let said = match worst_bound_error(points) {
        Some(error) => format!("Where bandwidth decides, prediction and measurement agree within {:.0} %.", (100.0 * error).ceil()),
        None if points.len() == 1 => String::new(),
        None => "Bandwidth decides nowhere here, so bytes do not predict these steps: the model is small, or something else is slow.".to_owned(),
    };
    let mut names = vec![("main", "by bytes: the union of experts, fitted at 1".to_owned())];
    for (colour, bound, words) in
        [("second", true, "measured, bandwidth decides"), ("third", false, "measured, something else decides")]
    {
        if points.iter().any(|b| b.bandwidth_bound == bound) {
            names.push((colour, words.to_owned()));
        }
    }
    card("", title, &format!("{lead}{said}"), &(chart.svg() + &legend(&names)))
}

fn speculation(report: &Report) -> String {
    let gains = report.speculation.iter().flat_map(|(_, points)| points.iter().map(|p| p.1));
    let measured = report.speculation_measured.iter().map(|m| m.2);
    let x = Axis::linear("share of drafts that are right", 0.0, [1.0].into_iter());
    let y = Axis::linear("times as fast", 0.0, gains.chain(measured));
    let mut chart = Chart::new(x, y, "Gain of speculation against acceptance");
    chart.line(&[(0.0, 1.0), (1.0, 1.0)], "soft");
    for ((_, points), colour) in report.speculation.iter().zip(COLOURS) {
        chart.line(points, colour);
    }
    for (name, accepted, factor) in &report.speculation_measured {
        let title = format!("{name}: {:.0} % right, {factor:.2} times as fast", 100.0 * accepted);
        chart.dot(*accepted, *factor, "ink", &title).words(*accepted, *factor, (-8.0, 4.0), "end", name);
    }
    let mut names: Vec<(&str, String)> = report
        .speculation
        .iter()
        .zip(COLOURS)
        .map(|((drafts, _), colour)| (colour, format!("{drafts} draft{} a step", if *drafts == 1 { "" } else { "s" })))
        .collect();
    if !report.speculation_measured.is_empty() {
        names.push(("ink", "measured by levers".to_owned()));
    }
    let lead = "Predicted by bytes: a verified step reads the union of its tokens' experts (26 % in common between neighbours). Below 1 drafting loses.";
    card("", "What drafts bring", lead, &(chart.svg() + &legend(&names)))
}

fn quality(report: &Report) -> String {
    let points: Vec<_> = report.quality.iter().filter(|p| p.kl > 0.0).collect();
    if points.is_empty() {
        return card("", "Quality against bits", "No receipt says yet: moellon lever run weight-format.", "");
    }
    let low = points.iter().map(|p| p.bits_per_weight).fold(f64::INFINITY, f64::min).floor();
    let x = Axis::linear("bits a weight", low, points.iter().map(|p| p.bits_per_weight));
    let y = Axis::log("KL divergence, nats", 10.0, points.iter().map(|p| p.kl));
    let mut chart = Chart::new(x, y, "KL divergence by bits a weight");
    let mut methods: Vec<&str> = Vec::new();
    for point in &points {
        if !methods.contains(&point.method.as_str()) {
            methods.push(&point.method);
        }
    }
    let colour = |method: &str| COLOURS[methods.iter().position(|m| *m == method).unwrap_or(0) % COLOURS.len()];
    for point in &points {
        let title =
            format!("{} ({}): {:.2} bits, KL {:.4}", point.label, point.method, point.bits_per_weight, point.kl);
        chart.dot(point.bits_per_weight, point.kl, colour(&point.method), &title);
    }
    let names: Vec<(&str, String)> = methods.iter().map(|m| (colour(m), (*m).to_owned())).collect();
    let lead = "Distance of the predictions from the original's, lower is better; one dot a format or plan.";
    card("", "Quality against bits", lead, &(chart.svg() + &legend(&names)))
}

fn levers(report: &Report) -> String {
    if report.levers.is_empty() {
        return card("wide", "Levers", "None was tested on this machine and model yet: moellon lever all.", "");
    }
    let mut rows = String::new();
    for (tested, hash) in &report.levers {
        for point in &tested.points {
            let class = match point.verdict {
                Verdict::Keep => "keep",
                Verdict::Drop => "drop",
                Verdict::Undecided => "undecided",
                Verdict::NotApplicable => "none",
            };
            let speedup = point.measured.as_ref().and_then(|m| m.speedup);
            let (picture, factor) = match speedup {
                Some(s) => (
                    interval(s.low, s.mean, s.high, class),
                    format!("{:.2}x <span class=\"soft\">{:.2} to {:.2}</span>", s.mean, s.low, s.high),
                ),
                None => (String::new(), String::new()),
            };
            let predictions = match (point.quality, &point.measured) {
                (Some([_, b]), _) => format!("KL {:.4}, {:.1} % the same", b.kl, 100.0 * b.top1),
                (None, Some(m)) if m.same_output => "same output".to_owned(),
                (None, _) => String::new(),
            };
            let _ = write!(
                rows,
                "<tr><td class=\"what\">{}<br><span class=\"soft\">{}</span></td><td><span class=\"badge {class}\">{}</span></td>\
                 <td class=\"full\">{picture}</td><td class=\"full\">{factor}</td><td class=\"full\">{}</td><td class=\"full\">{predictions}</td>\
                 <td class=\"full soft\">{}</td><td class=\"full\" data-l=\"receipt\"><code>{}</code></td></tr>",
                escape(&tested.lever.name),
                escape(&format!("{} against {}", point.arms[1], point.arms[0])),
                point.verdict.name(),
                // A factor stands beside its interval already.
                if tested.lever.unit == "x" { String::new() } else { escape(&point.in_unit) },
                escape(&point.reason),
                escape(hash)
            );
        }
    }
    let content = format!(
        "<div class=\"scroll\"><table class=\"levers\"><thead><tr><th>lever</th><th>verdict</th><th></th><th>times as fast</th>\
         <th>in its unit</th><th>predictions</th><th>why</th><th>receipt</th></tr></thead><tbody>{rows}</tbody></table></div>"
    );
    let lead = "Each was switched on and off in turn on this machine until the difference was sure. The interval is for all looks together; the dashed mark is no difference.";
    card("wide", "Levers", lead, &content)
}

fn receipts(report: &Report) -> String {
    let row = |[name, kind, hash]: &[String; 3]| {
        format!(
            "<tr><td>{}</td><td class=\"soft\">{}</td><td><code>{}</code></td></tr>",
            escape(name),
            escape(kind),
            escape(hash)
        )
    };
    let rows: String = report.receipts.iter().map(row).collect();
    let content = format!(
        "<div class=\"scroll\"><table><thead><tr><th>receipt</th><th>kind</th><th>SHA-256 of the content</th></tr></thead><tbody>{rows}</tbody></table></div>"
    );
    let content = if report.unread_receipts.is_empty() {
        content
    } else {
        format!(
            "{content}<p class=\"soft\">Files beside them that are no receipts:</p>{}",
            list(&report.unread_receipts)
        )
    };
    card("wide", "Receipts", "What all this rests on; moellon receipt verify checks the hashes.", &content)
}

fn footer(report: &Report) -> String {
    let from = match &report.roofline_receipt {
        Some([name, hash]) => format!("roofline of receipt {} (<code>{}</code>)", escape(name), escape(hash)),
        None => "roofline measured for this page".to_owned(),
    };
    format!("<footer>Moellon {} &middot; {from} &middot; {}</footer>", escape(&report.version), report.date)
}
