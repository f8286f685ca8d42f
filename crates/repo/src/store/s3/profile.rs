//! The credentials and configuration files that other tools for object storage use too.
//!
//! Sections in brackets, `key = value` lines, comments with `#` or `;`. Indented lines belong to nested settings, none of
//! which are read here. Nothing of a file's content is ever part of an error message.

use std::{collections::HashMap, io, path::Path};

use zeroize::Zeroizing;

use crate::error::{Error, Result};

/// The settings of one profile.
#[derive(Default)]
pub struct Profile(HashMap<String, Zeroizing<String>>);

impl Profile {
    /// A setting.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(|value| &***value)
    }
}

/// Longest file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Reads a profile's section of a file: `[name]` or `[profile name]`. `None` if there is no file or no such section.
pub fn read(path: &Path, name: &str) -> Result<Option<Profile>> {
    let fail = |e| Error::io("read", path.display().to_string(), e);
    let text = match std::fs::metadata(path) {
        Ok(meta) if meta.len() > FILE_BYTES_MAX => {
            return Err(fail(io::Error::other("it is too long for a file of credentials")));
        }
        Ok(_) => Zeroizing::new(std::fs::read_to_string(path).map_err(fail)?),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fail(e)),
    };
    Ok(parse(&text, name))
}

/// The same from a file's text.
pub fn parse(text: &str, name: &str) -> Option<Profile> {
    let mut found: Option<Profile> = None;
    let mut inside = false;
    for line in text.lines() {
        let is_nested = line.starts_with([' ', '\t']);
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) || is_nested {
            continue;
        }
        if let Some(section) = line.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            let section = section.0.trim();
            let section = section.strip_prefix("profile ").map_or(section, str::trim);
            inside = section == name;
            if inside {
                found.get_or_insert_default();
            }
        } else if let (true, Some(profile), Some((key, value))) = (inside, &mut found, line.split_once('=')) {
            profile.0.insert(key.trim().to_ascii_lowercase(), Zeroizing::new(value.trim().to_owned()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_section_that_was_asked_for_is_read() {
        let text = "# comment\n[default]\naws_access_key_id = A\n\n[profile backup]\nregion=eu-1\ns3 =\n  region = no\n\
                    endpoint_url = http://x:1/?a=b\n[other]\nregion = us-9\n";
        assert_eq!(parse(text, "default").unwrap().get("aws_access_key_id"), Some("A"));
        let backup = parse(text, "backup").unwrap();
        assert_eq!(backup.get("region"), Some("eu-1"));
        assert_eq!(backup.get("endpoint_url"), Some("http://x:1/?a=b"));
        assert!(parse(text, "nobody").is_none());
        assert!(parse("]=[\n[\n=\n[x]\n=", "x").unwrap().get("").is_some());
    }
}
