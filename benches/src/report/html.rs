//! x
use crate::record::Record;
pub fn page(_record: &Record) -> String { String::new() }
