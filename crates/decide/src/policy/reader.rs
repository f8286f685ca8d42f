//! Reads TOML tables field by field and goes on after each mistake, so that one look shows all of them.
//!
//! The fields that a table may have are those that were asked for: there is no list of them to forget. A field that
//! cannot be read counts as not given, and its problem is noted with its place.

use std::{collections::BTreeMap, fmt::Display, ops::Range, str::FromStr};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::pointref::nearest;

/// What was seen while reading.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub problems: Vec<Note>,
    /// Where each field that was given stands, by its path.
    pub places: BTreeMap<String, Range<usize>>,
}

/// A problem at a place of the text.
#[derive(Debug)]
pub(super) struct Note {
    pub place: Range<usize>,
    pub field: String,
    pub message: String,
    pub hint: Option<String>,
}

/// A table that is being read.
pub(super) struct Table<'a, 't> {
    table: &'t DeTable<'t>,
    path: String,
    asked: Vec<&'static str>,
    notes: &'a mut Notes,
}

type Value<'t> = Spanned<DeValue<'t>>;

impl<'a, 't> Table<'a, 't> {
    /// Reads a table by a function that asks for its fields, and notes the fields that it did not ask for.
    pub fn read<T>(
        table: &'t DeTable<'t>,
        path: String,
        notes: &'a mut Notes,
        read: impl FnOnce(&mut Table<'_, 't>) -> T,
    ) -> T {
        let mut reader = Table { table, path, asked: Vec::new(), notes };
        let result = read(&mut reader);
        reader.strangers();
        result
    }

    fn strangers(&mut self) {
        for (key, _) in self.table {
            let name = key.get_ref().as_ref();
            if self.asked.contains(&name) {
                continue;
            }
            let near = nearest(name, self.asked.iter().copied());
            let hint = match near.is_empty() {
                true => format!("known fields: {}", self.asked.join(", ")),
                false => format!("did you mean {}?", near.join(" or ")),
            };
            let inside = if self.path.is_empty() { String::new() } else { format!(" in {}", section(&self.path)) };
            let (field, message) = (self.path_of(name), format!("unknown field {name:?}{inside}"));
            self.notes.problems.push(Note { place: key.span(), field, message, hint: Some(hint) });
        }
    }

    fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn ask(&mut self, key: &'static str) -> Option<(&'t Value<'t>, String)> {
        self.asked.push(key);
        let (path, value) = (self.path_of(key), self.table.get(key)?);
        self.notes.places.insert(path.clone(), value.span());
        Some((value, path))
    }

    fn wrong<T>(&mut self, value: &Value<'_>, field: &str, message: impl Into<String>) -> Option<T> {
        self.notes.problems.push(Note {
            place: value.span(),
            field: field.to_owned(),
            message: message.into(),
            hint: None,
        });
        None
    }

