//! What was found, for people: in the terminal, and as one HTML file.

pub mod html;
mod svg;
pub mod terminal;

/// With as many digits as matter.
pub fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if size < 10.0 => format!("{value:.2}"),
        size if size < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}
