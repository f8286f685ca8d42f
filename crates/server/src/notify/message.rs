//! What a message says: as JSON for programs, as text for people.

use std::{collections::BTreeMap, fmt::Write};

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;
use virtward_api::{Event, Severity};
use virtward_decide::notify::Batch;

/// Of the payload. Fields are added and never renamed or removed within a version.
const VERSION: u32 = 1;
/// Lines of a text.
const LINES_MAX: usize = 50;
/// Characters of a title, and of an event in a text.
const TITLE_MAX: usize = 160;
const LINE_MAX: usize = 1000;

/// A message, as a webhook sends it.
#[derive(Clone, Debug, Serialize)]
pub struct Message {
    /// Version of this shape.
    pub version: u32,
    /// The same for every try: what arrives twice is one message.
    pub id: String,
    /// When it was made.
    pub at: Timestamp,
    /// The daemon that tells it.
    pub node: String,
    /// That of the worst event that is not over.
    pub severity: Severity,
    /// One line.
    pub title: String,
    /// All of it, for people.
    pub text: String,
    /// The web interface.
    pub link: Option<String>,
    /// What happened, oldest first.
    pub events: Vec<Line>,
    /// Further events that there was no room for.
    pub more: u64,
    /// How often troubles that were told before occurred again since the last message.
    pub repeated: u64,
    /// Earlier messages or events that could not be told.
    pub lost: u64,
}

/// An event in a message.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// It.
    #[serde(flatten)]
    pub event: Event,
    /// It is the end of a trouble that was told.
    pub is_over: bool,
    /// How often the same occurred since it was last told.
    pub again: u64,
}

impl Message {
    /// Of what there is to tell.
    pub fn of(node: &str, link: Option<&str>, batch: Batch<Event>, lost: u64) -> Self {
        let lines = batch.items.into_iter();
        let events: Vec<Line> =
            lines.map(|item| Line { event: item.event, is_over: item.is_over, again: item.again }).collect();
        let worst = events.iter().filter(|line| !line.is_over).map(|line| line.event.severity).max();
        let mut message = Self {
            version: VERSION,
            id: Uuid::now_v7().to_string(),
            at: Timestamp::now(),
            node: node.to_owned(),
            severity: worst.unwrap_or(Severity::Info),
            title: title(&events, batch.more),
            text: String::new(),
            link: link.map(str::to_owned),
            events,
            more: batch.more,
            repeated: batch.repeated,
            lost,
        };
        message.text = message.to_text();
        message
    }

    /// That says nothing but that it arrived.
    pub fn test(node: &str, link: Option<&str>) -> Self {
        let text = format!("a test: notifications of the Virtward daemon on {node} arrive here");
        Self::alone(node, link, Severity::Info, "notify-test", text)
    }

    /// Of one event that no journal has.
    pub fn alone(node: &str, link: Option<&str>, severity: Severity, kind: &str, message: String) -> Self {
        let event = Event {
            id: Uuid::now_v7().to_string(),
            at: Timestamp::now(),
            severity,
            kind: kind.into(),
            message,
            said: None,
            vm: None,
            vm_name: None,
            node: None,
            host: None,
            job: None,
            policy: None,
            repository: None,
        };
        let items = vec![virtward_decide::notify::Item { event, is_over: false, again: 0 }];
        Self::of(node, link, Batch { items, more: 0, repeated: 0 }, 0)
    }

    /// Events that it is about.
    pub fn count(&self) -> u64 {
        self.events.len() as u64 + self.more
    }