    fn not<T>(&mut self, value: &Value<'_>, field: &str, wanted: &str) -> Option<T> {
        let found = match value.get_ref() {
            DeValue::String(_) => "a text",
            DeValue::Integer(_) => "a number",
            DeValue::Float(_) => "a fraction",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date or time (put it in quotes)",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        let message = format!("{} is {found}; write {wanted}", field.rsplit('.').next().unwrap_or(field));
        self.wrong(value, field, message)
    }

    fn text_of(&mut self, value: &Value<'_>, path: &str, wanted: &str) -> Option<String> {
        match value.get_ref().as_str() {
            Some(text) => Some(text.to_owned()),
            None => self.not(value, path, wanted),
        }
    }

    /// Any text.
    pub fn text(&mut self, key: &'static str) -> Option<String> {
        let (value, path) = self.ask(key)?;
        self.text_of(value, &path, "a text in quotes")
    }

    /// `true` or `false`.
    pub fn boolean(&mut self, key: &'static str) -> Option<bool> {
        let (value, path) = self.ask(key)?;
        value.get_ref().as_bool().or_else(|| self.not(value, &path, "true or false, without quotes"))
    }

    /// A whole number of some type.
    pub fn integer<T: TryFrom<i64>>(&mut self, key: &'static str) -> Option<T> {
        let (value, path) = self.ask(key)?;
        let Some(integer) = value.get_ref().as_integer() else {
            return self.not(value, &path, "a whole number, without quotes");
        };
        let number = i64::from_str_radix(integer.as_str(), integer.radix()).ok();
        match number.and_then(|number| T::try_from(number).ok()) {
            Some(number) => Some(number),
            None => self.wrong(value, &path, format!("{integer} is out of range for {key}")),
        }
    }

    /// A text with a meaning.
    pub fn parsed<T: FromStr<Err: Display>>(&mut self, key: &'static str, example: &str) -> Option<T> {
        let (value, path) = self.ask(key)?;
        self.parse(value, &path, example)
    }

    fn parse<T: FromStr<Err: Display>>(&mut self, value: &Value<'_>, path: &str, example: &str) -> Option<T> {
        let text = self.text_of(value, path, &format!("a text in quotes, such as {example}"))?;
        match text.parse() {
            Ok(parsed) => Some(parsed),
            Err(error) => self.wrong(value, path, error.to_string()),
        }
    }

    /// Notes that a field must be given, unless it was.
    pub fn required(&mut self, key: &'static str, example: &str) {
        if self.table.contains_key(key) {
            return;
        }
        let (place, field) = (self.notes.places.get(&self.path).cloned().unwrap_or_default(), self.path_of(key));
        let message = format!("{} has no {key}", section(&self.path));
        self.notes.problems.push(Note { place, field, message, hint: Some(format!("for example {key} = {example}")) });
    }

    /// A text with a meaning, or a number.
    pub fn number_or_parsed<T: FromStr<Err: Display> + From<u64>>(
        &mut self,
        key: &'static str,
        example: &str,
    ) -> Option<T> {
        let is_number = self.table.get(key).is_some_and(|value| value.get_ref().is_integer());
        match is_number {
            true => self.integer::<u64>(key).map(T::from),
            false => self.parsed(key, example),
        }
    }

    /// One of some words.
    pub fn choice<T: Copy>(&mut self, key: &'static str, choices: &[(&str, T)]) -> Option<T> {
        let (value, path) = self.ask(key)?;
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        let text = self.text_of(value, &path, &format!("one of \"{}\"", words.join("\", \"")))?;
        match choices.iter().find(|(word, _)| *word == text) {
            Some((_, choice)) => Some(*choice),
            None => self.wrong(value, &path, format!("{text:?} is not a {key}; write one of {}", words.join(", "))),
        }
    }

    /// A list of texts with a meaning.
    pub fn list<T: FromStr<Err: Display>>(&mut self, key: &'static str, example: &str) -> Option<Vec<T>> {
        let (value, path) = self.ask(key)?;
        let Some(items) = value.get_ref().as_array() else {
            return self.not(value, &path, &format!("a list, such as [{example}]"));
        };
        let mut parsed = Vec::new();
        for (place, item) in items.iter().enumerate() {
            let path = format!("{path}[{place}]");
            self.notes.places.insert(path.clone(), item.span());
            parsed.extend(self.parse(item, &path, example));
        }
        Some(parsed)
    }

    /// One text, or a list of texts.
    pub fn one_or_more(&mut self, key: &'static str, example: &str) -> Option<Vec<String>> {
        if self.table.get(key).is_some_and(|value| value.get_ref().is_str()) {
            let path = self.path_of(key);
            let text = self.text(key)?;
            let place = self.notes.places.get(&path).cloned().unwrap_or_default();
            self.notes.places.insert(format!("{path}[0]"), place);
            return Some(vec![text]);
        }
        self.list(key, example)
    }

    /// A table inside this one.
    pub fn table<T>(&mut self, key: &'static str, read: impl FnOnce(&mut Table<'_, 't>) -> T) -> Option<T> {
        let (value, path) = self.ask(key)?;
        match value.get_ref().as_table() {
            Some(table) => Some(Table::read(table, path, self.notes, read)),
            None => self.not(value, &path, &format!("a table, such as {} on a line of its own", section(&path))),
        }
    }

    /// A list of tables.
    pub fn tables<T>(&mut self, key: &'static str, mut read: impl FnMut(&mut Table<'_, 't>) -> T) -> Option<Vec<T>> {
        let (value, path) = self.ask(key)?;
        let heading = format!("[{}] on a line of its own before each", section(&path));
        let Some(items) = value.get_ref().as_array() else {
            return self.not(value, &path, &heading);
        };
        let mut found = Vec::new();
        for (place, item) in items.iter().enumerate() {
            let path = format!("{path}[{place}]");
            self.notes.places.insert(path.clone(), item.span());
            match item.get_ref().as_table() {
                Some(table) => found.push(Table::read(table, path, self.notes, &mut read)),
                None => return self.not(item, &path, &heading),
            }
        }
        Some(found)
    }
}

/// How the heading of a table is written: `policy[1].schedule` is `[policy.schedule]`.
fn section(path: &str) -> String {
    let mut name = String::new();
    let mut inside = false;
    for c in path.chars() {
        match c {
            '[' => inside = true,
            ']' => inside = false,
            c if !inside => name.push(c),
            _ => {}
        }
    }
    format!("[{name}]")
}
