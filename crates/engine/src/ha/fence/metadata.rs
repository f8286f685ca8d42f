//! What an agent says about itself: its parameters. Agents ignore parameters that they do not know, with a warning that
//! nobody reads, so a typo (`prot` for `port`) would be found when a host has to be fenced.

use super::{Action, Device, Error};

/// An agent's description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Its parameters.
    pub parameters: Vec<Parameter>,
    /// Its actions.
    pub actions: Vec<String>,
}

/// One parameter of an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Whether it must be given (and has no default).
    pub required: bool,
    /// What it is for.
    pub description: String,
}

impl Device {
    /// Asks the agent what it knows. No device is asked.
    pub async fn metadata(&self) -> Result<Metadata, Error> {
        let bare = Device { parameters: Default::default(), secrets: Default::default(), ..self.clone() };
        let (_, text) = bare.call(Action::Metadata).await?;
        parse(&text)
            .ok_or_else(|| Error::Failed { action: "metadata", said: "what it prints is no description".into() })
    }
}

fn parse(text: &str) -> Option<Metadata> {
    let document = roxmltree::Document::parse(text.trim()).ok()?;
    let root = document.root_element();
    if !root.has_tag_name("resource-agent") {
        return None;
    }
    let named = |tag: &'static str| root.descendants().filter(move |node| node.has_tag_name(tag));
    let parameter = |node: roxmltree::Node| {
        let default = node.children().any(|child| child.has_tag_name("content") && child.has_attribute("default"));
        let description = node.children().find(|child| child.has_tag_name("shortdesc"));
        Some(Parameter {
            name: node.attribute("name")?.to_owned(),
            required: node.attribute("required") == Some("1") && !default,
            description: description.and_then(|d| d.text()).map(super::words).unwrap_or_default(),
        })
    };
    Some(Metadata {
        parameters: named("parameter").filter_map(parameter).collect(),
        actions: named("action").filter_map(|node| node.attribute("name").map(str::to_owned)).collect(),
    })
}

impl Metadata {
    /// The parameter whose name looks most like `typed`, which is none of them.
    pub(super) fn closest(&self, typed: &str) -> Option<&str> {
        let scored = self.parameters.iter().map(|known| (distance(typed, &known.name), known.name.as_str()));
        scored.filter(|(distance, name)| *distance <= 2.min(name.len() / 2)).min().map(|(_, name)| name)
    }
}

/// How many letters must be changed, added or left out; two that changed places count as two.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_descriptions_are_no_descriptions() {
        for text in [
            "",
            "<resource-agent",
            "hello",
            "<x/>",
            "<!DOCTYPE a [<!ENTITY b \"c\">]><resource-agent>&b;</resource-agent>",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn typos_are_recognised() {
        let parameter = |name: &str| Parameter { name: name.into(), required: false, description: String::new() };
        let metadata =
            Metadata { parameters: ["port", "plug", "ip", "username"].map(parameter).into(), actions: vec![] };
        assert_eq!(metadata.closest("prot"), Some("port"));
        assert_eq!(metadata.closest("usrname"), Some("username"));
        assert_eq!(metadata.closest("colour"), None);
    }
}