    fn to_text(&self) -> String {
        let mut text = String::new();
        for line in self.events.iter().take(LINES_MAX) {
            let word = match (line.is_over, line.event.severity) {
                (true, _) => "over",
                (_, Severity::Info) => "info",
                (_, Severity::Warning) => "warning",
                (_, Severity::Error) => "ERROR",
            };
            let message = cut(line.event.message.trim(), LINE_MAX).replace('\n', "\n    ");
            let _ = write!(text, "{:.0}  {word}  {message}", line.event.at);
            if line.again > 0 {
                let _ = write!(text, " (and {} times before that)", line.again);
            }
            text.push('\n');
        }
        let more = self.count().saturating_sub(LINES_MAX as u64);
        if more > 0 {
            let _ = writeln!(text, "… and {more} more; virtward status and the web interface have them all");
        }
        if self.repeated > 0 {
            let _ = writeln!(text, "Troubles that were told before occurred again {} times.", self.repeated);
        }
        if self.lost > 0 {
            let _ = writeln!(text, "{} earlier messages or events could not be told.", self.lost);
        }
        let _ = write!(text, "\nVirtward on {}", self.node);
        if let Some(link) = &self.link {
            let _ = write!(text, "\n{link}");
        }
        text.push('\n');
        text
    }
}

/// One line, without anything that could end it.
fn title(events: &[Line], more: u64) -> String {
    let text = match events {
        [one] if more == 0 && one.is_over => format!("over: {}", one.event.message),
        [one] if more == 0 => one.event.message.clone(),
        _ => {
            let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
            events
                .iter()
                .filter(|line| !line.is_over)
                .for_each(|line| *kinds.entry(&line.event.kind).or_default() += 1);
            let troubles = kinds.values().sum::<usize>() as u64 + more;
            let over = events.iter().filter(|line| line.is_over).count();
            let kinds: Vec<String> = kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
            let kinds = if kinds.is_empty() { String::new() } else { format!(" ({})", kinds.join(", ")) };
            match (troubles, over) {
                (0, over) => format!("{over} troubles are over"),
                (_, 0) => format!("{troubles} events{kinds}"),
                _ => format!("{troubles} events{kinds}, {over} are over"),
            }
        }
    };
    let text: String = text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    cut(&text, TITLE_MAX)
}

fn cut(text: &str, max: usize) -> String {
    match text.char_indices().nth(max) {
        None => text.to_owned(),
        Some((at, _)) => format!("{}…", &text[..at]),
    }
}

#[cfg(test)]
mod tests {
    use virtward_decide::notify::Item;

    use super::*;

    fn item(kind: &str, text: &str, severity: Severity, is_over: bool) -> Item<Event> {
        let event = Message::test("h", None).events.remove(0).event;
        Item { event: Event { kind: kind.into(), message: text.into(), severity, ..event }, is_over, again: 0 }
    }

    fn message(items: Vec<Item<Event>>) -> Message {
        Message::of("kvm1", Some("https://kvm1:8460/"), Batch { items, more: 0, repeated: 0 }, 0)
    }

    #[test]
    fn one_event_is_its_own_title_on_one_line() {
        let long = format!("backup of web1 failed\r\nBcc: x@example.org{}", "y".repeat(300));
        let made = message(vec![item("job-failed", &long, Severity::Error, false)]);
        assert!(made.title.starts_with("backup of web1 failed  Bcc: x") && made.title.chars().count() <= 161);
        assert!(!made.title.contains(char::is_control));
        assert_eq!(made.severity, Severity::Error);
        let over = message(vec![item("host-state", "host kvm1 is up", Severity::Info, true)]);
        assert_eq!((over.title.as_str(), over.severity), ("over: host kvm1 is up", Severity::Info));
        assert!(over.text.contains("\nVirtward on kvm1\nhttps://kvm1:8460/"));
    }

    #[test]
    fn many_are_counted_by_kind_and_the_text_is_bounded() {
        let mut items: Vec<_> =
            (0..120).map(|n| item("job-failed", &format!("backup of vm{n} failed"), Severity::Error, false)).collect();
        items.push(item("repository-state", "repository default cannot be used", Severity::Error, false));
        items.push(item("host-state", "host kvm2 is up", Severity::Info, true));
        let made = message(items);
        assert_eq!(made.title, "121 events (120 job-failed, 1 repository-state), 1 are over");
        assert!(made.text.contains("… and 72 more"), "{}", made.text);
        let json = serde_json::to_value(&made).unwrap();
        assert_eq!((&json["version"], &json["events"][0]["kind"]), (&1.into(), &"job-failed".into()));
        assert_eq!(json["events"].as_array().unwrap().len(), 122);
    }
}
