//! Plots as SVG. Each is as wide as a phone, so that its text has one size everywhere: wide screens show several in a row.
//!
//! Colours are classes (`tool-ptrace`), so that the page's style sheet has them for light and for dark.

use super::number;

pub const WIDTH: f64 = 360.0;

pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A bar: the median, the interval of it, and the spread of the samples.
pub struct Bar {
    pub tool: String,
    pub median: f64,
    pub low: f64,
    pub high: f64,
    pub min: f64,
    pub max: f64,
}

/// Bars side by side; a line through each is its interval, a thin one its spread.
pub fn bars(title: &str, unit: &str, bars: &[Bar]) -> String {
    let (left, right, row, top) = (82.0, 62.0, 26.0, 6.0);
    let height = top + bars.len() as f64 * row + 22.0;
    // One bar's outlier, or the interval of few samples, is not to flatten the others: lines end at the edge.
    let longest = bars.iter().map(|bar| bar.median).fold(0.0, f64::max);
    let widest = bars.iter().map(|bar| bar.high).fold(0.0, f64::max).clamp(longest * 1.15, longest * 2.0);
    let end = nice_above(widest);
    let x = |value: f64| left + (value.clamp(0.0, end) / end) * (WIDTH - left - right);
    let mut body = String::new();
    for tick in 0..=2 {
        let value = end * f64::from(tick) / 2.0;
        body += &line("grid", x(value), top, x(value), height - 18.0);
        body += &text("tick", x(value), height - 5.0, "middle", &format!("{} {unit}", number(value)));
    }
    for (at, bar) in bars.iter().enumerate() {
        let y = top + at as f64 * row;
        let (class, middle) = (format!("tool-{}", bar.tool), y + row / 2.0);
        let told = format!(
            "{}: median {} {unit}, 95 % interval {} to {}, from {} to {}",
            bar.tool,
            number(bar.median),
            number(bar.low),
            number(bar.high),
            number(bar.min),
            number(bar.max)
        );
        body += &format!("<g><title>{}</title>", escape(&told));
        body += &text("label", left - 6.0, middle + 4.0, "end", &bar.tool);
        let width = (x(bar.median) - left).max(1.0);
        body += &format!(
            r#"<rect class="mark {class}" x="{left}" y="{:.1}" width="{width:.1}" height="14"/>"#,
            middle - 7.0
        );
        body += &line("spread", x(bar.min), middle, x(bar.max), middle);
        body += &line("interval", x(bar.low), middle, x(bar.high), middle);
        for at in [bar.low, bar.high] {
            body += &line("interval", x(at), middle - 4.0, x(at), middle + 4.0);
        }
        let value = format!("{} {unit}", number(bar.median));
        body += &text("value", WIDTH - 2.0, middle + 4.0, "end", &value);
        body += "</g>";
    }
    figure(title, height, &body)
}

/// One of several lines in a plot.
pub struct Line {
    pub tool: String,
    pub points: Vec<(f64, f64)>,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Scale {
    Linear,
    Logarithmic,
}

/// An axis: its scale, and the text of a value on it.
pub struct Axis<'a> {
    pub name: &'a str,
    pub scale: Scale,
    pub text: &'a dyn Fn(f64) -> String,
}

