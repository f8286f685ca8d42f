//! Results for people: aligned tables, ages, durations, percentages. Pure: text in, text out.
//!
//! The same columns are printed to a terminal and to a pipe; a terminal gets a bold heading, a pipe nothing that has to
//! be stripped. Scripts should read `--json` instead.

use jiff::{Timestamp, tz::TimeZone};
use virtward_decide::pointref;

/// How a column is aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table whose columns are as wide as their widest cell.
#[derive(Clone, Debug)]
pub struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table; a heading that begins with `>` is a column of numbers.
    pub fn new(headings: &[&'static str]) -> Self {
        let column = |heading: &&'static str| match heading.strip_prefix('>') {
            Some(name) => (name, Align::Right),
            None => (*heading, Align::Left),
        };
        Self { columns: headings.iter().map(column).collect(), rows: Vec::new() }
    }

    /// Appends a row; missing cells are empty.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into_iter().map(|cell| printable(&cell)).collect());
    }

    /// The table as text, one line per row after the heading.
    pub fn render(&self, bold_heading: bool) -> String {
        let cell = |row: &Vec<String>, at: usize| row.get(at).cloned().unwrap_or_default();
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|at| {
                let body = self.rows.iter().map(|row| cell(row, at).chars().count()).max().unwrap_or(0);
                body.max(self.columns[at].0.chars().count())
            })
            .collect();
        let line = |cells: Vec<String>| {
            let padded = cells.iter().zip(&widths).zip(&self.columns).map(|((cell, width), (_, align))| {
                let padding = " ".repeat(width - cell.chars().count());
                match align {
                    Align::Left => format!("{cell}{padding}"),
                    Align::Right => format!("{padding}{cell}"),
                }
            });
            padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        let heading = line(self.columns.iter().map(|(name, _)| (*name).to_owned()).collect());
        let mut text = if bold_heading { format!("\x1b[1m{heading}\x1b[0m\n") } else { format!("{heading}\n") };
        for row in &self.rows {
            text.push_str(&line((0..self.columns.len()).map(|at| cell(row, at)).collect()));
            text.push('\n');
        }
        text
    }
}

/// `name: value` lines, values aligned.
pub fn fields(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0) + 1;
    pairs.iter().map(|(name, value)| format!("{:<width$} {}\n", format!("{name}:"), printable(value))).collect()
}

/// Names come from guests, files and other tools; control characters must not reach a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The same for a text of several lines.
pub fn printable_lines(text: &str) -> String {
    text.lines().map(|line| printable(line) + "\n").collect()
}

/// How long ago something was: `just now`, `5 min ago`, `3 h ago`, `12 d ago`; `in the future` for clocks that differ.
pub fn age(then: Timestamp, now: Timestamp) -> String {
    let seconds = now.as_second() - then.as_second();
    match seconds {
        i64::MIN..-60 => "in the future".into(),
        -60..60 => "just now".into(),
        60..3_600 => format!("{} min ago", seconds / 60),
        3_600..172_800 => format!("{} h ago", seconds / 3_600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

/// `340 ms`, `12.3 s`, `4 min 05 s`, `2 h 03 min`.
pub fn duration_ms(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", ms as f64 / 1_000.0),
        60_000..3_600_000 => format!("{} min {:02} s", ms / 60_000, ms / 1_000 % 60),
        _ => format!("{} h {:02} min", ms / 3_600_000, ms / 60_000 % 60),
    }
}

/// A time in the local zone, to the second: what can be typed back after an `@`.
pub fn local_time(time: Timestamp) -> String {
    time.to_zoned(TimeZone::system()).strftime("%Y-%m-%dT%H:%M:%S").to_string()
}

/// A time in the local zone with its offset.
pub fn exact_time(time: Timestamp) -> String {
    pointref::show_time(time, &TimeZone::system())
}

/// A serialised enum's own word for a value: what `--json` calls it.
pub fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => "?".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_tail() {
        let mut table = Table::new(&["VM", ">READ", "KIND"]);
        table.row(["web1".into(), "1.3 GiB".into(), "full".into()]);
        table.row(["database".into(), "16 B".into(), String::new()]);
        assert_eq!(
            table.render(false),
            "VM           READ  KIND\n\
             web1      1.3 GiB  full\n\
             database     16 B\n"
        );
        assert!(table.render(true).starts_with("\x1b[1mVM           READ  KIND\x1b[0m\n"));
    }

    #[test]
    fn names_cannot_steer_the_terminal() {
        let mut table = Table::new(&["VM"]);
        table.row(["a\x1b[2Jb\nc".into()]);
        assert_eq!(table.render(false), "VM\na\u{fffd}[2Jb\u{fffd}c\n");
        assert_eq!(fields(&[("vm", "a\tb".into())]), "vm: a\u{fffd}b\n");
    }

    #[test]
    fn fields_line_up() {
        assert_eq!(fields(&[("id", "4f".into()), ("host", "h1".into())]), "id:   4f\nhost: h1\n");
    }

    #[test]
    fn ages_and_durations_read_well() {
        let now: Timestamp = "2026-11-23T12:00:00Z".parse().unwrap();
        for (then, text) in [
            ("2026-11-23T12:00:30Z", "just now"),
            ("2026-11-23T13:00:00Z", "in the future"),
            ("2026-11-23T11:55:00Z", "5 min ago"),
            ("2026-11-22T12:00:00Z", "24 h ago"),
            ("2026-11-11T12:00:00Z", "12 d ago"),
        ] {
            assert_eq!(age(then.parse().unwrap(), now), text);
        }
        for (ms, text) in
            [(340, "340 ms"), (12_340, "12.3 s"), (245_000, "4 min 05 s"), (7_380_000, "2 h 03 min"), (0, "0 ms")]
        {
            assert_eq!(duration_ms(ms), text);
        }
    }
}