/// Lines over an axis, with their legend.
pub fn lines(title: &str, horizontal: &Axis<'_>, vertical: &Axis<'_>, lines: &[Line]) -> String {
    let legend = ((lines.len() as f64 + 2.0) / 3.0).floor() * 18.0;
    let (left, right, top, plot) = (58.0, 14.0, 20.0 + legend, 190.0);
    let height = top + plot + 40.0;
    let all = || lines.iter().flat_map(|line| line.points.iter());
    let x_range = Range::of(all().map(|point| point.0), horizontal.scale);
    let y_range = Range::of(all().map(|point| point.1), vertical.scale);
    let x = |value: f64| left + x_range.share(value) * (WIDTH - left - right);
    let y = |value: f64| top + plot - y_range.share(value) * plot;
    let mut body = String::new();
    for value in y_range.ticks() {
        body += &line("grid", left, y(value), WIDTH - right, y(value));
        body += &text("tick", left - 5.0, y(value) + 4.0, "end", &(vertical.text)(value));
    }
    for value in x_range.ticks() {
        body += &line("grid", x(value), top, x(value), top + plot);
        body += &text("tick", x(value), top + plot + 15.0, "middle", &(horizontal.text)(value));
    }
    body += &text("tick", (left + WIDTH - right) / 2.0, height - 6.0, "middle", horizontal.name);
    body += &text("tick", 4.0, top - 8.0, "start", vertical.name);
    for (at, one) in lines.iter().enumerate() {
        let class = format!("tool-{}", one.tool);
        let points: Vec<String> = one.points.iter().map(|(a, b)| format!("{:.1},{:.1}", x(*a), y(*b))).collect();
        body += &format!("<g><title>{}</title>", escape(&one.tool));
        body += &format!(r#"<polyline class="mark line {class}" points="{}"/>"#, points.join(" "));
        for (a, b) in &one.points {
            body += &format!(r#"<circle class="{class}" cx="{:.1}" cy="{:.1}" r="3"/>"#, x(*a), y(*b));
        }
        let (column, row) = ((at % 3) as f64, (at / 3) as f64);
        let (from, base) = (8.0 + column * 116.0, 12.0 + row * 18.0);
        body += &format!(r#"<rect class="{class}" x="{from:.1}" y="{:.1}" width="10" height="10"/>"#, base - 9.0);
        body += &text("label", from + 14.0, base, "start", &one.tool);
        body += "</g>";
    }
    figure(title, height, &body)
}

fn figure(title: &str, height: f64, body: &str) -> String {
    let title = escape(title);
    format!(
        "<figure class=\"plot\"><figcaption>{title}</figcaption>\
         <svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{title}\">{body}</svg></figure>\n"
    )
}

fn line(class: &str, x1: f64, y1: f64, x2: f64, y2: f64) -> String {
    format!(r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#)
}

fn text(class: &str, x: f64, y: f64, anchor: &str, text: &str) -> String {
    format!(r#"<text class="{class}" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#, escape(text))
}

/// The next of 1, 2, 5, 10, ...
fn nice_above(value: f64) -> f64 {
    if value <= 0.0 || !value.is_finite() {
        return 1.0;
    }
    let power = 10_f64.powf(value.log10().floor());
    [1.0, 2.0, 3.0, 4.0, 5.0, 8.0, 10.0].into_iter().map(|step| step * power).find(|end| *end >= value).unwrap_or(value)
}

struct Range {
    low: f64,
    high: f64,
    scale: Scale,
}

impl Range {
    fn of(values: impl Iterator<Item = f64> + Clone, scale: Scale) -> Range {
        let high = values.clone().fold(f64::MIN_POSITIVE, f64::max);
        match scale {
            Scale::Linear => Range { low: 0.0, high: nice_above(high), scale },
            Scale::Logarithmic => {
                let low = values.filter(|value| *value > 0.0).fold(high, f64::min);
                // A little room at both ends; and never nothing in between.
                Range { low: low / 1.2, high: high.max(low * 1.5) * 1.2, scale }
            }
        }
    }

    fn share(&self, value: f64) -> f64 {
        let share = match self.scale {
            Scale::Linear => value / self.high,
            Scale::Logarithmic => (value.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
        };
        share.clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<f64> {
        if self.scale == Scale::Linear {
            return (0..=4).map(|tick| self.high * f64::from(tick) / 4.0).collect();
        }
        // Powers of ten, with the halves and fifths of them where there are few.
        let from = self.low.log10().floor() as i32;
        let ticks = |steps: &[f64]| -> Vec<f64> {
            let to = self.high.log10().ceil() as i32;
            let all = (from..=to).flat_map(|power| steps.iter().map(move |step| step * 10_f64.powi(power)));
            all.filter(|tick| (self.low..=self.high).contains(tick)).collect()
        };
        let few = ticks(&[1.0]);
        if few.len() < 3 { ticks(&[1.0, 2.0, 5.0]) } else { few }
    }
}
